// Convolutions of at most four channels, as in the first layer of a network.
//
//   few_channels_kernel   Y[pixel, k]      = sum over (tap, c) of X[pixel at tap, c] * W[k, (tap, c)]
//   few_wgrad_kernel      dW[k, (tap, c)]  = sum over pixels of dY[pixel, k] * X[pixel at tap, c]
//
// Channels are too few for vector loads, and the taps of neighbouring pixels read the same elements again and again. So
// a block brings the rectangle of the image under a tile of 64 outputs to shared memory once, in whole rows; there its
// columns are laid out, with taps and channels as one sum of at most few_columns<Wide> terms, padded to a multiple of
// depth<T> once and not for every tap. The filters stay in shared memory while the block takes tile after tile.
//
// The gradient in the filters sums over pixels, tile after tile of a split; its parts are added by wgrad_sum_kernel in
// order. By arithmetic, for 256 images 3 x 224 x 224 and 64 filters 7 x 7 of stride 2 in bfloat16 on an H100: dy and x are
// 0.49 GB, 0.15 ms; the products, 60 GFLOP, less. wgrad_kernel gathers each of 3.2 million x 192 elements by some 40
// instructions (tap, bounds, address), 0.8 ms; from the rectangle it is some 6, of 3.2 million x 256 padded columns,
// 0.2 ms.
// The gradient in the input has few output channels: conv_narrow.cuh.
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

// Where a column, tap and channel, lies in the rectangle; -1 past the last one.
PYOPS_DEVICE int few_offset(const Space& space, const FewTiles& shape, int C, int k) {
  if (k >= space.taps() * C) return -1;
  const Tap t = tap_of(space, k / C);
  return ((t.d * shape.rows + t.h * space.h.tap_step) * shape.columns + t.w * space.w.tap_step) * C + k % C;
}

// The first output of a tile.
PYOPS_DEVICE Position few_position(const Space& space, const FewTiles& shape, unsigned index) {
  const unsigned plane = index / (shape.down * shape.across), at = index - plane * (shape.down * shape.across);
  const unsigned n = plane / space.d.count;
  return {n, static_cast<int>(plane - n * space.d.count), static_cast<int>(at / shape.across) * shape.height,
          static_cast<int>(at % shape.across) * shape.width};
}

// Copies the rectangle under a tile, in memory order: channels fastest, or slowest.
template <class T>
PYOPS_DEVICE void load_rectangle(T* patch, const T* x, const Space& space, const FewTiles& shape, const Strides& in,
                                 int C, const Position& o) {
  const int h0 = space.h.input(o.h, 0), w0 = space.w.input(o.w, 0), pixels = shape.patch / C;
  const bool last = in.channel == 1;
  x += o.n * in.example;
  for (int i = threadIdx.x; i < shape.patch; i += threads) {
    const int c = last ? i % C : i / pixels, pixel = last ? i / C : i % pixels, row = pixel / shape.columns;
    const int64_t from =
        space.input(space.d.input(o.d, row / shape.rows), h0 + row % shape.rows, w0 + pixel - row * shape.columns);
    patch[pixel * C + c] = from >= 0 ? __ldg(x + from * in.position + c * in.channel) : convert<T>(0.0f);
  }
}

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
  for (int k = tid; k < columns; k += threads) s.offset[k] = few_offset(space, shape, p.C, k);
  for (unsigned index = blockIdx.x; index < p.tiles; index += gridDim.x) {
    const Position at = few_position(space, shape, index);
    __syncthreads();  // nobody reads the sums of the tile before any more
    load_rectangle(s.in.patch, p.x, space, shape, p.in, p.C, at);
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
        const Position o{at.n, at.d, at.h + row / shape.width, at.w + row % shape.width};
        if (o.h >= space.h.count || o.w >= space.w.count || k0 + column >= p.K) continue;
        const int64_t k = k0 + column, to = o.n * p.out.example + space.output(o) * p.out.position + k * p.out.channel;
        p.y[to] = from_acc<T>(finish(s.y[row][column], k, to));
      }
    });
  }
}

// gradient in the filters

template <class T>
struct FewWgradArguments {
  const T *dy, *x;
  accumulate_t<T>* part;  // [splits, K, taps * C]
  Space space;
  Strides in, out;
  unsigned tiles, range;  // of all examples; of one split
  int C, K;
  FewTiles shape;
  bool vector_dy;
};

template <class T, int Blocks>
struct FewWgradShared {
  static constexpr int pad = vector<T> * (sizeof(T) == 4 ? 2 : 1);
  T dy[tile][tile + pad], x[tile][Blocks * tile + pad], patch[few_patch];
  int first[tile];  // of a pixel in the rectangle, -1 where it is none of y
};

// Block (split, filters, columns): 64 filters by `Blocks` times 64 columns.
template <class T, Product P, int Blocks>
__global__ void __launch_bounds__(threads, sizeof(T) == 4 ? 3 : 4) few_wgrad_kernel(FewWgradArguments<T> p) {
  auto& s = shared_storage<FewWgradShared<T, Blocks>>();
  constexpr int V = vector<T>, width = Blocks * tile;
  static_assert(threads % width == 0);
  const Space& space = p.space;
  const FewTiles& shape = p.shape;
  const int tid = threadIdx.x, k0 = blockIdx.y * tile, n0 = blockIdx.z * width, total = space.taps() * p.C;
  int bits = 0;  // of a column of the tile, whose width is a power of two
  while (1 << bits < shape.width) ++bits;
  const int column = tid % width, offset = few_offset(space, shape, p.C, n0 + column);
  const unsigned begin = blockIdx.x * p.range, end = p.tiles - begin < p.range ? p.tiles : begin + p.range;
  Sums<T, P> sums[Blocks];
  for (unsigned index = begin; index < end; ++index) {
    const Position at = few_position(space, shape, index);
    const auto pixel = [&](int row) { return Position{at.n, at.d, at.h + (row >> bits), at.w + row % shape.width}; };
    const auto inside = [&](const Position& o) { return o.h < space.h.count && o.w < space.w.count; };
    __syncthreads();  // nobody multiplies the tile before any more
    if (tid < tile) {
      const Position o = pixel(tid);
      const int row = (o.h - at.h) * space.h.in_step, across = (o.w - at.w) * space.w.in_step;
      s.first[tid] = inside(o) ? (row * shape.columns + across) * p.C : -1;
    }
    const auto gradient = [&](int row, int k) -> const T* {
      const Position o = pixel(row);
      if (!inside(o) || k0 + k >= p.K) return nullptr;
      return p.dy + o.n * p.out.example + space.output(o) * p.out.position + (k0 + k) * p.out.channel;
    };
    if (p.vector_dy) {
      for (int i = tid; i < tile * tile / V; i += threads) {
        const int row = i / (tile / V), k = i % (tile / V) * V;
        const T* from = gradient(row, k);
        cp_async<16>(&s.dy[row][k], from ? from : p.dy, from != nullptr);
      }
    } else {
      for (int k = tid / tile; k < tile; k += threads / tile) {
        const T* from = gradient(tid % tile, k);
        s.dy[tid % tile][k] = from ? __ldg(from) : convert<T>(0.0f);
      }
    }
    cp_async_commit();
    load_rectangle(s.patch, p.x, space, shape, p.in, p.C, at);
    __syncthreads();
    for (int row = tid / width; row < tile; row += threads / width) {
      const int first = s.first[row];  // 0 for pixels outside: dy is 0 there, x may be no number
      s.x[row][column] = first >= 0 && offset >= 0 ? s.patch[first + offset] : convert<T>(0.0f);
    }
    cp_async_wait<0>();
    __syncthreads();
    for (int step = 0; step < tile; step += depth<T>)
#pragma unroll
      for (int b = 0; b < Blocks; ++b)
        sums[b].template add<true>([&](int m, int k) { return &s.dy[step + k][m]; },
                                   [&](int n, int k) { return &s.x[step + k][b * tile + n]; });
  }
  auto* to = p.part + static_cast<int64_t>(blockIdx.x) * p.K * total;
#pragma unroll
  for (int b = 0; b < Blocks; ++b)
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int m = k0 + sums[b].row(i, j, e), n = n0 + b * tile + sums[b].column(i, j, e);
          if (m < p.K && n < total) to[static_cast<int64_t>(m) * total + n] = sums[b].v[i][j][e];
        }
}

}  // namespace pyops::conv
