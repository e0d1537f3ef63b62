"""The rooms under pytest-benchmark: `pytest bench --benchmark-enable --benchmark-json=FILE`.

One thread, one provider at a time; `python -m pyops bench` interleaves the providers and is the one to quote.
"""

from typing import Any

import pytest
import torch

from .case import Case, Room, Unavailable
from .harness import Oracle, call, fresh_inputs, in_layout, prepared, select
from .runner import chosen


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    device, quick = config.getoption("--device"), not config.getoption("--all-cases")
    items = [
        pytest.param(room, case, name, id=f"{case.name} {name}")
        for room, ops in chosen(config.getoption("--op"))
        for case in select(room, device, quick, ops)
        for name in room.providers(case)
        if name != "torch.compile" or not quick
    ]
    metafunc.parametrize(("room", "case", "name"), items)


def test_provider(benchmark: Any, room: Room, case: Case, name: str) -> None:
    provider = room.providers(case)[name]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        tensors = fresh_inputs(room, case)
        function = provider.make()
        with provider.context():
            wrong, error, limit = Oracle(room, case, tensors).check(provider, function)
            assert not wrong, f"{name} on {case.name}: {wrong}"
            own = prepared(case, in_layout(tensors, case.channels_last or provider.channels_last))
            timed = call(case, function, own)
            benchmark.group = case.name
            benchmark.extra_info |= {
                "op": case.op,
                "provider": name,
                "bytes": room.bytes(case),
                "flops": room.flops(case),
                "error": error,
                "error_limit": limit,
            }
            benchmark(lambda: (timed(), torch.cuda.synchronize()) if case.device == "cuda" else timed())
    except Unavailable as reason:
        pytest.skip(str(reason))
    finally:
        torch.set_num_threads(threads)
