"""embedding: copies of rows forward, sums of rows by index backward; bound by memory."""

from typing import Any

import torch

from .case import Case, Function, Provider, with_both_directions
from .peers import standard_providers

STEM = "embedding"
OPS = ("embedding", "embedding_bag")


def cases(device: str) -> list[Case]:
    if device == "cpu":
        found = [
            Case("embedding", (16000, 256), args={"entries": 16384}, output=(16384, 256), quick=True),
            Case("embedding", (200, 512), args={"entries": 32768}, output=(32768, 512)),
            Case("embedding_bag", (16000, 256), args={"entries": 65536, "bags": 4096}, output=(4096, 256), quick=True),
        ]
        return with_both_directions(found)
    half: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    return with_both_directions(
        [
            Case("embedding", (32000, 4096), args={"entries": 32768}, output=(32768, 4096), quick=True, **half),
            Case("embedding", (200, 1024), args={"entries": 131072}, output=(131072, 1024), **half),
            Case("embedding_bag", (128256, 256), args={"entries": 1 << 20, "bags": 65536}, output=(65536, 256), **half),
        ]
    )


def tiny(device: str) -> list[Case]:
    return [
        Case("embedding", (7, 6), args={"entries": 9}, output=(9, 6), device=device, backward=True),
        Case("embedding_bag", (7, 6), args={"entries": 9, "bags": 3}, output=(3, 6), device=device, backward=True),
    ]


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    return {}


def bytes(case: Case) -> int:
    """Named rows read, y written; backward dy read once for each entry, and the whole table of gradients written."""
    entries, (rows, width) = case.args["entries"], case.shape
    outputs = case.args.get("bags", entries)
    moved = (min(entries, rows) + outputs) * width + case.backward * (outputs + rows) * width
    return moved * case.dtype.itemsize + 8 * entries


def flops(case: Case) -> int:
    """One addition for each number of a named row where rows are summed."""
    added = case.args["entries"] * case.shape[1]
    return added * ((case.op == "embedding_bag") + case.backward)


def bind(functional: Any, case: Case) -> Function:
    entries = case.args["entries"]
    index = torch.randint(case.shape[0], (entries,), generator=torch.Generator().manual_seed(0)).to(case.device)
    if case.op == "embedding":
        return lambda t: functional.embedding(index, t["x"])
    bags = case.args["bags"]
    offsets = torch.arange(bags, device=case.device) * (entries // bags)
    return lambda t: functional.embedding_bag(index, t["x"], offsets, mode="sum")


def providers(case: Case) -> dict[str, Provider]:
    return standard_providers(bind, case)
