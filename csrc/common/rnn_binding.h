// rnn: the ops, from tensors to the kernels that cpu/rnn.cpp and cuda/rnn.cu include before this.
#pragma once

#include "common/recurrent.h"
#include "common/registry.h"

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

}  // namespace
}  // namespace pyops
