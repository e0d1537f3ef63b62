// Matrix products of bfloat16 on CPUs that multiply and add it in pairs (AVX512-BF16), with the interface of product.h's.
//
//   with_products<scalar_t>([&](auto products) {
//     using Products = decltype(products);  // Word: what its operands are packed as; step: values in a word
//     ...
//   });
//
// A word of BFloat16Products holds two values that follow one another along the dimension that is summed; of an odd
// number of values the last one's partner is 0. Sums are in float32, each step rounded to nearest even; subnormal numbers
// count as 0. Only functions with PYOPS_BFLOAT16 contain the instructions: the build needs no flag, and a CPU without them
// takes PlainProducts.
#pragma once

#include <algorithm>

#include "cpu/product.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define PYOPS_BFLOAT16 __attribute__((target("avx512bf16")))
#endif

namespace pyops::PYOPS_CPU_CAPABILITY {

// Operands in acc_t, whatever the type in memory.
template <class acc_t>
struct PlainProducts {
  using Word = acc_t;
  static constexpr int64_t step = 1;

  template <class T>
  static void pack_rows(Word* to, int64_t stride, const T* from, int64_t from_row, int64_t rows, int64_t width) {
    pyops::PYOPS_CPU_CAPABILITY::pack_rows(to, stride, from, from_row, rows, width);
  }
  template <class T>
  static void pack_columns(Word* to, int64_t stride, const T* from, int64_t from_row, int64_t rows, int64_t width) {
    pyops::PYOPS_CPU_CAPABILITY::pack_columns(to, stride, from, from_row, rows, width);
  }
  // Rows that are summed over, as the right operand of a product.
  template <class T>
  static void pack_summed(Word* to, int64_t stride, const T* from, int64_t from_row, int64_t rows, int64_t width) {
    pyops::PYOPS_CPU_CAPABILITY::pack_rows(to, stride, from, from_row, rows, width);
  }
  // Rows of `width` sums become words of a left operand, where they are.
  static Matrix<const Word> narrow_rows(Matrix<acc_t> s, int64_t, int64_t) { return {s.at, s.row, 1}; }
  // The transpose as a left operand, whose words stand in `to`, which may be s. An odd row is followed by one of zeros.
  static Matrix<const Word> narrow_columns(Matrix<acc_t>, Matrix<acc_t> s, int64_t, int64_t) {
    return {s.at, 1, s.row};
  }
  template <bool add>
  static void product(Matrix<const Word> a, Matrix<const Word> b, Matrix<acc_t> c, int64_t M, int64_t N, int64_t K) {
    pyops::PYOPS_CPU_CAPABILITY::product<add>(a, b, c, M, N, K);
  }
};

#if defined(PYOPS_BFLOAT16)

namespace simd {

template <bool add, int height, int columns>
PYOPS_BFLOAT16 PYOPS_INLINE void product_tile(Matrix<const uint32_t> a, Matrix<const uint32_t> b, Matrix<float> c,
                                              int64_t K) {
  __m512 sum[height][columns];
#pragma GCC unroll 8
  for (int m = 0; m < height; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < columns; ++n) sum[m][n] = _mm512_setzero_ps();
  for (int64_t k = 0; k < K; ++k) {
    __m512bh row[columns];
#pragma GCC unroll 8
    for (int n = 0; n < columns; ++n) row[n] = read<__m512bh>(b.at + k * b.row + n * 16);
#pragma GCC unroll 8
    for (int m = 0; m < height; ++m) {
      const auto pair = bits_as<__m512bh>(_mm512_set1_epi32(read<int>(a.at + m * a.row + k * a.column)));
#pragma GCC unroll 8
      for (int n = 0; n < columns; ++n) sum[m][n] = _mm512_dpbf16_ps(sum[m][n], pair, row[n]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < height; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < columns; ++n) {
      float* to = c.at + m * c.row + n * 16;
      if constexpr (add) sum[m][n] = _mm512_add_ps(sum[m][n], _mm512_loadu_ps(to));
      _mm512_storeu_ps(to, sum[m][n]);
    }
}

template <bool add, int height>
PYOPS_BFLOAT16 PYOPS_INLINE void product_tile_of(Matrix<const uint32_t> a, Matrix<const uint32_t> b, Matrix<float> c,
                                                 int64_t K, int columns) {
  switch (columns) {
    case 4:
      return product_tile<add, height, 4>(a, b, c, K);
    case 3:
      return product_tile<add, height, 3>(a, b, c, K);
    case 2:
      return product_tile<add, height, 2>(a, b, c, K);
    default:
      return product_tile<add, height, 1>(a, b, c, K);
  }
}

// As product() of acc_t, K in words. One or two rows, as decoding has them, take a third of the tile.
template <bool add>
PYOPS_BFLOAT16 void product(Matrix<const uint32_t> a, Matrix<const uint32_t> b, Matrix<float> c, int64_t M, int64_t N,
                            int64_t K) {
  for (int64_t n = 0; n < N; n += 64)
    for (int64_t m = 0; m < M; m += product_rows) {
      const Matrix<const uint32_t> rows{a.at + m * a.row, a.row, a.column}, panel{b.at + n, b.row, 1};
      const Matrix<float> block{c.at + m * c.row + n, c.row, 1};
      const int columns = int(std::min<int64_t>((N - n) / 16, 4));
      if (M - m > 2)
        product_tile_of<add, product_rows>(rows, panel, block, K, columns);
      else
        product_tile_of<add, 2>(rows, panel, block, K, columns);
    }
}

// Two vectors of float, rounded: the first in the low half.
PYOPS_BFLOAT16 PYOPS_INLINE Bits rounded(const float* first, const float* second) {
  return bits_as<Bits>(_mm512_cvtne2ps_pbh(_mm512_loadu_ps(second), _mm512_loadu_ps(first)));
}

// Rows of a multiple of 32 floats; what is written lies never beyond what is still to be read.
PYOPS_BFLOAT16 inline void narrow_rows(Matrix<float> s, int64_t rows, int64_t width) {
  for (int64_t r = 0; r < rows; ++r) {
    float* row = s.at + r * s.row;
    for (int64_t i = 0; i < width; i += 32) {
      const Bits pairs = rounded(row + i, row + i + 16);
      std::memcpy(row + i / 2, &pairs, sizeof pairs);
    }
  }
}

template <size_t... lane>
PYOPS_INLINE Bits interleaved(const Bits& halves, std::index_sequence<lane...>) {
  typedef uint16_t Values __attribute__((vector_size(vector_bytes)));
  const Values v = bits_as<Values>(halves);
  return bits_as<Bits>(__builtin_shufflevector(v, v, int(lane / 2 + lane % 2 * 16)...));
}

// Rows 2r and 2r + 1 become the low and the high halves of row r.
PYOPS_BFLOAT16 inline void narrow_columns(Matrix<float> to, Matrix<float> s, int64_t rows, int64_t width) {
  for (int64_t r = 0; r < rows; r += 2)
    for (int64_t i = 0; i < width; i += 16) {
      const float* even = s.at + r * s.row + i;
      const Bits pairs = interleaved(rounded(even, even + s.row), std::make_index_sequence<32>());
      std::memcpy(to.at + r / 2 * to.row + i, &pairs, sizeof pairs);
    }
}

}  // namespace simd

struct BFloat16Products {
  using Word = uint32_t;
  static constexpr int64_t step = 2;

  static bool are_here() { return __builtin_cpu_supports("avx512bf16"); }

  static void pack_rows(Word* to, int64_t stride, const bfloat16_t* from, int64_t from_row, int64_t rows,
                        int64_t width) {
    for (int64_t r = 0; r < rows; ++r) {
      to[r * stride + (width - 1) / 2] = 0;
      std::memcpy(to + r * stride, from + r * from_row, size_t(width) * sizeof *from);
      for (int64_t i = ceil_div(width, 2); i < stride; ++i) to[r * stride + i] = 0;
    }
  }
  // The stride is a multiple of 16.
  static void pack_columns(Word* to, int64_t stride, const bfloat16_t* from, int64_t from_row, int64_t rows,
                           int64_t width) {
    const int64_t words = ceil_div(width, 2);
    for (int64_t i = 0; i < words; i += 16) {
      const __mmask32 values = __mmask32(width - 2 * i >= 32 ? ~0u : (1u << (width - 2 * i)) - 1);
      for (int64_t r0 = 0; r0 < stride; r0 += 16) {
        simd::Bits block[16];
        const bfloat16_t* row = from + r0 * from_row + 2 * i;
#pragma GCC unroll 16
        for (int64_t r = 0; r < 16; ++r)
          block[r] =
              simd::bits_as<simd::Bits>(_mm512_maskz_loadu_epi16(r0 + r < rows ? values : 0, row + r * from_row));
        simd::transpose(block);
#pragma GCC unroll 16
        for (int64_t n = 0; n < 16; ++n)
          if (i + n < words) std::memcpy(to + (i + n) * stride + r0, block + n, sizeof *block);
      }
    }
  }
  static void pack_summed(Word* to, int64_t stride, const bfloat16_t* from, int64_t from_row, int64_t rows,
                          int64_t width) {
    for (int64_t r = 0; r < rows; r += 2, to += stride) {
      const bfloat16_t *even = from + r * from_row, *odd = even + from_row;
      each_vector<float>(width, [&](int64_t i, auto lanes) {
        simd::Bits pair = __builtin_convertvector(read(even + i, lanes), simd::Bits);
        if (r + 1 < rows) pair |= __builtin_convertvector(read(odd + i, lanes), simd::Bits) << 16;
        Vec<float>(simd::bits_as<simd::Native<float>>(pair)).store(reinterpret_cast<float*>(to) + i, lanes);
      });
      for (int64_t i = width; i < stride; ++i) to[i] = 0;
    }
  }
  static Matrix<const Word> narrow_rows(Matrix<float> s, int64_t rows, int64_t width) {
    simd::narrow_rows(s, rows, width);
    return {reinterpret_cast<const Word*>(s.at), s.row, 1};
  }
  static Matrix<const Word> narrow_columns(Matrix<float> to, Matrix<float> s, int64_t rows, int64_t width) {
    simd::narrow_columns(to, s, rows, width);
    return {reinterpret_cast<const Word*>(to.at), 1, to.row};
  }
  template <bool add>
  static void product(Matrix<const Word> a, Matrix<const Word> b, Matrix<float> c, int64_t M, int64_t N, int64_t K) {
    simd::product<add>(a, b, c, M, N, K);
  }

 private:
  static PYOPS_INLINE simd::Bits16 read(const bfloat16_t* p, AllLanes) { return simd::read<simd::Bits16>(p); }
  static PYOPS_INLINE simd::Bits16 read(const bfloat16_t* p, FirstLanes lanes) {
    return simd::read_first<simd::Bits16>(p, lanes.count);
  }
};

#endif

// The one choice between them.
template <class scalar_t, class F>
auto with_products(F&& f) {
#if defined(PYOPS_BFLOAT16)
  if constexpr (std::is_same_v<scalar_t, bfloat16_t>)
    if (BFloat16Products::are_here()) return f(BFloat16Products{});
#endif
  return f(PlainProducts<accumulate_t<scalar_t>>{});
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY
