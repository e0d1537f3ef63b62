// roi_align · CUDA
//   y[r,c,p,q] = mean over the samples of bin (p, q) of RoI r, bilinear in x[n_r, c]       (common/roi.h)
// layout   x_l: [N, C, H_l, W_l] or, channels_last, [N, H_l, W_l, C] · y likewise over (P, Q)
//          rois: [R, 5] in pixels of its level · levels: [R] or none; every level in one launch, backward too
// mapping  forward: a block per RoI and slice of channels, its pixels staged in shared memory where that is less to read
//          (roi_align_staged.cuh). With few bins, or position sensitive, straight from the map: NHWC a warp per bin,
//          lanes over vectors of channels, NCHW a thread per bin over 8 channels; so too position sensitive in either
//          layout, as the channels of a bin lie P Q planes apart.
//          Backward gathers: a block owns a tile of pixels of one image, collects the RoIs that touch it in order, and
//          sums wy[p] wx[q] dy from tables of weights in shared memory; no atomics, so bitwise repeatable
// memory   backward: dx is written once, nothing else is allocated
// numerics positions and sums in fp32 (fp64 for fp64); staging changes no bit
#include "cuda/compact.cuh"
#include "cuda/roi_align_staged.cuh"

namespace pyops::roi {
namespace {

constexpr int planes = 8;  // channels per thread, NCHW forward

// Backward: the tiles of all images of all levels, numbered one after the other.
struct Tiles {
  unsigned first[max_levels + 1], rows[max_levels], columns[max_levels];

  PYOPS_DEVICE int level_of(unsigned tile, int count) const {
    int level = 0;
    while (level + 1 < count && tile >= first[level + 1]) ++level;
    return level;
  }
};

// A warp per bin; lanes over vectors of V channels.
template <class T, int V>
__global__ void __launch_bounds__(128)
    roi_align_fwd_nhwc_kernel(Maps<const T> maps, const accumulate_t<T>* __restrict__ rois,
                              const int64_t* __restrict__ levels, T* __restrict__ y, Shape s) {
  using A = accumulate_t<T>;
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * 4 + threadIdx.x / 32;
  if (unit >= s.R * s.P * s.Q) return;
  const int64_t r = unit / (s.P * s.Q), p = unit / s.Q % s.P, q = unit % s.Q;
  const Place at = place_of(rois, levels, r, s, maps.count);
  const int64_t H = maps.H[at.level], W = maps.W[at.level];
  const Axis<A> ya = y_axis(rois, r, s, H), xa = x_axis(rois, r, s, W);
  const T* x = maps.x[at.level] + at.image * H * W * s.C;
  for (int64_t c = static_cast<int64_t>(threadIdx.x % 32) * V; c < s.C; c += 32 * V) {
    const Vec<A, V> mean = bin_mean<V>(ya, xa, p, q, [&](int64_t row, int64_t column) {
      return channels_at<Memory::map, V, true>(x + (row * W + column) * s.C + c, 1, V);
    });
    Vec<T, V> out;
#pragma unroll
    for (int k = 0; k < V; ++k) out[k] = from_acc<T>(mean[k]);
    store_vec(y + unit * s.C + c, out);
  }
}

// A thread per bin and 8 channels; position sensitive: bin (p, q) of channel c reads plane (c P + p) Q + q. Only then
// may it be channels last.
template <class T, bool ChannelsLast, bool PositionSensitive>
__global__ void __launch_bounds__(128)
    roi_align_fwd_nchw_kernel(Maps<const T> maps, const accumulate_t<T>* __restrict__ rois,
                              const int64_t* __restrict__ levels, T* __restrict__ y, Shape s, int64_t channels,
                              int64_t groups) {
  using A = accumulate_t<T>;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * 128 + threadIdx.x, bins = s.P * s.Q;
  if (index >= s.R * groups * bins) return;
  const int64_t bin = index % bins, p = bin / s.Q, q = bin % s.Q, c0 = index / bins % groups * planes,
                r = index / (bins * groups);
  const int count = static_cast<int>(channels - c0 < planes ? channels - c0 : planes);
  const Place at = place_of(rois, levels, r, s, maps.count);
  const int64_t H = maps.H[at.level], W = maps.W[at.level], HW = H * W;
  const Axis<A> ya = y_axis(rois, r, s, H), xa = x_axis(rois, r, s, W);
  const int64_t plane = ChannelsLast ? 1 : HW, pixel = ChannelsLast ? s.C : 1;
  const int64_t stride = PositionSensitive ? bins * plane : plane;
  const T* x = maps.x[at.level] + at.image * s.C * HW + (PositionSensitive ? c0 * bins + bin : c0) * plane;
  const Vec<A, planes> mean = bin_mean<planes>(ya, xa, p, q, [&](int64_t row, int64_t column) {
    return channels_at<Memory::map, planes, false>(x + (row * W + column) * pixel, stride, count);
  });
#pragma unroll
  for (int k = 0; k < planes; ++k)
    if (k < count)
      y[ChannelsLast ? (r * bins + bin) * channels + c0 + k : (r * channels + c0 + k) * bins + bin] =
          from_acc<T>(mean[k]);
}

constexpr int gather_threads = 256, tile_rows = 8, chunk = 16;  // chunk: bins per axis in the tables at once

template <class A, int Columns>
struct GatherShared {
  A wy[chunk][tile_rows], wx[chunk][Columns];
  int found[gather_threads];
  CompactScratch<gather_threads> compact;
};

// Where the pixels of a RoI may lie along one axis, with a pixel to spare.
template <class A>
PYOPS_DEVICE bool touches(const Axis<A>& axis, int64_t bins, int64_t first, int64_t last) {
  if (axis.grid == 0) return false;
  const A a = axis.start, b = axis.start + static_cast<A>(bins) * axis.bin;
  const A low = (a < b ? a : b) - A(1), high = (a < b ? b : a) + A(1);
  return low <= static_cast<A>(last) && high >= static_cast<A>(first);
}

// A block owns a tile of 8 rows by Columns pixels of one image of one level, warp w its row w. Channels last: a lane
// owns V channels and keeps Columns = 8 pixels; else a lane owns one of Columns = 32 pixels and keeps V channels, as it
// does position sensitive in either layout.
// Two blocks to a multiprocessor are asked for: left to itself, ptxas spills registers to fit more.
template <class T, int V, bool ChannelsLast, bool PositionSensitive>
__global__ void __launch_bounds__(gather_threads, 2)
    roi_align_bwd_kernel(const T* __restrict__ dy, const accumulate_t<T>* __restrict__ rois,
                         const int64_t* __restrict__ levels, Maps<T> maps, Shape s, Tiles tiles, int64_t channels) {
  using A = accumulate_t<T>;
  constexpr bool over_channels = ChannelsLast && !PositionSensitive;  // the lanes
  constexpr int columns = over_channels ? 8 : 32, owned = over_channels ? columns * V : V;
  auto& shared = shared_storage<GatherShared<A, columns>>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int level = tiles.level_of(blockIdx.x, maps.count);
  const int64_t H = maps.H[level], W = maps.W[level], bins = s.P * s.Q;
  const unsigned tiles_x = tiles.columns[level], in_level = blockIdx.x - tiles.first[level];
  const unsigned n = in_level / (tiles_x * tiles.rows[level]), tile = in_level - n * tiles_x * tiles.rows[level];
  const int64_t row0 = static_cast<int64_t>(tile / tiles_x) * tile_rows;
  const int64_t column0 = static_cast<int64_t>(tile % tiles_x) * columns;
  const int64_t c0 =
      over_channels ? (static_cast<int64_t>(blockIdx.y) * 32 + lane) * V : static_cast<int64_t>(blockIdx.y) * V;
  // Position sensitive: plane c0 + v = k bins + b belongs to channel k and bin b alone; bins divides C < 2^20.
  const int c0_channel = PositionSensitive ? static_cast<int>(c0) / static_cast<int>(bins) : 0;
  const int c0_bin = static_cast<int>(c0 - c0_channel * bins);
  A sum[owned] = {};
  for (int64_t from = 0; from < s.R; from += gather_threads) {
    // Which of the next RoIs touch the tile, compacted in their order.
    const int64_t candidate = from + threadIdx.x;
    bool hit = false;
    if (candidate < s.R) {
      const Place at = place_of(rois, levels, candidate, s, maps.count);
      if (at.image == n && at.level == level) {
        const Axis<A> ya = y_axis(rois, candidate, s, H), xa = x_axis(rois, candidate, s, W);
        hit = touches(ya, s.P, row0, row0 + tile_rows - 1) && touches(xa, s.Q, column0, column0 + columns - 1);
      }
    }
    const auto [place, count] = compact(hit, shared.compact);
    if (hit) shared.found[place] = static_cast<int>(threadIdx.x);
    __syncthreads();
    for (int k = 0; k < count; ++k) {
      const int64_t r = from + shared.found[k];
      const Axis<A> ya = y_axis(rois, r, s, H), xa = x_axis(rois, r, s, W);
      for (int64_t p0 = 0; p0 < s.P; p0 += chunk)
        for (int64_t q0 = 0; q0 < s.Q; q0 += chunk) {
          const int ps = static_cast<int>(s.P - p0 < chunk ? s.P - p0 : chunk);
          const int qs = static_cast<int>(s.Q - q0 < chunk ? s.Q - q0 : chunk);
          for (int i = threadIdx.x; i < ps * tile_rows; i += gather_threads)
            shared.wy[i / tile_rows][i % tile_rows] = ya.weight(p0 + i / tile_rows, row0 + i % tile_rows);
          for (int i = threadIdx.x; i < qs * columns; i += gather_threads)
            shared.wx[i / columns][i % columns] = xa.weight(q0 + i / columns, column0 + i % columns);
          __syncthreads();
          for (int p = 0; p < ps; ++p) {
            const A wy = shared.wy[p][warp];
            if (wy == A(0)) continue;
            for (int q = 0; q < qs; ++q) {
              const int64_t bin = (p0 + p) * s.Q + q0 + q;
              if constexpr (over_channels) {
                if (c0 >= s.C) continue;
                const Vec<T, V> d = load_vec_readonly<V>(dy + (r * bins + bin) * s.C + c0);
#pragma unroll
                for (int x = 0; x < columns; ++x) {
                  const A w = wy * shared.wx[q][x];
                  if (w == A(0)) continue;
#pragma unroll
                  for (int v = 0; v < V; ++v) sum[x * V + v] += w * to_acc(d[v]);
                }
              } else {
                const A w = wy * shared.wx[q][lane];
                if (w == A(0)) continue;
                if constexpr (PositionSensitive) {
                  // The planes of this bin: the first at or after c0, then every bins-th.
                  int next = static_cast<int>(bin) - c0_bin, k = c0_channel;
                  if (next < 0) {
                    next += static_cast<int>(bins);
                    ++k;
                  }
#pragma unroll
                  for (int v = 0; v < V; ++v)
                    if (v == next && k < channels) {
                      sum[v] +=
                          w *
                          to_acc(dy[ChannelsLast ? (r * bins + bin) * channels + k : (r * channels + k) * bins + bin]);
                      next += static_cast<int>(bins);
                      ++k;
                    }
                } else {
#pragma unroll
                  for (int v = 0; v < V; ++v)
                    if (c0 + v < s.C) sum[v] += w * to_acc(__ldg(dy + (r * s.C + c0 + v) * bins + bin));
                }
              }
            }
          }
          __syncthreads();
        }
    }
  }
  const int64_t row = row0 + warp;
  if (row >= H) return;
  T* dx = maps.x[level];
  if constexpr (over_channels) {
    if (c0 >= s.C) return;
#pragma unroll
    for (int x = 0; x < columns; ++x) {
      if (column0 + x >= W) break;
      Vec<T, V> out;
#pragma unroll
      for (int v = 0; v < V; ++v) out[v] = from_acc<T>(sum[x * V + v]);
      store_vec(dx + ((n * H + row) * W + column0 + x) * s.C + c0, out);
    }
  } else {
    if (column0 + lane >= W) return;
#pragma unroll
    for (int v = 0; v < V; ++v)
      if (c0 + v < s.C)
        dx[ChannelsLast ? ((n * H + row) * W + column0 + lane) * s.C + c0 + v
                        : ((n * s.C + c0 + v) * H + row) * W + column0 + lane] = from_acc<T>(sum[v]);
  }
}

}  // namespace
}  // namespace pyops::roi

// binding

#include <algorithm>
#include <array>

#include "common/registry.h"

namespace pyops::roi {
namespace {

struct Inputs {
  std::array<OptionalTensor, max_levels> x;
  int count = 0;
  Inputs(const Tensor& x0, const OptionalTensor& x1, const OptionalTensor& x2, const OptionalTensor& x3,
         const OptionalTensor& x4)
      : x{x0, x1, x2, x3, x4} {
    while (count < max_levels && x[count].has_value()) ++count;
  }
};

Shape shape_of(const OpScope& op, const Inputs& in, const Tensor& rois, int64_t P, int64_t Q, int64_t sampling_ratio,
               bool aligned, bool channels_last, bool position_sensitive) {
  op.check(rois.dim() == 2 && P > 0 && Q > 0 && std::max(P, Q) >> 31 == 0,
           "rois must be [R, 5] and the output 1 x 1 or more, < 2^31 a side");
  for (int l = 0; l < in.count; ++l) op.check(in.x[l]->dim() == 4, "x must have 4 dimensions");
  const Shape s{in.x[0]->size(0), in.x[0]->size(channels_last ? 3 : 1), rois.size(0), P, Q, sampling_ratio, aligned};
  op.check(!position_sensitive || s.C % (P * Q) == 0, "C must be a multiple of P * Q");
  return s;
}

bool is_aligned(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

Tensor roi_align_fwd(const Tensor& x0, const OptionalTensor& x1, const OptionalTensor& x2, const OptionalTensor& x3,
                     const OptionalTensor& x4, const Tensor& rois, const OptionalTensor& levels, int64_t P, int64_t Q,
                     int64_t sampling_ratio, bool aligned, bool channels_last, bool position_sensitive) {
  OpScope op("roi_align_fwd", x0);
  const Inputs in(x0, x1, x2, x3, x4);
  const Shape s = shape_of(op, in, rois, P, Q, sampling_ratio, aligned, channels_last, position_sensitive);
  return dispatch_floating(op, x0.scalar_type(), [&]<class T>() {
    using A = accumulate_t<T>;
    constexpr int V = 16 / sizeof(T);
    const int64_t C = position_sensitive ? s.C / (P * Q) : s.C;
    Tensor y = channels_last ? op.empty<T>({s.R, P, Q, C}) : op.empty<T>({s.R, C, P, Q});
    if (s.R == 0 || s.C == 0) return y;
    Maps<const T> maps{};
    maps.count = in.count;
    bool vectors = s.C % V == 0;
    for (int l = 0; l < in.count; ++l) {
      const Tensor& x = *in.x[l];
      const int64_t H = x.size(channels_last ? 1 : 2), W = x.size(channels_last ? 2 : 3);
      maps.H[l] = H;
      maps.W[l] = W;
      maps.x[l] = channels_last ? op.in<T>(x, "x", {s.N, H, W, s.C}) : op.in<T>(x, "x", {s.N, s.C, H, W});
      vectors = vectors && is_aligned(maps.x[l], 16);
    }
    auto* py = channels_last ? op.out<T>(y, "y", {s.R, P, Q, C}) : op.out<T>(y, "y", {s.R, C, P, Q});
    auto* prois = op.in<A>(rois, "rois", {s.R, 5});
    auto* plevels = op.in_optional<int64_t>(levels, "levels", {s.R});
    const auto stream = static_cast<cudaStream_t>(op.stream());
    const auto staged = [&]<bool ChannelsLast>() {
      const int64_t slices = ceil_div(C, Staged<T, ChannelsLast>::slice);
      launch(roi_align_fwd_staged_kernel<T, ChannelsLast>,
             {.grid = dim3(static_cast<unsigned>(s.R * slices)),
              .block = dim3(staged_threads),
              .smem = sizeof(StagedShared<T>),
              .stream = stream},
             maps, prois, plevels, py, s, static_cast<int>(slices));
      return y;
    };
    if (channels_last && !position_sensitive) {
      if (vectors && worth_staging<T, true>(s)) return staged.template operator()<true>();
      const dim3 grid(static_cast<unsigned>(ceil_div(s.R * P * Q, 4)));
      if (vectors)
        launch(roi_align_fwd_nhwc_kernel<T, V>, {.grid = grid, .block = dim3(128), .stream = stream}, maps, prois,
               plevels, py, s);
      else
        launch(roi_align_fwd_nhwc_kernel<T, 1>, {.grid = grid, .block = dim3(128), .stream = stream}, maps, prois,
               plevels, py, s);
      return y;
    }
    if (!position_sensitive && worth_staging<T, false>(s)) return staged.template operator()<false>();
    const int64_t groups = ceil_div(C, planes);
    const auto direct = [&](auto kernel) {
      launch(kernel,
             {.grid = dim3(static_cast<unsigned>(ceil_div(s.R * groups * P * Q, 128))),
              .block = dim3(128),
              .stream = stream},
             maps, prois, plevels, py, s, C, groups);
    };
    if (channels_last)
      direct(roi_align_fwd_nchw_kernel<T, true, true>);
    else if (position_sensitive)
      direct(roi_align_fwd_nchw_kernel<T, false, true>);
    else
      direct(roi_align_fwd_nchw_kernel<T, false, false>);
    return y;
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> roi_align_bwd(
    const Tensor& dy, const Tensor& x0, const OptionalTensor& x1, const OptionalTensor& x2, const OptionalTensor& x3,
    const OptionalTensor& x4, const Tensor& rois, const OptionalTensor& levels, int64_t P, int64_t Q,
    int64_t sampling_ratio, bool aligned, bool channels_last, bool position_sensitive) {
  OpScope op("roi_align_bwd", dy);
  const Inputs in(x0, x1, x2, x3, x4);
  const Shape s = shape_of(op, in, rois, P, Q, sampling_ratio, aligned, channels_last, position_sensitive);
  return dispatch_floating(op, dy.scalar_type(), [&]<class T>() {
    using A = accumulate_t<T>;
    constexpr int V = 16 / sizeof(T);
    const int64_t C = position_sensitive ? s.C / (P * Q) : s.C;
    std::array<Tensor, max_levels> dx{op.empty<T>({0}), op.empty<T>({0}), op.empty<T>({0}), op.empty<T>({0}),
                                      op.empty<T>({0})};
    Maps<T> maps{};
    maps.count = in.count;
    for (int l = 0; l < in.count; ++l) {
      const int64_t H = in.x[l]->size(channels_last ? 1 : 2), W = in.x[l]->size(channels_last ? 2 : 3);
      maps.H[l] = H;
      maps.W[l] = W;
      dx[l] = channels_last ? op.empty<T>({s.N, H, W, s.C}) : op.empty<T>({s.N, s.C, H, W});
      maps.x[l] = channels_last ? op.out<T>(dx[l], "dx", {s.N, H, W, s.C}) : op.out<T>(dx[l], "dx", {s.N, s.C, H, W});
    }
    auto* pdy = channels_last ? op.in<T>(dy, "dy", {s.R, P, Q, C}) : op.in<T>(dy, "dy", {s.R, C, P, Q});
    auto* prois = op.in<A>(rois, "rois", {s.R, 5});
    auto* plevels = op.in_optional<int64_t>(levels, "levels", {s.R});
    const auto stream = static_cast<cudaStream_t>(op.stream());
    const bool vectors = s.C % V == 0 && is_aligned(pdy, 16), over_channels = channels_last && !position_sensitive;
    Tiles tiles{};
    int64_t total = 0;
    for (int l = 0; l < in.count; ++l) {
      const int64_t rows = ceil_div(maps.H[l], tile_rows), columns = ceil_div(maps.W[l], over_channels ? 8 : 32);
      tiles.first[l] = static_cast<unsigned>(total);
      tiles.rows[l] = static_cast<unsigned>(rows);
      tiles.columns[l] = static_cast<unsigned>(columns);
      total += s.N * rows * columns;
      op.check(total < (int64_t{1} << 31), "x must have less than 2^31 tiles of pixels");
    }
    tiles.first[in.count] = static_cast<unsigned>(total);
    if (s.C == 0) total = 0;
    const auto run = [&](auto kernel, int64_t groups, size_t smem) {
      launch(kernel,
             {.grid = dim3(static_cast<unsigned>(total), static_cast<unsigned>(groups)),
              .block = dim3(gather_threads),
              .smem = smem,
              .stream = stream},
             pdy, prois, plevels, maps, s, tiles, C);
    };
    if (over_channels && vectors)
      run(roi_align_bwd_kernel<T, V, true, false>, ceil_div(s.C, 32 * V), sizeof(GatherShared<A, 8>));
    else if (over_channels)
      run(roi_align_bwd_kernel<T, 1, true, false>, ceil_div(s.C, 32), sizeof(GatherShared<A, 8>));
    else if (channels_last)
      run(roi_align_bwd_kernel<T, 8, true, true>, ceil_div(s.C, 8), sizeof(GatherShared<A, 32>));
    else if (position_sensitive)
      run(roi_align_bwd_kernel<T, 8, false, true>, ceil_div(s.C, 8), sizeof(GatherShared<A, 32>));
    else
      run(roi_align_bwd_kernel<T, 8, false, false>, ceil_div(s.C, 8), sizeof(GatherShared<A, 32>));
    return std::make_tuple(dx[0], dx[1], dx[2], dx[3], dx[4]);
  });
}

}  // namespace
}  // namespace pyops::roi

PYOPS_LIBRARY(m) {
  using namespace pyops;
  using namespace pyops::roi;
  PYOPS_IMPL(m, roi_align_fwd);
  PYOPS_IMPL(m, roi_align_bwd);
}
