// What the CPU and the CUDA binding of hog share.
#pragma once

#include <vector>

#include "common/hog.h"
#include "common/tensor.h"

namespace pyops::hog {

using Ints = std::vector<int64_t>;

inline Sizes sizes_of(const OpScope& op, const Tensor& x, int64_t orientations, const Ints& cell, const Ints& block,
                      int64_t norm, bool channels_last) {
  const int c = channels_last ? 3 : 1, h = channels_last ? 1 : 2;
  op.check(x.dim() == 4 && x.size(c) > 0, "x must have 4 dimensions and at least one channel");
  op.check(orientations > 0 && orientations <= most_orientations, "orientations must be in [1, ", most_orientations,
           "], got ", orientations);
  op.check(cell.size() == 2 && cell[0] > 0 && cell[1] > 0, "cell must be two numbers of pixels");
  op.check(block.size() == 2 && block[0] > 0 && block[1] > 0, "block must be two numbers of cells");
  op.check(norm >= 0 && norm < norms, "norm must be in [0, ", int64_t(norms), "), got ", norm);
  Sizes z{};
  z.N = x.size(0), z.C = x.size(c), z.H = x.size(h), z.W = x.size(h + 1), z.O = orientations;
  z.pixel = channels_last ? z.C : 1, z.plane = channels_last ? 1 : z.H * z.W;
  z.cell_h = cell[0], z.cell_w = cell[1], z.block_h = block[0], z.block_w = block[1];
  z.cells_h = z.H / z.cell_h, z.cells_w = z.W / z.cell_w;
  z.blocks_h = z.cells_h - z.block_h + 1, z.blocks_w = z.cells_w - z.block_w + 1;
  op.check(z.blocks_h > 0 && z.blocks_w > 0, "x is smaller than a block");
  op.check(z.values() < (int64_t{1} << 31), "a block has more than 2^31 values");
  return z;
}

}  // namespace pyops::hog
