"The training loop: torch's numbers, fastai's events and cancels, and what a user meets when something goes wrong."
import csv, io, re, subprocess, sys
from collections import Counter
from copy import deepcopy
from functools import partial, partialmethod
from types import SimpleNamespace
import pytest, torch
import torch.nn.functional as TF
from fnnlite import DataLoaders, Dropout, Lin, Relu, Tanh, Learner, accuracy, CrossEntropy, Mse, Model, Sequential, SGD, Adam, AdamW
from fnnlite.train import callbacks as cb
from fnnlite.train.callbacks import Callback, NonFiniteError, OneCycle, events

torch.manual_seed(0)
x,y = torch.randn(21, 4, dtype=torch.float64),torch.randint(3, (21,))

@pytest.fixture(autouse=True)
def close_figures():
    yield
    if 'matplotlib.pyplot' in sys.modules: sys.modules['matplotlib.pyplot'].close('all')

@pytest.fixture(autouse=True)
def agg(monkeypatch): monkeypatch.setenv('MPLBACKEND', 'agg')

def data(bs=8, **kw): return DataLoaders.from_arrays(x, y, x[:7], y[:7], **{'bs':bs, 'valid_bs':4, **kw})
def net(): return Model([Lin(4, 6, dtype=torch.float64), Tanh(), Lin(6, 3, dtype=torch.float64)], CrossEntropy())
def learner(*cbs, model=None, dls=None, opt=partial(SGD, lr=.1), metrics=(accuracy,)):
    return Learner(model or net(), dls or data(), opt, metrics, cbs)

class On(Callback):
    "Calls `f(callback)` at `event`, the first time that it's so inclined."
    def __init__(self, event, f, order=0):
        self.order = order
        self.__class__ = type('On', (On,), {event: lambda self,*args: f(self, *args)})

class Log(Callback):
    "Notes the events, and raises `exc` at the `at`th."
    def __init__(self, at=None, exc=None): self.at,self.exc,self.seen = at,exc,[]
    def note(self, e):
        self.seen.append(e)
        if len(self.seen)-1==self.at: raise self.exc
for e in events: setattr(Log, e, partialmethod(Log.note, e))


# The numbers

def torch_net(model):
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)).double()
    with torch.no_grad():
        for i in (0,2): net[i].weight.copy_(model.layers[i].w.t()), net[i].bias.copy_(model.layers[i].b)
    return net

@pytest.mark.parametrize('opt,ref', [(partial(SGD, lr=.2), partial(torch.optim.SGD, lr=.2)),
    (partial(SGD, lr=.1, momentum=.9), partial(torch.optim.SGD, lr=.1, momentum=.9)), (partial(Adam, lr=.03), partial(torch.optim.Adam, lr=.03)),
    (partial(AdamW, lr=.03, weight_decay=.1), partial(torch.optim.AdamW, lr=.03, weight_decay=.1))], ids=['sgd','momentum','adam','adamw'])
def test_training_is_torch_training(opt, ref):
    "Losses, metrics and final weights of a plain autograd loop over the same batches, the last of them short."
    learn,dls = learner(opt=opt),data()
    model = torch_net(learn.model)
    opt = ref(model.parameters())
    learn.fit(4)
    for row in learn.history:
        total = 0
        for xb,yb in dls.train:
            loss = TF.cross_entropy(model(xb), yb)
            opt.zero_grad()
            loss.backward()
            opt.step()
            total += loss.item()*len(xb)
        with torch.no_grad(): pred = model(x[:7])
        want = dict(train_loss=total/21, valid_loss=TF.cross_entropy(pred, y[:7]).item(), accuracy=(pred.argmax(1)==y[:7]).double().mean().item())
        for k,v in want.items(): assert row[k]==pytest.approx(v, rel=1e-10), k
    for i in (0,2):
        torch.testing.assert_close(learn.model.layers[i].w.detach(), model[i].weight.detach().t(), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(learn.model.layers[i].b.detach(), model[i].bias.detach(), rtol=1e-10, atol=1e-12)

def test_averages_count_rows():
    "With a standing net each average is that over all rows at once; the mean of the batches' means is another number."
    learn = learner(opt=partial(SGD, lr=0.))
    learn.fit(1)
    row,pred = learn.history[0],learn.predict(x)
    assert row['train_loss']==pytest.approx(TF.cross_entropy(pred, y).item(), rel=1e-12)
    assert row['valid_loss']==pytest.approx(TF.cross_entropy(pred[:7], y[:7]).item(), rel=1e-12)
    assert row['accuracy']==pytest.approx((pred[:7].argmax(1)==y[:7]).double().mean().item(), rel=1e-12)
    assert row['train_loss']!=pytest.approx(sum(TF.cross_entropy(*b).item() for b in zip(pred.split(8), y.split(8)))/3, rel=1e-6)

def test_a_sum_is_shown_as_the_mean_over_rows():
    "So that training and validation, of other sizes, can be compared; with a standing net it is the mean's own number."
    by = {}
    for how in 'mean','sum':
        torch.manual_seed(1)
        learn = learner(model=Model([Lin(4, 3, dtype=torch.float64)], CrossEntropy(reduction=how)), opt=partial(SGD, lr=0.)).fit(1)
        by[how] = [learn.history[0][k] for k in ('train_loss','valid_loss')]+[learn.validate()['valid_loss']]
    assert by['sum']==pytest.approx(by['mean'], rel=1e-12)

@pytest.mark.parametrize('pred,targ', [((8,1),(8,)), ((8,),(8,)), ((8,8),(8,8)), ((8,8),(8,1)), ((8,3),(1,)), ((8,3),(7,)), ((2,8,3),(2,8)), ((8,3),())])
def test_accuracy_refuses_other_shapes(pred, targ):
    "One logit a row has no largest element; a target that broadcasts isn't the rows' own."
    with pytest.raises(ValueError, match=re.escape(f'accuracy: pred has shape {pred} and targ {targ}, expected (n,C)')):
        accuracy(torch.randn(pred), torch.zeros(targ, dtype=torch.int64))

class F1:
    "Of class 1, in the manner of torchmetrics: an F1 of all rows isn't the mean of the batches' F1s."
    def __init__(self): self.reset()
    def reset(self): self.hits = self.found = self.there = 0
    def update(self, pred, targ):
        found,there = pred.argmax(1)==1,targ==1
        self.hits,self.found,self.there = self.hits+(found&there).sum(),self.found+found.sum(),self.there+there.sum()
    def compute(self): return 2*self.hits/(self.found+self.there)

def test_metric_with_a_state():
    "It is computed once, over all rows; each validation begins anew; a metric that is a function stands beside it."
    learn = learner(metrics=(F1(),accuracy)).fit(3)
    found,there = learn.predict(x[:7]).argmax(1)==1,y[:7]==1
    want = {'F1':2*(found&there).sum()/(found.sum()+there.sum()), 'accuracy':accuracy(learn.predict(x[:7]), y[:7])}
    for got in learn.history[-1],learn.validate():
        for k,v in want.items(): assert got[k]==pytest.approx(v.item())
    assert list(learn.history[0])==['epoch','train_loss','valid_loss','F1','accuracy','time'] and isinstance(learn.history[0]['F1'], float)

def test_validate_and_predict_change_nothing():
    learn = learner(model=Model([Lin(4, 6, dtype=torch.float64), Dropout(.5), Relu(), Lin(6, 3, dtype=torch.float64)], CrossEntropy()))
    learn.fit(2)
    weights,history,rng = deepcopy(learn.model.state_dict()),[*learn.history],torch.get_rng_state()
    got = learn.validate()
    assert set(got)=={'valid_loss','accuracy'} and all(isinstance(v, float) for v in got.values())
    assert got['valid_loss']==pytest.approx(history[-1]['valid_loss'], rel=1e-12) and got['accuracy']==history[-1]['accuracy']
    learn.model.train() # dropout must not show
    pred = learn.predict(x)
    assert torch.equal(pred, learn.predict(x, bs=2)) or (pred-learn.predict(x, bs=2)).abs().max()<1e-14
    assert learn.model.training and not pred.requires_grad and learn.history==history
    assert all(torch.equal(v, weights[k]) for k,v in learn.model.state_dict().items()) and torch.equal(rng, torch.get_rng_state())

def test_validate_without_validation_data():
    dls = data()
    dls.valid = None
    with pytest.raises(ValueError, match='valid'): learner(dls=dls).validate()

def test_modes_and_gradients():
    "Dropout drops in training only; validation records nothing; gradients are gone when the fit is done."
    modes,learn = set(),None
    def look(self): modes.add((self.training, self.model.training, torch.is_grad_enabled(), self.model.layers.out is None and not self.training))
    def before(self): self.model.free()
    learn = learner(On('before_validate', before), On('after_loss', look))
    learn.fit(2)
    assert modes=={(True,True,True,False),(False,False,False,True)}
    assert all(p.grad is None and p.g is None for p in learn.model.parameters()) and torch.is_grad_enabled()

def test_inputs_gradient_is_not_computed():
    seen = []
    learner(On('after_backward', lambda self: seen.append((self.xb.g, self.model.layers[0].w.g is None)))).fit(1)
    assert seen==[(None,False)]*3

def test_fit_again_goes_on_from_the_weights():
    a,b = learner(),learner()
    b.model.load_state_dict(a.model.state_dict())
    a.fit(2)
    first = [*a.history]
    a.fit(3)
    b.fit(5)
    assert [r['epoch'] for r in a.history]==[0,1,2] and len(first)==2
    assert [r['train_loss'] for r in first+a.history]==[r['train_loss'] for r in b.history]
    assert all(torch.equal(p, q) for p,q in zip(a.model.parameters(), b.model.parameters()))

def test_optimizer_given_or_made():
    model = net()
    opt = torch.optim.SGD(model.parameters(), lr=.1) # torch's own will do
    twin = learner(model=deepcopy(model))
    learn = learner(model=model, opt=opt)
    assert learn.opt is opt
    for p,q in zip(learn.fit(2).model.parameters(), twin.fit(2).model.parameters()): torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)

def test_one_cycle():
    lrs,learn = [],None
    learn = learner(OneCycle(.5, pct=.25, div=10, div_final=100), On('before_step', lambda self: lrs.append(self.opt.lr), order=1))
    learn.fit(4)
    assert len(lrs)==12 and lrs[0]==pytest.approx(.05) and max(lrs)==lrs[3]==pytest.approx(.5) and lrs==sorted(lrs[:4])+sorted(lrs[4:], reverse=True)
    assert OneCycle(.5, div_final=100).at(1.)==pytest.approx(.005)


# Events

def fastai(n_epoch, n_train, n_valid, at=None, exc=None):
    "The events of fastai's loop (its `Learner._with_events`, `_do_fit`, ... without the work), with `exc` raised at the `at`th."
    seen = []
    def ev(name):
        seen.append(name)
        if len(seen)-1==at: raise exc
    def part(name, f):
        try:
            ev(f'before_{name}')
            f()
        except cb.cancels[name]: ev(f'after_cancel_{name}')
        ev(f'after_{name}')
    def batch(training):
        ev('after_pred')
        ev('after_loss')
        if not training: return
        part('backward', lambda: None)
        part('step', lambda: None)
    def batches(n, training):
        for _ in range(n): part('batch', lambda: batch(training))
    def epoch():
        part('train', lambda: batches(n_train, True))
        part('validate', lambda: batches(n_valid, False))
    def epochs():
        for _ in range(n_epoch): part('epoch', epoch)
    try: part('fit', epochs)
    except Exception as e: return seen,e
    return seen,None

def test_events_in_order():
    log = Log()
    learner(log, dls=data(bs=16)).fit(1)
    train = ['before_batch','after_pred','after_loss','before_backward','after_backward','before_step','after_step','after_batch']
    valid = ['before_batch','after_pred','after_loss','after_batch']
    assert log.seen==['before_fit','before_epoch','before_train',*train*2,'after_train','before_validate',*valid*2,'after_validate','after_epoch','after_fit']
    assert set(events)=={*log.seen, *(f'after_cancel_{p}' for p in ('fit','epoch','train','validate','batch','backward','step'))}

@pytest.mark.parametrize('part', ['fit','epoch','train','validate','batch','backward','step'])
def test_cancel_does_what_fastai_does(part):
    "Raised in turn at every event of a run; where no such part is under way, it comes out of `fit`, after the clean-up that is ours."
    exc = cb.cancels[part]
    n = len(fastai(2, 2, 1)[0])
    model,dls,wrong = net(),data(bs=16, valid_bs=8),[]
    for at in range(n):
        log,came = Log(at, exc()),None
        try: learner(log, model=model, dls=dls).fit(2)
        except Exception as e: came = e
        seen,err = fastai(2, 2, 1, at, log.exc)
        if err is not None: seen.append('after_cancel_fit')
        if (log.seen,came)!=(seen,err): wrong.append(f"{at} {fastai(2, 2, 1)[0][at]}: {came!r}, {log.seen[at-1:at+3]}")
    assert not wrong, '\n'.join(wrong)

def test_cancelled_step_and_backward_leave_the_weights():
    for e,exc in ('before_step',cb.CancelStepException),('before_backward',cb.CancelBackwardException),('after_loss',cb.CancelBatchException):
        def cancel(self):
            if self.training: raise exc
        learn = learner(On(e, cancel))
        before = deepcopy(learn.model.state_dict())
        learn.fit(2)
        assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items()) and len(learn.history)==2, e
        assert all(p.grad is None for p in learn.model.parameters()) or e!='before_backward'

def test_a_cancelled_step_accumulates():
    "The gradients of a step that was left out are part of the next one's: torch's loop that steps every third batch."
    def skip(self):
        if self.iter%3!=2: raise cb.CancelStepException
    learn = learner(On('before_step', skip))
    model,dls = torch_net(learn.model),data()
    opt = torch.optim.SGD(model.parameters(), lr=.1)
    learn.fit(2)
    for _ in range(2):
        for xb,yb in dls.train: TF.cross_entropy(model(xb), yb).backward()
        opt.step()
        opt.zero_grad()
    for i in (0,2): torch.testing.assert_close(learn.model.layers[i].w.detach(), model[i].weight.detach().t(), rtol=1e-10, atol=1e-12)

def test_cancelled_training_sees_new_batches_each_epoch():
    "An epoch broken off has been an epoch: the next one isn't the same rows in the same order."
    seen = []
    def stop(self):
        seen.append(self.xb[0,0].item())
        raise cb.CancelTrainException
    learner(On('after_step', stop)).fit(4)
    assert len(set(seen))>1

def raises(exc, first=True):
    def f(self):
        if not first or self.epoch==0: raise exc
    return f

@pytest.mark.parametrize('event,exc', [('before_validate',cb.CancelValidException), ('before_epoch',cb.CancelEpochException),
    ('after_train',cb.CancelEpochException), ('before_train',cb.CancelTrainException)], ids=lambda o: o if isinstance(o, str) else o.__name__)
def test_history_of_a_cancelled_epoch(event, exc):
    "Its row may lack numbers; the table, the CSV and the plot of the run are made all the same."
    learn = learner(On(event, raises(exc)))
    learn.fit(3)
    full = learn.history[-1]
    assert len(learn.history)==3 and {'epoch','train_loss','valid_loss','accuracy','time'}==set(full)
    rows = list(csv.DictReader(io.StringIO(learn.history.to_csv())))
    assert len(rows)==3 and float(rows[2]['valid_loss'])==full['valid_loss'] and float(rows[2]['train_loss'])==full['train_loss']
    text = str(learn.history).splitlines()
    assert 'valid_loss' in text[0] and 'accuracy' in learn.history._repr_markdown_().splitlines()[0]
    assert text[3].split()[1:4]==[f"{full[k]:.4f}" for k in ('train_loss','valid_loss','accuracy')] or any(0<abs(v)<1e-3 for v in full.values())
    ax = learn.plot_losses().axes
    assert learn.history[2]['valid_loss'] in next(l for l in ax[0].lines if l.get_label()=='valid_loss').get_ydata()

def test_grad_ready():
    "Called with each parameter in the middle of the pass, last layer first; a learner without such a callback asks for nothing."
    seen,asked = [],[]
    class Asked(Model):
        def backward(self, **kw):
            asked.append([*kw])
            super().backward(**kw)
    def note(self, p): seen.append((p, p.grad is p.g is not None, self.model.layers[0].b.g is None))
    model = net()
    layers = model.layers
    learn = learner(On('grad_ready', note), model=Asked(layers, CrossEntropy())).fit(1)
    assert len(seen)==4*3
    assert [id(p) for p,*_ in seen[:4]]==[id(p) for p in (layers[2].w,layers[2].b,layers[0].w,layers[0].b)]
    assert all(there for _,there,_ in seen) and [early for *_,early in seen[:4]]==[True,True,True,False]
    learner(model=learn.model).fit(1)
    assert asked==[['ready']]*3+[[]]*3

def test_callbacks_by_order_and_attributes():
    seen = []
    a,b = On('after_step', lambda self: seen.append('a'), order=2),On('after_step', lambda self: seen.append(('b',self.iter,self.epoch)), order=1)
    learn = learner(a, b)
    learn.fit(1)
    assert seen[:2]==[('b',0,0),'a'] and len(seen)==6 and a.learn is None

def test_callback_can_validate_in_the_middle():
    "A validation from inside a fit is a part of it; the fit goes on as it would have."
    got = []
    a,b = learner(On('after_epoch', lambda self: got.append(self.learn.validate()), order=20)),learner()
    b.model.load_state_dict(a.model.state_dict())
    log = Log()
    a.cbs.append(log)
    a.fit(3)
    b.fit(3)
    assert [r['train_loss'] for r in a.history]==[r['train_loss'] for r in b.history] and log.seen==fastai(3, 3, 2)[0]
    assert [g['valid_loss'] for g in got]==[r['valid_loss'] for r in a.history]

def test_callback_may_change_the_gradient():
    "What the library is for: a gradient altered in the middle of a training step reaches the optimizer."
    def zero(self):
        w = self.model.layers[2].w
        w.g = w.grad = torch.zeros_like(w)
    learn = learner(On('after_backward', zero))
    w = learn.model.layers[2].w.clone()
    learn.fit(1)
    assert torch.equal(w, learn.model.layers[2].w) and not torch.equal(learn.model.layers[0].b, torch.zeros(6))

def test_class_instead_of_callback_is_no_silent_nothing():
    try: learn = learner(Log)
    except TypeError: return
    learn.fit(1)
    assert any(isinstance(c, Log) and c.seen for c in learn.cbs)

def test_any_iterables_are_data():
    "Lists of batches will do, and torch's DataLoader."
    batches = [(x[:8],y[:8]),(x[8:],y[8:])]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)
    learn = learner(dls=SimpleNamespace(train=batches, valid=batches[:1]))
    assert learn.fit(2).history[-1]['train_loss']<learn.history[0]['train_loss']
    assert len(learner(dls=SimpleNamespace(train=loader, valid=loader)).fit(2).history)==2

@pytest.mark.parametrize('metrics', [(), (accuracy,)], ids=['','accuracy'])
def test_without_validation_data(metrics):
    dls = data()
    dls.valid = None
    learn = learner(dls=dls, metrics=metrics)
    learn.fit(2)
    assert set(learn.history[1])=={'epoch','train_loss','time'}
    learn.plot_losses()


# When something goes wrong

def reached(): return dict.fromkeys(fastai(1, 1, 1)[0])

@pytest.mark.parametrize('event', reached())
@pytest.mark.parametrize('order', [0,20])
def test_exception_in_a_callback_comes_out_as_it_is(event, order):
    "At any event, before the library's own callbacks or after; what has to be closed is closed, and the next fit is as good as new."
    fail = [True]
    def f(self):
        if fail: raise KeyError(fail.pop())
    clean = []
    learn = learner(On(event, f, order), On('after_cancel_fit', lambda self: clean.append(1)))
    with pytest.raises(KeyError): learn.fit(1)
    assert clean==[1] and torch.is_grad_enabled() and all(c.learn is None for c in learn.cbs)
    assert [r['epoch'] for r in learn.fit(2).history]==[0,1]

@pytest.mark.parametrize('event', [e for e in reached() if e!='after_fit'])
@pytest.mark.parametrize('order', [0,20])
def test_ctrl_c_ends_a_fit_at_any_event(event, order):
    "The whole epochs stay in the history, and the fit says that it was interrupted."
    def f(self):
        if self.epoch==1 or event=='before_fit': raise KeyboardInterrupt
    ends = []
    learn = learner(On(event, f, order), On('after_fit', lambda self: ends.append(1)))
    try: learn.fit(3)
    except KeyboardInterrupt: pytest.fail('came out of fit') # pytest would take it for its own user's
    whole = 0 if event=='before_fit' else 2 if event=='after_epoch' else 1 # the row is written first of all
    assert learn.interrupted and len(learn.history)==whole and ends==[1] and torch.is_grad_enabled()
    learn.cbs = [c for c in learn.cbs if not hasattr(type(c), event) or type(c).__name__!='On']
    assert not learn.fit(1).interrupted

def lost(self):
    if (self.epoch,self.iter)==(1,2) and self.training: self.learn.xb = self.xb*torch.nan
def poison(name):
    def f(self):
        if (self.epoch,self.iter)==(1,2) and self.training: self.model.get_parameter(name).data[0] = torch.nan
    return f

@pytest.mark.parametrize('f,where', [(lost, 'the input'), (poison('layers.0.w'), r'the output of Lin \(layers\.0\)'),
    (poison('layers.2.b'), r'the output of Lin \(layers\.2\)')], ids=['input','first layer','last layer'])
def test_loss_not_finite(f, where):
    steps = []
    learn = learner(On('before_batch', f), On('before_step', lambda self: steps.append((self.epoch,self.iter))))
    with pytest.raises(NonFiniteError, match=rf'epoch 1, batch 2: the loss is (nan|inf); the first to be not finite was {where}$'): learn.fit(3)
    assert steps[-1]==(1,1) and len(learn.history)==1 and all(c.learn is None for c in learn.cbs) # no update from it

def test_loss_itself_not_finite():
    "Every layer's output is finite and the loss overflows."
    learn = Learner(Model(Sequential(Lin(4, 1)), Mse()), SimpleNamespace(train=[(torch.ones(2, 4),torch.full((2,1), 1e30))], valid=None), partial(SGD, lr=.1))
    with pytest.raises(NonFiniteError, match=r'epoch 0, batch 0: the loss is inf.*Mse'): learn.fit(1)

def test_validation_loss_not_finite():
    dls = data()
    dls.valid.x = dls.valid.x.clone()
    dls.valid.x[3,1] = torch.nan
    with pytest.raises(NonFiniteError, match='epoch 0: the validation loss is nan'): learner(dls=dls).fit(2)

@pytest.mark.parametrize('n', [0,-1])
def test_no_epochs(n):
    with pytest.raises(ValueError, match='at least 1'): learner().fit(n)


# What is seen

def test_history_table():
    assert str(learner().history)=='no epochs yet'
    learn = learner().fit(2)
    head,*rows = str(learn.history).splitlines()
    assert head.split()==['epoch','train_loss','valid_loss','accuracy','time'] and len(rows)==2 and len({len(r) for r in rows})==1
    assert rows[1].split()[0]=='1' and float(rows[1].split()[1])==pytest.approx(learn.history[1]['train_loss'], abs=1e-4)
    md = learn.history._repr_markdown_().splitlines()
    assert len(md)==4 and all(l.count('|')==6 for l in md) and re.fullmatch(r'[| -]+', md[1])

def test_history_as_csv():
    "Every digit comes back."
    learn = learner().fit(3)
    rows = list(csv.DictReader(io.StringIO(learn.history.to_csv())))
    assert [{k:float(v) for k,v in r.items()} for r in rows]==learn.history and list(rows[0])==list(learn.history[0])

def test_plot_losses():
    learn = learner()
    learn.plot_losses() # nothing yet, and no warning
    learn.fit(3)
    fig = learn.plot_losses()
    lines = {l.get_label():l for a in fig.axes for l in a.lines}
    assert set(lines)=={'train_loss','valid_loss','accuracy'} and len(fig.axes)==2
    for k,l in lines.items(): assert [*l.get_xdata()]==[r['epoch'] for r in learn.history] and [*l.get_ydata()]==[r[k] for r in learn.history]
    assert {t.get_text() for t in fig.axes[0].get_legend().get_texts()}=={'train_loss','valid_loss'}
    assert learn.plot_losses(fig.axes) is fig

class Terminal(io.StringIO):
    def isatty(self): return True

@pytest.mark.parametrize('stderr', [Terminal,io.StringIO], ids=['terminal','file'])
def test_progress(stderr, monkeypatch, capsys):
    "A bar where someone looks on and none in a log; the table is on stdout, an epoch a line, either way."
    err = stderr()
    with monkeypatch.context() as m:
        m.setattr(sys, 'stderr', err)
        learn = learner().fit(3)
    assert ('9/9' in err.getvalue() or '8/9' in err.getvalue())==(stderr is Terminal) and bool(err.getvalue())==(stderr is Terminal)
    assert re.sub(r'[\r\x1b]\S*', '', capsys.readouterr().out).strip()==str(learn.history).strip()

def test_progress_bar_is_closed():
    "After an error nothing is left that a later bar would be drawn below."
    from tqdm.auto import tqdm
    learn = learner(On('before_step', lambda self: 1/0))
    with pytest.raises(ZeroDivisionError): learn.fit(1)
    assert not getattr(tqdm, '_instances', ())

@pytest.mark.slow
def test_in_a_notebook():
    "In a real kernel: the bar is a widget, the history a table."
    code = '''
from nbformat.v4 import new_notebook, new_code_cell
from nbclient import NotebookClient
cell = new_code_cell("""
import torch
from functools import partial
from fnnlite import DataLoaders, Learner, Lin, Model, Mse, SGD
torch.set_num_threads(1)
x,y = torch.randn(20, 4),torch.randn(20, 3)
learn = Learner(Model([Lin(4, 3)], Mse()), DataLoaders.from_arrays(x, y, x, y, bs=8), partial(SGD, lr=.1))
learn.fit(3).history
""")
nb = new_notebook(cells=[cell])
NotebookClient(nb, kernel_name='python3').execute()
for o in cell.outputs: print('output', *o.get('data', {}), o.get('text', ''))
print(cell.outputs[-1]['data']['text/markdown'])
'''
    p = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert p.returncode==0, p.stderr
    assert Counter(p.stdout.split())['application/vnd.jupyter.widget-view+json']==1
    assert p.stdout.strip().splitlines()[-5].startswith('| epoch | train_loss | valid_loss | time |')

def test_optimizer_of_another_model_is_refused():
    with pytest.raises(ValueError, match="opt holds no parameter of the model"): learner(opt=SGD(net().parameters(), lr=.1))

def test_single_callback_and_metric_without_a_name():
    def top(pred, targ, k): return (pred.topk(k).indices==targ[:,None]).any(1).double().mean()
    learn = Learner(net(), data(), partial(SGD, lr=.1), partial(top, k=2), Log())
    learn.fit(1)
    assert 0<=learn.history[0]['top']<=1 and 'before_fit' in learn.cbs[-1].seen
