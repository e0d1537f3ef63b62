// y[i] = f(x[i]) over flat tensors: threads take blocks, half types pass through a float block in the first-level
// cache, so that a function is compiled for float and double only.
#pragma once

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace pyops::PYOPS_CPU_CAPABILITY {

inline constexpr int64_t elementwise_block = 1024, elementwise_grain = 32768;

// The block of an input that starts at i, as acc_t: in place, or widened into `scratch`.
template <class acc_t, class T>
PYOPS_INLINE const acc_t* widened(const T* x, int64_t n, acc_t* scratch) {
  if constexpr (std::is_same_v<T, acc_t>) {
    return x;
  } else {
    each_vector<acc_t>(n, [&](int64_t i, auto lanes) { Vec<acc_t>::load(x + i, lanes).store(scratch + i, lanes); });
    return scratch;
  }
}

// y[i] = f(i, lanes) over n <= elementwise_block elements; past the caches when `streamed`.
template <class acc_t, class F>
PYOPS_INLINE void compute_block(acc_t* y, int64_t n, bool streamed, F&& f) {
  constexpr int64_t W = Vec<acc_t>::width;
  int64_t i = 0;
  if (streamed) {
    for (; i + W <= n; i += W) f(i, AllLanes{}).stream(y + i);
  } else {
    for (; i + W <= n; i += W) f(i, AllLanes{}).store(y + i);
  }
  if (i < n) f(i, FirstLanes{n - i}).store(y + i, FirstLanes{n - i});
}

// block(y, inputs..., count, streamed) over all elements; y may be one of the inputs.
template <class T, class Block, class... In>
void elementwise(int64_t N, T* y, Block&& block, const In*... in) {
  using acc_t = accumulate_t<T>;
  constexpr bool is_narrow = !std::is_same_v<T, acc_t>;
  // Whole registers go past the caches only to an aligned address, and never to where an input is read.
  const bool streamed = !is_narrow && is_streamed(N, sizeof(T)) && reinterpret_cast<uintptr_t>(y) % vector_bytes == 0 &&
                        ((static_cast<const void*>(in) != y) && ...);
  parallel_for(ceil_div(N, elementwise_block), elementwise_grain / elementwise_block, [&](int64_t begin, int64_t end) {
    alignas(64) acc_t scratch[sizeof...(In) + 1][is_narrow ? elementwise_block : 1];
    for (int64_t b = begin; b < end; ++b) {
      const int64_t i = b * elementwise_block, n = N - i < elementwise_block ? N - i : elementwise_block;
      // One stream is the hardware's to follow; of several, beside the output's, it follows them late.
      if constexpr (sizeof...(In) > 1)
        for (int64_t j = 0; j < n; j += 64 / int64_t(sizeof(T)))
          (fetch_ahead(in + i + j, elementwise_block * int64_t(sizeof(T))), ...);
      [&]<size_t... k>(std::index_sequence<k...>) {
        if constexpr (is_narrow) {
          block(scratch[0], widened<acc_t>(in + i, n, scratch[k + 1])..., n, false);
          narrow(y + i, scratch[0], n);
        } else {
          block(y + i, widened<acc_t>(in + i, n, scratch[k + 1])..., n, streamed);
        }
      }(std::index_sequence_for<In...>());
    }
    if (streamed) stream_fence();
  });
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY
