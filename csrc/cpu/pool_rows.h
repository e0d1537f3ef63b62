// Pooling rows of outputs in channels first: the rows of a window are split by column modulo stride, so that every tap
// of a vector of outputs is one contiguous load. And the table of windows that all of pool.cpp reads.
#pragma once

#include <limits>
#include <vector>

#include "common/pool.h"
#include "cpu/maxima.h"

namespace pyops::PYOPS_CPU_CAPABILITY {

using pool::Keep;
using pool::Range;
using pool::Shape;

// The windows of every output, the outputs of every input, and what averages divide by, counted once a call.
template <class acc_t>
struct Windows {
  struct Reach {
    int64_t first, last;
  };
  struct Axis {
    std::vector<Range> window;
    std::vector<Reach> reach;
    std::vector<acc_t> count;
    Axis(const pool::Dimension& d, bool include_padding, bool backward) {
      for (int64_t o = 0; o < d.out; ++o) {
        const Range r = window.emplace_back(d.window(o));
        const int64_t taps = r.stop > r.start ? (r.stop - r.start + r.step - 1) / r.step : 0;
        count.push_back(acc_t(include_padding ? d.padded_count(o) : taps));
      }
      for (int64_t i = 0; backward && i < d.in; ++i) reach.push_back({d.first_output(i), d.last_output(i)});
    }
  };
  Axis d, h, w;
  acc_t override_by;
  Windows(const Shape& s, bool backward, bool include_padding = false, int64_t divisor = 0)
      : d(s.d, include_padding, backward),
        h(s.h, include_padding, backward),
        w(s.w, include_padding, backward),
        override_by(acc_t(divisor)) {}
  acc_t row_count(int64_t od, int64_t oh) const { return d.count[size_t(od)] * h.count[size_t(oh)]; }
  // 1 / divisor for a row of outputs.
  void scales(int64_t od, int64_t oh, acc_t* to) const {
    const acc_t rows = row_count(od, oh);
    for (size_t o = 0; o < w.count.size(); ++o)
      to[o] = acc_t(1) / (override_by != acc_t(0) ? override_by : rows * w.count[o]);
  }
};

// Bytes to lanes and back.
template <class acc_t>
PYOPS_INLINE Mask<acc_t> load_taps(const uint8_t* p, AllLanes) {
#if defined(__AVX512F__)
  if constexpr (sizeof(acc_t) == 4)
    return simd::bits_as<Mask<acc_t>>(_mm512_maskz_cvtepu8_epi32(0xffff, simd::read<__m128i>(p)));
#elif defined(__AVX2__)
  if constexpr (sizeof(acc_t) == 4)
    return simd::bits_as<Mask<acc_t>>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#endif
  Mask<acc_t> taps{};
  for (int64_t i = 0; i < Vec<acc_t>::width; ++i) taps[i] = p[i];
  return taps;
}
template <class acc_t>
PYOPS_INLINE Mask<acc_t> load_taps(const uint8_t* p, FirstLanes lanes) {
  Mask<acc_t> taps{};
  for (int64_t i = 0; i < lanes.count; ++i) taps[i] = p[i];
  return taps;
}
template <class acc_t>
PYOPS_INLINE void store_taps(const Mask<acc_t>& tap, uint8_t* to, AllLanes) {
#if defined(__AVX512F__)
  if constexpr (sizeof(acc_t) == 4) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_maskz_cvtepi32_epi8(0xffff, simd::bits_as<__m512i>(tap)));
    return;
  }
#endif
  for (int64_t j = 0; j < Vec<acc_t>::width; ++j) to[j] = uint8_t(tap[j]);
}
template <class acc_t>
PYOPS_INLINE void store_taps(const Mask<acc_t>& tap, uint8_t* to, FirstLanes lanes) {
  for (int64_t j = 0; j < lanes.count; ++j) to[j] = uint8_t(tap[j]);
}

// Row x[0..in) into s.w.stride rows of `phase`: phase[c % stride][c / stride] = x[c - padding], `outside` beyond.
template <class acc_t, class scalar_t>
void split_row(const scalar_t* x, acc_t* phase, int64_t length, const pool::Dimension& w, acc_t outside) {
  using V = Vec<acc_t>;
  constexpr int64_t W = V::width;
  const int64_t used = w.in < w.stride * length - w.padding ? w.in : w.stride * length - w.padding;
  for (int64_t r = 0; r < w.stride; ++r) {
    acc_t* row = phase + r * length;
    const int64_t before = (w.padding - r + w.stride - 1) / w.stride;
    for (int64_t j = 0; j < before; ++j) row[j] = outside;
    const int64_t after = used + w.padding - r <= 0 ? 0 : (used + w.padding - r + w.stride - 1) / w.stride;
    for (int64_t j = after > before ? after : before; j < length; ++j) row[j] = outside;
  }
  if (w.stride == 1) {
    each_vector<acc_t>(used, [&](int64_t i, auto lanes) { V::load(x + i, lanes).store(phase + w.padding + i, lanes); });
    return;
  }
  int64_t i = 0;
  if (w.stride == 2) {
    acc_t* even = phase + (w.padding % 2) * length + w.padding / 2;
    acc_t* odd = phase + ((w.padding + 1) % 2) * length + (w.padding + 1) / 2;
    for (; i + 2 * W <= used; i += 2 * W) {
      const V a = V::load(x + i), b = V::load(x + i + W);
      [&]<size_t... k>(std::index_sequence<k...>) {
        V(__builtin_shufflevector(a.v, b.v, int(2 * k)...)).store(even + i / 2);
        V(__builtin_shufflevector(a.v, b.v, int(2 * k + 1)...)).store(odd + i / 2);
      }(std::make_index_sequence<size_t(W)>());
    }
  }
  for (; i < used; ++i) {
    const int64_t c = i + w.padding;
    phase[c % w.stride * length + c / w.stride] = acc_t(x[i]);
  }
}

// Sizes of the split rows of one window, and where in them the taps of a row begin.
struct Split {
  int64_t length, rows;
  std::vector<int64_t> tap;
  int64_t size(const Shape& s) const { return rows * s.w.stride * length; }
};
template <class acc_t>
Split split_of(const Shape& s) {
  const int64_t span = (s.w.kernel - 1) * s.w.dilation / s.w.stride + 1;
  Split split{ceil_div(s.w.out, Vec<acc_t>::width) * Vec<acc_t>::width + span, s.d.kernel * s.h.kernel, {}};
  for (int64_t k = 0; k < s.w.kernel; ++k)
    split.tap.push_back(k * s.w.dilation % s.w.stride * split.length + k * s.w.dilation / s.w.stride);
  return split;
}

// One output row, channels first: take(rows, ow, lanes) sees the split rows of the window.
template <class acc_t, class scalar_t, class Take>
void split_window_rows(const scalar_t* plane, const Shape& s, const Range& rd, const Range& rh, acc_t outside,
                       acc_t* buffer, const Split& split, const Take& take) {
  int64_t row = 0;
  for (int64_t z = rd.start; z < rd.stop; z += rd.step)
    for (int64_t y = rh.start; y < rh.stop; y += rh.step, ++row)
      split_row(plane + (z * s.h.in + y) * s.w.in, buffer + row * s.w.stride * split.length, split.length, s.w,
                outside);
  constexpr int64_t W = Vec<acc_t>::width;
  int64_t ow = 0;
  for (; ow + W <= s.w.out; ow += W) take(ow, AllLanes{});
  if (ow < s.w.out) take(ow, FirstLanes{s.w.out - ow});
}

// f(row of the buffer, kd, kh) for the window's rows.
template <class F>
PYOPS_INLINE void each_row_of(const Range& rd, const Range& rh, F&& f) {
  int64_t row = 0, kd = rd.first;
  for (int64_t z = rd.start; z < rd.stop; z += rd.step, ++kd) {
    int64_t kh = rh.first;
    for (int64_t y = rh.start; y < rh.stop; y += rh.step, ++kh, ++row) f(row, kd, kh);
  }
}

inline int64_t lanes_of(AllLanes, int64_t width) { return width; }
inline int64_t lanes_of(FirstLanes lanes, int64_t) { return lanes.count; }

template <bool keep, class scalar_t, class index_t, class acc_t>
void max_row_split(const scalar_t* plane, const Shape& s, int64_t od, int64_t oh, scalar_t* y, index_t* index,
                   acc_t* buffer, const Split& split) {
  using V = Vec<acc_t>;
  const Range rd = s.d.window(od), rh = s.h.window(oh);
  const int64_t kernel = s.w.kernel, step = s.w.stride * split.length;
  const int64_t* taps = split.tap.data();
  split_window_rows(plane, s, rd, rh, -std::numeric_limits<acc_t>::infinity(), buffer, split,
                    [&](int64_t ow, auto lanes) {
                      // Where every value is -inf the first tap inside the input is kept.
                      Best<acc_t> best{V(-std::numeric_limits<acc_t>::infinity()), Mask<acc_t>{}};
                      if constexpr (keep) {
                        best.tap += LaneOf<acc_t>(s.tap(rd.first, rh.first, 0));
                        for (int64_t j = 0; j < lanes_of(lanes, V::width) && (ow + j) * s.w.stride < s.w.padding; ++j)
                          best.tap[j] += LaneOf<acc_t>(s.w.window(ow + j).first);
                      }
                      each_row_of(rd, rh, [&](int64_t row, int64_t kd, int64_t kh) {
                        const acc_t* rows = buffer + row * step + ow;
                        const int64_t first = s.tap(kd, kh, 0);
                        for (int64_t kw = 0; kw < kernel; ++kw) {
                          const V v = V::load(rows + taps[kw]);
                          if constexpr (keep)
                            best.meet(v, first + kw);
                          else
                            best.value = max(v, best.value);
                        }
                      });
                      best.value.store(y + ow, lanes);
                      if constexpr (keep && sizeof(index_t) == 1)
                        store_taps<acc_t>(best.tap, index + ow, lanes);
                      else if constexpr (keep)
                        for (int64_t j = 0; j < lanes_of(lanes, V::width); ++j)
                          index[ow + j] = s.position(od, oh, ow + j, int64_t(best.tap[j]));
                    });
}

template <class scalar_t, class acc_t>
void avg_row_split(const scalar_t* plane, const Shape& s, int64_t od, int64_t oh, scalar_t* y, const acc_t* scale,
                   acc_t* buffer, const Split& split) {
  using V = Vec<acc_t>;
  const Range rd = s.d.window(od), rh = s.h.window(oh);
  const int64_t kernel = s.w.kernel, step = s.w.stride * split.length;
  const int64_t* taps = split.tap.data();
  split_window_rows(plane, s, rd, rh, acc_t(0), buffer, split, [&](int64_t ow, auto lanes) {
    V total;
    each_row_of(rd, rh, [&](int64_t row, int64_t, int64_t) {
      const acc_t* rows = buffer + row * step + ow;
      for (int64_t kw = 0; kw < kernel; ++kw) total += V::load(rows + taps[kw]);
    });
    (total * V::load(scale + ow, lanes)).store(y + ow, lanes);
  });
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY
