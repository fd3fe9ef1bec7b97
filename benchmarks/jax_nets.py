"The nets of `nets` in JAX: the same start, the same losses, a step as one compiled function from state to state"
from functools import partial
import jax, jax.numpy as jnp, numpy as np
from jax import lax

tmap = jax.tree.map

def cross_entropy(logits, targ): return -jnp.take_along_axis(jax.nn.log_softmax(logits), targ[...,None], -1).mean()

def layer_norm(x, w):
    x = x-x.mean(-1, keepdims=True)
    return x*lax.rsqrt((x*x).mean(-1, keepdims=True)+1e-5)*w

def attention(q, k, v):
    "(B,T,heads,C)"
    T,C = q.shape[1],q.shape[3]
    scores = jnp.einsum('bqhc,bkhc->bhqk', q, k)/C**.5
    scores = jnp.where(jnp.tril(jnp.ones((T,T), bool)), scores, -jnp.inf)
    return jnp.einsum('bhqk,bkhc->bqhc', jax.nn.softmax(scores), v)

def gpt(ps, stats, idx, targ, n_layer=4, n_head=4):
    (B,T),x = idx.shape,ps['wte.weight'][idx]+ps['wpe.weight'][:idx.shape[1]]
    for i in range(n_layer):
        w = lambda name: ps[f'blocks.{i}.{name}.weight']
        heads = [t.reshape(B, T, n_head, -1) for t in jnp.split(layer_norm(x, w('norm1'))@w('attn').T, 3, -1)]
        x = x+attention(*heads).reshape(B, T, -1)@w('proj').T
        x = x+jax.nn.gelu(layer_norm(x, w('norm2'))@w('mlp.0').T, approximate=False)@w('mlp.2').T
    return cross_entropy(layer_norm(x, ps['norm.weight'])@ps['wte.weight'].T, targ),stats

def lstm(ps, stats, idx, targ):
    x,nf = ps['embed.weight'][idx],ps['lstm.weight_hh_l0'].shape[1]
    z = x@ps['lstm.weight_ih_l0'].T+ps['lstm.bias_ih_l0']+ps['lstm.bias_hh_l0'] # of all steps at once
    def step(state, z):
        h,c = state
        i,f,g,o = jnp.split(z+h@ps['lstm.weight_hh_l0'].T, 4, -1)
        c = jax.nn.sigmoid(f)*c+jax.nn.sigmoid(i)*jnp.tanh(g)
        h = jax.nn.sigmoid(o)*jnp.tanh(c)
        return (h,c),h
    zeros = jnp.zeros((idx.shape[0], nf))
    _,hs = lax.scan(step, (zeros,zeros), z.swapaxes(0, 1))
    return cross_entropy(hs.swapaxes(0, 1)@ps['head.weight'].T+ps['head.bias'], targ),stats

def conv(x, w, stride=1, padding=0):
    "Pictures as (n,h,w,c), which is fastest on a CPU"
    return lax.conv_general_dilated(x, w, (stride,)*2, [(padding,)*2]*2, dimension_numbers=('NHWC','HWIO','NHWC'))

def halved(x):
    "The mean of each square of 2×2; those at an odd edge are smaller"
    pad = [(0,0), (0,x.shape[1]%2), (0,x.shape[2]%2), (0,0)]
    sums = lambda t: lax.reduce_window(t, 0., lax.add, (1,2,2,1), (1,2,2,1), pad)
    return sums(x)/sums(jnp.ones((1,*x.shape[1:3],1)))

def batch_norm(ps, stats, name, x):
    mean,var,n = x.mean((0,1,2)),x.var((0,1,2)),x.size/x.shape[-1]
    running = {f'{name}.running_mean':mean, f'{name}.running_var':var*n/(n-1)}
    stats = {**stats, **{k:.9*stats[k]+.1*lax.stop_gradient(v) for k,v in running.items()}}
    return (x-mean)*lax.rsqrt(var+1e-5)*ps[f'{name}.weight']+ps[f'{name}.bias'],stats

def resnet(ps, stats, x, targ):
    x = x.transpose(0, 2, 3, 1)
    for i in range(5):
        p,stride = f'blocks.{i}.',1+(i>0)
        h,stats = batch_norm(ps, stats, p+'norm1', conv(x, ps[p+'conv1.weight'], 1, 1))
        h,stats = batch_norm(ps, stats, p+'norm2', conv(jax.nn.relu(h), ps[p+'conv2.weight'], stride, 1))
        if stride==2: x = halved(x)
        short = [k for k in ps if k.startswith(p+'short')]
        x = jax.nn.relu(h+(conv(x, ps[short[0]]) if short else x))
    return cross_entropy(x.mean((1,2))@ps['head.weight'].T+ps['head.bias'], targ),stats

def adamw(ps, gs, ms, vs, t, lr=1e-3, b1=.9, b2=.99, eps=1e-8):
    "Weight decay on matrices, as `nets.groups` has it"
    ms,vs = tmap(lambda m,g: b1*m+(1-b1)*g, ms, gs),tmap(lambda v,g: b2*v+(1-b2)*g*g, vs, gs)
    moved = lambda p,m,v: p*(1-lr*(.1 if p.ndim>1 else 0))-lr*m/(1-b1**t)/(jnp.sqrt(v/(1-b2**t))+eps)
    return tmap(moved, ps, ms, vs),ms,vs

def build(name, net, clip):
    "A function of a batch that takes a step, from the start that the torch net `net` has"
    f = dict(gpt=gpt, resnet=resnet, lstm=lstm)[name]
    array = lambda t: jnp.array(t.detach().numpy())
    ps = {k:array(p.permute(2, 3, 1, 0) if p.ndim==4 else p) for k,p in net.named_parameters()}
    stats = {k:array(b) for k,b in net.named_buffers() if b.is_floating_point()}
    state = ps,stats,tmap(jnp.zeros_like, ps),tmap(jnp.zeros_like, ps),jnp.zeros(())

    @partial(jax.jit, donate_argnums=0)
    def update(state, *batch):
        ps,stats,ms,vs,t = state
        (loss,stats),gs = jax.value_and_grad(f, has_aux=True)(ps, stats, *batch)
        if clip:
            norm = jnp.sqrt(sum((g*g).sum() for g in gs.values()))
            gs = tmap(lambda g: g*jnp.minimum(1, clip/(norm+1e-6)), gs)
        ps,ms,vs = adamw(ps, gs, ms, vs, t+1)
        return (ps,stats,ms,vs,t+1),loss

    def step(*batch):
        nonlocal state
        state,loss = jax.block_until_ready(update(state, *(np.asarray(b) for b in batch)))
        return loss
    return step
