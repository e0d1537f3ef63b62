// batch_norm · CPU
//   y[n,c,s] = (x[n,c,s] - mean[c]) * rstd[c] * w[c] + b[c]
//   training: dx = w * rstd * (dy - mean(dy) - xhat * mean(dy * xhat));  inference: dx = dy * w * rstd
//   dw[c] = sum dy * xhat,  db[c] = sum dy
// layout   x, y, dy, dx: [N, C, *] or, channels_last, [N, *, C], S positions · w, b, mean, rstd, var: [C]
// mapping  planes: a thread takes whole channels, or threads share one where channels are few; rows: lanes over
//          channels
// memory   planes: a channel of all samples is read twice, the second time from cache; rows: read twice; written once
// numerics mean and variance as in moments.h
#include "common/channels.h"
#include "common/registry.h"
#include "cpu/norm_channels.h"

namespace pyops::PYOPS_CPU_CAPABILITY {

// ---- kernels

// Shape and fence of one call; S == 1 is the same memory in both layouts, and rows are the faster way to read it.
struct BatchShape {
  int64_t N, C, S;
  bool rows;

  int64_t count() const { return N * S; }
  RunBlocks channel() const { return {.runs = N, .stride = C * S, .n = S}; }

  template <class F>
  void each_channel(bool streamed, F&& f) const {
    parallel_for(C, item_grain(C, count()), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) f(c);
      if (streamed) stream_fence();
    });
  }
};

template <class scalar_t, class acc_t>
void batch_norm_fwd_kernel(const scalar_t* x, const acc_t* w, const acc_t* b, scalar_t* y, acc_t* mean, acc_t* rstd,
                           acc_t* var, BatchShape shape, double eps) {
  const auto [N, C, S, rows] = shape;
  const bool streamed = is_streamed(N * C * S, sizeof(scalar_t));
  auto finish = [&](int64_t c, const Moments& all) {
    const double r = reciprocal_std(all.variance(), eps);
    mean[c] = acc_t(all.mean());
    var[c] = acc_t(all.variance());
    rstd[c] = acc_t(r);
    return Affine<acc_t>(all.mean(), r * double(w[c]), double(b[c]));
  };
  if (rows) {
    Buffer<double> sum(C), m2(C);
    column_moments(x, N * S, C, sum.get(), m2.get());
    ChannelTable<acc_t, 3> table(C);
    for (int64_t c = 0; c < C; ++c) table.set(c, finish(c, {double(N * S), sum[c], m2[c]}));
    return affine_rows(x, table, y, N * S, C, streamed);
  }
  const RunBlocks blocks = shape.channel();
  shape.each_channel(streamed, [&](int64_t c) {
    const scalar_t* x_channel = x + c * S;
    const Affine<acc_t> a = finish(c, blocks.sum<Moments>([&](int64_t offset, int64_t runs, int64_t n) {
      return block_moments(x_channel + offset, runs, blocks.stride, n);
    }));
    blocks.each_again(streamed, 1, [&](int64_t offset, int64_t n) {
      affine_plane(x_channel + offset, a, y + c * S + offset, n, streamed);
    });
  });
}

template <class scalar_t, class acc_t>
void batch_norm_infer_kernel(const scalar_t* x, const acc_t* w, const acc_t* b, const acc_t* mean, const acc_t* var,
                             scalar_t* y, BatchShape shape, double eps) {
  const auto [N, C, S, rows] = shape;
  const bool streamed = is_streamed(N * C * S, sizeof(scalar_t));
  ChannelTable<acc_t, 3> table(C);
  for (int64_t c = 0; c < C; ++c)
    table.set(c, Affine<acc_t>(double(mean[c]), reciprocal_std(double(var[c]), eps) * double(w[c]), double(b[c])));
  if (rows) return affine_rows(x, table, y, N * S, C, streamed);
  parallel_for(N * C, item_grain(N * C, S), [&, C = C, S = S](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      Affine<acc_t> a;
      a.high = table[0][plane % C], a.scale = table[1][plane % C], a.shift = table[2][plane % C];
      each_wide_block(
          S, [&](int64_t i, int64_t n) { affine_plane(x + plane * S + i, a, y + plane * S + i, n, streamed); });
    }
    if (streamed) stream_fence();
  });
}

