// layer_norm_lstm: the ops, from tensors to the kernels that cpu/layer_norm_lstm.cpp and cuda/layer_norm_lstm.cu define
// before they include this.
#pragma once

#include "common/registry.h"

namespace pyops {
#if defined(PYOPS_CPU_CAPABILITY)
namespace PYOPS_CPU_CAPABILITY {
#else
namespace {
#endif

template <class T>
NormalisedGates<T> normalised_gates(const OpScope& op, const Tensor& x, const Tensor& y, const Tensor& c,
                                    const Tensor& gain_x, const Tensor& gain_y, const OptionalTensor& bias,
                                    const Tensor& gain_c, const OptionalTensor& bias_c) {
  const int64_t B = c.size(0), H = c.size(1);
  return {op.in<T>(x, "x", {B, 4 * H}),
          op.in<T>(y, "y", {B, 4 * H}),
          op.in<T>(c, "c", {B, H}),
          op.in<T>(gain_x, "gain_x", {4 * H}),
          op.in<T>(gain_y, "gain_y", {4 * H}),
          op.in_optional<T>(bias, "bias", {4 * H}),
          op.in<T>(gain_c, "gain_c", {H}),
          op.in_optional<T>(bias_c, "bias_c", {H}),
          B,
          H};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_lstm_gates_fwd(const Tensor& x, const Tensor& y, const Tensor& c,
                                                             const Tensor& gain_x, const Tensor& gain_y,
                                                             const OptionalTensor& bias, const Tensor& gain_c,
                                                             const OptionalTensor& bias_c, double eps) {
  OpScope op("layer_norm_lstm_gates_fwd", x);
  op.check(c.dim() == 2, "c must be [B, H]");
  const int64_t B = c.size(0), H = c.size(1);
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    using A = accumulate_t<T>;
    Tensor next_h = op.empty<T>({B, H}), next_c = op.empty<T>({B, H}), statistics = op.empty<A>({B, 6});
    const NormalisedGates<T> in = normalised_gates<T>(op, x, y, c, gain_x, gain_y, bias, gain_c, bias_c);
    normalised_gates_forward<T>(in, eps, op.out<T>(next_h, "h'", {B, H}), op.out<T>(next_c, "c'", {B, H}),
                                op.out<A>(statistics, "statistics", {B, 6}), op.stream());
    return std::tuple(next_h, next_c, statistics);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> layer_norm_lstm_gates_bwd(
    const OptionalTensor& dh, const OptionalTensor& dc, const Tensor& x, const Tensor& y, const Tensor& c,
    const Tensor& gain_x, const Tensor& gain_y, const OptionalTensor& bias, const Tensor& gain_c,
    const OptionalTensor& bias_c, const Tensor& next_c, const Tensor& statistics) {
  OpScope op("layer_norm_lstm_gates_bwd", x);
  op.check(c.dim() == 2, "c must be [B, H]");
  const int64_t B = c.size(0), H = c.size(1);
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    using A = accumulate_t<T>;
    Tensor dx = op.empty<T>({B, 4 * H}), dy = op.empty<T>({B, 4 * H}), dstate = op.empty<T>({B, H});
    Tensor da = op.empty<A>({B, 4 * H}), dz = op.empty<A>({B, H});
    const NormalisedGates<T> in = normalised_gates<T>(op, x, y, c, gain_x, gain_y, bias, gain_c, bias_c);
    const NormalisedGateGradients<T> out{
        op.in_optional<T>(dh, "dh", {B, H}), op.in_optional<T>(dc, "dc", {B, H}),
        op.in<T>(next_c, "c'", {B, H}),      op.in<A>(statistics, "statistics", {B, 6}),
        op.out<T>(dx, "dx", {B, 4 * H}),     op.out<T>(dy, "dy", {B, 4 * H}),
        op.out<T>(dstate, "dc", {B, H}),     op.out<A>(da, "da", {B, 4 * H}),
        op.out<A>(dz, "dz", {B, H})};
    normalised_gates_backward<T>(in, out, op.stream());
    return std::tuple(dx, dy, dstate, da, dz);
  });
}

}  // namespace
}  // namespace pyops
