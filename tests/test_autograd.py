"An outermost call as a node of autograd's graph, and a node a layer: right gradients, torch's own tools, errors where one would be lost."
import gc, weakref
from functools import wraps
import pytest, torch, torch.nn.functional as F
from torch import nn
from torch.autograd import grad, gradcheck
from torch.utils.checkpoint import checkpoint
from fnnlite import Module, Add, Concat, Dropout, Lin, LogSoftmax, Matmul, Relu, Tanh, CrossEntropy, Mse
from fnnlite import GradError, Model, Sequential, Wrap, const
from fnnlite.core.module import through_forward
from fnnlite.core.record import floats
from cases import cases, name
from helpers import GivenBwd, Id, Lin64, Table, close, each_fault, no_input, rand, right, tight

each = pytest.mark.parametrize('nodes', [False,True], ids=['boundary','nodes'])
def leaf(*shape): return rand(*shape).requires_grad_()
def net(): return Model([Lin64(4, 5), Tanh(), Lin64(5, 3)], Mse())
def batch(n=6): return rand(n, 4),rand(n, 3)

@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)

def ours(t):
    "How many nodes of an outermost call, and of a layer, are in autograd's graph behind `t`"
    seen,todo = set(),{t.grad_fn}
    while todo:
        seen |= todo
        todo = {f for n in todo for f,_ in n.next_functions if f}-seen
    return tuple(sum(n.name()==kind for n in seen) for kind in ('BoundaryBackward','NodeBackward'))

def through(f, *args):
    "`f(*args)`, where autograd goes through the forwards as if there were no `bwd`"
    with through_forward(): return f(*args)


# Layers and losses, against finite differences

def check(module, args):
    "gradcheck for all that requires grad, with the same random numbers each time; and that it was `bwd` which ran"
    ran = []
    class Counted(type(module)):
        def bwd(self, out, *args):
            ran.append(1)
            return super().bwd(out, *args)
    if module.has_bwd: module.__class__ = Counted
    def f(*ts):
        torch.manual_seed(1)
        return tuple(floats(module(*args)))
    assert gradcheck(f, [t for t in (*floats(args), *module.parameters()) if t.requires_grad])
    assert ran or not module.has_bwd or isinstance(module, Wrap) # as nodes, autograd needs no help there

@each
@pytest.mark.parametrize('case', cases, ids=name)
def test_gradcheck(case, nodes):
    "Where all requires grad; all but one of the inputs; all but the parameters."
    n = len(case.inps())
    for off in (None, *range(n), 'params'):
        m = case.make().as_nodes(nodes).requires_grad_(off!='params')
        args = [t.requires_grad_(t.is_floating_point() and i!=off) for i,t in enumerate(case.inps())]
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

@each
def test_nested_arguments_and_outputs(nodes):
    m,a,b,c = Deep().as_nodes(nodes),leaf(3, 4),leaf(3, 4),leaf(3, 4)
    def f(*_):
        out = m({'a': a, 'b': (b,)}, 3, more=c, scale=.5)
        mask,constant = out['list'][1]
        assert out['n']==3 and mask.dtype==torch.bool and not (nodes and constant.requires_grad)
        return out['sum'],out['list'][0]
    assert gradcheck(f, (a, b, c, m.w))

class Mixed(Module):
    "fnnlite, torch.nn, raw operations, views, functional calls and a weight used raw, in any order"
    def __init__(self):
        self.a,self.norm,self.b,self.l = Lin64(4, 6),nn.LayerNorm(6, dtype=torch.float64),Lin64(3, 3),nn.Linear(3, 3).double()
        self.act,self.add,self.relu = Tanh(),Add(),Relu()
    def forward(self, x):
        h = self.norm(self.a(x/2))
        h = self.act(h*2).view(-1, 2, 3)[:, :1].expand(-1, 2, 3)
        h = self.add(self.b(h), F.gelu(h))
        return self.relu(self.l(h.transpose(1, 2).reshape(-1, 3)))@self.b.w

@each
def test_anything_may_stand_between(nodes):
    m,x = Mixed().as_nodes(nodes),leaf(5, 4)
    assert gradcheck(lambda *_: m(x), (x, *m.parameters()))
    assert ours(m(x))==((0,5) if nodes else (1,0))
    assert ours(nn.Sequential(m, nn.Tanh())(x))==ours(m(x)) and ours(through(m, x))==(0,0)

class Both(Module):
    def forward(self, x):
        y = x*2
        return y,[y,x]
    def bwd(self, out, x): x.g = out[0].g*2 + out[1][0].g*2 + out[1][1].g
class Net(Module):
    def __init__(self):
        self.l,self.both,self.id,self.add,self.table,self.mm,self.drop = Lin64(4, 4),Both(),Id(),Add(),Table(),Matmul(),Dropout()
    def forward(self, x):
        h = self.l(self.l(x))
        y,(z,w) = self.both(self.id(h))
        return self.mm(self.add(self.add(y, y), self.add(z, w)), self.drop(self.table()))

@each
def test_shared_layers_and_tensors(nodes):
    "A layer used twice, one tensor as two arguments, returned twice, inputs and parameters handed on as they are."
    m,x = Net().eval().as_nodes(nodes),leaf(3, 4)
    assert gradcheck(lambda *_: m(x), (x, *m.parameters()))
    assert gradcheck(Add().as_nodes(nodes), (x, x)) and gradcheck(Id().as_nodes(nodes), (x,))
    table = m.table.as_nodes(nodes)
    assert gradcheck(lambda *_: table(), (table.w,)) and table() is not table.w
    assert x.g is None

@each
def test_unused_outputs_and_no_outputs(nodes):
    class Split(Module):
        def forward(self, x): return x*2,x.exp(),None
        def bwd(self, out, x): x.g = 2*out[0].g + out[1].g*out[1]
    x = leaf(3)
    Split().as_nodes(nodes)(x)[1].sum().backward()
    close(x.grad, x.exp())
    class Prints(Module):
        def forward(self, x): self.seen = x.sum().item()
        def bwd(self, out): pass
    assert Prints().as_nodes(nodes)(x) is None

class Block(Module):
    "A bwd over the parameters of modules inside, a list of them, and methods and properties of its own; it looks after its subclasses"
    heirs = []
    def __init_subclass__(cls):
        super().__init_subclass__()
        Block.heirs.append(cls)
    def __init__(self): self.ls,self.last = [Lin64(4, 4, bias=False), Lin64(4, 4, bias=False)],nn.Linear(4, 2, bias=False).double()
    @property
    def product(self): return self.ls[0].w@self.ls[1].w
    def forward(self, x): return x@self.product@self.last.weight.t()
    def bwd(self, out, x):
        (a,b),g = self.ls,out.g@self.last.weight
        self.last.weight.g = out.g.t()@x@self.product
        b.w.g,a.w.g,x.g = (x@a.w).t()@g,x.t()@g@b.w.t(),g@self.product.t()
class More(Block):
    def bwd(self, out, x):
        super().bwd(out, x)
        assert isinstance(self, More) and isinstance(self.last, nn.Linear) and len(list(self.parameters()))==3

@each
def test_parameters_of_modules_inside(nodes):
    m,x = More().as_nodes(nodes),leaf(3, 4)
    assert gradcheck(lambda *_: m(x), (x, *m.parameters()))
    assert Block.heirs==[More] # no stand-in for `self`


# What is not asked for

@each
@pytest.mark.parametrize('x,frozen,expected', [(True,'','xwb'), (False,'','wb'), (True,'w','xb'), (True,'wb','x'), (False,'b','w')])
def test_what_is_not_asked_for_is_not_computed(x, frozen, expected, nodes):
    wanted = []
    class Asks(Lin):
        def bwd(self, out, inp):
            super().bwd(out, inp)
            wanted.append(''.join(n for n,t in zip('xwb', (inp,self.w,self.b)) if t.g is not None))
    m,inp = Asks(4, 3, dtype=torch.float64).as_nodes(nodes),leaf(5, 4) if x else const(rand(5, 4))
    for n in frozen: getattr(m, n).requires_grad_(False)
    m(inp).sum().backward()
    assert wanted==[expected]==[''.join(n for n,t in zip('xwb', (inp,m.w,m.b)) if t.grad is not None)]

