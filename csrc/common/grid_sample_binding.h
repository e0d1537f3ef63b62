// What the CPU and the CUDA binding of grid_sample share.
#pragma once

#include "common/grid_sample.h"
#include "common/tensor.h"

namespace pyops::grid_sample {

inline Shape shape_of(const OpScope& op, const Tensor& x, const Tensor& grid, int64_t mode, int64_t padding,
                      bool align_corners, bool channels_last) {
  op.check(x.dim() == 5 && grid.dim() == 3, "expected x of 5 dimensions and grid of 3");
  op.check(mode >= 0 && mode < modes && padding >= 0 && padding < paddings, "unknown mode or padding");
  const int first = channels_last ? 1 : 2;
  const Shape s{x.size(0),
                x.size(channels_last ? 4 : 1),
                x.size(first),
                x.size(first + 1),
                x.size(first + 2),
                grid.size(1),
                grid.size(2),
                channels_last,
                {padding, align_corners}};
  op.check(s.dims == 3 || (s.dims == 2 && s.D == 1), "grid must have 3 coordinates, or 2 where x has one plane");
  op.check(mode != bicubic || s.dims == 2, "bicubic sampling has two dimensions");
  constexpr int64_t most = int64_t{1} << 31;
  op.check(s.D > 0 && s.H > 0 && s.W > 0, "x has an empty axis");
  op.check(s.D < most && s.H < most && s.W < most && s.S() < most && s.P < most / 16, "x or grid is too large");
  return s;
}

template <class T>
const T* in_x(const OpScope& op, const Tensor& t, const Shape& s) {
  return s.channels_last ? op.in<T>(t, "x", {s.N, s.D, s.H, s.W, s.C}) : op.in<T>(t, "x", {s.N, s.C, s.D, s.H, s.W});
}
template <class T>
const T* in_grid(const OpScope& op, const Tensor& t, const Shape& s) {
  return op.in<T>(t, "grid", {s.N, s.P, s.dims});
}
template <class T>
const T* in_dy(const OpScope& op, const Tensor& t, const Shape& s) {
  return s.channels_last ? op.in<T>(t, "dy", {s.N, s.P, s.C}) : op.in<T>(t, "dy", {s.N, s.C, s.P});
}
inline Tensor empty_y(const OpScope& op, const Shape& s, ScalarType dtype) {
  return s.channels_last ? op.empty({s.N, s.P, s.C}, dtype) : op.empty({s.N, s.C, s.P}, dtype);
}
template <class T>
T* out_y(const OpScope& op, const Tensor& t, const Shape& s) {
  return s.channels_last ? op.out<T>(t, "y", {s.N, s.P, s.C}) : op.out<T>(t, "y", {s.N, s.C, s.P});
}
template <class T>
T* out_like(const OpScope& op, const Tensor& t, const char* name, const Tensor& like) {
  return op.out<T>(t, name, ShapeRef(like));
}

// f.template operator()<T>() for as many elements as a coordinate reads.
template <class F>
decltype(auto) dispatch_mode(int64_t mode, F&& f) {
  if (mode == nearest) return f.template operator()<1>();
  return mode == bilinear ? f.template operator()<2>() : f.template operator()<4>();
}

}  // namespace pyops::grid_sample
