// How the CPU kernels of the norms cut their work: the sizes at which they change over. The host module states them to
// `python -m pyops explain`, so this header needs neither torch nor vectors.
#pragma once

#include <cstdint>

namespace pyops::blocking {

// Sums are taken in acc_t inside a block of this many elements and merged in double.
inline constexpr int64_t block_elements = 4096;

// A row up to this size stays in the second-level cache of its thread; a wider one is shared by the threads.
inline constexpr int64_t wide_elements = 65536;

// Short rows are worked on several at a time: the fixed cost of a row outweighs its elements. In the backward pass also
// long ones, whose weight and sums of gradients do not stay in the first-level cache: two rows share each trip.
inline constexpr int64_t forward_group_elements = 512, backward_group_elements = 256, backward_long_elements = 2048;
inline bool forward_grouped(int64_t N) { return N <= forward_group_elements; }
inline bool backward_grouped(int64_t N) {
  return N <= backward_group_elements || (N > backward_long_elements && N <= block_elements);
}

// Half of a second-level cache of 1 MiB, in float.
inline constexpr int64_t cached_elements = 131072;

// An output from this size on does not stay in the caches: writing past them saves reading each line first. From 32 MiB
// on malloc maps fresh pages, which the kernel has just zeroed through the caches: there a plain store is the faster
// one.
inline constexpr int64_t streamed_bytes = 12 << 20, mapped_bytes = 32 << 20;
inline bool is_streamed(int64_t elements, int64_t element_size) {
  const int64_t bytes = elements * element_size;
  return bytes >= streamed_bytes && bytes < mapped_bytes;
}

}  // namespace pyops::blocking
