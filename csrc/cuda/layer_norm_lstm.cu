// layer_norm_lstm · CUDA
//   a = n(x) * gain_x + n(y) * gain_y + bias;  c' = f c + i g,  h' = o tanh(n(c') * gain_c + bias_c);  n: a row with
//   mean 0 and variance 1
// layout   head of common/layer_norm_lstm.h
// mapping  step: a block takes a row, a thread hidden units blockDim apart; the means are sums over the block
//          layer: one launch for all steps (head of cuda/recurrent_sequence.cuh), each in two parts with a barrier after
//          both: all blocks multiply, then rows are dealt out to blocks as in a step
// memory   x, y and c come from DRAM once, and once or twice more from the caches; backward computes the gates again
// numerics two-pass variance, all in fp32 (fp64 for fp64), in a layer also y and c' between steps
#include "cuda/recurrent_layer.cuh"

#include "common/layer_norm_lstm.h"

namespace pyops {

template <class A>
struct RowScale {
  A mean, rstd;
  template <class T>
  PYOPS_DEVICE A operator()(const T* row, int64_t i) const {
    return (to_acc(row[i]) - mean) * rstd;
  }
};

// The statistics of a row as they are kept.
template <class A>
struct RowScales {
  RowScale<A> x, y, c;
  PYOPS_DEVICE static RowScales load(const A* s) { return {{s[0], s[1]}, {s[2], s[3]}, {s[4], s[5]}}; }
  PYOPS_DEVICE void store(A* to) const {
    if (threadIdx.x != 0) return;
    to[0] = x.mean, to[1] = x.rstd, to[2] = y.mean, to[3] = y.rstd, to[4] = c.mean, to[5] = c.rstd;
  }
};

template <class A>
struct LayerNormLstmShared {
  BlockScratch<A> scratch;
};

template <class A, class T>
PYOPS_DEVICE RowScale<A> row_scale(const T* row, int64_t n, A eps, BlockScratch<A>& scratch) {
  A total = 0, square = 0;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) total += to_acc(row[i]);
  const A mean = block_sum(total, scratch) / A(n);
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    const A d = to_acc(row[i]) - mean;
    square += d * d;
  }
  return {mean, A(1) / sqrt(block_sum(square, scratch) / A(n) + eps)};
}

// The four pre-activations of unit i.
template <class T, class Y, class A>
PYOPS_DEVICE void load_gates(const NormalisedParameters<T>& p, const T* x, const Y* y, RowScale<A> of_x,
                             RowScale<A> of_y, int64_t i, A (&a)[4]) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int64_t at = k * p.H + i;
    a[k] = of_x(x, at) * to_acc(p.gain_x[at]) + of_y(y, at) * to_acc(p.gain_y[at]);
    if (p.bias != nullptr) a[k] += to_acc(p.bias[at]);
  }
}

template <class T>
PYOPS_DEVICE accumulate_t<T> scaled_cell(const NormalisedParameters<T>& p, accumulate_t<T> normalised, int64_t i) {
  const auto z = normalised * to_acc(p.gain_c[i]);
  return p.bias_c != nullptr ? z + to_acc(p.bias_c[i]) : z;
}

// A row, by one block: from x, y and c to c', which may be c, and to h' by put(i, h').
template <class T, class Y, class C, class A, class Put>
PYOPS_DEVICE RowScales<A> row_forward(const NormalisedParameters<T>& p, A eps, const T* x, const Y* y, const C* c,
                                      C* next_c, BlockScratch<A>& scratch, Put&& put) {
  RowScales<A> of;
  of.x = row_scale<A>(x, 4 * p.H, eps, scratch);
  of.y = row_scale<A>(y, 4 * p.H, eps, scratch);
  for (int64_t i = threadIdx.x; i < p.H; i += blockDim.x) {
    A a[4], zero[4]{}, h{}, s[4], now = to_acc(c[i]);
    load_gates(p, x, y, of.x, of.y, i, a);
    recurrent::Lstm::forward(a, zero, h, now, s);
    next_c[i] = from_acc<C>(now);
  }
  // Each thread reads the c' that it wrote.
  of.c = row_scale<A>(next_c, p.H, eps, scratch);
  for (int64_t i = threadIdx.x; i < p.H; i += blockDim.x) {
    A a[4];
    load_gates(p, x, y, of.x, of.y, i, a);
    put(i, sigmoid(a[3]) * tanh(scaled_cell(p, of.c(next_c, i), i)));
  }
  return of;
}

