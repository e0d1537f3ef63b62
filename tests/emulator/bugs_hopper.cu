// Planted bugs around the asynchronous units of sm_90 and sm_90a; the rules of bugs.cu apply.
#include "test.h"

using namespace pyops;
using test::Buffer;

struct alignas(1024) Tile {
  float value[16][32];
  uint64_t full, empty;
};
PYOPS_DEVICE void start_barriers(Tile& s, bool start = true) {
  if (threadIdx.x == 0) {
    mbarrier_init(&s.full, 1);
    mbarrier_init(&s.empty, 1);
    fence_barrier_init();
  }
  if (start) __syncthreads();
}

template <class... Params>
std::string run(void (*kernel)(Params...), int variant, unsigned threads = 64, unsigned cluster = 1) {
  Buffer<float> in("in", 64 * 32, false), out("out", 64 * 32, true);
  in.fill([](size_t i) { return static_cast<float>(i); });
  out.fill([](size_t) { return 0.0f; });
  const TensorMap map_in =
      make_tensor_map(static_cast<const float*>(in.get()), {32, 64}, {4, 128}, {32, 16}, Swizzle::none);
  const TensorMap map_out =
      make_tensor_map(static_cast<const float*>(out.get()), {32, 64}, {4, 128}, {32, 16}, Swizzle::none);
  launch(kernel, {.grid = cluster, .block = threads, .smem = 48 * 1024, .cluster = cluster}, map_in, map_out, out.get(),
         variant);
  test::synchronize();
  return "";
}

__global__ void missing_load_wait(const __grid_constant__ TensorMap in, const __grid_constant__ TensorMap, float* out,
                                  int bug) {
  auto& s = shared_storage<Tile>();
  start_barriers(s);
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(&s.full, sizeof s.value);
    tma_load(s.value, in, &s.full, {0, 0});
  }
  if (!bug) mbarrier_wait(&s.full, 0);
  out[threadIdx.x] = s.value[1][threadIdx.x % 32];
  mbarrier_wait(&s.full, 0);
}
PYOPS_TEST(bug_missing_mbarrier_wait) { return run(missing_load_wait, variant); }

// The next load overwrites a stage that consumers may still read.
__global__ void missing_empty_wait(const __grid_constant__ TensorMap in, const __grid_constant__ TensorMap, float* out,
                                   int bug) {
  auto& s = shared_storage<Tile>();
  start_barriers(s);
  for (uint32_t i = 0; i < 2; ++i) {
    if (threadIdx.x == 0) {
      if (!bug && i > 0) mbarrier_wait(&s.empty, 0);
      mbarrier_arrive_expect_tx(&s.full, sizeof s.value);
      tma_load(s.value, in, &s.full, {0, static_cast<int>(i) * 16});
    } else if (threadIdx.x == 32) {
      mbarrier_wait(&s.full, i);
      out[i] = s.value[3][3];
      mbarrier_arrive(&s.empty);
    }
  }
  if (threadIdx.x == 0) mbarrier_wait(&s.full, 1);
}
PYOPS_TEST(bug_missing_empty_wait) { return run(missing_empty_wait, variant); }

__global__ void uninitialised_mbarrier(const __grid_constant__ TensorMap, const __grid_constant__ TensorMap, float* out,
                                       int bug) {
  auto& s = shared_storage<Tile>();
  start_barriers(s, !bug);
  if (threadIdx.x == 40) mbarrier_arrive(&s.full);
  mbarrier_wait(&s.full, 0);
  out[threadIdx.x] = 0.0f;
}
PYOPS_TEST(bug_mbarrier_used_before_its_barrier) { return run(uninitialised_mbarrier, variant); }

__global__ void too_many_arrivals(const __grid_constant__ TensorMap, const __grid_constant__ TensorMap, float* out,
                                  int bug) {
  auto& s = shared_storage<Tile>();
  start_barriers(s);
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(&s.full, 64);
    if (bug) mbarrier_arrive(&s.full);
    bulk_load(s.value, out, 64, &s.full);
  }
  mbarrier_wait(&s.full, 0);
}
PYOPS_TEST(bug_too_many_arrivals) { return run(too_many_arrivals, variant); }

__global__ void wrong_expected_bytes(const __grid_constant__ TensorMap in, const __grid_constant__ TensorMap,
                                     float* out, int bug) {
  auto& s = shared_storage<Tile>();
  start_barriers(s);
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(&s.full, bug ? sizeof s.value + 16 : sizeof s.value);
    tma_load(s.value, in, &s.full, {0, 0});
  }
  mbarrier_wait(&s.full, 0);
  out[threadIdx.x] = s.value[0][threadIdx.x % 32];
}
PYOPS_TEST(bug_wrong_expected_bytes) { return run(wrong_expected_bytes, variant); }

__global__ void missing_proxy_fence(const __grid_constant__ TensorMap, const __grid_constant__ TensorMap out_map,
                                    float*, int bug) {
  auto& s = shared_storage<Tile>();
  for (unsigned i = threadIdx.x; i < 512; i += 64) s.value[i / 32][i % 32] = 1.0f;
  if (!bug) fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    tma_store(out_map, s.value, {0, 0});
    tma_store_commit();
    tma_store_wait<0>();
  }
}
PYOPS_TEST(bug_missing_proxy_fence) { return run(missing_proxy_fence, variant); }

// The source of a store is overwritten before the store has read it.
__global__ void missing_store_wait(const __grid_constant__ TensorMap, const __grid_constant__ TensorMap out_map, float*,
                                   int bug) {
  auto& s = shared_storage<Tile>();
  for (int round = 0; round < 2; ++round) {
    for (unsigned i = threadIdx.x; i < 512; i += 64) s.value[i / 32][i % 32] = 1.0f;
    fence_proxy_async();
    __syncthreads();
    if (threadIdx.x == 0) {
      tma_store(out_map, s.value, {0, round * 16});
      tma_store_commit();
      if (!bug || round == 1) tma_store_wait_read<0>();
    }
    __syncthreads();
  }
}
PYOPS_TEST(bug_missing_store_wait) { return run(missing_store_wait, variant); }

__global__ void missing_cluster_sync(const __grid_constant__ TensorMap, const __grid_constant__ TensorMap, float* out,
                                     int bug) {
  auto& s = shared_storage<Tile>();
  s.value[0][threadIdx.x] = 1.0f;
  if (!bug) cluster_sync();
  out[cluster_rank() * 32 + threadIdx.x] = cluster_map(&s, cluster_rank() ^ 1)->value[0][threadIdx.x];
  cluster_sync();
}
PYOPS_TEST(bug_missing_cluster_sync) { return run(missing_cluster_sync, variant, 32, 2); }

__global__ void exit_while_read(const __grid_constant__ TensorMap, const __grid_constant__ TensorMap, float* out,
                                int bug) {
  auto& s = shared_storage<Tile>();
  s.value[0][threadIdx.x] = 1.0f;
  cluster_sync();
  if (cluster_rank() == 0) {
    for (int i = 0; i < 3; ++i) __syncthreads();
    out[threadIdx.x] = cluster_map(&s, 1)->value[0][threadIdx.x];
  }
  if (!bug) cluster_sync();
}
PYOPS_TEST(bug_exit_while_cluster_reads) { return run(exit_while_read, variant, 32, 2); }

struct Operands {
  alignas(1024) bf16 a[64][64];
  alignas(1024) bf16 b[64][64];
};
PYOPS_DEVICE void fill_operands(Operands& s) {
  for (unsigned i = threadIdx.x; i < 4096; i += 128) s.a[i / 64][i % 64] = s.b[i / 64][i % 64] = from_float<bf16>(1.0f);
  fence_proxy_async();
  __syncthreads();
}
PYOPS_DEVICE void start_product(float (&acc)[32], Operands& s) {
  wgmma_m64k16<bf16, 64>(acc, smem_desc(s.a, 16, 1024, Swizzle::b128), smem_desc(s.b, 16, 1024, Swizzle::b128), false);
  wgmma_commit();
}

// Operands are overwritten while the product may still read them.
__global__ void missing_product_wait(const __grid_constant__ TensorMap, const __grid_constant__ TensorMap, float* out,
                                     int bug) {
  auto& s = shared_storage<Operands>();
  fill_operands(s);
  float acc[32];
  wgmma_fence();
  start_product(acc, s);
  if (!bug) wgmma_wait<0>();
  __syncthreads();
  s.a[threadIdx.x % 64][threadIdx.x / 64] = from_float<bf16>(2.0f);
  wgmma_wait<0>();
  out[threadIdx.x] = acc[0];
}
PYOPS_TEST(bug_missing_wgmma_wait) { return run(missing_product_wait, variant, 128); }

__global__ void missing_product_fence(const __grid_constant__ TensorMap, const __grid_constant__ TensorMap, float* out,
                                      int bug) {
  auto& s = shared_storage<Operands>();
  fill_operands(s);
  float acc[32] = {};
  if (!bug) wgmma_fence();
  start_product(acc, s);
  wgmma_wait<0>();
  out[threadIdx.x] = acc[0];
}
PYOPS_TEST(bug_missing_wgmma_fence) { return run(missing_product_fence, variant, 128); }

__global__ void product_never_waited(const __grid_constant__ TensorMap, const __grid_constant__ TensorMap, float* out,
                                     int bug) {
  auto& s = shared_storage<Operands>();
  fill_operands(s);
  float acc[32] = {};
  wgmma_fence();
  start_product(acc, s);
  if (!bug) wgmma_wait<0>();
  out[threadIdx.x] = acc[0];
}
PYOPS_TEST(bug_wgmma_never_waited) { return run(product_never_waited, variant, 128); }

__global__ void too_many_registers(const __grid_constant__ TensorMap, const __grid_constant__ TensorMap, float* out,
                                   int bug) {
  if (threadIdx.x < 128) {
    bug ? setmaxnreg_dec<48>() : setmaxnreg_dec<40>();
  } else {
    setmaxnreg_inc<232>();
  }
  out[threadIdx.x] = 0.0f;
}
PYOPS_TEST(bug_too_many_registers) { return run(too_many_registers, variant, 384); }

__global__ void misaligned_tile(const __grid_constant__ TensorMap in, const __grid_constant__ TensorMap, float* out,
                                int bug) {
  struct alignas(1024) Shifted {
    float value[17][32];
    uint64_t full;
  };
  auto& s = shared_storage<Shifted>();
  if (threadIdx.x == 0) {
    mbarrier_init(&s.full, 1);
    fence_barrier_init();
    mbarrier_arrive_expect_tx(&s.full, 2048);
    tma_load(&s.value[0][bug ? 4 : 0], in, &s.full, {0, 0});
  }
  __syncthreads();
  mbarrier_wait(&s.full, 0);
  out[threadIdx.x] = 0.0f;
}
PYOPS_TEST(bug_misaligned_tma_tile) { return run(misaligned_tile, variant); }

__global__ void unaligned_coordinate(const __grid_constant__ TensorMap in, const __grid_constant__ TensorMap,
                                     float* out, int bug) {
  struct Storage {
    alignas(1024) float value[16][32];
    uint64_t full;
  };
  auto& s = shared_storage<Storage>();
  if (threadIdx.x == 0) {
    mbarrier_init(&s.full, 1);
    fence_barrier_init();
    mbarrier_arrive_expect_tx(&s.full, 2048);
    tma_load(s.value, in, &s.full, {bug ? -2 : -4, 0});
  }
  __syncthreads();
  mbarrier_wait(&s.full, 0);
  out[threadIdx.x] = 0.0f;
}
PYOPS_TEST(bug_unaligned_tma_coordinate) { return run(unaligned_coordinate, variant); }
