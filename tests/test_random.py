"""Philox against the published vectors of Random123 in every language, and the (seed, offset) pair of torch."""

import pytest
import torch

from pyops.core import library, random

# kat_vectors of Random123: counter, key, answer of philox4x32-10
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def signed(low: int, high: int) -> int:
    value = low | high << 32
    return value - (value >> 63 << 64)


def state_and_group(counter, key) -> tuple[torch.Tensor, torch.Tensor]:
    state = torch.tensor([signed(*key), signed(*counter[2:])])
    return state, torch.tensor([signed(*counter[:2])])


@pytest.mark.parametrize("counter, key, answer", KNOWN)
def test_known_answers_in_torch(counter, key, answer):
    assert tuple(w.item() for w in random.words(*state_and_group(counter, key))) == answer


@pytest.mark.parametrize("counter, key, answer", KNOWN)
def test_known_answers_in_cpp(counter, key, answer):
    host = pytest.importorskip("pyops._host")
    unsigned = [a | b << 32 for a, b in (key, counter[2:], counter[:2])]
    assert host.philox4x32(*unsigned) == answer


@pytest.mark.parametrize("counter, key, answer", KNOWN)
def test_known_answers_in_triton(counter, key, answer):
    if (reason := library.why_not("triton")) is not None:
        pytest.skip(reason)
    from pyops.kernels import _random

    device = "cuda" if torch.cuda.is_available() else "cpu"
    state, group = state_and_group(counter, key)
    out = torch.empty(8, dtype=torch.int64, device=device)
    _random.bits_kernel[(1,)](state.to(device), group.to(device), out, GROUPS=2)
    assert tuple(out[:4].tolist()) == answer
    assert tuple(out[4:].tolist()) == tuple(w.item() for w in random.words(state, group + 1))


def test_element_takes_its_word_of_its_group():
    state = random.draw(torch.device("cpu"))
    flat = random.bits(state, (3, 5))
    for i in (0, 7, 14):
        assert flat.flatten()[i] == random.words(state, torch.tensor(i // 4))[i % 4]


def test_pairs_come_from_the_generator_of_torch():
    device = torch.device("cpu")
    torch.manual_seed(1)
    first, second = random.draw(device), random.draw(device)
    torch.manual_seed(1)
    assert torch.equal(random.draw(device), first) and not torch.equal(first, second)
    g = torch.Generator().manual_seed(1)
    assert torch.equal(random.draw(device, g), first)
    torch.manual_seed(1)
    compiled = torch.compile(lambda x: x + random.draw(x.device), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(torch.zeros(2, dtype=torch.int64)), first)


def test_pairs_obey_the_randomness_of_vmap():
    def drawn(randomness):
        return torch.vmap(lambda x: x + random.draw(x.device), randomness=randomness)(torch.zeros(3, 1).long())

    same, different = drawn("same"), drawn("different")
    assert torch.equal(same[0], same[1]) and not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError, match="random"):
        drawn("error")


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_dropout_drops_its_share(p):
    kept = random.keep(torch.tensor([3, 4]), (200, 200), p)
    assert abs(kept.double().mean() - (1 - p)) <= 4 * (p * (1 - p) / 40000) ** 0.5
