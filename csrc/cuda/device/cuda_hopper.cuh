// The vocabulary on CUDA, sm_90 and later: clusters, mbarriers, TMA, stmatrix.
#pragma once

namespace pyops {

using TensorMap = CUtensorMap;

namespace detail {
template <class T>
constexpr CUtensorMapDataType tensor_map_type() {
  if constexpr (std::is_same_v<T, bf16>) {
    return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  } else if constexpr (std::is_same_v<T, fp16>) {
    return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  } else if constexpr (std::is_same_v<T, float>) {
    return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  } else if constexpr (std::is_same_v<T, double>) {
    return CU_TENSOR_MAP_DATA_TYPE_FLOAT64;
  } else if constexpr (sizeof(T) == 1) {
    return CU_TENSOR_MAP_DATA_TYPE_UINT8;
  } else if constexpr (sizeof(T) == 2) {
    return CU_TENSOR_MAP_DATA_TYPE_UINT16;
  } else if constexpr (sizeof(T) == 4) {
    return CU_TENSOR_MAP_DATA_TYPE_UINT32;
  } else {
    return CU_TENSOR_MAP_DATA_TYPE_UINT64;
  }
}

inline CUtensorMapSwizzle tensor_map_swizzle(Swizzle swizzle) {
  switch (swizzle) {
    case Swizzle::b32:
      return CU_TENSOR_MAP_SWIZZLE_32B;
    case Swizzle::b64:
      return CU_TENSOR_MAP_SWIZZLE_64B;
    case Swizzle::b128:
      return CU_TENSOR_MAP_SWIZZLE_128B;
    default:
      return CU_TENSOR_MAP_SWIZZLE_NONE;
  }
}

// The driver library is not linked: a machine without a driver must still load the ops.
template <class Fn>
Fn driver_function(const char* name) {
  void* fn = nullptr;
  cudaDriverEntryPointQueryResult found;
  check_cuda(cudaGetDriverEntryPointByVersion(name, &fn, 12000, cudaEnableDefault, &found), name);
  if (found != cudaDriverEntryPointSuccess) throw std::runtime_error(std::string(name) + ": not in this driver");
  return reinterpret_cast<Fn>(fn);
}
inline void check_encode(CUresult result) {
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("tensor map: the driver rejected it (error " + std::to_string(result) + ")");
  }
}
}  // namespace detail

// shape, stride_bytes and box are innermost first; stride_bytes[0] is sizeof(T) and not passed to the hardware.
template <class T, int Rank>
TensorMap make_tensor_map(const T* base, const uint64_t (&shape)[Rank], const uint64_t (&stride_bytes)[Rank],
                          const uint32_t (&box)[Rank], Swizzle swizzle) {
  static_assert(Rank >= 1 && Rank <= 5);
  static const auto encode = detail::driver_function<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  if (stride_bytes[0] != sizeof(T)) throw std::runtime_error("tensor map: the innermost dimension must be contiguous");
  cuuint64_t dims[Rank], strides[Rank];
  cuuint32_t boxes[Rank], steps[Rank];
  for (int i = 0; i < Rank; ++i) {
    dims[i] = shape[i];
    boxes[i] = box[i];
    steps[i] = 1;
    if (i > 0) strides[i - 1] = stride_bytes[i];
  }
  TensorMap map;
  detail::check_encode(encode(&map, detail::tensor_map_type<T>(), Rank, const_cast<std::remove_const_t<T>*>(base), dims,
                              strides, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, detail::tensor_map_swizzle(swizzle),
                              CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
  return map;
}

// Shape is (C, W, N), (C, W, H, N) or (C, W, H, D, N).
template <class T, int Rank>
TensorMap make_tensor_map_im2col(const T* base, const uint64_t (&shape)[Rank], const uint64_t (&stride_bytes)[Rank],
                                 const Im2col& window, Swizzle swizzle) {
  static_assert(Rank >= 3 && Rank <= 5);
  static const auto encode = detail::driver_function<decltype(&cuTensorMapEncodeIm2col)>("cuTensorMapEncodeIm2col");
  cuuint64_t dims[Rank], strides[Rank];
  cuuint32_t steps[Rank];
  for (int i = 0; i < Rank; ++i) {
    dims[i] = shape[i];
    steps[i] = i > 0 && i + 1 < Rank ? window.traversal[i - 1] : 1;
    if (i > 0) strides[i - 1] = stride_bytes[i];
  }
  TensorMap map;
  detail::check_encode(encode(&map, detail::tensor_map_type<T>(), Rank, const_cast<std::remove_const_t<T>*>(base), dims,
                              strides, window.lower_corner, window.upper_corner, window.channels, window.pixels, steps,
                              CU_TENSOR_MAP_INTERLEAVE_NONE, detail::tensor_map_swizzle(swizzle),
                              CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
  return map;
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// clusters

PYOPS_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
PYOPS_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
PYOPS_DEVICE void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
PYOPS_DEVICE unsigned cluster_rank() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
PYOPS_DEVICE unsigned cluster_size() {
  unsigned size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
// The same shared-memory variable in another block of the cluster.
template <class T>
PYOPS_DEVICE T* cluster_map(T* p, unsigned rank) {
  uint64_t mapped;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(p), "r"(rank));
  return reinterpret_cast<T*>(mapped);
}

// mbarriers

PYOPS_DEVICE void mbarrier_init(uint64_t* bar, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(bar)), "r"(count) : "memory");
}
PYOPS_DEVICE void mbarrier_arrive(uint64_t* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_address(bar)) : "memory");
}
PYOPS_DEVICE void mbarrier_arrive_expect_tx(uint64_t* bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(bar)), "r"(bytes)
               : "memory");
}
PYOPS_DEVICE void mbarrier_arrive_remote(uint64_t* bar, unsigned rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(smem_address(bar)),
      "r"(rank)
      : "memory");
}
PYOPS_DEVICE bool mbarrier_try_wait(uint64_t* bar, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(done)
      : "r"(smem_address(bar)), "r"(parity)
      : "memory");
  return done != 0;
}
// Returns once the phase of the given parity has completed; a fresh barrier counts as having completed parity 1.
PYOPS_DEVICE void mbarrier_wait(uint64_t* bar, uint32_t parity) {
  while (!mbarrier_try_wait(bar, parity)) {}
}
PYOPS_DEVICE void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
PYOPS_DEVICE void fence_proxy_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }
PYOPS_DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// TMA

namespace detail {
template <int Rank>
PYOPS_DEVICE void tma_load(uint32_t dst, const TensorMap* map, uint32_t bar, const int (&c)[Rank]) {
#define PYOPS_TMA_LOAD(DIM, COORDS, ...)                                                                              \
  asm volatile("cp.async.bulk.tensor." DIM ".shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {" COORDS \
               "}], [%2];" ::"r"(dst),                                                                                \
               "l"(map), "r"(bar), __VA_ARGS__                                                                        \
               : "memory")
  if constexpr (Rank == 1) {
    PYOPS_TMA_LOAD("1d", "%3", "r"(c[0]));
  } else if constexpr (Rank == 2) {
    PYOPS_TMA_LOAD("2d", "%3, %4", "r"(c[0]), "r"(c[1]));
  } else if constexpr (Rank == 3) {
    PYOPS_TMA_LOAD("3d", "%3, %4, %5", "r"(c[0]), "r"(c[1]), "r"(c[2]));
  } else if constexpr (Rank == 4) {
    PYOPS_TMA_LOAD("4d", "%3, %4, %5, %6", "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
  } else {
    PYOPS_TMA_LOAD("5d", "%3, %4, %5, %6, %7", "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]), "r"(c[4]));
  }
#undef PYOPS_TMA_LOAD
}

template <int Rank>
PYOPS_DEVICE void tma_load_multicast(uint32_t dst, const TensorMap* map, uint32_t bar, const int (&c)[Rank],
                                     uint16_t mask) {
#define PYOPS_TMA_LOAD(DIM, COORDS, ...)                                                                     \
  asm volatile("cp.async.bulk.tensor." DIM                                                                   \
               ".shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {" COORDS \
               "}], [%2], %3;" ::"r"(dst),                                                                   \
               "l"(map), "r"(bar), "h"(mask), __VA_ARGS__                                                    \
               : "memory")
  if constexpr (Rank == 1) {
    PYOPS_TMA_LOAD("1d", "%4", "r"(c[0]));
  } else if constexpr (Rank == 2) {
    PYOPS_TMA_LOAD("2d", "%4, %5", "r"(c[0]), "r"(c[1]));
  } else if constexpr (Rank == 3) {
    PYOPS_TMA_LOAD("3d", "%4, %5, %6", "r"(c[0]), "r"(c[1]), "r"(c[2]));
  } else if constexpr (Rank == 4) {
    PYOPS_TMA_LOAD("4d", "%4, %5, %6, %7", "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
  } else {
    PYOPS_TMA_LOAD("5d", "%4, %5, %6, %7, %8", "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]), "r"(c[4]));
  }
#undef PYOPS_TMA_LOAD
}
}  // namespace detail

template <int Rank>
PYOPS_DEVICE void tma_load(void* dst, const TensorMap& map, uint64_t* bar, const int (&coords)[Rank]) {
  detail::tma_load(smem_address(dst), &map, smem_address(bar), coords);
}
template <int Rank>
PYOPS_DEVICE void tma_load_multicast(void* dst, const TensorMap& map, uint64_t* bar, const int (&coords)[Rank],
                                     uint16_t cta_mask) {
  detail::tma_load_multicast(smem_address(dst), &map, smem_address(bar), coords, cta_mask);
}

// coords: channel, then the base pixel in each spatial dimension, then the image; offsets: filter position, innermost
// first.
template <int Rank>
PYOPS_DEVICE void tma_load_im2col(void* dst, const TensorMap& map, uint64_t* bar, const int (&c)[Rank],
                                  const uint16_t (&o)[Rank - 2]) {
  static_assert(Rank >= 3 && Rank <= 5);
#define PYOPS_TMA_IM2COL(DIM, COORDS, OFFSETS, ...)                                                                    \
  asm volatile("cp.async.bulk.tensor." DIM                                                                             \
               ".im2col.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {" COORDS "}], [%2], {" OFFSETS \
               "};" ::"r"(smem_address(dst)),                                                                          \
               "l"(&map), "r"(smem_address(bar)), __VA_ARGS__                                                          \
               : "memory")
  if constexpr (Rank == 3) {
    PYOPS_TMA_IM2COL("3d", "%3, %4, %5", "%6", "r"(c[0]), "r"(c[1]), "r"(c[2]), "h"(o[0]));
  } else if constexpr (Rank == 4) {
    PYOPS_TMA_IM2COL("4d", "%3, %4, %5, %6", "%7, %8", "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]), "h"(o[0]),
                     "h"(o[1]));
  } else {
    PYOPS_TMA_IM2COL("5d", "%3, %4, %5, %6, %7", "%8, %9, %10", "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]), "r"(c[4]),
                     "h"(o[0]), "h"(o[1]), "h"(o[2]));
  }
#undef PYOPS_TMA_IM2COL
}

#define PYOPS_TMA_TO_GLOBAL(NAME, OPCODE)                                                                            \
  template <int Rank>                                                                                                \
  PYOPS_DEVICE void NAME(const TensorMap& map, const void* src, const int (&c)[Rank]) {                              \
    if constexpr (Rank == 1) {                                                                                       \
      asm volatile(OPCODE("1d") " [%0, {%2}], [%1];" ::"l"(&map), "r"(smem_address(src)), "r"(c[0]) : "memory");     \
    } else if constexpr (Rank == 2) {                                                                                \
      asm volatile(OPCODE("2d") " [%0, {%2, %3}], [%1];" ::"l"(&map), "r"(smem_address(src)), "r"(c[0]), "r"(c[1])   \
                   : "memory");                                                                                      \
    } else if constexpr (Rank == 3) {                                                                                \
      asm volatile(OPCODE("3d") " [%0, {%2, %3, %4}], [%1];" ::"l"(&map), "r"(smem_address(src)), "r"(c[0]),         \
                   "r"(c[1]), "r"(c[2])                                                                              \
                   : "memory");                                                                                      \
    } else if constexpr (Rank == 4) {                                                                                \
      asm volatile(OPCODE("4d") " [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map), "r"(smem_address(src)), "r"(c[0]),     \
                   "r"(c[1]), "r"(c[2]), "r"(c[3])                                                                   \
                   : "memory");                                                                                      \
    } else {                                                                                                         \
      asm volatile(OPCODE("5d") " [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(&map), "r"(smem_address(src)), "r"(c[0]), \
                   "r"(c[1]), "r"(c[2]), "r"(c[3]), "r"(c[4])                                                        \
                   : "memory");                                                                                      \
    }                                                                                                                \
  }
#define PYOPS_TMA_STORE(DIM) "cp.async.bulk.tensor." DIM ".global.shared::cta.bulk_group"
#define PYOPS_TMA_REDUCE_ADD(DIM) "cp.reduce.async.bulk.tensor." DIM ".global.shared::cta.add.bulk_group"
PYOPS_TMA_TO_GLOBAL(tma_store, PYOPS_TMA_STORE)
PYOPS_TMA_TO_GLOBAL(tma_reduce_add, PYOPS_TMA_REDUCE_ADD)
#undef PYOPS_TMA_TO_GLOBAL
#undef PYOPS_TMA_STORE
#undef PYOPS_TMA_REDUCE_ADD

// Contiguous bytes; addresses and size are multiples of 16.
PYOPS_DEVICE void bulk_load(void* dst, const void* src, uint32_t bytes, uint64_t* bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   smem_address(dst)),
               "l"(src), "r"(bytes), "r"(smem_address(bar))
               : "memory");
}
PYOPS_DEVICE void bulk_store(void* dst, const void* src, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(dst), "r"(smem_address(src)),
               "r"(bytes)
               : "memory");
}
PYOPS_DEVICE void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// All but the last Pending groups of this thread have written to global memory ...
template <int Pending>
PYOPS_DEVICE void tma_store_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(Pending) : "memory");
}
// ... or have at least read their shared memory, which may then be reused.
template <int Pending>
PYOPS_DEVICE void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory");
}
PYOPS_DEVICE void tma_prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// stmatrix: lane l passes the address of row l % 8 of matrix l / 8

PYOPS_DEVICE void stmatrix_x1(void* row, const uint32_t (&r)[1]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%0], {%1};" ::"r"(smem_address(row)), "r"(r[0]) : "memory");
}
PYOPS_DEVICE void stmatrix_x1_trans(void* row, const uint32_t (&r)[1]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(smem_address(row)), "r"(r[0])
               : "memory");
}
PYOPS_DEVICE void stmatrix_x2(void* row, const uint32_t (&r)[2]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(smem_address(row)), "r"(r[0]), "r"(r[1])
               : "memory");
}
PYOPS_DEVICE void stmatrix_x2_trans(void* row, const uint32_t (&r)[2]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(smem_address(row)), "r"(r[0]),
               "r"(r[1])
               : "memory");
}
PYOPS_DEVICE void stmatrix_x4(void* row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(smem_address(row)), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}
PYOPS_DEVICE void stmatrix_x4_trans(void* row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(smem_address(row)),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// True in exactly one lane of a converged warp.
PYOPS_DEVICE bool elect_one() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(elected));
  return elected != 0;
}

#else

// Never reached: kernels that use these are launched where compute_capability() >= 90.
PYOPS_DEVICE void cluster_arrive() { __trap(); }
PYOPS_DEVICE void cluster_wait() { __trap(); }
PYOPS_DEVICE void cluster_sync() { __trap(); }
PYOPS_DEVICE unsigned cluster_rank() {
  __trap();
  return 0;
}
PYOPS_DEVICE unsigned cluster_size() {
  __trap();
  return 1;
}
template <class T>
PYOPS_DEVICE T* cluster_map(T* p, unsigned) {
  __trap();
  return p;
}

#endif

}  // namespace pyops
