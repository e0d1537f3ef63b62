// Toolbox of the normalisation rooms: how threads split a reduction, moments that survive |mean| >> std, and the two
// small kernels that every room ends with. Partial results are always combined in an order fixed by the shape alone,
// so results are bitwise reproducible and do not depend on the number of multiprocessors.
#pragma once

#include <algorithm>

#include "cuda/device.cuh"

namespace pyops::norm {

constexpr unsigned full_mask = 0xffffffffu;

template <class A>
PYOPS_DEVICE A inverse_root(A v) {
  if constexpr (std::is_same_v<A, double>)
    return 1.0 / sqrt(v);
  else
    return 1.0f / sqrtf(v);
}

// All values of a vector in the type of sums. bfloat16 is unpacked by whole words, which takes half the registers that
// 16-bit values take.
template <class T, int V>
PYOPS_DEVICE Vec<accumulate_t<T>, V> widen(const Vec<T, V>& v) {
  Vec<accumulate_t<T>, V> out;
  if constexpr (std::is_same_v<T, bf16> && V > 1) {
    detail::VecWords<T, V> u;
    u.vec = v;
    Vec<uint32_t, V / 2> words;
    __builtin_memcpy(&words, &u.word, sizeof(words));
#pragma unroll
    for (int j = 0; j < V / 2; ++j) {
      out[2 * j] = __uint_as_float(words[j] << 16);
      out[2 * j + 1] = __uint_as_float(words[j] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j) out[j] = to_acc(v[j]);
  }
  return out;
}

// Values a group of threads reduces: combine(a, b) takes the part of lower lanes first.
template <class A>
struct Sum {
  A value;
  PYOPS_DEVICE Sum shuffled(int offset) const { return {__shfl_xor_sync(full_mask, value, offset)}; }
  static PYOPS_DEVICE Sum combine(Sum a, Sum b) { return {a.value + b.value}; }
};

template <class A>
struct Pair {
  A first, second;
  PYOPS_DEVICE Pair shuffled(int offset) const {
    return {__shfl_xor_sync(full_mask, first, offset), __shfl_xor_sync(full_mask, second, offset)};
  }
  static PYOPS_DEVICE Pair combine(Pair a, Pair b) { return {a.first + b.first, a.second + b.second}; }
};

// Count, mean and sum of squared deviations of a part (Chan, Golub, LeVeque 1979).
template <class A>
struct Moments {
  A count, mean, square;
  PYOPS_DEVICE Moments shuffled(int offset) const {
    return {__shfl_xor_sync(full_mask, count, offset), __shfl_xor_sync(full_mask, mean, offset),
            __shfl_xor_sync(full_mask, square, offset)};
  }
  static PYOPS_DEVICE Moments combine(Moments a, Moments b) {
    if (b.count == A(0)) return a;
    if (a.count == A(0)) return b;
    const A count = a.count + b.count, share = b.count / count, delta = b.mean - a.mean;
    return {count, a.mean + delta * share, a.square + b.square + delta * delta * (a.count * share)};
  }
};

// An infinite shift would turn every difference into NaN.
template <class A>
PYOPS_DEVICE A as_shift(A value) {
  return value - value == A(0) ? value : A(0);
}

// Sums of a run shifted by one of its own values, which keeps the squares small whatever the mean is. The mean is given
// relative to `origin`, a value that all parts of one statistic share, so that means of parts keep their digits when
// |mean| >> std. Both shifts are single values of x: an odd one costs digits in its own run only.
template <bool Centered, class A>
struct ShiftedSums {
  A shift = 0, sum = 0, square = 0;
  int64_t count = 0;
  PYOPS_DEVICE void start(A value) {
    if constexpr (Centered) shift = as_shift(value);
  }
  PYOPS_DEVICE void add(A value) {
    const A d = value - shift;
    if constexpr (Centered) sum += d;
    square += d * d;
  }
  PYOPS_DEVICE Moments<A> moments(A origin) const {
    if (count == 0) return {A(0), A(0), A(0)};
    const A n = static_cast<A>(count), offset = sum / n, rest = square - sum * offset;
    return {n, shift - origin + offset, rest < A(0) ? A(0) : rest};
  }
};

// Reduces over `width` neighbouring threads: a power of two up to 32, or the whole block (scratch of 32 values then).
template <class V>
PYOPS_DEVICE V group_reduce(V v, int width, V* scratch) {
  const int thread = static_cast<int>(threadIdx.x);
  for (int offset = (width < 32 ? width : 32) / 2; offset > 0; offset /= 2) {
    const V other = v.shuffled(offset);
    v = thread & offset ? V::combine(other, v) : V::combine(v, other);
  }
  if (width > 32) {
    if (thread % 32 == 0) scratch[thread / 32] = v;
    __syncthreads();
    v = thread % 32 < width / 32 ? scratch[thread % 32] : V{};
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      const V other = v.shuffled(offset);
      v = thread & offset ? V::combine(other, v) : V::combine(v, other);
    }
    __syncthreads();
  }
  return v;
}

// Division of 32-bit numbers by a number known at launch (Granlund, Montgomery 1994).
struct Divider {
  uint32_t divisor = 1, magic = 1, shift = 0;
  Divider() = default;
  explicit Divider(int64_t d) : divisor(static_cast<uint32_t>(d)) {
    while ((uint64_t(1) << shift) < divisor) ++shift;
    magic = static_cast<uint32_t>((((uint64_t(1) << shift) - divisor) << 32) / divisor + 1);
  }
  PYOPS_DEVICE uint32_t divide(uint32_t n) const {
    const uint64_t high = (static_cast<uint64_t>(n) * magic) >> 32;
    return static_cast<uint32_t>((high + n) >> shift);
  }
};

// The same for 64 bits: the multiplier has 65 bits, its leading one is the sum with n. A 64-bit division is a call,
// around which registers are saved.
struct WideDivider {
  uint64_t divisor = 1, magic = 1;
  uint32_t shift = 0;
  WideDivider() = default;
  explicit WideDivider(int64_t d) : divisor(static_cast<uint64_t>(std::max<int64_t>(d, 1))) {
    while (shift < 63 && (uint64_t(1) << shift) < divisor) ++shift;
    const auto rest = static_cast<unsigned __int128>((uint64_t(1) << shift) - divisor);
    magic = static_cast<uint64_t>((rest << 64) / divisor + 1);
  }
  // n is not negative, and below 2^63
  PYOPS_DEVICE int64_t divide(int64_t n) const {
    const auto u = static_cast<unsigned long long>(n);
    return static_cast<int64_t>((__umul64hi(u, magic) + u) >> shift);
  }
};

// Elements per 16-byte access.
template <class T>
inline constexpr int vector_width = 16 / static_cast<int>(sizeof(T));

// Calls f.template operator()<V>() with a whole vector or with 1.
template <class T, class F>
void with_vector(bool whole, F&& f) {
  if (whole)
    f.template operator()<vector_width<T>>();
  else
    f.template operator()<1>();
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int round_up_to_warps(int64_t threads) { return static_cast<int>(divide_up(threads, 32) * 32); }
inline int power_of_two_from(int64_t n) {
  int p = 1;
  while (p < n) p *= 2;
  return p;
}
inline dim3 grid_of(int64_t blocks) {
  return dim3(static_cast<unsigned>(std::min<int64_t>(blocks, (int64_t(1) << 31) - 1)));
}

// out[n] = sum over p of partial[p, n], lanes over columns, 8 warps over p; the order depends on P alone.
template <class A>
struct ColumnSumsShared {
  A part[8][32];
};

template <class A, class Out>
__global__ void __launch_bounds__(256)
    sum_columns_kernel(const A* __restrict__ partial, Out* __restrict__ out, int64_t P, int64_t N) {
  auto& s = shared_storage<ColumnSumsShared<A>>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * 32 + lane;
  A sum = 0;
  if (n < N) {
#pragma unroll 4
    for (int64_t p = warp; p < P; p += 8) sum += partial[p * N + n];
  }
  s.part[warp][lane] = sum;
  __syncthreads();
  if (warp == 0 && n < N) {
    for (int w = 1; w < 8; ++w) sum += s.part[w][lane];
    out[n] = convert<Out>(sum);
  }
}

template <class A, class Out>
void sum_columns(const A* partial, Out* out, int64_t P, int64_t N, cudaStream_t stream) {
  launch(sum_columns_kernel<A, Out>,
         {.grid = grid_of(divide_up(N, 32)), .block = dim3(256), .smem = sizeof(ColumnSumsShared<A>), .stream = stream},
         partial, out, P, N);
}

// A tensor seen as outer x channels runs. Run (o, c) is `pieces` contiguous pieces of `piece` elements; it is cut into
// `count` slices of `slice` elements, the last one shorter, and one block reduces one slice.
//   batch norm [N, C, S]: outer 1, pieces N    group norm [N, C, S]: outer N, pieces 1    rows [M, N]: outer M, C = 1
struct Runs {
  int64_t outer, channels, outer_stride, channel_stride;
  int64_t pieces, piece, piece_stride;
  int64_t slice = 0, count = 0, group_channels = 1;
  Divider piece_divider;
  WideDivider by_count, by_channels, by_piece, by_group;

  Runs(int64_t outer, int64_t channels, int64_t outer_stride, int64_t channel_stride, int64_t pieces, int64_t piece,
       int64_t piece_stride)
      : outer(outer),
        channels(channels),
        outer_stride(outer_stride),
        channel_stride(channel_stride),
        pieces(pieces),
        piece(piece),
        piece_stride(piece_stride) {
    const int64_t most = std::max<int64_t>(1, divide_up(elements(), 4096));
    const int64_t wanted = divide_up(4096, std::max<int64_t>(1, outer * channels));
    count = std::max(std::min(most, wanted), divide_up(elements(), int64_t(1) << 26));
    slice = divide_up(divide_up(elements(), std::max<int64_t>(1, count)), 2048) * 2048;
    count = slice == 0 ? 0 : divide_up(elements(), slice);
    if (piece > 0 && piece < (int64_t(1) << 31)) piece_divider = Divider(piece);
    by_count = WideDivider(count);
    by_channels = WideDivider(channels);
    by_piece = WideDivider(piece);
  }
  // Channels c of one statistic, where several share it.
  Runs& grouped(int64_t members) {
    group_channels = members;
    by_group = WideDivider(members);
    return *this;
  }
  Runs& cut(int64_t elements_of_slice) {
    slice = elements_of_slice;
    count = divide_up(elements(), slice);
    by_count = WideDivider(count);
    return *this;
  }
  PYOPS_HOST_DEVICE int64_t elements() const { return pieces * piece; }
  int64_t units() const { return outer * channels * count; }
  // Short runs go to one warp each, so that a block is not mostly idle.
  int width() const { return elements() <= 1024 ? 32 : 256; }
};

// Where the elements of one slice lie. Slices are shorter than 2^30, so one wide division per thread is enough.
struct SliceWalk {
  int64_t base, first, size, piece0, offset0;
  PYOPS_DEVICE SliceWalk(const Runs& r, int64_t unit) {
    const int64_t run = r.by_count.divide(unit);
    first = (unit - run * r.count) * r.slice;
    size = r.elements() - first < r.slice ? r.elements() - first : r.slice;
    const int64_t o = r.by_channels.divide(run);
    base = o * r.outer_stride + (run - o * r.channels) * r.channel_stride;
    piece0 = r.by_piece.divide(first);
    offset0 = first - piece0 * r.piece;
  }
  PYOPS_DEVICE int64_t at(const Runs& r, int64_t i) const {
    if (r.pieces == 1) return base + first + i;
    const int64_t t = offset0 + i;
    const int64_t step = r.piece < (int64_t(1) << 31) ? r.piece_divider.divide(static_cast<uint32_t>(t)) : t >= r.piece;
    return base + (piece0 + step) * r.piece_stride + t - step * r.piece;
  }
};

// Calls f(vector, address) for every vector of the slice this thread owns, four loads in flight.
template <int V, bool Streaming = false, class T, class F>
PYOPS_DEVICE void for_slice(const Runs& r, const SliceWalk& walk, const T* __restrict__ x, int lane, int width, F&& f) {
  constexpr int unroll = 4;
  const int64_t step = static_cast<int64_t>(width) * V;
  for (int64_t i = static_cast<int64_t>(lane) * V; i < walk.size; i += unroll * step) {
    Vec<T, V> v[unroll];
    int64_t address[unroll];
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
      if (i + u * step < walk.size) {
        address[u] = walk.at(r, i + u * step);
        v[u] = Streaming ? load_vec_streaming<V>(x + address[u]) : load_vec<V>(x + address[u]);
      }
    }
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
      if (i + u * step < walk.size) f(v[u], address[u]);
    }
  }
}

template <class A>
struct MomentsShared {
  Moments<A> reduce[32];
};
template <class A>
struct PairShared {
  Pair<A> reduce[32];
};

// mean and square of every slice, [outer, channels, count] each, relative to origin, [outer, channels /
// group_channels], the first value of each group; uncentered: mean and origin 0, square = sum of x^2.
template <bool Centered, class T, int V>
__global__ void __launch_bounds__(256)
    slice_moments_kernel(const T* __restrict__ x, accumulate_t<T>* __restrict__ mean,
                         accumulate_t<T>* __restrict__ square, accumulate_t<T>* __restrict__ origin_out, Runs r,
                         int64_t units, int width) {
  using A = accumulate_t<T>;
  auto& s = shared_storage<MomentsShared<A>>();
  const int lane = threadIdx.x % width;
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * (blockDim.x / width) + threadIdx.x / width;
  ShiftedSums<Centered, A> sums;
  A origin = 0;
  if (unit < units) {
    const SliceWalk walk(r, unit);
    if constexpr (Centered) {
      const int64_t run = r.by_count.divide(unit), c = run - r.by_channels.divide(run) * r.channels;
      const int64_t member = c - r.by_group.divide(c) * r.group_channels;
      origin = as_shift(to_acc(x[walk.base - member * r.channel_stride]));
      if (lane == 0 && member == 0 && unit == run * r.count) origin_out[r.by_group.divide(run)] = origin;
    }
    for_slice<V>(r, walk, x, lane, width, [&](const Vec<T, V>& v, int64_t) {
      const Vec<A, V> a = widen(v);
      if (sums.count == 0) sums.start(a[0]);
#pragma unroll
      for (int j = 0; j < V; ++j) sums.add(a[j]);
      sums.count += V;
    });
  }
  const Moments<A> total = group_reduce(sums.moments(origin), width, s.reduce);
  if (unit < units && lane == 0) {
    mean[unit] = total.mean;
    square[unit] = total.square;
  }
}

template <bool Centered, class T, int V>
void slice_moments(const T* x, accumulate_t<T>* mean, accumulate_t<T>* square, accumulate_t<T>* origin, const Runs& r,
                   cudaStream_t stream) {
  const int width = r.width();
  launch(slice_moments_kernel<Centered, T, V>,
         {.grid = grid_of(divide_up(r.units(), 256 / width)),
          .block = dim3(256),
          .smem = sizeof(MomentsShared<accumulate_t<T>>),
          .stream = stream},
         x, mean, square, origin, r, r.units(), width);
}

}  // namespace pyops::norm
