// What the bindings of lstm, gru and rnn share: the sizes of a layer, checked. Included by <stem>_binding.h.
#pragma once

#include "common/recurrent.h"
#include "common/registry.h"

namespace pyops::recurrent {

// The sizes of a layer from gates [N, D, gates H] and h0 [D, B, P]; H where no projection says otherwise.
template <class T>
Sequence<T> sizes_of(const OpScope& op, const Tensor& gates, const Tensor& h0, const OptionalTensor& starts,
                     int64_t gates_per_unit) {
  op.check(gates.dim() == 3 && h0.dim() == 3, "gates must be [N, D, ", gates_per_unit, " H] and h0 [D, B, P]");
  Sequence<T> s{};
  s.D = h0.size(0), s.P = h0.size(2), s.H = gates.size(2) / gates_per_unit;
  op.check(s.D == 1 || s.D == 2, "one direction or two, got ", s.D);
  op.check(s.P > 0 && s.H > 0, "hidden sizes must be positive");
  Steps& steps = s.steps;
  steps.N = gates.size(0), steps.B = h0.size(1);
  if (!starts.has_value()) {
    op.check(steps.B > 0 ? steps.N % steps.B == 0 : steps.N == 0, "N must be a multiple of the batch");
    steps.T = steps.B > 0 ? steps.N / steps.B : 0;
    return s;
  }
  steps.T = starts->numel() - 1;
  op.check(steps.T >= 0, "starts must be [T + 1]");
  steps.starts = op.in<int64_t>(*starts, "starts", {steps.T + 1});
  // On a GPU they stay where they are: the caller made them from numbers that were checked. This asks the tensor, not the
  // compiler: the linker keeps one copy of this function for the CPU and the CUDA sources.
  if (!starts->is_cpu()) return s;
  op.check(steps.starts[0] == 0 && steps.starts[steps.T] == steps.N, "starts must begin at 0 and end at N");
  for (int64_t t = 0, most = steps.B; t < steps.T; ++t) {
    const int64_t count = steps.starts[t + 1] - steps.starts[t];
    op.check(count >= 1 && count <= most && (t > 0 || count == steps.B),
             "the first step must have all rows, the others at least one and no more than the step before");
    most = count;
  }
  return s;
}

}  // namespace pyops::recurrent
