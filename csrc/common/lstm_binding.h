// lstm: the ops, from tensors to the kernels that cpu/lstm.cpp and cuda/lstm.cu include before this.
#pragma once

#include "common/recurrent_binding.h"

namespace pyops {
#if defined(PYOPS_CPU_CAPABILITY)
namespace PYOPS_CPU_CAPABILITY {
#else
namespace {
#endif

using recurrent::Lstm;

std::tuple<Tensor, Tensor> lstm_gates_fwd(const Tensor& gates, const Tensor& c) {
  OpScope op("lstm_gates_fwd", gates);
  op.check(c.dim() == 2, "c must be [B, H]");
  const int64_t B = c.size(0), H = c.size(1);
  return dispatch_floating(op, gates.scalar_type(), [&]<class T>() {
    Tensor next_h = op.empty<T>({B, H}), next_c = op.empty<T>({B, H});
    const CellInputs<T> in{op.in<T>(gates, "gates", {B, 4 * H}), nullptr, op.in<T>(c, "c", {B, H})};
    cell_forward<Lstm>(in, op.out<T>(next_h, "h'", {B, H}), op.out<T>(next_c, "c'", {B, H}), B, H, op.stream());
    return std::tuple(next_h, next_c);
  });
}

std::tuple<Tensor, Tensor> lstm_gates_bwd(const OptionalTensor& dh, const OptionalTensor& dc, const Tensor& gates,
                                          const Tensor& c) {
  OpScope op("lstm_gates_bwd", gates);
  op.check(c.dim() == 2, "c must be [B, H]");
  const int64_t B = c.size(0), H = c.size(1);
  return dispatch_floating(op, gates.scalar_type(), [&]<class T>() {
    Tensor dgates = op.empty<T>({B, 4 * H}), dstate = op.empty<T>({B, H});
    const CellInputs<T> in{op.in<T>(gates, "gates", {B, 4 * H}), nullptr, op.in<T>(c, "c", {B, H})};
    cell_backward<Lstm, T>(op.in_optional<T>(dh, "dh", {B, H}), op.in_optional<T>(dc, "dc", {B, H}), in,
                           op.out<T>(dgates, "dgates", {B, 4 * H}), nullptr, op.out<T>(dstate, "dc", {B, H}), B, H,
                           op.stream());
    return std::tuple(dgates, dstate);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_layer_fwd(const Tensor& gates, const Tensor& h0,
                                                                  const Tensor& c0, const Tensor& w_hh,
                                                                  const OptionalTensor& w_hr,
                                                                  const OptionalTensor& starts, bool keep) {
  OpScope op("lstm_layer_fwd", gates);
  return dispatch_floating(op, gates.scalar_type(), [&]<class T>() {
    auto s = recurrent::sizes_of<T>(op, gates, h0, starts, 4);
    const int64_t N = s.steps.N, B = s.steps.B, D = s.D, H = s.H, P = s.P;
    op.check(w_hr.has_value() || P == H, "h0 must be [D, B, H]");
    Tensor y = op.empty<T>({N, D, P}), h_n = op.empty<T>({D, B, P}), c_n = op.empty<T>({D, B, H});
    Tensor saved = keep ? op.empty<T>({N, D, 4 * H}) : op.empty<T>({0});
    Tensor cells = keep ? op.empty<T>({N, D, H}) : op.empty<T>({0});
    s.gates = op.in<T>(gates, "gates", {N, D, 4 * H}), s.h0 = op.in<T>(h0, "h0", {D, B, P});
    s.c0 = op.in<T>(c0, "c0", {D, B, H}), s.w_hh = op.in<T>(w_hh, "w_hh", {D, 4 * H, P});
    s.w_hr = op.in_optional<T>(w_hr, "w_hr", {D, P, H});
    s.y = op.out<T>(y, "y", {N, D, P}), s.h_n = op.out<T>(h_n, "h_n", {D, B, P});
    s.c_n = op.out<T>(c_n, "c_n", {D, B, H});
    s.saved = keep ? op.out<T>(saved, "saved", {N, D, 4 * H}) : nullptr;
    s.cells = keep ? op.out<T>(cells, "cells", {N, D, H}) : nullptr;
    layer_forward<Lstm>(op, s);
    return std::tuple(y, h_n, c_n, saved, cells);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lstm_layer_bwd(const OptionalTensor& dy, const OptionalTensor& dh_n,
                                                          const OptionalTensor& dc_n, const Tensor& h0,
                                                          const Tensor& c0, const Tensor& w_hh,
                                                          const OptionalTensor& w_hr, const OptionalTensor& starts,
                                                          const Tensor& saved, const Tensor& cells) {
  OpScope op("lstm_layer_bwd", saved);
  return dispatch_floating(op, saved.scalar_type(), [&]<class T>() {
    auto s = recurrent::sizes_of<T>(op, saved, h0, starts, 4);
    const int64_t N = s.steps.N, B = s.steps.B, D = s.D, H = s.H, P = s.P;
    op.check(w_hr.has_value() || P == H, "h0 must be [D, B, H]");
    Tensor dgates = op.empty<T>({N, D, 4 * H}), dh0 = op.empty<T>({D, B, P}), dc0 = op.empty<T>({D, B, H});
    Tensor dh = w_hr.has_value() ? op.empty<T>({N, D, P}) : op.empty<T>({0});
    s.dy = op.in_optional<T>(dy, "dy", {N, D, P}), s.dh_n = op.in_optional<T>(dh_n, "dh_n", {D, B, P});
    s.dc_n = op.in_optional<T>(dc_n, "dc_n", {D, B, H}), s.h0 = op.in<T>(h0, "h0", {D, B, P});
    s.c0 = op.in<T>(c0, "c0", {D, B, H}), s.w_hh = op.in<T>(w_hh, "w_hh", {D, 4 * H, P});
    s.w_hr = op.in_optional<T>(w_hr, "w_hr", {D, P, H});
    s.saved = const_cast<T*>(op.in<T>(saved, "saved", {N, D, 4 * H}));
    s.cells = const_cast<T*>(op.in<T>(cells, "cells", {N, D, H}));
    s.dgates = op.out<T>(dgates, "dgates", {N, D, 4 * H}), s.dh0 = op.out<T>(dh0, "dh0", {D, B, P});
    s.dc0 = op.out<T>(dc0, "dc0", {D, B, H});
    s.dh = w_hr.has_value() ? op.out<T>(dh, "dh", {N, D, P}) : nullptr;
    layer_backward<Lstm>(op, s);
    return std::tuple(dgates, dh0, dc0, dh);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_stack_fwd(const Tensor& gates, const Tensor& h0,
                                                                          const Tensor& c0, const Tensor& w_ih,
                                                                          const OptionalTensor& b_ih,
                                                                          const Tensor& w_hh, bool keep) {
  OpScope op("lstm_stack_fwd", gates);
  op.check(gates.dim() == 2, "gates must be [N, 4 H]");
  return dispatch_floating(op, gates.scalar_type(), [&]<class T>() {
    auto stack = recurrent::stack_of<Lstm, T>(op, gates.size(0), h0, w_ih, b_ih, w_hh);
    recurrent::Sequence<T>& s = stack.s;
    const int64_t N = s.steps.N, B = s.steps.B, H = s.H, L = stack.L;
    Tensor y = op.empty<T>({N, H}), h_n = op.empty<T>({L, B, H}), c_n = op.empty<T>({L, B, H});
    Tensor below = op.empty<T>({L - 1, N, H});
    Tensor saved = keep ? op.empty<T>({L, N, 4 * H}) : op.empty<T>({0});
    Tensor cells = keep ? op.empty<T>({L, N, H}) : op.empty<T>({0});
    s.gates = op.in<T>(gates, "gates", {N, 4 * H}), s.c0 = op.in<T>(c0, "c0", {L, B, H});
    s.y = op.out<T>(y, "y", {N, H}), stack.below = op.out<T>(below, "below", {L - 1, N, H});
    s.h_n = op.out<T>(h_n, "h_n", {L, B, H}), s.c_n = op.out<T>(c_n, "c_n", {L, B, H});
    s.saved = keep ? op.out<T>(saved, "saved", {L, N, 4 * H}) : nullptr;
    s.cells = keep ? op.out<T>(cells, "cells", {L, N, H}) : nullptr;
    stack_forward<Lstm>(op, stack);
    return std::tuple(y, h_n, c_n, below, saved, cells);
  });
}

std::tuple<Tensor, Tensor, Tensor> lstm_stack_bwd(const OptionalTensor& dy, const OptionalTensor& dh_n,
                                                  const OptionalTensor& dc_n, const Tensor& h0, const Tensor& c0,
                                                  const Tensor& w_ih, const Tensor& w_hh, const Tensor& saved,
                                                  const Tensor& cells) {
  OpScope op("lstm_stack_bwd", saved);
  op.check(saved.dim() == 3, "saved must be [L, N, 4 H]");
  return dispatch_floating(op, saved.scalar_type(), [&]<class T>() {
    auto stack = recurrent::stack_of<Lstm, T>(op, saved.size(1), h0, w_ih, {}, w_hh);
    recurrent::Sequence<T>& s = stack.s;
    const int64_t N = s.steps.N, B = s.steps.B, H = s.H, L = stack.L;
    Tensor dgates = op.empty<T>({L, N, 4 * H}), dh0 = op.empty<T>({L, B, H}), dc0 = op.empty<T>({L, B, H});
    s.dy = op.in_optional<T>(dy, "dy", {N, H}), s.dh_n = op.in_optional<T>(dh_n, "dh_n", {L, B, H});
    s.dc_n = op.in_optional<T>(dc_n, "dc_n", {L, B, H}), s.c0 = op.in<T>(c0, "c0", {L, B, H});
    s.saved = const_cast<T*>(op.in<T>(saved, "saved", {L, N, 4 * H}));
    s.cells = const_cast<T*>(op.in<T>(cells, "cells", {L, N, H}));
    s.dgates = op.out<T>(dgates, "dgates", {L, N, 4 * H}), s.dh0 = op.out<T>(dh0, "dh0", {L, B, H});
    s.dc0 = op.out<T>(dc0, "dc0", {L, B, H});
    stack_backward<Lstm>(op, stack);
    return std::tuple(dgates, dh0, dc0);
  });
}

std::vector<int64_t> lstm_plan(const Tensor& like, int64_t steps, int64_t batch, int64_t directions, int64_t hidden,
                               bool stacked, bool backward) {
  OpScope op("lstm_plan", like);
  const auto sizes = recurrent::checked_steps(op, steps, batch, directions, hidden);
  return dispatch_floating(op, like.scalar_type(), [&]<class T>() {
    return plan_numbers<Lstm, T>(sizes, directions, hidden, stacked, backward);
  });
}

}  // namespace
}  // namespace pyops
