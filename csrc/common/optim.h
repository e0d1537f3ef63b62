// The update rules of the optimizers, stated once for CPU vectors (cpu/math.h) and CUDA scalars (cuda/math.cuh), and
// the numbers of a call. docs/math/optimizers.md has the formulas and their sources.
//
// A rule holds its hyperparameters in the type of the arithmetic, A: differences such as 1 - beta are taken in double
// before they are rounded. update(p, g, s, pace) changes the parameter p and the states s[0..states) of one element (V
// a vector or a scalar); pace(step, lr) is what the number of the step makes of the learning rate.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace pyops::optim {

// size: step length; root: factor of the root of the second moment; decay: factor of the parameter before the step
template <class A>
struct Pace {
  A size = 0, root = 1, decay = 1;
};

// v <- momentum v + (1 - dampening) g,  p <- p - lr (nesterov ? g + momentum v : v)
template <class A>
struct Sgd {
  static constexpr int states = 1;
  A momentum, keep, weight_decay;
  bool nesterov, first;  // first: v <- g

  Sgd(double momentum, double dampening, double weight_decay, bool nesterov, bool first)
      : momentum(A(momentum)),
        keep(A(1 - dampening)),
        weight_decay(A(weight_decay)),
        nesterov(nesterov),
        first(first) {}
  PYOPS_HOST_DEVICE Pace<A> pace(double, double lr) const { return {A(lr), 1, 1}; }
  PYOPS_HOST_DEVICE bool uses(int) const { return momentum != A(0); }
  template <class V>
  PYOPS_HOST_DEVICE void update(V& p, V g, V* s, const Pace<A>& pace) const {
    if (weight_decay != A(0)) g = g + p * V(weight_decay);
    if (momentum != A(0)) {
      s[0] = first ? g : s[0] * V(momentum) + g * V(keep);
      g = nesterov ? g + s[0] * V(momentum) : s[0];
    }
    p = p - g * V(pace.size);
  }
};

// sum <- sum + g²,  p <- p - lr / (1 + (t - 1) lr_decay) g / (√sum + eps)
template <class A>
struct Adagrad {
  static constexpr int states = 1;
  A weight_decay, eps;
  double lr_decay;

  Adagrad(double lr_decay, double weight_decay, double eps)
      : weight_decay(A(weight_decay)), eps(A(eps)), lr_decay(lr_decay) {}
  PYOPS_HOST_DEVICE Pace<A> pace(double step, double lr) const { return {A(lr / (1 + (step - 1) * lr_decay)), 1, 1}; }
  PYOPS_HOST_DEVICE bool uses(int) const { return true; }
  template <class V>
  PYOPS_HOST_DEVICE void update(V& p, V g, V* s, const Pace<A>& pace) const {
    if (weight_decay != A(0)) g = g + p * V(weight_decay);
    s[0] = s[0] + g * g;
    p = p - V(pace.size) * g / (sqrt(s[0]) + V(eps));
  }
};

// v <- alpha v + (1 - alpha) g²,  m <- alpha m + (1 - alpha) g where centered,
// u = g / (√(v - m²) + eps),  b <- momentum b + u,  p <- p - lr (momentum > 0 ? b : u)
template <class A>
struct RmsProp {
  static constexpr int states = 3;  // v, b, m
  A alpha, keep, eps, weight_decay, momentum;
  bool centered;

  RmsProp(double alpha, double eps, double weight_decay, double momentum, bool centered)
      : alpha(A(alpha)),
        keep(A(1 - alpha)),
        eps(A(eps)),
        weight_decay(A(weight_decay)),
        momentum(A(momentum)),
        centered(centered) {}
  PYOPS_HOST_DEVICE Pace<A> pace(double, double lr) const { return {A(lr), 1, 1}; }
  PYOPS_HOST_DEVICE bool uses(int state) const { return state == 0 || (state == 1 ? momentum > A(0) : centered); }
  template <class V>
  PYOPS_HOST_DEVICE void update(V& p, V g, V* s, const Pace<A>& pace) const {
    if (weight_decay != A(0)) g = g + p * V(weight_decay);
    s[0] = s[0] * V(alpha) + g * g * V(keep);
    V square = s[0];
    if (centered) {
      s[2] = s[2] + (g - s[2]) * V(keep);
      square = square - s[2] * s[2];
    }
    V u = g / (sqrt(square) + V(eps));
    if (momentum > A(0)) u = s[1] = s[1] * V(momentum) + u;
    p = p - u * V(pace.size);
  }
};

// m <- beta1 m + (1 - beta1) g,  v <- beta2 v + (1 - beta2) g²,  w <- max(w, v) where amsgrad, else v
// p <- p - lr / (1 - beta1^t) m / (√(w / (1 - beta2^t)) + eps)
// weight decay: g <- g + λ p, or p <- (1 - lr λ) p where decoupled
template <class A>
struct Adam {
  static constexpr int states = 3;  // m, v, w
  A keep1, beta2, keep2, eps, weight_decay;
  double beta1_, beta2_, weight_decay_;
  bool amsgrad, decoupled;

  Adam(double beta1, double beta2, double eps, double weight_decay, bool amsgrad, bool decoupled)
      : keep1(A(1 - beta1)),
        beta2(A(beta2)),
        keep2(A(1 - beta2)),
        eps(A(eps)),
        weight_decay(A(decoupled ? 0 : weight_decay)),
        beta1_(beta1),
        beta2_(beta2),
        weight_decay_(decoupled ? weight_decay : 0),
        amsgrad(amsgrad),
        decoupled(decoupled) {}
  PYOPS_HOST_DEVICE Pace<A> pace(double step, double lr) const {
    return {A(lr / (1 - ::pow(beta1_, step))), A(1 / ::sqrt(1 - ::pow(beta2_, step))), A(1 - lr * weight_decay_)};
  }
  PYOPS_HOST_DEVICE bool uses(int state) const { return state < 2 || amsgrad; }
  template <class V>
  PYOPS_HOST_DEVICE void update(V& p, V g, V* s, const Pace<A>& pace) const {
    if (weight_decay != A(0)) g = g + p * V(weight_decay);
    if (decoupled) p = p * V(pace.decay);
    s[0] = s[0] + (g - s[0]) * V(keep1);
    s[1] = s[1] * V(beta2) + g * g * V(keep2);
    V square = s[1];
    if (amsgrad) square = s[2] = select(s[2] > s[1], s[2], s[1]);  // v keeps a NaN, so w need not
    p = p - V(pace.size) * s[0] / (sqrt(square) * V(pace.root) + V(eps));
  }
};

inline constexpr int most_states = 3;

// What is done to a gradient before the rule sees it, from numbers that may live on the device.
struct Scaling {
  const float* grad_scale = nullptr;   // the gradient is divided by it, and written back so
  const float* found_inf = nullptr;    // not 0: the whole step is left out
  const double* total_norm = nullptr;  // of the gradients as they came
  double max_norm = 0;                 // clips to it, where total_norm is given
  bool maximize = false;

  PYOPS_HOST_DEVICE bool skips() const { return found_inf != nullptr && *found_inf != 0.0f; }
  PYOPS_HOST_DEVICE double unscale() const { return grad_scale != nullptr ? 1.0 / double(*grad_scale) : 1.0; }
  // Factor of the unscaled gradient: min(1, max_norm / (norm + 1e-6)) as in torch, and the sign of the direction.
  PYOPS_HOST_DEVICE double clip() const {
    double factor = 1;
    if (total_norm != nullptr) {
      factor = max_norm / (*total_norm * unscale() + 1e-6);
      factor = factor > 1 ? 1 : factor;  // NaN stays
    }
    return maximize ? -factor : factor;
  }
};

}  // namespace pyops::optim
