"""Files that want to hurt: crafted ones, and good ones with a few bytes changed, cut or doubled, of every format that fnnlite reads.

    python scripts/fuzz_files.py [--tries 5000] [--seconds 300] [--seed 0] [--keep harmful]

Each file is read by a worker process, which may take 500 MB on top of what it has after `import fnnlite`, and 10 seconds of CPU. It must
read, or be a `DataError` or a `CheckpointError` of one short printable line that names the file. Prints how many of each kind were
tried and what came of them; the exit status is 1 if one did harm, and that file is kept in the folder `--keep`. Takes `--seconds`, and about a minute for
the crafted ones. Linux only: the memory is read from /proc.
"""
import argparse, collections, gzip, io, json, os, pickle, random, select, shutil, struct, subprocess, sys, tempfile, time, zipfile, zlib
from pathlib import Path

MB,SECONDS = 500,10 # a file may take
WIDTHS = [8]

# The worker

def _memory(key): return next(int(l.split()[1])/1000 for l in Path('/proc/self/status').read_text().splitlines() if l.startswith(key))

def worker():
    "Reads the files that its stdin names, a line each, kind and path; answers with a line of JSON"
    import resource, warnings
    import torch
    from fnnlite.train.checkpoints import CheckpointError, load_tensors, load_weights
    from fnnlite.commands import _saved_net
    from fnnlite.data.digits import DataError, load_mnist
    from fnnlite.data.images import read_image
    from PIL import Image
    Image.init()
    net = torch.nn.Linear(3, 2)
    warnings.simplefilter('error') # a warning is a line too many
    readers = {'data':load_mnist, 'image':read_image, 'net':_saved_net, 'tensors':load_tensors, 'weights':lambda p: load_weights(net, p),
               'checkpoint':_resume}
    resource.setrlimit(resource.RLIMIT_DATA, (int(1e6*(_memory('VmData')+2*MB)),)*2) # the machine has others on it
    print('ready', flush=True)
    for line in sys.stdin:
        kind,path = json.loads(line)
        Path('/proc/self/clear_refs').write_text('5')
        was,start = _memory('VmRSS'),time.process_time()
        try:
            readers[kind](path)
            said,what = '','read'
        except (DataError,CheckpointError) as e: said,what = str(e),'refused'
        except BaseException as e: said,what = f'{type(e).__name__}: {e}','raised'
        print(json.dumps(dict(what=what, said=said[:5000], mb=_memory('VmHWM')-was, s=time.process_time()-start)), flush=True)

def _learner(folder, resume):
    import torch
    from functools import partial
    from fnnlite.train.resuming import Checkpoint
    from fnnlite.commands import mlp
    from fnnlite.data.digits import DataLoaders
    from fnnlite.train.learners import Learner
    from fnnlite.ops.losses import CrossEntropy
    from fnnlite.nets.containers import Model
    from fnnlite.train.optimizers import SGD
    torch.manual_seed(0)
    x,y = torch.rand(8, 784),torch.arange(8)
    return Learner(Model(mlp([784,*WIDTHS,10]), CrossEntropy()), DataLoaders.from_arrays(x, y, x, y, bs=4), partial(SGD, lr=.1),
                   cbs=[Checkpoint(folder, resume)])

def _resume(path):
    "Goes on from the checkpoint `path`, for which all its epochs are done"
    learn = _learner(path.removesuffix('/checkpoint.safetensors'), True)
    with open(os.devnull, 'w') as null:
        out,sys.stdout = sys.stdout,null
        try: learn.fit(1)
        finally: sys.stdout = out

