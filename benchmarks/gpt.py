"""A step of nanoGPT's recipe for a CPU, by torch and by fnnlite: `python -m benchmarks.gpt`

4 layers, 4 heads, 128 wide, 12 rows of 64 characters, no bias, no dropout; AdamW with weight decay on matrices,
gradients clipped at 1. The net is plain `torch.nn`. Prints the median time of a step of each way, and its ratio to torch's."""
import argparse, time
from functools import partial
from statistics import median
import torch
import torch.nn.functional as F
from torch import nn

class Block(nn.Module):
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
        self.blocks,self.norm = nn.ModuleList([Block(n_embd, n_head) for _ in range(n_layer)]),nn.LayerNorm(n_embd, bias=False)
        self.head = nn.Linear(n_embd, vocab, bias=False)
        for p in self.parameters():
            if p.ndim>1: nn.init.normal_(p, std=.02)
        self.head.weight = self.wte.weight

    def forward(self, idx, targ):
        x = self.wte(idx)+self.wpe(torch.arange(idx.shape[1], device=idx.device))
        for block in self.blocks: x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targ.view(-1))

def groups(net): # of parameters: matrices with weight decay, and the rest
    ps = list(net.parameters())
    return [dict(params=[p for p in ps if p.ndim>1], weight_decay=.1), dict(params=[p for p in ps if p.ndim<2], weight_decay=0.)]

def step(net, loss, opt, clip, back, idx, targ):
    l = loss(idx, targ)
    back(l)
    if clip: torch.nn.utils.clip_grad_norm_(net.parameters(), 1.)
    opt.step()
    opt.zero_grad(set_to_none=True)
    return l.detach()

def ways(names, clip):
    "A function of a batch that takes a step, for each of `names`"
    from fnnlite import AdamW, Model, compile_step
    res,first = {},GPT().state_dict()
    for name in names:
        net = GPT()
        net.load_state_dict(first)
        opt = torch.optim.AdamW(groups(net), lr=1e-3, betas=(.9,.99))
        model = Model(net)
        if name=='torch eager': res[name] = partial(step, net, net, opt, clip, torch.Tensor.backward)
        if name=='torch.compile': res[name] = partial(step, net, torch.compile(net), opt, clip, torch.Tensor.backward)
        if name=='loss.backward': res[name] = partial(step, net, model, opt, clip, torch.Tensor.backward)
        if name=='model.backward': res[name] = partial(step, net, model, opt, clip, lambda l, m=model: m.backward(free=True))
        if name=='lean': res[name] = partial(step, net, model.retain(False), opt, clip, lambda l, m=model: m.backward())
        if name=='compiled': res[name] = compile_step(model, AdamW(groups(net), lr=1e-3, betas=(.9,.99)))
    return res

def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--rounds', type=int, default=10, help="how often each way has its turn")
    parser.add_argument('--steps', type=int, default=5, help="steps a turn")
    parser.add_argument('--compiled', action='store_true', help="torch.compile and compile_step too, without clipping in both")
    args = parser.parse_args()
    torch.manual_seed(0)
    names = ['torch eager','loss.backward','model.backward','lean']+['torch.compile','compiled']*args.compiled
    steps = ways(names, clip=not args.compiled)
    batches = [torch.randint(65, (2, 12, 64)).unbind() for _ in range(8)]
    losses,times = {},{n:[] for n in names}
    for n in names: losses[n] = [steps[n](*batches[i%8]).item() for i in range(4)] # warm, and the same in all
    for n in names: torch.testing.assert_close(losses[n], losses['torch eager'], rtol=1e-3, atol=1e-3)
    for _ in range(args.rounds):
        for n in names:
            start = time.perf_counter()
            for i in range(args.steps): steps[n](*batches[i%8])
            times[n].append((time.perf_counter()-start)/args.steps)
    for n in names: print(f"{n:15} {1e3*median(times[n]):7.1f} ms  {median(a/b for a,b in zip(times[n], times['torch eager'])):.2f}")

if __name__=='__main__': main()
