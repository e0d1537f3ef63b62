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
// Rows of a block: of tensor cores (halves), of CUDA cores. Its tile of keys.
inline constexpr int64_t decode_rows_of_halves = 64, decode_rows_of_floats = 8, decode_tile = 64;

// Enough parts for a few blocks per processor, of at least a tile of keys each; 0 where decoding has nothing to gain.
// Tensor cores are busy with two blocks; those of fp32 are as small as the registers make them.
inline int64_t decode_parts(int64_t B, int64_t H, int64_t G, int64_t L, int64_t S, int64_t E, bool half,
                            int64_t processors) {
  if (!may_decode(L, S) || B * H == 0) return 0;
  const int64_t rows = G * L, per_block = half ? decode_rows_of_halves : decode_rows_of_floats;
  const int64_t blocks = B * (H / G) * ((rows + per_block - 1) / per_block), wanted = (half ? 2 : 4) * processors;
  const int64_t tiles = (S + decode_tile - 1) / decode_tile, enough = (wanted + blocks - 1) / blocks;
  const int64_t parts = enough < tiles ? enough : tiles;
  if (parts * B * H * L * E > INT32_MAX) return 0;  // the kernels count in int
  return parts > 1 || G > 1 ? parts : 0;
}

// CUDA, bf16 and fp16: head sizes that the warpgroup products of Hopper take.
inline bool suits_hopper_heads(int64_t D, int64_t E) { return D % 8 == 0 && E % 8 == 0 && D <= 256 && E <= 256; }

}  // namespace pyops::attention
