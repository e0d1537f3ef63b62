"""Fractional max pooling: windows whose distance is no integer, at random places.

    y[p,o] = max_{start(o) <= i < start(o) + K} x[p,i]          dx[p,i] = Σ_o dy[p,o] over the o whose maximum lies at i
    start(o) = floor((o + u) a) - floor(u a),  a = (I - K) / (O - 1);  the last window ends with the input

    x: [P, D, H, W], P examples and channels; y: [P, OD, OH, OW]; u in [0, 1), one for each plane and dimension

Source: torch.nn.functional.fractional_max_pool2d; Graham 2014, https://arxiv.org/abs/1412.6071.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ..core import autocast, backend, check, library
from ..core.autograd import Formula, Tensors, differentiable
from ..core.intercept import route
from ..core.samples import Maker, Sample, checked

_kernels = library.triton_kernels("fractional_max_pool")
_torch = torch.nn.functional


def _fwd_fake(x, samples, window):
    y = x.new_empty(x.shape[0], *window[::2])
    return y, torch.empty_like(y, dtype=torch.int64)


_fwd = library.declare(
    "fractional_max_pool_fwd(Tensor x, Tensor samples, int[] window) -> (Tensor, Tensor)", _fwd_fake, _kernels
)
_bwd = library.declare(
    "fractional_max_pool_bwd(Tensor dy, Tensor index, int[] size, int[] window) -> Tensor",
    lambda dy, index, size, window: dy.new_empty(size),
    _kernels,
)


def _reach(u, size, out, kernel):
    """Positions [P, out, kernel] of one dimension; u: [P]."""
    o = torch.arange(out, device=u.device)
    alpha = (size - kernel) / max(out - 1, 1)
    u = u.to(check.accumulate_dtype(u.dtype)).unsqueeze(1)
    start = torch.where(o == out - 1, size - kernel, ((o + u) * alpha).long() - (u * alpha).long())
    return start.unsqueeze(2) + torch.arange(kernel, device=u.device)


def _reference(x, samples, window):
    p, *sizes = x.shape
    z, r, c = (_reach(u, *axis) for u, axis in zip(samples.unbind(1), zip(sizes, window[::2], window[1::2])))
    z, r, c = z[:, :, None, None, :, None, None], r[:, None, :, None, None, :, None], c[:, None, None, :, None, None, :]
    position = ((z * sizes[1] + r) * sizes[2] + c).flatten(4).flatten(1, 3)
    values = x.detach().flatten(1).gather(1, position.flatten(1)).view(position.shape)
    # of equal maxima the first
    rank = torch.arange(position.shape[-1], 0, -1, device=x.device)
    first = torch.where(values == values.amax(-1, True), rank, 0).argmax(-1, True)
    index = position.gather(-1, first).squeeze(-1)
    shape = (p, *window[::2])
    return x.flatten(1).gather(1, index).view(shape), index.view(shape)


def _fold(forward, batch, dims, inputs, constants):
    """A batch is more planes."""
    x, samples = (t.expand(batch, *t.shape) if d is None else t.movedim(d, 0) for t, d in zip(inputs, dims))
    outputs = forward(x.flatten(0, 1), samples.flatten(0, 1), *constants)
    return tuple(t.unflatten(0, (batch, -1)) for t in outputs), (0, 0)


def _arguments(dy, inputs: Tensors, kept: Tensors, constants: Tensors, needs) -> Tensors:
    return dy, *kept, list(inputs[0].shape), *constants


_apply = differentiable(Formula(_fwd, _bwd, 2, 1, _arguments, _reference, _fold))


def _pool(
    op: str, rank: int, input: Any, kernel_size: Any, output_size: Any, output_ratio: Any, return_indices: bool,
    samples: torch.Tensor | None,
) -> Any:  # fmt: skip
    check.floating(op, "input", input)
    x: Any = autocast.cast(op, input)[0]
    if output_size is None and output_ratio is None:
        check.fail(ValueError, op, "output_size", None, "it or output_ratio")
    # one example may lack channels, as in torch
    if x.dim() not in (rank + 1, rank + 2) or 0 in x.shape[1:]:
        want = f"[N, C, *] or [C, *] with {rank} sizes > 0 in *"
        check.fail(RuntimeError, op, "input", f"shape {list(x.shape)}", want)
    spatial, kernel = list(x.shape[x.dim() - rank :]), check.ints(op, "kernel_size", kernel_size, rank)
    if output_size is not None:
        out = check.ints(op, "output_size", output_size, rank)
    else:
        ratios = [output_ratio] * rank if isinstance(output_ratio, (int, float)) else list(output_ratio)
        if len(ratios) != rank:
            check.fail(ValueError, op, "output_ratio", ratios, f"a number or {rank} numbers")
        out = [int(i * r) for i, r in zip(spatial, ratios)]
    window = [1, 1] * (3 - rank)
    for i, o, k in zip(spatial, out, kernel):
        # in three dimensions torch wants one position more
        if o < 0 or k < 1 or o + k - 1 > i - (rank == 3):
            check.fail(RuntimeError, op, "kernel_size", kernel, f"{out} windows that fit an input of sizes {spatial}")
        window += [o, k]
    batch, channels = (x.shape[0] if x.dim() == rank + 2 else 1), x.shape[-rank - 1]
    if samples is None:
        samples = torch.rand(batch, channels, rank, dtype=x.dtype, device=x.device)
    elif tuple(samples.shape) != (batch, channels, rank) or samples.dtype != x.dtype or samples.device != x.device:
        got = f"shape {list(samples.shape)}, {samples.dtype} on {samples.device}"
        want = f"shape {[batch, channels, rank]}, {x.dtype} on {x.device}"
        check.fail(RuntimeError, op, "_random_samples", got, want)
    lead = x.shape[: x.dim() - rank]
    if 0 in out or 0 in lead:
        y = x.flatten()[:0].reshape(*lead, *out)
        return (y, torch.empty_like(y, dtype=torch.int64)) if return_indices else y
    u = samples.reshape(batch * channels, rank)
    # torch's samples of two dimensions are those of the columns, then of the rows; of three in the order of dimensions
    u = torch.cat((torch.zeros_like(u[:, :1]), u.flip(1)), 1) if rank == 2 else u.contiguous()
    planes = x.contiguous().view(batch * channels, *(1,) * (3 - rank), *spatial)
    results = _apply(backend.namespace_for(op, x), planes, u, window)
    y, index = (t.view(*lead, *out) for t in results)
    return (y, index) if return_indices else y


def fractional_max_pool2d(
    input: torch.Tensor,
    kernel_size: Any,
    output_size: Any = None,
    output_ratio: Any = None,
    return_indices: bool = False,
    _random_samples: torch.Tensor | None = None,
) -> Any:
    """The largest value of windows at random places; drops in for torch.nn.functional.fractional_max_pool2d.

    Args:
        input: Tensor[N, C, H, W] or [C, H, W] in float32, float64, bfloat16 or float16.
        kernel_size: size of the windows, an int or two.
        output_size: number of windows, an int or two.
        output_ratio: their number as a share of the input's sizes, where ``output_size`` is None.
        return_indices: also returns where the maxima lie, int64 positions in the plane.

    Returns:
        Tensor[N, C, *output_size], or (y, indices).

    Raises:
        ValueError: neither ``output_size`` nor ``output_ratio``.
        RuntimeError: windows that do not fit.

    The places come from torch's generator, and are those of torch for the same seed. The first of equal maxima wins and
    NaN wins always, as in torch. Bitwise deterministic; gradients of every order, forward mode, vmap with
    ``randomness="same"`` or ``"different"``, and torch.compile.
    """
    op = "fractional_max_pool2d"
    return _pool(op, 2, input, kernel_size, output_size, output_ratio, return_indices, _random_samples)


def fractional_max_pool3d(
    input: torch.Tensor,
    kernel_size: Any,
    output_size: Any = None,
    output_ratio: Any = None,
    return_indices: bool = False,
    _random_samples: torch.Tensor | None = None,
) -> Any:
    """As ``fractional_max_pool2d``, over [N, C, D, H, W]; drops in for torch.nn.functional.fractional_max_pool3d."""
    op = "fractional_max_pool3d"
    return _pool(op, 3, input, kernel_size, output_size, output_ratio, return_indices, _random_samples)


class FractionalMaxPool2d(torch.nn.FractionalMaxPool2d):
    """torch.nn.FractionalMaxPool2d whose forward is pyops.functional.fractional_max_pool2d."""

    def forward(self, input: torch.Tensor) -> Any:
        return fractional_max_pool2d(
            input, self.kernel_size, self.output_size, self.output_ratio, self.return_indices, self._random_samples
        )


class FractionalMaxPool3d(torch.nn.FractionalMaxPool3d):
    """torch.nn.FractionalMaxPool3d whose forward is pyops.functional.fractional_max_pool3d."""

    def forward(self, input: torch.Tensor) -> Any:
        return fractional_max_pool3d(
            input, self.kernel_size, self.output_size, self.output_ratio, self.return_indices, self._random_samples
        )


def _both(pool: Any) -> Any:
    """The spelling that returns indices always."""

    def pool_with_indices(*args: Any, **kwargs: Any) -> Any:
        named = dict(zip(("input", "kernel_size", "output_size", "output_ratio", "return_indices"), args)) | kwargs
        return pool(**{**named, "return_indices": True})

    return pool_with_indices


for _function in (fractional_max_pool2d, fractional_max_pool3d):
    _name = _function.__name__
    route((getattr(_torch, _name),), _name, _function)
    route((getattr(_torch, f"{_name}_with_indices"),), _name, _both(_function))


def _sample(shape, kernel, out):
    def make(t: Maker):
        x = t.input(shape)
        rank = x.dim() - 2
        numbers = (torch.arange(math.prod(shape[:2]) * rank) * 5 % 16 / 16).reshape(*shape[:2], rank)
        return (x, kernel, out, None, False, numbers.to(x)), {}

    return make


def _truth(input, kernel_size, output_size, output_ratio, return_indices, samples):
    rank = input.dim() - 2
    u = samples.reshape(-1, rank)
    u = torch.cat((torch.zeros_like(u[:, :1]), u.flip(1)), 1) if rank == 2 else u
    planes = input.reshape(-1, *(1,) * (3 - rank), *input.shape[2:])
    window = [1, 1] * (3 - rank)
    for k, o in zip(kernel_size, output_size):
        window += [o, k]
    return _reference(planes, u, window)[0].reshape(*input.shape[:2], *output_size)


checked(
    "fractional_max_pool2d",
    fractional_max_pool2d,
    _truth,
    Sample("overlapping windows", _sample((1, 2, 5, 7), (2, 3), (3, 4)), derivatives=True),
    Sample("gaps, several blocks", _sample((2, 3, 30, 21), (2, 2), (9, 8))),
    Sample("one window", _sample((1, 2, 4, 4), (4, 3), (1, 1))),
    Sample("no examples", _sample((0, 2, 5, 5), (2, 2), (3, 3))),
)
