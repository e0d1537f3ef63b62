// CUDA's built-in variables and functions for g++: what a kernel may use under its plain CUDA spelling.
#pragma once

#if defined(__CUDACC__)
#error "the emulator is for the host compiler"
#endif
#if !defined(__x86_64__)
#error "the emulator switches fibers in x86-64 assembly; csrc/emulator/fiber.cpp needs a counterpart for this processor"
#endif

#include <vector_types.h>
#include <vector_functions.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cassert>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <type_traits>
#include <utility>

#include "emulator/interface.h"

// Static shared arrays would be neither poisoned nor checked, and would not exist once per block.
#undef __shared__
#define __shared__ static_assert(false, "shared memory only through shared_storage<T>()");
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __cluster_dims__
#define __cluster_dims__(...)

#if !defined(__CUDA_RUNTIME_API_H__)
using cudaStream_t = struct CUstream_st*;
#endif

// The wrappers are part of the engine: the race detector must see the kernel's accesses, not theirs.
#define PYOPS_ENGINE inline __attribute__((no_sanitize_thread))
#define PYOPS_HERE ::pyops::emulator::Location location = ::pyops::emulator::Location::current()

extern __thread uint3 threadIdx __attribute__((tls_model("initial-exec")));
extern __thread uint3 blockIdx __attribute__((tls_model("initial-exec")));
extern __thread dim3 blockDim __attribute__((tls_model("initial-exec")));
extern __thread dim3 gridDim __attribute__((tls_model("initial-exec")));
inline constexpr int warpSize = 32;

// barriers and votes

PYOPS_ENGINE void __syncthreads(PYOPS_HERE) {
  pyops::emulator::block_barrier(pyops::emulator::Vote::none, 0, location);
}
PYOPS_ENGINE int __syncthreads_count(int predicate, PYOPS_HERE) {
  return pyops::emulator::block_barrier(pyops::emulator::Vote::count, predicate, location);
}
PYOPS_ENGINE int __syncthreads_and(int predicate, PYOPS_HERE) {
  return pyops::emulator::block_barrier(pyops::emulator::Vote::all, predicate, location);
}
PYOPS_ENGINE int __syncthreads_or(int predicate, PYOPS_HERE) {
  return pyops::emulator::block_barrier(pyops::emulator::Vote::any, predicate, location);
}
PYOPS_ENGINE void __syncwarp(unsigned mask = 0xffffffffu, PYOPS_HERE) {
  pyops::emulator::warp_collective(pyops::emulator::warp_sync, mask, nullptr, nullptr, 0, 0, location);
}
PYOPS_ENGINE unsigned __activemask() { return pyops::emulator::active_mask(); }
PYOPS_ENGINE unsigned __ballot_sync(unsigned mask, int predicate, PYOPS_HERE) {
  unsigned result;
  pyops::emulator::warp_collective(pyops::emulator::ballot, mask, &predicate, &result, 4, 0, location);
  return result;
}
PYOPS_ENGINE int __any_sync(unsigned mask, int predicate, PYOPS_HERE) {
  return __ballot_sync(mask, predicate, location) != 0;
}
PYOPS_ENGINE int __all_sync(unsigned mask, int predicate, PYOPS_HERE) {
  return __ballot_sync(mask, !predicate, location) == 0;
}
template <class T>
PYOPS_ENGINE unsigned __match_any_sync(unsigned mask, T value, PYOPS_HERE) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  unsigned result;
  pyops::emulator::warp_collective(pyops::emulator::match_any, mask, &bits, &result, 8, 0, location);
  return result;
}

// shuffles

#define PYOPS_SHUFFLE(NAME, OP, ARGUMENT)                                                                             \
  template <class T>                                                                                                  \
  PYOPS_ENGINE T NAME(unsigned mask, T value, ARGUMENT argument, int width = 32, PYOPS_HERE) {                        \
    T result;                                                                                                         \
    pyops::emulator::warp_collective(pyops::emulator::OP, mask, &value, &result, sizeof(T),                           \
                                     static_cast<uint32_t>(argument) | static_cast<uint64_t>(width) << 32, location); \
    return result;                                                                                                    \
  }
PYOPS_SHUFFLE(__shfl_sync, shuffle_index, int)
PYOPS_SHUFFLE(__shfl_xor_sync, shuffle_xor, int)
PYOPS_SHUFFLE(__shfl_up_sync, shuffle_up, unsigned)
PYOPS_SHUFFLE(__shfl_down_sync, shuffle_down, unsigned)
#undef PYOPS_SHUFFLE

#define PYOPS_WARP_REDUCE(NAME, OP)                                                         \
  template <class T>                                                                        \
  PYOPS_ENGINE T NAME(unsigned mask, T value, PYOPS_HERE) {                                 \
    static_assert(std::is_integral_v<T> && sizeof(T) == 4);                                 \
    int64_t in = value, out;                                                                \
    pyops::emulator::warp_collective(pyops::emulator::OP, mask, &in, &out, 8, 0, location); \
    return static_cast<T>(out);                                                             \
  }
PYOPS_WARP_REDUCE(__reduce_add_sync, reduce_add)
PYOPS_WARP_REDUCE(__reduce_min_sync, reduce_min)
PYOPS_WARP_REDUCE(__reduce_max_sync, reduce_max)
PYOPS_WARP_REDUCE(__reduce_and_sync, reduce_and)
PYOPS_WARP_REDUCE(__reduce_or_sync, reduce_or)
PYOPS_WARP_REDUCE(__reduce_xor_sync, reduce_xor)
#undef PYOPS_WARP_REDUCE

// memory: plain inline functions, so that the race detector sees the access

template <class T>
inline T __ldg(const T* p) {
  return *p;
}
template <class T>
inline T __ldcs(const T* p) {
  return *p;
}
template <class T>
inline T __ldcg(const T* p) {
  return *p;
}
template <class T>
inline T __ldca(const T* p) {
  return *p;
}
template <class T>
inline void __stcs(T* p, std::type_identity_t<T> v) {
  *p = v;
}
template <class T>
inline void __stcg(T* p, std::type_identity_t<T> v) {
  *p = v;
}
PYOPS_ENGINE void __threadfence() { pyops::emulator::memory_fence(); }
PYOPS_ENGINE void __threadfence_block() { pyops::emulator::memory_fence(); }
PYOPS_ENGINE void __threadfence_system() { pyops::emulator::memory_fence(); }
PYOPS_ENGINE void __nanosleep(unsigned, PYOPS_HERE) { pyops::emulator::spin(location); }
PYOPS_ENGINE void __trap(PYOPS_HERE) { pyops::emulator::fail("__trap()", location); }

// atomics: blocks may run on several host threads, so the words are updated with the host's own atomics

namespace pyops::emulator::detail {
template <class T, class Update>
PYOPS_ENGINE T update_atomically(T* p, Update update) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8);
  using Word = std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;
  auto* word = reinterpret_cast<Word*>(p);
  Word expected = __atomic_load_n(word, __ATOMIC_SEQ_CST), desired;
  T old, fresh;
  do {
    std::memcpy(static_cast<void*>(&old), &expected, sizeof(T));
    fresh = update(old);
    std::memcpy(&desired, static_cast<const void*>(&fresh), sizeof(T));
  } while (!__atomic_compare_exchange_n(word, &expected, desired, true, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
  return old;
}
template <class T>
PYOPS_ENGINE T add(T a, T b) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half(__half2float(a) + __half2float(b));
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16(__bfloat162float(a) + __bfloat162float(b));
  } else if constexpr (std::is_same_v<T, __half2> || std::is_same_v<T, __nv_bfloat162>) {
    T sum;
    sum.x = add(a.x, b.x);
    sum.y = add(a.y, b.y);
    return sum;
  } else {
    return static_cast<T>(a + b);
  }
}
}  // namespace pyops::emulator::detail

#define PYOPS_ATOMIC(NAME, EXPRESSION)                                                               \
  template <class T>                                                                                 \
  PYOPS_ENGINE T NAME(T* p, std::type_identity_t<T> v, PYOPS_HERE) {                                 \
    pyops::emulator::announce_atomic(p, sizeof(T), true, pyops::emulator::Order::relaxed, location); \
    return pyops::emulator::detail::update_atomically(                                               \
        p, [v](T old) __attribute__((no_sanitize_thread)) -> T { return EXPRESSION; });              \
  }
PYOPS_ATOMIC(atomicAdd, pyops::emulator::detail::add(old, v))
PYOPS_ATOMIC(atomicSub, old - v)
PYOPS_ATOMIC(atomicMax, old < v ? v : old)
PYOPS_ATOMIC(atomicMin, v < old ? v : old)
PYOPS_ATOMIC(atomicAnd, old& v)
PYOPS_ATOMIC(atomicOr, old | v)
PYOPS_ATOMIC(atomicXor, old ^ v)
PYOPS_ATOMIC(atomicExch, (static_cast<void>(old), v))
PYOPS_ATOMIC(atomicInc, old >= v ? 0 : old + 1)
PYOPS_ATOMIC(atomicDec, old == 0 || old > v ? v : old - 1)
#undef PYOPS_ATOMIC
template <class T>
PYOPS_ENGINE T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> desired, PYOPS_HERE) {
  pyops::emulator::announce_atomic(p, sizeof(T), true, pyops::emulator::Order::relaxed, location);
  return pyops::emulator::detail::update_atomically(
      p, [=](T old) __attribute__((no_sanitize_thread)) -> T { return old == expected ? desired : old; });
}

// bits

PYOPS_ENGINE int __popc(unsigned x) { return __builtin_popcount(x); }
PYOPS_ENGINE int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
PYOPS_ENGINE int __ffs(int x) { return __builtin_ffs(x); }
PYOPS_ENGINE int __ffsll(long long x) { return __builtin_ffsll(x); }
PYOPS_ENGINE int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
PYOPS_ENGINE int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
PYOPS_ENGINE unsigned __brev(unsigned x) {
  unsigned r = 0;
  for (int i = 0; i < 32; ++i) r |= (x >> i & 1u) << (31 - i);
  return r;
}
PYOPS_ENGINE unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t(a) * b >> 32); }
PYOPS_ENGINE int __mulhi(int a, int b) { return static_cast<int>(int64_t(a) * b >> 32); }
PYOPS_ENGINE unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
PYOPS_ENGINE unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned shift) {
  return static_cast<unsigned>((uint64_t(hi) << 32 | lo) << (shift & 31) >> 32);
}
PYOPS_ENGINE unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned shift) {
  return static_cast<unsigned>((uint64_t(hi) << 32 | lo) >> (shift & 31));
}
PYOPS_ENGINE unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  unsigned r = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned nibble = selector >> (4 * i);
    const auto byte = static_cast<uint8_t>(bytes >> (8 * (nibble & 7)));
    r |= static_cast<unsigned>(nibble & 8 ? (byte & 0x80 ? 0xff : 0) : byte) << (8 * i);
  }
  return r;
}
namespace pyops::emulator::detail {
template <class To, class From>
PYOPS_ENGINE To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
}  // namespace pyops::emulator::detail
PYOPS_ENGINE float __int_as_float(int x) { return pyops::emulator::detail::bits_as<float>(x); }
PYOPS_ENGINE float __uint_as_float(unsigned x) { return pyops::emulator::detail::bits_as<float>(x); }
PYOPS_ENGINE int __float_as_int(float x) { return pyops::emulator::detail::bits_as<int>(x); }
PYOPS_ENGINE unsigned __float_as_uint(float x) { return pyops::emulator::detail::bits_as<unsigned>(x); }
PYOPS_ENGINE long long __double_as_longlong(double x) { return pyops::emulator::detail::bits_as<long long>(x); }
PYOPS_ENGINE double __longlong_as_double(long long x) { return pyops::emulator::detail::bits_as<double>(x); }

// arithmetic; the approximate functions are computed exactly

PYOPS_ENGINE float __expf(float x) { return std::exp(x); }
PYOPS_ENGINE float __exp10f(float x) { return std::pow(10.0f, x); }
PYOPS_ENGINE float __logf(float x) { return std::log(x); }
PYOPS_ENGINE float __log2f(float x) { return std::log2(x); }
PYOPS_ENGINE float __log10f(float x) { return std::log10(x); }
PYOPS_ENGINE float __powf(float x, float y) { return std::pow(x, y); }
PYOPS_ENGINE float __sinf(float x) { return std::sin(x); }
PYOPS_ENGINE float __cosf(float x) { return std::cos(x); }
PYOPS_ENGINE float __tanf(float x) { return std::tan(x); }
PYOPS_ENGINE float __fdividef(float a, float b) { return a / b; }
PYOPS_ENGINE float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
PYOPS_ENGINE float __fadd_rn(float a, float b) { return a + b; }
PYOPS_ENGINE float __fsub_rn(float a, float b) { return a - b; }
PYOPS_ENGINE float __fmul_rn(float a, float b) { return a * b; }
PYOPS_ENGINE float __fdiv_rn(float a, float b) { return a / b; }
PYOPS_ENGINE float __frcp_rn(float a) { return 1.0f / a; }
PYOPS_ENGINE float __fsqrt_rn(float a) { return std::sqrt(a); }
PYOPS_ENGINE float __frsqrt_rn(float a) { return 1.0f / std::sqrt(a); }
PYOPS_ENGINE float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
PYOPS_ENGINE double __dadd_rn(double a, double b) { return a + b; }
PYOPS_ENGINE double __dmul_rn(double a, double b) { return a * b; }
PYOPS_ENGINE double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
PYOPS_ENGINE float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
PYOPS_ENGINE double rsqrt(double x) { return 1.0 / std::sqrt(x); }
PYOPS_ENGINE float normcdff(float x) { return 0.5f * std::erfc(-x * 0.70710678118654752f); }
PYOPS_ENGINE double normcdf(double x) { return 0.5 * std::erfc(-x * 0.70710678118654752); }
PYOPS_ENGINE int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
PYOPS_ENGINE int __float2int_rz(float x) { return static_cast<int>(x); }
PYOPS_ENGINE int __float2int_rd(float x) { return static_cast<int>(std::floor(x)); }
PYOPS_ENGINE int __float2int_ru(float x) { return static_cast<int>(std::ceil(x)); }
PYOPS_ENGINE unsigned __float2uint_rn(float x) { return static_cast<unsigned>(std::nearbyint(x)); }
PYOPS_ENGINE float __int2float_rn(int x) { return static_cast<float>(x); }
PYOPS_ENGINE float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
PYOPS_ENGINE float __double2float_rn(double x) { return static_cast<float>(x); }
PYOPS_ENGINE long long clock64() { return 0; }

// CUDA's global min and max accept mixed operand types.
template <class A, class B>
PYOPS_ENGINE std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>, std::common_type_t<A, B>> min(A a,
                                                                                                                B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) {
    return std::fmin(static_cast<T>(a), static_cast<T>(b));
  } else {
    return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
  }
}
template <class A, class B>
PYOPS_ENGINE std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>, std::common_type_t<A, B>> max(A a,
                                                                                                                B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) {
    return std::fmax(static_cast<T>(a), static_cast<T>(b));
  } else {
    return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
  }
}
