"`Sequential`, `Model`, `predict` and the summary table."
import re
from collections import OrderedDict
import pytest, torch
from torch import nn
from fnnlite import Module, Add, Dropout, Flatten, Lin, Matmul, Relu, Tanh, CrossEntropy, Mse, Model, Sequential, const
from fnnlite.nets.seeing import evaluating, summary
from helpers import Lin64, assert_grads, close, rand


# Sequential

def test_sequential_is_a_list():
    a,b,c = Lin64(4, 3),Tanh(),Lin64(3, 2)
    m = Sequential(a, b, c)
    assert m[0] is a and m[-1] is c and len(m)==3 and list(m)==[a,b,c]
    assert type(m[1:]) is Sequential and list(m[1:])==[b,c] and list(m[::2])==[a,c]
    assert [n for n,_ in m.named_parameters()]==['0.w','0.b','2.w','2.b']
    x = rand(5, 4)
    close(m(x), torch.tanh(x@a.w+a.b)@c.w+c.b)
    close(m[1:](m[:1](x)), m(x))
    assert_grads(m, x)
    m.zero_grad()
    assert_grads(m[1:], rand(5, 3))

def test_sequential_grows_and_changes():
    m = Sequential(Lin64(4, 4))
    m.append(Tanh())
    m.insert(0, Relu())
    m[1] = Lin64(4, 4)
    m.extend([Lin64(4, 4), Tanh()])
    del m[2]
    assert [type(l) for l in m]==[Relu,Lin,Lin,Tanh]
    assert_grads(m, rand(5, 4))
    m.zero_grad()
    assert_grads(Sequential(m, Relu(), Sequential(m)), rand(5, 4)) # itself twice

def test_sequential_with_names():
    m = Sequential(OrderedDict(lin=Lin64(4, 3), act=Tanh()))
    assert list(m.state_dict())==['lin.w','lin.b'] and isinstance(m.act, Tanh)
    assert_grads(m, rand(5, 4))

def test_sequential_in_torchs_nets():
    m,x = nn.Sequential(Sequential(Lin64(4, 3), Tanh()), nn.Linear(3, 2, dtype=torch.float64)),rand(5, 4)
    m(x).sum().backward()
    w = m[0][0].w
    ref = w.detach().clone().requires_grad_()
    m[1](torch.tanh(x@ref+m[0][0].b)).sum().backward()
    close(w.grad, ref.grad)


# Model

class TwoIn(Module):
    def __init__(self): self.a,self.b,self.add = Lin64(4, 3),Lin64(2, 3),Add()
    def forward(self, x, z): return self.add(self.a(x), self.b(z))

def test_model_of_a_list_a_tuple_or_a_module():
    l,x,y = Lin64(4, 3),rand(5, 4),rand(5, 3)
    want = torch.nn.functional.mse_loss(x@l.w+l.b, y)
    for layers in ([l], (l,), l, Sequential(l), nn.Sequential(l)):
        m = Model(layers, Mse())
        close(m(x, y), want)
        assert_grads(m, x, y)
        m.zero_grad()

def test_model_with_several_inputs():
    m,x,z,y = Model(TwoIn(), Mse()),rand(5, 4),rand(5, 2),rand(5, 3)
    assert_grads(m, x, z, y)
    close(m.predict(x, z), x@m.layers.a.w+m.layers.a.b+z@m.layers.b.w+m.layers.b.b)

def test_model_whose_loss_is_a_module_of_ones_own():
    class Dot(Module):
        def forward(self, inp, targ): return (inp*targ).sum()
        def bwd(self, out, inp, targ): inp.g,targ.g = out.g*targ,out.g*inp
    assert_grads(Model([Lin64(4, 3)], Dot()), rand(5, 4), rand(5, 3))


# predict

def modes(m): return [k.training for k in m.modules()]

def test_predict():
    m,x = Model([Lin64(4, 3), Dropout(.9), Tanh()], Mse()),rand(5, 4)
    m.layers[0].eval() # of mixed modes
    before = modes(m)
    pred = m.predict(x)
    close(pred, torch.tanh(x@m.layers[0].w+m.layers[0].b)) # nothing dropped
    assert not pred.requires_grad and modes(m)==before and m.out is None and m.layers[0].out is None and not vars(x)
    m.eval()
    m.predict(x)
    assert not any(modes(m))

def test_predict_leaves_the_record():
    m,x,y = Model([Lin64(4, 3), Tanh()], Mse()),rand(5, 4),rand(5, 3)
    m(x, y)
    out = m.out
    m.predict(rand(2, 4))
    assert m.out is out
    m.backward()
    ref = m.layers[0].w.detach().clone().requires_grad_()
    torch.nn.functional.mse_loss(torch.tanh(x@ref+m.layers[0].b), y).backward()
    close(m.layers[0].w.g, ref.grad)

def test_modes_are_restored_after_an_exception():
    m = Model([Lin64(4, 3), Dropout()], Mse())
    m.layers[1].eval()
    before = modes(m)
    with pytest.raises(ValueError, match='inp has shape'): m.predict(rand(5, 7))
    assert modes(m)==before and torch.is_grad_enabled()
    with pytest.raises(ValueError, match='inp has shape'): summary(m.layers, rand(5, 7))
    assert modes(m)==before and not any(vars(k).get('_forward_hooks') or vars(k).get('_forward_pre_hooks') for k in m.modules())
    with pytest.raises(KeyError):
        with evaluating(m) as k:
            assert k is m and not any(modes(m)) and not torch.is_grad_enabled()
            raise KeyError
    assert modes(m)==before and torch.is_grad_enabled()


# The table

def table(s):
    "Rows and the last line: the cells between two or more spaces."
    lines = s.splitlines()
    assert lines[0].split()==['Layer','Output','shape','Parameters','Multiply-adds'] and set(lines[1])=={'-'}==set(lines[-2])
    return [re.split(r'\s{2,}', l.strip()) for l in lines[2:-2]],lines[-1]

def test_summary():
    m = Sequential(Flatten(), Lin(6, 50), Relu(), Dropout(), Lin(50, 1000))
    rows,foot = table(summary(m, torch.randn(8, 2, 3)))
    assert rows==[['0','Flatten','(8, 6)','0','0'], ['1','Lin','(8, 50)','350',f'{8*6*50:,}'], ['2','Relu','(8, 50)','0','0'],
        ['3','Dropout','(8, 50)','0','0'], ['4','Lin','(8, 1000)','51,000',f'{8*50*1000:,}']]
    assert foot==f"51,350 parameters, 0 of them frozen; {8*6*50+8*50*1000:,} multiply-adds"

class Reused(Module):
    "One layer twice, one weight as an argument."
    def __init__(self): self.l,self.act,self.mm,self.unused = Lin(4, 4),Tanh(),Matmul(),Lin(4, 9)
    def forward(self, x): return self.mm(self.l(self.act(self.l(x))), self.l.w)

def test_summary_counts_a_shared_weight_once():
    rows,foot = table(summary(Reused(), torch.randn(5, 4)))
    assert rows==[['l','Lin','(5, 4)','20','80'], ['act','Tanh','(5, 4)','0','0'], ['l','Lin','(5, 4)','0','80'], ['mm','Matmul','(5, 4)','0','80']]
    assert foot=="65 parameters, 0 of them frozen; 240 multiply-adds"
    a = Lin(4, 4)
    rows,foot = table(summary(Sequential(a, Lin(a.w, torch.zeros(4))), torch.randn(5, 4)))
    assert [r[3] for r in rows]==['20','4'] and foot.startswith('24 parameters')

def test_summary_of_frozen_parameters():
    m = Sequential(Lin(4, 5).freeze(), Lin(5, 2))
    assert table(summary(m, torch.randn(3, 4)))[1]=="37 parameters, 25 of them frozen; 90 multiply-adds"
    m.unfreeze()
    assert table(summary(m, torch.randn(3, 4)))[1].startswith("37 parameters, 0 of them frozen")

def test_summary_agrees_with_torchs_counter():
    "On a convolution of torch's, nested layers and several inputs."
    from torch.utils.flop_counter import FlopCounterMode
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(nn.ReLU(), nn.Flatten()), nn.Linear(8*36, 5))
    x = torch.randn(2, 3, 8, 8)
    with FlopCounterMode(display=False) as counter: net(x)
    rows,foot = table(summary(net, x))
    assert [r[0] for r in rows]==['0','1.0','1.1','2'] and sum(int(r[4].replace(',','')) for r in rows)*2==counter.get_total_flops()
    assert [int(r[3].replace(',','')) for r in rows]==[sum(p.numel() for p in m.parameters()) for m in (net[0],net[1][0],net[1][1],net[2])]
    rows,_ = table(summary(TwoIn(), rand(5, 4), rand(5, 2)))
    assert [r[:2] for r in rows]==[['a','Lin'],['b','Lin'],['add','Add']]

def test_summary_leaves_nothing_behind(capsys):
    m,x,y = Model([Lin(4, 3), Dropout(), Lin(3, 3).freeze(), Relu()], CrossEntropy()),torch.randn(5, 4),torch.tensor([0,1,2,0,1])
    m.layers[1].eval()
    m(x, y)
    m.backward()
    before = [({k:dict(v) if isinstance(v, dict) else v for k,v in vars(k).items()},k.training) for k in m.modules()]
    seen = [(p,p.g,p.clone()) for p in m.parameters()]
    m.summary(const(torch.randn_like(x)))
    assert table(capsys.readouterr().out.rstrip('\n'))[1]=="27 parameters, 12 of them frozen; 105 multiply-adds"
    assert [({k:dict(v) if isinstance(v, dict) else v for k,v in vars(k).items()},k.training) for k in m.modules()]==before
    assert all(p.g is g and torch.equal(p, v) for p,g,v in seen)
    w = m.layers[0].w.g.clone()
    m.backward() # the record is still there
    close(m.layers[0].w.g, 2*w)

def test_summary_of_one_layer_and_of_a_call_with_tuples():
    rows,foot = table(summary(Lin(4, 3), torch.randn(5, 4)))
    assert rows==[['Lin','(5, 3)','15','60']] and foot.startswith('15 parameters')
    class Split(Module):
        def forward(self, x): return x[:,:1],x[:,1:]
        def bwd(self, out, x): x.g = torch.cat([o.g for o in out], 1)
    assert table(summary(Sequential(Split()), torch.randn(5, 4)))[0][0][2]=='(5, 1) (5, 3)'
