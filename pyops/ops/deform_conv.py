"""Deformable convolution: every tap of the filter reads where its offset points, optionally weighted.

    y[n,k,p,q] = b[k] + Σ_c Σ_rs w[k,c,r,s] m[n,o,rs,p,q] x[n,c](p sh - ph + r dh + Δy, q sw - pw + s dw + Δx)

    x(·): bilinear, 0 outside the map;  Δ = offset[n,o,rs], two numbers;  o: the offset group of channel c

    x: [N, C, H, W]   w: [K, C/G, R, S]   offset: [N, 2 O R S, P, Q]   m: [N, O R S, P, Q]   y: [N, K, P, Q]

The kernels work channels last: what the taps read at a place are columns, which exist for a block of places at a time
and go into a matrix product with the filters. Gradients are derived in docs/math/detection.md.

Source: Dai et al. 2017, https://arxiv.org/abs/1703.06211; Zhu et al. 2019; torchvision.ops.deform_conv2d.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ..core import autocast, backend, check, library
from ..core.autocast import HALF
from ..core.autograd import Formula, Tensors, differentiable
from ..core.explain import without_triton
from ..core.layout import is_channels_last
from ..core.samples import Maker, Sample, checked

WORKSPACE = 64 << 20  # bytes of columns that exist at a time on a GPU

_TENSORS = "Tensor x, Tensor offset, Tensor? mask, Tensor w"
_HOW = "int[] stride, int[] padding, int[] dilation, str algorithm, int workspace"


def _fwd_fake(x, offset, mask, w, stride, padding, dilation, algorithm, workspace):
    return x.new_empty((x.shape[0], offset.shape[2], offset.shape[3], w.shape[0]))


def _bwd_fake(dy, x, offset, mask, w, stride, padding, dilation, algorithm, workspace, of_data, of_weight):
    asked = (x if of_data else None, offset if of_data else None, mask if of_data else None, w if of_weight else None)
    return tuple(x.new_empty(0) if t is None else torch.empty_like(t) for t in asked)


_fwd = library.declare(f"deform_conv_fwd({_TENSORS}, {_HOW}) -> Tensor", _fwd_fake, None)
_bwd = library.declare(
    f"deform_conv_bwd(Tensor dy, {_TENSORS}, {_HOW}, bool of_data, bool of_weight) -> (Tensor, Tensor, Tensor, Tensor)",
    _bwd_fake,
    None,
)


def _reference(x, offset, mask, w, stride, padding, dilation, algorithm, workspace):
    """The columns of all places, then one product. x: [N, H, W, C], w: [K, R, S, C/G]."""
    (n, height, width, c), (k, r, s, per_group), (p, q) = x.shape, w.shape, offset.shape[2:]
    groups, taps = c // per_group, r * s
    o = offset.shape[1] // (2 * taps)
    wide = check.accumulate_dtype(x.dtype)
    place = lambda count, step, first: torch.arange(count, device=x.device) * step - first
    base_y = place(r, dilation[0], 0)[:, None, None, None] + place(p, stride[0], padding[0])[:, None]
    base_x = place(s, dilation[1], 0)[:, None, None] + place(q, stride[1], padding[1])
    base_y, base_x = (t.expand(r, s, p, q).reshape(1, taps, p * q).to(wide) for t in (base_y, base_x))
    moves = offset.to(wide).reshape(n, o, taps, 2, p * q)
    y, u = base_y + moves[:, :, :, 0], base_x + moves[:, :, :, 1]
    inside = (y > -1) & (y < height) & (u > -1) & (u < width)
    # where a sample does not count its address and its gradient must not either
    y, u = (torch.where(inside, t, torch.zeros_like(t)) for t in (y, u))
    y0, u0 = y.detach().floor(), u.detach().floor()
    flat = x.to(wide).reshape(n, height * width, o, c // o).transpose(1, 2)
    col: Any = None
    for down in (0, 1):
        for right in (0, 1):
            row, column = y0 + down, u0 + right
            valid = inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            index = (row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).long()
            index = index.reshape(n, o, taps * p * q, 1).expand(n, o, taps * p * q, c // o)
            picked = flat.gather(2, index).reshape(n, o, taps, p * q, c // o)
            share = (y - y0 if down else 1 - (y - y0)) * (u - u0 if right else 1 - (u - u0))
            share = torch.where(valid, share, torch.zeros_like(share))
            share = share if mask is None else share * mask.to(wide).reshape(n, o, taps, p * q)
            # a pixel that is not finite must not reach a place that does not read it
            part = torch.where(valid[..., None], picked, torch.zeros_like(picked)) * share[..., None]
            col = part if col is None else col + part
    # as the kernels store them
    col = col.to(x.dtype).to(wide).permute(0, 3, 2, 1, 4).reshape(n, p * q, taps, groups, per_group)
    filters = w.to(wide).reshape(groups, k // groups, taps, per_group)
    y = torch.einsum("nitgc,gktc->nigk", col, filters).reshape(n, p, q, k)
    return (y.to(x.dtype),)


def _backward_arguments(dy, inputs: Tensors, statistics: Tensors, constants: Tensors, needs) -> Tensors:
    return dy, *inputs, *constants, any(needs[:3]), needs[3]


_apply = differentiable(Formula(_fwd, _bwd, 4, 4, _backward_arguments, _reference))


def _pair(op: str, argument: str, value: Any, least: int) -> tuple[int, int]:
    a, b = (value, value) if isinstance(value, int) else tuple(value)
    if not (isinstance(a, int) and isinstance(b, int) and a >= least and b >= least):
        check.fail(ValueError, op, argument, (a, b), f"one or two integers >= {least}")
    return a, b


def _run(function, x, offset, mask, weight, bias, *how):
    """``function`` on canonical tensors, channels last; the result as x lies in memory."""
    y = function(
        x.movedim(1, -1).contiguous(), offset.contiguous(), None if mask is None else mask.contiguous(),
        weight.movedim(1, -1).contiguous(), *how,
    )  # fmt: skip
    y = y[0] if isinstance(y, tuple) else y
    y = y if bias is None else y + bias
    y = y.movedim(-1, 1)
    return y if is_channels_last(x) else y.contiguous()


def deform_conv2d(
    input: torch.Tensor,
    offset: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | tuple[int, int] = (1, 1),
    padding: int | tuple[int, int] = (0, 0),
    dilation: int | tuple[int, int] = (1, 1),
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Deformable convolution, v2 where a mask is given; drops in for torchvision.ops.deform_conv2d.

    Args:
        input: Tensor[N, C, H, W].
        offset: Tensor[N, 2 * G * R * S, P, Q], (Δy, Δx) of every tap; G offset groups divide C.
        weight: Tensor[K, C / groups, R, S].
        bias: Tensor[K] or None.
        stride, padding, dilation: one number or two, for height and width.
        mask: Tensor[N, G * R * S, P, Q] or None (1).

    Returns:
        Tensor[N, K, P, Q] in the input's dtype; channels last where the input is.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit together.
        ValueError: stride, padding or dilation out of range.

    Sums are taken in float32 (float64 for float64); on a GPU the columns are stored in the input's dtype, and float32
    products follow torch.backends.cuda.matmul.allow_tf32. Under autocast it runs in float32, as torchvision's. Bitwise
    deterministic, all gradients too. A tap whose place is not finite or off the map reads 0. Gradients of every order
    in every tensor (those above the first put together from torch's ops), forward mode, vmap, torch.compile. Any batch
    size; memory beyond the results is that of a block of columns. C++ and CUDA only.
    """
    op = "deform_conv2d"
    check.floating(op, "input", input)
    dtype = input.dtype
    if autocast.enabled(input):
        given = (input, offset, mask, weight, bias)
        input, offset, mask, weight, bias = (t.float() if t is not None and t.dtype in HALF else t for t in given)
    sh, sw = _pair(op, "stride", stride, 1)
    ph, pw = _pair(op, "padding", padding, 0)
    dh, dw = _pair(op, "dilation", dilation, 1)
    if input.dim() != 4 or weight.dim() != 4:
        got = f"shapes {list(input.shape)} and {list(weight.shape)}"
        check.fail(RuntimeError, op, "input", got, "[N, C, H, W] and a weight [K, C / groups, R, S]")
    n, c, h, w = input.shape
    k, per_group, r, s = weight.shape
    if per_group == 0 or c % per_group or c < per_group or k % (c // per_group) or r == 0 or s == 0:
        expected = f"[K, {c} / groups, R, S] with groups | K and R, S >= 1"
        check.fail(RuntimeError, op, "weight", f"shape {list(weight.shape)}", expected)
    p, q = (h + 2 * ph - dh * (r - 1) - 1) // sh + 1, (w + 2 * pw - dw * (s - 1) - 1) // sw + 1
    taps = r * s
    if offset.dim() != 4 or offset.shape[1] % (2 * taps) or offset.shape[1] == 0 or c % (offset.shape[1] // (2 * taps)):
        got = f"shape {list(offset.shape)}"
        check.fail(RuntimeError, op, "offset", got, f"[N, 2 * G * {taps}, P, Q] with G dividing {c}")
    g = offset.shape[1] // (2 * taps)
    if p <= 0 or q <= 0 or offset.shape != (n, 2 * g * taps, p, q):
        check.fail(RuntimeError, op, "offset", f"shape {list(offset.shape)}", f"[{n}, {2 * g * taps}, {p}, {q}]")
    if mask is not None and mask.shape != (n, g * taps, p, q):
        check.fail(RuntimeError, op, "mask", f"shape {list(mask.shape)}", f"[{n}, {g * taps}, {p}, {q}]")
    if bias is not None and bias.shape != (k,):
        check.fail(RuntimeError, op, "bias", f"shape {list(bias.shape)}", f"[{k}]")
    for name, t in (("offset", offset), ("weight", weight), ("bias", bias), ("mask", mask)):
        if t is not None and (t.dtype != input.dtype or t.device != input.device):
            check.fail(RuntimeError, op, name, f"{t.dtype} on {t.device}", f"{input.dtype} on {input.device}")
    tf32 = input.is_cuda and torch.backends.cuda.matmul.allow_tf32
    how = [sh, sw], [ph, pw], [dh, dw], "tf32" if tf32 else "ieee", WORKSPACE
    namespace = backend.namespace_for(op, input)
    y = _run(lambda *a: _apply(namespace, *a), input, offset, mask, weight, bias, *how)
    return y.to(dtype)


class DeformConv2d(torch.nn.Module):
    """``deform_conv2d`` with its own weight and bias, initialised as torch's convolutions; see torchvision's.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as torch.nn.Conv2d.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0,
        dilation: int = 1, groups: int = 1, bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        op = "DeformConv2d"
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            if value % groups:
                check.fail(ValueError, op, name, value, f"a multiple of {groups} groups")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = _pair(op, "kernel_size", kernel_size, 1)
        self.stride = _pair(op, "stride", stride, 1)
        self.padding = _pair(op, "padding", padding, 0)
        self.dilation = _pair(op, "dilation", dilation, 1)
        self.groups = groups
        self.weight = torch.nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size))
        self.bias = torch.nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        torch.nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            torch.nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return deform_conv2d(
            input, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask
        )  # fmt: skip

    def __repr__(self) -> str:
        text = f"{type(self).__name__}({self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        text += f", stride={self.stride}"
        text += f", padding={self.padding}" if self.padding != (0, 0) else ""
        text += f", dilation={self.dilation}" if self.dilation != (1, 1) else ""
        text += f", groups={self.groups}" if self.groups != 1 else ""
        return text + (", bias=False)" if self.bias is None else ")")


def _sample(n, c, k, size, taps, groups=1, offset_groups=1, masked=True, channels_last=False, **how):
    def make(t: Maker):
        both = lambda name, default: (
            (how.get(name, default),) * 2 if isinstance(how.get(name, default), int) else how[name]
        )
        stride, padding, dilation = both("stride", 1), both("padding", 0), both("dilation", 1)
        places = [
            (h + 2 * p - d * (r - 1) - 1) // s + 1 for h, p, d, r, s in zip(size, padding, dilation, taps, stride)
        ]
        moves = offset_groups * taps[0] * taps[1]
        x = t.input((n, c, *size), channels_last=channels_last)
        offset = t.input((n, 2 * moves, *places), 0.3)
        mask = t.input((n, moves, *places), 1.0) if masked else None
        return (x, offset, t.input((k, c // groups, *taps)), t.input((k,)), stride, padding, dilation, mask), {}

    return make


def _truth(input, offset, weight, bias, stride, padding, dilation, mask):
    return _run(_reference, input, offset, mask, weight, bias, stride, padding, dilation, "", 0)


checked(
    "deform_conv2d",
    deform_conv2d,
    _truth,
    Sample(
        "groups, offset groups, every parameter differs by side",
        _sample(1, 2, 2, (2, 3), (2, 1), 2, 2, stride=(1, 2), padding=(1, 0), dilation=(2, 1)),
        derivatives=True,
    ),
    Sample("no mask", _sample(1, 1, 2, (2, 3), (2, 2), masked=False), derivatives=True),
    Sample("more offset groups than groups, ragged", _sample(3, 6, 35, (5, 4), (3, 3), 1, 3, padding=1)),
    Sample("more groups than offset groups", _sample(2, 12, 12, (5, 7), (3, 2), 6, 2, padding=1, stride=2)),
    Sample("channels last, whole vectors", _sample(2, 64, 16, (4, 5), (3, 3), 2, 2, channels_last=True, padding=1)),
    Sample("one tap", _sample(1, 40, 3, (9, 9), (1, 1))),
    Sample("no image", _sample(0, 2, 2, (4, 4), (2, 2))),
)


without_triton("deform_conv2d")
