"""A two-stage detector (examples/two_stage_detector.py) trains as the same network on plain torch does, and learns."""

import importlib.util
import math
from collections import OrderedDict

import pytest
import torch

from pyops import vision

from . import harness

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("skimage", "PIL")), reason="needs scikit-image and pillow"
)


@pytest.fixture(scope="module")
def example():
    with harness.example("two_stage_detector") as module:
        yield module


# The detector's ops in plain torch


def box_iou(a, b):
    side = lambda t: (t[:, 2:] - t[:, :2]).prod(1)
    common = (torch.minimum(a[:, None, 2:], b[:, 2:]) - torch.maximum(a[:, None, :2], b[:, :2])).clamp(min=0).prod(2)
    return common / (side(a)[:, None] + side(b) - common)


def batched_nms(boxes, scores, groups, threshold):
    rest = scores.argsort(descending=True, stable=True)
    kept = []
    while len(rest):
        first, others = rest[:1], rest[1:]
        kept.append(first)
        rivals = (groups[others] == groups[first]) & (box_iou(boxes[first], boxes[others])[0] > threshold)
        rest = others[~rivals]
    return torch.cat(kept) if kept else rest


def filter_proposals(objectness, deltas, anchors, sizes, before, after):
    boxes, scores = [], []
    for i, (h, w) in enumerate(sizes):
        own, p, levels = [], [], []
        for level, (logits, moves, places) in enumerate(zip(objectness, deltas, anchors)):
            best, index = logits[i].detach().topk(min(before, len(places)))
            place, move = places[index], moves[i].detach()[index]
            size = place[:, 2:] - place[:, :2]
            centre = place[:, :2] + size / 2 + move[:, :2] * size
            size = size * move[:, 2:].clamp(max=math.log(1000 / 16)).exp()
            corners = torch.cat((centre - size / 2, centre + size / 2), 1)
            own.append(torch.minimum(corners.clamp(min=0), corners.new_tensor([w, h, w, h])))
            p.append(best.sigmoid())
            levels.append(torch.full_like(index, level))
        own, p, levels = torch.cat(own), torch.cat(p), torch.cat(levels)
        large = (own[:, 2:] - own[:, :2] >= 1e-3).all(1)
        own, p, levels = own[large], p[large], levels[large]
        kept = batched_nms(own, p, levels, 0.7)[:after]
        boxes.append(own[kept])
        scores.append(p[kept])
    return boxes, scores


class MultiScaleRoIAlign(torch.nn.Module):
    """Every sample a mixture of its four neighbours, fetched by index. Boxes must lie inside the image."""

    def __init__(self, names, bins, ratio, canonical_scale, canonical_level):
        super().__init__()
        self.strides, self.bins, self.ratio = [int(name) for name in names], bins, ratio
        self.canonical = canonical_scale, canonical_level

    def forward(self, maps, boxes, image_shapes):
        image = torch.cat([torch.full((len(own),), i) for i, own in enumerate(boxes)])
        box = torch.cat(boxes)
        scale, level = self.canonical
        area = (box[:, 2:] - box[:, :2]).prod(1)
        levels = (level + (area.sqrt() / scale).log2() + 1e-6).floor().clamp(2, 4) - 2
        y = box.new_zeros(len(box), next(iter(maps.values())).shape[1], self.bins, self.bins)
        for k, (m, stride) in enumerate(zip(maps.values(), self.strides)):
            own = torch.where(levels == k)[0]
            y = y.index_put((own,), self.one_level(m, image[own], box[own] / stride))
        return y

    def one_level(self, m, image, box):
        n = self.bins * self.ratio
        step = (torch.arange(n, dtype=box.dtype) + 0.5) / n
        length = (box[:, 2:] - box[:, :2]).clamp(min=1)
        column, row = ((box[:, d, None] + length[:, d, None] * step) for d in (0, 1))
        row, column = row.clamp(max=m.shape[2] - 1), column.clamp(max=m.shape[3] - 1)
        sampled = 0
        for up in (0, 1):
            for right in (0, 1):
                i, j = (at.floor().long() + more for at, more in ((row, up), (column, right)))
                share = (1 - (row - i).abs())[:, :, None] * (1 - (column - j).abs())[:, None, :]
                i, j = i.clamp(max=m.shape[2] - 1), j.clamp(max=m.shape[3] - 1)
                sampled = sampled + share[..., None] * m[image[:, None, None], :, i[:, :, None], j[:, None, :]]
        return torch.nn.functional.avg_pool2d(sampled.movedim(-1, 1), self.ratio)


class FeaturePyramidNetwork(torch.nn.Module):
    def __init__(self, widths, depth):
        super().__init__()
        conv = lambda channels, size: torch.nn.Sequential(torch.nn.Conv2d(channels, depth, size, padding=size // 2))
        self.inner_blocks = torch.nn.ModuleList(conv(width, 1) for width in widths)
        self.layer_blocks = torch.nn.ModuleList(conv(depth, 3) for _ in widths)

    def forward(self, maps):
        found, above = OrderedDict(), None
        for name, side, out in reversed(list(zip(maps, self.inner_blocks, self.layer_blocks))):
            here = side(maps[name])
            if above is not None:
                here = here + torch.nn.functional.interpolate(above, size=here.shape[-2:], mode="nearest")
            above = here
            found[name] = out(here)
        return OrderedDict(reversed(found.items()))


def test_twenty_steps_as_with_torch(example, one_thread):
    """In float64, so that no decision (which anchor, which proposal) hangs on the last bit."""
    plain = example.Ops(
        torch.nn.Conv2d, torch.nn.BatchNorm2d, torch.nn.ReLU(), FeaturePyramidNetwork, MultiScaleRoIAlign, box_iou,
        batched_nms, filter_proposals,
    )  # fmt: skip
    torch.manual_seed(0)
    ours = example.Detector(3).double()
    reference = example.Detector(3, plain).double()
    reference.load_state_dict(ours.state_dict())
    losses = [example.train(model, example.Scenes(1), steps=20, size=2) for model in (ours, reference)]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-9, atol=0)
    assert losses[0][-1] < 0.7 * losses[0][0]
    images, _ = example.batch(example.Scenes(2), 2, torch.float64)
    for a, b in zip(ours.eval().detect(images, 0.01), reference.eval().detect(images, 0.01)):
        assert len(a.boxes) > 0 and torch.equal(a.labels, b.labels)
        torch.testing.assert_close((a.boxes, a.scores), (b.boxes, b.scores))


@pytest.mark.slow
def test_it_learns_to_detect(example):
    torch.manual_seed(0)
    detector = example.Detector(len(example.OBJECTS))
    example.train(detector, example.Scenes(1), steps=400)
    assert example.mean_average_precision(detector, example.Scenes(2), 64) >= 0.7


def test_scenes_are_what_they_say(example):
    scene = example.Scenes(3).draw()
    assert scene.image.shape == (3, example.SIDE, example.SIDE) and len(scene.boxes) == len(scene.labels) >= 1
    assert (scene.boxes[:, 2:] > scene.boxes[:, :2]).all() and scene.boxes.max() <= example.SIDE
    again = example.Scenes(3).draw()
    assert torch.equal(scene.image, again.image) and not torch.equal(scene.image, example.Scenes(4).draw().image)
    assert (vision.box_iou(scene.boxes, scene.boxes).fill_diagonal_(0) == 0).all()
