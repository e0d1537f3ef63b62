// One step of the layer-normalised LSTM, after its matrix products; docs/math/recurrent.md derives the gradient.
//
//   a = n(x) * gain_x + n(y) * gain_y + bias,     n(v) = (v - mean(v)) / sqrt(var(v) + eps) over a row
//   c' = f c + i g,     z = n(c') * gain_c + bias_c,     h' = o tanh(z),     i f g o: the gates of a
//
// x, y, da, dx, dy [B, 4, H] · c, c', z, h' and their gradients [B, H] · gain_x, gain_y, bias [4, H] · gain_c,
// bias_c [H] · statistics [B, 6]: mean and 1 / deviation of x, of y and of c'. c' is normalised as it is stored.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace pyops {

template <class T>
struct NormalisedGates {
  const T *x, *y, *c, *gain_x, *gain_y, *bias, *gain_c, *bias_c;  // bias, bias_c: null for zero
  int64_t B, H;
};

// da and dz are the gradients of a and z: what those of gains and biases are sums of.
template <class T>
struct NormalisedGateGradients {
  const T *dh, *dc, *next_c;  // dh, dc: null for zero
  const accumulate_t<T>* statistics;
  T *dx, *dy, *dstate;
  accumulate_t<T>*da, *dz;
};

}  // namespace pyops
