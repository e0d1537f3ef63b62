"""torchvision's Python files on the ops of pyops, in a process of its own: torch's registry cannot be emptied again."""

import importlib.util
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="needs torchvision")

PROGRAM = """
import torch
from pyops import vision
from pyops.compat import torchvision as compat
from pyops.demo import times

ours = compat.install()
assert compat.install() == ours
import torchvision
from torchvision import ops

assert torchvision.extension._has_ops()
g = torch.Generator().manual_seed(0)
boxes = torch.rand(60, 4, generator=g) * 20
boxes[:, 2:] += boxes[:, :2]
scores = torch.rand(60, generator=g)
assert torch.equal(ops.nms(boxes, scores, 0.4), vision.nms(boxes, scores, 0.4))
classes = torch.arange(60) % 3
assert torch.equal(ops.batched_nms(boxes, scores, classes, 0.4), vision.batched_nms(boxes, scores, classes, 0.4))
if ours:  # classes are told apart, not moved apart: of these names a float32 coordinate would keep nothing
    names = classes * 10**7
    with times.Kernels() as kernels:
        kept = ops.batched_nms(boxes, scores, names, 0.4)
    assert torch.equal(kept, vision.batched_nms(boxes, scores, classes, 0.4))
    assert not any(kernels.calls[kind] for kind in times.KINDS if kind != "views")
many, few = boxes.repeat(20, 1) + torch.arange(1200)[:, None] // 7, torch.rand(1200, generator=g)
same = torch.arange(1200) % 5
assert torch.equal(ops.batched_nms(many, few, same, 0.4), vision.batched_nms(many, few, same, 0.4))
assert ops.batched_nms(boxes[:0], scores[:0], classes[:0], 0.4).shape == (0,)
scripted = torch.jit.script(ops.batched_nms)
assert torch.equal(scripted(boxes, scores, classes, 0.4), ops.batched_nms(boxes, scores, classes, 0.4))
x = torch.randn(2, 8, 12, 12, generator=g, dtype=torch.float64, requires_grad=True)
rois = torch.cat((torch.arange(60)[:, None] % 2, boxes), 1).double()
for name, arguments in (
    ("roi_align", (2, 0.5, 2, True)), ("roi_pool", (2, 0.5)), ("ps_roi_align", (2, 0.5, 2)), ("ps_roi_pool", (2, 0.5)),
):
    theirs, own = (getattr(m, name)(x, rois, *arguments) for m in (ops, vision))
    torch.testing.assert_close(theirs, own)
    a, b = (torch.autograd.grad(y.sin().sum(), x)[0] for y in (theirs, own))
    torch.testing.assert_close(a, b)
y, argmax = torch.ops.torchvision.roi_pool(x, rois, 0.5, 2, 2)
picked = x[rois[:, 0].long()].flatten(2).gather(2, argmax.flatten(2).clamp(min=0).long()).reshape(y.shape)
torch.testing.assert_close(torch.where(argmax >= 0, picked, 0), y)
offset, weight = torch.randn(2, 18, 12, 12, generator=g).double(), torch.randn(4, 8, 3, 3, generator=g).double()
theirs, own = (m.deform_conv2d(x, offset, weight, padding=1) for m in (ops, vision))
torch.testing.assert_close(theirs, own)
import torchvision.models.detection
print("works", ours)
"""


# Names, arguments and defaults; modules also by their forward.
SIGNATURES = """
import inspect
from pyops import vision
from pyops.compat import torchvision as compat

compat.install()
from torchvision import ops
from torchvision.ops import boxes, feature_pyramid_network, misc

def signature(f):
    return [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]

def same(name, ours, theirs):
    ours, theirs = signature(ours), signature(theirs)
    assert [p[:2] for p in ours] == [p[:2] for p in theirs], (name, ours, theirs)
    for (argument, _, a), (_, _, b) in zip(ours, theirs):
        # a default of theirs may be a class of torch, or one number for both sides
        assert a == b or (not isinstance(a, type) and str(a) == str(b)), (name, argument, a, b)

for name in ops.__all__:
    ours, theirs = getattr(vision, name), getattr(ops, name)
    if not isinstance(theirs, type):
        same(name, ours, theirs)
        continue
    for method in ("__init__", "forward"):
        if getattr(theirs, method).__qualname__.split(".")[0] in (name, theirs.__mro__[1].__name__):
            same(f"{name}.{method}", getattr(ours, method), getattr(theirs, method))
print(len(ops.__all__), "names")
"""

# What is put together from torch in both libraries gives the same numbers.
VALUES = """
import torch
from pyops import vision
from pyops.compat import torchvision as compat

compat.install()
from torchvision import ops

g = torch.Generator().manual_seed(0)
rand = lambda *shape: torch.rand(shape, generator=g, dtype=torch.float64)
turned = torch.cat((rand(9, 2) * 9, rand(9, 2) + 1, rand(9, 1) * 360 - 180), 1)
corners = ops.box_convert(turned, "xywhr", "xyxyxyxy")
by_format = {"xywhr": turned, "cxcywhr": ops.box_convert(turned, "xywhr", "cxcywhr"), "xyxyxyxy": corners}
for a, boxes in by_format.items():
    for b in by_format:
        torch.testing.assert_close(vision.box_convert(boxes, a, b), ops.box_convert(boxes, a, b))
whole = (turned * 9).round().long()
assert torch.equal(vision.box_convert(whole, "xywhr", "cxcywhr"), ops.box_convert(whole, "xywhr", "cxcywhr"))
assert vision.box_convert(whole, "xywhr", "xyxyxyxy").dtype == torch.int64
flat = rand(9, 4)
for fmt in ("xyxy", "xywh", "cxcywh"):
    for other in ("xyxy", "xywh", "cxcywh"):
        torch.testing.assert_close(vision.box_convert(flat, fmt, other), ops.box_convert(flat, fmt, other))
    torch.testing.assert_close(vision.box_area(flat, fmt), ops.box_area(flat, fmt))
first, second = (torch.cat((c, c + rand(9, 2)), 1) for c in (rand(9, 2), rand(9, 2)))
for name in ("box_iou", "generalized_box_iou", "distance_box_iou", "complete_box_iou"):
    torch.testing.assert_close(getattr(vision, name)(first, second), getattr(ops, name)(first, second))
for name in ("generalized_box_iou_loss", "distance_box_iou_loss", "complete_box_iou_loss"):
    for reduction in ("none", "mean", "sum"):
        ours, theirs = (getattr(m, name)(first, second, reduction) for m in (vision, ops))
        torch.testing.assert_close(ours, theirs)
masks = (rand(5, 8, 9) > 0.7).long()
assert torch.equal(vision.masks_to_boxes(masks), ops.masks_to_boxes(masks))
assert torch.equal(vision.remove_small_boxes(first, 0.5), ops.remove_small_boxes(first, 0.5))
torch.testing.assert_close(vision.clip_boxes_to_image(first, (1, 1)), ops.clip_boxes_to_image(first, (1, 1)))
logits, targets = rand(9, 4) * 4 - 2, (rand(9, 4) > 0.5).double()
for reduction in ("none", "mean", "sum"):
    ours, theirs = (m.sigmoid_focal_loss(logits, targets, 0.3, 1.5, reduction) for m in (vision, ops))
    torch.testing.assert_close(ours, theirs)
for name, shape in (("drop_block2d", (2, 3, 9, 8)), ("drop_block3d", (2, 3, 5, 9, 8)), ("stochastic_depth", (9, 3))):
    x = rand(*shape)
    how = (0.3, 3) if "block" in name else (0.3, "row")
    results = []
    for m in (vision, ops):
        torch.manual_seed(3)
        results.append(getattr(m, name)(x, *how))
    torch.testing.assert_close(*results)
for build in (
    lambda m: m.MLP(4, [8, 3], torch.nn.LayerNorm), lambda m: m.SqueezeExcitation(4, 2),
    lambda m: m.Conv2dNormActivation(4, 6), lambda m: m.Conv3dNormActivation(4, 6, dilation=2),
    lambda m: m.FrozenBatchNorm2d(4), lambda m: m.Permute([1, 0]), lambda m: m.FeaturePyramidNetwork([4, 4], 6),
    lambda m: m.DeformConv2d(4, 6, 3, groups=2), lambda m: m.DropBlock3d(0.1, 3),
    lambda m: m.StochasticDepth(0.1, "row"),
    lambda m: m.RoIAlign(7, 0.5, 2), lambda m: m.RoIPool(7, 0.5), lambda m: m.PSRoIAlign(7, 0.5, 2),
    lambda m: m.PSRoIPool(7, 0.5), lambda m: m.MultiScaleRoIAlign(["a"], 7, 2),
):
    torch.manual_seed(4)
    ours = build(vision)
    torch.manual_seed(4)
    theirs = build(ops)
    state, expected = ours.state_dict(), theirs.state_dict()
    assert list(state) == list(expected), build
    for a, b in zip(state.values(), expected.values()):
        torch.testing.assert_close(a, b)
    if "Norm2d" not in type(ours).__name__ or "Frozen" in type(ours).__name__:
        assert repr(ours) == repr(theirs), (repr(ours), repr(theirs))
print("the same")
"""


def test_torchvision():
    """All in one process: it takes longer to start than to run."""
    lines = "".join(f"exec({program!r}, {{}})\n" for program in (PROGRAM, SIGNATURES, VALUES))
    run = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    works, names, same = run.stdout.splitlines()
    assert works.startswith("works") and names.endswith("names") and same == "the same"
