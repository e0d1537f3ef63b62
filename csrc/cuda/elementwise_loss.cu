// elementwise_loss · CUDA
//   y[b] = Σ_{i in block b} l(x[i], t[i]);  dx[i] = dy[b] l_x(x[i], t[i]),  dt[i] = dy[b] l_t(x[i], t[i]);
//   l by number, common/elementwise_loss.h; blocks of one element: no sum
// layout   x, t, c, dx, dt: n elements of any shape · y, dy: [ceil(n / block)]
// mapping  sums: 256 threads for each block, several elements a thread; else a thread takes an element, grid-stride;
// the
//          switch over l is uniform over the grid
// memory   every input read once, every output written once; a sum writes one number for a block
// numerics in fp32 (fp64 for fp64), sums of a block in fixed order; y in that type where it is a sum

#include "cuda/grid_stride.cuh"
#include "cuda/math.cuh"

#include "common/elementwise_loss.h"

namespace pyops {
namespace {

using elementwise_loss::with_loss;

template <class T>
__global__ void elementwise_loss_fwd_kernel(const T* x, const T* t, const T* c, T* y, int64_t n, int64_t kind,
                                            double a) {
  using A = accumulate_t<T>;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  with_loss(kind, [&]<class F>() {
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += stride)
      y[i] = from_acc<T>(F::value(A(to_acc(x[i])), A(to_acc(t[i])), c == nullptr ? A(1) : A(to_acc(c[i])), a));
  });
}

template <class T>
__global__ void elementwise_loss_sum_kernel(const T* x, const T* t, const T* c, accumulate_t<T>* y, int64_t n,
                                            int64_t kind, double a, int64_t block) {
  using A = accumulate_t<T>;
  auto& scratch = shared_storage<BlockScratch<A>>();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * block;
  const int64_t stop = first + block < n ? first + block : n;
  A sum = 0;
  with_loss(kind, [&]<class F>() {
    for (int64_t i = first + threadIdx.x; i < stop; i += blockDim.x)
      sum += F::value(A(to_acc(x[i])), A(to_acc(t[i])), c == nullptr ? A(1) : A(to_acc(c[i])), a);
  });
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) y[blockIdx.x] = sum;
}

// D: the type of dy. dx or dt null: not wanted.
template <class T, class D>
__global__ void elementwise_loss_bwd_kernel(const D* dy, const T* x, const T* t, const T* c, T* dx, T* dt, int64_t n,
                                            int64_t kind, double a, int64_t block) {
  using A = accumulate_t<T>;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  with_loss(kind, [&]<class F>() {
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += stride) {
      A in_x, in_t;
      F::slope(A(to_acc(x[i])), A(to_acc(t[i])), c == nullptr ? A(1) : A(to_acc(c[i])), a, in_x, in_t);
      const A g = to_acc(dy[i / block]);
      if (dx != nullptr) dx[i] = from_acc<T>(g * in_x);
      if (dt != nullptr) dt[i] = from_acc<T>(g * in_t);
    }
  });
}

}  // namespace
}  // namespace pyops

// binding

#include "common/registry.h"

namespace pyops {
namespace {

Tensor elementwise_loss_fwd(const Tensor& x, const Tensor& t, const OptionalTensor& c, int64_t kind, double a,
                            int64_t block) {
  OpScope op("elementwise_loss_fwd", x);
  op.check(block >= 1 && kind >= 0 && kind < 8, "block must be positive and kind in [0, 8)");
  const int64_t n = x.numel(), blocks = ceil_div(n, block);
  const auto stream = static_cast<cudaStream_t>(op.stream());
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    using A = accumulate_t<T>;
    const T *px = op.in<T>(x, "x", ShapeRef(x)), *pt = op.in<T>(t, "t", ShapeRef(x)),
            *pc = op.in_optional<T>(c, "c", ShapeRef(x));
    if (block == 1) {
      Tensor y = op.empty<T>(ShapeRef(x));
      launch(elementwise_loss_fwd_kernel<T>, grid_stride(n, stream), px, pt, pc, op.out<T>(y, "y", ShapeRef(x)), n,
             kind, a);
      return y;
    }
    Tensor y = op.empty<A>({blocks});
    launch(elementwise_loss_sum_kernel<T>,
           {.grid = dim3(static_cast<unsigned>(blocks)),
            .block = dim3(256),
            .smem = sizeof(BlockScratch<A>),
            .stream = stream},
           px, pt, pc, op.out<A>(y, "y", {blocks}), n, kind, a, block);
    return y;
  });
}

std::tuple<Tensor, Tensor> elementwise_loss_bwd(const Tensor& dy, const Tensor& x, const Tensor& t,
                                                const OptionalTensor& c, int64_t kind, double a, int64_t block,
                                                bool need_dx, bool need_dt) {
  OpScope op("elementwise_loss_bwd", dy);
  op.check(block >= 1 && kind >= 0 && kind < 8, "block must be positive and kind in [0, 8)");
  const int64_t n = x.numel(), blocks = ceil_div(n, block);
  const auto stream = static_cast<cudaStream_t>(op.stream());
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    using A = accumulate_t<T>;
    Tensor dx = need_dx ? op.empty<T>(ShapeRef(x)) : op.empty<T>({0});
    Tensor dt = need_dt ? op.empty<T>(ShapeRef(x)) : op.empty<T>({0});
    T* pdx = need_dx ? op.out<T>(dx, "dx", ShapeRef(x)) : nullptr;
    T* pdt = need_dt ? op.out<T>(dt, "dt", ShapeRef(x)) : nullptr;
    const T *px = op.in<T>(x, "x", ShapeRef(x)), *pt = op.in<T>(t, "t", ShapeRef(x)),
            *pc = op.in_optional<T>(c, "c", ShapeRef(x));
    if (block == 1)
      launch(elementwise_loss_bwd_kernel<T, T>, grid_stride(n, stream), op.in<T>(dy, "dy", ShapeRef(x)), px, pt, pc,
             pdx, pdt, n, kind, a, block);
    else
      launch(elementwise_loss_bwd_kernel<T, A>, grid_stride(n, stream), op.in<A>(dy, "dy", {blocks}), px, pt, pc, pdx,
             pdt, n, kind, a, block);
    return std::make_tuple(dx, dt);
  });
}

}  // namespace
}  // namespace pyops

PYOPS_LIBRARY(m) {
  using namespace pyops;
  PYOPS_IMPL(m, elementwise_loss_fwd);
  PYOPS_IMPL(m, elementwise_loss_bwd);
}
