// What the CPU and the CUDA binding of pad share: x [N, A0, A1, A2, K] becomes y [N, B0, B1, B2, K].
#pragma once

#include <vector>

#include "common/pad.h"
#include "common/resized.h"
#include "common/tensor.h"

namespace pyops::pad {

using resized::empty_x, resized::empty_y, resized::in_x, resized::in_y, resized::out_x, resized::out_y;
using Ints = std::vector<int64_t>;

using Shape = resized::Shape<Axis>;

// `t` is x and `other` the sizes of y where forward, else t is y and `other` the sizes of x.
inline Shape shape_of(const OpScope& op, const Tensor& t, const Ints& before, const Ints& other, int64_t mode,
                      bool forward) {
  op.check(t.dim() == 5 && before.size() == 3 && other.size() == 3, "expected a tensor of 5 dimensions and 3 axes");
  op.check(mode >= 0 && mode < modes, "mode must be in [0, ", int64_t(modes), "), got ", mode);
  Shape s{t.size(0), t.size(4), {}};
  for (int d = 0; d < 3; ++d) {
    const int64_t here = t.size(d + 1), in = forward ? here : other[d], out = forward ? other[d] : here;
    s.axis[d] = {in, out, before[d]};
    const int64_t after = out - in - before[d];
    op.check(in >= 0 && out >= 0, "axis ", d, " has a negative size");
    // what the modes read must exist: nothing is read outside x
    const int64_t most = before[d] > after ? before[d] : after;
    op.check(mode == constant || most <= 0 ||
                 (mode == reflect    ? most < in
                  : mode == circular ? most <= in
                                     : in > 0),
             "axis ", d, " of size ", in, " is too short for padding of ", most);
  }
  return s;
}

}  // namespace pyops::pad
