"""What the recurrent modules have beyond torch's, as arguments by keyword: dropout inside, truncated gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import check, masking

Plain = Callable[[Any, Any, Any], tuple[Any, Any]]


class Regularized:
    """Stands before a recurrent module of torch in the list of bases; ``_plain`` is the forward without all this.

    Args:
        input_dropout: probability with which a feature of the input is zeroed in training, the same features in all
            steps of a sequence (variational dropout: Gal, Ghahramani 2016, https://arxiv.org/abs/1512.05287).
        hidden_dropout: probability with which an element of the hidden-to-hidden weights is zeroed in training, the
            same elements in all steps and sequences (DropConnect: Wan et al. 2013; Merity et al. 2017,
            https://arxiv.org/abs/1708.02182). The kernels of the sequence see an ordinary weight.
        detach_every: how many steps a gradient flows back through at most: before each further piece of so many steps
            the states are detached. None: the whole sequence. One direction only.

    Kept elements are divided by 1 - p. Both masks come from counter-based random numbers (pyops.core.random).

    torch.compile breaks its graph at every module that is a torch.nn.RNN, GRU or LSTM, as these are, before it sees
    their forward: ``fullgraph=True`` needs ``torch._dynamo.config.allow_rnn = True``. The functions need nothing.
    """

    _plain: ClassVar[Plain]

    def __init__(
        self,
        *args: Any,
        input_dropout: float = 0.0,
        hidden_dropout: float = 0.0,
        detach_every: int | None = None,
        **kwargs: Any,
    ) -> None:
        name = type(self).__name__
        masking.check_probability(name, "input_dropout", input_dropout)
        masking.check_probability(name, "hidden_dropout", hidden_dropout)
        if detach_every is not None:
            if isinstance(detach_every, bool) or not isinstance(detach_every, int):
                check.fail(TypeError, name, "detach_every", type(detach_every).__name__, "a number of steps or None")
            if detach_every < 1:
                check.fail(ValueError, name, "detach_every", detach_every, "at least one step")
        for argument, size in (dict(zip(("input_size", "hidden_size"), args)) | kwargs).items():
            if argument in ("input_size", "hidden_size"):
                if not isinstance(size, int):
                    check.fail(TypeError, name, argument, type(size).__name__, "an int")
                if size < 1:
                    check.fail(ValueError, name, argument, size, "an int > 0")
        super().__init__(*args, **kwargs)
        if detach_every is not None and self.bidirectional:  # type: ignore[attr-defined]
            expected = "None with bidirectional=True, whose second direction starts at the last step"
            check.fail(ValueError, name, "detach_every", detach_every, expected)
        self.input_dropout = float(input_dropout)
        self.hidden_dropout = float(hidden_dropout)
        self.detach_every = detach_every

    def extra_repr(self) -> str:
        text = super().extra_repr()  # type: ignore[misc]
        for name, unset in (("input_dropout", 0.0), ("hidden_dropout", 0.0), ("detach_every", None)):
            if getattr(self, name) != unset:
                text += f", {name}={getattr(self, name)}"
        return text

    def check_forward_args(self, input: Tensor, hidden: Any, batch_sizes: Tensor | None) -> None:
        """torch's checks, in the name of the module."""
        size = self.input_size  # type: ignore[attr-defined]
        if input.dim() == (3 if batch_sizes is None else 2) and input.shape[-1] != size:
            expected = f"input_size {size} in its last dimension"
            check.fail(RuntimeError, type(self).__name__, "input", f"shape {list(input.shape)}", expected)
        try:
            super().check_forward_args(input, hidden, batch_sizes)  # type: ignore[misc]
        except RuntimeError as error:
            raise RuntimeError(f"{type(self).__name__}: {error}") from None

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:
        plain = type(self)._plain
        drops = self.training and (self.input_dropout > 0 or self.hidden_dropout > 0)  # type: ignore[attr-defined]
        if not drops and self.detach_every is None:
            return plain(self, input, hx)
        if drops and self.input_dropout > 0:
            input = _drop_features(type(self).__name__, input, self.input_dropout, self.batch_first)  # type: ignore[attr-defined]
        run = plain if self.detach_every is None else _in_pieces(plain, self.detach_every)
        if not drops or self.hidden_dropout == 0:
            return run(self, input, hx)
        module: Any = self
        module._update_flat_weights()
        weights = module._flat_weights
        names = module._flat_weights_names
        module._flat_weights = [
            masking.drop(type(self).__name__, w, self.hidden_dropout) if n.startswith("weight_hh") else w
            for n, w in zip(names, weights)
        ]
        try:
            return run(self, input, hx)
        finally:
            module._flat_weights = weights


def _drop_features(op: str, input: Any, p: float, batch_first: bool) -> Any:
    """One mask for each sequence, for all its steps."""
    if isinstance(input, PackedSequence):
        sizes = input.batch_sizes
        mask = masking.drop(op, torch.ones_like(input.data[: int(sizes[0])]), p)
        # sequence r of a step is row r of the batch in all of them
        first = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
        place = (torch.arange(len(input.data)) - first).to(input.data.device)
        return input._replace(data=input.data * mask[place])
    if not isinstance(input, Tensor) or input.dim() not in (2, 3):
        return input  # torch says what is wrong with it
    time = 1 if batch_first and input.dim() == 3 else 0
    return input * masking.drop(op, torch.ones_like(input.narrow(time, 0, min(1, input.shape[time]))), p)


def _detached(states: Any) -> Any:
    return states.detach() if isinstance(states, Tensor) else tuple(s.detach() for s in states)


def _each(function: Callable[..., Tensor], *states: Any) -> Any:
    """A function of the states of a GRU or RNN, or of both states (h, c) of an LSTM."""
    if isinstance(states[0], Tensor):
        return function(*states)
    return tuple(function(*s) for s in zip(*states))


def _in_pieces(plain: Plain, steps: int) -> Plain:
    """The forward, ``steps`` steps at a time, with states detached in between."""

    def run(module: Any, input: Any, hx: Any) -> tuple[Any, Any]:
        if isinstance(input, PackedSequence):
            return _packed_in_pieces(plain, steps, module, input, hx)
        if not isinstance(input, Tensor) or input.dim() not in (2, 3):
            return plain(module, input, hx)
        time = 1 if module.batch_first and input.dim() == 3 else 0
        outputs: list[Tensor] = []
        for piece in input.split(steps, time):
            y, hx = plain(module, piece, _detached(hx) if outputs else hx)
            outputs.append(y)
        return torch.cat(outputs, time), hx

    return run


def _packed_in_pieces(plain: Plain, steps: int, module: Any, input: PackedSequence, hx: Any) -> tuple[Any, Any]:
    """Sequences that have ended leave the batch from its end: their states wait until all have."""
    sizes, sorted_by = input.batch_sizes, input.sorted_indices
    if hx is not None:
        hx = module.permute_hidden(hx, sorted_by)
    outputs: list[Tensor] = []
    ended: list[Any] = []
    running = 0
    pieces = sizes.split(steps)
    for data, piece in zip(input.data.split([int(p.sum()) for p in pieces]), pieces):
        if outputs:
            count = int(piece[0])
            ended.append(_each(partial(torch.narrow, dim=1, start=count, length=running - count), hx))
            hx = _detached(_each(partial(torch.narrow, dim=1, start=0, length=count), hx))
        running = int(piece[0])
        y, hx = plain(module, PackedSequence(data, piece), hx)
        outputs.append(y.data)
    hx = _each(lambda *s: torch.cat(s, 1), hx, *reversed(ended))
    return input._replace(data=torch.cat(outputs)), module.permute_hidden(hx, input.unsorted_indices)
