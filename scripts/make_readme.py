"Write README.md from nbs/index.ipynb: the prose, the code, and what it printed when it last ran."
from pathlib import Path
from fastcore.nbio import read_nb

root = Path(__file__).parent.parent

def printed(output):
    "What one output of a cell shows as text"
    return output.get('text') or output.get('data', {}).get('text/plain', '')

def readme(nb):
    "The notebook as markdown"
    parts = []
    for cell in nb.cells:
        if cell.cell_type=='markdown': parts.append(cell.source.replace('\n> ', '\n'))
        elif '#| hide' not in cell.source:
            if parts and parts[-1].startswith('```'): # imports have a cell of their own
                parts[-1] = f'{parts[-1][:-3]}\n{cell.source}\n```'
            else: parts.append(f'```python\n{cell.source}\n```')
            text = ''.join(''.join(printed(o)) for o in cell.outputs).strip('\n')
            if text: parts.append('\n'.join(('    '+line).rstrip() for line in text.split('\n')))
    return '<!-- Made from nbs/index.ipynb by scripts/make_readme.py -->\n\n' + '\n\n'.join(parts) + '\n'

if __name__=='__main__': (root/'README.md').write_text(readme(read_nb(root/'nbs'/'index.ipynb')), encoding='utf-8')
