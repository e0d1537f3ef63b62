"""additive_attention: Bahdanau's attention, against the same put together from torch's ops."""

from typing import Any

import torch

from .case import Case, Function, Provider, with_both_directions
from .peers import standard_providers

STEM = "additive_attention"
OPS = ("additive_attention",)
CENTRED = ("w_q", "w_k", "v")
MATRIX = True


def cases(device: str) -> list[Case]:
    """Queries [B, L, D] against as many keys; D features, hidden units and value features."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    sizes = [(16, 32, 256), (64, 1, 256)] if device == "cpu" else [(64, 128, 512), (256, 1, 512)]
    return with_both_directions(
        [Case("additive_attention", s, dtype, device, quick=i == 0) for i, s in enumerate(sizes)]
    )


def tiny(device: str) -> list[Case]:
    return [Case("additive_attention", (2, 3, 17), device=device, backward=True)]


def _keys(case: Case) -> int:
    """One query, as a decoder has, looks at 196 keys: the cells of a 14 x 14 feature map."""
    return 196 if case.shape[1] == 1 else case.shape[1]


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    batch, _, size = case.shape
    return {
        **dict.fromkeys(("key", "value"), (batch, _keys(case), size)),
        **dict.fromkeys(("w_q", "w_k"), (size, size)),
        "v": (size,),
    }


def bytes(case: Case) -> int:
    """Forward: every tensor once, and what comes out; backward: the same, and a gradient of each."""
    read = case.numel + sum(torch.Size(s).numel() for s in shapes(case).values())
    return (read + case.numel + case.backward * (2 * read + case.numel)) * case.dtype.itemsize


def flops(case: Case) -> int:
    """Both projections, scores and the weighted sum; a tanh counts as one."""
    batch, length, size = case.shape
    products = 2 * batch * (length + _keys(case)) * size * size
    return (products + 6 * batch * length * _keys(case) * size) * (1 + 2 * case.backward)


def bind(functional: Any, case: Case) -> Function:
    if functional is torch.nn.functional:
        return _composed
    names = ("x", "key", "value", "w_q", "w_k", "v")
    return lambda t: functional.additive_attention(*(t[n] for n in names))


def _composed(t: dict[str, torch.Tensor]) -> torch.Tensor:
    hidden = (t["x"] @ t["w_q"].mT).unsqueeze(-2) + (t["key"] @ t["w_k"].mT).unsqueeze(-3)
    return (hidden.tanh() @ t["v"]).softmax(-1) @ t["value"]


def providers(case: Case) -> dict[str, Provider]:
    return standard_providers(bind, case)
