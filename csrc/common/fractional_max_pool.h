// Where the windows of fractional max pooling lie.
#pragma once

#include <cstdint>

#include "common/qualifiers.h"

namespace pyops::fractional_max_pool {

// One spatial dimension; `u` in [0, 1) shifts the windows of one plane.
struct Axis {
  int64_t in, out, kernel;

  // floor((o + u) a) - floor(u a) with a = (in - kernel) / (out - 1); the last window ends with the input. In the
  // arithmetic of torch, and cut to the input for whatever u is.
  template <class A>
  PYOPS_HOST_DEVICE int64_t start(int64_t o, A u) const {
    if (o == out - 1) return in - kernel;
    const A alpha = A(in - kernel) / A(out - 1);
    const int64_t at = static_cast<int64_t>((A(o) + u) * alpha) - static_cast<int64_t>(u * alpha);
    return at < 0 ? 0 : at > in - kernel ? in - kernel : at;
  }
  // Windows that may reach position i: start(o) lies less than 1 from o a, and windows are at least 1 apart.
  PYOPS_HOST_DEVICE int64_t first_output(int64_t i) const {
    const int64_t reach = i - kernel - 1;
    return out == 1 || reach <= 0 ? 0 : reach * (out - 1) / (in - kernel > 0 ? in - kernel : 1);
  }
  PYOPS_HOST_DEVICE int64_t last_output(int64_t i) const {
    if (out == 1) return 0;
    const int64_t last = (i + 2) * (out - 1) / (in - kernel > 0 ? in - kernel : 1) + 1;
    return last < out - 1 ? last : out - 1;
  }
};

// x [P, d.in, h.in, w.in] -> y [P, d.out, h.out, w.out]; samples [P, 3] in the order d, h, w.
struct Shape {
  int64_t P;
  Axis d, h, w;
  PYOPS_HOST_DEVICE int64_t inputs() const { return d.in * h.in * w.in; }
  PYOPS_HOST_DEVICE int64_t outputs() const { return d.out * h.out * w.out; }
};

}  // namespace pyops::fractional_max_pool
