"""Layer normalisation over the last dimensions.

    y[m,n] = (x[m,n] - mean[m]) * rstd[m] * w[n] + b[n]        rstd = 1 / sqrt(var + eps), var biased

    x, y: [M, N]   w, b: [N]   mean, rstd: [M]

Source: Ba, Kiros, Hinton 2016, https://arxiv.org/abs/1607.06450; torch.nn.functional.layer_norm.
The gradient is derived in docs/math/norms.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..core import autocast, backend, blocking, check, layout, library
from ..core.autograd import Formula, Tensors, differentiable
from ..core.explain import explains
from ..core.intercept import route
from ..core.samples import Maker, Sample, checked

_kernels = library.triton_kernels("layer_norm")


def _fwd_fake(x, weight, bias, eps):
    statistic = x.new_empty(x.shape[0], dtype=check.accumulate_dtype(x.dtype))
    return torch.empty_like(x), statistic, torch.empty_like(statistic)


def _bwd_fake(dy, x, weight, mean, rstd, need_dx, need_dw):
    dtype = weight.dtype if weight is not None else mean.dtype
    dw = x.new_empty(x.shape[1] if need_dw else 0, dtype=dtype)
    return torch.empty_like(x) if need_dx else x.new_empty(0), dw, torch.empty_like(dw)


_fwd = library.declare(
    "layer_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)",
    _fwd_fake,
    _kernels,
)
_bwd = library.declare(
    "layer_norm_bwd(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, bool need_dx, bool need_dw)"
    " -> (Tensor, Tensor, Tensor)",
    _bwd_fake,
    _kernels,
)


def _reference(x, weight, bias, eps):
    wide = check.accumulate_dtype(x.dtype)
    centred = x.to(wide) - x.to(wide).mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1) + eps).rsqrt()
    y = centred * rstd[:, None]
    y = y if weight is None else y * weight.to(wide)
    y = y if bias is None else y + bias.to(wide)
    return y.to(x.dtype), x.to(wide).mean(-1).detach(), rstd.detach()


def _fold(forward, batch, dims, inputs, constants):
    """A batch of inputs under one weight is more rows."""
    x, weight, bias = inputs
    if dims[0] is None or dims[1] is not None or dims[2] is not None:
        return None
    x = x.movedim(dims[0], 0)
    rows, width = x.shape[1:]
    y, mean, rstd = forward(x.reshape(batch * rows, width), weight, bias, *constants)
    return (y.reshape(batch, rows, width), mean.reshape(batch, rows), rstd.reshape(batch, rows)), (0, 0, 0)


def _backward_arguments(dy, inputs: Tensors, statistics: Tensors, constants: Tensors, needs) -> Tensors:
    x, weight, _ = inputs
    return dy, x, weight, *statistics, needs[0], needs[1] or needs[2]


_apply = differentiable(
    Formula(_fwd, _bwd, 3, 3, _backward_arguments, _reference, _fold),
)


def layer_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """Normalises over the last dimensions, then scales and shifts; drops in for torch.nn.functional.layer_norm.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias`` with mean and biased variance over ``normalized_shape``.

    Args:
        input: Tensor[*, *normalized_shape], float32, float64, bfloat16 or float16, any strides.
        normalized_shape: sizes of the trailing dimensions to normalise over, at least one.
        weight: Tensor[*normalized_shape] or None (1), in the input's dtype or float32.
        bias: Tensor[*normalized_shape] or None (0), in the weight's dtype.
        eps: added to the variance, >= 0.

    Returns:
        Tensor of the input's shape and dtype, contiguous.

    Raises:
        RuntimeError: shapes, devices or dtypes that do not fit together.
        NotImplementedError: an input that is not floating point.
        ValueError: a negative eps.

    Sums are taken in float32 (float64 for float64) with the variance computed about the mean, so a large mean costs
    no accuracy. Bitwise deterministic. Gradients of every order, forward mode, vmap and torch.compile are supported.
    """
    check.floating("layer_norm", "input", input)
    shape = check.normalized_shape("layer_norm", input, normalized_shape)
    check.non_negative("layer_norm", "eps", eps)
    input, weight, bias = autocast.cast("layer_norm", input, weight, bias)
    check.affine("layer_norm", input, shape, weight=weight, bias=bias)
    x = layout.rows(input, len(shape))
    y, _, _ = _apply(
        backend.namespace_for("layer_norm", input),
        x,
        layout.row(weight),
        layout.row(bias),
        float(eps),
    )
    return y if x is input else y.reshape(input.shape)


class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm whose forward is pyops.functional.layer_norm."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


def _notes(shapes, dtype, name):
    columns = math.prod(shapes[1]) if len(shapes) > 1 else shapes[0][-1]
    return blocking.rows(shapes[0], columns, dtype, grouped=True) if name == "cpu" else []


explains("layer_norm", _notes)

route((torch.nn.functional.layer_norm, torch.layer_norm), "layer_norm", layer_norm)


def _sample(shape, normalized, affine=True, eps=1e-5, large_mean=0.0):
    def make(t: Maker):
        x = t.input(shape, shift=large_mean)
        parameters = {"weight": t.input(normalized), "bias": t.input(normalized)} if affine else {}
        return (x, normalized), {**parameters, "eps": eps}

    return make


checked(
    "layer_norm",
    layer_norm,
    torch.nn.functional.layer_norm,
    Sample("ragged rows, tail of a vector load", _sample((3, 5), (5,)), derivatives=True),
    Sample("two normalised dimensions", _sample((2, 3, 4), (3, 4), eps=0.1), derivatives=True),
    Sample("no affine", _sample((4, 8), (8,), affine=False), derivatives=True),
    Sample("one element", _sample((1, 1), (1,), eps=1.0)),
    Sample("no rows", _sample((0, 7), (7,))),
    Sample("no columns", _sample((3, 0), (0,))),
    Sample("a row of several vectors", _sample((5, 257), (257,))),
    Sample("a wide row", _sample((2, 3000), (3000,))),
    Sample("mean far above the deviation", _sample((4, 96), (96,), large_mean=1e3)),
)
