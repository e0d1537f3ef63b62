// attention on Hopper: scores with soft cap, ALiBi, mask and dropout, for the kernels that have Extras.
//
// mapping  everything happens to scores in registers, one extra after the other over all of a lane's elements, so that each
//          costs nothing where it is not asked for. Before the kernel, attention_tiles_kernel looks at the mask tile by
//          tile, once for all heads that share it; what a tile's state hides is neither fetched nor multiplied, and where
//          it changes nothing, no mask is read. The warpgroup that fetches and those that multiply read the same states,
//          so they walk over the same tiles.
#pragma once

#include "cuda/attention_hopper.cuh"

namespace pyops::attention::hopper {

// Of 64 rows of one side and a tile of the other: bits of what their mask does.
inline constexpr unsigned shows_some = 1, changes_some = 2;

// The tiles of a kernel: BN rows of the other side against 64 of the own one. State [masks, blocks of 64, tiles].
struct Tiles {
  const uint8_t* state;  // null: no mask
  int64_t blocks, count;
  PYOPS_DEVICE const uint8_t* of(const Problem<float>& p, int64_t b, int64_t h, int64_t block) const {
    if (state == nullptr) return nullptr;
    const int64_t heads = p.mask_head != 0 ? p.H : 1;
    const int64_t mask = (p.mask_batch != 0 ? b : 0) * heads + (p.mask_head != 0 ? h : 0);
    return state + (mask * blocks + block) * count;
  }
};

// The tiles that a block of Groups warpgroups visits, from `low` (a multiple of BN) to `high`.
template <bool Extras, int BN, int Groups>
struct Walk {
  const uint8_t* state;  // of the block's first 64 rows
  int groups, count, high;
  PYOPS_DEVICE Walk(const Tiles& tiles, const uint8_t* state, int64_t first_block, int high)
      : state(state),
        groups(static_cast<int>(tiles.blocks - first_block < Groups ? tiles.blocks - first_block : Groups)),
        count(static_cast<int>(tiles.count)),
        high(high) {}
  // The first one from `at` on.
  PYOPS_DEVICE int from(int at) const {
    if constexpr (Extras)
      if (state != nullptr)
        for (; at < high; at += BN) {
          unsigned found = 0;
          for (int g = 0; g < groups; ++g) found |= state[g * count + at / BN];
          if (found & shows_some) break;
        }
    return at;
  }
  // Whether the mask leaves all scores of a warpgroup in the tile as they are.
  PYOPS_DEVICE bool unchanged(int group, int at) const {
    return state == nullptr || (group < groups && !(state[group * count + at / BN] & changes_some));
  }
};

// f of the mask of numbers that is there, as a pointer to what it holds.
template <class T, class F>
PYOPS_DEVICE void with_bias(const Problem<float>& p, const F& f) {
  if (p.bias != nullptr) return f(p.bias);
  if constexpr (std::is_same_v<T, bf16>)
    f(p.bias_bf16);
  else
    f(p.bias_fp16);
}

// tanh to some ulp of 1, and to some ulp of x where x is small.
PYOPS_DEVICE float fast_tanh(float x) {
  const float square = x * x, large = 1.0f - 2.0f * rcp_approx(exp2_approx(x * (2.0f * log2_e)) + 1.0f);
  const float small = x * (1.0f + square * (-1.0f / 3 + square * (2.0f / 15 - square * (17.0f / 315))));
  return square < 0.04f ? small : large;
}

// Where a lane's scores of a tile are.
struct TilePlace {
  int64_t b, h, own;  // own: first of the lane's two rows
  int other0;
};

// Which of a lane's elements its rows see, by their ranges and a boolean mask: bit n % 32 of word n / 32. A loop can index
// bits, and so its code is there once; it cannot index registers.
template <bool by_query, int BN>
PYOPS_DEVICE void look(uint32_t (&seen)[(BN + 63) / 64], const Problem<float>& p, const TilePlace& at,
                       const Range (&range)[2], bool masked) {
  const int64_t own_step = by_query ? p.mask_row : p.mask_column, step = by_query ? p.mask_column : p.mask_row;
  const bool* allowed = p.allowed;
  if (masked) allowed += mask_at(p, at.b, at.h, 0, 0) + at.own * own_step + (at.other0 + lane_column()) * step;
#pragma unroll
  for (int w = 0; w < (BN + 63) / 64; ++w) {
    uint32_t bits = 0;
#pragma unroll 2
    for (int j = w * 8; j < BN / 8 && j < w * 8 + 8; ++j) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int other = at.other0 + lane_column() + j * 8 + n % 2;
        bool sees = other >= range[n / 2].low && other < range[n / 2].high;
        if (masked && sees) sees = allowed[n / 2 * 8 * own_step + n % 2 * step];
        bits |= static_cast<uint32_t>(sees) << (j % 8 * 4 + n);
      }
      if (masked) allowed += step * 8;
    }
    seen[w] = bits;
  }
}
template <int N>
PYOPS_DEVICE bool bit(const uint32_t (&bits)[N], int n) {
  return (bits[n / 32] >> (n % 32) & 1) != 0;
}

// Which of a lane's weights dropout keeps: bits as of `look`. Four keys of a query share a group of random words; the lanes
// that hold them draw a different group each, and exchange what they drew.
template <bool by_query, int BN>
PYOPS_DEVICE void draw(uint32_t (&kept)[(BN + 63) / 64], const Problem<float>& p, int64_t b, int64_t h, int64_t own,
                       int other0) {
  constexpr int sources = by_query ? 2 : 4;
  const int lane = static_cast<int>(threadIdx.x) % 32, source = by_query ? lane % 2 : lane / 4 % 4;
  const int first = by_query ? lane % 2 * 2 : lane / 4 % 4;  // of a lane's own keys within the group of four
  const int64_t row = own + (by_query ? source : source / 2) * 8;
  const RandomStream stream(p.random);
#pragma unroll
  for (int w = 0; w < (BN + 63) / 64; ++w) {
    uint32_t drawn = 0;  // of eight groups
#pragma unroll 1
    for (int j = w * 8; j < BN / 8 && j < w * 8 + 8; ++j) {
      const int64_t other = other0 + j * 8 + (by_query ? lane % 4 / 2 * 4 : lane % 4 * 2 + source % 2);
      const int64_t i = by_query ? row : other, key = by_query ? other : row;
      const Words4 word = stream.words(random_row(p, b, h, i) + key / 4);
#pragma unroll
      for (int n = 0; n < 4; ++n) drawn |= static_cast<uint32_t>(is_kept(word[n], p.threshold)) << (j % 8 * 4 + n);
    }
    kept[w] = 0;
#pragma unroll
    for (int n = 0; n < sources; ++n) {
      const int from = by_query ? lane / 2 * 2 + n : lane / 16 * 16 + n * 4 + lane % 4;
      const uint32_t bits = __shfl_sync(0xffffffffu, drawn, from) >> first;
      kept[w] |= by_query ? (bits & 0x33333333u) << n * 2 : (bits & 0x11111111u) << n;
    }
  }
}

// Scores from products. What a row does not see becomes -infinity; `capped(n, f)` is called where a soft cap changes
// element n, with its derivative. `whole`: ranges hide nothing here; `unchanged`: nor does the mask change anything.
template <class T, bool by_query, int BN, class F>
PYOPS_DEVICE void to_scores(float (&s)[BN / 2], const Problem<float>& p, const Example& e, const TilePlace& at,
                            const Range (&range)[2], bool whole, bool unchanged, const F& capped) {
  if (p.softcap != 0.0f) {
    const float unit = p.scale / p.softcap;
#pragma unroll
    for (int n = 0; n < BN / 2; ++n) {
      const float t = fast_tanh(s[n] * unit);
      s[n] = t * p.softcap;
      capped(n, 1.0f - t * t);
    }
  } else {
#pragma unroll
    for (int n = 0; n < BN / 2; ++n) s[n] *= p.scale;
  }
  if (p.slopes != nullptr) {
    const float slope = p.slopes[at.b * p.slopes_batch + at.h];
    const float away = static_cast<float>(at.own - at.other0 - lane_column() + (by_query ? e.shift : -e.shift));
#pragma unroll
    for (int n = 0; n < BN / 2; ++n)
      s[n] -= slope * fabsf(away + static_cast<float>(n % 4 / 2 * 8 - n / 4 * 8 - n % 2));
  }
  if (whole && unchanged) return;
  uint32_t seen[(BN + 63) / 64];
  look<by_query, BN>(seen, p, at, range, !unchanged && p.allowed != nullptr);
  if (!unchanged && p.allowed == nullptr) {
    const int64_t own_step = by_query ? p.mask_row : p.mask_column, step = by_query ? p.mask_column : p.mask_row;
    const int64_t from = mask_at(p, at.b, at.h, 0, 0) + at.own * own_step + (at.other0 + lane_column()) * step;
    with_bias<T>(p, [&](const auto* bias) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto* number = bias + from + half * 8 * own_step;
#pragma unroll
        for (int n = half * 2; n < BN / 2; n += 4, number += 8 * step) {
          if (bit(seen, n)) s[n] += static_cast<float>(*number);
          if (bit(seen, n + 1)) s[n + 1] += static_cast<float>(number[step]);
        }
      }
    });
  }
#pragma unroll
  for (int n = 0; n < BN / 2; ++n) s[n] = bit(seen, n) ? s[n] : -INFINITY;
}

// Host

// Different masks of a call.
inline int64_t masks_of(const Problem<float>& p) {
  return (p.mask_batch != 0 ? p.B : 1) * (p.mask_head != 0 ? p.H : 1);
}

// The tiles of a kernel whose blocks own queries, or keys, and walk over `size` rows of the other side; launches what looks
// at the mask into `state`, which is null where there is none.
template <class T>
Tiles look_at_tiles(const Problem<float>& p, bool by_query, int size, uint8_t* state, cudaStream_t stream);

}  // namespace pyops::attention::hopper
