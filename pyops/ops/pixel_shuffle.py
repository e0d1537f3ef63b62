"""Channels as the pixels of a larger image, and back: pixel_shuffle and pixel_unshuffle; channels in another order.

    y[n, c, h r + i, w r + j] = x[n, c r² + i r + j, h, w]

    x: [*, C r², H, W]   y: [*, C, H r, W r]   each is the inverse of the other, and its gradient

    channel_shuffle   y[n, j g + i, *] = x[n, i C/g + j, *], views and one copy, whose gradients are torch's

Sources: torch.nn.functional.pixel_shuffle and pixel_unshuffle, Shi et al. (2016); channel_shuffle, Zhang et al. (2018).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..core import backend, check, layout, library
from ..core.explain import composite
from ..core.intercept import route
from ..core.multilinear import Multilinear, differentiable
from ..core.samples import Sample, checked


def _fake(x, factor, inverse, channels_last):
    n, c, h, w = (x.shape[i] for i in ((0, 3, 1, 2) if channels_last else (0, 1, 2, 3)))
    q = factor * factor
    c, h, w = (c * q, h // factor, w // factor) if inverse else (c // q, h * factor, w * factor)
    return x.new_empty((n, h, w, c) if channels_last else (n, c, h, w))


_shuffle = library.declare(
    "pixel_shuffle_fwd(Tensor x, int factor, bool inverse, bool channels_last) -> Tensor",
    _fake,
    library.triton_kernels("pixel_shuffle"),
)


def _turned(constants):
    return constants[0], not constants[1], constants[2]


def _batch(namespace, batch, dims, inputs, constants):
    """vmap: a batch is more of N."""
    x = inputs[0].movedim(dims[0], 0)
    y = _apply(namespace, x.flatten(0, 1).contiguous(), *constants)
    return y.reshape(batch, x.shape[1], *y.shape[1:]), 0


_apply: Callable[..., Any] = differentiable(
    Multilinear(
        _shuffle,
        1,
        lambda ns, dy, inputs, constants, needs: (_apply(ns, dy, *_turned(constants)),),
        lambda ns, inputs, tangents, constants: _apply(ns, tangents[0].contiguous(), *constants),
        _batch,
    )
)


def _moved(op: str, argument: str, x: torch.Tensor, factor: Any, inverse: bool) -> torch.Tensor:
    check.floating(op, "input", x)
    if isinstance(factor, bool) or not isinstance(factor, int):
        check.fail(TypeError, op, argument, repr(factor), "an int")
    if factor < 1:
        check.fail(RuntimeError, op, argument, factor, "an int >= 1")
    if x.dim() < 3:
        check.fail(RuntimeError, op, "input", f"shape {list(x.shape)}", "[*, C, H, W]")
    if inverse and (x.shape[-2] % factor != 0 or x.shape[-1] % factor != 0):
        check.fail(RuntimeError, op, "input", f"shape {list(x.shape)}", f"a height and width that {factor} divides")
    if not inverse and x.shape[-3] % (factor * factor) != 0:
        check.fail(RuntimeError, op, "input", f"shape {list(x.shape)}", f"channels that {factor * factor} divides")
    namespace = backend.namespace_for("pixel_shuffle", x)
    if x.dim() == 4 and layout.is_channels_last(x):
        return _apply(namespace, x.movedim(1, -1), factor, inverse, True).movedim(-1, 1)
    lead = 1
    for size in x.shape[:-3]:
        lead = lead * size
    y = _apply(namespace, x.contiguous().view(lead, *x.shape[-3:]), factor, inverse, False)
    return y.view(*x.shape[:-3], *y.shape[1:])


def pixel_shuffle(input: torch.Tensor, upscale_factor: int) -> torch.Tensor:
    """Groups of r² channels become r by r pixels; drops in for torch.nn.functional.pixel_shuffle.

    Args:
        input: Tensor[*, C r², H, W], contiguous or channels last, float32, float64, bfloat16 or float16.
        upscale_factor: r.

    Returns:
        Tensor[*, C, H r, W r] in the memory format of the input.

    Raises:
        RuntimeError: fewer than 3 dimensions, r < 1, channels that r² does not divide.
        NotImplementedError: a dtype without kernels.

    An exact copy; so are the gradients of every order, forward mode and vmap.
    """
    return _moved("pixel_shuffle", "upscale_factor", input, upscale_factor, False)


def pixel_unshuffle(input: torch.Tensor, downscale_factor: int) -> torch.Tensor:
    """The inverse of ``pixel_shuffle``; drops in for torch.nn.functional.pixel_unshuffle.

    Args:
        input: Tensor[*, C, H r, W r], contiguous or channels last, float32, float64, bfloat16 or float16.
        downscale_factor: r.

    Returns:
        Tensor[*, C r², H, W] in the memory format of the input.

    Raises:
        RuntimeError: fewer than 3 dimensions, r < 1, a height or width that r does not divide.
        NotImplementedError: a dtype without kernels.

    An exact copy; so are the gradients of every order, forward mode and vmap.
    """
    return _moved("pixel_unshuffle", "downscale_factor", input, downscale_factor, True)


def channel_shuffle(input: torch.Tensor, groups: int) -> torch.Tensor:
    """Channels of g groups in turns, one of each; drops in for torch.nn.functional.channel_shuffle.

        y[n, j g + i] = x[n, i C/g + j]

    Args:
        input: Tensor[N, C, *] with at least one dimension in *, of any dtype, contiguous or channels last.
        groups: g, which divides C.

    Returns:
        Tensor of the input's shape and memory format, a copy.

    Raises:
        RuntimeError: fewer than 3 dimensions, groups < 1, channels that g does not divide.
        TypeError: groups that are no int.

    An exact copy; so are the gradients of every order, forward mode and vmap.
    """
    op = "channel_shuffle"
    if not isinstance(input, torch.Tensor):
        check.fail(TypeError, op, "input", type(input).__name__, "a tensor")
    if isinstance(groups, bool) or not isinstance(groups, int):
        check.fail(TypeError, op, "groups", repr(groups), "an int")
    if input.dim() < 3:
        check.fail(RuntimeError, op, "input", f"shape {list(input.shape)}", "at least 3 dimensions")
    if groups < 1:
        check.fail(RuntimeError, op, "groups", groups, "an int >= 1")
    channels = input.shape[1]
    if channels % groups != 0:
        check.fail(RuntimeError, op, "input", f"{channels} channels", f"channels that {groups} divides")
    last = layout.is_channels_last(input)
    x, dim = (input.movedim(1, -1), input.dim() - 1) if last else (input, 1)
    parts = x.unflatten(dim, (groups, channels // groups)).transpose(dim, dim + 1)
    y = parts.clone(memory_format=torch.contiguous_format).flatten(dim, dim + 1)
    return y.movedim(-1, 1) if last else y


route((torch.nn.functional.channel_shuffle,), "channel_shuffle", channel_shuffle)
route((torch.nn.functional.pixel_shuffle,), "pixel_shuffle", pixel_shuffle)
route((torch.nn.functional.pixel_unshuffle,), "pixel_unshuffle", pixel_unshuffle)


class ChannelShuffle(torch.nn.ChannelShuffle):
    """torch.nn.ChannelShuffle whose forward is pyops.functional.channel_shuffle."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return channel_shuffle(input, self.groups)


