"""A convolution with what usually follows it: bias, the residual of a block, and the activation.

    y[n,k,p] = f(b[k] + r[n,k,p] + sum over c, r of w[k,c,r] x[n, c, p*stride - padding + r*dilation])

    x: [N, C, H, W]   w: [K, C/G, R, S]   b: [K]   r, y: [N, K, P, Q]

Without derivatives the sum is finished where it was taken, in registers or the first-level cache: y is written once and
never read. For a derivative conv(x, w) + r is kept, as ``linear_act`` keeps its product; bias and activation are one
pass over it, and so are both their gradients. The kernels are those of the rooms conv, depthwise_conv and linear.

Source: torch.nn.functional.conv2d; He et al. 2016 (the residual block), https://arxiv.org/abs/1512.03385.
"""

from __future__ import annotations

from typing import Any

import torch

from ..core import activations, convolution_notes
from ..core.convolve import Sizes, convolve_act
from ..core.explain import explains
from ..core.samples import Maker, Sample, checked

_torch = torch.nn.functional


def conv2d_act(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "relu",
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> torch.Tensor:
    """``f(conv2d(x, w) + b + r)`` in one pass over the output.

    Args:
        input: Tensor[N, C, H, W] or Tensor[C, H, W] in float32, float64, bfloat16 or float16.
        weight: Tensor[K, C/groups, R, S] in the input's dtype; dense, grouped and depthwise filters alike.
        bias: Tensor[K] or None.
        residual: Tensor of the output's shape, or None; brought to the output's layout.
        activation: a name as in ``bias_act``: ``"relu"``, ``"silu"``, ``"gelu"``, ...; ``"identity"`` for none.
        stride, padding, dilation, groups: those of ``conv2d``.
        padding_mode: ``"zeros"``, or ``"reflect"``, ``"replicate"``, ``"circular"``, which pad a copy of the input.

    Returns:
        Tensor[N, K, P, Q], channels last where the input or the weight is.

    Raises:
        ValueError: an unknown activation or padding mode.
        TypeError: a residual that is no tensor.
        RuntimeError: a residual that does not fit, and what ``conv2d`` refuses.
        NotImplementedError: an input that is not floating point.

    Sums are taken in float32 (float64 for float64). Without derivatives they are rounded once, after the activation; to
    keep them for a derivative rounds conv + residual in between, and the kernels for sm_90a round conv + bias. Bitwise
    deterministic as ``conv2d`` is. Gradients of every order, forward mode, vmap and torch.compile are supported. Under
    autocast it runs in the low precision.
    """
    return convolve_act(
        "conv2d_act", 2, input, weight, bias, residual, activation, stride, padding, dilation, groups, padding_mode
    )


_convolution = convolution_notes.explainer("conv2d_act")


def _explain(shapes, dtype, name, **geometry):
    end = "bias, residual and activation on the sums before they are stored; a second pass where a derivative is wanted"
    return (*_convolution(shapes, dtype, name, **geometry), end)


explains("conv2d_act", _explain, convolution_notes.room)


def _reference(input, weight, bias=None, residual=None, activation="relu", padding_mode="zeros", **geometry: Any):
    """The same in plain torch."""
    if padding_mode != "zeros":
        p = geometry.pop("padding")
        input = _torch.pad(input, (p, p, p, p), mode=padding_mode)
    y = _torch.conv2d(input, weight, bias, **geometry)
    return activations.truth(activation)(y if residual is None else y + residual.to(y.dtype))


def _sample(shape, weight, output, activation, bias=True, residual=True, channels_last=False, **kwargs: Any):
    def make(t: Maker):
        x, w = t.input(shape, channels_last=channels_last), t.input(weight, channels_last=channels_last)
        b = t.input((weight[0],)) if bias else None
        r = t.input(output, channels_last=channels_last) if residual else None
        return (x, w, b, r, activation), kwargs

    return make


checked(
    "conv2d_act",
    conv2d_act,
    _reference,
    Sample(
        "every parameter differs by side",
        _sample((1, 2, 3, 2), (2, 2, 2, 2), (1, 2, 4, 2), "gelu", stride=(1, 2), padding=(1, 2), dilation=(1, 2)),
        derivatives=True,
    ),
    Sample(
        "two groups, channels last, no bias",
        _sample(
            (2, 4, 2, 3), (2, 2, 2, 2), (2, 2, 2, 2), "silu", False, channels_last=True, groups=2, stride=2, padding=1
        ),
        derivatives=True,
    ),
    Sample("depthwise", _sample((1, 2, 7, 9), (4, 1, 3, 3), (1, 4, 7, 9), "silu", groups=2, padding=1)),
    Sample("ragged tiles, relu", _sample((1, 5, 9, 8), (35, 5, 3, 3), (1, 35, 9, 8), "relu", padding=1)),
    Sample(
        "channels last, whole vectors",
        _sample((1, 16, 5, 4), (8, 16, 3, 3), (1, 8, 5, 4), "gelu", channels_last=True, padding=1),
    ),
    Sample(
        "depthwise, channels last, stride",
        _sample(
            (1, 19, 5, 4), (19, 1, 3, 3), (1, 19, 3, 2), "gelu", channels_last=True, groups=19, stride=2, padding=1
        ),
    ),
    Sample("1x1, no residual", _sample((2, 9, 5, 5), (7, 9, 1, 1), None, "silu", residual=False)),
    Sample(
        "unbatched, reflected borders",
        _sample((2, 5, 6), (3, 2, 3, 3), (3, 5, 6), "hardswish", padding=1, padding_mode="reflect"),
    ),
    Sample("neither bias nor residual", _sample((1, 3, 9, 9), (4, 3, 2, 2), None, "relu", False, False, stride=3)),
    Sample("empty batch", _sample((0, 2, 5, 5), (3, 2, 3, 3), (0, 3, 3, 3), "relu")),
)  # fmt: skip
