// group_norm · CPU (instance norm: groups == C)
//   y[n,c,s] = (x[n,c,s] - mean[n,g]) * rstd[n,g] * w[c] + b[c],  g = c / D,  D = C / groups
//   dx = rstd * (dy * w - mean_g(dy * w) - xhat * mean_g(dy * w * xhat)), mean_g over the D * S elements of a group
//   dw[c] = sum_{n,s} dy * xhat,  db[c] = sum_{n,s} dy
// layout   x, y, dy, dx: [N, C, *] or, channels_last, [N, *, C], S positions · w, b: [C] · mean, rstd, var: [N, groups]
// mapping  planes: a thread takes whole groups; rows: a thread takes whole samples, lanes over channels; threads share
//          a group or a sample where there are few
// memory   x is read twice, the second time from cache while a group (planes) or a sample (rows) fits; y written once
// numerics mean and variance as in moments.h; sums of a channel over samples: in order, in double
#include "common/channels.h"
#include "common/registry.h"
#include "cpu/norm_channels.h"

namespace pyops::PYOPS_CPU_CAPABILITY {

// ---- kernels

struct GroupShape {
  int64_t N, C, S, G;
  bool rows;

  int64_t D() const { return G > 0 ? C / G : 0; }
  double count() const { return double(D() * S); }

  // f(item) for every group of every sample (planes) or every sample (rows).
  template <class F>
  void each_item(bool streamed, F&& f) const {
    const int64_t items = rows ? N : N * G, elements = rows ? S * C : D() * S;
    parallel_for(items, item_grain(items, elements), [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) f(item);
      if (streamed) stream_fence();
    });
  }
};

template <class scalar_t, class acc_t>
void group_norm_fwd_kernel(const scalar_t* x, const acc_t* w, const acc_t* b, scalar_t* y, acc_t* mean, acc_t* rstd,
                           acc_t* var, GroupShape shape, double eps) {
  const int64_t N = shape.N, C = shape.C, S = shape.S, G = shape.G, D = shape.D();
  const bool streamed = is_streamed(N * C * S, sizeof(scalar_t));
  auto finish = [&](int64_t group, const Moments& all) {
    mean[group] = acc_t(all.mean());
    var[group] = acc_t(all.variance());
    rstd[group] = acc_t(reciprocal_std(all.variance(), eps));
    return reciprocal_std(all.variance(), eps);
  };
  if (shape.rows)
    return shape.each_item(streamed, [&](int64_t n) {
      Buffer<double> sum(C), m2(C);
      column_moments(x + n * S * C, S, C, sum.get(), m2.get());
      ChannelTable<acc_t, 3> table(C);
      for (int64_t g = 0; g < G; ++g) {
        // All channels hold S elements, so their moments join without a division each.
        Moments all{shape.count(), 0, 0};
        for (int64_t c = g * D; c < (g + 1) * D; ++c) all.sum += sum[c], all.m2 += m2[c];
        const double group_mean = all.mean(), per_row = S > 0 ? 1 / double(S) : 0;
        for (int64_t c = g * D; c < (g + 1) * D && D > 1; ++c) {
          const double delta = sum[c] * per_row - group_mean;
          all.m2 += delta * delta * double(S);
        }
        const double r = finish(n * G + g, all);
        for (int64_t c = g * D; c < (g + 1) * D; ++c)
          table.set(c, Affine<acc_t>(group_mean, r * double(w[c]), double(b[c])));
      }
      affine_rows(x + n * S * C, table, y + n * S * C, S, C, streamed);
    });
  const RunBlocks group{.runs = 1, .stride = 0, .n = D * S}, planes{.runs = 1, .stride = 0, .n = S};
  shape.each_item(streamed, [&](int64_t item) {
    const scalar_t* x_group = x + item * D * S;
    const Moments all = group.sum<Moments>([&](int64_t offset, int64_t, int64_t n) {
      touch_ahead(x_group + offset, n);
      return block_moments(x_group + offset, 1, 0, n);
    });
    const double r = finish(item, all);
    const bool cached = D * S <= cached_elements;
    for (int64_t k = 0; k < D; ++k) {
      const int64_t d = cached ? k : D - 1 - k, c = item % G * D + d;
      const Affine<acc_t> a(all.mean(), r * double(w[c]), double(b[c]));
      planes.each_again(streamed, 1, [&](int64_t offset, int64_t n) {
        affine_plane(x_group + d * S + offset, a, y + (item * D + d) * S + offset, n, streamed);
      });
    }
  });
}

template <class scalar_t, class acc_t>
void group_norm_bwd_kernel(const scalar_t* dy, const scalar_t* x, const acc_t* w, const acc_t* mean, const acc_t* rstd,
                           scalar_t* dx, acc_t* dw, acc_t* db, GroupShape shape, bool need_dw) {
  const int64_t N = shape.N, C = shape.C, S = shape.S, G = shape.G, D = shape.D();
  const bool need_dx = dx != nullptr, streamed = need_dx && is_streamed(N * C * S, sizeof(scalar_t));
  Buffer<RowSums> sums(N * C);

  // From the sums of the channels of one group to the coefficients of its dx.
  auto coefficients = [&](int64_t item, auto&& put) {
    RowSums all;
    for (int64_t d = 0; d < D; ++d) {
      const double weight = w[item % G * D + d];
      const RowSums& s = sums[item * D + d];
      all += {weight * s.g, weight * s.gx};
    }
    const double r = rstd[item], count = shape.count();
    for (int64_t d = 0; d < D; ++d)
      put(d, Gradient<acc_t>{mean[item], acc_t(r * double(w[item % G * D + d])), acc_t(-r * r * r * all.gx / count),
                             acc_t(-r * all.g / count)});
  };
  if (shape.rows) {
    shape.each_item(streamed, [&](int64_t n) {
      ChannelTable<acc_t, 4> table(C);
      for (int64_t c = 0; c < C; ++c) table[0][c] = mean[n * G + c / D];
      const int64_t sample = n * S * C;
      column_gradient_sums(dy + sample, x + sample, table[0], S, C, sums.get() + n * C);
      if (!need_dx) return;
      for (int64_t g = 0; g < G; ++g)
        coefficients(n * G + g, [&](int64_t d, const Gradient<acc_t>& a) { table.set(g * D + d, a); });
      gradient_rows(dy + sample, x + sample, table, dx + sample, S, C, streamed);
    });
  } else {
    const RunBlocks planes{.runs = 1, .stride = 0, .n = S};
    shape.each_item(streamed, [&](int64_t item) {
      for (int64_t plane = item * D; plane < (item + 1) * D; ++plane)
        sums[plane] = planes.sum<RowSums>([&](int64_t offset, int64_t, int64_t n) {
          touch_ahead(dy + plane * S + offset, n), touch_ahead(x + plane * S + offset, n);
          return gradient_sums(dy + plane * S + offset, x + plane * S + offset, mean[item], 1, 0, n);
        });
      if (!need_dx) return;
      coefficients(item, [&](int64_t d, const Gradient<acc_t>& a) {
        const int64_t at = (item * D + d) * S;
        planes.each_again(streamed, 2, [&](int64_t offset, int64_t n) {
          gradient_plane(dy + at + offset, x + at + offset, a, dx + at + offset, n, streamed);
        });
      });
    });
  }
  for (int64_t c = 0; need_dw && c < C; ++c) {
    RowSums all;
    for (int64_t n = 0; n < N; ++n) {
      const RowSums& s = sums[n * C + c];
      all += {s.g, s.gx * double(rstd[n * G + c / D])};
    }
    dw[c] = acc_t(all.gx);
    db[c] = acc_t(all.g);
  }
}

// ---- binding

GroupShape group_shape(const OpScope& op, const Tensor& x, int64_t groups, bool channels_last) {
  const auto [N, C, S] = channel_sizes(op, x, channels_last);
  op.check(groups > 0 && C % groups == 0, "groups must divide the channels: got ", groups, " groups, ", C, " channels");
  return {N, C, S, groups, channels_last || S == 1};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> group_norm_fwd(const Tensor& x, const OptionalTensor& weight,
                                                          const OptionalTensor& bias, int64_t groups, double eps,
                                                          bool channels_last) {
  OpScope op("group_norm_fwd", x);
  const GroupShape shape = group_shape(op, x, groups, channels_last);
  const int64_t N = shape.N, C = shape.C;
  return dispatch_floating_mixed(op, x.scalar_type(), dtype_of(weight, bias), [&]<class scalar_t, class weight_t>() {
    using acc_t = accumulate_t<scalar_t>;
    Tensor y = op.empty<scalar_t>(ShapeRef(x));
    Tensor mean = op.empty<acc_t>({N, groups}), rstd = op.empty<acc_t>({N, groups}), var = op.empty<acc_t>({N, groups});
    auto* px = op.in<scalar_t>(x, "x", ShapeRef(x));
    const Parameter<acc_t, weight_t> w(op.in_optional<weight_t>(weight, "weight", {C}), C, 1);
    const Parameter<acc_t, weight_t> b(op.in_optional<weight_t>(bias, "bias", {C}), C, 0);
    group_norm_fwd_kernel(px, w.get(), b.get(), op.out<scalar_t>(y, "y", ShapeRef(x)),
                          op.out<acc_t>(mean, "mean", {N, groups}), op.out<acc_t>(rstd, "rstd", {N, groups}),
                          op.out<acc_t>(var, "var", {N, groups}), shape, eps);
    return std::tuple(y, mean, rstd, var);
  });
}

std::tuple<Tensor, Tensor, Tensor> group_norm_bwd(const Tensor& dy, const Tensor& x, const OptionalTensor& weight,
                                                  const Tensor& mean, const Tensor& rstd, int64_t groups,
                                                  bool channels_last, bool need_dx, bool need_dw) {
  OpScope op("group_norm_bwd", dy);
  const GroupShape shape = group_shape(op, x, groups, channels_last);
  const int64_t N = shape.N, C = shape.C;
  return dispatch_floating_mixed(op, x.scalar_type(), dtype_of(weight), [&]<class scalar_t, class weight_t>() {
    using acc_t = accumulate_t<scalar_t>;
    Tensor dx = need_dx ? op.empty<scalar_t>(ShapeRef(x)) : op.empty<scalar_t>({0});
    Tensor dw = op.empty<weight_t>({need_dw ? C : 0}), db = op.empty<weight_t>({need_dw ? C : 0});
    auto* pdy = op.in<scalar_t>(dy, "dy", ShapeRef(x));
    auto* px = op.in<scalar_t>(x, "x", ShapeRef(x));
    auto* pdx = need_dx ? op.out<scalar_t>(dx, "dx", ShapeRef(x)) : nullptr;
    const Parameter<acc_t, weight_t> w(op.in_optional<weight_t>(weight, "weight", {C}), C, 1);
    Buffer<acc_t> sum_w(C), sum_b(C);
    group_norm_bwd_kernel(pdy, px, w.get(), op.in<acc_t>(mean, "mean", {N, groups}),
                          op.in<acc_t>(rstd, "rstd", {N, groups}), pdx, sum_w.get(), sum_b.get(), shape, need_dw);
    if (need_dw) {
      narrow(op.out<weight_t>(dw, "dw", {C}), sum_w.get(), C);
      narrow(op.out<weight_t>(db, "db", {C}), sum_b.get(), C);
    }
    return std::tuple(dx, dw, db);
  });
}

PYOPS_LIBRARY(m) {
  PYOPS_IMPL(m, group_norm_fwd);
  PYOPS_IMPL(m, group_norm_bwd);
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY
