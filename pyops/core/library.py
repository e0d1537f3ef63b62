"""Declares ops in the three namespaces and loads what implements them.

An op is declared once, in Python, beside its fake. The declaration goes into every namespace with the same schema:

    pyops           csrc/cpu and csrc/cuda, chosen by the dispatcher from the tensor's device
    pyops_triton    kernels/
    pyops_emulator  csrc/cuda compiled for the CPU; loaded on first use, by tests
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from . import backend

PACKAGE = Path(__file__).resolve().parent.parent
NAMESPACE_OF = {"cpu": "pyops", "cuda": "pyops", "triton": "pyops_triton", "emulator": "pyops_emulator"}
NAMESPACES = ("pyops", "pyops_triton", "pyops_emulator")

_fragments = {namespace: torch.library.Library(namespace, "FRAGMENT") for namespace in NAMESPACES}
_ops: dict[str, Op] = {}
_binaries: dict[str, ctypes.CDLL] = {}
_emulator_lock = threading.Lock()


class Op:
    """One declared op: call it with a namespace, or ask for its overload in one."""

    def __init__(self, name: str, schema: str, cpu_only: bool) -> None:
        self.name = name
        self.schema = schema
        self.cpu_only = cpu_only
        self.overloads = {ns: getattr(getattr(torch.ops, ns), name).default for ns in NAMESPACES}
        # what an overload calls, for those who count its tenths of a microsecond; torch.compile knows overloads only
        self.direct = {ns: overload._op for ns, overload in self.overloads.items()}

    def __call__(self, namespace: str, *args: Any) -> Any:
        return self.overloads[namespace](*args)


def declare(schema: str, fake: Callable[..., Any], kernels: ModuleType | None, *, cpu_only: bool = False) -> Op:
    """Declares an op in every namespace.

    Args:
        schema: torch's schema language, ``name(Tensor x, float eps) -> Tensor``.
        fake: computes empty outputs of the right shape, stride and dtype from (possibly symbolic) inputs.
        kernels: the Triton module of the same stem, which holds a launcher named as the op; None without Triton.
        cpu_only: csrc/cpu alone implements it; elsewhere the room puts the same together of other ops.
    """
    name = schema.split("(", 1)[0]
    for namespace, fragment in _fragments.items():
        fragment.define(schema, tags=(torch.Tag.needs_contiguous_strides, torch.Tag.pt2_compliant_tag))
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=fragment)
    if kernels is not None:
        launcher = getattr(kernels, name)
        _fragments["pyops_triton"].impl(name, launcher, "CPU")
        _fragments["pyops_triton"].impl(name, _on_its_device(launcher), "CUDA")
    _ops[name] = Op(name, schema, cpu_only)
    return _ops[name]


def _on_its_device(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device; this makes it the one of the tensors, as the guard in C++ does."""

    @functools.wraps(launcher)
    def call(*args: Any) -> Any:
        device = next((a.get_device() for a in args if isinstance(a, torch.Tensor)), -1)
        if device in (-1, torch.cuda.current_device()):
            return launcher(*args)
        with torch.cuda.device(device):
            return launcher(*args)

    return call


def declared() -> dict[str, Op]:
    """All declared ops by name."""
    return dict(_ops)


def fragment(namespace: str) -> torch.library.Library:
    """The library object through which registrations of one namespace live."""
    return _fragments[namespace]


def triton_kernels(stem: str) -> ModuleType | None:
    """The Triton module of a room, or None where Triton is not installed."""
    try:
        return importlib.import_module(f"pyops.kernels.{stem}")
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] == "triton":
            return None
        raise


def _sanitizer_problem() -> str | None:
    """AddressSanitizer ends the process unless its run-time library was there before everything else."""
    if "libasan" in Path("/proc/self/maps").read_text():
        return None
    return "PYOPS_EMULATOR=asan needs libasan.so and libstdc++.so in LD_PRELOAD: `make asan` shows how"


def _load(key: str, path: Path) -> str | None:
    """Loads one shared library; returns why it could not be loaded."""
    if not path.exists():
        return f"{path.name} was not built"
    try:
        torch.ops.load_library(str(path))
        _binaries[key] = ctypes.CDLL(str(path))
    except OSError as error:
        return f"{path.name} does not load: {error}"
    for function in ("signatures", "active_cpu_capability", "cpu_capabilities", "cuda_architectures"):
        getattr(_binaries[key], f"pyops_{function}").restype = ctypes.c_char_p
    return None


def _text(key: str, function: str) -> str:
    return getattr(_binaries[key], f"pyops_{function}")().decode() if key in _binaries else ""


_sanitized = os.environ.get("PYOPS_EMULATOR") == "asan"
_native_problem = (_sanitizer_problem() if _sanitized else None) or _load(
    "pyops", PACKAGE / ("libpyops_asan.so" if _sanitized else "libpyops.so")
)
_emulator_problem: str | None = "not loaded yet"

_runnable = tuple(_text("pyops", "cpu_capabilities").split())
_wanted = os.environ.get("PYOPS_CPU_CAPABILITY")
if _native_problem is None and not _runnable:
    _native_problem = "libpyops.so was built for wider instruction sets than this CPU has: PYOPS_CPU_CAPABILITIES=all"
elif _native_problem is None and _wanted is not None and _wanted not in _runnable:
    _native_problem = (
        f"PYOPS_CPU_CAPABILITY: got {_wanted!r}, expected what is in this build and runs on this CPU, "
        + " or ".join(map(repr, _runnable))
    )


def environment_problem() -> str | None:
    """Why an environment variable cannot be obeyed, or None. Calls of ops say the same."""
    if _native_problem is not None and _native_problem.startswith("PYOPS_"):
        return _native_problem
    return backend.problem()


def emulator_mode() -> str:
    """``plain``, ``race`` or ``asan``: the mode of the emulator that PYOPS_EMULATOR asks for."""
    mode = os.environ.get("PYOPS_EMULATOR", "plain")
    if mode not in ("plain", "race", "asan"):
        raise RuntimeError(f"PYOPS_EMULATOR: got {mode!r}, expected 'plain', 'race' or 'asan'")
    return mode


def release_workspace() -> None:
    """Gives back the memory that CPU kernels keep for their next calls, at most 32 MiB for each thread that ran one.

    The calling thread's memory is freed at once, another thread's when it next needs some. Results do not change; the
    next calls have their pages mapped anew (docs/adr/0011-workspace-is-kept.md).
    """
    if "pyops" in _binaries:
        _binaries["pyops"].pyops_release_workspace()


def load_emulator() -> str | None:
    """Loads the emulator once; returns None, or why it cannot be used."""
    global _emulator_problem
    with _emulator_lock:
        if "emulator" not in _binaries:
            mode = emulator_mode()
            _emulator_problem = _sanitizer_problem() if mode == "asan" else None
            if _emulator_problem is None:
                name = "libpyops_emulator_asan.so" if mode == "asan" else "libpyops_emulator.so"
                _emulator_problem = _load("emulator", PACKAGE / name)
            if _emulator_problem is None and mode == "race":
                _binaries["emulator"].pyops_emulator_configure(b"race", b"1")
    return _emulator_problem


def configure_emulator(**settings: object) -> None:
    """Sets keys of the emulator (docs/emulator.md), as ``schedule="deep"`` or ``capability=80``.

    Raises:
        RuntimeError: the emulator cannot be used.
        ValueError: it does not know the key or the value.
    """
    if (problem := load_emulator()) is not None:
        raise RuntimeError(f"emulator: {problem}")
    for key, value in settings.items():
        if _binaries["emulator"].pyops_emulator_configure(key.encode(), str(value).encode()) != 0:
            raise ValueError(f"emulator: got {key}={value!r}, expected a key and value of docs/emulator.md")


def emulator_statistic(key: str) -> int:
    """A counter of the emulator (docs/emulator.md), since ``configure_emulator(statistics="reset")``.

    Raises:
        RuntimeError: the emulator cannot be used.
    """
    if (problem := load_emulator()) is not None:
        raise RuntimeError(f"emulator: {problem}")
    count = _binaries["emulator"].pyops_emulator_statistics
    count.restype = ctypes.c_uint64
    return count(key.encode())


def cpu_capability() -> str:
    """Instruction set of the loaded CPU kernels: ``baseline``, ``avx2`` or ``avx512``."""
    return _text("pyops", "active_cpu_capability")


def cpu_capabilities() -> tuple[str, ...]:
    """Instruction sets of the CPU kernels of this build that this CPU runs, narrow to wide."""
    return _runnable


@functools.cache
def cpu_is_intel() -> bool:
    """Whether Intel made this CPU, whose vectors its libraries use to the full."""
    return "pyops" in _binaries and bool(_binaries["pyops"].pyops_cpu_is_intel())


def cuda_architectures() -> str:
    """GPU architectures compiled into the loaded library; empty where it was built without CUDA."""
    return _text("pyops", "cuda_architectures")


def signatures(key: str = "pyops") -> dict[str, str]:
    """C++ signature of every registered implementation (``pyops`` or ``emulator``) in schema types, by op."""
    lines = _text(key, "signatures").splitlines()
    return {line.split("(", 1)[0]: "(" + line.split("(", 1)[1] for line in lines}


def _triton_problem() -> str | None:
    try:
        import triton
    except ImportError:
        return "triton is not installed"
    if torch.cuda.is_available() or triton.knobs.runtime.interpret:
        return None
    return "no GPU, and TRITON_INTERPRET=1 is not set"


def why_not(name: str) -> str | None:
    """None where a backend can run, else the reason why it cannot."""
    if name == "cpu":
        return _native_problem
    if name == "cuda":
        if _native_problem is not None:
            return _native_problem
        if not cuda_architectures():
            return "libpyops.so was built without CUDA"
        return None if torch.cuda.is_available() else "torch sees no GPU"
    if name == "triton":
        return _triton_problem()
    return load_emulator()


def status() -> dict[str, str | None]:
    """For each backend None where it can run, else why not. Loads the emulator if it was built."""
    return {name: why_not(name) for name in backend.NAMES}


backend.install(why_not)
