"""What the tests of every room share."""

import csv
import ctypes
import gzip
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from pyops import testing
from pyops.core import backend as backends
from pyops.core import library
from pyops.demo.packages import load_photo

# Property tests: the same examples in every run, and few enough of them for the time that the suite has.
properties = settings(
    max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
floating = st.sampled_from(testing.DTYPES)
layouts = st.sampled_from(["contiguous", "channels last", "every second", "transposed", "offset"])


@contextmanager
def example(name: str) -> Iterator[ModuleType]:
    """A program of examples/ as a module, known to Python as long as the block lasts."""
    path = Path(__file__).resolve().parent.parent / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{name}_example", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[spec.name]


def laid_out(t: testing.Maker, shape: tuple[int, ...], layout: str, shift: float = 0.0) -> torch.Tensor:
    """A differentiable input of a shape whose elements lie in memory as the layout says."""
    if layout == "channels last":
        return t.input(shape, shift, channels_last=True)
    if layout == "every second":
        return t.input((*shape, 2), shift)[..., 1]
    if layout == "transposed":
        return t.input(shape[::-1], shift).permute(*reversed(range(len(shape))))
    if layout == "offset":
        return t.input((shape[0] + 1, *shape[1:]), shift)[1:]
    return t.input(shape, shift)


def accurate(function, reference, make, dtype: torch.dtype, backend: str = "cpu") -> None:
    """Value and gradients of one call against float64, as close as torch in the same dtype comes."""
    with backends.backend(backend):
        (result,) = testing.check_op(
            function, reference, [testing.Sample("drawn", make)], dtypes=[dtype], only=["accuracy"]
        )
    assert result.ok, result.detail


def passes(op: str, backend: str, check: str) -> None:
    """One check of pyops.testing on one op and backend."""
    (result,) = testing.check_room(op, backend, [check])
    assert result.ok, result.detail


@contextmanager
def emulated_device(backend: str, capability: int = 90, l2_bytes: int = 50 << 20) -> Iterator[None]:
    """Another device for the emulator: capability 80 lacks clusters, TMA, wgmma; a small cache makes little a lot."""
    if backend == "emulator":
        library.configure_emulator(capability=capability, l2_bytes=l2_bytes)
    try:
        yield
    finally:
        if backend == "emulator":
            library.configure_emulator(capability=90, l2_bytes=50 << 20)


def agrees(function, reference, *inputs: torch.Tensor) -> None:
    """Output and gradients within 8 roundings of the largest value, of a reference in float64."""
    inputs = tuple(t.detach().requires_grad_() for t in inputs)
    exact = tuple(t.detach().double().requires_grad_() for t in inputs)
    y, truth = function(*inputs), reference(*exact)
    direction = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    ours = (y, *torch.autograd.grad(y, inputs, direction))
    theirs = (truth, *torch.autograd.grad(truth, exact, direction.double()))
    for a, b in zip(ours, theirs):
        allowed = 8 * torch.finfo(a.dtype).eps * max(1.0, b.abs().max().item())
        torch.testing.assert_close(a.detach().double(), b.detach(), rtol=0, atol=allowed)


def refuses(kind: type[Exception], words: tuple[str, ...], function, *args, **kwargs) -> None:
    """The call raises exactly this type (or torch's subclass of it), naming op, argument, got and expected."""
    with pytest.raises(kind) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    for word in (*words, "got", "expected"):
        assert word in message, f"{word!r} is missing in {message!r}"


def same_refusal(ours, theirs, *args, **kwargs) -> None:
    """torch raises on this call, and pyops raises the same type or a subclass of it."""
    with pytest.raises(Exception) as expected:
        theirs(*args, **kwargs)
    with pytest.raises(expected.type):
        ours(*args, **kwargs)


def modules_agree(ours: torch.nn.Module, theirs: torch.nn.Module, x: torch.Tensor, backend: str) -> None:
    """Same repr, interchangeable state_dict, equal outputs in training and eval, equal buffers afterwards."""
    assert repr(ours) == repr(theirs)
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn_like(p))
    ours.load_state_dict(theirs.state_dict())
    with backends.backend(backend):
        for _ in range(2):
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
        ours.eval(), theirs.eval()
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    for (name, a), (_, b) in zip(ours.state_dict().items(), theirs.state_dict().items()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


def peak_bytes(function) -> int:
    """How far the process grows while ``function`` runs: all of its memory, also what kernels take for themselves.

    The least of three calls: what is loaded once, and pages that the system had taken back, count as growth as well.
    """
    reset = Path("/proc/self/clear_refs")
    if not os.access(reset, os.W_OK):
        pytest.skip("the kernel does not let a process reset its peak")

    def kilobytes(field: str) -> int:
        (line,) = [s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(field)]
        return int(line.split()[1])

    # glibc keeps what is freed, in an arena for each thread: blocks of a megabyte go back to the system here
    libc, threshold = ctypes.CDLL(None), -3  # M_MMAP_THRESHOLD
    if hasattr(libc, "mallopt"):
        libc.mallopt(threshold, 1 << 20)
        libc.malloc_trim(0)
    growth = []
    try:
        for _ in range(3):
            library.release_workspace()
            reset.write_text("5")
            before = kilobytes("VmRSS:")
            function()
            growth.append(kilobytes("VmHWM:") - before)
    finally:
        if hasattr(libc, "mallopt"):
            libc.mallopt(threshold, 32 << 20)
    return min(growth) * 1024


@lru_cache
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """The 1797 handwritten digits of scikit-learn: pixels [1797, 64] in [0, 1], float64, and labels [1797].

    Read from its file, because the package itself needs SciPy.
    """
    found = importlib.util.find_spec("sklearn")
    if found is None or not found.submodule_search_locations:
        pytest.skip("scikit-learn's digits are not installed (requirements/demo-no-deps.txt)")
    path = Path(found.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    with gzip.open(path, "rt") as file:
        table = torch.tensor([[float(v) for v in row] for row in csv.reader(file)], dtype=torch.float64)
    return table[:, :64] / 16.0, table[:, 64].long()


@lru_cache
def skimage(name: str):
    """One module of scikit-image, such as ``feature._hog``, without the packages around it, which need SciPy."""
    found = importlib.util.find_spec("skimage")
    if found is None or not found.submodule_search_locations:
        pytest.skip("scikit-image is not installed (requirements/demo-no-deps.txt)")
    root = Path(found.submodule_search_locations[0])
    names = ["skimage", *(f"skimage.{part}" for part in ("_shared", "util", *name.split(".")[:-1]))]
    packages = {package: ModuleType(package) for package in names}
    for package, module in packages.items():
        module.__path__ = [str(root.joinpath(*package.split(".")[1:]))]
    before = {key: value for key, value in sys.modules.items() if key.split(".")[0] == "skimage"}
    for key in before:
        del sys.modules[key]
    sys.modules.update(packages)
    try:
        return importlib.import_module(f"skimage.{name}")
    finally:
        for key in [key for key in sys.modules if key.split(".")[0] == "skimage"]:
            del sys.modules[key]
        sys.modules.update(before)


@lru_cache
def photo(file: str) -> torch.Tensor:
    """One photo of scikit-image, [H, W, 3] of bytes."""
    if importlib.util.find_spec("skimage") is None or importlib.util.find_spec("PIL") is None:
        pytest.skip("scikit-image and pillow are not installed (requirements/demo.txt)")
    import numpy as np

    return torch.from_numpy(np.array(load_photo("skimage", f"data/{file}")))
