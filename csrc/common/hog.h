// Histogram of oriented gradients: what a pixel votes for, and the norms of blocks. docs/math/images.md derives them.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace pyops::hog {

enum Norm : int64_t { l1, l1_sqrt, l2, l2_hys, norms };

inline constexpr int64_t most_orientations = 64;
inline constexpr double epsilon = 1e-5, limit = 0.2;

struct Sizes {
  int64_t N, C, H, W, O;
  int64_t pixel, plane;                          // distance in memory of neighbours in a row, and of channels
  int64_t cell_h, cell_w, cells_h, cells_w;      // pixels of a cell, cells of an image
  int64_t block_h, block_w, blocks_h, blocks_w;  // cells of a block, blocks of an image

  PYOPS_HOST_DEVICE int64_t cells() const { return N * cells_h * cells_w; }
  PYOPS_HOST_DEVICE int64_t blocks() const { return N * blocks_h * blocks_w; }
  PYOPS_HOST_DEVICE int64_t values() const { return block_h * block_w * O; }  // of a block

  PYOPS_HOST_DEVICE int64_t image() const { return C * H * W; }
  PYOPS_HOST_DEVICE int64_t row() const { return W * pixel; }

  // Where block b begins among the values of all cells, and its value k from there: a row of its cells is one run.
  PYOPS_HOST_DEVICE int64_t begin_of(int64_t b) const {
    const int64_t left = b % blocks_w, top = b / blocks_w % blocks_h, n = b / blocks_w / blocks_h;
    return ((n * cells_h + top) * cells_w + left) * O;
  }
  PYOPS_HOST_DEVICE int64_t step_to(int k) const {
    const int run = int(block_w * O);
    return k / run * (cells_w * O) + k % run;
  }
};

// Bin o holds the directions from boundary o on to the next; boundary o points along (x[o], y[o]), at o/O of a half
// turn.
template <class A>
struct Directions {
  A x[most_orientations], y[most_orientations];
};

// The rational slopes among them are exact, so that a diagonal of whole numbers falls on its boundary.
template <class A>
inline Directions<A> directions(int64_t O) {
  Directions<A> d;
  for (int64_t o = 0; o < O; ++o) {
    const double angle = 3.14159265358979323846 * double(o) / double(O);
    const bool diagonal = 4 * o == O || 4 * o == 3 * O, upright = 2 * o == O;
    d.x[o] = A(diagonal ? (2 * o < O ? 1 : -1) : upright ? 0 : std::cos(angle));
    d.y[o] = A(diagonal || upright ? 1 : std::sin(angle));
  }
  return d;
}

template <class A>
struct Gradient {
  A x, y;
  int32_t channel;
};

// x² + y², the same for (y, x), whichever of the two products a compiler rounds: a tie of two channels stays one.
template <class A>
PYOPS_HOST_DEVICE A square_of(A x, A y) {
  x = x < 0 ? -x : x, y = y < 0 ? -y : y;
  const A low = x < y ? x : y, high = x < y ? y : x;
  return high * high + low * low;
}

// Central differences, 0 across the border, of the channel where they are longest; the first of equal ones, or NaN.
template <class A, class T>
PYOPS_HOST_DEVICE Gradient<A> gradient(const T* image, const Sizes& z, int64_t h, int64_t w) {
  Gradient<A> longest{0, 0, 0};
  A most = -1;
  for (int64_t c = 0; c < z.C; ++c) {
    const T* p = image + c * z.plane + h * z.row() + w * z.pixel;
    const A x = w > 0 && w + 1 < z.W ? A(p[z.pixel]) - A(p[-z.pixel]) : A(0);
    const A y = h > 0 && h + 1 < z.H ? A(p[z.row()]) - A(p[-z.row()]) : A(0);
    const A square = square_of(x, y);
    if (square > most || (square != square && most == most)) {
      longest = {x, y, int32_t(c)};
      most = square;
    }
  }
  return longest;
}

// The bin of a direction; opposite ones are one.
template <class A>
PYOPS_HOST_DEVICE int bin(A x, A y, int64_t O, const Directions<A>& d) {
  if (y < 0 || (y == 0 && x < 0)) x = -x, y = -y;
  int passed = 0;
  for (int64_t o = 1; o < O; ++o) passed += y * d.x[o] - x * d.y[o] >= 0;
  return passed;
}

}  // namespace pyops::hog
