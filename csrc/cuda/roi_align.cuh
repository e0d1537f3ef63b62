// What the kernels of roi_align share: the maps, where a RoI lies, and the mean over a bin, wherever its pixels are.
#pragma once

#include "cuda/device.cuh"

#include "common/roi.h"

namespace pyops::roi {

inline constexpr int max_levels = 5;

template <class T>
struct Maps {
  T* x[max_levels];
  int64_t H[max_levels], W[max_levels];
  int count;
};

struct Shape {
  int64_t N, C, R, P, Q, sampling_ratio;
  bool aligned;
};

struct Place {
  int64_t image;
  int level;
};

template <class A>
PYOPS_DEVICE Place place_of(const A* rois, const int64_t* levels, int64_t r, const Shape& s, int count) {
  const int64_t level = levels != nullptr ? levels[r] : 0, image = image_of(rois[r * 5], s.N);
  if (image < 0 || level < 0 || level >= count) __trap();  // what is no image must never become an address
  return {image, static_cast<int>(level)};
}

template <class A>
PYOPS_DEVICE Axis<A> y_axis(const A* rois, int64_t r, const Shape& s, int64_t H) {
  return Axis<A>(rois[r * 5 + 2], rois[r * 5 + 4], s.P, H, s.sampling_ratio, s.aligned);
}
template <class A>
PYOPS_DEVICE Axis<A> x_axis(const A* rois, int64_t r, const Shape& s, int64_t W) {
  return Axis<A>(rois[r * 5 + 1], rois[r * 5 + 3], s.Q, W, s.sampling_ratio, s.aligned);
}

// V channels of a pixel, in the type of sums: next to each other, or a plane apart, then `count` of them.
enum class Memory { map, tile };

template <Memory M, int V, bool ChannelsLast, class T, class Index>
PYOPS_DEVICE Vec<accumulate_t<T>, V> channels_at(const T* p, Index plane, int count) {
  Vec<accumulate_t<T>, V> found{};
  if constexpr (ChannelsLast) {
    Vec<T, V> v;
    if constexpr (M == Memory::map)
      v = load_vec_readonly<V>(p);
    else
      v = load_vec<V>(p);
#pragma unroll
    for (int k = 0; k < V; ++k) found[k] = to_acc(v[k]);
  } else {
#pragma unroll
    for (int k = 0; k < V; ++k)
      if (k < count) {
        if constexpr (M == Memory::map)
          found[k] = to_acc(__ldg(p + k * plane));
        else
          found[k] = to_acc(p[k * plane]);
      }
  }
  return found;
}

// Mean over the samples of bin (p, q) at V channels; load(y, x) gives their values at a pixel. Y, X: an Axis, or what
// is read like one.
template <int V, class A, template <class> class Y, template <class> class X, class Load>
PYOPS_DEVICE Vec<A, V> bin_mean(const Y<A>& y, const X<A>& x, typename Y<A>::index p, typename Y<A>::index q,
                                const Load& load) {
  using Index = typename Y<A>::index;
  Vec<A, V> sum{};
  Index y_first, y_last, x_first, x_last;
  y.samples(p, y_first, y_last);
  x.samples(q, x_first, x_last);
#pragma unroll 1
  for (Index i = y_first; i < y_last; ++i) {
    Index y0, y1;
    A ty;
    if (!y.sample(p, i, y0, y1, ty)) continue;
#pragma unroll 1
    for (Index j = x_first; j < x_last; ++j) {
      Index x0, x1;
      A tx;
      if (!x.sample(q, j, x0, x1, tx)) continue;
      const Vec<A, V> a = load(y0, x0), b = load(y0, x1), d = load(y1, x0), e = load(y1, x1);
      const A w0 = (A(1) - ty) * (A(1) - tx), w1 = (A(1) - ty) * tx, w2 = ty * (A(1) - tx), w3 = ty * tx;
#pragma unroll
      for (int k = 0; k < V; ++k) sum[k] += w0 * a[k] + w1 * b[k] + w2 * d[k] + w3 * e[k];
    }
  }
  const Index samples = y.grid * x.grid;
  const A inverse = quotient(A(1), static_cast<A>(samples > 0 ? samples : 1));
#pragma unroll
  for (int k = 0; k < V; ++k) sum[k] *= inverse;
  return sum;
}

}  // namespace pyops::roi
