// elementwise_loss · CUDA
//   y[i] = l(x[i], t[i]);  dx[i] = g l_x(x[i], t[i]),  dt[i] = g l_t(x[i], t[i]),  g = dy[i];
//   reduced: y = (Σ_i l(x[i], t[i])) / over,  g = dy / over;  l by number, common/elementwise_loss.h
// layout   x, t, c, dx, dt: n elements of any shape · y, dy: as many, or reduced one · parts: the sum of each span
// mapping  reduced: 256 threads for each span of elements, and 256 for all spans, if they are several; else a thread
//          takes an element, grid-stride; the switch over l is uniform over the grid
// memory   every input read once, every output written once; of a sum, one number for a span
// numerics in fp32 (fp64 for fp64), over spans in fp64, both in fixed order; rounded once

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

// At least as many elements as a block of threads is worth; more where the spans would be many for the block that adds
// them up.
constexpr int64_t least_span = 4096, most_spans = 2048;

// Of one span the mean itself, else its part of the sum.
template <class T>
__global__ void elementwise_loss_sum_kernel(const T* x, const T* t, const T* c, accumulate_t<T>* parts, T* y, int64_t n,
                                            int64_t kind, double a, int64_t span, double over) {
  using A = accumulate_t<T>;
  auto& scratch = shared_storage<BlockScratch<A>>();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * span;
  const int64_t stop = first + span < n ? first + span : n;
  A sum = 0;
  with_loss(kind, [&]<class F>() {
    for (int64_t i = first + threadIdx.x; i < stop; i += blockDim.x)
      sum += F::value(A(to_acc(x[i])), A(to_acc(t[i])), c == nullptr ? A(1) : A(to_acc(c[i])), a);
  });
  sum = block_sum(sum, scratch);
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1)
    *y = from_acc<T>(A(double(sum) / over));
  else
    parts[blockIdx.x] = sum;
}

template <class T>
__global__ void elementwise_loss_total_kernel(const accumulate_t<T>* parts, int64_t spans, T* y, double over) {
  auto& scratch = shared_storage<BlockScratch<double>>();
  double total = 0;
  for (int64_t i = threadIdx.x; i < spans; i += blockDim.x) total += double(parts[i]);
  total = block_sum(total, scratch);
  if (threadIdx.x == 0) *y = from_acc<T>(accumulate_t<T>(total / over));
}

// dx or dt null: not wanted. each: a cotangent for each element, else one for all.
template <class T>
__global__ void elementwise_loss_bwd_kernel(const T* dy, bool each, const T* x, const T* t, const T* c, T* dx, T* dt,
                                            int64_t n, int64_t kind, double a, accumulate_t<T> over) {
  using A = accumulate_t<T>;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const A of_all = each ? A(0) : A(to_acc(*dy)) / over;
  with_loss(kind, [&]<class F>() {
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += stride) {
      A in_x, in_t;
      F::slope(A(to_acc(x[i])), A(to_acc(t[i])), c == nullptr ? A(1) : A(to_acc(c[i])), a, in_x, in_t);
      const A g = each ? A(to_acc(dy[i])) : of_all;
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
                            bool reduced, int64_t over) {
  OpScope op("elementwise_loss_fwd", x);
  op.check(kind >= 0 && kind < 8, "kind must be in [0, 8)");
  const int64_t n = x.numel();
  const auto stream = static_cast<cudaStream_t>(op.stream());
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    using A = accumulate_t<T>;
    const T *px = op.in<T>(x, "x", ShapeRef(x)), *pt = op.in<T>(t, "t", ShapeRef(x)),
            *pc = op.in_optional<T>(c, "c", ShapeRef(x));
    if (!reduced) {
      Tensor y = op.empty<T>(ShapeRef(x));
      launch(elementwise_loss_fwd_kernel<T>, grid_stride(n, stream), px, pt, pc, op.out<T>(y, "y", ShapeRef(x)), n,
             kind, a);
      return y;
    }
    const int64_t span = std::max(least_span, ceil_div(n, most_spans));
    const int64_t spans = std::max<int64_t>(ceil_div(n, span), 1);  // no elements: one that writes 0 / over
    Tensor y = op.empty<T>({}), parts = op.empty<A>({spans > 1 ? spans : 0});
    T* py = op.out<T>(y, "y", {});
    A* p = op.out<A>(parts, "parts", {spans > 1 ? spans : 0});
    launch(elementwise_loss_sum_kernel<T>,
           {.grid = dim3(static_cast<unsigned>(spans)),
            .block = dim3(256),
            .smem = sizeof(BlockScratch<A>),
            .stream = stream},
           px, pt, pc, p, py, n, kind, a, span, double(over));
    if (spans > 1)
      launch(elementwise_loss_total_kernel<T>,
             {.grid = dim3(1), .block = dim3(256), .smem = sizeof(BlockScratch<double>), .stream = stream}, p, spans,
             py, double(over));
    return y;
  });
}

std::tuple<Tensor, Tensor> elementwise_loss_bwd(const Tensor& dy, const Tensor& x, const Tensor& t,
                                                const OptionalTensor& c, int64_t kind, double a, bool reduced,
                                                int64_t over, bool need_dx, bool need_dt) {
  OpScope op("elementwise_loss_bwd", dy);
  op.check(kind >= 0 && kind < 8, "kind must be in [0, 8)");
  const int64_t n = x.numel();
  const auto stream = static_cast<cudaStream_t>(op.stream());
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    Tensor dx = need_dx ? op.empty<T>(ShapeRef(x)) : op.empty<T>({0});
    Tensor dt = need_dt ? op.empty<T>(ShapeRef(x)) : op.empty<T>({0});
    T* pdx = need_dx ? op.out<T>(dx, "dx", ShapeRef(x)) : nullptr;
    T* pdt = need_dt ? op.out<T>(dt, "dt", ShapeRef(x)) : nullptr;
    const T* pdy = reduced ? op.in<T>(dy, "dy", {}) : op.in<T>(dy, "dy", ShapeRef(x));
    launch(elementwise_loss_bwd_kernel<T>, grid_stride(n, stream), pdy, !reduced, op.in<T>(x, "x", ShapeRef(x)),
           op.in<T>(t, "t", ShapeRef(x)), op.in_optional<T>(c, "c", ShapeRef(x)), pdx, pdt, n, kind, a,
           accumulate_t<T>(over));
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
