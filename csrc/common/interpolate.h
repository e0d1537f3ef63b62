// Resampling along one axis: which inputs an output reads, and with what weights. docs/math/resampling.md derives them.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace pyops::interpolate {

enum Mode : int64_t { nearest, nearest_exact, linear, cubic, area, linear_antialias, cubic_antialias, modes };

// One axis of `in` elements becomes one of `out`; `step` is the distance of two outputs, counted in inputs.
struct Axis {
  int64_t in, out;
  double step;
  int64_t mode;
  bool align_corners;
};

// The inputs first..last that an output reads.
struct Span {
  int64_t first, last;
};

PYOPS_HOST_DEVICE int64_t clamped(int64_t i, int64_t size) { return i < 0 ? 0 : i < size ? i : size - 1; }

PYOPS_HOST_DEVICE double position(const Axis& a, int64_t o) {
  return a.align_corners ? a.step * double(o) : a.step * (double(o) + 0.5) - 0.5;
}

// The one input of an output, in float as torch computes it: a choice must be the same, not only near.
PYOPS_HOST_DEVICE int64_t nearest_source(const Axis& a, int64_t o) {
  const float at = a.mode == nearest ? float(o) * float(a.step) : float((double(o) + 0.5) * a.step);
  return clamped(int64_t(floorf(at)), a.in);
}

// The filters of antialiasing reach as far as the step where inputs lie closer than outputs.
PYOPS_HOST_DEVICE double stretch(const Axis& a) { return a.step > 1 ? a.step : 1; }
PYOPS_HOST_DEVICE double filter_center(const Axis& a, int64_t o) { return a.step * (double(o) + 0.5); }

// The cubic kernel of Keys at distance x.
PYOPS_HOST_DEVICE double cubic_weight(double x, double a) {
  x = x < 0 ? -x : x;
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? ((x - 5) * x + 8) * x * a - 4 * a : 0;
}
PYOPS_HOST_DEVICE double filter_weight(const Axis& a, double x) {
  if (a.mode == cubic_antialias) return cubic_weight(x, -0.5);
  x = x < 0 ? -x : x;
  return x < 1 ? 1 - x : 0;
}

PYOPS_HOST_DEVICE Span span(const Axis& a, int64_t o) {
  if (a.mode == area) return {o * a.in / a.out, ((o + 1) * a.in + a.out - 1) / a.out - 1};
  if (a.mode >= linear_antialias) {
    const double center = filter_center(a, o), reach = stretch(a) * (a.mode == cubic_antialias ? 2 : 1);
    const int64_t first = clamped(int64_t(center - reach + 0.5), a.in);
    const int64_t last = clamped(int64_t(center + reach + 0.5) - 1, a.in);
    return {first, last < first ? first : last};
  }
  if (a.mode <= nearest_exact) return {nearest_source(a, o), nearest_source(a, o)};
  const int64_t i = int64_t(floor(position(a, o)));
  if (a.mode == cubic) return {clamped(i - 1, a.in), clamped(i + 2, a.in)};
  return a.in == a.out ? Span{o, o} : Span{clamped(i, a.in), clamped(i + 1, a.in)};
}

// add(i, weight) for the inputs of output o, in order; an edge that stands for what lies beyond it comes repeatedly.
template <class F>
PYOPS_HOST_DEVICE void each_tap(const Axis& a, int64_t o, F&& add) {
  const Span s = span(a, o);
  if (a.mode == area || s.first == s.last) {
    for (int64_t i = s.first; i <= s.last; ++i) add(i, 1.0 / double(s.last - s.first + 1));
  } else if (a.mode >= linear_antialias) {
    const double center = filter_center(a, o), narrow = 1 / stretch(a);
    double total = 0;
    for (int64_t i = s.first; i <= s.last; ++i) total += filter_weight(a, (double(i) - center + 0.5) * narrow);
    for (int64_t i = s.first; i <= s.last; ++i)
      add(i, filter_weight(a, (double(i) - center + 0.5) * narrow) / (total == 0 ? 1 : total));
  } else {
    const double at = position(a, o), i = a.mode == linear ? double(s.first) : floor(at), t = at - i;
    if (a.mode == linear) {
      add(s.first, 1 - t);
      add(s.last, t);
    } else {
      for (int k = -1; k <= 2; ++k) add(clamped(int64_t(i) + k, a.in), cubic_weight(t - k, -0.75));
    }
  }
}

}  // namespace pyops::interpolate
