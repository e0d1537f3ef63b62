"""Deformable convolution: every tap of the filter reads where its offset points, optionally weighted.

    y[n,k,p,q] = b[k] + Σ_c Σ_rs w[k,c,r,s] m[n,g,rs,p,q] x[n,c](p sh - ph + r dh + Δy, q sw - pw + s dw + Δx)

    x(·): bilinear, 0 outside the map;  Δ = offset[n,g,rs], two numbers;  g: the offset group of channel c

    x: [N, C, H, W]   w: [K, C/groups, R, S]   offset: [N, 2 G R S, P, Q]   m: [N, G R S, P, Q]   y: [N, K, P, Q]

Put together from torch's ops, an image at a time, so memory is that of one image's columns; differentiable to every
order.

Source: Dai et al. 2017, https://arxiv.org/abs/1703.06211; Zhu et al. 2019; torchvision.ops.deform_conv2d.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ..core import check


def _pair(op: str, argument: str, value: Any, least: int) -> tuple[int, int]:
    a, b = (value, value) if isinstance(value, int) else tuple(value)
    if not (isinstance(a, int) and isinstance(b, int) and a >= least and b >= least):
        check.fail(ValueError, op, argument, (a, b), f"one or two integers >= {least}")
    return a, b


def _columns(x, y, x_at, mask):
    """One image: x [G, C/G, H, W] read at y, x_at [G, T] (T taps and places), times mask [G, T]: [G, C/G, T]."""
    groups, channels, h, w = x.shape
    flat = x.reshape(groups, channels, h * w)
    inside = (y > -1) & (y < h) & (x_at > -1) & (x_at < w)
    # where a sample does not count its address and its gradient must not either
    y, x_at = (torch.where(inside, t, torch.zeros_like(t)) for t in (y, x_at))
    y0, x0 = y.detach().floor(), x_at.detach().floor()
    ty, tx = y - y0, x_at - x0
    total = None
    for dy, wy in ((0, 1 - ty), (1, ty)):
        for dx, wx in ((0, 1 - tx), (1, tx)):
            row, column = y0 + dy, x0 + dx
            valid = inside & (row >= 0) & (row < h) & (column >= 0) & (column < w)
            index = (row.clamp(0, h - 1) * w + column.clamp(0, w - 1)).long()
            picked = flat.gather(2, index[:, None].expand(groups, channels, index.shape[1]))
            weight = torch.where(valid, wy * wx, torch.zeros_like(wy))
            weight = weight if mask is None else weight * mask
            # a pixel that is not finite must not reach a place that does not read it
            part = torch.where(valid[:, None], picked, torch.zeros_like(picked)) * weight[:, None]
            total = part if total is None else total + part
    return total


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
        Tensor[N, K, P, Q] in the input's dtype.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit together.
        ValueError: stride, padding or dilation out of range.

    Half precision is computed in float32. Put together from torch's ops: gradients of every order in every tensor,
    forward mode and torch.compile are torch's. Any batch size.
    """
    op = "deform_conv2d"
    check.floating(op, "input", input)
    sh, sw = _pair(op, "stride", stride, 1)
    ph, pw = _pair(op, "padding", padding, 0)
    dh, dw = _pair(op, "dilation", dilation, 1)
    if input.dim() != 4 or weight.dim() != 4:
        got = f"shapes {list(input.shape)} and {list(weight.shape)}"
        check.fail(RuntimeError, op, "input", got, "[N, C, H, W] and a weight [K, C / groups, R, S]")
    n, c, h, w = input.shape
    k, per_group, r, s = weight.shape
    if per_group == 0 or c % per_group or k % (c // per_group):
        check.fail(RuntimeError, op, "weight", f"shape {list(weight.shape)}", f"[K, {c} / groups, R, S], groups | K")
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
    wide = check.accumulate_dtype(input.dtype)
    place = lambda count, step: torch.arange(count, device=input.device, dtype=wide) * step
    rows = place(r, dh)[:, None, None, None] + (place(p, sh) - ph)[:, None]
    columns = place(s, dw)[:, None, None] + (place(q, sw) - pw)
    rows, columns = (t.expand(r, s, p, q).reshape(1, -1) for t in (rows, columns))
    filters = weight.to(wide).reshape(c // per_group, k // (c // per_group), per_group * taps)
    results = []
    for i in range(n):
        move = offset[i].to(wide).reshape(g, taps, 2, p * q)
        y = rows + move[:, :, 0].reshape(g, -1)
        x = columns + move[:, :, 1].reshape(g, -1)
        weights = None if mask is None else mask[i].to(wide).reshape(g, -1)
        col = _columns(input[i].to(wide).reshape(g, c // g, h, w), y, x, weights)
        col = col.reshape(c // per_group, per_group * taps, p * q)
        results.append((filters @ col).reshape(k, p, q))
    out = torch.stack(results) if results else input.new_zeros((0, k, p, q), dtype=wide)
    if bias is not None:
        out = out + bias.to(wide)[:, None, None]
    return out.to(input.dtype)


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
