// roi_pool · CUDA
//   max    y[r,c,p,q] = max of x[n_r, c] over bin (p, q) of RoI r, 0 where it is empty; arg is its pixel, or -1
//   mean   y[r,c,p,q] = mean of x[n_r, (c P + p) Q + q] over the bin (position sensitive)
// layout   x: [N, C, H, W] or, channels_last, [N, H, W, C] · y, arg: likewise over (P, Q) · rois: [R, 5] rounded pixels
// mapping  forward: a thread per output, lanes over channels when channels_last. Backward gathers: a block owns a tile
//          of pixels of one image, collects the RoIs that touch it in order, and each thread adds the bins whose
//          maximum is its pixel; no atomics, so bitwise repeatable
// memory   forward: bins share at most a row and a column, so x is read about once and there is nothing to stage.
//          Backward: dx is written once, nothing else is allocated
// numerics comparisons are exact; the mean and dx in A
#include "cuda/compact.cuh"

#include "common/roi_bins.h"

namespace pyops {
namespace {

constexpr int gather_threads = 256;

struct Shape {
  int64_t N, C, H, W, R, P, Q, channels;
};

// Offset of (batch, channel, row, column) in a tensor of `channels` planes of `rows` by `columns`.
template <bool ChannelsLast>
PYOPS_DEVICE int64_t offset(int64_t n, int64_t c, int64_t h, int64_t w, int64_t channels, int64_t rows,
                            int64_t columns) {
  return ChannelsLast ? ((n * rows + h) * columns + w) * channels + c : ((n * channels + c) * rows + h) * columns + w;
}

template <class T, bool ChannelsLast, bool Mean>
__global__ void __launch_bounds__(256) roi_pool_fwd_kernel(const T* __restrict__ x, const int64_t* __restrict__ rois,
                                                           T* __restrict__ y, int* __restrict__ arg, Shape s) {
  using A = accumulate_t<T>;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x, bins = s.P * s.Q;
  if (i >= s.R * s.channels * bins) return;
  const int64_t c = ChannelsLast ? i % s.channels : i / bins % s.channels;
  const int64_t bin = ChannelsLast ? i / s.channels % bins : i % bins, r = i / (s.channels * bins);
  const int64_t* box = rois + 5 * r;
  const int64_t n = box[0];
  if (n < 0 || n >= s.N) __trap();  // what is no image must never become an address
  const pool::Bins<A> ys(box[2], box[4], s.P, s.H, Mean), xs(box[1], box[3], s.Q, s.W, Mean);
  int64_t h0, h1, w0, w1;
  ys.range(bin / s.Q, h0, h1);
  xs.range(bin % s.Q, w0, w1);
  const int64_t plane = Mean ? c * bins + bin : c;
  A value = 0;
  int64_t pixel = -1;
  for (int64_t h = h0; h < h1; ++h)
    for (int64_t w = w0; w < w1; ++w) {
      const A v = to_acc(x[offset<ChannelsLast>(n, plane, h, w, s.C, s.H, s.W)]);
      if constexpr (Mean) {
        value += v;
      } else if ((pixel < 0 && v == v) || v > value) {
        value = v;
        pixel = h * s.W + w;
      }
    }
  if constexpr (Mean) {
    const int64_t count = (h1 - h0) * (w1 - w0);
    y[i] = from_acc<T>(value / static_cast<A>(count > 1 ? count : 1));
  } else {
    y[i] = from_acc<T>(value);
    arg[i] = static_cast<int>(pixel);
  }
}

struct GatherShared {
  int found[gather_threads];
  CompactScratch<gather_threads> compact;
};

// Channels last: warp w owns pixel w of a run of 8, lanes own channels. Else warp w owns row w of 8, lanes own columns.
// Four blocks to a multiprocessor are asked for: left to itself, ptxas spills registers to fit a fifth.
template <class T, bool ChannelsLast, bool Mean>
__global__ void __launch_bounds__(gather_threads, 4)
    roi_pool_bwd_kernel(const T* __restrict__ dy, const int* __restrict__ arg, const int64_t* __restrict__ rois,
                        T* __restrict__ dx, Shape s, unsigned tiles_x, unsigned tiles_y) {
  using A = accumulate_t<T>;
  constexpr int rows = ChannelsLast ? 1 : 8, columns = ChannelsLast ? 8 : 32;
  auto& shared = shared_storage<GatherShared>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned tile = blockIdx.x % (tiles_x * tiles_y);
  const int64_t n = blockIdx.x / (tiles_x * tiles_y);
  const int row0 = static_cast<int>(tile / tiles_x) * rows, column0 = static_cast<int>(tile % tiles_x) * columns;
  const int h = ChannelsLast ? row0 : row0 + warp, w = column0 + (ChannelsLast ? warp : lane);
  const int c = static_cast<int>(blockIdx.y) * (ChannelsLast ? 32 : 1) + (ChannelsLast ? lane : 0);
  const int pixel = static_cast<int>(static_cast<unsigned>(h) * static_cast<unsigned>(s.W) + w);  // if it is mine
  const bool mine = h < s.H && w < s.W && c < s.C;
  // Mean: plane c = (channel P + p) Q + q; P Q divides C, which is a dimension of the grid.
  const unsigned P = Mean ? static_cast<unsigned>(s.P) : 1, Q = Mean ? static_cast<unsigned>(s.Q) : 1;
  const unsigned plane = static_cast<unsigned>(c), mean_q = plane % Q, mean_p = plane / Q % P,
                 channel = plane / (P * Q);
  A sum = 0;
  for (int64_t from = 0; from < s.R; from += gather_threads) {
    const int64_t candidate = from + threadIdx.x;
    bool hit = false;
    if (candidate < s.R) {
      const int64_t* box = rois + 5 * candidate;
      if (box[0] < 0 || box[0] >= s.N) __trap();
      hit = box[0] == n && pool::Bins<A>(box[2], box[4], s.P, s.H, Mean).touches(row0, row0 + rows - 1) &&
            pool::Bins<A>(box[1], box[3], s.Q, s.W, Mean).touches(column0, column0 + columns - 1);
    }
    const auto [place, count] = compact(hit, shared.compact);
    if (hit) shared.found[place] = static_cast<int>(threadIdx.x);
    __syncthreads();
    for (int k = 0; k < count && mine; ++k) {
      const int64_t r = from + shared.found[k];
      const int64_t* box = rois + 5 * r;
      const pool::Bins<A> ys(box[2], box[4], s.P, s.H, Mean), xs(box[1], box[3], s.Q, s.W, Mean);
      int64_t p0, p1, q0, q1, h0, h1, w0, w1;
      if constexpr (Mean) {
        ys.range(mean_p, h0, h1);
        xs.range(mean_q, w0, w1);
        if (h >= h0 && h < h1 && w >= w0 && w < w1)
          sum += to_acc(dy[offset<ChannelsLast>(r, channel, mean_p, mean_q, s.channels, s.P, s.Q)]) /
                 static_cast<A>((h1 - h0) * (w1 - w0));
      } else {
        ys.holding(h, p0, p1);
        xs.holding(w, q0, q1);
        for (int64_t p = p0; p < p1; ++p)
          for (int64_t q = q0; q < q1; ++q) {
            const int64_t i = offset<ChannelsLast>(r, c, p, q, s.C, s.P, s.Q);
            if (arg[i] == pixel) sum += to_acc(dy[i]);
          }
      }
    }
    __syncthreads();
  }
  if (mine) dx[offset<ChannelsLast>(n, c, h, w, s.C, s.H, s.W)] = from_acc<T>(sum);
}

}  // namespace
}  // namespace pyops

// binding

#include <algorithm>

#include "common/registry.h"

namespace pyops {
namespace {

Shape shape_of(const OpScope& op, const Tensor& x, const Tensor& rois, int64_t P, int64_t Q, bool mean,
               bool channels_last) {
  op.check(x.dim() == 4 && rois.dim() == 2 && P > 0 && Q > 0 && std::max(P, Q) >> 31 == 0,
           "x must have 4 dimensions, rois be [R, 5], the output 1 x 1 or more, < 2^31 a side");
  const int h = channels_last ? 1 : 2;
  const int64_t C = x.size(channels_last ? 3 : 1);
  const Shape s{x.size(0), C, x.size(h), x.size(h + 1), rois.size(0), P, Q, mean ? C / (P * Q) : C};
  op.check(!mean || C % (P * Q) == 0, "C must be a multiple of P * Q");
  op.check(s.H * s.W < (int64_t{1} << 31), "the map must have less than 2^31 pixels");
  return s;
}

std::tuple<Tensor, Tensor> roi_pool_fwd(const Tensor& x, const Tensor& rois, int64_t P, int64_t Q, bool mean,
                                        bool channels_last) {
  OpScope op("roi_pool_fwd", x);
  const Shape s = shape_of(op, x, rois, P, Q, mean, channels_last);
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    const int64_t C = s.channels, R = mean ? 0 : s.R;
    Tensor y = channels_last ? op.empty<T>({s.R, P, Q, C}) : op.empty<T>({s.R, C, P, Q});
    Tensor arg = channels_last ? op.empty<int32_t>({R, P, Q, C}) : op.empty<int32_t>({R, C, P, Q});
    auto* px = channels_last ? op.in<T>(x, "x", {s.N, s.H, s.W, s.C}) : op.in<T>(x, "x", {s.N, s.C, s.H, s.W});
    auto* prois = op.in<int64_t>(rois, "rois", {s.R, 5});
    auto* py = channels_last ? op.out<T>(y, "y", {s.R, P, Q, C}) : op.out<T>(y, "y", {s.R, C, P, Q});
    auto* parg = channels_last ? op.out<int32_t>(arg, "arg", {R, P, Q, C}) : op.out<int32_t>(arg, "arg", {R, C, P, Q});
    const auto run = [&](auto kernel) {
      launch(kernel,
             {.grid = dim3(static_cast<unsigned>(ceil_div(s.R * C * P * Q, 256))),
              .block = dim3(256),
              .stream = static_cast<cudaStream_t>(op.stream())},
             px, prois, py, parg, s);
    };
    if (mean && channels_last)
      run(roi_pool_fwd_kernel<T, true, true>);
    else if (mean)
      run(roi_pool_fwd_kernel<T, false, true>);
    else if (channels_last)
      run(roi_pool_fwd_kernel<T, true, false>);
    else
      run(roi_pool_fwd_kernel<T, false, false>);
    return std::make_tuple(y, arg);
  });
}

Tensor roi_pool_bwd(const Tensor& dy, const Tensor& x, const Tensor& rois, const Tensor& arg, int64_t P, int64_t Q,
                    bool mean, bool channels_last) {
  OpScope op("roi_pool_bwd", dy);
  const Shape s = shape_of(op, x, rois, P, Q, mean, channels_last);
  return dispatch_floating(op, dy.scalar_type(), [&]<class T>() {
    const int64_t C = s.channels, R = mean ? 0 : s.R;
    Tensor dx = channels_last ? op.empty<T>({s.N, s.H, s.W, s.C}) : op.empty<T>({s.N, s.C, s.H, s.W});
    auto* pdy = channels_last ? op.in<T>(dy, "dy", {s.R, P, Q, C}) : op.in<T>(dy, "dy", {s.R, C, P, Q});
    auto* parg = channels_last ? op.in<int32_t>(arg, "arg", {R, P, Q, C}) : op.in<int32_t>(arg, "arg", {R, C, P, Q});
    auto* prois = op.in<int64_t>(rois, "rois", {s.R, 5});
    auto* pdx = channels_last ? op.out<T>(dx, "dx", {s.N, s.H, s.W, s.C}) : op.out<T>(dx, "dx", {s.N, s.C, s.H, s.W});
    if (s.N * s.C * s.H * s.W == 0) return dx;
    const int64_t tiles_y = channels_last ? s.H : ceil_div(s.H, 8), tiles_x = ceil_div(s.W, channels_last ? 8 : 32);
    op.check(s.N * tiles_x * tiles_y < (int64_t{1} << 31), "x must have less than 2^31 tiles of pixels");
    const auto run = [&](auto kernel) {
      launch(kernel,
             {.grid = dim3(static_cast<unsigned>(s.N * tiles_x * tiles_y),
                           static_cast<unsigned>(channels_last ? ceil_div(s.C, 32) : s.C)),
              .block = dim3(gather_threads),
              .smem = sizeof(GatherShared),
              .stream = static_cast<cudaStream_t>(op.stream())},
             pdy, parg, prois, pdx, s, static_cast<unsigned>(tiles_x), static_cast<unsigned>(tiles_y));
    };
    if (mean && channels_last)
      run(roi_pool_bwd_kernel<T, true, true>);
    else if (mean)
      run(roi_pool_bwd_kernel<T, false, true>);
    else if (channels_last)
      run(roi_pool_bwd_kernel<T, true, false>);
    else
      run(roi_pool_bwd_kernel<T, false, false>);
    return dx;
  });
}

}  // namespace
}  // namespace pyops

PYOPS_LIBRARY(m) {
  using namespace pyops;
  PYOPS_IMPL(m, roi_pool_fwd);
  PYOPS_IMPL(m, roi_pool_bwd);
}
