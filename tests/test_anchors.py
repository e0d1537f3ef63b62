import torch

from pyops import vision

from .harness import refuses


def test_one_cell_by_hand():
    generator = vision.AnchorGenerator(((32,),), ((0.25, 1.0),))
    (anchors,) = generator((8, 8), [torch.zeros(1, 1, 1, 1)])
    # ratio 1/4: height 16, width 64
    assert anchors.tolist() == [[-32, -8, 32, 8], [-16, -16, 16, 16]]
    assert generator.num_anchors_per_location() == [2]


def test_rows_then_columns_then_ratios_then_sizes():
    generator = vision.AnchorGenerator(((8, 16), (32, 64)), ((1.0,),))
    first, second = generator((32, 48), [torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 1, 1)])
    assert first.shape == (12, 4) and second.shape == (2, 4)
    assert first[0].tolist() == [-4, -4, 4, 4] and first[1].tolist() == [-8, -8, 8, 8]
    assert first[2].tolist() == [12, -4, 20, 4]  # next column: stride 48 / 3
    assert first[6].tolist() == [-4, 12, 4, 20]  # next row: stride 32 / 2
    assert generator((32, 48), [torch.zeros(1, 1, 2, 3).half(), torch.zeros(1, 1, 1, 1).half()])[0].dtype == torch.half


def test_bad_input():
    make = vision.AnchorGenerator
    refuses(ValueError, ("AnchorGenerator", "'aspect_ratios'"), make, ((1,), (2,), (3,)), ((1.0,), (2.0,)))
    refuses(ValueError, ("AnchorGenerator", "'sizes'"), make, ((0,),))
    refuses(TypeError, ("AnchorGenerator", "'sizes'"), make, (32, 64))
    refuses(ValueError, ("AnchorGenerator", "'grid_sizes'"), make().grid_anchors, [(1, 1), (2, 2)], [(1, 1)])
