// Normalisation over channels and groups on CUDA, shared by batch_norm and group_norm, both layouts.
//
// Statistics belong to (outer o, group g): batch norm is outer 1 with one channel per group, group norm outer N.
//   slices    partial moments (forward) or sums (backward) of every slice of every (o, c)
//             [N, C, S]: norm::Runs, one block or warp per slice; [N, S, C]: lanes over channels, blocks over rows
//   combine   one warp or block per (o, g): statistics, and four coefficients per (o, c), so that
//   apply     is one pass without weights or groups: y = (x - c0) * c1 + c2 and dx = dy * c1 - (x - c0) * c2 - c3.
// The last pass starts where the statistics ended, where x is still in L2.
#pragma once

#include "cuda/norm.cuh"

namespace pyops::norm {

// kernels

// c0 mean; forward: c1 rstd * w, c2 b; backward: c1 rstd * w, c2 rstd^2 * mean(g xhat), c3 rstd * mean(g), g = dy * w.
template <class A>
using Coefficients = Vec<A, 4>;

// Partials of (o, c, k) stand at o * outer_stride + c * channel_stride + k * slice_stride.
struct Partials {
  int64_t outer, channels, groups;
  int64_t elements, slice, count;  // per (o, c)
  int64_t outer_stride, channel_stride, slice_stride;
  WideDivider by_groups{groups};
  PYOPS_HOST_DEVICE int64_t group_channels() const { return groups > 0 ? channels / groups : 0; }
};

template <class A>
PYOPS_DEVICE A size_of_slice(const Partials& p, int64_t k) {
  const int64_t rest = p.elements - k * p.slice;
  return static_cast<A>(rest < p.slice ? rest : p.slice);
}

template <class A, class W>
__global__ void __launch_bounds__(128)
    channels_combine_fwd_kernel(const A* __restrict__ part_mean, const A* __restrict__ part_square,
                                const A* __restrict__ origin, const W* __restrict__ w, const W* __restrict__ b,
                                A* __restrict__ mean_out, A* __restrict__ rstd_out, A* __restrict__ var_out,
                                Coefficients<A>* __restrict__ coefficients, Partials p, A eps, int width) {
  auto& s = shared_storage<MomentsShared<A>>();
  const int lane = threadIdx.x % width;
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * (128 / width) + threadIdx.x / width;
  const bool valid = unit < p.outer * p.groups;
  const int64_t o = valid ? p.by_groups.divide(unit) : 0, D = p.group_channels(),
                first = valid ? (unit - o * p.groups) * D : 0;
  // Neighbouring threads take neighbouring partials.
  const bool slices_inside = p.slice_stride == 1;
  const uint32_t inner = static_cast<uint32_t>(slices_inside ? p.count : D), size = static_cast<uint32_t>(D * p.count);
  Moments<A> total{};
#pragma unroll 4
  for (uint32_t i = lane; valid && i < size; i += width) {
    const uint32_t major = inner == 1 ? i : i / inner, minor = i - major * inner;
    const int64_t k = slices_inside ? minor : major, c = first + (slices_inside ? major : minor);
    const int64_t at = o * p.outer_stride + c * p.channel_stride + k * p.slice_stride;
    total = Moments<A>::combine(total, {size_of_slice<A>(p, k), part_mean[at], part_square[at]});
  }
  total = group_reduce(total, width, s.reduce);
  if (!valid) return;
  const A var = total.count > A(0) ? total.square / total.count : A(0);
  const A rstd = inverse_root(var + eps);
  const A mean = total.count > A(0) ? origin[unit] + total.mean : A(0);
  if (lane == 0) {
    mean_out[unit] = mean;
    rstd_out[unit] = rstd;
    var_out[unit] = var;
  }
  for (int64_t c = first + lane; c < first + D; c += width) {
    coefficients[o * p.channels + c] = {
        {mean, rstd * (w != nullptr ? convert<A>(w[c]) : A(1)), b != nullptr ? convert<A>(b[c]) : A(0), A(0)}};
  }
}

// Coefficients from given statistics: inference, from the variance, and the backward of it (no mean terms).
template <class A, class W>
__global__ void __launch_bounds__(128)
    channels_coefficients_kernel(const A* __restrict__ mean, const A* __restrict__ spread, const W* __restrict__ w,
                                 const W* __restrict__ b, Coefficients<A>* __restrict__ coefficients, int64_t C,
                                 bool is_variance, A eps) {  // spread: rstd or the variance
  const int64_t c = static_cast<int64_t>(blockIdx.x) * 128 + threadIdx.x;
  if (c >= C) return;
  const A rstd = is_variance ? inverse_root(spread[c] + eps) : spread[c];
  coefficients[c] = {
      {mean[c], rstd * (w != nullptr ? convert<A>(w[c]) : A(1)), b != nullptr ? convert<A>(b[c]) : A(0), A(0)}};
}

// Sums of slices -> sums of channels [outer, C] (as dw, db where outer is 1) and the coefficients of dx.
// lanes: threads that share the slices of a channel, 1 or 32.
template <class A, class W, class Out>
__global__ void __launch_bounds__(128)
    channels_combine_bwd_kernel(const A* __restrict__ part_dy, const A* __restrict__ part_dyx,
                                const A* __restrict__ mean_in, const A* __restrict__ rstd_in, const W* __restrict__ w,
                                Out* __restrict__ sum_dyx, Out* __restrict__ sum_dy,
                                Coefficients<A>* __restrict__ coefficients, Partials p, int width, int lanes) {
  auto& s = shared_storage<PairShared<A>>();
  const int lane = threadIdx.x % width;
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * (128 / width) + threadIdx.x / width;
  const bool valid = unit < p.outer * p.groups;
  const int64_t o = valid ? p.by_groups.divide(unit) : 0, D = p.group_channels(),
                first = valid ? (unit - o * p.groups) * D : 0;
  Pair<A> total{};
  for (int64_t d0 = 0; d0 < D; d0 += width / lanes) {
    const int64_t c = first + d0 + lane / lanes;
    const bool mine = valid && c < first + D;
    Pair<A> sums{};
    for (int64_t k = lane % lanes; mine && k < p.count; k += lanes) {
      const int64_t at = o * p.outer_stride + c * p.channel_stride + k * p.slice_stride;
      sums.first += part_dy[at];
      sums.second += part_dyx[at];
    }
    if (lanes == 32) sums = group_reduce(sums, 32, s.reduce);
    if (mine && lane % lanes == 0) {
      if (sum_dy != nullptr) {
        sum_dy[o * p.channels + c] = convert<Out>(sums.first);
        sum_dyx[o * p.channels + c] = convert<Out>(sums.second);
      }
      const A weight = w != nullptr ? convert<A>(w[c]) : A(1);
      total.first += sums.first * weight;
      total.second += sums.second * weight;
    }
  }
  if (coefficients == nullptr) return;
  total = group_reduce(total, width, s.reduce);
  if (!valid) return;
  const A inverse = A(1) / (static_cast<A>(D) * static_cast<A>(p.elements)), mean = mean_in[unit], rstd = rstd_in[unit];
  for (int64_t c = first + lane; c < first + D; c += width) {
    coefficients[o * p.channels + c] = {{mean, rstd * (w != nullptr ? convert<A>(w[c]) : A(1)),
                                         rstd * rstd * total.second * inverse, rstd * total.first * inverse}};
  }
}

// [N, C, S], backward: sum of dy and of dy * xhat over every slice.
template <class T, int V>
__global__ void __launch_bounds__(256, 2)
    planes_sums_kernel(const T* __restrict__ dy, const T* __restrict__ x, const accumulate_t<T>* __restrict__ mean_in,
                       const accumulate_t<T>* __restrict__ rstd_in, accumulate_t<T>* __restrict__ part_dy,
                       accumulate_t<T>* __restrict__ part_dyx, Runs r, int64_t units, int width) {
  using A = accumulate_t<T>;
  auto& s = shared_storage<PairShared<A>>();
  const int lane = threadIdx.x % width;
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * (256 / width) + threadIdx.x / width;
  Pair<A> sums{};
  // Channels of a group are neighbours, and so are groups of an o: run / group size counts both.
  const auto statistic = [&] { return r.by_group.divide(r.by_count.divide(unit)); };
  if (unit < units) {
    const A mean = mean_in[statistic()];
    for_slice<V>(r, SliceWalk(r, unit), dy, lane, width, [&](const Vec<T, V>& d, int64_t address) {
      const Vec<T, V> v = load_vec<V>(x + address);
      const Vec<A, V> a = widen(v), e = widen(d);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        sums.first += e[j];
        sums.second += e[j] * (a[j] - mean);
      }
    });
  }
  sums = group_reduce(sums, width, s.reduce);
  if (unit < units && lane == 0) {
    part_dy[unit] = sums.first;
    part_dyx[unit] = sums.second * rstd_in[statistic()];
  }
}

