// softmax · CPU
//   y[m,n,s] = exp(x - max_n x) / sum,  sum = sum_n exp(x - max_n x);  log: y = x - max - log(sum)
//   dx = p * (dy - sum_n dy * p),  log: dx = dy - p * sum_n dy,  p = exp(x - max) / sum
// layout   x, y, dy, dx: [M, N, S] · max, sum: [M * S]
// mapping  S = 1: a thread takes whole rows, lanes over n; else a thread takes blocks of columns, lanes over s
// memory   x read once, y written once while a row (a block of columns) stays in cache
// numerics acc_t, exp and log of cpu/math.h; a row without a finite maximum gives NaN, as in torch
#include "common/registry.h"
#include "common/softmax_binding.h"
#include "cpu/math.h"
#include "cpu/parallel.h"

namespace pyops::PYOPS_CPU_CAPABILITY {

// ---- kernels

// exp(x - max) waits in y, and exp(x - max) / sum in dx, where they are wide enough to hold it: no exponential is taken
// twice.
template <class scalar_t, class acc_t>
inline constexpr bool holds_exponentials = std::is_same_v<scalar_t, acc_t>;

template <class scalar_t, class acc_t>
void softmax_row(bool log_of, const scalar_t* x, scalar_t* y, acc_t* top, acc_t* total, int64_t N) {
  using V = Vec<acc_t>;
  const V most(*top = max_of_run<acc_t>(x, N));
  const bool kept = holds_exponentials<scalar_t, acc_t> && !log_of;
  Totals<acc_t, 1> sums;
  accumulate(sums, N, [&](int64_t i, auto lanes, auto& t) {
    const V e = exp_down(V::load(x + i, lanes) - most);
    if (kept) e.store(y + i, lanes);
    t[0] += keep(e, lanes);
  });
  const acc_t sum_of_row = *total = sum(sums[0]);
  if (log_of) {
    const V shift{acc_t(std::log(sum_of_row))};
    each_vector<acc_t>(N, [&](int64_t i, auto lanes) { (V::load(x + i, lanes) - most - shift).store(y + i, lanes); });
    return;
  }
  const V scale(acc_t(1) / sum_of_row);
  each_vector<acc_t>(N, [&](int64_t i, auto lanes) {
    const V e = kept ? V::load(y + i, lanes) : exp_down(V::load(x + i, lanes) - most);
    (e * scale).store(y + i, lanes);
  });
}

template <class scalar_t, class acc_t>
void softmax_gradient_row(bool log_of, const scalar_t* dy, const scalar_t* x, acc_t top, acc_t total, scalar_t* dx,
                          int64_t N) {
  using V = Vec<acc_t>;
  const V most(top), scale(acc_t(1) / total);
  const bool kept = holds_exponentials<scalar_t, acc_t> && !log_of;
  const auto probability = [&](int64_t i, auto lanes) { return exp_down(V::load(x + i, lanes) - most) * scale; };
  Totals<acc_t, 1> sums;
  accumulate(sums, N, [&](int64_t i, auto lanes, auto& t) {
    V g = V::load(dy + i, lanes);
    if (!log_of) {
      const V p = probability(i, lanes);
      if (kept) p.store(dx + i, lanes);
      g = g * p;
    }
    t[0] += keep(g, lanes);
  });
  const V dot(sum(sums[0]));
  each_vector<acc_t>(N, [&](int64_t i, auto lanes) {
    const V p = kept ? V::load(dx + i, lanes) : probability(i, lanes), g = V::load(dy + i, lanes);
    (log_of ? g - p * dot : p * (g - dot)).store(dx + i, lanes);
  });
}

// One vector of columns of [N, S].
template <class scalar_t, class acc_t, class Lanes>
PYOPS_INLINE void softmax_columns(bool log_of, const scalar_t* x, scalar_t* y, acc_t* top, acc_t* total, int64_t N,
                                  int64_t S, Lanes lanes) {
  using V = Vec<acc_t>;
  V most(-std::numeric_limits<acc_t>::infinity()), sums;
  for (int64_t n = 0; n < N; ++n) most = max(V::load(x + n * S, lanes), most);
  const bool kept = holds_exponentials<scalar_t, acc_t> && !log_of;
  for (int64_t n = 0; n < N; ++n) {
    const V e = exp_down(V::load(x + n * S, lanes) - most);
    if (kept) e.store(y + n * S, lanes);
    sums += e;
  }
  const V factor = log_of ? log(sums) : V(acc_t(1)) / sums;
  for (int64_t n = 0; n < N; ++n) {
    const auto centred = [&] { return V::load(x + n * S, lanes) - most; };
    const V value = log_of ? centred() - factor : (kept ? V::load(y + n * S, lanes) : exp_down(centred())) * factor;
    value.store(y + n * S, lanes);
  }
  most.store(top, lanes);
  sums.store(total, lanes);
}

template <class scalar_t, class acc_t, class Lanes>
PYOPS_INLINE void softmax_gradient_columns(bool log_of, const scalar_t* dy, const scalar_t* x, const acc_t* top,
                                           const acc_t* total, scalar_t* dx, int64_t N, int64_t S, Lanes lanes) {
  using V = Vec<acc_t>;
  const V most = V::load(top, lanes), scale = V(acc_t(1)) / V::load(total, lanes);
  const bool kept = holds_exponentials<scalar_t, acc_t> && !log_of;
  const auto probability = [&](int64_t n) { return exp_down(V::load(x + n * S, lanes) - most) * scale; };
  V dot;
  for (int64_t n = 0; n < N; ++n) {
    V g = V::load(dy + n * S, lanes);
    if (!log_of) {
      const V p = probability(n);
      if (kept) p.store(dx + n * S, lanes);
      g = g * p;
    }
    dot += g;
  }
  for (int64_t n = 0; n < N; ++n) {
    const V p = kept ? V::load(dx + n * S, lanes) : probability(n), g = V::load(dy + n * S, lanes);
    (log_of ? g - p * dot : p * (g - dot)).store(dx + n * S, lanes);
  }
}

// row(m) for S = 1, else columns(m, s, lanes) for each vector of columns, on all threads.
template <class acc_t, class Row, class Columns>
void each_row(int64_t M, int64_t N, int64_t S, const Row& row, const Columns& columns) {
  constexpr int64_t W = Vec<acc_t>::width;
  if (S == 1) {
    parallel_for(M, ceil_div(8192, N > 0 ? N : 1), [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) row(m);
    });
    return;
  }
  const int64_t vectors = ceil_div(S, W);
  parallel_for(M * vectors, ceil_div(8192, N * W > 0 ? N * W : 1), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t s = k % vectors * W;
      if (s + W <= S)
        columns(k / vectors, s, AllLanes{});
      else
        columns(k / vectors, s, FirstLanes{S - s});
    }
  });
}

// ---- binding

std::tuple<Tensor, Tensor, Tensor> softmax_fwd(const Tensor& x, int64_t dim, bool log_of) {
  OpScope op("softmax_fwd", x);
  const auto [M, N, S] = softmax::sizes_of(op, x, dim);
  return dispatch_floating(op, x.scalar_type(), [&]<class scalar_t>() {
    using acc_t = accumulate_t<scalar_t>;
    Tensor y = op.empty<scalar_t>(ShapeRef(x)), top = op.empty<acc_t>({M * S}), total = op.empty<acc_t>({M * S});
    auto* px = op.in<scalar_t>(x, "x", ShapeRef(x));
    auto* py = op.out<scalar_t>(y, "y", ShapeRef(x));
    auto *ptop = op.out<acc_t>(top, "max", {M * S}), *ptotal = op.out<acc_t>(total, "sum", {M * S});
    each_row<acc_t>(
        M, N, S, [&](int64_t m) { softmax_row(log_of, px + m * N, py + m * N, ptop + m, ptotal + m, N); },
        [&](int64_t m, int64_t s, auto lanes) {
          const int64_t at = m * N * S + s;
          softmax_columns(log_of, px + at, py + at, ptop + m * S + s, ptotal + m * S + s, N, S, lanes);
        });
    return std::tuple(y, top, total);
  });
}

Tensor softmax_bwd(const Tensor& dy, const Tensor& x, const Tensor& top, const Tensor& total, int64_t dim,
                   bool log_of) {
  OpScope op("softmax_bwd", dy);
  const auto [M, N, S] = softmax::sizes_of(op, x, dim);
  return dispatch_floating(op, x.scalar_type(), [&]<class scalar_t>() {
    using acc_t = accumulate_t<scalar_t>;
    Tensor dx = op.empty<scalar_t>(ShapeRef(x));
    auto *pdy = op.in<scalar_t>(dy, "dy", ShapeRef(x)), *px = op.in<scalar_t>(x, "x", ShapeRef(x));
    auto *ptop = op.in<acc_t>(top, "max", {M * S}), *ptotal = op.in<acc_t>(total, "sum", {M * S});
    auto* pdx = op.out<scalar_t>(dx, "dx", ShapeRef(x));
    each_row<acc_t>(
        M, N, S,
        [&](int64_t m) { softmax_gradient_row(log_of, pdy + m * N, px + m * N, ptop[m], ptotal[m], pdx + m * N, N); },
        [&](int64_t m, int64_t s, auto lanes) {
          const int64_t at = m * N * S + s, column = m * S + s;
          softmax_gradient_columns(log_of, pdy + at, px + at, ptop + column, ptotal + column, pdx + at, N, S, lanes);
        });
    return dx;
  });
}

PYOPS_LIBRARY(m) {
  PYOPS_IMPL(m, softmax_fwd);
  PYOPS_IMPL(m, softmax_bwd);
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY
