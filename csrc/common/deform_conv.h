// Where a deformable convolution reads: shared by the CPU and CUDA kernels.
//
// Tap t of output o stands at base + offset. The base is whole, so the floor and the share of the upper neighbour come
// from the offset alone, and lose nothing to a large base. A sample inside (-1, size) is shared by its neighbours,
// those off the map count as 0; any other sample, NaN too, reads nothing.
#pragma once

#include <vector>

#include "common/host_device.h"

#if defined(__CUDACC__)
#define PYOPS_DEFORM PYOPS_HOST_DEVICE
#else
// Compiled for several instruction sets: it must not survive as a symbol that one build lends another.
#define PYOPS_DEFORM inline __attribute__((always_inline))
#endif

namespace pyops::deform {

// x: [N, H, W, C] · w: [K, R, S, C/G] · offset: [N, O, R*S, 2, P, Q] · mask: [N, O, R*S, P, Q] · y: [N, P, Q, K]
struct Sizes {
  int64_t N, H, W, C, K, G, O, R, S, P, Q;
  int64_t stride[2], padding[2], dilation[2];

  PYOPS_DEFORM int64_t taps() const { return R * S; }
  PYOPS_DEFORM int64_t places() const { return P * Q; }      // of one image
  PYOPS_DEFORM int64_t depth() const { return taps() * C; }  // elements of one place's columns, all groups
};

// Upper left neighbour of a sample and the shares of the lower and right ones.
template <class A>
struct Sample {
  int32_t y, x;
  bool inside;
  A down, right;

  PYOPS_DEFORM bool valid(int a, int b, const Sizes& s) const {
    return y + a >= 0 && y + a < s.H && x + b >= 0 && x + b < s.W;
  }
  PYOPS_DEFORM A weight(int a, int b) const { return (a ? down : A(1) - down) * (b ? right : A(1) - right); }
  PYOPS_DEFORM int64_t pixel(int a, int b, const Sizes& s) const { return int64_t(y + a) * s.W + x + b; }
};

// The whole part of base + offset; far outside where it is no position of any map. share: what is left, in [0, 1).
template <class A>
PYOPS_DEFORM int32_t split(int64_t base, A offset, A& share) {
  constexpr int32_t nowhere = -(1 << 30);
  share = A(0);
  if (!(offset > A(-(1 << 29)) && offset < A(1 << 29))) return nowhere;
  const int32_t t = static_cast<int32_t>(offset), low = static_cast<A>(t) > offset ? t - 1 : t;
  share = offset - static_cast<A>(low);
  return static_cast<int32_t>(base) + low;
}

// Tap t of place (p, q); dy, dx: its offset.
template <class A>
PYOPS_DEFORM Sample<A> sample_of(const Sizes& s, int64_t t, int64_t p, int64_t q, A dy, A dx) {
  Sample<A> at;
  at.y = split(p * s.stride[0] - s.padding[0] + t / s.S * s.dilation[0], dy, at.down);
  at.x = split(q * s.stride[1] - s.padding[1] + t % s.S * s.dilation[1], dx, at.right);
  const bool above = at.y < -1 || (at.y == -1 && at.down == A(0)), left = at.x < -1 || (at.x == -1 && at.right == A(0));
  at.inside = !above && !left && at.y < s.H && at.x < s.W;
  return at;
}

// Reads the sizes of an op and checks them against each other; Scope is the OpScope of the binding.
template <class Scope, class Tensor, class OptionalTensor>
Sizes sizes_of(const Scope& op, const Tensor& x, const Tensor& offset, const OptionalTensor& mask, const Tensor& w,
               const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
               const std::vector<int64_t>& dilation) {
  op.check(x.dim() == 4 && w.dim() == 4 && offset.dim() == 4, "x, w and offset must have 4 dimensions");
  op.check(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
           "stride, padding and dilation must have 2 elements");
  Sizes s{x.size(0), x.size(1), x.size(2), x.size(3), w.size(0), 0, 0, w.size(1), w.size(2), 0, 0, {}, {}, {}};
  op.check(w.size(3) > 0 && s.C > 0 && s.C % w.size(3) == 0, "groups must divide the channels of x");
  s.G = s.C / w.size(3);
  op.check(s.K % s.G == 0 && s.R > 0 && s.S > 0, "groups must divide the filters, which must have taps");
  s.O = offset.size(1) / (2 * s.R * s.S);
  op.check(s.O > 0 && s.C % s.O == 0 && offset.size(1) == 2 * s.O * s.R * s.S,
           "offset must have 2 numbers for every tap of groups that divide the channels");
  const int64_t size[2] = {s.H, s.W}, taps[2] = {s.R, s.S};
  int64_t count[2];
  for (int i = 0; i < 2; ++i) {
    op.check(stride[i] > 0 && padding[i] >= 0 && dilation[i] > 0, "a size of the geometry is out of range");
    s.stride[i] = stride[i], s.padding[i] = padding[i], s.dilation[i] = dilation[i];
    const int64_t reach = size[i] + 2 * padding[i], span = dilation[i] * (taps[i] - 1) + 1;
    op.check(reach < (int64_t{1} << 28) && span <= reach, "the filter does not fit the padded x");
    count[i] = (reach - span) / stride[i] + 1;
  }
  s.P = count[0], s.Q = count[1];
  return s;
}

}  // namespace pyops::deform
