// layer_norm_lstm · CPU
//   a = n(x) * gain_x + n(y) * gain_y + bias;  c' = f c + i g,  h' = o tanh(n(c') * gain_c + bias_c);  n: a row with
//   mean 0 and variance 1
// layout   head of common/layer_norm_lstm.h
// mapping  lanes over hidden units; step: threads over rows; layer: head of cpu/recurrent_sequence.h, where few rows
//          leave all but the product of a step to one thread
// memory   a row and the parameters are in cache after their first reading; backward computes the gates again
// numerics mean and variance as in moments.h; the rest in fp32 (fp64 for fp64), in a layer also y and c' between steps
#include "common/layer_norm_lstm.h"
#include "cpu/math.h"
#include "cpu/moments.h"
#include "cpu/norm_rows.h"
#include "cpu/parallel.h"
#include "cpu/recurrent_sequence.h"

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

// The statistics of a row as they are kept.
template <class acc_t>
struct RowScales {
  RowScale<acc_t> x, y, c;
  static RowScales load(const acc_t* s) { return {{s[0], s[1]}, {s[2], s[3]}, {s[4], s[5]}}; }
  void store(acc_t* to) const {
    const acc_t all[] = {x.mean, x.rstd, y.mean, y.rstd, c.mean, c.rstd};
    std::copy(all, all + 6, to);
  }
};

// A vector of units: the four pre-activations, from normalised rows.
template <class T, class Y, class acc_t, class Lanes>
PYOPS_INLINE void load_gates(const NormalisedParameters<T>& p, const T* x, const Y* y, const RowScale<acc_t>& of_x,
                             const RowScale<acc_t>& of_y, int64_t i, Lanes lanes, Vec<acc_t> (&a)[4]) {
  using V = Vec<acc_t>;
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    const int64_t at = k * p.H + i;
    a[k] = p.bias != nullptr ? V::load(p.bias + at, lanes) : V();
    a[k] = fma(of_x(x, at, lanes), V::load(p.gain_x + at, lanes), a[k]);
    a[k] = fma(of_y(y, at, lanes), V::load(p.gain_y + at, lanes), a[k]);
  }
}

// A row: from x, y and c to c', and to h' by put(i, lanes, h'). next_c may be c; `o` [H] is scratch.
template <class T, class Y, class C, class acc_t, class Put>
RowScales<acc_t> row_forward(const NormalisedParameters<T>& p, double eps, const T* x, const Y* y, const C* c,
                             C* next_c, acc_t* o, const Put& put) {
  using V = Vec<acc_t>;
  RowScales<acc_t> of;
  of.x = RowScale<acc_t>::of(x, 4 * p.H, eps);
  of.y = RowScale<acc_t>::of(y, 4 * p.H, eps);
  each_vector<acc_t>(p.H, [&](int64_t i, auto lanes) {
    V a[4];
    load_gates(p, x, y, of.x, of.y, i, lanes, a);
    fma(sigmoid(a[1]), V::load(c + i, lanes), sigmoid(a[0]) * tanh(a[2])).store(next_c + i, lanes);
    sigmoid(a[3]).store(o + i, lanes);
  });
  of.c = RowScale<acc_t>::of(next_c, p.H, eps);
  each_vector<acc_t>(p.H, [&](int64_t i, auto lanes) {
    V z = p.bias_c != nullptr ? V::load(p.bias_c + i, lanes) : V();
    z = fma(of.c(next_c, i, lanes), V::load(p.gain_c + i, lanes), z);
    put(i, lanes, V::load(o + i, lanes) * tanh(z));
  });
  return of;
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

// What the gradient of a row reads: dh, dc are null for zero.
template <class T, class S>
struct RowOfGradients {
  const T *x, *y, *c, *next_c;
  const S *dh, *dc;
};

// A row backwards: writes dc, da [4 H] and dz [H], and gives put(at, lanes, dx, dy) for the elements of x and y; `gates`
// [4 H] is scratch. dc may be in.dc.
template <class T, class S, class C, class acc_t, class Put>
void row_backward(const NormalisedParameters<T>& p, const RowScales<acc_t>& of, const RowOfGradients<T, S>& in, C* dc,
                  acc_t* da, acc_t* dz, acc_t* gates, const Put& put) {
  using V = Vec<acc_t>;
  const int64_t H = p.H;
  const V one(acc_t(1));
  Totals<acc_t, 2> through_c, through_x, through_y;
  const auto gate_gradient = [&](int64_t at, auto lanes, const V& g) {
    g.store(da + at, lanes);
    const V gx = g * V::load(p.gain_x + at, lanes), gy = g * V::load(p.gain_y + at, lanes);
    through_x[0] += gx, through_y[0] += gy;
    through_x[1] = fma(gx, keep(of.x(in.x, at, lanes), lanes), through_x[1]);
    through_y[1] = fma(gy, keep(of.y(in.y, at, lanes), lanes), through_y[1]);
  };

  // From h' to z, and the sums that the gradient of c' under its normalisation needs.
  each_vector<acc_t>(H, [&](int64_t i, auto lanes) {
    V a[4];
    load_gates(p, in.x, in.y, of.x, of.y, i, lanes, a);
#pragma GCC unroll 3
    for (int k = 0; k < 3; ++k) (k == 2 ? tanh(a[k]) : sigmoid(a[k])).store(gates + k * H + i, lanes);
    const V n = of.c(in.next_c, i, lanes), gain = V::load(p.gain_c + i, lanes), o = sigmoid(a[3]);
    const V t = tanh(fma(n, gain, p.bias_c != nullptr ? V::load(p.bias_c + i, lanes) : V()));
    const V dh = in.dh != nullptr ? V::load(in.dh + i, lanes) : V();
    const V at_z = dh * o * (one - t * t), g = keep(at_z * gain, lanes);
    at_z.store(dz + i, lanes);
    through_c[0] += g;
    through_c[1] = fma(g, keep(n, lanes), through_c[1]);
    gate_gradient(3 * H + i, lanes, keep(dh * t * o * (one - o), lanes));
  });

  // From c' to the gates.
  const RowGradient<acc_t> to_c(through_c, H, of.c.rstd);
  each_vector<acc_t>(H, [&](int64_t i, auto lanes) {
    const V ai = V::load(gates + i, lanes), af = V::load(gates + H + i, lanes), ag = V::load(gates + 2 * H + i, lanes);
    V total = to_c(V::load(dz + i, lanes) * V::load(p.gain_c + i, lanes), of.c(in.next_c, i, lanes));
    if (in.dc != nullptr) total += V::load(in.dc + i, lanes);
    total = keep(total, lanes);
    gate_gradient(i, lanes, total * ag * ai * (one - ai));
    gate_gradient(H + i, lanes, total * V::load(in.c + i, lanes) * af * (one - af));
    gate_gradient(2 * H + i, lanes, total * ai * (one - ag * ag));
    (total * af).store(dc + i, lanes);
  });

  const RowGradient<acc_t> to_x(through_x, 4 * H, of.x.rstd), to_y(through_y, 4 * H, of.y.rstd);
  each_vector<acc_t>(4 * H, [&](int64_t i, auto lanes) {
    const V g = V::load(da + i, lanes), nx = of.x(in.x, i, lanes), ny = of.y(in.y, i, lanes);
    put(i, lanes, to_x(g * V::load(p.gain_x + i, lanes), nx), to_y(g * V::load(p.gain_y + i, lanes), ny));
  });
}

template <class T>
void normalised_gates_forward(const NormalisedGates<T>& in, double eps, T* next_h, T* next_c,
                              accumulate_t<T>* statistics, void* /* stream */) {
  using acc_t = accumulate_t<T>;
  const int64_t H = in.H;
  parallel_for(in.B, lstm_row_grain(H), [&](int64_t begin, int64_t end) {
    Buffer<acc_t> o(H);
    for (int64_t row = begin; row < end; ++row)
      row_forward(in, eps, in.x + row * 4 * H, in.y + row * 4 * H, in.c + row * H, next_c + row * H, o.get(),
                  [&](int64_t i, auto lanes, const Vec<acc_t>& h) { h.store(next_h + row * H + i, lanes); })
          .store(statistics + row * 6);
  });
}

template <class T>
void normalised_gates_backward(const NormalisedGates<T>& in, const NormalisedGateGradients<T>& out,
                               void* /* stream */) {
  using acc_t = accumulate_t<T>;
  using V = Vec<acc_t>;
  const int64_t H = in.H;
  parallel_for(in.B, lstm_row_grain(H), [&](int64_t begin, int64_t end) {
    Buffer<acc_t> gates(4 * H);
    for (int64_t row = begin; row < end; ++row) {
      const auto at = [&](const T* p) { return p != nullptr ? p + row * H : nullptr; };
      const RowOfGradients<T, T> of{in.x + row * 4 * H, in.y + row * 4 * H, at(in.c),
                                    at(out.next_c),     at(out.dh),         at(out.dc)};
      T *dx = out.dx + row * 4 * H, *dy = out.dy + row * 4 * H;
      row_backward(in, RowScales<acc_t>::load(out.statistics + row * 6), of, out.dstate + row * H, out.da + row * 4 * H,
                   out.dz + row * H, gates.get(), [&](int64_t i, auto lanes, const V& to_x, const V& to_y) {
                     to_x.store(dx + i, lanes);
                     to_y.store(dy + i, lanes);
                   });
    }
  });
}

// A layer over all steps.

template <class T>
class NormalisedForward {
  using acc_t = accumulate_t<T>;
  using V = Vec<acc_t>;

 public:
  static constexpr bool backwards = false;

  NormalisedForward(const NormalisedSequence<T>& s, int64_t d)
      : s_(s),
        d_(d),
        parameters_(s.parameters.of(d)),
        recurrent_(plain_panels<acc_t>(s.w_hh + d * 4 * s.H * s.H, s.H, 4 * s.H, 1, s.H)),
        states_(s, d, true),
        y_(s.steps.B * 4 * s.H),
        o_(s.steps.B * s.H) {}

  int64_t work() const { return s_.H * 4 * V::width; }
  void begin(const RowRange& rows) { states_.emit(-1, rows); }
  template <class Share>
  void step(int64_t i, const RowRange& rows, const Share& share) {
    share(recurrent_.count(), [&](int64_t first, int64_t last) { product(i, rows, first, last); });
    cells(i, rows);
    states_.emit(i, rows);
  }
  void end(const RowRange&) {}

 private:
  void product(int64_t i, const RowRange& rows, int64_t first, int64_t last) {
    const int64_t H = s_.H, end = std::min(rows.end, s_.steps.count(s_.step(d_, i)));
    multiply_panels(states_.h(i), recurrent_, 4 * H, first, last, rows.begin, end,
                    [&](int64_t row, int64_t unit, auto lanes, const V& value) {
                      value.store(y_.get() + row * 4 * H + unit, lanes);
                    });
  }
  void cells(int64_t i, const RowRange& rows) {
    const int64_t t = s_.step(d_, i), base = s_.steps.first(t), H = s_.H;
    const int64_t end = std::min(rows.end, s_.steps.count(t));
    for (int64_t row = rows.begin; row < end; ++row) {
      const int64_t n = base + row, at = n * s_.D + d_;
      const acc_t* y = y_.get() + row * 4 * H;
      acc_t* c = states_.c(row);
      const auto of =
          row_forward(parameters_, s_.eps, s_.gates + at * 4 * H, y, c, c, o_.get() + row * H,
                      [&](int64_t unit, auto lanes, const V& h) { states_.put(i, row, n, unit, lanes, h); });
      if (s_.statistics == nullptr) continue;
      narrow(s_.saved + at * 4 * H, y, 4 * H);
      narrow(s_.cells + at * H, c, H);
      of.store(s_.statistics + at * 6);
    }
  }

  const NormalisedSequence<T>& s_;
  int64_t d_;
  NormalisedParameters<T> parameters_;
  Panels<acc_t, 4> recurrent_;
  SequenceStates<T> states_;
  Buffer<acc_t> y_, o_;
};

// What the gradients of gains and biases are sums of: da [N, D, 4 H], dz [N, D, H].
template <class T>
struct NormalisedWork : NormalisedSequence<T> {
  accumulate_t<T>*da, *dz;
};

template <class T>
class NormalisedBackward {
  using acc_t = accumulate_t<T>;
  using V = Vec<acc_t>;

 public:
  static constexpr bool backwards = true;

  NormalisedBackward(const NormalisedWork<T>& s, int64_t d)
      : s_(s),
        d_(d),
        parameters_(s.parameters.of(d)),
        recurrent_(plain_panels<acc_t>(s.w_hh + d * 4 * s.H * s.H, 4 * s.H, s.H, s.H, 1)),
        gradients_(s, d, true),
        to_y_(s.steps.B * 4 * s.H),
        gates_(s.steps.B * 4 * s.H) {}

  int64_t work() const { return s_.H * 16 * V::width; }
  void begin(const RowRange&) {}
  template <class Share>
  void step(int64_t i, const RowRange& rows, const Share& share) {
    gradients_.receive(i, rows);
    cells(i, rows);
    share(recurrent_.count(), [&](int64_t first, int64_t last) {
      gradients_.template send<false>(i, to_y_.get(), recurrent_, rows, first, last);
    });
  }
  void end(const RowRange& rows) { gradients_.emit(rows); }

 private:
  void cells(int64_t i, const RowRange& rows) {
    const int64_t t = s_.step(d_, i), base = s_.steps.first(t), H = s_.H, D = s_.D;
    const int64_t end = std::min(rows.end, s_.steps.count(t));
    for (int64_t row = rows.begin; row < end; ++row) {
      const int64_t at = (base + row) * D + d_, earlier = s_.row_at(s_.before(d_, t), row);
      const T* c = earlier >= 0 ? s_.cells + (earlier * D + d_) * H : s_.c0 + (d_ * s_.steps.B + row) * H;
      const RowOfGradients<T, acc_t> of{s_.gates + at * 4 * H, s_.saved + at * 4 * H, c,
                                        s_.cells + at * H,     gradients_.h(row),     gradients_.c(row)};
      T *dx = s_.dgates + at * 4 * H, *dy = s_.dh_gates + at * 4 * H;
      acc_t* to_send = to_y_.get() + row * 4 * H;
      row_backward(parameters_, RowScales<acc_t>::load(s_.statistics + at * 6), of, gradients_.c(row),
                   s_.da + at * 4 * H, s_.dz + at * H, gates_.get() + row * 4 * H,
                   [&](int64_t k, auto lanes, const V& to_x, const V& to_y) {
                     to_x.store(dx + k, lanes);
                     to_y.store(dy + k, lanes);
                     to_y.store(to_send + k, lanes);
                   });
    }
  }

  const NormalisedWork<T>& s_;
  int64_t d_;
  NormalisedParameters<T> parameters_;
  Panels<acc_t, 4> recurrent_;
  SequenceGradients<T> gradients_;
  Buffer<acc_t> to_y_, gates_;
};

// to[k][column] = the sum over n < N of term k of row(n)(column, lanes, terms); nothing where to[k] is null. A thread has
// its columns alone and takes rows in order, so that the number of threads changes nothing; rounding grows with the root
// of a block of rows.
template <int terms, class T, class Row>
void sums_of_columns(int64_t N, int64_t columns, T* const (&to)[terms], const Row& row) {
  using acc_t = accumulate_t<T>;
  using V = Vec<acc_t>;
  constexpr int64_t width = 64, block = 256;
  const auto add = [](acc_t* sum, auto lanes, const V& value) { (V::load(sum, lanes) + value).store(sum, lanes); };
  parallel_for(
      ceil_div(columns, width), ceil_div(int64_t{512}, std::max<int64_t>(N, 1)), [&](int64_t begin, int64_t end) {
        for (int64_t first = begin * width; first < std::min(columns, end * width); first += width) {
          const int64_t count = std::min(width, columns - first);
          alignas(64) acc_t total[terms][width] = {};
          for (int64_t n0 = 0; n0 < N; n0 += block) {
            alignas(64) acc_t part[terms][width] = {};
            for (int64_t n = n0; n < std::min(N, n0 + block); ++n) {
              const auto of_row = row(n);
              each_vector<acc_t>(count, [&](int64_t i, auto lanes) {
                V term[terms];
                of_row(first + i, lanes, term);
                for (int k = 0; k < terms; ++k) add(part[k] + i, lanes, term[k]);
              });
            }
            for (int k = 0; k < terms; ++k)
              each_vector<acc_t>(count,
                                 [&](int64_t i, auto lanes) { add(total[k] + i, lanes, V::load(part[k] + i, lanes)); });
          }
          for (int k = 0; k < terms; ++k)
            if (to[k] != nullptr) narrow(to[k] + first, total[k], count);
        }
      });
}

template <class T>
void parameter_gradients(const NormalisedWork<T>& s, int64_t d) {
  using acc_t = accumulate_t<T>;
  using V = Vec<acc_t>;
  const int64_t H = s.H;
  const auto of_direction = [&](T* p, int64_t columns) { return p != nullptr ? p + d * columns : nullptr; };
  T* const of_gates[] = {of_direction(s.dgain_x, 4 * H), of_direction(s.dgain_y, 4 * H), of_direction(s.dbias, 4 * H)};
  sums_of_columns(s.steps.N, 4 * H, of_gates, [&](int64_t n) {
    const int64_t at = n * s.D + d;
    return [of = RowScales<acc_t>::load(s.statistics + at * 6), x = s.gates + at * 4 * H, y = s.saved + at * 4 * H,
            da = s.da + at * 4 * H](int64_t i, auto lanes, V(&term)[3]) {
      const V g = V::load(da + i, lanes);
      term[0] = g * of.x(x, i, lanes), term[1] = g * of.y(y, i, lanes), term[2] = g;
    };
  });
  T* const of_cells[] = {of_direction(s.dgain_c, H), of_direction(s.dbias_c, H)};
  sums_of_columns(s.steps.N, H, of_cells, [&](int64_t n) {
    const int64_t at = n * s.D + d;
    return [of = RowScales<acc_t>::load(s.statistics + at * 6), c = s.cells + at * H, dz = s.dz + at * H](
               int64_t i, auto lanes, V(&term)[2]) {
      const V g = V::load(dz + i, lanes);
      term[0] = g * of.c(c, i, lanes), term[1] = g;
    };
  });
}

template <class T>
void normalised_layer_forward(const OpScope&, const NormalisedSequence<T>& s) {
  if (s.steps.B > 0) through_steps(s.steps.T, s.steps.B, runs_of<NormalisedForward<T>>(s));
}

template <class T>
void normalised_layer_backward(const OpScope&, const NormalisedSequence<T>& s) {
  const int64_t rows = s.steps.N * s.D;
  Buffer<accumulate_t<T>> da(rows * 4 * s.H), dz(rows * s.H);
  const NormalisedWork<T> work{s, da.get(), dz.get()};
  if (s.steps.B > 0) through_steps(s.steps.T, s.steps.B, runs_of<NormalisedBackward<T>>(work));
  for (int64_t d = 0; d < s.D; ++d) parameter_gradients(work, d);
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY

#include "common/layer_norm_lstm_binding.h"

PYOPS_LIBRARY(m) {
  using namespace pyops::PYOPS_CPU_CAPABILITY;
  PYOPS_IMPL(m, layer_norm_lstm_gates_fwd);
  PYOPS_IMPL(m, layer_norm_lstm_gates_bwd);
  PYOPS_IMPL(m, layer_norm_lstm_layer_fwd);
  PYOPS_IMPL(m, layer_norm_lstm_layer_bwd);
}
