// What the CPU and the CUDA binding of interpolate share: x [N, A0, A1, A2, K] becomes y [N, B0, B1, B2, K].
#pragma once

#include <vector>

#include "common/interpolate.h"
#include "common/resized.h"
#include "common/tensor.h"

namespace pyops::interpolate {

using resized::empty_x, resized::empty_y, resized::in_x, resized::in_y, resized::out_x, resized::out_y;
using Ints = std::vector<int64_t>;
using Scales = std::vector<double>;

using Shape = resized::Shape<Axis>;

// A scale of 0 is none: the sizes say it.
inline double step_of(int64_t mode, bool align_corners, int64_t in, int64_t out, double scale) {
  if (mode <= nearest_exact) return scale > 0 ? float(1 / scale) : float(in) / float(out);
  if (align_corners) return out > 1 ? double(in - 1) / double(out - 1) : 0;
  return scale > 0 ? 1 / scale : double(in) / double(out);
}

// `t` is x and `other` the sizes of y where forward, else t is y and `other` the sizes of x.
inline Shape shape_of(const OpScope& op, const Tensor& t, const Ints& other, int64_t mode, bool align_corners,
                      const Scales& scales, bool forward) {
  op.check(t.dim() == 5 && other.size() == 3 && scales.size() == 3, "expected a tensor of 5 dimensions and 3 axes");
  op.check(mode >= 0 && mode < modes, "mode must be in [0, ", int64_t(modes), "), got ", mode);
  Shape s{t.size(0), t.size(4), {}};
  for (int d = 0; d < 3; ++d) {
    const int64_t here = t.size(d + 1), in = forward ? here : other[d], out = forward ? other[d] : here;
    constexpr int64_t most = int64_t{1} << 31;
    op.check(in > 0 && out > 0 && in < most && out < most, "axis ", d, ": sizes must be in [1, 2^31), got ", in,
             " and ", out);
    const double step = step_of(mode, align_corners, in, out, scales[d]);
    op.check(step >= 0 && step * double(out) < 1e15, "axis ", d, ": scale ", scales[d], " is out of range");
    s.axis[d] = {in, out, step, mode, align_corners};
  }
  return s;
}

}  // namespace pyops::interpolate
