"The record of torch's functions: gradients as autograd's, and an error where they would be wrong or lost."
import copy, gc, pickle, threading, warnings, weakref
import numpy as np
import pytest, torch, torch.nn.functional as F
from torch import nn
from fnnlite import Dropout, GradError, Model, Module, const
from fnnlite.core.boundary import recorded, recorded_call
from fnnlite.core.calls import recording
from fnnlite.core.rules import gradient_of, kernels
from fnnlite.core.tiny import TinyRecord

def rand(*shape): return torch.randn(*shape, dtype=torch.float64)

@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)

class Net(nn.Module):
    "Two linear layers, a buffer, and what a test makes of them"
    def __init__(self):
        super().__init__()
        self.a,self.b = nn.Linear(5, 5, dtype=torch.float64),nn.Linear(5, 5, dtype=torch.float64)
        self.register_buffer('buf', rand(5))

def by_autograd(f, net, ts, up=None):
    "The output of `f(net, *ts)`, the upstream gradient, and the gradients of inputs and parameters"
    net,ts = copy.deepcopy(net),[t.detach().clone().requires_grad_() for t in ts]
    torch.manual_seed(1)
    out = f(net, *ts)
    up = torch.randn_like(out) if up is None else up
    return out.detach(),up,torch.autograd.grad(out, [*ts, *net.parameters()], up, materialize_grads=True, allow_unused=True)

def close(got, want, names):
    for name,a,b in zip(names, got, want, strict=True):
        torch.testing.assert_close(torch.zeros_like(b) if a is None else a, b, rtol=1e-9, atol=1e-11, msg=lambda m: f'{name}: {m}')

def same(f, *ts, **kw):
    "`f(net, *ts)` recorded, and as one node of autograd's: all gradients are autograd's, the output is to the last bit."
    net = Net()
    names = [*(f'input {i}' for i in range(len(ts))), *(n for n,_ in net.named_parameters())]
    want,up,grads = by_autograd(f, net, ts)
    one = copy.deepcopy(net)
    mine = [t.clone() for t in ts]
    torch.manual_seed(1)
    with recording(**kw) as rec: out = f(one, *mine)
    assert torch.equal(out, want)
    rec.backward(out, up)
    close([*(t.g for t in mine), *(p.grad for p in one.parameters())], grads, names)
    two,mine = copy.deepcopy(net),[t.clone() for t in ts]
    wrapped = type('Wrapped', (nn.Module,), {'forward': lambda self, *ts: f(self.net, *ts)})()
    wrapped.net = two
    torch.manual_seed(1)
    out,*_ = recorded_call(wrapped, *mine)
    assert torch.equal(out, want)
    (out*up).sum().backward()
    close([*(t.g for t in mine), *(p.grad for p in two.parameters())], grads, names)
    return rec

def refused(f, *ts, match, kinds=('plain','node')):
    "In both ways, with an error that says what is wrong; no gradient is left."
    for kind in kinds:
        net,mine = Net(),[t.clone() for t in ts]
        with pytest.raises((GradError,RuntimeError), match=match):
            if kind=='plain':
                with recording() as rec: out = f(net, *mine)
                rec.backward(out, torch.ones_like(out))
            else:
                wrapped = type('Wrapped', (nn.Module,), {'forward': lambda self, *ts: f(self.net, *ts)})()
                wrapped.net = net
                out,*_ = recorded_call(wrapped, *mine)
                out.sum().backward()
        assert all(p.grad is None for p in net.parameters()) and all(t.__dict__.get('g') is None for t in mine)


# Programs that are right

def loop(n, x):
    out,h = torch.zeros(3, 4, 5, dtype=x.dtype),x
    for i in range(3):
        h = n.a(h).tanh()
        out[i] = h
    return out
def loop_that_reads(n, x):
    out,h = torch.zeros(4, 3, 5, dtype=x.dtype),x
    for i in range(3):
        h = n.a(h).tanh()
        out[:,i] = h
        h = h+out.sum(1)
    return out
def callee(n, x):
    def f(y, x): y += x
    y = n.a(x)
    f(y, x)
    return y*y
def residual(n, x):
    h = F.relu(n.a(x), inplace=True)
    h = n.b(h)
    h += x
    return nn.functional.relu_(h)
def statement(n, x):
    s = n.a(x)
    s.masked_fill_(x>0, -9.)
    return s.softmax(-1)
def cache(n, x):
    c = torch.zeros(6, 5, dtype=x.dtype)
    c.index_copy_(0, torch.tensor([0,2,3,5]), n.a(x))
    return c**2
def no_grad(n, x):
    h = n.a(x)
    with torch.no_grad(): scale = h.abs().max()+h
    return h/scale
def detached(n, x):
    h = n.a(x)
    return h*h.detach()+h.data
def branch(n, x): return n.a(x) if n.b(x).sum()>0 else n.b(n.a(x))
def buffer_read(n, x): return n.a(x)*n.buf
def running(n, x):
    h = n.a(x)
    with torch.no_grad(): n.buf.mul_(.9).add_(h.mean(0), alpha=.1)
    return h-h.mean(0)
def chunks(n, x):
    a,b = n.a(x).chunk(2, 0)
    values,where = (a+b).max(-1)
    return values*b[:,0]
def read(n, x): return n.a(x)*float(x.detach().sum())*x.shape[0]
def checkpointed(n, x): return torch.utils.checkpoint.checkpoint(n.a, x, use_reentrant=False)**2
def tied(n, x): return F.linear(n.a(x), n.a.weight)+n.a(x)@n.a.weight.mT
def twice(n, x):
    h = n.a(x)
    return torch.cat([h*h, h@h.mT@h, h+h], 1)
def unused(n, x):
    n.b(x)
    a,b = n.a(x).split([2, 3], 1)
    return b
def handed_on(n, x): return F.dropout(n.a(x), 0.).contiguous().to(x.dtype)*1
def random(n, x): return F.dropout(n.a(x), .3)*torch.rand_like(x)
def operators(n, x): return 2-n.a(x)**2/3+(1/(x.abs()+1))*-x+(2**x)+abs(x)
def scatter(n, x):
    i = torch.tensor([[0,1,0,1,2]]*4)
    return n.a(x).gather(1, i)+torch.zeros_like(x).scatter_add(1, i, n.b(x))
def views(n, x): return n.a(x).view(2, 2, 5).transpose(0, 1).flatten(1)[:,2:].unsqueeze(0).expand(3, -1, -1).mT
def lists(n, x):
    "What is in a list when it is passed counts, not what comes to be in it."
    h,i,dims,ts = n.a(x)*1,[1,0,2,3],[1,0],[x,x*2]
    h = h[i]*torch.cat(ts, 0)[:4]
    i[0],ts[0] = 3,ts[1]
    h = h.permute(dims)
    dims.reverse()
    return h.t()*1
def counted(n, x):
    "A whole number in a tensor is what it was when it was used."
    h,i = torch.zeros(4, 5, dtype=x.dtype),torch.tensor(0)
    for r in n.a(x)[:3]:
        h[i:i+1] = r
        i += 1
    return h.select(0, i-1)*h.cumsum(i-2)[i:]
def made_inside(n, x):
    e = torch.ones(4, 5, dtype=x.dtype, requires_grad=True)
    return n.a(x)*(x+e)
def constants_filled(n, x):
    z = torch.zeros(4, 5, dtype=x.dtype)
    with torch.no_grad(): z[1].fill_(7)
    z[2] = 3.
    return n.a(x)*z
def letters(n, x): return torch.einsum('bA,bA', n.a(x), x)*torch.einsum('bA,AC', n.a(x), torch.ones(5, 2, dtype=x.dtype)).sum()
def whole_numbers(n, x):
    i = torch.zeros(4, 5, dtype=torch.int64)
    h = n.a(x)*3
    i.copy_(h)
    return h*i
def ones_more(n, x):
    h = n.a(x)
    h.unsqueeze_(0).squeeze_(0).t_()
    return h.t()*x
def in_place_row(n, x):
    h = n.a(x)
    h[1:3] = 0
    h[0] = h[3]*2
    return h.exp()
def view_of(n, x):
    h = n.a(x)
    v = h[0]
    h += 1
    return v*h
def through_a_view(n, x):
    h = n.a(x)
    h.view(-1).mul_(2)
    return h*1
def rows_added(n, x):
    h = x.new_zeros(x.shape)
    for i in range(3): h[i] += n.a(x)[i]*x[i+1]
    h.T[0] -= x[:,0].exp()
    return h*h
def siblings(n, x):
    "Two views of what a third one changes, one of them twice removed."
    h = n.a(x)
    a,b = h[:2],h.view(-1)[3:12]
    h.transpose(0, 1).mul_(x.T)
    return a.sum()*b+h.flatten()[:9]
def chain_of_views(n, x):
    h = n.a(x)
    v = h.view(2, 2, 5)[0].T
    v[1:3] = v[0]*2
    h.diagonal().add_(x[0,0])
    h.add_(h)
    h[0].mul_(x[0])
    return h
programs = [loop, loop_that_reads, callee, residual, statement, cache, no_grad, detached, branch, buffer_read, running, chunks, read,
    checkpointed, tied, twice, unused, handed_on, random, operators, scatter, views, lists, counted, made_inside, constants_filled,
    letters, whole_numbers, ones_more, in_place_row,
    view_of, through_a_view, rows_added, siblings, chain_of_views]

@pytest.mark.parametrize('f', programs, ids=lambda f: f.__name__)
def test_right(f): same(f, rand(4, 5))

def test_right_without_the_watch(): same(residual, rand(4, 5), audit=False)

@pytest.mark.parametrize('f', programs, ids=lambda f: f.__name__)
def test_by_formulas_alone(f, monkeypatch):
    monkeypatch.setattr(kernels, 'on', False)
    same(f, rand(4, 5))

through_views = view_of, through_a_view, rows_added, siblings, chain_of_views

@pytest.mark.parametrize('f', [f for f in programs if f not in through_views], ids=lambda f: f.__name__)
def test_tiny(f):
    "The mechanism without its guards gives the same."
    net,x = Net(),rand(4, 5)
    want,up,grads = by_autograd(f, net, [x])
    torch.manual_seed(1)
    with TinyRecord() as rec: loss = (f(net, x)*up).sum()
    rec.backward(loss)
    close([x.g, *(getattr(p, 'g', None) for p in net.parameters())], grads, ['input', *(n for n,_ in net.named_parameters())])


# Programs whose gradient would be wrong or lost

class Ste(torch.autograd.Function):
    "The sign, with the gradient of the identity"
    @staticmethod
    def forward(ctx, x): return x.sign()*1.
    @staticmethod
    def backward(ctx, g): return g
def function(n, x): return Ste.apply(n.a(x))*x
with warnings.catch_warnings():
    warnings.simplefilter("ignore") # it is deprecated, and people have it
    traced = torch.jit.trace(lambda t: t.sin(), torch.zeros(4, 5, dtype=torch.float64))
def jit(n, x): return traced(n.a(x))*x
def vmap(n, x): return torch.func.vmap(lambda t: t.sin())(n.a(x))*x
def numpy(n, x): return torch.from_numpy(np.sin(n.a(x).numpy()))*x
def data(n, x):
    h = n.a(x)
    h.data.mul_(2)
    return h**2
def read_later(n, x):
    h = n.a(x)
    u = h*h
    h += 1
    return u+h
def output_read_later(n, x):
    h = n.a(x).tanh()
    h += 1
    return h*2
def index_changed(n, x):
    i = torch.tensor([0,1,2,3])
    h = n.a(x)[i]
    i[0] = 3
    return h
def input_in_place(n, x):
    x.mul_(2)
    return n.a(x)
def parameter_in_place(n, x):
    h = n.a(x)
    with torch.no_grad(): n.a.weight.mul_(2)
    return h*1
def into_a_buffer(n, x):
    n.buf.copy_(n.a(x)[0])
    return n.b(x)*n.buf
def copied(n, x): return copy.copy(n.a(x))*x
def thread(n, x):
    res = []
    t = threading.Thread(target=lambda: res.append(n.a(x)))
    t.start(), t.join()
    return res[0]*x
def no_rule(n, x): return torch.special.airy_ai(n.a(x).abs())
def complex_numbers(n, x): return torch.fft.fft(n.a(x)).abs()
def inference(n, x):
    with torch.inference_mode(): h = n.a(x)*2
    return h*n.a(x)
class Unseen(torch.autograd.Function):
    "What it computes, it computes under no_grad"
    @staticmethod
    def forward(ctx, x):
        with torch.no_grad(): return x*3
    @staticmethod
    def backward(ctx, g): return g
def unseen_function(n, x): return Unseen.apply(n.a(x))*x
def hook(n, x):
    h = n.a(x)
    h.register_hook(lambda g: g*2)
    return h*1
def leaf_hook(n, x):
    n.a.weight.register_hook(lambda g: g*2)
    return n.a(x)
def module_hook(n, x):
    n.a.register_full_backward_hook(lambda m, i, o: None)
    return n.a(x)
def frozen_midway(n, x):
    h = n.a(x)
    n.a.requires_grad_(False)
    return n.a(h)
def view_turned(n, x):
    h = n.a(x)
    v = h[:3]
    v.t_()
    return v@h
def returned_changed(n, x):
    h = n.a(x)
    h.detach().mul_(2)
    return h
def data_given(n, x):
    h = n.a(x).tanh()
    out = h*1
    h.data = torch.zeros_like(h)
    return out
def base_turned(n, x):
    h = x[:,:4]*n.a(x)[:,:4]
    v = h[0]
    h.t_()
    h.mul_(2)
    return v*1
def out_given(n, x):
    torch.add(n.a(x)[0], 1, out=n.buf)
    return n.buf*x
def subclass(n, x): return n.a(x).as_subclass(torch.Tensor)*x
def foreach(n, x):
    h = n.a(x)
    return torch._foreach_mul([h], 2.)[0]*1

@pytest.mark.parametrize('f,match', [(function, 'autograd.Function'), (jit, 'unseen|outside|TorchScript'), (vmap, 'torch.func'),
    (numpy, 'numpy takes numbers out'),
    (data, 'changed in place'), (read_later, "Tensor.mul: argument '(inp|other)'.*changed in place"),
    (output_read_later, "Tensor.tanh: the output.*changed in place"), (index_changed, "'index'.*changed in place"),
    (input_in_place, 'changes a tensor of shape'),
    (parameter_in_place, 'in place'), (into_a_buffer, 'outside the record'), (no_rule, 'airy_ai has no gradient rule'),
    (complex_numbers, 'no gradient rule|complex'), (foreach, 'foreach_mul has no gradient rule'),
    (unseen_function, 'autograd.Function'), (hook, 'hook'), (leaf_hook, 'hook'), (module_hook, 'hooks|autograd.Function'),
    (frozen_midway, 'requires grad while it is recorded'),
    (view_turned, 'changes the form'), (returned_changed, 'changed in place'), (data_given, 'takes numbers out'),
    (base_turned, 'changes the form'), (out_given, 'into out='), (subclass, 'made unseen|outside')], ids=lambda o: getattr(o, '__name__', ''))
def test_refused(f, match): refused(f, rand(4, 5), match=match)

@pytest.mark.parametrize('f', [copied, thread, inference], ids=lambda o: o.__name__)
def test_refused_where_inputs_are_declared(f):
    refused(f, rand(4, 5), match='outside the record|inference_mode|changed in place|takes numbers out', kinds=('node',))

def test_declared_inputs():
    x,y = rand(4, 5),rand(4, 5)
    with recording(x), pytest.raises(GradError, match=r'from outside the record: make it an input'): x*y
    with recording(x) as rec: out = x*const(y)
    rec.backward(out, torch.ones_like(out))
    assert torch.equal(x.g, y) and y.__dict__.get('g') is None

def test_two_records():
    x = rand(3)
    with recording(): h = x*2
    with recording(), pytest.raises(GradError, match='another recording'): h*2
    with recording(), pytest.raises(GradError, match=r'recording\(\) inside'):
        with recording(): pass
    with recording() as two: out = h.detach()*x
    two.backward(out, torch.ones(3, dtype=x.dtype))
    assert torch.equal(x.g, 2*x)

def test_errors_name_the_module():
    class Odd(nn.Module):
        def forward(self, x): return torch.special.airy_ai(x)
    net,said = nn.Sequential(nn.Linear(5, 5), nn.Sequential(nn.Tanh(), Odd())),r"^Odd \(1\.1\): special.airy_ai has no gradient rule: register one"
    with recording(), pytest.raises(GradError, match=said): net(torch.randn(2, 5))
    with recording() as rec: pass
    x = torch.randn(3)
    with pytest.raises(GradError, match='is no output of a recorded call'): rec.backward(x)
    with rec: y = x*2
    with pytest.raises(GradError, match=r'isn\'t a single number'): rec.backward(y)
    with pytest.raises(GradError, match=r'got a gradient of \(2,\) torch.float32, expected \(3,\)'): rec.backward(y, torch.ones(2))


# Rules of one's own

@pytest.mark.parametrize('rule,match', [(lambda out, inp, dim: None, 'got no .g'), (lambda out, inp, dim: setattr(inp, 'g', 1.), 'type float'),
    (lambda out, inp, dim: setattr(inp, 'g', out.g[0]), r'\(5,\)'), (lambda out, inp, dim: setattr(inp, 'g', out.g.float()), 'float32'),
    (lambda out, inp, dim: setattr(inp, 'g', out.g.mul_(2)), 'changed out.g, or a .g that is the same tensor, in place')])
def test_faulty_rules(registry, rule, match):
    gradient_of(torch.cumsum)(rule)
    x = rand(4, 5)
    with recording() as rec: out = x.cumsum(0)
    with pytest.raises(GradError, match=match): rec.backward(out, torch.ones_like(out))
    assert x.__dict__.get('g') is None

def test_not_exact(registry):
    gradient_of(torch.cumsum, exact=False)(lambda out, inp, dim: None)
    x = rand(4)
    with recording() as rec: out = (x.cumsum(0)*x).sum()
    rec.backward(out)
    assert torch.equal(x.g, x.cumsum(0))

def test_not_exact_where_autograd_differentiates(registry):
    "Between the nodes of `as_nodes`, and under torch.func, autograd wouldn't take the rule."
    from fnnlite import Lin
    gradient_of(torch.cumsum, exact=False)(lambda out, inp, dim: setattr(inp, 'g', out.g))
    class Sums(Module):
        def __init__(self): self.l = Lin(3, 3)
        def forward(self, x): return self.l(x).cumsum(0)
    m,x = Sums(),torch.randn(2, 3)
    m(x).sum().backward()
    torch.testing.assert_close(x.g, torch.ones(2, 3)@m.l.w.t())
    for run in (lambda: m.as_nodes()(x), lambda: torch.func.grad(lambda x: m.as_nodes(False)(x).sum())(x)):
        with pytest.raises(GradError, match='cumsum: autograd would take its derivative'): run()
    class Own(Module):
        def forward(self, x): return x.cumsum(0)
        def bwd(self, out, x): x.g = 7*out.g
    x.requires_grad_()
    Own().as_nodes()(x).sum().backward()
    assert (x.grad==7).all()
    with torch.no_grad(): assert torch.equal(m.as_nodes()(x), m.l(x).cumsum(0))

def test_recorded_function(registry):
    "A call by its own name, with its own rule; without a rule, an error; outside of a record, a plain function."
    @recorded
    def double(inp): return inp*2
    x = rand(3)
    assert torch.equal(double(x), 2*x)
    with recording(), pytest.raises(GradError, match='double has no gradient rule'): double(x)
    @gradient_of(double, saves='')
    def double_grad(out, inp): inp.g = 5*out.g
    with recording() as rec: out = double(double(x)).sum()
    rec.backward(out)
    assert (x.g==25).all() and [c.name.split('.')[-1] for c in rec.calls()]==['double','double','Tensor.sum'.split('.')[-1]]


# What a record shows

def test_the_g_of_what_was_changed_in_place():
    "It is that of the numbers that are there in the end: of a base, whose view went on, too."
    x = rand(3, 4)
    with recording() as rec:
        h = x*1
        v = h[0]
        v += 1
        v.mul_(2)
        out = (v**2).sum()+h[1].sum()
    rec.backward(out)
    want = torch.zeros(3, 4, dtype=x.dtype)
    want[0],want[1] = 2*h[0],1
    torch.testing.assert_close(h.g, want)
    torch.testing.assert_close(v.g, 2*v)
    want[0] *= 2
    torch.testing.assert_close(x.g, want)

def test_calls():
    net = nn.Sequential(nn.Linear(5, 4), nn.ReLU())
    x = torch.randn(2, 5)
    with recording() as rec: out = net(x).sum()
    rec.backward(out)
    a,b,c = rec.calls()
    assert [o.name for o in rec.calls()]==['F.linear','F.relu','Tensor.sum'] and [o.path for o in rec.calls()]==['Linear (0)','ReLU (1)','']
    assert a.args[0] is x and a.params[0] is net[0].weight and b.args[0] is a.out and c.out is out
    torch.testing.assert_close(a.out.g, (a.out>0).float())
    torch.testing.assert_close(x.g, a.out.g@net[0].weight)

def test_before_and_after():
    "The gradient of a call's output may be replaced before its rule, its share of an input's after it."
    x,seen = rand(4),[]
    def before(call):
        seen.append((call.name, call.out.g.clone()))
        if call.name=='Tensor.exp': call.out.g = call.out.g*3
    def after(call):
        if call.name=='Tensor.sin': call.args[0].g = torch.zeros(4, dtype=torch.float64)
    with recording() as rec: out = (x.exp()+x.sin()).sum()
    rec.backward(out, before=before, after=after)
    torch.testing.assert_close(x.g, 3*x.exp())
    assert [n for n,_ in seen]==['Tensor.sum','Tensor.add','Tensor.sin','Tensor.exp']

def test_parameters_accumulate_and_others_start_afresh():
    net,x = nn.Linear(5, 1),torch.randn(3, 5)
    for times in (1,2):
        with recording() as rec: out = net(x).sum()
        rec.backward(out)
        torch.testing.assert_close(net.weight.grad, times*x.sum(0, keepdim=True))
        torch.testing.assert_close(x.g, net.weight.expand(3, 5))
    assert net.weight.g is net.weight.grad

def test_frozen_parameters_and_constants():
    net,x = nn.Linear(5, 5),torch.randn(3, 5)
    net.weight.requires_grad_(False)
    with recording() as rec: out = net(const(x)).sum()
    rec.backward(out)
    assert net.weight.grad is None and net.bias.grad is not None and x.__dict__.get('g') is None
    net.bias.requires_grad_(False)
    with recording() as rec: out = net(const(x)).sum()
    assert not rec.calls()

def test_several_outputs_to_start_from():
    x = rand(4)
    with recording() as rec: a,b = x.sin(),x.exp()
    rec.backward([a, b], [torch.ones_like(a), 2*torch.ones_like(b)])
    torch.testing.assert_close(x.g, x.cos()+2*x.exp())

def test_nothing_is_left():
    "No cycles: a record and what it holds go with the last reference; marks hold nothing; hooks and modes are gone."
    from torch.nn.modules import module as M
    gc.disable()
    try:
        net = nn.Sequential(nn.Linear(5, 5), nn.Tanh())
        with recording() as rec: out = net(torch.randn(3, 5)).sum()
        rec.backward(out)
        held = weakref.ref(rec.calls()[0].out)
        loss,rec2,_ = recorded_call(nn.Sequential(net, nn.Flatten(0)), torch.randn(3, 5))
        inside = weakref.ref(rec2.calls()[0].out)
        loss.sum().backward()
        del rec, rec2, loss
        assert held() is None and inside() is None
    finally: gc.enable()
    assert len(pickle.dumps(out))<2000 and not M._global_forward_pre_hooks and not M._global_forward_hooks
    assert torch.backends.mha.get_fastpath_enabled() and torch.overrides._len_torch_function_stack()==0

def test_under_no_grad_nothing_is_recorded():
    x = rand(3)
    with torch.no_grad(), recording() as rec: out = x*2
    assert torch.equal(out, 2*x) and not rec.calls()

def test_an_error_leaves_nothing_behind():
    from torch.nn.modules import module as M
    with pytest.raises(ZeroDivisionError), recording(): nn.Tanh()(torch.ones(1)), 1/0
    with pytest.raises(ZeroDivisionError), recording():
        with torch.no_grad(): 1/0
    assert torch.is_grad_enabled() and not M._global_forward_pre_hooks and torch.overrides._len_torch_function_stack()==0
    x = torch.ones(1)
    with recording() as rec: out = (x*2).sum()
    rec.backward(out)

def test_deep():
    "Ten thousand calls, without recursion."
    x = rand(3)
    with recording(audit=False) as rec:
        h = x
        for _ in range(10_000): h = h*1.0001
    rec.backward(h, torch.ones_like(h))
    torch.testing.assert_close(x.g, torch.full_like(x, 1.0001**10_000))

def test_threads_record_apart():
    errors = []
    def run(seed):
        try:
            for _ in range(20):
                x = torch.full((3,), float(seed), dtype=torch.float64)
                with recording() as rec: out = (x**3).sum()
                rec.backward(out)
                assert torch.equal(x.g, 3*x**2)
        except BaseException as e: errors.append(e)
    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert not errors

def test_autocast():
    "As autograd's, to the last bit where torch computes in half precision."
    net,x = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)),torch.randn(6, 5)
    targ = torch.tensor([0,1,2,0,1,2])
    def loss(net, x):
        with torch.autocast('cpu', torch.bfloat16): return F.cross_entropy(net(x), targ)
    ref = copy.deepcopy(net)
    loss(ref, x).backward()
    with recording() as rec: out = loss(net, x)
    rec.backward(out)
    for p,q in zip(net.parameters(), ref.parameters()): torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-8)


# The boundary

def test_what_autograd_does_around_it():
    "Scaled losses, a penalty, siamese nets, two heads with operations between, accumulation, a net in somebody's net."
    mk = lambda i,o: nn.Sequential(nn.Linear(i, 8, dtype=torch.float64), nn.Tanh(), nn.Linear(8, o, dtype=torch.float64))
    x,z,y = rand(5, 3),rand(5, 3),rand(5, 2)
    mse = lambda a: ((a-y)**2).mean()
    cases = {'penalty': (lambda m: (mse(m(x))/4+.1*sum((p**2).sum() for p in m.ps())).backward(), [mk(3, 2)]),
        'between': (lambda a,b: mse(b(torch.relu(a(x)*2))).backward(), [mk(3, 2),mk(2, 2)]),
        'accumulated': (lambda m: [mse(m(o)).div(2).backward() for o in (x,z)], [mk(3, 2)]),
        'siamese': (lambda m: ((m(x)-m(z))**2).mean().backward(), [mk(3, 2)]),
        'two losses': (lambda m: (lambda h: (mse(h).backward(retain_graph=True), (h**2).sum().backward()))(m(x)), [mk(3, 2)]),
        'two heads': (lambda m,a,b: (lambda h: (mse(a(h))+mse(b(h*2).sin())).backward())(m(x)), [mk(3, 2),mk(2, 2),mk(2, 2)])}
    class Through:
        def __init__(self, net): self.net = net
        def __call__(self, x): return recorded_call(self.net, x)[0]
        def ps(self): return list(self.net.parameters())
    class Plain(Through):
        def __call__(self, x): return self.net(x)
    for name,(f,nets) in cases.items():
        f(*map(Plain, nets))
        want = [p.grad.clone() for n in nets for p in n.parameters()]
        for n in nets: n.zero_grad()
        f(*map(Through, nets))
        close([p.grad for n in nets for p in n.parameters()], want, [name]*len(want))

def test_an_input_that_requires_grad():
    net,x = nn.Tanh(),rand(4).requires_grad_()
    out,*_ = recorded_call(net, x)
    out.sum().backward()
    torch.testing.assert_close(x.grad, 1-x.tanh()**2)

def test_second_derivative_is_refused():
    x = rand(4).requires_grad_()
    out,*_ = recorded_call(nn.Tanh(), x)
    with pytest.raises(GradError, match='second derivative'): torch.autograd.grad(out.sum(), x, create_graph=True)

class Reversal(Module):
    "Hands its input on, and turns its gradient around."
    def forward(self, x): return x
    def bwd(self, out, x): x.g = -out.g

def test_an_own_bwd_of_what_is_handed_on():
    x = rand(3)
    with recording() as rec: out = (Reversal()(x*2)*x).sum()
    rec.backward(out)
    torch.testing.assert_close(x.g, 0*x)
    @recorded
    def handed_on(inp): return inp
    gradient_of(handed_on)(lambda out, inp: setattr(inp, 'g', 7*out.g))
    with recording() as rec: out = handed_on(x).sum()
    rec.backward(out)
    assert (x.g==7).all()

def test_what_a_forward_leaves_on_its_module():
    "An auxiliary loss kept as an attribute is part of autograd's graph, as it is in torch."
    class Aux(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin,self.first = nn.Linear(4, 4, dtype=torch.float64),[]
        def forward(self, x):
            h = self.lin(x)
            self.aux,self.first = (h**2).mean(),[h]
            return h.sum()
    net,x = Aux(),rand(3, 4)
    twin = copy.deepcopy(net)
    (twin(x)+3*twin.aux+twin.first[0].exp().sum()).backward()
    out,*_ = recorded_call(net, x)
    (out+3*net.aux+net.first[0].exp().sum()).backward()
    torch.testing.assert_close(net.lin.weight.grad, twin.lin.weight.grad, rtol=1e-9, atol=1e-11)

def test_what_a_model_returns_may_be_changed():
    net,x = nn.Linear(4, 4),torch.randn(3, 4)
    out,*_ = recorded_call(net, x)
    out[:,0] = 0.
    out.mul_(2).sum().backward()
    want = 2*x.sum(0).expand(4, 4).clone()
    want[0] = 0
    torch.testing.assert_close(net.weight.grad, want)

def test_a_buffer_that_requires_grad():
    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer('d', torch.zeros(4, requires_grad=True))
        def forward(self, x): return (x+self.d)**2
    net,x = Shift(),torch.randn(4)
    recorded_call(net, x)[0].sum().backward()
    torch.testing.assert_close(net.d.grad, 2*x)

def test_a_bwd_that_reads_a_recorded_attribute():
    class Scale(Module):
        def forward(self, x): return x*self.s
        def bwd(self, out, x): x.g = out.g*self.s
    scale,x = Scale(),rand(3)
    with recording(), pytest.raises(GradError, match='self.s was made in this recording'):
        object.__setattr__(scale, 's', x.sum())
        scale(x)

def test_a_side_door():
    "What a forward leaves where autograd can't know of it is refused when its gradient arrives."
    seen,net,x = [],nn.Sequential(nn.Linear(4, 4), nn.Tanh()),torch.randn(3, 4)
    net[0].register_forward_hook(lambda m, args, out: seen.append(out))
    out,*_ = recorded_call(net, x)
    with pytest.raises(GradError, match='used outside'): (out.sum()+(seen[0]**2).sum()).backward()
    out,*_ = recorded_call(net, x)
    (out.sum()+(seen[1].detach()**2).sum()).backward()

def test_gradients_own_their_memory():
    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = nn.Parameter(torch.zeros(2, 2))
        def forward(self, z): return self.q.view(4)+z
    net,z = Shift(),torch.zeros(4)
    recorded_call(net, z)[0].backward(torch.ones(4))
    net.q.grad.mul_(.1)
    assert z.g.tolist()==[1]*4

class OneForAll(Module):
    "Its rule gives both parameters and the input the same tensor."
    def __init__(self): self.p,self.q = (nn.Parameter(torch.zeros(3)) for _ in range(2))
    def forward(self, x): return 2*(self.p+self.q+x)
    def bwd(self, out, x): self.p.g = self.q.g = x.g = 2*out.g

@pytest.mark.parametrize('way', ['hand','autograd','nodes'])
def test_one_tensor_as_several_gradients(way):
    m,x = OneForAll().as_nodes(way=='nodes'),torch.zeros(3, requires_grad=True)
    out = m(x)
    m.backward(torch.ones(3)) if way=='hand' else out.backward(torch.ones(3))
    m.p.grad.mul_(.1) # as an optimizer might
    assert m.q.grad.tolist()==[2]*3
    m.q.grad.mul_(.1)
    assert x.g.tolist()==[2]*3 if way=='hand' else x.grad.tolist()==[2]*3

class BufferAsGradient(Module):
    exact = False
    def __init__(self):
        self.w = nn.Parameter(torch.ones(3))
        self.register_buffer('b', torch.ones(3))
    def forward(self, x): return x*self.w
    def bwd(self, out, x): x.g,self.w.g = out.g,self.b

def test_a_buffer_as_a_gradient():
    m = BufferAsGradient()
    m(torch.ones(3))
    m.backward(torch.ones(3))
    m.w.grad.mul_(.1)
    assert m.b.tolist()==[1]*3

def test_a_sum_of_parameters():
    p,q = (nn.Parameter(torch.zeros(3)) for _ in range(2))
    start = torch.ones(3)
    with recording() as rec: out = p+q
    rec.backward(out, start)
    p.grad.mul_(.1)
    assert q.grad.tolist()==start.tolist()==out.g.tolist()==[1]*3

def test_frozen_and_thawed():
    from fnnlite import Lin
    l,x = Lin(2, 2),torch.ones(1, 2)
    l.freeze()
    with recording() as rec:
        a = l(x)
        with pytest.raises(GradError, match='requires grad while it is recorded'): l.unfreeze()
    l.unfreeze()
    with recording() as rec: out = (a.detach()*l(x)).sum()
    rec.backward(out)
    torch.testing.assert_close(l.w.g, x.t()@a)

def test_hooks_where_nobody_would_call_them():
    net,x = nn.Linear(4, 1),torch.randn(3, 4)
    net.weight.register_hook(lambda g: 2*g)
    model = Model(net)
    model(x).sum().backward()
    torch.testing.assert_close(net.weight.grad, 2*x.sum(0, keepdim=True))
    for kw in (), (x,):
        with recording(*kw) as rec: out = net(x).sum()
        with pytest.raises(GradError, match='has a hook'): rec.backward(out)
    model(x)
    with pytest.raises(GradError, match='has a hook'): model.backward(torch.ones(3, 1))

def test_the_first_hook_of_a_process_is_seen(monkeypatch):
    "Its number is 0; the record's own has another."
    from torch.utils.hooks import RemovableHandle
    model,x = Model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))),torch.randn(3, 4)
    model(x)
    monkeypatch.setattr(RemovableHandle, 'next_id', 0)
    model.calls()[0].out.register_hook(lambda g: 2*g)
    with pytest.raises(GradError, match="wouldn't call its hook"): model.backward(torch.ones(3, 1))

def test_layer_norm_under_autocast():
    net,x = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)),torch.randn(3, 4)
    def loss(net):
        with torch.autocast('cpu', torch.bfloat16): return net(x).float().pow(2).sum()
    ref = copy.deepcopy(net)
    loss(ref).backward()
    with recording() as rec: out = loss(net)
    rec.backward(out)
    for p,q in zip(net.parameters(), ref.parameters()): torch.testing.assert_close(p.grad, q.grad, rtol=2e-2, atol=2e-2)

def test_nested_outputs_and_keyword_arguments():
    class Dict(nn.Module):
        def forward(self, x, *, scale): return {'a': x*scale, 'rest': (x.shape[0],[x.sin()])}
    x,s = rand(4).requires_grad_(),rand(4)
    out,*_ = recorded_call(Dict(), x, scale=s)
    (out['a'].sum()+2*out['rest'][1][0].sum()).backward()
    torch.testing.assert_close(x.grad, s+2*x.cos())
    torch.testing.assert_close(s.g, x.detach())

def test_the_net_is_left_as_it_was():
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(.5))
    before = {k:(v.clone() if 'running' not in k and 'num' not in k else None) for k,v in net.state_dict().items()}
    twin = copy.deepcopy(net)
    x = torch.randn(8, 5)
    torch.manual_seed(3)
    out,*_ = recorded_call(net, x)
    torch.manual_seed(3)
    ref = twin(x)
    g = torch.randn_like(ref)
    out.backward(g)
    ref.backward(g)
    for (k,v),w in zip(net.state_dict().items(), twin.state_dict().values()): assert torch.equal(v, w), k
    for p,q in zip(net.parameters(), twin.parameters()): torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6)
    assert all(p.requires_grad for p in net.parameters()) and not net[0]._forward_hooks and list(before)==list(net.state_dict())


# Modules of ours, in a recording and beside torch's

class Five(Module):
    "A bwd that isn't the gradient shows that it was the one that ran."
    def forward(self, x): return x*1
    def bwd(self, out, x): x.g = 5*out.g

def test_a_bwd_is_the_rule_of_its_module():
    x = rand(4, 3)
    with recording() as rec: out = Five()(x*2).sum()
    rec.backward(out)
    assert (x.g==10).all() and [c.name for c in rec.calls()]==['Tensor.mul','Five','Tensor.sum']

def test_layers_of_ours():
    "Their weights too, frozen ones not; as in a walk over their own record."
    from fnnlite import CrossEntropy, Dropout, Lin, Relu, Tanh, Wrap
    Lin64 = lambda *a: Lin(*a, dtype=torch.float64)
    net = Model([Lin64(4, 5), Relu(), Dropout(.3), Wrap(nn.LayerNorm(5, dtype=torch.float64)), Tanh(), Lin64(5, 3)], CrossEntropy())
    net.layers[5].w.requires_grad_(False)
    x,y = rand(6, 4),torch.randint(3, (6,))
    torch.manual_seed(2)
    loss = net(x, y)
    net.backward()
    want = [x.g, *(p.g for p in net.parameters())]
    net.zero_grad()
    x.g = None
    torch.manual_seed(2)
    with recording() as rec: again = net(x, y)
    rec.backward(again)
    assert torch.equal(loss, again) and [c.name for c in rec.calls()]==['Lin','Relu','Dropout','Wrap','Tanh','Lin','CrossEntropy']
    for a,b in zip([x.g, *(p.g for p in net.parameters())], want): assert a is b is None or torch.equal(a, b)
    assert [c.path for c in rec.calls()][:2]==['Lin (layers.0)','Relu (layers.1)'] and net.layers[5].w.g is None

def test_hooks_of_modules_are_heard():
    heard,net = [],Model([Five()], nn.MSELoss())
    net.layers[0].register_forward_hook(lambda m, args, out: heard.append(type(m).__name__))
    with recording(): net(rand(3), rand(3))
    assert heard==['Five']

class Own(nn.Module):
    "Makes its own loss, from keyword arguments."
    def __init__(self, **kw):
        super().__init__()
        self.emb,self.lin = nn.Embedding(7, 5, **kw),nn.Linear(5, 7, bias=False, **kw)
        self.lin.weight = self.emb.weight
    def forward(self, ids, labels=None):
        logits = self.lin(self.emb(ids).tanh())
        return {'logits':logits, 'loss':F.cross_entropy(logits.flatten(0, 1), labels.flatten())}

def torch_net(): return nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.BatchNorm1d(6), nn.Linear(6, 3)).double()

@pytest.mark.parametrize('loss', [nn.CrossEntropyLoss(label_smoothing=.1), F.cross_entropy, 'ours'], ids=['module','function','ours'])
@pytest.mark.parametrize('how', ['model','loss'])
def test_model_of_a_torch_net(loss, how):
    "As it is: `model.layers is net`; by `model.backward()` and by the loss's, accumulating; in between, `.g` of any call."
    from fnnlite import CrossEntropy
    net = torch_net()
    twin,model = copy.deepcopy(net),Model(net, CrossEntropy() if loss=='ours' else loss)
    assert model.layers is net and [n for n,_ in model.named_parameters()][0]=='layers.0.weight'
    for times in (1,2):
        x,y = rand(8, 4),torch.randint(3, (8,))
        out = model(x, y)
        out.backward() if how=='loss' else model.backward()
        leaf = x.clone().requires_grad_()
        ref = (F.cross_entropy if loss=='ours' else loss)(twin(leaf), y)
        ref.backward()
        torch.testing.assert_close(out.detach(), ref.detach())
        torch.testing.assert_close(x.g, leaf.grad, rtol=1e-9, atol=1e-11)
        for p,q in zip(net.parameters(), twin.parameters()): torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-11)
    for a,b in zip(net.state_dict().values(), twin.state_dict().values()): assert torch.equal(a, b)
    assert model.calls()[0].out.g.shape==(8,6) and model.calls()[0].path=='Linear (layers.0)'

def test_model_that_makes_its_own_loss():
    net = Own(dtype=torch.float64)
    twin,model = copy.deepcopy(net),Model(net)
    ids,labels = torch.randint(7, (2, 5)),torch.randint(7, (2, 5))
    out = model(ids, labels=labels)
    model.backward()
    twin(ids, labels=labels)['loss'].backward()
    assert set(out)=={'logits','loss'} and net.lin.weight is net.emb.weight
    torch.testing.assert_close(net.emb.weight.grad, twin.emb.weight.grad, rtol=1e-9, atol=1e-11)
    before = net.emb.weight.grad.clone()
    with pytest.raises(GradError, match='there already'): out['loss'].backward()
    (model(ids, labels=labels)['loss']*3).backward()
    torch.testing.assert_close(net.emb.weight.grad, 4*before, rtol=1e-9, atol=1e-11)

def test_model_in_a_learner_and_in_a_pickle():
    from functools import partial
    from fnnlite import SGD, DataLoaders, Learner
    torch.manual_seed(0)
    x,y = rand(20, 4),torch.randint(3, (20,))
    model = Model(torch_net(), nn.CrossEntropyLoss())
    twin = copy.deepcopy(model.layers)
    Learner(model, DataLoaders.from_arrays(x, y, x, y, bs=8, shuffle=False), partial(SGD, lr=.1, momentum=.9)).fit(2)
    opt = torch.optim.SGD(twin.parameters(), lr=.1, momentum=.9)
    for _ in range(2):
        for i in range(0, 20, 8):
            opt.zero_grad()
            F.cross_entropy(twin(x[i:i+8]), y[i:i+8]).backward()
            opt.step()
    for p,q in zip(model.parameters(), twin.parameters()): torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)
    model(x, y)
    again = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(again.predict(x), model.predict(x))
    assert again.out is copy.deepcopy(model).out is None and model.out is not None

def test_model_says_which_parameters_are_ready():
    model = Model(torch_net(), nn.CrossEntropyLoss())
    model.layers[0].bias.requires_grad_(False)
    ready = []
    model(rand(8, 4), torch.randint(3, (8,)))
    model.backward(ready=lambda p: ready.append((p, p.grad is not None)))
    assert {id(p) for p,_ in ready}=={id(p) for p in model.parameters() if p.requires_grad} and all(there for _,there in ready)

def test_model_errors():
    model = Model(torch_net(), nn.CrossEntropyLoss())
    with pytest.raises(GradError, match='no record of a forward'): model.backward()
    with pytest.raises(GradError, match='no record of a forward'): model.calls()
    with torch.no_grad(): model(rand(8, 4), torch.randint(3, (8,)))
    with pytest.raises(GradError, match='no record of a forward'): model.backward()
    bare = Model(nn.Sequential(nn.Linear(4, 3)))
    bare(torch.randn(2, 4))
    with pytest.raises(GradError, match="needs the gradient to start from"): bare.backward()
    bare.backward(torch.ones(2, 3))
    assert bare.layers[0].weight.grad.shape==(3,4)


# Where a second look found wrong gradients

@pytest.mark.parametrize('f', [lambda h: h[0].expand(3, 5), lambda h: h.view(-1).unfold(0, 5, 1)], ids=['expand','unfold'])
def test_a_part_of_what_overlaps_is_not_changed(f):
    def program(n, x):
        h = n.a(x)
        f(h)[0].mul_(2)
        return h*1
    refused(program, rand(4, 5), match='shows a number more than once')

@pytest.mark.parametrize('f', [lambda h: h.unfold(1, 2, 1), lambda h: h.as_strided((4,2,3), (5,1,1))], ids=['unfold','as_strided'])
def test_what_overlaps_is_not_changed(f):
    "Each number would be changed, and its gradient counted, as often as it is shown."
    def program(n, x):
        h = n.a(x)
        v = f(h)
        v -= .5
        return v*2
    refused(program, rand(4, 5), match='shows a number more than once')

@pytest.mark.parametrize('f', [lambda x, a: torch.add(x, x*x, alpha=a), lambda x, a: torch.addcmul(x, x, x, value=a),
    lambda x, a: F.celu(x, a), lambda x, a: F.smooth_l1_loss(x, x*x, reduction='none', beta=a)], ids=['add','addcmul','celu','smooth_l1'])
def test_a_number_in_a_tensor_changed_later(f):
    def program(n, x):
        a = torch.tensor(.5, dtype=torch.float64)
        out = f(n.a(x), a)
        a += 1
        return out
    same(program, rand(4, 5))

def test_a_number_of_numpys_changed_later():
    def program(n, x):
        i = np.array(0)
        out = n.a(x).select(0, i)
        i += 1
        return out
    same(program, rand(4, 5))

class Door(nn.Module):
    "Leaves something outside, by a list"
    def __init__(self, f):
        super().__init__()
        self.lin,self.f = nn.Linear(4, 4),f
    def forward(self, x): return self.f(self.lin(x))

def test_a_side_door_by_a_view_of_what_was_changed():
    seen = []
    def leaves(h):
        h = h*1
        h.mul_(2)
        seen.append(h[:,0])
        return h
    out,*_ = recorded_call(Door(leaves), torch.randn(3, 4))
    with pytest.raises(GradError, match='used outside'): (out.mean()+seen[0].pow(2).mean()).backward()

def test_a_side_door_by_what_a_layer_gave_back_changed_in_place():
    "torch dies of a hook on such a view, if its base requires grad already."
    seen,same = [],Dropout(.5).eval()
    def leaves(h):
        v = same(h*1)
        v.mul_(2)
        seen.append(v)
        return h
    out,*_ = recorded_call(Door(leaves), torch.randn(3, 4))
    with pytest.raises(GradError, match='used outside'): (out.mean()+seen[0].pow(2).mean()).backward()

def test_a_side_door_beside_whole_numbers():
    seen = []
    def leaves(h):
        seen.append(h.pow(2).mean())
        return h.argmax(1)
    recorded_call(Door(leaves), torch.randn(3, 4))
    with pytest.raises(GradError, match='used outside'): (seen[0]+1).backward()

@pytest.mark.parametrize('put', [lambda m, s: setattr(m, 's', s), lambda m, s: m.d.update(s=s)], ids=['buffer','dict'])
def test_a_bwd_that_reads_recorded_numbers_elsewhere(put):
    class Scale(Module):
        def __init__(self):
            self.register_buffer('s', torch.zeros((), dtype=torch.float64))
            self.d = {}
        def forward(self, x): return x*self.d.get('s', self.s)
        def bwd(self, out, x): x.g = out.g*self.d.get('s', self.s)
    scale,x = Scale(),rand(3)
    with recording(), pytest.raises(GradError, match='was made in this recording'):
        put(scale, x.sum())
        scale(x)

def test_a_new_leaf_is_asked():
    with recording() as rec:
        e = torch.ones(2, requires_grad=True)
        assert e.requires_grad
        out = (e*3).sum()
    rec.backward(out)
    assert e.g.tolist()==[3,3]

def test_a_node_goes_back_once():
    net,x = nn.Linear(2, 2),torch.ones(1, 2)
    out = recorded_call(net, x)[0].sum()
    out.backward(retain_graph=True)
    out.backward()
    assert net.bias.grad.tolist()==[2,2]
    with pytest.raises(RuntimeError, match='second time'): out.backward()
    assert net.bias.grad.tolist()==[2,2]

@pytest.mark.parametrize('saves,match', [('inq', "saves has 'inq'"), ('inp:oter', "saves has 'oter'")])
def test_a_misspelt_saves(registry, saves, match):
    with pytest.raises(ValueError, match=match): gradient_of(torch.cumsum, saves=saves)(lambda out, inp, dim: None)

@pytest.mark.parametrize('g,match', [(torch.ones(1, 3), r'\(1, 3\)'), (3, 'int')])
def test_before_replaces_a_gradient_by_another(g, match):
    x = torch.ones(2, 3)
    with recording() as rec: out = x.sin()
    with pytest.raises(GradError, match=match): rec.backward(out, torch.ones(2, 3), before=lambda call: setattr(call.out, 'g', g))
    assert getattr(x, 'g', None) is None

def test_a_layer_made_inside():
    with recording(), pytest.raises(GradError, match='before the record'): nn.Linear(3, 1)

@pytest.mark.parametrize('hook', [True, False])
def test_a_side_door_for_an_output(hook):
    seen,net = [],Door(lambda h: h if hook else seen.append(h) or h)
    if hook: net.lin.register_forward_hook(lambda m, args, out: seen.append(out))
    out,*_ = recorded_call(net, torch.randn(3, 4))
    with pytest.raises(GradError, match='used outside'): (out.mean()+seen[0].pow(2).mean()).backward()

def test_a_side_door_for_a_view_of_a_parameter():
    seen,net = [],Door(lambda h: h.sum())
    net.f = lambda h: seen.append(net.lin.weight[0]) or h.sum()
    out,*_ = recorded_call(net, torch.randn(3, 4))
    with pytest.raises(GradError, match='used outside'): (out+seen[0].sum()).backward()

def test_a_shared_dict_stays_shared():
    d = {'scale':2.}
    class Scaled(Door):
        def forward(self, x):
            out = self.lin(x).sum()*self.d['scale']
            self.d['aux'] = out**2
            return out
    net,x = Scaled(None),torch.ones(1, 4)
    net.d,net.shape = d,torch.Size((2, 3))
    recorded_call(net, x)
    d['scale'] = 5.
    out,*_ = recorded_call(net, x)
    assert net.d is d and net.shape.numel()==6
    grad, = torch.autograd.grad(d['aux'], net.lin.bias)
    torch.testing.assert_close(grad, (10*out).expand(4))

with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    @torch.jit.script
    def scripted(h): return h*h

@pytest.mark.parametrize('f', [scripted, lambda h: (h.sum(), scripted(h))], ids=['alone','beside'])
def test_an_output_computed_unseen(f):
    with pytest.raises(GradError, match='unseen|outside'): recorded_call(Door(f), torch.randn(3, 4))

def test_outputs_from_elsewhere():
    "An input, a parameter, a buffer, a constant: handed on as they are."
    class Hands(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(2, 2)
            self.register_buffer('b', torch.ones(2))
        def forward(self, x): return self.lin(x),x,self.b,self.lin.weight,torch.zeros(2),x.detach()*2
    net,x = Hands(),torch.ones(1, 2)
    out,*_ = recorded_call(net, x)
    assert out[1] is x and out[2] is net.b and out[3] is net.lin.weight
    out[0].sum().backward()
    assert net.lin.bias.grad.tolist()==[1,1]

def test_a_head_behind_our_parameters():
    from fnnlite import Lin
    net,head,x = nn.Sequential(nn.Tanh(), Lin(2, 2)),nn.Linear(2, 1),torch.ones(3, 2)
    out,*_ = recorded_call(net, x)
    head(out).sum().backward()
    torch.testing.assert_close(net[1].w.g, x.tanh().t()@head.weight.detach().expand(3, 2))

def test_a_branch_on_what_asks():
    def program(n, x): return n.a(x)*(10 if x.requires_grad or x.sin().requires_grad else 1)*(2 if n.a(x).requires_grad else 1)
    net,x = Net(),rand(4, 5)
    wrapped = type('Wrapped', (nn.Module,), {'forward': lambda self, x: program(self.net, x)})()
    wrapped.net = net
    out,*_ = recorded_call(wrapped, x)
    assert torch.equal(out, program(net, x))

def test_a_name_that_ends_as_in_place(registry):
    @recorded
    def mul_(a, b): return a*b*2
    x = rand(3)
    def program(h): return (mul_(h, h+1)+h).sum()
    with recording(), pytest.raises(GradError, match='no gradient rule'): program(x*1)
    @gradient_of(mul_)
    def mul_grad(out, a, b): a.g,b.g = 2*out.g*b,2*out.g*a
    with recording() as rec: out = program(x*1)
    rec.backward(out)
    torch.testing.assert_close(x.g, 4*x+3)

def test_a_mask_that_a_module_keeps():
    class Gate(Module):
        def forward(self, x):
            self.mask = (x>0).to(x.dtype)
            return x*self.mask
        def bwd(self, out, x): x.g = out.g*self.mask
    net,x = nn.Sequential(nn.Linear(2, 2), Gate()),torch.ones(1, 2)
    recorded_call(net, x)[0].sum().backward()
    torch.testing.assert_close(net[0].bias.grad, net[1].mask[0])

class Gated(Module):
    "Its bwd reads what stands on the module."
    def __init__(self):
        self.register_buffer('s', torch.tensor(2., dtype=torch.float64))
        self.k,self.calls = 2.,0
    def forward(self, x):
        self.mask,self.calls = (x>0).to(x.dtype),self.calls+1
        return x*self.mask*self.s*self.k
    def bwd(self, out, x): x.g = out.g*self.mask*self.s*self.k

@pytest.mark.parametrize('change,name', [(lambda m: m.s.mul_(3), 's'), (lambda m: setattr(m, 's', torch.tensor(6.)), 's'),
    (lambda m: setattr(m, 'k', 6.), 'k'), (lambda m: m(rand(3)), 'mask')], ids=['in place','buffer','number','second call'])
def test_a_bwd_that_reads_what_was_changed(change, name):
    m,x = Gated(),rand(3)
    with recording() as rec:
        out = m(x).sum()
        change(m)
    with pytest.raises(GradError, match=f'Gated: .*self.{name}.*changed after the call'): rec.backward(out)
    assert getattr(x, 'g', None) is None

def test_a_bwd_that_does_not_read_what_was_changed():
    m,x = Gated(),rand(3)
    with recording() as rec: out = m(x).sum()
    m.calls,m.other = 7,torch.ones(2)
    rec.backward(out)
    torch.testing.assert_close(x.g, 4*(x>0).to(x.dtype))

def test_a_record_is_entered_once():
    x = rand(3)
    with recording() as rec: h = x*2
    k = h*3
    with pytest.raises(GradError, match='a second time'):
        with rec: (h*h+k).sum()
    with recording() as other: out = (x*x).sum() # nothing is left of the attempt
    other.backward(out)
    torch.testing.assert_close(x.g, 2*x)

@pytest.mark.parametrize('dim', [0,1,None])
def test_weight_norm(dim):
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3, dtype=torch.float64), dim=dim), nn.Tanh())
    ref,x,g = copy.deepcopy(net),rand(5, 4),rand(5, 3)
    Model(net)(x).backward(g)
    ref(x).backward(g)
    close([p.grad for p in net.parameters()], [p.grad for p in ref.parameters()], ('a','b','c'))

@pytest.mark.parametrize('shapes', [((16,8),(3,8,16)), ((3,16,8),(8,16)), ((16,16),(16,8)), ((3,16,8),(3,8,16))], ids=['rows','columns','sums','batch'])
def test_grouped_mm(shapes):
    "In float32: torch has no other on a CPU. Rows that belong to no group are left out of the comparison: torch doesn't fill them."
    a,b = (torch.randn(s) for s in shapes)
    offs = None if a.ndim==b.ndim==3 else torch.tensor([4,4,16], dtype=torch.int32)
    x,y = a.clone().requires_grad_(),b.clone().requires_grad_()
    want = torch._grouped_mm(x, y, offs=offs)
    g = torch.randn_like(want)
    want.backward(g)
    with recording() as rec: out = torch._grouped_mm(a, b, offs=offs)
    rec.backward(out, g)
    for t,w in ((a.g,x.grad),(b.g,y.grad)): torch.testing.assert_close(t, w, rtol=1e-4, atol=1e-4)

def test_a_mixture_of_experts():
    T = pytest.importorskip('transformers')
    torch.manual_seed(0)
    net = T.MixtralForCausalLM(T.MixtralConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2))
    ref,ids = copy.deepcopy(net),torch.randint(0, 50, (2, 9))
    Model(net)(input_ids=ids, labels=ids).loss.backward()
    ref(input_ids=ids, labels=ids).loss.backward()
    for (n,p),q in zip(net.named_parameters(), ref.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5, msg=lambda m: f'{n}: {m}')

@pytest.mark.parametrize('f', [lambda x: x.as_strided((3,2), (1,4)), lambda x: x.t().as_strided((2,2), (1,2), 1), lambda x: x[1:].as_strided((2,2), (4,1))])
def test_as_strided(f):
    x = rand(4, 4)
    y = x.clone().requires_grad_()
    want = f(y*2)
    with recording() as rec: out = f(x*2)
    g = torch.randn_like(out)
    rec.backward(out, g)
    want.backward(g)
    torch.testing.assert_close(x.g, y.grad)

def test_as_strided_beside_its_input():
    "A part that reads numbers its input doesn't show, whose gradient would be lost"
    x = rand(4, 4)
    with recording() as rec: out = (x*2)[:2].as_strided((3,2), (4,1)).sum()
    with pytest.raises(NotImplementedError, match='does not show'): rec.backward(out)

def test_as_strided_of_what_shows_a_number_twice():
    x = rand(1, 4)
    with recording() as rec: out = (x*2).expand(4, 4).as_strided((2,2), (0,1)).sum()
    with pytest.raises(NotImplementedError, match='more than once'): rec.backward(out)
