// lstm: the ops, from tensors to the kernels that cpu/lstm.cpp and cuda/lstm.cu include before this.
#pragma once

#include "common/recurrent.h"
#include "common/registry.h"

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

}  // namespace
}  // namespace pyops
