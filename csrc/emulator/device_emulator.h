// The device vocabulary on the CPU: thin wrappers over the engine (interface.h). Names are documented in
// cuda/device.cuh.
#pragma once

#include <stdexcept>
#include <tuple>

#include "emulator/builtins.h"

// As on the GPU, and so that every store is seen: the compiler does not instrument `*p = f()` where f returns a struct.
#define PYOPS_DEVICE inline __attribute__((always_inline))

namespace pyops {

using bf16 = __nv_bfloat16;
using fp16 = __half;

struct LaunchConfig {
  dim3 grid;
  dim3 block;
  size_t smem = 0;
  cudaStream_t stream = nullptr;
  dim3 cluster = dim3(1, 1, 1);
  bool cooperative = false;
};

template <class... Params, class... Args>
PYOPS_ENGINE void launch(void (*kernel)(Params...), const LaunchConfig& config, Args&&... args) {
  if (config.grid.x == 0 || config.grid.y == 0 || config.grid.z == 0) return;
  using Values = std::tuple<std::decay_t<Params>...>;
  struct Call {
    void (*kernel)(Params...);
    Values values;
    __attribute__((no_sanitize_thread)) static void run(const void* self) {
      const auto* call = static_cast<const Call*>(self);
      std::apply(call->kernel, call->values);
    }
  };
  const Call call{kernel, Values(static_cast<std::decay_t<Params>>(std::forward<Args>(args))...)};
  const auto extent = [](const dim3& d) { return emulator::Extent{d.x, d.y, d.z}; };
  emulator::launch_grid({extent(config.grid), extent(config.block), extent(config.cluster), config.smem,
                         config.cooperative, __PRETTY_FUNCTION__, &Call::run, &call, sizeof call});
}
inline int multiprocessor_count() { return emulator::multiprocessor_count(); }
inline int compute_capability() { return emulator::compute_capability(); }
inline int shared_memory_limit() { return emulator::shared_memory_limit(); }
inline int l2_cache_bytes() { return emulator::l2_cache_bytes(); }
PYOPS_ENGINE void zero_memory(void* p, size_t bytes, cudaStream_t) { std::memset(p, 0, bytes); }
inline constexpr bool hopper_built = true;
template <class... Params>
int max_cooperative_blocks(void (*)(Params...), unsigned, size_t, int cluster = 1) {
  return emulator::multiprocessor_count() * emulator::resident_blocks() / cluster * cluster;
}

template <class T>
PYOPS_ENGINE T& shared_storage(PYOPS_HERE) {
  return *static_cast<T*>(emulator::shared_arena(sizeof(T), alignof(T), location));
}
PYOPS_ENGINE uint32_t smem_address(const void* p) { return emulator::shared_offset(p); }

// memory order

template <class T>
PYOPS_ENGINE T load_acquire(const T* p, PYOPS_HERE) {
  static_assert(std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long>);
  emulator::announce_atomic(p, sizeof(T), false, emulator::Order::acquire, location);
  return __atomic_load_n(p, __ATOMIC_SEQ_CST);
}
template <class T>
PYOPS_ENGINE void store_release(T* p, std::type_identity_t<T> v, PYOPS_HERE) {
  static_assert(std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long>);
  emulator::announce_atomic(p, sizeof(T), true, emulator::Order::release, location);
  __atomic_store_n(p, v, __ATOMIC_SEQ_CST);
}
template <class T>
PYOPS_ENGINE T fetch_add_acq_rel(T* p, std::type_identity_t<T> v, PYOPS_HERE) {
  static_assert(std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long>);
  emulator::announce_atomic(p, sizeof(T), true, emulator::Order::acquire_release, location);
  return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);
}
namespace detail {
template <class V, class P>
inline V* vector_at(P* p) {
  if (reinterpret_cast<uintptr_t>(p) % alignof(V) != 0) emulator::misaligned(p, alignof(V));
  return reinterpret_cast<V*>(p);
}
template <int N>
PYOPS_ENGINE void red_add(float* p, const float (&v)[N], PYOPS_HERE) {
  if (reinterpret_cast<uintptr_t>(p) % (N * sizeof(float)) != 0)
    emulator::fail("red_add: misaligned address", location);
  for (int i = 0; i < N; ++i) atomicAdd(p + i, v[i], location);
}
}  // namespace detail

// math

PYOPS_ENGINE float exp2_approx(float x) { return std::exp2(x); }
PYOPS_ENGINE float log2_approx(float x) { return std::log2(x); }
PYOPS_ENGINE float tanh_approx(float x) { return std::tanh(x); }
PYOPS_ENGINE float rcp_approx(float x) { return 1.0f / x; }
// Rounds to nearest, ties away from zero, on the 10 fraction bits that tf32 keeps.
PYOPS_ENGINE uint32_t to_tf32(float x) {
  const uint32_t bits = __float_as_uint(x);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return (finite ? bits + 0x1000u : bits) & 0xffffe000u;
}

// barriers

PYOPS_ENGINE void named_barrier_sync(int id, int threads, PYOPS_HERE) {
  emulator::named_barrier(id, threads, true, location);
}
PYOPS_ENGINE void named_barrier_arrive(int id, int threads, PYOPS_HERE) {
  emulator::named_barrier(id, threads, false, location);
}
PYOPS_ENGINE void grid_sync(unsigned* counter, PYOPS_HERE) { emulator::grid_barrier(counter, location); }
PYOPS_ENGINE void cluster_arrive(PYOPS_HERE) { emulator::cluster_barrier_arrive(location); }
PYOPS_ENGINE void cluster_wait(PYOPS_HERE) { emulator::cluster_barrier_wait(location); }
PYOPS_ENGINE void cluster_sync(PYOPS_HERE) {
  emulator::cluster_barrier_arrive(location);
  emulator::cluster_barrier_wait(location);
}
PYOPS_ENGINE unsigned cluster_rank() { return emulator::cluster_rank(); }
PYOPS_ENGINE unsigned cluster_size() { return emulator::cluster_size(); }
template <class T>
PYOPS_ENGINE T* cluster_map(T* p, unsigned rank, PYOPS_HERE) {
  return static_cast<T*>(emulator::map_shared(p, rank, location));
}

// cp.async

template <int Bytes>
PYOPS_ENGINE void cp_async(void* shared, const void* global, bool valid = true, PYOPS_HERE) {
  static_assert(Bytes == 16 || Bytes == 8 || Bytes == 4);
  emulator::copy_async(shared, global, Bytes, valid, location);
}
PYOPS_ENGINE void cp_async_commit() { emulator::copy_async_commit(); }
template <int Pending>
PYOPS_ENGINE void cp_async_wait(PYOPS_HERE) {
  emulator::copy_async_wait(Pending, location);
}

// ldmatrix, stmatrix, mma.sync

#define PYOPS_MATRIX(COUNT)                                                                        \
  PYOPS_ENGINE void ldmatrix_x##COUNT(uint32_t (&r)[COUNT], const void* row, PYOPS_HERE) {         \
    emulator::warp_collective(emulator::load_matrix, ~0u, row, r, 4, COUNT, location);             \
  }                                                                                                \
  PYOPS_ENGINE void ldmatrix_x##COUNT##_trans(uint32_t (&r)[COUNT], const void* row, PYOPS_HERE) { \
    emulator::warp_collective(emulator::load_matrix_transposed, ~0u, row, r, 4, COUNT, location);  \
  }                                                                                                \
  PYOPS_ENGINE void stmatrix_x##COUNT(void* row, const uint32_t (&r)[COUNT], PYOPS_HERE) {         \
    emulator::require_hopper("stmatrix", location);                                                \
    emulator::warp_collective(emulator::store_matrix, ~0u, r, row, 4, COUNT, location);            \
  }                                                                                                \
  PYOPS_ENGINE void stmatrix_x##COUNT##_trans(void* row, const uint32_t (&r)[COUNT], PYOPS_HERE) { \
    emulator::require_hopper("stmatrix", location);                                                \
    emulator::warp_collective(emulator::store_matrix_transposed, ~0u, r, row, 4, COUNT, location); \
  }
PYOPS_MATRIX(1)
PYOPS_MATRIX(2)
PYOPS_MATRIX(4)
#undef PYOPS_MATRIX

template <class T>
PYOPS_ENGINE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], PYOPS_HERE) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, fp16>);
  const emulator::MmaOperands operands{a, b, d};
  emulator::warp_collective(std::is_same_v<T, bf16> ? emulator::mma_bf16 : emulator::mma_fp16, ~0u, &operands, d, 16, 0,
                            location);
}
PYOPS_ENGINE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], PYOPS_HERE) {
  const emulator::MmaOperands operands{a, b, d};
  emulator::warp_collective(emulator::mma_tf32, ~0u, &operands, d, 16, 0, location);
}
PYOPS_ENGINE bool elect_one(PYOPS_HERE) {
  const int lane = static_cast<int>((threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32);
  return __shfl_sync(~0u, lane, 0, 32, location) == lane;
}

// mbarriers

PYOPS_ENGINE void mbarrier_init(uint64_t* bar, uint32_t count, PYOPS_HERE) {
  emulator::mbarrier_init(bar, count, location);
}
PYOPS_ENGINE void mbarrier_arrive(uint64_t* bar, PYOPS_HERE) { emulator::mbarrier_arrive(bar, 0, location); }
PYOPS_ENGINE void mbarrier_arrive_expect_tx(uint64_t* bar, uint32_t bytes, PYOPS_HERE) {
  emulator::mbarrier_arrive(bar, bytes, location);
}
PYOPS_ENGINE void mbarrier_arrive_remote(uint64_t* bar, unsigned rank, PYOPS_HERE) {
  emulator::mbarrier_arrive(static_cast<uint64_t*>(emulator::map_shared(bar, rank, location)), 0, location);
}
PYOPS_ENGINE bool mbarrier_try_wait(uint64_t* bar, uint32_t parity, PYOPS_HERE) {
  return emulator::mbarrier_test(bar, parity, location);
}
PYOPS_ENGINE void mbarrier_wait(uint64_t* bar, uint32_t parity, PYOPS_HERE) {
  emulator::mbarrier_wait(bar, parity, location);
}
PYOPS_ENGINE void fence_barrier_init() {}
PYOPS_ENGINE void fence_proxy_async() { emulator::proxy_fence(); }
PYOPS_ENGINE void fence_proxy_async_global() {}  // of global memory no proxies are told apart

// TMA

struct alignas(64) TensorMap {
  unsigned char bytes[128];
};

namespace detail {
template <class T, int Rank>
emulator::TensorMapData tensor_map_data(const T* base, const uint64_t (&shape)[Rank],
                                        const uint64_t (&stride_bytes)[Rank], Swizzle swizzle) {
  emulator::TensorMapData data{};
  data.base = reinterpret_cast<uint64_t>(base);
  for (int i = 0; i < Rank; ++i) {
    data.shape[i] = shape[i];
    data.stride[i] = stride_bytes[i];
  }
  data.rank = Rank;
  data.element_bytes = sizeof(T);
  data.swizzle_bytes = static_cast<uint8_t>(swizzle);
  data.element_kind = std::is_floating_point_v<T> ? emulator::kind_float
                      : std::is_same_v<T, bf16>   ? emulator::kind_bf16
                      : std::is_same_v<T, fp16>   ? emulator::kind_fp16
                                                  : emulator::kind_integer;
  return data;
}
inline TensorMap finish_tensor_map(emulator::TensorMapData& data) {
  emulator::check_tensor_map(data);
  TensorMap map{};
  std::memcpy(map.bytes, &data, sizeof data);
  return map;
}
}  // namespace detail

template <class T, int Rank>
TensorMap make_tensor_map(const T* base, const uint64_t (&shape)[Rank], const uint64_t (&stride_bytes)[Rank],
                          const uint32_t (&box)[Rank], Swizzle swizzle) {
  static_assert(Rank >= 1 && Rank <= 5);
  auto data = detail::tensor_map_data(base, shape, stride_bytes, swizzle);
  for (int i = 0; i < Rank; ++i) data.box[i] = static_cast<uint16_t>(box[i] > 0xffff ? 0xffff : box[i]);
  return detail::finish_tensor_map(data);
}
template <class T, int Rank>
TensorMap make_tensor_map_im2col(const T* base, const uint64_t (&shape)[Rank], const uint64_t (&stride_bytes)[Rank],
                                 const Im2col& window, Swizzle swizzle) {
  static_assert(Rank >= 3 && Rank <= 5);
  auto data = detail::tensor_map_data(base, shape, stride_bytes, swizzle);
  data.im2col = 1;
  data.box[0] = static_cast<uint16_t>(window.channels);
  data.box[1] = static_cast<uint16_t>(window.pixels);
  for (int i = 0; i < Rank - 2; ++i) {
    data.lower[i] = static_cast<int16_t>(window.lower_corner[i]);
    data.upper[i] = static_cast<int16_t>(window.upper_corner[i]);
    data.traversal[i] = static_cast<uint8_t>(window.traversal[i]);
  }
  return detail::finish_tensor_map(data);
}

template <int Rank>
PYOPS_ENGINE void tma_load(void* dst, const TensorMap& map, uint64_t* bar, const int (&coords)[Rank], PYOPS_HERE) {
  emulator::tensor_load(dst, &map, bar, Rank, coords, nullptr, false, 0, location);
}
template <int Rank>
PYOPS_ENGINE void tma_load_multicast(void* dst, const TensorMap& map, uint64_t* bar, const int (&coords)[Rank],
                                     uint16_t cta_mask, PYOPS_HERE) {
  emulator::tensor_load(dst, &map, bar, Rank, coords, nullptr, true, cta_mask, location);
}
template <int Rank>
PYOPS_ENGINE void tma_load_im2col(void* dst, const TensorMap& map, uint64_t* bar, const int (&coords)[Rank],
                                  const uint16_t (&offsets)[Rank - 2], PYOPS_HERE) {
  emulator::tensor_load(dst, &map, bar, Rank, coords, offsets, false, 0, location);
}
template <int Rank>
PYOPS_ENGINE void tma_store(const TensorMap& map, const void* src, const int (&coords)[Rank], PYOPS_HERE) {
  emulator::tensor_store(&map, src, Rank, coords, false, location);
}
template <int Rank>
PYOPS_ENGINE void tma_reduce_add(const TensorMap& map, const void* src, const int (&coords)[Rank], PYOPS_HERE) {
  emulator::tensor_store(&map, src, Rank, coords, true, location);
}
PYOPS_ENGINE void bulk_load(void* dst, const void* src, uint32_t bytes, uint64_t* bar, PYOPS_HERE) {
  emulator::bulk_load(dst, src, bytes, bar, location);
}
PYOPS_ENGINE void bulk_store(void* dst, const void* src, uint32_t bytes, PYOPS_HERE) {
  emulator::bulk_store(dst, src, bytes, location);
}
PYOPS_ENGINE void tma_store_commit() { emulator::bulk_commit(); }
template <int Pending>
PYOPS_ENGINE void tma_store_wait(PYOPS_HERE) {
  emulator::bulk_wait(Pending, false, location);
}
template <int Pending>
PYOPS_ENGINE void tma_store_wait_read(PYOPS_HERE) {
  emulator::bulk_wait(Pending, true, location);
}
PYOPS_ENGINE void tma_prefetch(const TensorMap&) {}

// wgmma

PYOPS_ENGINE uint64_t smem_desc(const void* p, uint32_t leading_bytes, uint32_t stride_bytes, Swizzle swizzle) {
  const auto field = [](uint32_t x) { return static_cast<uint64_t>((x & 0x3FFFF) >> 4); };
  const uint64_t layout = swizzle == Swizzle::b128 ? 1 : swizzle == Swizzle::b64 ? 2 : swizzle == Swizzle::b32 ? 3 : 0;
  return field(smem_address(p)) | field(leading_bytes) << 16 | field(stride_bytes) << 32 | layout << 62;
}
template <int Registers>
PYOPS_ENGINE void setmaxnreg_inc(PYOPS_HERE) {
  static_assert(Registers >= 24 && Registers <= 256 && Registers % 8 == 0);
  emulator::set_registers(Registers, location);
}
template <int Registers>
PYOPS_ENGINE void setmaxnreg_dec(PYOPS_HERE) {
  static_assert(Registers >= 24 && Registers <= 256 && Registers % 8 == 0);
  emulator::set_registers(Registers, location);
}
PYOPS_ENGINE void wgmma_fence(PYOPS_HERE) { emulator::wgmma_fence(location); }
PYOPS_ENGINE void wgmma_commit() { emulator::wgmma_commit(); }
template <int Pending>
PYOPS_ENGINE void wgmma_wait(PYOPS_HERE) {
  emulator::wgmma_wait(Pending, location);
}
template <int Pending, int First>
PYOPS_ENGINE void wgmma_wait(float (&)[First], PYOPS_HERE) {
  emulator::wgmma_wait(Pending, location);
}
template <int Pending, int First, int Second>
PYOPS_ENGINE void wgmma_wait(float (&)[First], float (&)[Second], PYOPS_HERE) {
  emulator::wgmma_wait(Pending, location);
}
template <class T, int Columns, Major MajorA = Major::k, Major MajorB = Major::k>
PYOPS_ENGINE void wgmma_m64k16(float (&d)[Columns / 2], uint64_t desc_a, uint64_t desc_b, bool accumulate = true,
                               PYOPS_HERE) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, fp16>);
  emulator::wgmma_issue({d, Columns, desc_a, desc_b, nullptr, accumulate, MajorA == Major::mn, MajorB == Major::mn,
                         std::is_same_v<T, bf16>},
                        location);
}
template <class T, int Columns, Major MajorB = Major::k>
PYOPS_ENGINE void wgmma_m64k16_reg(float (&d)[Columns / 2], const uint32_t (&a)[4], uint64_t desc_b,
                                   bool accumulate = true, PYOPS_HERE) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, fp16>);
  emulator::wgmma_issue({d, Columns, 0, desc_b, a, accumulate, false, MajorB == Major::mn, std::is_same_v<T, bf16>},
                        location);
}

}  // namespace pyops
