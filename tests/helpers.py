"What several test files need."
from copy import deepcopy
from importlib import import_module
from pkgutil import iter_modules
import pytest, torch
from fnnlite import Lin, Module, wants
from fnnlite.core.module import through_forward
from fnnlite.core.record import floats, maptree


def rand(*shape): return torch.randn(shape, dtype=torch.float64) # () as well
def Lin64(ni, nf, **kw): return Lin(ni, nf, dtype=torch.float64, **kw)

def close(got, want, **tols):
    "Tensors, or as many of them in a row, have the same shapes and dtypes, and numbers as near as torch takes for the same, or `tols`."
    got,want = (maptree(torch.Tensor.detach, o if isinstance(o, torch.Tensor) else list(o)) for o in (got, want))
    torch.testing.assert_close(got, want, **tols)
tight = dict(rtol=1e-10, atol=1e-12) # for float64

def agree(out, back, op, ts, **tols):
    "`out` is `op(*ts)`, and after `back(g)` with a random `g` each `.g` in `ts` is autograd's through `op`; constants and class indices have none."
    refs = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in ts]
    want = op(*refs)
    close(out, want, **(tols or dict(rtol=1e-12, atol=1e-12)))
    g = torch.randn_like(want)
    back(g)
    auto = iter(torch.autograd.grad(want, [r for r in refs if r.requires_grad], g))
    for t,r in zip(ts, refs, strict=True):
        a = next(auto) if r.requires_grad else None
        if a is None or not wants(t): assert t.g is None
        else: close(t.g, a, **(tols or tight))

def rooms(package):
    "The modules in a folder of the package."
    return [import_module(f'{package.__name__}.{m.name}') for m in iter_modules(package.__path__)]

def public(package, base):
    "The subclasses of `base` that they export."
    return {c for room in rooms(package) for n in room.__all__ if isinstance(c := getattr(room, n), type) and issubclass(c, base)}

def by_autograd(module, *args, g=None):
    "Gradients of the floats in `args` and of the parameters by autograd, through the same forward, on copies."
    module = deepcopy(module).requires_grad_()
    args = maptree(lambda t: t.detach().clone(), args)
    ts = [t.requires_grad_() for t in floats(args)] + list(module.parameters())
    with through_forward(): torch.autograd.backward(floats(module(*args)), g)
    return [torch.zeros_like(t) if t.grad is None else t.grad for t in ts]

def assert_grads(module, *args, times=1):
    """After a backward pass from a random upstream gradient, by hand and by autograd, with inputs that require grad and
    ones that don't, every gradient is what autograd finds through the forwards, in value, shape and dtype."""
    params,twin = list(module.parameters()),deepcopy(module)
    before,names = [p.grad for p in params],[f'input {i}' for i in range(len(floats(args)))]+[n for n,_ in module.named_parameters()]
    by_hand,by_loss = lambda outs, gs: module.backward(gs),torch.autograd.backward
    for walk,asked in ((by_loss,True),(by_loss,False),(by_hand,False)):
        if walk is by_loss and not asked and not any(p.requires_grad for p in params): continue # torch refuses it
        for p,g in zip(params, before): p.grad = None if g is None else g.clone()
        args = maptree(lambda t: t.detach().clone().requires_grad_(asked and t.is_floating_point()), args)
        seed = torch.initial_seed()
        torch.manual_seed(seed)
        outs = floats(module(*args))
        gs = [torch.randn_like(o) for o in outs]
        walk(outs, gs)
        torch.manual_seed(seed)
        auto = by_autograd(twin, *args, g=gs)
        for name,t,a in zip(names, floats(args)+params, auto, strict=True):
            g = t.grad if asked else t.g
            g = torch.zeros_like(t) if g is None else g
            n = times if isinstance(t, torch.nn.Parameter) else 1
            torch.testing.assert_close(g, n*a, rtol=1e-9, atol=1e-11, msg=lambda m: f"{name}: {m}")
            assert not isinstance(t, torch.nn.Parameter) or t.grad is t.g


# Modules that hand on what they have

class Id(Module):
    def forward(self, x): return x
    def bwd(self, out, x): x.g = out.g
class Table(Module):
    def __init__(self): self.w = rand(4, 4)
    def forward(self): return self.w
    def bwd(self, out): self.w.g = out.g


# bwds that are wrong in the ways that are always refused

class GivenBwd(Module):
    "A linear layer whose bwd is given."
    def __init__(self, f): self.w,self.f = rand(4, 4),f
    def forward(self, inp, more=None): return inp@self.w
    def bwd(self, out, inp, more=None): self.f(self, out, inp)
def right(self, out, inp): inp.g,self.w.g = out.g@self.w.t(),inp.t()@out.g
def no_weight(self, out, inp): inp.g = out.g@self.w.t()
def no_input(self, out, inp): self.w.g = inp.t()@out.g
def transposed(self, out, inp): inp.g,self.w.g = (out.g@self.w.t()).t(),inp.t()@out.g
def short(self, out, inp): inp.g,self.w.g = out.g@self.w.t(),(inp.t()@out.g)[0]
def half(self, out, inp): inp.g,self.w.g = out.g@self.w.t(),(inp.t()@out.g).float()
def number(self, out, inp): inp.g,self.w.g = out.g@self.w.t(),1.
def upstream_changed(self, out, inp):
    out.g.mul_(2)
    right(self, out, inp)

each_fault = pytest.mark.parametrize('f,msg', [(no_weight, "parameter 'w' got no .g"), (no_input, "argument 'inp' got no .g"),
    (transposed, r"argument 'inp' got a .g of \(4, 6\) torch.float64 from its rule, expected \(6, 4\)"), (short, r"parameter 'w' got a .g of \(4,\)"),
    (half, r"parameter 'w' got a .g of \(4, 4\) torch.float32 from its rule, expected \(4, 4\) torch.float64"),
    (number, "parameter 'w' got a .g of type float"),
    (upstream_changed, "changed out.g, or a .g that is the same tensor, in place")], ids=lambda f: getattr(f, '__name__', ''))
