// A layer of a recurrent network over all steps. The recurrent weights are packed once into panels that stream through
// the registers; a panel holds all gates of its hidden units, so that the product of a step ends in the cell itself and
// no pre-activation goes to memory. Threads take rows of the batch through all steps, without ever waiting for each
// other; where there are too few rows they share the panels of each step.
#pragma once

#include <cstring>
#include <memory>
#include <vector>

#include "common/recurrent.h"
#include "common/tensor.h"

#include "cpu/math.h"
#include "cpu/parallel.h"
#include "cpu/transpose.h"

namespace pyops::PYOPS_CPU_CAPABILITY {

// Rows of the batch that a panel of four vectors is multiplied with at once: their sums live in registers.
#if defined(__AVX512F__)
inline constexpr int panel_rows = 6;
#else
inline constexpr int panel_rows = 2;
#endif
// Products that are summed before the sum goes to the others: a piece of a panel stays in the first cache, and rounding
// grows with the root of a block, as in cpu/gemm.h.
inline constexpr int64_t panel_block = 64;

// A matrix [K, columns] cut into panels of `vectors` vectors of columns: panel, k, vector, lane. Missing columns are 0.
template <class acc_t, int vectors>
class Panels {
 public:
  static constexpr int64_t W = Vec<acc_t>::width, width = vectors * W;

  // column(panel, v, lane) is where a column begins, or null from some lane on; its elements are `step` apart. The columns
  // of a vector are as far apart each, and neighbours where step is not 1.
  template <class Column>
  Panels(int64_t count, int64_t K, int64_t step, const Column& column)
      : count_(count), K_(K), data_(count * K * width) {
    parallel_for(count, ceil_div(65536, std::max<int64_t>(K * width, 1)), [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p)
        for (int v = 0; v < vectors; ++v) {
          acc_t* to = data_.get() + (p * K * vectors + v) * W;
          const auto* from = column(p, v, 0);
          if (from == nullptr) {
            for (int64_t k = 0; k < K; ++k) Vec<acc_t>(acc_t(0)).store(to + k * width);
            continue;
          }
          int64_t lanes = 1;
          while (lanes < W && column(p, v, lanes) != nullptr) ++lanes;
          if (step == 1)
            transpose<acc_t>(to, width, from, lanes > 1 ? column(p, v, 1) - from : 0, lanes, K, W);
          else
            for (int64_t k = 0; k < K; ++k) Vec<acc_t>::load(from + k * step, FirstLanes{lanes}).store(to + k * width);
        }
    });
  }
  int64_t count() const { return count_; }
  int64_t K() const { return K_; }
  const acc_t* panel(int64_t p) const { return data_.get() + p * K_ * width; }

 private:
  int64_t count_, K_;
  Buffer<acc_t> data_;
};

// total[r][v] += row r of a (rows `stride` apart) times vector v of the panel, over K terms; = where `first`.
template <int rows, int vectors, class acc_t>
void panel_product(const acc_t* __restrict__ a, int64_t stride, const acc_t* __restrict__ panel, int64_t K, bool first,
                   acc_t* __restrict__ total) {
  using V = Vec<acc_t>;
  V sum[rows][vectors];
  for (int64_t k = 0; k < K; ++k) {
    V right[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) right[v] = V::load(panel + (k * vectors + v) * V::width);
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
      const V left(a[r * stride + k]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sum[r][v] = fma(left, right[v], sum[r][v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      acc_t* to = total + (r * vectors + v) * V::width;
      (first ? sum[r][v] : sum[r][v] + V::load(to)).store(to);
    }
}

template <int vectors, class acc_t>
void panel_product(int64_t rows, const acc_t* a, int64_t stride, const acc_t* panel, int64_t K, bool first,
                   acc_t* total) {
  switch (rows) {
#if defined(__AVX512F__)
    case 6:
      return panel_product<6, vectors>(a, stride, panel, K, first, total);
    case 5:
      return panel_product<5, vectors>(a, stride, panel, K, first, total);
    case 4:
      return panel_product<4, vectors>(a, stride, panel, K, first, total);
    case 3:
      return panel_product<3, vectors>(a, stride, panel, K, first, total);
#endif
    case 2:
      return panel_product<2, vectors>(a, stride, panel, K, first, total);
    default:
      return panel_product<1, vectors>(a, stride, panel, K, first, total);
  }
}

// finish(row, sums[vectors][W] of that row) for rows [begin, end) of a times one panel. All rows use a piece of the
// panel while it is in the first cache.
template <int vectors, class acc_t, class Finish>
PYOPS_INLINE void multiply_rows(const acc_t* a, int64_t stride, const acc_t* panel, int64_t K, int64_t begin,
                                int64_t end, const Finish& finish) {
  constexpr int64_t width = vectors * Vec<acc_t>::width, most = 4 * panel_rows;
  alignas(64) acc_t total[most * width];
  for (; begin < end; begin += most) {
    const int64_t count = std::min(most, end - begin);
    for (int64_t k = 0; k < K; k += panel_block) {
      for (int64_t blocks = ceil_div(count, panel_rows), row = 0; blocks > 0; --blocks) {
        const int64_t rows = ceil_div(count - row, blocks);
        panel_product<vectors>(rows, a + (begin + row) * stride + k, stride, panel + k * width,
                               std::min(panel_block, K - k), k == 0, total + row * width);
        row += rows;
      }
    }
    for (int64_t row = 0; row < count; ++row) finish(begin + row, total + row * width);
  }
}

// f(i, lanes) for the vector of units that starts at i, none where i lies beyond the last one.
template <class acc_t, class F>
PYOPS_INLINE void one_vector(int64_t i, int64_t count, F&& f) {
  if (i + Vec<acc_t>::width <= count)
    f(i, AllLanes{});
  else if (i < count)
    f(i, FirstLanes{count - i});
}

// Columns of w[K, columns] (or of its transpose, w[columns, K]) in plain order, four vectors to a panel.
template <class acc_t, class T>
Panels<acc_t, 4> plain_panels(const T* w, int64_t K, int64_t columns, int64_t step_k, int64_t step_column) {
  constexpr int64_t W = Vec<acc_t>::width;
  return Panels<acc_t, 4>(ceil_div(columns, 4 * W), K, step_k, [=](int64_t p, int64_t v, int64_t lane) {
    const int64_t column = (p * 4 + v) * W + lane;
    return column < columns ? w + column * step_column : nullptr;
  });
}

// put(row, column, lanes, value) for rows [begin, end) of a [rows, K] times panels [first, last) of plain_panels.
template <class acc_t, class Put>
PYOPS_INLINE void multiply_panels(const acc_t* a, const Panels<acc_t, 4>& panels, int64_t columns, int64_t first,
                                  int64_t last, int64_t begin, int64_t end, const Put& put) {
  using V = Vec<acc_t>;
  for (int64_t p = first; p < last; ++p)
    multiply_rows<4>(a, panels.K(), panels.panel(p), panels.K(), begin, end, [&](int64_t row, const acc_t* sum) {
      for (int v = 0; v < 4; ++v)
        one_vector<acc_t>((p * 4 + v) * V::width, columns,
                          [&](int64_t column, auto lanes) { put(row, column, lanes, V::load(sum + v * V::width)); });
    });
}

// Rows of the batch that go through a step together.
struct RowRange {
  int64_t begin, end;
};

// The states of one direction between two steps, in the type of sums.
template <class T>
class SequenceStates {
 public:
  using acc_t = accumulate_t<T>;
  using V = Vec<acc_t>;

  SequenceStates(const recurrent::Sequence<T>& s, int64_t d, bool has_cell)
      : s_(s), d_(d), h_(2 * s.steps.B * s.P), c_(has_cell ? s.steps.B * s.H : 0) {
    const int64_t states = s.steps.B * s.P;
    widen<acc_t>(h_.get(), s.h0 + d * states, states, acc_t(0));
    std::memcpy(h_.get() + states, h_.get(), size_t(states) * sizeof(acc_t));
    if (has_cell) widen<acc_t>(c_.get(), s.c0 + d * s.steps.B * s.H, s.steps.B * s.H, acc_t(0));
  }

  // The states before step number i: written by step i - 1, read by step i.
  acc_t* h(int64_t i) { return h_.get() + (i & 1) * s_.steps.B * s_.P; }
  acc_t* c(int64_t row) { return c_.get() + row * s_.H; }

  // The state after step number i of a row, number n of [N, ...], goes out, and to the next step as it was rounded: what
  // the backward pass reads is what was used.
  template <class Lanes>
  PYOPS_INLINE void put(int64_t i, int64_t row, int64_t n, int64_t unit, Lanes lanes, const V& value) {
    T* to = s_.y + (n * s_.D + d_) * s_.P + unit;
    value.store(to, lanes);
    V::load(to, lanes).store(h(i + 1) + row * s_.P + unit, lanes);
  }

  // The states of those rows whose last step number i was; i = -1: of those without any step.
  void emit(int64_t i, const RowRange& rows) {
    const int64_t t = s_.step(d_, i), B = s_.steps.B;
    int64_t first = 0, last = B;
    if (i < 0) {
      first = s_.steps.count(0);
    } else if (d_ == 0) {
      first = s_.steps.count(t + 1), last = s_.steps.count(t);
    } else {
      last = t == 0 ? s_.steps.count(0) : 0;
    }
    first = std::max(first, rows.begin), last = std::min(last, rows.end);
    const acc_t* from = h(i + 1);
    for (int64_t row = first; row < last; ++row) {
      narrow(s_.h_n + (d_ * B + row) * s_.P, from + row * s_.P, s_.P);
      if (s_.c_n != nullptr) narrow(s_.c_n + (d_ * B + row) * s_.H, c(row), s_.H);
    }
  }

 private:
  const recurrent::Sequence<T>& s_;
  int64_t d_;
  Buffer<acc_t> h_, c_;
};

template <class Cell, class T>
class SequenceForward {
  using acc_t = accumulate_t<T>;
  using V = Vec<acc_t>;
  static constexpr int64_t W = V::width;
  static constexpr int G = Cell::gates, S = recurrent::saved_slots<Cell>;
  // A panel has room for four vectors: all gates of one vector of units, or four vectors of units of a single gate.
  static constexpr int units = G == 1 ? 4 : 1, vectors = units * G;

 public:
  static constexpr bool backwards = false;

  SequenceForward(const recurrent::Sequence<T>& s, int64_t d)
      : s_(s),
        d_(d),
        recurrent_(ceil_div(s.H, units * W), s.P, 1,
                   [&](int64_t p, int64_t v, int64_t lane) {
                     const int64_t unit = (p * units + (G == 1 ? v : 0)) * W + lane, gate = G == 1 ? 0 : v;
                     return unit < s.H ? s.w_hh + ((d * G + gate) * s.H + unit) * s.P : nullptr;
                   }),
        projection_(s.w_hr != nullptr ? plain_panels<acc_t>(s.w_hr + d * s.P * s.H, s.H, s.P, 1, s.H)
                                      : plain_panels<acc_t, T>(nullptr, 0, 0, 0, 0)),
        states_(s, d, Cell::has_cell),
        m_(s.w_hr != nullptr ? s.steps.B * s.H : 0) {}

  int64_t work() const { return s_.P * vectors * W; }
  void begin(const RowRange& rows) { states_.emit(-1, rows); }
  template <class Share>
  void step(int64_t i, const RowRange& rows, const Share& share) {
    share(recurrent_.count(), [&](int64_t first, int64_t last) { cells(i, rows, first, last); });
    if (s_.w_hr != nullptr)
      share(projection_.count(), [&](int64_t first, int64_t last) { project(i, rows, first, last); });
    states_.emit(i, rows);
  }
  void end(const RowRange&) {}

 private:
  // Panels [first, last) of the recurrent product, and the cells that they make; then of the projection.
  void cells(int64_t i, const RowRange& rows, int64_t first, int64_t last) {
    const int64_t t = s_.step(d_, i), base = s_.steps.first(t), end = std::min(rows.end, s_.steps.count(t));
    for (int64_t p = first; p < last; ++p)
      multiply_rows<vectors>(states_.h(i), s_.P, recurrent_.panel(p), s_.P, rows.begin, end,
                             [&](int64_t row, const acc_t* sum) {
#pragma GCC unroll 4
                               for (int u = 0; u < units; ++u)
                                 one_vector<acc_t>((p * units + u) * W, s_.H, [&](int64_t unit, auto lanes) {
                                   cell(i, row, base + row, unit, lanes, sum + u * G * W);
                                 });
                             });
  }
  void project(int64_t i, const RowRange& rows, int64_t first, int64_t last) {
    const int64_t t = s_.step(d_, i), base = s_.steps.first(t), end = std::min(rows.end, s_.steps.count(t));
    multiply_panels(m_.get(), projection_, s_.P, first, last, rows.begin, end,
                    [&](int64_t row, int64_t unit, auto lanes, const V& value) {
                      states_.put(i, row, base + row, unit, lanes, value);
                    });
  }

  template <class Lanes>
  PYOPS_INLINE void cell(int64_t i, int64_t row, int64_t n, int64_t unit, Lanes lanes, const acc_t* product) {
    const int64_t H = s_.H, at = n * s_.D + d_;
    V a[G], b[G], next, c, saved[S];
#pragma GCC unroll 4
    for (int k = 0; k < G; ++k) {
      a[k] = V::load(s_.gates + (at * G + k) * H + unit, lanes);
      b[k] = V::load(product + k * W);
    }
    if constexpr (Cell::splits) {
      next = V::load(states_.h(i) + row * s_.P + unit, lanes);
      if (s_.b_n != nullptr) b[G - 1] += V::load(s_.b_n + d_ * H + unit, lanes);
    }
    if constexpr (Cell::has_cell) c = V::load(states_.c(row) + unit, lanes);
    Cell::forward(a, b, next, c, saved);
    if constexpr (Cell::has_cell) c.store(states_.c(row) + unit, lanes);
    if (s_.saved != nullptr)
#pragma GCC unroll 4
      for (int k = 0; k < Cell::saved; ++k) saved[k].store(s_.saved + (at * Cell::saved + k) * H + unit, lanes);
    if constexpr (Cell::has_cell)
      if (s_.cells != nullptr) c.store(s_.cells + at * H + unit, lanes);
    if (s_.w_hr != nullptr)
      next.store(m_.get() + row * H + unit, lanes);
    else
      states_.put(i, row, n, unit, lanes, next);
  }

  const recurrent::Sequence<T>& s_;
  int64_t d_;
  Panels<acc_t, vectors> recurrent_;
  Panels<acc_t, 4> projection_;
  SequenceStates<T> states_;
  Buffer<acc_t> m_;
};

// The gradients of the states of one direction between two steps, in the type of sums.
template <class T>
class SequenceGradients {
 public:
  using acc_t = accumulate_t<T>;
  using V = Vec<acc_t>;

  SequenceGradients(const recurrent::Sequence<T>& s, int64_t d, bool has_cell)
      : s_(s), d_(d), dh_(s.steps.B * s.P), dc_(has_cell ? s.steps.B * s.H : 0) {
    const int64_t B = s.steps.B;
    widen<acc_t>(dh_.get(), s.dh_n != nullptr ? s.dh_n + d * B * s.P : nullptr, B * s.P, acc_t(0));
    if (has_cell) widen<acc_t>(dc_.get(), s.dc_n != nullptr ? s.dc_n + d * B * s.H : nullptr, B * s.H, acc_t(0));
  }

  acc_t* h(int64_t row) { return dh_.get() + row * s_.P; }
  acc_t* c(int64_t row) { return dc_.get() + row * s_.H; }

  // What the output of step number i sent, added to what later steps sent.
  void receive(int64_t i, const RowRange& rows) {
    const int64_t t = s_.step(d_, i), base = s_.steps.first(t), end = std::min(rows.end, s_.steps.count(t));
    for (int64_t row = rows.begin; row < end; ++row) {
      const int64_t at = ((base + row) * s_.D + d_) * s_.P;
      each_vector<acc_t>(s_.P, [&](int64_t j, auto lanes) {
        V g = V::load(h(row) + j, lanes);
        if (s_.dy != nullptr) g += V::load(s_.dy + at + j, lanes);
        g.store(h(row) + j, lanes);
        if (s_.dh != nullptr) g.store(s_.dh + at + j, lanes);
      });
    }
  }
  // To the states before: panels [first, last) of the product of da [B, K] with the recurrent weights. `added`: beside
  // what passes by the product, z dh of a GRU.
  template <bool added>
  void send(int64_t i, const acc_t* da, const Panels<acc_t, 4>& weights, const RowRange& rows, int64_t first,
            int64_t last) {
    const int64_t end = std::min(rows.end, s_.steps.count(s_.step(d_, i)));
    multiply_panels(da, weights, s_.P, first, last, rows.begin, end,
                    [&](int64_t row, int64_t unit, auto lanes, const V& value) {
                      acc_t* to = h(row) + unit;
                      if constexpr (added)
                        (value + V::load(to, lanes)).store(to, lanes);
                      else
                        value.store(to, lanes);
                    });
  }
  // Gradients of the initial states, after all steps.
  void emit(const RowRange& rows) {
    const int64_t B = s_.steps.B, P = s_.P, H = s_.H;
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      narrow(s_.dh0 + (d_ * B + row) * P, h(row), P);
      if (s_.dc0 != nullptr) narrow(s_.dc0 + (d_ * B + row) * H, c(row), H);
    }
  }

 private:
  const recurrent::Sequence<T>& s_;
  int64_t d_;
  Buffer<acc_t> dh_, dc_;
};

template <class Cell, class T>
class SequenceBackward {
  using acc_t = accumulate_t<T>;
  using V = Vec<acc_t>;
  static constexpr int64_t W = V::width;
  static constexpr int G = Cell::gates, S = recurrent::saved_slots<Cell>;

 public:
  static constexpr bool backwards = true;

  // w_hh [D, gates H, P] and w_hr [D, P, H] as the forward pass has them: here they are multiplied from the other side.
  SequenceBackward(const recurrent::Sequence<T>& s, int64_t d)
      : s_(s),
        d_(d),
        recurrent_(plain_panels<acc_t>(s.w_hh + d * G * s.H * s.P, G * s.H, s.P, s.P, 1)),
        projection_(s.w_hr != nullptr ? plain_panels<acc_t>(s.w_hr + d * s.P * s.H, s.P, s.H, s.H, 1)
                                      : plain_panels<acc_t, T>(nullptr, 0, 0, 0, 0)),
        gradients_(s, d, Cell::has_cell),
        dm_(s.w_hr != nullptr ? s.steps.B * s.H : 0),
        da_(s.steps.B * G * s.H) {}

  int64_t work() const { return G * s_.H * 4 * W; }
  void begin(const RowRange&) {}
  template <class Share>
  void step(int64_t i, const RowRange& rows, const Share& share) {
    gradients_.receive(i, rows);
    if (s_.w_hr != nullptr)
      share(projection_.count(), [&](int64_t first, int64_t last) { unproject(i, rows, first, last); });
    cells(i, rows);
    share(recurrent_.count(), [&](int64_t first, int64_t last) {
      gradients_.template send<Cell::splits>(i, da_.get(), recurrent_, rows, first, last);
    });
  }
  void end(const RowRange& rows) { gradients_.emit(rows); }

 private:
  void unproject(int64_t i, const RowRange& rows, int64_t first, int64_t last) {
    const int64_t end = std::min(rows.end, s_.steps.count(s_.step(d_, i)));
    multiply_panels(gradients_.h(0), projection_, s_.H, first, last, rows.begin, end,
                    [&](int64_t row, int64_t unit, auto lanes, const V& value) {
                      value.store(dm_.get() + row * s_.H + unit, lanes);
                    });
  }
  void cells(int64_t i, const RowRange& rows) {
    const int64_t t = s_.step(d_, i), base = s_.steps.first(t), H = s_.H, D = s_.D;
    const int64_t end = std::min(rows.end, s_.steps.count(t));
    for (int64_t row = rows.begin; row < end; ++row) {
      const int64_t at = (base + row) * D + d_, earlier = s_.row_at(s_.before(d_, t), row);
      acc_t* dh = s_.w_hr != nullptr ? dm_.get() + row * H : gradients_.h(row);
      acc_t* dc = gradients_.c(row);
      each_vector<acc_t>(H, [&](int64_t j, auto lanes) {
        V g = V::load(dh + j, lanes), gc, h, h_before, c_before, saved[S], da[G], db[G];
        for (int k = 0; k < Cell::saved; ++k) saved[k] = V::load(s_.saved + (at * Cell::saved + k) * H + j, lanes);
        if constexpr (Cell::has_cell) {
          gc = V::load(dc + j, lanes);
          c_before = earlier >= 0 ? V::load(s_.cells + (earlier * D + d_) * H + j, lanes)
                                  : V::load(s_.c0 + (d_ * s_.steps.B + row) * H + j, lanes);
        }
        if constexpr (Cell::splits)
          h_before = earlier >= 0 ? V::load(s_.y + (earlier * D + d_) * H + j, lanes)
                                  : V::load(s_.h0 + (d_ * s_.steps.B + row) * H + j, lanes);
        if constexpr (G == 1) h = V::load(s_.y + at * H + j, lanes);
        Cell::backward(g, gc, saved, h, h_before, c_before, da, db);
        for (int k = 0; k < G; ++k) {
          da[k].store(s_.dgates + (at * G + k) * H + j, lanes);
          if constexpr (Cell::splits) db[k].store(s_.dh_gates + (at * G + k) * H + j, lanes);
          db[k].store(da_.get() + (row * G + k) * H + j, lanes);
        }
        if constexpr (Cell::has_cell) gc.store(dc + j, lanes);
        if (s_.w_hr == nullptr) g.store(dh + j, lanes);
      });
    }
  }

  const recurrent::Sequence<T>& s_;
  int64_t d_;
  Panels<acc_t, 4> recurrent_, projection_;
  SequenceGradients<T> gradients_;
  Buffer<acc_t> dm_, da_;
};

// Multiply-adds worth a thread's while.
inline constexpr int64_t sequence_grain = 65536;

// Takes the runs, one for each direction, through all steps: each thread a chunk of the rows, or, where rows are few, all
// threads each step, of which they share by share(count, part(first, last)) what they can do together.
template <class Run>
void through_steps(int64_t steps, int64_t B, const std::vector<std::unique_ptr<Run>>& runs) {
  const int64_t D = int64_t(runs.size()), threads = thread_count();
  const int64_t chunks = std::min(ceil_div(threads, D), ceil_div(B, 2));
  const auto take = [&](Run& run, const RowRange& range, const auto& share) {
    run.begin(range);
    for (int64_t k = 0; k < steps; ++k) run.step(Run::backwards ? steps - 1 - k : k, range, share);
    run.end(range);
  };
  if (threads == 1 || chunks * D >= threads)
    return parallel_for(D * chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const int64_t chunk = k % chunks;
        take(*runs[k / chunks], {B * chunk / chunks, B * (chunk + 1) / chunks},
             [](int64_t count, const auto& part) { part(int64_t{0}, count); });
      }
    });
  for (auto& run : runs) {
    const int64_t grain = ceil_div(sequence_grain, run->work() * B);
    take(*run, {0, B}, [&](int64_t count, const auto& part) { parallel_for(count, grain, part); });
  }
}

template <class Run, class Layer>
std::vector<std::unique_ptr<Run>> runs_of(const Layer& s) {
  std::vector<std::unique_ptr<Run>> runs;
  for (int64_t d = 0; d < s.D; ++d) runs.push_back(std::make_unique<Run>(s, d));
  return runs;
}

template <class Cell, class T>
void layer_forward(const OpScope&, const recurrent::Sequence<T>& s) {
  if (s.steps.B > 0) through_steps(s.steps.T, s.steps.B, runs_of<SequenceForward<Cell, T>>(s));
}

template <class Cell, class T>
void layer_backward(const OpScope&, const recurrent::Sequence<T>& s) {
  if (s.steps.B > 0) through_steps(s.steps.T, s.steps.B, runs_of<SequenceBackward<Cell, T>>(s));
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY
