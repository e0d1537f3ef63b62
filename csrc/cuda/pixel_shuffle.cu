// pixel_shuffle · CUDA
//   shuffled[n, c, h r + i, w r + j] = spread[n, c r² + i r + j, h, w]; either way round, which are each other's
//   gradient
// layout   spread: [N, C r², H, W], shuffled: [N, C, H r, W r]; channels_last: [N, H, W, C r²] and [N, H r, W r, C]
// mapping  a thread an element of y, in its order
// memory   read once, written once
#include "cuda/grid_stride.cuh"

namespace pyops {
namespace {

// Of the spread image: C r² channels, H by W.
struct Shuffle {
  int64_t N, C, H, W, r;
  bool inverse, channels_last;
};

template <class T>
__global__ void pixel_shuffle_kernel(const T* __restrict__ x, T* __restrict__ y, Shuffle s) {
  const int64_t r = s.r, q = r * r, total = s.N * s.C * q * s.H * s.W;
  const int64_t C = s.inverse ? s.C * q : s.C, H = s.inverse ? s.H : s.H * r, W = s.inverse ? s.W : s.W * r;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t e = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; e < total; e += step) {
    const int64_t c = s.channels_last ? e % C : e / (H * W) % C, p = s.channels_last ? e / C : e;
    const int64_t w = p % W, h = p / W % H, n = e / (C * H * W);
    int64_t fc, fh, fw, FC, FH, FW;  // where it comes from
    if (s.inverse) {
      fc = c / q, fh = h * r + c % q / r, fw = w * r + c % r;
      FC = s.C, FH = s.H * r, FW = s.W * r;
    } else {
      fc = c * q + h % r * r + w % r, fh = h / r, fw = w / r;
      FC = s.C * q, FH = s.H, FW = s.W;
    }
    y[e] = x[s.channels_last ? ((n * FH + fh) * FW + fw) * FC + fc : ((n * FC + fc) * FH + fh) * FW + fw];
  }
}

}  // namespace
}  // namespace pyops

// binding

#include "common/registry.h"

namespace pyops {
namespace {

Tensor pixel_shuffle_fwd(const Tensor& x, int64_t factor, bool inverse, bool channels_last) {
  OpScope op("pixel_shuffle_fwd", x);
  op.check(x.dim() == 4, "x must have 4 dimensions");
  op.check(factor > 0 && factor < (1 << 15), "factor must be in [1, 2^15), got ", factor);
  const int64_t r = factor, q = r * r, c = channels_last ? 3 : 1, h = channels_last ? 1 : 2;
  const Shuffle s{x.size(0),
                  inverse ? x.size(c) : x.size(c) / q,
                  inverse ? x.size(h) / r : x.size(h),
                  inverse ? x.size(h + 1) / r : x.size(h + 1),
                  r,
                  inverse,
                  channels_last};
  const int64_t C = inverse ? s.C : s.C * q, H = inverse ? s.H * r : s.H, W = inverse ? s.W * r : s.W;
  op.check(x.size(c) == C && x.size(h) == H && x.size(h + 1) == W, "sizes are no multiples of the factor");
  const int64_t oC = inverse ? s.C * q : s.C, oH = inverse ? s.H : s.H * r, oW = inverse ? s.W : s.W * r;
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    Tensor y = channels_last ? op.empty<T>({s.N, oH, oW, oC}) : op.empty<T>({s.N, oC, oH, oW});
    const T* from = channels_last ? op.in<T>(x, "x", {s.N, H, W, C}) : op.in<T>(x, "x", {s.N, C, H, W});
    T* to = channels_last ? op.out<T>(y, "y", {s.N, oH, oW, oC}) : op.out<T>(y, "y", {s.N, oC, oH, oW});
    launch(pixel_shuffle_kernel<T>, grid_stride(x.numel(), op.stream()), from, to, s);
    return y;
  });
}

PYOPS_LIBRARY(m) { PYOPS_IMPL(m, pixel_shuffle_fwd); }

}  // namespace
}  // namespace pyops
