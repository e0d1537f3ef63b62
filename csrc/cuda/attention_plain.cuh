// attention in fp32 and fp64 on the CUDA cores: exact products, the plain form of the algorithm.
//
// mapping  16 x 16 threads own R rows; thread (y, x) holds scores of rows y + 16m and columns x + 16n of an R x R tile,
//          and columns x + 16c of its rows of the result. A row's 16 threads are neighbours in a warp.
// backward as in attention_mma.cuh: the block owns queries (dq) or keys (dk, dv); no atomics: deterministic
#pragma once

#include "cuda/attention.cuh"

namespace pyops::attention {

inline constexpr int plain_threads = 256;

template <class T, int R, int W>
struct PlainForward {
  T q[R][W + 1], k[R][W + 1], v[R][W + 1], p[R][R + 1];
};
template <class T, int R, int W>
struct PlainBackward {
  T own_first[R][W + 1], own_second[R][W + 1], first[R][W + 1], second[R][W + 1];
  T p[R][R + 1], ds[R][R + 1], lse[R], delta[R];
};

template <class T, int R, int W>
PYOPS_DEVICE void load_plain(T (&tile)[R][W + 1], const T* from, int64_t stride, int64_t r0, int64_t rows, int width) {
  for (int i = threadIdx.x; i < R * W; i += plain_threads) {
    const int r = i / W, c = i % W;
    if (c < width) tile[r][c] = r0 + r < rows ? from[(r0 + r) * stride + c] : T(0);
  }
}

template <class T, int R, int W>
PYOPS_DEVICE void plain_scores(T (&s)[R / 16][R / 16], const T (&a)[R][W + 1], const T (&b)[R][W + 1], int width) {
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;
  for (int d = 0; d < width; ++d)
#pragma unroll
    for (int m = 0; m < R / 16; ++m)
#pragma unroll
      for (int n = 0; n < R / 16; ++n) s[m][n] += a[y + 16 * m][d] * b[x + 16 * n][d];
}

template <class T, int R, int W>
PYOPS_DEVICE void plain_product(T (&sum)[R / 16][W / 16], const T (&p)[R][R + 1], const T (&b)[R][W + 1], int width) {
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;
  for (int n = 0; n < R; ++n)
#pragma unroll
    for (int c = 0; c < W / 16; ++c)
      if (x + 16 * c < width)
#pragma unroll
        for (int m = 0; m < R / 16; ++m) sum[m][c] += p[y + 16 * m][n] * b[n][x + 16 * c];
}

template <class T, int R, int W>
PYOPS_DEVICE void plain_store(T* row, const T (&sum)[W / 16], int width, T factor) {
  const int x = threadIdx.x % 16;
#pragma unroll
  for (int c = 0; c < W / 16; ++c)
    if (x + 16 * c < width) row[x + 16 * c] = sum[c] * factor;
}

template <class T, int R, int W>
__global__ void __launch_bounds__(plain_threads)
    attention_fwd_plain_kernel(Problem<T> p, Tensors<T> t, int64_t blocks) {
  auto& shared = shared_storage<PlainForward<T, R, W>>();
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;
  const Place at = place_of(static_cast<int64_t>(gridDim.x) - 1 - blockIdx.x, p.H, blocks);
  const Example e = example(p, at.b);
  const int64_t i0 = at.block * R;
  if (i0 >= e.L) return;
  const T* k = t.k + at.b * p.k.batch + at.h / p.G * p.k.head + e.k0 * p.k.row;
  const T* v = t.v + at.b * p.v.batch + at.h / p.G * p.v.head + e.k0 * p.v.row;
  const int D = static_cast<int>(p.D), E = static_cast<int>(p.E);
  const Range all = range_of<true>(e, i0, i0 + R < e.L ? i0 + R : e.L);
  const bool extras = p.has_extras();
  T sum[R / 16][W / 16] = {}, most[R / 16], total[R / 16] = {};
  for (int m = 0; m < R / 16; ++m) most[m] = -T(INFINITY);
  load_plain<T, R, W>(shared.q, t.q + at.b * p.q.batch + at.h * p.q.head + e.q0 * p.q.row, p.q.row, i0, e.L, D);

  for (int j0 = all.low / R * R; j0 < all.high; j0 += R) {
    if (!tile_shows<T, true>(p, at.b, at.h, i0, i0 + R < e.L ? i0 + R : e.L, j0, all.high, R)) continue;
    load_plain<T, R, W>(shared.k, k, p.k.row, j0, e.S, D);
    load_plain<T, R, W>(shared.v, v, p.v.row, j0, e.S, E);
    __syncthreads();
    T s[R / 16][R / 16] = {};
    plain_scores<T, R, W>(s, shared.q, shared.k, D);
#pragma unroll
    for (int m = 0; m < R / 16; ++m) {
      const int64_t i = i0 + y + 16 * m;
      const Range range = range_of<true>(e, i);
      T top = most[m];
#pragma unroll
      for (int n = 0; n < R / 16; ++n) {
        const int key = j0 + x + 16 * n;
        T slope;
        const bool seen = key >= range.low && key < range.high;
        s[m][n] = !seen    ? -T(INFINITY)
                  : extras ? extra_score<T>(p, e, at.b, at.h, i, key, s[m][n], slope)
                           : s[m][n] * p.scale;
        top = s[m][n] > top ? s[m][n] : top;
      }
      top = warp_max<16>(top);
      const T base = top == -T(INFINITY) ? T(0) : top, factor = exp(most[m] - base);
      T part = 0;
#pragma unroll
      for (int n = 0; n < R / 16; ++n) {
        T weight = exp(s[m][n] - base);
        part += weight;
        if (p.random != nullptr && weight != T(0)) weight *= kept(p, at.b, at.h, i, j0 + x + 16 * n);
        shared.p[y + 16 * m][x + 16 * n] = weight;
      }
      total[m] = total[m] * factor + part;
      most[m] = top;
#pragma unroll
      for (int c = 0; c < W / 16; ++c) sum[m][c] *= factor;
    }
    __syncthreads();
    plain_product<T, R, W>(sum, shared.p, shared.v, E);
    __syncthreads();
  }
#pragma unroll
  for (int m = 0; m < R / 16; ++m) {
    const T all_lanes = warp_sum<16>(total[m]);
    const int64_t i = i0 + y + 16 * m;
    if (i >= e.L) continue;
    const bool none = most[m] == -T(INFINITY);
    plain_store<T, R, W>(t.o + at.b * p.o.batch + at.h * p.o.head + (e.q0 + i) * p.o.row, sum[m], E,
                         none ? T(0) : T(1) / all_lanes);
    if (x == 0)
      t.lse[at.b * p.lse_batch + at.h * p.lse_head + e.q0 + i] = none ? -T(INFINITY) : most[m] + log(all_lanes);
  }
}

template <class T, int R, int W, bool by_query>
__global__ void __launch_bounds__(plain_threads)
    attention_bwd_plain_kernel(Problem<T> p, Tensors<T> t, int64_t blocks) {
  auto& shared = shared_storage<PlainBackward<T, R, W>>();
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;
  const int64_t group = by_query ? 1 : p.G, heads = p.H / group;
  const Place at = place_of(by_query ? static_cast<int64_t>(gridDim.x) - 1 - blockIdx.x : blockIdx.x, heads, blocks);
  const Example e = example(p, at.b);
  const int64_t own0 = at.block * R, own_rows = by_query ? e.L : e.S;
  const int64_t kept_rows = by_query ? e.L : (p.cu_k != nullptr ? e.S : p.S);
  if (own0 >= kept_rows) return;
  const int64_t key_head = by_query ? at.h / p.G : at.h;
  const T* k = t.k + at.b * p.k.batch + key_head * p.k.head + e.k0 * p.k.row;
  const T* v = t.v + at.b * p.v.batch + key_head * p.v.head + e.k0 * p.v.row;
  const int D = static_cast<int>(p.D), E = static_cast<int>(p.E);
  const Range all = range_of<by_query>(e, own0, own0 + R < own_rows ? own0 + R : own_rows);
  const bool extras = p.has_extras();
  T sum_first[R / 16][W / 16] = {}, sum_second[by_query ? 1 : R / 16][by_query ? 1 : W / 16] = {};
  if (!by_query) {
    load_plain<T, R, W>(shared.own_first, k, p.k.row, own0, e.S, D);
    load_plain<T, R, W>(shared.own_second, v, p.v.row, own0, e.S, E);
  }
  for (int64_t g = 0; g < group; ++g) {
    const int64_t h = by_query ? at.h : at.h * group + g;
    const T* q = t.q + at.b * p.q.batch + h * p.q.head + e.q0 * p.q.row;
    const T* dy = t.dy + at.b * p.o.batch + h * p.o.head + e.q0 * p.o.row;
    const T* lse = t.lse_in + at.b * p.lse_batch + h * p.lse_head + e.q0;
    const T* delta = t.delta + at.b * p.lse_batch + h * p.lse_head + e.q0;
    if (by_query) {
      load_plain<T, R, W>(shared.own_first, q, p.q.row, own0, e.L, D);
      load_plain<T, R, W>(shared.own_second, dy, p.o.row, own0, e.L, E);
    }
    for (int other0 = all.low / R * R; other0 < all.high; other0 += R) {
      const int64_t end = own0 + R < own_rows ? own0 + R : own_rows;
      if (!tile_shows<T, by_query>(p, at.b, h, own0, end, other0, all.high, R)) continue;
      load_plain<T, R, W>(shared.first, by_query ? k : q, by_query ? p.k.row : p.q.row, other0, by_query ? e.S : e.L,
                          D);
      load_plain<T, R, W>(shared.second, by_query ? v : dy, by_query ? p.v.row : p.o.row, other0, by_query ? e.S : e.L,
                          E);
      const int64_t query0 = by_query ? own0 : other0;
      if (threadIdx.x < R) {
        const bool there = query0 + threadIdx.x < e.L;
        shared.lse[threadIdx.x] = there ? lse[query0 + threadIdx.x] : T(0);
        shared.delta[threadIdx.x] = there ? delta[query0 + threadIdx.x] : T(0);
      }
      __syncthreads();
      T s[R / 16][R / 16] = {}, ds[R / 16][R / 16] = {};
      plain_scores<T, R, W>(s, shared.own_first, shared.first, D);
      plain_scores<T, R, W>(ds, shared.own_second, shared.second, E);
#pragma unroll
      for (int m = 0; m < R / 16; ++m) {
        const int64_t own = own0 + y + 16 * m;
        const Range range = range_of<by_query>(e, own);
#pragma unroll
        for (int n = 0; n < R / 16; ++n) {
          const int other = other0 + x + 16 * n;
          const int64_t i = by_query ? own : other, key = by_query ? other : own;
          const T l = shared.lse[i - query0], d = shared.delta[i - query0];
          T weight = 0, gradient = 0;
          if (other >= range.low && other < range.high && l != -T(INFINITY)) {
            T slope = 1, factor = 1;
            const T score = extras ? extra_score<T>(p, e, at.b, h, i, key, s[m][n], slope) : s[m][n] * p.scale;
            weight = exp(score - l);
            if (p.random != nullptr) factor = kept(p, at.b, h, i, key);
            gradient = weight * (ds[m][n] * factor - d) * (p.scale * slope);
            weight *= factor;
          }
          shared.p[y + 16 * m][x + 16 * n] = weight;
          shared.ds[y + 16 * m][x + 16 * n] = gradient;
        }
      }
      __syncthreads();
      plain_product<T, R, W>(sum_first, shared.ds, shared.first, D);
      if constexpr (!by_query) plain_product<T, R, W>(sum_second, shared.p, shared.second, E);
      __syncthreads();
    }
  }
#pragma unroll
  for (int m = 0; m < R / 16; ++m) {
    const int64_t own = own0 + y + 16 * m;
    if (own >= kept_rows) continue;
    if constexpr (by_query) {
      plain_store<T, R, W>(t.dq + at.b * p.q.batch + at.h * p.q.head + (e.q0 + own) * p.q.row, sum_first[m], D, T(1));
    } else {
      plain_store<T, R, W>(t.dk + at.b * p.dk.batch + at.h * p.dk.head + (e.k0 + own) * p.dk.row, sum_first[m], D,
                           T(1));
      plain_store<T, R, W>(t.dv + at.b * p.dv.batch + at.h * p.dv.head + (e.k0 + own) * p.dv.row, sum_second[m], E,
                           T(1));
    }
  }
}

// Host

template <class T, int R, int W>
void launch_fwd_plain(const Problem<T>& p, const Tensors<T>& t, cudaStream_t stream) {
  const int64_t blocks = ceil_div(p.L, R);
  launch(attention_fwd_plain_kernel<T, R, W>,
         {.grid = static_cast<unsigned>(p.B * p.H * blocks),
          .block = plain_threads,
          .smem = sizeof(PlainForward<T, R, W>),
          .stream = stream},
         p, t, blocks);
}
template <class T, int R, int W, bool by_query>
void launch_bwd_plain(const Problem<T>& p, const Tensors<T>& t, cudaStream_t stream) {
  const int64_t blocks = ceil_div(by_query ? p.L : p.S, R), heads = by_query ? p.H : p.H / p.G;
  launch(attention_bwd_plain_kernel<T, R, W, by_query>,
         {.grid = static_cast<unsigned>(p.B * heads * blocks),
          .block = plain_threads,
          .smem = sizeof(PlainBackward<T, R, W>),
          .stream = stream},
         p, t, blocks);
}

// Rows of a block: what the shared memory of every GPU from sm_80 on holds.
template <class T, int W>
inline constexpr int plain_rows = sizeof(T) * W <= 512 ? 32 : 16;

template <class T>
void forward_plain(const Problem<T>& p, const Tensors<T>& t, cudaStream_t stream) {
  if (p.D <= 64 && p.E <= 64)
    launch_fwd_plain<T, plain_rows<T, 64>, 64>(p, t, stream);
  else
    launch_fwd_plain<T, plain_rows<T, 256>, 256>(p, t, stream);
}

template <class T>
void backward_plain(const Problem<T>& p, const Tensors<T>& t, cudaStream_t stream) {
  if (p.D <= 64 && p.E <= 64) {
    launch_bwd_plain<T, plain_rows<T, 64>, 64, true>(p, t, stream);
    launch_bwd_plain<T, plain_rows<T, 64>, 64, false>(p, t, stream);
  } else {
    launch_bwd_plain<T, plain_rows<T, 256>, 256, true>(p, t, stream);
    launch_bwd_plain<T, plain_rows<T, 256>, 256, false>(p, t, stream);
  }
}

}  // namespace pyops::attention
