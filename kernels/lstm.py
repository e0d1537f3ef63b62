"""lstm · Triton
  i, f, o = sigmoid, g = tanh of the four gates;  c' = f c + i g,  h' = o tanh(c')
layout   gates: [B, 4, H] in the order i f g o · c, h', c': [B, H] · layer: csrc/common/recurrent.h
mapping  a program takes BLOCK hidden units of [B, H]
memory   every input read once, every output written once; backward computes the gates again from their inputs
numerics in fp32 (fp64 for fp64)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._recurrent import BLOCK, Steps, lstm_backward, lstm_forward, product, product_specimens
from ._toolbox import SPECIMEN_TYPES, Specimen, accumulate_dtype, cdiv


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


@triton.jit
def lstm_step_fwd_kernel(x, product, c, h, saved, cells, total, H, STRIDE, BLOCK: tl.constexpr):
    """A step of a sequence: x, saved and cells are rows of it, STRIDE hidden units apart; c is updated in place."""
    acc_t: tl.constexpr = c.dtype.element_ty
    out_t: tl.constexpr = h.dtype.element_ty
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < total
    row, unit = at // H, at % H
    gate, part = row * 4 * STRIDE + unit, row * 4 * H + unit
    a_i = tl.load(x + gate, mask=live, other=0.0).to(acc_t) + tl.load(product + part, mask=live, other=0.0).to(acc_t)
    a_f = tl.load(x + gate + H, mask=live, other=0.0).to(acc_t)
    a_f += tl.load(product + part + H, mask=live, other=0.0).to(acc_t)
    a_g = tl.load(x + gate + 2 * H, mask=live, other=0.0).to(acc_t)
    a_g += tl.load(product + part + 2 * H, mask=live, other=0.0).to(acc_t)
    a_o = tl.load(x + gate + 3 * H, mask=live, other=0.0).to(acc_t)
    a_o += tl.load(product + part + 3 * H, mask=live, other=0.0).to(acc_t)
    y, now, i, f, g, o = lstm_forward(a_i, a_f, a_g, a_o, tl.load(c + at, mask=live, other=0.0))
    tl.store(c + at, now, mask=live)
    tl.store(h + at, y.to(out_t), mask=live)
    if saved is not None:
        tl.store(saved + gate, i.to(out_t), mask=live)
        tl.store(saved + gate + H, f.to(out_t), mask=live)
        tl.store(saved + gate + 2 * H, g.to(out_t), mask=live)
        tl.store(saved + gate + 3 * H, o.to(out_t), mask=live)
        tl.store(cells + row * STRIDE + unit, now.to(out_t), mask=live)


@triton.jit
def lstm_step_bwd_kernel(dh, dc, saved, c_before, dgates, total, H, STRIDE, BLOCK: tl.constexpr):
    """The same backwards: saved and dgates are rows of a sequence; dc is updated in place."""
    acc_t: tl.constexpr = dc.dtype.element_ty
    out_t: tl.constexpr = dgates.dtype.element_ty
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < total
    gate = at // H * 4 * STRIDE + at % H
    i = tl.load(saved + gate, mask=live, other=0.0).to(acc_t)
    f = tl.load(saved + gate + H, mask=live, other=0.0).to(acc_t)
    g = tl.load(saved + gate + 2 * H, mask=live, other=0.0).to(acc_t)
    o = tl.load(saved + gate + 3 * H, mask=live, other=0.0).to(acc_t)
    before = tl.load(c_before + at, mask=live, other=0.0).to(acc_t)
    gh, gc = tl.load(dh + at, mask=live, other=0.0).to(acc_t), tl.load(dc + at, mask=live, other=0.0)
    di, df, dg, do, gc = lstm_backward(gh, gc, i, f, g, o, before)
    tl.store(dgates + gate, di.to(out_t), mask=live)
    tl.store(dgates + gate + H, df.to(out_t), mask=live)
    tl.store(dgates + gate + 2 * H, dg.to(out_t), mask=live)
    tl.store(dgates + gate + 3 * H, do.to(out_t), mask=live)
    tl.store(dc + at, gc, mask=live)


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


def lstm_layer_fwd(
    gates: torch.Tensor,
    h0: torch.Tensor,
    c0: torch.Tensor,
    w_hh: torch.Tensor,
    w_hr: torch.Tensor | None,
    starts: torch.Tensor | None,
    keep: bool,
) -> tuple[torch.Tensor, ...]:
    """Step by step: the recurrent product, then one kernel for all else."""
    (n, directions, _), (_, batch, size), hidden = gates.shape, h0.shape, c0.shape[2]
    y, h_n, c = gates.new_empty(n, directions, size), h0.clone(), c0.to(accumulate_dtype(c0.dtype), copy=True)
    saved = gates.new_empty(gates.shape if keep else 0)
    cells = gates.new_empty((n, directions, hidden) if keep else 0)
    steps = Steps(n, batch, starts)
    for d in range(directions):
        for t in steps.in_order(d):
            rows = steps.rows(t)
            count = rows.stop - rows.start
            h = h_n[d, :count]
            sums = product(h, w_hh[d])
            m = h if w_hr is None else h.new_empty(count, hidden)
            total, stride = count * hidden, directions * hidden
            lstm_step_fwd_kernel[(cdiv(total, BLOCK),)](
                gates[rows, d], sums, c[d], m, saved[rows, d] if keep else None, cells[rows, d] if keep else None,
                total, hidden, stride, BLOCK=BLOCK,
            )  # fmt: skip
            if w_hr is not None:
                h.copy_(product(m, w_hr[d]))
            y[rows, d] = h
    return y, h_n, c.to(c0.dtype, copy=True), saved, cells


def lstm_layer_bwd(
    dy: torch.Tensor | None,
    dh_n: torch.Tensor | None,
    dc_n: torch.Tensor | None,
    h0: torch.Tensor,
    c0: torch.Tensor,
    w_hh: torch.Tensor,
    w_hr: torch.Tensor | None,
    starts: torch.Tensor | None,
    saved: torch.Tensor,
    cells: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    (n, directions, _), (_, batch, size), hidden = saved.shape, h0.shape, c0.shape[2]
    wide = accumulate_dtype(c0.dtype)
    dgates = torch.empty_like(saved)
    dh0 = torch.zeros_like(h0, dtype=wide) if dh_n is None else dh_n.to(wide, copy=True)
    dc = torch.zeros_like(c0, dtype=wide) if dc_n is None else dc_n.to(wide, copy=True)
    dh = saved.new_empty((n, directions, size) if w_hr is not None else 0)
    steps = Steps(n, batch, starts)
    for d in range(directions):
        for t in steps.in_order(1 - d):
            rows = steps.rows(t)
            count = rows.stop - rows.start
            g = dh0[d, :count]
            if dy is not None:
                g += dy[rows, d]
            total, stride = count * hidden, directions * hidden
            if w_hr is not None:
                dh[rows, d] = g
            dm = g if w_hr is None else product(g.to(h0.dtype), w_hr[d].mT)
            lstm_step_bwd_kernel[(cdiv(total, BLOCK),)](
                dm, dc[d], saved[rows, d], steps.before(cells, c0, d, t),
                dgates[rows, d], total, hidden, stride, BLOCK=BLOCK,
            )  # fmt: skip
            g.copy_(product(dgates[rows, d], w_hh[d].mT))
    return dgates, dh0.to(h0.dtype, copy=True), dc.to(c0.dtype, copy=True), dh


def specimens() -> list[Specimen]:
    """What tests/triton_compile.py compiles: every kernel in every type."""
    found = product_specimens()
    for t, a in SPECIMEN_TYPES:
        sizes, hot = {"total": "i32", "H": "i32"}, t != "fp64"
        of_sequence = sizes | {"STRIDE": "i32"}
        step = dict.fromkeys(("x", "h", "saved", "cells"), f"*{t}") | {"product": f"*{a}", "c": f"*{a}"} | of_sequence
        found.append(Specimen(lstm_step_fwd_kernel, step, {"BLOCK": BLOCK}, 4, hot))
        step = dict.fromkeys(("saved", "c_before", "dgates"), f"*{t}") | {"dh": f"*{a}", "dc": f"*{a}"} | of_sequence
        found.append(Specimen(lstm_step_bwd_kernel, step, {"BLOCK": BLOCK}, 4, hot))
        forward = dict.fromkeys(("gates", "c", "next_h", "next_c"), f"*{t}") | sizes
        backward = dict.fromkeys(("dh", "dc", "gates", "c", "dgates", "dstate"), f"*{t}") | sizes
        found.append(Specimen(lstm_gates_fwd_kernel, forward, {"BLOCK": BLOCK}, 4, hot))
        found.append(Specimen(lstm_gates_bwd_kernel, backward, {"BLOCK": BLOCK}, 4, hot))
    return found
