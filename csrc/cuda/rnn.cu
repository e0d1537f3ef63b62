// rnn · CUDA
//   h' = tanh(gates) or max(gates, 0);  dgates = dh (1 - h'²) or dh where gates > 0
// layout   step: gates, h', dh: [B, H]
//          layer: csrc/common/recurrent.h
// mapping  step: a thread takes hidden units, grid-stride; neighbouring threads neighbouring units
//          layer: heads of cuda/recurrent_sequence.cuh and recurrent_mma.cuh · stack: of cuda/recurrent_stack.cuh
// memory   step: every input read once, every output written once; backward computes h' again from gates
// numerics tanh in fp32 (fp64 for fp64)
#include "cuda/recurrent_cell.cuh"
#include "cuda/recurrent_stack.cuh"

#include "common/rnn_binding.h"

PYOPS_LIBRARY(m) {
  using namespace pyops;
  PYOPS_IMPL(m, rnn_gates_fwd);
  PYOPS_IMPL(m, rnn_gates_bwd);
  PYOPS_IMPL(m, rnn_layer_fwd);
  PYOPS_IMPL(m, rnn_layer_bwd);
  PYOPS_IMPL(m, rnn_stack_fwd);
  PYOPS_IMPL(m, rnn_stack_bwd);
  PYOPS_IMPL(m, rnn_plan);
}