class Worker:
    "A worker process, started when it's needed, ended when it takes too long"
    def __init__(self): self.p = None

    def read(self, kind, path):
        "What came of it"
        if self.p is None:
            env = {**os.environ, 'OMP_NUM_THREADS':'1'}
            self.p = subprocess.Popen([sys.executable, __file__, '--worker'], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
            assert self.p.stdout.readline()=='ready\n'
        self.p.stdin.write(json.dumps([kind, str(path)])+'\n')
        self.p.stdin.flush()
        if not select.select([self.p.stdout], [], [], 6*SECONDS)[0]: # the machine may be busy
            self.close()
            return dict(what='hung', said='', mb=0, s=6*SECONDS)
        line = self.p.stdout.readline()
        if line: return json.loads(line)
        code = self.p.wait()
        self.close()
        return dict(what=f'died with status {code}', said='', mb=0, s=0)

    def close(self):
        if self.p is None: return
        self.p.kill()
        self.p.communicate()
        self.p = None

def harm(res, path, seconds=SECONDS):
    "What's wrong with a worker's answer, if anything"
    if res['what'] not in ('read','refused'): return f"{res['what']} {res['said'][:300]}"
    if res['mb']>MB: return f"took {res['mb']:.0f} MB"
    if res['s']>seconds: return f"took {res['s']:.1f} s"
    said = res['said']
    if said and not (said.isprintable() and len(said)<=600 and Path(path).name.encode('unicode_escape').decode()[:20] in said): return f"said {said!r}"
    if 'MemoryError' in said: return f"ran against the limit: {said}"

# Crafted files

def zeros(n, before=b'', wbits=31, after=None):
    "`before` and `n` million zeros, deflated a thousandfold without deflating them all; with `after`, the checksum is right"
    z = zlib.compressobj(9, zlib.DEFLATED, wbits)
    res = z.compress(before)+z.flush(zlib.Z_FULL_FLUSH)
    block = z.compress(bytes(10**6))+z.flush(zlib.Z_FULL_FLUSH)
    if after is None: return res+block+block*(n-1)+z.flush()
    for _ in range(n-1): block += z.compress(bytes(10**6))
    return res+block+z.compress(after)+z.flush()

def idx(*shape): return bytes([0,0,8,len(shape)]) + struct.pack(f'>{len(shape)}I', *shape)

def npy(shape, descr='|u1', version=1, n=None):
    head = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b'\x93NUMPY'+bytes([version,0])+struct.pack('<H' if version==1 else '<I', len(head) if n is None else n)+head

def npz(members, method=zipfile.ZIP_STORED):
    f = io.BytesIO()
    with zipfile.ZipFile(f, 'w', method) as z:
        for k,b in members.items(): z.writestr(f'{k}.npy', b)
    return f.getvalue()

def zip_bomb(name, n, before):
    "A zip with a member of `n` million zeros after `before`"
    raw = zeros(n, before, -15)
    name,size = name.encode(),len(before)+n*10**6
    rest = struct.pack('<HHHHHIIIHH', 20, 0, 8, 0, 33, 0, len(raw), size, len(name), 0)
    local = b'PK\3\4'+rest+name+raw
    central = b'PK\1\2'+struct.pack('<H', 20)+rest+struct.pack('<HHHII', 0, 0, 0, 0, 0)+name
    return local+central+b'PK\5\6'+struct.pack('<HHHHIIH', 0, 0, 1, 1, len(central), len(local), 0)

def png(w, h, bits, color, data, chunks=()):
    chunk = lambda k,b: struct.pack('>I', len(b))+k+b+struct.pack('>I', zlib.crc32(k+b))
    head = chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, bits, color, 0, 0, 0))
    return b'\x89PNG\r\n\x1a\n'+head+b''.join(chunk(k, b) for k,b in chunks)+chunk(b'IDAT', data)+chunk(b'IEND', b'')

def saved(fmt, mode, size, **kw):
    from PIL import Image
    f = io.BytesIO()
    Image.new(mode, size, 1).save(f, fmt, **kw)
    return f.getvalue()

def many_scans(n):
    "A progressive JPEG with its last scan `n` times"
    b = saved('JPEG', 'L', (2000,2000), progressive=True)
    i = b.rindex(b'\xff\xda')
    return b[:i]+b[i:-2]*n+b[-2:]

def tiff(*tags):
    "A TIFF that says `tags`, (number, type, count, value) each"
    return b'II*\0\x08\0\0\0'+struct.pack('<H', len(tags))+b''.join(struct.pack('<HHII', *t) for t in sorted(tags))+bytes(4)

def tensors(about=None, tensors=None, **meta):
    "A safetensors file with what `about` says as JSON, or is"
    head,data = {},b''
    if about is not None: meta['fnnlite'] = about if isinstance(about, str) else json.dumps(about)
    if meta: head['__metadata__'] = meta
    for k,t in (tensors or {}).items():
        b = t.tobytes()
        head[k] = dict(dtype='F32', shape=t.shape, data_offsets=[len(data),len(data)+len(b)])
        data += b
    head = json.dumps(head).encode()
    return struct.pack('<Q', len(head))+head+data

def net(**about):
    import numpy as np
    ws = [784,*WIDTHS,10]
    ts = {}
    for i,(ni,nf) in enumerate(zip(ws, ws[1:])): ts |= {f'{2*i}.w':np.ones((ni,nf), 'f4')/99, f'{2*i}.b':np.zeros(nf, 'f4')}
    return dict(layers=WIDTHS, dropout=0., stats=[.1,.3])|about,ts

def fortyfold(step, n=40):
    "A pickle's opcodes for a tuple of two, of two, of two, ... by way of the memo"
    return b')q\0'+b''.join(b'h'+bytes([i])+b'h'+bytes([i])+b'\x86q'+bytes([i+1]) for i in range(n))+step

def crafted(big=True):
    "(kind, name, contents) of files that hurt an unwary reader; without `big`, those that are made quickly"
    import numpy as np
    k = 3000 if big else 1000 # million bytes of zeros
    arr = lambda data,n: (b'cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\x01b\x87R(K\x01(M'+struct.pack('<H', n)+b'M\x10\x03t'
        b'cnumpy\ndtype\nU\x02u1K\0K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb\x89'+data+b'tb')
    # pickles
    yield 'data','memo.pkl',b'\x80\x02]r\xff\xff\xff\x0f.' # nine bytes
    yield 'data','memo text.pkl',b'(lp999999999999999999\n.'
    for name,head in ('dup',b'\x80\x02)'+b'2\x86'*100), ('twice',b'\x80\x02'+fortyfold(b'')):
        yield 'data',f'{name} tuple.pkl',head+b'0)R.'
        yield 'data',f'{name} dtype.pkl',b'\x80\x02cnumpy\ndtype\n'+head[2:]+b'\x85R.'
        yield 'data',f'{name} key.pkl',b'\x80\x02}'+head[2:]+b'Ns.'
        yield 'data',f'{name} set.pkl',b'\x80\x04\x8f('+head[2:]+b'\x90.'
        yield 'data',f'{name} call.pkl',b'\x80\x02'+head[2:]+b')R.'
        yield 'data',f'{name} mnist.pkl',b'\x80\x02('+b'('+head[2:]+b'K\1t'+b'(K\1K\1tt.'
        yield 'data',f'{name} shape.pkl',b'\x80\x02cnumpy.core.multiarray\n_reconstruct\n)R(K\1'+head[2:]+b'cnumpy\ndtype\nU\x02u1\x85R\x89U\1atb.'
    for op,size in ('T','<i'),('B','<I'),('X','<I'),('\x8e','<Q'),('\x8d','<Q'),('\x96','<Q'):
        n = 2**31-1 if size in ('<i','<I') else 2**62
        yield 'data',f'claims {ord(op)}.pkl',b'\x80\x02'+op.encode('latin-1')+struct.pack(size, n)+b'abc'
        if big or op=='B': yield 'data',f'bomb {ord(op)}.pkl.gz',zeros(k, b'\x80\x02'+op.encode('latin-1')+struct.pack(size, min(n, 220_000_000)))
    # a long string where something else belongs
    n = 210 if big else 70
    said = b'\x80\x02B'+struct.pack('<I', n*10**6)
    dt,array_ = b'cnumpy\ndtype\nU\x02u1\x85R',b'cnumpy.core.multiarray\n_reconstruct\n)R'
    for name,before,after in [('mnist',b'',b''), ('part',b'',b'q\0h\0\x86'), ('pixels',b'',b'q\0K\1\x86q\1h\1\x86'), ('arguments',b'cnumpy\ndtype\n',b'R'),
            ('dtype',b'cnumpy\ndtype\n',b'\x85R'), ('function',b'',b')R'), ('module',b'',b'q\0h\0\x93'), ('state',dt,b'b'), ('array state',array_,b'b'),
            ('order',dt+b'K\3',b'\x86b'), ('shape',array_+b'(K\1',b'q\0'+dt+b'\x89h\0tb')]:
        yield 'data',f'string as {name}.pkl.gz',zeros(n, said[:2]+before+said[2:], after=after+b'.')
    for n in 2**31-1,2**62: yield 'data',f'order {n}.pkl',b'\x80\x02'+dt+b'K\3\x8a\x08'+struct.pack('<q', n)+b'\x86b.'
    for n in range(9): yield 'data',f'frame {n}.pkl',b'\x80\x04\x95'+struct.pack('<Q', 2**(7*n))+b'N.'
    for op in b'SVILF': yield 'data',f'bomb {chr(op)}.pkl.gz',zeros(k, b'('+bytes([op]))
    yield 'data','digits.pkl.gz',gzip.compress(b'(I'+b'9'*10**7+b'\n.', 1)
    yield 'data','long.pkl.gz',zeros(k, b'\x80\x02\x8b'+struct.pack('<i', 2**31-1))
    yield 'data','wide text.pkl.gz',gzip.compress(b'(V\\U0001f600'+b'a'*(10**8 if big else 10**7)+b'\n.', 1)
    yield 'data','wide utf8.pkl.gz',zeros(210, b'\x80\x02X'+struct.pack('<I', 210_000_000)+'\U0001f600'.encode())
    yield 'data','marks.pkl.gz',gzip.compress(b'('*10**7, 1)
    yield 'data','nones.pkl.gz',gzip.compress(b'('+b'N'*10**8 if big else b'('+b'N'*10**7, 1)
    lots = zeros(55, b'\x80\x02('+b'('+arr(b'B'+struct.pack('<I', 784*65535), 65535)[:-2]) # cut in the middle of an array
    yield 'data','array.pkl.gz',lots
    data = b'B'+struct.pack('<I', 784*60000)+bytes(784*60000)
    labels = arr(b'B'+struct.pack('<I', 784*60000)+bytes(9), 60000)
    both = b'\x80\x02(('+arr(data+b'q\1', 60000)+labels+b't('+arr(b'h\1', 60000)+labels+b'tt.'
    yield 'data','one array twice.pkl.gz',gzip.compress(both, 1)
    images = arr(data+b'q\1', 60000)
    label = arr(b'h\2', 60000).replace(b'(M'+struct.pack('<H', 60000)+b'M\x10\x03t', b'(M'+struct.pack('<H', 60000)+b't')
    label = label.replace(b'h\2', b'B'+struct.pack('<I', 60000)+bytes(60000))
    yield 'data','images twice.pkl.gz',gzip.compress(b'\x80\x02(('+images+label+b't('+arr(b'h\1', 60000)+label+b'tt.', 1)
    # gzip and IDX
    yield 'data','zeros.gz',zeros(k)
    yield 'data','members.gz',gzip.compress(b'')*(10**6 if big else 10**5)
    yield 'data','name.gz',b'\x1f\x8b\x08\x08\0\0\0\0\0\xff'+b'a'*(10**8 if big else 10**7)
    for name,shape in ('claims',(2**32-1,)*3),('large',(10**7,28,28)),('wide',(1,2**16,2**16)),('many',(280_000,28,28)),('zero',(2**32-1,0,2**32-1)):
        yield 'data',f'{name}/train-images-idx3-ubyte.gz',zeros(k, idx(*shape))
    # npz
    four = {'y_train':npy((3,))+bytes(3), 'x_test':npy((3,28,28))+bytes(3*784), 'y_test':npy((3,))+bytes(3)}
    for name,head in dict(claims=npy((2**40,28,28)), negative=npy((-1,784)), negatives=npy((-2**40,-784)), zero=npy((2**62,0)), text=npy((3,), f'<U{2**29}'),
            void=npy((3,), f'|V{2**30}'), object=npy((3,), '|O'), header=npy((3,), version=2, n=2**31), dims=npy((1,)*5000), nested=npy('('*3000),
            minus=npy('-'*9000+'1'), version=npy((3,), version=9), digits=npy('9'*9000), times=npy((3,), '('*99)).items():
        yield 'data',f'{name}.npz',npz({'x_train':head, **four})
        yield 'data',f'{name} bomb.npz',zip_bomb('x_train.npy', k, head)
    yield 'data','images.npz',zip_bomb('x_train.npy', 300, npy((300_000,28,28)))
    for name,method in ('bz2',zipfile.ZIP_BZIP2),('lzma',zipfile.ZIP_LZMA): yield 'data',f'{name}.npz',npz({'x_train':npy((3,28,28)), **four}, method)
    yield 'data','npz.gz',zeros(k, npz(four))
    one = npz({'x':b''})
    i,j = one.index(b'PK\1\2'),one.index(b'PK\5\6')
    n = 10**6 if big else 10**5
    entries = one[i:j]*n
    yield 'data','directory.npz',one[:i]+entries+one[j:j+8]+struct.pack('<HHIIH', 65535, 65535, len(entries), i, 0)
    zip64 = b'PK\6\6'+struct.pack('<QHHIIQQQQ', 44, 45, 45, 0, 0, n, n, len(entries), i)+b'PK\6\7'+struct.pack('<IQI', 0, i+len(entries), 1)
    yield 'data','directory64.npz',one[:i]+entries+zip64+one[j:]
    # pictures
    side = 7200 if big else 4500
    yield 'image','grey.png',png(side, side, 8, 0, zeros(52, wbits=15))
    yield 'image','deep.png',png(7200, 7200, 16, 6, zeros(52*8, wbits=15))
    yield 'image','palette.png',png(side, side, 8, 3, zeros(52, wbits=15), [(b'PLTE', bytes(768)), (b'tRNS', bytes(256))])
    yield 'image','bit.png',png(side, side, 1, 0, zeros(7, wbits=15))
    for w,h in (2**31-1,2**31-1),(65535,65535),(9400,9400),(89_000_000,1),(1,89_000_000),(52_000_000,1):
        yield 'image',f'{w} by {h}.png',png(w, h, 8, 6, zeros(k, wbits=15))
    text = b'k\0\0'+zlib.compress(bytes(999_000))
    yield 'image','texts.png',png(9, 9, 8, 0, b'', [(b'zTXt', text)]*200)
    yield 'image','text.png',png(9, 9, 8, 0, b'', [(b'zTXt', b'k\0\0'+zeros(k, wbits=15))])
    yield 'image','itxt.png',png(9, 9, 8, 0, b'', [(b'iTXt', b'k\0\1\0\0\0'+zeros(k, wbits=15))])
    yield 'image','profile.png',png(9, 9, 8, 0, b'', [(b'iCCP', b'k\0\0'+zeros(k, wbits=15))])
    ifd = struct.pack('<H', 5000)+b''.join(struct.pack('<HHII', 40000+i, 7, 60000, 8) for i in range(5000))
    exif = b'II*\0\x08\0\0\0'+ifd
    yield 'image','exif.png',png(9, 9, 8, 0, zlib.compress(bytes(99)), [(b'eXIf', exif+bytes(10**6))])
    jpeg = saved('JPEG', 'L', (9,9))
    segment = lambda m,b: b'\xff'+bytes([m])+struct.pack('>H', len(b)+2)+b
    yield 'image','exif.jpg',jpeg[:2]+segment(0xe1, b'Exif\0\0'+exif)+jpeg[2:]
    yield 'image','exifs.jpg',jpeg[:2]+segment(0xe1, b'Exif\0\0'+exif)+segment(0xe1, b'Exif\0\0'+bytes(65000))*500+jpeg[2:]
    yield 'image','comments.jpg',jpeg[:2]+segment(0xfe, bytes(65000))*500+jpeg[2:]
    yield 'image','profile.jpg',jpeg[:2]+segment(0xe2, b'ICC_PROFILE\0\1\1'+bytes(65000))*500+jpeg[2:]
    if big: yield 'image','large.jpg',saved('JPEG', 'RGB', (8192,6144))
    if big: yield 'image','progressive.jpg',saved('JPEG', 'RGB', (8192,6144), progressive=True, subsampling=0)
    if big: yield 'image','cmyk.jpg',saved('JPEG', 'CMYK', (7200,7200), progressive=True)
    yield 'image','scans.jpg',many_scans(3000 if big else 300)
    yield 'image','claims.jpg',(b := saved('JPEG', 'L', (9,9))).replace(b'\x08\0\x09\0\x09', b'\x08\xff\xff\xff\xff')
    gif = saved('GIF', 'P', (side,side))
    yield 'image','large.gif',gif
    small = saved('GIF', 'P', (9,9))
    yield 'image','frames.gif',small[:-1]+small[small.rindex(b',', 0, -1):-1]*5000+b';'
    yield 'image','comments.gif',small[:13]+small[13:].replace(b',', b'!\xfe'+(b'\xff'+b'a'*255)*(10**5)+b'\0,', 1)
    yield 'image','claims.gif',small[:6]+b'\xff\xff\xff\xff'+small[10:]
    yield 'image','frame.gif',small[:(i := small.rindex(b',')+5)]+b'\xff\xff\xff\xff'+small[i+4:]
    webp = saved('WEBP', 'RGB', (4000,4000), lossless=True)
    yield 'image','large.webp',webp
    yield 'image','larger.webp',saved('WEBP', 'RGB', (16383,16383) if big else (4200,4200), lossless=True, method=0)
    yield 'image','rest.webp',webp+bytes(10**8)
    if big: yield 'image','large.bmp',saved('BMP', 'RGB', (7100,7100))
    yield 'image','claims.bmp',(b := saved('BMP', 'RGB', (9,9)))[:18]+struct.pack('<ii', 7200, 7200)+b[26:]
    yield 'image','rle.bmp',b[:18]+struct.pack('<iiHHI', 7200, 7200, 1, 8, 1)+b[34:54]+bytes(10**6)
    for c in ('raw','tiff_lzw','tiff_adobe_deflate','packbits','jpeg') if big else ():
        yield 'image',f'{c}.tiff',saved('TIFF', 'RGB', (7000,7000), compression=c)
    if big: yield 'image','float.tiff',saved('TIFF', 'F', (7200,7200))
    plain = [(258,3,1,8), (259,3,1,8), (262,3,1,1), (277,3,1,1)]
    yield 'image','tile.tiff',tiff((256,4,1,100), (257,4,1,100), *plain, (322,4,1,60000), (323,4,1,60000), (324,4,1,8), (325,4,1,99))+bytes(10**4)
    yield 'image','strip.tiff',tiff((256,4,1,100), (257,4,1,100), *plain, (278,4,1,2**32-1), (273,4,1,8), (279,4,1,2**32-1))+bytes(10**4)
    yield 'image','tags.tiff',tiff((256,4,1,9), (257,4,1,9), *plain, *[(1000+i,7,10**6,8) for i in range(3000)])+bytes(10**6)
    yield 'image','claims.tiff',tiff((256,4,1,2**32-1), (257,4,1,2**32-1), *plain, (273,4,1,8), (279,4,1,99))
    yield 'image','eps.png',b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(was_here) (w) file\n'
    # weights and checkpoints
    inf,about = 10**400,net()[0]
    for name,change in {'layers':10**9, 'layers2':[10**9], 'layers3':[99_999]*99, 'layers4':[1]*10**5, 'layers5':[True], 'layers6':[1.],
            'layers7':[inf], 'layers8':'8',
            'layers9':None, 'layers10':[[8]], 'stats':[float('nan'),1.], 'stats2':[0.,0.], 'stats3':[0.,-1.], 'stats4':[0.,inf], 'stats5':[0.,float('inf')],
            'stats6':['0','1'], 'stats7':[True,True], 'stats8':[0.,1.,2.], 'stats9':{'a':1,'b':2}, 'dropout':float('nan'), 'dropout2':'.5', 'dropout3':inf,
            'dropout4':-1, 'dropout5':1, 'dropout6':None, 'dropout7':[0]}.items():
        a,ts = net(**{name.rstrip('0123456789'):change})
        yield 'net',f'{name}.safetensors',tensors(a, ts)
    yield 'net','1e400.safetensors',tensors(json.dumps(about).replace('0.3', '1e400'), net()[1])
    yield 'net','digits.safetensors',tensors(json.dumps(about).replace('0.3', '9'*10**5), net()[1])
    for name,v in ('nan',np.nan),('inf',np.inf):
        a,ts = net()
        ts['0.w'][7,7] = v
        yield 'net',f'{name}.safetensors',tensors(a, ts)
    for name,text in [('deep','['*10**5), ('deeper','{"a":'*10**5), ('list','[]'), ('number','1'), ('null','null'),
            ('string','"layers dropout stats"'), ('empty','{}'),
            ('nested','{"layers":'+'['*900+']'*900+',"stats":[0,1],"dropout":0}'), ('surrogate','{"layers":"\\ud800\\n\\u001b[31m","stats":[0,1],"dropout":0}'),
            ('lists','['+'[],'*5_000_000+'[]]')]:
        for kind in 'net','tensors','checkpoint':
            yield kind,f'{name}.safetensors' if kind!='checkpoint' else f'{name}/checkpoint.safetensors',tensors(text, net()[1])
    yield 'net','name.safetensors',tensors(about, {**net()[1], 'a\n\x1b[31mb\u202e'+'x'*10**5:np.zeros(0, 'f4')})
    many = {f'{i}':np.zeros(0, 'f4') for i in range(100_000 if big else 10_000)}
    for kind in 'net','tensors': yield kind,f'many {kind}.safetensors',tensors(about, many)
    yield 'weights','many.safetensors',tensors(None, many)
    for n in 100,2**24,2**25,2**62: yield 'weights',f'header {n}.safetensors',struct.pack('<Q', n)+b'{"a":'*20
    for n in 100,2**24: yield 'weights',f'blank {n}.safetensors',struct.pack('<Q', n)+b' '*n
    head = json.dumps({'a':dict(dtype='F32', shape=[10**10], data_offsets=[0,4*10**10])}).encode()
    for kind in 'net','weights': yield kind,f'sparse {kind}.safetensors',(struct.pack('<Q', len(head))+head,4*10**10)

def write(path, contents):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(contents, tuple): # and a hole
        contents,hole = contents
        path.write_bytes(contents)
        os.truncate(path, len(contents)+hole)
    else: path.write_bytes(contents)
    return path

def special(folder):
    "(kind, path) of what is no regular file"
    kinds = 'data','image','net','weights'
    os.mkfifo(folder/'fifo')
    for path in folder/'fifo',Path('/dev/zero'),Path('/dev/null'),Path('/dev/tty'),folder,folder/'none',Path('/proc/self/mem'):
        for kind in kinds: yield kind,path
    name = folder/'a\n\x1b[31mred\u202e'
    name.write_bytes(b'nothing')
    for kind in kinds: yield kind,name

# Changed files

def good(folder):
    "(kind, path, name to give it) of good files"
    import numpy as np, torch
    from PIL import Image
    from fnnlite.train.checkpoints import save_weights
    rng = np.random.RandomState(0)
    x,y = rng.randint(0, 256, (6,28,28)).astype('u1'),rng.randint(0, 10, 6).astype('u1')
    arrays = dict(x_train=x, y_train=y, x_test=x, y_test=y)
    np.savez(folder/'a.npz', **arrays)
    np.savez_compressed(folder/'b.npz', **arrays)
    np.savez(folder/'c.npz', **arrays|{'x_train':(x/255).astype('f4').reshape(-1, 784)})
    f = (x/255).astype('f4').reshape(-1, 784)
    for p in range(6):
        b = pickle.dumps(((f,y.astype('i8')),)*3, p)
        (folder/f'{p}.pkl').write_bytes(b)
        (folder/f'{p}.pkl.gz').write_bytes(gzip.compress(b, 1))
    for k in 'train','t10k':
        for j,a in (3,x),(1,y):
            p = folder/'idx'/f'{k}-{"images" if j==3 else "labels"}-idx{j}-ubyte'
            p.parent.mkdir(exist_ok=True)
            p.write_bytes(idx(*a.shape)+a.tobytes())
    for ext,mode,kw in [('png','L',{}), ('png','RGBA',{}),
            ('png','P',{}), ('png','I;16',{}), ('jpg','RGB',{}), ('jpg','L',dict(progressive=True)),
            ('gif','P',{}), ('bmp','RGB',{}), ('bmp','1',{}), ('webp','RGB',{}), ('webp','RGBA',dict(lossless=True)),
            ('tiff','RGB',{}), ('tiff','F',{}), ('tiff','CMYK',{}), ('tiff','I;16',{})]:
        im = Image.fromarray(x[0]).resize((60,60))
        im = Image.fromarray(np.asarray(im).astype('u2')*257) if mode=='I;16' else im.convert(mode)
        if ext in ('png','jpg','webp'):
            kw = kw|dict(exif=Image.Exif())
            kw['exif'][0x112] = 6
        im.save(folder/f'{mode.replace(";", "")}{len(kw)}.{ext}', **kw)
    (folder/'net.safetensors').write_bytes(tensors(*net()))
    save_weights(torch.nn.Linear(3, 2), folder/'w.safetensors')
    from contextlib import redirect_stdout
    with redirect_stdout(io.StringIO()): _learner(folder/'run', False).fit(1)
    for p in sorted(folder.rglob('*')):
        if not p.is_file(): continue
        name = p.relative_to(folder)
        kind = ('data' if p.suffix in ('.npz','.pkl','.gz') or 'idx' in name.parts else 'checkpoint' if p.name=='checkpoint.safetensors' else
                'net' if p.name=='net.safetensors' else 'weights' if p.suffix=='.safetensors' else 'image')
        yield kind,p,name

def changed(b, rng):
    "`b` with something done to it, often to its start, where the formats have their sizes"
    b = bytearray(b)
    for _ in range(rng.choice([1,1,1,2,3,8])):
        n = len(b)
        i = rng.randrange(max(1, rng.choice([n, min(n, 100), min(n, 1000)])))
        match rng.randrange(8):
            case 0: b[i:i+1] = bytes([rng.randrange(256)])
            case 1: b[i:i+1] = bytes([(b[i] if n else 0)^(1<<rng.randrange(8))])
            case 2: b[i:i+4] = struct.pack(rng.choice('<>')+'I', rng.choice([0,1,2**16-1,2**16,2**31-1,2**31,2**32-1,rng.randrange(2**32)]))
            case 3: del b[i:i+rng.choice([1,4,100])]
            case 4: b = b[:i]
            case 5: b[i:i] = b[i:i+rng.choice([1,4,100,1000])]
            case 6: b[i:i+8] = struct.pack('<Q', rng.choice([2**63,2**40,2**62-1]))
            case 7:
                digits = [j for j in range(n) if 48<=b[j]<58]
                if digits: b[(j := rng.choice(digits)):j+1] = rng.choice([b'-1', b'99999999999',
                     b'1e400', b'NaN', b'null', b'[]', b'"a"', b'{}', b'0', b'true'])
    return bytes(b)

def respell(b, kind, rng):
    "As `changed`, and where the rest of the file says how long the start is, or is zipped, so that the change is seen"
    if b[:2]==b'\x1f\x8b': return gzip.compress(changed(gzip.decompress(b), rng), 1)
    if b[:2]==b'PK' and rng.random()<.7:
        with zipfile.ZipFile(io.BytesIO(b)) as z: members = {o[:-4]:z.read(o) for o in z.namelist()}
        k = rng.choice([*members])
        return npz(members|{k:changed(members[k], rng)}, rng.choice([zipfile.ZIP_STORED,zipfile.ZIP_DEFLATED]))
    if kind in ('net','weights','checkpoint') and rng.random()<.8:
        n = int.from_bytes(b[:8], 'little')
        head = changed(b[8:8+n], rng)
        return struct.pack('<Q', len(head))+head+b[8+n:]
    return changed(b, rng)

def fuzz(tries, seconds, seed, keep, work):
    counts,bad,w,rng = collections.Counter(),[],Worker(),random.Random(seed)
    most = {}
    def one(kind, path, family):
        res = w.read(kind, path)
        counts[family,kind,res['what']] += 1
        for k in 'mb','s': most[family,k] = max(most.get((family,k), (0,)), (res[k],path.name))
        if (what := harm(res, path)):
            bad.append(f'{kind} {path.name!r}: {what}')
            print('HARM', bad[-1], flush=True)
            keep.mkdir(exist_ok=True)
            if path.is_file() and path.stat().st_size<10**8: shutil.copy(path, keep/f'{len(bad)} {path.name[:50]!r}')
    (work/'special').mkdir()
    for kind,path in special(work/'special'): one(kind, path, 'special')
    for kind,name,contents in crafted():
        path = write(work/'crafted'/kind/name, contents)
        one(kind, path.parent if path.name.startswith('train-') else path, 'crafted')
        path.unlink()
    (work/'good').mkdir()
    (work/'changed').mkdir()
    goods = [(kind,p,name,p.read_bytes()) for kind,p,name in good(work/'good')]
    for kind,p,_,_ in goods:
        path = p.parent if p.parent.name=='idx' else p
        assert (res := w.read(kind, path))['what']=='read', (kind,p,res) # or the changed ones prove nothing
        counts['good',kind,'read'] += 1
    end = time.monotonic()+seconds
    for i in range(tries):
        if time.monotonic()>end: break
        kind,p,name,b = rng.choice(goods)
        if name.parts[0]=='idx':
            shutil.copytree(work/'good'/'idx', work/'changed'/'idx', dirs_exist_ok=True)
            write(work/'changed'/name, respell(b, kind, rng))
            path = work/'changed'/'idx'
        else: path = write(work/'changed'/name, respell(b, kind, rng))
        one(kind, path, 'changed')
    w.close()
    return counts,most,bad

if __name__=='__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--tries', type=int, default=5000)
    parser.add_argument('--seconds', type=float, default=300)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--keep', type=Path, default=Path('harmful'), help='folder for the files that did harm')
    parser.add_argument('--worker', action='store_true', help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.worker: sys.exit(worker())
    with tempfile.TemporaryDirectory() as d: counts,most,bad = fuzz(a.tries, a.seconds, a.seed, a.keep, Path(d))
    for k,n in sorted(counts.items()): print(f'{n:7,} ', *k)
    for (family,k),(n,name) in most.items(): print(f"{family}: at most {n:.1f} {k.replace('mb', 'MB')}, {name!r}")
    print(f"{sum(counts.values()):,} files read; {len(bad)} did harm")
    sys.exit(bool(bad))
