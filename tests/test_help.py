"`help` shows the comments beside the parameters."
import importlib.util, pydoc
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from fastcore.docments import docments
from fnnlite import Lin, Module, _help
from fnnlite.train.resuming import Checkpoint

root = Path(__file__).parent.parent

def test_help_has_the_comments():
    "Of methods, classes, and what is in a room that is loaded when it's used."
    for o,said in (Module.backward,"\n    free: let go of each call's record"), (Lin,'\n |  bias: a bias, where'), (Checkpoint,'\n |  resume: go on'):
        assert said in pydoc.plain(pydoc.render_doc(o))

def test_texts_are_the_sources_comments():
    spec = importlib.util.spec_from_file_location('make_help', root/'scripts'/'make_help.py')
    spec.loader.exec_module(make_help := importlib.util.module_from_spec(spec))
    assert make_help.text()==(root/'fnnlite'/'_help.py').read_text(encoding='utf-8'), "run scripts/make_help.py"

def test_comments_are_those_that_fastcore_finds():
    for room,entries in _help.params.items():
        for name,params in entries.items():
            o = attrgetter(name)(import_module(room))
            theirs = {k:v for k,v in docments(getattr(o, '__func__', o), args_kwargs=True).items() if v}
            assert {' '.join(v.split()) for v in theirs.values()}<={*params.values()}, f"{room}.{name}"
