"""The checks that every pyops op passes, for your own op: ``check_op(fn, reference, samples)``.

    from pyops.testing import Maker, Sample, check_op

    def scale(t: Maker):
        return (t.input((3, 5)), 2.0), {}

    for result in check_op(my_scale, lambda x, a: x * a, [Sample("ragged", scale, derivatives=True)]):
        print(result)

A sample builds its arguments with a ``Maker``; ``Maker.input`` makes the tensors that get gradients. The reference is
plain torch; run in float64 it is the truth, run in the op's dtype it sets the error that is acceptable:
``err(op) <= 2 * err(reference) + slack``, the slack being a few machine epsilons (``SLACK``).
"""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from . import functional, vision  # noqa: F401  the rooms register their samples
from .core import backend as backends
from .core.samples import Checked, Maker, Sample, all_checked

__all__ = ["CheckResult", "Maker", "Sample", "check_op", "check_room", "checks", "rooms"]

# dtype -> slack of the accuracy check in machine epsilons of the largest value: sums in another order than torch's.
# Halves are summed in float32, so theirs is the rounding of the result alone.
SLACK = {torch.float32: 8, torch.float64: 16, torch.bfloat16: 1, torch.float16: 1}
DTYPES = tuple(SLACK)


@dataclass(frozen=True)
class CheckResult:
    """Outcome of one check on one op and backend; ``detail`` says what went wrong, and where."""

    op: str
    backend: str
    check: str
    ok: bool
    detail: str = ""


@dataclass(frozen=True)
class _Case:
    """An op under check."""

    op: Checked
    device: str
    dtypes: tuple[torch.dtype, ...]
    slow: bool  # each call costs milliseconds: see check_op

    def arguments(self, sample: Sample, dtype: torch.dtype, grad: bool = False) -> tuple[tuple, dict, Maker]:
        maker = Maker(dtype, self.device, grad)
        args, kwargs = sample.make(maker)
        return args, kwargs, maker


def _outputs(y: Any) -> list[torch.Tensor]:
    """The tensors among the results of a call."""
    return [t for t in (y if isinstance(y, (tuple, list)) else (y,)) if isinstance(t, torch.Tensor)]


def _label(kind: str, index: int, count: int) -> str:
    return kind if count == 1 else f"{kind} {index}"


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference in float64; equal infinities and NaN in the same places count as equal."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    if a.numel() == 0:
        return 0.0
    same = (a == b) | (a.isnan() & b.isnan())
    return torch.where(same, torch.zeros_like(a), (a - b).abs().nan_to_num(nan=float("inf"))).max().item()


def _run(function: Callable, case: _Case, sample: Sample, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Outputs, input gradients from all outputs together, and constants after the call (running statistics change)."""
    args, kwargs, maker = case.arguments(sample, dtype, grad=True)
    outputs = _outputs(function(*args, **kwargs))
    named = {_label("output", i, len(outputs)): y for i, y in enumerate(outputs)}
    generator = torch.Generator().manual_seed(1)
    smooth = [y for y in outputs if y.requires_grad]
    along = [torch.randn(y.shape, generator=generator, dtype=torch.float64).bfloat16().to(y) for y in smooth]
    if smooth:
        grads: Any = torch.autograd.grad(smooth, maker.inputs, along, allow_unused=True)
    else:
        grads = [None] * len(maker.inputs)
    for i, (x, g) in enumerate(zip(maker.inputs, grads)):
        named[f"gradient of input {i}"] = torch.zeros_like(x) if g is None else g
    constants = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and not t.requires_grad]
    return {**named, **{f"constant {i}": t for i, t in enumerate(constants)}}


def _accuracy(case: _Case, sample: Sample) -> str:
    """Outputs, gradients and updated buffers in every dtype, against the reference in float64.

    In float64 the reference is the truth itself; its own error there is taken as that of float32, scaled by the ratio
    of the machine epsilons.
    """
    truth = _run(case.op.reference, case, sample, torch.float64)
    single = _run(case.op.reference, case, sample, torch.float32)
    ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    for dtype in case.dtypes:
        ours = _run(case.op.function, case, sample, dtype)
        theirs = _run(case.op.reference, case, sample, dtype)
        if list(ours) != list(theirs):
            return f"{dtype}: got {', '.join(ours)}, expected {', '.join(theirs)}"
        for what, a in ours.items():
            t, exact = theirs[what], truth[what]
            if a.shape != t.shape or a.dtype != t.dtype:
                return f"{dtype} {what}: got {list(a.shape)} {a.dtype}, expected {list(t.shape)} {t.dtype}"
            scale = max(1.0, exact.double().abs().nan_to_num().max().item()) if exact.numel() else 1.0
            reference_error = _difference(t, exact)
            if dtype == torch.float64:
                reference_error = _difference(single[what], exact) * ratio
            allowed = 2 * reference_error + SLACK[dtype] * torch.finfo(dtype).eps * scale
            error = _difference(a, exact)
            if not error <= allowed:
                return f"{dtype} {what}: error {error:.3g}, allowed {allowed:.3g}"
    return ""


def _swapping(values: Iterable[Any], swap: dict[int, torch.Tensor]) -> tuple:
    """The values, those exchanged whose id is in ``swap``."""
    return tuple(swap.get(id(v), v) for v in values)


def _layout(case: _Case, sample: Sample) -> str:
    """A strided first input gives the same numbers; channels last stays channels last, in gradients too."""
    args, kwargs, maker = case.arguments(sample, torch.float32, grad=True)
    outputs = _outputs(case.op.function(*args, **kwargs))
    if not maker.inputs:
        return ""
    x = maker.inputs[0]
    if x.dim() > 3 and x.stride() != x.contiguous().stride():
        y = outputs[0]
        (dx,) = torch.autograd.grad(y.sum(), x)
        for name, t in (("output", y), ("gradient", dx)):
            last = x.movedim(1, -1).is_contiguous() and t.movedim(1, -1).is_contiguous()
            if not last and t.stride() != x.stride():
                return f"{name} has strides {t.stride()}, input {x.stride()}"
    args, kwargs, maker = case.arguments(sample, torch.float32)
    x = maker.inputs[0]
    swap = {id(x): torch.stack([x, x + 1], -1)[..., 0]}  # every second element
    strided = case.op.function(*_swapping(args, swap), **dict(zip(kwargs, _swapping(kwargs.values(), swap))))
    for y, z in zip(outputs, _outputs(strided)):
        if not torch.equal(z, y) and _difference(z, y) > 1e-5 * max(1.0, y.abs().max().item()):
            return "strided input"
    return ""


def _determinism(case: _Case, sample: Sample) -> str:
    """Bitwise equal over repeats and numbers of threads."""
    threads = torch.get_num_threads()
    try:
        first = _run(case.op.function, case, sample, torch.float32)
        for count in (threads, 1 if threads > 1 else 2):
            torch.set_num_threads(count)
            again = _run(case.op.function, case, sample, torch.float32)
            for what, a in first.items():
                if not torch.equal(a.nan_to_num(), again[what].nan_to_num()):
                    return f"{what} differs between runs"
    finally:
        torch.set_num_threads(threads)
    return ""


def _pure(case: _Case, sample: Sample) -> tuple[Callable[..., tuple[torch.Tensor, ...]], list[torch.Tensor]]:
    """The op's differentiable outputs as a function of its differentiable float64 inputs alone, and those inputs."""
    args, kwargs, maker = case.arguments(sample, torch.float64, grad=True)
    smooth = [i for i, y in enumerate(_outputs(case.op.function(*args, **kwargs))) if y.requires_grad]

    def of_inputs(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        swap = {id(old): new for old, new in zip(maker.inputs, values)}
        given = dict(zip(kwargs, _swapping(kwargs.values(), swap)))
        outputs = _outputs(case.op.function(*_swapping(args, swap), **given))
        return tuple(outputs[i] for i in smooth)

    return of_inputs, maker.inputs


# Along a random direction an entry of n weighs 1 / n: in float64, where differences leave some 1e-9, hold them to less
# than torch's 1e-3.
_ALONG_DIRECTIONS = {"fast_mode": True, "atol": 1e-7, "rtol": 1e-5}


def _gradcheck(case: _Case, sample: Sample) -> str:
    """Analytic against numerical first derivatives along random directions, reverse and forward mode, batched."""
    function, inputs = _pure(case, sample)
    torch.autograd.gradcheck(
        function, inputs, **_ALONG_DIRECTIONS, check_undefined_grad=not case.slow,
        check_forward_ad=True, check_batched_grad=not case.slow,
    )  # fmt: skip
    return ""


def _gradgradcheck(case: _Case, sample: Sample) -> str:
    """The same of second derivatives, reverse over reverse and forward over reverse."""
    function, inputs = _pure(case, sample)
    torch.autograd.gradgradcheck(
        function, inputs, **_ALONG_DIRECTIONS, check_undefined_grad=not case.slow, check_fwd_over_rev=True
    )
    return ""


def _jacobians(case: _Case, sample: Sample) -> str:
    """First and second derivatives, every entry of the numerical Jacobians."""
    function, inputs = _pure(case, sample)
    torch.autograd.gradcheck(function, inputs, check_undefined_grad=False, check_forward_ad=True)
    torch.autograd.gradgradcheck(function, inputs, check_undefined_grad=False, check_fwd_over_rev=True)
    return ""


def _probe(t: torch.Tensor) -> torch.Tensor:
    """A fixed direction of the tensor's shape, in general position."""
    return torch.sin(torch.arange(t.numel(), dtype=t.dtype, device=t.device)).reshape(t.shape)


def _total(outputs: Iterable[torch.Tensor]) -> torch.Tensor:
    """One number that depends on every output, not linearly."""
    return torch.stack([y.sin().sum() for y in outputs]).sum()


def _transforms(case: _Case, sample: Sample) -> str:
    """torch.func: jvp against the reference, vmap against a loop, vmap of grad, over every input alone.

    With several outputs the gradient is taken from all together and from each alone, the others unused.
    """
    function, inputs = _pure(case, sample)
    reference, _ = _pure(_Case(_swapped(case.op), case.device, case.dtypes, case.slow), sample)
    inputs = [x.detach() for x in inputs]
    for i, x in enumerate(inputs):

        def one(f: Callable, v: torch.Tensor, i: int = i) -> tuple[torch.Tensor, ...]:
            return f(*inputs[:i], v, *inputs[i + 1 :])

        if x.numel() == 0:
            continue
        # torch's own norms need not have forward mode: compare with its vjp, transposed by linearity
        ours = torch.func.jvp(lambda v: one(function, v), (x,), (x.cos(),))[1]
        _, pullback = torch.func.vjp(lambda v: one(reference, v), x)
        (pulled,) = pullback(tuple(_probe(t) for t in ours))
        along = torch.stack([(t * _probe(t)).sum() for t in ours]).sum()
        if abs(along - (pulled * x.cos()).sum()) > 1e-8 * (1 + sum(t.abs().sum() for t in ours)):
            return f"jvp in input {i}"
        batch = torch.stack([x, x * 2 - 1, x.sin()], -1)
        for dim in (0, -1):
            moved = batch.movedim(-1, dim)
            mapped = torch.func.vmap(lambda v: one(function, v), in_dims=dim)(moved)
            looped = [torch.stack(rows) for rows in zip(*(one(reference, v) for v in batch.unbind(-1)))]
            for k, (got, expected) in enumerate(zip(mapped, looped)):
                if _difference(got, expected) > 1e-9 * (1 + expected.abs().max().item()):
                    return f"vmap over dimension {dim} of input {i}, {_label('output', k, len(mapped))}"
        alone = [slice(k, k + 1) for k in range(len(ours))] if len(ours) > 1 else []
        for used in (slice(None), *alone):

            def gradient(f: Callable, v: torch.Tensor, used: slice = used) -> torch.Tensor:
                return torch.func.grad(lambda u: _total(one(f, u)[used]))(v)

            got = torch.func.vmap(lambda v: gradient(function, v), in_dims=-1)(batch)
            expected = torch.stack([gradient(reference, v) for v in batch.unbind(-1)])
            if _difference(got, expected) > 1e-8 * (1 + expected.abs().max().item()):
                return f"vmap of grad in input {i}" + ("" if used == slice(None) else f", output {used.start} alone")
    return ""


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """Without the messages of one logger."""
    log = logging.getLogger(logger)
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _swapped(op: Checked) -> Checked:
    return Checked(op.name, op.reference, op.reference, op.samples)


def fresh_compiler() -> None:
    """Nothing compiled before is left: of code, nor of the shapes and views that earlier ops gave fake tensors.

    torch keeps the latter for the whole process; an entry made by one op has made the trace of another fail.
    """
    torch._dynamo.reset()
    FakeTensorMode.cache_clear()


def _drop_late_guards() -> None:
    """Collects what a failed compilation left, now, where the thread's dispatch state can be kept.

    Of Triton's interpreter the compiler keeps a suspended frame; when it is collected, it puts the dispatch keys back
    that held inside, and with them every later call would run without autograd.
    """
    with torch._C._PreserveDispatchKeyGuard():
        gc.collect()


def _compiled(case: _Case, sample: Sample) -> str:
    """torch.compile(fullgraph=True), forward and backward, equals eager."""
    fresh_compiler()
    compiled = torch.compile(case.op.function, fullgraph=True, backend="aot_eager")
    eager, graph = (_run(f, case, sample, torch.float32) for f in (case.op.function, compiled))
    for what, a in eager.items():
        b = graph[what]
        if a.stride() != b.stride():
            return f"{what}: strides {b.stride()} compiled, {a.stride()} eager"
        if _difference(a, b) > 1e-6 * max(1.0, a.double().abs().max().item() if a.numel() else 0.0):
            return f"{what} differs"
    return ""


def _compiled_transforms(case: _Case, sample: Sample) -> str:
    """jvp and gradient under torch.compile: the numbers of eager mode, or an error, never other numbers."""
    function, inputs = _pure(case, sample)
    x, rest = inputs[0].detach(), [t.detach() for t in inputs[1:]]
    fresh_compiler()

    def direction(v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.func.jvp(lambda u: function(u, *rest), (v,), (v.cos(),))[1]

    def gradient(v: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda u: _total(function(u, *rest)))(v)

    for name, transform in (("jvp", direction), ("grad", gradient)):
        failed = False
        try:
            with _quiet("torch._subclasses.fake_tensor"):  # torch logs each op of forward mode that it cannot trace
                result = torch.compile(transform, backend="aot_eager")(x)
        except Exception:
            failed = True  # a clear error is acceptable, a wrong number is not
        if failed:
            _drop_late_guards()
            continue
        for got, expected in zip(_outputs(result), _outputs(transform(x))):
            if _difference(got, expected) > 1e-9:
                return f"compiled {name} is wrong"
    return ""


def _autocast(case: _Case, sample: Sample) -> str:
    """Under autocast the output has the dtype torch gives it."""
    args, kwargs, _ = case.arguments(sample, torch.float32)
    with torch.autocast(case.device.split(":")[0], torch.bfloat16):
        got = [y.dtype for y in _outputs(case.op.function(*args, **kwargs))]
        try:
            expected = [y.dtype for y in _outputs(case.op.reference(*args, **kwargs))]
        except RuntimeError as error:
            if "primitive descriptor" not in str(error):
                raise
            # what torch leaves to oneDNN is in bfloat16, but this CPU cannot run it
            expected = [torch.bfloat16] * len(got)
    return "" if got == expected else f"got {got}, torch {expected}"


class _Recorder(TorchDispatchMode):
    """Collects the pyops ops that run, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[Any, tuple[tuple, dict]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace.startswith("pyops"):
            self.seen.setdefault(func, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _opcheck(case: _Case, sample: Sample) -> str:
    """torch.library.opcheck on every op the call runs: schema, fake, autograd registration."""
    with _Recorder() as recorder:
        _run(case.op.function, case, sample, torch.float32)
    for op, (args, kwargs) in recorder.seen.items():
        fresh = tuple(a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args)
        tests = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(op, fresh, kwargs, test_utils=tests)
    return ""


class _Check(NamedTuple):
    """A check, and when it is content with fewer samples: "always", or "slow", where calls are (see check_op)."""

    function: Callable[[_Case, Sample], str]
    small: str = ""  # with those made for numerical derivatives
    none: str = ""  # with none at all
    first: str = ""  # with the first of them
    one_dtype: str = ""  # with one dtype for each


_CHECKS = {
    "accuracy": _Check(_accuracy, one_dtype="slow"),
    "layout": _Check(_layout),
    "determinism": _Check(_determinism, small="slow"),
    "autocast": _Check(_autocast),
    "opcheck": _Check(_opcheck, small="slow"),
    "gradcheck": _Check(_gradcheck, small="always"),
    "gradgradcheck": _Check(_gradgradcheck, small="always", first="slow"),
    "jacobians": _Check(_jacobians, small="always", none="slow"),
    "transforms": _Check(_transforms, small="always"),
    "compile": _Check(_compiled, small="always"),
    "compiled_transforms": _Check(_compiled_transforms, small="always", first="always"),  # seconds each
}


def checks() -> tuple[str, ...]:
    """Names of all checks."""
    return tuple(_CHECKS)


def rooms() -> tuple[str, ...]:
    """Names of all ops that pyops can check."""
    return tuple(all_checked())


def check_op(
    fn: Callable[..., Any],
    reference: Callable[..., Any],
    samples: Iterable[Sample],
    *,
    name: str | None = None,
    device: str = "cpu",
    dtypes: Iterable[torch.dtype] = DTYPES,
    only: Iterable[str] | None = None,
    slow: bool = False,
    label: str = "",
) -> list[CheckResult]:
    """Runs every check on an op: accuracy, layout, determinism, autocast, opcheck, derivatives, transforms, compile.

    Args:
        fn: the op.
        reference: the same function in plain torch, differentiable.
        samples: cases; those with ``derivatives=True`` (few elements) also go through the checks of derivatives:
            gradcheck and gradgradcheck along random directions, jacobians entry by entry.
        name: shown in results; the function's own name by default.
        device: where the samples are made.
        dtypes: dtypes of the accuracy check.
        only: names of checks to run (see ``checks()``); all by default.
        slow: for backends whose calls cost milliseconds: numerical derivatives along random directions only (nothing of
            jacobians), second ones on the first sample only, without undefined and batched gradients, which do not
            reach the kernels; determinism and opcheck on the small samples only; accuracy of each sample in one dtype,
            in turn.
        label: shown as the backend.

    Returns:
        One result per check; it never raises for a failing op.

    Raises:
        ValueError: an unknown check name.
    """
    op = Checked(name or str(getattr(fn, "__name__", "op")), fn, reference, tuple(samples))
    chosen = tuple(_CHECKS) if only is None else tuple(only)
    for check in chosen:
        if check not in _CHECKS:
            raise ValueError(f"check_op: argument 'only': got {check!r}, expected names among {', '.join(_CHECKS)}")
    case = _Case(op, device, tuple(dtypes), slow)
    return [_verdict(case, check, label or device) for check in chosen]


def _runs(check: _Check, case: _Case) -> Iterator[tuple[_Case, Sample]]:
    """What the check is called with."""

    def holds(when: str) -> bool:
        return when == "always" or (when == "slow" and case.slow)

    samples = () if holds(check.none) else case.op.samples
    if holds(check.small):
        small = tuple(sample for sample in samples if sample.derivatives)
        samples = small if small or check.small == "always" else samples
    # in turn, if there are samples enough for every dtype
    in_turn = holds(check.one_dtype) and len(case.dtypes) <= len(samples)
    for i, sample in enumerate(samples[:1] if holds(check.first) else samples):
        yield replace(case, dtypes=(case.dtypes[i % len(case.dtypes)],)) if in_turn else case, sample


def _verdict(case: _Case, check: str, label: str) -> CheckResult:
    for of_sample, sample in _runs(_CHECKS[check], case):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                problem = _CHECKS[check].function(of_sample, sample)
        except Exception as error:
            problem = f"{type(error).__name__}: {str(error).strip()[:600]}"
        if problem:
            return CheckResult(case.op.name, label, check, False, f"[{sample.name}] {problem}")
    return CheckResult(case.op.name, label, check, True)


def check_room(op: str, backend: str | None = None, only: Iterable[str] | None = None) -> list[CheckResult]:
    """Runs every check on a pyops op under one backend.

    Raises:
        ValueError: an op without samples, or an unknown backend.
        RuntimeError: the backend cannot run here.
    """
    known = all_checked()
    if op not in known:
        raise ValueError(f"check: got {op!r}, expected one of {', '.join(known)}")
    room = known[op]
    device = "cuda" if backend == "cuda" or (backend == "triton" and torch.cuda.is_available()) else "cpu"
    slow = backend == "triton" and device == "cpu"
    with backends.backend(backend) if backend is not None else nullcontext():
        return check_op(
            room.function, room.reference, room.samples,
            name=op, device=device, only=only, slow=slow, label=backend or backends.default_for(device),
        )  # fmt: skip
