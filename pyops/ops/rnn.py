"""Elman's recurrent network.

    h' = tanh(x W_ih' + b_ih + h W_hh' + b_hh)        or relu in the place of tanh

    x: [B, I]   h, h': [B, H]   W_ih: [H, I], W_hh: [H, H], b: [H]

Source: Elman 1990, "Finding structure in time"; torch.nn.RNN and RNNCell. The gradient is derived in
docs/math/recurrent.md.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..core import backend, check, library, recurrent, recurrent_notes, recurrent_samples
from ..core.autograd import Formula, differentiable
from ..core.explain import explains
from ..core.intercept import route
from ..core.regularized import Regularized
from ..core.samples import Sample, checked

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

    ``h' = tanh(input @ w_ih.T + b_ih + hx @ w_hh.T + b_hh)``; both matrix products are as in ``linear``.

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


# A layer over all steps; the letters are those of csrc/common/recurrent.h

_layer_fwd = library.declare(
    "rnn_layer_fwd(Tensor gates, Tensor h0, Tensor w_hh, Tensor? starts, bool relu) -> (Tensor, Tensor)",
    lambda gates, h0, w_hh, starts, relu: (torch.empty_like(gates), torch.empty_like(h0)),
    _kernels,
)
_layer_bwd = library.declare(
    "rnn_layer_bwd(Tensor? dy, Tensor? dh_n, Tensor h0, Tensor w_hh, Tensor? starts, Tensor y, bool relu)"
    " -> (Tensor, Tensor)",
    lambda dy, dh_n, h0, w_hh, starts, y, relu: (torch.empty_like(y), torch.empty_like(h0)),
    _kernels,
)


def _by_step(gates, states, weights, starts, relu):
    def step(gates, states, w_hh):
        sums = gates + states[0] @ w_hh.mT
        return (sums.relu() if relu else sums.tanh(),)

    return recurrent.step_by_step(step, gates, states, starts, weights)


def _layer_reference(gates, h0, w_hh, starts, relu):
    y, (h_n,) = _by_step(gates, (h0,), [(w,) for w in w_hh.unbind(0)], starts, relu)
    return y, h_n


def _finish(results, inputs, kept, needs):
    """The gradient of the weight: of all steps one product."""
    dgates, dh0 = results
    _, h0, w_hh, starts = inputs
    dw_hh = recurrent.weight_gradient(dgates, kept[0], h0, starts) if needs[2] else torch.empty_like(w_hh)
    return dgates, dh0, dw_hh


_apply_layer = differentiable(
    Formula(
        _layer_fwd, _layer_bwd, 4, 3,
        lambda dy, inputs, kept, constants, needs: (*dy, *inputs[1:], *kept, *constants),
        _layer_reference, outputs=2, keep=(0,), finish=_finish,
    )
)  # fmt: skip


# A stack of layers side by side; the letters are those of csrc/common/recurrent.h


def _stack_fwd_fake(gates, h0, w_ih, b_ih, w_hh, relu):
    return torch.empty_like(gates), torch.empty_like(h0), gates.new_empty(h0.shape[0] - 1, *gates.shape)


# Triton has no barrier of all its programs: recurrent.runs_as_stack never asks it.
_stack_fwd = library.declare(
    "rnn_stack_fwd(Tensor gates, Tensor h0, Tensor w_ih, Tensor? b_ih, Tensor w_hh, bool relu)"
    " -> (Tensor, Tensor, Tensor)",
    _stack_fwd_fake,
    None,
)
_stack_bwd = library.declare(
    "rnn_stack_bwd(Tensor? dy, Tensor? dh_n, Tensor h0, Tensor w_ih, Tensor w_hh, Tensor y, Tensor below, bool relu)"
    " -> (Tensor, Tensor)",
    lambda dy, dh_n, h0, w_ih, w_hh, y, below, relu: (y.new_empty(h0.shape[0], *y.shape), torch.empty_like(h0)),
    None,
)


def _stack_reference(gates, h0, w_ih, b_ih, w_hh, relu):
    layer = lambda k, gates, states: _by_step(gates, states, [(w_hh[k],)], None, relu)
    y, (h_n,) = recurrent.stack_by_step(layer, gates, (h0,), w_ih, b_ih)
    return y, h_n, _stack_fwd_fake(gates, h0, w_ih, b_ih, w_hh, relu)[2]


def _stack_finish(results, inputs, kept, needs):
    dgates, dh0 = results
    of_weights = recurrent.stack_weight_gradients(dgates, dgates, inputs[1], inputs[2:5], kept, needs[2:5])
    return dgates[0], dh0, *of_weights


_apply_stack = differentiable(
    Formula(
        _stack_fwd, _stack_bwd, 5, 5,
        lambda dy, inputs, kept, constants, needs: (*dy, *inputs[1:3], inputs[4], *kept, *constants),
        _stack_reference, outputs=2, keep=(0, 2), finish=_stack_finish,
    )
)  # fmt: skip


def _run(op, relu, *arguments):
    net = recurrent.Network.of(isinstance(arguments[2], Tensor), arguments)
    recurrent.check_network(op, net, (net.hx,), 1, False)
    x, h, *cast = recurrent.cast(op, net.input, net.hx, *net.params)
    net = net._replace(input=x, params=cast)
    namespace = backend.namespace_for(op, x)

    def layer(gates, states, weights, layout):
        y, h_n = _apply_layer(namespace, gates, *states, recurrent.stacked(weights, 1), layout.starts, relu)
        return y, (h_n,)

    bias = lambda w: recurrent.joined(w[2], w[3]) if net.has_biases else None
    per = 4 if net.has_biases else 2
    if recurrent.runs_as_stack(namespace, net, 1, h.shape[2]):

        def stack(gates, states, *weights):
            y, h_n, _ = _apply_stack(namespace, gates, *states, *weights, relu)
            return y, (h_n,)

        output, (h_n,) = recurrent.run_stack(net, (h,), per, bias, stack)
        return output, h_n
    output, (h_n,) = recurrent.run_network(net, (h,), per, bias, layer)
    return output, h_n


def rnn_tanh(
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
    """A recurrent network over sequences; drops in for torch.rnn_tanh, in both of its forms.

    Of packed sequences the arguments are, as in torch, ``(data, batch_sizes, hx, params, has_biases, num_layers,
    dropout, train, bidirectional)``: told apart by a tensor in the third place.

    Args:
        input: Tensor[T, B, I], or [B, T, I] with ``batch_first``; packed: data [N, I], the rows of step 0, of step 1,
            ... as torch.nn.utils.rnn.pack_padded_sequence makes them. float32, float64, bfloat16 or float16, any
            strides.
        hx: Tensor[layers * directions, B, H], the state h.
        params: for each layer and direction ``w_ih`` [H, I], ``w_hh`` [H, H], ``b_ih`` and ``b_hh`` [H] if there are
            biases.
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
    as in ``lstm``. tanh is computed in float32 (float64 for float64), h is rounded to the dtype in each step. Bitwise
    deterministic. Gradients of every order (from the second on step by step in torch), forward mode, vmap (by torch)
    and torch.compile; under autocast in its low precision.
    """
    return _run(
        "rnn_tanh", False, input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first
    )


def rnn_relu(
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
    """A recurrent network with relu over sequences; drops in for torch.rnn_relu. All else as ``rnn_tanh``."""
    return _run("rnn_relu", True, input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first)


class RNNCell(torch.nn.RNNCell):
    """torch.nn.RNNCell whose forward is pyops.functional.rnn_tanh_cell or rnn_relu_cell."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        cell = {"tanh": rnn_tanh_cell, "relu": rnn_relu_cell}.get(self.nonlinearity, self._unknown)
        return recurrent.run_cell("RNNCell", self, cell, input, hx, 1)

    def _unknown(self, *_: Any) -> NoReturn:
        check.fail(RuntimeError, "RNNCell", "nonlinearity", repr(self.nonlinearity), "'tanh' or 'relu'")


class RNN(Regularized, torch.nn.RNN):
    """torch.nn.RNN by pyops.functional.rnn_tanh or rnn_relu, with dropout inside and truncated gradients.

    Args:
        input_dropout: probability with which a feature of the input is zeroed in training, the same in all steps of a
            sequence (variational dropout). By keyword, as those below.
        hidden_dropout: probability with which an element of the hidden-to-hidden weights is zeroed in training, the
            same in all steps and sequences (DropConnect).
        detach_every: steps after which gradients stop: truncated backpropagation through time; None: none do.

    All others are those of torch.nn.RNN. Masks are drawn by counter (pyops.core.random), also between layers.
    torch.compile with ``fullgraph=True`` needs ``torch._dynamo.config.allow_rnn = True``, as for torch's module.

    Raises:
        ValueError: a dropout that is no probability, ``detach_every`` below 1 or with ``bidirectional``.
    """

    _plain = recurrent.forward_of(torch.nn.RNN, rnn_tanh=rnn_tanh, rnn_relu=rnn_relu)


route((torch.rnn_tanh_cell,), "rnn_tanh_cell", rnn_tanh_cell)
route((torch.rnn_relu_cell,), "rnn_relu_cell", rnn_relu_cell)
route((torch.rnn_tanh,), "rnn_tanh", rnn_tanh)
route((torch.rnn_relu,), "rnn_relu", rnn_relu)

_notes = recurrent_notes.explainer(1, recurrent_notes.declare_plan("rnn"), lambda gates, h0: ())
for _op in ("rnn_tanh", "rnn_relu"):
    explains(_op, _notes)


_sample = partial(recurrent_samples.cell, 1, 1)
_network = partial(recurrent_samples.network, 1, 1)


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


for _op, _function, _torch_function in (("rnn_tanh", rnn_tanh, torch.rnn_tanh), ("rnn_relu", rnn_relu, torch.rnn_relu)):
    checked(
        _op,
        recurrent_samples.of_layers(_function, 1),
        recurrent_samples.of_layers(_torch_function, 1),
        Sample("both directions", _network((2, 1, 2), 1, directions=2), derivatives=True),
        Sample("both directions, packed", _network((5, 2), 2, directions=2, batch_sizes=(3, 1, 1))),
        Sample("several vectors of units, batch first", _network((2, 3, 3), 37, batch_first=True)),
        Sample("two layers, two directions", _network((3, 2, 3), 3, 2, 2)),
        Sample("no bias, one step", _network((1, 2, 3), 5, bias=False)),
        Sample("no rows", _network((3, 0, 2), 4)),
    )
