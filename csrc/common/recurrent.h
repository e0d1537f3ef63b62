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

// The steps of a batch of sequences as rows of [N, ...]: step t has count(t) rows, one for each sequence that still
// runs, from first(t) on. Without `starts` every step has B rows; with it, count never grows with t.
struct Steps {
  int64_t T, B, N;
  const int64_t* starts;  // [T + 1], or null
  PYOPS_HOST_DEVICE int64_t first(int64_t t) const { return starts != nullptr ? starts[t] : t * B; }
  PYOPS_HOST_DEVICE int64_t count(int64_t t) const {
    if (t < 0 || t >= T) return 0;
    return starts != nullptr ? starts[t + 1] - starts[t] : B;
  }
};

// One layer of a recurrent network over D directions: the second one, if any, runs from the last step to the first.
//   gates [N, D, gates H]   h0, h_n [D, B, P]   c0, c_n [D, B, H]   w_hh [D, gates H, P]   b_n [D, H] (GRU, or null)
//   w_hr [D, P, H] or null, then P = H                            y [N, D, P]
//   saved [N, D, saved H], cells [N, D, H]: null where no gradient is wanted
// dgates are gradients of the gates from the input, dh_gates (GRU) of those from the hidden state, dh [N, D, P] (with
// w_hr) of the states themselves, all further sums included; dy, dh_n, dc_n may be null.
template <class T>
struct Sequence {
  Steps steps;
  int64_t D, H, P;
  const T *gates, *h0, *c0, *w_hh, *w_hr, *b_n;
  T *y, *h_n, *c_n, *saved, *cells;
  const T *dy, *dh_n, *dc_n;
  T *dgates, *dh_gates, *dh, *dh0, *dc0;

  // The step before t in direction d, and the row of h or c [N, ...] there; -1 where it is the initial state.
  PYOPS_HOST_DEVICE int64_t before(int64_t d, int64_t t) const { return d == 0 ? t - 1 : t + 1; }
  PYOPS_HOST_DEVICE int64_t after(int64_t d, int64_t t) const { return d == 0 ? t + 1 : t - 1; }
  PYOPS_HOST_DEVICE int64_t row_at(int64_t t, int64_t row) const {
    return row < steps.count(t) ? steps.first(t) + row : -1;
  }
  // The state h [P] of a row before step t in direction d.
  PYOPS_HOST_DEVICE const T* state_before(int64_t d, int64_t t, int64_t row) const {
    const int64_t at = row_at(before(d, t), row);
    return at >= 0 ? y + (at * D + d) * P : h0 + (d * steps.B + row) * P;
  }
  // The i-th step that direction d takes.
  PYOPS_HOST_DEVICE int64_t step(int64_t d, int64_t i) const { return d == 0 ? i : steps.T - 1 - i; }
  // The same backwards, and the one that it takes after it; -1 where there is none.
  struct Pair {
    int64_t t, later;
  };
  PYOPS_HOST_DEVICE Pair steps_backwards(int64_t d, int64_t i) const {
    const int64_t at = steps.T - 1 - i;
    return {at >= 0 ? step(d, at) : -1, at + 1 < steps.T ? step(d, at + 1) : -1};
  }
};

// L layers of one direction of the same size, each on the output of the one before. Their arrays have a leading L and are
// those of Sequences with D = 1; but gates [N, gates H] and dy [N, H] are the first and the last layer's alone, and y is
// the last one's, below [L - 1, N, H] those of the others. Layer l > 0 makes its gates from w_ih [L - 1, gates H, H] and
// b_ih [L - 1, gates H], or null.
template <class Cell, class T>
struct Stack {
  Sequence<T> s;
  int64_t L;
  const T *w_ih, *b_ih;
  T* below;

  PYOPS_HOST_DEVICE Sequence<T> layer(int64_t l) const {
    const int64_t states = l * s.steps.B * s.H, rows = l * s.steps.N * s.H;
    const auto from = [](auto* p, int64_t offset) { return p != nullptr ? p + offset : p; };
    Sequence<T> of = s;
    of.gates = l == 0 ? s.gates : nullptr;
    of.h0 += states, of.h_n = from(s.h_n, states), of.dh_n = from(s.dh_n, states), of.dh0 = from(s.dh0, states);
    of.c0 = from(s.c0, states), of.c_n = from(s.c_n, states), of.dc_n = from(s.dc_n, states);
    of.dc0 = from(s.dc0, states);
    of.w_hh += l * Cell::gates * s.H * s.H, of.b_n = from(s.b_n, l * s.H);
    of.y = l < L - 1 ? below + rows : s.y;
    of.dy = l < L - 1 ? nullptr : s.dy;
    of.saved = from(s.saved, Cell::saved * rows), of.cells = from(s.cells, rows);
    of.dgates = from(s.dgates, Cell::gates * rows), of.dh_gates = from(s.dh_gates, Cell::gates * rows);
    return of;
  }
  PYOPS_HOST_DEVICE const T* input_weights(int64_t l) const { return w_ih + (l - 1) * Cell::gates * s.H * s.H; }
  PYOPS_HOST_DEVICE const T* input_bias(int64_t l) const {
    return b_ih != nullptr ? b_ih + (l - 1) * Cell::gates * s.H : nullptr;
  }
};

}  // namespace pyops::recurrent
