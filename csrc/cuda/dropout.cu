// dropout · CUDA
//   y[m,s,c] = x[m,s,c] * scale + shift where element m·C + c of the random stream is kept, else x[m,s,c] * 0 + fill
// layout   x, y: [M, S, C] · random: (seed, offset)
// mapping  S = 1: a thread takes the four elements that share one draw, in one load and one store where they are
//          aligned; else a thread takes an element, and the draw of its channel
// memory   x read once, y written once; the mask is drawn anew, never stored
// numerics in fp32 (fp64 for fp64); NaN and infinity in a dropped element give NaN, as in torch

#include "cuda/grid_stride.cuh"

namespace pyops {
namespace {

template <class A>
struct Terms {
  unsigned threshold;
  A scale, shift, fill;
  PYOPS_DEVICE A operator()(A x, uint32_t bits) const {
    return is_kept(bits, threshold) ? x * scale + shift : x * A(0) + fill;
  }
};

template <class T>
__global__ void dropout_kernel(const T* x, const int64_t* random, T* y, int64_t N, bool aligned,
                               Terms<accumulate_t<T>> terms) {
  const RandomStream stream(random);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t g = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; g * 4 < N; g += stride) {
    const Words4 words = stream.words(g);
    if (aligned && g * 4 + 4 <= N) {
      Vec<T, 4> v = load_vec<4>(x + g * 4);
#pragma unroll
      for (int j = 0; j < 4; ++j) v[j] = from_acc<T>(terms(to_acc(v[j]), words[j]));
      store_vec(y + g * 4, v);
    } else {
      for (int j = 0; j < 4 && g * 4 + j < N; ++j) y[g * 4 + j] = from_acc<T>(terms(to_acc(x[g * 4 + j]), words[j]));
    }
  }
}

template <class T>
__global__ void feature_dropout_kernel(const T* x, const int64_t* random, T* y, int64_t N, int64_t S, int64_t C,
                                       Terms<accumulate_t<T>> terms) {
  const RandomStream stream(random);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < N; i += stride)
    y[i] = from_acc<T>(terms(to_acc(x[i]), stream.bits(i / (S * C) * C + i % C)));
}

}  // namespace
}  // namespace pyops

// binding

#include "common/registry.h"

namespace pyops {
namespace {

Tensor dropout(const Tensor& x, const Tensor& random, int64_t threshold, double scale, double shift, double fill) {
  OpScope op("dropout", x);
  op.check(x.dim() == 3, "x must be [M, S, C]");
  op.check(threshold >= 0 && threshold <= int64_t{1} << 31, "threshold must lie in [0, 2^31]");
  const int64_t M = x.size(0), S = x.size(1), C = x.size(2), N = M * S * C;
  const int64_t* state = op.in<int64_t>(random, "random", {2});
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    using A = accumulate_t<T>;
    Tensor y = op.empty<T>({M, S, C});
    const T* px = op.in<T>(x, "x", {M, S, C});
    T* py = op.out<T>(y, "y", {M, S, C});
    const Terms<A> terms{static_cast<unsigned>(threshold), A(scale), A(shift), A(fill)};
    if (S == 1) {
      const uintptr_t both = reinterpret_cast<uintptr_t>(px) | reinterpret_cast<uintptr_t>(py);
      launch(dropout_kernel<T>, grid_stride(ceil_div(N, 4), op.stream()), px, state, py, N, both % (4 * sizeof(T)) == 0,
             terms);
    } else {
      launch(feature_dropout_kernel<T>, grid_stride(N, op.stream()), px, state, py, N, S, C, terms);
    }
    return y;
  });
}

}  // namespace
}  // namespace pyops

PYOPS_LIBRARY(m) {
  using namespace pyops;
  PYOPS_IMPL(m, dropout);
}
