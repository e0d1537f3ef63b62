// Convolutions on the warpgroup tensor cores of sm_90a: which calls they serve, and what conv.cu launches (kernels in
// conv_hopper.cu). Images are channels last, bfloat16 or float16. Groups are slices of the channels, of which each tile
// is in one: TMA takes 64 channels at a time, so those of a group come in 64s where there are several, or a slice would
// reach into the next group, whose NaN the zeros of the filters would not undo.
//
// TMA's im2col mode walks the positions of a bounding box in the image, in steps, and adds to each the offset of a tap;
// what lies outside the image arrives as zeros. Its fields are narrow, so not every geometry fits: docs/math/convolution.md.
#pragma once

#include <algorithm>

#include "cuda/conv_epilogue.cuh"
#include "cuda/device.cuh"

#include "common/conv.h"

namespace pyops::conv::hopper {

// One dimension as im2col walks it: positions lower, lower + step, ... ; tap j adds offset + j*tap_step >= 0.
struct Walk {
  int lower, upper;    // first position; of the last, its distance from the last one of the image
  int offset, widest;  // of tap 0; of the tap farthest away

  explicit Walk(const Axis& a) {
    const int reach = (a.taps - 1) * a.tap_step;
    offset = std::max(-reach, 0);
    widest = std::abs(reach);
    lower = a.in_base - offset;
    upper = lower + (a.count - 1) * a.in_step + 1 - a.size;
  }
};

// Dimensions of the tensor map: channels, examples and 1 to 3 sides. A side of one position and one tap is left out.
inline int map_rank(const Space& s) {
  const auto is_flat = [](const Axis& a) { return a.size == 1 && a.count == 1 && a.taps == 1 && a.in_base == 0; };
  return is_flat(s.d) ? is_flat(s.h) ? 3 : 4 : 5;
}

inline bool fits_tensor_map(const Space& s) {
  const int rank = map_rank(s), bits = 16 / (rank - 2);
  const int limit = 1 << (bits - 1);
  const Axis* axes[] = {&s.w, &s.h, &s.d};
  for (int i = 0; i < rank - 2; ++i) {
    const Walk walk(*axes[i]);
    if (std::min(walk.lower, walk.upper) < -limit || std::max(walk.lower, walk.upper) >= limit) return false;
    if (walk.widest >> bits != 0 || (axes[i]->count > 1 && axes[i]->in_step > 8)) return false;
  }
  return true;
}

// The rule: which products of an image with C channels and K filters, of each group, run here.
template <class T>
bool serves(const Space& s, int64_t C, int64_t K, int64_t G, bool channels_last, int64_t filter_taps) {
  if constexpr (hopper_built && (std::is_same_v<T, bf16> || std::is_same_v<T, fp16>))
    return compute_capability() == 90 && channels_last && C % (G == 1 ? 8 : 64) == 0 && K % (G == 1 ? 8 : 64) == 0 &&
           s.taps() > 0 && filter_taps <= 1 << 15 && fits_tensor_map(s);
  return false;
}

// y[n, k, o] = f(r[n, k, o] + bias[k] + sum over taps and c of w[k, tap, c] * x[n, c, o at the tap])
template <class T>
struct Product {
  const T *x, *w;  // w: [G, K, taps of the whole filter, C], transposed [G, C, taps, K]
  Epilogue<T> end;
  T* y;
  Space space;
  int64_t examples;
  int G, C, K;  // C and K of one group
  int filter_taps[3];
  bool transposed;
};
template <class T>
void product(const Product<T>& p, cudaStream_t stream);

// part[i, g, k, tap, c] = sum over the i-th share of the positions of dy[g, k, o] * x[g, c, o at the tap]
template <class T>
struct Wgrad {
  const T *dy, *x;
  float* part;
  Space space;
  int64_t examples;
  int G, C, K;
};
struct Shares {
  int count, splits;  // parts that are written; blocks along the pixels
  int64_t pixels;     // of one block
};
Shares wgrad_shares(const Space& space, int64_t examples, int64_t G, int64_t C, int64_t K);
template <class T>
void wgrad(const Wgrad<T>& p, const Shares& shares, cudaStream_t stream);

}  // namespace pyops::conv::hopper
