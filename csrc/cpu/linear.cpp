// linear · CPU
//   bias_act     y = f(x + b),  dx = dy * f'(x + b),  db[c] = sum of dx over n, s;  f by number, common/activation.h
//   bias_rows    y[m,n] = b[n]
//   channel_sum  y[c] = sum over n, s of x[n,c,s]; x: [N, C, S] or [N, C]
// layout   bias_act: x, y [N, C, S], b [C] · rows [M, N]
// mapping  a line is a row of C where S = 1 and a plane of S otherwise; a thread takes blocks of whole lines, or pieces
//          of long ones, of at most 1024 numbers, lanes over neighbouring elements
// memory   every input read once, every output written once; sums are taken from the block in the first-level cache
// numerics acc_t; sums over at most 256 rows in acc_t, over these in double, in an order fixed by the shape
#include "cpu/activation.h"

#include "common/linear_binding.h"
#include "common/registry.h"

namespace pyops::PYOPS_CPU_CAPABILITY {

// ---- kernels

struct Lines {
  int64_t count, length, channels;
  bool along;  // the bias varies along a line
  Lines(int64_t N, int64_t C, int64_t S) : count(S == 1 ? N : N * C), length(S == 1 ? C : S), channels(C) {
    along = S == 1;
  }
  // Whole lines in a block, and columns of a block.
  int64_t together() const { return std::max<int64_t>(1, elementwise_block / length); }
  int64_t width() const { return std::min(length, elementwise_block); }
};
struct Block {
  int64_t line, lines, offset, width;
  int64_t size() const { return lines * width; }
};

// t = x + b
template <class acc_t, class scalar_t>
void add_bias(const Lines& g, const Block& b, const scalar_t* x, const acc_t* bias, acc_t* t) {
  using V = Vec<acc_t>;
  for (int64_t l = 0; l < b.lines; ++l) {
    const scalar_t* from = x + (b.line + l) * g.length + b.offset;
    acc_t* to = t + l * b.width;
    if (g.along) {
      const acc_t* add = bias + b.offset;
      each_vector<acc_t>(b.width, [&](int64_t i, auto lanes) {
        (V::load(from + i, lanes) + V::load(add + i, lanes)).store(to + i, lanes);
      });
    } else {
      const V add(bias[(b.line + l) % g.channels]);
      each_vector<acc_t>(b.width,
                         [&](int64_t i, auto lanes) { (V::load(from + i, lanes) + add).store(to + i, lanes); });
    }
  }
}

// y = f(x + b) of one block; half types pass through a block of floats.
template <class scalar_t, class acc_t>
void bias_act_block(const Lines& g, const Block& b, int kind, Parameters p, const scalar_t* x, const acc_t* bias,
                    scalar_t* y, bool streamed) {
  alignas(64) acc_t t[elementwise_block];
  add_bias(g, b, x, bias, t);
  scalar_t* to = y + b.line * g.length + b.offset;
  if constexpr (std::is_same_v<scalar_t, acc_t>) {
    const bool aligned = reinterpret_cast<uintptr_t>(to) % vector_bytes == 0;
    activation_block<acc_t>(kind, p, to, t, b.size(), streamed && aligned);
  } else {
    activation_block<acc_t>(kind, p, t, t, b.size(), false);
    narrow(to, t, b.size());
  }
}

template <class scalar_t, class acc_t>
void bias_act_forward(const Lines& g, int kind, Parameters p, const scalar_t* x, const acc_t* bias, scalar_t* y) {
  const int64_t pieces = ceil_div(g.length, elementwise_block), together = g.together();
  const bool streamed = sizeof(scalar_t) >= 4 && x != y && is_streamed(g.count * g.length, sizeof(scalar_t));
  const int64_t grain = elementwise_grain / elementwise_block;
  parallel_for(ceil_div(g.count, together) * pieces, grain, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t line = k / pieces * together, offset = k % pieces * elementwise_block;
      const int64_t lines = std::min(together, g.count - line), width = std::min(g.length - offset, elementwise_block);
      bias_act_block(g, Block{line, lines, offset, width}, kind, p, x, bias, y, streamed);
    }
    if (streamed) stream_fence();
  });
}

// The gradient of one block: dx is written, and what is returned is the same in acc_t.
template <class scalar_t, class acc_t>
struct Gradient {
  static constexpr bool is_narrow = !std::is_same_v<scalar_t, acc_t>;
  Lines g;
  int kind;
  Parameters p;
  const scalar_t *dy, *x;
  const acc_t* bias;
  scalar_t* dx;
  const acc_t* operator()(const Block& b, acc_t (&scratch)[3][elementwise_block]) const {
    const int64_t at = b.line * g.length + b.offset;
    add_bias(g, b, x, bias, scratch[0]);
    acc_t* to = scratch[1];
    if constexpr (!is_narrow) to = dx + at;
    activation_gradient_block<acc_t>(kind, p, to, widened(dy + at, b.size(), scratch[2]), scratch[0], b.size(), false);
    if constexpr (is_narrow) narrow(dx + at, to, b.size());
    return to;
  }
};
template <class scalar_t, class acc_t>
struct Plain {
  Lines g;
  const scalar_t* x;
  const acc_t* operator()(const Block& b, acc_t (&scratch)[3][elementwise_block]) const {
    return widened(x + b.line * g.length + b.offset, b.size(), scratch[0]);
  }
};

// total[c] = sum over rows of what `values` gives for a block: chunks of rows by shape, then the chunks in order.
template <class acc_t, class Values>
void sum_rows(const Lines& g, const Values& values, double* total) {
  const int64_t C = g.length, width = g.width(), pieces = ceil_div(C, width), together = g.together();
  const int64_t rows = std::clamp<int64_t>(65536 / C, 32, 256), chunks = ceil_div(g.count, rows);
  Buffer<acc_t> part(chunks * C);
  parallel_for(chunks * pieces, ceil_div(elementwise_grain, rows * width), [&](int64_t begin, int64_t end) {
    alignas(64) acc_t scratch[3][elementwise_block];
    for (int64_t k = begin; k < end; ++k) {
      const int64_t chunk = k / pieces, offset = k % pieces * width, w = std::min(width, C - offset);
      acc_t* sums = part.get() + chunk * C + offset;
      std::fill(sums, sums + w, acc_t(0));
      const int64_t last = std::min(g.count, (chunk + 1) * rows);
      for (int64_t row = chunk * rows; row < last; row += together) {
        const Block b{row, std::min(together, last - row), offset, w};
        const acc_t* v = values(b, scratch);
        each_vector<acc_t>(w, [&](int64_t i, auto lanes) {
          Vec<acc_t> column = Vec<acc_t>::load(sums + i, lanes);
          for (int64_t l = 0; l < b.lines; ++l) column += Vec<acc_t>::load(v + l * w + i, lanes);
          column.store(sums + i, lanes);
        });
      }
    }
  });
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int64_t c = 0; c < C; ++c) total[c] += double(part[chunk * C + c]);
}

// The same over planes: one sum for each block, then the blocks and the planes in order.
template <class acc_t, class Values>
void sum_planes(const Lines& g, const Values& values, double* total) {
  const int64_t together = g.together(), pieces = ceil_div(g.length, elementwise_block);
  Buffer<double> part(g.count * pieces);
  parallel_for(ceil_div(g.count, together) * pieces, ceil_div(elementwise_grain, together * g.width()),
               [&](int64_t begin, int64_t end) {
                 alignas(64) acc_t scratch[3][elementwise_block];
                 for (int64_t k = begin; k < end; ++k) {
                   const int64_t line = k / pieces * together, piece = k % pieces, offset = piece * elementwise_block;
                   const Block b{line, std::min(together, g.count - line), offset,
                                 std::min(g.length - offset, elementwise_block)};
                   const acc_t* v = values(b, scratch);
                   for (int64_t l = 0; l < b.lines; ++l) {
                     Totals<acc_t, 1> t;
                     accumulate(t, b.width, [&](int64_t i, auto lanes, auto& total) {
                       total[0] += Vec<acc_t>::load(v + l * b.width + i, lanes);
                     });
                     part[(line + l) * pieces + piece] = double(sum(t[0]));
                   }
                 }
               });
  for (int64_t line = 0; line < g.count; ++line) {
    double plane = 0;
    for (int64_t piece = 0; piece < pieces; ++piece) plane += part[line * pieces + piece];
    total[line % g.channels] += plane;
  }
}

template <class scalar_t, class acc_t>
void write_sums(scalar_t* to, const double* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = scalar_t(acc_t(from[i]));
}

// ---- binding

Tensor bias_act_fwd(const Tensor& x, const Tensor& bias, int64_t kind, double a, double b, double c) {
  OpScope op("bias_act_fwd", x);
  const auto [N, C, S] = linear::images_of(op, x, kind);
  return dispatch_floating(op, x.scalar_type(), [&]<class scalar_t>() {
    using acc_t = accumulate_t<scalar_t>;
    Tensor y = op.empty<scalar_t>({N, C, S});
    Buffer<acc_t> wide(C);
    widen<acc_t>(wide.get(), op.in<scalar_t>(bias, "bias", {C}), C, acc_t(0));
    const scalar_t* from = op.in<scalar_t>(x, "x", {N, C, S});
    scalar_t* to = op.out<scalar_t>(y, "y", {N, C, S});
    if (x.numel() > 0) bias_act_forward({N, C, S}, int(kind), {a, b, c}, from, wide.get(), to);
    return y;
  });
}

void bias_act_inplace(Tensor x, const Tensor& bias, int64_t kind, double a, double b, double c) {
  OpScope op("bias_act_inplace", x);
  const auto [N, C, S] = linear::images_of(op, x, kind);
  dispatch_floating(op, x.scalar_type(), [&]<class scalar_t>() {
    using acc_t = accumulate_t<scalar_t>;
    Buffer<acc_t> wide(C);
    widen<acc_t>(wide.get(), op.in<scalar_t>(bias, "bias", {C}), C, acc_t(0));
    scalar_t* p = op.out<scalar_t>(x, "x", {N, C, S});
    if (x.numel() > 0)
      bias_act_forward({N, C, S}, int(kind), {a, b, c}, static_cast<const scalar_t*>(p), wide.get(), p);
  });
}

std::tuple<Tensor, Tensor> bias_act_bwd(const Tensor& dy, const Tensor& x, const Tensor& bias, int64_t kind, double a,
                                        double b, double c) {
  OpScope op("bias_act_bwd", dy);
  const auto [N, C, S] = linear::images_of(op, x, kind);
  return dispatch_floating(op, x.scalar_type(), [&]<class scalar_t>() {
    using acc_t = accumulate_t<scalar_t>;
    Tensor dx = op.empty<scalar_t>({N, C, S}), db = op.empty<scalar_t>({C});
    Buffer<acc_t> wide(C);
    Buffer<double> sums(C, 0.0);
    widen<acc_t>(wide.get(), op.in<scalar_t>(bias, "bias", {C}), C, acc_t(0));
    const scalar_t *pdy = op.in<scalar_t>(dy, "dy", {N, C, S}), *px = op.in<scalar_t>(x, "x", {N, C, S});
    scalar_t* pdx = op.out<scalar_t>(dx, "dx", {N, C, S});
    if (x.numel() > 0) {
      const Lines lines(N, C, S);
      const Gradient<scalar_t, acc_t> values{lines, int(kind), {a, b, c}, pdy, px, wide.get(), pdx};
      lines.along ? sum_rows<acc_t>(lines, values, sums.get()) : sum_planes<acc_t>(lines, values, sums.get());
    }
    write_sums<scalar_t, acc_t>(op.out<scalar_t>(db, "db", {C}), sums.get(), C);
    return std::tuple(dx, db);
  });
}

Tensor bias_rows(const Tensor& bias, int64_t rows) {
  OpScope op("bias_rows", bias);
  op.check(bias.dim() == 1 && rows >= 0, "bias must be [N], rows >= 0");
  const int64_t N = bias.size(0);
  return dispatch_floating(op, bias.scalar_type(), [&]<class scalar_t>() {
    using acc_t = accumulate_t<scalar_t>;
    Tensor y = op.empty<scalar_t>({rows, N});
    const scalar_t* from = op.in<scalar_t>(bias, "bias", {N});
    scalar_t* to = op.out<scalar_t>(y, "y", {rows, N});
    parallel_for(rows, ceil_div(elementwise_grain, std::max<int64_t>(N, 1)), [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m)
        each_vector<acc_t>(
            N, [&](int64_t i, auto lanes) { Vec<acc_t>::load(from + i, lanes).store(to + m * N + i, lanes); });
    });
    return y;
  });
}

Tensor channel_sum(const Tensor& x) {
  OpScope op("channel_sum", x);
  op.check(x.dim() == 2 || x.dim() == 3, "x must be [N, C] or [N, C, S]");
  const int64_t N = x.size(0), C = x.size(1), S = x.dim() == 3 ? x.size(2) : 1;
  return dispatch_floating(op, x.scalar_type(), [&]<class scalar_t>() {
    using acc_t = accumulate_t<scalar_t>;
    Tensor y = op.empty<scalar_t>({C});
    Buffer<double> sums(C, 0.0);
    const Lines lines(N, C, S);
    const Plain<scalar_t, acc_t> values{lines, op.in<scalar_t>(x, "x", ShapeRef(x))};
    if (x.numel() > 0)
      lines.along ? sum_rows<acc_t>(lines, values, sums.get()) : sum_planes<acc_t>(lines, values, sums.get());
    write_sums<scalar_t, acc_t>(op.out<scalar_t>(y, "y", {C}), sums.get(), C);
    return y;
  });
}

PYOPS_LIBRARY(m) {
  PYOPS_IMPL(m, bias_act_fwd);
  PYOPS_IMPL(m, bias_act_inplace);
  PYOPS_IMPL(m, bias_act_bwd);
  PYOPS_IMPL(m, bias_rows);
  PYOPS_IMPL(m, channel_sum);
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY
