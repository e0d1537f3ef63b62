// Which threads of a block have something to say, numbered in the order of the threads: a list in shared memory that is
// the same each time.
#pragma once

#include "cuda/device.cuh"

namespace pyops {

template <int Threads>
struct CompactScratch {
  unsigned ballots[Threads / 32];
};

// place: number of this thread among the chosen ones, if it is one; count: how many there are.
struct Compacted {
  int place, count;
};

// Called by the whole block. Between two calls with one scratch the block synchronises, as it does between writing and
// reading the list.
template <int Threads>
PYOPS_DEVICE Compacted compact(bool chosen, CompactScratch<Threads>& scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned ballot = __ballot_sync(~0u, chosen);
  if (lane == 0) scratch.ballots[warp] = ballot;
  __syncthreads();
  int before = 0, count = 0;
  for (int w = 0; w < Threads / 32; ++w) {
    const int bits = __popc(scratch.ballots[w]);
    if (w < warp) before += bits;
    count += bits;
  }
  return {before + __popc(ballot & ((1u << lane) - 1)), count};
}

}  // namespace pyops
