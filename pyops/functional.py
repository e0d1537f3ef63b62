"""The functions of torch.nn.functional, on pyops kernels."""

from .core.convolution import conv_algorithm
from .ops.act_dropout_add import act_dropout_add
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
from .ops.additive_attention import additive_attention
from .ops.attention import attention_varlen, scaled_dot_product_attention
from .ops.batch_norm import batch_norm
from .ops.conv import conv1d, conv2d, conv3d, conv_transpose1d, conv_transpose2d, conv_transpose3d
from .ops.conv_act import conv2d_act
from .ops.cross_entropy import cross_entropy, linear_cross_entropy, nll_loss
from .ops.depthwise_conv import depthwise_conv
from .ops.distance import cdist, cosine_similarity, gram_matrix, knn, pairwise_distance
from .ops.dropout import (
    alpha_dropout,
    dropconnect_linear,
    dropout,
    dropout1d,
    dropout2d,
    dropout3d,
    feature_alpha_dropout,
)
from .ops.elementwise_loss import (
    binary_cross_entropy,
    binary_cross_entropy_with_logits,
    huber_loss,
    kl_div,
    l1_loss,
    mse_loss,
    smooth_l1_loss,
)
from .ops.embedding import embedding, embedding_bag
from .ops.fractional_max_pool import fractional_max_pool2d, fractional_max_pool3d
from .ops.grid_sample import affine_grid, grid_sample
from .ops.group_norm import group_norm, instance_norm
from .ops.gru import gru, gru_cell
from .ops.histogram import color_histogram
from .ops.hog import hog
from .ops.im2col import fold, unfold
from .ops.interpolate import interpolate
from .ops.layer_norm import layer_norm
from .ops.layer_norm_lstm import layer_norm_lstm, layer_norm_lstm_cell
from .ops.linear import bias_act, bilinear, linear, linear_act
from .ops.local_response_norm import local_response_norm
from .ops.lstm import lstm, lstm_cell
from .ops.margin_loss import multi_margin_loss
from .ops.max_unpool import max_unpool1d, max_unpool2d, max_unpool3d
from .ops.mixup import cutmix, mixup
from .ops.pad import pad
from .ops.pca import PCA, pca, pca_inverse, pca_transform
from .ops.pixel_shuffle import channel_shuffle, pixel_shuffle, pixel_unshuffle
from .ops.pool import (
    adaptive_avg_pool1d,
    adaptive_avg_pool2d,
    adaptive_avg_pool3d,
    adaptive_max_pool1d,
    adaptive_max_pool2d,
    adaptive_max_pool3d,
    avg_pool1d,
    avg_pool2d,
    avg_pool3d,
    lp_pool1d,
    lp_pool2d,
    lp_pool3d,
    max_pool1d,
    max_pool2d,
    max_pool3d,
)
from .ops.rms_norm import rms_norm
from .ops.rnn import rnn_relu, rnn_relu_cell, rnn_tanh, rnn_tanh_cell
from .ops.softmax import log_softmax, softmax, softmin

__all__ = [
    "PCA",
    "act_dropout_add",
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
    "additive_attention",
    "affine_grid",
    "alpha_dropout",
    "attention_varlen",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "batch_norm",
    "bias_act",
    "bilinear",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "cdist",
    "celu",
    "channel_shuffle",
    "color_histogram",
    "conv1d",
    "conv2d",
    "conv2d_act",
    "conv3d",
    "conv_algorithm",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "cosine_similarity",
    "cross_entropy",
    "cutmix",
    "depthwise_conv",
    "dropconnect_linear",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "elu",
    "embedding",
    "embedding_bag",
    "feature_alpha_dropout",
    "fold",
    "fractional_max_pool2d",
    "fractional_max_pool3d",
    "gelu",
    "glu",
    "gram_matrix",
    "grid_sample",
    "group_norm",
    "gru",
    "gru_cell",
    "hardshrink",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "hog",
    "huber_loss",
    "instance_norm",
    "interpolate",
    "kl_div",
    "knn",
    "l1_loss",
    "layer_norm",
    "layer_norm_lstm",
    "layer_norm_lstm_cell",
    "leaky_relu",
    "linear",
    "linear_act",
    "linear_cross_entropy",
    "local_response_norm",
    "log_softmax",
    "logsigmoid",
    "lp_pool1d",
    "lp_pool2d",
    "lp_pool3d",
    "lstm",
    "lstm_cell",
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "max_unpool1d",
    "max_unpool2d",
    "max_unpool3d",
    "mish",
    "mixup",
    "mse_loss",
    "multi_margin_loss",
    "nll_loss",
    "pad",
    "pairwise_distance",
    "pca",
    "pca_inverse",
    "pca_transform",
    "pixel_shuffle",
    "pixel_unshuffle",
    "prelu",
    "relu",
    "relu6",
    "relu_",
    "rms_norm",
    "rnn_relu",
    "rnn_relu_cell",
    "rnn_tanh",
    "rnn_tanh_cell",
    "rrelu",
    "scaled_dot_product_attention",
    "selu",
    "sigmoid",
    "sigmoid_",
    "silu",
    "smooth_l1_loss",
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
