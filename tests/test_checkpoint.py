"What is on disk is whole, is the run's whole state, and can be trusted or is refused by name."
import json, math, multiprocessing, os, pickle, random, resource, signal, stat, threading, time, traceback
from functools import partial
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import pytest, torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, RandomSampler, Sampler, TensorDataset, WeightedRandomSampler
from safetensors.torch import load_file, save_file
from fnnlite import load_weights, save_weights, DataLoaders, Dropout, Lin, Relu, Learner
from fnnlite import accuracy, CrossEntropy, Model, Sequential, SGD, AdamW, RMSprop
from fnnlite.train.callbacks import Callback, NonFiniteError, OneCycle
from fnnlite.train.resuming import Checkpoint, StopOnSignal
from fnnlite.train.checkpoints import CheckpointError, FolderLock, _checksum, load_tensors, put_state, save_tensors, write_file

opts = dict(adamw=partial(AdamW, lr=.01), momentum=partial(SGD, lr=.05, momentum=.9), rmsprop=partial(RMSprop, lr=.01, momentum=.5))
N,batches = 4,5 # epochs, and batches in each

class On(Callback):
    "Calls `f(callback)` at `event`."
    def __init__(self, event, f, order=0):
        self.order = order
        self.__class__ = type('On', (On,), {event: lambda self: f(self)})

def learner(*cbs, opt='adamw', seed=0, ni=8):
    "Dropout, a state in the optimizer, a schedule, shuffled batches: all that a run has to remember."
    for f in torch.manual_seed,random.seed,np.random.seed: f(seed)
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
    checksum,_,text = header['__metadata__']['fnnlite'].partition(' ')
    assert isinstance(json.loads(text), dict) and header['model.layers.0.w']['shape']==[8,16] and checksum.startswith('sha256:')
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

def test_flipped_bits(tmp_path):
    "One in each byte: it's found, or makes no difference. (All of them: scripts/flip_bits.py)"
    path = tmp_path/'f.safetensors'
    tensors = dict(a=torch.randn(3), b=torch.tensor([True,False]), c=torch.randn(3).bfloat16(), d=torch.tensor(2), e=torch.empty(0, 2))
    save_tensors(path, tensors, epochs=1, name='å')
    raw = path.read_bytes()
    for i in range(0, 8*len(raw), 7):
        flipped = bytearray(raw)
        flipped[i//8] ^= 1<<i%8
        path.write_bytes(flipped)
        try: got,about = load_tensors(path)
        except CheckpointError as e: assert len(str(e).splitlines())==1
        else:
            assert i<8*(len(raw)-32) and about==dict(epochs=1, name='å') and got.keys()==tensors.keys(), f'bit {i}'
            for k,t in tensors.items(): assert got[k].dtype==t.dtype and torch.equal(got[k], t), f'bit {i}'

def test_a_flipped_bit_in_weights(tmp_path):
    net = nn.Linear(4, 3)
    before = [p.clone() for p in net.parameters()]
    save_weights(nn.Linear(4, 3), tmp_path/'f')
    raw = bytearray((tmp_path/'f').read_bytes())
    raw[-1] ^= 1
    (tmp_path/'f').write_bytes(raw)
    with pytest.raises(CheckpointError, match='f: its contents .* checksum'): load_weights(net, tmp_path/'f')
    assert all(map(torch.equal, before, net.parameters()))

def test_files_without_a_checksum(tmp_path):
    "From elsewhere, or from before there was one: they load."
    save_file(dict(a=torch.ones(2)), tmp_path/'f', {'fnnlite':'{"n": 1}', 'format':'pt'})
    tensors,about = load_tensors(tmp_path/'f')
    assert about=={'n':1} and torch.equal(tensors['a'], torch.ones(2))

def test_not_a_regular_file(tmp_path):
    "A pipe that nobody writes to isn't waited for."
    os.mkfifo(tmp_path/'f')
    for path in tmp_path/'f','/dev/zero':
        with pytest.raises(CheckpointError, match=f'{path}: no regular file'): load_tensors(path)

@pytest.mark.parametrize('depth', [900,10**5])
def test_deep_json(depth, tmp_path):
    deep = '['*depth+']'*depth
    for text in deep,f'{{"a":{deep}}}',f'{{"epochs":1, "history":[{{"epoch":{deep}}}], "lrs":[1.0], "settings":{{"lr":{deep}}}, "rng":{{}} }}':
        save_file(dict(a=torch.ones(2)), tmp_path/'checkpoint.safetensors', {'fnnlite':text})
        with pytest.raises(CheckpointError): learner(Checkpoint(tmp_path, resume=True, settings=dict(lr=.1))).fit(1)

def test_two_writers_do_not_mix(tmp_path, monkeypatch):
    "Each of them has its own temporary file: one that is overtaken publishes all of its own, and none of the other's."
    replace,path = os.replace,tmp_path/'f'
    def overtaken(*args):
        monkeypatch.setattr(os, 'replace', replace)
        write_file(path, b'second')
        assert path.read_bytes()==b'second'
        replace(*args)
    monkeypatch.setattr(os, 'replace', overtaken)
    write_file(path, b'first, and longer')
    assert path.read_bytes()==b'first, and longer' and [p.name for p in tmp_path.iterdir()]==['f']

def test_the_folder_is_synced(tmp_path, monkeypatch):
    "A rename that only the memory knows of is lost with the power: file, rename, folder, in this order."
    calls,fsync,replace = [],os.fsync,os.replace
    def note(fd):
        calls.append('folder' if stat.S_ISDIR(os.fstat(fd).st_mode) else 'file')
        fsync(fd)
    monkeypatch.setattr(os, 'fsync', note)
    monkeypatch.setattr(os, 'replace', lambda *a: (calls.append('rename'), replace(*a)))
    write_file(tmp_path/'f', b'x')
    assert calls==['file','rename','folder']

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
    text,tensors = json.dumps(about),{k:t.clone() for k,t in tensors.items()}
    for text in text,f'{_checksum(text, tensors)} {text}':
        save_file(tensors, tmp_path/'checkpoint.safetensors', {'fnnlite':text})
        learn = learner(Checkpoint(tmp_path, resume=True), seed=1)
        before = [p.clone() for p in learn.model.parameters()]
        with pytest.raises(CheckpointError, match='checkpoint.safetensors'): learn.fit(2)
        assert all(map(torch.equal, before, learn.model.parameters()))

def row(i, **kw): return dict(epoch=i, train_loss=1., valid_loss=1., accuracy=.5, time=.1, **kw)
python = [3, [*random.Random(0).getstate()[1]], None]
MT = lambda **kw: dict(bit_generator='MT19937', state={**dict(key=[1]*624, pos=3), **kw}, has_gauss=0, gauss=0.)
crafted = dict(
    lrs=[['a'], [], [.1,.1], [math.nan], [math.inf], [True], [None], [[.1]], [10**400], 'x', None],
    history=[[1,2], [row(0)], [row(0),row(1),row(2)], [row(1),row(0)], [row(0),row(0)], [row(0),{}], [row(0),None], [row(0),{**row(1), 'epoch':1.}],
        [row(False),row(True)], [row(0),{**row(1), 'valid_loss':'low'}], [row(0),{**row(1), 'accuracy':[1]}], [row(0),{**row(1), 'more':{}}], {}, None],
    epochs=[10**9, -1, 1, 3, True, 2., '2', None], dl_epoch=[None, -1, 1.5, True, 'x', [2]], settings=[[], None, 'x'],
    rng=[None, [], {}, dict(python=python), dict(python=python, numpy=MT(), more=1), dict(python=None, numpy=MT()), dict(python=[3,[1],None], numpy=MT()),
        dict(python=[3,[*python[1][:-1],625],None], numpy=MT()), dict(python=[3,python[1],'x'], numpy=MT()), dict(python=python, numpy=3),
        dict(python=python, numpy=MT(pos=10**6)), dict(python=python, numpy=MT(pos=-1)), dict(python=python, numpy=MT(key=[1])),
        dict(python=python, numpy={**MT(), 'bit_generator':'Philox'}), dict(cpu=1, python=python, numpy=MT())],
    tensors=[{'rng.cpu':None}, {'rng.cpu':torch.zeros(3, dtype=torch.uint8)}, {'rng.cpu':torch.zeros(5056)},
        {'rng.cpu':torch.zeros(5056, dtype=torch.uint8)},
        {'rng.cpu':torch.full((5056,), 255, dtype=torch.uint8)}, {'rng.more':torch.zeros(3)}, {'model.layers.0.w':None}, {'model.layers.0.w':torch.ones(2)},
        {'model.a\nb':torch.ones(2)}, {'opt.0.step':None}, {'opt.0.more':torch.ones(1)}, {'opt.0.exp_avg':torch.ones(2, 2)},
        {'opt.0.exp_avg':torch.ones(8, 16).double()}, {'opt.0.exp_avg':torch.ones(8, 16, dtype=torch.int32)}])

@pytest.mark.parametrize('key,value', [(k,v) for k,vs in crafted.items() for v in vs], ids=lambda o: str(o)[:50])
def test_crafted(key, value, tmp_path, two_epochs):
    "With a right checksum and a wrong content: one line that names the file, and nothing has changed; not a random number either."
    tensors,about = load_tensors(two_epochs)
    if key=='tensors': tensors = {k:t for k,t in {**tensors, **value}.items() if t is not None}
    else: about = {**about, key:value}
    save_tensors(tmp_path/'checkpoint.safetensors', tensors, **about)
    learn = learner(Checkpoint(tmp_path, resume=True), seed=1)
    def everything():
        return [str([p.tolist() for p in learn.model.parameters()]), str(learn.opt.state_dict()), str(torch.get_rng_state().tolist()), random.getstate(),
            str(np.random.get_state()), learn.dls.train.epoch, learn.epoch, learn.history]
    before = everything()
    with pytest.raises(CheckpointError, match='checkpoint.safetensors: ') as e: learn.fit(N)
    assert everything()==before and len(str(e.value).splitlines())==1 and len(str(e.value))<1500

@pytest.fixture(scope='module')
def two_epochs(tmp_path_factory):
    folder = tmp_path_factory.mktemp('two')
    learner(Checkpoint(folder)).fit(2)
    return folder/'checkpoint.safetensors'

def test_rows_with_more_columns(tmp_path):
    "A callback may write into the rows, now and then: they are saved, resumed and in the CSV."
    def more(self):
        if self.epoch==1: self.history[-1].update(steps=3, note='x')
    learner(Checkpoint(tmp_path), On('after_epoch', more)).fit(2)
    history = learner(Checkpoint(tmp_path, resume=True), On('after_epoch', more)).fit(3).history
    assert [r.get("steps") for r in history]==[None,3,None] and len({l.count(',') for l in history.to_csv().splitlines()})==1

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
        if self.training and self.epoch==2 and self.iter==batches-1: self.model.layers[0].w.data[0] = torch.nan
    learn = learner(Checkpoint(tmp_path), On(event, spoil))
    if not valid: learn.dls.valid = None
    with pytest.raises(NonFiniteError): learn.fit(N)
    tensors,about = load_tensors(tmp_path/'checkpoint.safetensors')
    assert about['epochs']==2 and all(t.isfinite().all() for t in tensors.values())


# What the batches are drawn from

class Drawn(Sampler):
    "The rows in an order drawn from `rng`."
    def __init__(self, n, rng): self.n,self.rng = n,rng
    def __len__(self): return self.n
    def __iter__(self):
        ids = list(range(self.n))
        self.rng.shuffle(ids)
        return iter(ids)

class Noisy(Dataset):
    "Changes its rows by what it draws, from everywhere."
    def __init__(self, x, y): self.x,self.y,self.g = x,y,torch.Generator().manual_seed(8)
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i]+torch.randn((), generator=self.g)+torch.randn(())+random.random()+np.random.rand(),self.y[i]

