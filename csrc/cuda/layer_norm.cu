// layer_norm · CUDA
//   y[m,n] = (x[m,n] - mean[m]) * rstd[m] * w[n] + b[n]
//   dx = rstd * (g - mean_n(g) - xhat * mean_n(g * xhat)),  g = dy * w,  dw = sum_m dy * xhat,  db = sum_m dy
// layout   x, y, dy, dx: [M, N] row-major · w, b, dw, db: [N] · mean, rstd: [M]
// mapping  a row in the registers of 2..32 lanes, of one block or of a cluster; else split over blocks (norm_rows.cuh)
// memory   forward 2*M*N*sizeof(T), backward 3*M*N*sizeof(T) plus the partials of dw, db; split: x once more
// numerics two-pass variance in fp32 on registers; split: shifted sums per thread, Chan's combination
#include "cuda/norm_rows.cuh"

// binding

#include "common/registry.h"

namespace pyops {
namespace {

std::tuple<Tensor, Tensor, Tensor> layer_norm_fwd(const Tensor& x, const OptionalTensor& weight,
                                                  const OptionalTensor& bias, double eps) {
  OpScope op("layer_norm_fwd", x);
  op.check(x.dim() == 2, "x must be [M, N]");
  const int64_t M = x.size(0), N = x.size(1);
  return dispatch_floating_mixed(op, x.scalar_type(), dtype_of(weight, bias), [&]<class T, class W>() {
    using A = accumulate_t<T>;
    Tensor y = op.empty<T>({M, N}), mean = op.empty<A>({M}), rstd = op.empty<A>({M});
    std::vector<Tensor> held;
    const auto workspace = [&](int64_t n) {
      held.push_back(op.empty<A>({n}));
      return op.out<A>(held.back(), "workspace", {n});
    };
    norm::rows_fwd<true>(op.in<T>(x, "x", {M, N}), op.in_optional<W>(weight, "weight", {N}),
                         op.in_optional<W>(bias, "bias", {N}), op.out<T>(y, "y", {M, N}), op.out<A>(mean, "mean", {M}),
                         op.out<A>(rstd, "rstd", {M}), M, N, eps, workspace, static_cast<cudaStream_t>(op.stream()));
    return std::make_tuple(y, mean, rstd);
  });
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd(const Tensor& dy, const Tensor& x, const OptionalTensor& weight,
                                                  const Tensor& mean, const Tensor& rstd, bool need_dx, bool need_dw) {
  OpScope op("layer_norm_bwd", x);
  op.check(x.dim() == 2, "x must be [M, N]");
  const int64_t M = x.size(0), N = x.size(1);
  return dispatch_floating_mixed(op, x.scalar_type(), dtype_of(weight), [&]<class T, class W>() {
    using A = accumulate_t<T>;
    Tensor dx = need_dx ? op.empty<T>({M, N}) : op.empty<T>({0});
    Tensor dw = op.empty<W>({need_dw ? N : 0}), db = op.empty<W>({need_dw ? N : 0});
    std::vector<Tensor> held;
    const auto workspace = [&](int64_t n) {
      held.push_back(op.empty<A>({n}));
      return op.out<A>(held.back(), "workspace", {n});
    };
    norm::rows_bwd<true>(op.in<T>(dy, "dy", {M, N}), op.in<T>(x, "x", {M, N}), op.in_optional<W>(weight, "weight", {N}),
                         op.in<A>(mean, "mean", {M}), op.in<A>(rstd, "rstd", {M}),
                         need_dx ? op.out<T>(dx, "dx", {M, N}) : nullptr, need_dw ? op.out<W>(dw, "dw", {N}) : nullptr,
                         need_dw ? op.out<W>(db, "db", {N}) : nullptr, need_dw, M, N, workspace,
                         static_cast<cudaStream_t>(op.stream()));
    return std::make_tuple(dx, dw, db);
  });
}

}  // namespace
}  // namespace pyops

PYOPS_LIBRARY(m) {
  using namespace pyops;
  PYOPS_IMPL(m, layer_norm_fwd);
  PYOPS_IMPL(m, layer_norm_bwd);
}
