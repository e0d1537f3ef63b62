"""Root-mean-square normalisation over the last dimensions.

    y[m,n] = x[m,n] * rstd[m] * w[n]        rstd = 1 / sqrt(mean_n(x²) + eps)

    x, y: [M, N]   w: [N]   rstd: [M]

Source: Zhang, Sennrich 2019, https://arxiv.org/abs/1910.07467; torch.nn.functional.rms_norm.
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

_kernels = library.triton_kernels("rms_norm")


def _fwd_fake(x, weight, eps):
    return torch.empty_like(x), x.new_empty(x.shape[0], dtype=check.accumulate_dtype(x.dtype))


def _bwd_fake(dy, x, weight, rstd, need_dx, need_dw):
    dtype = weight.dtype if weight is not None else rstd.dtype
    dx = torch.empty_like(x) if need_dx else x.new_empty(0)
    return dx, x.new_empty(x.shape[1] if need_dw else 0, dtype=dtype)


_fwd = library.declare(
    "rms_norm_fwd(Tensor x, Tensor? weight, float eps) -> (Tensor, Tensor)",
    _fwd_fake,
    _kernels,
)
_bwd = library.declare(
    "rms_norm_bwd(Tensor dy, Tensor x, Tensor? weight, Tensor rstd, bool need_dx, bool need_dw) -> (Tensor, Tensor)",
    _bwd_fake,
    _kernels,
)


def _reference(x, weight, eps):
    wide = check.accumulate_dtype(x.dtype)
    rstd = (x.to(wide).square().mean(-1) + eps).rsqrt()
    y = x.to(wide) * rstd[:, None]
    y = y if weight is None else y * weight.to(wide)
    return y.to(x.dtype), rstd.detach()


def _fold(forward, batch, dims, inputs, constants):
    """A batch of inputs under one weight is more rows."""
    x, weight = inputs
    if dims[0] is None or dims[1] is not None:
        return None
    x = x.movedim(dims[0], 0)
    rows, width = x.shape[1:]
    y, rstd = forward(x.reshape(batch * rows, width), weight, *constants)
    return (y.reshape(batch, rows, width), rstd.reshape(batch, rows)), (0, 0)


def _backward_arguments(dy, inputs: Tensors, statistics: Tensors, constants: Tensors, needs) -> Tensors:
    x, weight = inputs
    return dy, x, weight, *statistics, needs[0], needs[1]


_apply = differentiable(Formula(_fwd, _bwd, 2, 2, _backward_arguments, _reference, _fold))


def rms_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> torch.Tensor:
    """Divides by the root mean square over the last dimensions; drops in for torch.nn.functional.rms_norm.

    ``y = x / sqrt(mean(x²) + eps) * weight`` with the mean over ``normalized_shape``.

    Args:
        input: Tensor[*, *normalized_shape], float32, float64, bfloat16 or float16, any strides.
        normalized_shape: sizes of the trailing dimensions to normalise over, at least one.
        weight: Tensor[*normalized_shape] or None (1), in the input's dtype or float32.
        eps: added to the mean square, >= 0; None means the machine epsilon of the dtype of the sums, as in torch.

    Returns:
        Tensor of the input's shape and dtype, contiguous.

    Raises:
        RuntimeError: shapes, devices or dtypes that do not fit together.
        NotImplementedError: an input that is not floating point.
        ValueError: a negative eps.

    Sums are taken in float32 (float64 for float64). Bitwise deterministic. Gradients of every order, forward mode,
    vmap and torch.compile are supported.
    """
    check.floating("rms_norm", "input", input)
    shape = check.normalized_shape("rms_norm", input, normalized_shape)
    input, weight = autocast.cast("rms_norm", input, weight)
    if eps is None:
        eps = torch.finfo(check.accumulate_dtype(input.dtype)).eps
    check.non_negative("rms_norm", "eps", eps)
    check.affine("rms_norm", input, shape, weight=weight)
    x = layout.rows(input, len(shape))
    y, _ = _apply(
        backend.namespace_for("rms_norm", input),
        x,
        layout.row(weight),
        float(eps),
    )
    return y if x is input else y.reshape(input.shape)


class RMSNorm(torch.nn.RMSNorm):
    """torch.nn.RMSNorm whose forward is pyops.functional.rms_norm."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.normalized_shape, self.weight, self.eps)


def _notes(shapes, dtype, name):
    columns = math.prod(shapes[1]) if len(shapes) > 1 else shapes[0][-1]
    return blocking.rows(shapes[0], columns, dtype, grouped=False) if name == "cpu" else []


explains("rms_norm", _notes)

route((torch.nn.functional.rms_norm, torch.rms_norm), "rms_norm", rms_norm)


def _sample(shape, normalized, affine=True, eps: float | None = 1e-5):
    def make(t: Maker):
        x = t.input(shape)
        parameters = {"weight": t.input(normalized)} if affine else {}
        return (x, normalized), {**parameters, "eps": eps}

    return make


checked(
    "rms_norm",
    rms_norm,
    torch.nn.functional.rms_norm,
    Sample("ragged rows, tail of a vector load", _sample((3, 5), (5,)), derivatives=True),
    Sample("two normalised dimensions", _sample((2, 3, 4), (3, 4), eps=0.1), derivatives=True),
    Sample("no affine, eps of the dtype", _sample((4, 8), (8,), affine=False, eps=None)),
    Sample("one element", _sample((1, 1), (1,), eps=1.0)),
    Sample("no rows", _sample((0, 7), (7,))),
    Sample("a row of several vectors", _sample((5, 257), (257,))),
    Sample("a wide row", _sample((2, 3000), (3000,))),
)
