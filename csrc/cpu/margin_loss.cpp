// margin_loss · CPU
//   loss[m] = w_t / N Σ_{n≠t} max(0, d - x_t + x_n)^p,  t = target[m], d the margin, p = 1 or 2
//   dx_n = g w_t / N (p = 1: [z_n > 0], p = 2: 2 max(0, z_n)) for n ≠ t, z_n = d - x_t + x_n;  dx_t = -Σ_{n≠t} dx_n
// layout   x, dx: [M, N] · target, loss, g: [M] · w: [N]
// mapping  a thread takes rows, lanes over n
// memory   x read once; backward reads x, writes dx
// numerics acc_t
#include "common/registry.h"
#include "cpu/math.h"
#include "cpu/parallel.h"

namespace pyops::PYOPS_CPU_CAPABILITY {

// ---- kernels

// max(0, z); 0 for NaN, as torch has it
template <class acc_t>
PYOPS_INLINE Vec<acc_t> hinge(const Vec<acc_t>& z) {
  return select(z > Vec<acc_t>(acc_t(0)), z, Vec<acc_t>(acc_t(0)));
}

template <class scalar_t, class acc_t>
void margin_forward(const scalar_t* x, const int64_t* target, const acc_t* w, acc_t* loss, int64_t M, int64_t N,
                    int64_t p, acc_t margin) {
  using V = Vec<acc_t>;
  parallel_for(M, ceil_div(16384, N + 1), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const scalar_t* row = x + m * N;
      const int64_t t = target[m];
      const V shift(margin - acc_t(row[t]));
      Totals<acc_t, 1> total;
      // The label's own term is left out lane by lane: taking margin^p off the sum would round.
      const auto run = [&](int64_t first, int64_t n) {
        accumulate(total, n, [&](int64_t i, auto lanes, auto& sums) {
          const V z = hinge(V::load(row + first + i, lanes) + shift);
          sums[0] += keep(p == 1 ? z : z * z, lanes);
        });
      };
      run(0, t);
      run(t + 1, N - t - 1);
      loss[m] = sum(total[0]) * (w == nullptr ? acc_t(1) : w[t]) / acc_t(N);
    }
  });
}

template <class scalar_t, class acc_t>
void margin_backward(const acc_t* g, const scalar_t* x, const int64_t* target, const acc_t* w, scalar_t* dx, int64_t M,
                     int64_t N, int64_t p, acc_t margin) {
  using V = Vec<acc_t>;
  parallel_for(M, ceil_div(16384, N + 1), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const scalar_t* row = x + m * N;
      scalar_t* to = dx + m * N;
      const int64_t t = target[m];
      const V shift(margin - acc_t(row[t])), zero;
      const V scale(g[m] * (w == nullptr ? acc_t(1) : w[t]) / acc_t(N));
      Totals<acc_t, 1> total;
      const auto run = [&](int64_t first, int64_t n) {
        accumulate(total, n, [&](int64_t i, auto lanes, auto& sums) {
          const V z = V::load(row + first + i, lanes) + shift;
          const V slope = select(z > zero, p == 1 ? scale : V(acc_t(2)) * z * scale, zero);
          slope.store(to + first + i, lanes);
          sums[0] += keep(slope, lanes);
        });
      };
      run(0, t);
      run(t + 1, N - t - 1);
      to[t] = scalar_t(-sum(total[0]));
    }
  });
}

// ---- binding

static bool inside(const int64_t* target, int64_t M, int64_t N) {
  bool every = true;
  for (int64_t m = 0; m < M; ++m) every &= uint64_t(target[m]) < uint64_t(N);
  return every;
}

Tensor margin_loss_fwd(const Tensor& x, const Tensor& target, const OptionalTensor& weight, int64_t p, double margin) {
  OpScope op("margin_loss_fwd", x);
  op.check(x.dim() == 2, "x must be [M, N]");
  const int64_t M = x.size(0), N = x.size(1);
  auto* t = op.in<int64_t>(target, "target", {M});
  op.check(inside(t, M, N), "argument 'target': got a label out of bounds, expected labels in [0, ", N, ")");
  return dispatch_floating(op, x.scalar_type(), [&]<class scalar_t>() {
    using acc_t = accumulate_t<scalar_t>;
    Tensor loss = op.empty<acc_t>({M});
    margin_forward(op.in<scalar_t>(x, "x", {M, N}), t, op.in_optional<acc_t>(weight, "weight", {N}),
                   op.out<acc_t>(loss, "loss", {M}), M, N, p, acc_t(margin));
    return loss;
  });
}

Tensor margin_loss_bwd(const Tensor& g, const Tensor& x, const Tensor& target, const OptionalTensor& weight, int64_t p,
                       double margin) {
  OpScope op("margin_loss_bwd", g);
  op.check(x.dim() == 2, "x must be [M, N]");
  const int64_t M = x.size(0), N = x.size(1);
  auto* t = op.in<int64_t>(target, "target", {M});
  op.check(inside(t, M, N), "argument 'target': got a label out of bounds, expected labels in [0, ", N, ")");
  return dispatch_floating(op, x.scalar_type(), [&]<class scalar_t>() {
    using acc_t = accumulate_t<scalar_t>;
    Tensor dx = op.empty<scalar_t>({M, N});
    margin_backward(op.in<acc_t>(g, "g", {M}), op.in<scalar_t>(x, "x", {M, N}), t,
                    op.in_optional<acc_t>(weight, "weight", {N}), op.out<scalar_t>(dx, "dx", {M, N}), M, N, p,
                    acc_t(margin));
    return dx;
  });
}

PYOPS_LIBRARY(m) {
  PYOPS_IMPL(m, margin_loss_fwd);
  PYOPS_IMPL(m, margin_loss_bwd);
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY
