// What the CPU and the CUDA binding of embedding share: bag v of x [R, D] holds the entries offsets[v] .. offsets[v + 1]
// of index [K].
#pragma once

#include "common/tensor.h"

namespace pyops::embedding {

struct Bags {
  int64_t R, D, K, V;
  const int64_t *index, *offsets;
};

inline Bags bags_of(const OpScope& op, const Tensor& x, const Tensor& index, const Tensor& offsets) {
  op.check(x.dim() == 2, "x must be [R, D]");
  op.check(offsets.dim() == 1 && offsets.size(0) >= 1, "offsets must be [V + 1]");
  const int64_t K = index.numel(), V = offsets.size(0) - 1;
  return {x.size(0), x.size(1), K, V, op.in<int64_t>(index, "index", {K}), op.in<int64_t>(offsets, "offsets", {V + 1})};
}

}  // namespace pyops::embedding
