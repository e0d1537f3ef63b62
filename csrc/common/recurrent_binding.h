// What the bindings of lstm, gru and rnn share: the sizes of a layer and of a stack of them, checked. Included by
// <stem>_binding.h.
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

// What both passes of a stack of layers read, its sizes from h0 [L, B, H] and N rows; csrc/common/recurrent.h.
template <class Cell, class T>
Stack<Cell, T> stack_of(const OpScope& op, int64_t N, const Tensor& h0, const Tensor& w_ih, const OptionalTensor& b_ih,
                        const Tensor& w_hh) {
  op.check(h0.dim() == 3, "h0 must be [L, B, H]");
  const int64_t L = h0.size(0), B = h0.size(1), H = h0.size(2), G = Cell::gates;
  op.check(L > 1 && H > 0, "at least two layers, of at least one unit");
  op.check(B > 0 ? N % B == 0 && N > 0 : N == 0, "N must be a positive multiple of the batch");
  Stack<Cell, T> stack{};
  Sequence<T>& s = stack.s;
  s.steps = {B > 0 ? N / B : 0, B, N, nullptr};
  s.D = 1, s.H = s.P = H, stack.L = L;
  s.h0 = op.in<T>(h0, "h0", {L, B, H}), s.w_hh = op.in<T>(w_hh, "w_hh", {L, G * H, H});
  stack.w_ih = op.in<T>(w_ih, "w_ih", {L - 1, G * H, H});
  stack.b_ih = op.in_optional<T>(b_ih, "b_ih", {L - 1, G * H});
  return stack;
}

// Sizes that plan_numbers takes, of cuda/recurrent_stack.cuh.
inline Steps checked_steps(const OpScope& op, int64_t steps, int64_t batch, int64_t directions, int64_t hidden) {
  op.check(steps > 0 && batch > 0 && directions > 0 && hidden > 0, "sizes must be positive");
  return {steps, batch, steps * batch, nullptr};
}

}  // namespace pyops::recurrent

#if defined(PYOPS_CPU_CAPABILITY)
namespace pyops::PYOPS_CPU_CAPABILITY {
// The CPU's kernels have one plan.
template <class Cell, class T>
std::vector<int64_t> plan_numbers(const recurrent::Steps&, int64_t, int64_t, bool, bool) {
  return {};
}
}  // namespace pyops::PYOPS_CPU_CAPABILITY
#endif
