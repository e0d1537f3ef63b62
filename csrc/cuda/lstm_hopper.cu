// lstm · CUDA · sm_90a: a layer whose blocks share the states by multicast
// mapping  head of cuda/recurrent_multicast.cuh
#include "cuda/recurrent_multicast.cuh"

namespace pyops {
PYOPS_FORWARD_BY_MULTICAST(recurrent::Lstm);
}  // namespace pyops
