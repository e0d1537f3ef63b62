// What becomes of the sums of a convolution while they are in registers: y = f(sum + bias + residual).
#pragma once

#include "cuda/math.cuh"

#include "common/activation.h"

namespace pyops::conv {

template <class T>
struct Epilogue {
  const T* bias = nullptr;      // [output channels]
  const T* residual = nullptr;  // as y in memory
  int kind = -1;                // number of f in common/activation.h; -1: neither f nor residual
  activation::Parameters parameters{};
};

// Calls body(finish) with finish(sum, k, at), the value of element `at` of y, which belongs to output channel k.
template <class T, class Body>
PYOPS_DEVICE void with_epilogue(const Epilogue<T>& end, Body&& body) {
  using A = accumulate_t<T>;
  const auto biased = [&](A sum, int64_t k) { return end.bias != nullptr ? sum + to_acc(__ldg(end.bias + k)) : sum; };
  if (end.kind < 0) return body([&](A sum, int64_t k, int64_t) { return biased(sum, k); });
  activation::with_activation(end.kind, [&]<class F>() {
    body([&](A sum, int64_t k, int64_t at) {
      sum = biased(sum, k);
      return F::value(A(end.residual != nullptr ? sum + to_acc(__ldg(end.residual + at)) : sum), end.parameters);
    });
  });
}

}  // namespace pyops::conv
