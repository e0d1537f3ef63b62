// Overlap of two boxes and its gradient: IoU, generalised, distance and complete IoU. Derived in
// docs/math/detection.md.
//
//   iou = I / U          I intersection, U = A1 + A2 - I union
//   generalised  iou - (C - U) / C                         C area of the enclosing box
//   distance     iou - D / G                               D squared distance of centres, G squared diagonal + eps
//   complete     distance - alpha v                        v = 4/pi^2 (atan(w1/h1) - atan(w2/h2))^2, alpha constant
//
// At ties of max and min both sides get half the gradient, as in torch. NaN in, NaN out.
#pragma once

#include <cmath>

#include "common/host_device.h"

#if defined(__CUDACC__)
#define PYOPS_PAIR PYOPS_HOST_DEVICE
#else
// Compiled for several instruction sets: it must not survive as a symbol that one build lends another.
#define PYOPS_PAIR inline __attribute__((always_inline))
#endif

namespace pyops::overlap {

enum Kind : int { iou = 0, generalized = 1, distance = 2, complete = 3 };

template <class A>
struct Box {
  A x1, y1, x2, y2;
  A angle;  // atan(width / height); complete IoU only
};

template <class A>
PYOPS_PAIR A larger(A a, A b) {
  return a > b || a != a ? a : b;
}
template <class A>
PYOPS_PAIR A smaller(A a, A b) {
  return a < b || a != a ? a : b;
}
template <class A>
PYOPS_PAIR A at_least_zero(A a) {
  return a < A(0) ? A(0) : a;
}
// Share of the gradient of max(a, b) that a gets.
template <class A>
PYOPS_PAIR A share(A a, A b) {
  return a > b ? A(1) : (a == b ? A(0.5) : A(0));
}

template <int K, class A>
PYOPS_PAIR A pair_fwd(const Box<A>& a, const Box<A>& b, A eps) {
  const A iw = at_least_zero(smaller(a.x2, b.x2) - larger(a.x1, b.x1));
  const A ih = at_least_zero(smaller(a.y2, b.y2) - larger(a.y1, b.y1));
  const A I = iw * ih;
  const A U = (a.x2 - a.x1) * (a.y2 - a.y1) + (b.x2 - b.x1) * (b.y2 - b.y1) - I;
  const A y = I / U;
  if constexpr (K == iou) return y;
  const A cw = at_least_zero(larger(a.x2, b.x2) - smaller(a.x1, b.x1));
  const A ch = at_least_zero(larger(a.y2, b.y2) - smaller(a.y1, b.y1));
  if constexpr (K == generalized) return y - (cw * ch - U) / (cw * ch);
  const A dx = (a.x1 + a.x2 - b.x1 - b.x2) / A(2), dy = (a.y1 + a.y2 - b.y1 - b.y2) / A(2);
  const A d = y - (dx * dx + dy * dy) / (cw * cw + ch * ch + eps);
  if constexpr (K == distance) return d;
  const A turn = a.angle - b.angle, v = A(0.40528473456935108578) * turn * turn;
  return d - v / (A(1) - y + v + eps) * v;
}

// Adds g * d(overlap)/da to da[x1, y1, x2, y2] and the same of b to db.
template <int K, class A>
PYOPS_PAIR void pair_bwd(const Box<A>& a, const Box<A>& b, A eps, A g, A (&da)[4], A (&db)[4]) {
  const A left = larger(a.x1, b.x1), top = larger(a.y1, b.y1);
  const A iw0 = smaller(a.x2, b.x2) - left, ih0 = smaller(a.y2, b.y2) - top;
  const A iw = at_least_zero(iw0), ih = at_least_zero(ih0), I = iw * ih;
  const A aw = a.x2 - a.x1, ah = a.y2 - a.y1, bw = b.x2 - b.x1, bh = b.y2 - b.y1;
  const A U = aw * ah + bw * bh - I;
  const A cw0 = larger(a.x2, b.x2) - smaller(a.x1, b.x1), ch0 = larger(a.y2, b.y2) - smaller(a.y1, b.y1);
  const A cw = at_least_zero(cw0), ch = at_least_zero(ch0);
  A gU = -g * I / (U * U), gcw = 0, gch = 0;
  if constexpr (K == generalized) {
    const A C = cw * ch;
    gU += g / C;
    const A gC = -g * U / (C * C);
    gcw = gC * ch;
    gch = gC * cw;
  }
  A gx = 0, gy = 0;  // gradient of the distance of centres: each of x1, x2 gets gx
  A gaw = gU * ah, gah = gU * aw, gbw = gU * bh, gbh = gU * bw;
  if constexpr (K >= distance) {
    const A dx = (a.x1 + a.x2 - b.x1 - b.x2) / A(2), dy = (a.y1 + a.y2 - b.y1 - b.y2) / A(2);
    const A D = dx * dx + dy * dy, G = cw * cw + ch * ch + eps;
    gcw = A(2) * cw * g * D / (G * G);
    gch = A(2) * ch * g * D / (G * G);
    gx = -g / G * dx;
    gy = -g / G * dy;
  }
  if constexpr (K == complete) {
    const A turn = a.angle - b.angle, v = A(0.40528473456935108578) * turn * turn;
    const A alpha = v / (A(1) - I / U + v + eps);
    const A gt = -g * alpha * A(2 * 0.40528473456935108578) * turn;
    const A ra = gt / (aw * aw + ah * ah), rb = gt / (bw * bw + bh * bh);
    gaw += ra * ah;
    gah -= ra * aw;
    gbw -= rb * bh;
    gbh += rb * bw;
  }
  const A gI = g / U - gU;
  const A giw = iw0 >= A(0) ? gI * ih : A(0), gih = ih0 >= A(0) ? gI * iw : A(0);
  gcw = cw0 >= A(0) ? gcw : A(0);
  gch = ch0 >= A(0) ? gch : A(0);
  const A x1 = share(a.x1, b.x1), y1 = share(a.y1, b.y1), x2 = share(a.x2, b.x2), y2 = share(a.y2, b.y2);
  da[0] += -giw * x1 - gcw * (A(1) - x1) - gaw + gx;
  da[1] += -gih * y1 - gch * (A(1) - y1) - gah + gy;
  da[2] += giw * (A(1) - x2) + gcw * x2 + gaw + gx;
  da[3] += gih * (A(1) - y2) + gch * y2 + gah + gy;
  db[0] += -giw * (A(1) - x1) - gcw * x1 - gbw - gx;
  db[1] += -gih * (A(1) - y1) - gch * y1 - gbh - gy;
  db[2] += giw * x2 + gcw * (A(1) - x2) + gbw - gx;
  db[3] += gih * y2 + gch * (A(1) - y2) + gbh - gy;
}

// Calls f.template operator()<K>() for the kind.
template <class F>
void with_kind(int64_t kind, F&& f) {
  switch (kind) {
    case generalized:
      return f.template operator()<generalized>();
    case distance:
      return f.template operator()<distance>();
    case complete:
      return f.template operator()<complete>();
    default:
      return f.template operator()<iou>();
  }
}

}  // namespace pyops::overlap
