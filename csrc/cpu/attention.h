// attention · CPU: what forward and backward share: the blocks they cut scores into, how products become scores, and the
// online softmax.
#pragma once

#include <bit>

#include "common/attention.h"
#include "cpu/math.h"
#include "cpu/product.h"

namespace pyops::PYOPS_CPU_CAPABILITY {

using attention::Example;
using attention::Problem;

inline constexpr int64_t query_block = 96;  // a multiple of product_rows
inline constexpr int64_t key_block = 64;
// Rows of the score block: room for key_block rounded up to product_rows, read as rows of the transpose.
inline constexpr int64_t score_stride = 80;

template <class acc_t>
inline constexpr acc_t infinity = std::numeric_limits<acc_t>::infinity();

// Rows that a product rounds up to may be rows of a window that ends here: they must add nothing.
template <class acc_t>
void clear_rounding(acc_t* s, int64_t rows) {
  for (int64_t r = rows; r < round_up(rows, product_rows); ++r)
    std::fill(s + r * score_stride, s + r * score_stride + key_block, acc_t(0));
}

template <int lanes, class V, size_t... i>
PYOPS_INLINE auto largest_of_lanes(const V& v, std::index_sequence<i...>) {
  const auto a = __builtin_shufflevector(v, v, int(i)...), b = __builtin_shufflevector(v, v, int(i + lanes / 2)...);
  const auto most = a > b ? a : b;
  if constexpr (lanes == 4)
    return most[0] > most[1] ? most[0] : most[1];
  else
    return largest_of_lanes<lanes / 2>(most, std::make_index_sequence<lanes / 4>());
}
// Of lanes that are numbers.
template <class acc_t>
PYOPS_INLINE acc_t largest(const Vec<acc_t>& v) {
  if constexpr (Vec<acc_t>::width == 2)
    return v.v[0] > v.v[1] ? v.v[0] : v.v[1];
  else
    return largest_of_lanes<Vec<acc_t>::width>(v.v, std::make_index_sequence<Vec<acc_t>::width / 2>());
}

template <class acc_t>
struct Lanes {
  Vec<acc_t> first;  // 0, 1, 2, ...
  PYOPS_INLINE Lanes() {
    for (int64_t i = 0; i < Vec<acc_t>::width; ++i) first.v[i] = acc_t(i);
  }
  // v in the lanes whose index + base lies in [low, high), -inf in the others.
  PYOPS_INLINE Vec<acc_t> within(const Vec<acc_t>& v, int64_t base, int64_t low, int64_t high) const {
    const Vec<acc_t> at = first + Vec<acc_t>(acc_t(base)), outside(-infinity<acc_t>);
    return select(at >= Vec<acc_t>(acc_t(low)), select(at < Vec<acc_t>(acc_t(high)), v, outside), outside);
  }
};

// One row of dropout factors of a block: 0 or 1. j0 is a multiple of 4.
template <class acc_t>
void keep_row(const Problem<acc_t>& p, int64_t b, int64_t h, int64_t i, int64_t j0, acc_t* factor) {
  const RandomStream stream(p.random);
  const int64_t first = attention::random_row(p, b, h, i) + j0 / 4;
#pragma omp simd
  for (int64_t g = 0; g < key_block / 4; ++g) {
    const Words4 w = philox4x32(stream.seed, stream.offset, uint64_t(first + g));
    for (int n = 0; n < 4; ++n) factor[4 * g + n] = is_kept(w[n], p.threshold) ? acc_t(1) : acc_t(0);
  }
}

// f of the mask of numbers that is there.
template <class acc_t, class F>
PYOPS_INLINE void with_bias(const Problem<acc_t>& p, const F& f) {
  if (p.bias != nullptr) return f(p.bias);
  if constexpr (std::is_same_v<acc_t, float>) {
    if (p.bias_bf16 != nullptr) return f(p.bias_bf16);
    if (p.bias_fp16 != nullptr) return f(p.bias_fp16);
  }
}

// `step` elements lie between one key's and the next; with 1 the loops are of vectors.
template <class acc_t, class bias_t>
PYOPS_INLINE void add_bias(const bias_t* bias, int64_t step, int64_t n, acc_t* s) {
  using V = Vec<acc_t>;
  if (step != 1)
    for (int64_t j = 0; j < n; ++j) s[j] += static_cast<acc_t>(bias[j * step]);
  else if constexpr (std::is_same_v<bias_t, acc_t>)
    for (int64_t j = 0; j < n; ++j) s[j] += bias[j];
  else
    each_vector<acc_t>(
        n, [&](int64_t j, auto lanes) { (V::load(s + j, lanes) + V::load(bias + j, lanes)).store(s + j, lanes); });
}

template <class acc_t>
PYOPS_INLINE void hide(const bool* allowed, int64_t step, int64_t n, acc_t* s) {
  // with integers, of which the compiler makes vectors: of a choice it made a branch, which random masks mispredict
  using Bits = std::conditional_t<sizeof(acc_t) == 4, int32_t, int64_t>;
  const auto* seen = reinterpret_cast<const uint8_t*>(allowed);
  const Bits hidden = std::bit_cast<Bits>(-infinity<acc_t>);
  const auto where = [&](int64_t j, uint8_t is_seen) {
    const Bits keep = -Bits(is_seen);
    s[j] = std::bit_cast<acc_t>((std::bit_cast<Bits>(s[j]) & keep) | (hidden & ~keep));
  };
  if (step == 1) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) where(j, seen[j]);
  } else {
    for (int64_t j = 0; j < n; ++j) where(j, seen[j * step]);
  }
}

// Products q.k of one row, in place, become scores; -inf where query i does not see the key. Without `mask` the mask is
// one that changes nothing here. With `slope_of`, also the factor d score / d (scale * q.k), which is 1 without a cap.
template <class acc_t>
void finish_scores(const Problem<acc_t>& p, const Example& e, int64_t b, int64_t h, int64_t i, int64_t j0, int64_t n,
                   bool mask, acc_t* s, acc_t* slope_of) {
  using V = Vec<acc_t>;
  const int64_t low = e.first_key(i) - j0, high = std::min(e.last_key(i) - j0, n);
  const acc_t alibi = p.slopes != nullptr ? p.slopes[b * p.slopes_batch + h] : acc_t(0);
  const Lanes<acc_t> lanes;
  for (int64_t j = 0; j < key_block; j += V::width) {
    V v = V::load(s + j) * V(p.scale);
    if (p.softcap != 0) {
      const V t = tanh(v * V(1 / p.softcap));
      v = t * V(p.softcap);
      if (slope_of != nullptr) (V(acc_t(1)) - t * t).store(slope_of + j);
    }
    if (p.slopes != nullptr) v = v - V(alibi) * abs(lanes.first + V(acc_t(j0 + j - i - e.shift)));
    if (low > j || high < j + V::width) v = lanes.within(v, j, low, high);
    v.store(s + j);
  }
  if (!mask) return;
  const int64_t at = attention::mask_at(p, b, h, i, j0);
  if (p.allowed != nullptr)
    hide(p.allowed + at, p.mask_column, n, s);
  else
    with_bias(p, [&](const auto* bias) { add_bias(bias + at, p.mask_column, n, s); });
}

// What a mask does to a block of scores: nothing is seen (false, -inf), it changes nothing (true, 0), or neither.
enum class Masked { none, all, some };

// Of one row: whether any of its keys is seen, and whether the mask changes nothing for every one. Halves by their bits,
// of which the compiler makes vectors.
template <class T>
PYOPS_INLINE void look_at_mask(const T* mask, int64_t step, int64_t n, bool& hides, bool& changes_nothing) {
  using Bits = std::conditional_t<sizeof(T) == 1, uint8_t, std::conditional_t<sizeof(T) == 2, uint16_t, T>>;
  uint8_t any = 0, every = 1;
  const auto* values = reinterpret_cast<const Bits*>(mask);
  const auto look = [&](Bits x) {
    if constexpr (sizeof(T) == 1) {
      any |= x, every &= x;
    } else if constexpr (sizeof(T) == 2) {
      constexpr Bits minus_infinity = std::is_same_v<T, bfloat16_t> ? 0xff80 : 0xfc00;
      any |= x != minus_infinity, every &= (x & 0x7fff) == 0;
    } else {
      any |= x != -infinity<T>, every &= x == 0;
    }
  };
  if (step == 1)
    for (int64_t j = 0; j < n; ++j) look(values[j]);
  else
    for (int64_t j = 0; j < n; ++j) look(values[j * step]);
  hides = hides && any == 0, changes_nothing = changes_nothing && every != 0;
}

// Most masks of numbers that are neither are found out by their first element.
template <class acc_t>
Masked masked(const Problem<acc_t>& p, int64_t b, int64_t h, int64_t i0, int64_t i1, int64_t j0, int64_t n) {
  if (!p.has_mask()) return Masked::all;
  const int64_t rows = p.mask_row == 0 ? 1 : i1 - i0, columns = p.mask_column == 0 ? 1 : n;
  bool hides = true, changes_nothing = true;
  const auto look = [&](const auto* mask) {
    for (int64_t i = i0; i < i0 + rows && (hides || changes_nothing); ++i) {
      const auto* row = mask + attention::mask_at(p, b, h, i, j0);
      if constexpr (!std::is_same_v<decltype(mask), const bool*>) {
        const acc_t first = static_cast<acc_t>(row[0]);
        if (first != 0 && first != -infinity<acc_t>) hides = changes_nothing = false;
      }
      if (hides || changes_nothing) look_at_mask(row, p.mask_column, columns, hides, changes_nothing);
    }
  };
  if (p.allowed != nullptr)
    look(p.allowed);
  else
    with_bias(p, look);
  return hides ? Masked::none : changes_nothing ? Masked::all : Masked::some;
}

// What the online softmax carries from one block of keys to the next, per query of a block. A score that is no number
// is nobody's largest, but makes the total NaN.
template <class acc_t>
struct OnlineSoftmax {
  using V = Vec<acc_t>;
  static constexpr int64_t W = V::width;
  acc_t most[query_block];           // largest score so far
  acc_t before[query_block];         // the same before this block
  alignas(64) V total[query_block];  // sum of exp(score - most), by lane

  void begin(int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) most[r] = -infinity<acc_t>, total[r] = V();
  }

  // Row r of a block becomes `scale` times what it is: its scores. All rows of a block are looked at before the first
  // is weighed, which may have to wait for a branch.
  PYOPS_INLINE void look(int64_t r, acc_t* s, const V& scale) {
    V top(-infinity<acc_t>);
#pragma GCC unroll 32
    for (int64_t j = 0; j < key_block; j += W) {
      const V score = V::load(s + j) * scale;
      score.store(s + j);
      top = greater(score, top);
    }
    before[r] = most[r];
    most[r] = std::max(before[r], largest(top));
  }

  // Scores become exp(score - most); rescales what was summed before where a larger one came.
  PYOPS_INLINE void weigh(int64_t r, acc_t* s, acc_t* o, int64_t width) {
    const V base(most[r] == -infinity<acc_t> ? acc_t(0) : most[r]);
    V sum = total[r];
    if (most[r] != before[r]) {
      const V factor = exp_down(V(before[r]) - base);
      sum = sum * factor;
      for (int64_t e = 0; e < width; e += W) (V::load(o + e) * factor).store(o + e);
    }
#pragma GCC unroll 32
    for (int64_t j = 0; j < key_block; j += W) {
      const V power = exp_down(V::load(s + j) - base);
      power.store(s + j);
      sum += power;
    }
    total[r] = sum;
  }
};

}  // namespace pyops::PYOPS_CPU_CAPABILITY
