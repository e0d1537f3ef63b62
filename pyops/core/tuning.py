"""Optional tuning: candidates that compute the same are timed once on the tensors of a call, and the fastest is kept.

Off unless asked for: results are then chosen by formulas alone, the same on every machine of a kind. What was measured
is kept in a JSON file,

    {"version": 1, "machines": {<processor, instruction set>: {<op, sizes, dtype, layout, threads>:
        {"choice": "winograd4", "seconds": {"gemm": 0.0021, "winograd4": 0.0009}}}}}

written whole to a file beside it, which then takes its place; entries of other processes are kept. A file that cannot
be read or has another version counts as empty.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from . import library

VERSION = 1
# At most so many rounds over the candidates, as long as they have taken less than this time in all.
ROUNDS, SECONDS = 7, 0.25

Table = dict[str, dict[str, Any]]


def default_path() -> Path:
    """``$XDG_CACHE_HOME/pyops/tuning.json``, by default in ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyops" / "tuning.json"


def _path_of(setting: Any) -> Path | None:
    if isinstance(setting, bool):
        return default_path() if setting else None
    if isinstance(setting, (str, os.PathLike)) and str(setting):
        return Path(setting)
    raise ValueError(f"tuning: got {setting!r}, expected True, False or the path of a file")


def _from_environment(value: str) -> Path | None:
    return _path_of({"": False, "0": False, "1": True}.get(value, value))


_path = _from_environment(os.environ.get("PYOPS_TUNING", ""))
_tables: dict[Path, Table] = {}
_lock = threading.RLock()


class tuning:
    """Turns tuning on or off, process-wide, as a call or for the length of a ``with`` block.

    Where it is on, the first call with new sizes times the algorithms that could serve it and remembers the fastest;
    this takes about a quarter of a second. It concerns convolutions on the CPU, forward and gradient in the input. It
    never overrides ``conv_algorithm``, ``torch.use_deterministic_algorithms`` or a stricter precision, and inside
    torch.compile, torch.func and forward mode nothing is timed. ``pyops explain`` says whether a choice was tuned.

    Args:
        setting: True for the file ``$XDG_CACHE_HOME/pyops/tuning.json`` (``~/.cache`` where that is not set), a path
            for another file, False for none. The environment variable PYOPS_TUNING does the same from the start, with
            ``1``, a path, or ``0``.

    Raises:
        ValueError: another setting.
    """

    def __init__(self, setting: bool | str | os.PathLike[str]) -> None:
        global _path
        self._before, _path = _path, _path_of(setting)

    def __enter__(self) -> tuning:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        global _path
        _path = self._before


def active() -> bool:
    """Whether tuning is on."""
    return _path is not None


def _machine() -> str:
    try:
        model = importlib.import_module("pyops._host").cpu_features()["model"]
    except ImportError:
        model = platform.processor() or platform.machine()
    return f"{model}, {library.cpu_capability() or 'baseline'}"


def _read(path: Path) -> dict[str, Any]:
    """The machines of a file; nothing where it is missing, damaged or of another version."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(f"tuning: {path} cannot be read and counts as empty: {error}", stacklevel=2)
        return {}
    if not isinstance(content, dict) or content.get("version") != VERSION:
        return {}
    machines = content.get("machines")
    return machines if isinstance(machines, dict) else {}


def _entries(machines: dict[str, Any]) -> Table:
    found = machines.get(_machine())
    valid = lambda e: isinstance(e, dict) and isinstance(e.get("choice"), str)
    return {k: e for k, e in found.items() if valid(e)} if isinstance(found, dict) else {}


def _table(path: Path) -> Table:
    if path not in _tables:
        _tables[path] = _entries(_read(path))
    return _tables[path]


def _write(path: Path, table: Table) -> None:
    """Adds a table to what the file holds by now."""
    machines = _read(path)
    machines[_machine()] = {**_entries(machines), **table}
    text = json.dumps({"version": VERSION, "machines": machines}, indent=1, sort_keys=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as file:
            file.write(text)
        os.replace(file.name, path)
    except OSError as error:
        warnings.warn(f"tuning: {path} cannot be written, choices last as long as the process: {error}", stacklevel=2)


def known(key: str) -> str | None:
    """The choice that was measured under a key, or None."""
    if _path is None:
        return None
    with _lock:
        entry = _table(_path).get(key)
    return None if entry is None else entry["choice"]


def best(key: str, candidates: Mapping[str, Callable[[], object]]) -> str:
    """The name of the fastest candidate: measured now, unless it was under this key before."""
    path = _path
    if path is None:
        raise RuntimeError("tuning: got a call of best() while it is off")
    with _lock:
        choice = known(key)
        if choice is not None and choice in candidates:
            return choice
        seconds = _measure(candidates)
        choice = min(seconds, key=seconds.__getitem__)
        _table(path)[key] = {"choice": choice, "seconds": {name: float(f"{s:.4g}") for name, s in seconds.items()}}
        _write(path, _table(path))
        return choice


def _measure(candidates: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Least time of each; they take turns, so that what slows the machine down slows them all."""
    for run in candidates.values():
        run()
    least = dict.fromkeys(candidates, float("inf"))
    start = time.perf_counter()
    for _ in range(ROUNDS):
        for name, run in candidates.items():
            before = time.perf_counter()
            run()
            least[name] = min(least[name], time.perf_counter() - before)
        if time.perf_counter() - start > SECONDS:
            break
    return least
