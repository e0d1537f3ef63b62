// focal_loss · CPU
//   y = a ce m^gamma,  ce = max(x, 0) - x t + log(1 + e^-|x|),  m = p + t - 2 p t,  p = sigmoid(x)
//   a = alpha t + (1 - alpha)(1 - t), 1 where alpha < 0
//   dx = dy a ((p - t) m^gamma + ce gamma m^(gamma-1) (1 - 2t) p (1 - p))
//   dt = dy ((2 alpha - 1) ce m^gamma + a (-x m^gamma + ce gamma m^(gamma-1) (1 - 2p)))
// layout   x, t, y, dy, dx, dt: [n]
// mapping  threads over runs, lanes over elements
// memory   every input is read once, every output written once
// numerics acc_t
#include "common/registry.h"
#include "cpu/math.h"
#include "cpu/parallel.h"

namespace pyops::PYOPS_CPU_CAPABILITY {

// ---- kernels

template <class acc_t>
struct Focal {
  Vec<acc_t> p, ce, m, power, slope, a;  // slope: gamma m^(gamma - 1)

  PYOPS_INLINE Focal(const Vec<acc_t>& x, const Vec<acc_t>& t, acc_t alpha, acc_t gamma) {
    using V = Vec<acc_t>;
    const V zero(acc_t(0)), one(acc_t(1));
    p = sigmoid(x);
    ce = max(x, zero) - x * t + log1p_unit(exp(-abs(x)));
    m = p + t - V(acc_t(2)) * p * t;
    m = select(m < zero, zero, m);
    if (gamma == acc_t(2)) {
      power = m * m;
      slope = V(acc_t(2)) * m;
    } else if (gamma == acc_t(0)) {
      power = one;
      slope = zero;
    } else {
      const V l = log(m);
      power = exp(V(gamma) * l);
      slope = V(gamma) * (gamma == acc_t(1) ? one : exp(V(gamma - acc_t(1)) * l));
    }
    a = alpha < acc_t(0) ? one : V(alpha) * t + V(acc_t(1) - alpha) * (one - t);
  }
};

template <class scalar_t, class acc_t = accumulate_t<scalar_t>>
void focal_fwd(const scalar_t* __restrict__ x, const scalar_t* __restrict__ t, scalar_t* __restrict__ y, int64_t n,
               acc_t alpha, acc_t gamma) {
  using V = Vec<acc_t>;
  parallel_for(n, 4096, [&](int64_t begin, int64_t end) {
    each_vector<acc_t>(end - begin, [&](int64_t i, auto lanes) {
      const Focal<acc_t> f(V::load(x + begin + i, lanes), V::load(t + begin + i, lanes), alpha, gamma);
      (f.a * f.ce * f.power).store(y + begin + i, lanes);
    });
  });
}

template <class scalar_t, class acc_t = accumulate_t<scalar_t>>
void focal_bwd(const scalar_t* __restrict__ dy, const scalar_t* __restrict__ x, const scalar_t* __restrict__ t,
               scalar_t* __restrict__ dx, scalar_t* __restrict__ dt, int64_t n, acc_t alpha, acc_t gamma) {
  using V = Vec<acc_t>;
  parallel_for(n, 4096, [&](int64_t begin, int64_t end) {
    each_vector<acc_t>(end - begin, [&](int64_t k, auto lanes) {
      const int64_t i = begin + k;
      const V xv = V::load(x + i, lanes), tv = V::load(t + i, lanes), d = V::load(dy + i, lanes);
      const V one(acc_t(1)), two(acc_t(2));
      const Focal<acc_t> f(xv, tv, alpha, gamma);
      const V steep = f.ce * f.slope;
      (d * f.a * ((f.p - tv) * f.power + steep * (one - two * tv) * f.p * (one - f.p))).store(dx + i, lanes);
      if (dt == nullptr) return;
      V g = f.a * (steep * (one - two * f.p) - xv * f.power);
      if (alpha >= acc_t(0)) g += V(acc_t(2) * alpha - acc_t(1)) * f.ce * f.power;
      (d * g).store(dt + i, lanes);
    });
  });
}

// ---- binding

Tensor focal_loss_fwd(const Tensor& x, const Tensor& t, double alpha, double gamma) {
  OpScope op("focal_loss_fwd", x);
  const int64_t n = x.numel();
  return dispatch_floating(op, x.scalar_type(), [&]<class scalar_t>() {
    using acc_t = accumulate_t<scalar_t>;
    Tensor y = op.empty<scalar_t>({n});
    focal_fwd(op.in<scalar_t>(x, "x", {n}), op.in<scalar_t>(t, "t", {n}), op.out<scalar_t>(y, "y", {n}), n,
              acc_t(alpha), acc_t(gamma));
    return y;
  });
}

std::tuple<Tensor, Tensor> focal_loss_bwd(const Tensor& dy, const Tensor& x, const Tensor& t, double alpha,
                                          double gamma, bool need_dt) {
  OpScope op("focal_loss_bwd", dy);
  const int64_t n = x.numel(), k = need_dt ? n : 0;
  return dispatch_floating(op, x.scalar_type(), [&]<class scalar_t>() {
    using acc_t = accumulate_t<scalar_t>;
    Tensor dx = op.empty<scalar_t>({n}), dt = op.empty<scalar_t>({k});
    auto* pdt = op.out<scalar_t>(dt, "dt", {k});
    focal_bwd(op.in<scalar_t>(dy, "dy", {n}), op.in<scalar_t>(x, "x", {n}), op.in<scalar_t>(t, "t", {n}),
              op.out<scalar_t>(dx, "dx", {n}), need_dt ? pdt : nullptr, n, acc_t(alpha), acc_t(gamma));
    return std::make_tuple(dx, dt);
  });
}

PYOPS_LIBRARY(m) {
  PYOPS_IMPL(m, focal_loss_fwd);
  PYOPS_IMPL(m, focal_loss_bwd);
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY
