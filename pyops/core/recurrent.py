"""What the rooms lstm, gru and rnn share: checks and matrix products of a cell; layers and directions of a sequence."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from types import FunctionType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import autocast, check, masking, product, tracing
from .autograd import Tensors, derivative_levels_active


def check_cell(
    op: str,
    gates: int,
    input: Tensor,
    states: dict[str, Tensor],
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
) -> None:
    """Raises unless input [B, I], states [B, H], weights [gates * H, I] and [gates * H, H] and biases fit together."""
    check.floating(op, "input", input)
    given = {**states, "w_ih": weight_ih, "w_hh": weight_hh, "b_ih": bias_ih, "b_hh": bias_hh}
    for name, t in given.items():
        if t is None and name in ("b_ih", "b_hh"):
            continue
        if not isinstance(t, Tensor):
            check.fail(TypeError, op, name, type(t).__name__, "a tensor")
        if t.device != input.device:
            check.fail(RuntimeError, op, name, f"a tensor on {t.device}", f"one on {input.device}, as the input")
        if t.dtype != input.dtype and not autocast.enabled(input):
            check.fail(RuntimeError, op, name, t.dtype, f"{input.dtype}, as the input")
    if input.dim() != 2:
        kind = IndexError if input.dim() < 2 else RuntimeError
        check.fail(kind, op, "input", f"shape {list(input.shape)}", "2 dimensions [batch, features]")
    batch, features = input.shape
    if weight_hh.dim() != 2 or weight_hh.shape[0] != gates * weight_hh.shape[1]:
        expected = f"[{gates} * hidden_size, hidden_size]" if gates > 1 else "[hidden_size, hidden_size]"
        check.fail(RuntimeError, op, "w_hh", f"shape {list(weight_hh.shape)}", f"shape {expected}")
    rows, hidden = weight_hh.shape
    if weight_ih.dim() != 2 or weight_ih.shape[0] != rows:
        check.fail(RuntimeError, op, "w_ih", f"shape {list(weight_ih.shape)}", f"shape [{rows}, input_size]")
    if features != weight_ih.shape[1]:
        size = weight_ih.shape[1]
        check.fail(RuntimeError, op, "input", f"shape {list(input.shape)}", f"input_size {size} in its last dimension")
    for name, t in states.items():
        if t.shape != (batch, hidden):
            kind = IndexError if t.shape in ((), (batch,)) else RuntimeError  # as torch, which asks size by size
            check.fail(kind, op, name, f"shape {list(t.shape)}", f"shape {[batch, hidden]}")
    for name, b in (("b_ih", bias_ih), ("b_hh", bias_hh)):
        if b is not None and b.shape != (rows,):
            check.fail(RuntimeError, op, name, f"shape {list(b.shape)}", f"shape {[rows]}")


def cast(op: str, *arguments: Any) -> tuple[Any, ...]:
    """The arguments in the dtype that the active autocast context asks for."""
    return autocast.cast(op, *arguments)


def pair(op: str, argument: str, hx: object) -> tuple[Tensor, Tensor]:
    """The two states (h, c) of an LSTM."""
    if not isinstance(hx, (tuple, list)) or len(hx) != 2:
        got = f"{len(hx)} tensors" if isinstance(hx, (tuple, list)) else type(hx).__name__
        kind = RuntimeError if isinstance(hx, (tuple, list)) else TypeError
        check.fail(kind, op, argument, got, "the pair (h, c)")
    return hx[0], hx[1]


def joined(bias_ih: Tensor | None, bias_hh: Tensor | None) -> Tensor | None:
    """Both biases as one, where the gates are a sum."""
    if bias_ih is None or bias_hh is None:
        return bias_hh if bias_ih is None else bias_ih
    return bias_ih + bias_hh


def summed_gates(
    input: Tensor, h: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor | None, bias_hh: Tensor | None
) -> Tensor:
    """``input W_ih' + h W_hh' + b_ih + b_hh`` [B, gates * H]: the second product is added inside the product."""
    gates = product.linear(input, weight_ih, joined(bias_ih, bias_hh))
    return torch.addmm(gates, h, weight_hh.mT)


def fold(forward, batch, dims, inputs, constants):
    """vmap over [B, ...] tensors: a batch is more rows; what is not batched is repeated."""
    whole = [t.expand(batch, *t.shape) if d is None else t.movedim(d, 0) for t, d in zip(inputs, dims)]
    results = forward(*(t.reshape(batch * t.shape[1], t.shape[2]) for t in whole), *constants)
    if isinstance(results, torch.Tensor):
        results = (results,)
    size = whole[0].shape[1]
    folded = tuple(r.reshape(batch, size, r.shape[1]) for r in results)
    return folded, (0,) * len(folded)


def run_cell(
    name: str,
    module: torch.nn.RNNCellBase,
    cell: Callable[..., Any],
    input: Tensor,
    hx: Any,
    states: int,
) -> Any:
    """Forward of a cell module: input [B, I] or [I], states likewise or None for zeros."""
    if input.dim() not in (1, 2):
        check.fail(ValueError, name, "input", f"{input.dim()} dimensions", "1 or 2")
    given = None if hx is None else (hx,) if states == 1 else pair(name, "hx", hx)
    for k, state in enumerate(given or ()):
        if state.dim() not in (1, 2):
            argument = "hx" if states == 1 else f"hx[{k}]"
            check.fail(ValueError, name, argument, f"{state.dim()} dimensions", "1 or 2")
    batched = input.dim() == 2
    x = input if batched else input.unsqueeze(0)
    if given is None:
        given = (x.new_zeros(x.shape[0], module.hidden_size),) * states
    elif not batched:
        given = tuple(s.unsqueeze(0) for s in given)
    parameters = module.weight_ih, module.weight_hh, module.bias_ih, module.bias_hh
    result = cell(x, given[0] if states == 1 else given, *parameters)
    if batched:
        return result
    return result.squeeze(0) if states == 1 else tuple(r.squeeze(0) for r in result)


# Sequences


class Layout(NamedTuple):
    """How the rows [N, ...] of a batch of sequences are cut into steps; csrc/common/recurrent.h."""

    batch: int
    starts: Tensor | None  # [T + 1], first row of each step; None: every step has `batch` rows


def keeps(*tensors: Tensor | None) -> bool:
    """Whether the forward pass of a sequence has to keep what a gradient reads."""
    if derivative_levels_active():
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def step_by_step(
    cell: Callable[..., Tensors], gates: Tensor, states: Tensors, starts: Tensor | None, arguments: Sequence[Tensors]
) -> tuple[Tensor, Tensors]:
    """A layer in plain torch, step by step.

    Args:
        cell: ``(gates of a step [b, ...], states [b, ...], *arguments) -> states``, the first of which is the output.
        gates: Tensor[N, D, ...].
        states: Tensors[D, B, ...].
        starts: as in ``Layout``.
        arguments: those of ``cell``, for each direction.

    Returns:
        ``(y [N, D, ...], states [D, B, ...])``.
    """
    rows, batch = gates.shape[0], states[0].shape[1]
    firsts = (list(range(0, rows + 1, batch)) if batch else [0]) if starts is None else _numbers(starts)
    steps = [slice(a, b) for a, b in itertools.pairwise(firsts)]
    ys, finals = [], []
    for d in range(gates.shape[1]):
        now = tuple(s[d] for s in states)
        outputs = []
        for step in steps if d == 0 else reversed(steps):
            count = step.stop - step.start
            found = cell(gates[step, d], tuple(s[:count] for s in now), *arguments[d])
            outputs.append(found[0])
            now = tuple(torch.cat((new, old[count:])) for new, old in zip(found, now))
        ys.append(torch.cat(outputs if d == 0 else outputs[::-1]) if outputs else states[0][d, :0])
        finals.append(now)
    return torch.stack(ys, 1), tuple(torch.stack(s) for s in zip(*finals))


def weight_gradient(dgates: Tensor, y: Tensor, h0: Tensor, starts: Tensor | None) -> Tensor:
    """``sum_t dgates_t' h_{t-1}`` [D, gates H, P]: of all steps one product.

    Args:
        dgates: Tensor[N, D, gates H], gradients of the pre-activations from the hidden state.
        y: Tensor[N, D, P], the states after each step.
        h0: Tensor[D, B, P].
        starts: as in ``Layout``.
    """
    directions, batch = h0.shape[0], h0.shape[1]
    n = y.shape[0]
    if starts is not None:
        indices = _rows_before(starts, n, batch, directions)
        before = (torch.cat((h0[d], y[:, d]))[indices[d]] for d in range(directions))
        return torch.stack([product.weight_gradient(dgates[:, d], h) for d, h in enumerate(before)])
    if y.dtype in autocast.HALF:
        # a copy, lest the product be rounded twice
        parts = ((h0[0], y[: n - batch, 0]), (y[batch:, directions - 1], h0[directions - 1]))
        return torch.stack([dgates[:, d].mT @ torch.cat(parts[d]) for d in range(directions)])
    products = []
    for d in range(directions):
        edge = slice(0, batch) if d == 0 else slice(n - batch, n)
        inner, source = (slice(batch, n), slice(0, n - batch)) if d == 0 else (slice(0, n - batch), slice(batch, n))
        if n == 0:
            products.append(dgates.new_zeros(dgates.shape[2], h0.shape[2]))
            continue
        initial = dgates[edge, d].mT @ h0[d]
        products.append(initial + product.weight_gradient(dgates[inner, d], y[source, d]))
    return torch.stack(products)


def _rows_before(starts: Tensor, rows: int, batch: int, directions: int) -> list[Tensor]:
    """For each direction, where in (initial states, y) the state before each row stands."""
    counts = starts.diff()
    row = torch.arange(rows, device=starts.device)
    step = torch.repeat_interleave(torch.arange(counts.numel(), device=starts.device), counts, output_size=rows)
    earlier = torch.cat((counts.new_full((1,), batch), counts))
    indices = [batch + row - earlier[step]]
    if directions == 2:
        place = row - starts[step]
        later = torch.cat((counts, counts.new_zeros(1)))[step + 1]
        indices.append(torch.where(place < later, batch + row + counts[step], place))
    return indices


class Network(NamedTuple):
    """The arguments of torch.lstm and its kin, told apart."""

    input: Tensor
    batch_sizes: Tensor | None
    hx: Any
    params: Sequence[Tensor]
    has_biases: bool
    num_layers: int
    dropout: float
    train: bool
    bidirectional: bool
    batch_first: bool

    @classmethod
    def of(cls, packed: bool, arguments: Tensors) -> Network:
        """From (input, hx, ..., batch_first) or, of packed sequences, (data, batch_sizes, hx, ..., bidirectional)."""
        return cls(*(*arguments, False) if packed else (arguments[0], None, *arguments[1:]))

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    def weights(self, layer: int, per_direction: int) -> list[Sequence[Tensor]]:
        """The parameters of each direction of a layer."""
        first = layer * self.directions * per_direction
        return [
            self.params[first + d * per_direction : first + (d + 1) * per_direction] for d in range(self.directions)
        ]


def check_network(op: str, net: Network, states: Sequence[Tensor], gates: int, projects: bool) -> None:
    """Raises unless input, initial states and parameters fit together."""
    x = net.input
    check.floating(op, "input", x)
    rank = 3 if net.batch_sizes is None else 2
    if x.dim() != rank:
        check.fail(RuntimeError, op, "input", f"{x.dim()} dimensions", f"{rank}")
    if net.batch_sizes is None and x.shape[1 if net.batch_first else 0] == 0:
        check.fail(RuntimeError, op, "input", f"shape {list(x.shape)}", "at least one step")
    per = (4 if net.has_biases else 2) + projects
    if len(net.params) != per * net.num_layers * net.directions:
        expected = f"{per} for each of {net.num_layers} layers and {net.directions} directions"
        check.fail(RuntimeError, op, "params", f"{len(net.params)} tensors", expected)
    for i, p in enumerate((*states, *net.params)):
        name = f"params[{i - len(states)}]" if i >= len(states) else "hx" if len(states) == 1 else f"hx[{i}]"
        if not isinstance(p, Tensor):
            check.fail(TypeError, op, name, type(p).__name__, "a tensor")
        if p.device != x.device:
            check.fail(RuntimeError, op, name, f"a tensor on {p.device}", f"one on {x.device}, as the input")
        if p.dtype != x.dtype and not autocast.enabled(x):
            check.fail(RuntimeError, op, name, p.dtype, f"{x.dtype}, as the input")
    if not 0 <= net.dropout <= 1:
        check.fail(ValueError, op, "dropout", net.dropout, "a probability")
    batch = _packed_batch(op, net, states) if net.batch_sizes is not None else x.shape[0 if net.batch_first else 1]
    hidden = net.params[1].shape[0] // gates if net.params[1].dim() == 2 else 0
    size = net.params[per - 1].shape[0] if projects else hidden
    layers = net.num_layers * net.directions
    for i, s in enumerate(states):
        expected_shape = (layers, batch, size if i == 0 else hidden)
        if s.shape != expected_shape:
            name = "hx" if len(states) == 1 else f"hx[{i}]"
            check.fail(RuntimeError, op, name, f"shape {list(s.shape)}", f"shape {list(expected_shape)}")
    features = x.shape[-1]
    for layer in range(net.num_layers):
        for parameters in net.weights(layer, per):
            shapes: list[tuple[int, ...]] = [(gates * hidden, features), (gates * hidden, size)]
            shapes += [(gates * hidden,)] * 2 * net.has_biases + [(size, hidden)] * projects
            for p, shape in zip(parameters, shapes):
                if p.shape != shape:
                    name = "input" if layer == 0 and p is parameters[0] and p.dim() == 2 else "params"
                    got = f"weights of shape {list(p.shape)}"
                    check.fail(RuntimeError, op, name, got, f"shape {list(shape)} in layer {layer}")
        features = size * net.directions


def _packed_batch(op: str, net: Network, states: Sequence[Tensor]) -> int:
    """How many sequences there are."""
    sizes = net.batch_sizes
    if not isinstance(sizes, Tensor) or sizes.dim() != 1 or sizes.dtype != torch.int64 or sizes.device.type != "cpu":
        check.fail(RuntimeError, op, "batch_sizes", sizes, "a tensor of one dimension, int64, on the CPU")
    if torch.compiler.is_compiling():
        return states[0].shape[1]  # numbers are not known here; the kernels check them again
    given = _numbers(sizes)
    if not given or any(b < 1 for b in given) or any(a < b for a, b in itertools.pairwise(given)):
        check.fail(RuntimeError, op, "batch_sizes", given, "positive numbers that never grow")
    if sum(given) != net.input.shape[0]:
        check.fail(RuntimeError, op, "batch_sizes", f"a sum of {sum(given)}", f"{len(net.input)}, the rows of input")
    return given[0]


def _numbers(t: Tensor) -> list[int]:
    """The elements of a tensor that no transform differentiates or maps over."""
    while torch._C._functorch.is_functorch_wrapped_tensor(t):
        t = torch._C._functorch.get_unwrapped(t)
    return t.tolist()


Layer = Callable[[Tensor, Tensors, Sequence[Sequence[Tensor]], Layout], tuple[Tensor, Tensors]]


def run_network(
    net: Network,
    states: Sequence[Tensor],
    per_direction: int,
    bias: Callable[[Sequence[Tensor]], Tensor | None],
    layer: Layer,
) -> tuple[Tensor, Tensors]:
    """Layer upon layer: the product of the inputs of all steps, then the recurrence; dropout between them.

    Args:
        net: the checked arguments.
        states: Tensors[layers * directions, B, ...].
        per_direction: how many parameters a direction of a layer has.
        bias: what is added to the gates from the input, from the parameters of a direction.
        layer: ``(gates [N, D, ...], states [D, B, ...], parameters of each direction, layout) -> (y, states)``,
            y [N, D, P].

    Returns:
        ``(output, final states)`` in the form of the input and the initial states.
    """
    x, directions = net.input, net.directions
    starts = None
    if net.batch_sizes is not None:
        starts = torch.nn.functional.pad(net.batch_sizes.cumsum(0), (1, 0)).to(x.device)
    elif net.batch_first:
        x = x.transpose(0, 1)
    outer, batch = x.shape[:-1], states[0].shape[1]
    rows = math.prod(outer)
    x = x.reshape(rows, x.shape[-1])
    finals: list[Tensors] = []
    for k in range(net.num_layers):
        weights = net.weights(k, per_direction)
        biases = [bias(w) for w in weights]
        w_ih = weights[0][0] if directions == 1 else torch.cat([w[0] for w in weights])
        b = biases[0] if directions == 1 or biases[0] is None else torch.cat([b for b in biases if b is not None])
        gates = product.linear(x, w_ih, b).to(states[0].dtype).contiguous()
        of_layer = tuple(s[k * directions : (k + 1) * directions].contiguous() for s in states)
        y, final = layer(
            gates.reshape(rows, directions, w_ih.shape[0] // directions), of_layer, weights, Layout(batch, starts)
        )
        finals.append(final)
        x = y.reshape(rows, directions * y.shape[2])
        if net.dropout > 0 and net.train and k + 1 < net.num_layers:
            x = masking.drop("dropout", x, net.dropout)
    x = x.reshape(*outer, x.shape[-1])
    output = x.transpose(0, 1) if net.batch_first and net.batch_sizes is None else x
    return output, tuple(torch.cat(s) if net.num_layers > 1 else s[0] for s in zip(*finals))


# In the time of a grid's barrier, about 1.5 µs, a multiprocessor does some 2^18 multiply-adds.
_BARRIER_PRODUCTS = 2**18


def runs_as_stack(namespace: str, net: Network, gates: int, hidden: int) -> bool:
    """Whether the layers run side by side, in CUDA's C++ kernels.

    One after the other, L layers wait at L barriers where side by side they wait at one, but multiply their inputs,
    which else one product of tensor cores does, in the step: as many multiply-adds as those of the states. So a layer's
    products of a step must take less time than a barrier, and both weights of all layers must fit into shared memory. A
    prediction: no GPU has run both.
    """
    x = net.input
    if net.num_layers < 2 or net.bidirectional or net.batch_sizes is not None or x.numel() == 0:
        return False
    if (
        (net.dropout > 0 and net.train)
        or not (x.is_cuda or namespace == "pyops_emulator")
        or namespace == "pyops_triton"
    ):
        return False
    if not x.is_cuda:
        return True  # the emulator, whose kernels are here to be tested
    processors, shared = _multiprocessors(x.device)
    batch = x.shape[0 if net.batch_first else 1]
    units = -(-hidden // max(processors // net.num_layers, 1))
    fits = 2 * units * gates * hidden * x.element_size() <= shared and net.num_layers <= processors
    return fits and gates * hidden * hidden * batch < _BARRIER_PRODUCTS * processors


@tracing.constant
def _multiprocessors(device: torch.device) -> tuple[int, int]:
    """How many there are, and the bytes of shared memory that a block may take."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin


def run_stack(
    net: Network,
    states: Sequence[Tensor],
    per_direction: int,
    bias: Callable[[Sequence[Tensor]], Tensor | None],
    stack: Callable[..., tuple[Tensor, Tensors]],
) -> tuple[Tensor, Tensors]:
    """As ``run_network``, all layers at once.

    Args:
        net, states, per_direction, bias: as in ``run_network``.
        stack: ``(gates [N, ...] of the first layer, states [L, B, ...], w_ih [L - 1, ...], biases [L - 1, ...] or None,
            w_hh [L, ...]) -> (y [N, H], states)``, w_ih and biases those of the other layers.
    """
    x = net.input.transpose(0, 1) if net.batch_first else net.input
    layers = [net.weights(k, per_direction)[0] for k in range(net.num_layers)]
    biases = [bias(w) for w in layers]
    gates = product.linear(x.reshape(-1, x.shape[2]), layers[0][0], biases[0]).to(states[0].dtype)
    others = [b for b in biases[1:] if b is not None]
    y, finals = stack(
        gates.contiguous(),
        tuple(s.contiguous() for s in states),
        torch.stack([w[0] for w in layers[1:]]),
        torch.stack(others) if others else None,
        torch.stack([w[1] for w in layers]),
    )
    output = y.reshape(*x.shape[:2], y.shape[1])
    return output.transpose(0, 1) if net.batch_first else output, finals


def stack_by_step(
    layer: Callable[[int, Tensor, Tensors], tuple[Tensor, Tensors]],
    gates: Tensor,
    states: Tensors,
    w_ih: Tensor,
    b_ih: Tensor | None,
) -> tuple[Tensor, Tensors]:
    """A stack in plain torch, layer after layer: ``step_by_step`` of each, as ``layer(k, gates, states)``."""
    y, finals = gates, []
    for k in range(states[0].shape[0]):
        if k > 0:
            gates = torch.nn.functional.linear(y, w_ih[k - 1], None if b_ih is None else b_ih[k - 1])
        of_layer, final = layer(k, gates[:, None], tuple(s[k : k + 1] for s in states))
        y = of_layer[:, 0]
        finals.append(final)
    return y, tuple(torch.cat(s) for s in zip(*finals))


def stack_weight_gradients(
    dgates: Tensor, dh_gates: Tensor, h0: Tensor, weights: Tensors, kept: Tensors, needs: Sequence[bool]
) -> Tensors:
    """Those of w_ih, b_ih and w_hh, where ``needs`` them: of all steps of all layers one batched product each.

    Args:
        dgates, dh_gates: Tensor[L, N, gates H], gradients of the pre-activations from the input and from the state.
        weights: ``(w_ih, b_ih or None, w_hh)``.
        kept: y [N, H], the last layer's states after each step, and those of the others [L - 1, N, H].
    """
    (w_ih, b_ih, w_hh), (y, below) = weights, kept
    dw_ih, db_ih, dw_hh = torch.empty_like(w_ih), dgates.new_empty(0), torch.empty_like(w_hh)
    if needs[0]:
        dw_ih = dgates[1:].mT @ below
    if b_ih is not None and needs[1]:
        db_ih = dgates[1:].sum(1)
    if needs[2]:
        before = torch.cat((h0, torch.cat((below, y[None]))[:, : y.shape[0] - h0.shape[1]]), 1)
        dw_hh = dh_gates.mT @ before
    return dw_ih, db_ih, dw_hh


def stacked(weights: Sequence[Sequence[Tensor]], position: int) -> Tensor:
    """One parameter of all directions as [D, ...], contiguous."""
    if len(weights) == 1:
        return weights[0][position].unsqueeze(0).contiguous()
    return torch.stack([w[position] for w in weights])


def forward_of(module: type[torch.nn.RNNBase], **functions: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a module of torch, unchanged but for the functions of torch that it calls.

    So checks, messages, packed sequences and unbatched inputs are those of the torch that is installed.
    """
    theirs = module.forward
    names = {**theirs.__globals__, "_VF": SimpleNamespace(**functions)}
    del names["__name__"]  # by which torch.compile would look for the functions, and find torch's own
    forward = FunctionType(theirs.__code__, names, "forward", theirs.__defaults__, theirs.__closure__)
    forward.__kwdefaults__ = theirs.__kwdefaults__
    return forward
