// boxes · CPU
//   y[b,n,m] = overlap(boxes1[b,n], boxes2[b,m])     IoU, generalised, distance or complete (common/boxes.h)
// layout   boxes1: [B, N, 4] · boxes2: [B, M, 4] as (x1, y1, x2, y2) · y, dy: [B, N, M] in acc_t
// mapping  a thread takes rows n; lanes over m. Backward: fixed chunks of rows, their shares of d boxes2 added in order
// memory   forward writes y once; backward reads dy once
// numerics acc_t throughout
#include "common/boxes.h"

#include "common/registry.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace pyops::PYOPS_CPU_CAPABILITY {

// ---- kernels

// Coordinates of M boxes as five arrays, so that lanes run over boxes.
template <class acc_t>
struct Coordinates {
  Buffer<acc_t> data;
  int64_t M;
  template <class scalar_t>
  Coordinates(const scalar_t* boxes, int64_t count, bool angles) : data(5 * count), M(count) {
    for (int64_t m = 0; m < M; ++m) {
      for (int k = 0; k < 4; ++k) data[k * M + m] = acc_t(boxes[4 * m + k]);
      const acc_t w = data[2 * M + m] - data[m], h = data[3 * M + m] - data[M + m];
      data[4 * M + m] = angles ? std::atan(w / h) : acc_t(0);
    }
  }
  const acc_t* row(int k) const { return data.get() + k * M; }
  overlap::Box<acc_t> operator[](int64_t m) const {
    return {data[m], data[M + m], data[2 * M + m], data[3 * M + m], data[4 * M + m]};
  }
};

template <int K, class acc_t>
void overlap_row(const overlap::Box<acc_t> a, const acc_t* __restrict__ x1, const acc_t* __restrict__ y1,
                 const acc_t* __restrict__ x2, const acc_t* __restrict__ y2, const acc_t* __restrict__ angle, acc_t eps,
                 acc_t* __restrict__ y, int64_t M) {
#pragma omp simd
  for (int64_t m = 0; m < M; ++m)
    y[m] = overlap::pair_fwd<K>(a, overlap::Box<acc_t>{x1[m], y1[m], x2[m], y2[m], angle[m]}, eps);
}

// d of one box, and its row's share of the gradients of the others.
template <int K, class acc_t>
void overlap_row_bwd(const overlap::Box<acc_t> a, const acc_t* __restrict__ x1, const acc_t* __restrict__ y1,
                     const acc_t* __restrict__ x2, const acc_t* __restrict__ y2, const acc_t* __restrict__ angle,
                     acc_t eps, const acc_t* __restrict__ dy, acc_t (&da)[4], acc_t* __restrict__ d0,
                     acc_t* __restrict__ d1, acc_t* __restrict__ d2, acc_t* __restrict__ d3, int64_t M) {
  acc_t s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
  for (int64_t m = 0; m < M; ++m) {
    acc_t mine[4] = {0, 0, 0, 0}, other[4] = {0, 0, 0, 0};
    overlap::pair_bwd<K>(a, overlap::Box<acc_t>{x1[m], y1[m], x2[m], y2[m], angle[m]}, eps, dy[m], mine, other);
    s0 += mine[0];
    s1 += mine[1];
    s2 += mine[2];
    s3 += mine[3];
    d0[m] += other[0];
    d1[m] += other[1];
    d2[m] += other[2];
    d3[m] += other[3];
  }
  da[0] = s0, da[1] = s1, da[2] = s2, da[3] = s3;
}

template <int K, class scalar_t>
void box_overlap_rows(const scalar_t* boxes1, const scalar_t* boxes2, accumulate_t<scalar_t>* y, int64_t B, int64_t N,
                      int64_t M, double eps) {
  using acc_t = accumulate_t<scalar_t>;
  for (int64_t b = 0; b < B; ++b) {
    const Coordinates<acc_t> first(boxes1 + b * N * 4, N, K == overlap::complete);
    const Coordinates<acc_t> second(boxes2 + b * M * 4, M, K == overlap::complete);
    parallel_for(N, ceil_div(8192, std::max<int64_t>(M, 1)), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n)
        overlap_row<K>(first[n], second.row(0), second.row(1), second.row(2), second.row(3), second.row(4), acc_t(eps),
                       y + (b * N + n) * M, M);
    });
  }
}

template <int K, class scalar_t>
void box_overlap_bwd_rows(const accumulate_t<scalar_t>* dy, const scalar_t* boxes1, const scalar_t* boxes2,
                          scalar_t* d1, scalar_t* d2, int64_t B, int64_t N, int64_t M, double eps) {
  using acc_t = accumulate_t<scalar_t>;
  const int64_t chunks = std::min<int64_t>(16, ceil_div(N, ceil_div(4096, std::max<int64_t>(M, 1))));
  for (int64_t b = 0; b < B; ++b) {
    const Coordinates<acc_t> first(boxes1 + b * N * 4, N, K == overlap::complete);
    const Coordinates<acc_t> second(boxes2 + b * M * 4, M, K == overlap::complete);
    Buffer<acc_t> partial(chunks * 4 * M, acc_t(0));
    parallel_for(chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        acc_t* part = partial.get() + chunk * 4 * M;
        for (int64_t n = chunk * N / chunks; n < (chunk + 1) * N / chunks; ++n) {
          acc_t da[4];
          overlap_row_bwd<K>(first[n], second.row(0), second.row(1), second.row(2), second.row(3), second.row(4),
                             acc_t(eps), dy + (b * N + n) * M, da, part, part + M, part + 2 * M, part + 3 * M, M);
          for (int k = 0; k < 4; ++k) d1[(b * N + n) * 4 + k] = scalar_t(da[k]);
        }
      }
    });
    for (int64_t m = 0; m < M; ++m)
      for (int64_t k = 0; k < 4; ++k) {
        acc_t sum = 0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partial[(chunk * 4 + k) * M + m];
        d2[(b * M + m) * 4 + k] = scalar_t(sum);
      }
  }
}

// ---- binding

Tensor box_overlap_fwd(const Tensor& boxes1, const Tensor& boxes2, int64_t kind, double eps) {
  OpScope op("box_overlap_fwd", boxes1);
  op.check(boxes1.dim() == 3 && boxes2.dim() == 3, "boxes must be [B, N, 4] and [B, M, 4]");
  const int64_t B = boxes1.size(0), N = boxes1.size(1), M = boxes2.size(1);
  return dispatch_floating(op, boxes1.scalar_type(), [&]<class scalar_t>() {
    using acc_t = accumulate_t<scalar_t>;
    Tensor y = op.empty<acc_t>({B, N, M});
    auto* p1 = op.in<scalar_t>(boxes1, "boxes1", {B, N, 4});
    auto* p2 = op.in<scalar_t>(boxes2, "boxes2", {B, M, 4});
    auto* py = op.out<acc_t>(y, "y", {B, N, M});
    overlap::with_kind(kind, [&]<int K>() { box_overlap_rows<K>(p1, p2, py, B, N, M, eps); });
    return y;
  });
}

std::tuple<Tensor, Tensor> box_overlap_bwd(const Tensor& dy, const Tensor& boxes1, const Tensor& boxes2, int64_t kind,
                                           double eps) {
  OpScope op("box_overlap_bwd", dy);
  op.check(boxes1.dim() == 3 && boxes2.dim() == 3, "boxes must be [B, N, 4] and [B, M, 4]");
  const int64_t B = boxes1.size(0), N = boxes1.size(1), M = boxes2.size(1);
  return dispatch_floating(op, boxes1.scalar_type(), [&]<class scalar_t>() {
    using acc_t = accumulate_t<scalar_t>;
    Tensor d1 = op.empty<scalar_t>({B, N, 4}), d2 = op.empty<scalar_t>({B, M, 4});
    auto* pdy = op.in<acc_t>(dy, "dy", {B, N, M});
    auto* p1 = op.in<scalar_t>(boxes1, "boxes1", {B, N, 4});
    auto* p2 = op.in<scalar_t>(boxes2, "boxes2", {B, M, 4});
    auto* pd1 = op.out<scalar_t>(d1, "d1", {B, N, 4});
    auto* pd2 = op.out<scalar_t>(d2, "d2", {B, M, 4});
    overlap::with_kind(kind, [&]<int K>() { box_overlap_bwd_rows<K>(pdy, p1, p2, pd1, pd2, B, N, M, eps); });
    return std::make_tuple(d1, d2);
  });
}

PYOPS_LIBRARY(m) {
  PYOPS_IMPL(m, box_overlap_fwd);
  PYOPS_IMPL(m, box_overlap_bwd);
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY
