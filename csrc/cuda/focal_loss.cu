// focal_loss · CUDA
//   y = a ce m^gamma,  ce = max(x, 0) - x t + log(1 + e^-|x|),  m = p + t - 2 p t,  p = sigmoid(x)
//   a = alpha t + (1 - alpha)(1 - t), 1 where alpha < 0; the gradients stand in docs/math/detection.md
// layout   x, t, y, dy, dx, dt: [n]
// mapping  a thread per element
// memory   every input is read once, every output written once
// numerics A
#include "cuda/device.cuh"

namespace pyops {
namespace {

template <class A>
struct Focal {
  A p, ce, power, slope, a;  // slope: gamma m^(gamma - 1)
  PYOPS_DEVICE Focal(A x, A t, A alpha, A gamma) {
    const A e = exp(-fabs(x));
    p = x >= A(0) ? A(1) / (A(1) + e) : e / (A(1) + e);
    ce = (x > A(0) || x != x ? x : A(0)) - x * t + log1p(e);
    A m = p + t - A(2) * p * t;
    m = m < A(0) ? A(0) : m;
    power = gamma == A(2) ? m * m : (gamma == A(0) ? A(1) : pow(m, gamma));
    slope = gamma == A(2) ? A(2) * m : (gamma == A(0) ? A(0) : gamma * pow(m, gamma - A(1)));
    a = alpha < A(0) ? A(1) : alpha * t + (A(1) - alpha) * (A(1) - t);
  }
};

template <class T>
__global__ void __launch_bounds__(256)
    focal_loss_fwd_kernel(const T* __restrict__ x, const T* __restrict__ t, T* __restrict__ y, int64_t n,
                          accumulate_t<T> alpha, accumulate_t<T> gamma) {
  using A = accumulate_t<T>;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= n) return;
  const Focal<A> f(to_acc(x[i]), to_acc(t[i]), alpha, gamma);
  y[i] = from_acc<T>(f.a * f.ce * f.power);
}

template <class T>
__global__ void __launch_bounds__(256)
    focal_loss_bwd_kernel(const T* __restrict__ dy, const T* __restrict__ x, const T* __restrict__ t,
                          T* __restrict__ dx, T* __restrict__ dt, int64_t n, accumulate_t<T> alpha,
                          accumulate_t<T> gamma) {
  using A = accumulate_t<T>;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= n) return;
  const A xv = to_acc(x[i]), tv = to_acc(t[i]), d = to_acc(dy[i]);
  const Focal<A> f(xv, tv, alpha, gamma);
  const A steep = f.ce * f.slope;
  dx[i] = from_acc<T>(d * f.a * ((f.p - tv) * f.power + steep * (A(1) - A(2) * tv) * f.p * (A(1) - f.p)));
  if (dt == nullptr) return;
  A g = f.a * (steep * (A(1) - A(2) * f.p) - xv * f.power);
  if (alpha >= A(0)) g += (A(2) * alpha - A(1)) * f.ce * f.power;
  dt[i] = from_acc<T>(d * g);
}

}  // namespace
}  // namespace pyops

// binding

#include "common/registry.h"

namespace pyops {
namespace {

dim3 grid_for(int64_t n) { return dim3(static_cast<unsigned>(ceil_div(n, 256))); }

Tensor focal_loss_fwd(const Tensor& x, const Tensor& t, double alpha, double gamma) {
  OpScope op("focal_loss_fwd", x);
  const int64_t n = x.numel();
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    using A = accumulate_t<T>;
    Tensor y = op.empty<T>({n});
    launch(focal_loss_fwd_kernel<T>,
           {.grid = grid_for(n), .block = dim3(256), .stream = static_cast<cudaStream_t>(op.stream())},
           op.in<T>(x, "x", {n}), op.in<T>(t, "t", {n}), op.out<T>(y, "y", {n}), n, static_cast<A>(alpha),
           static_cast<A>(gamma));
    return y;
  });
}

std::tuple<Tensor, Tensor> focal_loss_bwd(const Tensor& dy, const Tensor& x, const Tensor& t, double alpha,
                                          double gamma, bool need_dt) {
  OpScope op("focal_loss_bwd", dy);
  const int64_t n = x.numel(), k = need_dt ? n : 0;
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    using A = accumulate_t<T>;
    Tensor dx = op.empty<T>({n}), dt = op.empty<T>({k});
    T* pdt = op.out<T>(dt, "dt", {k});
    launch(focal_loss_bwd_kernel<T>,
           {.grid = grid_for(n), .block = dim3(256), .stream = static_cast<cudaStream_t>(op.stream())},
           op.in<T>(dy, "dy", {n}), op.in<T>(x, "x", {n}), op.in<T>(t, "t", {n}), op.out<T>(dx, "dx", {n}),
           need_dt ? pdt : static_cast<T*>(nullptr), n, static_cast<A>(alpha), static_cast<A>(gamma));
    return std::make_tuple(dx, dt);
  });
}

}  // namespace
}  // namespace pyops

PYOPS_LIBRARY(m) {
  using namespace pyops;
  PYOPS_IMPL(m, focal_loss_fwd);
  PYOPS_IMPL(m, focal_loss_bwd);
}
