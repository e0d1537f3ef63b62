// hog · CUDA
//   cells[i,j,o] = 1/|cell| · sum over the pixels of cell (i,j) whose gradient g points into bin o of |g|
//   y[b,:] = v/n,  v: the cells of block b;  n = sum v + eps (L1)  or sqrt(sum v² + eps²) (L2)
//   L1-sqrt: sqrt(v/n);  L2-Hys: t = min(v/n, 0.2), then t/m with m = sqrt(sum t² + eps²)
// layout   x: [N, C, H, W] or, channels_last, [N, H, W, C] · cells: [N, cells_h, cells_w, O] in fp32 (fp64)
//          y: [N, blocks_h, blocks_w, block_h, block_w, O]
// mapping  a warp takes a cell: its lanes 32 pixels at a time, then the bins; a warp takes a block, its lanes the values;
//          backward: a thread a value of a cell, a pixel, an element of dx
// memory   x once from DRAM; backward: scratch for every value of y, two fp32 (fp64) and a channel for each pixel
// numerics fp32 (fp64 for fp64), the sums of cells in fp64; no atomics: a gradient is gathered, in a fixed order
#include "cuda/grid_stride.cuh"

#include "common/hog.h"
#include "cuda/math.cuh"

namespace pyops {
namespace {

using namespace hog;

constexpr int warps_a_block = 4, bins_a_lane = most_orientations / 32;

template <class A>
struct Votes {
  A magnitude[warps_a_block][32];
  int bin[warps_a_block][32];
};

template <class T, class A>
__global__ void __launch_bounds__(32 * warps_a_block)
    hog_cells_kernel(const T* __restrict__ x, A* __restrict__ cells, Sizes z, Directions<A> d) {
  auto& s = shared_storage<Votes<A>>();
  const int lane = threadIdx.x, warp = threadIdx.y;
  const int64_t cell = static_cast<int64_t>(blockIdx.x) * warps_a_block + warp;
  if (cell >= z.cells()) return;
  const int64_t left = cell % z.cells_w * z.cell_w, top = cell / z.cells_w % z.cells_h * z.cell_h;
  const T* image = x + cell / z.cells_w / z.cells_h * z.image();
  const int64_t pixels = z.cell_h * z.cell_w;
  double total[bins_a_lane] = {};
  for (int64_t first = 0; first < pixels; first += 32) {
    const int64_t p = first + lane;
    const bool valid = p < pixels;
    const Gradient<A> g = valid ? gradient<A>(image, z, top + p / z.cell_w, left + p % z.cell_w) : Gradient<A>{0, 0, 0};
    s.magnitude[warp][lane] = sqrt(g.x * g.x + g.y * g.y);
    s.bin[warp][lane] = bin(g.x, g.y, z.O, d);
    __syncwarp();
    for (int k = 0; k < bins_a_lane; ++k) {
      A sum = 0;
      for (int i = 0; i < 32; ++i) sum += s.bin[warp][i] == lane + 32 * k ? s.magnitude[warp][i] : A(0);
      total[k] += sum;
    }
    __syncwarp();
  }
  for (int k = 0; k < bins_a_lane; ++k)
    if (lane + 32 * k < z.O) cells[cell * z.O + lane + 32 * k] = static_cast<A>(total[k] / static_cast<double>(pixels));
}

// What the values of a block are multiplied with, 1/n and 1/m; every lane has it.
template <class A>
struct Scale {
  int64_t norm;
  A n, m;
};

template <class A>
PYOPS_DEVICE A clipped(A v, const Scale<A>& s) {
  const A u = v * s.n;
  return u > A(limit) ? A(limit) : u;
}

template <class A>
PYOPS_DEVICE Scale<A> scale_of(const A* v, const Sizes& z, int64_t norm) {
  const bool squares = norm >= l2;
  const int64_t K = z.values();
  A total = 0;
  for (int k = threadIdx.x; k < K; k += 32) {
    const A value = v[z.step_to(k)];
    total += squares ? value * value : value;
  }
  total = warp_sum<32>(total);
  Scale<A> s{norm, A(1) / (squares ? sqrt(total + A(epsilon * epsilon)) : total + A(epsilon)), A(1)};
  if (norm != l2_hys) return s;
  total = 0;
  for (int k = threadIdx.x; k < K; k += 32) {
    const A t = clipped(v[z.step_to(k)], s);
    total += t * t;
  }
  s.m = A(1) / sqrt(warp_sum<32>(total) + A(epsilon * epsilon));
  return s;
}

template <class T, class A>
__global__ void __launch_bounds__(32 * warps_a_block)
    hog_blocks_kernel(const A* __restrict__ cells, T* __restrict__ y, Sizes z, int64_t norm) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * warps_a_block + threadIdx.y, K = z.values();
  if (b >= z.blocks()) return;
  const A* of = cells + z.begin_of(b);
  const Scale<A> s = scale_of(of, z, norm);
  for (int k = threadIdx.x; k < K; k += 32) {
    const A v = of[z.step_to(k)];
    const A scaled = norm == l1_sqrt ? sqrt(v * s.n) : norm == l2_hys ? clipped(v, s) * s.m : v * s.n;
    y[b * K + k] = from_acc<T>(scaled);
  }
}

template <class T, class A>
__global__ void __launch_bounds__(32 * warps_a_block)
    hog_blocks_bwd_kernel(const T* __restrict__ dy, const A* __restrict__ cells, A* __restrict__ dv, Sizes z,
                          int64_t norm) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * warps_a_block + threadIdx.y, K = z.values();
  if (b >= z.blocks()) return;
  const A* of = cells + z.begin_of(b);
  const Scale<A> s = scale_of(of, z, norm);
  A along = 0;
  if (norm == l2_hys) {
    for (int k = threadIdx.x; k < K; k += 32) along += A(to_acc(dy[b * K + k])) * clipped(of[z.step_to(k)], s);
    along = warp_sum<32>(along) * s.m * s.m;
  }
  const auto of_share = [&](int k, A v) -> A {  // the gradient of v/n
    const A u = v * s.n, g = to_acc(dy[b * K + k]);
    if (norm == l1_sqrt) return u > A(0) ? g / (A(2) * sqrt(u)) : A(0);
    if (norm == l2_hys) return u > A(limit) ? A(0) : (g - clipped(v, s) * along) * s.m;
    return g;
  };
  A inner = 0;
  for (int k = threadIdx.x; k < K; k += 32) {
    const A v = of[z.step_to(k)];
    inner += of_share(k, v) * v;
  }
  inner = warp_sum<32>(inner) * s.n * s.n;
  for (int k = threadIdx.x; k < K; k += 32) {
    const A v = of[z.step_to(k)];
    dv[b * K + k] = of_share(k, v) * s.n - (norm >= l2 ? v * s.n : A(1)) * inner;
  }
}

// A cell lies at (i, j) of the block that begins i rows above and j columns before it.
template <class A>
__global__ void hog_cells_bwd_kernel(const A* __restrict__ dv, A* __restrict__ dcells, Sizes z) {
  const int64_t total = z.cells() * z.O, stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t e = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; e < total; e += stride) {
    const int64_t o = e % z.O, column = e / z.O % z.cells_w, row = e / z.O / z.cells_w % z.cells_h;
    const int64_t n = e / z.O / z.cells_w / z.cells_h;
    A sum = 0;
    for (int64_t i = 0; i < z.block_h; ++i)
      for (int64_t j = 0; j < z.block_w; ++j) {
        const int64_t top = row - i, left = column - j;
        if (top < 0 || top >= z.blocks_h || left < 0 || left >= z.blocks_w) continue;
        sum += dv[((((n * z.blocks_h + top) * z.blocks_w + left) * z.block_h + i) * z.block_w + j) * z.O + o];
      }
    dcells[e] = sum / static_cast<A>(z.cell_h * z.cell_w);
  }
}

// u, v: the gradients of the two differences of each pixel; |g| moves along g/|g|, and not at all where g = 0.
template <class T, class A>
__global__ void hog_votes_bwd_kernel(const T* __restrict__ x, const A* __restrict__ dcells, A* __restrict__ u,
                                     A* __restrict__ v, int32_t* __restrict__ channel, Sizes z, Directions<A> d) {
  const int64_t total = z.N * z.H * z.W, stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t e = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; e < total; e += stride) {
    const int64_t w = e % z.W, h = e / z.W % z.H, n = e / z.W / z.H, i = h / z.cell_h, j = w / z.cell_w;
    const Gradient<A> g = gradient<A>(x + n * z.image(), z, h, w);
    const A magnitude = sqrt(g.x * g.x + g.y * g.y);
    A slope = 0;
    if (i < z.cells_h && j < z.cells_w && magnitude != 0)
      slope = dcells[((n * z.cells_h + i) * z.cells_w + j) * z.O + bin(g.x, g.y, z.O, d)] / magnitude;
    u[e] = slope * g.x, v[e] = slope * g.y, channel[e] = g.channel;
  }
}

// dx[c] at a pixel: it is what lies ahead of one neighbour and behind the other, wherever they took channel c.
template <class T, class A>
__global__ void hog_differences_bwd_kernel(const A* __restrict__ u, const A* __restrict__ v,
                                           const int32_t* __restrict__ channel, T* __restrict__ dx, Sizes z) {
  const int64_t total = z.N * z.image(), stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t e = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; e < total; e += stride) {
    const int64_t w = e / z.pixel % z.W, h = e / z.row() % z.H, c = e / z.plane % z.C, n = e / z.image();
    const int64_t p = (n * z.H + h) * z.W + w;
    const auto part = [&](bool inside, const A* field, int64_t at) {
      return inside && channel[at] == c ? field[at] : A(0);
    };
    const A across = part(w > 0, u, p - 1) - part(w + 1 < z.W, u, p + 1);
    dx[e] = from_acc<T>(across + part(h > 0, v, p - z.W) - part(h + 1 < z.H, v, p + z.W));
  }
}

}  // namespace
}  // namespace pyops

// binding

#include "common/hog_binding.h"
#include "common/registry.h"

namespace pyops {
namespace {

LaunchConfig a_warp_each(int64_t items, void* stream, size_t smem = 0) {
  return {.grid = dim3(static_cast<unsigned>(ceil_div(items, warps_a_block))),
          .block = dim3(32, warps_a_block),
          .smem = smem,
          .stream = static_cast<cudaStream_t>(stream)};
}

std::tuple<Tensor, Tensor> hog_fwd(const Tensor& x, int64_t orientations, Ints cell, Ints block, int64_t norm,
                                   bool channels_last) {
  OpScope op("hog_fwd", x);
  const Sizes z = sizes_of(op, x, orientations, cell, block, norm, channels_last);
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    using A = accumulate_t<T>;
    Tensor y = op.empty<T>({z.N, z.blocks_h, z.blocks_w, z.block_h, z.block_w, z.O});
    Tensor cells = op.empty<A>({z.N, z.cells_h, z.cells_w, z.O});
    const T* px = op.in<T>(x, "x", ShapeRef(x));
    A* votes = op.out<A>(cells, "cells", {z.N, z.cells_h, z.cells_w, z.O});
    T* py = op.out<T>(y, "y", {z.N, z.blocks_h, z.blocks_w, z.block_h, z.block_w, z.O});
    launch(hog_cells_kernel<T, A>, a_warp_each(z.cells(), op.stream(), sizeof(Votes<A>)), px, votes, z,
           directions<A>(z.O));
    launch(hog_blocks_kernel<T, A>, a_warp_each(z.blocks(), op.stream()), static_cast<const A*>(votes), py, z, norm);
    return std::make_tuple(y, cells);
  });
}

Tensor hog_bwd(const Tensor& dy, const Tensor& x, const Tensor& cells, int64_t orientations, Ints cell, Ints block,
               int64_t norm, bool channels_last) {
  OpScope op("hog_bwd", x);
  const Sizes z = sizes_of(op, x, orientations, cell, block, norm, channels_last);
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    using A = accumulate_t<T>;
    Tensor dx = op.empty<T>(ShapeRef(x));
    const T* g = op.in<T>(dy, "dy", {z.N, z.blocks_h, z.blocks_w, z.block_h, z.block_w, z.O});
    const T* px = op.in<T>(x, "x", ShapeRef(x));
    const A* votes = op.in<A>(cells, "cells", {z.N, z.cells_h, z.cells_w, z.O});
    Tensor of_blocks = op.empty<A>({z.blocks(), z.values()}), of_cells = op.empty<A>({z.cells(), z.O});
    Tensor across = op.empty<A>({z.N, z.H, z.W}), down = op.empty<A>({z.N, z.H, z.W});
    Tensor taken = op.empty<int32_t>({z.N, z.H, z.W});
    A* dv = op.out<A>(of_blocks, "of_blocks", {z.blocks(), z.values()});
    A* dcells = op.out<A>(of_cells, "of_cells", {z.cells(), z.O});
    A *u = op.out<A>(across, "u", {z.N, z.H, z.W}), *v = op.out<A>(down, "v", {z.N, z.H, z.W});
    int32_t* channel = op.out<int32_t>(taken, "channel", {z.N, z.H, z.W});
    launch(hog_blocks_bwd_kernel<T, A>, a_warp_each(z.blocks(), op.stream()), g, votes, dv, z, norm);
    launch(hog_cells_bwd_kernel<A>, grid_stride(z.cells() * z.O, op.stream()), static_cast<const A*>(dv), dcells, z);
    launch(hog_votes_bwd_kernel<T, A>, grid_stride(z.N * z.H * z.W, op.stream()), px, static_cast<const A*>(dcells), u,
           v, channel, z, directions<A>(z.O));
    launch(hog_differences_bwd_kernel<T, A>, grid_stride(x.numel(), op.stream()), static_cast<const A*>(u),
           static_cast<const A*>(v), static_cast<const int32_t*>(channel), op.out<T>(dx, "dx", ShapeRef(x)), z);
    return dx;
  });
}

PYOPS_LIBRARY(m) {
  PYOPS_IMPL(m, hog_fwd);
  PYOPS_IMPL(m, hog_bwd);
}

}  // namespace
}  // namespace pyops
