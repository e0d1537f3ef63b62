// elementwise_loss · CPU
//   y[i] = l(x[i], t[i]);  dx[i] = g l_x(x[i], t[i]),  dt[i] = g l_t(x[i], t[i]),  g = dy[i];
//   reduced: y = (Σ_i l(x[i], t[i])) / over,  g = dy / over;  l by number, common/elementwise_loss.h
// layout   x, t, c, dx, dt: n elements of any shape · y, dy: as many, or reduced one
// mapping  a thread takes blocks; lanes over elements
// memory   every input read once, every output written once; of a sum, one number for a block
// numerics acc_t; sums of a block in acc_t, over blocks in double, both in fixed order; rounded once
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

// f(first, count) over runs that a scratch block holds.
template <class F>
void each_run(int64_t n, const F& f) {
  constexpr int64_t size = elementwise_block;
  parallel_for(ceil_div(n, size), elementwise_grain / size, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * size; i < end * size; i += size) f(i, n - i < size ? n - i : size);
  });
}

template <class scalar_t, class acc_t>
void loss_forward(const scalar_t* x, const scalar_t* t, const scalar_t* c, scalar_t* y, int64_t n, int64_t kind,
                  double a) {
  each_run(n, [&](int64_t i, int64_t count) {
    LossScratch<scalar_t, acc_t, 4> scratch;
    const LossBlock<acc_t> b{widened<acc_t>(x + i, count, scratch.row[0]), widened<acc_t>(t + i, count, scratch.row[1]),
                             c == nullptr ? nullptr : widened<acc_t>(c + i, count, scratch.row[2]), count};
    if constexpr (!std::is_same_v<scalar_t, acc_t>) {
      loss_values(kind, a, b, scratch.row[3]);
      narrow(y + i, scratch.row[3], count);
    } else {
      loss_values(kind, a, b, y + i);
    }
  });
}

// The sum over n elements: those of runs in acc_t, kept one by one, so that it is the same for any number of threads.
template <class scalar_t, class acc_t>
double loss_total(const scalar_t* x, const scalar_t* t, const scalar_t* c, int64_t n, int64_t kind, double a) {
  const auto of_run = [&](int64_t i, int64_t count) {
    LossScratch<scalar_t, acc_t, 3> scratch;
    return loss_sum(
        kind, a,
        LossBlock<acc_t>{widened<acc_t>(x + i, count, scratch.row[0]), widened<acc_t>(t + i, count, scratch.row[1]),
                         c == nullptr ? nullptr : widened<acc_t>(c + i, count, scratch.row[2]), count});
  };
  if (n <= elementwise_block) return double(of_run(0, n));
  const int64_t runs = ceil_div(n, elementwise_block);
  Buffer<acc_t> sums(runs);
  each_run(n, [&](int64_t i, int64_t count) { sums[i / elementwise_block] = of_run(i, count); });
  double total = 0;
  for (int64_t r = 0; r < runs; ++r) total += double(sums[r]);
  return total;
}

// dy: a cotangent for each element, or null and `g` for all.
template <class scalar_t, class acc_t>
void loss_backward(const scalar_t* dy, acc_t g, const scalar_t* x, const scalar_t* t, const scalar_t* c, scalar_t* dx,
                   scalar_t* dt, int64_t n, int64_t kind, double a) {
  each_run(n, [&](int64_t i, int64_t count) {
    LossScratch<scalar_t, acc_t, 6> scratch;
    const LossBlock<acc_t> b{widened<acc_t>(x + i, count, scratch.row[0]), widened<acc_t>(t + i, count, scratch.row[1]),
                             c == nullptr ? nullptr : widened<acc_t>(c + i, count, scratch.row[2]), count};
    const bool each = dy != nullptr;
    const acc_t* of = each ? widened<acc_t>(dy + i, count, scratch.row[3]) : &g;
    if constexpr (!std::is_same_v<scalar_t, acc_t>) {
      loss_slopes(kind, a, b, of, each, dx == nullptr ? nullptr : scratch.row[4],
                  dt == nullptr ? nullptr : scratch.row[5]);
      if (dx != nullptr) narrow(dx + i, scratch.row[4], count);
      if (dt != nullptr) narrow(dt + i, scratch.row[5], count);
    } else {
      loss_slopes(kind, a, b, of, each, dx == nullptr ? nullptr : dx + i, dt == nullptr ? nullptr : dt + i);
    }
  });
}

// ---- binding

Tensor elementwise_loss_fwd(const Tensor& x, const Tensor& t, const OptionalTensor& c, int64_t kind, double a,
                            bool reduced, int64_t over) {
  OpScope op("elementwise_loss_fwd", x);
  op.check(kind >= 0 && kind < 8, "kind must be in [0, 8)");
  const int64_t n = x.numel();
  return dispatch_floating(op, x.scalar_type(), [&]<class scalar_t>() {
    using acc_t = accumulate_t<scalar_t>;
    auto *px = op.in<scalar_t>(x, "x", ShapeRef(x)), *pt = op.in<scalar_t>(t, "t", ShapeRef(x));
    auto* pc = op.in_optional<scalar_t>(c, "c", ShapeRef(x));
    Tensor y = reduced ? op.empty<scalar_t>({}) : op.empty<scalar_t>(ShapeRef(x));
    if (reduced)
      // of no elements the mean is 0 / 0
      *op.out<scalar_t>(y, "y", {}) =
          scalar_t(acc_t(loss_total<scalar_t, acc_t>(px, pt, pc, n, kind, a) / double(over)));
    else
      loss_forward<scalar_t, acc_t>(px, pt, pc, op.out<scalar_t>(y, "y", ShapeRef(x)), n, kind, a);
    return y;
  });
}

std::tuple<Tensor, Tensor> elementwise_loss_bwd(const Tensor& dy, const Tensor& x, const Tensor& t,
                                                const OptionalTensor& c, int64_t kind, double a, bool reduced,
                                                int64_t over, bool need_dx, bool need_dt) {
  OpScope op("elementwise_loss_bwd", dy);
  op.check(kind >= 0 && kind < 8, "kind must be in [0, 8)");
  const int64_t n = x.numel();
  return dispatch_floating(op, x.scalar_type(), [&]<class scalar_t>() {
    using acc_t = accumulate_t<scalar_t>;
    Tensor dx = need_dx ? op.empty<scalar_t>(ShapeRef(x)) : op.empty<scalar_t>({0});
    Tensor dt = need_dt ? op.empty<scalar_t>(ShapeRef(x)) : op.empty<scalar_t>({0});
    auto* pdx = need_dx ? op.out<scalar_t>(dx, "dx", ShapeRef(x)) : nullptr;
    auto* pdt = need_dt ? op.out<scalar_t>(dt, "dt", ShapeRef(x)) : nullptr;
    const scalar_t* pdy = reduced ? op.in<scalar_t>(dy, "dy", {}) : op.in<scalar_t>(dy, "dy", ShapeRef(x));
    loss_backward<scalar_t, acc_t>(reduced ? nullptr : pdy, reduced ? acc_t(acc_t(*pdy) / double(over)) : acc_t(0),
                                   op.in<scalar_t>(x, "x", ShapeRef(x)), op.in<scalar_t>(t, "t", ShapeRef(x)),
                                   op.in_optional<scalar_t>(c, "c", ShapeRef(x)), pdx, pdt, n, kind, a);
    return std::tuple(dx, dt);
  });
}

PYOPS_LIBRARY(m) {
  PYOPS_IMPL(m, elementwise_loss_fwd);
  PYOPS_IMPL(m, elementwise_loss_bwd);
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY
