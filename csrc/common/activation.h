// The activation functions and their gradients, stated once for CPU vectors (cpu/math.h) and CUDA scalars
// (cuda/math.cuh), and the numbers by which they are chosen. To add one: a struct here, a line in with_activation, a
// branch in kernels/activation.py and a row in pyops/ops/activation.py.
//
// V is a vector or a scalar. value(x, p) is y; gradient(dy, x, p) is dx. Where the slope is 0 or 1 the gradient selects
// instead of multiplying, so that an infinite dy does not become NaN. Kinks fall on the side torch chooses, and so does
// NaN: where torch's vectors differ from its scalar tails and its GPU (elu, hardswish, hardtanh, the shrinks), as in its
// vectors. Hence comparisons are written so that NaN, for which all are false, takes the wanted branch.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace pyops::activation {

struct Parameters {
  double a = 0, b = 0, c = 0;
};

struct Relu {
  template <class V>
  static PYOPS_HOST_DEVICE V value(V x, Parameters) {
    return select(x <= V(0), V(0), x);
  }
  template <class V>
  static PYOPS_HOST_DEVICE V gradient(V dy, V x, Parameters) {
    return select(x <= V(0), V(0), dy);
  }
};

// a: slope below zero
struct LeakyRelu {
  template <class V>
  static PYOPS_HOST_DEVICE V value(V x, Parameters p) {
    return select(x > V(0), x, x * V(p.a));
  }
  template <class V>
  static PYOPS_HOST_DEVICE V gradient(V dy, V x, Parameters p) {
    return select(x > V(0), dy, dy * V(p.a));
  }
};

// a: height of the lower asymptote, b: scale of both sides, c: scale of x below zero; elu, selu and celu
struct Elu {
  template <class V>
  static PYOPS_HOST_DEVICE V value(V x, Parameters p) {
    return select(x <= V(0), V(p.a * p.b) * expm1(x * V(p.c)), x * V(p.b));
  }
  template <class V>
  static PYOPS_HOST_DEVICE V gradient(V dy, V x, Parameters p) {
    return select(x > V(0), dy * V(p.b), dy * V(p.a * p.b * p.c) * exp(x * V(p.c)));
  }
};

// x Φ(x), Φ the normal distribution function
struct Gelu {
  template <class V>
  static PYOPS_HOST_DEVICE V value(V x, Parameters) {
    return x * normal(x).cdf;
  }
  template <class V>
  static PYOPS_HOST_DEVICE V gradient(V dy, V x, Parameters) {
    const auto [cdf, density] = normal(x);
    return dy * (cdf + x * density);
  }
};

// 0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³)))
struct GeluTanh {
  static constexpr double k = 0.79788456080286535588, cubic = 0.044715;
  template <class V>
  static PYOPS_HOST_DEVICE V value(V x, Parameters) {
    return V(0.5) * x * (V(1) + tanh(V(k) * (x + V(cubic) * x * x * x)));
  }
  template <class V>
  static PYOPS_HOST_DEVICE V gradient(V dy, V x, Parameters) {
    const V square = x * x, t = tanh(V(k) * (x + V(cubic) * square * x));
    const V slope = V(k) * (V(1) + V(3 * cubic) * square);
    return dy * V(0.5) * ((V(1) + t) + x * (V(1) - t * t) * slope);
  }
};

struct Silu {
  template <class V>
  static PYOPS_HOST_DEVICE V value(V x, Parameters) {
    return x / (V(1) + exp(-x));
  }
  template <class V>
  static PYOPS_HOST_DEVICE V gradient(V dy, V x, Parameters) {
    const V s = sigmoid(x);
    return dy * s * (V(1) + x * (V(1) - s));
  }
};

// x tanh(log(1 + eˣ)) = x w / (w + 2), w = eˣ (eˣ + 2); from 20 on the quotient is 1 in double
struct Mish {
  template <class V>
  static PYOPS_HOST_DEVICE V power(V x) {
    return exp(select(x > V(20), V(20), x));
  }
  template <class V>
  static PYOPS_HOST_DEVICE V value(V x, Parameters) {
    const V e = power(x), w = e * (e + V(2));
    return x * (w / (w + V(2)));
  }
  template <class V>
  static PYOPS_HOST_DEVICE V gradient(V dy, V x, Parameters) {
    const V e = power(x), w = e * (e + V(2)), t = w / (w + V(2));
    return dy * (t + x * (V(1) - t * t) * (e / (V(1) + e)));
  }
};

struct Sigmoid {
  template <class V>
  static PYOPS_HOST_DEVICE V value(V x, Parameters) {
    return sigmoid(x);
  }
  template <class V>
  static PYOPS_HOST_DEVICE V gradient(V dy, V x, Parameters) {
    const V s = sigmoid(x);
    return dy * s * (V(1) - s);
  }
};

// min(max(x + 3, 0), 6) / 6
struct Hardsigmoid {
  template <class V>
  static PYOPS_HOST_DEVICE V value(V x, Parameters) {
    const V shifted = x + V(3);
    return select(shifted < V(0), V(0), select(shifted > V(6), V(6), shifted)) / V(6);
  }
  template <class V>
  static PYOPS_HOST_DEVICE V gradient(V dy, V x, Parameters) {
    return select(x > V(-3), select(x < V(3), dy / V(6), V(0)), V(0));
  }
};

// x hardsigmoid(x)
struct Hardswish {
  template <class V>
  static PYOPS_HOST_DEVICE V value(V x, Parameters p) {
    return x * Hardsigmoid::value(x, p);
  }
  template <class V>
  static PYOPS_HOST_DEVICE V gradient(V dy, V x, Parameters) {
    return select(x <= V(-3), V(0), select(x >= V(3), dy, dy * (x / V(3) + V(0.5))));
  }
};

// a: smallest, b: largest value; relu6 has 0 and 6
struct Hardtanh {
  template <class V>
  static PYOPS_HOST_DEVICE V value(V x, Parameters p) {
    return select(x < V(p.a), V(p.a), select(x > V(p.b), V(p.b), x));
  }
  template <class V>
  static PYOPS_HOST_DEVICE V gradient(V dy, V x, Parameters p) {
    return select(x > V(p.a), select(x < V(p.b), dy, V(0)), V(0));
  }
};

// a: beta, b: threshold; log(1 + exp(beta x)) / beta, x itself where beta x > threshold
struct Softplus {
  template <class V>
  static PYOPS_HOST_DEVICE V value(V x, Parameters p) {
    const V z = x * V(p.a);
    const V soft = select(z > V(0), z, V(0)) + log1p_unit(exp(-abs(z)));
    return select(z > V(p.b), x, soft / V(p.a));
  }
  template <class V>
  static PYOPS_HOST_DEVICE V gradient(V dy, V x, Parameters p) {
    const V z = x * V(p.a);
    return select(z > V(p.b), dy, dy * sigmoid(z));
  }
};

// x / (1 + |x|)
struct Softsign {
  template <class V>
  static PYOPS_HOST_DEVICE V value(V x, Parameters) {
    return x / (V(1) + abs(x));
  }
  template <class V>
  static PYOPS_HOST_DEVICE V gradient(V dy, V x, Parameters) {
    const V width = V(1) + abs(x);
    return dy / (width * width);
  }
};

struct Tanh {
  template <class V>
  static PYOPS_HOST_DEVICE V value(V x, Parameters) {
    return tanh(x);
  }
  template <class V>
  static PYOPS_HOST_DEVICE V gradient(V dy, V x, Parameters) {
    const V t = tanh(x);
    return dy * (V(1) - t * t);
  }
};

// log(sigmoid(x)) = min(x, 0) - log(1 + exp(-|x|))
struct Logsigmoid {
  template <class V>
  static PYOPS_HOST_DEVICE V value(V x, Parameters) {
    return select(x > V(0), V(0), x) - log1p_unit(exp(-abs(x)));
  }
  template <class V>
  static PYOPS_HOST_DEVICE V gradient(V dy, V x, Parameters) {
    const V e = exp(-abs(x));
    return dy * (select(x < V(0), V(1), e) / (V(1) + e));
  }
};

// a: half width of the band that becomes 0
struct Hardshrink {
  template <class V>
  static PYOPS_HOST_DEVICE V value(V x, Parameters p) {
    return select(abs(x) <= V(p.a), V(0), x);
  }
  template <class V>
  static PYOPS_HOST_DEVICE V gradient(V dy, V x, Parameters p) {
    return select(abs(x) > V(p.a), dy, V(0));
  }
};

// a: half width of the band that becomes 0; what lies outside moves towards 0 by a
struct Softshrink {
  template <class V>
  static PYOPS_HOST_DEVICE V value(V x, Parameters p) {
    return select(x > V(p.a), x - V(p.a), select(x < V(-p.a), x + V(p.a), x * V(0)));
  }
  template <class V>
  static PYOPS_HOST_DEVICE V gradient(V dy, V x, Parameters p) {
    return select(abs(x) > V(p.a), dy, V(0));
  }
};

// x - tanh(x)
struct Tanhshrink {
  template <class V>
  static PYOPS_HOST_DEVICE V value(V x, Parameters) {
    return x - tanh(x);
  }
  template <class V>
  static PYOPS_HOST_DEVICE V gradient(V dy, V x, Parameters) {
    const V t = tanh(x);
    return dy * (t * t);
  }
};

// a: threshold, b: what replaces values up to it
struct Threshold {
  template <class V>
  static PYOPS_HOST_DEVICE V value(V x, Parameters p) {
    return select(x <= V(p.a), V(p.b), x);
  }
  template <class V>
  static PYOPS_HOST_DEVICE V gradient(V dy, V x, Parameters p) {
    return select(x <= V(p.a), V(0), dy);
  }
};

inline constexpr int64_t kinds = 19;

// For bindings; a template, so that this header knows nothing of torch.
template <class Scope>
void check_kind(const Scope& op, int64_t kind) {
  op.check(kind >= 0 && kind < kinds, "kind must be in [0, ", kinds, "), got ", kind);
}

// Calls f.template operator()<F>() for the function of this number, 0 <= kind < kinds.
template <class F>
PYOPS_HOST_DEVICE void with_activation(int kind, F&& f) {
  switch (kind) {
    case 0:
      return f.template operator()<Relu>();
    case 1:
      return f.template operator()<LeakyRelu>();
    case 2:
      return f.template operator()<Elu>();
    case 3:
      return f.template operator()<Gelu>();
    case 4:
      return f.template operator()<GeluTanh>();
    case 5:
      return f.template operator()<Silu>();
    case 6:
      return f.template operator()<Mish>();
    case 7:
      return f.template operator()<Sigmoid>();
    case 8:
      return f.template operator()<Hardsigmoid>();
    case 9:
      return f.template operator()<Hardswish>();
    case 10:
      return f.template operator()<Hardtanh>();
    case 11:
      return f.template operator()<Softplus>();
    case 12:
      return f.template operator()<Softsign>();
    case 13:
      return f.template operator()<Tanh>();
    case 14:
      return f.template operator()<Logsigmoid>();
    case 15:
      return f.template operator()<Hardshrink>();
    case 16:
      return f.template operator()<Softshrink>();
    case 17:
      return f.template operator()<Tanhshrink>();
    default:
      return f.template operator()<Threshold>();
  }
}

}  // namespace pyops::activation
