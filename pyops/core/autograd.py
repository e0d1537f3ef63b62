"""The autograd recipe, written once: a room states its formulas, this module makes them differentiable.

A room gives a ``Formula``: the forward op, the backward op, and the *reference*, the same mathematics in plain torch.
From it follow

- the gradient: the backward op;
- second and higher gradients: the gradient of the reference's gradient (rare, so composite is fast enough), or what
  the room states as ``second``;
- forward mode (jvp): the reference's gradient is linear in its cotangent; transposing it once more gives the jvp
  (https://j-towns.github.io/2017/06/12/A-new-trick.html), so no forward-mode level is nested in another;
- vmap: the room's folding of the batch dimension into an op dimension, else the reference under torch.vmap.

Traps that shape the code (tests/test_autograd.py and the checks of pyops.testing hold each of them):

- an op without an Autograd registration gives ``.grad is None`` with a mere warning: ops are registered as well;
- an autograd.Function with ``jvp`` breaks ``torch.compile(fullgraph=True)``: when compiling, the op is called directly;
- compiled forward mode over an op answers zeros: there the graph is broken instead;
- under torch.compile, torch.func's grad and vmap cannot see through an op: there the reference is compiled;
- the raw backward op drops tangents of forward mode: it runs bare only where no level of forward mode is open.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import forward_ad

from . import tracing
from .library import NAMESPACES, Op, fragment

Tensors = tuple[Any, ...]


@dataclass(frozen=True)
class Formula:
    """One differentiable op family.

    Below, ``dy`` is the cotangent of the output, contiguous. With ``outputs > 1`` it is a tuple of as many
    cotangents, each None where that output takes no part in what is differentiated; at least one is a tensor.

    Attributes:
        forward: op called as ``forward(*inputs, *constants)``; returns ``(*outputs, *statistics)``.
        backward: op called as ``backward(*backward_arguments(...))``; returns one gradient for each of the first
            ``gradients`` inputs, anything where it is not needed.
        inputs: how many leading arguments are tensors (None allowed); the rest, the constants, are not tensors.
        gradients: how many inputs, from the left, have a gradient. Indices, masks, seeds stand to their right.
        backward_arguments: ``(dy, inputs, kept, constants, needs) -> arguments of the backward op``; ``needs[i]``
            says whether the gradient of input i is wanted.
        reference: plain torch, called as the forward op; returns a tuple as the forward op does.
        fold: optional vmap rule ``(forward, batch, dims, inputs, constants) -> (results, out_dims) | None``; None
            hands over to the reference. ``forward(*inputs, *constants)`` returns what the op returns: a tensor where
            it has one result.
        outputs: how many results, from the left, are differentiable; the rest are statistics, without gradient.
        keep: which results the gradient reads, by position; the statistics if not stated. ``kept`` holds them.
        second: optional gradient of the backward op,
            ``(namespace, dy, inputs, constants, needs, cotangents) -> (ddy, input_gradients)``, where
            ``cotangents[i]`` belongs to the gradient of input i (None where there is none), ddy has the form of dy,
            and any result may be None for zero. Stated in differentiable functions, it serves all higher orders. The
            composite gradient of the reference is used if not stated.
        finish: optional ``(results, inputs, kept, needs) -> gradients``: what follows from the results of the backward
            op by torch's own ops, such as the gradient of a weight as one matrix product. Not differentiated.
        added: the last input with a gradient is added to the output as it is: its gradient is dy itself, and the
            backward op returns none for it.
    """

    forward: Op
    backward: Op
    inputs: int
    gradients: int
    backward_arguments: Callable[[Any, Tensors, Tensors, Tensors, tuple[bool, ...]], Tensors]
    reference: Callable[..., Tensors]
    fold: Callable[..., tuple[Tensors, Tensors] | None] | None = None
    outputs: int = 1
    keep: tuple[int, ...] | None = None
    second: Callable[..., tuple[Any, Tensors]] | None = None
    finish: Callable[[Tensors, Tensors, Tensors, tuple[bool, ...]], Tensors] | None = None
    added: bool = False


def _results(result: Any) -> Tensors:
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def _is_smooth(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _holding(function: Callable, arguments: Tensors, free: Sequence[int]) -> tuple[Callable, Tensors]:
    """``function`` of its arguments at the positions ``free`` alone, the others held; and those arguments."""

    def of_free(*chosen: torch.Tensor) -> Any:
        full = list(arguments)
        for position, value in zip(free, chosen):
            full[position] = value
        return function(*full)

    return of_free, tuple(arguments[i] for i in free)


def _jvp(function: Callable, arguments: Tensors, tangents: Tensors, free: Sequence[int]) -> Tensors:
    """Directional derivative of ``function`` in its arguments ``free``, by transposing its vjp."""
    of_free, primals = _holding(function, arguments, free)
    result, pullback = torch.func.vjp(of_free, *primals)
    _, push = torch.func.vjp(pullback, tuple(torch.zeros_like(r) for r in result))
    along = (tangents[i] for i in free)
    return push(tuple(torch.zeros_like(p) if t is None else t for p, t in zip(primals, along)))[0]


class _Recipe:
    """What follows from one formula, as functions of tensors."""

    def __init__(self, formula: Formula) -> None:
        schema = formula.forward.overloads[NAMESPACES[0]]._schema
        for argument in schema.arguments[formula.inputs :]:
            if "Tensor" in str(argument.type):
                raise TypeError(f"{schema.name}: argument '{argument.name}' is a tensor: count it among the inputs")
        self.formula = formula
        self.results = len(schema.returns)
        self.keep = tuple(range(formula.outputs, self.results)) if formula.keep is None else formula.keep
        self.nothing = (None,) * (formula.inputs - formula.gradients)

    def save(self, ctx: Any, namespace: str, constants: Tensors, inputs: Tensors, result: Any) -> None:
        """Keeps what the gradient reads, and names the results that have none."""
        ctx.namespace, ctx.constants = namespace, constants
        ctx.set_materialize_grads(False)
        if self.results == 1 and not self.keep:
            ctx.save_for_backward(*inputs)
            return
        results = _results(result)
        ctx.save_for_backward(*inputs, *[results[i] for i in self.keep])
        if self.results > self.formula.outputs:
            ctx.mark_non_differentiable(*results[self.formula.outputs :])

    def cotangents(self, dys: Tensors) -> Tensors | None:
        """Those of the differentiable outputs, contiguous; None where nobody uses any of them."""
        if self.formula.outputs == 1:
            return None if dys[0] is None else (dys[0].contiguous(),)
        given = [dy if dy is None else dy.contiguous() for dy in dys[: self.formula.outputs]]
        return None if all(dy is None for dy in given) else tuple(given)

    def smooth(self, inputs: Tensors) -> list[int]:
        """Positions of the inputs in which the formula can be differentiated."""
        return [i for i in range(self.formula.gradients) if _is_smooth(inputs[i])]

    def free(self, arguments: Tensors) -> list[int]:
        """The same for the arguments (*dys, *inputs) of the gradient."""
        m = self.formula.outputs
        return [*(i for i in range(m) if arguments[i] is not None), *(m + i for i in self.smooth(arguments[m:]))]

    def needs(self, asked: tuple[bool, ...]) -> tuple[bool, ...]:
        """Which gradients are wanted: those that autograd asks for and that the formula has."""
        spare = len(asked) - self.formula.gradients
        return asked if spare == 0 else (*asked[: self.formula.gradients], *(False,) * spare)

    def reference(self, constants: Tensors) -> Callable[..., Tensors]:
        """inputs -> differentiable outputs, in plain torch."""
        return lambda *inputs: self.formula.reference(*inputs, *constants)[: self.formula.outputs]

    def gradient(self, constants: Tensors, needs: Sequence[bool]) -> Callable[..., Tensors]:
        """(*dys, *inputs) -> wanted gradients, in plain torch."""
        m = self.formula.outputs

        def gradient(*arguments: Any) -> Tensors:
            dys, inputs = arguments[:m], arguments[m:]
            of_wanted, values = _holding(self.reference(constants), inputs, self.wanted(inputs, needs))
            ys, pullback = torch.func.vjp(of_wanted, *values)
            return pullback(tuple(torch.zeros_like(y) if dy is None else dy for y, dy in zip(ys, dys)))

        return gradient

    def wanted(self, inputs: Sequence[Any], needs: Sequence[bool]) -> list[int]:
        """Positions of the inputs whose gradient is wanted."""
        return [i for i in range(self.formula.gradients) if needs[i] and inputs[i] is not None]

    def pick(self, inputs: Tensors, needs: Sequence[bool], grads: Tensors) -> Tensors:
        """Gradients in input order, None where there is no input or nobody asked."""
        asked = [g if t is not None and need else None for t, need, g in zip(inputs, needs, grads)]
        return (*asked, *self.nothing)

    def backward(
        self, namespace: str, dys: Tensors, inputs: Tensors, kept: Tensors, constants: Tensors, needs: tuple[bool, ...]
    ) -> Tensors:
        """The backward op: one gradient for each of the first ``gradients`` inputs."""
        formula = self.formula
        dy = dys[0] if formula.outputs == 1 else dys
        arguments = formula.backward_arguments(dy, inputs, kept, constants, needs)
        results = _results(formula.backward.direct[namespace](*arguments))
        if formula.added:
            results = (*results, dys[0].view_as(dys[0]))  # a Function may not return what it was given
        return results if formula.finish is None else formula.finish(results, inputs, kept, needs)

    def second(
        self,
        namespace: str,
        dys: Tensors,
        inputs: Tensors,
        constants: Tensors,
        needs: Sequence[bool],
        cotangents: Tensors,
    ) -> Tensors:
        """Gradients of (*dys, *inputs), given the cotangents of the input gradients."""
        m = self.formula.outputs
        if self.formula.second is not None:
            dy = dys[0] if m == 1 else dys
            ddy, grads = self.formula.second(namespace, dy, inputs, constants, needs, cotangents)
            stated = (*((ddy,) if m == 1 else ddy), *grads, *(None,) * (len(inputs) - len(grads)))
            return tuple(None if t is None else g for t, g in zip((*dys, *inputs), stated))
        arguments = (*dys, *inputs)
        free = self.free(arguments)
        of_free, values = _holding(self.gradient(constants, needs), arguments, free)
        first, pullback = torch.func.vjp(of_free, *values)
        given = (cotangents[i] for i in self.wanted(inputs, needs))
        found = dict(zip(free, pullback(tuple(torch.zeros_like(g) if c is None else c for g, c in zip(first, given)))))
        return tuple(found.get(i) for i in range(len(arguments)))


def differentiable(formula: Formula) -> Callable[..., Any]:
    """Builds ``apply(namespace, *inputs, *constants)`` from a formula; see the module docstring."""
    recipe = _Recipe(formula)
    n, m, direct = formula.inputs, formula.outputs, formula.forward.direct

    class Backward(torch.autograd.Function):
        """(*dys, *inputs, *kept) -> gradients of the inputs, by the backward op; differentiable itself."""

        @staticmethod
        def forward(namespace: str, needs: tuple[bool, ...], constants: Tensors, *tensors: Any) -> Tensors:
            dys, inputs, kept = tensors[:m], tensors[m : m + n], tensors[m + n :]
            return recipe.backward(namespace, dys, inputs, kept, constants, needs)

        @staticmethod
        def setup_context(ctx: Any, inputs: Tensors, output: Tensors) -> None:
            ctx.namespace, ctx.needs, ctx.constants, *tensors = inputs
            ctx.kept = len(tensors) - m - n
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*tensors[: m + n])
            ctx.save_for_forward(*tensors[: m + n])
            wanted = recipe.wanted(tensors[m : m + n], ctx.needs)
            ctx.mark_non_differentiable(*(g for i, g in enumerate(output) if i not in wanted))

        @staticmethod
        def backward(ctx: Any, *cotangents: torch.Tensor | None) -> Tensors:
            nothing = (None,) * ctx.kept
            if all(c is None for c in cotangents):
                return (None,) * (3 + m + n) + nothing
            dys, inputs = ctx.saved_tensors[:m], ctx.saved_tensors[m:]
            return (
                *(None, None, None),
                *recipe.second(ctx.namespace, dys, inputs, ctx.constants, ctx.needs, cotangents),
                *nothing,
            )

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Tensors:
            arguments = ctx.saved_tensors
            gradient = recipe.gradient(ctx.constants, ctx.needs)
            moved = iter(_jvp(gradient, arguments, tangents[3:], recipe.free(arguments)))
            wanted = recipe.wanted(arguments[m:], ctx.needs)
            return tuple(next(moved) if i in wanted else None for i in range(formula.gradients))

        @staticmethod
        def vmap(info: Any, in_dims: Tensors, namespace: str, needs: Any, constants: Tensors, *tensors: Any) -> Any:
            gradient = recipe.gradient(constants, needs)
            with torch.enable_grad():
                batched = torch.vmap(gradient, in_dims=in_dims[3 : 3 + m + n], randomness="same")
                grads = iter([g.view_as(g) for g in batched(*tensors[: m + n])])  # dy itself is no result
            wanted = recipe.wanted(tensors[m : m + n], needs)
            spare = next(t for t in tensors if t is not None).new_empty(0)
            slots = range(formula.gradients)
            return tuple(next(grads) if i in wanted else spare for i in slots), tuple(
                0 if i in wanted else None for i in slots
            )

    def gradients(ctx: Any, *dys: torch.Tensor | None) -> Tensors:
        given = recipe.cotangents(dys)
        if given is None:
            return (None,) * (2 + n)
        needs = recipe.needs(ctx.needs_input_grad[2:])
        saved = ctx.saved_tensors
        inputs = saved[:n]
        if torch.is_grad_enabled() or derivative_levels_active():
            grads = Backward.apply(ctx.namespace, needs, ctx.constants, *given, *saved)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                grads = recipe.backward(ctx.namespace, given, inputs, saved[n:], ctx.constants, needs)
        return (None, None, *recipe.pick(inputs, needs, grads))

    class Plain(torch.autograd.Function):
        """Forward for the common case: reverse mode alone. torch binds such a Function several times faster."""

        @staticmethod
        def forward(ctx: Any, namespace: str, constants: Tensors, *inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                result = direct[namespace](*inputs, *constants)
            recipe.save(ctx, namespace, constants, inputs, result)
            return result

        backward = staticmethod(gradients)

    class Forward(torch.autograd.Function):
        """inputs -> (*outputs, *statistics) by the forward op, in every kind of derivative."""

        @staticmethod
        def forward(namespace: str, constants: Tensors, *inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return formula.forward.overloads[namespace](*inputs, *constants)

        @staticmethod
        def setup_context(ctx: Any, inputs: Tensors, output: Any) -> None:
            namespace, constants, *tensors = inputs
            recipe.save(ctx, namespace, constants, tuple(tensors), output)
            ctx.save_for_forward(*tensors)

        backward = staticmethod(gradients)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            inputs = ctx.saved_tensors[:n]
            moved = _jvp(recipe.reference(ctx.constants), inputs, tangents[2:], recipe.smooth(inputs))
            return moved[0] if recipe.results == 1 else (*moved, *(None,) * (recipe.results - m))

        @staticmethod
        def vmap(info: Any, in_dims: Tensors, namespace: str, constants: Tensors, *inputs: Any) -> Any:
            dims = tuple(in_dims[2:])
            if formula.fold is not None:
                folded = formula.fold(lambda *a: apply(namespace, *a), info.batch_size, dims, inputs, constants)
                if folded is not None:
                    single = recipe.results == 1 and isinstance(folded[0], tuple)
                    return (folded[0][0], folded[1][0]) if single else folded
            results = torch.vmap(lambda *given: formula.reference(*given, *constants), in_dims=dims, randomness="same")(
                *inputs
            )
            return (results, (0,) * len(results)) if len(results) > 1 else (results[0], 0)

    # Function.apply without its Python: that looks for transforms, which are not open here, and in the arguments for
    # tensors left over from one, and takes a quarter of the time of a small call
    bind = super(torch.autograd.Function, Plain).apply

    def apply(namespace: str, *arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            if _forward_mode_active():
                torch._dynamo.graph_break("pyops: forward-mode AD runs outside the compiled graph")
            if _transforms_traced():
                # torch.func inside the compiled graph: plain torch is differentiable there, the op is not
                results = formula.reference(*arguments)
                return results if recipe.results > 1 else results[0]
            return formula.forward.overloads[namespace](*arguments)
        if derivative_levels_active():
            return Forward.apply(namespace, arguments[n:], *arguments[:n])
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments[:n]):
            return bind(namespace, arguments[n:], *arguments[:n])
        with torch._C._AutoDispatchBelowAutograd():
            return direct[namespace](*arguments)

    _register(recipe)
    return apply


def _forward_mode_active() -> bool:
    return forward_ad._current_level >= 0


@tracing.constant
def _transforms_traced() -> bool:
    """Is a torch.func transform open where dynamo traces? Asked then: dynamo opens them for real, and guards."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def derivative_levels_active() -> bool:
    """Inside torch.func's transforms or forward mode: more is asked than a gradient for ``.backward()``."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


_refusing: set[str] = set()


def _register(recipe: _Recipe) -> None:
    """Registers the same gradients on the ops themselves: for torch.compile and for callers of the raw op."""
    formula = recipe.formula
    n = formula.inputs
    for namespace in NAMESPACES:

        def setup_context(ctx: Any, inputs: Tensors, output: Any, namespace: str = namespace) -> None:
            recipe.save(ctx, namespace, inputs[n:], inputs[:n], output)

        def backward(ctx: Any, *dys: torch.Tensor | None) -> Tensors:
            nothing = (None,) * len(ctx.constants)
            given = recipe.cotangents(dys)
            if given is None:
                return (None,) * n + nothing
            needs = recipe.needs(ctx.needs_input_grad[:n])
            saved = ctx.saved_tensors
            grads = recipe.backward(ctx.namespace, given, saved[:n], saved[n:], ctx.constants, needs)
            return (*recipe.pick(saved[:n], needs, grads), *nothing)

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
