// interpolate · CUDA
//   y[n,o0,o1,o2,k] = sum of w0(o0,i0) w1(o1,i1) w2(o2,i2) x[n,i0,i1,i2,k];  dx by the transposed tables of weights
// layout   x: [N, A0, A1, A2, K] · y: [N, B0, B1, B2, K], row-major; K is 1, or the channels of channels_last
// mapping  first one thread an output of an axis writes its inputs and weights into the tables, then one thread an
//          element of y adds its inputs; where windows are long, axis after axis
// memory   x from the caches where outputs share it, y written once, the tables from the caches
// numerics weights computed in double; sums in fp32 (fp64 for fp64), in the order of the inputs: no atomics
#include "cuda/grid_stride.cuh"

#include "common/interpolate.h"
#include "common/interpolate_binding.h"

namespace pyops {
namespace {

using namespace interpolate;

// Output o of an axis reads the inputs first[o] .. first[o] + count[o] with the weights weight[o * room] ..
template <class A>
struct Table {
  int32_t *first, *count;
  A* weight;
  int64_t in, out, room;
};

template <class A>
struct Tables {
  Table<A> axis[3];
};

// The first output whose last (or, with `beyond`, whose first) input is at least (or beyond) i.
PYOPS_HOST_DEVICE int64_t first_output(const Axis& a, int64_t i, bool beyond) {
  int64_t low = 0, high = a.out;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    const Span s = span(a, middle);
    if (beyond ? s.first > i : s.last >= i)
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

template <class A, bool transpose>
__global__ void interpolate_table_kernel(Tables<A> tables, Shape s) {
  const Axis a = s.axis[blockIdx.y];
  const Table<A> t = tables.axis[blockIdx.y];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= t.out) return;
  const int64_t first = transpose ? first_output(a, row, false) : span(a, row).first;
  const int64_t end = transpose ? first_output(a, row, true) : span(a, row).last + 1;
  const int64_t n = end - first < t.room ? end - first : t.room;
  t.first[row] = static_cast<int32_t>(first);
  t.count[row] = static_cast<int32_t>(n > 0 ? n : 0);
  A* w = t.weight + row * t.room;
  for (int64_t j = 0; j < n; ++j) w[j] = 0;
  if constexpr (transpose) {
    for (int64_t j = 0; j < n; ++j)
      each_tap(a, first + j, [&](int64_t i, double weight) {
        if (i == row) w[j] += static_cast<A>(weight);
      });
  } else {
    each_tap(a, row, [&](int64_t i, double weight) {
      const int64_t j = i - first;
      w[j < 0 ? 0 : j < n ? j : n - 1] += static_cast<A>(weight);
    });
  }
}

template <class T, class U, class A>
__global__ void interpolate_kernel(const T* __restrict__ x, U* __restrict__ y, int64_t N, int64_t K, Tables<A> t) {
  const Table<A>&d = t.axis[0], &h = t.axis[1], &w = t.axis[2];
  const int64_t total = N * d.out * h.out * w.out * K, step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t e = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; e < total; e += step) {
    int64_t rest = e;
    const int64_t k = rest % K;
    rest /= K;
    const int64_t o2 = rest % w.out;
    rest /= w.out;
    const int64_t o1 = rest % h.out;
    rest /= h.out;
    const int64_t o0 = rest % d.out, n = rest / d.out;
    const int64_t i0 = d.first[o0], i1 = h.first[o1], i2 = w.first[o2];
    const A *w0 = d.weight + o0 * d.room, *w1 = h.weight + o1 * h.room, *w2 = w.weight + o2 * w.room;
    const int count0 = d.count[o0], count1 = h.count[o1], count2 = w.count[o2];
    A sum = 0;
    for (int j0 = 0; j0 < count0; ++j0)
      for (int j1 = 0; j1 < count1; ++j1) {
        const T* row = x + (((n * d.in + i0 + j0) * h.in + i1 + j1) * w.in + i2) * K + k;
        A across = 0;
        for (int j2 = 0; j2 < count2; ++j2) across += w2[j2] * to_acc(row[j2 * K]);
        sum += w0[j0] * w1[j1] * across;
      }
    y[e] = from_acc<U>(sum);
  }
}

// The one input of each output, of any type, bit for bit.
template <class T>
__global__ void interpolate_nearest_kernel(const T* __restrict__ x, T* __restrict__ y, Shape s) {
  const Axis &d = s.axis[0], &h = s.axis[1], &w = s.axis[2];
  const int64_t total = s.N * d.out * h.out * w.out * s.K, step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t e = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; e < total; e += step) {
    int64_t rest = e;
    const int64_t k = rest % s.K;
    rest /= s.K;
    const int64_t i2 = nearest_source(w, rest % w.out);
    rest /= w.out;
    const int64_t i1 = nearest_source(h, rest % h.out);
    rest /= h.out;
    const int64_t i0 = nearest_source(d, rest % d.out), n = rest / d.out;
    y[e] = x[(((n * d.in + i0) * h.in + i1) * w.in + i2) * s.K + k];
  }
}

}  // namespace
}  // namespace pyops

// binding

#include "common/registry.h"

namespace pyops {
namespace {

// The most inputs that an output of the (transposed) table reads; room for two more, as the device may round a
// position to the other side of an input.
int64_t room_of(const Axis& a, bool transpose) {
  int64_t most = 0;
  if (!transpose) {
    for (int64_t o = 0; o < a.out; ++o) {
      const Span s = span(a, o);
      most = std::max(most, s.last - s.first + 1);
    }
    return most + 2;
  }
  int64_t begin = 0, end = 0;
  for (int64_t i = 0; i < a.in; ++i) {
    while (begin < a.out && span(a, begin).last < i) ++begin;
    while (end < a.out && span(a, end).first <= i) ++end;
    most = std::max(most, end - begin);
  }
  return most + 2;
}

template <class T, bool transpose>
void resample(const OpScope& op, const T* x, T* y, const Shape& s) {
  using A = accumulate_t<T>;
  int64_t rows = 0, weights = 0, longest = 0, reads = 1;
  Tables<A> t{};
  for (int d = 0; d < 3; ++d) {
    const Axis& a = s.axis[d];
    t.axis[d] = {nullptr, nullptr, nullptr, transpose ? a.out : a.in, transpose ? a.in : a.out, room_of(a, transpose)};
    rows += t.axis[d].out, weights += t.axis[d].out * t.axis[d].room;
    longest = std::max(longest, t.axis[d].out), reads *= t.axis[d].room - 2;
  }
  const int64_t total = s.N * s.K * t.axis[0].out * t.axis[1].out * t.axis[2].out;
  if (total == 0) return;
  Tensor index = op.empty<int32_t>({2 * rows}), weight = op.empty<A>({weights});
  int32_t* pi = op.out<int32_t>(index, "index", {2 * rows});
  A* pw = op.out<A>(weight, "weight", {weights});
  for (Table<A>& a : t.axis) {
    a.first = pi, a.count = pi + a.out, a.weight = pw;
    pi += 2 * a.out, pw += a.out * a.room;
  }
  launch(interpolate_table_kernel<A, transpose>,
         {.grid = dim3(static_cast<unsigned>(ceil_div(longest, 128)), 3),
          .block = dim3(128),
          .stream = static_cast<cudaStream_t>(op.stream())},
         t, s);
  if (reads <= 32 || t.axis[1].in == 1) {
    launch(interpolate_kernel<T, T, A>, grid_stride(total, op.stream()), x, y, s.N, s.K, t);
    return;
  }
  // first all but the last axis, whose rows are longer by far than the windows
  const int64_t between = s.N * s.K * t.axis[0].out * t.axis[1].out * t.axis[2].in;
  Tensor half = op.empty<A>({between});
  A* ph = op.out<A>(half, "between", {between});
  Tables<A> outer = t, last = t;
  const int64_t planes = s.N * t.axis[0].out * t.axis[1].out, columns = t.axis[2].in * s.K;
  // a table of one output that reads one input with weight 1 leaves its axis alone
  Tensor one_index = op.empty<int32_t>({2}), one_weight = op.empty<A>({3});
  Table<A> one{op.out<int32_t>(one_index, "one", {2}), nullptr, op.out<A>(one_weight, "one", {3}), 1, 1, 3};
  one.count = one.first + 1;
  Shape unit{1, 1, {{1, 1, 1, nearest, false}, {1, 1, 1, nearest, false}, {1, 1, 1, nearest, false}}};
  Tables<A> ones{{one, one, one}};
  launch(interpolate_table_kernel<A, false>,
         {.grid = dim3(1), .block = dim3(32), .stream = static_cast<cudaStream_t>(op.stream())}, ones, unit);
  outer.axis[2] = one, last.axis[0] = one, last.axis[1] = one;
  launch(interpolate_kernel<T, A, A>, grid_stride(between, op.stream()), x, ph, s.N, columns, outer);
  launch(interpolate_kernel<A, T, A>, grid_stride(total, op.stream()), static_cast<const A*>(ph), y, planes, s.K, last);
}

Tensor interpolate_fwd(const Tensor& x, std::vector<int64_t> size, int64_t mode, bool align_corners, double scale_d,
                       double scale_h, double scale_w) {
  OpScope op("interpolate_fwd", x);
  const Shape s = shape_of(op, x, size, mode, align_corners, {scale_d, scale_h, scale_w}, true);
  const auto copy = [&]<class T>() {
    Tensor y = empty_y(op, s, scalar_type_of<T>);
    const T* px = in_x<T>(op, x, s);
    T* py = out_y<T>(op, y, s);
    launch(interpolate_nearest_kernel<T>, grid_stride(s.out_elements(), op.stream()), px, py, s);
    return y;
  };
  if (mode <= nearest_exact && x.scalar_type() == ScalarType::Byte) return copy.template operator()<uint8_t>();
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    if (mode <= nearest_exact) return copy.template operator()<T>();
    Tensor y = empty_y(op, s, scalar_type_of<T>);
    resample<T, false>(op, in_x<T>(op, x, s), out_y<T>(op, y, s), s);
    return y;
  });
}

Tensor interpolate_bwd(const Tensor& dy, std::vector<int64_t> size, int64_t mode, bool align_corners, double scale_d,
                       double scale_h, double scale_w) {
  OpScope op("interpolate_bwd", dy);
  const Shape s = shape_of(op, dy, size, mode, align_corners, {scale_d, scale_h, scale_w}, false);
  return dispatch_floating(op, dy.scalar_type(), [&]<class T>() {
    Tensor dx = empty_x(op, s, scalar_type_of<T>);
    resample<T, true>(op, in_y<T>(op, dy, s), out_x<T>(op, dx, s), s);
    return dx;
  });
}

PYOPS_LIBRARY(m) {
  PYOPS_IMPL(m, interpolate_fwd);
  PYOPS_IMPL(m, interpolate_bwd);
}

}  // namespace
}  // namespace pyops
