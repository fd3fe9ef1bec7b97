import torch

torch.set_num_threads(1) # the nets are small; on a busy machine two threads spend their time waiting for each other
import pytest
from fnnlite.core.rules import by_name, kinds, registry as rules

@pytest.fixture
def registry():
    "Rules that a test registers are gone afterwards."
    before,named = dict(rules),set(by_name)
    yield
    rules.clear(), rules.update(before), by_name.clear(), by_name.update(named), kinds.clear()
