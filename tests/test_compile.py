"A net under `torch.compile`: each layer is a node whose `bwd` is in the compiled backward; and the optimizers."
import pytest, torch
from torch._dynamo.testing import CompileCounterWithBackend
from fnnlite import train as train_rooms
from fnnlite import Module, Add, Concat, Dropout, Lin, Matmul, Relu, Reshape
from fnnlite import Tanh, CrossEntropy, Mse, Model, Sequential, SGD, Adam, AdamW, RMSprop
from fnnlite.ops import routes
from fnnlite.train.optimizers import Optimizer
from cases import InNet, cases, loss_cases, name, one_each
from helpers import Lin64, assert_grads, public, rand

pytestmark = [pytest.mark.filterwarnings('ignore:<class .torch.autograd.function.Function.> should not be:DeprecationWarning'), # torch's own, as
    pytest.mark.filterwarnings('ignore:`torch.jit:DeprecationWarning')] # it traces a Function, and as it imports inductor

@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()

@pytest.mark.parametrize('case', cases, ids=name)
def test_gradients(case): assert_grads(InNet(case), *case.inps())

def grads_of(f, ts, *args):
    torch.manual_seed(1)
    loss = f(*args)
    loss.backward()
    res = [loss.detach()]+[t.grad for t in ts]
    for t in ts: t.grad = None
    assert all(g is not None for g in res)
    return res

def same(m, f=None, *args, backend='aot_eager', rtol=1e-9):
    "In one graph, and as uncompiled"
    ts = list(m.parameters())+[t for t in args if t.is_floating_point() and t.requires_grad]
    count = CompileCounterWithBackend(backend)
    f = f or m
    compiled = torch.compile(f, fullgraph=True, backend=count)
    for _ in range(2): torch.testing.assert_close(grads_of(compiled, ts, *args), grads_of(f, ts, *args), rtol=rtol, atol=rtol/100)
    assert count.frame_count==1


# Nets

class Side(Module):
    "One case of each class side by side, so that each reaches the loss and the weights at full strength."
    def __init__(self): self.nets,self.flat,self.cat = [InNet(c) for c in one_each],Reshape(-1),Concat()
    def forward(self, *inps):
        inps = iter(inps)
        outs = [net(*[next(inps) for _ in range(net.n)]) for net in self.nets]
        return self.cat(*[self.flat(t) for o in outs for t in (o if isinstance(o, tuple) else (o,))])
def for_side(): return [t for c in one_each for t in c.inps()]

def test_layers():
    "All of them, with torch's operations before and behind"
    m,inps = Side(),for_side()
    def f(x): return m(*[t*x.sum().sigmoid() if t.is_floating_point() else t for t in inps]).tanh().sum()
    same(m, f, rand(4, 4).requires_grad_())

@pytest.mark.parametrize('case', loss_cases, ids=name)
def test_losses(case):
    pred,targ = case.inps()
    same(Model([Lin64(pred.shape[-1], pred.shape[-1])], case.make()), None, pred.detach(), targ.detach())

def test_inductor():
    "In machine code, with dropout"
    with torch._inductor.config.patch(fallback_random=True):
        same(Model([Lin64(4, 5), Relu(), Lin64(5, 3), Dropout()], CrossEntropy()), None, rand(4, 4), torch.randint(0, 3, (4,)),
            backend='inductor', rtol=1e-6)

def test_products_of_onednn(monkeypatch):
    "On a processor where oneDNN has the large products, the forward is one graph all the same."
    if not torch.backends.mkldnn.is_available(): pytest.skip('this torch has no oneDNN')
    monkeypatch.setattr(routes, '_amd', 25)
    assert routes.onednn_is_faster(256, 512, 10) and routes.onednn_is_faster(512, 256, 10, by_columns=True)
    same(Model([Lin(512, 10)], CrossEntropy()), None, torch.randn(256, 512), torch.randint(0, 10, (256,)), rtol=1e-4)

class Loop(Module):
    "One layer several times, in a Python loop."
    def __init__(self, n=3): self.l,self.act,self.add,self.n = Lin64(4, 4),Tanh(),Add(),n
    def forward(self, x):
        for _ in range(self.n): x = self.add(x, self.act(self.l(x)))
        return x

def test_shared_layers():
    "One layer many times, one weight in two layers, and as an argument, torch's functions between"
    class Tied(Module):
        def __init__(self):
            self.a = Lin64(4, 4)
            self.b,self.mm,self.loop = Lin(self.a.w, self.a.b),Matmul(),Loop(2)
        def forward(self, x):
            h = self.b(self.a(x)).sin()
            return self.loop(self.mm(h, self.a.w)+x[:1])
    same(Model(Tied(), Mse()), None, rand(3, 4).requires_grad_(), rand(3, 4))

def test_a_frozen_layer():
    m = Model([Lin64(4, 4), Tanh(), Lin64(4, 3)], Mse())
    m.layers[0].freeze()
    x,y = rand(3, 4),rand(3, 3)
    torch.compile(m, fullgraph=True, backend='aot_eager')(x, y).backward()
    got = [p.grad for p in m.parameters()]
    m.zero_grad()
    m(x, y).backward()
    torch.testing.assert_close(got, [p.grad for p in m.parameters()])
    assert got[0] is None and got[2] is not None

class Inherits(Lin):
    "super(), a method, a parameter of a module inside"
    def __init__(self):
        super().__init__(4, 4, dtype=torch.float64)
        self.inner = Lin64(4, 4)
    def forward(self, inp): return super().forward(inp)+self.shift(inp)
    def shift(self, inp): return inp@self.inner.w+self.inner.b
    def bwd(self, out, inp):
        super().bwd(out, inp)
        self.inner.w.g,self.inner.b.g = inp.t()@out.g,out.g.sum(0)
        inp.g = inp.g+out.g@self.inner.w.t()

def test_a_bwd_that_calls_another():
    m = Sequential(Inherits(), Dropout().eval(), Loop(2))
    same(m, lambda x: (m(x)*3).square().sum(), rand(4, 4).requires_grad_())

def test_several_outputs():
    class Split(Module):
        def forward(self, x): return {'lo': x[:,:2]*2, 'rest': (x[:,2:].exp(), x.sum())}
        def bwd(self, out, x): x.g = torch.cat([out['lo'].g*2, out['rest'][0].g*out['rest'][0]], 1) + out['rest'][1].g
    m = Sequential(Lin64(4, 4), Split())
    def f(x):
        o = m(x)
        return (o['lo']*o['rest'][0]*o['rest'][1]).sum()
    if not torch.__version__.startswith('2.10'): return same(m, f, rand(4, 4).requires_grad_())
    with pytest.raises(RuntimeError, match='HOP body taking non-Tensor'): same(m, f, rand(4, 4).requires_grad_())

def test_autocast():
    m,x,y = Model([Lin(4, 4), Relu(), Lin(4, 3)], CrossEntropy()),torch.randn(5, 4),torch.randint(0, 3, (5,))
    def f(x, y):
        with torch.autocast('cpu', torch.bfloat16): return m(x, y)
    same(m, f, x, y, rtol=1e-5)
    assert m.layers[0].w.dtype==torch.float32


# What is an error

def test_a_class_index_out_of_range():
    f = torch.compile(Model([Lin64(4, 3)], CrossEntropy()), fullgraph=True)
    for bad in (3, -1, -2**63):
        with pytest.raises(RuntimeError, match='out of bounds'): f(rand(5, 4), torch.tensor([0,1,bad,2,0])).backward()

def test_a_target_of_the_wrong_shape():
    with pytest.raises(RuntimeError, match='targ has shape'):
        torch.compile(Model([Lin64(4, 3)], Mse()), fullgraph=True, backend='eager')(rand(5, 4), rand(5))

def test_a_faulty_bwd():
    class Forgets(Lin):
        def bwd(self, out, inp): inp.g = out.g@self.w.t()
    m,x = Forgets(4, 4),torch.randn(3, 4)
    with pytest.raises(RuntimeError) as e: torch.compile(lambda: m(x).sum(), fullgraph=True, backend='aot_eager')().backward()
    assert 'GradError' in repr(e.value)+repr(e.value.__cause__)

def test_a_bwd_that_changes_its_upstream_gradient():
    "Uncompiled it is refused; compiled it has one of its own."
    class Twice(Module):
        def forward(self, x): return x*2
        def bwd(self, out, x): x.g = out.g.mul_(2)
    m,x = Twice(),torch.ones(3, requires_grad=True)
    torch.compile(lambda x: (m(x)+x).sum(), fullgraph=True, backend='aot_eager')(x).backward()
    assert x.grad.tolist()==[3,3,3]

def test_a_walk_by_hand():
    "There is no record to walk over."
    m = Model([Lin64(4, 3)], Mse())
    def step(x, y):
        m(x, y)
        m.backward()
    with pytest.raises(RuntimeError) as e: torch.compile(step, fullgraph=True, backend='eager')(rand(5, 4), rand(5, 3))
    assert 'GradError' in repr(e.value)+repr(e.value.__cause__)


# The optimizers' step

opt_cases = {SGD: dict(momentum=.9, nesterov=True, weight_decay=.1), RMSprop: dict(momentum=.9, weight_decay=.1), Adam: dict(weight_decay=.1), AdamW: {}}

def test_every_optimizer_has_a_case(): assert public(train_rooms, torch.optim.Optimizer)-{Optimizer}==set(opt_cases)

@pytest.mark.parametrize('cls', opt_cases, ids=lambda c: c.__name__)
def test_optimizers(cls):
    "Ten steps, and a rate that changes: the weights are those of uncompiled ones, and no graph is made for it."
    def run(compiled):
        torch.manual_seed(0)
        m = Model([Lin64(4, 3)], Mse())
        opt,count,graphs = cls(m.parameters(), lr=.03, **opt_cases[cls]),CompileCounterWithBackend('aot_eager'),[]
        sched = torch.optim.lr_scheduler.ExponentialLR(opt, .9)
        update = torch.compile(opt.step, fullgraph=True, backend=count) if compiled else opt.step
        for _ in range(10):
            m(rand(5, 4), rand(5, 3)).backward()
            update()
            m.zero_grad()
            sched.step()
            graphs.append(count.frame_count)
        return [p.detach() for p in m.parameters()],graphs
    (ps,_),(qs,graphs) = run(False),run(True)
    torch.testing.assert_close(qs, ps, rtol=1e-10, atol=1e-12)
    assert graphs[0]>0 and graphs[3]==graphs[-1]
