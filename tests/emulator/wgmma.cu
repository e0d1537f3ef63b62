// Warpgroup matrix products (sm_90a) against a triple loop: every N, both types, every operand layout.
#include "test.h"

using namespace pyops;
using test::Buffer;
using test::digit;

template <int N>
struct ProductStorage {
  alignas(1024) unsigned char a[64 * 128];
  alignas(1024) unsigned char b[256 * 128];
};

// Byte offset of an element in an operand tile of `extent` rows (M or N) and 16 columns (K), laid out for a descriptor.
struct Layout {
  Swizzle swizzle;
  Major major;
  int extent;
  PYOPS_HOST_DEVICE int width() const { return swizzle == Swizzle::none ? 16 : static_cast<int>(swizzle); }
  PYOPS_HOST_DEVICE int dense(int row, int k) const {
    const int w = width();
    if (major == Major::k) {
      return swizzle == Swizzle::none ? row * 16 + k / 8 * extent * 16 + k % 8 * 2 : row * w + k * 2;
    }
    const int per = w / 2;  // M/N elements in a line
    return row / per * 16 * w + k * w + row % per * 2;
  }
  PYOPS_HOST_DEVICE int offset(int row, int k) const {
    const int o = dense(row, k);
    const int mask = swizzle == Swizzle::b128 ? 7 : swizzle == Swizzle::b64 ? 3 : swizzle == Swizzle::b32 ? 1 : 0;
    return o ^ ((o >> 7 & mask) << 4);
  }
  PYOPS_HOST_DEVICE uint32_t leading() const {
    if (major == Major::k) return swizzle == Swizzle::none ? static_cast<uint32_t>(extent * 16) : 16;
    return swizzle == Swizzle::none ? 8 * 16 : static_cast<uint32_t>(16 * width());
  }
  PYOPS_HOST_DEVICE uint32_t stride() const {
    if (major == Major::k) return static_cast<uint32_t>(8 * width());
    return swizzle == Swizzle::none ? 16 * 16 : static_cast<uint32_t>(8 * width());
  }
};

template <class T, int N, Major MajorA, Major MajorB, bool Registers>
__global__ void __launch_bounds__(128) multiply_warpgroup(const T* a, const T* b, float* d, Layout la, Layout lb) {
  auto& s = shared_storage<ProductStorage<N>>();
  const int t = static_cast<int>(threadIdx.x);
  for (int i = t; i < 64 * 16; i += 128) *reinterpret_cast<T*>(s.a + la.offset(i / 16, i % 16)) = a[i];
  for (int i = t; i < N * 16; i += 128) *reinterpret_cast<T*>(s.b + lb.offset(i % N, i / N)) = b[i];
  fence_proxy_async();
  __syncthreads();
  float acc[N / 2];
  for (int i = 0; i < N / 2; ++i) acc[i] = 1.0f;
  const uint64_t desc_b = smem_desc(s.b, lb.leading(), lb.stride(), lb.swizzle);
  if constexpr (Registers) {
    uint32_t fragment[4];
    const int row = t / 32 * 16 + t % 32 / 4, k = t % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      const T* pair = a + (row + i % 2 * 8) * 16 + k + i / 2 * 8;
      fragment[i] = pack2<T>(to_float(pair[0]), to_float(pair[1]));
    }
    wgmma_fence();
    wgmma_m64k16_reg<T, N, MajorB>(acc, fragment, desc_b, false);
    wgmma_m64k16_reg<T, N, MajorB>(acc, fragment, desc_b);
    wgmma_commit();
    wgmma_wait<0>();
  } else {
    const uint64_t desc_a = smem_desc(s.a, la.leading(), la.stride(), la.swizzle);
    wgmma_fence();
    wgmma_m64k16<T, N, MajorA, MajorB>(acc, desc_a, desc_b, false);
    wgmma_m64k16<T, N, MajorA, MajorB>(acc, desc_a, desc_b);
    wgmma_commit();
    wgmma_wait<0>();
  }
  for (int i = 0; i < N / 2; ++i) {
    const int row = t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + t % 4 * 2 + i % 2;
    d[row * N + column] = acc[i];
  }
}

template <class T, int N, Major MajorA = Major::k, Major MajorB = Major::k, bool Registers = false>
std::string check_product(Swizzle swizzle_a, Swizzle swizzle_b) {
  Buffer<T> a("a", 64 * 16, false), b("b", 16 * N, false);
  Buffer<float> d("d", 64 * N, true);
  a.fill([](size_t i) { return convert<T>(digit(i)); });
  b.fill([](size_t i) { return convert<T>(digit(i * 3 + 1)); });
  launch(multiply_warpgroup<T, N, MajorA, MajorB, Registers>,
         {.grid = 1, .block = 128, .smem = sizeof(ProductStorage<N>)}, static_cast<const T*>(a.get()),
         static_cast<const T*>(b.get()), d.get(), Layout{swizzle_a, MajorA, 64}, Layout{swizzle_b, MajorB, N});
  test::synchronize();
  for (size_t i = 0; i < 64 * N; ++i) {
    float want = 0;
    for (size_t k = 0; k < 16; ++k) want += 2 * convert<float>(a[i / N * 16 + k]) * convert<float>(b[k * N + i % N]);
    PYOPS_EXPECT_EQUAL(d[i], want, i);
  }
  test::forget_buffers();
  return "";
}

