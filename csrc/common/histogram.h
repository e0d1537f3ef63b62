// Histograms of rows: which bins a value counts in, and for how much.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace pyops::histogram {

// The S values of each of M = N C channels; x: [N, C, S] or, channels_last, [N, S, C].
struct Rows {
  int64_t M, S, C;
  bool channels_last;

  PYOPS_HOST_DEVICE int64_t step() const { return channels_last ? C : 1; }
  PYOPS_HOST_DEVICE int64_t first(int64_t m) const { return channels_last ? m / C * C * S + m % C : m * S; }
  PYOPS_HOST_DEVICE int64_t row_of(int64_t e) const { return channels_last ? e / (C * S) * C + e % C : e / S; }
};

// A value counts `share` in `bin` and 1 - share in the next; bin -1: in none.
template <class A>
struct Place {
  int64_t bin;
  A share;
};

// edges[0] .. edges[bins] rise evenly. Whole: bin b holds edges[b] <= x < edges[b + 1], the last its end as well.
template <class A>
PYOPS_HOST_DEVICE Place<A> whole(A x, const A* edges, int64_t bins) {
  const A low = edges[0], high = edges[bins];
  if (!(x >= low && x <= high)) return {-1, A(1)};
  int64_t b = int64_t((x - low) / (high - low) * A(bins));
  if (b >= bins) b = bins - 1;
  // the quotient is rounded, the edges decide
  if (x < edges[b]) --b;
  if (b + 1 < bins && x >= edges[b + 1]) ++b;
  return {b, A(1)};
}

// Shared between the two bins whose centres it lies between, by its distance; beyond the outer centres it is whole.
template <class A>
PYOPS_HOST_DEVICE Place<A> shared(A x, const A* edges, int64_t bins) {
  const A low = edges[0], high = edges[bins];
  if (!(x >= low && x <= high)) return {-1, A(1)};
  // fused or not, the share is a small difference of large numbers: the same on every machine
  const A at = std::fma((x - low) / (high - low), A(bins), A(-0.5));
  if (!(at > 0)) return {0, A(1)};
  if (at >= A(bins - 1)) return {bins - 1, A(1)};
  const int64_t b = int64_t(at);
  return {b, 1 - (at - A(b))};
}

}  // namespace pyops::histogram