// The gradient of a row under normalisation: rstd (g - mean(g) - n mean(g n)).
template <class A>
struct RowGradient {
  A mean_g, mean_gn, rstd;
  PYOPS_DEVICE RowGradient(A g, A gn, int64_t n, A rstd_, BlockScratch<A>& scratch)
      : mean_g(block_sum(g, scratch) / A(n)), mean_gn(block_sum(gn, scratch) / A(n)), rstd(rstd_) {}
  PYOPS_DEVICE A operator()(A g, A n) const { return rstd * (g - mean_g - n * mean_gn); }
};

template <class T, class A>
PYOPS_DEVICE void through_normalisation(const T* v, RowScale<A> of_v, const T* gain, const A* da, T* dv, int64_t n,
                                        BlockScratch<A>& scratch) {
  A sum_g = 0, sum_gn = 0;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    const A g = da[i] * to_acc(gain[i]);
    sum_g += g;
    sum_gn += g * of_v(v, i);
  }
  const RowGradient<A> gradient(sum_g, sum_gn, n, of_v.rstd, scratch);
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x)
    dv[i] = from_acc<T>(gradient(da[i] * to_acc(gain[i]), of_v(v, i)));
}

// What the gradient of a row reads: dh, dc are null for zero.
template <class T, class S>
struct RowOfGradients {
  const T *x, *y, *c, *next_c;
  const S *dh, *dc;
};

// A row backwards, by one block: writes dx, dy, da [4 H], dz and dc, which may be in.dc.
template <class T, class S, class C, class A>
PYOPS_DEVICE void row_backward(const NormalisedParameters<T>& p, const RowScales<A>& of, const RowOfGradients<T, S>& in,
                               T* dx, T* dy, C* dc, A* da, A* dz, BlockScratch<A>& scratch) {
  const int64_t H = p.H;
  // From h' to z.
  A sum_g = 0, sum_gn = 0;
  for (int64_t i = threadIdx.x; i < H; i += blockDim.x) {
    A a[4];
    load_gates(p, in.x, in.y, of.x, of.y, i, a);
    const A n = of.c(in.next_c, i), o = sigmoid(a[3]), t = tanh(scaled_cell(p, n, i));
    const A dh = in.dh != nullptr ? A(to_acc(in.dh[i])) : A(0);
    dz[i] = dh * o * (A(1) - t * t);
    da[3 * H + i] = dh * t * o * (A(1) - o);
    const A g = dz[i] * to_acc(p.gain_c[i]);
    sum_g += g;
    sum_gn += g * n;
  }
  const RowGradient<A> through_c(sum_g, sum_gn, H, of.c.rstd, scratch);
  // From c' to the gates.
  for (int64_t i = threadIdx.x; i < H; i += blockDim.x) {
    A a[4];
    load_gates(p, in.x, in.y, of.x, of.y, i, a);
    const A gi = sigmoid(a[0]), gf = sigmoid(a[1]), gg = tanh(a[2]);
    A total = through_c(dz[i] * to_acc(p.gain_c[i]), of.c(in.next_c, i));
    if (in.dc != nullptr) total += to_acc(in.dc[i]);
    da[i] = total * gg * gi * (A(1) - gi);
    da[H + i] = total * to_acc(in.c[i]) * gf * (A(1) - gf);
    da[2 * H + i] = total * gi * (A(1) - gg * gg);
    dc[i] = from_acc<C>(total * gf);
  }
  __syncthreads();  // from here on a thread reads da of other threads
  through_normalisation(in.x, of.x, p.gain_x, da, dx, 4 * H, scratch);
  through_normalisation(in.y, of.y, p.gain_y, da, dy, 4 * H, scratch);
}

// A step.

template <class T>
__global__ void layer_norm_lstm_fwd_kernel(NormalisedGates<T> in, accumulate_t<T> eps, T* next_h, T* next_c,
                                           accumulate_t<T>* statistics) {
  using A = accumulate_t<T>;
  const int64_t row = blockIdx.x, H = in.H;
  row_forward(static_cast<const NormalisedParameters<T>&>(in), eps, in.x + row * 4 * H, in.y + row * 4 * H,
              in.c + row * H, next_c + row * H, shared_storage<LayerNormLstmShared<A>>().scratch,
              [&](int64_t i, A h) { next_h[row * H + i] = from_acc<T>(h); })
      .store(statistics + row * 6);
}

template <class T>
__global__ void layer_norm_lstm_bwd_kernel(NormalisedGates<T> in, NormalisedGateGradients<T> out) {
  using A = accumulate_t<T>;
  const int64_t row = blockIdx.x, H = in.H, first = row * H, wide = 4 * first;
  const RowOfGradients<T, T> of{in.x + wide,
                                in.y + wide,
                                in.c + first,
                                out.next_c + first,
                                out.dh != nullptr ? out.dh + first : nullptr,
                                out.dc != nullptr ? out.dc + first : nullptr};
  row_backward(static_cast<const NormalisedParameters<T>&>(in), RowScales<A>::load(out.statistics + row * 6), of,
               out.dx + wide, out.dy + wide, out.dstate + first, out.da + wide, out.dz + first,
               shared_storage<LayerNormLstmShared<A>>().scratch);
}

inline LaunchConfig block_for_each_row(int64_t B, size_t shared, void* stream) {
  return {.grid = dim3(static_cast<unsigned>(B)),
          .block = dim3(256),
          .smem = shared,
          .stream = static_cast<cudaStream_t>(stream)};
}

template <class T>
void normalised_gates_forward(const NormalisedGates<T>& in, double eps, T* next_h, T* next_c,
                              accumulate_t<T>* statistics, void* stream) {
  using A = accumulate_t<T>;
  const auto config = block_for_each_row(in.H > 0 ? in.B : 0, sizeof(LayerNormLstmShared<A>), stream);
  launch(layer_norm_lstm_fwd_kernel<T>, config, in, A(eps), next_h, next_c, statistics);
}

template <class T>
void normalised_gates_backward(const NormalisedGates<T>& in, const NormalisedGateGradients<T>& out, void* stream) {
  const auto config = block_for_each_row(in.H > 0 ? in.B : 0, sizeof(LayerNormLstmShared<accumulate_t<T>>), stream);
  launch(layer_norm_lstm_bwd_kernel<T>, config, in, out);
}

// A layer over all steps.

// y [D, B, 4 H]: products of a step in the type of sums. da [N, D, 4 H], dz [N, D, H]: what parameters' gradients sum.
template <class T>
struct NormalisedWork : SequenceWork<T> {
  accumulate_t<T>*y, *da, *dz;
};

// The weights that stay with a block follow.
template <class T>
struct alignas(16) NormalisedShared {
  BlockScratch<accumulate_t<T>> scratch;
  PYOPS_DEVICE T* weights() { return reinterpret_cast<T*>(this + 1); }
};

template <class T>
__global__ void layer_norm_lstm_layer_fwd_kernel(NormalisedSequence<T> s, NormalisedWork<T> work) {
  using A = accumulate_t<T>;
  auto& shared = shared_storage<NormalisedShared<T>>();
  const Place place(work.blocks_per_direction);
  const int64_t d = place.d, H = s.H, B = s.steps.B;
  const Slice slice = Slice::of(4 * H, work.blocks_per_direction, place.part), kept = slice.first(work.kept);
  const T* w = s.w_hh + d * 4 * H * H;
  if (work.phase == 0) keep_weights(shared.weights(), w, kept, 1, H, H);
  const NormalisedParameters<T> parameters = s.parameters.of(d);
  for (int64_t i = work.begin; i < work.end; ++i) {
    const int64_t t = s.step(d, i), rows = s.steps.count(t);
    if (work.phase != 2)
      each_product<T>(
          slice, rows, H,
          [&](int64_t unit) { return unit < kept.end ? shared.weights() + (unit - kept.begin) * H : w + unit * H; },
          [&](int64_t row) { return s.state_before(d, t, row); },
          [&](int64_t row, int64_t unit, A sum) { work.y[(d * B + row) * 4 * H + unit] = sum; });
    if (work.phase == 0) grid_sync(work.barrier);
    for (int64_t row = place.part; work.phase != 1 && row < rows; row += work.blocks_per_direction) {
      const int64_t own = d * B + row, at = (s.steps.first(t) + row) * s.D + d;
      const A* y = work.y + own * 4 * H;
      A* c = work.c + own * H;
      if (s.row_at(s.before(d, t), row) < 0)
        for (int64_t k = threadIdx.x; k < H; k += blockDim.x) c[k] = to_acc(s.c0[own * H + k]);
      const bool last = row >= s.steps.count(s.after(d, t));
      const auto of =
          row_forward(parameters, A(s.eps), s.gates + at * 4 * H, y, c, c, shared.scratch, [&](int64_t k, A h) {
            s.y[at * H + k] = from_acc<T>(h);
            if (s.cells != nullptr) s.cells[at * H + k] = from_acc<T>(c[k]);
            if (!last) return;
            s.h_n[own * H + k] = from_acc<T>(h);
            s.c_n[own * H + k] = from_acc<T>(c[k]);
          });
      if (s.statistics == nullptr) continue;
      of.store(s.statistics + at * 6);
      for (int64_t k = threadIdx.x; k < 4 * H; k += blockDim.x) s.saved[at * 4 * H + k] = from_acc<T>(y[k]);
    }
    if (work.phase == 0) grid_sync(work.barrier);
  }
}

template <class T>
__global__ void layer_norm_lstm_layer_bwd_kernel(NormalisedSequence<T> s, NormalisedWork<T> work) {
  using A = accumulate_t<T>;
  auto& shared = shared_storage<NormalisedShared<T>>();
  const Place place(work.blocks_per_direction);
  const int64_t d = place.d, H = s.H, B = s.steps.B;
  const Slice slice = Slice::of(H, work.blocks_per_direction, place.part), kept = slice.first(work.kept);
  if (work.phase == 0) keep_weights(shared.weights(), work.w_hh_t + d * 4 * H * H, kept, 1, H, 4 * H);
  const NormalisedParameters<T> parameters = s.parameters.of(d);
  // One more than there are steps, as in sequence_backward_kernel.
  for (int64_t i = work.begin; i < work.end; ++i) {
    const auto [t, later] = s.steps_backwards(d, i);
    const int64_t now = t >= 0 ? s.steps.count(t) : 0, then = s.steps.count(later);
    if (work.phase != 2)
      gradients_of_states<false, false>(
          s, work, slice, kept, place.d, shared.weights(), static_cast<const T*>(s.dh_gates), Neighbour<T>{}, 4 * H, t,
          later, [&](int64_t row, int64_t unit, A dh) { work.direct[(d * B + row) * H + unit] = dh; });
    if (work.phase == 0) grid_sync(work.barrier);
    for (int64_t row = place.part; work.phase != 1 && row < (now > then ? now : then);
         row += work.blocks_per_direction) {
      const int64_t own = (d * B + row) * H;
      A* dc = work.c + own;
      if (row >= then)
        for (int64_t k = threadIdx.x; k < H; k += blockDim.x)
          dc[k] = s.dc_n != nullptr ? A(to_acc(s.dc_n[own + k])) : A(0);
      if (row >= now) {
        for (int64_t k = threadIdx.x; k < H; k += blockDim.x) s.dc0[own + k] = from_acc<T>(dc[k]);
        continue;
      }
      const int64_t at = (s.steps.first(t) + row) * s.D + d, earlier = s.row_at(s.before(d, t), row);
      const RowOfGradients<T, A> of{
          s.gates + at * 4 * H, s.saved + at * 4 * H, earlier >= 0 ? s.cells + (earlier * s.D + d) * H : s.c0 + own,
          s.cells + at * H,     work.direct + own,    dc};
      row_backward(parameters, RowScales<A>::load(s.statistics + at * 6), of, s.dgates + at * 4 * H,
                   s.dh_gates + at * 4 * H, dc, work.da + at * 4 * H, work.dz + at * H, shared.scratch);
    }
    if (work.phase == 0) grid_sync(work.barrier);
  }
}

// Gradients of gains and biases: sums over N rows, by blocks of 32 columns and 8 rows.
inline constexpr int sum_columns = 32, sum_rows = 8, sums_of_parameters = 5;
template <class A>
struct ParameterSumsShared {
  A part[sum_rows][sums_of_parameters][sum_columns + 1];
};

template <class T>
__global__ void layer_norm_lstm_parameters_kernel(NormalisedSequence<T> s, NormalisedWork<T> work) {
  using A = accumulate_t<T>;
  auto& part = shared_storage<ParameterSumsShared<A>>().part;
  const int64_t H = s.H, d = blockIdx.y, column = static_cast<int64_t>(blockIdx.x) * sum_columns + threadIdx.x;
  A total[sums_of_parameters]{};
  // Rounding grows with the root of a block of rows.
  for (int64_t block = threadIdx.y; column < 4 * H && block < s.steps.N; block += 64 * sum_rows) {
    A sum[sums_of_parameters]{};
    for (int64_t n = block; n < s.steps.N && n < block + 64 * sum_rows; n += sum_rows) {
      const int64_t at = n * s.D + d;
      const auto of = RowScales<A>::load(s.statistics + at * 6);
      const A g = work.da[at * 4 * H + column];
      sum[0] += g * of.x(s.gates + at * 4 * H, column);
      sum[1] += g * of.y(s.saved + at * 4 * H, column);
      sum[2] += g;
      if (column >= H) continue;
      const A gz = work.dz[at * H + column];
      sum[3] += gz * of.c(s.cells + at * H, column);
      sum[4] += gz;
    }
#pragma unroll
    for (int k = 0; k < sums_of_parameters; ++k) total[k] += sum[k];
  }
#pragma unroll
  for (int k = 0; k < sums_of_parameters; ++k) part[threadIdx.y][k][threadIdx.x] = total[k];
  __syncthreads();
  if (threadIdx.y != 0 || column >= 4 * H) return;
  T* const to[sums_of_parameters] = {s.dgain_x, s.dgain_y, s.dbias, s.dgain_c, s.dbias_c};
#pragma unroll
  for (int k = 0; k < sums_of_parameters; ++k) {
    const int64_t size = k < 3 ? 4 * H : H;
    if (to[k] == nullptr || column >= size) continue;
    for (int r = 1; r < sum_rows; ++r) total[k] += part[r][k][threadIdx.x];
    to[k][d * size + column] = from_acc<T>(total[k]);
  }
}

