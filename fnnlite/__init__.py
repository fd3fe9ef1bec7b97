"""Neural-network layers whose backward pass you can read"""

__version__ = "0.1.0"

from importlib import import_module
from operator import attrgetter
from types import ModuleType
from . import _help, core, data, nets, ops, train

class Folder(ModuleType):
    "A folder of rooms. When Python puts a room on it, `help` gets the comments beside the parameters"
    def __setattr__(self, name, room):
        new = name not in vars(self)
        super().__setattr__(name, room)
        for o,params in _help.params.get(f'{self.__name__}.{name}', {}).items() if new else ():
            o = attrgetter(o)(room)
            o = getattr(o, '__func__', o) # of a class method
            o.__doc__ = '\n'.join([o.__doc__ or '', '', *(f'{n}: {comment}' for n,comment in params.items())])

for folder in core, data, nets, ops, train: folder.__class__ = Folder # before there is a room on it

from . import functional
from .core.record import GradError, const, wants
from .core.module import Module
from .core.checks import check_grads, test_near
from .core.boundary import recorded
from .core.calls import recording
from .core.rules import gradient_of
from .ops.linears import Lin, Matmul
from .ops.elementwise import Add, Log, Mul
from .ops.activations import LogSoftmax, Relu, Sigmoid, Softmax, Tanh
from .ops.shapes import Concat, Flatten, Reshape
from .ops.dropouts import Dropout
from .ops.embeddings import Embedding
from .ops.normalisations import BatchNorm, LayerNorm
from .ops.convolutions import Conv2d
from .ops.attentions import Attention
from .ops.recurrences import LSTM
from .ops.losses import BCEWithLogits, CrossEntropy, Mse, NLL
from .ops.wraps import Wrap
from .ops import alignments, indexing, pools, reductions, torch_losses # the rest of the rules
from .nets.containers import Model, Sequential
from .nets import codes, drawings, tables # methods of Model
from .train.optimizers import SGD, Adam, AdamW, RMSprop

# loaded when used
_when_used = {'DataLoaders':'data.digits', 'load_mnist':'data.digits', 'Learner':'train.learners', 'accuracy':'train.learners',
    'save_weights':'train.checkpoints', 'load_weights':'train.checkpoints', 'Distributed':'train.distributed', 'compile_step':'train.compiled'}

__all__ = ['GradError', 'const', 'wants', 'Module', 'Add', 'Attention', 'BatchNorm', 'Concat', 'Conv2d', 'Dropout', 'Embedding', 'Flatten', 'LayerNorm', 'Lin', 'Log', 'LSTM',
    'LogSoftmax', 'Matmul', 'Mul', 'Relu', 'Reshape',
    'Sigmoid', 'Softmax', 'Tanh', 'BCEWithLogits', 'CrossEntropy', 'Mse', 'NLL', 'Model', 'Sequential', 'Wrap', 'SGD', 'Adam', 'AdamW',
    'RMSprop', 'check_grads', 'test_near', 'gradient_of', 'recorded', 'recording', *_when_used]

def __getattr__(name):
    if name not in _when_used: raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module('.'+_when_used[name], __name__), name)
