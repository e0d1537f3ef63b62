// interpolate · CPU
//   y[n,o0,o1,o2,k] = sum of w0(o0,i0) w1(o1,i1) w2(o2,i2) x[n,i0,i1,i2,k];  dx by the transposed tables of weights
// layout   x: [N, A0, A1, A2, K] · y: [N, B0, B1, B2, K], row-major; K is 1, or the channels of channels_last
// mapping  a thread takes rows (n, o0, o1) of y: the rows of x that it reads are added in vectors, then the sum is
//          resampled along the row
// memory   x from the caches where outputs share it, y written once
// numerics weights computed in double; sums in acc_t, in the order of the inputs
#include <cstring>

#include "common/interpolate_binding.h"
#include "common/registry.h"
#include "cpu/parallel.h"
#include "cpu/resampling.h"

namespace pyops::PYOPS_CPU_CAPABILITY {

using namespace interpolate;

// ---- kernels

template <class A>
struct Tables {
  Table<A> d, h, w;

  Tables(const Shape& s, bool transpose)
      : d(made(s.axis[0], transpose)), h(made(s.axis[1], transpose)), w(made(s.axis[2], transpose)) {}
  bool copies() const { return d.copies() && h.copies() && w.copies(); }

 private:
  static Table<A> made(const Axis& a, bool transpose) {
    return transpose ? transposed(table_of<A>(a)) : table_of<A>(a);
  }
};

// Outputs that one thread should have at least.
inline int64_t resample_grain(int64_t row) { return ceil_div(8192, std::max<int64_t>(row, 1)); }

// One row of x and its weight in a row of y.
template <class T, class A>
struct Source {
  const T* row;
  A weight;
};

// sum[i] = sum over the sources of weight * row[i]
template <class T, class A, class Out>
PYOPS_INLINE void add_rows(const std::vector<Source<T, A>>& sources, Out* sum, int64_t n) {
  using V = Vec<A>;
  constexpr int64_t W = V::width;
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    V a, b, c, d;
    for (const auto& s : sources) {
      const V w(s.weight);
      a = fma(w, V::load(s.row + i), a), b = fma(w, V::load(s.row + i + W), b);
      c = fma(w, V::load(s.row + i + 2 * W), c), d = fma(w, V::load(s.row + i + 3 * W), d);
    }
    a.store(sum + i), b.store(sum + i + W), c.store(sum + i + 2 * W), d.store(sum + i + 3 * W);
  }
  each_vector<A>(n - i, [&](int64_t j, auto lanes) {
    V a;
    for (const auto& s : sources) a = fma(V(s.weight), V::load(s.row + i + j, lanes), a);
    a.store(sum + i + j, lanes);
  });
}

template <class T, class A>
void resample(const T* x, T* y, int64_t N, int64_t K, const Tables<A>& t) {
  const int64_t in_row = t.w.in * K, out_row = t.w.out * K, rows = t.d.out * t.h.out;
  const bool as_is = t.w.identity();
  const RowTable<A> across(t.w, K);
  parallel_for(N * rows, resample_grain(out_row), [&](int64_t begin, int64_t end) {
    Buffer<A> sum(as_is ? 0 : in_row);
    std::vector<Source<T, A>> sources;
    for (int64_t r = begin; r < end; ++r) {
      const int64_t n = r / rows, o0 = r % rows / t.h.out, o1 = r % t.h.out;
      T* to = y + r * out_row;
      sources.clear();
      for (int64_t j0 = 0; j0 < t.d.count(o0); ++j0)
        for (int64_t j1 = 0; j1 < t.h.count(o1); ++j1)
          sources.push_back({x + ((n * t.d.in + t.d.first[o0] + j0) * t.h.in + t.h.first[o1] + j1) * in_row,
                             t.d.weight[t.d.start[o0] + j0] * t.h.weight[t.h.start[o1] + j1]});
      if (as_is) {
        add_rows(sources, to, out_row);
        continue;
      }
      const A* from = sum.get();
      if constexpr (std::is_same_v<T, A>)
        if (sources.size() == 1 && sources[0].weight == A(1)) from = sources[0].row;
      if (from == sum.get()) add_rows(sources, sum.get(), in_row);
      across.run(from, to);
    }
  });
}

// Each output is one of the inputs: an exact copy, of any type.
template <class T>
void copy_nearest(const T* x, T* y, int64_t N, int64_t K, const Tables<float>& t) {
  const int64_t in_row = t.w.in * K, out_row = t.w.out * K, rows = t.d.out * t.h.out;
  const bool as_is = t.w.identity();
  const RowTable<float> across(t.w, K);
  parallel_for(N * rows, resample_grain(out_row), [&](int64_t begin, int64_t end) {
    const T* last = nullptr;
    for (int64_t r = begin; r < end; ++r) {
      const int64_t n = r / rows, o0 = r % rows / t.h.out, o1 = r % t.h.out;
      const T* from = x + ((n * t.d.in + t.d.first[o0]) * t.h.in + t.h.first[o1]) * in_row;
      T* to = y + r * out_row;
      if (as_is) {
        std::memcpy(static_cast<void*>(to), from, size_t(out_row) * sizeof(T));
      } else if (from == last) {
        std::memcpy(static_cast<void*>(to), to - out_row, size_t(out_row) * sizeof(T));
      } else if (K >= Vec<float>::width) {
        for (int64_t o = 0; o < t.w.out; ++o)
          std::memcpy(static_cast<void*>(to + o * K), from + t.w.first[o] * K, size_t(K) * sizeof(T));
      } else if constexpr (std::is_same_v<T, float>) {
        across.run(from, to);
      } else {
        for (int64_t o = 0; o < t.w.out; ++o)
          for (int64_t k = 0; k < K; ++k) to[o * K + k] = from[t.w.first[o] * K + k];
      }
      last = from;
    }
  });
}

// ---- binding

Tensor interpolate_fwd(const Tensor& x, std::vector<int64_t> size, int64_t mode, bool align_corners, double scale_d,
                       double scale_h, double scale_w) {
  OpScope op("interpolate_fwd", x);
  const Shape s = shape_of(op, x, size, mode, align_corners, {scale_d, scale_h, scale_w}, true);
  const auto copy = [&]<class T>() {
    Tensor y = empty_y(op, s, scalar_type_of<T>);
    copy_nearest(in_x<T>(op, x, s), out_y<T>(op, y, s), s.N, s.K, Tables<float>(s, false));
    return y;
  };
  if (mode <= nearest_exact && x.scalar_type() == ScalarType::Byte) return copy.template operator()<uint8_t>();
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    if (mode <= nearest_exact) return copy.template operator()<T>();
    Tensor y = empty_y(op, s, scalar_type_of<T>);
    resample(in_x<T>(op, x, s), out_y<T>(op, y, s), s.N, s.K, Tables<accumulate_t<T>>(s, false));
    return y;
  });
}

Tensor interpolate_bwd(const Tensor& dy, std::vector<int64_t> size, int64_t mode, bool align_corners, double scale_d,
                       double scale_h, double scale_w) {
  OpScope op("interpolate_bwd", dy);
  const Shape s = shape_of(op, dy, size, mode, align_corners, {scale_d, scale_h, scale_w}, false);
  return dispatch_floating(op, dy.scalar_type(), [&]<class T>() {
    Tensor dx = empty_x(op, s, scalar_type_of<T>);
    resample(in_y<T>(op, dy, s), out_x<T>(op, dx, s), s.N, s.K, Tables<accumulate_t<T>>(s, true));
    return dx;
  });
}

PYOPS_LIBRARY(m) {
  PYOPS_IMPL(m, interpolate_fwd);
  PYOPS_IMPL(m, interpolate_bwd);
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY
