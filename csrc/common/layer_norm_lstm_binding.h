// layer_norm_lstm: the ops, from tensors to the kernels that cpu/layer_norm_lstm.cpp and cuda/layer_norm_lstm.cu define
// before they include this.
#pragma once

#include "common/recurrent_binding.h"

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
  return {{op.in<T>(gain_x, "gain_x", {4 * H}), op.in<T>(gain_y, "gain_y", {4 * H}),
           op.in_optional<T>(bias, "bias", {4 * H}), op.in<T>(gain_c, "gain_c", {H}),
           op.in_optional<T>(bias_c, "bias_c", {H}), H},
          op.in<T>(x, "x", {B, 4 * H}),
          op.in<T>(y, "y", {B, 4 * H}),
          op.in<T>(c, "c", {B, H}),
          B};
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

// What both passes of a layer read.
template <class T>
NormalisedSequence<T> normalised_sequence(const OpScope& op, const Tensor& x, const Tensor& h0, const Tensor& c0,
                                          const Tensor& w_hh, const Tensor& gain_x, const Tensor& gain_y,
                                          const OptionalTensor& bias, const Tensor& gain_c,
                                          const OptionalTensor& bias_c, const OptionalTensor& starts) {
  NormalisedSequence<T> s{};
  static_cast<recurrent::Sequence<T>&>(s) = recurrent::sizes_of<T>(op, x, h0, starts, 4);
  const int64_t N = s.steps.N, B = s.steps.B, D = s.D, H = s.H;
  op.check(s.P == H, "h0 must be [D, B, H]");
  s.gates = op.in<T>(x, "x", {N, D, 4 * H}), s.h0 = op.in<T>(h0, "h0", {D, B, H});
  s.c0 = op.in<T>(c0, "c0", {D, B, H}), s.w_hh = op.in<T>(w_hh, "w_hh", {D, 4 * H, H});
  s.parameters = {op.in<T>(gain_x, "gain_x", {D, 4 * H}),      op.in<T>(gain_y, "gain_y", {D, 4 * H}),
                  op.in_optional<T>(bias, "bias", {D, 4 * H}), op.in<T>(gain_c, "gain_c", {D, H}),
                  op.in_optional<T>(bias_c, "bias_c", {D, H}), H};
  return s;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> layer_norm_lstm_layer_fwd(
    const Tensor& x, const Tensor& h0, const Tensor& c0, const Tensor& w_hh, const Tensor& gain_x, const Tensor& gain_y,
    const OptionalTensor& bias, const Tensor& gain_c, const OptionalTensor& bias_c, const OptionalTensor& starts,
    double eps, bool keep) {
  OpScope op("layer_norm_lstm_layer_fwd", x);
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    using A = accumulate_t<T>;
    auto s = normalised_sequence<T>(op, x, h0, c0, w_hh, gain_x, gain_y, bias, gain_c, bias_c, starts);
    const int64_t N = s.steps.N, B = s.steps.B, D = s.D, H = s.H;
    Tensor y = op.empty<T>({N, D, H}), h_n = op.empty<T>({D, B, H}), c_n = op.empty<T>({D, B, H});
    Tensor products = keep ? op.empty<T>({N, D, 4 * H}) : op.empty<T>({0});
    Tensor cells = keep ? op.empty<T>({N, D, H}) : op.empty<T>({0});
    Tensor statistics = keep ? op.empty<A>({N, D, 6}) : op.empty<A>({0});
    s.eps = eps;
    s.y = op.out<T>(y, "y", {N, D, H}), s.h_n = op.out<T>(h_n, "h_n", {D, B, H});
    s.c_n = op.out<T>(c_n, "c_n", {D, B, H});
    s.saved = keep ? op.out<T>(products, "products", {N, D, 4 * H}) : nullptr;
    s.cells = keep ? op.out<T>(cells, "cells", {N, D, H}) : nullptr;
    s.statistics = keep ? op.out<A>(statistics, "statistics", {N, D, 6}) : nullptr;
    normalised_layer_forward<T>(op, s);
    return std::tuple(y, h_n, c_n, products, cells, statistics);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> layer_norm_lstm_layer_bwd(
    const OptionalTensor& dy, const OptionalTensor& dh_n, const OptionalTensor& dc_n, const Tensor& x, const Tensor& h0,
    const Tensor& c0, const Tensor& w_hh, const Tensor& gain_x, const Tensor& gain_y, const OptionalTensor& bias,
    const Tensor& gain_c, const OptionalTensor& bias_c, const OptionalTensor& starts, const Tensor& products,
    const Tensor& cells, const Tensor& statistics) {
  OpScope op("layer_norm_lstm_layer_bwd", x);
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    using A = accumulate_t<T>;
    auto s = normalised_sequence<T>(op, x, h0, c0, w_hh, gain_x, gain_y, bias, gain_c, bias_c, starts);
    const int64_t N = s.steps.N, B = s.steps.B, D = s.D, H = s.H;
    Tensor dx = op.empty<T>({N, D, 4 * H}), dproducts = op.empty<T>({N, D, 4 * H});
    Tensor dh0 = op.empty<T>({D, B, H}), dc0 = op.empty<T>({D, B, H});
    Tensor dgain_x = op.empty<T>({D, 4 * H}), dgain_y = op.empty<T>({D, 4 * H}), dgain_c = op.empty<T>({D, H});
    Tensor dbias = bias.has_value() ? op.empty<T>({D, 4 * H}) : op.empty<T>({0});
    Tensor dbias_c = bias_c.has_value() ? op.empty<T>({D, H}) : op.empty<T>({0});
    s.dy = op.in_optional<T>(dy, "dy", {N, D, H}), s.dh_n = op.in_optional<T>(dh_n, "dh_n", {D, B, H});
    s.dc_n = op.in_optional<T>(dc_n, "dc_n", {D, B, H});
    s.saved = const_cast<T*>(op.in<T>(products, "products", {N, D, 4 * H}));
    s.cells = const_cast<T*>(op.in<T>(cells, "cells", {N, D, H}));
    s.statistics = const_cast<A*>(op.in<A>(statistics, "statistics", {N, D, 6}));
    s.dgates = op.out<T>(dx, "dx", {N, D, 4 * H}), s.dh_gates = op.out<T>(dproducts, "dproducts", {N, D, 4 * H});
    s.dh0 = op.out<T>(dh0, "dh0", {D, B, H}), s.dc0 = op.out<T>(dc0, "dc0", {D, B, H});
    s.dgain_x = op.out<T>(dgain_x, "dgain_x", {D, 4 * H}), s.dgain_y = op.out<T>(dgain_y, "dgain_y", {D, 4 * H});
    s.dbias = bias.has_value() ? op.out<T>(dbias, "dbias", {D, 4 * H}) : nullptr;
    s.dgain_c = op.out<T>(dgain_c, "dgain_c", {D, H});
    s.dbias_c = bias_c.has_value() ? op.out<T>(dbias_c, "dbias_c", {D, H}) : nullptr;
    normalised_layer_backward<T>(op, s);
    return std::tuple(dx, dproducts, dh0, dc0, dgain_x, dgain_y, dbias, dgain_c, dbias_c);
  });
}

}  // namespace
}  // namespace pyops
