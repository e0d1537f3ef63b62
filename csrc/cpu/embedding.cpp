// embedding · CPU
//   gather_rows  y[k] = x[index[k]]
//   gather_sum   y[v] = sum over k in [offsets[v], offsets[v+1]) of scale[k] * x[index[k]]
//   gather_max   y[v] = max over the same k, without those with index[k] = padding, of x[index[k]], the first of equal
//                ones, column by column; entry[v] = its k, -1 and y = 0 where there is none
//   gather_max_bwd  dx[r] = sum over the k in [starts[r], starts[r+1]) of order of dy[bag[k]] where entry[bag[k]] = k
// layout   x [R, D], gather_rows: y [K, D] · gather_sum: index, scale [K], offsets [V + 1], y [V, D]
// mapping  a thread takes rows of y, lanes over D
// memory   the rows that are named are read once each time they are named, y is written once
// numerics sums of 64 terms in acc_t, of these in double, in the order of k; an index outside [0, R) is refused,
// and nothing is read there
#include <atomic>

#include "common/embedding_binding.h"
#include "common/registry.h"
#include "cpu/elementwise.h"

namespace pyops::PYOPS_CPU_CAPABILITY {

// ---- kernels

PYOPS_INLINE bool is_row(int64_t index, int64_t R) { return uint64_t(index) < uint64_t(R); }

// Rows are named at random, where no hardware prefetcher follows: those named next are on their way while one is read.
inline constexpr int64_t rows_ahead = 16, prefetched_bytes = 8192;

template <class scalar_t>
PYOPS_INLINE void prefetch_row(const scalar_t* row, int64_t D) {
  constexpr int64_t line = 64 / int64_t(sizeof(scalar_t));
  for (int64_t i = 0; i < D; i += line) __builtin_prefetch(row + i);
}

// False where an index is outside [0, R): nothing is read there, and y is not to be used.
template <class scalar_t>
bool gather(const scalar_t* x, const int64_t* index, scalar_t* y, int64_t K, int64_t D, int64_t R) {
  const int64_t row_bytes = D * int64_t(sizeof(scalar_t));
  const int64_t ahead = std::clamp<int64_t>(prefetched_bytes / row_bytes, 1, rows_ahead);
  const int64_t prefetched = std::min(D, prefetched_bytes / int64_t(sizeof(scalar_t)));
  std::atomic<bool> known = true;
  parallel_for(K, ceil_div(elementwise_grain, D), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      if (k + ahead < end && is_row(index[k + ahead], R)) prefetch_row(x + index[k + ahead] * D, prefetched);
      if (!is_row(index[k], R)) return known.store(false, std::memory_order_relaxed);
      std::copy_n(x + index[k] * D, D, y + k * D);
    }
  });
  return known;
}

// The widest strip of columns whose sums stay in registers.
#if defined(__AVX512F__)
inline constexpr int strip_vectors = 16;
#else
inline constexpr int strip_vectors = 8;
#endif

// The entries of all bags, and the columns of their rows that are summed now.
template <class scalar_t>
struct Strip {
  const scalar_t* x;
  const int64_t* index;
  const scalar_t* scale;
  int64_t D, R, entries, column;
};

// to = sum of the entries [first, last) over a strip, while the rows named next are on their way. False as above.
template <int vectors, bool scaled, class T, class scalar_t, class Lanes>
PYOPS_INLINE bool sum_entries(Strip<scalar_t> s, int64_t first, int64_t last, Lanes lanes, T* to) {
  using V = Vec<accumulate_t<scalar_t>>;
  constexpr int64_t W = V::width, line = 64 / int64_t(sizeof(scalar_t));
  bool known = true;
  V total[vectors];
  for (int64_t k = first; k < last; ++k) {
    const int64_t row = s.index[k], later = s.index[std::min(k + rows_ahead, s.entries - 1)];
    // to return from here would keep the totals in memory
    if (!is_row(row, s.R)) {
      known = false;
      break;
    }
    const scalar_t* from = s.x + row * s.D + s.column;
    const scalar_t* next = s.x + (is_row(later, s.R) ? later : row) * s.D + s.column;
    V by(1);
    if constexpr (scaled) by = V(accumulate_t<scalar_t>(s.scale[k]));
#pragma GCC unroll 16
    for (int j = 0; j < vectors; ++j) {
      total[j] = fma(V::load(from + j * W, lanes), by, total[j]);
      if (j * W % line == 0) __builtin_prefetch(next + j * W);
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < vectors; ++j) total[j].store(to + j * W, lanes);
  return known;
}

// One bag. Sums of 64 terms are added, not terms, or a row named a million times would lose its last digits.
template <int vectors, bool scaled, class scalar_t, class Lanes>
bool sum_bag(Strip<scalar_t> s, int64_t first, int64_t last, Lanes lanes, scalar_t* y) {
  using acc_t = accumulate_t<scalar_t>;
  constexpr int64_t together = 64, n = vectors * Vec<acc_t>::width;
  if (last - first <= together) return sum_entries<vectors, scaled>(s, first, last, lanes, y);
  acc_t sums[n] = {};
  double totals[n] = {};
  for (int64_t k = first; k < last; k += together) {
    if (!sum_entries<vectors, scaled>(s, k, std::min(k + together, last), lanes, sums)) return false;
    for (int64_t i = 0; i < n; ++i) totals[i] += double(sums[i]);
  }
  for (int64_t i = 0; i < n; ++i) sums[i] = acc_t(totals[i]);
  for (int j = 0; j < vectors; ++j) {
    constexpr int64_t W = Vec<acc_t>::width;
    Vec<acc_t>::load(sums + j * W).store(y + j * W, lanes);
  }
  return true;
}

// The columns from `column` on, in strips that halve.
template <int vectors, bool scaled, class scalar_t>
bool sum_strips(Strip<scalar_t> s, int64_t first, int64_t last, scalar_t* y) {
  constexpr int64_t n = vectors * Vec<accumulate_t<scalar_t>>::width;
  for (; s.column + n <= s.D; s.column += n)
    if (!sum_bag<vectors, scaled>(s, first, last, AllLanes{}, y + s.column)) return false;
  if (s.column == s.D) return true;
  if constexpr (vectors > 1)
    return sum_strips<vectors / 2, scaled>(s, first, last, y);
  else
    return sum_bag<1, scaled>(s, first, last, FirstLanes{s.D - s.column}, y + s.column);
}

template <bool scaled, class scalar_t>
bool gather_sums(const scalar_t* x, const int64_t* index, const int64_t* offsets, const scalar_t* scale, scalar_t* y,
                 int64_t V, int64_t K, int64_t D, int64_t R) {
  const int64_t rows = std::max<int64_t>(1, elementwise_grain / (D * (1 + K / std::max<int64_t>(V, 1))));
  std::atomic<bool> known = true;
  parallel_for(V, rows, [&](int64_t begin, int64_t end) {
    const Strip<scalar_t> all{x, index, scale, D, R, offsets[V], 0};
    for (int64_t v = begin; v < end; ++v)
      if (!sum_strips<strip_vectors, scaled>(all, offsets[v], offsets[v + 1], y + v * D))
        return known.store(false, std::memory_order_relaxed);
  });
  return known;
}

template <class scalar_t>
void gather_maxima(const scalar_t* x, const int64_t* index, const int64_t* offsets, scalar_t* y, int64_t* entry,
                   int64_t V, int64_t K, int64_t D, int64_t padding) {
  using acc_t = accumulate_t<scalar_t>;
  const int64_t rows = std::max<int64_t>(1, elementwise_grain / (D * (1 + K / std::max<int64_t>(V, 1))));
  parallel_for(V, rows, [&](int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; ++v) {
      scalar_t* best = y + v * D;
      int64_t* at = entry + v * D;
      bool first = true;
      std::fill_n(best, D, scalar_t(0));
      std::fill_n(at, D, int64_t{-1});
      for (int64_t k = offsets[v]; k < offsets[v + 1]; ++k) {
        if (index[k] == padding) continue;
        const scalar_t* from = x + index[k] * D;
        for (int64_t d = 0; d < D; ++d) {
          const bool larger = first || acc_t(from[d]) > acc_t(best[d]);
          best[d] = larger ? from[d] : best[d];
          at[d] = larger ? k : at[d];
        }
        first = false;
      }
    }
  });
}

template <class scalar_t>
void gather_maxima_bwd(const scalar_t* dy, const int64_t* entry, const int64_t* order, const int64_t* bag,
                       const int64_t* starts, scalar_t* dx, int64_t R, int64_t K, int64_t D) {
  const int64_t rows = std::max<int64_t>(1, elementwise_grain / (D * (1 + K / std::max<int64_t>(R, 1))));
  parallel_for(R, rows, [&](int64_t begin, int64_t end) {
    Buffer<double> total(D);
    for (int64_t r = begin; r < end; ++r) {
      std::fill_n(total.get(), D, 0.0);
      for (int64_t j = starts[r]; j < starts[r + 1]; ++j) {
        const int64_t k = order[j], from = bag[k] * D;
        for (int64_t d = 0; d < D; ++d)
          if (entry[from + d] == k) total[d] += double(dy[from + d]);
      }
      for (int64_t d = 0; d < D; ++d) dx[r * D + d] = scalar_t(accumulate_t<scalar_t>(total[d]));
    }
  });
}

// ---- binding

static void check_rows(const OpScope& op, const int64_t* index, int64_t begin, int64_t end, int64_t R) {
  for (int64_t k = begin; k < end; ++k)
    if (!is_row(index[k], R)) op.check(false, "index must lie in [0, ", R, "), got ", index[k]);
}

