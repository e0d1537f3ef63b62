// linear · CUDA
//   bias_act     y = f(x + b),  dx = dy * f'(x + b),  db[c] = sum of dx over n, s;  f by number, common/activation.h
//   bias_rows    y[m,n] = b[n]
//   channel_sum  y[c] = sum over n, s of x[n,c,s]; x: [N, C, S] or [N, C]
// layout   bias_act: x, y [N, C, S], b [C] · rows [M, N]
// mapping  forward: a thread takes a 16-byte vector of neighbours that share a bias or a row, else an element
//          sums, S = 1: a block takes 32 columns and a chunk of rows, lane l a column, its 8 warps the rows in turn
//          sums, S > 1: a block takes one channel and a chunk of its N * S elements; without an activation its warps take
//          pieces of planes in turn, in 16-byte vectors where planes allow
// memory   every input read once, every output written once; a chunk leaves one line of partial sums
// numerics in fp32 (fp64 for fp64); partial sums, then their sums, in an order fixed by the shape
#include "cuda/grid_stride.cuh"
#include "cuda/math.cuh"
#include "cuda/norm.cuh"

#include "common/activation.h"

namespace pyops {
namespace {

using activation::Parameters;
using activation::with_activation;

// Threads take `count` units of W elements.
template <class T, int W>
__global__ void bias_act_kernel(const T* x, const T* bias, T* y, int64_t count, int64_t C, int64_t S, int kind,
                                Parameters p) {
  using A = accumulate_t<T>;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  with_activation(kind, [&]<class F>() {
    for (int64_t i = thread; i < count; i += stride) {
      Vec<T, W> v = load_vec<W>(x + i * W);
      const T* add = bias + (S == 1 ? i * W % C : i * W / S % C);
#pragma unroll
      for (int j = 0; j < W; ++j) v[j] = from_acc<T>(F::value(A(to_acc(v[j]) + to_acc(add[S == 1 ? j : 0])), p));
      store_vec(y + i * W, v);
    }
  });
}

template <class A>
struct ColumnShared {
  A part[8][32];
};
// Sum over the block's warps of what each lane holds for its column.
template <class A>
PYOPS_DEVICE void write_partial(A sum, A* part, int64_t column, int64_t C) {
  auto& s = shared_storage<ColumnShared<A>>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  s.part[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || column >= C) return;
  for (int w = 1; w < 8; ++w) sum += s.part[w][lane];
  part[static_cast<int64_t>(blockIdx.y) * C + column] = sum;
}

template <class T>
__global__ void __launch_bounds__(256)
    bias_act_rows_kernel(const T* dy, const T* x, const T* bias, T* dx, accumulate_t<T>* part, int64_t M, int64_t C,
                         int64_t rows, int kind, Parameters p) {
  using A = accumulate_t<T>;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x % 32, first = blockIdx.y * rows;
  const int64_t last = first + rows < M ? first + rows : M;
  A sum = 0;
  if (column < C) {
    const A add = to_acc(bias[column]);
    with_activation(kind, [&]<class F>() {
      for (int64_t m = first + threadIdx.x / 32; m < last; m += 8) {
        const A d = F::gradient(A(to_acc(dy[m * C + column])), A(to_acc(x[m * C + column]) + add), p);
        dx[m * C + column] = from_acc<T>(d);
        sum += d;
      }
    });
  }
  write_partial(sum, part, column, C);
}

template <class T>
__global__ void __launch_bounds__(256)
    column_sum_kernel(const T* x, accumulate_t<T>* part, int64_t M, int64_t C, int64_t rows) {
  using A = accumulate_t<T>;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x % 32, first = blockIdx.y * rows;
  const int64_t last = first + rows < M ? first + rows : M;
  A sum = 0;
  if (column < C)
    for (int64_t m = first + threadIdx.x / 32; m < last; m += 8) sum += to_acc(x[m * C + column]);
  write_partial(sum, part, column, C);
}

template <class T>
__global__ void __launch_bounds__(256)
    bias_act_planes_kernel(const T* dy, const T* x, const T* bias, T* dx, accumulate_t<T>* part, int64_t N, int64_t C,
                           int64_t S, int64_t size, int kind, Parameters p) {
  using A = accumulate_t<T>;
  auto& scratch = shared_storage<BlockScratch<A>>();
  const int64_t channel = blockIdx.x, first = blockIdx.y * size;
  const int64_t last = first + size < N * S ? first + size : N * S;
  const A add = to_acc(bias[channel]);
  A sum = 0;
  with_activation(kind, [&]<class F>() {
    for (int64_t i = first + threadIdx.x; i < last; i += blockDim.x) {
      const int64_t at = (i / S * C + channel) * S + i % S;
      const A d = F::gradient(A(to_acc(dy[at])), A(to_acc(x[at]) + add), p);
      dx[at] = from_acc<T>(d);
      sum += d;
    }
  });
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) part[static_cast<int64_t>(blockIdx.y) * C + channel] = sum;
}

inline constexpr int64_t piece_elements = 1024;  // of a plane, for a warp

template <class T, int W>
__global__ void __launch_bounds__(256)
    channel_sum_kernel(const T* x, accumulate_t<T>* part, int64_t N, int64_t C, int64_t S, int64_t size) {
  using A = accumulate_t<T>;
  auto& scratch = shared_storage<BlockScratch<A>>();
  const int64_t pieces = ceil_div(S, piece_elements), first = blockIdx.y * size;
  const int64_t last = first + size < N * pieces ? first + size : N * pieces;
  A sum = 0;
  for (int64_t k = first + threadIdx.x / 32; k < last; k += 8) {
    const int64_t n = k / pieces, offset = (k - n * pieces) * piece_elements;
    const T* from = x + (n * C + blockIdx.x) * S + offset;
    const int width = static_cast<int>(S - offset < piece_elements ? S - offset : piece_elements);
    for (int i = threadIdx.x % 32 * W; i < width; i += 32 * W) {
      const Vec<T, W> v = load_vec<W>(from + i);
#pragma unroll
      for (int j = 0; j < W; ++j) sum += to_acc(v[j]);
    }
  }
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) part[static_cast<int64_t>(blockIdx.y) * C + blockIdx.x] = sum;
}

template <class T>
__global__ void bias_rows_kernel(const T* bias, T* y, int64_t total, int64_t N) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < total; i += stride)
    y[i] = bias[i % N];
}

template <class T>
void run_bias_act(const T* x, const T* bias, T* y, int64_t N, int64_t C, int64_t S, int64_t kind, Parameters p,
                  void* stream) {
  constexpr int W = 16 / sizeof(T);
  const int64_t total = N * C * S;
  if (is_aligned(x, y) && (S == 1 ? C : S) % W == 0)
    launch(bias_act_kernel<T, W>, grid_stride(total / W, stream), x, bias, y, total / W, C, S, static_cast<int>(kind),
           p);
  else
    launch(bias_act_kernel<T, 1>, grid_stride(total, stream), x, bias, y, total, C, S, static_cast<int>(kind), p);
}

// Chunks of rows, or of the elements of a channel, by shape alone: few enough partial sums, enough blocks.
struct Chunks {
  int64_t size, count;
  Chunks(int64_t length, int64_t least, int64_t most) {
    size = std::max(least, ceil_div(length, most));
    count = ceil_div(length, size);
  }
};
inline Chunks chunks_of_rows(int64_t M) { return {M, 64, 512}; }
inline Chunks chunks_of_channel(int64_t elements) { return {elements, 4096, 512}; }
inline Chunks chunks_of_pieces(int64_t pieces) { return {pieces, 16, 512}; }

}  // namespace
}  // namespace pyops

// binding

#include "common/linear_binding.h"
#include "common/registry.h"

namespace pyops {
namespace {

Tensor bias_act_fwd(const Tensor& x, const Tensor& bias, int64_t kind, double a, double b, double c) {
  OpScope op("bias_act_fwd", x);
  const auto [N, C, S] = linear::images_of(op, x, kind);
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    Tensor y = op.empty<T>({N, C, S});
    run_bias_act<T>(op.in<T>(x, "x", {N, C, S}), op.in<T>(bias, "bias", {C}), op.out<T>(y, "y", {N, C, S}), N, C, S,
                    kind, {a, b, c}, op.stream());
    return y;
  });
}

void bias_act_inplace(Tensor x, const Tensor& bias, int64_t kind, double a, double b, double c) {
  OpScope op("bias_act_inplace", x);
  const auto [N, C, S] = linear::images_of(op, x, kind);
  dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    T* p = op.out<T>(x, "x", {N, C, S});
    run_bias_act<T>(p, op.in<T>(bias, "bias", {C}), p, N, C, S, kind, {a, b, c}, op.stream());
  });
}

template <class T>
LaunchConfig column_grid(int64_t columns, int64_t chunks, cudaStream_t stream) {
  return {.grid = dim3(static_cast<unsigned>(ceil_div(columns, 32)), static_cast<unsigned>(chunks)),
          .block = dim3(256),
          .smem = sizeof(ColumnShared<accumulate_t<T>>),
          .stream = stream};
}

std::tuple<Tensor, Tensor> bias_act_bwd(const Tensor& dy, const Tensor& x, const Tensor& bias, int64_t kind, double a,
                                        double b, double c) {
  OpScope op("bias_act_bwd", dy);
  const auto [N, C, S] = linear::images_of(op, x, kind);
  const Chunks chunks = S == 1 ? chunks_of_rows(N) : chunks_of_channel(N * S);
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    using A = accumulate_t<T>;
    Tensor dx = op.empty<T>({N, C, S}), db = op.empty<T>({C}), part = op.empty<A>({chunks.count, C});
    const auto stream = static_cast<cudaStream_t>(op.stream());
    const T *pdy = op.in<T>(dy, "dy", {N, C, S}), *px = op.in<T>(x, "x", {N, C, S}), *pb = op.in<T>(bias, "bias", {C});
    T *pdx = op.out<T>(dx, "dx", {N, C, S}), *pdb = op.out<T>(db, "db", {C});
    A* sums = op.out<A>(part, "part", {chunks.count, C});
    const Parameters p{a, b, c};
    if (S == 1)
      launch(bias_act_rows_kernel<T>, column_grid<T>(C, chunks.count, stream), pdy, px, pb, pdx, sums, N, C,
             chunks.size, static_cast<int>(kind), p);
    else
      launch(bias_act_planes_kernel<T>,
             {.grid = dim3(static_cast<unsigned>(C), static_cast<unsigned>(chunks.count)),
              .block = dim3(256),
              .smem = sizeof(BlockScratch<A>),
              .stream = stream},
             pdy, px, pb, pdx, sums, N, C, S, chunks.size, static_cast<int>(kind), p);
    norm::sum_columns(static_cast<const A*>(sums), pdb, chunks.count, C, stream);
    return std::make_tuple(dx, db);
  });
}

Tensor bias_rows(const Tensor& bias, int64_t rows) {
  OpScope op("bias_rows", bias);
  op.check(bias.dim() == 1 && rows >= 0, "bias must be [N], rows >= 0");
  const int64_t N = bias.size(0);
  return dispatch_floating(op, bias.scalar_type(), [&]<class T>() {
    Tensor y = op.empty<T>({rows, N});
    launch(bias_rows_kernel<T>, grid_stride(rows * N, op.stream()), op.in<T>(bias, "bias", {N}),
           op.out<T>(y, "y", {rows, N}), rows * N, N);
    return y;
  });
}

Tensor channel_sum(const Tensor& x) {
  OpScope op("channel_sum", x);
  op.check(x.dim() == 2 || x.dim() == 3, "x must be [N, C] or [N, C, S]");
  const int64_t N = x.size(0), C = x.size(1), S = x.dim() == 3 ? x.size(2) : 1;
  const Chunks chunks = S == 1 ? chunks_of_rows(N) : chunks_of_pieces(N * ceil_div(S, piece_elements));
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    using A = accumulate_t<T>;
    Tensor y = op.empty<T>({C}), part = op.empty<A>({chunks.count, C});
    const auto stream = static_cast<cudaStream_t>(op.stream());
    const T* px = op.in<T>(x, "x", ShapeRef(x));
    T* py = op.out<T>(y, "y", {C});
    A* sums = op.out<A>(part, "part", {chunks.count, C});
    constexpr int W = 16 / sizeof(T);
    const LaunchConfig planes{.grid = dim3(static_cast<unsigned>(C), static_cast<unsigned>(chunks.count)),
                              .block = dim3(256),
                              .smem = sizeof(BlockScratch<A>),
                              .stream = stream};
    if (S == 1)
      launch(column_sum_kernel<T>, column_grid<T>(C, chunks.count, stream), px, sums, N, C, chunks.size);
    else if (is_aligned(px, px) && S % W == 0)
      launch(channel_sum_kernel<T, W>, planes, px, sums, N, C, S, chunks.size);
    else
      launch(channel_sum_kernel<T, 1>, planes, px, sums, N, C, S, chunks.size);
    norm::sum_columns(static_cast<const A*>(sums), py, chunks.count, C, stream);
    return y;
  });
}

}  // namespace
}  // namespace pyops

PYOPS_LIBRARY(m) {
  using namespace pyops;
  PYOPS_IMPL(m, bias_act_fwd);
  PYOPS_IMPL(m, bias_act_inplace);
  PYOPS_IMPL(m, bias_act_bwd);
  PYOPS_IMPL(m, bias_rows);
  PYOPS_IMPL(m, channel_sum);
}
