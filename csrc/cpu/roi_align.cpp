// roi_align · CPU
//   y[r,c,p,q] = mean over the samples of bin (p, q) of RoI r, bilinear in x[n_r, c]       (common/roi.h)
// layout   x_l: [N, C, H_l, W_l] or, channels_last, [N, H_l, W_l, C] · y likewise over (P, Q)
//          rois: [R, 5] in pixels of its level · levels: [R] or none, then all RoIs are of level 0
// mapping  the mean is separable: taps (pixel, weight) per bin and axis, equal pixels merged. NCHW: lanes over width,
//          all taps of rows first, then of columns. NHWC: lanes over channels. Forward: threads over RoIs and blocks
//          of channels. Backward: a thread owns a block of channels of one image and meets its RoIs in order, so no
//          two threads write one address. Position sensitive: a bin's channels lie P Q planes apart in either layout;
//          backward on NHWC a thread owns rows of pixels
// memory   backward: dx alone; half types one more float block per thread
// numerics sums in acc_t; positions in double: an error of theirs is an error of the shares, times the step in x
#include "common/roi.h"

#include <algorithm>
#include <array>
#include <vector>

#include "common/registry.h"
#include "cpu/parallel.h"
#include "cpu/position_sensitive.h"
#include "cpu/simd.h"

namespace pyops::PYOPS_CPU_CAPABILITY {

inline constexpr int max_levels = 5;
inline constexpr int64_t channel_block = 64;

// ---- kernels

struct Map {
  int64_t H = 0, W = 0;
};

struct Problem {
  int64_t N, C, R, P, Q, sampling_ratio;
  bool aligned;
  std::array<Map, max_levels> maps;
};

// Weighted pixels of every bin along one axis.
template <class acc_t>
struct Taps {
  std::vector<int64_t> begin, pixel;
  std::vector<acc_t> weight;
  int64_t low = 0, high = -1;  // pixels touched

  void build(const roi::Axis<double>& axis, int64_t bins) {
    begin.assign(1, 0);
    pixel.clear();
    weight.clear();
    low = axis.size;
    high = -1;
    const double share_of_sample = 1.0 / double(std::max<int64_t>(axis.grid, 1));
    for (int64_t p = 0; p < bins; ++p) {
      int64_t first, last;
      axis.samples(p, first, last);
      for (int64_t i = first; i < last; ++i) {
        int64_t a, b;
        double share;
        if (!axis.neighbours(axis.position(p, i), a, b, share)) continue;
        add(begin.back(), a, acc_t((1.0 - share) * share_of_sample));
        if (share > 0.0) add(begin.back(), b, acc_t(share * share_of_sample));
      }
      begin.push_back(int64_t(pixel.size()));
    }
  }

 private:
  // Samples follow each other, so an equal pixel is among the last two.
  void add(int64_t from, int64_t at, acc_t w) {
    for (int64_t k = int64_t(pixel.size()) - 1; k >= from && k >= int64_t(pixel.size()) - 2; --k)
      if (pixel[size_t(k)] == at) {
        weight[size_t(k)] += w;
        return;
      }
    pixel.push_back(at);
    weight.push_back(w);
    low = std::min(low, at);
    high = std::max(high, at);
  }
};

template <class acc_t>
struct Region {
  Taps<acc_t> y, x;
  std::vector<acc_t> line;  // one row of the intermediate result

  void build(const acc_t* roi, const Map& map, const Problem& s) {
    y.build(roi::Axis<double>(roi[2], roi[4], s.P, map.H, s.sampling_ratio, s.aligned), s.P);
    x.build(roi::Axis<double>(roi[1], roi[3], s.Q, map.W, s.sampling_ratio, s.aligned), s.Q);
    line.resize(size_t(std::max<int64_t>(x.high - x.low + 1, 1)));
  }
  bool empty() const { return y.pixel.empty() || x.pixel.empty(); }
};

// out[P, Q] of one channel plane.
template <class scalar_t, class acc_t>
void plane_fwd(const scalar_t* __restrict__ x, scalar_t* __restrict__ out, Region<acc_t>& g, int64_t W, int64_t P,
               int64_t Q) {
  using V = Vec<acc_t>;
  acc_t* __restrict__ line = g.line.data();
  const int64_t width = g.x.high - g.x.low + 1;
  for (int64_t p = 0; p < P; ++p) {
    const int64_t first = g.y.begin[size_t(p)], last = g.y.begin[size_t(p) + 1];
    each_vector<acc_t>(width, [&](int64_t i, auto lanes) {
      V sum;
      for (int64_t k = first; k < last; ++k)
        sum = fma(V(g.y.weight[size_t(k)]), V::load(x + g.y.pixel[size_t(k)] * W + g.x.low + i, lanes), sum);
      sum.store(line + i, lanes);
    });
    for (int64_t q = 0; q < Q; ++q) {
      acc_t sum = 0;
      for (int64_t k = g.x.begin[size_t(q)]; k < g.x.begin[size_t(q) + 1]; ++k)
        sum += g.x.weight[size_t(k)] * line[g.x.pixel[size_t(k)] - g.x.low];
      out[p * Q + q] = scalar_t(sum);
    }
  }
}

// Adds the gradient of one channel plane.
template <class scalar_t, class acc_t>
void plane_bwd(const scalar_t* __restrict__ dy, acc_t* __restrict__ dx, Region<acc_t>& g, int64_t W, int64_t P,
               int64_t Q) {
  using V = Vec<acc_t>;
  acc_t* __restrict__ line = g.line.data();
  const int64_t width = g.x.high - g.x.low + 1;
  for (int64_t p = 0; p < P; ++p) {
    std::fill(line, line + width, acc_t(0));
    for (int64_t q = 0; q < Q; ++q) {
      const acc_t d = acc_t(dy[p * Q + q]);
      for (int64_t k = g.x.begin[size_t(q)]; k < g.x.begin[size_t(q) + 1]; ++k)
        line[g.x.pixel[size_t(k)] - g.x.low] += g.x.weight[size_t(k)] * d;
    }
    for (int64_t k = g.y.begin[size_t(p)]; k < g.y.begin[size_t(p) + 1]; ++k) {
      acc_t* row = dx + g.y.pixel[size_t(k)] * W + g.x.low;
      const V w(g.y.weight[size_t(k)]);
      each_vector<acc_t>(width, [&](int64_t i, auto lanes) {
        fma(w, V::load(line + i, lanes), V::load(row + i, lanes)).store(row + i, lanes);
      });
    }
  }
}

// Channels [0, count) of every bin, lanes over channels; strides C between pixels and bins.
template <class scalar_t, class acc_t>
void pixels_fwd(const scalar_t* __restrict__ x, scalar_t* __restrict__ out, const Region<acc_t>& g, int64_t W,
                int64_t P, int64_t Q, int64_t C, int64_t count) {
  using V = Vec<acc_t>;
  constexpr int64_t width = V::width;
  for (int64_t p = 0; p < P; ++p)
    for (int64_t q = 0; q < Q; ++q) {
      scalar_t* to = out + (p * Q + q) * C;
      const auto over_taps = [&](auto&& f) {
        for (int64_t j = g.y.begin[size_t(p)]; j < g.y.begin[size_t(p) + 1]; ++j)
          for (int64_t k = g.x.begin[size_t(q)]; k < g.x.begin[size_t(q) + 1]; ++k)
            f(x + (g.y.pixel[size_t(j)] * W + g.x.pixel[size_t(k)]) * C,
              V(g.y.weight[size_t(j)] * g.x.weight[size_t(k)]));
      };
      int64_t c = 0;
      for (; c + 4 * width <= count; c += 4 * width) {
        V s0, s1, s2, s3;
        over_taps([&](const scalar_t* from, const V& w) {
          s0 = fma(w, V::load(from + c), s0);
          s1 = fma(w, V::load(from + c + width), s1);
          s2 = fma(w, V::load(from + c + 2 * width), s2);
          s3 = fma(w, V::load(from + c + 3 * width), s3);
        });
        s0.store(to + c);
        s1.store(to + c + width);
        s2.store(to + c + 2 * width);
        s3.store(to + c + 3 * width);
      }
      each_vector<acc_t>(count - c, [&](int64_t i, auto lanes) {
        V sum;
        over_taps([&](const scalar_t* from, const V& w) { sum = fma(w, V::load(from + c + i, lanes), sum); });
        sum.store(to + c + i, lanes);
      });
    }
}

// As pixels_fwd; dx has `stride` channels per pixel, dy has C per bin.
template <class scalar_t, class acc_t>
void pixels_bwd(const scalar_t* __restrict__ dy, acc_t* __restrict__ dx, const Region<acc_t>& g, int64_t W, int64_t P,
                int64_t Q, int64_t C, int64_t stride, int64_t count) {
  using V = Vec<acc_t>;
  for (int64_t p = 0; p < P; ++p)
    for (int64_t q = 0; q < Q; ++q)
      for (int64_t j = g.y.begin[size_t(p)]; j < g.y.begin[size_t(p) + 1]; ++j)
        for (int64_t k = g.x.begin[size_t(q)]; k < g.x.begin[size_t(q) + 1]; ++k) {
          acc_t* to = dx + (g.y.pixel[size_t(j)] * W + g.x.pixel[size_t(k)]) * stride;
          const V w(g.y.weight[size_t(j)] * g.x.weight[size_t(k)]);
          const scalar_t* from = dy + (p * Q + q) * C;
          each_vector<acc_t>(count, [&](int64_t c, auto lanes) {
            fma(w, V::load(from + c, lanes), V::load(to + c, lanes)).store(to + c, lanes);
          });
        }
}

// Position sensitive: channels [0, count) of every bin, `together` of them at a time.
template <class scalar_t, class acc_t>
void sensitive_fwd(const scalar_t* __restrict__ x, scalar_t* __restrict__ out, const Region<acc_t>& g,
                   const PositionSteps& step, int64_t W, int64_t P, int64_t Q, int64_t count) {
  constexpr int64_t together = 8;
  const int64_t to_channel = P * Q * step.plane;
  for (int64_t p = 0; p < P; ++p)
    for (int64_t q = 0; q < Q; ++q)
      for (int64_t c = 0; c < count; c += together) {
        const scalar_t* from = x + c * to_channel + (p * Q + q) * step.plane;
        const int64_t n = std::min(together, count - c);
        std::array<acc_t, together> sum{};
        for (int64_t j = g.y.begin[size_t(p)]; j < g.y.begin[size_t(p) + 1]; ++j)
          for (int64_t k = g.x.begin[size_t(q)]; k < g.x.begin[size_t(q) + 1]; ++k) {
            const acc_t w = g.y.weight[size_t(j)] * g.x.weight[size_t(k)];
            const scalar_t* pixel = from + (g.y.pixel[size_t(j)] * W + g.x.pixel[size_t(k)]) * step.pixel;
            for (int64_t v = 0; v < n; ++v) sum[size_t(v)] += w * acc_t(pixel[v * to_channel]);
          }
        scalar_t* to = out + (p * Q + q) * step.bin + c * step.channel;
        for (int64_t v = 0; v < n; ++v) to[v * step.channel] = scalar_t(sum[size_t(v)]);
      }
}

// Adds the gradient of all channels to the pixels of rows [row0, row1), channels last; dx begins at row0.
template <class scalar_t, class acc_t>
void sensitive_rows_bwd(const scalar_t* __restrict__ dy, acc_t* __restrict__ dx, const Region<acc_t>& g, int64_t W,
                        int64_t row0, int64_t row1, int64_t P, int64_t Q, int64_t C) {
  const int64_t bins = P * Q, channels = C / bins;
  for (int64_t p = 0; p < P; ++p)
    for (int64_t j = g.y.begin[size_t(p)]; j < g.y.begin[size_t(p) + 1]; ++j) {
      const int64_t row = g.y.pixel[size_t(j)];
      if (row < row0 || row >= row1) continue;
      for (int64_t q = 0; q < Q; ++q) {
        const scalar_t* from = dy + (p * Q + q) * channels;
        for (int64_t k = g.x.begin[size_t(q)]; k < g.x.begin[size_t(q) + 1]; ++k) {
          acc_t* to = dx + ((row - row0) * W + g.x.pixel[size_t(k)]) * C + p * Q + q;
          const acc_t w = g.y.weight[size_t(j)] * g.x.weight[size_t(k)];
          for (int64_t c = 0; c < channels; ++c) to[c * bins] += w * acc_t(from[c]);
        }
      }
    }
}

template <class scalar_t>
struct Levels {
  std::array<const scalar_t*, max_levels> x{};
  std::array<scalar_t*, max_levels> dx{};
  int count = 0;
};

// Level and image of every RoI; throws where there is no such image or level.
inline std::vector<std::pair<int, int64_t>> places(const OpScope& op, const auto* rois, const int64_t* levels,
                                                   const Problem& s, int count) {
  std::vector<std::pair<int, int64_t>> found(size_t(s.R), {0, 0});
  for (int64_t r = 0; r < s.R; ++r) {
    const int64_t level = levels != nullptr ? levels[r] : 0, image = roi::image_of(rois[r * 5], s.N);
    op.check(image >= 0, "argument 'boxes': got image index ", double(rois[r * 5]), " in row ", r,
             ", expected 0 <= index < ", s.N);
    op.check(level >= 0 && level < count, "argument 'levels': got ", level, " in row ", r, ", expected 0 <= level < ",
             count);
    found[size_t(r)] = {int(level), image};
  }
  return found;
}

template <class scalar_t>
void align_fwd(const Levels<scalar_t>& levels, const accumulate_t<scalar_t>* rois,
               const std::vector<std::pair<int, int64_t>>& place, scalar_t* y, const Problem& s, bool channels_last,
               bool position_sensitive) {
  using acc_t = accumulate_t<scalar_t>;
  const int64_t bins = s.P * s.Q, channels = position_sensitive ? s.C / bins : s.C;
  const int64_t blocks = ceil_div(channels, channel_block);
  parallel_for(s.R * blocks, 1, [&](int64_t begin, int64_t end) {
    Region<acc_t> g;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t r = item / blocks, c0 = item % blocks * channel_block, c1 = std::min(channels, c0 + channel_block);
      const auto [level, n] = place[size_t(r)];
      const Map map = s.maps[size_t(level)];
      if (item == begin || c0 == 0) g.build(rois + r * 5, map, s);
      const scalar_t* x = levels.x[size_t(level)];
      if (position_sensitive) {
        const PositionSteps step(s.C, map.H * map.W, bins, channels_last);
        sensitive_fwd(x + n * s.C * map.H * map.W + c0 * bins * step.plane, y + r * channels * bins + c0 * step.channel,
                      g, step, map.W, s.P, s.Q, c1 - c0);
        continue;
      }
      if (channels_last) {
        pixels_fwd(x + n * map.H * map.W * s.C + c0, y + r * bins * s.C + c0, g, map.W, s.P, s.Q, s.C, c1 - c0);
        continue;
      }
      for (int64_t c = c0; c < c1; ++c) {
        scalar_t* out = y + (r * channels + c) * bins;
        if (g.empty())
          std::fill(out, out + bins, scalar_t(acc_t(0)));
        else
          plane_fwd(x + (n * s.C + c) * map.H * map.W, out, g, map.W, s.P, s.Q);
      }
    }
  });
}

// All RoIs of image n and level on channels [c0, c1) into dx, which has `stride` channels per pixel when channels_last.
template <class scalar_t, class acc_t>
void block_bwd(const scalar_t* dy, const acc_t* rois, const std::vector<int64_t>& mine, acc_t* dx, const Map& map,
               const Problem& s, int64_t c0, int64_t c1, int64_t stride, bool channels_last, bool position_sensitive,
               Region<acc_t>& g) {
  const int64_t bins = s.P * s.Q, channels = position_sensitive ? s.C / bins : s.C;
  for (const int64_t r : mine) {
    g.build(rois + r * 5, map, s);
    if (g.empty()) continue;
    if (channels_last) {
      pixels_bwd(dy + r * bins * s.C + c0, dx, g, map.W, s.P, s.Q, s.C, stride, c1 - c0);
      continue;
    }
    for (int64_t c = c0; c < c1; ++c) {
      acc_t* plane = dx + (c - c0) * map.H * map.W;
      if (!position_sensitive) {
        plane_bwd(dy + (r * channels + c) * bins, plane, g, map.W, s.P, s.Q);
        continue;
      }
      const int64_t p = c / s.Q % s.P, q = c % s.Q;
      const acc_t d = acc_t(dy[(r * channels + c / bins) * bins + p * s.Q + q]);
      for (int64_t j = g.y.begin[size_t(p)]; j < g.y.begin[size_t(p) + 1]; ++j)
        for (int64_t k = g.x.begin[size_t(q)]; k < g.x.begin[size_t(q) + 1]; ++k)
          plane[g.y.pixel[size_t(j)] * map.W + g.x.pixel[size_t(k)]] +=
              g.y.weight[size_t(j)] * g.x.weight[size_t(k)] * d;
    }
  }
}

// Position sensitive, channels last: a thread owns rows of pixels with all their channels, which lie together.
template <class scalar_t>
void sensitive_bwd(const scalar_t* dy, const accumulate_t<scalar_t>* rois,
                   const std::vector<std::vector<int64_t>>& of_place, const Levels<scalar_t>& levels,
                   const Problem& s) {
  using acc_t = accumulate_t<scalar_t>;
  constexpr int64_t in_cache = 1 << 16;
  for (int level = 0; level < levels.count; ++level) {
    const Map map = s.maps[size_t(level)];
    const int64_t line = map.W * s.C, most = in_cache / std::max<int64_t>(line, 1);
    const int64_t height = std::clamp<int64_t>(most, 1, ceil_div(std::max<int64_t>(map.H, 1), 8));
    const int64_t bands = ceil_div(map.H, height);
    parallel_for(s.N * bands, 1, [&](int64_t begin, int64_t end) {
      Region<acc_t> g;
      std::vector<acc_t> wide;
      for (int64_t item = begin; item < end; ++item) {
        const int64_t n = item / bands, row0 = item % bands * height, row1 = std::min(map.H, row0 + height);
        const int64_t count = (row1 - row0) * line;
        scalar_t* band = levels.dx[size_t(level)] + (n * map.H + row0) * line;
        acc_t* sums;
        if constexpr (std::is_same_v<scalar_t, acc_t>) {
          std::fill(band, band + count, scalar_t(0));
          sums = band;
        } else {
          wide.assign(size_t(count), acc_t(0));
          sums = wide.data();
        }
        for (const int64_t r : of_place[size_t(level * s.N + n)]) {
          g.build(rois + r * 5, map, s);
          if (g.empty() || g.y.high < row0 || g.y.low >= row1) continue;
          sensitive_rows_bwd(dy + r * s.C, sums, g, map.W, row0, row1, s.P, s.Q, s.C);
        }
        if constexpr (!std::is_same_v<scalar_t, acc_t>) narrow(band, sums, count);
      }
    });
  }
}

template <class scalar_t>
void align_bwd(const scalar_t* dy, const accumulate_t<scalar_t>* rois,
               const std::vector<std::pair<int, int64_t>>& place, const Levels<scalar_t>& levels, const Problem& s,
               bool channels_last, bool position_sensitive) {
  using acc_t = accumulate_t<scalar_t>;
  std::vector<std::vector<int64_t>> of_place(size_t(levels.count * s.N));
  for (int64_t r = 0; r < s.R; ++r)
    of_place[size_t(place[size_t(r)].first * s.N + place[size_t(r)].second)].push_back(r);
  if (position_sensitive && channels_last) return sensitive_bwd(dy, rois, of_place, levels, s);
  const int64_t size = std::min<int64_t>(channels_last ? channel_block : 16, std::max<int64_t>(s.C, 1));
  const int64_t blocks = ceil_div(s.C, size);
  parallel_for(int64_t(levels.count) * s.N * blocks, 1, [&](int64_t begin, int64_t end) {
    Region<acc_t> g;
    std::vector<acc_t> wide;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t at = item / blocks, level = at / s.N, n = at % s.N, c0 = item % blocks * size,
                    c1 = std::min(s.C, c0 + size), count = c1 - c0;
      const Map map = s.maps[size_t(level)];
      const int64_t pixels = map.H * map.W;
      scalar_t* dx = levels.dx[size_t(level)];
      const auto& mine = of_place[size_t(at)];
      if constexpr (std::is_same_v<scalar_t, acc_t>) {
        if (!channels_last) {
          scalar_t* block = dx + (n * s.C + c0) * pixels;
          std::fill(block, block + count * pixels, scalar_t(0));
          block_bwd(dy, rois, mine, block, map, s, c0, c1, 0, false, position_sensitive, g);
          continue;
        }
        scalar_t* block = dx + n * pixels * s.C + c0;
        for (int64_t i = 0; i < pixels; ++i) std::fill(block + i * s.C, block + i * s.C + count, scalar_t(0));
        block_bwd(dy, rois, mine, block, map, s, c0, c1, s.C, true, false, g);
      } else {
        wide.assign(size_t(count * pixels), acc_t(0));
        block_bwd(dy, rois, mine, wide.data(), map, s, c0, c1, count, channels_last, position_sensitive, g);
        if (!channels_last) {
          each_vector<acc_t>(count * pixels, [&](int64_t i, auto lanes) {
            Vec<acc_t>::load(wide.data() + i, lanes).store(dx + (n * s.C + c0) * pixels + i, lanes);
          });
          continue;
        }
        for (int64_t i = 0; i < pixels; ++i)
          each_vector<acc_t>(count, [&](int64_t c, auto lanes) {
            Vec<acc_t>::load(wide.data() + i * count + c, lanes).store(dx + (n * pixels + i) * s.C + c0 + c, lanes);
          });
      }
    }
  });
}

// ---- binding

struct Inputs {
  std::array<OptionalTensor, max_levels> x;
  int count = 0;
  Inputs(const Tensor& x0, const OptionalTensor& x1, const OptionalTensor& x2, const OptionalTensor& x3,
         const OptionalTensor& x4)
      : x{x0, x1, x2, x3, x4} {
    while (count < max_levels && x[size_t(count)].has_value()) ++count;
  }
};

inline Problem problem_of(const OpScope& op, const Inputs& in, const Tensor& rois, int64_t P, int64_t Q,
                          int64_t sampling_ratio, bool aligned, bool channels_last) {
  op.check(rois.dim() == 2 && P > 0 && Q > 0 && std::max(P, Q) >> 31 == 0,
           "rois must be [R, 5] and the output 1 x 1 or more, < 2^31 a side");
  op.check(in.x[0]->dim() == 4, "x must have 4 dimensions");
  Problem s{in.x[0]->size(0), in.x[0]->size(channels_last ? 3 : 1), rois.size(0), P, Q, sampling_ratio, aligned, {}};
  for (int l = 0; l < in.count; ++l) {
    const Tensor& x = *in.x[size_t(l)];
    op.check(x.dim() == 4, "x must have 4 dimensions");
    s.maps[size_t(l)] = {x.size(channels_last ? 1 : 2), x.size(channels_last ? 2 : 3)};
  }
  return s;
}

template <class scalar_t>
const scalar_t* level_in(const OpScope& op, const Inputs& in, int l, const Problem& s, bool channels_last) {
  const Map& m = s.maps[size_t(l)];
  return channels_last ? op.in<scalar_t>(*in.x[size_t(l)], "x", {s.N, m.H, m.W, s.C})
                       : op.in<scalar_t>(*in.x[size_t(l)], "x", {s.N, s.C, m.H, m.W});
}

Tensor roi_align_fwd(const Tensor& x0, const OptionalTensor& x1, const OptionalTensor& x2, const OptionalTensor& x3,
                     const OptionalTensor& x4, const Tensor& rois, const OptionalTensor& levels, int64_t P, int64_t Q,
                     int64_t sampling_ratio, bool aligned, bool channels_last, bool position_sensitive) {
  OpScope op("roi_align_fwd", x0);
  const Inputs in(x0, x1, x2, x3, x4);
  const Problem s = problem_of(op, in, rois, P, Q, sampling_ratio, aligned, channels_last);
  op.check(!position_sensitive || s.C % (P * Q) == 0, "C must be a multiple of P * Q");
  return dispatch_floating(op, x0.scalar_type(), [&]<class scalar_t>() {
    using acc_t = accumulate_t<scalar_t>;
    const int64_t C = position_sensitive ? s.C / (P * Q) : s.C;
    Tensor y = channels_last ? op.empty<scalar_t>({s.R, P, Q, C}) : op.empty<scalar_t>({s.R, C, P, Q});
    Levels<scalar_t> at;
    at.count = in.count;
    for (int l = 0; l < in.count; ++l) at.x[size_t(l)] = level_in<scalar_t>(op, in, l, s, channels_last);
    auto* prois = op.in<acc_t>(rois, "rois", {s.R, 5});
    const auto place = places(op, prois, op.in_optional<int64_t>(levels, "levels", {s.R}), s, in.count);
    auto* py = channels_last ? op.out<scalar_t>(y, "y", {s.R, P, Q, C}) : op.out<scalar_t>(y, "y", {s.R, C, P, Q});
    align_fwd(at, prois, place, py, s, channels_last, position_sensitive);
    return y;
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> roi_align_bwd(
    const Tensor& dy, const Tensor& x0, const OptionalTensor& x1, const OptionalTensor& x2, const OptionalTensor& x3,
    const OptionalTensor& x4, const Tensor& rois, const OptionalTensor& levels, int64_t P, int64_t Q,
    int64_t sampling_ratio, bool aligned, bool channels_last, bool position_sensitive) {
  OpScope op("roi_align_bwd", dy);
  const Inputs in(x0, x1, x2, x3, x4);
  const Problem s = problem_of(op, in, rois, P, Q, sampling_ratio, aligned, channels_last);
  op.check(!position_sensitive || s.C % (P * Q) == 0, "C must be a multiple of P * Q");
  return dispatch_floating(op, dy.scalar_type(), [&]<class scalar_t>() {
    using acc_t = accumulate_t<scalar_t>;
    const int64_t C = position_sensitive ? s.C / (P * Q) : s.C;
    std::array<Tensor, max_levels> dx{op.empty<scalar_t>({0}), op.empty<scalar_t>({0}), op.empty<scalar_t>({0}),
                                      op.empty<scalar_t>({0}), op.empty<scalar_t>({0})};
    Levels<scalar_t> at;
    at.count = in.count;
    for (int l = 0; l < in.count; ++l) {
      const Map& m = s.maps[size_t(l)];
      dx[size_t(l)] =
          channels_last ? op.empty<scalar_t>({s.N, m.H, m.W, s.C}) : op.empty<scalar_t>({s.N, s.C, m.H, m.W});
      at.dx[size_t(l)] = channels_last ? op.out<scalar_t>(dx[size_t(l)], "dx", {s.N, m.H, m.W, s.C})
                                       : op.out<scalar_t>(dx[size_t(l)], "dx", {s.N, s.C, m.H, m.W});
    }
    auto* pdy = channels_last ? op.in<scalar_t>(dy, "dy", {s.R, P, Q, C}) : op.in<scalar_t>(dy, "dy", {s.R, C, P, Q});
    auto* prois = op.in<acc_t>(rois, "rois", {s.R, 5});
    const auto place = places(op, prois, op.in_optional<int64_t>(levels, "levels", {s.R}), s, in.count);
    align_bwd(pdy, prois, place, at, s, channels_last, position_sensitive);
    return std::make_tuple(dx[0], dx[1], dx[2], dx[3], dx[4]);
  });
}

PYOPS_LIBRARY(m) {
  PYOPS_IMPL(m, roi_align_fwd);
  PYOPS_IMPL(m, roi_align_bwd);
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY
