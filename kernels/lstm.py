"""lstm · Triton
  i, f, o = sigmoid, g = tanh of the four gates;  c' = f c + i g,  h' = o tanh(c')
layout   gates: [B, 4, H] in the order i f g o · c, h', c': [B, H]
mapping  a program takes BLOCK hidden units of [B, H]
memory   every input read once, every output written once; backward computes the gates again from their inputs
numerics in fp32 (fp64 for fp64)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._recurrent import BLOCK, lstm_backward, lstm_forward
from ._toolbox import SPECIMEN_TYPES, Specimen, cdiv


@triton.jit
def lstm_gates_fwd_kernel(gates, c, next_h, next_c, total, H, BLOCK: tl.constexpr):
    acc_t: tl.constexpr = tl.float64 if c.dtype.element_ty == tl.float64 else tl.float32
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < total
    first = gates + at // H * 4 * H + at % H
    a_i = tl.load(first, mask=live, other=0.0).to(acc_t)
    a_f = tl.load(first + H, mask=live, other=0.0).to(acc_t)
    a_g = tl.load(first + 2 * H, mask=live, other=0.0).to(acc_t)
    a_o = tl.load(first + 3 * H, mask=live, other=0.0).to(acc_t)
    before = tl.load(c + at, mask=live, other=0.0).to(acc_t)
    y, now, _, _, _, _ = lstm_forward(a_i, a_f, a_g, a_o, before)
    tl.store(next_h + at, y.to(next_h.dtype.element_ty), mask=live)
    tl.store(next_c + at, now.to(next_c.dtype.element_ty), mask=live)


@triton.jit
def lstm_gates_bwd_kernel(dh, dc, gates, c, dgates, dstate, total, H, BLOCK: tl.constexpr):
    acc_t: tl.constexpr = tl.float64 if c.dtype.element_ty == tl.float64 else tl.float32
    out_t: tl.constexpr = c.dtype.element_ty
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < total
    offset = at // H * 4 * H + at % H
    first = gates + offset
    a_i = tl.load(first, mask=live, other=0.0).to(acc_t)
    a_f = tl.load(first + H, mask=live, other=0.0).to(acc_t)
    a_g = tl.load(first + 2 * H, mask=live, other=0.0).to(acc_t)
    a_o = tl.load(first + 3 * H, mask=live, other=0.0).to(acc_t)
    before = tl.load(c + at, mask=live, other=0.0).to(acc_t)
    gh = tl.zeros((BLOCK,), acc_t)
    gc = tl.zeros((BLOCK,), acc_t)
    if dh is not None:
        gh = tl.load(dh + at, mask=live, other=0.0).to(acc_t)
    if dc is not None:
        gc = tl.load(dc + at, mask=live, other=0.0).to(acc_t)
    _, _, i, f, g, o = lstm_forward(a_i, a_f, a_g, a_o, before)
    di, df, dg, do, gc = lstm_backward(gh, gc, i, f, g, o, before)
    to = dgates + offset
    tl.store(to, di.to(out_t), mask=live)
    tl.store(to + H, df.to(out_t), mask=live)
    tl.store(to + 2 * H, dg.to(out_t), mask=live)
    tl.store(to + 3 * H, do.to(out_t), mask=live)
    tl.store(dstate + at, gc.to(out_t), mask=live)


def lstm_gates_fwd(gates: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    h, next_c = torch.empty_like(c), torch.empty_like(c)
    if n := c.numel():
        lstm_gates_fwd_kernel[(cdiv(n, BLOCK),)](gates, c, h, next_c, n, c.shape[1], BLOCK=BLOCK)
    return h, next_c


def lstm_gates_bwd(
    dh: torch.Tensor | None, dc: torch.Tensor | None, gates: torch.Tensor, c: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    dgates, dstate = torch.empty_like(gates), torch.empty_like(c)
    if n := c.numel():
        lstm_gates_bwd_kernel[(cdiv(n, BLOCK),)](dh, dc, gates, c, dgates, dstate, n, c.shape[1], BLOCK=BLOCK)
    return dgates, dstate


def specimens() -> list[Specimen]:
    """What tests/triton_compile.py compiles: every kernel in every type."""
    found = []
    for t, _ in SPECIMEN_TYPES:
        sizes, hot = {"total": "i32", "H": "i32"}, t != "fp64"
        forward = dict.fromkeys(("gates", "c", "next_h", "next_c"), f"*{t}") | sizes
        backward = dict.fromkeys(("dh", "dc", "gates", "c", "dgates", "dstate"), f"*{t}") | sizes
        found.append(Specimen(lstm_gates_fwd_kernel, forward, {"BLOCK": BLOCK}, 4, hot))
        found.append(Specimen(lstm_gates_bwd_kernel, backward, {"BLOCK": BLOCK}, 4, hot))
    return found
