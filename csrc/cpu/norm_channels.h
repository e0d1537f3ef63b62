// What the norms over channels share: batch norm and group norm, for planes [N, C, S] and for rows [N * S, C].
//
//   planes   a channel of one sample is a run of S elements; lanes over S
//   rows     a pixel is a run of C channels; lanes over C
//
// Every sum is taken over blocks that depend on the shape alone and merged in order, in double.
#pragma once

#include "cpu/moments.h"
#include "cpu/norm_rows.h"
#include "cpu/parallel.h"

namespace pyops::PYOPS_CPU_CAPABILITY {

using blocking::cached_elements;

// y = (x - mean) * scale + shift, with the mean to twice the digits: low ends up in shift.
template <class acc_t>
struct Affine {
  acc_t high, scale, shift;
  Affine() = default;
  Affine(double mean, double s, double b) {
    const SplitMean<acc_t> split(mean);
    high = split.high;
    scale = acc_t(s);
    shift = acc_t(b - double(split.low) * s);
  }
};

// dx = dy * along_dy + (x - mean) * along_x + shift
template <class acc_t>
struct Gradient {
  acc_t mean, along_dy, along_x, shift;
};

// ---- planes

template <class scalar_t, class acc_t>
void affine_plane(const scalar_t* __restrict__ x, Affine<acc_t> a, scalar_t* __restrict__ y, int64_t n, bool streamed) {
  using V = Vec<acc_t>;
  const V high(a.high), scale(a.scale), shift(a.shift);
  write_run<acc_t>(y, n, streamed,
                   [&](int64_t i, auto lanes) { return fma(V::load(x + i, lanes) - high, scale, shift); });
}

template <class scalar_t, class acc_t>
void gradient_plane(const scalar_t* __restrict__ dy, const scalar_t* __restrict__ x, Gradient<acc_t> a,
                    scalar_t* __restrict__ dx, int64_t n, bool streamed) {
  using V = Vec<acc_t>;
  const V mean(a.mean), along_dy(a.along_dy), along_x(a.along_x), shift(a.shift);
  write_run<acc_t>(dx, n, streamed, [&](int64_t i, auto lanes) {
    return fma(V::load(dy + i, lanes), along_dy, fma(V::load(x + i, lanes) - mean, along_x, shift));
  });
}

// Sum of dy and of dy * (x - mean) over `runs` runs of n elements, `stride` apart.
template <class scalar_t, class acc_t>
RowSums gradient_sums(const scalar_t* __restrict__ dy, const scalar_t* __restrict__ x, acc_t mean, int64_t runs,
                      int64_t stride, int64_t n) {
  using V = Vec<acc_t>;
  RunningTotals<acc_t, 2> total;
  for (int64_t r = 0; r < runs; ++r)
    total.add(n, [&](int64_t i, auto lanes, auto& t) {
      const int64_t at = r * stride + i;
      V d = V::load(dy + at, lanes);
      t[0] += d;
      t[1] = fma(d, V::load(x + at, lanes) - V(mean), t[1]);
    });
  return {total.sum(0), total.sum(1)};
}

// How `runs` runs of n elements, `stride` apart, are cut into blocks: part of one run, or several short ones.
struct RunBlocks {
  int64_t runs, stride, n;
  int64_t per_block = n > 0 && n < block_elements ? block_elements / n : 1;
  int64_t per_run = n > 0 ? ceil_div(n, block_elements) : 0;
  int64_t count = per_run > 1 ? runs * per_run : (n > 0 ? ceil_div(runs, per_block) : 0);

  // f(offset, runs, n) of one block.
  template <class F>
  decltype(auto) visit(int64_t block, F&& f) const {
    if (per_run > 1) {
      const int64_t i = block % per_run * block_elements;
      return f(block / per_run * stride + i, int64_t{1}, std::min(block_elements, n - i));
    }
    return f(block * per_block * stride, std::min(per_block, runs - block * per_block), n);
  }

  // Sum over the blocks, in order; on all threads where this is not already one of them.
  template <class Sum, class F>
  Sum sum(F&& part) const {
    Sum total{};
    if (count <= 8 || thread_count() == 1) {
      for (int64_t block = 0; block < count; ++block) total += visit(block, part);
      return total;
    }
    Buffer<Sum> partial(count);
    parallel_for(count, 8, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) partial[block] = visit(block, part);
    });
    for (int64_t block = 0; block < count; ++block) total += partial[block];
    return total;
  }

  // f(offset, n) for every run. One run that the second-level cache holds is read in the order of memory, which suits
  // the prefetchers; of more, the blocks that were read last come first. The caller fences what it streams; other
  // threads do so here.
  template <class F>
  void each_again(bool streamed, int64_t arrays, F&& f) const {
    const bool cached = runs == 1 && n * arrays <= cached_elements;
    auto blocks = [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k)
        visit(cached ? k : begin + end - 1 - k, [&](int64_t offset, int64_t r, int64_t length) {
          for (int64_t i = r - 1; i >= 0; --i) f(offset + i * stride, length);
        });
    };
    if (count <= 8 || thread_count() == 1) return blocks(0, count);
    parallel_for(count, 8, [&](int64_t begin, int64_t end) {
      blocks(begin, end);
      if (streamed) stream_fence();
    });
  }
};

// Threads share the items where there are enough of them; otherwise each item is shared by the threads.
inline int64_t item_grain(int64_t items, int64_t elements) {
  return items < thread_count() ? items : ceil_div(32768, elements > 0 ? elements : 1);
}

// ---- rows

inline constexpr int64_t tile_channels = 512;

// [R, C] is read in tiles of up to 512 channels and chunks of rows that stay in cache.
struct RowTiles {
  int64_t R, C;
  int64_t width = C < tile_channels ? C : tile_channels;
  int64_t tiles = width > 0 ? ceil_div(C, width) : 0;
  int64_t height = std::clamp<int64_t>(width > 0 ? 16384 / width : 1, 64, 1024);
  int64_t chunks = ceil_div(R, height);

  // f(chunk, first row, rows, first channel, channels) for every tile of every chunk.
  template <class F>
  void each(F&& f) const {
    parallel_for(tiles * chunks, 2, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t chunk = item / tiles, c = item % tiles * width, r = chunk * height;
        f(chunk, r, std::min(height, R - r), c, std::min(width, C - c));
      }
    });
  }
};

// total[k][c] += sum over rows of term k; term(row, c, lanes, t) adds one vector of one row to t[0..K).
template <class acc_t, int K, class F>
PYOPS_INLINE void accumulate_columns(int64_t rows, int64_t width, acc_t* const (&total)[K], F&& term) {
  int64_t r = 0;
  auto block = [&](auto step) {
    each_vector<acc_t>(width, [&](int64_t c, auto lanes) {
      Totals<acc_t, K> t;
      for (int64_t k = 0; k < step(); ++k) term(r + k, c, lanes, t);
      for (int k = 0; k < K; ++k) (Vec<acc_t>::load(total[k] + c, lanes) + t[k]).store(total[k] + c, lanes);
    });
    r += step();
  };
  while (r + 8 <= rows) block(std::integral_constant<int64_t, 8>());
  while (r < rows) block(std::integral_constant<int64_t, 1>());
}

// Sum and centred sum of squares of each channel over all rows: sum[c], m2[c].
template <class scalar_t>
void column_moments(const scalar_t* __restrict__ x, int64_t R, int64_t C, double* __restrict__ sum,
                    double* __restrict__ m2) {
  using acc_t = accumulate_t<scalar_t>;
  using V = Vec<acc_t>;
  const RowTiles tiling{R, C};
  Buffer<double> partial(tiling.chunks * 2 * C);
  tiling.each([&](int64_t chunk, int64_t first, int64_t rows, int64_t channel, int64_t width) {
    alignas(64) acc_t pivot[tile_channels] = {}, one[tile_channels] = {}, two[tile_channels] = {};
    const scalar_t* __restrict__ block = x + first * C + channel;
    const int64_t sampled = ceil_div(rows, 8);  // enough for a pivot, see block_moments
    accumulate_columns<acc_t, 1>(sampled, width, {pivot}, [&](int64_t r, int64_t c, auto lanes, auto& t) {
      t[0] += V::load(block + r * C + c, lanes);
    });
    for (int64_t c = 0; c < width; ++c) pivot[c] /= acc_t(sampled);
    accumulate_columns<acc_t, 2>(rows, width, {one, two}, [&](int64_t r, int64_t c, auto lanes, auto& t) {
      V d = V::load(block + r * C + c, lanes) - V::load(pivot + c, lanes);
      t[0] += d;
      t[1] = fma(d, d, t[1]);
    });
    double *part_sum = partial.get() + chunk * 2 * C + channel, *part_m2 = part_sum + C;
    for (int64_t c = 0; c < width; ++c) {
      const bool finite = std::isfinite(pivot[c]);
      const double a = one[c], b = double(two[c]) - a * a / double(rows);
      part_sum[c] = double(pivot[c]) * double(rows) + (finite ? a : 0);
      part_m2[c] = b < 0 ? 0 : b;
    }
  });
  for (int64_t c = 0; c < C; ++c) sum[c] = m2[c] = 0;
  double count = 0;
  for (int64_t chunk = 0; chunk < tiling.chunks; ++chunk) {
    const double rows = double(std::min(tiling.height, R - chunk * tiling.height));
    const double per_row = 1 / rows, before = count > 0 ? 1 / count : 0, weight = count * rows / (count + rows);
    const double *part_sum = partial.get() + chunk * 2 * C, *part_m2 = part_sum + C;
    for (int64_t c = 0; c < C; ++c) {
      const double delta = part_sum[c] * per_row - sum[c] * before;
      m2[c] += part_m2[c] + (count > 0 ? delta * delta * weight : 0);
      sum[c] += part_sum[c];
    }
    count += rows;
  }
}

// Sum of dy and of dy * (x - mean[c]) of each channel over all rows: sums[c].
template <class scalar_t, class acc_t>
void column_gradient_sums(const scalar_t* __restrict__ dy, const scalar_t* __restrict__ x,
                          const acc_t* __restrict__ mean, int64_t R, int64_t C, RowSums* sums) {
  using V = Vec<acc_t>;
  const RowTiles tiling{R, C};
  Buffer<acc_t> partial(tiling.chunks * 2 * C, acc_t(0));
  tiling.each([&](int64_t chunk, int64_t first, int64_t rows, int64_t channel, int64_t width) {
    acc_t *g = partial.get() + chunk * 2 * C + channel, *gx = g + C;
    const scalar_t* __restrict__ dy_block = dy + first * C + channel, * __restrict__ x_block = x + first * C + channel;
    accumulate_columns<acc_t, 2>(rows, width, {g, gx}, [&](int64_t r, int64_t c, auto lanes, auto& t) {
      V d = V::load(dy_block + r * C + c, lanes);
      t[0] += d;
      t[1] = fma(d, V::load(x_block + r * C + c, lanes) - V::load(mean + channel + c, lanes), t[1]);
    });
  });
  for (int64_t c = 0; c < C; ++c) sums[c] = {};
  for (int64_t chunk = 0; chunk < tiling.chunks; ++chunk)
    for (int64_t c = 0; c < C; ++c)
      sums[c] += {double(partial[chunk * 2 * C + c]), double(partial[(chunk * 2 + 1) * C + c])};
}

// Coefficients of every channel, one array per coefficient, so that lanes run over channels.
template <class acc_t, int K>
class ChannelTable {
 public:
  explicit ChannelTable(int64_t C) : C_(C), data_(K * C) {}
  acc_t* operator[](int k) { return data_.get() + k * C_; }
  const acc_t* operator[](int k) const { return data_.get() + k * C_; }
  void set(int64_t c, const Affine<acc_t>& a) { put(c, {a.high, a.scale, a.shift}); }
  void set(int64_t c, const Gradient<acc_t>& a) { put(c, {a.mean, a.along_dy, a.along_x, a.shift}); }

 private:
  void put(int64_t c, const acc_t (&values)[K]) {
    for (int k = 0; k < K; ++k) data_[k * C_ + c] = values[k];
  }
  int64_t C_;
  Buffer<acc_t> data_;
};

// y[r, c] = value(r * C, c, lanes). Blocks of rows go backwards, since what was read last is still in cache, and rows
// inside a block forwards, as the prefetcher likes them. Four rows share what is loaded for a channel, except in
// streamed stores, which want one ascending address.
template <class acc_t, class scalar_t, class F>
void write_rows(scalar_t* __restrict__ y, int64_t R, int64_t C, bool streamed, F&& value) {
  const int64_t height = C > 0 && C < 16384 ? 16384 / C : 1;
  parallel_for(ceil_div(R, height), 2, [&](int64_t begin, int64_t end) {
    for (int64_t block = end - 1; block >= begin; --block) {
      int64_t r = block * height;
      const int64_t last = std::min(R, r + height);
      for (; !streamed && r + 4 <= last; r += 4)
        each_vector<acc_t>(C, [&](int64_t c, auto lanes) {
          Vec<acc_t> v[4];
          for (int64_t k = 0; k < 4; ++k) v[k] = value((r + k) * C, c, lanes);
          for (int64_t k = 0; k < 4; ++k) v[k].store(y + (r + k) * C + c, lanes);
        });
      for (; r < last; ++r)
        write_run<acc_t>(y + r * C, C, streamed, [&](int64_t c, auto lanes) { return value(r * C, c, lanes); });
    }
    if (streamed) stream_fence();
  });
}

template <class scalar_t, class acc_t>
void affine_rows(const scalar_t* __restrict__ x, const ChannelTable<acc_t, 3>& table, scalar_t* __restrict__ y,
                 int64_t R, int64_t C, bool streamed) {
  using V = Vec<acc_t>;
  const acc_t* __restrict__ high = table[0], * __restrict__ scale = table[1], * __restrict__ shift = table[2];
  write_rows<acc_t>(y, R, C, streamed, [=](int64_t row, int64_t c, auto lanes) {
    return fma(V::load(x + row + c, lanes) - V::load(high + c, lanes), V::load(scale + c, lanes),
               V::load(shift + c, lanes));
  });
}

template <class scalar_t, class acc_t>
void gradient_rows(const scalar_t* __restrict__ dy, const scalar_t* __restrict__ x, const ChannelTable<acc_t, 4>& table,
                   scalar_t* __restrict__ dx, int64_t R, int64_t C, bool streamed) {
  using V = Vec<acc_t>;
  const acc_t* __restrict__ mean = table[0], * __restrict__ along_dy = table[1], * __restrict__ along_x = table[2], * __restrict__ shift = table[3];
  write_rows<acc_t>(dx, R, C, streamed, [=](int64_t row, int64_t c, auto lanes) {
    V centered = V::load(x + row + c, lanes) - V::load(mean + c, lanes);
    return fma(V::load(dy + row + c, lanes), V::load(along_dy + c, lanes),
               fma(centered, V::load(along_x + c, lanes), V::load(shift + c, lanes)));
  });
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY
