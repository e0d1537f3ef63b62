"""Bias and activation in one pass each way, for the rooms that put them behind a product: linear and conv_act.

    y = f(x + b),  dx = dy f'(x + b),  db[c] = sum of dx over all but the channels        x: [N, C, S], b: [C]

``channel_sum`` is that sum alone, the gradient of a bias that a product adds itself. The kernels are those of the room
linear.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import activations, check, library, multilinear
from .autograd import Formula, differentiable
from .multilinear import Multilinear

_kernels = library.triton_kernels("linear")

_PARAMETERS = "int kind, float a, float b, float c"
_fwd = library.declare(
    f"bias_act_fwd(Tensor x, Tensor bias, {_PARAMETERS}) -> Tensor", lambda x, *_: torch.empty_like(x), _kernels
)
apply_inplace = library.declare(
    f"bias_act_inplace(Tensor(a!) x, Tensor bias, {_PARAMETERS}) -> ()", lambda *_: None, _kernels
)
_bwd = library.declare(
    f"bias_act_bwd(Tensor dy, Tensor x, Tensor bias, {_PARAMETERS}) -> (Tensor, Tensor)",
    lambda dy, x, bias, *_: (torch.empty_like(x), torch.empty_like(bias)),
    _kernels,
)


def _reference(x, bias, kind, a, b, c):
    wide = check.accumulate_dtype(x.dtype)
    return (activations.TRUTH[kind](x.to(wide) + bias.to(wide)[:, None], a, b, c).to(x.dtype),)


apply = differentiable(
    Formula(
        _fwd, _bwd, 2, 2,
        lambda dy, inputs, statistics, constants, needs: (dy, *inputs, *constants),
        _reference,
    )
)  # fmt: skip

_sum = library.declare("channel_sum(Tensor x) -> Tensor", lambda x: x.new_empty(x.shape[1]), _kernels)


def _sum_gradient(namespace, dy, inputs, constants, needs):
    x = inputs[0]
    return (dy.view(-1, *(1,) * (x.dim() - 2)).expand(x.shape),)


def _sum_fold(namespace, batch, dims, inputs, constants):
    x = multilinear.first(batch, dims[0], inputs[0]).movedim(0, 1)
    n, _, c, *s = x.shape
    return channel_sum(namespace, x.reshape(n, batch * c, *s)).view(batch, c), 0


# (namespace, x [N, C, S] or [N, C]) -> [C], in an order that the shape fixes
channel_sum: Callable[..., torch.Tensor] = multilinear.differentiable(
    Multilinear(
        _sum,
        1,
        _sum_gradient,
        lambda namespace, inputs, tangents, constants: channel_sum(namespace, tangents[0].contiguous()),
        _sum_fold,
    )
)


def recorded(*tensors: torch.Tensor | None) -> bool:
    """Whether a derivative or a graph of a call on these tensors is wanted."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
