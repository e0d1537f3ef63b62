// group_norm · CUDA (instance norm: one channel per group)
//   y = (x - mean[n,g]) * rstd[n,g] * w[c] + b[c], statistics of group g over its C/G channels and S, biased variance
//   dx = rstd * (g - mean(g) - xhat * mean(g * xhat)),  g = dy * w,  dw = sum dy * xhat,  db = sum dy
// layout   x, y, dy, dx: [N, C, *], or [N, *, C] if channels_last, S positions · w, b: [C] · mean, rstd, var: [N, G]
// mapping  [N, C, S]: a group of up to 128 KB, backward 56 KB, in the registers of 2..32 lanes or of one block, where
//          there are 64 groups or a group is at most 8 KB; everything else in slices (norm_channels.cuh)
// memory   registers: 2*N*C*S*sizeof(T), backward 3 times; slices: x (and dy) once more, less what is found in L2
// numerics registers: two-pass variance; slices: shifted sums and Chan's combination; fp32 (fp64 for fp64)
#include "cuda/norm_channels.cuh"

namespace pyops::norm {

// kernels

// 1024 threads leave 64 registers each, half of which hold 32 floats but only 16 doubles.
template <class T>
inline constexpr int group_threads = sizeof(T) == 8 ? 512 : 1024;

template <class T, class W, int V, int Items>
__global__ void __launch_bounds__(group_threads<T>)
    group_norm_fwd_kernel(const T* __restrict__ x, const W* __restrict__ w, const W* __restrict__ b, T* __restrict__ y,
                          accumulate_t<T>* __restrict__ mean_out, accumulate_t<T>* __restrict__ rstd_out,
                          accumulate_t<T>* __restrict__ var_out, int64_t units, WideDivider by_groups, int D, int S,
                          Divider plane_divider, accumulate_t<T> eps, int width) {
  using A = accumulate_t<T>;
  auto& s = shared_storage<PairShared<A>>();
  auto* scratch = reinterpret_cast<Sum<A>*>(s.reduce);
  const int lane = threadIdx.x % width, rows = blockDim.x / width, size = D * S;
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * rows + threadIdx.x / width;
  const int limit = unit < units ? size : 0;  // threads past the last group still take part in the shuffles
  Vec<T, V> v[Items];
  A sum = 0;
#pragma unroll
  for (int i = 0; i < Items; ++i) {
    const int n = (i * width + lane) * V;
    if (n < limit) v[i] = load_vec_streaming<V>(x + unit * size + n);
  }
#pragma unroll
  for (int i = 0; i < Items; ++i) {
    if ((i * width + lane) * V < limit) {
      const Vec<A, V> a = widen(v[i]);
#pragma unroll
      for (int j = 0; j < V; ++j) sum += a[j];
    }
  }
  const A mean = group_reduce(Sum<A>{sum}, width, scratch).value / static_cast<A>(size);
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
  const A var = group_reduce(Sum<A>{square}, width, scratch).value / static_cast<A>(size);
  const A rstd = inverse_root(var + eps);
  if (lane == 0 && unit < units) {
    mean_out[unit] = mean;
    rstd_out[unit] = rstd;
    var_out[unit] = var;
  }
  const auto groups = static_cast<int64_t>(by_groups.divisor);
  const int channel0 = static_cast<int>(unit - by_groups.divide(unit) * groups) * D;
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

// 7 vectors of dy and of x, and what is done with them, fit the 128 registers of 512 threads.
constexpr int group_bwd_threads = 512, group_bwd_items = 7;

template <class A>
struct GroupBwdShared {
  PairShared<A> row;
  Pair<A> channel[1024];  // [16 warps, channels of a group]
};

// dy and x of a group in registers. A vector lies in one channel, and a warp sums each channel it meets by itself, so
// that dw and db need no second reading either; their sums over a group's channels are the group's.
template <class T, class W, int V, int Items>
__global__ void __launch_bounds__(group_bwd_threads)
    group_norm_bwd_kernel(const T* __restrict__ dy, const T* __restrict__ x, const W* __restrict__ w,
                          const accumulate_t<T>* __restrict__ mean_in, const accumulate_t<T>* __restrict__ rstd_in,
                          T* __restrict__ dx, accumulate_t<T>* __restrict__ sum_dyx,
                          accumulate_t<T>* __restrict__ sum_dy, int64_t units, WideDivider by_groups, int D, int S,
                          Divider plane_divider, int width) {
  using A = accumulate_t<T>;
  auto& s = shared_storage<GroupBwdShared<A>>();
  const int lane = threadIdx.x % width, slot = threadIdx.x / width, size = D * S;
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * (blockDim.x / width) + slot;
  const int limit = unit < units ? size : 0;  // threads past the last group still take part in the shuffles
  const auto groups = static_cast<int64_t>(by_groups.divisor);
  const int channel0 = static_cast<int>(unit - by_groups.divide(unit) * groups) * D;
  Vec<T, V> d[Items], v[Items];
#pragma unroll
  for (int i = 0; i < Items; ++i) {
    const int n = (i * width + lane) * V;
    if (n < limit) {
      d[i] = load_vec_streaming<V>(dy + unit * size + n);
      v[i] = load_vec_streaming<V>(x + unit * size + n);
    }
  }
  const A mean = limit > 0 ? mean_in[unit] : A(0), rstd = limit > 0 ? rstd_in[unit] : A(0);
  Pair<A>* mine = s.channel + threadIdx.x / 32 * D;
  for (int c = threadIdx.x % 32; c < D; c += 32) mine[c] = Pair<A>{};
  __syncwarp();
  Pair<A> total{};
#pragma unroll
  for (int i = 0; i < Items; ++i) {
    const int n = (i * width + lane) * V, start = n - threadIdx.x % 32 * V;
    if (start >= limit) continue;  // the whole warp
    Pair<A> sums{};
    const int c = static_cast<int>(plane_divider.divide(n));
    if (n < limit) {
      const Vec<A, V> a = widen(v[i]), e = widen(d[i]);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        sums.first += e[j];
        sums.second += e[j] * (a[j] - mean);
      }
      const A weight = w != nullptr ? convert<A>(w[channel0 + c]) : A(1);
      total.first += sums.first * weight;
      total.second += sums.second * weight;
    }
    if (sum_dy == nullptr) continue;
    const int end = start + 32 * V < limit ? start + 32 * V : limit;
    const int last = static_cast<int>(plane_divider.divide(end - 1));
    for (int k = static_cast<int>(plane_divider.divide(start)); k <= last; ++k) {
      const Pair<A> part = group_reduce(c == k ? sums : Pair<A>{}, 32, static_cast<Pair<A>*>(nullptr));
      if (threadIdx.x % 32 == 0) mine[k] = Pair<A>::combine(mine[k], part);
    }
  }
  total = group_reduce(total, width, s.row.reduce);
  __syncwarp();
  if (sum_dy != nullptr && limit > 0) {
    const int warps = width / 32;
    for (int c = lane; c < D; c += width) {
      Pair<A> sums{};
      for (int q = 0; q < warps; ++q) sums = Pair<A>::combine(sums, s.channel[(slot * warps + q) * D + c]);
      sum_dy[unit * D + c] = sums.first;
      sum_dyx[unit * D + c] = sums.second * rstd;
    }
  }
  const A inverse = rstd / static_cast<A>(size), mean_g = total.first * inverse;
  const A mean_gx = total.second * rstd * rstd * inverse;
#pragma unroll
  for (int i = 0; i < Items; ++i) {
    const int n = (i * width + lane) * V;
    if (n < limit) {
      const int c = channel0 + static_cast<int>(plane_divider.divide(n));
      const A scale = rstd * (w != nullptr ? convert<A>(w[c]) : A(1));
      const Vec<A, V> a = widen(v[i]), e = widen(d[i]);
      Vec<T, V> out;
#pragma unroll
      for (int j = 0; j < V; ++j) out[j] = from_acc<T>(e[j] * scale - (a[j] - mean) * mean_gx - mean_g);
      store_vec_streaming(dx + unit * size + n, out);
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
  with_vector<T>(size % vector_width<T> == 0 && is_aligned(x, y), [&]<int V>() {
    const int64_t vectors = divide_up(size, V);
    const auto run = [&]<int Items>(int width) {
      const int block = std::max(width, 128);
      launch(group_norm_fwd_kernel<T, W, V, Items>,
             {.grid = grid_of(divide_up(shape.statistics(), block / width)),
              .block = dim3(block),
              .smem = sizeof(PairShared<accumulate_t<T>>),
              .stream = stream},
             x, w, b, y, mean, rstd, var, shape.statistics(), WideDivider(shape.groups), static_cast<int>(D),
             static_cast<int>(shape.S), Divider(shape.S), static_cast<accumulate_t<T>>(eps), width);
    };
    // A scalar thread holds more elements, so that ragged groups reach half the size of the others.
    constexpr int middle = V > 1 ? 4 : 8, most = V > 1 ? 8 : 16;
    if (vectors <= 32)
      run.template operator()<1>(power_of_two_from(vectors));
    else if (vectors <= 32 * middle)
      run.template operator()<middle>(32);
    else if (vectors <= group_threads<T> * middle)
      run.template operator()<middle>(std::max(128, round_up_to_warps(divide_up(vectors, middle))));
    else if (vectors <= group_threads<T> * most)
      run.template operator()<most>(round_up_to_warps(divide_up(vectors, most)));
    else
      done = false;
  });
  return done;
}

// dy and x read once. sum_dyx and sum_dy, [N, C], are null where they are not wanted.
template <class T, class W>
void groups_bwd_in_registers(const T* dy, const T* x, const W* w, const accumulate_t<T>* mean,
                             const accumulate_t<T>* rstd, T* dx, accumulate_t<T>* sum_dyx, accumulate_t<T>* sum_dy,
                             const ChannelShape& shape, cudaStream_t stream) {
  constexpr int V = vector_width<T>, items = group_bwd_items;
  const int64_t D = shape.C / shape.groups, size = D * shape.S, vectors = size / V;
  // Half of a thread's vectors are enough while the block has threads to spare.
  const int64_t each = vectors <= group_bwd_threads * 4 ? 4 : items;
  const int width = vectors <= 32 * items ? 32 : round_up_to_warps(divide_up(vectors, each));
  const int block = width == 32 ? 256 : width;
  launch(group_norm_bwd_kernel<T, W, V, items>,
         {.grid = grid_of(divide_up(shape.statistics(), block / width)),
          .block = dim3(block),
          .smem = sizeof(GroupBwdShared<accumulate_t<T>>),
          .stream = stream},
         dy, x, w, mean, rstd, dx, sum_dyx, sum_dy, shape.statistics(), WideDivider(shape.groups), static_cast<int>(D),
         static_cast<int>(shape.S), Divider(shape.S), width);
}

// Whether the backward of this shape fits: whole vectors in one channel, and all channel sums of a block in shared
// memory.
template <class T>
bool group_bwd_fits(const ChannelShape& shape, bool aligned) {
  constexpr int V = vector_width<T>;
  if (sizeof(T) == 8 || shape.columns() || shape.S == 0 || shape.S % V != 0 || !aligned) return false;
  const int64_t D = shape.C / shape.groups, bytes = D * shape.S * static_cast<int64_t>(sizeof(T));
  return bytes <= group_bwd_threads * group_bwd_items * 16 && D <= 64 &&
         (shape.statistics() >= 64 || bytes <= 8 * 1024);
}

}  // namespace pyops::norm

// binding

#include "common/channels.h"
#include "common/registry.h"

namespace pyops {
namespace {

norm::ChannelShape shape_of(const OpScope& op, const Tensor& x, int64_t groups, bool channels_last) {
  const auto [N, C, S] = channel_sizes(op, x, channels_last);
  op.check(groups > 0 && C % groups == 0, "groups must divide the channels, got ", groups, " for ", C);
  return {N, C, S, groups, false, channels_last};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> group_norm_fwd(const Tensor& x, const OptionalTensor& weight,
                                                          const OptionalTensor& bias, int64_t groups, double eps,
                                                          bool channels_last) {
  OpScope op("group_norm_fwd", x);
  const norm::ChannelShape shape = shape_of(op, x, groups, channels_last);
  const int64_t N = shape.N, C = shape.C;
  return dispatch_floating_mixed(op, x.scalar_type(), dtype_of(weight, bias), [&]<class T, class W>() {
    using A = accumulate_t<T>;
    Tensor y = op.empty<T>(ShapeRef(x)), mean = op.empty<A>({N, groups}), rstd = op.empty<A>({N, groups});
    Tensor var = op.empty<A>({N, groups});
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
  const int64_t N = shape.N, C = shape.C;
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
    const A* m = op.in<A>(mean, "mean", {N, groups});
    const A* r = op.in<A>(rstd, "rstd", {N, groups});
    T* to_dx = need_dx ? op.out<T>(dx, "dx", ShapeRef(x)) : nullptr;
    W* to_dw = need_dw ? op.out<W>(dw, "dw", {C}) : nullptr;
    W* to_db = need_dw ? op.out<W>(db, "db", {C}) : nullptr;
    if constexpr (sizeof(T) < 8) {
      if (need_dx && norm::group_bwd_fits<T>(shape, is_aligned(from_dy, from_x, to_dx))) {
        A* sum_dyx = need_dw ? workspace(N * C) : nullptr;
        A* sum_dy = need_dw ? workspace(N * C) : nullptr;
        norm::groups_bwd_in_registers(from_dy, from_x, w, m, r, to_dx, sum_dyx, sum_dy, shape, stream);
        if (need_dw) {
          norm::sum_columns<A, W>(sum_dyx, to_dw, N, C, stream);
          norm::sum_columns<A, W>(sum_dy, to_db, N, C, stream);
        }
        return std::make_tuple(dx, dw, db);
      }
    }
    norm::channels_bwd(from_dy, from_x, w, m, r, to_dx, to_dw, to_db, need_dw, shape, false, workspace, stream);
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
