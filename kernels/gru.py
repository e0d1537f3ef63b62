"""gru · Triton
  r, z = sigmoid(x + y),  n = tanh(x_n + r y_n);  h' = (1 - z) n + z h,  x and y the gates from input and hidden state
layout   x_gates, h_gates: [B, 3, H] in the order r z n · h, h': [B, H] · layer: csrc/common/recurrent.h
mapping  a program takes BLOCK hidden units of [B, H]
memory   every input read once, every output written once; backward computes the gates again from their inputs
numerics in fp32 (fp64 for fp64)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._recurrent import BLOCK, Steps, gru_backward, gru_forward, product, product_specimens
from ._toolbox import SPECIMEN_TYPES, Specimen, accumulate_dtype, cdiv


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


@triton.jit
def gru_step_fwd_kernel(x, product, b_n, h, y, saved, total, H, STRIDE, BLOCK: tl.constexpr):
    """A step of a sequence: x and saved are rows of it, STRIDE hidden units apart."""
    acc_t: tl.constexpr = tl.float64 if h.dtype.element_ty == tl.float64 else tl.float32
    out_t: tl.constexpr = h.dtype.element_ty
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < total
    row, unit = at // H, at % H
    gate, part, keep = row * 3 * STRIDE + unit, row * 3 * H + unit, row * 4 * STRIDE + unit
    xr = tl.load(x + gate, mask=live, other=0.0).to(acc_t)
    xz = tl.load(x + gate + H, mask=live, other=0.0).to(acc_t)
    xn = tl.load(x + gate + 2 * H, mask=live, other=0.0).to(acc_t)
    hr = tl.load(product + part, mask=live, other=0.0).to(acc_t)
    hz = tl.load(product + part + H, mask=live, other=0.0).to(acc_t)
    hn = tl.load(product + part + 2 * H, mask=live, other=0.0).to(acc_t)
    if b_n is not None:
        hn += tl.load(b_n + unit, mask=live, other=0.0).to(acc_t)
    before = tl.load(h + at, mask=live, other=0.0).to(acc_t)
    now, r, z, n = gru_forward(xr, xz, xn, hr, hz, hn, before)
    tl.store(y + at, now.to(out_t), mask=live)
    if saved is not None:
        tl.store(saved + keep, r.to(out_t), mask=live)
        tl.store(saved + keep + H, z.to(out_t), mask=live)
        tl.store(saved + keep + 2 * H, n.to(out_t), mask=live)
        tl.store(saved + keep + 3 * H, hn.to(out_t), mask=live)


@triton.jit
def gru_step_bwd_kernel(dh, saved, h_before, dgates, dh_gates, direct, total, H, STRIDE, BLOCK: tl.constexpr):
    """The same backwards; `direct` is the part of dh that does not pass through the product."""
    acc_t: tl.constexpr = dh.dtype.element_ty
    out_t: tl.constexpr = dgates.dtype.element_ty
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < total
    gate, keep = at // H * 3 * STRIDE + at % H, at // H * 4 * STRIDE + at % H
    r = tl.load(saved + keep, mask=live, other=0.0).to(acc_t)
    z = tl.load(saved + keep + H, mask=live, other=0.0).to(acc_t)
    n = tl.load(saved + keep + 2 * H, mask=live, other=0.0).to(acc_t)
    hn = tl.load(saved + keep + 3 * H, mask=live, other=0.0).to(acc_t)
    before = tl.load(h_before + at, mask=live, other=0.0).to(acc_t)
    g = tl.load(dh + at, mask=live, other=0.0).to(acc_t)
    dr, dz, dn, dhn, passed = gru_backward(g, r, z, n, hn, before)
    tl.store(dgates + gate, dr.to(out_t), mask=live)
    tl.store(dgates + gate + H, dz.to(out_t), mask=live)
    tl.store(dgates + gate + 2 * H, dn.to(out_t), mask=live)
    tl.store(dh_gates + gate, dr.to(out_t), mask=live)
    tl.store(dh_gates + gate + H, dz.to(out_t), mask=live)
    tl.store(dh_gates + gate + 2 * H, dhn.to(out_t), mask=live)
    tl.store(direct + at, passed, mask=live)


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


def gru_layer_fwd(
    gates: torch.Tensor,
    h0: torch.Tensor,
    w_hh: torch.Tensor,
    b_n: torch.Tensor | None,
    starts: torch.Tensor | None,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Step by step: the recurrent product, then one kernel for all else."""
    (n, directions, _), (_, batch, hidden) = gates.shape, h0.shape
    y, h_n = gates.new_empty(n, directions, hidden), h0.clone()
    saved = gates.new_empty((n, directions, 4 * hidden) if keep else 0)
    steps = Steps(n, batch, starts)
    for d in range(directions):
        for t in steps.in_order(d):
            rows = steps.rows(t)
            h = h_n[d, : rows.stop - rows.start]
            sums, total, stride = product(h, w_hh[d]), h.numel(), directions * hidden
            gru_step_fwd_kernel[(cdiv(total, BLOCK),)](
                gates[rows, d], sums, None if b_n is None else b_n[d], h, h, saved[rows, d] if keep else None,
                total, hidden, stride, BLOCK=BLOCK,
            )  # fmt: skip
            y[rows, d] = h
    return y, h_n, saved


def gru_layer_bwd(
    dy: torch.Tensor | None,
    dh_n: torch.Tensor | None,
    h0: torch.Tensor,
    w_hh: torch.Tensor,
    starts: torch.Tensor | None,
    y: torch.Tensor,
    saved: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    (n, directions, _), (_, batch, hidden) = saved.shape, h0.shape
    dgates = saved.new_empty(n, directions, 3 * hidden)
    wide, dh_gates = accumulate_dtype(h0.dtype), torch.empty_like(dgates)
    dh0 = torch.zeros_like(h0, dtype=wide) if dh_n is None else dh_n.to(wide, copy=True)
    steps = Steps(n, batch, starts)
    for d in range(directions):
        for t in steps.in_order(1 - d):
            rows = steps.rows(t)
            g = dh0[d, : rows.stop - rows.start]
            if dy is not None:
                g += dy[rows, d]
            gru_step_bwd_kernel[(cdiv(g.numel(), BLOCK),)](
                g, saved[rows, d], steps.before(y, h0, d, t), dgates[rows, d], dh_gates[rows, d], g,
                g.numel(), hidden, directions * hidden, BLOCK=BLOCK,
            )  # fmt: skip
            g += product(dh_gates[rows, d], w_hh[d].mT)
    return dgates, dh_gates, dh0.to(h0.dtype, copy=True)


def specimens() -> list[Specimen]:
    """What tests/triton_compile.py compiles: every kernel in every type."""
    found = product_specimens()
    for t, a in SPECIMEN_TYPES:
        sizes, hot = {"total": "i32", "H": "i32"}, t != "fp64"
        of_sequence = sizes | {"STRIDE": "i32"}
        step = dict.fromkeys(("x", "b_n", "h", "y", "saved"), f"*{t}") | {"product": f"*{a}"} | of_sequence
        found.append(Specimen(gru_step_fwd_kernel, step, {"BLOCK": BLOCK}, 4, hot))
        step = (
            dict.fromkeys(("saved", "h_before", "dgates", "dh_gates"), f"*{t}")
            | {"dh": f"*{a}", "direct": f"*{a}"}
            | of_sequence
        )
        found.append(Specimen(gru_step_bwd_kernel, step, {"BLOCK": BLOCK}, 4, hot))
        forward = dict.fromkeys(("x_gates", "h_gates", "h", "y"), f"*{t}") | sizes
        names = ("dy", "x_gates", "h_gates", "h", "dx_gates", "dh_gates", "dh")
        found.append(Specimen(gru_gates_fwd_kernel, forward, {"BLOCK": BLOCK}, 4, hot))
        found.append(Specimen(gru_gates_bwd_kernel, dict.fromkeys(names, f"*{t}") | sizes, {"BLOCK": BLOCK}, 4, hot))
    return found
