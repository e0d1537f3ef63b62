"""Padding: constant, reflection, replication, circular, of any dimensions, and cropping by negative amounts.

    y[o] = x[source(o)]        dx[i] = sum of dy[o] over the o with source(o) = i

    i = o - before;  inside, source = i;  outside by mode:
    constant    the value          reflect    -i,  2 (A - 1) - i
    replicate   0,  A - 1          circular   i + A,  i - A

Source: torch.nn.functional.pad. What is padded or not is cut into at most three axes: x [N, A0, A1, A2, K].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..core import backend, check, layout, library
from ..core.autograd import Formula, Tensors, differentiable
from ..core.intercept import route
from ..core.samples import Sample, checked

MODES = ("constant", "reflect", "replicate", "circular")


def _fwd_fake(x, before, sizes, mode, value):
    return x.new_empty(x.shape[0], *sizes, x.shape[4])


def _bwd_fake(dy, before, sizes, mode):
    return dy.new_empty(dy.shape[0], *sizes, dy.shape[4])


_kernels = library.triton_kernels("pad")
_fwd = library.declare(
    "pad_fwd(Tensor x, int[] before, int[] sizes, int mode, float value) -> Tensor", _fwd_fake, _kernels
)
_bwd = library.declare("pad_bwd(Tensor dy, int[] before, int[] sizes, int mode) -> Tensor", _bwd_fake, _kernels)


def _source(mode: int, size: int, before: int, out: int, device: torch.device) -> torch.Tensor:
    """Where each output index comes from; -1 for the constant."""
    i = torch.arange(out, device=device) - before
    if MODES[mode] == "reflect":
        i = torch.where(i < 0, -i, i)
        return torch.where(i >= size, 2 * (size - 1) - i, i)
    if MODES[mode] == "replicate":
        return i.clamp(0, max(size - 1, 0))
    if MODES[mode] == "circular":
        return torch.where(i < 0, i + size, torch.where(i >= size, i - size, i))
    return torch.where((i < 0) | (i >= size), -1, i)


def _reference(x, before, sizes, mode, value):
    y, outside = x, None
    for axis in range(3):
        i = _source(mode, x.shape[axis + 1], before[axis], sizes[axis], x.device)
        if mode == 0:
            shape = [1] * 5
            shape[axis + 1] = -1
            out = (i < 0).view(shape)
            outside = out if outside is None else outside | out
            i = i.clamp(min=0)
            if x.shape[axis + 1] == 0:  # there is nothing to read, and nothing is read
                y = torch.cat([y, y.new_zeros(*y.shape[: axis + 1], 1, *y.shape[axis + 2 :])], axis + 1)
        y = y.index_select(axis + 1, i)
    return (y if outside is None else torch.where(outside, torch.full_like(y, value), y),)


def _arguments(dy, inputs: Tensors, kept: Tensors, constants: Tensors, needs) -> Tensors:
    before, _, mode, _ = constants
    return dy, before, tuple(inputs[0].shape[1:4]), mode


def _second(namespace, dy, inputs, constants, needs, cotangents):
    """Padding is linear, so the gradient of its gradient is padding itself, with zeros where the constant stands."""
    before, sizes, mode, _ = constants
    return _apply(namespace, cotangents[0].contiguous(), before, sizes, mode, 0.0), (None,)


def _fold(forward, batch, dims, inputs, constants):
    """A batch is more of N."""
    x = inputs[0].movedim(dims[0], 0)
    y = forward(x.reshape(batch * x.shape[1], *x.shape[2:]), *constants)
    return y.reshape(batch, x.shape[1], *y.shape[1:]), 0


_apply: Any = differentiable(Formula(_fwd, _bwd, 1, 1, _arguments, _reference, _fold, keep=(), second=_second))


def _padded(x: torch.Tensor, pads: list[tuple[int, int]], mode: int, value: float) -> torch.Tensor:
    """Contiguous x, one pair of amounts for each dimension."""
    padded = [d for d, pair in enumerate(pads) if pair != (0, 0)]
    if not padded:
        return x.clone()
    # neighbours that are not padded are one axis; of more than three, the inner ones come first
    axes: list[tuple[int, int, int]] = []  # size, before, after
    for size, (before, after) in zip(x.shape[padded[0] : padded[-1] + 1], pads[padded[0] : padded[-1] + 1]):
        if axes and (before, after) == (0, 0) and axes[-1][1:] == (0, 0):
            axes[-1] = (axes[-1][0] * size, 0, 0)
        else:
            axes.append((size, before, after))
    if len(axes) > 3:
        inner = padded[-1]
        only = [pair if d == inner else (0, 0) for d, pair in enumerate(pads)]
        rest = [(0, 0) if d == inner else pair for d, pair in enumerate(pads)]
        return _padded(_padded(x, only, mode, value), rest, mode, value)
    axes = [(1, 0, 0)] * (3 - len(axes)) + axes
    lead, trail = 1, 1
    for size in x.shape[: padded[0]]:
        lead = lead * size
    for size in x.shape[padded[-1] + 1 :]:
        trail = trail * size
    y = _apply(
        backend.namespace_for("pad", x),
        x.reshape(lead, *(a[0] for a in axes), trail),
        tuple(a[1] for a in axes),
        tuple(sum(a) for a in axes),
        mode,
        value,
    )
    return y.reshape([size + sum(pair) for size, pair in zip(x.shape, pads)])


def pad(input: torch.Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> torch.Tensor:
    """Adds elements around a tensor, or cuts them off; drops in for torch.nn.functional.pad.

    Args:
        input: Tensor of any shape, float32, float64, bfloat16 or float16, any strides.
        pad: amounts before and after the last dimension, the one before it, and so on; negative amounts crop.
        mode: ``constant`` for any dimensions; ``reflect``, ``replicate``, ``circular`` for the last 1, 2 or 3 of a
            tensor of as many or one or two more dimensions.
        value: the constant, 0 by default; only with ``constant``.

    Returns:
        Tensor of the padded sizes, in the memory format of the input (contiguous or channels last).

    Raises:
        RuntimeError: an odd number of amounts, more than there are dimensions, a negative size, amounts that the mode
            cannot take from the input, ``value`` with another mode than ``constant``.
        NotImplementedError: an unknown mode, or dimensions that the mode does not pad; a dtype without kernels.

    An exact copy; gradients are summed in float32 (float64) in a fixed order. Gradients of every order, forward mode,
    vmap and torch.compile.
    """
    check.floating("pad", "input", input)
    amounts = tuple(pad)
    if len(amounts) % 2 != 0:
        check.fail(RuntimeError, "pad", "pad", f"{len(amounts)} amounts", "an even number")
    if len(amounts) > 2 * input.dim():
        check.fail(RuntimeError, "pad", "pad", f"{len(amounts)} amounts", f"at most {2 * input.dim()}, two a dimension")
    if mode not in MODES:
        check.fail(NotImplementedError, "pad", "mode", repr(mode), f"one of {', '.join(MODES)}")
    if mode != "constant":
        count = len(amounts) // 2
        if value is not None and value != 0:
            check.fail(RuntimeError, "pad", "value", value, f"None with mode {mode!r}")
        if count not in (1, 2, 3) or input.dim() not in (count + 1, count + 2):
            got = f"{len(amounts)} amounts for {input.dim()} dimensions"
            check.fail(NotImplementedError, "pad", "pad", got, "2, 4 or 6 amounts for one or two dimensions more")
    pads = [(0, 0)] * input.dim()
    for k in range(len(amounts) // 2):
        dim = input.dim() - 1 - k
        before, after = pads[dim] = (int(amounts[2 * k]), int(amounts[2 * k + 1]))
        size = input.shape[dim]
        least = 0 if mode == "constant" else 1
        if size + before + after < least:
            got = f"{before} and {after} for dimension {dim} of size {size}"
            check.fail(RuntimeError, "pad", "pad", got, "a size that is not negative" if least == 0 else "a size >= 1")
        most = {"constant": None, "replicate": None, "reflect": size - 1, "circular": size}[mode]
        if (most is not None and max(before, after) > most) or (mode == "replicate" and size == 0):
            got = f"{before} and {after} for dimension {dim} of size {size}"
            check.fail(RuntimeError, "pad", "pad", got, f"at most {most} with mode {mode!r}")
    number = 0.0 if value is None else float(value)
    if mode == "circular" and any(amount < 0 for amount in amounts):
        # what is cut off is gone before the rest goes round
        cropped = _again(input, tuple(min(amount, 0) for amount in amounts))
        return _again(cropped, tuple(max(amount, 0) for amount in amounts), mode)
    if layout.is_channels_last(input):
        last = _padded(input.movedim(1, -1), [pads[0], *pads[2:], pads[1]], MODES.index(mode), number)
        return last.movedim(-1, 1)
    return _padded(input.contiguous(), pads, MODES.index(mode), number)


_again = pad  # within pad, that name is the amounts


def _accepts(input: Any, pad: Any = None, mode: str = "constant", value: float | None = None) -> str | None:
    if isinstance(input, torch.Tensor) and input.dtype not in check.FLOATING:
        return f"dtype {str(input.dtype).removeprefix('torch.')}"
    return None


route((torch.nn.functional.pad,), "pad", pad, _accepts)


class _Padding:
    """What the modules share: the forward; sizes, repr and state are torch's."""

    _mode = "constant"
    padding: Any

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return pad(input, self.padding, self._mode, getattr(self, "value", None))


class CircularPad1d(_Padding, torch.nn.CircularPad1d):
    """torch.nn.CircularPad1d whose forward is pyops.functional.pad."""

    _mode = "circular"


class CircularPad2d(_Padding, torch.nn.CircularPad2d):
    """torch.nn.CircularPad2d whose forward is pyops.functional.pad."""

    _mode = "circular"


class CircularPad3d(_Padding, torch.nn.CircularPad3d):
    """torch.nn.CircularPad3d whose forward is pyops.functional.pad."""

    _mode = "circular"


class ConstantPad1d(_Padding, torch.nn.ConstantPad1d):
    """torch.nn.ConstantPad1d whose forward is pyops.functional.pad."""


class ConstantPad2d(_Padding, torch.nn.ConstantPad2d):
    """torch.nn.ConstantPad2d whose forward is pyops.functional.pad."""


class ConstantPad3d(_Padding, torch.nn.ConstantPad3d):
    """torch.nn.ConstantPad3d whose forward is pyops.functional.pad."""


class ReflectionPad1d(_Padding, torch.nn.ReflectionPad1d):
    """torch.nn.ReflectionPad1d whose forward is pyops.functional.pad."""

    _mode = "reflect"


class ReflectionPad2d(_Padding, torch.nn.ReflectionPad2d):
    """torch.nn.ReflectionPad2d whose forward is pyops.functional.pad."""

    _mode = "reflect"


class ReflectionPad3d(_Padding, torch.nn.ReflectionPad3d):
    """torch.nn.ReflectionPad3d whose forward is pyops.functional.pad."""

    _mode = "reflect"


class ReplicationPad1d(_Padding, torch.nn.ReplicationPad1d):
    """torch.nn.ReplicationPad1d whose forward is pyops.functional.pad."""

    _mode = "replicate"


class ReplicationPad2d(_Padding, torch.nn.ReplicationPad2d):
    """torch.nn.ReplicationPad2d whose forward is pyops.functional.pad."""

    _mode = "replicate"


class ReplicationPad3d(_Padding, torch.nn.ReplicationPad3d):
    """torch.nn.ReplicationPad3d whose forward is pyops.functional.pad."""

    _mode = "replicate"


class ZeroPad1d(_Padding, torch.nn.ZeroPad1d):
    """torch.nn.ZeroPad1d whose forward is pyops.functional.pad."""


class ZeroPad2d(_Padding, torch.nn.ZeroPad2d):
    """torch.nn.ZeroPad2d whose forward is pyops.functional.pad."""


class ZeroPad3d(_Padding, torch.nn.ZeroPad3d):
    """torch.nn.ZeroPad3d whose forward is pyops.functional.pad."""


def _sample(shape, amounts, mode="constant", value=None, channels_last=False):
    return lambda t: ((t.input(shape, channels_last=channels_last), amounts), {"mode": mode, "value": value})


checked(
    "pad",
    pad,
    torch.nn.functional.pad,
    Sample("constant around and a crop", _sample((2, 3, 5), (2, -1, 1, 2), value=0.5), derivatives=True),
    Sample("reflection in two dimensions", _sample((1, 2, 3, 4), (3, 1, 2, 0), "reflect"), derivatives=True),
    Sample("replication, longer than the input", _sample((2, 2, 3), (5, 4), "replicate"), derivatives=True),
    Sample("circular, the whole input on both sides", _sample((1, 2, 2, 3), (3, 3, 1, 2), "circular")),
    Sample("channels last", _sample((2, 5, 3, 4), (0, 1, 0, 1), channels_last=True)),
    Sample("three dimensions, reflected", _sample((1, 2, 2, 3, 4), (1, 2, 0, 2, 1, 1), "reflect")),
    Sample("four padded dimensions with gaps", _sample((2, 3, 2, 2, 3), (1, 0, 0, 0, 2, 1, 0, 0, 1, 1))),
    Sample("an empty input", _sample((0, 3, 4), (1, 1))),
    Sample("a row of several vectors", _sample((3, 70), (1, 3))),
)
