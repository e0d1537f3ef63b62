// The qualifier of functions that run on host and device. No torch, no CUDA runtime, no other header.
#pragma once

#if defined(__CUDACC__)
#define PYOPS_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Arithmetic that reaches a CPU kernel's inner loop must not survive as a call.
#define PYOPS_HOST_DEVICE inline __attribute__((always_inline))
#endif
