"""What each op does under torch.autocast, in one table; the same as torch on each device."""

from __future__ import annotations

import torch

# op -> device types on which autocast runs it in float32. Elsewhere it runs in the dtype it is given.
FLOAT32_ON: dict[str, tuple[str, ...]] = {
    "layer_norm": ("cuda",),
    "rms_norm": ("cuda",),
    "group_norm": ("cuda",),
    "batch_norm": (),
    "instance_norm": (),
}


def cast(op: str, x: torch.Tensor, *others: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The arguments of ``op`` in the dtype that the active autocast context asks for."""
    if not torch._C._is_any_autocast_enabled():
        return (x, *others)
    device = x.device.type
    if device not in FLOAT32_ON[op] or not torch.is_autocast_enabled(device):
        return (x, *others)
    return tuple(
        t.float() if isinstance(t, torch.Tensor) and t.dtype in (torch.float16, torch.bfloat16) else t
        for t in (x, *others)
    )
