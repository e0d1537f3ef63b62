// pad · CPU
//   y[n,o0,o1,o2,k] = x[n,i0,i1,i2,k],  i = source(o) axis by axis, or the constant;  dx sums dy over the o of each i
// layout   x: [N, A0, A1, A2, K] · y: [N, B0, B1, B2, K], row-major
// mapping  a thread takes rows (n, o0, o1) of y, or (n, i0, i1) of dx; K is 1, or the channels of channels_last
// memory   x read once, y written once; the inside of a row is one copy
// numerics dx in acc_t, rows and then columns in a fixed order
#include <cstring>

#include "common/pad_binding.h"
#include "common/registry.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace pyops::PYOPS_CPU_CAPABILITY {

using namespace pad;

// ---- kernels

// Elements that one thread should have at least.
inline int64_t row_grain(int64_t row) { return ceil_div(16384, std::max<int64_t>(row, 1)); }

// The part of a row of y that is the inside of x: [first, last) of y.
struct Inside {
  int64_t first, last;
  explicit Inside(const Axis& a)
      : first(std::min(std::max<int64_t>(a.before, 0), a.out)),
        last(std::max(std::min(a.before + a.in, a.out), first)) {}
};

// f(row, n, d0, d1) for the rows [begin, end) of [N, size0, size1]: counted, not divided.
template <class F>
PYOPS_INLINE void each_row(int64_t begin, int64_t end, int64_t size0, int64_t size1, F&& f) {
  int64_t d1 = begin % size1, d0 = begin / size1 % size0, n = begin / size1 / size0;
  for (int64_t row = begin; row < end; ++row) {
    f(row, n, d0, d1);
    if (++d1 == size1) {
      d1 = 0;
      if (++d0 == size0) d0 = 0, ++n;
    }
  }
}

// Rows are often short: a call of memmove costs as much as copying some hundred bytes.
template <class T>
PYOPS_INLINE void copy_run(const T* from, T* to, int64_t n) {
  constexpr int64_t step = 32 / int64_t(sizeof(T));
  if (n < step || n > 32 * step) {
    std::copy(from, from + n, to);
    return;
  }
  for (int64_t i = 0; i + step <= n; i += step) std::memcpy(static_cast<void*>(to + i), from + i, 32);
  std::memcpy(static_cast<void*>(to + n - step), from + n - step, 32);
}

// to[o] = from[source(o)] for o in [begin, end), K elements each.
template <class T>
PYOPS_INLINE void copy_edge(const T* from, T* to, const Axis& a, int64_t mode, T value, int64_t K, int64_t begin,
                            int64_t end) {
  for (int64_t o = begin; o < end; ++o) {
    const int64_t i = source(mode, a, o);
    if (K == 1)
      to[o] = i < 0 ? value : from[i];
    else if (i < 0)
      std::fill(to + o * K, to + (o + 1) * K, value);
    else
      std::copy(from + i * K, from + (i + 1) * K, to + o * K);
  }
}

template <class T>
void pad_fwd_rows(const T* x, T* y, const Shape& s, int64_t mode, T value) {
  const Axis a0 = s.axis[0], a1 = s.axis[1], a2 = s.axis[2];
  const Inside inside(a2);
  const int64_t K = s.K;
  parallel_for(s.N * a0.out * a1.out, row_grain(a2.out * K), [&](int64_t begin, int64_t end) {
    each_row(begin, end, a0.out, a1.out, [&](int64_t row, int64_t n, int64_t o0, int64_t o1) {
      const int64_t i0 = source(mode, a0, o0), i1 = source(mode, a1, o1);
      T* to = y + row * a2.out * K;
      if (i0 < 0 || i1 < 0) {
        std::fill(to, to + a2.out * K, value);
        return;
      }
      const T* from = x + ((n * a0.in + i0) * a1.in + i1) * a2.in * K;
      copy_edge(from, to, a2, mode, value, K, 0, inside.first);
      copy_run(from + (inside.first - a2.before) * K, to + inside.first * K, (inside.last - inside.first) * K);
      copy_edge(from, to, a2, mode, value, K, inside.last, a2.out);
    });
  });
}

// One element of y reads one of x at most: dx is a piece of dy, and zero where x was cut off.
template <class T>
void pad_bwd_constant(const T* dy, T* dx, const Shape& s) {
  const Axis a0 = s.axis[0], a1 = s.axis[1], a2 = s.axis[2];
  const Inside inside(a2);
  const int64_t K = s.K, width = a2.in * K;
  const int64_t first = (inside.first - a2.before) * K, last = (inside.last - a2.before) * K;
  parallel_for(s.N * a0.in * a1.in, row_grain(width), [&](int64_t begin, int64_t end) {
    each_row(begin, end, a0.in, a1.in, [&](int64_t row, int64_t n, int64_t i0, int64_t i1) {
      const int64_t o0 = i0 + a0.before, o1 = i1 + a1.before;
      T* to = dx + row * width;
      if (o0 < 0 || o0 >= a0.out || o1 < 0 || o1 >= a1.out || first >= last) {
        std::fill(to, to + width, T(0));
        return;
      }
      const T* from = dy + (((n * a0.out + o0) * a1.out + o1) * a2.out + inside.first) * K;
      std::fill(to, to + first, T(0));
      copy_run(from, to + first, last - first);
      std::fill(to + last, to + width, T(0));
    });
  });
}

template <class T>
void pad_bwd_rows(const T* dy, T* dx, const Shape& s, int64_t mode) {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  const Axis &a0 = s.axis[0], &a1 = s.axis[1], &a2 = s.axis[2];
  const Inside inside(a2);
  const int64_t K = s.K, width = a2.in * K;
  parallel_for(s.N * a0.in * a1.in, row_grain(width), [&](int64_t begin, int64_t end) {
    Buffer<A> sum(width);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t i1 = row % a1.in, plane = row / a1.in, i0 = plane % a0.in, n = plane / a0.in;
      std::fill(sum.get(), sum.get() + width, A(0));
      each_target(mode, a0, i0, [&](int64_t o0) {
        each_target(mode, a1, i1, [&](int64_t o1) {
          const T* from = dy + ((n * a0.out + o0) * a1.out + o1) * a2.out * K;
          const T* middle = from + inside.first * K;
          A* into = sum.get() + (inside.first - a2.before) * K;
          each_vector<A>((inside.last - inside.first) * K, [&](int64_t i, auto lanes) {
            (V::load(into + i, lanes) + V::load(middle + i, lanes)).store(into + i, lanes);
          });
          const auto edge = [&](int64_t o) {
            const int64_t i = source(mode, a2, o);
            if (i < 0) return;
            for (int64_t k = 0; k < K; ++k) sum.get()[i * K + k] += A(from[o * K + k]);
          };
          for (int64_t o = 0; o < inside.first; ++o) edge(o);
          for (int64_t o = inside.last; o < a2.out; ++o) edge(o);
        });
      });
      T* to = dx + row * width;
      each_vector<A>(width, [&](int64_t i, auto lanes) { V::load(sum.get() + i, lanes).store(to + i, lanes); });
    }
  });
}

// ---- binding

Tensor pad_fwd(const Tensor& x, std::vector<int64_t> before, std::vector<int64_t> sizes, int64_t mode, double value) {
  OpScope op("pad_fwd", x);
  const Shape s = shape_of(op, x, before, sizes, mode, true);
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    Tensor y = empty_y(op, s, scalar_type_of<T>);
    pad_fwd_rows(in_x<T>(op, x, s), out_y<T>(op, y, s), s, mode, T(accumulate_t<T>(value)));
    return y;
  });
}

Tensor pad_bwd(const Tensor& dy, std::vector<int64_t> before, std::vector<int64_t> sizes, int64_t mode) {
  OpScope op("pad_bwd", dy);
  const Shape s = shape_of(op, dy, before, sizes, mode, false);
  return dispatch_floating(op, dy.scalar_type(), [&]<class T>() {
    Tensor dx = empty_x(op, s, scalar_type_of<T>);
    if (mode == constant)
      pad_bwd_constant(in_y<T>(op, dy, s), out_x<T>(op, dx, s), s);
    else
      pad_bwd_rows(in_y<T>(op, dy, s), out_x<T>(op, dx, s), s, mode);
    return dx;
  });
}

PYOPS_LIBRARY(m) {
  PYOPS_IMPL(m, pad_fwd);
  PYOPS_IMPL(m, pad_bwd);
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY
