// additive_attention · CUDA
//   score[l,s] = v . tanh(q[l] + k[s]) + mask[l,s]     p = softmax over s     y[l] = sum_s p[l,s] value[s]
//   ds = p (dy . value - delta),  dq[l] = sum_s ds v (1 - tanh²),  dk[s] = sum_l of the same,  dv = sum ds tanh
//   delta = sum_s p dy . value = dy . y but for the rounding of y, which is taken back afterwards: ds sums to 0
// layout   head of common/additive_attention_binding.h
// mapping  a block takes a row (n, l): warps take keys, lanes D; then threads take E (forward) or D (backward)
//          gradients of k and value: a block takes (n, s), threads D and E
// memory   never L x S x D: scores, p and ds, L x S each, pass through DRAM
// numerics fp32 (fp64 for fp64), no atomics
#include "cuda/math.cuh"

#include "common/additive_attention.h"

namespace pyops {

constexpr int additive_threads = 128;

template <class A>
struct AdditiveShared {
  BlockScratch<A> scratch;
};

// v . tanh(q + k) + mask, in every lane of a warp.
template <class T>
PYOPS_DEVICE accumulate_t<T> additive_score(const AdditiveAttention<T>& a, int64_t row, int64_t s) {
  accumulate_t<T> total = 0;
  const T *q = a.q + row * a.D, *k = a.k + (row / a.L * a.S + s) * a.D;
  const auto* mask = a.mask_row(row);
  for (int64_t i = threadIdx.x % 32; i < a.D; i += 32) total += tanh(to_acc(q[i]) + to_acc(k[i])) * to_acc(a.v[i]);
  total = warp_sum<32>(total);
  return mask != nullptr ? total + mask[s] : total;
}

template <class T>
__global__ void additive_attention_fwd_kernel(AdditiveAttention<T> a, accumulate_t<T>* scores, T* y,
                                              accumulate_t<T>* lse) {
  using A = accumulate_t<T>;
  auto& scratch = shared_storage<AdditiveShared<A>>().scratch;
  const int64_t row = blockIdx.x;
  A* p = scores + row * a.S;
  for (int64_t s = threadIdx.x / 32; s < a.S; s += blockDim.x / 32) {
    const A score = additive_score(a, row, s);
    if (threadIdx.x % 32 == 0) p[s] = score;
  }
  __syncthreads();
  A most = -INFINITY, total = 0;
  for (int64_t s = threadIdx.x; s < a.S; s += blockDim.x) most = p[s] > most ? p[s] : most;
  most = block_max(most, scratch);
  const bool blind = most == -INFINITY;
  for (int64_t s = threadIdx.x; s < a.S; s += blockDim.x) {
    p[s] = blind && p[s] == p[s] ? A(0) : exp(p[s] - most);
    total += p[s];
  }
  total = block_sum(total, scratch);  // its barriers also make p of all threads visible
  const A scale = blind && total == A(0) ? A(0) : A(1) / total;
  for (int64_t e = threadIdx.x; e < a.E; e += blockDim.x) {
    A sum = 0;
    for (int64_t s = 0; s < a.S; ++s) sum += p[s] * to_acc(a.value[(row / a.L * a.S + s) * a.E + e]);
    y[row * a.E + e] = from_acc<T>(sum * scale);
  }
  if (threadIdx.x == 0) lse[row] = blind && total == A(0) ? A(INFINITY) : most + log(total);
}

template <class T>
__global__ void additive_attention_bwd_rows_kernel(AdditiveAttention<T> a, AdditiveAttentionGradients<T> g) {
  using A = accumulate_t<T>;
  auto& scratch = shared_storage<AdditiveShared<A>>().scratch;
  const int64_t row = blockIdx.x, first = row / a.L * a.S;
  const T* dy = g.dy + row * a.E;
  A *p_row = g.p + row * a.S, *ds_row = g.ds + row * a.S, delta = 0, rest = 0;
  for (int64_t e = threadIdx.x; e < a.E; e += blockDim.x) delta += to_acc(dy[e]) * to_acc(g.y[row * a.E + e]);
  delta = block_sum(delta, scratch);
  for (int64_t s = threadIdx.x / 32; s < a.S; s += blockDim.x / 32) {
    const A p = exp(additive_score(a, row, s) - g.lse[row]);
    A dp = 0;
    for (int64_t e = threadIdx.x % 32; e < a.E; e += 32) dp += to_acc(dy[e]) * to_acc(a.value[(first + s) * a.E + e]);
    dp = warp_sum<32>(dp);
    const A ds = p * (dp - delta);
    if (threadIdx.x % 32 == 0) p_row[s] = p, ds_row[s] = ds, rest += ds;
  }
  rest = block_sum(rest, scratch);  // its barriers also make p and ds of all threads visible
  for (int64_t s = threadIdx.x; s < a.S; s += blockDim.x) ds_row[s] -= rest * p_row[s];
  __syncthreads();
  for (int64_t i = threadIdx.x; i < a.D; i += blockDim.x) {
    const A q = to_acc(a.q[row * a.D + i]);
    A dq = 0, dv = 0;
    for (int64_t s = 0; s < a.S; ++s) {
      const A ds = ds_row[s], t = tanh(q + to_acc(a.k[(first + s) * a.D + i]));
      dq += ds * (A(1) - t * t);
      dv += ds * t;
    }
    g.dq[row * a.D + i] = from_acc<T>(dq * to_acc(a.v[i]));
    g.dv[row * a.D + i] = dv;
  }
}

template <class T>
__global__ void additive_attention_bwd_keys_kernel(AdditiveAttention<T> a, AdditiveAttentionGradients<T> g) {
  using A = accumulate_t<T>;
  const int64_t at = blockIdx.x, n = at / a.S, s = at % a.S, begin = n * a.L, end = begin + a.L;
  for (int64_t i = threadIdx.x; i < a.D; i += blockDim.x) {
    const A k = to_acc(a.k[at * a.D + i]);
    A dk = 0;
    for (int64_t row = begin; row < end; ++row) {
      const A t = tanh(to_acc(a.q[row * a.D + i]) + k);
      dk += g.ds[row * a.S + s] * (A(1) - t * t);
    }
    g.dk[at * a.D + i] = from_acc<T>(dk * to_acc(a.v[i]));
  }
  for (int64_t e = threadIdx.x; e < a.E; e += blockDim.x) {
    A dvalue = 0;
    for (int64_t row = begin; row < end; ++row) dvalue += g.p[row * a.S + s] * to_acc(g.dy[row * a.E + e]);
    g.dvalue[at * a.E + e] = from_acc<T>(dvalue);
  }
}

inline LaunchConfig additive_blocks(int64_t blocks, size_t shared, void* stream) {
  return {.grid = dim3(static_cast<unsigned>(blocks)),
          .block = dim3(additive_threads),
          .smem = shared,
          .stream = static_cast<cudaStream_t>(stream)};
}

template <class T>
void additive_attention_forward(const AdditiveAttention<T>& a, accumulate_t<T>* scores, T* y, accumulate_t<T>* lse,
                                void* stream) {
  const auto config = additive_blocks(a.N * a.L, sizeof(AdditiveShared<accumulate_t<T>>), stream);
  launch(additive_attention_fwd_kernel<T>, config, a, scores, y, lse);
}

template <class T>
void additive_attention_backward(const AdditiveAttention<T>& a, const AdditiveAttentionGradients<T>& g, void* stream) {
  const auto rows = additive_blocks(a.N * a.L, sizeof(AdditiveShared<accumulate_t<T>>), stream);
  launch(additive_attention_bwd_rows_kernel<T>, rows, a, g);
  launch(additive_attention_bwd_keys_kernel<T>, additive_blocks(a.N * a.S, 0, stream), a, g);
}

}  // namespace pyops

#include "common/additive_attention_binding.h"

PYOPS_LIBRARY(m) {
  using namespace pyops;
  PYOPS_IMPL(m, additive_attention_fwd);
  PYOPS_IMPL(m, additive_attention_bwd);
}
