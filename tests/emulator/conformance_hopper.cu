// One kernel per primitive with a documented layout, sm_90a; see conformance.cu.
#include "test.h"

using namespace pyops;
using test::Buffer;

__global__ void conformance_stmatrix(uint16_t* out) {
  struct Storage {
    alignas(16) uint16_t row[64][8];
  };
  auto& s = shared_storage<Storage>();
  const unsigned lane = threadIdx.x;
  uint32_t r[4];
  for (unsigned i = 0; i < 4; ++i) r[i] = lane * 65537u + i * 4096u;
  stmatrix_x4(s.row[lane], r);
  stmatrix_x4_trans(s.row[32 + lane], r);
  __syncwarp();
  for (unsigned i = 0; i < 16; ++i) out[lane * 16 + i] = s.row[lane * 2 + i / 8][i % 8];
}
PYOPS_TEST(conformance_exact_stmatrix) {
  Buffer<uint16_t> out("out", 512, true);
  launch(conformance_stmatrix, {.grid = 1, .block = 32, .smem = 1024}, out.get());
  test::synchronize();
  out.record();
  return "";
}

struct Raw {
  alignas(1024) unsigned char bytes[4096];
  uint64_t bar;
};
template <bool Window>
__global__ void conformance_load(const __grid_constant__ TensorMap map, uint32_t bytes, unsigned char* out) {
  auto& s = shared_storage<Raw>();
  if (threadIdx.x == 0) {
    mbarrier_init(&s.bar, 1);
    fence_barrier_init();
    mbarrier_arrive_expect_tx(&s.bar, bytes);
    if constexpr (Window) {
      tma_load_im2col(s.bytes, map, &s.bar, {0, 3, -1, 0}, {uint16_t(2), uint16_t(1)});
    } else {
      tma_load(s.bytes, map, &s.bar, {-4, 3});
    }
  }
  __syncthreads();
  mbarrier_wait(&s.bar, 0);
  for (uint32_t i = threadIdx.x; i < bytes; i += 32) out[i] = s.bytes[i];
}
PYOPS_TEST(conformance_exact_tma_swizzles) {
  Buffer<float> in("in", 40 * 40, false);
  in.fill([](size_t i) { return static_cast<float>(i); });
  for (const Swizzle swizzle : {Swizzle::none, Swizzle::b32, Swizzle::b64, Swizzle::b128}) {
    const uint32_t columns = swizzle == Swizzle::none ? 32 : static_cast<uint32_t>(swizzle) / 4,
                   bytes = columns * 4 * 32;
    Buffer<unsigned char> out("out", bytes, true);
    const TensorMap map =
        make_tensor_map(static_cast<const float*>(in.get()), {40, 40}, {4, 160}, {columns, 32}, swizzle);
    launch(conformance_load<false>, {.grid = 1, .block = 32, .smem = sizeof(Raw)}, map, bytes, out.get());
    test::synchronize();
    out.record();
  }
  return "";
}
PYOPS_TEST(conformance_exact_tma_im2col) {
  Buffer<float> in("in", 2 * 6 * 7 * 8, false);
  in.fill([](size_t i) { return static_cast<float>(i + 1); });
  for (const unsigned stride : {1u, 2u}) {
    Buffer<unsigned char> out("out", 24 * 32, true);
    const TensorMap map =
        make_tensor_map_im2col(static_cast<const float*>(in.get()), {8, 7, 6, 2}, {4, 32, 32 * 7, 32 * 42},
                               Im2col{{-1, -1}, {-1, -1}, 8, 24, {stride, stride}}, Swizzle::b32);
    launch(conformance_load<true>, {.grid = 1, .block = 32, .smem = sizeof(Raw)}, map, 24u * 32u, out.get());
    test::synchronize();
    out.record();
  }
  return "";
}

struct RandomOperands {
  alignas(1024) unsigned char a[8192], b[32768];
};
// Random operands fill shared memory as they come, so the descriptors alone decide what is multiplied with what.
template <class T, int N, Major MajorA, Major MajorB>
__global__ void __launch_bounds__(128) conformance_wgmma(float* out) {
  auto& s = shared_storage<RandomOperands>();
  for (unsigned i = threadIdx.x; i < sizeof s / 4; i += 128) {
    const auto u = philox_uniform4(3, i, 0);
    reinterpret_cast<uint32_t*>(&s)[i] = pack2<T>(u[0] * 2.0f - 1.0f, u[1] * 2.0f - 1.0f);
  }
  fence_proxy_async();
  __syncthreads();
  float acc[N / 2];
  const uint32_t leading_a = MajorA == Major::k ? 16 : 2048, leading_b = MajorB == Major::k ? 16 : 2048;
  wgmma_fence();
  wgmma_m64k16<T, N, MajorA, MajorB>(acc, smem_desc(s.a, leading_a, 1024, Swizzle::b128),
                                     smem_desc(s.b, leading_b, 1024, Swizzle::b128), false);
  wgmma_commit();
  wgmma_wait<0>();
  for (int i = 0; i < N / 2; ++i) out[threadIdx.x * (N / 2) + static_cast<unsigned>(i)] = acc[i];
}
template <class T, int N, Major MajorA, Major MajorB>
void record_wgmma() {
  Buffer<float> out("out", 64 * N, true);
  launch(conformance_wgmma<T, N, MajorA, MajorB>, {.grid = 1, .block = 128, .smem = sizeof(RandomOperands)}, out.get());
  test::synchronize();
  out.record();
  test::forget_buffers();
}
PYOPS_TEST(conformance_float_wgmma) {
  record_wgmma<bf16, 64, Major::k, Major::k>();
  record_wgmma<bf16, 256, Major::k, Major::mn>();
  record_wgmma<fp16, 128, Major::mn, Major::k>();
  record_wgmma<fp16, 192, Major::mn, Major::mn>();
  return "";
}
