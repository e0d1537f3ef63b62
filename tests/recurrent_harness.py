"""What the tests of lstm, gru and rnn share."""

from unittest import mock

import pytest
import torch

from pyops import functional as F
from pyops import nn, testing
from pyops.core import backend as backends
from pyops.core import library, recurrent, recurrent_samples
from pyops.core.explain import explain

from .harness import accurate, emulated_device

# Every backend has its own kernels, whose values and gradients are compared in all dtypes, but one recipe
# differentiates, maps and compiles them: that is checked on one backend here, on all by `python -m pyops check`.
OF_THE_RECIPE = tuple(check for check in testing.checks() if check != "accuracy")


def equal(a, b, tolerance=1e-5):
    """Nested tuples of tensors, equal in structure and close in value."""
    if isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        return
    assert type(a) is type(b) and len(a) == len(b)
    for x, y in zip(a, b):
        if x is not None or y is not None:
            equal(x, y, tolerance)


def cells_agree(ours, theirs, hidden, states, backend):
    """Same repr and state_dict; equal steps of a batch and of one example, with state and without; equal gradients."""
    assert repr(ours) == repr(theirs)
    ours.load_state_dict(theirs.state_dict())
    for shape in ((3,), ()):
        x = torch.randn(*shape, theirs.input_size)
        state = tuple(torch.randn(*shape, hidden) for _ in range(states))
        state = state if states > 1 else state[0]
        with backends.backend(backend):
            equal(ours(x), theirs(x))
            equal(ours(x, state), theirs(x, state))
            grads = []
            for module in (ours, theirs):
                y = module(x, state)
                total = y.sin().sum() if states == 1 else y[0].sin().sum() + y[1].cos().sum()
                grads.append(torch.autograd.grad(total, tuple(module.parameters())))
            equal(*grads)


def packed(lengths, features, enforce_sorted=True):
    sequences = [torch.randn(n, features) for n in lengths]
    return torch.nn.utils.rnn.pack_sequence(sequences, enforce_sorted)


def networks_agree(ours, theirs, inputs, states, backend):
    """Same repr and state_dict; equal outputs, final states and gradients, with initial states and without."""
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    for hx in (None, states):
        results, grads = [], []
        for module in (ours, theirs):
            leaves = [t.detach().clone().requires_grad_() for t in _tensors(hx)]
            given = hx if hx is None else leaves[0] if isinstance(hx, torch.Tensor) else tuple(leaves)
            with backends.backend(backend):
                result = module(inputs, given)
                smooth = [t for t in _tensors(result) if t is not None and t.requires_grad]
                total = torch.stack([t.sin().sum() for t in smooth]).sum()
                grads.append(torch.autograd.grad(total, (*module.parameters(), *leaves)))
            results.append(result)
        equal(tuple(results[0]), tuple(results[1]))
        equal(*grads)


def _tensors(value):
    if value is None or isinstance(value, torch.Tensor):
        return [] if value is None else [value]
    return [t for v in value for t in _tensors(v)]


# name -> (arguments of the module, shape of the input or lengths of sequences); input size 5, hidden size 7
NETWORKS = {
    "plain": ({}, (4, 3, 5)),
    "one step": ({}, (1, 2, 5)),
    "batch first": ({"batch_first": True}, (3, 4, 5)),
    "unbatched": ({}, (4, 5)),
    "two layers, two directions, no bias": ({"num_layers": 2, "bidirectional": True, "bias": False}, (4, 3, 5)),
    "empty batch": ({}, (4, 0, 5)),
    "packed": ({"bidirectional": True}, [4, 4, 2, 1]),
    "packed, not sorted": ({"num_layers": 2, "bidirectional": True, "batch_first": True}, [1, 4, 3]),
}


def network_case(name, states_of):
    """(settings, input, initial states) of one of NETWORKS."""
    settings, form = NETWORKS[name]
    layers = settings.get("num_layers", 1) * (2 if settings.get("bidirectional") else 1)
    if isinstance(form, list):
        x, batch = packed(form, 5, enforce_sorted=sorted(form, reverse=True) == form), (len(form),)
    else:
        x = torch.randn(form)
        batch = () if len(form) == 2 else (form[0 if settings.get("batch_first") else 1],)
    return settings, x, states_of(layers, batch)


# Weights of CUDA kernels: with 99 KB of shared memory a block, some units' or most units' stay outside.
SMALL = 86  # the compute capability
SOME, MOST = {"LSTM": 48, "GRU": 56, "RNN": 96}, {"LSTM": 72, "GRU": 80, "RNN": 128}

# Layers side by side: the CUDA kernels do so by default, the CPU's where they are told to.
# name -> (steps, batch, hidden size, of all or of each kind, arguments of the module)
STACKS = {
    "more steps than layers": (4, 3, 7, {"num_layers": 3}),
    "rows beyond a tile, no bias": (2, 10, 9, {"num_layers": 2, "bias": False, "batch_first": True}),
    "fewer steps than layers": (1, 2, 5, {"num_layers": 4}),
    "some weights beyond shared memory": (2, 2, SOME, {"num_layers": 2}),
    "most weights beyond it, one launch a step": (2, 2, MOST, {"num_layers": 2}),
}


def side_by_side():
    return mock.patch.object(recurrent, "runs_as_stack", lambda namespace, net, *_: net.num_layers > 1)


def stacks_agree(kind, name, states, backend, **more):
    """As ``networks_agree``, of modules ``kind``: LSTM, GRU, RNN; and in as many launches as it should take."""
    steps, batch, hidden, settings = STACKS[name]
    hidden = hidden[kind] if isinstance(hidden, dict) else hidden
    x = torch.randn((batch, steps, 2) if settings.get("batch_first") else (steps, batch, 2)).double()
    first = tuple(torch.randn(settings["num_layers"], batch, hidden).double() for _ in range(states))
    make = lambda m: getattr(m, kind)(2, hidden, **settings, **more).double()
    ours = make(nn)
    with side_by_side(), emulated_device(backend, SMALL):
        networks_agree(ours, make(torch.nn), x, first if states > 1 else first[0], backend)
        if backend == "emulator":
            assert launches(ours, x) == (steps + settings["num_layers"] - 1 if "one launch a step" in name else 1)


def launches(network, x):
    """Of a forward pass on the emulator."""
    library.configure_emulator(statistics="reset")
    with torch.no_grad(), backends.backend("emulator"):
        network(x)
    return library.emulator_statistic("launches")


# Products of bfloat16, float16 on tensor cores: name -> (processors, shape of the input, hidden size of lstm, gru and
# rnn, further settings). A block has 16, 32 or 64 rows of weights and takes 32 (of 64: 16) rows of states at a time.
TENSOR_CORES = {
    "16 rows of weights": (4, (2, 3, 2), (8, 8, 8), {}),
    "32 rows, states beyond a multiple of 8": (4, (2, 10, 2), (24, 32, 72), {}),
    "64 rows, states beyond a pass": (4, (2, 19, 2), (40, 48, 136), {}),
    "packed, two directions": (4, (15, 2), (16, 16, 24), {"batch_sizes": [9, 4, 2], "directions": 2}),
    "layers side by side": (4, (3, 9, 2), (8, 8, 16), {"layers": 3}),
    "64 rows, layers side by side, no bias": (4, (2, 17, 2), (32, 32, 40), {"layers": 2, "bias": False}),
}
# States by multicast in clusters of two or four blocks.
MULTICAST = {
    "a cluster of four": (4, (3, 3, 2), (16, 16, 56), {}),
    "clusters of two, two directions": (4, (3, 10, 2), (24, 24, 40), {"directions": 2}),
    "states beyond a pass, K beyond a block": (4, (3, 19, 2), (40, 48, 136), {}),
    "clusters of four, blocks without units": (12, (2, 2, 2), (40, 56, 184), {}),
}
# Of an LSTM alone.
PROJECTED = (4, (2, 9, 2), (24, 0, 0), {"project": 16, "directions": 2})
BEYOND_REGISTERS = (65, (1, 2, 2), (1032, 0, 0), {})
# Left to CUDA cores: one example, unless shared memory is too small for its weights, and rows not in 16-byte steps.
ONE_EXAMPLE = (4, (2, 1, 2), (8, 8, 8), {})
ODD = (4, (2, 9, 2), (9, 9, 9), {})


