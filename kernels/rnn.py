"""rnn · Triton
  h' = tanh(gates) or max(gates, 0);  dgates = dh (1 - h'²) or dh where gates > 0
layout   gates, h', dh: [B, H]
mapping  a program takes BLOCK hidden units of [B, H]
memory   every input read once, every output written once; backward computes h' again from gates
numerics in fp32 (fp64 for fp64)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._recurrent import BLOCK, rnn_backward, rnn_forward
from ._toolbox import SPECIMEN_TYPES, Specimen, cdiv


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


def specimens() -> list[Specimen]:
    """What tests/triton_compile.py compiles: every kernel in every type."""
    found = []
    for t, _ in SPECIMEN_TYPES:
        for relu in (False, True):
            constants, hot = {"RELU": relu, "BLOCK": BLOCK}, t != "fp64"
            forward = dict.fromkeys(("gates", "h"), f"*{t}") | {"total": "i32"}
            backward = dict.fromkeys(("dh", "gates", "dgates"), f"*{t}") | {"total": "i32"}
            found.append(Specimen(rnn_gates_fwd_kernel, forward, constants, 4, hot))
            found.append(Specimen(rnn_gates_bwd_kernel, backward, constants, 4, hot))
    return found
