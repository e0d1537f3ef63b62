// activation · CUDA
//   activation   y = f(x),  dx = dy * f'(x);  f by number, common/activation.h
//   gated        y = a * f(b),  da = dy * f(b),  db = dy * a * f'(b)
//   prelu        y = x > 0 ? x : w[c] * x,  dx = x > 0 ? dy : w[c] * dy,  dw[c] = sum over x <= 0 of dy * x
// layout   activation: N elements of any shape · gated: x [M, 2, N], y [M, N] · prelu: x [N, C, S], w [C]
// mapping  activation, gated: a thread takes one 16-byte vector, grid-stride; the switch over f is uniform over the
// grid
//          prelu: a thread takes an element; dw: one block per channel
// memory   every input read once, every output written once; prelu's dw reads x and dy once more
// numerics in fp32 (fp64 for fp64); dw: fixed order
#include "cuda/grid_stride.cuh"
#include "cuda/math.cuh"

#include "common/activation.h"

namespace pyops {
namespace {

using activation::Parameters;
using activation::with_activation;

// dy null: y = f(x); else y = dy * f'(x). N counts whole vectors of W elements, `tail` elements follow.
template <class T, int W>
__global__ void activation_kernel(const T* dy, const T* x, T* y, int64_t vectors, int64_t N, int kind, Parameters p) {
  using A = accumulate_t<T>;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  with_activation(kind, [&]<class F>() {
    for (int64_t i = thread; i < vectors; i += stride) {
      Vec<T, W> v = load_vec<W>(x + i * W), g{};
      if (dy != nullptr) g = load_vec<W>(dy + i * W);
#pragma unroll
      for (int j = 0; j < W; ++j)
        v[j] = from_acc<T>(dy != nullptr ? F::gradient(to_acc(g[j]), to_acc(v[j]), p) : F::value(A(to_acc(v[j])), p));
      store_vec(y + i * W, v);
    }
    for (int64_t i = vectors * W + thread; i < N; i += stride)
      y[i] = from_acc<T>(dy != nullptr ? F::gradient(to_acc(dy[i]), to_acc(x[i]), p) : F::value(A(to_acc(x[i])), p));
  });
}

// dy null: y = a f(b); else y is dx [M, 2, N].
template <class T>
__global__ void gated_kernel(const T* dy, const T* x, T* y, int64_t M, int64_t N, int kind) {
  using A = accumulate_t<T>;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  with_activation(kind, [&]<class F>() {
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < M * N; i += stride) {
      const int64_t at = i + i / N * N;
      const A a = to_acc(x[at]), b = to_acc(x[at + N]);
      if (dy == nullptr) {
        y[i] = from_acc<T>(a * F::value(b, Parameters{}));
      } else {
        const A g = to_acc(dy[i]);
        y[at] = from_acc<T>(g * F::value(b, Parameters{}));
        y[at + N] = from_acc<T>(F::gradient(g * a, b, Parameters{}));
      }
    }
  });
}

template <class T>
__global__ void prelu_kernel(const T* dy, const T* x, const T* w, T* y, int64_t total, int64_t C, int64_t S) {
  using A = accumulate_t<T>;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < total; i += stride) {
    const A v = to_acc(x[i]), from = dy != nullptr ? to_acc(dy[i]) : v;
    y[i] = from_acc<T>(v > A(0) ? from : from * to_acc(w[i / S % C]));
  }
}

template <class T>
__global__ void prelu_weight_kernel(const T* dy, const T* x, T* dw, int64_t N, int64_t C, int64_t S) {
  using A = accumulate_t<T>;
  auto& scratch = shared_storage<BlockScratch<A>>();
  A total = 0;
  for (int64_t i = threadIdx.x; i < N * S; i += blockDim.x) {
    const int64_t at = (i / S * C + blockIdx.x) * S + i % S;
    const A v = to_acc(x[at]);
    total += v > A(0) ? A(0) : v * to_acc(dy[at]);
  }
  total = block_sum(total, scratch);
  if (threadIdx.x == 0) dw[blockIdx.x] = from_acc<T>(total);
}

template <class T>
void run_activation(const T* dy, const T* x, T* y, int64_t N, int64_t kind, Parameters p, cudaStream_t stream) {
  constexpr int W = 16 / sizeof(T);
  const int64_t vectors = is_aligned(dy, x, y) ? N / W : 0;
  launch(activation_kernel<T, W>, grid_stride(vectors > 0 ? vectors : N, stream), dy, x, y, vectors, N,
         static_cast<int>(kind), p);
}

}  // namespace
}  // namespace pyops

// binding

#include "common/registry.h"

namespace pyops {
namespace {

Tensor activation_fwd(const Tensor& x, int64_t kind, double a, double b, double c) {
  OpScope op("activation_fwd", x);
  activation::check_kind(op, kind);
  const int64_t N = x.numel();
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    Tensor y = op.empty<T>(ShapeRef(x));
    run_activation<T>(nullptr, op.in<T>(x, "x", ShapeRef(x)), op.out<T>(y, "y", ShapeRef(x)), N, kind, {a, b, c},
                      static_cast<cudaStream_t>(op.stream()));
    return y;
  });
}

void activation_inplace(Tensor x, int64_t kind, double a, double b, double c) {
  OpScope op("activation_inplace", x);
  activation::check_kind(op, kind);
  const int64_t N = x.numel();
  dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    T* p = op.out<T>(x, "x", ShapeRef(x));
    run_activation<T>(nullptr, p, p, N, kind, {a, b, c}, static_cast<cudaStream_t>(op.stream()));
  });
}

Tensor activation_bwd(const Tensor& dy, const Tensor& x, int64_t kind, double a, double b, double c) {
  OpScope op("activation_bwd", dy);
  activation::check_kind(op, kind);
  const int64_t N = x.numel();
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    Tensor dx = op.empty<T>(ShapeRef(x));
    run_activation<T>(op.in<T>(dy, "dy", ShapeRef(x)), op.in<T>(x, "x", ShapeRef(x)), op.out<T>(dx, "dx", ShapeRef(x)),
                      N, kind, {a, b, c}, static_cast<cudaStream_t>(op.stream()));
    return dx;
  });
}

Tensor gated_fwd(const Tensor& x, int64_t kind) {
  OpScope op("gated_fwd", x);
  activation::check_kind(op, kind);
  op.check(x.dim() == 3 && x.size(1) == 2, "x must be [M, 2, N]");
  const int64_t M = x.size(0), N = x.size(2);
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    Tensor y = op.empty<T>({M, N});
    launch(gated_kernel<T>, grid_stride(M * N, op.stream()), static_cast<const T*>(nullptr),
           op.in<T>(x, "x", {M, 2, N}), op.out<T>(y, "y", {M, N}), M, N, static_cast<int>(kind));
    return y;
  });
}

Tensor gated_bwd(const Tensor& dy, const Tensor& x, int64_t kind) {
  OpScope op("gated_bwd", dy);
  activation::check_kind(op, kind);
  op.check(x.dim() == 3 && x.size(1) == 2, "x must be [M, 2, N]");
  const int64_t M = x.size(0), N = x.size(2);
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    Tensor dx = op.empty<T>({M, 2, N});
    launch(gated_kernel<T>, grid_stride(M * N, op.stream()), op.in<T>(dy, "dy", {M, N}), op.in<T>(x, "x", {M, 2, N}),
           op.out<T>(dx, "dx", {M, 2, N}), M, N, static_cast<int>(kind));
    return dx;
  });
}

Tensor prelu_fwd(const Tensor& x, const Tensor& weight) {
  OpScope op("prelu_fwd", x);
  op.check(x.dim() == 3, "x must be [N, C, S]");
  const int64_t N = x.size(0), C = x.size(1), S = x.size(2);
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    Tensor y = op.empty<T>({N, C, S});
    launch(prelu_kernel<T>, grid_stride(N * C * S, op.stream()), static_cast<const T*>(nullptr),
           op.in<T>(x, "x", {N, C, S}), op.in<T>(weight, "weight", {C}), op.out<T>(y, "y", {N, C, S}), N * C * S, C, S);
    return y;
  });
}

std::tuple<Tensor, Tensor> prelu_bwd(const Tensor& dy, const Tensor& x, const Tensor& weight, bool need_dw) {
  OpScope op("prelu_bwd", dy);
  op.check(x.dim() == 3, "x must be [N, C, S]");
  const int64_t N = x.size(0), C = x.size(1), S = x.size(2);
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    Tensor dx = op.empty<T>({N, C, S}), dw = op.empty<T>({need_dw ? C : 0});
    const auto stream = static_cast<cudaStream_t>(op.stream());
    const T *pdy = op.in<T>(dy, "dy", {N, C, S}), *px = op.in<T>(x, "x", {N, C, S});
    launch(prelu_kernel<T>, grid_stride(N * C * S, stream), pdy, px, op.in<T>(weight, "weight", {C}),
           op.out<T>(dx, "dx", {N, C, S}), N * C * S, C, S);
    if (!need_dw) return std::make_tuple(dx, dw);
    launch(prelu_weight_kernel<T>,
           {.grid = dim3(static_cast<unsigned>(C)),
            .block = dim3(256),
            .smem = sizeof(BlockScratch<accumulate_t<T>>),
            .stream = stream},
           pdy, px, op.out<T>(dw, "dw", {C}), N, C, S);
    return std::make_tuple(dx, dw);
  });
}

}  // namespace
}  // namespace pyops

PYOPS_LIBRARY(m) {
  using namespace pyops;
  PYOPS_IMPL(m, activation_fwd);
  PYOPS_IMPL(m, activation_inplace);
  PYOPS_IMPL(m, activation_bwd);
  PYOPS_IMPL(m, gated_fwd);
  PYOPS_IMPL(m, gated_bwd);
  PYOPS_IMPL(m, prelu_fwd);
  PYOPS_IMPL(m, prelu_bwd);
}
