// Convolution with 3 x 3 taps by Winograd's minimal filtering F(m x m, 3 x 3), m = 2 or 4, in float32.
//
//   U = G w G^T        per pair of channels     [point][c][k]      t x t points, t = m + 2
//   V = B^T x B        per tile of t x t x      [point][tile][c]   tiles overlap by two
//   Y = A^T (sum over c of U V) A               m x m outputs of a tile
//
// A product of matrices per point takes t^2 multiplications where the sum over taps takes 9 m^2: 2.25 times fewer for
// m = 2, 4 times fewer for m = 4. The transforms evaluate polynomials at 0, +-a, (+-b,) infinity: a = 1, or a = 3/4 and
// b = 3/2, whose powers are exact in float32 and whose rounding is 2.6 times smaller than that of 1 and 2
// (docs/math/convolution.md; Lavin, Gray 2015, https://arxiv.org/abs/1509.09308; Barabasz et al. 2018,
// https://arxiv.org/abs/1803.10986).
//
// Tiles are numbered over examples. A block of tiles passes three stages that share a cache, each over all threads:
// x to V, products, sums to y. NCHW: lanes over tiles, U is the left operand of gemm.h. NHWC: lanes over channels, U is
// the right operand.
#pragma once

#include "cpu/conv_gemm.h"

namespace pyops::PYOPS_CPU_CAPABILITY::conv_winograd {

using conv::Space;
using conv_gemm::Problem;
using conv_gemm::task_grain;

template <int m>
struct Points;  // input: 1-d transform of t elements; weight: of 3 to t; output: of t to m

template <>
struct Points<2> {
  template <class V>
  static PYOPS_INLINE void input(V (&d)[4]) {
    const V d0 = d[0], d1 = d[1], d2 = d[2], d3 = d[3];
    d[0] = d2 - d0, d[1] = d2 + d1, d[2] = d2 - d1, d[3] = d3 - d1;
  }
  template <class V>
  static PYOPS_INLINE void weight(const V& g0, const V& g1, const V& g2, V (&u)[4]) {
    const V even = (g0 + g2) * V(0.5f), odd = g1 * V(0.5f);
    u[0] = V(0.f) - g0, u[1] = even + odd, u[2] = even - odd, u[3] = g2;
  }
  template <class V>
  static PYOPS_INLINE void output(const V (&s)[4], V (&y)[2]) {
    y[0] = s[0] + (s[1] + s[2]), y[1] = (s[1] - s[2]) + s[3];
  }
};

template <>
struct Points<4> {
  static constexpr float a = 0.75f, b = 1.5f, a2 = a * a, b2 = b * b;
  template <class V>
  static PYOPS_INLINE void input(V (&d)[6]) {
    const V d0 = d[0], d1 = d[1], d2 = d[2], d3 = d[3], d4 = d[4], d5 = d[5];
    const V even_a = fma(V(-b2), d2, d4), odd_a = V(a) * fma(V(-b2), d1, d3);
    const V even_b = fma(V(-a2), d2, d4), odd_b = V(b) * fma(V(-a2), d1, d3);
    d[0] = fma(V(a2 * b2), d0, fma(V(-a2 - b2), d2, d4));
    d[1] = even_a + odd_a, d[2] = even_a - odd_a;
    d[3] = even_b + odd_b, d[4] = even_b - odd_b;
    d[5] = fma(V(a2 * b2), d1, fma(V(-a2 - b2), d3, d5));
  }
  template <class V>
  static PYOPS_INLINE void weight(const V& g0, const V& g1, const V& g2, V (&u)[6]) {
    constexpr float at_a = 1 / (2 * a2 * (a2 - b2)), at_b = 1 / (2 * b2 * (b2 - a2));
    const V even_a = fma(V(a2), g2, g0) * V(at_a), odd_a = g1 * V(a * at_a);
    const V even_b = fma(V(b2), g2, g0) * V(at_b), odd_b = g1 * V(b * at_b);
    u[0] = g0 * V(1 / (a2 * b2));
    u[1] = even_a + odd_a, u[2] = even_a - odd_a;
    u[3] = even_b + odd_b, u[4] = even_b - odd_b;
    u[5] = g2;
  }
  template <class V>
  static PYOPS_INLINE void output(const V (&s)[6], V (&y)[4]) {
    const V even_a = s[1] + s[2], odd_a = s[1] - s[2], even_b = s[3] + s[4], odd_b = s[3] - s[4];
    y[0] = s[0] + (even_a + even_b);
    y[1] = fma(V(a), odd_a, V(b) * odd_b);
    y[2] = fma(V(a2), even_a, V(b2) * even_b);
    y[3] = fma(V(a * a2), odd_a, fma(V(b * b2), odd_b, s[5]));
  }
};

// Tiles of the outputs, numbered over examples; tile (row, column) reads x from (low_h + m row, low_w + m column) on.
struct Grid {
  int64_t rows, columns, low_h, low_w;
  Grid(const Space& s, int64_t m)
      : rows(ceil_div(s.h.count, m)),
        columns(ceil_div(s.w.count, m)),
        low_h(s.h.in_base + std::min(0, 2 * s.h.tap_step)),
        low_w(s.w.in_base + std::min(0, 2 * s.w.tap_step)) {}
  int64_t each() const { return rows * columns; }
};

// Tiles next to each other in one row of tiles and one panel.
struct Run {
  int64_t n, row, column, count, lane;
};
inline void runs_of(const Grid& grid, int64_t begin, int64_t end, std::vector<Run>& runs) {
  runs.clear();
  for (int64_t i = begin; i < end;) {
    const int64_t n = i / grid.each(), row = i % grid.each() / grid.columns, column = i % grid.columns;
    const int64_t count = std::min(grid.columns - column, end - i);
    runs.push_back({n, row, column, count, i - begin});
    i += count;
  }
}

template <int m, bool last>
struct Winograd {
  using V = Vec<float>;
  using T = Tile<float>;
  static constexpr int t = m + 2, points = t * t;
  static constexpr int64_t W = V::width, R = T::rows, L = T::columns;

  const Problem& p;
  const Space& s;
  const Grid grid;
  const float *x, *w;
  const Epilogue<float>& epilogue;
  float* y;
  const int64_t C, a_panel, b_panel;  // C: summed channels; elements of a panel of either operand

  Winograd(const Problem& problem, const float* x, const float* w, const Epilogue<float>& epilogue, float* y)
      : p(problem),
        s(problem.space),
        grid(problem.space, m),
        x(x),
        w(w),
        epilogue(epilogue),
        y(y),
        C(problem.C),
        a_panel(T::packed_a(R, problem.C)),
        b_panel(problem.C * L) {}

  // 2-d transforms: load(i, j) and store(i, j, v) name an element of the tile.
  template <class Load, class Store>
  static PYOPS_INLINE void transform_input(const Load& load, const Store& store) {
    V d[t][t];
    for (int j = 0; j < t; ++j) {
      V column[t];
      for (int i = 0; i < t; ++i) column[i] = load(i, j);
      Points<m>::input(column);
      for (int i = 0; i < t; ++i) d[i][j] = column[i];
    }
    for (int i = 0; i < t; ++i) {
      Points<m>::input(d[i]);
      for (int j = 0; j < t; ++j) store(i, j, d[i][j]);
    }
  }
  template <class Load, class Store>
  static PYOPS_INLINE void transform_weight(const Load& load, const Store& store) {
    V u[t][3];
    for (int j = 0; j < 3; ++j) {
      V column[t];
      Points<m>::weight(load(0, j), load(1, j), load(2, j), column);
      for (int i = 0; i < t; ++i) u[i][j] = column[i];
    }
    for (int i = 0; i < t; ++i) {
      V row[t];
      Points<m>::weight(u[i][0], u[i][1], u[i][2], row);
      for (int j = 0; j < t; ++j) store(i, j, row[j]);
    }
  }
  template <class Load, class Store>
  static PYOPS_INLINE void transform_output(const Load& load, const Store& store) {
    V z[m][t];
    for (int j = 0; j < t; ++j) {
      V column[t], sum[m];
      for (int i = 0; i < t; ++i) column[i] = load(i, j);
      Points<m>::output(column, sum);
      for (int i = 0; i < m; ++i) z[i][j] = sum[i];
    }
    for (int i = 0; i < m; ++i) {
      V row[m];
      Points<m>::output(z[i], row);
      for (int j = 0; j < m; ++j) store(i, j, row[j]);
    }
  }

  // Panels of `count` output channels, and of `count` tiles.
  static int64_t weight_panels(int64_t count) { return last ? ceil_div(count, L) : T::tiles(count); }
  static int64_t tile_panels(int64_t count) { return last ? T::tiles(count) : ceil_div(count, L); }
  // First channel or tile of a panel that is a left (A) or right (B) operand.
  static int64_t a_begin(int64_t count, int64_t i) { return T::begin(count, i); }
  // Elements between points: five cache lines more than they need, or they would all share one set of the cache.
  static int64_t step_of(int64_t elements) { return elements + 80; }
  int64_t weight_panel() const { return last ? b_panel : a_panel; }
  int64_t tile_panel() const { return last ? a_panel : b_panel; }

  // U of the output channels [m0, m0 + M) of group g: [point][panel].
  void weights(int64_t g, int64_t m0, int64_t M, float* u) const {
    const int64_t panels = weight_panels(M), size = weight_panel(), step = step_of(panels * size);
    int64_t at[3][3];  // the tap of the filter that stands there
    for (int i = 0; i < 3; ++i)
      for (int j = 0; j < 3; ++j) {
        const int64_t jh = s.h.tap_step > 0 ? i : 2 - i, jw = s.w.tap_step > 0 ? j : 2 - j;
        at[i][j] = p.tap(jh * 3 + jw);
      }
    // Vectors of weights, [tap][W], or [tap][c][W]: turned, for in memory the lanes do not stand next to each other.
    parallel_for(panels, ceil_div(1 << 9, C), [&](int64_t begin, int64_t end) {
      alignas(64) float taps[9 * (last ? W : 1) * W];
      for (int64_t panel = begin; panel < end; ++panel) {
        float* to = u + panel * size;
        if constexpr (last) {
          for (int64_t l = 0; l < L; l += W) {
            const int64_t lanes = std::min(M - panel * L - l, W);
            if (lanes <= 0) break;
            const float* from = w + g * p.at.g + (m0 + panel * L + l) * p.at.m;
            for (int64_t c = 0; c < C; ++c) {
              if (p.at.m != 1 && c % W == 0)
                for (int64_t j = 0; j < 9; ++j)
                  transpose<float>(taps + j * W * W, W, from + c + j * p.at.tap, p.at.m, lanes, std::min(W, C - c), W);
              transform_weight(
                  [&](int i, int j) {
                    return p.at.m == 1 ? V::load(from + c * p.at.c + at[i][j] * p.at.tap, FirstLanes{lanes})
                                       : V::load(taps + (at[i][j] * W + c % W) * W);
                  },
                  [&](int i, int j, const V& v) { v.store(to + (i * t + j) * step + c * L + l); });
            }
          }
        } else {
          // all rows for some channels, then the next channels: rows next to each other share cache lines of w
          const int64_t first = T::begin(M, panel), count = T::begin(M, panel + 1) - first, rows = T::round(count);
          for (int64_t c = 0; c < C; c += W) {
            const float* from = w + g * p.at.g + (m0 + first) * p.at.m + c * p.at.c;
            for (int64_t r = 0; r < count; ++r, from += p.at.m) {
              transpose<float>(taps, W, from, p.at.c, std::min(W, C - c), 9, W);
              transform_weight([&](int i, int j) { return V::load(taps + at[i][j] * W); },
                               [&](int i, int j, const V& v) {
                                 v.store(to + (i * t + j) * step + c / chunk * rows * chunk + r * chunk + c % chunk);
                               });
            }
          }
        }
      }
    });
  }

  // V of one panel of tiles. begin, count: its tiles; step: elements between points.
  static constexpr int64_t cell_pitch = L + W, line_pitch = m * (L + W) + t;
  static constexpr int64_t input_room = t * line_pitch + points * cell_pitch;
  void input_lanes_over_tiles(int64_t g, int64_t begin, int64_t count, float* to, int64_t step, int64_t c0, int64_t c1,
                              std::vector<Run>& runs, float* room) const {
    // rows of a run, and what B^T makes of its columns; whole vectors, of which the last lanes may say nothing
    float *line = room, *cells = room + t * line_pitch;  // cells: [t][t][cell_pitch]
    runs_of(grid, begin, begin + count, runs);
    for (int64_t c = c0; c < c1; ++c) {
      for (const Run& r : runs) {
        const float* plane = x + ((r.n * p.G + g) * C + c) * s.in_plane();
        const int64_t columns = r.count * m + 2, left = grid.low_w + r.column * m;
        for (int i = 0; i < t; ++i) {
          const int64_t h = grid.low_h + r.row * m + i;
          if (h < 0 || h >= s.h.size)
            std::fill_n(line + i * line_pitch, columns, 0.f);
          else
            conv_gemm::gather_run(line + i * line_pitch, plane + h * s.w.size, left, 1, s.w.size, columns);
        }
        for (int64_t e = 0; e < columns; e += W) {
          V d[t];
          for (int i = 0; i < t; ++i) d[i] = V::load(line + i * line_pitch + e);
          Points<m>::input(d);
          for (int i = 0; i < t; ++i) d[i].store(line + i * line_pitch + e);
        }
        for (int i = 0; i < t; ++i)
          for (int64_t e = 0; e < r.count; e += W) {
            float* cell = cells + i * t * cell_pitch + r.lane + e;
            V v[m];
            deinterleave(line + i * line_pitch + e * m, v);
            for (int j = 0; j < m; ++j) v[j].store(cell + j * cell_pitch);
            deinterleave(line + i * line_pitch + e * m + m, v);
            for (int j = m; j < t; ++j) v[j - m].store(cell + j * cell_pitch);
          }
      }
      for (int i = 0; i < t; ++i)
        for (int64_t l = 0; l < L; l += W) {
          V d[t];
          for (int j = 0; j < t; ++j) d[j] = V::load(cells + (i * t + j) * cell_pitch + l);
          Points<m>::input(d);
          for (int j = 0; j < t; ++j) d[j].store(to + (i * t + j) * step + c * L + l);
        }
    }
  }
  void input_lanes_over_channels(int64_t g, int64_t begin, int64_t count, float* to, int64_t step) const {
    const int64_t rows = T::round(count), pitch = p.G * C;
    for (int64_t r = 0; r < count; ++r) {
      const int64_t tile = begin + r, n = tile / grid.each();
      const int64_t h = grid.low_h + tile % grid.each() / grid.columns * m, v = grid.low_w + tile % grid.columns * m;
      const float* image = x + n * s.in_plane() * pitch + g * C;
      const float* at[t][t];
      for (int i = 0; i < t; ++i)
        for (int j = 0; j < t; ++j) {
          const bool inside = h + i >= 0 && h + i < s.h.size && v + j >= 0 && v + j < s.w.size;
          at[i][j] = inside ? image + ((h + i) * s.w.size + v + j) * pitch : nullptr;
        }
      each_vector<float>(C, [&](int64_t c, auto lanes) {
        transform_input([&](int i, int j) { return at[i][j] ? V::load(at[i][j] + c, lanes) : V(0.f); },
                        [&](int i, int j, const V& value) {
                          value.store(to + (i * t + j) * step + c / chunk * rows * chunk + r * chunk + c % chunk);
                        });
      });
    }
  }

  // y of one panel of tiles and one of output channels from their sums, [point] `step` apart, [rows][L].
  static constexpr int64_t output_room = m * m * cell_pitch + line_pitch;
  void output_lanes_over_tiles(int64_t k0, int64_t channels, int64_t begin, int64_t count, const float* sums,
                               int64_t step, std::vector<Run>& runs, float* room) const {
    float *cells = room, *line = room + m * m * cell_pitch;  // cells: [m][m][cell_pitch]
    runs_of(grid, begin, begin + count, runs);
    for (int64_t k = 0; k < channels; ++k) {
      const V add(epilogue.bias ? epilogue.bias[k0 + k] : 0.f);
      for (int64_t l = 0; l < L; l += W)
        transform_output([&](int i, int j) { return V::load(sums + (i * t + j) * step + k * L + l); },
                         [&](int i, int j, const V& v) { (v + add).store(cells + (i * m + j) * cell_pitch + l); });
      for (const Run& r : runs) {
        float* plane = y + (r.n * p.G * p.M + k0 + k) * s.out_plane();
        const int64_t columns = std::min<int64_t>(r.count * m, s.w.count - r.column * m);
        for (int64_t i = 0; i < std::min<int64_t>(m, s.h.count - r.row * m); ++i) {
          for (int64_t e = 0; e < r.count; e += W) {
            V v[m];
            for (int j = 0; j < m; ++j) v[j] = V::load(cells + (i * m + j) * cell_pitch + r.lane + e);
            interleave(v, line + e * m);
          }
          float* to = plane + (r.row * m + i) * s.w.count + r.column * m;
          if (!epilogue.plain()) epilogue.finish(line, to - y, columns);
          std::copy_n(line, columns, to);
        }
      }
    }
  }
  void output_lanes_over_channels(int64_t k0, int64_t channels, int64_t begin, int64_t count, const float* sums,
                                  int64_t step) const {
    for (int64_t r = 0; r < count; ++r) {
      const int64_t tile = begin + r, n = tile / grid.each();
      const int64_t h = tile % grid.each() / grid.columns * m, v = tile % grid.columns * m;
      float* to = y + ((n * s.h.count + h) * s.w.count + v) * p.G * p.M + k0;
      each_vector<float>(channels, [&](int64_t k, auto lanes) {
        const V add = epilogue.bias ? V::load(epilogue.bias + k0 + k, lanes) : V(0.f);
        transform_output([&](int i, int j) { return V::load(sums + (i * t + j) * step + r * L + k); },
                         [&](int i, int j, const V& value) {
                           if (h + i < s.h.count && v + j < s.w.count)
                             (value + add).store(to + (i * s.w.count + j) * p.G * p.M + k, lanes);
                         });
      });
      if (epilogue.plain()) continue;
      for (int64_t i = 0; i < std::min<int64_t>(m, s.h.count - h); ++i)
        for (int64_t j = 0; j < std::min<int64_t>(m, s.w.count - v); ++j) {
          float* pixel = to + (i * s.w.count + j) * p.G * p.M;
          epilogue.finish(pixel, pixel - y, channels);
        }
    }
  }

  void run() const {
    const int64_t tiles = p.N * grid.each(), unit = last ? R : L;
    // Panels of output channels whose U fits, and tiles whose V and sums fit.
    const int64_t side = last ? L : R, all = weight_panels(p.M);
    const auto panels_in = [&](int64_t bytes) {
      return std::clamp<int64_t>(bytes / 4 / points / std::max<int64_t>(C, 1) / side, 1, all);
    };
    const auto tiles_beside = [&](int64_t portion) {
      return conv_choice::winograd_block_bytes / 4 / points / (C + portion * side) / unit * unit;
    };
    // Where all tiles fit at once their V serves one portion of the channels after the other, whose U need not leave the
    // second cache.
    const int64_t near = panels_in(conv_choice::winograd_near_bytes * thread_count());
    const bool once = tiles <= tiles_beside(near);
    const int64_t portion = once ? near : panels_in(conv_choice::winograd_weight_bytes);
    const int64_t block = std::min(std::max(tiles_beside(portion), unit), ceil_div(tiles, unit) * unit);
    const int64_t panels = tile_panels(block);
    const int64_t v_step = step_of(panels * tile_panel()), sum_step = step_of(portion * panels * R * L);
    const auto portion_begin = [&](int64_t i) { return last ? std::min(i * L, p.M) : T::begin(p.M, std::min(i, all)); };
    Buffer<float> u(points * step_of(portion * weight_panel())), v(points * v_step), sums(points * sum_step);
    for (int64_t g = 0; g < p.G; ++g)
      for (int64_t panel = 0; panel < all; panel += portion) {
        const int64_t m0 = portion_begin(panel), M = portion_begin(panel + portion) - m0;
        const int64_t used_channels = weight_panels(M);
        weights(g, m0, M, u.get());
        for (int64_t first = 0; first < tiles; first += block) {
          const int64_t count = std::min(block, tiles - first), used = tile_panels(count);
          const auto tile_begin = [&](int64_t i) { return last ? T::begin(count, i) : std::min(i * L, count); };
          const auto channel_begin = [&](int64_t i) { return last ? std::min(i * L, M) : T::begin(M, i); };
          const int64_t cut = last ? 1 : ceil_div(C, 16);  // lanes over tiles: 16 channels are a task
          if (panel == 0 || !once)
            parallel_for(used * cut, task_grain(unit * (C / cut) * points), [&](int64_t begin, int64_t end) {
              std::vector<Run> runs;
              Buffer<float> room(last ? 0 : input_room);
              for (int64_t task = begin; task < end; ++task) {
                const int64_t i = task / cut, from = tile_begin(i), n = tile_begin(i + 1) - from, c = task % cut * 16;
                float* to = v.get() + i * tile_panel();
                if constexpr (last)
                  input_lanes_over_channels(g, first + from, n, to, v_step);
                else
                  input_lanes_over_tiles(g, first + from, n, to, v_step, c, std::min(c + 16, C), runs, room.get());
              }
            });
          // a panel of U stays near while the tiles pass
          parallel_for(points * used_channels, task_grain(C * count * side), [&](int64_t begin, int64_t end) {
            for (int64_t task = begin; task < end; ++task) {
              const int64_t point = task / used_channels, k = task % used_channels;
              const float* weight = u.get() + point * step_of(used_channels * weight_panel()) + k * weight_panel();
              const int64_t channels = channel_begin(k + 1) - channel_begin(k);
              for (int64_t i = 0; i < used; ++i) {
                const float* tile = v.get() + point * v_step + i * tile_panel();
                const int64_t n = tile_begin(i + 1) - tile_begin(i);
                float* to = sums.get() + point * sum_step + (k * panels + i) * R * L;
                if constexpr (last)
                  tile_product(T::round(n), channels, C, tile, weight, to);
                else
                  tile_product(T::round(channels), n, C, weight, tile, to);
              }
            }
          });
          parallel_for(used_channels * used, task_grain(R * L * points), [&](int64_t begin, int64_t end) {
            std::vector<Run> runs;
            Buffer<float> room(last ? 0 : output_room);
            for (int64_t task = begin; task < end; ++task) {
              const int64_t k = task / used, i = task % used, k0 = g * p.M + m0 + channel_begin(k);
              const int64_t channels = channel_begin(k + 1) - channel_begin(k);
              const int64_t from = tile_begin(i), n = tile_begin(i + 1) - from;
              const float* at = sums.get() + (k * panels + i) * R * L;
              if constexpr (last)
                output_lanes_over_channels(k0, channels, first + from, n, at, sum_step);
              else
                output_lanes_over_tiles(k0, channels, first + from, n, at, sum_step, runs, room.get());
            }
          });
        }
      }
  }
};

inline void product(const Problem& p, int m, bool channels_last, const float* x, const float* w,
                    const Epilogue<float>& epilogue, float* y) {
  if (channels_last)
    m == 2 ? Winograd<2, true>(p, x, w, epilogue, y).run() : Winograd<4, true>(p, x, w, epilogue, y).run();
  else
    m == 2 ? Winograd<2, false>(p, x, w, epilogue, y).run() : Winograd<4, false>(p, x, w, epilogue, y).run();
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY::conv_winograd
