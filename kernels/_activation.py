"""The activation functions and their gradients by number, as in csrc/common/activation.h, for rooms that fuse them."""

from __future__ import annotations

import triton
import triton.language as tl

from ._math import expm1, sigmoid, tanh


@triton.jit
def normal_distribution(x):
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_tanh_argument(x):
    return 0.7978845608028654 * (x + 0.044715 * x * x * x)


@triton.jit
def mish_factor(x):
    """tanh(log(1 + exp(x))); from 20 on it is 1 in double."""
    e = tl.exp(tl.where(x > 20.0, 20.0, x))
    w = e * (e + 2.0)
    return w / (w + 2.0)


@triton.jit
def value(x, KIND: tl.constexpr, PA: tl.constexpr, PB: tl.constexpr, PC: tl.constexpr):
    if KIND == 0:  # relu
        y = tl.where(x <= 0.0, 0.0, x)
    elif KIND == 1:  # leaky_relu
        y = tl.where(x > 0.0, x, x * PA)
    elif KIND == 2:  # elu, selu, celu
        y = tl.where(x <= 0.0, (PA * PB) * expm1(tl.where(x <= 0.0, x, 0.0) * PC), x * PB)
    elif KIND == 3:  # gelu
        y = x * normal_distribution(x)
    elif KIND == 4:  # gelu, tanh
        y = 0.5 * x * (1.0 + tanh(gelu_tanh_argument(x)))
    elif KIND == 5:  # silu
        y = x / (1.0 + tl.exp(-x))
    elif KIND == 6:  # mish
        y = x * mish_factor(x)
    elif KIND == 7:  # sigmoid
        y = sigmoid(x)
    elif KIND == 8:  # hardsigmoid
        s = x + 3.0
        y = tl.where(s < 0.0, 0.0, tl.where(s > 6.0, 6.0, s)) / 6.0
    elif KIND == 9:  # hardswish
        s = x + 3.0
        y = x * (tl.where(s < 0.0, 0.0, tl.where(s > 6.0, 6.0, s)) / 6.0)
    elif KIND == 10:  # hardtanh, relu6
        y = tl.where(x < PA, PA, tl.where(x > PB, PB, x))
    elif KIND == 11:  # softplus
        z = x * PA
        y = tl.where(z > PB, x, (tl.where(z > 0.0, z, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(z)))) / PA)
    elif KIND == 12:  # softsign
        y = x / (1.0 + tl.abs(x))
    elif KIND == 13:  # tanh
        y = tanh(x)
    elif KIND == 14:  # logsigmoid
        y = tl.where(x > 0.0, 0.0, x) - tl.log(1.0 + tl.exp(-tl.abs(x)))
    elif KIND == 15:  # hardshrink
        y = tl.where(tl.abs(x) <= PA, 0.0, x)
    elif KIND == 16:  # softshrink
        y = tl.where(x > PA, x - PA, tl.where(x < -PA, x + PA, x * 0.0))
    elif KIND == 17:  # tanhshrink
        y = x - tanh(x)
    else:  # threshold
        y = tl.where(x <= PA, PB, x)
    return y


@triton.jit
def gradient(dy, x, KIND: tl.constexpr, PA: tl.constexpr, PB: tl.constexpr, PC: tl.constexpr):
    if KIND == 0:
        dx = tl.where(x <= 0.0, 0.0, dy)
    elif KIND == 1:
        dx = tl.where(x > 0.0, dy, dy * PA)
    elif KIND == 2:
        dx = tl.where(x > 0.0, dy * PB, dy * (PA * PB * PC) * tl.exp(tl.where(x > 0.0, 0.0, x) * PC))
    elif KIND == 3:
        dx = dy * (normal_distribution(x) + x * (0.3989422804014327 * tl.exp(x * x * -0.5)))
    elif KIND == 4:
        t = tanh(gelu_tanh_argument(x))
        slope = 0.7978845608028654 * (1.0 + 0.134145 * x * x)
        dx = dy * 0.5 * ((1.0 + t) + x * (1.0 - t * t) * slope)
    elif KIND == 5:
        s = sigmoid(x)
        dx = dy * s * (1.0 + x * (1.0 - s))
    elif KIND == 6:
        t = mish_factor(x)
        dx = dy * (t + x * (1.0 - t * t) * sigmoid(x))
    elif KIND == 7:
        s = sigmoid(x)
        dx = dy * s * (1.0 - s)
    elif KIND == 8:
        dx = tl.where((x > -3.0) & (x < 3.0), dy / 6.0, 0.0)
    elif KIND == 9:
        dx = tl.where(x <= -3.0, 0.0, tl.where(x >= 3.0, dy, dy * (x / 3.0 + 0.5)))
    elif KIND == 10:
        dx = tl.where((x > PA) & (x < PB), dy, 0.0)
    elif KIND == 11:
        z = x * PA
        dx = tl.where(z > PB, dy, dy * sigmoid(z))
    elif KIND == 12:
        width = 1.0 + tl.abs(x)
        dx = dy / (width * width)
    elif KIND == 13:
        t = tanh(x)
        dx = dy * (1.0 - t * t)
    elif KIND == 14:
        e = tl.exp(-tl.abs(x))
        dx = dy * (tl.where(x < 0.0, 1.0, e) / (1.0 + e))
    elif KIND == 15 or KIND == 16:
        dx = tl.where(tl.abs(x) > PA, dy, 0.0)
    elif KIND == 17:
        t = tanh(x)
        dx = dy * (t * t)
    else:
        dx = tl.where(x <= PA, 0.0, dy)
    return dx
