"A whole training step (forward, backward, optimizer) as one graph, for every layer, loss and optimizer."
import pytest, torch
from torch._dynamo.testing import CompileCounterWithBackend
from fnnlite import train as train_rooms
from fnnlite import Module, Add, Concat, Dropout, Lin, Matmul, Relu, Reshape
from fnnlite import Sigmoid, Tanh, CrossEntropy, Mse, Model, Sequential, SGD, Adam, AdamW, RMSprop, const
from fnnlite.core.record import grad
from fnnlite.ops import routes
from fnnlite.train.optimizers import Optimizer
from cases import InNet, cases, loss_cases, name, one_each
from helpers import Lin64, assert_grads, public, rand

@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


opt_cases = {SGD: dict(momentum=.9, nesterov=True, weight_decay=.1), RMSprop: dict(momentum=.9, weight_decay=.1), Adam: dict(weight_decay=.1), AdamW: {}}

def test_every_optimizer_has_a_case(): assert public(train_rooms, torch.optim.Optimizer)-{Optimizer}==set(opt_cases)

@pytest.mark.parametrize('case', cases, ids=name)
def test_gradients(case): assert_grads(InNet(case), *case.inps())


# The compiled step

def step_of(m, opt):
    def step(*args):
        loss = m(*args)
        m.backward()
        opt.step()
        opt.zero_grad()
        return loss
    return step

def train(make, opt, batches, backend=None, step_of=step_of):
    "Losses and weights after a step for each batch, and the number of graphs that were compiled."
    torch.manual_seed(0)
    m = make()
    o = opt(m.parameters())
    o.zero_grad() # as later steps find it, or the second step compiles once more
    step,count = step_of(m, o),None
    if backend:
        count = CompileCounterWithBackend(backend)
        step = torch.compile(step, fullgraph=True, backend=count)
    torch.manual_seed(1)
    res = [step(*[t.clone() for t in b]).clone() for b in batches]
    assert all(grad(p) is None and p.grad is None for p in m.parameters())
    return res,[p.detach().clone() for p in m.parameters()],count and count.frame_count

def same(make, opt, batches, backend='eager', **kw):
    "Compiled as not compiled. The backend 'eager' runs the one graph as it was traced; 'aot_eager' also as functions without in-place changes."
    losses,ws,_ = train(make, opt, batches, **kw)
    losses_c,ws_c,n = train(make, opt, batches, backend, **kw)
    torch.testing.assert_close(losses_c, losses, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ws_c, ws, rtol=1e-10, atol=1e-12)
    assert backend!='eager' or n==1 # aot_eager traces twice, for the learning rate
    torch.manual_seed(0)
    assert all(not torch.equal(p, w) for p,w in zip(make().parameters(), ws)) # all weights moved

def sgd(ps): return SGD(ps, lr=.1)

class Side(Module):
    "One case of each class side by side, so that each reaches the loss and the weights at full strength."
    def __init__(self): self.nets,self.flat,self.cat = [InNet(c) for c in one_each],Reshape(-1),Concat()
    def forward(self, *inps):
        inps = iter(inps)
        return self.cat(*[self.flat(net(*[next(inps) for _ in range(net.n)])) for net in self.nets])
def for_side(): return [t for c in one_each for t in c.inps()]

def test_layers():
    "With the update by hand: half the time to compile."
    def by_hand(m, opt):
        def step(*args):
            loss = m(*args)
            m.backward()
            for p in m.parameters(): p.sub_(.1*p.g)
            m.zero_grad()
            return loss
        return step
    n = Side()(*for_side()).numel()
    same(lambda: Model(Side(), Mse('sum')), sgd, [(*for_side(),rand(n)) for _ in range(3)], 'aot_eager', step_of=by_hand)

@pytest.mark.parametrize('case', loss_cases, ids=name)
def test_losses(case):
    n = case.inps()[0].shape[-1]
    same(lambda: Model([Lin64(n, n)], case.make()), sgd, [tuple(case.inps()) for _ in range(3)], 'aot_eager')

@pytest.mark.parametrize('cls', opt_cases, ids=lambda c: c.__name__)
def test_optimizers(cls):
    same(lambda: Model([Lin64(4, 3)], Mse()), lambda ps: cls(ps, lr=.03, **opt_cases[cls]), [(rand(5, 4),rand(5, 3)) for _ in range(4)], 'aot_eager')

@pytest.mark.filterwarnings('ignore:`torch.jit:DeprecationWarning') # torch's own, as it imports inductor
@pytest.mark.parametrize('opt,loss,targ', [(lambda ps: SGD(ps, lr=.1, momentum=.9), Mse, lambda: rand(6, 3)),
    (lambda ps: AdamW(ps, lr=.01), CrossEntropy, lambda: torch.randint(0, 3, (6,)))], ids=['SGD','AdamW'])
def test_inductor(opt, loss, targ):
    same(lambda: Model([Lin64(4, 5), Relu(), Lin64(5, 3)], loss()), opt, [(rand(6, 4),targ()) for _ in range(4)], 'inductor')

def test_products_of_onednn(monkeypatch):
    "On a processor where oneDNN has the large products, the step is one graph all the same."
    if not torch.backends.mkldnn.is_available(): pytest.skip('this torch has no oneDNN')
    monkeypatch.setattr(routes, '_amd', 25)
    assert routes.onednn_is_faster(256, 512, 10) and routes.onednn_is_faster(512, 256, 10, by_columns=True)
    case = (lambda: Model([Lin(512, 10)], CrossEntropy())), sgd, [(torch.randn(256, 512),torch.randint(0, 10, (256,))) for _ in range(2)]
    ref,res = train(*case),train(*case, 'eager')
    torch.testing.assert_close(res[:2], ref[:2]) # in float32
    assert res[2]==1

@pytest.mark.filterwarnings('ignore:`torch.jit:DeprecationWarning') # torch's own
def test_a_class_index_out_of_range():
    "Where the loss is returned or nobody wants it, whose kernel leaves one of them out: the gradient would be wrong."
    m,x = Model([Lin64(4, 3)], CrossEntropy()),rand(5, 4)
    for loss in (True,False):
        @torch.compile(fullgraph=True)
        def step(x, y):
            out = m(x, y)
            m.backward()
            return (out if loss else 0),m.layers[0].w.g
        for bad in (3, -1, -2**63):
            with pytest.raises(RuntimeError, match='out of bounds'): step(x, torch.tensor([0,1,bad,2,0]))

class Loop(Module):
    "One layer several times, in a Python loop."
    def __init__(self, n=3): self.l,self.act,self.add,self.n = Lin64(4, 4),Tanh(),Add(),n
    def forward(self, x):
        for _ in range(self.n): x = self.add(x, self.act(self.l(x)))
        return x

def test_shared_layers():
    "One layer many times, one weight in two layers, and as an argument."
    class Tied(Module):
        def __init__(self):
            self.a = Lin64(4, 4)
            self.b,self.mm,self.loop = Lin(self.a.w, self.a.b),Matmul(),Loop(2)
        def forward(self, x):
            return self.loop(self.mm(self.b(self.a(x)), self.a.w))
    same(lambda: Model(Tied(), Mse()), sgd, [(rand(3, 4),rand(3, 4)) for _ in range(3)])

def test_loop_that_changes_its_length():
    "A graph for each length, and every step right."
    def by_length(m, opt):
        step = step_of(m, opt)
        def with_length(x, y, n):
            m.layers.n = n.shape[0]
            return step(x, y)
        return with_length
    batches = [(rand(3, 4),rand(3, 4),torch.zeros(n)) for n in (1,2,1,2)]
    losses,ws,_ = train(lambda: Model(Loop(), Mse()), sgd, batches, step_of=by_length)
    with torch._dynamo.config.patch(assume_static_by_default=True, automatic_dynamic_shapes=False):
        losses_c,ws_c,n = train(lambda: Model(Loop(), Mse()), sgd, batches, 'eager', step_of=by_length)
    torch.testing.assert_close(losses_c+ws_c, losses+ws, rtol=1e-10, atol=1e-12)
    assert n==2

def test_gradient_accumulation():
    "Two micro-batches in one graph."
    def accumulating(m, opt):
        def step(x, y):
            losses = []
            for i in (0,3):
                losses.append(m(x[i:i+3], y[i:i+3]))
                m.backward(torch.full_like(losses[-1], .5))
            opt.step()
            opt.zero_grad()
            return (losses[0]+losses[1])/2
        return step
    batches = [(rand(6, 4),rand(6, 3)) for _ in range(3)]
    make = lambda: Model([Lin64(4, 5), Tanh(), Lin64(5, 3)], Mse())
    torch.testing.assert_close(train(make, sgd, batches, 'eager', step_of=accumulating)[:2], train(make, sgd, batches)[:2])

def test_gradient_accumulation_over_steps():
    "Backward in one graph, the update in another."
    def make(compiled):
        torch.manual_seed(0)
        m = Model([Lin64(4, 3)], Mse())
        opt = SGD(m.parameters(), lr=.1, momentum=.9)
        opt.zero_grad()
        def back(x, y):
            m(x, y)
            m.backward()
        def update():
            opt.step()
            opt.zero_grad()
        if compiled: back,update = [torch.compile(f, fullgraph=True, backend='eager') for f in (back,update)]
        torch.manual_seed(1)
        for i in range(6):
            back(rand(3, 4), rand(3, 3))
            assert all(p.g is p.grad is not None for p in m.parameters())
            if i%2: update()
        return list(m.parameters())
    torch.testing.assert_close(make(True), make(False), rtol=1e-10, atol=1e-12)

def test_constant_batch_and_frozen_layers():
    def const_step(m, opt):
        step = step_of(m, opt)
        return lambda x,y: step(const(x), const(y))
    def frozen():
        m = Model([Lin64(4, 4), Tanh(), Lin64(4, 3)], Mse())
        m.layers[0].freeze()
        return m
    batches = [(rand(3, 4),rand(3, 3)) for _ in range(3)]
    same(lambda: Model([Dropout(.3), Lin64(4, 3)], Mse()), sgd, batches, step_of=const_step)
    eager,compiled = train(frozen, sgd, batches),train(frozen, sgd, batches, 'eager')
    torch.testing.assert_close(compiled[:2], eager[:2], rtol=1e-10, atol=1e-12)
    torch.manual_seed(0)
    assert torch.equal(compiled[1][0], frozen().layers[0].w)


# Not compiled again

def test_learning_rate_and_batches_do_not_recompile():
    "Other rates, new batches and old ones, predictions in between; and the weights are those of the eager steps."
    batches = [(rand(5, 4),rand(5, 3)) for _ in range(2)]
    def run(compiled=False):
        torch.manual_seed(0)
        m = Model([Lin64(4, 3)], Mse())
        o,count,n = Adam(m.parameters(), lr=.1),CompileCounterWithBackend('eager'),[]
        step = step_of(m, o)
        if compiled: step = torch.compile(step, fullgraph=True, backend=count)
        torch.manual_seed(1)
        own = [[t.clone() for t in b] for b in batches]
        for b in own*2: step(*b) # the first time, neither weights nor batches have a .g
        for i in range(1, 8):
            n.append(count.frame_count)
            o.lr = .1/i
            step(*(own[i%2] if i<4 else (rand(5, 4),rand(5, 3))))
            m.predict(rand(2, 4))
        return list(m.parameters()),n+[count.frame_count]
    (ps,_),(qs,n) = run(),run(True)
    torch.testing.assert_close(qs, ps, rtol=1e-10, atol=1e-12)
    assert n[0]>0 and n==n[:1]*8


# What is an error uncompiled is one compiled, too

class Raw(Module):
    def __init__(self, f): self.a,self.b,self.act,self.f = Lin64(4, 4),Lin64(4, 4),Sigmoid(),f
    def forward(self, x): return self.f(self, x)

def raw_path(m, x): return m.b(m.a(x)*2)
def raw_output(m, x): return m.b(m.a(x))*2
def right(m, x): return m.b(m.act(m.a(x)))
def in_place_between(m, x): return m.b(m.act(m.a(x)).mul_(2))
def in_place_out(m, x):
    h = m.act(m.a(x))
    o = m.b(h)
    h.add_(1)
    return o
def in_place_weight(m, x):
    o = m.b(m.a(x))
    m.b.w.mul_(2)
    return o

@pytest.mark.parametrize('f', [raw_path, raw_output, in_place_between, in_place_out, in_place_weight], ids=lambda f: f.__name__)
def test_refused(f):
    "Under `fullgraph` torch hides the text of our GradError; that it is one shows in the cause."
    m = Model(Raw(f), Mse())
    step = torch.compile(step_of(m, sgd(m.parameters())), fullgraph=True, backend='aot_eager')
    with pytest.raises(RuntimeError) as e: step(rand(4, 4), rand(4, 4))
    in_place = 'Runtime assertion failed' if torch.__version__.startswith('2.10') else 'a tensor was changed in place after it was recorded'
    assert 'GradError' in type(e.value.__cause__).__name__ or in_place in str(e.value)

def test_right_is_not_refused(): same(lambda: Model(Raw(right), Mse()), sgd, [(rand(4, 4),rand(4, 4))])

def test_wrong_shape_is_refused():
    m = Model([Lin64(4, 3)], Mse())
    with pytest.raises(RuntimeError): torch.compile(step_of(m, sgd(m.parameters())), fullgraph=True, backend='eager')(rand(5, 4), rand(5))

def test_scheduler_and_compiled_step():
    "A scheduler neither breaks the graph nor makes another one."
    torch._dynamo.reset()
    m,count = Model([Lin(4, 3)], Mse()),CompileCounterWithBackend('eager')
    opt = SGD(m.parameters(), lr=.1)
    sched = torch.optim.lr_scheduler.ExponentialLR(opt, .5)
    @torch.compile(fullgraph=True, backend=count)
    def step(x, y):
        m(x, y)
        m.backward()
        opt.step()
        opt.zero_grad()
    graphs = []
    for _ in range(6):
        step(const(torch.randn(5, 4)), const(torch.randn(5, 3)))
        sched.step()
        graphs.append(count.frame_count)
    assert graphs[2]==graphs[-1] and opt.lr==.1*.5**6


# Under autograd: forward and backward of nodes with a bwd of their own

under_autograd = pytest.mark.filterwarnings('ignore:<class .torch.autograd.function.Function.> should not be:DeprecationWarning', # torch's own, as it
    'ignore:`torch.jit:DeprecationWarning') # traces a Function, and as it imports inductor

def grads_of(f, x, ps):
    torch.manual_seed(1)
    loss = f(x)
    loss.backward()
    res = [loss.detach()]+[t.grad for t in (x,*ps)]
    for t in (x,*ps): t.grad = None
    return res

def same_grads(m, f, backend='aot_eager', rtol=1e-9):
    m.requires_grad_()
    x,ps,count = rand(4, 4).requires_grad_(),list(m.parameters()),CompileCounterWithBackend(backend)
    compiled = torch.compile(f, fullgraph=True, backend=count)
    for _ in range(2):
        ref = grads_of(f, x, ps)
        torch.testing.assert_close(grads_of(compiled, x, ps), ref, rtol=rtol, atol=rtol/100)
        assert all(g is not None for g in ref)
    assert count.frame_count==1

@under_autograd
def test_all_under_autograd():
    "All layers and losses, with raw operations before and behind"
    m = Side()
    inps = for_side()
    def f(x): return m(*[t*x.sum().sigmoid() if t.is_floating_point() else t for t in inps]).tanh().sum()
    same_grads(m, f)

@under_autograd
def test_inductor_under_autograd():
    m,y = Model([Lin64(4, 3), Dropout()], CrossEntropy()),torch.randint(0, 3, (4,))
    with torch._inductor.config.patch(fallback_random=True): same_grads(m, lambda x: m(x/2, y)*3, 'inductor', rtol=1e-6)

class Inherits(Lin):
    "super(), a method, a parameter of a module inside, nothing asked for the input"
    def __init__(self):
        super().__init__(4, 4, dtype=torch.float64)
        self.inner = Lin64(4, 4)
    def forward(self, inp): return super().forward(inp)+self.shift(inp)
    def shift(self, inp): return inp@self.inner.w+self.inner.b
    def bwd(self, out, inp):
        super().bwd(out, inp)
        self.inner.w.g,self.inner.b.g = inp.t()@out.g,out.g.sum(0)
        inp.g = inp.g+out.g@self.inner.w.t()

@under_autograd
def test_stand_in_and_dropout_in_eval():
    m = Sequential(Inherits(), Dropout().eval(), Loop(2))
    same_grads(m, lambda x: (m(x)*3).square().sum())

@under_autograd
def test_several_outputs_under_autograd():
    class Split(Module):
        def forward(self, x): return {'lo': x[:,:2]*2, 'rest': (x[:,2:].exp(), x.sum())}
        def bwd(self, out, x): x.g = torch.cat([out['lo'].g*2, out['rest'][0].g*out['rest'][0]], 1) + out['rest'][1].g
    m = Sequential(Lin64(4, 4), Split())
    def f(x):
        o = m(x)
        return (o['lo']*o['rest'][0]*o['rest'][1]).sum()
    if not torch.__version__.startswith('2.10'): return same_grads(m, f)
    with pytest.raises(RuntimeError, match='HOP body taking non-Tensor'): same_grads(m, f)

@under_autograd
def test_faulty_bwd_is_refused_under_autograd():
    class Forgets(Lin):
        def bwd(self, out, inp): inp.g = out.g@self.w.t()
    m,x = Forgets(4, 4).requires_grad_(),torch.randn(3, 4)
    with pytest.raises(RuntimeError) as e: torch.compile(lambda: m(x).sum(), fullgraph=True, backend='aot_eager')().backward()
    assert 'GradError' in repr(e.value)+repr(e.value.__cause__)

@under_autograd
def test_autocast_in_one_graph():
    "By records and under autograd"
    m,x = Model([Lin(4, 4), Relu(), Lin(4, 3)], CrossEntropy()),torch.randn(5, 4)
    y = torch.randint(0, 3, (5,))
    def step():
        with torch.autocast('cpu', torch.bfloat16): m(x, y)
        m.backward()
        res = [p.g for p in m.parameters()]
        m.zero_grad()
        return res
    m.zero_grad()
    ref = step()
    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend='aot_eager')(), ref)
    assert all(g.dtype==torch.float32 for g in ref)
    def f():
        with torch.autocast('cpu', torch.bfloat16): return m(x, y)
    m.requires_grad_()
    torch.compile(f, fullgraph=True, backend='aot_eager')().backward()
    torch.testing.assert_close([p.grad for p in m.parameters()], ref)
