// rnn: the ops, from tensors to the kernels that cpu/rnn.cpp and cuda/rnn.cu include before this.
#pragma once

#include "common/recurrent_binding.h"

namespace pyops {
#if defined(PYOPS_CPU_CAPABILITY)
namespace PYOPS_CPU_CAPABILITY {
#else
namespace {
#endif

using recurrent::ReluRnn, recurrent::TanhRnn;

Tensor rnn_gates_fwd(const Tensor& gates, bool relu) {
  OpScope op("rnn_gates_fwd", gates);
  op.check(gates.dim() == 2, "gates must be [B, H]");
  const int64_t B = gates.size(0), H = gates.size(1);
  return dispatch_floating(op, gates.scalar_type(), [&]<class T>() {
    Tensor h = op.empty<T>({B, H});
    const CellInputs<T> in{op.in<T>(gates, "gates", {B, H}), nullptr, nullptr};
    T* to = op.out<T>(h, "h", {B, H});
    relu ? cell_forward<ReluRnn, T>(in, to, nullptr, B, H, op.stream())
         : cell_forward<TanhRnn, T>(in, to, nullptr, B, H, op.stream());
    return h;
  });
}

Tensor rnn_gates_bwd(const Tensor& dh, const Tensor& gates, bool relu) {
  OpScope op("rnn_gates_bwd", dh);
  op.check(gates.dim() == 2, "gates must be [B, H]");
  const int64_t B = gates.size(0), H = gates.size(1);
  return dispatch_floating(op, gates.scalar_type(), [&]<class T>() {
    Tensor dgates = op.empty<T>({B, H});
    const CellInputs<T> in{op.in<T>(gates, "gates", {B, H}), nullptr, nullptr};
    const T *g = op.in<T>(dh, "dh", {B, H}), *none = nullptr;
    T *to = op.out<T>(dgates, "dgates", {B, H}), *nowhere = nullptr;
    relu ? cell_backward<ReluRnn>(g, none, in, to, nowhere, nowhere, B, H, op.stream())
         : cell_backward<TanhRnn>(g, none, in, to, nowhere, nowhere, B, H, op.stream());
    return dgates;
  });
}

std::tuple<Tensor, Tensor> rnn_layer_fwd(const Tensor& gates, const Tensor& h0, const Tensor& w_hh,
                                         const OptionalTensor& starts, bool relu) {
  OpScope op("rnn_layer_fwd", gates);
  return dispatch_floating(op, gates.scalar_type(), [&]<class T>() {
    auto s = recurrent::sizes_of<T>(op, gates, h0, starts, 1);
    const int64_t N = s.steps.N, B = s.steps.B, D = s.D, H = s.H;
    Tensor y = op.empty<T>({N, D, H}), h_n = op.empty<T>({D, B, H});
    s.gates = op.in<T>(gates, "gates", {N, D, H}), s.h0 = op.in<T>(h0, "h0", {D, B, H});
    s.w_hh = op.in<T>(w_hh, "w_hh", {D, H, H});
    s.y = op.out<T>(y, "y", {N, D, H}), s.h_n = op.out<T>(h_n, "h_n", {D, B, H});
    relu ? layer_forward<ReluRnn>(op, s) : layer_forward<TanhRnn>(op, s);
    return std::tuple(y, h_n);
  });
}

std::tuple<Tensor, Tensor> rnn_layer_bwd(const OptionalTensor& dy, const OptionalTensor& dh_n, const Tensor& h0,
                                         const Tensor& w_hh, const OptionalTensor& starts, const Tensor& y, bool relu) {
  OpScope op("rnn_layer_bwd", y);
  return dispatch_floating(op, y.scalar_type(), [&]<class T>() {
    auto s = recurrent::sizes_of<T>(op, y, h0, starts, 1);
    const int64_t N = s.steps.N, B = s.steps.B, D = s.D, H = s.H;
    Tensor dgates = op.empty<T>({N, D, H}), dh0 = op.empty<T>({D, B, H});
    s.dy = op.in_optional<T>(dy, "dy", {N, D, H}), s.dh_n = op.in_optional<T>(dh_n, "dh_n", {D, B, H});
    s.h0 = op.in<T>(h0, "h0", {D, B, H}), s.w_hh = op.in<T>(w_hh, "w_hh", {D, H, H});
    s.y = const_cast<T*>(op.in<T>(y, "y", {N, D, H}));
    s.dgates = op.out<T>(dgates, "dgates", {N, D, H}), s.dh0 = op.out<T>(dh0, "dh0", {D, B, H});
    relu ? layer_backward<ReluRnn>(op, s) : layer_backward<TanhRnn>(op, s);
    return std::tuple(dgates, dh0);
  });
}

template <class Cell>
std::tuple<Tensor, Tensor, Tensor> rnn_stack_forward(const OpScope& op, const Tensor& gates, const Tensor& h0,
                                                     const Tensor& w_ih, const OptionalTensor& b_ih,
                                                     const Tensor& w_hh) {
  return dispatch_floating(op, gates.scalar_type(), [&]<class T>() {
    auto stack = recurrent::stack_of<Cell, T>(op, gates.size(0), h0, w_ih, b_ih, w_hh);
    recurrent::Sequence<T>& s = stack.s;
    const int64_t N = s.steps.N, B = s.steps.B, H = s.H, L = stack.L;
    Tensor y = op.empty<T>({N, H}), h_n = op.empty<T>({L, B, H}), below = op.empty<T>({L - 1, N, H});
    s.gates = op.in<T>(gates, "gates", {N, H}), s.y = op.out<T>(y, "y", {N, H});
    stack.below = op.out<T>(below, "below", {L - 1, N, H}), s.h_n = op.out<T>(h_n, "h_n", {L, B, H});
    stack_forward<Cell>(op, stack);
    return std::tuple(y, h_n, below);
  });
}

std::tuple<Tensor, Tensor, Tensor> rnn_stack_fwd(const Tensor& gates, const Tensor& h0, const Tensor& w_ih,
                                                 const OptionalTensor& b_ih, const Tensor& w_hh, bool relu) {
  OpScope op("rnn_stack_fwd", gates);
  op.check(gates.dim() == 2, "gates must be [N, H]");
  return relu ? rnn_stack_forward<ReluRnn>(op, gates, h0, w_ih, b_ih, w_hh)
              : rnn_stack_forward<TanhRnn>(op, gates, h0, w_ih, b_ih, w_hh);
}

template <class Cell>
std::tuple<Tensor, Tensor> rnn_stack_backward(const OpScope& op, const OptionalTensor& dy, const OptionalTensor& dh_n,
                                              const Tensor& h0, const Tensor& w_ih, const Tensor& w_hh, const Tensor& y,
                                              const Tensor& below) {
  return dispatch_floating(op, y.scalar_type(), [&]<class T>() {
    auto stack = recurrent::stack_of<Cell, T>(op, y.size(0), h0, w_ih, {}, w_hh);
    recurrent::Sequence<T>& s = stack.s;
    const int64_t N = s.steps.N, B = s.steps.B, H = s.H, L = stack.L;
    Tensor dgates = op.empty<T>({L, N, H}), dh0 = op.empty<T>({L, B, H});
    s.dy = op.in_optional<T>(dy, "dy", {N, H}), s.dh_n = op.in_optional<T>(dh_n, "dh_n", {L, B, H});
    s.y = const_cast<T*>(op.in<T>(y, "y", {N, H}));
    stack.below = const_cast<T*>(op.in<T>(below, "below", {L - 1, N, H}));
    s.dgates = op.out<T>(dgates, "dgates", {L, N, H}), s.dh0 = op.out<T>(dh0, "dh0", {L, B, H});
    stack_backward<Cell>(op, stack);
    return std::tuple(dgates, dh0);
  });
}

std::tuple<Tensor, Tensor> rnn_stack_bwd(const OptionalTensor& dy, const OptionalTensor& dh_n, const Tensor& h0,
                                         const Tensor& w_ih, const Tensor& w_hh, const Tensor& y, const Tensor& below,
                                         bool relu) {
  OpScope op("rnn_stack_bwd", y);
  op.check(y.dim() == 2, "y must be [N, H]");
  return relu ? rnn_stack_backward<ReluRnn>(op, dy, dh_n, h0, w_ih, w_hh, y, below)
              : rnn_stack_backward<TanhRnn>(op, dy, dh_n, h0, w_ih, w_hh, y, below);
}

std::vector<int64_t> rnn_plan(const Tensor& like, int64_t steps, int64_t batch, int64_t directions, int64_t hidden,
                              bool stacked, bool backward) {
  OpScope op("rnn_plan", like);
  const auto sizes = recurrent::checked_steps(op, steps, batch, directions, hidden);
  return dispatch_floating(op, like.scalar_type(), [&]<class T>() {
    return plan_numbers<TanhRnn, T>(sizes, directions, hidden, stacked, backward);
  });
}

}  // namespace
}  // namespace pyops