template <class scalar_t, class acc_t>
void batch_norm_bwd_kernel(const scalar_t* dy, const scalar_t* x, const acc_t* w, const acc_t* mean, const acc_t* rstd,
                           scalar_t* dx, acc_t* dw, acc_t* db, BatchShape shape, bool training, bool need_dw) {
  const auto [N, C, S, rows] = shape;
  const bool need_dx = dx != nullptr, need_sums = need_dw || (need_dx && training);
  const bool streamed = need_dx && is_streamed(N * C * S, sizeof(scalar_t));
  auto finish = [&](int64_t c, RowSums sums) {
    const double r = rstd[c], count = double(shape.count());
    if (need_dw) {
      dw[c] = acc_t(sums.gx * r);
      db[c] = acc_t(sums.g);
    }
    const double along_dy = r * double(w[c]);
    if (!training) return Gradient<acc_t>{acc_t(0), acc_t(along_dy), acc_t(0), acc_t(0)};
    return Gradient<acc_t>{mean[c], acc_t(along_dy), acc_t(-along_dy * r * r * sums.gx / count),
                           acc_t(-along_dy * sums.g / count)};
  };
  if (rows) {
    Buffer<RowSums> sums(C, RowSums{});
    if (need_sums) column_gradient_sums(dy, x, mean, N * S, C, sums.get());
    ChannelTable<acc_t, 4> along(C);
    ChannelTable<acc_t, 3> scaled(C);
    for (int64_t c = 0; c < C; ++c) {
      const Gradient<acc_t> a = finish(c, sums[c]);
      along.set(c, a);
      scaled.set(c, Affine<acc_t>(0, double(a.along_dy), 0));
    }
    if (need_dx && training) gradient_rows(dy, x, along, dx, N * S, C, streamed);
    if (need_dx && !training) affine_rows(dy, scaled, dx, N * S, C, streamed);
    return;
  }
  const RunBlocks blocks = shape.channel();
  shape.each_channel(streamed, [&](int64_t c) {
    RowSums sums;
    if (need_sums)
      sums = blocks.sum<RowSums>([&](int64_t offset, int64_t runs, int64_t n) {
        return gradient_sums(dy + c * S + offset, x + c * S + offset, mean[c], runs, blocks.stride, n);
      });
    const Gradient<acc_t> a = finish(c, sums);
    if (need_dx && training)
      blocks.each_again(streamed, 2, [&](int64_t offset, int64_t n) {
        gradient_plane(dy + c * S + offset, x + c * S + offset, a, dx + c * S + offset, n, streamed);
      });
    else if (need_dx)
      blocks.each_again(streamed, 2, [&](int64_t offset, int64_t n) {
        const Affine<acc_t> scaled(0, double(a.along_dy), 0);
        affine_plane(dy + c * S + offset, scaled, dx + c * S + offset, n, streamed);
      });
  });
}

// ---- binding

BatchShape batch_shape(const OpScope& op, const Tensor& x, bool channels_last) {
  const auto [N, C, S] = channel_sizes(op, x, channels_last);
  return {N, C, S, channels_last || S == 1};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_fwd(const Tensor& x, const OptionalTensor& weight,
                                                          const OptionalTensor& bias, double eps, bool channels_last) {
  OpScope op("batch_norm_fwd", x);
  const BatchShape shape = batch_shape(op, x, channels_last);
  const int64_t C = shape.C;
  return dispatch_floating_mixed(op, x.scalar_type(), dtype_of(weight, bias), [&]<class scalar_t, class weight_t>() {
    using acc_t = accumulate_t<scalar_t>;
    Tensor y = op.empty<scalar_t>(ShapeRef(x));
    Tensor mean = op.empty<acc_t>({C}), rstd = op.empty<acc_t>({C}), var = op.empty<acc_t>({C});
    auto* px = op.in<scalar_t>(x, "x", ShapeRef(x));
    const Parameter<acc_t, weight_t> w(op.in_optional<weight_t>(weight, "weight", {C}), C, 1);
    const Parameter<acc_t, weight_t> b(op.in_optional<weight_t>(bias, "bias", {C}), C, 0);
    batch_norm_fwd_kernel(px, w.get(), b.get(), op.out<scalar_t>(y, "y", ShapeRef(x)), op.out<acc_t>(mean, "mean", {C}),
                          op.out<acc_t>(rstd, "rstd", {C}), op.out<acc_t>(var, "var", {C}), shape, eps);
    return std::tuple(y, mean, rstd, var);
  });
}

Tensor batch_norm_infer(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean,
                        const Tensor& var, double eps, bool channels_last) {
  OpScope op("batch_norm_infer", x);
  const BatchShape shape = batch_shape(op, x, channels_last);
  const int64_t C = shape.C;
  return dispatch_floating_mixed(op, x.scalar_type(), dtype_of(weight, bias), [&]<class scalar_t, class weight_t>() {
    using acc_t = accumulate_t<scalar_t>;
    Tensor y = op.empty<scalar_t>(ShapeRef(x));
    auto* px = op.in<scalar_t>(x, "x", ShapeRef(x));
    const Parameter<acc_t, weight_t> w(op.in_optional<weight_t>(weight, "weight", {C}), C, 1);
    const Parameter<acc_t, weight_t> b(op.in_optional<weight_t>(bias, "bias", {C}), C, 0);
    batch_norm_infer_kernel(px, w.get(), b.get(), op.in<acc_t>(mean, "mean", {C}), op.in<acc_t>(var, "var", {C}),
                            op.out<scalar_t>(y, "y", ShapeRef(x)), shape, eps);
    return y;
  });
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_bwd(const Tensor& dy, const Tensor& x, const OptionalTensor& weight,
                                                  const Tensor& mean, const Tensor& rstd, bool training,
                                                  bool channels_last, bool need_dx, bool need_dw) {
  OpScope op("batch_norm_bwd", dy);
  const BatchShape shape = batch_shape(op, x, channels_last);
  const int64_t C = shape.C;
  return dispatch_floating_mixed(op, x.scalar_type(), dtype_of(weight), [&]<class scalar_t, class weight_t>() {
    using acc_t = accumulate_t<scalar_t>;
    Tensor dx = need_dx ? op.empty<scalar_t>(ShapeRef(x)) : op.empty<scalar_t>({0});
    Tensor dw = op.empty<weight_t>({need_dw ? C : 0}), db = op.empty<weight_t>({need_dw ? C : 0});
    auto* pdy = op.in<scalar_t>(dy, "dy", ShapeRef(x));
    auto* px = op.in<scalar_t>(x, "x", ShapeRef(x));
    auto* pdx = need_dx ? op.out<scalar_t>(dx, "dx", ShapeRef(x)) : nullptr;
    const Parameter<acc_t, weight_t> w(op.in_optional<weight_t>(weight, "weight", {C}), C, 1);
    Buffer<acc_t> sum_w(C), sum_b(C);
    batch_norm_bwd_kernel(pdy, px, w.get(), op.in<acc_t>(mean, "mean", {C}), op.in<acc_t>(rstd, "rstd", {C}), pdx,
                          sum_w.get(), sum_b.get(), shape, training, need_dw);
    if (need_dw) {
      narrow(op.out<weight_t>(dw, "dw", {C}), sum_w.get(), C);
      narrow(op.out<weight_t>(db, "db", {C}), sum_b.get(), C);
    }
    return std::tuple(dx, dw, db);
  });
}

PYOPS_LIBRARY(m) {
  PYOPS_IMPL(m, batch_norm_fwd);
  PYOPS_IMPL(m, batch_norm_infer);
  PYOPS_IMPL(m, batch_norm_bwd);
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY
