// Sampling at the points of a grid, axis by axis: which elements a coordinate reads, their weights and their slopes.
// docs/math/resampling.md derives them.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace pyops::grid_sample {

#if !defined(__CUDACC__)
// of floats in float; CUDA's global functions are overloaded already
using std::floor, std::fmod, std::nearbyint;
#endif

enum Mode : int64_t { bilinear, nearest, bicubic, modes };
enum Padding : int64_t { zeros, border, reflection, paddings };

struct Rule {
  int64_t padding;
  bool align_corners;
};

// A position in elements, and its derivative in the coordinate of the grid.
template <class A>
struct Position {
  A at, slope;
};

// Coordinates run from -1 to 1 over the axis: between the centres of its ends, or between its corners.
template <class A>
PYOPS_HOST_DEVICE Position<A> unnormalized(A g, int64_t size, bool align_corners) {
  if (align_corners) return {(g + 1) / 2 * A(size - 1), A(size - 1) / 2};
  return {((g + 1) * A(size) - 1) / 2, A(size) / 2};
}

template <class A>
PYOPS_HOST_DEVICE Position<A> reflected(Position<A> p, int64_t size, bool align_corners) {
  const A low = align_corners ? A(0) : A(-0.5), span = A(align_corners ? size - 1 : size);
  if (span == 0) return {0, 0};
  A d = p.at - low;
  if (d < 0) d = -d, p.slope = -p.slope;
  const A flips = floor(d / span), rest = fmod(d, span);
  if (fmod(flips, A(2)) == 0) return {rest + low, p.slope};
  return {span - rest + low, -p.slope};
}

// NaN becomes 0. On the border and beyond it nothing changes with the coordinate.
template <class A>
PYOPS_HOST_DEVICE Position<A> clipped(Position<A> p, int64_t size) {
  const bool below = !(p.at > 0), above = !(p.at < A(size - 1));
  return {below ? A(0) : above ? A(size - 1) : p.at, below || above ? A(0) : p.slope};
}

template <class A>
PYOPS_HOST_DEVICE Position<A> padded(Position<A> p, int64_t size, const Rule& r) {
  if (r.padding == reflection) p = reflected(p, size, r.align_corners);
  return r.padding == zeros ? p : clipped(p, size);
}

// The element at a whole position; -1 outside the axis, which reads as 0.
template <class A>
PYOPS_HOST_DEVICE int32_t element(A at, int64_t size) {
  const A last = A(size - 1), low = at > 0 ? at : A(0), near = low < last ? low : last;
  return int32_t(near) | -int32_t(!(at >= 0) | !(at <= last));  // without a branch, which would go either way
}

// What one coordinate reads: 1 (nearest), 2 (linear) or 4 (cubic) elements.
template <class A, int T>
struct Taps {
  int32_t index[T];
  A weight[T], slope[T];
};

template <class A, int T>
PYOPS_HOST_DEVICE Taps<A, T> taps_of(A g, int64_t size, const Rule& r) {
  Taps<A, T> t;
  const Position<A> raw = unnormalized(g, size, r.align_corners);
  if constexpr (T == 4) {
    const A low = floor(raw.at), s = raw.at - low, a = A(-0.75);
    for (int k = 0; k < 4; ++k) {
      const A x = s - A(k - 1), d = x < 0 ? -x : x, sign = x < 0 ? A(-1) : A(1);
      // the outer taps lie at distances of 1 to 2, the inner ones at 0 to 1
      const bool inner = k == 1 || k == 2;
      t.weight[k] = inner ? ((a + 2) * d - (a + 3)) * d * d + 1 : ((d - 5) * d + 8) * d * a - 4 * a;
      t.slope[k] = sign * raw.slope * (inner ? (3 * (a + 2) * d - 2 * (a + 3)) * d : ((3 * d - 10) * d + 8) * a);
      t.index[k] = element(padded(Position<A>{low + A(k - 1), 0}, size, r).at, size);
    }
  } else {
    const Position<A> p = padded(raw, size, r);
    if constexpr (T == 1) {
      t.index[0] = element(A(nearbyint(p.at)), size), t.weight[0] = 1, t.slope[0] = 0;
    } else {
      const A low = floor(p.at), s = p.at - low;
      t.index[0] = element(low, size), t.weight[0] = 1 - s, t.slope[0] = -p.slope;
      t.index[1] = element(low + 1, size), t.weight[1] = s, t.slope[1] = p.slope;
    }
  }
  return t;
}

// x: [N, C, D, H, W] or, channels_last, [N, D, H, W, C] · grid: [N, P, dims] · y: [N, C, P] or [N, P, C]
struct Shape {
  int64_t N, C, D, H, W, P, dims;
  bool channels_last;
  Rule rule;

  PYOPS_HOST_DEVICE int64_t S() const { return D * H * W; }
  // distance of channels and of elements, in x and in y
  PYOPS_HOST_DEVICE int64_t x_channel() const { return channels_last ? 1 : S(); }
  PYOPS_HOST_DEVICE int64_t y_channel() const { return channels_last ? 1 : P; }
  PYOPS_HOST_DEVICE int64_t step() const { return channels_last ? C : 1; }
};

// add(tap, index in the plane or -1, weight, slopes along W, H, D) for every element that a point reads.
template <int T, class A, class F>
PYOPS_HOST_DEVICE void each_tap(const Shape& s, const A* g, F&& add) {
  const Taps<A, T> w = taps_of<A, T>(g[0], s.W, s.rule), h = taps_of<A, T>(g[1], s.H, s.rule);
  Taps<A, T> d;
  if (s.dims == 3) {
    d = taps_of<A, T>(g[2], s.D, s.rule);
  } else {
    d.index[0] = 0, d.weight[0] = 1, d.slope[0] = 0;
  }
  int tap = 0;
  for (int k = 0; k < (s.dims == 3 ? T : 1); ++k)
    for (int j = 0; j < T; ++j)
      for (int i = 0; i < T; ++i, ++tap) {
        const bool inside = d.index[k] >= 0 && h.index[j] >= 0 && w.index[i] >= 0;
        const int64_t at = inside ? (int64_t(d.index[k]) * s.H + h.index[j]) * s.W + w.index[i] : -1;
        const A plane = d.weight[k] * h.weight[j];
        add(tap, at, plane * w.weight[i], plane * w.slope[i], d.weight[k] * h.slope[j] * w.weight[i],
            d.slope[k] * h.weight[j] * w.weight[i]);
      }
}

}  // namespace pyops::grid_sample
