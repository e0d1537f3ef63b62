// The launch of a kernel whose threads stride over the grid, an element each time.
#pragma once

#include <algorithm>

#include "cuda/device.cuh"

namespace pyops {

// Blocks of 256 threads, one thread for each element until a multiprocessor has `share` blocks.
inline LaunchConfig grid_stride(int64_t elements, void* stream, int64_t share = 16) {
  const int64_t blocks = std::min<int64_t>(ceil_div(elements, 256), multiprocessor_count() * share);
  return {.grid = dim3(static_cast<unsigned>(blocks)), .block = dim3(256), .stream = static_cast<cudaStream_t>(stream)};
}

}  // namespace pyops
