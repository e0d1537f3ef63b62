// The recurrent cells, stated once for CPU vectors (cpu/math.h) and CUDA scalars (cuda/math.cuh), and shared by the
// single steps and the sequences of the rooms lstm, gru and rnn. docs/math/recurrent.md derives the gradients.
//
// a[k] and b[k] are the pre-activations of gate k from the input and from the hidden state, `s` what the backward pass
// of a sequence reads. forward() turns the former states h (of GRU) and c (of LSTM) into the next ones; backward()
// takes the gradients dh, dc of the next states and gives those of the pre-activations, of c, and the part of dh that
// does not pass through the recurrent product.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace pyops::recurrent {

// i, f, o = sigmoid, g = tanh of a + b;  c' = f c + i g,  h' = o tanh(c')
struct Lstm {
  static constexpr int gates = 4, saved = 4;
  static constexpr bool has_cell = true, splits = false;  // splits: da and db differ
  template <class V>
  static PYOPS_HOST_DEVICE void forward(const V (&a)[4], const V (&b)[4], V& h, V& c, V (&s)[4]) {
    s[0] = sigmoid(a[0] + b[0]);
    s[1] = sigmoid(a[1] + b[1]);
    s[2] = tanh(a[2] + b[2]);
    s[3] = sigmoid(a[3] + b[3]);
    c = s[1] * c + s[0] * s[2];
    h = s[3] * tanh(c);
  }
  // h: the next state, h_before, c_before: the former ones
  template <class V>
  static PYOPS_HOST_DEVICE void backward(V& dh, V& dc, const V (&s)[4], V, V, V c_before, V (&da)[4], V (&db)[4]) {
    const V one(1), t = tanh(s[1] * c_before + s[0] * s[2]);
    const V total = dc + dh * s[3] * (one - t * t);
    da[0] = total * s[2] * s[0] * (one - s[0]);
    da[1] = total * c_before * s[1] * (one - s[1]);
    da[2] = total * s[0] * (one - s[2] * s[2]);
    da[3] = dh * t * s[3] * (one - s[3]);
    for (int k = 0; k < 4; ++k) db[k] = da[k];
    dc = total * s[1];
    dh = V(0);
  }
};

// r, z = sigmoid(a + b),  n = tanh(a[2] + r b[2]);  h' = (1 - z) n + z h
struct Gru {
  static constexpr int gates = 3, saved = 4;  // r, z, n, b[2]
  static constexpr bool has_cell = false, splits = true;
  template <class V>
  static PYOPS_HOST_DEVICE void forward(const V (&a)[3], const V (&b)[3], V& h, V&, V (&s)[4]) {
    s[0] = sigmoid(a[0] + b[0]);
    s[1] = sigmoid(a[1] + b[1]);
    s[2] = tanh(a[2] + s[0] * b[2]);
    s[3] = b[2];
    h = s[2] + s[1] * (h - s[2]);
  }
  template <class V>
  static PYOPS_HOST_DEVICE void backward(V& dh, V&, const V (&s)[4], V, V h_before, V, V (&da)[3], V (&db)[3]) {
    const V one(1), dn = dh * (one - s[1]) * (one - s[2] * s[2]);
    da[0] = dn * s[3] * s[0] * (one - s[0]);
    da[1] = dh * (h_before - s[2]) * s[1] * (one - s[1]);
    da[2] = dn;
    db[0] = da[0], db[1] = da[1], db[2] = dn * s[0];
    dh = dh * s[1];
  }
};

// h' = tanh(a + b); the gradient reads h' alone
struct TanhRnn {
  static constexpr int gates = 1, saved = 0;
  static constexpr bool has_cell = false, splits = false;
  template <class V, class S>
  static PYOPS_HOST_DEVICE void forward(const V (&a)[1], const V (&b)[1], V& h, V&, S&) {
    h = tanh(a[0] + b[0]);
  }
  template <class V, class S>
  static PYOPS_HOST_DEVICE void backward(V& dh, V&, const S&, V h, V, V, V (&da)[1], V (&db)[1]) {
    da[0] = db[0] = dh * (V(1) - h * h);
    dh = V(0);
  }
};

// h' = max(a + b, 0)
struct ReluRnn {
  static constexpr int gates = 1, saved = 0;
  static constexpr bool has_cell = false, splits = false;
  template <class V, class S>
  static PYOPS_HOST_DEVICE void forward(const V (&a)[1], const V (&b)[1], V& h, V&, S&) {
    const V sum = a[0] + b[0];
    h = select(sum <= V(0), V(0), sum);
  }
  template <class V, class S>
  static PYOPS_HOST_DEVICE void backward(V& dh, V&, const S&, V h, V, V, V (&da)[1], V (&db)[1]) {
    da[0] = db[0] = select(h <= V(0), V(0), dh);
    dh = V(0);
  }
};

// `saved` numbers, and one where there are none: arrays have elements.
template <class Cell>
inline constexpr int saved_slots = Cell::saved > 0 ? Cell::saved : 1;

}  // namespace pyops::recurrent
