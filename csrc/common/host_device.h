// Scalar types and arithmetic that CPU and CUDA sources share. No torch, no CUDA runtime.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "common/qualifiers.h"

#if defined(__CUDACC__) || defined(PYOPS_EMULATOR)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#else
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#endif

namespace pyops {

// One name per element type, so that a binding reads the same in a .cpp and in a .cu.
#if defined(__CUDACC__) || defined(PYOPS_EMULATOR)
using bfloat16_t = __nv_bfloat16;
using half_t = __half;
#else
using bfloat16_t = torch::headeronly::BFloat16;
using half_t = torch::headeronly::Half;
#endif

// The type in which sums over scalar_t are taken: double for double, float for everything narrower.
template <class scalar_t>
using accumulate_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

PYOPS_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Do all begin at a whole 16-byte word, the widest that a thread loads at once?
template <class... T>
PYOPS_HOST_DEVICE bool is_aligned(const T*... p) {
  return ((reinterpret_cast<uintptr_t>(p) % 16 == 0) && ...);
}

}  // namespace pyops
