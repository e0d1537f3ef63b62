// rms_norm · CPU
//   y[m,n]  = x[m,n] * rstd[m] * w[n],  rstd = 1 / sqrt(mean_n(x^2) + eps)
//   dx[m,n] = rstd * (g - xhat * mean_n(g * xhat)),  g = dy * w,  xhat = x * rstd
//   dw[n]   = sum_m dy * xhat
// layout   x, y, dy, dx: [M, N] row-major · w, dw: [N] · rstd: [M]
// mapping  a thread takes whole rows; rows of more than wide_elements are shared by threads in blocks
// memory   x read once, y written once while a row stays in cache; backward: dy and x once, dx once
// numerics squares are summed in acc_t inside a block, in double over blocks; dw: fixed chunks of rows, added in order
#include "common/registry.h"
#include "cpu/norm_rows.h"
#include "cpu/parallel.h"

namespace pyops::PYOPS_CPU_CAPABILITY {

// ---- kernels

template <class scalar_t>
double sum_of_squares(const scalar_t* __restrict__ x, int64_t n) {
  using acc_t = accumulate_t<scalar_t>;
  using V = Vec<acc_t>;
  Totals<acc_t, 1> total;
  accumulate(total, n, [&](int64_t i, auto lanes, auto& t) {
    V v = V::load(x + i, lanes);
    t[0] = fma(v, v, t[0]);
  });
  return double(sum(total[0]));
}

template <bool affine, class scalar_t, class acc_t>
void rms_norm_run(const scalar_t* __restrict__ x, const acc_t* __restrict__ w, acc_t rstd, scalar_t* __restrict__ y,
                  int64_t n, bool streamed) {
  using V = Vec<acc_t>;
  write_run<acc_t>(y, n, streamed, [&](int64_t i, auto lanes) {
    fetch_ahead(x + i);
    V xhat = V::load(x + i, lanes) * V(rstd);
    if constexpr (affine) return xhat * V::load(w + i, lanes);
    return xhat;
  });
}

template <bool affine, class scalar_t, class acc_t>
void rms_norm_fwd_rows(const scalar_t* x, const acc_t* w, scalar_t* y, acc_t* rstd, int64_t M, int64_t N, double eps) {
  const bool streamed = is_streamed(M * N, sizeof(scalar_t));
  parallel_for(M, row_grain(N), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      touch_ahead(x + m * N, N);
      const double squares =
          sum_of_blocks<double>(N, [&](int64_t i, int64_t n) { return sum_of_squares(x + m * N + i, n); });
      rstd[m] = acc_t(reciprocal_std(N > 0 ? squares / double(N) : 0, eps));
      each_wide_block(N, [&](int64_t i, int64_t n) {
        rms_norm_run<affine>(x + m * N + i, w + i, rstd[m], y + m * N + i, n, streamed);
      });
    }
    if (streamed) stream_fence();
  });
}

// Sum of g * x over one run.
template <class scalar_t, class acc_t>
double rms_norm_bwd_sum(const scalar_t* __restrict__ dy, const scalar_t* __restrict__ x, const acc_t* __restrict__ w,
                        int64_t n) {
  using V = Vec<acc_t>;
  Totals<acc_t, 1> total;
  accumulate(total, n, [&](int64_t i, auto lanes, auto& t) {
    const V g = V::load(dy + i, lanes) * V::load(w + i, lanes);
    t[0] = fma(g, V::load(x + i, lanes), t[0]);
  });
  return double(sum(total[0]));
}

// dx of one run, and its share of dw.
template <bool need_dx, bool need_dw, class scalar_t, class acc_t>
void rms_norm_bwd_run(const scalar_t* __restrict__ dy, const scalar_t* __restrict__ x, const acc_t* __restrict__ w,
                      acc_t rstd, double sum_gx, int64_t N, scalar_t* __restrict__ dx, acc_t* __restrict__ dw,
                      int64_t n, bool streamed) {
  using V = Vec<acc_t>;
  const double r = rstd;
  const V along_g(rstd), along_x{acc_t(-r * r * r * sum_gx / double(N))};
  auto step = [&](int64_t i, auto lanes) {
    fetch_ahead(dy + i), fetch_ahead(x + i);
    const V d = V::load(dy + i, lanes), v = V::load(x + i, lanes), g = d * V::load(w + i, lanes);
    if constexpr (need_dw) fma(d, v * along_g, V::load(dw + i, lanes)).store(dw + i, lanes);
    return fma(g, along_g, v * along_x);
  };
  if constexpr (need_dx)
    write_run<acc_t>(dx, n, streamed, step);
  else
    each_vector<acc_t>(n, step);
}

template <bool need_dx, bool need_dw, class scalar_t, class acc_t>
void rms_norm_bwd_rows(const scalar_t* dy, const scalar_t* x, const acc_t* w, const acc_t* rstd, scalar_t* dx,
                       acc_t* dw, int64_t M, int64_t N) {
  const bool streamed = need_dx && is_streamed(M * N, sizeof(scalar_t));
  const int64_t chunks = need_dw ? row_chunks(M) : M;
  Buffer<acc_t> partial(need_dw ? chunks * N : 0);
  parallel_for(chunks, need_dw ? 1 : row_grain(N), [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      acc_t* part = partial.get() + (need_dw ? chunk * N : 0);
      if (need_dw) std::memset(part, 0, size_t(N) * sizeof(acc_t));
      for (int64_t m = chunk_begin(chunk, chunks, M); m < chunk_begin(chunk + 1, chunks, M); ++m) {
        const scalar_t *dy_row = dy + m * N, *x_row = x + m * N;
        touch_ahead(dy_row, N), touch_ahead(x_row, N);
        double sum_gx = 0;
        if constexpr (need_dx)
          each_block(N, [&](int64_t i, int64_t n) { sum_gx += rms_norm_bwd_sum(dy_row + i, x_row + i, w + i, n); });
        rms_norm_bwd_run<need_dx, need_dw>(dy_row, x_row, w, rstd[m], sum_gx, N, dx + m * N, part, N, streamed);
      }
    }
    if (streamed) stream_fence();
  });
  if (need_dw) add_chunks(partial.get(), chunks, N, dw, N);
}

