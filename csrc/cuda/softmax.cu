// softmax · CUDA
//   y[m,n,s] = exp(x - max_n x) / sum,  sum = sum_n exp(x - max_n x);  log: y = x - max - log(sum)
//   dx = p * (dy - sum_n dy * p),  log: dx = dy - p * sum_n dy,  p = exp(x - max) / sum
// layout   x, y, dy, dx: [M, N, S] · max, sum: [M * S]
// mapping  S = 1: a block per row, 32 to 512 threads; else a thread per column, neighbours in s side by side
// memory   x read three times (from the caches after the first, for rows that fit), y written once; backward: dy, x
//          twice
// numerics in fp32 (fp64 for fp64), sums in fixed order; a row without a finite maximum gives NaN, as in torch
#include <algorithm>

#include "cuda/math.cuh"

namespace pyops {
namespace {

template <class A>
struct SoftmaxShared {
  BlockScratch<A> scratch;
};

template <class A>
PYOPS_DEVICE A minus_infinity() {
  return -A(INFINITY);
}

template <class T>
__global__ void softmax_rows_kernel(const T* x, T* y, accumulate_t<T>* top, accumulate_t<T>* total, int64_t N,
                                    bool log_of) {
  using A = accumulate_t<T>;
  auto& shared = shared_storage<SoftmaxShared<A>>();
  const T* row = x + static_cast<int64_t>(blockIdx.x) * N;
  T* out = y + static_cast<int64_t>(blockIdx.x) * N;
  A most = minus_infinity<A>();
  for (int64_t n = threadIdx.x; n < N; n += blockDim.x) most = detail::Max()(to_acc(row[n]), most);
  most = block_max(most, shared.scratch);
  A sums = 0;
  for (int64_t n = threadIdx.x; n < N; n += blockDim.x) sums += exp(to_acc(row[n]) - most);
  sums = block_sum(sums, shared.scratch);
  const A shift = log(sums), scale = A(1) / sums;
  for (int64_t n = threadIdx.x; n < N; n += blockDim.x) {
    const A centred = to_acc(row[n]) - most;
    out[n] = from_acc<T>(log_of ? centred - shift : exp(centred) * scale);
  }
  if (threadIdx.x == 0) {
    top[blockIdx.x] = most;
    total[blockIdx.x] = sums;
  }
}

template <class T>
__global__ void softmax_columns_kernel(const T* x, T* y, accumulate_t<T>* top, accumulate_t<T>* total, int64_t columns,
                                       int64_t N, int64_t S, bool log_of) {
  using A = accumulate_t<T>;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (column >= columns) return;
  const int64_t at = column / S * N * S + column % S;
  A most = minus_infinity<A>(), sums = 0;
  for (int64_t n = 0; n < N; ++n) most = detail::Max()(to_acc(x[at + n * S]), most);
  for (int64_t n = 0; n < N; ++n) sums += exp(to_acc(x[at + n * S]) - most);
  const A shift = log(sums), scale = A(1) / sums;
  for (int64_t n = 0; n < N; ++n) {
    const A centred = to_acc(x[at + n * S]) - most;
    y[at + n * S] = from_acc<T>(log_of ? centred - shift : exp(centred) * scale);
  }
  top[column] = most;
  total[column] = sums;
}

template <class T>
__global__ void softmax_rows_bwd_kernel(const T* dy, const T* x, const accumulate_t<T>* top,
                                        const accumulate_t<T>* total, T* dx, int64_t N, bool log_of) {
  using A = accumulate_t<T>;
  auto& shared = shared_storage<SoftmaxShared<A>>();
  const int64_t at = static_cast<int64_t>(blockIdx.x) * N;
  const A most = top[blockIdx.x], scale = A(1) / total[blockIdx.x];
  A dot = 0;
  for (int64_t n = threadIdx.x; n < N; n += blockDim.x)
    dot += to_acc(dy[at + n]) * (log_of ? A(1) : exp(to_acc(x[at + n]) - most) * scale);
  dot = block_sum(dot, shared.scratch);
  for (int64_t n = threadIdx.x; n < N; n += blockDim.x) {
    const A p = exp(to_acc(x[at + n]) - most) * scale, g = to_acc(dy[at + n]);
    dx[at + n] = from_acc<T>(log_of ? g - p * dot : p * (g - dot));
  }
}

template <class T>
__global__ void softmax_columns_bwd_kernel(const T* dy, const T* x, const accumulate_t<T>* top,
                                           const accumulate_t<T>* total, T* dx, int64_t columns, int64_t N, int64_t S,
                                           bool log_of) {
  using A = accumulate_t<T>;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (column >= columns) return;
  const int64_t at = column / S * N * S + column % S;
  const A most = top[column], scale = A(1) / total[column];
  A dot = 0;
  for (int64_t n = 0; n < N; ++n)
    dot += to_acc(dy[at + n * S]) * (log_of ? A(1) : exp(to_acc(x[at + n * S]) - most) * scale);
  for (int64_t n = 0; n < N; ++n) {
    const A p = exp(to_acc(x[at + n * S]) - most) * scale, g = to_acc(dy[at + n * S]);
    dx[at + n * S] = from_acc<T>(log_of ? g - p * dot : p * (g - dot));
  }
}

dim3 row_block(int64_t N) {
  unsigned threads = 32;
  while (threads < 512 && threads * 8 < N) threads *= 2;
  return dim3(threads);
}

}  // namespace
}  // namespace pyops

// binding

#include "common/registry.h"
#include "common/softmax_binding.h"

namespace pyops {
namespace {

std::tuple<Tensor, Tensor, Tensor> softmax_fwd(const Tensor& x, int64_t dim, bool log_of) {
  OpScope op("softmax_fwd", x);
  const auto [M, N, S] = softmax::sizes_of(op, x, dim);
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    using A = accumulate_t<T>;
    Tensor y = op.empty<T>(ShapeRef(x)), top = op.empty<A>({M * S}), total = op.empty<A>({M * S});
    const T* px = op.in<T>(x, "x", ShapeRef(x));
    T* py = op.out<T>(y, "y", ShapeRef(x));
    A *ptop = op.out<A>(top, "max", {M * S}), *ptotal = op.out<A>(total, "sum", {M * S});
    const auto stream = static_cast<cudaStream_t>(op.stream());
    if (S == 1)
      launch(softmax_rows_kernel<T>,
             {.grid = dim3(static_cast<unsigned>(M)),
              .block = row_block(N),
              .smem = sizeof(SoftmaxShared<A>),
              .stream = stream},
             px, py, ptop, ptotal, N, log_of);
    else
      launch(softmax_columns_kernel<T>,
             {.grid = dim3(static_cast<unsigned>(ceil_div(M * S, 128))), .block = dim3(128), .stream = stream}, px, py,
             ptop, ptotal, M * S, N, S, log_of);
    return std::make_tuple(y, top, total);
  });
}

Tensor softmax_bwd(const Tensor& dy, const Tensor& x, const Tensor& top, const Tensor& total, int64_t dim,
                   bool log_of) {
  OpScope op("softmax_bwd", dy);
  const auto [M, N, S] = softmax::sizes_of(op, x, dim);
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    using A = accumulate_t<T>;
    Tensor dx = op.empty<T>(ShapeRef(x));
    const T *pdy = op.in<T>(dy, "dy", ShapeRef(x)), *px = op.in<T>(x, "x", ShapeRef(x));
    const A *ptop = op.in<A>(top, "max", {M * S}), *ptotal = op.in<A>(total, "sum", {M * S});
    T* pdx = op.out<T>(dx, "dx", ShapeRef(x));
    const auto stream = static_cast<cudaStream_t>(op.stream());
    if (S == 1)
      launch(softmax_rows_bwd_kernel<T>,
             {.grid = dim3(static_cast<unsigned>(M)),
              .block = row_block(N),
              .smem = sizeof(SoftmaxShared<A>),
              .stream = stream},
             pdy, px, ptop, ptotal, pdx, N, log_of);
    else
      launch(softmax_columns_bwd_kernel<T>,
             {.grid = dim3(static_cast<unsigned>(ceil_div(M * S, 128))), .block = dim3(128), .stream = stream}, pdy, px,
             ptop, ptotal, pdx, M * S, N, S, log_of);
    return dx;
  });
}

}  // namespace
}  // namespace pyops

PYOPS_LIBRARY(m) {
  using namespace pyops;
  PYOPS_IMPL(m, softmax_fwd);
  PYOPS_IMPL(m, softmax_bwd);
}
