"""Convolution and transposed convolution in 1, 2 and 3 dimensions, with groups.

    y[n,k,p] = b[k] + sum over c of the group of k, r of  w[k,c,r] x[n, c, p*stride - padding + r*dilation]

    x: [N, C, *space]   w: [K, C/G, *taps]   b: [K]   y: [N, K, *positions]

The transposed convolution is the gradient of the convolution in its input. Canonical form, gradients and second
gradients stand in core/convolution.py and are derived in docs/math/convolution.md; depthwise convolutions (one input
channel in a group) have kernels of their own in the room depthwise_conv.

Source: torch.nn.functional.conv1d to conv3d, conv_transpose1d to conv_transpose3d; Dumoulin, Visin 2016,
https://arxiv.org/abs/1603.07285.
"""

from __future__ import annotations

from typing import Any

import torch

from ..core import convolution, convolution_notes, library
from ..core.convolve import Sizes, convolve, convolve_transposed
from ..core.explain import explains
from ..core.intercept import route
from ..core.samples import Maker, Sample, checked

convolution.family("conv", library.triton_kernels("conv"), lambda c, w, groups: True)

_NOTES = """
    Raises:
        RuntimeError: ranks, channels, dtypes or devices that do not fit together, a filter that does not fit, sizes
            out of range.
        NotImplementedError: an input that is not floating point.

    Sums are taken in float32 (float64 for float64). On a GPU float32 follows torch's TF32 switch. Channels last in
    gives channels last out. Bitwise deterministic: sums are split by shape, never by thread, and there are no float
    atomics. Gradients of every order (convolutions themselves), forward mode, vmap and torch.compile are supported.
    Under autocast it runs in the low precision.
"""
_CONV = """Convolution in {n} dimension{s}; drops in for torch.nn.functional.{name}.

    ``y[n,k,p] = b[k] + sum over c, r of w[k,c,r] * x[n, c, p*stride - padding + r*dilation]``, 0 outside the input.

    Args:
        input: Tensor[N, C, {space}] or Tensor[C, {space}], float32, float64, bfloat16 or float16.
        weight: Tensor[K, C/groups, {taps}] in the input's dtype.
        bias: Tensor[K] or None.
        stride: distance of neighbouring positions, >= 1; one integer or one for each dimension, as are the next two.
        padding: zeros around the input, >= 0, or ``'valid'`` (none) or ``'same'`` (output as large as the input).
        dilation: distance of the taps, >= 1.
        groups: number of blocks of channels that do not mix, a divisor of C and K.

    Returns:
        Tensor[N, K, *] with ``(size + 2*padding - dilation*(taps-1) - 1) // stride + 1`` positions a side.
"""
_TRANSPOSE = """Transposed convolution in {n} dimension{s}; drops in for torch.nn.functional.{name}.

    The gradient of a convolution in its input: ``y[n,k,h]`` is the sum of ``w[c,k,r] * x[n,c,p]`` over all c and all
    (p, r) with ``p*stride - padding + r*dilation = h``, plus ``b[k]``.

    Args:
        input: Tensor[N, C, {space}] or Tensor[C, {space}], float32, float64, bfloat16 or float16.
        weight: Tensor[C, K/groups, {taps}] in the input's dtype.
        bias: Tensor[K] or None.
        stride, padding, dilation, groups: those of the convolution whose gradient this is.
        output_padding: positions added at the end, less than the stride or the dilation.

    Returns:
        Tensor[N, K, *] with ``(size-1)*stride - 2*padding + dilation*(taps-1) + output_padding + 1`` positions a side;
        empty where that is 0, in every dtype, as torch is in float32.
"""


def _document(function: Any, text: str, n: int) -> None:
    sides, taps = ("D", "H", "W")[3 - n :], ("T", "R", "S")[3 - n :]
    names = {"space": ", ".join(sides), "taps": ", ".join(taps)}
    function.__doc__ = text.format(n=n, s="s" * (n > 1), name=function.__name__, **names) + _NOTES


def conv1d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> torch.Tensor:
    return convolve("conv1d", 1, input, weight, bias, stride, padding, dilation, groups)


def conv2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> torch.Tensor:
    return convolve("conv2d", 2, input, weight, bias, stride, padding, dilation, groups)


def conv3d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> torch.Tensor:
    return convolve("conv3d", 3, input, weight, bias, stride, padding, dilation, groups)


def conv_transpose1d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    output_padding: Sizes = 0,
    groups: int = 1,
    dilation: Sizes = 1,
) -> torch.Tensor:
    return convolve_transposed(
        "conv_transpose1d", 1, input, weight, bias, stride, padding, output_padding, groups, dilation
    )


def conv_transpose2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    output_padding: Sizes = 0,
    groups: int = 1,
    dilation: Sizes = 1,
) -> torch.Tensor:
    return convolve_transposed(
        "conv_transpose2d", 2, input, weight, bias, stride, padding, output_padding, groups, dilation
    )


def conv_transpose3d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    output_padding: Sizes = 0,
    groups: int = 1,
    dilation: Sizes = 1,
) -> torch.Tensor:
    return convolve_transposed(
        "conv_transpose3d", 3, input, weight, bias, stride, padding, output_padding, groups, dilation
    )


for _n, (_f, _t) in enumerate(((conv1d, conv_transpose1d), (conv2d, conv_transpose2d), (conv3d, conv_transpose3d)), 1):
    _document(_f, _CONV, _n)
    _document(_t, _TRANSPOSE, _n)


