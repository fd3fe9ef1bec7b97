"Every rule, against torch's own database of samples: a few of each function's here, all of them by scripts/coverage.py."
import importlib.util, warnings
from pathlib import Path
import pytest
from fnnlite.core.rules import rule_of

spec = importlib.util.spec_from_file_location('coverage_script', Path(__file__).parent.parent/'scripts'/'coverage.py')
spec.loader.exec_module(coverage := importlib.util.module_from_spec(spec))
shards = 8

@pytest.mark.parametrize('shard', range(shards))
def test_samples(shard):
    "Outputs and gradients are autograd's; whatever else is refused, and nothing wrong."
    ops,right = coverage.database(),set()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for name in list(ops)[shard::shards]:
            seen = coverage.check(ops[name], most=4)
            assert not [w for w in seen if w.startswith('WRONG')], (name, seen)
            if seen['right']: right.add(name)
    assert len(right)>35

def test_a_wrong_rule_is_found(monkeypatch):
    rule = rule_of(coverage.torch.sin)
    monkeypatch.setattr(rule, 'grad', lambda out, inp: setattr(inp, 'g', out.g*inp.cos()*1.0001))
    assert any(w.startswith('WRONG') for w in coverage.check(coverage.database()['sin'], most=4))

@pytest.mark.filterwarnings('ignore:enable_nested_tensor', 'ignore:reduction') # torch's own words
@pytest.mark.parametrize('shard', range(shards))
def test_samples_of_modules(shard):
    "torch's modules as they are, a few samples of each, in training and in evaluation."
    seen = {name:coverage.check_module(info, most=4) for name,info in list(coverage.modules().items())[shard::shards]}
    assert not [(name,w) for name,o in seen.items() for w in o if w.startswith('WRONG')]
    assert sum(o['right']>0 for o in seen.values())>=len(seen)-1
