// attention on Hopper's tensor cores: what the kernels of attention_hopper.cu and attention_backward_hopper.cu share.
//
// mapping  one warpgroup fetches: its first warp keeps a ring of tiles of the other side full (TMA, mbarriers).
//          Each other warpgroup owns 64 rows; scores lie in its registers, where they become the A operand of the next
//          product.
// memory   tiles lie in shared memory in lines of 64 columns, 128 bytes, swizzled as wgmma reads them
#pragma once

#include "cuda/attention.cuh"

namespace pyops::attention::hopper {

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
// Which matrix of its map a head of example b is.
PYOPS_DEVICE int matrix_of(const Strides& stride, int64_t b, int64_t heads, int64_t h) {
  return static_cast<int>((stride.batch != 0 ? b : 0) * heads + h);
}

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

// Host

// Matrices of a tensor [examples, heads, rows, width]; of one that is packed, or that all examples share, of its heads.
inline int64_t matrices_of(const Problem<float>& p, const Strides& stride, int64_t heads) {
  return (stride.batch != 0 ? p.B : 1) * heads;
}
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
  const int64_t key_heads = p.H / p.G;
  return {tensor_map(t.q, p.q, matrices_of(p, p.q, p.H), p.rows_q, p.D, query_box),
          tensor_map(t.k, p.k, matrices_of(p, p.k, key_heads), p.rows_k, p.D, key_box),
          tensor_map(t.v, p.v, matrices_of(p, p.v, key_heads), p.rows_k, p.E, key_box),
          tensor_map(t.dy != nullptr ? t.dy : t.q, p.o, matrices_of(p, p.o, p.H), p.rows_q, p.E, query_box)};
}

}  // namespace pyops::attention::hopper
