import pytest
import torch

from pyops import functional as F
from pyops import nn, testing, use
from pyops.core import backend as backends

from .harness import passes, refuses, same_refusal

torch_F = torch.nn.functional


@pytest.mark.parametrize("check", testing.checks())
def test_checks(backend, check):
    passes("embedding", backend, check)


@pytest.mark.parametrize("check", testing.checks())
def test_bag_on_the_cpu(check):
    passes("embedding_bag", "cpu", check)


def test_bag_accuracy(backend):
    passes("embedding_bag", backend, "accuracy")


@pytest.mark.race
@pytest.mark.parametrize("op", ["embedding", "embedding_bag"])
def test_race(backend, op):
    passes(op, backend, "accuracy")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_named_often_is_summed_in_float32(backend, dtype):
    times = 3000 if backend == "cpu" else 300
    weight = torch.zeros(3, 2, dtype=dtype, requires_grad=True)
    dy = (torch.randn(times, 2, generator=torch.Generator().manual_seed(0)) + 1).to(dtype)
    with backends.backend(backend):
        y = F.embedding(torch.ones(times, dtype=torch.int64), weight)
        (dw,) = torch.autograd.grad(y, weight, dy)
    exact = dy.double().sum(0)
    assert ((dw[1].double() - exact).abs() <= 4 * torch.finfo(dtype).eps * exact.abs()).all()
    assert not dw[0].any() and not dw[2].any()


def test_int32_indices_and_strided_arguments():
    weight, index = torch.randn(4, 6)[:, ::2], torch.tensor([[1, 3], [0, 0]], dtype=torch.int32)
    torch.testing.assert_close(F.embedding(index.mT, weight), torch_F.embedding(index.mT, weight))


def test_an_index_that_repeats_in_memory():
    weight, index = torch.randn(4, 6), torch.tensor([2]).expand(5)
    torch.testing.assert_close(F.embedding(index, weight), torch_F.embedding(index, weight))
    torch.testing.assert_close(F.embedding_bag(index[None], weight), torch_F.embedding_bag(index[None], weight))


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("padding", [None, 1])
def test_bags_scale_the_gradient_by_frequency(backend, mode, padding):
    # torch's own CPU kernel divides by the counts of other rows, so rows are gathered and summed here
    index, offsets = torch.tensor([0, 0, 1, 2, 2, 2, 0]), torch.tensor([0, 3])
    how = {"mode": mode, "padding_idx": padding}
    weight = torch.randn(4, 5, requires_grad=True)
    dy = torch.randn(2, 5)
    with backends.backend(backend):
        y = F.embedding_bag(index, weight, offsets, scale_grad_by_freq=True, **how)
        torch.testing.assert_close(y, F.embedding_bag(index, weight, offsets, **how))
        plain = torch.autograd.grad(F.embedding_bag(index, weight, offsets, **how), weight, dy)[0]
        scaled = torch.autograd.grad(y, weight, dy)[0]
    torch.testing.assert_close(scaled, plain / torch.tensor([3.0, 1, 3, 1])[:, None])


@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
def test_max_norm_shrinks_the_named_rows_in_place(norm_type):
    ours = torch.randn(6, 5)
    theirs = ours.clone()
    index = torch.tensor([3, 1, 3])
    y = F.embedding(index, ours, max_norm=0.7, norm_type=norm_type)
    expected = torch_F.embedding(index, theirs, max_norm=0.7, norm_type=norm_type)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(ours, theirs)


def test_no_gradient_reaches_the_padding_row():
    weight = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([1, 2, 2, -1 % 4])
    for padding in (2, -2, None):
        grads = [
            torch.autograd.grad(f(index, weight, padding).square().sum(), weight)[0]
            for f in (F.embedding, torch_F.embedding)
        ]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding", [None, 1])
def test_bags_as_torch(backend, mode, padding):
    weight = torch.randn(7, 4, requires_grad=True)
    index = torch.tensor([[1, 2, 1], [0, 6, 6], [1, 1, 1]])
    calls = [
        lambda f: f(index, weight, mode=mode, padding_idx=padding),
        lambda f: f(index.view(-1), weight, torch.tensor([0, 0, 5, 9]), mode=mode, padding_idx=padding),
        lambda f: f(
            index.view(-1), weight, torch.tensor([0, 4, 9]), mode=mode, include_last_offset=True, padding_idx=padding
        ),
    ]
    for call in calls:
        with backends.backend(backend):
            y = call(F.embedding_bag)
            (dw,) = torch.autograd.grad(y.sin().sum(), weight)
        expected = call(torch_F.embedding_bag)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(dw, torch.autograd.grad(expected.sin().sum(), weight)[0])


def test_equal_maxima_and_nan_as_torch(backend):
    weight = torch.tensor([[1.0, 2.0], [1.0, torch.nan], [0.0, 3.0]], requires_grad=True)
    for entries in ([1, 0, 2, 1, 0], [2, 1, 0], [0, 1]):
        args = (torch.tensor(entries), weight, torch.tensor([0, 0, len(entries) // 2]))
        with backends.backend(backend):
            y = F.embedding_bag(*args, mode="max")
            (dw,) = torch.autograd.grad(y.sum(), weight)
        expected = torch_F.embedding_bag(*args, mode="max")
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(dw, torch.autograd.grad(expected.sum(), weight)[0], rtol=0, atol=0)


def test_modules():
    ours, theirs = nn.Embedding(5, 3, padding_idx=1), torch.nn.Embedding(5, 3, padding_idx=1)
    assert repr(ours) == repr(theirs) and not ours.weight[1].any()
    ours.load_state_dict(theirs.state_dict())
    index = torch.tensor([[0, 1], [4, 4]])
    torch.testing.assert_close(ours(index), theirs(index))
    frozen = nn.Embedding.from_pretrained(torch.randn(5, 3))
    assert isinstance(frozen, nn.Embedding) and not frozen.weight.requires_grad
    assert torch.equal(frozen(index), frozen.weight[index])
    bags, reference = nn.EmbeddingBag(5, 3, mode="sum"), torch.nn.EmbeddingBag(5, 3, mode="sum")
    bags.load_state_dict(reference.state_dict())
    torch.testing.assert_close(bags(index), reference(index))


def test_an_unmodified_model_is_routed():
    model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 2))
    index = torch.tensor([[0, 3]])
    with use() as report:
        y = model(index)
        torch.nn.Embedding(5, 4, sparse=True)(index)
        torch.nn.EmbeddingBag(5, 4)(index)
        torch.nn.EmbeddingBag(5, 4, mode="max")(index)
        torch.nn.EmbeddingBag(5, 4, sparse=True)(index)
    torch.testing.assert_close(y, model(index))
    assert report.entries["embedding"].backends == {"cpu": 1} and report.entries["embedding"].kept
    assert report.entries["embedding_bag"].backends == {"cpu": 2} and report.entries["embedding_bag"].kept


def test_a_raw_op_reads_nothing_outside_the_table(backend):
    x, index = torch.randn(3, 4), torch.tensor([0, 3, -1])
    ends = torch.tensor([0, 1, 3])
    with backends.backend(backend):
        namespace = getattr(torch.ops, backends.namespace_for("embedding", x))
        if backend == "cpu":
            with pytest.raises(RuntimeError, match=r"\[0, 3\)"):
                namespace.gather_rows(x, index, -1, False)
            with pytest.raises(RuntimeError, match=r"\[0, 3\)"):
                namespace.gather_sum(x, index, ends, None)
            with pytest.raises(RuntimeError, match=r"\[0, 3\)"):
                namespace.gather_max(x, index, ends, -1)
            with pytest.raises(RuntimeError, match="offsets"):
                namespace.gather_sum(x, index, torch.tensor([0, 4]), None)
            return
        y = namespace.gather_rows(x, index, -1, False)
        assert torch.equal(y[0], x[0]) and y[1:].isnan().all()
        y = namespace.gather_sum(x, index, ends, None)
        assert torch.equal(y[0], x[0]) and y[1].isnan().all()
        assert namespace.gather_sum(x, index, torch.tensor([0, 4]), None).isnan().all()
        y, entry = namespace.gather_max(x, index, ends, -2)
        assert torch.equal(y[0], x[0]) and y[1].isnan().all()
        assert namespace.gather_max(x, index, torch.tensor([0, 4]), -1)[0].isnan().all()
        of_nobody = torch.tensor([9, -1, 1])
        dx = namespace.gather_max_bwd(y, entry, of_nobody, of_nobody, torch.tensor([0, 2, 4]))
        assert torch.equal(dx[0], torch.zeros(4)) and dx[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 31, 487])
def test_columns_of_every_strip(backend, width, dtype):
    """Empty, short and long bags, with weights and without, where the columns are no whole number of vectors."""
    g = torch.Generator().manual_seed(width)
    weight, index = torch.randn(9, width, generator=g).to(dtype), torch.randint(9, (203,), generator=g)
    offsets, scales = torch.tensor([0, 3, 3, 67, 132]), torch.randn(203, generator=g).to(dtype)
    bag = torch.searchsorted(offsets, torch.arange(203), right=True) - 1
    for scale in (None, scales):
        with backends.backend(backend):
            y = F.embedding_bag(index, weight, offsets, mode="sum", per_sample_weights=scale)
            rows = F.embedding(index, weight)
        assert torch.equal(rows, weight[index])
        terms = weight.double()[index] * (1 if scale is None else scale.double()[:, None])
        exact, magnitude = (torch.zeros(5, width).double().index_add(0, bag, t) for t in (terms, terms.abs()))
        # one rounding of the result, and those of 64 additions
        wide = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        assert ((y.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 64 * wide * magnitude).all()


@pytest.mark.parametrize("wrong", [-1, 9])
@pytest.mark.parametrize("at", [0, 150, 202])
def test_an_index_outside_is_found_while_rows_are_read(at, wrong):
    weight, index, offsets = torch.randn(9, 300), torch.arange(203) % 9, torch.tensor([0, 3, 3, 67, 132])
    index[at] = wrong
    refuses(IndexError, ("embedding", "'input'", str(wrong), "[0, 9)"), F.embedding, index, weight)
    for how in ({"mode": "sum"}, {"mode": "mean"}, {"mode": "max"}, {"mode": "sum", "padding_idx": 2}):
        words = ("embedding_bag", "'input'", str(wrong), "[0, 9)")
        refuses(RuntimeError, words, F.embedding_bag, index, weight, offsets, **how)
        refuses(RuntimeError, words, F.embedding_bag, index, weight.clone().requires_grad_(), offsets, **how)


X, W = torch.tensor([0, 2]), torch.randn(3, 4)


def test_bad_input():
    refuses(IndexError, ("embedding", "'input'", "3", "[0, 3)"), F.embedding, torch.tensor([0, 3]), W)
    refuses(IndexError, ("embedding", "'input'", "-1"), F.embedding, torch.tensor([-1]), W)
    refuses(RuntimeError, ("embedding", "'input'", "float32"), F.embedding, torch.ones(2), W)
    refuses(RuntimeError, ("embedding", "'weight'", "[12]"), F.embedding, X, W.view(-1))
    refuses(NotImplementedError, ("embedding", "'weight'", "int64"), F.embedding, X, W.long())
    refuses(AssertionError, ("embedding", "'padding_idx'", "3"), F.embedding, X, W, 3)
    refuses(NotImplementedError, ("embedding", "'sparse'"), F.embedding, X, W.clone().requires_grad_(), sparse=True)
    refuses(TypeError, ("embedding", "'input'", "list"), F.embedding, [0], W)
    bag = F.embedding_bag
    refuses(ValueError, ("embedding_bag", "'mode'", "'prod'"), bag, X[None], W, mode="prod")
    refuses(ValueError, ("embedding_bag", "'offsets'", "None"), bag, X, W)
    refuses(ValueError, ("embedding_bag", "'offsets'"), bag, X[None], W, torch.tensor([0]))
    for mode in ("sum", "mean", "max"):
        for wrong in ([1], [0, 3], [0, 2, 1]):
            refuses(RuntimeError, (bag.__name__, "'offsets'", str(wrong)), bag, X, W, torch.tensor(wrong), mode=mode)
    refuses(RuntimeError, ("embedding_bag", "'input'", "3"), bag, X[None] + 1, W)
    weights = torch.ones(1, 2)
    refuses(NotImplementedError, ("embedding_bag", "'per_sample_weights'"), bag, X[None], W, per_sample_weights=weights)
    refuses(ValueError, ("embedding_bag", "[1, 2]"), bag, X[None, :1], W, mode="sum", per_sample_weights=weights)


@pytest.mark.parametrize(
    "name, args",
    [
        ("embedding", (torch.tensor([0, 3]), W)),
        ("embedding", (torch.tensor([-1]), W)),
        ("embedding", (torch.ones(2), W)),
        ("embedding", (X, W.view(-1))),
        ("embedding", (X, W, 3)),
        ("embedding", (X, W, -4)),
        ("embedding", ([0], W)),
        ("embedding_bag", (X, W)),
        ("embedding_bag", (X[None], W, torch.tensor([0]))),
        ("embedding_bag", (X, W, torch.tensor([1]))),
        ("embedding_bag", (X[None], W, None, None, 2, False, "prod")),
    ],
)
def test_refuses_as_torch(name, args):
    same_refusal(getattr(F, name), getattr(torch_F, name), *args)
