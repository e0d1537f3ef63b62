"""Packaging: metadata without torch, one line per build problem, complete archives, a wheel that works elsewhere."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import setuptools
import torch

ROOT = Path(__file__).resolve().parent.parent


def run(*command, cwd=ROOT, **environment) -> str:
    """Standard output of a command that must succeed."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYOPS_") and k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, capture_output=True, text=True, env={**clean, **environment}
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture
def script(monkeypatch):
    """setup.py as a module; its call of setup() does nothing."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("pyops_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("CXX", "MAX_JOBS", "PYOPS_BUILD_CUDA", "PYOPS_CPU_CAPABILITIES", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    return module


@pytest.fixture
def empty_path(monkeypatch, tmp_path):
    """No program can be found."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))


def refusal(function, *args) -> str:
    """The one line a build problem ends in."""
    with pytest.raises(SystemExit) as stop:
        function(*args)
    message = str(stop.value.code)
    assert message.startswith("pyops build: ") and "\n" not in message
    return message


def test_version_needs_neither_torch_nor_cuda(tmp_path):
    for name in ("torch", "pybind11"):
        (tmp_path / f"{name}.py").write_text(f"raise RuntimeError('{name} was imported')\n")
    paths = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    out = run(sys.executable, "setup.py", "-q", "--version", PYTHONPATH=paths, PATH=str(tmp_path))
    assert re.fullmatch(r"\d+\.\d+\.\d+", out.split()[-1])


def test_missing_tools_are_named(script, empty_path, monkeypatch):
    assert "no C++ compiler" in refusal(script.check_compiler)
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    assert "no-such-compiler" in refusal(script.check_compiler)
    for name in ("cmake", "ninja"):
        assert f"pip install {name}" in refusal(script.tool, name)
    monkeypatch.setitem(sys.modules, "pybind11", None)
    assert "pip install pybind11" in refusal(script.pybind11_cmake_dir)


def test_missing_or_old_torch_is_named(script, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "torch is not installed" in refusal(script.torch_package)
    spec = importlib.util.spec_from_file_location("torch", tmp_path / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert "torch >= 2.10" in refusal(script.torch_package)


def test_cuda_problems_are_named(script, empty_path, monkeypatch, tmp_path):
    monkeypatch.setenv("PYOPS_BUILD_CUDA", "1")
    assert "nvcc is not on PATH" in refusal(script.build_cuda, tmp_path)
    monkeypatch.setenv("PYOPS_BUILD_CUDA", "yes")
    assert "'yes'" in refusal(script.build_cuda, tmp_path)
    monkeypatch.setattr(script, "TOOLKIT", tmp_path / "no-toolkit")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert "requirements/emulator.txt" in refusal(script.cuda_headers)


def test_a_wheel_has_all_instruction_sets_an_editable_install_those_of_the_machine(script, monkeypatch):
    assert (script.cpu_capabilities(False), script.cpu_capabilities(True)) == ("all", "native")
    monkeypatch.setenv("PYOPS_CPU_CAPABILITIES", "all")
    assert script.cpu_capabilities(True) == "all"
    monkeypatch.setenv("PYOPS_CPU_CAPABILITIES", "avx2")
    assert "'avx2'" in refusal(script.cpu_capabilities, True)


def test_headers_of_the_package_index_serve_where_no_toolkit_is(script, empty_path, monkeypatch, tmp_path):
    include = tmp_path / "nvidia" / "cu13" / "include"
    (include / "cccl" / "nv").mkdir(parents=True)
    (include / "cuda_fp16.h").touch()
    (include / "cccl" / "nv" / "target").touch()
    monkeypatch.setattr(script, "TOOLKIT", tmp_path / "no-toolkit")
    monkeypatch.setattr(sys, "path", ["", str(tmp_path)])
    assert script.cuda_headers() == f"{include};{include / 'cccl'}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8.0;9.0a+PTX", "80-real;90a-real;90-virtual"),
        ("8.0 12.0", "80-real;120-real"),
        ("9.0", "90-real"),
    ],
)
def test_architectures(script, monkeypatch, text, expected):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", text)
    assert script.cuda_architectures() == expected


@pytest.mark.parametrize("text", ["Hopper", "9", "7.5", "8.0;;x"])
def test_wrong_architectures_are_named(script, monkeypatch, text):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", text)
    assert "TORCH_CUDA_ARCH_LIST" in refusal(script.cuda_architectures)


def test_jobs(script, monkeypatch):
    assert int(script.jobs()) >= 1
    monkeypatch.setenv("MAX_JOBS", "3")
    assert script.jobs() == "3"
    for text in ("0", "many", "-1"):
        monkeypatch.setenv("MAX_JOBS", text)
        assert text in refusal(script.jobs)


def test_source_archive_is_complete(tmp_path):
    tracked = shutil.which("git") and subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split("\n")
    if not tracked or "setup.py" not in tracked:
        pytest.skip("not a git checkout")
    code = "import setuptools.build_meta as b, sys; b.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", code, tmp_path)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    needed = {name for name in tracked if name and (ROOT / name).exists() and not name.startswith((".", "examples/"))}
    assert sorted(needed - names) == []
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory):
    """An environment with a wheel of this tree, beside the torch of ours; returns (its python, the wheel)."""
    folder = tmp_path_factory.mktemp("elsewhere")
    pip = [sys.executable, "-m", "pip"]
    flags = ["--no-build-isolation", "--no-deps", "-q"]
    run(*pip, "wheel", *flags, "-w", folder, ROOT, PYOPS_BUILD_CUDA="0")
    (wheel,) = folder.glob("torch_pyops-*.whl")
    venv = folder / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv)
    python = venv / "bin" / "python"
    run(*pip, "--python", python, "install", "-q", "--no-deps", wheel)
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "torch_of_the_tests.pth").write_text(f"{Path(torch.__file__).parent.parent}\n")
    return python, wheel


@pytest.mark.slow
def test_wheel_works_from_another_directory(elsewhere, tmp_path):
    python, wheel = elsewhere
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if "emulator" in name or name.startswith("kernels/")]
    assert any(name.startswith("pyops/bench/results/") for name in names)
    code = """
import torch, pyops
from pyops import functional as F
x = torch.randn(4, 8, requires_grad=True)
torch.testing.assert_close(F.layer_norm(x, (8,)), torch.nn.functional.layer_norm(x, (8,)))
print(pyops.__file__)
"""
    assert str(python.parent.parent) in run(python, "-c", code, cwd=tmp_path)
    assert '"usable": true' in run(python, "-m", "pyops", "info", "--json", cwd=tmp_path)
    assert "✓" in run(python, "-m", "pyops", "check", "rms_norm", "--backend", "cpu", cwd=tmp_path)
    run(python, "-m", "pyops", "bench", "rms_norm", "--quick", "--out", "out", cwd=tmp_path)
    assert (tmp_path / "out" / "bench.html").exists()
