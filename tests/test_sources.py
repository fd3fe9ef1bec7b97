"The five tutorials that the lessons come from: each one's computation in plain numpy or torch, and in fnnlite, from the same start."
import math, random
import numpy as np, pytest, torch
from torch import nn
from fnnlite import NLL, SGD, Adam, Lin, Log, Model, Module, Mse, Relu, Sequential, Softmax, Wrap, const, load_mnist
from fnnlite.data.digits import normalize

steps = 50
each_dtype = pytest.mark.parametrize('dtype', [torch.float64,torch.float32], ids=['float64','float32'])

def same(dtype, theirs, ours, weights):
    "The losses of all steps, and the final weights, as pairs (theirs, ours)"
    rtol = 1e-10 if dtype==torch.float64 else 1e-4
    assert len(theirs)==len(ours)>=steps and theirs[-1]<theirs[0]
    np.testing.assert_allclose(ours, theirs, rtol=rtol)
    for a,b in weights:
        a,b = torch.as_tensor(a).detach(),torch.as_tensor(b).detach()
        assert a.dtype==b.dtype==dtype
        torch.testing.assert_close(b, a, rtol=rtol, atol=rtol*a.abs().max().item())

def train(model, opt, x, y):
    losses = []
    for _ in range(steps):
        losses.append(model(const(x), const(y)).item())
        model.backward()
        opt.step()
        opt.zero_grad()
    return losses

@pytest.fixture(scope='module')
def mnist(): return load_mnist()


@each_dtype
def test_foundations(mnist, dtype):
    "fastai: 784-50-1, a shifted ReLU, squared error against the digit, gradients by hand."
    x,y = normalize(mnist.x_train, *mnist.stats())[:1000].to(dtype),mnist.y_train[:1000].to(dtype)
    torch.manual_seed(0)
    start = torch.randn(784, 50)*math.sqrt(2/784),torch.zeros(50),torch.randn(50, 1)/math.sqrt(50),torch.zeros(1)
    w1,b1,w2,b2 = (t.to(dtype, copy=True) for t in start)
    lin1,lin2 = Lin(w1.clone(), b1.clone()),Lin(w2.clone(), b2.clone())
    model = Model([lin1, Relu(sub=.5), lin2], Mse())

    losses,lr = [],.005
    for step in range(steps):
        h = x@w1+b1
        r = h.clamp_min(0.)-.5
        out = r@w2+b2
        diff = out.squeeze(-1)-y
        losses.append(diff.pow(2).mean().item())
        g_out = (2*diff/len(x)).unsqueeze(-1)
        g_h = g_out@w2.t()*(h>0)
        gs = x.t()@g_h,g_h.sum(0),r.t()@g_out,g_out.sum(0)
        if step==0: # and the gradient of the images
            model(x, y)
            model.backward()
            rtol = 1e-10 if dtype==torch.float64 else 1e-3
            for a,b in zip((x,*model.parameters()), (g_h@w1.t(),*gs)): torch.testing.assert_close(a.g, b, rtol=rtol, atol=rtol/1e3)
            model.zero_grad()
        for t,g in zip((w1,b1,w2,b2), gs): t -= lr*g
    ours = train(model, SGD(model.parameters(), lr=lr), x, y)
    same(dtype, losses, ours, [(w1,lin1.w), (b1,lin1.b), (w2,lin2.w), (b2,lin2.b)])


def feed_forward_start(mnist, dtype, n=2000):
    rng = np.random.default_rng(0)
    x = np.concatenate([mnist.x_train[:n].numpy(), np.ones((n,1))], 1)
    kind = np.dtype(str(dtype).removeprefix('torch.'))
    return [o.astype(kind) for o in (x, rng.normal(size=(785,100)), rng.normal(size=(100,10)))],mnist.y_train[:n]

def feed_forward(w1, w2): return Model([Lin(torch.tensor(w1)), Relu(), Lin(torch.tensor(w2)), Softmax(), Log(1e-12)], NLL('sum'))

@each_dtype
def test_numpy(mnist, dtype):
    "785-100-10, a column of ones for the bias, softmax and log, the Jacobian written out, gradient descent on the summed loss."
    (x,w1,w2),y = feed_forward_start(mnist, dtype)
    model = feed_forward(w1, w2)
    one_hot,losses = np.eye(10, dtype=x.dtype)[y],[]
    for _ in range(steps):
        h = x@w1
        r = np.where(h>0, h, 0)
        z = r@w2
        e = np.exp(z-z.max(1, keepdims=True))
        p = e/e.sum(1, keepdims=True)
        losses.append(-(np.log(p+1e-12)*one_hot).sum())
        g_p = -one_hot/(p+1e-12)
        if dtype==torch.float64: g_z = np.einsum('nij,ni->nj', p[:,:,None]*np.eye(10)-p[:,:,None]*p[:,None,:], g_p)
        else: g_z = p*(g_p-(g_p*p).sum(1, keepdims=True)) # the Jacobian's terms cancel in too few digits
        g_h = np.where(h>0, g_z@w2.T, 0)
        w1,w2 = w1-1e-5*(x.T@g_h).astype(x.dtype),w2-1e-5*(r.T@g_z).astype(x.dtype)
    ours = train(model, SGD(model.parameters(), lr=1e-5), torch.tensor(x), y)
    same(dtype, losses, ours, [(w1,model.layers[0].w), (w2,model.layers[2].w)])

@each_dtype
def test_framework(mnist, dtype):
    "The same net by autograd, with the gradient of the probabilities."
    (x,w1,w2),y = feed_forward_start(mnist, dtype)
    model,x = feed_forward(w1, w2),torch.tensor(x)
    v1,v2 = (torch.tensor(w).requires_grad_() for w in (w1,w2))
    losses = []
    for step in range(steps):
        p = (x@v1).relu().matmul(v2).softmax(1)
        p.retain_grad()
        loss = -(p+1e-12).log().gather(1, y[:,None]).sum()
        losses.append(loss.item())
        loss.backward()
        if step==0:
            model(x, y)
            model.backward()
            ours = model.layers[3].out.g
            torch.testing.assert_close(ours, p.grad, rtol=1e-6 if dtype==torch.float64 else 1e-2, atol=0)
            model.zero_grad()
        with torch.no_grad():
            for v in (v1,v2):
                v -= 1e-5*v.grad
                v.grad = None
    same(dtype, losses, train(model, SGD(model.parameters(), lr=1e-5), x, y), [(v1,model.layers[0].w), (v2,model.layers[2].w)])


def lin_of(l): return Lin(l.weight.detach().t().clone(), None if l.bias is None else l.bias.detach().clone())

def pairs(net, layers):
    "Pairs of the weights of torch's layers and of ours"
    return [(a.weight.t(),b.w) for a,b in zip(net, layers)] + [(a.bias,b.b) for a,b in zip(net, layers) if a.bias is not None]

def train_torch(net, opt, x, y):
    losses = []
    for _ in range(steps):
        loss = (net(x)-y).pow(2).sum()
        losses.append(loss.item())
        opt.zero_grad()
        loss.backward()
        opt.step()
    return losses

def random_data(dtype):
    torch.manual_seed(0)
    return [torch.randn(*shape).to(dtype) for shape in ((64,1000), (64,10), (1000,100), (100,10))]

class NoBias(Module):
    def __init__(self, lin1, lin2): self.lin1,self.relu,self.lin2 = lin1,Relu(),lin2
    def forward(self, x): return self.lin2(self.relu(self.lin1(x)))

@each_dtype
def test_ladder(dtype):
    "64×1000 → 100 → 10: numpy by hand; layers as they come, and with normal weights; Adam; a class without biases."
    x,y,w1,w2 = random_data(dtype)
    lin1,lin2 = Lin(w1.clone()),Lin(w2.clone())
    model = Model([lin1, Relu(), lin2], Mse('sum'))
    ours = train(model, SGD(model.parameters(), lr=1e-6), x, y)
    a,b,v1,v2 = (t.numpy().copy() for t in (x,y,w1,w2))
    losses,lr = [],v1.dtype.type(1e-6)
    for _ in range(steps):
        h = a@v1
        r = np.maximum(h, 0)
        p = r@v2
        losses.append(((p-b)**2).sum())
        g_p = 2*(p-b)
        g_v2,g_h = r.T@g_p,g_p@v2.T
        g_h[h<0] = 0
        v1 -= lr*(a.T@g_h)
        v2 -= lr*g_v2
    same(dtype, losses, ours, [(v1,lin1.w), (v2,lin2.w)])

    for bias,normal,opts in ((True,False,(torch.optim.SGD,SGD,1e-6)), (True,True,(torch.optim.SGD,SGD,1e-6)), (False,False,(torch.optim.Adam,Adam,1e-4))):
        net = [nn.Linear(1000, 100, bias=bias, dtype=dtype),nn.Linear(100, 10, bias=bias, dtype=dtype)]
        if normal: [nn.init.normal_(l.weight) for l in net]
        lins = [lin_of(l) for l in net]
        model = Model([lins[0], Relu(), lins[1]] if bias else NoBias(*lins), Mse('sum'))
        theirs = nn.Sequential(net[0], nn.ReLU(), net[1])
        their_opt,our_opt,lr = opts
        losses = train_torch(theirs, their_opt(theirs.parameters(), lr=lr), x, y)
        same(dtype, losses, train(model, our_opt(model.parameters(), lr=lr), x, y), pairs(net, lins))


class Clamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inp):
        ctx.save_for_backward(inp)
        return inp.clamp(min=0)
    @staticmethod
    def backward(ctx, g): return torch.where(ctx.saved_tensors[0]>0, g, 0.)

class TorchDynamic(nn.Module):
    def __init__(self, *lins):
        super().__init__()
        self.first,self.middle,self.last = lins
    def forward(self, x):
        h = self.first(x).clamp(min=0)
        for _ in range(random.randint(0, 3)): h = self.middle(h).clamp(min=0)
        return self.last(h)

class Dynamic(Module):
    def __init__(self, *lins): (self.first,self.middle,self.last),self.relu = lins,Relu()
    def forward(self, x):
        h = self.relu(self.first(x))
        for _ in range(random.randint(0, 3)): h = self.relu(self.middle(h))
        return self.last(h)

@each_dtype
def test_dynamic(dtype):
    "A function with its own backward; momentum; a net that draws how often it uses its middle layer."
    x,y,w1,w2 = random_data(dtype)
    lin1,lin2 = Lin(w1.clone()),Lin(w2.clone())
    model = Model(Sequential(lin1, Wrap(Clamp.apply), lin2), Mse('sum'))
    v1,v2 = (w.clone().requires_grad_() for w in (w1,w2))
    losses = train_torch(lambda x: Clamp.apply(x@v1)@v2, torch.optim.SGD([v1,v2], lr=1e-6), x, y)
    same(dtype, losses, train(model, SGD(model.parameters(), lr=1e-6), x, y), [(v1,lin1.w), (v2,lin2.w)])

    net = [nn.Linear(ni, nf, dtype=dtype) for ni,nf in ((1000,100), (100,100), (100,10))]
    lins = [lin_of(l) for l in net]
    theirs,model = TorchDynamic(*net),Model(Dynamic(*lins), Mse('sum'))
    random.seed(0)
    losses = train_torch(theirs, torch.optim.SGD(theirs.parameters(), lr=1e-4, momentum=.9), x, y)
    random.seed(0)
    same(dtype, losses, train(model, SGD(model.parameters(), lr=1e-4, momentum=.9), x, y), pairs(net, lins))
