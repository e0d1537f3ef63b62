"""From the arguments of torch's convolutions to a canonical call: checks, padding words, unbatched input, layouts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import autocast, backend, check, convolution, layout

Sizes = int | Sequence[int]


def _sizes(op: str, argument: str, value: Any, dims: int, low: int) -> list[int]:
    if isinstance(value, (bool, str, float)):
        check.fail(TypeError, op, argument, type(value).__name__, "integers")
    values = [value] * dims if isinstance(value, (int, torch.SymInt)) else list(value)
    if len(values) == 1:
        values *= dims
    if len(values) != dims:
        check.fail(RuntimeError, op, argument, value, f"an integer or {dims}")
    for v in values:
        if v < low:
            check.fail(RuntimeError, op, argument, value, f"integers >= {low}")
    return values


def _check_tensors(
    op: str, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dims: int, groups: int, out: int
) -> None:
    """Ranks, dtypes, devices; ``out`` is the number of output channels."""
    check.floating(op, "input", input)
    if not isinstance(weight, torch.Tensor):
        check.fail(TypeError, op, "weight", type(weight).__name__, "a tensor")
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
    for size in weight.shape:
        if size == 0:
            check.fail(RuntimeError, op, "weight", f"shape {list(weight.shape)}", "at least one element")
    if bias is not None and tuple(bias.shape) != (out,):
        check.fail(RuntimeError, op, "bias", f"shape {list(bias.shape)}", f"shape [{out}], one for each output channel")


def _is_channels_last(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """As torch: channels last where the input or the weight is, in 2 and 3 dimensions."""
    return x.dim() > 3 and (layout.is_channels_last(x) or layout.is_channels_last(weight))


def _pays_for_a_pass(namespace: str, x: torch.Tensor, weight: torch.Tensor, groups: int) -> bool:
    """Whether x is better copied to channels last, and y back: CUDA kernels read channels as vectors of 16 bytes.

    Measured on an H200, 3 x 3 taps in bfloat16: 1.0 ms in planes, 0.19 ms channels last, 0.34 ms with the copies.
    """
    on_gpu = namespace == "pyops_emulator" or (namespace == "pyops" and x.is_cuda)
    return on_gpu and groups == 1 and min(x.shape[1], *weight.shape[:2]) >= 32 and any(t > 1 for t in weight.shape[2:])


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


def _in_canonical_form(
    op: str,
    product: str,
    channels: int,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    geometry: tuple[list[int], ...],
    groups: int,
) -> torch.Tensor:
    """The product "fwd" or "dgrad" of the room that serves ``channels``, those of the convolution's input."""
    namespace, last, dims = backend.namespace_for(op, x), _is_channels_last(x, weight), x.dim() - 2
    passed = not last and _pays_for_a_pass(namespace, x, weight, groups)
    last = last or passed
    y = getattr(convolution.family_for(channels, weight.shape, groups), product)(
        namespace,
        convolution.canonical(x, dims, last),
        convolution.canonical(weight, dims, last),
        None if bias is None else bias.contiguous(),
        *geometry,
        groups,
        last,
        convolution.current_algorithm(x),
    )
    y = convolution.restore(y, dims, last)
    return y.contiguous() if passed else y


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
    """A convolution of ``dims`` spatial dimensions; ``op`` is the name in messages and in the autocast table."""
    input, weight, bias = autocast.cast(op, input, weight, bias)
    _check_tensors(op, input, weight, bias, dims, groups, weight.shape[0])
    stride = _sizes(op, "stride", stride, dims, 1)
    dilation = _sizes(op, "dilation", dilation, dims, 1)
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
    padding = _sizes(op, "padding", padding, dims, 0)
    for size, k, p, d in zip(x.shape[2:], taps, padding, dilation):
        if d * (k - 1) + 1 > size + 2 * p:
            check.fail(
                RuntimeError, op, "weight", f"taps {taps}", f"a filter that fits the padded input {size + 2 * p}"
            )
    geometry = (_three(stride, 1), _three(padding, 0), _three(dilation, 1))
    y = _in_canonical_form(op, "fwd", x.shape[1], x, weight, bias, geometry, groups)
    return y if input.dim() == dims + 2 else y.squeeze(0)


def convolve_transposed(
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
) -> torch.Tensor:
    """A transposed convolution of ``dims`` spatial dimensions."""
    input, weight, bias = autocast.cast(op, input, weight, bias)
    out = weight.shape[1] * groups if isinstance(weight, torch.Tensor) and weight.dim() > 1 else 0
    _check_tensors(op, input, weight, bias, dims, groups, out)
    stride = _sizes(op, "stride", stride, dims, 1)
    padding = _sizes(op, "padding", padding, dims, 0)
    dilation = _sizes(op, "dilation", dilation, dims, 1)
    extra = _sizes(op, "output_padding", output_padding, dims, 0)
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
    if any(s < 1 for s in size):
        check.fail(RuntimeError, op, "padding", padding, f"an output of at least one position; its size is {size}")
    geometry = (_three(size, 1), _three(stride, 1), _three(padding, 0), _three(dilation, 1))
    y = _in_canonical_form(op, "dgrad", out, x, weight, bias, geometry, groups)
    return y if input.dim() == dims + 2 else y.squeeze(0)
