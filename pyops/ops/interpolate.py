"""Resampling to another size: nearest, linear, cubic, area, with or without antialiasing, in 1 to 3 dimensions.

    y[o] = sum_i w(o, i) x[i]        dx[i] = sum_o w(o, i) dy[o]        axis by axis

    position of output o in the input:   p(o) = step (o + 1/2) - 1/2   or, with align_corners,   step · o
    nearest  w = 1 at one input          linear  w = 1 - |p - i|        cubic  Keys' kernel with a = -3/4
    area     the mean of an adaptive window      antialias  the kernel (a = -1/2) as wide as the step, normalised

Source: torch.nn.functional.interpolate. The weights are stated in docs/math/resampling.md.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch

from ..core import autocast, backend, check, layout, library
from ..core.autograd import Formula, Tensors, differentiable
from ..core.intercept import Unsupported, route
from ..core.samples import Maker, Sample, checked

_kernels = library.triton_kernels("interpolate")
_aten = torch.ops.aten
# what csrc/common/interpolate.h numbers
NEAREST, NEAREST_EXACT, LINEAR, CUBIC, AREA, LINEAR_ANTIALIAS, CUBIC_ANTIALIAS = range(7)
_LINEAR = ("linear", "bilinear", "trilinear")
_SCHEMA = "int[] size, int mode, bool align_corners, float scale_d, float scale_h, float scale_w) -> Tensor"


def _fake(x, size, mode, align_corners, scale_d, scale_h, scale_w):
    return x.new_empty(x.shape[0], *size, x.shape[4])


_fwd = library.declare(f"interpolate_fwd(Tensor x, {_SCHEMA}", _fake, _kernels)
_bwd = library.declare(f"interpolate_bwd(Tensor dy, {_SCHEMA}", _fake, _kernels)


def _reference(x, size, mode, align_corners, *scales):
    planes = x.permute(0, 4, 1, 2, 3)
    size = list(size)
    given = [s or None for s in scales]
    if mode in (NEAREST, NEAREST_EXACT):
        op = _aten.upsample_nearest3d if mode == NEAREST else _aten._upsample_nearest_exact3d
        y = op(planes, size, *given)
    elif mode == LINEAR:
        y = _aten.upsample_trilinear3d(planes, size, align_corners, *given)
    elif mode == AREA:
        y = torch.nn.functional.adaptive_avg_pool3d(planes, size)
    else:
        op = {
            CUBIC: _aten.upsample_bicubic2d,
            LINEAR_ANTIALIAS: _aten._upsample_bilinear2d_aa,
            CUBIC_ANTIALIAS: _aten._upsample_bicubic2d_aa,
        }[mode]
        y = op(planes.squeeze(2), size[1:], align_corners, *given[1:]).unsqueeze(2)
    return (y.permute(0, 2, 3, 4, 1),)


def _arguments(dy, inputs: Tensors, kept: Tensors, constants: Tensors, needs) -> Tensors:
    return dy, list(inputs[0].shape[1:4]), *constants[1:]


def _second(namespace, dy, inputs, constants, needs, cotangents):
    """Resampling is linear: the gradient of its gradient is resampling itself."""
    return _apply(namespace, cotangents[0].contiguous(), *constants), (None,)


def _fold(forward, batch, dims, inputs, constants):
    """A batch is more of N."""
    x = inputs[0].movedim(dims[0], 0)
    y = forward(x.reshape(-1, *x.shape[2:]).contiguous(), *constants)
    return y.reshape(batch, -1, *y.shape[1:]), 0


_apply: Any = differentiable(Formula(_fwd, _bwd, 1, 1, _arguments, _reference, _fold, keep=(), second=_second))


# Arguments


def _sizes(
    x: torch.Tensor, size: Any, scale_factor: Any, recompute: bool | None, area: bool
) -> tuple[list[int], list[float]]:
    """The output sizes, and the scales that positions follow (0: those of the sizes)."""
    op, n = "interpolate", x.dim() - 2
    if size is not None and scale_factor is not None:
        check.fail(ValueError, op, "size", "size and scale_factor", "one of the two")
    if size is None and scale_factor is None:
        check.fail(ValueError, op, "size", "neither size nor scale_factor", "one of the two")
    if size is not None:
        if recompute:
            check.fail(ValueError, op, "recompute_scale_factor", True, "None or False with an explicit size")
        values = list(size) if isinstance(size, (list, tuple)) else [size] * n
        if len(values) != n:
            check.fail(ValueError, op, "size", values, f"an int or {n} ints for an input of shape {list(x.shape)}")
        try:
            if any(isinstance(v, bool) for v in values):
                raise TypeError
            return [v if isinstance(v, (int, torch.SymInt)) else operator.index(v) for v in values], [0.0] * n
        except TypeError:
            check.fail(TypeError, op, "size", repr(size), f"an int or {n} ints")
    factors = list(scale_factor) if isinstance(scale_factor, (list, tuple)) else [scale_factor] * n
    if len(factors) != n:
        check.fail(ValueError, op, "scale_factor", factors, f"a number or {n} for an input of shape {list(x.shape)}")
    if any(isinstance(f, bool) or not isinstance(f, (int, float, torch.SymFloat, torch.SymInt)) for f in factors):
        check.fail(TypeError, op, "scale_factor", repr(scale_factor), f"a number or {n} numbers")
    outs = [int(i * f) if isinstance(i, int) else torch.sym_int(i * f) for i, f in zip(x.shape[2:], factors)]
    return outs, [0.0] * n if recompute or area else [float(f) for f in factors]


def _mode(x: torch.Tensor, mode: Any, align_corners: bool | None, antialias: bool) -> int:
    op, n = "interpolate", x.dim() - 2
    if mode in ("nearest", "area", "nearest-exact") and align_corners is not None:
        check.fail(ValueError, op, "align_corners", align_corners, f"None with mode {mode!r}")
    if antialias and not (mode in ("bilinear", "bicubic", "lanczos") and n == 2):
        check.fail(ValueError, op, "antialias", f"True with mode {mode!r}", "mode bilinear or bicubic and a 4-D input")
    if mode == "lanczos":
        if align_corners or not antialias:
            check.fail(ValueError, op, "mode", "'lanczos'", "antialias=True and align_corners=False with it")
        raise Unsupported(f"{op}: argument 'mode': got 'lanczos', expected a mode that pyops has")
    known = {1: ("linear",), 2: ("bilinear", "bicubic"), 3: ("trilinear",)}.get(n, ())
    if n not in (1, 2, 3) or mode not in ("nearest", "nearest-exact", "area", *known):
        got = f"{mode!r} for an input of {x.dim()} dimensions"
        expected = "nearest, nearest-exact or area for 3 to 5 dimensions, linear for 3, bilinear or bicubic for 4, "
        check.fail(NotImplementedError, op, "mode", got, f"{expected}trilinear for 5")
    if mode in _LINEAR:
        return LINEAR_ANTIALIAS if antialias else LINEAR
    if mode == "bicubic":
        return CUBIC_ANTIALIAS if antialias else CUBIC
    return {"nearest": NEAREST, "nearest-exact": NEAREST_EXACT, "area": AREA}[mode]


def _takes_bytes(mode: int, dimensions: int) -> bool:
    """Modes in which torch resamples uint8."""
    return mode in (NEAREST, NEAREST_EXACT) or (mode != AREA and dimensions == 4)


def interpolate(
    input: torch.Tensor,
    size: int | Sequence[int] | None = None,
    scale_factor: float | Sequence[float] | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> torch.Tensor:
    """Resamples to another size; drops in for torch.nn.functional.interpolate.

    Args:
        input: Tensor[N, C, L], Tensor[N, C, H, W] or Tensor[N, C, D, H, W], contiguous or channels last, float32,
            float64, bfloat16 or float16; uint8 with ``nearest`` and ``nearest-exact``, and with ``bilinear`` and
            ``bicubic``.
        size: output size, an int or one for each spatial dimension.
        scale_factor: the size's multiple of the input's instead, a number or one for each spatial dimension.
        mode: ``nearest`` (torch's, which rounds down), ``nearest-exact``, ``linear``, ``bilinear``, ``bicubic``,
            ``trilinear`` or ``area``, the mean of the inputs that an output covers.
        align_corners: the centres of the corner elements meet, instead of the corners; linear and cubic modes only.
        recompute_scale_factor: positions follow from the sizes instead of from ``scale_factor``.
        antialias: filters as wide as the step where the size shrinks; ``bilinear`` and ``bicubic`` only.

    Returns:
        Tensor[N, C, *size] in the memory format of the input.

    Raises:
        ValueError: both or none of size and scale_factor, as many numbers as do not fit, align_corners or antialias
            with a mode that has none.
        TypeError: sizes that are no ints.
        RuntimeError: an empty input or output.
        NotImplementedError: a mode that does not fit the dimensions, a dtype without kernels; ``lanczos``.

    Nearest is an exact copy; else sums in float32 (float64), with weights that are computed in float64. uint8 is
    resampled in float32 and rounded after each axis; torch's fixed-point arithmetic differs by one at most. Gradients
    are gathered in a fixed order: bitwise deterministic on every device. Gradients of every order, forward mode, vmap
    and torch.compile.
    """
    op = "interpolate"
    if not isinstance(input, torch.Tensor):
        check.fail(TypeError, op, "input", type(input).__name__, "a tensor")
    kind = _mode(input, mode, align_corners, antialias)
    n = input.dim() - 2
    sizes, scales = _sizes(input, size, scale_factor, recompute_scale_factor, kind == AREA)
    if input.dtype != torch.uint8 or not _takes_bytes(kind, input.dim()):
        check.floating(op, "input", input)
    x = input
    if kind == AREA:
        (x,) = autocast.cast(f"adaptive_avg_pool{n}d", x)
    lowest = 0 if kind == AREA else 1
    if any(o < lowest for o in sizes):
        check.fail(RuntimeError, op, "size", sizes, f"sizes >= {lowest}")
    if any(i == 0 for i in x.shape[2 if kind == AREA else 1 :]):
        check.fail(RuntimeError, op, "input", f"shape {list(x.shape)}", "sizes > 0 but for the batch")
    if kind == NEAREST and n == 2 and x.device.type == "cpu":
        # torch's kernel for images on the CPU, and it alone, forgets a scale by which a size stays or doubles
        scales = [0.0 if s and o in (i, 2 * i) else s for i, o, s in zip(x.shape[2:], sizes, scales)]
    if any(o == 0 for o in sizes):
        return x.flatten()[:0].reshape(*x.shape[:2], *sizes)
    if x.dtype == torch.uint8 and kind > NEAREST_EXACT:
        # as torch: one axis after the other, and between them the values are bytes again
        wide = _resampled(x.float(), [x.shape[2], sizes[1]], kind, bool(align_corners), [0.0, scales[1]])
        wide = _resampled((wide + 0.5).floor_().clamp_(0, 255), sizes, kind, bool(align_corners), [scales[0], 0.0])
        return (wide + 0.5).floor_().clamp_(0, 255).to(torch.uint8)
    return _resampled(x, sizes, kind, bool(align_corners), scales)


def _resampled(x: torch.Tensor, sizes: list[int], kind: int, align_corners: bool, scales: list[float]) -> torch.Tensor:
    last = layout.is_channels_last(x)
    pad = [1] * (3 - len(sizes))
    if last:
        planes = x.movedim(1, -1).reshape(x.shape[0], *pad, *x.shape[2:], x.shape[1])
    else:
        planes = x.contiguous().view(x.shape[0] * x.shape[1], *pad, *x.shape[2:], 1)
    scales = [*[0.0] * len(pad), *scales]
    y = _apply(backend.namespace_for("interpolate", x), planes, [*pad, *sizes], kind, align_corners, *scales)
    if last:
        return y.view(x.shape[0], *sizes, x.shape[1]).movedim(-1, 1)
    return y.view(*x.shape[:2], *sizes)


def _accepts(
    input: Any,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> str | None:
    """Why torch keeps a call of the function or of its modules."""
    if mode == "lanczos":
        return "mode lanczos"
    if isinstance(input, torch.Tensor) and input.dtype not in check.FLOATING:
        known = mode in ("nearest", "nearest-exact") or (mode in ("bilinear", "bicubic") and input.dim() == 4)
        if input.dtype != torch.uint8 or not known:
            return f"dtype {str(input.dtype).removeprefix('torch.')}"
    return None


route((torch.nn.functional.interpolate,), "interpolate", interpolate, _accepts)


class Upsample(torch.nn.Upsample):
    """torch.nn.Upsample whose forward is pyops.functional.interpolate."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return interpolate(
            input, self.size, self.scale_factor, self.mode, self.align_corners, self.recompute_scale_factor
        )


class UpsamplingNearest2d(Upsample, torch.nn.UpsamplingNearest2d):
    """torch.nn.UpsamplingNearest2d whose forward is pyops.functional.interpolate."""


class UpsamplingBilinear2d(Upsample, torch.nn.UpsamplingBilinear2d):
    """torch.nn.UpsamplingBilinear2d whose forward is pyops.functional.interpolate."""


def _torch_reference(input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """torch's function; its antialiasing knows no half types on the CPU, so there they are widened."""
    if kwargs.get("antialias") and input.dtype in (torch.bfloat16, torch.float16):
        return torch.nn.functional.interpolate(input.float(), *args, **kwargs).to(input.dtype)
    return torch.nn.functional.interpolate(input, *args, **kwargs)


def _sample(shape: Sequence[int], mode: str, channels_last: bool = False, **arguments: Any) -> Any:
    def make(t: Maker) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (t.input(shape, channels_last=channels_last),), {"mode": mode, **arguments}

    return make


checked(
    "interpolate",
    interpolate,
    _torch_reference,
    Sample("bilinear, larger and smaller", _sample((1, 2, 3, 4), "bilinear", size=(5, 3)), derivatives=True),
    Sample("antialias, smaller", _sample((1, 1, 7, 6), "bilinear", size=(3, 4), antialias=True), derivatives=True),
    Sample("nearest by a scale", _sample((2, 2, 3, 4), "nearest", scale_factor=1.7), derivatives=True),
    Sample("linear in one dimension", _sample((2, 3, 7), "linear", size=12, align_corners=True)),
    Sample("bicubic, corners aligned", _sample((1, 2, 5, 6), "bicubic", size=(8, 4), align_corners=True)),
    Sample("bicubic by a scale", _sample((1, 2, 5, 6), "bicubic", scale_factor=(1.3, 2.6))),
    Sample("trilinear, channels last", _sample((1, 5, 2, 3, 4), "trilinear", True, size=(3, 4, 3))),
    Sample("antialiased cubic", _sample((1, 2, 9, 20), "bicubic", size=(4, 5), antialias=True)),
    Sample("area", _sample((1, 2, 5, 7), "area", size=(3, 4))),
    Sample("nearest exact, doubled, channels last", _sample((1, 3, 4, 5), "nearest-exact", True, scale_factor=2)),
    Sample("a row of several vectors", _sample((1, 1, 2, 45), "bilinear", scale_factor=2)),
    Sample("bilinear, channels last in vectors", _sample((2, 19, 3, 4), "bilinear", True, size=(5, 6))),
    Sample("no examples", _sample((0, 3, 4, 4), "bilinear", size=3)),
)
