// attention in bf16 and fp16 on Hopper's tensor cores (wgmma, sm_90a): backward.
//
// mapping  attention_hopper.cuh. dq: a block owns queries; dk, dv: it owns keys and all is transposed, as in
//          attention_mma.cuh. Where the sums dk and dv of wide heads are more than the registers hold, each has a kernel of
//          its own, and scores are computed once more.
// extras   masks, ALiBi, soft cap and dropout: attention_hopper_scores.cuh
// numerics products and sums in fp32, p and ds rounded to T; no atomics: deterministic
#include "cuda/attention_hopper_scores.cuh"

namespace pyops::attention {
namespace hopper {
namespace {

enum class Sums { dq, dk_dv, dk, dv };

template <class T, int W, int BN, int Groups, Sums sums>
struct Storage {
  static constexpr int rows = Groups * group_rows, threads = (Groups + 1) * group_threads;
  static constexpr int own = sums == Sums::dv ? 1 : 2;  // dv takes no product of values
  static constexpr int stages = stages_beside(own * sizeof(Panel<T, rows, W>), 2 * sizeof(Panel<T, BN, W>) + 8 * BN);
  Panel<T, group_rows, W> own_rows[own][Groups];
  Panel<T, BN, W> first[stages], second[stages];
  alignas(16) float lse[stages][BN], delta[stages][BN];
  uint64_t own_full;
  Ring<stages> firsts, seconds;
};

// A row's lse times `unit`; without any weight where it has none, or does not exist.
PYOPS_DEVICE float lse_or_none(const float* lse, int64_t i, int64_t rows, float unit) {
  const float value = i < rows ? lse[i] : -INFINITY;
  return value == -INFINITY ? INFINITY : value * unit;
}

// The tiles of all query heads that share a block's keys, or of the one head of its queries.
template <bool Extras, int BN, int Groups>
struct Steps {
  const Problem<float>& p;
  const Tiles& tiles;
  int64_t b, block, h, end;  // heads [h, end)
  int low, high, other0;
  Walk<Extras, BN, Groups> walk;

  PYOPS_DEVICE Steps(const Problem<float>& p, const Tiles& tiles, int64_t b, int64_t block, int64_t h, int64_t heads,
                     const Range& all)
      : p(p),
        tiles(tiles),
        b(b),
        block(block),
        h(h),
        end(all.low / BN * BN < all.high ? h + heads : h),
        low(all.low / BN * BN),
        high(all.high),
        walk(tiles, tiles.of(p, b, h, block), block, all.high) {
    other0 = walk.from(low);
    settle();
  }
  PYOPS_DEVICE bool there() const { return h < end; }
  PYOPS_DEVICE void next() {
    other0 = walk.from(other0 + BN);
    settle();
  }
  PYOPS_DEVICE void settle() {
    while (other0 >= high && h < end) {
      ++h;
      if constexpr (Extras)
        if (h < end) walk.state = tiles.of(p, b, h, block);
      other0 = walk.from(low);
      if (!Extras) break;
    }
  }
};

template <class T, int W, int BN, int Groups, Sums sums, bool Extras>
__global__ void __launch_bounds__((Groups + 1) * group_threads, 1)
    attention_bwd_wgmma_kernel(Problem<float> p, Tensors<T> t, const __grid_constant__ Maps maps, int64_t blocks,
                               Tiles tiles) {
  using Memory = Storage<T, W, BN, Groups, sums>;
  auto& shared = shared_storage<Memory>();
  constexpr bool by_query = sums == Sums::dq, with_first = sums != Sums::dv;
  constexpr bool with_second = sums == Sums::dk_dv || sums == Sums::dv;
  constexpr bool ahead =
      !Extras && (W <= 64 || sums == Sums::dv || (sums == Sums::dq && W <= 128));  // what the registers hold
  constexpr int stages = Memory::stages;
  const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / group_threads, 0) - 1;
  const int64_t sharing = by_query ? 1 : p.G, heads = p.H / sharing, key_heads = p.H / p.G;
  const Place at = place_of(by_query ? static_cast<int64_t>(gridDim.x) - 1 - blockIdx.x : blockIdx.x, heads, blocks);
  const Example e = example(p, at.b);
  const int64_t own0 = at.block * Memory::rows, own_rows = by_query ? e.L : e.S;
  // Rows to write: keys beyond a length exist in memory and have gradient 0.
  const int64_t kept_rows = by_query ? e.L : (p.cu_k != nullptr ? e.S : p.S);
  if (own0 >= kept_rows) return;
  const int64_t end = own0 + Memory::rows < own_rows ? own0 + Memory::rows : own_rows;
  const Range all = range_of<by_query>(e, own0, end);
  Steps<Extras, BN, Groups> step(p, tiles, at.b, at.block * Groups, at.h * sharing, sharing, all);
  if (threadIdx.x == 0) {
    mbarrier_init(&shared.own_full, 1);
    shared.firsts.init(Groups);
    shared.seconds.init(Groups);
    fence_barrier_init();
  }
  __syncthreads();

  if (group < 0) {
    setmaxnreg_dec<fetching_registers>();
    if (threadIdx.x >= 32 || !step.there()) return;
    const bool leader = threadIdx.x == 0;
    const int other_rows = static_cast<int>(by_query ? e.S : e.L);
    const bool goes_on = p.cu_q != nullptr || (by_query && p.lengths != nullptr);
    const int64_t key_head = by_query ? at.h / p.G : at.h;
    const int of_keys = matrix_of(p.k, at.b, key_heads, key_head),
              of_values = matrix_of(p.v, at.b, key_heads, key_head);
    if (leader) {
      mbarrier_arrive_expect_tx(&shared.own_full, Memory::own * Groups * Panel<T, group_rows, W>::bytes);
      for (int g = 0; g < Groups; ++g) {
        const int row = static_cast<int>((by_query ? e.q0 : e.k0) + own0) + g * group_rows;
        fetch(shared.own_rows[0][g], by_query ? maps.q : maps.k, row,
              by_query ? matrix_of(p.q, at.b, p.H, at.h) : of_keys, &shared.own_full);
        if constexpr (with_first)
          fetch(shared.own_rows[Memory::own - 1][g], by_query ? maps.dy : maps.v, row,
                by_query ? matrix_of(p.o, at.b, p.H, at.h) : of_values, &shared.own_full);
      }
    }
    for (int n = 0; step.there(); ++n, step.next()) {
      const int stage = n % stages, row = static_cast<int>(by_query ? e.k0 : e.q0) + step.other0;
      const int64_t h = step.h;
      const bool ragged = goes_on && step.other0 + BN > other_rows;
      const auto fill = [&](Panel<T, BN, W>& panel, Ring<stages>& ring, const TensorMap& map, int matrix, const T* from,
                            const Strides& stride, int64_t head, int64_t width) {
        if (ragged) {
          fetch_rows(panel, from + at.b * stride.batch + head * stride.head + row * stride.row, stride.row,
                     other_rows - step.other0, static_cast<int>(width));
          if (leader) mbarrier_arrive(&ring.full[stage]);
        } else if (leader) {
          mbarrier_arrive_expect_tx(&ring.full[stage], Panel<T, BN, W>::bytes);
          fetch(panel, map, row, matrix, &ring.full[stage]);
        }
      };
      shared.firsts.wait_free(n);
      if constexpr (by_query)
        fill(shared.first[stage], shared.firsts, maps.k, of_keys, t.k, p.k, key_head, p.D);
      else
        fill(shared.first[stage], shared.firsts, maps.q, matrix_of(p.q, at.b, p.H, h), t.q, p.q, h, p.D);
      shared.seconds.wait_free(n);
      if constexpr (by_query) {
        fill(shared.second[stage], shared.seconds, maps.v, of_values, t.v, p.v, key_head, p.E);
      } else {
        const int64_t statistics = at.b * p.lse_batch + h * p.lse_head + e.q0;
        for (int c = threadIdx.x; c < BN; c += 32) {
          const int64_t i = step.other0 + c;
          shared.lse[stage][c] = lse_or_none(t.lse_in + statistics, i, e.L, Extras ? 1.0f : log2_e);
          shared.delta[stage][c] = i < e.L ? t.delta[statistics + i] : 0.0f;
        }
        __syncwarp();
        fill(shared.second[stage], shared.seconds, maps.dy, matrix_of(p.o, at.b, p.H, h), t.dy, p.o, h, p.E);
      }
    }
  } else {
    setmaxnreg_inc<multiplying_registers<Groups>>();
    const int64_t row0 = own0 + group * group_rows, own = row0 + lane_row();
    const Range range[2] = {range_of<by_query>(e, own), range_of<by_query>(e, own + 8)};
    const Range seen = seen_by_all<by_query>(e, row0, own_rows);
    const bool counts[2] = {own < own_rows, own + 8 < own_rows}, there[2] = {own < kept_rows, own + 8 < kept_rows};
    const float scale = p.scale * log2_e;
    float row_lse[2], row_delta[2];
    if constexpr (by_query) {
      const int64_t statistics = at.b * p.lse_batch + at.h * p.lse_head + e.q0;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t i = own + half * 8;
        row_lse[half] = lse_or_none(t.lse_in + statistics, i, e.L, Extras ? 1.0f : log2_e);
        row_delta[half] = i < e.L ? t.delta[statistics + i] : 0.0f;
      }
    }
    float sum_first[with_first ? W / 2 : 2] = {}, sum_second[with_second ? W / 2 : 2] = {};
    if (step.there()) {
      float s[BN / 2], ds[with_first ? BN / 2 : 2];
      uint32_t weights[BN / 16][4], gradients[BN / 16][4];
      // Products begin and end in this order: s, ds, the second sum, the first one.
      constexpr int products = with_first ? 2 : 1, of_sums = with_first && with_second ? 2 : 1;
      const auto begin_products = [&](int n) {
        shared.firsts.wait_full(n);
        begin_scores<T, W, BN>(s, shared.own_rows[0][group], shared.first[n % stages]);
        shared.seconds.wait_full(n);
        if constexpr (with_first)
          begin_scores<T, W, BN>(ds, shared.own_rows[Memory::own - 1][group], shared.second[n % stages]);
      };
      const auto begin_sums = [&](int n) {
        if constexpr (with_second) begin_product<T, W, BN>(sum_second, weights, shared.second[n % stages]);
        if constexpr (with_first) begin_product<T, W, BN>(sum_first, gradients, shared.first[n % stages]);
      };
      const auto end_sums = [&](int n) {
        wgmma_wait<0>(sum_first, sum_second);
        shared.firsts.release(n);
        shared.seconds.release(n);
      };
      const auto lse_of = [&](int n, int c) {
        return by_query ? row_lse[c % 4 / 2] : shared.lse[n % stages][column_of(c)];
      };
      const auto delta_of = [&](int n, int c) {
        return by_query ? row_delta[c % 4 / 2] : shared.delta[n % stages][column_of(c)];
      };
      // s becomes weights ...
      const auto weigh = [&](int n) {
        if (step.other0 < seen.low || step.other0 + BN > seen.high) hide<BN>(s, range, step.other0);
#pragma unroll
        for (int c = 0; c < BN / 2; ++c) s[c] = exp2_approx(fmaf(s[c], scale, -lse_of(n, c)));
      };
      // ... and ds what the products give times the derivative of the softmax.
      const auto derive = [&](int n) {
        if constexpr (with_first)
#pragma unroll
          for (int c = 0; c < BN / 2; ++c) ds[c] = s[c] * (ds[c] - delta_of(n, c));
      };
      const auto weigh_and_derive = [&](int n) {
        const bool whole = step.other0 >= seen.low && step.other0 + BN <= seen.high;
        uint32_t kept[(BN + 63) / 64];
        if (p.random != nullptr) draw<by_query, BN>(kept, p, at.b, step.h, own, step.other0);
        if constexpr (with_first) {
          if (p.random != nullptr)
#pragma unroll
            for (int c = 0; c < BN / 2; ++c) ds[c] = bit(kept, c) ? ds[c] * p.keep_scale : 0.0f;
#pragma unroll
          for (int c = 0; c < BN / 2; ++c) ds[c] -= delta_of(n, c);
        }
        to_scores<T, by_query, BN>(s, p, e, {at.b, step.h, own, step.other0}, range, whole,
                                   step.walk.unchanged(group, step.other0), [&](int c, float derivative) {
                                     if constexpr (with_first) ds[c] *= derivative;
                                   });
#pragma unroll
        for (int c = 0; c < BN / 2; ++c) {
          s[c] = exp2_approx((s[c] - lse_of(n, c)) * log2_e);
          if constexpr (with_first) ds[c] *= s[c];
        }
        if (with_second && p.random != nullptr)
#pragma unroll
          for (int c = 0; c < BN / 2; ++c) s[c] = bit(kept, c) ? s[c] : 0.0f;
      };
      const auto to_operands = [&] {
        if constexpr (with_second) to_operand<T, BN>(weights, s);
        if constexpr (with_first) to_operand<T, BN>(gradients, ds);
      };
      mbarrier_wait(&shared.own_full, 0);
      if constexpr (ahead) {  // the sums of a tile are taken while the next one is weighed
        begin_products(0);
        wgmma_wait<products - 1>(s);
        weigh(0);
        wgmma_wait<0>(ds);
        derive(0);
        to_operands();
        step.next();
        int n = 1;
#pragma unroll 1
        for (; step.there(); step.next(), ++n) {
          begin_products(n);
          begin_sums(n - 1);
          wgmma_wait<products - 1 + of_sums>(s);
          weigh(n);
          finish(s);
          wgmma_wait<of_sums>(ds);
          derive(n);
          end_sums(n - 1);
          to_operands();
        }
        begin_sums(n - 1);
        end_sums(n - 1);
      } else {
#pragma unroll 1
        for (int n = 0; step.there(); step.next(), ++n) {
          begin_products(n);
          if constexpr (Extras) {
            wgmma_wait<0>(s, ds);
            weigh_and_derive(n);
          } else {
            wgmma_wait<products - 1>(s);
            weigh(n);
            finish(s);
            wgmma_wait<0>(ds);
            derive(n);
          }
          to_operands();
          begin_sums(n);
          end_sums(n);
        }
      }
    }
    T* const to_first = by_query ? t.dq + at.b * p.q.batch + at.h * p.q.head + (e.q0 + own) * p.q.row
                                 : t.dk + at.b * p.dk.batch + at.h * p.dk.head + (e.k0 + own) * p.dk.row;
    T* const to_second = t.dv + at.b * p.dv.batch + at.h * p.dv.head + (e.k0 + own) * p.dv.row;
    const float kept_scale = Extras && p.random != nullptr ? p.keep_scale : 1.0f;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if constexpr (with_first) {
        if (!counts[half])  // whatever stands in a key that does not
#pragma unroll
          for (int c = half * 2; c < W / 2; c += 4) sum_first[c] = sum_first[c + 1] = 0.0f;
        store_row<T, W>(to_first + half * 8 * (by_query ? p.q.row : p.dk.row), there[half], static_cast<int>(p.D),
                        sum_first, half, p.scale);
      }
      if constexpr (with_second) {
        if (!counts[half])
#pragma unroll
          for (int c = half * 2; c < W / 2; c += 4) sum_second[c] = sum_second[c + 1] = 0.0f;
        store_row<T, W>(to_second + half * 8 * p.dv.row, there[half], static_cast<int>(p.E), sum_second, half,
                        kept_scale);
      }
    }
  }
}

// Host

template <class T, int W, int BN, Sums sums, bool Extras>
void launch_backward(const Problem<float>& p, const Tensors<T>& t, const Tiles& tiles, cudaStream_t stream) {
  constexpr int groups = 2;
  constexpr bool by_query = sums == Sums::dq;
  using Memory = Storage<T, W, BN, groups, sums>;
  const int64_t blocks = ceil_div(by_query ? p.L : p.S, Memory::rows), heads = by_query ? p.H : p.H / p.G;
  launch(attention_bwd_wgmma_kernel<T, W, BN, groups, sums, Extras>,
         {.grid = static_cast<unsigned>(p.B * heads * blocks),
          .block = Memory::threads,
          .smem = sizeof(Memory),
          .stream = stream},
         p, t, by_query ? maps_of(p, t, group_rows, BN) : maps_of(p, t, BN, group_rows), blocks, tiles);
}

// Rows of a tile: of keys for dq, of queries for dk and dv, for dv alone. As many as the registers hold without spilling.
template <class T, int W, int Q, int K, int V, bool Extras>
void launch_all(const Problem<float>& p, const Tensors<T>& t, uint8_t* state, cudaStream_t stream) {
  launch_backward<T, W, Q, Sums::dq, Extras>(p, t, look_at_tiles<T>(p, true, Q, state, stream), stream);
  const Tiles of_keys = look_at_tiles<T>(p, false, K, state, stream);
  if constexpr (W <= 128) {
    launch_backward<T, W, K, Sums::dk_dv, Extras>(p, t, of_keys, stream);
  } else {
    launch_backward<T, W, K, Sums::dk, Extras>(p, t, of_keys, stream);
    launch_backward<T, W, V, Sums::dv, Extras>(p, t, look_at_tiles<T>(p, false, V, state, stream), stream);
  }
}

template <class T, bool Extras>
void launch_width(const Problem<float>& p, const Tensors<T>& t, uint8_t* state, cudaStream_t stream) {
  const int64_t width = p.D > p.E ? p.D : p.E;
  if (width <= 64)
    launch_all<T, 64, 128, 64, 64, Extras>(p, t, state, stream);
  else if (width <= 128)
    launch_all<T, 128, 96, 64, 64, Extras>(p, t, state, stream);
  else if (width <= 192)
    launch_all<T, 192, 64, 64, 80, Extras>(p, t, state, stream);
  else
    launch_all<T, 256, 48, 48, 64, Extras>(p, t, state, stream);
}

}  // namespace
}  // namespace hopper

template <class T>
void backward_hopper(const Problem<float>& p, const Tensors<T>& t, uint8_t* state, cudaStream_t stream) {
  if (needs_extras(p))
    hopper::launch_width<T, true>(p, t, state, stream);
  else
    hopper::launch_width<T, false>(p, t, state, stream);
}

template void backward_hopper(const Problem<float>&, const Tensors<bf16>&, uint8_t*, cudaStream_t);
template void backward_hopper(const Problem<float>&, const Tensors<fp16>&, uint8_t*, cudaStream_t);

}  // namespace pyops::attention
