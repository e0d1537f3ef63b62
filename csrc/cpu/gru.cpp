// gru · CPU
//   r, z = sigmoid(x + y),  n = tanh(x_n + r y_n);  h' = (1 - z) n + z h,  x and y the gates from input and hidden
//   state
// layout   step: x_gates, h_gates: [B, 3, H] in the order r z n · h, h': [B, H]
//          layer: csrc/common/recurrent.h
// mapping  step: threads over rows and blocks of hidden units, lanes over hidden units
//          layer, stack: heads of cpu/recurrent_sequence.h and cpu/recurrent_stack.h
// memory   step: every input read once, every output written once; backward computes the gates again from their inputs
// numerics sigmoid and tanh of cpu/math.h in fp32 (fp64 for fp64)
#include "cpu/recurrent_cell.h"
#include "cpu/recurrent_stack.h"

#include "common/gru_binding.h"

PYOPS_LIBRARY(m) {
  using namespace pyops::PYOPS_CPU_CAPABILITY;
  PYOPS_IMPL(m, gru_gates_fwd);
  PYOPS_IMPL(m, gru_gates_bwd);
  PYOPS_IMPL(m, gru_layer_fwd);
  PYOPS_IMPL(m, gru_layer_bwd);
  PYOPS_IMPL(m, gru_stack_fwd);
  PYOPS_IMPL(m, gru_stack_bwd);
  PYOPS_IMPL(m, gru_plan);
}
