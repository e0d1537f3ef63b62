"""Elman's recurrent network.

    h' = tanh(x W_ih' + b_ih + h W_hh' + b_hh)        or relu in the place of tanh

    x: [B, I]   h, h': [B, H]   W_ih: [H, I], W_hh: [H, H], b: [H]

Source: Elman 1990, "Finding structure in time"; torch.nn.RNN and RNNCell. The gradient is derived in
docs/math/recurrent.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import backend, library, recurrent
from ..core.autograd import Formula, differentiable
from ..core.intercept import route
from ..core.samples import Maker, Sample, checked

_kernels = library.triton_kernels("rnn")

_gates_fwd = library.declare(
    "rnn_gates_fwd(Tensor gates, bool relu) -> Tensor",
    lambda gates, relu: torch.empty_like(gates),
    _kernels,
)
_gates_bwd = library.declare(
    "rnn_gates_bwd(Tensor dh, Tensor gates, bool relu) -> Tensor",
    lambda dh, gates, relu: torch.empty_like(gates),
    _kernels,
)

_apply_gates = differentiable(
    Formula(
        _gates_fwd, _gates_bwd, 1, 1,
        lambda dy, inputs, kept, constants, needs: (dy, *inputs, *constants),
        lambda gates, relu: (gates.relu() if relu else gates.tanh(),),
        recurrent.fold,
    )
)  # fmt: skip


def _cell(op, relu, input, hx, w_ih, w_hh, b_ih, b_hh):
    recurrent.check_cell(op, 1, input, {"hx": hx}, w_ih, w_hh, b_ih, b_hh)
    input, hx, w_ih, w_hh, b_ih, b_hh = recurrent.cast(op, input, hx, w_ih, w_hh, b_ih, b_hh)
    gates = recurrent.summed_gates(input, hx, w_ih, w_hh, b_ih, b_hh)
    return _apply_gates(backend.namespace_for(op, input), gates.contiguous(), relu)


def rnn_tanh_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """One step of a recurrent network; drops in for torch.rnn_tanh_cell.

    ``h' = tanh(input @ w_ih.T + b_ih + hx @ w_hh.T + b_hh)``; both matrix products are torch's.

    Args:
        input: Tensor[B, I], float32, float64, bfloat16 or float16, any strides.
        hx: Tensor[B, H], the state h.
        w_ih: Tensor[H, I].
        w_hh: Tensor[H, H].
        b_ih: Tensor[H] or None.
        b_hh: Tensor[H] or None.

    Returns:
        Tensor[B, H], the next state.

    Raises:
        RuntimeError: shapes, devices or dtypes that do not fit together.
        TypeError: something else than tensors.

    tanh is computed in float32 (float64 for float64); and again in the backward pass. Bitwise deterministic. Under
    autocast as in torch. Gradients of every order, forward mode, vmap and torch.compile.
    """
    return _cell("rnn_tanh_cell", False, input, hx, w_ih, w_hh, b_ih, b_hh)


def rnn_relu_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """One step of a recurrent network with relu, ``h' = max(..., 0)``; drops in for torch.rnn_relu_cell.

    All else as ``rnn_tanh_cell``.
    """
    return _cell("rnn_relu_cell", True, input, hx, w_ih, w_hh, b_ih, b_hh)


class RNNCell(torch.nn.RNNCell):
    """torch.nn.RNNCell whose forward is pyops.functional.rnn_tanh_cell or rnn_relu_cell."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"RNNCell: got nonlinearity {self.nonlinearity!r}, expected 'tanh' or 'relu'")
        cell = rnn_tanh_cell if self.nonlinearity == "tanh" else rnn_relu_cell
        return recurrent.run_cell("RNNCell", self, cell, input, hx, 1)


route((torch.rnn_tanh_cell,), "rnn_tanh_cell", rnn_tanh_cell)
route((torch.rnn_relu_cell,), "rnn_relu_cell", rnn_relu_cell)


def _sample(batch, features, hidden, bias=True):
    def make(t: Maker):
        biases = (t.input((hidden,)), t.input((hidden,))) if bias else ()
        weights = t.input((hidden, features)), t.input((hidden, hidden))
        return (t.input((batch, features)), t.input((batch, hidden)), *weights, *biases), {}

    return make


def _samples(*sizes):
    return (
        Sample("ragged, tail of a vector load", _sample(2, 3, 2), derivatives=True),
        Sample("no bias", _sample(2, 3, 4, bias=False)),
        Sample("several vectors and blocks", _sample(*sizes)),
        Sample("no rows", _sample(0, 3, 5)),
    )


checked("rnn_tanh_cell", rnn_tanh_cell, torch.rnn_tanh_cell, *_samples(3, 4, 67))
# Of relu, numbers of which none is so near the kink that rounding to bfloat16 decides on its side.
checked("rnn_relu_cell", rnn_relu_cell, torch.rnn_relu_cell, *_samples(2, 3, 37))
