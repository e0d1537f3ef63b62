// Which pixels belong to a bin of a pooled RoI: shared by the CPU and CUDA kernels. Coordinates are rounded pixels.
//
//   max    length = max(to - from + 1, 1), pixels [floor(p length / P), ceil((p + 1) length / P)) + from, cut at the
//   map mean   length = max(to - from, 1), likewise, cut at the last pixel (excluded), as torchvision's ps_roi_pool
#pragma once

#include <cmath>

#include "common/host_device.h"
#include "common/quotient.h"

#if defined(__CUDACC__)
#define PYOPS_BINS PYOPS_HOST_DEVICE
#else
// Compiled for several instruction sets: it must not survive as a symbol that one build lends another.
#define PYOPS_BINS inline __attribute__((always_inline))
#endif

namespace pyops::pool {

template <class A>
struct Bins {
  int64_t from, limit, bins;
  A size;

  PYOPS_BINS Bins(int64_t first, int64_t last, int64_t count, int64_t pixels, bool mean) : from(first), bins(count) {
    const int64_t length = last - first + (mean ? 0 : 1);
    size = quotient(static_cast<A>(length > 1 ? length : 1), static_cast<A>(count));
    limit = mean ? (pixels > 0 ? pixels - 1 : 0) : pixels;
  }

  PYOPS_BINS static int64_t floor_of(A v) {
    const int64_t t = static_cast<int64_t>(v);
    return static_cast<A>(t) > v ? t - 1 : t;
  }
  PYOPS_BINS static int64_t ceil_of(A v) {
    const int64_t t = static_cast<int64_t>(v);
    return static_cast<A>(t) < v ? t + 1 : t;
  }
  PYOPS_BINS int64_t cut(int64_t v) const { return v < 0 ? 0 : (v > limit ? limit : v); }

  PYOPS_BINS void range(int64_t p, int64_t& first, int64_t& last) const {
    first = cut(floor_of(static_cast<A>(p) * size) + from);
    last = cut(ceil_of(static_cast<A>(p + 1) * size) + from);
  }

  // Bins that may hold a pixel: first <= p < last; callers look again with range.
  PYOPS_BINS void holding(int64_t pixel, int64_t& first, int64_t& last) const {
    const A at = static_cast<A>(pixel - from);
    const A a = quotient(at - A(1), size) - A(1), b = quotient(at + A(1), size) + A(2), n = static_cast<A>(bins);
    first = a > A(0) ? (a < n ? static_cast<int64_t>(a) : bins) : 0;
    last = b > A(0) ? (b < n ? static_cast<int64_t>(b) : bins) : 0;
  }

  PYOPS_BINS bool touches(int64_t low, int64_t high) const {
    const int64_t end = from + ceil_of(static_cast<A>(bins) * size);
    return from <= high && end > low;
  }
};

}  // namespace pyops::pool
