"""layer_norm: rows of N numbers, one statistic per row."""

from typing import Any

import torch

from .case import Case, Function, Provider, with_both_directions
from .peers import flag_gems_aten, gpu_peers, imported, standard_providers

STEM = "layer_norm"
OPS = ("layer_norm",)
EPS = 1e-5


def cases(device: str) -> list[Case]:
    if device == "cpu":
        shapes = [((4096, 1024), True), ((8192, 768), False), ((1024, 4096), False), ((65536, 64), False)]
        return with_both_directions([Case("layer_norm", shape, quick=quick) for shape, quick in shapes])
    rows = [(32768, 4096), (16384, 4096), (8192, 8192), (1024, 1152), (131072, 128), (16, 4 << 20)]
    half = [Case("layer_norm", s, torch.bfloat16, device, quick=s in ((16384, 4096), (1024, 1152))) for s in rows]
    return with_both_directions([*half, Case("layer_norm", (8192, 8192), torch.float32, device)])


def tiny(device: str) -> list[Case]:
    shapes = [(3, 17), (5, 1024), (2, 9000), (2, 16384), (1, 600000)]
    return [Case("layer_norm", shape, device=device, backward=True) for shape in shapes]


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    return {"weight": case.shape[-1:], "bias": case.shape[-1:]}


def bytes(case: Case) -> int:
    """Forward x → y; backward dy, x → dx. The parameters are read once, their gradients written once."""
    size = case.dtype.itemsize
    forward = (2 * case.numel + 2 * case.shape[-1]) * size
    backward = (3 * case.numel + 3 * case.shape[-1]) * size
    return forward + backward * case.backward


def flops(case: Case) -> int:
    """Forward: sum 1, centred square sum 3, normalise 2, affine 2; backward: dy·w 1, xhat 2, sums 3, dx 5, dw, db 3."""
    return case.numel * (8 + 14 * case.backward)


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
    return lambda t: functional.layer_norm(t["x"], case.shape[-1:], t["weight"], t["bias"], EPS)


def liger(case: Case) -> Function:
    layer_norm = imported("liger_kernel.transformers.functional", "liger_layer_norm")
    return lambda t: layer_norm(t["x"], t["weight"], t["bias"], EPS)


def providers(case: Case) -> dict[str, Provider]:
    return (
        standard_providers(bind, case)
        | gpu_peers(case, liger_kernel=lambda: liger(case))
        | flag_gems_aten(bind, case, "layer_norm", "layer_norm_backward")
    )
