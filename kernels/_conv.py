"""Geometry that the Triton rooms of convolution share: one dimension of a product, forward and gradient alike.

  y[out_base + o*out_step] += x[in_base + o*in_step + j*tap_step] * w[w_base + j*w_step]        o < count, j < taps

The gradient in the input with stride s is s such products, one for each residue of the position modulo s
(csrc/common/conv.h says the same in C++, docs/math/convolution.md derives it).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from math import gcd
from typing import NamedTuple

import torch

from ._toolbox import cdiv

# Number and parameters of the function of a plain convolution: none.
NO_ACTIVATION = (-1, 0.0, 0.0, 0.0)


class Axis(NamedTuple):
    """One dimension of the product; see common/conv.h."""

    size: int
    count: int
    in_base: int
    in_step: int
    taps: int
    tap_step: int
    w_base: int
    w_step: int
    out_base: int
    out_step: int


def forward_axis(size: int, count: int, taps: int, stride: int, padding: int, dilation: int) -> Axis:
    return Axis(size, count, -padding, stride, taps, dilation, 0, 1, 0, 1)


def gradient_axis(size: int, count: int, taps: int, stride: int, padding: int, dilation: int, phase: int) -> Axis:
    """From the `count` positions of dy to the positions of x that are `phase` modulo the stride."""
    positions = cdiv(size - phase, stride) if phase < size else 0
    reach, common = phase + padding, gcd(stride, dilation)
    chosen = [r for r in range(taps) if (reach - r * dilation) % stride == 0]
    first = chosen[0] if chosen else 0
    base = (reach - first * dilation) // stride if chosen else 0
    return Axis(count, positions, base, 1, len(chosen), -(dilation // common), first, stride // common, phase, stride)


def phases(stride: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Every residue of a position modulo the stride."""
    return product(*(range(s) for s in stride))


def output_size(
    size: Sequence[int], taps: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """Positions of a filter in an input, per dimension."""
    return [(s + 2 * p - d * (k - 1) - 1) // st + 1 for s, k, st, p, d in zip(size, taps, stride, padding, dilation)]


def view(t: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """[N, C, D, H, W], whatever the memory is."""
    return t.movedim(-1, 1) if channels_last else t


def empty(like: torch.Tensor, n: int, c: int, space: Sequence[int], channels_last: bool) -> torch.Tensor:
    """An image in the memory layout that ``channels_last`` says."""
    return like.new_empty((n, *space, c) if channels_last else (n, c, *space))
