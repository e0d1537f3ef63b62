// max_unpool · CPU
//   y[p, index[p,i,c], c] = x[p,i,c], 0 elsewhere; where indices meet the last one stays · dx[p,i,c] = dy[p, index, c]
// layout   x, index, dx: [P, I, C], y, dy: [P, S, C]; channels first has C = 1 and P = N * channels
// mapping  a thread takes planes
// memory   index and x read once, y written twice (zeros, values); backward: index and dx in order, dy gathered
// numerics copies; an index outside [0, S) raises before anything is written
#include <atomic>
#include <cstring>

#include "common/registry.h"
#include "cpu/parallel.h"

namespace pyops::PYOPS_CPU_CAPABILITY {

// ---- kernels

static bool all_inside(const int64_t* index, int64_t count, int64_t S) {
  std::atomic<bool> inside{true};
  parallel_for(count, 32768, [&](int64_t begin, int64_t end) {
    uint64_t most = 0;
    for (int64_t i = begin; i < end; ++i) most = most > uint64_t(index[i]) ? most : uint64_t(index[i]);
    if (begin < end && most >= uint64_t(S)) inside = false;
  });
  return inside;
}

template <class scalar_t>
void unpool(const scalar_t* x, const int64_t* index, scalar_t* y, int64_t P, int64_t I, int64_t S, int64_t C) {
  parallel_for(P, ceil_div(32768, (I + S) * C + 1), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      scalar_t* plane = y + p * S * C;
      std::memset(static_cast<void*>(plane), 0, size_t(S * C) * sizeof(scalar_t));
      for (int64_t i = 0; i < I; ++i)
        for (int64_t c = 0; c < C; ++c) {
          const int64_t k = (p * I + i) * C + c;
          plane[index[k] * C + c] = x[k];
        }
    }
  });
}

template <class scalar_t>
void pick(const scalar_t* dy, const int64_t* index, scalar_t* dx, int64_t P, int64_t I, int64_t S, int64_t C) {
  parallel_for(P, ceil_div(32768, I * C + 1), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      for (int64_t i = 0; i < I; ++i)
        for (int64_t c = 0; c < C; ++c) {
          const int64_t k = (p * I + i) * C + c;
          dx[k] = dy[(p * S + index[k]) * C + c];
        }
  });
}

// ---- binding

Tensor max_unpool_fwd(const Tensor& x, const Tensor& index, int64_t size) {
  OpScope op("max_unpool_fwd", x);
  op.check(x.dim() == 3 && size >= 0, "x must be [P, I, C] and size at least 0");
  const int64_t P = x.size(0), I = x.size(1), C = x.size(2), S = size;
  auto* at = op.in<int64_t>(index, "index", {P, I, C});
  op.check(all_inside(at, P * I * C, S), "argument 'indices': got a number out of bounds, expected numbers in [0, ", S,
           ")");
  return dispatch_floating(op, x.scalar_type(), [&]<class scalar_t>() {
    Tensor y = op.empty<scalar_t>({P, S, C});
    unpool(op.in<scalar_t>(x, "x", {P, I, C}), at, op.out<scalar_t>(y, "y", {P, S, C}), P, I, S, C);
    return y;
  });
}

Tensor max_unpool_bwd(const Tensor& dy, const Tensor& index) {
  OpScope op("max_unpool_bwd", dy);
  op.check(dy.dim() == 3 && index.dim() == 3, "dy must be [P, S, C] and index [P, I, C]");
  const int64_t P = dy.size(0), S = dy.size(1), C = dy.size(2), I = index.size(1);
  auto* at = op.in<int64_t>(index, "index", {P, I, C});
  op.check(all_inside(at, P * I * C, S), "argument 'indices': got a number out of bounds, expected numbers in [0, ", S,
           ")");
  return dispatch_floating(op, dy.scalar_type(), [&]<class scalar_t>() {
    Tensor dx = op.empty<scalar_t>({P, I, C});
    pick(op.in<scalar_t>(dy, "dy", {P, S, C}), at, op.out<scalar_t>(dx, "dx", {P, I, C}), P, I, S, C);
    return dx;
  });
}

PYOPS_LIBRARY(m) {
  PYOPS_IMPL(m, max_unpool_fwd);
  PYOPS_IMPL(m, max_unpool_bwd);
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY
