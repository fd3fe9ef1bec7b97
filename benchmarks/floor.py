"The least that a step must do: its matrix products, each by the fastest routine of full accuracy that is at hand"
import time
from itertools import product
import numpy as np, torch

def products(w):
    "(name, left, right, result), each matrix a (key, shape, transposed?); what `t` says is read as its transpose"
    for i,(ni,nf) in enumerate(w.layers):
        yield f'forward {i}', (f'h{i}',(w.bs,ni),False), (f'w{i}',(ni,nf),False), (f'h{i+1}',(w.bs,nf),False)
    for i,(ni,nf) in reversed(list(enumerate(w.layers))):
        yield f'weights {i}', (f'h{i}',(w.bs,ni),True), (f'g{i+1}',(w.bs,nf),False), (f'dw{i}',(ni,nf),False)
        if i: yield f'inputs {i}', (f'g{i+1}',(w.bs,nf),False), (f'w{i}',(ni,nf),True), (f'g{i}',(w.bs,ni),False)

class Matrices(dict):
    "Random matrices by key and layout, made when asked for, so that products share them as a step does"
    def __init__(self, device): self.device = device
    def __call__(self, mat, by_columns=False):
        key,shape,t = mat
        by_columns ^= t # the transpose of one is stored like the other
        if (key,by_columns) not in self:
            other = self.get((key,not by_columns))
            m = torch.randn(shape, device=self.device) if other is None else other
            self[key,by_columns] = m.t().contiguous().t() if by_columns else m.contiguous()
        m = self[key,by_columns]
        return m.t() if t else m

def candidates(mats, a, b, c):
    "Ways to the product: {name: function}, each returning the result"
    out,res = mats(c),{}
    for i,j in product((False,True), repeat=2):
        m,n,name = mats(a, i),mats(b, j),f"by {'columns' if i else 'rows'}, by {'columns' if j else 'rows'}"
        res[f'torch.mm ({name})'] = lambda m=m,n=n: torch.mm(m, n, out=out)
        if out.is_cpu: res[f'numpy.matmul ({name})'] = lambda m=m.numpy(),n=n.numpy(),o=out.numpy(): np.matmul(m, n, out=o)
    if out.is_cpu and torch.backends.mkldnn.is_available():
        m,n = mats(a),mats(b, True).t() # the weight as (nf,ni)
        res['mkldnn._linear_pointwise'] = lambda: torch.ops.mkldnn._linear_pointwise(m, n, None, 'none', [], '')
    return res

def error(f, exact): return (torch.as_tensor(f(), device=exact.device)-exact).abs().max().item()

def seconds(f, trial=.005):
    "The best of four trials"
    def trial_of(n):
        if torch.cuda.is_available(): torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(n): f()
        if torch.cuda.is_available(): torch.cuda.synchronize()
        return (time.perf_counter()-start)/n
    f()
    n = max(1, min(100, int(trial/trial_of(1))))
    return min(trial_of(n) for _ in range(4))

def choose(device, a, b, c, ok):
    "The name of the fastest candidate whose error is a plain product's, among those that are `ok`"
    mats = Matrices(device) # of its own: on shared ones, results have replaced some of the numbers
    fs = {n:f for n,f in candidates(mats, a, b, c).items() if ok(n)}
    exact = mats(a).double()@mats(b).double()
    limit = 2*error(next(iter(fs.values())), exact)
    return min((n for n,f in fs.items() if error(f, exact)<=limit), key=lambda n: seconds(fs[n]))

def build(w, opt, device):
    def step_of(ok):
        mats,best,info,fs = Matrices(device),{},{},[]
        for name,a,b,c in products(w):
            shape = a[1:],b[1:]
            if shape not in best: best[shape] = choose(device, a, b, c, ok)
            info[name] = best[shape]
            fs.append(candidates(mats, a, b, c)[best[shape]])
        def step():
            for f in fs: f()
        step.info = info
        return step
    # one library's threads may be in the way of another's: all from torch, or the best of each
    return min((step_of(ok) for ok in (lambda name: 'numpy' not in name, lambda name: True)), key=lambda step: seconds(step, .05))
