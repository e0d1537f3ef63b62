// What the CPU and the CUDA binding of histogram share.
#pragma once

#include "common/channels.h"
#include "common/histogram.h"

namespace pyops::histogram {

// x of N x C rows, counted in B bins.
struct Sizes {
  int64_t N, C, B;
  Rows rows;
};

inline Sizes sizes_of(const OpScope& op, const Tensor& x, const Tensor& edges, bool channels_last) {
  op.check(x.dim() == 3 && edges.dim() == 1 && edges.size(0) > 1, "x must have 3 dimensions and edges be [B + 1]");
  const ChannelSizes z = channel_sizes(op, x, channels_last);
  return {z.N, z.C, edges.size(0) - 1, {z.N * z.C, z.S, z.C, channels_last}};
}

}  // namespace pyops::histogram
