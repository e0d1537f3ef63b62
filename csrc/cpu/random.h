// The words of common/philox.h in vectors: a vector of 64-bit lanes runs as many groups of four words side by side.
#pragma once

#include "common/philox.h"
#include "cpu/simd.h"

namespace pyops::PYOPS_CPU_CAPABILITY {

namespace simd {

using Lanes64 = Native<uint64_t>;

// Products of the low halves of the lanes.
PYOPS_INLINE Lanes64 multiply_low(const Lanes64& a, const Lanes64& b) {
#if defined(__AVX512F__)
  return bits_as<Lanes64>(_mm512_maskz_mul_epu32(0xff, bits_as<__m512i>(a), bits_as<__m512i>(b)));
#elif defined(__AVX2__)
  return bits_as<Lanes64>(_mm256_mul_epu32(bits_as<__m256i>(a), bits_as<__m256i>(b)));
#elif defined(__x86_64__)
  return bits_as<Lanes64>(_mm_mul_epu32(bits_as<__m128i>(a), bits_as<__m128i>(b)));
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

template <size_t... i>
PYOPS_INLINE void write_interleaved(uint32_t* to, const Lanes64& a, const Lanes64& b, std::index_sequence<i...>) {
  constexpr int lanes = int(sizeof...(i));
  const Lanes64 low = __builtin_shufflevector(a, b, int(i / 2 + i % 2 * lanes)...);
  const Lanes64 high = __builtin_shufflevector(a, b, int(i / 2 + lanes / 2 + i % 2 * lanes)...);
  std::memcpy(to, &low, sizeof low);
  std::memcpy(to + 2 * lanes, &high, sizeof high);
}

}  // namespace simd

inline constexpr int64_t words_at_once = vector_bytes / 2;

// The words of groups [group, group + words_at_once / 4), four each, in order.
PYOPS_INLINE void philox_words(const RandomStream& stream, int64_t group, uint32_t* to) {
  using simd::Lanes64;
  constexpr int64_t lanes = vector_bytes / 8;
  const uint64_t low = 0xffffffffu;
  Lanes64 c0, c1, c2 = Lanes64{} + (stream.offset & low), c3 = Lanes64{} + (stream.offset >> 32);
  for (int64_t j = 0; j < lanes; ++j) c0[j] = uint64_t(group + j);
  c1 = c0 >> 32;
  uint64_t key0 = stream.seed & low, key1 = stream.seed >> 32;
  const Lanes64 m0 = Lanes64{} + uint64_t(0xD2511F53u), m1 = Lanes64{} + uint64_t(0xCD9E8D57u);
  // The upper halves of the lanes hold what is left over: the product does not read them.
  for (int round = 0; round < 10; ++round) {
    const Lanes64 p0 = simd::multiply_low(c0, m0), p1 = simd::multiply_low(c2, m1);
    c0 = (p1 >> 32) ^ c1 ^ key0;
    c2 = (p0 >> 32) ^ c3 ^ key1;
    c1 = p1;
    c3 = p0;
    key0 = (key0 + 0x9E3779B9u) & low;
    key1 = (key1 + 0xBB67AE85u) & low;
  }
  simd::write_interleaved(to, (c0 & low) | (c1 << 32), (c2 & low) | (c3 << 32),
                          std::make_index_sequence<size_t(lanes)>());
}

// The words of elements [first, first + count).
inline void random_words(const RandomStream& stream, int64_t first, int64_t count, uint32_t* to) {
  uint32_t some[words_at_once];
  if (first % 4 != 0) {
    philox_words(stream, first / 4, some);
    const int64_t n = 4 - first % 4 < count ? 4 - first % 4 : count;
    std::memcpy(to, some + first % 4, size_t(n) * sizeof(uint32_t));
    first += n, to += n, count -= n;
  }
  for (; count >= words_at_once; count -= words_at_once, first += words_at_once, to += words_at_once)
    philox_words(stream, first / 4, to);
  if (count > 0) {
    philox_words(stream, first / 4, some);
    std::memcpy(to, some, size_t(count) * sizeof(uint32_t));
  }
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY
