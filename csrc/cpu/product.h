// Small matrix products inside a kernel: C[M, N] (+)= A[M, K] B[K, N], a block of C in registers.
//
// Lanes run along N, so B and C are row-major in whole vectors; A is read by single elements and may have any strides,
// so a transposed A costs nothing. M is rounded up to product_rows: the rows of A and C beyond M must be there.
#pragma once

#include "cpu/transpose.h"

namespace pyops::PYOPS_CPU_CAPABILITY {

// 6 x 4 accumulators and one row of B in 32 registers, 6 x 2 in 16.
inline constexpr int product_rows = 6;
#if defined(__AVX512F__)
inline constexpr int product_vectors = 4;
#else
inline constexpr int product_vectors = 2;
#endif

template <class acc_t>
struct Matrix {
  acc_t* at;
  int64_t row, column;  // strides
};

template <bool add, int columns, class acc_t>
PYOPS_INLINE void product_tile(Matrix<const acc_t> a, Matrix<const acc_t> b, Matrix<acc_t> c, int64_t K) {
  using V = Vec<acc_t>;
  V sum[product_rows][columns];
  for (int64_t k = 0; k < K; ++k) {
    V row[columns];
#pragma GCC unroll 8
    for (int n = 0; n < columns; ++n) row[n] = V::load(b.at + k * b.row + n * V::width);
#pragma GCC unroll 8
    for (int m = 0; m < product_rows; ++m) {
      const V element(a.at[m * a.row + k * a.column]);
#pragma GCC unroll 8
      for (int n = 0; n < columns; ++n) sum[m][n] = fma(element, row[n], sum[m][n]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < product_rows; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < columns; ++n) {
      acc_t* to = c.at + m * c.row + n * V::width;
      // Added last: a sum of sums of K terms rounds less than one long sum.
      if constexpr (add) sum[m][n] += V::load(to);
      sum[m][n].store(to);
    }
}

// One panel of B goes through all rows of A before the next: it stays in the nearest cache.
template <bool add, class acc_t>
void product(Matrix<const acc_t> a, Matrix<const acc_t> b, Matrix<acc_t> c, int64_t M, int64_t N, int64_t K) {
  constexpr int64_t W = Vec<acc_t>::width;
  for (int64_t n = 0; n < N; n += product_vectors * W) {
    const int64_t columns = (N - n) / W;
    for (int64_t m = 0; m < M; m += product_rows) {
      const Matrix<const acc_t> rows{a.at + m * a.row, a.row, a.column}, panel{b.at + n, b.row, 1};
      const Matrix<acc_t> block{c.at + m * c.row + n, c.row, 1};
      if (columns >= product_vectors) {
        product_tile<add, product_vectors>(rows, panel, block, K);
      } else if (columns == 1) {
        product_tile<add, 1>(rows, panel, block, K);
      } else if constexpr (product_vectors > 2) {
        if (columns == 2)
          product_tile<add, 2>(rows, panel, block, K);
        else
          product_tile<add, 3>(rows, panel, block, K);
      }
    }
  }
}

PYOPS_INLINE constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// rows x width values of any memory type into acc_t rows of `stride` values, zero beyond `width`.
template <class acc_t, class T>
void pack_rows(acc_t* to, int64_t stride, const T* from, int64_t from_row, int64_t rows, int64_t width) {
  for (int64_t r = 0; r < rows; ++r) {
    each_vector<acc_t>(width, [&](int64_t i, auto lanes) {
      Vec<acc_t>::load(from + r * from_row + i, lanes).store(to + r * stride + i, lanes);
    });
    for (int64_t i = width; i < stride; ++i) to[r * stride + i] = 0;
  }
}

template <class acc_t, class T>
void unpack_row(T* to, const acc_t* from, int64_t width) {
  each_vector<acc_t>(width, [&](int64_t i, auto lanes) { Vec<acc_t>::load(from + i, lanes).store(to + i, lanes); });
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY
