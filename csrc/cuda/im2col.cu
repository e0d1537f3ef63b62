// im2col · CUDA
//   col[n, (c,r,s), (p,q)] = x[n, c, p*stride - padding + r*dilation, q*stride - padding + s*dilation]   (0 outside)
//   col2im is its transpose: dx[n,c,h,w] = sum of the col elements that were copied from x[n,c,h,w]
// layout   x: [N, C, H, W] · col: [N, C*R*S, P*Q]
// mapping  im2col: one thread per (n, c, p, q) writes R*S outputs, neighbours in q write neighbouring addresses;
//          col2im: one thread per input position gathers its taps, so there are no atomics
// memory   col once, x once from DRAM (R*S times from L1)
// numerics col2im sums in fp32 (fp64 for fp64), taps in order
#include "cuda/device.cuh"

#include "common/im2col.h"

namespace pyops::unfolding {
namespace {

// kernels

// A block works on positions of one plane: `blocks` of them cover it.
struct Place {
  int64_t plane;
  unsigned at;
};
PYOPS_DEVICE Place place(unsigned blocks) {
  const unsigned plane = blockIdx.x / blocks;
  return {plane, (blockIdx.x - plane * blocks) * blockDim.x + threadIdx.x};
}

template <class T>
__global__ void __launch_bounds__(256)
    im2col_kernel(const T* __restrict__ x, T* __restrict__ col, int64_t first, unsigned blocks, Axis h, Axis w) {
  const auto [offset, at] = place(blocks);
  const unsigned L = unsigned(h.count) * w.count;
  if (at >= L) return;
  const int64_t plane = first + offset;
  const int p = at / w.count, q = at - p * w.count;
  const T* from = x + row_offset(h, w, plane, 0);
  T* to = col + column_offset(h, w, plane, 0, 0) + at;
  for (int r = 0; r < h.kernel; ++r) {
    const int row = h.input(p, r);
    const bool inside = row >= 0 && row < h.size;
    for (int s = 0; s < w.kernel; ++s, to += L) {
      const int column = w.input(q, s);
      *to = inside && column >= 0 && column < w.size ? from[int64_t(row) * w.size + column] : convert<T>(0.0f);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(256)
    col2im_kernel(const T* __restrict__ col, T* __restrict__ dx, int64_t first, unsigned blocks, Axis h, Axis w) {
  using A = accumulate_t<T>;
  const auto [offset, at] = place(blocks);
  const unsigned positions = unsigned(h.size) * w.size;
  if (at >= positions) return;
  const int64_t plane = first + offset, L = int64_t(h.count) * w.count;
  const int row = at / w.size, column = at - row * w.size;
  const T* from = col + column_offset(h, w, plane, 0, 0);
  A sum = 0;
  for (int r = 0; r < h.kernel; ++r) {
    const int p = h.output(row, r);
    if (p < 0) continue;
    for (int s = 0; s < w.kernel; ++s) {
      const int q = w.output(column, s);
      if (q >= 0) sum += to_acc(from[(r * w.kernel + s) * L + int64_t(p) * w.count + q]);
    }
  }
  dx[plane * positions + at] = from_acc<T>(sum);
}

// Launches over planes in portions that fit a grid.
template <class T>
void run(void (*kernel)(const T*, T*, int64_t, unsigned, Axis, Axis), const T* from, T* to, int64_t planes,
         int64_t positions, const Axes& a, void* stream) {
  const auto blocks = static_cast<unsigned>(ceil_div(positions, 256));
  const int64_t portion = (int64_t(1) << 30) / blocks;
  for (int64_t first = 0; first < planes; first += portion) {
    const auto count = static_cast<unsigned>(planes - first < portion ? planes - first : portion);
    launch(kernel, {.grid = dim3(count * blocks), .block = dim3(256), .stream = static_cast<cudaStream_t>(stream)},
           from, to, first, blocks, a.h, a.w);
  }
}

}  // namespace
}  // namespace pyops::unfolding

// binding

#include "common/registry.h"

namespace pyops {
namespace {

Tensor im2col(const Tensor& x, std::vector<int64_t> kernel, std::vector<int64_t> stride, std::vector<int64_t> padding,
              std::vector<int64_t> dilation) {
  OpScope op("im2col", x);
  op.check(x.dim() == 4, "x must be [N, C, H, W]");
  const int64_t N = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3);
  const auto a = unfolding::axes_of(op, H, W, kernel, stride, padding, dilation);
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    const int64_t rows = C * a.h.kernel * a.w.kernel, L = int64_t(a.h.count) * a.w.count;
    Tensor col = op.empty<T>({N, rows, L});
    op.check(L < (int64_t(1) << 30), "the image is too large");
    unfolding::run(unfolding::im2col_kernel<T>, op.in<T>(x, "x", {N, C, H, W}), op.out<T>(col, "col", {N, rows, L}),
                   N * C, L, a, op.stream());
    return col;
  });
}

Tensor col2im(const Tensor& col, std::vector<int64_t> size, std::vector<int64_t> kernel, std::vector<int64_t> stride,
              std::vector<int64_t> padding, std::vector<int64_t> dilation) {
  OpScope op("col2im", col);
  op.check(col.dim() == 3 && size.size() == 2, "col must be [N, C*R*S, L] and size [H, W]");
  const int64_t N = col.size(0), H = size[0], W = size[1];
  const auto a = unfolding::axes_of(op, H, W, kernel, stride, padding, dilation);
  return dispatch_floating(op, col.scalar_type(), [&]<class T>() {
    const int64_t taps = a.h.kernel * a.w.kernel, C = col.size(1) / taps;
    Tensor dx = op.empty<T>({N, C, H, W});
    const int64_t L = int64_t(a.h.count) * a.w.count;
    op.check(H * W < (int64_t(1) << 30), "the image is too large");
    unfolding::run(unfolding::col2im_kernel<T>, op.in<T>(col, "col", {N, C * taps, L}),
                   op.out<T>(dx, "dx", {N, C, H, W}), N * C, H * W, a, op.stream());
    return dx;
  });
}

}  // namespace
}  // namespace pyops

PYOPS_LIBRARY(m) {
  using namespace pyops;
  PYOPS_IMPL(m, im2col);
  PYOPS_IMPL(m, col2im);
}
