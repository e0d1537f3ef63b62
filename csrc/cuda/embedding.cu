// embedding · CUDA
//   gather_rows  y[k] = x[index[k]]
//   gather_sum   y[v] = sum over k in [offsets[v], offsets[v+1]) of scale[k] * x[index[k]]
//   gather_max   y[v] = max over the same k, without those with index[k] = padding, of x[index[k]], the first of equal
//                ones, column by column; entry[v] = its k, -1 and y = 0 where there is none
//   gather_max_bwd  dx[r] = sum over the k in [starts[r], starts[r+1]) of order of dy[bag[k]] where entry[bag[k]] = k
// layout   x [R, D], gather_rows: y [K, D] · gather_sum: index, scale [K], offsets [V + 1], y [V, D]
// mapping  gather_rows: a thread takes a 16-byte vector of y where rows are whole vectors, else an element
//          gather_max: a thread an element of y, or of dx
//          gather_sum: a block takes 32 columns of a row of y, lane l a column, its 8 warps the terms in turn
// memory   the rows that are named are read once each time they are named, y is written once
// numerics sums in fp32 (fp64 for fp64), the order fixed by the number of terms; an index outside [0, R) gives NaN and
//          reads nothing
#include "cuda/grid_stride.cuh"

namespace pyops {
namespace {

template <class T, int W>
__global__ void gather_rows_kernel(const T* x, const int64_t* index, T* y, int64_t R, int64_t K, int64_t vectors) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < K * vectors; i += stride) {
    const int64_t at = index[i / vectors];
    Vec<T, W> v;
    if (at >= 0 && at < R) {
      v = load_vec<W>(x + (at * vectors + i % vectors) * W);
    } else {
#pragma unroll
      for (int j = 0; j < W; ++j) v[j] = from_acc<T>(accumulate_t<T>(NAN));
    }
    store_vec(y + i * W, v);
  }
}

template <class A>
struct GatherShared {
  A part[8][32];
};

template <class T>
__global__ void __launch_bounds__(256)
    gather_sum_kernel(const T* x, const int64_t* index, const int64_t* offsets, const T* scale, T* y, int64_t R,
                      int64_t K, int64_t V, int64_t D) {
  using A = accumulate_t<T>;
  auto& s = shared_storage<GatherShared<A>>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t column = static_cast<int64_t>(blockIdx.y) * 32 + lane;
  for (int64_t v = blockIdx.x; v < V; v += gridDim.x) {
    const int64_t first = offsets[v], last = offsets[v + 1];
    const bool inside = first >= 0 && last <= K;
    A sum = inside ? A(0) : A(NAN);
    if (column < D && inside)
      for (int64_t k = first + warp; k < last; k += 8) {
        const int64_t at = index[k];
        const A value = at >= 0 && at < R ? A(to_acc(x[at * D + column])) : A(NAN);
        sum += scale != nullptr ? value * to_acc(scale[k]) : value;
      }
    s.part[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && column < D) {
      for (int w = 1; w < 8; ++w) sum += s.part[w][lane];
      y[v * D + column] = from_acc<T>(sum);
    }
    __syncthreads();
  }
}

template <class T>
__global__ void gather_max_kernel(const T* x, const int64_t* index, const int64_t* offsets, T* y, int64_t* entry,
                                  int64_t R, int64_t K, int64_t V, int64_t D, int64_t padding) {
  using A = accumulate_t<T>;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t e = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; e < V * D; e += stride) {
    const int64_t first = offsets[e / D], last = offsets[e / D + 1];
    const bool inside = first >= 0 && last <= K;
    A best = inside ? A(0) : A(NAN);
    int64_t at = -1;
    for (int64_t k = first; inside && k < last; ++k) {
      const int64_t row = index[k];
      if (row == padding) continue;
      const A value = row >= 0 && row < R ? A(to_acc(x[row * D + e % D])) : A(NAN);
      if (at < 0 || value > best) best = value, at = k;
    }
    y[e] = from_acc<T>(best);
    entry[e] = at;
  }
}

template <class T>
__global__ void gather_max_bwd_kernel(const T* dy, const int64_t* entry, const int64_t* order, const int64_t* bag,
                                      const int64_t* starts, T* dx, int64_t V, int64_t K, int64_t R, int64_t D) {
  using A = accumulate_t<T>;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t e = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; e < R * D; e += stride) {
    const int64_t first = starts[e / D], last = starts[e / D + 1];
    const bool inside = first >= 0 && last <= K;
    A sum = inside ? A(0) : A(NAN);
    for (int64_t j = first; inside && j < last; ++j) {
      const int64_t k = order[j], v = k >= 0 && k < K ? bag[k] : -1;
      if (v >= 0 && v < V && entry[v * D + e % D] == k) sum += to_acc(dy[v * D + e % D]);
    }
    dx[e] = from_acc<T>(sum);
  }
}

template <class T>
void run_gather(const T* x, const int64_t* index, T* y, int64_t R, int64_t K, int64_t D, void* stream) {
  constexpr int W = 16 / sizeof(T);
  if (is_aligned(x, y) && D % W == 0)
    launch(gather_rows_kernel<T, W>, grid_stride(K * (D / W), stream), x, index, y, R, K, D / W);
  else
    launch(gather_rows_kernel<T, 1>, grid_stride(K * D, stream), x, index, y, R, K, D);
}

}  // namespace
}  // namespace pyops

// binding

#include "common/embedding_binding.h"
#include "common/registry.h"

namespace pyops {
namespace {

// The last two arguments are for the gradient, which the room forms from gather_sum.
Tensor gather_rows(const Tensor& x, const Tensor& index, int64_t, bool) {
  OpScope op("gather_rows", x);
  op.check(x.dim() == 2, "x must be [R, D]");
  const int64_t R = x.size(0), D = x.size(1), K = index.numel();
  const int64_t* at = op.in<int64_t>(index, "index", {K});
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    Tensor y = op.empty<T>({K, D});
    run_gather<T>(op.in<T>(x, "x", {R, D}), at, op.out<T>(y, "y", {K, D}), R, K, D, op.stream());
    return y;
  });
}

Tensor gather_sum(const Tensor& x, const Tensor& index, const Tensor& offsets, const OptionalTensor& scale) {
  OpScope op("gather_sum", x);
  const auto [R, D, K, V, at, ends] = embedding::bags_of(op, x, index, offsets);
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    Tensor y = op.empty<T>({V, D});
    const T* by = op.in_optional<T>(scale, "scale", {K});
    const int64_t rows = std::min<int64_t>(V, multiprocessor_count() * 32);
    launch(gather_sum_kernel<T>,
           {.grid = dim3(static_cast<unsigned>(rows), static_cast<unsigned>(ceil_div(D, 32))),
            .block = dim3(256),
            .smem = sizeof(GatherShared<accumulate_t<T>>),
            .stream = static_cast<cudaStream_t>(op.stream())},
           op.in<T>(x, "x", {R, D}), at, ends, by, op.out<T>(y, "y", {V, D}), R, K, V, D);
    return y;
  });
}

std::tuple<Tensor, Tensor> gather_max(const Tensor& x, const Tensor& index, const Tensor& offsets, int64_t padding) {
  OpScope op("gather_max", x);
  const auto [R, D, K, V, at, ends] = embedding::bags_of(op, x, index, offsets);
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    Tensor y = op.empty<T>({V, D}), entry = op.empty<int64_t>({V, D});
    launch(gather_max_kernel<T>, grid_stride(V * D, op.stream()), op.in<T>(x, "x", {R, D}), at, ends,
           op.out<T>(y, "y", {V, D}), op.out<int64_t>(entry, "entry", {V, D}), R, K, V, D, padding);
    return std::tuple(y, entry);
  });
}

Tensor gather_max_bwd(const Tensor& dy, const Tensor& entry, const Tensor& order, const Tensor& bag,
                      const Tensor& starts) {
  OpScope op("gather_max_bwd", dy);
  op.check(dy.dim() == 2 && starts.dim() == 1 && starts.size(0) >= 1, "dy must be [V, D] and starts [R + 1]");
  const int64_t V = dy.size(0), D = dy.size(1), K = bag.numel(), R = starts.size(0) - 1;
  const int64_t *by_row = op.in<int64_t>(order, "order", {K}), *of = op.in<int64_t>(bag, "bag", {K});
  const int64_t *ends = op.in<int64_t>(starts, "starts", {R + 1}), *at = op.in<int64_t>(entry, "entry", {V, D});
  return dispatch_floating(op, dy.scalar_type(), [&]<class T>() {
    Tensor dx = op.empty<T>({R, D});
    launch(gather_max_bwd_kernel<T>, grid_stride(R * D, op.stream()), op.in<T>(dy, "dy", {V, D}), at, by_row, of, ends,
           op.out<T>(dx, "dx", {R, D}), V, K, R, D);
    return dx;
  });
}

}  // namespace
}  // namespace pyops

PYOPS_LIBRARY(m) {
  using namespace pyops;
  PYOPS_IMPL(m, gather_max);
  PYOPS_IMPL(m, gather_max_bwd);
  PYOPS_IMPL(m, gather_rows);
  PYOPS_IMPL(m, gather_sum);
}
