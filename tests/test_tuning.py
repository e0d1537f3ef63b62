"""Optional tuning: what is timed, what is kept in the file, and what it never overrides."""

import json
import math

import pytest
import torch

import pyops
from pyops import functional as F
from pyops.core import convolution, explain, tuning

X, W = torch.randn(2, 32, 20, 21), torch.randn(24, 32, 3, 3)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "deeper" / "tuning.json"
    with pyops.tuning(path):
        yield path


def entries(path):
    content = json.loads(path.read_text())
    assert content["version"] == tuning.VERSION
    (table,) = content["machines"].values()
    return table


def forget():
    """As a new process begins: nothing but the file is known."""
    tuning._tables.clear()


def by(algorithm):
    with F.conv_algorithm(algorithm):
        return F.conv2d(X, W, padding=1)


def count(monkeypatch):
    calls, measure = [], tuning._measure
    monkeypatch.setattr(tuning, "_measure", lambda candidates: calls.append(list(candidates)) or measure(candidates))
    return calls


def test_it_is_off_unless_asked_for(monkeypatch):
    calls = count(monkeypatch)
    assert not tuning.active()
    F.conv2d(X, W, padding=1)
    assert calls == []


def test_sizes_are_timed_once_and_kept(file, monkeypatch):
    calls = count(monkeypatch)
    for _ in range(2):
        F.conv2d(X, W, padding=1)
    assert calls == [["gemm", "columns", "winograd2", "winograd4"]]
    (entry,) = entries(file).values()
    assert entry["choice"] == min(entry["seconds"], key=entry["seconds"].get)
    assert all(0 < s < 10 for s in entry["seconds"].values())
    forget()
    F.conv2d(X, W, padding=1)
    assert len(calls) == 1
    F.conv2d(X, W, padding=0)
    F.conv2d(X.to(memory_format=torch.channels_last), W, padding=1)
    F.conv2d(X.double(), W.double(), padding=1)
    F.conv2d(X, W, padding=1, stride=2)
    assert calls[1:] == [calls[0], ["gemm", "winograd2", "winograd4"], ["gemm", "columns"], ["gemm", "columns"]]
    assert len(entries(file)) == 5


@pytest.mark.parametrize("choice", ["gemm", "winograd2", "winograd4"])
def test_what_the_file_says_is_what_runs(file, choice):
    """Forward, its fused form, and the gradient in the input, each under its own key."""
    x = X.clone().requires_grad_()
    F.conv2d(x, W, padding=1).sum().backward()
    content = json.loads(file.read_text())
    (table,) = content["machines"].values()
    assert sorted(key.split()[0] for key in table) == ["conv_dgrad", "conv_fwd"]
    for key, entry in table.items():
        entry["choice"] = choice if key.startswith("conv_fwd") else "winograd2"
    file.write_text(json.dumps(content))
    forget()
    assert torch.equal(F.conv2d(X, W, padding=1), by(choice))
    assert torch.equal(F.conv2d_act(X, W, padding=1), torch.relu(by(choice)))
    dy = torch.randn(2, 24, 20, 21)
    grad = torch.autograd.grad(F.conv2d(x, W, padding=1), x, dy)[0]
    with F.conv_algorithm("winograd2"):
        assert torch.equal(grad, torch.autograd.grad(F.conv2d(x, W, padding=1), x, dy)[0])


def test_nothing_stricter_is_overridden(file, monkeypatch):
    calls = count(monkeypatch)
    plain = by("gemm")
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(F.conv2d(X, W, padding=1), plain)
    finally:
        torch.use_deterministic_algorithms(False)
    before = torch.backends.mkldnn.conv.fp32_precision
    torch.backends.mkldnn.conv.fp32_precision = "ieee"
    try:
        assert torch.equal(F.conv2d(X, W, padding=1), plain)
    finally:
        torch.backends.mkldnn.conv.fp32_precision = before
    with pyops.tuning(False):
        F.conv2d(X, W, padding=1)
    assert calls == [] and not file.exists()


def test_transforms_and_compiled_graphs_are_not_timed(file, monkeypatch):
    calls = count(monkeypatch)
    f = lambda x: F.conv2d(x, W, padding=1)
    want = f"{torch.nn.functional.conv2d(X, W, padding=1).sum():.1f}"
    torch.func.jvp(f, (X,), (X,))
    assert f"{torch.compile(f, fullgraph=True, backend='eager')(X).sum():.1f}" == want
    with torch._subclasses.FakeTensorMode() as mode:
        F.conv2d(mode.from_tensor(X), mode.from_tensor(W), padding=1)
    assert calls == []


@pytest.mark.parametrize(
    "text",
    ['{"version": 1, "mach', "", "[]", '{"version": 0, "machines": {}}', '{"version": 1, "machines": [3]}', "\0"],
)
def test_a_damaged_file_counts_as_empty(file, text):
    file.parent.mkdir()
    file.write_text(text)
    damaged = text in ("", "\0") or text.endswith("mach")
    with pytest.warns(UserWarning, match=r"tuning\.json") if damaged else pytest.MonkeyPatch.context():
        F.conv2d(X, W, padding=1)
    assert len(entries(file)) == 1


def test_entries_that_make_no_sense_are_measured_again(file, monkeypatch):
    F.conv2d(X, W, padding=1)
    content = json.loads(file.read_text())
    (table,) = content["machines"].values()
    (key,) = table
    calls = count(monkeypatch)
    for wrong in (3, {"choice": 4}, {"choice": "fft"}):
        table[key] = wrong
        file.write_text(json.dumps(content))
        forget()
        F.conv2d(X, W, padding=1)
        assert entries(file)[key]["choice"] in convolution.ALGORITHMS
    assert len(calls) == 3


def test_entries_of_other_processes_and_machines_are_kept(file):
    F.conv2d(X, W, padding=1)
    content = json.loads(file.read_text())
    (machine,) = content["machines"]
    content["machines"][machine]["theirs"] = {"choice": "gemm"}
    content["machines"]["another"] = {"key": {"choice": "gemm"}}
    file.write_text(json.dumps(content))
    F.conv2d(X, W, padding=0)
    content = json.loads(file.read_text())
    assert len(content["machines"][machine]) == 3 and "another" in content["machines"]
    assert [p.name for p in file.parent.iterdir()] == [file.name]  # nothing half written is left


def test_a_file_that_cannot_be_written_is_no_reason_to_fail(tmp_path):
    (tmp_path / "taken").write_text("a file where a folder should be")
    with pyops.tuning(tmp_path / "taken" / "tuning.json"), pytest.warns(UserWarning, match="cannot be"):
        y = F.conv2d(X, W, padding=1)
    assert (y - torch.nn.functional.conv2d(X, W, padding=1)).abs().max() < 2e-5 * math.sqrt(9 * 32) * 10


def test_explain_says_tuned_or_model(file):
    note = lambda: str(explain.explain("conv2d", [tuple(X.shape), tuple(W.shape)], geometry={"padding": 1}))
    assert "(model)" in note()
    F.conv2d(X, W, padding=1)
    (entry,) = entries(file).values()
    assert "(tuned)" in note()
    assert f"forward: algorithm {entry['choice']} (tuned)" in note()
    with pyops.tuning(False):
        assert "(model)" in note()


def test_settings():
    assert tuning._from_environment("") is None and tuning._from_environment("0") is None
    assert tuning._from_environment("1") == tuning.default_path()
    assert str(tuning._from_environment("here.json")) == "here.json"
    for wrong in (None, 1, ""):
        with pytest.raises(ValueError, match="tuning"):
            pyops.tuning(wrong)
