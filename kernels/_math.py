"""Elementary functions that several Triton rooms share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def expm1(x):
    """exp(x) - 1, by its series where the difference would cancel."""
    s = x * (1.0 / 12.0) + 1.0
    s = x * (1.0 / 11.0) * s + 1.0
    s = x * (1.0 / 10.0) * s + 1.0
    s = x * (1.0 / 9.0) * s + 1.0
    s = x * (1.0 / 8.0) * s + 1.0
    s = x * (1.0 / 7.0) * s + 1.0
    s = x * (1.0 / 6.0) * s + 1.0
    s = x * (1.0 / 5.0) * s + 1.0
    s = x * (1.0 / 4.0) * s + 1.0
    s = x * (1.0 / 3.0) * s + 1.0
    s = x * (1.0 / 2.0) * s + 1.0
    return tl.where(tl.abs(x) < 0.25, x * s, tl.exp(x) - 1.0)


@triton.jit
def tanh(x):
    t = expm1(-2.0 * tl.abs(x))
    magnitude = -t / (t + 2.0)
    return tl.where(x < 0.0, -magnitude, tl.where(x == x, magnitude, x))


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))
