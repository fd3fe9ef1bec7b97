"torch's own layers and functions inside a net of fnnlite's, against the same net by autograd alone."
from copy import deepcopy
import pytest, torch
from torch import nn
from fnnlite import GradError, Lin, Model, Module, Mse, Sequential, Wrap
from fnnlite.record import const, grad
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

class Keyword(Module):
    def __init__(self): self.lin,self.pair = Lin(4, 3),Wrap(Pair())
    def forward(self, x):
        out = self.pair(x, b=self.lin(x))
        return out['s'],out['p'][0]

cases = {'function': (lambda: Wrap(torch.tanh), 5, 4), 'Function': (lambda: Wrap(Clamp.apply), 5, 4), 'module': (lambda: Wrap(nn.Linear(4, 3)), 5, 4),
    'identity': (lambda: Wrap(lambda t: t), 5, 4), 'view': (lambda: Wrap(nn.Flatten()), 2, 3, 4), 'chunk': (lambda: Wrap(lambda t: t.chunk(2)), 4, 4),
    'dropout': (lambda: Wrap(nn.Dropout()), 5, 4), 'lstm': (lambda: Wrap(nn.LSTM(4, 3)), 5, 2, 4),
    'batchnorm': (lambda: Wrap(nn.BatchNorm1d(4)), 5, 4), 'attention': (Twice, 2, 5, 4), 'keyword': (Keyword, 5, 4)}

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
