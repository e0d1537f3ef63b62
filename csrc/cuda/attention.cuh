// attention: what the kernels of attention.cu share. Forward and backward see the same picture: a block owns rows of
// one side (queries or keys) and walks over tiles of rows of the other side.
#pragma once

#include "common/attention.h"
#include "common/attention_choice.h"
#include "cuda/device.cuh"

namespace pyops::attention {

inline constexpr float log2_e = 1.4426950408889634f, ln_2 = 0.6931471805599453f;

// Pointers of a call; the backward members are null in a forward pass.
template <class T>
struct Tensors {
  using A = accumulate_t<T>;
  const T *q, *k, *v, *dy;
  const T* o_in;
  T* o;
  A* lse;
  const A *lse_in, *dlse;
  A* delta;
  T *dq, *dk, *dv;
};

// What one block works on.
struct Place {
  int64_t b, h, block;
};
PYOPS_DEVICE Place place_of(int64_t index, int64_t heads, int64_t blocks) {
  return {index / (heads * blocks), index / blocks % heads, index % blocks};
}

// Of an owned row: which rows of the other side it works with, [low, high).
struct Range {
  int low, high;
};
template <bool by_query>
PYOPS_DEVICE Range range_of(const Example& e, int64_t row) {
  if constexpr (by_query) {
    if (row >= e.L) return {0, 0};
    return {static_cast<int>(e.first_key(row)), static_cast<int>(e.last_key(row))};
  } else {
    if (row >= e.S) return {0, 0};
    return {static_cast<int>(e.first_query_of(row, row + 1)), static_cast<int>(e.last_query_of(row, row + 1))};
  }
}
// Of a block of owned rows [r0, r1).
template <bool by_query>
PYOPS_DEVICE Range range_of(const Example& e, int64_t r0, int64_t r1) {
  if (r0 >= r1) return {0, 0};
  if constexpr (by_query)
    return {static_cast<int>(e.first_key_of(r0, r1)), static_cast<int>(e.last_key_of(r0, r1))};
  else
    return {static_cast<int>(e.first_query_of(r0, r1)), static_cast<int>(e.last_query_of(r0, r1))};
}

// Which query of which head row r of a block of queries is. When decoding, the few queries of all heads that share a
// key head lie one head after the other; rows past the last have query L.
template <bool decode>
struct QueryRows {
  int64_t head0, row0, L, G;
  PYOPS_DEVICE bool beyond(int64_t r) const { return decode && row0 + r >= G * L; }
  PYOPS_DEVICE int64_t head(int64_t r) const {
    return decode && !beyond(r) ? head0 + static_cast<int>(row0 + r) / static_cast<int>(L) : head0;
  }
  PYOPS_DEVICE int64_t query(int64_t r) const {
    if constexpr (!decode) return row0 + r;
    return beyond(r) ? L : static_cast<int>(row0 + r) % static_cast<int>(L);
  }
};

// Decoding: what each of `count` parts of the keys gives: sums over values [count, B, H, L, E], and of each row the
// largest score and the sum of exp(score - largest) [count, B, H, L]. Not a log-sum-exp: beside a mask of 1e38 the
// logarithm would be lost, and with it how many keys a part has.
struct Parts {
  int64_t count;
  float *o, *most, *total;
  // decode_parts makes no parts where elements of `o` are more than an int counts: a 64-bit index would cost registers.
  PYOPS_DEVICE int row(const Problem<float>& p, int64_t part, int64_t b, int64_t h, int64_t i) const {
    return static_cast<int>(((part * p.B + b) * p.H + h) * p.L + i);
  }
};

// The keys of one part: whole tiles of `tile` keys but for the last, of those that some query sees.
PYOPS_DEVICE Range part_of_keys(const Example& e, int tile, int64_t part, int64_t count) {
  const Range all = range_of<true>(e, 0, e.L);
  const int first = all.low / tile * tile;
  const int64_t tiles = all.high > first ? ceil_div(all.high - first, tile) : 0;
  const int each = static_cast<int>(ceil_div(tiles, count)) * tile, low = first + static_cast<int>(part) * each;
  return {low, low + each < all.high ? low + each : all.high};
}

// A score from the product q.k with everything but the visible range; `slope` is its derivative by scale * q.k.
// T: the type of q.
template <class T, class A>
PYOPS_DEVICE A extra_score(const Problem<A>& p, const Example& e, int64_t b, int64_t h, int64_t i, int64_t j, A product,
                           A& slope) {
  A s = product * p.scale;
  slope = A(1);
  if (p.softcap != A(0)) {
    const A t = tanh(s / p.softcap);
    slope = A(1) - t * t;
    s = t * p.softcap;
  }
  if (p.slopes != nullptr) {
    const int64_t distance = i + e.shift - j;
    s -= p.slopes[b * p.slopes_batch + h] * static_cast<A>(distance < 0 ? -distance : distance);
  }
  if (p.allowed != nullptr) {
    if (!p.allowed[mask_at(p, b, h, i, j)]) s = -A(INFINITY);
  } else if (p.has_mask()) {
    s += bias_at<T>(p, mask_at(p, b, h, i, j));
  }
  return s;
}

// Whether some of the first `count` rows may see some key of [j0, j1) by the mask alone. All threads of a block ask
// together; most masks show something to the first that looks.
template <class T, class A, bool decode>
PYOPS_DEVICE bool mask_shows(const Problem<A>& p, int64_t b, const QueryRows<decode>& rows, int count, int j0, int j1) {
  if (p.mask_row == 0 && (!decode || p.mask_head == 0)) count = 1;
  const int columns = p.mask_column == 0 ? 1 : j1 - j0;
  bool shown = false;
  for (int n = threadIdx.x; n < count * columns && !shown; n += blockDim.x) {
    const int64_t r = n / columns, i = rows.query(r);
    const int64_t at = mask_at(p, b, rows.head(r), i, j0 + n % columns);
    shown = p.allowed != nullptr ? p.allowed[at] : !(bias_at<T>(p, at) == -A(INFINITY));
  }
  return __syncthreads_or(shown) != 0;
}

// The first tile of `size` keys from `tile0` on that the mask shows to the first `count` rows: what it hides is neither
// loaded nor multiplied.
template <class T, class A, bool decode>
PYOPS_DEVICE int shown_keys(const Problem<A>& p, int64_t b, const QueryRows<decode>& rows, int count, int tile0,
                            int high, int size) {
  if (!p.has_mask()) return tile0;
  for (; tile0 < high; tile0 += size)
    if (mask_shows<T>(p, b, rows, count, tile0, tile0 + size < high ? tile0 + size : high)) break;
  return tile0;
}
// The same from either side, of one tile of rows of the other side and the owned rows [r0, r1) of head h.
template <class T, bool by_query, class A>
PYOPS_DEVICE bool tile_shows(const Problem<A>& p, int64_t b, int64_t h, int64_t r0, int64_t r1, int tile0, int high,
                             int size) {
  if (!p.has_mask()) return true;
  const int end = tile0 + size < high ? tile0 + size : high;
  if (by_query) return mask_shows<T>(p, b, QueryRows<false>{h, r0, p.L, p.G}, static_cast<int>(r1 - r0), tile0, end);
  return mask_shows<T>(p, b, QueryRows<false>{h, tile0, p.L, p.G}, end - tile0, static_cast<int>(r0),
                       static_cast<int>(r1));
}

// The first such tile from `tile0` on, where it is looked for before it is needed.
template <class T, bool by_query, class A>
PYOPS_DEVICE int shown_tile(const Problem<A>& p, int64_t b, int64_t h, int64_t r0, int64_t r1, int tile0, int high,
                            int size) {
  if (!p.has_mask() || by_query)
    return shown_keys<T>(p, b, QueryRows<false>{h, r0, p.L, p.G}, static_cast<int>(r1 - r0), tile0, high, size);
  for (; tile0 < high; tile0 += size) {
    const int count = tile0 + size < high ? size : high - tile0;
    if (mask_shows<T>(p, b, QueryRows<false>{h, tile0, p.L, p.G}, count, static_cast<int>(r0), static_cast<int>(r1)))
      break;
  }
  return tile0;
}

// Factor of a weight under dropout.
template <class A>
PYOPS_DEVICE A kept(const Problem<A>& p, int64_t b, int64_t h, int64_t i, int64_t j) {
  return dropped(p, b, h, i, j) ? A(0) : p.keep_scale;
}

// What the kernels of attention_hopper.cu and attention_backward_hopper.cu can do; attention_mma.cuh does the rest of bf16
// and fp16. They read vectors of 8 and lines of 64 columns.
template <class T>
bool suits_hopper(const Problem<float>& p, const Tensors<T>& t) {
  return hopper_built && compute_capability() == 90 && p.B * p.H > 0 && p.L > 0 && p.S > 0 && p.rows_q > 0 &&
         p.rows_k > 0 && suits_hopper_heads(p.D, p.E) && is_aligned(t.q, t.k, t.v, t.dy);
}
// Those without extras multiply a largest product by the scale, which must be a largest score.
inline bool needs_extras(const Problem<float>& p) { return p.has_extras() || !(p.scale > 0.0f); }
// Bytes of what these kernels find out about the tiles of a mask before they begin, `state`: none have less than 32 rows.
inline int64_t state_bytes(const Problem<float>& p) {
  if (!p.has_mask()) return 0;
  return (p.mask_batch != 0 ? p.B : 1) * (p.mask_head != 0 ? p.H : 1) * ceil_div(p.L, 32) * ceil_div(p.S, 32);
}
template <class T>
void forward_hopper(const Problem<float>& p, const Tensors<T>& t, uint8_t* state, cudaStream_t stream);
template <class T>
void backward_hopper(const Problem<float>& p, const Tensors<T>& t, uint8_t* state, cudaStream_t stream);

// delta[i] = do[i].o[i] - dlse[i]: one warp per row.
template <class T>
__global__ void __launch_bounds__(128) attention_delta_kernel(Problem<accumulate_t<T>> p, Tensors<T> t) {
  using A = accumulate_t<T>;
  const int lane = threadIdx.x % 32;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * 4 + threadIdx.x / 32;
  const Place at = place_of(index, p.H, p.L);
  if (at.b >= p.B) return;
  const Example e = example(p, at.b);
  if (at.block >= e.L) return;
  const int64_t row = at.b * p.o.batch + at.h * p.o.head + (e.q0 + at.block) * p.o.row;
  A sum = 0;
  for (int64_t c = lane; c < p.E; c += 32) sum += to_acc(t.dy[row + c]) * to_acc(t.o_in[row + c]);
  sum = warp_sum(sum);
  const int64_t statistic = at.b * p.lse_batch + at.h * p.lse_head + e.q0 + at.block;
  if (lane == 0) t.delta[statistic] = sum - (t.dlse != nullptr ? t.dlse[statistic] : A(0));
}

}  // namespace pyops::attention
