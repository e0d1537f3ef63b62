// Depthwise convolution channels last (NHWC): lanes are channels, four neighbouring outputs share each vector of
// filters.
#pragma once

#include "common/conv.h"
#include "cpu/conv_epilogue.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace pyops::PYOPS_CPU_CAPABILITY::depthwise {

using conv::Space;

// Which channel of an image belongs to lane k of the filters: k / divide * step + offset.
struct Channel {
  int64_t divide, step, offset;
  template <class acc_t, class T, class Lanes>
  PYOPS_INLINE Vec<acc_t> load(const T* p, int64_t k, Lanes lanes) const {
    if (divide == 1 && step == 1) return Vec<acc_t>::load(p + k + offset, lanes);
    Vec<acc_t> v;
    int64_t count = Vec<acc_t>::width;
    if constexpr (std::is_same_v<Lanes, FirstLanes>) count = lanes.count;
    for (int64_t i = 0; i < count; ++i) v.v[i] = acc_t(p[(k + i) / divide * step + offset]);
    return v;
  }
};

// y has K channels; x has in_channels of them. w: [parts][taps][K], part m with its own channels of x.
template <class scalar_t>
void channels_last(const Space& s, int64_t N, int64_t K, int64_t in_channels, int64_t parts, int64_t divide,
                   const accumulate_t<scalar_t>* w, const scalar_t* x, const Epilogue<scalar_t>& epilogue,
                   scalar_t* y) {
  using acc_t = accumulate_t<scalar_t>;
  using V = Vec<acc_t>;
  constexpr int group = 4;
  const int64_t taps = s.taps(), rows = int64_t(s.d.count) * s.h.count;
  const int64_t work = std::max<int64_t>(s.w.count * K * taps * parts, 1);
  parallel_for(N * rows, ceil_div(1 << 15, work), [&](int64_t begin, int64_t end) {
    Buffer<acc_t> wide(epilogue.plain() ? 0 : group * K);  // sums that are not finished
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / rows, od = task % rows / s.h.count, oh = task % s.h.count;
      const scalar_t* image = x + n * s.in_plane() * in_channels;
      const int64_t out_row =
          ((s.d.out_base + od * s.d.out_step) * s.h.out_size + s.h.out_base + oh * s.h.out_step) * s.w.out_size +
          s.w.out_base;
      scalar_t* out = y + (n * s.out_plane() + out_row) * K;
      for (int64_t ow = 0; ow < s.w.count; ow += group) {
        const int64_t used = std::min<int64_t>(group, s.w.count - ow);
        each_vector<acc_t>(K, [&](int64_t k, auto lanes) {
          V sum[group];
          for (int64_t part = 0; part < parts; ++part) {
            const Channel channel{divide, parts, part};
            const acc_t* filter = w + part * taps * K + k;
            for (int32_t jd = 0; jd < s.d.taps; ++jd) {
              const int64_t d = s.d.input(int32_t(od), jd);
              for (int32_t jh = 0; jh < s.h.taps; ++jh) {
                const int64_t h = s.h.input(int32_t(oh), jh);
                if (d < 0 || d >= s.d.size || h < 0 || h >= s.h.size) {
                  filter += s.w.taps * K;
                  continue;
                }
                const scalar_t* row = image + (d * s.h.size + h) * s.w.size * in_channels;
                for (int32_t jw = 0; jw < s.w.taps; ++jw, filter += K) {
                  const V weight = V::load(filter, lanes);
                  const int64_t first = s.w.input(int32_t(ow), jw);
                  if (first >= 0 && first + (group - 1) * s.w.in_step < s.w.size) {
#pragma GCC unroll 4
                    for (int i = 0; i < group; ++i)
                      sum[i] = fma(channel.load<acc_t>(row + (first + i * s.w.in_step) * in_channels, k, lanes), weight,
                                   sum[i]);
                  } else {
                    for (int i = 0; i < group; ++i) {
                      const int64_t at = first + i * s.w.in_step;
                      if (at >= 0 && at < s.w.size)
                        sum[i] = fma(channel.load<acc_t>(row + at * in_channels, k, lanes), weight, sum[i]);
                    }
                  }
                }
              }
            }
          }
          const V add = epilogue.bias ? V::load(epilogue.bias + k, lanes) : V();
          for (int64_t i = 0; i < used; ++i)
            if (epilogue.plain())
              (sum[i] + add).store(out + (ow + i) * s.w.out_step * K + k, lanes);
            else
              (sum[i] + add).store(wide.get() + i * K + k, lanes);
        });
        if (epilogue.plain()) continue;
        scalar_t* to = out + ow * K;
        epilogue.finish(wide.get(), to - y, used * K);
        narrow(to, wide.get(), used * K);
      }
    }
  });
}

// part[p][tap][k] = sum over the examples of part p and their positions of dy * x.
template <class scalar_t>
void weight_gradient_channels_last(const Space& s, int64_t N, int64_t K, int64_t multiplier, int64_t parts,
                                   const scalar_t* dy, const scalar_t* x, accumulate_t<scalar_t>* part) {
  using acc_t = accumulate_t<scalar_t>;
  using V = Vec<acc_t>;
  const int64_t taps = s.taps(), C = K / multiplier;
  const Channel channel{multiplier, 1, 0};
  const int64_t work = ceil_div(N, parts) * s.positions() * taps * K;
  parallel_for(parts, ceil_div(1 << 15, std::max<int64_t>(work, 1)), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      acc_t* to = part + p * taps * K;
      std::memset(to, 0, size_t(taps * K) * sizeof(acc_t));
      for (int64_t n = p * N / parts; n < (p + 1) * N / parts; ++n)
        for (int32_t od = 0; od < s.d.count; ++od)
          for (int32_t oh = 0; oh < s.h.count; ++oh) {
            const scalar_t* g = dy + (n * s.positions() + (int64_t(od) * s.h.count + oh) * s.w.count) * K;
            for (int64_t tap = 0; tap < taps; ++tap) {
              const int32_t jw = int32_t(tap % s.w.taps), jh = int32_t(tap / s.w.taps % s.h.taps);
              const int64_t d = s.d.input(od, int32_t(tap / s.w.taps / s.h.taps)), h = s.h.input(oh, jh);
              if (d < 0 || d >= s.d.size || h < 0 || h >= s.h.size) continue;
              const scalar_t* row = x + ((n * s.d.size + d) * s.h.size + h) * s.w.size * C;
              const int64_t first = s.w.input(0, jw), step = s.w.in_step;
              const int64_t low = std::min<int64_t>(first < 0 ? ceil_div(-first, step) : 0, s.w.count);
              const int64_t high =
                  std::clamp<int64_t>(first < s.w.size ? ceil_div(s.w.size - first, step) : 0, low, s.w.count);
              each_vector<acc_t>(K, [&](int64_t k, auto lanes) {
                V total[2];
                int64_t w = low;
                for (; w + 2 <= high; w += 2)
                  for (int i = 0; i < 2; ++i)
                    total[i] = fma(V::load(g + (w + i) * K + k, lanes),
                                   channel.load<acc_t>(row + (first + (w + i) * step) * C, k, lanes), total[i]);
                if (w < high)
                  total[0] = fma(V::load(g + w * K + k, lanes),
                                 channel.load<acc_t>(row + (first + w * step) * C, k, lanes), total[0]);
                (V::load(to + tap * K + k, lanes) + (total[0] + total[1])).store(to + tap * K + k, lanes);
              });
            }
          }
    }
  });
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY::depthwise
