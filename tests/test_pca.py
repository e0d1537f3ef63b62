import math

import pytest
import torch

from pyops import functional as F

from .harness import digits, refuses


def by_scikit_learn(x, count, whiten):
    decomposition = pytest.importorskip("sklearn.decomposition", exc_type=ImportError)
    return decomposition.PCA(count, whiten=whiten, svd_solver="full").fit(x.numpy())


def by_eigenvectors(x, count):
    """Another road to the same: eigenvectors of the covariance."""
    values, vectors = torch.linalg.eigh(torch.cov(x.mT))
    return values.flip(0)[:count], vectors.mT.flip(0)[:count]


def test_digits_by_the_eigenvectors_of_their_covariance():
    x, _ = digits()
    model = F.pca(x, 10)
    variances, vectors = by_eigenvectors(x, 10)
    torch.testing.assert_close(model.variances, variances)
    torch.testing.assert_close(model.components.abs(), vectors.abs(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(model.mean, x.mean(0))
    assert (model.components.gather(1, model.components.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("whiten", [False, True])
def test_digits_as_scikit_learn(whiten):
    x, _ = digits()
    theirs = by_scikit_learn(x, 8, whiten)
    model = F.pca(x, 8)
    sign = torch.sign((torch.from_numpy(theirs.components_) * model.components).sum(1))
    torch.testing.assert_close(model.components * sign[:, None], torch.from_numpy(theirs.components_))
    torch.testing.assert_close(model.variances, torch.from_numpy(theirs.explained_variance_))
    torch.testing.assert_close(F.pca_transform(x, model, whiten) * sign, torch.from_numpy(theirs.transform(x.numpy())))


def test_whitened_columns_are_uncorrelated_and_of_variance_one():
    x = torch.randn(200, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64) + 3
    model = F.pca(x)
    z = F.pca_transform(x, model, whiten=True)
    torch.testing.assert_close(torch.cov(z.mT), torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(F.pca_inverse(z, model, whiten=True), x)
    torch.testing.assert_close(F.pca_inverse(F.pca_transform(x, model), model), x)


def test_a_batch_is_its_examples_and_wide_data_works():
    x = torch.randn(3, 4, 9, dtype=torch.float64)
    batch = F.pca(x, 3)
    for i in range(3):
        one = F.pca(x[i], 3)
        for a, b in zip(batch, one):
            torch.testing.assert_close(a[i], b)
    assert F.pca_transform(x, batch).shape == (3, 4, 3)


def test_a_component_without_variance_is_not_divided():
    x = torch.randn(10, 1, dtype=torch.float64) * torch.ones(3, dtype=torch.float64)
    assert F.pca_transform(x, F.pca(x), whiten=True).abs().max() < 10


def test_gradients():
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda v: F.pca_transform(v, F.pca(v, 2), whiten=True), x)
    torch.autograd.gradcheck(lambda v: F.pca(v).variances, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    x = torch.randn(40, 3).to(dtype)
    model, wide = F.pca(x), F.pca(x.float())
    for half, exact in zip(model, wide):
        assert half.dtype == dtype and torch.equal(half, exact.to(dtype))
    scores = F.pca_transform(x, model)
    assert scores.dtype == dtype
    torch.testing.assert_close(F.pca_inverse(scores, model), x, rtol=0.05, atol=0.05)


def test_bad_input():
    x = torch.randn(4, 3)
    refuses(RuntimeError, ("pca", "'input'", "[3]"), F.pca, x[0])
    refuses(RuntimeError, ("pca", "'input'", "[1, 3]"), F.pca, x[:1])
    refuses(ValueError, ("pca", "'components'", "4", "[1, 3]"), F.pca, x, 4)
    refuses(NotImplementedError, ("pca", "'input'", "int64"), F.pca, x.long())
    refuses(RuntimeError, ("pca_transform", "'input'", "[4, 2]"), F.pca_transform, x[:, :2], F.pca(x))
    refuses(RuntimeError, ("pca_inverse", "'scores'", "[4, 2]"), F.pca_inverse, x[:, :2], F.pca(x))
    refuses(RuntimeError, ("pca_transform", "'input'", "float64", "float32"), F.pca_transform, x.double(), F.pca(x))
    refuses(RuntimeError, ("pca_inverse", "'scores'", "float64", "float32"), F.pca_inverse, x.double(), F.pca(x))
    refuses(TypeError, ("pca_transform", "'input'", "list"), F.pca_transform, [1.0], F.pca(x))
    refuses(TypeError, ("pca_transform", "'model'", "Tensor"), F.pca_transform, x, x)
    for bad in (math.nan, math.inf):
        x[1, 2] = bad
        refuses(torch.linalg.LinAlgError, ("pca", "'input'", "not finite"), F.pca, x)


@pytest.mark.parametrize("shape", [(30, 6), (2, 6, 6), (5, 9)])
@pytest.mark.parametrize("components", [None, 3])
def test_the_same_with_gradients_and_compiled(shape, components):
    """Tall data go through QR where no gradient is wanted."""
    x = torch.randn(shape, dtype=torch.float64) + 2
    want = F.pca(x.clone().requires_grad_(), components)
    compiled = torch.compile(lambda t: F.pca(t, components), fullgraph=True, backend="aot_eager")
    for got in (F.pca(x, components), compiled(x)):
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b.detach())
    _, tangent = torch.func.jvp(lambda t: F.pca(t, components).variances, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, torch.zeros_like(tangent))  # a shift of all rows changes no variance
