"""Softmax and its logarithm over one dimension.

    y[m,n,s] = exp(x[m,n,s]) / sum_k exp(x[m,k,s])        log: y = x - log(sum_k exp(x))

    x, y: [M, N, S], N the dimension that is normalised; the ops take it by number, of a tensor of any shape

Computed as exp(x - max) / sum exp(x - max), which does not overflow. Source: torch.nn.functional.softmax. The gradient
is derived in docs/math/losses.md.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ..core import autocast, backend, check, library
from ..core.autograd import Formula, differentiable
from ..core.intercept import route
from ..core.layout import is_channels_last
from ..core.samples import Maker, Sample, checked

_kernels = library.triton_kernels("softmax")


def _fwd_fake(x, dim, log_of):
    columns = math.prod(x.shape[:dim]) * math.prod(x.shape[dim + 1 :])
    stat = x.new_empty(columns, dtype=check.accumulate_dtype(x.dtype))
    return torch.empty_like(x), stat, torch.empty_like(stat)


_fwd = library.declare("softmax_fwd(Tensor x, int dim, bool log_of) -> (Tensor, Tensor, Tensor)", _fwd_fake, _kernels)
_bwd = library.declare(
    "softmax_bwd(Tensor dy, Tensor x, Tensor top, Tensor total, int dim, bool log_of) -> Tensor",
    lambda dy, x, *_: torch.empty_like(x),
    _kernels,
)


def _reference(x, dim, log_of):
    wide = x.to(check.accumulate_dtype(x.dtype))
    held = wide.detach()
    top = held.amax(dim) if x.shape[dim] else held.sum(dim)
    total = (held - top.unsqueeze(dim)).exp().sum(dim)
    y = wide.log_softmax(dim) if log_of else wide.softmax(dim)
    return y.to(x.dtype), top.flatten(), total.flatten()


def _fold(forward, batch, dims, inputs, constants):
    """A batch is one dimension more."""
    dim, log_of = constants
    y, *statistics = forward(inputs[0].movedim(dims[0], 0).contiguous(), dim + 1, log_of)
    return (y, *(t.reshape(batch, -1) for t in statistics)), (0, 0, 0)


_apply = differentiable(
    Formula(
        _fwd, _bwd, 1, 1,
        lambda dy, inputs, statistics, constants, needs: (dy, *inputs, *statistics, *constants),
        _reference,
        _fold,
    )
)  # fmt: skip


def _run(op: str, input: torch.Tensor, dim: int | None, dtype: torch.dtype | None, log_of: bool) -> torch.Tensor:
    if isinstance(input, torch.Tensor) and dtype is not None:
        input = input.to(dtype)
    check.floating(op, "input", input)
    (input,) = autocast.cast(op, input)
    rank = max(input.dim(), 1)
    if dim is None:
        dim = 0 if input.dim() in (0, 1, 3) else 1  # torch's old default
    if isinstance(dim, bool) or not isinstance(dim, int):
        check.fail(TypeError, op, "dim", type(dim).__name__, "an int")
    if not -rank <= dim < rank:
        check.fail(IndexError, op, "dim", dim, f"a dimension of an input of shape {list(input.shape)}")
    dim %= rank
    namespace = backend.namespace_for(op, input)
    if input.dim() == 4 and dim == 1 and is_channels_last(input):
        # channels are rows already, and stay so
        return _apply(namespace, input.permute(0, 2, 3, 1), 3, log_of)[0].permute(0, 3, 1, 2)
    if input.dim() == 0:
        return _apply(namespace, input.reshape(1), 0, log_of)[0].reshape(())
    return _apply(namespace, input.contiguous(), dim, log_of)[0]


def softmax(
    input: torch.Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """``exp(x) / sum exp(x)`` along ``dim``; drops in for torch.nn.functional.softmax.

    Args:
        input: Tensor[*], float32, float64, bfloat16 or float16, any strides.
        dim: the dimension that sums to 1; None is torch's old default (0 for 0, 1 or 3 dimensions, else 1).
        dtype: the input is converted to it first.

    Returns:
        Tensor of the input's shape; channels last stays channels last where ``dim`` is 1, else contiguous.

    Raises:
        IndexError: no such dimension.
        NotImplementedError: an input that is not floating point.

    A row of -inf gives NaN, as in torch. Sums are taken in float32 (float64 for float64); bitwise deterministic.
    Gradients of every order, forward mode, vmap and torch.compile.
    """
    return _run("softmax", input, dim, dtype, False)


def log_softmax(
    input: torch.Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """``x - log(sum exp(x))`` along ``dim``; drops in for torch.nn.functional.log_softmax. See ``softmax``."""
    return _run("log_softmax", input, dim, dtype, True)


def softmin(
    input: torch.Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """``softmax(-x)``; drops in for torch.nn.functional.softmin. See ``softmax``."""
    return _run("softmin", -input, dim, dtype, False)


class Softmax(torch.nn.Softmax):
    """torch.nn.Softmax whose forward is pyops.functional.softmax."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return softmax(input, self.dim)


class LogSoftmax(torch.nn.LogSoftmax):
    """torch.nn.LogSoftmax whose forward is pyops.functional.log_softmax."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return log_softmax(input, self.dim)


class Softmin(torch.nn.Softmin):
    """torch.nn.Softmin whose forward is pyops.functional.softmin."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return softmin(input, self.dim)


class Softmax2d(torch.nn.Softmax2d):
    """torch.nn.Softmax2d whose forward is pyops.functional.softmax over the channels."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.dim() not in (3, 4):
            check.fail(ValueError, "softmax", "input", f"{input.dim()} dimensions", "[C, H, W] or [N, C, H, W]")
        return softmax(input, -3)


def _accepts(*args: Any, **kwargs: Any) -> str | None:
    given = dict(zip(("input", "dim", "_stacklevel", "dtype"), args)) | kwargs
    x, dtype = given.get("input"), given.get("dtype")
    if isinstance(x, torch.Tensor) and (x.dtype if dtype is None else dtype) not in check.FLOATING:
        return f"dtype {str(x.dtype if dtype is None else dtype).removeprefix('torch.')}"
    return None


def _of_builtin(function):
    """The builtin's argument order: (input, dim, dtype)."""

    def call(input: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return function(input, dim, dtype=dtype)

    return call


for _function in (softmax, log_softmax):
    _name = _function.__name__
    route((getattr(torch.nn.functional, _name),), _name, _function, _accepts)
    route((getattr(torch, _name), getattr(torch.Tensor, _name)), _name, _of_builtin(_function), _accepts)
route((torch.nn.functional.softmin,), "softmin", softmin, _accepts)


def _sample(shape, dim, channels_last=False, shift=0.0):
    def make(t: Maker):
        return (t.input(shape, shift=shift, channels_last=channels_last), dim), {}

    return make


for _function in (softmax, log_softmax):
    checked(
        _function.__name__,
        _function,
        getattr(torch.nn.functional, _function.__name__),
        Sample("rows, tail of a vector load", _sample((3, 5), -1), derivatives=True),
        Sample("a middle dimension", _sample((2, 3, 4), 1)),
        Sample("columns of several vectors", _sample((2, 5, 37), 1)),
        Sample("channels last", _sample((2, 5, 3, 3), 1, True)),
        Sample("a long row, shifted", _sample((2, 1037), 1, shift=30.0)),
        Sample("a row longer than a tile", _sample((1, 4100), 1)),
        Sample("one element", _sample((1, 1), 0)),
        Sample("no rows", _sample((0, 7), 1)),
    )
checked(
    "softmin",
    softmin,
    torch.nn.functional.softmin,
    Sample("rows, tail of a vector load", _sample((3, 5), -1), derivatives=True),
)
