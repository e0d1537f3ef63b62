"""Bias and activation in one pass each way, for the rooms that put them behind a product: linear and conv_act.

    y = f(x + b),  dx = dy f'(x + b),  db[c] = sum of dx over all but the channels        x: [N, C, S], b: [C]

The kernels are those of the room linear.
"""

from __future__ import annotations

import torch

from . import activations, check, library
from .autograd import Formula, differentiable

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


def recorded(*tensors: torch.Tensor | None) -> bool:
    """Whether a derivative or a graph of a call on these tensors is wanted."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
