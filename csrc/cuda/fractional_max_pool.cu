// fractional_max_pool · CUDA
//   y[o] = max over the window of x at start(o), start random per plane;  dx[i] = Σ dy[o] over the o whose maximum is i
// layout   x: [P, D, H, W], y, index: [P, OD, OH, OW] · samples: [P, 3]
// mapping  a thread per element of the result, neighbours in memory side by side; backward gathers: no atomics
// memory   x read once from DRAM, its overlaps from L1; y and index written once
// numerics in fp32 (fp64 for fp64); the first maximum wins, NaN wins always; backward adds in the order of the outputs

#include "cuda/grid_stride.cuh"

#include "common/fractional_max_pool.h"

namespace pyops {
namespace {

using fractional_max_pool::Shape;

template <class T>
__global__ void fractional_max_pool_kernel(const T* x, const T* samples, T* y, int64_t* index, int64_t total, Shape s) {
  using A = accumulate_t<T>;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < total; i += stride) {
    const int64_t ow = i % s.w.out, oh = i / s.w.out % s.h.out, od = i / (s.w.out * s.h.out) % s.d.out;
    const int64_t p = i / s.outputs();
    const int64_t z0 = s.d.start(od, to_acc(samples[3 * p])), r0 = s.h.start(oh, to_acc(samples[3 * p + 1])),
                  c0 = s.w.start(ow, to_acc(samples[3 * p + 2]));
    const T* plane = x + p * s.inputs();
    A best = -A(INFINITY);
    int64_t at = (z0 * s.h.in + r0) * s.w.in + c0;
    for (int64_t z = z0; z < z0 + s.d.kernel; ++z)
      for (int64_t r = r0; r < r0 + s.h.kernel; ++r)
        for (int64_t c = c0; c < c0 + s.w.kernel; ++c) {
          const int64_t position = (z * s.h.in + r) * s.w.in + c;
          const A v = to_acc(plane[position]);
          if (v > best || v != v) {
            best = v;
            at = position;
          }
        }
    y[i] = from_acc<T>(best);
    index[i] = at;
  }
}

template <class T>
__global__ void fractional_max_pool_bwd_kernel(const T* dy, const int64_t* index, T* dx, int64_t total, Shape s) {
  using A = accumulate_t<T>;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < total; i += stride) {
    const int64_t c = i % s.w.in, r = i / s.w.in % s.h.in, z = i / (s.w.in * s.h.in) % s.d.in, p = i / s.inputs();
    const int64_t position = i % s.inputs();
    A sum = 0;
    for (int64_t od = s.d.first_output(z); od <= s.d.last_output(z); ++od)
      for (int64_t oh = s.h.first_output(r); oh <= s.h.last_output(r); ++oh)
        for (int64_t ow = s.w.first_output(c); ow <= s.w.last_output(c); ++ow) {
          const int64_t o = ((p * s.d.out + od) * s.h.out + oh) * s.w.out + ow;
          if (index[o] == position) sum += to_acc(dy[o]);
        }
    dx[i] = from_acc<T>(sum);
  }
}

}  // namespace
}  // namespace pyops

// binding

#include "common/fractional_max_pool_binding.h"
#include "common/registry.h"

namespace pyops {
namespace {

std::tuple<Tensor, Tensor> fractional_max_pool_fwd(const Tensor& x, const Tensor& samples,
                                                   std::vector<int64_t> window) {
  OpScope op("fractional_max_pool_fwd", x);
  op.check(x.dim() == 4, "x must be [P, D, H, W]");
  const Shape s = fractional_max_pool::shape_of(op, {x.size(0), x.size(1), x.size(2), x.size(3)}, window);
  const std::initializer_list<int64_t> in = {s.P, s.d.in, s.h.in, s.w.in}, out = {s.P, s.d.out, s.h.out, s.w.out};
  const int64_t total = s.P * s.outputs();
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    Tensor y = op.empty<T>(out), index = op.empty<int64_t>(out);
    launch(fractional_max_pool_kernel<T>, grid_stride(total, op.stream(), 32), op.in<T>(x, "x", in),
           op.in<T>(samples, "samples", {s.P, 3}), op.out<T>(y, "y", out), op.out<int64_t>(index, "index", out), total,
           s);
    return std::make_tuple(y, index);
  });
}

Tensor fractional_max_pool_bwd(const Tensor& dy, const Tensor& index, std::vector<int64_t> size,
                               std::vector<int64_t> window) {
  OpScope op("fractional_max_pool_bwd", dy);
  const Shape s = fractional_max_pool::shape_of(op, size, window);
  const std::initializer_list<int64_t> in = {s.P, s.d.in, s.h.in, s.w.in}, out = {s.P, s.d.out, s.h.out, s.w.out};
  const int64_t total = s.P * s.inputs();
  return dispatch_floating(op, dy.scalar_type(), [&]<class T>() {
    Tensor dx = op.empty<T>(in);
    launch(fractional_max_pool_bwd_kernel<T>, grid_stride(total, op.stream(), 32), op.in<T>(dy, "dy", out),
           op.in<int64_t>(index, "index", out), op.out<T>(dx, "dx", in), total, s);
    return dx;
  });
}

}  // namespace
}  // namespace pyops

PYOPS_LIBRARY(m) {
  using namespace pyops;
  PYOPS_IMPL(m, fractional_max_pool_fwd);
  PYOPS_IMPL(m, fractional_max_pool_bwd);
}
