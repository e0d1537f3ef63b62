// attention: which kernel takes a call, as far as sizes decide: for the kernels, and for `pyops explain` (host/module.cpp).
#pragma once

#include <cstdint>

namespace pyops::attention {

// CPU: the few queries of the heads that share a key head.
inline constexpr int64_t few_rows = 6;
inline bool has_few_queries(int64_t L, int64_t G) { return L * G <= few_rows; }

// CUDA: keys in parts, all query heads of a key head in one block.
inline constexpr int64_t decode_queries = 16;
inline bool may_decode(int64_t L, int64_t S) { return L > 0 && L <= decode_queries && S > 0; }

// CUDA, bf16 and fp16: head sizes that the warpgroup products of Hopper take.
inline bool suits_hopper_heads(int64_t D, int64_t E) {
  return D % 8 == 0 && E % 8 == 0 && D <= 256 && E <= 256;
}

}  // namespace pyops::attention
