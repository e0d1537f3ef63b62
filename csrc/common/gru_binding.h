// gru: the ops, from tensors to the kernels that cpu/gru.cpp and cuda/gru.cu include before this.
#pragma once

#include "common/recurrent.h"
#include "common/registry.h"

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

}  // namespace
}  // namespace pyops
