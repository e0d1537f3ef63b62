// The vector vocabulary of the CPU kernels: Vec<acc_t>, as wide as the instruction set of the build.
//
//   each_vector<acc_t>(n, [&](int64_t i, auto lanes) {
//     auto v = Vec<acc_t>::load(x + i, lanes);              // float, double, bfloat16 or float16 in memory
//     (v * v).store(y + i, lanes);
//   });
//
// `lanes` is AllLanes inside and FirstLanes at the end, so that a kernel states its arithmetic once. Everything stands
// in the namespace of the instruction set: no weak symbol of a wide build may serve a narrow one.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/host_device.h"
#include "common/workspace.h"
#include "cpu/blocking.h"

namespace pyops::PYOPS_CPU_CAPABILITY {

#if defined(__AVX512F__)
inline constexpr int64_t vector_bytes = 64;
#elif defined(__AVX2__)
inline constexpr int64_t vector_bytes = 32;
#else
inline constexpr int64_t vector_bytes = 16;
#endif

// Compiled for the running instruction set, a loop body must not survive as a call.
#define PYOPS_INLINE inline __attribute__((always_inline))

struct AllLanes {};
struct FirstLanes {
  int64_t count;
};

namespace simd {

template <class T>
struct NativeOf {
  typedef T type __attribute__((vector_size(vector_bytes)));
};
template <class T>
using Native = typename NativeOf<T>::type;
using Bits = Native<uint32_t>;
typedef uint16_t Bits16 __attribute__((vector_size(vector_bytes / 2)));

template <class To, class From>
PYOPS_INLINE To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class V>
PYOPS_INLINE V read(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// The first `count` lanes of memory; zero in the others, which are not touched.
template <class V, class T>
PYOPS_INLINE V read_first(const T* p, int64_t count) {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
  if constexpr (sizeof(T) == 8) return bits_as<V>(_mm512_maskz_loadu_pd(__mmask8((1u << count) - 1), p));
  if constexpr (sizeof(T) == 4) return bits_as<V>(_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p));
  if constexpr (sizeof(T) == 2) return bits_as<V>(_mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), p));
#else
  T lane[sizeof(V) / sizeof(T)];
  std::memset(static_cast<void*>(lane), 0, sizeof lane);
  for (int64_t i = 0; i < count; ++i) std::memcpy(static_cast<void*>(lane + i), p + i, sizeof(T));
  return read<V>(lane);
#endif
}

template <class V, class T>
PYOPS_INLINE void write_first(T* p, const V& v, int64_t count) {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
  if constexpr (sizeof(T) == 8) _mm512_mask_storeu_pd(p, __mmask8((1u << count) - 1), bits_as<__m512d>(v));
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), bits_as<__m512>(v));
  if constexpr (sizeof(T) == 2) _mm256_mask_storeu_epi16(p, __mmask16((1u << count) - 1), bits_as<__m256i>(v));
#else
  T lane[sizeof(V) / sizeof(T)];
  std::memcpy(static_cast<void*>(lane), &v, sizeof v);
  for (int64_t i = 0; i < count; ++i) std::memcpy(static_cast<void*>(p + i), lane + i, sizeof(T));
#endif
}

// Past the caches: the line is not read before it is written. `p` is aligned to the size of V.
template <class V>
PYOPS_INLINE void write_streamed(void* p, const V& v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) return _mm512_stream_si512(static_cast<__m512i*>(p), bits_as<__m512i>(v));
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32) return _mm256_stream_si256(static_cast<__m256i*>(p), bits_as<__m256i>(v));
#endif
#if defined(__x86_64__)
  if constexpr (sizeof(V) == 16) return _mm_stream_si128(static_cast<__m128i*>(p), bits_as<__m128i>(v));
#endif
  std::memcpy(p, &v, sizeof v);
}

PYOPS_INLINE Native<float> from_bfloat16(const Bits16& h) {
  return bits_as<Native<float>>(__builtin_convertvector(h, Bits) << 16);
}

// Nearest even; every NaN becomes the quiet one.
PYOPS_INLINE Bits16 to_bfloat16(const Native<float>& v) {
  Bits bits = bits_as<Bits>(v);
  Bits rounded = (bits + (0x7fff + ((bits >> 16) & 1))) >> 16;
  Bits kept = v == v ? rounded : Bits{} + 0x7fc0;
  return __builtin_convertvector(kept, Bits16);
}

PYOPS_INLINE Native<float> from_half(const Bits16& h) {
#if defined(__AVX512F__)
  return bits_as<Native<float>>(_mm512_maskz_cvtph_ps(0xffff, bits_as<__m256i>(h)));
#elif defined(__F16C__)
  return bits_as<Native<float>>(_mm256_cvtph_ps(bits_as<__m128i>(h)));
#else
  Bits wide = __builtin_convertvector(h, Bits);
  Bits magnitude = (wide & 0x7fff) << 13;
  Bits exponent = magnitude & (0x7c00u << 13);
  Bits normal = magnitude + ((127u - 15) << 23);
  // A subnormal half is exact in float: 2^-14 * (1 + m) - 2^-14.
  Native<float> one = bits_as<Native<float>>(Bits{} + (113u << 23));
  Bits subnormal = bits_as<Bits>(bits_as<Native<float>>(normal + (1u << 23)) - one);
  Bits infinite = normal + ((128u - 16) << 23);
  Bits value = exponent == 0 ? subnormal : (exponent == (0x7c00u << 13) ? infinite : normal);
  return bits_as<Native<float>>(value | ((wide & 0x8000) << 16));
#endif
}

// Nearest even; overflow gives infinity, subnormals are kept.
PYOPS_INLINE Bits16 to_half(const Native<float>& v) {
#if defined(__AVX512F__)
  return bits_as<Bits16>(
      _mm512_maskz_cvtps_ph(0xffff, bits_as<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  return bits_as<Bits16>(_mm256_cvtps_ph(bits_as<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  Bits bits = bits_as<Bits>(v);
  Bits sign = bits & 0x80000000u;
  Bits magnitude = bits ^ sign;
  // Adding 0.5 leaves a subnormal half in the low bits of the float, rounded by the addition itself.
  const uint32_t half_one = 126u << 23;
  Bits subnormal =
      bits_as<Bits>(bits_as<Native<float>>(magnitude) + bits_as<Native<float>>(Bits{} + half_one)) - half_one;
  Bits normal = (magnitude + (0xfff - (112u << 23)) + ((magnitude >> 13) & 1)) >> 13;
  Bits special = v == v ? Bits{} + 0x7c00 : Bits{} + 0x7e00;
  Bits value = magnitude >= (143u << 23) ? special : (magnitude < (113u << 23) ? subnormal : normal);
  return __builtin_convertvector(value | (sign >> 16), Bits16);
#endif
}

// Two halves of a register in one; through memory the halves would be stored and the whole loaded before they arrive.
template <class V>
PYOPS_INLINE Bits joined(const V& a, const V& b) {
#if defined(__AVX512F__)
  return bits_as<Bits>(
      _mm512_maskz_inserti64x4(0xff, _mm512_castsi256_si512(bits_as<__m256i>(a)), bits_as<__m256i>(b), 1));
#elif defined(__AVX2__)
  return bits_as<Bits>(_mm256_inserti128_si256(_mm256_castsi128_si256(bits_as<__m128i>(a)), bits_as<__m128i>(b), 1));
#elif defined(__x86_64__)
  uint64_t low, high;
  std::memcpy(&low, &a, sizeof low), std::memcpy(&high, &b, sizeof high);
  return bits_as<Bits>(_mm_set_epi64x(int64_t(high), int64_t(low)));
#else
  const V pair[2] = {a, b};
  return bits_as<Bits>(pair);
#endif
}

template <class T>
struct Memory;  // how scalar_t in memory becomes acc_t in a register
template <>
struct Memory<float> {
  using Packed = Native<float>;
  static PYOPS_INLINE Packed unpack(const Packed& p) { return p; }
  static PYOPS_INLINE Packed pack(const Packed& v) { return v; }
};
template <>
struct Memory<double> {
  using Packed = Native<double>;
  static PYOPS_INLINE Packed unpack(const Packed& p) { return p; }
  static PYOPS_INLINE Packed pack(const Packed& v) { return v; }
};
template <>
struct Memory<bfloat16_t> {
  using Packed = Bits16;
  static PYOPS_INLINE Native<float> unpack(const Packed& p) { return from_bfloat16(p); }
  static PYOPS_INLINE Packed pack(const Native<float>& v) { return to_bfloat16(v); }
};
template <>
struct Memory<half_t> {
  using Packed = Bits16;
  static PYOPS_INLINE Native<float> unpack(const Packed& p) { return from_half(p); }
  static PYOPS_INLINE Packed pack(const Native<float>& v) { return to_half(v); }
};

}  // namespace simd

template <class acc_t>
struct Vec {
  using Native = simd::Native<acc_t>;
  static constexpr int64_t width = vector_bytes / int64_t(sizeof(acc_t));
  Native v;

  PYOPS_INLINE Vec() : v{} {}
  PYOPS_INLINE Vec(acc_t every) : v(every - Native{}) {}
  PYOPS_INLINE Vec(const Native& native) : v(native) {}

  template <class T>
  static PYOPS_INLINE Vec load(const T* p, AllLanes = {}) {
    return simd::Memory<T>::unpack(simd::read<typename simd::Memory<T>::Packed>(p));
  }
  template <class T>
  static PYOPS_INLINE Vec load(const T* p, FirstLanes lanes) {
    return simd::Memory<T>::unpack(simd::read_first<typename simd::Memory<T>::Packed>(p, lanes.count));
  }
  template <class T>
  PYOPS_INLINE void store(T* p, AllLanes = {}) const {
    auto packed = simd::Memory<T>::pack(v);
    std::memcpy(static_cast<void*>(p), &packed, sizeof packed);
  }
  template <class T>
  PYOPS_INLINE void store(T* p, FirstLanes lanes) const {
    simd::write_first(p, simd::Memory<T>::pack(v), lanes.count);
  }
  template <class T>
  PYOPS_INLINE void stream(T* p) const {
    simd::write_streamed(p, simd::Memory<T>::pack(v));
  }

  template <class T>
  static PYOPS_INLINE void stream(T* p, const Vec& a, const Vec& b) {
    simd::write_streamed(p, simd::joined(simd::Memory<T>::pack(a.v), simd::Memory<T>::pack(b.v)));
  }

  friend PYOPS_INLINE Vec operator+(const Vec& a, const Vec& b) { return a.v + b.v; }
  friend PYOPS_INLINE Vec operator-(const Vec& a, const Vec& b) { return a.v - b.v; }
  friend PYOPS_INLINE Vec operator*(const Vec& a, const Vec& b) { return a.v * b.v; }
  friend PYOPS_INLINE Vec operator/(const Vec& a, const Vec& b) { return a.v / b.v; }
  PYOPS_INLINE Vec& operator+=(const Vec& b) {
    v += b.v;
    return *this;
  }
};

// a * b + c, rounded once where the instruction set can.
template <class acc_t>
PYOPS_INLINE Vec<acc_t> fma(const Vec<acc_t>& a, const Vec<acc_t>& b, const Vec<acc_t>& c) {
  using V [[maybe_unused]] = Vec<acc_t>;
#if defined(__AVX512F__)
  if constexpr (sizeof(acc_t) == 4) return V(typename V::Native(_mm512_fmadd_ps(a.v, b.v, c.v)));
  if constexpr (sizeof(acc_t) == 8) return V(typename V::Native(_mm512_fmadd_pd(a.v, b.v, c.v)));
#elif defined(__FMA__)
  if constexpr (sizeof(acc_t) == 4) return V(typename V::Native(_mm256_fmadd_ps(a.v, b.v, c.v)));
  if constexpr (sizeof(acc_t) == 8) return V(typename V::Native(_mm256_fmadd_pd(a.v, b.v, c.v)));
#else
  return a * b + c;
#endif
}

// v in the lanes that are in use, `absent` in the others: by default zero, what a sum may add.
template <class acc_t>
PYOPS_INLINE Vec<acc_t> keep(const Vec<acc_t>& v, AllLanes, const Vec<acc_t>& = {}) {
  return v;
}
template <class acc_t>
PYOPS_INLINE Vec<acc_t> keep(const Vec<acc_t>& v, FirstLanes lanes, const Vec<acc_t>& absent = {}) {
  using Index = std::conditional_t<sizeof(acc_t) == 4, int32_t, int64_t>;
  simd::Native<Index> lane;
  for (int64_t i = 0; i < Vec<acc_t>::width; ++i) lane[i] = Index(i);
  return lane < Index(lanes.count) ? v.v : absent.v;
}

namespace simd {

// join(low, high) of the halves of a vector, of the halves of that, and so on to one lane.
template <int lanes, class V, class F, size_t... i>
PYOPS_INLINE auto joined_lanes(const V& v, const F& join, std::index_sequence<i...>) {
  if constexpr (lanes == 2) {
    return join(v[0], v[1]);
  } else {
    const auto halves =
        join(__builtin_shufflevector(v, v, int(i)...), __builtin_shufflevector(v, v, int(i + lanes / 2)...));
    return joined_lanes<lanes / 2>(halves, join, std::make_index_sequence<lanes / 4>());
  }
}
template <class acc_t, class F>
PYOPS_INLINE acc_t joined_lanes(const Vec<acc_t>& v, const F& join) {
  return joined_lanes<Vec<acc_t>::width>(v.v, join, std::make_index_sequence<Vec<acc_t>::width / 2>());
}

}  // namespace simd

// Sum of the lanes, halves added to halves.
template <class acc_t>
PYOPS_INLINE acc_t sum(const Vec<acc_t>& v) {
  return simd::joined_lanes(v, [](const auto& low, const auto& high) { return low + high; });
}

template <class acc_t, class F>
PYOPS_INLINE void each_vector(int64_t n, F&& f) {
  constexpr int64_t W = Vec<acc_t>::width;
  int64_t i = 0;
  for (; i + W <= n; i += W) f(i, AllLanes{});
  if (i < n) f(i, FirstLanes{n - i});
}

// Sums of K quantities over n elements: term(i, lanes, total) adds the contribution of one vector to total[0..K).
// Four sets of totals hide the latency of the additions.
template <class acc_t, int K>
struct Totals {
  Vec<acc_t> value[K];
  PYOPS_INLINE Vec<acc_t>& operator[](int k) { return value[k]; }
};
template <class acc_t, int K, class F>
PYOPS_INLINE void accumulate(Totals<acc_t, K>& total, int64_t n, F&& term) {
  constexpr int64_t W = Vec<acc_t>::width;
  Totals<acc_t, K> b, c, d;
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    term(i, AllLanes{}, total);
    term(i + W, AllLanes{}, b);
    term(i + 2 * W, AllLanes{}, c);
    term(i + 3 * W, AllLanes{}, d);
  }
  for (; i + W <= n; i += W) term(i, AllLanes{}, b);
  if (i < n) term(i, FirstLanes{n - i}, c);
  for (int k = 0; k < K; ++k) total[k] += (b[k] + c[k]) + d[k];
}

// The same over several runs: four sets of totals live from run to run, so that a short run costs no merging.
template <class acc_t, int K>
class RunningTotals {
 public:
  template <class F>
  PYOPS_INLINE void add(int64_t n, F&& term) {
    constexpr int64_t W = Vec<acc_t>::width;
    int64_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W) {
      term(i, AllLanes{}, set_[0]);
      term(i + W, AllLanes{}, set_[1]);
      term(i + 2 * W, AllLanes{}, set_[2]);
      term(i + 3 * W, AllLanes{}, set_[3]);
    }
    if (i + W <= n) term(i, AllLanes{}, set_[0]), i += W;
    if (i + W <= n) term(i, AllLanes{}, set_[1]), i += W;
    if (i + W <= n) term(i, AllLanes{}, set_[2]), i += W;
    if (i < n) term(i, FirstLanes{n - i}, set_[3]);
  }
  PYOPS_INLINE double sum(int k) const {
    return double(
        PYOPS_CPU_CAPABILITY::sum((set_[0].value[k] + set_[1].value[k]) + (set_[2].value[k] + set_[3].value[k])));
  }

 private:
  Totals<acc_t, K> set_[4];
};

// y[i] = value(i, lanes) over n elements; past the caches when `streamed`, which needs stream_fence() afterwards.
// Streamed stores are as wide as the registers, so half types go out in pairs.
template <class acc_t, class T, class F>
PYOPS_INLINE void write_run(T* y, int64_t n, bool streamed, F&& value) {
  using V = Vec<acc_t>;
  constexpr int64_t W = V::width, step = vector_bytes / int64_t(sizeof(T));
  if (!streamed || n < 4 * W)
    return each_vector<acc_t>(n, [&](int64_t i, auto lanes) { value(i, lanes).store(y + i, lanes); });
  auto plain = [&](int64_t first, int64_t count) {
    each_vector<acc_t>(count, [&](int64_t i, auto lanes) { value(first + i, lanes).store(y + first + i, lanes); });
  };
  int64_t i = int64_t(-reinterpret_cast<uintptr_t>(y) & (vector_bytes - 1)) / int64_t(sizeof(T));
  if (i > 0) plain(0, i);
  for (; i + step <= n; i += step) {
    if constexpr (step == W)
      value(i, AllLanes{}).stream(y + i);
    else
      V::stream(y + i, value(i, AllLanes{}), value(i + W, AllLanes{}));
  }
  if (i < n) plain(i, n - i);
}

// R rows of n elements, `stride` apart, written side by side: value(i, lanes, v) fills v[0..R), so that what the rows
// share is loaded once. Streamed rows must start on a vector: see rows_aligned.
template <class acc_t, int R, class T, class F>
PYOPS_INLINE void write_row_group(T* y, int64_t stride, int64_t n, bool streamed, F&& value) {
  using V = Vec<acc_t>;
  constexpr int64_t W = V::width, step = vector_bytes / int64_t(sizeof(T));
  int64_t i = 0;
  for (; streamed && i + step <= n; i += step) {
    V first[R], second[R];
    value(i, AllLanes{}, first);
    if constexpr (step != W) value(i + W, AllLanes{}, second);
    for (int r = 0; r < R; ++r) {
      if constexpr (step == W)
        first[r].stream(y + r * stride + i);
      else
        V::stream(y + r * stride + i, first[r], second[r]);
    }
  }
  each_vector<acc_t>(n - i, [&](int64_t j, auto lanes) {
    V v[R];
    value(i + j, lanes, v);
    for (int r = 0; r < R; ++r) v[r].store(y + r * stride + i + j, lanes);
  });
}
template <class T>
PYOPS_INLINE bool rows_aligned(const T* y, int64_t stride) {
  return ((reinterpret_cast<uintptr_t>(y) | uintptr_t(stride) * sizeof(T)) & (vector_bytes - 1)) == 0;
}

// The first read of a page waits for its translation, which hardware prefetchers leave to the program: they stop where
// a page ends. So a run of at least a page touches the pages `ahead_bytes` further on. Whatever the address, a touch
// does not fault.
inline constexpr int64_t page_bytes = 4096, ahead_bytes = 32768;
template <class T>
PYOPS_INLINE void touch_ahead(const T* p, int64_t elements) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(p) + ahead_bytes;
  for (int64_t i = page_bytes; i <= elements * int64_t(sizeof(T)); i += page_bytes)
    __builtin_prefetch(reinterpret_cast<const void*>(first + uintptr_t(i - page_bytes)));
}

// For the last pass over a row, which finds it in the cache: memory would have nothing to do meanwhile, so the rows
// behind it come. To be called with every vector, as a core has few lines under way at a time.
inline constexpr int64_t fetched_bytes = 8192;
template <class T>
PYOPS_INLINE void fetch_ahead(const T* p, int64_t bytes = fetched_bytes) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + uintptr_t(bytes)));
}

using blocking::is_streamed;

// Streamed stores are weakly ordered; nobody may be told of them before this.
PYOPS_INLINE void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Scratch memory on a cache line of its own; uninitialised unless filled.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t n) : data_(static_cast<T*>(workspace::take(size_t(n > 0 ? n : 1) * sizeof(T)))) {}
  Buffer(int64_t n, T value) : Buffer(n) {
    for (int64_t i = 0; i < n; ++i) data_[i] = value;
  }
  ~Buffer() { workspace::give_back(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() { return data_; }
  const T* get() const { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
};

// Reads a parameter once into the type of the sums; `absent` where there is none.
template <class acc_t, class T>
void widen(acc_t* to, const T* from, int64_t n, acc_t absent) {
  each_vector<acc_t>(n, [&](int64_t i, auto lanes) {
    (from ? Vec<acc_t>::load(from + i, lanes) : Vec<acc_t>(absent)).store(to + i, lanes);
  });
}
// Rounds sums to the type of a result.
template <class acc_t, class T>
PYOPS_INLINE void narrow(T* to, const acc_t* from, int64_t n) {
  each_vector<acc_t>(n, [&](int64_t i, auto lanes) { Vec<acc_t>::load(from + i, lanes).store(to + i, lanes); });
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY
