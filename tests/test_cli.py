"""``python -m pyops``: what it prints, what JSON it gives, and how it refuses bad arguments."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pyops
from pyops.__main__ import Exit, check_table, main, public_ops, shape
from pyops.core import backend, library
from pyops.core.explain import explain

ROOT = Path(__file__).resolve().parent.parent


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYOPS_") and k != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**clean, **environment}, timeout=120)


def test_info_json_is_one_object_with_the_truth_about_every_backend(capsys, monkeypatch):
    for name in [k for k in os.environ if k.startswith("PYOPS_") or k == "TRITON_INTERPRET"]:
        monkeypatch.delenv(name)
    assert main(["info", "--json"]) == Exit.OK
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["pyops"] == pyops.__version__
    assert list(found["backends"]) == ["cpu", "cuda", "triton", "emulator"]
    for state in found["backends"].values():
        assert state["usable"] == (state["why_not"] is None)
        assert state["built"] or not state["usable"]
    assert found["forced_backend"] is None and found["environment"] == {}


def test_import_leaves_the_compiler_of_torch_alone():
    """It takes as long to import as torch itself."""
    code = "import sys, pyops; print('torch' in sys.modules, 'torch._dynamo' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "True False\n"


def test_info_reports_a_forced_backend_and_capability():
    narrowest = library.cpu_capabilities()[0]
    done = python("-m", "pyops", "info", "--json", PYOPS_BACKEND="cpu", PYOPS_CPU_CAPABILITY=narrowest)
    found = json.loads(done.stdout)
    assert found["forced_backend"] == "cpu"
    assert found["cpu"]["capability"] == narrowest
    assert found["environment"] == {"PYOPS_BACKEND": "cpu", "PYOPS_CPU_CAPABILITY": narrowest}


CALLS = """
import runpy, sys, torch, pyops

def call():
    try:
        pyops.functional.layer_norm(torch.ones(2, 3), (3,))
    except (RuntimeError, NotImplementedError) as error:
        print(error)

call()
with pyops.backend("emulator"):
    pass
call()
sys.argv = ["pyops", "info"]
runpy.run_module("pyops", run_name="__main__")
"""


@pytest.mark.parametrize(
    "variable, value, words",
    [
        ("PYOPS_BACKEND", "gpu", ("got 'gpu'", "expected one of cpu, cuda, triton, emulator")),
        ("PYOPS_CPU_CAPABILITY", "sse", ("got 'sse'", "expected", repr(library.cpu_capabilities()[0]))),
    ],
)
def test_an_environment_that_cannot_be_obeyed(variable, value, words):
    """Every call raises, and the command line ends in one line."""
    done = python("-c", CALLS, **{variable: value})
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all(f"{variable}: " in line and repr(value) in line for line in lines), done.stderr
    assert done.returncode == Exit.USAGE
    (line,) = done.stderr.splitlines()
    for word in ("pyops info", variable, *words):
        assert word in line


def test_info_for_a_reader(capsys):
    assert main(["info"]) == Exit.OK
    text = capsys.readouterr().out
    for word in ("versions", "cpu", "cuda", "triton", "emulator", "forced", "threads", "GPU"):
        assert word in text


def test_info_says_so_when_the_host_module_is_absent(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyops._host", None)
    assert main(["info"]) == Exit.OK
    assert "ops work without it" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert not stop.value.code and capsys.readouterr().out.strip() == f"pyops {pyops.__version__}"


def test_explain_json(capsys):
    assert main(["explain", "instance_norm", "2x3x4", "--dtype", "bfloat16", "--device", "cpu", "--json"]) == Exit.OK
    found = json.loads(capsys.readouterr().out)
    assert found["shapes"] == [[2, 3, 4]] and found["dtype"] == "bfloat16"
    assert found["backend"] == "cpu" and found["namespace"] == "pyops"
    assert found["source"] == "csrc/cpu/group_norm.cpp"


SHAPES = (  # for one of these every op has an explanation
    [(1, 4, 8, 8), (4, 4, 3, 3)],
    [(1, 4, 8), (4, 4, 3)],
    [(1, 4, 8, 8, 8), (4, 4, 3, 3, 3)],
    [(8, 8)],
    [(5, 3, 8), (1, 3, 8)],
    [(1, 2, 8, 16), (1, 2, 8, 16), (1, 2, 8, 16)],
)


@pytest.mark.parametrize("name", backend.NAMES)
def test_explain_names_sources_that_exist(name):
    for op, stem in public_ops().items():
        found = []
        for shapes in SHAPES:
            with contextlib.suppress(ValueError):
                found.append(explain(op, shapes, wanted=name, stem=stem))
        assert found, op
        for answer in found:
            if answer.source is None:
                assert (
                    name == "triton" and answer.why_not == f"{op} has no Triton kernel" and "source" not in str(answer)
                )
            else:
                assert (ROOT / answer.source).is_file(), (op, answer.source)
    composite = explain("pca", [(8, 4)], wanted=name, stem="pca")
    assert composite.source == "pyops/ops/pca.py" and composite.cpu_capability is None and composite.notes
    assert explain("knn", [(8, 4), (9, 4)], wanted=name, stem="distance").source != "pyops/ops/distance.py"


def test_explain_shows_the_backend_that_is_forced(capsys):
    with pyops.backend("cpu"):
        assert main(["explain", "layer_norm", "4,8", "--device", "cpu"]) == Exit.OK
    assert "cpu (forced)" in capsys.readouterr().out


def test_explain_of_a_backend_that_cannot_run_says_why(capsys):
    assert main(["explain", "layer_norm", "4x8", "--backend", "cpu", "--device", "cuda"]) == Exit.OK
    assert "cpu does not run on cuda tensors" in capsys.readouterr().out


def test_explain_takes_the_geometry_of_a_convolution(capsys):
    conv = ["explain", "conv2d", "8x64x56x56", "64x64x3x3", "--backend", "cpu"]
    assert main([*conv, "--padding", "same"]) == Exit.OK
    assert "forward: algorithm winograd" in capsys.readouterr().out
    assert (
        main([*conv, "--stride", "2x1", "--padding", "1x1", "--dilation", "1", "--layout", "channels_last"]) == Exit.OK
    )
    assert "forward: algorithm gemm" in capsys.readouterr().out


def test_a_room_explains_its_kernel(capsys, monkeypatch):
    from pyops.core import explain

    monkeypatch.setitem(explain._explainers, "layer_norm", lambda shapes, dtype, backend: [f"rows of {shapes[0][-1]}"])
    main(["explain", "layer_norm", "4x8", "--device", "cpu"])
    assert "rows of 8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "COMMAND"),
        (["fly"], "fly"),
        (["info", "--jsonn"], "--jsonn"),
        (["explain", "no_such_op", "3"], "no_such_op"),
        (["explain", "layer_norm"], "SHAPE"),
        (["explain", "layer_norm", "3xa"], "3xa"),
        (["explain", "layer_norm", "3", "--dtype", "float31"], "float31"),
        (["explain", "layer_norm", "3x4", "--stride", "2"], "stride"),
        (["explain", "conv2d", "1x8x9x9", "8x3x3x3"], "8 channels"),
        (["explain", "conv2d", "1x8x9x9", "8x8x3x3", "--padding", "wide"], "wide"),
        (["check", "no_such_op"], "no_such_op"),
        (["check", "--backend", "tpu"], "tpu"),
        (["check", "--race", "--backend", "cpu"], "--race"),
    ],
    ids=[
        "nothing",
        "command",
        "option",
        "op",
        "no_shape",
        "shape",
        "dtype",
        "no_stride",
        "channels",
        "padding",
        "check_op",
        "backend",
        "race",
    ],
)
def test_bad_arguments_give_one_line_and_exit_2(arguments, word, capsys):
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert code == Exit.USAGE and not captured.out
    assert len(captured.err.splitlines()) == 1 and word in captured.err


def test_shape():
    assert shape("7") == (7,) and shape("2x3") == (2, 3) and shape("2,0,3") == (2, 0, 3)


@dataclasses.dataclass
class Result:
    op: str
    backend: str
    check: str
    ok: bool
    detail: str


def test_check_table_marks_failures_and_says_what_was_left_out():
    results = [
        Result("layer_norm", "cpu", "forward", True, ""),
        Result("layer_norm", "cpu", "gradient", False, "off by 1"),
        Result("rms_norm", "triton", "forward", True, ""),
    ]
    text = "\n".join(check_table(results, {"cpu": None, "cuda": "no GPU", "triton": None}))
    assert "✗ 1/2" in text and "✓ 1/1" in text
    assert "layer_norm on cpu: gradient: off by 1" in text
    assert "left out cuda: no GPU" in text
