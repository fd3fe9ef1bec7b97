"`compile_step`: the same weights as the ordinary step, whatever is changed in between; what can't be one graph is run as it is."
import random, re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
import pytest, torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from fnnlite import SGD, Adam, AdamW, CrossEntropy, DataLoaders, Dropout, GradError, Learner, Lin, Model, Module, Mse, RMSprop, Relu, accuracy, compile_step
from fnnlite import compiled
from fnnlite.callback import Callback, Checkpoint, OneCycle
from fnnlite.record import grad
from helpers import rand

Lin64 = partial(Lin, dtype=torch.float64)
Momentum = partial(SGD, momentum=.9, nesterov=True, weight_decay=.01)

@pytest.fixture
def interpreted(monkeypatch):
    "Graphs run one operation after another, which spares the compiler's ten seconds."
    monkeypatch.setattr(compiled, 'machine_code', lambda gm, ts: compiled.op_by_op(gm))

@pytest.fixture
def own_cache(monkeypatch, tmp_path): monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))

def net(drop=.2): return Model([Lin64(6, 5), Relu(), Dropout(drop), Lin64(5, 3)], CrossEntropy())
def batch(n=8): return rand(n, 6),torch.randint(0, 3, (n,))

def train(step_of, opt=Momentum, make=net, between=lambda i, model, opt: None, n=100, short=7, batch=batch, **kw):
    "Losses, weights and the step after `n` batches, every tenth of them short, with a new learning rate each."
    torch.manual_seed(0)
    model = make()
    opt = opt(model.parameters(), lr=.01)
    step = compile_step(model, opt, **kw)
    losses = []
    for i in range(n):
        between(i, model, opt)
        opt.lr = .01/(1+i/10)
        losses.append(step_of(step)(*batch(*[short]*(i%10==9))).item())
        assert all(p.grad is None and grad(p) is None for p in model.parameters())
    return torch.tensor(losses),[p.detach().clone() for p in model.parameters()],step

def same(graphs=1, **kw):
    "Compiled steps end where ordinary ones do."
    losses,ws,step = train(lambda s: s, **kw)
    losses_e,ws_e,step_e = train(lambda s: s.eager, **kw)
    torch.testing.assert_close((losses,ws), (losses_e,ws_e), rtol=1e-10, atol=1e-12)
    assert step.n_graphs==graphs and step.ordinary==(graphs==0)
    for n,g in step.g.items(): torch.testing.assert_close(g, step_e.g[n], rtol=1e-9, atol=1e-11)
    return step

@pytest.mark.parametrize('opt', [Momentum, AdamW], ids=['SGD','AdamW'])
def test_machine_code(opt):
    "Real machine code, with dropout, a changing rate and short batches; gradients by name."
    step = same(opt=opt, keep=['layers.1','layers.0.w'])
    assert step.g['layers.1'].shape==(7,5) and step.g['layers.0.w'].shape==(6,5)

@pytest.mark.parametrize('opt', [SGD, RMSprop, Adam, partial(Adam, weight_decay=.1)])
def test_optimizers(interpreted, opt): same(opt=opt)

def test_tied_weights_and_other_losses(interpreted):
    class Tied(Module):
        def __init__(self):
            self.a = Lin64(6, 6)
            self.b,self.last = Lin(self.a.w, self.a.b),Lin64(6, 1)
        def forward(self, x): return self.last(self.b(self.a(x)))
    same(make=lambda: Model(Tied(), Mse()), batch=lambda n=8: (rand(n, 6),rand(n)))


# What is changed between steps

def at(n, f): return lambda i, model, opt: f(model, opt) if i==n else None
def reload(model, opt):
    opt.load_state_dict(opt.state_dict())
    opt.param_groups[0]['lr'].fill_(.01)
def halve(model, opt):
    with torch.no_grad(): [p.mul_(.5) for p in model.parameters()]
def new_data(model, opt): model.layers[0].w.data = model.layers[0].w.data.t().contiguous().t()
def new_layer(model, opt):
    torch.manual_seed(5)
    model.layers[3] = Lin64(5, 3)
    opt.add_param_group({'params': list(model.layers[3].parameters())})

@pytest.mark.parametrize('change,graphs', [(halve, 1), (reload, 2), (lambda m,o: m.layers[0].freeze(), 2), (lambda m,o: m.eval(), 2),
    (new_data, 2), (new_layer, 2),
    (lambda m,o: o.param_groups[0].update(momentum=.5), 2), (lambda m,o: setattr(m.layers[2], 'p', .7), 2)],
    ids=['weights','reload','freeze','eval','layout','layer','momentum','option'])
def test_changes_are_seen(interpreted, change, graphs): same(graphs=graphs, between=at(30, change))

def test_an_option_that_an_optimizer_keeps_to_itself_is_seen(interpreted):
    class Clipped(SGD):
        most = 1e-3
        def update(self, ps, gs, memory, o): super().update(ps, [g.clamp(-self.most, self.most) for g in gs], memory, o)
    same(graphs=2, opt=Clipped, between=at(30, lambda m,o: setattr(o, 'most', 1.)))

def test_an_option_with_a_name_that_torch_has_too_is_seen(interpreted):
    class Scale(Module):
        def __init__(self): self.defaults = 2. # an optimizer has one
        def forward(self, x): return x*self.defaults
        def bwd(self, out, x): x.g = out.g*self.defaults
    make = lambda: Model([Lin64(6, 5), Scale(), Lin64(5, 3)], CrossEntropy())
    same(graphs=2, make=make, between=at(30, lambda m,o: setattr(m.layers[1], 'defaults', 3.)))

def test_what_a_class_says_is_seen(interpreted, monkeypatch):
    class Twice(Module):
        times = 2
        def forward(self, x): return x*self.times
        def bwd(self, out, x): x.g = out.g*self.times
    class Clipped(SGD):
        most = 1e-3
        def update(self, ps, gs, memory, o): super().update(ps, [g.clamp(-self.most, self.most) for g in gs], memory, o)
    start = lambda i, cls, k, a, b: i in (0,50) and monkeypatch.setattr(cls, k, b if i else a)
    make = lambda: Model([Lin64(6, 5), Twice(), Lin64(5, 3)], CrossEntropy())
    same(graphs=2, make=make, between=lambda i, *_: start(i, Twice, 'times', 2, 3))
    same(graphs=2, make=make, opt=Clipped, between=lambda i, *_: start(i, Clipped, 'most', 1e-3, 1.))

def test_a_method_that_forward_calls_is_seen(interpreted, monkeypatch):
    class Twice(Module):
        def times(self): return 2
        def forward(self, x): return x*self.times()
        def bwd(self, out, x): x.g = out.g*self.times()
    start = lambda i, *_: i in (0,50) and monkeypatch.setattr(Twice, 'times', lambda self: 3 if i else 2)
    same(graphs=2, make=lambda: Model([Lin64(6, 5), Twice(), Lin64(5, 3)], CrossEntropy()), between=start)

def test_dtype_is_seen(interpreted):
    "Another dtype, with the batch it needs."
    def run(step_of):
        torch.manual_seed(0)
        model = net()
        step = compile_step(model, SGD(model.parameters(), lr=.1))
        for i in range(6):
            if i==3: model.float()
            xb,yb = batch()
            step_of(step)(xb.to(model.layers[0].w.dtype), yb)
        return [p.detach() for p in model.parameters()]
    torch.testing.assert_close(run(lambda s: s), run(lambda s: s.eager), rtol=1e-6, atol=1e-7)

def test_gradients_that_are_there_are_added_to(interpreted):
    def run(step_of):
        torch.manual_seed(0)
        model = net(0.)
        step = compile_step(model, SGD(model.parameters(), lr=.1))
        for i in range(6):
            if i in (0,3):
                model(*batch())
                model.backward()
            step_of(step)(*batch())
        return [p.detach() for p in model.parameters()]
    torch.testing.assert_close(run(lambda s: s), run(lambda s: s.eager), rtol=1e-10, atol=1e-12)

def test_a_tensor_from_elsewhere_is_read_anew(interpreted):
    scale = rand(5)
    class Scaled(Module):
        def forward(self, x): return x*scale
        def bwd(self, out, x): x.g = out.g*scale
    def between(i, model, opt): scale.copy_(torch.arange(5)/5+i)
    same(make=lambda: Model([Lin64(6, 5), Scaled(), Lin64(5, 3)], CrossEntropy()), between=between)


# What can't be one graph

class Branch(Module):
    def __init__(self): self.a,self.b = Lin64(6, 3),Lin64(6, 3)
    def forward(self, x): return self.a(x) if x.sum()>0 else self.b(x)
class Draws(Module):
    def __init__(self): self.a = Lin64(6, 6)
    def forward(self, x):
        for _ in range(random.randint(0, 3)): x = self.a(x)
        return x
class Counts(Module):
    def __init__(self): self.a,self.n = Lin64(6, 3),0
    def forward(self, x):
        self.n += 1
        return self.a(x)

@pytest.mark.parametrize('make,why', [(Branch, 'data-dependent|aten._local_scalar_dense'), (Draws, 'random numbers'), (Counts, 'changes attributes')])
def test_ordinary_steps_where_there_is_no_graph(interpreted, make, why):
    start = lambda i, model, opt: random.seed(i)
    with pytest.warns(UserWarning, match='compile_step: no graph') as found:
        step = same(graphs=0, make=lambda: Model([make(), Lin64(6, 3)] if make is Draws else make(), CrossEntropy()), between=start)
    assert len([w for w in found if 'compile_step' in str(w.message)])==1
    assert re.search(why, step.why_not)

def test_hooks_are_heard(interpreted):
    heard,model = [],net()
    model.layers[1].register_forward_hook(lambda *_: heard.append(1))
    step = compile_step(model, SGD(model.parameters(), lr=.1))
    with pytest.warns(UserWarning, match='modules have hooks'): step(*batch())
    step(*batch())
    assert len(heard)==2

def test_a_hook_that_comes_later_is_heard(interpreted):
    heard,model = [],net()
    step = compile_step(model, SGD(model.parameters(), lr=.1))
    for _ in range(2): step(*batch())
    model.layers[1].register_forward_hook(lambda *_: heard.append(1))
    with pytest.warns(UserWarning, match='modules have hooks'): step(*batch())
    assert len(heard)==1

def test_a_bwd_that_is_replaced_is_seen(interpreted, monkeypatch):
    class Double(Module):
        def forward(self, x): return x*2
        def bwd(self, out, x): x.g = out.g*2
    right,wrong = lambda self, out, x: setattr(x, 'g', out.g*2),lambda self, out, x: setattr(x, 'g', out.g*3)
    same(graphs=2, make=lambda: Model([Lin64(6, 5), Double(), Lin64(5, 3)], CrossEntropy()),
        between=lambda i, model, opt: i in (0,50) and monkeypatch.setattr(Double, 'bwd', wrong if i else right))

def test_without_a_compiler(own_cache):
    with torch._inductor.config.patch({'cpp.cxx': ('/nowhere/g++',)}), pytest.warns(UserWarning, match='compile_step: no machine code') as found:
        step = same(n=20)
    assert len([w for w in found if 'compile_step' in str(w.message)])==1 and 'nowhere' in step.why_not

def test_where_no_compiler_is_wanted(monkeypatch):
    monkeypatch.setattr(compiled, 'machine_code', None)
    assert same(compiler=False, keep='layers.1').why_not is None

def test_an_optimizer_that_fails_half_way_is_undone(interpreted):
    class Half(SGD):
        def step(self, closure=None):
            super().step()
            self.done = float(next(iter(self.state)).sum()) # reads a number, after the update
    with pytest.warns(UserWarning, match='compile_step: no graph'): same(graphs=0, opt=Half)

def test_gives_up_where_things_change_all_the_time(interpreted):
    def between(i, model, opt): model.layers[2].p = .2+i/1e3
    with pytest.warns(UserWarning, match='was replaced 8 times'):
        losses,ws,step = train(lambda s: s, between=between)
    torch.testing.assert_close(ws, train(lambda s: s.eager, between=between)[1], rtol=1e-10, atol=1e-12)


# Errors are those of the ordinary step, and leave everything as it was

def test_errors(interpreted):
    model = net()
    opt = SGD(model.parameters(), lr=.1)
    step = compile_step(model, opt)
    x,y = batch()
    def fails(exc, match, *args):
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(exc, match=match): step(*args)
        assert all(map(torch.equal, before, model.parameters())) and step.why_not is None
    for _ in range(2): # before there is a graph, and with it
        fails(ValueError, 'class indices from 7 to 7, expected 0 to 2', x, torch.full_like(y, 7))
        fails(ValueError, r'inp has shape \(8, 5\)', x[:,:5], y)
        fails(TypeError, 'got an argument of type list, expected tensors', x.tolist(), y)
        with torch.no_grad(): fails(GradError, 'backward.. before a recorded forward', x, y)
        step(x, y)

def test_raw_operations_are_refused(interpreted):
    class Raw(Module):
        def __init__(self): self.a,self.b = Lin64(6, 6),Lin64(6, 3)
        def forward(self, x): return self.b(self.a(x)*2)
    model = Model(Raw(), CrossEntropy())
    with pytest.raises(GradError, match="made by a raw operation"): compile_step(model, SGD(model.parameters(), lr=.1))(*batch())

def test_wrong_arguments():
    model = net()
    opt = SGD(model.parameters(), lr=.1)
    with pytest.raises(TypeError, match='expected a fnnlite Module'): compile_step(torch.nn.Linear(2, 2), opt)
    with pytest.raises(TypeError, match='expected an optimizer of fnnlite.optim'): compile_step(model, torch.optim.SGD(model.parameters(), lr=.1))
    with pytest.raises(ValueError, match="keep has 'layers.9', expected names of modules or parameters: layers"): compile_step(model, opt, keep='layers.9')


# The GPU's path as far as it goes here

def test_captured():
    "Stand-ins for a CUDA graph: the weights are as before the capture, each batch goes to its place, results aren't overwritten."
    w,calls = torch.ones(2),[]
    def f(ts):
        calls.append(ts)
        ts[0].add_(ts[1])
        return [ts[0].sum()]
    class Graph:
        def replay(self): outs[0].copy_(f(calls[0])[0])
    class Capture:
        def __init__(self, graph): pass
        def __enter__(self): pass
        def __exit__(self, *_): pass
    outs = []
    def once(ts):
        res = f(ts)
        outs[:] = res
        return res
    run = compiled.captured(once, [w,torch.ones(2)], [1], graph=Graph(), capture=Capture)
    assert w.tolist()==[1,1]
    a = run([w,torch.full((2,), 3.)])[0]
    b = run([w,torch.full((2,), 4.)])[0]
    assert w.tolist()==[8,8] and (a.item(),b.item())==(8,16)

@pytest.mark.parametrize('opt', [SGD, partial(SGD, momentum=.9), RMSprop, Adam, AdamW])
def test_all_of_a_step_is_on_the_gpu(monkeypatch, opt):
    "With tensors that have a device and no numbers: rates and counts are where a captured graph reads them, also of an optimizer made before the move."
    seen = []
    monkeypatch.setattr(compiled, 'captured', lambda f, ts, batch: seen.append((ts, list(batch))) or f)
    monkeypatch.setattr(compiled, 'guard', lambda ts: SimpleNamespace(check=lambda *_: True))
    def param(*s, device): return nn.Parameter(torch.randn(*s, device=device), requires_grad=False)
    with FakeTensorMode():
        for start in ('cuda','cpu'):
            model = Model([Lin(param(4, 5, device=start), param(5, device=start)), Relu(), Dropout(.2)], CrossEntropy())
            o = opt(model.parameters())
            if start=='cpu':
                for n in 'wb': setattr(model.layers[0], n, param(*getattr(model.layers[0], n).shape, device='cuda'))
                o.param_groups[0]['params'][:] = model.parameters()
                for p in model.parameters(): o.state[p] = {k:torch.zeros((), dtype=torch.float64) if k=='step' else torch.zeros_like(p) for k in o.memory}
            step = compile_step(model, o, compiler=False)
            losses = [step(torch.randn(8, 4, device='cuda'), torch.randint(0, 5, (8,), device='cuda')) for _ in range(2)]
            assert step.why_not is None and all(l.is_cuda for l in losses)
    assert len(seen)==2
    for ts,batch in seen: assert all(t.is_cuda for t in ts) and [ts[i].shape for i in batch]==[(8,4),(8,)]


# Learner

def learner(compiled, cbs=(), opt=partial(AdamW, lr=.01)):
    torch.manual_seed(0)
    x,y = rand(50, 6),torch.randint(0, 3, (50,))
    dls = DataLoaders.from_arrays(x, y, x[:20], y[:20], bs=16)
    return Learner(net(), dls, opt, [accuracy], [OneCycle(.01), *cbs], compiled=compiled)

def test_learner(interpreted, tmp_path):
    "As without, history and weights; and a run that goes on from a checkpoint."
    a,b = learner(False).fit(6),learner(True).fit(6)
    strip = lambda h: [{k:v for k,v in r.items() if k!='time'} for r in h]
    for r,s in zip(strip(a.history), strip(b.history), strict=True): assert r==pytest.approx(s, rel=1e-9)
    torch.testing.assert_close(list(b.model.parameters()), list(a.model.parameters()), rtol=1e-10, atol=1e-12)
    class Stop(Callback):
        def before_epoch(self):
            if self.epoch==3: raise KeyboardInterrupt
    learner(True, [Checkpoint(tmp_path), Stop()]).fit(6)
    c = learner(True, [Checkpoint(tmp_path, resume=True)]).fit(6)
    torch.testing.assert_close(list(c.model.parameters()), list(a.model.parameters()), rtol=1e-10, atol=1e-12)

def test_learner_refuses_callbacks_that_look_inside():
    class Looks(Callback):
        def after_backward(self): pass
    with pytest.raises(ValueError, match="Looks wants to be called at 'after_backward', which is inside a compiled step"): learner(True, [Looks()]).fit(1)

def test_learner_stops_at_nan(interpreted):
    learn = learner(True, opt=partial(SGD, lr=.01))
    learn.cbs = [o for o in learn.cbs if not isinstance(o, OneCycle)]
    learn.model.layers[0].w.data[0,0] = torch.nan
    with pytest.raises(ArithmeticError, match='the loss is nan'): learn.fit(2)
