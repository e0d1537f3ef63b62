// The qualifier of functions that run on host and device. No torch, no CUDA runtime, no other header.
#pragma once

#if defined(__CUDACC__)
#define PYOPS_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PYOPS_HOST_DEVICE inline
#endif
