"""What the recurrent rooms share: the cells and their gradients; formulas of csrc/common/recurrent.h."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ._math import sigmoid, tanh
from ._toolbox import SPECIMEN_TYPES, Specimen, accumulate_dtype, cdiv

BLOCK = 256


@triton.jit
def lstm_forward(i, f, g, o, c):
    """(h', c') and the activated gates."""
    i, f, g, o = sigmoid(i), sigmoid(f), tanh(g), sigmoid(o)
    c = f * c + i * g
    return o * tanh(c), c, i, f, g, o


@triton.jit
def lstm_backward(dh, dc, i, f, g, o, c_before):
    """Gradients of the four pre-activations and of the former c, from the activated gates."""
    t = tanh(f * c_before + i * g)
    total = dc + dh * o * (1.0 - t * t)
    di = total * g * i * (1.0 - i)
    df = total * c_before * f * (1.0 - f)
    dg = total * i * (1.0 - g * g)
    do = dh * t * o * (1.0 - o)
    return di, df, dg, do, total * f


@triton.jit
def gru_forward(xr, xz, xn, hr, hz, hn, h):
    """h' and the activated gates."""
    r, z = sigmoid(xr + hr), sigmoid(xz + hz)
    n = tanh(xn + r * hn)
    return n + z * (h - n), r, z, n


@triton.jit
def gru_backward(dy, r, z, n, hn, h):
    """Gradients of the pre-activations r, z, n from the input, of n from the hidden state, and of h directly."""
    dn = dy * (1.0 - z) * (1.0 - n * n)
    dr = dn * hn * r * (1.0 - r)
    dz = dy * (h - n) * z * (1.0 - z)
    return dr, dz, dn, dn * r, dy * z


@triton.jit
def rnn_forward(x, RELU: tl.constexpr):
    if RELU:
        h = tl.where(x <= 0.0, 0.0, x)
    else:
        h = tanh(x)
    return h


@triton.jit
def rnn_backward(dy, h, RELU: tl.constexpr):
    if RELU:
        dx = tl.where(h <= 0.0, 0.0, dy)
    else:
        dx = dy * (1.0 - h * h)
    return dx


@triton.jit
def product_kernel(
    a, w, out, M, N, K, a_row, w_n, w_k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """out[m, n] = sum_k a[m, k] w[n, k]: the recurrent product of one step, in the type of sums."""
    acc_t: tl.constexpr = out.dtype.element_ty
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), acc_t)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        left = tl.load(a + m[:, None] * a_row + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        at = w + n[None, :] * w_n + k[:, None] * w_k
        right = tl.load(at, mask=(k < K)[:, None] & (n < N)[None, :], other=0.0)
        acc += tl.dot(left, right, input_precision="ieee", out_dtype=acc_t)
    tl.store(out + m[:, None] * N + n[None, :], acc, mask=(m < M)[:, None] & (n < N)[None, :])


TILE = {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64}
TILE_FP64 = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16}


def product(a: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """``a @ w.T`` of a [M, K], rows contiguous, and w [N, K], any strides; not rounded to their type."""
    (m, k), n = a.shape, w.shape[0]
    out = torch.empty(m, n, dtype=accumulate_dtype(a.dtype), device=a.device)
    tile = TILE_FP64 if a.dtype == torch.float64 else TILE
    grid = cdiv(m, tile["BLOCK_M"]), cdiv(n, tile["BLOCK_N"])
    product_kernel[grid](a, w, out, m, n, k, a.stride(0), w.stride(0), w.stride(1), **tile, num_warps=4)
    return out


def product_specimens() -> list[Specimen]:
    """The product in every type."""
    sizes = dict.fromkeys(("M", "N", "K", "a_row", "w_n", "w_k"), "i32")
    found = []
    for t, a in SPECIMEN_TYPES:
        types = {"a": f"*{t}", "w": f"*{t}", "out": f"*{a}"} | sizes
        found.append(Specimen(product_kernel, types, TILE_FP64 if t == "fp64" else TILE, 4, t != "fp64"))
    return found


class Steps:
    """The steps of a batch of sequences as rows of [N, ...]; csrc/common/recurrent.h."""

    def __init__(self, rows: int, batch: int, starts: torch.Tensor | None) -> None:
        if starts is None:
            self.firsts = list(range(0, rows + 1, batch)) if batch else [0]
        else:
            self.firsts = starts.tolist()
        self.count = len(self.firsts) - 1

    def rows(self, t: int) -> slice:
        return slice(self.firsts[t], self.firsts[t + 1]) if 0 <= t < self.count else slice(0, 0)

    def in_order(self, direction: int) -> Iterator[int]:
        """The steps as a direction takes them."""
        return iter(range(self.count)) if direction == 0 else iter(reversed(range(self.count)))

    def before(self, states: torch.Tensor, initial: torch.Tensor, direction: int, t: int) -> torch.Tensor:
        """The states [N, D, H] before step t: those of the step before, initial ones [D, B, H] where there is none."""
        rows, size = self.rows(t - 1 if direction == 0 else t + 1), self.rows(t).stop - self.rows(t).start
        known = states[rows, direction][:size]
        return torch.cat((known, initial[direction, known.shape[0] : size]))
