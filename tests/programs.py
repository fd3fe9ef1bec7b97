"""Random training programs as source code, and whether fnnlite's gradients of them are autograd's.

A program is Python: modules of torch's and of fnnlite's, a forward of layers, functions, views,
changes in place, loops and branches, the inputs, and the way it is run. `program(seed)` writes one,
line after line, and keeps a line if plain torch runs it and has a gradient for it. `check(source)`
runs it with fnnlite, and with torch's autograd through each layer's forward, and compares outputs
and gradients. `shrink(source)` leaves of it what is needed for the same verdict.
"""
import random, re, warnings
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import NamedTuple
import torch, torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves
import fnnlite
from fnnlite import GradError, Module, const, recording, wants
from fnnlite.core.module import through_forward
from fnnlite.core.rules import kernels
from fnnlite.core.tiny import TinyRecord


# Layers with a bwd of their own, in which tensors pass in different ways

class Scale(Module):
    "A weight"
    def __init__(self, n): self.w = rand(n)
    def forward(self, inp):
        assert inp.shape[-1:]==self.w.shape
        return inp*self.w
    def bwd(self, out, inp):
        inp.g = out.g*self.w
        self.w.g = (out.g*inp).reshape(-1, len(self.w)).sum(0)
class Square(Module):
    def forward(self, inp): return inp**2
    def bwd(self, out, inp): inp.g = 2*inp*out.g
class Same(Module):
    "Hands its input on"
    def forward(self, inp): return inp
    def bwd(self, out, inp): inp.g = out.g
class Gate(Module):
    "Keeps a mask on its output"
    saves = 'mask'
    def forward(self, inp):
        out = inp*(mask := (inp>0).to(inp.dtype))
        out.mask = mask
        return out
    def bwd(self, out, inp): inp.g = out.g*out.mask
class Two(Module):
    "Two outputs"
    def forward(self, inp): return inp*2,inp.tanh()
    def bwd(self, out, inp): inp.g = 2*out[0].g+out[1].g*(1-out[1]**2)
class Named(Module):
    "Outputs in a dict, and its input among them"
    def __init__(self, n): self.w = rand(n)
    def forward(self, inp):
        assert inp.shape[-1:]==self.w.shape
        return {'same':inp, 'scaled':inp*self.w}
    def bwd(self, out, inp):
        inp.g = out['same'].g+out['scaled'].g*self.w
        self.w.g = (out['scaled'].g*inp).reshape(-1, len(self.w)).sum(0)
class Blend(Module):
    "Two inputs, a weight and a keyword"
    def __init__(self): self.w = rand()
    def forward(self, a, b, by=.5): return a*self.w+by*b.expand(a.shape)*a
    def bwd(self, out, a, b, by=.5):
        self.w.g = (out.g*a).sum()
        if wants(a): a.g = out.g*(self.w+by*b)
        if wants(b): b.g = (by*out.g*a).sum_to_size(b.shape)
class Total(Module):
    "A list of inputs"
    def forward(self, inps): return sum(inps[1:], inps[0]*3)
    def bwd(self, out, inps):
        for i,t in enumerate(inps): t.g = out.g*(1 if i else 3)
class Rows(Module):
    "Writes its output row by row"
    def forward(self, inp):
        out = torch.zeros_like(inp)
        for i in range(len(inp)): out[i] = inp[i]*(i+1)
        return out
    def bwd(self, out, inp): inp.g = torch.stack([g*(i+1) for i,g in enumerate(out.g)])
class Again(Module):
    "Calls itself, with one layer, as often as `n` says"
    def __init__(self, layer): self.layer = layer
    def forward(self, inp, n=2): return self.layer(self(inp, n-1).sin()) if n>1 else self.layer(inp)


# What a line is made of: {a}, {b}, {c} are tensors, {v} a name of one, {n} is the length of the
# last dimension of {a}, {m} of its first, {k} a small number, {d} a dimension, {i} whole numbers
# that are indices or classes, {e} an expression, {x} and {y} new names, {q} a layer that is there

def ways(text): return [o for line in text.strip().splitlines() for o in line.split(' | ')]
elementwise = ways("""
{a}.tanh() | torch.sigmoid({a}) | F.relu({a}) | F.gelu({a}) | F.silu({a}) | {a}.sin()
{a}.abs() | {a}**2 | ({a}.abs()+1).log() | ({a}*.3).exp() | torch.sqrt({a}**2+1)
({a}**2+1).rsqrt() | {a}.clamp(-1, 1) | {a}.clamp_min(.1) | F.softplus({a}) | -{a} | F.elu({a})
F.leaky_relu({a}, .1) | 1/({a}**2+1) | {a}.erf() | {a}.softmax(-1) | F.log_softmax({a}, {d})
{a}.cumsum({d}) | {a}.flip(0) | {a}.roll(1, -1) | {a}.tril() | F.layer_norm({a}, {a}.shape[-1:])
F.normalize({a}, dim=-1) | {a}-{a}.mean(-1, keepdim=True) | 2**({a}*.5) | {a}.detach()*{a}
torch.where({a}>0, {a}, .1*{a}) | {a}.masked_fill({a}>1, .5) | {a}.contiguous() | {a}.clone()
F.hardtanh({a}) | {a}.float().double() | {a}.to({a}.dtype) | F.dropout({a}, .3)
{a}/({a}.norm()+1) | .5*{a}-1 | {a}+{a} | {a}*{a} | {a}*{a}.shape[0] | {a}*torch.rand_like({a})
{a}*float({a}.detach().mean()) | F.mish({a}) | (lambda t: t*t.cos())({a}) | torch.relu({a})-.1
F.rms_norm({a}, ({n},)) | {a}.data*{a}""")
binary = ways("""
{a}+{b} | {a}-{b} | {a}*{b} | {a}/({b}**2+1) | torch.maximum({a}, {b})
torch.where({a}>{b}, {a}, {b}*2) | {a}@{b} | {a}@{b}.mT | torch.add({a}, {b}, alpha=2)
{a}.lerp({b}, .3) | torch.logaddexp({a}, {b}) | {b}-2*{a}
torch.addcmul({a}, {b}, {b}, value=.5) | torch.einsum('ij,kj->ik', {a}, {b})
torch.outer({a}, {b}) | torch.einsum('...i,...i', {a}, {b}) | torch.cat([{a}, {b}], {d})
torch.stack([{a}, {b}], {d}) | {a}.dot({b}) | F.linear({a}, {b}) | F.mse_loss({a}, {b})
F.cosine_similarity({a}, {b}, -1) | torch.atan2({a}, {b})
F.scaled_dot_product_attention({a}, {b}, {b}) | torch.cat(({a}, {a}.detach(), {b}), -1)
torch.dist({a}, {b}) | torch.matmul({b}, {a}) | torch.addmm({a}, {b}, {b})
torch.hstack([{a}, {b}]) | torch.minimum({b}, {a})
F.smooth_l1_loss({a}, {b}.detach(), reduction='none') | {a}.masked_fill({b}>0, 0.)
{a}.expand_as({b}) | {a}.view_as({b}) | {a}.index_add(0, {i}, {b}) | {a}.where({b}<0, {b})
{a}.div({b}.abs()+1) | {a}*{b}.detach() | torch.tensordot({a}, {b}, 1) | {a}+{b} | {a}*{b}
{a}@{b} | torch.baddbmm({a}, {b}, {c}) | {a}*{b}+{c}""")
shapes = ways("""
{a}.t() | {a}.mT | {a}.reshape(-1) | {a}.view(-1, 2) | {a}.unsqueeze({d}) | {a}.squeeze()
{a}[0] | {a}[:, 1:] | {a}[..., 0] | {a}[None] | {a}[[0, 1]] | {a}[{i}] | {a}[{a}>0]
{a}.expand(2, *{a}.shape) | {a}.repeat(2, 1) | {a}.permute(1, 0) | {a}.flatten()
{a}.narrow({d}, 0, 1) | {a}.diagonal() | {a}.unfold(-1, 2, 1) | {a}[::2]
{a}.gather(0, {i}.view(-1, 1)) | {a}.index_select({d}, {i}) | {a}.transpose(0, -1) | {a}[-1]
{a}[:, {i}] | {a}.movedim(0, -1) | {a}.view({a}.shape) | {a}.T | {a}.unflatten(-1, (2, -1))
{a}.repeat_interleave(2, {d}) | {a}.view(-1)[1:] | {a}.select({d}, 0) | {a}[:, :2].mT
{a}.flatten(0, 1) | {a}[1:, None] | F.pad({a}, (1, 0))
torch.zeros(4, {n}).index_copy(0, {i}, {a})
{a}.new_zeros(4, {n}).scatter_add(0, {i}.view(-1, 1), {a})""")
reductions = ways("""
{a}.sum({d}) | {a}.mean({d}) | {a}.sum() | {a}.norm(dim=-1) | {a}.std({d})
{a}.var({d}, keepdim=True) | {a}.amax({d}) | {a}.logsumexp({d}) | {a}.prod({d}) | {a}.median()
{a}.max({d}).values | {a}.mean((0, 1)) | {a}.sum({d}, keepdim=True) | {a}.pow(2).mean()
{a}.max() | {a}.amin((0, -1), keepdim=True) | {a}.diff() | {a}.square().sum(-1).sqrt()
{a}.trace() | F.cross_entropy({a}, {i}) | F.nll_loss({a}.log_softmax(-1), {i})
F.cross_entropy({a}, {i}, label_smoothing=.1)""")
several = ways("""
{x}, {y} = {a}.chunk(2, {d}) | {x}, {y} = {a}.split([1, {n}-1], -1) | {x}, *{y} = {a}.unbind()
{x}, _ = {a}.max({d}) | {x}, _ = {a}.sort(-1) | {x}, _ = {a}.topk(2)
{x}, {y} = torch.var_mean({a}, {d}) | {x}, {y} = torch.aminmax({a})
{x}, {y} = torch.broadcast_tensors({a}, {b}) | {x}, {y} = {b}, {a}+1
{x}, {y} = {a}.split(2, {d}) | {x}, _ = {a}.min({d}) | {x} = {y} = {a}*2
{x}, {y} = torch.tensor_split({a}, 2, {d}) | {x}, {y} = [t.cos() for t in ({a}, {b})]""")
on_whole = ways("""
{a} += {b} | {a} -= .5 | {a} *= 2 | {a}.mul_({b}) | {a}.add_({b}, alpha=2)
F.relu({a}, inplace=True) | {a}[0] = {b} | {a}[0] = 0. | {a}.masked_fill_({a}>1, 0.)
{a}.zero_() | {a}.copy_({b}) | {a}.clamp_(-1, 1) | {a}.tanh_() | {a}[1:] = {a}[:-1]*.5
{a}.neg_() | {a}[{i}] = {b} | {a}[{a}>0] = .3 | {a}.exp_() | {a}.index_add_(0, {i}, {b})
{a}.addcmul_({b}, {b}) | {a}.sub_({b}.detach()) | {a}[..., -1] = {b} | {a}.lerp_({b}, .5)
{a}.fill_(.5) | {a}[{a}>0] *= 2 | torch.relu_({a}) | {a} **= 2 | {a}[0], {a}[1] = {b}, {a}[0]+1
{a} /= 2 | {a}.add_(1).mul_({b})""")
on_views = ways("""
{a}[:, 0] *= 2 | {a}[0] += {b} | {a}.view(-1).mul_(2) | {a}.t().add_({b})
{a}.diagonal().add_(1) | {a}[0].copy_({b}) | {a}[:, :2].sub_({b}) | {a}.flatten()[1:3].mul_(3)
{a}.chunk(2)[0].add_(1) | {a}[0][1:].mul_({b}) | {a}.mT[0] = {b} | {a}.unbind()[1].exp_()
{a}.T[0] -= {b} | {a}.view_as({a}).tanh_() | {a}[1:].zero_() | {a}.squeeze_()
{a}.unsqueeze_({d}) | {a}.t_() | {a}.transpose_(0, -1) | {a}.squeeze_({d}) | {a}.mT.mul_({b})""")
others = ways("""
with torch.no_grad(): {x} = {e} | {x} = const({a}) | {x} = {a}.detach() | {x} = {a}.data+{b}
{x} = {e} if {a}.sum()>0 else {a}*2 | {x} = torch.ones({k}) | {x} = torch.eye({k})*.5
{a}.detach_() | {x} = torch.utils.checkpoint.checkpoint({q}, {a}, use_reentrant=False)
with torch.no_grad(): {a}.mul_(.5) | {x} = {a}.detach().exp()
with torch.no_grad(): {x} = {a}.norm()+1 | {x} = (lambda t: t*{b})({a}) | self.scale.mul_(1.1)
with torch.no_grad(): self.scale.copy_({a}.mean())""")
loops = ['for i in range({k}): {v} = {e}',
    '{x} = torch.zeros(3, *{v}.shape)\nfor i in range(3):\n    {v} = {e}\n    {x}[i] = {v}',
    '{x} = []\nfor i in range(3):\n    {v} = {e}\n    {x}.append({v})\n{x} = torch.stack({x})',
    'for i in range(4):\n    {v} = {e}\n    if {v}.abs().max()>1: break',
    'for i in range(2):\n    {v} = {e}\n    {v} *= 1.1',
    '{x} = {v}*0\nfor i in range({k}): {x} += {e}',
    '{x} = 0.\nfor {y} in {v}: {x} = {x}+{y}.sin()*{y}',
    'for i in range(len({v})): {v}[i] = {v}[i-1]*{b}',
    'if {v}.mean()>0: {v} = {e}\nelse: {v} = {v}*2', 'if {v}.sum()<0: {v} = {e}',
    'try: {x} = ({v}*2)@torch.ones(7, 7)\nexcept RuntimeError: {x} = {e}',
    'with torch.no_grad():\n    with torch.enable_grad(): {x} = {e}',
    'self.kept = {e}\n{x} = self.kept*{b}',
    '{x} = [{v}, {v}*2]\n{y} = torch.stack({x})\n{x}.pop()\n{x} = {y}*{x}[0]',
    '{y} = {i}\n{x} = {v}[{y}]\n{y} += 1']
ours = ways("""
Lin({n}, {k}) | Lin({n}, {n}) | Lin({n}, {k}, bias=False) | Relu() | Relu(.1, .2, 1.) | Tanh()
Sigmoid() | Softmax() | Softmax(0) | LogSoftmax() | Dropout(.3) | Dropout(.3).eval() | Flatten()
Reshape(-1, {n}) | Wrap(nn.LayerNorm({n})) | Wrap(torch.sin) | Sequential(Lin({n}, {k}), Tanh())
Scale({n}) | Square() | Same() | Sequential(Lin({n}, {k}), nn.LayerNorm({k}), Relu()) | Gate()
Rows() | Again(Lin({n}, {n})) | Lin({n}, {k}) | Again(nn.Linear({n}, {n})) | Scale({n})
Sequential(Same(), Gate()) | Again(Sequential(Scale({n}), Tanh()))
Wrap(nn.Sequential(nn.Linear({n}, {k}), nn.GELU())) | Model([nn.Linear({n}, {k}), Tanh()])""")
theirs = ways("""
nn.Linear({n}, {k}) | nn.Linear({n}, {n}) | nn.LayerNorm({n}) | nn.ReLU(inplace=True)
nn.GELU() | nn.Dropout(.3) | nn.Softmax(-1) | nn.BatchNorm1d({n}) | nn.BatchNorm1d({n}).eval()
nn.PReLU() | nn.Flatten(0) | nn.Conv1d({m}, 2, 2) | nn.GRUCell({n}, {k})
nn.Sequential(nn.Linear({n}, {k}), nn.ReLU(inplace=True))
nn.TransformerEncoderLayer({n}, 1, 4, dropout=0.) | nn.RMSNorm({n}) | nn.Identity()
nn.ELU(inplace=True) | nn.Sequential(nn.Linear({n}, {k}), nn.Tanh(), nn.Linear({k}, {k}))
nn.Linear({n}, {k})""")
mixed = ways("""
nn.Sequential(nn.Linear({n}, {k}), Tanh())
nn.Sequential(Lin({n}, {k}), nn.ReLU(inplace=True), Scale({k}))
nn.Sequential(Gate(), nn.Linear({n}, {k})) | nn.Sequential(Sequential(nn.Tanh()), Same())
Model(nn.GELU())""")
tied = ways("""
weight(nn.Linear({n}, {n}), {q}.weight) | weight(nn.Linear({n}, {n}), {q}.w) | Lin({q}.w, {q}.b)
Lin({q}.w, None)""")
weighty = ways("""
Lin({n}, {k}) | Lin({n}, {n}) | Scale({n}) | Sequential(Lin({n}, {k}), Tanh())
Again(Lin({n}, {n})) | Wrap(nn.LayerNorm({n})) | Model([nn.Linear({n}, {k}), Tanh()])""")
losses = ways("""
F.mse_loss | Mse() | nn.MSELoss() | nn.SmoothL1Loss() | lambda a, b: (a-b).pow(2).sum()/4""")
class_losses = ways("F.cross_entropy | CrossEntropy() | nn.CrossEntropyLoss(label_smoothing=.1)")
# with how they are called
pairs = ways('Add() | Mul() | Concat() | Matmul() | Mse() | Blend()')
our_calls = [*((o, '({a}, {b})') for o in pairs),
    ('Two()','{x}, {y} = ({a})'), ('Named({n})','({a})["scaled"]'), ('Total()','([{a}, {b}])'),
    ('Named({n})','{x}, {y} = ({a}).values()'), ('Total()','([{a}, {a}, {b}])'),
    ('Blend()','({a}, by=2., b={b})'), ('Model(Same(), Mse())','({a}, {b})'),
    ('CrossEntropy()','({a}, {i})'), ('NLL()','({a}.log_softmax(-1), {i})')]
their_calls = [('nn.MSELoss()','({a}, {b})'), ('nn.Bilinear({n}, {n}, 2)','({a}, {b})'),
    ('nn.L1Loss()','({b}, {a})'), ('nn.GRUCell({n}, {n})','({a}, {b})'),
    ('nn.Embedding(5, {k})','({i})'), ('nn.CrossEntropyLoss()','({a}, {i})'),
    ('nn.MultiheadAttention({n}, 1)','{x}, _ = ({a}, {b}, {b})')]
# an output that is an input counts as another tensor with some of ours
handed_on = 'Same|Named|Dropout|Flatten|Reshape'
# what the minimal record can't tell apart: what torch's functions hand on, what wants no gradient
beyond_tiny = 'contiguous|broadcast_|latten|Identity|ropout|BatchNorm|requires_grad_|\\.to\\('

def rand(*shape): return torch.randn(shape)
def weight(layer, w):
    "`layer`, with another's weight"
    layer.weight = w
    return layer

class Way(NamedTuple):
    "How a program is run"
    kind: str # recording, walk (`net.backward()`), outer, loss or nodes (`loss.backward()`)
    calls: int = 1 # with other numbers, their gradients accumulating
    walks: int = 1 # of each call
    asked: bool = False # the inputs require grad
    apart: bool = False # each output has a loss of its own
    ups: bool = False # the walk starts from the outputs, not from a loss
    const: tuple = () # inputs that are constants
    mids: bool = False # the net returns outputs, and tensors on the way there
    key: str = '' # of the loss among the outputs
    declared: bool = False # `recording` is told the inputs
    formulas: bool = False # without torch's kernels
    tiny: bool = False # the minimal record is asked too
    @property
    def by_hand(self): return self.kind in ('recording','walk')

space = {k:v for k,v in vars(fnnlite).items() if isinstance(v, type)}
space |= dict(torch=torch, nn=nn, F=F, const=const) | {o.__name__:o for o in (
    Scale, Square, Same, Gate, Two, Named, Blend, Total, Rows, Again, Way, rand, weight)}

@contextmanager
def doubles():
    "Float64; warnings are errors, each time; random numbers are as before"
    dtype,always = torch.get_default_dtype(),torch.is_warn_always_enabled()
    torch.set_default_dtype(torch.float64)
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter('error')
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_warn_always(always)

def is_float(t): return isinstance(t, torch.Tensor) and t.dtype==torch.float64
def floats(o): return [t for t in tree_leaves(o) if is_float(t)]
def fits(t): return 0<t.numel()<=60 and t.ndim<=4 and bool(t.isfinite().all()) and t.abs().max()<30


# Writing

class Writer:
    "Writes a forward line by line, and runs each line to see what it gives"
    def __init__(self,
        rng,
        inputs, # by name
        made, # the modules that are written, and all names
        only='', # 'ours' or 'theirs': layers of one kind
        raw=True, # False: only layers with weights get the inputs. Where nothing asks for their
            # gradients, and the net is no module of fnnlite's, nobody else would hear of them
        depth=0, # in modules
    ):
        self.rng,self.inputs,self.made,self.only = rng,inputs,made,only
        self.raw,self.depth,self.module = raw,depth,nn.Module()
        self.init,self.lines,self.calls,self.weights = [],[],[],[]
        self.fresh = (f'v{i}' for i in range(10**6))
        if rng.random()<.4: self.add('w', f"nn.Parameter(rand({rng.choice(['', 4, '3, 4'])}))")
        if rng.random()<.2: self.add('scale', 'nn.Buffer(rand())')
        self.restart()

    def add(self, name, code):
        setattr(self.module, name, eval(code, self.made.names))
        self.init.append(f'self.{name} = {code}')
        self.weights.append(f'self.{name}')

    def restart(self):
        "The state after the lines that are kept"
        self.leaves = {n:t.detach().clone().requires_grad_() for n,t in self.inputs.items()}
        here = {n:t.clone() if self.depth else t for n,t in self.leaves.items()}
        self.env = dict(self.made.names, self=self.module, **here)
        for l in self.lines: exec(l, self.env)

    def names(self):
        return [n for n,t in self.env.items() if is_float(t) and (self.raw or n not in self.inputs)]
    def name(self): return self.rng.choice(self.names())

    def say(self, line):
        "Keep `line` if torch runs it and still finds a gradient, and numbers are few and small"
        try:
            exec(line, self.env)
            ts = [self.env[n] for n in self.names()]
            assert all(map(fits, ts))
            total,leaves = sum(t.sum() for t in ts if t.requires_grad),[*self.leaves.values()]
            torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
        except Exception:
            self.restart()
            return False
        self.lines.append(line)
        return True

    def fill(self, template, depth=0, **given):
        "A template with operands, numbers and names in it"
        if '{a}' in template and 'a' not in given: given['a'] = self.operand(depth)
        def word(m):
            if m[1] not in given: given[m[1]] = self.word(m[1], given.get('a'), depth)
            return str(given[m[1]])
        return re.sub(r'\{(\w)\}', word, template)

    def word(self, k, a, depth):
        rng = self.rng
        if k in 'bc': return self.operand(depth)
        if k in 'xy': return next(self.fresh)
        if k=='d': return rng.choice([0,-1,1])
        if k=='k': return rng.choice([2,3,4,4])
        if k=='e': return self.expr(depth+1)
        if k=='q': return 'self.'+rng.choice([n for n,_ in self.module.named_children()])
        shape = eval(a, dict(self.env)).shape
        if k=='n': return shape[-1]
        if k=='m': return shape[0]
        if k=='i': return f'torch.tensor({rng.choices(range(min(*shape, 3)), k=shape[0])})'

    def operand(self, depth=0):
        r,names = self.rng.random(),self.names()
        if r<.06 and self.weights: return self.rng.choice(self.weights)
        if r<.18 and depth<2: return f'({self.expr(depth+1)})'
        return self.rng.choice(names[-4:]+names+self.unread()*2)

    def expr(self, depth=0, **given):
        layers = [c for c in self.calls if c[0]!='{'] or binary
        kind, = self.rng.choices([elementwise,binary,shapes,reductions,layers], [4,4,2,1,2])
        return self.fill(self.rng.choice(kind), depth, **given)

    # Lines

    def value(self): return self.say(f'{next(self.fresh)} = {self.expr()}')
    def outputs(self):
        layers = [c for c in self.calls if c[0]=='{']
        return self.say(self.fill(self.rng.choice(several+layers)))
    def other(self):
        line = self.fill(self.rng.choice(others))
        return not (self.only=='theirs' and 'const' in line) and self.say(line)
    def loop(self):
        v = self.name()
        return self.say(self.fill(self.rng.choice(loops), v=v, a=v, e=self.expr(a=v)))

    def change(self):
        "In place"
        a,templates = self.name(),on_whole+on_views
        if self.only=='theirs': # no views, for the minimal record
            places = [self.env[n].untyped_storage().data_ptr() for n in self.names()]
            t,templates = self.env[a],on_whole
            if t._is_view() or places.count(t.untyped_storage().data_ptr())>1: return False
        return self.say(self.fill(self.rng.choice(templates), a=a))

    def part(self, a=None):
        "A new layer, and its first call"
        rng,r = self.rng,self.rng.random()
        a = a or rng.choice(self.names()+[*self.inputs])
        if a in self.inputs and not self.raw: codes,call = weighty,'({a})'
        elif r<.2 and self.depth<2: return self.block(a)
        elif r<.45:
            calls = {'ours':our_calls, 'theirs':their_calls}.get(self.only, our_calls+their_calls)
            *codes,call = rng.choice(calls)
        elif r<.55: codes,call = tied[:1] if self.only=='theirs' else tied,'({a})'
        else: codes,call = {'ours':ours, 'theirs':theirs}.get(self.only, ours+theirs+mixed),'({a})'
        code = rng.choice(codes)
        if self.only=='theirs' and code.endswith('inplace=True)'): return False
        return self.called(self.fill(code, a=a), call, a)

    def called(self, code, call, a):
        name = f'p{len(self.init)}'
        call = call.replace('(', f'self.{name}(', 1)
        module = eval(code, dict(self.env))
        setattr(self.module, name, module)
        line = self.fill(call, a=a)
        if not self.say(line if call[0]=='{' else f'{next(self.fresh)} = {line}'):
            delattr(self.module, name)
            return False
        self.init.append(f'self.{name} = {code}')
        self.calls.append(call)
        weights = [w for w in ('w','b','weight') if is_float(getattr(module, w, None))]
        self.weights += [f'self.{name}.{w}' for w in weights]
        return True

    def block(self, a):
        "A module of several lines"
        rng = self.rng
        args = dict(zip('abc', [a, *rng.choices(self.names(), k=rng.choice([0,0,1,2]))]))
        inps = {n:self.env[t] for n,t in args.items()}
        inner = Writer(rng, inps, self.made, self.only, depth=self.depth+1)
        inner.write(rng.randint(1, 5))
        name,ends = f'Block{len(self.made.sources)}',inner.ends()
        one,more = ends[0],ends[-1]
        forms = [(one,'({})'), (f'{one}, {more}','{{x}}, {{y}} = ({})'),
            (f"{{'one': {one}, 'more': [{more}]}}","{{x}}, [{{y}}] = ({}).values()")]
        back,call = rng.choice(forms if len(ends)>1 else forms[:1])
        self.made.sources.append(inner.source(name, back, self.base()))
        exec(self.made.sources[-1], self.made.names)
        self.env[name] = self.made.names[name]
        given = [f'{{{n}}}' if n=='a' and rng.random()<.8 else f'{n}={{{n}}}' for n in args]
        return self.called(f'{name}()', call.format(', '.join(given)), a)

    def base(self):
        one = {'ours':'Module', 'theirs':'nn.Module'}.get(self.only)
        return one or self.rng.choice(['Module','nn.Module'])

    def write(self, n):
        if not self.raw:
            for x in self.inputs: any(self.tried(self.part, x) for _ in range(9))
        for _ in range(6*n):
            if len(self.lines)>=n: break
            kinds = [self.value,self.part,self.change,self.outputs,self.loop,self.other]
            self.tried(*self.rng.choices(kinds, [5,5,3,1,1.3,.7]))

    def tried(self, f, *args):
        try: return f(*args)
        except Exception: return False # what stands in a template doesn't fit

    def unread(self):
        words = re.findall(r'\w+', '\n'.join(self.lines))
        return [n for n in self.names() if words.count(n)==1]

    def ends(self):
        "What nothing has read, the last first"
        return self.unread()[::-1] or self.names()[-1:]

    def source(self, name, back, base):
        init = ['super().__init__()']*(base=='nn.Module' and len(self.init)>0)+self.init
        init = ['    def __init__(self):', *(' '*8+l for l in init)] if init else []
        body = '\n'.join([*self.lines, f'return {back}']).split('\n')
        return '\n'.join([f'class {name}({base}):', *init,
            f"    def forward(self, {', '.join(self.inputs)}):", *(' '*8+l for l in body)])

def draft(rng, seed):
    "A program, which may turn out to have no gradient"
    def now(p): return rng.random()<p
    kind, = rng.choices(['recording','outer','loss','walk','nodes'], [30,20,20,22,8])
    only, = rng.choices(['ours','theirs',''], [1,2,5])
    asked = kind=='nodes' or now(.5 if kind in ('outer','loss') else .1)
    if kind=='outer' and only=='theirs': asked = True
    shapes = ['3, 4']*5+['4','2, 3, 4','3, 1','1, 4','4, 4','']
    inputs = {f'x{i}':f'rand({rng.choice(shapes)})' for i in range(rng.randint(1, 3))}
    made = SimpleNamespace(names=dict(space), sources=[])
    xs = {n:eval(x, space) for n,x in inputs.items()}
    w = Writer(rng, xs, made, only, raw=kind!='outer' or asked)
    w.write(rng.randint(2, 14))
    for n,m in w.module.named_children() if w.raw else ():
        freeze = 'freeze()' if isinstance(m, Module) else 'requires_grad_(False)'
        if now(.05): w.init.append(f'self.{n}.{freeze}')

    if kind in ('outer','loss') and not [*w.module.parameters()]: asked = True # or nothing would be
    unread,after,way = w.ends(),[],Way(kind, asked=asked)
    ends = unread[:1] if now(.3) else rng.sample(unread, min(len(unread), 4))
    if now(.1): ends.append(w.name())
    base = {'outer':'nn.Module', 'recording':w.base()}.get(kind, 'Module')
    back,net = ', '.join(ends),'Net()'
    if kind=='recording':
        comparable = not re.search(handed_on, '\n'.join(made.sources+w.init))
        mids = rng.sample(w.names(), min(4, len(w.names()))) if comparable else []
        back = f"({back},), [{', '.join(mids)}]"
        way = way._replace(mids=True, declared=now(.1), ups=now(.3))
    elif kind!='outer' and now(.4): # in a Model
        base,shape = w.base(),[*w.env[ends[0]].shape]
        back = '+'.join([ends[0], *(f'{n}.mean()' for n in unread if n!=ends[0] and now(.7))])
        if now(.4):
            net,back = 'Model(Net())',f"{{'loss': ({back}).sum(), 'more': {back}}}"
            way = way._replace(key='loss')
        else:
            of,targ = losses,f'torch.randn({shape})'
            if len(shape)==2 and now(.5):
                of,targ = class_losses,f'torch.randint({shape[1]}, ({shape[0]},))'
            net,inputs['targ'] = f'Model(Net(), {rng.choice(of)})',targ
    elif len(ends)>1 and now(.3): back = f"{{'one': {ends[0]}, 'more': [{', '.join(ends[1:])}]}}"
    if now(.05): after.append('net.eval()')
    if kind=='nodes': after.append('net.as_nodes()')
    lean = kind in ('loss','walk') and now(.3)
    if lean: after.append('net.retain(False)')
    else:
        may = asked if kind!='walk' and kind!='recording' else kind=='recording' and not way.ups
        way = way._replace(walks=1+now(.15), apart=may and now(.2))
    const = (rng.randrange(len(inputs)),)*now(.2)
    way = way._replace(calls=rng.choice([1]*8+[2,3]), formulas=now(.4), const=const)

    sources = [w.source('Net', back, base)]
    for s in reversed(made.sources): # those that are called
        if re.match(r'class (\w+)', s)[1]+'()' in '\n'.join(sources): sources.insert(0, s)
    plain = way==Way(kind, asked=asked, mids=way.mids, formulas=way.formulas, declared=way.declared)
    if only=='theirs' and kind=='recording' and plain:
        way = way._replace(tiny=not re.search(beyond_tiny, '\n'.join(sources)))
    options = [f'{k}={v!r}' for k,v in way._asdict().items() if v!=Way._field_defaults.get(k)]
    return '\n'.join([f'torch.manual_seed({seed})', *sources, f'net = {net}', *after,
        f"inputs = [{', '.join(inputs.values())}]", f"way = Way({', '.join(options)})"])+'\n'

def program(seed):
    "A program that plain torch runs, with a gradient"
    rng = random.Random(seed)
    with doubles():
        while True:
            torch.manual_seed(seed)
            try:
                ref = Run(source := draft(rng, seed), 'torch')
                if ref.sound(): return source
            except Exception: pass


# Running

class Left(AssertionError): "A refused pass has left something behind"

class Run:
    """A program, run by torch (the reference), by fnnlite or by the minimal record: outputs and
    gradients by name. `live`, by torch: which outputs of each call have a gradient"""
    def __init__(self, source, by, live=None):
        here = dict(space)
        exec(source, here)
        self.net,self.inputs,self.way = here['net'],here['inputs'],here['way']
        self.by,self.ours,self.live,self.got = by,by!='torch',live or [],{}
        # gradients of what is no parameter: of the last walk, or the sum of all
        self.afresh = self.way.by_hand or not self.way.asked
        for n in range(self.way.calls): self.call(n)
        for n,p in self.net.named_parameters():
            self.got[f'gradient of parameter {n}'] = p.g if by=='tiny' else p.grad
        buffers = () if 'checkpoint' in source else self.net.named_buffers() # autograd runs a checkpointed part twice
        for n,b in buffers: self.got[f'buffer {n}'] = b.clone()

    def mode(self, given):
        if self.by=='torch': return through_forward()
        if self.by=='tiny': return TinyRecord()
        if self.way.kind!='recording': return nullcontext()
        return recording(*given if self.way.declared else ())

    def call(self, n):
        "A forward, and the walks back over it"
        way,xs = self.way,[t*(1+n/2) if is_float(t) else t for t in self.inputs]
        inps = {f'input {i}':t for i,t in enumerate(xs) if is_float(t) and i not in way.const}
        for t in inps.values(): t.requires_grad_(not self.ours or way.asked)
        given = [const(t) if self.ours and i in way.const else t for i,t in enumerate(xs)]
        torch.manual_seed(n)
        with self.mode(given) as rec:
            outs,mids = self.net(*given) if way.mids else (self.net(*given),[])
            outs = floats(outs[way.key] if way.key else outs)
            if not self.ours: self.live.append([o.requires_grad and self.made(o, xs) for o in outs])
            for i,o in enumerate(outs): self.got[f'call {n}: output {i}'] = o.detach().clone()
            single = len(outs)==1 and not outs[0].ndim
            g = torch.Generator().manual_seed(0)
            ups = [torch.randn(o.shape, generator=g) for o in outs]
            outs,ups = ([t for t,l in zip(ts, self.live[n]) if l] for ts in (outs,ups))
            if single: ups = [torch.ones(())]
            parts = outs if single else [(o*u).sum() for o,u in zip(outs, ups)]
            steps = (parts if way.apart else [sum(parts[1:], parts[0])])*way.walks
        inps |= {f'tensor {i} between':t for i,t in enumerate(mids) if is_float(t) and not isinstance(t, nn.Parameter)}
        if not self.ours: inps = {k:t for k,t in inps.items() if comparable(t)}
        for i,loss in enumerate(steps):
            if not self.ours and self.afresh:
                for t in inps.values(): t.grad = None
            if not self.ours or not way.by_hand:
                with nullcontext() if self.ours else through_forward(): # a checkpoint calls its part again
                    loss.backward(retain_graph=i<len(steps)-1)
            elif way.kind=='recording': self.walk(rec.backward, *(outs,ups) if way.ups else [loss])
            else: self.walk(self.net.backward, *[] if single else ups if len(ups)==1 else [ups])
        for k,t in inps.items():
            self.got[f'call {n}: gradient of {k}'] = t.g if self.ours and self.afresh else t.grad

    def made(self, o, xs):
        "An input that is handed on isn't what the net has made"
        way,handed = self.way,any(o is x for x in xs)
        if way.kind=='recording': return not (handed and way.ups)
        return not handed or way.asked and not way.by_hand

    def walk(self, back, *args):
        ps = list(self.net.parameters())
        before = [None if p.grad is None else p.grad.clone() for p in ps]
        try: back(*args)
        except GradError as e:
            if all(a is p.grad is None or None not in (a,p.grad) and torch.equal(a, p.grad)
                for a,p in zip(before, ps)): raise
            raise Left(f'the gradients of parameters are others after {e}')

    def sound(self):
        "There is a gradient that somebody gets, and none is infinite"
        gs = {k:g for k,g in self.got.items() if 'gradient' in k and g is not None and g.numel()}
        heard = 'gradient' if self.way.asked or self.way.by_hand else 'gradient of parameter'
        return all(g.isfinite().all() for g in gs.values()) and \
            any(g.abs().max()>1e-6 for k,g in gs.items() if heard in k)

def comparable(t):
    "Autograd leaves out of a changed view's gradient what the view gives its base"
    if t.requires_grad: t.retain_grad()
    return t.requires_grad and not (t._is_view() and t._version)

def difference(want, got):
    "What is wrong in `got`, or ''; a gradient of None is 0"
    def size(t): return t.abs().max().item() if t is not None and t.numel() else 0.
    largest = max(size(t if t is None else t.nan_to_num()) for t in want.values())
    for name,w in want.items():
        g = got[name]
        if w is g is None: continue
        w,g = (torch.zeros_like(g) if w is None else w),(torch.zeros_like(w) if g is None else g)
        if w.shape!=g.shape or w.dtype!=g.dtype:
            return f'{name} is {g.dtype} {[*g.shape]}, expected {w.dtype} {[*w.shape]}'
        both = w.isnan()&g.isnan() # a mean of nothing is NaN in torch too
        w,g = w.where(~both, 0),g.where(~both, 0)
        off,tol = size(w-g),1e-9*max(size(w), largest/1000)
        if not off<=tol: return f'{name} is off by {off:.2g} of {size(w):.2g}'
    return ''

torchs_refusals = "inplace|in-place|does not require grad"

def check(source):
    "right, refused, wrong, crash or invalid (by torch); and why"
    with doubles():
        try: ref = Run(source, 'torch')
        except Exception as e: return 'invalid',f'{type(e).__name__}: {e}'
        kernels.on = not ref.way.formulas
        try:
            for by in ('fnnlite','tiny')[:1+ref.way.tiny]:
                wrong = difference(ref.got, Run(source, by, ref.live).got)
                if wrong: return 'wrong',f'{by}: {wrong}'
        except GradError as e: return 'refused',str(e)
        except Exception as e:
            verdict = 'refused' if re.search(torchs_refusals, str(e)) else 'crash'
            return verdict,f'{by}: {type(e).__name__}: {e}'
        finally: kernels.on = True
    return 'right',''

def reason(why):
    "Of a refusal, without what differs from program to program"
    why = re.sub(r'\([\d, ]*\)|\[.*\]', '()', why.partition('\n')[0])
    why = re.sub(r"^((\w+( \(\S+\))?|fnnlite|RuntimeError): )+", '', why)
    why = re.sub(r"'\w+'", "'...'", re.sub(r'^\S+: ', '', why))
    if 'no gradient rule' not in why: why = re.sub(r'^(\w+\.)?\w+ (got|change)', r'... \2', why)
    return why.partition(': ')[0]

def kind(source):
    "How a program is run, for counting"
    model = ' of a Model' if 'net = Model' in source else ''
    return re.search(r"Way\(kind='(\w+)'", source)[1]+model

def shrink(source, check=check):
    "What is left of a program when lines, outputs and options go that its verdict doesn't need"
    def verdict(s):
        v,why = check(s)
        return v,re.sub(r'[\d.e-]+', '', reason(why))[:40]
    def shorter():
        lines = source.splitlines()
        indent = [len(l)-len(l.lstrip()) for l in lines]
        for i in reversed(range(1, len(lines))): # the first is the seed
            end = next((j for j in range(i+1, len(lines)) if indent[j]<=indent[i]), len(lines))
            yield '\n'.join(lines[:i]+lines[end:])+'\n'
        bits = r', \w+=[^,)]+|\b\w+, (?=.*\])|, \w+(?=\])|\+v\d+.mean\(\)'
        for m in reversed([*re.finditer(bits, source)]): yield source[:m.start()]+source[m.end():]
    first = verdict(source)
    while less := next((s for s in shorter() if verdict(s)==first), None): source = less
    return source
