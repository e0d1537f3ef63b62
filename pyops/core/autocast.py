"""What each op does under torch.autocast, in one table; the same as torch on each device."""

from __future__ import annotations

import torch

HALF = (torch.float16, torch.bfloat16)

# op -> device types on which autocast runs it in float32. Elsewhere, or not listed, it keeps its dtype.
FLOAT32_ON: dict[str, tuple[str, ...]] = {
    "layer_norm": ("cuda",),
    "rms_norm": ("cuda",),
    "group_norm": ("cuda",),
    "batch_norm": (),
    "instance_norm": (),
    "log_softmax": ("cuda",),
    "softmax": ("cuda",),
    "softmin": ("cuda",),
    "softplus": ("cuda",),
    **dict.fromkeys(("cross_entropy", "nll_loss", "linear_cross_entropy"), ("cpu", "cuda")),
    **dict.fromkeys((f"{name}_loss" for name in ("mse", "l1", "smooth_l1", "huber", "multi_margin")), ("cpu", "cuda")),
    **dict.fromkeys(("binary_cross_entropy_with_logits", "kl_div"), ("cpu", "cuda")),
    "binary_cross_entropy": ("cpu",),
    **dict.fromkeys((f"{kind}_pool3d" for kind in ("max", "avg", "lp", "adaptive_max", "adaptive_avg")), ("cpu",)),
    **dict.fromkeys((f"max_unpool{n}d" for n in (1, 2, 3)), ("cpu",)),
    **dict.fromkeys((f"fractional_max_pool{n}d" for n in (2, 3)), ("cpu",)),
    "grid_sample": ("cpu",),
}

# op -> device types on which autocast runs it in its low precision: what torch counts with the matrix products.
LOW_ON: dict[str, tuple[str, ...]] = {
    **{f"{name}{n}d": ("cpu", "cuda") for name in ("conv", "conv_transpose") for n in (1, 2, 3)},
    "conv2d_act": ("cpu", "cuda"),
    "depthwise_conv": ("cpu", "cuda"),
    "prelu": ("cpu", "cuda"),
    "linear": ("cpu", "cuda"),
    "affine_grid": ("cpu", "cuda"),
    **dict.fromkeys(("lstm", "rnn_tanh", "rnn_relu"), ("cpu", "cuda")),
    # On the CPU torch's oneDNN runs a plain LSTM in low precision; where it runs step by step, states keep their dtype.
    **dict.fromkeys(("lstm_by_steps", "gru"), ("cuda",)),
    **dict.fromkeys(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), ("cuda",)),
}


def enabled(t: torch.Tensor) -> bool:
    """Is autocast active for the device of t? Never for a tensor without memory."""
    device = t.device.type
    return torch._C._is_any_autocast_enabled() and device != "meta" and torch.is_autocast_enabled(device)


def cast(op: str, x: torch.Tensor, *others: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The arguments of ``op`` in the dtype that the active autocast context asks for."""
    if not torch._C._is_any_autocast_enabled():
        return (x, *others)
    device = x.device.type
    single, low = device in FLOAT32_ON.get(op, ()), device in LOW_ON.get(op, ())
    if not (single or low) or not torch.is_autocast_enabled(device):
        return (x, *others)
    dtype, of = (torch.float32, HALF) if single else (torch.get_autocast_dtype(device), (*HALF, torch.float32))
    return tuple(t.to(dtype) if isinstance(t, torch.Tensor) and t.dtype in of else t for t in (x, *others))


def lower(x: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Tensors of a matrix-like op in the low precision that the active autocast context asks for; float64 stays."""
    if not enabled(x):
        return (x, *others)
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(t.to(dtype) if t.dtype in (*HALF, torch.float32) else t for t in (x, *others))
