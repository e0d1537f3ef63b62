// Which algorithm convolves on the CPU, and the memory it takes. The host module says it to `python -m pyops explain`,
// so this header needs neither torch nor vectors.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <string>

#include "common/conv.h"

namespace pyops::conv_choice {

// Sums over taps ("gemm"): packed or shifted columns of a block of pixels for each thread, and packed weights.
inline constexpr int64_t column_bytes = 512 << 10, weight_bytes = 16 << 20;
// Winograd: transformed weights, in all or near a core; transformed tiles of a block and their sums.
inline constexpr int64_t winograd_weight_bytes = 12 << 20, winograd_near_bytes = 512 << 10;
inline constexpr int64_t winograd_block_bytes = 2 << 20;

// A filter of 3 x 3 neighbours that moves by one, over one plane.
inline bool is_winograd_shape(const conv::Space& s) {
  const auto side = [](const conv::Axis& a) {
    return a.taps == 3 && a.in_step == 1 && std::abs(a.tap_step) == 1 && a.out_step == 1 && a.out_base == 0 &&
           a.out_size == a.count;
  };
  const conv::Axis& d = s.d;
  const bool flat = d.taps == 1 && d.size == 1 && d.count == 1 && d.in_base == 0 && d.out_size == 1;
  return flat && side(s.h) && side(s.w) && s.in_plane() < (int64_t(1) << 30);
}

// Tiles of m x m outputs.
inline double winograd_tiles(const conv::Space& s, int64_t N, int64_t m) {
  return double(N) * double((s.h.count + m - 1) / m) * double((s.w.count + m - 1) / m);
}

// Cost in multiplications of the products; moving an element through a transform costs about 30 of them for each point
// (measured with AVX2: between 25 and 45).
inline double winograd_cost(const conv::Space& s, int64_t N, int64_t C, int64_t M, int64_t m) {
  const double points = double((m + 2) * (m + 2)), tiles = winograd_tiles(s, N, m), transform = 30;
  const double repeats = std::max(1.0, points * double(C) * double(M) * 4 / double(winograd_weight_bytes));
  return points * (tiles * double(C) * double(M) +
                   transform * (tiles * (double(C) * repeats + double(M)) + double(C) * double(M)));
}

// m of F(m x m, 3 x 3) in float32, or 0: a sum over taps. N examples; of one group C channels are summed and M computed.
// "" takes the cheapest; the larger m, which rounds more, has to be cheaper by a fifth.
inline int winograd_tile(const conv::Space& s, int64_t N, int64_t C, int64_t M, const std::string& algorithm) {
  if (!is_winograd_shape(s) || N == 0 || C == 0 || M == 0) return 0;
  if (algorithm == "winograd2") return 2;
  if (algorithm == "winograd4") return 4;
  if (algorithm != "" || C < 16 || M < 16) return 0;
  const double taps = 9 * double(C) * double(M) * double(N) * double(s.positions());
  const double small = winograd_cost(s, N, C, M, 2), large = winograd_cost(s, N, C, M, 4);
  if (std::min(small, large) > 0.95 * taps) return 0;
  return large < 0.8 * small ? 4 : 2;
}

// Upper bounds of the temporary memory in bytes, of sums in numbers of `size` bytes.
inline int64_t workspace(const conv::Space& s, int64_t N, int64_t C, int64_t M, int64_t G, int tile, int64_t threads,
                         int64_t size) {
  if (tile == 0) {
    const int64_t weights = C * M * G * s.taps() * size;
    return threads * column_bytes + std::min(weights, weight_bytes);
  }
  const double points = (tile + 2) * (tile + 2) * 4.0;
  return int64_t(std::min(points * double(C) * double(M), double(winograd_weight_bytes)) +
                 std::min(points * double(C + M) * winograd_tiles(s, N, tile), double(winograd_block_bytes)));
}

// The gradient in the weight (conv_weight.h): copies, a block of sums and its operands for each thread; parts of dw.
inline int64_t weight_gradient_workspace(int64_t threads, int64_t size) {
  return threads * (column_bytes + size * (512 << 10)) + (8 << 20);
}

}  // namespace pyops::conv_choice
