"""What the rooms lstm, gru and rnn share: the checks and the matrix products of a cell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import autocast, check


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
        if t.dtype != input.dtype and not torch.is_autocast_enabled(input.device.type):
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
            check.fail(RuntimeError, op, name, f"shape {list(t.shape)}", f"shape {[batch, hidden]}")
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
    gates = torch.nn.functional.linear(input, weight_ih, joined(bias_ih, bias_hh))
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
