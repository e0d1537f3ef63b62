// batch_norm · CUDA
//   y = (x - mean[c]) * rstd[c] * w[c] + b[c], statistics of channel c over N and S, biased variance
//   dx = w * rstd * (dy - mean(dy) - xhat * mean(dy * xhat)),  dw = sum dy * xhat,  db = sum dy
// layout   x, y, dy, dx: [N, C, *], or [N, *, C] if channels_last, S positions · w, b, mean, rstd, var: [C]
// mapping  a channel is cut into slices, one block each; lanes over channels if channels_last (norm_channels.cuh);
//          [N, C, S] larger than half of L2: one launch that normalises a channel while it is in L2 (norm_waves.cuh)
// memory   waves: 2*N*C*S*sizeof(T), backward 3 times; else x (and dy) once more, less what is found in L2
// numerics sums shifted by a value of the run, Chan's combination in fixed order, fp32 (fp64 for fp64)
#include "cuda/norm_waves.cuh"

// binding

#include "common/channels.h"
#include "common/registry.h"

namespace pyops {
namespace {

norm::ChannelShape shape_of(const OpScope& op, const Tensor& x, bool channels_last) {
  const auto [N, C, S] = channel_sizes(op, x, channels_last);
  return {N, C, S, C, true, channels_last};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_fwd(const Tensor& x, const OptionalTensor& weight,
                                                          const OptionalTensor& bias, double eps, bool channels_last) {
  OpScope op("batch_norm_fwd", x);
  const norm::ChannelShape shape = shape_of(op, x, channels_last);
  const int64_t C = shape.C;
  return dispatch_floating_mixed(op, x.scalar_type(), dtype_of(weight, bias), [&]<class T, class W>() {
    using A = accumulate_t<T>;
    Tensor y = op.empty<T>(ShapeRef(x)), mean = op.empty<A>({C}), rstd = op.empty<A>({C}), var = op.empty<A>({C});
    std::vector<Tensor> held;
    const auto workspace = [&](int64_t n) {
      held.push_back(op.empty<A>({n}));
      return op.out<A>(held.back(), "workspace", {n});
    };
    const auto stream = static_cast<cudaStream_t>(op.stream());
    const T* from = op.in<T>(x, "x", ShapeRef(x));
    const W* w = op.in_optional<W>(weight, "weight", {C});
    const W* b = op.in_optional<W>(bias, "bias", {C});
    T* to = op.out<T>(y, "y", ShapeRef(x));
    A* m = op.out<A>(mean, "mean", {C});
    A* r = op.out<A>(rstd, "rstd", {C});
    A* v = op.out<A>(var, "var", {C});
    norm::WaveArguments<T, W> arguments{.w = w, .b = b, .mean_out = m, .rstd_out = r, .var_out = v};
    arguments.eps = static_cast<A>(eps);
    if (!norm::batch_in_waves<norm::Pass::forward>(from, static_cast<const T*>(nullptr), to, arguments, shape,
                                                   workspace, stream))
      norm::channels_fwd(from, w, b, to, m, r, v, shape, eps, workspace, stream);
    return std::make_tuple(y, mean, rstd, var);
  });
}

Tensor batch_norm_infer(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean,
                        const Tensor& var, double eps, bool channels_last) {
  OpScope op("batch_norm_infer", x);
  const norm::ChannelShape shape = shape_of(op, x, channels_last);
  const int64_t C = shape.C;
  return dispatch_floating_mixed(op, x.scalar_type(), dtype_of(weight, bias), [&]<class T, class W>() {
    using A = accumulate_t<T>;
    const auto stream = static_cast<cudaStream_t>(op.stream());
    Tensor y = op.empty<T>(ShapeRef(x)), held = op.empty<A>({4 * C});
    auto* coefficients = norm::as_coefficients(op.out<A>(held, "coefficients", {4 * C}));
    launch(norm::channels_coefficients_kernel<A, W>,
           {.grid = norm::grid_of(norm::divide_up(C, 128)), .block = dim3(128), .stream = stream},
           op.in<A>(mean, "mean", {C}), op.in<A>(var, "var", {C}), op.in_optional<W>(weight, "weight", {C}),
           op.in_optional<W>(bias, "bias", {C}), coefficients, C, true, static_cast<A>(eps));
    norm::channels_apply<norm::Pass::forward, T>(op.in<T>(x, "x", ShapeRef(x)), nullptr, coefficients,
                                                 op.out<T>(y, "y", ShapeRef(x)), shape, false, stream);
    return y;
  });
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_bwd(const Tensor& dy, const Tensor& x, const OptionalTensor& weight,
                                                  const Tensor& mean, const Tensor& rstd, bool training,
                                                  bool channels_last, bool need_dx, bool need_dw) {
  OpScope op("batch_norm_bwd", x);
  const norm::ChannelShape shape = shape_of(op, x, channels_last);
  const int64_t C = shape.C;
  return dispatch_floating_mixed(op, x.scalar_type(), dtype_of(weight), [&]<class T, class W>() {
    using A = accumulate_t<T>;
    Tensor dx = need_dx ? op.empty<T>(ShapeRef(x)) : op.empty<T>({0});
    Tensor dw = op.empty<W>({need_dw ? C : 0}), db = op.empty<W>({need_dw ? C : 0});
    std::vector<Tensor> held;
    const auto workspace = [&](int64_t n) {
      held.push_back(op.empty<A>({n}));
      return op.out<A>(held.back(), "workspace", {n});
    };
    const auto stream = static_cast<cudaStream_t>(op.stream());
    const T* from_dy = op.in<T>(dy, "dy", ShapeRef(x));
    const T* from_x = op.in<T>(x, "x", ShapeRef(x));
    const W* w = op.in_optional<W>(weight, "weight", {C});
    const A* m = op.in<A>(mean, "mean", {C});
    const A* r = op.in<A>(rstd, "rstd", {C});
    T* to_dx = need_dx ? op.out<T>(dx, "dx", ShapeRef(x)) : nullptr;
    W* to_dw = need_dw ? op.out<W>(dw, "dw", {C}) : nullptr;
    W* to_db = need_dw ? op.out<W>(db, "db", {C}) : nullptr;
    const norm::WaveArguments<T, W> arguments{.w = w, .mean = m, .rstd = r, .dw = to_dw, .db = to_db};
    if (!training || !need_dx ||
        !norm::batch_in_waves<norm::Pass::backward>(from_x, from_dy, to_dx, arguments, shape, workspace, stream)) {
      norm::channels_bwd(from_dy, from_x, w, m, r, to_dx, to_dw, to_db, need_dw, shape, !training, workspace, stream);
    }
    return std::make_tuple(dx, dw, db);
  });
}

}  // namespace
}  // namespace pyops

PYOPS_LIBRARY(m) {
  using namespace pyops;
  PYOPS_IMPL(m, batch_norm_fwd);
  PYOPS_IMPL(m, batch_norm_infer);
  PYOPS_IMPL(m, batch_norm_bwd);
}
