import math

import pytest
import torch

from pyops import vision
from pyops.ops.average_precision import COCO_THRESHOLDS

from .harness import refuses

BOX = torch.tensor([[0.0, 0, 10, 10]])
FAR = torch.tensor([[50.0, 50, 60, 60]])
ONE = torch.ones(1, dtype=torch.int64)


def ap(boxes, scores, truth, **how):
    """One image, one class."""
    scores = torch.tensor(scores, dtype=torch.float32)
    labels = torch.ones(len(scores), dtype=torch.int64)
    true_labels = torch.ones(len(truth), dtype=torch.int64)
    return vision.average_precision([boxes], [scores], [labels], [truth], [true_labels], **how)[0]


def test_by_hand():
    two = torch.cat((BOX, FAR))
    for method in ("all", "voc11", "coco"):
        assert ap(BOX, [0.9], BOX, method=method) == 1
        assert ap(FAR, [0.9], BOX, method=method) == 0
        assert ap(BOX[:0], [], BOX, method=method) == 0
    # a miss first: precisions 0, 1/2; recalls 0, 1: the envelope is 1/2 everywhere
    assert ap(torch.cat((FAR, BOX)), [0.9, 0.8], BOX) == 0.5
    # one of two found: precision 1 up to recall 1/2
    assert ap(BOX, [0.9], two) == 0.5
    assert ap(BOX, [0.9], two, method="voc11") == pytest.approx(6 / 11)
    assert ap(BOX, [0.9], two, method="coco") == pytest.approx(51 / 101)


def test_right_wrong_right():
    """Hits 1, 0, 1 on two truths: precisions 1, 1/2, 2/3; recalls 1/2, 1/2, 1."""
    two = torch.cat((BOX, FAR))
    found = torch.cat((BOX, BOX + 200, FAR))
    assert ap(found, [0.9, 0.8, 0.7], two) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert ap(found, [0.9, 0.8, 0.7], two, method="voc11") == pytest.approx((6 + 5 * 2 / 3) / 11)
    assert ap(found, [0.9, 0.8, 0.7], two, method="coco") == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_a_second_detection_of_one_truth_is_wrong():
    assert ap(torch.cat((BOX, BOX)), [0.9, 0.8], torch.cat((BOX, FAR))) == pytest.approx(0.5)
    assert ap(torch.cat((BOX, BOX, FAR)), [0.9, 0.8, 0.7], torch.cat((BOX, FAR))) == pytest.approx(0.5 + 0.5 * 2 / 3)


def test_thresholds():
    seven = torch.tensor([[0.0, 0, 10, 7]])  # IoU 0.7 with BOX
    assert ap(seven, [1.0], BOX, iou_threshold=0.7) == 1
    assert ap(seven, [1.0], BOX, iou_threshold=0.71) == 0
    # 0.5, 0.55, 0.6, 0.65, 0.7 of ten
    assert ap(seven, [1.0], BOX, iou_threshold=COCO_THRESHOLDS, method="coco") == pytest.approx(0.5)


def test_classes_and_images():
    two = 2 * ONE
    mean, each = vision.average_precision(
        [BOX, FAR], [torch.tensor([0.9]), torch.tensor([0.8])], [ONE, two], [BOX, torch.cat((BOX, FAR))],
        [ONE, torch.tensor([1, 2])],
    )  # fmt: skip
    # class 1: one of two truths found; class 2: found; a box of another image helps nobody
    assert each == {1: 0.5, 2: 1.0} and mean == 0.75
    mean, each = vision.average_precision([BOX], [torch.ones(1)], [ONE], [BOX[:0]], [ONE[:0]])
    assert math.isnan(mean) and each == {}
    assert math.isnan(vision.average_precision([], [], [], [], [])[0])


def test_equal_scores_go_by_index():
    both = torch.cat((FAR, BOX))
    assert ap(both, [0.5, 0.5], BOX) == 0.5 and ap(both.flip(0), [0.5, 0.5], BOX) == 1


def test_bad_input():
    call = vision.average_precision
    refuses(ValueError, ("average_precision", "'method'"), call, [BOX], [ONE], [ONE], [BOX], [ONE], method="x")
    refuses(ValueError, ("average_precision", "'iou_threshold'"), call, [BOX], [ONE], [ONE], [BOX], [ONE], 0.0)
    refuses(RuntimeError, ("average_precision", "'boxes'"), call, [BOX], [ONE, ONE], [ONE], [BOX], [ONE])
    refuses(RuntimeError, ("average_precision", "'scores'"), call, [BOX], [torch.ones(2)], [ONE], [BOX], [ONE])
