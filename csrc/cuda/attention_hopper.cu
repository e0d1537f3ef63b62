// attention in bf16 and fp16 on Hopper's tensor cores (wgmma, sm_90a): forward, and what looks at masks for both passes.
//
// mapping  attention_hopper.cuh; a block owns queries. The tensor cores of a warpgroup have the next scores to compute while
//          it takes exponentials, and the warpgroups take turns in issuing products, so that one multiplies while another
//          takes exponentials.
// extras   masks, ALiBi, soft cap, dropout and scales that are not positive: attention_hopper_scores.cuh
// numerics products and sums in fp32, p rounded to T; deterministic
#include "cuda/attention_hopper_scores.cuh"

namespace pyops::attention {
namespace hopper {
namespace {

// Warpgroups issue their products one after the other, tile by tile.
template <int Groups>
struct Turns {
  int group;
  PYOPS_DEVICE void begin(bool first_tile) const {
    if (Groups > 1 && (group > 0 || !first_tile)) named_barrier_sync(1 + group, 2 * group_threads);
  }
  PYOPS_DEVICE void end(bool last_tile) const {
    if (Groups > 1 && (group < Groups - 1 || !last_tile))
      named_barrier_arrive(1 + (group + 1) % Groups, 2 * group_threads);
  }
};

template <class T, int W, int BN, int Groups>
struct Storage {
  static constexpr int rows = Groups * group_rows, threads = (Groups + 1) * group_threads;
  static constexpr int stages = stages_beside(sizeof(Panel<T, rows, W>), 2 * sizeof(Panel<T, BN, W>));
  Panel<T, group_rows, W> q[Groups];
  Panel<T, BN, W> k[stages], v[stages];
  uint64_t q_full;
  Ring<stages> keys, values;
};

// Weights of the scores of two rows, and what the sums so far are multiplied by. Extras: scores are as they are, and may be
// so large that they have no product with log2(e); otherwise they are products, and `unit` is their scale.
template <bool Extras, int BN>
struct OnlineSoftmax {
  float most[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f}, factor[2] = {0.0f, 0.0f};
  PYOPS_DEVICE void operator()(float (&s)[BN / 2], float unit) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = most[half];
#pragma unroll
      for (int n = half * 2; n < BN / 2; n += 4) top = fmaxf(top, fmaxf(s[n], s[n + 1]));
      top = warp_max<4>(top);
      const float largest = top == -INFINITY ? 0.0f : top, base = largest * unit;
      const auto weight = [&](float x) { return exp2_approx(Extras ? (x - largest) * log2_e : fmaf(x, unit, -base)); };
      factor[half] = weight(most[half]);
      most[half] = top;
      float part = 0.0f;
#pragma unroll
      for (int n = half * 2; n < BN / 2; n += 4) {
        s[n] = weight(s[n]);
        s[n + 1] = weight(s[n + 1]);
        part += s[n] + s[n + 1];
      }
      total[half] = total[half] * factor[half] + part;
    }
  }
};

template <class T, int W, int BN, int Groups, bool Extras>
__global__ void __launch_bounds__((Groups + 1) * group_threads, 1)
    attention_fwd_wgmma_kernel(Problem<float> p, Tensors<T> t, const __grid_constant__ Maps maps, int64_t blocks,
                               Tiles tiles) {
  auto& shared = shared_storage<Storage<T, W, BN, Groups>>();
  constexpr int rows = Groups * group_rows, stages = Storage<T, W, BN, Groups>::stages;
  const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / group_threads, 0) - 1;
  // Blocks with most keys first: a causal mask leaves the last queries the most work.
  const Place at = place_of(static_cast<int64_t>(gridDim.x) - 1 - blockIdx.x, p.H, blocks);
  const Example e = example(p, at.b);
  const int64_t i0 = at.block * rows, key_head = at.h / p.G;
  if (i0 >= e.L) return;
  const Range all = range_of<true>(e, i0, i0 + rows < e.L ? i0 + rows : e.L);
  const Walk<Extras, BN, Groups> walk(tiles, tiles.of(p, at.b, at.h, at.block * Groups), at.block * Groups, all.high);
  const int first = walk.from(all.low / BN * BN);
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
    const int matrix = matrix_of(p.q, at.b, p.H, at.h), of_keys = matrix_of(p.k, at.b, p.H / p.G, key_head),
              of_values = matrix_of(p.v, at.b, p.H / p.G, key_head);
    // Values after those of the example may be anything; keys too, but their scores are never looked at.
    const bool goes_on = p.lengths != nullptr || p.cu_k != nullptr;
    const T* v = t.v + at.b * p.v.batch + key_head * p.v.head + e.k0 * p.v.row;
    if (leader && first < all.high) {
      mbarrier_arrive_expect_tx(&shared.q_full, Groups * Panel<T, group_rows, W>::bytes);
      for (int g = 0; g < Groups; ++g)
        fetch(shared.q[g], maps.q, static_cast<int>(e.q0 + i0) + g * group_rows, matrix, &shared.q_full);
    }
    for (int n = 0, j0 = first; j0 < all.high; ++n, j0 = walk.from(j0 + BN)) {
      const int stage = n % stages;
      shared.keys.wait_free(n);
      if (leader) {
        mbarrier_arrive_expect_tx(&shared.keys.full[stage], Panel<T, BN, W>::bytes);
        fetch(shared.k[stage], maps.k, static_cast<int>(e.k0) + j0, of_keys, &shared.keys.full[stage]);
      }
      shared.values.wait_free(n);
      if (goes_on && j0 + BN > e.S) {
        fetch_rows(shared.v[stage], v + j0 * p.v.row, p.v.row, static_cast<int>(e.S) - j0, static_cast<int>(p.E));
        if (leader) mbarrier_arrive(&shared.values.full[stage]);
      } else if (leader) {
        mbarrier_arrive_expect_tx(&shared.values.full[stage], Panel<T, BN, W>::bytes);
        fetch(shared.v[stage], maps.v, static_cast<int>(e.k0) + j0, of_values, &shared.values.full[stage]);
      }
    }
  } else {
    setmaxnreg_inc<multiplying_registers<Groups>>();
    const int64_t row0 = i0 + group * group_rows, i = row0 + lane_row();
    const Range range[2] = {range_of<true>(e, i), range_of<true>(e, i + 8)}, seen = seen_by_all<true>(e, row0, e.L);
    const float unit = Extras ? log2_e : p.scale * log2_e;
    float o[W / 2] = {};
    OnlineSoftmax<Extras, BN> softmax;
    if (first < all.high) {
      float s[BN / 2];
      uint32_t weights[BN / 16][4];
      const auto weigh = [&](int j0) {
        const bool whole = j0 >= seen.low && j0 + BN <= seen.high;
        if constexpr (Extras) {
          to_scores<T, true, BN>(s, p, e, {at.b, at.h, i, j0}, range, whole, walk.unchanged(group, j0),
                                 [](int, float) {});
          softmax(s, unit);
          if (p.random != nullptr) {
            uint32_t kept[(BN + 63) / 64];
            draw<true, BN>(kept, p, at.b, at.h, i, j0);
#pragma unroll
            for (int n = 0; n < BN / 2; ++n) s[n] = bit(kept, n) ? s[n] : 0.0f;
          }
        } else {
          if (!whole) hide<BN>(s, range, j0);
          softmax(s, unit);
        }
      };
      mbarrier_wait(&shared.q_full, 0);
      if constexpr (Extras) {  // the products of one warpgroup hide behind the scores of the other
#pragma unroll 1
        for (int n = 0, j0 = first; j0 < all.high; ++n, j0 = walk.from(j0 + BN)) {
          shared.keys.wait_full(n);
          begin_scores<T, W, BN>(s, shared.q[group], shared.k[n % stages]);
          wgmma_wait<0>(s);
          shared.keys.release(n);
          weigh(j0);
#pragma unroll
          for (int c = 0; c < W / 2; ++c) o[c] *= softmax.factor[c % 4 / 2];
          to_operand<T, BN>(weights, s);
          shared.values.wait_full(n);
          begin_product<T, W, BN>(o, weights, shared.v[n % stages]);
          wgmma_wait<0>(o);
          shared.values.release(n);
        }
      } else {
        shared.keys.wait_full(0);
        begin_scores<T, W, BN>(s, shared.q[group], shared.k[0]);
        wgmma_wait<0>(s);
        shared.keys.release(0);
        weigh(first);
        to_operand<T, BN>(weights, s);
        const Turns<Groups> turns{group};
        int n = 1;
#pragma unroll 1
        for (int j0 = first + BN; j0 < all.high; j0 += BN, ++n) {
          shared.keys.wait_full(n);
          turns.begin(n == 1);
          begin_scores<T, W, BN>(s, shared.q[group], shared.k[n % stages]);
          shared.values.wait_full(n - 1);
          begin_product<T, W, BN>(o, weights, shared.v[(n - 1) % stages]);
          turns.end(j0 + BN >= all.high);
          wgmma_wait<1>(s);
          shared.keys.release(n);
          weigh(j0);
          finish(softmax.total);
          wgmma_wait<0>(o);
          shared.values.release(n - 1);
#pragma unroll
          for (int c = 0; c < W / 2; ++c) o[c] *= softmax.factor[c % 4 / 2];
          to_operand<T, BN>(weights, s);
        }
        shared.values.wait_full(n - 1);
        begin_product<T, W, BN>(o, weights, shared.v[(n - 1) % stages]);
        wgmma_wait<0>(o);
      }
    }
    const float kept_scale = Extras && p.random != nullptr ? p.keep_scale : 1.0f;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float total = warp_sum<4>(softmax.total[half]), most = softmax.most[half];
      const int64_t row = i + half * 8;
      store_row<T, W>(t.o + at.b * p.o.batch + at.h * p.o.head + (e.q0 + row) * p.o.row, row < e.L,
                      static_cast<int>(p.E), o, half, most == -INFINITY ? 0.0f : kept_scale / total);
      if (row < e.L && threadIdx.x % 4 == 0)
        t.lse[at.b * p.lse_batch + at.h * p.lse_head + e.q0 + row] =
            most == -INFINITY ? -INFINITY : (Extras ? most + log2f(total) * ln_2 : (most * unit + log2f(total)) * ln_2);
    }
  }
}

// Of one number of a mask.
PYOPS_DEVICE unsigned state_of(float number) {
  return number == -INFINITY ? changes_some : (number == 0.0f ? shows_some : shows_some | changes_some);
}

// One block looks at one tile: each warp at every fourth query, its lanes at neighbouring keys.
template <class T>
__global__ void __launch_bounds__(128)
    attention_tiles_kernel(Problem<float> p, Tiles tiles, int queries, int keys, bool by_query, uint8_t* state) {
  const int64_t index = blockIdx.x, tile = index % tiles.count, block = index / tiles.count % tiles.blocks;
  const int64_t mask = index / (tiles.count * tiles.blocks), heads = p.mask_head != 0 ? p.H : 1;
  const int64_t at = mask_at(p, mask / heads, mask % heads, 0, 0);
  const int64_t i0 = (by_query ? block : tile) * queries, j0 = (by_query ? tile : block) * keys;
  const int64_t i1 = i0 + queries < p.L ? i0 + queries : p.L, j1 = j0 + keys < p.S ? j0 + keys : p.S;
  constexpr unsigned both = shows_some | changes_some;
  unsigned found = 0;
  const auto each = [&](const auto& state_at) {
    for (int64_t i = i0 + threadIdx.x / 32; i < i1 && found != both; i += 4)
      for (int64_t j = j0 + threadIdx.x % 32; j < j1; j += 32)
        found |= state_at(at + i * p.mask_row + j * p.mask_column);
  };
  if (p.allowed != nullptr)
    each([&](int64_t n) { return p.allowed[n] ? shows_some : changes_some; });
  else
    with_bias<T>(p, [&](const auto* bias) { each([&](int64_t n) { return state_of(static_cast<float>(bias[n])); }); });
  const bool shown = __syncthreads_or(found & shows_some) != 0, changed = __syncthreads_or(found & changes_some) != 0;
  if (threadIdx.x == 0) state[index] = static_cast<uint8_t>((shown ? shows_some : 0) | (changed ? changes_some : 0));
}

// Host

template <class T, int W, int BN, bool Extras>
void launch_forward(const Problem<float>& p, const Tensors<T>& t, uint8_t* state, cudaStream_t stream) {
  constexpr int groups = 2;
  using Memory = Storage<T, W, BN, groups>;
  const int64_t blocks = ceil_div(p.L, Memory::rows);
  const Tiles tiles = look_at_tiles<T>(p, true, BN, state, stream);
  launch(attention_fwd_wgmma_kernel<T, W, BN, groups, Extras>,
         {.grid = static_cast<unsigned>(p.B * p.H * blocks),
          .block = Memory::threads,
          .smem = sizeof(Memory),
          .stream = stream},
         p, t, maps_of(p, t, group_rows, BN), blocks, tiles);
}

// Tiles as wide as the registers hold without spilling.
template <class T, bool Extras>
void launch_width(const Problem<float>& p, const Tensors<T>& t, uint8_t* state, cudaStream_t stream) {
  const int64_t width = p.D > p.E ? p.D : p.E;
  if (width <= 64)
    launch_forward<T, 64, 128, Extras>(p, t, state, stream);
  else if (width <= 128)
    launch_forward<T, 128, 128, Extras>(p, t, state, stream);
  else if (width <= 192)
    launch_forward<T, 192, 96, Extras>(p, t, state, stream);
  else
    launch_forward<T, 256, Extras ? 64 : 80, Extras>(p, t, state, stream);
}

}  // namespace

template <class T>
Tiles look_at_tiles(const Problem<float>& p, bool by_query, int size, uint8_t* state, cudaStream_t stream) {
  const Tiles tiles{state, ceil_div(by_query ? p.L : p.S, group_rows), ceil_div(by_query ? p.S : p.L, size)};
  if (state != nullptr)
    launch(attention_tiles_kernel<T>,
           {.grid = static_cast<unsigned>(masks_of(p) * tiles.blocks * tiles.count), .block = 128, .stream = stream}, p,
           tiles, by_query ? group_rows : size, by_query ? size : group_rows, by_query, state);
  return tiles;
}
template Tiles look_at_tiles<bf16>(const Problem<float>&, bool, int, uint8_t*, cudaStream_t);
template Tiles look_at_tiles<fp16>(const Problem<float>&, bool, int, uint8_t*, cudaStream_t);

}  // namespace hopper

template <class T>
void forward_hopper(const Problem<float>& p, const Tensors<T>& t, uint8_t* state, cudaStream_t stream) {
  if (needs_extras(p))
    hopper::launch_width<T, true>(p, t, state, stream);
  else
    hopper::launch_width<T, false>(p, t, state, stream);
}

template void forward_hopper(const Problem<float>&, const Tensors<bf16>&, uint8_t*, cudaStream_t);
template void forward_hopper(const Problem<float>&, const Tensors<fp16>&, uint8_t*, cudaStream_t);

}  // namespace pyops::attention
