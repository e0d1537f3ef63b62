// Padding of up to three axes: where an output element comes from, and where an input element goes to.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace pyops::pad {

enum Mode : int64_t { constant, reflect, replicate, circular, modes };

// One axis of `in` elements becomes one of `out`; `before` are added in front, or cut where negative.
struct Axis {
  int64_t in, out, before;
};

// The input index of output index o, or -1 where the constant stands.
PYOPS_HOST_DEVICE int64_t source(int64_t mode, const Axis& a, int64_t o) {
  const int64_t i = o - a.before;
  if (i >= 0 && i < a.in) return i;
  if (mode == reflect) return i < 0 ? -i : 2 * (a.in - 1) - i;
  if (mode == replicate) return i < 0 ? 0 : a.in - 1;
  if (mode == circular) return i < 0 ? i + a.in : i - a.in;
  return -1;
}

// f(o) for every output index o that reads input index i, in a fixed order.
template <class F>
PYOPS_HOST_DEVICE void each_target(int64_t mode, const Axis& a, int64_t i, F&& f) {
  const int64_t center = i + a.before, end = a.before + a.in;
  const auto visit = [&](int64_t o) {
    if (o >= 0 && o < a.out) f(o);
  };
  visit(center);
  if (mode == reflect) {
    if (i > 0) visit(a.before - i);
    if (i < a.in - 1) visit(a.before + 2 * (a.in - 1) - i);
  } else if (mode == circular) {
    visit(center - a.in);
    visit(center + a.in);
  } else if (mode == replicate) {
    if (i == 0)
      for (int64_t o = 0; o < a.before && o < a.out; ++o) f(o);
    if (i == a.in - 1)
      for (int64_t o = end > 0 ? end : 0; o < a.out; ++o) f(o);
  }
}

}  // namespace pyops::pad
