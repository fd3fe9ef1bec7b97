"What checks gradients is checked: it lets right ones pass and catches wrong ones, by name."
import copy
import numpy as np, pytest, torch
from fnnlite import functional as F
from fnnlite import Module, Concat, Dropout, Lin, Mul, Relu
from fnnlite import Softmax, Tanh, CrossEntropy, Mse, Model, Sequential, GradError, const, check_grads, test_near
from cases import cases
from helpers import rand

R = torch.randn


# test_near

@pytest.mark.parametrize('a,b', [(torch.ones(2, 3), torch.ones(2, 3)+1e-6), (torch.tensor(2.), 2), (torch.tensor(2., dtype=torch.float64), 2.),
    (3, 3), (1.5, 1.5),
    (torch.tensor(3), 3), (np.ones((2,3)), np.ones((2,3))), (np.ones(3, dtype=np.float32), torch.ones(3)), (torch.ones(3), np.ones(3, dtype=np.float32)),
    (np.float64(2), 2.), ([1.,2.], [1.,2.]), (torch.ones(0), torch.ones(0)), (torch.tensor([True]), torch.tensor([True]))])
def test_near_is_near(a, b): test_near(a, b)

@pytest.mark.parametrize('a,b,msg', [
    (torch.ones(2), torch.ones(1, 2), r"'shape' do not match: torch.Size\(\[2\]\) != torch.Size\(\[1, 2\]\)"),
    (torch.ones(2), torch.ones(1), "'shape'"), (torch.ones(1), 1, "'shape'"),
    (torch.ones(2), torch.ones(2).double(), "'dtype' do not match: torch.float32 != torch.float64"),
    (np.ones(2), torch.ones(2), "'dtype'"), (torch.ones(2), [1,1], "'dtype'"),
    (torch.tensor([[1.,1,1],[1,5,1.2]]), torch.ones(2, 3), r"2 / 6[\s\S]*absolute difference: 4.0 at index \(1, 1\)"),
    (torch.tensor(1.), 1.1, "Expected 1.1"), (torch.tensor(float('nan')), float('nan'), 'nan'), (torch.tensor(1.), float('inf'), 'inf')])
def test_near_is_far(a, b, msg):
    with pytest.raises(AssertionError, match=msg): test_near(a, b)

def test_near_tolerances():
    a = torch.tensor([1.,100.])
    test_near(a, a+torch.tensor([.0009,.09]))
    for far in (a*1.002, a+torch.tensor([.0011,0])):
        with pytest.raises(AssertionError): test_near(a, far)
    with pytest.raises(AssertionError): test_near(a, a*1.0009, rtol=1e-4)
    test_near(a, a+5, atol=6)
    test_near(torch.zeros(2), torch.full((2,), 9e-6))


# A layer with a gradient that is wrong in one way

class W(Module):
    "`inp @ w`, whose backward is given"
    def __init__(self, bwd, n=4, m=4): self.w,self.f = R(n, m),bwd
    def forward(self, inp): return inp@self.w
    def bwd(self, out, inp): self.f(self, out, inp)
def right(self, out, inp): inp.g,self.w.g = out.g@self.w.t(),inp.t()@out.g
def edit(name, f):
    "The right backward, with `f` applied to one gradient"
    def bwd(self, out, inp):
        right(self, out, inp)
        t = inp if name=='inp' else self.w
        t.g = f(t.g)
    return bwd
def one_sign(g):
    g = g.clone()
    g.view(-1)[5] *= -1
    return g
def untransposed(self, out, inp): inp.g,self.w.g = out.g@self.w,inp.t()@out.g # same shape, as w is square
def no_upstream(self, out, inp): inp.g,self.w.g = torch.ones_like(out)@self.w.t(),inp.t()@torch.ones_like(out)
def wrong_side(self, out, inp): inp.g,self.w.g = out.g@self.w.t(),out.g.t()@inp # transposed

@pytest.mark.parametrize('bwd,names', [(edit('inp', lambda g: 2*g), ['inp']), (edit('w', lambda g: g/6), ['w']), (edit('w', one_sign), ['w']),
    (edit('inp', one_sign), ['inp']), (untransposed, ['inp']), (wrong_side, ['w']), (no_upstream, ['inp','w']), (edit('w', torch.zeros_like), ['w']),
    (edit('w', lambda g: g+1e-4), ['w']), (edit('inp', lambda g: g*float('nan')), ['inp'])])
def test_wrong_gradients_are_caught_by_name(bwd, names, capsys):
    with pytest.raises(AssertionError) as e: check_grads(W(bwd), R(6, 4))
    assert str(e.value).startswith('W: the gradient of ')
    assert [n for n in ('inp','w') if f"{n} is off autograd's by up to" in str(e.value)]==names
    inner = Sequential(Lin(4, 4), Tanh(), W(bwd), Lin(4, 2))
    if names==['w']:
        with pytest.raises(AssertionError, match='Sequential: the gradient of 2.w is off'): check_grads(inner, R(6, 4))
    else:
        with pytest.raises(AssertionError, match='0.w is off'): check_grads(inner, R(6, 4))

def test_right_one_passes(): check_grads(W(right), R(6, 4))

def test_forgotten_dropout_mask():
    class NoMask(Dropout):
        def bwd(self, out, inp): inp.g = out.g
    class NewMask(Dropout):
        def bwd(self, out, inp): inp.g = out.g*torch.empty_like(inp).bernoulli_(1-self.p).div_(1-self.p)
    class OnSelf(Module): # one mask for all calls, where a layer is used twice
        def forward(self, inp):
            self.mask = torch.empty_like(inp).bernoulli_(.5)
            return inp*self.mask
        def bwd(self, out, inp): inp.g = out.g*self.mask
    for m in (NoMask(),NewMask()):
        with pytest.raises(AssertionError, match='the gradient of inp is off'): check_grads(m, R(10, 10))
    check_grads(OnSelf(), R(10, 10))
    m = OnSelf()
    with pytest.raises(GradError, match='bwd reads self.mask, which was changed after the call'): check_grads(Sequential(m, Tanh(), m), R(10, 10))

def test_softmax_needs_a_random_upstream():
    "With a sum as the loss this one would pass: its true gradient is zero then, and so is this."
    class Zero(Softmax):
        def bwd(self, out, inp): inp.g = torch.zeros_like(inp)
    with pytest.raises(AssertionError, match='inp is off'): check_grads(Zero(), R(3, 4))

def test_what_autograd_has_wrong_too():
    "Where forward cuts autograd's graph, finite differences see it."
    class Cut(Module):
        def forward(self, inp): return inp*inp.detach()
        def bwd(self, out, inp): inp.g = out.g*inp
    with pytest.raises(AssertionError, match='inp is off finite differences'): check_grads(Cut(), R(3, 4))

def test_missing_and_misshapen_are_errors():
    def half(self, out, inp): inp.g = out.g@self.w.t()
    with pytest.raises(RuntimeError, match="parameter 'w' got no .g"): check_grads(W(half), R(6, 4))

def test_wrong_argument_of_several():
    class Bad(Mul):
        def bwd(self, out, a, b):
            F.mul_grad(out, a, b)
            b.g = -b.g
    with pytest.raises(AssertionError, match='the gradient of b is off') as e: check_grads(Bad(), R(3, 4), R(4))
    assert ' a is off' not in str(e.value)
    class BadCat(Concat):
        def bwd(self, out, *inps):
            F.concat_grad(out, *inps)
            inps[1].g = inps[1].g*2
    with pytest.raises(AssertionError, match=r'the gradient of inps\[1\] is off') as e: check_grads(BadCat(), R(3, 4), R(3, 2), R(3, 1))
    assert 'inps[0]' not in str(e.value) and 'inps[2]' not in str(e.value)


# What passes

class Twin(Module):
    "Several outputs, of which one is no float"
    def forward(self, a, b): return {'sum':a+b, 'arg':a.argmax(-1), 'more':(a*b,)}
    def bwd(self, out, a, b): a.g,b.g = out['sum'].g+b*out['more'][0].g,out['sum'].g+a*out['more'][0].g

@pytest.mark.parametrize('module,args', [
    *[(c.make(), c.inps()) for c in cases],
    (Sequential(Lin(4, 5), Dropout(), Relu(), Dropout(.1), Lin(5, 2)), [R(6, 4)]), (Twin(), [R(3, 4), R(3, 4)]),
    (Relu(), [torch.tensor([[-1.,0,1],[0,0,-0.]])]), (Relu(leak=.1, sub=.5, maxv=1.), [torch.tensor([-1.,0,1.5,3])]), # kinks: no derivative there
    (Lin(4, 3), [R(2, 2, 4)]),
    (Model([Lin(4, 3)], CrossEntropy()), [R(5, 4), torch.tensor([0,1,2,0,1])]), (Model([Lin(4, 3)], Mse('sum')), [R(5, 4), R(5, 3)]),
    (Model([Lin(4, 3).freeze(), Tanh(), Lin(3, 2)], Mse()), [const(R(5, 4)), R(5, 2)]),
    (Lin(4, 3, dtype=torch.bfloat16), [R(5, 4).bfloat16()]), (Sequential(Lin(9, 7)), [R(5, 9)]),
    (Model([Lin(4, 3)], Mse()).eval(), [R(5, 4)[::2], R(3, 3)])], ids=lambda o: type(o).__name__)
def test_passes(module, args):
    for seed in (0,1):
        torch.manual_seed(seed)
        check_grads(module, *args, show=False)

def test_table(capsys):
    check_grads(Sequential(Lin(4, 3), Tanh()), R(5, 4))
    lines = capsys.readouterr().out.splitlines()
    assert [l.split()[0] for l in lines]==['shape','input','0.w','0.b'] and '(5, 4)' in lines[1] and '(4, 3)' in lines[2]
    check_grads(Sequential(Lin(4, 3), Dropout()), R(5, 4))
    for l in capsys.readouterr().out.splitlines()[1:]: # finite differences saw the same mask each time, and so found derivatives
        assert float(l.split()[-1])<1e-5
    check_grads(Lin(4, 3), R(5, 4), show=False)
    assert capsys.readouterr().out==''

def test_no_float_output():
    class Arg(Module):
        def forward(self, x): return x.argmax()
    with pytest.raises(ValueError, match='check_grads: Arg has no floating-point output'): check_grads(Arg(), R(3))

def test_samples_of_large_tensors():
    "`most` bounds the work; autograd's gradient is compared in full."
    calls = []
    class Count(W):
        bwd = W.bwd
        def forward(self, inp):
            calls.append(1)
            return super().forward(inp)
    check_grads(Count(right, 40, 40), R(3, 40), most=5, show=False)
    assert len(calls)<40
    with pytest.raises(AssertionError, match='w is off autograd'): check_grads(W(edit('w', one_sign), 40, 40), R(3, 40), most=1, show=False)


# It leaves everything as it was

@pytest.mark.parametrize('bwd', [right, untransposed])
def test_changes_nothing(bwd):
    m,x,y = Model([Lin(4, 4), Dropout(), W(bwd)], Mse()),R(5, 4),R(5, 4)
    m.layers[0].freeze()
    m.layers[2].w.g = m.layers[2].w.grad = torch.ones(4, 4)
    x.g,c = torch.ones(2),const(y)
    ts = [*m.parameters(),x,y,c]
    before = [(t,t.clone(),t.dtype,t.device,t.requires_grad,t._version,copy.copy(vars(t))) for t in ts]
    modes = [(k,k.training,dict(vars(k))) for k in m.modules()]
    try: check_grads(m, x, c, show=False)
    except AssertionError: assert bwd is untransposed
    else: assert bwd is right
    for t,(o,value,*rest,attrs) in zip([*m.parameters(),x,y,c], before):
        assert t is o and torch.equal(t, value) and [t.dtype,t.device,t.requires_grad,t._version]==rest
        assert vars(t).keys()==attrs.keys() and all(vars(t)[k] is v for k,v in attrs.items())
    assert all(k.training==mode and vars(k).keys()==v.keys() and all(vars(k)[n] is o for n,o in v.items()) for k,mode,v in modes)
    assert y.g is None and m.out is None

def test_keeps_the_record_of_the_module():
    "A check between forward and backward disturbs neither."
    m,x,y = Model([Lin(4, 4)], Mse()),R(5, 4),R(5, 4)
    m(x, y)
    check_grads(m, R(2, 4), R(2, 4), show=False)
    m.backward()
    l = m.layers[0]
    test_near(l.w.g, 2*x.t()@(x@l.w+l.b-y)/y.numel())

def test_pytest_does_not_collect_test_near(pytestconfig):
    "A user imports it into test files; pytest must not take it for a test there (its arguments would be fixtures it doesn't find)."
    assert test_near.__test__ is False

def test_what_isnt_contiguous():
    check_grads(Lin(torch.randn(3, 4).t(), torch.zeros(3)), torch.randn(4, 5).t(), show=False)

def test_random_numbers_go_on_as_if_nothing_was_checked():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    check_grads(Lin(4, 3), torch.randn(5, 4), show=False)
    torch.manual_seed(3)
    Lin(4, 3),torch.randn(5, 4)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    l,x = Lin(4, 3),torch.randn(5, 4)
    check_grads(l, x, show=False)
    assert torch.equal(torch.get_rng_state(), after)

def test_forward_that_is_not_a_function_is_refused():
    class Counts(Module):
        n = 0
        def forward(self, x):
            Counts.n += 1
            return x*Counts.n
        def bwd(self, out, x): x.g = out.g*Counts.n
    with pytest.raises(ValueError, match='Counts gives another output each time'): check_grads(Counts(), torch.randn(3))

# hints

def test_hints_say_what_is_wrong(capsys):
    "Of each gradient; and nothing is raised."
    class Affine(Module):
        def __init__(self): self.w,self.b = rand(3),rand(3)
        def forward(self, inp): return inp*self.w+self.b
    def with_bwd(f): return type('Affine', (Affine,), {'forward':Affine.forward, 'bwd':f})()
    def said(f):
        capsys.readouterr()
        return check_grads(with_bwd(f), rand(4, 3), hints=True),capsys.readouterr().out
    def hole(self, out, inp): raise NotImplementedError
    def half(self, out, inp): inp.g,self.w.g = out.g*self.w,-(out.g*inp).sum(0)
    def broken(self, out, inp): inp.g = out.g@self.w.t()@self.w
    def whole(self, out, inp): inp.g,self.w.g,self.b.g = out.g*self.w,(out.g*inp).sum(0),out.g.sum(0)
    assert said(hole)==(False,'Affine: bwd is not written yet\n')
    assert said(half)==(False,'inp.g: right\nw.g: wrong (it is -1 times the true one)\nb.g: not written yet\n')
    found,text = said(broken)
    assert not found and text.startswith('Affine: bwd ends with an error')
    assert said(whole)==(True,'inp.g: right\nw.g: right\nb.g: right\n')

def test_a_constant_input_needs_no_gradient():
    "A target, say. Every other input does."
    class Mae(Module):
        def forward(self, inp, targ): return (inp-targ).abs().mean()
        def bwd(self, out, inp, targ): inp.g = (inp-targ).sign()/inp.numel()*out.g
    x,y = torch.randn(2, 5, 3).unbind()
    check_grads(Mae(), x, const(y))
    assert check_grads(Mae(), x, const(y), hints=True) and not check_grads(Mae(), x, y, hints=True)
    with pytest.raises(AssertionError, match='targ is off'): check_grads(Mae(), x, y)
