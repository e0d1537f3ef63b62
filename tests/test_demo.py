"""The parts of the demo that need neither its packages nor its minutes."""

import importlib.util
import json
import subprocess
import sys
from collections import Counter

import pytest
import torch

import pyops
from pyops import demo, use
from pyops.core.intercept import Entry, Report
from pyops.demo import classification, times


def test_missing_packages_end_in_one_line(monkeypatch, capsys, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "skimage" else find(name))
    assert demo.run(tmp_path / "out") == 3
    output = capsys.readouterr()
    assert not output.out and not (tmp_path / "out").exists()
    assert output.err.count("\n") == 1 and "scikit-image" in output.err and "requirements/demo" in output.err


def test_table_shows_what_ran_where():
    report = Report()
    report.entries = {
        "conv2d": Entry("conv2d", 5, kept=Counter({"no pyops room yet": 5})),
        "batch_norm": Entry("batch_norm", 4, Counter(cpu=3), Counter({"dtype int64": 1})),
    }
    spent = {op: Entry(op, seconds_torch=0.25, seconds_pyops=0.125) for op in report.entries}
    head, first, second = times.op_rows(report, spent, spent)
    assert head[:3] == ["op", "calls", "backend that ran"]
    assert first == ["batch_norm", "4", "cpu, torch", "250.00 ms", "125.00 ms", "dtype int64"]
    assert second == ["conv2d", "5", "torch", "250.00 ms", "", "no pyops room yet"]


def test_what_is_left_to_torch_is_counted_by_kind():
    x = torch.randn(3, 3)
    with times.Kernels() as kernels:
        torch.relu(x.t() @ x)[x > 0].clone().sum()  # to torch a clone is pointwise
        pyops.functional.relu(x).view(9)
        torch.empty_like(x).to(torch.int32)
    assert {kind: set(ops) for kind, ops in kernels.calls.items()} == {
        "views": {"t", "view"}, "new tensors": {"empty_like"}, "elementwise": {"relu", "gt", "_to_copy"},
        "matrix products": {"mm"},
        "copies, picks, sorts, joins": {"index", "clone"}, "others": {"sum"},
    }  # fmt: skip
    assert times.left_rows(kernels.calls)[2] == ["elementwise", "3", "relu, gt, _to_copy"]


@pytest.mark.skipif(importlib.util.find_spec("efficientnet_lite_pytorch") is None, reason="needs the network")
def test_the_network_leaves_torch_views_sums_and_a_product():
    model, x = classification.load_model(), torch.randn(1, 3, 224, 224)
    with torch.no_grad(), use() as report, times.Kernels() as kernels:
        model(x)
    assert not any(entry.kept for entry in report.entries.values())
    left = {kind: set(ops) for kind, ops in kernels.calls.items() if kind != "views"}
    assert left == {
        "new tensors": set(), "elementwise": {"add"}, "matrix products": {"addmm_"},
        "copies, picks, sorts, joins": set(), "others": set(),
    }  # fmt: skip


@pytest.mark.skipif(importlib.util.find_spec("PIL") is None, reason="needs pillow")
def test_preprocessing_is_that_of_the_lite_networks():
    from PIL import Image

    x = classification.preprocess(Image.new("RGB", (300, 400), (255, 127, 0)))
    assert x.shape == (3, 224, 224)
    torch.testing.assert_close(x[:, 100, 100], torch.tensor([1.0, 0.0, -127 / 128]))


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="needs torchvision")
def test_class_names():
    names = classification.class_names()
    assert len(names) == 1000 and "espresso" in names


FACES = """
import json, pathlib, sys, torch
torch.set_num_threads(1)
from pyops.demo import faces

right, numbers = faces.run(pathlib.Path(sys.argv[1]), torch.device("cpu"), repeats=1)
print(json.dumps([right, numbers]))
"""


@pytest.mark.skipif(importlib.util.find_spec("facenet_pytorch") is None, reason="needs facenet-pytorch")
def test_the_astronaut_has_one_face(tmp_path):
    # in a process of its own, as torchvision's ops once declared stay
    run = subprocess.run([sys.executable, "-c", FACES, str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    right, numbers = json.loads(run.stdout.splitlines()[-1])
    assert right and numbers["ops"]["conv2d"]["backends"]
    assert not any(op["kept_by_torch"] for op in numbers["ops"].values())
    kept = numbers["left_to_torch"]
    assert kept["others"] == {} and set(kept["matrix products"]) <= {"addmm_"}
    assert kept["copies, picks, sorts, joins"] == {}
    assert set(kept["new tensors"]) <= {"empty_like", "new_empty", "arange"}
    assert set(kept["elementwise"]) <= {
        *("add", "sub", "mul", "mul_", "div", "remainder", "floor", "maximum", "_to_copy"),
    }
    assert numbers["largest_difference"] < 1e-3 and len(numbers["boxes"]) == 4
    for (box,) in numbers["boxes"].values():
        left, top, right_side, bottom = box
        assert 170 < left < 195 and 50 < top < 80 and 255 < right_side < 280 and 160 < bottom < 190
    assert (tmp_path / "faces.png").stat().st_size > 10_000


CASCADES = """
import json, numpy, torch
torch.set_num_threads(1)
from pyops import use
from pyops.compat import torchvision
from pyops.demo import cascade, faces
from pyops.demo.packages import load_photo

torchvision.install()
detector = faces.load_detector(torch.device("cpu"))
own = cascade.Cascade(detector)
face = numpy.asarray(load_photo(*faces.PHOTO))[20:220, 130:320]
small = face[::2, ::2]
two = numpy.concatenate((face, face[:, ::-1]), 1)
four = numpy.concatenate((two, numpy.concatenate((small, numpy.zeros_like(small), small[:, ::-1], small), 1)))
grey = numpy.full((60, 50, 3), 127, numpy.uint8)
thin = face[:15, :40]  # too low for any level
results = []
for photo in (two, four, grey, thin):
    photo = numpy.ascontiguousarray(photo)
    planes = torch.from_numpy(photo.transpose(2, 0, 1).copy())
    for confident in (True, False):
        detector.thresholds = [0.6, 0.7, 0.7] if confident else [0.3, 0.2, 0.1]
        by_torch = faces.by_size(*own.detect(planes))
        with use():
            by_pyops = faces.by_size(*own.detect(planes))
        try:
            theirs = detector.detect(photo, landmarks=True)
        except (IndexError, RuntimeError, ValueError):  # facenet joins no levels, or no candidates
            theirs = None, [None], None
        count = 0 if theirs[0] is None else len(theirs[0])
        differences = [faces.largest_difference(theirs, ours) for ours in (by_torch, by_pyops)] if count else [
            0.0 if ours[0] is None else 1.0 for ours in (by_torch, by_pyops)]
        results.append([count, *differences])
print(json.dumps(results))
"""


@pytest.mark.skipif(importlib.util.find_spec("facenet_pytorch") is None, reason="needs facenet-pytorch")
def test_the_own_cascade_finds_what_facenet_finds():
    run = subprocess.run([sys.executable, "-c", CASCADES], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    results = json.loads(run.stdout.splitlines()[-1])
    assert [count for count, *_ in results[:3:2]] == [2, 5], results
    assert all(difference < 1e-3 for _, *differences in results for difference in differences), results
