// RoI Align forward through shared memory: the pixels of some bin rows come to a tile once, the samples read the tile.
//
// mapping  a block takes one RoI and a slice of channels: 128 bytes of them channels last (8 lanes of 16 bytes to a bin),
//          else 16 (a thread computes 4 of a bin). It works out the samples of both axes once, then goes down the RoI in
//          strips of as many bin rows as fit the tile. A RoI whose samples are too many, whose single bin row does not
//          fit, or whose pixels are more than its samples read, 4 each, is read from the map by the same code. So the
//          choice is made on the device, RoI by RoI, and both ways give the same bits
// memory   prediction, not measured: of a RoI of 14 x 14 pixels with 7 x 7 bins of 2 x 2 samples, a channel reads
//          7 * 7 * 16 = 784 values from the map but stages 15 * 15 = 225. 1000 such RoIs of 256 channels in fp32 move
//          803 MB out of L2 (less what L1 catches), staged 230 MB: 146 and 42 us at 5.5 TB/s. Channels first the map is
//          read in sectors of 32 bytes where a staged row comes in pieces that are used whole, so there it gains more.
//          With bins of 4 pixels a side and 2 x 2 samples both are equal; beyond that staging would read in vain
#pragma once

#include "cuda/roi_align.cuh"

namespace pyops::roi {

inline constexpr int staged_threads = 128;
inline constexpr int tile_bytes = 32 << 10;  // six blocks to a multiprocessor of sm_90, four of sm_80
inline constexpr int most_samples = 128;     // of all bins, along one axis
inline constexpr int run = 8;                // lanes that copy one run of memory, or take one bin channels last

// Of a sample: the pixels it reads and the share of the upper one; low < 0 where it lies off the map.
template <class A>
struct Sample {
  int low, high;
  A share;
};

// The samples of all bins along an axis, read as roi::Axis is.
template <class A>
struct Samples {
  using index = int;
  const Sample<A>* at;
  int grid;

  PYOPS_DEVICE void samples(int, int& first, int& last) const {
    first = 0;
    last = grid;
  }
  PYOPS_DEVICE bool sample(int p, int i, int& low, int& high, A& share) const {
    const Sample<A> s = at[p * grid + i];
    low = s.low;
    high = s.high;
    share = s.share;
    return low >= 0;
  }
};

template <class T>
struct StagedShared {
  using A = accumulate_t<T>;
  static constexpr int values = tile_bytes / static_cast<int>(sizeof(T));
  alignas(16) T tile[values];
  Sample<A> y[most_samples], x[most_samples];
};

// Fills a table with the samples of an axis; false, for the whole block, where they are too many.
template <class A>
PYOPS_DEVICE bool tabulate(const Axis<A>& axis, int bins, Sample<A>* table) {
  if (axis.grid > most_samples || bins * axis.grid > most_samples || axis.size > (1 << 20)) return false;
  const int grid = static_cast<int>(axis.grid);
  for (int i = threadIdx.x; i < bins * grid; i += staged_threads) {
    int64_t low, high;
    A share;
    const bool inside = axis.sample(i / grid, i % grid, low, high, share);
    table[i] = inside ? Sample<A>{static_cast<int>(low), static_cast<int>(high), share} : Sample<A>{-1, -1, A(0)};
  }
  return true;
}

// Pixels from low to high.
struct Range {
  int low = 1 << 30, high = -1;

  PYOPS_DEVICE int count() const { return high < low ? 0 : high - low + 1; }
  // Grows by what bin p reads.
  template <class A>
  PYOPS_DEVICE void include(const Samples<A>& axis, int p) {
    for (int i = p * axis.grid; i < (p + 1) * axis.grid; ++i)
      if (axis.at[i].low >= 0) {
        low = axis.at[i].low < low ? axis.at[i].low : low;
        high = axis.at[i].high > high ? axis.at[i].high : high;
      }
  }
};

// Calls f(outer, inner, piece) for all of them, by the whole block; eight lanes follow a run of pieces.
template <class F>
PYOPS_DEVICE void for_pieces(int outer, int inner, int pieces, const F& f) {
  for (int o = 0, i = threadIdx.x / run;; i += staged_threads / run) {
    for (; i >= inner; i -= inner) ++o;
    if (o >= outer) break;
    for (int piece = threadIdx.x % run; piece < pieces; piece += run) f(o, i, piece);
  }
}

// One element to shared memory; complete after cp_async_wait.
template <class T>
PYOPS_DEVICE void copy_element(T* to, const T* from) {
  if constexpr (sizeof(T) >= 4)
    cp_async<static_cast<int>(sizeof(T))>(to, from);
  else
    *to = __ldg(from);
}

template <class T, bool ChannelsLast>
struct Staged {
  static constexpr int vector = 16 / static_cast<int>(sizeof(T));
  static constexpr int V = ChannelsLast ? vector : 4;        // channels of a thread
  static constexpr int slice = ChannelsLast ? run * V : 16;  // channels of a block
  // Of a multiprocessor; for more, registers would spill.
  static constexpr int blocks = ChannelsLast && sizeof(T) < 8 ? 6 : 4;
};

template <class T, bool ChannelsLast>
__global__ void __launch_bounds__(staged_threads, Staged<T, ChannelsLast>::blocks)
    roi_align_fwd_staged_kernel(Maps<const T> maps, const accumulate_t<T>* __restrict__ rois,
                                const int64_t* __restrict__ levels, T* __restrict__ y, Shape s, int slices) {
  using A = accumulate_t<T>;
  constexpr int V = Staged<T, ChannelsLast>::V, vector = Staged<T, ChannelsLast>::vector;
  constexpr int slice = Staged<T, ChannelsLast>::slice;
  auto& shared = shared_storage<StagedShared<T>>();
  const int64_t r = blockIdx.x / slices, c0 = static_cast<int64_t>(blockIdx.x % slices) * slice;
  const int channels = static_cast<int>(s.C - c0 < slice ? s.C - c0 : slice);
  const int P = static_cast<int>(s.P), Q = static_cast<int>(s.Q);
  const Place at = place_of(rois, levels, r, s, maps.count);
  const int64_t H = maps.H[at.level], W = maps.W[at.level], HW = H * W;
  const T* x = maps.x[at.level] + (ChannelsLast ? at.image * HW * s.C + c0 : (at.image * s.C + c0) * HW);
  y += ChannelsLast ? r * P * Q * s.C + c0 : (r * s.C + c0) * P * Q;
  const Axis<A> ya = y_axis(rois, r, s, H), xa = x_axis(rois, r, s, W);
  const bool tabled = tabulate(ya, P, shared.y) && tabulate(xa, Q, shared.x);
  __syncthreads();

  // Bins of the rows first <= p < last; mean(p, q, c) gives V channels of one, from channel c of the slice.
  const auto write = [&](int first, int last, const auto& mean) {
    const int bins = (last - first) * Q, lanes = ChannelsLast ? run : (channels + V - 1) / V;
    for (int i = threadIdx.x; i < bins * lanes; i += staged_threads) {
      const int bin = ChannelsLast ? i / run : i % bins, c = (ChannelsLast ? i % run : i / bins) * V;
      if (c >= channels) continue;
      const int p = first + bin / Q, q = bin % Q;
      const Vec<A, V> sum = mean(p, q, c);
      if constexpr (ChannelsLast) {
        Vec<T, V> out;
#pragma unroll
        for (int k = 0; k < V; ++k) out[k] = from_acc<T>(sum[k]);
        store_vec(y + (p * Q + q) * s.C + c, out);
      } else {
#pragma unroll
        for (int k = 0; k < V; ++k)
          if (c + k < channels) y[((c + k) * P + p) * Q + q] = from_acc<T>(sum[k]);
      }
    }
  };

  // What the RoI reads, and the tallest of its bin rows.
  const Samples<A> ys{shared.y, static_cast<int>(ya.grid)}, xs{shared.x, static_cast<int>(xa.grid)};
  Range columns, all_rows;
  int tallest = 0;
  if (tabled) {
    for (int q = 0; q < Q; ++q) columns.include(xs, q);
    for (int p = 0; p < P; ++p) {
      Range rows;
      rows.include(ys, p);
      tallest = rows.count() > tallest ? rows.count() : tallest;
      all_rows.include(ys, p);
    }
  }
  // Channels first, rows are copied in whole vectors where they begin at one; a pitch of an odd number of vectors lets
  // the rows begin in different banks.
  const bool whole = W % vector == 0 && is_aligned(x);
  if (!ChannelsLast && whole && tallest > 0) {
    columns.low -= columns.low % vector;
    columns.high += vector - 1 - columns.high % vector;
  }
  const int width = columns.count(), pieces = (width + vector - 1) / vector;
  const int pitch = ChannelsLast ? width * slice : (pieces | 1) * vector;
  const int64_t row_values = ChannelsLast ? pitch : pitch * channels;
  const bool fits = tallest * row_values <= StagedShared<T>::values;
  const int64_t pixels = static_cast<int64_t>(all_rows.count()) * width;
  if (!fits || pixels == 0 || pixels >= 4 * P * ys.grid * Q * xs.grid) {
    write(0, P, [&](int p, int q, int c) {
      return bin_mean<V>(ya, xa, p, q, [&](int64_t row, int64_t column) {
        const int64_t pixel = row * W + column;
        return channels_at<Memory::map, V, ChannelsLast>(x + (ChannelsLast ? pixel * s.C + c : c * HW + pixel), HW,
                                                         channels - c);
      });
    });
    return;
  }

  // A strip is never empty: the one before ended where a bin row did not fit any more.
  const int most_rows = StagedShared<T>::values / static_cast<int>(row_values);
  for (int p = 0, next; p < P; p = next) {
    Range rows;
    for (next = p; next < P; ++next) {
      Range more = rows;
      more.include(ys, next);
      if (more.count() > most_rows) break;
      rows = more;
    }
    const int count = rows.count();
    const int64_t corner = rows.low * W + columns.low;
    T* tile = shared.tile;
    if constexpr (ChannelsLast)
      for_pieces(count, width, channels / V, [&](int row, int column, int piece) {
        cp_async<16>(tile + (row * width + column) * slice + piece * V,
                     x + (corner + row * W + column) * s.C + piece * V);
      });
    else if (whole)
      for_pieces(channels, count, pieces, [&](int k, int row, int piece) {
        cp_async<16>(tile + (k * count + row) * pitch + piece * vector, x + k * HW + corner + row * W + piece * vector);
      });
    else
      for_pieces(channels, count, width, [&](int k, int row, int column) {
        copy_element(tile + (k * count + row) * pitch + column, x + k * HW + corner + row * W + column);
      });
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    write(p, next, [&](int p, int q, int c) {
      const T* first = tile + (ChannelsLast ? c : c * count * pitch);
      return bin_mean<V>(ys, xs, p, q, [&](int row, int column) {
        const int pixel = (row - rows.low) * pitch + (column - columns.low) * (ChannelsLast ? slice : 1);
        return channels_at<Memory::tile, V, ChannelsLast>(first + pixel, count * pitch, channels - c);
      });
    });
    __syncthreads();  // nobody reads the tile any more
  }
}

// Whether the kernel above is the one: its blocks have work for half of their threads, and samples may fit its tables.
template <class T, bool ChannelsLast>
bool worth_staging(const Shape& s) {
  using Kernel = Staged<T, ChannelsLast>;
  const int64_t most = most_samples / (s.sampling_ratio > 0 ? s.sampling_ratio : 1);
  const int64_t channels = s.C < Kernel::slice ? s.C : Kernel::slice;
  return s.P <= most && s.Q <= most && s.P * s.Q * ceil_div(channels, Kernel::V) >= staged_threads / 2;
}

}  // namespace pyops::roi
