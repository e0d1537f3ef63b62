"""Long short-term memory.

    i = sigmoid(x W_ii' + b_ii + h W_hi' + b_hi)        f, o: likewise        g = tanh(...)
    c' = f * c + i * g                                  h' = o * tanh(c')

    x: [B, I]   h, c, h', c': [B, H]   W_ih: [4 H, I], W_hh: [4 H, H], b: [4 H], the gates in the order i f g o

Source: Hochreiter, Schmidhuber 1997, with the forget gate of Gers et al. 2000; torch.nn.LSTM and LSTMCell. The
gradient is derived in docs/math/recurrent.md.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..core import autocast, backend, check, library, recurrent, recurrent_notes, recurrent_samples
from ..core.autograd import Formula, differentiable
from ..core.explain import explains
from ..core.intercept import route
from ..core.regularized import Regularized
from ..core.samples import Sample, checked

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
    ``input @ w_ih.T + b_ih + h @ w_hh.T + b_hh``. Both matrix products are as in ``linear``, all else is one kernel.

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


# A layer over all steps; the letters are those of csrc/common/recurrent.h


def _layer_fwd_fake(gates, h0, c0, w_hh, w_hr, starts, keep):
    rows, directions, hidden = gates.shape[0], h0.shape[0], c0.shape[2]
    saved = torch.empty_like(gates) if keep else gates.new_empty(0)
    cells = gates.new_empty((rows, directions, hidden) if keep else 0)
    return gates.new_empty(rows, directions, h0.shape[2]), torch.empty_like(h0), torch.empty_like(c0), saved, cells


def _layer_bwd_fake(dy, dh_n, dc_n, h0, c0, w_hh, w_hr, starts, saved, cells):
    dh = saved.new_empty(0) if w_hr is None else saved.new_empty(saved.shape[0], *h0.shape[::2])
    return torch.empty_like(saved), torch.empty_like(h0), torch.empty_like(c0), dh


_layer_fwd = library.declare(
    "lstm_layer_fwd(Tensor gates, Tensor h0, Tensor c0, Tensor w_hh, Tensor? w_hr, Tensor? starts, bool keep)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _layer_fwd_fake,
    _kernels,
)
_layer_bwd = library.declare(
    "lstm_layer_bwd(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor h0, Tensor c0, Tensor w_hh, Tensor? w_hr,"
    " Tensor? starts, Tensor saved, Tensor cells) -> (Tensor, Tensor, Tensor, Tensor)",
    _layer_bwd_fake,
    _kernels,
)


def _step_reference(gates, states, w_hh, w_hr):
    h, c = _gates_reference(gates + states[0] @ w_hh.mT, states[1])
    return (h if w_hr is None else h @ w_hr.mT), c


def _layer_reference(gates, h0, c0, w_hh, w_hr, starts, keep):
    weights = [(w, None if w_hr is None else w_hr[d]) for d, w in enumerate(w_hh.unbind(0))]
    y, (h_n, c_n) = recurrent.step_by_step(_step_reference, gates, (h0, c0), starts, weights)
    saved, cells = (
        gates.new_empty(gates.shape if keep else 0),
        gates.new_empty((*gates.shape[:2], c0.shape[2]) if keep else 0),
    )
    return y, h_n, c_n, saved, cells


def _finish(results, inputs, kept, needs):
    """The gradients of the weights: of all steps one product each."""
    dgates, dh0, dc0, dh = results
    _, h0, _, w_hh, w_hr, starts = inputs
    y, saved, cells = kept
    dw_hh = recurrent.weight_gradient(dgates, y, h0, starts) if needs[3] else torch.empty_like(w_hh)
    dw_hr = dgates.new_empty(0)
    if w_hr is not None and needs[4]:
        wide = check.accumulate_dtype(cells.dtype)
        m = (saved[..., 3 * cells.shape[2] :].to(wide) * cells.to(wide).tanh()).to(cells.dtype)
        dw_hr = torch.stack([dh[:, d].mT @ m[:, d] for d in range(h0.shape[0])])
    return dgates, dh0, dc0, dw_hh, dw_hr


_apply_layer = differentiable(
    Formula(
        _layer_fwd, _layer_bwd, 6, 5,
        lambda dy, inputs, kept, constants, needs: (*dy, *inputs[1:], *kept[1:]),
        _layer_reference, outputs=3, keep=(0, 3, 4), finish=_finish,
    )
)  # fmt: skip

# A stack of layers side by side; the letters are those of csrc/common/recurrent.h


def _stack_fwd_fake(gates, h0, c0, w_ih, b_ih, w_hh, keep):
    (rows, wide), (layers, _, hidden) = gates.shape, h0.shape
    y, below = gates.new_empty(rows, hidden), gates.new_empty(layers - 1, rows, hidden)
    saved = gates.new_empty((layers, rows, wide) if keep else 0)
    cells = gates.new_empty((layers, rows, hidden) if keep else 0)
    return y, torch.empty_like(h0), torch.empty_like(c0), below, saved, cells


def _stack_bwd_fake(dy, dh_n, dc_n, h0, c0, w_ih, w_hh, saved, cells):
    return torch.empty_like(saved), torch.empty_like(h0), torch.empty_like(c0)


# Triton has no barrier of all its programs: recurrent.runs_as_stack never asks it.
_stack_fwd = library.declare(
    "lstm_stack_fwd(Tensor gates, Tensor h0, Tensor c0, Tensor w_ih, Tensor? b_ih, Tensor w_hh, bool keep)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _stack_fwd_fake,
    None,
)
_stack_bwd = library.declare(
    "lstm_stack_bwd(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor h0, Tensor c0, Tensor w_ih, Tensor w_hh,"
    " Tensor saved, Tensor cells) -> (Tensor, Tensor, Tensor)",
    _stack_bwd_fake,
    None,
)


def _stack_reference(gates, h0, c0, w_ih, b_ih, w_hh, keep):
    def layer(k, gates, states):
        return recurrent.step_by_step(_step_reference, gates, states, None, [(w_hh[k], None)])

    y, (h_n, c_n) = recurrent.stack_by_step(layer, gates, (h0, c0), w_ih, b_ih)
    return y, h_n, c_n, *_stack_fwd_fake(gates, h0, c0, w_ih, b_ih, w_hh, keep)[3:]


def _stack_finish(results, inputs, kept, needs):
    dgates, dh0, dc0 = results
    of_weights = recurrent.stack_weight_gradients(dgates, dgates, inputs[1], inputs[3:6], kept[:2], needs[3:6])
    return dgates[0], dh0, dc0, *of_weights


_apply_stack = differentiable(
    Formula(
        _stack_fwd, _stack_bwd, 6, 6,
        lambda dy, inputs, kept, constants, needs: (*dy, *inputs[1:4], inputs[5], *kept[2:]),
        _stack_reference, outputs=3, keep=(0, 3, 4, 5), finish=_stack_finish,
    )
)  # fmt: skip


def lstm(
    input: Tensor,
    hx: Any,
    params: Any,
    has_biases: Any,
    num_layers: Any,
    dropout: Any,
    train: Any,
    bidirectional: Any,
    batch_first: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """An LSTM over sequences; drops in for torch.lstm, in both of its forms.

    Of packed sequences the arguments are, as in torch, ``(data, batch_sizes, hx, params, has_biases, num_layers,
    dropout, train, bidirectional)``: told apart by a tensor in the second place.

    Args:
        input: Tensor[T, B, I], or [B, T, I] with ``batch_first``; packed: data [N, I], the rows of step 0, of step 1,
            ... as torch.nn.utils.rnn.pack_padded_sequence makes them. float32, float64, bfloat16 or float16, any
            strides.
        hx: the pair (h, c) of Tensor[layers * directions, B, P] and [layers * directions, B, H].
        params: for each layer and direction ``w_ih`` [4 H, I], ``w_hh`` [4 H, P], ``b_ih`` and ``b_hh`` [4 H] if there
            are biases, and ``w_hr`` [P, H] if there is a projection; without, P = H.
        has_biases: whether ``params`` holds biases.
        num_layers: layers, each on the output of the one before.
        dropout: probability with which the outputs of all layers but the last are set to zero, in training.
        train: whether dropout takes place.
        bidirectional: whether each layer also runs from the last step to the first.
        batch_first: see ``input``.

    Returns:
        The output Tensor[T, B, directions * P] in the form of the input, and the final h and c in the form of ``hx``.

    Raises:
        RuntimeError: shapes, devices or dtypes that do not fit together, or batch sizes that grow or are not positive.
        TypeError: something else than tensors.
        ValueError: a dropout that is no probability.

    The product of the inputs of all steps is one matrix product, so is the gradient of each weight; between them one
    kernel runs over all steps. On CUDA, small layers of one direction, without dropout between them, run side by side:
    each a step behind the one below, whose outputs it then multiplies step by step. Gates are computed in float32
    (float64 for float64), h is rounded to the dtype in each step, c is not within a call. Bitwise deterministic.
    Gradients of every order (from the second on step by step in torch), forward mode, vmap (by torch) and
    torch.compile; under autocast in its low precision.
    """
    net = recurrent.Network.of(
        isinstance(hx, Tensor),
        (input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first),
    )
    h, c = recurrent.pair("lstm", "hx", net.hx)
    per = 4 if net.has_biases else 2
    projects = isinstance(h, Tensor) and isinstance(c, Tensor) and h.shape[-1:] != c.shape[-1:]
    projects = projects and len(net.params) == (per + 1) * net.num_layers * net.directions
    recurrent.check_network("lstm", net, (h, c), 4, projects)
    by_steps = projects or net.batch_sizes is not None or net.input.numel() == 0
    x, h, c, *cast = recurrent.cast("lstm_by_steps" if by_steps else "lstm", net.input, h, c, *net.params)
    net = net._replace(input=x, params=cast)
    namespace = backend.namespace_for("lstm", x)

    def layer(gates, states, weights, layout):
        w_hh = recurrent.stacked(weights, 1)
        w_hr = recurrent.stacked(weights, per) if projects else None
        keep = recurrent.keeps(gates, *states, w_hh, w_hr)
        y, h_n, c_n, _, _ = _apply_layer(namespace, gates, *states, w_hh, w_hr, layout.starts, keep)
        return y, (h_n, c_n)

    bias = lambda w: recurrent.joined(w[2], w[3]) if net.has_biases else None
    if not projects and recurrent.runs_as_stack(namespace, net, 4, h.shape[2]):

        def stack(gates, states, *weights):
            y, h_n, c_n, *_ = _apply_stack(
                namespace, gates, *states, *weights, recurrent.keeps(gates, *states, *weights)
            )
            return y, (h_n, c_n)

        output, (h_n, c_n) = recurrent.run_stack(net, (h, c), per, bias, stack)
        return output, h_n, c_n
    output, (h_n, c_n) = recurrent.run_network(net, (h, c), per + projects, bias, layer)
    if projects:
        output, h_n = autocast.lower(output, h_n)
    return output, h_n, c_n


class LSTMCell(torch.nn.LSTMCell):
    """torch.nn.LSTMCell whose forward is pyops.functional.lstm_cell."""

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        return recurrent.run_cell("LSTMCell", self, lstm_cell, input, hx, 2)


class LSTM(Regularized, torch.nn.LSTM):
    """torch.nn.LSTM whose forward calls pyops.functional.lstm, with dropout inside and truncated gradients.

    Args:
        input_dropout: probability with which a feature of the input is zeroed in training, the same in all steps of a
            sequence (variational dropout). By keyword, as those below.
        hidden_dropout: probability with which an element of the hidden-to-hidden weights is zeroed in training, the
            same in all steps and sequences (DropConnect).
        detach_every: steps after which gradients stop: truncated backpropagation through time; None: none do.

    All others are those of torch.nn.LSTM. Masks are drawn by counter (pyops.core.random), also between layers.
    torch.compile with ``fullgraph=True`` needs ``torch._dynamo.config.allow_rnn = True``, as for torch's module.

    Raises:
        ValueError: a dropout that is no probability, ``detach_every`` below 1 or with ``bidirectional``.
    """

    _plain = recurrent.forward_of(torch.nn.LSTM, lstm=lstm)


route((torch.lstm_cell,), "lstm_cell", lstm_cell)
route((torch.lstm,), "lstm", lstm)

_notes = recurrent_notes.explainer(
    4,
    recurrent_notes.declare_plan("lstm"),
    lambda gates, h0: _layer_fwd_fake(gates, h0, h0, None, None, None, True)[3:],
)
explains("lstm", _notes)


def _flat(function):
    return lambda x, h, c, *parameters: function(x, (h, c), *parameters)


_sample = partial(recurrent_samples.cell, 4, 2)
_network = partial(recurrent_samples.network, 4, 2)

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
checked(
    "lstm",
    recurrent_samples.of_layers(lstm, 2),
    recurrent_samples.of_layers(torch.lstm, 2),
    Sample("both directions", _network((2, 1, 2), 1, directions=2), derivatives=True),
    Sample("both directions, packed", _network((5, 2), 2, directions=2, batch_sizes=(3, 1, 1))),
    Sample("several vectors of units, batch first", _network((4, 3, 3), 37, batch_first=True)),
    Sample("two layers, two directions, projection", _network((3, 9, 4), 6, 2, 2, project=4)),
    Sample("no bias, one step", _network((1, 2, 3), 5, bias=False)),
    Sample("two layers, rows beyond a tile", _network((2, 9, 4), 6, 2)),
    Sample("no rows", _network((3, 0, 2), 4)),
)
