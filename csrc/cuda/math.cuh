// The functions of cpu/math.h for single numbers, so that formulas in csrc/common mean the same on both sides.
#pragma once

#include "cuda/device.cuh"

namespace pyops {

template <class A>
PYOPS_DEVICE A select(bool mask, A yes, A no) {
  return mask ? yes : no;
}
PYOPS_DEVICE float abs(float x) { return fabsf(x); }
PYOPS_DEVICE double abs(double x) { return fabs(x); }
PYOPS_DEVICE float sqrt(float x) { return sqrtf(x); }
PYOPS_DEVICE double sqrt(double x) { return ::sqrt(x); }
PYOPS_DEVICE float exp(float x) { return expf(x); }
PYOPS_DEVICE double exp(double x) { return ::exp(x); }
PYOPS_DEVICE float expm1(float x) { return expm1f(x); }
PYOPS_DEVICE double expm1(double x) { return ::expm1(x); }
PYOPS_DEVICE float log(float x) { return logf(x); }
PYOPS_DEVICE double log(double x) { return ::log(x); }
PYOPS_DEVICE float log1p_unit(float x) { return log1pf(x); }
PYOPS_DEVICE double log1p_unit(double x) { return ::log1p(x); }
PYOPS_DEVICE float tanh(float x) { return tanhf(x); }
PYOPS_DEVICE double tanh(double x) { return ::tanh(x); }
PYOPS_DEVICE float erf(float x) { return erff(x); }
PYOPS_DEVICE double erf(double x) { return ::erf(x); }
template <class A>
struct Normal {
  A cdf, density;
};
template <class A>
PYOPS_DEVICE Normal<A> normal(A x) {
  return {A(0.5) * (A(1) + erf(x * A(0.70710678118654752440))), A(0.39894228040143267794) * exp(x * x * A(-0.5))};
}
template <class A>
PYOPS_DEVICE A sigmoid(A x) {
  return A(1) / (A(1) + exp(-x));
}

}  // namespace pyops
