"""The end of a residual block in one pass: activation, dropout, and the residual added.

    y[i]  = f(x[i]) * scale + r[i]     where element i is kept, f(x[i]) * 0 + r[i] where it is dropped
    dx[i] = dy[i] * f'(x[i]) * scale   where it is kept, dy[i] * f'(x[i]) * 0 where it is dropped
    dr    = dy

    x, r, y: [N], scale = 1 / (1 - p)

The random numbers are those of ``dropout``: functions of (seed, offset), a pair drawn from torch's generator, and of
the element's number in memory. Only that pair and x are kept for the backward pass.

Sources: Srivastava et al. 2014, https://jmlr.org/papers/v15/srivastava14a.html; docs/math/linear.md.
"""

from __future__ import annotations

import torch

from ..core import activations, backend, check, library, random
from ..core.autograd import Formula, differentiable
from ..core.layout import memory_order
from ..core.samples import Maker, Sample, checked

_kernels = library.triton_kernels("act_dropout_add")

_PARAMETERS = "Tensor random, int threshold, float scale, int kind, float a, float b, float c"
_fwd = library.declare(
    f"act_dropout_add_fwd(Tensor x, Tensor residual, {_PARAMETERS}) -> Tensor",
    lambda x, *_: torch.empty_like(x),
    _kernels,
)
_bwd = library.declare(
    f"act_dropout_add_bwd(Tensor dy, Tensor x, {_PARAMETERS}) -> Tensor",
    lambda dy, x, *_: torch.empty_like(x),
    _kernels,
)


def _reference(x, residual, state, threshold, scale, kind, a, b, c):
    wide = check.accumulate_dtype(x.dtype)
    f = activations.TRUTH[kind](x.to(wide), a, b, c)
    kept = (random.bits(state, x.shape) >> 1) >= threshold
    return ((torch.where(kept, f * scale, f * 0) + residual.to(wide)).to(x.dtype),)


_apply = differentiable(
    Formula(
        _fwd, _bwd, 3, 2,
        lambda dy, inputs, statistics, constants, needs: (dy, inputs[0], inputs[2], *constants),
        _reference,
        added=True,
    )
)  # fmt: skip


def _added(input: torch.Tensor, residual: torch.Tensor, state: torch.Tensor, p: float, activation: str) -> torch.Tensor:
    """With the elements dropped that ``state`` drops."""
    numbers = activations.fused("act_dropout_add", activation)
    order = memory_order(input)
    x, r = (t.permute(order).contiguous() for t in (input, residual))
    scale = 1 / (1 - p) if p < 1 else 0.0
    namespace = backend.namespace_for("act_dropout_add", input)
    y = _apply(namespace, x.view(-1), r.view(-1), state, random.drop_threshold(p), scale, *numbers).view(x.shape)
    return y.permute(sorted(range(x.dim()), key=order.__getitem__))


def act_dropout_add(
    input: torch.Tensor,
    residual: torch.Tensor,
    p: float = 0.5,
    activation: str = "gelu",
    training: bool = True,
) -> torch.Tensor:
    """``dropout(f(x), p) + residual`` in one pass; the gradient in x is another.

    Args:
        input: Tensor[*] in float32, float64, bfloat16 or float16.
        residual: Tensor of the same shape, dtype and device.
        p: probability of dropping an element, in [0, 1].
        activation: a name as in ``bias_act``; ``"identity"`` for none.
        training: False drops nothing.

    Returns:
        Tensor[*] in the order of the input's dimensions in memory, in which elements are numbered.

    Raises:
        ValueError: p outside [0, 1], or an unknown activation.
        RuntimeError: a residual that does not fit.

    The mask is drawn from torch's generator and never stored; a dropped NaN or infinity gives NaN, as in torch. The sum
    is rounded once. Gradients of every order, forward mode, vmap, torch.compile.
    """
    op = "act_dropout_add"
    check.floating(op, "input", input)
    if not isinstance(residual, torch.Tensor):
        check.fail(TypeError, op, "residual", type(residual).__name__, "a tensor")
    if residual.shape != input.shape or residual.dtype != input.dtype or residual.device != input.device:
        got = f"shape {list(residual.shape)}, {residual.dtype} on {residual.device}"
        wanted = f"shape {list(input.shape)}, {input.dtype} on {input.device}, as the input"
        check.fail(RuntimeError, op, "residual", got, wanted)
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        check.fail(TypeError, op, "p", type(p).__name__, "a number")
    if not 0 <= p <= 1:
        check.fail(ValueError, op, "p", p, "a probability in [0, 1]")
    drops = training and p > 0
    state = random.draw(input.device) if drops else torch.zeros(2, dtype=torch.int64, device=input.device)
    return _added(input, residual, state, float(p) if drops else 0.0, activation)


def _truth(input, residual, state, p, activation):
    """The same in plain torch; elements are numbered as they lie in memory."""
    order = memory_order(input)
    moved = input.permute(order)
    kept = random.keep(state, moved.shape, p).permute(sorted(range(input.dim()), key=order.__getitem__))
    wide = check.accumulate_dtype(input.dtype)
    f = activations.truth(activation)(input.to(wide))
    scale = 1 / (1 - p) if p < 1 else 0.0
    return (torch.where(kept, f * scale, f * 0) + residual.to(wide)).to(input.dtype)


def _sample(shape, p=0.3, activation="gelu", channels_last=False):
    def make(t: Maker):
        state = torch.tensor([-(2**60) + 12345, 2**33 + 7], device=t.device)
        tensors = t.input(shape, channels_last=channels_last), t.input(shape, channels_last=channels_last)
        return (*tensors, state, p, activation), {}

    return make


checked(
    "act_dropout_add",
    _added,
    _truth,
    Sample("tail of a vector", _sample((3, 7)), derivatives=True),
    Sample("channels last", _sample((2, 5, 3, 3), 0.0, "silu", True)),
    Sample("several blocks, most dropped", _sample((3, 1031), 0.9, "tanh")),
    Sample("nothing dropped, no activation", _sample((2, 33), 0.0, "identity")),
    Sample("everything dropped", _sample((2, 9), 1.0, "relu")),
    Sample("no elements", _sample((0, 3))),
)
