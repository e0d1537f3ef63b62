"""Depthwise convolution in 1, 2 and 3 dimensions: every input channel has filters of its own.

    y[n,(c,m),p] = b[(c,m)] + sum over r of w[(c,m),r] x[n, c, p*stride - padding + r*dilation]

    x: [N, C, *space]   w: [C*M, 1, *taps]   b: [C*M]   y: [N, C*M, *positions]   M: channel multiplier

There is nothing to share between channels, so a matrix product would waste its operands: the kernels slide a window
over each row instead. ``pyops.functional.conv1d`` to ``conv3d`` and their transposes come here by themselves when
``groups`` is the number of input channels; the gradients are those of core/convolution.py.

Source: torch.nn.functional.conv2d with groups = C; Howard et al. 2017, https://arxiv.org/abs/1704.04861.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..core import check, convolution, convolution_notes, library
from ..core.convolve import convolve
from ..core.explain import explains
from ..core.samples import Maker, Sample, checked

_kernels = library.triton_kernels("depthwise_conv")
convolution.family(
    "depthwise_conv",
    _kernels,
    lambda channels, weight, groups: groups > 1 and groups == channels and weight[1] == 1,
)


def depthwise_conv(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
) -> torch.Tensor:
    """Convolution with one group for each input channel, in as many dimensions as the weight has.

    ``y[n,(c,m),p] = b[(c,m)] + sum over r of w[(c,m),r] * x[n, c, p*stride - padding + r*dilation]``, 0 outside: what
    torch.nn.functional.conv1d, conv2d or conv3d compute with ``groups`` equal to the channels of the input.

    Args:
        input: Tensor[N, C, *space] or Tensor[C, *space], float32, float64, bfloat16 or float16.
        weight: Tensor[C*M, 1, *taps] in the input's dtype, M filters for each channel.
        bias: Tensor[C*M] or None.
        stride, padding, dilation: as in ``conv2d``.

    Returns:
        Tensor[N, C*M, *positions]; channels last where the input is.

    Raises:
        RuntimeError: ranks, channels, dtypes or devices that do not fit together, sizes out of range.
        NotImplementedError: an input that is not floating point.

    Sums are taken in float32 (float64 for float64), in a fixed order: bitwise deterministic. Gradients of every order
    (convolutions themselves), forward mode, vmap and torch.compile are supported.
    """
    check.floating("depthwise_conv", "input", input)
    if not isinstance(weight, torch.Tensor):
        check.fail(TypeError, "depthwise_conv", "weight", type(weight).__name__, "a tensor")
    dims = weight.dim() - 2
    if dims not in (1, 2, 3):
        check.fail(RuntimeError, "depthwise_conv", "weight", f"{weight.dim()} dimensions", "3, 4 or 5")
    if input.dim() not in (dims + 1, dims + 2):
        check.fail(RuntimeError, "depthwise_conv", "input", f"{input.dim()} dimensions", f"{dims + 1} or {dims + 2}")
    channels = input.shape[-dims - 1]
    return convolve("depthwise_conv", dims, input, weight, bias, stride, padding, dilation, channels)


explains("depthwise_conv", convolution_notes.explainer("depthwise_conv"), convolution_notes.room)


def _reference(input, weight, bias=None, stride=1, padding=0, dilation=1):
    dims = weight.dim() - 2
    conv = getattr(torch.nn.functional, f"conv{dims}d")
    return conv(input, weight, bias, stride, padding, dilation, input.shape[-dims - 1])


def _sample(shape, weight, bias=True, channels_last=False, **kwargs: Any):
    def make(t: Maker):
        x, w = t.input(shape, channels_last=channels_last), t.input(weight, channels_last=channels_last)
        return (x, w, t.input((weight[0],)) if bias else None), kwargs

    return make


checked(
    "depthwise_conv",
    depthwise_conv,
    _reference,
    Sample(
        "two filters a channel, every parameter differs by side",
        _sample((1, 2, 4, 3), (4, 1, 3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
        derivatives=True,
    ),
    Sample(
        "two filters a channel, channels last, stride",
        _sample((2, 2, 3, 4), (4, 1, 3, 3), channels_last=True, stride=2, padding=1),
        derivatives=True,
    ),
    Sample("3x3, rows of several vectors", _sample((2, 3, 9, 37), (3, 1, 3, 3), padding=1)),
    Sample("5x5, channels last", _sample((1, 19, 7, 6), (19, 1, 5, 5), channels_last=True, padding=2)),
    Sample("7x7, plane of several tiles", _sample((1, 2, 35, 11), (2, 1, 7, 7), bias=False, padding=3)),
    Sample("even filter", _sample((1, 2, 9, 8), (2, 1, 6, 5), padding=(3, 2))),
    Sample("one dimension", _sample((2, 3, 33), (3, 1, 4), padding="same")),
    Sample("three dimensions", _sample((1, 2, 4, 5, 6), (2, 1, 2, 3, 3), padding=1, stride=(1, 2, 1))),
    Sample("empty batch", _sample((0, 2, 5, 5), (2, 1, 3, 3))),
)
