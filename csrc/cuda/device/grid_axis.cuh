// Blocks along axes 1 and 2 of a grid, at most. The emulator can be told to allow fewer (docs/emulator.md), so that a test
// of what happens there need not run 65535 blocks.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
namespace pyops {
constexpr int64_t grid_axis_limit() { return 65535; }
}  // namespace pyops
#else
namespace pyops::emulator {
int grid_axis_limit();
}
namespace pyops {
inline int64_t grid_axis_limit() { return emulator::grid_axis_limit(); }
}  // namespace pyops
#endif
