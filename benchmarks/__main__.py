"The command; see `python -m benchmarks --help`"
import argparse, json, os, shlex, sys
from importlib import import_module
from pathlib import Path
from . import report
from .workers import say
from .workloads import home_of, left_out, workloads

def parse(argv=None):
    p = argparse.ArgumentParser('python -m benchmarks', description='Time a training step of fnnlite beside other ways to take it. Lists are comma-separated.')
    p.add_argument('--workloads', help=', '.join(workloads))
    p.add_argument('--peers', help='names, or how they begin: '+', '.join(home_of))
    p.add_argument('--opts', help='sgd, momentum, adam; a large workload has no momentum')
    p.add_argument('--sections', help=', '.join(report.tables))
    p.add_argument('--rounds', type=int, default=9, help='at least 7 for figures to quote')
    p.add_argument('--device', choices=['cpu','cuda'], default='cpu')
    p.add_argument('--data', default='local', help='all of MNIST, as for fnnlite_train')
    p.add_argument('--out', type=Path, default=report.here/'out', help='the folder for the plot')
    p.add_argument('--json', type=Path, help='a file for the figures, written after each table')
    p.add_argument('--load', type=Path, help='figures that --json wrote, instead of measuring')
    p.add_argument('--write', action='store_true', help='write RESULTS.md and its plot (RESULTS_cuda.md with --device cuda)')
    p.add_argument('--quick', action='store_true', help='tiny sizes, two rounds: does it run?')
    args = p.parse_args(argv)
    args.secs = .15 # a round of one peer's steps
    if args.quick:
        args.rounds,args.secs = 2,.01
        args.workloads,args.opts,args.sections = args.workloads or 'mlp64,numpy',args.opts or 'sgd',args.sections or 'steps,memory'
    def choose(what, given, known):
        given = list(known) if given is None else [o.strip() for o in given.split(',')]
        for o in given:
            if not any(k.startswith(o) for k in known): p.error(f"no {what} {o!r}, expected some of {', '.join(known)}")
        return [k for k in known if k in given or any(k.startswith(o) and o not in known for o in given)]
    if args.rounds<1: p.error('--rounds: at least 1')
    if args.device=='cuda':
        import torch
        if not torch.cuda.is_available(): p.error('--device cuda: torch finds no GPU')
    args.workloads = [workloads[n].tiny() if args.quick else workloads[n] for n in choose('workload', args.workloads, workloads)]
    args.peers,args.opts = choose('peer', args.peers, home_of),choose('optimizer', args.opts, ('sgd','momentum','adam'))
    args.sections = choose('section', args.sections, report.tables)
    return args

def measure(args):
    "Run all that is asked for; the figures"
    gone = left_out(args.peers, args.device)
    args.peers = [n for n in args.peers if n not in gone]
    command = shlex.join(['python', '-m', 'benchmarks', *('PATH' if '/' in a else a for a in sys.argv[1:])])
    res = dict(command=command, machine=report.machine(args.device), left_out=gone, failed=[], **{s:[] for s in report.tables})
    for line in report.remarks(res): print(line)
    def fail(section, what, peer, error):
        res['failed'].append(dict(section=section, what=what, peer=peer, error=str(error).replace(str(report.here.parent), '.')))
        say(report.remarks(res)[-1])
    def save():
        if args.json: args.json.write_text(json.dumps(res, indent=1))
    for section in args.sections:
        try:
            for rows in import_module(f'.{section}', __package__).run(args, fail):
                res[section] += rows
                save()
                if section!='mnist':
                    for t in report.tables[section](rows): print(report.text(*t), flush=True)
        except Exception as e: fail(section, '', 'all', f'{type(e).__name__}: {e}') # noqa: BLE001 the other sections go on
    for t in report.tables['mnist'](res['mnist']): print(report.text(*t))
    for line in report.remarks(res): print(line)
    save()
    return res

def main(argv=None):
    args = parse(argv)
    for name in ('OPENBLAS_CORETYPE','OPENBLAS_L2_SIZE'): os.environ.pop(name, None) # numpy's BLAS is to choose for this machine
    res = json.loads(args.load.read_text()) if args.load else measure(args)
    end = '_cuda' if res['machine']['gpu'] else ''
    report.plot_ratios(res['steps'], args.out/f'ratios{end}.png')
    if args.write:
        report.plot_ratios(res['steps'], report.here/f'ratios{end}.png')
        (report.here/f'RESULTS{end}.md').write_text(report.page(res, f'ratios{end}.png'), encoding='utf-8')

if __name__=='__main__': main()
