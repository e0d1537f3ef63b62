"""Which implementation runs: one of ``cpu``, ``cuda``, ``triton``, ``emulator``.

Choosing a backend is choosing an op namespace. Nothing falls back silently: a forced backend that cannot run raises
and says why.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import TracebackType

import torch

from . import tracing

NAMES = ("cpu", "cuda", "triton", "emulator")
_NAMESPACE_ON = {
    # (backend, device type) -> namespace; what is absent cannot run
    ("cpu", "cpu"): "pyops",
    ("cuda", "cuda"): "pyops",
    ("triton", "cpu"): "pyops_triton",
    ("triton", "cuda"): "pyops_triton",
    ("emulator", "cpu"): "pyops_emulator",
}
_HOME = {"cpu": "cpu", "cuda": "cuda", "triton": "cuda", "emulator": "cpu"}
_why_not: Callable[[str], str | None]
_usable: dict[str, bool] = {}
_chosen: dict[str, str] = {}  # device type -> namespace, as long as the forced backend stays
_forced: str | None = None
_problem: str | None = None  # why PYOPS_BACKEND cannot be obeyed; every call says so until a backend is chosen


def install(why_not: Callable[[str], str | None]) -> None:
    """Tells this module how to ask whether a backend can run, and applies PYOPS_BACKEND."""
    global _why_not, _problem
    _why_not = why_not
    if name := os.environ.get("PYOPS_BACKEND"):
        try:
            _force(name)
        except (ValueError, RuntimeError) as error:
            _problem = f"PYOPS_BACKEND: {error}"


def problem() -> str | None:
    """Why PYOPS_BACKEND cannot be obeyed, or None."""
    return _problem


def _force(name: str | None) -> None:
    global _forced, _problem
    if name is not None:
        if name not in NAMES:
            raise ValueError(f"backend: got {name!r}, expected one of {', '.join(NAMES)} or None")
        reason = _why_not(name)
        if reason is not None:
            raise RuntimeError(f"backend {name!r} cannot run: {reason}")
        _usable[name] = True
    _forced, _problem = name, None
    _chosen.clear()


class backend:
    """Forces one implementation, process-wide, as a call or for the length of a ``with`` block.

    ``pyops.backend("triton")`` forces it from now on; ``with pyops.backend("triton"): ...`` restores the former
    choice at the end; ``pyops.backend(None)`` gives the choice back to pyops. The environment variable PYOPS_BACKEND
    does the same from the start; where it cannot be obeyed, every call raises and says why.

    Args:
        name: ``"cpu"``, ``"cuda"``, ``"triton"``, ``"emulator"`` (CUDA C++ kernels run on CPU tensors, for tests)
            or None.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: if the backend cannot run here; the message says why.
    """

    def __init__(self, name: str | None) -> None:
        self._before = _forced, _problem
        _force(name)

    def __enter__(self) -> backend:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        global _forced, _problem
        _forced, _problem = self._before
        _chosen.clear()


def forced() -> str | None:
    """The forced backend, or None."""
    return _forced


def default_for(device_type: str) -> str:
    """The backend that runs on a device when none is forced: C++ on CPU; CUDA C++, else Triton, on a GPU."""
    if device_type != "cuda":
        return "cpu"
    return "cuda" if _can_run("cuda") else "triton"


def _can_run(name: str) -> bool:
    if name not in _usable:
        _usable[name] = _why_not(name) is None
    return _usable[name]


def name_for(device: torch.device) -> str:
    """The backend that will run on tensors of a device."""
    return _forced if _forced is not None else default_for(device.type)


def namespace_for(op: str, x: torch.Tensor) -> str:
    """The op namespace for a call on ``x``.

    Raises:
        RuntimeError: the forced backend does not serve the tensor's device.
        NotImplementedError: none is forced, and pyops has no kernels for the device here.
    """
    device_type = x.device.type
    if torch.compiler.is_compiling():
        return _compiled_choice(op, device_type, _forced, _problem) or _choose(op, device_type)
    namespace = _chosen.get(device_type)
    if namespace is None:
        namespace = _chosen[device_type] = _choose(op, device_type)
    return namespace


@tracing.constant
def _compiled_choice(op: str, device_type: str, forced: str | None, problem: str | None) -> str | None:
    """The choice where dynamo traces, which then guards the two causes of it and not what is remembered.

    What the first call remembers would make the second compile again. None where nothing can run.
    """
    try:
        return _choose(op, device_type)
    except RuntimeError:
        return None


def _choose(op: str, device_type: str) -> str:
    if _problem is not None:
        raise RuntimeError(f"{op}: {_problem}")
    name = _forced if _forced is not None else default_for(device_type)
    # a meta tensor has shapes only: every backend's fake serves it
    kernels_for = _HOME[name] if device_type == "meta" else device_type
    namespace = _NAMESPACE_ON.get((name, kernels_for))
    if namespace is not None and _can_run(name):
        return namespace
    reason = _why_not(name) if namespace is not None else f"it does not run on {kernels_for} tensors"
    kind = NotImplementedError if _forced is None else RuntimeError
    raise kind(f"{op}: backend {name!r} cannot run: {reason}")
