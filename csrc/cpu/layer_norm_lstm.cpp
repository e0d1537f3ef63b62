// layer_norm_lstm · CPU
//   a = n(x) * gain_x + n(y) * gain_y + bias;  c' = f c + i g,  h' = o tanh(n(c') * gain_c + bias_c);  n: a row with
//   mean 0 and variance 1
// layout   head of common/layer_norm_lstm.h
// mapping  threads over rows, lanes over hidden units
// memory   a row and the parameters are in cache after their first reading; backward computes the gates again
// numerics mean and variance as in moments.h; the rest in fp32 (fp64 for fp64)
#include "common/layer_norm_lstm.h"
#include "common/recurrent.h"
#include "cpu/math.h"
#include "cpu/moments.h"
#include "cpu/norm_rows.h"
#include "cpu/parallel.h"

namespace pyops::PYOPS_CPU_CAPABILITY {

// Rows that are worth a thread's while.
inline int64_t lstm_row_grain(int64_t H) { return ceil_div(int64_t{2048}, std::max<int64_t>(H, 1)); }

// Mean and 1 / deviation, in the type of the sums.
template <class acc_t>
struct RowScale {
  acc_t mean, rstd;
  template <class T>
  static RowScale of(const T* row, int64_t n, double eps) {
    const Moments all = row_moments(row, n);
    return {acc_t(all.mean()), acc_t(reciprocal_std(all.variance(), eps))};
  }
  template <class T, class Lanes>
  PYOPS_INLINE Vec<acc_t> operator()(const T* row, int64_t i, Lanes lanes) const {
    return (Vec<acc_t>::load(row + i, lanes) - Vec<acc_t>(mean)) * Vec<acc_t>(rstd);
  }
};

// A vector of units: the four pre-activations, from normalised rows.
template <class T, class acc_t, class Lanes>
PYOPS_INLINE void load_gates(const NormalisedGates<T>& in, int64_t row, RowScale<acc_t> of_x, RowScale<acc_t> of_y,
                             int64_t i, Lanes lanes, Vec<acc_t> (&a)[4]) {
  using V = Vec<acc_t>;
  const T *x = in.x + row * 4 * in.H, *y = in.y + row * 4 * in.H;
  for (int k = 0; k < 4; ++k) {
    const int64_t at = k * in.H + i;
    a[k] = in.bias != nullptr ? V::load(in.bias + at, lanes) : V();
    a[k] = fma(of_x(x, at, lanes), V::load(in.gain_x + at, lanes), a[k]);
    a[k] = fma(of_y(y, at, lanes), V::load(in.gain_y + at, lanes), a[k]);
  }
}

template <class T>
void normalised_gates_forward(const NormalisedGates<T>& in, double eps, T* next_h, T* next_c,
                              accumulate_t<T>* statistics, void* /* stream */) {
  using acc_t = accumulate_t<T>;
  using V = Vec<acc_t>;
  const int64_t H = in.H;
  parallel_for(in.B, lstm_row_grain(H), [&](int64_t begin, int64_t end) {
    Buffer<acc_t> output_gate(H);
    for (int64_t row = begin; row < end; ++row) {
      const auto of_x = RowScale<acc_t>::of(in.x + row * 4 * H, 4 * H, eps);
      const auto of_y = RowScale<acc_t>::of(in.y + row * 4 * H, 4 * H, eps);
      each_vector<acc_t>(H, [&](int64_t i, auto lanes) {
        V a[4], zero[4], h, s[4], c = V::load(in.c + row * H + i, lanes);
        load_gates(in, row, of_x, of_y, i, lanes, a);
        recurrent::Lstm::forward(a, zero, h, c, s);
        c.store(next_c + row * H + i, lanes);
        s[3].store(output_gate.get() + i, lanes);
      });
      const auto of_c = RowScale<acc_t>::of(next_c + row * H, H, eps);
      each_vector<acc_t>(H, [&](int64_t i, auto lanes) {
        V z = in.bias_c != nullptr ? V::load(in.bias_c + i, lanes) : V();
        z = fma(of_c(next_c + row * H, i, lanes), V::load(in.gain_c + i, lanes), z);
        (V::load(output_gate.get() + i, lanes) * tanh(z)).store(next_h + row * H + i, lanes);
      });
      const acc_t found[] = {of_x.mean, of_x.rstd, of_y.mean, of_y.rstd, of_c.mean, of_c.rstd};
      std::copy(found, found + 6, statistics + row * 6);
    }
  });
}

// The gradient of a row under normalisation: rstd (g - mean(g) - n mean(g n)) from the sums of g and g n.
template <class acc_t>
struct RowGradient {
  acc_t mean_g, mean_gn, rstd;
  RowGradient(const Totals<acc_t, 2>& sums, int64_t n, acc_t rstd_)
      : mean_g(acc_t(double(sum(sums.value[0])) / double(n))),
        mean_gn(acc_t(double(sum(sums.value[1])) / double(n))),
        rstd(rstd_) {}
  PYOPS_INLINE Vec<acc_t> operator()(const Vec<acc_t>& g, const Vec<acc_t>& n) const {
    return Vec<acc_t>(rstd) * (g - Vec<acc_t>(mean_g) - n * Vec<acc_t>(mean_gn));
  }
};

template <class T>
void normalised_gates_backward(const NormalisedGates<T>& in, const NormalisedGateGradients<T>& out,
                               void* /* stream */) {
  using acc_t = accumulate_t<T>;
  using V = Vec<acc_t>;
  const int64_t H = in.H;
  parallel_for(in.B, lstm_row_grain(H), [&](int64_t begin, int64_t end) {
    Buffer<acc_t> gates(4 * H);
    for (int64_t row = begin; row < end; ++row) {
      const acc_t* s = out.statistics + row * 6;
      const RowScale<acc_t> of_x{s[0], s[1]}, of_y{s[2], s[3]}, of_c{s[4], s[5]};
      const T *c = in.c + row * H, *next_c = out.next_c + row * H;
      acc_t *da = out.da + row * 4 * H, *dz = out.dz + row * H;
      const V one(acc_t(1));

      // From h' to z, and the sums that the gradient of c' under its normalisation needs.
      Totals<acc_t, 2> of_cell;
      each_vector<acc_t>(H, [&](int64_t i, auto lanes) {
        V a[4];
        load_gates(in, row, of_x, of_y, i, lanes, a);
        for (int k = 0; k < 4; ++k) (k == 2 ? tanh(a[k]) : sigmoid(a[k])).store(gates.get() + k * H + i, lanes);
        const V n = of_c(next_c, i, lanes), gain = V::load(in.gain_c + i, lanes), o = sigmoid(a[3]);
        const V t = tanh(fma(n, gain, in.bias_c != nullptr ? V::load(in.bias_c + i, lanes) : V()));
        const V dh = out.dh != nullptr ? V::load(out.dh + row * H + i, lanes) : V();
        const V at_z = dh * o * (one - t * t), g = keep(at_z * gain, lanes);
        at_z.store(dz + i, lanes);
        (dh * t * o * (one - o)).store(da + 3 * H + i, lanes);
        of_cell[0] += g;
        of_cell[1] = fma(g, keep(n, lanes), of_cell[1]);
      });
      const RowGradient<acc_t> through_c(of_cell, H, of_c.rstd);

      // From c' to the gates, and the sums for x and y.
      each_vector<acc_t>(H, [&](int64_t i, auto lanes) {
        const V ai = V::load(gates.get() + i, lanes), af = V::load(gates.get() + H + i, lanes);
        const V ag = V::load(gates.get() + 2 * H + i, lanes);
        const V at_z = V::load(dz + i, lanes) * V::load(in.gain_c + i, lanes);
        V total = through_c(at_z, of_c(next_c, i, lanes));
        if (out.dc != nullptr) total += V::load(out.dc + row * H + i, lanes);
        (total * ag * ai * (one - ai)).store(da + i, lanes);
        (total * V::load(c + i, lanes) * af * (one - af)).store(da + H + i, lanes);
        (total * ai * (one - ag * ag)).store(da + 2 * H + i, lanes);
        (total * af).store(out.dstate + row * H + i, lanes);
      });

      const auto through = [&](const T* v, RowScale<acc_t> of_v, const T* gain, T* dv) {
        Totals<acc_t, 2> sums;
        each_vector<acc_t>(4 * H, [&](int64_t i, auto lanes) {
          const V g = V::load(da + i, lanes) * V::load(gain + i, lanes);
          sums[0] += g;
          sums[1] = fma(g, keep(of_v(v, i, lanes), lanes), sums[1]);
        });
        const RowGradient<acc_t> gradient(sums, 4 * H, of_v.rstd);
        each_vector<acc_t>(4 * H, [&](int64_t i, auto lanes) {
          const V g = V::load(da + i, lanes) * V::load(gain + i, lanes);
          gradient(g, of_v(v, i, lanes)).store(dv + i, lanes);
        });
      };
      through(in.x + row * 4 * H, of_x, in.gain_x, out.dx + row * 4 * H);
      through(in.y + row * 4 * H, of_y, in.gain_y, out.dy + row * 4 * H);
    }
  });
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY

#include "common/layer_norm_lstm_binding.h"

PYOPS_LIBRARY(m) {
  using namespace pyops::PYOPS_CPU_CAPABILITY;
  PYOPS_IMPL(m, layer_norm_lstm_gates_fwd);
  PYOPS_IMPL(m, layer_norm_lstm_gates_bwd);
}
