// lstm · CPU
//   i, f, o = sigmoid, g = tanh of the four gates;  c' = f c + i g,  h' = o tanh(c')
// layout   step: gates: [B, 4, H] in the order i f g o · c, h', c': [B, H]
//          layer: csrc/common/recurrent.h
// mapping  step: threads over rows and blocks of hidden units, lanes over hidden units
//          layer, stack: heads of cpu/recurrent_sequence.h and cpu/recurrent_stack.h
// memory   step: every input read once, every output written once; backward computes the gates again from their inputs
// numerics sigmoid and tanh of cpu/math.h in fp32 (fp64 for fp64), c' not rounded on its way to h'
#include "cpu/recurrent_cell.h"
#include "cpu/recurrent_stack.h"

#include "common/lstm_binding.h"

PYOPS_LIBRARY(m) {
  using namespace pyops::PYOPS_CPU_CAPABILITY;
  PYOPS_IMPL(m, lstm_gates_fwd);
  PYOPS_IMPL(m, lstm_gates_bwd);
  PYOPS_IMPL(m, lstm_layer_fwd);
  PYOPS_IMPL(m, lstm_layer_bwd);
  PYOPS_IMPL(m, lstm_stack_fwd);
  PYOPS_IMPL(m, lstm_stack_bwd);
  PYOPS_IMPL(m, lstm_plan);
}
