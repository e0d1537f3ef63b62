"""Lists of tensors as one call of a kernel takes them: one device, one dtype, no gaps; and their norm as one vector."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from . import backend, check, library

_norm = library.declare(
    "multi_norm(Tensor[] tensors, float order) -> Tensor",
    lambda tensors, order: tensors[0].new_empty((), dtype=torch.float64),
    library.triton_kernels("optim"),
)


def strides_fit(first: torch.Tensor, *others: torch.Tensor) -> bool:
    """The tensors fill their memory without gaps, in the same order."""
    if all(t.is_contiguous() for t in (first, *others)):
        return True
    dense = torch._prims_common.is_non_overlapping_and_dense_or_false(first)
    return dense and all(t.stride() == first.stride() for t in others)


class Flat:
    """Exchanges tensors with gaps for contiguous copies, and copies back what changed."""

    def __init__(self) -> None:
        self.exchanged: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        for t in tensors:
            if not t.is_contiguous() or t.is_complex():
                break
        else:
            return tensors
        if tensors[0].is_complex():
            tensors = tuple(torch.view_as_real(t) for t in tensors)
        if strides_fit(*tensors):
            return tensors
        copies = tuple(t.clone(memory_format=torch.contiguous_format) for t in tensors)
        self.exchanged += zip(tensors, copies)
        return copies

    def restore(self) -> None:
        for original, copy in self.exchanged:
            original.copy_(copy)


def by_kind(op: str, *lists: list[torch.Tensor]) -> Iterable[tuple[list[torch.Tensor], ...]]:
    """Parallel lists cut into those of one device and dtype, by the first; checked."""
    cut: dict[Any, tuple[list[torch.Tensor], ...]] = {}
    for tensors in zip(*lists):
        first = tensors[0]
        if first.dtype not in check.FLOATING and not first.is_complex():
            check.fail(NotImplementedError, op, "tensors", first.dtype, "a floating or complex dtype")
        kind = cut.setdefault((first.device, first.dtype, tensors[-1].dtype), tuple([] for _ in lists))
        for into, tensor in zip(kind, tensors):
            into.append(tensor)
    return cut.values()


def total_norm(op: str, tensors: list[torch.Tensor], order: float) -> torch.Tensor:
    """The norm of all tensors as one vector, float64, on the first one's device."""
    norms = []
    for (alike,) in by_kind(op, tensors):
        if order not in (1.0, 2.0, math.inf):
            norms += [torch.linalg.vector_norm(t.detach(), order).double() for t in alike]
            continue
        # a complex number is one entry of a vector, except under order 2, where its parts can stand for it
        if alike[0].is_complex() and order != 2.0:
            alike = [t.abs() for t in alike]
        flat = [Flat()(t)[0] for t in alike]
        norms.append(_norm(backend.namespace_for(op, flat[0]), flat, order))
    if len(norms) == 1 and order != 0:  # of order 0 torch counts the tensors that are not 0, as the last line does
        return norms[0]
    return torch.linalg.vector_norm(torch.stack([n.to(tensors[0].device) for n in norms]), order)
