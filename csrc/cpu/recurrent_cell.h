// One step of a recurrent cell, after the matrix products: rows of [B, gates * H], lanes over the hidden units.
#pragma once

#include "common/recurrent.h"

#include "cpu/math.h"
#include "cpu/parallel.h"

namespace pyops::PYOPS_CPU_CAPABILITY {

// Pre-activations from the input (and from the hidden state where a cell keeps them apart), and the former state: c of
// an LSTM, h of a GRU.
template <class T>
struct CellInputs {
  const T *a, *b, *state;
};

// f(row, first unit, count) over blocks of [B, H] that are worth a thread's while together.
template <class F>
void each_unit_block(int64_t B, int64_t H, const F& f) {
  constexpr int64_t block = 512, grain = 8192;
  if (H == 0) return;
  const int64_t blocks = ceil_div(H, block);
  parallel_for(B * blocks, ceil_div(grain, std::min(H, block)), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t first = k % blocks * block;
      f(k / blocks, first, std::min(block, H - first));
    }
  });
}

// One vector of units: the gates' pre-activations and states, loaded.
template <class Cell, class acc_t>
struct CellStep {
  using V = Vec<acc_t>;
  V a[Cell::gates], b[Cell::gates], h, c, saved[recurrent::saved_slots<Cell>];

  template <class T, class Lanes>
  PYOPS_INLINE CellStep(const CellInputs<T>& in, int64_t row, int64_t H, int64_t i, Lanes lanes) {
    for (int k = 0; k < Cell::gates; ++k) {
      a[k] = V::load(in.a + (row * Cell::gates + k) * H + i, lanes);
      if (in.b != nullptr) b[k] = V::load(in.b + (row * Cell::gates + k) * H + i, lanes);
    }
    if (in.state != nullptr) (Cell::has_cell ? c : h) = V::load(in.state + row * H + i, lanes);
  }
};

template <class Cell, class T>
void cell_forward(const CellInputs<T>& in, T* h, T* c, int64_t B, int64_t H, void* /* stream */) {
  using acc_t = accumulate_t<T>;
  each_unit_block(B, H, [&](int64_t row, int64_t first, int64_t count) {
    each_vector<acc_t>(count, [&](int64_t j, auto lanes) {
      const int64_t i = first + j;
      CellStep<Cell, acc_t> step(in, row, H, i, lanes);
      Cell::forward(step.a, step.b, step.h, step.c, step.saved);
      step.h.store(h + row * H + i, lanes);
      if constexpr (Cell::has_cell) step.c.store(c + row * H + i, lanes);
    });
  });
}

// dh, dc: gradients of the next states, null for zero; dstate: null where the cell reads no former state. The gates are
// computed again: cheaper than keeping them.
template <class Cell, class T>
void cell_backward(const T* dh, const T* dc, const CellInputs<T>& in, T* da, T* db, T* dstate, int64_t B, int64_t H,
                   void* /* stream */) {
  using acc_t = accumulate_t<T>;
  using V = Vec<acc_t>;
  each_unit_block(B, H, [&](int64_t row, int64_t first, int64_t count) {
    each_vector<acc_t>(count, [&](int64_t j, auto lanes) {
      const int64_t i = first + j;
      CellStep<Cell, acc_t> step(in, row, H, i, lanes);
      const V h_before = step.h, c_before = step.c;
      Cell::forward(step.a, step.b, step.h, step.c, step.saved);
      V gh, gc, ga[Cell::gates], gb[Cell::gates];
      if (dh != nullptr) gh = V::load(dh + row * H + i, lanes);
      if (dc != nullptr) gc = V::load(dc + row * H + i, lanes);
      Cell::backward(gh, gc, step.saved, step.h, h_before, c_before, ga, gb);
      for (int k = 0; k < Cell::gates; ++k) {
        ga[k].store(da + (row * Cell::gates + k) * H + i, lanes);
        if constexpr (Cell::splits) gb[k].store(db + (row * Cell::gates + k) * H + i, lanes);
      }
      if (dstate != nullptr) (Cell::has_cell ? gc : gh).store(dstate + row * H + i, lanes);
    });
  });
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY
