"""Go through torch's own databases of samples: is each function's and each module's gradient, in a recording, autograd's?

    python scripts/coverage.py             # every sample; some minutes
    python scripts/coverage.py add nn.GRU  # of these functions and modules
    python scripts/coverage.py --page      # every sample, and the table nbs/coverage.md
    python scripts/coverage.py --break     # is each rule found out, if its gradients are off by a thousandth?

Float64, a random upstream gradient, 1e-9 of the largest, with torch's kernels and by the formulas alone, and with what
`saves` names alone. Prints what was right, what was refused (no rule, for most), what was skipped (complex numbers, or
autograd itself has no gradient), and what was wrong, and exits with 1 if anything was.
"""
import sys, warnings
from collections import Counter
from pathlib import Path
import torch
from torch.nn import UninitializedParameter
from torch.utils._pytree import tree_leaves, tree_map
from fnnlite import GradError, recording
from fnnlite.core.rules import NotSaved, kernels, rule_of

def database():
    "torch's functions with their samples, by name"
    from torch.testing._internal.common_methods_invocations import op_db
    return {f"{o.name}{'.' if o.variant_test_name else ''}{o.variant_test_name}":o for o in op_db}

def is_float(t): return isinstance(t, torch.Tensor) and t.is_floating_point()
def floats(o): return [t for t in tree_leaves(o) if is_float(t)]
def copies(o, grad): # laid out as they were
    return tree_map(lambda t: t.detach().clone(memory_format=torch.preserve_format).requires_grad_(grad) if is_float(t) else t, o)

tolerance = 1e-9 # of the largest
def close(name, got, want):
    got = torch.zeros_like(want) if got is None else got
    assert got.shape==want.shape and got.dtype==want.dtype, f"{name}: {tuple(got.shape)} {got.dtype}, expected {tuple(want.shape)} {want.dtype}"
    finite = want[want.isfinite()].abs()
    tol = tolerance*max(1., finite.max().item() if len(finite) else 1.)
    assert torch.allclose(got, want, rtol=1e-9, atol=tol, equal_nan=True), f"{name} is off by {(got-want).abs().nan_to_num().max():.2g}"

def compare(f, args, kwargs, lean=False)->str:
    "'right', or why it wasn't compared; AssertionError if it's wrong, or, `lean`, if a rule reads more than its `saves` names"
    if any(t.layout!=torch.strided for t in floats((args,kwargs))): return 'skipped: sparse'
    a,k = copies((args,kwargs), True)
    torch.manual_seed(0)
    try: ref = floats(f(*a, **k))
    except RuntimeError: return "skipped: torch's own error"
    ts,live = floats((a,k)),[i for i,o in enumerate(ref) if o.requires_grad]
    if any(o.layout!=torch.strided for o in ref): return 'skipped: sparse'
    if not live or not ts: return 'skipped: no gradient'
    ups = [torch.randn_like(ref[i]) for i in live]
    try: want = torch.autograd.grad([ref[i] for i in live], ts, ups, materialize_grads=True, allow_unused=True)
    except (RuntimeError,NotImplementedError): return 'skipped: no derivative in torch'
    a,k = copies((args,kwargs), False)
    torch.manual_seed(0)
    try:
        rec = recording(audit=False)
        rec.lean = lean
        with rec: outs = floats(f(*a, **k))
        pairs = [(outs[i],g) for i,g in zip(live, ups) if rec.is_output(outs[i])]
        if any(outs[i] is t for i in live for t in floats((a,k))): return 'skipped: gives back its input'
        if pairs: rec.backward(*map(list, zip(*pairs)))
    except (GradError,NotImplementedError) as e:
        assert not isinstance(e.__cause__, NotSaved), e
        return f"refused: {str(e).splitlines()[0].partition(': ')[0][:90]}"
    for i,(o,r) in enumerate(zip(outs, ref)): close(f'output {i}', o, r.detach())
    got = [t.__dict__.get('g') for t in floats((a,k))]
    if any(g is not None and g.isfinite().all() and w.isnan().any() for g,w in zip(got, want)): return 'skipped: autograd itself has nan'
    for i,(g,w) in enumerate(zip(got, want)): close(f'gradient {i}', g, w)
    return 'right'

def samples(op, most=None):
    "Arguments of `op` that torch's authors found worth testing"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for i,s in enumerate(op.sample_inputs('cpu', torch.float64, requires_grad=False)):
            if i==most: return
            yield (s.input,*s.args),s.kwargs

def check(op, most=None)->Counter:
    "What became of the samples of `op`, with kernels and without, and with less kept"
    global tolerance
    tolerance = 1e-7 if op.name=='nn.functional.hardsigmoid' else 1e-9 # torch's own kernel has 1/6 in float32
    if not op.supports_autograd or torch.float64 not in op.dtypes: return Counter(['skipped: no gradient'])
    seen,rule = Counter(),rule_of(op.op)
    ways = [(True,False),(True,True)]+[(False,True)]*(rule is None or rule.kernel is not None)
    for args,kwargs in samples(op, most):
        for kernels.on,lean in ways:
            try: seen[compare(op.op, args, kwargs, lean)] += 1
            except Exception as e: seen[f"WRONG: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"] += 1
            finally: kernels.on = True
    return seen

def off(f):
    "A rule, or its kernel, whose gradients are off"
    def wrong(out, *args, **kwargs):
        gs = f(out, *args, **kwargs) # a rule assigns them, a kernel returns them
        for t in floats((args,kwargs)):
            if gs is None and t.g is not None: t.g = t.g+1e-3
        return tree_map(lambda g: g+1e-3 if is_float(g) else g, gs)
    return wrong

def found_out(op, rule, part)->bool:
    "Does a sample of `op` show that `part` of its rule, 'grad' or 'kernel', is off?"
    right,kernels.on = getattr(rule, part),part=='kernel'
    setattr(rule, part, off(right))
    try: return any(s.startswith('WRONG') for s in verdicts(op))
    finally:
        setattr(rule, part, right)
        kernels.on = True

def verdicts(op):
    for args,kwargs in samples(op):
        try: yield compare(op.op, args, kwargs)
        except Exception as e: yield f'WRONG: {e}'

elsewhere = ['soft_margin_loss_grad'] # its samples ask for a gradient of the target, which torch lacks: tests/test_losses.py

def break_each(functions):
    "Print the rules that samples show to be off, and those that none does"
    found = {}
    for name,op in functions.items():
        rule = rule_of(op.op)
        if rule is None or not op.supports_autograd or torch.float64 not in op.dtypes: continue
        for part in ('grad','kernel'):
            if getattr(rule, part) is not None and not found.get((rule,part)):
                found[rule,part] = found_out(op, rule, part)
    missed = [f"{rule.grad.__name__} ({part})" for (rule,part),was in found.items() if not was and rule.grad.__name__ not in elsewhere]
    print(f"{len(found)-len(missed)} of {len(found)} rules and kernels found out; not: {', '.join(missed) or 'none'}")
    return 1 if missed else 0

def modules():
    "torch's modules with their samples, by name"
    from torch.testing._internal.common_modules import module_db
    return {o.name:o for o in module_db}

def check_module(info, most=None)->Counter:
    "What became of the samples of a module, in training and in evaluation: its inputs' gradients and its parameters'"
    seen = Counter()
    for training in (True,False):
        for s in info.module_inputs_func(info, 'cpu', torch.float64, False, training)[:most]:
            torch.manual_seed(0)
            made,given = s.constructor_input,s.forward_input
            if made is None or given is None: continue
            m = info.module_cls(*made.args, **made.kwargs).double().train(training)
            def f(params, *args, **kwargs): return torch.func.functional_call(m, params, args, kwargs)
            params = {n:p.detach() for n,p in m.named_parameters() if not isinstance(p, UninitializedParameter)}
            try: seen[compare(f, (params,*given.args), given.kwargs)] += 1
            except Exception as e: seen[f"WRONG: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"] += 1
    return seen

def page(every, counts):
    "The table of what has a rule, as Markdown"
    right = [n for n,c in counts.items() if c['right']]
    lines = ['# What has a rule', '',
        "> torch's functions and modules, and how many of torch's own samples have the gradient that autograd gives them", '',
        f"Made by `python scripts/coverage.py --page`, with torch {torch.__version__.partition('+')[0]}. {len(right)} of them have a gradient here. "
        'Each sample runs in double precision from a random upstream gradient, and is right where outputs and gradients are within 1e-9 of the largest. '
        "A function's samples run with everything kept, with no more kept than a rule reads, and, where torch has a kernel, by the formulas alone. "
        "*Refused* is an error by name, at the function's line. *Skipped* is what autograd itself has no gradient for, or what is complex or sparse.", '',
        '| function or module | rule | right | refused | skipped |', '| --- | --- | ---: | ---: | ---: |']
    for name,c in counts.items():
        rule = rule_of(getattr(every[name], 'op', None))
        room = rule.grad.__module__.removeprefix('fnnlite.') if rule else 'through its parts' if c['right'] else ''
        if c['right'] or c['refused']: lines.append(f"| `{name}` | {room} | {c['right']} | {c['refused']} | {c['skipped']} |")
    return '\n'.join(lines)+'\n'

def main(names):
    torch.set_num_threads(1)
    if '--break' in names: return break_each(database())
    to_page = '--page' in names
    names = [n for n in names if n!='--page']
    functions,total,right,counts = database(),Counter(),set(),{}
    every = {**functions, **modules()}
    for name in names or every:
        seen = (check if name in functions else check_module)(every[name])
        counts[name] = Counter()
        for what,n in seen.items(): counts[name][what.partition(':')[0]] += n
        for what,n in seen.items():
            total[what.partition(':')[0]] += n
            if not what.startswith(('right','skipped')): print(f"{name}: {n} × {what}", flush=True)
        if seen['right'] and not any(w.startswith('WRONG') for w in seen): right.add(name)
    if to_page: (Path(__file__).parent.parent/'nbs'/'coverage.md').write_text(page(every, counts), encoding='utf-8')
    print(f"{len(right)} functions and modules right; samples: {dict(total)}")
    return 1 if total['WRONG'] else 0

if __name__=='__main__': sys.exit(main(sys.argv[1:]))
