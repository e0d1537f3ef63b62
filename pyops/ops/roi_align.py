"""RoI Align: features of boxes by bilinear sampling, on one map, position-sensitive, or on a whole pyramid at once.

    y[r,c,p,q] = 1/(g h) Σ_ij x[n_r, c](y_pi, x_qj)       bin (p, q) of RoI r, g × h samples, bilinear
    y_pi = y1 s - o + (p + (i + 1/2)/g) bin_h             s = spatial_scale, o = 1/2 if aligned, else 0

    x: [N, C, H, W]   rois: [R, 5] = (image, x1, y1, x2, y2)   y: [R, C, P, Q]

Linear in x: the gradient is its transpose, the gradient of the gradient the op itself. Bilinear sampling separates, so
the mean over a bin is a product of two one-dimensional weightings (docs/math/detection.md).
Source: He et al. 2017, https://arxiv.org/abs/1703.06870; Lin et al. 2017 for the pyramid; Dai et al. 2016 for the
position-sensitive form; torchvision.ops.roi_align, ps_roi_align, MultiScaleRoIAlign.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..core import backend, check, geometry, library
from ..core.autograd import Formula, Tensors, differentiable
from ..core.explain import explains
from ..core.layout import is_channels_last
from ..core.samples import Maker, Sample, checked

_kernels = library.triton_kernels("roi_align")

LEVELS = 5  # maps that one launch can serve
_MAPS = "Tensor x0, Tensor? x1, Tensor? x2, Tensor? x3, Tensor? x4, Tensor rois, Tensor? levels"
_HOW = "int pooled_height, int pooled_width, int sampling_ratio, bool aligned, bool channels_last, "
_HOW += "bool position_sensitive"


def _fwd_fake(x0, x1, x2, x3, x4, rois, levels, p, q, sampling_ratio, aligned, channels_last, position_sensitive):
    c = x0.shape[3] if channels_last else x0.shape[1]
    if position_sensitive:
        c = c // (p * q)
    return x0.new_empty((rois.shape[0], p, q, c) if channels_last else (rois.shape[0], c, p, q))


def _bwd_fake(dy, x0, x1, x2, x3, x4, rois, levels, p, q, sampling_ratio, aligned, channels_last, position_sensitive):
    return tuple(x0.new_empty(0) if x is None else torch.empty_like(x) for x in (x0, x1, x2, x3, x4))


_fwd = library.declare(f"roi_align_fwd({_MAPS}, {_HOW}) -> Tensor", _fwd_fake, _kernels)
_bwd = library.declare(
    f"roi_align_bwd(Tensor dy, {_MAPS}, {_HOW}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)", _bwd_fake, _kernels
)


def _weights(start, stop, bins, size, sampling_ratio, aligned):
    """[R, bins, size]: weight of every pixel in the mean over every bin, along one axis."""
    offset = 0.5 if aligned else 0.0
    start, stop = start - offset, stop - offset
    finite = torch.isfinite(stop - start) & torch.isfinite(start)
    length = stop - start if aligned else (stop - start).clamp(min=1)
    step = length / bins
    grid = torch.full_like(step, sampling_ratio) if sampling_ratio > 0 else step.ceil().clamp(0, 1e9)
    grid = torch.where(finite, grid, torch.zeros_like(grid))
    most = max(int(grid.max()), 1) if grid.numel() and sampling_ratio <= 0 else max(sampling_ratio, 1)
    p = torch.arange(bins, dtype=start.dtype, device=start.device)[:, None]
    i = torch.arange(most, dtype=start.dtype, device=start.device)
    column = lambda t: t[..., None, None]
    at = column(start) + p * column(step) + (i + 0.5) * column(step) / column(grid)
    counts = (i < column(grid)) & (at >= -1) & (at <= size)
    at = torch.where(counts, at, torch.zeros_like(at)).clamp(0, size - 1)
    pixel = torch.arange(size, dtype=start.dtype, device=start.device)
    hat = (1 - (at[..., None] - pixel).abs()).clamp(min=0) * counts[..., None]
    return hat.sum(-2) / column(grid).clamp(min=1)


def _one_level(x, rois, p, q, sampling_ratio, aligned, position_sensitive):
    """x: [N, C, H, W] in the dtype of sums."""
    n, c, h, w = x.shape
    wy = _weights(rois[:, 2], rois[:, 4], p, h, sampling_ratio, aligned)
    wx = _weights(rois[:, 1], rois[:, 3], q, w, sampling_ratio, aligned)
    image = rois[:, 0].long()
    if position_sensitive:
        own = x.reshape(n, c // (p * q), p, q, h, w)[image]
        return torch.einsum("rcpqhw,rph,rqw->rcpq", own, wy, wx)
    return torch.einsum("rcpw,rqw->rcpq", torch.einsum("rchw,rph->rcpw", x[image], wy), wx)


def _reference(x0, x1, x2, x3, x4, rois, levels, p, q, sampling_ratio, aligned, channels_last, position_sensitive):
    total: Any = None
    for level, x in enumerate((x0, x1, x2, x3, x4)):
        if x is None:
            continue
        wide = x.to(rois.dtype)
        wide = wide.movedim(-1, 1) if channels_last else wide
        y = _one_level(wide, rois, p, q, sampling_ratio, aligned, position_sensitive)
        if levels is not None:
            y = torch.where((levels == level)[:, None, None, None], y, torch.zeros_like(y))
        total = y if total is None else total + y
    total = total.to(x0.dtype)
    return (total.movedim(1, -1) if channels_last else total,)


def _backward_arguments(dy, inputs: Tensors, statistics: Tensors, constants: Tensors, needs) -> Tensors:
    return dy, *inputs, *constants


def _second(namespace, dy, inputs: Tensors, constants: Tensors, needs, cotangents) -> tuple[Any, Tensors]:
    """The gradient of the transpose of a linear map is the map."""
    maps = inputs[:LEVELS]
    given = (*cotangents, *(None,) * (LEVELS - len(cotangents)))[:LEVELS]
    if all(x is None or c is None for x, c in zip(maps, given)):
        return None, (None,) * len(inputs)
    filled = (x if x is None else torch.zeros_like(x) if c is None else c.contiguous() for x, c in zip(maps, given))
    y = _apply(namespace, *filled, *inputs[LEVELS:], *constants)
    return (y[0] if isinstance(y, tuple) else y), (None,) * len(inputs)


def _fold(forward, batch, dims, inputs, constants):
    """A batch of maps under the same RoIs is more images, each with its copies of the RoIs."""
    maps, (rois, levels) = inputs[:LEVELS], inputs[LEVELS:]
    if dims[LEVELS] is not None or dims[LEVELS + 1] is not None:
        return None
    if any(x is not None and d is None for x, d in zip(maps, dims)):
        return None
    n = None
    folded = []
    for x, d in zip(maps, dims):
        if x is not None:
            x = x.movedim(d, 0)
            n = x.shape[1]
            x = x.reshape(batch * n, *x.shape[2:])
        folded.append(x)
    shift = torch.arange(batch, dtype=rois.dtype, device=rois.device)[:, None, None] * n
    shift = torch.cat((shift, shift.new_zeros(batch, 1, 4)), 2)
    many = (rois[None] + shift).reshape(-1, 5)
    of_level = None if levels is None else levels.repeat(batch)
    y = forward(*folded, many, of_level, *constants)
    y = y[0] if isinstance(y, tuple) else y
    return (y.reshape(batch, rois.shape[0], *y.shape[1:]),), (0,)


_apply = differentiable(Formula(_fwd, _bwd, LEVELS + 2, LEVELS, _backward_arguments, _reference, _fold, second=_second))


def _run(op, maps, rois, levels, size, sampling_ratio, aligned, position_sensitive=False) -> torch.Tensor:
    """maps: up to five [N, C, H, W]; rois: [R, 5] in pixels of their level."""
    first = maps[0]
    channels_last = is_channels_last(first)
    given = [(x.movedim(1, -1) if channels_last else x).contiguous() for x in maps]
    given += [None] * (LEVELS - len(given))
    y = _apply(
        backend.namespace_for(op, first), *given, rois.contiguous(), levels, *size, sampling_ratio, aligned,
        channels_last, position_sensitive,
    )  # fmt: skip
    y = y[0] if isinstance(y, tuple) else y
    return y.movedim(-1, 1) if channels_last else y


def _whole(op: str, argument: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        check.fail(TypeError, op, argument, type(value).__name__, "an integer")
    return value


def _ratio(op: str, sampling_ratio: Any) -> int:
    value = _whole(op, "sampling_ratio", sampling_ratio)
    if value < -1:
        check.fail(ValueError, op, "sampling_ratio", value, "-1 or 0 (adaptive) or a positive number of samples")
    return value


def roi_align(
    input: torch.Tensor,
    boxes: torch.Tensor | Sequence[torch.Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> torch.Tensor:
    """Features of boxes, averaged over bilinear samples; drops in for torchvision.ops.roi_align.

    Args:
        input: Tensor[N, C, H, W], float32, float64, bfloat16 or float16.
        boxes: Tensor[R, 5] = (image, x1, y1, x2, y2) in the input's dtype, or for every image a Tensor[L, 4].
        output_size: (P, Q) bins, or one number for both.
        spatial_scale: from the coordinates of the boxes to pixels of the input.
        sampling_ratio: samples per bin and axis; -1 or 0: ceil(side of the bin).
        aligned: pixel centres at half coordinates (Detectron2); False is the older convention, sides at least 1.

    Returns:
        Tensor[R, C, P, Q] in the input's dtype; channels last where the input is. A RoI that is not finite gives zeros.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit, an image index out of range.
        ValueError: an output size or sampling ratio out of range.

    Sums are taken in float32 (float64 for float64). Bitwise deterministic, the gradient too, which needs no memory
    beyond its result. Gradients of every order in the input (not in the boxes), forward mode, vmap, torch.compile.
    """
    rois = geometry.scaled_regions("roi_align", input, boxes, spatial_scale)
    size = geometry.output_size("roi_align", output_size)
    return _run("roi_align", [input], rois, None, size, _ratio("roi_align", sampling_ratio), bool(aligned))


def ps_roi_align(
    input: torch.Tensor,
    boxes: torch.Tensor | Sequence[torch.Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
) -> torch.Tensor:
    """Position-sensitive RoI Align: bin (p, q) of channel c reads plane (c P + p) Q + q; as torchvision's.

    Args:
        input: Tensor[N, K P Q, H, W].
        boxes, output_size, spatial_scale, sampling_ratio: as in ``roi_align`` with ``aligned=True``.

    Returns:
        Tensor[R, K, P, Q]; channels last where the input is.
    """
    rois = geometry.scaled_regions("ps_roi_align", input, boxes, spatial_scale)
    p, q = geometry.output_size("ps_roi_align", output_size)
    if input.shape[1] % (p * q):
        check.fail(RuntimeError, "ps_roi_align", "input", f"{input.shape[1]} channels", f"a multiple of {p} * {q}")
    return _run("ps_roi_align", [input], rois, None, (p, q), _ratio("ps_roi_align", sampling_ratio), True, True)


class _Pooler(torch.nn.Module):
    """A RoI module: its arguments, and torchvision's way to print them."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in self._shown().items())})"

    def _shown(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if not k.startswith("_") and k != "training"}


class RoIAlign(_Pooler):
    """``roi_align`` as a module; see torchvision.ops.RoIAlign."""

    def __init__(self, output_size: Any, spatial_scale: float, sampling_ratio: int, aligned: bool = False) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned

    def forward(self, input: torch.Tensor, rois: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
        return roi_align(input, rois, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned)


class PSRoIAlign(_Pooler):
    """``ps_roi_align`` as a module; see torchvision.ops.PSRoIAlign."""

    def __init__(self, output_size: Any, spatial_scale: float, sampling_ratio: int) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio

    def forward(self, input: torch.Tensor, rois: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
        return ps_roi_align(input, rois, self.output_size, self.spatial_scale, self.sampling_ratio)


class MultiScaleRoIAlign(_Pooler):
    """RoI Align on a feature pyramid: every box on the level that fits its size, all levels in one launch.

    The level is ``floor(canonical_level + log2(sqrt(area) / canonical_scale) + 1e-6)``, within the levels there are
    (Lin et al. 2017, equation 1). Drops in for torchvision.ops.MultiScaleRoIAlign.

    Args:
        featmap_names: keys of the maps to use, finest first.
        output_size: (P, Q) bins, or one number for both.
        sampling_ratio: samples per bin and axis; -1 or 0: adaptive.
        canonical_scale, canonical_level: a box of this size belongs to this level.
    """

    def __init__(
        self,
        featmap_names: list[str],
        output_size: int | Sequence[int],
        sampling_ratio: int,
        *,
        canonical_scale: int = 224,
        canonical_level: int = 4,
    ) -> None:
        super().__init__()
        self.featmap_names = featmap_names
        self.output_size = geometry.output_size("MultiScaleRoIAlign", output_size)
        self.sampling_ratio = _ratio("MultiScaleRoIAlign", sampling_ratio)
        self.canonical_scale = canonical_scale
        self.canonical_level = canonical_level
        self.scales: list[float] | None = None

    def _shown(self) -> dict[str, Any]:
        names = ("featmap_names", "output_size", "sampling_ratio")
        return {name: getattr(self, name) for name in names}

    def forward(
        self, x: dict[str, torch.Tensor], boxes: list[torch.Tensor], image_shapes: list[tuple[int, int]]
    ) -> torch.Tensor:
        """
        Args:
            x: maps Tensor[N, C, H_l, W_l] by name; those in ``featmap_names`` are used.
            boxes: for every image a Tensor[L, 4] in pixels of the images.
            image_shapes: (height, width) of every image before the network; they tell the scale of each map.

        Returns:
            Tensor[sum of L, C, P, Q], image after image.
        """
        op = "MultiScaleRoIAlign"
        maps = [v for k, v in x.items() if k in self.featmap_names]
        if not maps:
            check.fail(RuntimeError, op, "x", f"maps {list(x)}", f"some of {self.featmap_names}")
        if self.scales is None:
            if not image_shapes or not all(h > 0 and w > 0 for h, w in image_shapes):
                got = list(image_shapes) or "an empty list"
                check.fail(ValueError, op, "image_shapes", got, "the (height, width) of every image, positive")
            tallest = max(h for h, _ in image_shapes)
            self.scales = [2.0 ** round(math.log2(m.shape[-2] / tallest)) for m in maps]
        for m in maps:
            check.floating(op, "x", m)
            if m.dim() != 4 or m.shape[:2] != maps[0].shape[:2] or m.dtype != maps[0].dtype:
                got = f"{m.dtype} of shape {list(m.shape)}"
                check.fail(
                    RuntimeError, op, "x", got, f"{maps[0].dtype} [{maps[0].shape[0]}, {maps[0].shape[1]}, H, W]"
                )
        rois = geometry.regions(op, maps[0], list(boxes)).detach()
        rois = rois.to(check.accumulate_dtype(maps[0].dtype))
        if len(maps) == 1:
            rois = torch.cat((rois[:, :1], rois[:, 1:] * self.scales[0]), 1)
            return _run(op, maps, rois, None, self.output_size, self.sampling_ratio, False)
        levels = self._levels(rois)
        scale = torch.tensor(self.scales, dtype=rois.dtype, device=rois.device)[levels]
        rois = torch.cat((rois[:, :1], rois[:, 1:] * scale[:, None]), 1)
        if len(maps) <= LEVELS:
            return _run(op, maps, rois, levels, self.output_size, self.sampling_ratio, False)
        y = None
        for first in range(0, len(maps), LEVELS):
            some = maps[first : first + LEVELS]
            inside = (levels >= first) & (levels < first + len(some))
            part = _run(
                op, some, rois, (levels - first).clamp(0, len(some) - 1), self.output_size, self.sampling_ratio, False
            )
            part = torch.where(inside[:, None, None, None], part, torch.zeros_like(part))
            y = part if y is None else y + part
        return y

    def _levels(self, rois: torch.Tensor) -> torch.Tensor:
        """Level int64[R] of every box, 0 for the first map."""
        scales = self.scales or [1.0]
        finest, coarsest = (int(-math.log2(s)) for s in (scales[0], scales[-1]))
        area = (rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])
        level = torch.floor(self.canonical_level + torch.log2(area.sqrt() / self.canonical_scale) + 1e-6)
        # a box that is crossed or not finite has no level: the finest one
        level = torch.nan_to_num(level, nan=finest).clamp(finest, coarsest)
        return level.long() - finest


def _notes(shapes, dtype, name):
    if name not in ("cuda", "emulator"):
        return []
    return [
        "forward: a block takes a RoI and a slice of channels; with few bins, or channels last and no whole vectors of "
        "16 bytes, it reads the map directly",
        "a RoI is staged through 32 KiB of shared memory where one row of its bins fits and its pixels are fewer than "
        "its samples read, 4 each; decided on the device, the same bits either way",
        "backward: a block gathers a tile of 8 rows of pixels from the RoIs that touch it; no atomics",
    ]


explains("roi_align", _notes)


def _sample(shape, boxes, size, channels_last=False, **how):
    def make(t: Maker):
        x = t.input(shape, channels_last=channels_last)
        rois = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 5).to(x.detach().dtype).to(t.device)
        return (x, rois, size), how

    return make


def _truth(position_sensitive):
    def reference(input, boxes, output_size, spatial_scale=1.0, sampling_ratio=-1, aligned=False):
        rois = geometry.scaled_regions("reference", input, boxes, spatial_scale)
        size = geometry.output_size("reference", output_size)
        how = (*size, sampling_ratio, aligned or position_sensitive, False, position_sensitive)
        y = _reference(input, None, None, None, None, rois, None, *how)[0]
        return y.contiguous(memory_format=torch.channels_last) if is_channels_last(input) else y

    return reference


_FEW = [[1, 0.5, 1, 4.25, 3.5], [0, -2, 0, 3, 9]]
_MORE = [*_FEW, [0, 2, 2, 2, 2], [1, 5, 4, 1, 2], [0, 100, 100, 120, 130], [1, -50, -50, 60, 70], [0, 0, 0, 7, 6]]
checked(
    "roi_align",
    roi_align,
    _truth(False),
    Sample("two RoIs, one over the border", _sample((2, 2, 4, 5), _FEW, (2, 3)), derivatives=True),
    Sample("aligned", _sample((2, 3, 6, 7), _MORE, (3, 2), sampling_ratio=2, aligned=True)),
    Sample("outside, empty, crossed, huge", _sample((2, 9, 6, 37), _MORE, 2, spatial_scale=0.5)),
    Sample("channels last", _sample((2, 5, 6, 7), _MORE, (2, 2), True, aligned=True)),
    Sample("channels last, whole vectors", _sample((2, 72, 4, 5), _FEW, 2, True, sampling_ratio=1)),
    Sample("no RoIs", _sample((2, 3, 4, 4), [], 2)),
    Sample("more bins than a table", _sample((2, 1, 6, 7), _FEW, (1, 19))),
    Sample("staged rows of whole vectors", _sample((2, 18, 6, 16), _MORE[:4], 4, aligned=True)),
    Sample("staged pixels, channels last", _sample((2, 40, 5, 7), _MORE[:4], (3, 4), True)),
)
checked(
    "ps_roi_align",
    ps_roi_align,
    _truth(True),
    Sample("two RoIs", _sample((2, 4, 3, 4), _FEW, (1, 2)), derivatives=True),
    Sample("channels last", _sample((2, 30, 6, 7), _MORE, (2, 3), True, sampling_ratio=1, spatial_scale=0.5)),
    Sample("channels last, one channel a bin", _sample((2, 6, 9, 5), _FEW, (3, 2), True)),
    Sample("every kind of RoI", _sample((2, 18, 6, 7), _MORE, (3, 2), sampling_ratio=2, spatial_scale=0.5)),
)
