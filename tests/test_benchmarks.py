"The command that measures, at a tiny size, and what its figures rest on. No test asserts a time."
import json, math, os, subprocess, sys
from pathlib import Path
import pytest, torch
from fnnlite import SGD, Lin, Model, Mse, Relu, compile_step
from fnnlite.ops import routes

root = Path(__file__).parents[1]
sys.path.insert(0, str(root)) # the benchmarks aren't part of the package

from benchmarks import floor, memory, nets, report, steps, times, torch_home
from benchmarks.workers import PeerError, Worker
from benchmarks.workloads import Workload, home_of, homes, workloads

def command(*args):
    "Run it in an environment without jax and tinygrad: (stdout, stderr)"
    code = "import runpy,sys; sys.modules.update(jax=None, tinygrad=None); runpy.run_module('benchmarks', run_name='__main__')"
    p = subprocess.run([sys.executable,'-c',code,*map(str, args)], cwd=root, env={**os.environ, 'OMP_NUM_THREADS':'1'}, capture_output=True, text=True)
    return p.returncode,p.stdout,p.stderr

@pytest.mark.slow
def test_command(tmp_path):
    peers = ['fnnlite eager','torch eager','torch fused','floor','numpy']
    code,out,err = command('--quick', '--workloads', 'numpy', '--peers', ','.join([*peers,'jax jit','tinygrad']),
        '--json', tmp_path/'res.json', '--out', tmp_path/'out')
    assert code==0, err
    res = json.loads((tmp_path/'res.json').read_text())
    rows = {r['peer']:r for r in res['steps']}
    assert list(rows)==peers and not res['failed']
    assert rows['torch eager']['to_eager']==rows['floor']['to_floor']==1
    for r in rows.values():
        assert len(r['seconds'])==2 and r['min']<=r['median']<=r['max']
        for key,ref in (('to_eager','torch eager'),('to_floor','floor')):
            assert r[key]==pytest.approx(sum(a/b for a,b in zip(r['seconds'], rows[ref]['seconds']))/2)
    assert set(res['left_out'])=={'jax jit','tinygrad jit'} and 'left out: jax jit: jax is not installed' in out
    assert {r['peer'] for r in res['memory']}=={'fnnlite eager','torch eager'} and all(r['bytes']>1000 for r in res['memory'])
    assert all(p in out for p in peers) and (tmp_path/'out'/'ratios.png').stat().st_size>5000
    page = report.page(res, 'plot.png')
    assert all(s in page for s in (torch.__version__, '| torch fused | ', 'forward 0: ', 'left out: jax jit')) and str(tmp_path) not in page

def test_refuses_what_it_does_not_know():
    code,_,err = command('--peers', 'theano')
    assert code==2 and "no peer 'theano'" in err

def test_every_peer_has_a_builder():
    assert set(torch_home.builders)==set(homes['torch']) and len(home_of)==sum(map(len, homes.values()))

def test_a_peer_that_computes_something_else_is_refused():
    ref = dict(losses=[2., 1.], rtol=1e-3)
    steps.check_losses(dict(losses=[2., 1.0005], rtol=1e-3), ref)
    for losses in ([2., 1.002], [2.01, 1.], [2., math.nan]):
        with pytest.raises(PeerError, match='expected'): steps.check_losses(dict(losses=losses, rtol=1e-3), ref)

@pytest.mark.parametrize('name', ['torch fused','numpy'])
@pytest.mark.parametrize('opt', ['sgd','momentum','adam'])
def test_same_losses(name, opt):
    "The check of the command, for every optimizer and loss; and three steps are enough to tell the optimizers apart"
    others = {'sgd':'momentum', 'momentum':'sgd', 'adam':'sgd'}
    for loss,nf in (('ce',5), ('mse',1), ('sse',3)):
        w = Workload('w', (8,7,6,nf), 16, loss, bias=loss!='ce')
        ref,other,res = (steps.build(n, w, o, 'cpu', .001) for n,o in (('torch eager',opt), ('torch eager',others[opt]), (name,opt)))
        steps.check_losses(res, ref)
        with pytest.raises(PeerError): steps.check_losses(res, other)

@pytest.mark.parametrize('net', [n for n in nets.nets if n!='gpt2']) # which takes minutes
def test_nets_give_the_same_losses(net):
    "All ways to take a step but the compiled ones; `measure` compares."
    times,_ = nets.measure(net, [n for n in nets.names if n not in nets.compiled], rounds=1, steps=1)
    assert all(len(ts)==1 and ts[0]>0 for ts in times.values())

def test_worker():
    with Worker() as worker:
        assert worker(int, '5')==5
        with pytest.raises(PeerError, match="^ValueError: invalid literal for int.*'x'$"): worker(int, 'x')
        with pytest.raises(PeerError, match='exit code 3'): worker(os._exit, 3)
        assert worker(int, '6')==6

def test_peak_memory():
    mb,kept = 2**20,[]
    def two_of_three():
        a = torch.empty(mb) # 4 MB
        del a
        b,c = torch.empty(mb),torch.empty(mb)
        del b,c
    def leaves_one():
        a,b = torch.empty(mb),torch.empty(mb)
        del b
        kept[:] = [a] # that of the last call goes only now
    before = torch.empty(10*mb) # isn't counted, though it's let go
    assert 8*mb<=memory.cpu_peak(two_of_three)<8.01*mb
    def drops(): nonlocal before; before = None; two_of_three()
    assert 8*mb<=memory.cpu_peak(drops)<8.01*mb
    assert 12*mb<=memory.cpu_peak(leaves_one)<12.01*mb

@pytest.mark.slow
def test_compiled_products_copy_nothing(monkeypatch):
    "inductor copies what an operation reads, and keeps it, unless it is told that any layout will do."
    if not torch.backends.mkldnn.is_available(): pytest.skip('this torch has no oneDNN')
    monkeypatch.setattr(routes, '_avx512', True) # else oneDNN's route copies weights
    monkeypatch.setattr(routes, '_amd', 25)
    model = Model([Lin(64, 256), Relu(), Lin(256, 1)], Mse())
    step,mb = compile_step(model, SGD(model.parameters())),2**20
    x,y = torch.randn(4096, 64),torch.randn(4096) # 4 MB of activations, and as much of their gradient
    for _ in range(2): step(x, y)
    assert step.why_not is None
    assert 8*mb<=memory.cpu_peak(lambda: step(x, y))<10*mb

def test_floor(monkeypatch):
    w = workloads['mlp64'].tiny()
    for name,a,b,c in floor.products(w):
        mats = floor.Matrices('cpu')
        exact = mats(a)@mats(b)
        assert exact.shape==c[1] and all(mats(m).is_contiguous() and mats(m, True).t().is_contiguous() for m in (a,b,c))
        for f in floor.candidates(mats, a, b, c).values(): torch.testing.assert_close(torch.as_tensor(f()), exact)
    assert len(floor.build(w, 'sgd', 'cpu').info)==5
    def candidates(mats, a, b, c):
        rounded = (mats(a)@mats(b)).bfloat16().float()
        return {'exact': lambda: mats(a)@mats(b), 'fast, of half the accuracy': lambda: rounded}
    monkeypatch.setattr(floor, 'candidates', candidates)
    assert set(floor.build(w, 'sgd', 'cpu').info.values())=={'exact'}

def test_pays_from():
    assert times.pays_from(first=10., eager_first=1., step=.001, eager_step=.004)==3000
    assert times.pays_from(10., 1., .004, .004) is None
