// pool · CPU
//   max  y[o] = max over the window of x;  dx[i] = sum of dy[o] over the windows whose maximum lies at i
//   avg  y[o] = sum over the window of x / divisor;  dx[i] = sum of dy[o] / divisor over the windows that hold i
// layout   x: [P, D, H, W, C], y: [P, OD, OH, OW, C]; channels first has C = 1 and P = N * channels
// mapping  a thread takes output rows (backward: planes)
//          C = 1: lanes over ow; the input rows of a window are split by column modulo stride, so that every tap is one
//          contiguous load; C > 1: lanes over channels; adaptive or tall windows: one window at a time
// memory   x read once while its rows stay in cache, y written once; positions of maxima as one byte each
// numerics acc_t; the first maximum wins, NaN wins always, as in torch; backward adds in the order of the outputs
#include <vector>

#include "common/pool_binding.h"
#include "common/registry.h"
#include "cpu/elementwise.h"
#include "cpu/pool_rows.h"

namespace pyops::PYOPS_CPU_CAPABILITY {

// ---- kernels

inline int64_t taps_of(const Range& r) { return r.stop > r.start ? (r.stop - r.start + r.step - 1) / r.step : 0; }

// f(row of the input, number of the row in the window), for the rows of a window.
template <class F>
PYOPS_INLINE void each_row(const Shape& s, const Range& rd, const Range& rh, F&& f) {
  int64_t number = 0;
  for (int64_t z = rd.start; z < rd.stop; z += rd.step)
    for (int64_t y = rh.start; y < rh.stop; y += rh.step) f(z * s.h.in + y, number++);
}

// C = 1, windows that share little: their rows are reduced column by column, lanes over columns, then each window's
// columns one by one. Of equal maxima the one in the first row wins, then in the first column; of NaN the last.
template <bool keep, class scalar_t, class index_t, class acc_t>
void max_row_columns(const scalar_t* plane, const Shape& s, const Windows<acc_t>& t, int64_t od, int64_t oh,
                     scalar_t* y, index_t* index, acc_t* value, LaneOf<acc_t>* row) {
  using V = Vec<acc_t>;
  const Range rd = t.d.window[size_t(od)], rh = t.h.window[size_t(oh)];
  const int64_t from = t.w.window.front().start, to = t.w.window.back().stop;
  each_vector<acc_t>(to - from, [&](int64_t i, auto lanes) {
    Best<acc_t> best{V(-std::numeric_limits<acc_t>::infinity()), {}};
    each_row(s, rd, rh, [&](int64_t r, int64_t number) {
      const V v = V::load(plane + r * s.w.in + from + i, lanes);
      if constexpr (keep)
        best.meet(v, number);
      else
        best.value = max(v, best.value);
    });
    best.value.store(value + from + i, lanes);
    if constexpr (keep)
      for (int64_t j = 0; j < lanes_of(lanes, V::width); ++j) row[from + i + j] = best.tap[j];
  });
  const int64_t nh = taps_of(rh) > 0 ? taps_of(rh) : 1;
  for (int64_t ow = 0; ow < s.w.out; ++ow) {
    const Range rw = t.w.window[size_t(ow)];
    const bool none = taps_of(rw) == 0 || taps_of(rh) == 0 || taps_of(rd) == 0;
    acc_t best = none ? -std::numeric_limits<acc_t>::infinity() : value[rw.start];
    int64_t column = rw.start;
    LaneOf<acc_t> at = keep && !none ? row[rw.start] : 0;
    for (int64_t x = rw.start + rw.step; !none && x < rw.stop; x += rw.step) {
      const acc_t v = value[x];
      if constexpr (keep) {
        const bool later_nan = v != v && (best == best || row[x] >= at);
        if (v > best || (v == best && row[x] < at) || later_nan) best = v, column = x, at = row[x];
      } else {
        best = v > best || v != v ? v : best;
      }
    }
    y[ow] = scalar_t(best);
    if constexpr (keep) {
      const int64_t id = at / nh, ih = at % nh, iw = (column - rw.start) / rw.step;
      index[ow] = index_t(sizeof(index_t) == 1
                              ? s.tap(rd.first + id, rh.first + ih, rw.first + iw)
                              : ((rd.start + id * rd.step) * s.h.in + rh.start + ih * rh.step) * s.w.in + column);
    }
  }
}

template <class scalar_t, class acc_t>
void avg_row_columns(const scalar_t* plane, const Shape& s, const Windows<acc_t>& t, int64_t od, int64_t oh,
                     scalar_t* y, const acc_t* scale, acc_t* value) {
  using V = Vec<acc_t>;
  const Range rd = t.d.window[size_t(od)], rh = t.h.window[size_t(oh)];
  const int64_t from = t.w.window.front().start, to = t.w.window.back().stop;
  each_vector<acc_t>(to - from, [&](int64_t i, auto lanes) {
    V total;
    each_row(s, rd, rh, [&](int64_t r, int64_t) { total += V::load(plane + r * s.w.in + from + i, lanes); });
    total.store(value + from + i, lanes);
  });
  for (int64_t ow = 0; ow < s.w.out; ++ow) {
    acc_t total = 0;
    for (int64_t x = t.w.window[size_t(ow)].start; x < t.w.window[size_t(ow)].stop; ++x) total += value[x];
    y[ow] = scalar_t(total * scale[ow]);
  }
}

// C > 1: one window, lanes over channels.
template <bool keep, class scalar_t, class index_t, class acc_t>
void max_window(const scalar_t* plane, const Shape& s, const Windows<acc_t>& t, int64_t od, int64_t oh, int64_t ow,
                scalar_t* y, index_t* index) {
  using V = Vec<acc_t>;
  const Range rd = t.d.window[size_t(od)], rh = t.h.window[size_t(oh)], rw = t.w.window[size_t(ow)];
  const int64_t nh = taps_of(rh) > 0 ? taps_of(rh) : 1, nw = taps_of(rw) > 0 ? taps_of(rw) : 1;
  each_vector<acc_t>(s.C, [&](int64_t c, auto lanes) {
    // The lanes count taps in order: a tap's number fits a float lane's integer, a position may not.
    Best<acc_t> best{V(-std::numeric_limits<acc_t>::infinity()), {}};
    int64_t order = 0;
    each_row(s, rd, rh, [&](int64_t r, int64_t) {
      for (int64_t x = rw.start; x < rw.stop; x += rw.step) {
        const V v = V::load(plane + (r * s.w.in + x) * s.C + c, lanes);
        if constexpr (keep)
          best.meet(v, order++);
        else
          best.value = max(v, best.value);
      }
    });
    best.value.store(y + c, lanes);
    if constexpr (keep) {
      if constexpr (sizeof(index_t) == 1)
        if (order == s.d.kernel * s.h.kernel * s.w.kernel) return store_taps<acc_t>(best.tap, index + c, lanes);
      for (int64_t j = 0; j < lanes_of(lanes, V::width); ++j) {
        const int64_t k = int64_t(best.tap[j]), iw = k % nw, ih = k / nw % nh, id = k / (nw * nh);
        index[c + j] =
            index_t(sizeof(index_t) == 1 ? s.tap(rd.first + id, rh.first + ih, rw.first + iw)
                                         : ((rd.start + id * rd.step) * s.h.in + rh.start + ih * rh.step) * s.w.in +
                                               rw.start + iw * rw.step);
      }
    }
  });
}

template <class scalar_t, class acc_t>
void avg_window(const scalar_t* plane, const Shape& s, const Windows<acc_t>& t, int64_t od, int64_t oh, int64_t ow,
                scalar_t* y, acc_t scale) {
  using V = Vec<acc_t>;
  const Range rd = t.d.window[size_t(od)], rh = t.h.window[size_t(oh)], rw = t.w.window[size_t(ow)];
  each_vector<acc_t>(s.C, [&](int64_t c, auto lanes) {
    V total;
    each_row(s, rd, rh, [&](int64_t r, int64_t) {
      for (int64_t x = rw.start; x < rw.stop; ++x) total += V::load(plane + (r * s.w.in + x) * s.C + c, lanes);
    });
    (total * V(scale)).store(y + c, lanes);
  });
}

// f(p, od, oh, scratch, lanes' scratch) over all output rows, on all threads.
template <class acc_t, class F>
void each_output_row(const Shape& s, int64_t scratch, int64_t lane_scratch, const F& f) {
  const int64_t kernel = s.d.adaptive ? s.inputs() / s.outputs() + 1 : s.d.kernel * s.h.kernel * s.w.kernel;
  const int64_t work = s.w.out * s.C * kernel;
  parallel_for(s.P * s.d.out * s.h.out, ceil_div(32768, work > 0 ? work : 1), [&](int64_t begin, int64_t end) {
    Buffer<acc_t> buffer(scratch);
    std::vector<LaneOf<acc_t>> lanes(static_cast<size_t>(lane_scratch));
    int64_t oh = begin % s.h.out, od = begin / s.h.out % s.d.out, p = begin / (s.h.out * s.d.out);
    for (int64_t k = begin; k < end; ++k) {
      f(p, od, oh, buffer.get(), lanes.data());
      if (++oh == s.h.out) oh = 0, ++od;
      if (od == s.d.out) od = 0, ++p;
    }
  });
}

// Split rows pay where windows overlap or lie close, and while they stay in the first-level cache.
template <class acc_t>
bool by_split(const Shape& s) {
  return s.C == 1 && !s.d.adaptive && s.w.out >= 4 && s.w.stride <= 4 && split_of<acc_t>(s).size(s) <= 8192;
}

template <bool keep, class scalar_t, class index_t>
void max_forward(const scalar_t* x, scalar_t* y, index_t* index, const Shape& s) {
  using acc_t = accumulate_t<scalar_t>;
  const bool split_rows = by_split<acc_t>(s), columns = s.C == 1 && !split_rows;
  const Split split = split_of<acc_t>(s);
  const Windows<acc_t> t(s, false);
  const int64_t scratch = split_rows ? split.size(s) : columns ? s.w.in : 0;
  each_output_row<acc_t>(s, scratch, columns && keep ? s.w.in : 0,
                         [&](int64_t p, int64_t od, int64_t oh, acc_t* buffer, auto* lanes) {
                           const scalar_t* plane = x + p * s.inputs() * s.C;
                           const int64_t out = ((p * s.d.out + od) * s.h.out + oh) * s.w.out * s.C;
                           if (split_rows)
                             return max_row_split<keep>(plane, s, od, oh, y + out, index + out, buffer, split);
                           if (columns)
                             return max_row_columns<keep>(plane, s, t, od, oh, y + out, index + out, buffer, lanes);
                           for (int64_t ow = 0; ow < s.w.out; ++ow)
                             max_window<keep>(plane, s, t, od, oh, ow, y + out + ow * s.C, index + out + ow * s.C);
                         });
}

// One window that is the whole plane.
template <class acc_t>
bool is_global(const Shape& s, const Windows<acc_t>& t) {
  return s.C == 1 && s.outputs() == 1 &&
         taps_of(t.d.window[0]) * taps_of(t.h.window[0]) * taps_of(t.w.window[0]) == s.inputs();
}

template <class scalar_t>
void avg_planes(const scalar_t* x, scalar_t* y, int64_t P, int64_t n, accumulate_t<scalar_t> scale) {
  using acc_t = accumulate_t<scalar_t>;
  parallel_for(P, ceil_div(32768, n), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      Totals<acc_t, 1> total;
      accumulate(total, n, [&](int64_t i, auto lanes, auto& v) { v[0] += Vec<acc_t>::load(x + p * n + i, lanes); });
      y[p] = scalar_t(sum(total[0]) * scale);
    }
  });
}

template <class scalar_t>
void avg_forward(const scalar_t* x, scalar_t* y, const Shape& s, bool include_padding, int64_t override_by) {
  using acc_t = accumulate_t<scalar_t>;
  const bool split_rows = by_split<acc_t>(s);
  const Split split = split_of<acc_t>(s);
  const Windows<acc_t> t(s, false, include_padding, override_by);
  if (is_global(s, t)) {
    acc_t scale;
    t.scales(0, 0, &scale);
    return avg_planes(x, y, s.P, s.inputs(), scale);
  }
  const int64_t scratch = split_rows ? split.size(s) : s.C == 1 ? s.w.in : 0;
  each_output_row<acc_t>(s, s.w.out + scratch, 0, [&](int64_t p, int64_t od, int64_t oh, acc_t* scale, auto*) {
    const scalar_t* plane = x + p * s.inputs() * s.C;
    scalar_t* out = y + ((p * s.d.out + od) * s.h.out + oh) * s.w.out * s.C;
    t.scales(od, oh, scale);
    if (split_rows) return avg_row_split(plane, s, od, oh, out, scale, scale + s.w.out, split);
    if (s.C == 1) return avg_row_columns(plane, s, t, od, oh, out, scale, scale + s.w.out);
    for (int64_t ow = 0; ow < s.w.out; ++ow) avg_window(plane, s, t, od, oh, ow, out + ow * s.C, scale[ow]);
  });
}

// f(p, plane, scratch) adds into planes of acc_t: in dx itself, or in a buffer that is narrowed afterwards.
template <class scalar_t, class F>
void each_gradient_plane(scalar_t* dx, const Shape& s, int64_t scratch, const F& f) {
  using acc_t = accumulate_t<scalar_t>;
  constexpr bool in_place = std::is_same_v<scalar_t, acc_t>;
  const int64_t size = s.inputs() * s.C;
  parallel_for(s.P, ceil_div(32768, size), [&](int64_t begin, int64_t end) {
    Buffer<acc_t> buffer(in_place ? 0 : size), rows(scratch);
    for (int64_t p = begin; p < end; ++p) {
      acc_t* plane = buffer.get();
      if constexpr (in_place) plane = dx + p * size;
      std::memset(plane, 0, size_t(size) * sizeof(acc_t));
      f(p, plane, rows.get());
      if constexpr (!in_place) narrow(dx + p * size, plane, size);
    }
  });
}

// C = 1, or positions: each output adds to the place of its maximum.
template <class scalar_t, class index_t>
void max_scatter(const scalar_t* dy, const index_t* index, scalar_t* dx, const Shape& s) {
  using acc_t = accumulate_t<scalar_t>;
  constexpr bool taps = sizeof(index_t) == 1;
  int64_t offset[256] = {};
  if (taps)
    for (int64_t k = 0; k < 256 && k < s.d.kernel * s.h.kernel * s.w.kernel; ++k)
      offset[k] = s.position(0, 0, 0, k) - s.position(0, 0, 0, 0);
  const uint64_t inputs = uint64_t(s.inputs());
  const int64_t channels = s.C, outs = s.w.out, step = taps ? s.w.stride : 0;
  each_gradient_plane(dx, s, 0, [&](int64_t p, acc_t* plane, acc_t*) {
    int64_t k = p * s.outputs() * s.C;
    for (int64_t od = 0; od < s.d.out; ++od)
      for (int64_t oh = 0; oh < s.h.out; ++oh) {
        int64_t origin = taps ? s.position(od, oh, 0, 0) : 0;
        for (int64_t ow = 0; ow < outs; ++ow, origin += step)
          for (int64_t c = 0; c < channels; ++c, ++k) {
            const int64_t at = taps ? origin + offset[index[k]] : int64_t(index[k]);
            if (uint64_t(at) < inputs) plane[at * channels + c] += acc_t(dy[k]);
          }
      }
  });
}

// C > 1: each input position gathers from the windows that reach it, lanes over channels.
// term(element of dy, tap, scale, lanes) is the contribution of one window.
template <class scalar_t, class acc_t, class Term>
void gather_channels(scalar_t* dx, const Shape& s, const Windows<acc_t>& t, const Term& term) {
  using V = Vec<acc_t>;
  struct Part {
    int64_t from, tap;
    acc_t scale;
  };
  parallel_for(s.P * s.d.in * s.h.in, ceil_div(8192, s.w.in * s.C), [&](int64_t begin, int64_t end) {
    std::vector<Part> parts;
    for (int64_t k = begin; k < end; ++k) {
      const int64_t y = k % s.h.in, z = k / s.h.in % s.d.in, p = k / (s.h.in * s.d.in);
      for (int64_t x = 0; x < s.w.in; ++x) {
        parts.clear();
        for (int64_t od = t.d.reach[size_t(z)].first; od <= t.d.reach[size_t(z)].last; ++od) {
          const Range& rd = t.d.window[size_t(od)];
          if (!s.d.reaches(rd, z)) continue;
          for (int64_t oh = t.h.reach[size_t(y)].first; oh <= t.h.reach[size_t(y)].last; ++oh) {
            const Range& rh = t.h.window[size_t(oh)];
            if (!s.h.reaches(rh, y)) continue;
            for (int64_t ow = t.w.reach[size_t(x)].first; ow <= t.w.reach[size_t(x)].last; ++ow) {
              const Range& rw = t.w.window[size_t(ow)];
              if (!s.w.reaches(rw, x)) continue;
              const int64_t tap = s.tap(rd.first + (z - rd.start) / rd.step, rh.first + (y - rh.start) / rh.step,
                                        rw.first + (x - rw.start) / rw.step);
              const acc_t divisor =
                  t.override_by != acc_t(0) ? t.override_by : t.row_count(od, oh) * t.w.count[size_t(ow)];
              parts.push_back({(((p * s.d.out + od) * s.h.out + oh) * s.w.out + ow) * s.C, tap, acc_t(1) / divisor});
            }
          }
        }
        scalar_t* to = dx + (k * s.w.in + x) * s.C;
        each_vector<acc_t>(s.C, [&](int64_t c, auto lanes) {
          V total;
          for (const Part& part : parts) total += term(part.from + c, part.tap, part.scale, lanes);
          total.store(to + c, lanes);
        });
      }
    }
  });
}

template <class scalar_t, class index_t>
void max_backward(const scalar_t* dy, const index_t* index, scalar_t* dx, const Shape& s) {
  using acc_t = accumulate_t<scalar_t>;
  using V = Vec<acc_t>;
  if constexpr (sizeof(index_t) == 1) {
    if (s.C > 1) {
      gather_channels(dx, s, Windows<acc_t>(s, true), [&](int64_t k, int64_t tap, acc_t, auto lanes) -> V {
        const Mask<acc_t> mine = load_taps<acc_t>(index + k, lanes) == Mask<acc_t>{} + LaneOf<acc_t>(tap);
        return select(mine, V::load(dy + k, lanes), V());
      });
      return;
    }
  }
  max_scatter(dy, index, dx, s);
}

template <class scalar_t>
void avg_backward(const scalar_t* dy, scalar_t* dx, const Shape& s, bool include_padding, int64_t override_by) {
  using acc_t = accumulate_t<scalar_t>;
  using V = Vec<acc_t>;
  const Windows<acc_t> t(s, true, include_padding, override_by);
  if (s.C > 1) {
    gather_channels(dx, s, t,
                    [&](int64_t k, int64_t, acc_t scale, auto lanes) { return V::load(dy + k, lanes) * V(scale); });
    return;
  }
  if (is_global(s, t)) {
    acc_t scale;
    t.scales(0, 0, &scale);
    const int64_t n = s.inputs();
    parallel_for(s.P, ceil_div(32768, n), [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        const V share(acc_t(dy[p]) * scale);
        each_vector<acc_t>(n, [&](int64_t i, auto lanes) { share.store(dx + p * n + i, lanes); });
      }
    });
    return;
  }
  // A row of shares is spread over the columns once, and the spread row added to every row of the windows.
  const int64_t from = t.w.window.front().start, to = t.w.window.back().stop;
  each_gradient_plane(dx, s, s.w.out + s.w.in, [&](int64_t p, acc_t* plane, acc_t* scale) {
    acc_t* spread = scale + s.w.out;
    const scalar_t* row = dy + p * s.outputs();
    for (int64_t od = 0; od < s.d.out; ++od)
      for (int64_t oh = 0; oh < s.h.out; ++oh, row += s.w.out) {
        t.scales(od, oh, scale);
        std::memset(spread, 0, size_t(s.w.in) * sizeof(acc_t));
        for (int64_t ow = 0; ow < s.w.out; ++ow) {
          const acc_t share = acc_t(row[ow]) * scale[ow];
          for (int64_t x = t.w.window[size_t(ow)].start; x < t.w.window[size_t(ow)].stop; ++x) spread[x] += share;
        }
        each_row(s, t.d.window[size_t(od)], t.h.window[size_t(oh)], [&](int64_t r, int64_t) {
          acc_t* line = plane + r * s.w.in;
          each_vector<acc_t>(to - from, [&](int64_t i, auto lanes) {
            (V::load(line + from + i, lanes) + V::load(spread + from + i, lanes)).store(line + from + i, lanes);
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
