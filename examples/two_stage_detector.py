"""A two-stage detector, small enough to read at one sitting and to train in minutes on two cores.

    python examples/two_stage_detector.py

Backbone -> feature pyramid -> region proposals -> RoI Align -> class and box of every proposal (Ren et al. 2015,
https://arxiv.org/abs/1506.01497; Lin et al. 2017, https://arxiv.org/abs/1612.03144). It learns to find patches of
brick, fur and stars on grass, gravel and moon: synthetic scenes of real textures, photos that ship with scikit-image.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, smooth_l1_loss

from pyops import nn, vision
from pyops.demo.packages import load_photo

SIDE = 96
OBJECTS = ("brick.png", "chelsea.png", "hubble_deep_field.jpg")  # class 1, 2, 3; 0 is background
GROUNDS = ("grass.png", "gravel.png", "moon.png")


# Scenes


@dataclass
class Scene:
    """image: [3, SIDE, SIDE] around 0; boxes: [G, 4] in pixels, (x1, y1, x2, y2); labels: [G], 1 to 3."""

    image: torch.Tensor
    boxes: torch.Tensor
    labels: torch.Tensor


class Scenes:
    """Draws scenes: two to four elliptic or rectangular patches of texture on a textured ground.

    Args:
        seed: of the generator; equal seeds give equal scenes.
    """

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.objects = [self._texture(file) for file in OBJECTS]
        self.grounds = [self._texture(file) for file in GROUNDS]

    @staticmethod
    def _texture(file: str) -> torch.Tensor:
        import numpy as np

        return torch.from_numpy(np.array(load_photo("skimage", f"data/{file}"))).permute(2, 0, 1).float() / 64 - 2

    def _whole(self, low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=self.generator))

    def _crop(self, texture: torch.Tensor, height: int, width: int) -> torch.Tensor:
        y, x = self._whole(0, texture.shape[1] - height), self._whole(0, texture.shape[2] - width)
        return texture[:, y : y + height, x : x + width]

    def draw(self) -> Scene:
        image = self._crop(self.grounds[self._whole(0, len(self.grounds))], SIDE, SIDE)
        # a little noise: in the black of the sky all anchors would score the same, and rounding would choose among them
        image = image + 0.02 * torch.randn(image.shape, generator=self.generator)
        boxes, labels = [], []
        wanted = self._whole(2, 5)
        for _ in range(30):
            h, w = self._whole(14, 46), self._whole(14, 46)
            y, x = self._whole(0, SIDE - h), self._whole(0, SIDE - w)
            apart = all(x >= b[2] or x + w <= b[0] or y >= b[3] or y + h <= b[1] for b in boxes)
            if not apart:
                continue
            label = self._whole(0, len(self.objects))
            rows, columns = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
            shape = (rows**2 + columns**2 <= 1) if self._whole(0, 2) else torch.ones(h, w, dtype=torch.bool)
            patch = self._crop(self.objects[label], h, w)
            image[:, y : y + h, x : x + w] = torch.where(shape, patch, image[:, y : y + h, x : x + w])
            boxes.append((x, y, x + w, y + h))
            labels.append(label + 1)
            if len(boxes) == wanted:
                break
        return Scene(image, torch.tensor(boxes, dtype=torch.float32), torch.tensor(labels))


# The network


@dataclass
class Ops:
    """Whose modules and functions the detector is made of; torch's own in the test that compares both."""

    Conv2d: Any = nn.Conv2d
    BatchNorm2d: Any = nn.BatchNorm2d
    relu: Any = field(default_factory=nn.ReLU)
    FeaturePyramidNetwork: Any = vision.FeaturePyramidNetwork
    MultiScaleRoIAlign: Any = vision.MultiScaleRoIAlign
    box_iou: Any = vision.box_iou
    batched_nms: Any = vision.batched_nms
    filter_proposals: Any = vision.filter_proposals


@dataclass
class Detections:
    """boxes: [D, 4]; scores: [D], falling; labels: [D]."""

    boxes: torch.Tensor
    scores: torch.Tensor
    labels: torch.Tensor


class Detector(torch.nn.Module):
    """Boxes and classes of the objects in images of SIDE × SIDE pixels.

    Args:
        classes: kinds of objects, without the background.
        ops: see ``Ops``.
        seed: of the generator that samples anchors and proposals in training.
    """

    WIDTHS = (16, 32, 48, 64)
    DEPTH = 32  # channels of the pyramid
    BINS = 5
    WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # of the second stage's box transform

    def __init__(self, classes: int, ops: Ops | None = None, seed: int = 0) -> None:
        super().__init__()
        self.ops = ops or Ops()
        self.generator = torch.Generator().manual_seed(seed)
        widths, depth = self.WIDTHS, self.DEPTH
        self.stages = torch.nn.ModuleList(
            torch.nn.Sequential(
                self.ops.Conv2d(before, after, 3, 2, 1, bias=False), self.ops.BatchNorm2d(after), self.ops.relu,
                self.ops.Conv2d(after, after, 3, 1, 1, bias=False), self.ops.BatchNorm2d(after), self.ops.relu,
            )
            for before, after in zip((3, *widths), widths)
        )  # fmt: skip
        self.pyramid = self.ops.FeaturePyramidNetwork(list(widths[1:]), depth)
        self.anchors = vision.AnchorGenerator(((16,), (32,), (48,)), ((0.5, 1.0, 2.0),))
        each = self.anchors.num_anchors_per_location()[0]
        self.proposal = self.ops.Conv2d(depth, depth, 3, padding=1)
        self.objectness = self.ops.Conv2d(depth, each, 1)
        self.offsets = self.ops.Conv2d(depth, 4 * each, 1)
        self.align = self.ops.MultiScaleRoIAlign(["4", "8", "16"], self.BINS, 2, canonical_scale=32, canonical_level=3)
        self.head = torch.nn.Linear(depth * self.BINS**2, 128)
        self.score = torch.nn.Linear(128, classes + 1)
        self.box = torch.nn.Linear(128, 4)

    def features(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Maps of the pyramid, named by their strides."""
        maps = {}
        for stride, stage in zip((2, 4, 8, 16), self.stages):
            images = stage(images)
            maps[str(stride)] = images
        del maps["2"]
        return self.pyramid(maps)

    def proposals(self, maps: dict[str, torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """For every level the objectness [B, H W A] and offsets [B, H W A, 4] of its anchors."""
        logits, offsets = [], []
        for m in maps.values():
            hidden = self.ops.relu(self.proposal(m))
            logits.append(self.objectness(hidden).movedim(1, -1).flatten(1))
            offsets.append(self.offsets(hidden).movedim(1, -1).reshape(len(m), -1, 4))
        return logits, offsets

    def heads(self, maps: dict[str, torch.Tensor], boxes: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Class logits [R, classes + 1] and offsets [R, 4] of all boxes."""
        pooled = self.align(maps, boxes, [(SIDE, SIDE)] * len(boxes))
        hidden = self.ops.relu(self.head(pooled.flatten(1)))
        return self.score(hidden), self.box(hidden)

    def losses(self, images: torch.Tensor, scenes: Sequence[Scene]) -> dict[str, torch.Tensor]:
        """The four losses of Faster R-CNN on a batch."""
        maps = self.features(images)
        logits, offsets = self.proposals(maps)
        anchors = self.anchors((SIDE, SIDE), list(maps.values()))
        first = self._proposal_losses(torch.cat(logits, 1), torch.cat(offsets, 1), torch.cat(anchors), scenes)
        found, _ = self.ops.filter_proposals(logits, offsets, anchors, [(SIDE, SIDE)] * len(images), 200, 100)
        boxes, labels, targets = [], [], []
        for own, scene in zip(found, scenes):
            truth = scene.boxes.to(own)
            own = torch.cat((own, truth))
            overlap, which = self.ops.box_iou(own, truth).max(1)
            label = torch.where(overlap >= 0.5, scene.labels[which], 0)
            chosen = self._sample(label > 0, label == 0, 48, 0.25)
            boxes.append(own[chosen])
            labels.append(label[chosen])
            targets.append(vision.encode_boxes(truth[which[chosen]], own[chosen], self.WEIGHTS))
        scores, moves = self.heads(maps, boxes)
        label, target = torch.cat(labels), torch.cat(targets)
        box = smooth_l1_loss(moves[label > 0], target[label > 0], beta=1 / 9, reduction="sum") / len(label)
        return {**first, "class": cross_entropy(scores, label), "box": box}

    def _proposal_losses(
        self, logits: torch.Tensor, offsets: torch.Tensor, anchors: torch.Tensor, scenes: Sequence[Scene]
    ) -> dict[str, torch.Tensor]:
        objectness, box = [], []
        for logit, offset, scene in zip(logits, offsets, scenes):
            truth = scene.boxes.to(anchors)
            overlaps = self.ops.box_iou(anchors, truth)
            overlap, which = overlaps.max(1)
            positive = overlap >= 0.6
            best = overlaps.max(0).indices  # every object has at least the anchor that fits it best
            positive[best] = True
            which[best] = torch.arange(len(truth))
            chosen = self._sample(positive, (overlap < 0.3) & ~positive, 64, 0.5)
            good = chosen[positive[chosen]]
            objectness.append(binary_cross_entropy_with_logits(logit[chosen], positive[chosen].to(logit)))
            wanted = vision.encode_boxes(truth[which[good]], anchors[good])
            box.append(smooth_l1_loss(offset[good], wanted, beta=1 / 9, reduction="sum") / len(chosen))
        return {"objectness": torch.stack(objectness).mean(), "proposal box": torch.stack(box).mean()}

    def _sample(self, positive: torch.Tensor, negative: torch.Tensor, count: int, share: float) -> torch.Tensor:
        """Indices of at most ``count`` random examples, at most ``share`` of them positive."""
        some = []
        for mask, most in ((positive, int(count * share)), (negative, count)):
            index = torch.where(mask)[0]
            order = torch.randperm(len(index), generator=self.generator).to(index.device)
            some.append(index[order[:most]])
        return torch.cat((some[0], some[1][: count - len(some[0])]))

    @torch.no_grad()
    def detect(self, images: torch.Tensor, least: float = 0.05) -> list[Detections]:
        """The objects in every image, those of probability ``least`` and more."""
        maps = self.features(images)
        logits, offsets = self.proposals(maps)
        anchors = self.anchors((SIDE, SIDE), list(maps.values()))
        boxes, _ = self.ops.filter_proposals(logits, offsets, anchors, [(SIDE, SIDE)] * len(images), 200, 50)
        scores, moves = self.heads(maps, boxes)
        counts = [len(own) for own in boxes]
        found = []
        for own, probability, move in zip(boxes, scores.softmax(1).split(counts), moves.split(counts)):
            own = vision.clip_boxes_to_image(vision.decode_boxes(move, own, self.WEIGHTS), (SIDE, SIDE))
            row, label = torch.where(probability[:, 1:] >= least)
            score = probability[row, label + 1]
            kept = self.ops.batched_nms(own[row], score, label, 0.4)[:30]
            found.append(Detections(own[row][kept], score[kept], label[kept] + 1))
        return found


# Training


def batch(scenes: Scenes, count: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, list[Scene]]:
    drawn = [scenes.draw() for _ in range(count)]
    return torch.stack([scene.image for scene in drawn]).to(dtype), drawn


def train(
    detector: Detector, scenes: Scenes, steps: int, size: int = 4, rate: float = 2e-3, report: int = 0
) -> list[float]:
    """Adam with a linearly falling rate; returns the loss of every step. ``report``: steps between printed lines."""
    dtype = next(detector.parameters()).dtype
    optimizer = torch.optim.Adam(detector.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    detector.train()
    history = []
    start = time.perf_counter()
    for step in range(steps):
        images, drawn = batch(scenes, size, dtype)
        losses = detector.losses(images, drawn)
        total = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        schedule.step()
        history.append(total.item())
        if report and (step + 1) % report == 0:
            parts = ", ".join(f"{name} {loss.item():.3f}" for name, loss in losses.items())
            print(f"step {step + 1:4d}  {time.perf_counter() - start:5.0f} s  {parts}", flush=True)
    return history


def mean_average_precision(detector: Detector, scenes: Scenes, count: int) -> float:
    """mAP at an overlap of one half, on fresh scenes."""
    detector.eval()
    images, drawn = batch(scenes, count)
    found = [d for chunk in images.split(8) for d in detector.detect(chunk)]
    mean, _ = vision.average_precision(
        [d.boxes for d in found], [d.scores for d in found], [d.labels for d in found],
        [scene.boxes for scene in drawn], [scene.labels for scene in drawn],
    )  # fmt: skip
    return mean


def main() -> None:
    parser = argparse.ArgumentParser(description="train a two-stage detector on scenes of real textures")
    parser.add_argument("--steps", type=int, default=1200)
    options = parser.parse_args()
    torch.manual_seed(0)
    detector = Detector(len(OBJECTS))
    train(detector, Scenes(1), options.steps, report=50)
    print(f"mAP@0.5 on 64 new scenes: {mean_average_precision(detector, Scenes(2), 64):.3f}")


if __name__ == "__main__":
    main()
