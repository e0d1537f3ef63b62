// Index arithmetic of im2col, shared by CPU and CUDA: which filter taps and output positions meet in one input
// position.
//
//   h = p * stride - padding + r * dilation
#pragma once

#include <cstdint>
#include <vector>

#include "common/qualifiers.h"

namespace pyops::unfolding {

// One spatial dimension. 32 bits hold any side of an image, and spare a GPU its division of 64 bits.
struct Axis {
  int32_t size;    // of the input
  int32_t kernel;  // of the filter
  int32_t stride, padding, dilation;
  int32_t count;  // of the output

  // Input coordinate of output p under tap r; outside [0, size) it is padding.
  PYOPS_HOST_DEVICE int32_t input(int32_t p, int32_t r) const { return p * stride - padding + r * dilation; }

  // Output position that reads input h through tap r, or -1.
  PYOPS_HOST_DEVICE int32_t output(int32_t h, int32_t r) const {
    const int32_t reach = h + padding - r * dilation;
    if (reach < 0 || reach % stride != 0) return -1;
    const int32_t p = reach / stride;
    return p < count ? p : -1;
  }
};

// Offsets beyond 2^31 elements: of a row of a plane of the image, and of the outputs of a plane under tap (r, s).
PYOPS_HOST_DEVICE int64_t row_offset(const Axis& h, const Axis& w, int64_t plane, int64_t row) {
  return (plane * h.size + row) * w.size;
}
PYOPS_HOST_DEVICE int64_t column_offset(const Axis& h, const Axis& w, int64_t plane, int64_t r, int64_t s) {
  return ((plane * h.kernel + r) * w.kernel + s) * (int64_t(h.count) * w.count);
}

// First output q >= 0 with q * stride + offset >= low; offset is the input coordinate of q = 0.
PYOPS_HOST_DEVICE int64_t first_at_least(int64_t low, int64_t offset, int64_t stride) {
  return offset >= low ? 0 : (low - offset + stride - 1) / stride;
}

// Both axes of a call, checked; Scope is the OpScope of the binding.
struct Axes {
  Axis h, w;
};
template <class Scope>
Axis make_axis(const Scope& op, int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  op.check(kernel > 0 && stride > 0 && dilation > 0 && padding >= 0, "a size of the geometry is out of range");
  const int64_t reach = size + 2 * padding, span = dilation * (kernel - 1) + 1;
  op.check(span <= reach && reach < INT32_MAX, "a side of the image is too small or too large");
  return {int32_t(size),    int32_t(kernel),   int32_t(stride),
          int32_t(padding), int32_t(dilation), int32_t((reach - span) / stride + 1)};
}
template <class Scope>
Axes axes_of(const Scope& op, int64_t H, int64_t W, const std::vector<int64_t>& kernel,
             const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
             const std::vector<int64_t>& dilation) {
  op.check(kernel.size() == 2 && stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
           "kernel, stride, padding and dilation must have 2 elements");
  return {make_axis(op, H, kernel[0], stride[0], padding[0], dilation[0]),
          make_axis(op, W, kernel[1], stride[1], padding[1], dilation[1])};
}

}  // namespace pyops::unfolding
