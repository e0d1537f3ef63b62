"""Whatever stands in boxes, scores, offsets: the detection ops answer as the slow truth does or refuse, and read
nothing that is not theirs.

Read out of bounds is what the race detector of the emulator reports (`make test`) and AddressSanitizer, for both the
CPU and the CUDA kernels (`make asan`).
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyops import backend as forced
from pyops import vision
from pyops.ops import boxes as boxes_room
from pyops.ops import nms as nms_room
from pyops.ops import roi_align as align_room

from .harness import properties, refuses

NAN, INF = math.nan, math.inf
BAD = [NAN, INF, -INF, 1e9, -1e9, 3e38, -3e38, 1e-40, 2.0**31, -(2.0**63)]
number = st.integers(-20, 80).map(lambda v: v / 4) | st.sampled_from(BAD)
box = st.lists(number, min_size=4, max_size=4)
boxes = st.lists(box, max_size=70).map(lambda rows: torch.tensor(rows).reshape(-1, 4))
few_boxes = st.lists(box, max_size=9).map(lambda rows: torch.tensor(rows).reshape(-1, 4))
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
ROI_OPS = ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool")


@pytest.fixture
def here(backend):
    if backend == "triton":
        pytest.skip("what Triton's interpreter reads is NumPy's affair")
    with forced(backend):
        yield backend


@pytest.mark.race
def test_nms(here):
    @properties
    @given(boxes, dtypes, st.sampled_from([0.0, 0.5, 1.0]), st.integers(1, 3), st.data())
    def any_boxes(b, dtype, threshold, classes, data):
        n = len(b)
        b = b.to(dtype)
        scores = torch.tensor(data.draw(st.lists(number, min_size=n, max_size=n))).reshape(n)
        idxs = torch.arange(n) % classes
        kept = vision.batched_nms(b, scores, idxs, threshold)
        order = scores.argsort(descending=True, stable=True)
        assert torch.equal(kept, order[nms_room._reference(b[order], idxs[order], threshold)])
        padded, count = vision.nms_padded(b, scores, threshold, 5)
        assert torch.equal(padded[:count], vision.nms(b, scores, threshold)[:5])
        index, lowered = vision.soft_nms(b, scores, score_threshold=0.1)
        assert index.unique().numel() == index.numel() == lowered.numel() and (lowered >= 0.1).all()

    any_boxes()


@pytest.mark.race
@pytest.mark.parametrize("kind", range(4))
def test_overlaps(here, kind):
    name = ("box_iou", "generalized_box_iou", "distance_box_iou", "complete_box_iou")[kind]

    @properties
    @given(few_boxes, few_boxes, dtypes)
    def any_boxes(a, b, dtype):
        a, b = a.to(dtype), b.to(dtype)
        expected = boxes_room._reference(a, b, kind, 1e-7)[0]
        # beyond the largest number it is a matter of the order of operations where infinity turns to NaN
        mild = (a.abs() < 1e4).all(1)[:, None] & (b.abs() < 1e4).all(1)
        y = getattr(vision, name)(a.requires_grad_(), b)
        torch.testing.assert_close(y[mild], expected[mild], equal_nan=True, rtol=1e-4, atol=1e-4)
        y.sum().backward()
        assert a.grad.shape == a.shape

    any_boxes()


@pytest.mark.race
@pytest.mark.parametrize("op", ROI_OPS)
def test_regions(here, op):
    how = st.tuples(st.integers(-1, 3), st.booleans()) if op == "roi_align" else st.tuples(st.integers(-1, 3))
    how = how if "align" in op else st.just(())

    @properties
    # on CUDA the many bins are staged where there is something to stage
    @given(few_boxes, st.sampled_from([(1, 1), (3, 2), (4, 8)]), how, dtypes, st.booleans(), st.data())
    def any_regions(b, size, how, dtype, last, data):
        if dtype == torch.float16:
            b = b.clamp(-6e4, 6e4)
        x = torch.randn(2, size[0] * size[1] * 2, 5, 6).to(dtype)
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        image = torch.tensor(data.draw(st.lists(st.integers(0, 1), min_size=len(b), max_size=len(b)))).reshape(-1, 1)
        rois = torch.cat((image, b), 1).to(dtype)
        y = getattr(vision, op)(x.requires_grad_(), rois, size, 1.0, *how)
        y.sum().backward()
        assert y.shape[0] == len(b) and y.isfinite().all() and x.grad.isfinite().all()
        assert not y[~rois.isfinite().all(1)].any()
        assert not len(b) or y.abs().max() <= x.abs().max() + 1e-2

    any_regions()


@pytest.mark.race
@pytest.mark.parametrize("op", ROI_OPS)
def test_images_that_are_not_there(here, op):
    if here == "cuda":
        pytest.skip("a kernel that meets such an image ends the CUDA context, as a device assertion of torch does")
    x = torch.randn(2, 4, 5, 6)
    for image in (-1.0, 2.0, 1e9, -1e9, 3e38, NAN, INF, -INF):
        rois = torch.tensor([[0.0, 0, 0, 3, 3], [image, 0, 0, 3, 3]])
        with pytest.raises(RuntimeError):
            getattr(vision, op)(x, rois, 2)


@pytest.mark.race
def test_pyramid(here):
    @properties
    @given(few_boxes, few_boxes, st.integers(-1, 2), dtypes)
    def any_boxes(a, b, ratio, dtype):
        maps = {str(k): torch.randn(2, 3, 16 >> k, 16 >> k, dtype=dtype, requires_grad=True) for k in range(3)}
        module = vision.MultiScaleRoIAlign(list(maps), 2, ratio, canonical_scale=16, canonical_level=3)
        y = module(maps, [a.to(dtype), b.to(dtype)], [(64, 64), (64, 60)])
        y.sum().backward()
        assert y.isfinite().all() and all(m.grad.isfinite().all() for m in maps.values())

    any_boxes()


@pytest.mark.race
def test_offsets(here):
    @properties
    @given(
        st.lists(number, min_size=36, max_size=36), st.lists(number, min_size=18, max_size=18), dtypes, st.booleans()
    )
    def any_offsets(offset, mask, dtype, masked):
        x, w = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((1, 4, 3, 4), (2, 2, 2, 1)))
        offset = torch.tensor(offset).reshape(1, 4, 3, 3).repeat(1, 2, 1, 1)[:, :, :2, :2].to(dtype).requires_grad_()
        mask = torch.tensor(mask).reshape(1, 2, 3, 3).repeat(1, 2, 1, 1)[:, :, :2, :2].nan_to_num(1, 1, 1)
        mask = mask.clamp(-9, 9).to(dtype).requires_grad_() if masked else None
        y = vision.deform_conv2d(x, offset, w, None, (1, 2), 0, mask=mask)
        y.sum().backward()
        given_tensors = [t for t in (x, offset, w, mask) if t is not None]
        assert y.isfinite().all() and all(t.grad.isfinite().all() for t in given_tensors)

    any_offsets()


@pytest.mark.race
def test_sizes_that_do_not_fit(here):
    @properties
    @given(st.integers(0, 6), st.integers(0, 6), st.integers(0, 6))
    def any_sizes(n, scores, idxs):
        b, s, i = torch.rand(n, 4), torch.rand(scores), torch.zeros(idxs)
        if scores != n:
            refuses(RuntimeError, ("nms", "'scores'"), vision.nms, b, s, 0.5)
            refuses(RuntimeError, ("soft_nms", "'scores'"), vision.soft_nms, b, s)
            refuses(RuntimeError, ("nms_padded", "'scores'"), vision.nms_padded, b, s, 0.5, 3)
        elif idxs != n:
            refuses(RuntimeError, ("batched_nms", "'idxs'"), vision.batched_nms, b, s, i, 0.5)
        else:
            assert len(vision.batched_nms(b, s, i, 0.5)) <= n

    any_sizes()
    x = torch.randn(1, 4, 5, 6)
    for op in ROI_OPS:
        function = getattr(vision, op)
        for width in (0, 3, 4, 6):
            refuses(RuntimeError, (op, "'boxes'"), function, x, torch.zeros(2, width), 2)
        for size in (0, -1, (2, 0), (2, 2.0), (2, 2, 2), ()):
            refuses(ValueError, (op, "'output_size'"), function, x, torch.zeros(2, 5), size)
        if "align" in op:
            refuses(ValueError, (op, "'sampling_ratio'", "-2"), function, x, torch.zeros(2, 5), 2, 1.0, -2)
            refuses(TypeError, (op, "'sampling_ratio'"), function, x, torch.zeros(2, 5), 2, 1.0, 1.5)
    for op in ("box_iou", "generalized_box_iou", "distance_box_iou", "complete_box_iou"):
        for width in (0, 3, 5):
            refuses(RuntimeError, (op, "'boxes2'"), getattr(vision, op), torch.rand(2, 4), torch.rand(2, width))


def test_sizes_of_another_kind_and_boxes_that_do_not_pair():
    x = torch.randn(1, 4, 5, 6)
    for op in ROI_OPS:
        for size in (2.5, True, "2", None):
            refuses(TypeError, (op, "'output_size'"), getattr(vision, op), x, torch.zeros(2, 5), size)
        refuses(ValueError, (op, "'output_size'", "2^31"), getattr(vision, op), x, torch.zeros(2, 5), (2**62, 4))
    for op, argument in (("encode_boxes", "'proposals'"), ("decode_boxes", "'boxes'")):
        refuses(RuntimeError, (op, argument, "[2, 4]"), getattr(vision, op), torch.rand(3, 4), torch.rand(2, 4))
        assert getattr(vision, op)(torch.rand(3, 4), torch.rand(1, 4)).shape == (3, 4)
    offset = torch.zeros(1, 18, 5, 6)
    for shape in ((4, 4, 0, 3), (4, 4, 3, 0), (4, 0, 3, 3)):
        refuses(RuntimeError, ("deform_conv2d", "'weight'"), vision.deform_conv2d, x, offset, torch.rand(shape))


@pytest.mark.parametrize("last", [False, True])
def test_tensors_without_memory_may_be_of_any_size(last):
    """Shapes and strides alone, where a product of sizes passes 2^31 and the bytes pass any memory."""
    empty = lambda *shape: torch.empty(shape, device="meta")
    layout = torch.channels_last if last else torch.contiguous_format
    x = empty(4, 4 * 2000, 4000, 4000).contiguous(memory_format=layout).requires_grad_()
    for op in ROI_OPS:
        y = getattr(vision, op)(x, empty(100_000, 5), 2)
        assert y.shape == (100_000, 2000 if op.startswith("ps_") else 8000, 2, 2)
        assert y.is_contiguous(memory_format=layout)
        assert torch.autograd.grad(y.sum(), x)[0].stride() == x.stride()
    x = empty(2, 64, 40_000, 40_000).contiguous(memory_format=layout)
    y = vision.deform_conv2d(x, empty(2, 18, 40_000, 40_000), empty(8, 64, 3, 3), padding=1)
    assert y.shape == (2, 8, 40_000, 40_000) and y.is_contiguous(memory_format=layout)
    many = empty(10**6, 4)
    assert vision.box_iou(many, many).shape == vision.complete_box_iou(many, many).shape == (10**6, 10**6)
    assert vision.nms_padded(many, empty(10**6), 0.5, 10)[0].shape == (10,)
    assert vision.sigmoid_focal_loss(empty(10**6, 10**4), empty(10**6, 10**4)).shape == (10**6, 10**4)


def test_numbers_of_boxes_and_sizes_of_images():
    anchors, logits, deltas = [torch.rand(3, 4)], [torch.rand(1, 3)], [torch.rand(1, 3, 4)]
    for name in ("pre_nms_top_n", "post_nms_top_n"):
        how = {name: -1}
        refuses(
            ValueError, ("filter_proposals", name), vision.filter_proposals, logits, deltas, anchors, [(9, 9)], **how
        )
        assert len(vision.filter_proposals(logits, deltas, anchors, [(9, 9)], **{name: 0})[0][0]) == 0
    maps = {"a": torch.rand(1, 2, 4, 4), "b": torch.rand(1, 2, 2, 2)}
    for sizes in ([], [(0, 9)], [(9, 0)], [(9, 9), (-1, 9)]):
        module = vision.MultiScaleRoIAlign(["a", "b"], 2, 2)
        refuses(ValueError, ("MultiScaleRoIAlign", "'image_shapes'"), module, maps, [torch.rand(1, 4)], sizes)


def test_the_slow_truth_of_a_region_is_zero_where_it_is_not_finite():
    """What test_regions asserts of the kernels holds for the definition they are measured against."""
    rois = torch.tensor([[0, NAN, 0, 3, 3], [0, 0, -INF, 3, 3], [0, 0, 0, 3, 3]])
    y = align_room._truth(False)(torch.ones(1, 1, 5, 6), rois, 2)
    assert not y[:2].any() and (y[2] == 1).all()
