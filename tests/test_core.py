"The rules of `.g`: right gradients, and errors where a gradient would be wrong or lost."
import copy, pickle, threading, weakref
from functools import partial
import pytest, torch
from torch import nn
from fnnlite import Module, Add, Concat, Dropout, Flatten, Lin, Matmul, Mul, Relu, Reshape
from fnnlite import Sigmoid, Softmax, Tanh, CrossEntropy, Mse, Model, Sequential, Wrap, GradError, const
from fnnlite.core.record import floats
from fnnlite.functional import lin_grad, softmax_grad
from cases import InNet, cases, name
from helpers import GivenBwd, Id, Lin64, Table, assert_grads, by_autograd, each_fault, no_input, rand, right

torch.manual_seed(0)


def net(): return Model([Lin64(4, 5), Tanh(), Lin64(5, 3)], Mse())
def batch(n=6): return rand(n, 4),rand(n, 3)


# The lesson, as it stands there

class LessonLin(Module):
    def __init__(self, w, b): self.w,self.b = w,b

    def forward(self, inp): return inp@self.w + self.b

    def bwd(self, out, inp):
        inp.g = out.g @ self.w.t()
        self.w.g = torch.einsum("bi,bj->ij", inp, out.g)
        self.b.g = out.g.sum(0)

class LessonRelu(Module):
    def forward(self, inp): return inp.clamp_min(0.)-0.5
    def bwd(self, out, inp): inp.g = (inp>0).float() * out.g

class LessonMse(Module):
    def forward (self, inp, targ): return (inp.squeeze() - targ).pow(2).mean()
    def bwd(self, out, inp, targ): inp.g = 2*(inp.squeeze()-targ).unsqueeze(-1) / targ.shape[0]

class LessonModel():
    def __init__(self, w1, b1, w2, b2):
        self.layers = [LessonLin(w1,b1), LessonRelu(), LessonLin(w2,b2)]
        self.loss = LessonMse()

    def __call__(self, x, targ):
        for l in self.layers: x = l(x)
        return self.loss(x, targ)

    def backward(self):
        self.loss.backward()
        for l in reversed(self.layers): l.backward()

def lesson():
    x_train,y_train = torch.randn(50, 7),torch.randn(50)
    w1,b1,w2,b2 = torch.randn(7, 5),torch.zeros(5),torch.randn(5, 1),torch.zeros(1)
    ts = [t.clone().requires_grad_() for t in (w1,b1,w2,b2,x_train)]
    loss = ((((ts[4]@ts[0]+ts[1]).relu()-.5)@ts[2]+ts[3]).squeeze()-y_train).pow(2).mean()
    return x_train,y_train,w1,b1,w2,b2,torch.autograd.grad(loss, ts)

def test_lesson_word_for_word():
    x_train,y_train,w1,b1,w2,b2,auto = lesson()
    w1.g = torch.ones(3) # left over from the pure functions of the lesson's first half
    w1.g,b1.g,w2.g,b2.g = [None]*4
    model = LessonModel(w1, b1, w2, b2)
    assert model.layers[0].w is w1
    for times in (1,2,3): # parameters accumulate, the input starts afresh
        model(x_train, y_train)
        model.backward()
        for t,a,n in zip((w1,b1,w2,b2,x_train), auto, (times,)*4+(1,)): torch.testing.assert_close(t.g, n*a, rtol=1e-4, atol=1e-5)
    w1.g,b1.g,w2.g,b2.g = [None]*4 # the lesson's way to zero
    model(x_train, y_train)
    model.backward()
    torch.testing.assert_close(w1.g, auto[0], rtol=1e-4, atol=1e-5)
    assert model.layers[1].args[0] is model.layers[0].out and w1.g is w1.grad

def test_lesson_second_backward_starts_afresh():
    x_train,y_train,w1,b1,w2,b2,auto = lesson()
    model = LessonModel(w1, b1, w2, b2)
    model(x_train, y_train)
    model.backward()
    model.backward()
    torch.testing.assert_close(x_train.g, auto[4], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(w2.g, 2*auto[2], rtol=1e-4, atol=1e-5)

def test_lesson_style_tensor_used_twice():
    "Layer by layer by hand, a tensor that feeds two modules gets the sum."
    a,b,add,mse,x,y = Lin64(4, 3),Lin64(4, 3),Add(),Mse(),rand(6, 4),rand(6, 3)
    for _ in range(2):
        mse(add(a(x), b(x)), y)
        for m in (mse,add,b,a): m.backward()
        ref = x.clone().requires_grad_()
        (ref@(a.w+b.w) - y).pow(2).mean().backward()
        torch.testing.assert_close(x.g, ref.grad)

def test_lesson_style_layer_used_twice_is_refused():
    l,mse,x = Lin64(1, 1),Mse(),rand(1, 1)
    mse(l(l(x)), x)
    mse.backward()
    with pytest.raises(GradError, match='Lin: it was called 2 times'): l.backward()

def test_lesson_module_in_model():
    x_train,y_train,w1,b1,w2,b2,auto = lesson()
    model = Model([LessonLin(w1,b1), LessonRelu(), LessonLin(w2,b2)], LessonMse())
    model(x_train, y_train)
    model.backward()
    for t,a in zip((w1,b1,w2,b2,x_train), auto): torch.testing.assert_close(t.g, a, rtol=1e-4, atol=1e-5)


# Right gradients

class Twice(Module):
    def __init__(self): self.l,self.act = Lin64(4, 4),Tanh()
    def forward(self, x): return self.l(self.act(self.l(x)))

class Loop(Module):
    def __init__(self): self.l,self.act,self.n = Lin64(4, 4),Tanh(),1
    def forward(self, x):
        for _ in range(self.n): x = self.act(self.l(x))
        return x

class If(Module):
    def __init__(self): self.a,self.b = Lin64(4, 4),Lin64(4, 4)
    def forward(self, x): return self.a(x) if x.sum()>0 else self.b(self.a(x))

class Recursive(Module):
    def __init__(self): self.l,self.act = Lin64(4, 4),Tanh()
    def forward(self, x, depth): return self.act(self.l(x)) if depth==0 else self.l(self(self.act(x), depth-1))

class Feeds(Module):
    "One tensor into several modules, residual sums among them."
    def __init__(self): self.a,self.b,self.c,self.add,self.mul,self.cat,self.last = Lin64(4, 4),Lin64(4, 4),Lin64(4, 4),Add(),Mul(),Concat(),Lin64(8, 2)
    def forward(self, x):
        h = self.a(x)
        r = self.add(self.add(self.b(h), h), x)
        return self.last(self.cat(self.mul(r, h), self.c(r)))

class Same(Module):
    "The same tensor as both arguments."
    def __init__(self): self.l,self.mul,self.add,self.mm = Lin64(4, 4),Mul(),Add(),Matmul()
    def forward(self, x):
        h = self.l(x)
        return self.mm(self.add(h, h), self.mul(h, h))

class Split(Module):
    "A layer with several outputs, nested in a dict."
    def forward(self, x): return {'lo': x[:,:2]*2, 'rest': (x[:,2:].exp(), x.sum())}
    def bwd(self, out, x): x.g = torch.cat([out['lo'].g*2, out['rest'][0].g*out['rest'][0]], 1) + out['rest'][1].g

class Several(Module):
    def __init__(self): self.l,self.split,self.m,self.act = Lin64(4, 4),Split(),Lin64(2, 2),Tanh()
    def forward(self, x):
        o = self.split(self.l(x))
        return self.m(o['lo']),self.act(o['rest'][0])

class Tied(Module):
    "One weight in two layers, and as an argument."
    def __init__(self):
        self.a = Lin64(4, 4)
        self.b,self.mm = Lin(self.a.w, self.a.b),Matmul()
    def forward(self, x): return self.mm(self.b(self.a(x)), self.a.w)

class Nested(Module):
    def __init__(self): self.parts,self.add = [Sequential(Twice(), Feeds()), Sequential(Lin64(4, 2), Sequential(Tanh()))],Add()
    def forward(self, x): return self.add(self.parts[0](x), self.parts[1](x))

@pytest.mark.parametrize('module', [Twice, If, Feeds, Same, Several, Tied, Nested])
def test_structures(module):
    m = module()
    for times in (1,2,3): assert_grads(m, rand(4, 4), times=1) or m.zero_grad()
    x = rand(4, 4)
    for times in (1,2): assert_grads(m, x, times=times)

def test_loop_changes_length():
    m = Loop()
    for n in (1,4,2,3):
        m.n = n
        assert_grads(m, rand(5, 4))
        m.zero_grad()

@pytest.mark.parametrize('depth', [0,1,4])
def test_recursion(depth): assert_grads(Sequential(Lin64(4, 4), Call(Recursive(), depth)), rand(5, 4))

class Call(Module):
    def __init__(self, m, *args): self.m,self.more = m,args
    def forward(self, x): return self.m(x, *self.more)

def test_keyword_arguments():
    class Kw(Module):
        def __init__(self): self.a,self.add = Lin64(4, 4),Add()
        def forward(self, x, skip=None): return self.add(self.a(x), b=skip)
    m,x,s = Kw(),rand(3, 4),rand(3, 4)
    m(x, skip=s)
    m.backward(torch.ones_like(s))
    torch.testing.assert_close(s.g, torch.ones_like(s))
    torch.testing.assert_close(x.g, torch.ones_like(s)@m.a.w.t())

def test_output_that_nothing_uses():
    class Unused(Module):
        def __init__(self): self.a,self.b,self.split = Lin64(4, 4),Lin64(4, 4),Split()
        def forward(self, x):
            self.b(x)
            return self.split(self.a(x))['lo']
    m = Unused()
    assert_grads(m, rand(3, 4))
    assert m.b.w.g is None and m.b.w.grad is None

def test_identity_outputs():
    "A module that hands its input, or a parameter, on as it is."
    class Net(Module):
        def __init__(self): self.id,self.l,self.add,self.table,self.mm = Id(),Lin64(4, 4),Add(),Table(),Matmul()
        def forward(self, x): return self.mm(self.add(self.id(self.id(x)), self.l(x)), self.table())
    assert_grads(Net(), rand(3, 4))
    assert_grads(Id(), rand(3, 4))
    assert_grads(Sequential(Dropout(.5).eval(), Lin64(4, 2)), rand(3, 4))

def test_one_tensor_returned_twice():
    class Both(Module):
        def forward(self, x):
            y = x*2
            return y,[y,x]
        def bwd(self, out, x): x.g = out[0].g*2 + out[1][0].g*2 + out[1][1].g
    class Net(Module):
        def __init__(self): self.l,self.both,self.a,self.b,self.add = Lin64(4, 4),Both(),Lin64(4, 4),Tanh(),Add()
        def forward(self, x):
            y,(z,w) = self.both(self.l(x))
            return self.add(self.add(self.a(y), self.b(z)), w)
    assert_grads(Net(), rand(3, 4))
    assert_grads(Both(), rand(3, 4))

def test_shared_gradient_tensors_stay_apart():
    "`a.g = out.g; b.g = out.g` is safe, and a parameter's .g has memory of its own for what clips in place."
    class Two(Module):
        def __init__(self): self.p,self.q = rand(3, 4),rand(3, 4)
        def forward(self, x): return x+self.p+self.q
        def bwd(self, out, x): x.g = self.p.g = self.q.g = out.g
    class Row(Module):
        def __init__(self): self.p = rand(12)
        def forward(self, x): return x+self.p.view(3, 4)
        def bwd(self, out, x):
            x.g = out.g
            self.p.g = out.g.view(-1)
    m = Sequential(Row(), Two(), Row(), Tanh())
    assert_grads(m, rand(3, 4))
    before = [p.g.clone() for p in m.parameters()]
    hidden = m[1].out.g.clone()
    torch.nn.utils.clip_grad_norm_(m.parameters(), .1)
    ratios = [(p.g/b).mean() for p,b in zip(m.parameters(), before)]
    torch.testing.assert_close(ratios, [ratios[0]]*len(ratios))
    torch.testing.assert_close(m[1].out.g, hidden)

def test_validation_forward_before_backward():
    m,(x,y) = net(),batch()
    m(x, y)
    m.predict(rand(9, 4))
    with torch.no_grad(): m(*batch(9))
    with torch.inference_mode(): m(*batch(9))
    m.layers[0](rand(2, 4))
    m.backward()
    for t,a in zip([x,y,*m.parameters()], by_autograd(m, x, y)): torch.testing.assert_close(t.g, a)

def test_inference_tensors_as_input():
    with torch.inference_mode(): x,y = batch()
    with pytest.raises(RuntimeError, match='Inference tensors'): net()(x, y) # as in torch: nobody would know that they were changed
    assert_grads(net(), x.clone(), y.clone())

def test_two_models_at_once():
    a,b = net(),net()
    b.layers[0] = a.layers[0] # and they share a layer
    (xa,ya),(xb,yb) = batch(),batch()
    a(xa, ya)
    b(xb, yb)
    a.backward()
    for t,g in zip([xa,ya], by_autograd(a, xa, ya)): torch.testing.assert_close(t.g, g)
    b.backward()
    ga,gb = by_autograd(a, xa, ya),by_autograd(b, xb, yb)
    torch.testing.assert_close(xb.g, gb[0])
    torch.testing.assert_close(a.layers[0].w.g, ga[2]+gb[2])

def test_two_threads():
    errors = []
    def train(seed):
        try:
            g = torch.Generator().manual_seed(seed)
            m = Nested()
            for _ in range(30):
                assert_grads(m, torch.randn(4, 4, generator=g, dtype=torch.float64))
                m.zero_grad()
        except BaseException as e: errors.append(e)
    # assert_grads seeds the global generator, which these nets don't draw from
    threads = [threading.Thread(target=train, args=(i,)) for i in range(2)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not errors

def test_threads_leave_torchs_fast_path_as_it_was():
    def run():
        l = Lin64(4, 4)
        for _ in range(200): l(rand(3, 4))
    threads = [threading.Thread(target=run) for _ in range(2)]
    for t in threads: t.start()
    for t in threads: t.join()
    on = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(True)
    assert on

def test_micro_batches():
    m,(x,y) = net(),batch(8)
    m(x, y)
    m.backward()
    whole = [p.g for p in m.parameters()]
    m.zero_grad()
    for i in (0,4):
        m(x[i:i+4], y[i:i+4])
        m.backward(torch.tensor(.5, dtype=torch.float64))
    for p,g in zip(m.parameters(), whole): torch.testing.assert_close(p.g, g)

def test_zeroing_and_what_was_there():
    m,(x,y) = net(),batch()
    opt = torch.optim.SGD(m.parameters(), lr=0.)
    auto = by_autograd(m, x, y)[2:]
    def zero_by_hand():
        for p in m.parameters(): p.g = None
    for zero in (m.zero_grad, opt.zero_grad, partial(opt.zero_grad, set_to_none=False), zero_by_hand):
        m(x, y)
        m.backward()
        for p,a in zip(m.parameters(), auto): torch.testing.assert_close(p.g, a)
        zero()
    m(x, y).backward() # autograd's adds to what is there, and the walk by hand does
    m(x, y)
    m.backward()
    m.layers[0].w.grad.add_(1)
    m(x, y)
    m.backward()
    for p,a,more in zip(m.parameters(), auto, (1,0,0,0)): torch.testing.assert_close(p.g, 3*a+more)

def test_upstream():
    l,x = Lin64(4, 3),rand(5, 4)
    l(x)
    with pytest.raises(GradError, match=r"Lin: backward\(\) from an output of shape \(5, 3\) needs"): l.backward()
    with pytest.raises(GradError, match=r"got gradients of \[\(\(3,\), torch.float32\)\], expected \[\(\(5, 3\), torch.float64\)\]"): l.backward(torch.ones(3))
    g = rand(5, 3)
    l.backward(g)
    first = x.g
    torch.testing.assert_close(first, g@l.w.t())
    l.out.g = 2*g
    l.backward()
    torch.testing.assert_close(x.g, 2*first)

def test_second_backward_with_output_used_inside():
    class Net(Module):
        def __init__(self): self.a,self.b = Lin64(4, 4),Lin64(4, 1)
        def forward(self, x):
            h = self.a(x)
            return h,self.b(h)
    m,x = Net(),rand(1, 4)
    h,y = m(x)
    m.backward([torch.zeros_like(h), torch.ones_like(y)])
    first = x.g
    m.backward([torch.zeros_like(h), torch.ones_like(y)])
    torch.testing.assert_close(x.g, first)

def test_what_a_walk_has_left_is_no_upstream():
    class Net(Module):
        def __init__(self): self.a,self.b = Lin64(4, 4),Lin64(4, 1)
        def forward(self, x):
            h = self.a(x)
            return h,self.b(h)
    m,l,x = Net(),Lin64(4, 4),rand(1, 4)
    h,y = m(x)
    m.backward([torch.zeros_like(h), torch.ones_like(y)])
    with pytest.raises(GradError, match='needs the gradient'): m.backward() # h.g came back to it through y
    l.backward(l(x))
    with pytest.raises(GradError, match='needs the gradient'): l.backward()


# What wants no gradient

def test_const_input_and_what_depends_on_it_alone():
    m = Model([Flatten(), Lin64(4, 3), Tanh()], Mse())
    x,y = rand(5, 2, 2),rand(5, 3)
    m(const(x), const(y))
    m.backward()
    assert x.g is None and y.g is None and m.layers[0].out.g is None
    torch.testing.assert_close(m.layers[1].w.g, by_autograd(m, x, y)[2])
    m(x, y)
    m.backward()
    assert x.g.shape==x.shape

def test_frozen_parameters_cost_nothing():
    from torch.utils.flop_counter import FlopCounterMode
    m,(x,y) = net(),batch()
    x,y = const(x),const(y)
    def flops():
        m(x, y)
        with FlopCounterMode(display=False) as c: m.backward()
        m.zero_grad()
        return c.get_total_flops()
    full = flops()
    m.layers[0].freeze()
    assert flops()==full - 2*6*4*5 - 2*6*5*3 # no weight gradient there, and nothing to pass back to it
    m(x, y)
    m.backward()
    assert m.layers[0].w.g is None and m.layers[0].w.grad is None and m.layers[2].w.g is not None
    assert not m.layers[0].parameters().__next__().requires_grad
    m.layers[0].unfreeze()
    assert flops()==full
    x = x.clone()
    assert flops()==full + 2*6*4*5
    m.freeze()
    m(x, y)
    m.backward()
    torch.testing.assert_close(x.g, by_autograd(m, x, y)[0])

def test_frozen_survives_copies():
    m = net()
    m.layers[0].freeze()
    for twin in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        twin(*batch())
        twin.backward()
        assert twin.layers[0].w.g is None and twin.layers[2].w.g is not None

def test_everything_constant():
    m = net().freeze()
    assert not m(*map(const, batch())).requires_grad
    with pytest.raises(GradError, match='nothing in its last call wants a gradient'): m.backward()


# It is a torch module

def test_nothing_hangs_on_copies():
    m,(x,y) = net(),batch()
    m(x, y)
    m.backward()
    m2 = Tied()
    for twin in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert all(p.grad is None and p.g is None for p in twin.parameters())
        assert twin.args is None and twin.layers[0].out is None
        assert_grads(twin, x, y)
        for p,q in zip(m.parameters(), twin.parameters()): assert torch.equal(p, q) and p is not q
    assert m.layers[0].w.g is not None and m.out is not None
    assert len(pickle.dumps(m)) < len(pickle.dumps(net()))+200
    m2(rand(4, 4))
    m2.backward(rand(4, 4))
    for twin in (copy.deepcopy(m2), pickle.loads(pickle.dumps(m2))): assert twin.a.w is twin.b.w and twin.a.w.g is None

def test_state_dict_and_moves(tmp_path):
    m,m2,(x,y) = net(),net(),batch()
    m(x, y)
    m.backward()
    assert [n for n,_ in m.named_parameters()]==list(m.state_dict())==['layers.0.w','layers.0.b','layers.2.w','layers.2.b']
    torch.save(m.state_dict(), tmp_path/'m.pt')
    m2.load_state_dict(torch.load(tmp_path/'m.pt', weights_only=True))
    assert torch.equal(m2.predict(x), m.predict(x))
    m.float()
    w = m.layers[0].w
    assert w.dtype==torch.float32 and w.g is w.grad and w.g.dtype==torch.float32
    m(x.float(), y.float())
    m.backward()
    m.to('meta')
    assert m(x.float().to('meta'), y.float().to('meta')).device.type=='meta'

def test_repr_modes_and_lists():
    m = net()
    assert 'Lin(4, 5, bias=True)' in repr(m) and repr(m).index('layers')<repr(m).index('loss')
    assert m.training and not m.eval().layers[1].training
    class Listed(Module):
        def __init__(self):
            self.blocks = []
            for _ in range(2): self.blocks.append(Lin64(4, 4))
            self.pair = (Tanh(),Relu())
        def forward(self, x):
            for l in reversed(self.blocks): x = self.pair[0](l(x))
            return x
    assert len(list(Listed().parameters()))==4
    assert_grads(Listed(), rand(3, 4))
    with pytest.raises(AttributeError, match="Bad: 'out' is the last call's"):
        class Bad(Module):
            def __init__(self): self.out = Lin(2, 2)
        Bad()

def test_parameters_and_buffers_of_init():
    class M(Module):
        def __init__(self, w):
            self.w,self.table,self.n,self._hidden = w,const(torch.ones(3)),torch.arange(3),torch.ones(2)
    w = torch.randn(3)
    m = M(w)
    assert m.w is w and isinstance(w, nn.Parameter) and w.requires_grad
    assert [n for n,_ in m.named_parameters()]==['w'] and [n for n,_ in m.named_buffers()]==['table']
    class Scale(Module):
        def __init__(self): self.s,self.mul,self.l = const(rand(4)),Mul(),Lin64(4, 4)
        def forward(self, x): return self.l(self.mul(x, self.s))
    assert_grads(Scale(), rand(3, 4))

def test_forward_hooks():
    "They look, they change what comes in or goes out, in place too; where a rule reads what they change, that is an error."
    m,(x,y),seen = net(),batch(),[]
    m.layers[0].register_forward_pre_hook(lambda mod,args: seen.append('pre'))
    h = m.layers[0].register_forward_hook(lambda mod,args,out: seen.append(out.shape))
    assert_grads(m, x, y)
    assert seen[:2]==['pre',(6,5)]
    h.remove()
    for register,hook in ((m.layers[0].register_forward_hook, lambda mod,args,out: out*2),
            (m.layers[0].register_forward_pre_hook, lambda mod,args: (args[0]*2,)),
            (m.layers[0].register_forward_hook, lambda mod,args,out: out.mul_(2)),
            (partial(m.layers[1].register_forward_hook, with_kwargs=True), lambda mod,args,kwargs,out: out.exp())):
        m.zero_grad()
        h = register(hook)
        assert_grads(m, x, y)
        h.remove()
    h = m.layers[1].register_forward_hook(lambda mod,args,out: out.mul_(2)) # the tanh's rule reads its output
    with pytest.raises(GradError, match='changed in place'): m(x, y).backward()
    h.remove()
    m.layers[0].register_full_backward_hook(lambda *a: None)
    with pytest.raises(GradError, match='backward hook'): m(x, y)

# Memory

def alive(ts): return sum(r() is not None for r in ts)

def test_released_when_called_again_and_by_free():
    m,(x,y) = net(),batch()
    m(x, y)
    m.backward()
    refs = [weakref.ref(l.out) for l in m.layers]
    assert alive(refs)==3
    m(x, y)
    assert alive(refs)==0
    refs = [weakref.ref(l.out) for l in m.layers]
    m.free()
    assert alive(refs)==0 and m.out is None and m.layers[0].args is None
    with pytest.raises(GradError, match='Model: there is no record of a forward'): m.backward()

def test_free_layer_by_layer():
    seen = []
    class Watch(Tanh):
        def bwd(self, out, inp):
            super().bwd(out, inp)
            seen.append(alive(refs))
    m = Model([Watch() for _ in range(4)], Mse())
    x,y = rand(3, 4),rand(3, 4)
    for free in (False,True):
        m(x, y)
        refs = [weakref.ref(l.out) for l in m.layers]
        m.backward(free=free)
    assert seen==[4,4,4,4]+[4,3,2,1] and alive(refs)==0 and m.out is None
    torch.testing.assert_close(x.g, by_autograd(m, x, y)[0])


# A wrong gradient is never silent

class Raw(Module):
    "A net whose forward is a function."
    def __init__(self, f): self.a,self.b,self.add,self.act,self.f = Lin64(4, 4),Lin64(4, 4),Add(),Sigmoid(),f
    def forward(self, x): return self.f(self, x)

class Box:
    def __init__(self, t): self.t = t
class Unbox(Module):
    def forward(self, box): return box.t*2
    def bwd(self, out, box): pass

def test_tensors_in_other_objects():
    "What goes into a layer so is refused; what comes out is where it is used."
    m = Raw(lambda m,x: m.add(m.b(x), Unbox()(Box(m.a(x)))))
    with pytest.raises(GradError, match='a Box hides tensors from the record'): m(rand(4, 4))
    assert_grads(Raw(lambda m,x: m.add(m.b(x), Box(m.a(x)).t)), rand(4, 4))
    box = Raw(lambda m,x: Box(m.a(x)))(rand(4, 4))
    with pytest.raises((GradError,RuntimeError), match='used outside'): box.t.sum().backward()
    with torch.no_grad(): Raw(lambda m,x: Box(m.a(x)))(rand(4, 4))

def raw_path(m, x): return m.b(m.a(x)*2)
def raw_side(m, x):
    h = m.a(x)
    return m.add(m.b(h), h*.5)
def raw_view(m, x): return m.b(m.a(x).view(2, -1, 4))
def raw_first(m, x): return m.b(x/255)
def raw_last(m, x): return m.a(x)*2
def raw_weight(m, x): return m.act(x@m.a.w)
def raw_getitem(m, x): return m.b(m.a(x)[:2])
def raw_detach(m, x): return m.b(m.a(x).detach())
def raw_nested(m, x): return m.b(Sequential(m.act)(m.a(x))+1)
def raw_outputs(m, x): return {'a': (m.a(x),x+1), 'b': x[0].exp()}
def raw_no_grad(m, x):
    with torch.no_grad(): h = m.a(x).exp()
    return m.b(x*h)
def raw_kept(m, x):
    m.kept = m.a(x)
    return m.b(m.kept.relu())+m.kept
def raw_torchs(m, x): return nn.functional.layer_norm(nn.ReLU()(m.a(x)), (4,), m.b.b)@m.b.w
def raw_branch(m, x): return m.a(x) if m.b(x).sum()>0 else m.b(m.a(x))
def raw_closure(m, x): return (lambda: m.b(m.act(x)))()
def raw_data_in(m, x): return m.add(m.a(x), const(torch.ones(4, dtype=torch.float64)))
def raw_made(m, x): return Lin(m.a.w, m.b.b)(m.b(x))
def raw_in_place(m, x): return m.b(m.add(m.a(x), x).mul_(2)) # no rule reads it
def raw_written(m, x):
    h = torch.zeros(4, 4, dtype=torch.float64)
    for i in range(4): h[i] = m.a(x[i])*i
    return m.b(h)

@pytest.mark.parametrize('f', [raw_path, raw_side, raw_view, raw_first, raw_last, raw_weight, raw_getitem, raw_detach, raw_nested, raw_outputs,
    raw_no_grad, raw_kept, raw_torchs, raw_branch, raw_closure, raw_data_in, raw_made, raw_in_place, raw_written], ids=lambda f: f.__name__)
def test_torch_between_layers(f):
    for lean in (False,True): assert_grads(Raw(f).retain(not lean), rand(4, 4))

def test_tensor_of_an_earlier_call():
    "Autograd knows where it came from, the record doesn't: as an argument it is right, by another door refused."
    m,x = Raw(lambda m,x: m.add(m.a(x), m.kept)),rand(4, 4)
    m.kept = m.a(rand(4, 4))
    with pytest.raises(GradError, match="from outside the record"): m(x)
    m.kept = const(m.kept)
    assert_grads(m, x)
    m,first = Raw(lambda m,x: m.add(m.a(x), x)),Lin64(4, 4)
    m(first(x)).sum().backward()
    torch.testing.assert_close(x.g, by_autograd(Sequential(first, m), x, g=[torch.ones(4, 4, dtype=torch.float64)])[0])

def in_place_out(m, x):
    h = m.act(m.a(x))
    o = m.b(h)
    h.add_(1)
    return o
def in_place_between(m, x): return m.b(m.act(m.a(x)).mul_(2))
def in_place_input(m, x):
    h = m.a(x)
    x.mul_(2)
    return m.b(h)
def in_place_view(m, x):
    h = m.act(m.a(x))
    h[0] = 0
    return m.b(h)
def in_place_read_by_torch(m, x):
    h = m.a(x)
    o = h.exp()
    o.add_(1)
    return m.b(h)*o
def in_place_through_data(m, x):
    h = m.act(m.a(x))
    h.data.mul_(2)
    return m.b(h)

@pytest.mark.parametrize('lean', [False,True])
@pytest.mark.parametrize('f', [in_place_out, in_place_between, in_place_input, in_place_view, in_place_read_by_torch, in_place_through_data],
    ids=lambda f: f.__name__)
def test_in_place_change_of_what_a_rule_reads_is_refused(f, lean):
    m = Model(Raw(f), Mse()).retain(not lean)
    with pytest.raises(GradError, match=r"in place"):
        m(rand(4, 4), rand(4, 4))
        m.backward()
    assert all(p.g is None and p.grad is None for p in m.parameters())

def test_weight_changed_inside():
    def f(m, x):
        h = m.b(m.a(x))
        with torch.no_grad(): m.b.w.mul_(2)
        return h
    m = Model(Raw(f), Mse())
    with pytest.raises(GradError, match="in place"):
        m(rand(4, 4), rand(4, 4))
        m.backward()

@pytest.mark.parametrize('lean', [False,True])
@pytest.mark.parametrize('case', cases, ids=name)
def test_numbers_changed_after_the_call(case, lean):
    "In any input, class indices too, in a parameter or the output: refused where the rule reads them, else right all the same."
    m,refused = case.make().retain(not lean),0
    ps = list(m.parameters())
    for i in range(len(inps := case.inps())+len(ps)+1):
        inps = [t.requires_grad_(t.is_floating_point()) for t in case.inps()]
        seed = torch.initial_seed()
        torch.manual_seed(seed)
        out = m(*inps)
        outs = floats(out)
        gs = [torch.randn_like(o) for o in outs]
        torch.manual_seed(seed)
        auto = by_autograd(m, *inps, g=gs)
        changed = [*inps, *ps, outs[0]][i]
        with torch.no_grad(): changed.copy_(changed.flip(0)+0)
        try: torch.autograd.backward(outs, gs)
        except RuntimeError as e:
            assert 'was changed in place after the call' in str(e) or type(m) is Wrap and 'inplace operation' in str(e) # torch's word
            refused += 1
        else:
            for t,a in zip([t for t in inps if t.requires_grad]+ps, auto, strict=True): torch.testing.assert_close(t.grad, a)
        m.zero_grad()
    assert refused or type(m) in (Add,Concat,Reshape,Flatten,Dropout)

def test_update_before_backward():
    for walk in (lambda m,loss: m.backward(), lambda m,loss: loss.backward()):
        m,(x,y) = net(),batch()
        loss = m(x, y)
        with torch.no_grad(): m.layers[2].w.add_(1)
        with pytest.raises(GradError, match=r"Lin \(layers.2\): parameter 'w', .*was changed in place"): walk(m, loss)

@each_fault
def test_faulty_bwd_is_refused_and_leaves_nothing(f, msg):
    m = Model([Lin64(4, 4), GivenBwd(f), Lin64(4, 3)], Mse())
    x,y = batch()
    m.layers[1].f = right
    m(x, y)
    m.backward()
    before = [p.g for p in m.parameters()]
    values = [g.clone() for g in before]
    m.layers[1].f = f
    m(x, y)
    with pytest.raises(GradError, match=r"GivenBwd \(layers.1\): .*" + msg): m.backward()
    assert all(p.g is g and p.grad is g and torch.equal(g, v) for p,g,v in zip(m.parameters(), before, values))
    assert x.g is None and m.layers[1].out.g is None

def test_one_tensor_under_two_names():
    class Two(Module):
        def __init__(self, w): self.u,self.v = w,w
        def forward(self, x): return x@self.u@self.v
        def bwd(self, out, x): pass
    with pytest.raises(GradError, match='two of its parameters are the same tensor'): Two(rand(4, 4))(rand(4, 4))

def test_no_forward_no_bwd():
    class Empty(Module): pass
    with pytest.raises(NotImplementedError, match='Empty has no forward'): Empty()(rand(2))
    with pytest.raises(GradError, match='Lin: there is no record of a forward'): Lin(2, 2).backward()
    with torch.no_grad(): (l := Lin64(4, 4))(rand(2, 4))
    with pytest.raises(GradError, match='no record of a forward'): l.backward()

def test_failed_forward_leaves_the_thread_clean():
    class Fails(Module):
        def __init__(self): self.l = Lin64(4, 4)
        def forward(self, x): raise KeyError(self.l(x))
    with pytest.raises(KeyError): Fails()(rand(2, 4))
    outside = rand(4, 4)
    with pytest.raises(GradError, match='from outside'): Raw(lambda m,x: m.a(outside))(rand(4, 4))
    assert_grads(Lin64(4, 4), rand(2, 4)*2) # at the top, inputs may come from anywhere

def test_what_a_failed_forward_had_made_may_be_used():
    "The net catches the error and goes on with an activation from inside: the calls that made it stay in the record."
    class Half(Module):
        def __init__(self): self.a = Lin64(4, 4)
        def forward(self, x):
            self.kept = self.a(x)
            raise KeyError
    class Net(Module):
        def __init__(self): self.inner,self.b = Half(),Lin64(4, 4)
        def forward(self, x):
            try: return self.inner(x)
            except KeyError: return self.b(self.inner.kept)
    assert_grads(Net(), rand(3, 4))

def test_layer_that_calls_modules_inside():
    "A bwd of one's own over parts that are modules, by their functions."
    class Block(Module):
        def __init__(self): self.a,self.act,self.b = Lin64(4, 4),Softmax(),Lin64(4, 4)
        def forward(self, x):
            h = self.act(self.a(x)*2)
            out = self.b(h)
            out.h = h
            return out
        saves = 'x h'
        def bwd(self, out, x):
            h,z = out.h.clone(),x.clone()
            lin_grad(out, h, self.b.w, self.b.b)
            softmax_grad(h, z)
            z.g *= 2
            up,z.g = z,2*z.g/2
            lin_grad(up, x, self.a.w, self.a.b)
    class Chain(Block): bwd = Module.bwd # and by the chain rule
    for block in (Block,Chain):
        m = Sequential(Lin64(4, 4), block(), Tanh())
        for times in (1,2): assert_grads(m, rand(3, 4), times=1) or m.zero_grad()


# Without what nobody reads

class Mixed(Module):
    "Layers that read their input, their output, both or neither; a tensor used twice, a layer used twice."
    def __init__(self):
        self.l,self.act,self.add,self.cat,self.mul,self.last = Lin64(4, 4),Tanh(),Add(),Concat(),Mul(),Lin64(8, 4)
    def forward(self, x):
        h = self.act(self.l(x))
        r = self.add(self.l(h), h)
        return self.last(self.cat(self.mul(r, r), self.mul(h, x)))

def lean_as_ever(net, *inps):
    "The same gradients, bit by bit, whatever was kept."
    def grads(on):
        net.retain(on)
        torch.manual_seed(3)
        outs = floats(net(*inps))
        net.backward([torch.randn_like(o) for o in outs])
        res = [*(o.clone() for o in outs), *(t.g.clone() for t in (*inps, *net.parameters()) if t.is_floating_point())]
        net.zero_grad()
        return res
    for on in (False,True,False): assert all(map(torch.equal, grads(on), grads(True)))

@pytest.mark.parametrize('case', cases, ids=name)
def test_lean_gradients(case): lean_as_ever(InNet(case), *case.inps())

@pytest.mark.parametrize('mid', [Mixed, Same, Feeds, Recursive, LessonRelu, lambda: Sequential(Concat(), Flatten()), lambda: Sequential(Id(), Mixed())],
    ids=lambda f: getattr(f, '__name__', ''))
def test_lean_gradients_of_nets(mid):
    layer = mid()
    args = (2,) if mid is Recursive else ()
    class Net(Module):
        def __init__(self): self.first,self.mid,self.last = Lin64(4, 4),layer,Lin64(2 if mid is Feeds else 4, 3)
        def forward(self, x): return self.last(self.mid(self.first(x), *args))
    lean_as_ever(Model(Net(), CrossEntropy()), rand(4, 4), torch.randint(0, 3, (4,)))

def test_lean_keeps_what_is_read_and_no_more():
    alive = {}
    class Watched(Module):
        def __init__(self): self.a,self.relu,self.b = Lin64(4, 5),Relu(),Lin64(5, 3)
        def forward(self, x):
            for n in ('a','relu','b'):
                x = getattr(self, n)(x)
                alive[n] = weakref.ref(x)
            return x
    net,(x,y) = Model(Watched(), Mse()),batch()
    loss = net.retain(False)(x, y)
    assert loss.ndim==0 and [n for n in alive if alive[n]() is not None]==['relu','b'] # `Lin` and `Mse` read their input, `Relu` its output
    net.backward()
    assert all(r() is None for r in alive.values()) and x.g is not None and net.out is None
    with pytest.raises(GradError, match='no record of a forward'): net.backward()

def test_lean_refuses_what_is_wrong_all_the_same():
    class Liar(Module):
        saves = ''
        def forward(self, inp): return inp**2
        def bwd(self, out, inp): inp.g = 2*inp*out.g
    net,(x,y) = Model([Lin64(4, 3), Liar()], Mse()),batch()
    net.retain(False)(x, y)
    with pytest.raises(GradError, match=r"Liar \(layers.1\): the rule reads .* which its `saves` doesn't name"): net.backward()
    net = Model([GivenBwd(no_input) if i else Lin64(4, 4) for i in range(2)], Mse())
    net.retain(False)(x, rand(6, 4))
    with pytest.raises(GradError, match='got no .g'): net.backward()

@pytest.mark.parametrize('last', [False,True])
def test_lean_change_of_what_nobody_reads(last):
    "Neither `Lin` nor `Relu` reads what lies between them."
    class Between(Module):
        def __init__(self): self.a,self.act = Lin64(4, 3),Relu()
        def forward(self, x):
            h = self.a(x)
            h.mul_(2)
            return h if last else self.act(h)
    for on in (True,False): assert_grads(Between().retain(on), rand(6, 4))
