// act_dropout_add · CPU
//   y[i] = f(x[i]) * scale + r[i] where element i of the random stream is kept, f(x[i]) * 0 + r[i] elsewhere
//   dx[i] = dy[i] * f'(x[i]) * scale where it is kept, * 0 elsewhere;  f by number, common/activation.h
// layout   [N] flat · random: (seed, offset)
// mapping  a thread takes blocks of 1024 elements, lanes over them
// memory   every input read once, every output written once; the mask is drawn anew, never stored
// numerics acc_t; the mask is that of every backend
#include "cpu/activation.h"
#include "cpu/dropout.h"

#include "common/registry.h"

namespace pyops::PYOPS_CPU_CAPABILITY {

// ---- kernels

struct Activation {
  int kind;
  Parameters p;
};

static_assert(dropout_block == elementwise_block);
template <class acc_t>
struct ActDropoutScratch {
  alignas(64) acc_t wide[elementwise_block];
  alignas(64) acc_t value[elementwise_block];
  alignas(64) acc_t factor[elementwise_block];
  uint32_t words[elementwise_block];
};

// f(first, count, scratch) over blocks, with the factors of their elements drawn.
template <class acc_t, class F>
void each_drawn_block(int64_t N, const Dropout<acc_t>& d, const F& f) {
  parallel_for(ceil_div(N, elementwise_block), 16, [&](int64_t begin, int64_t end) {
    ActDropoutScratch<acc_t> s;
    for (int64_t b = begin; b < end; ++b) {
      const int64_t i = b * elementwise_block, n = std::min(N - i, elementwise_block);
      d.draw(i, n, s.words, s.factor);
      f(i, n, s);
    }
  });
}

template <class scalar_t, class acc_t>
void act_dropout_add_forward(Activation f, const Dropout<acc_t>& d, const scalar_t* x, const scalar_t* r, scalar_t* y,
                             int64_t N) {
  using V = Vec<acc_t>;
  each_drawn_block(N, d, [&](int64_t at, int64_t n, auto& s) {
    activation_block<acc_t>(f.kind, f.p, s.value, widened(x + at, n, s.wide), n, false);
    each_vector<acc_t>(n, [&](int64_t i, auto lanes) {
      const V added = V::load(r + at + i, lanes);
      fma(V::load(s.value + i, lanes), V::load(s.factor + i, lanes), added).store(y + at + i, lanes);
    });
  });
}

template <class scalar_t, class acc_t>
void act_dropout_add_backward(Activation f, const Dropout<acc_t>& d, const scalar_t* dy, const scalar_t* x,
                              scalar_t* dx, int64_t N) {
  using V = Vec<acc_t>;
  each_drawn_block(N, d, [&](int64_t at, int64_t n, auto& s) {
    each_vector<acc_t>(n, [&](int64_t i, auto lanes) {
      (V::load(dy + at + i, lanes) * V::load(s.factor + i, lanes)).store(s.value + i, lanes);
    });
    activation_gradient_block<acc_t>(f.kind, f.p, s.factor, s.value, widened(x + at, n, s.wide), n, false);
    narrow(dx + at, s.factor, n);
  });
}

// ---- binding

static void check_arguments(const OpScope& op, int64_t threshold, int64_t kind) {
  activation::check_kind(op, kind);
  op.check(threshold >= 0 && threshold <= int64_t{1} << 31, "threshold must lie in [0, 2^31]");
}

Tensor act_dropout_add_fwd(const Tensor& x, const Tensor& residual, const Tensor& random, int64_t threshold,
                           double scale, int64_t kind, double a, double b, double c) {
  OpScope op("act_dropout_add_fwd", x);
  check_arguments(op, threshold, kind);
  const int64_t N = x.numel();
  const RandomStream stream(op.in<int64_t>(random, "random", {2}));
  return dispatch_floating(op, x.scalar_type(), [&]<class scalar_t>() {
    using acc_t = accumulate_t<scalar_t>;
    Tensor y = op.empty<scalar_t>({N});
    const Dropout<acc_t> d{stream, threshold, acc_t(scale), 0, 0};
    act_dropout_add_forward({int(kind), {a, b, c}}, d, op.in<scalar_t>(x, "x", {N}),
                            op.in<scalar_t>(residual, "residual", {N}), op.out<scalar_t>(y, "y", {N}), N);
    return y;
  });
}

Tensor act_dropout_add_bwd(const Tensor& dy, const Tensor& x, const Tensor& random, int64_t threshold, double scale,
                           int64_t kind, double a, double b, double c) {
  OpScope op("act_dropout_add_bwd", dy);
  check_arguments(op, threshold, kind);
  const int64_t N = x.numel();
  const RandomStream stream(op.in<int64_t>(random, "random", {2}));
  return dispatch_floating(op, x.scalar_type(), [&]<class scalar_t>() {
    using acc_t = accumulate_t<scalar_t>;
    Tensor dx = op.empty<scalar_t>({N});
    const Dropout<acc_t> d{stream, threshold, acc_t(scale), 0, 0};
    act_dropout_add_backward({int(kind), {a, b, c}}, d, op.in<scalar_t>(dy, "dy", {N}), op.in<scalar_t>(x, "x", {N}),
                             op.out<scalar_t>(dx, "dx", {N}), N);
    return dx;
  });
}

PYOPS_LIBRARY(m) {
  PYOPS_IMPL(m, act_dropout_add_fwd);
  PYOPS_IMPL(m, act_dropout_add_bwd);
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY
