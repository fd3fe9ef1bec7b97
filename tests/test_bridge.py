"torch's own layers and functions inside a net of fnnlite's, against the same net by autograd alone."
from collections import OrderedDict
from copy import deepcopy
import pytest, torch
from safetensors.torch import load_file, save_file
from torch import nn
from fnnlite import SGD, AdamW, Add, GradError, Lin, Log, Model, Module, Mse
from fnnlite import Relu, Sequential, Wrap, from_torch, to_torch, load_weights, save_weights, const, wants
from fnnlite.core.record import grad
from fnnlite.nets.bridges import pairs
from helpers import assert_grads, rand


class Clamp(torch.autograd.Function):
    "As tutorials write it, without `setup_context`"
    @staticmethod
    def forward(ctx, inp):
        ctx.save_for_backward(inp)
        return inp.clamp(min=0)
    @staticmethod
    def backward(ctx, g):
        inp, = ctx.saved_tensors
        return torch.where(inp>0, g, 0.)

class Pair(nn.Module):
    "Several inputs, one by keyword, and outputs in a dict, one not a float"
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 3)
    def forward(self, a, *, b): return {'s': self.lin(a)+b, 'p': (a.exp(), a.argmax(-1))}

class Twice(Module):
    "One tensor as several arguments, one wrapped module in two calls"
    def __init__(self): self.att,self.lin = Wrap(nn.MultiheadAttention(4, 2, batch_first=True)),Wrap(nn.Linear(4, 4))
    def forward(self, x):
        x = self.lin(x)
        return self.lin(self.att(x, x, x)[0])

class TiedInside(nn.Module):
    "One weight under two names"
    def __init__(self):
        super().__init__()
        self.a,self.b = nn.Linear(4, 4, bias=False),nn.Linear(4, 4)
        self.b.weight = self.a.weight
    def forward(self, x): return self.b(self.a(x).tanh())

class Keyword(Module):
    def __init__(self): self.lin,self.pair = Lin(4, 3),Wrap(Pair())
    def forward(self, x):
        out = self.pair(x, b=self.lin(x))
        return out['s'],out['p'][0]

cases = {'function': (lambda: Wrap(torch.tanh), 5, 4), 'Function': (lambda: Wrap(Clamp.apply), 5, 4), 'module': (lambda: Wrap(nn.Linear(4, 3)), 5, 4),
    'identity': (lambda: Wrap(lambda t: t), 5, 4), 'view': (lambda: Wrap(nn.Flatten()), 2, 3, 4), 'chunk': (lambda: Wrap(lambda t: t.chunk(2)), 4, 4),
    'dropout': (lambda: Wrap(nn.Dropout()), 5, 4), 'lstm': (lambda: Wrap(nn.LSTM(4, 3)), 5, 2, 4),
    'batchnorm': (lambda: Wrap(nn.BatchNorm1d(4)), 5, 4), 'attention': (Twice, 2, 5, 4), 'keyword': (Keyword, 5, 4),
    'tied': (lambda: Wrap(TiedInside()), 5, 4)}

@pytest.mark.parametrize('make,shape', [(make,shape) for make,*shape in cases.values()], ids=cases)
def test_gradients(make, shape): assert_grads(make().double(), rand(*shape))

def test_between_layers_of_ours():
    "Trained as the same net in torch: weights of both kinds, running statistics, the gradients between the layers."
    torch.manual_seed(0)
    lin,bn,out = nn.Linear(4, 6).double(),nn.BatchNorm1d(6).double(),nn.Linear(6, 3).double()
    theirs = deepcopy(nn.Sequential(lin, bn, nn.ReLU(), out))
    ours = Model([Lin(lin.weight.detach().t().clone(), lin.bias.detach().clone()), Wrap(bn), Wrap(Clamp.apply), Wrap(out)], Mse())
    opt = torch.optim.SGD(theirs.parameters(), lr=.1)
    for _ in range(5):
        x,y = rand(8, 4),rand(8, 3)
        h = theirs[0](x)
        h.retain_grad()
        loss = (theirs[1:](h)-y).pow(2).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        torch.testing.assert_close(ours(x, y), loss.detach(), rtol=1e-12, atol=0)
        ours.zero_grad()
        ours.backward()
        torch.testing.assert_close(ours.layers[0].out.g, h.grad, rtol=1e-10, atol=1e-14)
        with torch.no_grad():
            for p in ours.parameters(): p -= .1*p.g
    for a,b in ((bn.running_mean,theirs[1].running_mean),(bn.num_batches_tracked,theirs[1].num_batches_tracked),(out.weight,theirs[3].weight)):
        torch.testing.assert_close(a, b.detach() if b.is_floating_point() else b)

def test_output_that_depends_on_nothing():
    w,x = Wrap(lambda t: torch.ones(3)),rand(5, 4)
    w(x)
    w.backward(torch.ones(3))
    assert torch.equal(x.g, torch.zeros_like(x))

def test_backward_twice():
    "A record may be walked again; parameters accumulate."
    w,x = Wrap(nn.Linear(4, 3)).double(),rand(5, 4)
    out = w(x)
    w.backward(torch.ones_like(out))
    once = x.g,w.f.weight.g.clone()
    w.backward(torch.ones_like(out))
    assert torch.equal(x.g, once[0]) and torch.equal(w.f.weight.g, 2*once[1])

def test_what_is_not_wanted_is_not_computed():
    class Loud(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, b): return a*b
        @staticmethod
        def backward(ctx, g):
            asked.append(ctx.needs_input_grad)
            return g,g
    asked,x,y = [],rand(3),rand(3)
    w = Wrap(Loud.apply)
    w(const(x), y)
    w.backward(rand(3))
    assert asked==[(False,True)] and grad(x) is None and y.g is not None

def test_frozen():
    w,x = Wrap(nn.Linear(4, 3)),torch.randn(5, 4)
    w.freeze()
    w(x)
    w.unfreeze() # after the forward: the record knows nothing of it
    with pytest.raises(GradError, match="weight' got no .g"): w.backward(torch.ones(5, 3))
    w(x)
    w.backward(torch.ones(5, 3))
    assert w.f.weight.g is not None

@pytest.mark.parametrize('f', [lambda t: t*stranger, lambda t: stranger, lambda t: nn.functional.linear(t.exp(), stranger.view(1, 3))])
def test_stranger(f):
    with pytest.raises(GradError, match='neither its input nor its parameter'): Wrap(f)(torch.ones(2, 3))
stranger = torch.ones(3, requires_grad=True)

class Outside(Module):
    "Another tensor of the net, in what is wrapped, by way of an attribute"
    def __init__(self, f): self.lin,self.wrapped,self.f = Lin(3, 3),Wrap(lambda t: f(t, self)),f
    def forward(self, x):
        self.h = self.lin(x)
        return self.wrapped(self.lin(self.h))

@pytest.mark.parametrize('f', [lambda t,m: t@m.lin.w, lambda t,m: t+m.h, lambda t,m: torch.cat([t, m.h]), lambda t,m: nn.functional.linear(t, m.lin.w)])
def test_another_tensor_of_the_net(f):
    with pytest.raises(GradError, match=r'uses a tensor of shape .* that is neither its input nor its parameter'): Outside(f)(torch.ones(3, 3))

def test_another_tensor_of_the_net_beside_a_constant():
    class Beside(Module):
        def __init__(self): self.lin,self.add,self.wrapped = Lin(3, 3),Add(),Wrap(lambda c: c*self.h)
        def forward(self, x):
            self.h = self.lin(x)
            return self.add(self.h, self.wrapped(const(torch.ones(3))))
    with pytest.raises(GradError, match='neither its input nor its parameter'): Beside()(torch.randn(2, 3))

def test_constants_from_outside():
    x,c = rand(2, 3),const(rand(3))
    lin = Lin(3, 3).double().freeze()
    assert_grads(Wrap(lambda t: (t*c)@lin.w + torch.arange(3)), x)

def test_in_place():
    with pytest.raises(RuntimeError, match='in-place'): Wrap(nn.ReLU(inplace=True))(torch.randn(3))
    lin,x = Sequential(Lin(3, 3), Wrap(torch.exp)),torch.randn(2, 3)
    lin(x)
    lin[0].out.add_(1)
    with pytest.raises(GradError, match='changed in place'): lin.backward(torch.ones(2, 3))

def test_without_record():
    w,x = Wrap(nn.Linear(4, 3)),torch.randn(5, 4)
    with torch.no_grad(): assert not hasattr(w(x), 'pull')
    assert Wrap(torch.argmax)(x).dtype==torch.int64
    with pytest.raises(GradError, match='backward'): w.backward()

def test_memory_goes_with_the_record():
    import weakref
    net,x = Model([Lin(4, 4), Wrap(torch.exp)], Mse()),torch.randn(5, 4)
    net(x, torch.randn(5, 4))
    kept = weakref.ref(net.layers[1].out)
    net.backward(free=True)
    net.free()
    assert kept() is None

def test_under_autograd():
    "Where something requires grad, the wrapped module is autograd's."
    w,x = Wrap(nn.Linear(4, 3)).double(),rand(5, 4).requires_grad_()
    assert torch.autograd.gradcheck(w, x)
    w.requires_grad_()
    w(rand(5, 4)).sum().backward()
    assert w.f.weight.grad is not None

def test_names():
    assert repr(Wrap(torch.exp))=='Wrap(exp)' and 'f.weight' in dict(Wrap(nn.Linear(2, 2)).named_parameters())


# From torch and back

def seq(*layers): return nn.Sequential(*layers).double()
def bench():
    "Names, rows in rows, a layer without bias"
    return nn.Sequential(OrderedDict(body=seq(nn.Linear(4, 6), nn.LeakyReLU(.2)), flat=nn.Flatten(), head=seq(nn.Linear(6, 3, bias=False), nn.ReLU6())))

def assert_same(theirs, ours, x, y=()):
    "Outputs and gradients, of inputs and weights, are the same from a random upstream gradient."
    theirs = deepcopy(theirs).requires_grad_()
    t = x.clone().requires_grad_()
    torch.manual_seed(1)
    out = theirs(t, *y)
    g = torch.randn_like(out)
    out.backward(g)
    torch.manual_seed(1)
    ours.zero_grad()
    torch.testing.assert_close(ours(x, *y), out.detach(), rtol=1e-12, atol=1e-14)
    ours.backward(g)
    torch.testing.assert_close(x.g, t.grad, rtol=1e-12, atol=1e-14)
    for a,(n,b) in zip(theirs.parameters(), ours.named_parameters(), strict=True):
        assert b.g is b.grad
        torch.testing.assert_close(b.g.t() if n.split('.')[-1]=='w' else b.g, a.grad, rtol=1e-12, atol=1e-14)

# what is tested of each line of the table: options other than the defaults, an input, a target
layers = {nn.Linear: [((4,3),{}), ((4,2),{'bias':False})], nn.ReLU: [((),{})], nn.ReLU6: [((),{})], nn.LeakyReLU: [((),{}), ((.3,),{})], nn.Sigmoid: [((),{})],
    nn.Tanh: [((),{})], nn.Softmax: [((0,),{}), ((-1,),{})], nn.LogSoftmax: [((1,),{})], nn.Flatten: [((),{}), ((2,),{})], nn.Dropout: [((),{}), ((.2,),{})],
    nn.MSELoss: [((),{}), ((),{'reduction':'sum'})], nn.NLLLoss: [((),{}), ((),{'reduction':'sum'})], nn.BCEWithLogitsLoss: [((),{}), ((),{'reduction':'sum'})],
    nn.CrossEntropyLoss: [((),{}), ((),{'label_smoothing':.1,'reduction':'sum'})]}
each_layer = pytest.mark.parametrize('cls,args,kw', [(cls,*o) for cls,os in layers.items() for o in os])

def inputs(cls):
    if cls in (nn.NLLLoss,nn.CrossEntropyLoss): return rand(5, 4),[torch.randint(0, 4, (5,))]
    if cls in (nn.MSELoss,nn.BCEWithLogitsLoss): return rand(5, 4),[rand(5, 4).sigmoid()]
    return 4*rand(2, 5, 4),[]

def test_every_line_of_the_table_is_tested(): assert {p.theirs for p in pairs}==set(layers)

@each_layer
def test_layers(cls, args, kw):
    theirs,(x,y) = cls(*args, **kw).double(),inputs(cls)
    ours = from_torch(theirs)
    assert type(ours) is next(p.ours for p in pairs if p.theirs is cls)
    assert_same(theirs, ours, x, y)
    back = to_torch(ours)
    assert type(back) is cls and repr(back)==repr(theirs)
    assert_same(back, from_torch(back), x.clone(), y)
    for k,t in theirs.state_dict().items(): assert torch.equal(back.state_dict()[k], t)

def test_probabilities():
    loss = nn.CrossEntropyLoss(label_smoothing=.2)
    assert_same(loss, from_torch(loss), rand(5, 4), [rand(5, 4).softmax(-1)])

@pytest.mark.parametrize('copy', [True,False])
def test_nets(copy):
    "Nested, with names, an empty place, a layer used twice, a subclass that only fills the row."
    class Mlp(nn.Sequential):
        def __init__(self): super().__init__(nn.Linear(3, 3), nn.Tanh())
    mid = nn.Linear(3, 3)
    net = seq(bench(), nn.Identity(), mid, nn.Tanh(), mid, Mlp())
    ours = from_torch(net, copy)
    assert ours[2] is ours[4] and [n for n,_ in ours.named_modules()]==[n for n,_ in net.named_modules()]
    assert_same(net, ours, rand(5, 4))
    back = to_torch(ours, copy)
    assert back[2] is back[4] and list(back.state_dict())==list(net.state_dict())
    assert_same(back, from_torch(back, copy), rand(5, 4))
    for a,b in zip(net.state_dict().values(), back.state_dict().values()): assert torch.equal(a, b) and (a.data_ptr()==b.data_ptr()) is not copy

def test_model_goes_back_without_its_loss():
    m = Model([Lin(4, 3), Relu()], Mse())
    assert repr(to_torch(m))==repr(nn.Sequential(nn.Linear(4, 3), nn.ReLU())) and isinstance(to_torch(m.loss), nn.MSELoss)

def test_the_random_state_stays():
    net,state = nn.Sequential(nn.Linear(4, 3)),torch.get_rng_state()
    to_torch(from_torch(net))
    assert torch.equal(torch.get_rng_state(), state)

def shared_side(which):
    net = bench()
    ours = from_torch(net, copy=False)
    return (net,ours) if which=='theirs' else (ours,net)

@pytest.mark.parametrize('which', ['theirs','ours'])
@pytest.mark.parametrize('opt', [SGD,AdamW,torch.optim.AdamW,lambda ps,lr: torch.optim.SGD(ps, lr=lr, momentum=.9, foreach=False)])
def test_shared_updates_are_seen(which, opt):
    "Either side trains, also under autograd; the other gives the new output."
    changed,other = shared_side(which)
    x = rand(5, 4)
    o = opt(changed.requires_grad_().parameters(), lr=.1)
    for _ in range(3):
        o.zero_grad()
        changed(x).square().sum().backward()
        o.step()
    with torch.no_grad(): torch.testing.assert_close(other(x), changed(x), rtol=1e-12, atol=1e-14)
    assert all(p.grad is None for p in other.parameters())
    changed.load_state_dict({k:torch.ones_like(v) for k,v in changed.state_dict().items()})
    assert all((p==1).all() for p in other.parameters())

def test_shared_weights_in_checkpoints(tmp_path):
    net,ours = shared_side('theirs')
    save_weights(ours, tmp_path/'f')
    before = deepcopy(ours.state_dict())
    for p in net.parameters(): p.detach().zero_()
    assert all((p==0).all() for p in ours.parameters())
    load_weights(ours, tmp_path/'f')
    assert all(torch.equal(a, b) for a,b in zip(ours.state_dict().values(), before.values(), strict=True))
    assert torch.equal(net.body[0].weight, before['body.0.w'].t())
    both = deepcopy(ours)
    assert torch.equal(both.body[0].w, ours.body[0].w) and both.body[0].w.data_ptr()!=ours.body[0].w.data_ptr()

def test_shared_weights_compiled():
    "One graph for the whole step on a transposed view; torch's side sees the update."
    def run(copy, compiled):
        torch.manual_seed(0)
        net = bench()
        m = Model(from_torch(net, copy), Mse())
        opt = SGD(m.parameters(), lr=.1, momentum=.9)
        def step(x, y):
            loss = m(x, y)
            m.backward()
            opt.step()
            opt.zero_grad()
            return loss
        step = torch.compile(step, fullgraph=True, backend='eager') if compiled else step
        losses = [step(rand(5, 4), rand(5, 3)).item() for _ in range(4)]
        assert torch.equal(net.body[0].weight, m.layers.body[0].w.t()) is not copy
        return losses
    torch.testing.assert_close(run(False, True), run(True, False), rtol=1e-12, atol=1e-14)

def test_copies_are_apart():
    net = bench()
    ours = from_torch(net)
    memory = {p.untyped_storage().data_ptr() for p in net.parameters()}
    assert all(p.is_contiguous() and p.untyped_storage().data_ptr() not in memory for p in [*ours.parameters(), *to_torch(ours).parameters()][:3])

def tied():
    a,b = nn.Linear(4, 4),nn.Linear(4, 4, bias=False)
    b.weight = a.weight
    return seq(a, nn.Tanh(), b)

@pytest.mark.parametrize('copy', [True,False])
def test_ties(copy):
    net = tied()
    ours = from_torch(net, copy)
    assert ours[0].w is ours[2].w
    assert_same(net, ours, rand(5, 4))
    back = to_torch(ours, copy)
    assert back[0].weight is back[2].weight and len(list(back.parameters()))==2
    a,b = nn.GRU(3, 3).double(),nn.GRU(3, 3).double()
    b.weight_hh_l0 = a.weight_hh_l0
    ours = from_torch(nn.Sequential(a, b), copy, wrap=True)
    assert ours[0].f.weight_hh_l0 is ours[1].f.weight_hh_l0 and (ours[0].f.weight_hh_l0.data_ptr()==a.weight_hh_l0.data_ptr()) is not copy

def test_ties_inside_what_is_wrapped():
    "A BatchNorm in two modules: its statistics are one, too."
    class Normed(nn.Module):
        def __init__(self, bn):
            super().__init__()
            self.bn = bn
        def forward(self, x): return self.bn(x).exp()
    bn = nn.BatchNorm1d(3)
    ours = from_torch(nn.Sequential(Normed(bn), Normed(bn)), wrap=True)
    assert ours[0] is not ours[1] and ours[0].f.bn is ours[1].f.bn is not bn

def test_a_tie_that_cannot_stay():
    emb,lin = nn.Embedding(4, 3),nn.Linear(3, 4, bias=False)
    lin.weight = emb.weight
    for row in ((emb,lin), (lin,emb)):
        with pytest.raises(ValueError, match=r"1: its weight of shape \(4, 3\) is also that of 0"): from_torch(nn.Sequential(*row), wrap=True)
    ours = Sequential(Lin(3, 4), Wrap(nn.Embedding(4, 3)))
    ours[1].f.weight = ours[0].w
    with pytest.raises(ValueError, match="1: its weight"): to_torch(ours)

def test_mode_and_frozen():
    net = seq(nn.Linear(4, 3), nn.Dropout().eval(), nn.Linear(3, 3).eval(), nn.GELU(), nn.BatchNorm1d(3).eval())
    net[0].weight.requires_grad_(False)
    net[4].bias.requires_grad_(False)
    flags = [p.requires_grad for p in net.parameters()]
    for copy in (True,False):
        ours = from_torch(net, copy, wrap=True)
        assert [m.training for m in ours[:3]]==[True,False,False] and ours.training and not ours[4].f.training
        assert not any(p.requires_grad for p in ours.parameters()) and [wants(p) for p in ours.parameters()]==flags
        ours(rand(5, 4))
        ours.backward(rand(5, 3))
        assert grad(ours[0].w) is None and ours[0].b.g is not None
        back = to_torch(ours, copy)
        assert [p.requires_grad for p in back.parameters()]==flags==[p.requires_grad for p in net.parameters()]
        assert [m.training for m in back]==[m.training for m in net] and repr(back)==repr(net)

@pytest.mark.parametrize('copy', [True,False])
def test_wrapped(copy):
    "Layers of both kinds; buffers are the other side's too if shared; the inside comes back."
    torch.manual_seed(0)
    net = seq(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.GELU(), nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 3)))
    with pytest.raises(ValueError): from_torch(net, copy)
    ours = from_torch(net, copy, wrap=True)
    assert [type(m) for m in ours]==[Lin,Wrap,Wrap,Sequential] and type(ours[3][0]) is Wrap
    x,before = rand(5, 4),net[1].running_mean.clone()
    assert_same(net, ours, x)
    assert torch.equal(net[1].running_mean, before) is copy and ours[1].f.running_mean.any()
    back = to_torch(ours, copy)
    assert repr(back)==repr(net) and list(back.state_dict())==list(net.state_dict())
    assert_same(back.eval(), ours.eval(), x.clone())

class Net(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.lins,self.act,self.times = nn.ModuleDict(dict(a=nn.Linear(4, 4), b=nn.Linear(4, 4))),act,2
        self.none = None
    def forward(self, x):
        for _ in range(self.times): x = self.act(self.lins['a'](x))
        return self.last(x)
    def last(self, x): return self.lins['b'](x)

class Clash(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(4, 4)
    def forward(self, x): return self.out(x)
    def free(self): pass

class Scaled(nn.Sequential):
    def __init__(self, *layers):
        super().__init__(*layers)
        self.w = nn.Parameter(torch.ones(4))
    def forward(self, x): return super().forward(x)*self.w

class Raw(Net):
    def forward(self, x): return super().forward(x)+1

class Backwards(nn.Sequential):
    def forward(self, x): return self[0](self[1](x))

@pytest.mark.parametrize('copy', [True,False])
@pytest.mark.parametrize('make', [lambda: Net(nn.Tanh()), lambda: seq(nn.Linear(4, 4), Net(nn.Tanh()), nn.Sigmoid()),
    lambda: Backwards(nn.ReLU(), nn.Linear(4, 4))], ids=['class','inside','sequential'])
def test_class_of_its_own(make, copy):
    "Its forward calls the converted parts; it stays what it is on the other side, and on the way back."
    torch.manual_seed(0)
    net = make().double().eval()
    was,ours = repr(net),from_torch(net, copy)
    assert repr(net)==was and isinstance(ours, Module) and not any(m.training for m in ours.modules())
    assert not any(isinstance(m, nn.Linear) for m in ours.modules())
    assert_same(net, ours, rand(5, 4))
    assert_grads(deepcopy(ours), rand(5, 4))
    back = to_torch(ours, copy)
    assert repr(back)==was and [type(m) for m in back.modules()]==[type(m) for m in net.modules()]
    assert_same(back, ours, rand(5, 4))
    assert all((a is b) is False and (a.data_ptr()==b.data_ptr()) is (not copy) for a,b in zip(net.parameters(), back.parameters()))

def test_raw_operations_in_a_class_of_its_own():
    ours = from_torch(Raw(nn.Tanh()))
    with pytest.raises(GradError, match='raw operation'): ours(torch.randn(5, 4))
    ours.requires_grad_()(torch.randn(5, 4)).sum().backward()
    assert all(p.grad is not None for p in ours.parameters())
    assert type(from_torch(Raw(nn.Tanh()), wrap=True)) is Wrap

class Odd(nn.Linear):
    def forward(self, x): return -super().forward(x)

def hooked():
    lin = nn.Linear(4, 4)
    lin.register_forward_hook(lambda m, i, o: 2*o)
    return lin

bad = {
    'name': (nn.Sequential(OrderedDict(a=nn.Linear(4, 4), b=nn.Sequential(OrderedDict(bn=nn.BatchNorm1d(4))))), 'b.bn: BatchNorm1d has no counterpart'),
    'own': (Net(nn.GELU()), '^from_torch: act: GELU has no counterpart'),
    'clash': (nn.Sequential(Clash()), r"0: Clash has attributes \['free', 'out'\], which a fnnlite module has of its own"),
    'parameter': (nn.Sequential(Scaled(nn.Tanh())), '0: Scaled has no counterpart'),
    'subclass': (nn.Sequential(Odd(4, 4)), '0: Odd has no counterpart'),
    'inplace': (nn.Sequential(nn.ReLU(inplace=True)), '0: ReLU has inplace=True'),
    'weight': (nn.CrossEntropyLoss(torch.ones(3)), r'CrossEntropyLoss has weight=a tensor of shape \(3,\)'),
    'ignore': (nn.NLLLoss(ignore_index=0), 'NLLLoss has ignore_index=0'),
    'pos': (nn.BCEWithLogitsLoss(pos_weight=torch.ones(3)), 'pos_weight=a tensor'),
    'none': (nn.MSELoss(reduction='none'), "MSELoss has reduction='none'"),
    'dim': (nn.Sequential(nn.Softmax()), '0: Softmax has dim=None'),
    'end': (nn.Flatten(1, 2), 'Flatten has end_dim=2'),
    'hook': (nn.Sequential(hooked()), '0: Linear has hooks'),
    'all': (nn.Sequential(nn.GELU(), nn.ReLU(), nn.ELU()), '0: GELU has no counterpart.*; 2: ELU has no counterpart'),
    'ours': (nn.Sequential(Lin(3, 4)), "0: Lin is fnnlite's already")}

@pytest.mark.parametrize('net,match', bad.values(), ids=bad)
def test_no_counterpart(net, match):
    with pytest.raises(ValueError, match=match): from_torch(net)
    if 'inplace' in match or 'already' in match:
        with pytest.raises(ValueError, match=match): from_torch(net, wrap=True)
    else: assert any(isinstance(m, Wrap) for m in from_torch(net, wrap=True).modules())

def test_nothing_but_modules():
    for f in (from_torch,to_torch):
        with pytest.raises(TypeError, match=f'{f.__name__}: got a builtin_function_or_method, expected a torch.nn.Module'): f(torch.exp)

class Mine(Lin):
    def bwd(self, out, inp): super().bwd(out, inp)

@pytest.mark.parametrize('net,match', [
    (Sequential(Lin(3, 3), Sequential(Relu(sub=.5))), r'1.0: Relu has sub=0.5'), (Relu(leak=.1, maxv=6.), 'Relu has leak=0.1, maxv=6.0'),
    (Sequential(Log()), '0: Log has no counterpart in torch.nn'), (Mine(3, 4), 'Mine has no counterpart'),
    (Sequential(Wrap(torch.exp)), r'0: Wrap\(exp\) wraps a function')])
def test_no_way_back(net, match):
    with pytest.raises(ValueError, match=match): to_torch(net)

def test_wrap_of_hooks_keeps_them():
    net,x = seq(hooked()),rand(5, 4)
    assert_same(net, from_torch(net, wrap=True), x)

def test_weights_of_torch_s_file(tmp_path):
    "A net that shares memory with ours translates names and shapes, both ways."
    net,model = bench(),Model(from_torch(bench()), Mse())
    save_file(net.state_dict(), tmp_path/'theirs')
    load_weights(to_torch(model, copy=False), tmp_path/'theirs')
    x = rand(5, 4)
    torch.testing.assert_close(model.layers(x), net(x).detach(), rtol=1e-12, atol=1e-14)
    save_weights(to_torch(model), tmp_path/'ours')
    for k,t in load_file(tmp_path/'ours').items(): assert torch.equal(t, net.state_dict()[k])
