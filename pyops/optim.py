"""The optimizers of torch.optim and the gradient clipping of torch.nn.utils, on pyops kernels."""

from .ops.optim import (
    SGD,
    Adagrad,
    Adam,
    AdamW,
    RMSprop,
    clip_grad_norm_,
    clip_grad_value_,
    ema_,
    get_ema_multi_avg_fn,
    get_total_norm,
)

__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "RMSprop",
    "clip_grad_norm_",
    "clip_grad_value_",
    "ema_",
    "get_ema_multi_avg_fn",
    "get_total_norm",
]
