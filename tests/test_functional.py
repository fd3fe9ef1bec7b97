"Each operation against torch's own, forward and backward, as a function and as a layer."
import math
from inspect import isclass
import pytest, torch
import torch.nn.functional as TF
from hypothesis import given, settings, strategies as st
from fnnlite import functional as F, ops
from fnnlite.functional import lin, lin_grad
from fnnlite import Add, Concat, Dropout, Flatten, Lin, Log, LogSoftmax, Matmul, Mul, Relu, Reshape, Sigmoid, Softmax, Tanh, Module, Sequential, Wrap
from fnnlite import Embedding, GradError, const
from fnnlite.core.record import floats
from fnnlite.ops import losses, routes, wraps
from fnnlite.core.rules import unbroadcast
from cases import cases, kind, name, one_each
from helpers import agree, assert_grads, close, public, rand, rooms

shapes = st.lists(st.integers(1, 4), min_size=0, max_size=3).map(tuple)
random_shapes = settings(deadline=None, max_examples=25, derandomize=True, database=None)


def leaf(t): return t.detach().clone()

def check(op, layer, name, *inps, **kw):
    "`functional`'s `name` and `name_grad`, then `layer`; with each tensor a constant in turn, too."
    ps,f,f_grad = list(layer.parameters()),getattr(F, name),getattr(F, f'{name}_grad')
    def as_function(*ts):
        out = f(*ts, **kw)
        def back(g):
            out.g = g
            f_grad(out, *ts, **kw)
        agree(out, back, op, ts)
    n = len(inps)+len(ps)
    for c in range(n+1): as_function(*[const(t) if i==c else leaf(t) for i,t in enumerate([*inps,*ps])])
    for c in range(len(inps)+1):
        xs = [const(t) if i==c else leaf(t) for i,t in enumerate(inps)]
        if n==1 and c==0: continue # backward() is refused where nothing wants a gradient
        layer.zero_grad()
        agree(layer(*xs), layer.backward, op, [*xs,*ps])
    layer.zero_grad()


# Over random shapes

@random_shapes
@given(shapes, st.integers(1, 4), st.integers(1, 4), st.booleans(), st.booleans())
def test_lin(lead, ni, nf, bias, made):
    if made: l = Lin(ni, nf, bias=bias, dtype=torch.float64)
    else: l = Lin(rand(ni, nf), rand(nf)) if bias else Lin(rand(ni, nf))
    assert (l.b is not None)==bias and l.w.shape==(ni,nf)
    check(lambda x,w,b=None: TF.linear(x, w.t(), b), l, 'lin', rand(*lead, ni))

@random_shapes
@given(shapes, st.sampled_from([0.,.1,1.,-.5]), st.sampled_from([0.,.5,-.25]), st.sampled_from([None,1.,.5,-.25]))
def test_relu(shape, leak, sub, maxv):
    "On a grid of eighths, so that elements lie exactly at 0 and at the cap."
    def op(x):
        out = TF.leaky_relu(x, leak)-sub if leak else TF.relu(x)-sub
        return out if maxv is None else out.clamp_max(maxv)
    x = torch.randint(-16, 17, (5,*shape)).double()/8
    x[0],x[1],x[2] = 0,(maxv or 0)+sub,-0.
    check(op, Relu(leak, sub, maxv), 'relu', x, leak=leak, sub=sub, maxv=maxv)

@random_shapes
@given(shapes, shapes, st.data())
def test_matmul(lead, extra, data):
    n,k,m = [data.draw(st.integers(1, 3)) for _ in range(3)]
    stretch = lambda shape: tuple(1 if data.draw(st.booleans()) else s for s in shape)
    a,b = stretch(lead),stretch(lead)[data.draw(st.integers(0, len(lead))):]
    if data.draw(st.booleans()): a,b = b,a
    check(torch.matmul, Matmul(), 'matmul', rand(*a, n, k), rand(*b, k, m))

@random_shapes
@given(shapes, st.data(), st.sampled_from(['add','mul']))
def test_add_and_mul(shape, data, name):
    stretch = lambda: tuple(1 if data.draw(st.booleans()) else s for s in shape)[data.draw(st.integers(0, len(shape))):]
    check(getattr(torch, name), Add() if name=='add' else Mul(), name, rand(*stretch()), rand(*stretch()))

@random_shapes
@given(shapes.filter(len), st.data(), st.sampled_from(['softmax','log_softmax']))
def test_softmaxes(shape, data, name):
    dim = data.draw(st.integers(-len(shape), len(shape)-1))
    layer = Softmax if name=='softmax' else LogSoftmax
    check(lambda x: getattr(torch, name)(x, dim), layer(dim), name, rand(*shape), dim=dim)
    if dim==-1: check(lambda x: getattr(torch, name)(x, -1), layer(), name, rand(*shape))

@random_shapes
@given(shapes)
def test_elementwise(shape):
    check(torch.sigmoid, Sigmoid(), 'sigmoid', rand(*shape))
    check(torch.tanh, Tanh(), 'tanh', rand(*shape))
    check(lambda x: torch.log(x+1e-8), Log(), 'log', rand(*shape).exp())
    check(lambda x: torch.log(x+.5), Log(.5), 'log', rand(*shape).abs(), eps=.5)

@random_shapes
@given(shapes.filter(len), st.data(), st.integers(1, 4))
def test_concat(shape, data, n):
    dim = data.draw(st.integers(-len(shape), len(shape)-1))
    inps = [rand(*(data.draw(st.integers(1, 3)) if i==dim%len(shape) else s for i,s in enumerate(shape))) for _ in range(n)]
    check(lambda *xs: torch.cat(xs, dim), Concat(dim), 'concat', *inps, dim=dim)

@random_shapes
@given(shapes, st.data())
def test_reshape_and_flatten(shape, data):
    new = data.draw(st.permutations(shape))
    if new and data.draw(st.booleans()): new[data.draw(st.integers(0, len(new)-1))] = -1
    check(lambda x: x.reshape(tuple(new)), Reshape(*new), 'reshape', rand(*shape), shape=tuple(new))
    start = data.draw(st.integers(0, max(0, len(shape)-1)))
    x = rand(*shape)
    agree((l := Flatten(start))(x), l.backward, lambda x: torch.flatten(x, start), [x])
    x = rand(3, *shape)
    agree((l := Flatten())(x), l.backward, lambda x: torch.flatten(x, 1) if x.ndim>1 else x, [x]) if shape else None
    x = rand(*shape, 2, 3).mT # not contiguous
    agree((l := Flatten(-2))(x), l.backward, lambda x: torch.flatten(x, -2), [x])


# Dropout

@random_shapes
@given(shapes, st.sampled_from([0.,.1,.5,.9,1.]), st.integers(0, 99))
def test_dropout(shape, p, seed):
    "What it does to ones, and to the upstream gradient, it does to every number; p=0 keeps and p=1 drops all."
    l,x = Dropout(p),rand(*shape)
    torch.manual_seed(seed)
    out = l(x)
    torch.manual_seed(seed)
    ones = F.dropout(torch.ones_like(x), p)
    scale = 0. if p==1 else 1/(1-p)
    assert ((ones==0)|((ones-scale).abs()<1e-12)).all()
    if p in (0.,1.): assert (ones==scale).all()
    agree(out, l.backward, lambda x: x*ones, [x])
    out = F.dropout(x, p)
    out.g,mask = rand(*shape),out.mask
    F.dropout_grad(out, x)
    close(x.g, out.g*mask)

def test_dropout_is_torchs():
    "Same seed, same mask; and the share that is dropped."
    for p in (.1,.5,.9):
        torch.manual_seed(1)
        a = Dropout(p)(torch.ones(100_000))
        torch.manual_seed(1)
        close(a, TF.dropout(torch.ones(100_000), p, True))
        assert abs((a==0).float().mean()-p) < 5*math.sqrt(p*(1-p)/1e5)

def test_dropout_twice_before_backward():
    "Two calls have two masks, and each call's backward uses its own."
    l,x = Dropout(.5),rand(50)
    assert_grads(Sequential(l, l), x)
    a,b = F.dropout(x),F.dropout(x)
    a.g = b.g = torch.ones_like(x)
    for out in (b,a):
        F.dropout_grad(out, x)
        close(x.g*x, out)

def test_dropout_eval():
    l,x = Dropout(.5).eval(),rand(4, 5)
    agree(l(x), l.backward, lambda x: x*1, [x])
    assert_grads(Sequential(l, Lin(5, 3, dtype=torch.float64), l), x)
    close(Sequential(Dropout(1.)).eval()(x), x)


# Functions alone

def test_functions_without_modules():
    "A hand-written two-layer net, `.g` by `.g`, as in the lesson's first half."
    x,w1,b1,w2 = ts = [rand(6, 4),rand(4, 5),rand(5),rand(5, 3)]
    l1 = lin(x, w1, b1)
    l2 = F.relu(l1, sub=.5)
    out = lin(l2, w2)
    def back(g):
        out.g = g
        lin_grad(out, l2, w2)
        F.relu_grad(l2, l1, sub=.5)
        lin_grad(l1, x, w1, b1)
    agree(out, back, lambda x,w1,b1,w2: ((x@w1+b1).relu()-.5)@w2, ts)

@pytest.mark.parametrize('shape,to', [((2,3),()),((2,3),(3,)),((2,3),(2,1)),((4,2,3),(1,3)),((2,3),(2,3)),((2,1,3),(2,1,1))])
def test_unbroadcast(shape, to):
    t,g = rand(*to).requires_grad_(),rand(*shape)
    close(unbroadcast(g, torch.Size(to)), torch.autograd.grad(t.expand(shape), t, g)[0])

measured = [ # instructions, family of AMD processors, (n,k,m), left side by columns?, is oneDNN the fastest?
    ('AVX512',25,(512,784,512),False,True), ('AVX512',25,(784,512,512),True,False), ('AVX512',26,(784,512,512),True,True),
    ('AVX512',0,(512,784,512),False,False), ('AVX512',25,(512,784,50),False,False), ('AVX512',25,(512,784,10),False,True),
    ('AVX512',25,(784,512,10),True,True), ('AVX512',25,(64,784,10),False,False), ('AVX512',0,(784,512,10),True,False),
    ('AVX2',25,(2**15,300,100),False,True), ('AVX2',25,(784,2**14,100),True,False), ('AVX2',25,(512,784,512),False,False), ('AVX2',25,(784,512,10),True,True)]
@pytest.mark.parametrize('capability,family,size,by_columns,onednn', measured)
def test_product(monkeypatch, capability, family, size, by_columns, onednn):
    "Whichever processor this is: the route that was the fastest on that one, and as exact as `@`."
    if not torch.backends.mkldnn.is_available(): pytest.skip('this torch has no oneDNN')
    monkeypatch.setattr(routes, '_amd', family)
    monkeypatch.setattr(routes, '_avx512', capability=='AVX512')
    n,k,m = size
    assert routes.onednn_is_faster(n, k, m, by_columns)==onednn
    calls,call = [],routes._onednn
    monkeypatch.setattr(routes, '_onednn', lambda *ts: calls.append(1) or call(*ts))
    a,b,c = torch.randn(k, n).t() if by_columns else torch.randn(n, k),torch.randn(k, m),torch.randn(m)
    for bias,b in ((None,b), (c,b), (c,b.t().contiguous().t())):
        exact = a.double()@b.double()+(0 if bias is None else bias)
        plain = (a@b+(0 if bias is None else bias)-exact).abs().max()
        res = routes.product(a, b, bias)
        assert res.is_contiguous()
        torch.testing.assert_close(res.double(), exact, rtol=0, atol=8*plain.item())
    assert len(calls)==3*onednn
    assert routes.product(a[:4].reshape(2, 2, k), b, c).shape==(2, 2, m)

@pytest.mark.filterwarnings('ignore:`torch.jit:DeprecationWarning') # torch's own
def test_product_differentiated(monkeypatch):
    "oneDNN's operation would drop a tangent, or what requires grad, so `@` has such products."
    if not torch.backends.mkldnn.is_available(): pytest.skip('this torch has no oneDNN')
    monkeypatch.setattr(routes, '_amd', 25)
    a,b,c,ta,tb,tc = [torch.randn(s) for s in ((256, 512), (512, 10), (10,))*2]
    assert routes.onednn_is_faster(256, 512, 10)
    close(torch.func.jvp(routes.product, (a, b, c), (ta, tb, tc))[1], ta@b+a@tb+tc, rtol=1e-4, atol=1e-3)
    g = torch.randn(256, 10)
    for i,(exact,back) in enumerate(((ta@b,g@b.t()), (a@tb,a.t()@g), (tc.expand(256, 10),g.sum(0)))):
        others = [t for j,t in enumerate((a, b, c)) if j!=i]
        f = lambda t: routes.product(*others[:i], t, *others[i:])
        close(torch.func.jvp(f, ((a, b, c)[i],), ((ta, tb, tc)[i],))[1], exact, rtol=1e-4, atol=1e-3)
        t = (a, b, c)[i].clone().requires_grad_()
        close(torch.autograd.grad(f(t), t, g)[0], back, rtol=1e-4, atol=1e-3)
    batch,gs = torch.randn(2, 256, 512),torch.randn(2, 256, 10)
    in_vmap = lambda batch: torch.func.vmap(lambda a: routes.product(a, b, c))(batch) # a tensor in there doesn't say that it requires grad
    close(torch.func.grad(lambda batch: (in_vmap(batch)*gs).sum())(batch), gs@b.t(), rtol=1e-4, atol=1e-3)
    close(torch.func.jvp(in_vmap, (batch,), (batch,))[1], batch@b, rtol=1e-4, atol=1e-3)

@pytest.mark.parametrize('size', [10,600])
def test_product_with_a_bias_laid_out_otherwise(monkeypatch, size):
    "oneDNN reads a bias as if its numbers lay side by side."
    if not torch.backends.mkldnn.is_available(): pytest.skip('this torch has no oneDNN')
    monkeypatch.setattr(routes, '_amd', 26)
    monkeypatch.setattr(routes, '_avx512', True)
    a,b = torch.randn(512, 512),torch.randn(512, size)
    for bias in (torch.ones(1).expand(size), torch.randn(2*size)[::2]): close(routes.product(a, b, bias), a@b+bias, rtol=1e-4, atol=1e-3)

@pytest.mark.parametrize('shape,bias', [((512,10),(1,10)), ((512,10),(1,)), ((512,10),(7,)), ((500,10),(10,)), ((500,10),None)])
@pytest.mark.parametrize('by_columns', [False,True])
def test_product_of_shapes_that_do_not_fit(monkeypatch, shape, bias, by_columns):
    "A large product says what a small one says: torch's own result or error."
    monkeypatch.setattr(routes, '_amd', 25)
    a,b,c = torch.randn(512, 256).t() if by_columns else torch.randn(256, 512),torch.randn(shape),None if bias is None else torch.randn(bias)
    plain = lambda: a@b if c is None else torch.addmm(c, a, b)
    try: exact = plain()
    except RuntimeError as e:
        with pytest.raises(RuntimeError) as ours: routes.product(a, b, c)
        assert str(ours.value)==str(e)
    else: close(routes.product(a, b, c), exact, rtol=1e-4, atol=1e-3)

@pytest.mark.parametrize('info,family', [('processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\n',25),
    ('processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 143\n',0), ('processor\t: 0\nBogoMIPS\t: 50.00\n',0)])
def test_amd_family(tmp_path, info, family):
    "As Linux describes the processor."
    if not torch.backends.mkldnn.is_available(): pytest.skip('this torch has no oneDNN')
    (tmp_path/'cpuinfo').write_text(info)
    assert routes.amd_family(tmp_path/'cpuinfo')==family
    assert routes.amd_family(tmp_path/'none')==0

def test_every_function_has_its_gradient():
    "`functional` gathers the pairs: of every layer, and each complete."
    names = {n for n in vars(F) if not n.startswith('_')}
    assert {n for n in names if not n.endswith('_grad')}=={n[:-5] for n in names if n.endswith('_grad')}
    layers = {c.__name__.lower() for room in rooms(ops) if room not in (losses, wraps) for c in map(room.__dict__.get, room.__all__)
              if isclass(c) and issubclass(c, Module)}
    whole = {'flatten','attention','batchnorm','embedding','layernorm','lstm'} # whose function is torch's
    assert layers-whole=={n.replace('_', '') for n in names if not n.endswith('_grad')}


# Extreme values

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('layer,op', [(Softmax, lambda x: x.softmax(-1)), (LogSoftmax, lambda x: x.log_softmax(-1)),
    (Sigmoid, torch.sigmoid), (Tanh, torch.tanh), (Relu, torch.relu), (Log, lambda x: (x+1e-8).log())], ids=lambda f: getattr(f, '__name__', ''))
def test_extreme_values(layer, op, dtype):
    x = torch.tensor([[1e3,0,-1e3],[1e3,1e3,1e3],[-1e3,-1e3,0],[88.,-104,1e4]], dtype=dtype)
    if layer is Log: x = torch.tensor([0.,1e-30,1e30], dtype=dtype)
    g,ref = torch.randn_like(x),leaf(x).requires_grad_()
    want = op(ref)
    l = layer()
    close(l(x), want.detach())
    l.backward(g)
    close(x.g, torch.autograd.grad(want, ref, g)[0], rtol=1e-5, atol=1e-7)
    assert x.g.isfinite().all()


# Constants

def test_every_class_has_a_case(): assert {kind(c) for c in cases}==public(ops, Module)-{losses.Loss}

@pytest.mark.parametrize('case', cases, ids=name)
def test_const_inputs_get_no_g(case):
    "Each input a constant in turn: no .g there, the others' as before; all constant: none in its output either."
    m,inps = case.make(),case.inps()
    which = [i for i,t in enumerate(inps) if t.is_floating_point()]
    for i in which:
        ts = [const(t) if j==i else leaf(t) for j,t in enumerate(inps)]
        out = m(*ts)
        if len(which)==1 and not list(m.parameters()):
            assert not out.requires_grad
            with pytest.raises(GradError, match='nothing in its last call wants'): m.backward(torch.ones_like(out))
        else: m.backward([torch.ones_like(o) for o in floats(out)])
        assert ts[i].g is None and all(ts[j].g.shape==ts[j].shape for j in which if j!=i)
        assert all(p.g is not None for p in m.parameters())


# Errors name the module, the argument, what came and what was expected

R = torch.randn
@pytest.mark.parametrize('f,exc,msg', [
    (lambda: Lin(4, 3)(R(2, 5)), ValueError, r"Lin\(4, 3, bias=True\): inp has shape \(2, 5\), expected \(\.\.\.,4\)"),
    (lambda: Lin(4, 3)(torch.tensor(1.)), ValueError, r"Lin.*: inp has shape \(\), expected \(\.\.\.,4\)"),
    (lambda: Lin(4, 3)(torch.ones(2, 4, dtype=torch.int64)), TypeError, r"Lin.*: inp has dtype torch.int64, expected a floating-point one"),
    (lambda: Lin(4, 3)(torch.ones(2, 4, dtype=torch.uint8)), TypeError, r"Lin.*: inp has dtype torch.uint8, expected a floating"),
    (lambda: Lin(4, 3)([1.,2.,3.,4.]), TypeError, r"Lin.*: inp is of type list, expected a tensor"),
    (lambda: Lin(4, 3)(R(2, 4).double()), TypeError, r"Lin.*: inp has dtype torch.float64, expected torch.float32"),
    (lambda: Lin(4, 3, device='meta')(R(2, 4)), ValueError, r"Lin.*: inp is on device cpu, expected meta"),
    (lambda: Lin(4, 3)(R(2, 4, device='meta')), ValueError, r"Lin.*: inp is on device meta, expected cpu"),
    (lambda: Lin(4, 3)(R(0, 4)), ValueError, r"Lin.*: inp is empty, of shape \(0, 4\)"),
    (lambda: Lin(R(3, 4), R(3)), ValueError, r"Lin: w has shape \(3, 4\) and b \(3,\), expected \(ni,nf\) and \(nf,\)"),
    (lambda: Lin(R(3)), ValueError, r"Lin: w has shape \(3,\) and b None, expected"),
    (lambda: Lin(0, 3), ValueError, r"weight of \(0,3\): ni and nf must be at least 1"),
    (lambda: Matmul()(R(2, 4), R(2, 4)), ValueError, r"Matmul\(\): a has shape \(2, 4\) and b \(2, 4\), expected \(...,n,k\) and \(...,k,m\)"),
    (lambda: Matmul()(R(2, 4), R(4)), ValueError, r"Matmul\(\): a has shape \(2, 4\) and b \(4,\), expected"),
    (lambda: Dropout(1.5), ValueError, r"Dropout: p is 1.5, expected a probability"),
    (lambda: Dropout(-.1), ValueError, r"Dropout: p is -0.1, expected a probability")])
def test_errors(f, exc, msg):
    with pytest.raises(exc, match=msg): f()

def test_meta_device():
    "Shapes without numbers, all the way through."
    with torch.device('meta'):
        net = Sequential(Flatten(), Lin(6, 4), Relu(), Dropout(), Softmax(), Reshape(-1, 2, 2))
        x = torch.randn(5, 2, 3)
        out = net(x)
    assert out.device.type=='meta' and out.shape==(5,2,2)
    net.backward(torch.empty(5, 2, 2, device='meta'))
    assert x.g.shape==x.shape and net[1].w.g.shape==(6,4)

def test_infinite_gradient_stops_where_relu_is_flat():
    x = torch.tensor([-1.,0.,1.])
    out = F.relu(x)
    out.g = torch.full((3,), torch.inf)
    F.relu_grad(out, x)
    y = x.clone().requires_grad_()
    assert torch.equal(x.g, torch.autograd.grad(y.relu(), y, out.g)[0])

@pytest.mark.parametrize('case', [c for c in one_each if kind(c) not in (Wrap,Embedding)], ids=name)
def test_complex_and_integers_are_refused(case):
    for dtype in (torch.complex64, torch.int64):
        with pytest.raises(TypeError, match=f'has dtype {dtype}, expected a floating-point one'): case.make()(*[t.to(dtype) for t in case.inps()])

@pytest.mark.parametrize('case', [c for c in cases if len(c.inps())>1 and all(t.is_floating_point() for t in c.inps())], ids=name)
def test_inputs_that_dont_go_together(case):
    a,*others = case.inps()
    with pytest.raises(TypeError, match='has dtype torch.float32, expected torch.float64'): case.make()(a, *[t.float() for t in others])
    with pytest.raises(ValueError, match='is on device meta, expected cpu'): case.make()(a, *[t.to('meta') for t in others])

@pytest.mark.parametrize('equation,a,b', [('...i,...j->ij', (2,5,4), (2,5,3)), ('...i,...j->ij', (4,), (3,)), ('...j,ij->...i', (2,5,3), (4,3)),
    ('...o,oi->...i', (5,4), (4,3)),
    ('...i,...i->i', (5,4), (5,4)), ('...,...i->i', (5,), (5,3)), ('ij,jk->ik', (2,3), (3,4)), ('...i,...i->...', (2,3), (2,3))])
def test_einsum_by_products(equation, a, b):
    a,b = (torch.randn(s, dtype=torch.float64) for s in (a,b))
    torch.testing.assert_close(routes.einsum(equation, a, b), torch.einsum(equation, a, b))
