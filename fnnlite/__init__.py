"""Neural-network layers whose backward pass you can read"""

__version__ = "0.1.0"

from importlib import import_module
from .record import GradError, const, wants
from .core import Module
from .layers import Add, Concat, Dropout, Flatten, Lin, Log, LogSoftmax, Matmul, Mul, Relu, Reshape, Sigmoid, Softmax, Tanh
from .losses import BCEWithLogits, CrossEntropy, Mse, NLL
from .model import Model, Sequential
from .bridge import Wrap, from_torch, to_torch
from .optim import SGD, Adam, AdamW, RMSprop
from .testing import check_grads, test_near

# loaded when used
_when_used = {'DataLoaders':'data', 'load_mnist':'data', 'Learner':'learner', 'accuracy':'learner', 'save_weights':'checkpoint', 'load_weights':'checkpoint',
    'Distributed':'distributed', 'compile_step':'compiled'}

__all__ = ['GradError', 'const', 'wants', 'Module', 'Add', 'Concat', 'Dropout', 'Flatten', 'Lin', 'Log', 'LogSoftmax', 'Matmul', 'Mul', 'Relu', 'Reshape',
    'Sigmoid', 'Softmax', 'Tanh', 'BCEWithLogits', 'CrossEntropy', 'Mse', 'NLL', 'Model', 'Sequential', 'Wrap', 'from_torch', 'to_torch', 'SGD', 'Adam', 'AdamW',
    'RMSprop', 'check_grads', 'test_near', *_when_used]

def __getattr__(name):
    if name not in _when_used: raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module('.'+_when_used[name], __name__), name)
