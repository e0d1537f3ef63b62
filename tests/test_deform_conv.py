import pytest
import torch
from torch import nn

from pyops import backend as forced
from pyops import testing, vision
from pyops.ops import deform_conv as room

from .harness import passes, refuses


@pytest.mark.parametrize("check", testing.checks())
def test_checks(backend, check):
    if backend == "triton":
        pytest.skip("deform_conv2d has no Triton kernel")
    if backend != "cpu" and check not in ("accuracy", "opcheck", "determinism"):
        pytest.skip("derivatives of higher order, transforms and layouts are the same Python on every backend")
    passes("deform_conv2d", backend, check)


@pytest.mark.race
def test_race(backend):
    if backend == "emulator":
        passes("deform_conv2d", backend, "accuracy")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("places", [1, 17, 64])
def test_columns_of_a_few_places_at_a_time(backend, places, dtype, monkeypatch):
    """Blocks that end inside an image, at its end and beyond it give what one block gives."""
    if backend == "triton":
        pytest.skip("deform_conv2d has no Triton kernel")
    x, offset, weight, bias, mask = (t.to(dtype).requires_grad_() for t in arguments(3, 8, 6, 2, 1, h=5, w=9))
    results = []
    for workspace in (room.WORKSPACE, places * 8 * 6 * dtype.itemsize):
        monkeypatch.setattr(room, "WORKSPACE", workspace)
        with forced(backend):
            y = vision.deform_conv2d(x, offset, weight, bias, (1, 2), 1, mask=mask)
            along = torch.sin(torch.arange(y.numel())).reshape(y.shape).to(dtype)
            results.append((y, *torch.autograd.grad(y, (x, offset, weight, bias, mask), along)))
    for whole, pieces in zip(*results):
        torch.testing.assert_close(pieces, whole, rtol=2e-2 if dtype == torch.bfloat16 else 1e-9, atol=1e-9)


def test_only_what_is_asked_for_is_computed():
    x, offset, weight, _, _ = arguments()
    for chosen in (x, offset, weight):
        y = vision.deform_conv2d(*(t.requires_grad_(t is chosen) for t in (x, offset, weight)), None, (1, 2), 1)
        assert torch.autograd.grad(y.sum(), chosen)[0].any()


def test_under_autocast_as_torchvision():
    x, offset, weight, bias, mask = (t.float() for t in arguments())
    with torch.autocast("cpu", torch.bfloat16):
        y = vision.deform_conv2d(x.bfloat16(), offset, weight, bias, (1, 2), 1, mask=mask)
    assert y.dtype == torch.bfloat16
    exact = vision.deform_conv2d(x.bfloat16().float(), offset, weight, bias, (1, 2), 1, mask=mask)
    assert torch.equal(y, exact.bfloat16())


def arguments(n=2, c=4, k=6, groups=2, offset_groups=2, r=3, s=2, h=5, w=6, stride=(1, 2), dtype=torch.float64):
    torch.manual_seed(0)
    p, q = (h + 2 - r) // stride[0] + 1, (w + 2 - s) // stride[1] + 1
    x, weight = torch.randn(n, c, h, w, dtype=dtype), torch.randn(k, c // groups, r, s, dtype=dtype)
    offset = torch.randn(n, 2 * offset_groups * r * s, p, q, dtype=dtype) * 1.7
    mask = torch.rand(n, offset_groups * r * s, p, q, dtype=dtype)
    return x, offset, weight, torch.randn(k, dtype=dtype), mask


def slow(x, offset, weight, bias, mask, stride, padding):
    """Tap by tap, as the paper says it."""
    (n, c, h, w), (k, per_group, r, s), (_, _, p, q) = x.shape, weight.shape, offset.shape
    groups, g = c // per_group, offset.shape[1] // (2 * r * s)
    y = torch.zeros(n, k, p, q, dtype=x.dtype)
    for i in range(n):
        for a in range(p):
            for b in range(q):
                for tap in range(r * s):
                    for channel in range(c):
                        at = channel // (c // g) * r * s + tap
                        v = a * stride[0] - padding + tap // s + offset[i, 2 * at, a, b].item()
                        u = b * stride[1] - padding + tap % s + offset[i, 2 * at + 1, a, b].item()
                        value = 0.0
                        for row in range(h):
                            for column in range(w):
                                value += (
                                    max(0, 1 - abs(v - row)) * max(0, 1 - abs(u - column)) * x[i, channel, row, column]
                                )
                        value = value * (1 if mask is None else mask[i, at, a, b])
                        group = channel // per_group
                        own = slice(group * (k // groups), (group + 1) * (k // groups))
                        y[i, own, a, b] += weight[own, channel % per_group, tap // s, tap % s] * value
    return y + bias[:, None, None]


@pytest.mark.parametrize("masked", [False, True])
def test_against_the_definition(masked):
    x, offset, weight, bias, mask = arguments(1, 2, 2, 2, 1, 2, 2, 3, 4)
    mask = mask if masked else None
    y = vision.deform_conv2d(x, offset, weight, bias, (1, 2), 1, mask=mask)
    torch.testing.assert_close(y, slow(x, offset, weight, bias, mask, (1, 2), 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_offset_is_a_convolution(dtype):
    x, offset, weight, bias, mask = arguments(3, stride=(1, 1))
    expected = nn.functional.conv2d(
        x.to(dtype).double(), weight.to(dtype).double(), bias.to(dtype).double(), 1, 1, 1, 2
    )
    narrow = [t.to(dtype) for t in (x, torch.zeros_like(offset), weight, bias)]
    y = vision.deform_conv2d(*narrow, padding=1, mask=torch.ones_like(mask).to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=1e-2 if dtype != torch.float32 else 1e-5)
    spread = vision.deform_conv2d(x, offset.new_zeros(3, 24, 3, 7), weight, None, padding=1, dilation=(2, 1))
    torch.testing.assert_close(spread, nn.functional.conv2d(x, weight, None, 1, 1, (2, 1), 2))


@pytest.mark.parametrize("masked", [False, True])
def test_derivatives(masked):
    x, offset, weight, bias, mask = arguments(3, 2, 2, 1, 2, 2, 1, 3, 3)
    inputs = [t.requires_grad_() for t in (x, offset, weight, bias, *([mask] if masked else []))]
    call = lambda x, o, w, b, m=None: vision.deform_conv2d(x, o, w, b, (1, 2), 1, mask=m)
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.race
def test_wild_offsets_read_nothing(backend):
    if backend == "triton":
        pytest.skip("deform_conv2d has no Triton kernel")
    x, offset, weight, _, _ = arguments(1)
    for value in (float("inf"), float("-inf"), float("nan"), 1e30, -1e30, 3e9, -(2.0**31)):
        wild = torch.full_like(offset, value).requires_grad_()
        with forced(backend):
            y = vision.deform_conv2d(x.requires_grad_(), wild, weight, None, (1, 2), 1)
            gradients = torch.autograd.grad(y.sum(), (x, wild))
        assert not y.any()
        assert not any(g.any() for g in gradients)
    assert vision.deform_conv2d(x[:0], offset[:0], weight, None, (1, 2), 1).shape[0] == 0


def test_masks_and_pixels_that_are_not_finite_show_where_they_are_read(backend):
    if backend == "triton":
        pytest.skip("deform_conv2d has no Triton kernel")
    x, offset, weight, _, mask = arguments(1, 2, 2, 1, 1, 1, 1, 4, 4, (1, 1), torch.float32)
    offset = offset.zero_()[:, :, :3, :3].repeat(1, 1, 2, 2)
    mask = torch.ones(1, 1, 6, 6)
    x[0, 0, 1, 1], mask[0, 0, 4, 5] = float("inf"), float("nan")
    with forced(backend):
        y = vision.deform_conv2d(x, offset, weight, None, 1, 1, mask=mask)
    # the pixel is at place (2, 2); with no share at its neighbours it is still read there: 0 * inf
    bad = torch.zeros(6, 6, dtype=torch.bool)
    bad[1:3, 1:3] = bad[4, 5] = True
    assert torch.equal(~y[0, 0].isfinite(), bad)


def test_module():
    torch.manual_seed(0)
    ours = vision.DeformConv2d(4, 6, 3, padding=1, groups=2)
    torch.manual_seed(0)
    plain = nn.Conv2d(4, 6, 3, padding=1, groups=2)
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(ours(x, torch.zeros(2, 18, 5, 5)), plain(x), rtol=1e-4, atol=1e-5)
    assert repr(ours) == "DeformConv2d(4, 6, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), groups=2)"


def test_bad_input():
    x, offset, weight, bias, mask = arguments()
    call = vision.deform_conv2d
    refuses(RuntimeError, ("deform_conv2d", "'offset'"), call, x, offset[:, :-1], weight, bias, (1, 2), 1)
    refuses(RuntimeError, ("deform_conv2d", "'offset'"), call, x, offset, weight, bias, (1, 1), 1)
    refuses(RuntimeError, ("deform_conv2d", "'mask'"), call, x, offset, weight, bias, (1, 2), 1, mask=mask[:1])
    refuses(RuntimeError, ("deform_conv2d", "'weight'"), call, x, offset, weight.float(), bias, (1, 2), 1)
    refuses(RuntimeError, ("deform_conv2d", "'bias'"), call, x, offset, weight, bias[:2], (1, 2), 1)
    refuses(ValueError, ("deform_conv2d", "'stride'"), call, x, offset, weight, bias, 0)
