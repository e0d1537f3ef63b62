"""Long short-term memory.

    i = sigmoid(x W_ii' + b_ii + h W_hi' + b_hi)        f, o: likewise        g = tanh(...)
    c' = f * c + i * g                                  h' = o * tanh(c')

    x: [B, I]   h, c, h', c': [B, H]   W_ih: [4 H, I], W_hh: [4 H, H], b: [4 H], the gates in the order i f g o

Source: Hochreiter, Schmidhuber 1997, with the forget gate of Gers et al. 2000; torch.nn.LSTM and LSTMCell. The
gradient is derived in docs/math/recurrent.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import backend, library, recurrent
from ..core.autograd import Formula, differentiable
from ..core.intercept import route
from ..core.samples import Maker, Sample, checked

_kernels = library.triton_kernels("lstm")

_gates_fwd = library.declare(
    "lstm_gates_fwd(Tensor gates, Tensor c) -> (Tensor, Tensor)",
    lambda gates, c: (torch.empty_like(c), torch.empty_like(c)),
    _kernels,
)
_gates_bwd = library.declare(
    "lstm_gates_bwd(Tensor? dh, Tensor? dc, Tensor gates, Tensor c) -> (Tensor, Tensor)",
    lambda dh, dc, gates, c: (torch.empty_like(gates), torch.empty_like(c)),
    _kernels,
)


def _gates_reference(gates, c):
    i, f, g, o = gates.chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


_apply_gates = differentiable(
    Formula(
        _gates_fwd, _gates_bwd, 2, 2,
        lambda dy, inputs, kept, constants, needs: (*dy, *inputs),
        _gates_reference, recurrent.fold, outputs=2, keep=(),
    )
)  # fmt: skip


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of an LSTM; drops in for torch.lstm_cell.

    ``c' = f * c + i * g``, ``h' = o * tanh(c')``; the gates ``i, f, g, o`` are sigmoid (g: tanh) of the four parts of
    ``input @ w_ih.T + b_ih + h @ w_hh.T + b_hh``. Both matrix products are torch's, all else is one kernel.

    Args:
        input: Tensor[B, I], float32, float64, bfloat16 or float16, any strides.
        hx: the pair (h, c) of Tensor[B, H].
        w_ih: Tensor[4 H, I].
        w_hh: Tensor[4 H, H].
        b_ih: Tensor[4 H] or None.
        b_hh: Tensor[4 H] or None.

    Returns:
        The pair (h', c') of Tensor[B, H].

    Raises:
        RuntimeError: shapes, devices or dtypes that do not fit together.
        TypeError: something else than tensors.

    The gates are computed in float32 (float64 for float64) and again in the backward pass: of the forward pass, only
    their pre-activations and c are kept. Bitwise deterministic. Under autocast the products run in its low precision
    and the states keep their dtype on the CPU, as in torch. Gradients of every order, forward mode, vmap and
    torch.compile.
    """
    h, c = recurrent.pair("lstm_cell", "hx", hx)
    recurrent.check_cell("lstm_cell", 4, input, {"hx[0]": h, "hx[1]": c}, w_ih, w_hh, b_ih, b_hh)
    input, h, c, w_ih, w_hh, b_ih, b_hh = recurrent.cast("lstm_cell", input, h, c, w_ih, w_hh, b_ih, b_hh)
    gates = recurrent.summed_gates(input, h, w_ih, w_hh, b_ih, b_hh)
    return _apply_gates(backend.namespace_for("lstm_cell", input), gates.to(c.dtype).contiguous(), c.contiguous())


class LSTMCell(torch.nn.LSTMCell):
    """torch.nn.LSTMCell whose forward is pyops.functional.lstm_cell."""

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        return recurrent.run_cell("LSTMCell", self, lstm_cell, input, hx, 2)


route((torch.lstm_cell,), "lstm_cell", lstm_cell)


def _flat(function):
    return lambda x, h, c, *parameters: function(x, (h, c), *parameters)


def _sample(batch, features, hidden, bias=True):
    def make(t: Maker):
        biases = (t.input((4 * hidden,)), t.input((4 * hidden,))) if bias else ()
        weights = t.input((4 * hidden, features)), t.input((4 * hidden, hidden))
        return (t.input((batch, features)), t.input((batch, hidden)), t.input((batch, hidden)), *weights, *biases), {}

    return make


checked(
    "lstm_cell",
    _flat(lstm_cell),
    _flat(torch.lstm_cell),
    Sample("ragged, tail of a vector load", _sample(2, 3, 2), derivatives=True),
    Sample("no bias", _sample(3, 2, 5, bias=False)),
    Sample("several vectors and blocks", _sample(3, 4, 67)),
    Sample("one unit", _sample(1, 1, 1)),
    Sample("no rows", _sample(0, 3, 5)),
)
