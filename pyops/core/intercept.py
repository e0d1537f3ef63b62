"""Routes torch's own functions to pyops for models that nobody edits: ``use``, its report, and the table of routes.

Rooms register themselves with ``route``; this module knows none of them. Calls are seen through a
``torch.overrides.TorchFunctionMode``: per thread, nestable, gone at exit, and understood by torch.compile. Nothing in
torch is replaced.
"""

from __future__ import annotations

import functools
import inspect
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import CodeType, FunctionType, TracebackType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext

from . import backend as backends
from . import tracing
from .check import FLOATING

Function = TypeVar("Function", bound=Callable[..., Any])


class Unsupported(NotImplementedError):
    """A pyops function says that it does not do this call, though torch does: under ``use`` torch then does it."""


# The routes


@dataclass(frozen=True)
class Route:
    """How the calls of one torch function reach pyops."""

    name: str
    function: Callable[..., Any]
    accepts: Callable[..., str | None]
    positions: tuple[str, ...] | None  # argument names of a torch builtin; None: called as pyops' function is
    parameters: tuple[str, ...] | None  # of the pyops function; None: any

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments as the pyops function takes them."""
        if self.positions is None:
            return args, kwargs
        named = dict(zip(self.positions, args))
        named.update(kwargs)
        return (), {name: value for name, value in named.items() if name not in _LIBRARY_SWITCHES}

    def refuses(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Why torch has to keep this call, or None."""
        if self.positions is not None and len(args) > len(self.positions):
            return "another overload"
        args, kwargs = self.arguments(args, kwargs)
        if self.parameters is not None:
            for name in kwargs:
                if name not in self.parameters:
                    return f"argument {name!r}"
        if reason := _not_plain((*args, *kwargs.values())):
            return reason
        return self.accepts(*args, **kwargs)

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = self.arguments(args, kwargs)
        return self.function(*args, **kwargs)


# Arguments of torch's builtins that choose a vendor library and mean nothing here.
_LIBRARY_SWITCHES = ("cudnn_enable", "cudnn_enabled")
_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer, FakeTensor, FunctionalTensor)
_routes: dict[Callable[..., Any], Route] = {}


def route(
    torch_functions: Iterable[Callable[..., Any]],
    name: str,
    pyops_function: Callable[..., Any],
    accepts: Callable[..., str | None] | None = None,
) -> None:
    """Sends calls of torch functions to a pyops function while ``use`` is active.

    Args:
        torch_functions: functions of ``torch.nn.functional``, builtins of ``torch`` or methods of ``torch.Tensor``.
            The arguments of builtins and methods are passed on by the names in their schema, so an argument order
            that differs from ``torch.nn.functional`` (``torch.batch_norm``) needs no adapter, and ``cudnn_enabled``
            is dropped.
        name: the op's name in ``use(ops=...)`` and in the report; several ``route`` calls may share one.
        pyops_function: takes the arguments by torch's names. It raises ``Unsupported`` *before any side effect* to
            hand a call back to torch; every other exception is the user's, or tells of a broken installation.
        accepts: called with the arguments of ``pyops_function``; returns why torch has to keep the call, or None.
            By default a call is taken if its first argument has a floating dtype of pyops.

    Raises:
        TypeError: if the pyops function needs an argument that the builtin has not, under that name.
    """
    try:
        signature = dict(inspect.signature(pyops_function).parameters)
    except ValueError:
        signature = {}
    free = not signature or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.values())
    parameters = None if free else tuple(signature)
    for function in torch_functions:
        positions = None if isinstance(function, FunctionType) else _schema_names(function)
        if positions is not None and parameters is not None:
            missing = [n for n, p in signature.items() if p.default is p.empty and n not in positions]
            if missing:
                raise TypeError(f"route {name!r}: {function!r} has no argument {missing[0]!r}")
        _routes[function] = Route(name, pyops_function, accepts or floating_input, positions, parameters)
    _find_composites()


def routed() -> tuple[str, ...]:
    """Names of the ops that ``use`` can route."""
    return tuple(sorted({r.name for r in _routes.values()}))


def _schema_names(function: Callable[..., Any]) -> tuple[str, ...] | None:
    """Positional argument names of a torch builtin, from the schema of its first overload."""
    packet = getattr(torch.ops.aten, function.__name__, None)
    if packet is None:
        return None
    overload = getattr(packet, "default" if "default" in packet.overloads() else packet.overloads()[0])
    names = (a.name for a in overload._schema.arguments if not a.kwarg_only)
    return tuple("input" if name == "self" else name for name in names)


def floating_input(*args: Any, **kwargs: Any) -> str | None:
    """Why the first argument is not of a floating dtype of pyops, or None."""
    first = args[0] if args else kwargs.get("input")
    if isinstance(first, torch.Tensor) and first.dtype not in FLOATING:
        return str(first.dtype).replace("torch.", "dtype ")
    return None


def _not_plain(values: Iterable[Any]) -> str | None:
    """Why the tensors among the arguments are not pyops' business, or None; of the first one more is asked."""
    first = True
    for value in values:
        if isinstance(value, torch.Tensor):
            if type(value) not in _PLAIN_TYPES:
                return f"tensor subclass {type(value).__name__}"
            if first:
                first = False
                if value.layout is not torch.strided:
                    return f"layout {value.layout}"
                if value.is_quantized:
                    return "quantized tensor"
                if value.device.type not in ("cpu", "cuda", "meta"):
                    return f"device {value.device.type}"
    return None


# Composites: functions of torch.nn.functional written in Python that call routed functions inside. A mode is off
# while its handler runs, so the handler runs their body again with the mode on. The body is the same code with
# has_torch_function answering no, so that it does not hand itself over to the mode for ever.

_composites: dict[Callable[..., Any], Callable[..., Any]] = {}
_body_globals: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}  # by id: a module's names, and ours of them


def _never(*_: Any) -> bool:
    return False


def _refresh_body_globals() -> None:
    """Follows whatever was assigned into the modules since."""
    for theirs, ours in _body_globals.values():
        ours.update(theirs)
        for name in ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"):
            if name in ours:
                ours[name] = _never


def _body(function: Any) -> Callable[..., Any]:
    theirs = function.__globals__
    _, ours = _body_globals.setdefault(id(theirs), (theirs, {}))
    if not ours:
        _refresh_body_globals()
    body = FunctionType(function.__code__, ours, function.__name__, function.__defaults__, function.__closure__)
    body.__kwdefaults__ = function.__kwdefaults__
    return body


def _names_in(code: CodeType) -> set[str]:
    nested = (_names_in(c) for c in code.co_consts if isinstance(c, CodeType))
    return set(code.co_names).union(*nested)


def _find_composites() -> None:
    names = {f.__name__ for f in _routes}
    for function in vars(F).values():
        if not isinstance(function, FunctionType) or function.__globals__ is not vars(F):
            continue
        if (_names_in(function.__code__) & names) - {function.__name__ if function in _routes else None}:
            _composites[function] = _body(function)


# Backward runs checkpointed forwards again, which have to take the same way as the first time.
_backwards = {f: _body(f) for f in (torch.Tensor.backward, torch.autograd.backward, torch.autograd.grad)}

_FUNCTIONAL_NAMES = frozenset(
    name
    for name, value in vars(F).items()
    if callable(value)
    and not isinstance(value, type)
    and not name.startswith(("_", "has_torch_function", "handle_torch_function", "boolean_dispatch"))
    and getattr(value, "__module__", None) != "typing"
)
_OTHER_NAMES = frozenset(("matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "cdist", "lstm", "gru", "rnn_tanh"))


def _op_name(function: Callable[..., Any]) -> str | None:
    """The name under which a torch function without route appears in the report; None: not worth a line."""
    name = getattr(function, "__name__", "")
    if name in ("__matmul__", "__rmatmul__"):
        return "matmul"
    name = name.rstrip("_")
    return name if name in _FUNCTIONAL_NAMES or name in _OTHER_NAMES else None


# The report


@dataclass
class Entry:
    """What happened to one op."""

    op: str
    calls: int = 0
    backends: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    seconds_torch: float = 0.0
    seconds_pyops: float = 0.0


NO_ROOM = "no pyops room yet"
NOT_CHOSEN = "not in ops="
_lock = threading.Lock()


class Report:
    """What ran where under ``use``, and why torch kept the rest.

    ``entries`` maps op names to ``Entry``: number of calls, calls by backend, calls torch kept by reason, and with
    ``timing=True`` the seconds spent in both (forward calls only; a composite's time is without that of the listed
    ops inside it). Ops of torch.nn.functional, matrix products and recurrent layers without a pyops room are
    listed too. ``str(report)`` is a table.
    """

    def __init__(self, timing: bool = False) -> None:
        self.timing = timing
        self.entries: dict[str, Entry] = {}

    def record(self, op: str, backend: str | None, reason: str | None, seconds: float) -> None:
        """Adds one call: of a backend, or kept by torch for a reason."""
        with _lock:
            entry = self.entries.get(op)
            if entry is None:
                entry = self.entries[op] = Entry(op)
            entry.calls += 1
            if reason is None:
                entry.backends[backend or "?"] += 1
                entry.seconds_pyops += seconds
            else:
                entry.kept[reason] += 1
                entry.seconds_torch += seconds

    def unrouted(self) -> dict[str, int]:
        """Calls of torch functions that have no pyops room, by name."""
        return {op: e.kept[NO_ROOM] for op, e in self.entries.items() if e.kept[NO_ROOM]}

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        ops = {
            op: {
                "calls": e.calls,
                "backends": dict(e.backends),
                "kept_by_torch": dict(e.kept),
                **({"seconds_torch": e.seconds_torch, "seconds_pyops": e.seconds_pyops} if self.timing else {}),
            }
            for op, e in self.entries.items()
        }
        return {"timing": self.timing, "ops": ops}

    def __str__(self) -> str:
        if not self.entries:
            return "pyops.use: no call seen"
        times = ["time torch", "time pyops"] if self.timing else []
        rows = [["op", "calls", "backend", *times, "why torch kept it"]]
        for e in sorted(self.entries.values(), key=lambda e: (not e.backends, -e.calls, e.op)):
            spent = [milliseconds(e.seconds_torch), milliseconds(e.seconds_pyops)] if self.timing else []
            rows.append([e.op, str(e.calls), counts(e.backends) or "torch", *spent, counts(e.kept)])
        return table(rows)


def counts(counter: Counter[str]) -> str:
    """``a`` or ``3 a, 1 b``."""
    if len(counter) == 1:
        return next(iter(counter))
    return ", ".join(f"{n} {name}" for name, n in counter.most_common())


def milliseconds(seconds: float) -> str:
    """``12.34 ms``; nothing for nothing."""
    return f"{seconds * 1e3:.2f} ms" if seconds else ""


def table(rows: list[list[str]]) -> str:
    """Rows as aligned text, the first one as the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join((lines[0], "  ".join("─" * width for width in widths), *lines[1:]))


# The mode

_reports = threading.local()


@tracing.constant
def _note_traced(op: str, device_type: str, reason: str | None) -> None:
    """Runs while torch.compile traces, never in the compiled code: the report is no part of the graph."""
    for report in getattr(_reports, "active", ()):
        backend = backends.forced() or backends.default_for(device_type)
        report.record(op, backend, reason, 0.0)


def _device_type(values: tuple[Any, ...]) -> str:
    for value in values:
        if isinstance(value, torch.Tensor):
            return value.device.type
    return "cpu"


class _Mode(TorchFunctionMode):
    """One entered ``use``; lives in one thread."""

    # __enter__ and __exit__ must stay those of the base class: torch.compile supports no others.

    def __init__(self, owner: use) -> None:
        self.owner = owner
        self.ops = owner.ops
        self.covered = False  # by a `use` entered inside this one, which decides alone
        self.covers: _Mode | None = None
        self.reenters = True
        self.reports: tuple[Report, ...] = ()
        self.forced: Any = None
        self.running: tuple[str, ...] = ()
        self.listed_seconds = 0.0  # spent in listed ops inside the op that runs now

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = {} if kwargs is None else kwargs
        if self.covered:
            return func(*args, **kwargs)
        found = _routes.get(func)
        if torch.compiler.is_compiling():
            return self._trace(found, func, args, kwargs)
        if found is None:
            return self._torch(func, args, kwargs, _op_name(func), NO_ROOM)
        return self._pyops(found, func, args, kwargs)

    def _pyops(self, found: Route, func: Any, args: tuple, kwargs: dict) -> Any:
        if found.name in self.running:
            return func(*args, **kwargs)
        if self.ops is not None and found.name not in self.ops:
            reason: str | None = NOT_CHOSEN
        else:
            reason = found.refuses(args, kwargs)
        if reason is None:
            backend = backends.forced() or backends.default_for(_device_type((*args, *kwargs.values())))
            start = self._clock()
            try:
                result = found(args, kwargs)
            except Unsupported as error:
                reason = str(error)
            else:
                self._record(found.name, backend, None, self._clock() - start)
                return result
        return self._torch(func, args, kwargs, found.name, reason)

    def _torch(self, func: Any, args: tuple, kwargs: dict, name: str | None, reason: str) -> Any:
        body = None
        if self.reenters and type(func) is FunctionType:
            body = _composites.get(func) or _backwards.get(func)
        if name is None or name in self.running:
            return func(*args, **kwargs) if body is None else self._inside(body, args, kwargs)
        running, before = self.running, self.listed_seconds
        self.running, self.listed_seconds = (*running, name), 0.0
        start = self._clock()
        try:
            result = func(*args, **kwargs) if body is None else self._inside(body, args, kwargs)
        finally:
            inside, self.running, self.listed_seconds = self.listed_seconds, running, before
        seconds = self._clock() - start
        self._record(name, None, reason, seconds - inside)
        self.listed_seconds += inside
        return result

    def _inside(self, body: Any, args: tuple, kwargs: dict) -> Any:
        with self:
            return body(*args, **kwargs)

    def _trace(self, found: Route | None, func: Any, args: tuple, kwargs: dict) -> Any:
        if found is not None:
            device_type = _device_type((*args, *kwargs.values()))
            if self.ops is not None and found.name not in self.ops:
                reason: str | None = NOT_CHOSEN
            else:
                reason = found.refuses(args, kwargs)
            if reason is None:
                try:
                    result = found(args, kwargs)
                except Unsupported:
                    reason = "unsupported"
                else:
                    _note_traced(found.name, device_type, None)
                    return result
            _note_traced(found.name, device_type, reason)
        elif func is torch.Tensor.unflatten:
            # torch.compile cannot trace this method under any mode (it calls super().unflatten).
            return torch.unflatten(*args, **kwargs)
        body = _composites.get(func)
        if body is not None:
            return self._inside(body, args, kwargs)
        return func(*args, **kwargs)

    def _clock(self) -> float:
        if not self.owner.timing:
            return 0.0
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter()

    def _record(self, op: str, backend: str | None, reason: str | None, seconds: float) -> None:
        self.listed_seconds += seconds
        for report in self.reports:
            report.record(op, backend, reason, seconds)


class use:
    """Routes torch's functions to pyops inside a ``with`` block or a decorated function, for models nobody edits.

    ::

        with pyops.use() as report:
            loss = model(images).sum()
            loss.backward()
        print(report)

    Calls of ``torch.nn.functional``, ``torch`` and ``torch.Tensor`` that pyops has a room for go to pyops: from
    modules, from code of the model, and from inside Python composites such as
    ``torch.nn.functional.multi_head_attention_forward``. What pyops does not do stays with torch, and the report says
    why; errors of the caller propagate. Nothing in torch is replaced: at exit, also by an exception, no trace is left.

    - Threads: only the thread that entered is routed (and the autograd threads that work for it). Gradients need no
      mode, so ``backward`` may run outside, unless it runs checkpointed forwards again: then keep it inside the block.
    - Nesting: the innermost ``use`` decides alone, so ``use(ops=[])`` exempts a region. All active reports count.
    - ``torch.compile``: ``with pyops.use(): compiled(x)`` and ``use`` inside the compiled function both trace into one
      graph. **The report then counts calls when they are traced, not each time the graph runs**, and without times;
      of ops without a room it lists only what the compiled code itself calls (matrix products). It stays empty for a
      ``use`` entered inside the compiled function.
    - ``nn.TransformerEncoderLayer`` and ``nn.MultiheadAttention``: torch switches off their fused inference path while
      a mode is active, so in eval mode too they run op by op and are routed (and are slower where few ops have a room).
    - Out of reach: scripted modules (``torch.jit.script``), what C++ ops call inside themselves, and code that calls
      ``torch.ops.aten`` directly.

    Args:
        ops: names to route; None routes everything that pyops has. ``pyops.use.known()`` lists them.
        backend: forces one backend meanwhile, as ``pyops.backend`` does (process-wide).
        timing: the report measures the forward time of every listed call (synchronises the GPU around each).

    Attributes:
        report: the ``Report``, also the value of ``with``; counts on if the object is entered again.

    Raises:
        ValueError: for an unknown op or backend name.
        RuntimeError: if the forced backend cannot run here.
    """

    def __init__(
        self, ops: Iterable[str] | str | None = None, backend: str | None = None, *, timing: bool = False
    ) -> None:
        if ops is not None:
            ops = (ops,) if isinstance(ops, str) else tuple(ops)
            known = use.known()
            for name in ops:
                if name not in known:
                    raise ValueError(f"use: argument 'ops': got {name!r}, expected names among {', '.join(known)}")
        if backend is not None and backend not in backends.NAMES:
            raise ValueError(f"use: argument 'backend': got {backend!r}, expected one of {', '.join(backends.NAMES)}")
        self.ops: tuple[str, ...] | None = ops
        self.backend = backend
        self.timing = timing
        self.report = Report(timing)

    @staticmethod
    def known() -> tuple[str, ...]:
        """Names of the ops that can be routed."""
        return routed()

    def __enter__(self) -> Report:
        mode = _Mode(self)
        if self.backend is not None:
            mode.forced = backends.backend(self.backend)
        if not torch.compiler.is_compiling():
            _refresh_body_globals()
            below = torch.overrides._get_current_function_mode_stack()
            # A foreign mode below wants to see composites whole: then their insides are left alone.
            mode.reenters = all(isinstance(m, (_Mode, DeviceContext)) for m in below)
            mode.covers = next((m for m in reversed(below) if isinstance(m, _Mode)), None)
            if mode.covers is not None:
                mode.covers.covered = True
            mode.reports = _reports.active = (*getattr(_reports, "active", ()), self.report)
        mode.__enter__()
        return self.report

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        mode = torch.overrides._pop_mode()
        if not isinstance(mode, _Mode) or mode.owner is not self:
            torch.overrides._push_mode(mode)
            raise RuntimeError("use: left in another order than entered")
        if mode.reports:
            _reports.active = _reports.active[:-1]
        if mode.covers is not None:
            mode.covers.covered = False
        if mode.forced is not None:
            mode.forced.__exit__(kind, error, tb)

    def __call__(self, function: Function) -> Function:
        if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
            raise TypeError("use: a coroutine or generator runs after the decorator has left; use `with` inside it")

        @functools.wraps(function)
        def routed_function(*args: Any, **kwargs: Any) -> Any:
            # torch.compile enters no context manager that was made outside the graph.
            with use(self.ops, self.backend) if torch.compiler.is_compiling() else self:
                return function(*args, **kwargs)

        return routed_function  # type: ignore[return-value]
