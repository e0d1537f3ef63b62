"""The autograd recipe, written once: a room states its formulas, this module makes them differentiable.

A room gives a ``Formula``: the forward op, the backward op, and the *reference*, the same mathematics in plain torch.
From it follow

- the gradient: the backward op;
- second and higher gradients: the gradient of the reference's gradient (rare, so composite is fast enough);
- forward mode (jvp): the reference's gradient is linear in its cotangent; transposing it once more gives the jvp
  (https://j-towns.github.io/2017/06/12/A-new-trick.html), so no forward-mode level is nested in another;
- vmap: the room's folding of the batch dimension into an op dimension, else the reference under torch.vmap.

Traps that shape the code (each has a test in tests/harness.py):

- an op without an Autograd registration gives ``.grad is None`` with a mere warning: ops are registered as well;
- an autograd.Function with ``jvp`` breaks ``torch.compile(fullgraph=True)``: when compiling, the op is called directly;
- compiled forward mode over an op answers zeros: there the graph is broken instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import forward_ad

from .library import NAMESPACES, Op, fragment

Tensors = tuple[Any, ...]


@dataclass(frozen=True)
class Formula:
    """One differentiable op family.

    Attributes:
        forward: op called as ``forward(*inputs, *constants)``; returns ``y`` or ``(y, *statistics)``.
        backward: op called as ``backward(*backward_arguments(...))``; returns one gradient per input.
        inputs: how many leading arguments are tensors of the formula (None allowed).
        gradients: how many of them, from the left, have a gradient; the backward op returns one for each.
        backward_arguments: ``(dy, inputs, statistics, constants, needs) -> arguments of the backward op``;
            ``needs[i]`` says whether the gradient of input i is wanted.
        reference: plain torch, called as the forward op; returns a tuple as the forward op does.
        fold: optional vmap rule ``(forward, batch, dims, inputs, constants) -> (outputs, out_dims) | None``; None
            hands over to the reference.
    """

    forward: Op
    backward: Op
    inputs: int
    gradients: int
    backward_arguments: Callable[[torch.Tensor, Tensors, Tensors, Tensors, tuple[bool, ...]], Tensors]
    reference: Callable[..., Tensors]
    fold: Callable[..., tuple[Tensors, Tensors] | None] | None = None


def _outputs(result: Any) -> Tensors:
    return result if isinstance(result, tuple) else (result,)


def _gradient(formula: Formula, inputs: Tensors, constants: Tensors, needs: Sequence[bool]) -> tuple[Callable, Tensors]:
    """The gradient of the reference as a function ``(dy, *present inputs) -> wanted gradients``."""
    present = [i for i, t in enumerate(inputs) if t is not None]
    wanted = [i for i in present if needs[i]]

    def gradient(dy: torch.Tensor, *values: torch.Tensor) -> Tensors:
        given = dict(zip(present, values))

        def y_of(*chosen: torch.Tensor) -> torch.Tensor:
            full = {**given, **dict(zip(wanted, chosen))}
            return formula.reference(*(full.get(i) for i in range(formula.inputs)), *constants)[0]

        _, pullback = torch.func.vjp(y_of, *(given[i] for i in wanted))
        return pullback(dy)

    return gradient, tuple(inputs[i] for i in present)


def _jvp(function: Callable[..., Any], primals: Tensors, tangents: Tensors) -> Any:
    """Directional derivative of ``function`` by transposing its vjp."""
    result, pullback = torch.func.vjp(function, *primals)
    zeros = torch.utils._pytree.tree_map(torch.zeros_like, result)
    _, push = torch.func.vjp(lambda cotangent: pullback(cotangent), zeros)
    filled = tuple(torch.zeros_like(p) if t is None else t for p, t in zip(primals, tangents))
    return push(filled)[0]


def _split(formula: Formula, args: Tensors) -> tuple[Tensors, Tensors]:
    return args[: formula.inputs], args[formula.inputs :]


def _save(ctx: Any, formula: Formula, args: Tensors, output: Any) -> None:
    """Keeps what the gradient needs; constants may be tensors too (running statistics)."""
    inputs, constants = _split(formula, args)
    tensors = (*inputs, *_outputs(output)[1:], *constants)
    ctx.slots = tuple(t if not isinstance(t, torch.Tensor) else None for t in tensors)
    ctx.is_tensor = tuple(isinstance(t, torch.Tensor) for t in tensors)
    ctx.statistics = len(_outputs(output)) - 1
    kept = [t for t in tensors if isinstance(t, torch.Tensor)]
    ctx.save_for_backward(*kept)
    ctx.kept_for_forward = kept


def _saved(ctx: Any, formula: Formula, tensors: Sequence[torch.Tensor]) -> tuple[Tensors, Tensors, Tensors]:
    remaining = iter(tensors)
    values = tuple(next(remaining) if is_tensor else slot for is_tensor, slot in zip(ctx.is_tensor, ctx.slots))
    n, s = formula.inputs, ctx.statistics
    return values[:n], values[n : n + s], values[n + s :]


def _pick(inputs: Tensors, needs: Sequence[bool], grads: Tensors) -> Tensors:
    """Gradients in input order, None where there is no input or nobody asked."""
    asked = [g if t is not None and need else None for t, need, g in zip(inputs, needs, grads)]
    return (*asked, *(None,) * (len(inputs) - len(asked)))


def _needs(formula: Formula, asked: Sequence[bool]) -> tuple[bool, ...]:
    """Which gradients are wanted: those that autograd asks for and that the formula has."""
    return tuple(need and i < formula.gradients for i, need in enumerate(asked))


def _second_gradient(
    formula: Formula, dy: torch.Tensor, inputs: Tensors, constants: Tensors, needs: Sequence[bool], cotangents: Tensors
) -> tuple[torch.Tensor, Tensors]:
    """Gradients of (dy, inputs) given cotangents of the input gradients."""
    gradient, present = _gradient(formula, inputs, constants, needs)
    first, pullback = torch.func.vjp(gradient, dy, *present)
    wanted = [c for t, need, c in zip(inputs, needs, cotangents) if t is not None and need]
    filled = tuple(torch.zeros_like(g) if c is None else c.to(g.dtype) for g, c in zip(first, wanted))
    ddy, *rest = pullback(filled)
    remaining = iter(rest)
    return ddy, tuple(None if t is None else next(remaining) for t in inputs)


def differentiable(formula: Formula) -> Callable[..., Any]:
    """Builds ``apply(namespace, *inputs, *constants)`` from a formula; see the module docstring."""
    n, gradients = formula.inputs, formula.gradients

    class Backward(torch.autograd.Function):
        """(dy, inputs, statistics) -> gradients of the inputs, by the backward op; differentiable itself."""

        @staticmethod
        def forward(namespace: str, needs: tuple, counts: tuple, dy: torch.Tensor, *rest: Any) -> Tensors:
            inputs, statistics, constants = rest[:n], rest[n : n + counts[0]], rest[n + counts[0] :]
            arguments = formula.backward_arguments(dy, inputs, statistics, constants, needs)
            return formula.backward(namespace, *arguments)

        @staticmethod
        def setup_context(ctx: Any, inputs: Tensors, output: Any) -> None:
            _, ctx.needs, (ctx.statistics,), dy, *rest = inputs
            ctx.set_materialize_grads(False)
            ctx.rest_slots = tuple(t if not isinstance(t, torch.Tensor) else None for t in rest)
            ctx.rest_is_tensor = tuple(isinstance(t, torch.Tensor) for t in rest)
            kept = (dy, *(t for t in rest if isinstance(t, torch.Tensor)))
            ctx.save_for_backward(*kept)
            ctx.save_for_forward(*kept)

        @staticmethod
        def _restore(ctx: Any) -> tuple[torch.Tensor, Tensors, Tensors]:
            dy, *tensors = ctx.saved_tensors
            remaining = iter(tensors)
            rest = tuple(next(remaining) if it else s for it, s in zip(ctx.rest_is_tensor, ctx.rest_slots))
            return dy, rest[:n], rest[n + ctx.statistics :]

        @staticmethod
        def backward(ctx: Any, *cotangents: torch.Tensor | None) -> Tensors:
            dy, inputs, constants = Backward._restore(ctx)
            nothing = (None,) * (ctx.statistics + len(constants))
            if all(c is None for c in cotangents):
                return (None,) * (4 + n) + nothing
            ddy, grads = _second_gradient(formula, dy, inputs, constants, ctx.needs, cotangents)
            return (None, None, None, ddy, *grads, *nothing)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Tensors:
            dy, inputs, constants = Backward._restore(ctx)
            gradient, present = _gradient(formula, inputs, constants, ctx.needs)
            given = (tangents[3], *(t for x, t in zip(inputs, tangents[4 : 4 + n]) if x is not None))
            moved = iter(_jvp(gradient, (dy, *present), given))
            wanted = zip(inputs[:gradients], ctx.needs)
            return tuple(next(moved) if x is not None and need else dy.new_zeros(0) for x, need in wanted)

        @staticmethod
        def vmap(info: Any, in_dims: Tensors, namespace: str, needs: tuple, counts: tuple, dy: Any, *rest: Any) -> Any:
            inputs, constants = rest[:n], rest[n + counts[0] :]
            dims = in_dims[4 : 4 + n]
            gradient, present = _gradient(formula, inputs, constants, needs)
            batched = (in_dims[3], *(d for x, d in zip(inputs, dims) if x is not None))
            with torch.enable_grad():
                grads = iter(torch.vmap(gradient, in_dims=batched, randomness="same")(dy, *present))
            wanted = [x is not None and need for x, need in zip(inputs[:gradients], needs)]
            picked = tuple(next(grads) if want else dy.new_empty(0) for want in wanted)
            return picked, tuple(0 if want else None for want in wanted)

    class Forward(torch.autograd.Function):
        """inputs -> (y, *statistics) by the forward op."""

        @staticmethod
        def forward(namespace: str, *args: Any) -> Any:
            return formula.forward(namespace, *args)

        @staticmethod
        def setup_context(ctx: Any, inputs: Tensors, output: Any) -> None:
            ctx.namespace = inputs[0]
            ctx.set_materialize_grads(False)
            _save(ctx, formula, inputs[1:], output)
            ctx.save_for_forward(*ctx.kept_for_forward)
            del ctx.kept_for_forward
            ctx.mark_non_differentiable(*_outputs(output)[1:])

        @staticmethod
        def backward(ctx: Any, dy: torch.Tensor | None, *_: Any) -> Tensors:
            inputs, statistics, constants = _saved(ctx, formula, ctx.saved_tensors)
            nothing = (None,) * len(constants)
            if dy is None:
                return (None,) * (1 + n) + nothing
            needs = _needs(formula, ctx.needs_input_grad[1 : 1 + n])
            dy = dy.contiguous()
            if torch.is_grad_enabled() or _transforms_active():
                counts = (len(statistics),)
                grads = Backward.apply(ctx.namespace, needs, counts, dy, *inputs, *statistics, *constants)
            else:
                arguments = formula.backward_arguments(dy, inputs, statistics, constants, needs)
                grads = formula.backward(ctx.namespace, *arguments)
            return (None, *_pick(inputs, needs, grads), *nothing)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            inputs, _, constants = _saved(ctx, formula, ctx.saved_tensors)
            present = [i for i, t in enumerate(inputs) if t is not None]

            def y_of(*values: torch.Tensor) -> torch.Tensor:
                full = dict(zip(present, values))
                return formula.reference(*(full.get(i) for i in range(n)), *constants)[0]

            dy = _jvp(y_of, tuple(inputs[i] for i in present), tuple(tangents[1 + i] for i in present))
            return (dy, *(None,) * ctx.statistics) if ctx.statistics else dy

        @staticmethod
        def vmap(info: Any, in_dims: Tensors, namespace: str, *args: Any) -> Any:
            inputs, constants = _split(formula, args)
            dims = tuple(in_dims[1 : 1 + n])
            if formula.fold is not None:
                folded = formula.fold(lambda *a: apply(namespace, *a), info.batch_size, dims, inputs, constants)
                if folded is not None:
                    return folded
            present = [i for i, t in enumerate(inputs) if t is not None]

            def all_of(*values: torch.Tensor) -> Tensors:
                full = dict(zip(present, values))
                return formula.reference(*(full.get(i) for i in range(n)), *constants)

            values = tuple(inputs[i] for i in present)
            outputs = torch.vmap(all_of, in_dims=tuple(dims[i] for i in present), randomness="same")(*values)
            return (outputs, (0,) * len(outputs)) if len(outputs) > 1 else (outputs[0], 0)

    def apply(namespace: str, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            if forward_ad._current_level >= 0:
                torch._dynamo.graph_break("pyops: forward-mode AD runs outside the compiled graph")
            return formula.forward.overloads[namespace](*args)
        if _transforms_active() or forward_ad._current_level >= 0 or _wants_gradient(args[:n]):
            return Forward.apply(namespace, *args)
        with torch._C._AutoDispatchBelowAutograd():
            return formula.forward.overloads[namespace](*args)

    _register(formula)
    return apply


def _transforms_active() -> bool:
    return torch._C._are_functorch_transforms_active()


def _wants_gradient(inputs: Tensors) -> bool:
    return torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in inputs)


# Backward ops whose raw gradient is refused; two formulas may share one (batch norm in training and in inference).
_refusing: set[str] = set()


def _register(formula: Formula) -> None:
    """Registers the same gradients on the ops themselves: for torch.compile and for callers of the raw op."""
    n = formula.inputs
    for namespace in NAMESPACES:

        def setup_context(ctx: Any, inputs: Tensors, output: Any) -> None:
            ctx.set_materialize_grads(False)
            _save(ctx, formula, inputs, output)
            del ctx.kept_for_forward

        def backward(ctx: Any, dy: torch.Tensor | None, *_: Any, namespace: str = namespace) -> Tensors:
            inputs, statistics, constants = _saved(ctx, formula, ctx.saved_tensors)
            nothing = (None,) * len(constants)
            if dy is None:
                return (None,) * n + nothing
            needs = _needs(formula, ctx.needs_input_grad[:n])
            arguments = formula.backward_arguments(dy.contiguous(), inputs, statistics, constants, needs)
            return (*_pick(inputs, needs, formula.backward(namespace, *arguments)), *nothing)

        name = f"{namespace}::{formula.forward.name}"
        torch.library.register_autograd(name, backward, setup_context=setup_context, lib=fragment(namespace))
        if formula.backward.name not in _refusing:
            _refuse_gradient(f"{namespace}::{formula.backward.name}", namespace)
    _refusing.add(formula.backward.name)


def _refuse_gradient(name: str, namespace: str) -> None:
    """The raw backward op is no place to differentiate again: an error, not a silent None."""

    def setup_context(ctx: Any, inputs: Tensors, output: Any) -> None:
        pass

    def backward(ctx: Any, *grads: Any) -> Tensors:
        raise RuntimeError(
            f"{name}: the raw backward op has no gradient of its own; second gradients go through pyops.functional"
        )

    torch.library.register_autograd(name, backward, setup_context=setup_context, lib=fragment(namespace))
