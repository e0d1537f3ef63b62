"""From the arguments of torch's convolutions to a canonical call: checks, padding words, unbatched input, layouts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import forward_ad

from . import activations, autocast, backend, bias_act, check, convolution, layout

Sizes = int | Sequence[int]


def _check_weight(op: str, weight: Any) -> None:
    if not isinstance(weight, torch.Tensor):
        check.fail(TypeError, op, "weight", type(weight).__name__, "a tensor")


def _check_tensors(
    op: str, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dims: int, groups: int, out: int
) -> None:
    """Kinds, ranks, dtypes, devices; ``out`` is the number of output channels."""
    check.floating(op, "input", input)
    _check_weight(op, weight)
    if bias is not None and not isinstance(bias, torch.Tensor):
        check.fail(TypeError, op, "bias", type(bias).__name__, "a tensor or None")
    if not check.is_integer(groups):
        check.fail(TypeError, op, "groups", repr(groups), "an integer")
    if weight.dim() != dims + 2:
        check.fail(RuntimeError, op, "weight", f"{weight.dim()} dimensions", f"{dims + 2}")
    if input.dim() not in (dims + 1, dims + 2):
        expected = f"{dims + 1} (unbatched) or {dims + 2} (batched)"
        check.fail(RuntimeError, op, "input", f"{input.dim()} dimensions", expected)
    if groups <= 0:
        check.fail(RuntimeError, op, "groups", groups, "an integer >= 1")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is None:
            continue
        if t.dtype != input.dtype:
            check.fail(RuntimeError, op, name, t.dtype, f"{input.dtype}, as the input")
        if t.device != input.device:
            check.fail(RuntimeError, op, name, f"a tensor on {t.device}", f"one on {input.device}, as the input")
    if 0 in weight.shape:
        # torch looks at an example for its taps
        no_example = (
            input.dim() == dims + 2 and input.shape[0] == 0 and 0 in weight.shape[2:] and 0 not in weight.shape[:2]
        )
        kind = IndexError if no_example else RuntimeError
        check.fail(kind, op, "weight", f"shape {list(weight.shape)}", "at least one element")
    if bias is not None and tuple(bias.shape) != (out,):
        check.fail(RuntimeError, op, "bias", f"shape {list(bias.shape)}", f"shape [{out}], one for each output channel")


def _is_channels_last(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """As torch: channels last where the input or the weight is, in 2 and 3 dimensions."""
    return x.dim() > 3 and (layout.is_channels_last(x) or layout.is_channels_last(weight))


def pays_for_a_pass(namespace: str, x: torch.Tensor, weight: torch.Tensor, groups: int) -> bool:
    """Whether x is better copied to channels last, and y back: CUDA kernels read channels as vectors of 16 bytes.

    Measured on an H200, 3 x 3 taps in bfloat16: 1.0 ms in planes, 0.19 ms channels last, 0.34 ms with the copies. Of
    several groups only those of 64 channels and more, which have tiles of their own in the same kernels.
    """
    on_gpu = namespace == "pyops_emulator" or (namespace == "pyops" and x.is_cuda)
    least = min(x.shape[1] // groups, weight.shape[0] // groups, weight.shape[1])
    return on_gpu and least >= (32 if groups == 1 else 64) and any(t > 1 for t in weight.shape[2:])


def _three(values: list[int], filler: int) -> list[int]:
    return [filler] * (3 - len(values)) + values


def _same_padding(op: str, input: torch.Tensor, taps: list[int], stride: list[int], dilation: list[int]):
    """(input, padding) of padding='same': an odd total pads one more on the right, as torch does."""
    if any(s != 1 for s in stride):
        check.fail(RuntimeError, op, "padding", "'same' with a stride", "a stride of 1 with 'same'")
    totals = [d * (k - 1) for k, d in zip(taps, dilation)]
    if any(t % 2 for t in totals):
        extra = [pad for t in reversed(totals) for pad in (0, t % 2)]
        input = torch.nn.functional.pad(input, extra)
    return input, [t // 2 for t in totals]


@dataclass(frozen=True)
class Call:
    """One convolution in canonical form; ``geometry`` holds the constants of its op."""

    family: convolution.Family
    namespace: str
    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    geometry: tuple[Any, ...]
    dims: int
    batched: bool
    last: bool
    passed: bool  # through channels last

    def run(self, product: Callable[..., torch.Tensor]) -> torch.Tensor:
        return self.result(product(self.namespace, self.x, self.weight, self.bias, *self.geometry))

    def canonical(self, t: torch.Tensor) -> torch.Tensor:
        """A tensor that is shaped as the result."""
        return convolution.canonical(t if self.batched else t.unsqueeze(0), self.dims, self.last)

    def result(self, y: torch.Tensor) -> torch.Tensor:
        y = convolution.restore(y, self.dims, self.last)
        y = y.contiguous() if self.passed else y
        return y if self.batched else y.squeeze(0)


def _in_canonical_form(
    op: str,
    channels: int,
    batched: bool,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    geometry: tuple[list[int], ...],
    groups: int,
) -> Call:
    """The call of the room that serves ``channels``, those of the convolution's input."""
    namespace, last, dims = backend.namespace_for(op, x), _is_channels_last(x, weight), x.dim() - 2
    passed = not last and pays_for_a_pass(namespace, x, weight, groups)
    last = last or passed
    return Call(
        convolution.family_for(channels, weight.shape, groups),
        namespace,
        convolution.canonical(x, dims, last),
        convolution.canonical(weight, dims, last),
        None if bias is None else bias.contiguous(),
        (*geometry, groups, last, convolution.current_algorithm(x)),
        dims,
        batched,
        last,
        passed,
    )


def prepared(
    op: str,
    dims: int,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sizes,
    padding: Sizes | str,
    dilation: Sizes,
    groups: int,
) -> Call:
    """The arguments checked; ``op`` is the name in messages and in the autocast table."""
    input, weight, bias = autocast.cast(op, input, weight, bias)
    out = weight.shape[0] if isinstance(weight, torch.Tensor) and weight.dim() > 0 else 0
    _check_tensors(op, input, weight, bias, dims, groups, out)
    groups = int(groups)
    stride = check.sides(op, "stride", stride, dims, 1)
    dilation = check.sides(op, "dilation", dilation, dims, 1)
    taps = list(weight.shape[2:])
    x = input if input.dim() == dims + 2 else input.unsqueeze(0)
    if x.shape[1] != weight.shape[1] * groups:
        expected = f"{weight.shape[1] * groups}: {groups} groups of {weight.shape[1]}, from the weight"
        check.fail(RuntimeError, op, "input", f"{x.shape[1]} channels", expected)
    if weight.shape[0] % groups:
        check.fail(RuntimeError, op, "groups", groups, f"a divisor of {weight.shape[0]} output channels")
    if padding == "same":
        x, padding = _same_padding(op, x, taps, stride, dilation)
    elif padding == "valid":
        padding = [0] * dims
    elif isinstance(padding, str):
        check.fail(RuntimeError, op, "padding", repr(padding), "integers, 'same' or 'valid'")
    padding = check.sides(op, "padding", padding, dims, 0)
    for size, k, p, d in zip(x.shape[2:], taps, padding, dilation):
        if d * (k - 1) + 1 > size + 2 * p:
            check.fail(
                RuntimeError, op, "weight", f"taps {taps}", f"a filter that fits the padded input {size + 2 * p}"
            )
    geometry = (_three(stride, 1), _three(padding, 0), _three(dilation, 1))
    return _in_canonical_form(op, x.shape[1], input.dim() == dims + 2, x, weight, bias, geometry, groups)


@dataclass(frozen=True)
class _Plan:
    """What the sizes alone decide of a convolution of contiguous tensors on the CPU, once they have been checked."""

    family: convolution.Family
    x: torch.Size
    weight: torch.Size
    y: torch.Size
    geometry: tuple[Any, ...]


_plans: dict[Any, _Plan] = {}
_MOST_PLANS = 4096
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _has_plan(input: Any, weight: Any, bias: Any) -> bool:
    """Contiguous tensors of one type on the CPU, called for no more than a gradient: what is left are the sizes."""
    if type(input) not in _PLAIN or type(weight) not in _PLAIN or not (bias is None or type(bias) in _PLAIN):
        return False
    dtype = input.dtype
    alike = (
        input.is_cpu and weight.is_cpu and weight.dtype is dtype and input.is_contiguous() and weight.is_contiguous()
    )
    if not alike or dtype not in check.FLOATING:
        return False
    if bias is not None and not (bias.is_cpu and bias.dtype is dtype and bias.is_contiguous()):
        return False
    return not (torch._C._is_any_autocast_enabled() or torch._C._are_functorch_transforms_active())


def convolve(
    op: str,
    dims: int,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sizes,
    padding: Sizes | str,
    dilation: Sizes,
    groups: int,
) -> torch.Tensor:
    """A convolution of ``dims`` spatial dimensions; the rest are the arguments of torch.nn.functional.conv2d.

    Sizes are checked, and their canonical form found, the first time they come: both cost three times a small kernel.
    """
    key = None
    if (
        not torch.compiler.is_compiling()
        and _has_plan(input, weight, bias)
        and check.exact(stride, padding, dilation, groups)
    ):
        namespace = backend.namespace_for(op, input)
        if namespace == "pyops":
            bias_shape = None if bias is None else bias.shape
            key = (op, input.shape, weight.shape, bias_shape, stride, padding, dilation, groups)
            plan = _plans.get(key)
            if plan is not None:
                algorithm = convolution.cpu_algorithm()
                x, w = input.view(plan.x), weight.view(plan.weight)
                return plan.family.fwd(namespace, x, w, bias, *plan.geometry, algorithm).view(plan.y)
    call = prepared(op, dims, input, weight, bias, stride, padding, dilation, groups)
    y = call.run(call.family.fwd)
    if key is not None and padding != "same":
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        _plans[key] = _Plan(call.family, call.x.shape, call.weight.shape, y.shape, call.geometry[:-1])
    return y


def _padded(
    op: str, dims: int, input: torch.Tensor, taps: Sequence[int], padding: Sizes | str, dilation: Sizes, mode: str
) -> torch.Tensor:
    """The input with borders that are not zeros."""
    if mode not in ("reflect", "replicate", "circular"):
        expected = "'zeros', 'reflect', 'replicate' or 'circular'"
        check.fail(ValueError, op, "padding_mode", repr(mode), expected)
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(taps, check.sides(op, "dilation", dilation, dims, 1))]
        borders = [(t // 2, t - t // 2) for t in totals]
    else:
        borders = [(p, p) for p in check.sides(op, "padding", 0 if padding == "valid" else padding, dims, 0)]
    return torch.nn.functional.pad(input, [p for border in reversed(borders) for p in border], mode=mode)


def _needs_no_derivative(*tensors: torch.Tensor | None) -> bool:
    if torch.compiler.is_compiling():
        return not torch.is_grad_enabled() and forward_ad._current_level < 0
    return not bias_act.recorded(*tensors)


def _residual(op: str, call: Call, residual: torch.Tensor) -> torch.Tensor:
    """What is added to the sums, in canonical form."""
    if not isinstance(residual, torch.Tensor):
        check.fail(TypeError, op, "residual", type(residual).__name__, "a tensor or None")
    r: Any = autocast.cast(op, residual)[0]
    outer = slice(3 - call.dims, None)
    sizes = convolution.output_size(
        *(convolution.space(t, call.last)[outer] for t in (call.x, call.weight)),
        *(values[outer] for values in call.geometry[:3]),
    )
    shape = [*([call.x.shape[0]] if call.batched else []), call.weight.shape[0], *sizes]
    if list(r.shape) != shape or r.dtype != call.x.dtype or r.device != call.x.device:
        got = f"shape {list(r.shape)}, {r.dtype} on {r.device}"
        check.fail(RuntimeError, op, "residual", got, f"shape {shape}, {call.x.dtype} on {call.x.device}")
    return call.canonical(r)


def convolve_act(
    op: str,
    dims: int,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
    stride: Sizes,
    padding: Sizes | str,
    dilation: Sizes,
    groups: int,
    padding_mode: str,
) -> torch.Tensor:
    """``f(convolution + bias + residual)``: one pass over y, or two where the sum has to be kept for a derivative."""
    function = activations.fused(op, activation)
    _check_weight(op, weight)
    if padding_mode != "zeros":
        input, padding = _padded(op, dims, input, weight.shape[2:], padding, dilation, padding_mode), 0
    call = prepared(op, dims, input, weight, bias, stride, padding, dilation, groups)
    r = None if residual is None else _residual(op, call, residual)
    family, namespace, x, w, b = call.family, call.namespace, call.x, call.weight, call.bias
    if _needs_no_derivative(x, w, b, r):
        return call.result(family.act(namespace, x, w, b, r, *call.geometry, *function))
    if r is None:
        z = family.fwd(namespace, x, w, None, *call.geometry)
    else:
        z = family.plus(namespace, x, w, None, r, *call.geometry)
    k = w.shape[0]
    images = (math.prod(z.shape[:4]), k, 1) if call.last else (z.shape[0], k, math.prod(z.shape[2:]))
    y = bias_act.apply(namespace, z.view(images), z.new_zeros(k) if b is None else b, *function)
    return call.result(y.view(z.shape))


def prepared_transposed(
    op: str,
    dims: int,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sizes,
    padding: Sizes,
    output_padding: Sizes,
    groups: int,
    dilation: Sizes,
) -> Call:
    """The same for a transposed convolution; its geometry begins with the size of the output."""
    input, weight, bias = autocast.cast(op, input, weight, bias)
    out = weight.shape[1] * groups if isinstance(weight, torch.Tensor) and weight.dim() > 1 else 0
    _check_tensors(op, input, weight, bias, dims, groups, out)
    groups = int(groups)
    stride = check.sides(op, "stride", stride, dims, 1)
    padding = check.sides(op, "padding", padding, dims, 0)
    dilation = check.sides(op, "dilation", dilation, dims, 1)
    extra = check.sides(op, "output_padding", output_padding, dims, 0)
    x = input if input.dim() == dims + 2 else input.unsqueeze(0)
    if x.shape[1] != weight.shape[0]:
        check.fail(RuntimeError, op, "input", f"{x.shape[1]} channels", f"{weight.shape[0]}, from the weight")
    if weight.shape[0] % groups:
        check.fail(RuntimeError, op, "groups", groups, f"a divisor of {weight.shape[0]} input channels")
    if any(e >= s and e >= d for e, s, d in zip(extra, stride, dilation)):
        check.fail(RuntimeError, op, "output_padding", output_padding, "less than the stride or the dilation")
    size = [
        (p - 1) * s - 2 * pad + d * (k - 1) + e + 1
        for p, s, pad, d, k, e in zip(x.shape[2:], stride, padding, dilation, weight.shape[2:], extra)
    ]
    if any(s < 0 for s in size):
        check.fail(RuntimeError, op, "padding", padding, f"an output of no negative size; it is {size}")
    geometry = (_three(size, 1), _three(stride, 1), _three(padding, 0), _three(dilation, 1))
    return _in_canonical_form(op, out, input.dim() == dims + 2, x, weight, bias, geometry, groups)


def convolve_transposed(op: str, dims: int, *arguments: Any) -> torch.Tensor:
    """A transposed convolution; ``arguments`` are those of torch.nn.functional.conv_transpose2d."""
    call = prepared_transposed(op, dims, *arguments)
    return call.run(call.family.dgrad)
