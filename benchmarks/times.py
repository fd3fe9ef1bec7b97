"What comes before the steps: importing, and compiling"
import math, subprocess, sys, tempfile
from statistics import median
from .workers import PeerError, fresh, own_cache, say
from .steps import wall_clock

names = ['fnnlite graph','fnnlite compiled','torch.compile loss','torch.func compiled','torch.func compiled (C++)']
nets = 'mlp64','wide512'

def import_seconds(module):
    "Seconds to import `module` in a new interpreter"
    code = f'from time import perf_counter as t; s = t(); import {module}; print(t()-s)'
    return float(subprocess.run([sys.executable,'-c',code], capture_output=True, text=True, check=True).stdout)

def first_step(name, w, opt, device):
    "Seconds to build a step and take it once, and seconds of a later one"
    from .torch_home import builders, cuda_clock, data
    data(w, device)
    def once():
        nonlocal step
        step = builders[name](w, opt, device)
        return step().item()
    step = None
    first = wall_clock(once, 1)
    clock = cuda_clock if device=='cuda' else wall_clock
    clock(step, 20)
    return first,median(clock(step, 50) for _ in range(9))

def pays_from(first, eager_first, step, eager_step):
    "The number of steps from which compiling saves time, or `None`"
    return max(1, math.ceil((first-eager_first)/(eager_step-step))) if step<eager_step else None

def run(args, fail):
    say('times: imports')
    secs = [{m:import_seconds(m) for m in ('torch','fnnlite')} for _ in range(max(args.rounds, 5))]
    yield [dict(what='import', module=m, seconds=median(s[m] for s in secs)) for m in secs[0]]
    for w in [w for w in args.workloads if w.name in nets]:
        say(f'times: first steps of {w.name}')
        rows = []
        def ask(name, **env):
            try: return fresh(first_step, name, w, 'adam', args.device, **env)
            except PeerError as e: fail('times', f'{w.name} adam', name, e)
        eager = ask('torch eager')
        for name in [n for n in names if n in args.peers]:
            with tempfile.TemporaryDirectory() as cache:
                cold = ask(name, **own_cache(cache))
                warm = cold and ask(name, **own_cache(cache))
            if eager and warm:
                step = min(cold[1], warm[1])
                rows.append(dict(what='first step', workload=w.name, peer=name, eager_first=eager[0], cold=cold[0], warm=warm[0], eager_step=eager[1],
                    step=step, pays_from=pays_from(cold[0], eager[0], step, eager[1]), pays_from_warm=pays_from(warm[0], eager[0], step, eager[1])))
        yield rows
