"The most memory that a step has at once, beyond the data, the weights and the optimizer's state"
import os
import torch
from torch.profiler import ProfilerActivity, profile
from .workers import PeerError, fresh, say

names = ['fnnlite eager','fnnlite lean','fnnlite compiled','torch eager','torch.func compiled']
nets = 'lesson','numpy','wide512','deep256'

def cpu_peak(f):
    "The most bytes that calls of `f` have at once, by what torch's allocator says of itself"
    # twice: what the first call leaves behind counts until the second lets it go; of what was there before, the profiler tells nothing
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as prof:
        for _ in range(2): f()
    events = [e for e in prof.profiler.kineto_results.events() if e.name()=='[memory]' and e.device_type()==torch.autograd.DeviceType.CPU]
    total = peak = 0
    for e in sorted(events, key=lambda e: e.start_ns()):
        total += e.nbytes()
        peak = max(peak, total)
    return peak

def cuda_peak(f):
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    f()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()-before

def quiet():
    "No word from the profiler"
    for fd in (1,2): os.dup2(os.open(os.devnull, os.O_WRONLY), fd)

def peak(name, w, opt, device):
    quiet()
    from .torch_home import builders
    step = builders[name](w, opt, device)
    for _ in range(3): step()
    return (cuda_peak if device=='cuda' else cpu_peak)(step)

def run(args, fail):
    for w in args.workloads:
        if w.name not in nets: continue
        for opt in [o for o in args.opts if o!='momentum' and o in w.opts]:
            say(f'memory: {w.name} {opt}')
            rows = []
            for name in [n for n in names if n in args.peers]:
                try: rows.append(dict(workload=w.name, title=w.title, opt=opt, peer=name,
                    bytes=fresh(peak, name, w, opt, args.device)))
                except PeerError as e: fail('memory', f'{w.name} {opt}', name, e)
            yield rows
