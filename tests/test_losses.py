"Each loss against torch.nn.functional: values, and the gradients of input and target."
import pytest, torch
import torch.nn.functional as TF
from hypothesis import given, settings, strategies as st
from fnnlite import Module, Lin, Softmax, BCEWithLogits, CrossEntropy, Mse, NLL, Model, const, recording
from fnnlite.ops.losses import check_classes, check_range, one_hot
from cases import loss_cases
from helpers import Lin64, agree, assert_grads, close, rand

random_shapes = settings(deadline=None, max_examples=25, derandomize=True, database=None)
leads = st.lists(st.integers(1, 4), max_size=3).map(tuple)
reductions = st.sampled_from(['mean','sum'])
R = torch.randn

def check(loss, op, inp, targ, **tols):
    "`agree`, also with a constant input or target."
    for consts in ((), (0,), (1,)):
        ts = [const(t) if i in consts else t.detach().clone() for i,t in enumerate((inp,targ))]
        refused = all(not t.is_floating_point() or i in consts for i,t in enumerate(ts)) # where nothing wants a gradient
        agree(loss(*ts), (lambda g: None) if refused else loss.backward, op, ts, **tols)

def by_class(f):
    "torch wants the classes in dimension 1, we have them last."
    def op(inp, targ, **kw):
        last = lambda t: t.movedim(-1, 1).contiguous() if t.ndim>1 else t
        return f(last(inp), targ if targ.ndim<inp.ndim else last(targ), **kw)
    return op


# Over random shapes

@random_shapes
@given(leads, reductions)
def test_mse(shape, red): check(Mse(red), lambda i,t: TF.mse_loss(i, t, reduction=red), rand(*shape), rand(*shape))

@random_shapes
@given(leads, reductions)
def test_mse_of_a_column(shape, red): # (n,1) against (n,)
    check(Mse(red), lambda i,t: TF.mse_loss(i.squeeze(-1), t, reduction=red), rand(*shape, 1), rand(*shape))

@random_shapes
@given(leads, st.integers(1, 5), reductions)
def test_nll(lead, c, red):
    check(NLL(red), lambda i,t: by_class(TF.nll_loss)(i, t, reduction=red), rand(*lead, c), torch.randint(0, c, lead))

@random_shapes
@given(leads, st.integers(1, 5), reductions, st.sampled_from([0.,.1,.7,1.]))
def test_cross_entropy_indices(lead, c, red, smoothing):
    op = lambda i,t: by_class(TF.cross_entropy)(i, t, reduction=red, label_smoothing=smoothing)
    check(CrossEntropy(red, smoothing), op, rand(*lead, c), torch.randint(0, c, lead))

@random_shapes
@given(leads, st.integers(1, 5), reductions, st.sampled_from([0.,.1,.7,1.]), st.booleans())
def test_cross_entropy_probabilities(lead, c, red, smoothing, normal):
    "Also where they don't add up to 1, as with mixed labels of several classes."
    op = lambda i,t: by_class(TF.cross_entropy)(i, t, reduction=red, label_smoothing=smoothing)
    targ = rand(*lead, c).softmax(-1) if normal else rand(*lead, c).abs()
    check(CrossEntropy(red, smoothing), op, rand(*lead, c), targ)

@random_shapes
@given(leads, reductions, st.booleans())
def test_bce(shape, red, hard):
    targ = torch.randint(0, 2, shape).double() if hard else torch.rand(shape, dtype=torch.float64)
    check(BCEWithLogits(red), lambda i,t: TF.binary_cross_entropy_with_logits(i, t, reduction=red), rand(*shape), targ)


# Extreme values

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('red', ['mean','sum'])
def test_extreme_values(red, dtype):
    x = torch.tensor([[1e3,0,-1e3],[-1e3,-1e3,1e3],[0,0,0],[1e4,88,-104]], dtype=dtype)
    idx,probs = torch.tensor([2,0,1,2]),R(4, 3).to(dtype).softmax(-1)
    tols = dict(rtol=1e-5, atol=1e-6)
    bce = lambda i,t: TF.binary_cross_entropy_with_logits(i, t, reduction=red)
    for t in (probs,(probs>.3).to(dtype)):
        check(BCEWithLogits(red), bce, x, t, **tols)
    for s in (0.,.1):
        op = lambda i,t: TF.cross_entropy(i, t, reduction=red, label_smoothing=s)
        check(CrossEntropy(red, s), op, x, idx, **tols)
        check(CrossEntropy(red, s), op, x, probs, **tols)
    loss = CrossEntropy(red)
    assert loss(x, idx).isfinite()
    loss.backward()
    assert x.g.isfinite().all()


# In a net

def test_target_made_by_a_module():
    "The gradient goes on into whatever made the target, as in distillation."
    class Distil(Module):
        def __init__(self, loss): self.a,self.b,self.soft,self.loss = Lin(4, 3, dtype=torch.float64),Lin(4, 3, dtype=torch.float64),Softmax(),loss
        def forward(self, x): return self.loss(self.a(x), self.soft(self.b(x)))
    for loss in (CrossEntropy(smoothing=.1),CrossEntropy(),BCEWithLogits('sum'),Mse()):
        for kept in (True,False): assert_grads(Distil(loss).retain(kept), rand(5, 4))

@pytest.mark.parametrize('loss', [Mse(), BCEWithLogits(), CrossEntropy()], ids=repr)
def test_one_tensor_as_input_and_target(loss):
    class Self(Module):
        def __init__(self): self.soft,self.loss = Softmax(),loss
        def forward(self, x): return self.loss(p := self.soft(x), p)
    assert_grads(Self(), rand(4, 3))

def test_one_hot():
    targ = torch.randint(0, 4, (2,3))
    close(one_hot(targ, rand(2, 3, 4)), TF.one_hot(targ, 4).double())

def test_const_input_of_a_model():
    for case in loss_cases:
        inp,y = case.inps()
        m,x = Model([Lin64(inp.shape[-1], inp.shape[-1])], loss := case.make()),const(inp)
        m(x, y if y.dtype==torch.int64 else const(y))
        m.backward()
        assert x.g is None and loss.args[1].g is None and m.layers[0].w.g is not None
        assert y.g is None


# Errors

def T(*a): return torch.tensor(a)

shape_cases = [
    (lambda: Mse()(R(3), R(3, 1)), ValueError, r"Mse\(mean\): targ has shape \(3, 1\), expected \(3,\)"), # would broadcast to (3,3)
    (lambda: Mse()(R(3, 1), R(4)), ValueError, r"Mse\(mean\): targ has shape \(4,\), expected \(3, 1\)"),
    (lambda: Mse()(R(3, 2), R(3)), ValueError, r"targ has shape \(3,\), expected \(3, 2\)"),
    (lambda: Mse()(R(3, 3), R(3)), ValueError, r"targ has shape \(3,\), expected \(3, 3\)"),
    (lambda: Mse()(R(3, 1), R(1, 3)), ValueError, r"targ has shape \(1, 3\), expected \(3, 1\)"),
    (lambda: Mse()(R(3, 1, 1), R(3)), ValueError, r"targ has shape \(3,\), expected \(3, 1, 1\)"),
    (lambda: Mse('sum')(R(0, 3), R(0, 3)), ValueError, r"Mse\(sum\): inp is empty, of shape \(0, 3\)"),
    (lambda: Mse()(R(3), T(1,2,3)), TypeError, r"Mse\(mean\): targ has dtype torch.int64, expected a floating-point one"),
    (lambda: Mse()(R(3), R(3).double()), TypeError, r"targ has dtype torch.float64, expected torch.float32"),
    (lambda: Mse()(R(3), R(3, device='meta')), ValueError, r"targ is on device meta, expected cpu"),
    (lambda: BCEWithLogits()(R(3, 1), R(3)), ValueError, r"BCEWithLogits\(mean\): targ has shape \(3,\), expected \(3, 1\)"),
    (lambda: BCEWithLogits()(R(3), T(1,0,1)), TypeError, r"BCEWithLogits\(mean\): targ has dtype torch.int64, expected a floating-point one"),
    (lambda: CrossEntropy()(R(2, 3), R(2, 4)), ValueError, r"CrossEntropy\(mean\): targ has shape \(2, 4\), expected \(2, 3\)"),
    (lambda: CrossEntropy()(R(2, 3), R(2, 3).double()), TypeError, r"targ has dtype torch.float64, expected torch.float32"),
    (lambda: CrossEntropy(smoothing=1.1), ValueError, r"CrossEntropy: smoothing is 1.1, expected 0 to 1"),
    *[(lambda c=c: c('none'), ValueError,
        rf"{c.__name__}: reduction is 'none', expected 'mean' or 'sum'") for c in (Mse,NLL,CrossEntropy,BCEWithLogits)]]

@pytest.mark.parametrize('f,exc,msg', shape_cases)
def test_errors(f, exc, msg):
    with pytest.raises(exc, match=msg): f()

@pytest.mark.parametrize('cls', [CrossEntropy, NLL])
@pytest.mark.parametrize('inp,targ,exc,msg', [
    ((2,3), T(0,3), ValueError, r"targ has class indices from 0 to 3, expected 0 to 2"),
    ((2,3), T(-1,1), ValueError, r"targ has class indices from -1 to 1, expected 0 to 2"),
    ((2,3), T(-100,1), ValueError, r"targ has class indices from -100 to 1, expected 0 to 2"), # torch's ignore_index isn't ours
    ((2,3), T(0.,1.), TypeError, r"targ has dtype torch.float32, expected class indices of torch.int64"),
    ((2,3), T(0,1).int(), TypeError, r"targ has dtype torch.int32, expected class indices"),
    ((2,3), T(True,False), TypeError, r"targ has dtype torch.bool, expected class indices"),
    ((2,3), T(0,1,1), ValueError, r"targ has shape \(3,\), expected \(2,\) for inp \(2, 3\)"),
    ((2,3), T(0,1)[:,None], ValueError, r"targ has shape \(2, 1\), expected \(2,\)"),
    ((2,4,3), T(0,1), ValueError, r"targ has shape \(2,\), expected \(2, 4\)"),
    ((0,3), T().long(), ValueError, r"inp is empty, of shape \(0, 3\)"),
    ((2,3), T(0,1).to('meta'), ValueError, r"targ is on device meta, expected cpu")])
def test_errors_of_class_indices(cls, inp, targ, exc, msg):
    with pytest.raises(exc, match=cls.__name__ + r"\(mean\): " + msg): cls()(R(inp), targ)
    with pytest.raises(exc, match=r"CrossEntropy\(mean\): " + msg): CrossEntropy(smoothing=.1)(R(inp), targ)
    with pytest.raises(exc, match="Who: " + msg):
        check_classes('Who', R(inp), targ)
        check_range('Who', targ, inp[-1])

@pytest.mark.parametrize('reduction', ['none','sum','mean'])
def test_soft_margin_loss(reduction):
    "torch has no gradient of its target, so both are compared with those of log(1+exp(-targ*inp)), written out."
    inp,targ = rand(3, 4),rand(3, 4)
    refs = [t.clone().requires_grad_() for t in (inp, targ)]
    want = TF.softplus(-refs[1]*refs[0])
    if reduction!='none': want = getattr(want, reduction)()
    g = torch.randn_like(want)
    with recording() as rec: out = TF.soft_margin_loss(inp, targ, reduction=reduction)
    rec.backward(out, g)
    close([out, inp.g, targ.g], [want.detach(), *torch.autograd.grad(want, refs, g)])
