"""group_norm · Triton (instance norm: groups = C)
  y = (x - mean[n,g]) * rstd[n,g] * w[c] + b[c],  g = c // D,  statistics over the D channels of a group and S
  dx = rstd * (w * dy - mean(w * dy) - xhat * mean(w * dy * xhat)),  dw[c] = sum_n,s dy * xhat,  db[c] = sum_n,s dy
layout   x, y, dy, dx: [N, C, S], or [N, S, C] with channels last · w, b: [C] · mean, rstd, var: [N, G]
mapping  a group which fits in registers: BLOCK_M whole groups per program; otherwise partial moments of
         (sample, channel, strip) by as many programs as fill the GPU, combined, then applied; see _channels.py
memory   1 read and 1 write in registers, otherwise 2 reads and 1 write, the second read starting in L2;
         backward 4 reads and 1 write
numerics two-pass variance on registers; shifted sums in fp32 (fp64 for fp64) combined by Chan's formula otherwise
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _channels
from ._toolbox import SPECIMEN_TYPES, Specimen, accumulate_dtype, cdiv, multiprocessors, power_of_two, rsqrt, warps

ROW_LIMIT = 16384


@triton.jit(do_not_specialize=["SETS"])
def group_norm_fwd_kernel(
    x, weight, bias, y, mean, rstd, var, SETS, G, D, S,
    ONE_CHANNEL: tl.constexpr, EPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Whole groups in registers: a group of [N, C, S] is a row of D * S elements."""
    acc_t: tl.constexpr = mean.dtype.element_ty
    L = D * S
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_L)
    valid = (row < SETS)[:, None] & (col < L)[None, :]
    at = row[:, None] * L + col[None, :]
    v = tl.load(x + at, mask=valid, other=0.0).to(acc_t)
    first = tl.load(x + row * L, mask=row < SETS, other=0.0).to(acc_t)
    mu = first + tl.sum(tl.where(valid, v - first[:, None], 0.0), 1) / L
    d = tl.where(valid, v - mu[:, None], 0.0)
    variance = tl.sum(d * d, 1) / L
    r = rsqrt(variance + EPS)
    tl.store(mean + row, mu, mask=row < SETS)
    tl.store(rstd + row, r, mask=row < SETS)
    tl.store(var + row, variance, mask=row < SETS)
    out = d * r[:, None]
    # The channel: one per row for instance norm (ONE_CHANNEL), which saves a division per element.
    if ONE_CHANNEL:
        c = (row % G)[:, None]
        known = (row < SETS)[:, None]
    else:
        c = ((row % G) * D)[:, None] + (col // S)[None, :]
        known = valid
    if weight is not None:
        out *= tl.load(weight + c, mask=known, other=0.0).to(acc_t)
    if bias is not None:
        out += tl.load(bias + c, mask=known, other=0.0).to(acc_t)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=valid)


def group_norm_fwd(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    groups: int,
    eps: float,
    channels_last: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    n, c, s = _channels.sizes(x, channels_last)
    length = c // groups * s
    sms = multiprocessors(x)
    limit = ROW_LIMIT // 2 if x.dtype == torch.float64 else ROW_LIMIT
    if channels_last or x.numel() == 0 or length > limit or (n * groups < sms // 2 and length > 4096):
        mean, rstd, var = _channels.statistics(x, n, c, s, groups, True, eps, channels_last)
        y = _channels.normalize(x, weight, bias, mean, rstd, n, c, s, groups, True, channels_last)
        return y, mean.view(n, groups), rstd.view(n, groups), var.view(n, groups)
    y = torch.empty_like(x)
    mean = torch.empty((n, groups), dtype=accumulate_dtype(x.dtype), device=x.device)
    rstd = torch.empty_like(mean)
    var = torch.empty_like(mean)
    sets = n * groups
    block_l = power_of_two(length)
    block_m = max(min(2048 // block_l, power_of_two(cdiv(sets, sms))), 1)
    group_norm_fwd_kernel[(cdiv(sets, block_m),)](
        x, weight, bias, y, mean, rstd, var, sets, groups, c // groups, s,
        ONE_CHANNEL=groups == c, EPS=eps, BLOCK_M=block_m, BLOCK_L=block_l, num_warps=warps(block_m * block_l),
    )  # fmt: skip
    return y, mean, rstd, var


def group_norm_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    groups: int,
    channels_last: bool,
    need_dx: bool,
    need_dw: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    n, c, s = _channels.sizes(x, channels_last)
    return _channels.backward(
        dy, x, weight, mean, rstd, n, c, s, groups, True, False, channels_last, need_dx, need_dw
    )  # fmt: skip


def specimens() -> list[Specimen]:
    """What tests/triton_compile.py compiles, beside the kernels of _channels.py."""
    found = []
    for t, a in SPECIMEN_TYPES:
        types = dict.fromkeys(("x", "weight", "bias", "y"), f"*{t}") | dict.fromkeys(("mean", "rstd", "var"), f"*{a}")
        sizes = dict.fromkeys(("SETS", "G", "D", "S"), "i32")
        for one, block_m, block_l in ((False, 16, 128), (False, 1, 8192 if t == "fp64" else 16384), (True, 1, 4096)):
            shape = {"ONE_CHANNEL": one, "EPS": 1e-5, "BLOCK_M": block_m, "BLOCK_L": block_l}
            found.append(Specimen(group_norm_fwd_kernel, types | sizes, shape, warps(block_m * block_l)))
    return found
