"""batch_norm: one statistic per channel over the batch and the image, in training."""

from typing import Any

import torch

from .case import Case, Function, Provider, with_both_directions
from .peers import flag_gems_aten, standard_providers

STEM = "batch_norm"
OPS = ("batch_norm",)
EPS = 1e-5
MOMENTUM = 0.1


def case_of(shape: tuple[int, ...], training: bool = True, **fields: Any) -> Case:
    return Case("batch_norm", shape, args={} if training else {"training": False}, **fields)


def cases(device: str) -> list[Case]:
    if device == "cpu":
        training = [
            case_of((32, 64, 56, 56), quick=True),
            case_of((32, 64, 56, 56), channels_last=True),
            case_of((32, 512, 7, 7)),
            case_of((20, 6, 65536)),
        ]
        return [*with_both_directions(training), case_of((32, 64, 56, 56), training=False)]
    training = [
        case_of((256, 64, 56, 56), dtype=torch.bfloat16, device=device, quick=True),
        case_of((256, 64, 56, 56), dtype=torch.bfloat16, device=device, channels_last=True),
        case_of((64, 64, 512, 512), device=device),
        case_of((20, 6, 65536), device=device),
    ]
    return with_both_directions(training)


def tiny(device: str) -> list[Case]:
    return [
        case_of((2, 3, 5, 7), device=device, backward=True),
        case_of((2, 3, 5, 7), device=device, backward=True, channels_last=True),
        case_of((3, 5), device=device, backward=True),
        case_of((2, 3, 40, 40), training=False, device=device, backward=True),
    ]


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys(("weight", "bias", "running_mean", "running_var"), case.shape[1:2])


def bytes(case: Case) -> int:
    """One read and one write of the image forward; dy, x → dx backward.

    A kernel whose channel does not stay in a cache reads the image twice: its limit is 3/2 of this.
    """
    size = case.dtype.itemsize
    return (2 + 3 * case.backward) * case.numel * size


def flops(case: Case) -> int:
    """Training forward: sum 1, centred square sum 3, scale and shift 2; backward: two sums 5, dx 5."""
    forward = 6 if case.args.get("training", True) else 2
    return case.numel * (forward + 10 * case.backward)


def traffic(case: Case) -> tuple[int, int]:
    """In waves each tensor is read once; channels too large for the cache, and channels last, are read twice."""
    channel = case.numel // case.shape[1] * case.dtype.itemsize
    if not case.channels_last and channel < 12 << 20:
        return bytes(case), 2 + 2 * case.backward
    return bytes(case) + (1 + 2 * case.backward) * case.numel * case.dtype.itemsize, 3 + 3 * case.backward


def bind(functional: Any, case: Case) -> Function:
    training = case.args.get("training", True)

    def call(t: dict[str, torch.Tensor]) -> torch.Tensor:
        state = t["running_mean"], t["running_var"]
        return functional.batch_norm(t["x"], *state, t["weight"], t["bias"], training, MOMENTUM, EPS)  # type: ignore[no-any-return]

    return call


def providers(case: Case) -> dict[str, Provider]:
    return standard_providers(bind, case) | flag_gems_aten(bind, case, "batch_norm", "batch_norm_backward")
