"""What the recurrent rooms share: the cells and their gradients; formulas of csrc/common/recurrent.h."""

from __future__ import annotations

import triton
import triton.language as tl

from ._math import sigmoid, tanh

BLOCK = 256


@triton.jit
def lstm_forward(i, f, g, o, c):
    """(h', c') and the activated gates."""
    i, f, g, o = sigmoid(i), sigmoid(f), tanh(g), sigmoid(o)
    c = f * c + i * g
    return o * tanh(c), c, i, f, g, o


@triton.jit
def lstm_backward(dh, dc, i, f, g, o, c_before):
    """Gradients of the four pre-activations and of the former c, from the activated gates."""
    t = tanh(f * c_before + i * g)
    total = dc + dh * o * (1.0 - t * t)
    di = total * g * i * (1.0 - i)
    df = total * c_before * f * (1.0 - f)
    dg = total * i * (1.0 - g * g)
    do = dh * t * o * (1.0 - o)
    return di, df, dg, do, total * f


@triton.jit
def gru_forward(xr, xz, xn, hr, hz, hn, h):
    """h' and the activated gates."""
    r, z = sigmoid(xr + hr), sigmoid(xz + hz)
    n = tanh(xn + r * hn)
    return n + z * (h - n), r, z, n


@triton.jit
def gru_backward(dy, r, z, n, hn, h):
    """Gradients of the pre-activations r, z, n from the input, of n from the hidden state, and of h directly."""
    dn = dy * (1.0 - z) * (1.0 - n * n)
    dr = dn * hn * r * (1.0 - r)
    dz = dy * (h - n) * z * (1.0 - z)
    return dr, dz, dn, dn * r, dy * z


@triton.jit
def rnn_forward(x, RELU: tl.constexpr):
    if RELU:
        h = tl.where(x <= 0.0, 0.0, x)
    else:
        h = tanh(x)
    return h


@triton.jit
def rnn_backward(dy, h, RELU: tl.constexpr):
    if RELU:
        dx = tl.where(h <= 0.0, 0.0, dy)
    else:
        dx = dy * (1.0 - h * h)
    return dx
