"Programs whose gradient could be wrong without a word: each is right now, or refused by name."
import collections, copy, dataclasses, types
import numpy as np, pytest, torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from fnnlite import Add, GradError, Lin, Model, Module, Relu, Tanh, check_grads, gradient_of, recorded, recording
from helpers import Lin64, close, rand, tight

def ones(*shape): return torch.ones(*shape, dtype=torch.float64)
both = pytest.mark.parametrize('nodes', [False,True])
def by_torch(f, *ts):
    "The gradients of `f(*copies of ts)`."
    ts = [t.detach().clone().requires_grad_() for t in ts]
    return torch.autograd.grad(f(*ts), ts)


# A layer that reads what isn't its argument

@dataclasses.dataclass
class Box: h:object
class Slot:
    __slots__ = ('h',)
    def __init__(self, h): self.h = h
hides = dict(deque=lambda h: collections.deque([h]), set=lambda h: {h}, frozenset=lambda h: frozenset([h]), values=lambda h: {'a': h}.values(),
    proxy=lambda h: types.MappingProxyType({'a': h}), slot=Slot, box=lambda h: Box([h]), namespace=lambda h: types.SimpleNamespace(h=h),
    generator=lambda h: (o for o in [h]), closure=lambda h: lambda: h)
def opened(c):
    if callable(c): return c()
    if isinstance(c, types.MappingProxyType): return c['a']
    h = c.h if hasattr(c, 'h') else next(iter(c))
    return h[0] if isinstance(h, list) else h

class Times(Module):
    def forward(self, x, c): return x*opened(c)
    def bwd(self, out, x, c): x.g = out.g*opened(c)
class Hiding(Module):
    def __init__(self, hide): self.a,self.b,self.times,self.hide = Lin64(4, 4),Lin64(4, 4),Times(),hide
    def forward(self, x): return self.times(self.a(x), self.hide(self.b(x)))

@both
@pytest.mark.parametrize('hide', hides)
def test_arguments_in_containers_that_are_not_opened(hide, nodes):
    with pytest.raises(GradError, match='argument|hides'): Hiding(hides[hide]).as_nodes(nodes)(rand(5, 4))

@pytest.mark.parametrize('hide', hides)
def test_a_recorded_function_gets_such_a_container(hide, registry):
    @recorded
    def times(x, c): return x*opened(c)
    @gradient_of(times)
    def times_grad(out, x, c): x.g = out.g*opened(c)
    w,x = rand(4, 4),rand(5, 4)
    with pytest.raises(GradError, match='argument|hides'), recording(): times(x@w, hides[hide](x@w))

shelf = {}
places = dict(attribute=(lambda m, h: setattr(m, 'h', h), lambda m: m.h), inside=(lambda m, h: setattr(m.box, 'h', h), lambda m: m.box.h),
    deque=(lambda m, h: m.queue.append(h), lambda m: m.queue[-1]), kid=(lambda m, h: setattr(m.kid, 'h', h), lambda m: m.kid.h),
    elsewhere=(lambda m, h: shelf.update(h=h), lambda m: shelf['h']))
class Held(Module):
    def __init__(self, get): self.get,self.box,self.queue,self.kid = get,types.SimpleNamespace(),collections.deque(),Relu()
    def forward(self, x): return x*self.get(self)
    def bwd(self, out, x): x.g = out.g*self.get(self)

@both
@pytest.mark.parametrize('place', places)
def test_what_a_layer_finds_elsewhere(place, nodes):
    put,get = places[place]
    class Net(Module):
        def __init__(self): self.a,self.b,self.held = Lin64(4, 4),Lin64(4, 4),Held(get)
        def forward(self, x):
            put(self.held, self.b(x))
            return self.held(self.a(x))
    with pytest.raises(GradError, match='argument'): Net().as_nodes(nodes)(rand(5, 4))

@both
def test_a_parameter_that_is_not_the_layers(nodes):
    w = nn.Parameter(rand(4, 4))
    class L(Module):
        def forward(self, x): return x@w
        def bwd(self, out, x): x.g = out.g@w.t()
    with pytest.raises(GradError, match='argument'): L().as_nodes(nodes)(rand(5, 4).requires_grad_())


# State that changes between forward and backward

class State(Module):
    k = 2. # of the class, until an instance has its own
    def __init__(self, get): self.get,self.own,self.list,self.dict,self.array = get,2.,[2.],{'k': 2.},np.array(2.)
    def __post_init__(self, get):
        super().__post_init__()
        self.kid,self.mask,self.cfg = Relu(),torch.tensor(2.),types.SimpleNamespace(k=2.)
        self.kid.k = 2.
    def forward(self, x): return x*self.get(self)
    def bwd(self, out, x): x.g = out.g*self.get(self)
    def change(self):
        self.k = self.own = self.list[0] = self.dict['k'] = self.kid.k = self.cfg.k = 5.
        self.array[...] = 5.
        self.mask.fill_(5.)
states = dict(class_=lambda m: m.k, own=lambda m: m.own, list=lambda m: m.list[0], dict=lambda m: m.dict['k'], array=lambda m: float(m.array),
    kid=lambda m: m.kid.k, tensor=lambda m: m.mask, namespace=lambda m: m.cfg.k)

@both
@pytest.mark.parametrize('state', states)
def test_state_that_bwd_reads_was_changed(state, nodes):
    m,x = State(states[state]).as_nodes(nodes),rand(3).requires_grad_()
    m(x).sum().backward()
    close(x.grad, 2*ones(3), **tight)
    loss = m(x).sum()
    m.change()
    with pytest.raises(GradError, match='changed after the call'): loss.backward()
    x.grad = None
    m(x).sum().backward()
    close(x.grad, 5*ones(3), **tight)

class Overridden(Module):
    k = 1.
    def __init__(self): self.k,self.lin,self.act = 3.,Lin64(3, 3),lambda k: 2*k
    def act(self, k): return k
    def forward(self, x): return self.lin(x)*self.act(self.k)
    def bwd(self, out, x):
        h = out.detach()
        h.g = out.g*self.act(self.k)
        self.lin.bwd(h, x)

@pytest.mark.filterwarnings('ignore:<class .torch.autograd.function.Function.> should not be:DeprecationWarning') # torch's own, as it traces
@pytest.mark.parametrize('how', ['record','nodes','compiled'])
def test_an_instances_own_attribute_under_a_name_of_its_class(how):
    m,x = Overridden().as_nodes(how=='nodes'),rand(2, 3).requires_grad_()
    (torch.compile(m, backend='aot_eager', fullgraph=True) if how=='compiled' else m)(x).sum().backward()
    close(x.grad, (6*ones(2, 3)@m.lin.w.t()).detach(), **tight)

@both
def test_a_layer_inside_walked_twice_by_one_bwd(nodes):
    class Twice(Module):
        def __init__(self, reset): self.lin,self.reset = Lin64(4, 4),reset
        def forward(self, x):
            h = self.lin(x)
            out = self.lin(h)
            out.h = h
            return out
        def bwd(self, out, x):
            h = out.h
            self.lin.bwd(out, h)
            w,b = self.lin.w.g,self.lin.b.g
            if self.reset: self.lin.w.g = self.lin.b.g = None
            self.lin.bwd(h, x)
            if self.reset:
                self.lin.w.g = self.lin.w.g+w
                self.lin.b.g = self.lin.b.g+b
    x = rand(5, 4).requires_grad_()
    with pytest.raises(GradError, match='second time'): Twice(False).as_nodes(nodes)(x).sum().backward()
    m = Twice(True).as_nodes(nodes)
    m(x).sum().backward()
    close([m.lin.w.g, m.lin.b.g], by_torch(lambda w, b: ((x.detach()@w+b)@w+b).sum(), m.lin.w, m.lin.b), **tight)


# `saves` that leaves out what is read

class Square(Module):
    saves = 'out'
    def forward(self, x): return x*x
    def bwd(self, out, x): x.g = 2*x*out.g
class Step(Module):
    saves = ''
    def forward(self, x): return x.relu()
    def bwd(self, out, x): x.g = out.g*(out>0)

@pytest.mark.parametrize('layer', [Square,Step])
def test_a_rule_that_reads_what_it_does_not_save(layer):
    m,x = layer().retain(False),rand(5).requires_grad_()
    loss = m(x).sum()
    with pytest.raises(GradError, match=f'{layer.__name__}.*saves'): loss.backward()
    with pytest.raises(GradError, match='saves'): check_grads(layer(), rand(5), show=False)


# Outputs, and what is left behind

@pytest.mark.parametrize('which', [0,1])
def test_outputs_that_share_memory_changed_outside(which):
    class Net(Module):
        def __init__(self): self.lin = Lin64(4, 3)
        def forward(self, x):
            h = self.lin(x)
            return h,h[:,-1]
    outs = Net()(rand(5, 4))
    outs[which].div_(3)
    with pytest.raises(GradError, match='changed in place'): (outs[0].sum()+outs[1].square().sum()).backward()

class Aside(Module):
    "Leaves a penalty where nobody looks."
    def __init__(self, put): self.a,self.b,self.put,self.box,self.queue = Lin64(4, 4),Lin64(4, 1),put,types.SimpleNamespace(),collections.deque()
    def forward(self, x):
        h = self.a(x)
        self.put(self, h.square().mean())
        return self.b(h)
asides = dict(box=(lambda m, v: setattr(m.box, 'v', v), lambda m: m.box.v), queue=(lambda m, v: m.queue.append(v), lambda m: m.queue[-1]),
    elsewhere=(lambda m, v: shelf.update(v=v), lambda m: shelf['v']), of_class=(lambda m, v: setattr(Aside, 'v', v), lambda m: m.v))

@pytest.mark.parametrize('lean', [False,True])
@pytest.mark.parametrize('aside', asides)
def test_what_a_forward_leaves_where_nobody_looks(aside, lean):
    put,get = asides[aside]
    m = Aside(put).retain(not lean)
    out = m(rand(5, 4))
    with pytest.raises(GradError, match='used outside'): (out.sum()+get(m)).backward()

def test_g_of_an_output_changed_in_place():
    a,b = Lin64(4, 4),Lin64(4, 1)
    h = a(rand(5, 4))
    h.mul_(2)
    b(h).sum().backward()
    assert h.g is None
    h = a(rand(5, 4)).mul_(2)
    b(h).sum().backward()
    assert h.g is None

def test_an_encoder_walked_before_all_its_heads():
    enc,a,b,x = Lin64(4, 3),Lin64(3, 1),Lin64(3, 1),rand(5, 4)
    h = enc(x)
    a(h),b(h)
    a.backward(ones(5, 1))
    enc.backward()
    with pytest.raises(GradError, match='walked back already'): b.backward(ones(5, 1))
    assert b.w.g is None

def test_penalties_on_gradients_between_nodes():
    m,x = Model([Lin64(4, 3), Tanh(), Lin64(3, 1)]).as_nodes(),rand(5, 4).requires_grad_()
    with pytest.raises(GradError, match='create_graph'): torch.autograd.grad(m(x).sum(), x, create_graph=True)


@pytest.mark.parametrize('of', [lambda x: x, lambda x: x*3], ids=['input','output'])
def test_changed_by_what_the_record_cannot_see(of):
    class Net(Module):
        def forward(self, x):
            h = of(x)
            y = h*2
            with torch._C.DisableTorchFunction(): h.mul_(2) # as an extension in C++ would
            return (y+h*3).sum()
    with pytest.raises(GradError, match='changed in place after the record met it'): Net()(rand(3))


def test_a_mark_that_was_copied_to_another_tensor():
    x = rand(3)
    with recording() as rec:
        h,other = x*2,rand(3)
        vars(other).update(vars(h))
        loss = (other*3).sum()
    rec.backward(loss)
    assert x.g is None or not x.g.any()
    close(other.g, 3*ones(3), **tight)


# Gradients changed in place by `before` and `after`

@pytest.mark.parametrize('which', ['before','after'])
def test_gradients_changed_in_place_on_the_way(which):
    class Net(Module):
        def __init__(self): self.a,self.b,self.add = Tanh(),Tanh(),Add()
        def forward(self, x): return self.add(self.a(x), self.b(x))
    m = Net()
    m(rand(5, 4))
    def change(c):
        if c.path=='Add (add)': (c.out if which=='before' else c.args[0]).g.mul_(2)
    with pytest.raises(GradError, match=f'`{which}` changed .* in place'): m.backward(ones(5, 4), **{which: change})


# Parameters that share memory

class Shares(Module):
    def __init__(self): self.w,self.v = nn.Parameter(rand(3, 3)),None
    def __post_init__(self):
        super().__post_init__()
        self.v = nn.Parameter(self.w.detach().t())
    def forward(self, x): return x@self.w@self.v

def test_parameters_that_share_memory_as_nodes_and_when_checked():
    with pytest.raises(GradError, match='share their memory'): Shares().as_nodes()
    with pytest.raises(GradError, match='share their memory'): check_grads(Shares(), rand(2, 3), show=False)


# What can't be recorded says so

class Inside(Module):
    def __init__(self, f): self.lin,self.f = Lin64(4, 4),f
    def forward(self, x): return self.f(self.lin, x)
refused = dict(grad=(lambda lin, x: torch.autograd.grad(lin(x).sum(), x, create_graph=True)[0], 'grad differentiates .*Wrap'),
    backward=(lambda lin, x: lin(x).sum().backward(), 'backward differentiates .*Wrap'),
    reentrant=(lambda lin, x: checkpoint(lin, x, use_reentrant=True), 'use_reentrant=False'),
    deepcopy=(lambda lin, x: copy.deepcopy(lin(x)), 'deepcopy.*detach'))

@pytest.mark.parametrize('how', refused)
def test_refused_inside_a_forward(how):
    f,words = refused[how]
    with pytest.raises(GradError, match=words): Inside(f)(rand(5, 4).requires_grad_()).sum().backward()

def test_parts_under_torch_compile_run_uncompiled_in_a_record():
    part = nn.Linear(4, 4, dtype=torch.float64)
    class Net(Module):
        def __init__(self): self.lin,self.part = Lin64(4, 4),torch.compile(part, backend='eager')
        def forward(self, x): return self.part(self.lin(x))
    net,x = Net(),rand(5, 4)
    net(x).square().sum().backward()
    f = lambda x, w, v: (nn.functional.linear(x@w+net.lin.b.detach(), v, part.bias.detach())**2).sum()
    close([x.g, net.lin.w.g, part.weight.grad], by_torch(f, x, net.lin.w, part.weight), **tight)

def test_after_a_failed_walk_the_other_way_is_open():
    fail = [True]
    class Bad(Module):
        def forward(self, x): return x*2
        def bwd(self, out, x):
            if fail.pop(): raise ValueError('once')
            x.g = out.g*2
    m,x = Bad(),rand(3).requires_grad_()
    loss = m(x).sum()
    with pytest.raises(ValueError, match='once'): m.backward(ones(3))
    fail.append(False)
    loss.backward()
    close(x.grad, 2*ones(3), **tight)

def test_errors_name_what_is_wrong_with_a_class():
    with pytest.raises(TypeError, match="__init__ calls its first argument 's'"):
        class A(Module):
            def __init__(s): s.lin = Lin(2, 2)
    with pytest.raises(TypeError, match='`out` first'):
        class B(Module):
            def forward(self, inp): return inp*2
            def bwd(self, inp, o): inp.g = o.g*2

def test_shapes_in_errors_of_a_bwd_between_nodes():
    class L(Module):
        def __init__(self): self.w = rand(4, 3)
        def forward(self, inp): return inp@self.w
        def bwd(self, out, inp): self.w.g = inp@out.g
    with pytest.raises(RuntimeError) as e: L().as_nodes()(rand(5, 4)).sum().backward()
    if hasattr(e.value, 'add_note'): assert e.value.__notes__==['in the rule of L: out.g (5, 3), inp (5, 4), w (4, 3)']


# Classes whose forward and bwd don't belong together

def test_a_new_forward_over_an_old_bwd():
    with pytest.raises(TypeError, match='bwd = Parent.bwd'):
        class Twice(Lin):
            def forward(self, inp): return 2*super().forward(inp)
    class Noted(Lin):
        bwd = Lin.bwd
        def forward(self, inp): return super().forward(inp)
    check_grads(Noted(3, 2), rand(4, 3).float(), show=False)
    m = Lin(3, 2)
    m.forward = lambda inp, f=m.forward: 2*f(inp)
    for nodes in (False,True):
        with pytest.raises(GradError, match='forward was replaced'): m.as_nodes(nodes)(torch.randn(4, 3))

def test_other_defaults_in_bwd():
    with pytest.raises(TypeError, match='same default'):
        class L(Module):
            def forward(self, x, k=2.): return x*k
            def bwd(self, out, x, k=1.): x.g = out.g*k


# What is on a tensor

@both
def test_each_output_keeps_its_own(nodes):
    class Two(Module):
        def forward(self, x):
            a,b = x*2,x*5
            a.k,b.k = 2.,5.
            return a,b
        def bwd(self, out, x): x.g = sum(o.g*o.k for o in out)
    x = rand(3).requires_grad_()
    sum(Two().as_nodes(nodes)(x)).sum().backward()
    close(x.grad, 7*ones(3), **tight)

@both
def test_a_number_called_const_on_an_output(nodes):
    class Scale(Module):
        def forward(self, x):
            out = 3*x
            out.const = 3.
            return out
        def bwd(self, out, x): x.g = out.g*3.
    class Net(Module):
        def __init__(self): self.lin,self.scale = Lin64(3, 3),Scale()
        def forward(self, x):
            h = self.lin(x)
            return (h+self.scale(h)).sum()
    m = Net().as_nodes(nodes)
    m(rand(2, 3)).backward()
    close(m.lin.b.g, 8*ones(3), **tight)

@both
@pytest.mark.parametrize('keep', ['tensor','array','list'])
def test_what_is_kept_on_an_output_was_changed(keep, nodes):
    class Norm(Module):
        def __init__(self): self.register_buffer('s', torch.tensor(2., dtype=torch.float64)),setattr(self, 'a', np.array(2.)),setattr(self, 'l', [2.])
        def forward(self, x):
            out = x*self.s
            out.s = dict(tensor=self.s, array=self.a, list=self.l)[keep]
            return out
        def bwd(self, out, x): x.g = out.g*(out.s[0] if keep=='list' else out.s if keep=='tensor' else float(out.s))
    m,x = Norm().as_nodes(nodes),rand(3).requires_grad_()
    loss = m(x).sum()
    m.s.mul_(4)
    m.a[...] = m.l[0] = 8.
    try: loss.backward()
    except (GradError,RuntimeError) as e: assert 'changed in place' in str(e) or 'inplace' in str(e)
    else: close(x.grad, 2*ones(3), **tight)

def test_a_constant_that_is_asked_for_its_gradient():
    t = torch.ones(2, 3)
    from fnnlite import const
    c = const(t).requires_grad_()
    m = Lin(3, 1)
    m(c).sum().backward()
    close(c.grad, m.w.detach().t().expand(2, 3))
    enc,head = Lin(3, 3).as_nodes(),Lin(3, 1)
    enc.freeze()
    f = enc(t).requires_grad_()
    head(f).sum().backward()
    close(f.grad, head.w.detach().t().expand(2, 3))

def test_g_of_an_earlier_pass_goes_between_nodes_too():
    m,x = Model([Lin64(3, 1)]),rand(2, 3)
    m(x).sum().backward()
    m.as_nodes()(x).sum().backward()
    assert x.g is None


# Everyday programs

def test_a_frozen_encoder_and_a_head():
    enc,head,x = Lin64(3, 3).freeze(),Lin64(3, 1),rand(2, 3)
    for _ in range(2): head(enc(x)).sum().backward()
    f = lambda w, b: 2*((x@enc.w.detach()+enc.b.detach())@w+b).sum()
    close([head.w.g, head.b.g], by_torch(f, head.w, head.b), **tight)
    h = enc(x)
    head(h).sum().backward()
    enc.backward()
    close(x.g, (head.w@ones(1, 2)).t()@enc.w.t(), **tight)

def test_flat_parameters():
    "Side by side in one memory, as some optimizers have them."
    m,x = Model([Lin64(3, 3), Tanh(), Lin64(3, 1)]),rand(2, 3)
    v = nn.utils.parameters_to_vector(m.parameters()).detach().clone()
    nn.utils.vector_to_parameters(v, m.parameters())
    m(x).sum().backward()
    close([p.g for p in m.parameters()], by_torch(lambda w, b, v, c: (((x@w+b).tanh())@v+c).sum(), *m.parameters()), **tight)

def test_a_rule_that_is_no_gradient_inside_a_wrap():
    from fnnlite import Wrap
    class Ste(Module):
        exact = False
        def forward(self, x): return x.round()
        def bwd(self, out, x): x.g = out.g
    lin,x = Lin64(3, 3),rand(2, 3)
    Model([lin, Wrap(nn.Sequential(Ste(), nn.Tanh()))])(x).sum().backward()
    h = (x@lin.w+lin.b).detach().round()
    close(lin.b.g, (1-h.tanh()**2).sum(0), **tight)


# Walks by hand, inside one record

class Side(Module):
    "A torch function stands on one of two ways."
    def __init__(self): self.a,self.b,self.c,self.add = Lin64(3, 3),Lin64(3, 3),Lin64(3, 3),Add()
    def forward(self, x):
        h = self.a(x)
        return self.add(self.b(h), self.c(h.tanh()))

def test_layer_by_layer_past_a_function_that_is_not_walked():
    m = Side()
    m(rand(2, 3))
    m.add.backward(ones(2, 3))
    for l in (m.c,m.b): l.backward()
    with pytest.raises(GradError, match="Lin: .*tanh.* hasn't been walked"): m.a.backward()
    assert m.a.w.g is None
    m = Model([Lin64(3, 1), nn.Tanh(), Lin64(1, 1)])
    m(rand(1, 3))
    m.layers[2].backward(ones(1, 1))
    with pytest.raises(GradError, match="hasn't been walked"): m.layers[0].backward() # not from 1

def test_what_nobody_walks_to_may_be_left_out():
    "A number to look at, on a way that ends."
    class Net(Module):
        def __init__(self): self.a,self.b = Lin64(3, 3),Lin64(3, 3)
        def forward(self, x):
            h = self.a(x)
            self.size = h.detach().norm()+(h*2).sum().detach()
            return self.b(h)
    m,x = Net(),rand(2, 3)
    m(x)
    m.b.backward(ones(2, 3))
    m.a.backward()
    close(x.g, ones(2, 3)@m.b.w.t()@m.a.w.t(), **tight)

def test_a_walk_that_comes_too_late():
    class Net(Module):
        def __init__(self): self.a,self.b,self.c = Lin64(3, 3),Lin64(3, 3),Lin64(3, 3)
        def forward(self, x):
            h = self.a(x)
            return self.b(h),self.c(h)
    m = Net()
    m(rand(2, 3))
    m.b.backward(ones(2, 3))
    m.a.backward()
    with pytest.raises(GradError, match='walked back already'): m.c.backward(ones(2, 3))
    assert m.c.w.g is None

# What stands behind a name

@pytest.mark.parametrize('by_hand', [False,True])
def test_other_numbers_given_to_a_parameter(by_hand):
    "Through `.data`, which no version counts; between nodes, too."
    double = dict(dtype=torch.float64)
    for net in (Model([Lin64(3, 3), Lin64(3, 1)]),Model(nn.Sequential(nn.Linear(3, 3, **double), nn.Linear(3, 1, **double)))):
        loss = net(rand(2, 3)).sum()
        for p in net.parameters(): p.data = torch.zeros_like(p)
        with pytest.raises(GradError, match='other numbers'): net.backward(ones(2, 1)) if by_hand else loss.backward()
    m = Model([Lin64(3, 3), Lin64(3, 1)]).as_nodes()
    loss = m(rand(2, 3)).sum()
    for p in m.parameters(): p.data = torch.zeros_like(p)
    with pytest.raises(GradError, match='other numbers'): loss.backward()

def test_a_forward_from_a_mixin():
    class Doubled:
        def forward(self, inp): return 2*super().forward(inp)
    with pytest.raises(TypeError, match='bwd = Parent.bwd'):
        class L(Doubled, Lin): pass
