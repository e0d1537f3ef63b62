// gru · CPU
//   r, z = sigmoid(x + y),  n = tanh(x_n + r y_n);  h' = (1 - z) n + z h,  x and y the gates from input and hidden
//   state
// layout   x_gates, h_gates: [B, 3, H] in the order r z n · h, h': [B, H]
// mapping  threads over rows and blocks of hidden units, lanes over hidden units
// memory   every input read once, every output written once; backward computes the gates again from their inputs
// numerics sigmoid and tanh of cpu/math.h in fp32 (fp64 for fp64)
#include "cpu/recurrent_cell.h"

#include "common/gru_binding.h"

PYOPS_LIBRARY(m) {
  using namespace pyops::PYOPS_CPU_CAPABILITY;
  PYOPS_IMPL(m, gru_gates_fwd);
  PYOPS_IMPL(m, gru_gates_bwd);
}
