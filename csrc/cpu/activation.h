// The activations of common/activation.h on blocks of at most elementwise_block numbers, chosen once for a block.
#pragma once

#include "common/activation.h"
#include "cpu/elementwise.h"
#include "cpu/math.h"

namespace pyops::PYOPS_CPU_CAPABILITY {

using activation::Parameters;

// y = f(x), and dx = dy * f'(x): over n <= elementwise_block numbers, past the caches when `streamed`. activation.cpp
// holds them for float and double, so that a fused kernel compiles in no time.
template <class acc_t>
void activation_block(int kind, Parameters p, acc_t* y, const acc_t* x, int64_t n, bool streamed);
template <class acc_t>
void activation_gradient_block(int kind, Parameters p, acc_t* dx, const acc_t* dy, const acc_t* x, int64_t n,
                               bool streamed);

}  // namespace pyops::PYOPS_CPU_CAPABILITY
