// embedding · CPU
//   gather_rows  y[k] = x[index[k]]
//   gather_sum   y[v] = sum over k in [offsets[v], offsets[v+1]) of scale[k] * x[index[k]]
//   gather_max   y[v] = max over the same k, without those with index[k] = padding, of x[index[k]], the first of equal
//                ones, column by column; entry[v] = its k, -1 and y = 0 where there is none
//   gather_max_bwd  dx[r] = sum over the k in [starts[r], starts[r+1]) of order of dy[bag[k]] where entry[bag[k]] = k
// layout   x [R, D], gather_rows: y [K, D] · gather_sum: index, scale [K], offsets [V + 1], y [V, D]
// mapping  a thread takes rows of y, lanes over D
// memory   the rows that are named are read once each time they are named, y is written once
// numerics sums of 64 terms in acc_t, of these in double, in the order of k; an index outside [0, R) is refused before
// anything is read
#include "common/embedding_binding.h"
#include "common/registry.h"
#include "cpu/elementwise.h"

namespace pyops::PYOPS_CPU_CAPABILITY {

// ---- kernels

template <class scalar_t>
void gather(const scalar_t* x, const int64_t* index, scalar_t* y, int64_t K, int64_t D) {
  parallel_for(K, ceil_div(elementwise_grain, D), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) std::copy_n(x + index[k] * D, D, y + k * D);
  });
}

inline constexpr int strip_vectors = 8;

// sums[i] = terms [first, last) of columns [column, column + n), n up to a strip; a whole strip is summed in registers,
// while the rows named next, before `end`, are on their way.
template <class scalar_t, class acc_t>
void sum_terms(const scalar_t* x, const int64_t* index, const scalar_t* scale, int64_t first, int64_t last, int64_t end,
               int64_t D, int64_t column, int64_t n, acc_t* sums) {
  using V = Vec<acc_t>;
  constexpr int64_t W = V::width, ahead = 4, line = 64 / int64_t(sizeof(scalar_t));
  const auto factor = [&](int64_t k) { return V(scale != nullptr ? acc_t(scale[k]) : acc_t(1)); };
  if (n == strip_vectors * W) {
    V total[strip_vectors];
    for (int64_t k = first; k < last; ++k) {
      if (k + ahead < end)
        for (int64_t i = 0; i < n; i += line) __builtin_prefetch(x + index[k + ahead] * D + column + i);
      const scalar_t* from = x + index[k] * D + column;
      const V by = factor(k);
#pragma GCC unroll 8
      for (int j = 0; j < strip_vectors; ++j) total[j] = fma(V::load(from + j * W), by, total[j]);
    }
#pragma GCC unroll 8
    for (int j = 0; j < strip_vectors; ++j) total[j].store(sums + j * W);
    return;
  }
  std::fill(sums, sums + n, acc_t(0));
  for (int64_t k = first; k < last; ++k) {
    const scalar_t* from = x + index[k] * D + column;
    const V by = factor(k);
    each_vector<acc_t>(n, [&](int64_t i, auto lanes) {
      fma(V::load(from + i, lanes), by, V::load(sums + i, lanes)).store(sums + i, lanes);
    });
  }
}

// Sums of 64 terms are added, not terms, or a row named a million times would lose its last digits.
template <class scalar_t, class acc_t>
void gather_sums(const scalar_t* x, const int64_t* index, const int64_t* offsets, const scalar_t* scale, scalar_t* y,
                 int64_t V, int64_t K, int64_t D) {
  constexpr int64_t together = 64, strip = strip_vectors * Vec<acc_t>::width;
  const int64_t rows = std::max<int64_t>(1, elementwise_grain / (D * (1 + K / std::max<int64_t>(V, 1))));
  parallel_for(V, rows, [&](int64_t begin, int64_t end) {
    alignas(64) acc_t sums[strip];
    double totals[strip];
    for (int64_t v = begin; v < end; ++v)
      for (int64_t column = 0; column < D; column += strip) {
        const int64_t n = std::min(strip, D - column), first = offsets[v], last = offsets[v + 1];
        sum_terms(x, index, scale, first, std::min(first + together, last), offsets[V], D, column, n, sums);
        if (last - first > together) {
          for (int64_t i = 0; i < n; ++i) totals[i] = double(sums[i]);
          for (int64_t k = first + together; k < last; k += together) {
            sum_terms(x, index, scale, k, std::min(k + together, last), offsets[V], D, column, n, sums);
            for (int64_t i = 0; i < n; ++i) totals[i] += double(sums[i]);
          }
          for (int64_t i = 0; i < n; ++i) sums[i] = acc_t(totals[i]);
        }
        narrow(y + v * D + column, sums, n);
      }
  });
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
    if (index[k] < 0 || index[k] >= R) op.check(false, "index must lie in [0, ", R, "), got ", index[k]);
}

// The last two arguments are for the gradient, which the room forms from gather_sum.
Tensor gather_rows(const Tensor& x, const Tensor& index, int64_t, bool) {
  OpScope op("gather_rows", x);
  op.check(x.dim() == 2, "x must be [R, D]");
  const int64_t R = x.size(0), D = x.size(1), K = index.numel();
  const int64_t* at = op.in<int64_t>(index, "index", {K});
  check_rows(op, at, 0, K, R);
  return dispatch_floating(op, x.scalar_type(), [&]<class scalar_t>() {
    Tensor y = op.empty<scalar_t>({K, D});
    const scalar_t* from = op.in<scalar_t>(x, "x", {R, D});
    scalar_t* to = op.out<scalar_t>(y, "y", {K, D});
    if (D > 0) gather(from, at, to, K, D);
    return y;
  });
}

// offsets rise within [0, K], and every index that a bag names is a row.
static void check_bags(const OpScope& op, const int64_t* index, const int64_t* ends, int64_t V, int64_t K, int64_t R) {
  op.check(ends[0] >= 0 && ends[V] <= K, "offsets must lie in [0, ", K, "]");
  for (int64_t v = 0; v < V; ++v) op.check(ends[v] <= ends[v + 1], "offsets must not decrease");
  check_rows(op, index, ends[0], ends[V], R);
}

Tensor gather_sum(const Tensor& x, const Tensor& index, const Tensor& offsets, const OptionalTensor& scale) {
  OpScope op("gather_sum", x);
  const auto [R, D, K, V, at, ends] = embedding::bags_of(op, x, index, offsets);
  check_bags(op, at, ends, V, K, R);
  return dispatch_floating(op, x.scalar_type(), [&]<class scalar_t>() {
    Tensor y = op.empty<scalar_t>({V, D});
    const scalar_t* from = op.in<scalar_t>(x, "x", {R, D});
    const scalar_t* by = op.in_optional<scalar_t>(scale, "scale", {K});
    scalar_t* to = op.out<scalar_t>(y, "y", {V, D});
    if (D > 0) gather_sums<scalar_t, accumulate_t<scalar_t>>(from, at, ends, by, to, V, K, D);
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
