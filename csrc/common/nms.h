// What every NMS kernel computes in the same way, so that all backends keep the same boxes, bit for bit.
//
//   overlaps(a, b)  <=>  I / (A_a + A_b - I) > threshold        a zero or NaN quotient does not overlap
//   or, of the smaller box,  I / min(A_a, A_b) > threshold        NaN where an area is
//
// Products and sums are rounded one by one: no fused multiply-add, whatever the compiler's mood.
#pragma once

#include <cmath>

#include "common/host_device.h"

namespace pyops::suppression {

#if defined(__CUDACC__)
#define PYOPS_EXACT PYOPS_HOST_DEVICE
PYOPS_EXACT float product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
PYOPS_EXACT double product(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}
#else
#define PYOPS_EXACT inline __attribute__((always_inline))
template <class A>
PYOPS_EXACT A product(A a, A b) {
#if defined(__has_builtin)
#if __has_builtin(__builtin_assoc_barrier)
  return __builtin_assoc_barrier(a * b);
#endif
#endif
  return a * b;
}
#endif

template <class A>
PYOPS_EXACT A area(A x1, A y1, A x2, A y2) {
  return product(x2 - x1, y2 - y1);
}

// The comparisons are written so that a NaN coordinate gives an intersection of 0.
template <class A>
PYOPS_EXACT A quotient(A ax1, A ay1, A ax2, A ay2, A aa, A bx1, A by1, A bx2, A by2, A ab, bool of_smaller = false) {
  const A w = (ax2 < bx2 ? ax2 : bx2) - (ax1 > bx1 ? ax1 : bx1);
  const A h = (ay2 < by2 ? ay2 : by2) - (ay1 > by1 ? ay1 : by1);
  const A I = product(w > A(0) ? w : A(0), h > A(0) ? h : A(0));
  return I / (of_smaller ? (aa < ab || aa != aa ? aa : ab) : (aa + ab) - I);
}

// The largest A that is not above the threshold: x > threshold and x > floor_to<A>(threshold) agree for every A x.
template <class A>
inline A floor_to(double threshold) {
  A t = static_cast<A>(threshold);
  return static_cast<double>(t) > threshold ? std::nextafter(t, A(-INFINITY)) : t;
}

}  // namespace pyops::suppression
