// cross_entropy · CUDA
//   labels         loss[m,s] = -(1 - ε) w_t log p_t - (ε / N) Σ_n w_n log p_n + z lse²,  log p = x - lse,  t =
//   target[m,s]
//                  dx = g (p_n A - B_n),  A = (1 - ε) w_t + (ε / N) Σ w + 2 z lse,  B_n = (1 - ε) w_t [n = t] + (ε / N)
//                  w_n x already log p (`logits` false): lse = 0, A = 0
//   probabilities  loss[m,s] = -Σ_n w_n t'_n log p_n,  t' = (1 - ε) t + ε / N
//                  dx = g (p_n Σ_k w_k t'_k - w_n t'_n),  dt = -g (1 - ε) w_n log p_n
// layout   x, dx, probabilities: [M, N, S] · target, loss, divisor, max, sum, g: [M, S] · w: [N]
// mapping  S = 1: a block per row, 32 to 512 threads; else a thread per column, neighbours in s side by side
// memory   forward reads x once (max and sum in one pass), again from the cache where labels are smoothed or
//          probabilities; backward reads x, writes dx; max and sum are all that is kept
// numerics in fp32 (fp64 for fp64), sums in fixed order; a label outside [0, N) gives NaN and reads nothing
#include <algorithm>

#include "cuda/math.cuh"

namespace pyops {
namespace {

template <class A>
struct Problem {
  int64_t N, S;
  const A* w;      // null: all 1
  const A* w_sum;  // Σ w; null: N
  A smoothing, z;
  int64_t ignore;
  bool logits;
  PYOPS_DEVICE A weight(int64_t n) const { return w == nullptr ? A(1) : w[n]; }
  PYOPS_DEVICE A spread() const { return smoothing / A(N); }
  PYOPS_DEVICE A mass() const { return w_sum == nullptr ? A(N) : *w_sum; }
};

// The classes of one row, S apart in memory: all threads of a block share a row, or one thread has a column.
template <class A, bool rows>
struct Classes {
  int64_t row, at, first, step;  // number among [M, S]; of the first class in x; the thread's first class and stride
  bool live;
  BlockScratch<A>* scratch;
  PYOPS_DEVICE Classes(int64_t count, int64_t N, int64_t S, BlockScratch<A>& shared) : scratch(&shared) {
    row = rows ? static_cast<int64_t>(blockIdx.x) : static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    live = row < count;
    at = row / S * N * S + row % S;
    first = rows ? static_cast<int64_t>(threadIdx.x) : 0;
    step = rows ? static_cast<int64_t>(blockDim.x) : 1;
  }
  PYOPS_DEVICE A total(A v) const { return rows ? block_sum(v, *scratch) : v; }
  PYOPS_DEVICE A largest(A v) const { return rows ? block_max(v, *scratch) : v; }
  PYOPS_DEVICE bool writes() const { return !rows || threadIdx.x == 0; }
};

template <class A>
PYOPS_DEVICE A lowest() {
  return -A(INFINITY);
}

// Largest logit and Σ exp(x - max) in one pass: a thread's sum is scaled anew where a larger logit comes.
template <class T, class A, bool rows>
PYOPS_DEVICE void statistics(const Classes<A, rows>& c, const T* x, const Problem<A>& e, A& most, A& total) {
  A mine = lowest<A>(), sum = 0;
  for (int64_t n = c.first; n < e.N; n += c.step) {
    const A v = to_acc(x[c.at + n * e.S]);
    if (v > mine || v != v) {
      sum = mine == lowest<A>() ? A(0) : sum * exp(mine - v);
      mine = v;
    }
    if (v != lowest<A>()) sum += exp(v - mine);
  }
  most = c.largest(mine);
  total = c.total(mine == lowest<A>() ? A(0) : sum * exp(mine - most));
  if (most == lowest<A>()) total = A(NAN);
}

template <class T, bool rows>
__global__ void cross_entropy_fwd_kernel(const T* x, const int64_t* target, accumulate_t<T>* loss,
                                         accumulate_t<T>* divisor, accumulate_t<T>* top, accumulate_t<T>* sums,
                                         int64_t count, Problem<accumulate_t<T>> e) {
  using A = accumulate_t<T>;
  const Classes<A, rows> c(count, e.N, e.S, shared_storage<BlockScratch<A>>());
  if (!c.live) return;
  A most = 0, total = 1;
  if (e.logits) statistics(c, x, e, most, total);
  A weighted = 0;
  if (e.smoothing != A(0)) {
    for (int64_t n = c.first; n < e.N; n += c.step) weighted += e.weight(n) * (to_acc(x[c.at + n * e.S]) - most);
    weighted = c.total(weighted);
  }
  if (!c.writes()) return;
  top[c.row] = most;
  sums[c.row] = total;
  const int64_t t = target[c.row];
  if (t == e.ignore) {
    loss[c.row] = divisor[c.row] = A(0);
    return;
  }
  if (t < 0 || t >= e.N) {
    loss[c.row] = divisor[c.row] = A(NAN);
    return;
  }
  const A log_sum = e.logits ? log(total) : A(0), lse = most + log_sum;
  A l = (A(1) - e.smoothing) * e.weight(t) * (log_sum - (to_acc(x[c.at + t * e.S]) - most));
  if (e.smoothing != A(0)) l += e.spread() * (log_sum * e.mass() - weighted);
  loss[c.row] = e.z != A(0) ? l + e.z * lse * lse : l;
  divisor[c.row] = e.weight(t);
}

template <class T, bool rows>
__global__ void cross_entropy_bwd_kernel(const accumulate_t<T>* g, const T* x, const int64_t* target,
                                         const accumulate_t<T>* top, const accumulate_t<T>* sums, T* dx, int64_t count,
                                         Problem<accumulate_t<T>> e) {
  using A = accumulate_t<T>;
  const Classes<A, rows> c(count, e.N, e.S, shared_storage<BlockScratch<A>>());
  if (!c.live) return;
  const int64_t t = target[c.row];
  const bool ignored = t == e.ignore, wrong = !ignored && (t < 0 || t >= e.N);
  const A most = top[c.row], total = sums[c.row], cotangent = ignored ? A(0) : wrong ? A(NAN) : g[c.row];
  const A label = ignored || wrong ? A(0) : (A(1) - e.smoothing) * e.weight(t);
  A factor = label + e.spread() * e.mass();
  if (e.z != A(0)) factor += A(2) * e.z * (most + log(total));
  for (int64_t n = c.first; n < e.N; n += c.step) {
    const int64_t i = c.at + n * e.S;
    const A p = e.logits && !ignored ? exp(to_acc(x[i]) - most) * (factor / total) : A(0);
    dx[i] = from_acc<T>(cotangent * (p - e.spread() * e.weight(n) - (n == t ? label : A(0))));
  }
}

template <class T, bool rows>
__global__ void soft_cross_entropy_fwd_kernel(const T* x, const T* q, accumulate_t<T>* loss, accumulate_t<T>* top,
                                              accumulate_t<T>* sums, int64_t count, Problem<accumulate_t<T>> e) {
  using A = accumulate_t<T>;
  const Classes<A, rows> c(count, e.N, e.S, shared_storage<BlockScratch<A>>());
  if (!c.live) return;
  A most, total;
  statistics(c, x, e, most, total);
  const A log_sum = log(total);
  A l = 0;
  for (int64_t n = c.first; n < e.N; n += c.step) {
    const int64_t i = c.at + n * e.S;
    const A t = (to_acc(q[i]) * (A(1) - e.smoothing) + e.spread()) * e.weight(n);
    l += t * (log_sum - (to_acc(x[i]) - most));
  }
  l = c.total(l);
  if (!c.writes()) return;
  loss[c.row] = l;
  top[c.row] = most;
  sums[c.row] = total;
}

// dq null: not wanted.
template <class T, bool rows>
__global__ void soft_cross_entropy_bwd_kernel(const accumulate_t<T>* g, const T* x, const T* q,
                                              const accumulate_t<T>* top, const accumulate_t<T>* sums, T* dx, T* dq,
                                              int64_t count, Problem<accumulate_t<T>> e) {
  using A = accumulate_t<T>;
  const Classes<A, rows> c(count, e.N, e.S, shared_storage<BlockScratch<A>>());
  if (!c.live) return;
  A mass = 0;
  for (int64_t n = c.first; n < e.N; n += c.step)
    mass += (to_acc(q[c.at + n * e.S]) * (A(1) - e.smoothing) + e.spread()) * e.weight(n);
  mass = c.total(mass);
  const A most = top[c.row], total = sums[c.row], cotangent = g[c.row], log_sum = log(total);
  for (int64_t n = c.first; n < e.N; n += c.step) {
    const int64_t i = c.at + n * e.S;
    const A centred = to_acc(x[i]) - most, w = e.weight(n);
    const A t = (to_acc(q[i]) * (A(1) - e.smoothing) + e.spread()) * w;
    dx[i] = from_acc<T>(cotangent * (exp(centred) / total * mass - t));
    if (dq != nullptr) dq[i] = from_acc<T>(cotangent * (A(1) - e.smoothing) * w * (log_sum - centred));
  }
}

// Σ w, by one block in fixed order.
template <class A>
__global__ void weight_sum_kernel(const A* w, A* sum, int64_t N) {
  auto& scratch = shared_storage<BlockScratch<A>>();
  A mine = 0;
  for (int64_t n = threadIdx.x; n < N; n += blockDim.x) mine += w[n];
  mine = block_sum(mine, scratch);
  if (threadIdx.x == 0) *sum = mine;
}

// S = 1: a block for each row, as wide as the row needs.
template <class A>
LaunchConfig rows_config(int64_t count, int64_t N, cudaStream_t stream) {
  unsigned threads = 32;
  while (threads < 512 && threads * 8 < N) threads *= 2;
  return {.grid = dim3(static_cast<unsigned>(count)),
          .block = dim3(threads),
          .smem = sizeof(BlockScratch<A>),
          .stream = stream};
}
template <class A>
LaunchConfig columns_config(int64_t count, cudaStream_t stream) {
  return {.grid = dim3(static_cast<unsigned>(ceil_div(count, 128))),
          .block = dim3(128),
          .smem = sizeof(BlockScratch<A>),
          .stream = stream};
}

}  // namespace
}  // namespace pyops

// binding

#include "common/registry.h"

namespace pyops {
namespace {

struct Sizes {
  int64_t M, N, S;
  cudaStream_t stream;
};
Sizes sizes_of(const OpScope& op, const Tensor& x) {
  op.check(x.dim() == 3, "x must be [M, N, S]");
  return {x.size(0), x.size(1), x.size(2), static_cast<cudaStream_t>(op.stream())};
}

// The problem, and the memory in which Σ w lies.
template <class A>
std::pair<Problem<A>, Tensor> problem(const OpScope& op, const Sizes& z, const OptionalTensor& weight, int64_t ignore,
                                      double smoothing, double z_loss, bool logits) {
  Tensor total = op.empty<A>({1});
  A* sum = op.out<A>(total, "weight sum", {1});
  const A* w = op.in_optional<A>(weight, "weight", {z.N});
  if (w != nullptr)
    launch(weight_sum_kernel<A>,
           {.grid = dim3(1), .block = dim3(256), .smem = sizeof(BlockScratch<A>), .stream = z.stream}, w, sum, z.N);
  return {
      {z.N, z.S, w, w == nullptr ? nullptr : sum, static_cast<A>(smoothing), static_cast<A>(z_loss), ignore, logits},
      total};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy_fwd(const Tensor& x, const Tensor& target,
                                                             const OptionalTensor& weight, int64_t ignore,
                                                             double smoothing, double z, bool logits) {
  OpScope op("cross_entropy_fwd", x);
  const Sizes s = sizes_of(op, x);
  const int64_t count = s.M * s.S;
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    using A = accumulate_t<T>;
    Tensor loss = op.empty<A>({s.M, s.S}), divisor = op.empty<A>({s.M, s.S}), top = op.empty<A>({s.M, s.S}),
           total = op.empty<A>({s.M, s.S});
    const auto [e, memory] = problem<A>(op, s, weight, ignore, smoothing, z, logits);
    const T* px = op.in<T>(x, "x", {s.M, s.N, s.S});
    const int64_t* t = op.in<int64_t>(target, "target", {s.M, s.S});
    A *pl = op.out<A>(loss, "loss", {s.M, s.S}), *pd = op.out<A>(divisor, "divisor", {s.M, s.S});
    A *pm = op.out<A>(top, "max", {s.M, s.S}), *ps = op.out<A>(total, "sum", {s.M, s.S});
    if (s.S == 1)
      launch(cross_entropy_fwd_kernel<T, true>, rows_config<A>(count, s.N, s.stream), px, t, pl, pd, pm, ps, count, e);
    else
      launch(cross_entropy_fwd_kernel<T, false>, columns_config<A>(count, s.stream), px, t, pl, pd, pm, ps, count, e);
    return std::make_tuple(loss, divisor, top, total);
  });
}

Tensor cross_entropy_bwd(const Tensor& g, const Tensor& x, const Tensor& target, const OptionalTensor& weight,
                         const Tensor& top, const Tensor& total, int64_t ignore, double smoothing, double z,
                         bool logits) {
  OpScope op("cross_entropy_bwd", g);
  const Sizes s = sizes_of(op, x);
  const int64_t count = s.M * s.S;
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    using A = accumulate_t<T>;
    Tensor dx = op.empty<T>({s.M, s.N, s.S});
    const auto [e, memory] = problem<A>(op, s, weight, ignore, smoothing, z, logits);
    const A* pg = op.in<A>(g, "g", {s.M, s.S});
    const T* px = op.in<T>(x, "x", {s.M, s.N, s.S});
    const int64_t* t = op.in<int64_t>(target, "target", {s.M, s.S});
    const A *pm = op.in<A>(top, "max", {s.M, s.S}), *ps = op.in<A>(total, "sum", {s.M, s.S});
    T* pdx = op.out<T>(dx, "dx", {s.M, s.N, s.S});
    if (s.S == 1)
      launch(cross_entropy_bwd_kernel<T, true>, rows_config<A>(count, s.N, s.stream), pg, px, t, pm, ps, pdx, count, e);
    else
      launch(cross_entropy_bwd_kernel<T, false>, columns_config<A>(count, s.stream), pg, px, t, pm, ps, pdx, count, e);
    return dx;
  });
}

