import pytest
import torch

from pyops import functional as F

from .harness import refuses

X, T = torch.arange(4 * 3 * 6 * 8.0).reshape(4, 3, 6, 8), torch.tensor([2, 0, 1, 2])
ONE_HOT = torch.nn.functional.one_hot(T, 3).float()


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_mixup_mixes_inputs_and_labels_alike(alpha):
    torch.manual_seed(0)
    x, t = F.mixup(X, T, alpha, num_classes=3)
    share = ((x - X.roll(1, 0)) / (X - X.roll(1, 0)))[0, 0, 0, 0]
    assert 0 <= share <= 1
    torch.testing.assert_close(x, share * X + (1 - share) * X.roll(1, 0))
    torch.testing.assert_close(t, share * ONE_HOT + (1 - share) * ONE_HOT.roll(1, 0))


def test_cutmix_takes_one_box_from_the_image_before():
    sizes = set()
    for seed in range(20):
        torch.manual_seed(seed)
        x, t = F.cutmix(X, ONE_HOT)
        box = (x == X.roll(1, 0)).all(0).all(0)
        rows, columns = box.any(1), box.any(0)
        assert torch.equal(box, rows[:, None] & columns)  # a rectangle,
        for side in (rows, columns):
            at = side.nonzero().flatten()
            assert len(at) == 0 or len(at) == at[-1] - at[0] + 1  # without gaps,
        assert torch.equal(torch.where(box, X.roll(1, 0), X), x)  # and nothing else changes
        share = 1 - box.float().mean()
        torch.testing.assert_close(t, share * ONE_HOT + (1 - share) * ONE_HOT.roll(1, 0))
        sizes.add(int(box.sum()))
    assert len(sizes) > 5


@pytest.mark.parametrize("mix", [F.mixup, F.cutmix])
def test_generator_and_dtype(mix):
    draws = [mix(X.bfloat16(), T, 1.0, 3, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(draws[0][0], draws[1][0]) and torch.equal(draws[0][1], draws[1][1])
    assert draws[0][0].dtype == draws[0][1].dtype == torch.bfloat16


def test_the_share_has_the_distribution_of_the_paper():
    torch.manual_seed(1)
    one = torch.tensor([[1.0], [0.0]])
    shares = torch.stack([F.mixup(one, one, 0.5)[0][0, 0] for _ in range(2000)])
    assert abs(shares.mean() - 0.5) < 0.03 and abs(shares.var() - 0.125) < 0.02  # of Beta(1/2, 1/2)


def test_gradients():
    x, t = X[:, :1, :2, :2].double().requires_grad_(), ONE_HOT.double().requires_grad_()
    for mix in (F.mixup, F.cutmix):
        call = lambda a, b, mix=mix: mix(a, b, generator=torch.Generator().manual_seed(0))
        assert torch.autograd.gradcheck(call, (x, t)) and torch.autograd.gradgradcheck(call, (x, t))


def test_bad_input():
    refuses(ValueError, ("mixup", "'alpha'", "0"), F.mixup, X, ONE_HOT, 0)
    refuses(ValueError, ("mixup", "'num_classes'", "None"), F.mixup, X, T)
    refuses(ValueError, ("cutmix", "'target'", "[3]"), F.cutmix, X, T[:3], 1.0, 3)
    refuses(ValueError, ("cutmix", "'input'", "2 dimensions"), F.cutmix, X[0, 0], ONE_HOT)
    refuses(NotImplementedError, ("mixup", "'input'", "int64"), F.mixup, X.long(), ONE_HOT)
    for mix in (F.mixup, F.cutmix):
        op = f"{mix.__name__}: "
        refuses(TypeError, (op, "'num_classes'", "2.5"), mix, X, T, 1.0, 2.5)
        refuses(TypeError, (op, "'num_classes'", "'a'"), mix, X, T, 1.0, "a")
        refuses(ValueError, (op, "'num_classes'", "-1"), mix, X, T, 1.0, -1)
        refuses(RuntimeError, (op, "'target'", "got 2 out of bounds", "[0, 2)"), mix, X, T.clamp(max=2), 1.0, 2)
        refuses(RuntimeError, (op, "'target'", "got -1 out of bounds"), mix, X, T - 1, 1.0, 4)
    refuses(ValueError, ("mixup", "'input'", "0 dimensions"), F.mixup, torch.ones(()), T)
