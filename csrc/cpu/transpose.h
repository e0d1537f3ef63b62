// Elements exchanged between vectors: a matrix turned, in blocks of as many rows as a vector has lanes; every second
// element, every fourth one.
#pragma once

#include "cpu/simd.h"

namespace pyops::PYOPS_CPU_CAPABILITY {

namespace simd {

// Of two rows that are `distance` apart, halves are exchanged: all distances together transpose a block.
template <int distance, size_t... lane>
PYOPS_INLINE void exchange(Bits& a, Bits& b, std::index_sequence<lane...>) {
  constexpr size_t W = sizeof...(lane);
  const Bits low = __builtin_shufflevector(a, b, int(lane & distance ? W + lane - distance : lane)...);
  b = __builtin_shufflevector(a, b, int(lane & distance ? W + lane : lane + distance)...);
  a = low;
}
template <int distance = Vec<float>::width / 2>
PYOPS_INLINE void transpose(Bits (&block)[Vec<float>::width]) {
  constexpr int W = Vec<float>::width;
#pragma GCC unroll 16
  for (int r = 0; r < W; ++r)
    if ((r & distance) == 0) exchange<distance>(block[r], block[r + distance], std::make_index_sequence<W>());
  if constexpr (distance > 1) transpose<distance / 2>(block);
}

}  // namespace simd

// to[i * to_row + r] = from[r * from_row + i] for r < rows, i < width; zero for r in [rows, filled).
template <class acc_t, class To, class T>
void transpose(To* to, int64_t to_row, const T* from, int64_t from_row, int64_t rows, int64_t width, int64_t filled) {
  if constexpr (std::is_same_v<acc_t, float>) {
    constexpr int64_t W = Vec<float>::width;
    for (int64_t r0 = 0; r0 < filled; r0 += W)
      each_vector<float>(width, [&](int64_t i, auto lanes) {
        simd::Bits block[W];
#pragma GCC unroll 16
        for (int64_t r = 0; r < W; ++r)
          block[r] = r0 + r < rows
                         ? simd::bits_as<simd::Bits>(Vec<float>::load(from + (r0 + r) * from_row + i, lanes).v)
                         : simd::Bits{};
        simd::transpose(block);
#pragma GCC unroll 16
        for (int64_t n = 0; n < W; ++n) {
          if (i + n >= width) break;
          const Vec<float> line(simd::bits_as<simd::Native<float>>(block[n]));
          if (r0 + W <= filled)
            line.store(to + (i + n) * to_row + r0);
          else
            line.store(to + (i + n) * to_row + r0, FirstLanes{filled - r0});
        }
      });
  } else {
    for (int64_t i = 0; i < width; ++i)
      for (int64_t r = 0; r < filled; ++r) to[i * to_row + r] = r < rows ? To(from[r * from_row + i]) : To(0);
  }
}

// Columns as rows of `stride` values, zero beyond `rows`.
template <class acc_t, class T>
void pack_columns(acc_t* to, int64_t stride, const T* from, int64_t from_row, int64_t rows, int64_t width) {
  transpose<acc_t>(to, stride, from, from_row, rows, width, stride);
}

// Elements 2 i and 2 i + 1 of two vectors that stand one after the other, and back.
template <class V, int... i>
PYOPS_INLINE void unzip(const V& first, const V& second, V& even, V& odd, std::integer_sequence<int, i...>) {
  even = V(__builtin_shufflevector(first.v, second.v, (2 * i)...));
  odd = V(__builtin_shufflevector(first.v, second.v, (2 * i + 1)...));
}
template <class V, int... i>
PYOPS_INLINE void zip(const V& even, const V& odd, V& first, V& second, std::integer_sequence<int, i...>) {
  constexpr int W = int(V::width);
  first = V(__builtin_shufflevector(even.v, odd.v, (i / 2 + i % 2 * W)...));
  second = V(__builtin_shufflevector(even.v, odd.v, (i / 2 + i % 2 * W + W / 2)...));
}

// v[j][i] = from[m i + j], and back.
template <class V, class T>
PYOPS_INLINE void deinterleave(const T* from, V (&v)[2]) {
  unzip(V::load(from), V::load(from + V::width), v[0], v[1], std::make_integer_sequence<int, int(V::width)>{});
}
template <class V>
PYOPS_INLINE void deinterleave(const float* from, V (&v)[4]) {
  V low[2], high[2];
  deinterleave(from, low), deinterleave(from + 2 * V::width, high);
  for (int j = 0; j < 2; ++j) unzip(low[j], high[j], v[j], v[j + 2], std::make_integer_sequence<int, int(V::width)>{});
}
template <class V>
PYOPS_INLINE void interleave(const V (&v)[2], float* to) {
  V first, second;
  zip(v[0], v[1], first, second, std::make_integer_sequence<int, int(V::width)>{});
  first.store(to), second.store(to + V::width);
}
template <class V>
PYOPS_INLINE void interleave(const V (&v)[4], float* to) {
  V even[2], odd[2];  // elements 0 and 2 of every four, 1 and 3
  zip(v[0], v[2], even[0], even[1], std::make_integer_sequence<int, int(V::width)>{});
  zip(v[1], v[3], odd[0], odd[1], std::make_integer_sequence<int, int(V::width)>{});
  for (int half = 0; half < 2; ++half) interleave<V>({even[half], odd[half]}, to + half * 2 * V::width);
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY
