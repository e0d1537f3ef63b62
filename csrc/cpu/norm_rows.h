// What the norms over the rows of [M, N] share: how rows are cut into blocks and chunks, and how parameters come in and
// their gradients go out.
#pragma once

#include "cpu/moments.h"
#include "cpu/parallel.h"

namespace pyops::PYOPS_CPU_CAPABILITY {

using blocking::backward_grouped, blocking::forward_grouped, blocking::wide_elements;

inline int64_t row_grain(int64_t N) { return ceil_div(32768, N > 0 ? N : 1); }

struct RowSums {
  double g = 0, gx = 0;  // sum of g, sum of g * (x - mean)
  RowSums& operator+=(const RowSums& other) {
    g += other.g;
    gx += other.gx;
    return *this;
  }
};

// f(first, count) for each block of [0, N), in order.
template <class F>
PYOPS_INLINE void each_block(int64_t N, F&& f) {
  for (int64_t i = 0; i < N; i += block_elements) f(i, N - i < block_elements ? N - i : block_elements);
}

// f(first, count) over [0, N): at once for a row that one thread works on, in blocks on all threads for a wide one.
template <class F>
PYOPS_INLINE void each_wide_block(int64_t N, F&& f) {
  if (N <= wide_elements) return f(int64_t{0}, N);
  parallel_for(ceil_div(N, block_elements), 8, [&](int64_t begin, int64_t end) {
    const int64_t last = end * block_elements;
    f(begin * block_elements, (last < N ? last : N) - begin * block_elements);
    stream_fence();
  });
}

// Sum of part(first, count) over the blocks of [0, N), added in order; a wide row is shared by the threads.
template <class Sum, class F>
Sum sum_of_blocks(int64_t N, F&& part) {
  Sum total{};
  if (N <= wide_elements) {
    each_block(N, [&](int64_t i, int64_t n) { total += part(i, n); });
    return total;
  }
  const int64_t blocks = ceil_div(N, block_elements);
  Buffer<Sum> partial(blocks);
  parallel_for(blocks, 8, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t i = block * block_elements;
      partial[block] = part(i, N - i < block_elements ? N - i : block_elements);
    }
  });
  for (int64_t block = 0; block < blocks; ++block) total += partial[block];
  return total;
}

template <class scalar_t>
Moments row_moments(const scalar_t* x, int64_t N) {
  return sum_of_blocks<Moments>(N, [&](int64_t i, int64_t n) { return block_moments(x + i, 1, 0, n); });
}

// Sums over M rows are taken in chunks, so that threads can share them and the order of additions stays the same: at
// most 64, and none so short that its own zeros and its merging cost as much as its rows.
inline int64_t row_chunks(int64_t M) { return std::clamp<int64_t>(M / 64, 1, 64); }
inline int64_t chunk_begin(int64_t chunk, int64_t chunks, int64_t M) { return M * chunk / chunks; }

// total[n] = sum over chunks of partial[chunk * stride + n], in order.
template <class acc_t>
void add_chunks(const acc_t* partial, int64_t chunks, int64_t stride, acc_t* total, int64_t N) {
  each_vector<acc_t>(N, [&](int64_t i, auto lanes) {
    Vec<acc_t> t;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) t += Vec<acc_t>::load(partial + chunk * stride + i, lanes);
    t.store(total + i, lanes);
  });
}

// A weight or bias in the type of the sums: the tensor itself where it has that type, a copy otherwise.
template <class acc_t, class weight_t>
class Parameter {
 public:
  Parameter(const weight_t* p, int64_t n, acc_t absent) : given_(p), copy_(is_copied() ? n : 0) {
    if (is_copied()) widen(copy_.get(), p, n, absent);
  }
  const acc_t* get() const {
    if constexpr (std::is_same_v<acc_t, weight_t>)
      if (given_ != nullptr) return given_;
    return copy_.get();
  }

 private:
  bool is_copied() const { return given_ == nullptr || !std::is_same_v<acc_t, weight_t>; }
  const weight_t* given_;
  Buffer<acc_t> copy_;
};

// Calls f.template operator()<need_dx, need_dw>(), if either is needed.
template <class F>
void dispatch_wanted(bool need_dx, bool need_dw, F&& f) {
  if (need_dx && need_dw) return f.template operator()<true, true>();
  if (need_dx) return f.template operator()<true, false>();
  if (need_dw) return f.template operator()<false, true>();
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY
