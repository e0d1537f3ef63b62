"""Long short-term memory whose gates are layer-normalised.

    a = n(x W_ih') * gain_ih + b_ih + n(h W_hh') * gain_hh + b_hh        i, f, o = sigmoid, g = tanh of its parts
    c' = f * c + i * g                                                   h' = o * tanh(n(c') * gain_c + bias_c)
    n(v) = (v - mean(v)) / sqrt(var(v) + eps), over all of a row: the 4 H gates together, the H cells

    x: [B, I]   h, c, h', c': [B, H]   W_ih: [4 H, I], W_hh: [4 H, H], gain_ih, gain_hh, b_ih, b_hh: [4 H], the gates
    in the order i f g o   gain_c, bias_c: [H]

Source: Ba, Kiros, Hinton 2016, https://arxiv.org/abs/1607.06450, equations 20 to 22, whose bias b is in b_ih and b_hh
here. The gradient is derived in docs/math/recurrent.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core import autocast, backend, check, library, product, recurrent
from ..core.autograd import Formula, differentiable
from ..core.regularized import Regularized
from ..core.samples import Maker, Sample, checked

_kernels = library.triton_kernels("layer_norm_lstm")


def _fwd_fake(x, y, c, gain_x, gain_y, bias, gain_c, bias_c, eps):
    statistics = c.new_empty((c.shape[0], 6), dtype=check.accumulate_dtype(c.dtype))
    return torch.empty_like(c), torch.empty_like(c), statistics


def _bwd_fake(dh, dc, x, y, c, gain_x, gain_y, bias, gain_c, bias_c, next_c, statistics):
    da, dz = torch.empty_like(x, dtype=statistics.dtype), torch.empty_like(c, dtype=statistics.dtype)
    return torch.empty_like(x), torch.empty_like(y), torch.empty_like(c), da, dz


_fwd = library.declare(
    "layer_norm_lstm_gates_fwd(Tensor x, Tensor y, Tensor c, Tensor gain_x, Tensor gain_y, Tensor? bias, Tensor gain_c,"
    " Tensor? bias_c, float eps) -> (Tensor, Tensor, Tensor)",
    _fwd_fake,
    _kernels,
)
_bwd = library.declare(
    "layer_norm_lstm_gates_bwd(Tensor? dh, Tensor? dc, Tensor x, Tensor y, Tensor c, Tensor gain_x, Tensor gain_y,"
    " Tensor? bias, Tensor gain_c, Tensor? bias_c, Tensor next_c, Tensor statistics)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _bwd_fake,
    _kernels,
)


def _normalised(v, eps):
    """The row with mean 0 and variance 1, its mean and 1 / deviation."""
    mean = v.mean(-1, keepdim=True)
    rstd = ((v - mean).square().mean(-1, keepdim=True) + eps).rsqrt()
    return (v - mean) * rstd, mean, rstd


def _reference(x, y, c, gain_x, gain_y, bias, gain_c, bias_c, eps):
    wide = check.accumulate_dtype(c.dtype)
    x_n, *of_x = _normalised(x.to(wide), eps)
    y_n, *of_y = _normalised(y.to(wide), eps)
    a = x_n * gain_x + y_n * gain_y
    i, f, g, o = (a if bias is None else a + bias).chunk(4, 1)
    next_c = (f.sigmoid() * c + i.sigmoid() * g.tanh()).to(c.dtype)
    z, *of_c = _normalised(next_c.to(wide), eps)
    z = z * gain_c
    h = o.sigmoid() * (z if bias_c is None else z + bias_c).tanh()
    return h.to(c.dtype), next_c, torch.cat((*of_x, *of_y, *of_c), 1).detach()


def _finish(results, inputs, kept, needs):
    """The gradients of gains and biases: sums over the rows."""
    dx, dy, dc, da, dz = results
    x, y, _, gain_x, gain_y, bias, gain_c, bias_c = inputs
    next_c, statistics = kept
    nothing = dx.new_empty(0)

    def of_gain(wanted, gradient, v, k):
        if not wanted:
            return nothing
        mean, rstd = statistics[:, k : k + 1], statistics[:, k + 1 : k + 2]
        return (gradient * (v.to(statistics.dtype) - mean) * rstd).sum(0).to(v.dtype)

    def of_bias(wanted, b, gradient):
        return gradient.sum(0).to(dx.dtype) if wanted and b is not None else nothing

    return (
        dx,
        dy,
        dc,
        of_gain(needs[3], da, x, 0),
        of_gain(needs[4], da, y, 2),
        of_bias(needs[5], bias, da),
        of_gain(needs[6], dz, next_c, 4),
        of_bias(needs[7], bias_c, dz),
    )


_apply = differentiable(
    Formula(
        _fwd, _bwd, 8, 8,
        lambda dy, inputs, kept, constants, needs: (*dy, *inputs, *kept),
        _reference, outputs=2, keep=(1, 2), finish=_finish,
    )
)  # fmt: skip


def _check_normalisation(op: str, x: Tensor, hidden: int, named: dict[str, Tensor | None], eps: float) -> None:
    """Each gain or bias fits: those of the cell have H elements, those of the gates 4 H."""
    check.non_negative(op, "eps", eps)
    for name, t in named.items():
        if t is None and "bias" in name:
            continue
        if not isinstance(t, Tensor):
            check.fail(TypeError, op, name, type(t).__name__, "a tensor")
        size = hidden if name.split("[")[0] in ("gain_c", "bias_c") else 4 * hidden
        if t.shape != (size,):
            check.fail(RuntimeError, op, name, f"shape {list(t.shape)}", f"shape {[size]}")
        if t.device != x.device:
            check.fail(RuntimeError, op, name, f"a tensor on {t.device}", f"one on {x.device}, as the input")
        if t.dtype != x.dtype and not autocast.enabled(x):
            check.fail(RuntimeError, op, name, t.dtype, f"{x.dtype}, as the input")


def layer_norm_lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    gain_ih: Tensor,
    gain_hh: Tensor,
    gain_c: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    bias_c: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """One step of an LSTM whose gates and cell are layer-normalised.

    ``c' = f * c + i * g``, ``h' = o * tanh(n(c') * gain_c + bias_c)``; the gates ``i, f, g, o`` are sigmoid (g: tanh)
    of the four parts of ``n(input @ w_ih.T) * gain_ih + b_ih + n(h @ w_hh.T) * gain_hh + b_hh``, and ``n`` gives a row
    mean 0 and variance 1. Both matrix products are as in ``linear``, all else is one kernel.

    Args:
        input: Tensor[B, I], float32, float64, bfloat16 or float16, any strides.
        hx: the pair (h, c) of Tensor[B, H].
        w_ih: Tensor[4 H, I].
        w_hh: Tensor[4 H, H].
        gain_ih, gain_hh: Tensor[4 H].
        gain_c: Tensor[H].
        b_ih, b_hh: Tensor[4 H] or None (0).
        bias_c: Tensor[H] or None (0).
        eps: added to each variance, >= 0.

    Returns:
        The pair (h', c') of Tensor[B, H].

    Raises:
        RuntimeError: shapes, devices or dtypes that do not fit together.
        TypeError: something else than tensors.
        ValueError: a negative eps.

    Sums and gates are computed in float32 (float64 for float64); the normalisation of c' reads it as it is returned.
    Bitwise deterministic. Under autocast the products run in its low precision, and on the CPU the states keep their
    dtype. Gradients of every order (from the second on in plain torch), forward mode, vmap (by torch), torch.compile.
    Source: Ba, Kiros, Hinton 2016, https://arxiv.org/abs/1607.06450.
    """
    op = "layer_norm_lstm_cell"
    h, c = recurrent.pair(op, "hx", hx)
    recurrent.check_cell(op, 4, input, {"hx[0]": h, "hx[1]": c}, w_ih, w_hh, b_ih, b_hh)
    named = {"gain_ih": gain_ih, "gain_hh": gain_hh, "gain_c": gain_c, "bias_c": bias_c}
    _check_normalisation(op, input, c.shape[1], named, eps)
    given = (input, h, c, w_ih, w_hh, gain_ih, gain_hh, gain_c, b_ih, b_hh, bias_c)
    input, h, c, w_ih, w_hh, gain_ih, gain_hh, gain_c, b_ih, b_hh, bias_c = recurrent.cast("lstm_cell", *given)
    x = product.linear(input, w_ih).to(c.dtype)
    small = gain_ih, gain_hh, recurrent.joined(b_ih, b_hh), gain_c, bias_c
    rows: Any = (*(t if t is None else t.contiguous() for t in small), float(eps))
    y = product.linear(h, w_hh).to(c.dtype)
    states = _apply(backend.namespace_for(op, input), x.contiguous(), y.contiguous(), c.contiguous(), *rows)
    return states[:2]


# A layer over all steps; the letters are those of csrc/common/recurrent.h


def _layer_fwd_fake(x, h0, c0, w_hh, gain_x, gain_y, bias, gain_c, bias_c, starts, eps, keep):
    rows, directions, hidden = x.shape[0], h0.shape[0], h0.shape[2]
    kept = (
        torch.empty_like(x) if keep else x.new_empty(0),
        x.new_empty((rows, directions, hidden) if keep else 0),
        x.new_empty((rows, directions, 6) if keep else 0, dtype=check.accumulate_dtype(x.dtype)),
    )
    return x.new_empty(rows, directions, hidden), torch.empty_like(h0), torch.empty_like(c0), *kept


def _layer_bwd_fake(
    dy, dh_n, dc_n, x, h0, c0, w_hh, gain_x, gain_y, bias, gain_c, bias_c, starts, products, cells, statistics
):
    of_rows, of_states = (torch.empty_like(x), torch.empty_like(x)), (torch.empty_like(h0), torch.empty_like(c0))
    given = (gain_x, gain_y, bias, gain_c, bias_c)
    return (*of_rows, *of_states, *(x.new_empty(0) if p is None else torch.empty_like(p) for p in given))


_layer_fwd = library.declare(
    "layer_norm_lstm_layer_fwd(Tensor x, Tensor h0, Tensor c0, Tensor w_hh, Tensor gain_x, Tensor gain_y, Tensor? bias,"
    " Tensor gain_c, Tensor? bias_c, Tensor? starts, float eps, bool keep)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _layer_fwd_fake,
    _kernels,
)
_layer_bwd = library.declare(
    "layer_norm_lstm_layer_bwd(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor x, Tensor h0, Tensor c0, Tensor w_hh,"
    " Tensor gain_x, Tensor gain_y, Tensor? bias, Tensor gain_c, Tensor? bias_c, Tensor? starts, Tensor products,"
    " Tensor cells, Tensor statistics)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _layer_bwd_fake,
    _kernels,
)


def _layer_reference(x, h0, c0, w_hh, gain_x, gain_y, bias, gain_c, bias_c, starts, eps, keep):
    def step(x, states, w_hh, *parameters):
        return _reference(x, states[0] @ w_hh.mT, states[1], *(*parameters, eps))[:2]

    of_directions = [
        tuple(None if p is None else p[d] for p in (w_hh, gain_x, gain_y, bias, gain_c, bias_c))
        for d in range(h0.shape[0])
    ]
    y, (h_n, c_n) = recurrent.step_by_step(step, x, (h0, c0), starts, of_directions)
    return y, h_n, c_n, *_layer_fwd_fake(x, h0, c0, w_hh, gain_x, gain_y, bias, gain_c, bias_c, starts, eps, keep)[3:]


def _layer_finish(results, inputs, kept, needs):
    """The gradient of the recurrent weights: of all steps one product."""
    dx, dproducts, dh0, dc0, *of_parameters = results
    h0, w_hh, starts = inputs[1], inputs[3], inputs[9]
    dw_hh = recurrent.weight_gradient(dproducts, kept[0], h0, starts) if needs[3] else torch.empty_like(w_hh)
    return dx, dh0, dc0, dw_hh, *of_parameters


_apply_layer = differentiable(
    Formula(
        _layer_fwd, _layer_bwd, 10, 9,
        lambda dy, inputs, kept, constants, needs: (*dy, *inputs, *kept[1:]),
        _layer_reference, outputs=3, keep=(0, 3, 4, 5), finish=_layer_finish,
    )
)  # fmt: skip


def layer_norm_lstm(
    input: Tensor,
    hx: Any,
    params: Any,
    has_biases: Any,
    num_layers: Any,
    dropout: Any,
    train: Any,
    bidirectional: Any,
    batch_first: Any,
    *,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """A layer-normalised LSTM over sequences; its arguments are those of torch.lstm, in both of its forms.

    Args:
        params: for each layer and direction ``w_ih`` [4 H, I], ``w_hh`` [4 H, H], ``b_ih`` and ``b_hh`` [4 H] if there
            are biases, ``gain_ih`` and ``gain_hh`` [4 H], ``gain_c`` [H], and ``bias_c`` [H] if there are biases.
        eps: added to each variance, >= 0.
        input, hx, has_biases, num_layers, dropout, train, bidirectional, batch_first: as in pyops.functional.lstm,
            packed sequences as well.

    Returns:
        The output Tensor[T, B, directions * H] in the form of the input, and the final h and c in the form of ``hx``.

    Raises:
        RuntimeError, TypeError, ValueError: as pyops.functional.lstm.

    The product of the inputs of all steps is one matrix product, so is the gradient of each weight; between them one
    kernel runs over all steps. h is rounded to the dtype in each step, c is not within a call. Bitwise deterministic.
    Gradients of every order (from the second on step by step in torch), forward mode, vmap
    (by torch) and torch.compile. Under autocast in its low precision on a GPU; on the CPU the products of the inputs
    alone are. Formula: ``layer_norm_lstm_cell``.
    """
    op = "layer_norm_lstm"
    net = recurrent.Network.of(
        isinstance(hx, Tensor),
        (input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first),
    )
    h, c = recurrent.pair(op, "hx", net.hx)
    of_torch, per = (4, 8) if net.has_biases else (2, 5)
    count = net.num_layers * net.directions
    if len(net.params) != per * count:
        expected = f"{per} for each of {net.num_layers} layers and {net.directions} directions"
        check.fail(RuntimeError, op, "params", f"{len(net.params)} tensors", expected)
    groups = [net.params[k * per : (k + 1) * per] for k in range(count)]
    names = ("gain_ih", "gain_hh", "gain_c", "bias_c")
    recurrent.check_network(op, net._replace(params=[p for g in groups for p in g[:of_torch]]), (h, c), 4, False)
    for k, group in enumerate(groups):
        named = {f"{name}[{k}]": p for name, p in zip(names, group[of_torch:])}
        _check_normalisation(op, net.input, h.shape[2], named, eps)
    x, h, c, *cast = recurrent.cast("lstm_by_steps", net.input, h, c, *net.params)
    net = net._replace(input=x, params=cast)
    namespace = backend.namespace_for(op, x)

    def layer(products, states, weights, layout):
        w_hh = recurrent.stacked(weights, 1).to(products.dtype)
        gain_ih, gain_hh, gain_c = (recurrent.stacked(weights, of_torch + k) for k in range(3))
        bias = bias_c = None
        if net.has_biases:
            bias = recurrent.joined(recurrent.stacked(weights, 2), recurrent.stacked(weights, 3))
            bias_c = recurrent.stacked(weights, -1)
        given = (products, *states, w_hh, gain_ih, gain_hh, bias, gain_c, bias_c)
        y, h_n, c_n, *_ = _apply_layer(namespace, *given, layout.starts, float(eps), recurrent.keeps(*given))
        return y, (h_n, c_n)

    output, (h_n, c_n) = recurrent.run_network(net, (h, c), per, lambda w: None, layer)
    return output, h_n, c_n


class LayerNormLSTMCell(torch.nn.LSTMCell):
    """A step of a layer-normalised LSTM: ``layer_norm_lstm_cell`` with torch.nn.LSTMCell's parameters and gains.

    Args:
        input_size, hidden_size, bias, device, dtype: as torch.nn.LSTMCell.
        eps: added to each variance.

    Beside torch's parameters: gain_ih, gain_hh [4 H] and gain_c [H], at first 1; with bias, bias_c [H], at first 0.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        eps: float = 1e-5,
    ) -> None:
        check.non_negative("LayerNormLSTMCell", "eps", eps)
        super().__init__(input_size, hidden_size, bias, device, dtype)
        self.eps = eps
        for name, value in _new_parameters(self.weight_hh, bias):
            setattr(self, name, value)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        _reset_normalisation(self)

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        bias_c = self.bias_c if self.bias else None

        def cell(x, states, w_ih, w_hh, b_ih, b_hh):
            gains = self.gain_ih, self.gain_hh, self.gain_c
            return layer_norm_lstm_cell(x, states, w_ih, w_hh, *gains, b_ih, b_hh, bias_c, self.eps)

        return recurrent.run_cell("LayerNormLSTMCell", self, cell, input, hx, 2)


class LayerNormLSTM(Regularized, torch.nn.LSTM):
    """A layer-normalised LSTM: ``layer_norm_lstm`` with torch.nn.LSTM's parameters and gains.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as torch.nn.LSTM.
        eps: added to each variance.
        input_dropout: variational dropout of the input's features.
        hidden_dropout: DropConnect on the hidden-to-hidden weights.
        detach_every: steps after which gradients stop; see pyops.nn.LSTM.

    Raises:
        ValueError: a negative eps; a ``proj_size``: the states of Ba et al. are not projected.

    Beside torch's parameters, for each layer and direction: gain_ih_l0, gain_hh_l0 [4 H] and gain_c_l0 [H], at first 1,
    and, with bias, bias_c_l0 [H], at first 0. torch.compile with ``fullgraph=True`` needs
    ``torch._dynamo.config.allow_rnn = True``, as for torch.nn.LSTM.
    """

    def __init__(self, *args: Any, eps: float = 1e-5, **kwargs: Any) -> None:
        check.non_negative("LayerNormLSTM", "eps", eps)
        super().__init__(*args, **kwargs)
        if self.proj_size:
            check.fail(ValueError, "LayerNormLSTM", "proj_size", self.proj_size, "0")
        self.eps = eps
        _forward_with(eps)
        names = [list(group) for group in self._all_weights]  # type: ignore[has-type]
        for group in names:
            suffix = group[0].removeprefix("weight_ih")
            for name, value in _new_parameters(getattr(self, f"weight_hh{suffix}"), self.bias):
                setattr(self, name + suffix, value)
                group.append(name + suffix)
        self._all_weights = names
        self._flat_weights_names = [name for group in names for name in group]
        self._init_flat_weights()

    def flatten_parameters(self) -> None:
        """Nothing: cuDNN knows no such layer."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        _reset_normalisation(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _forward_with(self.eps)

    def _plain(self, input: Any, hx: Any) -> tuple[Any, Any]:
        return _forward_with(self.eps)(self, input, hx)


# eps -> torch's forward, unchanged but for the function that it calls. torch.compile can call one and make none, so a
# module sees to its own before it runs.
_forwards: dict[float, Callable[..., Any]] = {}


def _forward_with(eps: float) -> Callable[..., Any]:
    if eps not in _forwards:

        def function(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
            return layer_norm_lstm(*arguments, eps=eps)

        _forwards[eps] = recurrent.forward_of(torch.nn.LSTM, lstm=function)
    return _forwards[eps]


def _new_parameters(like: Tensor, bias: bool) -> list[tuple[str, torch.nn.Parameter]]:
    """Gains of 1 and a bias of 0, beside the weight [4 H, H]."""
    gates, hidden = like.shape
    sizes = {"gain_ih": gates, "gain_hh": gates, "gain_c": hidden}
    found = [(name, torch.nn.Parameter(like.new_ones(n).detach())) for name, n in sizes.items()]
    return found + ([("bias_c", torch.nn.Parameter(like.new_zeros(hidden).detach()))] if bias else [])


def _reset_normalisation(module: torch.nn.Module) -> None:
    for name, p in module.named_parameters():
        if name.startswith(("gain_", "bias_c")):
            torch.nn.init.constant_(p, 1.0 if name.startswith("gain_") else 0.0)


def _cell_truth(x, h, c, w_ih, w_hh, gain_ih, gain_hh, gain_c, b_ih=None, b_hh=None, bias_c=None, eps=1e-5):
    """The same in plain torch, by its layer_norm."""
    norm = lambda v, gain, bias: torch.nn.functional.layer_norm(v, gain.shape, gain, bias, eps)
    i, f, g, o = (norm(x @ w_ih.mT, gain_ih, b_ih) + norm(h @ w_hh.mT, gain_hh, b_hh)).chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * norm(c, gain_c, bias_c).tanh(), c


def _truth(x, h0, c0, *params, has_biases=True, num_layers=1, bidirectional=False):
    """Cells of plain torch, step by step, over [T, B, I]."""
    per, directions = (8 if has_biases else 5), (2 if bidirectional else 1)
    h_n, c_n = [], []
    for k in range(num_layers):
        ys = []
        for d in range(directions):
            at = k * directions + d
            w_ih, w_hh, *rest = params[at * per : (at + 1) * per]
            biases, gains = (rest[:2], rest[2:]) if has_biases else ((None, None), rest)
            bias_c = gains[3] if has_biases else None
            h, c, found = h0[at], c0[at], []
            parameters: Any = (*gains[:3], *biases, bias_c)
            for step in x if d == 0 else x.flip(0):
                h, c = _cell_truth(step, h, c, w_ih, w_hh, *parameters)
                found.append(h)
            ys.append(torch.stack(found if d == 0 else found[::-1]))
            h_n.append(h)
            c_n.append(c)
        x = torch.cat(ys, 2)
    return x, torch.stack(h_n), torch.stack(c_n)


def _flat_cell(x, h, c, *parameters, **settings):
    return layer_norm_lstm_cell(x, (h, c), *parameters, **settings)


def _flat_layers(x, h0, c0, *params, has_biases=True, num_layers=1, bidirectional=False):
    return layer_norm_lstm(x, (h0, c0), params, has_biases, num_layers, 0.0, False, bidirectional, False)


def _cell_sample(batch, features, hidden, bias=True, **settings):
    def make(t: Maker):
        gates = 4 * hidden
        shapes: list[tuple[int, ...]] = [
            (batch, features),
            (batch, hidden),
            (batch, hidden),
            (gates, features),
            (gates, hidden),
        ]
        shapes += [(gates,), (gates,), (hidden,)] + ([(gates,), (gates,), (hidden,)] if bias else [])
        return tuple(t.input(s) for s in shapes), settings

    return make


def _layers_sample(shape, hidden, bias=True, layers=1, directions=1):
    def make(t: Maker):
        gates, states = 4 * hidden, (layers * directions, shape[1], hidden)
        shapes: list[tuple[int, ...]] = [shape, states, states]
        for k in range(layers):
            for _ in range(directions):
                shapes += [(gates, shape[2] if k == 0 else directions * hidden), (gates, hidden)]
                shapes += [(gates,), (gates,)] if bias else []
                shapes += [(gates,), (gates,), (hidden,)] + ([(hidden,)] if bias else [])
        settings = {"has_biases": bias, "num_layers": layers, "bidirectional": directions == 2}
        return tuple(t.input(s) for s in shapes), settings

    return make


checked(
    "layer_norm_lstm_cell",
    _flat_cell,
    _cell_truth,
    Sample("ragged, tail of a vector load", _cell_sample(2, 2, 2), derivatives=True),
    Sample("no bias, another eps", _cell_sample(3, 2, 5, bias=False, eps=0.1)),
    Sample("several vectors, more units than threads", _cell_sample(2, 2, 259)),
    Sample("no rows", _cell_sample(0, 3, 5)),
)
checked(
    "layer_norm_lstm",
    _flat_layers,
    _truth,
    Sample("one layer", _layers_sample((2, 1, 1), 2), derivatives=True),
    Sample("two layers", _layers_sample((2, 2, 3), 4, layers=2)),
    Sample("two directions, no bias", _layers_sample((2, 2, 3), 5, bias=False, directions=2)),
)
