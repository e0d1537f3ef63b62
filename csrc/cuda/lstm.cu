// lstm · CUDA
//   i, f, o = sigmoid, g = tanh of the four gates;  c' = f c + i g,  h' = o tanh(c')
// layout   step: gates: [B, 4, H] in the order i f g o · c, h', c': [B, H]
//          layer: csrc/common/recurrent.h
// mapping  step: a thread takes hidden units, grid-stride; neighbouring threads neighbouring units
//          layer: heads of cuda/recurrent_sequence.cuh and recurrent_mma.cuh · stack: of cuda/recurrent_stack.cuh
// memory   step: every input read once, every output written once; backward computes the gates again from their inputs
// numerics sigmoid and tanh in fp32 (fp64 for fp64), c' not rounded on its way to h'
#include "cuda/recurrent_cell.cuh"
#include "cuda/recurrent_stack.cuh"

#include "common/lstm_binding.h"

PYOPS_LIBRARY(m) {
  using namespace pyops;
  PYOPS_IMPL(m, lstm_gates_fwd);
  PYOPS_IMPL(m, lstm_gates_bwd);
  PYOPS_IMPL(m, lstm_layer_fwd);
  PYOPS_IMPL(m, lstm_layer_bwd);
  PYOPS_IMPL(m, lstm_stack_fwd);
  PYOPS_IMPL(m, lstm_stack_bwd);
  PYOPS_IMPL(m, lstm_plan);
}
