"""Non-maximum suppression: greedy, per class, soft, of fixed shape, and as the proposal filter of an RPN.

In the order of falling scores a box is kept when no kept box of its segment overlaps it by more than the threshold:

    keep[j]  <=>  no i < j with keep[i], segment[i] = segment[j] and overlap(i, j) > threshold

    boxes: [N, 4] as (x1, y1, x2, y2)   scores: [N]   segments: [N]

The overlap is the intersection over the union, or over the smaller box, which also removes a box that lies in a large
one (MTCNN's last step). It is computed in float32 (float64 for float64), each operation rounded alone, so every backend
keeps the same boxes; equal scores go by index. On the CPU sorting, grouping by segment and suppression are one op.

Source: torchvision.ops.nms, batched_nms; Bodla et al. 2017, https://arxiv.org/abs/1704.04503.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..core import backend, check, geometry, library
from ..core.explain import composite, without_triton
from ..core.geometry import LARGEST_EXPONENT

_kernels = library.triton_kernels("nms")

METHODS = ("linear", "gaussian")
OVERLAPS = ("union", "smaller")
LARGEST_THRESHOLD = 2.0  # an overlap is at most 1


def _mask_fake(boxes, segments, threshold, of_smaller):
    return boxes.new_empty(boxes.shape[0], dtype=torch.bool)


def _kept_fake(boxes, scores, segments, threshold, of_smaller, min_score):
    return boxes.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


def _pick_fake(boxes, scores, method, sigma, threshold, min_score):
    n = boxes.shape[0]
    return (
        boxes.new_empty(n, dtype=torch.int64),
        boxes.new_empty(n, dtype=check.accumulate_dtype(boxes.dtype)),
        boxes.new_empty(1, dtype=torch.int64),
    )


_mask = library.declare(
    "nms_mask(Tensor boxes, Tensor? segments, float threshold, bool of_smaller) -> Tensor", _mask_fake, _kernels
)
# elsewhere torch sorts and groups around nms_mask
_kept_in_one = library.declare(
    "nms_pick(Tensor boxes, Tensor scores, Tensor? segments, float threshold, bool of_smaller, float min_score)"
    " -> Tensor",
    _kept_fake,
    None,
    cpu_only=True,
)
_pick = library.declare(
    "soft_nms_pick(Tensor boxes, Tensor scores, int method, float sigma, float threshold, float min_score)"
    " -> (Tensor, Tensor, Tensor)",
    _pick_fake,
    None,
)


def _reference(boxes, segments, threshold, of_smaller=False):
    """The slow truth behind ``nms_mask``: boxes in the order of falling scores within each segment."""
    wide = geometry.wide(boxes)
    sides = wide[:, 2:] - wide[:, :2]
    area = sides[:, 0] * sides[:, 1]
    keep = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
    for i in range(len(boxes)):
        if not keep[i]:
            continue
        common = (torch.minimum(wide[i, 2:], wide[:, 2:]) - torch.maximum(wide[i, :2], wide[:, :2])).clamp(min=0)
        inter = common[:, 0] * common[:, 1]
        whole = torch.minimum(area[i], area) if of_smaller else area[i] + area - inter
        over = (inter / whole).double() > threshold
        if segments is not None:
            over &= segments == segments[i]
        over[: i + 1] = False
        keep &= ~over
    return keep


def _checked(op: str, boxes: torch.Tensor, scores: torch.Tensor, threshold: float) -> None:
    geometry.matrix_of_boxes(op, "boxes", boxes)
    check.floating(op, "scores", scores)
    if scores.dim() != 1 or scores.shape[0] != boxes.shape[0]:
        check.fail(RuntimeError, op, "scores", f"shape {list(scores.shape)}", f"shape [{boxes.shape[0]}], as the boxes")
    if scores.device != boxes.device:
        check.fail(RuntimeError, op, "scores", f"a tensor on {scores.device}", f"one on {boxes.device}, as the boxes")
    check.non_negative(op, "iou_threshold", threshold)


def _segments(op: str, boxes: torch.Tensor, idxs: torch.Tensor) -> torch.Tensor:
    if not isinstance(idxs, torch.Tensor):
        check.fail(TypeError, op, "idxs", type(idxs).__name__, "a tensor")
    if idxs.dim() != 1 or idxs.shape[0] != boxes.shape[0]:
        check.fail(RuntimeError, op, "idxs", f"shape {list(idxs.shape)}", f"shape [{boxes.shape[0]}], as the boxes")
    if idxs.is_complex():
        check.fail(RuntimeError, op, "idxs", idxs.dtype, "a real dtype")
    return idxs if idxs.dtype == torch.int64 else idxs.double() if idxs.is_floating_point() else idxs.long()


def _kept(
    op: str,
    boxes: torch.Tensor,
    scores: torch.Tensor,
    idxs: torch.Tensor | None,
    threshold: float,
    of_smaller: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(order, keep): indices of the boxes in order of falling scores, and which of them are kept."""
    boxes, scores = boxes.detach(), scores.detach()
    order = scores.argsort(dim=0, descending=True, stable=True)
    namespace = backend.namespace_for(op, boxes)
    threshold = min(float(threshold), LARGEST_THRESHOLD)
    if idxs is None:
        return order, _mask(namespace, boxes.index_select(0, order), None, threshold, of_smaller)
    of_class = _segments(op, boxes, idxs)[order]
    sorted_class, grouped = of_class.sort(stable=True)
    if sorted_class.is_floating_point():
        # names of classes may be any numbers; the kernel wants to know where a new one begins
        sorted_class = torch.cat((sorted_class[:1] != sorted_class[:1], sorted_class[1:] != sorted_class[:-1])).cumsum(
            0
        )
    kept = _mask(namespace, boxes.index_select(0, order[grouped]), sorted_class.contiguous(), threshold, of_smaller)
    return order, torch.empty_like(kept).scatter_(0, grouped, kept)


def _picked(
    op: str,
    boxes: torch.Tensor,
    scores: torch.Tensor,
    idxs: torch.Tensor | None,
    threshold: float,
    of_smaller: bool = False,
    least: float = -math.inf,
) -> torch.Tensor:
    """Indices of the boxes that are kept, best score first."""
    namespace = backend.namespace_for(op, boxes)
    segments = None if idxs is None else _segments(op, boxes, idxs)
    if namespace == "pyops" and boxes.device.type == "cpu" and (segments is None or segments.dtype == torch.int64):
        return _kept_in_one(
            namespace,
            boxes.detach().contiguous(),
            scores.detach().contiguous(),
            None if segments is None else segments.contiguous(),
            min(float(threshold), LARGEST_THRESHOLD),
            of_smaller,
            least,
        )
    if least > -math.inf:
        chosen = (~(scores.double() < least)).nonzero().squeeze(1)
        of_chosen = None if segments is None else segments[chosen]
        return chosen[_picked(op, boxes[chosen], scores[chosen], of_chosen, threshold, of_smaller)]
    order, keep = _kept(op, boxes, scores, idxs, threshold, of_smaller)
    return order[keep]


def nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Indices of the boxes that greedy suppression keeps, best score first; drops in for torchvision.ops.nms.

    Args:
        boxes: Tensor[N, 4], (x1, y1, x2, y2), float32, float64, bfloat16 or float16. A box that is empty, crossed or
            not finite overlaps nothing and is kept.
        scores: Tensor[N]; NaN counts as the largest, as in torch.sort.
        iou_threshold: boxes that overlap a kept box by more are removed, >= 0.

    Returns:
        int64 Tensor[K], sorted by falling score; equal scores by index.

    Raises:
        RuntimeError: shapes or devices that do not fit together.
        ValueError: a negative threshold.

    The IoU is computed in float32 (float64 for float64). The result is the same on every backend. On a GPU the host
    waits once, for the number of kept boxes. Memory grows with N, not with N².
    """
    _checked("nms", boxes, scores, iou_threshold)
    return _picked("nms", boxes, scores, None, iou_threshold)


def batched_nms(boxes: torch.Tensor, scores: torch.Tensor, idxs: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """``nms`` within each class (or image, or both); drops in for torchvision.ops.batched_nms.

    Boxes are grouped, never moved: coordinates may be negative or huge, and half precision loses nothing.

    Args:
        boxes, scores, iou_threshold: as in ``nms``.
        idxs: Tensor[N], the class of every box.

    Returns:
        int64 Tensor[K], indices of the kept boxes over all classes, sorted by falling score.
    """
    _checked("batched_nms", boxes, scores, iou_threshold)
    return _picked("batched_nms", boxes, scores, idxs, iou_threshold)


def nms_above(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    iou_threshold: float,
    score_threshold: float = -math.inf,
    idxs: torch.Tensor | None = None,
    overlap: str = "union",
) -> torch.Tensor:
    """``nms`` of the boxes with at least some score, by one of two measures of overlap: what follows a detector.

    On the CPU one op compares the scores, sorts, groups and suppresses, with no mask and no indexing before or behind.

    Args:
        boxes, scores, iou_threshold: as in ``nms``.
        score_threshold: boxes with a lower score are dropped.
        idxs: Tensor[N] or None, classes as in ``batched_nms``.
        overlap: the intersection over the ``"union"``, or over the ``"smaller"`` of the two boxes: then a box inside
            another is removed however small it is. A box with one infinite side holds what lies in it.

    Returns:
        int64 Tensor[K], indices into boxes, sorted by falling score; equal scores by index.

    Raises:
        RuntimeError: shapes or devices that do not fit together.
        ValueError: a negative threshold of overlap, a threshold that is no number, another word for overlap.
    """
    op = "nms_above"
    _checked(op, boxes, scores, iou_threshold)
    if overlap not in OVERLAPS:
        check.fail(ValueError, op, "overlap", repr(overlap), "'union' or 'smaller'")
    least = float(score_threshold)
    if least != least:
        check.fail(ValueError, op, "score_threshold", least, "a number")
    return _picked(op, boxes, scores, idxs, iou_threshold, overlap == "smaller", least)


def nms_padded(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    iou_threshold: float,
    max_out: int,
    idxs: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``nms`` of fixed shape: no data-dependent size, so it goes into CUDA graphs and torch.compile(fullgraph=True).

    Args:
        boxes, scores, iou_threshold: as in ``nms``.
        max_out: how many indices to return at most, > 0.
        idxs: Tensor[N] or None, classes as in ``batched_nms``.

    Returns:
        (indices int64[max_out], padded with -1; count int64[] of the valid ones).
    """
    _checked("nms_padded", boxes, scores, iou_threshold)
    if isinstance(max_out, bool) or not isinstance(max_out, int) or max_out <= 0:
        check.fail(ValueError, "nms_padded", "max_out", max_out, "a positive integer")
    order, keep = _kept("nms_padded", boxes, scores, idxs, iou_threshold)
    place = keep.cumsum(0) - 1
    place = torch.where(keep & (place < max_out), place, max_out)
    padded = torch.full((max_out + 1,), -1, dtype=torch.int64, device=boxes.device).scatter(0, place, order)
    return padded[:max_out], keep.sum().clamp(max=max_out)


def soft_nms(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    method: str = "gaussian",
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    score_threshold: float = 0.001,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Suppression that lowers scores instead of removing boxes (Bodla et al. 2017).

    The best box is picked; every remaining score is multiplied by ``1 - IoU`` where the IoU exceeds the threshold
    (linear) or by ``exp(-IoU² / sigma)`` (gaussian); and again, until the best is below ``score_threshold``.

    Args:
        boxes: Tensor[N, 4], (x1, y1, x2, y2).
        scores: Tensor[N], >= 0; a box whose score is NaN is never picked.
        method: ``"linear"`` or ``"gaussian"``.
        iou_threshold: of the linear method, >= 0.
        sigma: of the gaussian method, > 0.
        score_threshold: boxes whose lowered score is below are dropped.

    Returns:
        (indices int64[K], scores [K] in float32 or float64), in the order of picking: scores fall.

    Time grows with N²; on a GPU one block does the work. C++ and CUDA only.
    """
    _checked("soft_nms", boxes, scores, iou_threshold)
    if method not in METHODS:
        check.fail(ValueError, "soft_nms", "method", repr(method), "'linear' or 'gaussian'")
    if not sigma > 0:
        check.fail(ValueError, "soft_nms", "sigma", sigma, "a number > 0")
    if scores.dtype != boxes.dtype:
        dtype = torch.promote_types(boxes.dtype, scores.dtype)
        boxes, scores = boxes.to(dtype), scores.to(dtype)
    order, picked, count = _pick(
        backend.namespace_for("soft_nms", boxes),
        boxes.detach().contiguous(),
        scores.detach().contiguous(),
        METHODS.index(method),
        float(sigma),
        float(iou_threshold),
        float(score_threshold),
    )
    # of a size that depends on the data for fake tensors too
    valid = torch.where(torch.arange(order.shape[0], device=order.device) < count)[0]
    return order[valid], picked[valid]


def filter_proposals(
    objectness: Sequence[torch.Tensor],
    deltas: Sequence[torch.Tensor],
    anchors: Sequence[torch.Tensor],
    image_sizes: Sequence[tuple[int, int]],
    pre_nms_top_n: int = 1000,
    post_nms_top_n: int = 1000,
    nms_threshold: float = 0.7,
    score_threshold: float = 0.0,
    min_size: float = 1e-3,
    weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    clip: float = LARGEST_EXPONENT,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The proposals of a region proposal network: top-k per level, decode, clip, drop the small, NMS, top-k.

    All images and levels go through one suppression, as segments.

    Args:
        objectness: for every level a Tensor[B, A], logits of its anchors.
        deltas: for every level a Tensor[B, A, 4], predicted offsets.
        anchors: for every level a Tensor[A, 4] (shared by the images), (x1, y1, x2, y2).
        image_sizes: (height, width) of every image.
        pre_nms_top_n: anchors that stay per level and image before suppression.
        post_nms_top_n: proposals per image.
        nms_threshold: of the suppression within a level of an image.
        score_threshold: least probability.
        min_size: least side in pixels.
        weights, clip: of ``decode_boxes``.

    Returns:
        (boxes, scores): for every image a Tensor[P, 4] and its probabilities Tensor[P], falling. Without gradient.

    Raises:
        RuntimeError: levels or shapes that do not fit together.
        ValueError: a negative number of boxes, weights that are not positive.
    """
    op = "filter_proposals"
    if not len(objectness) == len(deltas) == len(anchors) or not objectness:
        levels_got = (len(objectness), len(deltas), len(anchors))
        check.fail(
            RuntimeError, op, "objectness", f"{levels_got} levels", "as many objectness, deltas and anchors, at least 1"
        )
    for name, top in (("pre_nms_top_n", pre_nms_top_n), ("post_nms_top_n", post_nms_top_n)):
        if top < 0:
            check.fail(ValueError, op, name, top, "a number >= 0")
    batch = len(image_sizes)
    weights = geometry.weights_of(op, weights)
    boxes, scores, images, levels = [], [], [], []
    for level, (logits, offsets, places) in enumerate(zip(objectness, deltas, anchors)):
        if logits.shape != (batch, places.shape[0]) or offsets.shape != (batch, places.shape[0], 4):
            got = f"shapes {list(logits.shape)} and {list(offsets.shape)} on level {level}"
            check.fail(RuntimeError, op, "objectness", got, f"[{batch}, {places.shape[0]}] and 4 deltas for each")
        k = min(pre_nms_top_n, places.shape[0])
        best, index = geometry.wide(logits.detach()).topk(k, dim=1)
        chosen = geometry.wide(offsets.detach().gather(1, index[..., None].expand(-1, -1, 4)))
        boxes.append(geometry.decode(chosen, geometry.wide(places)[index], weights, clip))
        scores.append(best.sigmoid())
        images.append(torch.arange(batch, device=logits.device)[:, None].expand(batch, k))
        levels.append(torch.full((batch, k), level, device=logits.device))
    box, score, image, level_of = (torch.cat(t, 1) for t in (boxes, scores, images, levels))
    limit = torch.tensor([(w, h, w, h) for h, w in image_sizes], dtype=box.dtype, device=box.device)
    box = torch.minimum(box.clamp(min=0), limit[:, None])
    good = geometry.large(box, min_size) & (score >= score_threshold)
    box, score, image, level_of = box[good], score[good], image[good], level_of[good]
    kept = batched_nms(box, score, image * len(anchors) + level_of, nms_threshold)
    per_image = [kept[image[kept] == i][:post_nms_top_n] for i in range(batch)]
    return [box[k] for k in per_image], [score[k] for k in per_image]


composite("filter_proposals")
without_triton("soft_nms")
