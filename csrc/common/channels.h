// Images in any number of spatial dimensions, as the norms of channels see them: shared by the bindings.
#pragma once

#include "common/tensor.h"

namespace pyops {

// x: [N, C, *], or [N, *, C] where channels_last; S positions.
struct ChannelSizes {
  int64_t N, C, S;
};
inline ChannelSizes channel_sizes(const OpScope& op, const Tensor& x, bool channels_last) {
  op.check(x.dim() >= 2, channels_last ? "x must be [N, *, C]" : "x must be [N, C, *]");
  const int64_t first = channels_last ? 1 : 2, last = x.dim() - (channels_last ? 1 : 0);
  int64_t S = 1;
  for (int64_t d = first; d < last; ++d) S *= x.size(d);
  return {x.size(0), x.size(channels_last ? last : 1), S};
}

}  // namespace pyops
