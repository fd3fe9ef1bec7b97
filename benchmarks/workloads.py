"The training steps that are measured, and the peers that take them"
import math
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import groupby
import numpy as np

# the module that a peer needs, and lives in a process with: its peers, in the order of the tables
homes = {
    'torch': ['fnnlite eager', 'fnnlite lean', 'fnnlite graph', 'fnnlite compiled', 'torch eager', 'torch fused', 'torch fused (medium)',
        'torch.compile loss', 'torch.func compiled', 'torch.func compiled (C++)', 'floor'],
    'jax': ['jax jit', 'jax jit (donated)'],
    'tinygrad': ['tinygrad jit'],
    'numpy': ['numpy']}
home_of = {name:home for home,names in homes.items() for name in names}

def left_out(names, device):
    "Why some of the peers `names` can't be here: {name: reason}"
    res = {name:f'{home_of[name]} is not installed' for name in names if not find_spec(home_of[name])}
    return res if device=='cpu' else {**res, 'numpy':'it has no GPU'}

@dataclass(frozen=True)
class Workload:
    "Linear layers with ReLU between them, a loss, and one batch of random numbers; the same for every peer"
    name:str
    sizes:tuple # inputs, hidden, outputs
    bs:int
    loss:str='ce' # cross-entropy; 'mse' or 'sse': squared error, its mean or its sum
    bias:bool=True
    lr:float=.01 # of SGD
    opts:tuple=('sgd','momentum','adam')

    @property
    def layers(self): return list(zip(self.sizes, self.sizes[1:]))
    @property
    def title(self):
        runs = [(n,len(list(ns))) for n,ns in groupby(self.sizes)]
        return '-'.join(f'{k}×{n}' if k>1 else str(n) for n,k in runs)+f', {self.bs:,} rows'

    def data(self):
        "Inputs (bs,ni), and classes (bs) or numbers (bs,nf)"
        rng,nf = np.random.default_rng(0),self.sizes[-1]
        x = rng.standard_normal((self.bs, self.sizes[0]), dtype=np.float32)
        return x,rng.integers(0, nf, self.bs) if self.loss=='ce' else rng.standard_normal((self.bs, nf), dtype=np.float32)

    def start(self, seed=1):
        "Kaiming's weights (ni,nf), and zeros (nf) or `None`, for each layer"
        rng = np.random.default_rng(seed)
        return [(rng.standard_normal((ni, nf), dtype=np.float32)*np.float32(math.sqrt(2/ni)), np.zeros(nf, np.float32) if self.bias else None)
            for ni,nf in self.layers]

    def rule(self, opt):
        "The optimizer `opt`: the name that torch, tinygrad and fnnlite all have for it, and its options"
        if opt=='adam': return 'Adam',dict(lr=1e-4)
        return 'SGD',dict(lr=self.lr, momentum=.9 if opt=='momentum' else 0.)

    def tiny(self): return replace(self, bs=min(self.bs, 32), sizes=tuple(min(n, 16) for n in self.sizes))

big = ('sgd','adam') # momentum's share of a large step is hard to see
workloads = {w.name:w for w in (
    Workload('lesson', (784,50,1), 50000, 'mse', lr=1e-3, opts=big),
    Workload('numpy', (785,100,10), 60000, bias=False, opts=big),
    Workload('ladder', (1000,100,10), 64, 'sse', lr=1e-5),
    Workload('mlp64', (784,50,10), 64),
    Workload('mlp512', (784,50,10), 512),
    Workload('mlp4096', (784,50,10), 4096),
    Workload('wide512', (784,512,512,10), 512),
    Workload('deep256', (*[1024]*9,10), 256),
    Workload('deep4096', (*[1024]*9,10), 4096, opts=big))}
