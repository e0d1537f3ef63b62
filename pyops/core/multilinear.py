"""The autograd recipe for ops that are linear in each of their tensors: im2col and the convolutions.

Such ops come in families that are closed under differentiation: the gradient of each one is another one (the gradients
of a convolution are convolutions). A room states for each op its gradient, its tangent and its batching rule *in terms
of the differentiable functions of the family*, and derivatives of every order, in reverse and forward mode, and vmap
follow without a reference and without composite torch ops.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import forward_ad

from .autograd import derivative_levels_active
from .library import NAMESPACES, Op, fragment

Tensors = tuple[Any, ...]


@dataclass(frozen=True)
class Multilinear:
    """One op of a family.

    Attributes:
        op: called as ``op(namespace, *inputs, *constants)``; returns one tensor.
        inputs: how many leading arguments are tensors (None allowed).
        gradient: ``(namespace, dy, inputs, constants, needs) -> gradients``, one per input (None where not needed),
            made of differentiable functions.
        tangent: ``(namespace, inputs, tangents, constants) -> tangent of the output``; a tangent may be None.
        fold: ``(namespace, batch, dims, inputs, constants) -> (output, dim)``: the vmap rule.
        kept: positions of the inputs that ``gradient`` and ``tangent`` read; they see None in the place of the others,
            which are not kept alive for the backward pass. All if not stated.
    """

    op: Op
    inputs: int
    gradient: Callable[[str, torch.Tensor, Tensors, Tensors, tuple[bool, ...]], Tensors]
    tangent: Callable[[str, Tensors, Tensors, Tensors], torch.Tensor]
    fold: Callable[[str, int, Tensors, Tensors, Tensors], tuple[torch.Tensor, int]]
    kept: tuple[int, ...] | None = None


def differentiable(formula: Multilinear) -> Callable[..., Any]:
    """Builds ``apply(namespace, *inputs, *constants)``."""
    n, direct = formula.inputs, formula.op.direct
    kept_at = range(n) if formula.kept is None else formula.kept

    def save(ctx: Any, args: Tensors, forward_mode: bool) -> None:
        inputs, ctx.constants = args[:n], args[n:]
        ctx.present = tuple(t is not None for t in inputs)
        ctx.kept = tuple(t is not None and i in kept_at for i, t in enumerate(inputs))
        ctx.set_materialize_grads(False)
        kept = [t for t, needed in zip(inputs, ctx.kept) if needed]
        ctx.save_for_backward(*kept)
        if forward_mode:
            ctx.save_for_forward(*kept)

    def restore(ctx: Any) -> Tensors:
        remaining = iter(ctx.saved_tensors)
        return tuple(next(remaining) if kept else None for kept in ctx.kept)

    def gradients(ctx: Any, namespace: str, dy: torch.Tensor | None, needs: Tensors) -> Tensors:
        nothing = (None,) * len(ctx.constants)
        if dy is None:
            return (None,) * n + nothing
        inputs = restore(ctx)
        wanted = tuple(need and present for need, present in zip(needs, ctx.present))
        return (*formula.gradient(namespace, dy.contiguous(), inputs, ctx.constants, wanted), *nothing)

    class Apply(torch.autograd.Function):
        @staticmethod
        def forward(namespace: str, *args: Any) -> torch.Tensor:
            return formula.op(namespace, *args)

        @staticmethod
        def setup_context(ctx: Any, inputs: Tensors, output: Any) -> None:
            ctx.namespace = inputs[0]
            save(ctx, inputs[1:], forward_mode=True)

        @staticmethod
        def backward(ctx: Any, dy: torch.Tensor | None) -> Tensors:
            return (None, *gradients(ctx, ctx.namespace, dy, ctx.needs_input_grad[1 : 1 + n]))

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            with forward_ad._set_fwd_grad_enabled(False):
                return formula.tangent(ctx.namespace, restore(ctx), tangents[1 : 1 + n], ctx.constants)

        @staticmethod
        def vmap(info: Any, in_dims: Tensors, namespace: str, *args: Any) -> Any:
            return formula.fold(namespace, info.batch_size, in_dims[1 : 1 + n], args[:n], args[n:])

    class Plain(torch.autograd.Function):
        """Apply for the common case: reverse mode alone. torch binds such a Function several times faster."""

        @staticmethod
        def forward(ctx: Any, namespace: str, *args: Any) -> torch.Tensor:
            ctx.namespace = namespace
            with torch._C._AutoDispatchBelowAutograd():
                y = direct[namespace](*args)
            save(ctx, args, forward_mode=False)
            return y  # type: ignore[no-any-return]

        backward = staticmethod(Apply.backward)

    bind = super(torch.autograd.Function, Plain).apply  # as in core/autograd.py

    def apply(namespace: str, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            if forward_ad._current_level >= 0:
                torch._dynamo.graph_break("pyops: forward-mode AD runs outside the compiled graph")
            return formula.op.overloads[namespace](*args)
        if derivative_levels_active():
            return Apply.apply(namespace, *args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args[:n]):
            return bind(namespace, *args)
        with torch._C._AutoDispatchBelowAutograd():
            return direct[namespace](*args)

    for namespace in NAMESPACES:

        def setup_context(ctx: Any, inputs: Tensors, output: Any) -> None:
            save(ctx, inputs, forward_mode=False)

        def backward(ctx: Any, dy: torch.Tensor | None, namespace: str = namespace) -> Tensors:
            return gradients(ctx, namespace, dy, ctx.needs_input_grad[:n])

        name = f"{namespace}::{formula.op.name}"
        torch.library.register_autograd(name, backward, setup_context=setup_context, lib=fragment(namespace))
    return apply


def first(batch: int, dim: int | None, t: torch.Tensor) -> torch.Tensor:
    """``t`` with the batch dimension in front, expanded where it has none."""
    return t.expand(batch, *t.shape) if dim is None else t.movedim(dim, 0)