// Rows too wide for a cache: sums of every row first, then blocks of columns, each through all rows.
template <bool need_dx, bool need_dw, class scalar_t, class acc_t>
void rms_norm_bwd_wide(const scalar_t* dy, const scalar_t* x, const acc_t* w, const acc_t* rstd, scalar_t* dx,
                       acc_t* dw, int64_t M, int64_t N) {
  const bool streamed = need_dx && is_streamed(M * N, sizeof(scalar_t));
  Buffer<double> sums(M, 0.0);
  for (int64_t m = 0; need_dx && m < M; ++m)
    sums[m] = sum_of_blocks<double>(
        N, [&](int64_t i, int64_t n) { return rms_norm_bwd_sum(dy + m * N + i, x + m * N + i, w + i, n); });
  if (need_dw) std::memset(dw, 0, size_t(N) * sizeof(acc_t));
  parallel_for(ceil_div(N, block_elements), 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block)
      for (int64_t m = 0, i = block * block_elements; m < M; ++m)
        rms_norm_bwd_run<need_dx, need_dw>(dy + m * N + i, x + m * N + i, w + i, rstd[m], sums[m], N, dx + m * N + i,
                                           dw + i, std::min(block_elements, N - i), streamed);
    if (streamed) stream_fence();
  });
}

// ---- binding

std::tuple<Tensor, Tensor> rms_norm_fwd(const Tensor& x, const OptionalTensor& weight, double eps) {
  OpScope op("rms_norm_fwd", x);
  op.check(x.dim() == 2, "x must be [M, N]");
  const int64_t M = x.size(0), N = x.size(1);
  return dispatch_floating_mixed(op, x.scalar_type(), dtype_of(weight), [&]<class scalar_t, class weight_t>() {
    using acc_t = accumulate_t<scalar_t>;
    Tensor y = op.empty<scalar_t>({M, N}), rstd = op.empty<acc_t>({M});
    auto* px = op.in<scalar_t>(x, "x", {M, N});
    auto* pw = op.in_optional<weight_t>(weight, "weight", {N});
    auto* py = op.out<scalar_t>(y, "y", {M, N});
    auto* prstd = op.out<acc_t>(rstd, "rstd", {M});
    const Parameter<acc_t, weight_t> w(pw, pw ? N : 0, 1);
    if (pw != nullptr)
      rms_norm_fwd_rows<true>(px, w.get(), py, prstd, M, N, eps);
    else
      rms_norm_fwd_rows<false>(px, w.get(), py, prstd, M, N, eps);
    return std::tuple(y, rstd);
  });
}

std::tuple<Tensor, Tensor> rms_norm_bwd(const Tensor& dy, const Tensor& x, const OptionalTensor& weight,
                                        const Tensor& rstd, bool need_dx, bool need_dw) {
  OpScope op("rms_norm_bwd", dy);
  op.check(x.dim() == 2, "x must be [M, N]");
  const int64_t M = x.size(0), N = x.size(1);
  return dispatch_floating_mixed(op, x.scalar_type(), dtype_of(weight), [&]<class scalar_t, class weight_t>() {
    using acc_t = accumulate_t<scalar_t>;
    Tensor dx = need_dx ? op.empty<scalar_t>({M, N}) : op.empty<scalar_t>({0});
    Tensor dw = op.empty<weight_t>({need_dw ? N : 0});
    auto *pdy = op.in<scalar_t>(dy, "dy", {M, N}), *px = op.in<scalar_t>(x, "x", {M, N});
    auto* pw = op.in_optional<weight_t>(weight, "weight", {N});
    auto* prstd = op.in<acc_t>(rstd, "rstd", {M});
    auto* pdx = need_dx ? op.out<scalar_t>(dx, "dx", {M, N}) : nullptr;
    const Parameter<acc_t, weight_t> w(pw, N, 1);
    Buffer<acc_t> sum_w(need_dw ? N : 0);
    dispatch_wanted(need_dx, need_dw, [&]<bool want_dx, bool want_dw>() {
      if (N > wide_elements)
        rms_norm_bwd_wide<want_dx, want_dw>(pdy, px, w.get(), prstd, pdx, sum_w.get(), M, N);
      else
        rms_norm_bwd_rows<want_dx, want_dw>(pdy, px, w.get(), prstd, pdx, sum_w.get(), M, N);
    });
    if (need_dw) narrow(op.out<weight_t>(dw, "dw", {N}), sum_w.get(), N);
    return std::tuple(dx, dw);
  });
}

PYOPS_LIBRARY(m) {
  PYOPS_IMPL(m, rms_norm_fwd);
  PYOPS_IMPL(m, rms_norm_bwd);
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY
