"""Gated recurrent unit.

    r = sigmoid(x W_ir' + b_ir + h W_hr' + b_hr)        z: likewise
    n = tanh(x W_in' + b_in + r * (h W_hn' + b_hn))     h' = (1 - z) * n + z * h

    x: [B, I]   h, h': [B, H]   W_ih: [3 H, I], W_hh: [3 H, H], b: [3 H], the gates in the order r z n

Source: Cho et al. 2014, https://arxiv.org/abs/1406.1078, with the reset gate after the product; torch.nn.GRU and
GRUCell. The gradient is derived in docs/math/recurrent.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import backend, library, recurrent
from ..core.autograd import Formula, differentiable
from ..core.intercept import route
from ..core.samples import Maker, Sample, checked

_kernels = library.triton_kernels("gru")

_gates_fwd = library.declare(
    "gru_gates_fwd(Tensor x_gates, Tensor h_gates, Tensor h) -> Tensor",
    lambda x_gates, h_gates, h: torch.empty_like(h),
    _kernels,
)
_gates_bwd = library.declare(
    "gru_gates_bwd(Tensor dy, Tensor x_gates, Tensor h_gates, Tensor h) -> (Tensor, Tensor, Tensor)",
    lambda dy, x_gates, h_gates, h: (torch.empty_like(x_gates), torch.empty_like(h_gates), torch.empty_like(h)),
    _kernels,
)


def _gates_reference(x_gates, h_gates, h):
    xr, xz, xn = x_gates.chunk(3, 1)
    hr, hz, hn = h_gates.chunk(3, 1)
    n = (xn + (xr + hr).sigmoid() * hn).tanh()
    return (n + (xz + hz).sigmoid() * (h - n),)


_apply_gates = differentiable(
    Formula(
        _gates_fwd, _gates_bwd, 3, 3,
        lambda dy, inputs, kept, constants, needs: (dy, *inputs),
        _gates_reference, recurrent.fold,
    )
)  # fmt: skip


def gru_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """One step of a GRU; drops in for torch.gru_cell.

    ``h' = (1 - z) * n + z * h``; with ``x = input @ w_ih.T + b_ih`` and ``y = hx @ w_hh.T + b_hh`` in three parts each,
    ``r, z = sigmoid(x + y)`` and ``n = tanh(x_n + r * y_n)``. Both matrix products are torch's, all else is one kernel.

    Args:
        input: Tensor[B, I], float32, float64, bfloat16 or float16, any strides.
        hx: Tensor[B, H], the state h.
        w_ih: Tensor[3 H, I].
        w_hh: Tensor[3 H, H].
        b_ih: Tensor[3 H] or None.
        b_hh: Tensor[3 H] or None.

    Returns:
        Tensor[B, H], the next state.

    Raises:
        RuntimeError: shapes, devices or dtypes that do not fit together.
        TypeError: something else than tensors.

    The gates are computed in float32 (float64 for float64) and again in the backward pass. Bitwise deterministic.
    Under autocast the products run in its low precision and the state keeps its dtype on the CPU, as in torch.
    Gradients of every order, forward mode, vmap and torch.compile.
    """
    recurrent.check_cell("gru_cell", 3, input, {"hx": hx}, w_ih, w_hh, b_ih, b_hh)
    input, hx, w_ih, w_hh, b_ih, b_hh = recurrent.cast("gru_cell", input, hx, w_ih, w_hh, b_ih, b_hh)
    x_gates = torch.nn.functional.linear(input, w_ih, b_ih).to(hx.dtype)
    h_gates = torch.nn.functional.linear(hx, w_hh, b_hh).to(hx.dtype)
    namespace = backend.namespace_for("gru_cell", input)
    return _apply_gates(namespace, x_gates.contiguous(), h_gates.contiguous(), hx.contiguous())


class GRUCell(torch.nn.GRUCell):
    """torch.nn.GRUCell whose forward is pyops.functional.gru_cell."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        return recurrent.run_cell("GRUCell", self, gru_cell, input, hx, 1)


route((torch.gru_cell,), "gru_cell", gru_cell)


def _sample(batch, features, hidden, bias=True):
    def make(t: Maker):
        biases = (t.input((3 * hidden,)), t.input((3 * hidden,))) if bias else ()
        weights = t.input((3 * hidden, features)), t.input((3 * hidden, hidden))
        return (t.input((batch, features)), t.input((batch, hidden)), *weights, *biases), {}

    return make


checked(
    "gru_cell",
    gru_cell,
    torch.gru_cell,
    Sample("ragged, tail of a vector load", _sample(2, 3, 2), derivatives=True),
    Sample("no bias", _sample(3, 2, 5, bias=False)),
    Sample("several vectors and blocks", _sample(3, 4, 67)),
    Sample("one unit", _sample(1, 1, 1)),
    Sample("no rows", _sample(0, 3, 5)),
)
