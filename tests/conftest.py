"""Which backends the suite runs on: ``--backend`` (repeatable), else every one that can run here."""

import os

# Before Triton is imported anywhere: without a GPU its kernels run in the interpreter.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

from pyops.core import backend, library

torch.set_num_threads(2)


def pytest_addoption(parser):
    parser.addoption("--backend", action="append", choices=backend.NAMES, help="run only on this backend; repeatable")


def pytest_generate_tests(metafunc):
    if "backend" not in metafunc.fixturenames:
        return
    wanted = metafunc.config.getoption("--backend")
    names = wanted or [name for name in backend.NAMES if name == "cpu" or library.why_not(name) is None]
    if metafunc.definition.get_closest_marker("race") is not None and library.emulator_flavour() == "race":
        names = [name for name in names if name == "emulator"]
    metafunc.parametrize("backend", names)


@pytest.fixture(autouse=True)
def _fresh_random_state():
    torch.manual_seed(0)
