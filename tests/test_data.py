"Files good, broken and hostile; downloads from a server that misbehaves; batches; image files."
import gzip, hashlib, importlib.util, io, os, pickle, struct, subprocess, sys, threading, time, zipfile
import numpy as np, pytest, torch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from PIL import Image

from fnnlite import DataLoaders, load_mnist
from fnnlite.data import digits as data
from fnnlite.data.digits import ArrayDL, DataError, normalize
from fnnlite.data.images import read_image
from fnnlite.data.files import FileError, one_line

rng = np.random.RandomState(0)
XT,YT = rng.randint(0, 256, (30,28,28)).astype(np.uint8), rng.randint(0, 10, 30).astype(np.uint8)
XV,YV = rng.randint(0, 256, (12,28,28)).astype(np.uint8), rng.randint(0, 10, 12).astype(np.uint8)
NAMES = list(data.MNIST_FILES)

def idx(a): return bytes([0,0,8,a.ndim]) + struct.pack(f'>{a.ndim}I', *a.shape) + a.tobytes()
IDX = dict(zip(NAMES, map(idx, (XT,YT,XV,YV))))

@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    "Neither this machine's cache, proxy nor network"
    monkeypatch.delenv('FNNLITE_DATA', raising=False)
    monkeypatch.setenv('no_proxy', '*')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    monkeypatch.setattr(data, 'MIRRORS', [])

@pytest.fixture
def folder(tmp_path):
    d = tmp_path/'idx'
    d.mkdir()
    for name,b in IDX.items(): (d/name).write_bytes(b)
    return d

@pytest.fixture(scope='module')
def mnist(): return load_mnist()

def check(m):
    "`m` is the 30 and 12 images above"
    for x,y,X,Y in (m.x_train,m.y_train,XT,YT),(m.x_valid,m.y_valid,XV,YV):
        assert x.dtype==torch.float32 and x.shape==(len(X),784) and y.dtype==torch.int64
        assert torch.equal(x, torch.tensor(X.reshape(-1, 784)).float()/255)
        assert y.tolist()==Y.tolist()

def fails(path, *words):
    "Loading `path` is a `DataError` that says the file's name and `words`"
    with pytest.raises(DataError) as e: load_mnist(path)
    for w in (path.name, 'expected', *words): assert w in str(e.value), (w, str(e.value))

# The sample

SAMPLE_SHA = ['247a475b44704c33', 'bfb3f2db87ec32cf', '468f63b7a92b384d', '32715153772bc1dc'] # x_train, y_train, x_valid, y_valid as bytes

def sha(t): return hashlib.sha256(t.numpy().tobytes()).hexdigest()[:16]

def test_sample(mnist):
    xt,yt,xv,yv = mnist
    assert xt.shape==(10000,784) and xv.shape==(2000,784) and yt.shape==(10000,) and yv.shape==(2000,)
    assert xt.dtype==xv.dtype==torch.float32 and yt.dtype==yv.dtype==torch.int64
    assert xt.min()==0 and xt.max()==1
    # MNIST's own counts of each class, 60,000 and 10,000 in all
    for y,counts in (yt,[5923,6742,5958,6131,5842,5421,5918,6265,5851,5949]),(yv,[980,1135,1032,1010,982,892,958,1028,974,1009]):
        share = torch.tensor(counts)/sum(counts)*len(y)
        assert (y.bincount()-share).abs().max()<1
    assert [sha((o*255).round().byte()) for o in (xt,xv)]==SAMPLE_SHA[::2]
    assert [sha(o.byte()) for o in (yt,yv)]==SAMPLE_SHA[1::2]

def test_sample_files():
    d = files('fnnlite')/'mnist'
    assert sum(o.stat().st_size for o in d.iterdir())<2_500_000
    note = (d/'NOTE.md').read_text(encoding='utf-8')
    assert 'LeCun' in note and 'Cortes' in note and 'creativecommons.org/licenses/by-sa/3.0' in note

def test_normalize(mnist):
    n,(m,s) = mnist.normalize(),mnist.stats()
    assert abs(n.x_train.mean())<1e-4 and abs(n.x_train.std()-1)<1e-4
    torch.testing.assert_close(n.x_valid, (mnist.x_valid-mnist.x_train.mean())/mnist.x_train.std())
    assert torch.equal(n.y_train, mnist.y_train) and mnist.x_train.max()==1
    assert isinstance(m, float) and torch.equal(normalize(mnist.x_train, m, s), n.x_train)

def test_import_is_light():
    code = """import sys, torch, numpy, fastcore.xdg, importlib.resources
before = set(sys.modules)
import fnnlite.data.digits
print(*sorted(set(sys.modules)-before))"""
    new = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()
    assert 'fnnlite.data.digits' in new
    assert not {'tqdm','PIL','urllib.request','matplotlib','lzma'} & set(new)

# Formats

@pytest.mark.parametrize('dotted', [False,True])
@pytest.mark.parametrize('zipped', [False,True])
def test_idx(tmp_path, dotted, zipped):
    for name,b in IDX.items():
        if dotted: name = name.replace('-idx', '.idx')
        (tmp_path/(name+'.gz'*zipped)).write_bytes(gzip.compress(b) if zipped else b)
    check(load_mnist(tmp_path))
    check(load_mnist(str(tmp_path)))

def test_idx_unzipped_under_gz_name(folder):
    for o in list(folder.iterdir()): o.rename(f'{o}.gz')
    check(load_mnist(folder))

def save_npz(path, **kw): np.savez_compressed(path, **({'x_train':XT, 'y_train':YT, 'x_test':XV, 'y_test':YV}|kw))

def test_npz(tmp_path):
    save_npz(tmp_path/'mnist.npz')
    check(load_mnist(tmp_path/'mnist.npz'))

def lesson(dtype=np.float32):
    f = lambda x: (x.reshape(-1, 784)/np.float32(255)).astype(dtype)
    return (f(XT),YT.astype(np.int64)), (f(XV),YV.astype(np.int64)), (f(XV[:3]),YV[:3].astype(np.int64))

def save_pickle(path, o, protocol=2, zipped=True):
    b = o if isinstance(o, bytes) else pickle.dumps(o, protocol)
    path.write_bytes(gzip.compress(b, 1) if zipped else b)
    return path

@pytest.mark.parametrize('zipped', [False,True])
@pytest.mark.parametrize('protocol', range(6))
def test_pickle(tmp_path, protocol, zipped):
    check(load_mnist(save_pickle(tmp_path/'mnist.pkl.gz', lesson(), protocol, zipped)))

def py2_array(a):
    "Pickle opcodes, protocol 2, as Python 2's cPickle and numpy wrote the array `a`: its bytes are a `str`"
    s = lambda b: (b'U'+bytes([len(b)]) if len(b)<256 else b'T'+struct.pack('<i', len(b))) + b
    i = lambda n: b'J'+struct.pack('<i', n)
    shape = b'('+b''.join(map(i, a.shape))+b't'
    dt = b'cnumpy\ndtype\n'+s(a.dtype.str[1:].encode())+i(0)+i(1)+b'\x87R'+b'('+i(3)+s(b'<')+b'NNN'+i(-1)+i(-1)+i(0)+b'tb'
    return (b'cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n'+i(0)+b'\x85'+s(b'b')+b'\x87R' +
            b'('+i(1)+shape+dt+b'\x89'+s(a.tobytes())+b'tb')

def test_pickle_of_python2(tmp_path):
    parts = b''.join(py2_array(x)+py2_array(y)+b'\x86' for x,y in lesson())
    check(load_mnist(save_pickle(tmp_path/'mnist.pkl.gz', b'\x80\x02'+parts+b'\x87.')))

@pytest.mark.parametrize('protocol', [2,5])
def test_pickle_layouts(tmp_path, protocol):
    (xt,yt),*rest = lesson(np.float64)
    check(load_mnist(save_pickle(tmp_path/'big.pkl', [[np.asfortranarray(xt.astype('>f8')),yt.astype('>i4')],*rest], protocol)))

# Broken files

def zipped_but(b): return {'cut': gzip.compress(b)[:-20], 'crc': gzip.compress(b)[:-8]+bytes(8), 'junk': gzip.compress(b)+b'junk'}

bad_idx = [ # which file, its contents, words of the error
    (0, b'', ["magic number ''"]),
    (0, b'<html>404</html>', ['3c68746d']),
    (0, IDX[NAMES[1]], ['00000801']),
    (0, IDX[NAMES[0]][:10], ['12 bytes']),
    (0, IDX[NAMES[0]][:-1], [f'{30*784-1} bytes', f'{30*784}']),
    (2, IDX[NAMES[2]]+b'x', ['more bytes']),
    (2, b'\0\0\x08\x03'+struct.pack('>3I', 2**32-1, 2**32-1, 2**32-1)+bytes(99), []),
    (0, b'\0\0\x0d\x03'+IDX[NAMES[0]][4:], ['00000d03']),
    (0, idx(XT[:,:20]), ['(30, 20, 28)']),
    (0, idx(XT[:0]), ['N>0']),
    (1, idx(YT[:-1]), ['29 labels', '30']),
    (1, idx(YT+200), ['labels', '0 to 9']),
    (3, idx(np.where(np.arange(12)==5, 10, YV).astype(np.uint8)), ['to 10']),
    *[(0, b, []) for b in zipped_but(IDX[NAMES[0]]).values()]]

@pytest.mark.parametrize('i,b,words', bad_idx)
def test_bad_idx(folder, i, b, words):
    (folder/NAMES[i]).write_bytes(b)
    with pytest.raises(DataError) as e: load_mnist(folder)
    for w in (NAMES[i], 'expected', *words): assert w in str(e.value), str(e.value)

@pytest.mark.parametrize('name', NAMES)
def test_missing_idx(folder, name):
    (folder/name).unlink()
    fails(folder, f'no {name}')

@pytest.mark.parametrize('kw,words', [
    (dict(x_train=XT[:,:5]), ['x_train', '(30, 5, 28)']),
    (dict(x_train=XT[0,0,0]), ['x_train']),
    (dict(y_test=YV[:-1]), ['y_test', '11 labels']),
    (dict(y_test=YV.astype(float)), ['y_test', 'float64']),
    (dict(y_test=YV[:,None]), ['y_test', '(12, 1)']),
    (dict(y_test=-YV.astype(int)-1), ['y_test', 'labels -']),
    (dict(x_test=XV.astype(np.float32)), ['x_test', '[0,1]']),
    (dict(x_test=XV.astype(np.float32)*np.nan), ['x_test', 'nan']),
    (dict(x_test=XV.astype(np.int32)), ['x_test', 'int32']),
    (dict(x_test=XV.astype('U3')), ['x_test', '<U']),
    (dict(y_train=YT.astype(object)), ['y_train', 'object'])])
def test_bad_npz(tmp_path, kw, words):
    save_npz(tmp_path/'mnist.npz', **kw)
    fails(tmp_path/'mnist.npz', *words)

def test_broken_npz(tmp_path):
    p = tmp_path/'mnist.npz'
    np.savez(p, x_train=XT)
    fails(p, 'y_train')
    save_npz(p)
    b = p.read_bytes()
    for broken in b[:-30], b[:500], b'PK', b[:5000]+bytes(50)+b[5050:]:
        p.write_bytes(broken)
        fails(p)
    with zipfile.ZipFile(p, 'w') as z:
        for k in ('x_train','y_train','x_test','y_test'): z.writestr(f'{k}.npy', b'not an array')
    fails(p)

def test_foreign(tmp_path):
    p = tmp_path/'what'
    fails(p, 'No such file')
    for b in b'', b'x', b'\x89PNG\r\n', b'\x1f\x8b', gzip.compress(b'hello'), gzip.compress(IDX[NAMES[0]]), IDX[NAMES[0]], b'(', b'\x80':
        p.write_bytes(b)
        fails(p)
    with pytest.raises(DataError, match='no train-images'): load_mnist(tmp_path)

@pytest.mark.parametrize('o', [
    1, 'x'*1000, [], {}, ((),()), ((1,2),(3,4)), {'a':1,'b':2}, lesson()[:1], (*lesson()[:1], 3), [[lesson()[0][0]]*2]*2,
    ((XT.astype('i8').reshape(-1, 784),YT.astype('i8')),)*2, ((XT/99,YT),)*2, ((XT,YT.astype(object)),)*2,
    ((XT.astype([('r','u1')]),YT),)*2, ((XT,YT.astype('S1')),)*2, ((XT,YT[:3]),)*2])
def test_bad_pickle(tmp_path, o): fails(save_pickle(tmp_path/'mnist.pkl.gz', o))

def test_cut_pickle(tmp_path):
    b = pickle.dumps(lesson(), 2)
    for cut in 1, 3, 50, 400, len(b)-9: fails(save_pickle(tmp_path/'mnist.pkl.gz', b[:cut]))
    p = tmp_path/'mnist.pkl.gz'
    p.write_bytes(gzip.compress(b)[:-100])
    fails(p)

# Hostile pickles

class Call:
    "Pickles as a call of `f` with `args`"
    def __init__(self, f, *args, state=None): self.res = (f,args) if state is None else (f,args,state)
    def __reduce__(self): return self.res

def named(module, name, *args):
    "Pickle that calls `module.name` with the strings `args`"
    return b'\x80\x02c'+f'{module}\n{name}\n('.encode() + b''.join(b'X'+struct.pack('<I', len(a))+a.encode() for a in args) + b'tR.'

def gadgets(t):
    t = str(t)
    py = f"open({t!r},'w').close()"
    true_array = pickle.loads(pickle.dumps(XT[0]))
    yield 'system', pickle.dumps(Call(os.system, f'touch {t}'))
    yield 'popen', pickle.dumps(Call(subprocess.Popen, ['touch',t]))
    for p in range(6): yield f'eval{p}', pickle.dumps(Call(eval, py), p)
    yield 'exec', pickle.dumps((lesson()[0], lesson()[1], Call(exec, py)))
    yield 'open', pickle.dumps(Call(open, t, 'w'))
    yield 'getattr', pickle.dumps(Call(getattr, Call(__import__, 'os'), 'system'))
    yield 'build', pickle.dumps(Call(io.StringIO, state=Call(eval, py)))
    yield 'inst', b'(X'+struct.pack('<I', len(py))+py.encode()+b'i__builtin__\neval\n.'
    yield 'dotted', b'\x80\x04\x8c\x05numpy\x8c\x10ndarray.__init__\x93.'
    yield 'ext', b'\x80\x02\x82\x01.'
    yield 'persistent', b'\x80\x02X\x01\0\0\0aQ.'
    # numpy's own ways to run code, to write and to read files
    yield 'runstring', named('numpy.testing._private.utils', 'runstring', py, '')
    yield 'np.load', named('numpy', 'load', t)
    yield 'memmap', pickle.dumps(Call(np.memmap, t, 'u1', 'w+', 0, (3,)))
    yield 'savetxt', pickle.dumps(Call(np.savetxt, t, true_array))
    yield 'tofile', pickle.dumps(Call(np.ndarray.tofile, true_array, t))
    yield 'scalar', named('numpy.core.multiarray', 'scalar', 'O', 'x')
    yield 'other module', named('evil_core.multiarray', '_reconstruct', 'x')
    # the admitted names, misused
    yield 'codec', named('_codecs', 'encode', py, 'rot13')
    yield 'ndarray', pickle.dumps(Call(np.ndarray, (1000,), 'O'))
    ptr = b'\x41'*8 # taken for a pointer, if the flags of the object dtype could be set to 0
    dt = Call(np.dtype, 'O', False, True, state=(3,'|',None,None,None,-1,-1,0))
    yield 'dtype flags', pickle.dumps(Call(np.array(0).__reduce__()[0], np.ndarray, (0,), b'b', state=(1,(1,),dt,False,ptr)))
    # state given to an admitted class or function itself
    for m,n in ('numpy','ndarray'),('numpy','dtype'),('_codecs','encode'),('numpy.core.multiarray','_reconstruct'):
        yield f'state of {n}', b'\x80\x02c'+f'{m}\n{n}\n'.encode()+b'N}X\x08\0\0\0__init__K\x01s\x86b.'

@pytest.mark.parametrize('name', [n for n,_ in gadgets('x')])
def test_hostile_pickle(tmp_path, name):
    target = tmp_path/'was_here'
    fails(save_pickle(tmp_path/'evil.pkl.gz', dict(gadgets(target))[name]), *["array of dtype 'O'"]*(name=='dtype flags'))
    assert not target.exists()
    check(load_mnist(save_pickle(tmp_path/'good.pkl.gz', lesson()))) # nothing was changed for the next file

def test_gadgets_work(tmp_path):
    "These would do harm with the plain unpickler, or the test above proved nothing"
    for name in ('system','eval2','exec','open','inst','memmap','savetxt','tofile'):
        target = tmp_path/name
        o = pickle.loads(dict(gadgets(target))[name])
        if name=='open': o.close()
        del o
        assert target.exists(), name

# Files that want to hurt

@pytest.fixture(scope='module')
def hostile():
    spec = importlib.util.spec_from_file_location('fuzz_files', Path(__file__).parent.parent/'scripts'/'fuzz_files.py')
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module

@pytest.mark.slow
@pytest.mark.skipif(sys.platform!='linux', reason='memory is read from /proc')
def test_hostile_files(hostile, tmp_path):
    "Little memory, little time, one line; and all of MNIST, which is as large as anything may be, is read."
    n = dict(x_train=60_000, x_test=10_000)
    arrays = {k:np.zeros((v,784), np.float32) for k,v in n.items()} | {k.replace('x', 'y'):np.zeros(v, int) for k,v in n.items()}
    np.savez(tmp_path/'all.npz', **arrays)
    parts = tuple((arrays[f'x_{k}'],arrays[f'y_{k}']) for k in ('train','test'))
    for p in 2,5: (tmp_path/f'all{p}.pkl').write_bytes(pickle.dumps(parts, p))
    del arrays, parts
    worker,bad,seen = hostile.Worker(),[],0
    def read(kind, path, good=False):
        nonlocal seen
        res,seen = worker.read(kind, path),seen+1
        wrong = kind in ('data','image','net') and good!=(res['what']=='read')
        if (what := hostile.harm(res, path)) or wrong: bad.append((kind,path.name,what,res))
    try:
        for p in 'all.npz','all2.pkl','all5.pkl': read('data', tmp_path/p, True); (tmp_path/p).unlink()
        (tmp_path/'special').mkdir()
        for kind,path in hostile.special(tmp_path/'special'): read(kind, path)
        for kind,name,contents in hostile.crafted(big=False):
            if kind=='checkpoint': continue
            path = hostile.write(tmp_path/kind/name, contents)
            read(kind, path.parent if path.name.startswith('train-') else path)
            path.unlink()
    finally: worker.close()
    assert not bad and seen>150, '\n'.join(map(str, bad))

def test_worker_sees_harm(hostile, tmp_path):
    "A reader that takes memory or time, speaks in two lines or raises something else would be found."
    good = dict(what='refused', said='a.pkl: 1 byte; expected 2', mb=3, s=.1)
    assert not hostile.harm(good, 'x/a.pkl')
    for k,v in dict(what='raised', said='a.pkl: two\nlines', mb=501, s=11).items(): assert hostile.harm({**good, k:v}, 'x/a.pkl'), k
    for v in 'another name', 'a.pkl: \x1b[31m', 'a.pkl: MemoryError', 'a.pkl'*500: assert hostile.harm({**good, 'said':v}, 'x/a.pkl'), v

@pytest.mark.parametrize('text', ['plain', 'é ü 数', '', 'a\nb',
    '\x1b[31mred\x1b[0m', '\u202egpj.exe', 'a\0b', '\ud800', 'x'*10**6, '\n'*10**6, '\u2028'*700, '\r\t\x85'])
def test_one_line(text):
    line = one_line(text)
    assert line.isprintable() and len(line)<=600 and len(line.splitlines())<=1
    assert line==text or not text.isprintable() or len(text)>600
    if len(text)<50: assert line.encode('utf-8').decode('unicode_escape')==text or text.isprintable()
    assert str(FileError(text))==line

def test_long_names(tmp_path):
    "The start and the end of a long name are there, and what was expected."
    d = tmp_path/('d'*200)/('e'*200)
    d.mkdir(parents=True)
    (d/'what\n').write_bytes(b'nothing')
    with pytest.raises(DataError) as e: load_mnist(d/'what\n')
    said = str(e.value)
    assert said.startswith(str(tmp_path)[:30]) and '...' in said and '/what\\n: contents' in said and said.endswith('npz or a pickle') and len(said)<=600

def test_more_than_mnist(tmp_path):
    x,y = np.zeros((70_001,784), np.uint8),np.zeros(70_001, np.uint8)
    save_npz(tmp_path/'a.npz', x_train=x, y_train=y)
    fails(tmp_path/'a.npz', '70,013 images', 'at most 70,000')
    save_npz(tmp_path/'a.npz', x_train=x[:69_988], y_train=y[:69_988])
    assert len(load_mnist(tmp_path/'a.npz').x_train)==69_988

def test_gzip_is_one_member(tmp_path):
    b = pickle.dumps(lesson())
    p = tmp_path/'mnist.pkl.gz'
    p.write_bytes(gzip.compress(b)+gzip.compress(b''))
    fails(p, 'more after the end')

def test_npz_of_other_compressions(tmp_path):
    for method in zipfile.ZIP_BZIP2,zipfile.ZIP_LZMA:
        with zipfile.ZipFile(p := tmp_path/'mnist.npz', 'w', method) as z:
            for k,a in dict(x_train=XT, y_train=YT, x_test=XV, y_test=YV).items():
                np.save(b := io.BytesIO(), a)
                z.writestr(f'{k}.npy', b.getvalue())
        fails(p, 'compressed')

def test_fortran_npz(tmp_path):
    save_npz(tmp_path/'mnist.npz', x_train=np.asfortranarray(XT), x_test=XV.reshape(-1, 784).astype('>f8')/255)
    m = load_mnist(tmp_path/'mnist.npz')
    assert torch.equal(m.x_train, torch.tensor(XT.reshape(-1, 784))/255)
    torch.testing.assert_close(m.x_valid, torch.tensor(XV.reshape(-1, 784))/255)

# Downloads

class Server(ThreadingHTTPServer):
    "Answers /MODE/name.gz in the way of MODE"
    daemon_threads = True
    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.asked,self.gate = [],threading.Event()
    def handle_error(self, *args): pass
    def url(self, mode): return f'http://127.0.0.1:{self.server_port}/{mode}/'

class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args): pass
    def do_GET(self):
        _,mode,name = self.path.split('/')
        self.server.asked.append((mode,name))
        if mode.isdigit(): return self.send_error(int(mode))
        b = gzip.compress(IDX[name.removesuffix('.gz')])
        if mode=='wrong': b = gzip.compress(b'other bytes')
        if mode=='nogzip': b = b'<html>please log in</html>'
        if mode=='flipped': b = b[:200]+bytes([b[200]^255])+b[201:]
        if mode=='head': # never ends
            self.wfile.write(b'HTTP/1.0 200 OK\r\nX-Slow: ')
            while not self.server.gate.wait(.05): self.wfile.write(b'a')
            return
        to = dict(redirect=f'/good/{name}', ftp=f'ftp://127.0.0.1:{self.server.server_port}/{name}', file=f'file:///{name}', loop=self.path).get(mode)
        self.send_response(302 if to else 200)
        if to: self.send_header('Location', to)
        if mode=='badlength': self.send_header('Content-Length', 'many')
        elif mode!='nolength': self.send_header('Content-Length', 0 if to else len(b)+1000*(mode=='short'))
        self.end_headers()
        if to: return
        if mode=='drip':
            for i in range(len(b)):
                self.wfile.write(b[i:i+1])
                if self.server.gate.wait(.05): return
        if mode=='hangup' or mode=='stall': b = b[:len(b)//2]
        self.wfile.write(b)
        if mode=='stall': self.wfile.flush(); self.server.gate.wait(20)

@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setattr(data, 'MNIST_FILES', {k: hashlib.sha256(v).hexdigest() for k,v in IDX.items()})
    s = Server()
    t = threading.Thread(target=s.serve_forever, kwargs=dict(poll_interval=.01))
    t.start()
    yield s
    s.gate.set(); s.shutdown(); s.server_close(); t.join()

def mirrors(server, *modes): data.MIRRORS[:] = map(server.url, modes)

@pytest.fixture
def cache(tmp_path): return tmp_path/'cache'/'fnnlite'

def in_cache(cache): return sorted(o.name for o in cache.iterdir()) if cache.exists() else []

@pytest.mark.parametrize('mode', ['good','redirect','nolength'])
def test_download(server, cache, mode):
    mirrors(server, mode)
    check(load_mnist('full'))
    assert in_cache(cache)==sorted(NAMES)

broken = {'404':'404', '500':'500', 'short':'', 'wrong':'sha256',
          'nogzip':'not a gzipped file', 'flipped':'', 'hangup':'', 'badlength':'many'}

@pytest.mark.parametrize('mode', broken)
def test_second_mirror(server, cache, mode):
    if mode=='short': # all the bytes came: the missing 1000 were never part of the file
        mirrors(server, mode)
        return check(load_mnist('full'))
    mirrors(server, mode, 'good')
    check(load_mnist('full'))
    assert in_cache(cache)==sorted(NAMES) and len(server.asked)==8

@pytest.mark.parametrize('mode', [o for o in broken if o!='short'])
def test_no_mirror(server, cache, mode):
    mirrors(server, mode, '503')
    with pytest.raises(DataError) as e: load_mnist('full')
    for w in (server.url(mode), broken[mode], server.url('503'), 'HTTP Error 503', NAMES[0]): assert w in str(e.value), str(e.value)
    assert not in_cache(cache)

def test_nobody_listens(server, cache):
    mirrors(server, 'good')
    server.shutdown(); server.server_close()
    with pytest.raises(DataError, match='refused'): load_mnist('full')
    assert not in_cache(cache)

def test_timeout(server):
    mirrors(server, 'stall')
    with pytest.raises(DataError, match='[Tt]ime'): data._fetch(NAMES[0], timeout=.2)

@pytest.mark.parametrize('mode', ['drip','head'])
def test_whole_time_is_limited(server, mode, capsys):
    "A sign of life every 50 ms isn't enough; what has come is shown meanwhile."
    mirrors(server, mode)
    start = time.monotonic()
    with pytest.raises(DataError, match='not done after .5 seconds'.replace('.5', '1')): data._fetch(NAMES[0], timeout=20, most=1)
    assert time.monotonic()-start<15
    if mode=='drip':
        shown = [float(o.split('/')[0].split()[-1].rstrip('k')) for o in capsys.readouterr().err.split('\r') if '/' in o]
        assert len(shown)>3 and shown[-1]>shown[1], shown

def test_slow_mirror_is_left(server, cache, monkeypatch):
    mirrors(server, 'head', 'good')
    fetch = data._fetch
    monkeypatch.setattr(data, '_fetch', lambda name: fetch(name, most=.2))
    check(load_mnist('full'))

@pytest.mark.parametrize('mode,said', [('ftp','ftp'),('file','file'),('loop','infinite loop')])
def test_redirects_that_are_not_followed(server, mode, said, cache):
    mirrors(server, mode)
    with pytest.raises(DataError, match=said) as e: load_mnist('full')
    assert {m for m,_ in server.asked}=={mode} and not in_cache(cache) and str(e.value).isprintable()

def test_mirrors_are_http(server, folder, cache):
    for o in NAMES: (folder/f'{o}.gz').write_bytes(gzip.compress(IDX[o]))
    data.MIRRORS[:] = [f'{folder.as_uri()}/', 'data:,', f'ftp://127.0.0.1:{server.server_port}/']
    with pytest.raises(DataError, match='unknown url type: file.*data.*ftp'): load_mnist('full')
    assert not in_cache(cache)

def test_large_file_in_the_cache_is_not_read(server, cache, monkeypatch):
    mirrors(server, 'good')
    load_mnist('full')
    os.truncate(cache/NAMES[0], 2**40)
    check(load_mnist('full'))
    assert (cache/NAMES[0]).stat().st_size==len(IDX[NAMES[0]])

def test_cache_needs_no_server(server, cache):
    mirrors(server, 'good')
    load_mnist('full')
    data.MIRRORS.clear()
    check(load_mnist('full'))
    assert len(server.asked)==4

@pytest.mark.parametrize('b', [b'', IDX[NAMES[1]][:-1], IDX[NAMES[1]][:-1]+b'\x09'])
def test_corrupt_cache(server, cache, b):
    mirrors(server, 'good')
    load_mnist('full')
    assert b!=IDX[NAMES[1]]
    (cache/NAMES[1]).write_bytes(b)
    check(load_mnist('full'))
    assert len(server.asked)==5 and in_cache(cache)==sorted(NAMES)

def test_interrupted_download(server, cache, monkeypatch):
    from http.client import HTTPResponse
    mirrors(server, 'good', 'good')
    read,n = HTTPResponse.read1,[]
    def stop(self, size=100):
        n.append(size)
        if sum(n)>1000: raise KeyboardInterrupt
        return read(self, min(size, 500))
    monkeypatch.setattr(HTTPResponse, 'read1', stop)
    with pytest.raises(KeyboardInterrupt): load_mnist('full')
    assert not in_cache(cache) and len(server.asked)==1

@pytest.mark.parametrize('where', ['replace','write'])
@pytest.mark.parametrize('err', [KeyboardInterrupt, OSError])
def test_interrupted_write(server, cache, monkeypatch, where, err):
    mirrors(server, 'good')
    def stop(*args): raise err
    class Full(io.FileIO): write = stop
    if where=='replace': monkeypatch.setattr(os, 'replace', stop)
    else: monkeypatch.setattr(data, 'open', lambda f,mode: Full(f, mode), raising=False)
    with pytest.raises(err): data._download()
    assert cache.exists() and not in_cache(cache)
    monkeypatch.undo()

def test_env(folder, monkeypatch, cache):
    monkeypatch.setenv('FNNLITE_DATA', str(folder))
    check(load_mnist('full'))
    assert not in_cache(cache)
    monkeypatch.setenv('FNNLITE_DATA', str(folder/'nowhere'))
    with pytest.raises(DataError, match='nowhere'): load_mnist('full')
    monkeypatch.setenv('FNNLITE_DATA', '')
    with pytest.raises(DataError, match='no mirror'): load_mnist('full')

def test_local(server, folder, monkeypatch, cache):
    "All of it where it is, and no download where it isn't."
    mirrors(server, 'good')
    assert len(load_mnist('local').x_train)==10_000 and not server.asked
    load_mnist('full')
    check(load_mnist('local'))
    (cache/NAMES[1]).unlink()
    assert len(load_mnist('local').x_train)==10_000 and len(server.asked)==4
    monkeypatch.setenv('FNNLITE_DATA', str(folder))
    check(load_mnist('local'))

# Batches

def arrays(n=103): return torch.arange(n*3.).view(n, 3), torch.arange(n)

@pytest.mark.parametrize('shuffle', [False,True])
@pytest.mark.parametrize('drop_last', [False,True])
@pytest.mark.parametrize('n,bs', [(103,10),(100,10),(5,10),(10,10),(11,10),(7,1)])
def test_batches(n, bs, shuffle, drop_last):
    x,y = arrays(n)
    if drop_last and n<bs: return
    dl = ArrayDL(x, y, bs=bs, shuffle=shuffle, drop_last=drop_last)
    bat = list(dl)
    assert len(bat)==len(dl)==(n//bs if drop_last else -(-n//bs))
    assert all(len(xb)==len(yb)==bs for xb,yb in bat[:-1])
    ys = torch.cat([yb for _,yb in bat])
    assert len(ys)==(n//bs*bs if drop_last else n) and len(ys.unique())==len(ys)
    for xb,yb in bat: assert torch.equal(xb, x[yb])
    if not shuffle: assert torch.equal(ys, y[:len(ys)])
    elif n>10: assert not torch.equal(ys, y[:len(ys)])

def test_views_and_copies():
    x,y = arrays()
    for xb,yb in ArrayDL(x, y, bs=10): assert xb.untyped_storage().data_ptr()==x.untyped_storage().data_ptr()
    for xb,yb in ArrayDL(x, y, bs=10, shuffle=True): xb.zero_()
    assert torch.equal(x, arrays()[0])

def order(dl): return torch.cat([yb for _,yb in dl]).tolist()

def test_seed_and_epoch():
    mk = lambda seed=0,bs=10: ArrayDL(*arrays(), bs=bs, shuffle=True, seed=seed)
    dl = mk()
    es = [order(dl) for _ in range(4)]
    assert dl.epoch==4 and len({tuple(o) for o in es})==4
    torch.manual_seed(99); torch.rand(7) # the global generator has no part in it
    other = mk(bs=7)
    other.epoch = 2
    assert order(other)==es[2] and order(other)==es[3]
    assert order(mk(1)) not in es

def test_global_generator_untouched():
    torch.manual_seed(1); a = torch.rand(3)
    torch.manual_seed(1); order(ArrayDL(*arrays(), shuffle=True))
    assert torch.equal(torch.rand(3), a)

def test_order_is_fixed(): # of one torch; a change here means that resumed runs see other batches
    assert sorted(order(ArrayDL(*arrays(10), shuffle=True, seed=5)))==list(range(10))
    seed = int(np.random.SeedSequence((5,3)).generate_state(1)[0])
    dl = ArrayDL(*arrays(10), shuffle=True, seed=5)
    dl.epoch = 3
    assert order(dl)==torch.randperm(10, generator=torch.Generator().manual_seed(seed)).tolist()

def test_an_epoch_counts_when_it_begins():
    "One that is broken off isn't repeated; a look at its first batch begins nothing."
    dl = ArrayDL(*arrays(), bs=10, shuffle=True)
    a = dl.one_batch()
    assert dl.epoch==0
    for b in dl: break
    assert dl.epoch==1 and torch.equal(a[1], b[1]) and not torch.equal(a[1], dl.one_batch()[1])

def test_device():
    x,y = arrays()
    assert ArrayDL(x, y).x.device==torch.get_default_device()
    with torch.device('meta'):
        dl = ArrayDL(x, y, bs=10, shuffle=True)
        assert dl.x.device.type==dl.y.device.type==dl.perm().device.type=='meta'
        assert [tuple(xb.shape) for xb,_ in dl][-1]==(3,3) and dl.one_batch()[0].device.type=='meta'
        cpu = ArrayDL(x, y, bs=103, shuffle=True, device='cpu')
        assert order(cpu)==order(ArrayDL(x, y, shuffle=True, device='cpu'))
    dls = DataLoaders.from_arrays(x, y, x, y, device='meta')
    assert dls.train.x.device.type==dls.valid.y.device.type=='meta'

def test_numpy_arrays():
    xb,yb = ArrayDL(np.ones((5,2), np.float32), np.arange(5), bs=2).one_batch()
    assert xb.dtype==torch.float32 and yb.tolist()==[0,1]

@pytest.mark.parametrize('kw,words', [
    (dict(x=torch.ones(0,2), y=torch.ones(0)), 'x has no rows'), (dict(y=torch.ones(4)), 'y has 4 rows; expected 5'),
    (dict(bs=0), 'bs is 0'), (dict(bs=-1), 'bs is -1'), (dict(bs=2.), 'bs is 2.0'), (dict(bs=6, drop_last=True), 'bs is 6'),
    (dict(seed=-1), 'seed is -1')])
def test_bad_batches(kw, words):
    with pytest.raises(ValueError, match=words): ArrayDL(**(dict(x=torch.ones(5,2), y=torch.ones(5))|kw))

def test_dataloaders():
    x,y = arrays()
    dls = DataLoaders.from_arrays(x, y, x[:50], y[:50], bs=8, seed=3)
    assert dls.train.shuffle and not dls.valid.shuffle and dls.train.bs==8 and dls.valid.bs==16
    assert torch.equal(dls.one_batch()[1], ArrayDL(x, y, 8, True, seed=3).one_batch()[1])
    assert order(dls.valid)==list(range(50)) and len(order(dls.train))==103
    dls = DataLoaders.from_arrays(x, y, x, y, bs=10, valid_bs=3, shuffle=False, drop_last=True)
    assert dls.valid.bs==3 and len(dls.train)==10 and len(dls.valid)==35 and not dls.train.shuffle
    dls = DataLoaders(dls.valid, dls.train)
    assert dls.train.bs==3

# Images

def pil(x): return Image.fromarray((x.view(28,28)*255).round().byte().numpy())

def near(a, b, tol): assert a.shape==(784,) and a.dtype==torch.float32 and (a-b).abs().mean()<tol, (a-b).abs().mean()

@pytest.fixture
def save(tmp_path):
    def _f(im, name='digit.png', **kw):
        im.save(tmp_path/name, **kw)
        return tmp_path/name
    return _f

@pytest.mark.parametrize('i', range(12))
def test_image(mnist, save, i):
    x = mnist.x_valid[i]
    im = pil(x)
    inv = im.point(lambda o: 255-o)
    big = inv.resize((280,280), Image.Resampling.NEAREST)
    assert torch.equal(read_image(save(im)), x)
    near(read_image(save(inv)), x, .002)
    near(read_image(save(big)), x, .005)
    near(read_image(save(big.point(lambda o: 255-o))), x, .005)
    near(read_image(save(inv.resize((333,333), Image.Resampling.BICUBIC))), x, .08)
    near(read_image(save(big, 'digit.jpg')), x, .03)
    sheet = Image.new('L', (500,400), 230) # faint, on grey paper, in a corner
    sheet.paste(big.point(lambda o: 130+o*100//255), (200,20))
    near(read_image(save(sheet)), x, .005)

def test_alpha(mnist, save):
    x = mnist.x_valid[0]
    big = pil(x).resize((280,280), Image.Resampling.NEAREST)
    for ink in 'black','navy':
        im = Image.new('RGBA', big.size, ink)
        im.putalpha(big) # black ink, transparent where there's none
        near(read_image(save(im)), x, .005)
    la = Image.merge('LA', (Image.new('L', big.size, 0), big))
    near(read_image(save(la)), x, .005)
    small = Image.merge('LA', (Image.new('L', (28,28), 0), pil(x))) # 28×28, black on transparent: isn't taken as is
    near(read_image(save(small)), x, .005)

@pytest.mark.parametrize('mode,ext', [
    ('1','png'),('P','png'),('P','gif'),('RGB','bmp'),('RGBA','webp'),('CMYK','tiff'),('I;16','png'),('F','tiff')])
def test_modes(mnist, save, mode, ext):
    x = mnist.x_valid[1]
    big = pil(x).resize((140,140), Image.Resampling.NEAREST)
    if mode=='I;16': im = Image.fromarray(np.asarray(big).astype(np.uint16)*257)
    else: im = big.convert(mode)
    near(read_image(save(im, f'd.{ext}')), x, .06 if mode=='1' else .01)

def test_exif_rotation(mnist, save):
    x = mnist.x_valid[0]
    big = pil(x).resize((280,280), Image.Resampling.NEAREST)
    exif = Image.Exif()
    exif[0x112] = 6 # the camera was held sideways: turn right by 90° to see it
    near(read_image(save(big.transpose(Image.Transpose.ROTATE_90), 'd.jpg', exif=exif)), x, .02)

def test_prepared_like_mnist(save):
    im = Image.new('L', (300,200), 255)
    im.paste(0, (10,10,14,190)) # a bar: 20 high when scaled, and not 0 wide
    g = read_image(save(im)).view(28,28)
    rows,cols = g.any(1).nonzero(), g.any(0).nonzero()
    assert rows.min()==4 and rows.max()==23 and cols.tolist()==[[14]]
    im = Image.new('L', (90,90), 255)
    im.paste(0, (30,30,70,40)); im.paste(0, (30,30,40,70)) # an L turned over: its mass lies up and left of its box
    g = read_image(save(im)).view(28,28)
    at = torch.arange(28.)
    for d in 0,1: assert abs((g.sum(1-d)*at).sum()/g.sum()-14)<=.5
    assert len(g.any(1).nonzero())==len(g.any(0).nonzero())==20
    im = Image.new('L', (60,60), 0) # the mass far in one corner: the box still stays inside
    im.paste(255, (0,0,12,12)); im.paste(40, (0,0,50,1)); im.paste(40, (0,0,1,50))
    assert read_image(save(im)).max()==1

@pytest.mark.parametrize('im', [Image.new('L', (28,28)), Image.new('L', (99,50), 255), Image.new('RGBA', (40,40)), Image.new('L', (1,1)),
    Image.fromarray(np.full((30,30), np.nan, np.float32)), Image.fromarray(np.where(np.eye(30)==1, np.float32("inf"), np.float32(0)))])
def test_blank(save, im):
    p = save(im, 'blank.tiff')
    with pytest.raises(DataError, match='blank.tiff.*background'): read_image(p)

def test_bad_image(tmp_path, mnist, monkeypatch):
    p = tmp_path/'bad.png'
    def fails():
        with pytest.raises(DataError, match='bad.png.*expected an image'): read_image(p)
    fails()
    b = io.BytesIO()
    pil(mnist.x_valid[0]).resize((200,200)).save(b, 'PNG')
    b = b.getvalue()
    for o in b'', b'hello', b[:20], b[:50], b[:len(b)//2], b[:60]+bytes(20)+b[80:]: p.write_bytes(o); fails()
    p.write_bytes(b)
    read_image(p)
    for limit in 30_000, 10_000: monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', limit); fails() # Pillow warns, then raises
    with pytest.raises(DataError, match='Is a directory|Permission'): read_image(tmp_path)

def test_photograph(mnist, save):
    "50 million pixels, as of a telephone; the digit is small in it, and lies on its side."
    im = Image.new('L', (8160,6144), 230)
    x = mnist.x_valid[0]
    im.paste(pil(x).resize((560,560), Image.Resampling.NEAREST).point(lambda o: 230-o*200//255), (5000,700))
    near(read_image(save(im.convert('RGB'), 'p.jpg')), x, .03)
    exif = Image.Exif()
    exif[0x112] = 6
    near(read_image(save(im.transpose(Image.Transpose.ROTATE_90), 'p.png', exif=exif, compress_level=1)), x, .03)
    p = save(im.resize((8160,6500)), 'q.png', compress_level=1)
    with pytest.raises(DataError, match='8160×6500 pixels; expected at most 52 million'): read_image(p)

@pytest.mark.parametrize('mode,name,kw', [('RGB','a.tiff',dict(compression='tiff_lzw')), ('RGB','a.tiff',dict(compression='jpeg')),
    ('L','a.ppm',{}), ('RGB','a.eps',{}), ('L','a.pcx',{}), ('RGB','a.ico',{})])
def test_rare_formats(mnist, save, mode, name, kw, capfd):
    "Refused in our words, and nothing speaks for itself."
    p = save(pil(mnist.x_valid[0]).resize((140,140)).convert(mode), name, **kw)
    with pytest.raises(DataError, match='rare compression' if 'tiff' in name else 'no image') as e: read_image(p)
    assert 'PNG' in str(e.value) and 'Pillow' not in str(e.value) and capfd.readouterr()==('','')

def test_slow_decoder(save):
    "Pillow reads a run-length BMP in Python, a pixel in a microsecond."
    b = save(Image.new('P', (9,9)), 'a.bmp').read_bytes()
    at = struct.unpack('<I', b[10:14])[0]
    p = save(Image.new('P', (9,9)), 'a.bmp')
    p.write_bytes(b[:30]+struct.pack('<I', 1)+b[34:at]+b'\x04\x00\x05\x09\x00\x00'*9+b'\0\1')
    with Image.open(p) as im: assert np.asarray(im).shape==(9,9) # it's a good one
    with pytest.raises(DataError, match='rare compression'): read_image(p)

def test_words_are_ours(tmp_path, mnist, save, capfd):
    "No name of a foreign class, no address in memory, however an image is damaged; no warning (they are errors here) and no line of a C library."
    for name,kw in ('a.png',{}),('a.jpg',{}),('a.gif',{}),('a.bmp',{}),('a.webp',{}),('a.tiff',{}):
        p = save(pil(mnist.x_valid[0]).resize((90,90)), name, **kw)
        b = p.read_bytes()
        for cut in 0,1,5,20,60,len(b)//2:
            p.write_bytes(b[:cut])
            with pytest.raises(DataError, match='no image, or a damaged one; expected an image of a digit|background'): read_image(p)
    assert capfd.readouterr()==('','')