def on_tensor_cores(op, case, dtype):
    """``(ours, theirs, make, results)`` of a case; ``results(backend)``: output and gradients."""
    _, shape, sizes, settings = case
    gates, states = {"lstm": (4, 2), "gru": (3, 1)}.get(op, (1, 1))
    hidden = sizes[{"lstm": 0, "gru": 1}.get(op, 2)]
    make = recurrent_samples.network(gates, states, shape, hidden, **settings)

    def of(module):
        function = recurrent_samples.of_layers(getattr(module, op), states)
        # a quarter of the weights drawn: a network that is not chaotic, whose roundings stay small
        return lambda x, *t, **kwargs: function(x, *t[:states], *(p / 4 for p in t[states:]), **kwargs)

    ours, theirs = of(F), of(torch)

    def results(backend):
        (x, *rest), kwargs = make(testing.Maker(dtype, requires_grad=True))
        with backends.backend(backend):
            y, *_ = ours(x, *rest, **kwargs)
            return y, *torch.autograd.grad(y.float().sin().sum(), (x, *rest))

    return ours, theirs, make, results


def products_on_tensor_cores(op, case, dtype, backend, expected=True):
    """Values and gradients as close to float64 as torch comes; bitwise the same in another order of blocks and warps.

    Args:
        case: a value of TENSOR_CORES.
        expected: False if CUDA cores should take it.
    """
    if backend not in ("cuda", "emulator"):
        pytest.skip("a choice of the CUDA kernels")
    ours, theirs, make, results = on_tensor_cores(op, case, dtype)
    if backend == "cuda":
        accurate(ours, theirs, make, dtype, backend)
        return
    library.configure_emulator(multiprocessors=case[0], statistics="reset")
    try:
        accurate(ours, theirs, make, dtype, backend)
        assert (library.emulator_statistic("mma") > 0) == expected
        first = results(backend)
        library.configure_emulator(schedule="deep-reverse")
        assert all(map(torch.equal, first, results(backend)))
    finally:
        library.configure_emulator(multiprocessors=2, schedule="forward")


def states_by_multicast(op, case, dtype, backend, monkeypatch):
    """As accurate as ``products_on_tensor_cores``, and bitwise what blocks get that read the states each for itself."""
    if backend != "emulator":
        pytest.skip("clusters of a made-up device")
    ours, theirs, make, results = on_tensor_cores(op, case, dtype)
    found = {}
    library.configure_emulator(multiprocessors=case[0])
    try:
        for wish in ("0", "1"):
            monkeypatch.setenv("PYOPS_RECURRENT_MULTICAST", wish)
            accurate(ours, theirs, make, dtype, backend)
            library.configure_emulator(statistics="reset")
            found[wish] = results(backend)
            # a cluster meets when it begins and when it ends
            found[wish] += (torch.tensor(library.emulator_statistic("barriers")),)
        *apart, meetings = found["0"]
        *together, more_meetings = found["1"]
        assert all(map(torch.equal, apart, together)) and more_meetings > meetings
    finally:
        library.configure_emulator(multiprocessors=2)


# What `explain` says of the CUDA kernels is what runs: name -> (processors, capability, layers, shape of the input,
# hidden size of lstm, gru and rnn, dtype, PYOPS_RECURRENT_MULTICAST, words)
EXPLAINED = {
    "CUDA cores": (2, 90, 1, (3, 2, 2), (7, 7, 7), torch.float64, "0", "one persistent launch"),
    "beyond shared memory": (2, SMALL, 2, (3, 2, 2), MOST, torch.float64, "0", "a launch for each step"),
    "side by side": (2, 90, 3, (4, 2, 2), (5, 5, 5), torch.float32, "1", "3 layers side by side"),
    "tensor cores": (4, 90, 1, (3, 10, 2), (24, 32, 72), torch.bfloat16, "0", "tensor cores, 32 rows"),
    "one example": (*ONE_EXAMPLE[:1], 90, 1, *ONE_EXAMPLE[1:3], torch.float16, "0", "CUDA cores"),
    "side by side on tensor cores": (4, 90, 3, (3, 9, 2), (8, 8, 16), torch.float16, "0", "tensor cores"),
    "multicast": (4, 90, 1, (3, 3, 2), (16, 16, 56), torch.bfloat16, "1", "multicast in clusters of 4"),
    "no clusters": (4, 80, 1, (3, 3, 2), (16, 16, 56), torch.bfloat16, "1", "tensor cores, 16 rows"),
}


def explains_what_runs(op, name, monkeypatch):
    """On the emulator: kernels and launches of a forward pass are those that ``explain`` names."""
    processors, capability, layers, shape, sizes, dtype, multicast, words = EXPLAINED[name]
    kind = {"lstm": "LSTM", "gru": "GRU"}.get(op, "RNN")
    sizes = tuple(sizes.values()) if isinstance(sizes, dict) else sizes
    hidden = sizes[("LSTM", "GRU", "RNN").index(kind)]
    monkeypatch.setenv("PYOPS_RECURRENT_MULTICAST", multicast)
    case = (processors, shape, sizes, {"layers": layers})
    ours, _, make, _ = on_tensor_cores(op, case, dtype)
    arguments, kwargs = make(testing.Maker(dtype))
    library.configure_emulator(multiprocessors=processors, statistics="reset")
    try:
        with emulated_device("emulator", capability), backends.backend("emulator"), torch.no_grad():
            ours(*arguments, **kwargs)
            notes = explain(op, [shape, (layers, shape[1], hidden)], dtype).notes
    finally:
        library.configure_emulator(multiprocessors=2)
    (forward,) = [note for note in notes if note.startswith("forward")]
    assert any(words in note for note in notes) and any(note.startswith("backward") for note in notes)
    assert ("one persistent" in forward) == (library.emulator_statistic("launches") == 1)
    assert ("blocks on tensor cores" in forward) == (library.emulator_statistic("mma") > 0)


def stacks_differentiate(network, states):
    """``network``: two layers of two units and one feature, in float64. First and second gradients, jvp, vmap."""
    names = ("weight_ih_l1", "bias_hh_l1", "weight_hh_l0")

    def outputs(x, *tensors):
        given = dict(network.named_parameters()) | dict(zip(names, tensors[states:]))
        first = tensors[:states] if states > 1 else tensors[0]
        y, final = torch.func.functional_call(network, given, (x, first))
        return y, *(final if states > 1 else (final,))

    tensors = [torch.randn(2, 1, 1).double(), *torch.randn(states, 2, 1, 2).double()]
    tensors += [getattr(network, name).detach().clone() for name in names]
    inputs = tuple(t.requires_grad_() for t in tensors)
    with side_by_side():
        torch.autograd.gradcheck(outputs, inputs, check_forward_ad=True)
        torch.autograd.gradgradcheck(outputs, inputs)
        batch = torch.randn(3, 2, 1, 1).double()
        mapped = torch.vmap(lambda x: outputs(x, *inputs[1:]))(batch)
        for k, x in enumerate(batch):
            equal(tuple(m[k] for m in mapped), outputs(x, *inputs[1:]), 1e-12)


def stacks_compile(network):
    """``network``: three features. One graph, with the same gradients."""
    x = torch.randn(5, 2, 3)
    with torch._dynamo.config.patch(allow_rnn=True), side_by_side():  # torch breaks the graph here unless told
        compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
        parameters = tuple(network.parameters())
        found, expected = (torch.autograd.grad(f(x)[0].sin().sum(), parameters) for f in (compiled, network))
    equal(found, expected)
