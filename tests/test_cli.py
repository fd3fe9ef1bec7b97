"The two commands, as their user meets them: what they print and write, and one line when something is wrong."
import csv, os, pickle, re, runpy, signal, subprocess, sys, sysconfig, time
from pathlib import Path
import numpy as np
import pytest, torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from fnnlite import commands as cli
from fnnlite import load_mnist, Relu
from fnnlite.train import callbacks, resuming
from fnnlite.train.checkpoints import FolderLock, load_tensors, save_tensors

bin = Path(sysconfig.get_path('scripts'))
one_thread = {**os.environ, 'OMP_NUM_THREADS':'1'}

@pytest.fixture(autouse=True)
def tidy():
    "The commands are made for a process of their own: here they share one."
    threads,precision,handlers = torch.get_num_threads(),torch.get_float32_matmul_precision(),[signal.getsignal(o) for o in resuming.ending]
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    for o,f in zip(resuming.ending, handlers): signal.signal(o, f)
    if 'matplotlib.pyplot' in sys.modules: sys.modules['matplotlib.pyplot'].close('all')

@pytest.fixture
def run(monkeypatch, capsys):
    "Run a console script, all but the new process: (exit status, stdout, stderr). Any exception but SystemExit would be a traceback."
    def run(name, *args):
        monkeypatch.setattr(sys, 'argv', [str(bin/name), *map(str, args)])
        capsys.readouterr()
        try: runpy.run_path(str(bin/name), run_name='__main__')
        except SystemExit as e: code = e.code or 0
        return code,*capsys.readouterr()
    return run

@pytest.fixture(scope='module')
def small(tmp_path_factory):
    "A quick set of data, and the options of a quick run with it."
    m,path = load_mnist(),tmp_path_factory.mktemp('data')/'small.npz'
    np.savez(path, x_train=m.x_train[:300].numpy(), y_train=m.y_train[:300].numpy(), x_test=m.x_valid[:100].numpy(), y_test=m.y_valid[:100].numpy())
    return ['--data', path, '--layers', '24,16', '--bs', '64', '--epochs', '4', '--lr', '.005']

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "The real command, on the package's sample: (output folder, stdout, stderr)"
    out = tmp_path_factory.mktemp('trained')/'new'/'out'
    p = subprocess.run([bin/'fnnlite_train','--epochs','2','--layers','64','--out',out], env=one_thread, capture_output=True, text=True)
    assert p.returncode==0, p.stderr
    return out,p.stdout,p.stderr

def history(folder): return list(csv.DictReader((folder/'history.csv').read_text().splitlines()))

def one_line(got, name, *said, code=2):
    "That's how a command refuses."
    assert got[0]==code and len(got[2])<700 and got[2][:-1].isprintable() and re.fullmatch(rf'{name}: .+\n', got[2]) and all(s in got[2] for s in said), got


# Training

def test_train_prints(trained):
    "First that the gradients are right and by how much, then a line of the table for each epoch, then where to look. Nothing on stderr: it's no terminal."
    out,stdout,stderr = trained
    lines = stdout.splitlines()
    proof = next(i for i,l in enumerate(lines) if 'autograd' in l)
    head = next(i for i,l in enumerate(lines) if 'train_loss' in l)
    assert proof<head and float(re.search(r'at most (\de-\d+)', lines[proof])[1])<1e-9
    assert lines[head].split()==['epoch','train_loss','valid_loss','accuracy','time'] and [l.split()[0] for l in lines[head+1:head+3]]==['0','1']
    assert str(out) in lines[-1] and len(lines)==head+4 and stderr==''
    rows = history(out)
    assert lines[-1].startswith(f"Validation accuracy {float(rows[-1]['accuracy']):.2%}")
    for l,r in zip(lines[head+1:head+3], rows): assert [f'{float(r[k]):.4f}' for k in ('train_loss','valid_loss','accuracy')]==l.split()[1:4]

def test_train_writes(trained):
    "Weights, history, curves and the checkpoint, and nothing else; the CSV has every digit."
    out,*_ = trained
    assert sorted(p.name for p in out.iterdir())==['checkpoint.safetensors','curves.png','history.csv','model.safetensors']
    assert [{k:float(v) for k,v in r.items()} for r in history(out)]==load_tensors(out/'checkpoint.safetensors')[1]['history']
    with Image.open(out/'curves.png') as im:
        assert im.format=='PNG' and min(im.size)>200
        im.load()
    with safe_open(out/'model.safetensors', 'pt') as f: assert sorted(f.keys())==['0.b','0.w','2.b','2.w'] or sorted(f.keys())==['0.b','0.w','3.b','3.w']
    assert len({p.stat().st_mode for p in out.iterdir()})==1 # whoever may read one may read all

def test_train_options(run, small, tmp_path):
    "Each has an effect, and the same options twice give the same weights, bit for bit."
    def weights(name, *more):
        code,_,err = run('fnnlite_train', *small, '--epochs', 1, '--out', tmp_path/name, *more)
        assert (code,err)==(0,'')
        return load_tensors(tmp_path/name/'model.safetensors')
    ref,about = weights('ref')
    again,_ = weights('again')
    assert about['layers']==[24,16] and about['dropout']==.2 and all(torch.equal(ref[k], again[k]) for k in ref)
    for more in (['--seed',1],['--bs',32],['--lr',.01],['--dropout',0]):
        other,_ = weights('other', *more)
        assert not any(torch.equal(a, b) for a,b in zip(ref.values(), other.values())), more
    assert [tuple(t.shape) for k,t in sorted(weights('wide', '--layers', '7,6,5')[0].items()) if k.endswith('w')]==[(784,7),(7,6),(6,5),(5,10)]
    assert [tuple(t.shape) for t in weights('linear', '--layers', '')[0].values()] in ([(784,10),(10,)],[(10,),(784,10)])

def test_a_residual_net(run, small, digits, tmp_path):
    "It trains, its running statistics are saved and resumed with, and it predicts as it did in the training's process."
    args = [*small, '--arch', 'resnet', '--epochs', 2, '--out', tmp_path]
    code,out,err = run('fnnlite_train', *args)
    assert (code,err)==(0,'') and 'BatchNorm' in out
    ts,about = load_tensors(tmp_path/'model.safetensors')
    assert about['arch']=='resnet' and any(k.endswith('running_var') and (t!=1).any() for k,t in ts.items())
    assert run('fnnlite_train', *args, '--resume')[0]==0
    one_line(run('fnnlite_train', *small, '--epochs', 2, '--out', tmp_path, '--resume'), 'fnnlite_train', "arch 'resnet', now 'mlp'")
    code,out,_ = run('fnnlite_predict', digits[0][0], '--weights', tmp_path/'model.safetensors')
    assert code==0 and re.search(r': \d \(', out)
    save_tensors(tmp_path/'w', {k:t for k,t in ts.items() if not k.endswith('running_var')}, **about)
    one_line(run('fnnlite_predict', digits[0][0], '--weights', tmp_path/'w'), 'fnnlite_predict', 'for a resnet')
    save_tensors(tmp_path/'w', ts, **{**about, 'arch':['x']})
    one_line(run('fnnlite_predict', digits[0][0], '--weights', tmp_path/'w'), 'fnnlite_predict', "arch is ['x']")

def test_wrong_gradient_is_not_trained_with(run, small, tmp_path, monkeypatch):
    def wrong(self, out, inp): inp.g = out.g
    monkeypatch.setattr(Relu, 'bwd', wrong)
    one_line(run('fnnlite_train', *small, '--out', tmp_path/'out'), 'fnnlite_train', 'gradients are wrong')
    assert not (tmp_path/'out').exists() or not any((tmp_path/'out').iterdir())

@pytest.mark.parametrize('gap', [1e-3,float('inf'),float('nan')])
def test_gap_is_judged(gap, run, small, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, 'autograd_gap', lambda *a: gap)
    one_line(run('fnnlite_train', *small, '--out', tmp_path/'out'), 'fnnlite_train', 'gradients are wrong')

bad = dict(arch=['vgg'], layers=['a,b','1.5','0','-5','8,-1','99999999999','50000,50000',','.join(['9']*101)],
    epochs=['0','-1','x'], bs=['0','-3','1.5'], lr=['-1','x'], dropout=['2','-.1','nan'],
    device=['nonsense','cuda:99','meta','cpu:x','','hpu','xla','vulkan','privateuseone','mtia','xpu','ipu','fpga','maia','lazy','ve','hip','opengl',
            'opencl','ideep','mkldnn','cpu\n\x1b[31m','x'*10**4]+['mps']*(not torch.backends.mps.is_available()), seed=['-1','x',str(2**70)])
@pytest.mark.parametrize('device', ['hpu','mkldnn'])
def test_no_such_device(device):
    "The real command: torch would warn of one, and lacks a module for the other."
    p = subprocess.run([bin/'fnnlite_train',f'--device={device}','--epochs=1'], env=one_thread, capture_output=True, text=True)
    one_line((p.returncode,p.stdout,p.stderr), 'fnnlite_train', f"device is '{device}'")

@pytest.mark.parametrize('option,value', [(k,v) for k,vs in bad.items() for v in vs])
def test_bad_option(option, value, run, small, tmp_path):
    "One line, or argparse's own usage and a line; nothing is written."
    code,_,err = got = run('fnnlite_train', *small, '--out', tmp_path/'out', f'--{option}={value}')
    if err.startswith('usage:'): assert code==2 and f'argument --{option}' in err.splitlines()[-1]
    else: one_line(got, 'fnnlite_train', *[f'{option} is '][:option in ('layers','device')])
    assert not (tmp_path/'out').exists() or not any((tmp_path/'out').iterdir())

def broken(kind, path):
    "A file or folder that holds no digits."
    if kind=='empty folder': path.mkdir()
    elif kind=='random': path.write_bytes(np.random.default_rng(0).bytes(500))
    elif kind=='empty': path.write_bytes(b'')
    elif kind=='text': path.write_text('no digits here')
    elif kind=='pickle': path.write_bytes(pickle.dumps(Bomb()))
    elif kind=='npz of other things': np.savez(path.with_suffix('.npz'), a=np.ones(3)), path.with_suffix('.npz').rename(path)

class Bomb:
    def __reduce__(self): return os.mkdir,(Bomb.target,)

@pytest.mark.parametrize('kind', ['none','empty folder','random','empty','text','pickle','npz of other things'])
def test_bad_data(kind, run, tmp_path):
    Bomb.target = str(tmp_path/'bomb')
    broken(kind, tmp_path/'digits')
    one_line(run('fnnlite_train', '--data', tmp_path/'digits', '--out', tmp_path/'out'), 'fnnlite_train', str(tmp_path/'digits'))
    assert not (tmp_path/'bomb').exists() and not (tmp_path/'out').exists()

@pytest.mark.parametrize('share', [0,.001,.1,.5,.9,.999])
def test_truncated_data(share, run, small, tmp_path):
    raw = small[1].read_bytes()
    (tmp_path/'digits').write_bytes(raw[:int(share*len(raw))])
    one_line(run('fnnlite_train', '--data', tmp_path/'digits', '--out', tmp_path/'out'), 'fnnlite_train', str(tmp_path/'digits'))

@pytest.mark.parametrize('out', ['file','file/below','/proc/nowhere','/dev/null'])
def test_bad_out(out, run, small, tmp_path, monkeypatch):
    "Found out before an epoch has been computed in vain."
    (tmp_path/'file').write_text('precious')
    monkeypatch.setattr(callbacks.Recorder, 'after_train', lambda self: pytest.fail('trained for nothing'))
    one_line(run('fnnlite_train', *small, '--out', tmp_path/out), 'fnnlite_train', out)
    assert (tmp_path/'file').read_text()=='precious'

@pytest.mark.parametrize('name', ['fsync','replace'])
def test_full_disk(name, run, small, tmp_path, monkeypatch):
    def full(*args): raise OSError(28, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(os, name, full)
        got = run('fnnlite_train', *small, '--out', tmp_path/'out')
    one_line(got, 'fnnlite_train', 'No space left on device')
    assert not any((tmp_path/'out').glob('**/*'))

def test_loss_not_finite(run, small, tmp_path):
    "Where it happened, in one line; the checkpoint and the weights of the run before are as they were."
    assert run('fnnlite_train', *small, '--out', tmp_path)[0]==0
    before = {p.name:p.read_bytes() for p in tmp_path.glob('*.safetensors')}
    got = run('fnnlite_train', *small, '--out', tmp_path, '--lr', '1e38')
    one_line(got, 'fnnlite_train')
    assert re.search(r'epoch 0, batch [1-5]: the loss is (nan|inf); the first to be not finite was the output of \w+ \(layers\.\d\)', got[2])
    assert {p.name:p.read_bytes() for p in tmp_path.glob('*.safetensors')}==before


# Going on

driver = '''
import runpy, signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)
from fnnlite.train.callbacks import OneCycle
orig = OneCycle.before_batch
def before_batch(self):
    orig(self)
    if (self.epoch,self.iter,self.training)==(2,1,True):
        Path(ready).touch()
        for _ in range(60_000):
            if Path(ready+'.go').exists(): break
            time.sleep(.01)
if ready: OneCycle.before_batch = before_batch
sys.argv[0] = command
runpy.run_path(command, run_name='__main__')
'''

def stopped(tmp_path, args, *numbers, go=True):
    "A process in the middle of a batch of its third epoch gets these signals; with `go` the batch comes to its end: (exit status, stdout, stderr)"
    ready = tmp_path/'ready'
    code = f'ready,command = {str(ready)!r},{str(bin/"fnnlite_train")!r}' + driver
    with subprocess.Popen([sys.executable, '-c', code, *map(str, args)], env=one_thread, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as p:
        until = time.monotonic()+120
        while not ready.exists() and p.poll() is None and time.monotonic()<until: time.sleep(.01)
        for n in numbers:
            p.send_signal(n)
            time.sleep(.1) # two that are pending together come in the order of their numbers
        if go: ready.with_name('ready.go').touch()
        out,err = p.communicate(timeout=120)
    return p.returncode,out,err

def assert_resumes(run, small, folder, tmp_path):
    "`--resume` ends with the files of a run that was never stopped, bit by bit; it prints the whole table."
    assert run('fnnlite_train', *small, '--out', tmp_path/'whole')[0]==0
    code,out,err = run('fnnlite_train', *small, '--out', folder, '--resume')
    assert (code,err)==(0,'') and [l.split()[0] for l in out.splitlines()[-6:-1]]==['epoch','0','1','2','3']
    for name in 'model','checkpoint':
        (a,aa),(b,ab) = (load_tensors(o/f'{name}.safetensors') for o in (folder,tmp_path/'whole'))
        assert sorted(a)==sorted(b) and all(torch.equal(a[k], b[k]) for k in a)
        for about in aa,ab:
            about.pop('rng', None) # Python's and numpy's, which this run doesn't draw from and nobody seeds
            for r in about.get('history', []): del r['time']
        assert aa==ab
    assert sorted(p.name for p in folder.iterdir())==sorted(p.name for p in (tmp_path/'whole').iterdir())

@pytest.mark.parametrize('number', [signal.SIGINT,signal.SIGTERM])
def test_signal(number, run, small, tmp_path):
    "Its status, no traceback, the epochs that were whole in the history and in the checkpoint; and it goes on from there."
    folder = tmp_path/'out'
    code,out,err = stopped(tmp_path, [*small, '--out', folder], number)
    assert code==128+number and 'Traceback' not in err and '--resume' in err and len(err.splitlines())==1
    assert [r['epoch'] for r in history(folder)]==['0','1']
    assert load_tensors(folder/'checkpoint.safetensors')[1]['epochs']==2 and not (folder/'model.safetensors').exists()
    with Image.open(folder/'curves.png') as im: im.load()
    assert_resumes(run, small, folder, tmp_path)

@pytest.mark.slow
def test_second_signal(run, small, tmp_path):
    "Ends it in the middle of the batch, without a word; the last whole epoch is on disk."
    folder = tmp_path/'out'
    code,out,err = stopped(tmp_path, [*small, '--out', folder], signal.SIGINT, signal.SIGTERM, go=False)
    assert (code,err)==(-signal.SIGTERM,'') and [p.name for p in folder.iterdir()]==['checkpoint.safetensors']
    assert_resumes(run, small, folder, tmp_path)

def test_kill_9(run, small, tmp_path):
    folder = tmp_path/'out'
    assert stopped(tmp_path, [*small, '--out', folder], signal.SIGKILL)[0]==-signal.SIGKILL
    assert_resumes(run, small, folder, tmp_path)

def test_ctrl_c_before_the_fit(run, small, tmp_path, monkeypatch):
    def interrupted(*args): raise KeyboardInterrupt
    monkeypatch.setattr(cli, 'load_mnist', interrupted)
    code,_,err = run('fnnlite_train', *small, '--out', tmp_path)
    assert code==130 and 'Traceback' not in err

@pytest.mark.parametrize('number', [signal.SIGINT,signal.SIGTERM,signal.SIGHUP])
@pytest.mark.parametrize('where,name', [(cli,'load_mnist'),(cli.Learner,'plot_losses'),(os,'replace')])
def test_signal_outside_the_training(where, name, number, run, small, tmp_path, monkeypatch):
    "Ends it at once, with nothing half written."
    replace = os.replace
    def signalled(*args):
        if where is not os or args[1].name=='history.csv': signal.raise_signal(number)
        else: replace(*args)
    monkeypatch.setattr(where, name, signalled)
    code,_,err = run('fnnlite_train', *small, '--out', tmp_path/'out')
    files = {cli:[], cli.Learner:['checkpoint.safetensors','history.csv'], os:['checkpoint.safetensors']}[where]
    assert (code,err)==(128+number,'') and sorted(p.name for p in (tmp_path/'out').glob('*'))==files

def test_called_from_python(small, tmp_path):
    "A notebook's Ctrl-C is what it was before."
    handlers = [signal.getsignal(o) for o in resuming.ending]
    cli.fnnlite_train(data=small[1], epochs=1, layers='8', out=tmp_path)
    assert [signal.getsignal(o) for o in resuming.ending]==handlers and (tmp_path/'model.safetensors').exists()

def test_signal_at_the_exit(tmp_path):
    "When the command is done and Python clears up: no traceback either."
    code = f"""
import atexit, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
atexit.register(signal.raise_signal, signal.SIGINT) # the first to be registered is the last to be called
sys.argv = [{str(bin/'fnnlite_train')!r},'--epochs','0']
runpy.run_path(sys.argv[0], run_name='__main__')
"""
    p = subprocess.run([sys.executable, '-c', code], env=one_thread, capture_output=True, text=True)
    assert p.returncode==-signal.SIGINT and 'epochs is 0' in p.stderr and len(p.stderr.splitlines())==1, p

def test_signal_in_the_first_epoch(run, small, tmp_path, monkeypatch):
    "There is nothing to go on from, and nobody says so."
    monkeypatch.setattr(callbacks.OneCycle, 'before_batch', lambda self: signal.raise_signal(signal.SIGTERM))
    code,_,err = run('fnnlite_train', *small, '--out', tmp_path)
    assert code==143 and '--resume' not in err and len(err.splitlines())==1 and not any(tmp_path.iterdir())

def test_error_after_a_signal(run, small, tmp_path, monkeypatch):
    "A compiler that Ctrl-C has ended too, another process that is gone: it's the signal that ended the run."
    def fail(self):
        if self.epoch==1:
            signal.raise_signal(signal.SIGINT)
            raise RuntimeError('g++ got signal 2')
    monkeypatch.setattr(callbacks.OneCycle, 'before_batch', fail)
    code,_,err = run('fnnlite_train', *small, '--out', tmp_path)
    assert code==130 and err.startswith('Stopped.') and len(err.splitlines())==1 and len(history(tmp_path))==1

def test_second_run_into_a_folder(run, small, tmp_path):
    "Is refused, before it has computed an epoch or written anything; with --resume too. Afterwards it isn't."
    with FolderLock(tmp_path/'out'):
        for more in [],['--resume']:
            one_line(run('fnnlite_train', *small, '--out', tmp_path/'out', *more), 'fnnlite_train', f"{tmp_path/'out'}: another run is writing there")
        assert not any((tmp_path/'out').iterdir())
    assert run('fnnlite_train', *small, '--out', tmp_path/'out')[0]==0

def test_locked_until_the_last_file(run, small, tmp_path, monkeypatch):
    plot,seen = cli.Learner.plot_losses,[]
    def second(self):
        try: FolderLock(tmp_path).__enter__()
        except cli.CheckpointError as e: seen.append(str(e))
        return plot(self)
    monkeypatch.setattr(cli.Learner, 'plot_losses', second)
    assert run('fnnlite_train', *small, '--out', tmp_path)[0]==0 and len(seen)==1

def test_resume_when_all_is_done(run, small, tmp_path):
    "Makes the files that follow from the checkpoint once more."
    assert run('fnnlite_train', *small, '--out', tmp_path)[0]==0
    weights = (tmp_path/'model.safetensors').read_bytes()
    for name in 'model.safetensors','history.csv','curves.png': (tmp_path/name).unlink()
    assert run('fnnlite_train', *small, '--out', tmp_path, '--resume')[::2]==(0,'')
    assert (tmp_path/'model.safetensors').read_bytes()==weights and (tmp_path/'history.csv').exists() and (tmp_path/'curves.png').exists()

def test_resume_with_other_settings(run, small, tmp_path):
    "Refused, with their names and both values; device and resume itself are no settings."
    assert run('fnnlite_train', *small, '--out', tmp_path)[0]==0
    before = {p.name:p.read_bytes() for p in tmp_path.iterdir()}
    for option,value,said in (('--lr','.5','lr 0.005, now 0.5'), ('--epochs','9','epochs 4, now 9'), ('--bs','32','bs 64, now 32'),
            ('--seed','7','seed 42, now 7'), ('--layers','24','layers [24, 16], now [24]'), ('--dropout','0','dropout 0.2, now 0.0'),
            ('--precision','medium',"precision 'highest', now 'medium'")):
        one_line(run('fnnlite_train', *small, '--out', tmp_path, '--resume', option, value), 'fnnlite_train', str(tmp_path/'checkpoint.safetensors'), said)
    one_line(run('fnnlite_train', *small, '--out', tmp_path, '--resume', '--compiled'), 'fnnlite_train', 'compiled False, now True')
    assert {p.name:p.read_bytes() for p in tmp_path.iterdir()}==before
    assert run('fnnlite_train', *small, '--out', tmp_path, '--resume', '--device', 'cpu', '--precision', 'highest')[0]==0

@pytest.mark.parametrize('kind', ['truncated','foreign','pickle','weights','flipped','lrs','history','epochs','no rng','deep'])
def test_resume_from_what_is_no_checkpoint(kind, run, small, tmp_path):
    path = tmp_path/'checkpoint.safetensors'
    assert run('fnnlite_train', *small, '--out', tmp_path)[0]==0
    Bomb.target = str(tmp_path/'bomb')
    if kind=='truncated': path.write_bytes(path.read_bytes()[:-1])
    elif kind=='foreign': save_file({'a':torch.ones(2)}, path)
    elif kind=='pickle': path.write_bytes(pickle.dumps(Bomb()))
    elif kind=='weights': path.write_bytes((tmp_path/'model.safetensors').read_bytes())
    elif kind=='flipped': path.write_bytes(path.read_bytes()[:-1]+bytes([path.read_bytes()[-1]^1]))
    elif kind=='deep': save_file({'a':torch.ones(2)}, path, {'fnnlite':'{"a":'+'['*10**5+']'*10**5+'}'})
    else:
        t,about = load_tensors(path)
        if kind=='no rng': del t['rng.cpu']
        save_tensors(path, t, **{**about, **{'lrs':dict(lrs=['a']), 'history':dict(history=[1,2]), 'epochs':dict(epochs=10**9)}.get(kind, {})})
    raw = path.read_bytes()
    one_line(run('fnnlite_train', *small, '--out', tmp_path, '--resume'), 'fnnlite_train', str(path))
    assert path.read_bytes()==raw and not (tmp_path/'bomb').exists()


# Reading digits

@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    "The sample's own validation digits as pictures: (paths, pixels, classes)"
    m,folder = load_mnist(),tmp_path_factory.mktemp('digits')
    paths = [folder/f'{i}.png' for i in range(40)]
    for p,px in zip(paths, m.x_valid): Image.fromarray((px.view(28, 28)*255).round().byte().numpy()).save(p)
    return paths,m.x_valid[:40],m.y_valid[:40]

def test_predict(run, trained, digits):
    "A line for each picture, in order; most are right, and the probability is that of the saved weights by plain torch."
    weights,(paths,px,classes) = trained[0]/'model.safetensors',digits
    code,out,err = run('fnnlite_predict', *paths, '--weights', weights)
    lines = [re.fullmatch(r'(.+): (\d) \((\d+\.\d)%\)', l).groups() for l in out.splitlines()]
    assert (code,err)==(0,'') and [l[0] for l in lines]==[*map(str, paths)]
    assert sum(int(l[1])==c for l,c in zip(lines, classes.tolist()))>=34
    t,about = load_tensors(weights)
    (w1,b1),(w2,b2) = ((t[f'{i}.w'],t[f'{i}.b']) for i in sorted({k.split('.')[0] for k in t}, key=int))
    probs = (((px-about['stats'][0])/about['stats'][1]@w1+b1).relu()@w2+b2).softmax(-1)
    assert [int(l[1]) for l in lines]==probs.argmax(-1).tolist()
    assert all(abs(float(l[2])-100*p)<.06 for l,p in zip(lines, probs.amax(-1).tolist()))

def test_predict_drawn_digits(run, trained, digits, tmp_path):
    "Dark on white and five times as large, as someone would draw it."
    paths = []
    for i,px in enumerate(digits[1]):
        paths.append(tmp_path/f'{i}.png')
        Image.fromarray(255-(px.view(28, 28)*255).byte().numpy()).resize((140, 140)).save(paths[-1])
    code,out,_ = run('fnnlite_predict', *paths, '--weights', trained[0]/'model.safetensors')
    assert code==0 and sum(int(l.split()[1])==c for l,c in zip(out.splitlines(), digits[2].tolist(), strict=True))>=30

def test_predict_real_command(trained, digits):
    p = subprocess.run([bin/'fnnlite_predict',digits[0][0],'--weights',trained[0]/'model.safetensors'], env=one_thread, capture_output=True, text=True)
    assert p.returncode==0 and p.stderr=='' and re.fullmatch(r'.*0\.png: \d \(\d+\.\d%\)\n', p.stdout)

def test_predict_says_what_it_can(run, trained, digits, tmp_path):
    "A line on stderr for each picture that can't be read, the digits of the others on stdout, status 2."
    bad = [tmp_path/n for n in ('none.png','text.png','cut.png','blank.png','folder')]
    bad[1].write_text('no picture')
    bad[2].write_bytes(digits[0][0].read_bytes()[:-60])
    Image.new('L', (28, 28)).save(bad[3])
    bad[4].mkdir()
    code,out,err = run('fnnlite_predict', bad[0], digits[0][0], *bad[1:], digits[0][1], '--weights', trained[0]/'model.safetensors')
    assert code==2 and [l.split(': ')[0] for l in out.splitlines()]==[*map(str, digits[0][:2])]
    assert len(err.splitlines())==len(bad) and all(l.startswith(f'fnnlite_predict: {b}: ') for l,b in zip(err.splitlines(), bad))

def test_predict_nothing(run, trained, digits):
    one_line(run('fnnlite_predict', '--weights', trained[0]/'model.safetensors'), 'fnnlite_predict', 'no pictures')
    one_line(run('fnnlite_predict', digits[0][0], '--weights', 'nowhere.safetensors'), 'fnnlite_predict', 'nowhere.safetensors')

@pytest.mark.parametrize('kind', ['cut','empty','folder','pickle','torch.save','foreign','checkpoint','text'])
def test_bad_weights(kind, run, trained, digits, tmp_path):
    "Refused by name; nothing in them is run."
    path,Bomb.target = tmp_path/'w.safetensors',str(tmp_path/'bomb')
    if kind=='cut': path.write_bytes((trained[0]/'model.safetensors').read_bytes()[:-1])
    elif kind=='empty': path.write_bytes(b'')
    elif kind=='folder': path.mkdir()
    elif kind=='pickle': path.write_bytes(pickle.dumps(Bomb()))
    elif kind=='torch.save': torch.save(Bomb(), path)
    elif kind=='foreign': save_file({'0.w':torch.ones(784, 10), '0.b':torch.ones(10)}, path)
    elif kind=='checkpoint': path.write_bytes((trained[0]/'checkpoint.safetensors').read_bytes())
    elif kind=='text': path.write_text('weights, honestly')
    one_line(run('fnnlite_predict', digits[0][0], '--weights', path), 'fnnlite_predict', str(path))
    assert not (tmp_path/'bomb').exists()

@pytest.mark.parametrize('change', [dict(layers=[65]), dict(layers=[]), dict(layers=[-1]), dict(layers=['x']), dict(layers='64'), dict(layers=64),
    dict(dropout=7), dict(dropout=None), dict(stats=[1]), dict(stats='ab'), dict(stats=None),
    dict(layers=[10**9]), dict(layers=[99_999,99_999]), dict(layers=[64]*101),
    dict(layers=[64.]), dict(layers=[True]), dict(layers=[[64]]),
    dict(layers=[10**400]), dict(dropout=float('nan')), dict(dropout='.2'), dict(dropout=True), dict(dropout=-1),
    dict(dropout=1), dict(dropout=10**400), dict(dropout=[]),
    dict(stats=[float('nan'),1]), dict(stats=[0,float('inf')]), dict(stats=[0,0]), dict(stats=[0,-1]), dict(stats=[0,10**400]), dict(stats=['0','1']),
    dict(stats=[True,True]), dict(stats=[0,1,2]), dict(stats={'0':0, '1':1}), dict(stats='\n\x1b[31m')], ids=lambda o: str(o)[:40])
def test_weights_of_another_make(change, run, trained, digits, tmp_path):
    "What the file says of the net isn't what is in it, or isn't what such a file says."
    t,about = load_tensors(trained[0]/'model.safetensors')
    save_tensors(tmp_path/'w.safetensors', t, **{**about, **change})
    got = run('fnnlite_predict', digits[0][0], '--weights', tmp_path/'w.safetensors')
    one_line(got, 'fnnlite_predict', str(tmp_path/'w.safetensors'))

@pytest.mark.parametrize('text', ['[]','1','null','"layers, dropout, stats"','['*10**5,'{"a":'*10**5,'{"layers":[64],"dropout":0,"stats":[0,1e400]}',
    '{"layers":'+'['*900+']'*900+',"dropout":0,"stats":[0,1]}','{"layers":'+'9'*10**5+'}'], ids=lambda o: o[:20])
def test_weights_with_strange_words(text, run, trained, digits, tmp_path):
    save_file(load_tensors(trained[0]/'model.safetensors')[0], path := tmp_path/'w.safetensors', {'fnnlite':text})
    one_line(run('fnnlite_predict', digits[0][0], '--weights', path), 'fnnlite_predict', str(path))

@pytest.mark.parametrize('value', [float('nan'),float('inf'),-float('inf')])
def test_weights_that_are_not_finite(value, run, trained, digits, tmp_path):
    "Refused with the tensor's name, not answered with 'nan%'."
    t,about = load_tensors(trained[0]/'model.safetensors')
    for k in t:
        other = {**t, k:t[k].clone()}
        other[k].view(-1)[-1] = value
        save_tensors(tmp_path/'w.safetensors', other, **about)
        one_line(got := run('fnnlite_predict', digits[0][0], '--weights', tmp_path/'w.safetensors'), 'fnnlite_predict', f"'{k}'", 'not finite')
        assert not got[1]

@pytest.mark.parametrize('change', [1e38,dict(stats=[0.,1e-45])], ids=str)
def test_answer_that_is_not_finite(change, run, trained, digits, tmp_path):
    "Every number in the file is finite, yet the net's answer isn't."
    t,about = load_tensors(trained[0]/'model.safetensors')
    if isinstance(change, dict): about |= change
    else: t = {k:o*change for k,o in t.items()}
    save_tensors(tmp_path/'w.safetensors', t, **about)
    one_line(got := run('fnnlite_predict', digits[0][0], '--weights', tmp_path/'w.safetensors'), 'fnnlite_predict', 'w.safetensors', 'not finite for')
    assert not got[1]

def test_names_of_one_line(run, trained, digits, tmp_path):
    "A file's name can't write lines or colours, neither where its digit is told nor in an error; nor can a tensor's."
    good,bad = tmp_path/'a\nb\x1b[31m\u202e.png',tmp_path/'c\n\x07.png'
    good.write_bytes(digits[0][0].read_bytes())
    code,out,err = run('fnnlite_predict', good, bad, '--weights', trained[0]/'model.safetensors')
    assert code==2 and re.fullmatch(re.escape(f'{tmp_path}/a\\nb\\x1b[31m\\u202e.png')+r': \d \(\d+\.\d%\)\n', out)
    one_line((code,out,err), 'fnnlite_predict', r'c\n\x07.png: No such file')
    t,about = load_tensors(trained[0]/'model.safetensors')
    save_tensors(tmp_path/'w', {**t, 'x\n\x1b'+'y'*10**5:torch.ones(0)}, **about)
    one_line(run('fnnlite_predict', good, '--weights', tmp_path/'w'), 'fnnlite_predict', r'x\n\x1byyy')
    one_line(run('fnnlite_predict', good, '--weights', tmp_path/'\n\x1b'), 'fnnlite_predict')
    one_line(run('fnnlite_train', '--data', tmp_path/'\n\x1b'), 'fnnlite_train')

@pytest.mark.slow
def test_no_regular_files(digits, trained, tmp_path):
    "The real command doesn't wait for a pipe's other end, nor for the end of a device."
    os.mkfifo(tmp_path/'pipe')
    for args in ([tmp_path/'pipe','/dev/zero','--weights',trained[0]/'model.safetensors'], [digits[0][0],'--weights',tmp_path/'pipe'],
                 [digits[0][0],'--weights','/dev/zero']):
        p = subprocess.run([bin/'fnnlite_predict',*args], env=one_thread, capture_output=True, text=True, timeout=120)
        assert p.returncode==2 and not p.stdout and len(p.stderr.splitlines())==1+(args[1]=='/dev/zero')
        assert all('regular file' in l for l in p.stderr.splitlines()), p.stderr

def test_nothing_larger_than_the_file_is_made(run, trained, digits, tmp_path, monkeypatch):
    "The layers it speaks of are compared with the numbers in it before there is a net of them."
    t,about = load_tensors(trained[0]/'model.safetensors')
    save_tensors(tmp_path/'w', t, **{**about, 'layers':[5000,5000]})
    monkeypatch.setattr(cli, 'mlp', lambda *a: pytest.fail('made a net'))
    one_line(run('fnnlite_predict', digits[0][0], '--weights', tmp_path/'w'), 'fnnlite_predict', '28,980,010 for layers [5000, 5000]')

def test_no_mirror_is_one_line(run, tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.delenv('FNNLITE_DATA', raising=False)
    monkeypatch.setattr('fnnlite.data.digits.MIRRORS', ['ftp://127.0.0.1/', 'http://127.0.0.1:9/'])
    one_line(run('fnnlite_train', '--data', 'full'), 'fnnlite_train', 'no mirror', 'ftp://127.0.0.1/train', 'http://127.0.0.1:9/train')


# The package

def test_import_is_light():
    "fnnlite itself imports nothing that only plots, pictures, bars or downloads need (torch brings some of it along)."
    code = '''
import sys, torch
heavy = 'matplotlib','PIL','tqdm','urllib.request'
for m in [m for m in sys.modules if any(m==h or m.startswith(h+'.') for h in heavy)]: del sys.modules[m]
import fnnlite, fnnlite.commands
print([h for h in heavy if h in sys.modules])
'''
    p = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert p.returncode==0 and p.stdout=='[]\n', p.stdout+p.stderr