@each
def test_gradients_of_some(nodes):
    "`grad` and `backward(inputs=...)` leave the others' alone."
    m,(x,y) = net().as_nodes(nodes),batch()
    (a,*others),h = m.parameters(),x.requires_grad_()*2
    want = through(lambda: grad(m(h, y), (a, h)))
    close(grad(m(h, y), (a, h)), want, **tight)
    assert all(t.grad is None for t in (a, *others, x))
    m(h, y).backward(inputs=[a])
    close(a.grad, want[0], **tight)
    assert all(t.grad is None for t in (*others, x))


# A wrong gradient is never silent: what the record refuses, a node a layer does

@each_fault
def test_faulty_bwd_is_refused(f, msg):
    m,l,x = Model([Lin64(4, 4), GivenBwd(right), Lin64(4, 3)], Mse()).as_nodes(),GivenBwd(no_input).as_nodes(),rand(6, 4)
    m(x, rand(6, 3)).backward()
    l(x).sum().backward() # nobody asked
    m.layers[1].f = f
    with pytest.raises(GradError, match='GivenBwd: .*'+(msg.partition("' ")[2] or msg)): m(x, rand(6, 3)).backward()

def test_changes_in_place_are_autograds_error():
    masks = []
    class Keeps(Dropout):
        bwd = Dropout.bwd
        def forward(self, inp):
            out = super().forward(inp)
            masks.append(out.mask)
            return out
    for changed in (lambda m,h,o: m[0].w, lambda m,h,o: h, lambda m,h,o: o, lambda m,h,o: masks[-1]):
        m,h = Sequential(Lin64(4, 4), Keeps(), Tanh()).as_nodes(),leaf(3, 4)*2
        o = m(h)
        changed(m, h, o).detach().mul_(2)
        with pytest.raises(RuntimeError, match='modified by an inplace operation'): (o*1).sum().backward()

def test_parameters_own_their_gradients():
    "`a.g = b.g = out.g.view(-1)`: what clips one in place must not change the other."
    class Rows(Module):
        def __init__(self): self.p,self.q = rand(12),rand(3, 4)
        def forward(self, x): return x+self.p.view(3, 4)+self.q
        def bwd(self, out, x):
            x.g = self.q.g = out.g
            self.p.g = out.g.view(-1)
    m,x = Rows().as_nodes(),leaf(3, 4)
    (m(x)+Rows().as_nodes()(x)).square().sum().backward()
    assert len({t.grad.data_ptr() for t in (m.p,m.q,x)})==3

def test_through_forward():
    "Nested, and after an error."
    l,x = Lin64(4, 3),rand(5, 4)
    with through_forward():
        with pytest.raises(KeyError), through_forward(): raise KeyError
        assert ours(l(x))==(0,0)
    assert ours(l(x))==(1,0)


# Torch's tools

def test_second_derivatives_are_refused():
    l,x = Lin64(4, 3).as_nodes(),leaf(5, 4)
    with pytest.raises(GradError, match='create_graph'): grad(l(x).square().sum(), x, create_graph=True)

@each
def test_hooks_of_tensors(nodes):
    "On what comes in and goes out, on parameters, and on the sum that a parameter accumulates; between layers, where they are nodes."
    m,data,seen = Sequential(Lin64(4, 5), Tanh(), Lin64(5, 3)),leaf(6, 4),[]
    m[2].w.register_hook(lambda g: 5*g)
    m[0].w.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    if nodes: m[1].register_forward_hook(lambda mod,args,out: out.register_hook(lambda g: g.sign()) and None)
    def run():
        seen.clear()
        h = data*2
        h.register_hook(lambda g: g.clamp(-1, 1))
        out = m(h)
        out.register_hook(lambda g: 3*g)
        for t in (h,out): t.retain_grad()
        out.square().sum().backward()
        res = [t.grad for t in (data, h, out, *m.parameters())]+seen
        m.zero_grad()
        data.grad = None
        return res
    want = through(run)
    m.as_nodes(nodes)
    close(run(), want, **tight)
    assert len(want)==8

def test_hooks_of_modules():
    "Where layers are nodes, autograd calls them; on a `forward` that other libraries have patched, too."
    m,(x,y),seen = net().as_nodes(),batch(),[]
    l = m.layers[2]
    def first(): return grad(m(x, y), m.layers[0].w)[0]
    ref = through(first)
    hs = [l.register_forward_pre_hook(lambda mod,args: seen.append(('pre', mod is l))),
        l.register_forward_hook(lambda mod,args,out: seen.append(('forward', out.grad_fn.name()))),
        l.register_full_backward_pre_hook(lambda mod,g: seen.append(('backward pre', g[0].shape))),
        l.register_full_backward_hook(lambda mod,gi,go: seen.append(('backward', gi[0].shape, go[0].shape)) or (gi[0]*3,))]
    close(first(), 3*ref, **tight)
    assert seen==[('pre',True), ('forward','NodeBackward'), ('backward pre',(6,3)), ('backward',(6,5),(6,3))]
    for h in hs: h.remove()
    with l.register_forward_pre_hook(lambda *a: {}['fails']), pytest.raises(KeyError): m(x, y)
    assert 'forward' not in vars(l)
    l.forward = wraps(l.forward)(lambda inp: (seen.append(1),Lin.forward(l, inp))[1])
    l.register_forward_hook(lambda *a: None)
    close([first(), first()], [ref, ref], **tight)
    assert seen[4:]==[1,1]

@each
@pytest.mark.parametrize('reentrant', [False, True])
def test_checkpoint(reentrant, nodes):
    "The same gradients; without re-entry only nodes of layers are computed again, for the node of a whole call keeps its record."
    m,x,ran = Sequential(Lin64(4, 4), Dropout(), Tanh(), Lin64(4, 4)).as_nodes(nodes),leaf(5, 4),[]
    def grads(f):
        torch.manual_seed(3)
        x.grad = m.zero_grad()
        f(x).square().sum().backward()
        return [t.grad for t in (x, *m.parameters())]
    want = through(grads, m)
    m[2].register_forward_hook(lambda *a: ran.append(1))
    close(grads(lambda x: checkpoint(m, x, use_reentrant=reentrant)), want, **tight)
    assert len(ran)==(2 if nodes or reentrant else 1)

def test_checkpoint_of_a_part():
    "Called anew in the backward, it is a node of its own again."
    class Net(Module):
        def __init__(self): self.a,self.b = Lin64(4, 4),Tanh()
        def forward(self, x): return checkpoint(self.b, self.a(x), use_reentrant=False)
    m,x = Net().as_nodes(),leaf(5, 4)
    want = grad(torch.tanh(F.linear(x, m.a.w.t(), m.a.b)).square().sum(), (x, *m.parameters()))
    close(grad(m(x).square().sum(), (x, *m.parameters())), want, **tight)

def test_saved_tensors_hooks_see_all():
    "What is saved goes elsewhere, the dropout's mask too, and comes back; nothing else is read."
    m,x,store = Sequential(Lin64(4, 3), Dropout(), Relu(), Concat()).as_nodes(),leaf(5, 4),[]
    def pack(t): return store.append(t.detach().clone()) or len(store)-1
    def loss():
        torch.manual_seed(3)
        return m(x).square().sum()
    ref = grad(through(loss), (x, *m.parameters()))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda i: store[i].clone()): out = loss()
    for p in m.parameters(): p.data = torch.full_like(p, torch.nan)
    close(grad(out, (x, *m.parameters())), ref)
    assert any(torch.equal((t>0).double(), t*.5) for t in store)

@pytest.mark.parametrize('hooks', [lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
    torch.autograd.graph.save_on_cpu], ids=['identity','on_cpu'])
def test_hooks_that_keep_no_copy(hooks):
    "They give back the parameter's own memory, so other numbers in it are refused."
    m,x = Lin64(4, 3).as_nodes(),leaf(5, 4)
    with hooks(): out = m(x).sum()
    m.w.data = torch.full_like(m.w, 7.)
    with pytest.raises(GradError, match='was given other numbers'): out.backward()

def test_freed_as_usual():
    "What a layer's node keeps goes with the graph: after backward, or when nobody holds the loss; no cycles."
    refs = []
    class Watch(Dropout):
        bwd = Dropout.bwd
        def forward(self, inp):
            out = super().forward(inp)
            refs.extend(map(weakref.ref, (inp, out.mask)))
            return out
    def alive(): return sum(r() is not None for r in refs)
    gc.collect()
    gc.disable()
    try:
        m = Sequential(Lin64(4, 4), Watch(), Tanh(), Watch(), Id(), Both()).as_nodes()
        loss = m(rand(5, 4))[0].sum()
        for retain,n in ((True,4),(False,0)):
            loss.backward(retain_graph=retain)
            assert alive()==n
        loss = m(rand(5, 4))[0].sum()
        del loss
        assert alive()==0 and len(refs)==8
    finally: gc.enable()

def test_functional_call():
    m,(x,y) = net().as_nodes(),batch()
    ws = {n:(p*1.5).detach().requires_grad_() for n,p in m.named_parameters()}
    assert gradcheck(lambda *ts: torch.func.functional_call(m, dict(zip(ws, ts)), (x, y)), list(ws.values()))
    assert all(p.grad is None for p in m.parameters())

@each
@pytest.mark.filterwarnings('ignore:`torch.jit:DeprecationWarning') # torch's own, as it imports what jvp needs
def test_torch_func_and_forward_mode(nodes):
    "They differentiate `forward`, whatever requires grad: vmap, forward mode, second derivatives, per-sample gradients."
    import torch.autograd.forward_ad as fw
    from torch.func import functional_call, grad, hessian, jvp, vmap
    m,x,v = Sequential(Lin64(4, 3), Tanh()).as_nodes(nodes),rand(5, 4),rand(5, 4)
    f,sq = lambda x,w=m[0].w,b=m[0].b: (x@w+b).tanh(),lambda g: lambda *a: g(*a).square().sum()
    with fw.dual_level(): dual = fw.unpack_dual(m(fw.make_dual(x, v))).tangent
    close([*jvp(m, (x,), (v,)), dual], [*jvp(f, (x,), (v,)), jvp(f, (x,), (v,))[1]], **tight)
    close([vmap(m)(x), hessian(sq(m))(x)], [f(x), hessian(sq(f))(x)], **tight)
    ps = [p.detach() for p in m.parameters()]
    ours = vmap(grad(sq(lambda w,b,x: functional_call(m, {'0.w':w, '0.b':b}, (x[None],))), (0,1)), (None,None,0))(*ps, x)
    close(ours, vmap(grad(sq(lambda w,b,x: f(x, w, b)), (0,1)), (None,None,0))(*ps, x), **tight)


# Autocast and loss scaling: by the loss, by hand, and with layers as nodes

each_way = pytest.mark.parametrize('how', ['loss','hand','nodes'])

def twins(how, loss):
    "A net, and the same of torch's layers"
    m = Model([Lin(20, 30), Relu(), Lin(30, 10), LogSoftmax(), Lin(10, 5)], Mse() if loss is F.mse_loss else CrossEntropy())
    t = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10), nn.LogSoftmax(-1), nn.Linear(10, 5))
    ps,ws = list(m.parameters()),list(t.parameters())
    for p,w in zip(ps, ws): w.data = p.detach().t().clone()
    return m.as_nodes(how=='nodes'),ps,lambda x,y: loss(t(x), y),ws

@each_way
@pytest.mark.parametrize('loss', [F.mse_loss, F.cross_entropy], ids=lambda f: f.__name__)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast(loss, how, dtype):
    "Gradients in the parameters' dtype, as far from float32's as those of torch's layers are"
    m,ps,twin,ws = twins(how, loss)
    x,y = torch.randn(64, 20).requires_grad_(how!='hand'),torch.randn(64, 5) if loss is F.mse_loss else torch.randint(0, 5, (64,))
    exact = grad(twin(x, y), ws)
    with torch.autocast('cpu', dtype): out,ref = m(x, y),grad(twin(x, y), ws)
    m.backward() if how=='hand' else out.backward()
    assert (x.g if how=='hand' else x.grad).dtype==torch.float32
    eps = torch.finfo(dtype).eps
    for p,r,e in zip(ps, ref, exact):
        g = p.grad.t()
        assert (g-e).norm()<max(2*(r-e).norm(), eps*e.norm()) and (r-e).norm()>0
        torch.testing.assert_close(g, r, rtol=4*eps, atol=4*eps*e.abs().max().item())
    if how=='hand': assert m.layers[0].out.g.dtype==m.layers[0].out.dtype==dtype

@each_way
def test_backward_runs_under_the_forwards_autocast(how):
    seen = []
    class Spy(Lin):
        def bwd(self, out, inp):
            super().bwd(out, inp)
            seen.append(torch.get_autocast_dtype('cpu') if torch.is_autocast_enabled('cpu') else None)
    m,x = Sequential(Spy(4, 4), Spy(4, 4)).as_nodes(how=='nodes'),torch.randn(3, 4)
    for forwards in (torch.float16,torch.bfloat16,None):
        for backwards in (torch.float16,None):
            with torch.autocast('cpu', forwards, enabled=forwards is not None): out = m(x)
            with torch.autocast('cpu', backwards, enabled=backwards is not None):
                m.backward(torch.ones_like(out)) if how=='hand' else out.sum().backward()
            assert seen[-2:]==[forwards]*2

def test_dtypes_under_autocast():
    l,x = Lin(4, 3),torch.randn(3, 4)
    with torch.autocast('cpu'):
        assert l(x.bfloat16()).dtype==torch.bfloat16
        with pytest.raises(TypeError, match='expected a floating-point'): l(x.long())

@each
def test_autocast_cache(nodes):
    "A weight that a call has cast, without grad, and that is used raw afterwards."
    l,x = Lin(4, 4).as_nodes(nodes),torch.randn(3, 4)
    with torch.autocast('cpu'): (l(x)+x@l.w).sum().backward()
    first,l.w.grad = l.w.grad,None
    with torch.autocast('cpu'): l(x).sum().backward()
    torch.testing.assert_close(first, 2*l.w.grad, rtol=.02, atol=.02)

@each_way
def test_grad_scaler(how):
    "Scaled losses, clipped, some steps skipped: weights go where those of torch's layers go in float32, but for the rounding."
    m,ps,twin,ws = twins(how, F.cross_entropy)
    scaler,skipped,before = torch.amp.GradScaler('cpu', init_scale=2.**24),0,[p.detach().clone() for p in ps]
    opt,ref = torch.optim.SGD(ps, lr=.5),torch.optim.SGD(ws, lr=.5)
    for _ in range(12):
        x,y = torch.randn(64, 20),torch.randint(0, 5, (64,))
        with torch.autocast('cpu', torch.float16): loss = m(x, y)
        opt.zero_grad() # between forward and backward, as many loops do
        m.backward(scaler.scale(torch.ones_like(loss))) if how=='hand' else scaler.scale(loss).backward()
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(ps, .1)
        scale = scaler.get_scale()
        scaler.step(opt)
        scaler.update()
        if scaler.get_scale()<scale:
            skipped += 1
            continue
        for w,g in zip(ws, grad(twin(x, y), ws)): w.grad = g
        assert nn.utils.clip_grad_norm_(ws, .1)>.1
        ref.step()
    assert 0<skipped<12
    for p,w,b in zip(ps, ws, before): assert (p.t()-w).norm()<.02*(p-b).norm()+1e-6
