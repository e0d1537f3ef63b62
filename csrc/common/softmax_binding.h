// What the two bindings of softmax share: a tensor of any shape as [M, N, S], N its dimension `dim`.
#pragma once

#include "common/tensor.h"

namespace pyops::softmax {

struct Sizes {
  int64_t M = 1, N = 1, S = 1;
};

inline Sizes sizes_of(const OpScope& op, const Tensor& x, int64_t dim) {
  op.check(dim >= 0 && dim < x.dim(), "dim must be in [0, ", x.dim(), "), got ", dim);
  Sizes s;
  for (int64_t d = 0; d < x.dim(); ++d) (d < dim ? s.M : d == dim ? s.N : s.S) *= x.size(d);
  return s;
}

}  // namespace pyops::softmax
