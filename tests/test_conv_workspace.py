"""Convolutions on the CPU take little memory besides their tensors, and no more than ``explain`` says."""

import pytest
import torch

from pyops import functional as F
from pyops.core import convolution_notes

from .harness import peak_bytes

CEILING, ROUGHLY = 32 << 20, 3 << 20  # for all temporary memory; what the allocator and pages add

# op, input, weight, groups, further arguments; whole columns of the first would take 302 MB
CALLS = {
    "dense": ("conv2d", (1, 64, 362, 362), (8, 64, 3, 3), 1, {"padding": 1}),
    "stride": ("conv2d", (1, 64, 256, 256), (16, 64, 3, 3), 1, {"padding": 1, "stride": 2}),
    "1x1": ("conv2d", (2, 64, 192, 192), (32, 64, 1, 1), 1, {}),
    "grouped": ("conv2d", (1, 64, 256, 256), (16, 32, 3, 3), 2, {"padding": 1}),
    "depthwise": ("conv2d", (2, 64, 192, 192), (64, 1, 3, 3), 64, {"padding": 1}),
    "transposed": ("conv_transpose2d", (1, 32, 128, 128), (32, 16, 4, 4), 1, {"padding": 1, "stride": 2}),
}
LAYOUTS = {"planes": torch.contiguous_format, "channels last": torch.channels_last}


def temporary(op, x, w, groups, how):
    """Bytes of forward, gradient in the input and in the weight beyond what they return."""
    call = lambda x, w: getattr(F, op)(x, w, groups=groups, **how)
    first = x[..., :24, :24].contiguous(memory_format=torch.contiguous_format).requires_grad_()
    small = call(first, w)
    torch.autograd.grad(small, first, torch.ones_like(small))  # which imports much, once
    found = [peak_bytes(lambda: call(x, w)) - (y := call(x, w)).nbytes]
    dy = torch.ones_like(y)
    for wanted in (x, w):
        wanted.requires_grad_()
        y = call(x, w)
        found.append(peak_bytes(lambda y=y, t=wanted: torch.autograd.grad(y, t, dy, retain_graph=True)) - wanted.nbytes)
        wanted.requires_grad_(False)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CALLS)
def test_workspace_stays_small(name, dtype, layout):
    op, shape, filters, groups, how = CALLS[name]
    x, w = (torch.zeros(s, dtype=dtype).contiguous(memory_format=LAYOUTS[layout]) for s in (shape, filters))
    _, passes, _ = convolution_notes.passes(
        op, (shape, filters), dtype, "cpu", groups=groups, channels_last=layout != "planes", **how
    )  # fmt: skip
    for found, said in zip(temporary(op, x, w, groups, how), passes):
        assert found < CEILING, said
        assert found < said.workspace + ROUGHLY, (found, said)


@pytest.mark.parametrize("algorithm", ["gemm", "columns", "winograd2", "winograd4"])
def test_workspace_of_every_algorithm_stays_small(algorithm):
    op, shape, filters, groups, how = CALLS["dense"]
    with F.conv_algorithm(algorithm):
        found = temporary(op, torch.zeros(shape), torch.zeros(filters), groups, how)
    assert max(found) < CEILING
