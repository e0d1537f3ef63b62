// Local response normalisation: the window of channels around each channel.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace pyops::local_response_norm {

// Channels [first, last) that channel c sums: size/2 before it and (size - 1)/2 behind it; its transpose the other way.
struct Window {
  int64_t before, behind;

  PYOPS_HOST_DEVICE int64_t first(int64_t c) const { return c > before ? c - before : 0; }
  PYOPS_HOST_DEVICE int64_t last(int64_t c, int64_t C) const { return c + behind + 1 < C ? c + behind + 1 : C; }
};
inline Window window_of(int64_t size) { return {size / 2, (size - 1) / 2}; }
inline Window transposed_window(int64_t size) { return {(size - 1) / 2, size / 2}; }

}  // namespace pyops::local_response_norm
