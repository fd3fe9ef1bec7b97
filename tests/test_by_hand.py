"`m.backward()` by hand, `loss.backward()`, and what passes from one outermost call to the next: right, or refused."
import copy, gc, weakref
import pytest, torch
from torch import nn
from fnnlite import CrossEntropy, Dropout, GradError, Lin, Model, Module, Mse, Relu, Reshape, SGD, Tanh, check_grads, const, gradient_of, recorded, recording
from fnnlite.core.module import through_forward
from helpers import Lin64, close, rand, tight

def auto(f, *ts):
    "The gradients of `f(*copies of ts)` by autograd, through the forwards."
    ts = [t.detach().clone().requires_grad_() for t in ts]
    return torch.autograd.grad(f(*ts), ts)

def ones(*shape): return torch.ones(*shape, dtype=torch.float64)


# Several outermost calls, one loss

def test_siamese():
    enc,a,b = Model([Lin64(4, 3), Tanh()]),rand(5, 4),rand(5, 4)
    (enc(a)-enc(b)).pow(2).mean().backward()
    want = auto(lambda w, bias, a, b: ((a@w+bias).tanh()-(b@w+bias).tanh()).pow(2).mean(), enc.layers[0].w, enc.layers[0].b, a, b)
    close([enc.layers[0].w.g, enc.layers[0].b.g, a.g, b.g], want, **tight)
    loss = Mse()
    loss(enc(a), enc(b))
    loss.backward()
    with pytest.raises(GradError, match='called 2 times'): enc.backward()

def test_two_losses_on_one_output():
    enc,x = Lin64(4, 3),rand(5, 4)
    h = enc(x)
    (h.sum()+h.pow(2).sum()).backward()
    close([enc.w.g, x.g], auto(lambda w, x: (x@w+enc.b.detach()).sum()+(x@w+enc.b.detach()).pow(2).sum(), enc.w, x), **tight)

@pytest.mark.parametrize('interleaved', [False,True])
def test_two_heads_by_hand(interleaved):
    enc,a,b,x = Lin64(4, 3),Lin64(3, 1),Lin64(3, 1),rand(5, 4)
    h = enc(x)
    if interleaved:
        for head in (a,b):
            head(h)
            head.backward(ones(5, 1))
    else:
        for head in (a,b): head(h)
        for head in (a,b): head.backward(ones(5, 1))
    enc.backward()
    close([h.g, enc.w.g, x.g], [ones(5, 1)@(a.w+b.w).t(), x.t()@(ones(5, 1)@(a.w+b.w).t()), ones(5, 1)@(a.w+b.w).t()@enc.w.t()], **tight)

def test_input_of_several_calls():
    m,x = Lin64(4, 3),rand(5, 4)
    (m(x).sum()+m(x).pow(2).sum()).backward()
    close(x.g, *auto(lambda x: (x@m.w.detach()+m.b.detach()).sum()+(x@m.w.detach()+m.b.detach()).pow(2).sum(), x), **tight)
    for _ in range(3): # the last pass's
        m(x).sum().backward()
        close(x.g, (ones(5, 3)@m.w.t()).detach(), **tight)

def test_an_operation_between_two_outermost_calls():
    a,b,x = Lin64(4, 3),Lin64(3, 1),rand(5, 4)
    b((a(x)*2).exp()).sum().backward()
    f = lambda x, w, v: ((x@w+a.b.detach())*2).exp().matmul(v).sum()
    close([x.g, a.w.g, b.w.g], auto(f, x, a.w, b.w), **tight)

def test_scaled_and_penalised():
    m,x,y = Model([Lin64(4, 3)], Mse()),rand(5, 4),rand(5, 3)
    (m(x, y)/4+.1*(m.layers[0].w**2).sum()).backward()
    close(m.layers[0].w.g, *auto(lambda w: (x@w-y).pow(2).mean()/4+.1*(w**2).sum(), m.layers[0].w), **tight)

def test_once_by_hand_or_by_autograd():
    m,x = Lin64(4, 3),rand(5, 4)
    m(x).sum().backward()
    with pytest.raises(GradError, match='backward.. on the loss'): m.backward(ones(5, 3))
    out = m(x)
    m.backward(ones(5, 3))
    with pytest.raises(GradError, match='backward.. of the module'): out.sum().backward()
    close(m.b.g, 2*ones(3)*5, **tight)

def test_a_backward_of_ones_own():
    "The lesson's walk, layer by layer, inside one record."
    class Net(Module):
        def __init__(self): self.layers,self.loss = [Lin64(4, 3), Relu(), Lin64(3, 1)],Mse()
        def forward(self, x, y):
            for l in self.layers: x = l(x)
            return self.loss(x, y)
        def backward(self):
            self.loss.backward()
            for l in reversed(self.layers): l.backward()
    net,x,y = Net(),rand(5, 4),rand(5)
    net(x, y)
    net.backward()
    got = [x.g, *(p.g for p in net.parameters())]
    twin = copy.deepcopy(net)
    twin.zero_grad()
    leaf = x.clone().requires_grad_()
    with through_forward(): twin(leaf, y).backward()
    close(got, [leaf.grad, *(p.grad for p in twin.parameters())], **tight)

def test_the_walk_of_a_layer_called_twice_inside():
    class Net(Module):
        def __init__(self): self.lin = Lin64(4, 4)
        def forward(self, x): return self.lin(self.lin(x))
    net = Net()
    net(rand(3, 4))
    with pytest.raises(GradError, match='called 2 times'): net.lin.backward(ones(3, 4))
    net.backward(ones(3, 4))

def test_inner_modules_by_hand_in_a_bwd():
    class Net(Module):
        def __init__(self): self.a = Lin64(4, 3)
        def forward(self, x): return self.a(x)*2
        def bwd(self, out, x): self.a.backward(out.g*2)
    with pytest.raises(GradError, match='inside a bwd'): Net()(rand(5, 4)).sum().backward()

def test_second_derivatives_are_refused():
    m,x = Lin64(4, 3),rand(5, 4).requires_grad_()
    with pytest.raises(GradError, match='create_graph'): torch.autograd.grad(m(x).pow(2).sum(), x, create_graph=True)


# `.g` of what isn't the loss

def test_g_is_none_before():
    m,x = Lin64(4, 3),rand(5, 4)
    assert x.g is m.w.g is m(x).g is torch.ones(2).g is None

def test_const_takes_an_earlier_gradient_away():
    m,x = Lin64(4, 3),rand(5, 4)
    m(x).sum().backward()
    assert x.g is not None
    m(const(x)).sum().backward()
    assert x.g is None

def test_a_gradient_set_by_hand_is_what_the_optimizer_sees():
    m,x,y = Model([Lin64(4, 3)], Mse()),rand(5, 4),rand(5, 3)
    w,opt = m.layers[0].w,SGD(m.parameters(), lr=1.)
    m(x, y)
    m.backward()
    before,w.g = w.detach().clone(),torch.zeros_like(w)
    opt.step()
    assert w.grad is w.g and torch.equal(w, before)
    m.zero_grad()
    assert w.g is None

def test_a_parameter_handed_on():
    class Net(Module):
        def __init__(self): self.w = rand(4)
        def forward(self, x): return (x*self.w).sum(),self.w
    net,x = Net(),rand(4)
    a,b = net(x)
    (a+(b**2).sum()).backward()
    close(net.w.g, x+2*net.w.detach(), **tight)

def test_an_input_that_a_rule_leaves_out():
    "The lesson's loss leaves out the target. Where another call has a share in it, that would be half of it."
    class Loss(Module):
        def forward(self, inp, targ): return ((inp-targ)**2).sum()
        def bwd(self, out, inp, targ): inp.g = 2*(inp-targ)*out.g
    loss,lin,x,targ = Loss(),Lin64(4, 4),rand(3, 4),rand(3, 4)
    loss(x, targ)
    loss.backward()
    close(x.g, 2*(x-targ), **tight)
    assert targ.g is None
    with pytest.raises(GradError, match="argument 'targ' got no .g"): loss(x, targ.requires_grad_()).backward()
    with pytest.raises(GradError, match="argument 'targ' got no .g"): loss(x, lin(x)).backward()
    class Both(Module):
        def __init__(self): self.loss = loss
        def forward(self, x): return self.loss(x*2, x)
    both = Both()
    both(x)
    with pytest.raises(GradError, match='used elsewhere'): both.backward()


# Memory, and parameters that share it

def test_parameters_that_share_memory():
    class Net(Module):
        def __init__(self):
            self.a = Lin64(4, 4, bias=False)
            self.b = Lin(self.a.w.detach().t(), None)
        def forward(self, x): return self.b(self.a(x))
    with pytest.raises(GradError, match='share their memory'): Net()(rand(3, 4)).sum().backward()
    with pytest.raises(GradError, match='detach'): Lin(nn.Embedding(5, 4).weight.t(), None)

def test_records_go_with_what_they_made():
    "Without the garbage collector."
    gc.collect()
    gc.disable()
    try:
        m,x,y = Model([Lin64(4, 3), Relu()], CrossEntropy()),rand(5, 4),torch.randint(3, (5,))
        old = weakref.ref(m(x, y) and m._record)
        m(x, y)
        assert old() is None
        kept = m(x, y)
        old = weakref.ref(m._record)
        m(x, y)
        assert old() is not None
        kept.backward()
        del kept
        assert old() is None
    finally: gc.enable()

def test_a_deep_record():
    "10,000 calls without recursion."
    x,lin = rand(2, 2),Lin64(2, 2)
    with recording() as rec:
        h = lin(x)
        for _ in range(10000): h = h+x
        loss = h.sum()
    rec.backward(loss)
    close(x.g, (10000*ones(2, 2)+ones(2, 2)@lin.w.t()).detach(), **tight)


# Before and after a rule

def test_before_and_after():
    net,x,y = Model([Lin64(4, 3), Relu(), Lin64(3, 2)], Mse()),rand(5, 4),rand(5, 2)
    seen = []
    def before(call): # clip what comes back out of the ReLU
        seen.append(call.name)
        if call.name=='Relu': call.out.g = call.out.g.clamp(-.01, .01)
    def after(call): # no decay of the second layer's weight
        if call.path=='Lin (layers.2)': call.params[0].g = torch.zeros_like(call.params[0].g)
    net(x, y)
    net.backward(before=before, after=after)
    assert seen==['Mse','Lin','Relu','Lin'] and not net.layers[2].w.g.any() and net.layers[2].b.g.any()
    h,out = net.layers[0].out.detach(),net.layers[2].out.detach()
    g = ((2*(out-y)/10)@net.layers[2].w.t()).clamp(-.01, .01)*(h>0)
    close(net.layers[0].w.g, (x.t()@g).detach(), **tight)

def test_params_of_torchs_functions_in_after():
    net,x = Model(nn.Linear(4, 1, dtype=torch.float64)),rand(5, 4)
    shares = []
    net(x)
    net.backward(ones(5, 1), after=lambda call: shares.extend(p.g.shape for p in call.params))
    assert shares==[(1,4),(1,)]


# Rules that aren't meant to be the gradient

class Feedback(Module):
    "Feedback alignment: the error goes back through other weights."
    exact = False
    def __init__(self, ni, nf): self.w,self.back = rand(ni, nf),const(rand(ni, nf))
    def forward(self, inp): return inp@self.w
    def bwd(self, out, inp): inp.g,self.w.g = out.g@self.back.t(),inp.t()@out.g

def test_inexact_rules_are_used_or_refused(capsys):
    m,x = Feedback(4, 3),rand(5, 4)
    for back in (lambda: m.backward(ones(5, 3)), None):
        out = m(x)
        back() if back else out.sum().backward()
        close(x.g, ones(5, 3)@m.back.t(), **tight)
    with pytest.raises(GradError, match='exact=False'): torch.func.grad(lambda x: m(x).sum())(x)
    with pytest.raises(GradError, match='exact=False'): torch.func.vmap(m)(x[None])
    leaf = x.clone().requires_grad_()
    m.as_nodes()(leaf).sum().backward()
    close(leaf.grad, ones(5, 3)@m.back.t(), **tight)
    check_grads(m.as_nodes(False), x) # shows the angle
    assert '°' in capsys.readouterr().out

def test_a_recorded_function_keeps_its_rule_outside_a_record():
    @recorded
    def double(x): return x*2
    @gradient_of(double, saves='', exact=False)
    def double_grad(out, x): x.g = out.g*7
    x = rand(3).requires_grad_()
    (double(x)*3).sum().backward()
    close(x.grad, 21*ones(3), **tight)
    with pytest.raises(GradError, match='exact=False'): torch.func.grad(lambda x: double(x).sum())(x.detach())


# Words

def test_misnamed_rules():
    with pytest.raises(TypeError, match='call it bwd'):
        class A(Module):
            def backward(self, out, inp): inp.g = out.g
    with pytest.raises(TypeError, match='`out` first'):
        class B(Module):
            def bwd(self, inp, out): inp.g = out.g

def test_torchs_errors_in_a_bwd_say_the_shapes():
    class L(Module):
        def __init__(self): self.w = rand(4, 3)
        def forward(self, inp): return inp@self.w
        def bwd(self, out, inp): self.w.g = inp@out.g
    with pytest.raises(RuntimeError) as e: L()(rand(5, 4)).sum().backward()
    if hasattr(e.value, 'add_note'): assert e.value.__notes__==['in the rule of L: out.g (5, 3), w (4, 3), inp (5, 4)']

def test_hints_of_check_grads():
    class L(Module):
        def __init__(self, f): self.w,self.f = rand(3, 3),f
        def forward(self, inp): return inp@self.w
        def bwd(self, out, inp): inp.g,self.w.g = out.g@self.w.t(),self.f(inp.t()@out.g)
    for f,hint in [(torch.neg, 'it is -1 times'), (lambda g: g/7, 'a mean or a sum'), (torch.t, 'it is transposed'), (lambda g: g*0, 'it is zero'),
            (lambda g: g+1, 'worst at')]:
        with pytest.raises(AssertionError, match=hint): check_grads(L(f), rand(5, 3), show=False)

def test_check_grads_of_functions(registry):
    check_grads(torch.relu, rand(4), show=False)
    check_grads(nn.functional.linear, rand(4, 3), rand(2, 3), show=False)
    check_grads(nn.GELU(), rand(4), show=False)
    @gradient_of(torch.cumsum)
    def cumsum_grad(out, inp, dim): inp.g = out.g.cumsum(dim)
    with pytest.raises(AssertionError, match='cumsum: the gradient of'): check_grads(torch.cumsum, rand(4), 0, show=False)

def test_a_constant_input_has_no_gradient():
    m,x = Lin64(4, 4),const(rand(3, 4))
    m(x)
    m.backward(ones(3, 4))
    assert x.g is None and m.w.g is not None

def test_hooks_put_on_inner_tensors_are_refused():
    m,x,y = Model([Lin64(4, 3), Relu()], Mse()),rand(5, 4),rand(5, 3)
    loss = m(x, y)
    m.layers[0].out.register_hook(lambda g: 2*g)
    with pytest.raises(GradError, match='its hook'): loss.backward()

def test_after_an_error_parameters_have_what_they_had():
    m = Model([Lin64(4, 3), Relu(), Lin64(3, 2)])
    def ready(p):
        if p is m.layers[2].b: raise KeyError
    m(rand(5, 4))
    with pytest.raises(KeyError): m.backward(ones(5, 2), ready=ready)
    assert all(p.g is None for p in m.parameters())
    m.backward(ones(5, 2))
    close(m.layers[2].b.g, 5*ones(2), **tight)

def test_a_kept_loss_keeps_no_record():
    m,x,y = Model([Lin64(4, 3), Relu()], Mse()),rand(5, 4),rand(5, 3)
    for back in (torch.Tensor.backward, lambda loss: m.backward(), lambda loss: m.backward(free=True)):
        kept = m(x, y)
        old = weakref.ref(m._record)
        back(kept)
        m(x, y)
        assert old() is None
    loss = m(x, y)
    old = weakref.ref(m._record)
    loss.backward(retain_graph=True)
    loss.backward()
    with pytest.raises(RuntimeError, match='second time'): loss.backward()
    m(x, y)
    m.backward(free=True)
    assert m.out is m.layers.out is None

def test_functional_call():
    m,x = Model([Lin64(4, 3), Tanh()]),rand(5, 4)
    scale = rand(1).requires_grad_()
    ws = {n:p.detach()*scale for n,p in m.named_parameters()}
    torch.func.functional_call(m, ws, (x,)).pow(2).sum().backward()
    f = lambda s: ((x@(m.layers[0].w.detach()*s)+m.layers[0].b.detach()*s).tanh()**2).sum()
    close(scale.grad, *auto(f, scale), **tight)
    assert m.layers[0].w.g is None


# A layer that gives back what came in, or a view of it

changed = {'the view': lambda h, v, r: (v.mul_(2).sin()*h).sum(), 'flat': lambda h, v, r: r.mul_(3).pow(2).sum()+(h.sin()*v).sum(),
    'what came in': lambda h, v, r: (h.mul_(3).sin()*v).sum()+r.pow(2).sum()}

@pytest.mark.parametrize('how', changed)
def test_what_a_layer_gives_back_changed_in_place(how):
    def f(w, x, drop, flat):
        h = w*x
        v = drop(h)
        return changed[how](h, v, flat(h))
    class Net(Module):
        def __init__(self): self.w,self.drop,self.flat = nn.Parameter(rand(3, 4)),Dropout(.5),Reshape(-1)
        def forward(self, x): return f(self.w, x, self.drop, self.flat)
    net,x = Net().eval(),rand(3, 4)
    net(x).backward()
    close([net.w.g, x.g], auto(lambda w, x: f(w, x, nn.Dropout().eval(), nn.Flatten(0)), net.w, x), **tight)

def test_a_parameter_that_a_layer_gives_back_changed_in_place():
    class Net(Module):
        def __init__(self): self.w,self.drop = nn.Parameter(rand(3)),Dropout(.5)
        def forward(self): return self.drop(self.w).mul_(2).sum()
    net = Net().eval()
    with pytest.raises(GradError, match='outside the record'): net()

def test_a_view_that_is_returned_after_its_base_was_changed():
    class Net(Module):
        def __init__(self): self.lin = Lin64(4, 3)
        def forward(self, x):
            h = self.lin(x)
            v = h.flatten()
            h.clamp_(-1, 1)
            return v
    m,x,g = Net(),rand(5, 4),rand(15)
    m(x)
    m.backward(g)
    close([x.g, m.lin.w.g], auto(lambda x, w: ((x@w+m.lin.b.detach()).clamp(-1, 1).flatten()*g).sum(), x, m.lin.w), **tight)

def test_an_output_changed_in_place_behind_the_module():
    class Net(Module):
        def __init__(self): self.part = Model([Lin64(4, 3), Tanh(), Lin64(3, 3)])
        def forward(self, x): return self.part(x).mul_(2)
    m = Net()
    m(rand(5, 4))
    with pytest.raises(GradError, match='changed in place'): m.part.backward(ones(5, 3))

@pytest.mark.parametrize('f', [lambda x: x.t_(), lambda x: x.unsqueeze_(0), lambda x: x.swapaxes_(0, 1)])
def test_a_tensor_that_gets_another_form(f):
    def after(x):
        h = x*3
        s = h.sum(0)
        return f(h).pow(2).sum()+s.sin().sum()
    x = rand(3, 4)
    with recording() as rec: out = after(x)
    rec.backward(out)
    close([x.g], auto(after, x), **tight)

def test_an_output_that_shows_its_input_changed_outside():
    x = rand(3, 4).requires_grad_()
    h = x*2
    out = Reshape(-1)(h)
    h.mul_(2)
    with pytest.raises(GradError, match='shows numbers of what came in, was changed'): out.sum().backward()

def test_ready_comes_once_for_a_parameter_used_twice():
    class Twice(Module):
        def __init__(self): self.lin = Lin64(4, 4)
        def forward(self, x): return self.lin(self.lin(x).tanh())
    m,seen = Twice(),[]
    m(rand(5, 4))
    m.backward(rand(5, 4), ready=lambda p: seen.append((p, p.g.clone())))
    assert {id(p) for p,_ in seen}=={id(p) for p in m.parameters()} and len(seen)==2
    for p,g in seen: close(g, p.g, **tight)

@pytest.mark.parametrize('nodes', [False,True])
def test_an_output_that_a_layer_calls_constant(nodes):
    class Split(Module):
        def forward(self, x): return x*2,const(x*3)
        def bwd(self, out, x): x.g = out[0].g*2
    class Net(Module):
        def __init__(self): self.split = Split()
        def forward(self, x):
            a,b = self.split(x)
            self.b = b
            return (a*b).sum()
    m,x = Net().as_nodes(nodes),rand(3).requires_grad_()
    m(x).backward()
    close(x.grad, 6*x.detach(), **tight)
    assert m.b.g is None

def test_g_of_what_a_function_gives_back_as_it_came():
    x,w = rand(4),rand(3, 4)
    with recording() as rec:
        h = x*2
        same,_ = torch.broadcast_tensors(h, rand(1))
        assert same is h
        loss = (h*3+same*w).sum()
    rec.backward(loss)
    close([h.g, x.g], [9*ones(4)+w.sum(0), 18*ones(4)+2*w.sum(0)], **tight)

@pytest.mark.parametrize('lean', [False,True])
def test_one_of_several_views_changed_in_place(lean):
    "And the base again: the other view, which nobody changed, shows it too."
    def f(w, x):
        h = w*x
        a,b = h.tensor_split(2, -1)
        a.mul_(3)
        c = a.clone().sin()
        h.mul_(x)
        return (h**2).sum()+b.sin().sum()+(a*c).sum()
    class Net(Module):
        def __init__(self): self.w = nn.Parameter(rand(3, 4))
        def forward(self, x): return f(self.w, x)
    net,x = Net().retain(not lean),rand(3, 4).requires_grad_()
    net(x).backward()
    close([net.w.g, x.grad], auto(f, net.w, x), **tight)

def test_a_view_of_a_parameter_made_under_no_grad():
    w,x = nn.Parameter(rand(3)),rand(3)
    with recording() as rec:
        with torch.no_grad(): v = w.view(3)
        loss = (v*x).sum()
    rec.backward(loss)
    assert v.g is None and w.g is None

@pytest.mark.parametrize('nodes', [False, True], ids=['walk', 'node'])
@pytest.mark.parametrize('what', ['inp', 'w', 'out'])
def test_a_bwd_that_changes_what_came_in(what, nodes):
    "It would be right itself, and leave the net with other numbers."
    class Changes(Module):
        def __init__(self): self.w = rand(3)
        def forward(self, inp): return inp*self.w
        def bwd(self, out, inp):
            inp.g,self.w.g = out.g*self.w,(out.g*inp).sum(0)
            {'inp':inp, 'w':self.w, 'out':out}[what].mul_(2)
    layer,x = Changes().as_nodes(nodes),rand(4, 3).requires_grad_()
    loss = layer(x).sum()
    with pytest.raises(GradError, match='(?s)changed .* in place.*work on a copy'):
        loss.backward() if nodes else layer.backward(torch.ones(4, 3, dtype=torch.float64))
    if not nodes:
        with pytest.raises(GradError, match='in place'): check_grads(Changes(), rand(4, 3), show=False)