// The last two arguments are for the gradient, which the room forms from gather_sum.
Tensor gather_rows(const Tensor& x, const Tensor& index, int64_t, bool) {
  OpScope op("gather_rows", x);
  op.check(x.dim() == 2, "x must be [R, D]");
  const int64_t R = x.size(0), D = x.size(1), K = index.numel();
  const int64_t* at = op.in<int64_t>(index, "index", {K});
  return dispatch_floating(op, x.scalar_type(), [&]<class scalar_t>() {
    Tensor y = op.empty<scalar_t>({K, D});
    const scalar_t* from = op.in<scalar_t>(x, "x", {R, D});
    scalar_t* to = op.out<scalar_t>(y, "y", {K, D});
    if (D == 0 || !gather(from, at, to, K, D, R)) check_rows(op, at, 0, K, R);
    return y;
  });
}

// offsets rise from 0 to at most K.
static void check_offsets(const OpScope& op, const int64_t* ends, int64_t V, int64_t K) {
  op.check(ends[0] == 0 && ends[V] <= K, "offsets must begin at 0 and lie in [0, ", K, "]");
  bool rising = true;
  for (int64_t v = 0; v < V; ++v) rising &= ends[v] <= ends[v + 1];
  op.check(rising, "offsets must not decrease");
}

// The same, and every index that a bag names is a row.
static void check_bags(const OpScope& op, const int64_t* index, const int64_t* ends, int64_t V, int64_t K, int64_t R) {
  check_offsets(op, ends, V, K);
  check_rows(op, index, ends[0], ends[V], R);
}

Tensor gather_sum(const Tensor& x, const Tensor& index, const Tensor& offsets, const OptionalTensor& scale) {
  OpScope op("gather_sum", x);
  const auto [R, D, K, V, at, ends] = embedding::bags_of(op, x, index, offsets);
  check_offsets(op, ends, V, K);
  return dispatch_floating(op, x.scalar_type(), [&]<class scalar_t>() {
    Tensor y = op.empty<scalar_t>({V, D});
    const scalar_t* from = op.in<scalar_t>(x, "x", {R, D});
    const scalar_t* by = op.in_optional<scalar_t>(scale, "scale", {K});
    scalar_t* to = op.out<scalar_t>(y, "y", {V, D});
    const bool known = D > 0 && (by != nullptr ? gather_sums<true>(from, at, ends, by, to, V, K, D, R)
                                               : gather_sums<false>(from, at, ends, by, to, V, K, D, R));
    if (!known) check_rows(op, at, ends[0], ends[V], R);
    return y;
  });
}

std::tuple<Tensor, Tensor> gather_max(const Tensor& x, const Tensor& index, const Tensor& offsets, int64_t padding) {
  OpScope op("gather_max", x);
  const auto [R, D, K, V, at, ends] = embedding::bags_of(op, x, index, offsets);
  check_bags(op, at, ends, V, K, R);
  return dispatch_floating(op, x.scalar_type(), [&]<class scalar_t>() {
    Tensor y = op.empty<scalar_t>({V, D}), entry = op.empty<int64_t>({V, D});
    const scalar_t* from = op.in<scalar_t>(x, "x", {R, D});
    scalar_t* to = op.out<scalar_t>(y, "y", {V, D});
    int64_t* of = op.out<int64_t>(entry, "entry", {V, D});
    if (D > 0) gather_maxima(from, at, ends, to, of, V, K, D, padding);
    return std::tuple(y, entry);
  });
}

Tensor gather_max_bwd(const Tensor& dy, const Tensor& entry, const Tensor& order, const Tensor& bag,
                      const Tensor& starts) {
  OpScope op("gather_max_bwd", dy);
  op.check(dy.dim() == 2 && starts.dim() == 1 && starts.size(0) >= 1, "dy must be [V, D] and starts [R + 1]");
  const int64_t V = dy.size(0), D = dy.size(1), K = bag.numel(), R = starts.size(0) - 1;
  const int64_t *by_row = op.in<int64_t>(order, "order", {K}), *of = op.in<int64_t>(bag, "bag", {K});
  const int64_t *ends = op.in<int64_t>(starts, "starts", {R + 1}), *at = op.in<int64_t>(entry, "entry", {V, D});
  check_bags(op, by_row, ends, R, K, K);
  for (int64_t j = ends[0]; j < ends[R]; ++j) op.check(of[by_row[j]] >= 0 && of[by_row[j]] < V, "bag is none of dy");
  return dispatch_floating(op, dy.scalar_type(), [&]<class scalar_t>() {
    Tensor dx = op.empty<scalar_t>({R, D});
    const scalar_t* from = op.in<scalar_t>(dy, "dy", {V, D});
    scalar_t* to = op.out<scalar_t>(dx, "dx", {R, D});
    if (D > 0) gather_maxima_bwd(from, at, by_row, of, ends, to, R, K, D);
    return dx;
  });
}

PYOPS_LIBRARY(m) {
  PYOPS_IMPL(m, gather_max);
  PYOPS_IMPL(m, gather_max_bwd);
  PYOPS_IMPL(m, gather_rows);
  PYOPS_IMPL(m, gather_sum);
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY
