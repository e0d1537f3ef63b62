"""The parts of the demo that need neither its packages nor its minutes."""

import importlib.util
from collections import Counter

import pytest
import torch

from pyops import demo
from pyops.core.intercept import Entry, Report


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
    times = {op: Entry(op, seconds_torch=0.25, seconds_pyops=0.125) for op in report.entries}
    head, first, second = demo.op_rows(report, times, times)
    assert head[:3] == ["op", "calls", "backend that ran"]
    assert first == ["batch_norm", "4", "cpu, torch", "250.00 ms", "125.00 ms", "dtype int64"]
    assert second == ["conv2d", "5", "torch", "250.00 ms", "", "no pyops room yet"]


@pytest.mark.skipif(importlib.util.find_spec("PIL") is None, reason="needs pillow")
def test_preprocessing_is_that_of_the_lite_networks():
    from PIL import Image

    x = demo.preprocess(Image.new("RGB", (300, 400), (255, 127, 0)))
    assert x.shape == (3, 224, 224)
    torch.testing.assert_close(x[:, 100, 100], torch.tensor([1.0, 0.0, -127 / 128]))


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="needs torchvision")
def test_class_names():
    names = demo.class_names()
    assert len(names) == 1000 and "espresso" in names
