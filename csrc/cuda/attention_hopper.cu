// attention in bf16 and fp16 on Hopper's tensor cores (wgmma, sm_90a).
//
// mapping  one warpgroup fetches: its first warp keeps a ring of tiles of the other side full (TMA, mbarriers).
//          Each other warpgroup owns 64 rows; scores lie in its registers, where they become the A operand of the next
//          product. Its tensor cores have the next scores to compute while it takes exponentials, and the warpgroups
//          take turns in issuing products, so that one multiplies while another takes exponentials.
// memory   tiles lie in shared memory in lines of 64 columns, 128 bytes, swizzled as wgmma reads them
// backward dq: the block owns queries; dk, dv: it owns keys and all is transposed, as in attention_mma.cuh
// numerics products and sums in fp32, p and ds rounded to T; no atomics: deterministic
#include "cuda/attention.cuh"

namespace pyops::attention {
namespace {

inline constexpr int group_threads = 128, group_rows = 64, line = 64;
// A block of n warpgroups starts with 64 K / 128 n registers per thread, rounded down to eights. The warpgroup that fetches
// gives most of its own away, and the others can get what all began with: one more would wait for ever.
inline constexpr int fetching_registers = 40;
template <int Groups>
inline constexpr int multiplying_registers =
    (65536 / group_threads / (Groups + 1) / 8 * 8 * (Groups + 1) - fetching_registers) / Groups / 8 * 8;

// `Rows` rows of up to W columns.
template <class T, int Rows, int W>
struct alignas(1024) Panel {
  static constexpr int lines = (W + line - 1) / line;
  static constexpr uint32_t bytes = lines * Rows * line * sizeof(T);
  T at[lines][Rows][line];
};

// wgmma operands. Rows of the panel as rows of the operand, its columns 16 i, ... as the summed dimension:
template <class T, int Rows, int W>
PYOPS_DEVICE uint64_t straight(const Panel<T, Rows, W>& panel, int i) {
  return smem_desc(&panel.at[i / 4][0][i % 4 * 16], 16, 1024, Swizzle::b128);
}
// ... and its rows 16 i, ... as the summed dimension.
template <class T, int Rows, int W>
PYOPS_DEVICE uint64_t transposed(const Panel<T, Rows, W>& panel, int i) {
  return smem_desc(&panel.at[0][i * 16][0], sizeof panel.at[0], 1024, Swizzle::b128);
}

// s = a bᵀ, begun.
template <class T, int W, int BN>
PYOPS_DEVICE void begin_scores(float (&s)[BN / 2], const Panel<T, group_rows, W>& a, const Panel<T, BN, W>& b) {
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < W / 16; ++i) wgmma_m64k16<T, BN>(s, straight(a, i), straight(b, i), i > 0);
  wgmma_commit();
}
// sum += a b, begun.
template <class T, int W, int BN>
PYOPS_DEVICE void begin_product(float (&sum)[W / 2], const uint32_t (&a)[BN / 16][4], const Panel<T, BN, W>& b) {
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < BN / 16; ++i) wgmma_m64k16_reg<T, W, Major::mn>(sum, a[i], transposed(b, i));
  wgmma_commit();
}
// Scores as the A operand of the next product.
template <class T, int BN>
PYOPS_DEVICE void to_operand(uint32_t (&a)[BN / 16][4], const float (&s)[BN / 2]) {
#pragma unroll
  for (int i = 0; i < BN / 4; ++i) a[i / 4][i % 4] = pack2<T>(s[i * 2], s[i * 2 + 1]);
}

// Value n of an accumulator is in column column_of(n) and, of the two rows of its lane, in row n % 4 / 2.
PYOPS_DEVICE int lane_column() { return static_cast<int>(threadIdx.x) % 4 * 2; }
PYOPS_DEVICE int column_of(int n) { return n / 4 * 8 + n % 2 + lane_column(); }
// First of the two rows of a lane within its warpgroup's 64; the other comes 8 later.
PYOPS_DEVICE int lane_row() {
  return static_cast<int>(threadIdx.x) % 128 / 32 * 16 + static_cast<int>(threadIdx.x) % 32 / 4;
}

// 4 x 4 words among 4 lanes, transposed.
PYOPS_DEVICE void exchange(uint32_t (&word)[4]) {
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {
    const bool upper = (threadIdx.x & step) != 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t& low = word[step == 1 ? i * 2 : i];
      uint32_t& high = word[step == 1 ? i * 2 + 1 : i + 2];
      const uint32_t got = __shfl_xor_sync(0xffffffffu, upper ? low : high, step);
      (upper ? low : high) = got;
    }
  }
}
// One of the two rows of an accumulator that a lane holds, times `factor`: 16 bytes at a time.
template <class T, int W>
PYOPS_DEVICE void store_row(T* row, bool there, int width, const float (&sum)[W / 2], int half, float factor) {
#pragma unroll
  for (int j = 0; j < W / 8; j += 4) {
    uint32_t word[4];
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const int n = (j + m) * 4 + half * 2;
      word[m] = pack2<T>(sum[n] * factor, sum[n + 1] * factor);
    }
    exchange(word);
    const int c = (j + static_cast<int>(threadIdx.x) % 4) * 8;
    if (there && c < width)
      store_vec(reinterpret_cast<uint32_t*>(row + c), Vec<uint32_t, 4>{{word[0], word[1], word[2], word[3]}});
  }
}

// Fetching: by one thread of a warp, tile rows from `row` on of one matrix [rows, width]; zero beyond both.
template <class T, int Rows, int W>
PYOPS_DEVICE void fetch(Panel<T, Rows, W>& panel, const TensorMap& map, int row, int matrix, uint64_t* full) {
#pragma unroll
  for (int i = 0; i < Panel<T, Rows, W>::lines; ++i) tma_load(panel.at[i], map, full, {i * line, row, matrix});
}
// By a whole warp, where the matrix goes on after the rows that count: what comes then is zero here, so that no NaN in it
// meets a weight of 0.
template <class T, int Rows, int W>
PYOPS_DEVICE void fetch_rows(Panel<T, Rows, W>& panel, const T* from, int64_t stride, int rows, int width) {
#pragma unroll 1
  for (int i = threadIdx.x % 32; i < Panel<T, Rows, W>::lines * Rows * 8; i += 32) {
    const int r = i / 8 % Rows, c = i % 8, first = i / 8 / Rows * line + c * 8;
    const bool there = r < rows && first < width;
    cp_async<16>(&panel.at[first / line][r][(c ^ r % 8) * 8], there ? from + r * stride + first : from, there);
  }
  cp_async_commit();
  cp_async_wait<0>();
  fence_proxy_async();
  __syncwarp();
}

// Stages of a ring that fit the 227 KB of a block beside its own rows and the barriers; four are enough.
constexpr int stages_beside(size_t own, size_t stage) {
  const size_t fit = (225 * 1024 - own) / stage;
  return fit < 4 ? static_cast<int>(fit) : 4;
}
// A ring of Stages tiles between the fetching warp and the warpgroups that multiply.
template <int Stages>
struct Ring {
  uint64_t full[Stages], free[Stages];
  PYOPS_DEVICE void init(int groups) {
    for (int i = 0; i < Stages; ++i) {
      mbarrier_init(&full[i], 1);
      mbarrier_init(&free[i], static_cast<uint32_t>(groups * 4));
    }
  }
  PYOPS_DEVICE void wait_full(int n) { mbarrier_wait(&full[n % Stages], static_cast<uint32_t>(n / Stages % 2)); }
  PYOPS_DEVICE void wait_free(int n) { mbarrier_wait(&free[n % Stages], static_cast<uint32_t>(n / Stages % 2 ^ 1)); }
  PYOPS_DEVICE void release(int n) {
    __syncwarp();  // one lane speaks for what all have read
    if (threadIdx.x % 32 == 0) mbarrier_arrive(&free[n % Stages]);
  }
};

// Warpgroups issue their products one after the other, in n = first, ..., last.
template <int Groups>
struct Turns {
  int group, first, last;
  PYOPS_DEVICE void begin(int n) const {
    if (Groups > 1 && (group > 0 || n > first)) named_barrier_sync(1 + group, 2 * group_threads);
  }
  PYOPS_DEVICE void end(int n) const {
    if (Groups > 1 && (group < Groups - 1 || n < last))
      named_barrier_arrive(1 + (group + 1) % Groups, 2 * group_threads);
  }
};

// Computes values, none of them negative, before the wait that follows. The assembler moves a wait up over arithmetic, and
// the products have nothing beside them then; it does not move it over a branch.
template <int N>
PYOPS_DEVICE void finish(const float (&x)[N]) {
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) bits |= __float_as_uint(x[i]);
  if (bits >> 31 != 0) __nanosleep(1);
}

struct Maps {
  TensorMap q, k, v, dy;
};

template <class T, int W, int BN, int Groups>
struct Forward {
  static constexpr int rows = Groups * group_rows, threads = (Groups + 1) * group_threads;
  static constexpr int stages = stages_beside(sizeof(Panel<T, rows, W>), 2 * sizeof(Panel<T, BN, W>));
  Panel<T, group_rows, W> q[Groups];
  Panel<T, BN, W> k[stages], v[stages];
  uint64_t q_full;
  Ring<stages> keys, values;
};

// Weights of the scores of two rows, and what the sums so far are multiplied by.
template <int BN>
struct OnlineSoftmax {
  float most[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f}, factor[2] = {0.0f, 0.0f};
  PYOPS_DEVICE void operator()(float (&s)[BN / 2], float scale) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = most[half];
#pragma unroll
      for (int n = half * 2; n < BN / 2; n += 4) top = fmaxf(top, fmaxf(s[n], s[n + 1]));
      top = warp_max<4>(top);
      const float base = top == -INFINITY ? 0.0f : top * scale;
      factor[half] = exp2_approx(fmaf(most[half], scale, -base));
      most[half] = top;
      float part = 0.0f;
#pragma unroll
      for (int n = half * 2; n < BN / 2; n += 4) {
        s[n] = exp2_approx(fmaf(s[n], scale, -base));
        s[n + 1] = exp2_approx(fmaf(s[n + 1], scale, -base));
        part += s[n] + s[n + 1];
      }
      total[half] = total[half] * factor[half] + part;
    }
  }
};

// Scores outside the visible range of their row become -infinity.
template <int BN>
PYOPS_DEVICE void hide(float (&s)[BN / 2], const Range (&range)[2], int other0) {
#pragma unroll
  for (int n = 0; n < BN / 2; ++n) {
    const int other = other0 + column_of(n);
    const Range& r = range[n % 4 / 2];
    if (other < r.low || other >= r.high) s[n] = -INFINITY;
  }
}
// What all of the warpgroup's rows [row0, row0 + 64) see, of `rows` that exist; empty when none does.
template <bool by_query>
PYOPS_DEVICE Range seen_by_all(const Example& e, int64_t row0, int64_t rows) {
  const int64_t last = row0 + group_rows < rows ? row0 + group_rows - 1 : rows - 1;
  return {range_of<by_query>(e, last).low, range_of<by_query>(e, row0).high};
}

