// A layer of a recurrent network over all steps, in one persistent launch: each block keeps the recurrent weights of
// its hidden units in shared memory, and all blocks meet at a grid barrier between two steps. Where those of some units
// do not fit, they are read from L2 in each step; where less than half of them do, the same kernel is launched once per
// step and reads all from L2.
//
// A warp multiplies 4 rows of weights with 8 rows of states, its lanes sharing the sum over K; 31 shuffles leave the 32
// sums on the 32 lanes. The 4 rows are the gates of one unit (forward) or 4 units (backward, and cells of one gate).
//
// In bf16 and fp16 tensor cores multiply (recurrent_mma.cuh), and registers hold weights too: MmaPlan says where.
// Products with the weights of a projection stay on CUDA cores, and so does all else in a kernel that is launched once
// per step.
#pragma once

#include "cuda/math.cuh"
#include "cuda/recurrent_mma.cuh"

#include "common/recurrent.h"
#include "common/tensor.h"

namespace pyops {

inline constexpr int sequence_threads = 256, tile_rows = 8, tile_weights = 4;

// What the kernels need beside the layer itself. c and direct [D, B, H]: state and gradient between two steps in the
// type of sums. m [D, B, H]: what a projection multiplies.
template <class T>
struct SequenceWork {
  accumulate_t<T>*c, *direct;
  T* m;
  unsigned* barrier;
  const T *w_hh_t, *w_hr_t;  // backward: [D, P, gates H] and [D, H, P]
  int blocks_per_direction;
  int64_t begin, end;  // steps of this launch
  int phase;           // 0: all of them, with barriers; 1, 2: this part of one step
  int64_t kept;        // units of a block whose weights are in shared memory
};

// After it, lane l holds the sum over all lanes of v[l].
template <class A>
PYOPS_DEVICE A sum_to_lanes(A (&v)[32]) {
  const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
  for (int step = 0; step < 5; ++step) {
    const int half = 16 >> step;
    const bool upper = (lane & half) != 0;
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      if (j >= half) break;
      const A mine = upper ? v[j + half] : v[j], theirs = upper ? v[j] : v[j + half];
      v[j] = mine + __shfl_xor_sync(0xffffffffu, theirs, half);
    }
  }
  return v[0];
}

// Adds to sum[i * tile_rows + r] the products of weights[i] and states[r] of this lane's part of K. `whole`: lanes read
// two two-byte numbers at once, which K must allow. All loads of a turn leave before the first product: nothing in the
// loop depends on a condition, so that they do not wait for each other; so do those of `turns` turns.
template <int rows, bool whole, int turns, class T, class A>
PYOPS_DEVICE void add_tile(A (&sum)[32], const T* const (&weights)[tile_weights], const T* const (&states)[tile_rows],
                           int64_t K) {
  constexpr int N = whole && sizeof(T) == 2 ? 2 : 1;
#pragma unroll turns
  for (int64_t k = threadIdx.x % 32 * N; k < K; k += 32 * N) {
    Vec<T, N> w[tile_weights], h[rows];
#pragma unroll
    for (int i = 0; i < tile_weights; ++i) w[i] = load_vec<N>(weights[i] + k);
#pragma unroll
    for (int r = 0; r < rows; ++r) h[r] = load_vec<N>(states[r] + k);
#pragma unroll
    for (int r = 0; r < rows; ++r)
#pragma unroll
      for (int i = 0; i < tile_weights; ++i)
#pragma unroll
        for (int n = 0; n < N; ++n) sum[i * tile_rows + r] += A(to_acc(w[i][n])) * A(to_acc(h[r][n]));
  }
}

// The product of weights[4] and states[8], each K numbers: lane l gets weights[l / 8] · states[l % 8]. Rows of states
// that are null come last; what null rows give means nothing.
template <class T, int turns = 2>
PYOPS_DEVICE accumulate_t<T> tile_dot(const T* const (&weights)[tile_weights], const T* const (&states)[tile_rows],
                                      int64_t K) {
  accumulate_t<T> sum[32]{};
  if (weights[0] == nullptr || states[0] == nullptr) return sum[0];
  const T *w[tile_weights], *h[tile_rows];
#pragma unroll
  for (int i = 0; i < tile_weights; ++i) w[i] = weights[i] != nullptr ? weights[i] : weights[0];
#pragma unroll
  for (int r = 0; r < tile_rows; ++r) h[r] = states[r] != nullptr ? states[r] : states[0];
  if (K % 2 != 0)
    add_tile<tile_rows, false, turns>(sum, w, h, K);
  else if (states[1] == nullptr)
    add_tile<1, true, turns>(sum, w, h, K);
  else
    add_tile<tile_rows, true, turns>(sum, w, h, K);
  return sum_to_lanes(sum);
}

// Turns in flight of a projection's products: they stand in kernels whose registers are full of weights.
inline constexpr int of_projection = 1;

// [0, n) cut into `parts`: part i.
struct Slice {
  int64_t begin, end;
  PYOPS_HOST_DEVICE static Slice of(int64_t n, int parts, int i) {
    const int64_t size = ceil_div(n, parts);
    return {size * i < n ? size * i : n, size * (i + 1) < n ? size * (i + 1) : n};
  }
  PYOPS_HOST_DEVICE int64_t size() const { return end - begin; }
  PYOPS_HOST_DEVICE Slice first(int64_t n) const { return {begin, n < size() ? begin + n : end}; }
};

// Copies rows [units of the slice][gates][K] of w [gates, H, K] (gates = 1: [H, K]) into shared memory.
template <class T>
PYOPS_DEVICE void keep_weights(T* shared, const T* w, Slice slice, int gates, int64_t H, int64_t K) {
  const int64_t total = slice.size() * gates * K;
  for (int64_t i = threadIdx.x; i < total; i += blockDim.x) {
    const int64_t unit = i / (gates * K), gate = i / K % gates;
    shared[i] = w[(gate * H + slice.begin + unit) * K + i % K];
  }
  __syncthreads();
}

// Where this launch stands: direction, and whether weights are resident.
struct Place {
  int d, part;
  PYOPS_DEVICE explicit Place(int blocks_per_direction)
      : d(static_cast<int>(blockIdx.x) / blocks_per_direction),
        part(static_cast<int>(blockIdx.x) % blocks_per_direction) {}
};

// Calls item(unit, row) for tiles of `units_per_tile` units of the slice and 8 rows, a warp each.
template <class F>
PYOPS_DEVICE void each_tile(Slice slice, int64_t rows, int units_per_tile, F&& item) {
  const int64_t groups = ceil_div(rows, tile_rows), tiles = ceil_div(slice.size(), units_per_tile) * groups;
  for (int64_t i = threadIdx.x / 32; i < tiles; i += blockDim.x / 32)
    item(slice.begin + i / groups * units_per_tile, i % groups * tile_rows);
}

// Of the tile at (unit, row0): weight(unit) · state(row), K numbers each; states may be null from some row on.
template <class T, int turns = 2, class Weight, class State>
PYOPS_DEVICE accumulate_t<T> tile_product(int64_t unit, int64_t units, int64_t row0, int64_t rows, int64_t K,
                                          Weight&& weight, State&& state) {
  const T *w[tile_weights], *h[tile_rows];
#pragma unroll
  for (int i = 0; i < tile_weights; ++i) w[i] = unit + i < units ? weight(unit + i) : nullptr;
#pragma unroll
  for (int r = 0; r < tile_rows; ++r) h[r] = row0 + r < rows ? state(row0 + r) : nullptr;
  return tile_dot<T, turns>(w, h, K);
}

// put(row, unit, weight(unit) · state(row)) for the units of the slice and `rows` rows, by tiles of both.
template <class T, int turns = 2, class Weight, class State, class Put>
PYOPS_DEVICE void each_product(Slice slice, int64_t rows, int64_t K, Weight&& weight, State&& state, Put&& put) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  each_tile(slice, rows, tile_weights, [&](int64_t unit, int64_t row0) {
    const auto sum = tile_product<T, turns>(unit, slice.end, row0, rows, K, weight, state);
    const int64_t row = row0 + lane % tile_rows;
    unit += lane / tile_rows;
    if (row < rows && unit < slice.end) put(row, unit, sum);
  });
}

// What layers of a stack exchange; null for a layer that stands alone. Forward: the output of the layer below and the
// weights for it. Backward: the gradients of the gates of the layer above and its weights, transposed.
template <class T>
struct Neighbour {
  const T *rows, *weights, *bias;
};

template <class Cell, class T, bool stacked = false>
struct ForwardStep {
  using A = accumulate_t<T>;
  static constexpr int G = Cell::gates;
  static constexpr int units_per_tile = G == 1 ? 4 : 1;
  const recurrent::Sequence<T>& s;
  const SequenceWork<T>& work;
  Slice slice, kept;  // kept: the units whose weights are in shared memory, from the first on
  int d;
  const T* shared;
  Neighbour<T> below{};

  PYOPS_DEVICE const T* weights(int64_t unit, int gate) const {
    if (unit >= slice.end) return nullptr;
    if (unit < kept.end) return shared + ((unit - kept.begin) * G + gate) * s.P;
    return s.w_hh + ((static_cast<int64_t>(d) * G + gate) * s.H + unit) * s.P;
  }
  // Those for the layer below stand behind the others.
  PYOPS_DEVICE const T* input_weights(int64_t unit, int gate) const {
    if (unit >= slice.end) return nullptr;
    if (unit < kept.end) return shared + ((kept.size() + unit - kept.begin) * G + gate) * s.H;
    return below.weights + (gate * s.H + unit) * s.H;
  }
  // Gates of one unit: lanes 0 to 7 collect those of their row. One gate: every lane has its own unit.
  PYOPS_DEVICE void of_lane(A sum, A (&to)[G]) const {
    if constexpr (G == 1) {
      to[0] = sum;
    } else {
#pragma unroll
      for (int k = 0; k < G; ++k) to[k] = __shfl_sync(0xffffffffu, sum, k * tile_rows + threadIdx.x % tile_rows);
    }
  }
  PYOPS_DEVICE void last_state(int64_t t, int64_t row, int64_t unit, T value) const {
    if (row >= s.steps.count(s.after(d, t))) s.h_n[(d * s.steps.B + row) * s.P + unit] = value;
  }

  // What a unit's cell reads beside its products: pre-activations from the input, or in a stack the bias, and its
  // states. As loaded: a conversion would wait for the load.
  struct Inputs {
    T a[G]{}, h{}, first_c{};
    A c{};
    bool starts{};
  };
  PYOPS_DEVICE Inputs inputs(int64_t t, int64_t row, int64_t unit) const {
    const int64_t at = (s.steps.first(t) + row) * s.D + d, own = (d * s.steps.B + row) * s.H + unit;
    Inputs in;
#pragma unroll
    for (int k = 0; k < G; ++k) {
      if (!stacked || below.rows == nullptr)
        in.a[k] = s.gates[(at * G + k) * s.H + unit];
      else if (below.bias != nullptr)
        in.a[k] = below.bias[k * s.H + unit];
    }
    if constexpr (Cell::splits) in.h = s.state_before(d, t, row)[unit];
    if constexpr (Cell::has_cell) {
      in.starts = s.row_at(s.before(d, t), row) < 0;
      if (in.starts)
        in.first_c = s.c0[own];
      else
        in.c = work.c[own];
    }
    return in;
  }

  PYOPS_DEVICE void cells(int64_t t) const {
    const int64_t rows = s.steps.count(t), first = s.steps.first(t);
    const int lane = static_cast<int>(threadIdx.x % 32);
    each_tile(slice, rows, units_per_tile, [&](int64_t unit, int64_t row0) {
      const T *w[tile_weights], *h[tile_rows];
#pragma unroll
      for (int i = 0; i < tile_weights; ++i) w[i] = G == 1 ? weights(unit + i, 0) : i < G ? weights(unit, i) : nullptr;
#pragma unroll
      for (int r = 0; r < tile_rows; ++r) h[r] = row0 + r < rows ? s.state_before(d, t, row0 + r) : nullptr;
      A a[G]{}, b[G];
      of_lane(tile_dot<T>(w, h, s.P), b);
      if constexpr (stacked) {
        if (below.rows != nullptr) {
#pragma unroll
          for (int i = 0; i < tile_weights; ++i)
            w[i] = G == 1 ? input_weights(unit + i, 0) : i < G ? input_weights(unit, i) : nullptr;
#pragma unroll
          for (int r = 0; r < tile_rows; ++r) h[r] = row0 + r < rows ? below.rows + (first + row0 + r) * s.H : nullptr;
          of_lane(tile_dot<T>(w, h, s.H), a);
        }
      }
      const int64_t row = row0 + lane % tile_rows;
      if constexpr (G == 1) unit += lane / tile_rows;
      if (G > 1 && lane >= tile_rows) return;
      if (row < rows && unit < slice.end) update(t, row, unit, inputs(t, row, unit), a, b);
    });
  }

  // The rows of weights that a product of tensor cores takes for a unit: its gates; in a stack those of input and state
  // are added up in the product, but where a cell keeps the last gate's apart, which takes a row more.
  static constexpr int slots = G + (stacked && Cell::splits);
  PYOPS_DEVICE const T* mma_weights(int segment, int m) const {
    const int64_t unit = slice.begin + m / slots;
    const int slot = m % slots, gate = slot < G ? slot : G - 1;
    if (unit >= slice.end || m >= slice.size() * slots) return nullptr;
    if (slots > G && slot >= G - 1 && (slot == G) != (segment == 1)) return nullptr;
    const T* w = segment == 1 ? below.weights : s.w_hh + static_cast<int64_t>(d) * G * s.H * s.P;
    return w + (gate * s.H + unit) * (segment == 1 ? s.H : s.P);
  }
  // run(row0, count): the product of `count` rows of states from row0 on, step t's.
  template <class Product, class Run>
  PYOPS_DEVICE void cells(int64_t t, Product& product, Run&& run) const {
    const int64_t rows = s.steps.count(t);
    const int units = static_cast<int>(slice.size()), thread = static_cast<int>(threadIdx.x);
    for (int64_t row0 = 0; row0 < rows; row0 += Product::rows) {
      if (row0 > 0) __syncthreads();
      const int here = static_cast<int>(rows - row0 < Product::rows ? rows - row0 : Product::rows);
      // On their way while the product runs.
      Inputs ahead;
      if (thread < here * units) ahead = inputs(t, row0 + thread / units, slice.begin + thread % units);
      run(row0, here);
      for (int i = thread; i < here * units; i += sequence_threads) {
        const int row = i / units, unit = i % units;
        A a[G]{}, b[G];
#pragma unroll
        for (int k = 0; k < G; ++k) b[k] = product.sum(row, unit * slots + k);
        if constexpr (slots > G) a[G - 1] = product.sum(row, unit * slots + G);
        if (i >= sequence_threads) ahead = inputs(t, row0 + row, slice.begin + unit);
        update(t, row0 + row, slice.begin + unit, ahead, a, b);
      }
    }
  }

  template <class Product>
  PYOPS_DEVICE void cells(int64_t t, Product& product) const {
    if (slice.size() == 0) return;
    const int64_t first = s.steps.first(t);
    cells(t, product, [&](int64_t row0, int count) {
      product.run(count, [&](int segment, int row) -> const T* {
        if (stacked && segment == 1) return below.rows + (first + row0 + row) * s.H;
        return s.state_before(d, t, row0 + row);
      });
    });
  }

  // a, b: products with the layer below and with the state before.
  PYOPS_DEVICE void update(int64_t t, int64_t row, int64_t unit, const Inputs& in, A (&a)[G], A (&b)[G]) const {
    const int64_t at = (s.steps.first(t) + row) * s.D + d, own = (d * s.steps.B + row) * s.H + unit;
    A h = to_acc(in.h), c = in.starts ? A(to_acc(in.first_c)) : in.c, saved[recurrent::saved_slots<Cell>]{};
#pragma unroll
    for (int k = 0; k < G; ++k) a[k] += to_acc(in.a[k]);
    if constexpr (Cell::splits)
      if (s.b_n != nullptr) b[G - 1] += to_acc(s.b_n[d * s.H + unit]);
    Cell::forward(a, b, h, c, saved);
    if constexpr (Cell::has_cell) {
      work.c[own] = c;
      if (s.cells != nullptr) s.cells[at * s.H + unit] = from_acc<T>(c);
      if (row >= s.steps.count(s.after(d, t))) s.c_n[own] = from_acc<T>(c);
    }
    if (s.saved != nullptr)
#pragma unroll
      for (int k = 0; k < Cell::saved; ++k) s.saved[(at * Cell::saved + k) * s.H + unit] = from_acc<T>(saved[k]);
    if (s.w_hr != nullptr) {
      work.m[own] = from_acc<T>(h);
    } else {
      s.y[at * s.P + unit] = from_acc<T>(h);
      last_state(t, row, unit, from_acc<T>(h));
    }
  }

  PYOPS_DEVICE void project(int64_t t) const {
    const int64_t first = s.steps.first(t);
    each_product<T, of_projection>(
        Slice::of(s.P, work.blocks_per_direction, Place(work.blocks_per_direction).part), s.steps.count(t), s.H,
        [&](int64_t unit) { return s.w_hr + (d * s.P + unit) * s.H; },
        [&](int64_t row) { return work.m + (d * s.steps.B + row) * s.H; },
        [&](int64_t row, int64_t unit, A sum) {
          const T h = from_acc<T>(sum);
          s.y[((first + row) * s.D + d) * s.P + unit] = h;
          last_state(t, row, unit, h);
        });
  }
};

// tiles: 0, or the rows of tiles of a product on tensor cores.
template <class Cell, class T, int tiles = 0>
__global__ void sequence_forward_kernel(recurrent::Sequence<T> s, SequenceWork<T> work) {
  const Place place(work.blocks_per_direction);
  const Slice slice = Slice::of(s.H, work.blocks_per_direction, place.part), kept = slice.first(work.kept);
  const auto steps = [&](const auto& step, const auto& cells) {
    for (int64_t i = work.begin; i < work.end; ++i) {
      const int64_t t = s.step(place.d, i);
      if (work.phase != 2) cells(t);
      if (work.phase == 0) grid_sync(work.barrier);
      if (s.w_hr == nullptr) continue;
      if (work.phase != 1) step.project(t);
      if (work.phase == 0) grid_sync(work.barrier);
    }
  };
  if constexpr (tiles > 0) {
    using Product = MmaProduct<T, tiles>;
    const ForwardStep<Cell, T> step{s, work, slice, kept, place.d, nullptr};
    Product product(shared_storage<typename Product::Shared>(), {s.P},
                    [&](int segment, int m) { return step.mma_weights(segment, m); });
    steps(step, [&](int64_t t) { step.cells(t, product); });
  } else {
    T* shared = work.phase == 0 ? &shared_storage<T>() : nullptr;
    if (shared != nullptr)
      keep_weights(shared, s.w_hh + place.d * Cell::gates * s.H * s.P, kept, Cell::gates, s.H, s.P);
    const ForwardStep<Cell, T> step{s, work, slice, kept, place.d, shared};
    steps(step, [&](int64_t t) { step.cells(t); });
  }
}

// The gradient of a state that step t made (t = -1: an initial state, which goes out): `sent` came through w_hh from
// the next step `later`, what the output sent, or in a stack the layer above, is added, and put(row, unit, dh) takes it
// on.
template <bool splits, class T, class Put>
PYOPS_DEVICE void gradient_of_state(const recurrent::Sequence<T>& s, const SequenceWork<T>& work, int d, int64_t t,
                                    int64_t later, int64_t row, int64_t unit, accumulate_t<T> sent,
                                    accumulate_t<T> from_above, Put&& put) {
  using A = accumulate_t<T>;
  const int64_t now = t >= 0 ? s.steps.count(t) : 0, then = s.steps.count(later);
  const int64_t own = (d * s.steps.B + row) * s.P + unit;
  A dh = row < then ? sent : s.dh_n != nullptr ? A(to_acc(s.dh_n[own])) : A(0);
  if constexpr (splits)
    if (row < then) dh += work.direct[own];
  if (row >= now) {
    s.dh0[own] = from_acc<T>(dh);
    return;
  }
  if (s.dy != nullptr) dh += to_acc(s.dy[((s.steps.first(t) + row) * s.D + d) * s.P + unit]);
  put(row, unit, dh + from_above);
}

// Of all states of the slice's units: gradients [N, D, K] are what the next step sent.
template <bool splits, bool stacked, class T, class Put>
PYOPS_DEVICE void gradients_of_states(const recurrent::Sequence<T>& s, const SequenceWork<T>& work, Slice slice,
                                      Slice kept, int d, const T* shared, const T* sent, const Neighbour<T>& above,
                                      int64_t K, int64_t t, int64_t later, Put&& put) {
  using A = accumulate_t<T>;
  const int64_t now = t >= 0 ? s.steps.count(t) : 0, then = s.steps.count(later), rows = now > then ? now : then;
  const int lane = static_cast<int>(threadIdx.x % 32);
  each_tile(slice, rows, tile_weights, [&](int64_t unit, int64_t row0) {
    const A dh = tile_product<T>(
        unit, slice.end, row0, rows, K,
        [&](int64_t unit) {
          return unit < kept.end ? shared + (unit - kept.begin) * K
                                 : work.w_hh_t + (static_cast<int64_t>(d) * s.P + unit) * K;
        },
        [&](int64_t row) { return row < then ? sent + ((s.steps.first(later) + row) * s.D + d) * K : nullptr; });
    A from_above{};
    if constexpr (stacked)
      if (above.rows != nullptr)
        from_above = tile_product<T>(
            unit, slice.end, row0, now, K,
            [&](int64_t unit) {
              return unit < kept.end ? shared + (kept.size() + unit - kept.begin) * K : above.weights + unit * K;
            },
            [&](int64_t row) { return above.rows + (s.steps.first(t) + row) * K; });
    const int64_t row = row0 + lane % tile_rows;
    unit += lane / tile_rows;
    if (row < rows && unit < slice.end) gradient_of_state<splits>(s, work, d, t, later, row, unit, dh, from_above, put);
  });
}

template <class Cell, class T, bool stacked = false>
struct BackwardStep {
  using A = accumulate_t<T>;
  static constexpr int G = Cell::gates;
  const recurrent::Sequence<T>& s;
  const SequenceWork<T>& work;
  Slice slice, kept;
  int d;
  const T* shared;
  Neighbour<T> above{};

  PYOPS_DEVICE const T* sent() const { return Cell::splits ? s.dh_gates : s.dgates; }
  PYOPS_DEVICE void arrived(int64_t t, int64_t row, int64_t unit, A dh) const {
    if (s.w_hr != nullptr)
      s.dh[((s.steps.first(t) + row) * s.D + d) * s.P + unit] = from_acc<T>(dh);
    else
      cell(t, row, unit, dh);
  }

  // Step t, or -1 after the last: what step `later` sent goes through w_hh to the states that step t made.
  PYOPS_DEVICE void states(int64_t t, int64_t later) const {
    gradients_of_states<Cell::splits, stacked>(s, work, slice, kept, d, shared, sent(), above, G * s.H, t, later,
                                               [&](int64_t row, int64_t unit, A dh) { arrived(t, row, unit, dh); });
    if constexpr (Cell::has_cell)
      if (s.w_hr == nullptr) ended(t, later);
  }

  // The same on tensor cores; what comes from the layer above is part of the product.
  PYOPS_DEVICE const T* mma_weights(int segment, int m) const {
    const int64_t unit = slice.begin + m, K = G * s.H;
    if (unit >= slice.end) return nullptr;
    return segment == 1 ? above.weights + unit * K : work.w_hh_t + (static_cast<int64_t>(d) * s.P + unit) * K;
  }
  template <class Product>
  PYOPS_DEVICE void states(int64_t t, int64_t later, Product& product) const {
    const int64_t now = t >= 0 ? s.steps.count(t) : 0, then = s.steps.count(later), rows = now > then ? now : then;
    const int64_t K = G * s.H;
    const int units = static_cast<int>(slice.size());
    for (int64_t row0 = 0; units > 0 && row0 < rows; row0 += Product::rows) {
      if (row0 > 0) __syncthreads();
      const int here = static_cast<int>(rows - row0 < Product::rows ? rows - row0 : Product::rows);
      product.run(here, [&](int segment, int row) -> const T* {
        if (stacked && segment == 1)
          return row0 + row < now ? above.rows + (s.steps.first(t) + row0 + row) * K : nullptr;
        return row0 + row < then ? sent() + ((s.steps.first(later) + row0 + row) * s.D + d) * K : nullptr;
      });
      for (int i = static_cast<int>(threadIdx.x); i < here * units; i += sequence_threads) {
        const int64_t row = row0 + i / units, unit = slice.begin + i % units;
        const A sum = product.sum(i / units, i % units);
        // Rows of which step `later` sent nothing have only what came from above.
        gradient_of_state<Cell::splits>(s, work, d, t, later, row, unit, sum, row < then ? A(0) : sum,
                                        [&](int64_t row, int64_t unit, A dh) { arrived(t, row, unit, dh); });
      }
    }
    if constexpr (Cell::has_cell)
      if (s.w_hr == nullptr) ended(t, later);
  }

  // With a projection: through it, to the cells of step t.
  PYOPS_DEVICE void cells(int64_t t, int64_t later) const {
    each_product<T, of_projection>(
        Slice::of(s.H, work.blocks_per_direction, Place(work.blocks_per_direction).part), t >= 0 ? s.steps.count(t) : 0,
        s.P, [&](int64_t unit) { return work.w_hr_t + (d * s.H + unit) * s.P; },
        [&](int64_t row) { return s.dh + ((s.steps.first(t) + row) * s.D + d) * s.P; },
        [&](int64_t row, int64_t unit, A dm) { cell(t, row, unit, dm); });
    if constexpr (Cell::has_cell) ended(t, later);
  }

  // dc of sequences that began with step `later`.
  PYOPS_DEVICE void ended(int64_t t, int64_t later) const {
    const int64_t now = t >= 0 ? s.steps.count(t) : 0, then = s.steps.count(later);
    const Slice mine = Slice::of(s.H, work.blocks_per_direction, Place(work.blocks_per_direction).part);
    for (int64_t i = threadIdx.x; now < then && i < (then - now) * mine.size(); i += blockDim.x) {
      const int64_t own = (d * s.steps.B + now + i / mine.size()) * s.H + mine.begin + i % mine.size();
      s.dc0[own] = from_acc<T>(work.c[own]);
    }
  }

  PYOPS_DEVICE void cell(int64_t t, int64_t row, int64_t unit, A dh) const {
    const int64_t H = s.H, at = (s.steps.first(t) + row) * s.D + d, own = (d * s.steps.B + row) * H + unit;
    const int64_t earlier = s.row_at(s.before(d, t), row);
    const bool ends = s.row_at(s.after(d, t), row) < 0;
    A dc{}, h{}, h_before{}, c_before{}, saved[recurrent::saved_slots<Cell>]{}, da[G], db[G];
#pragma unroll
    for (int k = 0; k < Cell::saved; ++k) saved[k] = to_acc(s.saved[(at * Cell::saved + k) * H + unit]);
    if constexpr (Cell::has_cell) {
      if (!ends) dc = work.c[own];
      if (ends && s.dc_n != nullptr) dc = to_acc(s.dc_n[own]);
      c_before = earlier >= 0 ? to_acc(s.cells[(earlier * s.D + d) * H + unit]) : to_acc(s.c0[own]);
    }
    if constexpr (Cell::splits)
      h_before = earlier >= 0 ? to_acc(s.y[(earlier * s.D + d) * H + unit]) : to_acc(s.h0[own]);
    if constexpr (G == 1) h = to_acc(s.y[at * H + unit]);
    Cell::backward(dh, dc, saved, h, h_before, c_before, da, db);
#pragma unroll
    for (int k = 0; k < G; ++k) {
      s.dgates[(at * G + k) * H + unit] = from_acc<T>(da[k]);
      if constexpr (Cell::splits) s.dh_gates[(at * G + k) * H + unit] = from_acc<T>(db[k]);
    }
    if constexpr (Cell::has_cell) work.c[own] = dc;
    if constexpr (Cell::splits) work.direct[own] = dh;
  }
};

template <class Cell, class T, int tiles = 0>
__global__ void sequence_backward_kernel(recurrent::Sequence<T> s, SequenceWork<T> work) {
  const Place place(work.blocks_per_direction);
  const Slice slice = Slice::of(s.P, work.blocks_per_direction, place.part), kept = slice.first(work.kept);
  const int64_t K = Cell::gates * s.H;
  const auto steps = [&](const auto& step, const auto& states) {
    // One more than there are steps: the last one gives the gradients of the initial states.
    for (int64_t i = work.begin; i < work.end; ++i) {
      const auto [t, later] = s.steps_backwards(place.d, i);
      if (work.phase != 2) states(t, later);
      if (work.phase == 0) grid_sync(work.barrier);
      if (s.w_hr == nullptr) continue;
      if (work.phase != 1) step.cells(t, later);
      if (work.phase == 0) grid_sync(work.barrier);
    }
  };
  if constexpr (tiles > 0) {
    using Product = MmaProduct<T, tiles>;
    const BackwardStep<Cell, T> step{s, work, slice, kept, place.d, nullptr};
    Product product(shared_storage<typename Product::Shared>(), {K},
                    [&](int segment, int m) { return step.mma_weights(segment, m); });
    steps(step, [&](int64_t t, int64_t later) { step.states(t, later, product); });
  } else {
    T* shared = work.phase == 0 ? &shared_storage<T>() : nullptr;
    if (shared != nullptr) keep_weights(shared, work.w_hh_t + place.d * s.P * K, kept, 1, s.P, K);
    const BackwardStep<Cell, T> step{s, work, slice, kept, place.d, shared};
    steps(step, [&](int64_t t, int64_t later) { step.states(t, later); });
  }
}

}  // namespace pyops
