import resource
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from pyops import backend as forced
from pyops import testing, vision
from pyops.core import library
from pyops.ops import nms as room

from .harness import refuses


def scene(n, kind="random", seed=0, dtype=torch.float32):
    """Boxes and scores: spread out, in clusters, nearly all the same, or on a grid where IoUs and scores tie."""
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.rand(shape, generator=g, dtype=torch.float64)
    if kind == "grid":
        corner = torch.randint(0, 6, (n, 2), generator=g).double()
        boxes = torch.cat((corner, corner + torch.randint(1, 4, (n, 2), generator=g)), 1)
        return boxes.to(dtype), torch.randint(0, 4, (n,), generator=g).to(dtype)
    spread = {"random": 100.0, "sparse": 4000.0, "same": 1.0}.get(kind, 300.0)
    centre = rand(n, 2) * spread
    if kind == "clusters":
        centre = (rand(max(n // 20, 1), 2) * spread)[torch.randint(0, max(n // 20, 1), (n,), generator=g)]
        centre += rand(n, 2) * 3
    side = 5 + rand(n, 2) * 20
    return torch.cat((centre - side / 2, centre + side / 2), 1).to(dtype), rand(n).to(dtype)


def slow(boxes, scores, threshold, idxs=None, least=None, of_smaller=False):
    order = scores.argsort(descending=True, stable=True)
    if least is not None:
        order = order[~(scores[order].double() < least)]
    return order[room._reference(boxes[order], None if idxs is None else idxs[order], threshold, of_smaller)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["random", "clusters", "same", "grid"])
def test_keeps_what_the_slow_truth_keeps(backend, kind, dtype):
    boxes, scores = scene(300, kind, dtype=dtype)
    for threshold in (0.0, 0.3, 0.5, 0.7, 1.0):
        with forced(backend):
            kept = vision.nms(boxes, scores, threshold)
        assert torch.equal(kept, slow(boxes, scores, threshold)), threshold


@pytest.mark.race
@pytest.mark.parametrize("n", [0, 1, 33, 150])
def test_sizes_and_segments(backend, n):
    boxes, scores = scene(n, "clusters", seed=n)
    idxs = torch.arange(n) % 3
    with forced(backend):
        assert torch.equal(vision.nms(boxes, scores, 0.4), slow(boxes, scores, 0.4))
        assert torch.equal(vision.batched_nms(boxes, scores, idxs, 0.4), slow(boxes, scores, 0.4, idxs))
        if n and backend != "triton":
            assert vision.soft_nms(boxes[:40], scores[:40], "linear")[0][0] == scores[:40].argmax()


@pytest.mark.parametrize("kind", ["random", "clusters", "grid"])
def test_overlap_of_the_smaller_box(backend, kind):
    boxes, scores = scene(250, kind, seed=3)
    boxes[::9, 2:] += 40  # which hold others
    idxs = torch.arange(250) % 3
    for threshold in (0.0, 0.4, 0.9, 1.0):
        with forced(backend):
            whole = vision.nms_above(boxes, scores, threshold, overlap="smaller")
            by_class = vision.nms_above(boxes, scores, threshold, idxs=idxs, overlap="smaller")
        assert torch.equal(whole, slow(boxes, scores, threshold, of_smaller=True)), threshold
        assert torch.equal(by_class, slow(boxes, scores, threshold, idxs, of_smaller=True)), threshold
    assert not torch.equal(slow(boxes, scores, 0.4), slow(boxes, scores, 0.4, of_smaller=True))


@pytest.mark.parametrize("least", [-1.0, 0.5, 1.0, float("inf"), float("-inf")])
def test_least_score(backend, least):
    boxes, scores = scene(90, "clusters", seed=4)
    scores[::7], scores[3::20] = 0.5, float("nan")
    idxs = torch.arange(90) % 4
    with forced(backend):
        kept = vision.nms_above(boxes, scores, 0.4, least)
        by_class = vision.nms_above(boxes, scores, 0.4, least, idxs.float())
    assert torch.equal(kept, slow(boxes, scores, 0.4, least=least))
    assert torch.equal(by_class, slow(boxes, scores, 0.4, idxs, least=least))
    assert scores[kept].isnan().any() and not (scores[kept] < least).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [60, 3000])
def test_order_of_scores_is_that_of_a_stable_sort(n, dtype):
    """Of any sign and size, with ties, both zeros, infinities and NaN; no box overlaps another."""
    g = torch.Generator().manual_seed(n)
    scores = torch.randn(n, generator=g) * torch.tensor([1e-6, 1.0, 1e4])[torch.randint(0, 3, (n,), generator=g)]
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 0.25, -0.25])
    scores = torch.where(torch.rand(n, generator=g) < 0.3, special[torch.randint(0, 7, (n,), generator=g)], scores)
    scores = scores.to(dtype)
    corner = torch.arange(n, dtype=torch.float64)[:, None] * 2
    boxes = torch.cat((corner, corner, corner + 1, corner + 1), 1)
    expected = scores.argsort(descending=True, stable=True)
    assert torch.equal(vision.nms(boxes, scores, 0.5), expected)
    idxs = torch.randint(-(2**62), 2**62, (n,), generator=g)
    assert torch.equal(vision.batched_nms(boxes, scores, idxs, 0.5), expected)


def test_more_than_one_panel(backend):
    n = 300 if backend == "triton" else 2500
    for kind in ("clusters", "sparse"):
        boxes, scores = scene(n, kind)
        idxs = torch.randint(0, 4, (n,), generator=torch.Generator().manual_seed(1)) * 10**12 - 7
        with forced(backend):
            ours = vision.batched_nms(boxes, scores, idxs, 0.5), vision.nms(boxes, scores, 0.5)
        assert torch.equal(ours[0], slow(boxes, scores, 0.5, idxs))
        assert torch.equal(ours[1], slow(boxes, scores, 0.5))


@pytest.mark.parametrize("capability", ["baseline", "avx2"])
def test_a_narrow_instruction_set_keeps_the_same(capability):
    """IoUs right at the threshold: one fused multiply-add would tip the balance."""
    import os
    import subprocess
    import sys

    if capability not in library.cpu_capabilities():
        pytest.skip(f"{capability} is not in this build, or not for this CPU")
    code = (
        "import torch; from pyops import vision; g = torch.Generator().manual_seed(3); "
        "b = torch.rand(1500, 4, generator=g) * 10; b[:, 2:] += b[:, :2]; s = torch.rand(1500, generator=g); "
        "q = vision.box_iou(b[:400], b[400:800]).flatten().sort()[0]; "
        "print([vision.nms(b, s, t).tolist() for t in q[q > 0.2][::9000].double().tolist()])"
    )
    env = os.environ | {"PYOPS_CPU_CAPABILITY": capability}
    output = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    ours = eval(output)
    g = torch.Generator().manual_seed(3)
    b = torch.rand(1500, 4, generator=g) * 10
    b[:, 2:] += b[:, :2]
    s = torch.rand(1500, generator=g)
    q = vision.box_iou(b[:400], b[400:800]).flatten().sort()[0]
    assert ours == [slow(b, s, t).tolist() for t in q[q > 0.2][::9000].double().tolist()]


def test_threshold_between_two_floats(backend):
    boxes = torch.tensor([[0.0, 0, 3, 1], [1.0, 0, 4, 1]])  # IoU 1/2
    scores = torch.tensor([1.0, 0.9])
    with forced(backend):
        assert vision.nms(boxes, scores, 0.5).tolist() == [0, 1]
        assert vision.nms(boxes, scores, 0.5 - 1e-12).tolist() == [0]
        assert vision.nms(boxes, scores, 0.5 + 1e-12).tolist() == [0, 1]


def test_bad_boxes_are_kept_and_touch_nothing(backend):
    nan, inf = float("nan"), float("inf")
    bad = [
        [nan, 0, 1, 1],
        [0, 0, nan, 1],
        [9, 9, 1, 1],
        [0, 0, inf, 1],
        [-inf, -inf, inf, inf],
        [2, 2, 2, 5],
        [nan] * 4,
    ]
    boxes = torch.tensor([*bad, [0.0, 0, 1, 1], [0, 0, 1, 1.1]] * 30)
    scores = torch.linspace(1, 0, len(boxes))
    scores[4] = nan
    with forced(backend):
        kept = vision.nms(boxes, scores, 0.5)
    assert torch.equal(kept, slow(boxes, scores, 0.5))
    assert len(kept) == 30 * len(bad) + 1


@settings(max_examples=60, deadline=None, database=None)
@given(
    st.integers(0, 400),
    st.sampled_from([0.0, 1e-6, 0.25, 0.5, 0.999, 1.0, 7.0]),
    st.integers(1, 5),
    st.integers(0, 999),
)
def test_any_boxes(n, threshold, classes, seed):
    g = torch.Generator().manual_seed(seed)
    boxes = (
        torch.randn(n, 4, generator=g) * torch.tensor([1e-20, 1.0, 1e3, 1e25])[torch.randint(0, 4, (n, 1), generator=g)]
    )
    boxes = torch.where(
        torch.rand(n, 1, generator=g) < 0.7, torch.cat((boxes[:, :2], boxes[:, :2] + boxes[:, 2:].abs()), 1), boxes
    )
    boxes[torch.rand(n, 4, generator=g) < 0.02] = float("nan")
    scores = torch.randint(0, 9, (n,), generator=g).float()
    idxs = torch.randint(0, classes, (n,), generator=g)
    assert torch.equal(vision.batched_nms(boxes, scores, idxs, threshold), slow(boxes, scores, threshold, idxs))
    smaller = vision.nms_above(boxes, scores, threshold, idxs=idxs, overlap="smaller")
    assert torch.equal(smaller, slow(boxes, scores, threshold, idxs, of_smaller=True))


def test_padded_has_a_fixed_shape(backend):
    boxes, scores = scene(120, "clusters")
    with forced(backend):
        expected = vision.nms(boxes, scores, 0.5)
        for max_out in (5, 120, 500):
            keep, count = vision.nms_padded(boxes, scores, 0.5, max_out)
            n = min(max_out, len(expected))
            assert keep.shape == (max_out,) and count == n
            assert torch.equal(keep[:n], expected[:n]) and (keep[n:] == -1).all()
        idxs = torch.arange(120) % 7
        keep, count = vision.nms_padded(boxes, scores, 0.5, 200, idxs)
        assert torch.equal(keep[:count], vision.batched_nms(boxes, scores, idxs, 0.5))
    assert vision.nms_padded(boxes[:0], scores[:0], 0.5, 3)[0].tolist() == [-1, -1, -1]


def test_compiles_in_one_graph(backend):
    boxes, scores = scene(60, "clusters")
    testing.fresh_compiler()
    padded = torch.compile(lambda b, s: vision.nms_padded(b, s, 0.5, 20), fullgraph=True, backend="aot_eager")
    with forced(backend):
        assert all(torch.equal(a, b) for a, b in zip(padded(boxes, scores), vision.nms_padded(boxes, scores, 0.5, 20)))
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
            free = torch.compile(lambda b, s: vision.nms(b, s, 0.5) * 2, fullgraph=True, backend="aot_eager")
            assert torch.equal(free(boxes, scores), vision.nms(boxes, scores, 0.5) * 2)


def test_fake_tensors_have_sizes_that_depend_on_the_data():
    with FakeTensorMode(shape_env=ShapeEnv()):
        boxes, scores = torch.empty(50, 4), torch.empty(50)
        kept = vision.nms(boxes, scores, 0.5), vision.batched_nms(boxes, scores, torch.zeros(50), 0.5)
        index, lowered = vision.soft_nms(boxes, scores)
        for t in (*kept, index, lowered):
            assert t.dim() == 1 and isinstance(t.shape[0], torch.SymInt)
        assert index.shape == lowered.shape


def test_opcheck(backend):
    boxes, scores = scene(40)
    namespace = library.NAMESPACE_OF[backend]
    library.load_emulator() if backend == "emulator" else None
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(room._mask.overloads[namespace], (boxes, torch.arange(40) // 9, 0.5, False), test_utils=tests)
    if backend == "cpu":
        arguments = (boxes, scores, torch.arange(40) // 9, 0.5, False, 0.1)
        torch.library.opcheck(room._kept_in_one.overloads[namespace], arguments, test_utils=tests)
    if backend != "triton":
        arguments = (boxes, scores, 1, 0.5, 0.3, 0.01)
        torch.library.opcheck(room._pick.overloads[namespace], arguments, test_utils=tests)


def slow_soft(boxes, scores, method, threshold, sigma, least):
    live, picked = scores.clone(), []
    while (live >= least).any():
        best = int(live.argmax())
        picked.append((best, live[best].item()))
        q = vision.box_iou(boxes[best : best + 1], boxes)[0].nan_to_num()
        live = live * (torch.where(q > threshold, 1 - q, 1) if method == "linear" else torch.exp(-q * q / sigma))
        live[[i for i, _ in picked]] = -1
    return picked


@pytest.mark.parametrize("method", ["linear", "gaussian"])
def test_soft_nms(backend, method):
    if backend == "triton":
        pytest.skip("soft_nms has no Triton kernel")
    boxes, scores = scene(70, "clusters", dtype=torch.float64)
    boxes[5] = boxes[6]
    scores[5] = scores[6]
    with forced(backend):
        index, lowered = vision.soft_nms(boxes, scores, method, 0.3, 0.5, 0.05)
        assert vision.soft_nms(boxes[:0], scores[:0], method)[0].shape == (0,)
    expected = slow_soft(boxes, scores, method, 0.3, 0.5, 0.05)
    assert index.tolist() == [i for i, _ in expected]
    torch.testing.assert_close(lowered, torch.tensor([s for _, s in expected], dtype=torch.float64))


@pytest.mark.parametrize("method", ["linear", "gaussian"])
def test_soft_nms_never_picks_what_is_no_number(backend, method):
    if backend == "triton":
        pytest.skip("soft_nms has no Triton kernel")
    nan, inf = float("nan"), float("inf")
    boxes = torch.tensor([[0.0, 0, 4, 4], [9, 9, 12, 12], [0, 0, 4, 4], [nan, 0, 1, 1], [9, 9, 12, 12]])
    scores = torch.tensor([nan, 0.5, 0.7, 0.6, inf])
    with forced(backend):
        index, lowered = vision.soft_nms(boxes, scores, method, 0.3, 1e-3, 0.1)
    # inf lowers the 0.5 of the same box to nothing; the NaN score lowers none
    assert index.tolist() == [4, 2, 3]
    torch.testing.assert_close(lowered, scores[[4, 2, 3]])


def test_filter_proposals_step_by_step():
    g = torch.Generator().manual_seed(0)
    anchors = [scene(50, "random", seed=s)[0] for s in (1, 2)]
    logits = [torch.randn(2, 50, generator=g) for _ in anchors]
    deltas = [torch.randn(2, 50, 4, generator=g) * 0.3 for _ in anchors]
    sizes = [(90, 100), (60, 70)]
    boxes, scores = vision.filter_proposals(logits, deltas, anchors, sizes, 30, 20, 0.6, 0.2, 4.0)
    for i, size in enumerate(sizes):
        found = []
        for level in range(2):
            top, index = logits[level][i].topk(30)
            b = vision.clip_boxes_to_image(vision.decode_boxes(deltas[level][i][index], anchors[level][index]), size)
            p = top.sigmoid()
            good = (vision.box_convert(b, "xyxy", "xywh")[:, 2:] >= 4.0).all(1) & (p >= 0.2)
            kept = slow(b[good], p[good], 0.6)
            found += [(p[good][k].item(), b[good][k].tolist()) for k in kept]
        found = sorted(found, reverse=True)[:20]
        torch.testing.assert_close(scores[i], torch.tensor([p for p, _ in found]))
        torch.testing.assert_close(boxes[i], torch.tensor([b for _, b in found]), rtol=1e-4, atol=1e-4)


def test_a_million_boxes():
    """Seconds and a few copies of the boxes, where a matrix of all pairs would have 125 GB of bits."""
    n = 1_000_000
    g = torch.Generator().manual_seed(0)
    centre, half = torch.rand(n, 2, generator=g) * 40_000, 5 + torch.rand(n, 2, generator=g) * 30
    boxes, scores = torch.cat((centre - half, centre + half), 1), torch.rand(n, generator=g)
    scores[::2] = scores[0]  # ties
    used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memory, start = used(), time.process_time()
    kept = vision.nms(boxes, scores, 0.3)
    assert time.process_time() - start < 20
    assert used() - memory < 600_000  # KiB; the boxes have 16000
    # On a part of the plane that nothing outside can reach through: the same boxes as one by one.
    near = torch.where((boxes[:, 2:] < 2000).all(1))[0]
    inside = (boxes[:, 2:] < 1600).all(1)
    expected = near[slow(boxes[near], scores[near], 0.3)]
    expected, found = expected[inside[expected]], kept[inside[kept]]
    assert len(expected) > 800 and torch.equal(expected, found)
    assert len(kept) < n and (scores[kept].diff() <= 0).all()


@pytest.mark.parametrize("kind", ["clusters", "same", "sparse", "tall", "mixed"])
def test_strips_lose_no_pair(kind):
    """Enough boxes for many strips, of sizes that reach over several of them."""
    boxes, scores = scene(1500, "sparse" if kind in ("tall", "mixed") else kind, seed=5)
    if kind == "tall":
        boxes = boxes * torch.tensor([0.2, 1.0, 0.2, 1.0])
        boxes[:, 3] += 900
    if kind == "mixed":
        boxes[::50, 2:] += 1500
        boxes[1::50, 2:] += 1490
    for threshold in (0.05, 0.6):
        assert torch.equal(vision.nms(boxes, scores, threshold), slow(boxes, scores, threshold)), threshold
        smaller = vision.nms_above(boxes, scores, threshold, overlap="smaller")
        assert torch.equal(smaller, slow(boxes, scores, threshold, of_smaller=True)), threshold


def test_bad_input():
    boxes, scores = scene(5)
    refuses(RuntimeError, ("nms", "'boxes'", "[5, 3]"), vision.nms, boxes[:, :3], scores, 0.5)
    refuses(RuntimeError, ("nms", "'scores'", "[4]"), vision.nms, boxes, scores[:4], 0.5)
    refuses(ValueError, ("nms", "'iou_threshold'", "-1"), vision.nms, boxes, scores, -1.0)
    refuses(ValueError, ("nms", "'iou_threshold'"), vision.nms, boxes, scores, float("nan"))
    refuses(ValueError, ("nms_above", "'overlap'", "'larger'"), vision.nms_above, boxes, scores, 0.5, overlap="larger")
    refuses(ValueError, ("nms_above", "'score_threshold'"), vision.nms_above, boxes, scores, 0.5, float("nan"))
    refuses(RuntimeError, ("nms_above", "'idxs'", "[2]"), vision.nms_above, boxes, scores, 0.5, idxs=torch.zeros(2))
    refuses(NotImplementedError, ("nms", "'boxes'", "int64"), vision.nms, boxes.long(), scores, 0.5)
    refuses(RuntimeError, ("batched_nms", "'idxs'", "[2]"), vision.batched_nms, boxes, scores, torch.zeros(2), 0.5)
    refuses(ValueError, ("nms_padded", "'max_out'"), vision.nms_padded, boxes, scores, 0.5, 0)
    refuses(ValueError, ("soft_nms", "'method'"), vision.soft_nms, boxes, scores, "cubic")
    refuses(ValueError, ("soft_nms", "'sigma'"), vision.soft_nms, boxes, scores, sigma=0.0)
