// local_response_norm · CUDA
//   q[c] = k + alpha/size · sum over window(c) of x²        y = x q^-beta
//   dx[c] = dy q^-beta - 2 alpha beta/size · x[c] · sum over the c' whose window holds c of dy x q^-(beta+1)
// layout   x, y: [N, C, S] or, channels_last, [N, S, C]
// mapping  a thread an element; the gradient in two passes, the first of which writes dy x q^-(beta+1)
// memory   the window from the caches; backward: scratch of one fp32 (fp64) an element
// numerics fp32 (fp64 for fp64); each window is added anew
#include "cuda/grid_stride.cuh"

#include "common/local_response_norm.h"
#include "cuda/math.cuh"

namespace pyops {
namespace {

using namespace local_response_norm;

template <class A>
struct Rule {
  int64_t C, total, step;  // step: distance of channels
  Window window, transposed;
  A beta, k, share;  // share = alpha / size
};

template <class A>
PYOPS_DEVICE int64_t channel_of(const Rule<A>& r, int64_t e) {
  return e / r.step % r.C;
}

// q at element e of channel c
template <class T, class A>
PYOPS_DEVICE A base(const T* x, const Rule<A>& r, int64_t e, int64_t c) {
  A squares = 0;
  for (int64_t j = r.window.first(c); j < r.window.last(c, r.C); ++j) {
    const A v = to_acc(x[e + (j - c) * r.step]);
    squares += v * v;
  }
  return r.k + r.share * squares;
}

template <class T, class A>
__global__ void local_response_norm_fwd_kernel(const T* __restrict__ x, T* __restrict__ y, Rule<A> r) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t e = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; e < r.total; e += stride)
    y[e] = from_acc<T>(to_acc(x[e]) * exp(-r.beta * log(base(x, r, e, channel_of(r, e)))));
}

template <class T, class A>
__global__ void local_response_norm_inner_kernel(const T* __restrict__ dy, const T* __restrict__ x,
                                                 A* __restrict__ inner, Rule<A> r) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t e = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; e < r.total; e += stride) {
    const A q = base(x, r, e, channel_of(r, e));
    inner[e] = to_acc(dy[e]) * to_acc(x[e]) * exp(-r.beta * log(q)) / q;
  }
}

template <class T, class A>
__global__ void local_response_norm_bwd_kernel(const T* __restrict__ dy, const T* __restrict__ x,
                                               const A* __restrict__ inner, T* __restrict__ dx, Rule<A> r) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t e = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; e < r.total; e += stride) {
    const int64_t c = channel_of(r, e);
    A sum = 0;
    for (int64_t j = r.transposed.first(c); j < r.transposed.last(c, r.C); ++j) sum += inner[e + (j - c) * r.step];
    const A own = to_acc(dy[e]) * exp(-r.beta * log(base(x, r, e, c)));
    dx[e] = from_acc<T>(own - 2 * r.share * r.beta * to_acc(x[e]) * sum);
  }
}

}  // namespace
}  // namespace pyops

// binding

#include "common/channels.h"
#include "common/registry.h"

namespace pyops {
namespace {

template <class A>
Rule<A> rule_of(const OpScope& op, const Tensor& x, int64_t size, double alpha, double beta, double k,
                bool channels_last) {
  const ChannelSizes z = channel_sizes(op, x, channels_last);
  op.check(size > 0 && size < (int64_t{1} << 31), "size must be in [1, 2^31), got ", size);
  return {z.C,
          z.N * z.C * z.S,
          channels_last ? 1 : z.S,
          window_of(size),
          transposed_window(size),
          static_cast<A>(beta),
          static_cast<A>(k),
          static_cast<A>(alpha / static_cast<double>(size))};
}

Tensor local_response_norm_fwd(const Tensor& x, int64_t size, double alpha, double beta, double k, bool channels_last) {
  OpScope op("local_response_norm_fwd", x);
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    const auto r = rule_of<accumulate_t<T>>(op, x, size, alpha, beta, k, channels_last);
    Tensor y = op.empty<T>(ShapeRef(x));
    launch(local_response_norm_fwd_kernel<T, accumulate_t<T>>, grid_stride(r.total, op.stream()),
           op.in<T>(x, "x", ShapeRef(x)), op.out<T>(y, "y", ShapeRef(x)), r);
    return y;
  });
}

Tensor local_response_norm_bwd(const Tensor& dy, const Tensor& x, int64_t size, double alpha, double beta, double k,
                               bool channels_last) {
  OpScope op("local_response_norm_bwd", x);
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    using A = accumulate_t<T>;
    const auto r = rule_of<A>(op, x, size, alpha, beta, k, channels_last);
    Tensor dx = op.empty<T>(ShapeRef(x)), scratch = op.empty<A>(ShapeRef(x));
    const T *g = op.in<T>(dy, "dy", ShapeRef(x)), *px = op.in<T>(x, "x", ShapeRef(x));
    A* inner = op.out<A>(scratch, "inner", ShapeRef(x));
    launch(local_response_norm_inner_kernel<T, A>, grid_stride(r.total, op.stream()), g, px, inner, r);
    launch(local_response_norm_bwd_kernel<T, A>, grid_stride(r.total, op.stream()), g, px, static_cast<const A*>(inner),
           op.out<T>(dx, "dx", ShapeRef(x)), r);
    return dx;
  });
}

PYOPS_LIBRARY(m) {
  PYOPS_IMPL(m, local_response_norm_fwd);
  PYOPS_IMPL(m, local_response_norm_bwd);
}

}  // namespace
}  // namespace pyops
