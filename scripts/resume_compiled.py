"""Runs with a compiled step that are killed in the middle of an epoch, and go on from their checkpoint: do they end with the unbroken run's bits?

    python scripts/resume_compiled.py [n]

For each of AdamW and SGD, in machine code and operation by operation, `n` times (default 7, with another start
and another moment of the kill each): weights, optimizer's memory and random numbers of both, bit by bit. Each run
is a process of its own; all take some five minutes of an idle machine."""
import random, signal, subprocess, sys, tempfile
from functools import partial
from pathlib import Path
import torch
from fnnlite import SGD, AdamW, CrossEntropy, DataLoaders, Dropout, Learner, Lin, Model, Relu
from fnnlite.train.callbacks import Callback, OneCycle
from fnnlite.train.resuming import Checkpoint
from fnnlite.train.checkpoints import load_tensors

epochs,batches = 5,8
opts = {'AdamW': partial(AdamW, lr=.01), 'SGD': partial(SGD, lr=.01, momentum=.9, nesterov=True, weight_decay=.01)}

class Kill(Callback):
    "An end without a farewell, before the batch `at` of the run"
    def __init__(self, at): self.at = at
    def before_batch(self):
        if self.training and self.epoch*self.n_iter+self.iter==self.at: signal.raise_signal(signal.SIGKILL)

def run(opt, compiled, seed, folder, at=-1):
    torch.manual_seed(seed)
    x,y = torch.randn(120, 20),torch.randint(0, 5, (120,))
    dls = DataLoaders.from_arrays(x, y, x[:20], y[:20], bs=16, seed=seed) # seven batches of 16, and one of 8
    model = Model([Lin(20, 30), Relu(), Dropout(.2), Lin(30, 5)], CrossEntropy())
    cbs = [OneCycle(.01), Checkpoint(folder, resume=True), Kill(at)]
    learn = Learner(model, dls, opts[opt], cbs=cbs, compiled=compiled)
    learn.fit(epochs)
    if learn.step.why_not: sys.exit(f"no compiled step: {learn.step.why_not}")

def process(*args): return subprocess.run([sys.executable, __file__, 'run', *map(str, args)], stdout=subprocess.DEVNULL).returncode

def main(n=7):
    failed = 0
    for compiled in ('machine code','graph'):
        for opt in opts:
            same = 0
            for seed in range(n):
                at = random.Random(seed).randrange(1, epochs*batches)
                with tempfile.TemporaryDirectory() as tmp:
                    whole,broken = Path(tmp)/'whole',Path(tmp)/'broken'
                    assert process(opt, compiled, seed, whole)==0
                    assert process(opt, compiled, seed, broken, at)==-signal.SIGKILL
                    assert process(opt, compiled, seed, broken)==0
                    (a,_),(b,_) = [load_tensors(f/'checkpoint.safetensors') for f in (whole,broken)]
                same += a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)
            print(f"{opt}, {compiled}: {same} of {n} resumed runs equal the unbroken one in all {len(a)} tensors", flush=True)
            failed += n-same
    return failed

if __name__=='__main__':
    if sys.argv[1:2]==['run']:
        opt,compiled,seed,folder,*at = sys.argv[2:]
        run(opt, 'graph' if compiled=='graph' else True, int(seed), folder, *map(int, at))
    else: sys.exit(main(*map(int, sys.argv[1:]))>0)
