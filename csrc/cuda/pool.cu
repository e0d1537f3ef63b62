// pool · CUDA
//   max  y[o] = max over the window of x;  dx[i] = sum of dy[o] over the windows whose maximum lies at i
//   avg  y[o] = sum over the window of x / divisor;  dx[i] = sum of dy[o] / divisor over the windows that hold i
// layout   x: [P, D, H, W, C], y: [P, OD, OH, OW, C]; channels first has C = 1 and P = N * channels
// mapping  a thread per element of the result, neighbours in memory side by side; backward gathers: no atomics
// memory   x read once from DRAM, its overlaps from L1; y written once; positions of maxima as one byte each
// numerics in fp32 (fp64 for fp64); the first maximum wins, NaN wins always; backward adds in the order of the outputs
#include <limits>

#include "cuda/grid_stride.cuh"
#include "cuda/math.cuh"

#include "common/pool.h"

namespace pyops {
namespace {

using pool::Keep;
using pool::Range;
using pool::Shape;

struct Place {
  int64_t p, d, h, w, c;
};
// Element number to coordinates in [P, D, H, W, C].
PYOPS_DEVICE Place place_of(int64_t i, int64_t D, int64_t H, int64_t W, int64_t C) {
  const int64_t c = i % C, w = i / C % W, h = i / (C * W) % H, d = i / (C * W * H) % D;
  return {i / (C * W * H * D), d, h, w, c};
}

// index null: the maximum alone; a byte holds the tap, int64 the position in the plane.
template <class T, class I>
__global__ void max_pool_kernel(const T* x, T* y, I* index, int64_t total, Shape s) {
  using A = accumulate_t<T>;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < total; i += stride) {
    const Place o = place_of(i, s.d.out, s.h.out, s.w.out, s.C);
    const Range rd = s.d.window(o.d), rh = s.h.window(o.h), rw = s.w.window(o.w);
    const T* plane = x + o.p * s.inputs() * s.C + o.c;
    A best = -std::numeric_limits<A>::infinity();
    int64_t at =
        sizeof(I) == 1 ? s.tap(rd.first, rh.first, rw.first) : (rd.start * s.h.in + rh.start) * s.w.in + rw.start;
    int64_t kd = rd.first;
    for (int64_t z = rd.start; z < rd.stop; z += rd.step, ++kd) {
      int64_t kh = rh.first;
      for (int64_t r = rh.start; r < rh.stop; r += rh.step, ++kh) {
        int64_t kw = rw.first;
        for (int64_t c = rw.start; c < rw.stop; c += rw.step, ++kw) {
          const int64_t position = (z * s.h.in + r) * s.w.in + c;
          const A v = to_acc(plane[position * s.C]);
          if (v > best || v != v) {
            best = v;
            at = sizeof(I) == 1 ? s.tap(kd, kh, kw) : position;
          }
        }
      }
    }
    y[i] = from_acc<T>(best);
    if (index != nullptr) index[i] = static_cast<I>(at);
  }
}

template <class T>
__global__ void avg_pool_kernel(const T* x, T* y, int64_t total, Shape s, bool include_padding, int64_t override_by) {
  using A = accumulate_t<T>;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < total; i += stride) {
    const Place o = place_of(i, s.d.out, s.h.out, s.w.out, s.C);
    const Range rd = s.d.window(o.d), rh = s.h.window(o.h), rw = s.w.window(o.w);
    const T* plane = x + o.p * s.inputs() * s.C + o.c;
    A sum = 0;
    int64_t valid = 0;
    for (int64_t z = rd.start; z < rd.stop; z += rd.step)
      for (int64_t r = rh.start; r < rh.stop; r += rh.step)
        for (int64_t c = rw.start; c < rw.stop; c += rw.step, ++valid)
          sum += to_acc(plane[((z * s.h.in + r) * s.w.in + c) * s.C]);
    y[i] = from_acc<T>(sum / A(s.divisor(o.d, o.h, o.w, valid, include_padding, override_by)));
  }
}

// index null: the gradient of an average.
template <class T, class I>
__global__ void pool_bwd_kernel(const T* dy, const I* index, T* dx, int64_t total, Shape s, bool include_padding,
                                int64_t override_by) {
  using A = accumulate_t<T>;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < total; i += stride) {
    const Place at = place_of(i, s.d.in, s.h.in, s.w.in, s.C);
    const int64_t position = (at.d * s.h.in + at.h) * s.w.in + at.w;
    A sum = 0;
    for (int64_t od = s.d.first_output(at.d); od <= s.d.last_output(at.d); ++od) {
      const Range rd = s.d.window(od);
      if (!s.d.reaches(rd, at.d)) continue;
      for (int64_t oh = s.h.first_output(at.h); oh <= s.h.last_output(at.h); ++oh) {
        const Range rh = s.h.window(oh);
        if (!s.h.reaches(rh, at.h)) continue;
        for (int64_t ow = s.w.first_output(at.w); ow <= s.w.last_output(at.w); ++ow) {
          const Range rw = s.w.window(ow);
          if (!s.w.reaches(rw, at.w)) continue;
          const int64_t out = (((at.p * s.d.out + od) * s.h.out + oh) * s.w.out + ow) * s.C + at.c;
          if (index != nullptr) {
            const int64_t kept = static_cast<int64_t>(index[out]);
            if ((sizeof(I) == 1 ? s.position(od, oh, ow, kept) : kept) == position) sum += to_acc(dy[out]);
          } else {
            const int64_t valid = ceil_div(rd.stop - rd.start, rd.step) * ceil_div(rh.stop - rh.start, rh.step) *
                                  ceil_div(rw.stop - rw.start, rw.step);
            sum += to_acc(dy[out]) / A(s.divisor(od, oh, ow, valid, include_padding, override_by));
          }
        }
      }
    }
    dx[i] = from_acc<T>(sum);
  }
}

}  // namespace
}  // namespace pyops

// binding

#include "common/pool_binding.h"
#include "common/registry.h"

namespace pyops {
namespace {

std::vector<int64_t> size_of(const OpScope& op, const Tensor& x) {
  op.check(x.dim() == 5, "x must be [P, D, H, W, C]");
  return {x.size(0), x.size(1), x.size(2), x.size(3), x.size(4)};
}

std::tuple<Tensor, Tensor> max_pool_fwd(const Tensor& x, std::vector<int64_t> window, int64_t keep) {
  OpScope op("max_pool_fwd", x);
  const Shape s = pool::shape_of(op, size_of(op, x), window);
  const bool taps = keep == static_cast<int64_t>(Keep::taps);
  op.check(!taps || (!s.d.adaptive && s.d.kernel * s.h.kernel * s.w.kernel <= 256), "taps must fit a byte");
  const std::initializer_list<int64_t> in = {s.P, s.d.in, s.h.in, s.w.in, s.C},
                                       out = {s.P, s.d.out, s.h.out, s.w.out, s.C};
  const int64_t total = s.P * s.outputs() * s.C;
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    Tensor y = op.empty<T>(out);
    Tensor index = keep == 0 ? op.empty<uint8_t>({0}) : taps ? op.empty<uint8_t>(out) : op.empty<int64_t>(out);
    const T* px = op.in<T>(x, "x", in);
    T* py = op.out<T>(y, "y", out);
    if (keep == static_cast<int64_t>(Keep::positions))
      launch(max_pool_kernel<T, int64_t>, grid_stride(total, op.stream(), 32), px, py,
             op.out<int64_t>(index, "index", out), total, s);
    else
      launch(max_pool_kernel<T, uint8_t>, grid_stride(total, op.stream(), 32), px, py,
             taps ? op.out<uint8_t>(index, "index", out) : static_cast<uint8_t*>(nullptr), total, s);
    return std::make_tuple(y, index);
  });
}

Tensor max_pool_bwd(const Tensor& dy, const Tensor& index, std::vector<int64_t> size, std::vector<int64_t> window) {
  OpScope op("max_pool_bwd", dy);
  const Shape s = pool::shape_of(op, size, window);
  const std::initializer_list<int64_t> in = {s.P, s.d.in, s.h.in, s.w.in, s.C},
                                       out = {s.P, s.d.out, s.h.out, s.w.out, s.C};
  const int64_t total = s.P * s.inputs() * s.C;
  return dispatch_floating(op, dy.scalar_type(), [&]<class T>() {
    Tensor dx = op.empty<T>(in);
    const T* pdy = op.in<T>(dy, "dy", out);
    T* pdx = op.out<T>(dx, "dx", in);
    if (index.scalar_type() == ScalarType::Byte)
      launch(pool_bwd_kernel<T, uint8_t>, grid_stride(total, op.stream(), 32), pdy, op.in<uint8_t>(index, "index", out),
             pdx, total, s, false, int64_t{1});
    else
      launch(pool_bwd_kernel<T, int64_t>, grid_stride(total, op.stream(), 32), pdy, op.in<int64_t>(index, "index", out),
             pdx, total, s, false, int64_t{1});
    return dx;
  });
}

Tensor avg_pool_fwd(const Tensor& x, std::vector<int64_t> window, bool include_padding, int64_t divisor) {
  OpScope op("avg_pool_fwd", x);
  const Shape s = pool::shape_of(op, size_of(op, x), window);
  const int64_t total = s.P * s.outputs() * s.C;
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    Tensor y = op.empty<T>({s.P, s.d.out, s.h.out, s.w.out, s.C});
    launch(avg_pool_kernel<T>, grid_stride(total, op.stream(), 32),
           op.in<T>(x, "x", {s.P, s.d.in, s.h.in, s.w.in, s.C}),
           op.out<T>(y, "y", {s.P, s.d.out, s.h.out, s.w.out, s.C}), total, s, include_padding, divisor);
    return y;
  });
}

Tensor avg_pool_bwd(const Tensor& dy, std::vector<int64_t> size, std::vector<int64_t> window, bool include_padding,
                    int64_t divisor) {
  OpScope op("avg_pool_bwd", dy);
  const Shape s = pool::shape_of(op, size, window);
  const int64_t total = s.P * s.inputs() * s.C;
  return dispatch_floating(op, dy.scalar_type(), [&]<class T>() {
    Tensor dx = op.empty<T>({s.P, s.d.in, s.h.in, s.w.in, s.C});
    launch(pool_bwd_kernel<T, uint8_t>, grid_stride(total, op.stream(), 32),
           op.in<T>(dy, "dy", {s.P, s.d.out, s.h.out, s.w.out, s.C}), static_cast<const uint8_t*>(nullptr),
           op.out<T>(dx, "dx", {s.P, s.d.in, s.h.in, s.w.in, s.C}), total, s, include_padding, divisor);
    return dx;
  });
}

}  // namespace
}  // namespace pyops

PYOPS_LIBRARY(m) {
  using namespace pyops;
  PYOPS_IMPL(m, max_pool_fwd);
  PYOPS_IMPL(m, max_pool_bwd);
  PYOPS_IMPL(m, avg_pool_fwd);
  PYOPS_IMPL(m, avg_pool_bwd);
}
