// What the bindings of the convolution rooms share: canonical tensors in either layout.
#pragma once

#include "common/conv.h"
#include "common/tensor.h"

namespace pyops::conv {

using Ints = std::vector<int64_t>;

inline Ints space_of(const Tensor& t, bool channels_last) {
  const int64_t first = channels_last ? 1 : 2;
  return {t.size(first), t.size(first + 1), t.size(first + 2)};
}
inline int64_t channels_of(const Tensor& t, bool channels_last) { return t.size(channels_last ? 4 : 1); }

inline Tensor image(const OpScope& op, ScalarType dtype, int64_t n, int64_t c, const int64_t (&s)[3],
                    bool channels_last) {
  return channels_last ? op.empty({n, s[0], s[1], s[2], c}, dtype) : op.empty({n, c, s[0], s[1], s[2]}, dtype);
}
template <class T>
const T* image_in(const OpScope& op, const Tensor& t, const char* name, int64_t n, int64_t c, const int64_t (&s)[3],
                  bool channels_last) {
  return channels_last ? op.in<T>(t, name, {n, s[0], s[1], s[2], c}) : op.in<T>(t, name, {n, c, s[0], s[1], s[2]});
}
template <class T>
const T* optional_image_in(const OpScope& op, const OptionalTensor& t, const char* name, int64_t n, int64_t c,
                           const int64_t (&s)[3], bool channels_last) {
  return t.has_value() ? image_in<T>(op, *t, name, n, c, s, channels_last) : nullptr;
}
template <class T>
T* image_out(const OpScope& op, const Tensor& t, const char* name, int64_t n, int64_t c, const int64_t (&s)[3],
             bool channels_last) {
  return channels_last ? op.out<T>(t, name, {n, s[0], s[1], s[2], c}) : op.out<T>(t, name, {n, c, s[0], s[1], s[2]});
}

// The sizes of each of the three ops, from their tensors.
inline Sizes fwd_sizes(const OpScope& op, const Tensor& x, const Tensor& w, int64_t groups, bool last,
                       const Ints& stride, const Ints& padding, const Ints& dilation) {
  op.check(x.dim() == 5 && w.dim() == 5, "x and w must have 5 dimensions");
  return sizes_of(op, x.size(0), channels_of(x, last), w.size(0), groups, space_of(x, last), {}, space_of(w, last),
                  stride, padding, dilation);
}
inline Sizes dgrad_sizes(const OpScope& op, const Tensor& dy, const Tensor& w, const Ints& size, int64_t groups,
                         bool last, const Ints& stride, const Ints& padding, const Ints& dilation) {
  op.check(dy.dim() == 5 && w.dim() == 5, "dy and w must have 5 dimensions");
  return sizes_of(op, dy.size(0), channels_of(w, last) * groups, w.size(0), groups, size, space_of(dy, last),
                  space_of(w, last), stride, padding, dilation);
}
inline Sizes wgrad_sizes(const OpScope& op, const Tensor& dy, const Tensor& x, const Ints& taps, int64_t groups,
                         bool last, const Ints& stride, const Ints& padding, const Ints& dilation) {
  op.check(dy.dim() == 5 && x.dim() == 5, "dy and x must have 5 dimensions");
  return sizes_of(op, x.size(0), channels_of(x, last), channels_of(dy, last), groups, space_of(x, last),
                  space_of(dy, last), taps, stride, padding, dilation);
}

}  // namespace pyops::conv
