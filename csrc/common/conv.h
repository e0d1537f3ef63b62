// The geometry of a convolution and of its gradient in one form, shared by CPU and CUDA.
//
// Along each dimension both are
//
//   y[out_base + o*out_step] += x[in_base + o*in_step + j*tap_step] * w[w_base + j*w_step]      o < count, j < taps
//
// For the forward that is the definition. The gradient in the input with stride s is s of them, one for each residue
// ("phase") of the position modulo s: of position h only the taps r with (h + padding - r*dilation) % s == 0 count, and
// they are equally spaced (docs/math/convolution.md).
#pragma once

#include <cstdint>
#include <numeric>
#include <vector>

#include "common/qualifiers.h"

namespace pyops::conv {

struct Axis {
  int32_t size;   // of x
  int32_t count;  // positions computed
  int32_t in_base, in_step;
  int32_t taps, tap_step;
  int32_t w_base, w_step;
  int32_t out_size, out_base, out_step;

  PYOPS_HOST_DEVICE int32_t input(int32_t o, int32_t j) const { return in_base + o * in_step + j * tap_step; }
};

struct Position {
  uint32_t n;  // example
  int32_t d, h, w;
};
struct Tap {
  int32_t d, h, w;
};

struct Space {
  Axis d, h, w;
  PYOPS_HOST_DEVICE int64_t in_plane() const { return int64_t(d.size) * h.size * w.size; }
  PYOPS_HOST_DEVICE int64_t out_plane() const { return int64_t(d.out_size) * h.out_size * w.out_size; }
  PYOPS_HOST_DEVICE int64_t positions() const { return int64_t(d.count) * h.count * w.count; }
  PYOPS_HOST_DEVICE int32_t taps() const { return d.taps * h.taps * w.taps; }
  // Offset of an input position in its plane, or -1 outside.
  PYOPS_HOST_DEVICE int64_t input(int32_t di, int32_t hi, int32_t wi) const {
    if (di < 0 || di >= d.size || hi < 0 || hi >= h.size || wi < 0 || wi >= w.size) return -1;
    return (int64_t(di) * h.size + hi) * w.size + wi;
  }
  // Offset of a computed position in its plane of y.
  PYOPS_HOST_DEVICE int64_t output(const Position& o) const {
    return (int64_t(d.out_base + o.d * d.out_step) * h.out_size + h.out_base + o.h * h.out_step) * w.out_size +
           w.out_base + o.w * w.out_step;
  }
};

// Of the computed positions of all examples, in order, and of the taps.
PYOPS_HOST_DEVICE Position position(const Space& s, uint32_t pixel) {
  const auto positions = uint32_t(s.positions());
  const uint32_t n = pixel / positions, at = pixel - n * positions, row = at / s.w.count;
  return {n, int32_t(row / s.h.count), int32_t(row % s.h.count), int32_t(at - row * s.w.count)};
}
PYOPS_HOST_DEVICE Tap tap_of(const Space& s, int32_t j) {
  const int32_t row = j / s.w.taps;
  return {row / s.h.taps, row % s.h.taps, j - row * s.w.taps};
}

// Offset of a channel's first element, and the distance of its positions.
PYOPS_HOST_DEVICE int64_t plane_of(int64_t n, int64_t c, int64_t channels, int64_t positions, bool channels_last) {
  return channels_last ? n * positions * channels + c : (n * channels + c) * positions;
}

// The arguments of an op, checked against each other.
struct Sizes {
  int64_t N, C, K, G;        // C and K of all groups
  int64_t x[3], y[3], r[3];  // input, output, taps
  int64_t stride[3], padding[3], dilation[3];
  int64_t x_plane() const { return x[0] * x[1] * x[2]; }
  int64_t y_plane() const { return y[0] * y[1] * y[2]; }
  int64_t taps() const { return r[0] * r[1] * r[2]; }
};

inline Axis forward_axis(const Sizes& s, int i) {
  return {int32_t(s.x[i]),
          int32_t(s.y[i]),
          int32_t(-s.padding[i]),
          int32_t(s.stride[i]),
          int32_t(s.r[i]),
          int32_t(s.dilation[i]),
          0,
          1,
          int32_t(s.y[i]),
          0,
          1};
}

// From dy to the positions of x that are `phase` modulo the stride.
inline Axis gradient_axis(const Sizes& s, int i, int64_t phase) {
  const int64_t stride = s.stride[i], dilation = s.dilation[i], reach = phase + s.padding[i];
  const int64_t common = std::gcd(stride, dilation);
  const int64_t count = phase < s.x[i] ? (s.x[i] - phase + stride - 1) / stride : 0;
  int64_t first = 0;
  while (first < s.r[i] && (reach - first * dilation) % stride != 0) ++first;
  const int64_t step = stride / common, taps = first < s.r[i] ? (s.r[i] - 1 - first) / step + 1 : 0;
  const int64_t base = taps > 0 ? (reach - first * dilation) / stride : 0;
  return {int32_t(s.y[i]), int32_t(count),
          int32_t(base),   1,
          int32_t(taps),   int32_t(-(dilation / common)),
          int32_t(first),  int32_t(step),
          int32_t(s.x[i]), int32_t(phase),
          int32_t(stride)};
}

inline Space forward_space(const Sizes& s) { return {forward_axis(s, 0), forward_axis(s, 1), forward_axis(s, 2)}; }

// Calls f(space) for every phase of the gradient.
template <class F>
void each_phase(const Sizes& s, F&& f) {
  for (int64_t d = 0; d < s.stride[0]; ++d)
    for (int64_t h = 0; h < s.stride[1]; ++h)
      for (int64_t w = 0; w < s.stride[2]; ++w) {
        const Space space{gradient_axis(s, 0, d), gradient_axis(s, 1, h), gradient_axis(s, 2, w)};
        if (space.positions() > 0) f(space);
      }
}

// Reads the sizes of an op; x, w, y stand for whichever tensors it has (empty where it has none).
template <class Scope>
Sizes sizes_of(const Scope& op, int64_t N, int64_t C, int64_t K, int64_t groups, const std::vector<int64_t>& x,
               const std::vector<int64_t>& y, const std::vector<int64_t>& r, const std::vector<int64_t>& stride,
               const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  Sizes s{};
  s.N = N, s.C = C, s.K = K, s.G = groups;
  op.check(groups > 0 && C % groups == 0 && K % groups == 0, "groups must divide the channels");
  op.check(x.size() == 3 && r.size() == 3 && stride.size() == 3 && padding.size() == 3 && dilation.size() == 3,
           "sizes, taps, stride, padding and dilation must have 3 elements");
  for (int i = 0; i < 3; ++i) {
    op.check(r[i] > 0 && stride[i] > 0 && dilation[i] > 0 && padding[i] >= 0, "a size of the geometry is out of range");
    const int64_t reach = x[i] + 2 * padding[i], span = dilation[i] * (r[i] - 1) + 1;
    op.check(reach < (int64_t(1) << 30), "a side of the input is too large");
    // a transposed convolution may have an input or an output of no positions: then the filter is too large, by less
    // than a stride more than that
    op.check(span <= reach + stride[i], "the filter does not fit the padded input");
    const int64_t count = (reach + stride[i] - span) / stride[i];
    s.x[i] = x[i], s.r[i] = r[i], s.stride[i] = stride[i], s.padding[i] = padding[i], s.dilation[i] = dilation[i];
    s.y[i] = y.empty() ? count : y[i];
    op.check(s.y[i] <= count, "there are more output positions than the filter has places");
  }
  return s;
}

}  // namespace pyops::conv
