// histogram · CUDA
//   y[m,b] = sum over s of weight(x[m,s], b): 1 in the bin that holds x, or shared by distance between the two bins
//            whose centres x lies between;  dx[m,s] = (dy[m,b+1] - dy[m,b]) / width between the centres of b and b + 1
// layout   x: the M = N C rows of [N, C, S] or, channels_last, of [N, S, C] · edges: [B + 1] in fp32 (fp64)
//          y: [M, B], int64 where whole
// mapping  a block takes a chunk of a row and 256 bins: its threads place 256 values, then each adds up its own bin;
//          a second kernel adds the chunks
// memory   x once for every 256 bins, B counts a chunk
// numerics whole counts are exact, shares are summed in fp32 by chunk and in fp64 over chunks; no atomics, a fixed order
#include <type_traits>

#include "cuda/grid_stride.cuh"

#include "common/histogram.h"

namespace pyops {
namespace {

using namespace histogram;

constexpr int threads = 256;
constexpr int64_t chunk = 1 << 13;

template <class A>
struct Staged {
  int64_t bin[threads];
  A share[threads];
};

template <class T, class A>
__global__ void __launch_bounds__(threads)
    histogram_kernel(const T* __restrict__ x, const A* __restrict__ edges, A* __restrict__ part, Rows r, int64_t B,
                     int64_t chunks, bool soft) {
  auto& s = shared_storage<Staged<A>>();
  const int64_t row = r.first(blockIdx.x / chunks), first = blockIdx.x % chunks * chunk;
  const int64_t last = first + chunk < r.S ? first + chunk : r.S, mine = blockIdx.y * int64_t{threads} + threadIdx.x;
  A total = 0;
  for (int64_t begin = first; begin < last; begin += threads) {
    const int64_t i = begin + threadIdx.x;
    Place<A> p{-1, A(1)};
    if (i < last) {
      const A value = to_acc(x[row + i * r.step()]);
      p = soft ? shared(value, edges, B) : whole(value, edges, B);
    }
    s.bin[threadIdx.x] = p.bin;
    s.share[threadIdx.x] = p.share;
    __syncthreads();
    for (int k = 0; k < threads; ++k) {
      const int64_t b = s.bin[k];
      if (b == mine) total += s.share[k];
      if (b >= 0 && b + 1 == mine) total += 1 - s.share[k];
    }
    __syncthreads();
  }
  if (mine < B) part[blockIdx.x * B + mine] = total;
}

template <class Y>
PYOPS_DEVICE Y counted(double total) {
  if constexpr (std::is_integral_v<Y>)
    return static_cast<Y>(total);
  else
    return from_acc<Y>(static_cast<accumulate_t<Y>>(total));
}

template <class Y, class A>
__global__ void histogram_sum_kernel(const A* __restrict__ part, Y* __restrict__ y, int64_t M, int64_t B,
                                     int64_t chunks) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t e = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; e < M * B; e += stride) {
    double total = 0;
    for (int64_t j = 0; j < chunks; ++j) total += part[(e / B * chunks + j) * B + e % B];
    y[e] = counted<Y>(total);
  }
}

template <class T, class A>
__global__ void histogram_bwd_kernel(const T* __restrict__ dy, const T* __restrict__ x, const A* __restrict__ edges,
                                     T* __restrict__ dx, Rows r, int64_t B) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const A per_width = A(B) / (edges[B] - edges[0]);
  for (int64_t e = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; e < r.M * r.S; e += stride) {
    const Place<A> p = shared<A>(to_acc(x[e]), edges, B);
    A slope = 0;
    if (p.bin >= 0 && p.share < 1) {
      const T* of = dy + r.row_of(e) * B + p.bin;
      slope = (A(to_acc(of[1])) - A(to_acc(of[0]))) * per_width;
    }
    dx[e] = from_acc<T>(slope);
  }
}

}  // namespace
}  // namespace pyops

// binding

#include "common/histogram_binding.h"
#include "common/registry.h"

namespace pyops {
namespace {

Tensor histogram_fwd(const Tensor& x, const Tensor& edges, bool soft, bool channels_last) {
  OpScope op("histogram_fwd", x);
  const auto [N, C, B, r] = histogram::sizes_of(op, x, edges, channels_last);
  const int64_t M = r.M, chunks = ceil_div(r.S, chunk);
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    using A = accumulate_t<T>;
    Tensor y = soft ? op.empty<T>({N, C, B}) : op.empty<int64_t>({N, C, B}), parts = op.empty<A>({M * chunks, B});
    A* part = op.out<A>(parts, "part", {M * chunks, B});
    launch(histogram_kernel<T, A>,
           {.grid = dim3(static_cast<unsigned>(M * chunks), static_cast<unsigned>(ceil_div(B, threads))),
            .block = dim3(threads),
            .smem = sizeof(Staged<A>),
            .stream = static_cast<cudaStream_t>(op.stream())},
           op.in<T>(x, "x", ShapeRef(x)), op.in<A>(edges, "edges", {B + 1}), part, r, B, chunks, soft);
    const auto all = grid_stride(M * B, op.stream());
    const A* from = part;
    if (soft)
      launch(histogram_sum_kernel<T, A>, all, from, op.out<T>(y, "y", {N, C, B}), M, B, chunks);
    else
      launch(histogram_sum_kernel<int64_t, A>, all, from, op.out<int64_t>(y, "y", {N, C, B}), M, B, chunks);
    return y;
  });
}

Tensor histogram_bwd(const Tensor& dy, const Tensor& x, const Tensor& edges, bool channels_last) {
  OpScope op("histogram_bwd", x);
  const auto [N, C, B, r] = histogram::sizes_of(op, x, edges, channels_last);
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    using A = accumulate_t<T>;
    Tensor dx = op.empty<T>(ShapeRef(x));
    launch(histogram_bwd_kernel<T, A>, grid_stride(r.M * r.S, op.stream()), op.in<T>(dy, "dy", {N, C, B}),
           op.in<T>(x, "x", ShapeRef(x)), op.in<A>(edges, "edges", {B + 1}), op.out<T>(dx, "dx", ShapeRef(x)), r, B);
    return dx;
  });
}

PYOPS_LIBRARY(m) {
  PYOPS_IMPL(m, histogram_fwd);
  PYOPS_IMPL(m, histogram_bwd);
}

}  // namespace
}  // namespace pyops
