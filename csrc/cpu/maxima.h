// A maximum and where it lies, lane by lane: the first of equal ones wins, NaN wins always, as in torch's pooling.
#pragma once

#include "cpu/math.h"

namespace pyops::PYOPS_CPU_CAPABILITY {

// The integer that stands in one lane beside an acc_t.
template <class acc_t>
using LaneOf = std::conditional_t<sizeof(acc_t) == 4, int32_t, int64_t>;

template <class acc_t>
struct Best {
  Vec<acc_t> value;
  Mask<acc_t> tap;
  PYOPS_INLINE void meet(const Vec<acc_t>& v, int64_t number) {
    const Mask<acc_t> wins = (v.v > value.v) | (v.v != v.v);
    value.v = wins ? v.v : value.v;
    tap = wins ? Mask<acc_t>{} + LaneOf<acc_t>(number) : tap;
  }
};

}  // namespace pyops::PYOPS_CPU_CAPABILITY