template <int... N>
std::string check_columns() {
  std::string result;
  ((result = result.empty() ? check_product<bf16, N>(Swizzle::b128, Swizzle::b128) : result), ...);
  ((result = result.empty() ? check_product<bf16, N, Major::k, Major::k, true>(Swizzle::b128, Swizzle::b32) : result),
   ...);
  return result;
}
PYOPS_TEST(wgmma_columns) { return check_columns<8, 16, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 224, 256>(); }

PYOPS_TEST(wgmma_layouts) {
  const Swizzle all[] = {Swizzle::none, Swizzle::b32, Swizzle::b64, Swizzle::b128};
  for (const Swizzle s : all) {
    const std::string results[] = {check_product<bf16, 64>(s, s),
                                   check_product<bf16, 128, Major::k, Major::mn>(Swizzle::b128, s),
                                   check_product<bf16, 64, Major::mn, Major::k>(s, Swizzle::b64),
                                   check_product<fp16, 64, Major::mn, Major::mn>(s, s),
                                   check_product<fp16, 64, Major::k, Major::mn, true>(Swizzle::b128, s)};
    for (const auto& result : results) {
      if (!result.empty()) return result + " (swizzle " + std::to_string(static_cast<int>(s)) + ")";
    }
  }
  return "";
}

// A whole pipeline: TMA with the 128-byte swizzle, mbarriers, one producer and one consumer warpgroup, two products in
// flight.

constexpr int tile_m = 64, tile_n = 64, tile_k = 64, stages = 3;
struct GemmStorage {
  alignas(1024) bf16 a[stages][tile_m][tile_k];
  alignas(1024) bf16 b[stages][tile_n][tile_k];
  uint64_t full[stages], empty[stages];
};
__global__ void __launch_bounds__(256)
    multiply_pipelined(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b, float* d,
                       int m, int n, int k) {
  auto& s = shared_storage<GemmStorage>();
  const int t = static_cast<int>(threadIdx.x), steps = (k + tile_k - 1) / tile_k;
  const int m0 = static_cast<int>(blockIdx.y) * tile_m, n0 = static_cast<int>(blockIdx.x) * tile_n;
  if (t == 0) {
    for (int i = 0; i < stages; ++i) {
      mbarrier_init(&s.full[i], 1);
      mbarrier_init(&s.empty[i], 1);
    }
    fence_barrier_init();
  }
  __syncthreads();
  if (t < 128) {
    setmaxnreg_dec<40>();
    if (t == 0) {
      for (int i = 0; i < steps; ++i) {
        const int stage = i % stages;
        mbarrier_wait(&s.empty[stage], static_cast<uint32_t>(i / stages % 2) ^ 1);
        mbarrier_arrive_expect_tx(&s.full[stage], (tile_m + tile_n) * tile_k * 2);
        tma_load(s.a[stage], map_a, &s.full[stage], {i * tile_k, m0});
        tma_load(s.b[stage], map_b, &s.full[stage], {i * tile_k, n0});
      }
    }
    return;
  }
  setmaxnreg_inc<200>();
  float acc[tile_n / 2];
  for (int i = 0; i < steps; ++i) {
    const int stage = i % stages;
    mbarrier_wait(&s.full[stage], static_cast<uint32_t>(i / stages % 2));
    wgmma_fence();
    for (int kk = 0; kk < tile_k; kk += 16) {
      wgmma_m64k16<bf16, tile_n>(acc, smem_desc(&s.a[stage][0][kk], 16, 1024, Swizzle::b128),
                                 smem_desc(&s.b[stage][0][kk], 16, 1024, Swizzle::b128), i > 0 || kk > 0);
    }
    wgmma_commit();
    wgmma_wait<1>();
    if (i > 0 && t == 128) mbarrier_arrive(&s.empty[(i - 1) % stages]);  // the product before this one is done
  }
  wgmma_wait<0>();
  const int w = t - 128;
  for (int i = 0; i < tile_n / 2; ++i) {
    const int row = m0 + w / 32 * 16 + w % 32 / 4 + i / 2 % 2 * 8, column = n0 + i / 4 * 8 + w % 4 * 2 + i % 2;
    if (row < m && column < n) d[row * n + column] = acc[i];
  }
}
PYOPS_TEST(wgmma_pipeline) {
  constexpr int m = 100, n = 72, k = 328;
  Buffer<bf16> a("a", m * k, false), b("b", n * k, false);
  Buffer<float> d("d", m * n, true);
  a.fill([](size_t i) { return convert<bf16>(digit(i)); });
  b.fill([](size_t i) { return convert<bf16>(digit(i * 3 + 1)); });
  const TensorMap map_a =
      make_tensor_map(static_cast<const bf16*>(a.get()), {k, m}, {2, k * 2}, {tile_k, tile_m}, Swizzle::b128);
  const TensorMap map_b =
      make_tensor_map(static_cast<const bf16*>(b.get()), {k, n}, {2, k * 2}, {tile_k, tile_n}, Swizzle::b128);
  launch(multiply_pipelined, {.grid = dim3(2, 2), .block = 256, .smem = sizeof(GemmStorage)}, map_a, map_b, d.get(), m,
         n, k);
  test::synchronize();
  for (int i = 0; i < m * n; ++i) {
    float want = 0;
    for (int j = 0; j < k; ++j) {
      want +=
          convert<float>(a[static_cast<size_t>(i / n * k + j)]) * convert<float>(b[static_cast<size_t>(i % n * k + j)]);
    }
    PYOPS_EXPECT_EQUAL(d[static_cast<size_t>(i)], want, i);
  }
  return "";
}