std::tuple<Tensor, Tensor, Tensor> soft_cross_entropy_fwd(const Tensor& x, const Tensor& q,
                                                          const OptionalTensor& weight, double smoothing) {
  OpScope op("soft_cross_entropy_fwd", x);
  const Sizes s = sizes_of(op, x);
  const int64_t count = s.M * s.S;
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    using A = accumulate_t<T>;
    Tensor loss = op.empty<A>({s.M, s.S}), top = op.empty<A>({s.M, s.S}), total = op.empty<A>({s.M, s.S});
    const auto [e, memory] = problem<A>(op, s, weight, -1, smoothing, 0, true);
    const T *px = op.in<T>(x, "x", {s.M, s.N, s.S}), *pq = op.in<T>(q, "target", {s.M, s.N, s.S});
    A *pl = op.out<A>(loss, "loss", {s.M, s.S}), *pm = op.out<A>(top, "max", {s.M, s.S}),
      *ps = op.out<A>(total, "sum", {s.M, s.S});
    if (s.S == 1)
      launch(soft_cross_entropy_fwd_kernel<T, true>, rows_config<A>(count, s.N, s.stream), px, pq, pl, pm, ps, count,
             e);
    else
      launch(soft_cross_entropy_fwd_kernel<T, false>, columns_config<A>(count, s.stream), px, pq, pl, pm, ps, count, e);
    return std::make_tuple(loss, top, total);
  });
}

std::tuple<Tensor, Tensor> soft_cross_entropy_bwd(const Tensor& g, const Tensor& x, const Tensor& q,
                                                  const OptionalTensor& weight, const Tensor& top, const Tensor& total,
                                                  double smoothing, bool need_dq) {
  OpScope op("soft_cross_entropy_bwd", g);
  const Sizes s = sizes_of(op, x);
  const int64_t count = s.M * s.S, K = need_dq ? s.M : 0;
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    using A = accumulate_t<T>;
    Tensor dx = op.empty<T>({s.M, s.N, s.S}), dq = op.empty<T>({K, s.N, s.S});
    const auto [e, memory] = problem<A>(op, s, weight, -1, smoothing, 0, true);
    const A* pg = op.in<A>(g, "g", {s.M, s.S});
    const T *px = op.in<T>(x, "x", {s.M, s.N, s.S}), *pq = op.in<T>(q, "target", {s.M, s.N, s.S});
    const A *pm = op.in<A>(top, "max", {s.M, s.S}), *ps = op.in<A>(total, "sum", {s.M, s.S});
    T *pdx = op.out<T>(dx, "dx", {s.M, s.N, s.S}), *out = op.out<T>(dq, "dt", {K, s.N, s.S});
    T* pdq = need_dq ? out : nullptr;
    if (s.S == 1)
      launch(soft_cross_entropy_bwd_kernel<T, true>, rows_config<A>(count, s.N, s.stream), pg, px, pq, pm, ps, pdx, pdq,
             count, e);
    else
      launch(soft_cross_entropy_bwd_kernel<T, false>, columns_config<A>(count, s.stream), pg, px, pq, pm, ps, pdx, pdq,
             count, e);
    return std::make_tuple(dx, dq);
  });
}

}  // namespace
}  // namespace pyops

PYOPS_LIBRARY(m) {
  using namespace pyops;
  PYOPS_IMPL(m, cross_entropy_fwd);
  PYOPS_IMPL(m, cross_entropy_bwd);
  PYOPS_IMPL(m, soft_cross_entropy_fwd);
  PYOPS_IMPL(m, soft_cross_entropy_bwd);
}
