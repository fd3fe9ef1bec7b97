"Every rule, against torch's own database of samples: a few of each function's here, all of them by scripts/coverage.py."
import ast, importlib.util, re, warnings
from pathlib import Path
import pytest
import fnnlite.ops
from fnnlite.core.rules import rule_of

spec = importlib.util.spec_from_file_location('coverage_script', Path(__file__).parent.parent/'scripts'/'coverage.py')
spec.loader.exec_module(coverage := importlib.util.module_from_spec(spec))
shards = 8

@pytest.mark.parametrize('shard,most', [*((i,2) for i in range(0, shards, 2)), *(pytest.param(i, 4, marks=pytest.mark.slow) for i in range(shards))])
def test_samples(shard, most):
    "Outputs and gradients are autograd's; whatever else is refused, and nothing wrong."
    ops,right = coverage.database(),set()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for name in list(ops)[shard::shards]:
            seen = coverage.check(ops[name], most)
            assert not [w for w in seen if w.startswith('WRONG')], (name, seen)
            if seen['right']: right.add(name)
    assert len(right)>35

def test_a_wrong_rule_is_found(monkeypatch):
    rule = rule_of(coverage.torch.sin)
    monkeypatch.setattr(rule, 'grad', lambda out, inp: setattr(inp, 'g', out.g*inp.cos()*1.0001))
    assert any(w.startswith('WRONG') for w in coverage.check(coverage.database()['sin'], most=2))

@pytest.mark.filterwarnings('ignore:enable_nested_tensor', 'ignore:reduction') # torch's own words
@pytest.mark.parametrize('shard', range(shards))
def test_samples_of_modules(shard):
    "torch's modules as they are, a few samples of each, in training and in evaluation."
    seen = {name:coverage.check_module(info, most=2) for name,info in list(coverage.modules().items())[shard::shards]}
    assert not [(name,w) for name,o in seen.items() for w in o if w.startswith('WRONG')]
    assert sum(o['right']>0 for o in seen.values())>=len(seen)-1

def by_torch(source):
    "The names in a room's source that take torch's derivative where a formula should stand: outside of functions called `...kernel`, and of `kernel=...`."
    found = []
    def look(node):
        if isinstance(node, ast.FunctionDef) and node.name.endswith('kernel') or isinstance(node, ast.keyword) and node.arg=='kernel': return
        name = getattr(node, 'id', None) or getattr(node, 'attr', None)
        if isinstance(name, str) and re.search('_backward|autograd|vjp|jvp|requires_grad', name): found.append(name)
        for child in ast.iter_child_nodes(node): look(child)
    look(ast.parse(source))
    return found

rooms = [f for f in sorted(Path(fnnlite.ops.__file__).parent.glob('*.py')) if f.stem not in ('wraps','routes')]
@pytest.mark.parametrize('room', rooms, ids=lambda f: f.stem)
def test_rules_are_formulas(room): assert by_torch(room.read_text())==[]

def test_a_rule_by_torch_is_found():
    rule = "def sin_grad(out, inp): inp.g = {}"
    assert by_torch(rule.format('out.g*inp.cos()'))==[]
    assert by_torch(rule.format('torch.autograd.grad(torch.sin(inp), inp, out.g)'))==['autograd']
    assert by_torch(rule.format('aten.silu_backward(out.g, inp)'))==['silu_backward']
    assert by_torch('gradient_of(f, kernel=lambda out, inp: aten.silu_backward(out.g, inp))')==[]
