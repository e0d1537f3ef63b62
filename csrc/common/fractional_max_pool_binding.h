// What the two bindings of fractional_max_pool share: the window's numbers from the schema, checked.
#pragma once

#include "common/fractional_max_pool.h"
#include "common/tensor.h"

namespace pyops::fractional_max_pool {

// size = [P, D, H, W]; window = [out, kernel for d, h and w].
inline Shape shape_of(const OpScope& op, const std::vector<int64_t>& size, const std::vector<int64_t>& window) {
  op.check(size.size() == 4 && window.size() == 6, "size must have 4 and window 6 numbers");
  const auto axis = [&](size_t k) {
    const Axis a{size[1 + k], window[2 * k], window[2 * k + 1]};
    op.check(a.out > 0 && a.kernel > 0 && a.out + a.kernel - 1 <= a.in, "windows do not fit the input");
    return a;
  };
  return {size[0], axis(0), axis(1), axis(2)};
}

}  // namespace pyops::fractional_max_pool
