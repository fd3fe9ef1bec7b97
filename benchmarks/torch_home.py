"torch's peers and fnnlite's. Each `builders[name](w, opt, device)` is a function that takes one whole step and returns the loss"
import warnings
from contextlib import contextmanager
from functools import lru_cache, partial
import torch, fnnlite
from torch import nn
from torch.func import functional_call, grad_and_value
from fnnlite import const
from . import floor

@lru_cache
def data(w, device): return [torch.from_numpy(a).to(device) for a in w.data()]

def tensors(w, device, **kw):
    "The start weights, as (w,b) for each layer"
    return [[None if a is None else torch.tensor(a, device=device) for a in wb] for wb in w.start(**kw)]

def make_opt(module, ps, w, opt, **kw):
    name,options = w.rule(opt)
    return getattr(module, name)(ps, **options, **kw)

def cuda_clock(step, n):
    "Seconds a call of `step`, of `n` calls, as the GPU counts them"
    start,end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(n): step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)/1e3/n


# fnnlite

def fnn_model(w, device, **kw):
    layers = [l for wb in tensors(w, device, **kw) for l in (fnnlite.Lin(*wb), fnnlite.Relu())]
    return fnnlite.Model(layers[:-1], fnnlite.CrossEntropy() if w.loss=='ce' else fnnlite.Mse('mean' if w.loss=='mse' else 'sum'))

def fnn_step(model, opt, how='eager'):
    "The step as the README has it, all of it there to look at (eager) or not (lean); or as one graph, without a compiler (graph) or with one (compiled)"
    if how in ('graph','compiled'):
        warnings.filterwarnings('error', 'compile_step: no ') # then it isn't what it's called
        return fnnlite.compile_step(model, opt, compiler=how=='compiled')
    model.retain(how!='lean')
    def step(xb, yb):
        loss = model(const(xb), const(yb))
        model.backward()
        opt.step()
        opt.zero_grad()
        return loss.detach()
    return step

def build_fnnlite(w, opt, device, how):
    (x,y),model = data(w, device),fnn_model(w, device)
    return partial(fnn_step(model, make_opt(fnnlite, model.parameters(), w, opt), how), x, y)


# torch

losses = {'ce': nn.CrossEntropyLoss(), 'mse': nn.MSELoss(), 'sse': nn.MSELoss(reduction='sum')}

def torch_net(w, device, **kw):
    layers = []
    for wt,b in tensors(w, device, **kw):
        lin = nn.Linear(*wt.shape, bias=b is not None, device=device)
        lin.load_state_dict({'weight':wt.t(), **({} if b is None else {'bias':b})})
        layers += [lin, nn.ReLU()]
    return nn.Sequential(*layers[:-1])

def torch_step(f, opt):
    "The step as torch's tutorials have it, for the loss `f(xb, yb)`"
    def step(xb, yb):
        loss = f(xb, yb)
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss
    return step

def build_torch(w, opt, device, compiled=False, **kw):
    (x,y),net,loss_func = data(w, device),torch_net(w, device),losses[w.loss]
    f = lambda xb,yb: loss_func(net(xb), yb)
    return partial(torch_step(torch.compile(f) if compiled else f, make_opt(torch.optim, net.parameters(), w, opt, **kw)), x, y)

@contextmanager
def medium():
    was = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('medium')
    try: yield
    finally: torch.set_float32_matmul_precision(was)

def build_medium(w, opt, device):
    step = build_torch(w, opt, device, fused=True)
    step.around,step.rtol = medium,1e-2
    return step


# torch.func, with the update in the same graph

def update(ps, gs, ms, vs, t, opt, lr, **_):
    "In place; what a rule doesn't need of `ms`, `vs` and `t` it leaves alone"
    if opt=='sgd': torch._foreach_add_(ps, gs, alpha=-lr)
    elif opt=='momentum':
        torch._foreach_mul_(ms, .9)
        torch._foreach_add_(ms, gs)
        torch._foreach_add_(ps, ms, alpha=-lr)
    else:
        t += 1
        torch._foreach_lerp_(ms, gs, .1)
        torch._foreach_mul_(vs, .999)
        torch._foreach_addcmul_(vs, gs, gs, value=.001)
        for p,m,v in zip(ps, ms, vs): p.sub_(lr/(1-.9**t)*m/((v/(1-.999**t)).sqrt()+1e-8))

def build_func(w, opt, device, **options):
    (x,y),net,loss_func,lr = data(w, device),torch_net(w, device),losses[w.loss],w.rule(opt)[1]['lr']
    ps = {n:p.detach() for n,p in net.named_parameters()}
    ms,vs = ([torch.zeros_like(p) for p in ps.values()] for _ in range(2))
    t = torch.zeros((), device=device)
    @torch.compile(fullgraph=True, options=options)
    def step(ps, ms, vs, t, xb, yb):
        gs,loss = grad_and_value(lambda ps: loss_func(functional_call(net, ps, (xb,)), yb))(ps)
        update(list(ps.values()), list(gs.values()), ms, vs, t, opt, lr)
        return loss
    return partial(step, ps, ms, vs, t, x, y)


builders = {
    **{f'fnnlite {how}': partial(build_fnnlite, how=how) for how in ('eager','lean','graph','compiled')},
    'torch eager': build_torch,
    'torch fused': partial(build_torch, fused=True),
    'torch fused (medium)': build_medium,
    'torch.compile loss': partial(build_torch, fused=True, compiled=True),
    'torch.func compiled': build_func,
    'torch.func compiled (C++)': partial(build_func, cpp_wrapper=True),
    'floor': floor.build}
