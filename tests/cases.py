"""Operations, layers and losses with their options and inputs, a line each. What is true of all of them is
tested by going through this list. A new class needs a line here."""
from typing import Callable, NamedTuple
import torch
from torch import nn
from fnnlite import (Add, Attention, BatchNorm, BCEWithLogits, Concat, Conv2d, CrossEntropy, Dropout, Embedding, Flatten, LayerNorm, Lin,
    Log, LogSoftmax, LSTM, Matmul, Module, Mse, Mul, NLL, Relu, Reshape, Sigmoid, Softmax, Tanh, Wrap)
from fnnlite.ops.losses import Loss
from helpers import Lin64, rand

class Case(NamedTuple):
    make: Callable # the module
    inps: Callable # its inputs, a loss's target among them

def classes(*shape, c=3): return torch.randint(0, c, shape)

cases = [
    Case(lambda: Lin64(4, 3), lambda: [rand(2, 5, 4)]),
    Case(lambda: Lin64(4, 3, bias=False), lambda: [rand(5, 4)]),
    Case(Matmul, lambda: [rand(2, 3, 4), rand(4, 5)]),
    Case(Matmul, lambda: [rand(3, 4), rand(2, 4, 5)]),
    Case(Add, lambda: [rand(3, 1), rand(4)]),
    Case(Mul, lambda: [rand(3, 1), rand(4)]),
    Case(Mul, lambda: [rand(3), rand(3)]),
    Case(Log, lambda: [rand(5).exp()]),
    Case(lambda: Relu(.1, .2, 1.), lambda: [rand(5, 3)]),
    Case(Relu, lambda: [rand(5, 3)]),
    Case(lambda: Softmax(0), lambda: [rand(5, 3)]),
    Case(Softmax, lambda: [rand(4, 4)]),
    Case(LogSoftmax, lambda: [rand(5, 3)]),
    Case(Sigmoid, lambda: [rand(5)]),
    Case(Tanh, lambda: [rand(5)]),
    Case(Concat, lambda: [rand(3, 2), rand(3, 1), rand(3, 4)]),
    Case(lambda: Reshape(2, -1), lambda: [rand(4, 3)]),
    Case(lambda: Reshape(12), lambda: [rand(3, 4).t()]),
    Case(lambda: Conv2d(2, 3, dtype=torch.float64), lambda: [rand(2, 2, 5, 5)]),
    Case(lambda: LayerNorm(4, dtype=torch.float64), lambda: [rand(2, 3, 4)]),
    Case(lambda: BatchNorm(3, dtype=torch.float64), lambda: [rand(4, 3, 2)]),
    Case(lambda: BatchNorm(3, dtype=torch.float64).eval(), lambda: [rand(4, 3)]),
    Case(lambda: Attention(4, 2, causal=True, dtype=torch.float64), lambda: [rand(2, 3, 4)]),
    Case(lambda: LSTM(3, 2, dtype=torch.float64), lambda: [rand(2, 4, 3)]),
    Case(lambda: Embedding(4, 3, dtype=torch.float64), lambda: [classes(2, 5, c=4)]),
    Case(Flatten, lambda: [rand(4, 3, 2)]),
    Case(lambda: Dropout(.4), lambda: [rand(6, 4)]),
    Case(lambda: Dropout().eval(), lambda: [rand(3, 2)]),
    Case(lambda: Wrap(nn.LayerNorm(4).double()), lambda: [rand(5, 4)]),
    Case(lambda: Wrap(torch.sin), lambda: [rand(5)]),
    Case(Mse, lambda: [rand(5, 1), rand(5)]),
    Case(lambda: Mse('sum'), lambda: [rand(5, 2), rand(5, 2)]),
    Case(lambda: CrossEntropy(smoothing=.1), lambda: [rand(5, 3), classes(5)]),
    Case(CrossEntropy, lambda: [rand(2, 4, 3), classes(2, 4)]),
    Case(CrossEntropy, lambda: [rand(5, 3), rand(5, 3).softmax(-1)]),
    Case(NLL, lambda: [rand(5, 3), classes(5)]),
    Case(lambda: BCEWithLogits('sum'), lambda: [rand(5), rand(5).sigmoid()]),
    Case(BCEWithLogits, lambda: [rand(5), rand(5).sigmoid()])]

def kind(case): return type(case.make())
def name(case):
    return '-'.join([repr(case.make()).split('\n')[0], *('x'.join(map(str, t.shape)) for t in case.inps())])
one_each = list({kind(c):c for c in reversed(cases)}.values())[::-1] # the first of its class
loss_cases = [c for c in one_each if issubclass(kind(c), Loss)]

class InNet(Module):
    "A case with weights before its inputs, into which their gradients go on; positive, for the logarithm."
    def __init__(self, case):
        self.module,inps = case.make(),case.inps()
        self.n,sizes = len(inps),[t.shape[-1] for t in inps if t.is_floating_point()]
        self.lins = [Lin(torch.rand(n, n, dtype=torch.float64)+.1) for n in sizes]
    def forward(self, *inps):
        lins = iter(self.lins)
        return self.module(*[next(lins)(t) if t.is_floating_point() else t for t in inps])
