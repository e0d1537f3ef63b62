// Where a RoI is sampled: shared by every RoI kernel.
//
// Bilinear sampling on a grid is a product of two one-dimensional samplings, so an axis stands alone. Along it bin p of
// P takes `grid` samples at start + p bin + (i + 1/2) bin / grid; a sample in [-1, size] is clamped to [0, size - 1]
// and shared by its two neighbours, any other contributes nothing. Positions that are not finite have no samples.
#pragma once

#include "common/host_device.h"
#include "common/quotient.h"

#if defined(__CUDACC__)
#define PYOPS_ROI PYOPS_HOST_DEVICE
#else
// Compiled for several instruction sets: it must not survive as a symbol that one build lends another.
#define PYOPS_ROI inline __attribute__((always_inline))
#endif

namespace pyops::roi {

template <class A>
PYOPS_ROI A whole(A v) {  // floor, for |v| small enough to be an int64_t
  const A t = static_cast<A>(static_cast<int64_t>(v));
  return t > v ? t - A(1) : t;
}

template <class A>
struct Axis {
  using index = int64_t;
  A start, bin;
  int64_t grid;  // samples per bin, 0 for none
  int64_t size;  // pixels

  // from, to: the RoI's sides in pixels of this map.
  PYOPS_ROI Axis(A from, A to, int64_t bins, int64_t pixels, int64_t sampling_ratio, bool aligned) {
    const A offset = aligned ? A(0.5) : A(0);
    start = from - offset;
    A length = (to - offset) - start;
    const bool finite = length - length == A(0) && start - start == A(0);
    if (!aligned) length = length > A(1) ? length : A(1);
    bin = quotient(length, static_cast<A>(bins));
    size = pixels;
    grid = sampling_ratio;
    if (sampling_ratio <= 0) {
      const A wanted = bin < A(1e9) ? bin : A(1e9);
      const A floor = wanted > A(0) ? whole(wanted) : A(0);
      grid = static_cast<int64_t>(floor) + (wanted > floor ? 1 : 0);
    }
    if (!finite) grid = 0;
  }

  PYOPS_ROI A position(int64_t p, int64_t i) const {
    return start + static_cast<A>(p) * bin + quotient((static_cast<A>(i) + A(0.5)) * bin, static_cast<A>(grid));
  }

  // The samples of bin p that may lie in [low, high] are first <= i < last; callers look again at each. All where
  // bins are so extreme that the quotient below would not be exact; but none of the 1e9 of an adaptive grid, of which
  // one or two would lie there and weigh 1e-9.
  PYOPS_ROI void samples(int64_t p, A low, A high, int64_t& first, int64_t& last) const {
    first = 0;
    last = grid;
    if (bin >= A(1e30) && grid > (int64_t{1} << 24)) last = 0;
    if (!(bin > A(1e-10) && bin < A(1e30)) || grid < 8) return;
    const A scale = quotient(static_cast<A>(grid), bin), base = start + static_cast<A>(p) * bin,
            g = static_cast<A>(grid);
    A a = (low - base) * scale - A(2), b = (high - base) * scale + A(2);
    a = a > A(0) ? (a < g ? a : g) : A(0);
    b = b > A(0) ? (b < g ? b : g) : A(0);
    first = static_cast<int64_t>(a);
    last = static_cast<int64_t>(b);
  }
  PYOPS_ROI void samples(int64_t p, int64_t& first, int64_t& last) const {
    samples(p, A(-1), static_cast<A>(size), first, last);
  }

  // Neighbours and the share of the upper one; false where the sample contributes nothing.
  PYOPS_ROI bool neighbours(A position, int64_t& low, int64_t& high, A& share) const {
    if (!(position >= A(-1) && position <= static_cast<A>(size)) || size == 0) return false;
    const A inside = position > A(0) ? position : A(0);
    low = static_cast<int64_t>(inside);
    share = inside - static_cast<A>(low);
    high = low + 1;
    if (low >= size - 1) {
      low = high = size - 1;
      share = A(0);
    }
    return true;
  }

  // Neighbours of sample i of bin p, likewise.
  PYOPS_ROI bool sample(int64_t p, int64_t i, int64_t& low, int64_t& high, A& share) const {
    return neighbours(position(p, i), low, high, share);
  }

  // Weight of one pixel in the mean over bin p.
  PYOPS_ROI A weight(int64_t p, int64_t pixel) const {
    int64_t first, last;
    samples(p, static_cast<A>(pixel) - A(1), static_cast<A>(pixel) + A(1), first, last);
    A sum = 0;
    for (int64_t i = first; i < last; ++i) {
      int64_t low, high;
      A share;
      if (!sample(p, i, low, high, share)) continue;
      if (low == pixel) sum += A(1) - share;
      if (high == pixel) sum += share;
    }
    return quotient(sum, static_cast<A>(grid > 0 ? grid : 1));
  }
};

// The image a RoI belongs to, or -1: what is no index of an image must never become an address.
template <class A>
PYOPS_ROI int64_t image_of(A index, int64_t images) {
  return index >= A(0) && index < static_cast<A>(images) ? static_cast<int64_t>(index) : -1;
}

}  // namespace pyops::roi
