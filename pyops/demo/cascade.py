"""What runs MTCNN's three networks: image pyramid, candidates, suppression, refinement, crops.

The answers are those of facenet-pytorch's ``detect_face``, which masks, picks and joins with torch's indexing at every
step. Here suppression takes the least score and returns the indices of what it keeps, and the rows they name are
read as those of an embedding table. Boxes follow from the place of a candidate by arithmetic, and what comes in pieces
(levels of the pyramid, crops) is computed into its slice of the whole. What torch is left, under ``pyops.use()``, is
elementwise arithmetic, views and empty memory, besides what the networks themselves do; on a GPU torch also sorts
before suppression.

Boxes are [R, 2, 2]: the corner near the origin and the far one, each as (x, y).

Source: Zhang et al. 2016, https://arxiv.org/abs/1604.02878; facenet_pytorch/models/utils/detect_face.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from .. import vision

STRIDE, CELL = 2, 12  # pixels from one place of the first network to the next, and those that a place sees
WITHIN_LEVEL, WITHIN_PHOTO = 0.5, 0.7  # overlaps above which the lower score is removed
MEAN, SCALE = 127.5, 0.0078125  # bytes to about ±1, as the networks were trained


def detect(detector: Any, photo: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Faces on one photo, the most certain first.

    Args:
        detector: facenet_pytorch's MTCNN: its networks, thresholds, least size of a face and factor of the pyramid.
        photo: Tensor[3, H, W], bytes.

    Returns:
        (boxes [R, 2, 2], probabilities [R], landmarks [R, 5, 2]), all points as (x, y) in pixels.
    """
    image = photo[None].float()
    first, second, third = detector.thresholds
    with torch.no_grad():
        boxes = _candidates(detector, image, first)
        if len(boxes):
            boxes = _confirmed(detector.rnet(_crops(image, boxes, 24)), boxes, second)
        if not len(boxes):
            return boxes, image.new_empty(0), image.new_empty(0, 5, 2)
        offsets, marks, probabilities = detector.onet(_crops(image, boxes, 48))
        side = boxes[:, 1] - boxes[:, 0] + 1
        marks = side[..., None] * marks.view(-1, 2, 5) + boxes[:, 0, :, None] - 1
        boxes = _moved(boxes, offsets, side)
        # as areas count the pixels of both edges
        pixels = torch.empty_like(boxes)
        for corner, beyond in enumerate((0, 1)):
            torch.add(boxes[:, corner], beyond, out=pixels[:, corner])
        sure = probabilities[:, 1] - third
        kept = vision.nms_above(pixels.flatten(1), sure, WITHIN_PHOTO, 0.0, overlap="smaller")
        return _rows(boxes, kept), _rows(probabilities, kept)[:, 1], _rows(marks, kept).transpose(1, 2)


def _candidates(detector: Any, image: torch.Tensor, threshold: float) -> torch.Tensor:
    """Squares around what the first network takes for faces on some level of the pyramid."""
    height, width = image.shape[2:]
    levels = []
    scale = CELL / detector.min_face_size
    while min(height, width) * scale >= CELL:
        level = F.interpolate(image, (int(height * scale + 1), int(width * scale + 1)), mode="area")
        offsets, probabilities = detector.pnet((level - MEAN) * SCALE)
        columns = offsets.shape[3]
        # the difference is exact where it is near 0, and keeps the order
        sure = (probabilities[0, 1] - threshold).view(-1)
        windows = image.new_empty(len(sure), 2, 2)
        _windows(torch.arange(len(sure), device=image.device), columns, scale, windows)
        kept = vision.nms_above(windows.flatten(1), sure, WITHIN_LEVEL, 0.0)
        levels.append((kept, columns, scale, offsets.view(4, -1), sure))
        scale *= detector.factor
    count = sum(len(kept) for kept, *_ in levels)
    boxes, moved, scores = image.new_empty(count, 2, 2), image.new_empty(count, 2, 2), image.new_empty(count)
    begin = 0
    for kept, columns, scale, offsets, sure in levels:
        part = slice(begin, begin + len(kept))
        _windows(kept, columns, scale, boxes[part])
        planes = kept[:, None] + torch.arange(4, device=image.device) * offsets.shape[1]
        side = boxes[part, 1] - boxes[part, 0]
        shift = _rows(offsets.view(-1, 1), planes).view(-1, 2, 2) * side[:, None]
        torch.add(boxes[part], shift, out=moved[part])
        torch.add(_rows(sure[:, None], kept)[:, 0], threshold, out=scores[part])
        begin = part.stop
    return _square(_rows(moved, vision.nms(boxes.flatten(1), scores, WITHIN_PHOTO)))


def _confirmed(answer: tuple[torch.Tensor, ...], boxes: torch.Tensor, threshold: float) -> torch.Tensor:
    """What the second network still takes for faces, moved to where it sees them."""
    offsets, probabilities = answer
    sure = probabilities[:, 1] - threshold
    kept = vision.nms_above(boxes.flatten(1), sure, WITHIN_PHOTO, 0.0)
    boxes = _rows(boxes, kept)
    return _square(_moved(boxes, _rows(offsets, kept), boxes[:, 1] - boxes[:, 0] + 1))


def _windows(place: torch.Tensor, columns: int, scale: float, out: torch.Tensor) -> None:
    """What the first network sees at its places, counted row by row, in pixels of the photo."""
    cell = place.new_empty(len(place), 2)
    torch.remainder(place, columns, out=cell[:, 0])
    torch.div(place, columns, rounding_mode="floor", out=cell[:, 1])
    for corner, reach in enumerate((1, CELL)):
        torch.floor((STRIDE * cell + reach) / scale, out=out[:, corner])


def _moved(boxes: torch.Tensor, offsets: torch.Tensor, side: torch.Tensor) -> torch.Tensor:
    """Both corners moved by parts of the sides."""
    return boxes + offsets.view(-1, 2, 2) * side[:, None]


def _square(boxes: torch.Tensor) -> torch.Tensor:
    """Squares with the centre and the longer side of the boxes."""
    side = boxes[:, 1] - boxes[:, 0]
    longest = torch.maximum(side[:, :1], side[:, 1:])
    squares = torch.empty_like(boxes)
    torch.sub(boxes[:, 0] + side * 0.5, longest * 0.5, out=squares[:, 0])
    torch.add(squares[:, 0], longest, out=squares[:, 1])
    return squares


def _crops(image: torch.Tensor, boxes: torch.Tensor, size: int) -> torch.Tensor:
    """What lies in the boxes, as far as the photo goes, resampled to size × size: [R, 3, size, size]."""
    height, width = image.shape[2:]
    crops = image.new_empty(len(boxes), image.shape[1], size, size)
    for crop, corners in zip(crops.split(1), boxes.flatten(1).tolist()):
        left, top, right, bottom = (int(v) for v in corners)
        # pixels are counted from 1; a box beside the photo has the nearest one
        left, top = (min(max(v, 1), most) - 1 for v, most in ((left, width), (top, height)))
        right, bottom = (
            max(min(v, most), least + 1) for v, most, least in ((right, width, left), (bottom, height, top))
        )
        part = F.pad(image, (-left, right - width, -top, bottom - height))
        torch.sub(F.interpolate(part, (size, size), mode="area"), MEAN, out=crop)
    return crops.mul_(SCALE)


def _rows(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """table[index], by the op that reads rows."""
    return F.embedding(index, table.flatten(1)).view(*index.shape, *table.shape[1:])
