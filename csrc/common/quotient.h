// Division in kernels that hold many registers. No torch, no CUDA runtime.
#pragma once

#include <type_traits>

#include "common/qualifiers.h"

namespace pyops {

// n / d, correctly rounded, for a whole number d >= 1 and n of 0 or 2^-95 <= |n| < infinity; d may also be any number,
// while neither it nor n / d leaves [2^-100, 2^100]. On the GPU a float is divided as the compiler would divide it, by
// the reciprocal and two corrections, but without the out-of-line call that it keeps for extreme operands, around which
// a kernel spills what it has in registers. So a smaller n may be off in the last bit, and one not finite gives NaN.
template <class A>
PYOPS_HOST_DEVICE A quotient(A n, A d) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<A, float>) {
    float r = __fdividef(1.0f, d);
    r = __fmaf_rn(__fmaf_rn(-d, r, 1.0f), r, r);
    float q = __fmul_rn(n, r);
    q = __fmaf_rn(__fmaf_rn(-d, q, n), r, q);
    return __fmaf_rn(__fmaf_rn(-d, q, n), r, q);
  }
#endif
  return n / d;
}

}  // namespace pyops
