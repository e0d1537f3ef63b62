"""Which code an op would run for given shapes, and why: ``python -m pyops explain``.

The choice of backend is known here. The choice of kernel is known to the room alone, which says it through
``explains``; where a room says nothing, nothing is made up.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import backend, library

Shapes = Sequence[tuple[int, ...]]
# (shapes, dtype, backend name, and geometry by name where the room takes it) -> one sentence per choice
Explainer = Callable[..., Sequence[str]]
# (op, shapes) -> the stem whose kernels run
Stems = Callable[[str, Shapes], str]

_SOURCE = {
    "cpu": "csrc/cpu/{}.cpp",
    "cuda": "csrc/cuda/{}.cu",
    "triton": "kernels/{}.py",
    "emulator": "csrc/cuda/{}.cu",
}
_DEVICES = {"cpu": ("cpu",), "cuda": ("cuda",), "triton": ("cpu", "cuda"), "emulator": ("cpu",)}
_explainers: dict[str, Explainer] = {}
_stems: dict[str, Stems] = {}
_composite: set[str] = set()
_without_triton: set[str] = set()


@dataclass(frozen=True)
class Explanation:
    """What would run.

    Attributes:
        op: name of the public function.
        shapes: shapes of its tensor arguments.
        dtype: name of their dtype.
        device: ``"cpu"`` or ``"cuda"``.
        backend: the implementation chosen.
        reason: why this one.
        why_not: None, or why it cannot run on this machine.
        namespace: where its ops live under torch.ops.
        source: kernel source, as a path in the repository; the room of a composite op, None where there is none.
        cpu_capability: instruction set of the kernels, for the CPU backend only.
        notes: what the room says about its choice of kernel; empty where it has no choice to explain.
    """

    op: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    device: str
    backend: str
    reason: str
    why_not: str | None
    namespace: str
    source: str | None
    cpu_capability: str | None
    notes: tuple[str, ...]

    def __str__(self) -> str:
        shapes = " ".join(str(list(shape)) for shape in self.shapes)
        lines = [
            f"{self.op} {shapes} {self.dtype} on {self.device}",
            f"  backend     {self.backend} ({self.reason})",
            f"  ops         torch.ops.{self.namespace}",
        ]
        if self.source is not None:
            lines.append(f"  source      {self.source}")
        if self.cpu_capability:
            lines.append(f"  compiled    {self.cpu_capability}")
        if self.why_not is not None:
            lines.append(f"  cannot run  {self.why_not}")
        lines += [f"  kernel      {note}" for note in self.notes]
        return "\n".join(lines)


def explains(op: str, function: Explainer, stem: Stems | None = None) -> None:
    """A room says how it chooses among its kernels: ``function(shapes, dtype, backend, **geometry) -> sentences``.

    ``stem`` says whose kernels run, where that depends on the call or is not the room that holds the op.
    """
    _explainers[op] = function
    if stem is not None:
        _stems[op] = stem


def composite(*ops: str) -> None:
    """A room says which of its functions have no kernel of their own: torch's ops and those of other functions."""
    _composite.update(ops)


def without_triton(*ops: str) -> None:
    """A room says which of its functions have no Triton kernel."""
    _without_triton.update(ops)


def explain(
    op: str,
    shapes: Shapes,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    wanted: str | None = None,
    stem: str | None = None,
    geometry: Mapping[str, Any] | None = None,
) -> Explanation:
    """Says what a call of ``op`` would run; runs nothing.

    Args:
        op: public name, such as ``"layer_norm"``.
        shapes: shapes of the tensor arguments, the input first.
        dtype: dtype of the input.
        device: ``"cpu"`` or ``"cuda"``.
        wanted: a backend to explain in place of the one that would run.
        stem: the room that holds the op, where it is not named after it.
        geometry: stride, padding and the like, for rooms whose choice depends on them.

    Raises:
        ValueError: shapes or geometry that no call of the op takes.
    """
    forced = backend.forced()
    if wanted is not None:
        name, reason = wanted, "asked for"
    elif forced is not None:
        name, reason = forced, "forced"
    else:
        name, reason = backend.default_for(device), f"default for {device}"
    why_not = library.why_not(name) if device in _DEVICES[name] else f"{name} does not run on {device} tensors"
    explainer = _explainers.get(op)
    if op in _stems:
        stem = _stems[op](op, shapes)
    takes = inspect.signature(explainer).parameters.values() if explainer is not None else ()
    if geometry and not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in takes):
        raise ValueError(f"{op}: got {', '.join(geometry)}, on which what would run does not depend")
    try:
        notes = tuple(explainer(shapes, dtype, name, **(geometry or {}))) if explainer is not None else ()
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise ValueError(str(error)) from error
    stem = stem or op
    own = op not in _composite
    source: str | None = _SOURCE[name].format(stem) if own else f"pyops/ops/{stem}.py"
    if not own:
        notes = ("none of its own: put together of torch's ops and other functions", *notes)
    elif name == "triton" and op in _without_triton:
        source, why_not = None, f"{op} has no Triton kernel"
    return Explanation(
        op=op,
        shapes=tuple(tuple(shape) for shape in shapes),
        dtype=str(dtype).removeprefix("torch."),
        device=device,
        backend=name,
        reason=reason,
        why_not=why_not,
        namespace=library.NAMESPACE_OF[name],
        source=source,
        cpu_capability=(library.cpu_capability() or None) if name == "cpu" and own else None,
        notes=notes,
    )