seeded = lambda n: torch.Generator().manual_seed(n)
loaders = {
    'shuffle':lambda ds,**kw: DataLoader(ds, 16, shuffle=True, **kw),
    'shuffle, generator':lambda ds,**kw: DataLoader(ds, 16, shuffle=True, generator=seeded(1), **kw),
    'RandomSampler':lambda ds,**kw: DataLoader(ds, 16, sampler=RandomSampler(ds, generator=seeded(2)), **kw),
    'WeightedRandomSampler':lambda ds,**kw: DataLoader(ds, 16, sampler=WeightedRandomSampler(torch.arange(73.), 73, generator=seeded(3)), **kw),
    "numpy's":lambda ds,**kw: DataLoader(ds, 16, sampler=Drawn(73, np.random.default_rng(4)), **kw),
    "numpy's old":lambda ds,**kw: DataLoader(ds, 16, sampler=Drawn(73, np.random.RandomState(5)), **kw),
    "Python's":lambda ds,**kw: DataLoader(ds, 16, sampler=Drawn(73, random.Random(6)), **kw),
    'batches drawn':lambda ds,**kw: DataLoader(ds, batch_sampler=torch.utils.data.BatchSampler(RandomSampler(ds, generator=seeded(7)), 16, False), **kw),
    'rows drawn':lambda ds,**kw: DataLoader(ConcatDataset([Noisy(*ds.tensors)]), 16, **kw)}

def with_loader(folder, kind, n=None, **kw):
    "A run up to epoch `n`, or to the end."
    def stop(self):
        if self.epoch==n: raise KeyboardInterrupt
    learn = learner(Checkpoint(folder, resume=True), On('after_epoch', stop, order=20))
    learn.dls = SimpleNamespace(train=loaders[kind](TensorDataset(learn.dls.train.x, learn.dls.train.y), **kw), valid=learn.dls.valid)
    return learn.fit(N)

@pytest.mark.parametrize('kind', loaders)
def test_loaders_are_resumed(kind, tmp_path):
    "The weights are those of the unbroken run, to the last bit."
    with_loader(tmp_path/'a', kind)
    with_loader(tmp_path/'b', kind, 1)
    for f in torch.manual_seed,random.seed,np.random.seed: f(99)
    with_loader(tmp_path/'b', kind)
    assert_same(tmp_path/'a', tmp_path/'b')

@pytest.mark.filterwarnings('ignore:.*use of fork:DeprecationWarning')
def test_loaders_with_workers_are_resumed(tmp_path):
    "They give the rows that the order drawn here asks for."
    with_loader(tmp_path/'a', 'shuffle, generator', num_workers=2)
    with_loader(tmp_path/'b', 'shuffle, generator', 1, num_workers=2)
    with_loader(tmp_path/'b', 'shuffle, generator', num_workers=2)
    assert_same(tmp_path/'a', tmp_path/'b')

def test_a_shared_generator_counts_once(tmp_path):
    def run(folder, n=None):
        learn,g = learner(Checkpoint(folder, resume=True)),seeded(1)
        ds = TensorDataset(learn.dls.train.x, learn.dls.train.y)
        learn.dls = SimpleNamespace(train=DataLoader(ds, 16, shuffle=True, generator=g), valid=DataLoader(ds, 16, shuffle=True, generator=g))
        learn.cbs.append(On('after_epoch', lambda self: n is not None and self.epoch==n and signal.raise_signal(signal.SIGINT), order=20))
        learn.fit(N)
    run(tmp_path/'a')
    run(tmp_path/'b', 1)
    run(tmp_path/'b')
    assert_same(tmp_path/'a', tmp_path/'b')
    assert [k for k in load_tensors(tmp_path/'a'/'checkpoint.safetensors')[0] if 'rng' in k]==['rng.cpu','rng.train.generator']

def test_other_generators_are_refused(tmp_path):
    with_loader(tmp_path, 'shuffle, generator', 1)
    with pytest.raises(CheckpointError, match=r"has states of the random numbers .*'train.generator'.*, expected \['cpu', 'numpy', 'python'\]"):
        with_loader(tmp_path, 'shuffle')

@pytest.mark.parametrize('rng,said', [(random.SystemRandom(), 'SystemRandom'), (np.random.Generator(np.random.Philox(1)), 'Philox')],
    ids=['system','philox'])
def test_what_cannot_be_kept_is_refused(rng, said, tmp_path):
    "By name, before an epoch is spent, and nothing is written."
    learn = learner(Checkpoint(tmp_path/'new'))
    learn.dls.train = DataLoader(TensorDataset(learn.dls.train.x, learn.dls.train.y), 16, sampler=Drawn(73, rng))
    with pytest.raises(ValueError, match=f"dls.train.sampler.rng is .*{said}.*, whose state can't be kept .*torch.Generator"): learn.fit(1)
    assert not learn.history and not (tmp_path/'new').exists()

def test_persistent_workers_are_refused(tmp_path):
    learn = learner(Checkpoint(tmp_path/'new'))
    learn.dls.valid = DataLoader(TensorDataset(learn.dls.train.x, learn.dls.train.y), 16, num_workers=1, persistent_workers=True)
    with pytest.raises(ValueError, match="dls.valid has persistent_workers=True.* give it persistent_workers=False"): learn.fit(1)
    assert not learn.history and not (tmp_path/'new').exists()


# One writer at a time

def test_a_second_run_is_refused(tmp_path):
    "While the first one runs, and then no longer; however that ended. The first is what it would have been."
    whole = unkilled(tmp_path/'a')
    second = learner(Checkpoint(tmp_path/'b'))
    def refused(self):
        with pytest.raises(CheckpointError, match=f"{tmp_path/'b'}: another run is writing there"): second.fit(1)
    learner(Checkpoint(tmp_path/'b'), On('after_batch', refused)).fit(N)
    assert_same(whole, tmp_path/'b')
    for exc in KeyError,KeyboardInterrupt:
        def fail(self): raise exc
        ended = learner(Checkpoint(tmp_path/'b'), On('after_batch', fail)) # kept: its lock would end with it
        try: ended.fit(N)
        except KeyError: pass
        learner(Checkpoint(tmp_path/'b')).fit(1)

@pytest.mark.slow
def test_another_process_is_refused(tmp_path):
    folder = tmp_path/'run'
    with FolderLock(folder):
        end(start(folder), folder, 1)
        assert 'another run is writing there' in (tmp_path/'log').read_text() and not any(folder.iterdir())
    end(start(folder), folder, 0)

def test_litter_is_removed_and_no_other_file(tmp_path):
    "What a killed writer left is; what one is writing just now isn't, nor what somebody else calls so."
    (tmp_path/'.model.safetensors.0123abcd.fnnlite.tmp').write_text('half')
    others = {'.notes.tmp','fnnlite.tmp','model.safetensors'}
    for name in others: (tmp_path/name).write_text('whole')
    orig = os.replace
    def replace(*args):
        with FolderLock(tmp_path): pass
        orig(*args)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(os, 'replace', replace)
        write_file(tmp_path/'f', b'x')
    assert {p.name for p in tmp_path.iterdir()}==others|{'f'}

@pytest.mark.filterwarnings('ignore:.*use of fork:DeprecationWarning')
def test_a_forked_process_does_not_keep_the_lock(tmp_path):
    "As a loader's workers are, which may live on when their run was killed."
    begun,end = os.pipe(),os.pipe()
    with FolderLock(tmp_path):
        pid = os.fork()
        if not pid:
            os.write(begun[1], b'x')
            os.read(end[0], 1)
            os._exit(0)
    os.read(begun[0], 1)
    try:
        with FolderLock(tmp_path): pass
    finally:
        os.write(end[1], b'x')
        assert os.waitpid(pid, 0)[1]==0
        for fd in begun+end: os.close(fd)

def test_without_locks(tmp_path, monkeypatch):
    "A file system that has none: the run goes on."
    def none(*args): raise OSError(95, 'Operation not supported')
    monkeypatch.setattr('fcntl.flock', none)
    learner(Checkpoint(tmp_path)).fit(1)
    assert [p.name for p in tmp_path.iterdir()]==['checkpoint.safetensors']


# Signals

@pytest.mark.parametrize('number', [signal.SIGINT,signal.SIGTERM,signal.SIGHUP])
@pytest.mark.parametrize('event', ['after_step','after_epoch'])
def test_signal_ends_the_fit_after_the_batch(number, event, reference, tmp_path):
    "All of the batch is done, then nothing; whole epochs are saved, handlers are as before, and it can be gone on from."
    def f(self):
        if self.epoch==1 and (event=='after_epoch' or self.iter==2): signal.raise_signal(number)
    done,handlers,stop = [],[signal.getsignal(o) for o in (signal.SIGINT,signal.SIGTERM,signal.SIGHUP)],StopOnSignal()
    learn = learner(Checkpoint(tmp_path), stop, On(event, f), On('after_batch', lambda self: done.append(self.training), order=10)).fit(N)
    assert learn.interrupted and stop.signal==number and sum(done)==(2*batches if event=='after_epoch' else batches+3)
    assert [signal.getsignal(o) for o in (signal.SIGINT,signal.SIGTERM,signal.SIGHUP)]==handlers
    assert state(tmp_path)[1]['epochs']==len(learn.history)==(2 if event=='after_epoch' else 1)
    learner(Checkpoint(tmp_path, resume=True)).fit(N)
    assert_same(tmp_path, reference['adamw'])

def twice(folder, first, second):
    def f(self):
        if folder.name=='together': signal.pthread_sigmask(signal.SIG_BLOCK, [first,second])
        for o in first,second: signal.raise_signal(o) # to this thread
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [first,second])
        os._exit(0) # not come to
    learner(Checkpoint(folder), StopOnSignal(), On('after_step', f)).fit(1)

@pytest.mark.parametrize('first,second,how', [(signal.SIGINT,signal.SIGTERM,''), (signal.SIGTERM,signal.SIGTERM,''), (signal.SIGHUP,signal.SIGINT,''),
    (signal.SIGINT,signal.SIGTERM,'together')])
def test_second_signal_ends_the_process_at_once(first, second, how, tmp_path):
    p = ctx.Process(target=twice, args=(tmp_path/how, first, second))
    p.start()
    p.join(120)
    assert p.exitcode==-second

def test_ignored_signals_stay_ignored(monkeypatch):
    "As nohup wants it."
    was = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try: learn = learner(StopOnSignal(), On('after_step', lambda self: signal.raise_signal(signal.SIGHUP))).fit(1)
    finally: signal.signal(signal.SIGHUP, was)
    assert not learn.interrupted

def test_signals_in_another_thread():
    "There Python has no signals, and a fit is a fit."
    done = []
    t = threading.Thread(target=lambda: done.append(learner(StopOnSignal()).fit(1)))
    t.start()
    t.join()
    assert len(done[0].history)==1


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
