// A layer forward in bf16 and fp16, as on tensor cores (recurrent_mma.cuh), but the blocks of a cluster read the states
// of the step before together: each fetches every second or fourth block of K by TMA and multicasts it to all. So L2 is
// read once per cluster and not once per block. For sm_90a; docs/adr/0006 says where it should pay.
//
// An mbarrier per pass of rows counts what arrives, from whichever block. States are overwritten one grid barrier after
// they were read, so no other barrier of the cluster is needed between two steps.
#pragma once

#include "cuda/recurrent_layer.cuh"

namespace pyops {

// [P, D, B, T] of the states that steps made, T = 1 of the initial ones.
struct StateMaps {
  TensorMap made, initial;
};

template <class Cell, class T, int tiles>
__global__ void sequence_forward_multicast_kernel(recurrent::Sequence<T> s, SequenceWork<T> work,
                                                  const __grid_constant__ StateMaps maps) {
  using Product = MmaProduct<T, tiles>;
  const Place place(work.blocks_per_direction);
  const Slice slice = Slice::of(s.H, work.blocks_per_direction, place.part);
  const ForwardStep<Cell, T> step{s, work, slice, slice.first(0), place.d, nullptr};
  auto& shared = shared_storage<typename Product::Shared>();
  const typename Product::Stage stage(s.steps.B, s.P, Product::shared_bytes(ceil_div(s.P, mma_depth)));
  T* states = reinterpret_cast<T*>(reinterpret_cast<unsigned char*>(&shared) + stage.from);
  auto* arrived = reinterpret_cast<uint64_t*>(reinterpret_cast<unsigned char*>(&shared) + stage.barriers());
  if (threadIdx.x == 0) {
    for (int p = 0; p < stage.passes; ++p) mbarrier_init(arrived + p, 1);
    fence_barrier_init();
  }
  Product product(shared, {s.P}, [&](int segment, int m) { return step.mma_weights(segment, m); });
  cluster_sync();
  for (int64_t i = 0; i < s.steps.T; ++i) {
    const int64_t t = s.step(place.d, i);
    if (threadIdx.x == 0) {
      const TensorMap& map = i == 0 ? maps.initial : maps.made;
      const int before = i == 0 ? 0 : static_cast<int>(s.before(place.d, t));
      const auto all = static_cast<uint16_t>((1u << cluster_size()) - 1);
      fence_proxy_async_global();
      for (int p = 0; p < stage.passes; ++p) {
        mbarrier_arrive_expect_tx(arrived + p, static_cast<uint32_t>(stage.pass() * sizeof(T)));
        for (int b = static_cast<int>(cluster_rank()); b < stage.blocks; b += static_cast<int>(cluster_size()))
          tma_load_multicast(states + p * stage.pass() + b * stage.box(), map, arrived + p,
                             {b * mma_depth, place.d, p * Product::rows, before}, all);
      }
    }
    step.cells(t, product, [&](int64_t row0, int count) {
      const auto p = static_cast<int>(row0 / Product::rows);
      mbarrier_wait(arrived + p, static_cast<uint32_t>(i % 2));
      product.run(count, states + p * stage.pass(), stage.of_pass);
    });
    fence_proxy_async_global();
    grid_sync(work.barrier);
  }
  cluster_sync();  // no block leaves while others may send it something
}

using MulticastTiles = std::integer_sequence<int, 1, 2, 4>;

template <class Cell, class T>
SequencePlan multicast_plan(const recurrent::Sequence<T>& s) {
  const int64_t B = s.steps.B, size = sizeof(T);
  SequencePlan plan;
  if (s.steps.starts != nullptr || s.w_hr != nullptr || !multicast_pays(B * s.P * size)) return plan;
  const auto kernel_of = []<int tiles>() { return sequence_forward_multicast_kernel<Cell, T, tiles>; };
  for (const int cluster : {4, 2})
    if (plan.blocks == 0)
      plan = tensor_core_plan<T, 1>(MulticastTiles(), kernel_of,
                                    {s.H, Cell::gates, whole_blocks(s.P), B, s.D, Cell::gates * s.P * size, cluster});
  return plan;
}

template <class Cell, class T>
void forward_by_multicast(const recurrent::Sequence<T>& s, const SequenceWork<T>& work, const SequencePlan& plan,
                          cudaStream_t stream) {
  const int64_t B = s.steps.B, D = s.D, P = s.P, steps = s.steps.T, size = sizeof(T);
  const auto map = [&]<int rows>(const T* from, uint64_t of_direction, uint64_t of_row, int64_t count) {
    const auto box = static_cast<uint32_t>(B < rows ? ceil_div(B, 8) * 8 : rows);
    const auto n = [](int64_t v) { return static_cast<uint64_t>(v); };
    return make_tensor_map(from, {n(P), n(D), n(B), n(count)}, {n(size), of_direction, of_row, n(D * B * P * size)},
                           {mma_depth, 1, box, 1}, Swizzle::none);
  };
  with_tiles(MulticastTiles(), plan.tiles, [&]<int tiles>() {
    constexpr int rows = MmaProduct<T, tiles>::rows;
    const StateMaps maps{map.template operator()<rows>(s.y, P * size, D * P * size, steps),
                         map.template operator()<rows>(s.h0, B * P * size, P * size, 1)};
    launch_persistent(sequence_forward_multicast_kernel<Cell, T, tiles>, s, work, plan, D, steps, stream, maps);
  });
}

// What <stem>_hopper.cu holds of a cell.
#define PYOPS_FORWARD_BY_MULTICAST_OF(CELL, T)                                                                         \
  template SequencePlan multicast_plan<CELL>(const recurrent::Sequence<T>&);                                           \
  template void forward_by_multicast<CELL>(const recurrent::Sequence<T>&, const SequenceWork<T>&, const SequencePlan&, \
                                           cudaStream_t)
#define PYOPS_FORWARD_BY_MULTICAST(CELL)     \
  PYOPS_FORWARD_BY_MULTICAST_OF(CELL, bf16); \
  PYOPS_FORWARD_BY_MULTICAST_OF(CELL, fp16)

}  // namespace pyops
