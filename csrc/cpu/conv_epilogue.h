// What becomes of the sums of a convolution while they are still near: y = f(sum + bias + residual).
#pragma once

#include "cpu/activation.h"
#include "cpu/gemm.h"

namespace pyops::PYOPS_CPU_CAPABILITY {

template <class scalar_t>
struct Epilogue {
  using acc_t = accumulate_t<scalar_t>;
  using V = Vec<acc_t>;
  const scalar_t* bias = nullptr;      // [output channels]
  const scalar_t* residual = nullptr;  // as y in memory
  int kind = -1;                       // number of f in common/activation.h; -1: neither f nor residual
  Parameters parameters{};

  bool plain() const { return kind < 0; }

  // v = f(v + residual), n neighbours in y from its element `at` on.
  void finish(acc_t* v, int64_t at, int64_t n) const {
    add_residual(v, at, n);
    activate(v, n);
  }
  void add_residual(acc_t* v, int64_t at, int64_t n) const {
    if (residual == nullptr) return;
    each_vector<acc_t>(n, [&](int64_t i, auto lanes) {
      (V::load(v + i, lanes) + V::load(residual + at + i, lanes)).store(v + i, lanes);
    });
  }
  void activate(acc_t* v, int64_t n) const {
    for (int64_t i = 0; i < n; i += elementwise_block)
      activation_block<acc_t>(kind, parameters, v + i, v + i, std::min(elementwise_block, n - i), false);
  }

  // Finish a tile of `rows` rows, Tile::columns apart, and write it to y. each(f) names the pieces of the tile:
  //
  // rows are channels from k on, `plane` apart in y: f(first, n, at, step), sums first, first + 1, ... of row r belong to
  // the elements at + r * plane, + step, ...; a step other than 1 is plain
  template <class Each>
  PYOPS_INLINE void store_planes(acc_t* tile, int64_t rows, int64_t k, int64_t plane, scalar_t* y,
                                 const Each& each) const {
    acc_t add[R];
    for (int64_t r = 0; r < rows; ++r) add[r] = bias ? acc_t(bias[k + r]) : acc_t(0);
    const auto biased = [&](int64_t first, int64_t n, auto* to, int64_t to_row) {
      each_vector<acc_t>(n, [&](int64_t i, auto lanes) {
        for (int64_t r = 0; r < rows; ++r)
          (V::load(tile + r * L + first + i, lanes) + V(add[r])).store(to + r * to_row + i, lanes);
      });
    };
    if (plain()) {
      each([&](int64_t first, int64_t n, int64_t at, int64_t step) {
        if (step == 1) return biased(first, n, y + at, plane);
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t i = 0; i < n; ++i) y[at + r * plane + i * step] = scalar_t(tile[r * L + first + i] + add[r]);
      });
      return;
    }
    each([&](int64_t first, int64_t n, int64_t at, int64_t) {
      biased(first, n, tile + first, L);
      for (int64_t r = 0; r < rows; ++r) add_residual(tile + r * L + first, at + r * plane, n);
    });
    activate(tile, rows * L);
    each([&](int64_t first, int64_t n, int64_t at, int64_t) {
      for (int64_t r = 0; r < rows; ++r) narrow(y + at + r * plane, tile + r * L + first, n);
    });
  }

  // rows are pixels: f(r, n, at), the n sums of row r are channels k, k + 1, ... and the elements at, at + 1, ... of y
  template <class Each>
  PYOPS_INLINE void store_pixels(acc_t* tile, int64_t rows, int64_t k, scalar_t* y, const Each& each) const {
    const auto biased = [&](const acc_t* v, int64_t n, auto* to) {
      each_vector<acc_t>(n, [&](int64_t i, auto lanes) {
        const V add = bias ? V::load(bias + k + i, lanes) : V();
        (V::load(v + i, lanes) + add).store(to + i, lanes);
      });
    };
    if (plain()) return each([&](int64_t r, int64_t n, int64_t at) { biased(tile + r * L, n, y + at); });
    each([&](int64_t r, int64_t n, int64_t at) {
      biased(tile + r * L, n, tile + r * L);
      add_residual(tile + r * L, at, n);
    });
    activate(tile, rows * L);
    each([&](int64_t r, int64_t n, int64_t at) { narrow(y + at, tile + r * L, n); });
  }

 private:
  static constexpr int64_t R = Tile<acc_t>::rows, L = Tile<acc_t>::columns;
};

}  // namespace pyops::PYOPS_CPU_CAPABILITY
