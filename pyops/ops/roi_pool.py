"""RoI Pool: the maximum of every bin of a box, and the position-sensitive mean.

    max    y[r,c,p,q] = max of x[n_r, c] over bin (p, q) of RoI r, 0 where the bin holds no pixel
    mean   y[r,c,p,q] = mean of x[n_r, (c P + p) Q + q] over the bin

    bin p along y: [floor(p L / P), ceil((p + 1) L / P)) + y1,  L = max(y2 - y1 + 1, 1) (max), max(y2 - y1, 1) (mean),
    y1, y2 rounded to pixels

    x: [N, C, H, W]   rois: [R, 5] = (image, x1, y1, x2, y2)   y: [R, C, P, Q]

Source: Girshick 2015, https://arxiv.org/abs/1504.08083; Dai et al. 2016, https://arxiv.org/abs/1605.06409;
torchvision.ops.roi_pool, ps_roi_pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..core import backend, check, geometry, library
from ..core.autograd import Formula, Tensors, differentiable
from ..core.explain import without_triton
from ..core.layout import is_channels_last
from ..core.samples import Maker, Sample, checked


def _fwd_fake(x, rois, p, q, mean, channels_last):
    r = rois.shape[0]
    c = x.shape[3] if channels_last else x.shape[1]
    if mean:
        c = c // (p * q)
    y = x.new_empty((r, p, q, c) if channels_last else (r, c, p, q))
    kept = 0 if mean else r
    return y, x.new_empty((kept, p, q, c) if channels_last else (kept, c, p, q), dtype=torch.int32)


def _bwd_fake(dy, x, rois, arg, p, q, mean, channels_last):
    return torch.empty_like(x)


_HOW = "int pooled_height, int pooled_width, bool mean, bool channels_last"
_fwd = library.declare(f"roi_pool_fwd(Tensor x, Tensor rois, {_HOW}) -> (Tensor, Tensor)", _fwd_fake, None)
_bwd = library.declare(f"roi_pool_bwd(Tensor dy, Tensor x, Tensor rois, Tensor arg, {_HOW}) -> Tensor", _bwd_fake, None)

# Beyond every map, and still far from the end of int64 when a bin is added.
_FAR = 2**30


def _inside(first, last, bins, pixels, mean, dtype):
    """[R, bins, pixels]: does a pixel belong to a bin, along one axis."""
    length = (last - first + (0 if mean else 1)).clamp(min=1).to(dtype)
    size = (length / bins)[:, None]
    p = torch.arange(bins, device=first.device, dtype=dtype)
    limit = max(pixels - 1, 0) if mean else pixels
    low = ((p * size).floor().long() + first[:, None]).clamp(0, limit)
    high = (((p + 1) * size).ceil().long() + first[:, None]).clamp(0, limit)
    pixel = torch.arange(pixels, device=first.device)
    return (pixel >= low[..., None]) & (pixel < high[..., None])


def _reference(x, rois, p, q, mean, channels_last):
    wide = check.accumulate_dtype(x.dtype)
    planes = (x.movedim(-1, 1) if channels_last else x).to(wide)
    n, c, h, w = planes.shape
    rows = _inside(rois[:, 2], rois[:, 4], p, h, mean, wide)
    columns = _inside(rois[:, 1], rois[:, 3], q, w, mean, wide)
    if mean:
        own = planes.reshape(n, c // (p * q), p, q, h, w)[rois[:, 0]]
        count = (rows.sum(-1)[:, None, :, None] * columns.sum(-1)[:, None, None]).clamp(min=1)
        y = torch.einsum("rcpqhw,rph,rqw->rcpq", own, rows.to(wide), columns.to(wide)) / count
        y = y.to(x.dtype)
        y = y.movedim(1, -1) if channels_last else y
        return y, y.new_empty((0, *y.shape[1:]), dtype=torch.int32)
    mask = (rows[:, :, None, :, None] & columns[:, None, :, None, :]).flatten(-2)[:, None]
    values = planes[rois[:, 0]].flatten(-2)[:, :, None, None]
    low = torch.full_like(values, -torch.inf)
    y, arg = torch.where(mask & ~values.isnan(), values, low).max(-1)
    empty = y == -torch.inf
    y, arg = torch.where(empty, torch.zeros_like(y), y), torch.where(empty, -1, arg)
    y = y.to(x.dtype)
    return (y.movedim(1, -1), arg.movedim(1, -1).int()) if channels_last else (y, arg.int())


def _backward_arguments(dy, inputs: Tensors, kept: Tensors, constants: Tensors, needs) -> Tensors:
    return dy, *inputs, *kept, *constants


_apply = differentiable(Formula(_fwd, _bwd, 2, 1, _backward_arguments, _reference))


def _pixels(op: str, input: torch.Tensor, boxes: Any, scale: float) -> torch.Tensor:
    """RoIs int64[R, 5], coordinates rounded half away from zero; one that is not finite lies beyond every map."""
    rois = geometry.scaled_regions(op, input, boxes, scale)
    whole = rois.trunc()
    whole = torch.where((rois - whole).abs() >= 0.5, whole + rois.sign(), whole)
    whole = torch.nan_to_num(whole, nan=-_FAR, posinf=_FAR, neginf=-_FAR).clamp(-_FAR, _FAR)
    image = torch.where(rois[:, :1].isfinite(), rois[:, :1].floor().clamp(-1, _FAR), -torch.ones_like(rois[:, :1]))
    finite = rois[:, 1:].isfinite().all(1, keepdim=True)
    coordinates = torch.where(finite, whole[:, 1:], torch.full_like(whole[:, 1:], -_FAR))
    return torch.cat((image, coordinates), 1).long()


def _run(op: str, input, boxes, output_size, spatial_scale, mean) -> torch.Tensor:
    rois = _pixels(op, input, boxes, spatial_scale)
    p, q = geometry.output_size(op, output_size)
    if mean and input.shape[1] % (p * q):
        check.fail(RuntimeError, op, "input", f"{input.shape[1]} channels", f"a multiple of {p} * {q}")
    channels_last = is_channels_last(input)
    x = (input.movedim(1, -1) if channels_last else input).contiguous()
    y, _ = _apply(backend.namespace_for(op, input), x, rois, p, q, mean, channels_last)
    return y.movedim(-1, 1) if channels_last else y


def maxima(input: torch.Tensor, rois: torch.Tensor, p: int, q: int) -> torch.Tensor:
    """int32[R, C, P, Q]: the pixel of every maximum in row order, -1 for none; rois: rounded, int64[R, 5]."""
    namespace = backend.namespace_for("roi_pool", input)
    return _fwd(namespace, input.detach().contiguous(), rois, p, q, False, False)[1]


def roi_pool(
    input: torch.Tensor,
    boxes: torch.Tensor | Sequence[torch.Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
) -> torch.Tensor:
    """The maximum of every bin of a box; drops in for torchvision.ops.roi_pool.

    Args:
        input: Tensor[N, C, H, W], float32, float64, bfloat16 or float16.
        boxes: Tensor[R, 5] = (image, x1, y1, x2, y2) in the input's dtype, or for every image a Tensor[L, 4].
        output_size: (P, Q) bins, or one number for both.
        spatial_scale: from the coordinates of the boxes to pixels of the input.

    Returns:
        Tensor[R, C, P, Q]; channels last where the input is. 0 where a bin holds no pixel. NaN pixels are passed over,
        as torchvision does.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit, an image index out of range.
        ValueError: an output size out of range.

    Bitwise deterministic, the gradient too (to the first maximum in row order), which needs no memory beyond its
    result. C++ and CUDA; gradients of every order in the input, forward mode, vmap, torch.compile.
    """
    return _run("roi_pool", input, boxes, output_size, spatial_scale, False)


def ps_roi_pool(
    input: torch.Tensor,
    boxes: torch.Tensor | Sequence[torch.Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
) -> torch.Tensor:
    """Position-sensitive mean: bin (p, q) of channel c reads plane (c P + p) Q + q; as torchvision.ops.ps_roi_pool.

    As there, bins end before the last row and column of the map; the gradient here is that of this forward pass.

    Args:
        input: Tensor[N, K P Q, H, W].
        boxes, output_size, spatial_scale: as in ``roi_pool``.

    Returns:
        Tensor[R, K, P, Q]; channels last where the input is.
    """
    return _run("ps_roi_pool", input, boxes, output_size, spatial_scale, True)


class _Pool(torch.nn.Module):
    def __init__(self, output_size: Any, spatial_scale: float) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale

    def __repr__(self) -> str:
        return f"{type(self).__name__}(output_size={self.output_size}, spatial_scale={self.spatial_scale})"


class RoIPool(_Pool):
    """``roi_pool`` as a module; see torchvision.ops.RoIPool."""

    def forward(self, input: torch.Tensor, rois: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
        return roi_pool(input, rois, self.output_size, self.spatial_scale)


class PSRoIPool(_Pool):
    """``ps_roi_pool`` as a module; see torchvision.ops.PSRoIPool."""

    def forward(self, input: torch.Tensor, rois: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
        return ps_roi_pool(input, rois, self.output_size, self.spatial_scale)


def _sample(shape, boxes, size, scale=1.0, channels_last=False):
    def make(t: Maker):
        x = t.input(shape, channels_last=channels_last)
        # distinct values, exact in every dtype: the gradient of a maximum knows no ties
        with torch.no_grad():
            count = shape[2] * shape[3]
            order = torch.arange(count).mul(89).remainder(256).reshape(shape[2:]) - 128
            x.copy_(order.to(x).expand(shape))
        rois = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 5).to(x.detach().dtype).to(t.device)
        return (x, rois, size), {"spatial_scale": scale}

    return make


def _truth(mean):
    def reference(input, boxes, output_size, spatial_scale=1.0):
        rois = _pixels("reference", input, boxes, spatial_scale)
        y = _reference(input, rois, *geometry.output_size("reference", output_size), mean, False)[0]
        return y.contiguous(memory_format=torch.channels_last) if is_channels_last(input) else y

    return reference


_FEW = [[1, 0.5, 1, 4.25, 3.5], [0, -2, 0, 3, 9]]
_MORE = [*_FEW, [0, 2, 2, 2, 2], [1, 5, 4, 1, 2], [0, 100, 100, 120, 130], [1, -50, -50, 60, 70], [0, 0, 0, 7, 6]]
checked(
    "roi_pool",
    roi_pool,
    _truth(False),
    Sample("two RoIs, one over the border", _sample((2, 2, 4, 5), _FEW, (2, 3)), derivatives=True),
    Sample("outside, empty, crossed, huge", _sample((2, 3, 6, 21), _MORE, 3, 0.5)),
    Sample("channels last", _sample((2, 35, 6, 7), _MORE, (2, 2), channels_last=True)),
    Sample("no RoIs", _sample((2, 3, 4, 4), [], 2)),
)
checked(
    "ps_roi_pool",
    ps_roi_pool,
    _truth(True),
    Sample("two RoIs", _sample((2, 4, 3, 4), _FEW, (1, 2)), derivatives=True),
    Sample("channels last", _sample((2, 30, 6, 7), _MORE, (2, 3), 0.5, channels_last=True)),
    Sample("channels last, one channel a bin", _sample((2, 6, 9, 5), _FEW, (3, 2), channels_last=True)),
    Sample("every kind of RoI", _sample((2, 18, 6, 7), _MORE, (3, 2), 0.5)),
)


without_triton("roi_pool", "ps_roi_pool")
