// What position-sensitive RoI Align and Pool share: bin b = p Q + q of channel k of y reads plane k P Q + b of x.
#pragma once

#include <cstdint>

namespace pyops::PYOPS_CPU_CAPABILITY {

// Elements from one to the next, in either layout: x [C, H, W] or [H, W, C], y [C / (P Q), P, Q] or [P, Q, C / (P Q)].
struct PositionSteps {
  int64_t plane, pixel;  // x
  int64_t channel, bin;  // y
  PositionSteps(int64_t C, int64_t pixels, int64_t bins, bool channels_last)
      : plane(channels_last ? 1 : pixels),
        pixel(channels_last ? C : 1),
        channel(channels_last ? 1 : bins),
        bin(channels_last ? C / bins : 1) {}
};

}  // namespace pyops::PYOPS_CPU_CAPABILITY
