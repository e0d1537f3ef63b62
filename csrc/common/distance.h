// The metrics, stated once for CPU vectors (cpu/math.h) and CUDA scalars (cuda/math.cuh): dist = finish(sum over m of
// term(d[m])), d = x1 - x2; for the largest difference `sum` is a maximum. The gradient of dy * dist in d[m] is
// factor(dy, dist) * along(d[m], dist): what does not depend on m is a factor.
//
// At dist = 0 the gradient is 0, as in torch: the distance has a kink there.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace pyops::distance {

// Number of entries that differ.
struct Zero {
  template <class A>
  PYOPS_HOST_DEVICE A factor(A dy, A) const {
    return dy;
  }
  template <class V>
  PYOPS_HOST_DEVICE V add(V sum, V d) const {
    return sum + select(d > V(0), V(1), select(d < V(0), V(1), d - d));
  }
  template <class V>
  PYOPS_HOST_DEVICE V finish(V sum) const {
    return sum;
  }
  template <class V>
  PYOPS_HOST_DEVICE V along(V, V) const {
    return V(0);
  }
};

struct One {
  template <class A>
  PYOPS_HOST_DEVICE A factor(A dy, A) const {
    return dy;
  }
  template <class V>
  PYOPS_HOST_DEVICE V add(V sum, V d) const {
    return sum + abs(d);
  }
  template <class V>
  PYOPS_HOST_DEVICE V finish(V sum) const {
    return sum;
  }
  template <class V>
  PYOPS_HOST_DEVICE V along(V d, V) const {
    return select(d > V(0), V(1), select(d < V(0), V(-1), d));
  }
};

struct Two {
  template <class V>
  PYOPS_HOST_DEVICE V add(V sum, V d) const {
    return sum + d * d;
  }
  template <class V>
  PYOPS_HOST_DEVICE V finish(V sum) const {
    return sqrt(sum);
  }
  template <class A>
  PYOPS_HOST_DEVICE A factor(A dy, A dist) const {
    return dist <= A(0) ? A(0) : dy / dist;
  }
  template <class V>
  PYOPS_HOST_DEVICE V along(V d, V) const {
    return d;
  }
};

// Every entry that has the largest difference gets the whole slope, as in torch.
struct Infinity {
  template <class A>
  PYOPS_HOST_DEVICE A factor(A dy, A) const {
    return dy;
  }
  template <class V>
  PYOPS_HOST_DEVICE V add(V sum, V d) const {
    const V a = abs(d);
    return select(sum >= a, sum, a + (sum - sum));  // a NaN on either side stays
  }
  template <class V>
  PYOPS_HOST_DEVICE V finish(V sum) const {
    return sum;
  }
  template <class V>
  PYOPS_HOST_DEVICE V along(V d, V dist) const {
    return select(abs(d) >= dist, One().along(d, dist), V(0));
  }
};

struct General {
  double p;
  template <class A>
  PYOPS_HOST_DEVICE A factor(A dy, A) const {
    return dy;
  }
  template <class V>
  static PYOPS_HOST_DEVICE V power(V x, double e) {
    return select(x <= V(0), V(0), exp(log(x) * V(e)));
  }
  template <class V>
  PYOPS_HOST_DEVICE V add(V sum, V d) const {
    return sum + power(abs(d), p);
  }
  template <class V>
  PYOPS_HOST_DEVICE V finish(V sum) const {
    return power(sum, 1 / p);
  }
  template <class V>
  PYOPS_HOST_DEVICE V along(V d, V dist) const {
    return select(dist <= V(0), V(0), One().along(d, dist) * power(abs(d) / dist, p - 1));
  }
};

template <class F>
decltype(auto) with_metric(double p, F&& f) {
  if (p == 0) return f(Zero());
  if (p == 1) return f(One());
  if (p == 2) return f(Two());
  if (p > 1e300) return f(Infinity());
  return f(General{p});
}

}  // namespace pyops::distance
