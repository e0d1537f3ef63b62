// The vocabulary on CUDA, sm_80 and later: launch, shared storage, atomics, cp.async, ldmatrix, mma.sync.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#define PYOPS_DEVICE __device__ __forceinline__

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

namespace detail {
inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears a non-sticky error, which would otherwise surface in an unrelated call
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}
}  // namespace detail

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), const LaunchConfig& config, Args&&... args) {
  if (config.grid.x == 0 || config.grid.y == 0 || config.grid.z == 0) return;
  const void* entry = reinterpret_cast<const void*>(kernel);
  if (config.smem > 48 * 1024) {
    detail::check_cuda(
        cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(config.smem)),
        "shared memory size");
  }
  cudaLaunchConfig_t launch_config{};
  launch_config.gridDim = config.grid;
  launch_config.blockDim = config.block;
  launch_config.dynamicSmemBytes = config.smem;
  launch_config.stream = config.stream;
  cudaLaunchAttribute attributes[2];
  launch_config.attrs = attributes;
  launch_config.numAttrs = 0;
  const unsigned cluster_blocks = config.cluster.x * config.cluster.y * config.cluster.z;
  if (cluster_blocks > 1) {
    if (cluster_blocks > 8) {
      detail::check_cuda(cudaFuncSetAttribute(entry, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
                         "cluster size");
    }
    auto& attribute = attributes[launch_config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {config.cluster.x, config.cluster.y, config.cluster.z};
  }
  if (config.cooperative) {
    auto& attribute = attributes[launch_config.numAttrs++];
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  detail::check_cuda(
      cudaLaunchKernelEx(&launch_config, kernel, static_cast<std::decay_t<Params>>(std::forward<Args>(args))...),
      "kernel launch");
}

namespace detail {
inline int device_attribute(cudaDeviceAttr attribute, const char* what) {
  int device = 0, value = 0;
  check_cuda(cudaGetDevice(&device), "current device");
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), what);
  return value;
}
}  // namespace detail

inline int multiprocessor_count() {
  return detail::device_attribute(cudaDevAttrMultiProcessorCount, "multiprocessor count");
}
inline int shared_memory_limit() {
  return detail::device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, "shared memory limit");
}
inline int l2_cache_bytes() { return detail::device_attribute(cudaDevAttrL2CacheSize, "size of the L2 cache"); }
inline void zero_memory(void* p, size_t bytes, cudaStream_t stream) {
  detail::check_cuda(cudaMemsetAsync(p, 0, bytes, stream), "zero_memory");
}

// The driver runs the newest code that is not newer than the device, so PTX of an old architecture has its abilities
// even on a new device. Internal linkage: the list differs between sources that are compiled for all architectures and
// those for sm_90a.
static inline int compute_capability() {
  const int device = 10 * detail::device_attribute(cudaDevAttrComputeCapabilityMajor, "compute capability") +
                     detail::device_attribute(cudaDevAttrComputeCapabilityMinor, "compute capability");
  int newest = 0;
  for (const int architecture : {__CUDA_ARCH_LIST__})
    if (architecture / 10 <= device) newest = std::max(newest, architecture / 10);
  return newest;
}
#if defined(PYOPS_CUDA_HOPPER)
inline constexpr bool hopper_built = true;
#else
inline constexpr bool hopper_built = false;
#endif

// The largest grid of a cooperative launch, in clusters along x.
template <class... Params>
int max_cooperative_blocks(void (*kernel)(Params...), unsigned threads, size_t smem, int cluster = 1) {
  if (smem > 48 * 1024) {
    detail::check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                            cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem)),
                       "shared memory size");
  }
  int blocks = 0;
  if (cluster > 1) {
    // A cluster stands in one graphics processing cluster: not every multiprocessor finds a place in one.
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(cluster)), config.blockDim = dim3(threads);
    config.dynamicSmemBytes = smem, config.attrs = &attribute, config.numAttrs = 1;
    detail::check_cuda(cudaOccupancyMaxActiveClusters(&blocks, kernel, &config), "occupancy");
    return blocks * cluster;
  }
  detail::check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, static_cast<int>(threads), smem),
                     "occupancy");
  return blocks * multiprocessor_count();
}

// 1024 bytes is the alignment that the 128-byte swizzle of TMA and wgmma asks for.
extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];

template <class T>
PYOPS_DEVICE T& shared_storage() {
  static_assert(alignof(T) <= 1024);
  return *reinterpret_cast<T*>(dynamic_shared_memory);
}

PYOPS_DEVICE uint32_t smem_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// memory order

PYOPS_DEVICE unsigned load_acquire(const unsigned* p) {
  unsigned v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
PYOPS_DEVICE unsigned long long load_acquire(const unsigned long long* p) {
  unsigned long long v;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}
PYOPS_DEVICE void store_release(unsigned* p, unsigned v) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
PYOPS_DEVICE void store_release(unsigned long long* p, unsigned long long v) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}
PYOPS_DEVICE unsigned fetch_add_acq_rel(unsigned* p, unsigned v) {
  unsigned old;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(v) : "memory");
  return old;
}
PYOPS_DEVICE unsigned long long fetch_add_acq_rel(unsigned long long* p, unsigned long long v) {
  unsigned long long old;
  asm volatile("atom.acq_rel.gpu.global.add.u64 %0, [%1], %2;" : "=l"(old) : "l"(p), "l"(v) : "memory");
  return old;
}

namespace detail {
template <class V, class P>
PYOPS_DEVICE V* vector_at(P* p) {
  return reinterpret_cast<V*>(p);
}
PYOPS_DEVICE void red_add(float* p, const float (&v)[2]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(p), "f"(v[0]), "f"(v[1]) : "memory");
#else
  for (int i = 0; i < 2; ++i) atomicAdd(p + i, v[i]);
#endif
}
PYOPS_DEVICE void red_add(float* p, const float (&v)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3])
               : "memory");
#else
  for (int i = 0; i < 4; ++i) atomicAdd(p + i, v[i]);
#endif
}
}  // namespace detail

// math

PYOPS_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
PYOPS_DEVICE float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
PYOPS_DEVICE float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
PYOPS_DEVICE float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
PYOPS_DEVICE uint32_t to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

// barriers

PYOPS_DEVICE void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
PYOPS_DEVICE void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// All blocks of a cooperative launch meet. The counter starts at 0 and only grows, so it needs no reset between uses.
PYOPS_DEVICE void grid_sync(unsigned* counter) {
  __syncthreads();
  if (threadIdx.x == 0 && threadIdx.y == 0 && threadIdx.z == 0) {
    const unsigned blocks = gridDim.x * gridDim.y * gridDim.z;
    __threadfence();
    const unsigned ticket = fetch_add_acq_rel(counter, 1u);
    const unsigned target = (ticket / blocks + 1) * blocks;
    while (static_cast<int>(load_acquire(counter) - target) < 0) __nanosleep(32);
    __threadfence();
  }
  __syncthreads();
}

// cp.async

template <int Bytes>
PYOPS_DEVICE void cp_async(void* shared, const void* global, bool valid = true) {
  static_assert(Bytes == 16 || Bytes == 8 || Bytes == 4);
  const int source_bytes = valid ? Bytes : 0;
  if constexpr (Bytes == 16) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(smem_address(shared)), "l"(global),
                 "r"(source_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(smem_address(shared)), "l"(global), "n"(Bytes),
                 "r"(source_bytes)
                 : "memory");
  }
}
PYOPS_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Pending>
PYOPS_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// ldmatrix: lane l passes the address of row l % 8 of matrix l / 8

PYOPS_DEVICE void ldmatrix_x1(uint32_t (&r)[1], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(smem_address(row)) : "memory");
}
PYOPS_DEVICE void ldmatrix_x1_trans(uint32_t (&r)[1], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
               : "=r"(r[0])
               : "r"(smem_address(row))
               : "memory");
}
PYOPS_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(smem_address(row))
               : "memory");
}
PYOPS_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(smem_address(row))
               : "memory");
}
PYOPS_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem_address(row))
               : "memory");
}
PYOPS_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem_address(row))
               : "memory");
}

// mma.sync: d += a * b, a row-major fragments, b column-major fragments

template <class T>
PYOPS_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, fp16>);
  if constexpr (std::is_same_v<T, bf16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}
PYOPS_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace pyops
