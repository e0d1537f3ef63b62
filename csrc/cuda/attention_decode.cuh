// attention of few queries against many keys (decoding) in fp32, bf16 and fp16: one read of keys and values by all SMs.
//
// mapping  a block holds queries of all heads that share a key head, and one part of the keys; a warp then merges the
//          parts of a row, in order. bf16, fp16: 64 rows of attention_fwd_mma_kernel. fp32: 8 rows; for a tile of keys 8
//          lanes take the products of a key, a warp the softmax of a row, and a warp a quarter of the sum over values
// memory   k and v once, not once per query head (fp32: once per 8 rows); [parts, B, H, L, E + 2] floats written and read
// numerics as attention_mma.cuh and attention_plain.cuh; the parts' outputs in fp32; deterministic, on one kind of GPU:
//          it has its number of parts
// source   the parts: Flash-Decoding (Dao, Haziza, Massa, Sizov 2023)
#pragma once

#include "cuda/attention_mma.cuh"

namespace pyops::attention {

inline constexpr int decode_rows = decode_rows_of_floats, decode_keys = decode_tile, decode_threads = 128;
static_assert(decode_rows_of_halves == mma_rows);

template <class T>
int64_t decode_parts(const Problem<float>& p) {
  return may_decode(p.L, p.S) ? decode_parts(p.B, p.H, p.G, p.L, p.S, p.E, sizeof(T) == 2, multiprocessor_count()) : 0;
}

template <int W>
struct DecodeStorage {
  alignas(16) float q[decode_rows][W];  // at the end sums over values
  alignas(16) float p[decode_keys][decode_rows];
  float factor[decode_rows];
};

// Four columns of a row, zero beyond its width.
PYOPS_DEVICE Vec<float, 4> decode_load(const float* row, int c, int width, bool whole_vectors) {
  Vec<float, 4> v{};
  if (whole_vectors) {
    if (c < width) v = load_vec<4>(row + c);
  } else {
#pragma unroll
    for (int n = 0; n < 4; ++n)
      if (c + n < width) v.v[n] = row[c + n];
  }
  return v;
}

template <int W>
__global__ void __launch_bounds__(decode_threads)
    attention_decode_kernel(Problem<float> p, Tensors<float> t, int64_t blocks, bool whole_vectors, Parts parts) {
  auto& shared = shared_storage<DecodeStorage<W>>();
  constexpr int warps = decode_threads / 32, groups = decode_threads / 8, together = W == 64 ? 4 : 2;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = threadIdx.x / 8, member = threadIdx.x % 8;
  const Place at = place_of(blockIdx.x, p.H / p.G, blocks * parts.count);
  const Example e = example(p, at.b);
  const int64_t row0 = at.block / parts.count * decode_rows, part = at.block % parts.count;
  const QueryRows<true> rows{at.h * p.G, row0, p.L, p.G};
  const int count = static_cast<int>(p.G * p.L - row0 < decode_rows ? p.G * p.L - row0 : decode_rows);
  const float* q = t.q + at.b * p.q.batch + e.q0 * p.q.row;
  const float* k = t.k + at.b * p.k.batch + at.h * p.k.head + e.k0 * p.k.row;
  const float* v = t.v + at.b * p.v.batch + at.h * p.v.head + e.k0 * p.v.row;
  const int D = static_cast<int>(p.D), E = static_cast<int>(p.E);
  const bool extras = p.has_extras();
  const Range all = part_of_keys(e, decode_keys, part, parts.count);

  for (int n = threadIdx.x; n < decode_rows * W; n += decode_threads) {
    const int r = n / W, c = n % W;
    const int64_t i = rows.query(r);
    shared.q[r][c] = i < e.L && c < D ? q[rows.head(r) * p.q.head + i * p.q.row + c] : 0.0f;
  }
  float sum[decode_rows][W / 32] = {}, most[decode_rows / warps], total[decode_rows / warps] = {};
  for (int own = 0; own < decode_rows / warps; ++own) most[own] = -INFINITY;
  __syncthreads();

  for (int j0 = all.low; j0 < all.high; j0 += decode_keys) {
    const int end = j0 + decode_keys < all.high ? j0 + decode_keys : all.high;
    if (p.has_mask() && !mask_shows<float>(p, at.b, rows, count, j0, end)) continue;
#pragma unroll 1
    for (int n = group; n < decode_keys; n += groups * together) {
      Vec<float, 4> key[together][W / 32];
#pragma unroll
      for (int m = 0; m < together; ++m)
#pragma unroll
        for (int i = 0; i < W / 32; ++i) {
          const int j = j0 + n + m * groups;
          key[m][i] =
              j < all.high ? decode_load(k + j * p.k.row, i * 32 + member * 4, D, whole_vectors) : Vec<float, 4>{};
        }
#pragma unroll
      for (int r = 0; r < decode_rows; ++r) {
        if (r >= count) break;
        float dot[together] = {};
#pragma unroll
        for (int i = 0; i < W / 32; ++i) {
          const Vec<float, 4> own = load_vec<4>(&shared.q[r][i * 32 + member * 4]);
#pragma unroll
          for (int m = 0; m < together; ++m)
#pragma unroll
            for (int c = 0; c < 4; ++c) dot[m] += own.v[c] * key[m][i].v[c];
        }
#pragma unroll
        for (int m = 0; m < together; ++m) {
          dot[m] = warp_sum<8>(dot[m]);
          if (member == 0) shared.p[n + m * groups][r] = dot[m];
        }
      }
    }
    __syncthreads();
#pragma unroll
    for (int own = 0; own < decode_rows / warps; ++own) {
      const int r = own * warps + warp;
      if (r >= count) break;
      const int64_t i = rows.query(r), h = rows.head(r);
      float s[decode_keys / 32], top = most[own];
#pragma unroll
      for (int n = 0; n < decode_keys / 32; ++n) {
        const int64_t key = j0 + n * 32 + lane;
        float slope;
        s[n] = shared.p[n * 32 + lane][r];
        s[n] = key >= all.high || i >= e.L || !e.sees(i, key) ? -INFINITY
               : extras                                       ? extra_score<float>(p, e, at.b, h, i, key, s[n], slope)
                                                              : s[n] * p.scale;
        top = s[n] > top ? s[n] : top;
      }
      top = warp_max<32>(top);
      const float base = top == -INFINITY ? 0.0f : top, factor = exp(most[own] - base);
      total[own] *= factor;
#pragma unroll
      for (int n = 0; n < decode_keys / 32; ++n) {
        float weight = exp(s[n] - base);
        total[own] += weight;
        if (p.random != nullptr && weight != 0.0f) weight *= kept(p, at.b, h, i, j0 + n * 32 + lane);
        shared.p[n * 32 + lane][r] = weight;
      }
      most[own] = top;
      if (lane == 0) shared.factor[r] = factor;
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < decode_rows; ++r) {
      if (r >= count) break;
#pragma unroll
      for (int c = 0; c < W / 32; ++c) sum[r][c] *= shared.factor[r];
    }
    const int last =
        all.high - j0 < (warp + 1) * decode_keys / warps ? all.high - j0 : (warp + 1) * decode_keys / warps;
#pragma unroll 4
    for (int n = warp * decode_keys / warps; n < last; ++n) {
      float value[W / 32];
#pragma unroll
      for (int c = 0; c < W / 32; ++c) value[c] = c * 32 + lane < E ? v[(j0 + n) * p.v.row + c * 32 + lane] : 0.0f;
#pragma unroll
      for (int r = 0; r < decode_rows; ++r) {
        if (r >= count) break;
        const float weight = shared.p[n][r];
#pragma unroll
        for (int c = 0; c < W / 32; ++c) sum[r][c] += weight * value[c];
      }
    }
    __syncthreads();
  }

  // The warps' sums, one warp after the other: in a fixed order.
  for (int turn = 0; turn < warps; ++turn) {
    if (warp == turn)
#pragma unroll
      for (int r = 0; r < decode_rows; ++r)
#pragma unroll
        for (int c = 0; c < W / 32; ++c) {
          float& to = shared.q[r][c * 32 + lane];
          to = turn == 0 ? sum[r][c] : to + sum[r][c];
        }
    __syncthreads();
  }
#pragma unroll
  for (int own = 0; own < decode_rows / warps; ++own) {
    const int r = own * warps + warp;
    const float all_lanes = warp_sum<32>(total[own]);
    const int64_t i = rows.query(r);
    if (r >= count || i >= e.L) continue;
    const int row = parts.row(p, part, at.b, rows.head(r), i);
    for (int c = lane; c < E; c += 32) parts.o[row * E + c] = shared.q[r][c];
    if (lane == 0) parts.most[row] = most[own], parts.total[row] = all_lanes;
  }
}

// exp(x): as exact as the products it weighs.
template <class T>
PYOPS_DEVICE float part_weight(float x) {
  return sizeof(T) == 2 ? exp2_approx(x * log2_e) : exp(x);
}

// With w = exp(most_part - most): o = sum over parts of w o_part / total,  total = sum w total_part,
// lse = most + log total. One warp per row.
template <class T>
__global__ void __launch_bounds__(128) attention_merge_kernel(Problem<float> p, Tensors<T> t, Parts parts) {
  const int lane = threadIdx.x % 32;
  const Place at = place_of(static_cast<int64_t>(blockIdx.x) * 4 + threadIdx.x / 32, p.H, p.L);
  if (at.b >= p.B) return;
  const Example e = example(p, at.b);
  if (at.block >= e.L) return;
  float most = -INFINITY, total = 0.0f;
  for (int64_t part = 0; part < parts.count; ++part)
    most = fmaxf(most, parts.most[parts.row(p, part, at.b, at.h, at.block)]);
  const float base = most == -INFINITY ? 0.0f : most;
  for (int64_t part = 0; part < parts.count; ++part) {
    const int from = parts.row(p, part, at.b, at.h, at.block);
    total += part_weight<T>(parts.most[from] - base) * parts.total[from];
  }
  const int64_t row = at.b * p.o.batch + at.h * p.o.head + (e.q0 + at.block) * p.o.row;
  for (int64_t c = lane; c < p.E; c += 32) {
    float sum = 0.0f;
    for (int64_t part = 0; part < parts.count; ++part) {
      const int from = parts.row(p, part, at.b, at.h, at.block);
      sum += part_weight<T>(parts.most[from] - base) * parts.o[from * p.E + c];
    }
    // A row that saw nothing has a total of 0, one with a score that is no number has none.
    t.o[row + c] = from_float<T>(total == 0.0f ? 0.0f : sum / total);
  }
  if (lane == 0)
    t.lse[at.b * p.lse_batch + at.h * p.lse_head + e.q0 + at.block] = total == 0.0f ? -INFINITY : base + log(total);
}

template <int W>
void launch_decode(const Problem<float>& p, const Tensors<float>& t, const Parts& parts, cudaStream_t stream) {
  const int64_t blocks = ceil_div(p.G * p.L, decode_rows);
  launch(attention_decode_kernel<W>,
         {.grid = static_cast<unsigned>(p.B * (p.H / p.G) * blocks * parts.count),
          .block = decode_threads,
          .smem = sizeof(DecodeStorage<W>),
          .stream = stream},
         p, t, blocks, p.D % 4 == 0 && is_aligned(t.k), parts);
}

template <class T>
void forward_decode(const Problem<float>& p, const Tensors<T>& t, const Parts& parts, cudaStream_t stream) {
  if constexpr (sizeof(T) == 2) {
    forward_mma<true>(p, t, stream, parts);
  } else {
    const int64_t width = p.D > p.E ? p.D : p.E;
    if (width <= 64)
      launch_decode<64>(p, t, parts, stream);
    else if (width <= 128)
      launch_decode<128>(p, t, parts, stream);
    else
      launch_decode<256>(p, t, parts, stream);
  }
  launch(attention_merge_kernel<T>,
         {.grid = static_cast<unsigned>(ceil_div(p.B * p.H * p.L, 4)), .block = 128, .stream = stream}, p, t, parts);
}

}  // namespace pyops::attention
