"""Dropout of elements and of channels; the mask is drawn twice and never stored.

p is so small that nothing is dropped: masks are random, and only so can results be compared. All is drawn and computed
as for any other p.
"""

import dataclasses
from typing import Any

import torch

from .case import Case, Function, Provider, with_both_directions
from .peers import pyops_providers

STEM = "dropout"
OPS = ("dropout",)
P = 1e-12


def cases(device: str) -> list[Case]:
    shape, dtype = ((8, 64, 112, 112), torch.float32) if device == "cpu" else ((8192, 8192), torch.bfloat16)
    image = (8, 64, 112, 112) if device == "cpu" else (64, 256, 56, 56)
    found = [
        Case("dropout", shape, dtype, device, quick=True, args={"p": P}),
        Case("dropout", image, dtype, device, args={"p": P, "channels": True}),
    ]
    return with_both_directions(found)


def tiny(device: str) -> list[Case]:
    shapes = [((3, 70), {"p": P}), ((2, 3, 4, 5), {"p": P, "channels": True})]
    found = [Case("dropout", shape, device=device, backward=True, args=args) for shape, args in shapes]
    return [*found, dataclasses.replace(found[1], channels_last=True)]


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    return {}


def bytes(case: Case) -> int:
    """Forward x → y; backward dy → dx."""
    return 2 * case.numel * case.dtype.itemsize * (1 + case.backward)


def flops(case: Case) -> int:
    """A quarter of a draw of ten rounds of some eight operations, and a product, for each element."""
    return case.numel * 21 * (1 + case.backward)


def bind(functional: Any, case: Case) -> Function:
    function = functional.dropout2d if case.args.get("channels") else functional.dropout
    return lambda t: function(t["x"], case.args["p"])


def providers(case: Case) -> dict[str, Provider]:
    return pyops_providers(bind, case) | {"torch": Provider(lambda: bind(torch.nn.functional, case))}