template <class T, int W, int BN, int Groups>
__global__ void __launch_bounds__((Groups + 1) * group_threads, 1)
    attention_fwd_wgmma_kernel(Problem<float> p, Tensors<T> t, const __grid_constant__ Maps maps, int64_t blocks) {
  using Storage = Forward<T, W, BN, Groups>;
  auto& shared = shared_storage<Storage>();
  const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / group_threads, 0) - 1;
  // Blocks with most keys first: a causal mask leaves the last queries the most work.
  const Place at = place_of(static_cast<int64_t>(gridDim.x) - 1 - blockIdx.x, p.H, blocks);
  const Example e = example(p, at.b);
  const int64_t i0 = at.block * Storage::rows;
  if (i0 >= e.L) return;
  const Range all = range_of<true>(e, i0, i0 + Storage::rows < e.L ? i0 + Storage::rows : e.L);
  const int first = all.low / BN * BN, tiles = all.high > first ? (all.high - first + BN - 1) / BN : 0;
  if (threadIdx.x == 0) {
    mbarrier_init(&shared.q_full, 1);
    shared.keys.init(Groups);
    shared.values.init(Groups);
    fence_barrier_init();
  }
  __syncthreads();

  if (group < 0) {
    setmaxnreg_dec<fetching_registers>();
    if (threadIdx.x >= 32) return;
    const bool leader = threadIdx.x == 0;
    const int matrix = static_cast<int>(p.cu_q != nullptr ? at.h : at.b * p.H + at.h);
    const int key_matrix = static_cast<int>(p.cu_q != nullptr ? at.h / p.G : (at.b * p.H + at.h) / p.G);
    // Values after those of the example may be anything; keys too, but their scores are never looked at.
    const bool goes_on = p.lengths != nullptr || p.cu_k != nullptr;
    const T* v = t.v + at.b * p.v.batch + at.h / p.G * p.v.head + e.k0 * p.v.row;
    if (leader && tiles > 0) {
      mbarrier_arrive_expect_tx(&shared.q_full, Groups * Panel<T, group_rows, W>::bytes);
      for (int g = 0; g < Groups; ++g)
        fetch(shared.q[g], maps.q, static_cast<int>(e.q0 + i0) + g * group_rows, matrix, &shared.q_full);
    }
    for (int n = 0; n < tiles; ++n) {
      const int stage = n % Storage::stages, j0 = first + n * BN;
      shared.keys.wait_free(n);
      if (leader) {
        mbarrier_arrive_expect_tx(&shared.keys.full[stage], Panel<T, BN, W>::bytes);
        fetch(shared.k[stage], maps.k, static_cast<int>(e.k0) + j0, key_matrix, &shared.keys.full[stage]);
      }
      shared.values.wait_free(n);
      if (goes_on && j0 + BN > e.S) {
        fetch_rows(shared.v[stage], v + j0 * p.v.row, p.v.row, static_cast<int>(e.S) - j0, static_cast<int>(p.E));
        if (leader) mbarrier_arrive(&shared.values.full[stage]);
      } else if (leader) {
        mbarrier_arrive_expect_tx(&shared.values.full[stage], Panel<T, BN, W>::bytes);
        fetch(shared.v[stage], maps.v, static_cast<int>(e.k0) + j0, key_matrix, &shared.values.full[stage]);
      }
    }
  } else {
    setmaxnreg_inc<multiplying_registers<Groups>>();
    const int64_t row0 = i0 + group * group_rows, i = row0 + lane_row();
    const Range range[2] = {range_of<true>(e, i), range_of<true>(e, i + 8)}, seen = seen_by_all<true>(e, row0, e.L);
    const float scale = p.scale * log2_e;
    float o[W / 2] = {};
    OnlineSoftmax<BN> softmax;
    if (tiles > 0) {
      float s[BN / 2];
      uint32_t weights[BN / 16][4];
      const auto weigh = [&](int n) {
        const int j0 = first + n * BN;
        if (j0 < seen.low || j0 + BN > seen.high) hide<BN>(s, range, j0);
        softmax(s, scale);
      };
      mbarrier_wait(&shared.q_full, 0);
      shared.keys.wait_full(0);
      begin_scores<T, W, BN>(s, shared.q[group], shared.k[0]);
      wgmma_wait<0>(s);
      shared.keys.release(0);
      weigh(0);
      to_operand<T, BN>(weights, s);
      const Turns<Groups> turns{group, 1, tiles - 1};
#pragma unroll 1
      for (int n = 1; n < tiles; ++n) {
        shared.keys.wait_full(n);
        turns.begin(n);
        begin_scores<T, W, BN>(s, shared.q[group], shared.k[n % Storage::stages]);
        shared.values.wait_full(n - 1);
        begin_product<T, W, BN>(o, weights, shared.v[(n - 1) % Storage::stages]);
        turns.end(n);
        wgmma_wait<1>(s);
        shared.keys.release(n);
        weigh(n);
        finish(softmax.total);
        wgmma_wait<0>(o);
        shared.values.release(n - 1);
#pragma unroll
        for (int c = 0; c < W / 2; ++c) o[c] *= softmax.factor[c % 4 / 2];
        to_operand<T, BN>(weights, s);
      }
      shared.values.wait_full(tiles - 1);
      begin_product<T, W, BN>(o, weights, shared.v[(tiles - 1) % Storage::stages]);
      wgmma_wait<0>(o);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float total = warp_sum<4>(softmax.total[half]), most = softmax.most[half];
      const int64_t row = i + half * 8;
      store_row<T, W>(t.o + at.b * p.o.batch + at.h * p.o.head + (e.q0 + row) * p.o.row, row < e.L,
                      static_cast<int>(p.E), o, half, most == -INFINITY ? 0.0f : 1.0f / total);
      if (row < e.L && threadIdx.x % 4 == 0)
        t.lse[at.b * p.lse_batch + at.h * p.lse_head + e.q0 + row] =
            most == -INFINITY ? -INFINITY : (most * scale + log2f(total)) * ln_2;
    }
  }
}

template <class T, int W, int BN, int Groups>
struct Backward {
  static constexpr int rows = Groups * group_rows, threads = (Groups + 1) * group_threads;
  static constexpr int stages = stages_beside(2 * sizeof(Panel<T, rows, W>), 2 * sizeof(Panel<T, BN, W>) + 8 * BN);
  Panel<T, group_rows, W> own_first[Groups], own_second[Groups];
  Panel<T, BN, W> first[stages], second[stages];
  alignas(16) float lse[stages][BN], delta[stages][BN];
  uint64_t own_full;
  Ring<stages> firsts, seconds;
};

// A row's lse to the base 2; without any weight where it has none, or does not exist.
PYOPS_DEVICE float lse_or_none(const float* lse, int64_t i, int64_t rows) {
  const float value = i < rows ? lse[i] : -INFINITY;
  return value == -INFINITY ? INFINITY : value * log2_e;
}

template <class T, int W, int BN, int Groups, bool by_query>
__global__ void __launch_bounds__((Groups + 1) * group_threads, 1)
    attention_bwd_wgmma_kernel(Problem<float> p, Tensors<T> t, const __grid_constant__ Maps maps, int64_t blocks) {
  using Storage = Backward<T, W, BN, Groups>;
  auto& shared = shared_storage<Storage>();
  const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / group_threads, 0) - 1;
  constexpr bool ahead = by_query || W <= 64;  // what the registers hold
  const int64_t sharing = by_query ? 1 : p.G, heads = p.H / sharing;
  const Place at = place_of(by_query ? static_cast<int64_t>(gridDim.x) - 1 - blockIdx.x : blockIdx.x, heads, blocks);
  const Example e = example(p, at.b);
  const int64_t own0 = at.block * Storage::rows, own_rows = by_query ? e.L : e.S;
  // Rows to write: keys beyond a length exist in memory and have gradient 0.
  const int64_t kept_rows = by_query ? e.L : (p.cu_k != nullptr ? e.S : p.S);
  if (own0 >= kept_rows) return;
  const Range all = range_of<by_query>(e, own0, own0 + Storage::rows < own_rows ? own0 + Storage::rows : own_rows);
  const int first = all.low / BN * BN, tiles = all.high > first ? (all.high - first + BN - 1) / BN : 0;
  const int all_tiles = tiles * static_cast<int>(sharing);
  if (threadIdx.x == 0) {
    mbarrier_init(&shared.own_full, 1);
    shared.firsts.init(Groups);
    shared.seconds.init(Groups);
    fence_barrier_init();
  }
  __syncthreads();

  if (group < 0) {
    setmaxnreg_dec<fetching_registers>();
    if (threadIdx.x >= 32 || tiles == 0) return;
    const bool leader = threadIdx.x == 0, packed = p.cu_q != nullptr;
    const int other_rows = static_cast<int>(by_query ? e.S : e.L);
    const bool goes_on = packed || (by_query && p.lengths != nullptr);
    const int key_head = static_cast<int>(by_query ? at.h / p.G : at.h);
    const int key_matrix = static_cast<int>(packed ? 0 : at.b * (p.H / p.G)) + key_head;
    if (leader) {
      mbarrier_arrive_expect_tx(&shared.own_full, 2 * Groups * Panel<T, group_rows, W>::bytes);
      for (int g = 0; g < Groups; ++g) {
        const int row = static_cast<int>((by_query ? e.q0 : e.k0) + own0) + g * group_rows;
        const int matrix = by_query ? static_cast<int>(packed ? at.h : at.b * p.H + at.h) : key_matrix;
        fetch(shared.own_first[g], by_query ? maps.q : maps.k, row, matrix, &shared.own_full);
        fetch(shared.own_second[g], by_query ? maps.dy : maps.v, row, matrix, &shared.own_full);
      }
    }
    int other0 = first;
    int64_t h = by_query ? at.h : at.h * sharing;
    for (int n = 0; n < all_tiles; ++n) {
      const int stage = n % Storage::stages;
      const int matrix = by_query ? key_matrix : static_cast<int>(packed ? h : at.b * p.H + h);
      const int row = static_cast<int>(by_query ? e.k0 : e.q0) + other0;
      const bool ragged = goes_on && other0 + BN > other_rows;
      const auto fill = [&](Panel<T, BN, W>& panel, Ring<Storage::stages>& ring, const TensorMap& map, const T* from,
                            const Strides& stride, int64_t head, int64_t width) {
        if (ragged) {
          fetch_rows(panel, from + at.b * stride.batch + head * stride.head + row * stride.row, stride.row,
                     other_rows - other0, static_cast<int>(width));
          if (leader) mbarrier_arrive(&ring.full[stage]);
        } else if (leader) {
          mbarrier_arrive_expect_tx(&ring.full[stage], Panel<T, BN, W>::bytes);
          fetch(panel, map, row, matrix, &ring.full[stage]);
        }
      };
      shared.firsts.wait_free(n);
      fill(shared.first[stage], shared.firsts, by_query ? maps.k : maps.q, by_query ? t.k : t.q, by_query ? p.k : p.q,
           by_query ? key_head : h, p.D);
      shared.seconds.wait_free(n);
      if constexpr (!by_query) {
        const int64_t statistics = at.b * p.lse_batch + h * p.lse_head + e.q0;
        for (int c = threadIdx.x; c < BN; c += 32) {
          shared.lse[stage][c] = lse_or_none(t.lse_in + statistics, other0 + c, e.L);
          shared.delta[stage][c] = other0 + c < e.L ? t.delta[statistics + other0 + c] : 0.0f;
        }
        __syncwarp();
      }
      fill(shared.second[stage], shared.seconds, by_query ? maps.v : maps.dy, by_query ? t.v : t.dy,
           by_query ? p.v : p.o, by_query ? key_head : h, p.E);
      other0 += BN;
      if (other0 >= all.high) other0 = first, ++h;
    }
  } else {
    setmaxnreg_inc<multiplying_registers<Groups>>();
    const int64_t row0 = own0 + group * group_rows, own = row0 + lane_row();
    const Range range[2] = {range_of<by_query>(e, own), range_of<by_query>(e, own + 8)};
    const Range seen = seen_by_all<by_query>(e, row0, own_rows);
    const bool counts[2] = {own < own_rows, own + 8 < own_rows}, there[2] = {own < kept_rows, own + 8 < kept_rows};
    T* const to_first = by_query ? t.dq + at.b * p.q.batch + at.h * p.q.head + (e.q0 + own) * p.q.row
                                 : t.dk + at.b * p.k.batch + at.h * p.k.head + (e.k0 + own) * p.k.row;
    T* const to_second = t.dv + at.b * p.v.batch + at.h * p.v.head + (e.k0 + own) * p.v.row;
    const float scale = p.scale * log2_e;
    float row_lse[2], row_delta[2];
    if constexpr (by_query) {
      const int64_t statistics = at.b * p.lse_batch + at.h * p.lse_head + e.q0;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t i = own + half * 8;
        row_lse[half] = lse_or_none(t.lse_in + statistics, i, e.L);
        row_delta[half] = i < e.L ? t.delta[statistics + i] : 0.0f;
      }
    }
    float sum_first[W / 2] = {}, sum_second[by_query ? 2 : W / 2] = {};
    if (tiles > 0) {
      float s[BN / 2], ds[BN / 2];
      uint32_t weights[BN / 16][4], gradients[BN / 16][4];
      const auto begin_both = [&](int n) {
        shared.firsts.wait_full(n);
        begin_scores<T, W, BN>(s, shared.own_first[group], shared.first[n % Storage::stages]);
        shared.seconds.wait_full(n);
        begin_scores<T, W, BN>(ds, shared.own_second[group], shared.second[n % Storage::stages]);
      };
      const auto begin_sums = [&](int n) {
        if constexpr (!by_query) begin_product<T, W, BN>(sum_second, weights, shared.second[n % Storage::stages]);
        begin_product<T, W, BN>(sum_first, gradients, shared.first[n % Storage::stages]);
      };
      const auto end_sums = [&](int n) {
        wgmma_wait<0>(sum_first, sum_second);
        shared.firsts.release(n);
        shared.seconds.release(n);
      };
      int other0 = first;
      const auto weigh = [&](int n) {
        if (other0 < seen.low || other0 + BN > seen.high) hide<BN>(s, range, other0);
        other0 = other0 + BN < all.high ? other0 + BN : first;
#pragma unroll
        for (int c = 0; c < BN / 2; ++c) {
          const float l = by_query ? row_lse[c % 4 / 2] : shared.lse[n % Storage::stages][column_of(c)];
          s[c] = exp2_approx(fmaf(s[c], scale, -l));
        }
      };
      const auto derive = [&](int n) {
#pragma unroll
        for (int c = 0; c < BN / 2; ++c) {
          const float d = by_query ? row_delta[c % 4 / 2] : shared.delta[n % Storage::stages][column_of(c)];
          ds[c] = s[c] * (ds[c] - d);
        }
      };
      const auto to_operands = [&] {
        if constexpr (!by_query) to_operand<T, BN>(weights, s);
        to_operand<T, BN>(gradients, ds);
      };
      mbarrier_wait(&shared.own_full, 0);
      if constexpr (ahead) {  // the sums of a tile are taken while the next one is weighed
        begin_both(0);
        wgmma_wait<1>(s);
        weigh(0);
        wgmma_wait<0>(ds);
        derive(0);
        to_operands();
#pragma unroll 1
        for (int n = 1; n < all_tiles; ++n) {
          begin_both(n);
          begin_sums(n - 1);
          wgmma_wait<by_query ? 2 : 3>(s);
          weigh(n);
          finish(s);
          wgmma_wait<by_query ? 1 : 2>(ds);
          derive(n);
          end_sums(n - 1);
          to_operands();
        }
        begin_sums(all_tiles - 1);
        end_sums(all_tiles - 1);
      } else {
#pragma unroll 1
        for (int n = 0; n < all_tiles; ++n) {
          begin_both(n);
          wgmma_wait<1>(s);
          weigh(n);
          finish(s);
          wgmma_wait<0>(ds);
          derive(n);
          to_operands();
          begin_sums(n);
          end_sums(n);
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (!counts[half]) {  // whatever stands in a key that does not
#pragma unroll
        for (int c = half * 2; c < W / 2; c += 4) sum_first[c] = sum_first[c + 1] = 0.0f;
        if constexpr (!by_query)
#pragma unroll
          for (int c = half * 2; c < W / 2; c += 4) sum_second[c] = sum_second[c + 1] = 0.0f;
      }
      store_row<T, W>(to_first + half * 8 * (by_query ? p.q.row : p.k.row), there[half], static_cast<int>(p.D),
                      sum_first, half, p.scale);
      if constexpr (!by_query)
        store_row<T, W>(to_second + half * 8 * p.v.row, there[half], static_cast<int>(p.E), sum_second, half, 1.0f);
    }
  }
}

// Host

// [heads, rows, width] of every example, in boxes of `box` rows and one line.
template <class T>
TensorMap tensor_map(const T* base, const Strides& stride, int64_t matrices, int64_t rows, int64_t width, int box) {
  return make_tensor_map(
      base, {static_cast<uint64_t>(width), static_cast<uint64_t>(rows), static_cast<uint64_t>(matrices)},
      {sizeof(T), static_cast<uint64_t>(stride.row) * sizeof(T), static_cast<uint64_t>(stride.head) * sizeof(T)},
      {line, static_cast<uint32_t>(box), 1}, Swizzle::b128);
}
template <class T>
Maps maps_of(const Problem<float>& p, const Tensors<T>& t, int query_box, int key_box) {
  const int64_t examples = p.cu_q != nullptr ? 1 : p.B, heads = examples * p.H, key_heads = heads / p.G;
  return {tensor_map(t.q, p.q, heads, p.rows_q, p.D, query_box),
          tensor_map(t.k, p.k, key_heads, p.rows_k, p.D, key_box),
          tensor_map(t.v, p.v, key_heads, p.rows_k, p.E, key_box),
          tensor_map(t.dy != nullptr ? t.dy : t.q, p.o, heads, p.rows_q, p.E, query_box)};
}

template <class T, int W, int BN, int Groups>
void launch_forward(const Problem<float>& p, const Tensors<T>& t, cudaStream_t stream) {
  using Storage = Forward<T, W, BN, Groups>;
  const int64_t blocks = ceil_div(p.L, Storage::rows);
  launch(attention_fwd_wgmma_kernel<T, W, BN, Groups>,
         {.grid = static_cast<unsigned>(p.B * p.H * blocks),
          .block = Storage::threads,
          .smem = sizeof(Storage),
          .stream = stream},
         p, t, maps_of(p, t, group_rows, BN), blocks);
}

template <class T, int W, int BN, int Groups, bool by_query>
void launch_backward(const Problem<float>& p, const Tensors<T>& t, cudaStream_t stream) {
  using Storage = Backward<T, W, BN, Groups>;
  const int64_t blocks = ceil_div(by_query ? p.L : p.S, Storage::rows), heads = by_query ? p.H : p.H / p.G;
  launch(attention_bwd_wgmma_kernel<T, W, BN, Groups, by_query>,
         {.grid = static_cast<unsigned>(p.B * heads * blocks),
          .block = Storage::threads,
          .smem = sizeof(Storage),
          .stream = stream},
         p, t, by_query ? maps_of(p, t, group_rows, BN) : maps_of(p, t, BN, group_rows), blocks);
}

}  // namespace

template <class T>
void forward_hopper(const Problem<float>& p, const Tensors<T>& t, cudaStream_t stream) {
  const int64_t width = p.D > p.E ? p.D : p.E;
  if (width <= 64)
    launch_forward<T, 64, 128, 2>(p, t, stream);
  else
    launch_forward<T, 128, 128, 2>(p, t, stream);
}

template <class T>
void backward_hopper(const Problem<float>& p, const Tensors<T>& t, cudaStream_t stream) {
  const int64_t width = p.D > p.E ? p.D : p.E;
  if (width <= 64) {
    launch_backward<T, 64, 128, 2, true>(p, t, stream);
    launch_backward<T, 64, 64, 2, false>(p, t, stream);
  } else {
    launch_backward<T, 128, 96, 2, true>(p, t, stream);
    launch_backward<T, 128, 64, 2, false>(p, t, stream);
  }
}

template void forward_hopper(const Problem<float>&, const Tensors<bf16>&, cudaStream_t);
template void forward_hopper(const Problem<float>&, const Tensors<fp16>&, cudaStream_t);
template void backward_hopper(const Problem<float>&, const Tensors<bf16>&, cudaStream_t);
template void backward_hopper(const Problem<float>&, const Tensors<fp16>&, cudaStream_t);

}  // namespace pyops::attention
