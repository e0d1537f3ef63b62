// Mean and variance that survive |mean| >> std: in blocks small enough for the first-level cache, part of a block gives
// a pivot and all of it the sums about the pivot; blocks are merged in double, in order. The blocks depend on the shape
// alone, so the result is the same for every number of threads.
#pragma once

#include "cpu/simd.h"

namespace pyops::PYOPS_CPU_CAPABILITY {

using blocking::block_elements;

struct Moments {
  double count = 0, sum = 0, m2 = 0;  // m2 = sum of (x - mean)^2

  double mean() const { return count > 0 ? sum / count : 0; }
  double variance() const { return count > 0 ? m2 / count : 0; }
  Moments& operator+=(const Moments& other) {
    if (other.count == 0) return *this;
    if (count == 0) return *this = other;
    double delta = other.sum / other.count - sum / count;
    m2 += other.m2 + delta * delta * (count * other.count / (count + other.count));
    sum += other.sum;
    count += other.count;
    return *this;
  }
};

// A mean to more digits than acc_t holds: (x - high) * rstd + low_shift(rstd) is exact where x - mean would not be.
template <class acc_t>
struct SplitMean {
  acc_t high, low;
  explicit SplitMean(double mean)
      : high(acc_t(mean)), low(std::isfinite(mean) ? acc_t(mean - double(high)) : acc_t(0)) {}
};

inline double reciprocal_std(double variance, double eps) { return 1 / std::sqrt(variance + eps); }

// One block: `runs` runs of n elements, `stride` apart, runs * n elements in all.
template <class scalar_t>
Moments block_moments(const scalar_t* __restrict__ x, int64_t runs, int64_t stride, int64_t n) {
  using acc_t = accumulate_t<scalar_t>;
  using V = Vec<acc_t>;
  if (runs * n == 0) return {};
  // Any pivot near the mean will do. The mean of an eighth costs an eighth of a pass and, however unlike the rest that
  // eighth is, at most three bits of the variance.
  const int64_t sampled_runs = runs > 8 ? ceil_div(runs, 8) : 1, sampled = sampled_runs > 1 ? n : ceil_div(runs * n, 8);
  const int64_t sampled_n = sampled < n ? sampled : n;
  RunningTotals<acc_t, 1> total;
  for (int64_t r = 0; r < sampled_runs; ++r)
    total.add(sampled_n, [&](int64_t i, auto lanes, auto& t) { t[0] += V::load(x + r * stride + i, lanes); });
  const double count = double(runs * n);
  const acc_t pivot = acc_t(total.sum(0) / double(sampled_runs * sampled_n));
  if (!std::isfinite(pivot)) return {count, double(pivot) * count, NAN};

  RunningTotals<acc_t, 2> about;
  const V p(pivot);
  for (int64_t r = 0; r < runs; ++r)
    about.add(n, [&](int64_t i, auto lanes, auto& t) {
      V d = keep(V::load(x + r * stride + i, lanes) - p, lanes);
      t[0] += d;
      t[1] = fma(d, d, t[1]);
    });
  const double first = about.sum(0), second = about.sum(1);
  const double m2 = second - first * first / count;
  return {count, double(pivot) * count + first, m2 < 0 ? 0 : m2};
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY
