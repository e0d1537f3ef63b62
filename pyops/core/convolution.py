"""What the convolution rooms share: one canonical form, three ops, and how they are each other's gradients.

Every convolution, of 1 to 3 spatial dimensions, reaches the kernels as a 3-d one with sizes 1 in front:

    x [N, C, D, H, W]   w [K, C/G, *taps]   y [N, K, *space]       or, channels last,
    x [N, D, H, W, C]   w [K, *taps, C/G]   y [N, *space, K]

    fwd(x, w)     y[p]  = sum over taps r of  w[r] x[p*stride - padding + r*dilation]
    dgrad(dy, w)  dx[h] = sum over the (p, r) that meet in h of  w[r] dy[p]            (also the transposed convolution)
    wgrad(dy, x)  dw[r] = sum over p of  dy[p] x[p*stride - padding + r*dilation]

    act(x, w, r)  y = f(fwd(x, w) + r), f by number (core/activations.py)

The first three are bilinear, and the derivative of each in either argument is another of the three
(docs/math/convolution.md). A room declares its three ops with ``family`` and gets functions that are differentiable any
number of times.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Any

import torch
from torch.autograd import forward_ad

from . import activations, backend, bias_act, library, multilinear, tracing, tuning
from .multilinear import Multilinear, Tensors

# Order of the constants of an op: stride, padding, dilation, groups, channels_last, algorithm.
_GEOMETRY = "int[] stride, int[] padding, int[] dilation, int groups, bool channels_last, str algorithm"
_FUNCTION = "int kind, float pa, float pb, float pc"
_IDENTITY = activations.fused("conv_act", "identity")


def output_size(size: Any, taps: Any, stride: Any, padding: Any, dilation: Any) -> list[Any]:
    """Positions of a filter in an input, per dimension."""
    return [(s + 2 * p - d * (k - 1) - 1) // st + 1 for s, k, st, p, d in zip(size, taps, stride, padding, dilation)]


def space(t: torch.Tensor, channels_last: bool) -> list[Any]:
    """Spatial sizes of a canonical tensor (taps, of a filter)."""
    return list(t.shape[1:4] if channels_last else t.shape[2:5])


def channels(t: torch.Tensor, channels_last: bool) -> Any:
    """Channels of a canonical tensor."""
    return t.shape[4 if channels_last else 1]


def _shape(n: Any, c: Any, sizes: Sequence[Any], channels_last: bool) -> tuple[Any, ...]:
    return (n, *sizes, c) if channels_last else (n, c, *sizes)


def _fwd_fake(x, w, b, stride, padding, dilation, groups, channels_last, algorithm):
    sizes = output_size(space(x, channels_last), space(w, channels_last), stride, padding, dilation)
    return x.new_empty(_shape(x.shape[0], w.shape[0], sizes, channels_last))


def _act_fake(x, w, b, residual, *constants):
    return _fwd_fake(x, w, b, *constants[:-4])


def _dgrad_fake(dy, w, b, size, stride, padding, dilation, groups, channels_last, algorithm):
    return dy.new_empty(_shape(dy.shape[0], groups * channels(w, channels_last), size, channels_last))


def _wgrad_fake(dy, x, taps, stride, padding, dilation, groups, channels_last, algorithm):
    k, c = channels(dy, channels_last), channels(x, channels_last)
    return x.new_empty(_shape(k, c // groups, taps, channels_last))


@dataclass(frozen=True)
class Family:
    """The differentiable functions of one room, each of which takes the namespace first.

    ``plus(x, w, b, residual, *geometry)`` is fwd with something added. ``act(x, w, b, residual, *geometry, *function)``
    applies an activation besides, in one pass; it is the bare op, without derivatives.
    """

    stem: str
    serves: Callable[[Any, Any, int], bool]
    fwd: Callable[..., torch.Tensor]
    plus: Callable[..., torch.Tensor]
    act: Callable[..., torch.Tensor]
    dgrad: Callable[..., torch.Tensor]
    wgrad: Callable[..., torch.Tensor]


_families: dict[str, Family] = {}


def family_for(in_channels: Any, weight_shape: Sequence[Any], groups: int) -> Family:
    """The most special room that serves a convolution."""
    for family in sorted(_families.values(), key=lambda f: f.stem == "conv"):
        if family.serves(in_channels, weight_shape, groups):
            return family
    raise NotImplementedError(f"convolution: no room serves {groups} groups")


# Pieces of the gradients


def _product_rule(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The tangent of an op that is bilinear in its first two tensors and adds its third, the bias, where it has one."""

    def tangent(ns, inputs, tangents, constants):
        (a, b, *bias), (ta, tb, *tbias) = inputs, (None if t is None else t.contiguous() for t in tangents)
        if ta is None:
            return function(ns, a, torch.zeros_like(b) if tb is None else tb, *tbias, *constants)
        moved = function(ns, ta, b, *tbias, *constants)
        return moved if tb is None else moved + function(ns, a, tb, *(None for _ in bias), *constants)

    return tangent


def _sum_over_positions(ns: str, dy: torch.Tensor, channels_last: bool) -> torch.Tensor:
    images = (math.prod(dy.shape[:4]), dy.shape[4], 1) if channels_last else (*dy.shape[:2], math.prod(dy.shape[2:]))
    return bias_act.channel_sum(ns, dy.reshape(images))


def _crop(y: torch.Tensor, like: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """y where ``like`` has positions: a transposed convolution with output padding may leave some out."""
    if y.shape == like.shape:
        return y
    d, h, w = space(like, channels_last)
    return (y[:, :d, :h, :w] if channels_last else y[:, :, :d, :h, :w]).contiguous()


def _into_channels(batch: int, dim: int | None, t: torch.Tensor, last: bool) -> torch.Tensor:
    """[B, N, C, ...] as [N, B*C, ...]."""
    t = multilinear.first(batch, dim, t)
    return (t.movedim(0, -2).flatten(-2) if last else t.movedim(0, 1).flatten(1, 2)).contiguous()


def _from_channels(batch: int, t: torch.Tensor, last: bool) -> torch.Tensor:
    """The inverse, batch in front."""
    if last:
        return t.unflatten(-1, (batch, t.shape[-1] // batch)).movedim(-2, 0)
    return t.unflatten(1, (batch, t.shape[1] // batch)).movedim(1, 0)


def _into_first(batch: int, dim: int | None, t: torch.Tensor | None) -> torch.Tensor | None:
    """[B, K, ...] as [B*K, ...]."""
    return None if t is None else multilinear.first(batch, dim, t).flatten(0, 1).contiguous()


def _grouped(constants: Tensors, batch: int) -> Tensors:
    """The same geometry with every group once per member of the batch."""
    return (*constants[:-3], constants[-3] * batch, *constants[-2:])


def family(stem: str, kernels: ModuleType | None, serves: Callable[[Any, Any, int], bool]) -> Family:
    """Declares ``<stem>_fwd``, ``_act_fwd``, ``_dgrad`` and ``_wgrad`` of a stem and makes them differentiable."""
    ops = {
        name: library.declare(f"{stem}_{name}({tensors}, {constants}) -> Tensor", fake, kernels)
        for name, tensors, constants, fake in (
            ("fwd", "Tensor x, Tensor w, Tensor? b", _GEOMETRY, _fwd_fake),
            ("act_fwd", "Tensor x, Tensor w, Tensor? b, Tensor? residual", f"{_GEOMETRY}, {_FUNCTION}", _act_fake),
            ("dgrad", "Tensor dy, Tensor w, Tensor? b, int[] size", _GEOMETRY, _dgrad_fake),
            ("wgrad", "Tensor dy, Tensor x, int[] taps", _GEOMETRY, _wgrad_fake),
        )
    }

    def fwd_gradient(ns, dy, inputs, constants, needs):
        x, w, _ = inputs
        last = constants[-2]
        return (
            dgrad(ns, dy, w, None, space(x, last), *constants) if needs[0] else None,
            wgrad(ns, dy, x, space(w, last), *constants) if needs[1] else None,
            _sum_over_positions(ns, dy, last) if needs[2] else None,
        )

    def fwd_fold(ns, batch, dims, inputs, constants):
        (x, w, b), last = inputs, constants[-2]
        if dims[1] is None and dims[2] is None:
            x = multilinear.first(batch, dims[0], x)
            y = fwd(ns, x.flatten(0, 1).contiguous(), w, b, *constants)
            return y.reshape(batch, x.shape[1], *y.shape[1:]), 0
        if dims[0] is None and constants[-3] == 1:
            # filters of a batch under one input are more output channels
            y = fwd(ns, x, _into_first(batch, dims[1], w), _into_first(batch, dims[2], b), *constants)
            return _from_channels(batch, y, last), 0
        x = _into_channels(batch, dims[0], x, last)
        w, b = _into_first(batch, dims[1], w), _into_first(batch, dims[2], b)
        return _from_channels(batch, fwd(ns, x, w, b, *_grouped(constants, batch)), last), 0

    # The raw op with an activation is not linear: only ``plus``, which is, has derivatives.

    def geometry_of(constants):
        if constants[-4:] != _IDENTITY:
            raise RuntimeError(
                f"{stem}_act_fwd: got the derivative of the raw op, expected pyops.functional.conv2d_act, which has it"
            )
        return constants[:-4]

    def plus_gradient(ns, dy, inputs, constants, needs):
        (x, w, *_), geometry = inputs, geometry_of(constants)
        return (*fwd_gradient(ns, dy, (x, w, None), geometry, needs[:3]), dy if needs[3] else None)

    def plus_tangent(ns, inputs, tangents, constants):
        (x, w, *_), (*along, added) = inputs, tangents
        moved = fwd_tangent(ns, (x, w, None), along, geometry_of(constants))
        return moved if added is None else moved + added

    def plus_fold(ns, batch, dims, inputs, constants):
        y, _ = fwd_fold(ns, batch, dims[:3], inputs[:3], geometry_of(constants))
        return y if inputs[3] is None else y + multilinear.first(batch, dims[3], inputs[3]), 0

    def dgrad_gradient(ns, dx, inputs, constants, needs):
        (dy, w, _), geometry = inputs, constants[1:]
        last = constants[-2]
        return (
            _crop(fwd(ns, dx, w, None, *geometry), dy, last) if needs[0] else None,
            wgrad(ns, dy, dx, space(w, last), *geometry) if needs[1] else None,
            _sum_over_positions(ns, dx, last) if needs[2] else None,
        )

    def dgrad_fold(ns, batch, dims, inputs, constants):
        (dy, w, b), last = inputs, constants[-2]
        if dims[1] is None and dims[2] is None:
            dy = multilinear.first(batch, dims[0], dy)
            dx = dgrad(ns, dy.flatten(0, 1).contiguous(), w, b, *constants)
            return dx.reshape(batch, dy.shape[1], *dx.shape[1:]), 0
        dy = _into_channels(batch, dims[0], dy, last)
        w, b = _into_first(batch, dims[1], w), _into_first(batch, dims[2], b)
        return _from_channels(batch, dgrad(ns, dy, w, b, *_grouped(constants, batch)), last), 0

    def wgrad_gradient(ns, dw, inputs, constants, needs):
        (dy, x), geometry = inputs, constants[1:]
        last = constants[-2]
        return (
            _crop(fwd(ns, x, dw, None, *geometry), dy, last) if needs[0] else None,
            dgrad(ns, dy, dw, None, space(x, last), *geometry) if needs[1] else None,
        )

    def wgrad_fold(ns, batch, dims, inputs, constants):
        last = constants[-2]
        dy, x = (_into_channels(batch, d, t, last) for d, t in zip(dims, inputs))
        dw = wgrad(ns, dy, x, *_grouped(constants, batch))
        return dw.unflatten(0, (batch, dw.shape[0] // batch)), 0

    fwd_tangent = _product_rule(lambda *a: fwd(*a))
    linear = {
        "fwd": Multilinear(ops["fwd"], 3, fwd_gradient, fwd_tangent, fwd_fold),
        "act_fwd": Multilinear(ops["act_fwd"], 4, plus_gradient, plus_tangent, plus_fold, kept=(0, 1)),
        "dgrad": Multilinear(ops["dgrad"], 3, dgrad_gradient, _product_rule(lambda *a: dgrad(*a)), dgrad_fold),
    }
    apply = {name: multilinear.differentiable(formula) for name, formula in linear.items()}

    def tuned(name, ns, x, w, constants):
        if stem != "conv":
            return constants
        if (constants[-1] == "" or isinstance(constants[-1], _Chosen)) and _only_exact():
            # a gradient: what was asked for since the graph was recorded
            return (*constants[:-1], "gemm")
        return _tuned(ops[name], name, ns, x, w, constants)

    def fwd(ns, x, w, b, *constants):
        return apply["fwd"](ns, x, w, b, *tuned("fwd", ns, x, w, constants))

    def dgrad(ns, dy, w, b, *constants):
        return apply["dgrad"](ns, dy, w, b, *tuned("dgrad", ns, dy, w, constants))

    def plus(ns, x, w, b, residual, *constants):
        return apply["act_fwd"](ns, x, w, b, residual, *tuned("fwd", ns, x, w, constants), *_IDENTITY)

    def act(ns, x, w, b, residual, *constants):
        arguments = (x, w, b, residual, *tuned("fwd", ns, x, w, constants[:-4]), *constants[-4:])
        if torch.compiler.is_compiling():
            return ops["act_fwd"].overloads[ns](*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return ops["act_fwd"].overloads[ns](*arguments)

    wgrad = multilinear.differentiable(
        Multilinear(ops["wgrad"], 2, wgrad_gradient, _product_rule(lambda *a: wgrad(*a)), wgrad_fold)
    )
    _families[stem] = Family(stem, serves, fwd, plus, act, dgrad, wgrad)
    return _families[stem]


# Tuning


def tuning_key(name: str, shape: Sequence[int], weight: Sequence[int], dtype: torch.dtype, geometry: Tensors) -> str:
    """``shape`` is that of the first tensor; geometry leaves the algorithm out, and begins with dgrad's size."""
    *numbers, last = geometry
    sizes = " ".join(str(list(n) if isinstance(n, (list, tuple)) else n) for n in (shape, weight, *numbers))
    layout = "channels last" if last else "planes"
    return f"conv_{name} {sizes} {str(dtype).removeprefix('torch.')} {layout}, {torch.get_num_threads()} threads"


def _candidates(dtype: torch.dtype, size: Sequence[int], taps: Sequence[int], geometry: Tensors) -> list[str]:
    """The algorithms that compute a convolution on the CPU in different ways."""
    stride, padding, dilation, _, last = geometry[-5:]
    found = ["gemm"] if last else ["gemm", "columns"]
    flat = size[0] == 1 and padding[0] == 0
    neighbours = list(taps) == [1, 3, 3] and all(v == 1 for v in (*stride, *dilation))
    return [*found, "winograd2", "winograd4"] if dtype == torch.float32 and flat and neighbours else found


class _Chosen(str):
    """An algorithm that was measured for one product; the gradient of that product is free to take another."""


def _tuned(op: library.Op, name: str, ns: str, a: torch.Tensor, w: torch.Tensor, constants: Tensors) -> Tensors:
    """The constants with the algorithm that was measured to be the fastest, where tuning may choose."""
    if not tuning.active() and not isinstance(constants[-1], _Chosen):
        return constants
    *geometry, algorithm = constants
    if isinstance(algorithm, _Chosen):
        algorithm, constants = "", (*geometry, "")
    if algorithm != "" or not tuning.active() or torch.compiler.is_compiling():
        return constants
    plain = all(type(t) in (torch.Tensor, torch.nn.Parameter) for t in (a, w))
    if ns != "pyops" or not plain or a.device.type != "cpu" or a.numel() == 0:
        return constants
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return constants
    last = constants[-2]
    names = _candidates(a.dtype, space(a, last), space(w, last), tuple(geometry))
    if len(names) == 1:
        return constants

    def run(algorithm: str) -> Callable[[], torch.Tensor]:
        return lambda: op.overloads[ns](a, w, None, *geometry, algorithm)

    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
        key = tuning_key(name, a.shape, w.shape, a.dtype, tuple(geometry))
        return (*geometry, _Chosen(tuning.best(key, {name: run(name) for name in names})))


# Canonical form


def canonical(t: torch.Tensor, dims: int, channels_last: bool) -> torch.Tensor:
    """[N, C, *space] of ``dims`` spatial dimensions in canonical form; a copy only where the memory differs."""
    ones = (1,) * (3 - dims)
    if channels_last:
        return t.movedim(1, -1).contiguous().reshape(t.shape[0], *ones, *t.shape[2:], t.shape[1])
    return t.contiguous().reshape(t.shape[0], t.shape[1], *ones, *t.shape[2:])


def restore(t: torch.Tensor, dims: int, channels_last: bool) -> torch.Tensor:
    """The inverse of ``canonical``."""
    if channels_last:
        return t.reshape(t.shape[0], *t.shape[4 - dims : 4], t.shape[4]).movedim(-1, 1)
    return t.reshape(t.shape[0], t.shape[1], *t.shape[5 - dims :])


# Algorithms

ALGORITHMS = {
    "": "the default table",
    "gemm": "a matrix product whose columns are shifted rows or packed blocks, never whole (CPU); implicit GEMM (GPU)",
    "columns": "a matrix product whose columns are packed blocks, never whole (CPU; channels last: gemm)",
    "winograd2": "Winograd's F(2x2, 3x3): 2.25 times fewer products (CPU, float32, 3x3 taps, stride 1)",
    "winograd4": "Winograd's F(4x4, 3x3): 4 times fewer products (CPU, float32, 3x3 taps, stride 1)",
    "ieee": "products in float32 on CUDA cores",
    "tf32": "products of float32 rounded to 10 bits on tensor cores",
    "3xtf32": "float32 split in two TF32 parts, three products on tensor cores",
    "wgmma": "implicit GEMM by warpgroup products and TMA where the call allows it: bfloat16 or float16, channels last,"
    " channels in eights (those of a group in 64s), compute capability 9.0; else gemm",
}
_ON_CPU = ("gemm", "columns", "winograd2", "winograd4")
_algorithm = os.environ.get("PYOPS_CONV_ALGORITHM", "")


def _known(source: str, name: str) -> str:
    if name not in ALGORITHMS:
        raise ValueError(f"{source}: got {name!r}, expected one of {', '.join(filter(None, ALGORITHMS))}")
    return name


class conv_algorithm:
    """Chooses the algorithm of convolutions, process-wide, as a call or for the length of a ``with`` block.

    Args:
        name: ``"gemm"``, ``"columns"``, ``"winograd2"``, ``"winograd4"``, ``"ieee"``, ``"tf32"``, ``"3xtf32"``,
            ``"wgmma"``, or ``""`` for the default table. An algorithm that does not apply to a call leaves it to
            ``"gemm"``; ``pyops explain conv2d`` says which one runs. With ``torch.use_deterministic_algorithms`` or
            ``torch.backends.mkldnn.conv.fp32_precision = "ieee"`` the table leaves out Winograd's, in gradients of
            earlier calls too; what torch.compile has compiled keeps the precision that it was compiled with.
            The environment variable PYOPS_CONV_ALGORITHM does the same from the start; where it names no algorithm,
            every convolution raises and says so.

    Raises:
        ValueError: an unknown name.
    """

    def __init__(self, name: str) -> None:
        global _algorithm
        self._before, _algorithm = _algorithm, _known("conv_algorithm", name)

    def __enter__(self) -> conv_algorithm:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        global _algorithm
        _algorithm = self._before


def _tf32_allowed() -> bool:
    return torch.backends.cudnn.allow_tf32


@tracing.constant
def _only_exact() -> bool:
    """Whether torch is asked for more than Winograd's algorithm gives."""
    # what torch.backends.mkldnn.conv.fp32_precision reads, at a tenth of its cost
    precision = torch._C._get_fp32_precision_getter("mkldnn", "conv")
    return torch.are_deterministic_algorithms_enabled() or precision == "ieee"


def cpu_algorithm() -> str:
    """``algorithm_for`` a call on the CPU; ``""`` leaves it to tuning, if on, else to csrc/cpu/conv_choice.h."""
    _known("PYOPS_CONV_ALGORITHM", _algorithm)
    if _algorithm in _ON_CPU:
        return _algorithm
    return "gemm" if _algorithm or _only_exact() else ""


def algorithm_for(dtype: torch.dtype, backend_name: str, on_gpu: bool) -> str:
    """The algorithm of a call: the chosen one, else that of the default table."""
    if backend_name == "cpu":
        return cpu_algorithm()
    _known("PYOPS_CONV_ALGORITHM", _algorithm)
    if dtype in (torch.bfloat16, torch.float16) and backend_name != "triton":
        return "gemm" if _algorithm == "gemm" else "wgmma"
    if dtype != torch.float32:
        return "gemm"
    if _algorithm in ("ieee", "tf32", "3xtf32"):
        return _algorithm
    return "tf32" if on_gpu and _tf32_allowed() else "ieee"


def algorithm_asked_for() -> str:
    """What ``conv_algorithm`` or PYOPS_CONV_ALGORITHM names; ``""``: nothing."""
    return _algorithm


def why_exact() -> str | None:
    """What asks for more than Winograd's algorithm gives, in words, if anything does."""
    if torch.are_deterministic_algorithms_enabled():
        return "torch.use_deterministic_algorithms leaves out Winograd's"
    return "torch.backends.mkldnn.conv.fp32_precision = 'ieee' leaves out Winograd's" if _only_exact() else None


def current_algorithm(x: torch.Tensor) -> str:
    """``algorithm_for`` the call that is being made on x."""
    return algorithm_for(x.dtype, backend.name_for(x.device), x.device.type == "cuda")
