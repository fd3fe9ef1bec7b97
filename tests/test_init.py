"The initialisers against torch.nn.init's, which want the weight transposed."
import math
import pytest, torch
from torch.nn import init as torch_init
from fnnlite import Lin
from fnnlite.ops import inits as room
from fnnlite.ops.inits import kaiming_normal, kaiming_uniform, xavier_normal, xavier_uniform

inits = [kaiming_normal, kaiming_uniform, xavier_normal, xavier_uniform]
each = pytest.mark.parametrize('f', inits, ids=lambda f: f.__name__)
kinds = [('relu',None),('linear',None),('tanh',None),('sigmoid',None),('selu',None),('leaky_relu',None),('leaky_relu',.3)]


def torchs(f, ni, nf, nonlinearity, leak):
    "The same by torch, in its layout (nf,ni), turned round."
    w = torch.empty(nf, ni, dtype=torch.float64)
    by_torch = getattr(torch_init, f.__name__+'_')
    if f in (kaiming_normal,kaiming_uniform): by_torch(w, a=.01 if leak is None else leak, nonlinearity=nonlinearity)
    else: by_torch(w, gain=torch_init.calculate_gain(nonlinearity, leak))
    return w.t()

@each
@pytest.mark.parametrize('nonlinearity,leak', kinds)
@pytest.mark.parametrize('ni,nf', [(400,100),(50,1000)])
def test_std(f, nonlinearity, leak, ni, nf):
    torch.manual_seed(0)
    w,t = f(ni, nf, nonlinearity, leak, dtype=torch.float64),torchs(f, ni, nf, nonlinearity, leak)
    assert w.shape==t.shape==(ni,nf) and w.is_contiguous()
    rel = 6/math.sqrt(2*ni*nf) # a sample's deviation is off by about 1/√(2n), each of the two
    assert w.std().item()==pytest.approx(t.std().item(), rel=rel)
    assert abs(w.mean()) < 5*t.std()/math.sqrt(ni*nf)
    if 'uniform' in f.__name__: # the bounds, and as much on either side
        bound = t.std().item()*math.sqrt(3)
        assert w.abs().max()<=t.abs().max()*1.001 and w.abs().max()>.99*bound and w.min()<-.99*bound
    else: assert (w.abs()>2*w.std()).double().mean().item()==pytest.approx(.0455, abs=.006) # the normal distribution's tails

@each
def test_defaults_are_torchs(f):
    torch.manual_seed(0)
    want = torchs(f, 300, 300, 'relu' if 'kaiming' in f.__name__ else 'linear', None)
    assert f(300, 300).std().item()==pytest.approx(want.std().item(), rel=.02)

def test_variance_survives_layers():
    "What kaiming is for: 20 layers of relu neither vanish nor explode."
    torch.manual_seed(0)
    for f in (kaiming_normal,kaiming_uniform):
        x = torch.randn(100, 512)
        for _ in range(20): x = (x@f(512, 512)).relu()
        assert .3 < x.pow(2).mean() < 3

@each
def test_device_and_dtype(f):
    assert f(2, 3).dtype==torch.float32 and f(2, 3).device.type=='cpu'
    for dtype in (torch.float64,torch.bfloat16,torch.float16): assert f(2, 3, dtype=dtype).dtype==dtype
    assert f(2, 3, device='meta').device.type=='meta'
    assert f(10**6, 10**6, device='meta').shape==(10**6,10**6) # nothing is made elsewhere first
    with torch.device('meta'): assert f(2, 3).device.type=='meta'
    old = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        assert f(2, 3).dtype==torch.float64
    finally: torch.set_default_dtype(old)

@each
def test_no_copy(f):
    "One tensor of the size is made; what is done to it is done in place."
    from torch.utils._python_dispatch import TorchDispatchMode
    memory = set()
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            memory.add(out.untyped_storage().data_ptr())
            return out
    with Watch(): w = f(20, 30)
    assert memory=={w.untyped_storage().data_ptr()}

@each
def test_seed(f):
    torch.manual_seed(3)
    a,b = f(4, 5),f(4, 5)
    torch.manual_seed(3)
    assert torch.equal(a, f(4, 5)) and not torch.equal(a, b)

@each
@pytest.mark.parametrize('args,msg', [((0,3), r"weight of \(0,3\): ni and nf must be at least 1"), ((3,0), r"weight of \(3,0\)"),
    ((-1,3), r"weight of \(-1,3\)"),
    ((2,3,'bogus'), "Unsupported nonlinearity bogus")])
def test_errors(f, args, msg):
    with pytest.raises(ValueError, match=msg): f(*args)

def test_every_initialiser_is_here(): assert set(room.__all__)=={f.__name__ for f in inits}

def test_lin_uses_it():
    torch.manual_seed(1)
    l = Lin(300, 200, nonlinearity='linear')
    assert l.w.std().item()==pytest.approx(1/math.sqrt(300), rel=.02) and (l.b==0).all() and l.b.shape==(200,)
    assert Lin(300, 200).w.std().item()==pytest.approx(math.sqrt(2/300), rel=.02)
    l = Lin(3, 2, device='meta', dtype=torch.float64)
    assert all(p.device.type=='meta' and p.dtype==torch.float64 for p in l.parameters())
