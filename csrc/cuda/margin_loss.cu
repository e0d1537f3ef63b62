// margin_loss · CUDA
//   loss[m] = w_t / N Σ_{n≠t} max(0, d - x_t + x_n)^p,  t = target[m], d the margin, p = 1 or 2
//   dx_n = g w_t / N (p = 1: [z_n > 0], p = 2: 2 max(0, z_n)) for n ≠ t, z_n = d - x_t + x_n;  dx_t = -Σ_{n≠t} dx_n
// layout   x, dx: [M, N] · target, loss, g: [M] · w: [N]
// mapping  a block per row, 32 to 512 threads
// memory   x read once; backward reads x, writes dx
// numerics in fp32 (fp64 for fp64), sums in fixed order; a label outside [0, N) gives NaN and reads nothing
#include "cuda/math.cuh"

namespace pyops {
namespace {

// g null: the loss; else the gradient.
template <class T>
__global__ void margin_loss_kernel(const accumulate_t<T>* g, const T* x, const int64_t* target,
                                   const accumulate_t<T>* w, accumulate_t<T>* loss, T* dx, int64_t N, int64_t p,
                                   accumulate_t<T> margin) {
  using A = accumulate_t<T>;
  auto& scratch = shared_storage<BlockScratch<A>>();
  const int64_t m = blockIdx.x, t = target[m];
  const bool wrong = t < 0 || t >= N;
  const T* row = x + m * N;
  const A shift = wrong ? A(NAN) : margin - to_acc(row[t]);
  A scale = wrong ? A(NAN) : (w == nullptr ? A(1) : w[t]) / A(N);
  if (g != nullptr) scale *= g[m];
  A sum = 0;
  for (int64_t n = threadIdx.x; n < N; n += blockDim.x) {
    if (n == t) continue;
    const A z = to_acc(row[n]) + shift;
    A term;
    if (g == nullptr) {
      term = z > A(0) ? (p == 1 ? z : z * z) : A(0);  // 0 for NaN, as torch has it
    } else {
      term = z > A(0) ? (p == 1 ? scale : A(2) * z * scale) : wrong ? A(NAN) : A(0);
      dx[m * N + n] = from_acc<T>(term);
    }
    sum += term;
  }
  sum = block_sum(sum, scratch);
  if (g == nullptr && threadIdx.x == 0) loss[m] = sum * scale;
  if (g != nullptr && !wrong && threadIdx.x == 0) dx[m * N + t] = from_acc<T>(-sum);
}

LaunchConfig row_config(int64_t M, int64_t N, size_t smem, void* stream) {
  unsigned threads = 32;
  while (threads < 512 && threads * 8 < N) threads *= 2;
  return {.grid = dim3(static_cast<unsigned>(M)),
          .block = dim3(threads),
          .smem = smem,
          .stream = static_cast<cudaStream_t>(stream)};
}

}  // namespace
}  // namespace pyops

// binding

#include "common/registry.h"

namespace pyops {
namespace {

Tensor margin_loss_fwd(const Tensor& x, const Tensor& target, const OptionalTensor& weight, int64_t p, double margin) {
  OpScope op("margin_loss_fwd", x);
  op.check(x.dim() == 2, "x must be [M, N]");
  const int64_t M = x.size(0), N = x.size(1);
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    using A = accumulate_t<T>;
    Tensor loss = op.empty<A>({M});
    launch(margin_loss_kernel<T>, row_config(M, N, sizeof(BlockScratch<A>), op.stream()),
           static_cast<const A*>(nullptr), op.in<T>(x, "x", {M, N}), op.in<int64_t>(target, "target", {M}),
           op.in_optional<A>(weight, "weight", {N}), op.out<A>(loss, "loss", {M}), static_cast<T*>(nullptr), N, p,
           static_cast<A>(margin));
    return loss;
  });
}

Tensor margin_loss_bwd(const Tensor& g, const Tensor& x, const Tensor& target, const OptionalTensor& weight, int64_t p,
                       double margin) {
  OpScope op("margin_loss_bwd", g);
  op.check(x.dim() == 2, "x must be [M, N]");
  const int64_t M = x.size(0), N = x.size(1);
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    using A = accumulate_t<T>;
    Tensor dx = op.empty<T>({M, N});
    launch(margin_loss_kernel<T>, row_config(M, N, sizeof(BlockScratch<A>), op.stream()), op.in<A>(g, "g", {M}),
           op.in<T>(x, "x", {M, N}), op.in<int64_t>(target, "target", {M}), op.in_optional<A>(weight, "weight", {N}),
           static_cast<A*>(nullptr), op.out<T>(dx, "dx", {M, N}), N, p, static_cast<A>(margin));
    return dx;
  });
}

}  // namespace
}  // namespace pyops

PYOPS_LIBRARY(m) {
  using namespace pyops;
  PYOPS_IMPL(m, margin_loss_fwd);
  PYOPS_IMPL(m, margin_loss_bwd);
}
