// Philox4x32-10 (Salmon et al. 2011), the counter-based generator behind curand and torch: a random number is a
// function of (seed, offset, index), so a backward pass draws the mask of its forward pass again and every backend
// draws the same one.
//
//   words w[0..3] of group g = philox(key = seed, counter = (g, offset));  element i takes word i % 4 of group i / 4
//
// pyops/core/random.py draws (seed, offset) from torch's generator and states the same arithmetic in torch;
// kernels/_random.py states it in Triton.
#pragma once

#include <cstdint>

#include "common/qualifiers.h"

namespace pyops {

struct Words4 {
  uint32_t word[4];
  PYOPS_HOST_DEVICE uint32_t operator[](int i) const { return word[i]; }
};
struct Uniform4 {
  float value[4];
  PYOPS_HOST_DEVICE float operator[](int i) const { return value[i]; }
};

// 128 random bits of the stream (seed, subsequence) at position offset, in curand's counter layout.
PYOPS_HOST_DEVICE Words4 philox4x32(uint64_t seed, uint64_t subsequence, uint64_t offset) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  uint32_t c0 = static_cast<uint32_t>(offset), c1 = static_cast<uint32_t>(offset >> 32);
  uint32_t c2 = static_cast<uint32_t>(subsequence), c3 = static_cast<uint32_t>(subsequence >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0, p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ key0, n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ key1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// (0, 1]: 24 bits would fold into 1.0f either way, so the open end is at 0, where log is not defined.
PYOPS_HOST_DEVICE float uniform_from_bits(uint32_t bits) { return (static_cast<float>(bits >> 8) + 1.0f) * 0x1p-24f; }

PYOPS_HOST_DEVICE Uniform4 philox_uniform4(uint64_t seed, uint64_t subsequence, uint64_t offset) {
  const Words4 r = philox4x32(seed, subsequence, offset);
  return {{uniform_from_bits(r[0]), uniform_from_bits(r[1]), uniform_from_bits(r[2]), uniform_from_bits(r[3])}};
}

// The random numbers of one call of one op, from the (seed, offset) tensor drawn by pyops/core/random.py.
struct RandomStream {
  uint64_t seed, offset;
  PYOPS_HOST_DEVICE explicit RandomStream(const int64_t* state)
      : seed(static_cast<uint64_t>(state[0])), offset(static_cast<uint64_t>(state[1])) {}
  // Bits of the elements 4 * group .. 4 * group + 3.
  PYOPS_HOST_DEVICE Words4 words(int64_t group) const { return philox4x32(seed, offset, static_cast<uint64_t>(group)); }
  PYOPS_HOST_DEVICE uint32_t bits(int64_t element) const { return words(element / 4)[static_cast<int>(element % 4)]; }
};

// Dropout: an element stays where its 31 upper bits reach the threshold round(p * 2^31), so that p = 1 drops all.
PYOPS_HOST_DEVICE bool is_kept(uint32_t bits, uint32_t threshold) { return (bits >> 1) >= threshold; }

}  // namespace pyops
