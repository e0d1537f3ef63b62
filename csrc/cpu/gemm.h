// Matrix product in registers: a tile of R rows and two vectors of columns is summed over all of K without leaving the
// first cache. The caller packs the operands and stores the tile, so that what is multiplied need not exist as a
// matrix: a convolution packs pixels of an image (conv.cpp).
//
//   Tile<acc_t>::rows, Tile<acc_t>::columns     the largest tile
//   tile_product(rows, columns, K, a, b, tile)  tile[m * Tile::columns + n] = sum_k A[m,k] * B[k,n]
//
// packed operands
//   A  a chunk of 16 k at a time, row after row within a chunk: a[(k / 16) * rows * 16 + m * 16 + k % 16]. A chunk of a
//      row is one cache line of float, so packing copies lines, and the product reads one stream.
//   B  row after row of Tile::columns: b[k * Tile::columns + n]
// Either may stay where it is: column k of A at a + offset[k] (OffsetColumns), row k of B at b + offset[k] (OffsetRows).
// `rows` is one of Tile::round(m), of which the rows past m are computed and never looked at.
#pragma once

#include <algorithm>

#include "cpu/transpose.h"

namespace pyops::PYOPS_CPU_CAPABILITY {

inline constexpr int64_t chunk = 16;
// A sum is taken in blocks of so many products, and the blocks are added: rounding grows with sqrt(sum_block + K /
// sum_block) where one running sum grows with sqrt(K), 68 against 12 roundings for the 4608 products of a 3 x 3 filter
// on 512 channels.
inline constexpr int64_t sum_block = 64;

template <class acc_t>
struct Tile {
  static constexpr int64_t vector = Vec<acc_t>::width;
  static constexpr int64_t columns = 2 * vector;
#if defined(__AVX512F__)
  static constexpr int64_t rows = 14;
#else
  static constexpr int64_t rows = 6;
#endif
  static constexpr int64_t round(int64_t m) { return m <= 1 ? 1 : (m + 1) / 2 * 2; }
  // Where tile i of the tiles that cover m rows begins: sides as equal as they can be, for a thin last tile would read
  // as much of B as a full one.
  static constexpr int64_t tiles(int64_t m) { return ceil_div(m, rows); }
  static constexpr int64_t begin(int64_t m, int64_t i) { return i == tiles(m) ? m : (m * i / tiles(m) + 1) / 2 * 2; }
  static constexpr int64_t packed_a(int64_t rows, int64_t K) { return ceil_div(K, chunk) * chunk * rows; }
};

// Where A stands: packed, or column k at a + offset[k], its elements next to each other.
template <class acc_t>
struct PackedA {
  const acc_t* a;
  template <int rows>
  PYOPS_INLINE acc_t at(int64_t chunk_begin, int64_t k, int m) const {
    return a[chunk_begin * rows + m * chunk + k];
  }
};
template <class acc_t>
struct OffsetColumns {
  const acc_t* a;
  const int32_t* offset;
  template <int rows>
  PYOPS_INLINE acc_t at(int64_t chunk_begin, int64_t k, int m) const {
    return a[offset[chunk_begin + k] + m];
  }
};

// Where the rows of B stand.
template <class acc_t>
struct PackedRows {
  const acc_t* b;
  PYOPS_INLINE const acc_t* row(int64_t k) const { return b + k * Tile<acc_t>::columns; }
};
template <class acc_t>
struct OffsetRows {
  const acc_t* b;
  const int32_t* offset;
  PYOPS_INLINE const acc_t* row(int64_t k) const { return b + offset[k]; }
};

namespace gemm {

template <int rows, int vectors, class Left, class Rows, class acc_t>
void tile_kernel(int64_t K, const Left a, const Rows b, acc_t* __restrict__ tile) {
  using V = Vec<acc_t>;
  constexpr int64_t columns = Tile<acc_t>::columns;
  for (int64_t start = 0; start < K || start == 0; start += sum_block) {
    V sum[rows][vectors];
    const int64_t end = K - start < sum_block ? K : start + sum_block;
    for (int64_t k0 = start; k0 < end; k0 += chunk) {
      const int64_t n = end - k0 < chunk ? end - k0 : chunk;
      for (int64_t k = 0; k < n; ++k) {
        V right[vectors];
        const acc_t* from = b.row(k0 + k);
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) right[v] = V::load(from + v * V::width);
#pragma GCC unroll 16
        for (int m = 0; m < rows; ++m) {
          const V left(a.template at<rows>(k0, k, m));
#pragma GCC unroll 2
          for (int v = 0; v < vectors; ++v) sum[m][v] = fma(left, right[v], sum[m][v]);
        }
      }
    }
#pragma GCC unroll 16
    for (int m = 0; m < rows; ++m)
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) {
        acc_t* to = tile + m * columns + v * V::width;
        (start == 0 ? sum[m][v] : sum[m][v] + V::load(to)).store(to);
      }
  }
}

template <int vectors, class Left, class Rows, class acc_t>
void tile_rows(int64_t rows, int64_t K, const Left& a, const Rows& b, acc_t* tile) {
  switch (rows) {
    case 1:
      return tile_kernel<1, vectors>(K, a, b, tile);
    case 2:
      return tile_kernel<2, vectors>(K, a, b, tile);
    case 4:
      return tile_kernel<4, vectors>(K, a, b, tile);
    case 6:
      return tile_kernel<6, vectors>(K, a, b, tile);
#if defined(__AVX512F__)
    case 8:
      return tile_kernel<8, vectors>(K, a, b, tile);
    case 10:
      return tile_kernel<10, vectors>(K, a, b, tile);
    case 12:
      return tile_kernel<12, vectors>(K, a, b, tile);
    default:
      return tile_kernel<14, vectors>(K, a, b, tile);
#endif
  }
}

}  // namespace gemm

template <class Left, class Rows, class acc_t>
  requires std::is_class_v<Left>
inline void tile_product(int64_t rows, int64_t columns, int64_t K, const Left& a, const Rows& b, acc_t* tile) {
  if (columns <= Vec<acc_t>::width)
    gemm::tile_rows<1>(rows, K, a, b, tile);
  else
    gemm::tile_rows<2>(rows, K, a, b, tile);
}

template <class acc_t>
inline void tile_product(int64_t rows, int64_t columns, int64_t K, const acc_t* a, const OffsetRows<acc_t>& b,
                         acc_t* tile) {
  tile_product(rows, columns, K, PackedA<acc_t>{a}, b, tile);
}

template <class acc_t>
inline void tile_product(int64_t rows, int64_t columns, int64_t K, const acc_t* a, const acc_t* b, acc_t* tile) {
  tile_product(rows, columns, K, PackedA<acc_t>{a}, PackedRows<acc_t>{b}, tile);
}

// Packs row m of A (n elements at `from`, contiguous, from position k on) into a panel of `rows` rows.
template <class acc_t, class T>
PYOPS_INLINE void pack_a_run(acc_t* panel, int64_t rows, int64_t m, int64_t k, const T* from, int64_t n) {
  using V = Vec<acc_t>;
  acc_t* line = panel + (k / chunk) * rows * chunk + m * chunk;
  int64_t i = 0, at = k % chunk;
  if (at == 0)
    for (; i + chunk <= n; i += chunk, line += rows * chunk)
      for (int64_t j = 0; j < chunk; j += V::width) V::load(from + i + j).store(line + j);
  for (; i < n; line += rows * chunk, at = 0) {
    const int64_t count = std::min(chunk - at, n - i);
    each_vector<acc_t>(count, [&](int64_t j, auto lanes) { V::load(from + i + j, lanes).store(line + at + j, lanes); });
    i += count;
  }
}

// As pack_a_run for elements `step` apart; zeros where `from` is null.
template <class acc_t, class T>
PYOPS_INLINE void pack_a_strided(acc_t* panel, int64_t rows, int64_t m, int64_t k, const T* from, int64_t step,
                                 int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const int64_t at = k + i;
    panel[(at / chunk) * rows * chunk + m * chunk + at % chunk] = from ? acc_t(from[i * step]) : acc_t(0);
  }
}

// Packs `count` neighbouring columns of n lines at `from`, `step` apart, as the rows of a panel.
template <class acc_t, class T>
PYOPS_INLINE void pack_a_columns(acc_t* panel, int64_t rows, const T* from, int64_t step, int64_t count, int64_t n) {
  for (int64_t k = 0; k < n; k += chunk) {
    const int64_t lines = std::min(chunk, n - k);
    transpose<acc_t>(panel + k * rows, chunk, from + k * step, step, lines, count, lines);
  }
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY
