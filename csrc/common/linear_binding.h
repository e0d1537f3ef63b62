// What the CPU and the CUDA binding of bias_act share.
#pragma once

#include "common/activation.h"
#include "common/tensor.h"

namespace pyops::linear {

struct Images {
  int64_t N, C, S;
};

// The sizes of x [N, C, S], to which the activation of this number is applied.
inline Images images_of(const OpScope& op, const Tensor& x, int64_t kind) {
  activation::check_kind(op, kind);
  op.check(x.dim() == 3, "x must be [N, C, S]");
  return {x.size(0), x.size(1), x.size(2)};
}

}  // namespace pyops::linear
