"""Colour histograms: how many pixels of each channel of an image lie in each bin of a range of values.

    whole  y[m, b] = number of the s with edge[b] <= x[m, s] < edge[b + 1]; the last bin holds its end as well
    soft   y[m, b] = sum over s of max(0, 1 - |x[m, s] - centre[b]| / width), 1 beyond the outer centres
           dx[m, s] = (dy[m, b + 1] - dy[m, b]) / width      where centre[b] < x[m, s] < centre[b + 1], else 0

    x: the S pixels of M channels, [N, C, S] or [N, S, C]   edge[b] = low + b · width, width = (high - low) / B

Values outside the range, and NaN, count in no bin. A whole count has no gradient; a soft one shares each pixel between
two bins, linearly by its distance from their centres, and has (docs/math/images.md).

Sources: skimage.exposure.histogram, numpy.histogram; the shares are those of Dalal and Triggs (2005).
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ..core import backend, check, layout, library
from ..core.autograd import Formula, Tensors, differentiable
from ..core.samples import Sample, checked

_kernels = library.triton_kernels("histogram")


def _fake(x, edges, soft, channels_last):
    return x.new_empty(
        x.shape[0], x.shape[2 if channels_last else 1], edges.shape[0] - 1, dtype=x.dtype if soft else torch.int64
    )


_fwd = library.declare(
    "histogram_fwd(Tensor x, Tensor edges, bool soft, bool channels_last) -> Tensor", _fake, _kernels
)
_bwd = library.declare(
    "histogram_bwd(Tensor dy, Tensor x, Tensor edges, bool channels_last) -> Tensor",
    lambda dy, x, edges, channels_last: x.new_empty(x.shape),
    _kernels,
)


def _reference(x, edges, soft, channels_last):
    """The soft form, the only one with derivatives."""
    x = x.movedim(-1, 1) if channels_last else x
    bins = edges.shape[0] - 1
    low, high = edges[0], edges[-1]
    inside = ((x >= low) & (x <= high)).detach()
    at = ((torch.where(inside, x, low.to(x.dtype)) - low) / (high - low) * bins - 0.5).clamp(0, bins - 1)
    centres = torch.arange(bins, device=x.device, dtype=at.dtype)
    weight = (1 - (at.unsqueeze(-1) - centres).abs()).clamp(min=0)
    return (torch.where(inside.unsqueeze(-1), weight, 0.0).sum(-2).to(x.dtype),)


def _arguments(dy, inputs: Tensors, kept: Tensors, constants: Tensors, needs) -> Tensors:
    return dy, *inputs, constants[1]


def _fold(forward, batch, dims, inputs, constants):
    """A batch is more of N; the edges are the same for all."""
    x, edges = inputs
    if dims[1] is not None:
        return None
    x = x.movedim(dims[0], 0)
    y = forward(x.flatten(0, 1).contiguous(), edges, *constants)
    return y.reshape(batch, x.shape[1], *y.shape[1:]), 0


_apply: Any = differentiable(Formula(_fwd, _bwd, 2, 1, _arguments, _reference, _fold, keep=()))


def _edges(bins: int, low: float, high: float, like: torch.Tensor) -> torch.Tensor:
    """bins + 1 of them, computed in float64; the last is ``high`` itself."""
    inner = torch.arange(bins, device=like.device, dtype=torch.float64) * ((high - low) / bins) + low
    edges = torch.cat([inner, inner.new_full((1,), high)])
    return edges.to(check.accumulate_dtype(like.dtype))


def color_histogram(
    input: torch.Tensor,
    bins: int = 256,
    range: tuple[float, float] = (0.0, 1.0),
    *,
    normalize: bool = False,
    soft: bool = False,
    channel_axis: int | None = None,
) -> torch.Tensor:
    """Histogram of every channel of every image; numpy.histogram and skimage.exposure.histogram for batches.

        y[c, b] = number of the pixels of channel c in [low + b · width, low + (b + 1) · width)

    Args:
        input: Tensor[*, H, W], one histogram for each of *, such as [N, C, H, W]; float32, float64, bfloat16, float16,
            or uint8, computed as float32.
        bins: bins of one width.
        range: (low, high), the least and the greatest value that count; (0, 256) and 256 bins count bytes.
        normalize: divide the counts of a channel by their sum, where that is not 0.
        soft: share each pixel between the two bins whose centres it lies between, by its distance from them; then
            the histogram has a gradient, and its sum is the number of pixels in range as well.
        channel_axis: the dimension of channels where they are not before the last two, as -1 for [H, W, C].

    Returns:
        Tensor[*, bins] of int64; with ``normalize`` or ``soft`` of the input's dtype (float32 for uint8).

    Raises:
        ValueError: fewer than two dimensions, bins < 1, a range that does not rise or is not finite.
        TypeError: bins that are no int, a range of what is no number.
        IndexError: ``channel_axis`` is no dimension of the input.
        NotImplementedError: a dtype without kernels.

    Bitwise deterministic; of the soft histogram gradients of every order, forward mode, vmap and torch.compile. A pixel
    at the centre of a bin has gradient 0 or that of its right side.
    """
    op = "color_histogram"
    if isinstance(input, torch.Tensor) and input.dtype == torch.uint8:
        input = input.float()
    check.floating(op, "input", input)
    if input.dim() < 2:
        check.fail(ValueError, op, "input", f"shape {list(input.shape)}", "at least 2 dimensions")
    x = layout.channels_before_space(op, input, -3 if channel_axis is None and input.dim() > 2 else channel_axis)
    if isinstance(bins, bool) or not isinstance(bins, int):
        check.fail(TypeError, op, "bins", repr(bins), "an int")
    if bins < 1:
        check.fail(ValueError, op, "bins", bins, "an int >= 1")
    if not isinstance(range, (tuple, list)) or not all(isinstance(v, (int, float)) for v in range):
        check.fail(TypeError, op, "range", repr(range), "two numbers")
    if len(range) != 2 or not (range[0] < range[1] and math.isfinite(range[1] - range[0])):
        check.fail(ValueError, op, "range", tuple(range), "two finite numbers that rise")
    low, high = float(range[0]), float(range[1])
    lead, channels, pixels = x.shape[:-3], x.shape[-3], math.prod(x.shape[-2:])
    channels_last = not x.is_contiguous() and x.movedim(-3, -1).is_contiguous()
    x = x.movedim(-3, -1) if channels_last else x.contiguous()
    x = x.reshape(math.prod(lead), *((pixels, channels) if channels_last else (channels, pixels)))
    edges, namespace = _edges(bins, low, high, x), backend.namespace_for(op, x)
    apply = _apply if soft else _fwd
    y = apply(namespace, x if soft else x.detach(), edges, soft, channels_last)
    y = y.reshape(*lead, channels, bins) if input.dim() > 2 else y.reshape(bins)
    if not normalize:
        return y
    counts = y if soft else y.to(check.accumulate_dtype(x.dtype))
    return (counts / counts.sum(-1, keepdim=True).clamp(min=torch.finfo(counts.dtype).tiny)).to(x.dtype)


def _torch_reference(input, bins, range, soft=True, normalize=False):
    x = input.reshape(1, math.prod(input.shape[:-2]), math.prod(input.shape[-2:]))
    y = _reference(x, _edges(bins, range[0], range[1], x), True, False)[0].reshape(*input.shape[:-2], bins)
    return y / y.sum(-1, keepdim=True) if normalize else y


def _sample(shape, bins, range, **how):
    return lambda t: ((t.input(shape), bins, range), {"soft": True, **how})


checked(
    "color_histogram",
    color_histogram,
    _torch_reference,
    Sample("shared between bins, some out of range", _sample((2, 2, 3), 3, (-1.03, 1.11)), derivatives=True),
    Sample("shares of all pixels", _sample((1, 1, 2, 3), 3, (-4.0, 4.1), normalize=True), derivatives=True),
    Sample("one bin", _sample((3, 5, 7), 1, (-1.0, 1.0))),
    Sample("more bins than a block has", _sample((1, 5, 33), 300, (-3.013, 3.177))),
    Sample("no images", _sample((0, 4, 4), 3, (0.0, 1.0))),
)
