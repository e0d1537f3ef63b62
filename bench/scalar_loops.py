"""Baselines as scalar C++: scalar_loops.cpp, compiled at first use with the machine's own compiler at -O2."""

import ctypes
import functools
import os
import subprocess
import tempfile
from pathlib import Path

from .case import Unavailable


@functools.lru_cache
def library() -> ctypes.CDLL:
    """The compiled loops, or `Unavailable` with the compiler's message."""
    folder = tempfile.mkdtemp(prefix="pyops_bench_")
    path = Path(folder) / "scalar_loops.so"
    source = Path(__file__).with_name("scalar_loops.cpp")
    command = [os.environ.get("CXX", "g++"), "-O2", "-std=c++17", "-shared", "-fPIC", str(source), "-o", str(path)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise Unavailable(f"scalar C++: {getattr(error, 'stderr', '') or error}") from error
    loops = ctypes.CDLL(str(path))
    loops.scalar_nms.restype = ctypes.c_int64
    return loops
