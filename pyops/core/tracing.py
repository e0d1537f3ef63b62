"""What torch.compile is told about functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable)


def constant(function: F) -> F:
    """torch.compile calls the function while it traces, and keeps the answer.

    This is torch.compiler.assume_constant_result, which would import the compiler, as long a wait as that for torch.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
