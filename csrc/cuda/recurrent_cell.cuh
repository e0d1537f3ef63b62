// One step of a recurrent cell, after the matrix products: a thread takes hidden units of [B, H], grid-stride.
#pragma once

#include "cuda/grid_stride.cuh"
#include "cuda/math.cuh"

#include "common/recurrent.h"

namespace pyops {

// Pre-activations [B, gates * H] from the input (and from the hidden state where a cell keeps them apart), and the
// former state [B, H]: c of an LSTM, h of a GRU.
template <class T>
struct CellInputs {
  const T *a, *b, *state;
};

// The gates' pre-activations and states of hidden unit i of a row, loaded.
template <class Cell, class A>
struct CellStep {
  A a[Cell::gates]{}, b[Cell::gates]{}, h{}, c{}, saved[recurrent::saved_slots<Cell>]{};

  template <class T>
  PYOPS_DEVICE CellStep(const CellInputs<T>& in, int64_t row, int64_t H, int64_t i) {
#pragma unroll
    for (int k = 0; k < Cell::gates; ++k) {
      a[k] = to_acc(in.a[(row * Cell::gates + k) * H + i]);
      if (in.b != nullptr) b[k] = to_acc(in.b[(row * Cell::gates + k) * H + i]);
    }
    if (in.state != nullptr) (Cell::has_cell ? c : h) = to_acc(in.state[row * H + i]);
  }
};

template <class Cell, class T>
__global__ void cell_forward_kernel(CellInputs<T> in, T* h, T* c, int64_t B, int64_t H) {
  using A = accumulate_t<T>;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; at < B * H; at += stride) {
    CellStep<Cell, A> step(in, at / H, H, at % H);
    Cell::forward(step.a, step.b, step.h, step.c, step.saved);
    h[at] = from_acc<T>(step.h);
    if constexpr (Cell::has_cell) c[at] = from_acc<T>(step.c);
  }
}

// dh, dc: gradients of the next states, null for zero; dstate: null where the cell reads no former state.
template <class Cell, class T>
__global__ void cell_backward_kernel(const T* dh, const T* dc, CellInputs<T> in, T* da, T* db, T* dstate, int64_t B,
                                     int64_t H) {
  using A = accumulate_t<T>;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; at < B * H; at += stride) {
    const int64_t row = at / H, i = at % H;
    CellStep<Cell, A> step(in, row, H, i);
    const A h_before = step.h, c_before = step.c;
    Cell::forward(step.a, step.b, step.h, step.c, step.saved);
    A gh = dh != nullptr ? to_acc(dh[at]) : A(0), gc = dc != nullptr ? to_acc(dc[at]) : A(0);
    A ga[Cell::gates], gb[Cell::gates];
    Cell::backward(gh, gc, step.saved, step.h, h_before, c_before, ga, gb);
#pragma unroll
    for (int k = 0; k < Cell::gates; ++k) {
      da[(row * Cell::gates + k) * H + i] = from_acc<T>(ga[k]);
      if constexpr (Cell::splits) db[(row * Cell::gates + k) * H + i] = from_acc<T>(gb[k]);
    }
    if (dstate != nullptr) dstate[at] = from_acc<T>(Cell::has_cell ? gc : gh);
  }
}

template <class Cell, class T>
void cell_forward(const CellInputs<T>& in, T* h, T* c, int64_t B, int64_t H, void* stream) {
  launch(cell_forward_kernel<Cell, T>, grid_stride(B * H, stream), in, h, c, B, H);
}

template <class Cell, class T>
void cell_backward(const T* dh, const T* dc, const CellInputs<T>& in, T* da, T* db, T* dstate, int64_t B, int64_t H,
                   void* stream) {
  launch(cell_backward_kernel<Cell, T>, grid_stride(B * H, stream), dh, dc, in, da, db, dstate, B, H);
}

}  // namespace pyops
