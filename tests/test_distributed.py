"Real processes, started with torchrun: distributed_worker.py says what they check; here, that all of it passed in each of them, and the command."
import json, os, re, runpy, subprocess, sys, sysconfig, time
from pathlib import Path
import numpy as np
import pytest, torch
import distributed_worker as worker
from fnnlite import Add, Concat, Lin, Matmul, Model, Module, Mse, Relu, Sequential, load_mnist, const
from fnnlite.train.checkpoints import load_tensors
from fnnlite.train.distributed import share

here = Path(__file__).parent
script = Path(sysconfig.get_path('scripts'))/'fnnlite_train'

def torchrun(n, *args, **env):
    "What `n` processes of this machine leave: (exit status, stdout, stderr)"
    env = {**os.environ, 'OMP_NUM_THREADS':'1', **env}
    cmd = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(n), *map(str, args)]
    with subprocess.Popen(cmd, cwd=here, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as p:
        try: out,err = p.communicate(timeout=80)
        except BaseException:
            p.terminate() # it ends its processes
            raise
    return p.returncode,out,err


# When a gradient is ready

def ready(module, *args, g=None):
    "In a pass back over `module(*args)`, the parameters that became ready, by name and with a copy of their gradient then"
    names,seen = {p:n for n,p in module.named_parameters()},[]
    out = module(*args)
    module.backward(torch.ones_like(out) if g is None else g, ready=lambda p: seen.append((names[p], None if p.g is None else p.g.clone())))
    for n,g in seen: assert g is None or torch.equal(g, dict(module.named_parameters())[n].g), f'{n} changed after it was ready'
    return [n for n,_ in seen]

def test_ready_last_layer_first(): assert ready(Sequential(Lin(4, 3), Relu(), Lin(3, 2)), torch.randn(5, 4))==['2.w','2.b','0.w','0.b']
def test_ready_after_the_last_use(): assert ready(worker.Twice(), torch.randn(3, 4, dtype=torch.float64))==['c.w','c.b','b.w','b.b','a.w','a.b']

class Tied(Module):
    "A weight that is a layer's parameter and, further up, an argument."
    def __init__(self): self.a,self.b,self.mm = Lin(4, 4),Lin(4, 4),Matmul()
    def forward(self, x): return self.mm(self.b(self.a(x)), self.a.w)

def test_ready_when_an_argument_too(): assert ready(Tied(), torch.randn(3, 4))==['b.w','b.b','a.w','a.b']

class Half(Module):
    "The output of one branch isn't used, another branch isn't taken."
    def __init__(self): self.a,self.b,self.never,self.add = Lin(4, 4),Lin(4, 4),Lin(4, 4),Add()
    def forward(self, x):
        self.b(x)
        return self.add(self.a(x), x)

def test_ready_without_a_gradient():
    "Of what is in the record, the part without a gradient is told of as well; of frozen weights never."
    m = Half()
    assert sorted(ready(m, torch.randn(3, 4)))==['a.b','a.w','b.b','b.w'] and m.b.w.g is None
    m.a.freeze()
    assert sorted(ready(m, torch.randn(3, 4)))==['b.b','b.w']

def test_ready_counts_what_was_there():
    "`.g` is then the sum with an earlier pass's."
    m,x = Lin(4, 2),torch.randn(3, 4)
    ready(m, x)
    once = m.w.g.clone()
    assert ready(m, x)==['w','b'] and torch.allclose(m.w.g, 2*once)

def test_error_in_ready_leaves_nothing():
    m,x = Sequential(Lin(4, 3), Relu(), Lin(3, 2)),torch.randn(5, 4)
    out = m(x)
    def f(p):
        if p is m[2].b: raise KeyError('no')
    with pytest.raises(KeyError): m.backward(torch.ones_like(out), ready=f)
    assert all(t.g is None for t in [*m.parameters(), x, out])
    m.backward(torch.ones_like(out))
    assert all(p.g is p.grad is not None for p in m.parameters())

def test_ready_inside_and_freed():
    "The same in a model with its loss, with the records let go on the way; the data is a constant."
    m,order = Model([Lin(4, 3), Relu(), Concat(), Lin(3, 1)], Mse()),[]
    m(const(torch.randn(5, 4)), const(torch.randn(5)))
    m.backward(free=True, ready=order.append)
    assert [id(p) for p in order]==[id(getattr(m.layers[i], k)) for i in (3,0) for k in 'wb']

def test_shares():
    "Every row once, in order; sizes differ by at most one."
    for n in range(20):
        for world in range(1, 7):
            parts = [range(*share(n, r, world)) for r in range(world)]
            assert [i for p in parts for i in p]==[*range(n)] and max(map(len, parts))-min(map(len, parts))<=1


# In several processes

walking = ['same_losses_and_weights','float32','no_row_to_train_with','fewer_rows_than_processes','other_losses','shared_layer','unused_branches',
    'cancels_in_all','cancelled_in_one','error_in_one','different_weights','different_data_and_models','metrics_with_a_state','weight_in_the_batch_is_kept','sent_while_walking',
    'only_the_first_writes','errors_name_the_process','torchs_wrappers','save','load']
four = ['same_losses_and_weights','float32','fewer_rows_than_processes','unused_branches','load']

@pytest.fixture(scope='module')
def two(tmp_path_factory):
    "A folder with what came of each check in each of two processes, and the files they wrote"
    folder = tmp_path_factory.mktemp('two')
    return folder,torchrun(2, 'distributed_worker.py', 'check', folder, *walking)

@pytest.fixture(scope='module')
def on_four(two): return two[0],torchrun(4, 'distributed_worker.py', 'check', two[0], *four)

def assert_passed(folder, got, n, name):
    for rank in range(n):
        path = folder/f'{n}_{rank}.json'
        said = json.loads(path.read_text()) if path.exists() else {}
        assert said.get(name)=='passed', f"process {rank}: {said.get(name, 'came to no end')}\n{[*said.values()][-1:]}\n{got[2][-3000:]}"

@pytest.mark.filterwarnings('ignore:torch.distributed is disabled')
def test_two_processes(two):
    "All checks; they end well, and one process goes on from what two saved with torch's own checkpoint. One test, or each worker of pytest's would start them."
    for name in walking: assert_passed(*two, 2, name)
    assert two[1][0]==0
    worker.torchs_checkpoint(two[0])

@pytest.mark.slow
def test_four_processes(on_four):
    for name in four: assert_passed(*on_four, 4, name)
    assert on_four[1][0]==0

@pytest.mark.slow
def test_the_groups_threads_end_with_it():
    "Or they abort the exit of Python now and then; torch's compiler imports functions that keep the group there is."
    code = """
import torch
from pathlib import Path
from fnnlite.train.distributed import processes
threads = lambda: len(list(Path('/proc/self/task').iterdir()))
before = threads()
with processes(torch.device('cpu')):
    import torch._dynamo
    assert threads()>before
assert threads()==before
"""
    status,_,err = torchrun(2, '--no-python', sys.executable, '-c', code)
    assert status==0, err


# The command

@pytest.fixture(scope='module')
def small(tmp_path_factory):
    "A quick set of data, and the options of a quick run with it"
    m,path = load_mnist(),tmp_path_factory.mktemp('data')/'small.npz'
    np.savez(path, x_train=m.x_train[:301].numpy(), y_train=m.y_train[:301].numpy(), x_test=m.x_valid[:101].numpy(), y_test=m.y_valid[:101].numpy())
    return ['--data', path, '--layers', '24', '--bs', '50', '--epochs', '4', '--lr', '.005', '--dropout', '0']

def history(folder): return [{k:v for k,v in r.items() if k!='time'} for r in load_tensors(folder/'checkpoint.safetensors')[1]['history']]

def killed(small, folder):
    "A run into `folder` in which process 1 gets SIGKILL in its third epoch: torchrun names it, within a minute, and we add a line at most."
    start = time.monotonic()
    code,_,err = torchrun(2, 'distributed_worker.py', 'command', *small, '--out', folder, KILL='1')
    assert code!=0 and time.monotonic()-start<60
    assert re.search(r'Root Cause.*rank +: 1 .*exitcode +: -9 .*SIGKILL', err, re.S) and len(re.findall('fnnlite_train', err))<=1, err
    assert len(history(folder))==2 and not (folder/'model.safetensors').exists()

@pytest.mark.slow
def test_terminated(small, tmp_path, tmp_path_factory):
    "As torchrun ends its processes, not all in the same batch: no traceback of theirs, no error, history and checkpoint of the whole epochs, status 143."
    logs,folder = tmp_path_factory.mktemp('logs'),tmp_path/'out'
    start = time.monotonic()
    code,_,err = torchrun(2, '--redirects', '3', '--log-dir', logs, 'distributed_worker.py', 'command', *small, '--out', folder, TERM='1')
    first,second = [next(logs.rglob(f'{rank}/stderr.log')).read_text() for rank in (0,1)]
    ours = [l for l in (first+second).splitlines() if 'Gloo' not in l]
    assert code!=0 and re.search(r'exitcode +: 143', err) and ours==[f'Stopped. History in {folder}; --resume goes on from the last whole epoch']
    assert len(history(folder))==2 and len((folder/'history.csv').read_text().splitlines())==3 and time.monotonic()-start<60

@pytest.mark.slow
def test_killed_and_resumed(small, tmp_path, tmp_path_factory, monkeypatch, capsys):
    "Going on from there, two processes print and write once what one does that was never stopped; float32, to 1e-5. The last batches are of one row."
    folder,one = tmp_path_factory.mktemp('killed')/'out',tmp_path
    killed(small, folder)
    logs = tmp_path_factory.mktemp('logs') # each process has its own, or lines of theirs could meet in one
    code,_,err = torchrun(2, '--redirects', '1', '--log-dir', logs, '--no-python', script, *small, '--out', folder, '--resume')
    assert code==0 and 'fnnlite' not in err, err
    monkeypatch.setattr(sys, 'argv', [*map(str, [script,*small,'--out',one])])
    with pytest.raises(SystemExit) as e: runpy.run_path(str(script), run_name='__main__')
    assert not e.value.code
    tidy = lambda out: [l.rsplit(maxsplit=1)[0] for l in out.splitlines() if 'differ by' not in l and '[Gloo]' not in l]
    first,second = [tidy(next(logs.rglob(f'{rank}/stdout.log')).read_text()) for rank in (0,1)]
    assert first==tidy(capsys.readouterr().out) and not second
    assert sorted(p.name for p in folder.iterdir())==sorted(p.name for p in one.iterdir())
    for r,s in zip(history(one), history(folder), strict=True): assert r==pytest.approx(s, rel=1e-5)
    for name in 'model','checkpoint':
        a,b = (load_tensors(o/f'{name}.safetensors')[0] for o in (one,folder))
        for k,t in a.items():
            if 'rng' not in k: torch.testing.assert_close(t, b[k], rtol=1e-5, atol=1e-5)
