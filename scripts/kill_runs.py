"""Ends runs of fnnlite_train at random moments, goes on with them, and compares their files with those of a run that nobody ended, bit by bit.

A trial: up to three times a run is started with --resume and ended by SIGKILL, SIGTERM, SIGINT or two of the latter, somewhere between its first
import and its last file; then one is left to its end. Or two runs are started into one folder. Prints what it has tried, and exits with 1 if a run
ended with another status than it should, printed a traceback, left a file that isn't whole, or came to other weights.

    python scripts/kill_runs.py --minutes 5 --modes plain,two,compiled

`two` is under torchrun, in two processes. It takes the minutes it's given and up to two more. Linux: it looks into /proc."""
import csv, os, random, signal, subprocess, sys, sysconfig, tempfile, time
from collections import Counter
from pathlib import Path
import numpy as np, torch
from fastcore.script import call_parse
from PIL import Image
from fnnlite.train.checkpoints import load_tensors
from fnnlite import load_mnist

command = Path(sysconfig.get_path('scripts'))/'fnnlite_train'
torchrun = [sys.executable,'-m','torch.distributed.run','--standalone','--nproc-per-node','2','--no-python']
INT,TERM,KILL = signal.SIGINT,signal.SIGTERM,signal.SIGKILL
ends = [(KILL,),(TERM,),(INT,),(TERM,INT),(INT,INT),(INT,TERM)]
files = ['checkpoint.safetensors','curves.png','history.csv','model.safetensors']

class Run:
    "A command that is running, and what it has printed"
    def __init__(self, mode, folder, args, logs):
        args = [*torchrun*(mode=='two'), command, *args, '--out', folder, *['--compiled']*(mode=='compiled')]
        self.mode,self.logs = mode,[logs/'out',logs/'err']
        env = {**os.environ, 'OMP_NUM_THREADS':'1', 'PYTHONUNBUFFERED':'1'}
        with open(self.logs[0], 'w') as out, open(self.logs[1], 'w') as err: self.p = subprocess.Popen(args, stdout=out, stderr=err, env=env)

    def said(self): return [o.read_text() for o in self.logs]
    def begun(self): return 'differ by' in self.said()[0] # the training comes next

    def wait_until(self, f, seconds):
        end = time.monotonic()+seconds
        while self.p.poll() is None and time.monotonic()<end and not f(): time.sleep(.005)

    def send(self, numbers, rng):
        "torchrun hands signals on; but SIGKILL it can't, and one of its processes gets that"
        for n in numbers:
            if self.p.poll() is not None: return
            pid = self.p.pid
            if self.mode=='two' and n==KILL: pid = rng.choice(Path(f'/proc/{pid}/task/{pid}/children').read_text().split() or [pid])
            try: os.kill(int(pid), n)
            except ProcessLookupError: return
            if len(numbers)>1: time.sleep(rng.choice([0, .002, .02]))

    def end(self):
        try: return self.p.wait(200)
        except subprocess.TimeoutExpired:
            self.p.kill()
            return 'hung'

def content(folder):
    "All that is in the files, but the clock's part of it"
    res = {}
    for name in 'checkpoint','model':
        tensors,about = load_tensors(folder/f'{name}.safetensors')
        about.pop('rng', None) # Python's and numpy's, which these runs don't draw from
        for row in about.get('history', []): row.pop('time')
        res[name] = about,{k:t.numpy().tobytes() for k,t in tensors.items()}
    return res

def assert_whole(folder):
    for p in folder.glob('*'):
        if p.name.endswith('.safetensors'): load_tensors(p)
        elif p.name=='curves.png': Image.open(p).load()
        elif p.name=='history.csv': assert all(None not in r and None not in r.values() for r in csv.DictReader(p.read_text().splitlines())), p
        else: assert p.name.startswith('.') and p.name.endswith('.fnnlite.tmp'), p

def ended(run, mode, numbers, counts):
    "Count how a run ended that got these signals; what is wrong with that, if anything"
    begun,code,err = run.begun(),run.end(),run.said()[1]
    name = '+'.join(n.name for n in numbers)
    counts[f"{mode}: ended by {name} {'while training' if begun else 'before'}" if code!=0 else f'{mode}: was faster than {name}'] += 1
    allowed = {0,1} if mode=='two' else {0,*(s for n in numbers for s in (-n, 128+n))} # torchrun always says 1, or dies of the signal
    if mode=='two': allowed |= {-n for n in numbers}
    if not begun and INT in numbers and 'KeyboardInterrupt' in err: # Python's own answer, before any of the command has run
        counts[f'{mode}: (of these, tracebacks of KeyboardInterrupt while importing)'] += 1
        return None if mode=='two' or code in allowed|{1} else f'status {code}'
    ours = 'Traceback' in err if mode!='two' else f'{Path("fnnlite")/"learner.py"}' in err # torchrun prints one of its own
    return f'status {code}' if code not in allowed else f'a traceback:\n{err}' if ours else None

def trial(mode, args, ref, seconds, folder, rng, counts):
    "None if all was well, else what wasn't"
    out = folder/'out'
    logs = lambda: Path(tempfile.mkdtemp(dir=folder))
    for _ in range(rng.randint(1, 3)):
        run,numbers = Run(mode, out, [*args, '--resume'], logs()),rng.choice(ends)
        if rng.random()<.9: run.wait_until(run.begun, 200)
        delay = rng.uniform(0, 1.2*seconds)
        run.wait_until(lambda t=time.monotonic()+delay: time.monotonic()>t, 200)
        run.send(numbers, rng)
        if (wrong := ended(run, mode, numbers, counts)): return wrong
        assert_whole(out)
    last = Run(mode, out, [*args, '--resume'], logs())
    if last.end()!=0: return f'the last run failed:\n{last.said()[1]}'
    return compare(out, ref, f'{mode}: resumed to the end', counts)

def together(args, ref, folder, rng, counts):
    "Two runs into one folder: one is refused, unless the other had ended"
    out,runs = folder/'out',[]
    for i in range(2):
        runs.append(Run('plain', out, args, Path(tempfile.mkdtemp(dir=folder))))
        time.sleep(rng.uniform(0, 2))
    codes = sorted((r.end() for r in runs), key=str)
    said = ''.join(r.said()[1] for r in runs)
    if codes not in ([0,0],[0,2]) or codes[1]==2 and not (said.count('\n')==1 and 'another run is writing there' in said): return f'{codes}: {said}'
    counts['two runs into one folder: the second was ' + ('refused' if codes[1] else 'after the first')] += 1
    return compare(out, ref, 'two runs into one folder: one', counts)

def compare(out, ref, what, counts):
    if sorted(p.name for p in out.iterdir())!=files: return f'other files: {sorted(p.name for p in out.iterdir())}'
    if content(out)!=ref: return 'other weights, optimizer, random numbers or history'
    counts[f'{what} with the files of the unbroken run'] += 1

@call_parse
def main(
    minutes:float=5, # How long
    modes:str='plain,two', # Of these, which: plain, two, compiled
    seed:int=0, # Of the moments
):
    rng,counts,wrong,modes = random.Random(seed),Counter(),[],modes.split(',')
    with tempfile.TemporaryDirectory() as d:
        d,m = Path(d),load_mnist()
        np.savez(d/'data.npz', x_train=m.x_train[:1001], y_train=m.y_train[:1001], x_test=m.x_valid[:101], y_test=m.y_valid[:101])
        args = ['--data',d/'data.npz','--layers','48,24','--bs','32','--epochs','8','--lr','.005']
        refs = {}
        for mode in modes:
            run = Run(mode, d/mode, args, d)
            run.wait_until(run.begun, 300)
            start = time.monotonic()
            if run.end()!=0: sys.exit(f'{mode}: the unbroken run failed:\n{run.said()[1]}')
            refs[mode] = content(d/mode),time.monotonic()-start
            print(f'{mode}: an unbroken run trains for {refs[mode][1]:.1f} seconds', flush=True)
        end,n = time.monotonic()+60*minutes,0
        while time.monotonic()<end:
            mode,n = modes[n%len(modes)],n+1
            with tempfile.TemporaryDirectory(dir=d) as folder:
                pair = mode=='plain' and rng.random()<.3
                try: res = together(args, refs[mode][0], Path(folder), rng, counts) if pair else trial(mode, args, *refs[mode], Path(folder), rng, counts)
                except Exception as e: res = f'{type(e).__name__}: {e}'
            if res:
                wrong.append(res)
                print(f'WRONG in trial {n}, {mode}: {res}', flush=True)
    for k,v in sorted(counts.items()): print(f'{v:6} {k}')
    print(f'{n:6} trials, {len(wrong)} wrong; torch {torch.__version__}')
    sys.exit(bool(wrong))
