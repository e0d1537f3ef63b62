// roi_pool · CPU
//   max    y[r,c,p,q] = max of x[n_r, c] over bin (p, q) of RoI r, 0 where it is empty; arg is its pixel, or -1
//   mean   y[r,c,p,q] = mean of x[n_r, (c P + p) Q + q] over the bin (position sensitive)
// layout   x: [N, C, H, W] or, channels_last, [N, H, W, C] · y, arg: likewise over (P, Q) · rois: [R, 5] rounded pixels
// mapping  forward: threads over RoIs; lanes over channels when channels_last. Backward: a thread owns a block of
//          channels of one image, or for the mean on channels last some of its rows, and meets the RoIs in order
// memory   backward: dx alone; half types one more float block per thread
// numerics comparisons are exact; the mean and dx in acc_t
#include <algorithm>
#include <cmath>
#include <vector>

#include "common/registry.h"
#include "common/roi_bins.h"
#include "cpu/parallel.h"
#include "cpu/position_sensitive.h"
#include "cpu/simd.h"

namespace pyops::PYOPS_CPU_CAPABILITY {

inline constexpr int64_t channel_block = 64;

// ---- kernels

struct Problem {
  int64_t N, C, H, W, R, P, Q;
  bool mean, channels_last;
  int64_t channels() const { return mean ? C / (P * Q) : C; }
};

inline std::vector<int64_t> images_of(const OpScope& op, const int64_t* rois, const Problem& s) {
  std::vector<int64_t> image(size_t(s.R), 0);
  for (int64_t r = 0; r < s.R; ++r) {
    image[size_t(r)] = rois[5 * r];
    op.check(rois[5 * r] >= 0 && rois[5 * r] < s.N, "argument 'boxes': got image index ", rois[5 * r], " in row ", r,
             ", expected 0 <= index < ", s.N);
  }
  return image;
}

// Mean: all channels of one bin, whose first plane is x; sum: one for each.
template <class scalar_t, class acc_t>
void mean_fwd(const scalar_t* __restrict__ x, scalar_t* __restrict__ y, const PositionSteps& step, const Problem& s,
              int64_t h0, int64_t h1, int64_t w0, int64_t w1, acc_t* __restrict__ sum) {
  const int64_t channels = s.channels(), to_channel = s.P * s.Q * step.plane;
  const acc_t count = acc_t(std::max<int64_t>((h1 - h0) * (w1 - w0), 1));
  if (!s.channels_last) {
    for (int64_t c = 0; c < channels; ++c) {
      acc_t total = 0;
      for (int64_t h = h0; h < h1; ++h)
        for (int64_t w = w0; w < w1; ++w) total += acc_t(x[c * to_channel + h * s.W + w]);
      y[c * step.channel] = scalar_t(total / count);
    }
    return;
  }
  std::fill(sum, sum + channels, acc_t(0));
  for (int64_t h = h0; h < h1; ++h)
    for (int64_t w = w0; w < w1; ++w) {
      const scalar_t* from = x + (h * s.W + w) * step.pixel;
      for (int64_t c = 0; c < channels; ++c) sum[c] += acc_t(from[c * to_channel]);
    }
  for (int64_t c = 0; c < channels; ++c) y[c * step.channel] = scalar_t(sum[c] / count);
}

template <class scalar_t>
void pool_fwd(const scalar_t* x, const int64_t* rois, const std::vector<int64_t>& image, scalar_t* y, int32_t* arg,
              const Problem& s) {
  using acc_t = accumulate_t<scalar_t>;
  const int64_t bins = s.P * s.Q, channels = s.channels(), HW = s.H * s.W;
  parallel_for(s.R, 1, [&](int64_t begin, int64_t end) {
    std::vector<acc_t> best(size_t(s.C), acc_t(0));
    std::vector<int32_t> at(size_t(s.C), -1);
    for (int64_t r = begin; r < end; ++r) {
      const pool::Bins<acc_t> ys(rois[5 * r + 2], rois[5 * r + 4], s.P, s.H, s.mean);
      const pool::Bins<acc_t> xs(rois[5 * r + 1], rois[5 * r + 3], s.Q, s.W, s.mean);
      const scalar_t* map = x + image[size_t(r)] * s.C * HW;
      for (int64_t p = 0; p < s.P; ++p)
        for (int64_t q = 0; q < s.Q; ++q) {
          const int64_t bin = p * s.Q + q;
          int64_t h0, h1, w0, w1;
          ys.range(p, h0, h1);
          xs.range(q, w0, w1);
          if (s.mean) {
            const PositionSteps step(s.C, HW, bins, s.channels_last);
            mean_fwd(map + bin * step.plane, y + r * channels * bins + bin * step.bin, step, s, h0, h1, w0, w1,
                     best.data());
            continue;
          }
          if (s.channels_last) {
            acc_t* __restrict__ value = best.data();
            int32_t* __restrict__ pixel = at.data();
            std::fill(best.begin(), best.end(), acc_t(0));
            std::fill(at.begin(), at.end(), -1);
            for (int64_t h = h0; h < h1; ++h)
              for (int64_t w = w0; w < w1; ++w) {
                const scalar_t* __restrict__ from = map + (h * s.W + w) * s.C;
                const int32_t here = int32_t(h * s.W + w);
                for (int64_t c = 0; c < s.C; ++c) {
                  const acc_t v = acc_t(from[c]);
                  const bool better = (pixel[c] < 0 && v == v) || v > value[c];
                  value[c] = better ? v : value[c];
                  pixel[c] = better ? here : pixel[c];
                }
              }
            for (int64_t c = 0; c < s.C; ++c) {
              y[(r * bins + bin) * s.C + c] = scalar_t(value[c]);
              arg[(r * bins + bin) * s.C + c] = pixel[c];
            }
            continue;
          }
          for (int64_t c = 0; c < s.C; ++c) {
            const scalar_t* plane = map + c * HW;
            acc_t value = 0;
            int64_t pixel = -1;
            for (int64_t h = h0; h < h1; ++h)
              for (int64_t w = w0; w < w1; ++w) {
                const acc_t v = acc_t(plane[h * s.W + w]);
                if ((pixel < 0 && v == v) || v > value) {
                  value = v;
                  pixel = h * s.W + w;
                }
              }
            y[(r * s.C + c) * bins + bin] = scalar_t(value);
            arg[(r * s.C + c) * bins + bin] = int32_t(pixel);
          }
        }
    }
  });
}

// Planes [c0, c1) of image n into dx, whose pixels and channels are `pixel` and `plane` apart.
template <class scalar_t, class acc_t>
void pool_block_bwd(const scalar_t* dy, const int32_t* arg, const int64_t* rois, const std::vector<int64_t>& mine,
                    acc_t* dx, const Problem& s, int64_t c0, int64_t c1, int64_t pixel, int64_t plane) {
  const int64_t bins = s.P * s.Q, channels = s.channels();
  for (const int64_t r : mine) {
    if (!s.mean) {
      if (s.channels_last) {
        for (int64_t bin = 0; bin < bins; ++bin)
          for (int64_t c = c0; c < c1; ++c) {
            const int64_t i = (r * bins + bin) * s.C + c;
            if (arg[i] >= 0) dx[arg[i] * pixel + (c - c0) * plane] += acc_t(dy[i]);
          }
      } else {
        for (int64_t c = c0; c < c1; ++c)
          for (int64_t i = (r * s.C + c) * bins; i < (r * s.C + c + 1) * bins; ++i)
            if (arg[i] >= 0) dx[arg[i] * pixel + (c - c0) * plane] += acc_t(dy[i]);
      }
      continue;
    }
    const pool::Bins<acc_t> ys(rois[5 * r + 2], rois[5 * r + 4], s.P, s.H, true);
    const pool::Bins<acc_t> xs(rois[5 * r + 1], rois[5 * r + 3], s.Q, s.W, true);
    for (int64_t c = c0; c < c1; ++c) {
      int64_t h0, h1, w0, w1;
      ys.range(c / s.Q % s.P, h0, h1);
      xs.range(c % s.Q, w0, w1);
      if (h0 >= h1 || w0 >= w1) continue;
      const acc_t share = acc_t(dy[(r * channels + c / bins) * bins + c % bins]) / acc_t((h1 - h0) * (w1 - w0));
      for (int64_t h = h0; h < h1; ++h)
        for (int64_t w = w0; w < w1; ++w) dx[(h * s.W + w) * pixel + (c - c0) * plane] += share;
    }
  }
}

// Mean, channels last: a thread owns rows of pixels with all their channels, which lie together.
template <class scalar_t>
void mean_bwd(const scalar_t* dy, const int64_t* rois, const std::vector<std::vector<int64_t>>& of_image, scalar_t* dx,
              const Problem& s) {
  using acc_t = accumulate_t<scalar_t>;
  constexpr int64_t in_cache = 1 << 16;
  const int64_t bins = s.P * s.Q, channels = s.channels(), line = s.W * s.C;
  const int64_t height = std::clamp<int64_t>(in_cache / std::max<int64_t>(line, 1), 1, ceil_div(s.H, 8) + 1);
  const int64_t bands = ceil_div(s.H, height);
  parallel_for(s.N * bands, 1, [&](int64_t begin, int64_t end) {
    std::vector<acc_t> sums, share(size_t(channels), acc_t(0));
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / bands, row0 = item % bands * height, row1 = std::min(s.H, row0 + height);
      sums.assign(size_t((row1 - row0) * line), acc_t(0));
      for (const int64_t r : of_image[size_t(n)]) {
        const pool::Bins<acc_t> ys(rois[5 * r + 2], rois[5 * r + 4], s.P, s.H, true);
        const pool::Bins<acc_t> xs(rois[5 * r + 1], rois[5 * r + 3], s.Q, s.W, true);
        if (!ys.touches(row0, row1 - 1)) continue;
        for (int64_t p = 0; p < s.P; ++p) {
          int64_t h0, h1;
          ys.range(p, h0, h1);
          const int64_t from = std::max(h0, row0), to = std::min(h1, row1);
          if (from >= to) continue;
          for (int64_t q = 0; q < s.Q; ++q) {
            int64_t w0, w1;
            xs.range(q, w0, w1);
            if (w0 >= w1) continue;
            const int64_t bin = p * s.Q + q;
            const acc_t count = acc_t((h1 - h0) * (w1 - w0));
            for (int64_t c = 0; c < channels; ++c)
              share[size_t(c)] = acc_t(dy[(r * bins + bin) * channels + c]) / count;
            for (int64_t h = from; h < to; ++h)
              for (int64_t w = w0; w < w1; ++w) {
                acc_t* pixel = sums.data() + (h - row0) * line + w * s.C + bin;
                for (int64_t c = 0; c < channels; ++c) pixel[c * bins] += share[size_t(c)];
              }
          }
        }
      }
      narrow(dx + (n * s.H + row0) * line, sums.data(), (row1 - row0) * line);
    }
  });
}

