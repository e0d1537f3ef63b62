// pixel_shuffle · CPU
//   shuffled[n, c, h r + i, w r + j] = spread[n, c r² + i r + j, h, w]; either way round, which are each other's
//   gradient
// layout   spread: [N, C r², H, W], shuffled: [N, C, H r, W r]; channels_last: [N, H, W, C r²] and [N, H r, W r, C]
// mapping  a thread takes rows of the shuffled image, each of which meets r rows of the other
// memory   read once, written once
#include "common/registry.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace pyops::PYOPS_CPU_CAPABILITY {

// ---- kernels

struct Shuffle {
  int64_t N, C, H, W, r;  // of the spread image: C r² channels, H by W
};

// A row of W r elements against r rows of W.
template <bool inverse, int fixed, class T>
PYOPS_INLINE void interleave(const T* __restrict__ from, T* __restrict__ to, int64_t W, int64_t apart, int64_t any) {
  const int64_t r = fixed ? fixed : any;
  for (int64_t w = 0; w < W; ++w)
    for (int64_t j = 0; j < r; ++j) {
      if constexpr (inverse)
        to[j * apart + w] = from[w * r + j];
      else
        to[w * r + j] = from[j * apart + w];
    }
}

template <bool inverse, class T>
void shuffle_planes(const T* x, T* y, const Shuffle& s) {
  const int64_t r = s.r, plane = s.H * s.W;
  parallel_for(s.N * s.C * s.H * r, ceil_div(16384, std::max<int64_t>(s.W * r, 1)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t i = row % r, h = row / r % s.H, nc = row / r / s.H;
      const int64_t spread = (nc * r * r + i * r) * plane + h * s.W, shuffled = row * s.W * r;
      const T* from = x + (inverse ? shuffled : spread);
      T* to = y + (inverse ? spread : shuffled);
      if (r == 2)
        interleave<inverse, 2>(from, to, s.W, plane, r);
      else if (r == 3)
        interleave<inverse, 3>(from, to, s.W, plane, r);
      else if (r == 4)
        interleave<inverse, 4>(from, to, s.W, plane, r);
      else
        interleave<inverse, 0>(from, to, s.W, plane, r);
    }
  });
}

template <bool inverse, class T>
void shuffle_channels(const T* x, T* y, const Shuffle& s) {
  const int64_t r = s.r, q = r * r;
  parallel_for(s.N * s.H, ceil_div(16384, std::max<int64_t>(s.W * s.C * q, 1)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t i = 0; i < r; ++i)
        for (int64_t w = 0; w < s.W; ++w)
          for (int64_t j = 0; j < r; ++j) {
            const int64_t spread = (row * s.W + w) * s.C * q + i * r + j;
            const int64_t shuffled = ((row * r + i) * s.W * r + w * r + j) * s.C;
            const T* from = x + (inverse ? shuffled : spread);
            T* to = y + (inverse ? spread : shuffled);
            for (int64_t c = 0; c < s.C; ++c) {
              if constexpr (inverse)
                to[c * q] = from[c];
              else
                to[c] = from[c * q];
            }
          }
  });
}

// ---- binding

Tensor pixel_shuffle_fwd(const Tensor& x, int64_t factor, bool inverse, bool channels_last) {
  OpScope op("pixel_shuffle_fwd", x);
  op.check(x.dim() == 4, "x must have 4 dimensions");
  op.check(factor > 0 && factor < (1 << 15), "factor must be in [1, 2^15), got ", factor);
  const int64_t r = factor, q = r * r, c = channels_last ? 3 : 1, h = channels_last ? 1 : 2;
  const Shuffle s{x.size(0), inverse ? x.size(c) : x.size(c) / q, inverse ? x.size(h) / r : x.size(h),
                  inverse ? x.size(h + 1) / r : x.size(h + 1), r};
  const int64_t C = inverse ? s.C : s.C * q, H = inverse ? s.H * r : s.H, W = inverse ? s.W * r : s.W;
  op.check(x.size(c) == C && x.size(h) == H && x.size(h + 1) == W, "sizes are no multiples of the factor");
  const int64_t oC = inverse ? s.C * q : s.C, oH = inverse ? s.H : s.H * r, oW = inverse ? s.W : s.W * r;
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    Tensor y = channels_last ? op.empty<T>({s.N, oH, oW, oC}) : op.empty<T>({s.N, oC, oH, oW});
    const T* from = channels_last ? op.in<T>(x, "x", {s.N, H, W, C}) : op.in<T>(x, "x", {s.N, C, H, W});
    T* to = channels_last ? op.out<T>(y, "y", {s.N, oH, oW, oC}) : op.out<T>(y, "y", {s.N, oC, oH, oW});
    if (channels_last)
      inverse ? shuffle_channels<true>(from, to, s) : shuffle_channels<false>(from, to, s);
    else
      inverse ? shuffle_planes<true>(from, to, s) : shuffle_planes<false>(from, to, s);
    return y;
  });
}

PYOPS_LIBRARY(m) { PYOPS_IMPL(m, pixel_shuffle_fwd); }

}  // namespace pyops::PYOPS_CPU_CAPABILITY
