"The notebooks are tests: each runs from top to bottom, and the package is what they export."
import importlib.util, os, shutil, subprocess, sys
from pathlib import Path
import pytest

root = Path(__file__).parent.parent
notebooks = sorted(p.relative_to(root) for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)

def run(module, *args, cwd=root):
    "A command of nbdev, in this interpreter's environment."
    code = f"from nbdev.{module[0]} import {module[1]}; {module[1]}()"
    # the lessons on the sample, whatever else this machine has; one thread each, or the notebooks wait for each other's
    env = {**os.environ, 'MPLBACKEND':'agg', 'IN_TEST':'', 'FNNLITE_DATA':str(root/'fnnlite'/'mnist'/'sample.npz'), 'OMP_NUM_THREADS':'1'}
    p = subprocess.run([sys.executable, '-c', code, *map(str, args)], cwd=cwd, env=env, capture_output=True, text=True)
    assert p.returncode==0, p.stdout+p.stderr
    return p.stdout

long = '^0[234]_' # lessons that train for minutes
def test_notebooks_run(): assert 'Success' in run(('test','nbdev_test'), '--n-workers', 2, '--skip-file-re', long)
@pytest.mark.slow
def test_long_lessons_run(): assert 'Success' in run(('test','nbdev_test'), '--n-workers', 2, '--file-re', long)

def exported(folder):
    "The package's files by name, without those that are written by hand."
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*.py')}
    return {name:text for name,text in files.items() if name not in ('__init__.py','functional.py','_help.py')}

def test_package_is_what_the_notebooks_export(tmp_path):
    "A fresh export into an empty package gives the same files: nothing edited by hand, nothing left of a deleted notebook."
    for o in ('nbs','pyproject.toml','README.md'):
        (shutil.copytree if (root/o).is_dir() else shutil.copy)(root/o, tmp_path/o)
    (tmp_path/'fnnlite').mkdir()
    for o in ('__init__.py','functional.py'): shutil.copy(root/'fnnlite'/o, tmp_path/'fnnlite')
    run(('doclinks','nbdev_export'), cwd=tmp_path)
    ours,fresh = exported(root/'fnnlite'),exported(tmp_path/'fnnlite')
    assert sorted(ours)==sorted(fresh)
    for name,text in fresh.items(): assert ours[name]==text, f"fnnlite/{name} is not what its notebook exports: run nbdev-export"

def test_notebooks_are_clean(tmp_path):
    "Without execution counts and machine metadata, as nbdev-clean leaves them."
    for nb in notebooks:
        (tmp_path/nb).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root/nb, tmp_path/nb)
    shutil.copy(root/'pyproject.toml', tmp_path)
    run(('clean','nbdev_clean'), cwd=tmp_path)
    for nb in notebooks: assert (tmp_path/nb).read_text()==(root/nb).read_text(), f"{nb} is not clean: run nbdev-clean"

def test_readme_is_made_from_index():
    from fastcore.nbio import read_nb
    spec = importlib.util.spec_from_file_location('make_readme', root/'scripts'/'make_readme.py')
    spec.loader.exec_module(make_readme := importlib.util.module_from_spec(spec))
    assert make_readme.readme(read_nb(root/'nbs'/'index.ipynb'))==(root/'README.md').read_text(encoding='utf-8'), "run scripts/make_readme.py"