class PixelShuffle(torch.nn.PixelShuffle):
    """torch.nn.PixelShuffle whose forward is pyops.functional.pixel_shuffle."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return pixel_shuffle(input, self.upscale_factor)


class PixelUnshuffle(torch.nn.PixelUnshuffle):
    """torch.nn.PixelUnshuffle whose forward is pyops.functional.pixel_unshuffle."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return pixel_unshuffle(input, self.downscale_factor)


def _sample(shape, factor, channels_last=False):
    return lambda t: ((t.input(shape, channels_last=channels_last), factor), {})


checked(
    "pixel_shuffle",
    pixel_shuffle,
    torch.nn.functional.pixel_shuffle,
    Sample("doubled", _sample((2, 4, 2, 3), 2), derivatives=True),
    Sample("five times", _sample((1, 50, 2, 3), 5)),
    Sample("channels last", _sample((2, 18, 3, 2), 3, True)),
    Sample("more dimensions", _sample((2, 1, 16, 3, 35), 4)),
)
checked(
    "channel_shuffle",
    channel_shuffle,
    torch.nn.functional.channel_shuffle,
    Sample("two groups", _sample((2, 4, 3), 2), derivatives=True),
    Sample("images", _sample((2, 6, 3, 5), 3)),
    Sample("no examples", _sample((0, 6, 2, 2), 2)),
)
checked(
    "pixel_unshuffle",
    pixel_unshuffle,
    torch.nn.functional.pixel_unshuffle,
    Sample("halved", _sample((1, 2, 4, 6), 2), derivatives=True),
    Sample("channels last", _sample((2, 5, 6, 3), 3, True)),
    Sample("no batch dimension", _sample((3, 10, 20), 5)),
)


composite("channel_shuffle")
