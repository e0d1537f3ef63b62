// attention: from the arguments of the ops to the Problem of the kernels, shared by CPU and CUDA.
#pragma once

#include "common/attention.h"
#include "common/registry.h"

namespace pyops::attention {

// The arguments that forward and backward have in common.
struct Arguments {
  const Tensor &q, &k, &v;
  const OptionalTensor &mask, &mask_examples, &lengths, &cu_q, &cu_k, &slopes, &random;
  double scale, softcap, dropout;
  int64_t left, right, max_q, max_k;
  bool bottom_right;

  bool packed() const { return cu_q.has_value(); }
  int64_t batch() const { return packed() ? cu_q->size(0) - 1 : q.size(0); }
  int64_t heads(const Tensor& t) const { return t.size(1); }
  int64_t rows(const Tensor& t) const { return packed() ? t.size(0) : t.size(2); }
  int64_t width(const Tensor& t) const { return packed() ? t.size(2) : t.size(3); }
};

// As OpScope::in, of a tensor as it lies in memory, whose strides the caller reads; they may be 0.
template <class T>
const T* in_place(const OpScope& op, const Tensor& q, const Tensor& t, const char* name, ShapeRef shape) {
  op.check(t.scalar_type() == scalar_type_of<T>, name, " has the wrong dtype: got ", t.scalar_type(), ", expected ",
           scalar_type_of<T>);
  op.check(t.device() == q.device(), name, " is on another device than the first argument");
  int64_t last = 0;
  op.check(t.dim() == static_cast<int64_t>(shape.rank()), name, " has the wrong number of dimensions: got ", t.dim());
  for (size_t d = 0; d < shape.rank(); ++d) {
    op.check(t.size(d) == shape[d], name, " has the wrong size in dimension ", d, ": got ", t.size(d), ", expected ",
             shape[d]);
    last += (shape[d] - 1) * t.stride(d);
  }
  auto* pointer = static_cast<const T*>(t.const_data_ptr());
#if defined(PYOPS_EMULATOR)
  emulator::register_range(pointer, t.numel() == 0 ? 0 : size_t(last + 1) * sizeof(T), false, name);
#endif
  return pointer;
}

// A tensor [B, heads, rows, width], or [rows, heads, width] when packed.
template <class T>
const T* in(const OpScope& op, const Arguments& a, const Tensor& t, const char* name, int64_t heads, int64_t rows,
            int64_t width) {
  return a.packed() ? op.in<T>(t, name, {rows, heads, width}) : op.in<T>(t, name, {a.batch(), heads, rows, width});
}
// Keys or values: all examples may share them, through a batch stride of 0.
inline bool is_shared(const Arguments& a, const Tensor& t) {
  return !a.packed() && t.dim() == 4 && t.size(0) > 1 && t.stride(0) == 0;
}
template <class T>
const T* in_shared(const OpScope& op, const Arguments& a, const Tensor& t, const char* name, int64_t heads,
                   int64_t rows, int64_t width) {
  if (!is_shared(a, t)) return in<T>(op, a, t, name, heads, rows, width);
  const int64_t size[3] = {heads, rows, width};
  int64_t step = 1;
  for (int d = 2; d >= 0; step *= size[d--])
    op.check(size[d] <= 1 || t.stride(d + 1) == step, name, " must be contiguous but for the batch");
  return in_place<T>(op, a.q, t, name, {a.batch(), heads, rows, width});
}
template <class T>
T* out(const OpScope& op, const Arguments& a, const Tensor& t, const char* name, int64_t heads, int64_t rows,
       int64_t width) {
  return a.packed() ? op.out<T>(t, name, {rows, heads, width}) : op.out<T>(t, name, {a.batch(), heads, rows, width});
}
template <class T>
Tensor empty(const OpScope& op, const Arguments& a, int64_t heads, int64_t rows, int64_t width) {
  return a.packed() ? op.empty<T>({rows, heads, width}) : op.empty<T>({a.batch(), heads, rows, width});
}
// lse [B, H, L], or [H, rows] when packed.
template <class T>
Tensor empty_lse(const OpScope& op, const Arguments& a) {
  return a.packed() ? op.empty<T>({a.heads(a.q), a.rows(a.q)}) : op.empty<T>({a.batch(), a.heads(a.q), a.rows(a.q)});
}
template <class T>
const T* in_lse(const OpScope& op, const Arguments& a, const Tensor& t, const char* name) {
  return a.packed() ? op.in<T>(t, name, {a.heads(a.q), a.rows(a.q)})
                    : op.in<T>(t, name, {a.batch(), a.heads(a.q), a.rows(a.q)});
}
template <class T>
T* out_lse(const OpScope& op, const Arguments& a, const Tensor& t) {
  return a.packed() ? op.out<T>(t, "lse", {a.heads(a.q), a.rows(a.q)})
                    : op.out<T>(t, "lse", {a.batch(), a.heads(a.q), a.rows(a.q)});
}

inline Strides strides(bool packed, int64_t heads, int64_t rows, int64_t width) {
  if (packed) return {0, width, heads * width};
  return {heads * rows * width, rows * width, width};
}

template <class acc_t>
Problem<acc_t> problem(const OpScope& op, const Arguments& a) {
  const bool packed = a.packed();
  const int64_t rank = packed ? 3 : 4;
  op.check(a.q.dim() == rank && a.k.dim() == rank && a.v.dim() == rank, "q, k, v must have ", rank, " dimensions");
  const int64_t B = a.batch(), H = a.heads(a.q), K = a.heads(a.k), D = a.width(a.q), E = a.width(a.v);
  op.check(packed == a.cu_k.has_value(), "cu_q and cu_k go together");
  op.check(K > 0 ? H % K == 0 : H == 0, "the heads of q must be a multiple of those of k");
  op.check(D >= 1 && E >= 1, "head sizes must be positive");
  Problem<acc_t> p{};
  p.B = B, p.H = H, p.G = K > 0 ? H / K : 1, p.D = D, p.E = E;
  p.rows_q = a.rows(a.q), p.rows_k = a.rows(a.k);
  p.L = packed ? a.max_q : p.rows_q, p.S = packed ? a.max_k : p.rows_k;
  p.q = strides(packed, H, p.rows_q, D), p.o = strides(packed, H, p.rows_q, E);
  p.k = p.dk = strides(packed, K, p.rows_k, D), p.v = p.dv = strides(packed, K, p.rows_k, E);
  if (is_shared(a, a.k)) p.k.batch = 0;
  if (is_shared(a, a.v)) p.v.batch = 0;
  p.lse_batch = packed ? 0 : H * p.rows_q, p.lse_head = p.rows_q;
  if (a.mask.has_value()) {
    op.check(!packed && a.mask->dim() == 4, "mask must have 4 dimensions, and none goes with packed sequences");
    const bool chosen = a.mask_examples.has_value();
    const int64_t full[4] = {B, H, p.L, p.S};
    int64_t size[4], stride[4];
    for (int d = 0; d < 4; ++d) {
      size[d] = a.mask->size(d);
      op.check(size[d] == 1 || size[d] == full[d] || (d == 0 && chosen && size[d] > 0),
               "mask is not broadcastable in dimension ", d);
      stride[d] = size[d] == 1 ? 0 : a.mask->stride(d);
    }
    p.mask_batch = stride[0], p.mask_head = stride[1], p.mask_row = stride[2], p.mask_column = stride[3];
    p.mask_count = size[0];
    p.mask_examples = op.in_optional<int64_t>(a.mask_examples, "mask_examples", {B});
    const ScalarType type = a.mask->scalar_type();
    const ShapeRef shape(*a.mask);
    if (type == ScalarType::Bool)
      p.allowed = in_place<bool>(op, a.q, *a.mask, "mask", shape);
    else if (type == ScalarType::BFloat16 && type == a.q.scalar_type())
      p.bias_bf16 = in_place<bfloat16_t>(op, a.q, *a.mask, "mask", shape);
    else if (type == ScalarType::Half && type == a.q.scalar_type())
      p.bias_fp16 = in_place<half_t>(op, a.q, *a.mask, "mask", shape);
    else
      p.bias = in_place<acc_t>(op, a.q, *a.mask, "mask", shape);
  }
  p.lengths = op.in_optional<int64_t>(a.lengths, "lengths", {B});
  p.cu_q = op.in_optional<int64_t>(a.cu_q, "cu_q", {B + 1});
  p.cu_k = op.in_optional<int64_t>(a.cu_k, "cu_k", {B + 1});
  if (a.slopes.has_value()) {
    const bool per_example = a.slopes->dim() == 2;
    p.slopes = per_example ? op.in<acc_t>(*a.slopes, "slopes", {B, H}) : op.in<acc_t>(*a.slopes, "slopes", {H});
    p.slopes_batch = per_example ? H : 0;
  }
  p.random = a.dropout > 0 ? op.in_optional<int64_t>(a.random, "random", {2}) : nullptr;
  op.check(a.dropout >= 0 && a.dropout <= 1 && (a.dropout == 0 || p.random != nullptr), "dropout needs random");
  p.threshold = uint32_t(std::nearbyint(a.dropout * double(uint32_t(1) << 31)));
  p.keep_scale = acc_t(a.dropout < 1 ? 1 / (1 - a.dropout) : 0);
  p.scale = acc_t(a.scale), p.softcap = acc_t(a.softcap);
  p.left = a.left, p.right = a.right, p.bottom_right = a.bottom_right;
  return p;
}

}  // namespace pyops::attention
