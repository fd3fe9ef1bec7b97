"What test_distributed.py starts with torchrun: `check` runs the checks named, `command` the training command, in which a process may be killed."
import contextlib, io, json, os, runpy, signal, sys, sysconfig, traceback
from copy import deepcopy
from functools import partial
from pathlib import Path
import pytest, torch, torch.distributed as dist
from fnnlite import SGD, Add, AdamW, CrossEntropy, DataLoaders, Distributed, Dropout, Learner, Lin, Model, Module, Mse, Relu, Tanh, accuracy
from fnnlite.core.record import GradError
from fnnlite.train import callbacks as cb
from fnnlite.train.callbacks import Callback, NonFiniteError, OneCycle
from fnnlite.train.resuming import Checkpoint
from fnnlite.train.distributed import DistributedError, own_device, processes, share
from helpers import by_autograd

torch.set_num_threads(1)
close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)
sgd = partial(SGD, lr=.2, momentum=.9)
rank = lambda: dist.get_rank()
script = str(Path(sysconfig.get_path('scripts'))/'fnnlite_train')

class On(Callback):
    "Calls `f(callback, ...)` at `event`."
    def __init__(self, event, f, order=0):
        self.order = order
        self.__class__ = type('On', (On,), {event: lambda self,*args: f(self, *args)})

def data(n, bs, dtype=torch.float64, nv=9, targ='classes'):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n+nv, 4, generator=g, dtype=torch.float64).to(dtype)
    y = torch.randint(3, (n+nv,), generator=g) if targ=='classes' else torch.randn(n+nv, 3, generator=g, dtype=torch.float64).to(dtype)
    return DataLoaders.from_arrays(x[:n], y[:n], x[n:], y[n:], bs=bs, valid_bs=4)

def net(dtype=torch.float64, loss=CrossEntropy): return Model([Lin(4, 6, dtype=dtype), Tanh(), Lin(6, 5, dtype=dtype), Relu(), Lin(5, 3, dtype=dtype)], loss())

def learner(*cbs, make=net, dls=None, opt=sgd, seed=0, metrics=(accuracy,)):
    torch.manual_seed(seed)
    return Learner(make(), dls or data(21, 8), opt, metrics, cbs)

def losses(learn): return [{k:-1 if v is None else v for k,v in r.items() if k!='time'} for r in learn.history]

def assert_same(a, b, tol=1e-10):
    assert len(a.history)==len(b.history)
    for r,s in zip(losses(a), losses(b)): assert r==pytest.approx(s, rel=tol, abs=tol), (r,s)
    for (n,p),q in zip(a.model.named_parameters(), b.model.parameters()): torch.testing.assert_close(p, q, rtol=tol, atol=tol, msg=lambda m: f'{n}: {m}')

def assert_as_one(*cbs, n=3, tol=1e-10, mk_dls=partial(data, 21, 8), **kw):
    "Together, from the first process's weights, it's the run of one process; the history is every process's, to the last digit."
    alone = learner(*(o() for o in cbs), dls=mk_dls(), **kw).fit(n)
    together = learner(Distributed(), *(o() for o in cbs), dls=mk_dls(), seed=rank(), **kw).fit(n)
    assert_same(together, alone, tol)
    everyone = [None]*dist.get_world_size()
    dist.all_gather_object(everyone, [losses(together), [p.detach() for p in together.model.parameters()]])
    for h,ps in everyone: assert h==losses(together) and all(map(torch.equal, ps, together.model.parameters()))
    return together

def same_losses_and_weights(folder):
    "The last batches are short: of training 5 rows of 8, of validation 1 of 4, so that some process has none."
    for opt in sgd,partial(AdamW, lr=.02): assert_as_one(opt=opt)

def float32(folder): assert_as_one(make=partial(net, torch.float32), mk_dls=partial(data, 21, 8, torch.float32), tol=1e-5)
def no_row_to_train_with(folder): assert_as_one(mk_dls=partial(data, 17, 8)) # 8, 8 and 1
def fewer_rows_than_processes(folder): assert_as_one(mk_dls=partial(data, 5, 1))

def other_losses(folder):
    assert_as_one(make=partial(net, loss=partial(CrossEntropy, 'sum')), opt=partial(SGD, lr=.02))
    floats = partial(data, 21, 8, targ='floats')
    for how in 'mean','sum': assert_as_one(make=partial(net, loss=partial(Mse, how)), mk_dls=floats, opt=partial(SGD, lr=.02), metrics=())

class Twice(Module):
    "The first layer is used once more, at the end."
    def __init__(self): self.a,self.b,self.c = (Lin(4, 4, dtype=torch.float64) for _ in range(3))
    def forward(self, x): return self.a(self.c(self.b(self.a(x))))

def shared_layer(folder): assert_as_one(make=lambda: Model(Twice(), CrossEntropy()))

class Branches(Module):
    "One branch for process 1 only, and one for none."
    def __init__(self): self.a,self.b,self.never,self.c,self.add = *(Lin(4, 4, dtype=torch.float64) for _ in range(4)),Add()
    def forward(self, x):
        x = self.a(x)
        return self.c(self.add(x, self.b(x)) if self.as_rank==1 else x)

def unused_branches(folder):
    "What no process used isn't updated, weight decay or not; the rest has the sum, whoever used it. Its gradient is autograd's, share by share."
    learn = learner(Distributed(), make=lambda: Model(Branches(), CrossEntropy()), dls=data(7, 7), opt=partial(AdamW, lr=.1, weight_decay=.5))
    model,got = learn.model,{}
    model.layers.as_rank = rank()
    ref,(x,y),world = deepcopy(model),learn.dls.one_batch(),dist.get_world_size()
    def look(self): got.update({n:(None if p.grad is None else p.grad.clone(), p.grad is p.g) for n,p in self.model.named_parameters()})
    learn.cbs.append(On('before_step', look))
    learn.fit(1)
    want = [torch.zeros_like(p) for p in ref.parameters()]
    for r in range(world):
        ref.layers.as_rank = r
        i,j = share(7, r, world)
        for w,g in zip(want, by_autograd(ref, x[i:j], y[i:j], g=[torch.tensor((j-i)/7, dtype=torch.float64)])[1:]): w += g
    for (n,p),w,before in zip(model.named_parameters(), want, ref.parameters()):
        assert got[n][1]
        if 'never' in n: assert got[n][0] is None and torch.equal(p, before)
        else: close(got[n][0], w)
        if '.b.' in n: assert w.abs().max()>0 and not torch.equal(p, before)

def cancels_in_all(folder):
    "What a cancelled batch left in `.g` counts once (that is how gradients are accumulated); no process waits for another."
    def at(event, name, iters=(1,)):
        def f(self, *args):
            if self.training and self.iter in iters: raise cb.cancels[name]
        return lambda: On(event, f, order=1)
    assert_as_one(at('before_step', 'batch', (0,1)))
    for event in 'before_batch','after_pred','before_backward','grad_ready','after_backward','before_step','after_step','after_batch':
        for name in ('train','epoch') if event=='after_batch' else ('batch','train'): assert_as_one(at(event, name), n=2)
    for event,name in ('before_backward','backward'),('grad_ready','backward'),('before_step','step'): assert_as_one(at(event, name), n=2)

def fails(kind, *cbs, **kw):
    "The error that comes out of `fit` in this process."
    learn = learner(Distributed(), *cbs, **kw)
    with pytest.raises(kind) as e: learn.fit(2)
    return str(e.value)

def one_only(self, *args):
    return rank()==1 and self.training and self.epoch==1 and self.iter==1

def cancelled_in_one(folder):
    "No gradient is used, and every process says who did what."
    for event,exc in ('after_loss',cb.CancelBatchException),('before_backward',cb.CancelBackwardException),('after_pred',cb.CancelTrainException):
        def f(self):
            if one_only(self): raise exc
        said = fails(DistributedError, On(event, f))
        assert 'process 0 goes through a batch (epoch 1, batch 1, 8 rows)' in said and 'process 1 leaves a batch early (epoch 1, batch 1, 8 rows)' in said, said
    def f(self):
        if one_only(self): raise cb.CancelTrainException
    said = fails(DistributedError, On('after_step', f))
    assert 'process 0 goes through a batch (epoch 1, batch 2, 5 rows); process 1 ends the training (epoch 1, batch 1' in said, said

def error_in_one(folder):
    "It is that process's own, the others say which one left."
    kind = lambda error: error if rank()==1 else DistributedError
    def inf(self):
        if one_only(self): self.learn.xb = self.xb/0
    said = fails(kind(NonFiniteError), On('before_batch', inf))
    assert 'batch 1: the loss is' in said if rank()==1 else 'process 1 leaves a batch early (epoch 1, batch 1' in said, said
    def late(self, p):
        if one_only(self) and p.shape==(5,): raise GradError('in the middle')
    said = fails(kind(GradError), On('grad_ready', late))
    assert said=='in the middle' if rank()==1 else 'process 1 leaves a batch early' in said, said

def different_weights(folder):
    def skip(self):
        if one_only(self): raise cb.CancelStepException
    assert 'epoch 1: the processes have different weights' in fails(DistributedError, On('before_step', skip))

def different_data_and_models(folder):
    assert 'batch 2, 5 rows' in fails(DistributedError, dls=data(21-rank(), 8))
    said = fails(DistributedError, make=lambda: Model([Lin(4, 3+rank(), dtype=torch.float64)], CrossEntropy()))
    assert 'process 1 has layers.0.w (4, 4) torch.float64, that of process 0 layers.0.w (4, 3)' in said, said

class Count:
    "A metric that keeps its own count; of its own rows only, unless its `sync` says otherwise."
    def reset(self): self.n = 0
    def update(self, pred, targ): self.n += len(targ)
    def compute(self): return self.n
class Synced(Count):
    def sync(self): pass
    def compute(self):
        total = torch.tensor(self.n)
        dist.all_reduce(total)
        return total

def metrics_with_a_state(folder):
    assert "the metric Count counts this process's rows alone" in fails(DistributedError, metrics=(Count(),))
    assert [r['Synced'] for r in learner(Distributed(), metrics=(Synced(),)).fit(2).history]==[9.,9.]

def weight_in_the_batch_is_kept(folder):
    def scale(self): self.loss.g = torch.full_like(self.loss, 2.)
    assert 'multiply' in fails(DistributedError, On('before_backward', scale))
    def unfreeze(self): self.model.unfreeze()
    frozen = lambda: On('before_fit', lambda self: self.model.layers[2].freeze())
    assert 'unfreeze it earlier' in fails(DistributedError, On('before_batch', unfreeze), frozen())
    assert_as_one(lambda: On('after_pred', unfreeze), frozen) # from the next batch on
    assert_as_one(lambda: On('before_epoch', lambda self: self.model.layers[2].freeze(self.epoch==1)))

def sent_while_walking(folder):
    "When the last layer's gradient is on its way, the first layer has none yet."
    seen,together = [],Distributed(bucket=1)
    def look(self, p): seen.append((len(together.works), self.model.layers[0].w.g is None))
    learner(together, On('grad_ready', look)).fit(1)
    assert len(seen)==3*6 and seen[:2]==[(0,True),(2,True)] and [w for w,_ in seen[:6]]==sorted(w for w,_ in seen[:6]), seen
    assert [none for _,none in seen[:6]]==[True]*4+[False]*2

def only_the_first_writes(folder):
    "Its table, its files; all go on from them. What dropout drops is another part in each process, and the same after going on."
    make = lambda: Model([Lin(4, 16, dtype=torch.float64), Dropout(.5), Lin(16, 3, dtype=torch.float64)], CrossEntropy())
    masks,wrote = [],[]
    class Written(Checkpoint):
        def save(self):
            wrote.append(rank())
            super().save()
    def note(self):
        if self.training: masks.append(self.model.layers[1].out.ne(0).clone())
    def stop(self):
        if self.epoch==2: raise KeyboardInterrupt
    whole = learner(Distributed(), Written(folder/'whole'), On('after_pred', note), make=make).fit(4)
    assert wrote==[0]*4 if rank()==0 else not wrote
    half = learner(Distributed(), Written(folder/'half'), On('before_epoch', stop, -30), make=make).fit(4)
    assert half.interrupted and len(half.history)==2
    dist.barrier()
    rest = learner(Distributed(), Written(folder/'half', resume=True), make=make, seed=5).fit(4)
    assert_same(rest, whole, 0)
    everyone = [None]*dist.get_world_size()
    dist.all_gather_object(everyone, masks[0])
    assert not torch.equal(everyone[0], everyone[1])

def errors_name_the_process(folder):
    sys.argv = [script,'--device','abacus']
    with contextlib.redirect_stderr(io.StringIO()) as err, pytest.raises(SystemExit): runpy.run_path(script, run_name='__main__')
    assert err.getvalue().startswith(f"fnnlite_train (process {rank()}): device is 'abacus'") and len(err.getvalue().splitlines())==1


# torch's own ways

x,y = torch.randn(12, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64),torch.arange(12)%3
opts = dict(torch=partial(torch.optim.AdamW, lr=.02), AdamW=partial(AdamW, lr=.02), momentum=sgd)

def sharded(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh('cpu', (dist.get_world_size(),))
    for l in model.layers:
        if list(l.parameters()): fully_shard(l, mesh=mesh)
    return fully_shard(model.as_nodes(), mesh=mesh) # whose hooks are autograd's, between the layers

def steps(model, opt, n):
    "Losses of `n` steps on this process's share of the twelve rows"
    many,res = dist.is_initialized(),[]
    mine = slice(*share(12, rank(), dist.get_world_size())) if many else slice(12)
    for _ in range(n):
        opt.zero_grad()
        loss = model(x[mine], y[mine])
        loss.backward()
        opt.step()
        loss = loss.detach().clone()
        if many: dist.all_reduce(loss, dist.ReduceOp.AVG if dist.get_backend()=='nccl' else dist.ReduceOp.SUM)
        res.append(loss.item()/(dist.get_world_size() if many else 1))
    return res

def alone(opt, n):
    "Losses and weights of a run in one process that walks its records"
    torch.manual_seed(1)
    model,res = net(),[]
    opt = opt(model.parameters())
    for _ in range(n):
        opt.zero_grad()
        res.append(model(x, y).item())
        model.backward()
        opt.step()
    return res,list(model.parameters())

def torchs_wrappers(folder):
    "DistributedDataParallel around a model as it is, fully_shard around one whose layers are nodes."
    for wrap in torch.nn.parallel.DistributedDataParallel,sharded:
        for opt in opts.values():
            torch.manual_seed(1)
            model = net()
            wrapped = wrap(model)
            got,(want,weights) = steps(wrapped, opt(model.parameters()), 3),alone(opt, 3)
            assert got==pytest.approx(want, rel=1e-10)
            for p,q in zip(model.parameters(), weights): close(p.full_tensor() if hasattr(p, 'full_tensor') else p, q)

def torchs_checkpoint(folder, save=False, wrap=lambda m: m):
    "Saved by two processes after three steps; the next three are the same on one, two and four."
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    for name,make in opts.items():
        torch.manual_seed(1 if save else 2)
        model = wrap(net())
        opt = make(model.parameters())
        if save: steps(model, opt, 3)
        weights,memory = get_state_dict(model, opt)
        state,path = dict(model=weights, opt=memory),str(folder/name)
        if save: dcp.save(state, checkpoint_id=path)
        else:
            dcp.load(state, checkpoint_id=path)
            set_state_dict(model, opt, model_state_dict=state['model'], optim_state_dict=state['opt'])
        assert steps(model, opt, 3)==pytest.approx(alone(make, 6)[0][3:], rel=1e-10)

def save(folder): torchs_checkpoint(folder, save=True, wrap=sharded)
def load(folder): torchs_checkpoint(folder, wrap=sharded)


def check(folder, *names):
    "Run the checks; each process has a file for what came of them, by name."
    folder,said = Path(folder),{}
    with processes(own_device('cpu'), timeout=20):
        for name in names:
            try: globals()[name](folder)
            except BaseException: said[name] = traceback.format_exc() # noqa: BLE001 the test will say
            else: said[name] = 'passed'
            (folder/f'{dist.get_world_size()}_{rank()}.json').write_text(json.dumps(said))
            if said[name]!='passed': return # the processes may not be in step any more

def command(*args):
    "fnnlite_train, in whose third epoch the process with the number $KILL is killed; or, with $TERM, each gets SIGTERM, one batch later than the one before"
    before_batch = OneCycle.before_batch
    def kill(self):
        before_batch(self)
        if (os.environ['RANK'],self.epoch,self.iter,self.training)==(os.environ.get('KILL'),2,1,True): os.kill(os.getpid(), signal.SIGKILL)
        if 'TERM' in os.environ and (self.epoch,self.iter,self.training)==(2,1+int(os.environ['RANK']),True): signal.raise_signal(signal.SIGTERM)
    OneCycle.before_batch = kill
    sys.argv = [script,*args]
    runpy.run_path(script, run_name='__main__')

if __name__=='__main__': globals()[sys.argv[1]](*sys.argv[2:])
