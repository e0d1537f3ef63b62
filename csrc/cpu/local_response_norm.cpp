// local_response_norm · CPU
//   q[c] = k + alpha/size · sum over window(c) of x²        y = x q^-beta
//   dx[c] = dy q^-beta - 2 alpha beta/size · x[c] · sum over the c' whose window holds c of dy x q^-(beta+1)
// layout   x, y: [N, C, S] or, channels_last, [N, S, C]
// mapping  a thread takes blocks of positions and all their channels; lanes over positions, or over the channels of
//          channels_last, whose window is read from a row with zeros at both ends
// memory   x (and dy) read once, the window from the caches; nothing is kept for the backward pass
// numerics acc_t; each window is added anew, so no error runs along the channels
#include "common/channels.h"
#include "common/local_response_norm.h"
#include "common/registry.h"
#include "cpu/math.h"
#include "cpu/parallel.h"

namespace pyops::PYOPS_CPU_CAPABILITY {

using namespace local_response_norm;

// ---- kernels

inline constexpr int64_t positions = 64;

template <class A>
struct Power {
  A beta, k, share;  // share = alpha / size

  PYOPS_INLINE Vec<A> base(const Vec<A>& squares) const { return fma(Vec<A>(share), squares, Vec<A>(k)); }
  PYOPS_INLINE Vec<A> scale(const Vec<A>& q) const { return exp(Vec<A>(-beta) * log(q)); }
};

template <class T, class A>
void normalize_planes(const T* x, T* y, const ChannelSizes& z, Window w, const Power<A>& p) {
  using V = Vec<A>;
  const int64_t blocks = ceil_div(z.S, positions);
  parallel_for(z.N * blocks, ceil_div(4096, positions * std::max<int64_t>(z.C, 1)), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b % blocks * positions, offset = b / blocks * z.C * z.S + first;
      each_vector<A>(std::min(positions, z.S - first), [&](int64_t i, auto lanes) {
        const T* from = x + offset + i;
        for (int64_t c = 0; c < z.C; ++c) {
          V squares;
          for (int64_t j = w.first(c); j < w.last(c, z.C); ++j) {
            const V v = V::load(from + j * z.S, lanes);
            squares = fma(v, v, squares);
          }
          (V::load(from + c * z.S, lanes) * p.scale(p.base(squares))).store(y + offset + i + c * z.S, lanes);
        }
      });
    }
  });
}

template <class T, class A>
void normalize_planes_bwd(const T* dy, const T* x, T* dx, const ChannelSizes& z, int64_t size, const Power<A>& p) {
  using V = Vec<A>;
  const Window w = window_of(size), back = transposed_window(size);
  const int64_t blocks = ceil_div(z.S, V::width);
  parallel_for(z.N * blocks, ceil_div(4096, V::width * std::max<int64_t>(z.C, 1)), [&](int64_t begin, int64_t end) {
    Buffer<A> inner(z.C * V::width), own(z.C * V::width);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t at = b % blocks * V::width, offset = b / blocks * z.C * z.S + at;
      each_vector<A>(std::min(V::width, z.S - at), [&](int64_t, auto lanes) {
        const T *from = x + offset, *grad = dy + offset;
        for (int64_t c = 0; c < z.C; ++c) {
          V squares;
          for (int64_t j = w.first(c); j < w.last(c, z.C); ++j) {
            const V v = V::load(from + j * z.S, lanes);
            squares = fma(v, v, squares);
          }
          const V q = p.base(squares), scaled = V::load(grad + c * z.S, lanes) * p.scale(q);
          scaled.store(own.get() + c * V::width);
          (scaled * V::load(from + c * z.S, lanes) / q).store(inner.get() + c * V::width);
        }
        for (int64_t c = 0; c < z.C; ++c) {
          V sum;
          for (int64_t j = back.first(c); j < back.last(c, z.C); ++j) sum += V::load(inner.get() + j * V::width);
          const V factor = V(-2 * p.share * p.beta) * V::load(from + c * z.S, lanes);
          fma(factor, sum, V::load(own.get() + c * V::width)).store(dx + offset + c * z.S, lanes);
        }
      });
    }
  });
}

// One position of channels_last: `row` holds w.before zeros, C values, w.behind zeros.
template <class A>
PYOPS_INLINE Vec<A> window_sum(const A* row, int64_t c, Window w) {
  Vec<A> sum;
  for (int64_t j = 0; j <= w.before + w.behind; ++j) sum += Vec<A>::load(row + c + j);
  return sum;
}

template <class T, class A>
void normalize_channels(const T* x, T* y, const ChannelSizes& z, Window w, const Power<A>& p) {
  using V = Vec<A>;
  parallel_for(z.N * z.S, ceil_div(4096, std::max<int64_t>(z.C, 1)), [&](int64_t begin, int64_t end) {
    Buffer<A> squares(z.C + w.before + w.behind + V::width, A(0));
    for (int64_t r = begin; r < end; ++r) {
      const T* from = x + r * z.C;
      each_vector<A>(z.C, [&](int64_t c, auto lanes) {
        const V v = V::load(from + c, lanes);
        (v * v).store(squares.get() + w.before + c, lanes);
      });
      each_vector<A>(z.C, [&](int64_t c, auto lanes) {
        const V scale = p.scale(p.base(window_sum(squares.get(), c, w)));
        (V::load(from + c, lanes) * scale).store(y + r * z.C + c, lanes);
      });
    }
  });
}

template <class T, class A>
void normalize_channels_bwd(const T* dy, const T* x, T* dx, const ChannelSizes& z, int64_t size, const Power<A>& p) {
  using V = Vec<A>;
  const Window w = window_of(size), back = transposed_window(size);
  parallel_for(z.N * z.S, ceil_div(4096, std::max<int64_t>(z.C, 1)), [&](int64_t begin, int64_t end) {
    const int64_t room = z.C + size + V::width;
    Buffer<A> squares(room, A(0)), inner(room, A(0)), own(z.C + V::width);
    for (int64_t r = begin; r < end; ++r) {
      const T *from = x + r * z.C, *grad = dy + r * z.C;
      each_vector<A>(z.C, [&](int64_t c, auto lanes) {
        const V v = V::load(from + c, lanes);
        (v * v).store(squares.get() + w.before + c, lanes);
      });
      each_vector<A>(z.C, [&](int64_t c, auto lanes) {
        const V q = p.base(window_sum(squares.get(), c, w)), scaled = V::load(grad + c, lanes) * p.scale(q);
        scaled.store(own.get() + c, lanes);
        (scaled * V::load(from + c, lanes) / q).store(inner.get() + back.before + c, lanes);
      });
      each_vector<A>(z.C, [&](int64_t c, auto lanes) {
        const V factor = V(-2 * p.share * p.beta) * V::load(from + c, lanes);
        fma(factor, window_sum(inner.get(), c, back), V::load(own.get() + c, lanes)).store(dx + r * z.C + c, lanes);
      });
    }
  });
}

// ---- binding

Tensor local_response_norm_fwd(const Tensor& x, int64_t size, double alpha, double beta, double k, bool channels_last) {
  OpScope op("local_response_norm_fwd", x);
  const ChannelSizes z = channel_sizes(op, x, channels_last);
  op.check(size > 0 && size < (int64_t{1} << 31), "size must be in [1, 2^31), got ", size);
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    using A = accumulate_t<T>;
    Tensor y = op.empty<T>(ShapeRef(x));
    const T* px = op.in<T>(x, "x", ShapeRef(x));
    T* py = op.out<T>(y, "y", ShapeRef(x));
    const Power<A> p{A(beta), A(k), A(alpha / double(size))};
    if (channels_last)
      normalize_channels(px, py, z, window_of(size), p);
    else
      normalize_planes(px, py, z, window_of(size), p);
    return y;
  });
}

Tensor local_response_norm_bwd(const Tensor& dy, const Tensor& x, int64_t size, double alpha, double beta, double k,
                               bool channels_last) {
  OpScope op("local_response_norm_bwd", x);
  const ChannelSizes z = channel_sizes(op, x, channels_last);
  op.check(size > 0 && size < (int64_t{1} << 31), "size must be in [1, 2^31), got ", size);
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    using A = accumulate_t<T>;
    Tensor dx = op.empty<T>(ShapeRef(x));
    const T *g = op.in<T>(dy, "dy", ShapeRef(x)), *px = op.in<T>(x, "x", ShapeRef(x));
    T* to = op.out<T>(dx, "dx", ShapeRef(x));
    const Power<A> p{A(beta), A(k), A(alpha / double(size))};
    if (channels_last)
      normalize_channels_bwd(g, px, to, z, size, p);
    else
      normalize_planes_bwd(g, px, to, z, size, p);
    return dx;
  });
}

PYOPS_LIBRARY(m) {
  PYOPS_IMPL(m, local_response_norm_fwd);
  PYOPS_IMPL(m, local_response_norm_bwd);
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY
