// elementwise_loss · CPU
//   y[b] = Σ_{i in block b} l(x[i], t[i]);  dx[i] = dy[b] l_x(x[i], t[i]),  dt[i] = dy[b] l_t(x[i], t[i]);
//   l by number, common/elementwise_loss.h; blocks of one element: no sum
// layout   x, t, c, dx, dt: n elements of any shape · y, dy: [ceil(n / block)]
// mapping  a thread takes blocks; lanes over elements
// memory   every input read once, every output written once; a sum writes one number for a block
// numerics acc_t, sums of a block in fixed order; y in acc_t where it is a sum
#include "common/elementwise_loss.h"

#include "common/registry.h"
#include "cpu/elementwise.h"
#include "cpu/math.h"

namespace pyops::PYOPS_CPU_CAPABILITY {

// ---- kernels

using elementwise_loss::with_loss;

template <class acc_t>
struct LossBlock {
  const acc_t *x, *t, *c;
  int64_t n;
  template <class Lanes>
  PYOPS_INLINE Vec<acc_t> weight(int64_t i, Lanes lanes) const {
    return c == nullptr ? Vec<acc_t>(acc_t(1)) : Vec<acc_t>::load(c + i, lanes);
  }
};

template <class acc_t>
void loss_values(int64_t kind, double a, const LossBlock<acc_t>& b, acc_t* y) {
  using V = Vec<acc_t>;
  with_loss(kind, [&]<class F>() {
    each_vector<acc_t>(b.n, [&](int64_t i, auto lanes) {
      F::value(V::load(b.x + i, lanes), V::load(b.t + i, lanes), b.weight(i, lanes), a).store(y + i, lanes);
    });
  });
}

template <class acc_t>
acc_t loss_sum(int64_t kind, double a, const LossBlock<acc_t>& b) {
  using V = Vec<acc_t>;
  Totals<acc_t, 1> total;
  with_loss(kind, [&]<class F>() {
    accumulate(total, b.n, [&](int64_t i, auto lanes, auto& sums) {
      sums[0] += keep(F::value(V::load(b.x + i, lanes), V::load(b.t + i, lanes), b.weight(i, lanes), a), lanes);
    });
  });
  return sum(total[0]);
}

// dx or dt null: not wanted. `each`: a cotangent for each element, else one for all.
template <class acc_t>
void loss_slopes(int64_t kind, double a, const LossBlock<acc_t>& b, const acc_t* dy, bool each, acc_t* dx, acc_t* dt) {
  using V = Vec<acc_t>;
  with_loss(kind, [&]<class F>() {
    each_vector<acc_t>(b.n, [&](int64_t i, auto lanes) {
      V in_x, in_t;
      F::slope(V::load(b.x + i, lanes), V::load(b.t + i, lanes), b.weight(i, lanes), a, in_x, in_t);
      const V g = each ? V::load(dy + i, lanes) : V(*dy);
      if (dx != nullptr) (g * in_x).store(dx + i, lanes);
      if (dt != nullptr) (g * in_t).store(dt + i, lanes);
    });
  });
}

// Room for blocks of half types as acc_t; one element where they are read in place.
template <class scalar_t, class acc_t, int blocks>
struct LossScratch {
  static constexpr int64_t size = std::is_same_v<scalar_t, acc_t> ? 1 : elementwise_block;
  alignas(64) acc_t row[blocks][size];
};

// f(first, count) over runs that a scratch block holds and that lie within one block of sums.
template <class F>
void each_run(int64_t n, int64_t block, const F& f) {
  const int64_t size = block == 1 ? elementwise_block : block;
  parallel_for(ceil_div(n, size), ceil_div(elementwise_grain, size), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      for (int64_t i = b * size; i < n && i < (b + 1) * size; i += elementwise_block) {
        const int64_t stop = (b + 1) * size < n ? (b + 1) * size : n;
        f(i, stop - i < elementwise_block ? stop - i : elementwise_block);
      }
  });
}

template <class scalar_t, class acc_t>
void loss_forward(const scalar_t* x, const scalar_t* t, const scalar_t* c, scalar_t* y, acc_t* sums, int64_t n,
                  int64_t kind, double a, int64_t block) {
  each_run(n, block, [&](int64_t i, int64_t count) {
    LossScratch<scalar_t, acc_t, 4> scratch;
    const LossBlock<acc_t> b{widened<acc_t>(x + i, count, scratch.row[0]), widened<acc_t>(t + i, count, scratch.row[1]),
                             c == nullptr ? nullptr : widened<acc_t>(c + i, count, scratch.row[2]), count};
    if (block > 1) {
      acc_t& to = sums[i / block];
      to = (i % block == 0 ? acc_t(0) : to) + loss_sum(kind, a, b);
      return;
    }
    if constexpr (!std::is_same_v<scalar_t, acc_t>) {
      loss_values(kind, a, b, scratch.row[3]);
      narrow(y + i, scratch.row[3], count);
    } else {
      loss_values(kind, a, b, y + i);
    }
  });
}

template <class scalar_t, class acc_t>
void loss_backward(const scalar_t* dy, const acc_t* of_sums, const scalar_t* x, const scalar_t* t, const scalar_t* c,
                   scalar_t* dx, scalar_t* dt, int64_t n, int64_t kind, double a, int64_t block) {
  each_run(n, block, [&](int64_t i, int64_t count) {
    LossScratch<scalar_t, acc_t, 6> scratch;
    const LossBlock<acc_t> b{widened<acc_t>(x + i, count, scratch.row[0]), widened<acc_t>(t + i, count, scratch.row[1]),
                             c == nullptr ? nullptr : widened<acc_t>(c + i, count, scratch.row[2]), count};
    const bool each = of_sums == nullptr;
    const acc_t* g = each ? widened<acc_t>(dy + i, count, scratch.row[3]) : of_sums + i / block;
    if constexpr (!std::is_same_v<scalar_t, acc_t>) {
      loss_slopes(kind, a, b, g, each, dx == nullptr ? nullptr : scratch.row[4],
                  dt == nullptr ? nullptr : scratch.row[5]);
      if (dx != nullptr) narrow(dx + i, scratch.row[4], count);
      if (dt != nullptr) narrow(dt + i, scratch.row[5], count);
    } else {
      loss_slopes(kind, a, b, g, each, dx == nullptr ? nullptr : dx + i, dt == nullptr ? nullptr : dt + i);
    }
  });
}

// ---- binding

Tensor elementwise_loss_fwd(const Tensor& x, const Tensor& t, const OptionalTensor& c, int64_t kind, double a,
                            int64_t block) {
  OpScope op("elementwise_loss_fwd", x);
  op.check(block >= 1 && kind >= 0 && kind < 8, "block must be positive and kind in [0, 8)");
  const int64_t n = x.numel(), blocks = ceil_div(n, block);
  return dispatch_floating(op, x.scalar_type(), [&]<class scalar_t>() {
    using acc_t = accumulate_t<scalar_t>;
    auto *px = op.in<scalar_t>(x, "x", ShapeRef(x)), *pt = op.in<scalar_t>(t, "t", ShapeRef(x));
    auto* pc = op.in_optional<scalar_t>(c, "c", ShapeRef(x));
    if (block == 1) {
      Tensor y = op.empty<scalar_t>(ShapeRef(x));
      loss_forward(px, pt, pc, op.out<scalar_t>(y, "y", ShapeRef(x)), static_cast<acc_t*>(nullptr), n, kind, a, block);
      return y;
    }
    Tensor y = op.empty<acc_t>({blocks});
    loss_forward(px, pt, pc, static_cast<scalar_t*>(nullptr), op.out<acc_t>(y, "y", {blocks}), n, kind, a, block);
    return y;
  });
}

std::tuple<Tensor, Tensor> elementwise_loss_bwd(const Tensor& dy, const Tensor& x, const Tensor& t,
                                                const OptionalTensor& c, int64_t kind, double a, int64_t block,
                                                bool need_dx, bool need_dt) {
  OpScope op("elementwise_loss_bwd", dy);
  op.check(block >= 1 && kind >= 0 && kind < 8, "block must be positive and kind in [0, 8)");
  const int64_t n = x.numel(), blocks = ceil_div(n, block);
  return dispatch_floating(op, x.scalar_type(), [&]<class scalar_t>() {
    using acc_t = accumulate_t<scalar_t>;
    Tensor dx = need_dx ? op.empty<scalar_t>(ShapeRef(x)) : op.empty<scalar_t>({0});
    Tensor dt = need_dt ? op.empty<scalar_t>(ShapeRef(x)) : op.empty<scalar_t>({0});
    auto* pdx = need_dx ? op.out<scalar_t>(dx, "dx", ShapeRef(x)) : nullptr;
    auto* pdt = need_dt ? op.out<scalar_t>(dt, "dt", ShapeRef(x)) : nullptr;
    const scalar_t* each = block == 1 ? op.in<scalar_t>(dy, "dy", ShapeRef(x)) : nullptr;
    const acc_t* sums = block == 1 ? nullptr : op.in<acc_t>(dy, "dy", {blocks});
    loss_backward(each, sums, op.in<scalar_t>(x, "x", ShapeRef(x)), op.in<scalar_t>(t, "t", ShapeRef(x)),
                  op.in_optional<scalar_t>(c, "c", ShapeRef(x)), pdx, pdt, n, kind, a, block);
    return std::tuple(dx, dt);
  });
}

PYOPS_LIBRARY(m) {
  PYOPS_IMPL(m, elementwise_loss_fwd);
  PYOPS_IMPL(m, elementwise_loss_bwd);
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY
