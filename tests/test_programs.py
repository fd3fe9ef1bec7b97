"Random programs: each gradient is autograd's, or refused."
from collections import Counter
import pytest, torch
from fnnlite import gradient_of
from programs import check, kind, program, reason, shrink

@pytest.mark.parametrize('first', range(0, 400, 50))
def test_programs(first):
    "Nothing is wrong, no error but a refusal, and at least 80 % are run."
    seen = Counter()
    for seed in range(first, first+50):
        verdict,why = check(source := program(seed))
        seen[verdict] += 1
        assert verdict in ('right','refused'), f'program {seed}, {verdict}: {why}\n{shrink(source)}'
    assert seen['right']>=40, seen

def test_a_program_is_that_of_its_seed(): assert program(7)==program(7)!=program(8)

net = '''torch.manual_seed(0)
class Net(Module):
    def __init__(self): self.lin = Lin(4, 4)
    def forward(self, x):
        h = self.lin(x)
        unread = h.sum()
        {}
        return h*2
net = Net()
inputs = [rand(3, 4)]
way = Way(kind='walk', formulas=True)
'''

@pytest.mark.parametrize('line,verdict,said', [
    ('h = h.sin()','right',''), ('h = h.exp()','wrong','is off by'), ('h = h@h','invalid','shapes'),
    ('h = torch.special.airy_ai(h)+h','refused','no gradient rule'),
    ('h = h.cos()','crash','ZeroDivision')], ids=lambda o: o[:12])
def test_verdicts(registry, line, verdict, said):
    "Where one rule is wrong, and one is broken."
    gradient_of(torch.exp, saves='out')(lambda out, inp: setattr(inp, 'g', 1.000001*out.g*out))
    gradient_of(torch.cos)(lambda out, inp: 1/0)
    got,why = check(source := net.format(line))
    assert got==verdict and said in why, why
    if verdict=='wrong':
        short = shrink(source)
        assert 'unread' not in short and line in short and kind(short)=='walk'

def test_reasons_leave_out_what_differs():
    a,b = (f"Net (p{i}): F.gelu: argument 'inp', a tensor of shape ({i}, 4), was changed: clone()"
        for i in (1,2))
    assert reason(a)==reason(b)=="argument '...', a tensor of shape (), was changed"
