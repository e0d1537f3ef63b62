// Where a pooling window lies: per dimension by kernel, stride, padding and dilation, or adaptively.
#pragma once

#include <cstdint>

#include "common/qualifiers.h"

namespace pyops::pool {

struct Range {
  int64_t start, stop, step;  // input positions start, start + step, ... < stop
  int64_t first;              // number of the tap at `start`
};

// One spatial dimension.
struct Dimension {
  int64_t in, out, kernel, stride, padding, dilation;
  bool adaptive;

  PYOPS_HOST_DEVICE Range window(int64_t o) const {
    if (adaptive) return {o * in / out, ((o + 1) * in + out - 1) / out, 1, 0};
    const int64_t origin = o * stride - padding;
    const int64_t skipped = origin < 0 ? (-origin + dilation - 1) / dilation : 0;
    const int64_t end = origin + (kernel - 1) * dilation + 1;
    return {origin + skipped * dilation, end < in ? end : in, dilation, skipped};
  }
  // The outputs whose windows may reach input i: first and last.
  PYOPS_HOST_DEVICE int64_t first_output(int64_t i) const {
    if (adaptive) return i * out / in;
    const int64_t reach = i + padding - (kernel - 1) * dilation;
    return reach <= 0 ? 0 : (reach + stride - 1) / stride;
  }
  PYOPS_HOST_DEVICE int64_t last_output(int64_t i) const {
    const int64_t last = adaptive ? ((i + 1) * out + in - 1) / in - 1 : (i + padding) / stride;
    return last < out - 1 ? last : out - 1;
  }
  PYOPS_HOST_DEVICE bool reaches(const Range& r, int64_t i) const {
    return i >= r.start && i < r.stop && (i - r.start) % r.step == 0;
  }
  // Positions that count in an average which includes the padding.
  PYOPS_HOST_DEVICE int64_t padded_count(int64_t o) const {
    if (adaptive) return ((o + 1) * in + out - 1) / out - o * in / out;
    const int64_t origin = o * stride - padding, end = origin + kernel;
    return (end < in + padding ? end : in + padding) - origin;
  }
};

// x [P, d.in, h.in, w.in, C] -> y [P, d.out, h.out, w.out, C]
struct Shape {
  int64_t P, C;
  Dimension d, h, w;

  PYOPS_HOST_DEVICE int64_t inputs() const { return d.in * h.in * w.in; }
  PYOPS_HOST_DEVICE int64_t outputs() const { return d.out * h.out * w.out; }
  // A tap of a window as one small number, and the position in the input's plane that it means.
  PYOPS_HOST_DEVICE int64_t tap(int64_t kd, int64_t kh, int64_t kw) const {
    return (kd * h.kernel + kh) * w.kernel + kw;
  }
  PYOPS_HOST_DEVICE int64_t position(int64_t od, int64_t oh, int64_t ow, int64_t tap) const {
    const int64_t kw = tap % w.kernel, kh = tap / w.kernel % h.kernel, kd = tap / (w.kernel * h.kernel);
    const int64_t z = od * d.stride - d.padding + kd * d.dilation, y = oh * h.stride - h.padding + kh * h.dilation;
    return (z * h.in + y) * w.in + ow * w.stride - w.padding + kw * w.dilation;
  }
  // What a sum over the window is divided by; `valid` counts the taps inside the input.
  PYOPS_HOST_DEVICE int64_t divisor(int64_t od, int64_t oh, int64_t ow, int64_t valid, bool include_padding,
                                    int64_t override_by) const {
    if (override_by != 0) return override_by;
    return include_padding ? d.padded_count(od) * h.padded_count(oh) * w.padded_count(ow) : valid;
  }
};

// How the positions of the maxima are kept: not at all, as tap numbers in a byte, or as positions in the plane.
enum class Keep : int64_t { nothing = 0, taps = 1, positions = 2 };

}  // namespace pyops::pool
