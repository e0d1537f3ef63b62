"""What the optimizers share: the states of all parameters collected, one call of a step op for each kind.

An optimizer states which states it has and which op takes them; its numbers, ``state_dict`` and hooks are torch's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import check
from .multi_tensor import Flat, total_norm

# What every rule is told besides its own numbers. Numbers that live on the device need no wait for it: the learning
# rate, the GradScaler's scale and verdict, the norm of all gradients.
COMMON = (
    "float lr, Tensor? device_lr, Tensor? grad_scale, Tensor? found_inf, Tensor? total_norm, float max_norm,"
    " bool maximize"
)

# What follows the first line in the docstring of every optimizer.
DROPS_IN = """
    Drops in for torch.optim.{name}: its arguments, its states (``state_dict`` goes both ways) and its trajectory. All
    parameters of a group, of one dtype, are updated in one call; ``foreach`` and ``fused`` are taken and change
    nothing but where torch would keep the number of the step. With ``differentiable=True`` or sparse gradients torch's
    own step runs.

    Args:
        master_weights: keep a float32 copy of bfloat16 and float16 parameters (state ``master``) and float32 states;
            the parameter is the rounded copy. Without it, states have the parameter's dtype, as in torch. torch's
            ``load_state_dict`` takes a state with masters, and rounds them and their states to the parameter's dtype.
        max_norm: clip the gradients of the whole optimizer to this 2-norm while they are read; ``p.grad`` itself stays
            as it is. The result is that of ``clip_grad_norm_`` before the step.
        others: as in torch.optim.{name}.

    Raises:
        ValueError: numbers out of range, as in torch.
        NotImplementedError: parameters of a dtype without kernels.

    Arithmetic in float32 (float64 for float64), bitwise deterministic. A GradScaler's scale and verdict are applied in
    the same pass, without waiting for the device; the gradients are left unscaled, as torch leaves them.
"""


class Batch:
    """What one call of a step op gets: parameters of one dtype on one device, with gradients and states."""

    def __init__(self, states: tuple[str, ...]) -> None:
        self.params: list[torch.Tensor] = []
        self.grads: list[torch.Tensor] = []
        self.states: dict[str, list[torch.Tensor]] = {name: [] for name in states}
        self.masters: list[torch.Tensor] = []
        self.steps: list[torch.Tensor] = []
        self.first = False
        self.flat = Flat()


def _unhooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """torch's own step without the hooks, which the calling step has run already."""
    return step.__wrapped__ if getattr(step, "hooked", False) else step  # type: ignore[attr-defined, no-any-return]


class MultiTensorOptimizer(torch.optim.Optimizer):
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

    def _call(self, group: dict[str, Any], batch: Batch, common: tuple[Any, ...]) -> None:
        raise NotImplementedError

    def _new_state(self, group: dict[str, Any], name: str, like: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(like, memory_format=torch.preserve_format)

    def _steps_on_device(self, group: dict[str, Any]) -> bool:
        return bool(group.get("capturable") or group.get("fused"))

    def _collect(self, group: dict[str, Any]) -> list[Batch]:
        """Parameters that have gradients, with their states, which are made at the first step."""
        names, counted = self._state_names(group), self._counts_steps()
        on_device = self._steps_on_device(group)
        masters, scaled = group["master_weights"], getattr(self, "found_inf", None) is not None
        batches: dict[Any, Batch] = {}
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
                batch = batches[p.dtype, p.device, first] = Batch(names)
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
            norm = total_norm(name, [g for _, batch in batches for g in batch.grads], 2.0)
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

    def _counted(self, group: dict[str, Any], batch: Batch) -> tuple[list[torch.Tensor], bool]:
        """The steps, and whether the device counts them."""
        return batch.steps, self._steps_on_device(group) or batch.steps[0].device.type != "cpu"
