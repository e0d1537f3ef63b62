// depthwise_conv · CPU
//   act    y = f(fwd + r), f by number (common/activation.h)
//   fwd    y[n,(c,m),p] = b[(c,m)] + sum_r w[(c,m),r] * x[n,c, p*stride - padding + r*dilation]
//   dgrad  dx[n,c,h] = b[c] + sum of w[(c,m),r] * dy[n,(c,m),p] over m and the (p, r) that meet in h
//   wgrad  dw[(c,m),r] = sum_{n,p} dy[n,(c,m),p] * x[n,c, p*stride - padding + r*dilation]
// layout   x: [N, C, D, H, W] · w: [C*M, 1, taps] · y: [N, C*M, space]
//          channels last: x: [N, D, H, W, C] · w: [C*M, taps, 1]
// mapping  planes: a padded tile in scratch, four rows of outputs in registers · channels last: lanes over channels
// threads  planes, or rows; wgrad: channels and parts of the batch
// memory   x and y once; scratch of a tile per thread
// numerics sums in fp32 (fp64 for fp64), in an order that depends on the shape alone
#include "cpu/depthwise_channels.h"
#include "cpu/depthwise_planes.h"

#include "common/conv_binding.h"
#include "common/registry.h"

namespace pyops::PYOPS_CPU_CAPABILITY {
namespace {

using namespace conv;

// Filters of the taps of one phase in acc_t: [K][taps] for planes; channels last [taps][K], or [M][taps][C] transposed.
template <class scalar_t, class acc_t>
void arrange(const Sizes& s, const Space& space, bool transposed, bool last, const scalar_t* w, acc_t* to) {
  const int64_t taps = space.taps(), all = s.taps(), M = s.K / s.C;
  for (int64_t j = 0; j < taps; ++j) {
    const int64_t jw = j % space.w.taps, jh = j / space.w.taps % space.h.taps, jd = j / space.w.taps / space.h.taps;
    const int64_t tap =
        ((space.d.w_base + jd * space.d.w_step) * s.r[1] + space.h.w_base + jh * space.h.w_step) * s.r[2] +
        space.w.w_base + jw * space.w.w_step;
    for (int64_t k = 0; k < s.K; ++k) {
      int64_t at = k * taps + j;
      if (last) at = transposed ? (k % M * taps + j) * s.C + k / M : j * s.K + k;
      to[at] = acc_t(w[k * all + tap]);
    }
  }
}

template <class scalar_t>
void filter(const Sizes& s, const Space& space, bool transposed, bool last, const scalar_t* x, const scalar_t* w,
            const Epilogue<scalar_t>& epilogue, scalar_t* y) {
  using acc_t = accumulate_t<scalar_t>;
  const int64_t M = s.K / s.C;
  Buffer<acc_t> arranged(s.K * space.taps());
  arrange(s, space, transposed, last, w, arranged.get());
  if (!last)
    depthwise::planes(space, s.N, s.C, M, transposed, arranged.get(), x, epilogue, y);
  else if (transposed)
    depthwise::channels_last(space, s.N, s.C, s.K, M, 1, arranged.get(), x, epilogue, y);
  else
    depthwise::channels_last(space, s.N, s.K, s.C, 1, M, arranged.get(), x, epilogue, y);
}

// ---- binding

void check_depthwise(const OpScope& op, const Sizes& s) {
  op.check(s.G == s.C, "groups must be the number of input channels: got ", s.G, ", expected ", s.C);
}

// y = f(conv(x, w) + b + residual); kind -1: neither f nor residual.
Tensor forward(const OpScope& op, const Tensor& x, const Tensor& w, const OptionalTensor& b,
               const OptionalTensor& residual, const Ints& stride, const Ints& padding, const Ints& dilation,
               int64_t groups, bool channels_last, int64_t kind, Parameters parameters) {
  const Sizes s = fwd_sizes(op, x, w, groups, channels_last, stride, padding, dilation);
  check_depthwise(op, s);
  return dispatch_floating(op, x.scalar_type(), [&]<class scalar_t>() {
    Tensor y = image(op, x.scalar_type(), s.N, s.K, s.y, channels_last);
    auto* px = image_in<scalar_t>(op, x, "x", s.N, s.C, s.x, channels_last);
    auto* pw = image_in<scalar_t>(op, w, "w", s.K, 1, s.r, channels_last);
    const Epilogue<scalar_t> epilogue{
        op.in_optional<scalar_t>(b, "b", {s.K}),
        optional_image_in<scalar_t>(op, residual, "residual", s.N, s.K, s.y, channels_last), int(kind), parameters};
    auto* py = image_out<scalar_t>(op, y, "y", s.N, s.K, s.y, channels_last);
    filter(s, forward_space(s), false, channels_last, px, pw, epilogue, py);
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
  return dispatch_floating(op, dy.scalar_type(), [&]<class scalar_t>() {
    Tensor dx = image(op, dy.scalar_type(), s.N, s.C, s.x, channels_last);
    auto* pdy = image_in<scalar_t>(op, dy, "dy", s.N, s.K, s.y, channels_last);
    auto* pw = image_in<scalar_t>(op, w, "w", s.K, 1, s.r, channels_last);
    const Epilogue<scalar_t> epilogue{op.in_optional<scalar_t>(b, "b", {s.C})};
    auto* pdx = image_out<scalar_t>(op, dx, "dx", s.N, s.C, s.x, channels_last);
    each_phase(s, [&](const Space& space) { filter(s, space, true, channels_last, pdy, pw, epilogue, pdx); });
    return dx;
  });
}

Tensor depthwise_conv_wgrad(const Tensor& dy, const Tensor& x, Ints taps, Ints stride, Ints padding, Ints dilation,
                            int64_t groups, bool channels_last, std::string) {
  OpScope op("depthwise_conv_wgrad", dy);
  const Sizes s = wgrad_sizes(op, dy, x, taps, groups, channels_last, stride, padding, dilation);
  check_depthwise(op, s);
  return dispatch_floating(op, x.scalar_type(), [&]<class scalar_t>() {
    using acc_t = accumulate_t<scalar_t>;
    Tensor dw = image(op, x.scalar_type(), s.K, 1, s.r, channels_last);
    auto* pdy = image_in<scalar_t>(op, dy, "dy", s.N, s.K, s.y, channels_last);
    auto* px = image_in<scalar_t>(op, x, "x", s.N, s.C, s.x, channels_last);
    auto* pdw = image_out<scalar_t>(op, dw, "dw", s.K, 1, s.r, channels_last);
    // Parts of the batch by shape alone: the sums do not depend on the number of threads.
    const int64_t T = s.taps(), M = s.K / s.C, most = (8 << 20) / int64_t(sizeof(acc_t)) / (s.K * T);
    const int64_t parts = std::max<int64_t>(std::min({s.N, most, int64_t(8)}), 1);
    Buffer<acc_t> part(parts * s.K * T);
    if (channels_last)
      depthwise::weight_gradient_channels_last(forward_space(s), s.N, s.K, M, parts, pdy, px, part.get());
    else
      depthwise::weight_gradient_planes(forward_space(s), s.N, s.C, M, parts, pdy, px, part.get());
    for (int64_t k = 0; k < s.K; ++k)
      for (int64_t tap = 0; tap < T; ++tap) {
        acc_t sum = 0;
        for (int64_t p = 0; p < parts; ++p) sum += part[p * s.K * T + (channels_last ? tap * s.K + k : k * T + tap)];
        pdw[k * T + tap] = scalar_t(sum);
      }
    return dw;
  });
}

}  // namespace

PYOPS_LIBRARY(m) {
  PYOPS_IMPL(m, depthwise_conv_fwd);
  PYOPS_IMPL(m, depthwise_conv_act_fwd);
  PYOPS_IMPL(m, depthwise_conv_dgrad);
  PYOPS_IMPL(m, depthwise_conv_wgrad);
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY
