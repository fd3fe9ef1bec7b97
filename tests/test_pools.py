"Padding, pooling, resizing and shuffling, as functions and torch's modules, against autograd in float64."
import copy
import pytest, torch, torch.nn.functional as F
from torch import nn
from fnnlite import SGD, CrossEntropy, GradError, Model, compile_step
from fnnlite.core.calls import recording
from fnnlite.core.rules import kernels
from fnnlite.ops.pools import came_from
from helpers import close, rand

@pytest.fixture(params=['kernel','formula'], autouse=True)
def way(request):
    torch.manual_seed(0)
    kernels.on = request.param=='kernel'
    yield
    kernels.on = True

def agree(f, x, *rest):
    "`f(x, *rest)` recorded: torch's output to the last bit, and the gradients autograd's"
    ts = [x,*rest]
    refs = [t.detach().clone().requires_grad_() for t in ts]
    want = f(*refs)
    g = torch.randn_like(want)
    auto = torch.autograd.grad(want, refs, g)
    with recording() as rec: out = f(*ts)
    assert torch.equal(out, want)
    rec.backward(out, g)
    close([t.g for t in ts], auto, rtol=1e-10, atol=1e-11)

def agree_in_model(net, inp):
    "`Model(net)` in training and evaluation, and lean: as the net itself under autograd"
    for mode in ('train','eval','lean'):
        ours,twin = copy.deepcopy(net).train(mode!='eval'),copy.deepcopy(net).train(mode!='eval')
        model = Model(ours).retain(mode!='lean')
        x,ref = (inp.clone().requires_grad_() for _ in range(2))
        torch.manual_seed(1)
        want = twin(ref)
        g = torch.randn_like(want)
        torch.manual_seed(1)
        out = model(x)
        assert torch.equal(out, want)
        want.backward(g)
        out.backward(g)
        close([t.grad for t in [x,*ours.parameters()]], [t.grad for t in [ref,*twin.parameters()]], rtol=1e-10, atol=1e-11)

sizes = {1:(9,), 2:(7,8), 3:(5,6,7)}
each_n = pytest.mark.parametrize('n', [1,2,3])
def of(name, n): return getattr(F, f'{name}{n}d')


# Padding

@each_n
@pytest.mark.parametrize('pad', [(1,2,0,3,2,1), (0,0,0,0,0,0), (-1,2,3,-2,0,-1), (-2,-1,-1,0,1,1)], ids=str)
def test_padding(n, pad):
    x,pad = rand(2, 3, *sizes[n]),pad[:2*n]
    agree(lambda x: F.pad(x, pad), x)
    agree(lambda x: F.pad(x, pad, value=2.5), x[0])
    agree(lambda x: torch.constant_pad_nd(x, pad, -1.), x)
    for mode in ('reflect','replicate','circular'): agree(lambda x: F.pad(x, pad, mode=mode), x)

def test_padding_of_some_dimensions():
    agree(lambda x: F.pad(x, (1,2,3,4)), rand(3, 4))
    agree(lambda x: F.pad(x, [-3,0]), rand(4))
    agree(lambda x: F.pad(x, (0,0,0,0,1,1,2,2)), rand(2, 1, 3, 2)) # batch and channels too
    agree(lambda x: F.pad(x, (4,4), 'reflect'), rand(3, 5)) # no batch
    agree(lambda x: F.pad(x, (9,7,8,5), 'replicate'), rand(1, 2, 3, 1))

@pytest.mark.parametrize('mode', ['reflect','replicate','circular'])
def test_came_from(mode):
    "Where torch's own padding takes each number from"
    x = torch.arange(6.)[None]
    for before in range(-3, 4):
        for after in range(max(-3, -2-before), 4):
            if mode=='circular' and max(before, after)>6+min(before, 0)+min(after, 0): continue # torch refuses, or reads its own copies
            assert torch.equal(F.pad(x, (before,after), mode), x[:,came_from(mode, 6, before, after, None)]), (before, after)


# Maxima

max_settings = [dict(kernel_size=2), dict(kernel_size=3, stride=2, padding=1), dict(kernel_size=3, stride=1, dilation=2),
    dict(kernel_size=3, stride=2, ceil_mode=True), dict(kernel_size=2, stride=3, padding=1, dilation=2, ceil_mode=True)]

@each_n
@pytest.mark.parametrize('kw', max_settings, ids=str)
def test_max_pooling(n, kw):
    f,x = of('max_pool', n),rand(2, 3, *sizes[n])
    agree(lambda x: f(x, **kw), x)
    agree(lambda x: f(x, **kw), x[0])
    agree(lambda x: f(x, **kw), x.round()) # equal ones in a window
    agree(lambda x: getattr(torch, f'max_pool{n}d')(x, **kw), x)
    agree(lambda x: f(x, **kw, return_indices=True)[0], x)
    agree(lambda x: f(x.sin(), **kw).cos(), x)

@each_n
def test_adaptive_max_pooling(n):
    f,x = of('adaptive_max_pool', n),rand(2, 3, *sizes[n])
    for size in (1, (3,2,4)[:n], sizes[n], 11): agree(lambda x: f(x, size), x)
    agree(lambda x: f(x, 3, return_indices=True)[0], x[1])
    if n>1: agree(lambda x: f(x, (None,)*(n-1)+(2,)), x)

@pytest.mark.parametrize('n', [2,3])
def test_fractional_max_pooling(n):
    f,x,where = of('fractional_max_pool', n),rand(2, 3, *sizes[n]),torch.rand(2, 3, n, dtype=torch.float64)
    agree(lambda x: f(x, 2, output_size=3, _random_samples=where), x)
    agree(lambda x: f(x, 2, output_ratio=(.6,.8,.5)[:n], return_indices=True, _random_samples=where)[0], x)
    def seeded(x):
        torch.manual_seed(3)
        return f(x, 2, (3,2,4)[:n])
    agree(seeded, x)

def test_what_comes_out_with_the_indices():
    "A pair as torch's; the values may be changed in place, the indices may not."
    x = rand(2, 3, 6, 6)
    with recording() as rec:
        h = F.max_pool2d(x, 2, return_indices=True)
        values,indices = h
        out = F.relu(values, inplace=True)
    assert isinstance(h, tuple) and len(h)==2 and not indices.is_floating_point()
    assert torch.equal(indices, F.max_pool2d(x, 2, return_indices=True)[1])
    rec.backward(out, torch.ones_like(out))
    ref = x.clone().requires_grad_()
    F.relu(F.max_pool2d(ref, 2)).sum().backward()
    close(x.g, ref.grad)
    with recording() as rec:
        out,indices = F.max_pool2d(x, 2, return_indices=True)
        indices.zero_()
    with pytest.raises(GradError, match='changed in place'): rec.backward(out, torch.ones_like(out))

@each_n
@pytest.mark.parametrize('kw', [dict(kernel_size=2), dict(kernel_size=3, stride=2, padding=1)], ids=str)
def test_unpooling(n, kw):
    x = rand(2, 3, *sizes[n])
    y,indices = of('max_pool', n)(x, **kw, return_indices=True)
    unpool = of('max_unpool', n)
    agree(lambda y: unpool(y, indices, **kw, output_size=sizes[n]), y)
    def around(x):
        y,indices = of('max_pool', n)(x, 2, return_indices=True)
        return unpool(y.sin(), indices, 2, output_size=x.shape[-n:])
    agree(around, x)
    agree(around, x[0])


# Means

avg_settings = [dict(kernel_size=2), dict(kernel_size=3, stride=2, padding=1), dict(kernel_size=3, stride=2, padding=1, ceil_mode=True),
    dict(kernel_size=3, padding=1, count_include_pad=False), dict(kernel_size=4, stride=3, padding=2, ceil_mode=True, count_include_pad=False),
    dict(kernel_size=(2,), stride=(1,)), dict(kernel_size=3, padding=1, ceil_mode=True, divisor_override=5)]

@each_n
@pytest.mark.parametrize('kw', avg_settings, ids=str)
def test_avg_pooling(n, kw):
    if n==1: kw = {k:v for k,v in kw.items() if k!='divisor_override'}
    f,x = of('avg_pool', n),rand(2, 3, *sizes[n])
    agree(lambda x: f(x, **kw), x)
    agree(lambda x: f(x, **kw), x[0])

def test_each_dimension_has_its_own():
    agree(lambda x: F.avg_pool2d(x, (2,3), (1,2), (1,0), True, False), rand(2, 3, 7, 8))
    agree(lambda x: F.avg_pool3d(x, (1,2,3), (2,1,2), (0,1,1), divisor_override=2), rand(2, 3, 4, 5, 6))
    agree(lambda x: F.max_pool2d(x, (2,3), (1,2), (1,0), (2,1), True), rand(2, 3, 7, 8))

@each_n
def test_adaptive_avg_pooling(n):
    f,x = of('adaptive_avg_pool', n),rand(2, 3, *sizes[n])
    for size in (1, (3,2,4)[:n], sizes[n], 11): agree(lambda x: f(x, size), x)
    agree(lambda x: f(x, 3), x[1])
    if n>1: agree(lambda x: f(x, (None,)*(n-1)+(2,)), x)

@each_n
@pytest.mark.parametrize('p', [1, 2, 3., float('inf')])
def test_lp_pooling(n, p):
    f,x = of('lp_pool', n),rand(2, 3, *sizes[n])
    if p%2==1: x = x.abs()+.1 # odd powers of both signs may cancel
    for kw in ({}, dict(stride=2), dict(stride=1, ceil_mode=True)): agree(lambda x: f(x, p, 3, **kw), x)


# Resizing

modes = [(n,m) for n,ms in enumerate(('linear','bilinear bicubic','trilinear'), 1) for m in ['nearest','nearest-exact','area',*ms.split()]]

@pytest.mark.parametrize('n,mode', modes)
def test_resizing(n, mode):
    x = rand(2, 3, *sizes[n])
    ways = [dict(size=4), dict(size=(11,3,9)[:n]), dict(size=1), dict(size=sizes[n]), dict(scale_factor=2), dict(scale_factor=.6),
        dict(scale_factor=(1.7,.5,1.3)[:n]), dict(scale_factor=1.7, recompute_scale_factor=True)]
    for kw in ways:
        agree(lambda x: F.interpolate(x, mode=mode, **kw), x)
        if mode.endswith(('linear','cubic')): agree(lambda x: F.interpolate(x, mode=mode, align_corners=True, **kw), x)

@pytest.mark.parametrize('mode', ['bilinear','bicubic','lanczos'])
def test_resizing_against_aliases(mode):
    x = rand(2, 3, 9, 8)
    for kw in (dict(size=(4,3)), dict(size=(12,5)), dict(scale_factor=.6), dict(scale_factor=(1.5,.4))):
        agree(lambda x: F.interpolate(x, mode=mode, antialias=True, **kw), x)

@pytest.mark.filterwarnings('ignore:.*upsample.* is deprecated')
def test_other_spellings():
    x = rand(2, 4, 6, 4)
    agree(lambda x: F.upsample(x, scale_factor=2), x)
    agree(lambda x: F.upsample_bilinear(x, (3,9)), x)
    agree(lambda x: F.upsample_nearest(x, scale_factor=3), x)
    agree(lambda x: F.avg_pool2d(kernel_size=2, input=x), x)
    agree(lambda x: F.max_pool2d(kernel_size=2, input=x), x)
    agree(lambda x: torch.max_pool2d(kernel_size=2, input=x, stride=1), x)

def test_shuffles():
    x = rand(2, 12, 4, 6)
    agree(lambda x: F.pixel_shuffle(x, 2), x)
    agree(lambda x: F.pixel_shuffle(x, upscale_factor=2), x[0])
    agree(lambda x: F.pixel_unshuffle(x, 2), x)
    for groups in (1,2,3,4,12): agree(lambda x: F.channel_shuffle(x, groups), x)


def test_no_items_and_other_layouts():
    for f in (lambda x: F.pad(x, (1,1,1,1)), lambda x: F.pad(x, (1,1,1,1), 'reflect'), lambda x: F.max_pool2d(x, 2), lambda x: F.avg_pool2d(x, 2),
            lambda x: F.adaptive_avg_pool2d(x, 3), lambda x: F.channel_shuffle(x, 2)):
        agree(f, rand(0, 4, 6, 5))
    for x in (rand(2, 4, 6, 5).to(memory_format=torch.channels_last), rand(5, 6, 4, 2).permute(3, 2, 1, 0)):
        agree(lambda x: F.pad(x, (1,2,0,1), 'reflect'), x)
        agree(lambda x: F.max_pool2d(x, 3, 2, 1), x)
        agree(lambda x: F.max_pool2d(x, 3, 2, 1, return_indices=True)[0], x)
        agree(lambda x: F.avg_pool2d(x, 3, 2, 1), x)
        agree(lambda x: F.adaptive_avg_pool2d(x, 1), x)
        agree(lambda x: F.interpolate(x, scale_factor=2, mode='bilinear'), x)
        agree(lambda x: F.pixel_shuffle(x, 2), x)


# torch's modules

class SegNet(nn.Module):
    "Pooling whose indices unpool, at two scales that share their modules, beside a skip"
    def __init__(self):
        super().__init__()
        self.down,self.up,self.conv = nn.MaxPool2d(2, return_indices=True),nn.MaxUnpool2d(2),nn.Conv2d(3, 3, 1)
    def forward(self, x):
        a,i = self.down(x)
        b,j = self.down(self.conv(F.relu(a, inplace=True)))
        return torch.cat([self.up(self.up(self.conv(b), j)+a, i), F.interpolate(b, x.shape[2:], mode='bilinear')], 1)

def pool_nets():
    yield 'max', nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1), nn.AdaptiveMaxPool2d(2)), (2,9,8)
    yield 'avg', nn.Sequential(nn.Conv2d(2, 4, 3), nn.AvgPool2d(2), nn.Sigmoid(), nn.LPPool2d(2, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()), (2,12,10)
    yield '1d', nn.Sequential(nn.CircularPad1d(2), nn.Conv1d(2, 4, 3), nn.MaxPool1d(2), nn.AvgPool1d(2), nn.Upsample(9), nn.AdaptiveAvgPool1d(3)), (2,12)
    yield '3d', nn.Sequential(nn.ReplicationPad3d(1), nn.MaxPool3d(2), nn.Conv3d(2, 3, 2), nn.Upsample((4,3,5), mode='trilinear'), nn.AvgPool3d(2)), (2,4,4,5)
    yield 'edges', nn.Sequential(nn.ReflectionPad2d(2), nn.Conv2d(2, 4, 3), nn.ZeroPad2d((1,0,2,-1)), nn.ReLU(inplace=True), nn.ConstantPad2d(1, 3.)), (2,5,6)
    yield 'pixels', nn.Sequential(nn.PixelUnshuffle(2), nn.ChannelShuffle(4), nn.Conv2d(8, 8, 1), nn.PixelShuffle(2), nn.UpsamplingBilinear2d((3,9))), (2,4,6)
    yield 'fractional', nn.Sequential(nn.Conv2d(2, 3, 2), nn.FractionalMaxPool2d(2, output_ratio=.7), nn.Tanh()), (2,7,7)
    yield 'segnet', SegNet(), (3,8,12)

@pytest.mark.parametrize('net,shape', [pytest.param(*o, id=name) for name,*o in pool_nets()])
def test_nets(net, shape): agree_in_model(net.double(), rand(3, *shape))

def test_lower_precision():
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.MaxPool2d(2, 1), nn.ReflectionPad2d(1), nn.Upsample(scale_factor=2, mode='bilinear'), nn.Tanh(), nn.AvgPool2d(3),
        nn.AdaptiveAvgPool2d(2))
    x,g = torch.randn(3, 2, 7, 6),torch.randn(3, 4, 2, 2)
    def grads(model, x):
        net.zero_grad()
        with torch.autocast('cpu', enabled=x.dtype==torch.float32): out = model(x)
        out.backward(g.to(out.dtype))
        return [p.grad for p in net.parameters()]
    for dtype in (torch.float32,torch.bfloat16,torch.float16):
        net.to(dtype)
        got,want = grads(Model(net), x.to(dtype)),grads(net, x.to(dtype))
        assert all(a.dtype==dtype and (a-b).norm()<.02*b.norm() for a,b in zip(got, want))

def test_compiled_step():
    "As one graph: the weights are those of ordinary steps."
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, padding_mode='reflect'), nn.MaxPool2d(2), nn.Conv2d(4, 4, 1),
        nn.Upsample(scale_factor=2, mode='bilinear'), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    x,y,ends = rand(5, 1, 8, 8),torch.randint(3, (5,)),[]
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

def test_lean_gradients_are_laid_out_as_ever():
    strides = []
    for on in (True,False):
        net = nn.Sequential(nn.Conv2d(2, 3, 1), nn.AvgPool2d(2), nn.Conv2d(3, 4, 1)).to(memory_format=torch.channels_last)
        x = torch.randn(2, 2, 6, 6).to(memory_format=torch.channels_last)
        model,seen = Model(net).retain(on),{}
        out = model(x)
        model.backward(torch.randn_like(out), after=lambda call: seen.update({call.name:call.args[0].g.stride()}))
        strides.append(seen)
    assert strides[0]==strides[1]
