"jax's peers: the step as one compiled function from state to state"
import os
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false') # a GPU's memory is for the other peers, too
import jax, jax.numpy as jnp, numpy as np
from functools import lru_cache, partial

jax.config.update('jax_default_matmul_precision', 'float32') # on a GPU it would be tf32, which torch doesn't use unless it's asked to
tmap = jax.tree.map

def put(tree, device): return jax.device_put(tree, jax.devices('gpu' if device=='cuda' else 'cpu')[0])

@lru_cache
def data(w, device): return put(w.data(), device)

def loss_of(w, ps, x, y):
    for i,(wt,b) in enumerate(ps):
        x = x@wt if b is None else x@wt+b
        if i<len(ps)-1: x = jax.nn.relu(x)
    if w.loss=='ce': return -jnp.take_along_axis(jax.nn.log_softmax(x), y[:,None], 1).mean()
    return ((x-y)**2).mean() if w.loss=='mse' else ((x-y)**2).sum()

def sgd(lr, gs, ps): return (tmap(lambda p,g: p-lr*g, ps, gs),)
def momentum(lr, gs, ps, vs):
    vs = tmap(lambda v,g: .9*v+g, vs, gs)
    return tmap(lambda p,v: p-lr*v, ps, vs),vs
def adam(lr, gs, ps, ms, vs, t):
    t = t+1
    ms,vs = tmap(lambda m,g: .9*m+.1*g, ms, gs),tmap(lambda v,g: .999*v+.001*g*g, vs, gs)
    return tmap(lambda p,m,v: p-lr/(1-.9**t)*m/(jnp.sqrt(v/(1-.999**t))+1e-8), ps, ms, vs),ms,vs,t

rules = {'sgd':(sgd,0), 'momentum':(momentum,1), 'adam':(adam,2)} # how much a rule remembers of each weight

def build(w, opt, device, **kw):
    (x,y),(rule,n),lr = data(w, device),rules[opt],w.rule(opt)[1]['lr']
    ps = w.start()
    zeros = lambda: tmap(np.zeros_like, ps)
    state = put((ps, *(zeros() for _ in range(n)), *([np.zeros((), np.float32)] if opt=='adam' else [])), device)
    @partial(jax.jit, **kw)
    def update(state, x, y):
        loss,gs = jax.value_and_grad(partial(loss_of, w))(state[0], x, y)
        return rule(lr, gs, *state),loss
    def step():
        nonlocal state
        state,loss = jax.block_until_ready(update(state, x, y))
        return loss
    return step

builders = {'jax jit': build, 'jax jit (donated)': partial(build, donate_argnums=0)}
