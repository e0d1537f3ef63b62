// Memory that a kernel needs for the length of a call. A thread keeps what it gave back for its next calls: malloc may
// return large blocks to the system, whose pages then have to be mapped anew, a fault and 4 KiB of zeros each
// (docs/adr/0011-workspace-is-kept.md).
#pragma once

#include <cstddef>

namespace pyops::workspace {

// Smaller blocks are malloc's own business.
inline constexpr size_t least_bytes = 64 << 10;
// What a thread keeps at most.
inline constexpr size_t most_kept_bytes = 32 << 20;

// At least `bytes` of uninitialised memory on a cache line of its own.
void* take(size_t bytes);
void give_back(void* p);

}  // namespace pyops::workspace
