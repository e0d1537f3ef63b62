"""Losses that compare element by element: ``l(x, t)``, then nothing, their mean, or their sum.

    mse        (x - t)²                               bce         -(t log x + (1 - t) log(1 - x)), logarithms >= -100
    l1         |x - t|                                bce logits  (1 - t) x + (1 + (c - 1) t) log(1 + exp(-x))
    smooth l1  |x - t| - β/2; below β (x - t)²/(2β)   kl          t (log t - x); 0 where t is 0
    huber      δ (|x - t| - δ/2); below δ (x - t)²/2  kl, log t   exp(t) (t - x)

    x, t: n elements; y: as many, or one number, their sum over the count that a mean divides by

Every loss is one row of ``_LOSSES``: its number in csrc/common/elementwise_loss.h and, in plain torch, its truth.

What all share: Tensor[*] of float32, float64, bfloat16 or float16; computed in float32 (float64 for float64), also the
reductions, in the pass that reads the input: no tensor of losses is made for them; bitwise deterministic; gradients of
every order in input and target, forward mode, vmap and torch.compile; slopes at kinks are 0, as in torch. They raise
NotImplementedError for an input that is not floating point, ValueError for an unknown reduction.

Sources: torch.nn.functional; Girshick 2015 (smooth l1), https://arxiv.org/abs/1504.08083; Huber 1964,
https://doi.org/10.1214/aoms/1177703732. The gradients are derived in docs/math/losses.md.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..core import autocast, backend, check, library
from ..core.autograd import Formula, Tensors, differentiable
from ..core.intercept import route
from ..core.layout import from_memory_order, in_memory_order
from ..core.samples import Maker, Sample, checked

_kernels = library.triton_kernels("elementwise_loss")
_torch = torch.nn.functional


def _smooth_l1(x, t, c, a):
    d = (x - t).abs()
    return torch.where(d < a, 0.5 * d * d / a, d - 0.5 * a)


def _huber(x, t, c, a):
    d = (x - t).abs()
    return torch.where(d <= a, 0.5 * d * d, a * (d - 0.5 * a))


def _bce(x, t, c, a):
    return (t - 1) * torch.log1p(-x).clamp(min=-100) - t * torch.log(x).clamp(min=-100)


def _bce_with_logits(x, t, c, a):
    positive = 1 if c is None else 1 + (c - 1) * t
    return (1 - t) * x - positive * _torch.logsigmoid(x)


# name -> (number in csrc/common/elementwise_loss.h, the same in plain torch with parameter a and weights c)
_LOSSES: dict[str, tuple[int, Callable[..., torch.Tensor]]] = {
    "mse": (0, lambda x, t, c, a: (x - t) * (x - t)),
    "l1": (1, lambda x, t, c, a: (x - t).abs()),
    "smooth_l1": (2, _smooth_l1),
    "huber": (3, _huber),
    "bce": (4, _bce),
    "bce_with_logits": (5, _bce_with_logits),
    "kl_div": (6, lambda x, t, c, a: torch.xlogy(t, t) - t * x),
    "kl_div_log": (7, lambda x, t, c, a: t.exp() * (t - x)),
}
_TRUTH = dict(_LOSSES.values())


def _fwd_fake(x, t, c, kind, a, reduced, over):
    return x.new_empty(()) if reduced else torch.empty_like(x)


def _bwd_fake(dy, x, t, c, kind, a, reduced, over, need_dx, need_dt):
    return tuple(torch.empty_like(x) if need else x.new_empty(0) for need in (need_dx, need_dt))


# over: what the sum of all losses is divided by, where they are reduced: 1 for the sum itself
_fwd = library.declare(
    "elementwise_loss_fwd(Tensor x, Tensor t, Tensor? c, int kind, float a, bool reduced, SymInt over) -> Tensor",
    _fwd_fake,
    _kernels,
)
_bwd = library.declare(
    "elementwise_loss_bwd(Tensor dy, Tensor x, Tensor t, Tensor? c, int kind, float a, bool reduced, SymInt over, "
    "bool need_dx, bool need_dt) -> (Tensor, Tensor)",
    _bwd_fake,
    _kernels,
)


def _reference(x, t, c, kind, a, reduced, over):
    wide = check.accumulate_dtype(x.dtype)
    y = _TRUTH[kind](x.to(wide), t.to(wide), c if c is None else c.to(wide), a)
    return ((y.sum() / over if reduced else y).to(x.dtype),)


def _arguments(dy, inputs: Tensors, kept: Tensors, constants: Tensors, needs) -> Tensors:
    return dy, *inputs, *constants, needs[0], needs[1]


def _fold(forward, batch, dims, inputs, constants):
    """Elements are alone: a batch is more of them, unless they are summed."""
    if constants[2]:
        return None
    given = zip(inputs, dims)
    x, t, c = (v if v is None else v.expand(batch, *v.shape) if d is None else v.movedim(d, 0) for v, d in given)
    return forward(*(v if v is None else v.contiguous() for v in (x, t, c)), *constants), 0


_apply = differentiable(Formula(_fwd, _bwd, 3, 2, _arguments, _reference, _fold))


# Arguments


def _reduction(op: str, reduction: Any, size_average: Any = None, reduce: Any = None, more: tuple = ()) -> str:
    """The reduction, from torch's legacy arguments where they are given."""
    if size_average is not None or reduce is not None:
        return str(torch.nn._reduction.legacy_get_string(size_average, reduce))
    if reduction not in ("none", "mean", "sum", *more):
        names = ", ".join(repr(name) for name in ("none", "mean", "sum", *more))
        check.fail(ValueError, op, "reduction", repr(reduction), f"one of {names}")
    return str(reduction)


def _pair(op: str, input: Any, target: Any, same_size: bool) -> tuple[Any, Any]:
    """Both tensors in one shape and dtype, after autocast."""
    check.floating(op, "input", input)
    if not isinstance(target, torch.Tensor):
        check.fail(TypeError, op, "target", type(target).__name__, "a tensor")
    if target.device != input.device:
        check.fail(RuntimeError, op, "target", f"a tensor on {target.device}", f"one on {input.device}, as the input")
    if target.shape != input.shape:
        if same_size:
            check.fail(ValueError, op, "target", f"shape {list(target.shape)}", f"shape {list(input.shape)}")
        warnings.warn(
            f"{op}: argument 'target': got shape {list(target.shape)}, expected {list(input.shape)}: both are "
            "broadcast, which is seldom meant",
            stacklevel=3,
        )
        try:
            input, target = torch.broadcast_tensors(input, target)
        except RuntimeError:
            check.fail(RuntimeError, op, "target", f"shape {list(target.shape)}", f"one like {list(input.shape)}")
    x, t = autocast.cast(op, input, target)
    if x.dtype == t.dtype:  # type: ignore[union-attr]
        return x, t
    dtype = torch.promote_types(x.dtype, t.dtype)  # type: ignore[union-attr]
    return _as_dtype(x, dtype), _as_dtype(t, dtype)


def _as_dtype(t: Any, dtype: torch.dtype) -> torch.Tensor:
    """``t.to(dtype)``, whose call costs a microsecond where there is nothing to do."""
    return t if t.dtype == dtype else t.to(dtype)  # type: ignore[no-any-return]


def _as_lies(t: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """t contiguous, its dimensions taken in this order."""
    return t.contiguous() if isinstance(order, range) else t.permute(order).contiguous()


def _loss(
    op: str, name: str, x: torch.Tensor, t: torch.Tensor, reduction: str, a: float = 0.0,
    weight: torch.Tensor | None = None, c: torch.Tensor | None = None, over: torch.Tensor | int | None = None,
) -> torch.Tensor:  # fmt: skip
    """The reduced loss; ``weight`` multiplies the elements, ``over`` is what a mean divides by, if not their number."""
    kind, namespace = _LOSSES[name][0], backend.namespace_for(op, x)
    moved, order = in_memory_order(x)
    inputs = moved, _as_lies(t, order), None if c is None else _as_lies(c.to(x.dtype).expand(x.shape), order)
    if over is None:
        over = x.numel()
    if reduction == "sum":
        over = 1
    if reduction != "none" and weight is None:
        return _apply(namespace, *inputs, kind, a, True, over)  # type: ignore[no-any-return]
    y = from_memory_order(_apply(namespace, *inputs, kind, a, False, 1), order)
    y = y if weight is None else y * weight
    if reduction == "none":
        return y
    # torch's mean of no elements is NaN
    return _as_dtype(y.sum(dtype=check.accumulate_dtype(y.dtype)) / over, x.dtype)


def _weight(op: str, x: torch.Tensor, weight: Any, same_size: bool) -> torch.Tensor | None:
    """A weight that multiplies elements of x."""
    if weight is None:
        return None
    if not isinstance(weight, torch.Tensor):
        check.fail(TypeError, op, "weight", type(weight).__name__, "a tensor or None")
    if same_size and weight.shape != x.shape:
        check.fail(ValueError, op, "weight", f"shape {list(weight.shape)}", f"shape {list(x.shape)}, as the input")
    try:
        fits = torch.broadcast_shapes(weight.shape, x.shape) == x.shape
    except RuntimeError:
        fits = False
    if not fits:
        check.fail(RuntimeError, op, "weight", f"shape {list(weight.shape)}", f"one that broadcasts to {list(x.shape)}")
    return weight.to(x.dtype)


def _mean_over(weight: torch.Tensor | None) -> torch.Tensor | None:
    """Torch divides the weighted mean of mse and l1 by the sum of the weights."""
    return None if weight is None else weight.sum(dtype=check.accumulate_dtype(weight.dtype))


# The functions


def mse_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """``(x - t)²``; drops in for torch.nn.functional.mse_loss.

    Args:
        input, target: Tensor[*] of one shape; others are broadcast, with a warning.
        size_average, reduce: torch's legacy spelling of ``reduction``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        weight: Tensor[*] of the input's shape that multiplies the losses; the mean is then over its sum.

    Returns:
        A scalar, or with ``"none"`` a Tensor[*].
    """
    op = "mse_loss"
    x, t = _pair(op, input, target, False)
    w = _weight(op, input, weight, True)
    return _loss(op, "mse", x, t, _reduction(op, reduction, size_average, reduce), weight=w, over=_mean_over(w))


def l1_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """``|x - t|``; drops in for torch.nn.functional.l1_loss. Arguments as of ``mse_loss``."""
    op = "l1_loss"
    x, t = _pair(op, input, target, False)
    w = _weight(op, input, weight, True)
    return _loss(op, "l1", x, t, _reduction(op, reduction, size_average, reduce), weight=w, over=_mean_over(w))


def smooth_l1_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
) -> torch.Tensor:
    """``|x - t| - β/2``, rounded off below β; drops in for torch.nn.functional.smooth_l1_loss.

    Args:
        input, target, size_average, reduce, reduction: as of ``mse_loss``.
        beta: where the parabola ends, >= 0; 0 is ``l1_loss``.

    Raises:
        RuntimeError: a negative beta.
    """
    op = "smooth_l1_loss"
    x, t = _pair(op, input, target, False)
    if not beta >= 0:
        check.fail(RuntimeError, op, "beta", beta, "a number >= 0")
    how = _reduction(op, reduction, size_average, reduce)
    return _loss(op, "smooth_l1", x, t, how, float(beta)) if beta else _loss(op, "l1", x, t, how)


def huber_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """``(x - t)²/2``, a line beyond δ; drops in for torch.nn.functional.huber_loss.

    Args:
        input, target, reduction, weight: as of ``mse_loss``, but the mean is over all elements, whatever their weights.
        delta: where the parabola ends, > 0.

    Raises:
        RuntimeError: delta <= 0.
    """
    op = "huber_loss"
    x, t = _pair(op, input, target, False)
    if not delta > 0:
        check.fail(RuntimeError, op, "delta", delta, "a number > 0")
    w = _weight(op, input, weight, True)
    return _loss(op, "huber", x, t, _reduction(op, reduction), float(delta), weight=w)


def binary_cross_entropy(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """``-(t log x + (1 - t) log(1 - x))``; drops in for torch.nn.functional.binary_cross_entropy.

    Args:
        input: Tensor[*], probabilities; logarithms below -100 count as -100, in the gradient of the target too.
        target: Tensor[*] of the same shape, numbers in [0, 1].
        weight: broadcasts to the input and multiplies the losses; the mean is over all elements.
        size_average, reduce, reduction: as of ``mse_loss``.

    Raises:
        RuntimeError: probabilities outside [0, 1] or NaN, on the CPU; on a GPU they give NaN.
        ValueError: a target of another shape.
    """
    op = "binary_cross_entropy"
    if input.is_cuda and torch.is_autocast_enabled("cuda"):
        check.fail(RuntimeError, op, "input", "an autocast context", "none, or binary_cross_entropy_with_logits in it")
    x, t = _pair(op, input, target, True)
    w = _weight(op, x, weight, False)
    y = _loss(op, "bce", x, t, _reduction(op, reduction, size_average, reduce), weight=w)
    plain = not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()
    # beside a number that is no probability the loss is NaN: only then are they looked through
    if x.device.type == "cpu" and plain and math.isnan(y.detach().sum().item() if y.dim() else y.item()) and x.numel():
        low, high = (v.item() for v in x.detach().aminmax())
        if not (low >= 0 and high <= 1):  # a NaN neither
            check.fail(RuntimeError, op, "input", f"numbers from {low} to {high}", "probabilities in [0, 1]")
    return y


def binary_cross_entropy_with_logits(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy of ``sigmoid(x)`` without overflow; as torch.nn.functional.binary_cross_entropy_with_logits.

    Args:
        input: Tensor[*], logits.
        target: Tensor[*] of the same shape, numbers in [0, 1].
        weight: broadcasts to the input and multiplies the losses; the mean is over all elements.
        size_average, reduce, reduction: as of ``mse_loss``.
        pos_weight: broadcasts to the input and multiplies the part of positive targets.

    Raises:
        ValueError: a target of another shape.
        RuntimeError: weights that do not broadcast; a pos_weight that requires a gradient.
    """
    op = "binary_cross_entropy_with_logits"
    x, t = _pair(op, input, target, True)
    w, c = _weight(op, x, weight, False), _weight(op, x, pos_weight, False)
    if c is not None and c.requires_grad and torch.is_grad_enabled():
        check.fail(RuntimeError, op, "pos_weight", "a tensor that requires a gradient", "one that does not")
    return _loss(op, "bce_with_logits", x, t, _reduction(op, reduction, size_average, reduce), weight=w, c=c)


def kl_div(
    input: torch.Tensor,
    target: torch.Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> torch.Tensor:
    """``t (log t - x)``, x log-probabilities; drops in for torch.nn.functional.kl_div.

    Args:
        input: Tensor[*], log-probabilities of the model.
        target: Tensor[*], probabilities, or their logarithms.
        size_average, reduce: as of ``mse_loss``.
        reduction: ``"none"``, ``"sum"``, ``"batchmean"`` (over the first dimension, the divergence itself) or
            ``"mean"`` (over all elements).
        log_target: ``target`` holds logarithms.
    """
    op = "kl_div"
    how = _reduction(op, reduction, size_average, reduce, ("batchmean",))
    check.floating(op, "input", input)
    # as torch, of the input before it is broadcast
    over = input.shape[0] if how == "batchmean" and input.dim() else None
    if isinstance(target, torch.Tensor) and target.shape != input.shape and target.device == input.device:
        try:
            input, target = torch.broadcast_tensors(input, target)
        except RuntimeError:
            check.fail(RuntimeError, op, "target", f"shape {list(target.shape)}", f"one like {list(input.shape)}")
    x, t = _pair(op, input, target, False)
    how = "sum" if how == "batchmean" and over is None else how
    return _loss(op, "kl_div_log" if log_target else "kl_div", x, t, how, over=over)


# The modules


class MSELoss(torch.nn.MSELoss):
    """torch.nn.MSELoss whose forward is pyops.functional.mse_loss."""

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return mse_loss(input, target, reduction=self.reduction)


class L1Loss(torch.nn.L1Loss):
    """torch.nn.L1Loss whose forward is pyops.functional.l1_loss."""

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return l1_loss(input, target, reduction=self.reduction)


class SmoothL1Loss(torch.nn.SmoothL1Loss):
    """torch.nn.SmoothL1Loss whose forward is pyops.functional.smooth_l1_loss."""

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return smooth_l1_loss(input, target, reduction=self.reduction, beta=self.beta)


class HuberLoss(torch.nn.HuberLoss):
    """torch.nn.HuberLoss whose forward is pyops.functional.huber_loss."""

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return huber_loss(input, target, reduction=self.reduction, delta=self.delta)


class BCELoss(torch.nn.BCELoss):
    """torch.nn.BCELoss whose forward is pyops.functional.binary_cross_entropy."""

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return binary_cross_entropy(input, target, self.weight, reduction=self.reduction)


class BCEWithLogitsLoss(torch.nn.BCEWithLogitsLoss):
    """torch.nn.BCEWithLogitsLoss whose forward is pyops.functional.binary_cross_entropy_with_logits."""

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return binary_cross_entropy_with_logits(
            input, target, self.weight, reduction=self.reduction, pos_weight=self.pos_weight
        )


class KLDivLoss(torch.nn.KLDivLoss):
    """torch.nn.KLDivLoss whose forward is pyops.functional.kl_div."""

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return kl_div(input, target, reduction=self.reduction, log_target=self.log_target)


_FUNCTIONS = (
    mse_loss, l1_loss, smooth_l1_loss, huber_loss, binary_cross_entropy, binary_cross_entropy_with_logits, kl_div,
)  # fmt: skip
for _function in _FUNCTIONS:
    route((getattr(_torch, _function.__name__),), _function.__name__, _function)


# Samples


def _apart(shape, kind="real", **how):
    """Input and target whose difference keeps clear of kinks; probabilities where the loss wants them."""

    def make(t: Maker):
        x, target = t.input(shape), t.input(shape)
        with torch.no_grad():
            if kind == "probabilities":
                for v in (x, target):
                    v.copy_((v.double().sigmoid() * 16).round() / 18 + 1 / 18)
            elif kind != "real":
                target.copy_((target.double().sigmoid() * 16).round() / 18 + 1 / 18)
        more = {k: t.constant(v, positive=True) for k, v in how.items() if isinstance(v, tuple)}
        return (x, target), how | more

    return make


def _bce_truth(input, target, **how):
    """torch's own gradient in the target is not differentiable, and is that of log x - log(1 - x) in the dtype of x."""
    wide = check.accumulate_dtype(input.dtype)
    y = _bce(input.to(wide), target.to(wide), None, 0.0)
    y = y if how.get("weight") is None else y * how["weight"].to(wide)
    reduction = how.get("reduction", "mean")
    return (y if reduction == "none" else getattr(y, reduction)()).to(input.dtype)


for _function, _kind, _how in (
    (mse_loss, "real", {}),
    (l1_loss, "real", {}),
    (smooth_l1_loss, "real", {"beta": 0.7}),
    (huber_loss, "real", {"delta": 0.7}),
    (binary_cross_entropy, "probabilities", {}),
    (binary_cross_entropy_with_logits, "target", {"pos_weight": (7,)}),
    (kl_div, "target", {"log_target": False}),
):
    checked(
        _function.__name__,
        _function,
        _bce_truth if _function is binary_cross_entropy else getattr(_torch, _function.__name__),
        Sample("mean, tail of a vector", _apart((3, 7), _kind, **_how), derivatives=True),
        Sample("each", _apart((5, 7), _kind, reduction="none"), derivatives=True),
        Sample("sum of several blocks", _apart((3, 4099), _kind, reduction="sum")),
        Sample("no elements", _apart((0, 7), _kind, reduction="sum")),
    )
