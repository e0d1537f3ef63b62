"""What a bench room is made of: cases, providers and the functions that the room states about them."""

import contextlib
import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

Tensors = dict[str, torch.Tensor]
Function = Callable[[Tensors], torch.Tensor]

SHORT_DTYPE = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Unavailable(Exception):
    """A provider cannot run on this machine; the message says why. Never raised for a wrong or broken kernel."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One measured situation: an op on one shape, dtype and device, forward or forward and backward.

    Args:
        op: name in ``torch.nn.functional``.
        shape: shape of ``x``.
        args: further arguments of the op, as the room's ``bind`` reads them.
        backward: also compute the gradients of every differentiable input.
        channels_last: ``x`` and ``dy`` are in channels_last memory format.
        quick: belongs to the subset of ``--quick``.
        output: shape of ``y`` and so of ``dy``, where it is not that of ``x``.
    """

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    backward: bool = False
    channels_last: bool = False
    quick: bool = False
    args: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    output: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        """Readable and unique within a room: the op, the shape, and what distinguishes the case."""
        words = [self.op, "×".join(map(str, self.shape)), SHORT_DTYPE[self.dtype]]
        words += [f"{key}={value}" for key, value in self.args.items()]
        words += ["NHWC"] if self.channels_last else []
        return " ".join([*words, "fwd+bwd" if self.backward else "fwd"])

    @property
    def numel(self) -> int:
        product = 1
        for size in self.shape:
            product *= size
        return product


@dataclasses.dataclass(frozen=True)
class Provider:
    """One implementation of an op.

    Args:
        make: returns the function to be timed; raises `Unavailable` where it cannot run.
        context: entered around every use of the function, outside the timed region.
        channels_last: hand it ``x`` and ``dy`` in channels_last, whatever the case says.
        ours: True for pyops: a wrong result fails the whole run, and ratios refer to it.
    """

    make: Callable[[], Function]
    context: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    channels_last: bool = False
    ours: bool = False


class Room(Protocol):
    """What every ``bench_<stem>.py`` states; a module satisfies it."""

    STEM: str
    OPS: tuple[str, ...]

    def cases(self, device: str) -> list[Case]:
        """The measured cases, most valuable first."""

    def tiny(self, device: str) -> list[Case]:
        """The smallest cases that reach every kernel: for tests and for compute-sanitizer."""

    def shapes(self, case: Case) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor argument besides ``x``."""

    def bytes(self, case: Case) -> int:
        """The least traffic with memory: every input read once, every output written once."""

    def flops(self, case: Case) -> int:
        """Floating-point operations of the plain formula."""

    # A room may also state `traffic(case) -> (bytes, launches)`, what its CUDA kernels move and in how many launches,
    # where that is more than the least; `MATRIX = True` where its flops run on tensor cores; `CENTRED`, names of
    # weights that are drawn around zero and scaled by their row, so that gates do not saturate; `apart(case, x)`,
    # which moves the numbers of x, or of the input `APART` names, where the op or its gradient jumps: what stands there
    # is rounding's choice; and `algorithm(case, provider)`, which of its algorithms a provider of pyops takes, as
    # `explain` says it.

    def bind(self, functional: Any, case: Case) -> Function:
        """The call of the case on a namespace with the signatures of ``torch.nn.functional``."""

    def providers(self, case: Case) -> dict[str, Provider]:
        """Every implementation to compare, by name."""


def with_both_directions(cases: list[Case]) -> list[Case]:
    """Each case forward, then forward and backward."""
    return [dataclasses.replace(case, backward=backward) for case in cases for backward in (False, True)]
