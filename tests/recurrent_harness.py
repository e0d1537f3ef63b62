"""What the tests of lstm, gru and rnn share."""

import torch

from pyops.core import backend as backends


def equal(a, b, tolerance=1e-5):
    """Nested tuples of tensors, equal in structure and close in value."""
    if isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        return
    assert type(a) is type(b) and len(a) == len(b)
    for x, y in zip(a, b):
        if x is not None or y is not None:
            equal(x, y, tolerance)


def cells_agree(ours, theirs, hidden, states, backend):
    """Same repr and state_dict; equal steps of a batch and of one example, with state and without; equal gradients."""
    assert repr(ours) == repr(theirs)
    ours.load_state_dict(theirs.state_dict())
    for shape in ((3,), ()):
        x = torch.randn(*shape, theirs.input_size)
        state = tuple(torch.randn(*shape, hidden) for _ in range(states))
        state = state if states > 1 else state[0]
        with backends.backend(backend):
            equal(ours(x), theirs(x))
            equal(ours(x, state), theirs(x, state))
            grads = []
            for module in (ours, theirs):
                y = module(x, state)
                total = y.sin().sum() if states == 1 else y[0].sin().sum() + y[1].cos().sum()
                grads.append(torch.autograd.grad(total, tuple(module.parameters())))
            equal(*grads)
