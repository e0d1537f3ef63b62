// Depthwise convolution on planes (NCHW): every channel is an image of its own, filtered directly.
//
// A tile of the input is copied once, with its border of zeros, into a scratch tile in fp32. There a row is stored
// phase by phase, x[phase][i] = row[i*step + phase], so that tap t of W neighbouring outputs is one vector for every
// stride. A vector of one input row serves all filter rows while it is in a register: the outputs of `rows` rows are
// summed at a time. The gradient in the input is the same for each phase of its positions (common/conv.h).
#pragma once

#include "common/conv.h"
#include "cpu/conv_epilogue.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace pyops::PYOPS_CPU_CAPABILITY::depthwise {

using conv::Axis;
using conv::Sizes;
using conv::Space;

// Scratch of one tile: [taps_d][rows][phases][pitch].
template <class acc_t>
struct Scratch {
  int64_t rows, phases, pitch;
  Buffer<acc_t> data;
  Scratch(const Space& s, int64_t tile_h, int64_t tile_w)
      : rows(int64_t(tile_h - 1) * s.h.in_step + int64_t(s.h.taps - 1) * std::abs(s.h.tap_step) + 1),
        phases(s.w.in_step),
        pitch(ceil_div(tile_w + ceil_div(int64_t(s.w.taps - 1) * std::abs(s.w.tap_step) + 1, s.w.in_step),
                       Vec<acc_t>::width) *
                  Vec<acc_t>::width +
              Vec<acc_t>::width),
        data(s.d.taps * rows * phases * pitch) {}
  acc_t* row(int64_t d, int64_t r) { return data.get() + (d * rows + r) * phases * pitch; }
};

// Least input coordinate that output o reads: taps may run backwards.
inline int64_t low(const Axis& a, int64_t o) { return a.input(int32_t(o), a.tap_step < 0 ? a.taps - 1 : 0); }

// What `width` outputs from (od, oh, ow) on read; what is computed beside them may read anything.
template <class acc_t, class T>
void fill(Scratch<acc_t>& t, const Space& s, const T* plane, int64_t od, int64_t oh, int64_t ow, int64_t width) {
  const int64_t h0 = low(s.h, oh), w0 = low(s.w, ow);
  const int64_t length = width + ceil_div(int64_t(s.w.taps - 1) * std::abs(s.w.tap_step) + 1, t.phases);
  for (int64_t jd = 0; jd < s.d.taps; ++jd) {
    const int64_t d = s.d.input(int32_t(od), int32_t(jd));
    for (int64_t r = 0; r < t.rows; ++r) {
      acc_t* to = t.row(jd, r);
      const int64_t h = h0 + r;
      if (d < 0 || d >= s.d.size || h < 0 || h >= s.h.size) {
        std::memset(to, 0, size_t(t.phases * t.pitch) * sizeof(acc_t));
        continue;
      }
      const T* row = plane + (d * s.h.size + h) * s.w.size;
      if (t.phases == 1) {
        const int64_t begin = std::clamp<int64_t>(-w0, 0, length), end = std::clamp(s.w.size - w0, begin, length);
        for (int64_t i = 0; i < begin; ++i) to[i] = 0;
        each_vector<acc_t>(end - begin, [&](int64_t i, auto lanes) {
          Vec<acc_t>::load(row + w0 + begin + i, lanes).store(to + begin + i, lanes);
        });
        for (int64_t i = end; i < length; ++i) to[i] = 0;
        continue;
      }
      for (int64_t phase = 0; phase < t.phases; ++phase, to += t.pitch)
        for (int64_t i = 0; i < length; ++i) {
          const int64_t w = w0 + i * t.phases + phase;
          to[i] = w >= 0 && w < s.w.size ? acc_t(row[w]) : acc_t(0);
        }
    }
  }
}

// Offset of tap (jh, jw) from output (0, 0) in the scratch tile.
class Offsets {
 public:
  template <class acc_t>
  Offsets(const Scratch<acc_t>& t, const Space& s) : s_(s), columns_(size_t(s.w.taps)) {
    for (int64_t jw = 0; jw < s.w.taps; ++jw) {
      const int64_t at = (s.w.tap_step < 0 ? (s.w.taps - 1 - jw) : jw) * std::abs(s.w.tap_step);
      columns_[size_t(jw)] = at % t.phases * t.pitch + at / t.phases;
    }
  }
  int64_t row(int64_t jh) const { return (s_.h.tap_step < 0 ? (s_.h.taps - 1 - jh) : jh) * std::abs(s_.h.tap_step); }
  int64_t column(int64_t jw) const { return columns_[size_t(jw)]; }

 private:
  const Space& s_;
  std::vector<int64_t> columns_;
};

// `rows` output rows of the tile, from row o on, one or two vectors wide. TapsH > 0: filter rows with a step of one
// input row known to the compiler, so that each vector of the input is loaded once for all of them.
template <int rows, int vectors, int TapsH, class acc_t>
void outputs(Scratch<acc_t>& t, const Space& s, const Offsets& at, const acc_t* w, int64_t o, int64_t column,
             acc_t* result) {
  using V = Vec<acc_t>;
  const int64_t step = t.phases * t.pitch;
  V sum[rows][vectors];
  for (int64_t jd = 0; jd < s.d.taps; ++jd) {
    const acc_t* base = t.row(jd, o * s.h.in_step) + column;
    const acc_t* filter = w + jd * s.h.taps * s.w.taps;
    for (int64_t jw = 0; jw < s.w.taps; ++jw) {
      const acc_t* x = base + at.column(jw);
      if constexpr (TapsH > 0) {
        V weight[TapsH];
#pragma GCC unroll 8
        for (int jh = 0; jh < TapsH; ++jh)
          weight[jh] = V(filter[(s.h.tap_step < 0 ? TapsH - 1 - jh : jh) * s.w.taps + jw]);
#pragma GCC unroll 16
        for (int r = 0; r < rows + TapsH - 1; ++r)
#pragma GCC unroll 2
          for (int v = 0; v < vectors; ++v) {
            const V value = V::load(x + r * step + v * V::width);
#pragma GCC unroll 8
            for (int jh = 0; jh < TapsH; ++jh)
              if (r - jh >= 0 && r - jh < rows) sum[r - jh][v] = fma(value, weight[jh], sum[r - jh][v]);
          }
      } else {
        for (int64_t jh = 0; jh < s.h.taps; ++jh) {
          const V weight(filter[jh * s.w.taps + jw]);
          const acc_t* from = x + at.row(jh) * step;
#pragma GCC unroll 8
          for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
            for (int v = 0; v < vectors; ++v)
              sum[r][v] = fma(V::load(from + r * s.h.in_step * step + v * V::width), weight, sum[r][v]);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) sum[r][v].store(result + (r * 2 + v) * V::width);
}

// The same with the number of filter rows looked up; result: [rows][2 vectors].
template <int rows, class acc_t>
void outputs_of(Scratch<acc_t>& t, const Space& s, const Offsets& at, const acc_t* w, int64_t o, int64_t column,
                bool one, acc_t* result) {
  const auto run = [&]<int TapsH>() {
    if (one)
      outputs<rows, 1, TapsH>(t, s, at, w, o, column, result);
    else
      outputs<rows, 2, TapsH>(t, s, at, w, o, column, result);
  };
  if constexpr (std::is_same_v<acc_t, float>) {
    if (s.h.in_step == 1 && std::abs(s.h.tap_step) == 1) {
      if (s.h.taps == 3) return run.template operator()<3>();
      if (s.h.taps == 5) return run.template operator()<5>();
      if (s.h.taps == 7) return run.template operator()<7>();
    }
  }
  run.template operator()<0>();
}

inline constexpr int64_t tile_height = 32, tile_width = 512, group = 4;

// All channels of all examples. Filter m of channel c is w + (c * multiplier + m) * taps for the forward, where the
// output plane is c * multiplier + m; for the gradient (`transposed`) planes of the input take the filters' numbers,
// and the output plane sums `multiplier` of them.
template <class scalar_t>
void planes(const Space& s, int64_t N, int64_t C, int64_t multiplier, bool transposed, const accumulate_t<scalar_t>* w,
            const scalar_t* x, const Epilogue<scalar_t>& epilogue, scalar_t* y) {
  using acc_t = accumulate_t<scalar_t>;
  using V = Vec<acc_t>;
  const int64_t taps = s.taps(), in_plane = s.in_plane(), out_plane = s.out_plane();
  const int64_t th = std::min<int64_t>(tile_height, ceil_div(s.h.count, group) * group);
  const int64_t tw = std::min<int64_t>(tile_width, ceil_div(s.w.count, V::width) * V::width);
  const int64_t outer = transposed ? C : C * multiplier, sums = transposed ? multiplier : 1;
  parallel_for(
      N * outer, ceil_div(1 << 15, std::max<int64_t>(s.positions() * taps * sums, 1)), [&](int64_t begin, int64_t end) {
        Scratch<acc_t> t(s, th, tw + V::width);
        const Offsets at(t, s);
        Buffer<acc_t> totals(sums > 1 ? th * tw : 0);
        for (int64_t plane = begin; plane < end; ++plane) {
          const int64_t n = plane / outer, k = plane % outer;
          scalar_t* out = y + plane * out_plane;
          const V add(epilogue.bias ? acc_t(epilogue.bias[k]) : acc_t(0));
          for (int64_t od = 0; od < s.d.count; ++od)
            for (int64_t oh = 0; oh < s.h.count; oh += th)
              for (int64_t ow = 0; ow < s.w.count; ow += tw) {
                const int64_t height = std::min<int64_t>(th, s.h.count - oh),
                              width = std::min<int64_t>(tw, s.w.count - ow);
                for (int64_t part = 0; part < sums; ++part) {
                  const int64_t filter = transposed ? k * multiplier + part : k;
                  const int64_t source = transposed ? n * C * multiplier + filter : n * C + k / multiplier;
                  if (taps > 0) fill(t, s, x + source * in_plane, od, oh, ow, width);
                  const acc_t* f = w + filter * taps;
                  alignas(64) acc_t result[group * 2 * V::width];
                  for (int64_t r = 0; r < height; r += group)
                    for (int64_t column = 0; column < width; column += 2 * V::width) {
                      const int64_t count = std::min<int64_t>(2 * V::width, width - column), step = s.w.out_step;
                      outputs_of<group>(t, s, at, f, r, column, count <= V::width, result);
                      const int64_t used = std::min<int64_t>(group, height - r);
                      const auto target = [&](int64_t i) {
                        const int64_t h = s.h.out_base + (oh + r + i) * s.h.out_step;
                        return out + ((s.d.out_base + od * s.d.out_step) * s.h.out_size + h) * s.w.out_size +
                               s.w.out_base + (ow + column) * step;
                      };
                      if (sums == 1 && step == 1 && epilogue.plain()) {
                        for (int64_t i = 0; i < used; ++i)
                          each_vector<acc_t>(count, [&, to = target(i)](int64_t e, auto lanes) {
                            (V::load(result + i * 2 * V::width + e, lanes) + add).store(to + e, lanes);
                          });
                        continue;
                      }
                      for (int64_t i = 0; i < used; ++i) {
                        acc_t* from = result + i * 2 * V::width;
                        acc_t* total = totals.get() + (r + i) * tw + column;  // of the parts before
                        each_vector<acc_t>(count, [&](int64_t e, auto lanes) {
                          const V before = part > 0 ? V::load(total + e, lanes) : add;
                          (V::load(from + e, lanes) + before).store(part + 1 < sums ? total + e : from + e, lanes);
                        });
                      }
                      if (part + 1 < sums) continue;
                      if (!epilogue.plain()) {
                        for (int64_t i = 0; i < used; ++i)
                          epilogue.add_residual(result + i * 2 * V::width, target(i) - y, count);
                        epilogue.activate(result, used * 2 * V::width);
                      }
                      for (int64_t i = 0; i < used; ++i) {
                        const acc_t* from = result + i * 2 * V::width;
                        scalar_t* to = target(i);
                        if (step == 1)
                          narrow(to, from, count);
                        else
                          for (int64_t e = 0; e < count; ++e) to[e * step] = scalar_t(from[e]);
                      }
                    }
                }
              }
        }
      });
}

// part[p][(c, m)][tap] = sum over the examples of part p and their positions of dy * x.
template <class scalar_t>
void weight_gradient_planes(const Space& s, int64_t N, int64_t C, int64_t multiplier, int64_t parts, const scalar_t* dy,
                            const scalar_t* x, accumulate_t<scalar_t>* part) {
  using acc_t = accumulate_t<scalar_t>;
  using V = Vec<acc_t>;
  const int64_t taps = s.taps(), in_plane = s.in_plane(), positions = s.positions(), K = C * multiplier;
  const int64_t th = std::min<int64_t>(tile_height, s.h.count);
  const int64_t tw = std::min<int64_t>(tile_width, ceil_div(s.w.count, V::width) * V::width);
  const int64_t work = ceil_div(N, parts) * positions * taps * multiplier;
  parallel_for(parts * C, ceil_div(1 << 15, std::max<int64_t>(work, 1)), [&](int64_t begin, int64_t end) {
    Scratch<acc_t> t(s, th, tw);
    const Offsets at(t, s);
    Buffer<acc_t> rows(th * tw);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t p = task / C, c = task % C;
      acc_t* to = part + (p * K + c * multiplier) * taps;
      std::memset(to, 0, size_t(multiplier * taps) * sizeof(acc_t));
      for (int64_t n = p * N / parts; n < (p + 1) * N / parts; ++n)
        for (int64_t od = 0; od < s.d.count; ++od)
          for (int64_t oh = 0; oh < s.h.count; oh += th)
            for (int64_t ow = 0; ow < s.w.count; ow += tw) {
              const int64_t height = std::min<int64_t>(th, s.h.count - oh),
                            width = std::min<int64_t>(tw, s.w.count - ow);
              fill(t, s, x + (n * C + c) * in_plane, od, oh, ow, width);
              for (int64_t m = 0; m < multiplier; ++m) {
                const scalar_t* from =
                    dy + (n * K + c * multiplier + m) * positions + (od * s.h.count + oh) * s.w.count + ow;
                for (int64_t r = 0; r < height; ++r)
                  for (int64_t i = 0; i < tw; i += V::width) {
                    const int64_t count = std::clamp<int64_t>(width - i, 0, V::width);
                    keep(V::load(from + r * s.w.count + i, FirstLanes{count}), FirstLanes{count})
                        .store(rows.get() + r * tw + i);
                  }
                for (int64_t jd = 0; jd < s.d.taps; ++jd)
                  for (int64_t jh = 0; jh < s.h.taps; ++jh)
                    for (int64_t jw0 = 0; jw0 < s.w.taps; jw0 += 4) {
                      const int64_t n_taps = std::min<int64_t>(4, s.w.taps - jw0);
                      V sum[4];
                      int64_t column[4];
                      for (int64_t j = 0; j < 4; ++j) column[j] = at.column(jw0 + std::min(j, n_taps - 1));
                      for (int64_t r = 0; r < height; ++r) {
                        const acc_t* row = t.row(jd, r * s.h.in_step + at.row(jh));
                        const acc_t* g = rows.get() + r * tw;
                        each_vector<acc_t>(width, [&](int64_t i, auto lanes) {
                          const V value = V::load(g + i);
#pragma GCC unroll 4
                          for (int j = 0; j < 4; ++j)
                            // past the end of the row a zero of dy must not meet an infinity of x
                            sum[j] = fma(value, keep(V::load(row + column[j] + i), lanes), sum[j]);
                        });
                      }
                      for (int64_t j = 0; j < n_taps; ++j)
                        to[(m * s.d.taps + jd) * s.h.taps * s.w.taps + jh * s.w.taps + jw0 + j] +=
                            pyops::PYOPS_CPU_CAPABILITY::sum(sum[j]);
                    }
              }
            }
    }
  });
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY::depthwise
