// Measured ceilings of this machine: the roof that the benchmarks hold kernels against.
// copy     bytes read + bytes written per second, buffers far larger than the last cache
// fma      2 flop per lane of each fused multiply-add, operands in registers
// Each figure is the best of many short runs: the ceiling is what the machine can do when nothing disturbs it.

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "host/host.h"

namespace pyops::host {
namespace {

// Steps of each chain in one timed run: about half a millisecond, long against a barrier, short against a time slice.
constexpr int64_t kFmaSteps = 200'000;

// Shortest time in which all threads finish run(thread), over at least three runs and about `budget` seconds. The
// threads start together and the slowest one counts, so that no thread is measured while another one waits.
template <class F>
double best_seconds(int threads, double budget, const F& run) {
  using clock = std::chrono::steady_clock;
  const auto seconds = [](clock::duration d) { return std::chrono::duration<double>(d).count(); };
  std::barrier line(threads);
  bool done = false;  // written before a barrier, read after it
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) {
    others.emplace_back([&, thread] {
      for (;;) {
        line.arrive_and_wait();
        if (done) return;
        run(thread);
        line.arrive_and_wait();
      }
    });
  }
  const auto start = clock::now();
  double best = 1e30;
  for (int runs = 0; runs < 3 || seconds(clock::now() - start) < budget; ++runs) {
    line.arrive_and_wait();
    const auto begin = clock::now();
    run(0);
    line.arrive_and_wait();
    best = std::min(best, seconds(clock::now() - begin));
  }
  done = true;
  line.arrive_and_wait();
  for (std::thread& other : others) other.join();
  return best;
}

// The result goes where no optimiser looks away from it. The chains themselves need no guard: each step depends on the
// one before, and floating point may not be reassociated.
volatile float sink;

typedef float Vector128 __attribute__((vector_size(16)));

// Four lanes through the compiler's own vectors: what every CPU of this architecture runs. Where it has no fused
// multiply-add (baseline x86-64), a multiplication and an addition stand for it.
template <int CHAINS>
void fma_baseline(int64_t steps) {
  const Vector128 scale = {0.999f, 0.999f, 0.999f, 0.999f}, shift = {0.001f, 0.001f, 0.001f, 0.001f};
  Vector128 sum[CHAINS];
  for (int i = 0; i < CHAINS; ++i) sum[i] = scale * (1.0f + 0.01f * static_cast<float>(i));
  for (int64_t step = 0; step < steps; ++step) {
    for (int i = 0; i < CHAINS; ++i) sum[i] = sum[i] * scale + shift;
  }
  for (int i = 0; i < CHAINS; ++i) sink = sum[i][0];
}

#if defined(__x86_64__)
// An FMA takes 4 cycles and two start per cycle: 8 independent chains saturate, 12 leave slack within 16 registers.
template <int CHAINS>
__attribute__((target("avx512f"))) void fma_avx512(int64_t steps) {
  const __m512 scale = _mm512_set1_ps(0.999f), shift = _mm512_set1_ps(0.001f);
  __m512 sum[CHAINS];
  for (int i = 0; i < CHAINS; ++i) sum[i] = _mm512_set1_ps(1.0f + 0.01f * i);
  for (int64_t step = 0; step < steps; ++step) {
    for (int i = 0; i < CHAINS; ++i) sum[i] = _mm512_fmadd_ps(sum[i], scale, shift);
  }
  for (int i = 0; i < CHAINS; ++i) sink = _mm512_cvtss_f32(sum[i]);
}

template <int CHAINS>
__attribute__((target("avx2,fma"))) void fma_avx2(int64_t steps) {
  const __m256 scale = _mm256_set1_ps(0.999f), shift = _mm256_set1_ps(0.001f);
  __m256 sum[CHAINS];
  for (int i = 0; i < CHAINS; ++i) sum[i] = _mm256_set1_ps(1.0f + 0.01f * i);
  for (int64_t step = 0; step < steps; ++step) {
    for (int i = 0; i < CHAINS; ++i) sum[i] = _mm256_fmadd_ps(sum[i], scale, shift);
  }
  for (int i = 0; i < CHAINS; ++i) sink = _mm256_cvtss_f32(sum[i]);
}

// `bytes` is a multiple of 64 and both pointers are aligned to 64: whole lines leave the write-combining buffers.
__attribute__((target("avx512f"))) void stream_avx512(char* to, const char* from, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 64) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_load_si512(from + i));
  }
  _mm_sfence();
}

void stream_baseline(char* to, const char* from, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 64) {
    for (size_t j = i; j < i + 64; j += 16) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + j), _mm_load_si128(reinterpret_cast<const __m128i*>(from + j)));
    }
  }
  _mm_sfence();
}
#endif

template <class F>
double fma_rate(int threads, double budget, int lanes, int chains, const F& kernel) {
  const double flops = 2.0 * threads * lanes * chains * kFmaSteps;
  return flops / best_seconds(threads, budget, [&](int) { kernel(kFmaSteps); });
}

using Buffer = std::unique_ptr<char, decltype(&std::free)>;

Buffer buffer(size_t bytes) {
  Buffer memory(static_cast<char*>(std::aligned_alloc(64, bytes)), &std::free);
  if (!memory) throw std::bad_alloc();
  return memory;
}

// Four times the last cache, so that little of a copy is still there when the next one starts; a multiple of 64 for
// each thread.
size_t copy_size(int threads) {
  long cache = 0;
  for (const auto& [name, bytes] : cpu_features().caches) cache = std::max(cache, bytes);
  const size_t bytes = std::clamp<size_t>(static_cast<size_t>(cache) * 4, size_t{64} << 20, size_t{256} << 20);
  return bytes / (64 * threads) * (64 * threads);
}

}  // namespace

Ceilings measure_ceilings(int threads, double seconds) {
  Ceilings result;
  const auto variants = cpu_variants();
  const auto runs = [&](const char* name) {
    return std::any_of(variants.begin(), variants.end(), [&](const auto& v) { return v.first == name && v.second; });
  };
  // Two thirds for the two copies, which are slow and disturbed most; the rest for the arithmetic.
  const double share = seconds / 3, fma_share = share / static_cast<double>(variants.size());

  result.copy_bytes = copy_size(threads);
  const Buffer from = buffer(result.copy_bytes), to = buffer(result.copy_bytes);
  const size_t slice = result.copy_bytes / threads;
  const auto copy_rate = [&](double budget, const auto& copy) {
    const auto run = [&](int thread) { copy(to.get() + thread * slice, from.get() + thread * slice, slice); };
    return 2.0 * static_cast<double>(result.copy_bytes) / best_seconds(threads, budget, run);
  };
  // Each thread touches its own pages first: they are there before the clock runs, and near that thread.
  copy_rate(0, [](char* target, char* source, size_t bytes) {
    std::memset(source, 1, bytes);
    std::memset(target, 0, bytes);
  });
  result.copy_memcpy = copy_rate(share, [](char* target, char* source, size_t n) { std::memcpy(target, source, n); });
#if defined(__x86_64__)
  result.copy_stream = copy_rate(share, runs("avx512") ? &stream_avx512 : &stream_baseline);
#else
  result.copy_stream = result.copy_memcpy;
#endif

  if (runs("baseline"))
    result.fma_fp32.emplace_back("baseline", fma_rate(threads, fma_share, 4, 12, &fma_baseline<12>));
#if defined(__x86_64__)
  if (runs("avx2")) result.fma_fp32.emplace_back("avx2", fma_rate(threads, fma_share, 8, 12, &fma_avx2<12>));
  if (runs("avx512")) result.fma_fp32.emplace_back("avx512", fma_rate(threads, fma_share, 16, 12, &fma_avx512<12>));
#endif
  return result;
}

}  // namespace pyops::host
