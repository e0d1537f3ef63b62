"""Pooling: the maximum, the average or the p-norm of windows, at a stride or adaptively, over 1 to 3 dimensions.

    max  y[o] = max_{i in window(o)} x[i]          avg  y[o] = sum_{i in window(o)} x[i] / divisor(o)
    Lp   y[o] = (sum_{i in window(o)} x[i]^p)^(1/p)

    x: [N, C, *spatial] or [C, *spatial]   window(o) = {o·stride - padding + k·dilation : 0 <= k < kernel} in the input
    adaptive: window(o) = [floor(o·I/O), ceil((o + 1)·I/O))

Sources: torch.nn.functional.max_pool2d and its family. The gradients are derived in docs/math/pooling.md.

What all share: Tensor of float32, float64, bfloat16 or float16; channels last stays channels last, for gradients too;
sums in float32 (float64 for float64); the first of equal maxima wins and NaN wins always, as in torch; bitwise
deterministic, forward and backward; gradients of every order, forward mode, vmap and torch.compile. Where nobody asks
for indices the positions of the maxima take one byte each. They raise what torch raises: RuntimeError for sizes that do
not fit, TypeError for what is no number, NotImplementedError for an input that is not floating point.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..core import autocast, backend, check, library
from ..core.autograd import Formula, Tensors, differentiable
from ..core.intercept import route
from ..core.layout import is_channels_last
from ..core.samples import Maker, Sample, checked

_kernels = library.triton_kernels("pool")
_torch = torch.nn.functional
NOTHING, TAPS, POSITIONS = 0, 1, 2  # what is kept of the maxima: csrc/common/pool.h
Size = int | Sequence[int]


def _out_shape(x, window):
    return x.shape[0], window[1], window[6], window[11], x.shape[4]


def _max_fake(x, window, keep):
    shape = [0] if keep == NOTHING else _out_shape(x, window)
    return x.new_empty(_out_shape(x, window)), x.new_empty(
        shape, dtype=torch.int64 if keep == POSITIONS else torch.uint8
    )


_max_fwd = library.declare("max_pool_fwd(Tensor x, int[] window, int keep) -> (Tensor, Tensor)", _max_fake, _kernels)
_max_bwd = library.declare(
    "max_pool_bwd(Tensor dy, Tensor index, int[] size, int[] window) -> Tensor",
    lambda dy, index, size, window: dy.new_empty(size),
    _kernels,
)
_avg_fwd = library.declare(
    "avg_pool_fwd(Tensor x, int[] window, bool include_padding, int divisor) -> Tensor",
    lambda x, window, include_padding, divisor: x.new_empty(_out_shape(x, window)),
    _kernels,
)
_avg_bwd = library.declare(
    "avg_pool_bwd(Tensor dy, int[] size, int[] window, bool include_padding, int divisor) -> Tensor",
    lambda dy, size, window, include_padding, divisor: dy.new_empty(size),
    _kernels,
)


def _parts(x: torch.Tensor, window: list[int]) -> tuple[torch.Tensor, tuple[list[int], ...], bool]:
    """x as torch wants it; out, kernel, stride, padding, dilation; and whether sizes were rounded up."""
    out, kernel, stride, padding, dilation = (window[1 + k :: 5] for k in range(5))
    floor = [
        (i + 2 * p - d * (k - 1) - 1) // s + 1 for i, k, s, p, d in zip(x.shape[1:4], kernel, stride, padding, dilation)
    ]
    return x.permute(0, 4, 1, 2, 3), (out, kernel, stride, padding, dilation), out != floor


def _max_reference(x, window, keep):
    planes, (out, kernel, stride, padding, dilation), ceil = _parts(x, window)
    if window[0]:
        y, index = _torch.adaptive_max_pool3d(planes, out, return_indices=True)
    else:
        y, index = _torch.max_pool3d(planes, kernel, stride, padding, dilation, ceil, return_indices=True)
    return y.permute(0, 2, 3, 4, 1), index.permute(0, 2, 3, 4, 1)


def _avg_reference(x, window, include_padding, divisor):
    planes, (out, kernel, stride, padding, _), ceil = _parts(x, window)
    if window[0]:
        y = _torch.adaptive_avg_pool3d(planes, out)
    elif window[1:6] == [1, 1, 1, 0, 1] and planes.shape[2] == 1:
        # unlike that of three dimensions it takes a window larger than the input, which ceil_mode allows
        images = _torch.avg_pool2d(
            planes.squeeze(2), kernel[1:], stride[1:], padding[1:], ceil, include_padding, divisor or None
        )
        y = images.unsqueeze(2)
    else:
        y = _torch.avg_pool3d(planes, kernel, stride, padding, ceil, include_padding, divisor or None)
    return (y.permute(0, 2, 3, 4, 1),)


def _fold(forward, batch, dims, inputs, constants):
    """A batch is more planes."""
    x = inputs[0].movedim(dims[0], 0)
    result = forward(x.reshape(-1, *x.shape[2:]), *constants)
    split = lambda t: t.reshape(batch, -1, *t.shape[1:]) if t.dim() == 5 else t
    if isinstance(result, torch.Tensor):
        return split(result), 0
    return tuple(split(t) for t in result), tuple(0 if t.dim() == 5 else None for t in result)


def _max_arguments(dy, inputs: Tensors, kept: Tensors, constants: Tensors, needs) -> Tensors:
    return dy, *kept, list(inputs[0].shape), constants[0]


def _avg_arguments(dy, inputs: Tensors, kept: Tensors, constants: Tensors, needs) -> Tensors:
    return dy, list(inputs[0].shape), *constants


_apply_max = differentiable(Formula(_max_fwd, _max_bwd, 1, 1, _max_arguments, _max_reference, _fold))
_apply_avg = differentiable(Formula(_avg_fwd, _avg_bwd, 1, 1, _avg_arguments, _avg_reference, _fold))


# Arguments


def _check_input(op: str, x: torch.Tensor, rank: int) -> torch.Tensor:
    """The input after autocast; see ``_may_lack_channels``."""
    check.floating(op, "input", x)
    (x,) = autocast.cast(op, x)
    if x.dim() not in (rank + 1, rank + 2) or 0 in x.shape[x.dim() - rank - (not _may_lack_channels(op, x, rank)) :]:
        averages = rank == 2 and x.dim() < 3 and op in ("avg_pool2d", "lp_pool2d")
        kind = IndexError if averages else RuntimeError  # as torch
        check.fail(kind, op, "input", f"shape {list(x.shape)}", f"[N, C, *] or [C, *] with {rank} sizes > 0 in *")
    return x


def _may_lack_channels(op: str, x: torch.Tensor, rank: int) -> bool:
    """What torch takes: an adaptive pooling of one example, or an average over one or two dimensions."""
    return op.startswith("adaptive") and (x.dim() == rank + 1 or op in ("adaptive_avg_pool1d", "adaptive_avg_pool2d"))


def _check_adaptive(op: str, x: torch.Tensor, rank: int, output_size: Any) -> torch.Tensor:
    told = len(output_size) if rank > 1 and isinstance(output_size, (list, tuple)) else 0
    # where sizes are told one by one torch looks for their defaults first
    if told and isinstance(x, torch.Tensor) and x.dim() <= told:
        check.fail(ValueError, op, "input", f"shape {list(x.shape)}", f"more than {told} dimensions")
    return _check_input(op, x, rank)


_windows: dict[Any, list[int]] = {}
_MOST_WINDOWS = 4096


def _window(
    op: str, x: torch.Tensor, rank: int, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
) -> list[int]:
    """What the kernels take of the window; found once for sizes that come again, which costs more than a small call."""
    known = type(x) is torch.Tensor and not torch.compiler.is_compiling()  # sizes of others may be symbols
    if not known or not check.exact(kernel_size, 1 if stride is None else stride, padding, dilation):
        return _new_window(op, x, rank, kernel_size, stride, padding, dilation, ceil_mode)
    key = (op, x.shape, kernel_size, stride, padding, dilation, bool(ceil_mode))
    window = _windows.get(key)
    if window is None:
        window = _new_window(op, x, rank, kernel_size, stride, padding, dilation, ceil_mode)
        if len(_windows) >= _MOST_WINDOWS:
            _windows.clear()
        _windows[key] = window
    return window


def _new_window(
    op: str, x: torch.Tensor, rank: int, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
) -> list[int]:
    numbers = lambda argument, value: check.ints(op, argument, value, rank, spread=True)
    kernel = numbers("kernel_size", kernel_size)
    empty = stride is None or (isinstance(stride, (list, tuple)) and len(stride) == 0)
    strides = kernel if empty else numbers("stride", stride)
    paddings, dilations = numbers("padding", padding), numbers("dilation", dilation)
    for argument, values in (("kernel_size", kernel), ("stride", strides), ("dilation", dilations)):
        if min(values) < 1:
            check.fail(RuntimeError, op, argument, values, "numbers > 0")
    window = [1, 1, 1, 0, 1] * (3 - rank)
    for i, k, s, p, d in zip(x.shape[x.dim() - rank :], kernel, strides, paddings, dilations):
        span = d * (k - 1) + 1
        if not 0 <= 2 * p <= k:
            check.fail(RuntimeError, op, "padding", p, f"between 0 and {k // 2}, half of the kernel")
        out = (i + 2 * p - span + (s - 1 if ceil_mode else 0)) // s + 1
        if ceil_mode and (out - 1) * s >= i + p:
            out -= 1  # the last window would begin in the padding
        if out < 1:
            check.fail(RuntimeError, op, "kernel_size", kernel, f"a window that fits an input of shape {list(x.shape)}")
        window += [out, k, s, p, d]
    return [0, *window]


def _adaptive_window(op: str, x: torch.Tensor, rank: int, output_size: Any) -> tuple[list[int], list[int]]:
    """(window, output size); windows that tile the input evenly are said as ordinary ones."""
    sizes = [output_size] * rank if isinstance(output_size, int) or output_size is None else list(output_size)
    if len(sizes) == 1:
        sizes *= rank
    if len(sizes) != rank:
        check.fail(RuntimeError, op, "output_size", sizes, f"an int or {rank} ints")
    extents = list(x.shape[x.dim() - rank :])
    outs = [i if o is None else o for i, o in zip(extents, sizes)]
    if not all(isinstance(o, int) for o in outs):
        check.fail(TypeError, op, "output_size", repr(output_size), f"an int or a sequence of {rank} ints or None")
    if min(outs) < 0:
        check.fail(RuntimeError, op, "output_size", outs, "numbers >= 0")
    window = [1, 1, 1, 0, 1] * (3 - rank)
    even = all(o > 0 and i % o == 0 for i, o in zip(extents, outs))
    for i, o in zip(extents, outs):
        step = i // o if even else 1
        window += [o, step, step, 0, 1]
    return [0 if even else 1, *window], outs


def _planes(x: torch.Tensor, rank: int) -> tuple[torch.Tensor, bool]:
    """x as [P, D, H, W, C], and whether it is channels last."""
    ones = (1,) * (3 - rank)
    if x.dim() == rank + 2 and is_channels_last(x):
        moved = x.movedim(1, -1)
        return moved.reshape(moved.shape[0], *ones, *moved.shape[1:]), True
    x = x.contiguous()
    spatial = x.shape[x.dim() - rank :]
    return x.view(math.prod(x.shape[: x.dim() - rank]), *ones, *spatial, 1), False


def _restore(y: torch.Tensor, x: torch.Tensor, rank: int, channels_last: bool) -> torch.Tensor:
    spatial = y.shape[4 - rank : 4]
    if channels_last:
        return y.view(x.shape[0], *spatial, x.shape[1]).movedim(-1, 1)
    return y.view(*x.shape[: x.dim() - rank], *spatial)


def _nothing(x: torch.Tensor, rank: int, outs: list[int]) -> torch.Tensor:
    """An output without elements, which still hangs on x."""
    return x.flatten()[:0].reshape(*x.shape[: x.dim() - rank], *outs)


def _pool_max(op: str, x: torch.Tensor, rank: int, window: list[int], return_indices: bool) -> Any:
    planes, channels_last = _planes(x, rank)
    small = not window[0] and math.prod(window[2::5]) <= 256
    asked = (torch.is_grad_enabled() and x.requires_grad) or torch._C._are_functorch_transforms_active()
    keep = POSITIONS if return_indices else NOTHING if not asked else TAPS if small else POSITIONS
    y, index = _apply_max(backend.namespace_for(op, x), planes, window, keep)
    y = _restore(y, x, rank, channels_last)
    return (y, _restore(index, x, rank, channels_last)) if return_indices else y


def _pool_avg(op: str, x: torch.Tensor, rank: int, window: list[int], include: bool, divisor: int) -> torch.Tensor:
    planes, channels_last = _planes(x, rank)
    y = _apply_avg(backend.namespace_for(op, x), planes, window, include, divisor)
    return _restore(y, x, rank, channels_last)


# The functions


def _max_pool(rank: int) -> Any:
    op = f"max_pool{rank}d"

    def max_pool(
        input: torch.Tensor,
        kernel_size: Size,
        stride: Size | None = None,
        padding: Size = 0,
        dilation: Size = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Any:
        x = _check_input(op, input, rank)
        window = _window(op, x, rank, kernel_size, stride, padding, dilation, ceil_mode)
        return _pool_max(op, x, rank, window, return_indices)

    return _named(
        max_pool,
        op,
        f"""The largest value of each window; drops in for torch.nn.functional.{op}.

    Args:
        input: Tensor[N, C, *] or Tensor[C, *] with {rank} spatial dimensions.
        kernel_size: taps of the window in each dimension, an int or {rank}.
        stride: distance of windows; the kernel's size if None.
        padding: positions of -inf on both sides, at most half of the window.
        dilation: distance of taps.
        ceil_mode: keeps a last window that reaches beyond the input.
        return_indices: also returns where the maxima lie.

    Returns:
        y, Tensor[N, C, *out], or (y, indices) with indices int64, counted in the input's spatial positions.
    """,
    )


def _avg_pool(rank: int) -> Any:
    op = f"avg_pool{rank}d"

    def avg_pool(
        input: torch.Tensor,
        kernel_size: Size,
        stride: Size | None = None,
        padding: Size = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> torch.Tensor:
        x = _check_input(op, input, rank)
        if divisor_override is not None and not isinstance(divisor_override, int):
            check.fail(TypeError, op, "divisor_override", repr(divisor_override), "an int or None")
        if divisor_override == 0:
            check.fail(RuntimeError, op, "divisor_override", 0, "an int that is not 0, or None")
        window = _window(op, x, rank, kernel_size, stride, padding, 1, ceil_mode)
        return _pool_avg(op, x, rank, window, count_include_pad, divisor_override or 0)

    def avg_pool1d(
        input: torch.Tensor,
        kernel_size: Size,
        stride: Size | None = None,
        padding: Size = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
    ) -> torch.Tensor:
        return avg_pool(input, kernel_size, stride, padding, ceil_mode, count_include_pad)

    return _named(
        avg_pool1d if rank == 1 else avg_pool,
        op,
        f"""The mean of each window; drops in for torch.nn.functional.{op}.

    Args:
        input: Tensor[N, C, *] or Tensor[C, *] with {rank} spatial dimensions.
        kernel_size: size of the window in each dimension, an int or {rank}.
        stride: distance of windows; the kernel's size if None.
        padding: zeros on both sides, at most half of the window.
        ceil_mode: keeps a last window that reaches beyond the input.
        count_include_pad: the padding counts in the divisor.
        divisor_override: what sums are divided by instead (2d and 3d).

    Returns:
        Tensor[N, C, *out].
    """,
    )


def _adaptive_max_pool(rank: int) -> Any:
    op = f"adaptive_max_pool{rank}d"

    def adaptive_max_pool(input: torch.Tensor, output_size: Any, return_indices: bool = False) -> Any:
        x = _check_adaptive(op, input, rank, output_size)
        window, outs = _adaptive_window(op, x, rank, output_size)
        if 0 in outs or 0 in x.shape:
            y = _nothing(x, rank, outs)
            return (y, y.detach().long()) if return_indices else y
        return _pool_max(op, x, rank, window, return_indices)

    return _named(
        adaptive_max_pool,
        op,
        f"""The largest value of each of ``output_size`` windows; drops in for torch.nn.functional.{op}.

    Args:
        input: Tensor[N, C, *] or Tensor[C, *] with {rank} spatial dimensions.
        output_size: an int or {rank}, each an int or None for the input's size.
        return_indices: also returns where the maxima lie, int64.

    Returns:
        Tensor[N, C, *output_size], or (y, indices).
    """,
    )


def _adaptive_avg_pool(rank: int) -> Any:
    op = f"adaptive_avg_pool{rank}d"

    def adaptive_avg_pool(input: torch.Tensor, output_size: Any) -> torch.Tensor:
        x = _check_adaptive(op, input, rank, output_size)
        window, outs = _adaptive_window(op, x, rank, output_size)
        if 0 in outs or 0 in x.shape:
            return _nothing(x, rank, outs)
        return _pool_avg(op, x, rank, window, False, 0)

    return _named(
        adaptive_avg_pool,
        op,
        f"""The mean of each of ``output_size`` windows; drops in for torch.nn.functional.{op}.

    Args:
        input: Tensor[N, C, *] or Tensor[C, *] with {rank} spatial dimensions.
        output_size: an int or {rank}, each an int or None for the input's size; 1 is global average pooling.

    Returns:
        Tensor[N, C, *output_size].
    """,
    )


def _lp_pool(rank: int) -> Any:
    op = f"lp_pool{rank}d"

    def lp_pool(
        input: torch.Tensor,
        norm_type: float,
        kernel_size: Size,
        stride: Size | None = None,
        ceil_mode: bool = False,
    ) -> torch.Tensor:
        if not isinstance(norm_type, (int, float)):
            check.fail(TypeError, op, "norm_type", type(norm_type).__name__, "a number")
        x = _check_input(op, input, rank)
        window = _window(op, x, rank, kernel_size, stride, 0, 1, ceil_mode)
        if norm_type == 0:
            check.fail(ZeroDivisionError, op, "norm_type", norm_type, "a number that is not 0")
        if math.isinf(norm_type):
            sign = math.copysign(1.0, norm_type)
            return _pool_max(op, x.abs() * sign, rank, window, False) * sign
        mean = _pool_avg(op, x.pow(norm_type), rank, window, True, 0)
        return (torch.sign(mean) * torch.relu(torch.abs(mean))).mul(math.prod(window[2::5])).pow(1.0 / norm_type)

    return _named(
        lp_pool,
        op,
        f"""``(sum over the window of x^p)^(1/p)``; drops in for torch.nn.functional.{op}.

    Args:
        input: Tensor[N, C, *] or Tensor[C, *] with {rank} spatial dimensions.
        norm_type: p, not 0; infinity is max pooling of ``|x|``.
        kernel_size, stride, ceil_mode: as of avg_pool{rank}d.

    Returns:
        Tensor[N, C, *out].

    Put together from powers and the average, as torch's own: negative sums and gradients at 0 are torch's too.
    """,
    )


def _named(function: Any, name: str, doc: str) -> Any:
    function.__name__ = function.__qualname__ = name
    function.__doc__ = doc
    return function


max_pool1d, max_pool2d, max_pool3d = (_max_pool(rank) for rank in (1, 2, 3))
avg_pool1d, avg_pool2d, avg_pool3d = (_avg_pool(rank) for rank in (1, 2, 3))
adaptive_max_pool1d, adaptive_max_pool2d, adaptive_max_pool3d = (_adaptive_max_pool(rank) for rank in (1, 2, 3))
adaptive_avg_pool1d, adaptive_avg_pool2d, adaptive_avg_pool3d = (_adaptive_avg_pool(rank) for rank in (1, 2, 3))
lp_pool1d, lp_pool2d, lp_pool3d = (_lp_pool(rank) for rank in (1, 2, 3))


# The modules: torch's, with the forward of pyops


def _module(base: type, forward: Any) -> Any:
    doc = f"torch.nn.{base.__name__} whose forward is pyops'."
    return type(base.__name__, (base,), {"forward": forward, "__doc__": doc, "__module__": __name__})


def _max_forward(pool: Any) -> Any:
    return lambda self, input: pool(
        input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
    )


def _avg_forward(pool: Any) -> Any:
    return lambda self, input: pool(
        input, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad,
        *((self.divisor_override,) if hasattr(self, "divisor_override") else ()),
    )  # fmt: skip


def _lp_forward(pool: Any) -> Any:
    return lambda self, input: pool(input, float(self.norm_type), self.kernel_size, self.stride, self.ceil_mode)


MaxPool1d = _module(torch.nn.MaxPool1d, _max_forward(max_pool1d))
MaxPool2d = _module(torch.nn.MaxPool2d, _max_forward(max_pool2d))
MaxPool3d = _module(torch.nn.MaxPool3d, _max_forward(max_pool3d))
AvgPool1d = _module(torch.nn.AvgPool1d, _avg_forward(avg_pool1d))
AvgPool2d = _module(torch.nn.AvgPool2d, _avg_forward(avg_pool2d))
AvgPool3d = _module(torch.nn.AvgPool3d, _avg_forward(avg_pool3d))
LPPool1d = _module(torch.nn.LPPool1d, _lp_forward(lp_pool1d))
LPPool2d = _module(torch.nn.LPPool2d, _lp_forward(lp_pool2d))
LPPool3d = _module(torch.nn.LPPool3d, _lp_forward(lp_pool3d))
AdaptiveMaxPool1d = _module(
    torch.nn.AdaptiveMaxPool1d, lambda self, input: adaptive_max_pool1d(input, self.output_size, self.return_indices)
)
AdaptiveMaxPool2d = _module(
    torch.nn.AdaptiveMaxPool2d, lambda self, input: adaptive_max_pool2d(input, self.output_size, self.return_indices)
)
AdaptiveMaxPool3d = _module(
    torch.nn.AdaptiveMaxPool3d, lambda self, input: adaptive_max_pool3d(input, self.output_size, self.return_indices)
)
AdaptiveAvgPool1d = _module(
    torch.nn.AdaptiveAvgPool1d, lambda self, input: adaptive_avg_pool1d(input, self.output_size)
)
AdaptiveAvgPool2d = _module(
    torch.nn.AdaptiveAvgPool2d, lambda self, input: adaptive_avg_pool2d(input, self.output_size)
)
AdaptiveAvgPool3d = _module(
    torch.nn.AdaptiveAvgPool3d, lambda self, input: adaptive_avg_pool3d(input, self.output_size)
)


# Routes and samples


def _both(pool: Any) -> Any:
    """The spelling that returns indices always."""

    at = 2 if "adaptive" in pool.__name__ else 6  # where return_indices stands among the arguments

    def pool_with_indices(*args: Any, **kwargs: Any) -> Any:
        return pool(*args[:at], **{**kwargs, "return_indices": True})

    return pool_with_indices


for _pool in (
    *(max_pool1d, max_pool2d, max_pool3d, adaptive_max_pool1d, adaptive_max_pool2d, adaptive_max_pool3d),
    *(avg_pool1d, avg_pool2d, avg_pool3d, adaptive_avg_pool1d, adaptive_avg_pool2d, adaptive_avg_pool3d),
    *(lp_pool1d, lp_pool2d, lp_pool3d),
):
    _name = _pool.__name__
    route((getattr(_torch, _name),), _name, _pool)
    if "max" in _name:
        route((getattr(_torch, f"{_name}_with_indices"),), _name, _both(_pool))
for _name, _pool in (("max_pool1d", max_pool1d), ("max_pool2d", max_pool2d), ("max_pool3d", max_pool3d)):
    route((getattr(torch, _name),), _name, _pool)
route((torch.max_pool1d_with_indices,), "max_pool1d", _both(max_pool1d))
route((torch.adaptive_max_pool1d,), "adaptive_max_pool1d", _both(adaptive_max_pool1d))

_MAX = {"kernel_size": 3, "stride": 2, "padding": 1}


def _sample(shape, channels_last=False, **arguments):
    def make(t: Maker):
        return (t.input(shape, channels_last=channels_last),), arguments

    return make


def _avg_pool2d_truth(x, **arguments):
    """torch's gradient of channels last is wrong on a GPU, seen with 2.11: padded, it is of other elements."""
    if not x.is_cuda or x.is_contiguous():
        return _torch.avg_pool2d(x, **arguments)
    y = _torch.avg_pool2d(x.contiguous(), **arguments)
    return y.contiguous(memory_format=torch.channels_last)


for _name, _function, _truth, _arguments in (
    ("max_pool2d", max_pool2d, _torch.max_pool2d, {"dilation": 2, "ceil_mode": True}),
    ("avg_pool2d", avg_pool2d, _avg_pool2d_truth, {"count_include_pad": False, "ceil_mode": True}),
):
    checked(
        _name,
        _function,
        _truth,
        Sample("overlapping windows", _sample((1, 2, 5, 6), **_MAX), derivatives=True),
        Sample("every argument", _sample((2, 2, 9, 7), **(_MAX | {"stride": (1, 3)}), **_arguments)),
        Sample("several vectors of outputs", _sample((1, 2, 5, 75), kernel_size=(2, 3), stride=(2, 1), padding=(0, 1))),
        Sample("stride 2, several vectors", _sample((1, 1, 7, 83), **_MAX)),
        Sample("channels last", _sample((2, 19, 6, 5), True, **_MAX)),
        Sample("no batch dimension, stride 3", _sample((3, 8, 40), kernel_size=2, stride=(2, 3))),
        Sample("no examples", _sample((0, 3, 4, 4), kernel_size=2)),
    )
for _name, _function in (("adaptive_max_pool2d", adaptive_max_pool2d), ("adaptive_avg_pool2d", adaptive_avg_pool2d)):
    checked(
        _name,
        _function,
        getattr(_torch, _name),
        Sample("overlapping windows", _sample((1, 2, 5, 7), output_size=(3, 4)), derivatives=True),
        Sample("more outputs than inputs", _sample((2, 1, 3, 2), output_size=(5, 3))),
        Sample("global", _sample((2, 5, 7, 7), output_size=1)),
        Sample("channels last", _sample((2, 19, 6, 5), True, output_size=(4, 2))),
        Sample("even, one size kept", _sample((1, 2, 6, 8), output_size=(None, 4))),
    )
