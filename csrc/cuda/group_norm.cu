// group_norm · CUDA (instance norm: one channel per group)
//   y = (x - mean[n,g]) * rstd[n,g] * w[c] + b[c], statistics of group g over its C/G channels and S, biased variance
//   dx = rstd * (g - mean(g) - xhat * mean(g * xhat)),  g = dy * w,  dw = sum dy * xhat,  db = sum dy
// layout   x, y, dy, dx: [N, C, S], or [N, S, C] if channels_last · w, b: [C] · mean, rstd, var: [N, G]
// mapping  forward, [N, C, S]: a group of up to 128 KB in the registers of 2..32 lanes or of one block, where there are
//          64 groups or a group is at most 8 KB; everything else in slices (norm_channels.cuh)
// memory   registers: 2*N*C*S*sizeof(T); slices: x twice, less what the second reading finds in L2; backward 5 times
// numerics registers: two-pass variance; slices: shifted sums and Chan's combination; fp32 (fp64 for fp64)
#include "cuda/norm_channels.cuh"

namespace pyops::norm {

// kernels

template <class T, class W, int V, int Items>
__global__ void __launch_bounds__(1024)
    group_norm_fwd_kernel(const T* __restrict__ x, const W* __restrict__ w, const W* __restrict__ b, T* __restrict__ y,
                          accumulate_t<T>* __restrict__ mean_out, accumulate_t<T>* __restrict__ rstd_out,
                          accumulate_t<T>* __restrict__ var_out, int64_t units, int groups, int D, int S,
                          Divider plane_divider, accumulate_t<T> eps, int width) {
  using A = accumulate_t<T>;
  auto& s = shared_storage<PairShared<A>>();
  auto* scratch = reinterpret_cast<Sum<A>*>(s.reduce);
  const int lane = threadIdx.x % width, rows = blockDim.x / width, size = D * S;
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * rows + threadIdx.x / width;
  const int limit = unit < units ? size : 0;  // threads past the last group still take part in the shuffles
  const A inverse = A(1) / static_cast<A>(size);
  const T* from = x + unit * size;
  Vec<T, V> v[Items];
  A sum = 0;
#pragma unroll
  for (int i = 0; i < Items; ++i) {
    const int n = (i * width + lane) * V;
    if (n < limit) v[i] = load_vec_streaming<V>(from + n);
  }
#pragma unroll
  for (int i = 0; i < Items; ++i) {
    if ((i * width + lane) * V < limit) {
      const Vec<A, V> a = widen(v[i]);
#pragma unroll
      for (int j = 0; j < V; ++j) sum += a[j];
    }
  }
  const A mean = group_reduce(Sum<A>{sum}, width, scratch).value * inverse;
  A square = 0;
#pragma unroll
  for (int i = 0; i < Items; ++i) {
    if ((i * width + lane) * V < limit) {
      const Vec<A, V> a = widen(v[i]);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const A d = a[j] - mean;
        square += d * d;
      }
    }
  }
  const A var = group_reduce(Sum<A>{square}, width, scratch).value * inverse, rstd = inverse_root(var + eps);
  if (lane == 0 && unit < units) {
    mean_out[unit] = mean;
    rstd_out[unit] = rstd;
    var_out[unit] = var;
  }
  const int channel0 = static_cast<int>(unit % groups) * D;
#pragma unroll
  for (int i = 0; i < Items; ++i) {
    const int n = (i * width + lane) * V;
    if (n < limit) {
      int c = static_cast<int>(plane_divider.divide(n)), left = (c + 1) * S - n;
      c += channel0;
      A scale = rstd * (w != nullptr ? convert<A>(w[c]) : A(1)), shift = b != nullptr ? convert<A>(b[c]) : A(0);
      const Vec<A, V> a = widen(v[i]);
      Vec<T, V> out;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        if (left == 0) {
          ++c;
          left = S;
          scale = rstd * (w != nullptr ? convert<A>(w[c]) : A(1));
          shift = b != nullptr ? convert<A>(b[c]) : A(0);
        }
        --left;
        out[j] = from_acc<T>((a[j] - mean) * scale + shift);
      }
      store_vec_streaming(y + unit * size + n, out);
    }
  }
}

// launch

// False where the shape belongs to the slices path.
template <class T, class W>
bool groups_in_registers(const T* x, const W* w, const W* b, T* y, accumulate_t<T>* mean, accumulate_t<T>* rstd,
                         accumulate_t<T>* var, const ChannelShape& shape, double eps, cudaStream_t stream) {
  const int64_t D = shape.C / shape.groups, size = D * shape.S, bytes = size * static_cast<int64_t>(sizeof(T));
  if (shape.columns() || size == 0 || bytes > 128 * 1024) return false;
  if (shape.statistics() < 64 && bytes > 8 * 1024) return false;
  bool done = true;
  with_vector<T>(size % vector_width<T> == 0 && is_aligned({x, y}), [&]<int V>() {
    const int64_t vectors = divide_up(size, V);
    const auto run = [&]<int Items>(int width) {
      const int block = std::max(width, 128);
      launch(group_norm_fwd_kernel<T, W, V, Items>,
             {.grid = grid_of(divide_up(shape.statistics(), block / width)),
              .block = dim3(block),
              .smem = sizeof(PairShared<accumulate_t<T>>),
              .stream = stream},
             x, w, b, y, mean, rstd, var, shape.statistics(), static_cast<int>(shape.groups), static_cast<int>(D),
             static_cast<int>(shape.S), Divider(shape.S), static_cast<accumulate_t<T>>(eps), width);
    };
    // A scalar thread holds more elements, so that ragged groups reach half the size of the others.
    constexpr int middle = V > 1 ? 4 : 8, most = V > 1 ? 8 : 16;
    if (vectors <= 32)
      run.template operator()<1>(power_of_two_from(vectors));
    else if (vectors <= 32 * middle)
      run.template operator()<middle>(32);
    else if (vectors <= 1024 * middle)
      run.template operator()<middle>(std::max(128, round_up_to_warps(divide_up(vectors, middle))));
    else if (vectors <= 1024 * most)
      run.template operator()<most>(round_up_to_warps(divide_up(vectors, most)));
    else
      done = false;
  });
  return done;
}

}  // namespace pyops::norm

// binding

#include "common/registry.h"

namespace pyops {
namespace {

norm::ChannelShape shape_of(const OpScope& op, const Tensor& x, int64_t groups, bool channels_last) {
  op.check(x.dim() == 3, "x must be [N, C, S] or [N, S, C]");
  const int64_t C = x.size(channels_last ? 2 : 1), S = x.size(channels_last ? 1 : 2);
  op.check(groups > 0 && C % groups == 0, "groups must divide the channels, got ", groups, " for ", C);
  return {x.size(0), C, S, groups, false, channels_last};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> group_norm_fwd(const Tensor& x, const OptionalTensor& weight,
                                                          const OptionalTensor& bias, int64_t groups, double eps,
                                                          bool channels_last) {
  OpScope op("group_norm_fwd", x);
  const norm::ChannelShape shape = shape_of(op, x, groups, channels_last);
  const int64_t N = shape.N, C = shape.C, d1 = x.size(1), d2 = x.size(2);
  return dispatch_floating_mixed(op, x.scalar_type(), dtype_of(weight, bias), [&]<class T, class W>() {
    using A = accumulate_t<T>;
    Tensor y = op.empty<T>({N, d1, d2}), mean = op.empty<A>({N, groups}), rstd = op.empty<A>({N, groups});
    Tensor var = op.empty<A>({N, groups});
    std::vector<Tensor> held;
    const auto workspace = [&](int64_t n) {
      held.push_back(op.empty<A>({n}));
      return op.out<A>(held.back(), "workspace", {n});
    };
    const auto stream = static_cast<cudaStream_t>(op.stream());
    const T* from = op.in<T>(x, "x", {N, d1, d2});
    const W* w = op.in_optional<W>(weight, "weight", {C});
    const W* b = op.in_optional<W>(bias, "bias", {C});
    T* to = op.out<T>(y, "y", {N, d1, d2});
    A* m = op.out<A>(mean, "mean", {N, groups});
    A* r = op.out<A>(rstd, "rstd", {N, groups});
    A* v = op.out<A>(var, "var", {N, groups});
    if (!norm::groups_in_registers(from, w, b, to, m, r, v, shape, eps, stream))
      norm::channels_fwd(from, w, b, to, m, r, v, shape, eps, workspace, stream);
    return std::make_tuple(y, mean, rstd, var);
  });
}

std::tuple<Tensor, Tensor, Tensor> group_norm_bwd(const Tensor& dy, const Tensor& x, const OptionalTensor& weight,
                                                  const Tensor& mean, const Tensor& rstd, int64_t groups,
                                                  bool channels_last, bool need_dx, bool need_dw) {
  OpScope op("group_norm_bwd", x);
  const norm::ChannelShape shape = shape_of(op, x, groups, channels_last);
  const int64_t N = shape.N, C = shape.C, d1 = x.size(1), d2 = x.size(2);
  return dispatch_floating_mixed(op, x.scalar_type(), dtype_of(weight), [&]<class T, class W>() {
    using A = accumulate_t<T>;
    Tensor dx = need_dx ? op.empty<T>({N, d1, d2}) : op.empty<T>({0});
    Tensor dw = op.empty<W>({need_dw ? C : 0}), db = op.empty<W>({need_dw ? C : 0});
    std::vector<Tensor> held;
    const auto workspace = [&](int64_t n) {
      held.push_back(op.empty<A>({n}));
      return op.out<A>(held.back(), "workspace", {n});
    };
    norm::channels_bwd(op.in<T>(dy, "dy", {N, d1, d2}), op.in<T>(x, "x", {N, d1, d2}),
                       op.in_optional<W>(weight, "weight", {C}), op.in<A>(mean, "mean", {N, groups}),
                       op.in<A>(rstd, "rstd", {N, groups}), need_dx ? op.out<T>(dx, "dx", {N, d1, d2}) : nullptr,
                       need_dw ? op.out<W>(dw, "dw", {C}) : nullptr, need_dw ? op.out<W>(db, "db", {C}) : nullptr,
                       need_dw, shape, false, workspace, static_cast<cudaStream_t>(op.stream()));
    return std::make_tuple(dx, dw, db);
  });
}

}  // namespace
}  // namespace pyops

PYOPS_LIBRARY(m) {
  using namespace pyops;
  PYOPS_IMPL(m, group_norm_fwd);
  PYOPS_IMPL(m, group_norm_bwd);
}
