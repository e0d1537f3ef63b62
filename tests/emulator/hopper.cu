// Clusters, mbarriers, TMA, stmatrix (sm_90) against plain arithmetic.
#include "test.h"

using namespace pyops;
using test::Buffer;
using test::digit;

// clusters

struct ClusterStorage {
  int value[64];
};
// What the blocks of the cluster hold for the thread opposite, ten times, and this block's rank.
__device__ int sum_of_cluster(const int* in) {
  auto& s = shared_storage<ClusterStorage>();
  const unsigned t = threadIdx.x;
  s.value[t] = in[blockIdx.x * 64 + t];
  cluster_sync();
  int sum = 0;
  for (unsigned r = 0; r < cluster_size(); ++r) sum += cluster_map(s.value, r)[63 - t];
  return sum * 10 + static_cast<int>(cluster_rank());
}
__global__ void sum_cluster(const int* in, int* out) {
  out[blockIdx.x * 64 + threadIdx.x] = sum_of_cluster(in);
  cluster_arrive();  // no block leaves while others read its memory
  cluster_wait();
}
PYOPS_TEST(cluster_shared_memory) {
  Buffer<int> in("in", 8 * 64, false), out("out", 8 * 64, true);
  in.fill([](size_t i) { return static_cast<int>(i); });
  launch(sum_cluster, {.grid = 8, .block = 64, .smem = sizeof(ClusterStorage), .cluster = 4},
         static_cast<const int*>(in.get()), out.get());
  test::synchronize();
  for (size_t i = 0; i < 512; ++i) {
    int want = 0;
    for (size_t r = 0; r < 4; ++r) want += in[i / 256 * 256 + r * 64 + 63 - i % 64];
    PYOPS_EXPECT_EQUAL(out[i], want * 10 + static_cast<int>(i / 64 % 4), i);
  }
  return "";
}

// A cooperative grid of clusters: they meet each on its own, and then all of them.
__global__ void sum_grid_of_clusters(const int* in, int* sums, int* out, unsigned* counter) {
  sums[blockIdx.x * 64 + threadIdx.x] = sum_of_cluster(in);
  grid_sync(counter);
  out[blockIdx.x * 64 + threadIdx.x] = sums[(gridDim.x - 1 - blockIdx.x) * 64 + threadIdx.x];
}
PYOPS_TEST(cooperative_grid_of_clusters) {
  Buffer<int> in("in", 256, false), sums("sums", 256, true), out("out", 256, true);
  Buffer<unsigned> counter("counter", 1, true);
  in.fill([](size_t i) { return static_cast<int>(i); });
  counter.fill([](size_t) { return 0u; });
  PYOPS_EXPECT_EQUAL(max_cooperative_blocks(sum_grid_of_clusters, 64, sizeof(ClusterStorage), 2) % 2, 0, 0);
  launch(sum_grid_of_clusters,
         {.grid = 4, .block = 64, .smem = sizeof(ClusterStorage), .cluster = 2, .cooperative = true},
         static_cast<const int*>(in.get()), sums.get(), out.get(), counter.get());
  test::synchronize();
  for (size_t i = 0; i < 256; ++i) {
    const size_t block = 3 - i / 64;
    int want = 0;
    for (size_t r = 0; r < 2; ++r) want += in[(block / 2 * 2 + r) * 64 + 63 - i % 64];
    PYOPS_EXPECT_EQUAL(out[i], want * 10 + static_cast<int>(block % 2), i);
  }
  return "";
}

// mbarriers

struct PipelineStorage {
  int slot[2];
  uint64_t full[2], empty[2];
};
// Warp 0 produces numbers through a ring of two slots, warp 1 consumes them.
__global__ void pass_through_ring(int* out, int n, bool polling) {
  auto& s = shared_storage<PipelineStorage>();
  const unsigned lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(&s.full[i], 1);
      mbarrier_init(&s.empty[i], 32);
    }
    fence_barrier_init();
  }
  __syncthreads();
  for (int i = 0; i < n; ++i) {
    const int slot = i % 2;
    const uint32_t phase = static_cast<uint32_t>(i / 2 % 2);
    if (threadIdx.x < 32) {
      if (lane != 0) continue;  // a lane that only waits could fall two phases behind, and then wait for ever
      mbarrier_wait(&s.empty[slot], phase ^ 1);
      s.slot[slot] = i * i;
      mbarrier_arrive(&s.full[slot]);
    } else {
      if (polling) {
        while (!mbarrier_try_wait(&s.full[slot], phase)) {}
      } else {
        mbarrier_wait(&s.full[slot], phase);
      }
      out[i * 32 + static_cast<int>(lane)] = s.slot[slot];
      mbarrier_arrive(&s.empty[slot]);
    }
  }
}
PYOPS_TEST(mbarrier_ring) {
  for (const bool polling : {false, true}) {
    Buffer<int> out("out", 9 * 32, true);
    launch(pass_through_ring, {.grid = 1, .block = 64, .smem = sizeof(PipelineStorage)}, out.get(), 9, polling);
    test::synchronize();
    for (size_t i = 0; i < out.size(); ++i) PYOPS_EXPECT_EQUAL(out[i], i / 32 * (i / 32), i);
    test::forget_buffers();
  }
  return "";
}
struct RemoteStorage {
  int value;
  uint64_t bar;
};
__global__ void arrive_remotely(int* out) {
  auto& s = shared_storage<RemoteStorage>();
  if (threadIdx.x == 0) {
    mbarrier_init(&s.bar, cluster_size());
    fence_barrier_init();
  }
  cluster_sync();
  if (threadIdx.x == 0) {
    if (cluster_rank() == 1) *cluster_map(&s.value, 0) = 42;
    mbarrier_arrive_remote(&s.bar, 0);
  }
  if (cluster_rank() == 0) {
    mbarrier_wait(&s.bar, 0);
    out[threadIdx.x] = s.value;
  }
  cluster_sync();
}
PYOPS_TEST(mbarrier_remote_arrive) {
  Buffer<int> out("out", 32, true);
  launch(arrive_remotely, {.grid = 2, .block = 32, .smem = sizeof(RemoteStorage), .cluster = 2}, out.get());
  test::synchronize();
  for (size_t i = 0; i < 32; ++i) PYOPS_EXPECT_EQUAL(out[i], 42, i);
  return "";
}

// TMA: one tile of each rank, straight from shared memory to the output, so that the swizzle is visible

template <int Bytes>
struct TileStorage {
  alignas(1024) unsigned char tile[Bytes];
  alignas(8) uint64_t bar;
};
// Where byte `offset` of a dense box stands under a swizzle: 16-byte chunks are permuted within their row of 128 bytes.
size_t swizzle_by_definition(size_t offset, Swizzle swizzle) {
  const size_t chunk = offset / 16 % 8, row = offset / 128;
  const size_t mask = swizzle == Swizzle::b128  ? row % 8
                      : swizzle == Swizzle::b64 ? row % 4
                      : swizzle == Swizzle::b32 ? row % 2
                                                : 0;
  return offset / 128 * 128 + (chunk ^ mask) * 16 + offset % 16;
}

template <int Rank>
struct Coordinates {
  int at[Rank];
};
template <int Bytes, int Rank>
__global__ void load_tile(const __grid_constant__ TensorMap map, Coordinates<Rank> c, unsigned char* out) {
  auto& s = shared_storage<TileStorage<Bytes>>();
  if (threadIdx.x == 0) {
    mbarrier_init(&s.bar, 1);
    fence_barrier_init();
    tma_prefetch(map);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(&s.bar, Bytes);
    tma_load(s.tile, map, &s.bar, c.at);
  }
  mbarrier_wait(&s.bar, 0);
  for (int i = static_cast<int>(threadIdx.x); i < Bytes; i += 64) out[i] = s.tile[i];
}

template <int Rank, int Bytes>
std::string check_tile(const uint64_t (&shape)[Rank], const uint32_t (&box)[Rank], const Coordinates<Rank>& c,
                       Swizzle swizzle) {
  size_t elements = 1;
  uint64_t stride[Rank];
  for (int i = 0; i < Rank; ++i) {
    stride[i] = i == 0 ? 4 : i == 1 ? (shape[0] * 4 + 15) / 16 * 16 : stride[i - 1] * shape[i - 1];
  }
  elements = stride[Rank - 1] * (Rank == 1 ? shape[0] : shape[Rank - 1]) / 4;
  Buffer<float> in("in", elements, false);
  Buffer<unsigned char> out("out", Bytes, true);
  in.fill([](size_t i) { return static_cast<float>(i + 1); });
  const TensorMap map = make_tensor_map(static_cast<const float*>(in.get()), shape, stride, box, swizzle);
  launch(load_tile<Bytes, Rank>, {.grid = 1, .block = 64, .smem = sizeof(TileStorage<Bytes>)}, map, c, out.get());
  test::synchronize();
  for (size_t i = 0; i < Bytes / 4; ++i) {
    size_t rest = i, at = 0;
    bool inside = true;
    for (int d = 0; d < Rank; ++d) {
      const int64_t p = c.at[d] + static_cast<int64_t>(rest % box[d]);
      rest /= box[d];
      inside = inside && p >= 0 && p < static_cast<int64_t>(shape[d]);
      at += static_cast<size_t>(p) * stride[d] / 4;
    }
    float got;
    std::memcpy(&got, out.get() + swizzle_by_definition(i * 4, swizzle), 4);
    PYOPS_EXPECT_EQUAL(got, inside ? static_cast<float>(at + 1) : 0.0f, i);
  }
  test::forget_buffers();
  return "";
}
PYOPS_TEST(tma_load_ranks) {
  const std::string results[] = {
      check_tile<1, 256>({100}, {64}, {{60}}, Swizzle::none),
      check_tile<2, 2048>({40, 20}, {32, 16}, {{16, 8}}, Swizzle::none),
      check_tile<2, 2048>({40, 20}, {32, 16}, {{-8, -3}}, Swizzle::b128),
      check_tile<2, 1024>({33, 20}, {16, 16}, {{20, 1}}, Swizzle::b64),
      check_tile<2, 512>({33, 20}, {8, 16}, {{28, 5}}, Swizzle::b32),
      check_tile<3, 1024>({20, 7, 5}, {16, 4, 4}, {{8, -1, 3}}, Swizzle::b64),
      check_tile<4, 2048>({20, 7, 5, 3}, {16, 4, 4, 2}, {{0, 5, -2, 2}}, Swizzle::none),
      check_tile<5, 4096>({20, 7, 5, 3, 2}, {16, 4, 4, 2, 2}, {{-4, 2, 3, 1, 1}}, Swizzle::b64)};
  for (const auto& result : results) {
    if (!result.empty()) return result;
  }
  return "";
}

struct MulticastStorage {
  alignas(1024) float tile[2][16][32];
  uint64_t bar;
};
// Each of two blocks loads half of the tile for both.
__global__ void load_multicast(const __grid_constant__ TensorMap map, float* out) {
  auto& s = shared_storage<MulticastStorage>();
  if (threadIdx.x == 0) {
    mbarrier_init(&s.bar, 1);
    fence_barrier_init();
    mbarrier_arrive_expect_tx(&s.bar, sizeof s.tile);
  }
  cluster_sync();
  const int rank = static_cast<int>(cluster_rank());
  if (threadIdx.x == 0) tma_load_multicast(s.tile[rank], map, &s.bar, {0, rank * 16}, 3);
  mbarrier_wait(&s.bar, 0);
  for (int i = static_cast<int>(threadIdx.x); i < 1024; i += 64)
    out[rank * 1024 + i] = s.tile[i / 512][i / 32 % 16][i % 32];
  cluster_sync();
}
PYOPS_TEST(tma_multicast) {
  Buffer<float> in("in", 1024, false), out("out", 2048, true);
  in.fill([](size_t i) { return static_cast<float>(i); });
  const TensorMap map =
      make_tensor_map(static_cast<const float*>(in.get()), {32, 32}, {4, 128}, {32, 16}, Swizzle::none);
  launch(load_multicast, {.grid = 2, .block = 64, .smem = sizeof(MulticastStorage), .cluster = 2}, map, out.get());
  test::synchronize();
  for (size_t i = 0; i < 2048; ++i) PYOPS_EXPECT_EQUAL(out[i], i % 1024, i);
  return "";
}

// im2col: the columns of a 3x3 convolution, against the definition

struct Im2colStorage {
  alignas(1024) float columns[20][8];
  uint64_t bar;
};
__global__ void load_columns(const __grid_constant__ TensorMap map, int w, int h, int n, int s0, int r0, float* out) {
  auto& s = shared_storage<Im2colStorage>();
  if (threadIdx.x == 0) {
    mbarrier_init(&s.bar, 1);
    fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(&s.bar, sizeof s.columns);
    const int coords[4] = {0, w, h, n};
    const uint16_t offsets[2] = {static_cast<uint16_t>(s0), static_cast<uint16_t>(r0)};
    tma_load_im2col(s.columns, map, &s.bar, coords, offsets);
  }
  mbarrier_wait(&s.bar, 0);
  for (int i = static_cast<int>(threadIdx.x); i < 160; i += 32) out[i] = s.columns[i / 8][i % 8];
}
PYOPS_TEST(tma_im2col) {
  constexpr int C = 8, W = 7, H = 5, N = 2, pad = 1, filter = 3;
  for (const int stride : {1, 2}) {
    Buffer<float> in("in", C * W * H * N, false), out("out", 160, true);
    in.fill([](size_t i) { return static_cast<float>(i + 1); });
    // Base pixels run from -pad to the last position at which the filter still fits.
    const int upper = pad - (filter - 1);
    const TensorMap map = make_tensor_map_im2col(
        static_cast<const float*>(in.get()), {C, W, H, N}, {4, C * 4, C * W * 4, C * W * H * 4},
        Im2col{{-pad, -pad}, {upper, upper}, 8, 20, {static_cast<unsigned>(stride), static_cast<unsigned>(stride)}},
        Swizzle::none);
    const int Q = (W + 2 * pad - filter) / stride + 1, P = (H + 2 * pad - filter) / stride + 1;
    for (int start = 0; start < P * Q * N; start += 20) {
      const int q0 = start % Q, p0 = start / Q % P, n0 = start / (Q * P);
      for (int r = 0; r < filter; ++r) {
        const int s = (r + 1) % filter;
        launch(load_columns, {.grid = 1, .block = 32, .smem = sizeof(Im2colStorage)}, map, q0 * stride - pad,
               p0 * stride - pad, n0, s, r, out.get());
        test::synchronize();
        for (int i = 0; i < 160; ++i) {
          const int pixel = start + i / 8, n = pixel / (Q * P);
          const int w = pixel % Q * stride - pad + s, h = pixel / Q % P * stride - pad + r;
          const bool inside = n < N && w >= 0 && w < W && h >= 0 && h < H;
          PYOPS_EXPECT_EQUAL(out[static_cast<size_t>(i)], inside ? ((n * H + h) * W + w) * C + i % 8 + 1 : 0, i);
        }
      }
    }
    test::forget_buffers();
  }
  return "";
}

// What convolution loads besides images: row `row` of one tap of filters [rows, taps, channels], and lines of a matrix

struct FilterStorage {
  alignas(1024) float tile[16][32];
  uint64_t bar;
};
__global__ void load_filters(const __grid_constant__ TensorMap map, int c, int w, int n, int tap, float* out) {
  auto& s = shared_storage<FilterStorage>();
  if (threadIdx.x == 0) {
    mbarrier_init(&s.bar, 1);
    fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(&s.bar, sizeof s.tile);
    tma_load_im2col(s.tile, map, &s.bar, {c, w, n}, {static_cast<uint16_t>(tap)});
  }
  mbarrier_wait(&s.bar, 0);
  for (int i = static_cast<int>(threadIdx.x); i < 512; i += 32)
    out[i] = s.tile[i / 32][(i % 32 / 4 ^ i / 32 % 8) * 4 + i % 4];
}
PYOPS_TEST(tma_im2col_filters) {
  constexpr int channels = 44, taps = 5, rows = 19;
  Buffer<float> in("in", channels * taps * rows, false), out("out", 512, true);
  in.fill([](size_t i) { return static_cast<float>(i + 1); });
  const auto* data = static_cast<const float*>(in.get());
  // A box one tap wide: the next pixel is the same tap of the next row.
  const TensorMap filters = make_tensor_map_im2col(data, {channels, taps, rows}, {4, channels * 4, channels * taps * 4},
                                                   Im2col{{0}, {1 - taps}, 32, 16, {1}}, Swizzle::b128);
  const TensorMap matrix =
      make_tensor_map_im2col(data, {channels, taps * rows, 1}, {4, channels * 4, channels * taps * rows * 4},
                             Im2col{{0}, {0}, 32, 16, {1}}, Swizzle::b128);
  for (const int c : {0, 32, 64}) {  // the last channels lie outside in part, then altogether
    for (const int first : {0, 8}) {
      for (const bool lines : {false, true}) {
        const int tap = lines ? 0 : 3, row = lines ? taps * rows - 11 + first : first;
        launch(load_filters, {.grid = 1, .block = 32, .smem = sizeof(FilterStorage)}, lines ? matrix : filters, c,
               lines ? row : 0, lines ? 0 : row, tap, out.get());
        test::synchronize();
        for (int i = 0; i < 512; ++i) {
          const int line = lines ? row + i / 32 : (row + i / 32) * taps + tap;
          const bool inside = line < taps * rows && c + i % 32 < channels;
          PYOPS_EXPECT_EQUAL(out[static_cast<size_t>(i)], inside ? line * channels + c + i % 32 + 1 : 0, i);
        }
      }
    }
  }
  return "";
}

// A volume, whose steps and padding differ by side.
struct VolumeStorage {
  alignas(1024) float columns[40][8];
  uint64_t bar;
};
__global__ void load_volume(const __grid_constant__ TensorMap map, int w, int h, int d, int tap_w, int tap_d,
                            float* out) {
  auto& s = shared_storage<VolumeStorage>();
  if (threadIdx.x == 0) {
    mbarrier_init(&s.bar, 1);
    fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(&s.bar, sizeof s.columns);
    tma_load_im2col(s.columns, map, &s.bar, {0, w, h, d, 0},
                    {static_cast<uint16_t>(tap_w), uint16_t(0), static_cast<uint16_t>(tap_d)});
  }
  mbarrier_wait(&s.bar, 0);
  for (int i = static_cast<int>(threadIdx.x); i < 320; i += 32) out[i] = s.columns[i / 8][i % 8];
}
PYOPS_TEST(tma_im2col_volume) {
  // sides W, H, D: outputs, first position, step
  constexpr int C = 8, W = 6, H = 4, D = 5, N = 2, Q = 3, P = 4, O = 4, w0 = -1, h0 = 0, d0 = -2, step = 2;
  Buffer<float> in("in", C * W * H * D * N, false), out("out", 320, true);
  in.fill([](size_t i) { return static_cast<float>(i + 1); });
  const TensorMap map = make_tensor_map_im2col(
      static_cast<const float*>(in.get()), {C, W, H, D, N}, {4, C * 4, C * W * 4, C * W * H * 4, C * W * H * D * 4},
      Im2col{{w0, h0, d0}, {w0 + (Q - 1) * step + 1 - W, h0 + P - H, d0 + O - D}, C, 40, {step, 1, 1}}, Swizzle::b32);
  for (const int tap_w : {0, 2}) {
    for (const int tap_d : {0, 4}) {
      for (const int start : {0, 17}) {
        launch(load_volume, {.grid = 1, .block = 32, .smem = sizeof(VolumeStorage)}, map, w0 + start % Q * step,
               h0 + start / Q % P, d0 + start / (Q * P), tap_w, tap_d, out.get());
        test::synchronize();
        for (int i = 0; i < 320; ++i) {
          const int pixel = start + i / 8, n = pixel / (Q * P * O);
          const int w = w0 + pixel % Q * step + tap_w, h = h0 + pixel / Q % P, d = d0 + pixel / (Q * P) % O + tap_d;
          const bool inside = n < N && w >= 0 && w < W && h >= 0 && h < H && d >= 0 && d < D;
          const int c = (i % 8 / 4 ^ i / 32 % 2) * 4 + i % 4;  // 32-byte swizzle
          PYOPS_EXPECT_EQUAL(out[static_cast<size_t>(i)], inside ? (((n * D + d) * H + h) * W + w) * C + c + 1 : 0, i);
        }
      }
    }
  }
  return "";
}

// stores

struct StoreStorage {
  alignas(1024) float tile[16][32];
};
__global__ void store_tile(const __grid_constant__ TensorMap map, int x, int y, bool add) {
  auto& s = shared_storage<StoreStorage>();
  for (int i = static_cast<int>(threadIdx.x); i < 512; i += 64) {
    const int row = i / 32, chunk = i % 32 / 4;
    s.tile[row][(chunk ^ row % 8) * 4 + i % 4] = static_cast<float>(i + 1);  // the 128-byte swizzle by hand
  }
  fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    if (add) {
      tma_reduce_add(map, s.tile, {x, y});
    } else {
      tma_store(map, s.tile, {x, y});
    }
    tma_store_commit();
    tma_store_wait_read<0>();
  }
}
PYOPS_TEST(tma_stores) {
  for (const bool add : {false, true}) {
    Buffer<float> out("out", 36 * 20, true);
    out.fill([](size_t) { return 0.5f; });
    const TensorMap map =
        make_tensor_map(static_cast<const float*>(out.get()), {36, 20}, {4, 144}, {32, 16}, Swizzle::b128);
    launch(store_tile, {.grid = 3, .block = 64, .smem = sizeof(StoreStorage)}, map, 12, -2, true);
    if (!add) launch(store_tile, {.grid = 1, .block = 64, .smem = sizeof(StoreStorage)}, map, 12, -2, false);
    test::synchronize();
    for (int i = 0; i < 720; ++i) {
      const int c = i % 36 - 12, r = i / 36 + 2;
      const bool inside = c >= 0 && r < 16;
      const float stored = static_cast<float>(r * 32 + c + 1);
      PYOPS_EXPECT_EQUAL(out[static_cast<size_t>(i)], !inside ? 0.5f : add ? 0.5f + 3 * stored : stored, i);
    }
    test::forget_buffers();
  }
  return "";
}

struct BulkStorage {
  alignas(128) float line[256];
  uint64_t bar;
};
__global__ void copy_bulk(const float* in, float* out) {
  auto& s = shared_storage<BulkStorage>();
  if (threadIdx.x == 0) {
    mbarrier_init(&s.bar, 1);
    fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(&s.bar, 1024);
    bulk_load(s.line, in, 1024, &s.bar);
  }
  mbarrier_wait(&s.bar, 0);
  for (int i = static_cast<int>(threadIdx.x); i < 256; i += 32) s.line[i] *= 2.0f;
  fence_proxy_async();
  __syncthreads();
  if (elect_one()) {
    bulk_store(out, s.line, 1024);
    tma_store_commit();
    tma_store_wait<0>();
  }
}
PYOPS_TEST(bulk_copies) {
  Buffer<float> in("in", 256, false), out("out", 256, true);
  in.fill(digit);
  launch(copy_bulk, {.grid = 1, .block = 32, .smem = sizeof(BulkStorage)}, static_cast<const float*>(in.get()),
         out.get());
  test::synchronize();
  for (size_t i = 0; i < 256; ++i) PYOPS_EXPECT_EQUAL(out[i], 2 * in[i], i);
  return "";
}

// stmatrix is the inverse of ldmatrix

struct StmatrixStorage {
  alignas(16) uint16_t source[32][8], straight[32][8], transposed[32][8], half[16][8];
};
__global__ void store_fragments(uint16_t* out) {
  auto& s = shared_storage<StmatrixStorage>();
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = 0; i < 8; ++i) s.source[lane][i] = static_cast<uint16_t>(lane * 8 + i);
  __syncwarp();
  uint32_t r[4], r2[2], r1[1];
  ldmatrix_x4(r, s.source[lane]);
  ldmatrix_x2(r2, s.source[lane % 16]);
  ldmatrix_x1(r1, s.source[lane % 8]);
  stmatrix_x4(s.straight[lane], r);
  stmatrix_x4_trans(s.transposed[lane], r);
  stmatrix_x2(s.half[lane % 16], r2);
  __syncwarp();
  stmatrix_x1(s.half[lane % 8], r1);
  __syncwarp();
  for (int i = 0; i < 8; ++i) {
    out[lane * 8 + i] = s.straight[lane][i];
    out[256 + lane * 8 + i] = s.transposed[lane][i];
    if (lane < 16) out[512 + lane * 8 + i] = s.half[lane][i];
  }
}
PYOPS_TEST(stmatrix) {
  Buffer<uint16_t> out("out", 640, true);
  launch(store_fragments, {.grid = 1, .block = 32, .smem = sizeof(StmatrixStorage)}, out.get());
  test::synchronize();
  for (size_t i = 0; i < 256; ++i) {
    PYOPS_EXPECT_EQUAL(out[i], i, i);
    PYOPS_EXPECT_EQUAL(out[256 + i], i / 64 * 64 + i % 8 * 8 + i / 8 % 8, i);
    if (i < 128) PYOPS_EXPECT_EQUAL(out[512 + i], i, i);
  }
  return "";
}
