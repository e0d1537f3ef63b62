// conv · CPU
//   act    y = f(fwd + r), f by number (common/activation.h)
//   fwd    y[n,k,p] = b[k] + sum_{c,r} w[k,c,r] * x[n,c, p*stride - padding + r*dilation]
//   dgrad  dx[n,c,h] = b[c] + sum of w[k,c,r] * dy[n,k,p] over k and the (p, r) that meet in h
//   wgrad  dw[k,c,r] = sum_{n,p} dy[n,k,p] * x[n,c, p*stride - padding + r*dilation]
// layout   x: [N, C, D, H, W] · w: [K, C/G, taps] · y: [N, K, space]
//          channels last: x: [N, D, H, W, C] · w: [K, taps, C/G]
// mapping  products of blocks in registers (gemm.h). Planes: lanes over pixels, which read a padded copy of a block of
//          the image, shifted by the tap (conv_planes.h), or columns where images are tiny (conv_gemm.h); channels
//          last: lanes over output channels (conv_pixels.h). 3 x 3 taps of stride 1 in float32 take fewer products where
//          that is cheaper (conv_winograd.h, conv_choice.h). Threads over blocks of pixels, then of output channels;
//          wgrad: blocks of dw and ranges of pixels
//          (conv_weight.h)
// memory   blocks of at most 512 KiB a thread, weights in portions of 16 MiB; Winograd: 14 MiB in all
// numerics sums in fp32 (fp64 for fp64), in an order that depends on the shape alone
#include "cpu/conv_pixels.h"
#include "cpu/conv_weight.h"
#include "cpu/conv_winograd.h"

#include "common/conv_binding.h"
#include "common/registry.h"

namespace pyops::PYOPS_CPU_CAPABILITY {
namespace {

using namespace conv;

// y of a forward or of a gradient in the input, by the algorithm that is chosen, or the cheapest.
template <class scalar_t>
void product(const Sizes& sizes, const Space& space, bool transposed, bool channels_last, const std::string& algorithm,
             const scalar_t* x, const scalar_t* w, const Epilogue<scalar_t>& epilogue, scalar_t* y) {
  const conv_gemm::Problem p = conv_gemm::problem_of(sizes, space, transposed, channels_last);
  if constexpr (std::is_same_v<scalar_t, float>)
    if (const int m = conv_choice::winograd_tile(space, p.N, p.C, p.M, algorithm); m != 0)
      return conv_winograd::product(p, m, channels_last, x, w, epilogue, y);
  if (channels_last)
    conv_pixels::Convolution<scalar_t>(p, x, w, epilogue, y)();
  else if (algorithm != "columns" && conv_planes::fits<scalar_t>(p))
    conv_planes::product(p, x, w, epilogue, y);
  else
    conv_gemm::planes(p, x, w, epilogue, y);
}

// ---- binding

// y = f(conv(x, w) + b + residual); kind -1: neither f nor residual.
Tensor forward(const OpScope& op, const Tensor& x, const Tensor& w, const OptionalTensor& b,
               const OptionalTensor& residual, const Ints& stride, const Ints& padding, const Ints& dilation,
               int64_t groups, bool channels_last, const std::string& algorithm, int64_t kind, Parameters parameters) {
  const Sizes s = fwd_sizes(op, x, w, groups, channels_last, stride, padding, dilation);
  return dispatch_floating(op, x.scalar_type(), [&]<class scalar_t>() {
    Tensor y = image(op, x.scalar_type(), s.N, s.K, s.y, channels_last);
    auto* px = image_in<scalar_t>(op, x, "x", s.N, s.C, s.x, channels_last);
    auto* pw = image_in<scalar_t>(op, w, "w", s.K, s.C / s.G, s.r, channels_last);
    const Epilogue<scalar_t> epilogue{
        op.in_optional<scalar_t>(b, "b", {s.K}),
        optional_image_in<scalar_t>(op, residual, "residual", s.N, s.K, s.y, channels_last), int(kind), parameters};
    auto* py = image_out<scalar_t>(op, y, "y", s.N, s.K, s.y, channels_last);
    if (s.N * s.y_plane() > 0) product(s, forward_space(s), false, channels_last, algorithm, px, pw, epilogue, py);
    return y;
  });
}

Tensor conv_fwd(const Tensor& x, const Tensor& w, const OptionalTensor& b, Ints stride, Ints padding, Ints dilation,
                int64_t groups, bool channels_last, std::string algorithm) {
  OpScope op("conv_fwd", x);
  return forward(op, x, w, b, {}, stride, padding, dilation, groups, channels_last, algorithm, -1, {});
}

Tensor conv_act_fwd(const Tensor& x, const Tensor& w, const OptionalTensor& b, const OptionalTensor& residual,
                    Ints stride, Ints padding, Ints dilation, int64_t groups, bool channels_last, std::string algorithm,
                    int64_t kind, double pa, double pb, double pc) {
  OpScope op("conv_act_fwd", x);
  activation::check_kind(op, kind);
  return forward(op, x, w, b, residual, stride, padding, dilation, groups, channels_last, algorithm, kind,
                 {pa, pb, pc});
}

Tensor conv_dgrad(const Tensor& dy, const Tensor& w, const OptionalTensor& b, Ints size, Ints stride, Ints padding,
                  Ints dilation, int64_t groups, bool channels_last, std::string algorithm) {
  OpScope op("conv_dgrad", dy);
  const Sizes s = dgrad_sizes(op, dy, w, size, groups, channels_last, stride, padding, dilation);
  return dispatch_floating(op, dy.scalar_type(), [&]<class scalar_t>() {
    Tensor dx = image(op, dy.scalar_type(), s.N, s.C, s.x, channels_last);
    auto* pdy = image_in<scalar_t>(op, dy, "dy", s.N, s.K, s.y, channels_last);
    auto* pw = image_in<scalar_t>(op, w, "w", s.K, s.C / s.G, s.r, channels_last);
    const Epilogue<scalar_t> epilogue{op.in_optional<scalar_t>(b, "b", {s.C})};
    auto* pdx = image_out<scalar_t>(op, dx, "dx", s.N, s.C, s.x, channels_last);
    if (s.N > 0)
      each_phase(
          s, [&](const Space& space) { product(s, space, true, channels_last, algorithm, pdy, pw, epilogue, pdx); });
    return dx;
  });
}

Tensor conv_wgrad(const Tensor& dy, const Tensor& x, Ints taps, Ints stride, Ints padding, Ints dilation,
                  int64_t groups, bool channels_last, std::string) {
  OpScope op("conv_wgrad", dy);
  const Sizes s = wgrad_sizes(op, dy, x, taps, groups, channels_last, stride, padding, dilation);
  return dispatch_floating(op, x.scalar_type(), [&]<class scalar_t>() {
    Tensor dw = image(op, x.scalar_type(), s.K, s.C / s.G, s.r, channels_last);
    auto* pdy = image_in<scalar_t>(op, dy, "dy", s.N, s.K, s.y, channels_last);
    auto* px = image_in<scalar_t>(op, x, "x", s.N, s.C, s.x, channels_last);
    auto* pdw = image_out<scalar_t>(op, dw, "dw", s.K, s.C / s.G, s.r, channels_last);
    conv_weight::Gradient<scalar_t>(s, channels_last, pdy, px)(pdw);
    return dw;
  });
}

}  // namespace

PYOPS_LIBRARY(m) {
  PYOPS_IMPL(m, conv_fwd);
  PYOPS_IMPL(m, conv_act_fwd);
  PYOPS_IMPL(m, conv_dgrad);
  PYOPS_IMPL(m, conv_wgrad);
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY
