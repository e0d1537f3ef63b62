// grid_sample · CUDA
//   y[n,c,p] = sum over taps of w(tap) x[n,c,i(tap)];  dx gathers w dy;  dgrid = sum over taps of dw/dg sum_c dy x
// layout   x: [N, C, D, H, W] or [N, D, H, W, C] · grid: [N, P, dims] · y: [N, C, P] or [N, P, C]
// mapping  y: a thread an element; dgrid: a thread a point, over its channels. dx: each element of a plane gets the
//          list of the taps that read it (counted, then entered), sorts it, and a thread an element of dx adds in its
//          order
// memory   dx needs 8 bytes a tap and 4 an element of a plane, whatever the number of channels
// numerics A; only whole numbers are counted by atomics, so the order of sums, and every bit, is the same each time
#include "cuda/grid_stride.cuh"

#include "common/grid_sample.h"
#include "common/grid_sample_binding.h"

namespace pyops {
namespace {

using namespace grid_sample;

constexpr int scan_threads = 256;

template <class A, class T>
struct Coordinates {
  A g[3];
  __device__ Coordinates(const T* grid, int64_t dims) {
    for (int d = 0; d < 3; ++d) g[d] = d < dims ? to_acc(grid[d]) : A(0);
  }
};

template <class T, int taps>
__global__ void grid_sample_fwd_kernel(const T* __restrict__ x, const T* __restrict__ grid, T* __restrict__ y,
                                       Shape s) {
  using A = accumulate_t<T>;
  const int64_t total = s.N * s.C * s.P, stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t e = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; e < total; e += stride) {
    const int64_t n = e / (s.C * s.P), rest = e % (s.C * s.P);
    const int64_t c = s.channels_last ? rest % s.C : rest / s.P, p = s.channels_last ? rest / s.C : rest % s.P;
    const T* from = x + n * s.C * s.S() + c * s.x_channel();
    const Coordinates<A, T> at(grid + (n * s.P + p) * s.dims, s.dims);
    A sum = 0;
    each_tap<taps>(s, at.g,
                   [&](int, int64_t i, A w, A, A, A) { sum += w * (i < 0 ? A(0) : to_acc(from[i * s.step()])); });
    y[e] = from_acc<T>(sum);
  }
}

template <class T, int taps>
__global__ void grid_sample_bwd_grid_kernel(const T* __restrict__ dy, const T* __restrict__ x,
                                            const T* __restrict__ grid, T* __restrict__ dgrid, Shape s) {
  using A = accumulate_t<T>;
  const int64_t total = s.N * s.P, stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t e = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; e < total; e += stride) {
    const int64_t n = e / s.P, p = e % s.P;
    const T *from = x + n * s.C * s.S(), *g = dy + n * s.C * s.P + p * s.step();
    const Coordinates<A, T> at(grid + e * s.dims, s.dims);
    A dw = 0, dh = 0, dd = 0;
    each_tap<taps>(s, at.g, [&](int, int64_t i, A, A slope_w, A slope_h, A slope_d) {
      A dot = 0;
      for (int64_t c = 0; c < s.C && i >= 0; ++c)
        dot += to_acc(g[c * s.y_channel()]) * to_acc(from[c * s.x_channel() + i * s.step()]);
      dw += slope_w * dot, dh += slope_h * dot, dd += slope_d * dot;
    });
    dgrid[e * s.dims] = from_acc<T>(dw), dgrid[e * s.dims + 1] = from_acc<T>(dh);
    if (s.dims == 3) dgrid[e * s.dims + 2] = from_acc<T>(dd);
  }
}

// The lists of the taps that read each element: list[n * P * most + first ..] holds p * most + tap.
template <class A>
struct Lists {
  int32_t *end, *list;  // end: [N, S], first the counts, then where the next tap is entered
  A* weight;            // [N, P * most]
  int most;
};

template <class T, int taps, bool enter>
__global__ void grid_sample_list_kernel(const T* __restrict__ grid, Lists<accumulate_t<T>> l, Shape s) {
  using A = accumulate_t<T>;
  const int64_t total = s.N * s.P, stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t e = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; e < total; e += stride) {
    const int64_t n = e / s.P, p = e % s.P;
    const Coordinates<A, T> at(grid + e * s.dims, s.dims);
    each_tap<taps>(s, at.g, [&](int tap, int64_t i, A w, A, A, A) {
      if (i < 0) return;
      const int32_t slot = atomicAdd(&l.end[n * s.S() + i], 1);
      if constexpr (enter) {
        l.list[n * s.P * l.most + slot] = static_cast<int32_t>(p * l.most + tap);
        l.weight[e * l.most + tap] = w;
      }
    });
  }
}

struct ScanShared {
  int32_t sum[scan_threads];
};

// Counts of one example become where its lists begin: a block an example, a run of elements a thread.
__global__ void grid_sample_scan_kernel(int32_t* __restrict__ counts, int64_t S) {
  auto& shared = shared_storage<ScanShared>();
  int32_t* c = counts + blockIdx.x * S;
  const int64_t run = ceil_div(S, scan_threads);
  const int64_t first = threadIdx.x * run, last = first + run < S ? first + run : S;
  int32_t sum = 0;
  for (int64_t i = first; i < last; ++i) sum += c[i];
  shared.sum[threadIdx.x] = sum;
  __syncthreads();
  int32_t before = 0;
  for (int t = 0; t < static_cast<int>(threadIdx.x); ++t) before += shared.sum[t];
  for (int64_t i = first; i < last; ++i) {
    const int32_t count = c[i];
    c[i] = before;
    before += count;
  }
}

// Heap sort: no more than n log n steps where a whole image reads one element.
__device__ void sort_ascending(int32_t* v, int32_t n) {
  const auto sink = [&](int32_t root, int32_t size) {
    const int32_t value = v[root];
    for (int32_t child = 2 * root + 1; child < size; child = 2 * root + 1) {
      if (child + 1 < size && v[child + 1] > v[child]) ++child;
      if (v[child] <= value) break;
      v[root] = v[child];
      root = child;
    }
    v[root] = value;
  };
  for (int32_t i = n / 2; i-- > 0;) sink(i, n);
  for (int32_t size = n; size-- > 1;) {
    const int32_t largest = v[0];
    v[0] = v[size];
    v[size] = largest;
    sink(0, size);
  }
}

template <class A>
__global__ void grid_sample_sort_kernel(Lists<A> l, Shape s) {
  const int64_t total = s.N * s.S(), stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t e = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; e < total; e += stride) {
    const int32_t first = e % s.S() == 0 ? 0 : l.end[e - 1];
    sort_ascending(l.list + e / s.S() * s.P * l.most + first, l.end[e] - first);
  }
}

template <class T>
__global__ void grid_sample_bwd_x_kernel(const T* __restrict__ dy, T* __restrict__ dx, Lists<accumulate_t<T>> l,
                                         Shape s) {
  using A = accumulate_t<T>;
  const int64_t S = s.S(), total = s.N * s.C * S, stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t e = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; e < total; e += stride) {
    const int64_t n = e / (s.C * S), rest = e % (s.C * S);
    const int64_t c = s.channels_last ? rest % s.C : rest / S, i = s.channels_last ? rest / s.C : rest % S;
    const int32_t first = i == 0 ? 0 : l.end[n * S + i - 1], last = l.end[n * S + i];
    const int32_t* list = l.list + n * s.P * l.most;
    const A* weight = l.weight + n * s.P * l.most;
    const T* g = dy + n * s.C * s.P + c * s.y_channel();
    A sum = 0;
    for (int32_t j = first; j < last; ++j) sum += weight[list[j]] * to_acc(g[list[j] / l.most * s.step()]);
    dx[e] = from_acc<T>(sum);
  }
}

}  // namespace
}  // namespace pyops

// binding

#include "common/registry.h"

namespace pyops {
namespace {

template <class T, int taps>
void launch_bwd_x(const OpScope& op, const T* dy, const T* grid, T* dx, const Shape& s) {
  using A = accumulate_t<T>;
  if (s.N * s.C == 0) return;
  const int most = s.dims == 3 ? taps * taps * taps : taps * taps;
  const auto stream = static_cast<cudaStream_t>(op.stream());
  Tensor ends = op.empty<int32_t>({s.N * s.S()}), list = op.empty<int32_t>({s.N * s.P * most});
  Tensor weight = op.empty<A>({s.N * s.P * most});
  const Lists<A> l{op.out<int32_t>(ends, "ends", {s.N * s.S()}), op.out<int32_t>(list, "list", {s.N * s.P * most}),
                   op.out<A>(weight, "weight", {s.N * s.P * most}), most};
  zero_memory(l.end, static_cast<size_t>(s.N * s.S()) * sizeof(int32_t), stream);
  launch(grid_sample_list_kernel<T, taps, false>, grid_stride(s.N * s.P, op.stream()), grid, l, s);
  launch(grid_sample_scan_kernel,
         {.grid = dim3(static_cast<unsigned>(s.N)),
          .block = dim3(scan_threads),
          .smem = sizeof(ScanShared),
          .stream = stream},
         l.end, s.S());
  launch(grid_sample_list_kernel<T, taps, true>, grid_stride(s.N * s.P, op.stream()), grid, l, s);
  launch(grid_sample_sort_kernel<A>, grid_stride(s.N * s.S(), op.stream()), l, s);
  launch(grid_sample_bwd_x_kernel<T>, grid_stride(s.N * s.C * s.S(), op.stream()), dy, dx, l, s);
}

Tensor grid_sample_fwd(const Tensor& x, const Tensor& grid, int64_t mode, int64_t padding, bool align_corners,
                       bool channels_last) {
  OpScope op("grid_sample_fwd", x);
  const Shape s = shape_of(op, x, grid, mode, padding, align_corners, channels_last);
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    Tensor y = empty_y(op, s, scalar_type_of<T>);
    const T *px = in_x<T>(op, x, s), *points = in_grid<T>(op, grid, s);
    T* py = out_y<T>(op, y, s);
    dispatch_mode(mode, [&]<int taps>() {
      launch(grid_sample_fwd_kernel<T, taps>, grid_stride(s.N * s.C * s.P, op.stream()), px, points, py, s);
    });
    return y;
  });
}

std::tuple<Tensor, Tensor> grid_sample_bwd(const Tensor& dy, const Tensor& x, const Tensor& grid, int64_t mode,
                                           int64_t padding, bool align_corners, bool channels_last, bool needs_x,
                                           bool needs_grid) {
  OpScope op("grid_sample_bwd", x);
  const Shape s = shape_of(op, x, grid, mode, padding, align_corners, channels_last);
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    const T *g = in_dy<T>(op, dy, s), *px = in_x<T>(op, x, s), *points = in_grid<T>(op, grid, s);
    Tensor dx = needs_x ? op.empty<T>(ShapeRef(x)) : op.empty<T>({0});
    Tensor dgrid = needs_grid ? op.empty<T>(ShapeRef(grid)) : op.empty<T>({0});
    dispatch_mode(mode, [&]<int taps>() {
      if (needs_x) launch_bwd_x<T, taps>(op, g, points, out_like<T>(op, dx, "dx", x), s);
      if (needs_grid)
        launch(grid_sample_bwd_grid_kernel<T, taps>, grid_stride(s.N * s.P, op.stream()), g, px, points,
               out_like<T>(op, dgrid, "dgrid", grid), s);
    });
    return std::make_tuple(dx, dgrid);
  });
}

PYOPS_LIBRARY(m) {
  PYOPS_IMPL(m, grid_sample_fwd);
  PYOPS_IMPL(m, grid_sample_bwd);
}

}  // namespace
}  // namespace pyops