enum class Pass { forward, backward };

template <Pass P, class A>
PYOPS_DEVICE A apply_one(A v, A d, const Coefficients<A>& c, bool constant) {
  if constexpr (P == Pass::forward)
    return (v - c[0]) * c[1] + c[2];
  else if (constant)
    return d * c[1];
  else
    return d * c[1] - (v - c[0]) * c[2] - c[3];
}

// [N, C, S]: a block takes 1024 vectors wherever they lie; `period` planes of S elements share the coefficients.
// constant: the statistics do not depend on x, so the backward does not read it.
template <Pass P, class T, int V>
__global__ void __launch_bounds__(256)
    planes_apply_kernel(const T* __restrict__ x, const T* __restrict__ dy,
                        const Coefficients<accumulate_t<T>>* __restrict__ coefficients, T* __restrict__ out,
                        int64_t elements, int64_t period, int64_t S, Divider plane_divider, bool constant) {
  using A = accumulate_t<T>;
  constexpr int unroll = 4;
  const int64_t begin = static_cast<int64_t>(gridDim.x - 1 - blockIdx.x) * (256 * unroll * V);
  const int64_t plane0 = begin / S, channel0 = plane0 % period;
  const int64_t offset0 = begin - plane0 * S;
  Vec<T, V> v[unroll] = {}, d[unroll] = {};
#pragma unroll
  for (int u = 0; u < unroll; ++u) {
    const int64_t i = begin + (u * 256 + static_cast<int>(threadIdx.x)) * V;
    if (i < elements) {
      if (P == Pass::forward || !constant) v[u] = load_vec_streaming<V>(x + i);
      if constexpr (P == Pass::backward) d[u] = load_vec_streaming<V>(dy + i);
    }
  }
#pragma unroll
  for (int u = 0; u < unroll; ++u) {
    const int local = (u * 256 + static_cast<int>(threadIdx.x)) * V;
    if (begin + local >= elements) continue;
    const int64_t t = offset0 + local;
    const int64_t step = S < (int64_t(1) << 31) ? plane_divider.divide(static_cast<uint32_t>(t)) : t >= S;
    int64_t offset = t - step * S, channel = channel0 + step;
    if (channel >= period) channel %= period;
    Coefficients<A> c = load_vec_readonly<4>(reinterpret_cast<const A*>(coefficients + channel));
    const Vec<A, V> a = widen(v[u]), e = widen(d[u]);
    Vec<T, V> result;
    if (V == 1 || offset + V <= S) {
#pragma unroll
      for (int j = 0; j < V; ++j) result[j] = from_acc<T>(apply_one<P>(a[j], e[j], c, constant));
    } else {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        if (offset == S) {
          offset = 0;
          channel = channel + 1 == period ? 0 : channel + 1;
          c = load_vec_readonly<4>(reinterpret_cast<const A*>(coefficients + channel));
        }
        result[j] = from_acc<T>(apply_one<P>(a[j], e[j], c, constant));
        ++offset;
      }
    }
    store_vec_streaming(out + begin + local, result);
  }
}

// [outer, R, C]: how blocks of 256 threads tile it. A block covers `columns` vectors of channels and `slice` rows.
struct Tiling {
  int64_t outer, rows, channels;
  int64_t tiles, slice, count;
  int columns;
};

template <class A, int V>
struct ColumnMomentsShared {
  A mean[256 * V], square[256 * V], count[256];
};

// Moments of every (o, slice of rows, channel), [outer, count, C].
template <class T, int V>
__global__ void __launch_bounds__(256)
    columns_moments_kernel(const T* __restrict__ x, accumulate_t<T>* __restrict__ mean,
                           accumulate_t<T>* __restrict__ square, accumulate_t<T>* __restrict__ origin_out, Tiling t,
                           int64_t groups) {
  using A = accumulate_t<T>;
  constexpr int unroll = 4;
  auto& s = shared_storage<ColumnMomentsShared<A, V>>();
  const int column = threadIdx.x % t.columns, line = threadIdx.x / t.columns, lines = 256 / t.columns;
  const int64_t part = blockIdx.x / t.tiles, o = part / t.count, k = part - o * t.count;
  const int64_t c = ((blockIdx.x - part * t.tiles) * t.columns + column) * V;
  const int64_t end = (k + 1) * t.slice < t.rows ? (k + 1) * t.slice : t.rows;
  const T* base = x + o * t.rows * t.channels + c;
  ShiftedSums<true, A> sums[V];
  A origin[V] = {};
  int64_t count = 0;
  if (c < t.channels) {
    const int64_t D = t.channels / groups;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const int64_t g = D == 1 ? c + j : (c + j) / D;
      origin[j] = as_shift(to_acc(x[o * t.rows * t.channels + g * D]));
      if (k == 0 && line == 0 && g * D == c + j) origin_out[o * groups + g] = origin[j];
    }

    int64_t row = k * t.slice + line;
    if (row < end) {
      const Vec<A, V> v = widen(load_vec<V>(base + row * t.channels));
#pragma unroll
      for (int j = 0; j < V; ++j) sums[j].start(v[j]);
    }
    for (; row < end; row += unroll * lines) {
      Vec<T, V> v[unroll];
#pragma unroll
      for (int u = 0; u < unroll; ++u)
        if (row + u * lines < end) v[u] = load_vec<V>(base + (row + u * lines) * t.channels);
#pragma unroll
      for (int u = 0; u < unroll; ++u) {
        if (row + u * lines < end) {
          const Vec<A, V> a = widen(v[u]);
#pragma unroll
          for (int j = 0; j < V; ++j) sums[j].add(a[j]);
          ++count;
        }
      }
    }
  }
  // The vectors are stored by component, so that neighbouring threads meet neighbouring banks.
#pragma unroll
  for (int j = 0; j < V; ++j) {
    sums[j].count = count;
    const Moments<A> m = sums[j].moments(origin[j]);
    s.mean[(line * V + j) * t.columns + column] = m.mean;
    s.square[(line * V + j) * t.columns + column] = m.square;
    if (j == 0) s.count[threadIdx.x] = m.count;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < t.columns * V; i += 256) {
    const int64_t channel = ((blockIdx.x - part * t.tiles) * t.columns + i % t.columns) * V + i / t.columns;
    Moments<A> total{};
    for (int q = 0; q < lines; ++q) {
      const int at = q * V * t.columns + i;
      total = Moments<A>::combine(total, {s.count[q * t.columns + i % t.columns], s.mean[at], s.square[at]});
    }
    if (channel < t.channels) {
      mean[part * t.channels + channel] = total.mean;
      square[part * t.channels + channel] = total.square;
    }
  }
}

template <class A, int V>
struct ColumnPairShared {
  A first[256 * V], second[256 * V];
};

// Sums of dy and dy * xhat of every (o, slice of rows, channel), [outer, count, C].
template <class T, int V>
__global__ void __launch_bounds__(256)
    columns_sums_kernel(const T* __restrict__ dy, const T* __restrict__ x, const accumulate_t<T>* __restrict__ mean_in,
                        const accumulate_t<T>* __restrict__ rstd_in, accumulate_t<T>* __restrict__ part_dy,
                        accumulate_t<T>* __restrict__ part_dyx, Tiling t, int64_t groups) {
  using A = accumulate_t<T>;
  constexpr int unroll = 2;
  auto& s = shared_storage<ColumnPairShared<A, V>>();
  const int column = threadIdx.x % t.columns, line = threadIdx.x / t.columns, lines = 256 / t.columns;
  const int64_t part = blockIdx.x / t.tiles, o = part / t.count, k = part - o * t.count;
  const int64_t c = ((blockIdx.x - part * t.tiles) * t.columns + column) * V;
  const int64_t end = (k + 1) * t.slice < t.rows ? (k + 1) * t.slice : t.rows;
  const int64_t base = o * t.rows * t.channels + c, D = t.channels / groups;
  A first[V] = {}, second[V] = {}, mean[V] = {}, rstd[V] = {};
  if (c < t.channels) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      mean[j] = mean_in[o * groups + (c + j) / D];
      rstd[j] = rstd_in[o * groups + (c + j) / D];
    }
    for (int64_t row = k * t.slice + line; row < end; row += unroll * lines) {
      Vec<T, V> d[unroll], v[unroll];
#pragma unroll
      for (int u = 0; u < unroll; ++u) {
        if (row + u * lines < end) {
          d[u] = load_vec<V>(dy + base + (row + u * lines) * t.channels);
          v[u] = load_vec<V>(x + base + (row + u * lines) * t.channels);
        }
      }
#pragma unroll
      for (int u = 0; u < unroll; ++u) {
        if (row + u * lines < end) {
          const Vec<A, V> a = widen(v[u]), e = widen(d[u]);
#pragma unroll
          for (int j = 0; j < V; ++j) {
            first[j] += e[j];
            second[j] += e[j] * (a[j] - mean[j]);
          }
        }
      }
    }
  }
#pragma unroll
  for (int j = 0; j < V; ++j) {
    s.first[(line * V + j) * t.columns + column] = first[j];
    s.second[(line * V + j) * t.columns + column] = second[j] * rstd[j];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < t.columns * V; i += 256) {
    const int64_t channel = ((blockIdx.x - part * t.tiles) * t.columns + i % t.columns) * V + i / t.columns;
    Pair<A> total{};
    for (int q = 0; q < lines; ++q)
      total = Pair<A>::combine(total, {s.first[q * V * t.columns + i], s.second[q * V * t.columns + i]});
    if (channel < t.channels) {
      part_dy[part * t.channels + channel] = total.first;
      part_dyx[part * t.channels + channel] = total.second;
    }
  }
}

// [outer, R, C]: threads keep the coefficients of their channels over all rows of the block's slice.
template <Pass P, class T, int V>
__global__ void __launch_bounds__(256)
    columns_apply_kernel(const T* __restrict__ x, const T* __restrict__ dy,
                         const Coefficients<accumulate_t<T>>* __restrict__ coefficients, T* __restrict__ out, Tiling t,
                         bool constant) {
  using A = accumulate_t<T>;
  constexpr int unroll = P == Pass::forward ? 4 : 2;
  const int column = threadIdx.x % t.columns, line = threadIdx.x / t.columns, lines = 256 / t.columns;
  const int64_t block = gridDim.x - 1 - blockIdx.x, part = block / t.tiles, o = part / t.count, k = part - o * t.count;
  const int64_t c = ((block - part * t.tiles) * t.columns + column) * V;
  if (c >= t.channels) return;
  const int64_t end = (k + 1) * t.slice < t.rows ? (k + 1) * t.slice : t.rows;
  const int64_t base = o * t.rows * t.channels + c;
  Coefficients<A> q[V];
#pragma unroll
  for (int j = 0; j < V; ++j)
    q[j] = load_vec_readonly<4>(reinterpret_cast<const A*>(coefficients + o * t.channels + c + j));
  for (int64_t row = k * t.slice + line; row < end; row += unroll * lines) {
    Vec<T, V> v[unroll] = {}, d[unroll] = {};
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
      if (row + u * lines < end) {
        const int64_t at = base + (row + u * lines) * t.channels;
        if (P == Pass::forward || !constant) v[u] = load_vec_streaming<V>(x + at);
        if constexpr (P == Pass::backward) d[u] = load_vec_streaming<V>(dy + at);
      }
    }
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
      if (row + u * lines < end) {
        const Vec<A, V> a = widen(v[u]), e = widen(d[u]);
        Vec<T, V> result;
#pragma unroll
        for (int j = 0; j < V; ++j) result[j] = from_acc<T>(apply_one<P>(a[j], e[j], q[j], constant));
        store_vec_streaming(out + base + (row + u * lines) * t.channels, result);
      }
    }
  }
}

// launch

// x is [N, C, S] or [N, S, C]; batch norm has one statistic per channel over N and S, group norm per (n, group).
struct ChannelShape {
  int64_t N, C, S, groups;
  bool batch, channels_last;
  // One element per channel makes the two layouts the same.
  bool columns() const { return channels_last || S == 1; }
  int64_t outer() const { return batch ? 1 : N; }
  int64_t statistics() const { return outer() * groups; }
  Runs runs() const {
    Runs r = batch ? Runs(1, C, 0, S, N, S, C * S) : Runs(N, C, C * S, S, 1, S, S);
    return r.grouped(batch ? 1 : C / groups);
  }
  Partials partials(const Runs& r) const {
    return {r.outer, C, groups, r.elements(), r.slice, r.count, C * r.count, r.count, 1};
  }
  Tiling tiling(int V) const {
    Tiling t{};
    t.outer = outer();
    t.rows = batch ? N * S : S;
    t.channels = C;
    const int64_t vectors = divide_up(C, V);
    t.columns = std::min(32, power_of_two_from(std::max<int64_t>(1, vectors)));
    t.tiles = divide_up(vectors, t.columns);
    // At least four rows per thread, and about 2112 blocks where there are enough rows.
    const int64_t lines = 4 * (256 / t.columns), blocks = std::max<int64_t>(1, t.outer * t.tiles);
    t.slice = divide_up(std::max(lines, divide_up(t.rows, std::max<int64_t>(1, 2112 / blocks))), lines) * lines;
    t.count = divide_up(t.rows, t.slice);
    return t;
  }
  Partials partials(const Tiling& t) const { return {t.outer, C, groups, t.rows, t.slice, t.count, C * t.count, 1, C}; }
};

template <Pass P, class T>
void channels_apply(const T* x, const T* dy, const Coefficients<accumulate_t<T>>* coefficients, T* out,
                    const ChannelShape& shape, bool constant, cudaStream_t stream) {
  const int64_t elements = shape.N * shape.C * shape.S;
  if (elements == 0) return;
  const bool aligned = is_aligned(x, dy, out);
  if (shape.columns()) {
    with_vector<T>(aligned && shape.C % vector_width<T> == 0, [&]<int V>() {
      const Tiling t = shape.tiling(V);
      launch(columns_apply_kernel<P, T, V>,
             {.grid = grid_of(t.outer * t.count * t.tiles), .block = dim3(256), .stream = stream}, x, dy, coefficients,
             out, t, constant);
    });
    return;
  }
  // Vectors may straddle planes here, so only the whole tensor has to hold whole vectors.
  with_vector<T>(aligned && elements % vector_width<T> == 0, [&]<int V>() {
    launch(planes_apply_kernel<P, T, V>,
           {.grid = grid_of(divide_up(elements, 1024 * V)), .block = dim3(256), .stream = stream}, x, dy, coefficients,
           out, elements, shape.batch ? shape.C : shape.N * shape.C, shape.S,
           shape.S < (int64_t(1) << 31) ? Divider(shape.S) : Divider(), constant);
  });
}

template <class A>
const Coefficients<A>* as_coefficients(const A* p) {
  return reinterpret_cast<const Coefficients<A>*>(p);
}
template <class A>
Coefficients<A>* as_coefficients(A* p) {
  return reinterpret_cast<Coefficients<A>*>(p);
}

// Statistics and normalisation; workspace(n) hands out n values of accumulate_t<T>.
template <class T, class W, class Workspace>
void channels_fwd(const T* x, const W* w, const W* b, T* y, accumulate_t<T>* mean, accumulate_t<T>* rstd,
                  accumulate_t<T>* var, const ChannelShape& shape, double eps, Workspace&& workspace,
                  cudaStream_t stream) {
  using A = accumulate_t<T>;
  A* coefficients = workspace(4 * shape.outer() * shape.C);
  A* origin = workspace(shape.statistics());
  const auto combine = [&](const A* part_mean, const A* part_square, const Partials& p) {
    const int width = p.group_channels() * p.count > 128 ? 128 : 32;
    launch(channels_combine_fwd_kernel<A, W>,
           {.grid = grid_of(divide_up(shape.statistics(), 128 / width)),
            .block = dim3(128),
            .smem = sizeof(MomentsShared<A>),
            .stream = stream},
           part_mean, part_square, origin, w, b, mean, rstd, var, as_coefficients(coefficients), p, static_cast<A>(eps),
           width);
  };
  if (shape.columns()) {
    with_vector<T>(is_aligned(x) && shape.C % vector_width<T> == 0, [&]<int V>() {
      const Tiling t = shape.tiling(V);
      A* part_mean = workspace(t.outer * t.count * shape.C);
      A* part_square = workspace(t.outer * t.count * shape.C);
      launch(columns_moments_kernel<T, V>,
             {.grid = grid_of(t.outer * t.count * t.tiles),
              .block = dim3(256),
              .smem = sizeof(ColumnMomentsShared<A, V>),
              .stream = stream},
             x, part_mean, part_square, origin, t, shape.groups);
      combine(part_mean, part_square, shape.partials(t));
    });
  } else {
    with_vector<T>(is_aligned(x) && shape.S % vector_width<T> == 0, [&]<int V>() {
      const Runs runs = shape.runs();
      A* part_mean = workspace(runs.units());
      A* part_square = workspace(runs.units());
      slice_moments<true, T, V>(x, part_mean, part_square, origin, runs, stream);
      combine(part_mean, part_square, shape.partials(runs));
    });
  }
  channels_apply<Pass::forward, T>(x, nullptr, as_coefficients(coefficients), y, shape, false, stream);
}

// dx null or dw null where not needed. constant: mean and rstd do not depend on x (batch norm in inference).
template <class T, class W, class Workspace>
void channels_bwd(const T* dy, const T* x, const W* w, const accumulate_t<T>* mean, const accumulate_t<T>* rstd, T* dx,
                  W* dw, W* db, bool need_dw, const ChannelShape& shape, bool constant, Workspace&& workspace,
                  cudaStream_t stream) {
  using A = accumulate_t<T>;
  const bool need_dx = dx != nullptr;
  A* coefficients = need_dx ? workspace(4 * shape.outer() * shape.C) : nullptr;
  // Sums of channels per n need one more stage, unless they are dw and db already.
  const bool staged = need_dw && !shape.batch;
  A* sum_dyx = staged ? workspace(shape.N * shape.C) : nullptr;
  A* sum_dy = staged ? workspace(shape.N * shape.C) : nullptr;
  const auto combine = [&](const A* part_dy, const A* part_dyx, const Partials& p) {
    const int lanes = p.count > 4 ? 32 : 1, width = p.group_channels() * lanes > 32 ? 128 : 32;
    const LaunchConfig config{.grid = grid_of(divide_up(shape.statistics(), 128 / width)),
                              .block = dim3(128),
                              .smem = sizeof(PairShared<A>),
                              .stream = stream};
    Coefficients<A>* wanted = need_dx && !constant ? as_coefficients(coefficients) : nullptr;
    if (shape.batch) {
      launch(channels_combine_bwd_kernel<A, W, W>, config, part_dy, part_dyx, mean, rstd, w, dw, db, wanted, p, width,
             lanes);
    } else {
      launch(channels_combine_bwd_kernel<A, W, A>, config, part_dy, part_dyx, mean, rstd, w, sum_dyx, sum_dy, wanted, p,
             width, lanes);
    }
  };
  if (need_dw || !constant) {
    if (shape.columns()) {
      with_vector<T>(is_aligned(x, dy) && shape.C % vector_width<T> == 0, [&]<int V>() {
        const Tiling t = shape.tiling(V);
        A* part_dy = workspace(t.outer * t.count * shape.C);
        A* part_dyx = workspace(t.outer * t.count * shape.C);
        launch(columns_sums_kernel<T, V>,
               {.grid = grid_of(t.outer * t.count * t.tiles),
                .block = dim3(256),
                .smem = sizeof(ColumnPairShared<A, V>),
                .stream = stream},
               dy, x, mean, rstd, part_dy, part_dyx, t, shape.groups);
        combine(part_dy, part_dyx, shape.partials(t));
      });
    } else {
      with_vector<T>(is_aligned(x, dy) && shape.S % vector_width<T> == 0, [&]<int V>() {
        const Runs runs = shape.runs();
        A* part_dy = workspace(runs.units());
        A* part_dyx = workspace(runs.units());
        const int width = runs.width();
        launch(planes_sums_kernel<T, V>,
               {.grid = grid_of(divide_up(runs.units(), 256 / width)),
                .block = dim3(256),
                .smem = sizeof(PairShared<A>),
                .stream = stream},
               dy, x, mean, rstd, part_dy, part_dyx, runs, runs.units(), width);
        combine(part_dy, part_dyx, shape.partials(runs));
      });
    }
    if (staged) {
      sum_columns<A, W>(sum_dyx, dw, shape.N, shape.C, stream);
      sum_columns<A, W>(sum_dy, db, shape.N, shape.C, stream);
    }
  }
  if (!need_dx) return;
  if (constant) {
    launch(channels_coefficients_kernel<A, W>,
           {.grid = grid_of(divide_up(shape.C, 128)), .block = dim3(128), .stream = stream}, mean, rstd, w,
           static_cast<const W*>(nullptr), as_coefficients(coefficients), shape.C, false, A(0));
  }
  channels_apply<Pass::backward, T>(x, dy, as_coefficients(coefficients), dx, shape, constant, stream);
}

}  // namespace pyops::norm
