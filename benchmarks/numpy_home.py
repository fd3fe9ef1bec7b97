"The step in numpy, by hand, as the tutorials have it"
from functools import lru_cache
import numpy as np

@lru_cache
def data(w): return w.data()

def loss_grad(w, out, y):
    "The loss, and its gradient by `out`"
    if w.loss=='ce':
        e = np.exp(out-out.max(1, keepdims=True))
        p,rows = e/e.sum(1, keepdims=True),np.arange(len(y))
        loss = -np.log(p[rows,y]).mean()
        p[rows,y] -= 1
        return loss,p/len(y)
    d = out-y
    return (np.square(d).mean(), 2*d/d.size) if w.loss=='mse' else (np.square(d).sum(), 2*d)

def grads(w, ps, x, y):
    "The loss, and the gradients of all weights and biases, layer by layer"
    hs = [x]
    for i,(wt,b) in enumerate(ps):
        h = hs[-1]@wt
        if b is not None: h = h+b
        hs.append(np.maximum(h, 0) if i<len(ps)-1 else h)
    loss,g = loss_grad(w, hs.pop(), y)
    gs = []
    for (wt,b),h in zip(reversed(ps), reversed(hs)):
        gs.insert(0, (h.T@g, None if b is None else g.sum(0)))
        if h is not x: g = g@wt.T*(h>0)
    return loss,gs

def build(w, opt, device):
    (x,y),ps,lr,t = data(w),w.start(),w.rule(opt)[1]['lr'],0
    flat = lambda ps: [p for wb in ps for p in wb if p is not None]
    ms,vs = ([np.zeros_like(p) for p in flat(ps)] for _ in range(2))
    def step():
        nonlocal t
        t += 1
        loss,gs = grads(w, ps, x, y)
        for p,g,m,v in zip(flat(ps), flat(gs), ms, vs):
            if opt=='sgd': p -= lr*g
            elif opt=='momentum':
                m[:] = .9*m+g
                p -= lr*m
            else:
                m[:] = .9*m+.1*g
                v[:] = .999*v+.001*g*g
                p -= lr*(m/(1-.9**t))/(np.sqrt(v/(1-.999**t))+1e-8)
        return loss
    return step

builders = {'numpy': build}
