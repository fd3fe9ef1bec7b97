"A fnnlite model in other people's trainers: from the same start, on the same batches, the losses are those of the same net made of torch's layers."
from copy import deepcopy
import pytest, torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset
from fnnlite import CrossEntropy, Dropout, Lin, Model, Relu, Sequential, const

steps,clip = 12,.2
plain_loss = nn.CrossEntropyLoss()
each_dtype = pytest.mark.parametrize('dtype,rtol', [(torch.float64,1e-10), (torch.float32,1e-5)], ids=['float64','float32'])

def nets(dtype):
    "torch's and ours, the weights the same"
    torch.manual_seed(0)
    lins = [nn.Linear(8, 16, dtype=dtype),nn.Linear(16, 16, dtype=dtype),nn.Linear(16, 3, dtype=dtype)]
    a,b,c = [Lin(l.weight.detach().t().clone(), l.bias.detach().clone()) for l in lins]
    return nn.Sequential(lins[0], nn.ReLU(), lins[1], nn.Dropout(.2), nn.LeakyReLU(.1), lins[2]),Sequential(a, Relu(), b, Dropout(.2), Relu(.1), c)

def batches(dtype):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(steps*16, 8, generator=g).to(dtype)
    return DataLoader(TensorDataset(x, (x[:,:3]+x[:,3:6]**2).argmax(1)), batch_size=16)

def tools(net):
    opt = torch.optim.AdamW(net.parameters(), lr=.01, weight_decay=.1)
    return opt,OneCycleLR(opt, .03, total_steps=steps)

def weights(net): return [p.detach().t() if p.ndim==2 and isinstance(m, nn.Linear) else p.detach() for m in net.modules() for p in m._parameters.values()]

def same(train, dtype, rtol, ours_too=()):
    "The losses of torch's net and of ours, and the weights in the end."
    theirs,ours = nets(dtype)
    start = deepcopy(weights(theirs))
    torch.manual_seed(2)
    losses = train(theirs, plain_loss, batches(dtype))
    for f in (train,*ours_too):
        net = deepcopy(ours)
        torch.manual_seed(2)
        our_losses = f(net, CrossEntropy(), batches(dtype))
        assert len(losses)==len(our_losses)==steps and losses[-1]<losses[0]
        torch.testing.assert_close(our_losses, losses, rtol=rtol, atol=0)
        for a,b,c in zip(weights(theirs), weights(net), start, strict=True):
            assert a.dtype==b.dtype==dtype and not torch.equal(a, c)
            torch.testing.assert_close(b, a, rtol=rtol, atol=rtol)

def plain(net, loss_func, dl):
    "The loop that everyone writes."
    (opt,sched),losses = tools(net),[]
    for x,y in dl:
        loss = loss_func(net(x), y)
        loss.backward()
        assert clip_grad_norm_(net.parameters(), clip)>clip
        opt.step()
        sched.step()
        opt.zero_grad()
        losses.append(loss.item())
    return losses

def by_record(net, loss_func, dl):
    "The same loop, without autograd: `model.backward()` walks the record."
    model = Model(net, loss_func)
    (opt,sched),losses = tools(model),[]
    for x,y in dl:
        losses.append(model(const(x), y).item())
        model.backward()
        assert all(p.g is p.grad is not None for p in model.parameters())
        assert clip_grad_norm_(model.parameters(), clip)>clip
        opt.step()
        sched.step()
        opt.zero_grad()
    return losses

@each_dtype
def test_plain_loop(dtype, rtol): same(plain, dtype, rtol, [by_record])

@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)

def test_fabric(tmp_path, double):
    "Lightning Fabric in double precision (it makes what a net returns of the default dtype); its checkpoint, too."
    from lightning_fabric import Fabric
    def train(net, loss_func, dl):
        fabric,losses = Fabric(accelerator='cpu', devices=1, precision='64-true'),[]
        opt,sched = tools(net)
        net,opt = fabric.setup(net, opt)
        for x,y in fabric.setup_dataloaders(dl):
            loss = loss_func(net(x), y)
            fabric.backward(loss)
            fabric.clip_gradients(net, opt, max_norm=clip)
            opt.step()
            sched.step()
            opt.zero_grad()
            losses.append(loss.item())
        fabric.save(tmp_path/'f', {'net':net, 'opt':opt})
        last = [p.detach().clone() for p in net.parameters()]
        for p in net.parameters(): p.data.zero_()
        fabric.load(tmp_path/'f', {'net':net, 'opt':opt}, weights_only=True)
        assert all(map(torch.equal, net.parameters(), last))
        return losses
    same(train, torch.float64, 1e-10)

def test_accelerate():
    "Hugging Face Accelerate, each batch in two accumulated halves."
    from accelerate import Accelerator
    def train(net, loss_func, dl):
        acc,losses = Accelerator(cpu=True, gradient_accumulation_steps=2),[]
        opt,sched = tools(net)
        net,opt,dl,sched = acc.prepare(net, opt, dl, sched)
        for x,y in dl:
            for half in (slice(0, 8),slice(8, 16)):
                with acc.accumulate(net):
                    loss = loss_func(net(x[half]), y[half])
                    acc.backward(loss)
                    if acc.sync_gradients: acc.clip_grad_norm_(net.parameters(), clip)
                    opt.step()
                    sched.step()
                    opt.zero_grad()
            losses.append(loss.item())
        return losses
    same(train, torch.float64, 1e-10)

@each_dtype
@pytest.mark.filterwarnings('ignore') # fastai's own, and those of its hundred dependencies
def test_fastai(dtype, rtol):
    "fastai's Learner, in an environment of its own: it brings half a gigabyte."
    pytest.importorskip('fastai', reason="fastai isn't a test dependency: pip install fastai 'torch>=2.10,<2.14' in an environment of its own")
    import fastai.callback.schedule # noqa: F401, gives Learner its fit_one_cycle
    from fastai.callback.core import Callback
    from fastai.callback.training import GradientClip
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    class Losses(Callback):
        def after_batch(self): losses.append(self.loss.item())
    losses = []
    def train(net, loss_func, dl):
        losses.clear()
        learn = Learner(DataLoaders(dl, dl), net, loss_func, wd=.1, wd_bn_bias=True, cbs=[Losses(), GradientClip(clip)])
        # without wd_bn_bias fastai spares what is called bias, and ours is called b
        if dtype==torch.float64: learn.remove_cb(learn.recorder) # whose mean is float32 only
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, .03)
        return losses[:steps]
    same(train, dtype, rtol)
