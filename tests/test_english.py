"Plain English: phrases that a reader stumbled over, in the book, the code and the README, and what stands there now."
from pathlib import Path
import pytest
from fastcore.nbio import read_nb

root = Path(__file__).parent.parent
instead = {
    "At its end stands": "It ends with",
    "written as it reads": "say what is meant",
    "has the chain rule for one": "falls back on the chain rule",
    "lie on one another": "overlap",
    "as often as the dice say": "a number of times drawn at random",
    "everything that has a name in deep learning": "say what is meant",
    "writes the first step down while it runs": "traces the first step and compiles it",
    "Those in the vector": "say what they are",
    "The part of the rows of": "say what share it is",
    "opt has none of the model's parameters": "the optimizer holds none of the model's parameters",
    "is turned around and one is not": "is transposed",
    "softmax could be anything": "only a zero backward would pass",
    "one would have seen a loss that stops falling": "`retain_grad` shows the same"}

def texts():
    for p in [*root.glob('*.md'), *(root/'nbs').rglob('*.ipynb'), *(root/'fnnlite').rglob('*.py')]:
        if '.ipynb_checkpoints' in p.parts: continue
        yield p,'\n'.join(c.source for c in read_nb(p).cells) if p.suffix=='.ipynb' else p.read_text(encoding='utf-8')

@pytest.fixture(scope='module')
def book(): return [*texts()]

@pytest.mark.parametrize('phrase', instead)
def test_plain_english(book, phrase):
    found = [str(p.relative_to(root)) for p,text in book if phrase.lower() in text.lower()]
    assert not found, f"{found}: '{phrase}'; better: {instead[phrase]}"
