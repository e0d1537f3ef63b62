"""Arithmetic on boxes (x1, y1, x2, y2) in plain torch, shared by the detection rooms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from . import autocast, check

# exp of a predicted log-size is cut here: a box grows at most 1000/16 times (Detectron's and torchvision's choice).
LARGEST_EXPONENT = math.log(1000.0 / 16)


def wide(t: torch.Tensor) -> torch.Tensor:
    """t in the dtype in which areas are computed: float64 stays, everything else becomes float32."""
    return t if t.dtype in (torch.float32, torch.float64) else t.float()


def boxes(op: str, argument: str, t: torch.Tensor) -> None:
    """t is a floating tensor of shape [..., 4]."""
    check.floating(op, argument, t)
    if t.dim() < 1 or t.shape[-1] != 4:
        check.fail(RuntimeError, op, argument, f"shape {list(t.shape)}", "shape [..., 4]")


def matrix_of_boxes(op: str, argument: str, t: torch.Tensor) -> None:
    """t is a floating tensor of shape [N, 4]."""
    check.floating(op, argument, t)
    if t.dim() != 2 or t.shape[1] != 4:
        check.fail(RuntimeError, op, argument, f"shape {list(t.shape)}", "shape [N, 4]")


def weights_of(op: str, weights: Sequence[float]) -> tuple[float, float, float, float]:
    """Four positive weights."""
    values = tuple(float(w) for w in weights)
    if len(values) != 4 or not all(w > 0 for w in values):
        check.fail(ValueError, op, "weights", list(values), "four numbers > 0")
    return values[0], values[1], values[2], values[3]


def pairs_of_boxes(op: str, **given: torch.Tensor) -> None:
    """Two floating tensors of shape [..., 4] that broadcast against each other."""
    for argument, t in given.items():
        boxes(op, argument, t)
    (_, a), (argument, b) = given.items()
    try:
        torch.broadcast_shapes(a.shape, b.shape)
    except RuntimeError:
        got = f"shape {list(b.shape)}"
        check.fail(RuntimeError, op, argument, got, f"one that broadcasts with {list(a.shape)}")


def encode(reference: torch.Tensor, proposals: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    """Offsets (tx, ty, tw, th) that turn the proposals into the reference boxes."""
    wx, wy, ww, wh = weights
    px, py, pw, ph = center_form(proposals)
    gx, gy, gw, gh = center_form(reference)
    return torch.stack(
        (wx * (gx - px) / pw, wy * (gy - py) / ph, ww * torch.log(gw / pw), wh * torch.log(gh / ph)), dim=-1
    )


def decode(deltas: torch.Tensor, proposals: torch.Tensor, weights: Sequence[float], clip: float) -> torch.Tensor:
    """Boxes from offsets; the inverse of ``encode``."""
    wx, wy, ww, wh = weights
    px, py, pw, ph = center_form(proposals)
    tx, ty, tw, th = deltas.unbind(-1)
    cx, cy = px + pw * (tx / wx), py + ph * (ty / wy)
    half_w = pw * torch.exp((tw / ww).clamp(max=clip)) / 2
    half_h = ph * torch.exp((th / wh).clamp(max=clip)) / 2
    return torch.stack((cx - half_w, cy - half_h, cx + half_w, cy + half_h), dim=-1)


def center_form(t: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(cx, cy, w, h) of corner boxes."""
    x1, y1, x2, y2 = t.unbind(-1)
    w, h = x2 - x1, y2 - y1
    return x1 + w / 2, y1 + h / 2, w, h


def clip(t: torch.Tensor, size: Sequence[Any]) -> torch.Tensor:
    """Boxes cut at the border of an image of (height, width)."""
    height, width = size
    x1, y1, x2, y2 = t.unbind(-1)
    return torch.stack((x1.clamp(0, width), y1.clamp(0, height), x2.clamp(0, width), y2.clamp(0, height)), dim=-1)


def large(t: torch.Tensor, min_size: float) -> torch.Tensor:
    """Mask of boxes both of whose sides are at least ``min_size``."""
    return (t[..., 2] - t[..., 0] >= min_size) & (t[..., 3] - t[..., 1] >= min_size)


def regions(op: str, input: torch.Tensor, given: Any) -> torch.Tensor:
    """RoIs as [R, 5] with the image index in column 0, from [R, 5] or one [L, 4] per image."""
    if isinstance(given, torch.Tensor):
        if given.dim() != 2 or given.shape[1] != 5:
            check.fail(RuntimeError, op, "boxes", f"shape {list(given.shape)}", "shape [K, 5] or a list of [L, 4]")
        rois = given
    elif isinstance(given, (list, tuple)):
        for b in given:
            if not isinstance(b, torch.Tensor) or b.dim() != 2 or b.shape[1] != 4:
                got = f"shape {list(b.shape)}" if isinstance(b, torch.Tensor) else type(b).__name__
                check.fail(RuntimeError, op, "boxes", got, "shape [L, 4] for every image of the list")
        if not given:
            return input.new_zeros((0, 5))
        # wide first: bfloat16 cannot count beyond 256 images
        given = [wide(b) for b in given]
        rois = torch.cat([torch.cat((torch.full_like(b[:, :1], i), b), 1) for i, b in enumerate(given)])
    else:
        check.fail(TypeError, op, "boxes", type(given).__name__, "a tensor [K, 5] or a list of tensors [L, 4]")
    if rois.device != input.device:
        check.fail(RuntimeError, op, "boxes", f"a tensor on {rois.device}", f"one on {input.device}, as the input")
    return rois


def scaled_regions(op: str, input: torch.Tensor, given: Any, scale: float) -> torch.Tensor:
    """RoIs [R, 5] in pixels of the feature map, in the dtype of sums; the image index stays."""
    check.floating(op, "input", input)
    if input.dim() != 4:
        check.fail(RuntimeError, op, "input", f"shape {list(input.shape)}", "shape [N, C, H, W]")
    # numbers of other libraries as well; torch.compile knows no hasattr of a number that it traces
    if isinstance(scale, bool) or not (isinstance(scale, (int, float)) or hasattr(scale, "__float__")):
        check.fail(TypeError, op, "spatial_scale", type(scale).__name__, "a number")
    rois = regions(op, input, given)
    # under autocast torchvision takes boxes of any dtype
    if isinstance(given, torch.Tensor) and rois.dtype != input.dtype and not autocast.enabled(rois):
        check.fail(RuntimeError, op, "boxes", rois.dtype, f"{input.dtype}, as the input")
    rois = rois.detach().to(check.accumulate_dtype(input.dtype))
    return torch.cat((rois[:, :1], rois[:, 1:] * scale), 1)


def output_size(op: str, size: Any) -> tuple[int, int]:
    """(height, width) of the pooled output, both positive."""
    if not isinstance(size, (int, Sequence)) or isinstance(size, (bool, str)):
        check.fail(TypeError, op, "output_size", repr(size), "one or two positive integers")
    given = (size, size) if isinstance(size, int) else tuple(size)
    if len(given) != 2 or not all(isinstance(v, int) and 0 < v < 2**31 for v in given):
        check.fail(ValueError, op, "output_size", given, "one or two positive integers < 2^31")
    return given[0], given[1]
