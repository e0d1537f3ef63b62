"""Optimizers that update all parameters of a group in one launch, gradient clipping, averages of weights.

    p, states <- rule(p, g, states)        for every element of every parameter

    SGD       v <- μ v + (1 - d) g                          p <- p - η v
    Adagrad   s <- s + g²                                   p <- p - η g / (√s + ε)
    RMSprop   v <- α v + (1 - α) g²                         p <- p - η g / (√v + ε)
    Adam      m <- β₁ m + (1 - β₁) g, v <- β₂ v + (1 - β₂) g²   p <- p - η m̂ / (√v̂ + ε)

Sources: torch.optim, whose arguments, states and trajectories these are; Kingma, Ba 2015 (Adam), Loshchilov, Hutter
2019 (AdamW), Reddi et al. 2018 (amsgrad), Duchi et al. 2011 (Adagrad), Sutskever et al. 2013 (momentum).
The rules with all their options are derived in docs/math/optimizers.md.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..core import backend, check, library
from ..core.multi_tensor import Flat, by_kind, strides_fit, total_norm
from ..core.optimizer import COMMON, DROPS_IN, Batch, MultiTensorOptimizer

_kernels = library.triton_kernels("optim")


def _nothing(*_: Any) -> None:
    return None


_sgd = library.declare(
    "sgd_step(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] momentum_buffers, Tensor(d!)[] masters,"
    f" {COMMON}, float momentum, float dampening, float weight_decay, bool nesterov, bool first) -> ()",
    _nothing,
    _kernels,
)
_adagrad = library.declare(
    "adagrad_step(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] sums, Tensor(d!)[] masters,"
    f" Tensor(e!)[] steps, bool steps_on_device, {COMMON}, float lr_decay, float weight_decay, float eps) -> ()",
    _nothing,
    _kernels,
)
_rmsprop = library.declare(
    "rmsprop_step(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] square_avgs, Tensor(d!)[] momentum_buffers,"
    f" Tensor(e!)[] grad_avgs, Tensor(f!)[] masters, Tensor(g!)[] steps, bool steps_on_device, {COMMON},"
    " float alpha, float eps, float weight_decay, float momentum, bool centered) -> ()",
    _nothing,
    _kernels,
)
_adam = library.declare(
    "adam_step(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs,"
    f" Tensor(e!)[] max_exp_avg_sqs, Tensor(f!)[] masters, Tensor(g!)[] steps, bool steps_on_device, {COMMON},"
    " float beta1, float beta2, float eps, float weight_decay, bool amsgrad, bool decoupled) -> ()",
    _nothing,
    _kernels,
)
_scale = library.declare(
    "multi_scale(Tensor(a!)[] tensors, Tensor total_norm, float max_norm) -> ()", _nothing, _kernels
)
_clamp = library.declare("multi_clamp(Tensor(a!)[] tensors, float bound) -> ()", _nothing, _kernels)
_lerp = library.declare(
    "multi_lerp(Tensor(a!)[] averages, Tensor[] values, float weight) -> ()", _nothing, _kernels
)  # fmt: skip


# The optimizers


class SGD(MultiTensorOptimizer, torch.optim.SGD):
    __doc__ = (
        """Stochastic gradient descent with momentum: ``v <- μ v + (1 - d) g``, ``p <- p - η v``.\n"""
        + DROPS_IN.format(name="SGD")
    )
    _torch = torch.optim.SGD

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        master_weights: bool = False,
        max_norm: float | None = None,
    ) -> None:
        super().__init__(
            params, lr, momentum, dampening, weight_decay, nesterov,
            maximize=maximize, foreach=foreach, differentiable=differentiable, fused=fused,
        )  # fmt: skip
        self._extend(master_weights, max_norm)

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] != 0 else ()

    def _counts_steps(self) -> bool:
        return False

    def _call(self, group: dict[str, Any], batch: Batch, common: tuple[Any, ...]) -> None:
        _sgd(
            backend.namespace_for("sgd_step", batch.params[0]),
            batch.params, batch.grads, batch.states.get("momentum_buffer", []), batch.masters, *common,
            float(group["momentum"]), float(group["dampening"]), float(group["weight_decay"]),
            bool(group["nesterov"]), batch.first,
        )  # fmt: skip


class Adagrad(MultiTensorOptimizer, torch.optim.Adagrad):
    __doc__ = (
        """Gradients divided by the root of the sum of their squares: ``s <- s + g²``, ``p <- p - η g / (√s + ε)``.\n"""
        + DROPS_IN.format(name="Adagrad")
    )
    _torch = torch.optim.Adagrad

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        master_weights: bool = False,
        max_norm: float | None = None,
    ) -> None:
        super().__init__(
            params, lr, lr_decay, weight_decay, initial_accumulator_value, eps, foreach,
            maximize=maximize, differentiable=differentiable, fused=fused,
        )  # fmt: skip
        self._extend(master_weights, max_norm)

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("sum",)

    def _new_state(self, group: dict[str, Any], name: str, like: torch.Tensor) -> torch.Tensor:
        start = group["initial_accumulator_value"]
        value = complex(start, start) if like.is_complex() else start
        return torch.full_like(like, value, memory_format=torch.preserve_format)

    def _call(self, group: dict[str, Any], batch: Batch, common: tuple[Any, ...]) -> None:
        _adagrad(
            backend.namespace_for("adagrad_step", batch.params[0]),
            batch.params, batch.grads, batch.states["sum"], batch.masters, *self._counted(group, batch), *common,
            float(group["lr_decay"]), float(group["weight_decay"]), float(group["eps"]),
        )  # fmt: skip


class RMSprop(MultiTensorOptimizer, torch.optim.RMSprop):
    __doc__ = (
        """Gradients over the root of their mean square: ``v <- α v + (1 - α) g²``, ``p <- p - η g / (√v + ε)``.\n"""
        + DROPS_IN.format(name="RMSprop")
    )
    _torch = torch.optim.RMSprop

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        master_weights: bool = False,
        max_norm: float | None = None,
    ) -> None:
        super().__init__(
            params, lr, alpha, eps, weight_decay, momentum, centered, capturable, foreach, maximize, differentiable
        )
        self._extend(master_weights, max_norm)

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        names = ["square_avg"]
        if group["momentum"] > 0:
            names.append("momentum_buffer")
        if group["centered"]:
            names.append("grad_avg")
        return tuple(names)

    def _call(self, group: dict[str, Any], batch: Batch, common: tuple[Any, ...]) -> None:
        states = batch.states
        _rmsprop(
            backend.namespace_for("rmsprop_step", batch.params[0]),
            batch.params, batch.grads, states["square_avg"], states.get("momentum_buffer", []),
            states.get("grad_avg", []), batch.masters, *self._counted(group, batch), *common,
            float(group["alpha"]), float(group["eps"]), float(group["weight_decay"]), float(group["momentum"]),
            bool(group["centered"]),
        )  # fmt: skip


class _AdamStep(MultiTensorOptimizer):
    """What Adam and AdamW share."""

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg", "exp_avg_sq")

    def _call(self, group: dict[str, Any], batch: Batch, common: tuple[Any, ...]) -> None:
        states = batch.states
        beta1, beta2 = group["betas"]
        _adam(
            backend.namespace_for("adam_step", batch.params[0]),
            batch.params, batch.grads, states["exp_avg"], states["exp_avg_sq"], states.get("max_exp_avg_sq", []),
            batch.masters, *self._counted(group, batch), *common,
            float(beta1), float(beta2), float(group["eps"]), float(group["weight_decay"]),
            bool(group["amsgrad"]), bool(group["decoupled_weight_decay"]),
        )  # fmt: skip


class Adam(_AdamStep, torch.optim.Adam):
    __doc__ = (
        """Adam: averages of gradient and square, ``p <- p - η m̂ / (√v̂ + ε)``, with L2 or decoupled weight decay.\n"""
        + DROPS_IN.format(name="Adam")
    )
    _torch = torch.optim.Adam

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        master_weights: bool = False,
        max_norm: float | None = None,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad,
            foreach=foreach, maximize=maximize, capturable=capturable, differentiable=differentiable, fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )  # fmt: skip
        self._extend(master_weights, max_norm)


class AdamW(_AdamStep, torch.optim.AdamW):
    __doc__ = """Adam with decoupled weight decay: ``p <- (1 - η λ) p - η m̂ / (√v̂ + ε)``.\n""" + DROPS_IN.format(
        name="AdamW"
    )
    _torch = torch.optim.AdamW

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        master_weights: bool = False,
        max_norm: float | None = None,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad,
            maximize=maximize, foreach=foreach, capturable=capturable, differentiable=differentiable, fused=fused,
        )  # fmt: skip
        self._extend(master_weights, max_norm)


# Clipping


def _gradients(parameters: Any) -> list[torch.Tensor]:
    if isinstance(parameters, torch.Tensor):
        parameters = [parameters]
    empty = isinstance(parameters, types.GeneratorType)
    parameters = list(parameters)
    if empty and not parameters:
        warnings.warn("`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=3)
    return [p.grad for p in parameters if p.grad is not None]


@torch.no_grad()
def get_total_norm(
    tensors: torch.Tensor | Iterable[torch.Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> torch.Tensor:
    """The norm of all tensors as if they were one vector; drops in for torch.nn.utils.get_total_norm.

    Args:
        tensors: a tensor or several, of any shapes, floating or complex.
        norm_type: order; 1, 2 and infinity in one pass and one call, others by torch.
        error_if_nonfinite: raise where the norm is NaN or infinite; waits for the device.
        foreach: taken for the sake of the signature.

    Returns:
        Tensor [], in the common dtype of the tensors. Summed in float32 over 16384 elements, in float64 beyond;
        deterministic.

    Raises:
        RuntimeError: a norm that is not finite, where ``error_if_nonfinite``.
        NotImplementedError: a dtype without kernels.
    """
    tensors = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
    if not tensors:
        return torch.tensor(0.0)
    return _finite_norm("get_total_norm", tensors, float(norm_type), error_if_nonfinite).to(_norm_dtype(tensors))


def _finite_norm(op: str, tensors: list[torch.Tensor], order: float, error_if_nonfinite: bool) -> torch.Tensor:
    total = total_norm(op, tensors, order)
    if error_if_nonfinite and not bool(torch.isfinite(total)):
        got = f"gradients of norm {total.item()}"
        check.fail(RuntimeError, op, "error_if_nonfinite", got, f"a finite norm of order {order}")
    return total


def _norm_dtype(tensors: list[torch.Tensor]) -> torch.dtype:
    dtype = tensors[0].dtype
    for t in tensors[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
    return dtype.to_real() if dtype.is_complex else dtype


@torch.no_grad()
def clip_grad_norm_(
    parameters: torch.Tensor | Iterable[torch.Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> torch.Tensor:
    """``g <- min(1, max_norm / (‖all g‖ + 1e-6)) g``; drops in for torch.nn.utils.clip_grad_norm_.

    On the CPU gradients that are short enough are not touched; on a GPU nothing waits for the norm.

    Args:
        parameters: a tensor or several, whose ``grad`` is scaled in place.
        max_norm: bound of the norm.
        norm_type, error_if_nonfinite, foreach: as for ``get_total_norm``.

    Returns:
        Tensor []: the norm before.

    Raises:
        RuntimeError: a norm that is not finite, where ``error_if_nonfinite``.
    """
    grads = _gradients(parameters)
    if any(g.layout is not torch.strided for g in grads):
        check.fail(RuntimeError, "clip_grad_norm_", "parameters", "a sparse gradient", "dense ones")
    if not grads:
        return torch.tensor(0.0)
    total = _finite_norm("clip_grad_norm_", grads, float(norm_type), error_if_nonfinite)
    for (alike,) in by_kind("clip_grad_norm_", grads):
        flat = Flat()
        scaled = [flat(t)[0] for t in alike]
        there = total.to(alike[0].device)
        _scale(backend.namespace_for("multi_scale", alike[0]), scaled, there, float(max_norm))
        flat.restore()
    return total.to(_norm_dtype(grads))


@torch.no_grad()
def clip_grad_value_(
    parameters: torch.Tensor | Iterable[torch.Tensor], clip_value: float, foreach: bool | None = None
) -> None:
    """``g <- min(max(g, -clip_value), clip_value)``; drops in for torch.nn.utils.clip_grad_value_. NaN stays.

    Args:
        parameters: a tensor or several, whose ``grad`` is clamped in place.
        clip_value: bound of every entry.
        foreach: taken for the sake of the signature.
    """
    grads = _gradients(parameters)
    for (alike,) in by_kind("clip_grad_value_", grads):
        if alike[0].is_complex():
            check.fail(NotImplementedError, "clip_grad_value_", "parameters", alike[0].dtype, "real gradients")
        flat = Flat()
        _clamp(backend.namespace_for("multi_clamp", alike[0]), [flat(t)[0] for t in alike], float(clip_value))
        flat.restore()


# Averages of weights


@torch.no_grad()
def ema_(averages: Iterable[torch.Tensor], values: Iterable[torch.Tensor], decay: float) -> None:
    """``a <- decay a + (1 - decay) v`` for all tensors in one call: exponential moving average (Polyak).

    Args:
        averages: tensors of any shape, changed in place: floating or complex, in the dtype of their value or, for
            halves, in float32, which keeps what a rounded average would lose.
        values: as many tensors of the same shapes.
        decay: in [0, 1]; 0.999 remembers a thousand steps.

    Raises:
        ValueError: a decay out of range, or lists of different lengths.
        RuntimeError: shapes, devices or dtypes that do not fit together.
    """
    averages, values = list(averages), list(values)
    if not 0 <= decay <= 1:
        check.fail(ValueError, "ema_", "decay", decay, "a number in [0, 1]")
    if len(averages) != len(values):
        check.fail(ValueError, "ema_", "values", f"{len(values)} tensors", f"{len(averages)}, as averages")
    for a, v in zip(averages, values):
        if a.shape != v.shape:
            check.fail(RuntimeError, "ema_", "values", f"shape {list(v.shape)}", f"shape {list(a.shape)}")
        if a.device != v.device:
            check.fail(RuntimeError, "ema_", "values", f"a tensor on {v.device}", f"one on {a.device}")
        if a.dtype != v.dtype and a.dtype != check.accumulate_dtype(v.dtype):
            check.fail(RuntimeError, "ema_", "averages", a.dtype, f"{v.dtype} or {check.accumulate_dtype(v.dtype)}")
    for some, news in by_kind("ema_", averages, values):
        flat = Flat()
        pairs = []
        for a, v in zip(some, news):
            if strides_fit(a, v) or a.is_complex():
                pairs.append(flat(a, v.to(a.dtype) if a.is_complex() else v))
            else:
                (target,) = flat(a)
                pairs.append((target, torch.empty_like(target, dtype=v.dtype).copy_(v)))
        targets, sources = ([pair[k] for pair in pairs] for k in (0, 1))
        _lerp(backend.namespace_for("multi_lerp", targets[0]), targets, sources, 1.0 - float(decay))
        flat.restore()


def get_ema_multi_avg_fn(decay: float = 0.999) -> Callable[..., None]:
    """The averaging function for torch.optim.swa_utils.AveragedModel; drops in for torch's of the same name.

    ``AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))``. Whole numbers are rounded
    towards zero, as torch rounds them.

    Raises:
        ValueError: a decay out of [0, 1].
    """
    if not 0 <= decay <= 1:
        check.fail(ValueError, "get_ema_multi_avg_fn", "decay", decay, "a number in [0, 1]")

    @torch.no_grad()
    def average(averages: list[torch.Tensor], values: list[torch.Tensor], _: Any) -> None:
        smooth = [a.is_floating_point() or a.is_complex() for a in averages]
        ema_([a for a, s in zip(averages, smooth) if s], [v for v, s in zip(values, smooth) if s], decay)
        for a, v, s in zip(averages, values, smooth):
            if not s:
                a.copy_(a * decay + v * (1 - decay))

    return average
