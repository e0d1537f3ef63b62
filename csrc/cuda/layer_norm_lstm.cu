// layer_norm_lstm · CUDA
//   a = n(x) * gain_x + n(y) * gain_y + bias;  c' = f c + i g,  h' = o tanh(n(c') * gain_c + bias_c);  n: a row with
//   mean 0 and variance 1
// layout   head of common/layer_norm_lstm.h
// mapping  a block takes a row, a thread hidden units blockDim apart; the means are sums over the block
// memory   x, y and c come from DRAM once, and once or twice more from the caches; backward computes the gates again
// numerics two-pass variance, all in fp32 (fp64 for fp64)
#include "cuda/math.cuh"

#include "common/layer_norm_lstm.h"
#include "common/recurrent.h"

namespace pyops {

template <class A>
struct RowScale {
  A mean, rstd;
  template <class T>
  PYOPS_DEVICE A operator()(const T* row, int64_t i) const {
    return (to_acc(row[i]) - mean) * rstd;
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
template <class T, class A>
PYOPS_DEVICE void load_gates(const NormalisedGates<T>& in, int64_t row, RowScale<A> of_x, RowScale<A> of_y, int64_t i,
                             A (&a)[4]) {
  const T *x = in.x + row * 4 * in.H, *y = in.y + row * 4 * in.H;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int64_t at = k * in.H + i;
    a[k] = of_x(x, at) * to_acc(in.gain_x[at]) + of_y(y, at) * to_acc(in.gain_y[at]);
    if (in.bias != nullptr) a[k] += to_acc(in.bias[at]);
  }
}

template <class T>
PYOPS_DEVICE accumulate_t<T> scaled_cell(const NormalisedGates<T>& in, accumulate_t<T> normalised, int64_t i) {
  const auto z = normalised * to_acc(in.gain_c[i]);
  return in.bias_c != nullptr ? z + to_acc(in.bias_c[i]) : z;
}

template <class T>
__global__ void layer_norm_lstm_fwd_kernel(NormalisedGates<T> in, accumulate_t<T> eps, T* next_h, T* next_c,
                                           accumulate_t<T>* statistics) {
  using A = accumulate_t<T>;
  auto& scratch = shared_storage<LayerNormLstmShared<A>>().scratch;
  const int64_t row = blockIdx.x, H = in.H;
  const auto of_x = row_scale<A>(in.x + row * 4 * H, 4 * H, eps, scratch);
  const auto of_y = row_scale<A>(in.y + row * 4 * H, 4 * H, eps, scratch);
  for (int64_t i = threadIdx.x; i < H; i += blockDim.x) {
    A a[4], zero[4]{}, h{}, s[4], c = to_acc(in.c[row * H + i]);
    load_gates(in, row, of_x, of_y, i, a);
    recurrent::Lstm::forward(a, zero, h, c, s);
    next_c[row * H + i] = from_acc<T>(c);
  }
  // Each thread reads the c' that it wrote.
  const auto of_c = row_scale<A>(next_c + row * H, H, eps, scratch);
  for (int64_t i = threadIdx.x; i < H; i += blockDim.x) {
    A a[4];
    load_gates(in, row, of_x, of_y, i, a);
    next_h[row * H + i] = from_acc<T>(sigmoid(a[3]) * tanh(scaled_cell(in, of_c(next_c + row * H, i), i)));
  }
  if (threadIdx.x == 0) {
    A* s = statistics + row * 6;
    s[0] = of_x.mean, s[1] = of_x.rstd, s[2] = of_y.mean, s[3] = of_y.rstd, s[4] = of_c.mean, s[5] = of_c.rstd;
  }
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

template <class T>
__global__ void layer_norm_lstm_bwd_kernel(NormalisedGates<T> in, NormalisedGateGradients<T> out) {
  using A = accumulate_t<T>;
  auto& scratch = shared_storage<LayerNormLstmShared<A>>().scratch;
  const int64_t row = blockIdx.x, H = in.H;
  const A* s = out.statistics + row * 6;
  const RowScale<A> of_x{s[0], s[1]}, of_y{s[2], s[3]}, of_c{s[4], s[5]};
  const T* next_c = out.next_c + row * H;
  A *da = out.da + row * 4 * H, *dz = out.dz + row * H;

  // From h' to z.
  A sum_g = 0, sum_gn = 0;
  for (int64_t i = threadIdx.x; i < H; i += blockDim.x) {
    A a[4];
    load_gates(in, row, of_x, of_y, i, a);
    const A n = of_c(next_c, i), o = sigmoid(a[3]), t = tanh(scaled_cell(in, n, i));
    const A dh = out.dh != nullptr ? to_acc(out.dh[row * H + i]) : A(0);
    dz[i] = dh * o * (A(1) - t * t);
    da[3 * H + i] = dh * t * o * (A(1) - o);
    const A g = dz[i] * to_acc(in.gain_c[i]);
    sum_g += g;
    sum_gn += g * n;
  }
  const RowGradient<A> through_c(sum_g, sum_gn, H, of_c.rstd, scratch);
  // From c' to the gates.
  for (int64_t i = threadIdx.x; i < H; i += blockDim.x) {
    A a[4];
    load_gates(in, row, of_x, of_y, i, a);
    const A gi = sigmoid(a[0]), gf = sigmoid(a[1]), gg = tanh(a[2]);
    A total = through_c(dz[i] * to_acc(in.gain_c[i]), of_c(next_c, i));
    if (out.dc != nullptr) total += to_acc(out.dc[row * H + i]);
    da[i] = total * gg * gi * (A(1) - gi);
    da[H + i] = total * to_acc(in.c[row * H + i]) * gf * (A(1) - gf);
    da[2 * H + i] = total * gi * (A(1) - gg * gg);
    out.dstate[row * H + i] = from_acc<T>(total * gf);
  }
  __syncthreads();  // from here on a thread reads da of other threads
  through_normalisation(in.x + row * 4 * H, of_x, in.gain_x, da, out.dx + row * 4 * H, 4 * H, scratch);
  through_normalisation(in.y + row * 4 * H, of_y, in.gain_y, da, out.dy + row * 4 * H, 4 * H, scratch);
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

}  // namespace pyops

#include "common/layer_norm_lstm_binding.h"

PYOPS_LIBRARY(m) {
  using namespace pyops;
  PYOPS_IMPL(m, layer_norm_lstm_gates_fwd);
  PYOPS_IMPL(m, layer_norm_lstm_gates_bwd);
}
