// What becomes of the sums of a convolution while they are still near: y = f(sum + bias + residual).
#pragma once

#include "cpu/activation.h"

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

  // Finishes a tile of `size` sums and writes it to y. each(f) calls f(v, n, at, step, k) for its pieces: n sums from v
  // on belong to the elements at, at + step, ... of y; their channel is k, or k, k + 1, ... where they lie `along` it.
  // A step other than 1 is plain.
  template <bool along, class Each>
  PYOPS_INLINE void store(acc_t* tile, int64_t size, scalar_t* y, const Each& each) const {
    const auto biased = [&](const acc_t* v, int64_t n, int64_t k, auto* to) {
      const V one(bias && !along ? acc_t(bias[k]) : acc_t(0));
      each_vector<acc_t>(n, [&](int64_t i, auto lanes) {
        const V add = bias && along ? V::load(bias + k + i, lanes) : one;
        (V::load(v + i, lanes) + add).store(to + i, lanes);
      });
    };
    if (plain()) {
      each([&](const acc_t* v, int64_t n, int64_t at, int64_t step, int64_t k) {
        if (step == 1) return biased(v, n, k, y + at);
        const acc_t add = bias ? acc_t(bias[k]) : acc_t(0);
        for (int64_t i = 0; i < n; ++i) y[at + i * step] = scalar_t(v[i] + add);
      });
      return;
    }
    each([&](acc_t* v, int64_t n, int64_t at, int64_t, int64_t k) {
      biased(v, n, k, v);
      add_residual(v, at, n);
    });
    activate(tile, size);
    each([&](const acc_t* v, int64_t n, int64_t at, int64_t, int64_t) { narrow(y + at, v, n); });
  }
};

}  // namespace pyops::PYOPS_CPU_CAPABILITY
