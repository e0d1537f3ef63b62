// attention · CUDA
//   o[i] = sum_j p[i,j] v[j],  p = softmax_j(score),  lse[i] = log sum_j exp(score[i,j])      (common/attention.h)
//   dv[j] = sum_i p do[i],  ds = p * (do[i].v[j] - delta[i]) * scale,  delta[i] = do[i].o[i] - dlse[i]
//   dq[i] = sum_j ds k[j],  dk[j] = sum_i ds q[i]
// layout   q: [B, H, L, D] · k: [B, H / G, S, D] · v: [B, H / G, S, E] · o: [B, H, L, E] · lse: [B, H, L], or packed
// mapping  bf16, fp16: tensor cores (attention_mma.cuh, on Hopper attention_hopper.cu); fp32, fp64: CUDA cores
//          (attention_plain.cuh); few queries but of fp64: keys in parts (attention_decode.cuh)
// memory   q, k, v, o once per block of 64 rows of the other side, from L2; lse and delta beyond inputs and outputs
// numerics softmax and sums in fp32 (fp64 for fp64); deterministic
#include "common/attention_binding.h"
#include "cuda/attention_decode.cuh"
#include "cuda/attention_plain.cuh"

namespace pyops::attention {
namespace {

uint8_t* mask_state(const OpScope& op, const Problem<float>& p, const Tensor& state) {
  return p.has_mask() ? op.out<uint8_t>(state, "state of tiles", {state_bytes(p)}) : nullptr;
}

// The one choice between the kernels.
template <class T>
void forward(const OpScope& op, const Problem<accumulate_t<T>>& p, const Tensors<T>& t, cudaStream_t stream) {
  if constexpr (sizeof(T) <= 4)
    if (const int64_t count = decode_parts<T>(p); count > 0) {
      const int64_t rows = p.B * p.H * p.L;
      const Tensor o = op.empty<float>({count, rows, p.E}), softmax = op.empty<float>({2, count, rows});
      float* most = op.out<float>(softmax, "softmax of parts", {2, count, rows});
      const Parts parts{count, op.out<float>(o, "o of parts", {count, rows, p.E}), most, most + count * rows};
      return forward_decode(p, t, parts, stream);
    }
  if constexpr (sizeof(T) == 2) {
    if constexpr (hopper_built)
      if (suits_hopper(p, t)) {
        const Tensor state = op.empty<uint8_t>({state_bytes(p)});
        return forward_hopper(p, t, mask_state(op, p, state), stream);
      }
    forward_mma(p, t, stream);
  } else {
    forward_plain(p, t, stream);
  }
}
template <class T>
void backward(const OpScope& op, const Problem<accumulate_t<T>>& p, const Tensors<T>& t, cudaStream_t stream) {
  if constexpr (sizeof(T) == 2) {
    if constexpr (hopper_built)
      if (suits_hopper(p, t)) {
        const Tensor state = op.empty<uint8_t>({state_bytes(p)});
        return backward_hopper(p, t, mask_state(op, p, state), stream);
      }
    backward_mma(p, t, stream);
  } else {
    backward_plain(p, t, stream);
  }
}

}  // namespace
}  // namespace pyops::attention

// binding

namespace pyops {
namespace {

std::tuple<Tensor, Tensor> attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask,
                                         const OptionalTensor& mask_examples, const OptionalTensor& lengths,
                                         const OptionalTensor& cu_q, const OptionalTensor& cu_k,
                                         const OptionalTensor& slopes, const OptionalTensor& random, double scale,
                                         double softcap, int64_t left, int64_t right, bool bottom_right, double dropout,
                                         int64_t max_q, int64_t max_k) {
  OpScope op("attention_fwd", q);
  const attention::Arguments a{q,      k,     v,       mask,    mask_examples, lengths, cu_q,  cu_k,  slopes,
                               random, scale, softcap, dropout, left,          right,   max_q, max_k, bottom_right};
  return dispatch_floating(op, q.scalar_type(), [&]<class T>() {
    using A = accumulate_t<T>;
    const attention::Problem<A> p = attention::problem<A>(op, a);
    op.check(p.D <= 256 && p.E <= 256, "head sizes must be at most 256");
    const int64_t heads = a.heads(k);
    Tensor o = attention::empty<T>(op, a, p.H, p.rows_q, p.E), lse = attention::empty_lse<A>(op, a);
    attention::Tensors<T> t{};
    t.q = attention::in<T>(op, a, q, "q", p.H, p.rows_q, p.D);
    t.k = attention::in_shared<T>(op, a, k, "k", heads, p.rows_k, p.D);
    t.v = attention::in_shared<T>(op, a, v, "v", heads, p.rows_k, p.E);
    t.o = attention::out<T>(op, a, o, "o", p.H, p.rows_q, p.E);
    t.lse = attention::out_lse<A>(op, a, lse);
    const auto stream = static_cast<cudaStream_t>(op.stream());
    attention::forward(op, p, t, stream);
    return std::make_tuple(o, lse);
  });
}

std::tuple<Tensor, Tensor, Tensor> attention_bwd(const Tensor& dy, const OptionalTensor& dlse, const Tensor& q,
                                                 const Tensor& k, const Tensor& v, const Tensor& o, const Tensor& lse,
                                                 const OptionalTensor& mask, const OptionalTensor& mask_examples,
                                                 const OptionalTensor& lengths, const OptionalTensor& cu_q,
                                                 const OptionalTensor& cu_k, const OptionalTensor& slopes,
                                                 const OptionalTensor& random, double scale, double softcap,
                                                 int64_t left, int64_t right, bool bottom_right, double dropout,
                                                 int64_t max_q, int64_t max_k) {
  OpScope op("attention_bwd", dy);
  const attention::Arguments a{q,      k,     v,       mask,    mask_examples, lengths, cu_q,  cu_k,  slopes,
                               random, scale, softcap, dropout, left,          right,   max_q, max_k, bottom_right};
  return dispatch_floating(op, q.scalar_type(), [&]<class T>() {
    using A = accumulate_t<T>;
    const attention::Problem<A> p = attention::problem<A>(op, a);
    op.check(p.D <= 256 && p.E <= 256, "head sizes must be at most 256");
    const int64_t heads = a.heads(k);
    Tensor dq = attention::empty<T>(op, a, p.H, p.rows_q, p.D);
    Tensor dk = attention::empty<T>(op, a, heads, p.rows_k, p.D);
    Tensor dv = attention::empty<T>(op, a, heads, p.rows_k, p.E);
    Tensor delta = attention::empty_lse<A>(op, a);
    attention::Tensors<T> t{};
    t.dy = attention::in<T>(op, a, dy, "dy", p.H, p.rows_q, p.E);
    t.q = attention::in<T>(op, a, q, "q", p.H, p.rows_q, p.D);
    t.k = attention::in_shared<T>(op, a, k, "k", heads, p.rows_k, p.D);
    t.v = attention::in_shared<T>(op, a, v, "v", heads, p.rows_k, p.E);
    t.o_in = attention::in<T>(op, a, o, "o", p.H, p.rows_q, p.E);
    t.lse_in = attention::in_lse<A>(op, a, lse, "lse");
    t.dlse = dlse.has_value() ? attention::in_lse<A>(op, a, *dlse, "dlse") : nullptr;
    t.delta = attention::out_lse<A>(op, a, delta);
    t.dq = attention::out<T>(op, a, dq, "dq", p.H, p.rows_q, p.D);
    t.dk = attention::out<T>(op, a, dk, "dk", heads, p.rows_k, p.D);
    t.dv = attention::out<T>(op, a, dv, "dv", heads, p.rows_k, p.E);
    const auto stream = static_cast<cudaStream_t>(op.stream());
    launch(attention::attention_delta_kernel<T>,
           {.grid = static_cast<unsigned>(ceil_div(p.B * p.H * p.L, 4)), .block = 128, .stream = stream}, p, t);
    attention::backward(op, p, t, stream);
    return std::make_tuple(dq, dk, dv);
  });
}

}  // namespace
}  // namespace pyops

PYOPS_LIBRARY(m) {
  using namespace pyops;
  PYOPS_IMPL(m, attention_fwd);
  PYOPS_IMPL(m, attention_bwd);
}
