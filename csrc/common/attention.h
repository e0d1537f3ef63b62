// attention: what CPU and CUDA kernels share: sizes and strides, which keys a query sees, and how a score is made.
//
//   score[i,j] = softcap * tanh(scale * q[i].k[j] / softcap) - slope * |i + shift - j| + bias[i,j]
//   key j is seen by query i  iff  i + shift - left <= j <= i + shift + right,  j < S,  and the mask allows it
//
// shift = 0 aligns the first query with the first key, shift = S - L (bottom right) the last with the last.
#pragma once

#include <cmath>

#include "common/host_device.h"
#include "common/philox.h"

namespace pyops::attention {

// In elements; the last dimension is contiguous.
struct Strides {
  int64_t batch, head, row;
};

template <class acc_t>
struct Problem {
  int64_t B, H, G;     // batch, query heads, query heads per key head
  int64_t L, S;        // queries, keys; of the longest sequence when packed
  int64_t D, E;        // head size of query and key, of value
  Strides q, k, v, o;  // batch stride 0 when packed, and where all examples share their keys or their values
  Strides dk, dv;      // of gradients, which are each example's own
  int64_t lse_batch, lse_head;
  // Mask, with the strides of its tensor, broadcast through strides of 0: allowed or not, or a number to add, which has
  // the type of the sums or that of q. At most one of the four is there.
  const bool* allowed;
  const acc_t* bias;
  const bfloat16_t* bias_bf16;
  const half_t* bias_fp16;
  int64_t mask_batch, mask_head, mask_row, mask_column;
  const int64_t* mask_examples;  // [B]: which mask of `mask_count` is an example's; null: the one of its number
  int64_t mask_count;
  const int64_t* lengths;      // [B]: keys from here on do not exist; null: all do
  const int64_t *cu_q, *cu_k;  // [B + 1]: first row of each packed sequence; null: not packed
  int64_t rows_q, rows_k;      // of the packed tensors
  const acc_t* slopes;         // [H] or [B, H]
  int64_t slopes_batch;
  const int64_t* random;  // (seed, offset) of the dropout mask; null: no dropout
  uint32_t threshold;
  acc_t keep_scale;
  acc_t scale, softcap;  // softcap 0: none
  int64_t left, right;   // negative: unbounded
  bool bottom_right;

  PYOPS_HOST_DEVICE bool has_mask() const {
    return allowed != nullptr || bias != nullptr || bias_bf16 != nullptr || bias_fp16 != nullptr;
  }
  PYOPS_HOST_DEVICE bool has_extras() const {
    return has_mask() || slopes != nullptr || softcap != acc_t(0) || random != nullptr;
  }
};

// One example of the batch: where its rows begin, how many it has, and which keys a query may see.
struct Example {
  int64_t q0, k0, L, S, shift, left, right;

  PYOPS_HOST_DEVICE int64_t first_key(int64_t i) const {
    const int64_t first = left < 0 ? 0 : i + shift - left;
    return first < 0 ? 0 : first;
  }
  // One past the last.
  PYOPS_HOST_DEVICE int64_t last_key(int64_t i) const {
    const int64_t last = right < 0 ? S : i + shift + right + 1;
    return last < S ? (last < 0 ? 0 : last) : S;
  }
  PYOPS_HOST_DEVICE bool sees(int64_t i, int64_t j) const { return j >= first_key(i) && j < last_key(i); }
  // Keys that some query of [i0, i1) may see; empty where first >= last.
  PYOPS_HOST_DEVICE int64_t first_key_of(int64_t i0, int64_t) const { return first_key(i0); }
  PYOPS_HOST_DEVICE int64_t last_key_of(int64_t, int64_t i1) const { return last_key(i1 - 1); }
  // Queries that may see some key of [j0, j1).
  PYOPS_HOST_DEVICE int64_t first_query_of(int64_t j0, int64_t) const {
    const int64_t first = right < 0 ? 0 : j0 - shift - right;
    return first < 0 ? 0 : first;
  }
  PYOPS_HOST_DEVICE int64_t last_query_of(int64_t, int64_t j1) const {
    const int64_t last = left < 0 ? L : j1 - shift + left;
    return last < L ? (last < 0 ? 0 : last) : L;
  }
};

PYOPS_HOST_DEVICE int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : (x > high ? high : x); }

template <class acc_t>
PYOPS_HOST_DEVICE Example example(const Problem<acc_t>& p, int64_t b) {
  Example e{0, 0, p.L, p.S, 0, p.left, p.right};
  if (p.cu_q != nullptr) {  // clamped: bad numbers in device memory must not become bad addresses
    e.q0 = clamp(p.cu_q[b], 0, p.rows_q);
    e.k0 = clamp(p.cu_k[b], 0, p.rows_k);
    e.L = clamp(p.cu_q[b + 1] - e.q0, 0, p.L < p.rows_q - e.q0 ? p.L : p.rows_q - e.q0);
    e.S = clamp(p.cu_k[b + 1] - e.k0, 0, p.S < p.rows_k - e.k0 ? p.S : p.rows_k - e.k0);
  }
  if (p.lengths != nullptr) e.S = clamp(p.lengths[b], 0, e.S);
  if (p.bottom_right) e.shift = e.S - e.L;
  return e;
}

// First group of random words of a query row; rows begin a new group, so that a kernel takes four keys at a time.
template <class acc_t>
PYOPS_HOST_DEVICE int64_t random_row(const Problem<acc_t>& p, int64_t b, int64_t h, int64_t i) {
  return ((b * p.H + h) * p.L + i) * ((p.S + 3) / 4);
}

template <class acc_t>
PYOPS_HOST_DEVICE bool dropped(const Problem<acc_t>& p, int64_t b, int64_t h, int64_t i, int64_t j) {
  const Words4 w = RandomStream(p.random).words(random_row(p, b, h, i) + j / 4);
  return !is_kept(w[static_cast<int>(j % 4)], p.threshold);
}

// Where the mask speaks of key j and query i of example b and head h.
template <class acc_t>
PYOPS_HOST_DEVICE int64_t mask_at(const Problem<acc_t>& p, int64_t b, int64_t h, int64_t i, int64_t j) {
  if (p.mask_examples != nullptr) b = clamp(p.mask_examples[b], 0, p.mask_count - 1);
  return b * p.mask_batch + h * p.mask_head + i * p.mask_row + j * p.mask_column;
}

// The number that a mask of numbers adds there. T: the type of q.
template <class T, class acc_t>
PYOPS_HOST_DEVICE acc_t bias_at(const Problem<acc_t>& p, int64_t at) {
  if constexpr (std::is_same_v<T, bfloat16_t>)
    if (p.bias_bf16 != nullptr) return static_cast<acc_t>(p.bias_bf16[at]);
  if constexpr (std::is_same_v<T, half_t>)
    if (p.bias_fp16 != nullptr) return static_cast<acc_t>(p.bias_fp16[at]);
  return p.bias[at];
}

}  // namespace pyops::attention
