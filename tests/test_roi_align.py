import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from pyops import backend as forced
from pyops import testing, vision
from pyops.ops import roi_align as room

from .harness import passes, refuses

X = torch.arange(2 * 3 * 5 * 6, dtype=torch.float32).reshape(2, 3, 5, 6)
ROIS = torch.tensor([[0.0, 0, 0, 5, 4], [1.0, 1, 1, 3, 3]])


@pytest.mark.parametrize("check", testing.checks())
@pytest.mark.parametrize("op", ["roi_align", "ps_roi_align"])
def test_checks(backend, op, check):
    if backend != "cpu" and check not in ("accuracy", "opcheck", "determinism"):
        pytest.skip("derivatives of higher order, transforms and layouts are the same Python on every backend")
    if backend == "triton":
        pytest.skip("minutes in the interpreter; the tests below hold the Triton kernels against the definition")
    passes(op, backend, check)


@pytest.mark.race
@pytest.mark.parametrize("op", ["roi_align", "ps_roi_align"])
def test_race(backend, op):
    if backend == "emulator":
        passes(op, backend, "accuracy")


def slow(x, rois, size, scale, ratio, aligned, position_sensitive=False):
    """Sample by sample, as the papers say it."""
    import math

    (p, q), (_, c, h, w) = size, x.shape
    y = torch.zeros(len(rois), c // (p * q) if position_sensitive else c, p, q, dtype=x.dtype)
    for r, (image, *box) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = (v * scale - (0.5 if aligned else 0) for v in box)
        width, height = x2 - x1, y2 - y1
        if not aligned:
            width, height = max(width, 1), max(height, 1)
        gy = ratio if ratio > 0 else math.ceil(height / p)
        gx = ratio if ratio > 0 else math.ceil(width / q)
        for i in range(p):
            for j in range(q):
                total = torch.zeros(y.shape[1], dtype=x.dtype)
                for a in range(gy):
                    for b in range(gx):
                        v = y1 + (i + (a + 0.5) / gy) * height / p
                        u = x1 + (j + (b + 0.5) / gx) * width / q
                        if not (-1 <= v <= h and -1 <= u <= w):
                            continue
                        v, u = min(max(v, 0), h - 1), min(max(u, 0), w - 1)
                        v0, u0 = int(v), int(u)
                        v1, u1 = min(v0 + 1, h - 1), min(u0 + 1, w - 1)
                        tv, tu = v - v0, u - u0
                        own = slice(i * q + j, None, p * q) if position_sensitive else slice(None)
                        at = x[int(image), own]
                        total += (1 - tv) * ((1 - tu) * at[:, v0, u0] + tu * at[:, v0, u1])
                        total += tv * ((1 - tu) * at[:, v1, u0] + tu * at[:, v1, u1])
                y[r, :, i, j] = total / max(gy * gx, 1)
    return y


@pytest.mark.parametrize("ratio", [-1, 3])
@pytest.mark.parametrize("aligned", [False, True])
def test_against_the_definition(backend, ratio, aligned):
    x = torch.randn(2, 4, 9, 11, dtype=torch.float64)
    rois = torch.tensor(room._MORE, dtype=torch.float64)
    with forced(backend):
        y = vision.roi_align(x, rois, (2, 2), 0.77, ratio, aligned)
        torch.testing.assert_close(y, slow(x, rois, (2, 2), 0.77, ratio, aligned))
        if aligned:
            y = vision.ps_roi_align(x, rois, (2, 2), 0.77, ratio)
            torch.testing.assert_close(y, slow(x, rois, (2, 2), 0.77, ratio, True, True))


# What the staged CUDA kernel makes of a box at 7 x 7 bins, from its rule (csrc/cuda/roi_align_staged.cuh).
STAGED = {
    "one strip": [0, 3.2, 2.1, 16.9, 14.3],
    "strips": [1, 20.5, 1.3, 47, 29],
    "over the corner": [0, -6, -5, 9, 8],
    "below the map": [1, 10, 25, 21, 60],
    "the last pixel": [0, 98.6, 30.5, 99, 31],
    "a bin row does not fit": [1, 1, 2, 99, 31],
    "off the map": [0, 150, 40, 170, 50],
    "crossed": [1, 9, 9, 2, 3],
    "not finite": [0, float("nan"), 1, 5, 5],
}


def staged_map(channels, width, dtype, channels_last=False):
    x = torch.randn(2, channels, 32, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


@pytest.mark.race
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_staging_changes_no_bit(backend, dtype, channels_last):
    """Position-sensitive RoI Align of repeated planes is RoI Align, and its kernel reads the map directly."""
    if backend != "emulator":
        pytest.skip("one kernel serves both there")
    channels = {torch.float32: 36, torch.bfloat16: 72, torch.float64: 18}[dtype] if channels_last else 5
    rois = torch.tensor(list(STAGED.values()), dtype=dtype)
    for width in (100, 99) if not channels_last else (99,):  # rows of whole vectors, and not
        x = staged_map(channels, width, dtype, channels_last)
        for ratio in (2, -1):
            with forced(backend):
                y = vision.roi_align(x, rois, 7, 1.0, ratio, True)
                direct = vision.ps_roi_align(x.contiguous().repeat_interleave(49, 1), rois, 7, 1.0, ratio)
            assert torch.equal(y, direct)
            assert y[0].any() and y[5].any() and not y[6].any() and not y[8].any()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("size", [7, (3, 8), (14, 6)], ids=str)
def test_staged_against_the_definition(backend, size, channels_last):
    if backend == "triton":
        pytest.skip("minutes in the interpreter, and no other kernel than for small bins")
    rois = torch.tensor(list(STAGED.values())[:-1], dtype=torch.float64)
    x = staged_map(16, 100, torch.float64, channels_last)
    with forced(backend):
        y = vision.roi_align(x, rois, size, 1.0, 1, False)  # few samples: the larger boxes are read from the map
        torch.testing.assert_close(y, room._truth(False)(x, rois, size, 1.0, 1))
        y = vision.roi_align(x, rois, size, 0.9)
    torch.testing.assert_close(y, room._truth(False)(x, rois, size, 0.9))


def test_explain_tells_the_rule_of_staging():
    from pyops.core.explain import explain

    notes = explain("roi_align", [(2, 16, 32, 32), (5, 5)], wanted="emulator").notes
    assert any("32 KiB of shared memory" in note for note in notes)
    assert not explain("roi_align", [(2, 16, 32, 32), (5, 5)], wanted="cpu").notes


def pyramid(channels=4, dtype=torch.float32, batch=2, size=64):
    g = torch.Generator().manual_seed(0)
    maps = [torch.randn(batch, channels, size >> k, size >> k, generator=g).to(dtype) for k in (0, 1, 2, 3)]
    corner = torch.rand(6, 2, generator=g) * size * 2
    side = torch.tensor([4.0, 30, 70, 150, 300, 2000])[:, None] * (0.5 + torch.rand(6, 2, generator=g))
    boxes = torch.cat((corner, corner + side), 1).to(dtype)
    return (
        OrderedDict(zip("abcd", maps)),
        [boxes[::2], boxes[1::2]],
        [(size * 4, size * 4 - 12), (size * 4 - 20, size * 4)],
    )


@pytest.mark.parametrize("bins", [2, 8])  # on CUDA read from the maps, and staged
@pytest.mark.parametrize("channels_last", [False, True])
def test_pyramid_equals_level_by_level(backend, channels_last, bins):
    if backend == "triton" and bins == 8:
        pytest.skip("minutes in the interpreter, and no other kernel than for small bins")
    maps, boxes, sizes = pyramid(size=32, batch=1 if backend == "triton" else 2)
    boxes = [torch.cat(boxes)] if backend == "triton" else boxes
    if channels_last:
        maps = OrderedDict((k, v.contiguous(memory_format=torch.channels_last)) for k, v in maps.items())
    maps = OrderedDict((k, v.requires_grad_()) for k, v in maps.items())
    module = vision.MultiScaleRoIAlign(list(maps), bins, 2)
    with forced(backend):
        y = module(maps, boxes, sizes)
        grads = torch.autograd.grad(y.sin().sum(), maps.values())
    assert module.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    rois = torch.cat([torch.cat((torch.full_like(b[:, :1], i), b), 1) for i, b in enumerate(boxes)])
    area = (rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])
    levels = (4 + torch.log2(area.sqrt() / 224)).floor().clamp(2, 5).long() - 2
    assert levels.unique().numel() == 4
    expected = torch.zeros_like(y)
    for k, (m, scale) in enumerate(zip(maps.values(), module.scales)):
        own = room._truth(False)(m, rois[levels == k], (bins, bins), scale, 2)
        expected = expected.index_put((torch.where(levels == k)[0],), own.contiguous())
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    for m, a, b in zip(maps.values(), grads, torch.autograd.grad(expected.sin().sum(), maps.values())):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert a.stride() == m.stride()


def test_pyramid_of_seven_levels_and_of_one():
    maps = OrderedDict((str(k), torch.randn(1, 2, 256 >> k, 256 >> k)) for k in range(7))
    boxes = [torch.tensor([[0.0, 0, 3, 3], [0, 0, 60, 60], [5, 5, 200, 250]])]
    seven = vision.MultiScaleRoIAlign(list(maps), 2, 2, canonical_level=2, canonical_scale=16)(
        maps, boxes, [(256, 256)]
    )
    for i, box in enumerate(boxes[0]):
        level = (2 + ((box[2] - box[0]) * (box[3] - box[1])).sqrt().div(16).log2()).floor().clamp(0, 6).int().item()
        one = vision.MultiScaleRoIAlign([str(level)], 2, 2)(maps, [box[None]], [(256, 256)])
        torch.testing.assert_close(seven[i : i + 1], one)


def test_second_gradient_of_a_pyramid():
    maps, boxes, sizes = pyramid(1, torch.float64, size=8)
    module = vision.MultiScaleRoIAlign(list(maps), 2, 1)
    leaves = [m.requires_grad_() for m in maps.values()]
    call = lambda *m: module(OrderedDict(zip(maps, m)), boxes, sizes)
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


def test_gradient_is_the_transpose(backend):
    x = torch.randn(2, 3, 8, 9, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor(room._MORE, dtype=torch.float64)
    with forced(backend):
        y = vision.roi_align(x, rois, 3)
        d = torch.randn_like(y)
        (dx,) = torch.autograd.grad(y, x, d, create_graph=True)
        (again,) = torch.autograd.grad(dx.square().sum() / 2, x, allow_unused=True)
    torch.testing.assert_close((dx * x).sum(), (y * d).sum())
    assert again is None or not again.any()


@pytest.mark.parametrize("aligned", [False, True])
def test_not_finite_rois_give_zeros(backend, aligned):
    nan, inf = float("nan"), float("inf")
    sides = [[nan, 0, 1, 1], [0, 0, 0, nan], [0, 0, inf, 1], [0, 0, -inf, 1], [-inf, -inf, inf, inf], [0, 0, 2, 2.0]]
    image = torch.tensor([[0.0]] * 5 + [[1]])
    x = X.clone().requires_grad_()
    with forced(backend):
        y = vision.roi_align(x, torch.cat((image, torch.tensor(sides)), 1), 2, aligned=aligned)
        y.sum().backward()
    assert not y[:5].any() and y[5].any()
    assert not x.grad[0].any() and x.grad[1].any()


@pytest.mark.parametrize("image", [-1.0, 2.0, 1e30, float("nan"), float("-inf")])
@pytest.mark.parametrize("op", ["roi_align", "ps_roi_align"])
def test_image_index_out_of_range(backend, image, op):
    rois = torch.tensor([[image, 0, 0, 3, 3]])
    with forced(backend), pytest.raises(RuntimeError):
        getattr(vision, op)(X, rois, 1)


@settings(max_examples=40, deadline=None, database=None)
@given(
    st.lists(st.lists(st.floats(-1e3, 1e3, width=32) | st.sampled_from([1e9, -1e9, 1e30]), min_size=4, max_size=4)),
    st.integers(1, 4), st.integers(-1, 9), st.booleans(), st.booleans(), st.integers(0, 7),
)  # fmt: skip
def test_any_rois(boxes, size, ratio, aligned, channels_last, channels):
    x = torch.randn(1, channels, 5, 6).contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )
    y = vision.roi_align(x, [torch.tensor(boxes).reshape(-1, 4)], size, 1.0, ratio, aligned)
    assert y.shape == (len(boxes), channels, size, size) and y.isfinite().all()
    assert y.numel() == 0 or y.abs().max() <= x.abs().max() + 1e-5


def test_lists_modules_and_repr():
    boxes = [ROIS[:1, 1:], ROIS[1:, 1:]]
    torch.testing.assert_close(vision.roi_align(X, boxes, 2), vision.roi_align(X, ROIS, 2))
    module = vision.RoIAlign((2, 3), 0.5, 2, aligned=True)
    torch.testing.assert_close(module(X, ROIS), vision.roi_align(X, ROIS, (2, 3), 0.5, 2, True))
    assert repr(module) == "RoIAlign(output_size=(2, 3), spatial_scale=0.5, sampling_ratio=2, aligned=True)"
    assert repr(vision.PSRoIAlign(3, 0.5, 2)) == "PSRoIAlign(output_size=3, spatial_scale=0.5, sampling_ratio=2)"
    text = "MultiScaleRoIAlign(featmap_names=['a'], output_size=(7, 7), sampling_ratio=2)"
    assert repr(vision.MultiScaleRoIAlign(["a"], 7, 2)) == text
    assert vision.roi_align(X[:0], ROIS[:0], 2).shape == (0, 3, 2, 2)


@pytest.mark.parametrize("op", ["roi_align", "roi_pool"])
def test_a_list_for_more_images_than_bfloat16_can_count(op):
    x = torch.arange(300.0).bfloat16().reshape(300, 1, 1, 1).expand(300, 1, 2, 2)
    y = getattr(vision, op)(x, [torch.tensor([[0.0, 0, 1, 1]]).bfloat16()] * 300, 1)
    assert torch.equal(y.flatten(), x[:, 0, 0, 0])


def test_compiles_with_sizes_that_change():
    testing.fresh_compiler()
    for op in ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool"):
        function = getattr(vision, op)
        compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
        for n, layout in ((5, torch.contiguous_format), (7, torch.channels_last)):
            x = torch.randn(2, 8, n, n + 1).contiguous(memory_format=layout).requires_grad_()
            rois = torch.cat((torch.arange(n)[:, None] % 2, torch.rand(n, 4) * 9), 1)
            y, expected = compiled(x, rois, 2, 0.5 + n / 16), function(x, rois, 2, 0.5 + n / 16)
            assert torch.equal(y, expected) and y.stride() == expected.stride()
            assert torch.equal(*(torch.autograd.grad(t.sin().sum(), x)[0] for t in (y, expected)))


MEMORY = """
import resource
import torch
from pyops import vision

torch.set_num_threads(1)
used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for layout in (torch.contiguous_format, torch.channels_last):
    x = torch.randn(1, 4, 64, 64).contiguous(memory_format=layout).requires_grad_()
    rois = torch.rand(10_000, 5) * 64
    rois[:, 0] = 0
    for name in ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool"):
        for count in (10, 10_000):
            y = getattr(vision, name)(x, rois[:count], 2)
            before = used()
            torch.autograd.grad(y, x, torch.ones_like(y))
        print(used() - before)
"""


def test_memory_of_the_gradient_does_not_grow_with_the_regions():
    """Of 10,000 regions: a weight of every pixel would be 160 MB, the gradient itself has 64 KiB and dy 640 KB."""
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    more = [int(line) for line in run.stdout.split()]
    assert len(more) == 8 and max(more) < 20_000, more  # KiB


class Copies(TorchDispatchMode):
    """Which of torch's functions make a tensor as large as the map."""

    def __init__(self, pixels):
        super().__init__()
        self.pixels, self.found = pixels, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        y = function(*args, **(kwargs or {}))
        large = isinstance(y, torch.Tensor) and y.numel() >= self.pixels
        if large and function.namespace == "aten" and not function.is_view:
            self.found.append(str(function))
        return y


@pytest.mark.parametrize("op", ["roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool"])
def test_channels_last_is_read_and_written_as_it_lies(backend, op):
    """No copy in another layout, forward or backward, and the numbers of the other layout."""
    if backend == "triton" and "pool" in op:
        pytest.skip("RoI Pool has no Triton kernel")
    function = getattr(vision, op)
    plain = torch.randn(2, 12, 9, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    x = plain.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    with forced(backend):
        expected = function(plain, ROIS, (2, 3))
        dy = torch.randn_like(expected)
        (slope,) = torch.autograd.grad(expected, plain, dy)
        dy = dy.contiguous(memory_format=torch.channels_last)
        with Copies(x.numel()) as copies:
            y = function(x, ROIS, (2, 3))
            (dx,) = torch.autograd.grad(y, x, dy)
    assert copies.found == []
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(dx, slope)
    assert dx.stride() == x.stride() and y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("op", ["roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool"])
def test_autocast_takes_boxes_of_another_dtype_as_torchvision(op):
    x, function = torch.randn(2, 4, 5, 6).bfloat16(), getattr(vision, op)
    with torch.autocast("cpu", torch.bfloat16):
        y = function(x, ROIS, 2)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, function(x, ROIS.bfloat16(), 2))  # small whole numbers: the same in both
    with pytest.raises(RuntimeError, match="'boxes'"):
        function(x, ROIS, 2)


def test_bad_input():
    align = vision.roi_align
    refuses(RuntimeError, ("roi_align", "'input'", "[3, 5, 6]"), align, X[0], ROIS, 2)
    refuses(RuntimeError, ("roi_align", "'boxes'", "[2, 4]"), align, X, ROIS[:, 1:], 2)
    refuses(RuntimeError, ("roi_align", "'boxes'", "float64"), align, X, ROIS.double(), 2)
    refuses(RuntimeError, ("roi_align", "'boxes'", "[1, 5]"), align, X, [ROIS[:1]], 2)
    refuses(TypeError, ("roi_align", "'boxes'"), align, X, 3, 2)
    refuses(ValueError, ("roi_align", "'output_size'", "(0, 2)"), align, X, ROIS, (0, 2))
    refuses(ValueError, ("roi_align", "'sampling_ratio'", "-3"), align, X, ROIS, 2, 1.0, -3)
    refuses(TypeError, ("roi_align", "'spatial_scale'", "str"), align, X, ROIS, 2, "half")
    refuses(NotImplementedError, ("roi_align", "'input'", "int64"), align, X.long(), ROIS, 2)
    refuses(RuntimeError, ("ps_roi_align", "'input'", "3 channels"), vision.ps_roi_align, X, ROIS, 2)
    with pytest.raises(RuntimeError, match="image index 7"):
        align(X, torch.tensor([[7.0, 0, 0, 1, 1]]), 2)
