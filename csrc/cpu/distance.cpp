// distance · CPU
//   cdist  y[b,p,r] = (sum_m |x1[b,p,m] - x2[b,r,m]|^p)^(1/p), p = 0, 1, 2, infinity or any other; metrics in
//          common/distance.h;  dx1[p] = sum_r dy[p,r] slope(x1[p] - x2[r]), dx2 likewise
//   knn    the k smallest of each row of such a y, ascending, the lower index first among equals, with their indices
// layout   x1: [B, P, M] · x2: [B, R, M] · y, dy: [B, P, R] · knn: distances, indices [B, P, k]
// mapping  x2 is packed column by column in panels of two vectors; a tile of rows × panel is summed in registers over
//          all of M. Threads take blocks of rows; knn with few rows also cuts x2, and merges the parts
// memory   cdist: x1, x2 once for each block of 96 rows, y once; a packed copy of x2. knn: a packed panel, k numbers a
//          row
// numerics differences first, so that the distance of equals is 0 exactly; sums in acc_t
#include <limits>

#include "common/distance_binding.h"
#include "common/registry.h"
#include "cpu/math.h"
#include "cpu/parallel.h"

namespace pyops::PYOPS_CPU_CAPABILITY {

using namespace distance;

// ---- kernels

#if defined(__AVX512F__)
inline constexpr int tile_rows = 8;
#else
inline constexpr int tile_rows = 4;
#endif
template <class A>
inline constexpr int64_t panel = 2 * Vec<A>::width;
inline constexpr int64_t sum_block = 32;  // rows of a gradient that are added before their sum joins the rest
// Rows that share a panel while it is in the first cache, and the bytes of packed x2 that share the second.
inline constexpr int64_t block_rows = 96, block_bytes = 256 << 10;

// Columns [first, first + count) of x2ᵀ as a panel [M][panel]; columns that are not there are zero.
template <class A, class T>
void pack_panel(const T* x2, int64_t first, int64_t count, int64_t M, A* to) {
  for (int64_t c = 0; c < panel<A>; ++c) {
    const T* from = x2 + (first + c) * M;
    for (int64_t m = 0; m < M; ++m) to[m * panel<A> + c] = c < count ? A(from[m]) : A(0);
  }
}

// Sums of tile_rows rows against one panel.
template <class A, class Metric>
void tile_sums(const Metric metric, const A* const (&rows)[tile_rows], const A* __restrict__ b, int64_t M,
               A* __restrict__ tile) {
  using V = Vec<A>;
  V sum[tile_rows][2];
  for (int64_t m = 0; m < M; ++m, b += panel<A>) {
    const V left = V::load(b), right = V::load(b + V::width);
#pragma GCC unroll 8
    for (int r = 0; r < tile_rows; ++r) {
      const V a(rows[r][m]);
      sum[r][0] = metric.add(sum[r][0], a - left);
      sum[r][1] = metric.add(sum[r][1], a - right);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < tile_rows; ++r)
    sum[r][0].store(tile + r * panel<A>), sum[r][1].store(tile + r * panel<A> + V::width);
}

// Rows [first, first + count) of x as acc_t: in place, or widened into `scratch`.
template <class A, class T>
const A* widened_rows(const T* x, int64_t first, int64_t count, int64_t M, A* scratch) {
  if constexpr (std::is_same_v<T, A>) {
    return x + first * M;
  } else {
    each_vector<A>(count * M,
                   [&](int64_t i, auto lanes) { Vec<A>::load(x + first * M + i, lanes).store(scratch + i, lanes); });
    return scratch;
  }
}

// use(row, rows, tile) for the tiles of rows [0, count) against one panel.
template <class A, class Metric, class F>
void each_tile(const Metric& metric, const A* x1, int64_t count, const A* packed, int64_t M, F&& use) {
  alignas(64) A tile[tile_rows * panel<A>];
  for (int64_t row = 0; row < count; row += tile_rows) {
    const int64_t n = std::min<int64_t>(tile_rows, count - row);
    const A* rows[tile_rows];
    for (int r = 0; r < tile_rows; ++r) rows[r] = x1 + std::min<int64_t>(row + r, count - 1) * M;
    tile_sums(metric, rows, packed, M, tile);
    use(row, n, static_cast<const A*>(tile));
  }
}

template <class T, class Metric>
void cdist_all(const Metric& metric, const T* x1, const T* x2, T* y, const Shape& s) {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  const int64_t panels = ceil_div(s.R, panel<A>), blocks = ceil_div(s.P, block_rows);
  Buffer<A> packed(s.B * panels * panel<A> * s.M);
  parallel_for(s.B * panels, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / panels, first = i % panels * panel<A>;
      pack_panel(x2 + b * s.R * s.M, first, std::min(panel<A>, s.R - first), s.M, packed.get() + i * panel<A> * s.M);
    }
  });
  const int64_t together =
      std::max<int64_t>(1, block_bytes / int64_t(sizeof(A)) / (panel<A> * std::max<int64_t>(s.M, 1)));
  parallel_for(s.B * blocks, 1, [&](int64_t begin, int64_t end) {
    Buffer<A> scratch(std::is_same_v<T, A> ? 0 : block_rows * s.M);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / blocks, first = i % blocks * block_rows, count = std::min(block_rows, s.P - first);
      const A* rows = widened_rows(x1 + b * s.P * s.M, first, count, s.M, scratch.get());
      T* out = y + (b * s.P + first) * s.R;
      for (int64_t from = 0; from < panels; from += together)
        for (int64_t row = 0; row < count; row += tile_rows)
          for (int64_t q = from; q < std::min(from + together, panels); ++q)
            each_tile(metric, rows + row * s.M, std::min<int64_t>(tile_rows, count - row),
                      packed.get() + (b * panels + q) * panel<A> * s.M, s.M, [&](int64_t, int64_t n, const A* tile) {
                        const int64_t column = q * panel<A>, width = std::min(panel<A>, s.R - column);
                        for (int64_t r = 0; r < n; ++r) {
                          T* to = out + (row + r) * s.R + column;
                          each_vector<A>(width, [&](int64_t c, auto lanes) {
                            metric.finish(V::load(tile + r * panel<A> + c)).store(to + c, lanes);
                          });
                        }
                      });
    }
  });
}

// dx[p] = sum_r factor(dy, dist)[p,r] along(x[p] - other[r], dist[p,r]); dy and dist are read by strides, so that both
// gradients are this one.
struct Strides {
  int64_t batch, row, column;
};
template <class T, class Metric>
void cdist_gradient(const Metric& metric, const T* dy, const T* dist, Strides at, const T* x, const T* other, T* dx,
                    int64_t B, int64_t P, int64_t R, int64_t M) {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  const int64_t tiles = ceil_div(P, tile_rows);
  parallel_for(B * tiles, 1, [&](int64_t begin, int64_t end) {
    Buffer<A> factor(2 * tile_rows * R);  // dy and dist of the tile, [R][tile_rows]
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / tiles, first = i % tiles * tile_rows, n = std::min<int64_t>(tile_rows, P - first);
      A *const d = factor.get(), *const e = d + tile_rows * R;
      for (int64_t r = 0; r < R; ++r)
        for (int64_t k = 0; k < tile_rows; ++k) {
          const int64_t from = b * at.batch + (first + std::min(k, n - 1)) * at.row + r * at.column;
          d[r * tile_rows + k] = metric.factor(A(dy[from]), A(dist[from])), e[r * tile_rows + k] = A(dist[from]);
        }
      const T* others = other + b * R * M;
      each_vector<A>(M, [&](int64_t m, auto lanes) {
        V sum[tile_rows], lost[tile_rows], mine[tile_rows];
        for (int64_t k = 0; k < tile_rows; ++k)
          mine[k] = V::load(x + (b * P + first + std::min(k, n - 1)) * M + m, lanes);
        // One running sum over thousands of rows would lose digits: blocks are added, and what that loses is added to
        // the next (Kahan 1965, https://doi.org/10.1145/363707.363723).
        for (int64_t start = 0; start < R; start += sum_block) {
          V part[tile_rows];
          for (int64_t r = start; r < std::min(start + sum_block, R); ++r) {
            const V theirs = V::load(others + r * M + m, lanes);
#pragma GCC unroll 8
            for (int k = 0; k < tile_rows; ++k)
              part[k] = part[k] + V(d[r * tile_rows + k]) * metric.along(mine[k] - theirs, V(e[r * tile_rows + k]));
          }
          for (int k = 0; k < tile_rows; ++k) {
            const V more = part[k] + lost[k], total = sum[k] + more;
            lost[k] = more - (total - sum[k]);
            sum[k] = total;
          }
        }
        for (int64_t k = 0; k < n; ++k) sum[k].store(dx + (b * P + first + k) * M + m, lanes);
      });
    }
  });
}

// The k best of one row so far, ascending; a NaN is larger than everything.
template <class A>
struct Best {
  A* value;
  int64_t* index;
  int64_t k, filled = 0;

  static bool before(A a, A b) { return a < b || (b != b && a == a); }
  bool takes(A v) const { return filled < k || before(v, value[k - 1]); }
  void add(A v, int64_t i) {
    int64_t at = filled < k ? filled++ : k - 1;
    for (; at > 0 && before(v, value[at - 1]); --at) value[at] = value[at - 1], index[at] = index[at - 1];
    value[at] = v, index[at] = i;
  }
};

// True where any of the first `width` values is below the bound.
template <class A>
bool any_below(const A* values, int64_t width, A bound) {
  using V = Vec<A>;
  V count;
  each_vector<A>(width, [&](int64_t c, auto lanes) {
    count = count + keep(select(V::load(values + c) < V(bound), V(A(1)), V(A(0))), lanes);
  });
  return sum(count) > A(0);
}

template <class T, class Metric>
void knn_all(const Metric& metric, const T* query, const T* data, T* distances, int64_t* indices, const Shape& s,
             int64_t k) {
  using A = accumulate_t<T>;
  const int64_t rows = s.B * s.P;
  if (rows == 0) return;
  const int64_t rows_together = std::min<int64_t>(4 * block_rows, s.P);
  const int64_t blocks = ceil_div(s.P, rows_together), panels = ceil_div(s.R, panel<A>);
  const int64_t parts = std::max<int64_t>(1, std::min(ceil_div(thread_count(), s.B * blocks), panels));
  Buffer<A> values(rows * parts * k);
  Buffer<int64_t> places(rows * parts * k);
  Buffer<int64_t> filled(rows * parts, 0);
  parallel_for(s.B * blocks * parts, 1, [&](int64_t begin, int64_t end) {
    Buffer<A> scratch(std::is_same_v<T, A> ? 0 : rows_together * s.M), packed(panel<A> * s.M);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t part = i % parts, block = i / parts % blocks, b = i / parts / blocks;
      const int64_t first = block * rows_together, count = std::min(rows_together, s.P - first);
      const A* x = widened_rows(query + b * s.P * s.M, first, count, s.M, scratch.get());
      for (int64_t q = part * panels / parts; q < (part + 1) * panels / parts; ++q) {
        const int64_t column = q * panel<A>, width = std::min(panel<A>, s.R - column);
        pack_panel(data + b * s.R * s.M, column, width, s.M, packed.get());
        each_tile(metric, x, count, packed.get(), s.M, [&](int64_t row, int64_t n, const A* tile) {
          for (int64_t r = 0; r < n; ++r) {
            const int64_t list = (b * s.P + first + row + r) * parts + part;
            Best<A> best{values.get() + list * k, places.get() + list * k, k, filled[list]};
            const A* candidates = tile + r * panel<A>;
            const A worst = best.filled < k ? A(NAN) : best.value[k - 1];
            if (worst == worst && !any_below(candidates, width, worst)) continue;
            for (int64_t c = 0; c < width; ++c)
              if (best.takes(candidates[c])) best.add(candidates[c], column + c);
            filled[list] = best.filled;
          }
        });
      }
    }
  });
  // Parts in their order, so that among equals the lower index stays first.
  parallel_for(rows, ceil_div(4096, parts * k), [&](int64_t begin, int64_t end) {
    Buffer<A> merged(k);
    Buffer<int64_t> from(k);
    for (int64_t row = begin; row < end; ++row) {
      Best<A> best{merged.get(), from.get(), k};
      for (int64_t list = row * parts; list < (row + 1) * parts; ++list)
        for (int64_t j = list * k; j < list * k + filled[list] && best.takes(values[j]); ++j)
          best.add(values[j], places[j]);
      for (int64_t j = 0; j < k; ++j) {
        distances[row * k + j] = T(metric.finish(Vec<A>(merged[j])).v[0]);
        indices[row * k + j] = from[j];
      }
    }
  });
}

// ---- binding

Tensor cdist_fwd(const Tensor& x1, const Tensor& x2, double p) {
  OpScope op("cdist_fwd", x1);
  const Shape s = shape_of(op, x1, x2, p);
  return dispatch_floating(op, x1.scalar_type(), [&]<class T>() {
    Tensor y = op.empty<T>({s.B, s.P, s.R});
    const T *a = op.in<T>(x1, "x1", {s.B, s.P, s.M}), *b = op.in<T>(x2, "x2", {s.B, s.R, s.M});
    T* to = op.out<T>(y, "y", {s.B, s.P, s.R});
    with_metric(p, [&](const auto& metric) { cdist_all(metric, a, b, to, s); });
    return y;
  });
}

std::tuple<Tensor, Tensor> cdist_bwd(const Tensor& dy, const Tensor& x1, const Tensor& x2, const Tensor& dist, double p,
                                     bool need_dx1, bool need_dx2) {
  OpScope op("cdist_bwd", dy);
  const Shape s = shape_of(op, x1, x2, p);
  return dispatch_floating(op, x1.scalar_type(), [&]<class T>() {
    Tensor dx1 = need_dx1 ? op.empty<T>({s.B, s.P, s.M}) : op.empty<T>({0});
    Tensor dx2 = need_dx2 ? op.empty<T>({s.B, s.R, s.M}) : op.empty<T>({0});
    const T *a = op.in<T>(x1, "x1", {s.B, s.P, s.M}), *b = op.in<T>(x2, "x2", {s.B, s.R, s.M});
    const T *d = op.in<T>(dy, "dy", {s.B, s.P, s.R}), *e = op.in<T>(dist, "dist", {s.B, s.P, s.R});
    with_metric(p, [&](const auto& metric) {
      if (need_dx1)
        cdist_gradient(metric, d, e, {s.P * s.R, s.R, 1}, a, b, op.out<T>(dx1, "dx1", {s.B, s.P, s.M}), s.B, s.P, s.R,
                       s.M);
      if (need_dx2)
        cdist_gradient(metric, d, e, {s.P * s.R, 1, s.R}, b, a, op.out<T>(dx2, "dx2", {s.B, s.R, s.M}), s.B, s.R, s.P,
                       s.M);
    });
    return std::tuple(dx1, dx2);
  });
}

std::tuple<Tensor, Tensor> knn_search(const Tensor& query, const Tensor& data, int64_t k, double p) {
  OpScope op("knn_search", query);
  const Shape s = shape_of(op, query, data, p);
  op.check(k >= 1 && k <= s.R, "k must be in [1, ", s.R, "], got ", k);
  return dispatch_floating(op, query.scalar_type(), [&]<class T>() {
    Tensor distances = op.empty<T>({s.B, s.P, k}), indices = op.empty<int64_t>({s.B, s.P, k});
    const T *a = op.in<T>(query, "query", {s.B, s.P, s.M}), *b = op.in<T>(data, "data", {s.B, s.R, s.M});
    T* to = op.out<T>(distances, "distances", {s.B, s.P, k});
    int64_t* places = op.out<int64_t>(indices, "indices", {s.B, s.P, k});
    with_metric(p, [&](const auto& metric) { knn_all(metric, a, b, to, places, s, k); });
    return std::tuple(distances, indices);
  });
}

PYOPS_LIBRARY(m) {
  PYOPS_IMPL(m, cdist_fwd);
  PYOPS_IMPL(m, cdist_bwd);
  PYOPS_IMPL(m, knn_search);
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY
