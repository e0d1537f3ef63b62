// What dropout multiplies and adds, drawn in blocks that stay in the first-level cache.
#pragma once

#include "cpu/random.h"

namespace pyops::PYOPS_CPU_CAPABILITY {

template <class acc_t>
struct Dropout {
  RandomStream stream;
  int64_t threshold;
  acc_t scale, shift, fill;

  // Factors alone, where shift and fill are 0.
  void draw(int64_t first, int64_t n, uint32_t* words, acc_t* factor) const {
    random_words(stream, first, n, words);
    const int32_t below = int32_t(threshold - 1);
    for (int64_t i = 0; i < n; ++i) factor[i] = int32_t(words[i] >> 1) > below ? scale : acc_t(0);
  }
  // Factors and summands of elements [first, first + n).
  void draw(int64_t first, int64_t n, uint32_t* words, acc_t* factor, acc_t* summand) const {
    random_words(stream, first, n, words);
    // In 32 signed bits the threshold 2^31 does not fit; one less does, and > takes the place of >=.
    const int32_t below = int32_t(threshold - 1);
    for (int64_t i = 0; i < n; ++i) {
      const bool kept = int32_t(words[i] >> 1) > below;
      factor[i] = kept ? scale : acc_t(0);
      summand[i] = kept ? shift : fill;
    }
  }
};

inline constexpr int64_t dropout_block = 1024;
template <class acc_t>
struct DropoutScratch {
  alignas(64) acc_t factor[dropout_block];
  alignas(64) acc_t summand[dropout_block];
  uint32_t words[dropout_block];
};

}  // namespace pyops::PYOPS_CPU_CAPABILITY
