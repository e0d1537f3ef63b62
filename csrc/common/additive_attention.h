// Additive attention: what its kernels are given; formula and letters stand in additive_attention_binding.h.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace pyops {

template <class T>
struct AdditiveAttention {
#if defined(PYOPS_CPU_CAPABILITY)
  static constexpr bool keeps_scores = false;  // a thread has a row of them
#else
  static constexpr bool keeps_scores = true;
#endif
  int64_t N, L, S, D, E;
  const T *q, *k, *value, *v;
  const accumulate_t<T>* mask;  // null where there is none
  int64_t mask_n, mask_l;       // elements from one n and one l to the next

  PYOPS_HOST_DEVICE const accumulate_t<T>* mask_row(int64_t row) const {
    return mask == nullptr ? nullptr : mask + row / L * mask_n + row % L * mask_l;
  }
};

// p and ds [N, L, S]: weights, and gradients of the scores, for the gradients of k and value.
template <class T>
struct AdditiveAttentionGradients {
  const T *dy, *y;
  const accumulate_t<T>* lse;
  T *dq, *dk, *dvalue;
  accumulate_t<T>*dv, *p, *ds;
};

}  // namespace pyops
