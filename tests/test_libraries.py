"The cache of compiled libraries: what another user put there, or what is damaged, isn't loaded; where there can be no cache, runs are compiled all the same."
import os, random, stat, subprocess, sys, tempfile, warnings
from pathlib import Path
import pytest, torch
from fnnlite.train import compiled, libraries

root = pytest.mark.skipif(os.getuid()!=0, reason='only root can give a file away')

@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    return tmp_path/'cache'/'fnnlite'/'compiled'

@pytest.fixture(params=[b'', b'{"nodes": []}'], ids=['', 'calls'])
def calls(request): return request.param

@pytest.fixture
def made(monkeypatch, calls):
    "What was compiled, which is some bytes here; nothing yet is in the folder of this process."
    libraries._temporary.cache_clear()
    made = []
    def compile_library(gm, ts):
        made.append(random.Random(len(made)).randbytes(5000))
        return made[-1],calls
    monkeypatch.setattr(libraries, 'compile_library', compile_library)
    return made

def library(n=3):
    _,gm,_ = compiled.trace(lambda a: [a*2+1], torch.ones(n))
    return libraries.library(gm, [torch.ones(n)])

def test_kept(folder, made, monkeypatch):
    path = library()
    assert library()==path and path.read_bytes()==made[0] and len(made)==1
    assert path.parent==folder and [stat.S_IMODE(p.stat().st_mode) for p in (folder,folder.parent)]==[0o700,0o700]
    assert library(4)!=path and len(made)==2 # another shape is another library
    monkeypatch.setattr(libraries, 'getsource', lambda module: 'another version of its operations')
    assert library() not in (path,library(4)) and len(made)==4

# What is in the folder

def truncated(path): path.write_bytes(path.read_bytes()[:-1])
def emptied(path): path.write_bytes(b'')
def flipped(path):
    code = bytearray(path.read_bytes())
    code[random.randrange(len(code))] ^= 1<<random.randrange(8)
    path.write_bytes(code)
def linked(path):
    copy = path.with_name('copy')
    path.replace(copy)
    path.symlink_to(copy)
def writable(path): path.chmod(0o666)
def pipe(path):
    path.unlink()
    os.mkfifo(path)
def given_away(path): os.chown(path, 12345, -1)

@pytest.mark.parametrize('harm', [truncated, emptied, *[flipped]*5, linked, writable, pipe, pytest.param(given_away, marks=root)])
def test_harmed_library_is_compiled_anew(folder, made, harm):
    path = library()
    harm(path)
    with pytest.warns(UserWarning, match=f'compile_step: .*{path.name}.*; it is compiled anew') as caught: again = library()
    assert len(caught)==1 and len(made)==2 and again.read_bytes()==made[1] and library()==again
    assert [p for p in folder.iterdir() if p.suffix=='.so']==[again]

def test_a_library_of_another_name_is_not_taken(folder, made):
    path = library()
    path.rename(path.with_name(path.name.replace('-', '-0', 1)))
    with pytest.warns(UserWarning, match='is damaged'): library()
    assert len(made)==2


# The folder itself

def link_to_other(p):
    p.rename(p.with_name('other'))
    p.symlink_to(p.with_name('other'))

@pytest.mark.parametrize('of', [lambda f: f, lambda f: f.parent], ids=['compiled','fnnlite'])
@pytest.mark.parametrize('harm', [link_to_other, lambda p: p.chmod(0o777), pytest.param(given_away, marks=root)], ids=['link','mode','owner'])
def test_folder_of_others_is_not_read(folder, made, harm, of):
    planted = library()
    harm(of(folder))
    why = 'compile_step: libraries are compiled for this run only: .*(a link|another user|others may write)'
    with pytest.warns(UserWarning, match=why) as caught: path = library()
    assert len(caught)==1 and len(made)==2 and path.read_bytes()==made[1]
    assert folder not in path.parents and stat.S_IMODE(path.parent.stat().st_mode)==0o700 and planted.exists()
    with pytest.warns(UserWarning): assert library()==path # it is there for the rest of the run

def test_another_user(folder, made, monkeypatch):
    library()
    monkeypatch.setattr(os, 'getuid', lambda: 12345)
    with pytest.raises(PermissionError, match='belongs to another user'): libraries.refuse_others(folder.resolve())

def test_who_may_write_above_could_exchange_the_folder():
    with tempfile.TemporaryDirectory() as tmp:
        shared = Path(tmp).resolve()
        shared.chmod(0o755)
        if any(p.stat().st_mode&0o001==0 for p in shared.parents): pytest.skip('nobody else gets here')
        own = shared/'mine'
        own.mkdir()
        own.chmod(0o755)
        libraries.refuse_others(own)
        for mode in (0o777,0o775):
            shared.chmod(mode)
            with pytest.raises(PermissionError, match=f'others may write in {shared}'): libraries.refuse_others(own)
        shared.chmod(0o1777) # as the temporary directory itself: what is there is its owner's to rename
        libraries.refuse_others(own)

def test_where_nobody_else_gets_through_a_group_may_write():
    "As under a home of mode 0700, where all a user makes has its group's mode."
    with tempfile.TemporaryDirectory() as tmp: # 0700
        own = Path(tmp).resolve()/'cache'/'mine'
        own.mkdir(parents=True)
        own.chmod(0o700)
        own.parent.chmod(0o775)
        libraries.refuse_others(own)

def below_a_file(tmp_path):
    (tmp_path/'file').write_text('')
    return tmp_path/'file'/'cache'

@pytest.mark.parametrize('home', [below_a_file, lambda tmp_path: tmp_path/'no'/'where', lambda _: Path('/proc/self/cache')], ids=['file','missing','proc'])
def test_no_place_for_a_cache(monkeypatch, tmp_path, made, home):
    home = home(tmp_path)
    monkeypatch.setenv('XDG_CACHE_HOME', str(home))
    with pytest.warns(UserWarning, match='compiled for this run only') as caught: path = library(5)
    assert len(caught)==1 and path.read_bytes()==made[0] and not home.exists() and home not in path.parents

def test_no_home(monkeypatch, made):
    monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
    monkeypatch.setattr(Path, 'home', lambda: (_ for _ in ()).throw(RuntimeError('no home')))
    with pytest.warns(UserWarning, match='compiled for this run only: no home'): assert library(6).exists()

def test_full_disk(folder, made, monkeypatch):
    put = libraries._put
    def full(path, code):
        if path.parent==folder: raise OSError(28, 'No space left on device')
        return put(path, code)
    monkeypatch.setattr(libraries, '_put', full)
    with pytest.warns(UserWarning, match="a library can't be kept: .*No space") as caught: path = library(7)
    assert len(caught)==1 and path.read_bytes()==made[0]


# The compiler, and other processes

def test_compiler_works_in_a_folder_of_its_own(folder, monkeypatch):
    "torch's own is one that anyone can name and fill; and other threads aren't told that this process compiles."
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # torch's own
        import torch._inductor.compile_fx as compile_fx
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', '/nowhere/shared')
    monkeypatch.delenv('TRITON_CACHE_DIR', raising=False)
    at = []
    def compile_fx_aot(gm, ts, config_patches):
        at[:] = [Path(os.environ[k]) for k in ('TORCHINDUCTOR_CACHE_DIR','TRITON_CACHE_DIR')]
        assert stat.S_IMODE(at[0].stat().st_mode)==0o700 and not list(at[0].iterdir()) and at[0] in at[1].parents and not torch.compiler.is_compiling()
        (at[0]/'a.so').write_bytes(b'code')
        return str(at[0]/'a.so')
    monkeypatch.setattr(compile_fx, 'compile_fx_aot', compile_fx_aot)
    assert library().read_bytes()==b'code'
    assert os.environ['TORCHINDUCTOR_CACHE_DIR']=='/nowhere/shared' and 'TRITON_CACHE_DIR' not in os.environ and not at[0].exists()

def python(code, home): return subprocess.Popen([sys.executable, '-W', 'error', '-c', code], env={**os.environ, 'XDG_CACHE_HOME': str(home)})

def test_two_processes(tmp_path):
    code = """import os
from fnnlite.train import libraries
folder = libraries.cache_folder()
for i in range(30):
    libraries.found(folder, str(i)) or libraries.kept(folder, str(i), os.urandom(3000))
    assert libraries.found(folder, str(i))"""
    both = [python(code, tmp_path) for _ in range(2)]
    assert [p.wait(timeout=300) for p in both]==[0,0]
    assert {p.suffix for p in (tmp_path/'fnnlite'/'compiled').iterdir()}=={'.so'}

@pytest.mark.slow
def test_uncompiled_runs_leave_the_cache_alone(tmp_path):
    code = """import torch, fnnlite.train.compiled
from fnnlite import SGD, Lin, Model, Mse, compile_step
model = Model(Lin(2, 1), Mse())
step = compile_step(model, SGD(model.parameters()), compiler=False)
for _ in range(2): step(torch.randn(3, 2), torch.randn(3))
step.eager(torch.randn(3, 2), torch.randn(3))"""
    assert python(code, tmp_path).wait(timeout=300)==0 and not list(tmp_path.iterdir())

@pytest.mark.parametrize('harm', [truncated, emptied, flipped, linked, writable, pipe, Path.unlink])
@pytest.mark.parametrize('calls', [b'{"nodes": []}'], indirect=False)
def test_harmed_calls_are_compiled_anew(folder, made, calls, harm):
    "The file beside the library, which says what torch is to call, is a part of it."
    path = library()
    harm(path.with_suffix('.json'))
    with pytest.warns(UserWarning, match='it is compiled anew') as caught: again = library()
    assert len(caught)==1 and len(made)==2 and again.read_bytes()==made[1] and library()==again
    assert again.with_suffix('.json').read_bytes()==calls
