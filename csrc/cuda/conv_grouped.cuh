// Grouped convolutions with few output channels in a group: groups share tiles whose filters are block-diagonal.
//
//   grouped_kernel         Y[pixel, k] = sum over (tap, c of the group of k) of X[pixel at tap, c] * W[k, tap, c]
//   grouped_wgrad_kernel   dW[k, tap, c] = sum over pixels of dY[pixel, k] * X[pixel at tap, c], c in the group of k
//
// A tile of one group alone would be mostly padding. Here a block of four warps takes 64 pixels, and each warp one
// *unit*: neighbouring groups with at most 32 output channels, whose summed channels stand together in 32 bytes (or one
// group, 32 bytes at a time). Its filters are a matrix [output channels][summed channels] for every tap, with zeros
// where the groups differ, laid out so once (pack_weights_kernel). A warp multiplies its own unit only: of the products
// with a tap, the blocks between units, which are zero, are never computed. Forward and gradient in the input alike. For
// the gradient in the filters a warp takes one unit, one tap and a range of pixels, and keeps the diagonal.
#pragma once

#include <algorithm>

#include "cuda/conv_gemm.cuh"

namespace pyops::conv {

inline constexpr int units = 4, unit_columns = 32;  // of a block; output channels of a unit, at most
template <class T>
inline constexpr int unit_depth = 32 / static_cast<int>(sizeof(T));  // summed channels of a unit in one step

// How groups of C summed and K output channels fall into units.
struct Packing {
  int G, C, K;
  int groups, count;    // of a unit; units
  int columns, chunks;  // output channels of a unit, padded to 8; steps of a tap
};
template <class T>
Packing packing_of(int64_t G, int64_t C, int64_t K) {
  const int64_t depth = unit_depth<T>, groups = std::clamp<int64_t>(std::min(depth / C, unit_columns / K), 1, G);
  return {static_cast<int>(G),
          static_cast<int>(C),
          static_cast<int>(K),
          static_cast<int>(groups),
          static_cast<int>(ceil_div(G, groups)),
          static_cast<int>(ceil_div(groups * K, 8) * 8),
          static_cast<int>(ceil_div(groups * C, depth))};
}

template <class T>
struct GroupedArguments {
  const T *x, *w;  // w: [units, all taps, chunks, columns, depth]
  Epilogue<T> end;
  T* y;
  Space space;
  Strides in, out;
  unsigned pixels;
  Packing pack;
  int all_taps, taps_h, taps_w;
  bool vector_x;
};

template <Product P>
PYOPS_DEVICE void split_tf32(float v, uint32_t& big, uint32_t& small) {
  big = to_tf32(v);
  small = P == Product::tf32x3 ? to_tf32(v - __uint_as_float(big)) : 0;
}

// Sums of one warp: 64 pixels by 32 output channels, element (row, column) in v[i][j][e] as mma.sync holds them.
template <class T, Product P>
struct UnitSums {
  using A = accumulate_t<T>;
  A v[4][4][4] = {};

  static PYOPS_DEVICE int row(int i, int e) { return i * 16 + threadIdx.x % 32 / 4 + e / 2 * 8; }
  static PYOPS_DEVICE int column(int j, int e) { return j * 8 + threadIdx.x % 4 * 2 + e % 2; }

  // Adds the product of left(pixel, c) and right(output channel < columns, c), unit_depth<T> of c.
  template <class Left, class Right>
  PYOPS_DEVICE void add(const Left& left, const Right& right, int columns) {
    const int lane = threadIdx.x % 32;
    if constexpr (P == Product::simt) {
#pragma unroll 2
      for (int k = 0; k < unit_depth<T>; ++k) {
        A a[4][2], b[4][2];
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int e = 0; e < 2; ++e) a[i][e] = *left(row(i, e * 2), k);
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) b[j][e] = j * 8 < columns ? *right(column(j, e), k) : A(0);
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (j * 8 < columns)
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
              for (int e = 0; e < 4; ++e) v[i][j][e] += a[i][e / 2] * b[j][e % 2];
      }
    } else if constexpr (P == Product::half) {
      uint32_t a[4][4], b[4][2];
#pragma unroll
      for (int i = 0; i < 4; ++i) ldmatrix_x4(a[i], left(i * 16 + lane % 16, lane / 16 * 8));
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        if (j * 8 >= columns) continue;
        uint32_t q[4];
        const int n = j * 8 + lane / 16 * 8 + lane % 8;
        ldmatrix_x4(q, right(n < columns ? n : columns - 1, lane / 8 % 2 * 8));
        b[j][0] = q[0], b[j][1] = q[1], b[j + 1][0] = q[2], b[j + 1][1] = q[3];
      }
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (j * 8 < columns)
#pragma unroll
          for (int i = 0; i < 4; ++i) mma_m16n8k16<T>(v[i][j], a[i], b[j]);
    } else {
      uint32_t big_a[4][4], small_a[4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          split_tf32<P>(*left(i * 16 + lane / 4 + e % 2 * 8, lane % 4 + e / 2 * 4), big_a[i][e], small_a[i][e]);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (j * 8 >= columns) continue;
        uint32_t big_b[2], small_b[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) split_tf32<P>(*right(j * 8 + lane / 4, lane % 4 + e * 4), big_b[e], small_b[e]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if constexpr (P == Product::tf32x3) {
            mma_m16n8k8_tf32(v[i][j], small_a[i], big_b);
            mma_m16n8k8_tf32(v[i][j], big_a[i], small_b);
          }
          mma_m16n8k8_tf32(v[i][j], big_a[i], big_b);
        }
      }
    }
  }
};

template <class T>
struct GroupedShared {
  static constexpr int pad = vector<T>;
  union {
    struct {
      T a[Stages][tile][units * unit_depth<T> + pad], b[Stages][units][unit_columns][unit_depth<T> + pad];
    } stage;
    accumulate_t<T> y[tile][units * unit_columns + 1];
  };
  PixelRows rows;
};

template <class T, Product P>
__global__ void __launch_bounds__(threads) grouped_kernel(GroupedArguments<T> p) {
  auto& s = shared_storage<GroupedShared<T>>();
  constexpr int D = unit_depth<T>, V = vector<T>, pieces = D / V;
  const Space& space = p.space;
  const Packing& pack = p.pack;
  const int tid = threadIdx.x, warp = tid / 32, unit0 = blockIdx.y * units;
  const int unit_channels = pack.groups * pack.C, channels = pack.G * pack.C;
  s.rows.find(space, p.in, p.out, blockIdx.x * tile, p.pixels);
  __syncthreads();

  const auto load = [&](int step) {
    const int stage = step % Stages, j = step / pack.chunks, chunk = step - j * pack.chunks;
    const Tap t = tap_of(space, j);
    // channel `column` of the tile as one of x, or -1
    const auto channel = [&](int column) {
      const int unit = column / D, c = chunk * D + column - unit * D, all = (unit0 + unit) * unit_channels + c;
      return c < unit_channels && all < channels ? all : -1;
    };
    if (p.vector_x) {
      for (int i = tid; i < tile * units * pieces; i += threads) {
        const int row = i / (units * pieces), column = i % (units * pieces) * V, c = channel(column);
        const int64_t at = s.rows.input(space, row, t);
        const bool valid = c >= 0 && at >= 0;
        const T* from = valid ? p.x + s.rows.from[row] + at * p.in.position + c : p.x;
        cp_async<16>(&s.stage.a[stage][row][column], from, valid);
      }
    } else {
      const int row = tid % tile;
      const int64_t at = s.rows.input(space, row, t);
      const T* from = p.x + s.rows.from[row] + (at >= 0 ? at : 0) * p.in.position;
      for (int column = tid / tile; column < units * D; column += threads / tile) {
        const int c = channel(column);
        s.stage.a[stage][row][column] = c >= 0 && at >= 0 ? __ldg(from + c * p.in.channel) : convert<T>(0.0f);
      }
    }
    const int tap = filter_tap(space, t, p.taps_h, p.taps_w);
    for (int i = tid; i < units * pack.columns * pieces; i += threads) {
      const int piece = i % pieces * V, row = i / pieces % pack.columns, unit = i / pieces / pack.columns;
      const bool valid = unit0 + unit < pack.count;
      const int64_t at =
          ((static_cast<int64_t>(unit0 + unit) * p.all_taps + tap) * pack.chunks + chunk) * pack.columns + row;
      cp_async<16>(&s.stage.b[stage][unit][row][piece], valid ? p.w + at * D + piece : p.w, valid);
    }
  };

  const int steps = space.taps() * pack.chunks;
  UnitSums<T, P> sums;
  through_stages(steps, load, [&](int stage) {
    if (unit0 + warp < pack.count)
      sums.add([&](int m, int k) { return &s.stage.a[stage][m][warp * D + k]; },
               [&](int n, int k) { return &s.stage.b[stage][warp][n][k]; }, pack.columns);
  });
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) s.y[sums.row(i, e)][warp * unit_columns + sums.column(j, e)] = sums.v[i][j][e];
  __syncthreads();
  const int unit_outputs = pack.groups * pack.K, width = units * unit_outputs;
  const int64_t outputs = static_cast<int64_t>(pack.G) * pack.K;
  with_epilogue(p.end, [&](auto finish) {
    for (int i = tid; i < tile * width; i += threads) {
      const bool last = p.out.channel == 1;
      const int row = last ? i / width : i % tile, column = last ? i % width : i / tile, unit = column / unit_outputs;
      const int64_t k = static_cast<int64_t>(unit0) * unit_outputs + column;
      if (s.rows.to[row] < 0 || k >= outputs) continue;
      const int64_t at = s.rows.to[row] + k * p.out.channel;
      p.y[at] = from_acc<T>(finish(s.y[row][unit * unit_columns + column - unit * unit_outputs], k, at));
    }
  });
}

// Filters as [unit, tap, chunk, column, depth] from a tensor whose element (g, k, tap, c) stands at the given strides.
template <class T>
__global__ void __launch_bounds__(256)
    pack_weights_kernel(const T* __restrict__ w, T* __restrict__ to, Packing pack, int taps, int64_t at_g, int64_t at_k,
                        int64_t at_tap, int64_t at_c) {
  constexpr int D = unit_depth<T>;
  const int64_t per_unit = static_cast<int64_t>(taps) * pack.chunks * pack.columns * D;
  const int64_t i = static_cast<int64_t>(blockIdx.y) * 256 + threadIdx.x;
  if (i >= per_unit) return;
  const int kk = static_cast<int>(i % D), column = static_cast<int>(i / D % pack.columns);
  const int step = static_cast<int>(i / D / pack.columns), tap = step / pack.chunks;
  const int depth = (step - tap * pack.chunks) * D + kk, in = depth / pack.C, g = blockIdx.x * pack.groups + in;
  const bool filled = in < pack.groups && column / pack.K == in && g < pack.G;
  const int64_t from = g * at_g + column % pack.K * at_k + tap * at_tap + depth % pack.C * at_c;
  to[blockIdx.x * per_unit + i] = filled ? w[from] : convert<T>(0.0f);
}

// gradient in the filters

template <class T>
struct GroupedWgradArguments {
  const T *dy, *x;
  accumulate_t<T>* part;  // [splits, G, K, taps * C]
  Space space;
  Strides in, out;
  unsigned pixels, range;  // all pixels; pixels of one split
  Packing pack;
  bool vector_dy, vector_x;
};

// Sums of one warp: 32 output channels by unit_depth<T> summed channels of the forward.
template <class T, Product P>
struct UnitGradient {
  using A = accumulate_t<T>;
  static constexpr int D = unit_depth<T>, J = D / 8;
  A v[D / 4][4] = {};

  // (output channel, summed channel) of v[i / 4][i % 4]
  static PYOPS_DEVICE int output(int i) {
    const int lane = threadIdx.x % 32;
    if constexpr (P == Product::simt)
      return lane;
    else
      return i / (4 * J) * 16 + lane / 4 + i % 4 / 2 * 8;
  }
  static PYOPS_DEVICE int channel(int i) {
    if constexpr (P == Product::simt)
      return i;
    else
      return i / 4 % J * 8 + threadIdx.x % 4 * 2 + i % 2;
  }

  // Adds the product of left(pixel, output channel < outputs) and right(pixel, c), depth<T> pixels.
  template <class Left, class Right>
  PYOPS_DEVICE void add(const Left& left, const Right& right, int outputs) {
    const int lane = threadIdx.x % 32;
    if constexpr (P == Product::simt) {
#pragma unroll 4
      for (int k = 0; k < depth<T>; ++k) {
        const A a = lane < outputs ? *left(k, lane) : A(0);
#pragma unroll
        for (int c = 0; c < D; ++c) v[c / 4][c % 4] += a * *right(k, c);
      }
    } else if constexpr (P == Product::half) {
#pragma unroll
      for (int k = 0; k < depth<T>; k += 16) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, right(k + lane / 8 % 2 * 8 + lane % 8, lane / 16 * 8));
        const uint32_t columns[2][2] = {{b[0], b[1]}, {b[2], b[3]}};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (i * 16 >= outputs) continue;
          uint32_t a[4];
          ldmatrix_x4_trans(a, left(k + lane / 16 * 8 + lane % 8, i * 16 + lane / 8 % 2 * 8));
#pragma unroll
          for (int j = 0; j < J; ++j) mma_m16n8k16<T>(v[i * J + j], a, columns[j]);
        }
      }
    } else {
#pragma unroll
      for (int k = 0; k < depth<T>; k += 8) {
        uint32_t big_b[2], small_b[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) split_tf32<P>(*right(k + lane % 4 + e * 4, lane / 4), big_b[e], small_b[e]);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (i * 16 >= outputs) continue;
          uint32_t big_a[4], small_a[4];
#pragma unroll
          for (int e = 0; e < 4; ++e)
            split_tf32<P>(*left(k + lane % 4 + e / 2 * 4, i * 16 + lane / 4 + e % 2 * 8), big_a[e], small_a[e]);
          if constexpr (P == Product::tf32x3) {
            mma_m16n8k8_tf32(v[i], small_a, big_b);
            mma_m16n8k8_tf32(v[i], big_a, small_b);
          }
          mma_m16n8k8_tf32(v[i], big_a, big_b);
        }
      }
    }
  }
};

template <class T>
struct GroupedWgradShared {
  static constexpr int pad = vector<T> * (sizeof(T) == 4 ? 2 : 1);
  T a[Stages][depth<T>][units * unit_columns + pad], b[Stages][depth<T>][units * unit_depth<T> + pad];
};

// Block (units, tap and chunk, split).
template <class T, Product P>
__global__ void __launch_bounds__(threads) grouped_wgrad_kernel(GroupedWgradArguments<T> p) {
  auto& s = shared_storage<GroupedWgradShared<T>>();
  constexpr int D = unit_depth<T>, V = vector<T>, K = depth<T>;
  const Space& space = p.space;
  const Packing& pack = p.pack;
  const int tid = threadIdx.x, warp = tid / 32, unit0 = blockIdx.x * units;
  const int j = blockIdx.y / pack.chunks, chunk = blockIdx.y - j * pack.chunks, split_index = blockIdx.z;
  const Tap t = tap_of(space, j);
  const int unit_channels = pack.groups * pack.C, unit_outputs = pack.groups * pack.K;
  const int channels = pack.G * pack.C, outputs = pack.G * pack.K, padded = (pack.columns + 15) / 16 * 16;
  const unsigned first = split_index * p.range;
  const unsigned last = p.pixels - first < p.range ? p.pixels : first + p.range;
  const int steps = first < p.pixels ? static_cast<int>(ceil_div(last - first, K)) : 0;

  const auto load = [&](int step) {
    const int stage = step % Stages;
    // columns of dy and of x as channels, or -1
    const auto output = [&](int column) {
      const int unit = column / unit_columns, o = column - unit * unit_columns, all = (unit0 + unit) * unit_outputs + o;
      return o < unit_outputs && all < outputs ? all : -1;
    };
    const auto channel = [&](int column) {
      const int unit = column / D, c = chunk * D + column - unit * D, all = (unit0 + unit) * unit_channels + c;
      return c < unit_channels && all < channels ? all : -1;
    };
    const auto each = [&](int width, int unit_width, auto&& f) {  // f(pixel of the step, column)
      for (int i = tid; i < K * width; i += threads) {
        const int k = i % K, column = i / K;
        f(k, column / unit_width, column % unit_width);
      }
    };
    const auto position_of = [&](int k, bool& valid) {
      const unsigned pixel = first + step * K + k;
      valid = pixel < last;
      return position(space, valid ? pixel : 0);
    };
    const int step_dy = p.vector_dy ? V : 1, step_x = p.vector_x ? V : 1;
    each(units * padded / step_dy, padded / step_dy, [&](int k, int unit, int part) {
      bool valid;
      const Position o = position_of(k, valid);
      const int column = unit * unit_columns + part * step_dy, c = output(column);
      const T* from = p.dy + o.n * p.out.example + space.output(o) * p.out.position + (c < 0 ? 0 : c) * p.out.channel;
      T* to = &s.a[stage][k][column];
      if (p.vector_dy)
        cp_async<16>(to, valid && c >= 0 ? from : p.dy, valid && c >= 0);
      else
        *to = valid && c >= 0 ? __ldg(from) : convert<T>(0.0f);
    });
    each(units * D / step_x, D / step_x, [&](int k, int unit, int part) {
      bool valid;
      const Position o = position_of(k, valid);
      const int column = unit * D + part * step_x, c = channel(column);
      const int64_t at = space.input(space.d.input(o.d, t.d), space.h.input(o.h, t.h), space.w.input(o.w, t.w));
      valid = valid && c >= 0 && at >= 0;
      const T* from = valid ? p.x + o.n * p.in.example + at * p.in.position + c * p.in.channel : p.x;
      T* to = &s.b[stage][k][column];
      if (p.vector_x)
        cp_async<16>(to, from, valid);
      else
        *to = valid ? __ldg(from) : convert<T>(0.0f);
    });
  };

  UnitGradient<T, P> sums;
  through_stages(steps, load, [&](int stage) {
    if (unit0 + warp < pack.count)
      sums.add([&](int k, int o) { return &s.a[stage][k][warp * unit_columns + o]; },
               [&](int k, int c) { return &s.b[stage][k][warp * D + c]; }, padded);
  });
  const int64_t columns = static_cast<int64_t>(space.taps()) * pack.C;
#pragma unroll
  for (int i = 0; i < D; ++i) {
    const int o = sums.output(i), c = chunk * D + sums.channel(i), in = o / pack.K;
    const int64_t k = static_cast<int64_t>(unit0 + warp) * unit_outputs + o;
    if (o < unit_outputs && k < outputs && c / pack.C == in)
      p.part[(static_cast<int64_t>(split_index) * outputs + k) * columns + j * pack.C + c - in * pack.C] =
          sums.v[i / 4][i % 4];
  }
}

}  // namespace pyops::conv
