// pad · CUDA
//   y[n,o0,o1,o2,k] = x[n,i0,i1,i2,k],  i = source(o) axis by axis, or the constant;  dx sums dy over the o of each i
// layout   x: [N, A0, A1, A2, K] · y: [N, B0, B1, B2, K], row-major
// mapping  a warp takes a row (n, o0, o1) of y, or (n, i0, i1) of dx, its lanes the elements: one division a row where
//          K is 1
// memory   x read once, y written once
// numerics dx in fp32 (fp64 for fp64), in a fixed order
#include "cuda/device.cuh"

#include "common/pad.h"
#include "common/pad_binding.h"

namespace pyops {
namespace {

using namespace pad;

constexpr int warps_a_block = 8;

template <class T>
__global__ void pad_fwd_kernel(const T* __restrict__ x, T* __restrict__ y, Shape s, int64_t mode, T value) {
  const Axis &a0 = s.axis[0], &a1 = s.axis[1], &a2 = s.axis[2];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * warps_a_block + threadIdx.y;
  if (row >= s.N * a0.out * a1.out) return;
  const int64_t i1 = source(mode, a1, row % a1.out), plane = row / a1.out;
  const int64_t i0 = source(mode, a0, plane % a0.out), n = plane / a0.out;
  const T* from = x + ((n * a0.in + i0) * a1.in + i1) * a2.in * s.K;
  T* to = y + row * a2.out * s.K;
  for (int64_t j = threadIdx.x; j < a2.out * s.K; j += 32) {
    const int64_t o = s.K == 1 ? j : j / s.K, i = source(mode, a2, o);
    to[j] = i0 < 0 || i1 < 0 || i < 0 ? value : from[i * s.K + (j - o * s.K)];
  }
}

template <class T>
__global__ void pad_bwd_kernel(const T* __restrict__ dy, T* __restrict__ dx, Shape s, int64_t mode) {
  using A = accumulate_t<T>;
  const Axis &a0 = s.axis[0], &a1 = s.axis[1], &a2 = s.axis[2];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * warps_a_block + threadIdx.y;
  if (row >= s.N * a0.in * a1.in) return;
  const int64_t i1 = row % a1.in, plane = row / a1.in, i0 = plane % a0.in, n = plane / a0.in;
  for (int64_t j = threadIdx.x; j < a2.in * s.K; j += 32) {
    const int64_t i2 = s.K == 1 ? j : j / s.K, k = j - i2 * s.K;
    A sum = 0;
    each_target(mode, a0, i0, [&](int64_t o0) {
      each_target(mode, a1, i1, [&](int64_t o1) {
        const T* from = dy + ((n * a0.out + o0) * a1.out + o1) * a2.out * s.K + k;
        each_target(mode, a2, i2, [&](int64_t o2) { sum += to_acc(from[o2 * s.K]); });
      });
    });
    dx[row * a2.in * s.K + j] = from_acc<T>(sum);
  }
}

}  // namespace
}  // namespace pyops

// binding

#include "common/registry.h"

namespace pyops {
namespace {

Tensor pad_fwd(const Tensor& x, std::vector<int64_t> before, std::vector<int64_t> sizes, int64_t mode, double value) {
  OpScope op("pad_fwd", x);
  const Shape s = shape_of(op, x, before, sizes, mode, true);
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    Tensor y = empty_y(op, s, scalar_type_of<T>);
    const auto rows = ceil_div(s.N * s.axis[0].out * s.axis[1].out, warps_a_block);
    const T* px = in_x<T>(op, x, s);
    T* py = out_y<T>(op, y, s);
    launch(pad_fwd_kernel<T>,
           {.grid = dim3(static_cast<unsigned>(rows)),
            .block = dim3(32, warps_a_block),
            .stream = static_cast<cudaStream_t>(op.stream())},
           px, py, s, mode, from_acc<T>(static_cast<accumulate_t<T>>(value)));
    return y;
  });
}

Tensor pad_bwd(const Tensor& dy, std::vector<int64_t> before, std::vector<int64_t> sizes, int64_t mode) {
  OpScope op("pad_bwd", dy);
  const Shape s = shape_of(op, dy, before, sizes, mode, false);
  return dispatch_floating(op, dy.scalar_type(), [&]<class T>() {
    Tensor dx = empty_x(op, s, scalar_type_of<T>);
    const auto rows = ceil_div(s.N * s.axis[0].in * s.axis[1].in, warps_a_block);
    const T* pdy = in_y<T>(op, dy, s);
    T* pdx = out_x<T>(op, dx, s);
    launch(pad_bwd_kernel<T>,
           {.grid = dim3(static_cast<unsigned>(rows)),
            .block = dim3(32, warps_a_block),
            .stream = static_cast<cudaStream_t>(op.stream())},
           pdy, pdx, s, mode);
    return dx;
  });
}

PYOPS_LIBRARY(m) {
  PYOPS_IMPL(m, pad_fwd);
  PYOPS_IMPL(m, pad_bwd);
}

}  // namespace
}  // namespace pyops
