"""Samples of the rooms lstm, gru and rnn, which differ in the gates of a unit and in the states a step hands on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from .samples import Maker

Make = Callable[[Maker], tuple[tuple, dict]]


def cell(gates: int, states: int, batch: int, features: int, hidden: int, bias: bool = True) -> Make:
    """Arguments ``(x, *states, w_ih, w_hh, b_ih, b_hh)`` of a single step."""

    def make(t: Maker) -> tuple[tuple, dict]:
        biases = (t.input((gates * hidden,)), t.input((gates * hidden,))) if bias else ()
        weights = t.input((gates * hidden, features)), t.input((gates * hidden, hidden))
        x = t.input((batch, features))
        return (x, *(t.input((batch, hidden)) for _ in range(states)), *weights, *biases), {}

    return make


def network(
    gates: int, states: int, shape: tuple[int, ...], hidden: int, layers: int = 1, directions: int = 1,
    project: int = 0, bias: bool = True, **settings: Any,
) -> Make:  # fmt: skip
    """Arguments of ``of_layers``: a sequence of this shape, the first states, the parameters of all layers."""

    def make(t: Maker) -> tuple[tuple, dict]:
        size = project or hidden
        batch_sizes = settings.get("batch_sizes")
        batch = batch_sizes[0] if batch_sizes else shape[0 if settings.get("batch_first") else 1]
        first = [t.input((layers * directions, batch, n)) for n in (size, hidden)[:states]]
        parameters = []
        for k in range(layers):
            for _ in range(directions):
                features = shape[-1] if k == 0 else size * directions
                parameters += [t.input((gates * hidden, features)), t.input((gates * hidden, size))]
                parameters += [t.input((gates * hidden,)), t.input((gates * hidden,))] if bias else []
                parameters += [t.input((size, hidden))] if project else []
        kwargs = {"layers": layers, "bidirectional": directions == 2, "bias": bias, **settings}
        return (t.input(shape), *first, *parameters), kwargs

    return make


def of_layers(function: Callable[..., Any], states: int) -> Callable[..., Any]:
    """torch.lstm, torch.gru, ... as a function of tensors alone, all parameters in a row, for the checks."""

    def call(x, *tensors, batch_sizes=None, bias=True, layers=1, bidirectional=False, batch_first=False):
        given = tensors[0] if states == 1 else tensors[:states]
        parameters, settings = tensors[states:], (bias, layers, 0.0, False, bidirectional)
        # cuDNN, which torch's own would take, has no backward outside training
        with torch.backends.cudnn.flags(enabled=False) if x.is_cuda else nullcontext():
            if batch_sizes is None:
                return function(x, given, parameters, *settings, batch_first)
            return function(x, torch.tensor(batch_sizes), given, parameters, *settings)

    return call
