"""Average precision of detections: the area under precision over recall.

Detections of a class, best score first, are matched one by one to the unmatched ground truth of their image with the
largest IoU, if that reaches the threshold. With TP(k) right ones among the first k and G ground truths:

    precision(k) = TP(k) / k     recall(k) = TP(k) / G     p(r) = largest precision at a recall >= r, or 0

    "all"    ∫ p(r) dr                           (VOC from 2010)
    "voc11"  mean of p(r) over r = 0, 0.1 … 1    (VOC 2007)
    "coco"   mean of p(r) over r = 0, 0.01 … 1   (COCO, over IoU thresholds 0.5, 0.55 … 0.95)

Source: Everingham et al. 2010; Lin et al. 2014, https://arxiv.org/abs/1405.0312.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..core import check, geometry
from ..core.explain import composite

COCO_THRESHOLDS = tuple(0.5 + 0.05 * i for i in range(10))
_POINTS = {"voc11": 11, "coco": 101}


def _right(boxes, scores, images, truths, truth_images, threshold) -> torch.Tensor:
    """bool[D], in the order of falling scores: is the detection matched?"""
    order = scores.argsort(descending=True, stable=True)
    right = torch.zeros(len(order), dtype=torch.bool)
    free = torch.ones(len(truths), dtype=torch.bool)
    own = {i: torch.where(truth_images == i)[0] for i in truth_images.unique().tolist()}
    for k, d in enumerate(order.tolist()):
        candidates = own.get(images[d].item())
        if candidates is None:
            continue
        candidates = candidates[free[candidates]]
        if len(candidates) == 0:
            continue
        q = _iou(boxes[d], truths[candidates])
        best = int(q.argmax())
        # a hair of slack, so that thresholds such as 0.55 mean what they say
        if q[best] >= threshold - 1e-9:
            right[k] = True
            free[candidates[best]] = False
    return right


def _iou(box: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    common = (torch.minimum(box[2:], others[:, 2:]) - torch.maximum(box[:2], others[:, :2])).clamp(min=0).prod(1)
    area = (box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(1) - common
    return torch.where(area > 0, common / area, torch.zeros_like(area))


def _area(right: torch.Tensor, truths: int, method: str) -> float:
    hits = right.double().cumsum(0)
    precision = hits / torch.arange(1, len(right) + 1, dtype=torch.float64)
    recall = hits / truths
    # p(r): the largest precision from here on
    envelope = precision.flip(0).cummax(0).values.flip(0) if len(right) else precision
    if method == "all":
        step = torch.diff(recall, prepend=torch.zeros(1, dtype=torch.float64))
        return float((step * envelope).sum())
    points = torch.linspace(0, 1, _POINTS[method], dtype=torch.float64)
    at = torch.searchsorted(recall, points - 1e-12)
    return float(torch.cat((envelope, torch.zeros(1, dtype=torch.float64)))[at].mean())


def average_precision(
    boxes: Sequence[torch.Tensor],
    scores: Sequence[torch.Tensor],
    labels: Sequence[torch.Tensor],
    true_boxes: Sequence[torch.Tensor],
    true_labels: Sequence[torch.Tensor],
    iou_threshold: float | Sequence[float] = 0.5,
    method: str = "all",
) -> tuple[float, dict[int, float]]:
    """Mean average precision, and that of every class.

    Args:
        boxes: for every image the detections Tensor[D, 4], (x1, y1, x2, y2).
        scores: for every image Tensor[D].
        labels: for every image int64 Tensor[D].
        true_boxes: for every image the ground truth Tensor[G, 4].
        true_labels: for every image int64 Tensor[G].
        iou_threshold: least IoU of a match, in (0, 1]; of several, the precisions are averaged. COCO's are
            ``pyops.ops.average_precision.COCO_THRESHOLDS``.
        method: ``"all"``, ``"voc11"`` or ``"coco"``, see above.

    Returns:
        (mAP, {class: AP}) over the classes that have ground truth; mAP is NaN where there is none. In float64.

    Raises:
        ValueError: an unknown method, a threshold outside (0, 1].
        RuntimeError: lists or tensors whose lengths do not fit.
    """
    op = "average_precision"
    if method not in ("all", *_POINTS):
        check.fail(ValueError, op, "method", repr(method), "'all', 'voc11' or 'coco'")
    thresholds = [iou_threshold] if isinstance(iou_threshold, (int, float)) else list(iou_threshold)
    if not thresholds or not all(0 < t <= 1 for t in thresholds):
        check.fail(ValueError, op, "iou_threshold", iou_threshold, "numbers in (0, 1]")
    lengths = {len(x) for x in (boxes, scores, labels, true_boxes, true_labels)}
    if len(lengths) != 1:
        check.fail(RuntimeError, op, "boxes", f"lists of {sorted(lengths)} images", "one entry per image in each")
    for i, (b, s, k, tb, tk) in enumerate(zip(boxes, scores, labels, true_boxes, true_labels)):
        geometry.matrix_of_boxes(op, f"boxes[{i}]", b)
        geometry.matrix_of_boxes(op, f"true_boxes[{i}]", tb)
        if s.shape != b.shape[:1] or k.shape != b.shape[:1] or tk.shape != tb.shape[:1]:
            got = f"{list(s.shape)}, {list(k.shape)} and {list(tk.shape)} in image {i}"
            check.fail(RuntimeError, op, "scores", got, f"{len(b)} scores and labels, {len(tb)} true labels")
    if not boxes:
        return float("nan"), {}
    image = lambda some: torch.cat([torch.full((len(b),), i) for i, b in enumerate(some)])
    flat = lambda some: torch.cat([t.detach().cpu() for t in some])
    box, score, label, at = flat(boxes).double(), flat(scores).double(), flat(labels), image(boxes)
    truth, truth_label, truth_at = flat(true_boxes).double(), flat(true_labels), image(true_boxes)
    found = {}
    for k in truth_label.unique().tolist():
        own, true = label == k, truth_label == k
        matched = (
            _right(box[own], score[own], at[own], truth[true], truth_at[true], threshold) for threshold in thresholds
        )
        found[int(k)] = sum(_area(right, int(true.sum()), method) for right in matched) / len(thresholds)
    return (sum(found.values()) / len(found) if found else float("nan")), found


composite("average_precision")
