"""What the tests of every room share."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from pyops import testing
from pyops.core import backend as backends
from pyops.core import library


def passes(op: str, backend: str, check: str) -> None:
    """One check of pyops.testing on one op and backend."""
    (result,) = testing.check_room(op, backend, [check])
    assert result.ok, result.detail


@contextmanager
def device_of(backend: str, capability: int) -> Iterator[None]:
    """On the emulator, a device of that compute capability (80: no clusters, no TMA, no wgmma; 90: all of them)."""
    if backend == "emulator":
        library.configure_emulator(capability=capability)
    try:
        yield
    finally:
        if backend == "emulator":
            library.configure_emulator(capability=90)


def refuses(kind: type[Exception], words: tuple[str, ...], function, *args, **kwargs) -> None:
    """The call raises exactly this type (or torch's subclass of it), naming op, argument, got and expected."""
    with pytest.raises(kind) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    for word in (*words, "got", "expected"):
        assert word in message, f"{word!r} is missing in {message!r}"


def same_refusal(ours, theirs, *args, **kwargs) -> None:
    """torch raises on this call, and pyops raises the same type or a subclass of it."""
    with pytest.raises(Exception) as expected:
        theirs(*args, **kwargs)
    with pytest.raises(expected.type):
        ours(*args, **kwargs)


def modules_agree(ours: torch.nn.Module, theirs: torch.nn.Module, x: torch.Tensor, backend: str) -> None:
    """Same repr, interchangeable state_dict, equal outputs in training and eval, equal buffers afterwards."""
    assert repr(ours) == repr(theirs)
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn_like(p))
    ours.load_state_dict(theirs.state_dict())
    with backends.backend(backend):
        for _ in range(2):
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
        ours.eval(), theirs.eval()
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    for (name, a), (_, b) in zip(ours.state_dict().items(), theirs.state_dict().items()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)
