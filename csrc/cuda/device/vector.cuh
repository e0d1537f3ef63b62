// Conversions between storage and arithmetic types, and vector loads and stores. Shared by both compilers.
#pragma once

namespace pyops {

template <class To, class From>
PYOPS_HOST_DEVICE To convert(From x) {
  if constexpr (std::is_same_v<To, From>) {
    return x;
  } else if constexpr (std::is_same_v<From, bf16>) {
    return static_cast<To>(__bfloat162float(x));
  } else if constexpr (std::is_same_v<From, fp16>) {
    return static_cast<To>(__half2float(x));
  } else if constexpr (std::is_same_v<To, bf16>) {
    return __float2bfloat16(static_cast<float>(x));
  } else if constexpr (std::is_same_v<To, fp16>) {
    return __float2half(static_cast<float>(x));
  } else {
    return static_cast<To>(x);
  }
}
// The half types meet each other through float.
template <>
PYOPS_HOST_DEVICE bf16 convert<bf16, fp16>(fp16 x) {
  return __float2bfloat16(__half2float(x));
}
template <>
PYOPS_HOST_DEVICE fp16 convert<fp16, bf16>(bf16 x) {
  return __float2half(__bfloat162float(x));
}

template <class T>
PYOPS_HOST_DEVICE float to_float(T x) {
  return convert<float>(x);
}
template <class T>
PYOPS_HOST_DEVICE T from_float(float x) {
  return convert<T>(x);
}
template <class T>
PYOPS_HOST_DEVICE accumulate_t<T> to_acc(T x) {
  return convert<accumulate_t<T>>(x);
}
template <class T>
PYOPS_HOST_DEVICE T from_acc(accumulate_t<T> x) {
  return convert<T>(x);
}

// Two half-width values in one register, lo in the low half: the operand format of mma, wgmma and ldmatrix.
template <class T>
PYOPS_DEVICE uint32_t pack2(float lo, float hi) {
  if constexpr (std::is_same_v<T, bf16>) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(lo, hi);
    return static_cast<uint32_t>(__bfloat16_as_ushort(v.x)) | static_cast<uint32_t>(__bfloat16_as_ushort(v.y)) << 16;
  } else {
    const __half2 v = __floats2half2_rn(lo, hi);
    return static_cast<uint32_t>(__half_as_ushort(v.x)) | static_cast<uint32_t>(__half_as_ushort(v.y)) << 16;
  }
}
template <class T>
PYOPS_DEVICE float2 unpack2(uint32_t v) {
  const auto lo = static_cast<unsigned short>(v & 0xffffu), hi = static_cast<unsigned short>(v >> 16);
  if constexpr (std::is_same_v<T, bf16>) {
    return float2{__bfloat162float(__ushort_as_bfloat16(lo)), __bfloat162float(__ushort_as_bfloat16(hi))};
  } else {
    return float2{__half2float(__ushort_as_half(lo)), __half2float(__ushort_as_half(hi))};
  }
}

// N values moved as one access where N * sizeof(T) is 2, 4, 8 or 16 bytes, and as 16-byte pieces beyond.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vec {
  static_assert((N & (N - 1)) == 0, "a power of two");
  T v[N];
  PYOPS_HOST_DEVICE T& operator[](int i) { return v[i]; }
  PYOPS_HOST_DEVICE const T& operator[](int i) const { return v[i]; }
};

namespace detail {
template <int Bytes>
struct Word;
template <>
struct Word<1> {
  using type = unsigned char;
};
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

template <class T, int N>
struct Words {
  static constexpr int bytes = sizeof(T) * N;
  static constexpr int count = bytes <= 16 ? 1 : bytes / 16;
  using type = typename Word<bytes / count>::type;
};
// The hardware path needs words, not structs, to emit one instruction; both sides agree on size and alignment.
template <class T, int N>
union VecWords {
  Vec<T, N> vec;
  typename Words<T, N>::type word[Words<T, N>::count];
  PYOPS_DEVICE VecWords() {}
};
}  // namespace detail

// p is aligned to min(16, N * sizeof(T)) bytes in all of these.

template <int N, class T>
PYOPS_DEVICE Vec<T, N> load_vec(const T* p) {
  return *detail::vector_at<const Vec<T, N>>(p);
}
// Through the read-only path: the memory must not be written by this kernel.
template <int N, class T>
PYOPS_DEVICE Vec<T, N> load_vec_readonly(const T* p) {
  using W = detail::Words<T, N>;
  detail::VecWords<T, N> u;
#pragma unroll
  for (int i = 0; i < W::count; ++i) u.word[i] = __ldg(detail::vector_at<const typename W::type>(p) + i);
  return u.vec;
}
// For data read once: evicted first.
template <int N, class T>
PYOPS_DEVICE Vec<T, N> load_vec_streaming(const T* p) {
  using W = detail::Words<T, N>;
  detail::VecWords<T, N> u;
#pragma unroll
  for (int i = 0; i < W::count; ++i) u.word[i] = __ldcs(detail::vector_at<const typename W::type>(p) + i);
  return u.vec;
}
template <class T, int N>
PYOPS_DEVICE void store_vec(T* p, const Vec<T, N>& v) {
  *detail::vector_at<Vec<T, N>>(p) = v;
}
template <class T, int N>
PYOPS_DEVICE void store_vec_streaming(T* p, const Vec<T, N>& v) {
  using W = detail::Words<T, N>;
  detail::VecWords<T, N> u;
  u.vec = v;
#pragma unroll
  for (int i = 0; i < W::count; ++i) __stcs(detail::vector_at<typename W::type>(p) + i, u.word[i]);
}

// Adds without returning the old values; p is aligned to the vector.
PYOPS_DEVICE void red_add_v2(float* p, const Vec<float, 2>& v) { detail::red_add(p, v.v); }
PYOPS_DEVICE void red_add_v4(float* p, const Vec<float, 4>& v) { detail::red_add(p, v.v); }

}  // namespace pyops
