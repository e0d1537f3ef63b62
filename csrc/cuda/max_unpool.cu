// max_unpool · CUDA
//   y[p, index[p,i,c], c] = x[p,i,c], 0 elsewhere; where indices meet the last one stays · dx[p,i,c] = dy[p, index, c]
// layout   x, index, dx: [P, I, C], y, dy: [P, S, C]; channels first has C = 1 and P = N * channels
// mapping  a thread per element: of x, to find the last i that writes to each place; of y, to fetch it
// memory   index read once, x gathered once, y written once, 4 bytes of scratch per element of y written and read
// numerics copies; an index outside [0, S) writes nothing and reads 0

#include "cuda/grid_stride.cuh"

namespace pyops {
namespace {

// last[p, s, c] = 1 + the largest i that writes there, 0 where none does: the order of threads does not show.
__global__ void find_last_kernel(const int64_t* index, unsigned* last, int64_t total, int64_t I, int64_t S, int64_t C) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t k = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; k < total; k += stride) {
    const int64_t at = index[k], p = k / (I * C);
    if (at >= 0 && at < S) atomicMax(last + (p * S + at) * C + k % C, static_cast<unsigned>(k / C % I + 1));
  }
}

template <class T>
__global__ void max_unpool_kernel(const T* x, const unsigned* last, T* y, int64_t total, int64_t I, int64_t S,
                                  int64_t C) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t k = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; k < total; k += stride) {
    const unsigned i = last[k];
    y[k] = i == 0 ? from_acc<T>(accumulate_t<T>(0)) : x[(k / (S * C) * I + i - 1) * C + k % C];
  }
}

template <class T>
__global__ void max_unpool_bwd_kernel(const T* dy, const int64_t* index, T* dx, int64_t total, int64_t I, int64_t S,
                                      int64_t C) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t k = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; k < total; k += stride) {
    const int64_t at = index[k];
    dx[k] = at >= 0 && at < S ? dy[(k / (I * C) * S + at) * C + k % C] : from_acc<T>(accumulate_t<T>(0));
  }
}

}  // namespace
}  // namespace pyops

// binding

#include "common/registry.h"

namespace pyops {
namespace {

Tensor max_unpool_fwd(const Tensor& x, const Tensor& index, int64_t size) {
  OpScope op("max_unpool_fwd", x);
  op.check(x.dim() == 3 && size >= 0, "x must be [P, I, C] and size at least 0");
  const int64_t P = x.size(0), I = x.size(1), C = x.size(2), S = size;
  op.check(I < (int64_t{1} << 32) - 1, "more than 2^32 - 2 positions in a plane");
  Tensor scratch = op.empty<int32_t>({P, S, C});
  unsigned* last = reinterpret_cast<unsigned*>(op.out<int32_t>(scratch, "scratch", {P, S, C}));
  zero_memory(last, static_cast<size_t>(P * S * C) * sizeof(unsigned), static_cast<cudaStream_t>(op.stream()));
  launch(find_last_kernel, grid_stride(P * I * C, op.stream(), 32), op.in<int64_t>(index, "index", {P, I, C}), last,
         P * I * C, I, S, C);
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    Tensor y = op.empty<T>({P, S, C});
    launch(max_unpool_kernel<T>, grid_stride(P * S * C, op.stream(), 32), op.in<T>(x, "x", {P, I, C}),
           static_cast<const unsigned*>(last), op.out<T>(y, "y", {P, S, C}), P * S * C, I, S, C);
    return y;
  });
}

Tensor max_unpool_bwd(const Tensor& dy, const Tensor& index) {
  OpScope op("max_unpool_bwd", dy);
  op.check(dy.dim() == 3 && index.dim() == 3, "dy must be [P, S, C] and index [P, I, C]");
  const int64_t P = dy.size(0), S = dy.size(1), C = dy.size(2), I = index.size(1);
  return dispatch_floating(op, dy.scalar_type(), [&]<class T>() {
    Tensor dx = op.empty<T>({P, I, C});
    launch(max_unpool_bwd_kernel<T>, grid_stride(P * I * C, op.stream(), 32), op.in<T>(dy, "dy", {P, S, C}),
           op.in<int64_t>(index, "index", {P, I, C}), op.out<T>(dx, "dx", {P, I, C}), P * I * C, I, S, C);
    return dx;
  });
}

}  // namespace
}  // namespace pyops

PYOPS_LIBRARY(m) {
  using namespace pyops;
  PYOPS_IMPL(m, max_unpool_fwd);
  PYOPS_IMPL(m, max_unpool_bwd);
}
