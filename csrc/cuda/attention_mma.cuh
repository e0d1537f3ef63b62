// attention in bf16 and fp16 on tensor cores (mma.sync, sm_80 and later).
//
// mapping  4 warps own 16 rows each of a block of 64; tiles of the other side come by cp.async. A warp holds its scores
//          [16, BN] as accumulators of the first product, and they are the A operand of the second as they lie.
// backward dq: the block owns queries, ds = p (dp - delta), dq += ds k
//          dk, dv: the block owns keys, all is transposed: dk += dsT q, dv += pT dy. The kernel is the same.
// numerics products in fp32, p and ds rounded to T; no atomics: deterministic
#pragma once

#include "cuda/attention.cuh"

namespace pyops::attention {

inline constexpr int mma_rows = 64, mma_threads = 128;

// 8 more elements per row: the 8 rows of an ldmatrix then lie in different banks.
template <class T, int Rows, int W>
struct Tile {
  T at[Rows][W + 8];
};

// The scores of each thread, where a loop can index them: what masks, biases and dropout take is in the code once, not
// once per register. A thread reads only what it wrote.
template <int BN>
struct Scratch {
  float at[BN / 2][mma_threads];
  PYOPS_DEVICE void put(const float (&s)[BN / 8][4]) {
#pragma unroll
    for (int n = 0; n < BN / 2; ++n) at[n][threadIdx.x] = s[n / 4][n % 4];
  }
  PYOPS_DEVICE void get(float (&s)[BN / 8][4]) const {
#pragma unroll
    for (int n = 0; n < BN / 2; ++n) s[n / 4][n % 4] = at[n][threadIdx.x];
  }
};
// Element n of a thread's scores is in row row_of(n) of the block and column column_of(n) of the tile.
PYOPS_DEVICE int row_of(int n) {
  return static_cast<int>(threadIdx.x) / 32 * 16 + static_cast<int>(threadIdx.x) % 32 / 4 + n % 4 / 2 * 8;
}
PYOPS_DEVICE int column_of(int n) { return n / 4 * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + n % 2; }

template <class T, int W, int BN>
struct ForwardStorage {
  alignas(16) Tile<T, mma_rows, W> q;
  alignas(16) Tile<T, BN, W> k, v;
  Scratch<BN> scratch;
};
template <class T, int W, int BN>
struct BackwardStorage {
  alignas(16) Tile<T, mma_rows, W> own_first, own_second;
  alignas(16) Tile<T, BN, W> first, second;
  Scratch<BN> s, ds;
  float lse[BN], delta[BN];
};

// Rows of `width` values, row r at from + at(r); zero where at(r) is negative, and beyond the width.
template <class T, int Rows, int W, class At>
PYOPS_DEVICE void load_rows(Tile<T, Rows, W>& tile, const T* from, int width, bool whole_vectors, const At& at) {
  constexpr int chunks = W / 8;
#pragma unroll 4
  for (int i = threadIdx.x; i < Rows * chunks; i += mma_threads) {
    const int r = i / chunks, c = i % chunks * 8;
    const int64_t offset = at(r);
    const bool there = offset >= 0;
    const T* row = from + offset;
    if (whole_vectors) {
      const bool valid = there && c < width;
      cp_async<16>(&tile.at[r][c], valid ? row + c : from, valid);
    } else {
#pragma unroll
      for (int n = 0; n < 8; ++n) tile.at[r][c + n] = there && c + n < width ? row[c + n] : from_float<T>(0.0f);
    }
  }
  cp_async_commit();
}

// Rows [r0, r0 + Rows) of a matrix with `rows` rows.
template <class T, int Rows, int W>
PYOPS_DEVICE void load_tile(Tile<T, Rows, W>& tile, const T* from, int64_t stride, int64_t r0, int64_t rows, int width,
                            bool whole_vectors) {
  load_rows(tile, from, width, whole_vectors, [&](int r) { return r0 + r < rows ? (r0 + r) * stride : int64_t(-1); });
}

// s += rows 16 * warp .. of a times rows of b transposed.
template <class T, int W, int BN>
PYOPS_DEVICE void add_scores(float (&s)[BN / 8][4], const Tile<T, mma_rows, W>& a, const Tile<T, BN, W>& b) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < W / 16; ++i) {
    uint32_t fragment[4];
    ldmatrix_x4(fragment, &a.at[warp * 16 + lane % 16][i * 16 + lane / 16 * 8]);
#pragma unroll
    for (int j = 0; j < BN / 16; ++j) {
      uint32_t pair[4];
      ldmatrix_x4(pair, &b.at[j * 16 + lane / 16 * 8 + lane % 8][i * 16 + lane / 8 % 2 * 8]);
      mma_m16n8k16<T>(s[j * 2], fragment, {pair[0], pair[1]});
      mma_m16n8k16<T>(s[j * 2 + 1], fragment, {pair[2], pair[3]});
    }
  }
}

// sum += s (rounded to T) times b.
template <class T, int W, int BN>
PYOPS_DEVICE void add_product(float (&sum)[W / 8][4], const float (&s)[BN / 8][4], const Tile<T, BN, W>& b) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < BN / 16; ++i) {
    const uint32_t fragment[4] = {pack2<T>(s[i * 2][0], s[i * 2][1]), pack2<T>(s[i * 2][2], s[i * 2][3]),
                                  pack2<T>(s[i * 2 + 1][0], s[i * 2 + 1][1]),
                                  pack2<T>(s[i * 2 + 1][2], s[i * 2 + 1][3])};
#pragma unroll
    for (int j = 0; j < W / 16; ++j) {
      uint32_t pair[4];
      ldmatrix_x4_trans(pair, &b.at[i * 16 + lane % 16][j * 16 + lane / 16 * 8]);
      mma_m16n8k16<T>(sum[j * 2], fragment, {pair[0], pair[1]});
      mma_m16n8k16<T>(sum[j * 2 + 1], fragment, {pair[2], pair[3]});
    }
  }
}

// The two rows of an accumulator that a lane holds, times `factor`, to memory.
template <class T, int W>
PYOPS_DEVICE void store_row(T* row, int width, const float (&sum)[W / 8][4], int half, float factor) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < W / 8; ++j) {
    const int c = j * 8 + lane % 4 * 2;
    if (width % 2 == 0) {
      if (c < width)
        *reinterpret_cast<uint32_t*>(row + c) = pack2<T>(sum[j][half * 2] * factor, sum[j][half * 2 + 1] * factor);
    } else {
      if (c < width) row[c] = from_float<T>(sum[j][half * 2] * factor);
      if (c + 1 < width) row[c + 1] = from_float<T>(sum[j][half * 2 + 1] * factor);
    }
  }
}

template <class T, int W, int BN, bool decode>
__global__ void __launch_bounds__(mma_threads)
    attention_fwd_mma_kernel(Problem<float> p, Tensors<T> t, int64_t blocks, bool whole_vectors, Parts parts) {
  auto& shared = shared_storage<ForwardStorage<T, W, BN>>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // Blocks with most keys first: a causal mask leaves the last queries the most work.
  const int64_t heads = decode ? p.H / p.G : p.H;
  const Place at = place_of(static_cast<int64_t>(gridDim.x) - 1 - blockIdx.x, heads, blocks * parts.count);
  const Example e = example(p, at.b);
  const int64_t i0 = at.block / parts.count * mma_rows, part = at.block % parts.count;
  if (!decode && i0 >= e.L) return;
  const QueryRows<decode> rows{decode ? at.h * p.G : at.h, i0, p.L, p.G};
  const int64_t key_head = decode ? at.h : at.h / p.G;
  const T* q = t.q + at.b * p.q.batch + e.q0 * p.q.row;
  const T* k = t.k + at.b * p.k.batch + key_head * p.k.head + e.k0 * p.k.row;
  const T* v = t.v + at.b * p.v.batch + key_head * p.v.head + e.k0 * p.v.row;
  const int D = static_cast<int>(p.D), E = static_cast<int>(p.E);
  Range all = decode ? part_of_keys(e, BN, part, parts.count)
                     : range_of<true>(e, i0, i0 + mma_rows < e.L ? i0 + mma_rows : e.L);
  // Heads that share a block when decoding may have a mask each.
  const int64_t end = decode ? p.G * p.L : e.L;
  const int count = static_cast<int>(i0 + mma_rows < end ? mma_rows : end - i0);
  const auto shown = [&](int tile0) { return shown_keys<T>(p, at.b, rows, count, tile0, all.high, BN); };
  const int first = shown(all.low / BN * BN);
  // Without extras products stay as they are until their largest is subtracted, which a larger product must be.
  const bool extras = p.has_extras() || !(p.scale > 0.0f);

  float sum[W / 8][4] = {}, most[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
  Range range[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) range[half] = range_of<true>(e, rows.query(warp * 16 + lane / 4 + half * 8));
  load_rows(shared.q, q, D, whole_vectors, [&](int r) {
    const int64_t i = rows.query(r);
    return i < e.L ? rows.head(r) * p.q.head + i * p.q.row : int64_t(-1);
  });
  if (first < all.high) load_tile(shared.k, k, p.k.row, first, e.S, D, whole_vectors);

  for (int j0 = first, next; j0 < all.high; j0 = next) {
    load_tile(shared.v, v, p.v.row, j0, e.S, E, whole_vectors);
    cp_async_wait<1>();
    __syncthreads();
    float s[BN / 8][4] = {};
    add_scores<T, W, BN>(s, shared.q, shared.k);
    __syncthreads();
    next = shown(j0 + BN);
    if (next < all.high)
      load_tile(shared.k, k, p.k.row, next, e.S, D, whole_vectors);
    else
      cp_async_commit();

    if (extras) {
      shared.scratch.put(s);
#pragma unroll 1
      for (int n = 0; n < BN / 2; ++n) {
        float& x = shared.scratch.at[n][threadIdx.x];
        const int64_t i = rows.query(row_of(n)), h = rows.head(row_of(n)), key = j0 + column_of(n);
        float slope;
        x = e.sees(i, key) && i < e.L ? extra_score<T>(p, e, at.b, h, i, key, x, slope) : -INFINITY;
      }
      shared.scratch.get(s);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool whole = range[half].low <= j0 && range[half].high >= j0 + BN;
      const float unit = extras ? log2_e : p.scale * log2_e;
      float top = most[half];
#pragma unroll
      for (int j = 0; j < BN / 8; ++j)
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const int key = j0 + j * 8 + lane % 4 * 2 + n;
          float& x = s[j][half * 2 + n];
          x = whole || (key >= range[half].low && key < range[half].high) ? x : -INFINITY;
          top = fmaxf(top, x);
        }
      top = warp_max<4>(top);
      const float base = top == -INFINITY ? 0.0f : top, factor = exp2_approx((most[half] - base) * unit);
      float part = 0.0f;
#pragma unroll
      for (int j = 0; j < BN / 8; ++j)
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          float& x = s[j][half * 2 + n];
          x = exp2_approx((x - base) * unit);  // not a difference of products: a mask of -3e38 has no product
          part += x;
        }
      total[half] = total[half] * factor + part;
      most[half] = top;
#pragma unroll
      for (int j = 0; j < W / 8; ++j) sum[j][half * 2] *= factor, sum[j][half * 2 + 1] *= factor;
    }
    if (p.random != nullptr) {
      shared.scratch.put(s);
#pragma unroll 1
      for (int n = 0; n < BN / 2; ++n)
        shared.scratch.at[n][threadIdx.x] *=
            kept(p, at.b, rows.head(row_of(n)), rows.query(row_of(n)), j0 + column_of(n));
      shared.scratch.get(s);
    }
    cp_async_wait<1>();
    __syncthreads();
    add_product<T, W, BN>(sum, s, shared.v);
    __syncthreads();
  }
  cp_async_wait<0>();
  const float scale = extras ? 1.0f : p.scale;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float all_lanes = warp_sum<4>(total[half]);
    const int64_t r = warp * 16 + lane / 4 + half * 8, i = rows.query(r), h = rows.head(r);
    if (i >= e.L) continue;
    if constexpr (decode) {
      const int row = parts.row(p, part, at.b, h, i);
#pragma unroll
      for (int n = 0; n < W / 4; ++n) {
        const int c = n / 2 * 8 + lane % 4 * 2 + n % 2;
        if (c < E) parts.o[row * E + c] = sum[n / 2][half * 2 + n % 2];
      }
      if (lane % 4 == 0) parts.most[row] = most[half] * scale, parts.total[row] = all_lanes;
    } else {
      const bool none = most[half] == -INFINITY;
      const float factor = none ? 0.0f : 1.0f / all_lanes;
      store_row<T, W>(t.o + at.b * p.o.batch + h * p.o.head + (e.q0 + i) * p.o.row, E, sum, half, factor);
      if (lane % 4 == 0)
        t.lse[at.b * p.lse_batch + h * p.lse_head + e.q0 + i] =
            none ? -INFINITY : most[half] * scale + log2f(all_lanes) * ln_2;
    }
  }
}

// want_first: dq (by_query) or dk;  want_second: dv
template <class T, int W, int BN, bool by_query, bool want_first, bool want_second>
__global__ void __launch_bounds__(mma_threads)
    attention_bwd_mma_kernel(Problem<float> p, Tensors<T> t, int64_t blocks, bool whole_vectors) {
  auto& shared = shared_storage<BackwardStorage<T, W, BN>>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t group = by_query ? 1 : p.G, heads = p.H / group;
  const Place at = place_of(by_query ? static_cast<int64_t>(gridDim.x) - 1 - blockIdx.x : blockIdx.x, heads, blocks);
  const Example e = example(p, at.b);
  const int64_t own0 = at.block * mma_rows, own_rows = by_query ? e.L : e.S;
  // Rows to write: keys beyond a length exist in memory and have gradient 0.
  const int64_t kept_rows = by_query ? e.L : (p.cu_k != nullptr ? e.S : p.S);
  if (own0 >= kept_rows) return;
  const int64_t key_head = by_query ? at.h / p.G : at.h;
  const T* k = t.k + at.b * p.k.batch + key_head * p.k.head + e.k0 * p.k.row;
  const T* v = t.v + at.b * p.v.batch + key_head * p.v.head + e.k0 * p.v.row;
  const int D = static_cast<int>(p.D), E = static_cast<int>(p.E);
  const Range all = range_of<by_query>(e, own0, own0 + mma_rows < own_rows ? own0 + mma_rows : own_rows);
  const bool extras = p.has_extras();

  float sum_first[want_first ? W / 8 : 1][4] = {}, sum_second[want_second ? W / 8 : 1][4] = {};
  Range range[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) range[half] = range_of<by_query>(e, own0 + warp * 16 + lane / 4 + half * 8);
  if (!by_query) {
    load_tile(shared.own_first, k, p.k.row, own0, e.S, D, whole_vectors);
    load_tile(shared.own_second, v, p.v.row, own0, e.S, E, whole_vectors);
  }
  for (int64_t g = 0; g < group; ++g) {
    const int64_t h = by_query ? at.h : at.h * group + g;
    const T* q = t.q + at.b * p.q.batch + h * p.q.head + e.q0 * p.q.row;
    const T* dy = t.dy + at.b * p.o.batch + h * p.o.head + e.q0 * p.o.row;
    const float* lse = t.lse_in + at.b * p.lse_batch + h * p.lse_head + e.q0;
    const float* delta = t.delta + at.b * p.lse_batch + h * p.lse_head + e.q0;
    float row_lse[2] = {}, row_delta[2] = {};
    if (by_query) {
      load_tile(shared.own_first, q, p.q.row, own0, e.L, D, whole_vectors);
      load_tile(shared.own_second, dy, p.o.row, own0, e.L, E, whole_vectors);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t i = own0 + warp * 16 + lane / 4 + half * 8;
        if (i < e.L) row_lse[half] = lse[i], row_delta[half] = delta[i];
      }
    }
    const int64_t end = own0 + mma_rows < own_rows ? own0 + mma_rows : own_rows;
    const auto shown = [&](int tile0) { return shown_tile<T, by_query>(p, at.b, h, own0, end, tile0, all.high, BN); };
    for (int other0 = shown(all.low / BN * BN); other0 < all.high; other0 = shown(other0 + BN)) {
      load_tile(shared.first, by_query ? k : q, by_query ? p.k.row : p.q.row, other0, by_query ? e.S : e.L, D,
                whole_vectors);
      load_tile(shared.second, by_query ? v : dy, by_query ? p.v.row : p.o.row, other0, by_query ? e.S : e.L, E,
                whole_vectors);
      if (!by_query)
        for (int n = threadIdx.x; n < BN; n += mma_threads) {
          const bool there = other0 + n < e.L;
          shared.lse[n] = there ? lse[other0 + n] : 0.0f;
          shared.delta[n] = there ? delta[other0 + n] : 0.0f;
        }
      cp_async_wait<0>();
      __syncthreads();
      float s[BN / 8][4] = {}, ds[BN / 8][4] = {};
      add_scores<T, W, BN>(s, shared.own_first, shared.first);
      if constexpr (want_first) add_scores<T, W, BN>(ds, shared.own_second, shared.second);
      if (extras) {
        shared.s.put(s);
        shared.ds.put(ds);
#pragma unroll 1
        for (int n = 0; n < BN / 2; ++n) {
          const int64_t own = own0 + row_of(n), other = other0 + column_of(n);
          const int64_t i = by_query ? own : other, key = by_query ? other : own;
          const float l = by_query ? (n % 4 < 2 ? row_lse[0] : row_lse[1]) : shared.lse[column_of(n)];
          const float d = by_query ? (n % 4 < 2 ? row_delta[0] : row_delta[1]) : shared.delta[column_of(n)];
          float& x = shared.s.at[n][threadIdx.x];
          float& y = shared.ds.at[n][threadIdx.x];
          if (i < e.L && e.sees(i, key) && l != -INFINITY) {
            float slope;
            const float weight = exp2_approx((extra_score<T>(p, e, at.b, h, i, key, x, slope) - l) * log2_e);
            const float factor = p.random != nullptr ? kept(p, at.b, h, i, key) : 1.0f;
            y = weight * (y * factor - d) * (p.scale * slope);
            x = weight * factor;
          } else {
            x = y = 0.0f;
          }
        }
        shared.s.get(s);
        shared.ds.get(ds);
      } else {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const bool whole = range[half].low <= other0 && range[half].high >= other0 + BN;
#pragma unroll
          for (int j = 0; j < BN / 8; ++j)
#pragma unroll
            for (int n = 0; n < 2; ++n) {
              const int column = j * 8 + lane % 4 * 2 + n, other = other0 + column;
              const float l = by_query ? row_lse[half] : shared.lse[column];
              const float d = by_query ? row_delta[half] : shared.delta[column];
              float& x = s[j][half * 2 + n];
              float& y = ds[j][half * 2 + n];
              const bool seen = (whole || (other >= range[half].low && other < range[half].high)) && l != -INFINITY;
              x = seen ? exp2_approx((x * p.scale - l) * log2_e) : 0.0f;
              y = x * (y - d) * p.scale;
            }
        }
      }
      if constexpr (want_first) add_product<T, W, BN>(sum_first, ds, shared.first);
      if constexpr (want_second) add_product<T, W, BN>(sum_second, s, shared.second);
      __syncthreads();
    }
  }
  cp_async_wait<0>();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t own = own0 + warp * 16 + lane / 4 + half * 8;
    if (own >= kept_rows) continue;
    if constexpr (want_first) {
      T* row = by_query ? t.dq + at.b * p.q.batch + at.h * p.q.head + (e.q0 + own) * p.q.row
                        : t.dk + at.b * p.dk.batch + at.h * p.dk.head + (e.k0 + own) * p.dk.row;
      store_row<T, W>(row, D, sum_first, half, 1.0f);
    }
    if constexpr (want_second)
      store_row<T, W>(t.dv + at.b * p.dv.batch + at.h * p.dv.head + (e.k0 + own) * p.dv.row, E, sum_second, half, 1.0f);
  }
}

// Host: launches for the smallest width that holds both head sizes.

inline int64_t mma_blocks(int64_t rows) { return ceil_div(rows, mma_rows); }

template <class T>
bool whole_vectors(const Problem<float>& p, const Tensors<T>& t) {
  return p.D % 8 == 0 && p.E % 8 == 0 && is_aligned(t.q, t.k, t.v, t.dy);
}

template <class T, int W, int BN, bool decode>
void launch_fwd_mma(const Problem<float>& p, const Tensors<T>& t, const Parts& parts, cudaStream_t stream) {
  const int64_t blocks = mma_blocks(decode ? p.G * p.L : p.L), heads = decode ? p.H / p.G : p.H;
  launch(attention_fwd_mma_kernel<T, W, BN, decode>,
         {.grid = static_cast<unsigned>(p.B * heads * blocks * parts.count),
          .block = mma_threads,
          .smem = sizeof(ForwardStorage<T, W, BN>),
          .stream = stream},
         p, t, blocks, whole_vectors(p, t), parts);
}

template <class T, int W, int BN, bool by_query, bool want_first, bool want_second>
void launch_bwd_mma(const Problem<float>& p, const Tensors<T>& t, cudaStream_t stream) {
  const int64_t blocks = mma_blocks(by_query ? p.L : p.S), heads = by_query ? p.H : p.H / p.G;
  launch(attention_bwd_mma_kernel<T, W, BN, by_query, want_first, want_second>,
         {.grid = static_cast<unsigned>(p.B * heads * blocks),
          .block = mma_threads,
          .smem = sizeof(BackwardStorage<T, W, BN>),
          .stream = stream},
         p, t, blocks, whole_vectors(p, t));
}

template <bool decode = false, class T>
void forward_mma(const Problem<float>& p, const Tensors<T>& t, cudaStream_t stream, const Parts& parts = {1}) {
  const int64_t width = p.D > p.E ? p.D : p.E;
  if (width <= 64)
    launch_fwd_mma<T, 64, 64, decode>(p, t, parts, stream);
  else if (width <= 128)
    launch_fwd_mma<T, 128, 64, decode>(p, t, parts, stream);
  else
    launch_fwd_mma<T, 256, 32, decode>(p, t, parts, stream);
}

// Tiles as large as the registers allow without spilling.
template <class T>
void backward_mma(const Problem<float>& p, const Tensors<T>& t, cudaStream_t stream) {
  const int64_t width = p.D > p.E ? p.D : p.E;
  if (width <= 64) {
    launch_bwd_mma<T, 64, 64, true, true, false>(p, t, stream);
    launch_bwd_mma<T, 64, 64, false, true, true>(p, t, stream);
  } else if (width <= 128) {
    launch_bwd_mma<T, 128, 32, true, true, false>(p, t, stream);
    launch_bwd_mma<T, 128, 16, false, true, true>(p, t, stream);
  } else {  // both sums of 256 columns would not fit the registers
    launch_bwd_mma<T, 256, 16, true, true, false>(p, t, stream);
    launch_bwd_mma<T, 256, 16, false, true, false>(p, t, stream);
    launch_bwd_mma<T, 256, 16, false, false, true>(p, t, stream);
  }
}

}  // namespace pyops::attention
