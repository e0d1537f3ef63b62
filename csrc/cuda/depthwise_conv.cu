// depthwise_conv · CUDA
//   act    y = f(fwd + r), f by number (common/activation.h)
//   fwd    y[n,(c,m),p] = b[(c,m)] + sum_r w[(c,m),r] * x[n,c, p*stride - padding + r*dilation]
//   dgrad  dx[n,c,h] = b[c] + sum of w[(c,m),r] * dy[n,(c,m),p] over m and the (p, r) that meet in h
//   wgrad  dw[(c,m),r] = sum_{n,p} dy[n,(c,m),p] * x[n,c, p*stride - padding + r*dilation]
// layout   x: [N, C, D, H, W] · w: [C*M, 1, taps] · y: [N, C*M, space]
//          channels last: x: [N, D, H, W, C] · w: [C*M, taps, 1]
// mapping  a thread computes four outputs next to each other in a row, sliding over the taps: a value of x is loaded
//          once for all of them; neighbouring threads take neighbouring positions, or channels where those are
//          contiguous. wgrad: a block per filter and part of the positions, each thread sums its share of one tap at a
//          time; a second kernel adds the parts
// memory   x and y once from DRAM, overlapping taps from L1; filters from L1
// numerics sums in fp32 (fp64 for fp64), in a fixed order
#include "cuda/conv_epilogue.cuh"
#include "cuda/device.cuh"

#include "common/conv.h"

namespace pyops::conv {
namespace {

// kernels

inline constexpr int outputs = 4;  // of a thread

template <class T>
struct Depthwise {
  const T *x, *w;
  Epilogue<T> end;
  T* y;
  Space space;
  int64_t N;
  int in_channels, out_channels, multiplier, all_taps, taps_h, taps_w;
  unsigned blocks;  // of a plane; channels last, of an example
  bool transposed, channels_last;
};

template <class T>
__global__ void __launch_bounds__(256, 2) depthwise_conv_kernel(Depthwise<T> p) {
  using A = accumulate_t<T>;
  const Space& s = p.space;
  const unsigned groups = (s.w.count + outputs - 1) / outputs, rows = unsigned(s.d.count) * s.h.count;
  const unsigned per_plane = groups * rows;
  // one example and, channels first, one plane: 32 bits suffice
  const unsigned plane = blockIdx.x / p.blocks;
  unsigned index = (blockIdx.x - plane * p.blocks) * blockDim.x + threadIdx.x, k = plane;
  if (p.channels_last) k = index % p.out_channels, index /= p.out_channels;
  if (index >= per_plane) return;
  const unsigned row = index / groups;
  const int ow = static_cast<int>(index - row * groups) * outputs;
  const int od = static_cast<int>(row / s.h.count), oh = static_cast<int>(row % s.h.count);
  const int64_t in_stride = p.channels_last ? p.in_channels : 1, out_stride = p.channels_last ? p.out_channels : 1;
  for (int64_t n = blockIdx.z; n < p.N; n += gridDim.z) {
    A sum[outputs] = {};
    for (int part = 0; part < (p.transposed ? p.multiplier : 1); ++part) {
      const int64_t filter = p.transposed ? int64_t(k) * p.multiplier + part : k;
      const int64_t channel = p.transposed ? filter : k / p.multiplier;
      const T* x = p.x + plane_of(n, channel, p.in_channels, s.in_plane(), p.channels_last);
      const T* w = p.w + filter * p.all_taps;
      for (int jd = 0; jd < s.d.taps; ++jd) {
        const int d = s.d.input(od, jd);
        if (d < 0 || d >= s.d.size) continue;
        for (int jh = 0; jh < s.h.taps; ++jh) {
          const int h = s.h.input(oh, jh);
          if (h < 0 || h >= s.h.size) continue;
          const T* from = x + (static_cast<int64_t>(d) * s.h.size + h) * s.w.size * in_stride;
          const T* taps =
              w + ((s.d.w_base + jd * s.d.w_step) * p.taps_h + s.h.w_base + jh * s.h.w_step) * p.taps_w + s.w.w_base;
          if (s.w.in_step == s.w.tap_step) {
            // output i reads through tap j what output 0 reads through tap i + j: a window slides over the row
            A window[outputs];
#pragma unroll
            for (int i = 1; i < outputs; ++i) {
              const int at = s.w.input(ow, i - 1);
              window[i] = at >= 0 && at < s.w.size ? to_acc(__ldg(from + at * in_stride)) : A(0);
            }
            for (int jw = 0; jw < s.w.taps; ++jw) {
              const int at = s.w.input(ow, jw + outputs - 1);
#pragma unroll
              for (int i = 0; i + 1 < outputs; ++i) window[i] = window[i + 1];
              window[outputs - 1] = at >= 0 && at < s.w.size ? to_acc(__ldg(from + at * in_stride)) : A(0);
              const A weight = to_acc(__ldg(taps + jw * s.w.w_step));
#pragma unroll
              for (int i = 0; i < outputs; ++i) sum[i] += window[i] * weight;
            }
          } else {
            for (int jw = 0; jw < s.w.taps; ++jw) {
              const A weight = to_acc(__ldg(taps + jw * s.w.w_step));
#pragma unroll
              for (int i = 0; i < outputs; ++i) {
                const int at = s.w.input(ow + i, jw);
                if (at >= 0 && at < s.w.size) sum[i] += to_acc(__ldg(from + at * in_stride)) * weight;
              }
            }
          }
        }
      }
    }
    const int64_t first =
        plane_of(n, k, p.out_channels, s.out_plane(), p.channels_last) +
        ((static_cast<int64_t>(s.d.out_base + od * s.d.out_step) * s.h.out_size + s.h.out_base + oh * s.h.out_step) *
             s.w.out_size +
         s.w.out_base) *
            out_stride;
    with_epilogue(p.end, [&](auto finish) {
#pragma unroll
      for (int i = 0; i < outputs; ++i) {
        const int64_t at = first + (ow + i) * s.w.out_step * out_stride;
        if (ow + i < s.w.count) p.y[at] = from_acc<T>(finish(sum[i], k, at));
      }
    });
  }
}

template <class A>
struct DepthwiseShared {
  BlockScratch<A> scratch;
};

// part[split, k, tap]: block (k, split) sums its share of the positions, tap by tap.
template <class T>
__global__ void __launch_bounds__(128)
    depthwise_wgrad_kernel(const T* __restrict__ dy, const T* __restrict__ x, accumulate_t<T>* __restrict__ part,
                           Space s, int64_t N, int K, int multiplier, bool channels_last) {
  using A = accumulate_t<T>;
  auto& shared = shared_storage<DepthwiseShared<A>>();
  const int k = blockIdx.x, split = blockIdx.y, splits = gridDim.y, C = K / multiplier;
  const auto positions = static_cast<unsigned>(s.positions());
  const int64_t in_stride = channels_last ? C : 1, out_stride = channels_last ? K : 1;
  for (int j = 0; j < s.taps(); ++j) {
    const int jw = j % s.w.taps, jh = j / s.w.taps % s.h.taps, jd = j / s.w.taps / s.h.taps;
    A sum = 0;
    for (int64_t n = split; n < N; n += splits) {
      const T* from = x + plane_of(n, k / multiplier, C, s.in_plane(), channels_last);
      const T* g = dy + plane_of(n, k, K, positions, channels_last);
      for (unsigned i = threadIdx.x; i < positions; i += 128) {
        const unsigned row = i / s.w.count;
        const int w = static_cast<int>(i - row * s.w.count);
        const int64_t at = s.input(s.d.input(static_cast<int>(row / s.h.count), jd),
                                   s.h.input(static_cast<int>(row % s.h.count), jh), s.w.input(w, jw));
        if (at >= 0) sum += to_acc(__ldg(g + i * out_stride)) * to_acc(__ldg(from + at * in_stride));
      }
    }
    sum = block_sum(sum, shared.scratch);
    if (threadIdx.x == 0) part[(static_cast<int64_t>(split) * K + k) * s.taps() + j] = sum;
  }
}

template <class T>
__global__ void __launch_bounds__(256) depthwise_wgrad_sum_kernel(const accumulate_t<T>* __restrict__ part,
                                                                  T* __restrict__ dw, int64_t count, int splits) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= count) return;
  accumulate_t<T> sum = 0;
  for (int split = 0; split < splits; ++split) sum += part[split * count + i];
  dw[i] = from_acc<T>(sum);
}

}  // namespace
}  // namespace pyops::conv

// binding

#include "common/conv_binding.h"
#include "common/registry.h"

namespace pyops {
namespace {

using namespace conv;

void check_depthwise(const OpScope& op, const Sizes& s) {
  op.check(s.G == s.C, "groups must be the number of input channels: got ", s.G, ", expected ", s.C);
  op.check(s.K < (int64_t(1) << 31), "more than 2^31 - 1 channels");
}

template <class T>
void filter(const OpScope& op, const Sizes& s, const Space& space, bool transposed, bool last, const T* x, const T* w,
            const Epilogue<T>& end, T* y) {
  const int64_t in = transposed ? s.K : s.C, out = transposed ? s.C : s.K;
  const int64_t items = ceil_div(space.w.count, outputs) * space.d.count * space.h.count * (last ? out : 1);
  op.check(items < (int64_t(1) << 31), "an image has too many positions");
  if (s.N * items == 0) return;
  // small planes do not fill a block of 256
  const unsigned block = items >= 256 ? 256 : static_cast<unsigned>(ceil_div(items, 32) * 32);
  // planes beside their blocks on the one axis of a grid that counts beyond 65535
  const int64_t blocks = ceil_div(items, block), planes = last ? 1 : out;
  op.check(blocks * planes < (int64_t(1) << 31), "an example has too many positions");
  const Depthwise<T> p{x,
                       w,
                       end,
                       y,
                       space,
                       s.N,
                       static_cast<int>(in),
                       static_cast<int>(out),
                       static_cast<int>(s.K / s.C),
                       static_cast<int>(s.taps()),
                       static_cast<int>(s.r[1]),
                       static_cast<int>(s.r[2]),
                       static_cast<unsigned>(blocks),
                       transposed,
                       last};
  launch(depthwise_conv_kernel<T>,
         {.grid = dim3(static_cast<unsigned>(blocks * planes), 1, static_cast<unsigned>(std::min<int64_t>(s.N, 65535))),
          .block = dim3(block),
          .stream = static_cast<cudaStream_t>(op.stream())},
         p);
}

// y = f(conv(x, w) + b + residual); kind -1: neither f nor residual.
Tensor forward(const OpScope& op, const Tensor& x, const Tensor& w, const OptionalTensor& b,
               const OptionalTensor& residual, const Ints& stride, const Ints& padding, const Ints& dilation,
               int64_t groups, bool channels_last, int64_t kind, activation::Parameters parameters) {
  const Sizes s = fwd_sizes(op, x, w, groups, channels_last, stride, padding, dilation);
  check_depthwise(op, s);
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    Tensor y = image(op, x.scalar_type(), s.N, s.K, s.y, channels_last);
    const Epilogue<T> end{op.in_optional<T>(b, "b", {s.K}),
                          optional_image_in<T>(op, residual, "residual", s.N, s.K, s.y, channels_last),
                          static_cast<int>(kind), parameters};
    filter(op, s, forward_space(s), false, channels_last, image_in<T>(op, x, "x", s.N, s.C, s.x, channels_last),
           image_in<T>(op, w, "w", s.K, 1, s.r, channels_last), end,
           image_out<T>(op, y, "y", s.N, s.K, s.y, channels_last));
    return y;
  });
}

Tensor depthwise_conv_fwd(const Tensor& x, const Tensor& w, const OptionalTensor& b, Ints stride, Ints padding,
                          Ints dilation, int64_t groups, bool channels_last, std::string) {
  OpScope op("depthwise_conv_fwd", x);
  return forward(op, x, w, b, {}, stride, padding, dilation, groups, channels_last, -1, {});
}

Tensor depthwise_conv_act_fwd(const Tensor& x, const Tensor& w, const OptionalTensor& b, const OptionalTensor& residual,
                              Ints stride, Ints padding, Ints dilation, int64_t groups, bool channels_last, std::string,
                              int64_t kind, double pa, double pb, double pc) {
  OpScope op("depthwise_conv_act_fwd", x);
  activation::check_kind(op, kind);
  return forward(op, x, w, b, residual, stride, padding, dilation, groups, channels_last, kind, {pa, pb, pc});
}

Tensor depthwise_conv_dgrad(const Tensor& dy, const Tensor& w, const OptionalTensor& b, Ints size, Ints stride,
                            Ints padding, Ints dilation, int64_t groups, bool channels_last, std::string) {
  OpScope op("depthwise_conv_dgrad", dy);
  const Sizes s = dgrad_sizes(op, dy, w, size, groups, channels_last, stride, padding, dilation);
  check_depthwise(op, s);
  return dispatch_floating(op, dy.scalar_type(), [&]<class T>() {
    Tensor dx = image(op, dy.scalar_type(), s.N, s.C, s.x, channels_last);
    auto* pdy = image_in<T>(op, dy, "dy", s.N, s.K, s.y, channels_last);
    auto* pw = image_in<T>(op, w, "w", s.K, 1, s.r, channels_last);
    const Epilogue<T> end{op.in_optional<T>(b, "b", {s.C})};
    auto* pdx = image_out<T>(op, dx, "dx", s.N, s.C, s.x, channels_last);
    each_phase(s, [&](const Space& space) { filter(op, s, space, true, channels_last, pdy, pw, end, pdx); });
    return dx;
  });
}

Tensor depthwise_conv_wgrad(const Tensor& dy, const Tensor& x, Ints taps, Ints stride, Ints padding, Ints dilation,
                            int64_t groups, bool channels_last, std::string) {
  OpScope op("depthwise_conv_wgrad", dy);
  const Sizes s = wgrad_sizes(op, dy, x, taps, groups, channels_last, stride, padding, dilation);
  check_depthwise(op, s);
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    using A = accumulate_t<T>;
    Tensor dw = image(op, x.scalar_type(), s.K, 1, s.r, channels_last);
    auto* pdw = image_out<T>(op, dw, "dw", s.K, 1, s.r, channels_last);
    const Space space = forward_space(s);
    op.check(space.positions() < (int64_t(1) << 31), "an image has too many positions");
    const int64_t splits =
        std::clamp<int64_t>(ceil_div(8 * multiprocessor_count(), s.K), 1, std::clamp<int64_t>(s.N, 1, 65535));
    Tensor part = op.empty<A>({splits, s.K, s.taps()});
    auto* workspace = op.out<A>(part, "workspace", {splits, s.K, s.taps()});
    const auto stream = static_cast<cudaStream_t>(op.stream());
    launch(depthwise_wgrad_kernel<T>,
           {.grid = dim3(static_cast<unsigned>(s.K), static_cast<unsigned>(splits)),
            .block = dim3(128),
            .smem = sizeof(DepthwiseShared<A>),
            .stream = stream},
           image_in<T>(op, dy, "dy", s.N, s.K, s.y, channels_last),
           image_in<T>(op, x, "x", s.N, s.C, s.x, channels_last), workspace, space, s.N, static_cast<int>(s.K),
           static_cast<int>(s.K / s.C), channels_last);
    const int64_t count = s.K * s.taps();
    launch(depthwise_wgrad_sum_kernel<T>,
           {.grid = dim3(static_cast<unsigned>(ceil_div(count, 256))), .block = dim3(256), .stream = stream}, workspace,
           pdw, count, static_cast<int>(splits));
    return dw;
  });
}

}  // namespace
}  // namespace pyops

PYOPS_LIBRARY(m) {
  using namespace pyops;
  PYOPS_IMPL(m, depthwise_conv_fwd);
  PYOPS_IMPL(m, depthwise_conv_act_fwd);
  PYOPS_IMPL(m, depthwise_conv_dgrad);
  PYOPS_IMPL(m, depthwise_conv_wgrad);
}
