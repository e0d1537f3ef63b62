// additive_attention: the ops, from tensors to the kernels that cpu/additive_attention.cpp and
// cuda/additive_attention.cu define before they include this.
//
//   score[l,s] = v . tanh(q[l] + k[s]) + mask[l,s]     p = softmax over s     y[l] = sum_s p[l,s] value[s]
//
// q [N, L, D]   k [N, S, D]   value [N, S, E]   v [D]   mask [N or 1, L or 1, S], added, in the dtype of sums   y [N, L, E]   lse [N, L]
// dv [N, L, D]: the share of each row. A row that sees nothing gives y = 0; its lse is +infinity, so that p = 0.
#pragma once

#include "common/additive_attention.h"
#include "common/registry.h"

namespace pyops {
#if defined(PYOPS_CPU_CAPABILITY)
namespace PYOPS_CPU_CAPABILITY {
#else
namespace {
#endif

template <class T>
AdditiveAttention<T> additive_attention_inputs(const OpScope& op, const Tensor& q, const Tensor& k, const Tensor& value,
                                               const Tensor& v, const OptionalTensor& mask) {
  op.check(q.dim() == 3 && k.dim() == 3 && value.dim() == 3, "q, k and value must be [N, L, D], [N, S, D], [N, S, E]");
  AdditiveAttention<T> a{};
  a.N = q.size(0), a.L = q.size(1), a.D = q.size(2), a.S = k.size(1), a.E = value.size(2);
  a.q = op.in<T>(q, "q", {a.N, a.L, a.D}), a.k = op.in<T>(k, "k", {a.N, a.S, a.D});
  a.value = op.in<T>(value, "value", {a.N, a.S, a.E}), a.v = op.in<T>(v, "v", {a.D});
  if (mask.has_value()) {
    const int64_t n = mask->size(0), l = mask->size(1);
    op.check(mask->dim() == 3 && (n == a.N || n == 1) && (l == a.L || l == 1), "mask must be [N or 1, L or 1, S]");
    a.mask = op.in<accumulate_t<T>>(*mask, "mask", {n, l, a.S});
    a.mask_n = n == 1 ? 0 : l * a.S, a.mask_l = l == 1 ? 0 : a.S;
  }
  return a;
}

std::tuple<Tensor, Tensor> additive_attention_fwd(const Tensor& q, const Tensor& k, const Tensor& value,
                                                  const Tensor& v, const OptionalTensor& mask) {
  OpScope op("additive_attention_fwd", q);
  return dispatch_floating(op, q.scalar_type(), [&]<class T>() {
    using A = accumulate_t<T>;
    const auto a = additive_attention_inputs<T>(op, q, k, value, v, mask);
    Tensor y = op.empty<T>({a.N, a.L, a.E}), lse = op.empty<A>({a.N, a.L});
    Tensor scores = op.empty<A>({AdditiveAttention<T>::keeps_scores ? a.N * a.L * a.S : 0});
    additive_attention_forward<T>(a, op.out<A>(scores, "scores", {scores.numel()}), op.out<T>(y, "y", {a.N, a.L, a.E}),
                                  op.out<A>(lse, "lse", {a.N, a.L}), op.stream());
    return std::tuple(y, lse);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> additive_attention_bwd(const Tensor& dy, const Tensor& q, const Tensor& k,
                                                                  const Tensor& value, const Tensor& v,
                                                                  const OptionalTensor& mask, const Tensor& y,
                                                                  const Tensor& lse) {
  OpScope op("additive_attention_bwd", q);
  return dispatch_floating(op, q.scalar_type(), [&]<class T>() {
    using A = accumulate_t<T>;
    const auto a = additive_attention_inputs<T>(op, q, k, value, v, mask);
    Tensor dq = op.empty<T>({a.N, a.L, a.D}), dk = op.empty<T>({a.N, a.S, a.D}), dvalue = op.empty<T>({a.N, a.S, a.E});
    Tensor dv = op.empty<A>({a.N, a.L, a.D}), p = op.empty<A>({a.N, a.L, a.S}), ds = op.empty<A>({a.N, a.L, a.S});
    const AdditiveAttentionGradients<T> g{
        op.in<T>(dy, "dy", {a.N, a.L, a.E}),  op.in<T>(y, "y", {a.N, a.L, a.E}),
        op.in<A>(lse, "lse", {a.N, a.L}),     op.out<T>(dq, "dq", {a.N, a.L, a.D}),
        op.out<T>(dk, "dk", {a.N, a.S, a.D}), op.out<T>(dvalue, "dvalue", {a.N, a.S, a.E}),
        op.out<A>(dv, "dv", {a.N, a.L, a.D}), op.out<A>(p, "p", {a.N, a.L, a.S}),
        op.out<A>(ds, "ds", {a.N, a.L, a.S})};
    additive_attention_backward<T>(a, g, op.stream());
    return std::tuple(dq, dk, dvalue, dv);
  });
}

}  // namespace
}  // namespace pyops
