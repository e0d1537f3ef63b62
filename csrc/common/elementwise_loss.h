// The losses of single elements and their slopes, stated once for CPU vectors (cpu/math.h) and CUDA scalars
// (cuda/math.cuh), and the numbers by which they are chosen. To add one: a struct here, a line in with_loss, a branch
// in kernels/elementwise_loss.py and a row in pyops/ops/elementwise_loss.py.
//
// x is the input, t the target, c the weight of positive targets (1 where there is none), a a parameter of the loss.
// slope(x, t, ..., dx, dt) sets the derivatives in x and t. V is a vector or a scalar.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace pyops::elementwise_loss {

// 0 for 0 and, as torch has it, for NaN
template <class V>
PYOPS_HOST_DEVICE V sign_of(V d) {
  return select(d > V(0), V(1), select(d < V(0), V(-1), V(0)));
}

struct Mse {
  template <class V>
  static PYOPS_HOST_DEVICE V value(V x, V t, V, double) {
    const V d = x - t;
    return d * d;
  }
  template <class V>
  static PYOPS_HOST_DEVICE void slope(V x, V t, V, double, V& dx, V& dt) {
    dx = V(2) * (x - t);
    dt = -dx;
  }
};

struct L1 {
  template <class V>
  static PYOPS_HOST_DEVICE V value(V x, V t, V, double) {
    return abs(x - t);
  }
  template <class V>
  static PYOPS_HOST_DEVICE void slope(V x, V t, V, double, V& dx, V& dt) {
    dx = sign_of(x - t);
    dt = -dx;
  }
};

// a: where the parabola ends; its top is scaled to slope 1
struct SmoothL1 {
  template <class V>
  static PYOPS_HOST_DEVICE V value(V x, V t, V, double a) {
    const V d = abs(x - t);
    return select(d < V(a), V(0.5) * d * d / V(a), d - V(0.5 * a));
  }
  template <class V>
  static PYOPS_HOST_DEVICE void slope(V x, V t, V, double a, V& dx, V& dt) {
    const V d = x - t;
    dx = select(abs(d) >= V(a), sign_of(d), d / V(a));
    dt = -dx;
  }
};

// a: where the parabola of curvature 1 ends
struct Huber {
  template <class V>
  static PYOPS_HOST_DEVICE V value(V x, V t, V, double a) {
    const V d = abs(x - t);
    return select(d <= V(a), V(0.5) * d * d, V(a) * (d - V(0.5 * a)));
  }
  template <class V>
  static PYOPS_HOST_DEVICE void slope(V x, V t, V, double a, V& dx, V& dt) {
    const V d = x - t;
    dx = select(abs(d) >= V(a), V(a) * sign_of(d), d);
    dt = -dx;
  }
};

// -(t log x + (1 - t) log(1 - x)), logarithms at least -100
struct Bce {
  // log(1 - x) for x in [0, 1], where 1 - x would round away a small x
  template <class V>
  static PYOPS_HOST_DEVICE V log_of_rest(V x) {
    return select(x > V(0.5), log(V(1) - x), -log1p_unit(select(x > V(0.5), V(0), x / (V(1) - x))));
  }
  template <class V>
  static PYOPS_HOST_DEVICE V at_least(V v, double low) {
    return select(v < V(low), V(low), v);
  }
  template <class V>
  static PYOPS_HOST_DEVICE V value(V x, V t, V, double) {
    return (t - V(1)) * at_least(log_of_rest(x), -100) - t * at_least(log(x), -100);
  }
  template <class V>
  static PYOPS_HOST_DEVICE void slope(V x, V t, V, double, V& dx, V& dt) {
    dx = (x - t) / at_least((V(1) - x) * x, 1e-12);
    dt = at_least(log_of_rest(x), -100) - at_least(log(x), -100);
  }
};

// (1 - t) x + (1 + (c - 1) t) log(1 + exp(-x))
struct BceWithLogits {
  template <class V>
  static PYOPS_HOST_DEVICE V value(V x, V t, V c, double) {
    const V soft = select(x > V(0), V(0), -x) + log1p_unit(exp(-abs(x)));
    return (V(1) - t) * x + (V(1) + (c - V(1)) * t) * soft;
  }
  template <class V>
  static PYOPS_HOST_DEVICE void slope(V x, V t, V c, double, V& dx, V& dt) {
    const V soft = select(x > V(0), V(0), -x) + log1p_unit(exp(-abs(x)));
    // 1 - p = sigmoid(-x) keeps its digits where p is nearly 1
    dx = (V(1) - t) - (V(1) + (c - V(1)) * t) * sigmoid(-x);
    const V more = c - V(1);  // 0 without weights, also beside an infinite logarithm
    dt = select(abs(more) > V(0), more * soft, more) - x;
  }
};

// t (log t - x), 0 where t is 0
struct KlDiv {
  template <class V>
  static PYOPS_HOST_DEVICE V value(V x, V t, V, double) {
    return select(t > V(0), t * log(t), select(t < V(0), log(t), t)) - t * x;
  }
  template <class V>
  static PYOPS_HOST_DEVICE void slope(V x, V t, V, double, V& dx, V& dt) {
    dx = -t;
    dt = log(t) + V(1) - x;
  }
};

// exp(t) (t - x)
struct KlDivLogTarget {
  template <class V>
  static PYOPS_HOST_DEVICE V value(V x, V t, V, double) {
    return exp(t) * (t - x);
  }
  template <class V>
  static PYOPS_HOST_DEVICE void slope(V x, V t, V, double, V& dx, V& dt) {
    const V e = exp(t);
    dx = -e;
    dt = e * (t - x + V(1));
  }
};

// Calls f.operator()<Loss>() for the loss of this number.
template <class F>
PYOPS_HOST_DEVICE void with_loss(int64_t kind, F&& f) {
  switch (kind) {
    case 0:
      return f.template operator()<Mse>();
    case 1:
      return f.template operator()<L1>();
    case 2:
      return f.template operator()<SmoothL1>();
    case 3:
      return f.template operator()<Huber>();
    case 4:
      return f.template operator()<Bce>();
    case 5:
      return f.template operator()<BceWithLogits>();
    case 6:
      return f.template operator()<KlDiv>();
    default:
      return f.template operator()<KlDivLogTarget>();
  }
}

}  // namespace pyops::elementwise_loss
