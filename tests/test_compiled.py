"`compile_step`: the same weights as the ordinary step, whatever is changed in between; what can't be one graph is run as it is."
import random, re
from copy import deepcopy
from functools import partial
from threading import Thread
from types import SimpleNamespace
import pytest, torch
from torch import nn
import numpy as np
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR
import fnnlite
from fnnlite import SGD, Adam, AdamW, CrossEntropy, DataLoaders, Dropout, GradError, Learner
from fnnlite import Lin, Model, Module, Mse, RMSprop, Relu, Tanh, accuracy, compile_step
from fnnlite.core.record import const
from fnnlite.train import compiled
from fnnlite.train.callbacks import Callback, ClipGrads, OneCycle
from fnnlite.train.resuming import Checkpoint
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

def train(step_of, opt=Momentum, make=net, between=lambda i, model, opt: None, n=60, short=7, batch=batch, **kw):
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
        assert all(p.grad is None and p.g is None for p in model.parameters())
    return torch.tensor(losses),[p.detach().clone() for p in model.parameters()],step

def same(graphs=1, **kw):
    "Compiled steps end where ordinary ones do."
    losses,ws,step = train(lambda s: s, **kw)
    losses_e,ws_e,step_e = train(lambda s: s.eager, **kw)
    torch.testing.assert_close((losses,ws), (losses_e,ws_e), rtol=1e-10, atol=1e-12)
    assert step.n_graphs==graphs and step.ordinary==(graphs==0)
    for n,g in step.g.items(): torch.testing.assert_close(g, step_e.g[n], rtol=1e-9, atol=1e-11)
    return step

def test_machine_code():
    "Real machine code, with dropout, a changing rate and short batches; gradients by name. For Adam see `test_resumed_bit_by_bit`."
    step = same(keep=['layers.1','layers.0.w'])
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

def test_every_step_is_the_graphs(monkeypatch):
    "Also the first: what the ordinary step did while it was traced is undone, in whatever it changed."
    ran = []
    def machine_code(gm, ts):
        f = compiled.op_by_op(gm)
        return lambda ts: ran.append(1) or f(ts)
    monkeypatch.setattr(compiled, 'machine_code', machine_code)
    class Mine(Module):
        "A running mean, a buffer that can't be written to, and random numbers of its own."
        def __init__(self):
            self.mean,self.draw = const(torch.zeros(6, dtype=torch.float64)),torch.Generator().manual_seed(1)
            self.register_buffer('wide', torch.full((1,), 2., dtype=torch.float64).expand(6))
        def forward(self, x):
            self.mean.lerp_(x.mean(0), .1)
            return x*self.wide+self.mean+torch.rand(6, dtype=torch.float64, generator=self.draw)
        def bwd(self, out, x): x.g = out.g*self.wide
    class Net(Module):
        "Changes the batch, too."
        def __init__(self): self.layers = [Mine(), Lin64(6, 5), Dropout(.3), Lin64(5, 3)]
        def forward(self, x):
            x.mul_(.5)
            for l in self.layers: x = l(x)
            return x
    def run(step_of):
        torch.manual_seed(0)
        net = Net()
        model = Model(net, CrossEntropy())
        step,x,y = compile_step(model, AdamW(model.parameters(), lr=.01)),rand(8, 6),torch.randint(0, 3, (8,))
        losses = [step_of(step)(x, y) for _ in range(5)]
        return [*losses, x, net.layers[0].mean, *model.parameters(), torch.rand(3), net.layers[0].draw.get_state()]
    torch.testing.assert_close(run(lambda s: s), run(lambda s: s.eager), rtol=1e-10, atol=1e-12)
    assert len(ran)==5

def test_tidied():
    "No aliases and nothing that nobody reads, but every change in place, through an alias too, and every draw."
    def f(x, y):
        y.detach()[0].add_(x.sum())
        torch.rand(3)
        x.exp()
        return [x.detach()*y.detach(), torch.rand(2), y.detach()]
    def run(f):
        torch.manual_seed(0)
        x,y = torch.arange(3.),torch.ones(3)
        return [*f(x, y), y, torch.get_rng_state()]
    _,gm,_ = compiled.trace(f, torch.arange(3.), torch.ones(3))
    assert all(map(torch.equal, run(gm), run(f)))
    names = [n.target.overloadpacket.__name__ for n in gm.graph.nodes if n.op=='call_function']
    assert names==['select','sum','add_','rand','mul','rand','detach'] # an input isn't returned itself

def test_a_constant_batch_costs_no_product(monkeypatch):
    graphs = []
    monkeypatch.setattr(compiled, 'machine_code', lambda gm, ts: graphs.append(gm) or compiled.op_by_op(gm))
    for model in net(0.),Model(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double(), nn.CrossEntropyLoss()):
        compile_step(model, SGD(model.parameters()))(*batch())
        names = [str(n.target) for n in graphs[-1].graph.nodes]
        assert sum('aten.addmm' in n or 'aten.mm' in n or 'product' in n for n in names)==5, names

def test_a_tensor_from_elsewhere_that_a_step_changes(interpreted):
    "Nobody knew of it before it was too late, so the first step stays the ordinary one."
    class Counts(Module):
        def __init__(self): self.ns = torch.zeros(3, dtype=torch.int64) # whole numbers are no buffer
        def forward(self, x):
            self.ns[1:].chunk(2)[0].add_(1)
            return x*(self.ns[1]/1000)
        def bwd(self, out, x): x.g = out.g*(self.ns[1]/1000)
    same(make=lambda: Model([Lin64(6, 5), Counts(), Lin64(5, 3)], CrossEntropy()))

def test_losses_that_are_still_there(interpreted):
    "A step is about its own call, whoever keeps the loss of another."
    kept = []
    def between(i, model, opt): kept.append(model(*batch()))
    same(between=between, n=20)

def test_interrupted_compiler(monkeypatch):
    "The step wasn't done."
    def machine_code(gm, ts): raise KeyboardInterrupt
    monkeypatch.setattr(compiled, 'machine_code', machine_code)
    torch.manual_seed(0)
    model = net()
    before = [p.clone() for p in model.parameters()]+[torch.get_rng_state()]
    torch.manual_seed(1)
    xb,yb = batch()
    rng = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt): compile_step(model, AdamW(model.parameters()))(xb, yb)
    assert all(map(torch.equal, before, model.parameters())) and torch.equal(rng, torch.get_rng_state())

def test_threads(interpreted):
    "Eight at once, each with a model and short batches of its own: no warning, and what each computes alone, to the last bit."
    def run(i, res):
        draw = torch.Generator().manual_seed(i)
        model = Model([Lin64(6, 5+i), Relu(), Lin64(5+i, 3)], CrossEntropy())
        for p in model.parameters(): p.data.normal_(generator=draw)
        step = compile_step(model, Adam(model.parameters(), lr=.01))
        for n in [8,8,8,7]*3: step(torch.randn(n, 6, dtype=torch.float64, generator=draw), torch.randint(0, 3, (n,), generator=draw))
        res[i] = step.why_not,[p.detach() for p in model.parameters()]
    alone,together = {},{}
    for i in range(8): run(i, alone)
    threads = [Thread(target=run, args=(i, together)) for i in range(8)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert all(together[i][0] is None and all(map(torch.equal, together[i][1], alone[i][1])) for i in range(8))

def test_autocast(interpreted):
    "Ordinary steps and one warning; afterwards the graph again."
    model = Model([Lin(6, 5), Relu(), Lin(5, 3)], CrossEntropy())
    step,xb,yb = compile_step(model, SGD(model.parameters(), lr=.1)),torch.randn(8, 6),torch.randint(0, 3, (8,))
    step(xb, yb)
    ran = []
    f,step.run = step.run,lambda ts: ran.append(1) or f(ts)
    with pytest.warns(UserWarning, match='compile_step: steps are the ordinary ones meanwhile: autocast is on') as found, torch.autocast('cpu', torch.bfloat16):
        for _ in range(3): step(xb, yb)
    assert len(found)==1 and found[0].filename==__file__ and step.why_not=='autocast is on' and not ran
    step(xb, yb)
    assert ran and step.n_graphs==1


# Nets of torch's modules, against torch

class Raw(nn.Module):
    "Functions and operators between the layers, one of them in place."
    def __init__(self):
        super().__init__()
        self.a,self.b,self.scale = nn.Linear(6, 5),nn.Linear(5, 3),nn.Parameter(torch.ones(5))
    def forward(self, x):
        h = self.a(x)*2+1
        h = h/(h.norm(dim=-1, keepdim=True)+1)
        h += self.scale.exp()
        return self.b(nn.functional.silu(h)+torch.cat([h[:,1:],h[:,:1]], 1))
class Mixed(nn.Module):
    "A layer of ours among torch's."
    def __init__(self):
        super().__init__()
        self.a,self.b = nn.Linear(6, 5),Lin64(5, 3)
    def forward(self, x): return self.b(self.a(x).tanh())

def words(n=8): return torch.randint(0, 5, (n,6)),torch.randint(0, 3, (n,))
def dropped(): return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.GELU(), nn.Dropout(.2), nn.Linear(5, 3))
def normed(): return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(inplace=True), nn.Linear(5, 3))
def embedded(): return nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(24, 3))
def attending(): return nn.Sequential(nn.Unflatten(1, (3,2)), nn.Linear(2, 4),
    nn.TransformerEncoderLayer(4, 2, 8, dropout=.1, batch_first=True), nn.Flatten(), nn.Linear(12, 3))
nesterov = dict(momentum=.9, nesterov=True, weight_decay=.01)

def torchs(make, batch=batch, kw={}, n=22, **options):
    "Losses, weights and statistics after `n` steps of torch's optimizer, and after compiled ones of ours; the step."
    cls = 'SGD' if kw else 'AdamW'
    def run(step_of):
        torch.manual_seed(0)
        net = make().double()
        step = step_of(net, nn.CrossEntropyLoss())
        losses = [step(*batch(*[7]*(i%10==9))).item() for i in range(n)]
        return losses,{k:v.clone() for k,v in net.state_dict().items()},step
    def theirs(net, loss):
        opt = getattr(torch.optim, cls)(net.parameters(), lr=.01, **kw)
        def step(x, y):
            opt.zero_grad()
            l = loss(net(x), y)
            l.backward()
            opt.step()
            return l
        return step
    def ours(net, loss): return compile_step(Model(net, loss), getattr(fnnlite, cls)(net.parameters(), lr=.01, **kw), **options)
    (*want,_),(*got,step) = run(theirs),run(ours)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    assert step.n_graphs==1 and step.why_not is None
    return step

@pytest.mark.parametrize('make,batch,kw', [(dropped, batch, {}), (normed, batch, nesterov), (embedded, words, {}),
    (attending, batch, nesterov), (Raw, batch, {}), (Mixed, batch, {})], ids=['dropped','normed','embedded','attending','Raw','Mixed'])
def test_torchs_nets(interpreted, make, batch, kw): torchs(make, batch, kw)

@pytest.mark.slow
def test_torchs_net_in_machine_code():
    step = torchs(normed, kw=nesterov, keep='layers.0.weight')
    assert step.g['layers.0.weight'].shape==(5,6)


# Schedules of the optimizer's numbers, against torch's

def by_torch(cls, schedule, n=70, **kw):
    "Weights after `n` steps of torch's optimizer, and those of compiled ones of ours from the same start; the step."
    torch.manual_seed(0)
    model = Model([Lin64(6, 5), Relu(), Lin64(5, 3)], CrossEntropy())
    theirs = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    ours,opt = getattr(fnnlite, cls)(model.parameters(), lr=.01, **kw),getattr(torch.optim, cls)(theirs, lr=.01, **kw)
    step,after = compile_step(model, ours),[schedule(o) for o in (ours,opt)]
    for i in range(n):
        x,y = batch()
        step(x, y)
        opt.zero_grad()
        w,b,v,c = theirs
        nn.functional.cross_entropy((x@w+b).relu()@v+c, y).backward()
        opt.step()
        for f in after: f(i)
    return [p.detach() for p in theirs],[p.detach() for p in model.parameters()],step

def one_cycle(opt): return lambda i, s=OneCycleLR(opt, max_lr=.05, total_steps=80): s.step()
def cyclic(opt): return lambda i, s=CyclicLR(opt, .001, .05, step_size_up=7, cycle_momentum=True): s.step()
def decay(opt): return lambda i: opt.param_groups[0].update(weight_decay=.01*(1+i%7))

@pytest.mark.parametrize('schedule', [one_cycle, cyclic, decay])
@pytest.mark.parametrize('cls,kw', [
    ('SGD', dict(momentum=.9)), ('SGD', dict(momentum=.9, nesterov=True, weight_decay=.1)),
    ('Adam', {}), ('Adam', dict(weight_decay=.1)), ('AdamW', {}), ('RMSprop', dict(momentum=.9)),
], ids=['SGD','Nesterov','Adam','Adam+decay','AdamW','RMSprop'])
def test_schedules(interpreted, cls, kw, schedule):
    theirs,ours,step = by_torch(cls, schedule, **kw)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert step.n_graphs==2 and step.why_not is None

@pytest.mark.slow
def test_schedule_in_machine_code(monkeypatch):
    "The second graph is, which has the numbers as inputs."
    graphs,machine_code = [],compiled.machine_code
    monkeypatch.setattr(compiled, 'machine_code', lambda gm, ts: graphs.append(gm) or (machine_code(gm, ts) if len(graphs)>1 else compiled.op_by_op(gm)))
    theirs,ours,step = by_torch('AdamW', one_cycle)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert step.n_graphs==2 and step.compiler

def test_all_numbers_of_an_option_by_hand(interpreted):
    "Every number of RMSprop's at once; back and forth over zero each graph is made anew."
    def by_hand(opt): return lambda i: opt.param_groups[0].update(
        alpha=.9+i/1e3, eps=1e-6*(1+i), momentum=(.6+i/1e3)*(i<20 or i>30), weight_decay=.1*(i<50))
    theirs,ours,step = by_torch('RMSprop', by_hand, momentum=.5, weight_decay=.1)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert step.n_graphs==5

def test_options_are_compared_by_value(interpreted):
    same(opt=Adam, between=lambda i, m, o: o.param_groups[0].update(betas=tuple([.9,.999]))) # another tuple
    def in_place(i, m, o):
        if i==0: o.param_groups[0]['betas'] = [.9,.999]
        else: o.param_groups[0]['betas'][0] = .9-i/1e3
    same(graphs=2, opt=Adam, between=in_place)

def test_a_rule_that_asks_for_a_number(interpreted):
    "Its numbers stay in the graph, which is made anew for each."
    class Clipped(SGD):
        def update(self, ps, gs, memory, o): super().update(ps, torch._foreach_mul(gs, [float(o['momentum'])]*len(gs)), memory, o)
    same(graphs=4, opt=partial(Clipped, momentum=.9), between=lambda i, m, o: o.param_groups[0].update(momentum=.9-i//15/5))


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

@pytest.mark.parametrize('make,why', [(Branch, 'forward asks for a number'), (Draws, 'random numbers'), (Counts, 'changes attributes')])
def test_ordinary_steps_where_there_is_no_graph(interpreted, make, why):
    start = lambda i, model, opt: random.seed(i)
    with pytest.warns(UserWarning, match='compile_step: no graph') as found:
        step = same(graphs=0, make=lambda: Model([make(), Lin64(6, 3)] if make is Draws else make(), CrossEntropy()), between=start)
    assert [w.filename for w in found if 'compile_step' in str(w.message)]==[__file__] # the line that called the step
    assert re.search(why, step.why_not)

def test_hooks_are_heard(interpreted):
    heard,model = [],net()
    model.layers[1].register_forward_hook(lambda *_: heard.append(1))
    step = compile_step(model, SGD(model.parameters(), lr=.1))
    with pytest.warns(UserWarning, match='has hooks: use before and after'): step(*batch())
    step(*batch())
    assert len(heard)==2

def test_a_hook_that_comes_later_is_heard(interpreted):
    heard,model = [],net()
    step = compile_step(model, SGD(model.parameters(), lr=.1))
    for _ in range(2): step(*batch())
    model.layers[1].register_forward_hook(lambda *_: heard.append(1))
    with pytest.warns(UserWarning, match='has hooks: use before and after'): step(*batch())
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
            self.done = next(iter(self.state)).sum().item() # reads a number, after the update
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
        with torch.no_grad(): fails(GradError, 'there is no record of a forward', x, y)
        step(x, y)

def test_wrong_arguments():
    model = net()
    opt = SGD(model.parameters(), lr=.1)
    with pytest.raises(TypeError, match='expected a fnnlite Module'): compile_step(torch.nn.Linear(2, 2), opt)
    with pytest.raises(TypeError, match='expected an optimizer of fnnlite.train.optimizers'): compile_step(model, torch.optim.SGD(model.parameters(), lr=.1))
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
    def param(*s, device): return nn.Parameter(torch.randn(*s, device=device))
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


# In the middle of a step

class Scale:
    "Doubles what flows back into the first layer's output, and halves its parameters' share."
    by = 2.
    def before(self, call):
        if call.name=='Relu': call.out.g = self.by*call.out.g
    def after(self, call):
        for p in call.params: p.g = p.g/self.by

@pytest.mark.parametrize('graphs', [1,2], ids=['still','changed'])
def test_before_and_after(interpreted, graphs):
    "They are part of the graph; what they read may change."
    scale = Scale()
    def change(i, model, opt): scale.by = 2. if i<30 or graphs==1 else 3.
    same(graphs=graphs, between=change, before=scale.before, after=scale.after)
    plain,*_ = train(lambda s: s)
    assert (plain[1:]-train(lambda s: s, before=scale.before, after=scale.after)[0][1:]).abs().max()>1e-4

def test_what_a_hooks_class_says_is_seen(interpreted, monkeypatch):
    scale = Scale()
    def change(i, *_): monkeypatch.setattr(Scale, 'by', 2. if i<30 else 3.)
    same(graphs=2, between=change, before=scale.before)

def test_a_limit_in_a_tensor_is_no_constant(interpreted):
    "It may change: the steps are ordinary ones."
    limit = torch.tensor(.1)
    step = compile_step(m := net(), SGD(m.parameters(), lr=.1), max_norm=limit)
    with pytest.warns(UserWarning, match='a number was read'): step(*batch())
    assert step.ordinary

factor = 2.
def by_factor(call):
    if call.name=='Relu': call.out.g = factor*call.out.g
def test_a_global_that_before_reads(interpreted, monkeypatch):
    def change(i, model, opt): monkeypatch.setitem(globals(), 'factor', 2. if i<30 else 3.)
    same(graphs=2, between=change, before=by_factor)

@pytest.mark.parametrize('f', [partial(by_factor), nn.ReLU()], ids=['partial','module'])
def test_what_before_reads_must_be_seen(f):
    with pytest.raises(TypeError, match='expected a function or a method'): compile_step(net(), SGD(net().parameters(), lr=.1), before=f)

@pytest.mark.filterwarnings('ignore:compile_step')
def test_a_number_read_from_a_tensor_outside(interpreted):
    "It would stay what it is at the first step: the steps are ordinary ones."
    t = torch.tensor(2.)
    def before(call):
        if call.name=='Relu': call.out.g = call.out.g*t.item()
    step = same(graphs=0, between=lambda i, *_: t.fill_(2. if i<30 else 3.), before=before)
    assert 'a number was read' in step.why_not

def test_what_out_writes_is_undone(interpreted):
    "The first step's graph writes it once, not twice."
    sums = torch.zeros((), dtype=torch.float64)
    def before(call):
        if call.name=='Relu': torch.add(sums, 1., out=sums)
    train(lambda s: s, before=before, n=5, short=8)
    assert sums==5

def test_an_outer_tensor_of_another_shape(interpreted):
    mask = torch.full((512,), 2., dtype=torch.float64)
    def before(call):
        if call.name=='Relu': call.out.g = call.out.g*mask.mean()
    def change(i, *_): mask.data = torch.full((512,) if i<30 else (2,), 2. if i<30 else 3., dtype=torch.float64)
    assert not same(between=change, before=before).fits(batch()) # the graph was made for the first

def test_clipped_as_torch_does(interpreted):
    "Against torch's own loop."
    torch.manual_seed(0)
    net,(x,y) = normed().double(),batch()
    ref,loss = deepcopy(net),nn.CrossEntropyLoss()
    opt = torch.optim.AdamW(ref.parameters(), lr=.01)
    step = compile_step(Model(net, loss), AdamW(net.parameters(), lr=.01), max_norm=.1)
    for _ in range(5):
        step(x, y)
        opt.zero_grad()
        loss(ref(x), y).backward()
        assert nn.utils.clip_grad_norm_(ref.parameters(), .1)>.1
        opt.step()
    torch.testing.assert_close([*net.parameters()], [*ref.parameters()], rtol=1e-10, atol=1e-12)
    assert step.n_graphs==1 and step.why_not is None


# Learner

def learner(compiled, cbs=(), opt=partial(AdamW, lr=.01), dtype=torch.float64, **kw):
    torch.manual_seed(0)
    x,y = rand(50, 6).to(dtype),torch.randint(0, 3, (50,))
    dls = DataLoaders.from_arrays(x, y, x[:20], y[:20], bs=16)
    return Learner(net().to(dtype), dls, opt, [accuracy], [OneCycle(.01), *cbs], compiled=compiled, **kw)

def state(learn): return [*learn.model.parameters(), *(t for s in learn.opt.state.values() for t in s.values()), torch.get_rng_state()]

@pytest.mark.parametrize('kind,opt', [(True, AdamW), ('graph', AdamW), ('graph', Momentum)], ids=['machine code','AdamW','SGD'])
def test_resumed_bit_by_bit(tmp_path, kind, opt):
    "As without, history and weights; and a run that goes on from a checkpoint ends with the unbroken one's bits."
    class Stop(Callback):
        def before_batch(self):
            if (self.epoch,self.iter)==(3,1): raise KeyboardInterrupt
    make = partial(learner, kind, opt=partial(opt, lr=.01), dtype=torch.float32) # where each way of computing has bits of its own
    a,b = learner(False, opt=partial(opt, lr=.01), dtype=torch.float32).fit(6),make().fit(6)
    whole = [t.clone() for t in state(b)]
    strip = lambda h: [{k:v for k,v in r.items() if k!='time'} for r in h]
    for r,s in zip(strip(a.history), strip(b.history), strict=True): assert r==pytest.approx(s, rel=1e-4)
    torch.testing.assert_close(list(b.model.parameters()), list(a.model.parameters()), rtol=1e-4, atol=1e-5)
    make([Checkpoint(tmp_path), Stop()]).fit(6)
    c = make([Checkpoint(tmp_path, resume=True)]).fit(6)
    assert all(map(torch.equal, state(c), whole)) and strip(c.history)==strip(b.history)
    for l in (b,c): assert l.step.why_not is None and l.step.n_graphs==1

def test_learner_refuses_callbacks_that_look_inside():
    class Looks(Callback):
        def after_backward(self): pass
    with pytest.raises(ValueError, match="Looks wants to be called at 'after_backward', which is inside a compiled step"): learner(True, [Looks()]).fit(1)

def test_learner_clips_and_looks_at_calls(interpreted):
    "Compiled as without; a limit that changes in between gives another graph."
    class Loosen(Callback):
        def before_epoch(self): clip.max_norm = .01*(1+self.epoch//2)
    def double(call):
        if call.name=='Relu': call.out.g = 2*call.out.g
    ends,clip = [],ClipGrads(.01)
    for how,cbs in ((False, [clip, Loosen()]), ('graph', [clip, Loosen()]), (False, [])):
        learn = learner(how, cbs, before=double)
        ends.append([p.detach() for p in learn.fit(4).model.parameters()])
        if how: assert learn.step.n_graphs==2 and learn.step.why_not is None
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-10, atol=1e-12)
    assert not torch.allclose(ends[0][0], ends[2][0], rtol=1e-4)

def test_learner_stops_at_nan(interpreted):
    learn = learner(True, opt=partial(SGD, lr=.01))
    learn.cbs = [o for o in learn.cbs if not isinstance(o, OneCycle)]
    learn.model.layers[0].w.data[0,0] = torch.nan
    with pytest.raises(ArithmeticError, match='the loss is nan'): learn.fit(2)


# What Python reads while a step is traced: the second batch shows it

class Reads(Module):
    def __init__(self, f): self.lin,self.f,self.d = Lin64(4, 3),f,{'k': 1.}
    def forward(self, x): return self.lin(x)*self.f(self, x)
def counts(m, x):
    m.d['k'] += 1
    return m.d['k']
rng,dice = np.random.default_rng(0),random.Random(0)

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('f', [counts, lambda m, x: rng.random(), lambda m, x: dice.random(), lambda m, x: x.numpy().sum(), lambda m, x: x.tolist()[0][0],
    lambda m, x: x[:,0].detach().numpy()[0], lambda m, x: float(len(x[x>0]))], ids=['counts','numpys','pythons','numpy','tolist','detached','length'])
def test_what_python_reads(f):
    torch.manual_seed(0)
    model = Model([Reads(f)], Mse())
    step = compile_step(model, SGD(model.parameters(), lr=.01), compiler=False)
    for _ in range(3):
        step(rand(99, 4), rand(99, 3))
    assert step.ordinary

def test_one_tensor_twice_in_the_first_step():
    "And then two."
    class Differ(Module):
        def __init__(self): self.lin = Lin64(3, 3)
        def forward(self, a, b): return ((self.lin(a)-2*b)**2).mean()
    torch.manual_seed(0)
    a,b = (Differ() for _ in range(2))
    b.load_state_dict(a.state_dict())
    step,opt = compile_step(a, SGD(a.parameters(), lr=.1), compiler=False),SGD(b.parameters(), lr=.1)
    other,x = compile_step(b, opt, compiler=False),rand(5, 3)
    for batch in [(x, x), (rand(5, 3), rand(5, 3)), (x, rand(5, 3)), (rand(5, 3), x)]:
        torch.testing.assert_close(step(*batch), other.eager(*batch))
    assert step.n_graphs==1 and not step.ordinary

def test_modules_in_another_order():
    class Named(Module):
        def __init__(self): self.parts = nn.ModuleDict(dict(a=Lin64(3, 3), b=Tanh()))
        def forward(self, x):
            for part in self.parts.values(): x = part(x)
            return (x**2).mean()
    m = Named()
    step,x = compile_step(m, SGD(m.parameters(), lr=0.), compiler=False),rand(5, 3)
    for _ in range(3): step(x)
    m.parts._modules.move_to_end('a') if hasattr(m.parts._modules, 'move_to_end') else m.parts._modules.update(a=m.parts._modules.pop('a'))
    torch.testing.assert_close(step(x), m(x).detach())
    assert step.n_graphs==2

# What a forward reads elsewhere, changed after the graph is there

factor,table = 1.,{'k': 1.}
def helper(x): return x*factor
def in_closure():
    k = 1.
    class C(Module):
        def forward(self, x): return x*k
    def change():
        nonlocal k
        k = 3.
    return C(),change
class Plain(Module):
    def __init__(self, f): self.f,self.cfg,self.list,self.array,self.box = f,{'k': 1.},[1.],np.ones(1),SimpleNamespace(k=1.)
    def forward(self, x): return x*self.f(self)
class Global(Module):
    def forward(self, x): return x*factor
class Table(Module):
    def forward(self, x): return x*table['k']
class Helped(Module):
    def forward(self, x): return helper(x)
def attribute(f, change):
    m = Plain(f)
    return m,lambda: change(m)
elsewhere = dict(dict=lambda: attribute(lambda m: m.cfg['k'], lambda m: m.cfg.update(k=3.)),
    list=lambda: attribute(lambda m: len(m.list), lambda m: m.list.append(1)),
    array=lambda: attribute(lambda m: float(m.array[0]), lambda m: m.array.fill(3.)),
    box=lambda: attribute(lambda m: m.box.k, lambda m: setattr(m.box, 'k', 3.)),
    global_=lambda: (Global(), lambda: globals().update(factor=3.)), table=lambda: (Table(), lambda: table.update(k=3.)),
    helper=lambda: (Helped(), lambda: globals().update(factor=3.)), closure=in_closure)

@pytest.mark.parametrize('what', elsewhere)
def test_what_forward_reads_elsewhere_is_seen(what, interpreted):
    ends = []
    for eager in (False,True):
        globals().update(factor=1., table={'k': 1.})
        torch.manual_seed(0)
        part,change = elsewhere[what]()
        model = Model([Lin64(6, 5), part, Lin64(5, 3)], CrossEntropy())
        step = compile_step(model, SGD(model.parameters(), lr=.1))
        for i in range(6):
            if i==3: change()
            (step.eager if eager else step)(*batch())
        ends.append([p.detach() for p in model.parameters()])
        if not eager: assert step.n_graphs==2 and not step.ordinary
    torch.testing.assert_close(*ends, rtol=1e-10, atol=1e-12)

def anew(opt): opt.state.update({p:{k:v.clone()*.5 for k,v in s.items()} for p,s in opt.state.items()})
def other_group(opt): opt.param_groups[0] = dict(opt.param_groups[0], momentum=.5)

@pytest.mark.parametrize('change', [anew,other_group])
@pytest.mark.parametrize('when', [1,3])
def test_memory_and_groups_replaced(change, when, interpreted):
    ends = []
    for eager in (False,True):
        torch.manual_seed(0)
        model = net(0.)
        opt = Momentum(model.parameters(), lr=.1)
        step = compile_step(model, opt)
        for i in range(6):
            if i==when: change(opt)
            (step.eager if eager else step)(*batch())
        ends.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*ends, rtol=1e-10, atol=1e-12)

def test_what_the_first_call_sets_up(interpreted):
    class SetsUp(Module):
        def __init__(self): self.cfg = SimpleNamespace(kind=None)
        def forward(self, x):
            if self.cfg.kind is None: self.cfg.kind = 'double'
            return x*2
    same(make=lambda: Model([Lin64(6, 5), SetsUp(), Lin64(5, 3)], CrossEntropy()))

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('f', [lambda m, x: x[:,0].detach().numpy()[0], lambda m, x: x.tolist()[0][0]], ids=['numpy','tolist'])
def test_numbers_taken_out_of_a_batch_that_comes_twice(f):
    model = Model([Reads(f)], Mse())
    step,x,y = compile_step(model, SGD(model.parameters(), lr=.01), compiler=False),rand(9, 4),rand(9, 3)
    for _ in range(2): step(x, y)
    assert step.ordinary