template <class scalar_t>
void pool_bwd(const scalar_t* dy, const int32_t* arg, const int64_t* rois, const std::vector<int64_t>& image,
              scalar_t* dx, const Problem& s) {
  using acc_t = accumulate_t<scalar_t>;
  std::vector<std::vector<int64_t>> of_image(static_cast<size_t>(s.N));
  for (int64_t r = 0; r < s.R; ++r) of_image[size_t(image[size_t(r)])].push_back(r);
  if (s.mean && s.channels_last) return mean_bwd(dy, rois, of_image, dx, s);
  const int64_t blocks = ceil_div(s.C, channel_block), HW = s.H * s.W;
  parallel_for(s.N * blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<acc_t> block;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / blocks, c0 = item % blocks * channel_block, c1 = std::min(s.C, c0 + channel_block);
      const int64_t count = c1 - c0, pixel = s.channels_last ? count : 1, plane = s.channels_last ? 1 : HW;
      block.assign(size_t(count * HW), acc_t(0));
      pool_block_bwd(dy, arg, rois, of_image[size_t(n)], block.data(), s, c0, c1, pixel, plane);
      if (!s.channels_last) {
        for (int64_t i = 0; i < count * HW; ++i) dx[(n * s.C + c0) * HW + i] = scalar_t(block[size_t(i)]);
        continue;
      }
      for (int64_t i = 0; i < HW; ++i)
        for (int64_t c = 0; c < count; ++c) dx[(n * HW + i) * s.C + c0 + c] = scalar_t(block[size_t(i * count + c)]);
    }
  });
}

// ---- binding

inline Problem problem_of(const OpScope& op, const Tensor& x, const Tensor& rois, int64_t P, int64_t Q, bool mean,
                          bool channels_last) {
  op.check(x.dim() == 4 && rois.dim() == 2 && P > 0 && Q > 0 && std::max(P, Q) >> 31 == 0,
           "x must have 4 dimensions, rois be [R, 5], the output 1 x 1 or more, < 2^31 a side");
  const int h = channels_last ? 1 : 2;
  const Problem s{x.size(0),    x.size(channels_last ? 3 : 1), x.size(h), x.size(h + 1), rois.size(0), P, Q, mean,
                  channels_last};
  op.check(!mean || s.C % (P * Q) == 0, "C must be a multiple of P * Q");
  op.check(s.H * s.W < (int64_t{1} << 31), "the map must have less than 2^31 pixels");
  return s;
}

std::tuple<Tensor, Tensor> roi_pool_fwd(const Tensor& x, const Tensor& rois, int64_t P, int64_t Q, bool mean,
                                        bool channels_last) {
  OpScope op("roi_pool_fwd", x);
  const Problem s = problem_of(op, x, rois, P, Q, mean, channels_last);
  return dispatch_floating(op, x.scalar_type(), [&]<class scalar_t>() {
    const int64_t C = s.channels(), A = mean ? 0 : s.R;
    Tensor y = channels_last ? op.empty<scalar_t>({s.R, P, Q, C}) : op.empty<scalar_t>({s.R, C, P, Q});
    Tensor arg = channels_last ? op.empty<int32_t>({A, P, Q, C}) : op.empty<int32_t>({A, C, P, Q});
    auto* px =
        channels_last ? op.in<scalar_t>(x, "x", {s.N, s.H, s.W, s.C}) : op.in<scalar_t>(x, "x", {s.N, s.C, s.H, s.W});
    auto* prois = op.in<int64_t>(rois, "rois", {s.R, 5});
    auto* py = channels_last ? op.out<scalar_t>(y, "y", {s.R, P, Q, C}) : op.out<scalar_t>(y, "y", {s.R, C, P, Q});
    auto* parg = channels_last ? op.out<int32_t>(arg, "arg", {A, P, Q, C}) : op.out<int32_t>(arg, "arg", {A, C, P, Q});
    pool_fwd(px, prois, images_of(op, prois, s), py, parg, s);
    return std::make_tuple(y, arg);
  });
}

Tensor roi_pool_bwd(const Tensor& dy, const Tensor& x, const Tensor& rois, const Tensor& arg, int64_t P, int64_t Q,
                    bool mean, bool channels_last) {
  OpScope op("roi_pool_bwd", dy);
  const Problem s = problem_of(op, x, rois, P, Q, mean, channels_last);
  return dispatch_floating(op, dy.scalar_type(), [&]<class scalar_t>() {
    const int64_t C = s.channels(), A = mean ? 0 : s.R;
    Tensor dx = channels_last ? op.empty<scalar_t>({s.N, s.H, s.W, s.C}) : op.empty<scalar_t>({s.N, s.C, s.H, s.W});
    auto* pdy = channels_last ? op.in<scalar_t>(dy, "dy", {s.R, P, Q, C}) : op.in<scalar_t>(dy, "dy", {s.R, C, P, Q});
    auto* parg = channels_last ? op.in<int32_t>(arg, "arg", {A, P, Q, C}) : op.in<int32_t>(arg, "arg", {A, C, P, Q});
    auto* prois = op.in<int64_t>(rois, "rois", {s.R, 5});
    auto* pdx = channels_last ? op.out<scalar_t>(dx, "dx", {s.N, s.H, s.W, s.C})
                              : op.out<scalar_t>(dx, "dx", {s.N, s.C, s.H, s.W});
    for (int64_t i = 0; i < arg.numel(); ++i)
      op.check(parg[i] >= -1 && parg[i] < s.H * s.W, "arg: got ", parg[i], ", expected a pixel of the map or -1");
    pool_bwd(pdy, parg, prois, images_of(op, prois, s), pdx, s);
    return dx;
  });
}

PYOPS_LIBRARY(m) {
  PYOPS_IMPL(m, roi_pool_fwd);
  PYOPS_IMPL(m, roi_pool_bwd);
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY
