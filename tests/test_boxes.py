import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyops import backend as forced
from pyops import testing, vision
from pyops.ops import boxes as room

from .harness import passes, refuses

OPS = ("box_iou", "generalized_box_iou", "distance_box_iou", "complete_box_iou")
UNIT = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
OTHER = torch.tensor([[1.0, 1.0, 3.0, 3.0], [0.0, 0.0, 2.0, 2.0], [5.0, 0.0, 6.0, 1.0]])


@pytest.mark.parametrize("check", testing.checks())
@pytest.mark.parametrize("op", OPS)
def test_checks(backend, op, check):
    if backend != "cpu" and (check not in ("accuracy", "opcheck") or op == "distance_box_iou"):
        pytest.skip("derivatives of higher order, transforms and layouts are the same Python on every backend")
    passes(op, backend, check)


@pytest.mark.race
@pytest.mark.parametrize("op", OPS)
def test_race(backend, op):
    if backend == "emulator":
        passes(op, backend, "accuracy")


def test_by_hand(backend):
    with forced(backend):
        torch.testing.assert_close(vision.box_iou(UNIT, OTHER), torch.tensor([[1 / 7, 1.0, 0.0]]))
        # hulls 9, 4 and 12; unions 7, 4 and 5
        giou = torch.tensor([[1 / 7 - 2 / 9, 1.0, -7 / 12]])
        torch.testing.assert_close(vision.generalized_box_iou(UNIT, OTHER), giou)
        # squared distances of centres 2, 0, 4.5^2 + 0.5^2; squared diagonals 18, 8, 40
        diou = torch.tensor([[1 / 7 - 2 / 18, 1.0, -20.5 / 40]])
        torch.testing.assert_close(vision.distance_box_iou(UNIT, OTHER), diou)
        # all squares: no penalty of shape
        torch.testing.assert_close(vision.complete_box_iou(UNIT, OTHER), diou)


def test_ties_share_the_gradient_as_in_torch(backend):
    a = UNIT.double().requires_grad_()
    b = OTHER.double().requires_grad_()
    for op in OPS:
        with forced(backend):
            ours = torch.autograd.grad(getattr(vision, op)(a, b).sum(), (a, b))
        reference = room._reference(a, b, OPS.index(op), 1e-7)[0]
        for x, y in zip(ours, torch.autograd.grad(reference.sum(), (a, b))):
            torch.testing.assert_close(x, y)


def test_nan_and_empty_boxes_as_in_torch(backend):
    bad = torch.tensor([[0, 0, 0, 0], [float("nan"), 0, 1, 1], [3, 3, 1, 1], [0, 0, 1, float("inf")]])
    with forced(backend):
        for op in OPS:
            expected = room._reference(bad, bad, OPS.index(op), 1e-7)[0]
            torch.testing.assert_close(getattr(vision, op)(bad, bad), expected, equal_nan=True)


@settings(max_examples=20, deadline=None, database=None)
@given(st.integers(0, 9), st.integers(0, 40), st.integers(0, 3), st.integers(0, 10**6))
def test_any_number_of_boxes_and_batches(n, m, batch, seed):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(batch, n, 4, generator=g)
    b = torch.randn(m, 4, generator=g)
    torch.testing.assert_close(vision.box_iou(a, b), room._reference(a, b.expand(batch, m, 4), 0, 0.0)[0])


def test_formats():
    corners = torch.tensor([[10.0, 20.0, 30.0, 60.0]])
    sides = torch.tensor([[10.0, 20.0, 20.0, 40.0]])
    centre = torch.tensor([[20.0, 40.0, 20.0, 40.0]])
    by_name = {"xyxy": corners, "xywh": sides, "cxcywh": centre}
    for a in by_name:
        for b in by_name:
            torch.testing.assert_close(vision.box_convert(by_name[a], a, b), by_name[b])
        assert vision.box_area(by_name[a], a).item() == 800
        torch.testing.assert_close(vision.box_iou(by_name[a], by_name[a], a), torch.ones(1, 1))
    refuses(ValueError, ("box_convert", "'in_fmt'", "'yx'"), vision.box_convert, corners, "yx", "xyxy")


def test_rotated_formats():
    # 4 wide and 2 high around (10, 20), turned by 90 degrees counter-clockwise: the top left corner is bottom left now
    centre = torch.tensor([[10.0, 20.0, 4.0, 2.0, 90.0]])
    corners = torch.tensor([[9.0, 22.0, 9.0, 18.0, 11.0, 18.0, 11.0, 22.0]])
    first = torch.tensor([[9.0, 22.0, 4.0, 2.0, 90.0]])
    by_name = {"cxcywhr": centre, "xyxyxyxy": corners, "xywhr": first}
    for a, boxes in by_name.items():
        for b, expected in by_name.items():
            torch.testing.assert_close(vision.box_convert(boxes, a, b), expected, rtol=1e-5, atol=1e-5)
    assert vision.box_convert(first.long(), "xywhr", "xyxyxyxy").tolist() == corners.long().tolist()
    refuses(NotImplementedError, ("box_convert", "'out_fmt'"), vision.box_convert, centre, "cxcywhr", "xyxy")
    refuses(RuntimeError, ("box_convert", "[1, 5]"), vision.box_convert, centre, "xyxyxyxy", "xywhr")


def test_encode_and_decode_are_inverse():
    a = testing.Maker(torch.float64).boxes(5)
    b = testing.Maker(torch.float64, seed=1).boxes(5)
    weights = (10.0, 10.0, 5.0, 5.0)
    torch.testing.assert_close(vision.decode_boxes(vision.encode_boxes(a, b, weights), b, weights), a)
    wild = vision.decode_boxes(torch.tensor([[0.0, 0.0, 1e9, 0.0]]), UNIT)
    torch.testing.assert_close(wild[:, 2] - wild[:, 0], torch.tensor([2 * 1000 / 16]))
    assert torch.autograd.gradcheck(vision.decode_boxes, (a.requires_grad_() / 9, b.requires_grad_()))


def test_masks_to_boxes():
    masks = torch.zeros(3, 5, 7)
    masks[0, 1:3, 2:6] = 1
    masks[1, 4, 0] = 1
    expected = torch.tensor([[2.0, 1.0, 5.0, 2.0], [0.0, 4.0, 0.0, 4.0], [0.0, 0.0, 0.0, 0.0]])
    assert torch.equal(vision.masks_to_boxes(masks), expected)
    assert vision.masks_to_boxes(masks[:0]).shape == (0, 4)


def test_clip_and_remove_small():
    boxes = torch.tensor([[-5.0, 2.0, 50.0, 90.0], [3.0, 3.0, 4.0, 9.0]])
    assert vision.clip_boxes_to_image(boxes, (20, 30)).tolist() == [[0, 2, 30, 20], [3, 3, 4, 9]]
    assert vision.remove_small_boxes(boxes, 1.5).tolist() == [0]


@pytest.mark.parametrize("name", ["generalized_box_iou_loss", "distance_box_iou_loss", "complete_box_iou_loss"])
def test_losses(name):
    a, b = (testing.Maker(torch.float64, seed=seed).boxes(6) for seed in (2, 3))
    loss, pairwise = getattr(vision, name), getattr(vision, name.removesuffix("_loss"))
    torch.testing.assert_close(loss(a, b), 1 - pairwise(a, b).diagonal(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss(a, b, "mean"), loss(a, b).mean())
    assert loss(a[:0], b[:0], "mean") == 0
    inputs = (a.requires_grad_(), b.requires_grad_())
    if not name.startswith("complete"):  # its α is a constant for the gradient
        assert torch.autograd.gradcheck(loss, inputs) and torch.autograd.gradgradcheck(loss, inputs)
    refuses(ValueError, (name, "'reduction'"), loss, a, b, "median")


def test_bad_input():
    refuses(RuntimeError, ("box_iou", "'boxes1'", "[3, 5]"), vision.box_iou, torch.ones(3, 5), UNIT)
    refuses(RuntimeError, ("box_iou", "'boxes2'", "[4]"), vision.box_iou, UNIT, torch.ones(4))
    refuses(TypeError, ("box_iou", "'boxes1'"), vision.box_iou, [1, 2, 3, 4], UNIT)
    refuses(ValueError, ("decode_boxes", "'weights'"), vision.decode_boxes, UNIT, UNIT, (1, 2, 3))
    refuses(ValueError, ("distance_box_iou", "'eps'"), vision.distance_box_iou, UNIT, UNIT, -1.0)
    refuses(ValueError, ("clip_boxes_to_image", "'size'", "(3,)"), vision.clip_boxes_to_image, UNIT, (3,))
