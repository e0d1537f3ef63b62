"""layer_norm_lstm · Triton
  a = n(x) * gain_x + n(y) * gain_y + bias;  c' = f c + i g,  h' = o tanh(n(c') * gain_c + bias_c);  n: a row with
  mean 0 and variance 1
layout   head of csrc/common/layer_norm_lstm.h
mapping  a program takes a row, whole in registers: tiles of BLOCK >= H units, one for each gate; a layer is a product
         and a kernel for each step
memory   every input read once (backward: dx, dy, da written once), every output written once
numerics two-pass variance, all in fp32 (fp64 for fp64)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._math import sigmoid, tanh
from ._recurrent import Steps, lstm_forward, product, product_specimens
from ._toolbox import SPECIMEN_TYPES, Specimen, accumulate_dtype, power_of_two, rsqrt, warps


@triton.jit
def load_row(p, i, valid, H, acc_t: tl.constexpr):
    """The four gates' tiles of one row."""
    a = tl.load(p + i, mask=valid, other=0.0).to(acc_t)
    b = tl.load(p + H + i, mask=valid, other=0.0).to(acc_t)
    c = tl.load(p + 2 * H + i, mask=valid, other=0.0).to(acc_t)
    d = tl.load(p + 3 * H + i, mask=valid, other=0.0).to(acc_t)
    return a, b, c, d


@triton.jit
def load_optional(p, i, valid, acc_t: tl.constexpr):
    if p is None:
        v = tl.zeros(i.shape, acc_t)
    else:
        v = tl.load(p + i, mask=valid, other=0.0).to(acc_t)
    return v


@triton.jit
def load_optional_row(p, i, valid, H, acc_t: tl.constexpr):
    if p is None:
        zero = tl.zeros(i.shape, acc_t)
        a, b, c, d = zero, zero, zero, zero
    else:
        a, b, c, d = load_row(p, i, valid, H, acc_t)
    return a, b, c, d


@triton.jit
def moments_of_row(a, b, c, d, valid, H, eps):
    mean = (tl.sum(a, 0) + tl.sum(b, 0) + tl.sum(c, 0) + tl.sum(d, 0)) / (4 * H)
    a, b, c, d = a - mean, b - mean, c - mean, d - mean
    squares = tl.where(valid, a * a + b * b + c * c + d * d, 0.0)
    return mean, rsqrt(tl.sum(squares, 0) / (4 * H) + eps)


@triton.jit
def layer_norm_lstm_fwd_kernel(
    x, y, c, gain_x, gain_y, bias, gain_c, bias_c, next_h, next_c, statistics, H, EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    acc_t: tl.constexpr = statistics.dtype.element_ty
    out_t: tl.constexpr = next_c.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    valid = i < H
    x0, x1, x2, x3 = load_row(x + row * 4 * H, i, valid, H, acc_t)
    y0, y1, y2, y3 = load_row(y + row * 4 * H, i, valid, H, acc_t)
    gx0, gx1, gx2, gx3 = load_row(gain_x, i, valid, H, acc_t)
    gy0, gy1, gy2, gy3 = load_row(gain_y, i, valid, H, acc_t)
    b0, b1, b2, b3 = load_optional_row(bias, i, valid, H, acc_t)
    mx, rx = moments_of_row(x0, x1, x2, x3, valid, H, EPS)
    my, ry = moments_of_row(y0, y1, y2, y3, valid, H, EPS)
    before = tl.load(c + row * H + i, mask=valid, other=0.0).to(acc_t)
    _, now, _, _, _, o = lstm_forward(
        (x0 - mx) * rx * gx0 + (y0 - my) * ry * gy0 + b0,
        (x1 - mx) * rx * gx1 + (y1 - my) * ry * gy1 + b1,
        (x2 - mx) * rx * gx2 + (y2 - my) * ry * gy2 + b2,
        (x3 - mx) * rx * gx3 + (y3 - my) * ry * gy3 + b3,
        before,
    )
    stored = now.to(out_t)
    now = tl.where(valid, stored.to(acc_t), 0.0)
    mc = tl.sum(now, 0) / H
    d = tl.where(valid, now - mc, 0.0)
    rc = rsqrt(tl.sum(d * d, 0) / H + EPS)
    z = d * rc * tl.load(gain_c + i, mask=valid, other=0.0).to(acc_t) + load_optional(bias_c, i, valid, acc_t)
    tl.store(next_c + row * H + i, stored, mask=valid)
    tl.store(next_h + row * H + i, (o * tanh(z)).to(out_t), mask=valid)
    tl.store(statistics + row * 6, mx)
    tl.store(statistics + row * 6 + 1, rx)
    tl.store(statistics + row * 6 + 2, my)
    tl.store(statistics + row * 6 + 3, ry)
    tl.store(statistics + row * 6 + 4, mc)
    tl.store(statistics + row * 6 + 5, rc)


@triton.jit
def store_row_gradient(p, i, valid, H, g0, g1, g2, g3, n0, n1, n2, n3, rstd):
    """rstd (g - mean(g) - n mean(g n)): the gradient of a row under normalisation."""
    g = tl.where(valid, g0 + g1 + g2 + g3, 0.0)
    gn = tl.where(valid, g0 * n0 + g1 * n1 + g2 * n2 + g3 * n3, 0.0)
    mean_g = tl.sum(g, 0) / (4 * H)
    mean_gn = tl.sum(gn, 0) / (4 * H)
    out_t: tl.constexpr = p.dtype.element_ty
    tl.store(p + i, (rstd * (g0 - mean_g - n0 * mean_gn)).to(out_t), mask=valid)
    tl.store(p + H + i, (rstd * (g1 - mean_g - n1 * mean_gn)).to(out_t), mask=valid)
    tl.store(p + 2 * H + i, (rstd * (g2 - mean_g - n2 * mean_gn)).to(out_t), mask=valid)
    tl.store(p + 3 * H + i, (rstd * (g3 - mean_g - n3 * mean_gn)).to(out_t), mask=valid)


@triton.jit
def layer_norm_lstm_bwd_kernel(
    dh, dc, x, y, c, gain_x, gain_y, bias, gain_c, bias_c, next_c, statistics, dx, dy, dstate, da, dz, H,
    BLOCK: tl.constexpr,
):  # fmt: skip
    acc_t: tl.constexpr = statistics.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    valid = i < H
    s = statistics + row * 6
    mx, rx, my, ry = tl.load(s), tl.load(s + 1), tl.load(s + 2), tl.load(s + 3)
    mc, rc = tl.load(s + 4), tl.load(s + 5)
    x0, x1, x2, x3 = load_row(x + row * 4 * H, i, valid, H, acc_t)
    y0, y1, y2, y3 = load_row(y + row * 4 * H, i, valid, H, acc_t)
    x0, x1, x2, x3 = (x0 - mx) * rx, (x1 - mx) * rx, (x2 - mx) * rx, (x3 - mx) * rx
    y0, y1, y2, y3 = (y0 - my) * ry, (y1 - my) * ry, (y2 - my) * ry, (y3 - my) * ry
    gx0, gx1, gx2, gx3 = load_row(gain_x, i, valid, H, acc_t)
    gy0, gy1, gy2, gy3 = load_row(gain_y, i, valid, H, acc_t)
    b0, b1, b2, b3 = load_optional_row(bias, i, valid, H, acc_t)
    gi, gf = sigmoid(x0 * gx0 + y0 * gy0 + b0), sigmoid(x1 * gx1 + y1 * gy1 + b1)
    gg, go = tanh(x2 * gx2 + y2 * gy2 + b2), sigmoid(x3 * gx3 + y3 * gy3 + b3)

    # From h' to z.
    before = tl.load(c + row * H + i, mask=valid, other=0.0).to(acc_t)
    n = (tl.load(next_c + row * H + i, mask=valid, other=0.0).to(acc_t) - mc) * rc
    gain = tl.load(gain_c + i, mask=valid, other=0.0).to(acc_t)
    t = tanh(n * gain + load_optional(bias_c, i, valid, acc_t))
    gh = load_optional(dh + row * H if dh is not None else dh, i, valid, acc_t)
    at_z = gh * go * (1.0 - t * t)
    g = at_z * gain

    # From c' to the gates.
    total = rc * (g - tl.sum(g, 0) / H - n * (tl.sum(g * n, 0) / H))
    total += load_optional(dc + row * H if dc is not None else dc, i, valid, acc_t)
    d0 = total * gg * gi * (1.0 - gi)
    d1 = total * before * gf * (1.0 - gf)
    d2 = total * gi * (1.0 - gg * gg)
    d3 = gh * t * go * (1.0 - go)
    tl.store(dz + row * H + i, at_z, mask=valid)
    tl.store(dstate + row * H + i, (total * gf).to(dstate.dtype.element_ty), mask=valid)
    to = da + row * 4 * H + i
    tl.store(to, d0, mask=valid)
    tl.store(to + H, d1, mask=valid)
    tl.store(to + 2 * H, d2, mask=valid)
    tl.store(to + 3 * H, d3, mask=valid)
    store_row_gradient(
        dx + row * 4 * H, i, valid, H, d0 * gx0, d1 * gx1, d2 * gx2, d3 * gx3, x0, x1, x2, x3, rx
    )  # fmt: skip
    store_row_gradient(
        dy + row * 4 * H, i, valid, H, d0 * gy0, d1 * gy1, d2 * gy2, d3 * gy3, y0, y1, y2, y3, ry
    )  # fmt: skip


def _launch(H: int) -> dict[str, int]:
    block = max(power_of_two(H), 16)
    return {"BLOCK": block, "num_warps": warps(block, 4)}


def layer_norm_lstm_gates_fwd(
    x: torch.Tensor,
    y: torch.Tensor,
    c: torch.Tensor,
    gain_x: torch.Tensor,
    gain_y: torch.Tensor,
    bias: torch.Tensor | None,
    gain_c: torch.Tensor,
    bias_c: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    (rows, hidden), next_h, next_c = c.shape, torch.empty_like(c), torch.empty_like(c)
    statistics = c.new_empty(rows, 6, dtype=accumulate_dtype(c.dtype))
    if c.numel():
        layer_norm_lstm_fwd_kernel[(rows,)](
            x, y, c, gain_x, gain_y, bias, gain_c, bias_c, next_h, next_c, statistics, hidden, eps, **_launch(hidden)
        )
    return next_h, next_c, statistics


def layer_norm_lstm_gates_bwd(
    dh: torch.Tensor | None,
    dc: torch.Tensor | None,
    x: torch.Tensor,
    y: torch.Tensor,
    c: torch.Tensor,
    gain_x: torch.Tensor,
    gain_y: torch.Tensor,
    bias: torch.Tensor | None,
    gain_c: torch.Tensor,
    bias_c: torch.Tensor | None,
    next_c: torch.Tensor,
    statistics: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    rows, hidden = c.shape
    dx, dy, dstate = torch.empty_like(x), torch.empty_like(y), torch.empty_like(c)
    da, dz = torch.empty_like(x, dtype=statistics.dtype), torch.empty_like(c, dtype=statistics.dtype)
    if c.numel():
        layer_norm_lstm_bwd_kernel[(rows,)](
            dh, dc, x, y, c, gain_x, gain_y, bias, gain_c, bias_c, next_c, statistics, dx, dy, dstate, da, dz, hidden,
            **_launch(hidden),
        )  # fmt: skip
    return dx, dy, dstate, da, dz


def layer_norm_lstm_layer_fwd(
    x: torch.Tensor,
    h0: torch.Tensor,
    c0: torch.Tensor,
    w_hh: torch.Tensor,
    gain_x: torch.Tensor,
    gain_y: torch.Tensor,
    bias: torch.Tensor | None,
    gain_c: torch.Tensor,
    bias_c: torch.Tensor | None,
    starts: torch.Tensor | None,
    eps: float,
    keep: bool,
) -> tuple[torch.Tensor, ...]:
    """Step by step: the recurrent product, then one kernel for all else."""
    (n, directions, _), (_, batch, hidden) = x.shape, h0.shape
    wide = accumulate_dtype(x.dtype)
    y, h_n, c = x.new_empty(n, directions, hidden), h0.clone(), c0.to(wide, copy=True)
    products = x.new_empty(x.shape if keep else 0)
    cells = x.new_empty((n, directions, hidden) if keep else 0)
    statistics = x.new_empty((n, directions, 6) if keep else 0, dtype=wide)
    steps = Steps(n, batch, starts)
    for d in range(directions):
        parameters = _of_direction(d, gain_x, gain_y, bias, gain_c, bias_c)
        for t in steps.in_order(d):
            rows = steps.rows(t)
            count = rows.stop - rows.start
            h, now = h_n[d, :count], c[d, :count]
            sums = product(h, w_hh[d])
            of_rows = statistics.new_empty(count, 6)
            layer_norm_lstm_fwd_kernel[(count,)](
                x[rows, d].contiguous(), sums, now, *parameters, h, now, of_rows, hidden, eps, **_launch(hidden)
            )
            y[rows, d] = h
            if keep:
                products[rows, d], cells[rows, d], statistics[rows, d] = sums.to(x.dtype), now.to(x.dtype), of_rows
    return y, h_n, c.to(c0.dtype, copy=True), products, cells, statistics


def layer_norm_lstm_layer_bwd(
    dy: torch.Tensor | None,
    dh_n: torch.Tensor | None,
    dc_n: torch.Tensor | None,
    x: torch.Tensor,
    h0: torch.Tensor,
    c0: torch.Tensor,
    w_hh: torch.Tensor,
    gain_x: torch.Tensor,
    gain_y: torch.Tensor,
    bias: torch.Tensor | None,
    gain_c: torch.Tensor,
    bias_c: torch.Tensor | None,
    starts: torch.Tensor | None,
    products: torch.Tensor,
    cells: torch.Tensor,
    statistics: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    (n, directions, _), (_, batch, hidden) = x.shape, h0.shape
    wide = statistics.dtype
    dx, dproducts = torch.empty_like(x), torch.empty_like(x)
    da, dz = torch.empty_like(x, dtype=wide), torch.empty_like(cells, dtype=wide)
    dh = torch.zeros_like(h0, dtype=wide) if dh_n is None else dh_n.to(wide, copy=True)
    dc = torch.zeros_like(c0, dtype=wide) if dc_n is None else dc_n.to(wide, copy=True)
    steps = Steps(n, batch, starts)
    for d in range(directions):
        parameters = _of_direction(d, gain_x, gain_y, bias, gain_c, bias_c)
        for t in steps.in_order(1 - d):
            rows = steps.rows(t)
            count = rows.stop - rows.start
            g, now = dh[d, :count], dc[d, :count]
            if dy is not None:
                g += dy[rows, d]
            kept = (v[rows, d].contiguous() for v in (x, products))
            results = x.new_empty(count, 4 * hidden), x.new_empty(count, 4 * hidden), now
            wider = g.new_empty(count, 4 * hidden), g.new_empty(count, hidden)
            layer_norm_lstm_bwd_kernel[(count,)](
                g, now, *kept, steps.before(cells, c0, d, t), *parameters, cells[rows, d].contiguous(),
                statistics[rows, d].contiguous(), *results, *wider, hidden, **_launch(hidden),
            )  # fmt: skip
            dx[rows, d], dproducts[rows, d] = results[:2]
            da[rows, d], dz[rows, d] = wider
            g.copy_(product(results[1], w_hh[d].mT))

    def of_gain(g: torch.Tensor, v: torch.Tensor, k: int) -> torch.Tensor:
        mean, rstd = statistics[..., k : k + 1], statistics[..., k + 1 : k + 2]
        return (g * (v.to(wide) - mean) * rstd).sum(0).to(x.dtype)

    of_bias, of_bias_c = (x.new_empty(0) if b is None else g.sum(0).to(x.dtype) for b, g in ((bias, da), (bias_c, dz)))
    gains = of_gain(da, x, 0), of_gain(da, products, 2), of_gain(dz, cells, 4)
    states = dh.to(h0.dtype, copy=True), dc.to(c0.dtype, copy=True)
    return dx, dproducts, *states, gains[0], gains[1], of_bias, gains[2], of_bias_c


def _of_direction(d: int, *parameters: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if p is None else p[d] for p in parameters]


def specimens() -> list[Specimen]:
    """What tests/triton_compile.py compiles: all kernels in every type, on a row of 512 units.

    In a layer y, c and their gradients have the type of sums.
    """
    found = product_specimens()
    for t, a in SPECIMEN_TYPES:
        inputs = dict.fromkeys(("x", "y", "c", "gain_x", "gain_y", "bias", "gain_c", "bias_c", "next_c"), f"*{t}")
        inputs |= {"statistics": f"*{a}", "H": "i32"}
        launch = _launch(512)
        num_warps = launch.pop("num_warps")
        forward = inputs | {"next_h": f"*{t}"}
        backward = inputs | dict.fromkeys(("dh", "dc", "dx", "dy", "dstate"), f"*{t}")
        backward |= dict.fromkeys(("da", "dz"), f"*{a}")
        for in_a_layer in (False, True):
            if in_a_layer:
                forward |= dict.fromkeys(("y", "c", "next_c"), f"*{a}")
                backward |= dict.fromkeys(("dh", "dc", "dstate"), f"*{a}")
            constants = launch | {"EPS": 1e-5}
            found.append(Specimen(layer_norm_lstm_fwd_kernel, dict(forward), constants, num_warps, t != "fp64"))
            found.append(Specimen(layer_norm_lstm_bwd_kernel, dict(backward), launch, num_warps, t != "fp64"))
    return found
