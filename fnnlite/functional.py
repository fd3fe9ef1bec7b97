"Each operation beside its gradient, as plain functions on tensors; the derivations are in the rooms of `ops`"
from .ops.linears import lin, lin_grad, matmul, matmul_grad
from .ops.convolutions import conv2d, conv2d_grad
from .ops.elementwise import add, add_grad, log, log_grad, mul, mul_grad
from .ops.activations import log_softmax, log_softmax_grad, relu, relu_grad, sigmoid, sigmoid_grad, softmax, softmax_grad, tanh, tanh_grad
from .ops.shapes import concat, concat_grad, reshape, reshape_grad
from .ops.dropouts import dropout, dropout_grad
