"""Runs random training programs (tests/programs.py): are fnnlite's gradients autograd's?

    python scripts/random_programs.py 1000 0   # the programs 0 to 999; a minute
    python scripts/random_programs.py 1 417    # that one, which is printed

Prints how many agreed, by the way they were run, how many were refused and why, and of each program
that was wrong, or ended with an error that is no refusal, what is left when lines that don't matter
go. Exits with 1 if there was one. Each is run in a process of its own (fork: no Windows), so that
one that dies is counted too.
"""
import os, pickle, signal, sys
from collections import Counter
from pathlib import Path
import torch
sys.path.insert(0, str(Path(__file__).parents[1]/'tests'))
from programs import check, kind, program, reason, shrink

def results(seeds):
    "For each seed the program and its verdict, from a process, and another one if that dies"
    while seeds:
        r,w = os.pipe()
        if not (pid := os.fork()):
            with open(w, 'wb', 0) as o:
                try:
                    for s in seeds:
                        pickle.dump(source := program(s), o)
                        pickle.dump(check(source), o)
                finally: os._exit(0)
        os.close(w)
        with open(r, 'rb') as i:
            try:
                while seeds:
                    source = None
                    source = pickle.load(i)
                    verdict,why = pickle.load(i)
                    yield seeds[0],source,verdict,why
                    seeds = seeds[1:]
            except EOFError: pass
        _,status = os.waitpid(pid, 0)
        if not seeds: return
        if source is None: raise RuntimeError(f'program {seeds[0]} could not be written')
        died = signal.strsignal(status) if os.WIFSIGNALED(status) else 'the process ended'
        yield seeds[0],source,'crash',died
        seeds = seeds[1:]

def main(n, seed):
    torch.set_num_threads(1)
    total,ways,refusals,bad = Counter(),Counter(),Counter(),[]
    for s,source,verdict,why in results(range(seed, seed+n)):
        if n==1: print(source, verdict, why, sep='\n')
        total[verdict] += 1
        ways[kind(source), verdict] += 1
        if verdict=='refused': refusals[reason(why)] += 1
        elif verdict!='right': bad.append((s, source, verdict, why))
    print(f'{n} programs, {seed} to {seed+n-1}:', ', '.join(f'{total[v]} {v}' for v in total))
    for way in sorted({k for k,_ in ways}):
        print(f'{way:20}', ', '.join(f'{ways[way, v]} {v}' for v in total if ways[way, v]))
    for why,times in refusals.most_common(): print(f'refused {times:4} × {why}')
    for s,source,verdict,why in bad:
        print(f'\nprogram {s}, {verdict}: {why}')
        print(shrink(source) if why.startswith(('fnnlite: ','tiny: ')) else source, flush=True)
    return bool(bad)

if __name__=='__main__':
    n,seed = map(int, [*sys.argv[1:], 0][:2])
    sys.exit(main(n, seed))
