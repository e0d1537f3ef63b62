"""optim · Triton
  sgd_step, adagrad_step, rmsprop_step, adam_step   p, states <- rule(p, g, states), as in csrc/common/optim.h
  multi_norm    (sum over all tensors of |x|^order)^(1/order), order 1, 2 or infinity
  multi_scale   x <- min(1, max_norm / (total_norm + 1e-6)) x
  multi_clamp   x <- min(max(x, -bound), bound)
  multi_lerp    x <- x + weight (y - x)
layout   lists of tensors of any shape, each without gaps, a parameter and its states in the same order
mapping  one launch for all tensors: a table of addresses [T, P] and one of chunks [C, 3] = (tensor, begin, size) lie on
         the device; a program takes a chunk of 4096 elements
memory   each tensor read once and, where it changes, written once
numerics in fp32 (fp64 for fp64); what depends on the step's number is computed in fp64
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ._toolbox import SPECIMEN_TYPES, Specimen

BLOCK, GROUP = 1024, 4
SGD, ADAGRAD, RMSPROP, ADAM = 0, 1, 2, 3
ONE, TWO, INFINITY = 0, 1, 2
SCALE, CLAMP, LERP = 0, 1, 2


@triton.jit
def address(table, tensor, which, WIDTH: tl.constexpr, T: tl.constexpr):
    """The pointer that the table holds for one of a tensor's companions."""
    return tl.load(table + tensor * WIDTH + which).to(tl.pointer_type(T), bitcast=True)


@triton.jit
def optim_step_kernel(
    like, state_like, table, chunks, paces, numbers, scaling,
    RULE: tl.constexpr, MASTER: tl.constexpr, UNSCALES: tl.constexpr,
    WEIGHT_DECAY: tl.constexpr, USES0: tl.constexpr, USES1: tl.constexpr, USES2: tl.constexpr, FLAG: tl.constexpr,
    BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One chunk. paces [T, 3]: step length, factor of the root, decay; numbers [8], scaling [3]: fp64.

    FLAG: nesterov, centered or decoupled. Columns of the table: parameter, gradient, three states, master.
    """
    T: tl.constexpr = like.dtype.element_ty
    S: tl.constexpr = state_like.dtype.element_ty
    acc_t: tl.constexpr = tl.float64 if tl.float64 == T else tl.float32
    if tl.load(scaling + 2) != 0.0:
        return
    chunk = tl.program_id(0).to(tl.int64) * 3
    tensor, begin, size = tl.load(chunks + chunk), tl.load(chunks + chunk + 1), tl.load(chunks + chunk + 2)
    size_of_step = tl.load(paces + tensor * 3).to(acc_t)
    root = tl.load(paces + tensor * 3 + 1).to(acc_t)
    decay = tl.load(paces + tensor * 3 + 2).to(acc_t)
    n0, n1 = tl.load(numbers).to(acc_t), tl.load(numbers + 1).to(acc_t)
    n2, n3 = tl.load(numbers + 2).to(acc_t), tl.load(numbers + 3).to(acc_t)
    weight_decay = tl.load(numbers + 4).to(acc_t)
    unscale, factor = tl.load(scaling).to(acc_t), tl.load(scaling + 1).to(acc_t)
    param = address(table, tensor, 0, 6, T) + begin
    grad = address(table, tensor, 1, 6, T) + begin
    for k in range(GROUP):
        i = k * BLOCK + tl.arange(0, BLOCK)
        valid = i < size
        g = tl.load(grad + i, mask=valid, other=0.0).to(acc_t)
        if UNSCALES:
            g *= unscale
            tl.store(grad + i, g.to(T), mask=valid)
        g *= factor
        if MASTER:
            master = address(table, tensor, 5, 6, S) + begin
            p = tl.load(master + i, mask=valid, other=0.0).to(acc_t)
        else:
            p = tl.load(param + i, mask=valid, other=0.0).to(acc_t)
        if USES0:
            state0 = address(table, tensor, 2, 6, S) + begin
            s0 = tl.load(state0 + i, mask=valid, other=0.0).to(acc_t)
        if USES1:
            state1 = address(table, tensor, 3, 6, S) + begin
            s1 = tl.load(state1 + i, mask=valid, other=0.0).to(acc_t)
        if USES2:
            state2 = address(table, tensor, 4, 6, S) + begin
            s2 = tl.load(state2 + i, mask=valid, other=0.0).to(acc_t)
        if WEIGHT_DECAY:
            g += p * weight_decay
        if RULE == 0:  # sgd: n0 momentum, n1 share of the new gradient
            if USES0:
                s0 = s0 * n0 + g * n1
                if FLAG:
                    g += s0 * n0
                else:
                    g = s0
            p -= g * size_of_step
        elif RULE == 1:  # adagrad: n0 eps
            s0 += g * g
            p -= size_of_step * g / (tl.sqrt(s0) + n0)
        elif RULE == 2:  # rmsprop: n0 alpha, n1 1 - alpha, n2 eps, n3 momentum
            s0 = s0 * n0 + g * g * n1
            square = s0
            if FLAG:
                s2 += (g - s2) * n1
                square = s0 - s2 * s2
            u = g / (tl.sqrt(square) + n2)
            if USES1:
                s1 = s1 * n3 + u
                u = s1
            p -= u * size_of_step
        else:  # adam: n0 1 - beta1, n1 beta2, n2 1 - beta2, n3 eps
            if FLAG:
                p *= decay
            s0 += (g - s0) * n0
            s1 = s1 * n1 + g * g * n2
            square = s1
            if USES2:
                s2 = tl.where(s2 > s1, s2, s1)
                square = s2
            p -= size_of_step * s0 / (tl.sqrt(square) * root + n3)
        if USES0:
            tl.store(state0 + i, s0.to(S), mask=valid)
        if USES1:
            tl.store(state1 + i, s1.to(S), mask=valid)
        if USES2:
            tl.store(state2 + i, s2.to(S), mask=valid)
        if MASTER:
            tl.store(master + i, p.to(S), mask=valid)
        tl.store(param + i, p.to(T), mask=valid)


@triton.jit
def optim_norm_kernel(like, table, chunks, parts, NORM: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """The sum of |x|, of x² or the largest |x| of one chunk. NaN stays."""
    T: tl.constexpr = like.dtype.element_ty
    acc_t: tl.constexpr = tl.float64 if tl.float64 == T else tl.float32
    chunk = tl.program_id(0).to(tl.int64) * 3
    tensor, begin, size = tl.load(chunks + chunk), tl.load(chunks + chunk + 1), tl.load(chunks + chunk + 2)
    x = address(table, tensor, 0, 2, T) + begin
    total = tl.zeros((BLOCK,), acc_t)
    for k in range(GROUP):
        i = k * BLOCK + tl.arange(0, BLOCK)
        v = tl.abs(tl.load(x + i, mask=i < size, other=0.0).to(acc_t))
        if NORM == 0:
            total += v
        elif NORM == 1:
            total += v * v
        else:
            total = tl.where((total > v) | (total != total), total, v)
    if NORM == 2:
        # max() may drop a NaN: it is counted apart
        result = tl.max(tl.where(total == total, total, 0.0), 0)
        result = tl.where(tl.sum((total != total).to(tl.int32), 0) > 0, float("nan"), result)
    else:
        result = tl.sum(total, 0)
    tl.store(parts + tl.program_id(0), result.to(tl.float64))


@triton.jit
def optim_change_kernel(
    like, other_like, table, chunks, number, KIND: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr
):
    """x <- f(x, y, number [1] fp64) for one chunk."""
    T: tl.constexpr = like.dtype.element_ty
    U: tl.constexpr = other_like.dtype.element_ty
    acc_t: tl.constexpr = tl.float64 if tl.float64 == T else tl.float32
    c = tl.load(number).to(acc_t)
    chunk = tl.program_id(0).to(tl.int64) * 3
    tensor, begin, size = tl.load(chunks + chunk), tl.load(chunks + chunk + 1), tl.load(chunks + chunk + 2)
    x = address(table, tensor, 0, 2, T) + begin
    for k in range(GROUP):
        i = k * BLOCK + tl.arange(0, BLOCK)
        valid = i < size
        v = tl.load(x + i, mask=valid, other=0.0).to(acc_t)
        if KIND == 0:
            v *= c
        elif KIND == 1:
            v = tl.where(v < -c, -c, tl.where(v > c, c, v))
        else:
            y = address(table, tensor, 1, 2, U) + begin
            v += (tl.load(y + i, mask=valid, other=0.0).to(acc_t) - v) * c
        tl.store(x + i, v.to(T), mask=valid)


def tables(columns: list[list[torch.Tensor]], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Addresses [T, width] and chunks [C, 3] on the device; one copy, and no wait for it."""
    first = columns[0]
    addresses = [[c[t].data_ptr() if c else 0 for c in columns] for t in range(len(first))]
    step = BLOCK * GROUP
    chunks = [
        (t, begin, min(step, p.numel() - begin)) for t, p in enumerate(first) for begin in range(0, p.numel(), step)
    ]
    flat = [a for row in addresses for a in (*row, *(0,) * (width - len(row)))] + [c for row in chunks for c in row]
    packed = torch.tensor(flat, dtype=torch.int64)
    if first[0].is_cuda:
        packed = packed.pin_memory().to(first[0].device, non_blocking=True)
    cut = len(first) * width
    return packed[:cut], packed[cut:].view(-1, 3)


def scaling_numbers(like, grad_scale, found_inf, total_norm, max_norm, maximize) -> torch.Tensor:
    """[1 / grad_scale, signed clipping factor, found_inf], float64 on the device."""
    one = torch.ones((), dtype=torch.float64, device=like.device)
    unscale = one if grad_scale is None else one / grad_scale
    factor = one if total_norm is None else (max_norm / (total_norm * unscale + 1e-6)).clamp(max=1.0)
    found = one * 0 if found_inf is None else found_inf.double()
    return torch.stack([unscale, -factor if maximize else factor, found])


def count(steps: list[torch.Tensor], on_device: bool, found_inf: torch.Tensor | None, like) -> torch.Tensor:
    """Counts the steps and returns their numbers, float64 on the device of the parameters."""
    for step in steps:
        step += 1 if found_inf is None else (found_inf == 0).to(step.device, step.dtype)
    if on_device:
        return torch.stack(steps).double()
    return torch.tensor([float(s) for s in steps], dtype=torch.float64).to(like.device)


def run_step(rule, params, grads, states, masters, paces, numbers, scaling, unscales, weight_decay, flag) -> None:
    like = params[0]
    table, chunks = tables([params, grads, *states, *[[]] * (3 - len(states)), masters], 6)
    if not len(chunks):
        return
    uses = [bool(s) for s in states] + [False] * (3 - len(states))
    full = torch.tensor([*numbers, *[0.0] * (4 - len(numbers)), weight_decay], dtype=torch.float64).to(like.device)
    state_like = masters[0] if masters else like
    optim_step_kernel[(len(chunks),)](
        like, state_like, table, chunks, paces, full, scaling,
        RULE=rule, MASTER=bool(masters), UNSCALES=unscales, WEIGHT_DECAY=weight_decay != 0,
        USES0=uses[0], USES1=uses[1], USES2=uses[2], FLAG=flag, BLOCK=BLOCK, GROUP=GROUP, num_warps=4,
    )  # fmt: skip


def learning_rate(lr: float, device_lr: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    if device_lr is not None:
        return device_lr.double()
    return torch.full((), lr, dtype=torch.float64, device=like.device)


def paces_of(size: torch.Tensor, root, decay, tensors: int) -> torch.Tensor:
    """[T, 3] of what is one number, or one for each tensor."""
    one = torch.ones(tensors, dtype=torch.float64, device=size.device)
    return torch.stack([one * size, one * root, one * decay], 1).contiguous()


def sgd_step(
    params, grads, momentum_buffers, masters, lr, device_lr, grad_scale, found_inf, total_norm, max_norm, maximize,
    momentum, dampening, weight_decay, nesterov, first,
) -> None:  # fmt: skip
    if not params:
        return
    scaling = scaling_numbers(params[0], grad_scale, found_inf, total_norm, max_norm, maximize)
    paces = paces_of(learning_rate(lr, device_lr, params[0]), 1.0, 1.0, len(params))
    # A first momentum buffer holds zeros: with the whole gradient as its share it becomes the gradient.
    share = 1.0 if first else 1.0 - dampening
    run_step(
        SGD, params, grads, [momentum_buffers], masters, paces, [momentum, share], scaling,
        grad_scale is not None, weight_decay, nesterov,
    )  # fmt: skip


def adagrad_step(
    params, grads, sums, masters, steps, steps_on_device, lr, device_lr, grad_scale, found_inf, total_norm, max_norm,
    maximize, lr_decay, weight_decay, eps,
) -> None:  # fmt: skip
    if not params:
        return
    scaling = scaling_numbers(params[0], grad_scale, found_inf, total_norm, max_norm, maximize)
    number = count(steps, steps_on_device, found_inf, params[0])
    size = learning_rate(lr, device_lr, params[0]) / (1 + (number - 1) * lr_decay)
    run_step(
        ADAGRAD, params, grads, [sums], masters, paces_of(size, 1.0, 1.0, len(params)), [eps], scaling,
        grad_scale is not None, weight_decay, False,
    )  # fmt: skip


def rmsprop_step(
    params, grads, square_avgs, momentum_buffers, grad_avgs, masters, steps, steps_on_device, lr, device_lr, grad_scale,
    found_inf, total_norm, max_norm, maximize, alpha, eps, weight_decay, momentum, centered,
) -> None:  # fmt: skip
    if not params:
        return
    scaling = scaling_numbers(params[0], grad_scale, found_inf, total_norm, max_norm, maximize)
    count(steps, steps_on_device, found_inf, params[0])
    paces = paces_of(learning_rate(lr, device_lr, params[0]), 1.0, 1.0, len(params))
    run_step(
        RMSPROP, params, grads, [square_avgs, momentum_buffers, grad_avgs], masters, paces,
        [alpha, 1.0 - alpha, eps, momentum], scaling, grad_scale is not None, weight_decay, centered,
    )  # fmt: skip


def adam_step(
    params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, masters, steps, steps_on_device, lr, device_lr, grad_scale,
    found_inf, total_norm, max_norm, maximize, beta1, beta2, eps, weight_decay, amsgrad, decoupled,
) -> None:  # fmt: skip
    if not params:
        return
    scaling = scaling_numbers(params[0], grad_scale, found_inf, total_norm, max_norm, maximize)
    number = count(steps, steps_on_device, found_inf, params[0])
    rate = learning_rate(lr, device_lr, params[0])
    root = (1 - beta2**number).rsqrt()
    paces = paces_of(rate / (1 - beta1**number), root, 1 - rate * (weight_decay if decoupled else 0.0), len(params))
    run_step(
        ADAM, params, grads, [exp_avgs, exp_avg_sqs, max_exp_avg_sqs], masters, paces,
        [1.0 - beta1, beta2, 1.0 - beta2, eps], scaling, grad_scale is not None,
        0.0 if decoupled else weight_decay, decoupled,
    )  # fmt: skip


def multi_norm(tensors: list[torch.Tensor], order: float) -> torch.Tensor:
    table, chunks = tables([tensors], 2)
    parts = torch.zeros(len(chunks), dtype=torch.float64, device=tensors[0].device)
    kind = {1.0: ONE, 2.0: TWO, math.inf: INFINITY}[order]
    if len(chunks):
        optim_norm_kernel[(len(chunks),)](
            tensors[0], table, chunks, parts, NORM=kind, BLOCK=BLOCK, GROUP=GROUP, num_warps=4
        )
    if kind == INFINITY:
        return parts.amax() if len(chunks) else parts.sum()
    return parts.sum().sqrt() if kind == TWO else parts.sum()


def run_change(kind: int, tensors: list[torch.Tensor], others: list[torch.Tensor], number: torch.Tensor) -> None:
    table, chunks = tables([tensors, others], 2)
    if len(chunks):
        optim_change_kernel[(len(chunks),)](
            tensors[0], (others or tensors)[0], table, chunks, number,
            KIND=kind, BLOCK=BLOCK, GROUP=GROUP, num_warps=4,
        )  # fmt: skip


def multi_scale(tensors: list[torch.Tensor], total_norm: torch.Tensor, max_norm: float) -> None:
    if tensors:
        run_change(SCALE, tensors, [], (max_norm / (total_norm + 1e-6)).clamp(max=1.0))


def multi_clamp(tensors: list[torch.Tensor], bound: float) -> None:
    if tensors:
        run_change(CLAMP, tensors, [], torch.full((), bound, dtype=torch.float64, device=tensors[0].device))


def multi_lerp(averages: list[torch.Tensor], values: list[torch.Tensor], weight: float) -> None:
    if averages:
        number = torch.full((), weight, dtype=torch.float64, device=averages[0].device)
        run_change(LERP, averages, values, number)


def specimens() -> list[Specimen]:
    """What tests/triton_compile.py compiles: Adam with everything, the norm, the average, by type."""
    found = []
    size = {"BLOCK": BLOCK, "GROUP": GROUP}
    tables_ = {"table": "*i64", "chunks": "*i64"}
    for t, a in SPECIMEN_TYPES:
        for state in {t, a}:
            types = {"like": f"*{t}", "state_like": f"*{state}", **tables_}
            types |= {"paces": "*fp64", "numbers": "*fp64", "scaling": "*fp64"}
            uses = {"USES0": True, "USES1": True, "USES2": True, "FLAG": True}
            flags = {"MASTER": state != t, "UNSCALES": True, "WEIGHT_DECAY": True, **uses}
            found += [Specimen(optim_step_kernel, types, {"RULE": r, **flags, **size}, 4) for r in (RMSPROP, ADAM)]
        found.append(
            Specimen(optim_norm_kernel, {"like": f"*{t}", **tables_, "parts": "*fp64"}, {"NORM": TWO, **size}, 4)
        )
        types = {"like": f"*{a}", "other_like": f"*{t}", **tables_, "number": "*fp64"}
        found.append(Specimen(optim_change_kernel, types, {"KIND": LERP, **size}, 4))
    return found
