"""distance: all pairs, the nearest of them, row by row, and products of channels. ``x`` holds the rows of x1, ``other``
those of x2."""

import math
from typing import Any

import torch

from pyops import functional as F

from .case import Case, Function, Provider, with_both_directions
from .peers import compiled, pyops_providers

STEM = "distance"
OPS = ("cdist", "knn", "pairwise_distance", "cosine_similarity", "gram_matrix")
K = 10


def case_of(op: str, rows: int, others: int, columns: int, p: float = 2.0, **more: Any) -> Case:
    output = (rows, others if op == "cdist" else K)
    args: dict[str, Any] = {"R": others, "p": p}
    return Case(op, (rows, columns), args=args, output=output, **more)


def by_row(op: str, rows: int, columns: int, **more: Any) -> Case:
    return Case(op, (rows, columns), output=(rows,), **more)


def gram(batch: int, channels: int, pixels: int, **more: Any) -> Case:
    return Case("gram_matrix", (batch, channels, pixels), output=(batch, channels, channels), **more)


def cases(device: str) -> list[Case]:
    if device == "cpu":
        pairs = [
            case_of("cdist", 4096, 4096, 64, quick=True),
            case_of("cdist", 1024, 1024, 64, 1.0),
            case_of("cdist", 512, 512, 256, float("inf")),
            case_of("cdist", 512, 512, 64, 3.0),
            by_row("pairwise_distance", 65536, 128),
            by_row("cosine_similarity", 65536, 128),
            gram(1, 64, 224 * 224),
            gram(1, 512, 28 * 28, quick=True),
        ]
        return [
            *with_both_directions(pairs),
            case_of("cdist", 512, 512, 256, 0.0),  # its gradient is 0
            case_of("knn", 1024, 20000, 64, quick=True),
            case_of("knn", 1, 100000, 64),
            case_of("knn", 256, 20000, 16, 1.0),
        ]
    pairs = [
        case_of("cdist", 16384, 16384, 128, device=device, quick=True),
        by_row("pairwise_distance", 1 << 20, 128, device=device),
        by_row("cosine_similarity", 1 << 20, 128, device=device),
        gram(16, 512, 56 * 56, device=device),
    ]
    return [*with_both_directions(pairs), case_of("knn", 16384, 1 << 20, 64, device=device)]


def tiny(device: str) -> list[Case]:
    found = [case_of("cdist", 5, 7, 3, p, device=device, backward=True) for p in (0.0, 1.0, 2.0, 3.0, float("inf"))]
    alone = [by_row(op, 5, 7, device=device, backward=True) for op in ("pairwise_distance", "cosine_similarity")]
    grams = [gram(2, 3, 7, device=device, backward=True), gram(1, 257, 5, device=device, backward=True)]
    return [*found, *alone, *grams, case_of("knn", 5, 70, 3, device=device)]


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    if case.op == "gram_matrix":
        return {}
    return {"other": (case.args.get("R", case.shape[0]), case.shape[1])}


def bytes(case: Case) -> int:
    """Forward x1, x2 → y; backward dy, y, x1, x2 → dx1, dx2."""
    inputs = case.numel + sum(map(math.prod, shapes(case).values()))
    out = math.prod(case.output or ())
    return (inputs + out + case.backward * (2 * inputs + 2 * out)) * case.dtype.itemsize


def flops(case: Case) -> int:
    """A difference, a product and a sum for each pair and column, two products with their sums for a cosine, half a
    product for a Gram matrix; the gradients twice the same."""
    each = {"pairwise_distance": 3, "cosine_similarity": 6, "gram_matrix": case.shape[1] + 1}
    return case.numel * each.get(case.op, 3 * case.args.get("R", 0)) * (1 + 2 * case.backward)


def nearest(functional: Any, t: dict[str, torch.Tensor], p: float) -> torch.Tensor:
    if functional is F:
        return F.knn(t["x"], t["other"], K, p)[0]
    return torch.cdist(t["x"], t["other"], p).topk(K, largest=False)[0]


def bind(functional: Any, case: Case) -> Function:
    if case.op == "gram_matrix":
        return lambda t: F.gram_matrix(t["x"]) if functional is F else t["x"] @ t["x"].mT
    if "p" not in case.args:
        function = getattr(functional, case.op)
        return lambda t: function(t["x"], t["other"])
    p = case.args["p"]
    if case.op == "knn":
        return lambda t: nearest(functional, t, p)
    cdist = F.cdist if functional is F else torch.cdist
    return lambda t: cdist(t["x"], t["other"], p)


def providers(case: Case) -> dict[str, Provider]:
    reference = lambda: bind(torch.nn.functional, case)
    return pyops_providers(bind, case) | {
        "torch": Provider(reference),
        "torch.compile": Provider(lambda: compiled(reference())),
    }
