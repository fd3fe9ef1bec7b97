"The same `bwd` under torch's autograd: right gradients, torch's own tools, and errors where a gradient would be wrong or lost."
import copy, gc, pickle, weakref
import pytest, torch
from torch import nn
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint
from fnnlite import Module, Add, Concat, Dropout, Flatten, Lin, LogSoftmax, Matmul, Relu
from fnnlite import Tanh, CrossEntropy, Mse, Model, Sequential, Wrap, GradError, const, check_grads
from fnnlite.core.checks import autograd_gap
from fnnlite.core.module import through_forward
from fnnlite.core.record import floats
from cases import cases, name
from helpers import GivenBwd, Id, Lin64, Table, each_fault, no_input, rand, right

def leaf(*shape): return rand(*shape).requires_grad_()
def net(): return Model([Lin64(4, 5), Tanh(), Lin64(5, 3)], Mse())
def batch(n=6): return rand(n, 4),rand(n, 3)

@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)

def nodes(t):
    "Names of the nodes of autograd's graph behind `t`"
    seen,todo = [],[t.grad_fn]
    while todo:
        n = todo.pop()
        if n is None or n in seen: continue
        seen.append(n)
        todo += [f for f,_ in n.next_functions]
    return [n.name() for n in seen]


# Layers and losses, against finite differences

def classes(n=5, c=3): return torch.randint(0, c, (n,))
def check(module, args):
    "gradcheck with respect to the arguments and parameters that require grad, with the same random numbers each time; and that it was `bwd` which ran"
    ps = [p for p in module.parameters() if p.requires_grad]
    ran = []
    class Counted(type(module)):
        def bwd(self, out, *args):
            ran.append(1)
            return super().bwd(out, *args)
    if module.has_bwd: module.__class__ = Counted
    def f(*ts):
        torch.manual_seed(1)
        return tuple(o for o in floats(module(*args)))
    assert gradcheck(f, [t for t in floats(args) if t.requires_grad]+ps)
    assert ran or not module.has_bwd or isinstance(module, Wrap) # which autograd needs not

@pytest.mark.parametrize('case', cases, ids=name)
def test_gradcheck(case):
    "Where all requires grad; all but one of the inputs; all but the parameters."
    n = len(case.inps())
    for off in (None, *range(n), 'params'):
        m,args = case.make().requires_grad_(off!='params'),[t.requires_grad_(t.is_floating_point() and i!=off) for i,t in enumerate(case.inps())]
        if any(t.requires_grad for t in (*args, *m.parameters())): check(m, args)


# Structures

class Deep(Module):
    "Nested arguments and outputs, keyword arguments, numbers, an output that is no float and one that wants no gradient"
    def __init__(self): self.w = rand(4)
    def forward(self, inps, k, more=None, *, scale=2.):
        a,(b,) = inps['a'],inps['b']
        return {'sum': a*self.w+k*b, 'list': [a*more*scale, (a>0, const(a*3))], 'n': k}
    def bwd(self, out, inps, k, more=None, *, scale=2.):
        a,(b,) = inps['a'],inps['b']
        g,h = out['sum'].g,out['list'][0].g
        a.g,b.g,self.w.g = g*self.w+h*more*scale,k*g,(g*a).sum(0)
        more.g = h*a*scale

def test_nested_arguments_and_outputs():
    m,a,b,c = Deep().requires_grad_(),leaf(3, 4),leaf(3, 4),leaf(3, 4)
    out = m({'a': a, 'b': (b,)}, 3, more=c, scale=.5)
    assert out['n']==3 and out['list'][1][0].dtype==torch.bool and not out['list'][1][1].requires_grad and isinstance(out['list'][1], tuple)
    def f(*_):
        out = m({'a': a, 'b': (b,)}, 3, more=c, scale=.5)
        return out['sum'],out['list'][0]
    assert gradcheck(f, (a, b, c, m.w))
    with through_forward(): ref = torch.autograd.grad(m({'a': a, 'b': (b,)}, 3, more=c)['sum'].square().sum(), (a,b,m.w))
    torch.testing.assert_close(torch.autograd.grad(m({'a': a, 'b': (b,)}, 3, more=c)['sum'].square().sum(), (a,b,m.w)), ref)

