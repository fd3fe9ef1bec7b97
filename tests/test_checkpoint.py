"What is on disk is whole, is the run's whole state, and can be trusted or is refused by name."
import json, multiprocessing, os, pickle, resource, signal, stat, time, traceback
from functools import partial
from pathlib import Path
from types import SimpleNamespace
import pytest, torch
from torch import nn
from safetensors.torch import load_file, save_file
from fnnlite import load_weights, save_weights, DataLoaders, Dropout, Lin, Relu, Learner
from fnnlite import accuracy, CrossEntropy, Model, Sequential, SGD, AdamW, RMSprop
from fnnlite.train.callbacks import Callback, Checkpoint, NonFiniteError, OneCycle
from fnnlite.train.checkpoints import CheckpointError, load_tensors, put_state, save_tensors

opts = dict(adamw=partial(AdamW, lr=.01), momentum=partial(SGD, lr=.05, momentum=.9), rmsprop=partial(RMSprop, lr=.01, momentum=.5))
N,batches = 4,5 # epochs, and batches in each

class On(Callback):
    "Calls `f(callback)` at `event`."
    def __init__(self, event, f, order=0):
        self.order = order
        self.__class__ = type('On', (On,), {event: lambda self: f(self)})

def learner(*cbs, opt='adamw', seed=0, ni=8):
    "Dropout, a state in the optimizer, a schedule, shuffled batches: all that a run has to remember."
    torch.manual_seed(seed)
    x,y = torch.randn(73, ni),torch.randint(3, (73,))
    dls = DataLoaders.from_arrays(x, y, x[:20], y[:20], bs=16, seed=seed)
    model = Model([Lin(ni, 16), Dropout(.3), Relu(), Lin(16, 3)], CrossEntropy())
    return Learner(model, dls, opts[opt] if isinstance(opt, str) else opt, [accuracy], [OneCycle(.02), *cbs])

def state(folder):
    "All that is in a checkpoint but the clock's part of it."
    tensors,about = load_tensors(folder/'checkpoint.safetensors')
    about['history'] = [{k:v for k,v in r.items() if k!='time'} for r in about['history']]
    return tensors,about

def assert_same(a, b):
    (ta,aa),(tb,ab) = state(a),state(b)
    assert aa==ab and sorted(ta)==sorted(tb) and aa['epochs']==N
    for k,t in ta.items(): assert t.dtype==tb[k].dtype and torch.equal(t, tb[k]), k

def unkilled(folder, opt='adamw'):
    learner(Checkpoint(folder), opt=opt).fit(N)
    return folder

@pytest.fixture(scope='module')
def reference(tmp_path_factory): return {o: unkilled(tmp_path_factory.mktemp(o), o) for o in opts}


# The file

def test_file_round_trip(tmp_path):
    tensors = dict(a=torch.randn(3, 4), b=torch.arange(5), c=torch.tensor(2.5, dtype=torch.float64), d=torch.randn(4, 3).t(), e=torch.empty(0, 2),
                   f=torch.tensor([True,False]), g=torch.randn(3).bfloat16(), h=nn.Parameter(torch.randn(2)))
    tensors['tied'] = tensors['a']
    save_tensors(tmp_path/'new'/'f.safetensors', tensors, name='å', rows=[{'x':1.5, 'y':None}])
    got,about = load_tensors(tmp_path/'new'/'f.safetensors')
    assert about==dict(name='å', rows=[{'x':1.5, 'y':None}]) and set(got)==set(tensors)
    for k,t in tensors.items(): assert got[k].dtype==t.dtype and torch.equal(got[k], t), k
    assert [p.name for p in (tmp_path/'new').iterdir()]==['f.safetensors']

def test_file_is_safetensors_and_json(tmp_path):
    "Anyone can read it, with nothing of ours and nothing that runs code."
    unkilled(tmp_path)
    raw = (tmp_path/'checkpoint.safetensors').read_bytes()
    header = json.loads(raw[8:8+int.from_bytes(raw[:8], 'little')])
    assert isinstance(json.loads(header['__metadata__']['fnnlite']), dict) and header['model.layers.0.w']['shape']==[8,16]
    with pytest.raises(pickle.UnpicklingError): pickle.loads(raw)
    assert b'torch' not in raw[:8+len(json.dumps(header))]

def test_file_mode_is_that_of_any_file(tmp_path):
    "Weights that only their maker may read are no use in a shared folder."
    save_tensors(tmp_path/'f.safetensors', dict(a=torch.ones(2)))
    (tmp_path/'plain').write_text('')
    assert stat.S_IMODE((tmp_path/'f.safetensors').stat().st_mode)==stat.S_IMODE((tmp_path/'plain').stat().st_mode)

def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path/'f.safetensors'
    save_tensors(path, dict(a=torch.ones(2)), n=1)
    before = path.read_bytes()
    with pytest.raises(TypeError): save_tensors(path, dict(a=torch.zeros(2)), n=object())
    for name in 'fsync','replace':
        with monkeypatch.context() as m:
            def full(*args): raise OSError(28, 'No space left on device')
            m.setattr(os, name, full)
            with pytest.raises(OSError, match='No space left'): save_tensors(path, dict(a=torch.zeros(2)), n=2)
    assert path.read_bytes()==before and [p.name for p in tmp_path.iterdir()]==['f.safetensors']

def test_truncated_anywhere(tmp_path):
    path = tmp_path/'f.safetensors'
    save_tensors(path, dict(a=torch.randn(3), b=torch.randn(2)), n=1)
    raw = path.read_bytes()
    for n in range(len(raw)):
        path.write_bytes(raw[:n])
        with pytest.raises(CheckpointError, match='f.safetensors: .*; expected a file saved by fnnlite'): load_tensors(path)
    path.write_bytes(raw+b'\0')
    with pytest.raises(CheckpointError): load_tensors(path)

class Bomb:
    def __reduce__(self): return os.mkdir,(Bomb.target,)

def foreign(kind, path):
    if kind=='safetensors without our metadata': save_file(dict(a=torch.ones(2)), path)
    elif kind=='safetensors with other metadata': save_file(dict(a=torch.ones(2)), path, {'format':'pt'})
    elif kind=='metadata not JSON': save_file(dict(a=torch.ones(2)), path, {'fnnlite':'{'})
    elif kind=='folder': path.mkdir()
    elif kind=='random': path.write_bytes(torch.randint(256, (400,), dtype=torch.uint8).numpy().tobytes())
    elif kind=='pickle': path.write_bytes(pickle.dumps(Bomb()))
    elif kind=='torch.save': torch.save({'a':Bomb()}, path)
    elif kind=='text': path.write_text('hello, this is no checkpoint at all')
    elif kind=='great header': path.write_bytes((2**60).to_bytes(8, 'little')+b'{}')

@pytest.mark.parametrize('kind', ['none','safetensors without our metadata','safetensors with other metadata','metadata not JSON','folder','random','pickle',
    'torch.save','text','great header'])
def test_foreign_file(kind, tmp_path):
    "Refused by name, and nothing in it is run."
    path = tmp_path/'f.safetensors'
    Bomb.target = str(tmp_path/'bomb')
    foreign(kind, path)
    with pytest.raises(CheckpointError, match='f.safetensors'): load_tensors(path)
    if kind!='none':
        (tmp_path/'checkpoint.safetensors').symlink_to(path)
        learn = learner(Checkpoint(tmp_path, resume=True))
        before = [p.clone() for p in learn.model.parameters()]
        with pytest.raises(CheckpointError, match='checkpoint.safetensors'): learn.fit(1)
        assert all(map(torch.equal, before, learn.model.parameters()))
    assert not (tmp_path/'bomb').exists()

@pytest.mark.parametrize('about', [[], 'x', 3, None, {}, dict(epochs=1),
    dict(epochs='1', dl_epoch=1, lrs=[.1], history=[], settings={}), dict(epochs=1, dl_epoch=1, lrs=3, history=[], settings={})], ids=str)
def test_other_json_is_refused(about, tmp_path):
    "Ours by its name only: one error that names the file, and the model as it was."
    learner(Checkpoint(tmp_path)).fit(1)
    tensors,_ = load_tensors(tmp_path/'checkpoint.safetensors')
    save_file({k:t.clone() for k,t in tensors.items()}, tmp_path/'checkpoint.safetensors', {'fnnlite':json.dumps(about)})
    learn = learner(Checkpoint(tmp_path, resume=True), seed=1)
    before = [p.clone() for p in learn.model.parameters()]
    with pytest.raises(CheckpointError, match='checkpoint.safetensors'): learn.fit(2)
    assert all(map(torch.equal, before, learn.model.parameters()))

def nets():
    torch.manual_seed(1)
    return Sequential(Lin(3, 4), Relu(), Lin(4, 2))

@pytest.mark.parametrize('change,msg', [(lambda d: d.pop('2.b'), "has no tensor '2.b'"), (lambda d: d.update(extra=torch.ones(1)), "has a tensor 'extra'"),
    (lambda d: d.update({'2.w':torch.ones(4, 3)}), r"tensor '2.w' has shape \(4, 3\), expected \(4, 2\)"),
    (lambda d: d.update({'2.b':torch.ones(1)}), r"tensor '2.b' has shape \(1,\), expected \(2,\)"),
    (lambda d: d.update({'2.b':torch.ones(2, dtype=torch.float64)}), "tensor '2.b' .*float64.*float32")],
    ids=['missing','extra','shape','would broadcast','dtype'])
def test_put_state(change, msg):
    "What doesn't fit is named, with the file, and nothing is changed; what fits is put."
    m = nets()
    tensors = {k:torch.randn_like(t) for k,t in m.state_dict().items()}
    before = {k:t.clone() for k,t in m.state_dict().items()}
    bad = dict(tensors)
    change(bad)
    with pytest.raises(CheckpointError, match='some/file: .*'+msg): put_state(m, bad, 'some/file')
    assert all(torch.equal(t, before[k]) for k,t in m.state_dict().items())
    put_state(m, tensors, 'some/file')
    assert all(torch.equal(t, tensors[k]) for k,t in m.state_dict().items())


# Going on

@pytest.mark.parametrize('opt', opts)
@pytest.mark.parametrize('at', range(1, N+1))
def test_resumed_is_the_same_run(opt, at, reference, tmp_path):
    "In other objects, whose own seeds were others; resumed at the end there is nothing left to do."
    def stop(self):
        if self.epoch+1==at: raise KeyboardInterrupt
    learner(Checkpoint(tmp_path), On('after_epoch', stop, order=20), opt=opt).fit(N)
    assert state(tmp_path)[1]['epochs']==at
    learn = learner(Checkpoint(tmp_path, resume=True), opt=opt)
    for p in learn.model.parameters(): p.data.add_(1)
    torch.manual_seed(99) # and other random numbers have been drawn
    steps = []
    learn.cbs.append(On('after_step', lambda self: steps.append(1)))
    learn.fit(N)
    assert_same(tmp_path, reference[opt])
    assert len(steps)==(N-at)*batches and [r['epoch'] for r in learn.history]==[*range(N)]
    whole = learner(opt=opt).fit(N)
    assert all(map(torch.equal, learn.model.parameters(), whole.model.parameters())) # as without checkpoints

def test_resume_where_there_is_nothing(reference, tmp_path):
    learner(Checkpoint(tmp_path/'new', resume=True)).fit(N)
    assert_same(tmp_path/'new', reference['adamw'])

def test_torchs_optimizer_is_refused(tmp_path):
    "Before an epoch is spent: its memory could be saved and not put back."
    learn = learner(Checkpoint(tmp_path), opt=partial(torch.optim.Adam, lr=.01))
    with pytest.raises(TypeError, match='Checkpoint: the optimizer is .*Adam.*expected one of fnnlite.train.optimizers'): learn.fit(N)
    assert not learn.history

def test_batches_from_a_list(tmp_path):
    "Data that have no count of epochs can be saved and resumed too."
    def run(folder, n=None):
        learn = learner(Checkpoint(folder, resume=True))
        learn.dls = SimpleNamespace(train=[*learn.dls.train], valid=None)
        def stop(self):
            if self.epoch==n: raise KeyboardInterrupt
        learn.cbs.append(On('after_epoch', stop, order=20))
        learn.fit(N)
    run(tmp_path/'a')
    run(tmp_path/'b', 1)
    run(tmp_path/'b')
    assert_same(tmp_path/'a', tmp_path/'b')

def test_other_settings_are_refused_by_name(tmp_path):
    settings = dict(lr=.1, layers=(5,3), data=None, name='x')
    learner(Checkpoint(tmp_path, settings=settings)).fit(1)
    raw = (tmp_path/'checkpoint.safetensors').read_bytes()
    for new,msg in ((dict(lr=.2), 'lr 0.1, now 0.2'), (dict(layers=(5,4)), r'layers \[5, 3\], now'), (dict(more=1), 'more None, now 1')):
        learn = learner(Checkpoint(tmp_path, resume=True, settings={**settings, **new}), seed=1)
        before = [p.clone() for p in learn.model.parameters()]
        with pytest.raises(CheckpointError, match='checkpoint.safetensors.*other settings: '+msg): learn.fit(2)
        assert all(map(torch.equal, before, learn.model.parameters())) and (tmp_path/'checkpoint.safetensors').read_bytes()==raw
    assert len(learner(Checkpoint(tmp_path, resume=True, settings=settings)).fit(2).history)==2 # a tuple is a list to JSON

@pytest.mark.parametrize('kw,msg', [(dict(opt='momentum'), 'optimizer'), (dict(ni=9), r"tensor 'layers.0.w' has shape \(8, 16\), expected \(9, 16\)")],
    ids=['optimizer','net'])
def test_other_run_is_refused(kw, msg, tmp_path):
    learner(Checkpoint(tmp_path)).fit(1)
    learn = learner(Checkpoint(tmp_path, resume=True), **kw)
    before = [p.clone() for p in learn.model.parameters()]
    with pytest.raises(CheckpointError, match='checkpoint.safetensors: .*'+msg): learn.fit(2)
    assert all(map(torch.equal, before, learn.model.parameters()))

def test_weights_are_no_run(tmp_path):
    learn = learner(Checkpoint(tmp_path, resume=True))
    save_tensors(tmp_path/'checkpoint.safetensors', {f'model.{k}':t for k,t in learn.model.state_dict().items()})
    with pytest.raises(CheckpointError, match='no run to go on with'): learn.fit(1)

@pytest.mark.parametrize('event', ['after_step','before_batch'])
@pytest.mark.parametrize('valid', [True,False], ids=['valid','no valid'])
def test_loss_not_finite_leaves_the_last_checkpoint(event, valid, tmp_path):
    "Also if it's the last update of an epoch that spoils the weights: what is on disk can be gone on from."
    def spoil(self):
        if self.training and self.epoch==2 and self.iter==batches-1: self.model.layers[0].w[0] = torch.nan
    learn = learner(Checkpoint(tmp_path), On(event, spoil))
    if not valid: learn.dls.valid = None
    with pytest.raises(NonFiniteError): learn.fit(N)
    tensors,about = load_tensors(tmp_path/'checkpoint.safetensors')
    assert about['epochs']==2 and all(t.isfinite().all() for t in tensors.values())


# kill -9. The processes are forked from one that has imported torch, so that each is quick to start; they are real ones all the same.

ctx = multiprocessing.get_context('forkserver')
ctx.set_forkserver_preload(['fnnlite.train.learners','torch._dynamo','tqdm.auto','pytest']) # making the first optimizer imports torch._dynamo

def die(): os.kill(os.getpid(), signal.SIGKILL)

def kill_at(event, epoch, it=None, order=0):
    "A callback that kills its process there."
    def f(self):
        if self.epoch==epoch and (it is None or self.iter==it): die()
    return On(event, f, order)

def kill_in_write(epoch, n):
    "The system kills the process when it writes past byte `n` of a file: of the checkpoint, in that epoch."
    def f(self):
        if self.epoch!=epoch: return
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (n, n))
    return On('after_epoch', f, 4)

def kill_in_call(epoch, name, after):
    "Kill before or after the function `name` of `os` has done its work."
    def f(self):
        if self.epoch!=epoch: return
        orig = getattr(os, name)
        def g(*args):
            if after: orig(*args)
            die()
        setattr(os, name, g)
    return On('after_epoch', f, 4)

moments = {'before the first epoch':(kill_at,'before_epoch',0), 'first batch':(kill_at,'before_backward',0,0),
    'between backward and step':(kill_at,'after_backward',1,2), 'after a step':(kill_at,'after_step',2,3), 'in validation':(kill_at,'after_validate',1),
    'before a save':(kill_at,'after_epoch',1,None,4), 'after a save':(kill_at,'after_epoch',1,None,6), 'after the last save':(kill_at,'after_fit',N-1),
    'first byte of the first file':(kill_in_write,0,0), 'first byte':(kill_in_write,2,0), 'in the header':(kill_in_write,2,100),
    'in the tensors':(kill_in_write,2,4000), 'near the end':(kill_in_write,1,-1000), 'before fsync':(kill_in_call,1,'fsync',False),
    'before the rename':(kill_in_call,2,'replace',False), 'after the rename':(kill_in_call,2,'replace',True)}

def child(folder, opt, kill, log):
    "A run, in a process of its own, that goes on if there is something to go on with."
    try:
        with open(log, 'a') as f: os.dup2(f.fileno(), 1), os.dup2(f.fileno(), 2)
        torch.set_num_threads(1)
        cbs = [] if kill is None else [kill[0](*kill[1:])]
        learner(Checkpoint(folder, resume=True), *cbs, opt=opt).fit(N)
    except BaseException: traceback.print_exc(); os._exit(1)

def start(folder, opt='adamw', kill=None):
    p = ctx.Process(target=child, args=(folder, opt, kill, folder.parent/'log'))
    p.start()
    return p

def end(p, folder, *codes):
    p.join(120)
    code = p.exitcode
    p.close()
    assert code in codes, (folder.parent/'log').read_text()

@pytest.mark.parametrize('opt,moment', [(list(opts)[i%3], m) for i,m in enumerate(moments)])
def test_killed_and_resumed(opt, moment, reference, tmp_path):
    "Bit for bit the run that nobody killed; and no litter is left of it."
    folder,kill = tmp_path/'run',moments[moment]
    if kill[-1]==-1000: kill = *kill[:-1],(reference[opt]/'checkpoint.safetensors').stat().st_size-1000
    end(start(folder, opt, kill), folder, -signal.SIGKILL, -signal.SIGXFSZ)
    end(start(folder, opt), folder, 0)
    assert_same(folder, reference[opt])
    assert [p.name for p in folder.iterdir()]==['checkpoint.safetensors']

def test_killed_again_and_again(reference, tmp_path):
    "In the middle of writing each epoch's checkpoint in turn, and after it."
    folder = tmp_path/'run'
    for epoch in range(N):
        end(start(folder, kill=(kill_in_write,epoch,3000)), folder, -signal.SIGXFSZ)
        end(start(folder, kill=(kill_at,'after_epoch',epoch,None,6)), folder, -signal.SIGKILL)
    end(start(folder), folder, 0)
    assert_same(folder, reference['adamw'])

@pytest.mark.parametrize('delay', [0,.002,.01,.03])
def test_killed_from_outside(delay, reference, tmp_path):
    "At whatever it is doing then: nothing depends on when that is. The folder is either as it was or has a whole checkpoint."
    folder = tmp_path/'run'
    folder.mkdir()
    p = start(folder)
    until = time.monotonic()+60
    while p.is_alive() and not any(folder.iterdir()) and time.monotonic()<until: time.sleep(.0005)
    time.sleep(delay)
    p.kill()
    end(p, folder, -signal.SIGKILL, 0)
    if (folder/'checkpoint.safetensors').exists(): assert 1<=state(folder)[1]['epochs']<=N
    end(start(folder), folder, 0)
    assert_same(folder, reference['adamw'])


# Weights alone

def net_and_file(path):
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    save_file(net.state_dict(), path)
    return net

def test_weights_both_ways(tmp_path):
    "Of torch's modules and ours, on disk what safetensors' own functions read and write."
    net = net_and_file(tmp_path/'a')
    other = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    load_weights(other, tmp_path/'a')
    save_weights(other, tmp_path/'b')
    for k,t in load_file(tmp_path/'b').items(): assert torch.equal(t, net.state_dict()[k]), k
    model,again = (Model([Lin(4, 3), Relu()], CrossEntropy()) for _ in range(2))
    ws = list(again.parameters())
    save_weights(model, tmp_path/'c')
    load_weights(again, tmp_path/'c')
    assert all(a is b and torch.equal(a, m) for a,b,m in zip(again.parameters(), ws, model.parameters(), strict=True))

def changed(**change):
    tensors = {k:t+1 if t.is_floating_point() else t for k,t in nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).state_dict().items()}
    return {k:t for k,t in {**tensors, **change}.items() if t is not None}

@pytest.mark.parametrize('tensors,match', [(changed(**{'1.bias':torch.ones(4)}), r"'1.bias' has shape \(4,\), expected \(3,\)"),
    (changed(**{'1.bias':None}), "has no tensor '1.bias', which the model needs"), (changed(more=torch.ones(1)), "has a tensor 'more', which the model lacks"),
    (changed(**{'1.bias':torch.ones(3).double()}), "'1.bias' has dtype torch.float64, expected torch.float32")])
def test_weights_that_do_not_fit(tmp_path, tensors, match):
    "The error names the file and the tensor, and nothing has changed."
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    before = [t.clone() for t in net.state_dict().values()]
    save_file(tensors, tmp_path/'some.file')
    with pytest.raises(CheckpointError, match='some.file: .*'+match): load_weights(net, tmp_path/'some.file')
    assert all(torch.equal(a, b) for a,b in zip(before, net.state_dict().values(), strict=True))

def test_tied_weights_once_or_under_each_name(tmp_path):
    from safetensors.torch import save_model
    def tied():
        net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        net[1].weight = net[0].weight
        return net
    for save in (save_weights, lambda net,path: save_model(net, str(path))):
        net,again = tied(),tied()
        save(net, tmp_path/'f')
        load_weights(again, tmp_path/'f')
        assert torch.equal(again[0].weight, net[0].weight) and again[1].weight is again[0].weight

class Evil:
    def __reduce__(self): return exec, ("import builtins; builtins.ran = True",)

def test_pickles_are_refused(tmp_path):
    "And not run."
    import builtins
    torch.save({'weight':Evil()}, tmp_path/'f.pt')
    (tmp_path/'g').write_bytes(pickle.dumps({'weight':Evil()}))
    for name in ('f.pt','g','missing'):
        with pytest.raises(CheckpointError, match=f'{name}: .*expected a safetensors file'): load_weights(nn.Linear(2, 2), tmp_path/name)
    with pytest.raises(pickle.UnpicklingError): torch.load(tmp_path/'f.pt', weights_only=True)
    assert not hasattr(builtins, 'ran')

def test_no_other_way_to_load():
    "All of the package: whoever calls torch.load or pickle says weights_only=True."
    import fnnlite
    for f in Path(fnnlite.__file__).parent.rglob('*.py'):
        for line in f.read_text(encoding='utf-8').splitlines():
            assert 'import pickle' not in line and ('torch.load(' not in line or 'weights_only=True' in line), f"{f.name}: {line}"
