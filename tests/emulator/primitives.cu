// Every primitive of the vocabulary up to sm_80 against plain arithmetic.
#include "test.h"

using namespace pyops;
using test::Buffer;
using test::digit;

// launch and built-in variables

__global__ void write_index(int* out, int scale) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] =
      scale * static_cast<int>(block * 1000 + threadIdx.z * 100 + threadIdx.y * 10 + threadIdx.x);
}
PYOPS_TEST(launch_index) {
  Buffer<int> out("out", 2 * 3 * 2 * 4 * 3 * 2, true);
  launch(write_index, {.grid = dim3(2, 3, 2), .block = dim3(4, 3, 2)}, out.get(), 2);
  test::synchronize();
  for (size_t i = 0; i < out.size(); ++i) {
    const size_t block = i / 24, t = i % 24;
    PYOPS_EXPECT_EQUAL(out[i], 2 * (block * 1000 + t / 12 * 100 + t / 4 % 3 * 10 + t % 4), i);
  }
  return "";
}
PYOPS_TEST(launch_empty_grid) {
  launch(write_index, {.grid = 0, .block = 32}, nullptr, 1);
  return "";
}
PYOPS_TEST(launch_errors) {
  for (const LaunchConfig& config :
       {LaunchConfig{.grid = 1, .block = 2048}, {.grid = 1, .block = 32, .smem = 1 << 20}}) {
    bool thrown = false;
    try {
      launch(write_index, config, nullptr, 1);
    } catch (const std::runtime_error&) { thrown = true; }
    PYOPS_EXPECT(thrown);
  }
  return "";
}

// barriers and votes

