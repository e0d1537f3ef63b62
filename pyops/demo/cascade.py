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

import math
from typing import Any

import torch
from torch.nn import functional as F

from .. import vision

STRIDE, CELL = 2, 12  # pixels from one place of the first network to the next, and those that a place sees
WITHIN_LEVEL, WITHIN_PHOTO = 0.5, 0.7  # overlaps above which the lower score is removed
MEAN, SCALE = 127.5, 0.0078125  # bytes to about ±1, as the networks were trained


class Cascade:
    """The networks, thresholds, least size of a face and factor of the pyramid of a facenet_pytorch.MTCNN."""

    def __init__(self, detector: Any) -> None:
        self._detector = detector
        self._second, self._third = Refiner(detector.rnet, 24), Refiner(detector.onet, 48)

    def detect(self, photo: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Faces on one photo, the most certain first.

        Args:
            photo: Tensor[3, H, W], bytes.

        Returns:
            (boxes [R, 2, 2], probabilities [R], landmarks [R, 5, 2]), all points as (x, y) in pixels.
        """
        image = photo[None].float()
        first, second, third = self._detector.thresholds
        with torch.no_grad():
            boxes = _candidates(self._detector, image, first)
            if len(boxes):
                probabilities, offsets = self._second(image, boxes)
                boxes = _confirmed(probabilities, offsets, boxes, second)
            if not len(boxes):
                return boxes, image.new_empty(0), image.new_empty(0, 5, 2)
            probabilities, offsets, marks = self._third(image, boxes)
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


class Refiner:
    """The second or third network, on what lies in boxes.

    Between its convolutions and its first product the network orders the features as [R, W, H, C], a copy in each call.
    Here the weight of that product is ordered as the features are, once.
    """

    def __init__(self, network: torch.nn.Module, size: int) -> None:
        layers = list(network.children())
        at = next(i for i, layer in enumerate(layers) if isinstance(layer, torch.nn.Linear))
        self._size, self._features, self._first = size, torch.nn.Sequential(*layers[:at]), layers[at]
        self._between, self._logits, self._softmax, *self._others = layers[at + 1 :]
        channels = next(c for c in reversed(layers[:at]) if isinstance(c, torch.nn.Conv2d)).out_channels
        weight = self._first.weight.detach()
        side = math.isqrt(weight.shape[1] // channels)
        self._weight = weight.view(-1, side, side, channels).permute(0, 3, 2, 1).reshape(weight.shape)

    def __call__(self, image: torch.Tensor, boxes: torch.Tensor) -> list[torch.Tensor]:
        """[probabilities [R, 2], offsets [R, 4]] of the second network, and landmarks [R, 10] of the third."""
        features = self._features(_crops(image, boxes, self._size)).flatten(1)
        x = self._between(F.linear(features, self._weight, self._first.bias))
        return [self._softmax(self._logits(x)), *(layer(x) for layer in self._others)]


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


def _confirmed(
    probabilities: torch.Tensor, offsets: torch.Tensor, boxes: torch.Tensor, threshold: float
) -> torch.Tensor:
    """What the second network still takes for faces, moved to where it sees them."""
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
