"""Which backends the suite runs on: ``--backend`` (repeatable), else every one that can run here."""

import os
import sys
from functools import partial
from pathlib import Path

# Before Triton is imported anywhere: without a GPU its kernels run in the interpreter.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from pyops.core import backend, library

# Workers of `pytest -n` share the cores; the determinism check sets its own numbers of threads.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


def pytest_addoption(parser):
    parser.addoption("--backend", action="append", choices=backend.NAMES, help="run only on this backend; repeatable")


def pytest_generate_tests(metafunc):
    if "backend" not in metafunc.fixturenames:
        return
    wanted = metafunc.config.getoption("--backend")
    names = wanted or [name for name in backend.NAMES if name == "cpu" or library.why_not(name) is None]
    if metafunc.definition.get_closest_marker("race") is not None:
        if library.emulator_mode() != "plain":
            names = wanted or ["emulator"]
        elif "emulator" in names:
            names = [*names, pytest.param("emulator", id="race", marks=pytest.mark.race_detector)]
    metafunc.parametrize("backend", names)


@pytest.fixture
def one_thread():
    """For small work, where a second thread waits more than it works, and for what a thread keeps."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _race_detector(request):
    """Tests marked ``race`` run on the emulator twice, once with its race detector."""
    if request.node.get_closest_marker("race_detector") is None:
        yield
        return
    library.configure_emulator(race=1)
    yield
    library.configure_emulator(race=os.environ.get("PYOPS_EMULATOR_RACE", "0"))


# `make test` has a quarter of an hour. It runs each op's accuracy everywhere, and leaves to others:
# to `make check` (slow), on the emulator and Triton, what core/autograd.py does for all backends alike;
# to `make thorough` and CI (thorough) the compiled transforms, most of which torch spends tracing, Jacobians entry by
# entry (gradcheck and gradgradcheck take random directions), and on Triton's interpreter, which runs one program after
# the other, in NumPy, what hardly depends on the kernel, and all but a few cases of each other test.
# One op of each kind (gradients of second order composite, stated, of several outputs) has all other checks there.
_OF_THE_RECIPE = {"autocast", "compile", "gradgradcheck", "transforms"}
_OF_THE_WRAPPER = {"determinism", "gradcheck", "layout", "opcheck"}
_ONE_OF_EACH_KIND = {"layer_norm", "roi_align", "lstm_cell"}
_CASES = 2
# Up to twenty seconds there for one case, of kernels that other tests run too.
_LONG_ON_THE_INTERPRETER = {
    "test_few_wide_rows",
    "test_gradient_is_the_transpose",
    "test_pyramid_equals_level_by_level",
    "test_windows_too_large_for_split_rows",
}
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _left_out(item):
    """The marker of a test that `make test` leaves out, or None."""
    params = item.callspec.params
    check, backend = params.get("check"), params.get("backend")
    interpreted = _INTERPRETED and backend == "triton"
    if interpreted and item.get_closest_marker("network") is not None and params["name"] != "packed":
        return pytest.mark.slow
    if interpreted and item.originalname in _LONG_ON_THE_INTERPRETER:
        return pytest.mark.thorough
    if check in ("compiled_transforms", "jacobians") and backend in ("emulator", "triton"):
        return pytest.mark.slow
    if check == "jacobians":
        return pytest.mark.thorough
    if check is None or params.get("op", item.module.__name__.rpartition("test_")[2]) in _ONE_OF_EACH_KIND:
        return None
    if check in _OF_THE_RECIPE and backend in ("emulator", "triton"):
        return pytest.mark.slow
    if check == "compiled_transforms" or (interpreted and check in _OF_THE_WRAPPER):
        return pytest.mark.thorough
    return None


def _thin_out(items):
    """Mark as thorough all but `_CASES` cases of each test on Triton's interpreter, those spread over the list."""
    cases = {}
    for item in items:
        if item.callspec.params.get("backend") == "triton" and "check" not in item.callspec.params:
            cases.setdefault((item.path, item.originalname, item.callspec.params.get("op")), []).append(item)
    for group in cases.values():
        kept = {i * len(group) // _CASES for i in range(_CASES)}
        for i, item in enumerate(group):
            if i not in kept and len(group) > _CASES:
                item.add_marker(pytest.mark.thorough)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Mark what is left to slower runs; keep `test_race`, which repeats a check, for the race detector."""
    parametrised = [item for item in items if hasattr(item, "callspec")]
    if _INTERPRETED:
        _thin_out(parametrised)
    for item in parametrised:
        if (marker := _left_out(item)) is not None:
            item.add_marker(marker)
    if library.emulator_mode() != "race":
        repeated = [i for i in items if i.originalname == "test_race" and not i.get_closest_marker("race_detector")]
        items[:] = [item for item in items if item not in set(repeated)]
        config.hook.pytest_deselected(items=repeated)


_TESTS = str(Path(__file__).parent)
_PYOPS = str(Path(__file__).parent.parent / "pyops")


class _OnGpu(TorchFunctionMode):
    """What a test, or a module it builds, makes without naming a device stands on the GPU, drawn as on the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function not in _device_constructors() or kwargs.get("device") is not None or not self._made_by_a_test():
            return function(*args, **kwargs)
        differentiable = kwargs.pop("requires_grad", False)
        return function(*args, **kwargs).cuda().requires_grad_(differentiable)

    @staticmethod
    def _made_by_a_test() -> bool:
        frame = sys._getframe(2)
        while frame is not None:
            code = frame.f_code
            if code.co_filename.endswith("/nn/utils/rnn.py"):
                return False  # lengths stay on the CPU
            builds_a_module = code.co_name in ("__init__", "reset_parameters")
            if "/torch/" not in code.co_filename and not (code.co_filename.startswith(_PYOPS) and builds_a_module):
                return code.co_filename.startswith(_TESTS)
            frame = frame.f_back
        return False


def _on_gpu(value):
    """A constant of a test module, tensors in tuples, lists and dicts included, on the GPU."""
    if isinstance(value, torch.Tensor):
        return value.cuda()
    if type(value) in (tuple, list):
        return type(value)(_on_gpu(v) for v in value)
    return {k: _on_gpu(v) for k, v in value.items()} if type(value) is dict else value


@pytest.fixture(autouse=True)
def _on_the_device_of_the_backend(request, monkeypatch):
    name = request.getfixturevalue("backend") if "backend" in request.fixturenames else None
    if name != "cuda" and not (name == "triton" and torch.cuda.is_available()):
        yield
        return
    for key, value in vars(request.module).items():
        if isinstance(value, (torch.Tensor, tuple, list, dict)) and not key.startswith("__"):
            monkeypatch.setitem(vars(request.module), key, _on_gpu(value))
    # what is expected may come from the CPU
    monkeypatch.setattr(torch.testing, "assert_close", partial(torch.testing.assert_close, check_device=False))
    with _OnGpu():
        yield


@pytest.fixture(autouse=True)
def _fresh_random_state():
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A CUDA context lost by an illegal access fails every test after it: its worker ends, xdist starts another."""
    report = yield
    if report.when == "teardown" and "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)
    return report
