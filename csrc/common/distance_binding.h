// What the CPU and the CUDA binding of distances share.
#pragma once

#include "common/distance.h"
#include "common/tensor.h"

namespace pyops::distance {

// x1 [B, P, M], x2 [B, R, M]
struct Shape {
  int64_t B, P, R, M;
};

inline Shape shape_of(const OpScope& op, const Tensor& x1, const Tensor& x2, double p) {
  op.check(x1.dim() == 3 && x2.dim() == 3, "expected x1 [B, P, M] and x2 [B, R, M]");
  op.check(x1.size(0) == x2.size(0) && x1.size(2) == x2.size(2), "x1 and x2 differ in batch or in columns");
  op.check(p >= 0, "p must be a number >= 0, got ", p);
  return {x1.size(0), x1.size(1), x2.size(1), x1.size(2)};
}

}  // namespace pyops::distance
