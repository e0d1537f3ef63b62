// gru: the ops, from tensors to the kernels that cpu/gru.cpp and cuda/gru.cu include before this.
#pragma once

#include "common/recurrent_binding.h"

namespace pyops {
#if defined(PYOPS_CPU_CAPABILITY)
namespace PYOPS_CPU_CAPABILITY {
#else
namespace {
#endif

using recurrent::Gru;

Tensor gru_gates_fwd(const Tensor& x_gates, const Tensor& h_gates, const Tensor& h) {
  OpScope op("gru_gates_fwd", x_gates);
  op.check(h.dim() == 2, "h must be [B, H]");
  const int64_t B = h.size(0), H = h.size(1);
  return dispatch_floating(op, x_gates.scalar_type(), [&]<class T>() {
    Tensor next = op.empty<T>({B, H});
    const CellInputs<T> in{op.in<T>(x_gates, "x_gates", {B, 3 * H}), op.in<T>(h_gates, "h_gates", {B, 3 * H}),
                           op.in<T>(h, "h", {B, H})};
    cell_forward<Gru, T>(in, op.out<T>(next, "h'", {B, H}), nullptr, B, H, op.stream());
    return next;
  });
}

std::tuple<Tensor, Tensor, Tensor> gru_gates_bwd(const Tensor& dy, const Tensor& x_gates, const Tensor& h_gates,
                                                 const Tensor& h) {
  OpScope op("gru_gates_bwd", dy);
  op.check(h.dim() == 2, "h must be [B, H]");
  const int64_t B = h.size(0), H = h.size(1);
  return dispatch_floating(op, x_gates.scalar_type(), [&]<class T>() {
    Tensor dx = op.empty<T>({B, 3 * H}), dg = op.empty<T>({B, 3 * H}), dh = op.empty<T>({B, H});
    const CellInputs<T> in{op.in<T>(x_gates, "x_gates", {B, 3 * H}), op.in<T>(h_gates, "h_gates", {B, 3 * H}),
                           op.in<T>(h, "h", {B, H})};
    cell_backward<Gru, T>(op.in<T>(dy, "dy", {B, H}), nullptr, in, op.out<T>(dx, "dx_gates", {B, 3 * H}),
                          op.out<T>(dg, "dh_gates", {B, 3 * H}), op.out<T>(dh, "dh", {B, H}), B, H, op.stream());
    return std::tuple(dx, dg, dh);
  });
}

std::tuple<Tensor, Tensor, Tensor> gru_layer_fwd(const Tensor& gates, const Tensor& h0, const Tensor& w_hh,
                                                 const OptionalTensor& b_n, const OptionalTensor& starts, bool keep) {
  OpScope op("gru_layer_fwd", gates);
  return dispatch_floating(op, gates.scalar_type(), [&]<class T>() {
    auto s = recurrent::sizes_of<T>(op, gates, h0, starts, 3);
    const int64_t N = s.steps.N, B = s.steps.B, D = s.D, H = s.H;
    Tensor y = op.empty<T>({N, D, H}), h_n = op.empty<T>({D, B, H});
    Tensor saved = keep ? op.empty<T>({N, D, 4 * H}) : op.empty<T>({0});
    s.gates = op.in<T>(gates, "gates", {N, D, 3 * H}), s.h0 = op.in<T>(h0, "h0", {D, B, H});
    s.w_hh = op.in<T>(w_hh, "w_hh", {D, 3 * H, H}), s.b_n = op.in_optional<T>(b_n, "b_n", {D, H});
    s.y = op.out<T>(y, "y", {N, D, H}), s.h_n = op.out<T>(h_n, "h_n", {D, B, H});
    s.saved = keep ? op.out<T>(saved, "saved", {N, D, 4 * H}) : nullptr;
    layer_forward<Gru>(op, s);
    return std::tuple(y, h_n, saved);
  });
}

std::tuple<Tensor, Tensor, Tensor> gru_layer_bwd(const OptionalTensor& dy, const OptionalTensor& dh_n, const Tensor& h0,
                                                 const Tensor& w_hh, const OptionalTensor& starts, const Tensor& y,
                                                 const Tensor& saved) {
  OpScope op("gru_layer_bwd", saved);
  return dispatch_floating(op, saved.scalar_type(), [&]<class T>() {
    auto s = recurrent::sizes_of<T>(op, saved, h0, starts, 4);
    const int64_t N = s.steps.N, B = s.steps.B, D = s.D, H = s.H;
    Tensor dgates = op.empty<T>({N, D, 3 * H}), dh_gates = op.empty<T>({N, D, 3 * H}), dh0 = op.empty<T>({D, B, H});
    s.dy = op.in_optional<T>(dy, "dy", {N, D, H}), s.dh_n = op.in_optional<T>(dh_n, "dh_n", {D, B, H});
    s.h0 = op.in<T>(h0, "h0", {D, B, H}), s.w_hh = op.in<T>(w_hh, "w_hh", {D, 3 * H, H});
    s.y = const_cast<T*>(op.in<T>(y, "y", {N, D, H}));
    s.saved = const_cast<T*>(op.in<T>(saved, "saved", {N, D, 4 * H}));
    s.dgates = op.out<T>(dgates, "dgates", {N, D, 3 * H});
    s.dh_gates = op.out<T>(dh_gates, "dh_gates", {N, D, 3 * H}), s.dh0 = op.out<T>(dh0, "dh0", {D, B, H});
    layer_backward<Gru>(op, s);
    return std::tuple(dgates, dh_gates, dh0);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gru_stack_fwd(const Tensor& gates, const Tensor& h0, const Tensor& w_ih,
                                                         const OptionalTensor& b_ih, const Tensor& w_hh,
                                                         const OptionalTensor& b_n, bool keep) {
  OpScope op("gru_stack_fwd", gates);
  op.check(gates.dim() == 2, "gates must be [N, 3 H]");
  return dispatch_floating(op, gates.scalar_type(), [&]<class T>() {
    auto stack = recurrent::stack_of<Gru, T>(op, gates.size(0), h0, w_ih, b_ih, w_hh);
    recurrent::Sequence<T>& s = stack.s;
    const int64_t N = s.steps.N, B = s.steps.B, H = s.H, L = stack.L;
    Tensor y = op.empty<T>({N, H}), h_n = op.empty<T>({L, B, H}), below = op.empty<T>({L - 1, N, H});
    Tensor saved = keep ? op.empty<T>({L, N, 4 * H}) : op.empty<T>({0});
    s.gates = op.in<T>(gates, "gates", {N, 3 * H}), s.b_n = op.in_optional<T>(b_n, "b_n", {L, H});
    s.y = op.out<T>(y, "y", {N, H}), stack.below = op.out<T>(below, "below", {L - 1, N, H});
    s.h_n = op.out<T>(h_n, "h_n", {L, B, H});
    s.saved = keep ? op.out<T>(saved, "saved", {L, N, 4 * H}) : nullptr;
    stack_forward<Gru>(op, stack);
    return std::tuple(y, h_n, below, saved);
  });
}

std::tuple<Tensor, Tensor, Tensor> gru_stack_bwd(const OptionalTensor& dy, const OptionalTensor& dh_n, const Tensor& h0,
                                                 const Tensor& w_ih, const Tensor& w_hh, const Tensor& y,
                                                 const Tensor& below, const Tensor& saved) {
  OpScope op("gru_stack_bwd", y);
  op.check(y.dim() == 2, "y must be [N, H]");
  return dispatch_floating(op, y.scalar_type(), [&]<class T>() {
    auto stack = recurrent::stack_of<Gru, T>(op, y.size(0), h0, w_ih, {}, w_hh);
    recurrent::Sequence<T>& s = stack.s;
    const int64_t N = s.steps.N, B = s.steps.B, H = s.H, L = stack.L;
    Tensor dgates = op.empty<T>({L, N, 3 * H}), dh_gates = op.empty<T>({L, N, 3 * H}), dh0 = op.empty<T>({L, B, H});
    s.dy = op.in_optional<T>(dy, "dy", {N, H}), s.dh_n = op.in_optional<T>(dh_n, "dh_n", {L, B, H});
    s.y = const_cast<T*>(op.in<T>(y, "y", {N, H}));
    stack.below = const_cast<T*>(op.in<T>(below, "below", {L - 1, N, H}));
    s.saved = const_cast<T*>(op.in<T>(saved, "saved", {L, N, 4 * H}));
    s.dgates = op.out<T>(dgates, "dgates", {L, N, 3 * H});
    s.dh_gates = op.out<T>(dh_gates, "dh_gates", {L, N, 3 * H}), s.dh0 = op.out<T>(dh0, "dh0", {L, B, H});
    stack_backward<Gru>(op, stack);
    return std::tuple(dgates, dh_gates, dh0);
  });
}

std::vector<int64_t> gru_plan(const Tensor& like, int64_t steps, int64_t batch, int64_t directions, int64_t hidden,
                              bool stacked, bool backward) {
  OpScope op("gru_plan", like);
  const auto sizes = recurrent::checked_steps(op, steps, batch, directions, hidden);
  return dispatch_floating(op, like.scalar_type(), [&]<class T>() {
    return plan_numbers<Gru, T>(sizes, directions, hidden, stacked, backward);
  });
}

}  // namespace
}  // namespace pyops
