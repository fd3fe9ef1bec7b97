"The figures as tables, for the terminal and for RESULTS.md, and as a plot"
import os, platform, re
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median

here = Path(__file__).parent

def machine(device):
    "What the figures were measured on and with"
    import torch
    cpuinfo = Path('/proc/cpuinfo')
    models = re.findall(r'^model name\s*: (.*)$', cpuinfo.read_text() if cpuinfo.exists() else '', re.M)
    versions = dict(python=platform.python_version(), **{n:version(n) for n in ('fnnlite','torch','numpy','jax','jaxlib','tinygrad') if find_spec(n)})
    versions['torch'] = torch.__version__ # says which build
    return dict(cpu=models[0] if models else platform.processor(), cores=os.cpu_count(), capability=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(), load=os.getloadavg()[0], gpu=torch.cuda.get_device_name() if device=='cuda' else None,
        system=platform.system(), date=str(date.today()), versions=versions)

def us(secs):
    "Microseconds in three or four figures"
    return f'{secs*1e6:.3g}' if secs<1e-3 else f'{secs*1e6:,.0f}'
def x(ratio): return '' if ratio is None else f'{ratio:.2f}'
def s(secs): return f'{secs:.1f}'
def steps_from(n): return 'never' if n is None else f'{n:,}'

# for each section: what a table of it is headed with, and its rows. A table is (heading, column names, rows of strings)

def steps_tables(rows):
    for (w,title,opt),part in groups(rows, 'workload', 'title', 'opt'):
        yield (f'{w}, {opt} ({title})', ['peer','median µs','min–max','÷ torch eager','÷ floor'],
            [[r['peer'], us(r['median']), f"{us(r['min'])}–{us(r['max'])}", x(r['to_eager']), x(r['to_floor'])] for r in part])

def memory_tables(rows):
    if rows: yield 'Peak memory of a step', ['workload','optimizer','peer','MB'], [[r['workload'], r['opt'], r['peer'], f"{r['bytes']/1e6:.2f}"] for r in rows]

def times_tables(rows):
    if imports := [r for r in rows if r['what']=='import']:
        yield 'Import', ['module','seconds'], [[r['module'], f"{r['seconds']:.2f}"] for r in imports]
    if firsts := [r for r in rows if r['what']=='first step']:
        yield ('The first step with adam, in seconds; and the step from which compiling has paid',
            ['workload','peer','torch eager','cold','warm cache','pays from','with the cache'],
            [[r['workload'], r['peer'], *(s(r[k]) for k in ('eager_first','cold','warm')), *(steps_from(r[k]) for k in ('pays_from','pays_from_warm'))]
                for r in firsts])

def mnist_tables(rows):
    if not rows: return
    def cells(name, rs):
        secs,firsts = [r['seconds'] for r in rs],[r['first'] for r in rs]
        rest = [a-b for a,b in zip(secs, firsts)]
        return [name, s(median(secs)), f'{s(min(secs))}–{s(max(secs))}', s(median(rest)), s(median(firsts)),
            s(median(t/r['epochs'] for t,r in zip(rest, rs))),
            ' '.join(str(r['epochs'])+('' if r['reached'] else '!') for r in rs), ' '.join(f"{r['accuracy']:.4f}" for r in rs)]
    yield ('Seconds to 98 % on MNIST; `!`: not reached', ['run','median','min–max','less first step','first step','an epoch','epochs','accuracy'],
        [cells(name, rs) for (name,),rs in groups(rows, 'peer')])

def nets_tables(rows):
    for (net,),part in groups(rows, 'net'):
        yield (net, ['peer','median ms','min–max','÷ torch eager','first step s','MB'], [[r['peer'], f"{1e3*r['median']:.1f}",
            f"{1e3*r['min']:.1f}–{1e3*r['max']:.1f}", x(r['to_eager']), s(r['first']), '' if r['bytes'] is None else f"{r['bytes']/1e6:.1f}"] for r in part])

tables = dict(steps=steps_tables, nets=nets_tables, memory=memory_tables, times=times_tables, mnist=mnist_tables)

def groups(rows, *keys):
    "The rows that agree in `keys`, together, in the order they came"
    res = {}
    for r in rows: res.setdefault(tuple(r[k] for k in keys), []).append(r)
    return res.items()

def text(heading, head, body):
    widths = [max(map(len, col)) for col in zip(head, *body)]
    line = lambda r: '  '.join(c.rjust(n) if i else c.ljust(n) for i,(c,n) in enumerate(zip(r, widths))).rstrip()
    return '\n'.join(['', heading, line(head), *map(line, body)])

def markdown(heading, head, body):
    line = lambda r: f"| {' | '.join(r)} |"
    return '\n'.join([f'### {heading}', '', line(head), line(['---',*['---:']*(len(head)-1)]), *map(line, body), ''])

def remarks(res):
    "Who isn't in the tables, and why"
    return [f'left out: {name}: {why}' for name,why in res['left_out'].items()] + \
        [f"failed: {f['section']} {f['what']}: {f['peer']}: {f['error']}" for f in res['failed']]

def page(res, plot):
    "RESULTS.md"
    m = res['machine']
    where = f"{m['gpu']}, on " if m['gpu'] else ''
    out = ['# Results', '', f"Made by `{res['command']}` on {m['date']}; not edited by hand.", '',
        f"{where}{m['cpu']}, {m['cores']} cores, {m['capability']}, {m['threads']} threads, {m['system']}, load {m['load']:.1f} at the start; " +
        ', '.join(f'{n} {v}' for n,v in m['versions'].items()) + '.', '']
    notes = here/'notes.md'
    if notes.exists(): out += [notes.read_text(encoding='utf-8')]
    if res['steps']: out += [f'![A step of each peer, over that of torch eager]({plot})', '']
    for section,of in tables.items():
        if res.get(section): out += [f'## {section.capitalize()}', '', *(markdown(*t) for t in of(res[section]))]
    if floors := {r['workload']:r['routines'] for r in res['steps'] if r['routines']}:
        out += ['### Routines of the floor', '', *(f"- {w}: {'; '.join(f'{k}: {v}' for k,v in rs.items())}" for w,rs in floors.items()), '']
    if said := remarks(res): out += ['### Not in the tables', '', *(f'- {l}' for l in said), '']
    return '\n'.join(out)

def plot_ratios(rows, path):
    "A panel for each optimizer: the time of each peer's step over torch eager's, for each workload"
    import matplotlib
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    rows = [r for r in rows if r['to_eager']]
    opts,nets,peers = (list(dict.fromkeys(r[k] for r in rows)) for k in ('opt','workload','peer'))
    if not rows: return
    fig,axs = plt.subplots(len(opts), 1, figsize=(9, 3.2*len(opts)), squeeze=False, sharex=True, layout='constrained')
    for ax,opt in zip(axs[:,0], opts):
        for i,peer in enumerate(peers):
            part = [(nets.index(r['workload'])+.05*(i-len(peers)/2),r['to_eager']) for r in rows if (r['opt'],r['peer'])==(opt,peer)]
            ax.plot(*zip(*part), 'D*osv^<>Xph8Pd'[i%14], color=plt.cm.tab20(2*i%20+i//10%2), label=peer) if part else None
        ax.axhline(1, lw=.5, color='grey')
        ax.tick_params('x', labelsize='small')
        ax.set(yscale='log', ylabel=f'{opt}: time ÷ torch eager', xticks=range(len(nets)), xticklabels=nets)
    fig.legend(*axs[0,0].get_legend_handles_labels(), loc='outside right upper', fontsize='small')
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110, metadata={'Software':None})
    plt.close(fig)
