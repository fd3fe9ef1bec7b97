"""Nets of plain `torch.nn`, by torch and by fnnlite: how long a step takes, and how much memory

gpt: nanoGPT's recipe for a CPU, 4 layers, 4 heads, 128 wide, 12 rows of 64 characters, no bias, no dropout; gradients clipped at 1.
resnet: five blocks of two 3×3 convolutions, 8 to 64 channels, on 64 pictures of 28×28.
lstm: a language model of one LSTM (65-128-256-65), 32 rows of 64 characters.
gpt2: the first one at GPT-2's size, 124 million weights, 4 rows of 64; eager only, compiling takes minutes.
All by AdamW with weight decay on matrices."""
import tempfile, time
from functools import partial
from importlib.util import find_spec
from statistics import median
import torch
import torch.nn.functional as F
from torch import nn
from .workers import PeerError, fresh, own_cache, say

class GPTBlock(nn.Module):
    "Attention, then two layers, each added to what came in: (B,T,C)"
    def __init__(self, n_embd, n_head):
        super().__init__()
        self.n_head = n_head
        self.norm1,self.norm2 = (nn.LayerNorm(n_embd, bias=False) for _ in range(2))
        self.attn,self.proj = nn.Linear(n_embd, 3*n_embd, bias=False),nn.Linear(n_embd, n_embd, bias=False)
        self.mlp = nn.Sequential(nn.Linear(n_embd, 4*n_embd, bias=False), nn.GELU(), nn.Linear(4*n_embd, n_embd, bias=False))

    def forward(self, x):
        B,T,C = x.shape
        heads = [t.view(B, T, self.n_head, -1).transpose(1, 2) for t in self.attn(self.norm1(x)).split(C, dim=2)]
        y = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x+self.proj(y.transpose(1, 2).reshape(B, T, C))
        return x+self.mlp(self.norm2(x))

class GPT(nn.Module):
    "Characters (B,T) and the next ones (B,T) to the cross-entropy; the head is the embedding's weight"
    def __init__(self, vocab=65, block=64, n_layer=4, n_head=4, n_embd=128):
        super().__init__()
        self.wte,self.wpe = nn.Embedding(vocab, n_embd),nn.Embedding(block, n_embd)
        self.blocks,self.norm = nn.ModuleList([GPTBlock(n_embd, n_head) for _ in range(n_layer)]),nn.LayerNorm(n_embd, bias=False)
        self.head = nn.Linear(n_embd, vocab, bias=False)
        for p in self.parameters():
            if p.ndim>1: nn.init.normal_(p, std=.02)
        self.head.weight = self.wte.weight

    def forward(self, idx, targ):
        x = self.wte(idx)+self.wpe(torch.arange(idx.shape[1], device=idx.device))
        for block in self.blocks: x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targ.view(-1))

class ResBlock(nn.Module):
    "Two convolutions, and what came in added to them: (n,ni,h,w) to (n,nf,h/stride,w/stride)"
    def __init__(self, ni, nf, stride):
        super().__init__()
        conv = partial(nn.Conv2d, kernel_size=3, padding=1, bias=False)
        self.conv1,self.norm1 = conv(ni, nf),nn.BatchNorm2d(nf)
        self.conv2,self.norm2 = conv(nf, nf, stride=stride),nn.BatchNorm2d(nf)
        self.short = nn.Sequential(*[nn.AvgPool2d(2, ceil_mode=True)]*(stride==2), *[nn.Conv2d(ni, nf, 1, bias=False)]*(ni!=nf))

    def forward(self, x): return F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))+self.short(x))

class ResNet(nn.Module):
    "Pictures (n,1,h,w) and their classes (n) to the cross-entropy"
    def __init__(self, sizes=(1,8,16,32,64,64)):
        super().__init__()
        self.blocks = nn.Sequential(*[ResBlock(ni, nf, 1+(i>0)) for i,(ni,nf) in enumerate(zip(sizes, sizes[1:]))])
        self.head = nn.Linear(sizes[-1], 10)
        self.to(memory_format=torch.channels_last) # torch's advice for CPUs: all ways are faster by it
    def forward(self, x, targ): return F.cross_entropy(self.head(self.blocks(x).mean((2,3))), targ)

class CharLSTM(nn.Module):
    "Characters (B,T) and the next ones (B,T) to the cross-entropy"
    def __init__(self, vocab=65, n_embd=128, n_hidden=256):
        super().__init__()
        self.embed,self.lstm,self.head = nn.Embedding(vocab, n_embd),nn.LSTM(n_embd, n_hidden, batch_first=True),nn.Linear(n_hidden, vocab)
    def forward(self, idx, targ): return F.cross_entropy(self.head(self.lstm(self.embed(idx))[0]).flatten(0, 1), targ.flatten())

def characters(B, T): return torch.randint(65, (2, B, T)).unbind()
def pictures(n): return torch.randn(n, 1, 28, 28),torch.randint(10, (n,))
nets = dict(gpt=(GPT, partial(characters, 12, 64), 1.), resnet=(ResNet, partial(pictures, 64), None), lstm=(CharLSTM, partial(characters, 32, 64), None),
    gpt2=(partial(GPT, 50257, 1024, 12, 12, 768), partial(characters, 4, 64), 1.))
names = ['torch eager','torch.compile','jax jit','fnnlite loss.backward','fnnlite eager','fnnlite lean','fnnlite compiled']
compiled = ['torch.compile','jax jit','fnnlite compiled']
unmeasured = ['torch.compile','jax jit'] # their memory: it doesn't come from torch's allocator alone

def groups(net): # of parameters: matrices with weight decay, and the rest
    ps = list(net.parameters())
    return [dict(params=[p for p in ps if p.ndim>1], weight_decay=.1), dict(params=[p for p in ps if p.ndim<2], weight_decay=0.)]

def build(name, net, clip):
    "A function of a batch that takes a step"
    from fnnlite import AdamW, Model, compile_step
    torch.manual_seed(0)
    which,net = net,nets[net][0]()
    if name=='jax jit':
        from . import jax_nets # where it is installed
        return jax_nets.build(which, net, clip)
    if name=='fnnlite compiled': return compile_step(Model(net), AdamW(groups(net), lr=1e-3, betas=(.9,.99)), max_norm=clip)
    opt = torch.optim.AdamW(groups(net), lr=1e-3, betas=(.9,.99))
    f = torch.compile(net) if name=='torch.compile' else net if name=='torch eager' else Model(net).retain(name!='fnnlite lean')
    by_walk = name in ('fnnlite eager','fnnlite lean')
    def step(*batch):
        loss = f(*batch)
        (f if by_walk else loss).backward()
        if clip: nn.utils.clip_grad_norm_(net.parameters(), clip)
        opt.step()
        opt.zero_grad()
        return loss.detach()
    return step

def measure(net, names, rounds, steps=5):
    "Seconds of a step in each round, and of the first one, for each of the ways `names`, in turn; all must give the same losses"
    make,batch,clip = nets[net]
    torch.manual_seed(1)
    batches,times,firsts,losses = [batch() for _ in range(8)],{n:[] for n in names},{},{}
    ways = {n:build(n, net, clip) for n in names}
    for n in names:
        start = time.perf_counter()
        losses[n] = [ways[n](*batches[0]).item()]
        firsts[n] = time.perf_counter()-start
        losses[n] += [ways[n](*batches[i]).item() for i in (1,2)]
        torch.testing.assert_close(losses[n], losses[names[0]], rtol=2e-3, atol=2e-3)
    for r in range(rounds):
        for n in names[::-1 if r%2 else 1]:
            ways[n](*batches[0])
            start = time.perf_counter()
            for i in range(steps): ways[n](*batches[i])
            times[n].append((time.perf_counter()-start)/steps)
    return times,firsts

def peak(name, net):
    from .memory import cpu_peak, quiet
    quiet()
    make,batch,clip = nets[net]
    step,b = build(name, net, clip),batch()
    for _ in range(3): step(*b)
    return cpu_peak(lambda: step(*b))

def run(args, fail):
    for net in nets if args.device=='cpu' else ():
        if args.quick and net=='gpt2': continue
        say(f'nets: {net}')
        chosen = names if not (args.quick or net=='gpt2') else [n for n in names if n not in compiled]
        if 'jax jit' in chosen and find_spec('jax') is None:
            fail('nets', net, 'jax jit', PeerError('jax is not installed'))
            chosen = [n for n in chosen if n!='jax jit']
        try:
            with tempfile.TemporaryDirectory() as cache: times,firsts = fresh(measure, net, chosen, args.rounds, **own_cache(cache))
        except PeerError as e:
            fail('nets', net, 'all', e)
            continue
        rows = [dict(net=net, peer=n, median=median(ts), min=min(ts), max=max(ts), first=firsts[n], seconds=ts,
            to_eager=median(a/b for a,b in zip(ts, times['torch eager']))) for n,ts in times.items()]
        for r in rows: r['bytes'] = None if r['peer'] in unmeasured else fresh(peak, r['peer'], net)
        yield rows
