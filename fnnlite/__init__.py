"""Neural-network layers whose backward pass you can read"""

__version__ = "0.1.0"

from .record import GradError, const, wants
from .core import Module
from .layers import *
from .losses import BCEWithLogits, CrossEntropy, Mse, NLL
from .model import Model, Sequential
from .optim import SGD, Adam, AdamW, RMSprop
from .testing import check_grads, test_near
from .data import DataLoaders, load_mnist
from .learner import Learner, accuracy