template <class T>
void normalised_layer_forward(const OpScope& op, const NormalisedSequence<T>& s) {
  using A = accumulate_t<T>;
  const auto stream = static_cast<cudaStream_t>(op.stream());
  const int64_t B = s.steps.B, D = s.D, H = s.H;
  if (B == 0) return;
  if (s.steps.T == 0) {
    copy(s.h0, s.h_n, D * B * H, stream);
    copy(s.c0, s.c_n, D * B * H, stream);
    return;
  }
  Tensor c = op.empty<A>({D * B * H}), y = op.empty<A>({D * B * 4 * H}), barrier = op.empty<int32_t>({1});
  NormalisedWork<T> work{};
  work.c = op.out<A>(c, "c", {c.numel()}), work.y = op.out<A>(y, "y", {y.numel()});
  work.barrier = reinterpret_cast<unsigned*>(op.out<int32_t>(barrier, "barrier", {1}));
  run_sequence(layer_norm_lstm_layer_fwd_kernel<T>, s, work, D, 4 * H, H * static_cast<int64_t>(sizeof(T)), s.steps.T,
               2, sizeof(NormalisedShared<T>), stream);
}

template <class T>
void normalised_layer_backward(const OpScope& op, const NormalisedSequence<T>& s) {
  using A = accumulate_t<T>;
  const auto stream = static_cast<cudaStream_t>(op.stream());
  const int64_t N = s.steps.N, B = s.steps.B, D = s.D, H = s.H;
  Tensor c = op.empty<A>({D * B * H}), dh = op.empty<A>({D * B * H}), barrier = op.empty<int32_t>({1});
  Tensor da = op.empty<A>({N * D * 4 * H}), dz = op.empty<A>({N * D * H}), w_hh_t = op.empty<T>({D * 4 * H * H});
  NormalisedWork<T> work{};
  work.c = op.out<A>(c, "dc", {c.numel()}), work.direct = op.out<A>(dh, "dh", {dh.numel()});
  work.da = op.out<A>(da, "da", {da.numel()}), work.dz = op.out<A>(dz, "dz", {dz.numel()});
  work.barrier = reinterpret_cast<unsigned*>(op.out<int32_t>(barrier, "barrier", {1}));
  T* transposed = op.out<T>(w_hh_t, "w_hh_t", {w_hh_t.numel()});
  if (N > 0) {
    transpose(s.w_hh, transposed, D, 4 * H, H, stream);
    work.w_hh_t = transposed;
    run_sequence(layer_norm_lstm_layer_bwd_kernel<T>, s, work, D, H, 4 * H * static_cast<int64_t>(sizeof(T)),
                 s.steps.T + 1, 2, sizeof(NormalisedShared<T>), stream);
  } else if (B > 0) {
    copy(s.dh_n, s.dh0, D * B * H, stream);
    copy(s.dc_n, s.dc0, D * B * H, stream);
  }
  launch(layer_norm_lstm_parameters_kernel<T>,
         {.grid = dim3(static_cast<unsigned>(ceil_div(4 * H, sum_columns)), static_cast<unsigned>(D)),
          .block = dim3(sum_columns, sum_rows),
          .smem = sizeof(ParameterSumsShared<A>),
          .stream = stream},
         s, work);
}

}  // namespace pyops

#include "common/layer_norm_lstm_binding.h"

PYOPS_LIBRARY(m) {
  using namespace pyops;
  PYOPS_IMPL(m, layer_norm_lstm_gates_fwd);
  PYOPS_IMPL(m, layer_norm_lstm_gates_bwd);
  PYOPS_IMPL(m, layer_norm_lstm_layer_fwd);
  PYOPS_IMPL(m, layer_norm_lstm_layer_bwd);
}
