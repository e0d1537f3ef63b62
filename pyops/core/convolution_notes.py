"""Which algorithm a convolution and its gradients would take, why, and how much memory: for ``explain`` and bench.

The arguments are checked as in a call, on tensors without memory; nothing is computed. What the CPU chooses its own
headers say (core/blocking.py), the rest are the rules of csrc/cuda/conv.cu and kernels/conv.py in words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import backend, blocking, check, convolution, convolve, tuning
from .library import NAMESPACE_OF

_NO_SHAPES = "give the shapes of input and weight to see the choice"
_OF_DIRECT = "depthwise: a window slides over each row, there is no product to share"


@dataclass(frozen=True)
class Pass:
    """One of the three computations of a convolution.

    Attributes:
        name: forward, gradient in the input, or in the weight.
        algorithm: a name of ``conv_algorithm``, or ``"direct"``, ``"few channels"``, ``"few filters"``, ``"grouped"``.
        why: the reason.
        workspace: temporary memory at most, in bytes; None where it is not known.
    """

    name: str
    algorithm: str
    why: str
    workspace: int | None

    def __str__(self) -> str:
        known = "" if self.workspace is None else f"; workspace at most {self.workspace} bytes"
        return f"{self.name}: algorithm {self.algorithm} {self.why}{known}"


@dataclass(frozen=True)
class _Problem:
    """A convolution x -> y in canonical form, whichever of the three computations is asked for."""

    backend: str
    dtype: torch.dtype
    N: int
    C: int
    K: int
    groups: int
    x: list[int]
    y: list[int]
    taps: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    last: bool
    x_shape: tuple[int, ...]
    y_shape: tuple[int, ...]
    w_shape: tuple[int, ...]

    @property
    def weights(self) -> int:
        return math.prod(self.w_shape)

    @property
    def pixels(self) -> int:
        return self.N * math.prod(self.y)

    @property
    def sums(self) -> int:
        """Bytes of a sum."""
        return check.accumulate_dtype(self.dtype).itemsize


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _problem(call: convolve.Call, transposed: bool, name: str) -> _Problem:
    *geometry, groups, last, _ = call.geometry
    size = geometry.pop(0) if transposed else None
    stride, padding, dilation = geometry
    taps, given = convolution.space(call.weight, last), convolution.space(call.x, last)
    k, c = call.weight.shape[0], convolution.channels(call.weight, last) * groups
    x = size if size is not None else given
    y = given if transposed else convolution.output_size(x, taps, stride, padding, dilation)
    shape = lambda channels, sides: (call.x.shape[0], *sides, channels) if last else (call.x.shape[0], channels, *sides)
    return _Problem(
        name, call.x.dtype, call.x.shape[0], c, k, groups, list(x), list(y), list(taps), list(stride), list(padding),
        list(dilation), last, shape(c, x), shape(k, y), tuple(call.weight.shape),
    )  # fmt: skip


def _products_on_cpu(p: _Problem, op: str, label: str) -> Pass:
    """fwd or dgrad of the room conv."""
    asked, algorithm = convolution.algorithm_asked_for(), convolution.algorithm_for(p.dtype, "cpu", False)
    transposed, tuned = op == "dgrad", None
    if algorithm == "":
        first, size = (p.y_shape, (p.x,)) if transposed else (p.x_shape, ())
        geometry = (*size, p.stride, p.padding, p.dilation, p.groups, p.last)
        tuned = tuning.known(convolution.tuning_key(op, first, p.w_shape, p.dtype, geometry))
    wanted, is_float = tuned or algorithm, p.dtype == torch.float32
    plan = blocking.convolution(
        p.N, p.C, p.K, p.groups, p.x, p.y, p.taps, p.stride, p.padding, p.dilation, wanted, torch.get_num_threads(),
        transposed, is_float, p.sums,
    )  # fmt: skip
    if plan is None:
        return Pass(label, wanted or "gemm", "(pyops._host is not built, which knows the table)", None)
    runs = "columns" if wanted == "columns" and not p.last else plan["algorithm"]
    costs = {name: plan[name] for name in ("winograd2", "winograd4") if name in plan}
    shape_fits = is_float and bool(costs)
    misfit = f"which serves no {_short(p.dtype)}" if not is_float else "which serves 3x3 taps of stride 1"
    if tuned is not None:
        why = "(tuned)"
    elif asked:
        why = "(asked for)" if runs == asked else f"({asked} was asked for, {_limits(asked, p, misfit)})"
    elif not is_float:
        why = "(Winograd's serves float32)"
    elif not shape_fits:
        why = "(Winograd's serves 3x3 taps of stride 1 and dilation 1)"
    elif (exact := convolution.why_exact()) is not None:
        why = f"({exact})"
    elif min(p.C, p.K) // p.groups < 16:
        why = "(model): fewer than 16 channels do not pay for Winograd's transforms"
    else:
        beside = ", ".join(f"{name} {cost:.2f}" for name, cost in costs.items())
        why = f"(model): cost beside gemm's 1: {beside}; the larger tile rounds more and has to save a fifth"
    return Pass(label, runs, why, plan["workspace"])


def _limits(asked: str, p: _Problem, misfit: str) -> str:
    if asked in ("winograd2", "winograd4"):
        return misfit
    return "which packs planes" if asked == "columns" else "which is a GPU's"


def _weight_on_cpu(p: _Problem, label: str) -> Pass:
    plan = blocking.convolution(
        p.N, p.C, p.K, p.groups, p.x, p.y, p.taps, p.stride, p.padding, p.dilation, "gemm", torch.get_num_threads(),
        False, False, p.sums,
    )  # fmt: skip
    why = "(the only one of this gradient: products over pixels)"
    return Pass(label, "gemm", why, None if plan is None else plan["weight_workspace"])


def _depthwise_on_cpu(p: _Problem, op: str, label: str) -> Pass:
    """The scratch of csrc/cpu/depthwise_*.h and the filters, or parts of their gradient, in the type of sums."""
    taps, threads = math.prod(p.taps), torch.get_num_threads()
    if op == "wgrad":
        filters = max(min(p.N, (8 << 20) // p.sums // max(p.K * taps, 1), 8), 1) * p.K * taps
    else:
        filters = p.K * taps
    if p.last:
        return Pass(label, "direct", f"({_OF_DIRECT})", p.sums * (filters + threads * 4 * max(p.C, p.K)))
    step = [1, 1] if op == "dgrad" else p.stride[1:]
    rows = 35 * step[0] + (p.taps[1] - 1) * p.dilation[1] + 1
    pitch = (512 + 64) * step[1] + (p.taps[2] - 1) * p.dilation[2] + 33 * step[1]
    return Pass(
        label, "direct", f"({_OF_DIRECT})", p.sums * (filters + threads * (p.taps[0] * rows * pitch + 32 * 512))
    )


def _capability(name: str) -> int | None:
    """That of the device, where one is seen; of the emulator's."""
    if name == "emulator":
        return 90
    return 10 * torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else None


def _few_channels(p: _Problem) -> bool:
    """few_serves of csrc/cuda/conv_few.cuh: taps and the rectangle under a tile of 64 outputs fit."""
    if p.groups != 1 or p.C > 4 or math.prod(p.taps) * p.C > 224 or max(*p.stride, *p.dilation) > 64:
        return False

    def rectangle(width: int) -> int:
        sides = zip((64 // width, width), p.stride[1:], p.taps[1:], p.dilation[1:])
        return p.C * p.taps[0] * math.prod((n - 1) * s + (t - 1) * d + 1 for n, s, t, d in sides)

    return any(rectangle(width) <= 4096 for width in (64, 32, 16, 8))


def _few_filters(p: _Problem, op: str) -> bool:
    """narrow_serves of csrc/cuda/conv_narrow.cuh; of the residues of a gradient, for those with most taps."""
    summed, computed = (p.K, p.C) if op == "dgrad" else (p.C, p.K)
    if op == "wgrad" or p.groups != 1 or computed > 8 or summed * p.dtype.itemsize < 32 or p.dtype == torch.float64:
        return False
    taps, steps, strides = list(p.taps), list(p.dilation), list(p.stride)
    if op == "dgrad":
        common = [math.gcd(s, d) for s, d in zip(p.stride, p.dilation)]
        taps = [-(-t // (s // c)) for t, s, c in zip(p.taps, p.stride, common)]
        steps, strides = [d // c for d, c in zip(p.dilation, common)], [1, 1, 1]
    if not 1 < math.prod(taps) <= 49 or max(*steps, *strides) > 64:
        return False

    def positions(width: int) -> int:
        sides = zip((128 // width, width), strides[1:], taps[1:], steps[1:])
        return taps[0] * math.prod((n - 1) * s + (t - 1) * d + 1 for n, s, t, d in sides)

    return any(positions(width) <= 320 for width in (128, 64, 32, 16, 8))


def _on_gpu(p: _Problem, op: str, label: str, stem: str) -> Pass:
    """csrc/cuda/conv.cu and kernels/conv.py."""
    taps, itemsize, triton = math.prod(p.taps), p.dtype.itemsize, p.backend == "triton"
    part = p.weights * p.sums
    if stem == "depthwise_conv":
        parts = min(p.N, 65535) if not triton else 32
        return Pass(label, "direct", f"({_OF_DIRECT})", part * max(parts, 1) if op == "wgrad" else 0)
    on_gpu = p.backend == "cuda" or (triton and torch.cuda.is_available())
    algorithm, asked = convolution.algorithm_for(p.dtype, p.backend, on_gpu), convolution.algorithm_asked_for()
    summed, computed = (p.K // p.groups, p.C // p.groups) if op == "dgrad" else (p.C // p.groups, p.K // p.groups)
    if op == "wgrad":
        # split over pixels while the parts of dw stay below 64 MiB
        splits = max(min((64 << 20) // max(part, 1), -(-p.pixels // 64)), 1)
        workspace = part * splits * (1 if splits > 1 or triton else 2)
    else:
        workspace = p.weights * itemsize * (triton or op == "dgrad" or not p.last)
    why = {
        "tf32": "(torch allows TF32 in convolutions)", "ieee": "(float32 in full: torch's TF32 switch is off)",
    }.get(algorithm, f"(the product of {_short(p.dtype)})")  # fmt: skip
    if asked and asked == algorithm:
        why = "(asked for)"
    elif asked and asked != algorithm:
        why = f"({asked} was asked for, which does not serve {_short(p.dtype)} on {p.backend})"
    if algorithm == "wgmma":
        capability = _capability(p.backend)
        whole = 8 if p.groups == 1 else 64
        fits = p.last and p.C // p.groups % whole == 0 and p.K // p.groups % whole == 0
        if fits and capability in (90, None):
            where = "" if capability else "; where the capability is 9.0, else gemm"
            channels = "channels in eights" if p.groups == 1 else "channels of a group in 64s"
            why = f"(half types, channels last, {channels}{where})"
            return Pass(label, "wgmma", why, workspace if op == "wgrad" else 0)
        algorithm = "gemm"
        missing = "channels last and channels in eights, those of a group in 64s" if not fits else "capability 9.0"
        why = f"(wgmma needs {missing})"
    if not triton and p.groups > 1 and computed <= 32:
        depth = 32 // itemsize
        together = min(max(min(depth // summed, 32 // computed), 1), p.groups)
        columns, chunks = -(-together * computed // 8) * 8, -(-together * summed // depth)
        packed = -(-p.groups // together) * taps * chunks * columns * depth * itemsize
        why = f"(up to 32 filters a group: groups share tiles, block-diagonal), products as {algorithm}"
        return Pass(label, "grouped", why, workspace if op == "wgrad" else packed)
    if not triton and op != "dgrad" and p.dtype != torch.float64 and _few_channels(p):
        why = f"(one to four channels: the image under a tile in shared memory), products as {algorithm}"
        return Pass(label, "few channels", why, workspace)
    if not triton and _few_filters(p, op):
        why = f"(up to eight output channels: the input under a tile in shared memory), products as {algorithm}"
        return Pass(label, "few filters", why, workspace)
    return Pass(label, algorithm, why, workspace)


def passes(
    op: str,
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    name: str,
    *,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int | None = None,
    channels_last: bool = False,
    output_padding: Any = 0,
) -> tuple[str, list[Pass], int]:
    """(room, its three computations, groups) of a call of the public ``op``; raises as the call would."""
    call, transposed, groups = _call(
        op, shapes, dtype, stride, padding, dilation, groups, channels_last, output_padding
    )
    p = _problem(call, transposed, name)
    stem = call.family.stem
    of = ("dgrad", "fwd", "wgrad") if transposed else ("fwd", "dgrad", "wgrad")
    labels = ("forward", "gradient in the input", "gradient in the weight")
    found = []
    for which, label in zip(of, labels):
        if name != "cpu":
            found.append(_on_gpu(p, which, label, stem))
        elif stem == "depthwise_conv":
            found.append(_depthwise_on_cpu(p, which, label))
        else:
            found.append(_weight_on_cpu(p, label) if which == "wgrad" else _products_on_cpu(p, which, label))
    return stem, found, groups


def _call(op, shapes, dtype, stride, padding, dilation, groups, channels_last, output_padding):
    transposed = "transpose" in op
    empty = lambda shape: torch.empty(shape, dtype=dtype, device="meta")
    x, w = empty(shapes[0]), empty(shapes[1])
    dims = w.dim() - 2 if op == "depthwise_conv" else int(op.split("_act")[0][-2])
    if groups is None:
        guess = x.dim() > dims and w.dim() == dims + 2 and not transposed and w.shape[1] > 0
        groups = max(x.shape[-dims - 1] // w.shape[1], 1) if guess else 1
    if channels_last and dims > 1 and x.dim() == dims + 2:
        x = x.to(memory_format=torch.channels_last if dims == 2 else torch.channels_last_3d)
    with backend.backend("cpu"):
        if transposed:
            call = convolve.prepared_transposed(
                op, dims, x, w, None, stride, padding, output_padding, groups, dilation
            )  # fmt: skip
        else:
            call = convolve.prepared(op, dims, x, w, None, stride, padding, dilation, groups)
    return call, transposed, groups


def room(op: str, shapes: Sequence[tuple[int, ...]]) -> str:
    """The stem whose kernels run."""
    if len(shapes) < 2 or len(shapes[1]) < 3:
        return "depthwise_conv" if op == "depthwise_conv" else "conv"
    x, w = shapes[0], shapes[1]
    dims = len(w) - 2
    if len(x) <= dims:
        return "conv"
    channels = w[1] if "transpose" in op else x[-dims - 1]
    groups = 1 if "transpose" in op else channels // max(w[1], 1)
    return convolution.family_for(channels, w, groups).stem


def explainer(op: str) -> Callable[..., tuple[str, ...]]:
    """What ``explains`` takes for a convolution."""

    def notes(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, name: str, **geometry: Any) -> tuple[str, ...]:
        if len(shapes) < 2:
            return (_NO_SHAPES,)
        passed = _is_passed(op, shapes, dtype, name, geometry)
        stem, found, groups = passes(
            op, shapes, dtype, name, **(geometry | {"channels_last": True} if passed else geometry)
        )
        known = {
            p.algorithm: convolution.ALGORITHMS[p.algorithm] for p in found if p.algorithm in convolution.ALGORITHMS
        }
        lines = [f"room {stem} ({groups} groups)", *map(str, found)]
        if passed:
            lines.append("planes pass through channels last: a copy of the input and one of the output")
        return (*lines, *(f"{algorithm}: {text}" for algorithm, text in known.items()))

    return notes


def _is_passed(op, shapes, dtype, name, geometry) -> bool:
    if geometry.get("channels_last") or name not in ("cuda", "emulator"):
        return False
    x, w = (torch.empty(s, dtype=dtype, device="meta") for s in shapes[:2])
    _, _, groups = _call(op, shapes, dtype, *(geometry.get(k, v) for k, v in _DEFAULTS.items()))
    return x.dim() == w.dim() and convolve.pays_for_a_pass(NAMESPACE_OF["emulator"], x, w, groups)


_DEFAULTS = {"stride": 1, "padding": 0, "dilation": 1, "groups": None, "channels_last": False, "output_padding": 0}
