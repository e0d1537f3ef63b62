"""gru · Triton
  r, z = sigmoid(x + y),  n = tanh(x_n + r y_n);  h' = (1 - z) n + z h,  x and y the gates from input and hidden state
layout   x_gates, h_gates: [B, 3, H] in the order r z n · h, h': [B, H]
mapping  a program takes BLOCK hidden units of [B, H]
memory   every input read once, every output written once; backward computes the gates again from their inputs
numerics in fp32 (fp64 for fp64)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._recurrent import BLOCK, gru_backward, gru_forward
from ._toolbox import SPECIMEN_TYPES, Specimen, cdiv


@triton.jit
def gru_gates_fwd_kernel(x_gates, h_gates, h, y, total, H, BLOCK: tl.constexpr):
    acc_t: tl.constexpr = tl.float64 if h.dtype.element_ty == tl.float64 else tl.float32
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < total
    offset = at // H * 3 * H + at % H
    xr = tl.load(x_gates + offset, mask=live, other=0.0).to(acc_t)
    xz = tl.load(x_gates + offset + H, mask=live, other=0.0).to(acc_t)
    xn = tl.load(x_gates + offset + 2 * H, mask=live, other=0.0).to(acc_t)
    hr = tl.load(h_gates + offset, mask=live, other=0.0).to(acc_t)
    hz = tl.load(h_gates + offset + H, mask=live, other=0.0).to(acc_t)
    hn = tl.load(h_gates + offset + 2 * H, mask=live, other=0.0).to(acc_t)
    before = tl.load(h + at, mask=live, other=0.0).to(acc_t)
    now, _, _, _ = gru_forward(xr, xz, xn, hr, hz, hn, before)
    tl.store(y + at, now.to(y.dtype.element_ty), mask=live)


@triton.jit
def gru_gates_bwd_kernel(dy, x_gates, h_gates, h, dx_gates, dh_gates, dh, total, H, BLOCK: tl.constexpr):
    acc_t: tl.constexpr = tl.float64 if h.dtype.element_ty == tl.float64 else tl.float32
    out_t: tl.constexpr = h.dtype.element_ty
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < total
    offset = at // H * 3 * H + at % H
    xr = tl.load(x_gates + offset, mask=live, other=0.0).to(acc_t)
    xz = tl.load(x_gates + offset + H, mask=live, other=0.0).to(acc_t)
    xn = tl.load(x_gates + offset + 2 * H, mask=live, other=0.0).to(acc_t)
    hr = tl.load(h_gates + offset, mask=live, other=0.0).to(acc_t)
    hz = tl.load(h_gates + offset + H, mask=live, other=0.0).to(acc_t)
    hn = tl.load(h_gates + offset + 2 * H, mask=live, other=0.0).to(acc_t)
    before = tl.load(h + at, mask=live, other=0.0).to(acc_t)
    _, r, z, n = gru_forward(xr, xz, xn, hr, hz, hn, before)
    g = tl.load(dy + at, mask=live, other=0.0).to(acc_t)
    dr, dz, dn, dhn, direct = gru_backward(g, r, z, n, hn, before)
    tl.store(dx_gates + offset, dr.to(out_t), mask=live)
    tl.store(dx_gates + offset + H, dz.to(out_t), mask=live)
    tl.store(dx_gates + offset + 2 * H, dn.to(out_t), mask=live)
    tl.store(dh_gates + offset, dr.to(out_t), mask=live)
    tl.store(dh_gates + offset + H, dz.to(out_t), mask=live)
    tl.store(dh_gates + offset + 2 * H, dhn.to(out_t), mask=live)
    tl.store(dh + at, direct.to(out_t), mask=live)


def gru_gates_fwd(x_gates: torch.Tensor, h_gates: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(h)
    if n := h.numel():
        gru_gates_fwd_kernel[(cdiv(n, BLOCK),)](x_gates, h_gates, h, y, n, h.shape[1], BLOCK=BLOCK)
    return y


def gru_gates_bwd(
    dy: torch.Tensor, x_gates: torch.Tensor, h_gates: torch.Tensor, h: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dx, dg, dh = torch.empty_like(x_gates), torch.empty_like(h_gates), torch.empty_like(h)
    if n := h.numel():
        gru_gates_bwd_kernel[(cdiv(n, BLOCK),)](dy, x_gates, h_gates, h, dx, dg, dh, n, h.shape[1], BLOCK=BLOCK)
    return dx, dg, dh


def specimens() -> list[Specimen]:
    """What tests/triton_compile.py compiles: every kernel in every type."""
    found = []
    for t, _ in SPECIMEN_TYPES:
        sizes, hot = {"total": "i32", "H": "i32"}, t != "fp64"
        forward = dict.fromkeys(("x_gates", "h_gates", "h", "y"), f"*{t}") | sizes
        names = ("dy", "x_gates", "h_gates", "h", "dx_gates", "dh_gates", "dh")
        found.append(Specimen(gru_gates_fwd_kernel, forward, {"BLOCK": BLOCK}, 4, hot))
        found.append(Specimen(gru_gates_bwd_kernel, dict.fromkeys(names, f"*{t}") | sizes, {"BLOCK": BLOCK}, 4, hot))
    return found
