// layer_norm · CPU
//   y[m,n]  = (x[m,n] - mean[m]) * rstd[m] * w[n] + b[n]
//   dx[m,n] = rstd * (g - mean_n(g) - xhat * mean_n(g * xhat)),  g = dy * w,  xhat = (x - mean) * rstd
//   dw[n]   = sum_m dy * xhat,  db[n] = sum_m dy
// layout   x, y, dy, dx: [M, N] row-major · w, b, dw, db: [N] · mean, rstd: [M]
// mapping  a thread takes whole rows; rows of more than wide_elements are shared by threads in blocks
// memory   x read once, y written once while a row stays in cache; backward: dy and x once, dx once
// numerics mean and variance as in moments.h; dw and db: fixed chunks of rows, added in order
#include "common/registry.h"
#include "cpu/moments.h"
#include "cpu/norm_rows.h"
#include "cpu/parallel.h"

namespace pyops::PYOPS_CPU_CAPABILITY {

// ---- kernels

template <bool affine, class scalar_t, class acc_t>
void layer_norm_run(const scalar_t* __restrict__ x, const acc_t* __restrict__ w, const acc_t* __restrict__ b,
                    double mean, double rstd, scalar_t* __restrict__ y, int64_t n, bool streamed) {
  using V = Vec<acc_t>;
  const SplitMean<acc_t> split(mean);
  const V high(split.high), scale{acc_t(rstd)}, shift{acc_t(-split.low * rstd)};
  write_run<acc_t>(y, n, streamed, [&](int64_t i, auto lanes) {
    fetch_ahead(x + i);
    V xhat = fma(V::load(x + i, lanes) - high, scale, shift);
    if constexpr (affine) return fma(xhat, V::load(w + i, lanes), V::load(b + i, lanes));
    return xhat;
  });
}

// R short rows side by side: where one row would wait for its own sums, R rows wait together. Each row is computed as
// it would be alone.
template <bool affine, int R, class scalar_t, class acc_t>
void layer_norm_fwd_group(const scalar_t* __restrict__ x, const acc_t* __restrict__ w, const acc_t* __restrict__ b,
                          scalar_t* __restrict__ y, acc_t* mean, acc_t* rstd, int64_t N, double eps, bool streamed) {
  using V = Vec<acc_t>;
  touch_ahead(x, R * N);
  V total[R], first[R], second[R], high[R], scale[R], shift[R];
  each_vector<acc_t>(N, [&](int64_t i, auto lanes) {
    for (int r = 0; r < R; ++r) total[r] += V::load(x + r * N + i, lanes);
  });
  for (int r = 0; r < R; ++r) high[r] = V(sum(total[r]) / acc_t(N));
  each_vector<acc_t>(N, [&](int64_t i, auto lanes) {
    for (int r = 0; r < R; ++r) {
      V d = keep(V::load(x + r * N + i, lanes) - high[r], lanes);
      first[r] += d;
      second[r] = fma(d, d, second[r]);
    }
  });
  for (int r = 0; r < R; ++r) {
    const double low = double(sum(first[r])) / double(N), variance = double(sum(second[r])) / double(N) - low * low;
    const double row_rstd = reciprocal_std(variance < 0 ? 0 : variance, eps);
    mean[r] = acc_t(double(high[r].v[0]) + low);
    rstd[r] = acc_t(row_rstd);
    scale[r] = V(acc_t(row_rstd));
    shift[r] = V(acc_t(-low * row_rstd));
  }
  write_row_group<acc_t, R>(y, N, N, streamed, [&](int64_t i, auto lanes, auto& v) {
    V weight, bias;
    if constexpr (affine) weight = V::load(w + i, lanes), bias = V::load(b + i, lanes);
    for (int r = 0; r < R; ++r) {
      fetch_ahead(x + r * N + i);
      v[r] = fma(V::load(x + r * N + i, lanes) - high[r], scale[r], shift[r]);
      if constexpr (affine) v[r] = fma(v[r], weight, bias);
    }
  });
}

template <bool affine, class scalar_t, class acc_t>
void layer_norm_fwd_rows(const scalar_t* x, const acc_t* w, const acc_t* b, scalar_t* y, acc_t* mean, acc_t* rstd,
                         int64_t M, int64_t N, double eps) {
  const bool grouped = forward_grouped(N);
  const bool streamed = is_streamed(M * N, sizeof(scalar_t)) && (!grouped || rows_aligned(y, N));
  parallel_for(M, row_grain(N), [&](int64_t begin, int64_t end) {
    int64_t m = begin;
    for (; grouped && m + 4 <= end; m += 4)
      layer_norm_fwd_group<affine, 4>(x + m * N, w, b, y + m * N, mean + m, rstd + m, N, eps, streamed);
    for (; grouped && m < end; ++m)
      layer_norm_fwd_group<affine, 1>(x + m * N, w, b, y + m * N, mean + m, rstd + m, N, eps, streamed);
    for (; m < end; ++m) {
      touch_ahead(x + m * N, N);
      const Moments all = row_moments(x + m * N, N);
      const double row_mean = all.mean(), row_rstd = reciprocal_std(all.variance(), eps);
      mean[m] = acc_t(row_mean);
      rstd[m] = acc_t(row_rstd);
      each_wide_block(N, [&](int64_t i, int64_t n) {
        layer_norm_run<affine>(x + m * N + i, w + i, b + i, row_mean, row_rstd, y + m * N + i, n, streamed);
      });
    }
    if (streamed) stream_fence();
  });
}

// Sum of g and of g * (x - mean) over one run.
template <class scalar_t, class acc_t>
RowSums layer_norm_bwd_sums(const scalar_t* __restrict__ dy, const scalar_t* __restrict__ x,
                            const acc_t* __restrict__ w, acc_t mean, int64_t n) {
  using V = Vec<acc_t>;
  Totals<acc_t, 2> total;
  accumulate(total, n, [&](int64_t i, auto lanes, auto& t) {
    const V g = V::load(dy + i, lanes) * V::load(w + i, lanes);
    t[0] += g;
    t[1] = fma(g, V::load(x + i, lanes) - V(mean), t[1]);
  });
  return {double(sum(total[0])), double(sum(total[1]))};
}

// dx of one run, and its share of dw and db; null where not wanted.
template <bool need_dx, bool need_dw, class scalar_t, class acc_t>
void layer_norm_bwd_run(const scalar_t* __restrict__ dy, const scalar_t* __restrict__ x, const acc_t* __restrict__ w,
                        acc_t mean, acc_t rstd, RowSums sums, int64_t N, scalar_t* __restrict__ dx,
                        acc_t* __restrict__ dw, acc_t* __restrict__ db, int64_t n, bool streamed) {
  using V = Vec<acc_t>;
  const double r = rstd;
  const V along_g(rstd), along_x{acc_t(-r * r * r * sums.gx / double(N))}, shift{acc_t(-r * sums.g / double(N))};
  auto step = [&](int64_t i, auto lanes) {
    fetch_ahead(dy + i), fetch_ahead(x + i);
    const V d = V::load(dy + i, lanes), centered = V::load(x + i, lanes) - V(mean), g = d * V::load(w + i, lanes);
    if constexpr (need_dw) {
      fma(d, centered * along_g, V::load(dw + i, lanes)).store(dw + i, lanes);
      (V::load(db + i, lanes) + d).store(db + i, lanes);
    }
    return fma(g, along_g, fma(centered, along_x, shift));
  };
  if constexpr (need_dx)
    write_run<acc_t>(dx, n, streamed, step);
  else
    each_vector<acc_t>(n, step);
}

// R rows side by side: w, dw and db are loaded and stored once for all of them. Each row is computed, and added to dw
// and db, as it would be alone.
template <bool need_dx, bool need_dw, int R, class scalar_t, class acc_t>
void layer_norm_bwd_group(const scalar_t* __restrict__ dy, const scalar_t* __restrict__ x, const acc_t* __restrict__ w,
                          const acc_t* __restrict__ mean, const acc_t* __restrict__ rstd, scalar_t* __restrict__ dx,
                          acc_t* __restrict__ dw, acc_t* __restrict__ db, int64_t N, bool streamed) {
  using V = Vec<acc_t>;
  touch_ahead(dy, R * N), touch_ahead(x, R * N);
  V center[R], along_g[R], along_x[R], shift[R];
  for (int r = 0; r < R; ++r) center[r] = V(mean[r]), along_g[r] = V(rstd[r]);
  if constexpr (need_dx) {
    V sum_g[R], sum_gx[R];
    each_vector<acc_t>(N, [&](int64_t i, auto lanes) {
      const V weight = V::load(w + i, lanes);
      for (int r = 0; r < R; ++r) {
        const V g = V::load(dy + r * N + i, lanes) * weight;
        sum_g[r] += g;
        sum_gx[r] = fma(g, V::load(x + r * N + i, lanes) - center[r], sum_gx[r]);
      }
    });
    for (int r = 0; r < R; ++r) {
      const double s = rstd[r];
      along_x[r] = V(acc_t(-s * s * s * double(sum(sum_gx[r])) / double(N)));
      shift[r] = V(acc_t(-s * double(sum(sum_g[r])) / double(N)));
    }
  }
  auto step = [&](int64_t i, auto lanes, V(&v)[R]) {
    const V weight = V::load(w + i, lanes);
    V to_dw, to_db;
    if constexpr (need_dw) to_dw = V::load(dw + i, lanes), to_db = V::load(db + i, lanes);
    for (int r = 0; r < R; ++r) {
      fetch_ahead(dy + r * N + i), fetch_ahead(x + r * N + i);
      V g = V::load(dy + r * N + i, lanes), centered = V::load(x + r * N + i, lanes) - center[r];
      if constexpr (need_dw) to_dw = fma(g, centered * along_g[r], to_dw), to_db += g;
      g = g * weight;
      v[r] = fma(g, along_g[r], fma(centered, along_x[r], shift[r]));
    }
    if constexpr (need_dw) to_dw.store(dw + i, lanes), to_db.store(db + i, lanes);
  };
  if constexpr (need_dx)
    write_row_group<acc_t, R>(dx, N, N, streamed, step);
  else
    each_vector<acc_t>(N, [&](int64_t i, auto lanes) {
      V unused[R];
      step(i, lanes, unused);
    });
}

template <bool need_dx, bool need_dw, class scalar_t, class acc_t>
void layer_norm_bwd_rows(const scalar_t* dy, const scalar_t* x, const acc_t* w, const acc_t* mean, const acc_t* rstd,
                         scalar_t* dx, acc_t* dw, acc_t* db, int64_t M, int64_t N) {
  const bool grouped = backward_grouped(N);
  const bool streamed = need_dx && is_streamed(M * N, sizeof(scalar_t)) && (!grouped || rows_aligned(dx, N));
  auto rows = [&](int64_t m, int64_t end, acc_t* part_w, acc_t* part_b) {
    for (; grouped && m + 2 <= end; m += 2)
      layer_norm_bwd_group<need_dx, need_dw, 2>(dy + m * N, x + m * N, w, mean + m, rstd + m, dx + m * N, part_w,
                                                part_b, N, streamed);
    for (; grouped && m < end; ++m)
      layer_norm_bwd_group<need_dx, need_dw, 1>(dy + m * N, x + m * N, w, mean + m, rstd + m, dx + m * N, part_w,
                                                part_b, N, streamed);
    for (; m < end; ++m) {
      const scalar_t *dy_row = dy + m * N, *x_row = x + m * N;
      touch_ahead(dy_row, N), touch_ahead(x_row, N);
      RowSums sums;
      if constexpr (need_dx)
        each_block(
            N, [&](int64_t i, int64_t n) { sums += layer_norm_bwd_sums(dy_row + i, x_row + i, w + i, mean[m], n); });
      layer_norm_bwd_run<need_dx, need_dw>(dy_row, x_row, w, mean[m], rstd[m], sums, N, dx + m * N, part_w, part_b, N,
                                           streamed);
    }
    if (streamed) stream_fence();
  };
  if constexpr (!need_dw)
    return parallel_for(M, row_grain(N), [&](int64_t begin, int64_t end) { rows(begin, end, nullptr, nullptr); });
  const int64_t chunks = row_chunks(M);
  Buffer<acc_t> partial(chunks * 2 * N, acc_t(0));
  parallel_for(chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      acc_t *part_w = partial.get() + chunk * 2 * N, *part_b = part_w + N;
      rows(chunk_begin(chunk, chunks, M), chunk_begin(chunk + 1, chunks, M), part_w, part_b);
    }
  });
  add_chunks(partial.get(), chunks, 2 * N, dw, N);
  add_chunks(partial.get() + N, chunks, 2 * N, db, N);
}

// Rows too wide for a cache: sums of every row first, then blocks of columns, each through all rows.
template <bool need_dx, bool need_dw, class scalar_t, class acc_t>
void layer_norm_bwd_wide(const scalar_t* dy, const scalar_t* x, const acc_t* w, const acc_t* mean, const acc_t* rstd,
                         scalar_t* dx, acc_t* dw, acc_t* db, int64_t M, int64_t N) {
  const bool streamed = need_dx && is_streamed(M * N, sizeof(scalar_t));
  Buffer<RowSums> sums(M, RowSums{});
  for (int64_t m = 0; need_dx && m < M; ++m)
    sums[m] = sum_of_blocks<RowSums>(
        N, [&](int64_t i, int64_t n) { return layer_norm_bwd_sums(dy + m * N + i, x + m * N + i, w + i, mean[m], n); });
  if (need_dw) {
    std::memset(dw, 0, size_t(N) * sizeof(acc_t));
    std::memset(db, 0, size_t(N) * sizeof(acc_t));
  }
  parallel_for(ceil_div(N, block_elements), 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block)
      for (int64_t m = 0, i = block * block_elements; m < M; ++m)
        layer_norm_bwd_run<need_dx, need_dw>(dy + m * N + i, x + m * N + i, w + i, mean[m], rstd[m], sums[m], N,
                                             dx + m * N + i, dw + i, db + i, std::min(block_elements, N - i), streamed);
    if (streamed) stream_fence();
  });
}

// ---- binding

std::tuple<Tensor, Tensor, Tensor> layer_norm_fwd(const Tensor& x, const OptionalTensor& weight,
                                                  const OptionalTensor& bias, double eps) {
  OpScope op("layer_norm_fwd", x);
  op.check(x.dim() == 2, "x must be [M, N]");
  const int64_t M = x.size(0), N = x.size(1);
  return dispatch_floating_mixed(op, x.scalar_type(), dtype_of(weight, bias), [&]<class scalar_t, class weight_t>() {
    using acc_t = accumulate_t<scalar_t>;
    Tensor y = op.empty<scalar_t>({M, N}), mean = op.empty<acc_t>({M}), rstd = op.empty<acc_t>({M});
    auto* px = op.in<scalar_t>(x, "x", {M, N});
    auto* pw = op.in_optional<weight_t>(weight, "weight", {N});
    auto* pb = op.in_optional<weight_t>(bias, "bias", {N});
    auto* py = op.out<scalar_t>(y, "y", {M, N});
    auto *pmean = op.out<acc_t>(mean, "mean", {M}), *prstd = op.out<acc_t>(rstd, "rstd", {M});
    if (pw == nullptr && pb == nullptr) {
      layer_norm_fwd_rows<false, scalar_t, acc_t>(px, nullptr, nullptr, py, pmean, prstd, M, N, eps);
    } else {
      const Parameter<acc_t, weight_t> w(pw, N, 1), b(pb, N, 0);
      layer_norm_fwd_rows<true>(px, w.get(), b.get(), py, pmean, prstd, M, N, eps);
    }
    return std::tuple(y, mean, rstd);
  });
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd(const Tensor& dy, const Tensor& x, const OptionalTensor& weight,
                                                  const Tensor& mean, const Tensor& rstd, bool need_dx, bool need_dw) {
  OpScope op("layer_norm_bwd", dy);
  op.check(x.dim() == 2, "x must be [M, N]");
  const int64_t M = x.size(0), N = x.size(1);
  return dispatch_floating_mixed(op, x.scalar_type(), dtype_of(weight), [&]<class scalar_t, class weight_t>() {
    using acc_t = accumulate_t<scalar_t>;
    Tensor dx = need_dx ? op.empty<scalar_t>({M, N}) : op.empty<scalar_t>({0});
    Tensor dw = op.empty<weight_t>({need_dw ? N : 0}), db = op.empty<weight_t>({need_dw ? N : 0});
    auto *pdy = op.in<scalar_t>(dy, "dy", {M, N}), *px = op.in<scalar_t>(x, "x", {M, N});
    auto* pw = op.in_optional<weight_t>(weight, "weight", {N});
    auto *pmean = op.in<acc_t>(mean, "mean", {M}), *prstd = op.in<acc_t>(rstd, "rstd", {M});
    auto* pdx = need_dx ? op.out<scalar_t>(dx, "dx", {M, N}) : nullptr;
    const Parameter<acc_t, weight_t> w(pw, N, 1);
    Buffer<acc_t> sum_w(need_dw ? N : 0), sum_b(need_dw ? N : 0);
    dispatch_wanted(need_dx, need_dw, [&]<bool want_dx, bool want_dw>() {
      if (N > wide_elements)
        layer_norm_bwd_wide<want_dx, want_dw>(pdy, px, w.get(), pmean, prstd, pdx, sum_w.get(), sum_b.get(), M, N);
      else
        layer_norm_bwd_rows<want_dx, want_dw>(pdy, px, w.get(), pmean, prstd, pdx, sum_w.get(), sum_b.get(), M, N);
    });
    if (need_dw) {
      narrow(op.out<weight_t>(dw, "dw", {N}), sum_w.get(), N);
      narrow(op.out<weight_t>(db, "db", {N}), sum_b.get(), N);
    }
    return std::tuple(dx, dw, db);
  });
}

PYOPS_LIBRARY(m) {
  PYOPS_IMPL(m, layer_norm_fwd);
  PYOPS_IMPL(m, layer_norm_bwd);
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY
