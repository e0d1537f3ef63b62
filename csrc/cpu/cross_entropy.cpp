// cross_entropy · CPU
//   labels         loss[m,s] = -(1 - ε) w_t log p_t - (ε / N) Σ_n w_n log p_n + z lse²,  log p = x - lse
//                  t = target[m,s]
//                  dx = g (p_n A - B_n),  A = (1 - ε) w_t + (ε / N) Σ w + 2 z lse
//                  B_n = (1 - ε) w_t [n = t] + (ε / N) w_n
//                  x already log p (`logits` false): lse = 0, A = 0
//   probabilities  loss[m,s] = -Σ_n w_n t'_n log p_n,  t' = (1 - ε) t + ε / N
//                  dx = g (p_n Σ_k w_k t'_k - w_n t'_n),  dt = -g (1 - ε) w_n log p_n
// layout   x, dx, probabilities: [M, N, S] · target, loss, divisor, max, sum, g: [M, S] · w: [N]
// mapping  S = 1: a thread takes rows, lanes over n; else vectors of columns, lanes over s
// memory   forward reads x once while a row stays in cache; backward reads x, writes dx; max and sum are all that is
//          kept
// numerics acc_t; lse in two numbers, max and sum: their sum would round away the digits of p where logits are large
#include <algorithm>
#include <atomic>
#include <cstring>

#include "common/registry.h"
#include "cpu/math.h"
#include "cpu/parallel.h"

namespace pyops::PYOPS_CPU_CAPABILITY {

// ---- kernels

template <class scalar_t, class acc_t = accumulate_t<scalar_t>>
struct CrossEntropy {
  int64_t N, S;
  const acc_t* w;  // null: all 1
  acc_t w_sum;     // Σ w
  acc_t smoothing, z;
  bool logits;

  template <class Lanes>
  PYOPS_INLINE Vec<acc_t> weight(int64_t n, Lanes lanes) const {
    return w == nullptr ? Vec<acc_t>(acc_t(1)) : Vec<acc_t>::load(w + n, lanes);
  }
  PYOPS_INLINE acc_t weight(int64_t n) const { return w == nullptr ? acc_t(1) : w[n]; }
  acc_t spread() const { return smoothing / acc_t(N); }

  // Largest logit of a row and Σ exp(x - max): one pass, whose sum is scaled anew where a larger logit comes.
  void row_statistics(const scalar_t* x, acc_t* top, acc_t* total) const {
    using V = Vec<acc_t>;
    constexpr int64_t block = 1024;
    const acc_t lowest = -std::numeric_limits<acc_t>::infinity();
    acc_t most = lowest, sum_of_row = 0;
    for (int64_t b = 0; b < N; b += block) {
      const int64_t n = N - b < block ? N - b : block;
      acc_t higher = max_of_run<acc_t>(x + b, n);
      higher = higher > most || higher != higher ? higher : most;
      if (higher == lowest) continue;
      const V shift(higher);
      Totals<acc_t, 1> sums;
      accumulate(sums, n, [&](int64_t k, auto lanes, auto& t) {
        t[0] += keep(exp_down(V::load(x + b + k, lanes) - shift), lanes);
      });
      sum_of_row =
          (most == higher || most == lowest ? sum_of_row : sum_of_row * std::exp(most - higher)) + sum(sums[0]);
      most = higher;
    }
    // A row of -inf alone: NaN, as x - max gives it.
    *top = most, *total = most == lowest ? std::numeric_limits<acc_t>::quiet_NaN() : sum_of_row;
  }

  // Σ_n f(n) over a row
  template <class F>
  PYOPS_INLINE acc_t row_sum(F&& f) const {
    Totals<acc_t, 1> sums;
    accumulate(sums, N, [&](int64_t n, auto lanes, auto& t) { t[0] += keep(f(n, lanes), lanes); });
    return sum(sums[0]);
  }

  // Statistics and the sum over classes of columns: lanes over s.
  template <class Lanes>
  PYOPS_INLINE void column_statistics(const scalar_t* x, Vec<acc_t>& most, Vec<acc_t>& total, Lanes lanes) const {
    using V = Vec<acc_t>;
    most = V(-std::numeric_limits<acc_t>::infinity()), total = V();
    for (int64_t n = 0; n < N; ++n) most = max(V::load(x + n * S, lanes), most);
    for (int64_t n = 0; n < N; ++n) total += exp_down(V::load(x + n * S, lanes) - most);
  }
  template <class Lanes, class F>
  PYOPS_INLINE Vec<acc_t> column_sum(Lanes, F&& f) const {
    Vec<acc_t> total;
    for (int64_t n = 0; n < N; ++n) total += f(n);
    return total;
  }
};

// row(m) for S = 1, else columns(m, s, lanes) for each vector of columns, on all threads.
template <class acc_t, class Row, class Columns>
void each_label(int64_t M, int64_t N, int64_t S, const Row& row, const Columns& columns) {
  constexpr int64_t W = Vec<acc_t>::width;
  const int64_t vectors = ceil_div(S, W);
  if (S == 1)
    return parallel_for(M, ceil_div(8192, N + 1), [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) row(m);
    });
  parallel_for(M * vectors, ceil_div(8192, (N + 1) * W), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t s = k % vectors * W;
      if (s + W <= S)
        columns(k / vectors, s, AllLanes{});
      else
        columns(k / vectors, s, FirstLanes{S - s});
    }
  });
}

template <class acc_t>
PYOPS_INLINE int64_t count_of(AllLanes) {
  return Vec<acc_t>::width;
}
template <class acc_t>
PYOPS_INLINE int64_t count_of(FirstLanes lanes) {
  return lanes.count;
}

// Of log-probabilities a label asks for one number, and its gradient is one number among zeros.
template <class scalar_t>
bool is_gather(const CrossEntropy<scalar_t>& e) {
  return !e.logits && e.smoothing == 0;
}

template <class scalar_t, class acc_t>
void gather_forward(const CrossEntropy<scalar_t>& e, const scalar_t* x, const int64_t* target, int64_t ignore,
                    acc_t* loss, acc_t* divisor, acc_t* top, acc_t* total, int64_t M) {
  const int64_t N = e.N, S = e.S;
  parallel_for(M, ceil_div(8192, S + 1), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m)
      for (int64_t at = m * S; at < (m + 1) * S; ++at) {
        const int64_t t = target[at];
        const bool counts = t != ignore;
        const acc_t w = counts ? e.weight(t) : acc_t(0);
        loss[at] = counts ? -w * acc_t(x[(m * N + t) * S + at - m * S]) : acc_t(0);
        divisor[at] = w;
      }
    std::fill(top + begin * S, top + end * S, acc_t(0));
    std::fill(total + begin * S, total + end * S, acc_t(1));
  });
}

template <class scalar_t, class acc_t>
void gather_backward(const CrossEntropy<scalar_t>& e, const acc_t* g, const int64_t* target, int64_t ignore,
                     scalar_t* dx, int64_t M) {
  const int64_t N = e.N, S = e.S;
  parallel_for(M, ceil_div(8192, N * S + 1), [&](int64_t begin, int64_t end) {
    // all bits zero is 0 in every dtype; the C library clears memory without reading it first
    std::memset(static_cast<void*>(dx + begin * N * S), 0, size_t((end - begin) * N * S) * sizeof(scalar_t));
    for (int64_t m = begin; m < end; ++m)
      for (int64_t at = m * S; at < (m + 1) * S; ++at)
        if (const int64_t t = target[at]; t != ignore)
          dx[(m * N + t) * S + at - m * S] = scalar_t(-g[at] * e.weight(t));
  });
}

template <class scalar_t, class acc_t>
void labels_forward(const CrossEntropy<scalar_t>& e, const scalar_t* x, const int64_t* target, int64_t ignore,
                    acc_t* loss, acc_t* divisor, acc_t* top, acc_t* total, int64_t M) {
  if (is_gather(e)) return gather_forward(e, x, target, ignore, loss, divisor, top, total, M);
  using V = Vec<acc_t>;
  const int64_t N = e.N, S = e.S;
  // One label, given lse in two parts and Σ_n w_n (x - max) where labels are smoothed.
  const auto finish = [&](int64_t at, acc_t label_logit, int64_t t, acc_t most, acc_t sums, acc_t weighted) {
    top[at] = most, total[at] = sums;
    if (t == ignore) {
      loss[at] = divisor[at] = acc_t(0);
      return;
    }
    const acc_t log_sum = e.logits ? std::log(sums) : acc_t(0), lse = most + log_sum;
    divisor[at] = e.weight(t);
    acc_t l = (acc_t(1) - e.smoothing) * e.weight(t) * (log_sum - (label_logit - most));
    if (e.smoothing != acc_t(0)) l += e.spread() * (log_sum * e.w_sum - weighted);
    loss[at] = e.z != acc_t(0) ? l + e.z * lse * lse : l;
  };
  each_label<acc_t>(
      M, N, S,
      [&](int64_t m) {
        const scalar_t* row = x + m * N;
        const int64_t t = target[m];
        acc_t most = 0, sums = 1;
        if (e.logits) e.row_statistics(row, &most, &sums);
        const V shift(most);
        const acc_t weighted = e.smoothing == acc_t(0) ? acc_t(0) : e.row_sum([&](int64_t n, auto lanes) {
          return e.weight(n, lanes) * (V::load(row + n, lanes) - shift);
        });
        finish(m, t == ignore ? acc_t(0) : acc_t(row[t]), t, most, sums, weighted);
      },
      [&](int64_t m, int64_t s, auto lanes) {
        const scalar_t* column = x + m * N * S + s;
        V most, sums(acc_t(1)), weighted;
        if (e.logits) e.column_statistics(column, most, sums, lanes);
        if (e.smoothing != acc_t(0))
          weighted =
              e.column_sum(lanes, [&](int64_t n) { return V(e.weight(n)) * (V::load(column + n * S, lanes) - most); });
        for (int64_t j = 0; j < count_of<acc_t>(lanes); ++j) {
          const int64_t t = target[m * S + s + j];
          finish(m * S + s + j, t == ignore ? acc_t(0) : acc_t(column[t * S + j]), t, most.v[j], sums.v[j],
                 weighted.v[j]);
        }
      });
}

template <class scalar_t, class acc_t>
void labels_backward(const CrossEntropy<scalar_t>& e, const acc_t* g, const scalar_t* x, const int64_t* target,
                     int64_t ignore, const acc_t* top, const acc_t* total, scalar_t* dx, int64_t M) {
  if (is_gather(e)) return gather_backward(e, g, target, ignore, dx, M);
  using V = Vec<acc_t>;
  const int64_t N = e.N, S = e.S;
  const acc_t spread = e.spread();
  // g A / Σ and g (1 - ε) w_t of one label
  const auto factors = [&](int64_t at, int64_t t, acc_t& of_p, acc_t& of_label) {
    of_label = t == ignore ? acc_t(0) : g[at] * (acc_t(1) - e.smoothing) * e.weight(t);
    of_p = acc_t(0);
    if (t == ignore || !e.logits) return;
    of_p = of_label + g[at] * spread * e.w_sum;
    if (e.z != acc_t(0)) of_p += g[at] * acc_t(2) * e.z * (top[at] + std::log(total[at]));
    of_p /= total[at];
  };
  each_label<acc_t>(
      M, N, S,
      [&](int64_t m) {
        const int64_t t = target[m];
        scalar_t* to = dx + m * N;
        acc_t of_p, of_label;
        factors(m, t, of_p, of_label);
        if (t == ignore || !e.logits) {
          const V even = t == ignore ? V() : V(g[m] * spread);
          each_vector<acc_t>(N, [&](int64_t n, auto lanes) { (-(even * e.weight(n, lanes))).store(to + n, lanes); });
          if (t != ignore) to[t] = scalar_t(-of_label - g[m] * spread * e.weight(t));
          return;
        }
        const V shift(top[m]), scale(of_p), even(g[m] * spread);
        const scalar_t* row = x + m * N;
        if (spread == acc_t(0))
          each_vector<acc_t>(N, [&](int64_t n, auto lanes) {
            (exp_down(V::load(row + n, lanes) - shift) * scale).store(to + n, lanes);
          });
        else
          each_vector<acc_t>(N, [&](int64_t n, auto lanes) {
            (exp_down(V::load(row + n, lanes) - shift) * scale - even * e.weight(n, lanes)).store(to + n, lanes);
          });
        const acc_t p = std::exp(acc_t(row[t]) - top[m]) * of_p;
        to[t] = scalar_t(p - g[m] * spread * e.weight(t) - of_label);
      },
      [&](int64_t m, int64_t s, auto lanes) {
        const int64_t at = m * S + s, first = m * N * S + s, count = count_of<acc_t>(lanes);
        V scale, label, cotangent;
        for (int64_t j = 0; j < count; ++j) {
          acc_t of_p, of_label;
          factors(at + j, target[at + j], of_p, of_label);
          scale.v[j] = of_p, label.v[j] = of_label;
          cotangent.v[j] = target[at + j] == ignore ? acc_t(0) : g[at + j] * spread;
        }
        const V shift = V::load(top + at, lanes), zero;
        for (int64_t n = 0; n < N; ++n) {
          V v = e.logits ? exp_down(V::load(x + first + n * S, lanes) - shift) * scale : zero;
          // an ignored label gives 0, whatever its logits are
          v = select((scale > zero) | (scale < zero) | is_nan(scale), v, zero) - cotangent * V(e.weight(n));
          v.store(dx + first + n * S, lanes);
        }
        for (int64_t j = 0; j < count; ++j) {
          const int64_t t = target[at + j];
          if (t == ignore) continue;
          scalar_t& to = dx[first + t * S + j];
          const acc_t p = e.logits ? std::exp(acc_t(x[first + t * S + j]) - top[at + j]) * scale.v[j] : acc_t(0);
          to = scalar_t(p - cotangent.v[j] * e.weight(t) - label.v[j]);
        }
      });
}

template <class scalar_t, class acc_t>
void probabilities_forward(const CrossEntropy<scalar_t>& e, const scalar_t* x, const scalar_t* q, acc_t* loss,
                           acc_t* top, acc_t* total, int64_t M) {
  using V = Vec<acc_t>;
  const int64_t N = e.N, S = e.S;
  const V keep_share(acc_t(1) - e.smoothing), even(e.spread());
  each_label<acc_t>(
      M, N, S,
      [&](int64_t m) {
        e.row_statistics(x + m * N, top + m, total + m);
        const V shift(top[m]), log_sum{acc_t(std::log(total[m]))};
        loss[m] = e.row_sum([&](int64_t n, auto lanes) {
          const V t = fma(V::load(q + m * N + n, lanes), keep_share, even) * e.weight(n, lanes);
          return t * (log_sum - (V::load(x + m * N + n, lanes) - shift));
        });
      },
      [&](int64_t m, int64_t s, auto lanes) {
        const int64_t first = m * N * S + s;
        V most, sums;
        e.column_statistics(x + first, most, sums, lanes);
        const V log_sum = log(sums);
        const V l = e.column_sum(lanes, [&](int64_t n) {
          const V t = fma(V::load(q + first + n * S, lanes), keep_share, even) * V(e.weight(n));
          return t * (log_sum - (V::load(x + first + n * S, lanes) - most));
        });
        l.store(loss + m * S + s, lanes);
        most.store(top + m * S + s, lanes);
        sums.store(total + m * S + s, lanes);
      });
}

template <class scalar_t, class acc_t>
void probabilities_backward(const CrossEntropy<scalar_t>& e, const acc_t* g, const scalar_t* x, const scalar_t* q,
                            const acc_t* top, const acc_t* total, scalar_t* dx, scalar_t* dq, int64_t M) {
  using V = Vec<acc_t>;
  const int64_t N = e.N, S = e.S;
  const V keep_share(acc_t(1) - e.smoothing), even(e.spread());
  // What one vector of classes (S = 1) or of columns contributes.
  const auto step = [&](int64_t at, const V& w, const V& most, const V& sums, const V& log_sum, const V& cotangent,
                        const V& mass, auto lanes) {
    const V centred = V::load(x + at, lanes) - most;
    const V t = fma(V::load(q + at, lanes), keep_share, even) * w;
    (cotangent * (exp_down(centred) / sums * mass - t)).store(dx + at, lanes);
    if (dq != nullptr) (cotangent * keep_share * w * (log_sum - centred)).store(dq + at, lanes);
  };
  each_label<acc_t>(
      M, N, S,
      [&](int64_t m) {
        const V mass(e.row_sum([&](int64_t n, auto lanes) {
          return fma(V::load(q + m * N + n, lanes), keep_share, even) * e.weight(n, lanes);
        }));
        const V most(top[m]), sums(total[m]), log_sum{acc_t(std::log(total[m]))}, cotangent(g[m]);
        each_vector<acc_t>(N, [&](int64_t n, auto lanes) {
          step(m * N + n, e.weight(n, lanes), most, sums, log_sum, cotangent, mass, lanes);
        });
      },
      [&](int64_t m, int64_t s, auto lanes) {
        const int64_t first = m * N * S + s, at = m * S + s;
        const V mass = e.column_sum(lanes, [&](int64_t n) {
          return fma(V::load(q + first + n * S, lanes), keep_share, even) * V(e.weight(n));
        });
        const V most = V::load(top + at, lanes), sums = V::load(total + at, lanes), cotangent = V::load(g + at, lanes);
        const V log_sum = log(sums);
        for (int64_t n = 0; n < N; ++n)
          step(first + n * S, V(e.weight(n)), most, sums, log_sum, cotangent, mass, lanes);
      });
}

// ---- binding

static bool labels_inside(const int64_t* target, int64_t count, int64_t N, int64_t ignore) {
  std::atomic<bool> inside{true};
  parallel_for(count, 32768, [&](int64_t begin, int64_t end) {
    bool every = true;
    for (int64_t i = begin; i < end; ++i) every &= uint64_t(target[i]) < uint64_t(N) || target[i] == ignore;
    if (!every) inside = false;
  });
  return inside;
}

template <class scalar_t>
CrossEntropy<scalar_t> problem(const OpScope& op, int64_t N, int64_t S, const OptionalTensor& weight, double smoothing,
                               double z, bool logits) {
  using acc_t = accumulate_t<scalar_t>;
  const acc_t* w = op.in_optional<acc_t>(weight, "weight", {N});
  acc_t total = w == nullptr ? acc_t(N) : acc_t(0);
  for (int64_t n = 0; w != nullptr && n < N; ++n) total += w[n];
  return {N, S, w, total, acc_t(smoothing), acc_t(z), logits};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy_fwd(const Tensor& x, const Tensor& target,
                                                             const OptionalTensor& weight, int64_t ignore,
                                                             double smoothing, double z, bool logits) {
  OpScope op("cross_entropy_fwd", x);
  op.check(x.dim() == 3, "x must be [M, N, S]");
  const int64_t M = x.size(0), N = x.size(1), S = x.size(2);
  auto* t = op.in<int64_t>(target, "target", {M, S});
  op.check(labels_inside(t, M * S, N, ignore), "argument 'target': got a label out of bounds, expected labels in [0, ",
           N, ") or ignore_index ", ignore);
  return dispatch_floating(op, x.scalar_type(), [&]<class scalar_t>() {
    using acc_t = accumulate_t<scalar_t>;
    Tensor loss = op.empty<acc_t>({M, S}), divisor = op.empty<acc_t>({M, S}), top = op.empty<acc_t>({M, S}),
           total = op.empty<acc_t>({M, S});
    labels_forward(problem<scalar_t>(op, N, S, weight, smoothing, z, logits), op.in<scalar_t>(x, "x", {M, N, S}), t,
                   ignore, op.out<acc_t>(loss, "loss", {M, S}), op.out<acc_t>(divisor, "divisor", {M, S}),
                   op.out<acc_t>(top, "max", {M, S}), op.out<acc_t>(total, "sum", {M, S}), M);
    return std::tuple(loss, divisor, top, total);
  });
}

Tensor cross_entropy_bwd(const Tensor& g, const Tensor& x, const Tensor& target, const OptionalTensor& weight,
                         const Tensor& top, const Tensor& total, int64_t ignore, double smoothing, double z,
                         bool logits) {
  OpScope op("cross_entropy_bwd", g);
  op.check(x.dim() == 3, "x must be [M, N, S]");
  const int64_t M = x.size(0), N = x.size(1), S = x.size(2);
  auto* t = op.in<int64_t>(target, "target", {M, S});
  op.check(labels_inside(t, M * S, N, ignore), "argument 'target': got a label out of bounds, expected labels in [0, ",
           N, ") or ignore_index ", ignore);
  return dispatch_floating(op, x.scalar_type(), [&]<class scalar_t>() {
    using acc_t = accumulate_t<scalar_t>;
    Tensor dx = op.empty<scalar_t>({M, N, S});
    labels_backward(problem<scalar_t>(op, N, S, weight, smoothing, z, logits), op.in<acc_t>(g, "g", {M, S}),
                    op.in<scalar_t>(x, "x", {M, N, S}), t, ignore, op.in<acc_t>(top, "max", {M, S}),
                    op.in<acc_t>(total, "sum", {M, S}), op.out<scalar_t>(dx, "dx", {M, N, S}), M);
    return dx;
  });
}

std::tuple<Tensor, Tensor, Tensor> soft_cross_entropy_fwd(const Tensor& x, const Tensor& q,
                                                          const OptionalTensor& weight, double smoothing) {
  OpScope op("soft_cross_entropy_fwd", x);
  op.check(x.dim() == 3, "x must be [M, N, S]");
  const int64_t M = x.size(0), N = x.size(1), S = x.size(2);
  return dispatch_floating(op, x.scalar_type(), [&]<class scalar_t>() {
    using acc_t = accumulate_t<scalar_t>;
    Tensor loss = op.empty<acc_t>({M, S}), top = op.empty<acc_t>({M, S}), total = op.empty<acc_t>({M, S});
    probabilities_forward(problem<scalar_t>(op, N, S, weight, smoothing, 0, true), op.in<scalar_t>(x, "x", {M, N, S}),
                          op.in<scalar_t>(q, "target", {M, N, S}), op.out<acc_t>(loss, "loss", {M, S}),
                          op.out<acc_t>(top, "max", {M, S}), op.out<acc_t>(total, "sum", {M, S}), M);
    return std::tuple(loss, top, total);
  });
}

std::tuple<Tensor, Tensor> soft_cross_entropy_bwd(const Tensor& g, const Tensor& x, const Tensor& q,
                                                  const OptionalTensor& weight, const Tensor& top, const Tensor& total,
                                                  double smoothing, bool need_dq) {
  OpScope op("soft_cross_entropy_bwd", g);
  op.check(x.dim() == 3, "x must be [M, N, S]");
  const int64_t M = x.size(0), N = x.size(1), S = x.size(2), K = need_dq ? M : 0;
  return dispatch_floating(op, x.scalar_type(), [&]<class scalar_t>() {
    using acc_t = accumulate_t<scalar_t>;
    Tensor dx = op.empty<scalar_t>({M, N, S}), dq = op.empty<scalar_t>({K, N, S});
    auto* pdq = op.out<scalar_t>(dq, "dt", {K, N, S});
    probabilities_backward(problem<scalar_t>(op, N, S, weight, smoothing, 0, true), op.in<acc_t>(g, "g", {M, S}),
                           op.in<scalar_t>(x, "x", {M, N, S}), op.in<scalar_t>(q, "target", {M, N, S}),
                           op.in<acc_t>(top, "max", {M, S}), op.in<acc_t>(total, "sum", {M, S}),
                           op.out<scalar_t>(dx, "dx", {M, N, S}), need_dq ? pdq : nullptr, M);
    return std::tuple(dx, dq);
  });
}

PYOPS_LIBRARY(m) {
  PYOPS_IMPL(m, cross_entropy_fwd);
  PYOPS_IMPL(m, cross_entropy_bwd);
  PYOPS_IMPL(m, soft_cross_entropy_fwd);
  PYOPS_IMPL(m, soft_cross_entropy_bwd);
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY
