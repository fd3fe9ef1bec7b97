"`table`, `blame`, `draw` and the summary to a depth."
import re
from types import SimpleNamespace
from xml.etree import ElementTree
import pytest, torch
from torch import nn
from fnnlite import SGD, CrossEntropy, Learner, Lin, Model, Module, Mse, Relu
from fnnlite.nets.drawings import lanes
from fnnlite.nets.pictures import resnet
from fnnlite.nets.seeing import summary
from fnnlite.nets.texts import GPT
from fnnlite.train.watching import GradStats
from helpers import close, rand

def rows(table): return [re.split(r'\s{2,}', l.strip()) for l in table.split('\n')[2:]]
def small(): return Model([Lin(5, 4), Relu(), Lin(4, 3)], CrossEntropy()),torch.randn(8, 5),torch.randint(0, 3, (8,))

# table

def test_table_has_torchs_figures():
    torch.manual_seed(0)
    model,x,y = small()
    got = rows(model.table(x, y))
    h1 = (x@model.layers[0].w+model.layers[0].b).detach()
    h2 = h1.relu().requires_grad_()
    loss = nn.functional.cross_entropy(h2@model.layers[2].w+model.layers[2].b, y)
    g, = torch.autograd.grad(loss, h2)
    assert got[1]==['1', 'Relu (layers.1)', '(8, 4)', f'{h2.mean():.3g}', f'{h2.std(correction=0):.3g}', f'{(h2==0).float().mean():.0%}',
        f'{g.norm():.3g}', '128']
    assert got[0][3]==f'{h1.mean():.3g}' and len(got)==4

def test_table_leaves_the_model_as_it_was():
    model,x,y = small()
    model(x, y)
    model.backward()
    before,g = [p.grad.clone() for p in model.parameters()],x.g
    assert model.table()==model.table(x, y)
    assert all(torch.equal(p.grad, b) for p,b in zip(model.parameters(), before)) and x.g is g

def test_table_says_what_is_not_finite():
    model,x,y = small()
    x[0,0] = torch.inf
    got = rows(model.table(x, y))
    assert got[0][-1]=='output and gradient' or got[0][-1]=='output'

def test_table_of_a_lean_net_has_shapes_only_where_numbers_are_gone():
    model,x,y = small()
    model.retain(False)
    model(x, y)
    assert [r[1] for r in rows(model.table())]==['Lin (layers.0)', 'Relu (layers.1)', 'Lin (layers.2)', 'CrossEntropy (loss)']

def test_table_up_to_the_failing_call(capsys):
    with pytest.raises(RuntimeError, match='shapes cannot be multiplied'):
        Model([Lin(5, 4), Relu(), nn.Linear(3, 2)], Mse()).table(torch.randn(2, 5), torch.randn(2))
    assert [r[1] for r in rows(capsys.readouterr().out.strip('\n'))]==['Lin (layers.0)', 'Relu (layers.1)']

# blame

class Log(nn.Module):
    def forward(self, x):
        h = x.sigmoid()
        return (h-h.min()).log()

def test_blame_finds_the_first_output_and_its_line():
    net = Model(nn.Sequential(nn.Linear(3, 2), Log(), nn.Linear(2, 1)), nn.MSELoss())
    said = net.blame(torch.randn(4, 3), torch.randn(4, 1))
    assert 'Log (layers.1): Tensor.log, test_seeing.py, line ' in said and 'return (h-h.min()).log()' in said
    assert '1 of 8 numbers' in said and 'from 0 to' in said

class Root(nn.Module):
    def forward(self, x): return (x*x).sqrt()

def test_blame_finds_the_first_gradient():
    "sqrt(0) is finite, its derivative isn't."
    x = torch.randn(4, 3)
    x[0] = 0
    net = Model(nn.Sequential(nn.Linear(3, 2, bias=False), Root()), nn.MSELoss())
    said = net.blame(x, torch.ones(4, 2))
    assert 'Root (layers.1): Tensor.sqrt' in said and "the gradient that its rule gives 'inp'" in said

class Mean2(nn.Module):
    def forward(self, x):
        x = x+3000
        return (x**2).mean(0)-x.mean(0)**2

def test_blame_against_double_precision():
    net,x = Model(nn.Sequential(nn.Linear(3, 2), Mean2()), nn.MSELoss()),torch.randn(64, 3)
    assert net.blame(x, torch.ones(2)) is None
    said = net.blame(x, torch.ones(2), against=torch.float64)
    assert 'Tensor.sub' in said and 'from a run in torch.float64' in said
    fine = Model(nn.Sequential(nn.Linear(3, 2), nn.Dropout(), nn.Linear(2, 2)), nn.MSELoss())
    assert fine.blame(x, torch.ones(64, 2), against=torch.float64) is None # the same numbers are dropped

def test_blame_of_bfloat16_under_autocast():
    net,x = Model(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2)), nn.MSELoss()),torch.randn(64, 64)
    with torch.autocast('cpu', torch.bfloat16):
        assert 'Linear (layers.0)' in net.blame(x, torch.ones(64, 2), against=torch.float64)
        assert net.blame(x, torch.ones(64, 2), against=torch.float64, tol=.1) is None

def test_blame_when_the_other_run_takes_another_way():
    class Way(nn.Module):
        def forward(self, x): return x.exp().log() if x.dtype==torch.float64 else x
    net = Model(nn.Sequential(nn.Linear(3, 2), Way()), nn.MSELoss())
    assert 'took another way' in net.blame(torch.randn(4, 3), torch.ones(4, 2), against=torch.float64)

# draw

def drawn(model, *args, **kwargs):
    "The texts of a drawing, and how many arrows it has; it must be XML"
    svg = ElementTree.fromstring(model.draw(*args, **kwargs))
    tags = [e.tag.rpartition('}')[2] for e in svg.iter()]
    return [e.text for e in svg.iter() if e.tag.endswith('text')],tags.count('path')-1

def test_draw_shows_calls_shapes_gradients_and_skips():
    class Res(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(3, 3)
        def forward(self, x): return x+self.lin(x).relu()
    model = Model(Res(), nn.MSELoss())
    texts,arrows = drawn(model, torch.randn(2, 3), torch.randn(2, 3))
    assert texts[::2][:2]==['inp','targ'] and {'lin: Linear','relu','add'}<={*texts} and any(t.startswith('(2, 3)  |g| ') for t in texts)
    assert arrows==6 # inp to lin and add, lin to relu, relu to add, add to the loss, targ to the loss

def test_draw_folds_equal_blocks():
    ids = torch.randint(0, 20, (2, 8))
    model = Model(GPT(20, 8, 5, 2, 8), CrossEntropy())
    texts,_ = drawn(model, ids, ids)
    assert 'h.0: GPTBlock × 5' in texts and not any('h.1' in t for t in texts)
    texts,_ = drawn(model, ids, depth=1)
    assert 'h.0: GPTBlock × 5' in texts and 'attn: GPTAttention' not in texts

def test_draw_the_last_call():
    model,x,y = small()
    model(x, y)
    before = drawn(model)
    model.backward()
    after = drawn(model)
    assert not any('|g|' in t for t in before[0]) and sum('|g|' in t for t in after[0])==4 and before[1]==after[1]

def test_draw_a_loop_and_a_resnet():
    class Loop(Module):
        def __init__(self): self.lin,self.act = Lin(3, 3),Relu()
        def forward(self, x):
            for _ in range(3): x = self.act(self.lin(x))
            return x
    texts,arrows = drawn(Model(Loop()), torch.randn(2, 3))
    assert texts.count('lin: Lin')==3 and arrows==6
    drawn(Model(resnet(), CrossEntropy()), rand(2, 1, 28, 28).float())

def test_lanes_do_not_overlap():
    pairs = [(0,3), (1,4), (2,9), (4,8), (5,7), (0,9)]
    found = lanes(pairs)
    for p in pairs:
        for q in pairs:
            if p!=q and found[p]==found[q]: assert p[1]<=q[0] or q[1]<=p[0]

# summary to a depth

def test_summary_to_a_depth():
    gpt = GPT(20, 8, 3, 2, 8)
    text = summary(gpt, torch.zeros(1, 8, dtype=torch.long), depth=1)
    block = sum(p.numel() for p in gpt.h.parameters())
    assert [r.split()[0] for r in text.split('\n')[2:6]]==['wte','wpe','h.0','ln_f'] and f'{block:,}' in text and '× 3' in text
    assert f"{sum(p.numel() for p in gpt.parameters()):,} parameters" in text

# GradStats

def test_grad_stats_over_a_training():
    torch.manual_seed(0)
    model,x,y = small()
    watch = GradStats(every=2)
    learn = Learner(model, SimpleNamespace(train=[(x, y)]*5, valid=None), SGD(model.parameters(), lr=.1), cbs=watch)
    h = (x@model.layers[0].w+model.layers[0].b).detach().relu()
    learn.fit(1)
    rows = watch.stats['1 Relu (layers.1)']
    assert [r[0] for r in rows]==[0, 2, 4]
    close(torch.tensor(rows[0][1:4]), torch.stack([h.mean(), h.std(correction=0), (h==0).float().mean()]), rtol=1e-5, atol=1e-6)
    assert [len(ax.lines) for ax in watch.plot().axes]==[4]*4
    model.retain(False)
    with pytest.raises(ValueError, match='keeps no activations'): learn.fit(1)
    with pytest.raises(ValueError, match='inside a compiled step'):
        Learner(small()[0], learn.dls, lambda ps: SGD(ps, lr=.1), cbs=watch, compiled='graph').fit(1)
