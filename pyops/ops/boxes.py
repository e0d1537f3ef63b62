"""Boxes: areas, pairwise overlaps, their losses, conversions, and the R-CNN transform.

    iou = I / U        I = area of the intersection, U = A1 + A2 - I
    generalised IoU    iou - (C - U) / C,  C = area of the enclosing box        (Rezatofighi et al. 2019)
    distance IoU       iou - D / G,  D = squared distance of the centres, G = squared diagonal of the enclosing box
    complete IoU       distance IoU - α v,  v = 4/π² (atan(w1/h1) - atan(w2/h2))²,  α = v / (1 - iou + v)

    boxes1: [*, N, 4]   boxes2: [*, M, 4]   overlap: [*, N, M]

Source: torchvision.ops.boxes; Zheng et al. 2020, https://arxiv.org/abs/1911.08287; Girshick 2015 for the transform.
The gradients are derived in docs/math/detection.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..core import backend, check, geometry, library
from ..core.autograd import Formula, Tensors, differentiable
from ..core.explain import composite
from ..core.geometry import LARGEST_EXPONENT, wide
from ..core.samples import Maker, Sample, checked

_kernels = library.triton_kernels("boxes")

IOU, GENERALIZED, DISTANCE, COMPLETE = range(4)


def _fwd_fake(boxes1, boxes2, kind, eps):
    shape = (boxes1.shape[0], boxes1.shape[1], boxes2.shape[1])
    return boxes1.new_empty(shape, dtype=check.accumulate_dtype(boxes1.dtype))


def _bwd_fake(dy, boxes1, boxes2, kind, eps):
    return torch.empty_like(boxes1), torch.empty_like(boxes2)


_fwd = library.declare(
    "box_overlap_fwd(Tensor boxes1, Tensor boxes2, int kind, float eps) -> Tensor", _fwd_fake, _kernels
)
_bwd = library.declare(
    "box_overlap_bwd(Tensor dy, Tensor boxes1, Tensor boxes2, int kind, float eps) -> (Tensor, Tensor)",
    _bwd_fake,
    _kernels,
)


def _reference(boxes1, boxes2, kind, eps):
    a, b = wide(boxes1)[..., :, None, :], wide(boxes2)[..., None, :, :]
    return (_overlap(a, b, kind, eps),)


def _overlap(a, b, kind, eps, union_eps=0.0):
    """Overlap of boxes that broadcast against each other; ``union_eps`` keeps the losses finite for empty boxes."""
    inter = _area(torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:]))
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - inter
    iou = inter / (union + union_eps)
    if kind == IOU:
        return iou
    sides = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0)
    if kind == GENERALIZED:
        hull = sides[..., 0] * sides[..., 1]
        return iou - (hull - union) / (hull + union_eps)
    away = ((a[..., :2] + a[..., 2:] - b[..., :2] - b[..., 2:]) / 2).square().sum(-1)
    distance = iou - away / (sides.square().sum(-1) + eps)
    if kind == DISTANCE:
        return distance
    v = (4 / math.pi**2) * (_angle(a) - _angle(b)).square()
    alpha = (v / (1 - iou + v + eps)).detach()
    return distance - alpha * v


def _area(corner, opposite):
    """Area between two corners, 0 where they are crossed."""
    sides = (opposite - corner).clamp(min=0)
    return sides[..., 0] * sides[..., 1]


def _angle(boxes):
    return torch.atan((boxes[..., 2] - boxes[..., 0]) / (boxes[..., 3] - boxes[..., 1]))


def _backward_arguments(dy, inputs: Tensors, statistics: Tensors, constants: Tensors, needs) -> Tensors:
    return dy, *inputs, *constants


_apply = differentiable(Formula(_fwd, _bwd, 2, 2, _backward_arguments, _reference))


def _pairwise(op: str, boxes1: torch.Tensor, boxes2: torch.Tensor, kind: int, eps: float) -> torch.Tensor:
    if isinstance(boxes1, torch.Tensor) and isinstance(boxes2, torch.Tensor):
        boxes1, boxes2 = (t if t.is_floating_point() else t.to(torch.get_default_dtype()) for t in (boxes1, boxes2))
    for name, t in (("boxes1", boxes1), ("boxes2", boxes2)):
        geometry.boxes(op, name, t)
        if t.dim() < 2:
            check.fail(RuntimeError, op, name, f"shape {list(t.shape)}", "shape [..., N, 4]")
    if boxes2.device != boxes1.device:
        check.fail(RuntimeError, op, "boxes2", f"a tensor on {boxes2.device}", f"one on {boxes1.device}, as boxes1")
    if boxes1.dtype != boxes2.dtype:
        dtype = torch.promote_types(boxes1.dtype, boxes2.dtype)
        boxes1, boxes2 = boxes1.to(dtype), boxes2.to(dtype)
    batch = torch.broadcast_shapes(boxes1.shape[:-2], boxes2.shape[:-2])
    n, m = boxes1.shape[-2], boxes2.shape[-2]
    count = math.prod(batch)
    first = boxes1.expand(*batch, n, 4).reshape(count, n, 4).contiguous()
    second = boxes2.expand(*batch, m, 4).reshape(count, m, 4).contiguous()
    y = _apply(backend.namespace_for(op, boxes1), first, second, kind, float(eps))
    return (y[0] if isinstance(y, tuple) else y).reshape(*batch, n, m)


def box_iou(boxes1: torch.Tensor, boxes2: torch.Tensor, fmt: str = "xyxy") -> torch.Tensor:
    """Intersection over union of every pair of two sets of boxes; drops in for torchvision.ops.box_iou.

    Args:
        boxes1: Tensor[*, N, 4].
        boxes2: Tensor[*, M, 4].
        fmt: ``"xyxy"``, ``"xywh"`` or ``"cxcywh"``.

    Returns:
        Tensor[*, N, M] in float32 (float64 for float64); NaN for two empty boxes, as 0 / 0.

    Raises:
        RuntimeError: a last dimension other than 4, tensors on two devices.
        ValueError: an unknown format.

    Deterministic; gradients of every order, forward mode, vmap, torch.compile.
    """
    if fmt != "xyxy":
        boxes1, boxes2 = box_convert(boxes1, fmt, "xyxy"), box_convert(boxes2, fmt, "xyxy")
    return _pairwise("box_iou", boxes1, boxes2, IOU, 0.0)


def generalized_box_iou(boxes1: torch.Tensor, boxes2: torch.Tensor) -> torch.Tensor:
    """Generalised IoU of every pair, in (-1, 1]; see ``box_iou``. Source: https://arxiv.org/abs/1902.09630."""
    return _pairwise("generalized_box_iou", boxes1, boxes2, GENERALIZED, 0.0)


def distance_box_iou(boxes1: torch.Tensor, boxes2: torch.Tensor, eps: float = 1e-7) -> torch.Tensor:
    """Distance IoU of every pair; see ``box_iou``. ``eps`` is added to the squared diagonal."""
    check.non_negative("distance_box_iou", "eps", eps)
    return _pairwise("distance_box_iou", boxes1, boxes2, DISTANCE, eps)


def complete_box_iou(boxes1: torch.Tensor, boxes2: torch.Tensor, eps: float = 1e-7) -> torch.Tensor:
    """Complete IoU of every pair; see ``box_iou``. The weight α is a constant for the gradient, as in torchvision."""
    check.non_negative("complete_box_iou", "eps", eps)
    return _pairwise("complete_box_iou", boxes1, boxes2, COMPLETE, eps)


def _loss(op: str, boxes1: torch.Tensor, boxes2: torch.Tensor, kind: int, reduction: str, eps: float) -> torch.Tensor:
    geometry.boxes(op, "boxes1", boxes1)
    geometry.boxes(op, "boxes2", boxes2)
    if boxes1.shape != boxes2.shape:
        check.fail(RuntimeError, op, "boxes2", f"shape {list(boxes2.shape)}", f"shape {list(boxes1.shape)}, as boxes1")
    if reduction not in ("none", "mean", "sum"):
        check.fail(ValueError, op, "reduction", repr(reduction), "'none', 'mean' or 'sum'")
    loss = 1 - _overlap(wide(boxes1), wide(boxes2), kind, eps, union_eps=eps)
    if reduction == "sum" or (reduction == "mean" and loss.numel() == 0):
        return loss.sum()
    return loss.mean() if reduction == "mean" else loss


def generalized_box_iou_loss(
    boxes1: torch.Tensor, boxes2: torch.Tensor, reduction: str = "none", eps: float = 1e-7
) -> torch.Tensor:
    """``1 - generalised IoU`` of box i with box i; drops in for torchvision.ops.generalized_box_iou_loss.

    Args:
        boxes1, boxes2: Tensor[*, 4], (x1, y1, x2, y2).
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        eps: added to the denominators.

    Returns:
        Tensor[*], or a scalar, in float32 (float64 for float64).
    """
    return _loss("generalized_box_iou_loss", boxes1, boxes2, GENERALIZED, reduction, eps)


def distance_box_iou_loss(
    boxes1: torch.Tensor, boxes2: torch.Tensor, reduction: str = "none", eps: float = 1e-7
) -> torch.Tensor:
    """``1 - distance IoU`` of box i with box i; see ``generalized_box_iou_loss``."""
    return _loss("distance_box_iou_loss", boxes1, boxes2, DISTANCE, reduction, eps)


def complete_box_iou_loss(
    boxes1: torch.Tensor, boxes2: torch.Tensor, reduction: str = "none", eps: float = 1e-7
) -> torch.Tensor:
    """``1 - complete IoU`` of box i with box i; see ``generalized_box_iou_loss``."""
    return _loss("complete_box_iou_loss", boxes1, boxes2, COMPLETE, reduction, eps)


_FORMATS = ("xyxy", "xywh", "cxcywh")
_ROTATED = {"xywhr": 5, "cxcywhr": 5, "xyxyxyxy": 8}


def _to_corners(boxes: torch.Tensor, fmt: str) -> torch.Tensor:
    if fmt == "xyxy":
        return boxes
    first, sides = boxes[..., :2], boxes[..., 2:]
    if fmt == "xywh":
        return torch.cat((first, first + sides), -1)
    return torch.cat((first - sides / 2, first + sides / 2), -1)


def _edges(sides: torch.Tensor, degrees: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The edges (x, y) along the width and along the height of boxes turned counter-clockwise; y points down."""
    turn = degrees * (math.pi / 180)
    cos, sin = torch.cos(turn), torch.sin(turn)
    w, h = sides.unbind(-1)
    return torch.stack((w * cos, -w * sin), -1), torch.stack((h * sin, h * cos), -1)


def _convert_rotated(boxes: torch.Tensor, in_fmt: str, out_fmt: str) -> torch.Tensor:
    if in_fmt == "xyxyxyxy":
        p1, p2, p3 = boxes[..., :2], boxes[..., 2:4], boxes[..., 4:6]
        along, across = p2 - p1, p3 - p2
        sides = torch.stack([edge.square().sum(-1).sqrt() for edge in (along, across)], -1)
        degrees = torch.atan2(-along[..., 1], along[..., 0]) * (180 / math.pi)
        first = p1
    else:
        first, sides, degrees = boxes[..., :2], boxes[..., 2:4], boxes[..., 4]
    along, across = _edges(sides, degrees)
    if in_fmt == "cxcywhr":
        first = first - along / 2 - across / 2
    if out_fmt == "xyxyxyxy":
        converted = torch.cat((first, first + along, first + along + across, first + across), -1)
    else:
        first = first + along / 2 + across / 2 if out_fmt == "cxcywhr" else first
        converted = torch.cat((first, sides, degrees[..., None]), -1)
    return converted if boxes.is_floating_point() else converted.round().to(boxes.dtype)


def box_convert(boxes: torch.Tensor, in_fmt: str, out_fmt: str) -> torch.Tensor:
    """Boxes in another format; drops in for torchvision.ops.box_convert.

    Args:
        boxes: Tensor[*, 4], or [*, 5] and [*, 8] where they are rotated.
        in_fmt, out_fmt: ``"xyxy"`` corners, ``"xywh"`` corner and sides, ``"cxcywh"`` centre and sides; rotated:
            ``"xywhr"`` first corner, sides and degrees counter-clockwise (y points down), ``"cxcywhr"`` the same from
            the centre, ``"xyxyxyxy"`` the four corners: top left, top right, bottom right, bottom left.

    Returns:
        Tensor[*, 4], [*, 5] or [*, 8]; a copy also where the formats are equal. Rotated integers are rounded.

    Raises:
        ValueError: an unknown format.
        NotImplementedError: from a rotated format to one that is not, or back.
        RuntimeError: another last dimension than the format has.
    """
    for name, fmt in (("in_fmt", in_fmt), ("out_fmt", out_fmt)):
        if fmt not in _FORMATS and fmt not in _ROTATED:
            check.fail(ValueError, "box_convert", name, repr(fmt), f"one of {', '.join((*_FORMATS, *_ROTATED))}")
    width = _ROTATED.get(in_fmt, 4)
    if boxes.shape[-1:] != (width,):
        check.fail(RuntimeError, "box_convert", "boxes", f"shape {list(boxes.shape)}", f"shape [..., {width}]")
    if in_fmt == out_fmt:
        return boxes.clone()
    if (in_fmt in _ROTATED) != (out_fmt in _ROTATED):
        expected = f"a format with{'' if in_fmt in _ROTATED else 'out'} rotation, as in_fmt {in_fmt!r}"
        check.fail(NotImplementedError, "box_convert", "out_fmt", repr(out_fmt), expected)
    if in_fmt in _ROTATED:
        return _convert_rotated(boxes, in_fmt, out_fmt)
    corners = _to_corners(boxes, in_fmt)
    if out_fmt == "xyxy":
        return corners
    sides = corners[..., 2:] - corners[..., :2]
    first = corners[..., :2] if out_fmt == "xywh" else (corners[..., :2] + corners[..., 2:]) / 2
    return torch.cat((first, sides), -1)


def box_area(boxes: torch.Tensor, fmt: str = "xyxy") -> torch.Tensor:
    """Areas Tensor[*] of boxes Tensor[*, 4] in float32 (float64 for float64); as torchvision.ops.box_area."""
    if boxes.shape[-1:] != (4,):
        check.fail(RuntimeError, "box_area", "boxes", f"shape {list(boxes.shape)}", "shape [..., 4]")
    if fmt not in _FORMATS:
        check.fail(ValueError, "box_area", "fmt", repr(fmt), "'xyxy', 'xywh' or 'cxcywh'")
    x = wide(boxes) if boxes.is_floating_point() or boxes.dtype not in (torch.int32, torch.int64) else boxes
    sides = x[..., 2:] - x[..., :2] if fmt == "xyxy" else x[..., 2:]
    return sides[..., 0] * sides[..., 1]


def clip_boxes_to_image(boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Boxes Tensor[*, 4] cut at the border of an image of (height, width); as torchvision.ops.clip_boxes_to_image."""
    if boxes.shape[-1:] != (4,):
        check.fail(RuntimeError, "clip_boxes_to_image", "boxes", f"shape {list(boxes.shape)}", "shape [..., 4]")
    if len(size) != 2:
        check.fail(ValueError, "clip_boxes_to_image", "size", size, "(height, width)")
    return geometry.clip(boxes, size)


def remove_small_boxes(boxes: torch.Tensor, min_size: float) -> torch.Tensor:
    """Indices int64[K] of boxes Tensor[N, 4] with both sides >= min_size; as torchvision.ops.remove_small_boxes."""
    if boxes.shape[-1:] != (4,):
        check.fail(RuntimeError, "remove_small_boxes", "boxes", f"shape {list(boxes.shape)}", "shape [..., 4]")
    return torch.where(geometry.large(boxes, min_size))[0]


def masks_to_boxes(masks: torch.Tensor) -> torch.Tensor:
    """The smallest box (x1, y1, x2, y2) in float32 around every mask; as torchvision.ops.masks_to_boxes.

    Args:
        masks: Tensor[N, H, W], any dtype; what is not 0 belongs to the mask.

    Returns:
        Tensor[N, 4]: first and last column and row that hold a pixel; zeros for an empty mask.
    """
    if masks.dim() != 3:
        check.fail(RuntimeError, "masks_to_boxes", "masks", f"shape {list(masks.shape)}", "shape [N, H, W]")
    n, h, w = masks.shape
    if n == 0 or h == 0 or w == 0:
        return torch.zeros((n, 4), dtype=torch.float32, device=masks.device)
    inside = masks != 0
    sides = []
    for reduced, size in ((2, h), (1, w)):
        line = inside.any(reduced).to(torch.int32)
        sides.append((line.argmax(1), size - 1 - line.flip(1).argmax(1)))
    (y1, y2), (x1, x2) = sides
    boxes = torch.stack((x1, y1, x2, y2), 1).float()
    return torch.where(inside.flatten(1).any(1)[:, None], boxes, torch.zeros_like(boxes))


def encode_boxes(
    reference: torch.Tensor, proposals: torch.Tensor, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)
) -> torch.Tensor:
    """Regression targets of the R-CNN transform.

    ``tx = wx (gx - px) / pw``, ``tw = ww log(gw / pw)``, likewise y and h; (gx, gy, gw, gh) centre and sides of the
    reference box, (px, py, pw, ph) of the proposal.

    Args:
        reference, proposals: Tensor[*, 4], (x1, y1, x2, y2) with positive sides.
        weights: (wx, wy, ww, wh), positive.

    Returns:
        Tensor[*, 4].
    """
    geometry.pairs_of_boxes("encode_boxes", reference=reference, proposals=proposals)
    return geometry.encode(reference, proposals, geometry.weights_of("encode_boxes", weights))


def decode_boxes(
    deltas: torch.Tensor,
    boxes: torch.Tensor,
    weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    clip: float = LARGEST_EXPONENT,
) -> torch.Tensor:
    """Boxes from predicted offsets: ``bx = px + pw tx / wx``, ``bw = pw exp(min(tw / ww, clip))``, likewise y and h.

    Args:
        deltas: Tensor[*, 4].
        boxes: Tensor[*, 4], the proposals or anchors.
        weights: (wx, wy, ww, wh), positive.
        clip: largest exponent; log(1000/16) by default, as in torchvision.

    Returns:
        Tensor[*, 4], (x1, y1, x2, y2).
    """
    geometry.pairs_of_boxes("decode_boxes", deltas=deltas, boxes=boxes)
    return geometry.decode(deltas, boxes, geometry.weights_of("decode_boxes", weights), clip)


def _sample(n, m, spread=1.0):
    def make(t: Maker):
        return (t.boxes(n, spread), t.boxes(m, spread)), {}

    return make


_samples = (
    Sample("no pair overlaps", _sample(2, 3, 50.0)),
    Sample("more than a vector and a tile", _sample(17, 131)),
    Sample("no boxes on one side", _sample(0, 3)),
    Sample("one pair", _sample(1, 1)),
)
for _op, _kind in (
    (box_iou, IOU),
    (generalized_box_iou, GENERALIZED),
    (distance_box_iou, DISTANCE),
    (complete_box_iou, COMPLETE),
):

    def _truth(boxes1, boxes2, _kind=_kind):
        return _reference(boxes1, boxes2, _kind, 1e-7 if _kind >= DISTANCE else 0.0)[0]

    # The α of complete IoU is a constant for its gradient: numerical derivatives know nothing of that.
    _few = Sample("a few pairs", _sample(3, 4), derivatives=_kind != COMPLETE)
    checked(_op.__name__, _op, _truth, _few, *_samples)


composite(
    *("box_area", "box_convert", "clip_boxes_to_image", "decode_boxes", "encode_boxes", "masks_to_boxes"),
    *("remove_small_boxes", "generalized_box_iou_loss", "distance_box_iou_loss", "complete_box_iou_loss"),
)
