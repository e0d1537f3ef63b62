"""Gated recurrent unit.

    r = sigmoid(x W_ir' + b_ir + h W_hr' + b_hr)        z: likewise
    n = tanh(x W_in' + b_in + r * (h W_hn' + b_hn))     h' = (1 - z) * n + z * h

    x: [B, I]   h, h': [B, H]   W_ih: [3 H, I], W_hh: [3 H, H], b: [3 H], the gates in the order r z n

Source: Cho et al. 2014, https://arxiv.org/abs/1406.1078, with the reset gate after the product; torch.nn.GRU and
GRUCell. The gradient is derived in docs/math/recurrent.md.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..core import backend, library, product, recurrent, recurrent_notes, recurrent_samples
from ..core.autograd import Formula, differentiable
from ..core.explain import explains
from ..core.intercept import route
from ..core.regularized import Regularized
from ..core.samples import Sample, checked

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
    ``r, z = sigmoid(x + y)`` and ``n = tanh(x_n + r * y_n)``. Both matrix products are as in ``linear``, all else is
    one kernel.

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
    x_gates = product.linear(input, w_ih, b_ih).to(hx.dtype)
    h_gates = product.linear(hx, w_hh, b_hh).to(hx.dtype)
    namespace = backend.namespace_for("gru_cell", input)
    return _apply_gates(namespace, x_gates.contiguous(), h_gates.contiguous(), hx.contiguous())


# A layer over all steps; the letters are those of csrc/common/recurrent.h


def _layer_fwd_fake(gates, h0, w_hh, b_n, starts, keep):
    rows, directions, hidden = gates.shape[0], h0.shape[0], h0.shape[2]
    saved = gates.new_empty((rows, directions, 4 * hidden) if keep else 0)
    return gates.new_empty(rows, directions, hidden), torch.empty_like(h0), saved


def _layer_bwd_fake(dy, dh_n, h0, w_hh, starts, y, saved):
    dgates = y.new_empty(*y.shape[:2], 3 * y.shape[2])
    return dgates, torch.empty_like(dgates), torch.empty_like(h0)


_layer_fwd = library.declare(
    "gru_layer_fwd(Tensor gates, Tensor h0, Tensor w_hh, Tensor? b_n, Tensor? starts, bool keep)"
    " -> (Tensor, Tensor, Tensor)",
    _layer_fwd_fake,
    _kernels,
)
_layer_bwd = library.declare(
    "gru_layer_bwd(Tensor? dy, Tensor? dh_n, Tensor h0, Tensor w_hh, Tensor? starts, Tensor y, Tensor saved)"
    " -> (Tensor, Tensor, Tensor)",
    _layer_bwd_fake,
    _kernels,
)


def _step_reference(gates, states, w_hh, b_n):
    (h,) = states
    y_gates = h @ w_hh.mT
    if b_n is not None:
        y_gates = y_gates + torch.cat((b_n.new_zeros(2 * b_n.shape[0]), b_n))
    return _gates_reference(gates, y_gates, h)


def _layer_reference(gates, h0, w_hh, b_n, starts, keep):
    weights = [(w, None if b_n is None else b_n[d]) for d, w in enumerate(w_hh.unbind(0))]
    y, (h_n,) = recurrent.step_by_step(_step_reference, gates, (h0,), starts, weights)
    return y, h_n, gates.new_empty((*gates.shape[:2], 4 * h0.shape[2]) if keep else 0)


def _finish(results, inputs, kept, needs):
    """The gradients of weight and bias: of all steps one product, one sum."""
    dgates, dh_gates, dh0 = results
    _, h0, w_hh, b_n, starts = inputs
    dw_hh = recurrent.weight_gradient(dh_gates, kept[0], h0, starts) if needs[2] else torch.empty_like(w_hh)
    db_n = dgates.new_empty(0)
    if b_n is not None and needs[3]:
        db_n = dh_gates[..., 2 * h0.shape[2] :].sum(0)
    return dgates, dh0, dw_hh, db_n


_apply_layer = differentiable(
    Formula(
        _layer_fwd, _layer_bwd, 5, 4,
        lambda dy, inputs, kept, constants, needs: (*dy, *inputs[1:3], inputs[4], *kept),
        _layer_reference, outputs=2, keep=(0, 2), finish=_finish,
    )
)  # fmt: skip


# A stack of layers side by side; the letters are those of csrc/common/recurrent.h


def _stack_fwd_fake(gates, h0, w_ih, b_ih, w_hh, b_n, keep):
    rows, (layers, _, hidden) = gates.shape[0], h0.shape
    y, below = gates.new_empty(rows, hidden), gates.new_empty(layers - 1, rows, hidden)
    return y, torch.empty_like(h0), below, gates.new_empty((layers, rows, 4 * hidden) if keep else 0)


def _stack_bwd_fake(dy, dh_n, h0, w_ih, w_hh, y, below, saved):
    dgates = y.new_empty(h0.shape[0], y.shape[0], 3 * y.shape[1])
    return dgates, torch.empty_like(dgates), torch.empty_like(h0)


# Triton has no barrier of all its programs: recurrent.runs_as_stack never asks it.
_stack_fwd = library.declare(
    "gru_stack_fwd(Tensor gates, Tensor h0, Tensor w_ih, Tensor? b_ih, Tensor w_hh, Tensor? b_n, bool keep)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _stack_fwd_fake,
    None,
)
_stack_bwd = library.declare(
    "gru_stack_bwd(Tensor? dy, Tensor? dh_n, Tensor h0, Tensor w_ih, Tensor w_hh, Tensor y, Tensor below, Tensor saved)"
    " -> (Tensor, Tensor, Tensor)",
    _stack_bwd_fake,
    None,
)


def _stack_reference(gates, h0, w_ih, b_ih, w_hh, b_n, keep):
    def layer(k, gates, states):
        weights = (w_hh[k], None if b_n is None else b_n[k])
        return recurrent.step_by_step(_step_reference, gates, states, None, [weights])

    y, (h_n,) = recurrent.stack_by_step(layer, gates, (h0,), w_ih, b_ih)
    return y, h_n, *_stack_fwd_fake(gates, h0, w_ih, b_ih, w_hh, b_n, keep)[2:]


def _stack_finish(results, inputs, kept, needs):
    dgates, dh_gates, dh0 = results
    h0, b_n = inputs[1], inputs[5]
    of_weights = recurrent.stack_weight_gradients(dgates, dh_gates, h0, inputs[2:5], kept[:2], needs[2:5])
    db_n = dgates.new_empty(0)
    if b_n is not None and needs[5]:
        db_n = dh_gates[..., 2 * h0.shape[2] :].sum(1)
    return dgates[0], dh0, *of_weights, db_n


_apply_stack = differentiable(
    Formula(
        _stack_fwd, _stack_bwd, 6, 6,
        lambda dy, inputs, kept, constants, needs: (*dy, *inputs[1:3], inputs[4], *kept),
        _stack_reference, outputs=2, keep=(0, 2, 3), finish=_stack_finish,
    )
)  # fmt: skip


def gru(
    input: Tensor,
    hx: Any,
    params: Any,
    has_biases: Any,
    num_layers: Any,
    dropout: Any,
    train: Any,
    bidirectional: Any,
    batch_first: Any,
) -> tuple[Tensor, Tensor]:
    """A GRU over sequences; drops in for torch.gru, in both of its forms.

    Of packed sequences the arguments are, as in torch, ``(data, batch_sizes, hx, params, has_biases, num_layers,
    dropout, train, bidirectional)``: told apart by a tensor in the third place.

    Args:
        input: Tensor[T, B, I], or [B, T, I] with ``batch_first``; packed: data [N, I], the rows of step 0, of step 1,
            ... as torch.nn.utils.rnn.pack_padded_sequence makes them. float32, float64, bfloat16 or float16, any
            strides.
        hx: Tensor[layers * directions, B, H], the state h.
        params: for each layer and direction ``w_ih`` [3 H, I], ``w_hh`` [3 H, H], ``b_ih`` and ``b_hh`` [3 H] if there
            are biases.
        has_biases: whether ``params`` holds biases.
        num_layers: layers, each on the output of the one before.
        dropout: probability with which the outputs of all layers but the last are set to zero, in training.
        train: whether dropout takes place.
        bidirectional: whether each layer also runs from the last step to the first.
        batch_first: see ``input``.

    Returns:
        The output Tensor[T, B, directions * H] in the form of the input, and the final h in the form of ``hx``.

    Raises:
        RuntimeError: shapes, devices or dtypes that do not fit together, or batch sizes that grow or are not positive.
        TypeError: something else than tensors.
        ValueError: a dropout that is no probability.

    The product of the inputs of all steps is one matrix product, so is the gradient of each weight; between them one
    kernel runs over all steps. On CUDA, small layers of one direction, without dropout between them, run side by side,
    as in ``lstm``. Gates are computed in float32 (float64 for float64), h is rounded to the dtype in each step. Bitwise
    deterministic. Gradients of every order (from the second on step by step in torch), forward mode, vmap (by torch)
    and torch.compile; under autocast as torch on each device.
    """
    net = recurrent.Network.of(
        isinstance(params, Tensor),
        (input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first),
    )
    recurrent.check_network("gru", net, (net.hx,), 3, False)
    x, h, *cast = recurrent.cast("gru", net.input, net.hx, *net.params)
    net = net._replace(input=x, params=cast)
    namespace = backend.namespace_for("gru", x)
    hidden = h.shape[2]

    per = 4 if net.has_biases else 2

    def biases_of_n(weights):
        return torch.stack([w[3][2 * hidden :] for w in weights]) if net.has_biases else None

    def layer(gates, states, weights, layout):
        w_hh, b_n = recurrent.stacked(weights, 1), biases_of_n(weights)
        keep = recurrent.keeps(gates, *states, w_hh, b_n)
        y, h_n, _ = _apply_layer(namespace, gates, *states, w_hh, b_n, layout.starts, keep)
        return y, (h_n,)

    def bias(w):
        """b_hn stays with the product that r multiplies."""
        return w[2] + torch.cat((w[3][: 2 * hidden], w[3].new_zeros(hidden))) if net.has_biases else None

    if recurrent.runs_as_stack(namespace, net, 3, hidden):

        def stack(gates, states, *weights):
            b_n = biases_of_n([net.weights(k, per)[0] for k in range(net.num_layers)])
            keep = recurrent.keeps(gates, *states, *weights, b_n)
            y, h_n, *_ = _apply_stack(namespace, gates, *states, *weights, b_n, keep)
            return y, (h_n,)

        output, (h_n,) = recurrent.run_stack(net, (h,), per, bias, stack)
        return output, h_n
    output, (h_n,) = recurrent.run_network(net, (h,), per, bias, layer)
    return output, h_n


class GRUCell(torch.nn.GRUCell):
    """torch.nn.GRUCell whose forward is pyops.functional.gru_cell."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        return recurrent.run_cell("GRUCell", self, gru_cell, input, hx, 1)


class GRU(Regularized, torch.nn.GRU):
    """torch.nn.GRU whose forward calls pyops.functional.gru, with dropout inside and truncated gradients.

    Args:
        input_dropout: probability with which a feature of the input is zeroed in training, the same in all steps of a
            sequence (variational dropout). By keyword, as those below.
        hidden_dropout: probability with which an element of the hidden-to-hidden weights is zeroed in training, the
            same in all steps and sequences (DropConnect).
        detach_every: steps after which gradients stop: truncated backpropagation through time; None: none do.

    All others are those of torch.nn.GRU. Masks are drawn by counter (pyops.core.random), also between layers.
    torch.compile with ``fullgraph=True`` needs ``torch._dynamo.config.allow_rnn = True``, as for torch's module.

    Raises:
        ValueError: a dropout that is no probability, ``detach_every`` below 1 or with ``bidirectional``.
    """

    _plain = recurrent.forward_of(torch.nn.GRU, gru=gru)


route((torch.gru_cell,), "gru_cell", gru_cell)
route((torch.gru,), "gru", gru)

_notes = recurrent_notes.explainer(
    3, recurrent_notes.declare_plan("gru"), lambda gates, h0: _layer_fwd_fake(gates, h0, None, None, None, True)[2:]
)
explains("gru", _notes)


_sample = partial(recurrent_samples.cell, 3, 1)
_network = partial(recurrent_samples.network, 3, 1)

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
checked(
    "gru",
    recurrent_samples.of_layers(gru, 1),
    recurrent_samples.of_layers(torch.gru, 1),
    Sample("both directions", _network((2, 1, 2), 1, directions=2), derivatives=True),
    Sample("both directions, packed", _network((5, 2), 2, directions=2, batch_sizes=(3, 1, 1))),
    Sample("several vectors of units, batch first", _network((4, 3, 3), 37, batch_first=True)),
    Sample("two layers, two directions", _network((3, 7, 5), 6, 2, 2)),
    Sample("no bias, one step", _network((1, 2, 3), 5, bias=False)),
    Sample("no rows", _network((3, 0, 2), 4)),
)
