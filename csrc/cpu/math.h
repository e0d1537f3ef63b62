// Elementary functions on Vec: exp, expm1, log, log1p on [0, 1], tanh, sigmoid, normal; and comparison, selection,
// extrema.
//
// NaN in, NaN out; infinities and zeros as in the C library; subnormal arguments and results are kept. Largest errors
// in units of the last place, measured on random arguments over the whole range, on every instruction set:
//
//            float      double
//   exp        1          1       (subnormal results: half a step more)
//   expm1      1.5        2
//   log        1          1
//   log1p      1.5        1.5
//   tanh       2.5        2.5
//   sigmoid    2.5        2.5
//   normal     5          3       (of cdf, |x| <= 5; beyond, up to x² / 5: the exponent x² / 2 is rounded)
//
// Polynomials are Chebyshev fits of the functions named beside them, computed in 60 digits.
#pragma once

#include <limits>
#include <type_traits>

#include "cpu/simd.h"

namespace pyops::PYOPS_CPU_CAPABILITY {

// Comparisons give a mask: all bits set in the lanes where they hold.
template <class acc_t>
using Mask = simd::Native<std::conditional_t<sizeof(acc_t) == 4, int32_t, int64_t>>;

template <class acc_t>
PYOPS_INLINE Mask<acc_t> operator>(const Vec<acc_t>& a, const Vec<acc_t>& b) {
  return a.v > b.v;
}
template <class acc_t>
PYOPS_INLINE Mask<acc_t> operator>=(const Vec<acc_t>& a, const Vec<acc_t>& b) {
  return a.v >= b.v;
}
template <class acc_t>
PYOPS_INLINE Mask<acc_t> operator<(const Vec<acc_t>& a, const Vec<acc_t>& b) {
  return a.v < b.v;
}
template <class acc_t>
PYOPS_INLINE Mask<acc_t> operator<=(const Vec<acc_t>& a, const Vec<acc_t>& b) {
  return a.v <= b.v;
}
template <class acc_t>
PYOPS_INLINE Vec<acc_t> operator-(const Vec<acc_t>& a) {
  return -a.v;
}
template <class acc_t>
PYOPS_INLINE Vec<acc_t> select(const Mask<acc_t>& mask, const Vec<acc_t>& yes, const Vec<acc_t>& no) {
  return mask ? yes.v : no.v;
}
template <class acc_t>
PYOPS_INLINE Mask<acc_t> is_nan(const Vec<acc_t>& a) {
  return a.v != a.v;
}
template <class acc_t>
PYOPS_INLINE Vec<acc_t> abs(const Vec<acc_t>& a) {
  using Word = std::conditional_t<sizeof(acc_t) == 4, uint32_t, uint64_t>;
  return simd::bits_as<simd::Native<acc_t>>(simd::bits_as<simd::Native<Word>>(a.v) & (Word(~Word(0)) >> 1));
}
// |magnitude| with the sign of `sign`.
template <class acc_t>
PYOPS_INLINE Vec<acc_t> copysign(const Vec<acc_t>& magnitude, const Vec<acc_t>& sign) {
  using Word = std::conditional_t<sizeof(acc_t) == 4, uint32_t, uint64_t>;
  using Bits = simd::Native<Word>;
  const Word top = Word(1) << (sizeof(Word) * 8 - 1);
  return simd::bits_as<simd::Native<acc_t>>((simd::bits_as<Bits>(magnitude.v) & Word(~top)) |
                                            (simd::bits_as<Bits>(sign.v) & top));
}
// The greater; b where one of them is NaN: one instruction.
template <class acc_t>
PYOPS_INLINE Vec<acc_t> greater(const Vec<acc_t>& a, const Vec<acc_t>& b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(acc_t) == 4) return simd::bits_as<simd::Native<acc_t>>(_mm512_maskz_max_ps(0xffff, a.v, b.v));
  if constexpr (sizeof(acc_t) == 8) return simd::bits_as<simd::Native<acc_t>>(_mm512_maskz_max_pd(0xff, a.v, b.v));
#elif defined(__AVX2__)
  if constexpr (sizeof(acc_t) == 4) return simd::bits_as<simd::Native<acc_t>>(_mm256_max_ps(a.v, b.v));
  if constexpr (sizeof(acc_t) == 8) return simd::bits_as<simd::Native<acc_t>>(_mm256_max_pd(a.v, b.v));
#else
  return a.v > b.v ? a.v : b.v;
#endif
}
// The lesser and the greater of x and a bound; NaN stays.
template <class acc_t>
PYOPS_INLINE Vec<acc_t> at_most(const Vec<acc_t>& x, acc_t bound) {
  const Vec<acc_t> b(bound);
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (sizeof(acc_t) == 4) return simd::bits_as<simd::Native<acc_t>>(_mm256_min_ps(b.v, x.v));
  if constexpr (sizeof(acc_t) == 8) return simd::bits_as<simd::Native<acc_t>>(_mm256_min_pd(b.v, x.v));
#else
  return select(x > b, b, x);
#endif
}
template <class acc_t>
PYOPS_INLINE Vec<acc_t> at_least(const Vec<acc_t>& x, acc_t bound) {
  return greater(Vec<acc_t>(bound), x);
}
// A NaN on either side stays, as in torch.
template <class acc_t>
PYOPS_INLINE Vec<acc_t> max(const Vec<acc_t>& a, const Vec<acc_t>& b) {
  return ((a.v > b.v) | (a.v != a.v)) ? a.v : b.v;
}
template <class acc_t>
PYOPS_INLINE Vec<acc_t> min(const Vec<acc_t>& a, const Vec<acc_t>& b) {
  return ((a.v < b.v) | (a.v != a.v)) ? a.v : b.v;
}

template <class acc_t>
PYOPS_INLINE Vec<acc_t> sqrt(const Vec<acc_t>& a) {
#if defined(__AVX512F__)
  if constexpr (sizeof(acc_t) == 4) return simd::bits_as<simd::Native<acc_t>>(_mm512_maskz_sqrt_ps(0xffff, a.v));
  if constexpr (sizeof(acc_t) == 8) return simd::bits_as<simd::Native<acc_t>>(_mm512_maskz_sqrt_pd(0xff, a.v));
#else
  Vec<acc_t> root;
  for (int64_t i = 0; i < Vec<acc_t>::width; ++i) root.v[i] = std::sqrt(a.v[i]);
  return root;
#endif
}

template <class acc_t>
PYOPS_INLINE acc_t max_of_lanes(const Vec<acc_t>& v) {
  return simd::joined_lanes(
      v, [](const auto& low, const auto& high) { return ((low > high) | (low != low)) ? low : high; });
}

// The largest of n numbers, -infinity where there are none; NaN stays. Four chains hide the latency of a comparison.
template <class acc_t, class T>
PYOPS_INLINE acc_t max_of_run(const T* x, int64_t n) {
  using V = Vec<acc_t>;
  constexpr int64_t W = V::width;
  const V lowest(-std::numeric_limits<acc_t>::infinity());
  V most[4] = {lowest, lowest, lowest, lowest};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) most[k] = max(V::load(x + i + k * W), most[k]);
  each_vector<acc_t>(
      n - i, [&](int64_t k, auto lanes) { most[0] = max(keep(V::load(x + i + k, lanes), lanes, lowest), most[0]); });
  return max_of_lanes(max(max(most[0], most[1]), max(most[2], most[3])));
}

namespace simd {

template <class acc_t, size_t n>
PYOPS_INLINE Vec<acc_t> polynomial(const Vec<acc_t>& x, const acc_t (&coefficient)[n]) {
  Vec<acc_t> sum(coefficient[0]);
#pragma GCC unroll 32
  for (size_t i = 1; i < n; ++i) sum = fma(sum, x, Vec<acc_t>(coefficient[i]));
  return sum;
}

// The same in two chains, the even and the odd powers: half the latency, for one more product.
template <class acc_t, size_t n>
PYOPS_INLINE Vec<acc_t> polynomial_in_pairs(const Vec<acc_t>& x, const acc_t (&coefficient)[n]) {
  static_assert(n >= 2);
  const Vec<acc_t> square = x * x;
  Vec<acc_t> sum[2] = {coefficient[0], coefficient[1]};
#pragma GCC unroll 32
  for (size_t i = 2; i < n; ++i) sum[i % 2] = fma(sum[i % 2], square, Vec<acc_t>(coefficient[i]));
  return n % 2 == 0 ? fma(sum[0], x, sum[1]) : fma(sum[1], x, sum[0]);
}

template <class acc_t>
struct Float;  // the format's constants, and the fits
template <>
struct Float<float> {
  using Word = int32_t;
  static constexpr int mantissa = 23, bias = 127;
  static constexpr float to_integer = 0x1.8p23f;
  static constexpr float ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;
  static constexpr float smallest = -104.0f, largest = 89.0f;  // arguments of exp beyond give 0 and infinity
  static constexpr float far = 14.5f;                          // exp(-x² / 2) / 2 is 0 from here on
  static constexpr int lift = 32;                              // 2^lift exp(-far² / 2) is a normal number
  // (expm1(r) - r) / r² for |r| <= ln(2) / 2
  static constexpr float exp[] = {0.0001989099082f, 0.001393365f, 0.008333310925f, 0.04166646493f, 0.1666666668f, 0.5f};
  // (2 atanh(s) / s - 2) / s² in s², for |s| <= 0.172 and for 0 <= s <= 1/3
  static constexpr float log[] = {0.2333681101f, 0.2855058704f, 0.4000012391f, 0.6666666655f};
  static constexpr float log1p[] = {0.2078761686f, 0.1746470247f, 0.2226471121f,
                                    0.2857030572f, 0.4000001077f, 0.6666666665f};
  // exp(a²) erfc(a) in (a - 3) / (a + 3), a >= 0
  static constexpr float erfcx[] = {4.56408876e-5f,  1.83982355e-5f,  -0.0005781560562f, 0.0007320455403f,
                                    0.004259766871f, -0.02440260497f, 0.07166797533f,    -0.1501141858f,
                                    0.2456036216f,   -0.3262336458f,  0.1790011537f};
};
template <>
struct Float<double> {
  using Word = int64_t;
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr double to_integer = 0x1.8p52;
  static constexpr double ln2_high = 0x1.62e42fefap-1, ln2_low = 0x1.cf79abc9e3b39803p-40;
  static constexpr double smallest = -746.0, largest = 710.0;
  static constexpr double far = 38.65;
  static constexpr int lift = 64;
  static constexpr double exp[] = {2.09146869680868758e-09,
                                   2.51052170047207447e-08,
                                   2.75572736431102974e-07,
                                   2.75572554002064223e-06,
                                   2.48015873255477427e-05,
                                   0.000198412698748206266,
                                   0.00138888888888837481,
                                   0.00833333333332613585,
                                   0.0416666666666666713,
                                   0.166666666666666713,
                                   0.5};
  static constexpr double log[] = {0.130944166665253436, 0.132680261404287403, 0.153862676728822256,
                                   0.181817951244767545, 0.222222223965529819, 0.285714285707822091,
                                   0.400000000000009126, 0.66666666666666663};
  static constexpr double log1p[] = {0.152312626194289841, 0.0633411085177024574, 0.0994202489655473531,
                                     0.104803992343652744, 0.117679977672410355,  0.133331769491381785,
                                     0.153846202538041626, 0.18181818086005655,   0.22222222223331986,
                                     0.285714285714219418, 0.400000000000000133,  0.66666666666666663};
  static constexpr double erfcx[] = {
      1.0731969951784529e-11,  -4.70434831259446008e-11, -1.71947929792645047e-10, 4.21198591177841721e-10,
      1.45274724470263812e-9,  -1.62348564163376657e-9,  -8.9412464328660064e-9,   1.39207282208785363e-9,
      4.68808823032171792e-8,  2.84694414789422834e-8,   -2.34598571744075752e-7,  -2.9405704860811498e-7,
      1.25245504521444182e-6,  2.12008712071789224e-6,   -7.97811645479413437e-6,  -0.0000128605209456434919,
      0.000064056552558513692, 0.0000452553026597093003, -0.000597061948272587889, 0.00070774643849224893,
      0.00426913633282912006,  -0.0243924993186470922,   0.0716658371979782912,    -0.150115936500777877,
      0.245603801712330881,    -0.326233560043037223,    0.17900115118138995};
};

// exp(x) = 2^n (1 + q): what exp, expm1 and normal are made of.
template <class acc_t>
struct PowerOfE {
  using F = Float<acc_t>;
  using V = Vec<acc_t>;
  using Word = Native<typename F::Word>;
  V n, q;
  Word shifted;  // bits of to_integer + lift + n: the low ones, as many as an exponent has, are those of lift + n

  // For smallest <= x <= largest, or NaN.
  PYOPS_INLINE explicit PowerOfE(const V& x, int lift = 0) {
    const V to_integer(F::to_integer + acc_t(lift)), sum = fma(x, V(acc_t(1.44269504088896340736)), to_integer);
    shifted = bits_as<Word>(sum.v);
    n = sum - to_integer;
    V r = fma(n, V(-F::ln2_high), x);
    r = fma(n, V(-F::ln2_low), r);
    q = fma(polynomial(r, F::exp), r * r, r);
  }
  static PYOPS_INLINE PowerOfE of_any(const V& x) { return PowerOfE(at_most(at_least(x, F::smallest), F::largest)); }

  // v * 2^n, also where 2^n itself is no normal number.
  PYOPS_INLINE V scale(const V& v) const {
#if defined(__AVX512F__)
    if constexpr (sizeof(acc_t) == 4) return bits_as<Native<acc_t>>(_mm512_maskz_scalef_ps(0xffff, v.v, n.v));
    if constexpr (sizeof(acc_t) == 8) return bits_as<Native<acc_t>>(_mm512_maskz_scalef_pd(0xff, v.v, n.v));
#else
    const Word half = shifted >> 1;
    return v * power(half) * power(shifted - half);
#endif
  }
  // (1 + q) 2^(n + lift), a normal number; for NaN it may be anything.
  PYOPS_INLINE V lifted() const {
    return bits_as<Native<acc_t>>(bits_as<Word>((V(acc_t(1)) + q).v) + (shifted << F::mantissa));
  }

 private:
  static PYOPS_INLINE V power(const Word& e) {
    return bits_as<Native<acc_t>>((e << F::mantissa) + (typename F::Word(F::bias) << F::mantissa));
  }
};

// log(1 + f) from s = f / (2 + f); h is the fit of (2 atanh(s) / s - 2) / s².
template <class acc_t, size_t n>
PYOPS_INLINE Vec<acc_t> log_of_one_plus(const Vec<acc_t>& f, const acc_t (&h)[n]) {
  const Vec<acc_t> s = f / (f + Vec<acc_t>(acc_t(2))), z = s * s;
  return f - s * (f - z * polynomial(z, h));
}

}  // namespace simd

template <class acc_t>
PYOPS_INLINE Vec<acc_t> exp(const Vec<acc_t>& x) {
  const auto e = simd::PowerOfE<acc_t>::of_any(x);
  return e.scale(Vec<acc_t>(acc_t(1)) + e.q);
}

// The same for x <= 0 or NaN.
template <class acc_t>
PYOPS_INLINE Vec<acc_t> exp_down(const Vec<acc_t>& x) {
  const simd::PowerOfE<acc_t> e(at_least(x, simd::Float<acc_t>::smallest));
  return e.scale(Vec<acc_t>(acc_t(1)) + e.q);
}

template <class acc_t>
PYOPS_INLINE Vec<acc_t> expm1(const Vec<acc_t>& x) {
  using V = Vec<acc_t>;
  const auto e = simd::PowerOfE<acc_t>::of_any(x);
  const V one(acc_t(1)), power = e.scale(one);
  const V value = fma(power, e.q, power - one);
  // The largest finite results have 2^n beyond the format; -0 stays -0.
  return select(x > V(simd::Float<acc_t>::largest - 2), e.scale(one + e.q), select(abs(x) > V(acc_t(0)), value, x));
}

template <class acc_t>
PYOPS_INLINE Vec<acc_t> log(const Vec<acc_t>& x) {
  using F = simd::Float<acc_t>;
  using V = Vec<acc_t>;
  using Word = typename F::Word;
  constexpr acc_t infinity = std::numeric_limits<acc_t>::infinity();
  const auto tiny = x < V(std::numeric_limits<acc_t>::min());
  const V normal = select(tiny, x * V(acc_t(Word(1) << F::mantissa)), x);
  // Exponent and mantissa so that the mantissa lies in [sqrt(1/2), sqrt(2)).
  const auto bits = simd::bits_as<simd::Native<Word>>(normal.v);
  const auto root_half = simd::bits_as<simd::Native<Word>>(V(acc_t(0.70710678118654752440)).v);
  const auto exponent = (bits - root_half) >> F::mantissa;
  const V f = V(simd::bits_as<simd::Native<acc_t>>(bits - (exponent << F::mantissa))) - V(acc_t(1));
  const V n = V(__builtin_convertvector(exponent, simd::Native<acc_t>)) - select(tiny, V(acc_t(F::mantissa)), V());
  const V s = f / (f + V(acc_t(2))), z = s * s;
  const V small = s * (f - z * simd::polynomial(z, F::log)) - n * V(F::ln2_low);
  V y = n * V(F::ln2_high) - (small - f);
  y = select(x < V(infinity), y, x);  // infinity and NaN
  y = select(x > V(), y, select(x >= V(), V(-infinity), V(std::numeric_limits<acc_t>::quiet_NaN())));
  return y;
}

// log(1 + x) for 0 <= x <= 1.
template <class acc_t>
PYOPS_INLINE Vec<acc_t> log1p_unit(const Vec<acc_t>& x) {
  return simd::log_of_one_plus(x, simd::Float<acc_t>::log1p);
}

template <class acc_t>
PYOPS_INLINE Vec<acc_t> tanh(const Vec<acc_t>& x) {
  using V = Vec<acc_t>;
  const V t = expm1(abs(x) * V(acc_t(-2)));
  return copysign(-t / (t + V(acc_t(2))), x);
}

template <class acc_t>
PYOPS_INLINE Vec<acc_t> sigmoid(const Vec<acc_t>& x) {
  const Vec<acc_t> one(acc_t(1));
  return one / (one + exp(-x));
}

// Distribution function and density of the standard normal distribution, from one exponential; subnormal only in the
// last product. The density of NaN may be anything.
template <class acc_t>
struct Normal {
  Vec<acc_t> cdf, density;
};
template <class acc_t>
PYOPS_INLINE Normal<acc_t> normal(const Vec<acc_t>& x) {
  using F = simd::Float<acc_t>;
  using V = Vec<acc_t>;
  constexpr acc_t lowered = F::lift == 32 ? acc_t(0x1p-32) : acc_t(0x1p-64);
  const V distance = abs(x), a = at_most(distance, F::far);
  // A product that underflows is slow, one with 0 is not.
  const V power = simd::PowerOfE<acc_t>(a * a * V(acc_t(-0.5)), F::lift).lifted();
  const V e = select(distance < V(F::far), power, V());
  const V scaled = a * V(acc_t(0.70710678118654752440)), t = (scaled - V(acc_t(3))) / (scaled + V(acc_t(3)));
  const V tail = e * (V(lowered / 2) * simd::polynomial_in_pairs(t, F::erfcx));
  return {select(x > V(acc_t(0)), V(acc_t(1)) - tail, tail), e * V(lowered * acc_t(0.39894228040143267794))};
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY
