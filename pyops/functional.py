"""The functions of torch.nn.functional, on pyops kernels."""

from .core.convolution import conv_algorithm
from .ops.activation import (
    celu,
    elu,
    gelu,
    glu,
    hardshrink,
    hardsigmoid,
    hardswish,
    hardtanh,
    leaky_relu,
    logsigmoid,
    mish,
    prelu,
    relu,
    relu6,
    relu_,
    rrelu,
    selu,
    sigmoid,
    sigmoid_,
    silu,
    softplus,
    softshrink,
    softsign,
    tanh,
    tanh_,
    tanhshrink,
    threshold,
)
from .ops.attention import attention_varlen, scaled_dot_product_attention
from .ops.batch_norm import batch_norm
from .ops.conv import conv1d, conv2d, conv3d, conv_transpose1d, conv_transpose2d, conv_transpose3d
from .ops.depthwise_conv import depthwise_conv
from .ops.group_norm import group_norm, instance_norm
from .ops.gru import gru_cell
from .ops.im2col import fold, unfold
from .ops.layer_norm import layer_norm
from .ops.lstm import lstm_cell
from .ops.rms_norm import rms_norm
from .ops.rnn import rnn_relu_cell, rnn_tanh_cell
from .ops.softmax import log_softmax, softmax, softmin

__all__ = [
    "attention_varlen",
    "batch_norm",
    "celu",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_algorithm",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "depthwise_conv",
    "elu",
    "fold",
    "gelu",
    "glu",
    "group_norm",
    "gru_cell",
    "hardshrink",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "instance_norm",
    "layer_norm",
    "leaky_relu",
    "log_softmax",
    "logsigmoid",
    "lstm_cell",
    "mish",
    "prelu",
    "relu",
    "relu6",
    "relu_",
    "rms_norm",
    "rnn_relu_cell",
    "rnn_tanh_cell",
    "rrelu",
    "scaled_dot_product_attention",
    "selu",
    "sigmoid",
    "sigmoid_",
    "silu",
    "softmax",
    "softmin",
    "softplus",
    "softshrink",
    "softsign",
    "tanh",
    "tanh_",
    "tanhshrink",
    "threshold",
    "unfold",
]
