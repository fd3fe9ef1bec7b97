"Recurrent nets and attention of torch's, in a Model and as functions, against autograd in float64."
import copy
import pytest, torch, torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence, pad_sequence
from fnnlite import GradError, Model, const
from fnnlite.core.calls import recording
from fnnlite.core.record import floats
from fnnlite.core.rules import kernels
from fnnlite.train import compiled
from fnnlite.train.compiled import compile_step
from fnnlite.train.optimizers import SGD

def rand(*shape): return torch.randn(*shape, dtype=torch.float64)

@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)

def agree(f, net, *ts, bits=True):
    "`f(net, *ts)` recorded: outputs to the last bit, each gradient is autograd's."
    twin,refs = copy.deepcopy(net),[t.clone().requires_grad_() for t in ts]
    torch.manual_seed(1)
    want = floats(f(twin, *refs))
    ups = [torch.randn_like(o) for o in want]
    torch.autograd.backward(want, ups)
    torch.manual_seed(1)
    with recording() as rec: outs = floats(f(net, *ts))
    for o,w in zip(outs, want, strict=True): assert torch.equal(o, w) if bits else torch.allclose(o, w, rtol=1e-12, atol=1e-12)
    rec.backward(outs, ups)
    names = [*(f'input {i}' for i in range(len(ts))),*(n for n,_ in twin.named_parameters())]
    for name,t,r in zip(names, [*ts,*net.parameters()], [*refs,*twin.parameters()], strict=True):
        g = torch.zeros_like(r) if r.grad is None else r.grad
        torch.testing.assert_close(torch.zeros_like(r) if t.g is None else t.g, g, rtol=1e-9, atol=1e-11, msg=lambda m: f'{name}: {m}')
    return rec

kinds = {'lstm':nn.LSTM, 'gru':nn.GRU, 'tanh':nn.RNN, 'relu':lambda *a, **k: nn.RNN(*a, nonlinearity='relu', **k)}
each_kind = pytest.mark.parametrize('kind', kinds)
options = [{}, dict(bias=False), dict(num_layers=3), dict(bidirectional=True), dict(batch_first=True, num_layers=2),
    dict(num_layers=2, bidirectional=True, batch_first=True, dropout=.4), dict(num_layers=3, dropout=1.)]
def made(kind, **kw): return kinds[kind](3, 4, **kw).double()

def states(net, *batch):
    "First states for `net`"
    n = net.num_layers*(1+net.bidirectional)
    h = rand(n, *batch, net.proj_size or net.hidden_size)
    return (h,rand(n, *batch, net.hidden_size)) if isinstance(net, nn.LSTM) else (h,)
def run(net, x, *hx): return net(x, hx if len(hx)>1 else hx[0]) if hx else net(x)

@each_kind
@pytest.mark.parametrize('kw', options, ids=str)
def test_layers(kind, kw):
    net = made(kind, **kw)
    agree(run, net, rand(5, 2, 3), *states(net, 5 if net.batch_first else 2))
    net.zero_grad()
    agree(run, net.eval(), rand(5, 2, 3))
    net.zero_grad()
    agree(run, net.train(), rand(1, 1, 3)) # one step of one sequence
    net.zero_grad()
    agree(run, net, rand(5, 3), *states(net)) # no batch

@pytest.mark.parametrize('kw', [{}, dict(bias=False), dict(num_layers=2, bidirectional=True, batch_first=True, dropout=.4)], ids=str)
def test_projections(kw):
    net = nn.LSTM(3, 4, proj_size=2, **kw).double()
    agree(run, net, rand(5, 5, 3), *states(net, 5))
    net.zero_grad()
    agree(packed([5,3,1]), net, rand(5, 3, 3), *states(net, 3))

def packed(lengths, is_sorted=True, total=None):
    def f(net, x, *hx):
        first = net.batch_first
        p = pack_padded_sequence(x.transpose(0, 1) if first else x, lengths, first, enforce_sorted=is_sorted)
        out,last = run(net, p, *hx)
        return pad_packed_sequence(out, first, .5, total)[0],last
    return f

