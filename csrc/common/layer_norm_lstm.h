// The layer-normalised LSTM after its matrix products; docs/math/recurrent.md derives the gradient. One step:
//
//   a = n(x) * gain_x + n(y) * gain_y + bias,     n(v) = (v - mean(v)) / sqrt(var(v) + eps) over a row
//   c' = f c + i g,     z = n(c') * gain_c + bias_c,     h' = o tanh(z),     i f g o: the gates of a
//
// x, y, da, dx, dy [B, 4, H] · c, c', z, h' and their gradients [B, H] · gain_x, gain_y, bias [4, H] · gain_c,
// bias_c [H] · statistics [B, 6]: mean and 1 / deviation of x, of y and of c'. In a single step c' is normalised as it is
// stored, in a layer as it is before.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "common/recurrent.h"

namespace pyops {

template <class T>
struct NormalisedParameters {
  const T *gain_x, *gain_y, *bias, *gain_c, *bias_c;  // bias, bias_c: null for zero
  int64_t H;

  // Those of one direction.
  PYOPS_HOST_DEVICE NormalisedParameters of(int64_t d) const {
    const int64_t rows = d * 4 * H, cells = d * H;
    return {gain_x + rows,
            gain_y + rows,
            bias != nullptr ? bias + rows : nullptr,
            gain_c + cells,
            bias_c != nullptr ? bias_c + cells : nullptr,
            H};
  }
};

template <class T>
struct NormalisedGates : NormalisedParameters<T> {
  const T *x, *y, *c;
  int64_t B;
};

// da and dz are the gradients of a and z: what those of gains and biases are sums of.
template <class T>
struct NormalisedGateGradients {
  const T *dh, *dc, *next_c;  // dh, dc: null for zero
  const accumulate_t<T>* statistics;
  T *dx, *dy, *dstate;
  accumulate_t<T>*da, *dz;
};

// A layer over all steps: of a recurrent::Sequence, gates are x and saved are y, [N, D, 4 H] both, dgates and dh_gates
// their gradients, and there is no projection. Parameters and their gradients have a leading D, statistics [N, D, 6].
template <class T>
struct NormalisedSequence : recurrent::Sequence<T> {
  NormalisedParameters<T> parameters;
  double eps;
  accumulate_t<T>* statistics;
  T *dgain_x, *dgain_y, *dbias, *dgain_c, *dbias_c;  // dbias, dbias_c: null where there is no bias
};

}  // namespace pyops
