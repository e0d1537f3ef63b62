// boxes · CUDA
//   y[b,n,m] = overlap(boxes1[b,n], boxes2[b,m])     IoU, generalised, distance or complete (common/boxes.h)
// layout   boxes1: [B, N, 4] · boxes2: [B, M, 4] as (x1, y1, x2, y2) · y, dy: [B, N, M] in A
// mapping  forward: a thread owns column m over 16 rows. Backward: a warp per row n with lanes over m for d boxes1;
//          lanes over m, 8 warps over rows for d boxes2. Both read dy in whole lines
// memory   forward writes y once; backward reads dy twice
// numerics A throughout; sums in a fixed order
#include "cuda/device.cuh"

#include "common/boxes.h"

namespace pyops {
namespace {

constexpr int fwd_rows = 16;

template <int K, class T>
PYOPS_DEVICE overlap::Box<accumulate_t<T>> load_box(const T* boxes, int64_t i) {
  using A = accumulate_t<T>;
  const Vec<T, 4> v = load_vec<4>(boxes + 4 * i);
  overlap::Box<A> box{to_acc(v[0]), to_acc(v[1]), to_acc(v[2]), to_acc(v[3]), A(0)};
  if constexpr (K == overlap::complete) box.angle = atan((box.x2 - box.x1) / (box.y2 - box.y1));
  return box;
}

template <int K, class T>
__global__ void __launch_bounds__(128)
    box_overlap_fwd_kernel(const T* __restrict__ boxes1, const T* __restrict__ boxes2, accumulate_t<T>* __restrict__ y,
                           int64_t N, int64_t M, int64_t row_tiles, int64_t tiles, accumulate_t<T> eps) {
  const int64_t b = blockIdx.x / (row_tiles * tiles), rest = blockIdx.x % (row_tiles * tiles);
  const int64_t m = rest % tiles * 128 + threadIdx.x, first = rest / tiles * fwd_rows;
  if (m >= M) return;
  const auto box = load_box<K>(boxes2, b * M + m);
  for (int64_t n = first; n < first + fwd_rows && n < N; ++n)
    y[(b * N + n) * M + m] = overlap::pair_fwd<K>(load_box<K>(boxes1, b * N + n), box, eps);
}

template <int K, class T>
__global__ void __launch_bounds__(128)
    box_overlap_bwd_rows_kernel(const accumulate_t<T>* __restrict__ dy, const T* __restrict__ boxes1,
                                const T* __restrict__ boxes2, T* __restrict__ d1, int64_t rows, int64_t N, int64_t M,
                                accumulate_t<T> eps) {
  using A = accumulate_t<T>;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * 4 + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  A da[4] = {}, unused[4] = {};
  if (row < rows) {
    const auto box = load_box<K>(boxes1, row);
    const int64_t b = row / N;
    for (int64_t m = lane; m < M; m += 32)
      overlap::pair_bwd<K>(box, load_box<K>(boxes2, b * M + m), eps, dy[row * M + m], da, unused);
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const A sum = warp_sum(da[k]);
    if (lane == k && row < rows) d1[row * 4 + k] = from_acc<T>(sum);
  }
}

template <class A>
struct ColumnShared {
  A part[8][4][32];
};

template <int K, class T>
__global__ void __launch_bounds__(256)
    box_overlap_bwd_columns_kernel(const accumulate_t<T>* __restrict__ dy, const T* __restrict__ boxes1,
                                   const T* __restrict__ boxes2, T* __restrict__ d2, int64_t N, int64_t M,
                                   int64_t tiles, accumulate_t<T> eps) {
  using A = accumulate_t<T>;
  auto& s = shared_storage<ColumnShared<A>>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t b = blockIdx.x / tiles, m = blockIdx.x % tiles * 32 + lane;
  A db[4] = {}, unused[4] = {};
  if (m < M) {
    const auto box = load_box<K>(boxes2, b * M + m);
    for (int64_t n = warp; n < N; n += 8)
      overlap::pair_bwd<K>(load_box<K>(boxes1, b * N + n), box, eps, dy[(b * N + n) * M + m], unused, db);
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) s.part[warp][k][lane] = db[k];
  __syncthreads();
  if (warp < 4 && m < M) {
    A sum = 0;
    for (int w = 0; w < 8; ++w) sum += s.part[w][warp][lane];
    d2[(b * M + m) * 4 + warp] = from_acc<T>(sum);
  }
}

}  // namespace
}  // namespace pyops

// binding

#include "common/registry.h"

namespace pyops {
namespace {

dim3 grid_for(int64_t blocks) { return dim3(static_cast<unsigned>(blocks)); }

Tensor box_overlap_fwd(const Tensor& boxes1, const Tensor& boxes2, int64_t kind, double eps) {
  OpScope op("box_overlap_fwd", boxes1);
  op.check(boxes1.dim() == 3 && boxes2.dim() == 3, "boxes must be [B, N, 4] and [B, M, 4]");
  const int64_t B = boxes1.size(0), N = boxes1.size(1), M = boxes2.size(1);
  return dispatch_floating(op, boxes1.scalar_type(), [&]<class T>() {
    using A = accumulate_t<T>;
    Tensor y = op.empty<A>({B, N, M});
    auto *p1 = op.in<T>(boxes1, "boxes1", {B, N, 4}), *p2 = op.in<T>(boxes2, "boxes2", {B, M, 4});
    auto* py = op.out<A>(y, "y", {B, N, M});
    const int64_t tiles = ceil_div(M, 128), row_tiles = ceil_div(N, fwd_rows);
    overlap::with_kind(kind, [&]<int K>() {
      launch(box_overlap_fwd_kernel<K, T>,
             {.grid = grid_for(B * row_tiles * tiles),
              .block = dim3(128),
              .stream = static_cast<cudaStream_t>(op.stream())},
             p1, p2, py, N, M, row_tiles, tiles, static_cast<A>(eps));
    });
    return y;
  });
}

std::tuple<Tensor, Tensor> box_overlap_bwd(const Tensor& dy, const Tensor& boxes1, const Tensor& boxes2, int64_t kind,
                                           double eps) {
  OpScope op("box_overlap_bwd", dy);
  op.check(boxes1.dim() == 3 && boxes2.dim() == 3, "boxes must be [B, N, 4] and [B, M, 4]");
  const int64_t B = boxes1.size(0), N = boxes1.size(1), M = boxes2.size(1);
  return dispatch_floating(op, boxes1.scalar_type(), [&]<class T>() {
    using A = accumulate_t<T>;
    Tensor d1 = op.empty<T>({B, N, 4}), d2 = op.empty<T>({B, M, 4});
    auto* pdy = op.in<A>(dy, "dy", {B, N, M});
    auto *p1 = op.in<T>(boxes1, "boxes1", {B, N, 4}), *p2 = op.in<T>(boxes2, "boxes2", {B, M, 4});
    auto *pd1 = op.out<T>(d1, "d1", {B, N, 4}), *pd2 = op.out<T>(d2, "d2", {B, M, 4});
    const auto stream = static_cast<cudaStream_t>(op.stream());
    const int64_t tiles = ceil_div(M, 32);
    overlap::with_kind(kind, [&]<int K>() {
      launch(box_overlap_bwd_rows_kernel<K, T>,
             {.grid = grid_for(ceil_div(B * N, 4)), .block = dim3(128), .stream = stream}, pdy, p1, p2, pd1, B * N, N,
             M, static_cast<A>(eps));
      launch(box_overlap_bwd_columns_kernel<K, T>,
             {.grid = grid_for(B * tiles), .block = dim3(256), .smem = sizeof(ColumnShared<A>), .stream = stream}, pdy,
             p1, p2, pd2, N, M, tiles, static_cast<A>(eps));
    });
    return std::make_tuple(d1, d2);
  });
}

}  // namespace
}  // namespace pyops

PYOPS_LIBRARY(m) {
  using namespace pyops;
  PYOPS_IMPL(m, box_overlap_fwd);
  PYOPS_IMPL(m, box_overlap_bwd);
}
