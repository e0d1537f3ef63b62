"""rnn · Triton
  h' = tanh(gates) or max(gates, 0);  dgates = dh (1 - h'²) or dh where gates > 0
layout   gates, h', dh: [B, H] · layer: csrc/common/recurrent.h
mapping  a program takes BLOCK hidden units of [B, H]
memory   every input read once, every output written once; backward computes h' again from gates
numerics in fp32 (fp64 for fp64)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._recurrent import BLOCK, Steps, product, product_specimens, rnn_backward, rnn_forward
from ._toolbox import SPECIMEN_TYPES, Specimen, accumulate_dtype, cdiv


@triton.jit
def rnn_gates_fwd_kernel(gates, h, total, RELU: tl.constexpr, BLOCK: tl.constexpr):
    acc_t: tl.constexpr = tl.float64 if h.dtype.element_ty == tl.float64 else tl.float32
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(gates + at, mask=at < total, other=0.0).to(acc_t)
    tl.store(h + at, rnn_forward(x, RELU).to(h.dtype.element_ty), mask=at < total)


@triton.jit
def rnn_gates_bwd_kernel(dh, gates, dgates, total, RELU: tl.constexpr, BLOCK: tl.constexpr):
    acc_t: tl.constexpr = tl.float64 if gates.dtype.element_ty == tl.float64 else tl.float32
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(dh + at, mask=at < total, other=0.0).to(acc_t)
    y = rnn_forward(tl.load(gates + at, mask=at < total, other=0.0).to(acc_t), RELU)
    tl.store(dgates + at, rnn_backward(g, y, RELU).to(gates.dtype.element_ty), mask=at < total)


@triton.jit
def rnn_step_fwd_kernel(x, product, h, total, H, STRIDE, RELU: tl.constexpr, BLOCK: tl.constexpr):
    """A step of a sequence: x is rows of it, STRIDE hidden units apart."""
    acc_t: tl.constexpr = tl.float64 if h.dtype.element_ty == tl.float64 else tl.float32
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < total
    a = tl.load(x + at // H * STRIDE + at % H, mask=live, other=0.0).to(acc_t)
    a += tl.load(product + at, mask=live, other=0.0).to(acc_t)
    tl.store(h + at, rnn_forward(a, RELU).to(h.dtype.element_ty), mask=live)


@triton.jit
def rnn_step_bwd_kernel(dh, y, dgates, total, H, STRIDE, RELU: tl.constexpr, BLOCK: tl.constexpr):
    """The same backwards; y and dgates are rows of a sequence."""
    acc_t: tl.constexpr = dh.dtype.element_ty
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < total
    place = at // H * STRIDE + at % H
    g = tl.load(dh + at, mask=live, other=0.0).to(acc_t)
    h = tl.load(y + place, mask=live, other=0.0).to(acc_t)
    tl.store(dgates + place, rnn_backward(g, h, RELU).to(dgates.dtype.element_ty), mask=live)


def rnn_gates_fwd(gates: torch.Tensor, relu: bool) -> torch.Tensor:
    h = torch.empty_like(gates)
    if n := h.numel():
        rnn_gates_fwd_kernel[(cdiv(n, BLOCK),)](gates, h, n, RELU=relu, BLOCK=BLOCK)
    return h


def rnn_gates_bwd(dh: torch.Tensor, gates: torch.Tensor, relu: bool) -> torch.Tensor:
    dgates = torch.empty_like(gates)
    if n := gates.numel():
        rnn_gates_bwd_kernel[(cdiv(n, BLOCK),)](dh, gates, dgates, n, RELU=relu, BLOCK=BLOCK)
    return dgates


def rnn_layer_fwd(
    gates: torch.Tensor, h0: torch.Tensor, w_hh: torch.Tensor, starts: torch.Tensor | None, relu: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Step by step: the recurrent product, then one kernel for all else."""
    (n, directions, hidden), batch = gates.shape, h0.shape[1]
    y, h_n, steps = torch.empty_like(gates), h0.clone(), Steps(n, batch, starts)
    for d in range(directions):
        for t in steps.in_order(d):
            rows = steps.rows(t)
            h = h_n[d, : rows.stop - rows.start]
            sums = product(h, w_hh[d])
            rnn_step_fwd_kernel[(cdiv(h.numel(), BLOCK),)](
                gates[rows, d], sums, h, h.numel(), hidden, directions * hidden, RELU=relu, BLOCK=BLOCK
            )
            y[rows, d] = h
    return y, h_n


def rnn_layer_bwd(
    dy: torch.Tensor | None,
    dh_n: torch.Tensor | None,
    h0: torch.Tensor,
    w_hh: torch.Tensor,
    starts: torch.Tensor | None,
    y: torch.Tensor,
    relu: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    (n, directions, hidden), batch = y.shape, h0.shape[1]
    dgates, wide = torch.empty_like(y), accumulate_dtype(y.dtype)
    dh0 = torch.zeros_like(h0, dtype=wide) if dh_n is None else dh_n.to(wide, copy=True)
    steps = Steps(n, batch, starts)
    for d in range(directions):
        for t in steps.in_order(1 - d):
            rows = steps.rows(t)
            g = dh0[d, : rows.stop - rows.start]
            if dy is not None:
                g += dy[rows, d]
            rnn_step_bwd_kernel[(cdiv(g.numel(), BLOCK),)](
                g, y[rows, d], dgates[rows, d], g.numel(), hidden, directions * hidden, RELU=relu, BLOCK=BLOCK
            )
            g.copy_(product(dgates[rows, d], w_hh[d].mT))
    return dgates, dh0.to(h0.dtype, copy=True)


def specimens() -> list[Specimen]:
    """What tests/triton_compile.py compiles: every kernel in every type."""
    found = product_specimens()
    for t, a in SPECIMEN_TYPES:
        for relu in (False, True):
            constants, hot = {"RELU": relu, "BLOCK": BLOCK}, t != "fp64"
            of_sequence = dict.fromkeys(("total", "H", "STRIDE"), "i32")
            step = dict.fromkeys(("x", "h"), f"*{t}") | {"product": f"*{a}"} | of_sequence
            found.append(Specimen(rnn_step_fwd_kernel, step, constants, 4, hot))
            step = dict.fromkeys(("y", "dgates"), f"*{t}") | {"dh": f"*{a}"} | of_sequence
            found.append(Specimen(rnn_step_bwd_kernel, step, constants, 4, hot))
            forward = dict.fromkeys(("gates", "h"), f"*{t}") | {"total": "i32"}
            backward = dict.fromkeys(("dh", "gates", "dgates"), f"*{t}") | {"total": "i32"}
            found.append(Specimen(rnn_gates_fwd_kernel, forward, constants, 4, hot))
            found.append(Specimen(rnn_gates_bwd_kernel, backward, constants, 4, hot))
    return found
