"""Options of `pytest bench`: the rooms under pytest-benchmark, with its own JSON and comparison tools."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pyops bench")
    group.addoption("--op", action="append", default=[], help="stem or op to measure; may be repeated")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="device to measure on")
    group.addoption("--all-cases", action="store_true", help="all cases instead of the quick subset")
