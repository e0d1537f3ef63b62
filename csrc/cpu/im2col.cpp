// im2col · CPU
//   col[n, (c,r,s), (p,q)] = x[n, c, p*stride - padding + r*dilation, q*stride - padding + s*dilation]   (0 outside)
//   col2im is its transpose: dx[n,c,h,w] = sum of the col elements that were copied from x[n,c,h,w]
// layout   x: [N, C, H, W] · col: [N, C*R*S, P*Q]
// mapping  im2col: a row of Q outputs is one clipped copy of an input row · col2im: an input row gathers its R*S rows
// threads  planes (n, c)
// memory   col once, x once (R*S times from cache)
// numerics col2im sums in fp32 (fp64 for fp64), taps in order
#include "common/im2col.h"

#include "common/registry.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace pyops::PYOPS_CPU_CAPABILITY {
namespace {

using unfolding::Axis;

// ---- kernels

// The loop that a compiler would turn into a call of memcpy, whose start costs as much as a row.
template <class T>
PYOPS_INLINE void copy_row(T* to, const T* from, int64_t n) {
  using Line = simd::Native<uint32_t>;
  constexpr int64_t W = vector_bytes / int64_t(sizeof(T));
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const Line line = simd::read<Line>(from + i);
    std::memcpy(static_cast<void*>(to + i), &line, sizeof line);
  }
  if (i == n) return;
  if (n >= W) {  // the last whole vector overlaps the one before
    const Line line = simd::read<Line>(from + n - W);
    std::memcpy(static_cast<void*>(to + n - W), &line, sizeof line);
    return;
  }
  for (; i < n; ++i) to[i] = from[i];
}

// One row of outputs: y[q] = x_row[offset + q*stride], zero outside.
template <class T>
PYOPS_INLINE void clipped_row(T* y, const T* x_row, const Axis& w, int64_t s) {
  const int64_t offset = w.input(0, s);
  const int64_t low = std::min<int64_t>(unfolding::first_at_least(0, offset, w.stride), w.count);
  const int64_t high = std::max(low, std::min<int64_t>(unfolding::first_at_least(w.size, offset, w.stride), w.count));
  for (int64_t q = 0; q < low; ++q) y[q] = T{};
  if (w.stride == 1)
    copy_row(y + low, x_row + offset + low, high - low);
  else
    for (int64_t q = low; q < high; ++q) y[q] = x_row[offset + q * w.stride];
  for (int64_t q = high; q < w.count; ++q) y[q] = T{};
}

template <class T>
void im2col_planes(const T* x, T* col, int64_t planes, const Axis& h, const Axis& w) {
  const int64_t L = int64_t(h.count) * w.count, taps = h.kernel * w.kernel;
  parallel_for(planes, ceil_div(16384, std::max<int64_t>(L * taps, 1)), [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane)
      for (int64_t r = 0; r < h.kernel; ++r)
        for (int64_t s = 0; s < w.kernel; ++s) {
          T* y = col + unfolding::column_offset(h, w, plane, r, s);
          for (int64_t p = 0; p < h.count; ++p, y += w.count) {
            const int64_t row = h.input(p, r);
            if (row < 0 || row >= h.size)
              std::memset(static_cast<void*>(y), 0, size_t(w.count) * sizeof(T));
            else
              clipped_row(y, x + unfolding::row_offset(h, w, plane, row), w, s);
          }
        }
  });
}

template <class scalar_t>
void col2im_planes(const scalar_t* col, scalar_t* dx, int64_t planes, const Axis& h, const Axis& w) {
  using acc_t = accumulate_t<scalar_t>;
  const int64_t L = int64_t(h.count) * w.count, taps = h.kernel * w.kernel;
  parallel_for(planes, ceil_div(16384, std::max<int64_t>(L * taps, 1)), [&](int64_t begin, int64_t end) {
    Buffer<acc_t> sum(w.size);
    for (int64_t plane = begin; plane < end; ++plane)
      for (int64_t row = 0; row < h.size; ++row) {
        std::memset(sum.get(), 0, size_t(w.size) * sizeof(acc_t));
        for (int64_t r = 0; r < h.kernel; ++r) {
          const int64_t p = h.output(row, r);
          if (p < 0) continue;
          for (int64_t s = 0; s < w.kernel; ++s) {
            const scalar_t* y = col + unfolding::column_offset(h, w, plane, r, s) + p * w.count;
            const int64_t offset = w.input(0, s);
            const int64_t low = std::min<int64_t>(unfolding::first_at_least(0, offset, w.stride), w.count);
            const int64_t high = std::min<int64_t>(unfolding::first_at_least(w.size, offset, w.stride), w.count);
            acc_t* to = sum.get() + offset;
            if (w.stride == 1)
              each_vector<acc_t>(high - low, [&](int64_t i, auto lanes) {
                using V = Vec<acc_t>;
                (V::load(to + low + i, lanes) + V::load(y + low + i, lanes)).store(to + low + i, lanes);
              });
            else
              for (int64_t q = low; q < high; ++q) to[q * w.stride] += acc_t(y[q]);
          }
        }
        scalar_t* out = dx + (plane * h.size + row) * w.size;
        each_vector<acc_t>(
            w.size, [&](int64_t i, auto lanes) { Vec<acc_t>::load(sum.get() + i, lanes).store(out + i, lanes); });
      }
  });
}

// ---- binding

Tensor im2col(const Tensor& x, std::vector<int64_t> kernel, std::vector<int64_t> stride, std::vector<int64_t> padding,
              std::vector<int64_t> dilation) {
  OpScope op("im2col", x);
  op.check(x.dim() == 4, "x must be [N, C, H, W]");
  const int64_t N = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3);
  const auto [h, w] = unfolding::axes_of(op, H, W, kernel, stride, padding, dilation);
  return dispatch_floating(op, x.scalar_type(), [&]<class scalar_t>() {
    const int64_t rows = C * h.kernel * w.kernel, L = int64_t(h.count) * w.count;
    Tensor col = op.empty<scalar_t>({N, rows, L});
    im2col_planes(op.in<scalar_t>(x, "x", {N, C, H, W}), op.out<scalar_t>(col, "col", {N, rows, L}), N * C, h, w);
    return col;
  });
}

Tensor col2im(const Tensor& col, std::vector<int64_t> size, std::vector<int64_t> kernel, std::vector<int64_t> stride,
              std::vector<int64_t> padding, std::vector<int64_t> dilation) {
  OpScope op("col2im", col);
  op.check(col.dim() == 3 && size.size() == 2, "col must be [N, C*R*S, L] and size [H, W]");
  const int64_t N = col.size(0), H = size[0], W = size[1];
  const auto [h, w] = unfolding::axes_of(op, H, W, kernel, stride, padding, dilation);
  return dispatch_floating(op, col.scalar_type(), [&]<class scalar_t>() {
    const int64_t taps = h.kernel * w.kernel, C = col.size(1) / taps;
    Tensor dx = op.empty<scalar_t>({N, C, H, W});
    col2im_planes(op.in<scalar_t>(col, "col", {N, C * taps, h.count * w.count}),
                  op.out<scalar_t>(dx, "dx", {N, C, H, W}), N * C, h, w);
    return dx;
  });
}

}  // namespace

PYOPS_LIBRARY(m) {
  PYOPS_IMPL(m, im2col);
  PYOPS_IMPL(m, col2im);
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY
