// A tensor whose three inner axes change their sizes: x [N, A0, A1, A2, K] and y [N, B0, B1, B2, K], as the rooms pad and
// interpolate make them. An Axis has the sizes `in` and `out`.
#pragma once

#include "common/tensor.h"

namespace pyops::resized {

template <class Axis>
struct Shape {
  int64_t N, K;
  Axis axis[3];

  int64_t in_elements() const { return N * axis[0].in * axis[1].in * axis[2].in * K; }
  int64_t out_elements() const { return N * axis[0].out * axis[1].out * axis[2].out * K; }
};

template <class Axis>
Tensor empty_x(const OpScope& op, const Shape<Axis>& s, ScalarType dtype) {
  return op.empty({s.N, s.axis[0].in, s.axis[1].in, s.axis[2].in, s.K}, dtype);
}
template <class Axis>
Tensor empty_y(const OpScope& op, const Shape<Axis>& s, ScalarType dtype) {
  return op.empty({s.N, s.axis[0].out, s.axis[1].out, s.axis[2].out, s.K}, dtype);
}
template <class T, class Axis>
const T* in_x(const OpScope& op, const Tensor& t, const Shape<Axis>& s) {
  return op.in<T>(t, "x", {s.N, s.axis[0].in, s.axis[1].in, s.axis[2].in, s.K});
}
template <class T, class Axis>
const T* in_y(const OpScope& op, const Tensor& t, const Shape<Axis>& s) {
  return op.in<T>(t, "dy", {s.N, s.axis[0].out, s.axis[1].out, s.axis[2].out, s.K});
}
template <class T, class Axis>
T* out_x(const OpScope& op, const Tensor& t, const Shape<Axis>& s) {
  return op.out<T>(t, "dx", {s.N, s.axis[0].in, s.axis[1].in, s.axis[2].in, s.K});
}
template <class T, class Axis>
T* out_y(const OpScope& op, const Tensor& t, const Shape<Axis>& s) {
  return op.out<T>(t, "y", {s.N, s.axis[0].out, s.axis[1].out, s.axis[2].out, s.K});
}

}  // namespace pyops::resized
