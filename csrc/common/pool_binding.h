// What the two bindings of pool share: the window's numbers from the schema, checked.
#pragma once

#include "common/pool.h"
#include "common/tensor.h"

namespace pyops::pool {

// window = [adaptive, then out, kernel, stride, padding, dilation for d, h and w]; size = [P, D, H, W, C].
inline Shape shape_of(const OpScope& op, const std::vector<int64_t>& size, const std::vector<int64_t>& window) {
  op.check(size.size() == 5 && window.size() == 16, "size must have 5 and window 16 numbers");
  const auto dimension = [&](int k) {
    const int64_t* w = window.data() + 1 + 5 * k;
    const Dimension d{size[size_t(k) + 1], w[0], w[1], w[2], w[3], w[4], window[0] != 0};
    op.check(d.out > 0 && d.in > 0 && d.kernel > 0 && d.stride > 0 && d.padding >= 0 && d.dilation > 0,
             "sizes, kernel, stride and dilation must be positive");
    op.check(
        d.adaptive || ((d.out - 1) * d.stride < d.in + d.padding && 2 * d.padding <= (d.kernel - 1) * d.dilation + 1),
        "a window lies outside the input");
    return d;
  };
  return {size[0], size[4], dimension(0), dimension(1), dimension(2)};
}

}  // namespace pyops::pool
