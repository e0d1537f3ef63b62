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


def test_torchvision_runs_on_pyops():
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert run.returncode == 0 and "works" in run.stdout, run.stderr[-3000:]
