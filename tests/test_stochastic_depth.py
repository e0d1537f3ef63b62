import pytest
import torch

from pyops import vision

from .harness import refuses


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_drops_whole_examples_and_keeps_the_mean(mode):
    x = torch.ones(4000, 2, 3)
    y = vision.stochastic_depth(x, 0.25, mode)
    rows = y.flatten(1)
    assert (rows == rows[:, :1]).all()
    values = rows[:, 0].unique()
    if mode == "row":
        torch.testing.assert_close(values, torch.tensor([0.0, 4 / 3]))
        assert abs(y.mean() - 1) < 0.05
    else:
        assert len(values) == 1 and values.item() in (0.0, pytest.approx(4 / 3))


def test_ends_and_evaluation():
    x = torch.randn(3, 4)
    module = vision.StochasticDepth(0.5, "row").eval()
    assert module(x) is x and repr(module) == "StochasticDepth(p=0.5, mode=row)"
    assert vision.stochastic_depth(x, 0.0, "row") is x
    assert not vision.stochastic_depth(x, 1.0, "batch").any()
    refuses(ValueError, ("stochastic_depth", "'p'", "1.5"), vision.stochastic_depth, x, 1.5, "row")
    refuses(ValueError, ("stochastic_depth", "'mode'"), vision.stochastic_depth, x, 0.5, "column")
    refuses(TypeError, ("stochastic_depth", "'p'", "str"), vision.stochastic_depth, x, "0.5", "row")
    refuses(TypeError, ("stochastic_depth", "'input'", "list"), vision.stochastic_depth, [1.0], 0.5, "row")
    refuses(IndexError, ("stochastic_depth", "'input'", "0 dim"), vision.stochastic_depth, torch.ones(()), 0.5, "row")
