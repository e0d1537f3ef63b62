// hog · CPU
//   cells[i,j,o] = 1/|cell| · sum over the pixels of cell (i,j) whose gradient g points into bin o of |g|
//   y[b,:] = v/n,  v: the cells of block b;  n = sum v + eps (L1)  or sqrt(sum v² + eps²) (L2)
//   L1-sqrt: sqrt(v/n);  L2-Hys: t = min(v/n, 0.2), then t/m with m = sqrt(sum t² + eps²)
// layout   x: [N, C, H, W] or, channels_last, [N, H, W, C] · cells: [N, cells_h, cells_w, O] in acc_t
//          y: [N, blocks_h, blocks_w, block_h, block_w, O]
// mapping  a thread takes rows of cells, lanes over the pixels of a row of a plane; then blocks, lanes over their values
// memory   x read once (its neighbours from the caches); backward: two acc_t and a channel for each pixel
// numerics acc_t, the sums of cells in double; no atomics: a gradient is gathered, in a fixed order
#include "common/hog_binding.h"
#include "common/registry.h"
#include "cpu/math.h"
#include "cpu/parallel.h"

namespace pyops::PYOPS_CPU_CAPABILITY {

using namespace hog;

// ---- kernels

// One row of pixels: the gradient, and the channel it comes from; the three rows it is made of where channels lie last.
template <class A>
struct Row {
  Buffer<A> x, y, channel, magnitude, bin, lines;
  explicit Row(const Sizes& z)
      : x(z.W), y(z.W), channel(z.W), magnitude(z.W), bin(z.W), lines(z.pixel == 1 ? 0 : 3 * z.C * z.W) {}
};

// Pixels 1 to W - 2 of the row whose first pixel is `middle`; `plane` and `line`: to the next channel and row.
template <class T, class A>
PYOPS_INLINE void longest_differences(const T* middle, int64_t plane, int64_t line, bool inner, const Sizes& z,
                                      Row<A>& row) {
  using V = Vec<A>;
  each_vector<A>(std::max<int64_t>(z.W - 2, 0), [&](int64_t i, auto lanes) {
    const int64_t w = i + 1;
    V gx, gy, channel, most(A(-1));
    for (int64_t c = 0; c < z.C; ++c) {
      const T* p = middle + c * plane + w;
      const V x = V::load(p + 1, lanes) - V::load(p - 1, lanes);
      const V y = inner ? V::load(p + line, lanes) - V::load(p - line, lanes) : V();
      const V low = min(abs(x), abs(y)), high = max(abs(x), abs(y)), square = fma(high, high, low * low);
      const Mask<A> longer = (square > most) | (is_nan(square) & ~is_nan(most));
      gx = select(longer, x, gx), gy = select(longer, y, gy);
      channel = select(longer, V(A(c)), channel), most = select(longer, square, most);
    }
    gx.store(row.x.get() + w, lanes);
    gy.store(row.y.get() + w, lanes);
    channel.store(row.channel.get() + w, lanes);
  });
}

template <class T, class A>
void gradients_of_row(const T* image, const Sizes& z, int64_t h, Row<A>& row) {
  const bool inner = h > 0 && h + 1 < z.H;
  for (int64_t w = 0; w < z.W; w += std::max<int64_t>(z.W - 1, 1)) {
    const Gradient<A> g = gradient<A>(image, z, h, w);
    row.x[w] = g.x, row.y[w] = g.y, row.channel[w] = A(g.channel);
  }
  if (z.pixel == 1) return longest_differences(image + h * z.W, z.plane, z.W, inner, z, row);
  const int64_t line = z.C * z.W;
  for (int64_t k = inner ? -1 : 0; k <= (inner ? 1 : 0); ++k)
    for (int64_t c = 0; c < z.C; ++c) {
      const T* from = image + (h + k) * line + c;
      A* to = row.lines.get() + (k + 1) * line + c * z.W;
      for (int64_t w = 0; w < z.W; ++w) to[w] = A(from[w * z.C]);
    }
  longest_differences(static_cast<const A*>(row.lines.get()) + line, z.W, line, inner, z, row);
}

template <class A>
void votes_of_row(const Sizes& z, const Directions<A>& d, Row<A>& row) {
  using V = Vec<A>;
  each_vector<A>(z.W, [&](int64_t w, auto lanes) {
    V x = V::load(row.x.get() + w, lanes), y = V::load(row.y.get() + w, lanes), bin;
    sqrt(fma(x, x, y * y)).store(row.magnitude.get() + w, lanes);
    const Mask<A> below = (y < V()) | ((y <= V()) & (y >= V()) & (x < V()));
    x = select(below, -x, x), y = select(below, -y, y);
    for (int64_t o = 1; o < z.O; ++o) bin += select(y * V(d.x[o]) - x * V(d.y[o]) >= V(), V(A(1)), V());
    bin.store(row.bin.get() + w, lanes);
  });
}

template <class T, class A>
void vote(const T* x, A* cells, const Sizes& z) {
  const Directions<A> d = directions<A>(z.O);
  const int64_t values = z.cells_w * z.O;
  parallel_for(z.N * z.cells_h, ceil_div(8192, z.cell_h * z.W * z.C), [&](int64_t begin, int64_t end) {
    Row<A> row(z);
    Buffer<double> totals(values);
    for (int64_t r = begin; r < end; ++r) {
      std::fill_n(totals.get(), values, 0.0);
      for (int64_t h = r % z.cells_h * z.cell_h, i = 0; i < z.cell_h; ++i, ++h) {
        gradients_of_row(x + r / z.cells_h * z.image(), z, h, row);
        votes_of_row(z, d, row);
        for (int64_t j = 0, w = 0; j < z.cells_w; ++j)
          for (const int64_t last = w + z.cell_w; w < last; ++w)
            totals[j * z.O + int64_t(row.bin[w])] += double(row.magnitude[w]);
      }
      for (int64_t k = 0; k < values; ++k) cells[r * values + k] = A(totals[k] / double(z.cell_h * z.cell_w));
    }
  });
}

template <class A, class F>
PYOPS_INLINE A sum_over(int64_t n, F&& term) {
  Vec<A> total;
  each_vector<A>(n, [&](int64_t i, auto lanes) { total += keep(term(i, lanes), lanes); });
  return sum(total);
}

// The values v of one block, and what they are divided by.
template <class A>
struct Block {
  using V = Vec<A>;
  const Sizes& z;
  int64_t norm, K;
  Buffer<A> v;
  A n = 0, m = 0;