struct ReverseStorage {
  int value[96];
};
__global__ void reverse_block(const int* in, int* out) {
  auto& s = shared_storage<ReverseStorage>();
  s.value[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = s.value[95 - threadIdx.x];
}
PYOPS_TEST(syncthreads) {
  Buffer<int> in("in", 96, false), out("out", 96, true);
  in.fill([](size_t i) { return static_cast<int>(i * i); });
  launch(reverse_block, {.grid = 1, .block = 96, .smem = sizeof(ReverseStorage)}, in.get(), out.get());
  test::synchronize();
  for (size_t i = 0; i < 96; ++i) PYOPS_EXPECT_EQUAL(out[i], in[95 - i], i);
  return "";
}

__global__ void vote_block(int* out) {
  const int t = static_cast<int>(threadIdx.x);
  const int count = __syncthreads_count(t % 3 == 0);
  const int all = __syncthreads_and(t < 100), any = __syncthreads_or(t == 99);
  out[t] = count * 4 + all * 2 + any;
}
PYOPS_TEST(syncthreads_votes) {
  Buffer<int> out("out", 64, true);
  launch(vote_block, {.grid = 1, .block = 64}, out.get());
  test::synchronize();
  for (size_t i = 0; i < 64; ++i) PYOPS_EXPECT_EQUAL(out[i], 22 * 4 + 2, i);
  return "";
}

struct ExchangeStorage {
  int value[128];
};
// Two pairs of warps meet at barriers of their own; the first two only arrive.
__global__ void exchange_named(int* out) {
  auto& s = shared_storage<ExchangeStorage>();
  const int t = static_cast<int>(threadIdx.x);
  if (t < 64) {
    s.value[t] = t * 3;
    named_barrier_arrive(1, 128);
  } else {
    named_barrier_sync(1, 128);
    s.value[t] = s.value[t - 64] + 1;
    named_barrier_sync(2, 64);
    out[t - 64] = s.value[64 + (t + 1) % 64];
  }
}
PYOPS_TEST(named_barriers) {
  Buffer<int> out("out", 64, true);
  launch(exchange_named, {.grid = 1, .block = 128, .smem = sizeof(ExchangeStorage)}, out.get());
  test::synchronize();
  for (size_t i = 0; i < 64; ++i) PYOPS_EXPECT_EQUAL(out[i], (i + 1) % 64 * 3 + 1, i);
  return "";
}

// warp collectives

__global__ void shuffle_all(int* out) {
  const int lane = static_cast<int>(threadIdx.x % 32), v = lane * 10;
  int* row = out + threadIdx.x * 6;
  row[0] = __shfl_sync(~0u, v, 5);
  row[1] = __shfl_xor_sync(~0u, v, 3);
  row[2] = __shfl_up_sync(~0u, v, 2);
  row[3] = __shfl_down_sync(~0u, v, 7);
  row[4] = __shfl_sync(~0u, v, 3, 8);
  row[5] = __shfl_down_sync(~0u, v, 1, 16);
}
PYOPS_TEST(shuffles) {
  Buffer<int> out("out", 64 * 6, true);
  launch(shuffle_all, {.grid = 1, .block = 64}, out.get());
  test::synchronize();
  for (int t = 0; t < 64; ++t) {
    const int lane = t % 32;
    const int want[6] = {5,
                         lane ^ 3,
                         lane < 2 ? lane : lane - 2,
                         lane + 7 > 31 ? lane : lane + 7,
                         lane / 8 * 8 + 3,
                         lane % 16 == 15 ? lane : lane + 1};
    for (int k = 0; k < 6; ++k) PYOPS_EXPECT_EQUAL(out[static_cast<size_t>(t * 6 + k)], want[k] * 10, t * 6 + k);
  }
  return "";
}
__global__ void shuffle_wide_types(double* d, long long* l) {
  const int lane = static_cast<int>(threadIdx.x);
  d[lane] = __shfl_xor_sync(~0u, lane * 0.5, 1);
  l[lane] = __shfl_sync(~0u, static_cast<long long>(lane) << 40, 31 - lane);
}
PYOPS_TEST(shuffle_types) {
  Buffer<double> d("d", 32, true);
  Buffer<long long> l("l", 32, true);
  launch(shuffle_wide_types, {.grid = 1, .block = 32}, d.get(), l.get());
  test::synchronize();
  for (size_t i = 0; i < 32; ++i) {
    PYOPS_EXPECT_EQUAL(d[i], static_cast<double>(i ^ 1) * 0.5, i);
    PYOPS_EXPECT_EQUAL(l[i] >> 40, 31 - i, i);
  }
  return "";
}
__global__ void vote_warp(unsigned* out) {
  const unsigned lane = threadIdx.x;
  unsigned* row = out + lane * 4;
  row[0] = __ballot_sync(~0u, lane % 5 == 0);
  row[1] = static_cast<unsigned>(__any_sync(~0u, lane == 9)) * 2 + static_cast<unsigned>(__all_sync(~0u, lane < 31));
  row[2] = __match_any_sync(~0u, lane / 8);
  // The two halves of the warp go their own ways.
  row[3] = lane < 16 ? __ballot_sync(0x0000ffffu, lane % 2) : __ballot_sync(0xffff0000u, lane % 4 == 0);
}
PYOPS_TEST(ballots) {
  Buffer<unsigned> out("out", 128, true);
  launch(vote_warp, {.grid = 1, .block = 32}, out.get());
  test::synchronize();
  for (size_t l = 0; l < 32; ++l) {
    PYOPS_EXPECT_EQUAL(out[l * 4], 0x42108421u, l);
    PYOPS_EXPECT_EQUAL(out[l * 4 + 1], 2, l);
    PYOPS_EXPECT_EQUAL(out[l * 4 + 2], 0xffu << (l / 8 * 8), l);
    PYOPS_EXPECT_EQUAL(out[l * 4 + 3], l < 16 ? 0xaaaau : 0x11110000u, l);
  }
  return "";
}
__global__ void reduce_warp(int* i, unsigned* u, float* f, double* d) {
  const int lane = static_cast<int>(threadIdx.x);
  i[lane * 3] = __reduce_add_sync(~0u, lane - 40);
  i[lane * 3 + 1] = __reduce_min_sync(~0u, lane * 3 % 7 - 9);
  i[lane * 3 + 2] = __reduce_max_sync(~0u, lane * 3 % 7 - 9);
  u[lane] = __reduce_or_sync(~0u, 1u << (lane / 2));
  f[lane * 3] = warp_sum(static_cast<float>(lane));
  f[lane * 3 + 1] = warp_max<8>(static_cast<float>(lane));
  f[lane * 3 + 2] = warp_min<4>(static_cast<float>(lane));
  d[lane] = warp_sum(lane * 0.25);
}
PYOPS_TEST(warp_reductions) {
  Buffer<int> i("i", 96, true);
  Buffer<unsigned> u("u", 32, true);
  Buffer<float> f("f", 96, true);
  Buffer<double> d("d", 32, true);
  launch(reduce_warp, {.grid = 1, .block = 32}, i.get(), u.get(), f.get(), d.get());
  test::synchronize();
  for (size_t l = 0; l < 32; ++l) {
    PYOPS_EXPECT_EQUAL(i[l * 3], 496 - 32 * 40, l);
    PYOPS_EXPECT_EQUAL(i[l * 3 + 1], -9, l);
    PYOPS_EXPECT_EQUAL(i[l * 3 + 2], -3, l);
    PYOPS_EXPECT_EQUAL(u[l], 0xffffu, l);
    PYOPS_EXPECT_EQUAL(f[l * 3], 496, l);
    PYOPS_EXPECT_EQUAL(f[l * 3 + 1], l / 8 * 8 + 7, l);
    PYOPS_EXPECT_EQUAL(f[l * 3 + 2], l / 4 * 4, l);
    PYOPS_EXPECT_EQUAL(d[l], 124, l);
  }
  return "";
}
struct BlockReduceStorage {
  BlockScratch<float> f;
  BlockScratch<double> d;
};
__global__ void reduce_block(float* out) {
  auto& s = shared_storage<BlockReduceStorage>();
  const float t = static_cast<float>(threadIdx.x);
  const float sum = block_sum(t, s.f), largest = block_max(-t, s.f);
  const double wide = block_sum(static_cast<double>(t) * 2, s.d);
  out[threadIdx.x * 3] = sum;
  out[threadIdx.x * 3 + 1] = largest;
  out[threadIdx.x * 3 + 2] = static_cast<float>(wide);
}
PYOPS_TEST(block_reductions) {
  for (const unsigned threads : {32u, 96u, 1024u}) {
    Buffer<float> out("out", threads * 3, true);
    launch(reduce_block, {.grid = 1, .block = threads, .smem = sizeof(BlockReduceStorage)}, out.get());
    test::synchronize();
    const float sum = static_cast<float>(threads * (threads - 1) / 2);
    for (size_t t = 0; t < threads; ++t) {
      PYOPS_EXPECT_EQUAL(out[t * 3], sum, t);
      PYOPS_EXPECT_EQUAL(out[t * 3 + 1], 0, t);
      PYOPS_EXPECT_EQUAL(out[t * 3 + 2], 2 * sum, t);
    }
  }
  return "";
}

// memory

template <class T, int N>
__global__ void copy_vectors(const T* in, T* out) {
  const size_t i = size_t(threadIdx.x) * N, n = size_t(blockDim.x) * N;
  store_vec(out + i, load_vec<N>(in + i));
  store_vec_streaming(out + n + i, load_vec_streaming<N>(in + i));
  store_vec(out + 2 * n + i, load_vec_readonly<N>(in + i));
}
template <class T, int N>
std::string check_vectors() {
  Buffer<T> in("in", 32 * N, false), out("out", 96 * N, true);
  in.fill([](size_t i) { return convert<T>(std::abs(digit(i))); });
  launch(copy_vectors<T, N>, {.grid = 1, .block = 32}, static_cast<const T*>(in.get()), out.get());
  test::synchronize();
  for (size_t i = 0; i < out.size(); ++i) PYOPS_EXPECT_EQUAL(convert<float>(out[i]), std::abs(digit(i % (32 * N))), i);
  test::forget_buffers();
  return "";
}
PYOPS_TEST(vector_accesses) {
  for (const auto& result : {check_vectors<float, 1>(), check_vectors<float, 4>(), check_vectors<float, 8>(),
                             check_vectors<double, 2>(), check_vectors<bf16, 8>(), check_vectors<bf16, 1>(),
                             check_vectors<fp16, 4>(), check_vectors<uint8_t, 16>(), check_vectors<uint8_t, 1>()}) {
    if (!result.empty()) return result;
  }
  return "";
}

__global__ void convert_all(const float* in, float* out) {
  const unsigned i = threadIdx.x;
  float* row = out + i * 6;
  row[0] = to_float(from_float<bf16>(in[i]));
  row[1] = to_float(from_float<fp16>(in[i]));
  row[2] = unpack2<bf16>(pack2<bf16>(in[i], 1.5f)).x + unpack2<bf16>(pack2<bf16>(in[i], 1.5f)).y;
  row[3] = unpack2<fp16>(pack2<fp16>(2.0f, in[i])).y;
  row[4] = __uint_as_float(to_tf32(in[i]));
  row[5] = static_cast<float>(from_acc<double>(to_acc(static_cast<double>(in[i]))));
}
PYOPS_TEST(conversions) {
  Buffer<float> in("in", 32, false), out("out", 32 * 6, true);
  in.fill([](size_t i) { return 1.0f + static_cast<float>(i) / 4096.0f; });
  launch(convert_all, {.grid = 1, .block = 32}, static_cast<const float*>(in.get()), out.get());
  test::synchronize();
  const auto rounded = [](float x, float steps) { return std::nearbyint(x * steps) / steps; };  // ties to even
  for (size_t i = 0; i < 32; ++i) {
    PYOPS_EXPECT_EQUAL(out[i * 6], rounded(in[i], 128), i);
    PYOPS_EXPECT_EQUAL(out[i * 6 + 1], rounded(in[i], 1024), i);
    PYOPS_EXPECT_EQUAL(out[i * 6 + 2], rounded(in[i], 128) + 1.5f, i);
    PYOPS_EXPECT_EQUAL(out[i * 6 + 3], rounded(in[i], 1024), i);
    PYOPS_EXPECT_EQUAL(out[i * 6 + 4], std::floor(in[i] * 1024 + 0.5f) / 1024, i);  // ties away from zero
    PYOPS_EXPECT_EQUAL(out[i * 6 + 5], in[i], i);
  }
  return "";
}

struct Counters {
  float f[4];
  double d;
  int i[3];
  unsigned u[3];
  unsigned long long ull;
  __half2 h2;
  __nv_bfloat162 b2;
  unsigned cas;
};
__global__ void count_atomically(Counters* c, float* vectors) {
  const int t = static_cast<int>(threadIdx.x);
  atomicAdd(&c->f[0], 1.0f);
  atomicAdd(&c->d, 0.5);
  atomicMax(&c->i[0], t);
  atomicMin(&c->i[1], -t);
  atomicAdd(&c->i[2], t);
  atomicOr(&c->u[0], 1u << (t % 32));
  atomicAnd(&c->u[1], ~(1u << (t % 32)));
  atomicXor(&c->u[2], 1u << (t % 31));
  atomicAdd(&c->ull, 1ull << 33);
  atomicAdd(&c->h2, __floats2half2_rn(1.0f, 2.0f));
  atomicAdd(&c->b2, __floats2bfloat162_rn(1.0f, -1.0f));
  unsigned old = 0, seen;
  while ((seen = atomicCAS(&c->cas, old, old + 2)) != old) old = seen;
  red_add_v4(vectors, {{1.0f, 2.0f, 3.0f, 4.0f}});
  red_add_v2(vectors + 4, {{5.0f, 6.0f}});
}
PYOPS_TEST(atomics) {
  Buffer<Counters> c("counters", 1, true);
  Buffer<float> vectors("vectors", 6, true);
  std::memset(static_cast<void*>(c.get()), 0, sizeof(Counters));
  c[0].u[1] = ~0u;
  vectors.fill([](size_t) { return 0.0f; });
  launch(count_atomically, {.grid = 2, .block = 64}, c.get(), vectors.get());
  test::synchronize();
  PYOPS_EXPECT_EQUAL(c[0].f[0], 128, 0);
  PYOPS_EXPECT_EQUAL(c[0].d, 64, 0);
  PYOPS_EXPECT_EQUAL(c[0].i[0], 63, 0);
  PYOPS_EXPECT_EQUAL(c[0].i[1], -63, 0);
  PYOPS_EXPECT_EQUAL(c[0].i[2], 2 * 2016, 0);
  PYOPS_EXPECT_EQUAL(c[0].u[0], ~0u, 0);
  PYOPS_EXPECT_EQUAL(c[0].u[1], 0, 0);
  PYOPS_EXPECT_EQUAL(c[0].u[2], 0, 0);
  PYOPS_EXPECT_EQUAL(c[0].ull >> 33, 128, 0);
  PYOPS_EXPECT_EQUAL(__half2float(c[0].h2.x), 128, 0);
  PYOPS_EXPECT_EQUAL(__half2float(c[0].h2.y), 256, 0);
  PYOPS_EXPECT_EQUAL(__bfloat162float(c[0].b2.x), 128, 0);
  PYOPS_EXPECT_EQUAL(__bfloat162float(c[0].b2.y), -128, 0);
  PYOPS_EXPECT_EQUAL(c[0].cas, 256, 0);
  for (size_t i = 0; i < 6; ++i) PYOPS_EXPECT_EQUAL(vectors[i], 128.0f * static_cast<float>(i + 1), i);
  return "";
}

// memory order between blocks

struct LastBlockStorage {
  bool last;
};
// The block that finishes last adds what all have written.
__global__ void sum_by_last_block(float* partial, unsigned* ticket, float* out) {
  auto& s = shared_storage<LastBlockStorage>();
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = static_cast<float>(blockIdx.x + 1);
    s.last = fetch_add_acq_rel(ticket, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (s.last && threadIdx.x == 0) {
    float sum = 0;
    for (unsigned b = 0; b < gridDim.x; ++b) sum += partial[b];
    *out = sum;
  }
}
// The same in the older spelling.
__global__ void sum_by_last_block_fenced(float* partial, unsigned* ticket, float* out) {
  auto& s = shared_storage<LastBlockStorage>();
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = static_cast<float>(blockIdx.x + 1);
    __threadfence();
    s.last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (s.last && threadIdx.x == 0) {
    float sum = 0;
    for (unsigned b = 0; b < gridDim.x; ++b) sum += partial[b];
    *out = sum;
  }
}
PYOPS_TEST(last_block_reduces) {
  for (const auto kernel : {sum_by_last_block, sum_by_last_block_fenced}) {
    Buffer<float> partial("partial", 7, true), out("out", 1, true);
    Buffer<unsigned> ticket("ticket", 1, true);
    ticket[0] = 0;
    launch(kernel, {.grid = 7, .block = 32, .smem = sizeof(LastBlockStorage)}, partial.get(), ticket.get(), out.get());
    test::synchronize();
    PYOPS_EXPECT_EQUAL(out[0], 28, 0);
    test::forget_buffers();
  }
  return "";
}

// Blocks of a cooperative grid pass a value on through a flag.
__global__ void relay(unsigned* flags, int* values) {
  if (threadIdx.x != 0) return;
  const unsigned b = blockIdx.x;
  if (b > 0) {
    while (load_acquire(flags + b - 1) == 0) {}
  }
  values[b] = b == 0 ? 1 : values[b - 1] * 3;
  store_release(flags + b, 1u);
}
PYOPS_TEST(acquire_release) {
  Buffer<unsigned> flags("flags", 4, true);
  Buffer<int> values("values", 4, true);
  flags.fill([](size_t) { return 0u; });
  launch(relay, {.grid = 4, .block = 32, .cooperative = true}, flags.get(), values.get());
  test::synchronize();
  PYOPS_EXPECT_EQUAL(values[3], 27, 3);
  return "";
}

__global__ void rotate_grid(unsigned* counter, int* values, int rounds) {
  const unsigned n = gridDim.x * blockDim.x, i = blockIdx.x * blockDim.x + threadIdx.x;
  values[i] = static_cast<int>(i);
  for (int r = 0; r < rounds; ++r) {
    grid_sync(counter);
    const int next = values[(i + 1) % n];
    grid_sync(counter);
    values[i] = next;
  }
}
PYOPS_TEST(grid_barrier) {
  Buffer<unsigned> counter("counter", 1, true);
  const auto threads = variant == 0 ? 64u : 256u;  // 1: an H100, a block on each multiprocessor
  const int fitting = max_cooperative_blocks(rotate_grid, static_cast<int>(threads), 0);
  const auto blocks = static_cast<unsigned>(std::min(variant == 0 ? 4 : 132, fitting));
  Buffer<int> values("values", blocks * threads, true);
  counter[0] = 0;
  launch(rotate_grid, {.grid = blocks, .block = threads, .cooperative = true}, counter.get(), values.get(), 3);
  test::synchronize();
  for (size_t i = 0; i < values.size(); ++i) PYOPS_EXPECT_EQUAL(values[i], (i + 3) % values.size(), i);
  return "";
}

// A frame of a kilobyte for each level: variant 1 needs more than the 64 KB of an emulated thread.
__device__ __attribute__((noinline)) int descend(int levels) {
  volatile int frame[256];
  for (int i = 0; i < 256; ++i) frame[i] = levels;
  return levels == 0 ? 0 : frame[levels % 256] + descend(levels - 1) - frame[0] + 1;
}
__global__ void depth_of_calls(int levels, int* out) { out[threadIdx.x] = descend(levels + threadIdx.x % 2); }
PYOPS_TEST(stack_depth) {
  Buffer<int> out("out", 32, true);
  launch(depth_of_calls, {.grid = 1, .block = 32}, variant == 0 ? 8 : 200, out.get());
  test::synchronize();
  for (size_t i = 0; i < 32; ++i) PYOPS_EXPECT_EQUAL(out[i], static_cast<int>(8 + i % 2), i);
  return "";
}

// random numbers: the known answers of the Philox paper's test vectors

__global__ void philox_kernel(uint32_t* out) {
  const auto a = philox4x32(0, 0, 0), b = philox4x32(~uint64_t(0), ~uint64_t(0), ~uint64_t(0));
  const auto c = philox4x32(0x299f31d0a4093822ull, 0x0370734413198a2eull, 0x85a308d3243f6a88ull);
  for (int i = 0; i < 4; ++i) {
    out[i] = a[i];
    out[4 + i] = b[i];
    out[8 + i] = c[i];
  }
}
PYOPS_TEST(philox) {
  Buffer<uint32_t> out("out", 12, true);
  launch(philox_kernel, {.grid = 1, .block = 1}, out.get());
  test::synchronize();
  const uint32_t want[12] = {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8, 0x408f276d, 0x41c83b0e,
                             0xa20bc7c6, 0x6d5451fd, 0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1};
  for (size_t i = 0; i < 12; ++i) PYOPS_EXPECT_EQUAL(out[i], want[i], i);
  PYOPS_EXPECT(uniform_from_bits(0) > 0.0f && uniform_from_bits(~0u) == 1.0f);
  return "";
}

// cp.async

struct CopyStorage {
  alignas(16) float wide[2][32][4];
  alignas(8) float middle[32][2];
  float narrow[32];
};
__global__ void copy_asynchronously(const float* in, float* out) {
  auto& s = shared_storage<CopyStorage>();
  const unsigned t = threadIdx.x;
  cp_async<16>(s.wide[0][t], in + t * 4);
  cp_async_commit();
  cp_async<16>(s.wide[1][t], in + t * 4, t % 2 == 0);
  cp_async<8>(s.middle[t], in + t * 2);
  cp_async<4>(&s.narrow[t], in + t, t != 5);
  cp_async_commit();
  cp_async_wait<1>();
  __syncthreads();
  const unsigned other = 31 - t;
  for (int i = 0; i < 4; ++i) out[t * 11 + i] = s.wide[0][other][i];
  cp_async_wait<0>();
  __syncthreads();
  for (int i = 0; i < 4; ++i) out[t * 11 + 4 + i] = s.wide[1][other][i];
  for (int i = 0; i < 2; ++i) out[t * 11 + 8 + i] = s.middle[other][i];
  out[t * 11 + 10] = s.narrow[other];
}
PYOPS_TEST(cp_async_copies) {
  Buffer<float> in("in", 128, false), out("out", 32 * 11, true);
  in.fill([](size_t i) { return static_cast<float>(i + 1); });
  launch(copy_asynchronously, {.grid = 1, .block = 32, .smem = sizeof(CopyStorage)},
         static_cast<const float*>(in.get()), out.get());
  test::synchronize();
  for (size_t t = 0; t < 32; ++t) {
    const size_t o = 31 - t;
    for (size_t i = 0; i < 4; ++i) {
      PYOPS_EXPECT_EQUAL(out[t * 11 + i], o * 4 + i + 1, t);
      PYOPS_EXPECT_EQUAL(out[t * 11 + 4 + i], o % 2 == 0 ? o * 4 + i + 1 : 0, t);
    }
    for (size_t i = 0; i < 2; ++i) PYOPS_EXPECT_EQUAL(out[t * 11 + 8 + i], o * 2 + i + 1, t);
    PYOPS_EXPECT_EQUAL(out[t * 11 + 10], o == 5 ? 0 : o + 1, t);
  }
  return "";
}

// matrix products: fragments by ldmatrix, the product by mma, against a triple loop

template <class T>
struct MatrixStorage {
  alignas(16) T a[16][16 + 8];
  alignas(16) T b_columns[8][16 + 8];  // b transposed: row n holds column n
  alignas(16) T b_rows[16][8];
};
template <class T>
__global__ void multiply_tile(const T* a, const T* b, float* d) {
  auto& s = shared_storage<MatrixStorage<T>>();
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 256; i += 32) s.a[i / 16][i % 16] = a[i];
  for (int i = lane; i < 128; i += 32) {
    s.b_columns[i % 8][i / 8] = b[i];
    s.b_rows[i / 8][i % 8] = b[i];
  }
  __syncwarp();
  uint32_t fa[4], fb[2], fb_trans[2], f1[1];
  ldmatrix_x4(fa, &s.a[lane % 16][lane / 16 * 8]);
  ldmatrix_x2(fb, &s.b_columns[lane % 8][lane / 8 % 2 * 8]);
  ldmatrix_x2_trans(fb_trans, &s.b_rows[lane % 16][0]);
  ldmatrix_x1(f1, &s.b_columns[lane % 8][0]);
  float c[4] = {1, 2, 3, 4}, c_trans[4] = {1, 2, 3, 4};
  mma_m16n8k16<T>(c, fa, fb);
  mma_m16n8k16<T>(c_trans, fa, fb_trans);
  for (int i = 0; i < 4; ++i) {
    const int at = (lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2;
    d[at] = c[i];
    d[128 + at] = c_trans[i];
  }
  d[256 + lane] = f1[0] == fb[0] ? 1.0f : 0.0f;
}
template <class T>
std::string check_mma() {
  Buffer<T> a("a", 256, false), b("b", 128, false);
  Buffer<float> d("d", 288, true);
  a.fill([](size_t i) { return convert<T>(digit(i)); });
  b.fill([](size_t i) { return convert<T>(digit(i * 5 + 3)); });
  launch(multiply_tile<T>, {.grid = 1, .block = 32, .smem = sizeof(MatrixStorage<T>)}, static_cast<const T*>(a.get()),
         static_cast<const T*>(b.get()), d.get());
  test::synchronize();
  for (size_t r = 0; r < 16; ++r) {
    for (size_t n = 0; n < 8; ++n) {
      float want = static_cast<float>(1 + r / 8 * 2 + n % 2);
      for (size_t k = 0; k < 16; ++k) want += convert<float>(a[r * 16 + k]) * convert<float>(b[k * 8 + n]);
      PYOPS_EXPECT_EQUAL(d[r * 8 + n], want, r * 8 + n);
      PYOPS_EXPECT_EQUAL(d[128 + r * 8 + n], want, r * 8 + n);
    }
  }
  for (size_t l = 0; l < 32; ++l) PYOPS_EXPECT_EQUAL(d[256 + l], 1, l);
  test::forget_buffers();
  return "";
}
PYOPS_TEST(mma_bf16_ldmatrix) { return check_mma<bf16>(); }
PYOPS_TEST(mma_fp16_ldmatrix) { return check_mma<fp16>(); }

__global__ void multiply_tf32(const float* a, const float* b, float* d) {
  const int lane = static_cast<int>(threadIdx.x), group = lane / 4, q = lane % 4;
  uint32_t fa[4], fb[2];
  for (int i = 0; i < 4; ++i) fa[i] = to_tf32(a[(group + i % 2 * 8) * 8 + q + i / 2 * 4]);
  for (int i = 0; i < 2; ++i) fb[i] = to_tf32(b[(q + i * 4) * 8 + group]);
  float c[4] = {};
  mma_m16n8k8_tf32(c, fa, fb);
  for (int i = 0; i < 4; ++i) d[(group + i / 2 * 8) * 8 + q * 2 + i % 2] = c[i];
}
PYOPS_TEST(mma_tf32) {
  Buffer<float> a("a", 128, false), b("b", 64, false), d("d", 128, true);
  a.fill(digit);
  b.fill([](size_t i) { return digit(i * 3 + 1); });
  launch(multiply_tf32, {.grid = 1, .block = 32}, static_cast<const float*>(a.get()),
         static_cast<const float*>(b.get()), d.get());
  test::synchronize();
  for (size_t i = 0; i < 128; ++i) {
    float want = 0;
    for (size_t k = 0; k < 8; ++k) want += a[i / 8 * 8 + k] * b[k * 8 + i % 8];
    PYOPS_EXPECT_EQUAL(d[i], want, i);
  }
  return "";
}

// questions about the device; variant: its capability, where the caller has chosen one

PYOPS_TEST(device_questions) {
  const int capability = compute_capability(), kilobytes = shared_memory_limit() >> 10;
  PYOPS_EXPECT(capability >= 80 && (variant == 0 || variant == capability));
  PYOPS_EXPECT(multiprocessor_count() >= 1);
  if (capability == 80) PYOPS_EXPECT_EQUAL(kilobytes, 163, 0);
  if (capability == 90) PYOPS_EXPECT_EQUAL(kilobytes, 227, 0);
  if (capability == 86 || capability == 89 || capability == 120) PYOPS_EXPECT_EQUAL(kilobytes, 99, 0);
  return "";
}

// integer and float intrinsics

__global__ void bit_intrinsics(unsigned* out, float* f) {
  out[0] = static_cast<unsigned>(__popc(0xf0f0u));
  out[1] = static_cast<unsigned>(__ffs(0x40));
  out[2] = static_cast<unsigned>(__clz(1));
  out[3] = __brev(1u);
  out[4] = __byte_perm(0x33221100u, 0x77665544u, 0x7531u);
  out[5] = __umulhi(0x80000000u, 6u);
  out[6] = __funnelshift_l(0x80000000u, 1u, 1);
  f[0] = rsqrtf(4.0f);
  f[1] = __fmaf_rn(2.0f, 3.0f, 1.0f);
  f[2] = max(1.0f, 2.0f) + static_cast<float>(min(3, 4));
  f[3] = exp2_approx(3.0f);
  f[4] = __saturatef(2.0f);
}
PYOPS_TEST(intrinsics) {
  Buffer<unsigned> out("out", 7, true);
  Buffer<float> f("f", 5, true);
  launch(bit_intrinsics, {.grid = 1, .block = 1}, out.get(), f.get());
  test::synchronize();
  const unsigned want[7] = {8, 7, 31, 0x80000000u, 0x77553311u, 3, 3};
  const float want_f[5] = {0.5f, 7, 5, 8, 1};
  for (size_t i = 0; i < 7; ++i) PYOPS_EXPECT_EQUAL(out[i], want[i], i);
  for (size_t i = 0; i < 5; ++i) PYOPS_EXPECT_EQUAL(f[i], want_f[i], i);
  return "";
}
