// A stack of layers of a recurrent network, layer after layer: here threads are as busy with one as with all.
#pragma once

#include "cpu/recurrent_sequence.h"

namespace pyops::PYOPS_CPU_CAPABILITY {

// to [M, columns] = from [M, K] times the panels, plus bias or null.
template <class acc_t, class T>
void rows_times_panels(const T* from, int64_t M, int64_t K, const Panels<acc_t, 4>& panels, const T* bias,
                       int64_t columns, T* to) {
  using V = Vec<acc_t>;
  constexpr int64_t block = 4 * panel_rows;
  parallel_for(ceil_div(M, block), 1, [&](int64_t begin, int64_t end) {
    Buffer<acc_t> wide(block * K);
    for (int64_t first = begin * block; first < std::min(M, end * block); first += block) {
      const int64_t rows = std::min(block, M - first);
      widen<acc_t>(wide.get(), from + first * K, rows * K, acc_t(0));
      multiply_panels(wide.get(), panels, columns, 0, panels.count(), 0, rows,
                      [&](int64_t row, int64_t unit, auto lanes, V value) {
                        if (bias != nullptr) value += V::load(bias + unit, lanes);
                        value.store(to + (first + row) * columns + unit, lanes);
                      });
    }
  });
}

template <class Cell, class T>
void stack_forward(const OpScope&, const recurrent::Stack<Cell, T>& stack) {
  const int64_t N = stack.s.steps.N, B = stack.s.steps.B, H = stack.s.H, GH = Cell::gates * H;
  if (B == 0) return;
  Buffer<T> gates(N * GH);
  for (int64_t l = 0; l < stack.L; ++l) {
    recurrent::Sequence<T> layer = stack.layer(l);
    if (l > 0) {
      const auto weights = plain_panels<accumulate_t<T>>(stack.input_weights(l), H, GH, 1, H);
      rows_times_panels<accumulate_t<T>, T>(stack.layer(l - 1).y, N, H, weights, stack.input_bias(l), GH, gates.get());
      layer.gates = gates.get();
    }
    through_steps(layer.steps.T, B, runs_of<SequenceForward<Cell, T>>(layer));
  }
}

template <class Cell, class T>
void stack_backward(const OpScope&, const recurrent::Stack<Cell, T>& stack) {
  const int64_t N = stack.s.steps.N, B = stack.s.steps.B, H = stack.s.H, GH = Cell::gates * H;
  if (B == 0) return;
  Buffer<T> dy(N * H);
  for (int64_t l = stack.L - 1; l >= 0; --l) {
    recurrent::Sequence<T> layer = stack.layer(l);
    if (l < stack.L - 1) {
      const auto weights = plain_panels<accumulate_t<T>>(stack.input_weights(l + 1), GH, H, H, 1);
      rows_times_panels<accumulate_t<T>, T>(stack.layer(l + 1).dgates, N, GH, weights, nullptr, H, dy.get());
      layer.dy = dy.get();
    }
    through_steps(layer.steps.T, B, runs_of<SequenceBackward<Cell, T>>(layer));
  }
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY
