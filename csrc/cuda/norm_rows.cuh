// Row normalisation on CUDA, shared by layer_norm (Centered) and rms_norm (not Centered: mean 0, no bias).
//
// forward   rows   a row lives in the registers of `width` threads (2..32 lanes, or one block): x is read once.
//           cluster rows too long for 512 threads (64 KB), or at most 32 rows of 32 KB or more: 2..8 blocks hold a row
//                  in their registers, up to 512 KB, and their sums meet in distributed shared memory: x is read once.
//           split  the same rows before sm_90, longer ones and ragged ones (over 8192 values): one kernel for the
//           moments
//                  of slices, one to combine them, one to normalise, last slices first (still in L2).
// backward  rows   the same mapping; a block strides over rows and keeps dw, db of its columns in registers, then
//                  writes one line of [blocks, N] partials which sum_columns adds up: x and dy are read once.
//           cluster the same, a row over 2..8 blocks, up to 65536 values.
//           split  sums of slices, combine, then threads own columns for dx and the partials of dw, db.
// The path depends on M, N, the dtype and the compute capability; the vector width on the alignment of the pointers.
#pragma once

#include "cuda/norm.cuh"

namespace pyops::norm {

// kernels

template <class A>
PYOPS_DEVICE A group_sum(A value, int width, PairShared<A>& s) {
  return group_reduce(Sum<A>{value}, width, reinterpret_cast<Sum<A>*>(s.reduce)).value;
}

template <class A, int V, class W>
PYOPS_DEVICE Vec<A, V> load_or(const W* __restrict__ p, int64_t i, A otherwise) {
  Vec<A, V> out;
  if (p != nullptr) {
    const Vec<W, V> raw = load_vec_readonly<V>(p + i);
#pragma unroll
    for (int j = 0; j < V; ++j) out[j] = convert<A>(raw[j]);
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j) out[j] = otherwise;
  }
  return out;
}

// Adds up over the blocks of a cluster, in the order of their ranks; every thread gets the sum. `turn` counts the
// reductions of the kernel: a block that is one ahead of another writes the other slot.
template <class V>
PYOPS_DEVICE V cluster_reduce(V value, V (&slots)[2], int turn) {
  V& slot = slots[turn % 2];
  if (threadIdx.x == 0) slot = value;
  cluster_sync();
  V total = *cluster_map(&slot, 0);
  for (unsigned r = 1; r < cluster_size(); ++r) total = V::combine(total, *cluster_map(&slot, r));
  return total;
}

// Which part of a row a thread holds: vectors `lane`, `lane + width`, ... of row `first`, `first + step`, ...
struct RowShare {
  int lane, width, slot, rows;
  int64_t first, step;
};
template <bool Clustered>
PYOPS_DEVICE RowShare share_of_row(int width) {
  if constexpr (Clustered) {
    const int blocks = cluster_size(), rank = cluster_rank();
    return {
        rank * width + static_cast<int>(threadIdx.x), blocks * width, 0, 1, blockIdx.x / blocks, gridDim.x / blocks};
  } else {
    const int rows = blockDim.x / width;
    return {static_cast<int>(threadIdx.x % width),   width,
            static_cast<int>(threadIdx.x / width),   rows,
            static_cast<int64_t>(blockIdx.x) * rows, static_cast<int64_t>(gridDim.x) * rows};
  }
}

template <class A>
struct RowFwdShared {
  PairShared<A> row;
  Sum<A> meeting[2];
  Pair<A> pairs[2];
};

// A bound of 1024 is a limit of 64 registers: without it scalar kernels spend theirs on loading the weights early.
template <int V, int Items>
inline constexpr int fwd_threads = V == 1 && Items <= 8 ? 1024 : 512;

template <bool Centered, bool Clustered, class T, class W, int V, int Items>
__global__ void __launch_bounds__(fwd_threads<V, Items>, 1)
    norm_rows_fwd_kernel(const T* __restrict__ x, const W* __restrict__ w, const W* __restrict__ b, T* __restrict__ y,
                         accumulate_t<T>* __restrict__ mean_out, accumulate_t<T>* __restrict__ rstd_out, int64_t M,
                         int N, accumulate_t<T> eps, int threads) {
  using A = accumulate_t<T>;
  auto& s = shared_storage<RowFwdShared<A>>();
  const RowShare share = share_of_row<Clustered>(threads);
  const int lane = share.lane, width = share.width;
  [[maybe_unused]] int turn = 0, pair_turn = 0;
  const auto sum_of_row = [&](A value) {
    const A sum = group_sum(value, threads, s.row);
    if constexpr (Clustered) return cluster_reduce(Sum<A>{sum}, s.meeting, turn++).value;
    return sum;
  };
  const A inverse = A(1) / static_cast<A>(N > 0 ? N : 1);
  for (int64_t first = share.first; first < M; first += share.step) {
    const int64_t m = first + share.slot;
    const int limit = m < M ? N : 0;  // threads past the last row still take part in the shuffles
    const T* row = x + m * N;
    Vec<T, V> v[Items];
#pragma unroll
    for (int i = 0; i < Items; ++i) {
      const int n = (i * width + lane) * V;
      if (n < limit) v[i] = load_vec_streaming<V>(row + n);
    }
    A mean = 0;
    if constexpr (Centered) {
      A sum = 0;
#pragma unroll
      for (int i = 0; i < Items; ++i) {
        if ((i * width + lane) * V < limit) {
          const Vec<A, V> a = widen(v[i]);
#pragma unroll
          for (int j = 0; j < V; ++j) sum += a[j];
        }
      }
      mean = sum_of_row(sum) * inverse;
    }
    // Where |mean| >> std, mean has lost digits that the deviation needs: `rest`, the mean of what deviates from it.
    Pair<A> sums{};  // of deviations from mean, and of their squares
#pragma unroll
    for (int i = 0; i < Items; ++i) {
      if ((i * width + lane) * V < limit) {
        const Vec<A, V> a = widen(v[i]);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const A d = a[j] - mean;
          if constexpr (Centered) sums.first += d;
          sums.second += d * d;
        }
      }
    }
    if constexpr (Centered) {
      sums = group_reduce(sums, threads, s.row.reduce);
      if constexpr (Clustered) sums = cluster_reduce(sums, s.pairs, pair_turn++);
    } else {
      sums.second = sum_of_row(sums.second);
    }
    const A rest = sums.first * inverse, variance = (sums.second - sums.first * rest) * inverse;
    const A rstd = inverse_root((variance < A(0) ? A(0) : variance) + eps);
    if (lane == 0 && m < M) {
      if constexpr (Centered) mean_out[m] = mean + rest;
      rstd_out[m] = rstd;
    }
#pragma unroll
    for (int i = 0; i < Items; ++i) {
      const int n = (i * width + lane) * V;
      if (n < limit) {
        const Vec<A, V> scale = load_or<A, V>(w, n, A(1)), shift = load_or<A, V>(b, n, A(0));
        const Vec<A, V> a = widen(v[i]);
        Vec<T, V> out;
#pragma unroll
        for (int j = 0; j < V; ++j) out[j] = from_acc<T>(((a[j] - mean) - rest) * rstd * scale[j] + shift[j]);
        store_vec_streaming(y + m * N + n, out);
      }
    }
  }
  if constexpr (Clustered) cluster_sync();  // no block leaves while others read its sums
}

// Blocks of the split path: one vector per thread and step, from the last to the first.
template <bool Centered, class T, class W, int V>
__global__ void __launch_bounds__(256)
    norm_rows_apply_kernel(const T* __restrict__ x, const W* __restrict__ w, const W* __restrict__ b,
                           const accumulate_t<T>* __restrict__ mean_in, const accumulate_t<T>* __restrict__ rstd_in,
                           T* __restrict__ y, int64_t N, int64_t row_blocks) {
  using A = accumulate_t<T>;
  constexpr int unroll = 4;
  const int64_t block = gridDim.x - 1 - blockIdx.x, m = block / row_blocks;
  const int64_t begin = ((block - m * row_blocks) * (256 * unroll) + threadIdx.x) * V;
  const A mean = Centered ? mean_in[m] : A(0), rstd = rstd_in[m];
  Vec<T, V> v[unroll];
#pragma unroll
  for (int u = 0; u < unroll; ++u) {
    const int64_t n = begin + u * (256 * V);
    if (n < N) v[u] = load_vec_streaming<V>(x + m * N + n);
  }
#pragma unroll
  for (int u = 0; u < unroll; ++u) {
    const int64_t n = begin + u * (256 * V);
    if (n >= N) continue;
    const Vec<A, V> scale = load_or<A, V>(w, n, A(1)), shift = load_or<A, V>(b, n, A(0));
    const Vec<A, V> a = widen(v[u]);
    Vec<T, V> out;
#pragma unroll
    for (int j = 0; j < V; ++j) out[j] = from_acc<T>((a[j] - mean) * rstd * scale[j] + shift[j]);
    store_vec_streaming(y + m * N + n, out);
  }
}

// mean and rstd of row m from the moments of its slices; one warp per row.
template <bool Centered, class A>
__global__ void __launch_bounds__(128)
    norm_rows_combine_kernel(const A* __restrict__ part_mean, const A* __restrict__ part_square,
                             const A* __restrict__ origin, A* __restrict__ mean_out, A* __restrict__ rstd_out,
                             int64_t M, int64_t N, int64_t slice, int64_t count, A eps) {
  const int lane = threadIdx.x % 32;
  const int64_t m = static_cast<int64_t>(blockIdx.x) * 4 + threadIdx.x / 32;
  Moments<A> total{};
  for (int64_t k = lane; k < count && m < M; k += 32) {
    const int64_t size = N - k * slice < slice ? N - k * slice : slice;
    total = Moments<A>::combine(total, {static_cast<A>(size), part_mean[m * count + k], part_square[m * count + k]});
  }
  total = group_reduce(total, 32, static_cast<Moments<A>*>(nullptr));
  if (lane == 0 && m < M) {
    if constexpr (Centered) mean_out[m] = origin[m] + total.mean;
    rstd_out[m] = inverse_root(total.square / static_cast<A>(N > 0 ? N : 1) + eps);
  }
}

template <class A, int V>
struct RowBwdShared {
  PairShared<A> row;
  Pair<A> meeting[2];
  A columns[256 * V];
};

// dw and db of V * Items columns stay in registers; beyond 16 of them a thread needs more than 512 threads leave it.
template <int V, int Items>
inline constexpr int bwd_threads = V * Items > 16 ? 256 : 512;

template <bool Centered, bool Clustered, class T, class W, int V, int Items>
__global__ void __launch_bounds__(bwd_threads<V, Items>, 1)
    norm_rows_bwd_kernel(const T* __restrict__ dy, const T* __restrict__ x, const W* __restrict__ w,
                         const accumulate_t<T>* __restrict__ mean_in, const accumulate_t<T>* __restrict__ rstd_in,
                         T* __restrict__ dx, accumulate_t<T>* __restrict__ part_dw,
                         accumulate_t<T>* __restrict__ part_db, int64_t M, int N, int threads) {
  using A = accumulate_t<T>;
  auto& s = shared_storage<RowBwdShared<A, V>>();
  const RowShare share = share_of_row<Clustered>(threads);
  const int lane = share.lane, width = share.width, rows = share.rows;
  int turn = 0;
  const A inverse = A(1) / static_cast<A>(N > 0 ? N : 1);
  A dw[Items][V] = {}, db[Items][V] = {};
  for (int64_t first = share.first; first < M; first += share.step) {
    const int64_t m = first + share.slot;
    const int limit = m < M ? N : 0;
    Vec<T, V> g[Items], v[Items];
#pragma unroll
    for (int i = 0; i < Items; ++i) {
      const int n = (i * width + lane) * V;
      if (n < limit) {
        g[i] = load_vec_streaming<V>(dy + m * N + n);
        v[i] = load_vec_streaming<V>(x + m * N + n);
      }
    }
    const A mean = Centered && m < M ? mean_in[m] : A(0), rstd = m < M ? rstd_in[m] : A(0);
    Pair<A> sums{};
#pragma unroll
    for (int i = 0; i < Items; ++i) {
      const int n = (i * width + lane) * V;
      if (n < limit) {
        const Vec<A, V> scale = load_or<A, V>(w, n, A(1));
        const Vec<A, V> a = widen(v[i]), e = widen(g[i]);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const A d = e[j], normed = (a[j] - mean) * rstd, scaled = d * scale[j];
          if constexpr (Centered) {
            sums.first += scaled;
            db[i][j] += d;
          }
          sums.second += scaled * normed;
          dw[i][j] += d * normed;
        }
      }
    }
    if (dx == nullptr) continue;
    if constexpr (Centered)
      sums = group_reduce(sums, threads, s.row.reduce);
    else
      sums.second = group_sum(sums.second, threads, s.row);
    if constexpr (Clustered) sums = cluster_reduce(sums, s.meeting, turn++);
    const A mean_g = sums.first * inverse, mean_gx = sums.second * inverse;
#pragma unroll
    for (int i = 0; i < Items; ++i) {
      const int n = (i * width + lane) * V;
      if (n < limit) {
        const Vec<A, V> scale = load_or<A, V>(w, n, A(1));
        const Vec<A, V> a = widen(v[i]), e = widen(g[i]);
        Vec<T, V> out;
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const A normed = (a[j] - mean) * rstd;
          out[j] = from_acc<T>(rstd * (e[j] * scale[j] - mean_g - normed * mean_gx));
        }
        store_vec_streaming(dx + m * N + n, out);
      }
    }
  }
  if constexpr (Clustered) cluster_sync();  // no block leaves while others read its sums
  if (part_dw == nullptr) return;
  const int64_t line = share.first / rows * N;
  if (Clustered || rows == 1) {
#pragma unroll
    for (int i = 0; i < Items; ++i) {
      const int n = (i * width + lane) * V;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        if (n < N) {
          part_dw[line + n + j] = dw[i][j];
          if constexpr (Centered) part_db[line + n + j] = db[i][j];
        }
      }
    }
    return;
  }
  // Several rows per block: their slots meet in shared memory, one item at a time, in slot order.
#pragma unroll
  for (int half = 0; half < (Centered ? 2 : 1); ++half) {
    A* part = half == 0 ? part_dw : part_db;
#pragma unroll
    for (int i = 0; i < Items; ++i) {
      __syncthreads();
#pragma unroll
      for (int j = 0; j < V; ++j) s.columns[(share.slot * V + j) * width + lane] = half == 0 ? dw[i][j] : db[i][j];
      __syncthreads();
      for (int k = threadIdx.x; k < width * V; k += blockDim.x) {
        const int n = (i * width + k % width) * V + k / width;
        A sum = 0;
        for (int q = 0; q < rows; ++q) sum += s.columns[q * V * width + k];
        if (n < N) part[line + n] = sum;
      }
    }
  }
}

// sum of g and of g * xhat over every slice of every row.
template <bool Centered, class T, class W, int V>
__global__ void __launch_bounds__(256, 2)
    norm_rows_sums_kernel(const T* __restrict__ dy, const T* __restrict__ x, const W* __restrict__ w,
                          const accumulate_t<T>* __restrict__ mean_in, const accumulate_t<T>* __restrict__ rstd_in,
                          accumulate_t<T>* __restrict__ sum_g, accumulate_t<T>* __restrict__ sum_gx, Runs r) {
  using A = accumulate_t<T>;
  auto& s = shared_storage<PairShared<A>>();
  const int64_t unit = blockIdx.x, m = r.by_count.divide(unit);
  const A mean = Centered ? mean_in[m] : A(0), rstd = rstd_in[m];
  Pair<A> sums{};
  for_slice<V>(r, SliceWalk(r, unit), dy, threadIdx.x, 256, [&](const Vec<T, V>& g, int64_t address) {
    const Vec<T, V> v = load_vec<V>(x + address);
    const Vec<A, V> scale = load_or<A, V>(w, address - m * r.outer_stride, A(1));
    const Vec<A, V> a = widen(v), e = widen(g);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const A scaled = e[j] * scale[j];
      sums.first += scaled;
      sums.second += scaled * (a[j] - mean);
    }
  });
  sums = group_reduce(sums, 256, s.reduce);
  if (threadIdx.x == 0) {
    sum_g[unit] = Centered ? sums.first : A(0);
    sum_gx[unit] = sums.second * rstd;
  }
}

// Means over rows, [M] each, from the sums of slices; one warp per row.
template <class A>
__global__ void __launch_bounds__(128)
    norm_rows_means_kernel(const A* __restrict__ sum_g, const A* __restrict__ sum_gx, A* __restrict__ mean_g,
                           A* __restrict__ mean_gx, int64_t M, int64_t N, int64_t count) {
  const int lane = threadIdx.x % 32;
  const int64_t m = static_cast<int64_t>(blockIdx.x) * 4 + threadIdx.x / 32;
  Pair<A> sums{};
  for (int64_t k = lane; k < count && m < M; k += 32) {
    sums.first += sum_g[m * count + k];
    sums.second += sum_gx[m * count + k];
  }
  sums = group_reduce(sums, 32, static_cast<Pair<A>*>(nullptr));
  if (lane == 0 && m < M) {
    mean_g[m] = sums.first / static_cast<A>(N);
    mean_gx[m] = sums.second / static_cast<A>(N);
  }
}

// A thread owns V columns over `lines` rows. Partials are [row blocks, N].
template <bool Centered, class T, class W, int V>
__global__ void __launch_bounds__(256)
    norm_columns_bwd_kernel(const T* __restrict__ dy, const T* __restrict__ x, const W* __restrict__ w,
                            const accumulate_t<T>* __restrict__ mean_in, const accumulate_t<T>* __restrict__ rstd_in,
                            const accumulate_t<T>* __restrict__ mean_g_in,
                            const accumulate_t<T>* __restrict__ mean_gx_in, T* __restrict__ dx,
                            accumulate_t<T>* __restrict__ part_dw, accumulate_t<T>* __restrict__ part_db, int64_t M,
                            int64_t N, int64_t lines, int64_t tiles) {
  using A = accumulate_t<T>;
  const int64_t row_block = blockIdx.x / tiles;
  const int64_t n = ((blockIdx.x - row_block * tiles) * 256 + threadIdx.x) * V;
  if (n >= N) return;
  const int64_t begin = row_block * lines, end = begin + lines < M ? begin + lines : M;
  const Vec<A, V> scale = load_or<A, V>(w, n, A(1));
  A dw[V] = {}, db[V] = {};
#pragma unroll 4
  for (int64_t m = begin; m < end; ++m) {
    const Vec<T, V> g = load_vec_streaming<V>(dy + m * N + n), v = load_vec_streaming<V>(x + m * N + n);
    const A mean = Centered ? mean_in[m] : A(0), rstd = rstd_in[m];
    A mean_g = 0, mean_gx = 0;
    if (dx != nullptr) {
      if constexpr (Centered) mean_g = mean_g_in[m];
      mean_gx = mean_gx_in[m];
    }
    const Vec<A, V> a = widen(v), e = widen(g);
    Vec<T, V> out;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const A d = e[j], normed = (a[j] - mean) * rstd;
      dw[j] += d * normed;
      if constexpr (Centered) db[j] += d;
      out[j] = from_acc<T>(rstd * (d * scale[j] - mean_g - normed * mean_gx));
    }
    if (dx != nullptr) store_vec_streaming(dx + m * N + n, out);
  }
  if (part_dw == nullptr) return;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    part_dw[row_block * N + n + j] = dw[j];
    if constexpr (Centered) part_db[row_block * N + n + j] = db[j];
  }
}

// launch

struct RowPlan {
  bool split = false;
  int items = 1;   // index into the item counts of the kernel
  int width = 32;  // threads per row
};

// counts: vectors per thread the kernel is compiled for, ascending; the first serves rows of up to 32 vectors.
// threads: the largest block for each count.
inline RowPlan plan_rows(int64_t vectors, const int (&counts)[3], const int (&threads)[3]) {
  if (vectors <= 32) return {false, 0, power_of_two_from(std::max<int64_t>(1, vectors))};
  for (int i = 1; i < 3; ++i)
    if (vectors <= 32 * counts[i]) return {false, i, 32};
  for (int i = 1; i < 3; ++i)
    if (vectors <= static_cast<int64_t>(threads[i]) * counts[i])
      return {false, i, round_up_to_warps(divide_up(vectors, counts[i]))};
  return {true, 0, 0};
}

inline bool few_long_rows(int64_t M, int64_t row_bytes) { return M <= 32 && row_bytes >= 32 * 1024; }

// Blocks of the cluster that holds a row: as few as can, and as many as useful where there are few rows. 0 where a
// cluster of the portable size is too small, or too large for the row.
inline int cluster_of_row(int64_t vectors, int64_t M, int items, int threads) {
  if (compute_capability() < 90) return 0;
  int blocks = 2;
  while (blocks < 8 && (vectors > blocks * threads * items || (M * blocks < 132 && vectors >= 256 * blocks * items)))
    blocks *= 2;
  return vectors <= blocks * threads * items ? blocks : 0;
}

template <class T, int V>
inline constexpr int fwd_items[3] = {1, V > 1 ? 4 : 8, V > 1 ? 8 : 16};
template <class T, int V>
inline constexpr int bwd_items[3] = {1, V > 1 ? 2 : 4, V > 1 ? 4 : (sizeof(T) == 8 ? 8 : 16)};

// Calls f.template operator()<Items>() for counts[i].
template <const int (&Counts)[3], class F>
void with_items(int i, F&& f) {
  if (i == 0)
    f.template operator()<Counts[0]>();
  else if (i == 1)
    f.template operator()<Counts[1]>();
  else
    f.template operator()<Counts[2]>();
}

inline Runs rows_as_runs(int64_t M, int64_t N) { return Runs(M, 1, N, 0, 1, N, N); }

// Forward over [M, N]; workspace(n) hands out n values of accumulate_t<T>. b is null for rms norm, mean too.
template <bool Centered, class T, class W, class Workspace>
void rows_fwd(const T* x, const W* w, const W* b, T* y, accumulate_t<T>* mean, accumulate_t<T>* rstd, int64_t M,
              int64_t N, double eps_in, Workspace&& workspace, cudaStream_t stream) {
  using A = accumulate_t<T>;
  const A eps = static_cast<A>(eps_in);
  with_vector<T>(N % vector_width<T> == 0 && is_aligned(x, w, b, y), [&]<int V>() {
    const RowPlan plan = plan_rows(divide_up(N, V), fwd_items<T, V>, {512, 512, 512});
    if (!plan.split && !few_long_rows(M, N * static_cast<int64_t>(sizeof(T)))) {
      const int threads = std::max(plan.width, 128);
      with_items<fwd_items<T, V>>(plan.items, [&]<int Items>() {
        launch(norm_rows_fwd_kernel<Centered, false, T, W, V, Items>,
               {.grid = grid_of(divide_up(M, plan.width > 32 ? 1 : threads / plan.width)),
                .block = dim3(plan.width > 32 ? plan.width : threads),
                .smem = sizeof(RowFwdShared<A>),
                .stream = stream},
               x, w, b, y, mean, rstd, M, static_cast<int>(N), eps, plan.width);
      });
      return;
    }
    if constexpr (V > 1 && sizeof(T) < 8) {
      constexpr int items = fwd_items<T, V>[2];
      if (const int blocks = cluster_of_row(N / V, M, items, fwd_threads<V, items>)) {
        const int threads = round_up_to_warps(divide_up(N / V, blocks * items));
        launch(norm_rows_fwd_kernel<Centered, true, T, W, V, items>,
               {.grid = grid_of(std::min<int64_t>(M, 1 << 24) * blocks),
                .block = dim3(threads),
                .smem = sizeof(RowFwdShared<A>),
                .stream = stream,
                .cluster = dim3(blocks)},
               x, w, b, y, mean, rstd, M, static_cast<int>(N), eps, threads);
        return;
      }
    }
    const Runs runs = rows_as_runs(M, N);
    A* part_mean = workspace(runs.units());
    A* part_square = workspace(runs.units());
    A* origin = Centered ? workspace(M) : nullptr;
    slice_moments<Centered, T, V>(x, part_mean, part_square, origin, runs, stream);
    launch(norm_rows_combine_kernel<Centered, A>,
           {.grid = grid_of(divide_up(M, 4)), .block = dim3(128), .stream = stream}, part_mean, part_square, origin,
           mean, rstd, M, N, runs.slice, runs.count, eps);
    const int64_t row_blocks = divide_up(N, 4 * 256 * V);
    launch(norm_rows_apply_kernel<Centered, T, W, V>,
           {.grid = grid_of(M * row_blocks), .block = dim3(256), .stream = stream}, x, w, b, mean, rstd, y, N,
           row_blocks);
  });
}

// Backward; dx null where it is not needed, dw (and db) likewise.
template <bool Centered, class T, class W, class Workspace>
void rows_bwd(const T* dy, const T* x, const W* w, const accumulate_t<T>* mean, const accumulate_t<T>* rstd, T* dx,
              W* dw, W* db, bool need_dw, int64_t M, int64_t N, Workspace&& workspace, cudaStream_t stream) {
  using A = accumulate_t<T>;
  if (N == 0 || (dx == nullptr && !need_dw)) return;
  with_vector<T>(N % vector_width<T> == 0 && is_aligned(dy, x, w, dx), [&]<int V>() {
    constexpr auto& items = bwd_items<T, V>;
    const RowPlan plan = plan_rows(divide_up(N, V), items,
                                   {bwd_threads<V, items[0]>, bwd_threads<V, items[1]>, bwd_threads<V, items[2]>});
    bool split = plan.split || few_long_rows(M, N * static_cast<int64_t>(sizeof(T)));
    int cluster = 0;
    if constexpr (V > 1 && sizeof(T) < 8) {
      if (split) cluster = cluster_of_row(N / V, M, items[2], bwd_threads<V, items[2]>);
      if (cluster > 0) split = false;
    }
    const int threads = std::max(plan.width, 256), rows = plan.width > 32 ? 1 : threads / std::max(plan.width, 1);
    const int block = cluster > 0       ? round_up_to_warps(divide_up(N / V, cluster * items[2]))
                      : plan.width > 32 ? plan.width
                                        : threads;
    const int64_t tiles = divide_up(N, 256 * V);
    // Lines of partials: enough blocks to fill the machine, and at least four rows each where there are many rows.
    int64_t lines = 1, P = 0;
    if (split) {
      lines = std::max<int64_t>(1, divide_up(M, std::max<int64_t>(1, std::min(2112 / tiles, divide_up(M, 4)))));
      P = divide_up(M, lines);
    } else if (cluster > 0) {
      P = std::min<int64_t>(M, 1 << 24);
      if (need_dw) P = std::min(P, std::clamp<int64_t>(divide_up(P, 4), divide_up(132, cluster), 1056 / cluster));
    } else {
      P = divide_up(M, rows);
      if (need_dw) P = std::min(P, std::clamp<int64_t>(divide_up(P, 4), 132, 132 * std::max(1, 768 / block)));
    }
    A* part_dw = nullptr;
    A* part_db = nullptr;
    bool direct = false;
    if (need_dw) {
      if constexpr (std::is_same_v<W, A>) direct = P == 1;
      if (direct) {
        part_dw = reinterpret_cast<A*>(dw);
        part_db = reinterpret_cast<A*>(db);
      } else {
        part_dw = workspace(P * N);
        if constexpr (Centered) part_db = workspace(P * N);
      }
    }
    if (cluster > 0) {
      if constexpr (V > 1 && sizeof(T) < 8) {
        launch(norm_rows_bwd_kernel<Centered, true, T, W, V, items[2]>,
               {.grid = grid_of(P * cluster),
                .block = dim3(block),
                .smem = sizeof(RowBwdShared<A, V>),
                .stream = stream,
                .cluster = dim3(cluster)},
               dy, x, w, mean, rstd, dx, part_dw, part_db, M, static_cast<int>(N), block);
      }
    } else if (!split) {
      with_items<bwd_items<T, V>>(plan.items, [&]<int Items>() {
        launch(norm_rows_bwd_kernel<Centered, false, T, W, V, Items>,
               {.grid = grid_of(P), .block = dim3(block), .smem = sizeof(RowBwdShared<A, V>), .stream = stream}, dy, x,
               w, mean, rstd, dx, part_dw, part_db, M, static_cast<int>(N), plan.width);
      });
    } else {
      A* mean_g = nullptr;
      A* mean_gx = nullptr;
      if (dx != nullptr) {
        const Runs runs = rows_as_runs(M, N);
        A* sum_g = workspace(runs.units());
        A* sum_gx = workspace(runs.units());
        mean_g = workspace(M);
        mean_gx = workspace(M);
        launch(norm_rows_sums_kernel<Centered, T, W, V>,
               {.grid = grid_of(runs.units()), .block = dim3(256), .smem = sizeof(PairShared<A>), .stream = stream}, dy,
               x, w, mean, rstd, sum_g, sum_gx, runs);
        launch(norm_rows_means_kernel<A>, {.grid = grid_of(divide_up(M, 4)), .block = dim3(128), .stream = stream},
               sum_g, sum_gx, mean_g, mean_gx, M, N, runs.count);
      }
      launch(norm_columns_bwd_kernel<Centered, T, W, V>,
             {.grid = grid_of(tiles * P), .block = dim3(256), .stream = stream}, dy, x, w, mean, rstd, mean_g, mean_gx,
             dx, part_dw, part_db, M, N, lines, tiles);
    }
    if (need_dw && !direct) {
      sum_columns<A, W>(part_dw, dw, P, N, stream);
      if constexpr (Centered) sum_columns<A, W>(part_db, db, P, N, stream);
    }
  });
}

}  // namespace pyops::norm
