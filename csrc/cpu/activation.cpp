// activation · CPU
//   activation   y = f(x),  dx = dy * f'(x);  f by number, common/activation.h
//   gated        y = a * f(b),  da = dy * f(b),  db = dy * a * f'(b)
//   prelu        y = x > 0 ? x : w[c] * x,  dx = x > 0 ? dy : w[c] * dy,  dw[c] = sum over x <= 0 of dy * x
// layout   activation: N elements of any shape · gated: x [M, 2, N], y [M, N] · prelu: x [N, C, S], w [C]
// mapping  a thread takes blocks of elements (prelu: planes); lanes over neighbouring elements
// memory   every input read once, every output written once
// numerics vector polynomials of cpu/math.h, about one ulp in float and double; half types in float. dw: double sums,
//          planes in order
#include "cpu/activation.h"

#include "common/registry.h"

namespace pyops::PYOPS_CPU_CAPABILITY {

// ---- kernels

using activation::with_activation;

template <class acc_t>
void activation_block(int kind, Parameters p, acc_t* y, const acc_t* x, int64_t n, bool streamed) {
  with_activation(kind, [&]<class F>() {
    compute_block(y, n, streamed, [&](int64_t i, auto lanes) { return F::value(Vec<acc_t>::load(x + i, lanes), p); });
  });
}

template <class acc_t>
void activation_gradient_block(int kind, Parameters p, acc_t* dx, const acc_t* dy, const acc_t* x, int64_t n,
                               bool streamed) {
  using V = Vec<acc_t>;
  with_activation(kind, [&]<class F>() {
    compute_block(dx, n, streamed,
                  [&](int64_t i, auto lanes) { return F::gradient(V::load(dy + i, lanes), V::load(x + i, lanes), p); });
  });
}

template void activation_block(int, Parameters, float*, const float*, int64_t, bool);
template void activation_block(int, Parameters, double*, const double*, int64_t, bool);
template void activation_gradient_block(int, Parameters, float*, const float*, const float*, int64_t, bool);
template void activation_gradient_block(int, Parameters, double*, const double*, const double*, int64_t, bool);

// [M, 2, N] in runs of whole or part rows: f(row, first, count) over blocks of [M, N].
template <class F>
void each_row_block(int64_t M, int64_t N, const F& f) {
  const int64_t blocks = ceil_div(N, elementwise_block), size = N < elementwise_block ? N : elementwise_block;
  parallel_for(M * blocks, ceil_div(elementwise_grain, size > 0 ? size : 1), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t m = k / blocks, i = k % blocks * elementwise_block;
      f(m, i, N - i < elementwise_block ? N - i : elementwise_block);
    }
  });
}

template <class scalar_t>
void gated_forward(int kind, const scalar_t* x, scalar_t* y, int64_t M, int64_t N) {
  using acc_t = accumulate_t<scalar_t>;
  using V = Vec<acc_t>;
  each_row_block(M, N, [&](int64_t m, int64_t i, int64_t n) {
    alignas(64) acc_t gate[elementwise_block];
    const scalar_t *a = x + 2 * m * N + i, *b = a + N;
    scalar_t* out = y + m * N + i;
    activation_block<acc_t>(kind, {}, gate, widened<acc_t>(b, n, gate), n, false);
    each_vector<acc_t>(
        n, [&](int64_t j, auto lanes) { (V::load(a + j, lanes) * V::load(gate + j, lanes)).store(out + j, lanes); });
  });
}

template <class scalar_t>
void gated_backward(int kind, const scalar_t* dy, const scalar_t* x, scalar_t* dx, int64_t M, int64_t N) {
  using acc_t = accumulate_t<scalar_t>;
  using V = Vec<acc_t>;
  each_row_block(M, N, [&](int64_t m, int64_t i, int64_t n) {
    alignas(64) acc_t wide[elementwise_block], gate[elementwise_block], product[elementwise_block];
    const scalar_t *a = x + 2 * m * N + i, *b = a + N, *d = dy + m * N + i;
    scalar_t *da = dx + 2 * m * N + i, *db = da + N;
    const acc_t* pb = widened<acc_t>(b, n, wide);
    activation_block<acc_t>(kind, {}, gate, pb, n, false);
    each_vector<acc_t>(n, [&](int64_t j, auto lanes) {
      const V g = V::load(d + j, lanes);
      (g * V::load(gate + j, lanes)).store(da + j, lanes);
      (g * V::load(a + j, lanes)).store(product + j, lanes);
    });
    activation_gradient_block<acc_t>(kind, {}, gate, product, pb, n, false);
    narrow(db, gate, n);
  });
}

// One slope per channel: planes [N * C] of S, or, where S is 1, rows of C.
template <class scalar_t, class acc_t>
void prelu_forward(const scalar_t* x, const acc_t* w, scalar_t* y, int64_t N, int64_t C, int64_t S) {
  using V = Vec<acc_t>;
  const V zero;
  if (S == 1) {
    parallel_for(N, ceil_div(elementwise_grain, C), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n)
        each_vector<acc_t>(C, [&](int64_t i, auto lanes) {
          const V v = V::load(x + n * C + i, lanes);
          select(v > zero, v, v * V::load(w + i, lanes)).store(y + n * C + i, lanes);
        });
    });
    return;
  }
  parallel_for(N * C, ceil_div(elementwise_grain, S), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const V slope(w[k % C]);
      each_vector<acc_t>(S, [&](int64_t i, auto lanes) {
        const V v = V::load(x + k * S + i, lanes);
        select(v > zero, v, v * slope).store(y + k * S + i, lanes);
      });
    }
  });
}

// Partial sums of dw: [N, C] when S > 1 (one per plane), else [chunks, C].
template <class scalar_t, class acc_t>
void prelu_backward(const scalar_t* dy, const scalar_t* x, const acc_t* w, scalar_t* dx, double* dw, int64_t N,
                    int64_t C, int64_t S) {
  using V = Vec<acc_t>;
  const V zero;
  const int64_t rows = S == 1 ? std::min<int64_t>(N, 64) : N;
  Buffer<double> part(rows * C, 0.0);
  if (S == 1) {
    parallel_for(rows, 1, [&](int64_t begin, int64_t end) {
      Buffer<acc_t> term(C);
      for (int64_t r = begin; r < end; ++r)
        for (int64_t n = r * N / rows; n < (r + 1) * N / rows; ++n) {
          each_vector<acc_t>(C, [&](int64_t i, auto lanes) {
            const V v = V::load(x + n * C + i, lanes), g = V::load(dy + n * C + i, lanes);
            select(v > zero, g, g * V::load(w + i, lanes)).store(dx + n * C + i, lanes);
            select(v > zero, zero, g * v).store(term.get() + i, lanes);
          });
          for (int64_t i = 0; i < C; ++i) part[r * C + i] += double(term[i]);
        }
    });
  } else {
    parallel_for(N * C, ceil_div(elementwise_grain, S), [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const V slope(w[k % C]);
        for (int64_t first = 0; first < S; first += elementwise_block) {
          const int64_t at = k * S + first;
          Totals<acc_t, 1> total;
          accumulate(total, std::min(elementwise_block, S - first), [&](int64_t i, auto lanes, auto& t) {
            const V v = V::load(x + at + i, lanes), g = V::load(dy + at + i, lanes);
            select(v > zero, g, g * slope).store(dx + at + i, lanes);
            t[0] += select(v > zero, zero, g * v);
          });
          part[k] += double(sum(total[0]));
        }
      }
    });
  }
  for (int64_t c = 0; c < C; ++c) {
    double total = 0;
    for (int64_t r = 0; r < rows; ++r) total += part[r * C + c];
    dw[c] = total;
  }
}

// ---- binding

Tensor activation_fwd(const Tensor& x, int64_t kind, double a, double b, double c) {
  OpScope op("activation_fwd", x);
  activation::check_kind(op, kind);
  const int64_t N = x.numel();
  return dispatch_floating(op, x.scalar_type(), [&]<class scalar_t>() {
    using acc_t = accumulate_t<scalar_t>;
    Tensor y = op.empty<scalar_t>(ShapeRef(x));
    elementwise(
        N, op.out<scalar_t>(y, "y", ShapeRef(x)),
        [&](acc_t* to, const acc_t* from, int64_t n, bool streamed) {
          activation_block<acc_t>(int(kind), {a, b, c}, to, from, n, streamed);
        },
        op.in<scalar_t>(x, "x", ShapeRef(x)));
    return y;
  });
}

void activation_inplace(Tensor x, int64_t kind, double a, double b, double c) {
  OpScope op("activation_inplace", x);
  activation::check_kind(op, kind);
  const int64_t N = x.numel();
  dispatch_floating(op, x.scalar_type(), [&]<class scalar_t>() {
    using acc_t = accumulate_t<scalar_t>;
    auto* p = op.out<scalar_t>(x, "x", ShapeRef(x));
    elementwise(
        N, p,
        [&](acc_t* to, const acc_t* from, int64_t n, bool streamed) {
          activation_block<acc_t>(int(kind), {a, b, c}, to, from, n, streamed);
        },
        static_cast<const scalar_t*>(p));
  });
}

Tensor activation_bwd(const Tensor& dy, const Tensor& x, int64_t kind, double a, double b, double c) {
  OpScope op("activation_bwd", dy);
  activation::check_kind(op, kind);
  const int64_t N = x.numel();
  return dispatch_floating(op, x.scalar_type(), [&]<class scalar_t>() {
    using acc_t = accumulate_t<scalar_t>;
    Tensor dx = op.empty<scalar_t>(ShapeRef(x));
    elementwise(
        N, op.out<scalar_t>(dx, "dx", ShapeRef(x)),
        [&](acc_t* to, const acc_t* g, const acc_t* from, int64_t n, bool streamed) {
          activation_gradient_block<acc_t>(int(kind), {a, b, c}, to, g, from, n, streamed);
        },
        op.in<scalar_t>(dy, "dy", ShapeRef(x)), op.in<scalar_t>(x, "x", ShapeRef(x)));
    return dx;
  });
}

Tensor gated_fwd(const Tensor& x, int64_t kind) {
  OpScope op("gated_fwd", x);
  activation::check_kind(op, kind);
  op.check(x.dim() == 3 && x.size(1) == 2, "x must be [M, 2, N]");
  const int64_t M = x.size(0), N = x.size(2);
  return dispatch_floating(op, x.scalar_type(), [&]<class scalar_t>() {
    Tensor y = op.empty<scalar_t>({M, N});
    gated_forward(int(kind), op.in<scalar_t>(x, "x", {M, 2, N}), op.out<scalar_t>(y, "y", {M, N}), M, N);
    return y;
  });
}

Tensor gated_bwd(const Tensor& dy, const Tensor& x, int64_t kind) {
  OpScope op("gated_bwd", dy);
  activation::check_kind(op, kind);
  op.check(x.dim() == 3 && x.size(1) == 2, "x must be [M, 2, N]");
  const int64_t M = x.size(0), N = x.size(2);
  return dispatch_floating(op, x.scalar_type(), [&]<class scalar_t>() {
    Tensor dx = op.empty<scalar_t>({M, 2, N});
    gated_backward(int(kind), op.in<scalar_t>(dy, "dy", {M, N}), op.in<scalar_t>(x, "x", {M, 2, N}),
                   op.out<scalar_t>(dx, "dx", {M, 2, N}), M, N);
    return dx;
  });
}

Tensor prelu_fwd(const Tensor& x, const Tensor& weight) {
  OpScope op("prelu_fwd", x);
  op.check(x.dim() == 3, "x must be [N, C, S]");
  const int64_t N = x.size(0), C = x.size(1), S = x.size(2);
  return dispatch_floating(op, x.scalar_type(), [&]<class scalar_t>() {
    using acc_t = accumulate_t<scalar_t>;
    Tensor y = op.empty<scalar_t>({N, C, S});
    Buffer<acc_t> w(C);
    widen<acc_t>(w.get(), op.in<scalar_t>(weight, "weight", {C}), C, acc_t(0));
    if (x.numel() > 0)
      prelu_forward(op.in<scalar_t>(x, "x", {N, C, S}), w.get(), op.out<scalar_t>(y, "y", {N, C, S}), N, C, S);
    return y;
  });
}

std::tuple<Tensor, Tensor> prelu_bwd(const Tensor& dy, const Tensor& x, const Tensor& weight, bool need_dw) {
  OpScope op("prelu_bwd", dy);
  op.check(x.dim() == 3, "x must be [N, C, S]");
  const int64_t N = x.size(0), C = x.size(1), S = x.size(2);
  return dispatch_floating(op, x.scalar_type(), [&]<class scalar_t>() {
    using acc_t = accumulate_t<scalar_t>;
    Tensor dx = op.empty<scalar_t>({N, C, S}), dw = op.empty<scalar_t>({need_dw ? C : 0});
    Buffer<acc_t> w(C);
    Buffer<double> sums(C, 0.0);
    widen<acc_t>(w.get(), op.in<scalar_t>(weight, "weight", {C}), C, acc_t(0));
    if (x.numel() > 0)
      prelu_backward(op.in<scalar_t>(dy, "dy", {N, C, S}), op.in<scalar_t>(x, "x", {N, C, S}), w.get(),
                     op.out<scalar_t>(dx, "dx", {N, C, S}), sums.get(), N, C, S);
    scalar_t* out = need_dw ? op.out<scalar_t>(dw, "dw", {C}) : nullptr;
    for (int64_t c = 0; need_dw && c < C; ++c) out[c] = scalar_t(acc_t(sums[c]));
    return std::tuple(dx, dw);
  });
}

PYOPS_LIBRARY(m) {
  PYOPS_IMPL(m, activation_fwd);
  PYOPS_IMPL(m, activation_inplace);
  PYOPS_IMPL(m, activation_bwd);
  PYOPS_IMPL(m, gated_fwd);
  PYOPS_IMPL(m, gated_bwd);
  PYOPS_IMPL(m, prelu_fwd);
  PYOPS_IMPL(m, prelu_bwd);
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY
