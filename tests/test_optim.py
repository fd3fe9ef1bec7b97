"Each optimizer follows torch.optim's trajectory, alone and as the end of a training step."
import copy, pickle
from functools import partial
import pytest, torch
import torch.nn.functional as TF
from torch import nn
from torch.optim import lr_scheduler
from fnnlite import Lin, Relu, CrossEntropy, Mse, Model, SGD, Adam, AdamW, RMSprop
from fnnlite.train import optimizers as optim
import helpers
from helpers import rand

opts = [(SGD, {}), (SGD, dict(momentum=.9)), (SGD, dict(momentum=.9, weight_decay=.1)),
    (SGD, dict(momentum=.8, nesterov=True, weight_decay=.01)), (SGD, dict(weight_decay=.1)),
    (RMSprop, {}), (RMSprop, dict(alpha=.9, eps=1e-3)), (RMSprop, dict(momentum=.9)), (RMSprop, dict(momentum=.5, weight_decay=.1)),
    (Adam, {}), (Adam, dict(betas=(.8,.9), eps=1e-4)), (Adam, dict(weight_decay=.1)),
    (AdamW, {}), (AdamW, dict(weight_decay=.3, betas=(.5,.99))), (AdamW, dict(weight_decay=0.))]
each_opt = pytest.mark.parametrize('cls,kw', opts, ids=lambda o: o.__name__ if isinstance(o, type) else ','.join(f'{k}={v}' for k,v in o.items()))

close = partial(helpers.close, rtol=1e-11, atol=1e-13)

def twin(cls, params, **kw):
    "torch's optimizer of the same name and options"
    return getattr(torch.optim, cls.__name__)(params, **{'lr':1e-2 if cls is RMSprop else 1e-3, **kw})

def params(): return [nn.Parameter(rand(*s)) for s in ((4,3),(3,),(),(2,2,2),(5,))]
def copies(ps): return [nn.Parameter(p.detach().clone()) for p in ps]

def groups(ps, **more): return [dict(params=ps[:2]), dict(params=ps[2:], **more)]
def own(cls): return dict(lr=.03, weight_decay=.05, **({'momentum':.7} if cls in (SGD,RMSprop) else {'betas':(.7,.95)}))
def pair(cls, kw):
    "Ours and torch's, on the same numbers in two groups, the second with options of its own."
    ps,o = params(),own(cls)
    qs = copies(ps)
    return ps,cls(groups(ps, **o), **kw),qs,twin(cls, groups(qs, **o), **kw)

def steps(ps, opt, qs, ref, n, at=0):
    "`n` steps with the same gradients, which depend on the weights; some parameters have none on some steps."
    g = torch.Generator().manual_seed(at)
    for i in range(at, at+n):
        for j,(p,q) in enumerate(zip(ps, qs)):
            r = torch.randn(p.shape, generator=g, dtype=torch.float64)
            p.grad,q.grad = (None,None) if j==1 and i%3==0 or j==4 and i<5 else (p*.3+r, q*.3+r)
        opt.step()
        ref.step()
        close(ps, qs)


# One step after another

@each_opt
def test_trajectory(cls, kw):
    "100 steps; the learning rates change in between, of one group and of all."
    ps,opt,qs,ref = pair(cls, kw)
    start = [p.clone() for p in ps]
    steps(ps, opt, qs, ref, 40)
    opt.param_groups[1]['lr'] = ref.param_groups[1]['lr'] = .2
    steps(ps, opt, qs, ref, 30, 40)
    opt.lr = .004
    for group in ref.param_groups: group['lr'] = .004
    steps(ps, opt, qs, ref, 30, 70)
    assert all((p-s).abs().max()>1e-3 for p,s in zip(ps, start)) # it went somewhere

@pytest.mark.parametrize('cls,kw', [opts[i] for i in (0,3,8,11,13)])
@pytest.mark.parametrize('how', ['direct','saved','deepcopy','pickle'])
def test_goes_on_from_a_copy(cls, kw, how, tmp_path):
    "Also after the old one has gone on by itself, on other parameters."
    ps,opt,qs,ref = pair(cls, kw)
    steps(ps, opt, qs, ref, 10)
    opt.lr = .02
    for group in ref.param_groups: group['lr'] = .02
    if how in ('deepcopy','pickle'):
        new = copy.deepcopy(opt) if how=='deepcopy' else pickle.loads(pickle.dumps(opt))
        ps2 = [p for group in new.param_groups for p in group['params']]
        assert not any(p is q for p,q in zip(ps, ps2)) and type(new) is cls
    else:
        ps2 = copies(ps)
        new = cls(groups(ps2), lr=.5)
        state = opt.state_dict()
        if how=='saved':
            torch.save(state, tmp_path/'opt.pt')
            state = torch.load(tmp_path/'opt.pt', weights_only=True)
        new.load_state_dict(state)
    if how!='direct': # torch's load_state_dict shares the memory of a state_dict in use
        for p in ps: p.grad = torch.ones_like(p)
        opt.step()
    assert new.lr==.02
    close(ps2, qs)
    steps(ps2, new, qs, ref, 20, 10)
    new.lr = .3
    assert new.lr==.3 and opt.lr==.02

def test_portions(monkeypatch):
    "A few tensors at a time, and the trajectory of all at once."
    of = lambda *ns: [[len(p) for p in ps] for ps in optim._portions([torch.empty(n) for n in ns], 8)]
    assert of(3, 5, 9, 1, 1)==[[3,5],[9],[1,1]] and of()==[] and of(20)==[[20]]
    for cls in (SGD,RMSprop,Adam,AdamW):
        ends,start,whole = [],params(),optim._portions
        for most in (1,2**20):
            with monkeypatch.context() as m:
                m.setattr(optim, '_portions', lambda ps: whole(ps, most))
                ps = copies(start)
                opt = cls(ps, lr=.01)
                for i in range(5):
                    for p in ps: p.grad = torch.sin(p+i)
                    opt.step()
            ends.append(ps)
        close(*ends)

def test_numbers_are_where_the_parameters_are_after_a_load(monkeypatch):
    opt,placed = Adam(params()),[]
    monkeypatch.setattr(Adam, 'place_numbers', lambda self: placed.append(self))
    opt.load_state_dict(opt.state_dict())
    assert placed==[opt]

def test_half_and_other_dtypes():
    "Parameters stay what they are; the float32 trajectory is torch's."
    for cls in (SGD,RMSprop,Adam,AdamW):
        p = nn.Parameter(torch.randn(5, 4))
        q = copies([p])[0]
        opt,ref = cls([p], lr=.01),twin(cls, [q], lr=.01)
        for _ in range(20):
            p.grad = q.grad = torch.randn(5, 4)
            opt.step()
            ref.step()
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-4, atol=1e-5)
        b = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        b.grad = torch.ones_like(b)
        cls([b], lr=.1).step()
        assert b.dtype==torch.bfloat16 and (b<1).all()

def test_add_param_group():
    qs = copies(ps := params())
    opt,ref = Adam(ps[:3]),torch.optim.Adam(qs[:3])
    steps(ps[:3], opt, qs[:3], ref, 5)
    opt.add_param_group(dict(params=ps[3:], lr=.1))
    ref.add_param_group(dict(params=qs[3:], lr=.1))
    steps(ps, opt, qs, ref, 10, 5)


# Learning rates

schedules = {'StepLR': lambda o: lr_scheduler.StepLR(o, 3, .5), 'CosineAnnealingLR': lambda o: lr_scheduler.CosineAnnealingLR(o, 20),
    'OneCycleLR': lambda o: lr_scheduler.OneCycleLR(o, .1, total_steps=30), 'LambdaLR': lambda o: lr_scheduler.LambdaLR(o, lambda i: 1/(1+i)),
    'ExponentialLR': lambda o: lr_scheduler.ExponentialLR(o, .9), 'LinearLR': lambda o: lr_scheduler.LinearLR(o),
    'CosineAnnealingWarmRestarts': lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 7),
    'SequentialLR': lambda o: lr_scheduler.SequentialLR(o, [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, .9)], [4])}

@pytest.mark.parametrize('name', schedules)
@pytest.mark.parametrize('cls,kw', [(SGD, dict(momentum=.9)), (AdamW, {})])
def test_torchs_schedulers(cls, kw, name):
    ps,opt,qs,ref = pair(cls, kw)
    a,b = schedules[name](opt),schedules[name](ref)
    seen = set()
    for i in range(25):
        steps(ps, opt, qs, ref, 1, i)
        a.step()
        b.step()
        seen.add(opt.lr)
        for u,v in zip(opt.param_groups, ref.param_groups): assert float(u['lr'])==pytest.approx(float(v['lr']), rel=1e-12)
    assert len(seen)>3

def test_reduce_on_plateau():
    ps,opt,qs,ref = pair(SGD, {})
    a,b = (lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=.5) for o in (opt,ref))
    for i in range(12):
        steps(ps, opt, qs, ref, 1, i)
        a.step(1.)
        b.step(1.)
    assert opt.lr==ref.param_groups[0]['lr']<1e-3

def test_lr():
    ps = params()
    opt = SGD(groups(ps, lr=.5), lr=.1)
    assert opt.lr==.1 and isinstance(opt.lr, float)
    opt.lr = .25
    assert opt.lr==.25 and [float(g['lr']) for g in opt.param_groups]==[.25,.25]
    opt.param_groups[0]['lr'] = 1. # as plain torch code does it
    opt.lr = .5
    assert [float(g['lr']) for g in opt.param_groups]==[.5,.5]
    ps[0].grad = torch.ones(4, 3, dtype=torch.float64)
    before = ps[0].clone()
    opt.step()
    torch.testing.assert_close(ps[0].detach(), before-.5)
    assert SGD(params(), lr=torch.tensor(.5)).lr==.5 and SGD(params(), lr=1).lr==1.

def test_zero_grad():
    m = Model([Lin(4, 3, dtype=torch.float64)], Mse())
    opt = SGD([dict(params=[m.layers[0].w]), dict(params=[m.layers[0].b])])
    for _ in range(2):
        m(rand(2, 4), rand(2, 3))
        m.backward()
        assert all(p.g is p.grad and p.g is not None for p in m.parameters())
        opt.zero_grad()
        assert all(p.g is None and p.grad is None for p in m.parameters())
    before = [p.clone() for p in m.parameters()]
    opt.step() # nothing to do
    close(m.parameters(), before)

def test_closure():
    m,x,y = Model([Lin(4, 3, dtype=torch.float64)], Mse()),rand(2, 4),rand(2, 3)
    opt = SGD(m.parameters(), lr=.1)
    def closure():
        opt.zero_grad()
        loss = m(x, y)
        m.backward()
        return loss
    l = m.layers[0]
    want = TF.mse_loss(x@l.w+l.b, y)
    torch.testing.assert_close(opt.step(closure), want)
    assert opt.step(closure)<want

def test_autograds_gradients():
    "A parameter that requires grad is updated too, outside the graph."
    l = nn.Linear(4, 3, dtype=torch.float64)
    twin_l,x = copy.deepcopy(l),rand(6, 4)
    opt,ref = SGD(l.parameters(), lr=.1, momentum=.9),torch.optim.SGD(twin_l.parameters(), lr=.1, momentum=.9)
    for _ in range(5):
        for m,o in ((l,opt),(twin_l,ref)):
            o.zero_grad()
            m(x).pow(2).mean().backward()
            o.step()
    close(l.parameters(), twin_l.parameters())
    assert l.weight.requires_grad and l.weight.is_leaf

@pytest.mark.parametrize('f,exc,msg', [
    (lambda: SGD(params(), lr=-1.), ValueError, 'SGD: lr is -1.0, expected at least 0'),
    (lambda: AdamW(params(), lr=-1.), ValueError, 'AdamW: lr is -1.0, expected at least 0'),
    (lambda: SGD(params(), nesterov=True), ValueError, 'SGD: nesterov needs a momentum above 0'),
    (lambda: SGD([]), ValueError, 'empty parameter list'),
    (lambda: SGD(['w']), TypeError, 'one of the params is str'),
    (lambda: SGD(params()[0]), TypeError, 'params argument given to the optimizer should be an iterable'),
    (lambda: SGD([dict(params=(ps := params())), dict(params=ps[:1])]), ValueError, 'more than one parameter group'),
    (lambda: Adam(params()).load_state_dict(Adam(params()[:2]).state_dict()), ValueError, "doesn't match the size")])
def test_errors(f, exc, msg):
    with pytest.raises(exc, match=msg): f()


# The whole training step

def torchs_net(m):
    "The same numbers in torch's own layers."
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        for i in (0,2): net[i].weight.copy_(m.layers[i].w.t()), net[i].bias.copy_(m.layers[i].b)
    return net

@pytest.mark.parametrize('loss,cls,kw', [(Mse, SGD, dict(lr=.05)), (Mse, Adam, dict(lr=.01)), (CrossEntropy, Adam, dict(lr=.01)),
    (CrossEntropy, SGD, dict(lr=.1, momentum=.9)), (CrossEntropy, AdamW, dict(lr=.01)), (CrossEntropy, RMSprop, dict(lr=.001))])
def test_training_is_autograds(loss, cls, kw):
    "Same start, same batches, 100 steps: every loss is that of torch's layers, autograd and optimizer."
    torch.manual_seed(0)
    m = Model([Lin(6, 8, dtype=torch.float64), Relu(), Lin(8, 3, dtype=torch.float64)], loss())
    net = torchs_net(m)
    f = TF.mse_loss if loss is Mse else TF.cross_entropy
    x = rand(160, 6)
    y = (x@rand(6, 3)).tanh()
    if loss is CrossEntropy: y = y.argmax(1)
    opt,ref,losses = cls(m.parameters(), **kw),twin(cls, net.parameters(), **kw),[]
    for i in range(100):
        xb,yb = x[i%5*32:][:32],y[i%5*32:][:32]
        mine = m(xb, yb)
        m.backward()
        opt.step()
        opt.zero_grad()
        want = f(net(xb), yb)
        want.backward()
        ref.step()
        ref.zero_grad()
        losses.append((mine.item(),want.item()))
    torch.testing.assert_close(*torch.tensor(losses, dtype=torch.float64).T, rtol=1e-10, atol=0)
    assert losses[-1][0]<losses[0][0]*.8 # it learned

@pytest.mark.parametrize('kw,msg', [(dict(wd=.1), r"no option \['wd'\]"), (dict(lr=-1), 'lr is -1'), (dict(lr=torch.nan), 'lr is nan'),
    (dict(eps=-1), 'eps is -1'),
    (dict(weight_decay=-.1), 'weight_decay is -0.1'), (dict(betas=(.9,1.)), 'betas is')])
def test_options_of_a_group_are_checked(kw, msg):
    with pytest.raises(ValueError, match=f'Adam: {msg}'): Adam([dict(params=[torch.zeros(2)], **kw)])

def test_nesterov_in_a_group_without_momentum():
    with pytest.raises(ValueError, match='SGD: nesterov needs a momentum'): SGD([dict(params=[torch.zeros(2)], nesterov=True)])

def test_hooks_are_refused():
    opt = SGD([torch.zeros(2)])
    for register in (opt.register_step_pre_hook, opt.register_step_post_hook):
        with pytest.raises(NotImplementedError, match='SGD runs no step hooks'): register(lambda *a: None)
