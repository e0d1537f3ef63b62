// The recurrent product in bf16 and fp16 on tensor cores (mma.sync), for the persistent kernels of
// recurrent_sequence.cuh.
//
// A block multiplies its rows of weights (M) with all rows of states (N), K numbers each. Its 8 warps share K, 32
// numbers a warp in turn, and their sums are added in the order of the warps: deterministic. What a lane reads of a row
// of weights or states is 8 neighbouring numbers, and they are its part of two products' K as they come: the order
// within K is free where both sides share it. So a warp reads its states from L2 straight into registers, whole 64-byte
// pieces, each number once per block, and its weights are one 16-byte access per row wherever they are.
//
// budget   A thread has 65536 / 256 = 256 registers: 96 to 128 of weights (a row of two segments: 16 to 32 fewer), 16
//          or 32 of sums, 16 or 32 of states, of which half are on their way. So registers hold 96 to 128 KB of weights
//          a block. What is beyond them lies in shared memory in the order in which lanes read it, beside 20 to 36 KB
//          of sums. On an H100 (227 KB): an LSTM of 2048 units over 128 blocks has 256 KB of weights a block, 128 in
//          registers and 128 in shared memory; in its backward pass 112 and 144.
//          tiles   rows of weights   K in registers   rows of states at a time   sums
//            1           16              3584                  32                20 KB
//            2           32              1536                  32                36 KB
//            4           64              1024                  16                34 KB
#pragma once

#include <algorithm>
#include <cstdlib>
#include <utility>

#include "cuda/device.cuh"

#include "common/host_device.h"

namespace pyops {

inline constexpr int mma_threads = 256, mma_warps = mma_threads / 32, mma_depth = 32;

// segments: 1, or 2 where rows of weights are two matrices behind each other, of K[0] and K[1] numbers.
template <class T, int tiles, int segments = 1>
class MmaProduct {
 public:
  static constexpr int columns = tiles == 4 ? 2 : 4, rows = 8 * columns;
  static constexpr int resident = tiles == 1 ? 16 - 2 * segments : (tiles == 2 ? 7 : 5) - segments;
  // Lanes that write sums lie 2 stride apart, 8 of them side by side: 4 more numbers and they are in 32 banks.
  static constexpr int stride = 16 * tiles + 4;
  using Word = Vec<uint32_t, 4>;
  struct Shared {
    alignas(16) float sums[mma_warps][rows][stride];  // behind it the weights that do not fit into registers
  };

  // Bytes of shared memory where a row of weights has `blocks` times 32 numbers.
  PYOPS_HOST_DEVICE static constexpr int64_t shared_bytes(int64_t blocks) {
    const int64_t turns = ceil_div(blocks, mma_warps), beyond = turns > resident ? turns - resident : 0;
    return static_cast<int64_t>(sizeof(Shared)) + beyond * tiles * mma_warps * 1024;
  }

  // Where states of a step lie in shared memory that begins `from` bytes behind Shared: for each pass of `rows` rows
  // [K / 32, of_pass, 32] numbers, and behind all an mbarrier for each.
  struct Stage {
    int passes, of_pass, blocks;
    int64_t from;
    PYOPS_HOST_DEVICE Stage(int64_t B, int64_t K, int64_t from_)
        : passes(static_cast<int>(ceil_div(B, rows))),
          of_pass(static_cast<int>(B < rows ? ceil_div(B, 8) * 8 : rows)),
          blocks(static_cast<int>(ceil_div(K, mma_depth))),
          from(ceil_div(from_, 128) * 128) {}
    PYOPS_HOST_DEVICE int64_t box() const { return of_pass * mma_depth; }
    PYOPS_HOST_DEVICE int64_t pass() const { return box() * blocks; }
    PYOPS_HOST_DEVICE int64_t barriers() const { return from + passes * pass() * static_cast<int64_t>(sizeof(T)); }
    PYOPS_HOST_DEVICE int64_t end() const { return barriers() + passes * static_cast<int64_t>(sizeof(uint64_t)); }
  };

  // weight(segment, m): row m of the block's, or null for zeros.
  template <class Weight>
  PYOPS_DEVICE MmaProduct(Shared& shared, const int64_t (&K)[segments], Weight&& weight) : shared_(shared) {
#pragma unroll
    for (int s = 0; s < segments; ++s) K_[s] = static_cast<int>(K[s]);
    first_ = (K_[0] + mma_depth - 1) / mma_depth, blocks_ = first_;
    if constexpr (segments > 1) blocks_ += (K_[1] + mma_depth - 1) / mma_depth;
    const T* from[segments][tiles][2];
#pragma unroll
    for (int s = 0; s < segments; ++s)
#pragma unroll
      for (int m = 0; m < tiles; ++m) {
        from[s][m][0] = weight(s, m * 16 + lane() / 4), from[s][m][1] = weight(s, m * 16 + lane() / 4 + 8);
      }
#pragma unroll
    for (int i = 0; i < resident; ++i) load_weights(from, warp() + i * mma_warps, weights_[i]);
    for (int i = resident; warp() + i * mma_warps < blocks_; ++i) {
      uint32_t w[tiles][8];
      load_weights(from, warp() + i * mma_warps, w);
#pragma unroll
      for (int m = 0; m < tiles; ++m)
        spot(i, m, 0) = {{w[m][0], w[m][1], w[m][2], w[m][3]}}, spot(i, m, 1) = {{w[m][4], w[m][5], w[m][6], w[m][7]}};
    }
  }

  // The block's rows of weights times `count` rows of states, at most `rows`; state(segment, row) may be null for
  // zeros. A barrier must stand between the last sum() of one product and the next product.
  template <class State>
  PYOPS_DEVICE void run(int count, State&& state) {
    const T* from[segments][columns];
#pragma unroll
    for (int s = 0; s < segments; ++s)
#pragma unroll
      for (int n = 0; n < columns; ++n) {
        const int row = n * 8 + lane() / 4;
        from[s][n] = row < count ? state(s, row) : nullptr;
      }
    multiply_all(count, [&](int at, int n) {
      const int segment = segment_of(at);
      const T* row = from[0][n];
      if constexpr (segments > 1) row = segment > 0 ? from[1][n] : row;
      return at < blocks_ ? load(row, segment, at) : Word{};
    });
  }

  // The same of states in shared memory, [K / 32, of_pass rows, 32], zero beyond K.
  PYOPS_DEVICE void run(int count, const T* states, int of_pass) {
    const T* mine = states + lane() / 4 * mma_depth + lane() % 4 * 8;
    multiply_all(count, [&](int at, int n) {
      return at < blocks_ && n * 8 + lane() / 4 < count
                 ? load_vec<4>(reinterpret_cast<const uint32_t*>(mine + (at * of_pass + n * 8) * mma_depth))
                 : Word{};
    });
  }

  // weights[m] · states[row] of the last product.
  PYOPS_DEVICE float sum(int row, int m) const {
    float total = 0;
#pragma unroll
    for (int w = 0; w < mma_warps; ++w) total += shared_.sums[w][row][m];
    return total;
  }

 private:
  PYOPS_DEVICE static int lane() { return static_cast<int>(threadIdx.x % 32); }
  PYOPS_DEVICE static int warp() { return static_cast<int>(threadIdx.x / 32); }
  PYOPS_DEVICE Word& spot(int i, int m, int half) const {
    Word* weights = reinterpret_cast<Word*>(&shared_ + 1);
    return weights[((((i - resident) * tiles + m) * 2 + half) * mma_warps + warp()) * 32 + lane()];
  }
  // This lane's 8 numbers of block `at` of a row.
  PYOPS_DEVICE Word load(const T* row, int segment, int at) const {
    const int k = (at - (segment > 0 ? first_ : 0)) * mma_depth + lane() % 4 * 8;
    if (row == nullptr || k >= (segments > 1 && segment > 0 ? K_[segments - 1] : K_[0])) return Word{};
    return load_vec<4>(reinterpret_cast<const uint32_t*>(row + k));
  }
  PYOPS_DEVICE int segment_of(int at) const { return segments > 1 && at >= first_ ? segments - 1 : 0; }

  PYOPS_DEVICE void load_weights(const T* const (&from)[segments][tiles][2], int at, uint32_t (&to)[tiles][8]) const {
    const int segment = segment_of(at);
#pragma unroll
    for (int m = 0; m < tiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const T* row = from[0][m][half];
        if constexpr (segments > 1) row = segment > 0 ? from[1][m][half] : row;
        const Word part = at < blocks_ ? load(row, segment, at) : Word{};
#pragma unroll
        for (int j = 0; j < 4; ++j) to[m][2 * j + half] = part[j];
      }
  }
  // fetch(at, n): the states' block `at` of K, column n.
  template <class Fetch>
  PYOPS_DEVICE void multiply_all(int count, Fetch&& fetch) {
    float sum[tiles][columns][4]{};
    // Of few rows, half the columns, two turns come at a time: their latency is what a step of a small batch waits for.
    if (count <= rows / 2)
      turns<2>(sum, count, fetch);
    else
      turns<1>(sum, count, fetch);
#pragma unroll
    for (int n = 0; n < columns; ++n) {
      if (n * 8 >= count) break;
#pragma unroll
      for (int m = 0; m < tiles; ++m)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          shared_.sums[warp()][n * 8 + lane() % 4 * 2 + e % 2][m * 16 + lane() / 4 + e / 2 * 8] = sum[m][n][e];
    }
    __syncthreads();
  }

  // Sums over this warp's blocks of K, `together` at a time; the next ones are on their way meanwhile.
  template <int together, class Fetch>
  PYOPS_DEVICE void turns(float (&sum)[tiles][columns][4], int count, Fetch&& fetch) {
    constexpr int width = columns / together, unrolled = (resident + together - 1) / together * together;
    Word now[columns], next[columns];
    const auto load = [&](int turn, Word(&to)[columns]) {
#pragma unroll
      for (int j = 0; j < columns; ++j) to[j] = fetch(warp() + (turn + j / width) * mma_warps, j % width);
    };
    load(0, now);
#pragma unroll
    for (int i = 0; i < unrolled; i += together) {
      if (warp() + i * mma_warps >= blocks_) return;
      load(i + together, next);
#pragma unroll
      for (int u = 0; u < together; ++u) {
        if (i + u < resident)
          multiply<width>(sum, weights_[i + u < resident ? i + u : 0], now, u * width, count);
        else if (warp() + (i + u) * mma_warps < blocks_)
          multiply_beyond<width>(sum, i + u, now, u * width, count);
      }
#pragma unroll
      for (int j = 0; j < columns; ++j) now[j] = next[j];
    }
    for (int i = unrolled; warp() + i * mma_warps < blocks_; i += together) {
      load(i + together, next);
#pragma unroll
      for (int u = 0; u < together; ++u)
        if (warp() + (i + u) * mma_warps < blocks_) multiply_beyond<width>(sum, i + u, now, u * width, count);
#pragma unroll
      for (int j = 0; j < columns; ++j) now[j] = next[j];
    }
  }

  // By the weights of a turn in shared memory.
  template <int width>
  PYOPS_DEVICE void multiply_beyond(float (&sum)[tiles][columns][4], int turn, const Word (&states)[columns], int from,
                                    int count) const {
    uint32_t w[tiles][8];
#pragma unroll
    for (int m = 0; m < tiles; ++m) {
      const Word first = spot(turn, m, 0), second = spot(turn, m, 1);
#pragma unroll
      for (int j = 0; j < 4; ++j) w[m][j] = first[j], w[m][4 + j] = second[j];
    }
    multiply<width>(sum, w, states, from, count);
  }
  // states[from ...]: `width` columns.
  template <int width>
  PYOPS_DEVICE static void multiply(float (&sum)[tiles][columns][4], const uint32_t (&w)[tiles][8],
                                    const Word (&states)[columns], int from, int count) {
#pragma unroll
    for (int n = 0; n < width; ++n) {
      if (n * 8 >= count) break;
      const Word& b = states[from + n];
#pragma unroll
      for (int m = 0; m < tiles; ++m) {
        mma_m16n8k16<T>(sum[m][n], {w[m][0], w[m][1], w[m][2], w[m][3]}, {b[0], b[1]});
        mma_m16n8k16<T>(sum[m][n], {w[m][4], w[m][5], w[m][6], w[m][7]}, {b[2], b[3]});
      }
    }
  }

  Shared& shared_;
  int K_[segments], first_, blocks_;
  uint32_t weights_[resident][tiles][8];
};

// K in whole blocks.
PYOPS_HOST_DEVICE constexpr int64_t whole_blocks(int64_t K) { return ceil_div(K, mma_depth) * mma_depth; }

// The layer's product: `units` of `slots` rows of weights each, in each of D directions or layers; a row has `depth`
// numbers, each segment in whole blocks. B: rows of states at most.
struct MmaSizes {
  int64_t units, slots, depth, B, D;
  int64_t bytes;    // of the weights of a unit, as the CUDA cores' kernel keeps them
  int cluster = 1;  // blocks that share the states, which then lie in shared memory
};

// How it is cut; no tiles: CUDA cores take it, or it does not fit.
struct MmaPlan {
  int tiles = 0, blocks = 0;  // blocks: per direction or layer
  int64_t shared = 0;
};

// Tensor cores where everything fits, but for one row of states: 7 of 8 columns are then padding, and a multiprocessor
// takes as long for it as with CUDA cores (docs/adr/0006), which need no sum over warps. Where shared memory alone does
// not hold the weights, registers do, and tensor cores take one row too.
template <class T, int segments, int... tiles>
MmaPlan mma_plan(const MmaSizes& size, std::integer_sequence<int, tiles...>) {
  const int64_t most = multiprocessor_count() / size.D, limit = shared_memory_limit();
  if (most == 0) return {};
  const int64_t alone = std::min(most, ceil_div(size.units, 4));
  if (size.B < 2 && ceil_div(size.units, alone) * size.bytes <= limit) return {};
  MmaPlan plan;
  const auto fits = [&]<int n>() {
    using Product = MmaProduct<T, n, segments>;
    const int64_t blocks = ceil_div(ceil_div(size.units, 16 * n / size.slots), size.cluster) * size.cluster;
    int64_t shared = Product::shared_bytes(size.depth / mma_depth);
    if (size.cluster > 1) shared = typename Product::Stage(size.B, size.depth, shared).end();
    if (plan.tiles == 0 && blocks <= most && shared <= limit) plan = {n, static_cast<int>(blocks), shared};
  };
  (fits.template operator()<tiles>(), ...);
  return plan;
}

// Whether the blocks of a cluster should read the states together, `bytes` of them a step: docs/adr/0006 has the
// arithmetic. PYOPS_RECURRENT_MULTICAST=0 or 1 overrules it, for tests and measurements.
inline bool multicast_pays(int64_t bytes) {
  const char* wish = std::getenv("PYOPS_RECURRENT_MULTICAST");
  return wish != nullptr ? *wish == '1' : bytes >= 64 << 10;
}

}  // namespace pyops
