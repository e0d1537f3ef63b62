"""Sigmoid focal loss: cross-entropy that counts easy examples less.

    p = σ(x)      ce = -t log p - (1 - t) log(1 - p)      m = 1 - p_t = p + t - 2 p t
    y = α_t m^γ ce,  α_t = α t + (1 - α)(1 - t), 1 where α = -1

    x, t, y: any shape

Source: Lin et al. 2017, https://arxiv.org/abs/1708.02002; torchvision.ops.sigmoid_focal_loss. The gradients are
derived in docs/math/detection.md.
"""

from __future__ import annotations

import torch

from ..core import backend, check, library
from ..core.autograd import Formula, Tensors, differentiable
from ..core.samples import Maker, Sample, checked

_torch = torch.nn.functional

_kernels = library.triton_kernels("focal_loss")


def _fwd_fake(x, t, alpha, gamma):
    return torch.empty_like(x)


def _bwd_fake(dy, x, t, alpha, gamma, need_dt):
    return torch.empty_like(x), torch.empty_like(x) if need_dt else x.new_empty(0)


_fwd = library.declare("focal_loss_fwd(Tensor x, Tensor t, float alpha, float gamma) -> Tensor", _fwd_fake, _kernels)
_bwd = library.declare(
    "focal_loss_bwd(Tensor dy, Tensor x, Tensor t, float alpha, float gamma, bool need_dt) -> (Tensor, Tensor)",
    _bwd_fake,
    _kernels,
)


def _reference(x, t, alpha, gamma):
    wide = check.accumulate_dtype(x.dtype)
    x_, t_ = x.to(wide), t.to(wide)
    p = torch.sigmoid(x_)
    ce = (1 - t_) * x_ - _torch.logsigmoid(x_)  # smooth at 0 too, which max(x, 0) and |x| are not for autograd
    loss = ce * (p + t_ - 2 * p * t_).clamp(min=0) ** gamma
    if alpha >= 0:
        loss = (alpha * t_ + (1 - alpha) * (1 - t_)) * loss
    return (loss.to(x.dtype),)


def _backward_arguments(dy, inputs: Tensors, kept: Tensors, constants: Tensors, needs) -> Tensors:
    return dy, *inputs, *constants, needs[1]


def _fold(forward, batch, dims, inputs, constants):
    """Elements are alone: a batch is more of them."""
    x, t = (v if d is None else v.movedim(d, 0) for v, d in zip(inputs, dims))
    x, t = (v.expand(batch, v.shape[-1]) for v in (x, t))
    y = forward(x.reshape(-1), t.reshape(-1), *constants)
    return ((y[0] if isinstance(y, tuple) else y).reshape(batch, -1),), (0,)


_apply = differentiable(Formula(_fwd, _bwd, 2, 2, _backward_arguments, _reference, _fold))


def sigmoid_focal_loss(
    inputs: torch.Tensor, targets: torch.Tensor, alpha: float = 0.25, gamma: float = 2, reduction: str = "none"
) -> torch.Tensor:
    """Focal loss of logits; drops in for torchvision.ops.sigmoid_focal_loss.

    Args:
        inputs: Tensor[*], logits.
        targets: Tensor[*] of the same shape, 0 for the negative class and 1 for the positive one.
        alpha: weight of positive against negative examples in [0, 1], or -1 for none.
        gamma: exponent of ``1 - p_t``, >= 0.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    Returns:
        Tensor[*], or a scalar, in the dtype of the inputs.

    Raises:
        ValueError: alpha outside [0, 1] and not -1, a negative gamma, an unknown reduction.
        RuntimeError: targets of another shape.

    Computed in float32 (float64 for float64). Bitwise deterministic. Gradients of every order in both arguments.
    """
    op = "sigmoid_focal_loss"
    check.floating(op, "inputs", inputs)
    if not isinstance(targets, torch.Tensor) or targets.shape != inputs.shape or targets.device != inputs.device:
        got = f"shape {list(targets.shape)}" if isinstance(targets, torch.Tensor) else type(targets).__name__
        check.fail(RuntimeError, op, "targets", got, f"shape {list(inputs.shape)} on {inputs.device}, as the inputs")
    if not (0 <= alpha <= 1) and alpha != -1:
        check.fail(ValueError, op, "alpha", alpha, "a number in [0, 1], or -1")
    check.non_negative(op, "gamma", gamma)
    if reduction not in ("none", "mean", "sum"):
        check.fail(ValueError, op, "reduction", repr(reduction), "'none', 'mean' or 'sum'")
    x, t = inputs.contiguous().reshape(-1), targets.to(inputs.dtype).contiguous().reshape(-1)
    y = _apply(backend.namespace_for(op, inputs), x, t, float(alpha), float(gamma))
    y = (y[0] if isinstance(y, tuple) else y).reshape(inputs.shape)
    return y if reduction == "none" else y.mean() if reduction == "mean" else y.sum()


def _sample(shape, scale=1.0, zeros=0, **how):
    def make(t: Maker):
        x = t.input(shape)
        target = t.input(shape)
        with torch.no_grad():
            x.mul_(scale).view(-1)[:zeros] = 0
            target.copy_((target.double().sigmoid() * 4).round() / 4 * 0.5 + 0.25)
        return (x, target), how

    return make


def _truth(inputs, targets, alpha=0.25, gamma=2, reduction="none"):
    y = _reference(inputs, targets, alpha, gamma)[0]
    return y if reduction == "none" else getattr(y, reduction)()


checked(
    "sigmoid_focal_loss",
    sigmoid_focal_loss,
    _truth,
    Sample("as in the paper", _sample((3, 5)), derivatives=True),
    Sample("another power, no alpha", _sample((7,), alpha=-1, gamma=1.5), derivatives=True),
    Sample("logits of exactly 0", _sample((6,), zeros=3), derivatives=True),
    Sample("mean, tail of a vector", _sample((3, 35), reduction="mean", alpha=0.75, gamma=3)),
    Sample("gamma 0 and 1, sum", _sample((2, 9), reduction="sum", gamma=1)),
    Sample("plain cross-entropy", _sample((17,), gamma=0, alpha=-1)),
    Sample("large logits", _sample((4, 9), 32.0)),
    Sample("no elements", _sample((0, 3))),
)
