// What the op bindings tell the emulator: which memory one call of an op may touch. Plain C++, no CUDA headers.
#pragma once

#include <cstddef>

namespace pyops::emulator {

// In race mode every access of a kernel outside the ranges of its call is an error, and so is a write to a read-only
// one. While nothing is registered nothing is checked. Ranges belong to the calling host thread.
void register_range(const void* p, size_t bytes, bool writable, const char* name);
void clear_ranges();

}  // namespace pyops::emulator
