"""Dropout of elements, of channels and of weights; the mask is drawn twice and never stored.

p is so small that nothing is dropped: masks are random, and only so can results be compared. All is drawn and computed
as for any other p.
"""

import dataclasses
from typing import Any

import torch

from .case import Case, Function, Provider, with_both_directions
from .peers import pyops_providers

STEM = "dropout"
OPS = ("dropout", "alpha_dropout", "feature_alpha_dropout", "dropconnect_linear")
P = 1e-12


def cases(device: str) -> list[Case]:
    shape, dtype = ((8, 64, 112, 112), torch.float32) if device == "cpu" else ((8192, 8192), torch.bfloat16)
    image, rows = ((8, 64, 112, 112), 256) if device == "cpu" else ((64, 256, 56, 56), 8192)
    found = [
        Case("dropout", shape, dtype, device, quick=True, args={"p": P}),
        Case("dropout", image, dtype, device, args={"p": P, "channels": True}),
        Case("alpha_dropout", shape, dtype, device, args={"p": P}),
        Case("feature_alpha_dropout", image, dtype, device, args={"p": P}),
        Case("dropconnect_linear", (rows, 1024), dtype, device, args={"p": P}),
    ]
    return with_both_directions(found)


def tiny(device: str) -> list[Case]:
    shapes = [((3, 70), {"p": P}), ((2, 3, 4, 5), {"p": P, "channels": True})]
    found = [Case("dropout", shape, device=device, backward=True, args=args) for shape, args in shapes]
    others = [
        Case("alpha_dropout", (3, 70), device=device, backward=True, args={"p": P}),
        Case("feature_alpha_dropout", (2, 3, 4, 5), device=device, backward=True, args={"p": P}),
        Case("dropconnect_linear", (5, 8), device=device, backward=True, args={"p": P}),
    ]
    return [*found, dataclasses.replace(found[1], channels_last=True), *others]


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    """The weights of a layer of as many outputs as inputs."""
    return {"weight": (case.shape[1], case.shape[1])} if case.op == "dropconnect_linear" else {}


def bytes(case: Case) -> int:
    """Forward x → y; backward dy → dx. The layer: x, w → y; x, w, dy → dx, dw."""
    if case.op == "dropconnect_linear":
        weights = case.shape[1] ** 2
        return (2 * case.numel + weights + case.backward * (3 * case.numel + 2 * weights)) * case.dtype.itemsize
    return 2 * case.numel * case.dtype.itemsize * (1 + case.backward)


def flops(case: Case) -> int:
    """A quarter of a draw of ten rounds of some eight operations, and a product, for each element."""
    if case.op == "dropconnect_linear":
        return 2 * case.numel * case.shape[1] * (1 + 2 * case.backward) + 21 * case.shape[1] ** 2 * (1 + case.backward)
    return case.numel * 21 * (1 + case.backward)


def bind(functional: Any, case: Case) -> Function:
    p = case.args["p"]
    if case.op == "dropconnect_linear":
        if functional is torch.nn.functional:
            return lambda t: functional.linear(t["x"], functional.dropout(t["weight"], p))
        return lambda t: functional.dropconnect_linear(t["x"], t["weight"], p=p)
    function = functional.dropout2d if case.args.get("channels") else getattr(functional, case.op)
    return lambda t: function(t["x"], p, True)


def providers(case: Case) -> dict[str, Provider]:
    return pyops_providers(bind, case) | {"torch": Provider(lambda: bind(torch.nn.functional, case))}
