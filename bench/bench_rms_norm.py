"""rms_norm: rows of N numbers, scaled by their root mean square."""

from typing import Any

import torch

from .case import Case, Function, Provider, with_both_directions
from .peers import gpu_peers, imported, standard_providers

STEM = "rms_norm"
OPS = ("rms_norm",)
EPS = 1e-6


def cases(device: str) -> list[Case]:
    if device == "cpu":
        shapes = [((4096, 1024), True), ((1024, 4096), False), ((65536, 64), False)]
        return with_both_directions([Case("rms_norm", shape, quick=quick) for shape, quick in shapes])
    rows = [(16384, 4096), (32768, 4096), (8192, 8192), (1024, 1152), (131072, 128), (16, 4 << 20)]
    half = [Case("rms_norm", s, torch.bfloat16, device, quick=s in ((16384, 4096), (1024, 1152))) for s in rows]
    return with_both_directions([*half, Case("rms_norm", (8192, 8192), torch.float32, device)])


def tiny(device: str) -> list[Case]:
    shapes = [(3, 17), (5, 1024), (2, 9000), (2, 16384), (1, 600000)]
    return [Case("rms_norm", shape, device=device, backward=True) for shape in shapes]


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    return {"weight": case.shape[-1:]}


def bytes(case: Case) -> int:
    """Forward x → y; backward dy, x → dx. The weight is read once, its gradient written once."""
    size = case.dtype.itemsize
    forward = (2 * case.numel + case.shape[-1]) * size
    backward = (3 * case.numel + 2 * case.shape[-1]) * size
    return forward + backward * case.backward


def flops(case: Case) -> int:
    """Forward: square sum 2, scale 1, weight 1. Backward: dy·w 1, xhat 1, sum 2, dx 3, dw 2."""
    return case.numel * (4 + 9 * case.backward)


def traffic(case: Case) -> tuple[int, int]:
    """Rows beyond a cluster (512 KB forward, 65536 values backward) are read twice, in three launches a direction."""
    row, again = case.shape[-1], 0
    launches = 1 + 2 * case.backward
    if row * case.dtype.itemsize > 512 << 10:
        again, launches = case.numel, launches + 2
    if case.backward and row > 65536:
        again, launches = again + 2 * case.numel, launches + 2
    return bytes(case) + again * case.dtype.itemsize, launches


def bind(functional: Any, case: Case) -> Function:
    return lambda t: functional.rms_norm(t["x"], case.shape[-1:], t["weight"], EPS)


def liger(case: Case) -> Function:
    rms_norm = imported("liger_kernel.transformers.functional", "liger_rms_norm")
    # in_place would overwrite dy, which no other provider does.
    return lambda t: rms_norm(t["x"], t["weight"], EPS, 0.0, "llama", False)


def flag_gems(case: Case) -> Function:
    # Under use_gems, aten::rms_norm has no gradient; the package's own function has one.
    rms_norm = imported("flag_gems", "rms_norm")
    return lambda t: rms_norm(t["x"], case.shape[-1:], t["weight"], EPS)


def providers(case: Case) -> dict[str, Provider]:
    return standard_providers(bind, case) | gpu_peers(
        case, liger_kernel=lambda: liger(case), flag_gems=lambda: flag_gems(case)
    )
