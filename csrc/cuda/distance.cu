// distance · CUDA
//   cdist  y[b,p,r] = (sum_m |x1[b,p,m] - x2[b,r,m]|^p)^(1/p), p = 0, 1, 2, infinity or any other; metrics in
//          common/distance.h;  dx1[p] = sum_r of the gradient of y[p,r] in x1[p], dx2 likewise
//   knn    the k smallest of each row of such a y, ascending, the lower index first among equals, with their indices
// layout   x1: [B, P, M] · x2: [B, R, M] · y, dy: [B, P, R] · knn: lists [B, P, parts, k]
// mapping  cdist: a block of 256 threads takes a tile of 64 × 64, a thread 4 × 4, through 16 columns of shared memory
// at a
//          time. Its gradient: a block takes 8 rows and 32 columns of dx. knn: a block takes 16 rows of x1 and a part
//          of x2 in tiles of 64; a warp keeps the lists of two rows in global memory, their worst in a register
// memory   cdist: x1 and x2 once for each 64 rows of the other, y once. knn: x2 once for each 16 rows; no [P, R]
// anywhere numerics differences first, so that the distance of equals is 0 exactly; sums in fp32 (fp64 for fp64)
#include "cuda/math.cuh"

#include "common/distance.h"
#include "common/distance_binding.h"

namespace pyops {
namespace {

using namespace distance;

constexpr int tile = 64, depth = 16, gradient_rows = 8, gradient_columns = 32, knn_rows = 16;

template <class A, int rows>
struct Operands {
  A a[depth][rows + 4];
  A b[depth][tile + 4];
};

// to[m][r] = x[first + r][from + m], zero where there is none: equal zeros add nothing to any metric.
template <int rows, class A, class T>
PYOPS_DEVICE void load_operand(A (&to)[depth][rows + 4], const T* x, int64_t first, int64_t count, int64_t from,
                               int64_t M) {
  for (int e = static_cast<int>(threadIdx.x); e < rows * depth; e += 256) {
    const int r = e / depth, m = e % depth;
    to[m][r] = first + r < count && from + m < M ? to_acc(x[(first + r) * M + from + m]) : A(0);
  }
}

template <class T, class Metric>
__global__ void __launch_bounds__(256)
    cdist_fwd_kernel(const T* __restrict__ x1, const T* __restrict__ x2, T* __restrict__ y, Shape s, Metric metric) {
  using A = accumulate_t<T>;
  auto& shared = shared_storage<Operands<A, tile>>();
  const int64_t tiles_r = ceil_div(s.R, tile), tiles_p = ceil_div(s.P, tile), block = blockIdx.x;
  const int64_t row = block / tiles_r % tiles_p * tile, column = block % tiles_r * tile, b = block / tiles_r / tiles_p;
  const int i0 = static_cast<int>(threadIdx.x) / 16 * 4, j0 = static_cast<int>(threadIdx.x) % 16 * 4;
  A sum[4][4] = {};
  for (int64_t m = 0; m < s.M; m += depth) {
    load_operand<tile>(shared.a, x1 + b * s.P * s.M, row, s.P, m, s.M);
    load_operand<tile>(shared.b, x2 + b * s.R * s.M, column, s.R, m, s.M);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < depth; ++k) {
      A left[4], right[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) left[i] = shared.a[k][i0 + i], right[i] = shared.b[k][j0 + i];
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] = metric.add(sum[i][j], left[i] - right[j]);
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (row + i0 + i < s.P && column + j0 + j < s.R)
        y[(b * s.P + row + i0 + i) * s.R + column + j0 + j] = from_acc<T>(metric.finish(sum[i][j]));
}

// dy and dist are read by strides, so that both gradients are this one.
struct Strides {
  int64_t batch, row, column;
};
template <class A>
struct GradientShared {
  A other[32][gradient_columns];
  A factor[gradient_rows][32];
  A dist[gradient_rows][32];
};

template <class T, class Metric>
__global__ void __launch_bounds__(256, 4)
    cdist_bwd_kernel(const T* __restrict__ dy, const T* __restrict__ dist, Strides at, const T* __restrict__ x,
                     const T* __restrict__ other, T* __restrict__ dx, int64_t P, int64_t R, int64_t M, Metric metric) {
  using A = accumulate_t<T>;
  auto& shared = shared_storage<GradientShared<A>>();
  const int64_t tiles_m = ceil_div(M, gradient_columns), tiles_p = ceil_div(P, gradient_rows), block = blockIdx.x;
  const int tx = static_cast<int>(threadIdx.x) % 32, ty = static_cast<int>(threadIdx.x) / 32;
  const int64_t b = block / tiles_m / tiles_p, row = block / tiles_m % tiles_p * gradient_rows + ty;
  const int64_t column = block % tiles_m * gradient_columns + tx;
  const bool mine = row < P && column < M;
  const A v = mine ? to_acc(x[(b * P + row) * M + column]) : A(0);
  A sum = 0;
  for (int64_t r0 = 0; r0 < R; r0 += 32) {
    for (int r = ty; r < 32; r += gradient_rows)
      shared.other[r][tx] = r0 + r < R && column < M ? to_acc(other[(b * R + r0 + r) * M + column]) : A(0);
    const bool there = row < P && r0 + tx < R;
    const int64_t from = b * at.batch + row * at.row + (r0 + tx) * at.column;
    const A distance = there ? to_acc(dist[from]) : A(0);
    shared.dist[ty][tx] = distance;
    shared.factor[ty][tx] = there ? metric.factor(to_acc(dy[from]), distance) : A(0);
    __syncthreads();
    const int count = R - r0 < 32 ? static_cast<int>(R - r0) : 32;
    A part = 0;  // sums of 32 first: the rounding of a long sum grows with the number of its steps
#pragma unroll 4
    for (int r = 0; r < count; ++r)
      part += shared.factor[ty][r] * metric.along(v - shared.other[r][tx], shared.dist[ty][r]);
    sum += part;
    __syncthreads();
  }
  if (mine) dx[(b * P + row) * M + column] = from_acc<T>(sum);
}

// The list of one row, kept by a warp: ascending, a NaN larger than everything. Every lane has the same `filled` and
// `worst`.
template <class A>
struct WarpBest {
  A* value;
  int64_t* index;
  int64_t k;
  int64_t filled;
  A worst;

  static PYOPS_DEVICE bool before(A a, A b) { return a < b || (b != b && a == a); }
  PYOPS_DEVICE bool takes(A v) const { return filled < k || before(v, worst); }
  PYOPS_DEVICE void add(A v, int64_t i) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    int64_t at = 0;
    for (int64_t j = lane; j - lane < filled; j += 32)
      at += __popc(__ballot_sync(0xffffffffu, j < filled && !before(v, value[j])));
    const int64_t last = filled < k ? filled++ : k - 1;
    for (int64_t base = last / 32 * 32; base >= at / 32 * 32; base -= 32) {
      const int64_t j = base + lane;
      const bool moves = j > at && j <= last;
      const A one = moves ? value[j - 1] : A(0);
      const int64_t place = moves ? index[j - 1] : 0;
      __syncwarp();
      if (moves) value[j] = one, index[j] = place;
      __syncwarp();
    }
    if (lane == 0) value[at] = v, index[at] = i;
    __syncwarp();
    worst = value[filled - 1];
  }
  // Every lane offers one candidate; they are taken in the order of the lanes.
  PYOPS_DEVICE void offer(A v, int64_t i, bool valid) {
    unsigned wanted = __ballot_sync(0xffffffffu, valid && takes(v));
    for (; wanted != 0; wanted &= wanted - 1) {
      const int lane = __ffs(static_cast<int>(wanted)) - 1;
      const A candidate = __shfl_sync(0xffffffffu, v, lane);
      const int64_t place = __shfl_sync(0xffffffffu, i, lane);
      if (takes(candidate)) add(candidate, place);
    }
  }
};

template <class A>
struct KnnShared {
  Operands<A, knn_rows> operands;
  A sums[knn_rows][tile];
};

template <class T, class Metric>
__global__ void __launch_bounds__(256)
    knn_kernel(const T* __restrict__ query, const T* __restrict__ data, accumulate_t<T>* values, int64_t* places,
               int64_t* filled, Shape s, int64_t k, int64_t parts, Metric metric) {
  using A = accumulate_t<T>;
  auto& shared = shared_storage<KnnShared<A>>();
  const int64_t blocks = ceil_div(s.P, knn_rows), tiles = ceil_div(s.R, tile), block = blockIdx.x;
  const int64_t part = block % parts, row = block / parts % blocks * knn_rows, b = block / parts / blocks;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int i0 = static_cast<int>(threadIdx.x) / 16, j0 = static_cast<int>(threadIdx.x) % 16 * 4;
  // the lists of the warp's two rows, as long as nothing was found
  const auto list_of = [&](int half) {
    const int64_t list = (b * s.P + row + warp * 2 + half) * parts + part;
    return WarpBest<A>{values + list * k, places + list * k, k, 0, A(0)};
  };
  WarpBest<A> first = list_of(0), second = list_of(1);
  const auto offer = [&](WarpBest<A>& best, int r, int64_t from) {
    if (row + r >= s.P) return;
    for (int c = 0; c < tile; c += 32) best.offer(shared.sums[r][c + lane], from + c + lane, from + c + lane < s.R);
  };
  for (int64_t q = part * tiles / parts; q < (part + 1) * tiles / parts; ++q) {
    A sum[4] = {};
    for (int64_t m = 0; m < s.M; m += depth) {
      load_operand<knn_rows>(shared.operands.a, query + b * s.P * s.M, row, s.P, m, s.M);
      load_operand<tile>(shared.operands.b, data + b * s.R * s.M, q * tile, s.R, m, s.M);
      __syncthreads();
#pragma unroll
      for (int d = 0; d < depth; ++d)
#pragma unroll
        for (int j = 0; j < 4; ++j)
          sum[j] = metric.add(sum[j], shared.operands.a[d][i0] - shared.operands.b[d][j0 + j]);
      __syncthreads();
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) shared.sums[i0][j0 + j] = sum[j];
    __syncthreads();
    offer(first, warp * 2, q * tile);
    offer(second, warp * 2 + 1, q * tile);
    __syncthreads();
  }
  const int64_t r = row + warp * 2;
  if (r < s.P && lane == 0) filled[(b * s.P + r) * parts + part] = first.filled;
  if (r + 1 < s.P && lane == 0) filled[(b * s.P + r + 1) * parts + part] = second.filled;
}

// The parts of a row, in their order, into one list. A warp a row.
template <class T, class Metric>
__global__ void __launch_bounds__(256)
    knn_merge_kernel(const accumulate_t<T>* values, const int64_t* places, const int64_t* filled,
                     accumulate_t<T>* merged, T* distances, int64_t* indices, int64_t rows, int64_t k, int64_t parts,
                     Metric metric) {
  using A = accumulate_t<T>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * 8 + static_cast<int>(threadIdx.x) / 32;
  if (row >= rows) return;
  WarpBest<A> best{merged + row * k, indices + row * k, k, 0, A(0)};
  for (int64_t list = row * parts; list < (row + 1) * parts; ++list)
    for (int64_t j = 0; j < filled[list]; j += 32) {
      const bool valid = j + lane < filled[list];
      best.offer(valid ? values[list * k + j + lane] : A(0), valid ? places[list * k + j + lane] : 0, valid);
    }
  for (int64_t j = lane; j < k; j += 32) distances[row * k + j] = from_acc<T>(metric.finish(merged[row * k + j]));
}

template <class T, class Metric>
void launch_gradient(const Metric& metric, const T* dy, const T* dist, Strides at, const T* x, const T* other, T* dx,
                     int64_t B, int64_t P, int64_t R, int64_t M, cudaStream_t stream) {
  const int64_t blocks = B * ceil_div(P, gradient_rows) * ceil_div(M, gradient_columns);
  launch(cdist_bwd_kernel<T, Metric>,
         {.grid = dim3(static_cast<unsigned>(blocks)),
          .block = dim3(256),
          .smem = sizeof(GradientShared<accumulate_t<T>>),
          .stream = stream},
         dy, dist, at, x, other, dx, P, R, M, metric);
}

}  // namespace
}  // namespace pyops

// binding

#include "common/registry.h"

namespace pyops {
namespace {

Tensor cdist_fwd(const Tensor& x1, const Tensor& x2, double p) {
  OpScope op("cdist_fwd", x1);
  const Shape s = shape_of(op, x1, x2, p);
  return dispatch_floating(op, x1.scalar_type(), [&]<class T>() {
    Tensor y = op.empty<T>({s.B, s.P, s.R});
    const T *a = op.in<T>(x1, "x1", {s.B, s.P, s.M}), *b = op.in<T>(x2, "x2", {s.B, s.R, s.M});
    T* to = op.out<T>(y, "y", {s.B, s.P, s.R});
    const int64_t blocks = s.B * ceil_div(s.P, tile) * ceil_div(s.R, tile);
    with_metric(p, [&](const auto& metric) {
      launch(cdist_fwd_kernel<T, std::decay_t<decltype(metric)>>,
             {.grid = dim3(static_cast<unsigned>(blocks)),
              .block = dim3(256),
              .smem = sizeof(Operands<accumulate_t<T>, tile>),
              .stream = static_cast<cudaStream_t>(op.stream())},
             a, b, to, s, metric);
    });
    return y;
  });
}

std::tuple<Tensor, Tensor> cdist_bwd(const Tensor& dy, const Tensor& x1, const Tensor& x2, const Tensor& dist, double p,
                                     bool need_dx1, bool need_dx2) {
  OpScope op("cdist_bwd", dy);
  const Shape s = shape_of(op, x1, x2, p);
  const auto stream = static_cast<cudaStream_t>(op.stream());
  return dispatch_floating(op, x1.scalar_type(), [&]<class T>() {
    Tensor dx1 = need_dx1 ? op.empty<T>({s.B, s.P, s.M}) : op.empty<T>({0});
    Tensor dx2 = need_dx2 ? op.empty<T>({s.B, s.R, s.M}) : op.empty<T>({0});
    const T *a = op.in<T>(x1, "x1", {s.B, s.P, s.M}), *b = op.in<T>(x2, "x2", {s.B, s.R, s.M});
    const T *d = op.in<T>(dy, "dy", {s.B, s.P, s.R}), *e = op.in<T>(dist, "dist", {s.B, s.P, s.R});
    with_metric(p, [&](const auto& metric) {
      if (need_dx1)
        launch_gradient(metric, d, e, {s.P * s.R, s.R, 1}, a, b, op.out<T>(dx1, "dx1", {s.B, s.P, s.M}), s.B, s.P, s.R,
                        s.M, stream);
      if (need_dx2)
        launch_gradient(metric, d, e, {s.P * s.R, 1, s.R}, b, a, op.out<T>(dx2, "dx2", {s.B, s.R, s.M}), s.B, s.R, s.P,
                        s.M, stream);
    });
    return std::tuple(dx1, dx2);
  });
}

std::tuple<Tensor, Tensor> knn_search(const Tensor& query, const Tensor& data, int64_t k, double p) {
  OpScope op("knn_search", query);
  const Shape s = shape_of(op, query, data, p);
  op.check(k >= 1 && k <= s.R, "k must be in [1, ", s.R, "], got ", k);
  const auto stream = static_cast<cudaStream_t>(op.stream());
  return dispatch_floating(op, query.scalar_type(), [&]<class T>() {
    using A = accumulate_t<T>;
    const int64_t rows = s.B * s.P, blocks = s.B * ceil_div(s.P, knn_rows);
    const int64_t parts = std::max<int64_t>(
        1, std::min<int64_t>(ceil_div(2 * multiprocessor_count(), std::max<int64_t>(blocks, 1)), ceil_div(s.R, tile)));
    Tensor distances = op.empty<T>({s.B, s.P, k}), indices = op.empty<int64_t>({s.B, s.P, k});
    Tensor values = op.empty<A>({rows, parts, k}), places = op.empty<int64_t>({rows, parts, k});
    Tensor filled = op.empty<int64_t>({rows, parts}), merged = op.empty<A>({rows, k});
    const T *a = op.in<T>(query, "query", {s.B, s.P, s.M}), *b = op.in<T>(data, "data", {s.B, s.R, s.M});
    T* to = op.out<T>(distances, "distances", {s.B, s.P, k});
    int64_t* found = op.out<int64_t>(indices, "indices", {s.B, s.P, k});
    A* lists = op.out<A>(values, "values", {rows, parts, k});
    int64_t* list_places = op.out<int64_t>(places, "places", {rows, parts, k});
    int64_t* counts = op.out<int64_t>(filled, "filled", {rows, parts});
    A* best = op.out<A>(merged, "merged", {rows, k});
    with_metric(p, [&](const auto& metric) {
      using Metric = std::decay_t<decltype(metric)>;
      launch(knn_kernel<T, Metric>,
             {.grid = dim3(static_cast<unsigned>(blocks * parts)),
              .block = dim3(256),
              .smem = sizeof(KnnShared<A>),
              .stream = stream},
             a, b, lists, list_places, counts, s, k, parts, metric);
      launch(knn_merge_kernel<T, Metric>,
             {.grid = dim3(static_cast<unsigned>(ceil_div(rows, 8))), .block = dim3(256), .stream = stream}, lists,
             list_places, counts, best, to, found, rows, k, parts, metric);
    });
    return std::tuple(distances, indices);
  });
}

PYOPS_LIBRARY(m) {
  PYOPS_IMPL(m, cdist_fwd);
  PYOPS_IMPL(m, cdist_bwd);
  PYOPS_IMPL(m, knn_search);
}

}  // namespace
}  // namespace pyops
