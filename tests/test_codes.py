"`as_code`: a step as a program in plain torch."
import pytest, torch
import torch.nn.functional as F
from fastcore.test import expect_fail
from torch import nn
from cases import InNet, cases, kind, name
from fnnlite import CrossEntropy, GradError, Lin, Model, Module, Wrap
from fnnlite.core.module import through_forward
from fnnlite.core.record import tensors
from fnnlite.nets.containers import the_loss
from fnnlite.nets.pictures import resnet
from fnnlite.nets.texts import GPT, CharLSTM
from helpers import close, rand, tight

def program(model, *args, **kwargs):
    "What the model's program returns, run where there is no fnnlite"
    text = model.as_code(*args, **kwargs)
    assert 'fnnlite' not in text
    space,w = {},{n:t.detach().clone() for n,t in [*model.named_parameters(),*model.named_buffers()]}
    exec(text, space)
    loss,g = space['step'](w, *tensors((args,kwargs), openly=False))
    return loss,g,w

def assert_program(model, *args, tol=1e-9, **kwargs):
    "It has the loss and the gradients that autograd has by the forwards, and leaves the buffers that torch leaves"
    torch.manual_seed(3)
    loss,g,w = program(model, *args, **kwargs)
    torch.manual_seed(3)
    model.zero_grad()
    with through_forward(): want = the_loss(model(*args, **kwargs))
    want.backward()
    close(loss, want, **tight)
    params = {n:p.grad for n,p in model.named_parameters() if p.grad is not None}
    assert {*params}=={n for n in g if n in dict(model.named_parameters())}
    scale = max(p.abs().max() for p in params.values()) if params else 1
    for n,p in params.items(): assert (g[n]-p).abs().max()<=tol*scale, n
    for n,b in model.named_buffers(): close(w[n], b)

class Squared(Module):
    "A case as a net with a loss"
    def __init__(self, case): self.net = InNet(case)
    def forward(self, *inps):
        out = self.net(*inps)
        return (sum((o**2).sum() for o in tensors(out, openly=False)))

@pytest.mark.parametrize('case', [c for c in cases if kind(c) is not Wrap], ids=name)
def test_every_layer_and_loss(case):
    torch.manual_seed(0)
    assert_program(Model(Squared(case)).double(), *case.inps())

class Loop(nn.Module):
    "A loop over one layer, changes in place, a view written through"
    def __init__(self):
        super().__init__()
        self.lin,self.norm = nn.Linear(4, 4),nn.BatchNorm1d(4)
    def forward(self, x):
        h = x
        for i in range(3):
            h = self.norm(self.lin(h)).relu()*1
            h += x
            h[:,i] *= 2
            if h.sum()>0: h = 1-h/3
        return h.sum(0).tanh().max()*h.std()

class Rows(nn.Module):
    "A tensor written into three times, each time another one with a gradient"
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)
    def forward(self, x):
        out = torch.zeros(3, *x.shape, dtype=x.dtype)
        for i in range(3):
            x = self.lin(x)+x
            out[i] = x
        return F.gelu(out).norm()

nets = {
    'gpt': lambda: (Model(GPT(20, 8, 2, 2, 8, dropout=.1), CrossEntropy()), torch.randint(0, 20, (2, 8)), torch.randint(0, 20, (2, 8))),
    'resnet': lambda: (Model(resnet(), CrossEntropy()), rand(2, 1, 28, 28), torch.randint(0, 10, (2,))),
    'char lstm': lambda: (Model(CharLSTM(7, 4, 3), CrossEntropy()), torch.randint(0, 7, (2, 5)), torch.randint(0, 7, (2, 5))),
    'loop': lambda: (Model(Loop()), rand(5, 4)),
    'rows': lambda: (Model(Rows()), rand(5, 4)),
    'cnn': lambda: (Model(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Dropout(.3), nn.Flatten(),
        nn.Linear(338, 3)), nn.CrossEntropyLoss(label_smoothing=.1)), rand(2, 1, 28, 28), torch.randint(0, 3, (2,))),
    'transformer': lambda: (Model(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.MSELoss()), rand(2, 5, 8), rand(2, 5, 8))}

@pytest.mark.parametrize('net', nets)
def test_nets(net):
    torch.manual_seed(0)
    model,*inps = nets[net]()
    assert_program(model.double(), *inps)

def test_a_net_of_transformers():
    from transformers import GPT2Config, GPT2LMHeadModel
    config = GPT2Config(vocab_size=30, n_positions=16, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    ids = torch.randint(0, 30, (2, 9))
    assert_program(Model(GPT2LMHeadModel(config)).double(), input_ids=ids, labels=ids, tol=1e-6) # its scores are float32

def test_it_leaves_the_model_as_it_was():
    model,x,y = Model([nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3)], CrossEntropy()),torch.randn(5, 3),torch.tensor([0,1,2,0,1])
    loss,state = model(x, y),{k:v.clone() for k,v in model.state_dict().items()}
    drawn = torch.get_rng_state()
    model.as_code(x, y)
    assert torch.equal(drawn, torch.get_rng_state()) and model.training
    for k,v in model.state_dict().items(): assert torch.equal(v, state[k])
    assert all(p.grad is None for p in model.parameters()) and x.g is None
    model.backward() # over the call before
    assert model.out is loss and x.g is not None

def test_what_has_no_formula_is_refused():
    x = torch.randn(5, 3)
    with expect_fail(GradError, contains='has no formula'): Model([Lin(3, 2), Wrap(torch.sin)], CrossEntropy()).as_code(x, torch.zeros(5, dtype=torch.long))
    far = torch.randn(100)
    class Far(Module):
        def __init__(self): self.lin = Lin(3, 100)
        def forward(self, inp): return (self.lin(inp)*far.detach()).sum()
    with expect_fail(GradError, contains='a constant of shape (100,)'): Model(Far()).as_code(x)
