// fractional_max_pool · CPU
//   y[o] = max over the window of x at start(o), start random per plane;  dx[i] = Σ dy[o] over the o whose maximum is i
// layout   x: [P, D, H, W], y, index: [P, OD, OH, OW] · samples: [P, 3]
// mapping  a thread takes planes
// memory   x read once while its rows stay in cache, y and index written once; backward scatters within a plane
// numerics acc_t; the first maximum wins, NaN wins always, as in torch
#include <cstring>
#include <limits>
#include <vector>

#include "common/fractional_max_pool_binding.h"
#include "common/registry.h"
#include "cpu/elementwise.h"
#include "cpu/maxima.h"

namespace pyops::PYOPS_CPU_CAPABILITY {

// ---- kernels

using fractional_max_pool::Axis;
using fractional_max_pool::Shape;

template <class acc_t>
void starts(const Axis& a, acc_t sample, std::vector<int64_t>& to) {
  to.resize(size_t(a.out));
  for (int64_t o = 0; o < a.out; ++o) to[size_t(o)] = a.start(o, sample);
}

// Where the windows of a plane begin, and how far from that corner each of their taps lies, counted once.
template <class acc_t>
struct Windows {
  std::vector<int64_t> d, h, w, tap;
  explicit Windows(const Shape& s) {
    for (int64_t z = 0; z < s.d.kernel; ++z)
      for (int64_t r = 0; r < s.h.kernel; ++r)
        for (int64_t c = 0; c < s.w.kernel; ++c) tap.push_back((z * s.h.in + r) * s.w.in + c);
  }
  template <class scalar_t>
  void place(const Shape& s, const scalar_t* samples) {
    starts(s.d, acc_t(samples[0]), d);
    starts(s.h, acc_t(samples[1]), h);
    starts(s.w, acc_t(samples[2]), w);
  }
};

// Starts along a row are no vector, but the maxima of all windows that could begin in it are: `corner` is where the
// first of them begins. An output picks its own.
template <class scalar_t, class acc_t>
void dense_row(const scalar_t* plane, int64_t corner, const Windows<acc_t>& at, int64_t candidates, acc_t* value,
               LaneOf<acc_t>* tap, scalar_t* y, int64_t* index) {
  using V = Vec<acc_t>;
  each_vector<acc_t>(candidates, [&](int64_t i, auto lanes) {
    Best<acc_t> best{V(-std::numeric_limits<acc_t>::infinity()), {}};
    for (size_t t = 0; t < at.tap.size(); ++t) best.meet(V::load(plane + corner + at.tap[t] + i, lanes), int64_t(t));
    best.value.store(value + i, lanes);
    std::memcpy(tap + i, &best.tap, sizeof best.tap);
  });
  for (const int64_t x0 : at.w) {
    *y++ = scalar_t(value[x0]);
    *index++ = corner + x0 + at.tap[size_t(tap[x0])];
  }
}

// Few windows, each by itself.
template <class scalar_t>
void sparse_row(const scalar_t* plane, int64_t corner, const Shape& s, const std::vector<int64_t>& w, scalar_t* y,
                int64_t* index) {
  using acc_t = accumulate_t<scalar_t>;
  for (const int64_t x0 : w) {
    acc_t best = -std::numeric_limits<acc_t>::infinity();
    int64_t at = corner + x0;
    for (int64_t z = 0; z < s.d.kernel; ++z)
      for (int64_t r = 0; r < s.h.kernel; ++r) {
        const int64_t row = corner + x0 + (z * s.h.in + r) * s.w.in;
        for (int64_t c = row; c < row + s.w.kernel; ++c) {
          const acc_t v = acc_t(plane[c]);
          if (v > best || v != v) best = v, at = c;
        }
      }
    *y++ = scalar_t(best);
    *index++ = at;
  }
}

template <class scalar_t>
void forward(const scalar_t* x, const scalar_t* samples, scalar_t* y, int64_t* index, const Shape& s) {
  using acc_t = accumulate_t<scalar_t>;
  const int64_t work = s.outputs() * s.d.kernel * s.h.kernel * s.w.kernel;
  const int64_t candidates = s.w.in - s.w.kernel + 1;
  // one output in 64 candidates pays for them: the branch of a window alone is a coin toss
  const bool dense = s.w.out >= std::max<int64_t>(4, candidates / 64);
  parallel_for(s.P, ceil_div(32768, work), [&](int64_t begin, int64_t end) {
    Windows<acc_t> at(s);
    Buffer<acc_t> value(dense ? candidates : 0);
    Buffer<LaneOf<acc_t>> tap(dense ? candidates + Vec<acc_t>::width : 0);
    for (int64_t p = begin; p < end; ++p) {
      const scalar_t* plane = x + p * s.inputs();
      at.place(s, samples + 3 * p);
      int64_t k = p * s.outputs();
      for (const int64_t z0 : at.d)
        for (const int64_t y0 : at.h) {
          const int64_t corner = (z0 * s.h.in + y0) * s.w.in;
          if (dense)
            dense_row(plane, corner, at, candidates, value.get(), tap.get(), y + k, index + k);
          else
            sparse_row(plane, corner, s, at.w, y + k, index + k);
          k += s.w.out;
        }
    }
  });
}

template <class scalar_t>
void backward(const scalar_t* dy, const int64_t* index, scalar_t* dx, const Shape& s) {
  using acc_t = accumulate_t<scalar_t>;
  constexpr bool in_place = std::is_same_v<scalar_t, acc_t>;
  const int64_t size = s.inputs();
  parallel_for(s.P, ceil_div(32768, size), [&](int64_t begin, int64_t end) {
    Buffer<acc_t> buffer(in_place ? 0 : size);
    for (int64_t p = begin; p < end; ++p) {
      acc_t* plane = buffer.get();
      if constexpr (in_place) plane = dx + p * size;
      std::memset(plane, 0, size_t(size) * sizeof(acc_t));
      for (int64_t k = p * s.outputs(); k < (p + 1) * s.outputs(); ++k)
        if (uint64_t(index[k]) < uint64_t(size)) plane[index[k]] += acc_t(dy[k]);
      if constexpr (!in_place) narrow(dx + p * size, plane, size);
    }
  });
}

// ---- binding

std::tuple<Tensor, Tensor> fractional_max_pool_fwd(const Tensor& x, const Tensor& samples,
                                                   std::vector<int64_t> window) {
  OpScope op("fractional_max_pool_fwd", x);
  op.check(x.dim() == 4, "x must be [P, D, H, W]");
  const Shape s = fractional_max_pool::shape_of(op, {x.size(0), x.size(1), x.size(2), x.size(3)}, window);
  const std::initializer_list<int64_t> in = {s.P, s.d.in, s.h.in, s.w.in}, out = {s.P, s.d.out, s.h.out, s.w.out};
  return dispatch_floating(op, x.scalar_type(), [&]<class scalar_t>() {
    Tensor y = op.empty<scalar_t>(out), index = op.empty<int64_t>(out);
    forward(op.in<scalar_t>(x, "x", in), op.in<scalar_t>(samples, "samples", {s.P, 3}), op.out<scalar_t>(y, "y", out),
            op.out<int64_t>(index, "index", out), s);
    return std::tuple(y, index);
  });
}

Tensor fractional_max_pool_bwd(const Tensor& dy, const Tensor& index, std::vector<int64_t> size,
                               std::vector<int64_t> window) {
  OpScope op("fractional_max_pool_bwd", dy);
  const Shape s = fractional_max_pool::shape_of(op, size, window);
  const std::initializer_list<int64_t> in = {s.P, s.d.in, s.h.in, s.w.in}, out = {s.P, s.d.out, s.h.out, s.w.out};
  return dispatch_floating(op, dy.scalar_type(), [&]<class scalar_t>() {
    Tensor dx = op.empty<scalar_t>(in);
    backward(op.in<scalar_t>(dy, "dy", out), op.in<int64_t>(index, "index", out), op.out<scalar_t>(dx, "dx", in), s);
    return dx;
  });
}

PYOPS_LIBRARY(m) {
  PYOPS_IMPL(m, fractional_max_pool_fwd);
  PYOPS_IMPL(m, fractional_max_pool_bwd);
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY
