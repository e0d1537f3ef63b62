import math

import pytest
import torch

from pyops import functional as F
from pyops import nn, testing, use
from pyops.core import backend as backends

from .harness import agrees, digits, passes, peak_bytes, refuses, same_refusal

ORDERS = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, math.inf]


def exact(x1, x2, p):
    return torch.cdist(x1.double(), x2.double(), p, "donot_use_mm_for_euclid_dist")


@pytest.mark.parametrize("check", testing.checks())
def test_checks(backend, check):
    if backend != "cpu" and check not in ("accuracy", "opcheck", "determinism"):
        pytest.skip("derivatives of higher order, transforms and layouts are the same Python on every backend")
    passes("cdist", backend, check)


@pytest.mark.race
def test_race(backend):
    if backend == "emulator":
        passes("cdist", backend, "accuracy")
        x, y = torch.randn(19, 5), torch.randn(70, 5)
        with backends.backend(backend):
            assert torch.equal(F.knn(x, y, 40)[1], exact(x, y, 2.0).topk(40, largest=False)[1])


@pytest.mark.parametrize("p", ORDERS)
def test_every_order(backend, p):
    x, y = torch.randn(2, 11, 7), torch.randn(2, 35, 7)
    with backends.backend(backend):
        agrees(lambda a, b: F.cdist(a, b, p), lambda a, b: torch.cdist(a, b, p, "donot_use_mm_for_euclid_dist"), x, y)


@pytest.mark.parametrize("p", ORDERS[1:])
def test_equal_rows(backend, p):
    """Distance and gradient are exactly 0, however far from the origin."""
    x = (torch.randn(6, 40) + 1e4).requires_grad_()
    with backends.backend(backend):
        y = F.cdist(x, x, p)
        assert (y.diagonal() == 0).all()
        (dx,) = torch.autograd.grad(y.diagonal().sum(), x)
        assert (dx == 0).all()
        a, b = x.detach()[0].clone().requires_grad_(), x.detach()[0].clone().requires_grad_()
        grads = torch.autograd.grad(F.pairwise_distance(a, b, p, eps=0.0), (a, b))
        assert all((g == 0).all() for g in grads)


def test_gradient_of_many_rows(backend):
    """A row that meets many others sums their shares in parts: as exact as torch's float32."""
    count = 2000 if backend == "triton" else 20000
    x, y, dy = torch.randn(3, 4), torch.randn(count, 4), torch.randn(3, count)

    def gradient(cdist, *inputs):
        a, b, d = (t.clone() for t in inputs)
        return torch.autograd.grad(cdist(a.requires_grad_(), b, 2.0), a, d)[0].double()

    want = gradient(lambda a, b, p: exact(a, b, p), x.double(), y.double(), dy.double())
    with backends.backend(backend):
        got = gradient(F.cdist, x, y, dy)
    torchs = gradient(lambda a, b, p: torch.cdist(a, b, p, "donot_use_mm_for_euclid_dist"), x, y, dy)
    assert (got - want).abs().max() <= 2 * (torchs - want).abs().max() + 1e-6 * want.abs().max()


def test_no_cancellation():
    """Far from the origin the product formula of torch's default loses the distance; sums of differences keep it."""
    x, y = torch.randn(40, 16) + 1000, torch.randn(40, 16) + 1000
    torch.testing.assert_close(F.cdist(x, y).double(), exact(x, y, 2.0), rtol=1e-6, atol=0)


def test_memory_is_the_result_and_a_copy():
    """400 × 500 × 300 differences would be 240 MB; what the op allocates besides the result is the size of x2."""
    x, y = torch.randn(400, 300), torch.randn(500, 300)
    with torch.profiler.profile(profile_memory=True) as profile:
        F.cdist(x, y)
    assert sum(max(e.self_cpu_memory_usage, 0) for e in profile.events()) < 2 * 400 * 500 * 4


def test_knn_never_holds_the_matrix_of_distances():
    """8000 × 16000 distances would be 512 MB."""
    query, data = torch.randn(8000, 2), torch.randn(16000, 2)
    F.knn(query[:10], data, 3)
    assert peak_bytes(lambda: F.knn(query, data, 3)) < 32 << 20


def test_nan_and_infinity(backend):
    x = torch.tensor([[0.0, math.nan], [math.inf, 1.0], [1.0, 2.0]])
    y = torch.tensor([[0.0, 1.0], [-math.inf, 1.0]])
    with backends.backend(backend):
        for p in (1.0, 2.0, 3.0):
            torch.testing.assert_close(F.cdist(x, y, p), exact(x, y, p).float(), equal_nan=True)
        largest = F.cdist(x, y, math.inf)
    assert largest[0].isnan().all() and (largest[1] == math.inf).all()  # torch skips a NaN


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("k", [1, 5, 40])
def test_knn_equals_topk(backend, p, k):
    x, y = torch.randn(2, 21, 6).double(), torch.randn(2, 150, 6).double()
    with backends.backend(backend):
        distances, indices = F.knn(x, y, k, p)
    want, places = exact(x, y, p).topk(k, largest=False)
    torch.testing.assert_close(distances, want)
    assert torch.equal(indices, places)


@pytest.mark.parametrize("rows", [1, 9])
def test_knn_of_equals_and_nan(backend, rows):
    """Among equals the lower index is first, across tiles and parts; NaN is last."""
    data = torch.ones(200, 3)
    data[50] = math.nan
    data[190] = 0.5
    with backends.backend(backend):
        distances, indices = F.knn(torch.full((rows, 3), 0.5), data, 200)
    expected = [190, *(i for i in range(200) if i not in (50, 190)), 50]
    assert indices.tolist() == [expected] * rows
    assert distances[:, -1].isnan().all() and not distances[:, :-1].isnan().any()


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3), (0, 4, 3)])
def test_knn_without_queries(backend, shape):
    with backends.backend(backend):
        distances, indices = F.knn(torch.ones(shape), torch.ones(*shape[:-2], 5, 3), 2)
    assert distances.shape == indices.shape == (*shape[:-1], 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_knn_dtypes(backend, dtype):
    x, y = torch.randn(5, 8).to(dtype), torch.randn(90, 8).to(dtype)
    with backends.backend(backend):
        distances, indices = F.knn(x, y, 3)
    want, places = exact(x, y, 2.0).topk(3, largest=False)
    assert torch.equal(indices, places) and distances.dtype == dtype
    torch.testing.assert_close(distances.double(), want, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_knn_gradient():
    x, y = torch.randn(4, 3).double().requires_grad_(), torch.randn(20, 3).double().requires_grad_()
    ours, theirs = F.knn(x, y, 3)[0], torch.cdist(x, y).topk(3, largest=False)[0]
    direction = torch.randn_like(ours)
    for a, b in zip(torch.autograd.grad(ours, (x, y), direction), torch.autograd.grad(theirs, (x, y), direction)):
        torch.testing.assert_close(a, b)


def test_knn_of_order_0_has_gradient_0():
    x, y = torch.randn(4, 3, requires_grad=True), torch.randn(7, 3)
    y[2] = math.nan
    distances, _ = F.knn(x, y, 7, 0.0)
    assert distances.isnan().sum() == 4
    assert torch.equal(torch.autograd.grad(distances[:, :6].sum(), x)[0], torch.zeros(4, 3))


def test_knn_is_the_same_on_any_number_of_threads():
    x, y = torch.randn(3, 8), torch.randn(5000, 8)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(F.knn(x, y, 17))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_classifier_on_digits():
    """Real digits: the neighbours of all distances in exact whole numbers, and scikit-learn's accuracy."""
    x, y = digits()
    train, test = slice(0, 1000), slice(1000, None)
    model = nn.KNeighborsClassifier(5).fit(x[train].float(), y[train])
    _, indices = model.kneighbors(x[test].float())
    pixels = (x * 16).round()
    squares = torch.cdist(pixels[test], pixels[train], compute_mode="donot_use_mm_for_euclid_dist").square().round()
    # among equals scikit-learn too takes any; ours takes the lower index
    ranked = (squares * 1000 + torch.arange(1000)).topk(5, largest=False)[1]
    assert torch.equal(indices, ranked)
    # KNeighborsClassifier(5).fit(x[:1000], y[:1000]).score(x[1000:], y[1000:]) of scikit-learn 1.9.1
    assert model.score(x[test].float(), y[test]) == pytest.approx(SCIKIT_LEARN_ACCURACY)


SCIKIT_LEARN_ACCURACY = 0.9573400250941029


def test_classifier_refuses():
    model = nn.KNeighborsClassifier(3)
    refuses(RuntimeError, ("KNeighborsClassifier", "'data'"), model.predict, torch.ones(2, 2))
    refuses(RuntimeError, ("KNeighborsClassifier", "'labels'"), model.fit, torch.ones(2, 2), torch.ones(3))
    refuses(RuntimeError, ("KNeighborsClassifier", "'n_neighbors'"), model.fit, torch.ones(2, 2), torch.ones(2))


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("p", ORDERS[2:])
def test_pairwise_distance(p, keepdim):
    arguments = {"p": p, "eps": 1e-3, "keepdim": keepdim}
    ours = lambda a, b: F.pairwise_distance(a, b, **arguments)
    theirs = lambda a, b: torch.nn.functional.pairwise_distance(a, b, **arguments)
    agrees(ours, theirs, torch.randn(3, 5, 7), torch.randn(5, 7))
    a, b = torch.randn(2, 3), torch.randn(2, 3)
    torch.testing.assert_close(nn.PairwiseDistance(**arguments)(a, b), theirs(a, b))


@pytest.mark.parametrize("p", [-1.0, 0.0, 0.5, 1.0, 2.0, 3.0, math.inf])
def test_pairwise_distance_at_the_edges(p):
    """Equal sizes, infinities, numbers without a dimension: value and gradient of torch."""
    inf = math.inf
    rows = torch.tensor([[1.0, 2, 3], [2, -1, 0.5], [inf, 1, 2]]), torch.tensor([[0.0, 1, 2], [1, 1, 1], [1, 1, 1]])
    for pair in (rows, (torch.tensor(2.0), torch.tensor(0.5))):
        found = []
        for function in (F.pairwise_distance, torch.nn.functional.pairwise_distance):
            a, b = (t.clone().requires_grad_() for t in pair)
            y = function(a, b, p, 0.25)
            (dx,) = torch.autograd.grad(y.sum(), a, allow_unused=True)
            found.append((y.detach(), dx))
        torch.testing.assert_close(*(y for y, _ in found))
        if p in (0.0, math.inf) or pair is not rows:
            assert (found[0][1] is None) == (found[1][1] is None)
            if found[0][1] is not None:
                torch.testing.assert_close(found[0][1], found[1][1])


def test_knn_at_infinity():
    query, data = torch.tensor([[0.0, 1.0]], requires_grad=True), torch.tensor([[math.inf, 0.0], [1.0, 1.0]])
    assert F.knn(query, data, 2, math.inf)[0].tolist() == [[1.0, math.inf]]


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_cosine_similarity(dim):
    ours = lambda a, b: F.cosine_similarity(a, b, dim, 1e-3)
    theirs = lambda a, b: torch.nn.functional.cosine_similarity(a, b, dim, 1e-3)
    agrees(ours, theirs, torch.randn(3, 4, 5), torch.randn(3, 1, 5))
    assert nn.CosineSimilarity(dim)(torch.zeros(2, 3), torch.ones(2, 3)).abs().max() == 0
    if dim != 1:
        torch.testing.assert_close(ours(torch.tensor(-2.0), torch.tensor(3.0)), torch.tensor(-1.0))
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradgradcheck(lambda a, b: F.cosine_similarity(a, b, -1), (x, y))


@pytest.mark.parametrize("shape", [(5, 9), (2, 3, 4), (300, 40), (2, 257, 3)])
def test_gram_matrix(shape):
    x = torch.randn(shape)
    agrees(lambda t: F.gram_matrix(t, 0.5), lambda t: t @ t.mT * 0.5, x)
    g = F.gram_matrix(x)
    assert torch.equal(g, g.mT)


def test_gram_matrix_derivatives():
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(F.gram_matrix, x, check_forward_ad=True)
    torch.autograd.gradgradcheck(F.gram_matrix, x)


@pytest.mark.parametrize("rows", [3, 257])
def test_gram_matrix_gradient_of_infinities(rows):
    """(dG + dGᵀ) x: an infinite feature reaches the channels that meet it, and as an infinity."""
    x, dy = torch.ones(rows, 2), torch.rand(rows, rows) + 0.5
    x[1, 0] = math.inf
    x.requires_grad_()
    (dx,) = torch.autograd.grad(F.gram_matrix(x), x, dy)
    torch.testing.assert_close(dx, (dy + dy.mT) @ x.detach())
    assert dx[:, 0].isinf().all() and dx[:, 1].isfinite().all()


def test_routed():
    x = torch.randn(3, 4)
    with use() as report:
        torch.cdist(x, x)
        torch.nn.functional.cosine_similarity(x, x)
        torch.nn.functional.pairwise_distance(x, x)
    for op in ("cdist", "cosine_similarity", "pairwise_distance"):
        assert sum(report.entries[op].backends.values()) == 1, op


def test_bad_input():
    x = torch.ones(3, 4)
    refuses(RuntimeError, ("cdist", "'x2'", "3 columns", "4"), F.cdist, x, torch.ones(2, 3))
    refuses(RuntimeError, ("cdist", "'p'", "-1"), F.cdist, x, x, -1.0)
    refuses(RuntimeError, ("cdist", "'x1'", "1 dimensions"), F.cdist, torch.ones(3), x)
    refuses(RuntimeError, ("cdist", "'x2'", "broadcast"), F.cdist, torch.ones(2, 3, 4), torch.ones(3, 3, 4))
    refuses(ValueError, ("cdist", "'compute_mode'"), F.cdist, x, x, 2.0, "fast")
    refuses(NotImplementedError, ("cdist", "'x1'", "int64"), F.cdist, x.long(), x.long())
    refuses(RuntimeError, ("knn", "'k'", "4"), F.knn, x, x, 4)
    refuses(RuntimeError, ("knn", "'k'", "0"), F.knn, x, x, 0)
    refuses(TypeError, ("knn", "'k'"), F.knn, x, x, 2.0)
    refuses(IndexError, ("cosine_similarity", "'dim'"), F.cosine_similarity, x, x, 2)
    refuses(RuntimeError, ("gram_matrix", "'x'"), F.gram_matrix, torch.ones(3))
    for function in (F.pairwise_distance, F.cosine_similarity):
        words = (f"{function.__name__}: ", "'x2'", "[2, 4]", "[3, 4]")
        refuses(RuntimeError, words, function, x, torch.ones(2, 4))
        same_refusal(function, getattr(torch.nn.functional, function.__name__), x, torch.ones(2, 4))


@pytest.mark.parametrize("args", [(torch.ones(3), torch.ones(3)), (torch.ones(2, 3), torch.ones(2, 4))])
def test_refuses_as_torch(args):
    same_refusal(F.cdist, torch.cdist, *args)
