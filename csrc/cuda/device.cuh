// The device vocabulary: the only header a CUDA kernel includes.
//
// The same .cu file is compiled by nvcc (inline PTX in device/cuda_*.cuh) and by g++ (every CUDA thread is a fiber,
// csrc/emulator/). A kernel uses plain CUDA spellings where they exist (threadIdx, __syncthreads, __shfl_xor_sync,
// __syncwarp, __ldg, __ldcs, __stcs, atomicAdd, __expf, rsqrtf) and these names, all in namespace pyops, elsewhere:
//
// host      launch(kernel, {.grid, .block, .smem, .stream, .cluster, .cooperative}, args...)
//           throws std::runtime_error; an empty grid launches nothing
//           multiprocessor_count() max_cooperative_blocks(kernel, threads, smem, cluster = 1)    clusters lie along x
//           compute_capability()   of the code that runs on the current device: 80, 86, 90, 100, 120
//           shared_memory_limit()  bytes of shared memory that one block may ask for
//           l2_cache_bytes()       of the current device
//           zero_memory(p, bytes, stream)
//           hopper_built           whether the kernels of <stem>_hopper.cu are in this library (see below)
//           make_tensor_map(base, shape, stride_bytes, box, Swizzle) -> TensorMap, arrays innermost first
//           make_tensor_map_im2col(base, shape, stride_bytes, Im2col{...}, Swizzle) -> TensorMap
// storage   shared_storage<T>()      one struct per kernel; pass .smem = sizeof(T)
// types     bf16 fp16 Vec<T, N>{v[N]} accumulate_t<T> (double for double, else float; common/host_device.h)
// convert   to_float(x) from_float<T>(f) to_acc(x) from_acc<T>(a) convert<T>(x) to_tf32(f)
//           pack2<T>(lo, hi) -> uint32_t, unpack2<T>(u32) -> float2
// memory    load_vec<N>(p) load_vec_readonly<N>(p) load_vec_streaming<N>(p) store_vec(p, v) store_vec_streaming(p, v)
//           load_acquire(p) store_release(p, v) fetch_add_acq_rel(p, v)    device scope, unsigned of 32 or 64 bits
// atomics   atomicAdd(float | double | int | unsigned | half | half2 | bf16 | bf162), atomicMax, atomicCAS, ...
//           red_add_v2(float*, Vec<float, 2>) red_add_v4(float*, Vec<float, 4>)
// math      exp2_approx log2_approx tanh_approx rcp_approx
// reduce    warp_reduce<W>(v, op) warp_sum<W>(v) warp_max<W>(v) warp_min<W>(v)
//           W = 32, 16, 8, 4 or 2 lanes; every lane gets the result
//           block_reduce(v, op, identity, BlockScratch<T>&) block_sum(v, scratch) block_max(v, scratch)
//           two barriers, fixed order, every thread gets the result; blocks of a multiple of 32 threads
// barriers  named_barrier_sync(id, threads) named_barrier_arrive(id, threads)   id 1 to 15
//           grid_sync(unsigned* zeroed_counter)   cooperative launches; the counter only grows
// random    philox4x32(seed, subsequence, offset) philox_uniform4(...) uniform_from_bits(u32) in (0, 1]
//           RandomStream(state).words(group) is_kept(u32, threshold)   common/philox.h
// cp.async  cp_async<16 | 8 | 4>(smem, gmem, bool valid = true)  zero-fills when not valid
//           cp_async_commit() cp_async_wait<N>()
// matrix    ldmatrix_x1/x2/x4[_trans](uint32_t (&r)[n], row)
//           mma_m16n8k16<bf16 | fp16>(d[4], a[4], b[2])  mma_m16n8k8_tf32(d, a, b)
//
// sm_90 and later (device/cuda_hopper.cuh). The cluster words also compile for older architectures, where they trap: a
// kernel that uses no other of these may stand in any source, and is launched where compute_capability() >= 90.
// cluster   cluster_sync cluster_arrive cluster_wait cluster_rank cluster_size cluster_map(ptr, rank)
// mbarrier  mbarrier_init(bar, count) mbarrier_arrive(bar) mbarrier_arrive_expect_tx(bar, bytes)
//           mbarrier_arrive_remote(bar, rank) mbarrier_try_wait(bar, parity) mbarrier_wait(bar, parity)
//           fence_barrier_init
// TMA       tma_load(smem, map, bar, {x, y, ...}) tma_load_multicast(..., cta_mask)    x in steps of 16 bytes
//           tma_load_im2col(smem, map, bar, {c, w, ..., n}, {filter offsets})
//           tma_store(map, smem, {...}) tma_reduce_add(map, smem, {...})
//           bulk_load(smem, gmem, bytes, bar) bulk_store(gmem, smem, bytes)
//           tma_store_commit tma_store_wait<N> tma_store_wait_read<N> tma_prefetch(map)
//           fence_proxy_async (this block's shared memory; by every thread that wrote what TMA or wgmma will read)
//           fence_proxy_async_global (the same for global memory that TMA will read within the launch)
// matrix    stmatrix_x1/x2/x4[_trans](row, r)
// other     elect_one()
//
// sm_90a only (device/cuda_wgmma.cuh):
// wgmma     smem_desc(ptr, leading_bytes, stride_bytes, Swizzle)
//           wgmma_m64k16<T, N, MajorA, MajorB>(d[N / 2], desc_a, desc_b, accumulate = true)
//           wgmma_m64k16_reg<T, N, MajorB>(d, a[4], desc_b, accumulate = true)
//           wgmma_fence wgmma_commit wgmma_wait<N>() setmaxnreg_inc<R> setmaxnreg_dec<R>
//           wgmma_wait<N>(d) wgmma_wait<N>(d, e)    d, e: the sums that may be read from here on
//
// Kernels that need sm_90a stand in <stem>_hopper.cu, which is compiled for sm_90a only. <stem>.cu calls its launchers
// by
//   if constexpr (hopper_built)
//     if (compute_capability() == 90) return launch_on_hopper(...);
// so that a library built without sm_90a never mentions them.
//
// Rules a kernel follows so that both compilers mean the same: shared memory only through shared_storage; arithmetic in
// float or double, the half types are storage; spin loops contain an atomic, load_acquire or __nanosleep; no
// cooperative_groups, CUB, cuda::.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "common/host_device.h"
#include "common/philox.h"

namespace pyops {

enum class Swizzle { none = 0, b32 = 32, b64 = 64, b128 = 128 };

// Which dimension of an operand tile is contiguous in shared memory: K, or M/N.
enum class Major { k = 0, mn = 1 };

// Bounding box of an im2col tensor map over the spatial dimensions (innermost first), as in the CUDA driver API.
struct Im2col {
  int lower_corner[3];
  int upper_corner[3];
  unsigned channels;      // channels per pixel in the box
  unsigned pixels;        // pixels per box
  unsigned traversal[3];  // stride of the convolution along each spatial dimension
};

}  // namespace pyops

#if defined(__CUDACC__)
#include "cuda/device/cuda_core.cuh"
#include "cuda/device/cuda_hopper.cuh"
#include "cuda/device/cuda_wgmma.cuh"
#else
#include "emulator/device_emulator.h"
#endif

#include "cuda/device/vector.cuh"
#include "cuda/device/reduce.cuh"
