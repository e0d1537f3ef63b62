"""The house rules that no compiler checks: signatures equal schemas, every room is complete, arrows point down."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

import pyops.functional
import pyops.optim
import pyops.vision  # noqa: F401  declares every op
from pyops.core import library

ROOT = Path(__file__).resolve().parent.parent
ROOMS = sorted(p.stem for p in (ROOT / "pyops" / "ops").glob("*.py") if p.stem != "__init__")


def types_of(schema: torch.FunctionSchema) -> str:
    """The schema's types in the form in which PYOPS_IMPL records a C++ signature."""
    name = {
        "Optional[Tensor]": "Tensor?",
        "Optional[float]": "float?",
        "List[int]": "int[]",
        "List[Tensor]": "Tensor[]",
    }
    plain = lambda t: name.get(str(t), str(t))
    returns = [plain(r.type) for r in schema.returns]
    result = returns[0] if len(returns) == 1 else f"({', '.join(returns)})"
    return f"({', '.join(plain(a.type) for a in schema.arguments)}) -> {result}"


@pytest.mark.parametrize("binary", ["pyops", "emulator"])
def test_cpp_signatures_equal_the_schemas(binary):
    if binary == "emulator" and (reason := library.load_emulator()) is not None:
        pytest.fail(f"emulator: {reason}")
    signatures = library.signatures(binary)
    ops = {name: op for name, op in library.declared().items() if binary == "pyops" or not op.cpu_only}
    assert set(signatures) == set(ops)
    for name, op in ops.items():
        schema = op.overloads["pyops"]._schema
        assert signatures[name] == types_of(schema), name


def test_namespaces_have_the_same_schemas():
    for op in library.declared().values():
        texts = {str(o._schema).split("::", 1)[1] for o in op.overloads.values()}
        assert len(texts) == 1, texts


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_is_present_in_every_layer(room):
    """A room that declares ops has their kernels and a bench; one put together from torch's ops has its tests."""
    text = (ROOT / "pyops" / "ops" / f"{room}.py").read_text()
    paths = ["tests/test_{}.py"]
    if "library.declare(" in text:
        paths += ["csrc/cpu/{}.cpp", "csrc/cuda/{}.cu", "bench/bench_{}.py"]
    if "library.triton_kernels(" in text:
        paths += ["kernels/{}.py"]
    for path in paths:
        assert (ROOT / path.format(room)).exists(), path.format(room)


def test_kernels_contain_no_ptx_and_no_launch_syntax():
    for path in (ROOT / "csrc" / "cuda").glob("*.cu"):
        text = path.read_text()
        assert not re.search(r"\basm\b|<<<|__CUDA_ARCH__|\b__shared__\b", text), path


def test_torch_headers_are_included_in_common_only():
    allowed = {ROOT / "csrc" / "cpu" / "parallel.h"}
    for path in (ROOT / "csrc").rglob("*.*"):
        if path.parent.name != "common" and path not in allowed and "host" not in path.parts:
            assert "#include <torch/" not in path.read_text(), path


def test_kernels_never_import_pyops():
    for path in (ROOT / "kernels").glob("*.py"):
        assert not re.search(r"^\s*(import|from) pyops", path.read_text(), re.M), path


def test_the_package_never_asserts():
    for folder in ("pyops", "kernels", "bench"):
        for path in (ROOT / folder).rglob("*.py"):
            found = re.search(r"^\s*assert ", path.read_text(), re.M)
            assert found is None or path.name.startswith("test_"), path


def test_no_built_library_links_python_or_openmp():
    for path in (ROOT / "pyops").glob("libpyops*.so"):
        needed = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
        for word in ("libpython", "libgomp", "libomp", "libtsan"):
            assert word not in needed, path
