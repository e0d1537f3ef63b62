// dropout · CPU
//   y[m,s,c] = x[m,s,c] * scale + shift where element m·C + c of the random stream is kept, x[m,s,c] * 0 + fill
//   elsewhere
// layout   x, y: [M, S, C] · random: (seed, offset)
// mapping  S = 1: a thread takes blocks of elements, lanes over them; C = 1: a number for a row, lanes over s; else the
//          numbers of a row of channels are drawn once and serve all s
// memory   x read once, y written once; random numbers are drawn in blocks that stay in the first-level cache
// numerics acc_t; the mask is that of every backend; NaN and infinity in a dropped element give NaN, as in torch
#include "cpu/dropout.h"

#include "common/registry.h"
#include "cpu/elementwise.h"
#include "cpu/math.h"

namespace pyops::PYOPS_CPU_CAPABILITY {

// ---- kernels

template <class scalar_t, class acc_t>
void dropout_run(const scalar_t* x, scalar_t* y, int64_t n, const acc_t* factor, const acc_t* summand) {
  using V = Vec<acc_t>;
  each_vector<acc_t>(n, [&](int64_t i, auto lanes) {
    fma(V::load(x + i, lanes), V::load(factor + i, lanes), V::load(summand + i, lanes)).store(y + i, lanes);
  });
}

template <class scalar_t, class acc_t>
void dropout_elements(const scalar_t* x, scalar_t* y, int64_t N, const Dropout<acc_t>& d) {
  parallel_for(ceil_div(N, dropout_block), 16, [&](int64_t begin, int64_t end) {
    DropoutScratch<acc_t> s;
    for (int64_t b = begin; b < end; ++b) {
      const int64_t i = b * dropout_block, n = N - i < dropout_block ? N - i : dropout_block;
      d.draw(i, n, s.words, s.factor, s.summand);
      dropout_run(x + i, y + i, n, s.factor, s.summand);
    }
  });
}

template <class scalar_t, class acc_t>
void dropout_rows(const scalar_t* x, scalar_t* y, int64_t M, int64_t S, const Dropout<acc_t>& d) {
  using V = Vec<acc_t>;
  const bool streamed = is_streamed(M * S, sizeof(scalar_t));
  parallel_for(M, ceil_div(16384, S), [&](int64_t begin, int64_t end) {
    DropoutScratch<acc_t> s;
    for (int64_t first = begin; first < end; first += dropout_block) {
      const int64_t n = end - first < dropout_block ? end - first : dropout_block;
      d.draw(first, n, s.words, s.factor, s.summand);
      for (int64_t m = 0; m < n; ++m) {
        const V factor(s.factor[m]), summand(s.summand[m]);
        const int64_t at = (first + m) * S;
        write_run<acc_t>(y + at, S, streamed,
                         [&](int64_t i, auto lanes) { return fma(V::load(x + at + i, lanes), factor, summand); });
      }
    }
    if (streamed) stream_fence();
  });
}

template <class scalar_t, class acc_t>
void dropout_channels(const scalar_t* x, scalar_t* y, int64_t M, int64_t S, int64_t C, const Dropout<acc_t>& d) {
  parallel_for(M, ceil_div(16384, S * C), [&](int64_t begin, int64_t end) {
    DropoutScratch<acc_t> scratch;
    for (int64_t m = begin; m < end; ++m)
      for (int64_t c = 0; c < C; c += dropout_block) {
        const int64_t n = C - c < dropout_block ? C - c : dropout_block;
        d.draw(m * C + c, n, scratch.words, scratch.factor, scratch.summand);
        for (int64_t s = 0; s < S; ++s) {
          const int64_t at = (m * S + s) * C + c;
          dropout_run(x + at, y + at, n, scratch.factor, scratch.summand);
        }
      }
  });
}

// ---- binding

Tensor dropout(const Tensor& x, const Tensor& random, int64_t threshold, double scale, double shift, double fill) {
  OpScope op("dropout", x);
  op.check(x.dim() == 3, "x must be [M, S, C]");
  op.check(threshold >= 0 && threshold <= int64_t{1} << 31, "threshold must lie in [0, 2^31]");
  const int64_t M = x.size(0), S = x.size(1), C = x.size(2);
  const RandomStream stream(op.in<int64_t>(random, "random", {2}));
  return dispatch_floating(op, x.scalar_type(), [&]<class scalar_t>() {
    using acc_t = accumulate_t<scalar_t>;
    Tensor y = op.empty<scalar_t>({M, S, C});
    auto* px = op.in<scalar_t>(x, "x", {M, S, C});
    auto* py = op.out<scalar_t>(y, "y", {M, S, C});
    const Dropout<acc_t> d{stream, threshold, acc_t(scale), acc_t(shift), acc_t(fill)};
    if (S == 1)
      dropout_elements(px, py, M * C, d);
    else if (C == 1)
      dropout_rows(px, py, M, S, d);
    else if (S > 0 && C > 0)
      dropout_channels(px, py, M, S, C, d);
    return y;
  });
}

PYOPS_LIBRARY(m) { PYOPS_IMPL(m, dropout); }

}  // namespace pyops::PYOPS_CPU_CAPABILITY
