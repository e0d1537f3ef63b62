// Convolutions with at most eight output channels: the last layer of a decoder, the gradient in an image.
//
//   Y[pixel, k] = sum over (tap, c) of X[pixel at tap, c] * W[k, tap, c]
//
// conv_kernel pads the output channels to 64 and reads x once for every tap from L2, which is its bound. Here a block brings
// the rectangle of x under a tile of 128 outputs to shared memory, 64 bytes of channels at a time. The taps are then
// other rows of it: ldmatrix takes each row's address, so no columns are laid out. A warp multiplies 32 pixels by 8 output
// channels.
//
// By arithmetic, on an H100 in bfloat16: 64 -> 3 channels, 3 x 3 taps, 32 images 256 x 256. x and y are 0.28 GB, 0.08 ms.
// conv_kernel reads 9 times 0.27 GB from L2, 0.44 ms at 5.5 TB/s. A tile here reads 184 KB of shared memory, 1440 cycles, of
// 124 tiles for each multiprocessor: 0.10 ms. The gradient of 256 images 3 x 224 x 224 under 64 filters 7 x 7 of stride 2:
// 0.15 ms of memory; some 12 taps in each of four phases are 20 GB from L2, 3.6 ms; here 0.9 ms.
#pragma once

#include <cstdlib>

#include "cuda/conv_few.cuh"

namespace pyops::conv {

inline constexpr int narrow_outputs = 8, narrow_tile = 128, narrow_positions = 320;  // positions of the rectangle
template <bool Wide>
inline constexpr int narrow_taps = Wide ? 49 : 9;

// What a tap adds to a position at least: steps may run backwards.
PYOPS_HOST_DEVICE int32_t lowest_tap(const Axis& a) {
  const int32_t reach = (a.taps - 1) * a.tap_step;
  return reach < 0 ? reach : 0;
}

// Tiles of 128 outputs whose rectangles are read least in all; patch counts positions, 0 where none fits.
inline FewTiles narrow_tiles(const Space& s) {
  FewTiles best{};
  int64_t least = -1;
  const auto side = [](const Axis& a, int outputs) {
    return (outputs - 1) * a.in_step + (a.taps - 1) * std::abs(a.tap_step) + 1;
  };
  for (int width = narrow_tile; width >= 8; width /= 2) {
    const int height = narrow_tile / width, rows = side(s.h, height), columns = side(s.w, width);
    const int64_t down = ceil_div(s.h.count, height), across = ceil_div(s.w.count, width);
    const int64_t positions = int64_t(s.d.taps) * rows * columns, all = down * across * positions;
    if (positions > narrow_positions || (least >= 0 && all >= least)) continue;
    least = all;
    best = {height, width,   static_cast<int>(down),     static_cast<int>(across),
            rows,   columns, static_cast<int>(positions)};
  }
  return best;
}

// One tap alone reads x once everywhere; fewer channels than a product adds are mostly padding.
template <class T>
bool narrow_serves(const Space& s, int64_t C, int64_t M, int64_t G) {
  if (sizeof(T) > 4 || G != 1 || M > narrow_outputs || C * int64_t(sizeof(T)) < 32) return false;
  if (s.taps() < 2 || s.taps() > narrow_taps<true>) return false;
  for (const Axis* a : {&s.d, &s.h, &s.w})
    if (a->in_step > 64 || std::abs(a->tap_step) > 64) return false;
  return narrow_tiles(s).patch > 0;
}

template <class T>
struct NarrowArguments {
  const T *x, *w;  // w: [K, all taps, C]
  Epilogue<T> end;
  T* y;
  Space space;
  Strides in, out;
  int C, K, all_taps, taps_h, taps_w;
  FewTiles shape;
  bool vector_x, vector_w;
};

template <class T, bool Wide>
struct NarrowShared {
  static constexpr int pitch = depth<T> + vector<T>;  // rows of ldmatrix on banks of their own
  alignas(16) T x[narrow_positions][pitch];
  alignas(16) T w[narrow_taps<Wide>][narrow_outputs][pitch];
  int64_t from[narrow_positions];  // in the plane of x, -1 outside
  int offset[narrow_taps<Wide>];   // of a tap in the rectangle
};

// Sums of a thread; with mma, of a warp's 32 pixels by 8 output channels, else of one pixel.
template <class T, Product P>
struct NarrowSums {
  float v[2][4] = {};
  static PYOPS_DEVICE int pixel(int i, int e) {
    if constexpr (P == Product::simt) return threadIdx.x;
    return threadIdx.x / 32 * 32 + i * 16 + threadIdx.x % 32 / 4 + e / 2 * 8;
  }
  static PYOPS_DEVICE int output(int i, int e) {
    if constexpr (P == Product::simt) return i * 4 + e;
    return threadIdx.x % 4 * 2 + e % 2;
  }
  // The pixels whose rows a thread reads.
  static PYOPS_DEVICE int row(int q) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if constexpr (P == Product::simt) return threadIdx.x;
    if constexpr (P == Product::half) return warp * 32 + q % 2 * 16 + lane % 16;
    return warp * 32 + q / 2 * 16 + lane / 4 + q % 2 * 8;
  }
  // Adds the products of one tap; x(q, c) is channel c of row(q), w(k, c) that of output channel k.
  template <class X, class W>
  PYOPS_DEVICE void add(const X& x, const W& w) {
    const int lane = threadIdx.x % 32;
    if constexpr (P == Product::simt) {
#pragma unroll
      for (int c = 0; c < depth<T>; c += 4) {
        const Vec<T, 4> a = load_vec<4>(x(0, c));
#pragma unroll
        for (int k = 0; k < narrow_outputs; ++k) {
          const Vec<T, 4> b = load_vec<4>(w(k, c));
#pragma unroll
          for (int e = 0; e < 4; ++e) v[k / 4][k % 4] += a[e] * b[e];
        }
      }
    } else if constexpr (P == Product::half) {
#pragma unroll
      for (int c = 0; c < depth<T>; c += 16) {
        uint32_t b[2];
        ldmatrix_x2(b, w(lane % 8, c + lane / 8 % 2 * 8));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          uint32_t a[4];
          ldmatrix_x4(a, x(i, c + lane / 16 * 8));
          mma_m16n8k16<T>(v[i], a, b);
        }
      }
    } else {
#pragma unroll
      for (int c = 0; c < depth<T>; c += 8) {
        uint32_t big_b[2], small_b[2];
        for (int e = 0; e < 2; ++e) split<P>(*w(lane / 4, c + lane % 4 + e * 4), big_b[e], small_b[e]);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          uint32_t big_a[4], small_a[4];
#pragma unroll
          for (int e = 0; e < 4; ++e) split<P>(*x(i * 2 + e % 2, c + lane % 4 + e / 2 * 4), big_a[e], small_a[e]);
          if constexpr (P == Product::tf32x3) {
            mma_m16n8k8_tf32(v[i], small_a, big_b);
            mma_m16n8k8_tf32(v[i], big_a, small_b);
          }
          mma_m16n8k8_tf32(v[i], big_a, big_b);
        }
      }
    }
  }

 private:
  template <Product Q>
  static PYOPS_DEVICE void split(float value, uint32_t& big, uint32_t& small) {
    big = to_tf32(value);
    small = Q == Product::tf32x3 ? to_tf32(value - __uint_as_float(big)) : 0;
  }
};

template <class T, Product P, bool Wide>
__global__ void __launch_bounds__(threads, 4) narrow_kernel(NarrowArguments<T> p) {
  static_assert(threads == narrow_tile);
  auto& s = shared_storage<NarrowShared<T, Wide>>();
  constexpr int D = depth<T>, V = vector<T>, pieces = D / V;
  using Sums = NarrowSums<T, P>;
  const Space& space = p.space;
  const FewTiles& shape = p.shape;
  const int tid = threadIdx.x, taps = space.taps();
  const Position at = few_position(space, shape, blockIdx.x);
  const int h0 = space.h.input(at.h, 0) + lowest_tap(space.h), w0 = space.w.input(at.w, 0) + lowest_tap(space.w);
  const T* x = p.x + at.n * p.in.example;
  for (int i = tid; i < shape.patch; i += threads) {
    const int row = i / shape.columns, plane = row / shape.rows;
    s.from[i] = space.input(space.d.input(at.d, plane), h0 + row - plane * shape.rows, w0 + i - row * shape.columns);
  }
  for (int j = tid; j < taps; j += threads) {
    const Tap t = tap_of(space, j);
    s.offset[j] = (t.d * shape.rows + t.h * space.h.tap_step - lowest_tap(space.h)) * shape.columns +
                  t.w * space.w.tap_step - lowest_tap(space.w);
  }
  int first[4];  // of the rows of a thread, in the rectangle
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const int row = Sums::row(q), down = row / shape.width;
    first[q] = down * space.h.in_step * shape.columns + (row - down * shape.width) * space.w.in_step;
  }
  __syncthreads();

  Sums sums;
  for (int c0 = 0; c0 < p.C; c0 += D) {
    if (p.vector_x) {
      for (int i = tid; i < shape.patch * pieces; i += threads) {
        const int c = i % pieces * V;
        const int64_t from = s.from[i / pieces];
        const bool valid = from >= 0 && c0 + c < p.C;
        cp_async<16>(&s.x[i / pieces][c], valid ? x + from * p.in.position + c0 + c : p.x, valid);
      }
    } else {
      for (int i = tid; i < shape.patch; i += threads) {
        const int64_t from = s.from[i];
        for (int c = 0; c < D; ++c) {
          const bool valid = from >= 0 && c0 + c < p.C;
          s.x[i][c] = valid ? __ldg(x + from * p.in.position + (c0 + c) * p.in.channel) : convert<T>(0.0f);
        }
      }
    }
    const auto weight = [&](int j, int k, int c) -> const T* {
      if (k >= p.K || c0 + c >= p.C) return nullptr;
      const int tap = filter_tap(space, tap_of(space, j), p.taps_h, p.taps_w);
      return p.w + (static_cast<int64_t>(k) * p.all_taps + tap) * p.C + c0 + c;
    };
    const int step = p.vector_w ? V : 1, across = D / step;
    for (int i = tid; i < taps * narrow_outputs * across; i += threads) {
      const int c = i % across * step, k = i / across % narrow_outputs, j = i / across / narrow_outputs;
      const T* from = weight(j, k, c);
      if (p.vector_w)
        cp_async<16>(&s.w[j][k][c], from ? from : p.w, from != nullptr);
      else
        s.w[j][k][c] = from ? __ldg(from) : convert<T>(0.0f);
    }
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    for (int j = 0; j < taps; ++j) {
      const int offset = s.offset[j];
      sums.add([&](int q, int c) { return &s.x[first[q] + offset][c]; }, [&](int k, int c) { return &s.w[j][k][c]; });
    }
    __syncthreads();  // nobody reads these channels any more
  }

  with_epilogue(p.end, [&](auto finish) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int pixel = Sums::pixel(i, e), k = Sums::output(i, e), down = pixel / shape.width;
        const Position o{at.n, at.d, at.h + down, at.w + pixel - down * shape.width};
        if (o.h >= space.h.count || o.w >= space.w.count || k >= p.K) continue;
        const int64_t to = o.n * p.out.example + space.output(o) * p.out.position + k * p.out.channel;
        p.y[to] = from_acc<T>(finish(sums.v[i][e], k, to));
      }
  });
}

}  // namespace pyops::conv