class _Forward:
    """What the convolution modules of torch share: forward on a pyops function."""

    _function: Any

    def _conv_forward(self: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            pad = self._reversed_padding_repeated_twice
            input, padding = torch.nn.functional.pad(input, pad, mode=self.padding_mode), 0
        return type(self)._function(input, weight, bias, self.stride, padding, self.dilation, self.groups)


class Conv1d(_Forward, torch.nn.Conv1d):
    """torch.nn.Conv1d on pyops.functional.conv1d."""

    _function = staticmethod(conv1d)


class Conv2d(_Forward, torch.nn.Conv2d):
    """torch.nn.Conv2d on pyops.functional.conv2d."""

    _function = staticmethod(conv2d)


class Conv3d(_Forward, torch.nn.Conv3d):
    """torch.nn.Conv3d on pyops.functional.conv3d."""

    _function = staticmethod(conv3d)


class _TransposedForward:
    _function: Any

    def forward(self: Any, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        dims = len(self.kernel_size)
        extra = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, dims, self.dilation
        )
        return type(self)._function(
            input, self.weight, self.bias, self.stride, self.padding, extra, self.groups, self.dilation
        )


class ConvTranspose1d(_TransposedForward, torch.nn.ConvTranspose1d):
    """torch.nn.ConvTranspose1d on pyops.functional.conv_transpose1d."""

    _function = staticmethod(conv_transpose1d)


class ConvTranspose2d(_TransposedForward, torch.nn.ConvTranspose2d):
    """torch.nn.ConvTranspose2d on pyops.functional.conv_transpose2d."""

    _function = staticmethod(conv_transpose2d)


class ConvTranspose3d(_TransposedForward, torch.nn.ConvTranspose3d):
    """torch.nn.ConvTranspose3d on pyops.functional.conv_transpose3d."""

    _function = staticmethod(conv_transpose3d)


for _function in (conv1d, conv2d, conv3d, conv_transpose1d, conv_transpose2d, conv_transpose3d):
    _theirs = getattr(torch.nn.functional, _function.__name__)
    route((_theirs,), _function.__name__, _function)
    explains(_function.__name__, convolution_notes.explainer(_function.__name__), convolution_notes.room)


# Samples


def _sample(shape, weight, bias=True, channels_last=False, groups=1, transposed=False, **kwargs):
    def make(t: Maker):
        x, w = t.input(shape, channels_last=channels_last), t.input(weight, channels_last=channels_last)
        b = t.input((weight[1] * groups if transposed else weight[0],)) if bias else None
        return (x, w, b), {**kwargs, "groups": groups}

    return make


def _enter(function, *samples: Sample) -> None:
    checked(function.__name__, function, getattr(torch.nn.functional, function.__name__), *samples)


_enter(
    conv1d,
    Sample("padding and bias", _sample((2, 2, 7), (3, 2, 3), padding=1), derivatives=True),
    Sample("unbatched, no bias, groups", _sample((4, 9), (6, 2, 2), bias=False, groups=2, stride=2)),
)
_enter(
    conv2d,
    Sample(
        "every parameter differs by side",
        _sample((2, 2, 7, 6), (3, 2, 3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
        derivatives=True,
    ),
    Sample(
        "two groups, channels last",
        _sample((2, 4, 4, 3), (6, 2, 2, 2), channels_last=True, groups=2, stride=2, padding=1),
        derivatives=True,
    ),
    Sample("1x1", _sample((2, 9, 5, 5), (7, 9, 1, 1), bias=False)),
    Sample("channels last, whole vectors", _sample((2, 16, 6, 7), (24, 16, 3, 3), channels_last=True, padding=1)),
    Sample("ragged tiles", _sample((2, 13, 9, 11), (35, 13, 3, 3), padding=1)),
    Sample("stride larger than the filter", _sample((1, 3, 9, 9), (4, 3, 2, 2), stride=3)),
    Sample("same padding of an even filter", _sample((1, 2, 5, 6), (2, 2, 2, 4), padding="same")),
    Sample("empty batch", _sample((0, 2, 5, 5), (3, 2, 3, 3))),
)
_enter(
    conv3d,
    Sample("small volume", _sample((1, 2, 3, 4, 3), (2, 2, 2, 2, 2), padding=(1, 0, 1)), derivatives=True),
    Sample("channels last, strides", _sample((1, 4, 5, 4, 6), (8, 4, 3, 1, 3), channels_last=True, stride=(2, 1, 2))),
)
_enter(
    conv_transpose1d,
    Sample("stride and output padding", _sample((2, 3, 4), (3, 2, 3), transposed=True, stride=2, output_padding=1)),
)
_enter(
    conv_transpose2d,
    Sample(
        "every parameter differs by side",
        _sample(
            (1, 2, 3, 3), (2, 2, 3, 2), transposed=True, stride=(2, 1), padding=(1, 0), output_padding=(1, 1),
            dilation=(1, 2),
        ),
        derivatives=True,
    ),
    Sample(
        "groups, channels last",
        _sample((2, 8, 4, 3), (8, 8, 2, 2), channels_last=True, transposed=True, groups=2, stride=2, padding=1),
    ),
)  # fmt: skip
_enter(
    conv_transpose3d,
    Sample("small volume", _sample((1, 2, 2, 3, 2), (2, 3, 2, 2, 2), transposed=True, stride=2, bias=False)),
)
