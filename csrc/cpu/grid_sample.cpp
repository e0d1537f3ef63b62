// grid_sample · CPU
//   y[n,c,p] = sum over taps of w(tap) x[n,c,i(tap)];  dx scatters w dy;  dgrid = sum over taps of dw/dg sum_c dy x
// layout   x: [N, C, D, H, W] or [N, D, H, W, C] · grid: [N, P, dims] · y: [N, C, P] or [N, P, C]
// mapping  a thread takes blocks of points and all their channels, for dx channels and all their points, so that nobody
//          else adds to what it adds to; lanes over points, or over the channels of channels_last
// memory   taps of a block of points stay in the first-level cache and serve every channel; the two linear taps along
//          W lie side by side and are read as one
// numerics acc_t; dx in the order of the points, whatever the number of threads
#include "common/grid_sample_binding.h"
#include "common/registry.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace pyops::PYOPS_CPU_CAPABILITY {

using namespace grid_sample;

// ---- kernels

inline constexpr int64_t block_points = 64;

// What the coordinates of a block of points read along one axis; branch-free, so that the compiler makes vectors of it.
template <class A, int T>
struct AxisTaps {
  int32_t index[T][block_points], base[block_points];
  A weight[T][block_points], slope[T][block_points];

  template <int64_t padding>
  void read(const A* g, int64_t size, bool align_corners) {
    for (int64_t p = 0; p < block_points; ++p) {
      const Taps<A, T> t = taps_of<A, T>(g[p], size, {padding, align_corners});
#pragma GCC unroll 4
      for (int k = 0; k < T; ++k) index[k][p] = t.index[k], weight[k][p] = t.weight[k], slope[k][p] = t.slope[k];
    }
  }

  // Two taps as the neighbours base and base + 1 of an axis of at least two elements: where one of them is outside, the
  // other may have to change its place.
  void pair(int64_t size) {
    const int32_t last = int32_t(size - 2);
    for (int64_t p = 0; p < block_points; ++p) {
      const int32_t first = index[0][p], low = first > 0 ? first : 0;
      base[p] = low < last ? low : last;
      const bool turned = first != base[p];
      const auto turn = [&](auto& a, auto& b) {
        const auto was = a;
        a = turned ? b : a, b = turned ? was : b;
      };
      turn(index[0][p], index[1][p]), turn(weight[0][p], weight[1][p]), turn(slope[0][p], slope[1][p]);
    }
  }
};

// The taps of up to block_points points; beyond them, those of the point 0. A tap outside has index 0 and `inside` 0, else
// all bits. Where `paired`, the taps 2 r and 2 r + 1, whether inside or not, are the elements base + row[r] and the next.
template <class A, int T, bool slopes>
struct Block {
  static constexpr int most = T == 2 ? 8 : T * T;
  static constexpr bool linear = T == 2;
  int taps;
  bool paired;
  int64_t points, row[most / 2 + 1];
  int32_t base[block_points];
  int32_t index[most][block_points], inside[most][block_points];
  A weight[most][block_points], slope[slopes ? 3 : 1][most][block_points];

  template <class U>
  void read(const Shape& s, const U* grid, int64_t count) {
    points = count;
    AxisTaps<A, T> axis[3];  // W, H, D
    const int64_t sizes[3] = {s.W, s.H, s.D};
    for (int64_t d = 0; d < s.dims; ++d) {
      A g[block_points];
      for (int64_t p = 0; p < block_points; ++p) g[p] = p < count ? A(grid[p * s.dims + d]) : A(0);
      if (s.rule.padding == zeros)
        axis[d].template read<zeros>(g, sizes[d], s.rule.align_corners);
      else if (s.rule.padding == border)
        axis[d].template read<border>(g, sizes[d], s.rule.align_corners);
      else
        axis[d].template read<reflection>(g, sizes[d], s.rule.align_corners);
    }
    paired = linear && s.W > 1 && s.H > 1 && (s.dims == 2 || s.D > 1);
    if constexpr (T == 2)
      for (int64_t d = 0; paired && d < s.dims; ++d) axis[d].pair(sizes[d]);
    if (s.dims == 2) {
      std::fill_n(axis[2].index[0], block_points, 0), std::fill_n(axis[2].base, block_points, 0);
      std::fill_n(axis[2].weight[0], block_points, A(1));
      std::fill_n(axis[2].slope[0], block_points, A(0));
    }
    taps = 0;
    for (int k = 0; k < (s.dims == 3 ? T : 1); ++k)
      for (int j = 0; j < T; ++j)
        for (int i = 0; i < T; ++i, ++taps) {
          combine(s, axis, k, j, i);
          row[taps / 2] = (int64_t(k) * s.H + j) * s.W;
        }
    for (int64_t p = 0; paired && p < block_points; ++p)
      base[p] = (axis[2].base[p] * int32_t(s.H) + axis[1].base[p]) * int32_t(s.W) + axis[0].base[p];
  }

  void combine(const Shape& s, const AxisTaps<A, T>* axis, int k, int j, int i) {
    const auto &w = axis[0], &h = axis[1], &d = axis[2];
    const uint32_t H = uint32_t(s.H), W = uint32_t(s.W);
    for (int64_t p = 0; p < block_points; ++p) {
      const int32_t plane = d.index[k][p], row = h.index[j][p], column = w.index[i][p];
      const bool in = (plane | row | column) >= 0;
      index[taps][p] = in ? int32_t((uint32_t(plane) * H + uint32_t(row)) * W + uint32_t(column)) : 0;
      inside[taps][p] = -int32_t(in);
      const A both = d.weight[k][p] * h.weight[j][p];
      weight[taps][p] = both * w.weight[i][p];
      if constexpr (slopes) {
        slope[0][taps][p] = both * w.slope[i][p];
        slope[1][taps][p] = d.weight[k][p] * h.slope[j][p] * w.weight[i][p];
        slope[2][taps][p] = d.slope[k][p] * h.weight[j][p] * w.weight[i][p];
      }
    }
  }
};

// A vector of elements of a plane by their index; 0 where outside.
template <class A, class T>
PYOPS_INLINE Vec<A> gathered(const T* plane, const int32_t* index, const int32_t* inside) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) {
    const auto at = simd::read<__m512i>(index), mask = simd::read<__m512i>(inside);
    const __m512 none = _mm512_setzero_ps();
    return simd::bits_as<simd::Native<float>>(
        _mm512_mask_i32gather_ps(none, _mm512_test_epi32_mask(mask, mask), at, plane, 4));
  }
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<T, float>) {
    const auto at = simd::read<__m256i>(index);
    const auto mask = simd::read<__m256>(inside);
    return simd::bits_as<simd::Native<float>>(_mm256_mask_i32gather_ps(_mm256_setzero_ps(), plane, at, mask, 4));
  }
#endif
  A lane[Vec<A>::width];
  for (int64_t i = 0; i < Vec<A>::width; ++i) {
    const A v = A(plane[index[i]]);
    lane[i] = inside[i] ? v : A(0);
  }
  return Vec<A>::load(lane);
}

template <class A>
struct Neighbours {
  Vec<A> left, right;
};

// Elements of a plane by their index, each with the one behind it.
template <class A, class T>
PYOPS_INLINE Neighbours<A> neighbours(const T* plane, const int32_t* index) {
  using V = Vec<A>;
  constexpr int W = int(V::width);
#if defined(__SSE2__)
  if constexpr (std::is_same_v<T, float>) {
    // Two floats are read as a double. A part of a register of 16 bytes has the pairs of two points in `a`, those of the
    // next two in `b`, so that left and right are parted within it.
    const auto pairs = [&]<int... i>(int first, std::integer_sequence<int, i...>) {
      const simd::Native<double> read = {simd::read<double>(plane + index[first + i / 2 * 4 + i % 2])...};
      return simd::bits_as<simd::Native<float>>(read);
    };
    const auto a = pairs(0, std::make_integer_sequence<int, W / 2>());
    const auto b = pairs(2, std::make_integer_sequence<int, W / 2>());
    return [&]<int... i>(std::integer_sequence<int, i...>) {
      return Neighbours<A>{V(__builtin_shufflevector(a, b, (i / 2 % 2 * W + i / 4 * 4 + i % 2 * 2)...)),
                           V(__builtin_shufflevector(a, b, (i / 2 % 2 * W + i / 4 * 4 + i % 2 * 2 + 1)...))};
    }(std::make_integer_sequence<int, W>());
  }
#endif
  A left[W], right[W];
  for (int i = 0; i < W; ++i) left[i] = A(plane[index[i]]), right[i] = A(plane[index[i] + 1]);
  return {V::load(left), V::load(right)};
}

// v where inside, else 0.
template <class A>
PYOPS_INLINE Vec<A> masked(const Vec<A>& v, const int32_t* inside) {
  if constexpr (sizeof(A) == 4) {
    return simd::bits_as<simd::Native<A>>(simd::bits_as<simd::Native<int32_t>>(v.v) &
                                          simd::read<simd::Native<int32_t>>(inside));
  } else {
    Vec<A> kept;
    for (int i = 0; i < Vec<A>::width; ++i) kept.v[i] = inside[i] ? v.v[i] : A(0);
    return kept;
  }
}

// use(tap, vector of its elements) for the taps of a vector of points from p on.
template <class A, class B, class T, class F>
PYOPS_INLINE void each_tap_of(const B& b, const T* plane, int64_t p, F&& use) {
  if constexpr (B::linear) {
    const auto each_pair = [&](int taps) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int t = 0; t < taps; t += 2) {
        const auto [left, right] = neighbours<A>(plane + b.row[t / 2], b.base + p);
        use(t, masked(left, b.inside[t] + p)), use(t + 1, masked(right, b.inside[t + 1] + p));
      }
    };
    if (b.paired) return b.taps == 4 ? each_pair(4) : each_pair(8);
  }
  for (int t = 0; t < b.taps; ++t) use(t, gathered<A>(plane, b.index[t] + p, b.inside[t] + p));
}

template <class T, class A, int taps>
void sample(const T* x, const T* grid, T* y, const Shape& s) {
  using V = Vec<A>;
  const int64_t blocks = ceil_div(s.P, block_points);
  parallel_for(
      s.N * blocks, ceil_div(16384, block_points * std::max<int64_t>(s.C, 1)), [&](int64_t begin, int64_t end) {
        Block<A, taps, false> b;
        for (int64_t i = begin; i < end; ++i) {
          const int64_t n = i / blocks, first = i % blocks * block_points;
          b.read(s, grid + (n * s.P + first) * s.dims, std::min(block_points, s.P - first));
          const T* from = x + n * s.C * s.S();
          T* to = y + n * s.C * s.P + first * s.step();
          if (s.channels_last) {
            for (int64_t p = 0; p < b.points; ++p)
              each_vector<A>(s.C, [&](int64_t c, auto lanes) {
                V sum;
                for (int t = 0; t < b.taps; ++t) {
                  const V w(b.weight[t][p]);
                  sum =
                      b.inside[t][p] ? fma(w, V::load(from + b.index[t][p] * s.C + c, lanes), sum) : sum + w * V(A(0));
                }
                sum.store(to + p * s.C + c, lanes);
              });
            continue;
          }
          for (int64_t c = 0; c < s.C; ++c) {
            const T* plane = from + c * s.S();
            each_vector<A>(b.points, [&](int64_t p, auto lanes) {
              V sum;
              each_tap_of<A>(b, plane, p, [&](int t, const V& v) { sum = fma(V::load(b.weight[t] + p), v, sum); });
              sum.store(to + c * s.P + p, lanes);
            });
          }
        }
      });
}

template <class T, class A, int taps>
void sample_bwd_grid(const T* dy, const T* x, const T* grid, T* dgrid, const Shape& s) {
  using V = Vec<A>;
  const int64_t blocks = ceil_div(s.P, block_points);
  parallel_for(s.N * blocks, ceil_div(8192, block_points * std::max<int64_t>(s.C, 1)), [&](int64_t begin, int64_t end) {
    Block<A, taps, true> b;
    A dot[Block<A, taps, true>::most][block_points];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / blocks, first = i % blocks * block_points;
      b.read(s, grid + (n * s.P + first) * s.dims, std::min(block_points, s.P - first));
      const T *from = x + n * s.C * s.S(), *g = dy + n * s.C * s.P + first * s.step();
      for (int t = 0; t < b.taps; ++t) std::fill(dot[t], dot[t] + block_points, A(0));
      if (s.channels_last) {
        for (int64_t p = 0; p < b.points; ++p)
          for (int t = 0; t < b.taps; ++t) {
            if (!b.inside[t][p]) continue;
            V total;
            each_vector<A>(s.C, [&](int64_t c, auto lanes) {
              total = fma(V::load(from + b.index[t][p] * s.C + c, lanes), V::load(g + p * s.C + c, lanes), total);
            });
            dot[t][p] = sum(total);
          }
      } else {
        for (int64_t c = 0; c < s.C; ++c) {
          const T *plane = from + c * s.S(), *gc = g + c * s.P;
          each_vector<A>(b.points, [&](int64_t p, auto lanes) {
            const V gradient = V::load(gc + p, lanes);
            each_tap_of<A>(b, plane, p,
                           [&](int t, const V& v) { fma(gradient, v, V::load(dot[t] + p)).store(dot[t] + p); });
          });
        }
      }
      T* to = dgrid + (n * s.P + first) * s.dims;
      for (int64_t p = 0; p < b.points; ++p)
        for (int64_t d = 0; d < s.dims; ++d) {
          A total = 0;
          for (int t = 0; t < b.taps; ++t) total += b.slope[d][t][p] * dot[t][p];
          to[p * s.dims + d] = T(total);
        }
    }
  });
}

// Two neighbours of a plane in one register.
template <class A>
struct PairOf {
  typedef A type __attribute__((vector_size(2 * sizeof(A))));
  typedef std::conditional_t<sizeof(A) == 4, int32_t, int64_t> Word __attribute__((vector_size(2 * sizeof(A))));
};

// The same weights, pair by pair: `kept` has all bits where inside.
template <class A, class B>
struct Pairs {
  typename PairOf<A>::type weight[B::most / 2][block_points];
  typename PairOf<A>::Word kept[B::most / 2][block_points];

  explicit Pairs(const B& b) {
    for (int t = 0; t < b.taps; t += 2)
      for (int64_t p = 0; p < block_points; ++p) {
        weight[t / 2][p] = typename PairOf<A>::type{b.weight[t][p], b.weight[t + 1][p]};
        kept[t / 2][p] = typename PairOf<A>::Word{b.inside[t][p], b.inside[t + 1][p]};
      }
  }
};

// Adds a block of points to `channels` planes; four at a time, as neighbouring points wait for each other's sums.
template <int channels, class A, class T, class B>
PYOPS_INLINE void add_pairs(const B& b, const Pairs<A, B>& pairs, const T* dy, int64_t P, A* planes, int64_t S) {
  for (int64_t p = 0; p < b.points; ++p)
    for (int r = 0; r < b.taps / 2; ++r) {
      A* to = planes + b.base[p] + b.row[r];
#pragma GCC unroll 4
      for (int c = 0; c < channels; ++c) {
        const auto term = pairs.weight[r][p] * A(dy[c * P + p]);
        auto sum = simd::read<typename PairOf<A>::type>(to + c * S);
        sum +=
            simd::bits_as<typename PairOf<A>::type>(simd::bits_as<typename PairOf<A>::Word>(term) & pairs.kept[r][p]);
        std::memcpy(to + c * S, &sum, sizeof sum);
      }
    }
}

// Adds the channels [first, last) of one example into sum: [channels, S] or, channels_last, [S, C] from `first` on.
template <class T, class A, int taps>
void add_points(const T* dy, const T* grid, A* sum, const Shape& s, int64_t first, int64_t last) {
  using V = Vec<A>;
  Block<A, taps, false> b;
  for (int64_t at = 0; at < s.P; at += block_points) {
    b.read(s, grid + at * s.dims, std::min(block_points, s.P - at));
    if (s.channels_last) {
      for (int64_t p = 0; p < b.points; ++p)
        for (int t = 0; t < b.taps; ++t) {
          if (!b.inside[t][p]) continue;
          const V w(b.weight[t][p]);
          const T* from = dy + (at + p) * s.C + first;
          A* to = sum + b.index[t][p] * s.C + first;
          each_vector<A>(last - first, [&](int64_t c, auto lanes) {
            fma(w, V::load(from + c, lanes), V::load(to + c, lanes)).store(to + c, lanes);
          });
        }
      continue;
    }
    int64_t c = first;
    if constexpr (Block<A, taps, false>::linear) {
      if (b.paired) {
        Pairs<A, Block<A, taps, false>> pairs(b);
        const auto add = [&](auto channels) {
          add_pairs<channels()>(b, pairs, dy + c * s.P + at, s.P, sum + (c - first) * s.S(), s.S());
          c += channels();
        };
        while (c + 4 <= last) add(std::integral_constant<int, 4>());
        while (c < last) add(std::integral_constant<int, 1>());
      }
    }
    for (; c < last; ++c) {
      const T* from = dy + c * s.P + at;
      A* plane = sum + (c - first) * s.S();
      for (int64_t p = 0; p < b.points; ++p) {
        const A g = A(from[p]);
        for (int t = 0; t < b.taps; ++t)
          if (b.inside[t][p]) plane[b.index[t][p]] += b.weight[t][p] * g;
      }
    }
  }
}

template <class T, class A, int taps>
void sample_bwd_x(const T* dy, const T* grid, T* dx, const Shape& s) {
  const int64_t S = s.S();
  // whole vectors of channels, so that threads do not share a line of channels_last
  const int64_t unit = s.channels_last ? 16 : 1, units = ceil_div(s.C, unit);
  parallel_for(s.N * units, ceil_div(8192, std::max<int64_t>(s.P * unit, 1)), [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t n = begin / units, stop = std::min(end, (n + 1) * units);
      const int64_t first = (begin - n * units) * unit, last = std::min((stop - n * units) * unit, s.C);
      const T *g = dy + n * s.C * s.P, *points = grid + n * s.P * s.dims;
      T* to = dx + n * s.C * S + (s.channels_last ? 0 : first * S);
      // rows of `width` elements, C apart where channels_last
      const int64_t rows = s.channels_last ? S : 1, width = s.channels_last ? last - first : (last - first) * S;
      const int64_t apart = s.channels_last ? s.C : 0, offset = s.channels_last ? first : 0;
      if constexpr (std::is_same_v<T, A>) {
        for (int64_t r = 0; r < rows; ++r) std::fill_n(to + r * apart + offset, width, A(0));
        add_points<T, A, taps>(g, points, to, s, first, last);
      } else {
        Buffer<A> sum(s.channels_last ? S * s.C : width, A(0));
        add_points<T, A, taps>(g, points, sum.get(), s, first, last);
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t i = 0; i < width; ++i) to[r * apart + offset + i] = T(sum[r * apart + offset + i]);
      }
      begin = stop;
    }
  });
}

// ---- binding

Tensor grid_sample_fwd(const Tensor& x, const Tensor& grid, int64_t mode, int64_t padding, bool align_corners,
                       bool channels_last) {
  OpScope op("grid_sample_fwd", x);
  const Shape s = shape_of(op, x, grid, mode, padding, align_corners, channels_last);
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    Tensor y = empty_y(op, s, scalar_type_of<T>);
    dispatch_mode(mode, [&]<int taps>() {
      sample<T, accumulate_t<T>, taps>(in_x<T>(op, x, s), in_grid<T>(op, grid, s), out_y<T>(op, y, s), s);
    });
    return y;
  });
}

std::tuple<Tensor, Tensor> grid_sample_bwd(const Tensor& dy, const Tensor& x, const Tensor& grid, int64_t mode,
                                           int64_t padding, bool align_corners, bool channels_last, bool needs_x,
                                           bool needs_grid) {
  OpScope op("grid_sample_bwd", x);
  const Shape s = shape_of(op, x, grid, mode, padding, align_corners, channels_last);
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    using A = accumulate_t<T>;
    const T *g = in_dy<T>(op, dy, s), *px = in_x<T>(op, x, s), *points = in_grid<T>(op, grid, s);
    Tensor dx = needs_x ? op.empty<T>(ShapeRef(x)) : op.empty<T>({0});
    Tensor dgrid = needs_grid ? op.empty<T>(ShapeRef(grid)) : op.empty<T>({0});
    dispatch_mode(mode, [&]<int taps>() {
      if (needs_x) sample_bwd_x<T, A, taps>(g, points, out_like<T>(op, dx, "dx", x), s);
      if (needs_grid) sample_bwd_grid<T, A, taps>(g, px, points, out_like<T>(op, dgrid, "dgrid", grid), s);
    });
    return std::make_tuple(dx, dgrid);
  });
}

PYOPS_LIBRARY(m) {
  PYOPS_IMPL(m, grid_sample_fwd);
  PYOPS_IMPL(m, grid_sample_bwd);
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY
