// gru · CUDA
//   r, z = sigmoid(x + y),  n = tanh(x_n + r y_n);  h' = (1 - z) n + z h,  x and y the gates from input and hidden
//   state
// layout   step: x_gates, h_gates: [B, 3, H] in the order r z n · h, h': [B, H]
//          layer: csrc/common/recurrent.h
// mapping  step: a thread takes hidden units, grid-stride; neighbouring threads neighbouring units
//          layer: heads of cuda/recurrent_sequence.cuh and recurrent_mma.cuh · stack: of cuda/recurrent_stack.cuh
// memory   step: every input read once, every output written once; backward computes the gates again from their inputs
// numerics sigmoid and tanh in fp32 (fp64 for fp64)
#include "cuda/recurrent_cell.cuh"
#include "cuda/recurrent_stack.cuh"

#include "common/gru_binding.h"

PYOPS_LIBRARY(m) {
  using namespace pyops;
  PYOPS_IMPL(m, gru_gates_fwd);
  PYOPS_IMPL(m, gru_gates_bwd);
  PYOPS_IMPL(m, gru_layer_fwd);
  PYOPS_IMPL(m, gru_layer_bwd);
  PYOPS_IMPL(m, gru_stack_fwd);
  PYOPS_IMPL(m, gru_stack_bwd);
  PYOPS_IMPL(m, gru_plan);
}
