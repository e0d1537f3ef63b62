// attention of few queries against many keys (decoding) in bf16 and fp16: one read of keys and values by all SMs.
//
// mapping  a block of attention_fwd_mma_kernel holds the queries of all heads that share a key head, and one part of the
//          keys; a warp then merges the parts of a row, in order
// memory   k and v once, not once per query head; [parts, B, H, L, E + 1] floats written and read, L <= 16
// numerics as attention_mma.cuh; the parts' outputs in fp32; deterministic, on one kind of GPU: it has its number of parts
// source   the parts: Flash-Decoding (Dao, Haziza, Massa, Sizov 2023)
#pragma once

#include "cuda/attention_mma.cuh"

namespace pyops::attention {

inline constexpr int64_t decode_queries = 16;

// Enough parts for two blocks per SM, of at least a tile of keys each; 0 where decoding has nothing to gain.
inline int64_t decode_parts(const Problem<float>& p) {
  if (p.L == 0 || p.L > decode_queries || p.S == 0 || p.B * p.H == 0) return 0;
  const int64_t blocks = p.B * (p.H / p.G) * mma_blocks(p.G * p.L);
  const int64_t wanted = ceil_div(2 * multiprocessor_count(), blocks), tiles = ceil_div(p.S, 64);
  const int64_t parts = wanted < tiles ? wanted : tiles;
  return parts > 1 || p.G > 1 ? parts : 0;
}

// o = sum over parts of exp(lse_part - lse) o_part,  lse = log sum exp(lse_part): one warp per row.
template <class T>
__global__ void __launch_bounds__(128) attention_merge_kernel(Problem<float> p, Tensors<T> t, Parts parts) {
  const int lane = threadIdx.x % 32;
  const Place at = place_of(static_cast<int64_t>(blockIdx.x) * 4 + threadIdx.x / 32, p.H, p.L);
  if (at.b >= p.B) return;
  const Example e = example(p, at.b);
  if (at.block >= e.L) return;
  float most = -INFINITY, total = 0.0f;
  for (int64_t part = 0; part < parts.count; ++part)
    most = fmaxf(most, parts.lse[parts.row(p, part, at.b, at.h, at.block)]);
  const float base = most == -INFINITY ? 0.0f : most;
  for (int64_t part = 0; part < parts.count; ++part)
    total += exp2_approx((parts.lse[parts.row(p, part, at.b, at.h, at.block)] - base) * log2_e);
  const int64_t row = at.b * p.o.batch + at.h * p.o.head + (e.q0 + at.block) * p.o.row;
  for (int64_t c = lane; c < p.E; c += 32) {
    float sum = 0.0f;
    for (int64_t part = 0; part < parts.count; ++part) {
      const int64_t from = parts.row(p, part, at.b, at.h, at.block);
      sum += exp2_approx((parts.lse[from] - base) * log2_e) * parts.o[from * p.E + c];
    }
    t.o[row + c] = from_float<T>(total == 0.0f ? sum : sum / total);  // 0 where nothing is seen, NaN stays
  }
  if (lane == 0)
    t.lse[at.b * p.lse_batch + at.h * p.lse_head + e.q0 + at.block] =
        total == 0.0f ? -INFINITY : base + log2f(total) * ln_2;
}

template <class T>
void forward_decode(const Problem<float>& p, const Tensors<T>& t, const Parts& parts, cudaStream_t stream) {
  forward_mma<true>(p, t, stream, parts);
  launch(attention_merge_kernel<T>,
         {.grid = static_cast<unsigned>(ceil_div(p.B * p.H * p.L, 4)), .block = 128, .stream = stream}, p, t, parts);
}

}  // namespace pyops::attention
