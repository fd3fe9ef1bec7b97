"Whole runs: seconds until 98 % of MNIST's validation digits are read right, by the same recipe"
import tempfile, time
from functools import partial
import torch
from .torch_home import fnn_model, fnn_step, losses, torch_net, torch_step
from .workers import PeerError, fresh, own_cache, say
from .workloads import Workload

recipe = Workload('mnist', (784,512,256,10), 128)
lr = 2e-3 # halved after each epoch

class FirstCall:
    "The function `f`; `secs` are those of its first call, which compiles"
    def __init__(self, f): self.f,self.secs = f,None
    def __call__(self, *args):
        if self.secs is not None: return self.f(*args)
        start = time.perf_counter()
        res = self.f(*args)
        self.secs = time.perf_counter()-start
        return res

def until(goal, epochs, step, opt, batches, predict, x, y):
    "Train until an epoch ends with the accuracy `goal`, for at most so many `epochs`"
    step,sched,start = FirstCall(step),torch.optim.lr_scheduler.ExponentialLR(opt, .5),time.perf_counter()
    for epoch in range(1, epochs+1):
        for xb,yb in batches(): step(xb, yb)
        with torch.no_grad(): acc = sum((predict(xb).argmax(-1)==yb).sum() for xb,yb in zip(x.split(1000), y.split(1000))).item()/len(x)
        if acc>=goal: break
        sched.step()
    return dict(seconds=time.perf_counter()-start, first=step.secs, epochs=epoch, accuracy=acc, reached=acc>=goal)

def loaders(m, seed, device):
    from fnnlite import DataLoaders
    return DataLoaders.from_arrays(*m, bs=recipe.bs, seed=seed, device=device, drop_last=True)

def fnnlite_run(m, goal, epochs, seed, device, how):
    from fnnlite import Adam
    model = fnn_model(recipe, device, seed=seed)
    opt = Adam(model.parameters(), lr=lr)
    dls = loaders(m, seed, device)
    return until(goal, epochs, fnn_step(model, opt, how), opt, lambda: dls.train, model.predict, dls.valid.x, dls.valid.y)

def torch_run(m, goal, epochs, seed, device, loader=False):
    from torch.utils.data import DataLoader, TensorDataset
    net = torch_net(recipe, device, seed=seed)
    opt = torch.optim.Adam(net.parameters(), lr=lr)
    step = torch_step(lambda xb,yb: losses['ce'](net(xb), yb), opt)
    dls = loaders(m, seed, device) # the same order, or luck would decide how many epochs it takes
    def from_loader():
        data,ids = TensorDataset(m[0], m[1]),dls.train.perm().tolist() # as `shuffle` would draw them
        dls.train.epoch += 1
        for xb,yb in DataLoader(data, recipe.bs, sampler=ids, drop_last=True): yield xb.to(device),yb.to(device)
    return until(goal, epochs, step, opt, from_loader if loader else lambda: dls.train, net, dls.valid.x, dls.valid.y)

runs = {
    'fnnlite compiled': partial(fnnlite_run, how='compiled'),
    'fnnlite compiled, the second time': partial(fnnlite_run, how='compiled'), # the library is there
    'fnnlite graph': partial(fnnlite_run, how='graph'),
    'fnnlite eager': partial(fnnlite_run, how='eager'),
    'torch, DataLoader': partial(torch_run, loader=True),
    'torch, tensors in memory': torch_run}

def one_run(name, data, goal, epochs, seed, device):
    from fnnlite import load_mnist
    return runs[name](load_mnist(data).normalize(), goal, epochs, seed, device)

def run(args, fail):
    from fnnlite import load_mnist
    if len(load_mnist(args.data).x_train)<60000 and not args.quick: return fail('mnist', '', 'all', 'all of MNIST is not here: --data PATH')
    goal,epochs,seeds = (.5,2,1) if args.quick else (.98,8,3)
    for seed in range(seeds): # seed by seed, so that a slow spell of the machine's hits all
        with tempfile.TemporaryDirectory() as cache: # each seed compiles for itself
            for name in runs:
                say(f'mnist: {name}, seed {seed}')
                try: yield [dict(peer=name, seed=seed, **fresh(one_run, name, args.data, goal, epochs, seed, args.device, **own_cache(cache)))]
                except PeerError as e: fail('mnist', f'seed {seed}', name, e)
