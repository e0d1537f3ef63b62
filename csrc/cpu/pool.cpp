// pool · CPU
//   max  y[o] = max over the window of x;  dx[i] = sum of dy[o] over the windows whose maximum lies at i
//   avg  y[o] = sum over the window of x / divisor;  dx[i] = sum of dy[o] / divisor over the windows that hold i
// layout   x: [P, D, H, W, C], y: [P, OD, OH, OW, C]; channels first has C = 1 and P = N * channels
// mapping  a thread takes output rows (backward: planes)
//          C = 1: lanes over ow; the input rows of a window are split by column modulo stride, so that every tap is one
//          contiguous load; C > 1: lanes over channels; adaptive or tall windows: one window at a time
// memory   x read once while its rows stay in cache, y written once; positions of maxima as one byte each
// numerics acc_t; the first maximum wins, NaN wins always, as in torch; backward adds in the order of the outputs
#include "common/pool.h"

#include "common/pool_binding.h"
#include "common/registry.h"
#include "cpu/math.h"
#include "cpu/parallel.h"

namespace pyops::PYOPS_CPU_CAPABILITY {

// ---- kernels

using pool::Keep;
using pool::Range;
using pool::Shape;

template <class acc_t>
struct Best {
  Vec<acc_t> value;
  Mask<acc_t> tap;
  PYOPS_INLINE void meet(const Vec<acc_t>& v, int64_t number) {
    const Mask<acc_t> wins = (v.v > value.v) | (v.v != v.v);
    value.v = wins ? v.v : value.v;
    tap = wins ? Mask<acc_t>{} + std::conditional_t<sizeof(acc_t) == 4, int32_t, int64_t>(number) : tap;
  }
};

// The taps of a vector of outputs, as one byte or as positions.
template <class acc_t, class index_t, class Position>
PYOPS_INLINE void store_taps(const Mask<acc_t>& tap, index_t* to, int64_t count, const Position& position) {
  for (int64_t j = 0; j < count; ++j) to[j] = index_t(position(j, int64_t(tap[j])));
}

// Row x[0..in) into s.w.stride rows of `phase`: phase[c % stride][c / stride] = x[c - padding], `outside` beyond.
template <class acc_t, class scalar_t>
void split_row(const scalar_t* x, acc_t* phase, int64_t length, const pool::Dimension& w, acc_t outside) {
  using V = Vec<acc_t>;
  constexpr int64_t W = V::width;
  const int64_t used = w.in < w.stride * length - w.padding ? w.in : w.stride * length - w.padding;
  for (int64_t r = 0; r < w.stride; ++r) {
    acc_t* row = phase + r * length;
    const int64_t before = (w.padding - r + w.stride - 1) / w.stride;
    for (int64_t j = 0; j < before; ++j) row[j] = outside;
    const int64_t after = used + w.padding - r <= 0 ? 0 : (used + w.padding - r + w.stride - 1) / w.stride;
    for (int64_t j = after > before ? after : before; j < length; ++j) row[j] = outside;
  }
  if (w.stride == 1) {
    each_vector<acc_t>(used, [&](int64_t i, auto lanes) { V::load(x + i, lanes).store(phase + w.padding + i, lanes); });
    return;
  }
  int64_t i = 0;
  if (w.stride == 2) {
    acc_t* even = phase + (w.padding % 2) * length + w.padding / 2;
    acc_t* odd = phase + ((w.padding + 1) % 2) * length + (w.padding + 1) / 2;
    for (; i + 2 * W <= used; i += 2 * W) {
      const V a = V::load(x + i), b = V::load(x + i + W);
      [&]<size_t... k>(std::index_sequence<k...>) {
        V(__builtin_shufflevector(a.v, b.v, int(2 * k)...)).store(even + i / 2);
        V(__builtin_shufflevector(a.v, b.v, int(2 * k + 1)...)).store(odd + i / 2);
      }(std::make_index_sequence<size_t(W)>());
    }
  }
  for (; i < used; ++i) {
    const int64_t c = i + w.padding;
    phase[c % w.stride * length + c / w.stride] = acc_t(x[i]);
  }
}

// Sizes of the split rows of one window.
struct Split {
  int64_t length, rows;
  int64_t size(const Shape& s) const { return rows * s.w.stride * length; }
};
template <class acc_t>
Split split_of(const Shape& s) {
  const int64_t span = (s.w.kernel - 1) * s.w.dilation / s.w.stride + 1;
  return {ceil_div(s.w.out, Vec<acc_t>::width) * Vec<acc_t>::width + span, s.d.kernel * s.h.kernel};
}

// One output row, channels first: take(rows, ow, lanes) sees the split rows of the window.
template <class acc_t, class scalar_t, class Take>
void split_window_rows(const scalar_t* plane, const Shape& s, const Range& rd, const Range& rh, acc_t outside,
                       acc_t* buffer, const Split& split, const Take& take) {
  int64_t row = 0;
  for (int64_t z = rd.start; z < rd.stop; z += rd.step)
    for (int64_t y = rh.start; y < rh.stop; y += rh.step, ++row)
      split_row(plane + (z * s.h.in + y) * s.w.in, buffer + row * s.w.stride * split.length, split.length, s.w,
                outside);
  constexpr int64_t W = Vec<acc_t>::width;
  int64_t ow = 0;
  for (; ow + W <= s.w.out; ow += W) take(ow, AllLanes{});
  if (ow < s.w.out) take(ow, FirstLanes{s.w.out - ow});
}

// f(row of the buffer, kd, kh) for the window's rows.
template <class F>
PYOPS_INLINE void each_row_of(const Range& rd, const Range& rh, F&& f) {
  int64_t row = 0, kd = rd.first;
  for (int64_t z = rd.start; z < rd.stop; z += rd.step, ++kd) {
    int64_t kh = rh.first;
    for (int64_t y = rh.start; y < rh.stop; y += rh.step, ++kh, ++row) f(row, kd, kh);
  }
}

inline int64_t lanes_of(AllLanes, int64_t width) { return width; }
inline int64_t lanes_of(FirstLanes lanes, int64_t) { return lanes.count; }

template <bool keep, class scalar_t, class index_t, class acc_t>
void max_row_split(const scalar_t* plane, const Shape& s, int64_t od, int64_t oh, scalar_t* y, index_t* index,
                   acc_t* buffer, const Split& split) {
  using V = Vec<acc_t>;
  const Range rd = s.d.window(od), rh = s.h.window(oh);
  split_window_rows(plane, s, rd, rh, -std::numeric_limits<acc_t>::infinity(), buffer, split,
                    [&](int64_t ow, auto lanes) {
                      Best<acc_t> best{V(-std::numeric_limits<acc_t>::infinity()), {}};
                      if constexpr (keep)
                        for (int64_t j = 0; j < lanes_of(lanes, V::width); ++j)
                          best.tap[j] = int32_t(s.tap(rd.first, rh.first, s.w.window(ow + j).first));
                      each_row_of(rd, rh, [&](int64_t row, int64_t kd, int64_t kh) {
                        const acc_t* rows = buffer + row * s.w.stride * split.length + ow;
                        for (int64_t kw = 0, c = 0; kw < s.w.kernel; ++kw, c += s.w.dilation) {
                          const V v = V::load(rows + c % s.w.stride * split.length + c / s.w.stride);
                          if constexpr (keep)
                            best.meet(v, s.tap(kd, kh, kw));
                          else
                            best.value = max(v, best.value);
                        }
                      });
                      best.value.store(y + ow, lanes);
                      if constexpr (keep)
                        store_taps<acc_t>(best.tap, index + ow, lanes_of(lanes, V::width), [&](int64_t j, int64_t tap) {
                          return sizeof(index_t) == 1 ? tap : s.position(od, oh, ow + j, tap);
                        });
                    });
}

template <class scalar_t, class acc_t>
void avg_row_split(const scalar_t* plane, const Shape& s, int64_t od, int64_t oh, scalar_t* y, const acc_t* scale,
                   acc_t* buffer, const Split& split) {
  using V = Vec<acc_t>;
  const Range rd = s.d.window(od), rh = s.h.window(oh);
  split_window_rows(plane, s, rd, rh, acc_t(0), buffer, split, [&](int64_t ow, auto lanes) {
    V total;
    each_row_of(rd, rh, [&](int64_t row, int64_t, int64_t) {
      const acc_t* rows = buffer + row * s.w.stride * split.length + ow;
      for (int64_t kw = 0, c = 0; kw < s.w.kernel; ++kw, c += s.w.dilation)
        total += V::load(rows + c % s.w.stride * split.length + c / s.w.stride);
    });
    (total * V::load(scale + ow, lanes)).store(y + ow, lanes);
  });
}

// f(position in the plane, tap) over a window.
template <class F>
PYOPS_INLINE void each_tap(const Shape& s, const Range& rd, const Range& rh, const Range& rw, F&& f) {
  int64_t kd = rd.first;
  for (int64_t z = rd.start; z < rd.stop; z += rd.step, ++kd) {
    int64_t kh = rh.first;
    for (int64_t y = rh.start; y < rh.stop; y += rh.step, ++kh) {
      int64_t kw = rw.first;
      for (int64_t x = rw.start; x < rw.stop; x += rw.step, ++kw) f((z * s.h.in + y) * s.w.in + x, s.tap(kd, kh, kw));
    }
  }
}

inline int64_t taps_of(const Range& r) { return r.stop > r.start ? (r.stop - r.start + r.step - 1) / r.step : 0; }

// One window of one plane (C = 1), or of all channels.
template <bool keep, class scalar_t, class index_t, class acc_t = accumulate_t<scalar_t>>
void max_window(const scalar_t* plane, const Shape& s, int64_t od, int64_t oh, int64_t ow, scalar_t* y,
                index_t* index) {
  using V = Vec<acc_t>;
  const Range rd = s.d.window(od), rh = s.h.window(oh), rw = s.w.window(ow);
  const auto kept = [&](int64_t position, int64_t tap) { return index_t(sizeof(index_t) == 1 ? tap : position); };
  if (s.C == 1) {
    acc_t best = -std::numeric_limits<acc_t>::infinity();
    index_t at = kept((rd.start * s.h.in + rh.start) * s.w.in + rw.start, s.tap(rd.first, rh.first, rw.first));
    each_tap(s, rd, rh, rw, [&](int64_t position, int64_t tap) {
      const acc_t v = acc_t(plane[position]);
      if (v > best || v != v) best = v, at = kept(position, tap);
    });
    *y = scalar_t(best);
    if constexpr (keep) *index = at;
    return;
  }
  each_vector<acc_t>(s.C, [&](int64_t c, auto lanes) {
    // For positions the lanes count taps in order: a tap's number fits a float lane's integer, a position may not.
    Best<acc_t> best{V(-std::numeric_limits<acc_t>::infinity()), {}};
    int64_t order = 0;
    each_tap(s, rd, rh, rw, [&](int64_t position, int64_t) {
      const V v = V::load(plane + position * s.C + c, lanes);
      if constexpr (keep)
        best.meet(v, order++);
      else
        best.value = max(v, best.value);
    });
    best.value.store(y + c, lanes);
    if constexpr (keep) {
      const int64_t nh = taps_of(rh), nw = taps_of(rw);
      store_taps<acc_t>(best.tap, index + c, lanes_of(lanes, V::width), [&](int64_t, int64_t k) {
        const int64_t iw = k % nw, ih = k / nw % nh, id = k / (nw * nh);
        const int64_t position =
            ((rd.start + id * rd.step) * s.h.in + rh.start + ih * rh.step) * s.w.in + rw.start + iw * rw.step;
        return kept(position, s.tap(rd.first + id, rh.first + ih, rw.first + iw));
      });
    }
  });
}

template <class scalar_t, class acc_t = accumulate_t<scalar_t>>
void avg_window(const scalar_t* plane, const Shape& s, int64_t od, int64_t oh, int64_t ow, scalar_t* y, acc_t scale) {
  using V = Vec<acc_t>;
  const Range rd = s.d.window(od), rh = s.h.window(oh), rw = s.w.window(ow);
  if (s.C == 1 && rw.step == 1 && rw.stop - rw.start >= V::width) {
    // Whole planes and other wide windows: runs of columns; a window as wide as the input is one run.
    const bool whole = rw.stop - rw.start == s.w.in && rh.step == 1;
    const int64_t rows = taps_of(rh), width = (rw.stop - rw.start) * (whole ? rows : 1);
    Totals<acc_t, 1> total;
    for (int64_t z = rd.start; z < rd.stop; z += rd.step)
      for (int64_t k = 0; k < (whole ? int64_t(rows > 0) : rows); ++k) {
        const scalar_t* run = plane + (z * s.h.in + rh.start + k * rh.step) * s.w.in + rw.start;
        accumulate(total, width, [&](int64_t i, auto lanes, auto& t) { t[0] += V::load(run + i, lanes); });
      }
    *y = scalar_t(sum(total[0]) * scale);
    return;
  }
  if (s.C == 1) {
    acc_t total = 0;
    each_tap(s, rd, rh, rw, [&](int64_t position, int64_t) { total += acc_t(plane[position]); });
    *y = scalar_t(total * scale);
    return;
  }
  each_vector<acc_t>(s.C, [&](int64_t c, auto lanes) {
    V total;
    each_tap(s, rd, rh, rw, [&](int64_t position, int64_t) { total += V::load(plane + position * s.C + c, lanes); });
    (total * V(scale)).store(y + c, lanes);
  });
}

// f(p, od, oh, scratch) over all output rows, on all threads; `scratch` acc_t numbers for each thread.
template <class acc_t, class F>
void each_output_row(const Shape& s, int64_t scratch, const F& f) {
  const int64_t work = s.w.out * s.C * s.d.kernel * s.h.kernel * s.w.kernel;
  parallel_for(s.P * s.d.out * s.h.out, ceil_div(32768, work > 0 ? work : 1), [&](int64_t begin, int64_t end) {
    Buffer<acc_t> buffer(scratch);
    for (int64_t k = begin; k < end; ++k) f(k / (s.d.out * s.h.out), k / s.h.out % s.d.out, k % s.h.out, buffer.get());
  });
}

// Split rows pay where several outputs share them and they stay in the first-level cache.
template <class acc_t>
bool by_split(const Shape& s) {
  return s.C == 1 && !s.d.adaptive && s.w.out >= 4 && split_of<acc_t>(s).size(s) <= 8192;
}

template <bool keep, class scalar_t, class index_t>
void max_forward(const scalar_t* x, scalar_t* y, index_t* index, const Shape& s) {
  using acc_t = accumulate_t<scalar_t>;
  const bool split_rows = by_split<acc_t>(s);
  const Split split = split_of<acc_t>(s);
  each_output_row<acc_t>(s, split_rows ? split.size(s) : 0, [&](int64_t p, int64_t od, int64_t oh, acc_t* buffer) {
    const scalar_t* plane = x + p * s.inputs() * s.C;
    const int64_t out = ((p * s.d.out + od) * s.h.out + oh) * s.w.out * s.C;
    if (split_rows) return max_row_split<keep>(plane, s, od, oh, y + out, index + out, buffer, split);
    for (int64_t ow = 0; ow < s.w.out; ++ow)
      max_window<keep>(plane, s, od, oh, ow, y + out + ow * s.C, index + out + ow * s.C);
  });
}

template <class acc_t>
acc_t scale_of(const Shape& s, int64_t od, int64_t oh, int64_t ow, bool include_padding, int64_t override_by) {
  const int64_t valid = taps_of(s.d.window(od)) * taps_of(s.h.window(oh)) * taps_of(s.w.window(ow));
  return acc_t(1) / acc_t(s.divisor(od, oh, ow, valid, include_padding, override_by));
}

template <class scalar_t>
void avg_forward(const scalar_t* x, scalar_t* y, const Shape& s, bool include_padding, int64_t override_by) {
  using acc_t = accumulate_t<scalar_t>;
  const bool split_rows = by_split<acc_t>(s);
  const Split split = split_of<acc_t>(s);
  each_output_row<acc_t>(s, s.w.out + (split_rows ? split.size(s) : 0),
                         [&](int64_t p, int64_t od, int64_t oh, acc_t* buffer) {
                           const scalar_t* plane = x + p * s.inputs() * s.C;
                           scalar_t* out = y + ((p * s.d.out + od) * s.h.out + oh) * s.w.out * s.C;
                           for (int64_t ow = 0; ow < s.w.out; ++ow)
                             buffer[ow] = scale_of<acc_t>(s, od, oh, ow, include_padding, override_by);
                           if (split_rows) return avg_row_split(plane, s, od, oh, out, buffer, buffer + s.w.out, split);
                           for (int64_t ow = 0; ow < s.w.out; ++ow)
                             avg_window(plane, s, od, oh, ow, out + ow * s.C, buffer[ow]);
                         });
}

// Adds into planes of acc_t: in dx itself, or in a buffer that is narrowed afterwards.
template <class scalar_t, class F>
void each_gradient_plane(scalar_t* dx, const Shape& s, const F& f) {
  using acc_t = accumulate_t<scalar_t>;
  const int64_t size = s.inputs() * s.C;
  parallel_for(s.P, ceil_div(32768, size), [&](int64_t begin, int64_t end) {
    Buffer<acc_t> buffer(std::is_same_v<scalar_t, acc_t> ? 0 : size);
    for (int64_t p = begin; p < end; ++p) {
      acc_t* plane = buffer.get();
      if constexpr (std::is_same_v<scalar_t, acc_t>) plane = dx + p * size;
      std::memset(plane, 0, size_t(size) * sizeof(acc_t));
      f(p, plane);
      if constexpr (!std::is_same_v<scalar_t, acc_t>)
        each_vector<acc_t>(
            size, [&](int64_t i, auto lanes) { Vec<acc_t>::load(plane + i, lanes).store(dx + p * size + i, lanes); });
    }
  });
}

template <class scalar_t, class index_t>
void max_backward(const scalar_t* dy, const index_t* index, scalar_t* dx, const Shape& s) {
  using acc_t = accumulate_t<scalar_t>;
  each_gradient_plane(dx, s, [&](int64_t p, acc_t* plane) {
    int64_t k = p * s.outputs() * s.C;
    for (int64_t od = 0; od < s.d.out; ++od)
      for (int64_t oh = 0; oh < s.h.out; ++oh)
        for (int64_t ow = 0; ow < s.w.out; ++ow)
          for (int64_t c = 0; c < s.C; ++c, ++k) {
            const int64_t at = sizeof(index_t) == 1 ? s.position(od, oh, ow, int64_t(index[k])) : int64_t(index[k]);
            if (at >= 0 && at < s.inputs()) plane[at * s.C + c] += acc_t(dy[k]);
          }
  });
}

template <class scalar_t>
void avg_backward(const scalar_t* dy, scalar_t* dx, const Shape& s, bool include_padding, int64_t override_by) {
  using acc_t = accumulate_t<scalar_t>;
  using V = Vec<acc_t>;
  each_gradient_plane(dx, s, [&](int64_t p, acc_t* plane) {
    const scalar_t* from = dy + p * s.outputs() * s.C;
    for (int64_t od = 0; od < s.d.out; ++od)
      for (int64_t oh = 0; oh < s.h.out; ++oh)
        for (int64_t ow = 0; ow < s.w.out; ++ow, from += s.C) {
          const acc_t scale = scale_of<acc_t>(s, od, oh, ow, include_padding, override_by);
          const Range rd = s.d.window(od), rh = s.h.window(oh), rw = s.w.window(ow);
          if (s.C == 1) {
            const acc_t share = acc_t(*from) * scale;
            each_tap(s, rd, rh, rw, [&](int64_t position, int64_t) { plane[position] += share; });
            continue;
          }
          each_tap(s, rd, rh, rw, [&](int64_t position, int64_t) {
            acc_t* to = plane + position * s.C;
            each_vector<acc_t>(s.C, [&](int64_t c, auto lanes) {
              fma(V::load(from + c, lanes), V(scale), V::load(to + c, lanes)).store(to + c, lanes);
            });
          });
        }
  });
}

// ---- binding

static std::vector<int64_t> size_of(const OpScope& op, const Tensor& x) {
  op.check(x.dim() == 5, "x must be [P, D, H, W, C]");
  return {x.size(0), x.size(1), x.size(2), x.size(3), x.size(4)};
}

std::tuple<Tensor, Tensor> max_pool_fwd(const Tensor& x, std::vector<int64_t> window, int64_t keep) {
  OpScope op("max_pool_fwd", x);
  const Shape s = pool::shape_of(op, size_of(op, x), window);
  const bool taps = keep == int64_t(Keep::taps);
  op.check(!taps || (!s.d.adaptive && s.d.kernel * s.h.kernel * s.w.kernel <= 256), "taps must fit a byte");
  const std::initializer_list<int64_t> in = {s.P, s.d.in, s.h.in, s.w.in, s.C},
                                       out = {s.P, s.d.out, s.h.out, s.w.out, s.C};
  return dispatch_floating(op, x.scalar_type(), [&]<class scalar_t>() {
    Tensor y = op.empty<scalar_t>(out);
    Tensor index = keep == 0 ? op.empty<uint8_t>({0}) : taps ? op.empty<uint8_t>(out) : op.empty<int64_t>(out);
    auto* px = op.in<scalar_t>(x, "x", in);
    auto* py = op.out<scalar_t>(y, "y", out);
    if (keep == 0)
      max_forward<false>(px, py, static_cast<uint8_t*>(nullptr), s);
    else if (taps)
      max_forward<true>(px, py, op.out<uint8_t>(index, "index", out), s);
    else
      max_forward<true>(px, py, op.out<int64_t>(index, "index", out), s);
    return std::tuple(y, index);
  });
}

Tensor max_pool_bwd(const Tensor& dy, const Tensor& index, std::vector<int64_t> size, std::vector<int64_t> window) {
  OpScope op("max_pool_bwd", dy);
  const Shape s = pool::shape_of(op, size, window);
  const std::initializer_list<int64_t> in = {s.P, s.d.in, s.h.in, s.w.in, s.C},
                                       out = {s.P, s.d.out, s.h.out, s.w.out, s.C};
  return dispatch_floating(op, dy.scalar_type(), [&]<class scalar_t>() {
    Tensor dx = op.empty<scalar_t>(in);
    auto* pdy = op.in<scalar_t>(dy, "dy", out);
    auto* pdx = op.out<scalar_t>(dx, "dx", in);
    if (index.scalar_type() == ScalarType::Byte)
      max_backward(pdy, op.in<uint8_t>(index, "index", out), pdx, s);
    else
      max_backward(pdy, op.in<int64_t>(index, "index", out), pdx, s);
    return dx;
  });
}

Tensor avg_pool_fwd(const Tensor& x, std::vector<int64_t> window, bool include_padding, int64_t divisor) {
  OpScope op("avg_pool_fwd", x);
  const Shape s = pool::shape_of(op, size_of(op, x), window);
  const std::initializer_list<int64_t> in = {s.P, s.d.in, s.h.in, s.w.in, s.C},
                                       out = {s.P, s.d.out, s.h.out, s.w.out, s.C};
  return dispatch_floating(op, x.scalar_type(), [&]<class scalar_t>() {
    Tensor y = op.empty<scalar_t>(out);
    avg_forward(op.in<scalar_t>(x, "x", in), op.out<scalar_t>(y, "y", out), s, include_padding, divisor);
    return y;
  });
}

Tensor avg_pool_bwd(const Tensor& dy, std::vector<int64_t> size, std::vector<int64_t> window, bool include_padding,
                    int64_t divisor) {
  OpScope op("avg_pool_bwd", dy);
  const Shape s = pool::shape_of(op, size, window);
  const std::initializer_list<int64_t> in = {s.P, s.d.in, s.h.in, s.w.in, s.C},
                                       out = {s.P, s.d.out, s.h.out, s.w.out, s.C};
  return dispatch_floating(op, dy.scalar_type(), [&]<class scalar_t>() {
    Tensor dx = op.empty<scalar_t>(in);
    avg_backward(op.in<scalar_t>(dy, "dy", out), op.out<scalar_t>(dx, "dx", in), s, include_padding, divisor);
    return dx;
  });
}

PYOPS_LIBRARY(m) {
  PYOPS_IMPL(m, max_pool_fwd);
  PYOPS_IMPL(m, max_pool_bwd);
  PYOPS_IMPL(m, avg_pool_fwd);
  PYOPS_IMPL(m, avg_pool_bwd);
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY
