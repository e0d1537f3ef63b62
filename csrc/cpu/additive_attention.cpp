// additive_attention · CPU
//   score[l,s] = v . tanh(q[l] + k[s]) + mask[l,s]     p = softmax over s     y[l] = sum_s p[l,s] value[s]
//   ds = p (dy . value - delta),  dq[l] = sum_s ds v (1 - tanh²),  dk[s] = sum_l of the same,  dv = sum ds tanh
//   delta = sum_s p dy . value = dy . y but for the rounding of y, which is taken back afterwards: ds sums to 0
// layout   head of common/additive_attention_binding.h
// mapping  threads over the rows (n, l), lanes over D and E; the gradients of k and value: threads over (n, s)
// memory   never L x S x D: a row of S scores for each thread; backward: p and ds, L x S each
// numerics fp32 (fp64 for fp64); backward computes each tanh again, once for each of its two passes
#include <limits>

#include "common/additive_attention.h"
#include "cpu/math.h"
#include "cpu/parallel.h"

namespace pyops::PYOPS_CPU_CAPABILITY {

// Rows that are worth a thread's while, at `elements` tanh each.
inline int64_t additive_grain(int64_t elements) { return ceil_div(int64_t{4096}, std::max<int64_t>(elements, 1)); }

// v . tanh(q + k); each tanh goes to t, where that is given.
template <class T, class acc_t>
acc_t additive_score(const T* q, const T* k, const T* v, int64_t D, acc_t* t) {
  using V = Vec<acc_t>;
  V total;
  each_vector<acc_t>(D, [&](int64_t i, auto lanes) {
    const V x = tanh(V::load(q + i, lanes) + V::load(k + i, lanes));
    if (t != nullptr) x.store(t + i, lanes);
    total = fma(x, V::load(v + i, lanes), total);
  });
  return sum(total);
}

template <class T, class acc_t>
void add_scaled(acc_t* to, acc_t scale, const T* x, int64_t n) {
  using V = Vec<acc_t>;
  each_vector<acc_t>(n, [&](int64_t i, auto lanes) {
    fma(V(scale), V::load(x + i, lanes), V::load(to + i, lanes)).store(to + i, lanes);
  });
}

template <class T, class acc_t>
acc_t dot(const T* a, const T* b, int64_t n) {
  using V = Vec<acc_t>;
  V total;
  each_vector<acc_t>(n,
                     [&](int64_t i, auto lanes) { total = fma(V::load(a + i, lanes), V::load(b + i, lanes), total); });
  return sum(total);
}

template <class T>
void additive_attention_forward(const AdditiveAttention<T>& a, accumulate_t<T>* /* scores */, T* y,
                                accumulate_t<T>* lse, void* /* stream */) {
  using acc_t = accumulate_t<T>;
  using V = Vec<acc_t>;
  constexpr acc_t infinity = std::numeric_limits<acc_t>::infinity();
  parallel_for(a.N * a.L, additive_grain(a.S * a.D), [&](int64_t begin, int64_t end) {
    Buffer<acc_t> p(a.S), sum_row(a.E);
    for (int64_t row = begin; row < end; ++row) {
      const T *q = a.q + row * a.D, *k = a.k + row / a.L * a.S * a.D;
      const acc_t* mask = a.mask_row(row);
      acc_t most = -infinity;
      for (int64_t s = 0; s < a.S; ++s) {
        p[s] = additive_score<T, acc_t>(q, k + s * a.D, a.v, a.D, nullptr);
        if (mask != nullptr) p[s] += mask[s];
        most = p[s] > most || p[s] != p[s] ? p[s] : most;
      }
      acc_t total = 0;
      std::fill(sum_row.get(), sum_row.get() + a.E, acc_t(0));
      for (int64_t s = 0; most != -infinity && s < a.S; ++s) {
        p[s] = std::exp(p[s] - most);
        total += p[s];
        add_scaled(sum_row.get(), p[s], a.value + (row / a.L * a.S + s) * a.E, a.E);
      }
      lse[row] = most == -infinity ? infinity : most + std::log(total);
      const V scale(most == -infinity ? acc_t(0) : acc_t(1) / total);
      each_vector<acc_t>(a.E, [&](int64_t i, auto lanes) {
        (V::load(sum_row.get() + i, lanes) * scale).store(y + row * a.E + i, lanes);
      });
    }
  });
}

template <class T>
void additive_attention_backward(const AdditiveAttention<T>& a, const AdditiveAttentionGradients<T>& g,
                                 void* /* stream */) {
  using acc_t = accumulate_t<T>;
  using V = Vec<acc_t>;
  const V one(acc_t(1));
  parallel_for(a.N * a.L, additive_grain(a.S * a.D), [&](int64_t begin, int64_t end) {
    Buffer<acc_t> t(a.D), dq(a.D), dq_p(a.D), dv_p(a.D);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t first = row / a.L * a.S;
      const T *q = a.q + row * a.D, *dy = g.dy + row * a.E;
      const acc_t* mask = a.mask_row(row);
      const acc_t delta = dot<T, acc_t>(dy, g.y + row * a.E, a.E);
      acc_t *dv = g.dv + row * a.D, *p_row = g.p + row * a.S, *ds_row = g.ds + row * a.S, rest = 0;
      for (acc_t* sums : {dq.get(), dq_p.get(), dv, dv_p.get()}) std::fill(sums, sums + a.D, acc_t(0));
      for (int64_t s = 0; s < a.S; ++s) {
        acc_t score = additive_score<T, acc_t>(q, a.k + (first + s) * a.D, a.v, a.D, t.get());
        if (mask != nullptr) score += mask[s];
        const acc_t p = std::exp(score - g.lse[row]);
        const acc_t ds = p * (dot<T, acc_t>(dy, a.value + (first + s) * a.E, a.E) - delta);
        p_row[s] = p, ds_row[s] = ds, rest += ds;
        each_vector<acc_t>(a.D, [&](int64_t i, auto lanes) {
          const V x = V::load(t.get() + i, lanes), slope = one - x * x;
          fma(V(ds), x, V::load(dv + i, lanes)).store(dv + i, lanes);
          fma(V(p), x, V::load(dv_p.get() + i, lanes)).store(dv_p.get() + i, lanes);
          fma(V(ds), slope, V::load(dq.get() + i, lanes)).store(dq.get() + i, lanes);
          fma(V(p), slope, V::load(dq_p.get() + i, lanes)).store(dq_p.get() + i, lanes);
        });
      }
      for (int64_t s = 0; s < a.S; ++s) ds_row[s] -= rest * p_row[s];
      const V back(-rest);
      each_vector<acc_t>(a.D, [&](int64_t i, auto lanes) {
        fma(back, V::load(dv_p.get() + i, lanes), V::load(dv + i, lanes)).store(dv + i, lanes);
        const V sum = fma(back, V::load(dq_p.get() + i, lanes), V::load(dq.get() + i, lanes));
        (sum * V::load(a.v + i, lanes)).store(g.dq + row * a.D + i, lanes);
      });
    }
  });
  parallel_for(a.N * a.S, additive_grain(a.L * a.D), [&](int64_t begin, int64_t end) {
    Buffer<acc_t> dk(a.D), dvalue(a.E);
    for (int64_t at = begin; at < end; ++at) {
      const int64_t n = at / a.S, s = at % a.S;
      std::fill(dk.get(), dk.get() + a.D, acc_t(0));
      std::fill(dvalue.get(), dvalue.get() + a.E, acc_t(0));
      for (int64_t row = n * a.L; row < (n + 1) * a.L; ++row) {
        const acc_t ds = g.ds[row * a.S + s];
        add_scaled(dvalue.get(), g.p[row * a.S + s], g.dy + row * a.E, a.E);
        each_vector<acc_t>(a.D, [&](int64_t i, auto lanes) {
          const V x = tanh(V::load(a.q + row * a.D + i, lanes) + V::load(a.k + at * a.D + i, lanes));
          fma(V(ds), one - x * x, V::load(dk.get() + i, lanes)).store(dk.get() + i, lanes);
        });
      }
      each_vector<acc_t>(a.D, [&](int64_t i, auto lanes) {
        (V::load(dk.get() + i, lanes) * V::load(a.v + i, lanes)).store(g.dk + at * a.D + i, lanes);
      });
      each_vector<acc_t>(
          a.E, [&](int64_t i, auto lanes) { V::load(dvalue.get() + i, lanes).store(g.dvalue + at * a.E + i, lanes); });
    }
  });
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY

#include "common/additive_attention_binding.h"

PYOPS_LIBRARY(m) {
  using namespace pyops::PYOPS_CPU_CAPABILITY;
  PYOPS_IMPL(m, additive_attention_fwd);
  PYOPS_IMPL(m, additive_attention_bwd);
}
