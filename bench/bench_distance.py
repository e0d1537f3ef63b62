"""distance: all pairs, and the nearest of them. ``x`` holds the rows of x1, ``other`` those of x2."""

from typing import Any

import torch

from pyops import functional as F

from .case import Case, Function, Provider, with_both_directions
from .peers import compiled, pyops_providers

STEM = "distance"
OPS = ("cdist", "knn")
K = 10


def case_of(op: str, rows: int, others: int, columns: int, p: float = 2.0, **more: Any) -> Case:
    output = (rows, others if op == "cdist" else K)
    args: dict[str, Any] = {"R": others, "p": p}
    return Case(op, (rows, columns), args=args, output=output, **more)


def cases(device: str) -> list[Case]:
    if device == "cpu":
        pairs = [
            case_of("cdist", 4096, 4096, 64, quick=True),
            case_of("cdist", 1024, 1024, 64, 1.0),
            case_of("cdist", 512, 512, 256, float("inf")),
        ]
        return [
            *with_both_directions(pairs),
            case_of("knn", 1024, 20000, 64, quick=True),
            case_of("knn", 1, 100000, 64),
            case_of("knn", 256, 20000, 16, 1.0),
        ]
    pairs = [case_of("cdist", 16384, 16384, 128, device=device, quick=True)]
    return [*with_both_directions(pairs), case_of("knn", 16384, 1 << 20, 64, device=device)]


def tiny(device: str) -> list[Case]:
    found = [case_of("cdist", 5, 7, 3, p, device=device, backward=True) for p in (0.0, 1.0, 2.0, 3.0, float("inf"))]
    return [*found, case_of("knn", 5, 70, 3, device=device)]


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    return {"other": (case.args["R"], case.shape[1])}


def bytes(case: Case) -> int:
    """Forward x1, x2 → y; backward dy, y, x1, x2 → dx1, dx2."""
    rows, columns = case.shape
    inputs, out = (rows + case.args["R"]) * columns, rows * (case.output or (0, 0))[1]
    return (inputs + out + case.backward * (2 * inputs + 2 * out)) * case.dtype.itemsize


def flops(case: Case) -> int:
    """A difference, a product and a sum for each pair and column; both gradients the same again."""
    return 3 * case.numel * case.args["R"] * (1 + 2 * case.backward)


def nearest(functional: Any, t: dict[str, torch.Tensor], p: float) -> torch.Tensor:
    if functional is F:
        return F.knn(t["x"], t["other"], K, p)[0]
    return torch.cdist(t["x"], t["other"], p).topk(K, largest=False)[0]


def bind(functional: Any, case: Case) -> Function:
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
