"The house: rooms (notebooks, and the modules exported from them) in folders, read and imported one way."
import ast, re
from importlib import import_module
from itertools import groupby
from pathlib import Path
import pytest
from fastcore.nbio import read_nb
import fnnlite

nbs = Path(__file__).parent.parent/'nbs'
def module(nb): return '.'.join([*nb.parent.parts, nb.stem.partition('_')[2]])
numbered = sorted(p.relative_to(nbs) for p in nbs.rglob('[0-9]*.ipynb') if '.ipynb_checkpoints' not in p.parts)
numbers = {nb:int(nb.stem.partition('_')[0]) for nb in numbered}
codes = {nb:[c.source for c in read_nb(nbs/nb).cells if c.cell_type=='code'] for nb in numbers}
rooms = {f'fnnlite.{module(nb)}':nb for nb,cells in codes.items() if any('#| export' in c for c in cells)}
each_room = pytest.mark.parametrize('room', rooms)

def test_numbers_are_the_reading_order():
    "As the index has it: no number twice, and one folder after the other."
    in_order = sorted(numbers, key=numbers.get)
    index = ''.join(c.source for c in read_nb(nbs/'index.ipynb').cells)
    assert len(set(numbers.values()))==len(numbers)
    assert [Path(o) for o in re.findall(r'(?m)^\|.*?\(nbs/(.*?\.ipynb)\)', index)]==in_order
    folders = [k for k,_ in groupby(nb.parent for nb in in_order)]
    assert len(set(folders))==len(folders) and folders[0]==Path('lessons')

def home(name, o):
    "The room of `o`, which is called `name`"
    return name if name in rooms else getattr(o, '__module__', None)

def uses(code):
    "The rooms that the imports in `code`, and `fnnlite.name`, get something from."
    for n in ast.walk(ast.parse(code)):
        if isinstance(n, ast.Import): yield from (a.name for a in n.names if a.name.startswith('fnnlite.'))
        elif isinstance(n, ast.ImportFrom) and n.module.partition('.')[0]=='fnnlite':
            source = import_module(n.module)
            if n.module in rooms: yield n.module
            else: yield from (home(f'{n.module}.{a.name}', getattr(source, a.name, None)) for a in n.names)
        elif isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id=='fnnlite':
            yield home('', getattr(fnnlite, n.attr))

@each_room
def test_imports_run_one_way(room):
    "A room's code and its examples use what is in the rooms before it."
    nb = rooms[room]
    assert re.findall(r'#\| default_exp (\S+)', '\n'.join(codes[nb]))==[module(nb)]
    for code in codes[nb]:
        for used in uses(code):
            assert numbers[rooms[used]]<numbers[nb], f"{nb} uses {used}, a room behind it:\n{code}"

@each_room
def test_no_room_has_the_name_of_what_it_exports(room):
    "Or `from fnnlite.ops import name` could mean either."
    assert room.rpartition('.')[2] not in import_module(room).__all__

def test_code_fits_a_page():
    "At most 100 columns, in all notebooks."
    for nb in nbs.rglob('*.ipynb'):
        for c in read_nb(nb).cells:
            for line in c.source.split('\n') if c.cell_type=='code' else (): assert len(line)<=100, f"{nb.name}: {line}"

@each_room
def test_rooms_are_small(room):
    assert len(Path(import_module(room).__file__).read_text(encoding='utf-8').splitlines())<=330 # of at most 100 columns

def test_links_lead_somewhere():
    "Between notebooks, and from the index, which is the README too."
    for nb in sorted(nbs.rglob('*.ipynb')):
        home = nbs.parent if nb.name=='index.ipynb' else nb.parent
        for c in read_nb(nb).cells:
            for link in re.findall(r'\]\(([^):]+?\.(?:ipynb|md))\)', c.source) if c.cell_type=='markdown' else ():
                assert (home/link).exists(), f"{nb.name}: {link}"
