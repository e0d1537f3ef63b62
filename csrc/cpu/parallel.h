// Threads: torch's own pool, so that pyops obeys torch.set_num_threads and adds no runtime of its own.
#pragma once

#include <algorithm>
#include <cstdint>

#include <torch/csrc/stable/ops.h>

namespace pyops {

// Calls f(begin, end) on disjoint ranges that cover [0, n); each thread gets at least `grain` items.
template <class F>
void parallel_for(int64_t n, int64_t grain, const F& f) {
  if (n <= 0) return;
  if (n <= grain) return f(int64_t{0}, n);
  torch::stable::parallel_for(0, n, std::max<int64_t>(grain, 1), f);
}

inline int64_t thread_count() { return torch::stable::get_num_threads(); }

}  // namespace pyops
