"""group_norm and instance_norm: one statistic per image and group of channels."""

from typing import Any

import torch

from .case import Case, Function, Provider, Unavailable, with_both_directions
from .peers import flag_gems_aten, gpu_peers, imported, standard_providers

STEM = "group_norm"
OPS = ("group_norm", "instance_norm")
EPS = 1e-5


def group(shape: tuple[int, ...], groups: int, **fields: Any) -> Case:
    return Case("group_norm", shape, args={"groups": groups}, **fields)


def instance(shape: tuple[int, ...], **fields: Any) -> Case:
    return Case("instance_norm", shape, **fields)


def cases(device: str) -> list[Case]:
    if device == "cpu":
        return with_both_directions([
            instance((8, 64, 128, 128), quick=True),
            group((8, 64, 128, 128), 32),
            group((8, 64, 128, 128), 32, channels_last=True),
            group((16, 256, 14, 14), 32, quick=True),
        ])  # fmt: skip
    bf16 = {"dtype": torch.bfloat16, "device": device}
    return with_both_directions([
        group((64, 256, 56, 56), 32, quick=True, **bf16),
        group((64, 256, 56, 56), 32, channels_last=True, **bf16),
        group((1, 128, 20, 256, 256), 32, **bf16),
        instance((8, 64, 256, 256), **bf16),
        instance((8, 64, 256, 256), device=device),
    ])  # fmt: skip


def tiny(device: str) -> list[Case]:
    return [
        group((2, 6, 5, 7), 3, device=device, backward=True),
        group((2, 6, 5, 7), 3, device=device, backward=True, channels_last=True),
        group((1, 4, 60, 60), 2, device=device, backward=True),
        instance((2, 3, 5, 7), device=device, backward=True),
        group((3, 6, 8, 8), 2, device=device, backward=True),
        group((64, 4, 16, 16), 1, device=device, backward=True),
    ]


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    return {"weight": case.shape[1:2], "bias": case.shape[1:2]}


def bytes(case: Case) -> int:
    """One read and one write of the image forward; dy, x → dx backward."""
    return (2 + 3 * case.backward) * case.numel * case.dtype.itemsize


def flops(case: Case) -> int:
    """Forward: sum 1, centred square sum 3, scale and shift 2; backward: dy·w 1, two sums 5, dx 5, dw and db 3."""
    return case.numel * (6 + 14 * case.backward)


def traffic(case: Case) -> tuple[int, int]:
    """Groups of up to 128 KB, backward 56 KB, stay in registers; larger ones, and channels last, are read twice."""
    groups = case.args.get("groups", case.shape[1])
    size = case.dtype.itemsize
    group = case.numel // (case.shape[0] * groups) * size
    few = case.shape[0] * groups < 64
    forward = int(case.channels_last or few or group > 128 << 10)
    backward = 2 * int(case.channels_last or few or group > 56 << 10) * case.backward
    launches = 1 + 2 * forward + case.backward * (3 + backward)
    return bytes(case) + (forward + backward) * case.numel * size, launches


def bind(functional: Any, case: Case) -> Function:
    if case.op == "instance_norm":
        return lambda t: functional.instance_norm(t["x"], None, None, t["weight"], t["bias"], True, 0.1, EPS)
    return lambda t: functional.group_norm(t["x"], case.args["groups"], t["weight"], t["bias"], EPS)


def liger(case: Case) -> Function:
    if case.channels_last:
        raise Unavailable("liger-kernel: contiguous input only")
    group_norm = imported("liger_kernel.transformers.functional", "liger_group_norm")
    channels = case.shape[1]
    groups = case.args.get("groups", channels)
    return lambda t: group_norm(t["x"], t["weight"], t["bias"], channels, groups, EPS)


def providers(case: Case) -> dict[str, Provider]:
    ops = ("group_norm", "group_norm_backward", "batch_norm", "batch_norm_backward")
    return (
        standard_providers(bind, case)
        | gpu_peers(case, liger_kernel=lambda: liger(case))
        | flag_gems_aten(bind, case, *ops)
    )