@each_kind
@pytest.mark.parametrize('kw', options, ids=str)
def test_packed(kind, kw):
    net = made(kind, **kw)
    agree(packed([6,4,4,1]), net, rand(6, 4, 3), *states(net, 4))
    net.zero_grad()
    agree(packed([2,5,1,5], is_sorted=False, total=7), net, rand(6, 4, 3), *states(net, 4))
    net.zero_grad()
    agree(packed([3]), net, rand(3, 1, 3))

@pytest.mark.parametrize('kw', [dict(), dict(batch_first=True), dict(batch_first=True, padding_value=2., padding_side='left')], ids=str)
def test_sequences_of_several_lengths(kw):
    ts = rand(2, 3),rand(4, 3),rand(1, 3)
    agree(lambda net, *ts: pad_sequence(ts, **kw), nn.Identity(), *ts)
    agree(lambda net, *ts: net(pack_sequence(ts, enforce_sorted=False))[0].data, made('gru'), *ts)

cells = {'lstm':nn.LSTMCell, 'gru':nn.GRUCell, 'tanh':nn.RNNCell, 'relu':lambda *a, **k: nn.RNNCell(*a, nonlinearity='relu', **k)}
@each_kind
@pytest.mark.parametrize('bias', [True,False])
@pytest.mark.parametrize('batch', [(2,),()])
def test_cells(kind, bias, batch):
    cell = cells[kind](3, 4, bias=bias).double()
    hx = [rand(*batch, 4) for _ in range(1+(kind=='lstm'))]
    agree(run, cell, rand(*batch, 3), *hx)
    cell.zero_grad()
    agree(lambda cell, x: cell(x), cell, rand(*batch, 3))
    def loop(cell, xs, *hx):
        outs = []
        for x in xs: # a cell used many times
            hx = cell(x, hx if len(hx)>1 else hx[0])
            hx = hx if kind=='lstm' else (hx,)
            outs.append(hx[0])
        return torch.stack(outs)
    cell.zero_grad()
    agree(loop, cell, rand(4, *batch, 3), *hx)

@each_kind
def test_part_of_it(kind):
    "Only the last state, only one output, constants and frozen weights; a layer used twice."
    net = made(kind, num_layers=2)
    hx = states(net, 2)
    agree(lambda net, x, *hx: run(net, x, *hx)[1], net, rand(5, 2, 3), *hx)
    net.zero_grad()
    agree(lambda net, x: net(x)[0][2], net, rand(5, 2, 3))
    net.zero_grad()
    net.weight_ih_l1.requires_grad_(False)
    net.bias_hh_l0.requires_grad_(False)
    agree(lambda net, x, *hx: net(net(const(x)*1., hx if len(hx)>1 else hx[0])[0][...,:3]*2)[0].sum() + x.sum(), net, rand(5, 2, 3), *hx)
    assert net.weight_ih_l1.grad is None

def test_numbers_that_the_rule_reads_stay():
    net = made('gru', num_layers=2)
    def f(n, x):
        out,h = n(x)
        return out.mul_(2)+h.sum()
    with recording() as rec: out = f(net, rand(5, 2, 3))
    with pytest.raises(GradError, match='changed in place'): rec.backward(out, torch.ones_like(out))


@pytest.mark.parametrize('kw', options, ids=str)
def test_oneDNN_and_the_formula(kw):
    "In float32 an LSTM has a kernel: to the last bit, it is what torch does."
    net = nn.LSTM(3, 4, **kw)
    hx = tuple(h.float() for h in states(net, 5))
    def grads(net):
        ts = [t.clone().requires_grad_() for t in (x,*hx)]
        net.zero_grad()
        torch.manual_seed(1)
        outs = floats(run(net, *ts))
        torch.manual_seed(2)
        torch.autograd.backward(outs, [torch.randn_like(o) for o in outs])
        return outs,[t.grad for t in (*ts,*net.parameters())]
    x = torch.randn(5, 5, 3)
    model = Model(copy.deepcopy(net))
    outs,want = grads(net)
    for kernels.on in (True,False):
        try: mine,got = grads(model)
        finally: kernels.on = True
        assert all(torch.equal(m, o) for m,o in zip(mine, outs))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


# Nets

class Chars(nn.Module):
    "A character model: embedding, recurrent layers, a head tied to the embedding"
    def __init__(self, kind, n=7, nh=6):
        super().__init__()
        self.emb,self.rnn,self.head = nn.Embedding(n, nh),kinds[kind](nh, nh, num_layers=2, batch_first=True, dropout=.3),nn.Linear(nh, n)
        self.head.weight = self.emb.weight
    def forward(self, x): return self.head(self.rnn(self.emb(x))[0]).flatten(0, 1)

def loss_and_grads(net, x, y, by):
    net.zero_grad()
    torch.manual_seed(3)
    loss = by(net, x, y)
    return loss,{n:p.grad.clone() for n,p in net.named_parameters()}

@each_kind
@pytest.mark.parametrize('mode', ['train','eval','lean'])
def test_character_model(kind, mode):
    net,x,y = Chars(kind).double(),torch.randint(7, (3, 5)),torch.randint(7, (15,))
    model = Model(net, nn.CrossEntropyLoss())
    net.train(mode!='eval')
    if mode=='lean': model.retain(False)
    def torchs(net, x, y):
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        return loss
    def ours(net, x, y):
        loss = model(x, y)
        loss.backward() if mode=='train' else model.backward()
        return loss
    want,wants = loss_and_grads(net, x, y, torchs)
    got,gots = loss_and_grads(net, x, y, ours)
    assert torch.equal(got, want)
    for n,g in wants.items(): torch.testing.assert_close(gots[n], g, rtol=1e-9, atol=1e-11, msg=lambda m: f'{n}: {m}')

@pytest.mark.parametrize('kind', ['lstm','gru'])
def test_compiled_step(kind):
    "As one graph: the weights are those of ordinary steps."
    net,x,y = Chars(kind).double().eval(),torch.randint(7, (3, 5)),torch.randint(7, (15,))
    ends = []
    for as_graph in (False,True):
        model = Model(copy.deepcopy(net), nn.CrossEntropyLoss())
        opt = SGD(model.parameters(), .1)
        step = compile_step(model, opt, compiler=False) if as_graph else None
        for _ in range(3):
            if as_graph: step(x, y)
            else:
                model(x, y)
                model.backward()
                opt.step()
                opt.zero_grad()
        ends.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)

def test_compiled_step_by_onednn(monkeypatch):
    "In float32 a graph has oneDNN's cells in it, and the weights are those of torch's own loop."
    if not torch.backends.mkldnn.is_available(): pytest.skip('this torch has no oneDNN')
    graphs = []
    monkeypatch.setattr(compiled, 'op_by_op', lambda gm, old=compiled.op_by_op: graphs.append(gm.code) or old(gm))
    net,x,y = Chars('lstm'),torch.randint(7, (3, 5)),torch.randint(7, (15,))
    ref,loss = copy.deepcopy(net.eval()),nn.CrossEntropyLoss()
    step,opt = compile_step(Model(net, loss), SGD(net.parameters(), .1), compiler=False),torch.optim.SGD(ref.parameters(), .1)
    for _ in range(3):
        step(x, y)
        opt.zero_grad()
        loss(ref(x), y).backward()
        opt.step()
    torch.testing.assert_close([*net.parameters()], [*ref.parameters()], rtol=1e-5, atol=1e-6)
    assert step.why_not is None and 'fnnlite.lstm_cell_backward' in graphs[0]

@each_kind
def test_in_half_precision(kind):
    net,x = made(kind, num_layers=2).bfloat16(),torch.randn(5, 2, 3).bfloat16()
    model = Model(net)
    model(x)[0].sum().backward()
    assert all(p.grad.dtype==torch.bfloat16 for p in net.parameters())
    net.float().zero_grad()
    try:
        with torch.autocast('cpu'): out = net(x.float())[0]
    except RuntimeError as e: pytest.skip(f"torch's own: {e}") # a processor without bfloat16
    out.float().sum().backward()
    want = [p.grad for p in net.parameters()]
    net.zero_grad()
    with torch.autocast('cpu'): out = Model(net)(x.float())[0]
    out.float().sum().backward()
    for p,w in zip(net.parameters(), want):
        assert p.grad.dtype==torch.float32 and (w-p.grad).norm()<.05*w.norm()


# Attention, as torch composes it

def attend(net, q, k, v, **kw): return net(q, k, v, **kw)
attention_options = [{}, dict(bias=False), dict(kdim=5, vdim=3), dict(add_bias_kv=True, add_zero_attn=True), dict(batch_first=True), dict(dropout=.3)]
@pytest.mark.parametrize('train', [True,False])
@pytest.mark.parametrize('need_weights', [True,False])
@pytest.mark.parametrize('kw', attention_options, ids=str)
def test_multi_head_attention(kw, need_weights, train):
    net = nn.MultiheadAttention(8, 2, **kw).double().train(train)
    q,k,v = rand(4, 4, 8),rand(4, 4, kw.get('kdim', 8)),rand(4, 4, kw.get('vdim', 8))
    agree(lambda net, *ts: net(*ts, need_weights=need_weights), net, q, k, v)
    if 'kdim' in kw: return
    mask = torch.triu(torch.ones(4, 4, dtype=torch.bool), 1)
    padding = torch.tensor([[False]*4,[False,True,False,True]]*2)
    net.zero_grad()
    agree(lambda net, x: net(x, x, x, key_padding_mask=padding, attn_mask=mask, need_weights=need_weights, average_attn_weights=False), net, q)

@pytest.mark.parametrize('train', [True,False])
@pytest.mark.parametrize('kw', [{}, dict(norm_first=True), dict(batch_first=True, activation='gelu', bias=False)], ids=str)
def test_transformer_layers(kw, train):
    kw = dict(d_model=8, nhead=2, dim_feedforward=12, dropout=.2, dtype=torch.float64)|kw
    net = nn.TransformerEncoderLayer(**kw).train(train)
    agree(lambda net, x: net(x), net, rand(4, 4, 8))
    net.zero_grad()
    padding = torch.tensor([[False]*4,[False,True,False,True]]*2)
    agree(lambda net, x: net(x, src_key_padding_mask=padding), net, rand(4, 4, 8))
    decoder = nn.TransformerDecoderLayer(**kw).train(train)
    agree(lambda net, x, m: net(x, m, tgt_mask=nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64)), decoder, rand(4, 4, 8), rand(4, 4, 8))
    stack = nn.TransformerEncoder(net, 2, enable_nested_tensor=False).train(train)
    agree(lambda net, x: net(x), stack, rand(4, 4, 8))


# CTC

ctc_options = [dict(), dict(reduction='sum'), dict(reduction='none', blank=2), dict(reduction='none', zero_infinity=True)]
@pytest.mark.parametrize('by_kernel', [True,False])
@pytest.mark.parametrize('kw', ctc_options, ids=str)
def test_ctc(kw, by_kernel):
    "Repeated labels, none at all, too few steps; labels as rows or in one row, lengths as numbers or tensors, no batch; unnormalised too."
    kernels.on = by_kernel
    try:
        labels,lengths = torch.tensor([[1,1,3,4],[4,3,1,1],[1,3,1,3],[1,3,3,3]]),(3,0,4,4)
        steps = 7,3,5,5 if 'zero_infinity' in kw else 7 # the last labels take 6
        in_a_row = torch.cat([l[:n] for l,n in zip(labels, lengths)])
        for targ in (labels, in_a_row):
            for kind in (tuple,torch.tensor):
                def loss(net, x): return F.ctc_loss(net(x), targ, kind(steps), kind(lengths), **kw)
                agree(loss, nn.LogSoftmax(-1), rand(7, 4, 5))
        agree(loss, nn.Identity(), rand(7, 4, 5).log_softmax(-1))
        agree(lambda net, x: F.ctc_loss(net(x), labels[0,:3], torch.tensor(6), torch.tensor(3), **kw), nn.LogSoftmax(-1), rand(7, 5))
    finally: kernels.on = True
