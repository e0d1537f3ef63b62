// Convolutions of at most four channels, as in the first layer of a network.
//
//   Y[pixel, k] = sum over (tap, c) of X[pixel at tap, c] * W[k, (tap, c)]
//
// Channels are too few for vector loads, and the taps of neighbouring pixels read the same elements again and again. So
// a block brings the rectangle of the image under a tile of 64 outputs to shared memory once, in whole rows; there its
// columns are laid out, with taps and channels as one sum of at most few_columns<Wide> terms, padded to a multiple of
// depth<T> once and not for every tap. The filters stay in shared memory while the block takes tile after tile.
#pragma once

#include <algorithm>

#include "cuda/conv_gemm.cuh"

namespace pyops::conv {

inline constexpr int few_channels = 4, few_patch = 4096;  // elements of the rectangle
template <bool Wide>
inline constexpr int few_columns = Wide ? 224 : 64;  // 7 x 7 taps, or 3 x 3 and 4 x 4, of four channels

// A tile is height x width outputs of one plane; the rectangle under it, taps_d times rows x columns.
struct FewTiles {
  int height, width, down, across;
  int rows, columns, patch;
};

inline FewTiles few_tiles(const Space& s, int C) {
  FewTiles best{};
  int64_t least = -1;
  for (int width = 64; width >= 8; width /= 2) {
    const int height = tile / width;
    const int64_t down = ceil_div(s.h.count, height), across = ceil_div(s.w.count, width);
    if (least >= 0 && down * across >= least) continue;
    const int rows = (height - 1) * s.h.in_step + (s.h.taps - 1) * s.h.tap_step + 1;
    const int columns = (width - 1) * s.w.in_step + (s.w.taps - 1) * s.w.tap_step + 1;
    const int64_t patch = int64_t(s.d.taps) * rows * columns * C;
    if (patch > few_patch) continue;
    least = down * across;
    best = {height, width, static_cast<int>(down), static_cast<int>(across), rows, columns, static_cast<int>(patch)};
  }
  return best;
}

// Forward convolutions in float or less whose taps and rectangle fit.
template <class T>
bool few_serves(const Space& s, int64_t C, int64_t G) {
  if (sizeof(T) > 4 || G != 1 || C > few_channels || s.taps() * C > few_columns<true>) return false;
  for (const Axis* a : {&s.d, &s.h, &s.w})
    if (a->tap_step < 1 || a->out_step != 1 || a->out_base != 0 || a->in_step > 64 || a->tap_step > 64) return false;
  return few_tiles(s, static_cast<int>(C)).patch > 0;
}

template <class T>
struct FewArguments {
  const T *x, *w;  // w: [K, taps, C]
  Epilogue<T> end;
  T* y;
  Space space;
  Strides in, out;
  unsigned tiles;  // of all examples
  int C, K;
  FewTiles shape;
};

template <class T, bool Wide>
struct FewShared {
  static constexpr int pitch = few_columns<Wide> + vector<T>;
  T b[tile][pitch];
  union {
    struct {
      T a[tile][pitch], patch[few_patch];
    } in;
    accumulate_t<T> y[tile][tile + 1];
  };
  int offset[few_columns<Wide>];  // of a column in the rectangle
};

template <class T, Product P, bool Wide>
__global__ void __launch_bounds__(threads, 4) few_channels_kernel(FewArguments<T> p) {
  auto& s = shared_storage<FewShared<T, Wide>>();
  const Space& space = p.space;
  const FewTiles& shape = p.shape;
  const int tid = threadIdx.x, k0 = blockIdx.y * tile, total = space.taps() * p.C;
  const int columns = static_cast<int>(ceil_div(total, depth<T>)) * depth<T>;
  for (int i = tid; i < tile * columns; i += threads) {
    const int row = i / columns, k = i - row * columns;
    s.b[row][k] =
        k < total && k0 + row < p.K ? __ldg(p.w + static_cast<int64_t>(k0 + row) * total + k) : convert<T>(0.0f);
  }
  for (int k = tid; k < columns; k += threads) {
    const Tap t = tap_of(space, k < total ? k / p.C : 0);
    s.offset[k] =
        k < total
            ? ((t.d * shape.rows + t.h * space.h.tap_step) * shape.columns + t.w * space.w.tap_step) * p.C + k % p.C
            : -1;
  }
  for (unsigned index = blockIdx.x; index < p.tiles; index += gridDim.x) {
    const unsigned plane = index / (shape.down * shape.across), at = index - plane * (shape.down * shape.across);
    const unsigned n = plane / space.d.count;
    const int od = static_cast<int>(plane - n * space.d.count);
    const int oh = static_cast<int>(at / shape.across) * shape.height,
              ow = static_cast<int>(at % shape.across) * shape.width;
    const int h0 = space.h.input(oh, 0), w0 = space.w.input(ow, 0);
    const T* x = p.x + n * p.in.example;
    __syncthreads();  // nobody reads the sums of the tile before any more
    for (int i = tid; i < shape.patch; i += threads) {
      // in memory order: channels fastest, or slowest
      const int pixels = shape.patch / p.C;
      const bool last = p.in.channel == 1;
      const int c = last ? i % p.C : i / pixels, pixel = last ? i / p.C : i % pixels, row = pixel / shape.columns;
      const int64_t from =
          space.input(space.d.input(od, row / shape.rows), h0 + row % shape.rows, w0 + pixel - row * shape.columns);
      s.in.patch[pixel * p.C + c] = from >= 0 ? __ldg(x + from * p.in.position + c * p.in.channel) : convert<T>(0.0f);
    }
    __syncthreads();
    for (int i = tid; i < tile * columns; i += threads) {
      const int row = i / columns, k = i - row * columns;
      const int first =
          (row / shape.width * space.h.in_step * shape.columns + row % shape.width * space.w.in_step) * p.C;
      s.in.a[row][k] = s.offset[k] >= 0 ? s.in.patch[first + s.offset[k]] : convert<T>(0.0f);
    }
    __syncthreads();
    Sums<T, P> sums;
    for (int step = 0; step < columns; step += depth<T>)
      sums.template add<false>([&](int m, int k) { return &s.in.a[m][step + k]; },
                               [&](int n, int k) { return &s.b[n][step + k]; });
    __syncthreads();
    sums.store(s.y);
    __syncthreads();
    with_epilogue(p.end, [&](auto finish) {
      for (int i = tid; i < tile * tile; i += threads) {
        const int fast = i % tile, slow = i / tile;
        const int row = p.out.channel == 1 ? slow : fast, column = p.out.channel == 1 ? fast : slow;
        const Position o{n, od, oh + row / shape.width, ow + row % shape.width};
        if (o.h >= space.h.count || o.w >= space.w.count || k0 + column >= p.K) continue;
        const int64_t k = k0 + column, to = n * p.out.example + space.output(o) * p.out.position + k * p.out.channel;
        p.y[to] = from_acc<T>(finish(s.y[row][column], k, to));
      }
    });
  }
}

}  // namespace pyops::conv