class Mixed(Module):
    "fnnlite, torch.nn, raw operations, views, functional calls and a weight used raw, in any order"
    def __init__(self):
        self.a,self.norm,self.act,self.b,self.add,self.l = Lin64(4, 6),nn.LayerNorm(6, dtype=torch.float64),Tanh(),Lin64(3, 3),Add(),nn.Linear(3, 3).double()
        self.relu = Relu()
    def forward(self, x):
        h = self.norm(self.a(x/2))
        h = self.act(h*2).view(-1, 2, 3)[:, :1].expand(-1, 2, 3)
        h = self.add(self.b(h), torch.nn.functional.gelu(h))
        return self.relu(self.l(h.transpose(1, 2).reshape(-1, 3)))@self.b.w

def test_anything_may_stand_between():
    m,x = Mixed().requires_grad_(),leaf(5, 4)
    ps = list(m.parameters())
    assert gradcheck(lambda *_: m(x), (x, *ps))
    assert gradcheck(lambda *_: m(x.detach()), ps)
    assert sum('Node' in n for n in nodes(m(x)))==5

def test_raw_operations_before_the_first_weight():
    class Raw(Module):
        def __init__(self): self.flat,self.act,self.l = Flatten(),Tanh(),Lin64(4, 3)
        def forward(self, x): return self.l(self.act(self.flat(x)/255))
    m,x = Raw().requires_grad_(),rand(5, 2, 2)
    assert gradcheck(lambda *_: m(x), list(m.parameters()))
    assert m.out is None and m.flat.out is None and m.act.out is None # nobody will walk back over these
    class Side(Raw):
        def forward(self, x):
            self.l(x.flatten(1))
            return self.act(self.flat(x)/255)
    s = Side().requires_grad_()
    s(x)
    with pytest.raises(GradError, match='before a recorded forward'): s.backward(rand(5, 4))
    with pytest.raises(GradError, match='raw operation'): Side()(x)

class Both(Module):
    def forward(self, x):
        y = x*2
        return y,[y,x]
    def bwd(self, out, x): x.g = out[0].g*2 + out[1][0].g*2 + out[1][1].g
class Net(Module):
    def __init__(self): self.l,self.both,self.id,self.add,self.table,self.mm,self.drop = Lin64(4, 4),Both(),Id(),Add(),Table(),Matmul(),Dropout()
    def forward(self, x):
        h = self.l(self.l(x))
        y,(z,w) = self.both(self.id(h))
        return self.mm(self.add(self.add(y, y), self.add(z, w)), self.drop(self.table()))

def test_shared_layers_and_tensors():
    "A layer used twice, one tensor as two arguments, returned twice, inputs and parameters handed on as they are."
    m,x = Net().eval().requires_grad_(),leaf(3, 4)
    assert gradcheck(lambda *_: m(x), (x, *m.parameters()))
    assert gradcheck(Add(), (x, x)) and gradcheck(Id(), (x,))
    assert gradcheck(lambda *_: m.table(), (m.table.w,)) and m.table().requires_grad and m.table() is not m.table.w
    assert not hasattr(x, 'g') and not hasattr(m.table.w, 'g')

def test_what_hangs_on_an_input_stays_there():
    x = leaf(3)
    x.note,x.g = torch.ones(2),rand(2)
    hung = weakref.ref(x.note)
    y = Id()(x)
    del x.note
    assert hung() is None and not hasattr(y, 'note')
    y.sum().backward()

def test_in_place_on_what_was_handed_on():
    x = leaf(3)
    h = x*2
    y = Id()(h)
    y.add_(1)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'): y.sum().backward()

def test_unused_outputs_and_no_outputs():
    class Split(Module):
        def forward(self, x): return x*2,x.exp(),None
        def bwd(self, out, x): x.g = 2*out[0].g + out[1].g*out[1]
    x = leaf(3)
    Split()(x)[1].sum().backward()
    torch.testing.assert_close(x.grad, x.exp())
    class Prints(Module):
        def forward(self, x): self.seen = x.sum().item()
        def bwd(self, out): pass
    assert Prints()(x) is None

def test_functional_call():
    m,(x,y) = net(),batch()
    ws = {n:(p*1.5).detach().requires_grad_() for n,p in m.named_parameters()}
    def f(*ts): return torch.func.functional_call(m, dict(zip(ws, ts)), (x, y))
    assert gradcheck(f, list(ws.values()))
    loss = f(*ws.values())
    loss.backward()
    assert all(p.grad is None for p in m.parameters())

class Block(Module):
    "A bwd over the parameters of modules inside, a list of them, and methods, properties and attributes of its own"
    def __init__(self): self.ls,self.last,self.calls = [Lin64(4, 4, bias=False), Lin64(4, 4, bias=False)],nn.Linear(4, 2, bias=False).double(),0
    @property
    def product(self): return self.ls[0].w@self.ls[1].w
    def forward(self, x): return x@self.product@self.last.weight.t()
    def bwd(self, out, x):
        self.calls += 1
        a,b = self.ls
        g = out.g@self.last.weight
        self.last.weight.g = out.g.t()@x@self.product
        b.w.g,a.w.g,x.g = (x@a.w).t()@g,x.t()@g@b.w.t(),g@self.product.t()

def test_parameters_of_modules_inside():
    m,x = Block().requires_grad_(),leaf(3, 4)
    assert gradcheck(lambda *_: m(x), (x, *m.parameters()))
    assert m.calls>0 and not any(hasattr(p, 'g') for p in m.parameters())
    class More(Block):
        def bwd(self, out, x):
            super().bwd(out, x)
            assert isinstance(self, More) and isinstance(self.last, nn.Linear) and len(list(self.parameters()))==3
    m = More().requires_grad_()
    assert gradcheck(lambda *_: m(x), (x, *m.parameters()))

def test_classes_that_look_after_their_subclasses():
    names = []
    class Registered(Lin):
        def __init_subclass__(cls):
            super().__init_subclass__()
            names.append(cls.__name__)
    class One(Registered): pass
    assert gradcheck(One(4, 3, dtype=torch.float64).requires_grad_(), (leaf(2, 4),)) and names==['One']

def test_backward_inside_a_bwd_is_refused():
    class Inner(Module):
        def __init__(self): self.a = Lin64(4, 4)
        def forward(self, x): return self.a(x*2)
        def bwd(self, out, x):
            self.a.backward(out.g)
            x.g = self.a.args[0].g*2
    m,x = Inner(),rand(3, 4)
    m(x)
    m.backward(rand(3, 4)) # there is an old record
    m.requires_grad_()
    with pytest.raises(GradError, match=r'Lin: backward\(\) inside a bwd finds no record under autograd'): m(x).sum().backward()


# What is not asked for

@pytest.mark.parametrize('x,frozen,expected', [(True, '', 'xwb'), (False, '', 'wb'), (True, 'w', 'xb'), (True, 'wb', 'x'), (False, 'b', 'w')])
@pytest.mark.parametrize('how', ['requires_grad','freeze'])
def test_what_is_not_asked_for_is_not_computed(x, frozen, expected, how):
    wanted = []
    class Asks(Lin):
        def bwd(self, out, inp):
            super().bwd(out, inp)
            wanted.append(''.join(n for n,t in zip('xwb', (inp,self.w,self.b)) if t.g is not None))
    m = Asks(4, 3, dtype=torch.float64).requires_grad_()
    for n in frozen:
        if how=='freeze': getattr(m, n).const = True
        else: getattr(m, n).requires_grad_(False)
    x = rand(5, 4).requires_grad_(x)
    m(x).sum().backward()
    assert wanted==[expected]
    assert ''.join(n for n,t in zip('xwb', (x,m.w,m.b)) if t.grad is not None)==expected

def test_all_frozen():
    m = net().requires_grad_().freeze()
    x,y = batch()
    assert not m(x, y).requires_grad
    x.requires_grad_()
    m(x, y).backward()
    assert x.grad is not None and all(p.grad is None for p in m.parameters())
    m.layers[2].unfreeze()
    m(x.detach(), y).backward()
    assert m.layers[0].w.grad is None and m.layers[2].w.grad is not None

def test_nothing_kept_under_no_grad():
    m,(x,y) = net().requires_grad_(),batch()
    with torch.no_grad(): assert m(x, y).grad_fn is None
    assert m.predict(x).grad_fn is None


# A wrong gradient is never silent

@each_fault
@pytest.mark.parametrize('leaf', [True, False])
def test_faulty_bwd_is_refused(f, msg, leaf):
    m = Model([Lin64(4, 4), GivenBwd(right), Lin64(4, 3)], Mse()).requires_grad_()
    x,y = batch()
    x.requires_grad_(leaf)
    m(x, y).backward()
    m.layers[1].f = f
    with pytest.raises(GradError, match=r"GivenBwd \(layers.1\): " + msg): m(x, y).backward()
    with pytest.raises(GradError, match="GivenBwd: " + msg): m.layers[1](x.detach().requires_grad_()).square().sum().backward()

def test_input_that_requires_grad_may_not_be_left_out():
    l,x = GivenBwd(no_input).requires_grad_(),leaf(6, 4)
    with pytest.raises(GradError, match="argument 'inp' got no .g"): l(x).sum().backward()
    l(x.detach()).sum().backward() # nobody asked

def test_changes_in_place_are_autograds_error():
    def run(change):
        m,x = Lin64(4, 4).requires_grad_(),leaf(3, 4)
        h = x*2
        o = m(h)
        change(m, h, o)
        with pytest.raises(RuntimeError, match='modified by an inplace operation'): (o*1).sum().backward()
    def weight(m, h, o):
        with torch.no_grad(): m.w.mul_(2)
    run(weight)
    run(lambda m,h,o: h.mul_(2))
    run(lambda m,h,o: o.detach().mul_(2))
    class Keeps(Dropout):
        def forward(self, inp):
            out = super().forward(inp)
            masks.append(out.mask)
            return out
    masks,x = [],leaf(5)
    o = Keeps()(x)
    masks[0].mul_(2)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'): o.sum().backward()

def test_parameters_own_their_gradients():
    "`a.g = b.g = out.g.view(-1)`: what clips one in place must not change the other."
    class Rows(Module):
        def __init__(self): self.p,self.q = rand(12),rand(3, 4)
        def forward(self, x): return x+self.p.view(3, 4)+self.q
        def bwd(self, out, x):
            x.g = self.q.g = out.g
            self.p.g = out.g.view(-1)
    m,x = Rows().requires_grad_(),leaf(3, 4)
    (m(x)+Rows().requires_grad_()(x)).square().sum().backward()
    ptrs = [t.grad.data_ptr() for t in (m.p,m.q,x)]
    assert len(set(ptrs))==3

def test_check_still_compares_with_autograd_through_forward():
    class Wrong(Lin):
        def bwd(self, out, inp):
            super().bwd(out, inp)
            self.w.g = self.w.g*1.01
    with pytest.raises(AssertionError, match="w is off autograd's"): check_grads(Wrong(4, 3), rand(5, 4), show=False)
    with pytest.raises(AssertionError, match="1.w is off autograd's"): check_grads(Sequential(Tanh(), Wrong(4, 3)), rand(5, 4), show=False)
    assert .005<autograd_gap(Wrong(4, 3), rand(5, 4))<.02
    l,x = Wrong(4, 3, dtype=torch.float64).requires_grad_(),rand(5, 4)
    g = torch.autograd.grad(l(x).sum(), l.w)[0]
    with through_forward():
        out = l(x)
        with through_forward(): pass
        torch.testing.assert_close(g, 1.01*torch.autograd.grad(l(x).sum(), l.w)[0])
    assert torch.equal(torch.autograd.grad(l(x).sum(), l.w)[0], g) and not any('Node' in n for n in nodes(out))
    with pytest.raises(KeyError), through_forward(): raise KeyError
    assert any('Node' in n for n in nodes(l(x)))


# .g and .grad

def test_passes_by_records_and_under_autograd_add_up():
    x,y = batch()
    m = net()
    m(x, y)
    m.backward()
    one = [p.g.clone() for p in m.parameters()]
    def near(n): torch.testing.assert_close([p.grad for p in m.parameters()], [n*g for g in one])
    def records():
        m.requires_grad_(False)
        m(x, y)
        m.backward()
        assert all(p.g is p.grad for p in m.parameters())
    def autograd():
        m.requires_grad_()(x, y).backward()
        assert all(not hasattr(p, 'g') for p in m.parameters()) # an old one would contradict .grad
    near(1)
    autograd()
    near(2)
    autograd()
    near(3)
    records()
    near(4)
    for zero in (m.zero_grad, torch.optim.SGD(m.parameters()).zero_grad):
        for first,second in ((records, autograd), (autograd, records)):
            zero()
            first()
            second()
            near(2)
    m.requires_grad_()
    loss = m(x, y)
    m.zero_grad() # between forward and backward, as many loops do
    loss.backward()
    records()
    near(2)

def test_an_inputs_old_g_goes():
    l,x = Lin64(4, 3),rand(5, 4)
    l(x)
    l.backward(rand(5, 3))
    assert x.g is not None
    x.requires_grad_()
    l(x).sum().backward()
    assert x.g is None and x.grad is not None


# Torch's tools

def test_double_backward_is_refused():
    l,x = Lin64(4, 3).requires_grad_(),leaf(5, 4)
    g, = torch.autograd.grad(l(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'): g.sum().backward()

def test_backward_twice():
    l,x = Dropout(),leaf(50)
    loss = l(x).square().sum()
    loss.backward(retain_graph=True)
    first = x.grad.clone()
    loss.backward()
    torch.testing.assert_close(x.grad, 2*first)
    with pytest.raises(RuntimeError, match='second time'): loss.backward()

def test_hooks():
    m,(x,y),seen = net().requires_grad_(),batch(),[]
    l,ref = m.layers[2],torch.autograd.grad(m(x, y), m.layers[0].w)[0]
    hs = [l.register_forward_pre_hook(lambda mod,args: seen.append(('pre', mod is l))),
        l.register_forward_hook(lambda mod,args,out: seen.append(('forward', out.grad_fn.name()))),
        l.register_full_backward_pre_hook(lambda mod,g: seen.append(('backward pre', g[0].shape))),
        l.register_full_backward_hook(lambda mod,gi,go: seen.append(('backward', gi[0].shape, go[0].shape)))]
    torch.testing.assert_close(torch.autograd.grad(m(x, y), m.layers[0].w)[0], ref)
    assert seen==[('pre',True), ('forward','NodeBackward'), ('backward pre',(6,3)), ('backward',(6,5),(6,3))]
    assert 'forward' not in vars(l)
    for h in hs: h.remove()
    def double(*a): return a[-1]*2 # under autograd hooks may change things
    h = l.register_forward_hook(double)
    out = m.layers(x)
    h.remove()
    torch.testing.assert_close(out, 2*m.layers(x))
    h = l.register_full_backward_hook(lambda mod,gi,go: (gi[0]*3,))
    torch.testing.assert_close(torch.autograd.grad(m(x, y), m.layers[0].w)[0], 3*ref)
    h.remove()
    h = l.register_forward_pre_hook(lambda *a: {}['fails'])
    with pytest.raises(KeyError): m(x, y)
    assert 'forward' not in vars(l)
    h.remove()
    calls = []
    l.forward = lambda inp: (calls.append(1),Lin.forward(l, inp))[1] # as other libraries patch it
    h = l.register_forward_hook(lambda *a: None)
    for n in (1,2):
        torch.testing.assert_close(torch.autograd.grad(m(x, y), m.layers[0].w)[0], ref)
        assert len(calls)==n

@pytest.mark.parametrize('reentrant', [False, True])
def test_checkpoint(reentrant):
    m,x = Sequential(Lin64(4, 4), Dropout(), Tanh(), Lin64(4, 4)).requires_grad_(),leaf(5, 4)
    def grads(f):
        torch.manual_seed(3)
        return torch.autograd.backward(f(x).square().sum()) or [(t.grad, setattr(t, 'grad', None))[0] for t in (x, *m.parameters())]
    torch.testing.assert_close(grads(lambda x: checkpoint(m, x, use_reentrant=reentrant)), grads(m))

class Saved(torch.autograd.graph.saved_tensors_hooks):
    "All that is saved goes elsewhere, and comes back"
    def __init__(self):
        self.store = []
        super().__init__(self.pack, lambda i: self.store[i].clone())
    def pack(self, t):
        self.store.append(t.detach().clone())
        return len(self.store)-1

def test_saved_tensors_hooks_see_all():
    m,x = Sequential(Lin64(4, 3), Dropout(), Relu(), Concat()).requires_grad_(),leaf(5, 4)
    def grads(): return torch.autograd.grad(loss, (x, *m.parameters()))
    torch.manual_seed(3)
    loss = m(x).square().sum()
    ref = grads()
    torch.manual_seed(3)
    saved = Saved()
    with saved: loss = m(x).square().sum()
    for p in m.parameters(): p.data = torch.full_like(p, torch.nan) # only what was saved is read
    torch.testing.assert_close(grads(), ref)
    assert any(torch.equal((t>0).double(), t*.5) for t in saved.store) # the mask among it

def test_freed_as_usual():
    "What a node keeps goes with the graph: after backward, or when nobody holds the loss; no cycles."
    gc.collect()
    gc.disable()
    try:
        class Watch(Dropout):
            def forward(self, inp):
                out = super().forward(inp)
                refs.extend(map(weakref.ref, (inp, out.mask)))
                return out
        def alive(): return sum(r() is not None for r in refs)
        m,refs = Sequential(Lin64(4, 4), Watch(), Tanh(), Watch(), Id(), Both()).requires_grad_(),[]
        loss = m(rand(5, 4))[0].sum()
        assert alive()==4
        loss.backward(retain_graph=True)
        assert alive()==4
        loss.backward()
        assert alive()==0 and len(refs)==4
        loss = m(rand(5, 4))[0].sum()
        del loss
        assert alive()==0 and len(refs)==8
        x = rand(5, 4)
        ref = weakref.ref(x)
        loss = CrossEntropy()(m[0](x), classes(5))
        assert not hasattr(loss, 'logp')
        loss.backward()
        del x
        assert ref() is None
    finally: gc.enable()

def test_copies_and_pickles():
    m,(x,y) = net().requires_grad_(),batch()
    m(x, y).backward()
    for twin in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        torch.testing.assert_close(torch.autograd.grad(twin(x, y), twin.layers[0].w)[0], m.layers[0].w.grad)

def test_training_equals_torchs_layers():
    m = Model([Lin64(4, 8), Relu(), Dropout(.3), Lin64(8, 3)], CrossEntropy()).requires_grad_()
    twin = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), Dropout(.3), nn.Linear(8, 3)).double()
    with torch.no_grad():
        for l,t in ((0,0),(3,3)):
            twin[t].weight.copy_(m.layers[l].w.t())
            twin[t].bias.copy_(m.layers[l].b)
    losses = []
    for forward,ps in ((m, m.parameters()), (lambda x,y: nn.functional.cross_entropy(twin(x), y), twin.parameters())):
        torch.manual_seed(1)
        ps = list(ps)
        opt = torch.optim.AdamW(ps, lr=.05)
        for _ in range(10):
            loss = forward(rand(6, 4), classes(6))
            opt.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(ps, 1.)
            opt.step()
            losses.append(loss.item())
    torch.testing.assert_close(losses[:10], losses[10:])
    assert losses[0]!=losses[1]

@pytest.mark.filterwarnings('ignore:`torch.jit:DeprecationWarning') # torch's own, as it imports what jvp needs
def test_torch_func_and_forward_mode():
    "Where nothing requires grad, forward-mode and vmap find plain torch operations; a node refuses both, and torch.func, in torch's words."
    import torch.autograd.forward_ad as fw
    m,x = Sequential(Lin64(4, 3), Tanh()),rand(5, 4)
    def f(x): return (x@m[0].w+m[0].b).tanh()
    v = torch.ones_like(x)
    def dual():
        with fw.dual_level(): return fw.unpack_dual(m(fw.make_dual(x, v))).tangent
    torch.testing.assert_close(torch.func.vmap(m)(x), f(x))
    torch.testing.assert_close(torch.func.jvp(m, (x,), (v,)), torch.func.jvp(f, (x,), (v,)))
    torch.testing.assert_close(dual(), torch.func.jvp(f, (x,), (v,))[1])
    def of_grad(): return torch.func.grad(lambda x: m(x).sum())(x)
    refused = dict(expected_exception=RuntimeError, match='must override the setup_context')
    with pytest.raises(**refused): of_grad()
    m.requires_grad_()
    with pytest.raises(**refused): of_grad()
    with pytest.raises(**refused): torch.func.vmap(m)(x)
    with pytest.raises(NotImplementedError, match='You must implement the jvp'): dual()
    with through_forward(): # which differentiates `forward`
        torch.testing.assert_close(of_grad(), torch.func.grad(lambda x: f(x).sum())(x))
        torch.testing.assert_close(torch.func.vmap(m)(x), f(x))


# Autocast and loss scaling

def twins(loss=nn.functional.mse_loss):
    "A net, and the same of torch's layers"
    m = Model([Lin(20, 30), Relu(), Lin(30, 10), LogSoftmax(), Lin(10, 5)], Mse() if loss is nn.functional.mse_loss else CrossEntropy())
    t = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10), nn.LogSoftmax(-1), nn.Linear(10, 5))
    with torch.no_grad():
        for i in (0,2,4):
            t[i].weight.copy_(m.layers[i].w.t())
            t[i].bias.copy_(m.layers[i].b)
    return m,lambda x,y: loss(t(x), y),[p for i in (0,2,4) for p in t[i].parameters()]

def transposed_like(gs, ps): return [g.t() if g.shape!=p.shape else g for g,p in zip(gs, ps)]

@pytest.mark.parametrize('loss', [nn.functional.mse_loss, nn.functional.cross_entropy], ids=lambda f: f.__name__)
@pytest.mark.parametrize('how', ['autograd','records'])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast(loss, how, dtype):
    "Gradients in the parameters' dtype, as far from float32's as those of torch's layers are"
    m,twin,ws = twins(loss)
    x,y = torch.randn(64, 20),torch.randn(64, 5) if loss is nn.functional.mse_loss else classes(64, 5)
    x.requires_grad_(how=='autograd')
    m.requires_grad_(how=='autograd')
    exact = torch.autograd.grad(twin(x, y), ws)
    with torch.autocast('cpu', dtype):
        ref = torch.autograd.grad(twin(x, y), ws)
        out = m(x, y)
        if how=='autograd': assert m.layers(x).dtype==dtype
    if how=='autograd': out.backward()
    else: m.backward()
    ps = list(m.parameters())
    assert all(p.grad.dtype==torch.float32 for p in ps) and (x.grad if how=='autograd' else x.g).dtype==torch.float32
    eps = torch.finfo(dtype).eps
    for p,r,e in zip(ps, transposed_like(ref, ps), transposed_like(exact, ps)):
        off,usual = (p.grad-e).norm()/e.norm(),(r-e).norm()/e.norm()
        assert off<max(2*usual, eps) and usual>0
        torch.testing.assert_close(p.grad, r, rtol=4*eps, atol=4*eps*e.abs().max().item())
    if how=='records':
        assert m.layers[0].out.g.dtype==m.layers[0].out.dtype==dtype and all(p.g is p.grad for p in ps)

class Spy(Lin):
    "Notes the autocast that bwd runs under"
    def bwd(self, out, inp):
        super().bwd(out, inp)
        seen.append(torch.get_autocast_dtype('cpu') if torch.is_autocast_enabled('cpu') else None)
seen = []

@pytest.mark.parametrize('grads', [True, False])
def test_backward_runs_under_the_forwards_autocast(grads):
    m = Sequential(Spy(4, 4), Spy(4, 4)).requires_grad_(grads)
    x = torch.randn(3, 4)
    def back(out): return out.sum().backward() if grads else m.backward(torch.ones_like(out))
    def dtypes(out):
        seen.clear()
        back(out)
        return seen
    with torch.autocast('cpu', torch.float16): out = m(x)
    assert dtypes(out)==[torch.float16]*2
    with torch.autocast('cpu', torch.bfloat16): out = m(x)
    with torch.autocast('cpu', torch.float16): assert dtypes(out)==[torch.bfloat16]*2
    out = m(x)
    with torch.autocast('cpu'): assert dtypes(out)==[None]*2
    with torch.autocast('cpu'): assert dtypes(m(x))==[torch.bfloat16]*2
    assert dtypes(m(x))==[None]*2

@pytest.mark.parametrize('grads', [True, False])
def test_dtypes_are_checked_outside_autocast(grads):
    x = torch.randn(3, 4)
    with pytest.raises(TypeError, match='inp has dtype torch.bfloat16, expected torch.float32'): Lin(4, 3).requires_grad_(grads)(x.bfloat16())
    with torch.autocast('cpu'), pytest.raises(TypeError, match='expected a floating-point'): Lin(4, 3).requires_grad_(grads)(x.long())
    with torch.autocast('cpu', enabled=False), pytest.raises(TypeError, match='expected torch.float32'): Lin(4, 3)(x.bfloat16())
    class Half(Lin):
        def bwd(self, out, inp):
            super().bwd(out, inp)
            self.w.g = self.w.g.bfloat16()
    m = Half(4, 3).requires_grad_(grads)
    def back(): return m(x).sum().backward() if grads else m(x) is None or m.backward(torch.ones(3, 3))
    with pytest.raises(GradError, match="'w' got a .g of .4, 3. torch.bfloat16, expected"): back()

def test_autocast_cache():
    "A weight that a node has cast, without grad, and that is used raw afterwards."
    l,x = Lin(4, 4).requires_grad_(),torch.randn(3, 4)
    with torch.autocast('cpu'): (l(x)+x@l.w).sum().backward()
    first,l.w.grad = l.w.grad,None
    with torch.autocast('cpu'): l(x).sum().backward()
    torch.testing.assert_close(first, 2*l.w.grad, rtol=.02, atol=.02)

@pytest.mark.parametrize('how', ['autograd','records'])
def test_grad_scaler(how):
    "Training with scaled losses, clipped in between, a step of it skipped: as with torch's layers in float32 but for the rounding."
    m,twin,ws = twins(nn.functional.cross_entropy)
    m.requires_grad_(how=='autograd')
    opt,ref = (torch.optim.SGD(ps, lr=.5) for ps in (list(m.parameters()), ws))
    scaler = torch.amp.GradScaler('cpu', init_scale=2.**24, growth_interval=1000)
    before = [p.detach().clone() for p in m.parameters()]
    for i in range(12):
        x,y = torch.randn(64, 20),classes(64, 5)
        opt.zero_grad()
        with torch.autocast('cpu', torch.float16): loss = m(x, y)
        if how=='autograd': scaler.scale(loss).backward()
        else: m.backward(scaler.scale(torch.ones_like(loss)))
        scaler.unscale_(opt)
        if how=='records': assert all(p.g is p.grad for p in m.parameters())
        norm = nn.utils.clip_grad_norm_(m.parameters(), 1.)
        scale = scaler.get_scale()
        scaler.step(opt)
        scaler.update()
        if scaler.get_scale()<scale: continue # inf or nan: no step
        ref.zero_grad()
        twin(x, y).backward()
        torch.testing.assert_close(nn.utils.clip_grad_norm_(ws, 1.), norm, rtol=.05, atol=.01)
        ref.step()
    assert 1<scaler.get_scale()<2.**24
    for p,w,b in zip(m.parameters(), transposed_like(ws, before), before):
        assert (p-b).norm()>0 and (p-w).norm()<.02*(p-b).norm()+.01*b.norm()
