import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyops import functional as F
from pyops import nn, testing, use
from pyops.core import backend as backends

from .harness import accurate, floating, laid_out, layouts, modules_agree, passes, properties, refuses, same_refusal

X = torch.arange(24.0).reshape(1, 2, 3, 4)


@pytest.mark.parametrize("check", testing.checks())
def test_checks(backend, check):
    if backend != "cpu" and check not in ("accuracy", "opcheck"):
        pytest.skip("derivatives of higher order, transforms and layouts are the same Python on every backend")
    passes("pad", backend, check)


@pytest.mark.race
def test_race(backend):
    if backend == "emulator":
        passes("pad", backend, "accuracy")


@pytest.mark.parametrize("name", ["ConstantPad", "ZeroPad", "ReflectionPad", "ReplicationPad", "CircularPad"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_modules(name, n):
    x = torch.randn(2, 3, *(4, 5, 6)[:n])
    arguments = [tuple(range(1, 2 * n + 1)) if n < 2 else (1, 2) * n, *([0.5] if name == "ConstantPad" else [])]
    make = lambda m: getattr(m, f"{name}{n}d")(*arguments)
    modules_agree(make(nn), make(torch.nn), x, "cpu")
    assert isinstance(make(nn), getattr(torch.nn, f"{name}{n}d"))


@pytest.mark.parametrize("mode", ["constant", "reflect", "replicate", "circular"])
def test_is_an_exact_copy(backend, mode):
    x = torch.randn(2, 3, 4, 5)
    x[0, 0, 0, 0], x[1, 2, 3, 4] = torch.nan, torch.inf
    with backends.backend(backend):
        for amounts in ((1, 2, 3, 1), (-1, 2, 0, -2), (0, 0, 1, 0)):
            ours, theirs = F.pad(x, amounts, mode), torch.nn.functional.pad(x, amounts, mode)
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_same_padding_of_a_network_is_routed():
    x = torch.randn(2, 8, 7, 7).contiguous(memory_format=torch.channels_last)
    with use() as report:
        y = torch.nn.functional.pad(x, [0, 1, 0, 1])
        torch.nn.functional.pad(torch.ones(3, dtype=torch.int64), (1, 1))
        torch.nn.ZeroPad2d(1)(x)
    assert torch.equal(y, torch.nn.functional.pad(x, [0, 1, 0, 1])) and y.stride() == (512, 1, 64, 8)
    entry = report.entries["pad"]
    assert sum(entry.backends.values()) == 2 and entry.kept == {"dtype int64": 1}


@properties
@given(
    shape=st.lists(st.integers(1, 5), min_size=3, max_size=5),
    mode=st.sampled_from(["constant", "reflect", "replicate", "circular"]),
    dtype=floating,
    layout=layouts,
    data=st.data(),
)
def test_any_shape_and_layout(shape, mode, dtype, layout, data):
    count = data.draw(st.integers(len(shape) - 2 if mode != "constant" else 1, len(shape) - 1)) if len(shape) < 5 else 3
    amounts = []
    for size in reversed(shape[-count:]):
        most = size - 1 if mode == "reflect" else size
        amounts += [data.draw(st.integers(0, most)) for _ in range(2)]
    make = lambda t: ((laid_out(t, tuple(shape), layout), tuple(amounts), mode), {})
    accurate(F.pad, torch.nn.functional.pad, make, dtype)


def test_bad_input():
    refuses(RuntimeError, ("pad", "'pad'", "3 amounts"), F.pad, X, (1, 2, 3))
    refuses(RuntimeError, ("pad", "'pad'", "10 amounts"), F.pad, X, (1,) * 10)
    refuses(RuntimeError, ("pad", "'pad'", "-3 and -2"), F.pad, X, (-3, -2))
    refuses(RuntimeError, ("pad", "'pad'", "at most 3"), F.pad, X, (4, 0, 0, 0), "reflect")
    refuses(RuntimeError, ("pad", "'pad'", "at most 4"), F.pad, X, (5, 0, 0, 0), "circular")
    refuses(NotImplementedError, ("pad", "'mode'", "mirror"), F.pad, X, (1, 1), "mirror")
    refuses(NotImplementedError, ("pad", "'pad'", "2 amounts for 4"), F.pad, X, (1, 1), "reflect")
    refuses(RuntimeError, ("pad", "'value'"), F.pad, X, (1, 1, 1, 1), "reflect", 2.0)
    refuses(NotImplementedError, ("pad", "'input'", "int64"), F.pad, X.long(), (1, 1))


@pytest.mark.parametrize(
    "args",
    [(X, (1, 2, 3)), (X, (1,) * 10), (X, (-3, -2)), (X, (4, 0, 0, 0), "reflect"), (X, (1, 1), "reflect"),
     (X, (5, 0, 0, 0), "circular"), (X, (1, 1, 1, 1), "reflect", 2.0)],
)  # fmt: skip
def test_refuses_as_torch(args):
    same_refusal(F.pad, torch.nn.functional.pad, *args)
