// Implicit GEMM: convolutions as products of tiles that are gathered from the image while they are multiplied.
//
//   conv_kernel    Y[pixel, k]  = sum over (tap, c) of X[pixel at tap, c] * W[k, tap, c]
//   wgrad_kernel   dW[k, (tap,c)] = sum over pixels of dY[pixel, k] * X[pixel at tap, c]
//
// One block of 128 threads computes a tile of 64 x 64 with a pipeline of `Stages` tiles in shared memory. Products:
//   Product::simt     CUDA cores, in the type of the sums (float and double)
//   Product::half     mma.sync of bfloat16 or float16, fp32 sums
//   Product::tf32     mma.sync of float32 rounded to TF32
//   Product::tf32x3   float32 as the sum of two TF32: three products, the smallest is dropped; about 2^-21 relative
// Where 16 bytes of channels stand together they are copied by cp.async; else element by element, pixels first, which
// is how NCHW is contiguous. Forward and gradient in the input share conv_kernel (common/conv.h).
#pragma once

#include "cuda/conv_epilogue.cuh"
#include "cuda/device.cuh"

#include "common/conv.h"

namespace pyops::conv {

enum class Product { simt, half, tf32, tf32x3 };

inline constexpr int tile = 64, threads = 128, Stages = 3;

template <class T>
inline constexpr int depth = 64 / static_cast<int>(sizeof(T));  // of a tile along the reduction: 64 bytes
template <class T>
inline constexpr int vector = 16 / static_cast<int>(sizeof(T));

// How an image is addressed: channels last or first.
struct Strides {
  int64_t example, position, channel;
};

template <class T>
struct ConvArguments {
  const T *x, *w;  // w: [G, K, all taps, C]
  Epilogue<T> end;
  T* y;
  Space space;
  Strides in, out;
  unsigned pixels;  // examples * positions
  int C, K;         // of one group
  int all_taps, taps_h, taps_w;
  bool vector_x, vector_w;
};

template <class T>
struct WgradArguments {
  const T *dy, *x;
  accumulate_t<T>* part;  // [splits, G, K, taps * C]
  Space space;
  Strides in, out;
  unsigned pixels, range;  // all pixels; pixels of one split
  int C, K, G;
  bool vector_dy, vector_x;
};

// Number of a tap of this phase in the filter.
PYOPS_DEVICE int filter_tap(const Space& s, const Tap& t, int taps_h, int taps_w) {
  return ((s.d.w_base + t.d * s.d.w_step) * taps_h + s.h.w_base + t.h * s.h.w_step) * taps_w + s.w.w_base +
         t.w * s.w.w_step;
}

// The pixels of a tile.
struct PixelRows {
  int64_t from[tile], to[tile];  // of the example in x; of the pixel in y, -1 where there is none
  int d[tile], h[tile], w[tile];

  PYOPS_DEVICE void find(const Space& space, const Strides& in, const Strides& out, unsigned first, unsigned pixels) {
    for (int i = threadIdx.x; i < tile; i += threads) {
      const bool valid = first + i < pixels;
      const Position o = position(space, valid ? first + i : 0);
      from[i] = o.n * in.example;
      d[i] = valid ? space.d.input(o.d, 0) : -(1 << 30);
      h[i] = space.h.input(o.h, 0);
      w[i] = space.w.input(o.w, 0);
      to[i] = valid ? o.n * out.example + space.output(o) * out.position : -1;
    }
  }
  // Position in its plane of what a row reads through a tap, -1 outside.
  PYOPS_DEVICE int64_t input(const Space& space, int row, const Tap& t) const {
    return space.input(d[row] + t.d * space.d.tap_step, h[row] + t.h * space.h.tap_step,
                       w[row] + t.w * space.w.tap_step);
  }
};

// Steps of a sum whose operands come by cp.async, Stages - 1 of them ahead: load(step) fills stage step % Stages,
// add(stage) uses it. Nothing is under way at the end.
template <class Load, class Add>
PYOPS_DEVICE void through_stages(int steps, const Load& load, const Add& add) {
  for (int step = 0; step < Stages - 1; ++step) {
    if (step < steps) load(step);
    cp_async_commit();
  }
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<Stages - 2>();
    __syncthreads();  // this stage is complete, and nobody reads the one before any more
    if (step + Stages - 1 < steps) load(step + Stages - 1);
    cp_async_commit();
    add(step % Stages);
  }
  cp_async_wait<0>();
}

// Sums of one block: 4 warps of 32 x 32 for mma, or 8 x 4 values of every thread.
template <class T, Product P>
struct Sums {
  using A = accumulate_t<T>;
  A v[2][4][4] = {};

  // (row, column) in the tile of v[i][j][e]
  static PYOPS_DEVICE int row(int i, int j, int e) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if constexpr (P == Product::simt) return (threadIdx.x / 16) * 8 + i * 4 + j;
    return (warp % 2) * 32 + i * 16 + lane / 4 + (e / 2) * 8;
  }
  static PYOPS_DEVICE int column(int i, int j, int e) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if constexpr (P == Product::simt) return threadIdx.x % 16 + e * 16;
    return (warp / 2) * 32 + j * 8 + (lane % 4) * 2 + e % 2;
  }

  template <class Y>
  PYOPS_DEVICE void store(Y& y) const {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) y[row(i, j, e)][column(i, j, e)] = v[i][j][e];
  }

  // Adds the product of two tiles; left(m, k) and right(n, k) address shared memory, KMajor says that m and n are
  // contiguous there, else k is.
  template <bool KMajor, class Left, class Right>
  PYOPS_DEVICE void add(const Left& left, const Right& right) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int m0 = (warp % 2) * 32, n0 = (warp / 2) * 32;
    if constexpr (P == Product::simt) {
      const int row0 = (threadIdx.x / 16) * 8, column0 = threadIdx.x % 16;
#pragma unroll 4
      for (int k = 0; k < depth<T>; ++k) {
        A a[8], b[4];
#pragma unroll
        for (int i = 0; i < 8; ++i) a[i] = *left(row0 + i, k);
#pragma unroll
        for (int e = 0; e < 4; ++e) b[e] = *right(column0 + e * 16, k);
#pragma unroll
        for (int i = 0; i < 8; ++i)
#pragma unroll
          for (int e = 0; e < 4; ++e) v[i / 4][i % 4][e] += a[i] * b[e];
      }
    } else if constexpr (P == Product::half) {
#pragma unroll
      for (int k = 0; k < depth<T>; k += 16) {
        uint32_t a[2][4], b[4][2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if constexpr (KMajor)
            ldmatrix_x4_trans(a[i], left(m0 + i * 16 + lane / 8 % 2 * 8, k + lane / 16 * 8 + lane % 8));
          else
            ldmatrix_x4(a[i], left(m0 + i * 16 + lane % 16, k + lane / 16 * 8));
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          uint32_t q[4];
          if constexpr (KMajor)
            ldmatrix_x4_trans(q, right(n0 + j * 16 + lane / 16 * 8, k + lane / 8 % 2 * 8 + lane % 8));
          else
            ldmatrix_x4(q, right(n0 + j * 16 + lane / 16 * 8 + lane % 8, k + lane / 8 % 2 * 8));
          b[j * 2][0] = q[0], b[j * 2][1] = q[1], b[j * 2 + 1][0] = q[2], b[j * 2 + 1][1] = q[3];
        }
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) mma_m16n8k16<T>(v[i][j], a[i], b[j]);
      }
    } else {
      const int r = lane / 4, c = lane % 4;
#pragma unroll
      for (int k = 0; k < depth<T>; k += 8) {
        float a[2][4], b[4][2];
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int e = 0; e < 4; ++e) a[i][e] = *left(m0 + i * 16 + r + e % 2 * 8, k + c + e / 2 * 4);
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) b[j][e] = *right(n0 + j * 8 + r, k + c + e * 4);
        uint32_t big_a[2][4], big_b[4][2];
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int e = 0; e < 4; ++e) big_a[i][e] = to_tf32(a[i][e]);
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) big_b[j][e] = to_tf32(b[j][e]);
        if constexpr (P == Product::tf32x3) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            uint32_t small_a[4];
#pragma unroll
            for (int e = 0; e < 4; ++e) small_a[e] = to_tf32(a[i][e] - __uint_as_float(big_a[i][e]));
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              uint32_t small_b[2];
#pragma unroll
              for (int e = 0; e < 2; ++e) small_b[e] = to_tf32(b[j][e] - __uint_as_float(big_b[j][e]));
              mma_m16n8k8_tf32(v[i][j], small_a, big_b[j]);
              mma_m16n8k8_tf32(v[i][j], big_a[i], small_b);
            }
          }
        }
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) mma_m16n8k8_tf32(v[i][j], big_a[i], big_b[j]);
      }
    }
  }
};

template <class T>
struct ConvShared {
  static constexpr int pitch = depth<T> + 16 / static_cast<int>(sizeof(T));
  union {
    struct {
      T a[Stages][tile][pitch], b[Stages][tile][pitch];
    } stage;
    accumulate_t<T> y[tile][tile + 1];
  };
  PixelRows rows;
};

template <class T, Product P>
__global__ void __launch_bounds__(threads, 4) conv_kernel(ConvArguments<T> p) {
  auto& s = shared_storage<ConvShared<T>>();
  constexpr int K = depth<T>, V = vector<T>;
  const Space& space = p.space;
  const int tid = threadIdx.x, g = blockIdx.z, k0 = blockIdx.y * tile;
  const T* x = p.x + g * p.C * p.in.channel;
  const T* w = p.w + static_cast<int64_t>(g) * p.K * p.all_taps * p.C;
  s.rows.find(space, p.in, p.out, blockIdx.x * tile, p.pixels);
  __syncthreads();

  const int total = space.taps() * p.C, steps = static_cast<int>(ceil_div(total, K));
  const auto load_x = [&](int row, int k, const Tap& t, int c) -> const T* {
    const int64_t at = s.rows.input(space, row, t);
    return k < total && at >= 0 ? x + s.rows.from[row] + at * p.in.position + c * p.in.channel : nullptr;
  };
  const auto weight = [&](int row, int k, const Tap& t, int c) -> const T* {
    if (k >= total || k0 + row >= p.K) return nullptr;
    const int tap = filter_tap(space, t, p.taps_h, p.taps_w);
    return w + (static_cast<int64_t>(k0 + row) * p.all_taps + tap) * p.C + c;
  };
  const auto load = [&](int step) {
    const int stage = step % Stages;
    constexpr int pieces = K / V, rows = threads / pieces;
    if (p.vector_x || p.vector_w) {
      const int column = tid % pieces * V, k = step * K + column, j = k / p.C, c = k - j * p.C;
      const Tap t = tap_of(space, k < total ? j : 0);
      for (int row = tid / pieces; row < tile; row += rows) {
        if (p.vector_x) {
          const T* from = load_x(row, k, t, c);
          cp_async<16>(&s.stage.a[stage][row][column], from ? from : p.x, from != nullptr);
        }
        if (p.vector_w) {
          const T* from = weight(row, k, t, c);
          cp_async<16>(&s.stage.b[stage][row][column], from ? from : p.w, from != nullptr);
        }
      }
    }
    if (!p.vector_x || !p.vector_w) {
      const int row = tid % tile;
      for (int column = tid / tile; column < K; column += threads / tile) {
        const int k = step * K + column, j = k / p.C, c = k - j * p.C;
        const Tap t = tap_of(space, k < total ? j : 0);
        if (!p.vector_x) {
          const T* from = load_x(row, k, t, c);
          s.stage.a[stage][row][column] = from ? __ldg(from) : convert<T>(0.0f);
        }
        if (!p.vector_w) {
          const T* from = weight(row, k, t, c);
          s.stage.b[stage][row][column] = from ? __ldg(from) : convert<T>(0.0f);
        }
      }
    }
  };

  Sums<T, P> sums;
  through_stages(steps, load, [&](int stage) {
    sums.template add<false>([&](int m, int k) { return &s.stage.a[stage][m][k]; },
                             [&](int n, int k) { return &s.stage.b[stage][n][k]; });
  });
  __syncthreads();
  sums.store(s.y);
  __syncthreads();
  with_epilogue(p.end, [&](auto finish) {
    for (int i = tid; i < tile * tile; i += threads) {
      const int fast = i % tile, slow = i / tile;
      const int row = p.out.channel == 1 ? slow : fast, column = p.out.channel == 1 ? fast : slow;
      if (s.rows.to[row] < 0 || k0 + column >= p.K) continue;
      const int64_t k = static_cast<int64_t>(g) * p.K + k0 + column, at = s.rows.to[row] + k * p.out.channel;
      p.y[at] = from_acc<T>(finish(s.y[row][column], k, at));
    }
  });
}

template <class T>
struct WgradShared {
  static constexpr int pitch = tile + 16 / static_cast<int>(sizeof(T)) * (sizeof(T) == 4 ? 2 : 1);
  T a[Stages][depth<T>][pitch], b[Stages][depth<T>][pitch];
};

template <class T, Product P>
__global__ void __launch_bounds__(threads) wgrad_kernel(WgradArguments<T> p) {
  auto& s = shared_storage<WgradShared<T>>();
  constexpr int K = depth<T>, V = vector<T>, pieces = tile / V, rows = threads / pieces;
  const Space& space = p.space;
  const int tid = threadIdx.x, g = blockIdx.z % p.G, split = blockIdx.z / p.G;
  const int m0 = blockIdx.x * tile, n0 = blockIdx.y * tile, columns = space.taps() * p.C;
  const T* x = p.x + g * p.C * p.in.channel;
  const T* dy = p.dy + g * p.K * p.out.channel;
  const unsigned first = split * p.range;
  const unsigned last = p.pixels - first < p.range ? p.pixels : first + p.range;

  const auto gradient = [&](bool valid, const Position& o, int k) -> const T* {
    if (!valid || k >= p.K) return nullptr;
    const int64_t at = (static_cast<int64_t>(o.d) * space.h.count + o.h) * space.w.count + o.w;
    return dy + o.n * p.out.example + at * p.out.position + k * p.out.channel;
  };
  const auto image = [&](bool valid, const Position& o, const Tap& t, int n, int c) -> const T* {
    const int64_t at = space.input(space.d.input(o.d, t.d), space.h.input(o.h, t.h), space.w.input(o.w, t.w));
    if (!valid || n >= columns || at < 0) return nullptr;
    return x + o.n * p.in.example + at * p.in.position + c * p.in.channel;
  };
  const int steps = first < p.pixels ? static_cast<int>(ceil_div(last - first, K)) : 0;
  const auto load = [&](int step) {
    const int stage = step % Stages;
    if (p.vector_dy || p.vector_x) {
      const int column = tid % pieces * V, n = n0 + column, j = n / p.C, c = n - j * p.C;
      const Tap t = tap_of(space, n < columns ? j : 0);
      for (int k = tid / pieces; k < K; k += rows) {
        const unsigned pixel = first + step * K + k;
        const bool valid = pixel < last;
        const Position o = position(space, valid ? pixel : 0);
        if (p.vector_dy) {
          const T* from = gradient(valid, o, m0 + column);
          cp_async<16>(&s.a[stage][k][column], from ? from : p.dy, from != nullptr);
        }
        if (p.vector_x) {
          const T* from = image(valid, o, t, n, c);
          cp_async<16>(&s.b[stage][k][column], from ? from : p.x, from != nullptr);
        }
      }
    }
    if (!p.vector_dy || !p.vector_x) {
      const int k = tid % K;
      const unsigned pixel = first + step * K + k;
      const bool valid = pixel < last;
      const Position o = position(space, valid ? pixel : 0);
      for (int column = tid / K; column < tile; column += threads / K) {
        if (!p.vector_dy) {
          const T* from = gradient(valid, o, m0 + column);
          s.a[stage][k][column] = from ? __ldg(from) : convert<T>(0.0f);
        }
        if (!p.vector_x) {
          const int n = n0 + column, j = n / p.C, c = n - j * p.C;
          const T* from = image(valid, o, tap_of(space, n < columns ? j : 0), n, c);
          s.b[stage][k][column] = from ? __ldg(from) : convert<T>(0.0f);
        }
      }
    }
  };

  Sums<T, P> sums;
  through_stages(steps, load, [&](int stage) {
    sums.template add<true>([&](int m, int k) { return &s.a[stage][k][m]; },
                            [&](int n, int k) { return &s.b[stage][k][n]; });
  });
  auto* to = p.part + (static_cast<int64_t>(split) * p.G + g) * p.K * columns;
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int m = m0 + sums.row(i, j, e), n = n0 + sums.column(i, j, e);
        if (m < p.K && n < columns) to[static_cast<int64_t>(m) * columns + n] = sums.v[i][j][e];
      }
}

// dw[k, c, tap] (or [k, tap, c] channels last) = sum of part[split, k, tap, c] over the splits, in order.
template <class T>
__global__ void __launch_bounds__(256)
    wgrad_sum_kernel(const accumulate_t<T>* __restrict__ part, T* __restrict__ dw, int64_t filters, int splits,
                     int taps, int C, bool channels_last) {
  const int64_t per_split = filters * taps * C;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= per_split) return;
  accumulate_t<T> sum = 0;
  for (int split = 0; split < splits; ++split) sum += part[split * per_split + i];
  int64_t to = i;
  if (!channels_last) {
    const unsigned width = unsigned(taps) * C;
    const int64_t k = i / width;
    const unsigned at = static_cast<unsigned>(i - k * width), tap = at / C, c = at - tap * C;
    to = k * width + static_cast<int64_t>(c) * taps + tap;
  }
  dw[to] = from_acc<T>(sum);
}

// Filters as [(g, k), tap, c] from a tensor whose element (g, k, tap, c) stands at the given strides.
template <class T>
__global__ void __launch_bounds__(256)
    arrange_weights_kernel(const T* __restrict__ w, T* __restrict__ to, int K, int taps, int C, int64_t at_g,
                           int64_t at_k, int64_t at_tap, int64_t at_c) {
  const T* from = w + blockIdx.x / K * at_g + blockIdx.x % K * at_k;
  const unsigned i = blockIdx.y * 256 + threadIdx.x, width = unsigned(taps) * C;
  if (i < width) to[static_cast<int64_t>(blockIdx.x) * width + i] = from[i / C * at_tap + i % C * at_c];
}

}  // namespace pyops::conv