  Block(const Sizes& sizes, int64_t kind) : z(sizes), norm(kind), K(sizes.values()), v(K) {}

  void gather(const A* cells, int64_t b) {
    const int64_t run = z.block_w * z.O;
    for (int64_t i = 0; i < z.block_h; ++i)
      std::copy_n(cells + z.begin_of(b) + i * z.cells_w * z.O, run, v.get() + i * run);
    const bool squares = norm >= l2;
    const A total = sum_over<A>(K, [&](int64_t k, auto lanes) {
      const V value = V::load(v.get() + k, lanes);
      return squares ? value * value : value;
    });
    n = squares ? std::sqrt(total + A(epsilon * epsilon)) : total + A(epsilon);
    if (norm == l2_hys)
      m = std::sqrt(sum_over<A>(K, [&](int64_t k, auto lanes) { return clipped(k, lanes) * clipped(k, lanes); }) +
                    A(epsilon * epsilon));
  }
  template <class Lanes>
  PYOPS_INLINE V share(int64_t k, Lanes lanes) const {
    return V::load(v.get() + k, lanes) / V(n);
  }
  template <class Lanes>
  PYOPS_INLINE V clipped(int64_t k, Lanes lanes) const {
    const V u = share(k, lanes);
    return select(u > V(A(limit)), V(A(limit)), u);
  }
  template <class T>
  void write(T* y) const {
    each_vector<A>(K, [&](int64_t k, auto lanes) {
      const V u = share(k, lanes);
      (norm == l1_sqrt ? sqrt(u) : norm == l2_hys ? clipped(k, lanes) / V(m) : u).store(y + k, lanes);
    });
  }
  // dv[k] from dy[k]
  template <class T>
  void backward(const T* dy, A* dv) const {
    const A along = norm != l2_hys ? A(0) : sum_over<A>(K, [&](int64_t k, auto lanes) {
      return V::load(dy + k, lanes) * clipped(k, lanes);
    });
    each_vector<A>(K, [&](int64_t k, auto lanes) {  // of v/n
      const V u = share(k, lanes), g = V::load(dy + k, lanes);
      V du = g;
      if (norm == l1_sqrt) du = select(u > V(), g / (V(A(2)) * sqrt(u)), V());
      if (norm == l2_hys) du = select(u > V(A(limit)), V(), (g - clipped(k, lanes) * V(along / (m * m))) / V(m));
      du.store(dv + k, lanes);
    });
    const A inner =
        sum_over<A>(K, [&](int64_t k, auto lanes) { return V::load(dv + k, lanes) * V::load(v.get() + k, lanes); }) /
        (n * n);
    each_vector<A>(K, [&](int64_t k, auto lanes) {
      const V slope = norm >= l2 ? share(k, lanes) : V(A(1));
      (V::load(dv + k, lanes) / V(n) - slope * V(inner)).store(dv + k, lanes);
    });
  }
};

template <class T, class A>
void normalize(const A* cells, T* y, const Sizes& z, int64_t norm) {
  parallel_for(z.blocks(), ceil_div(4096, z.values()), [&](int64_t begin, int64_t end) {
    Block<A> block(z, norm);
    for (int64_t b = begin; b < end; ++b) {
      block.gather(cells, b);
      block.write(y + b * z.values());
    }
  });
}

// dcells sums over the blocks that a cell is in; a vote is 1/|cell| of a magnitude.
template <class T, class A>
void normalize_bwd(const T* dy, const A* cells, A* dcells, const Sizes& z, int64_t norm) {
  const int64_t image = z.cells_h * z.cells_w * z.O, blocks = z.blocks_h * z.blocks_w, run = z.block_w * z.O;
  parallel_for(z.N, 1, [&](int64_t begin, int64_t end) {
    Block<A> block(z, norm);
    Buffer<A> dv(z.values());
    for (int64_t n = begin; n < end; ++n) {
      std::fill_n(dcells + n * image, image, A(0));
      for (int64_t b = n * blocks; b < (n + 1) * blocks; ++b) {
        block.gather(cells, b);
        block.backward(dy + b * z.values(), dv.get());
        for (int64_t i = 0; i < z.block_h; ++i) {
          A* to = dcells + z.begin_of(b) + i * z.cells_w * z.O;
          for (int64_t k = 0; k < run; ++k) to[k] += dv[i * run + k];
        }
      }
      for (int64_t k = 0; k < image; ++k) dcells[n * image + k] /= A(z.cell_h * z.cell_w);
    }
  });
}

// u, v: the gradients of the two differences of each pixel; |g| moves along g/|g|, and not at all where g = 0.
template <class T, class A>
void vote_bwd(const T* x, const A* dcells, A* u, A* v, int32_t* channel, const Sizes& z) {
  const Directions<A> d = directions<A>(z.O);
  parallel_for(z.N * z.H, ceil_div(8192, z.W * z.C), [&](int64_t begin, int64_t end) {
    Row<A> row(z);
    for (int64_t r = begin; r < end; ++r) {
      const int64_t n = r / z.H, h = r % z.H, i = h / z.cell_h;
      gradients_of_row(x + n * z.image(), z, h, row);
      votes_of_row(z, d, row);
      const A* of_cells = dcells + (n * z.cells_h + i) * z.cells_w * z.O;
      for (int64_t w = 0; w < z.W; ++w) {
        const int64_t j = w / z.cell_w;
        const bool votes = i < z.cells_h && j < z.cells_w && row.magnitude[w] != 0;
        const A slope = votes ? of_cells[j * z.O + int64_t(row.bin[w])] / row.magnitude[w] : A(0);
        u[r * z.W + w] = slope * row.x[w], v[r * z.W + w] = slope * row.y[w];
        channel[r * z.W + w] = int32_t(row.channel[w]);
      }
    }
  });
}

// dx[c] at a pixel: it is what lies ahead of one neighbour and behind the other, wherever they took channel c.
template <class T, class A>
void differences_bwd(const A* u, const A* v, const int32_t* channel, T* dx, const Sizes& z) {
  parallel_for(z.N * z.H, ceil_div(8192, z.W * z.C), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t n = r / z.H, h = r % z.H;
      const bool above = h > 0, below = h + 1 < z.H;
      for (int64_t c = 0; c < z.C; ++c)
        for (int64_t w = 0; w < z.W; ++w) {
          const auto part = [&](bool inside, const A* field, int64_t at) {
            return inside && channel[at] == c ? field[at] : A(0);
          };
          const int64_t p = r * z.W + w;
          const A across = part(w > 0, u, p - 1) - part(w + 1 < z.W, u, p + 1);
          dx[n * z.image() + c * z.plane + h * z.row() + w * z.pixel] =
              T(across + part(above, v, p - z.W) - part(below, v, p + z.W));
        }
    }
  });
}

// ---- binding

std::tuple<Tensor, Tensor> hog_fwd(const Tensor& x, int64_t orientations, Ints cell, Ints block, int64_t norm,
                                   bool channels_last) {
  OpScope op("hog_fwd", x);
  const Sizes z = sizes_of(op, x, orientations, cell, block, norm, channels_last);
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    using A = accumulate_t<T>;
    Tensor y = op.empty<T>({z.N, z.blocks_h, z.blocks_w, z.block_h, z.block_w, z.O});
    Tensor cells = op.empty<A>({z.N, z.cells_h, z.cells_w, z.O});
    A* votes = op.out<A>(cells, "cells", {z.N, z.cells_h, z.cells_w, z.O});
    vote(op.in<T>(x, "x", ShapeRef(x)), votes, z);
    normalize(votes, op.out<T>(y, "y", {z.N, z.blocks_h, z.blocks_w, z.block_h, z.block_w, z.O}), z, norm);
    return std::make_tuple(y, cells);
  });
}

Tensor hog_bwd(const Tensor& dy, const Tensor& x, const Tensor& cells, int64_t orientations, Ints cell, Ints block,
               int64_t norm, bool channels_last) {
  OpScope op("hog_bwd", x);
  const Sizes z = sizes_of(op, x, orientations, cell, block, norm, channels_last);
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    using A = accumulate_t<T>;
    Tensor dx = op.empty<T>(ShapeRef(x));
    const T* g = op.in<T>(dy, "dy", {z.N, z.blocks_h, z.blocks_w, z.block_h, z.block_w, z.O});
    const T* px = op.in<T>(x, "x", ShapeRef(x));
    const A* votes = op.in<A>(cells, "cells", {z.N, z.cells_h, z.cells_w, z.O});
    Buffer<A> dcells(z.cells() * z.O), u(z.N * z.H * z.W), v(z.N * z.H * z.W);
    Buffer<int32_t> channel(z.N * z.H * z.W);
    normalize_bwd(g, votes, dcells.get(), z, norm);
    vote_bwd(px, dcells.get(), u.get(), v.get(), channel.get(), z);
    differences_bwd(u.get(), v.get(), channel.get(), op.out<T>(dx, "dx", ShapeRef(x)), z);
    return dx;
  });
}

PYOPS_LIBRARY(m) {
  PYOPS_IMPL(m, hog_fwd);
  PYOPS_IMPL(m, hog_bwd);
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY
