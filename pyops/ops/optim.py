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

import math
import types
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..core import backend, check, library

_kernels = library.triton_kernels("optim")

# What every rule is told besides its own numbers. Numbers that live on the device need no wait for it: the learning
# rate, the GradScaler's scale and verdict, the norm of all gradients.
_COMMON = (
    "float lr, Tensor? device_lr, Tensor? grad_scale, Tensor? found_inf, Tensor? total_norm, float max_norm,"
    " bool maximize"
)


def _nothing(*_: Any) -> None:
    return None


_sgd = library.declare(
    "sgd_step(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] momentum_buffers, Tensor(d!)[] masters,"
    f" {_COMMON}, float momentum, float dampening, float weight_decay, bool nesterov, bool first) -> ()",
    _nothing,
    _kernels,
)
_adagrad = library.declare(
    "adagrad_step(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] sums, Tensor(d!)[] masters,"
    f" Tensor(e!)[] steps, bool steps_on_device, {_COMMON}, float lr_decay, float weight_decay, float eps) -> ()",
    _nothing,
    _kernels,
)
_rmsprop = library.declare(
    "rmsprop_step(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] square_avgs, Tensor(d!)[] momentum_buffers,"
    f" Tensor(e!)[] grad_avgs, Tensor(f!)[] masters, Tensor(g!)[] steps, bool steps_on_device, {_COMMON},"
    " float alpha, float eps, float weight_decay, float momentum, bool centered) -> ()",
    _nothing,
    _kernels,
)
_adam = library.declare(
    "adam_step(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs,"
    f" Tensor(e!)[] max_exp_avg_sqs, Tensor(f!)[] masters, Tensor(g!)[] steps, bool steps_on_device, {_COMMON},"
    " float beta1, float beta2, float eps, float weight_decay, bool amsgrad, bool decoupled) -> ()",
    _nothing,
    _kernels,
)
_norm = library.declare(
    "multi_norm(Tensor[] tensors, float order) -> Tensor",
    lambda tensors, order: tensors[0].new_empty((), dtype=torch.float64),
    _kernels,
)
_scale = library.declare(
    "multi_scale(Tensor(a!)[] tensors, Tensor total_norm, float max_norm) -> ()", _nothing, _kernels
)
_clamp = library.declare("multi_clamp(Tensor(a!)[] tensors, float bound) -> ()", _nothing, _kernels)
_lerp = library.declare(
    "multi_lerp(Tensor(a!)[] averages, Tensor[] values, float weight) -> ()", _nothing, _kernels
)  # fmt: skip


# Lists of tensors as the kernels take them: one dtype, one device, no gaps


def _strides_fit(first: torch.Tensor, *others: torch.Tensor) -> bool:
    """The tensors fill their memory without gaps, in the same order."""
    if all(t.is_contiguous() for t in (first, *others)):
        return True
    dense = torch._prims_common.is_non_overlapping_and_dense_or_false(first)
    return dense and all(t.stride() == first.stride() for t in others)


class _Flat:
    """Exchanges tensors with gaps for contiguous copies, and copies back what changed."""

    def __init__(self) -> None:
        self.exchanged: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        for t in tensors:
            if not t.is_contiguous() or t.is_complex():
                break
        else:
            return tensors
        if tensors[0].is_complex():
            tensors = tuple(torch.view_as_real(t) for t in tensors)
        if _strides_fit(*tensors):
            return tensors
        copies = tuple(t.clone(memory_format=torch.contiguous_format) for t in tensors)
        self.exchanged += zip(tensors, copies)
        return copies

    def restore(self) -> None:
        for original, copy in self.exchanged:
            original.copy_(copy)


def _by_kind(op: str, *lists: list[torch.Tensor]) -> Iterable[tuple[list[torch.Tensor], ...]]:
    """Parallel lists cut into those of one device and dtype, by the first; checked."""
    cut: dict[Any, tuple[list[torch.Tensor], ...]] = {}
    for tensors in zip(*lists):
        first = tensors[0]
        if first.dtype not in check.FLOATING and not first.is_complex():
            check.fail(NotImplementedError, op, "tensors", first.dtype, "a floating or complex dtype")
        kind = cut.setdefault((first.device, first.dtype, tensors[-1].dtype), tuple([] for _ in lists))
        for into, tensor in zip(kind, tensors):
            into.append(tensor)
    return cut.values()


def _total_norm(op: str, tensors: list[torch.Tensor], order: float) -> torch.Tensor:
    """The norm of all tensors as one vector, float64, on the first one's device."""
    norms = []
    for (alike,) in _by_kind(op, tensors):
        if order not in (1.0, 2.0, math.inf):
            norms += [torch.linalg.vector_norm(t.detach(), order).double() for t in alike]
            continue
        # a complex number is one entry of a vector, except under order 2, where its parts can stand for it
        if alike[0].is_complex() and order != 2.0:
            alike = [t.abs() for t in alike]
        flat = [_Flat()(t)[0] for t in alike]
        norms.append(_norm(backend.namespace_for(op, flat[0]), flat, order))
    if len(norms) == 1 and order != 0:  # of order 0 torch counts the tensors that are not 0, as the last line does
        return norms[0]
    return torch.linalg.vector_norm(torch.stack([n.to(tensors[0].device) for n in norms]), order)


# The optimizers


class _Batch:
    """What one call of a step op gets: parameters of one dtype on one device, with gradients and states."""

    def __init__(self, states: tuple[str, ...]) -> None:
        self.params: list[torch.Tensor] = []
        self.grads: list[torch.Tensor] = []
        self.states: dict[str, list[torch.Tensor]] = {name: [] for name in states}
        self.masters: list[torch.Tensor] = []
        self.steps: list[torch.Tensor] = []
        self.first = False
        self.flat = _Flat()


def _unhooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """torch's own step without the hooks, which the calling step has run already."""
    return step.__wrapped__ if getattr(step, "hooked", False) else step  # type: ignore[attr-defined, no-any-return]


class _MultiTensor(torch.optim.Optimizer):
    """What the optimizers share: states of all parameters collected, one call of a step op for each kind."""

    # GradScaler hands its scale and its verdict over instead of waiting for them.
    _step_supports_amp_scaling = True
    _torch: type[torch.optim.Optimizer]

    def _extend(self, master_weights: bool, max_norm: float | None) -> None:
        if max_norm is not None:
            check.non_negative(type(self).__name__, "max_norm", max_norm)
        self.defaults.update(master_weights=bool(master_weights), max_norm=max_norm)
        self._fill_groups()

    def _fill_groups(self) -> None:
        for group in self.param_groups:
            group.setdefault("master_weights", self.defaults.get("master_weights", False))
            group.setdefault("max_norm", self.defaults.get("max_norm"))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._fill_groups()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch; states of parameters with master copies stay in float32, where torch rounds them."""
        super().load_state_dict(state_dict)
        saved = state_dict["state"]
        for group, old in zip(self.param_groups, state_dict["param_groups"]):
            for p, name in zip(group["params"], old["params"]):
                if self._keeps_master(group, p) and "master" in saved.get(name, {}):
                    for key, value in saved[name].items():
                        if key != "step" and isinstance(value, torch.Tensor):
                            self.state[p][key] = value.to(device=p.device, dtype=torch.float32).clone()

    @staticmethod
    def _keeps_master(group: dict[str, Any], p: torch.Tensor) -> bool:
        return bool(group["master_weights"]) and p.dtype in (torch.bfloat16, torch.float16)

    # which states a group has, and the op that takes them: stated by each optimizer

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        raise NotImplementedError

    def _counts_steps(self) -> bool:
        return True

    def _call(self, group: dict[str, Any], batch: _Batch, common: tuple[Any, ...]) -> None:
        raise NotImplementedError

    def _new_state(self, group: dict[str, Any], name: str, like: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(like, memory_format=torch.preserve_format)

    def _steps_on_device(self, group: dict[str, Any]) -> bool:
        return bool(group.get("capturable") or group.get("fused"))

    def _collect(self, group: dict[str, Any]) -> list[_Batch]:
        """Parameters that have gradients, with their states, which are made at the first step."""
        names, counted = self._state_names(group), self._counts_steps()
        on_device = self._steps_on_device(group)
        masters, scaled = group["master_weights"], getattr(self, "found_inf", None) is not None
        batches: dict[Any, _Batch] = {}
        for p in group["params"]:
            g = p.grad
            if g is None:
                continue
            like, mastered = p, masters and self._keeps_master(group, p)
            # a look-up makes an entry, and torch's SGD without momentum has none
            state = self.state[p] if names or counted or mastered else {}
            if mastered:
                if "master" not in state:
                    state["master"] = p.detach().float()
                    for name in names:
                        if name in state:
                            state[name] = state[name].float()
                like = state["master"]
            tensors = [p, g]
            first = False
            for name in names:
                t = state.get(name)
                if t is None:
                    first = True
                    t = state[name] = self._new_state(group, name, like)
                tensors.append(t)
            if like is not p:
                tensors.append(like)
            # without steps to count, the first one is another rule
            first = first and not counted
            batch = batches.get((p.dtype, p.device, first))
            if batch is None:
                self._check(group, p)
                batch = batches[p.dtype, p.device, first] = _Batch(names)
                batch.first = first
            flat = batch.flat(*tensors)
            batch.params.append(flat[0])
            batch.grads.append(flat[1])
            for k, name in enumerate(names):
                batch.states[name].append(flat[2 + k])
            if like is not p:
                batch.masters.append(flat[-1])
            if counted:
                step = state.get("step")
                if step is None:
                    step = state["step"] = self._new_step(p, on_device)
                if scaled and p.is_cuda and not step.is_cuda:
                    # whether this step counts is known on the device only
                    step = state["step"] = step.to(p.device, torch.float32)
                batch.steps.append(step)
        return list(batches.values())

    @staticmethod
    def _new_step(p: torch.Tensor, on_device: bool) -> torch.Tensor:
        if on_device:
            return torch.zeros((), dtype=torch.float32, device=p.device)
        wide = torch.get_default_dtype() == torch.float64
        return torch.zeros((), dtype=torch.float64 if wide else torch.float32)

    def _check(self, group: dict[str, Any], p: torch.Tensor) -> None:
        if p.dtype not in check.FLOATING and not p.is_complex():
            check.fail(NotImplementedError, type(self).__name__, "params", p.dtype, "a floating or complex dtype")
        stays = self._counts_steps() and not self._steps_on_device(group)
        if p.is_cuda and stays and torch.cuda.is_current_stream_capturing():
            check.fail(
                RuntimeError, type(self).__name__, "capturable", "False while a CUDA graph is captured",
                "True: the graph would repeat one step's number",
            )  # fmt: skip

    def _left_to_torch(self) -> str | None:
        """Why torch's own step runs, or None."""
        for group in self.param_groups:
            if group.get("differentiable"):
                return "differentiable=True"
            for p in group["params"]:
                if p.grad is not None and p.grad.layout is not torch.strided:
                    return "a sparse gradient"
        return None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step: every parameter that has a gradient is updated.

        Args:
            closure: computes the loss again, with gradients.

        Returns:
            What the closure returned, or None.

        Raises:
            NotImplementedError: parameters of a dtype without kernels.
            RuntimeError: a graph capture without ``capturable``; a sparse gradient or ``differentiable`` with a
                GradScaler or ``max_norm``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if reason := self._left_to_torch():
            if getattr(self, "grad_scale", None) is not None or any(
                g["max_norm"] is not None for g in self.param_groups
            ):
                raise RuntimeError(
                    f"{type(self).__name__}: argument 'params': got {reason}, expected none with GradScaler or max_norm"
                )
            _unhooked(self._torch.step)(self)
            return loss
        with torch.no_grad():
            self._step()
        return loss

    def _step(self) -> None:
        batches = [(group, batch) for group in self.param_groups for batch in self._collect(group)]
        norm = None
        if any(group["max_norm"] is not None for group, _ in batches):
            name = type(self).__name__
            norm = _total_norm(name, [g for _, batch in batches for g in batch.grads], 2.0)
        for group, batch in batches:
            device = batch.params[0].device
            lr: Any = group["lr"]
            device_lr = None
            if isinstance(lr, torch.Tensor) and self._steps_on_device(group) and lr.device == device:
                lr, device_lr = 0.0, lr.detach().to(torch.float32).reshape(())
            scale, found = (self._scaler_number(name, device) for name in ("grad_scale", "found_inf"))
            max_norm = group["max_norm"]
            common = (
                float(lr), device_lr, scale, found,
                None if max_norm is None or norm is None else norm.to(device),
                0.0 if max_norm is None else float(max_norm), bool(group["maximize"]),
            )  # fmt: skip
            self._call(group, batch, common)
            batch.flat.restore()
            if not torch.compiler.is_compiling():
                torch.autograd.graph.increment_version(batch.params)

    def _scaler_number(self, name: str, device: torch.device) -> torch.Tensor | None:
        """grad_scale or found_inf, which GradScaler sets for the length of a step."""
        t = getattr(self, name, None)
        return None if t is None else t.detach().to(device, torch.float32, non_blocking=True).reshape(())

    def _counted(self, group: dict[str, Any], batch: _Batch) -> tuple[list[torch.Tensor], bool]:
        """The steps, and whether the device counts them."""
        return batch.steps, self._steps_on_device(group) or batch.steps[0].device.type != "cpu"


_EXTRA = """
    Drops in for torch.optim.{name}: its arguments, its states (``state_dict`` goes both ways) and its trajectory. All
    parameters of a group, of one dtype, are updated in one call; ``foreach`` and ``fused`` are taken and change
    nothing but where torch would keep the number of the step. With ``differentiable=True`` or sparse gradients torch's
    own step runs.

    Args:
        master_weights: keep a float32 copy of bfloat16 and float16 parameters (state ``master``) and float32 states;
            the parameter is the rounded copy. Without it, states have the parameter's dtype, as in torch.
        max_norm: clip the gradients of the whole optimizer to this 2-norm while they are read; ``p.grad`` itself stays
            as it is. The result is that of ``clip_grad_norm_`` before the step.
        others: as in torch.optim.{name}.

    Raises:
        ValueError: numbers out of range, as in torch.
        NotImplementedError: parameters of a dtype without kernels.

    Arithmetic in float32 (float64 for float64), bitwise deterministic. A GradScaler's scale and verdict are applied in
    the same pass, without waiting for the device; the gradients are left unscaled, as torch leaves them.
"""


class SGD(_MultiTensor, torch.optim.SGD):
    __doc__ = (
        """Stochastic gradient descent with momentum: ``v <- μ v + (1 - d) g``, ``p <- p - η v``.\n"""
        + _EXTRA.format(name="SGD")
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

    def _call(self, group: dict[str, Any], batch: _Batch, common: tuple[Any, ...]) -> None:
        _sgd(
            backend.namespace_for("sgd_step", batch.params[0]),
            batch.params, batch.grads, batch.states.get("momentum_buffer", []), batch.masters, *common,
            float(group["momentum"]), float(group["dampening"]), float(group["weight_decay"]),
            bool(group["nesterov"]), batch.first,
        )  # fmt: skip


class Adagrad(_MultiTensor, torch.optim.Adagrad):
    __doc__ = (
        """Gradients divided by the root of the sum of their squares: ``s <- s + g²``, ``p <- p - η g / (√s + ε)``.\n"""
        + _EXTRA.format(name="Adagrad")
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

    def _call(self, group: dict[str, Any], batch: _Batch, common: tuple[Any, ...]) -> None:
        _adagrad(
            backend.namespace_for("adagrad_step", batch.params[0]),
            batch.params, batch.grads, batch.states["sum"], batch.masters, *self._counted(group, batch), *common,
            float(group["lr_decay"]), float(group["weight_decay"]), float(group["eps"]),
        )  # fmt: skip


class RMSprop(_MultiTensor, torch.optim.RMSprop):
    __doc__ = (
        """Gradients over the root of their mean square: ``v <- α v + (1 - α) g²``, ``p <- p - η g / (√v + ε)``.\n"""
        + _EXTRA.format(name="RMSprop")
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

    def _call(self, group: dict[str, Any], batch: _Batch, common: tuple[Any, ...]) -> None:
        states = batch.states
        _rmsprop(
            backend.namespace_for("rmsprop_step", batch.params[0]),
            batch.params, batch.grads, states["square_avg"], states.get("momentum_buffer", []),
            states.get("grad_avg", []), batch.masters, *self._counted(group, batch), *common,
            float(group["alpha"]), float(group["eps"]), float(group["weight_decay"]), float(group["momentum"]),
            bool(group["centered"]),
        )  # fmt: skip


class _AdamStep(_MultiTensor):
    """What Adam and AdamW share."""

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg", "exp_avg_sq")

    def _call(self, group: dict[str, Any], batch: _Batch, common: tuple[Any, ...]) -> None:
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
        + _EXTRA.format(name="Adam")
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
    __doc__ = """Adam with decoupled weight decay: ``p <- (1 - η λ) p - η m̂ / (√v̂ + ε)``.\n""" + _EXTRA.format(
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
    total = _total_norm(op, tensors, order)
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
    for (alike,) in _by_kind("clip_grad_norm_", grads):
        flat = _Flat()
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
    for (alike,) in _by_kind("clip_grad_value_", grads):
        if alike[0].is_complex():
            check.fail(NotImplementedError, "clip_grad_value_", "parameters", alike[0].dtype, "real gradients")
        flat = _Flat()
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
    for some, news in _by_kind("ema_", averages, values):
        flat = _Flat()
        pairs = []
        for a, v in zip(some, news):
            if _strides_fit(a, v) or a.is_complex():
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
