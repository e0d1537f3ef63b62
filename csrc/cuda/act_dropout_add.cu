// act_dropout_add · CUDA
//   y[i] = f(x[i]) * scale + r[i] where element i of the random stream is kept, f(x[i]) * 0 + r[i] elsewhere
//   dx[i] = dy[i] * f'(x[i]) * scale where it is kept, * 0 elsewhere;  f by number, common/activation.h
// layout   [N] flat · random: (seed, offset)
// mapping  a thread takes the four elements that share one draw, in one load and one store where they are aligned
// memory   every input read once, every output written once; the mask is drawn anew, never stored
// numerics in fp32 (fp64 for fp64)
#include "cuda/grid_stride.cuh"
#include "cuda/math.cuh"

#include "common/activation.h"

namespace pyops {
namespace {

using activation::Parameters;
using activation::with_activation;

// other: the residual or, where `backward`, dy.
template <class T>
__global__ void act_dropout_add_kernel(const T* x, const T* other, const int64_t* random, T* y, int64_t N, bool aligned,
                                       bool backward, unsigned threshold, accumulate_t<T> scale, int kind,
                                       Parameters p) {
  using A = accumulate_t<T>;
  const RandomStream stream(random);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  with_activation(kind, [&]<class F>() {
    const auto term = [&](T from, T with, uint32_t bits) {
      const A v = to_acc(from), o = to_acc(with), factor = is_kept(bits, threshold) ? scale : A(0);
      return from_acc<T>(backward ? A(F::gradient(A(o * factor), v, p)) : A(F::value(v, p) * factor + o));
    };
    for (int64_t g = thread; g * 4 < N; g += stride) {
      const Words4 words = stream.words(g);
      if (aligned && g * 4 + 4 <= N) {
        Vec<T, 4> v = load_vec<4>(x + g * 4);
        const Vec<T, 4> o = load_vec<4>(other + g * 4);
#pragma unroll
        for (int j = 0; j < 4; ++j) v[j] = term(v[j], o[j], words[j]);
        store_vec(y + g * 4, v);
      } else {
        for (int j = 0; j < 4 && g * 4 + j < N; ++j) y[g * 4 + j] = term(x[g * 4 + j], other[g * 4 + j], words[j]);
      }
    }
  });
}

}  // namespace
}  // namespace pyops

// binding

#include "common/registry.h"

namespace pyops {
namespace {

Tensor run(const OpScope& op, const Tensor& x, const Tensor& other, const char* name, bool backward,
           const Tensor& random, int64_t threshold, double scale, int64_t kind, Parameters p) {
  activation::check_kind(op, kind);
  op.check(threshold >= 0 && threshold <= int64_t{1} << 31, "threshold must lie in [0, 2^31]");
  const int64_t N = x.numel();
  const int64_t* state = op.in<int64_t>(random, "random", {2});
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    Tensor y = op.empty<T>({N});
    const T *px = op.in<T>(x, "x", {N}), *po = op.in<T>(other, name, {N});
    T* py = op.out<T>(y, backward ? "dx" : "y", {N});
    const uintptr_t all =
        reinterpret_cast<uintptr_t>(px) | reinterpret_cast<uintptr_t>(po) | reinterpret_cast<uintptr_t>(py);
    launch(act_dropout_add_kernel<T>, grid_stride(ceil_div(N, 4), op.stream()), px, po, state, py, N,
           all % (4 * sizeof(T)) == 0, backward, static_cast<unsigned>(threshold), static_cast<accumulate_t<T>>(scale),
           static_cast<int>(kind), p);
    return y;
  });
}

Tensor act_dropout_add_fwd(const Tensor& x, const Tensor& residual, const Tensor& random, int64_t threshold,
                           double scale, int64_t kind, double a, double b, double c) {
  const OpScope op("act_dropout_add_fwd", x);
  return run(op, x, residual, "residual", false, random, threshold, scale, kind, {a, b, c});
}

Tensor act_dropout_add_bwd(const Tensor& dy, const Tensor& x, const Tensor& random, int64_t threshold, double scale,
                           int64_t kind, double a, double b, double c) {
  const OpScope op("act_dropout_add_bwd", dy);
  return run(op, x, dy, "dy", true, random, threshold, scale, kind, {a, b, c});
}

}  // namespace
}  // namespace pyops

PYOPS_LIBRARY(m) {
  using namespace pyops;
  PYOPS_IMPL(m, act_dropout_add_fwd);
  PYOPS_IMPL(m, act_dropout_add_bwd);
}
