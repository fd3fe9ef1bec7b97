"The time of a step: every peer in every round, so that what slows the machine down slows them all"
import time
from contextlib import nullcontext
from importlib import import_module
from statistics import median
from .workers import PeerError, Worker, say
from .workloads import home_of, homes

too_slow = 10 # seconds a step


# In a home's process

steps = {}

def wall_clock(step, n):
    "Seconds a call of `step`, of `n` calls"
    start = time.perf_counter()
    for _ in range(n): step()
    return (time.perf_counter()-start)/n

class Timed:
    "A peer's step and how to time it"
    def __init__(self, name, w, opt, device, secs):
        home = import_module(f'.{home_of[name]}_home', __package__)
        self.step = home.builders[name](w, opt, device)
        self.clock = getattr(home, 'cuda_clock', wall_clock) if device=='cuda' else wall_clock
        self.around = getattr(self.step, 'around', nullcontext)
        with self.around():
            # the loss before any step, and after three
            self.losses = None if name=='floor' else [self.step().item() for _ in range(4)][::3]
            t = min(self.clock(self.step, n) for n in (1,3))
        if t>too_slow: raise TimeoutError(f'a step takes {t:.0f} s, more than {too_slow} s')
        self.n = 1 if t>.3 else max(3, min(5000, int(secs/t)))
        self.warm = 0 if t>.3 else max(1, min(5, int(.02/t))) # after a third of a second nobody sees what ran before

    def round(self):
        with self.around():
            if self.warm: self.clock(self.step, self.warm)
            return self.clock(self.step, self.n)

def build(name, *args):
    steps[name] = Timed(name, *args)
    return dict(losses=steps[name].losses, rtol=getattr(steps[name].step, 'rtol', 1e-3), routines=getattr(steps[name].step, 'info', None))
def one_round(name): return steps[name].round()


# In the process that asks

class Bench:
    "The peers of one workload and optimizer, each in the process of its home"
    def __init__(self, w, opt, device, secs): self.args,self.workers,self.built,self.last = (w, opt, device, secs),{home:Worker() for home in homes},{},None
    def __enter__(self): return self
    def __exit__(self, *_):
        for worker in self.workers.values(): worker.stop()

    def build(self, name):
        worker = self.workers[home_of[name]]
        res = worker(build, name, *self.args)
        self.built[name] = worker.proc
        return res

    def ask(self, f, name):
        "`f(name)` where `name` lives; if that process crashed, in a new one"
        home = home_of[name]
        if home!=self.last: time.sleep(.1) # the other's threads may still be waiting for work, at full speed
        self.last = home
        if self.workers[home].proc is not self.built[name]: self.build(name)
        return self.workers[home](f, name)

def check_losses(res, ref):
    "Raise unless a peer's losses, before any step and after three, are the reference's"
    for a,b,when in zip(res['losses'], ref['losses'], ('the first loss','the loss after three steps')):
        if not abs(a-b)<=res['rtol']*abs(b): raise PeerError(f'{when} is {a:.6g}, expected {b:.6g}')

def ratio(a, b): return median(x/y for x,y in zip(a, b))

def measure(w, opt, names, args, fail):
    "A row for each of the peers `names`; `fail` is told of those that can't be measured"
    times,infos = {},{}
    with Bench(w, opt, args.device, args.secs) as bench:
        def attempt(f, name):
            try: return f(name)
            except PeerError as e:
                fail(name, e)
                times.pop(name, None)
        def prepare(name):
            infos[name] = res = bench.build(name)
            times[name] = []
            if res['losses']: check_losses(res, next(r for r in infos.values() if r['losses']))
        for name in sorted(names, key=lambda n: n!='torch eager'): attempt(prepare, name) # the first is the others' reference
        names = [n for n in names if n in times]
        for r in range(args.rounds): # there and back, so that nobody always runs behind the same peer
            for name in names[::-1 if r%2 else 1]:
                if name in times and (t := attempt(lambda n: bench.ask(one_round, n), name)) is not None: times[name].append(t)
    for name in [n for n in names if n in times]:
        ts = times[name]
        to = lambda ref: ratio(ts, times[ref]) if ref in times else None
        yield dict(workload=w.name, title=w.title, opt=opt, peer=name, median=median(ts), min=min(ts), max=max(ts), to_eager=to('torch eager'),
            to_floor=to('floor'), seconds=ts, routines=infos[name]['routines'])

def run(args, fail):
    "The rows of one workload and optimizer after another"
    for w in args.workloads:
        for opt in args.opts:
            if opt not in w.opts: continue
            say(f'steps: {w.name} {opt}')
            yield list(measure(w, opt, args.peers, args, lambda name,e: fail('steps', f'{w.name} {opt}', name, e)))
