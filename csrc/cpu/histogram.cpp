// histogram · CPU
//   y[m,b] = sum over s of weight(x[m,s], b): 1 in the bin that holds x, or shared by distance between the two bins
//            whose centres x lies between;  dx[m,s] = (dy[m,b+1] - dy[m,b]) / width between the centres of b and b + 1
// layout   x: the M = N C rows of [N, C, S] or, channels_last, of [N, S, C] · edges: [B + 1] in acc_t
//          y: [M, B], int64 where whole
// mapping  a thread takes chunks of a row, whose counts are added in order
// memory   x read once; B counts a chunk
// numerics whole counts are exact; shares are summed in double
#include "common/histogram.h"

#include <type_traits>

#include "common/histogram_binding.h"
#include "common/registry.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace pyops::PYOPS_CPU_CAPABILITY {

using namespace histogram;

// ---- kernels

inline constexpr int64_t chunk = 1 << 16;

// C: int64_t counts whole values, double sums shares.
template <class C, class T, class A, class Y>
void count(const T* x, const A* edges, Y* y, const Rows& r, int64_t B) {
  const int64_t chunks = ceil_div(r.S, chunk), step = r.step();
  Buffer<C> part(r.M * chunks * B, C(0));
  parallel_for(r.M * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % chunks * chunk, n = std::min(chunk, r.S - first);
      const T* from = x + r.first(i / chunks) + first * step;
      C* to = part.get() + i * B;
      for (int64_t s = 0; s < n; ++s) {
        if constexpr (std::is_integral_v<C>) {
          const Place<A> p = whole(A(from[s * step]), edges, B);
          if (p.bin >= 0) ++to[p.bin];
        } else {
          const Place<A> p = shared(A(from[s * step]), edges, B);
          if (p.bin < 0) continue;
          to[p.bin] += C(p.share);
          if (p.bin + 1 < B) to[p.bin + 1] += C(1 - p.share);
        }
      }
    }
  });
  for (int64_t m = 0; m < r.M; ++m)
    for (int64_t b = 0; b < B; ++b) {
      C total = 0;
      for (int64_t j = 0; j < chunks; ++j) total += part[(m * chunks + j) * B + b];
      if constexpr (std::is_integral_v<C>)
        y[m * B + b] = total;
      else
        y[m * B + b] = Y(A(total));
    }
}

template <class T, class A>
void count_bwd(const T* dy, const T* x, const A* edges, T* dx, const Rows& r, int64_t B) {
  const A per_width = A(B) / (edges[B] - edges[0]);
  parallel_for(r.M * r.S, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Place<A> p = shared(A(x[i]), edges, B);
      const T* of = dy + r.row_of(i) * B + p.bin;
      dx[i] = T(p.bin >= 0 && p.share < 1 ? (A(of[1]) - A(of[0])) * per_width : A(0));
    }
  });
}

// ---- binding

Tensor histogram_fwd(const Tensor& x, const Tensor& edges, bool soft, bool channels_last) {
  OpScope op("histogram_fwd", x);
  const auto [N, C, B, r] = histogram::sizes_of(op, x, edges, channels_last);
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    using A = accumulate_t<T>;
    Tensor y = soft ? op.empty<T>({N, C, B}) : op.empty<int64_t>({N, C, B});
    const T* px = op.in<T>(x, "x", ShapeRef(x));
    const A* at = op.in<A>(edges, "edges", {B + 1});
    if (soft)
      count<double>(px, at, op.out<T>(y, "y", {N, C, B}), r, B);
    else
      count<int64_t>(px, at, op.out<int64_t>(y, "y", {N, C, B}), r, B);
    return y;
  });
}

Tensor histogram_bwd(const Tensor& dy, const Tensor& x, const Tensor& edges, bool channels_last) {
  OpScope op("histogram_bwd", x);
  const auto [N, C, B, r] = histogram::sizes_of(op, x, edges, channels_last);
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    using A = accumulate_t<T>;
    Tensor dx = op.empty<T>(ShapeRef(x));
    count_bwd(op.in<T>(dy, "dy", {N, C, B}), op.in<T>(x, "x", ShapeRef(x)), op.in<A>(edges, "edges", {B + 1}),
              op.out<T>(dx, "dx", ShapeRef(x)), r, B);
    return dx;
  });
}

PYOPS_LIBRARY(m) {
  PYOPS_IMPL(m, histogram_fwd);
  PYOPS_IMPL(m, histogram_bwd);
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY
