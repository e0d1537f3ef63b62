// rnn · CPU
//   h' = tanh(gates) or max(gates, 0);  dgates = dh (1 - h'²) or dh where gates > 0
// layout   step: gates, h', dh: [B, H]
//          layer: csrc/common/recurrent.h
// mapping  step: threads over rows and blocks of hidden units, lanes over hidden units
//          layer, stack: heads of cpu/recurrent_sequence.h and cpu/recurrent_stack.h
// memory   step: every input read once, every output written once; backward computes h' again from gates
// numerics tanh of cpu/math.h in fp32 (fp64 for fp64)
#include "cpu/recurrent_cell.h"
#include "cpu/recurrent_stack.h"

#include "common/rnn_binding.h"

PYOPS_LIBRARY(m) {
  using namespace pyops::PYOPS_CPU_CAPABILITY;
  PYOPS_IMPL(m, rnn_gates_fwd);
  PYOPS_IMPL(m, rnn_gates_bwd);
  PYOPS_IMPL(m, rnn_layer_fwd);
  PYOPS_IMPL(m, rnn_layer_bwd);
  PYOPS_IMPL(m, rnn_stack_fwd);
  PYOPS_IMPL(m, rnn_stack_bwd);
  PYOPS_IMPL(m, rnn_plan);
}
