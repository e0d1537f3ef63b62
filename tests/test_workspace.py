"""The memory that CPU kernels keep between calls (docs/adr/0011-workspace-is-kept.md)."""

import ctypes
import resource
import threading
import time
from pathlib import Path

import pytest
import torch

import pyops
from pyops import functional as F

THRESHOLD = -3  # M_MMAP_THRESHOLD of mallopt


@pytest.fixture
def eager_malloc():
    """A malloc that maps blocks of 64 KiB and more afresh, but for those that fit where others were freed.

    The fixture is the function that gives the pages of all that is free back to the system.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        pytest.skip("the C library is not glibc")
    libc.mallopt(THRESHOLD, 64 << 10)
    pyops.release_workspace()  # blocks of malloc as it was before
    yield lambda: libc.malloc_trim(0)
    libc.mallopt(THRESHOLD, 32 << 20)


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def tiny_image(channels=512):
    """A convolution that packs 9 MiB of weights and writes 100 KiB."""
    return torch.randn(1, channels, 7, 7, dtype=torch.bfloat16), torch.randn(channels, channels, 3, 3).bfloat16() / 64


def test_a_second_call_maps_no_pages(eager_malloc, one_thread):
    x, w = tiny_image()
    F.conv2d(x, w, padding=1)
    before = faults()
    F.conv2d(x, w, padding=1)
    assert faults() - before < 500  # its workspace alone has 2304 pages


def test_release_gives_the_memory_back(eager_malloc, one_thread):
    x, w = tiny_image()
    wanted = F.conv2d(x, w, padding=1)
    eager_malloc()
    before = resident()
    pyops.release_workspace()
    eager_malloc()
    assert before - resident() > 8 << 20
    assert torch.equal(F.conv2d(x, w, padding=1), wanted)


def test_another_thread_gives_its_memory_back_when_it_ends(eager_malloc, one_thread):
    x, w = tiny_image()
    grown = []

    def run():
        eager_malloc()
        before = resident()
        F.conv2d(x, w, padding=1)
        grown.append(resident() - before)

    eager_malloc()
    before = resident()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert grown[0] > 8 << 20
    deadline = time.monotonic() + 30  # Python's thread ends a little before the system's
    while resident() - before >= 4 << 20 and time.monotonic() < deadline:
        time.sleep(0.01)
        eager_malloc()
    assert resident() - before < 4 << 20


def test_what_is_kept_is_bounded(eager_malloc, one_thread):
    eager_malloc()
    before = resident()
    for channels in range(256, 640, 32):
        F.conv2d(*tiny_image(channels), padding=1)
    eager_malloc()
    assert resident() - before < 40 << 20
    pyops.release_workspace()
