"tinygrad's peer"
import atexit, os, shutil, sys, tempfile
from importlib.util import find_spec
from pathlib import Path

def find_clang():
    "tinygrad's CPU backend calls clang: where there is none, that of the package ziglang will do"
    if shutil.which(os.environ.get('CC', 'clang')) or not find_spec('ziglang'): return
    path = Path(tempfile.gettempdir())/f'fnnlite-clang-{os.getpid()}'
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ziglang clang "$@"\n')
    path.chmod(0o700)
    atexit.register(path.unlink)
    os.environ['CC'] = str(path)

def build(w, opt, device):
    os.environ['DEV'] = 'CUDA' if device=='cuda' else 'CPU'
    if device=='cpu': find_clang()
    from tinygrad import Context, Device, Tensor, TinyJit, nn
    x,y = map(Tensor, w.data())
    ps = [[None if a is None else Tensor(a) for a in wb] for wb in w.start()]
    name,options = w.rule(opt)
    opt = getattr(nn.optim, name)([p for wb in ps for p in wb if p is not None], **options)
    Tensor.realize(x, y, *opt.params)
    def loss_of(x):
        for i,(wt,b) in enumerate(ps):
            x = x@wt if b is None else x@wt+b
            if i<len(ps)-1: x = x.relu()
        if w.loss=='ce': return x.sparse_categorical_crossentropy(y)
        return (x-y).square().mean() if w.loss=='mse' else (x-y).square().sum()
    @TinyJit
    def update():
        opt.zero_grad()
        loss = loss_of(x).backward()
        return loss.realize(*opt.schedule_step())
    def step():
        with Context(TRAINING=1): loss = update()
        Device[Device.DEFAULT].synchronize()
        return loss
    return step

builders = {'tinygrad jit': build}
