// Philox4x32-10 (Salmon et al. 2011): the counter-based generator behind curand and torch. Shared by both compilers.
#pragma once

namespace pyops {

// 128 random bits of the stream (seed, subsequence) at position offset, in curand's counter layout.
PYOPS_HOST_DEVICE Vec<uint32_t, 4> philox4x32(uint64_t seed, uint64_t subsequence, uint64_t offset) {
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

PYOPS_HOST_DEVICE Vec<float, 4> philox_uniform4(uint64_t seed, uint64_t subsequence, uint64_t offset) {
  const Vec<uint32_t, 4> r = philox4x32(seed, subsequence, offset);
  return {{uniform_from_bits(r[0]), uniform_from_bits(r[1]), uniform_from_bits(r[2]), uniform_from_bits(r[3])}};
}

}  // namespace pyops
