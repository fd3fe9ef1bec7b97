"Convolutions, their transposes, unfold and fold, as functions, torch's modules and our layer, against autograd in float64."
import copy
import pytest, torch, torch.nn.functional as F
from torch import nn
from fnnlite import SGD, Conv2d, CrossEntropy, Flatten, Lin, Model, Relu, Sequential, compile_step, const
from fnnlite.core.calls import recording
from fnnlite.core.record import wants
from fnnlite.core.rules import kernels, rule_of
from fnnlite.ops.convolutions import conv2d, conv2d_grad
from helpers import agree as agree_by_hand, assert_grads, close, rand

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel") # torch's own word

@pytest.fixture(params=['kernel','formula'], autouse=True)
def way(request):
    torch.manual_seed(0)
    kernels.on = request.param=='kernel'
    yield
    kernels.on = True

def agree(f, *ts):
    "`f(*ts)` recorded: torch's output to the last bit, each gradient autograd's, and none of a constant"
    refs = [t.detach().clone().requires_grad_(wants(t)) for t in ts]
    want = f(*refs)
    g = torch.randn_like(want)
    auto = iter(torch.autograd.grad(want, [r for r in refs if r.requires_grad], g))
    with recording() as rec: out = f(*ts)
    assert torch.equal(out, want)
    rec.backward(out, g)
    for t,r in zip(ts, refs, strict=True):
        if r.requires_grad: close(t.g, next(auto), rtol=1e-10, atol=1e-11)
        else: assert t.g is None

def agree_in_model(net, *inps, passes=1):
    "`Model(net)` in training and evaluation, and lean: as the net itself under autograd"
    for mode in ('train','eval','lean'):
        ours,twin = copy.deepcopy(net).train(mode!='eval'),copy.deepcopy(net).train(mode!='eval')
        model = Model(ours).retain(mode!='lean')
        xs,refs = ([t.clone().requires_grad_() for t in inps] for _ in range(2))
        for _ in range(passes):
            torch.manual_seed(1)
            want = twin(*refs)
            g = torch.randn_like(want)
            torch.manual_seed(1)
            out = model(*xs)
            assert torch.equal(out, want)
            want.backward(g)
            out.backward(g)
        close([t.grad for t in [*xs,*ours.parameters()]], [t.grad for t in [*refs,*twin.parameters()]], rtol=1e-10, atol=1e-11)


# Functions

sizes = {1:(9,), 2:(7,8), 3:(6,5,7)}
each_n = pytest.mark.parametrize('n', [1,2,3])
settings = [{}, dict(stride=2), dict(padding=2), dict(dilation=2, padding=1), dict(groups=2), dict(padding='same'), dict(padding='valid', stride=3),
    dict(stride=2, padding=1, dilation=2, groups=2), dict(padding='same', dilation=3, groups=2), dict(stride=3, padding=(1,))]

@each_n
@pytest.mark.parametrize('kw', settings, ids=str)
@pytest.mark.parametrize('ks', [(2,3,1),(3,2,2)], ids=str)
def test_convolutions(n, kw, ks):
    f,i,o,groups = getattr(F, f'conv{n}d'),4,6,kw.get('groups', 1)
    if kw.get('dilation')==3: ks = [min(k, 2) for k in ks] # odd zeros
    x,w,b = rand(2, i, *sizes[n]),rand(o, i//groups, *ks[:n]),rand(o)
    agree(lambda *ts: f(*ts, **kw), x, w, b)
    agree(lambda *ts: f(*ts, **kw), x[0], w)
    for c in range(3): agree(lambda *ts: f(*ts, **kw), *[const(t) if i==c else t.clone() for i,t in enumerate((x, w, b))])

@each_n
@pytest.mark.parametrize('kw', [{}, dict(stride=2), dict(padding=1), dict(stride=3, output_padding=2), dict(dilation=3, output_padding=2, padding=2),
    dict(stride=2, padding=2, output_padding=1, groups=2, dilation=2), dict(groups=2, stride=(2,))], ids=str)
def test_transposed_convolutions(n, kw):
    f,groups = getattr(F, f'conv_transpose{n}d'),kw.get('groups', 1)
    x,w,b = rand(2, 4, *(5,4,4)[:n]),rand(4, 3, *(3,2,3)[:n]),rand(3*groups)
    agree(lambda *ts: f(*ts, **kw), x, w, b)
    agree(lambda *ts: f(*ts, **kw), x[0], w)
    for c in range(3): agree(lambda *ts: f(*ts, **kw), *[const(t) if i==c else t.clone() for i,t in enumerate((x, w, b))])

def test_each_dimension_has_its_own():
    agree(lambda *ts: F.conv2d(*ts, (2,1), (0,3), (3,1)), rand(2, 3, 9, 8), rand(2, 3, 3, 2), rand(2))
    agree(lambda *ts: F.conv3d(*ts, stride=(1,2,3), padding=(2,0,1), dilation=(1,2,1)), rand(2, 2, 4, 6, 7), rand(2, 2, 3, 2, 2), rand(2))
    agree(lambda *ts: F.conv_transpose2d(*ts, (3,2), (1,2), (2,0), 1, (1,2)), rand(2, 3, 4, 5), rand(3, 2, 3, 2), rand(2))
    agree(lambda x, w: F.conv2d(x, w, groups=6), rand(2, 6, 5, 5), rand(12, 1, 3, 3)) # each channel by itself
    agree(lambda x, w: F.conv2d(x, w, stride=4), rand(2, 1, 7, 7), rand(2, 1, 1, 1)) # the stride leaves most out
    agree(lambda x, w: F.conv2d(x, w), rand(2, 3, 4, 4), rand(2, 3, 4, 4)) # one place

def test_other_spellings():
    agree(lambda *ts: torch.conv_tbc(*ts, 2), rand(5, 2, 3), rand(3, 3, 4), rand(4))
    agree(lambda *ts: F.conv_tbc(*ts), const(rand(5, 2, 3)), rand(2, 3, 4), rand(4))
    x,w,b = rand(2, 4, 6, 5),rand(4, 2, 3, 3),rand(4)
    agree(lambda *ts: torch.convolution(*ts, [2], [1], [1], False, [0], 2), x, w, b)
    agree(lambda *ts: torch.convolution(*ts, [2,1], [1,0], [1,1], True, [1,0], 2), x, w, b)
    agree(lambda x, w: F.conv2d(weight=w, input=x, padding='same'), x, rand(4, 4, 3, 3))
    agree(lambda x: F.conv2d(x, x), rand(2, 3, 4, 4)) # by itself
    agree(lambda x, w: F.conv1d(F.conv1d(x, w), w), rand(1, 3, 9), rand(3, 3, 2)) # twice

def test_no_items_and_other_layouts():
    agree(lambda *ts: F.conv2d(*ts, padding=1), rand(0, 3, 4, 4), rand(2, 3, 3, 3), rand(2))
    agree(lambda *ts: F.conv_transpose1d(*ts), rand(0, 3, 4), rand(3, 2, 3))
    x,w = rand(2, 4, 6, 6).to(memory_format=torch.channels_last),rand(6, 2, 3, 3).to(memory_format=torch.channels_last)
    agree(lambda *ts: F.conv2d(*ts, groups=2), x, w)
    agree(lambda *ts: F.conv_transpose2d(*ts), rand(6, 6, 4, 2).permute(3, 2, 0, 1), rand(3, 3, 2, 4).transpose(0, 3))

windows = [dict(kernel_size=3), dict(kernel_size=(2,3), stride=2), dict(kernel_size=2, dilation=(2,3), padding=(1,0), stride=(1,3))]
@pytest.mark.parametrize('kw', windows, ids=str)
def test_unfold_and_fold(kw):
    x = rand(2, 3, 6, 7)
    agree(lambda x: F.unfold(x, **kw), x)
    columns = F.unfold(x, **kw)
    agree(lambda y: F.fold(y, (6,7), **kw), columns)
    agree(lambda y: F.fold(y, output_size=(6,7), **kw), columns[0])
    agree(lambda x: nn.Fold((6,7), **kw)(nn.Unfold(**kw)(x).cos()), x[1])


# torch's modules

def conv_nets():
    yield 'plain', nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(4, 3, 3, stride=2, bias=False)), (2,8,8)
    yield '1d', nn.Sequential(nn.Conv1d(2, 4, 3, padding='same', dilation=2), nn.Dropout(.3), nn.ConvTranspose1d(4, 2, 2, stride=2, output_padding=1)), (2,9)
    yield '3d', nn.Sequential(nn.Conv3d(2, 4, 2, padding='same'), nn.ReLU(inplace=True), nn.ConvTranspose3d(4, 2, 2, groups=2, bias=False)), (2,4,3,4)
    yield 'depthwise', nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.GELU(), nn.Conv2d(8, 3, 1), nn.ConvTranspose2d(3, 2, 3, 2, 1, dilation=2)), (4,6,6)
    yield 'normed', nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 3)), (2,6,6)
    yield 'columns', nn.Sequential(nn.Unfold(3, padding=1), nn.Tanh(), nn.Fold((5,6), 3, padding=1), nn.Conv2d(2, 2, 2)), (2,5,6)

@pytest.mark.parametrize('net,shape', [pytest.param(*o, id=name) for name,*o in conv_nets()])
def test_nets(net, shape): agree_in_model(net.double(), rand(3, *shape), passes=2)

class Residual(nn.Module):
    "A block used twice, in-place additions, an output size that is asked for, a frozen weight"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.up = nn.Conv2d(3, 3, 3, padding=1),nn.Conv2d(3, 3, 3, padding=1, stride=2),nn.ConvTranspose2d(3, 3, 3, stride=2, padding=1)
        self.a.weight.requires_grad_(False)
    def forward(self, x):
        h = self.b(F.relu(self.a(x), inplace=True))
        r = self.a(h)
        r += h
        return self.up(r, output_size=x.shape[-2:]) + x
def test_residual():
    net = Residual().double()
    agree_in_model(net, rand(2, 3, 8, 7))
    assert net.a.weight.grad is None

@pytest.mark.skipif(rule_of(F.pad) is None, reason='padding by the image needs the rule of F.pad')
@pytest.mark.parametrize('mode', ['reflect','replicate','circular'])
@each_n
def test_padding_modes(n, mode):
    cls = [nn.Conv1d,nn.Conv2d,nn.Conv3d][n-1]
    agree_in_model(cls(2, 3, 3, padding=2, padding_mode=mode, dtype=torch.float64), rand(2, 2, *(5,4,6)[:n]))
    agree_in_model(cls(2, 2, 2, padding='same', padding_mode=mode, groups=2, dtype=torch.float64), rand(2, 2, *(5,4,6)[:n]))

def test_lower_precision():
    net,x = nn.Sequential(nn.Conv2d(2, 4, 3, padding='same'), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2)),torch.randn(3, 2, 6, 6)
    g = torch.randn(3, 2, 7, 7)
    def grads(model, x):
        net.zero_grad()
        with torch.autocast('cpu', enabled=x.dtype==torch.float32): out = model(x)
        out.backward(g.to(out.dtype))
        return [p.grad for p in net.parameters()]
    for dtype in (torch.float32,torch.bfloat16):
        net.to(dtype)
        got,want = grads(Model(net), x.to(dtype)),grads(net, x.to(dtype))
        assert all(a.dtype==dtype and (a-b).norm()<.02*b.norm() for a,b in zip(got, want))


# The layer

@pytest.mark.parametrize('kw', [{}, dict(ks=1), dict(ks=2, padding=0, bias=False), dict(ks=3, stride=2), dict(ks=4, stride=3, padding=3)], ids=str)
def test_layer(kw):
    m = Conv2d(2, 3, dtype=torch.float64, **kw)
    if m.b is not None: m.b.data.normal_()
    inp,rest = rand(2, 2, 7, 6),dict(stride=m.stride, padding=m.padding)
    assert m.w.shape==(3,2,kw.get('ks', 3),kw.get('ks', 3)) and m.w.is_contiguous() and (m.b is None)==('bias' in kw)
    close(m(inp), F.conv2d(inp, m.w, m.b, **rest))
    for batch in ((2,),()):
        m.zero_grad()
        assert_grads(m, rand(*batch, 2, 7, 6))
    for c in range(3):
        ts = [const(t) if i==c else t.detach().clone() for i,t in enumerate((inp, *m.parameters()))]
        out = conv2d(*ts, **rest)
        def back(g):
            out.g = g
            conv2d_grad(out, *ts, **rest)
        agree_by_hand(out, back, lambda *ts: F.conv2d(*ts, **rest), ts)

def test_layers_first_weights():
    "The signal's scale stays, as kaiming has it; device and dtype are those asked for."
    m = Conv2d(16, 400, 3)
    assert m.w.std().item()==pytest.approx((2/144)**.5, rel=.02) and not m.b.any()
    assert Conv2d(16, 400, nonlinearity='linear').w.std().item()==pytest.approx((1/144)**.5, rel=.02)
    assert Conv2d(2, 3, device='meta').w.device.type=='meta' and Conv2d(2, 3, dtype=torch.bfloat16).b.dtype==torch.bfloat16

def test_layers_errors():
    m = Conv2d(2, 3, 5, padding=1)
    assert repr(m)=='Conv2d(2, 3, ks=5, stride=1, padding=1, bias=True)'
    for shape in ((2,3,5,5),(5,5),(1,2,2,5,5),(2,2,2,5)):
        with pytest.raises(ValueError, match=r'Conv2d\(.*inp has shape \(.*, expected \(n,2,h,w\) or \(2,h,w\), h and w at least 3'): m(torch.randn(shape))
    with pytest.raises(TypeError, match='inp has dtype torch.float64, expected torch.float32'): m(rand(2, 2, 5, 5))
    with pytest.raises(TypeError, match='Conv2d: ni is 1.5, expected an int'): Conv2d(1.5, 3)
    with pytest.raises(TypeError, match=r'Conv2d: ks is \(3, 3\), expected an int'): Conv2d(2, 3, (3,3))
    with pytest.raises(ValueError, match='Conv2d: stride is 0, expected at least 1'): Conv2d(2, 3, stride=0)
    with pytest.raises(ValueError, match='Conv2d: padding is -1, expected at least 0'): Conv2d(2, 3, padding=-1)

@pytest.mark.parametrize('of', ['ours',"torch's"])
def test_compiled_step(of):
    "As one graph: the weights are those of ordinary steps."
    if of=='ours': net = Sequential(Conv2d(1, 4, stride=2), Relu(), Conv2d(4, 4, stride=2), Flatten(), Lin(16, 3))
    else: net = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, 2, 'valid'), nn.Flatten(), nn.Linear(4, 3))
    x,y,ends = rand(5, 1, 7, 7),torch.randint(3, (5,)),[]
    for compiled in (False,True):
        model = Model(copy.deepcopy(net).double(), CrossEntropy())
        opt = SGD(model.parameters(), .1)
        step = compile_step(model, opt, compiler=False) if compiled else None
        for _ in range(3):
            if compiled: step(x, y)
            else:
                model(x, y)
                model.backward()
                opt.step()
                opt.zero_grad()
        ends.append([p.detach() for p in model.parameters()])
    close(*ends, rtol=1e-12, atol=1e-12)
