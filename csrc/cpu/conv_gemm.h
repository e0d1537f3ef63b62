// Convolution as a product of matrices that are never formed (im2col in blocks that stay in L2): what all layouts share,
// and planes.
//
//   NCHW   Y[k, pixel] = W[k, (c,tap)] * Col[(c,tap), pixel]     lanes over pixels; Col is packed from image rows
//
// Channels last: conv_pixels.h. Forward and gradient in the input run through the same code (common/conv.h); the gradient
// in the weight: conv_weight.h.
#pragma once

#include "common/conv.h"
#include "cpu/conv_choice.h"
#include "cpu/conv_epilogue.h"
#include "cpu/gemm.h"
#include "cpu/parallel.h"

namespace pyops::PYOPS_CPU_CAPABILITY::conv_gemm {

using conv::Axis;
using conv::Sizes;
using conv::Space;

// Packed B that shares L2 with a panel of A; the buffer that packs weights, at most.
inline constexpr int64_t block_bytes = conv_choice::column_bytes, weight_bytes = conv_choice::weight_bytes;

// Tasks that are worth a thread, each of `products` multiplications.
inline int64_t task_grain(int64_t products) { return ceil_div(1 << 18, std::max<int64_t>(products, 1)); }

// Where weight (g, m, c, tap) stands: m is an output channel of the product, c one that is summed over.
struct Weights {
  int64_t g, m, c, tap;
};

struct Problem {
  int64_t N, G, M, C;  // examples, groups; output and summed channels of one group
  Space space;
  Weights at;
  int64_t taps_h, taps_w;  // of the whole filter, to number its taps

  // Number of tap j of this phase in the filter.
  int64_t tap(int64_t j) const {
    const int64_t jw = j % space.w.taps, jh = j / space.w.taps % space.h.taps, jd = j / space.w.taps / space.h.taps;
    const int64_t d = space.d.w_base + jd * space.d.w_step, h = space.h.w_base + jh * space.h.w_step;
    return (d * taps_h + h) * taps_w + space.w.w_base + jw * space.w.w_step;
  }
  int64_t K() const { return C * space.taps(); }
};

inline Problem problem_of(const Sizes& s, const Space& space, bool transposed, bool channels_last) {
  const int64_t Cg = s.C / s.G, Kg = s.K / s.G, T = s.taps();
  Weights at = channels_last ? Weights{Kg * T * Cg, T * Cg, 1, Cg} : Weights{Kg * Cg * T, Cg * T, T, 1};
  if (transposed) std::swap(at.m, at.c);
  return {s.N, s.G, transposed ? Cg : Kg, transposed ? Kg : Cg, space, at, s.r[1], s.r[2]};
}

// A pixel of the output, numbered over examples and positions.
struct Pixel {
  int64_t n;
  int32_t d, h, w;
};
inline Pixel pixel_at(const Space& s, int64_t i) {
  const int64_t in = s.positions(), at = i % in;
  return {i / in, int32_t(at / s.w.count / s.h.count), int32_t(at / s.w.count % s.h.count), int32_t(at % s.w.count)};
}
inline void next(const Space& s, Pixel& p) {
  if (++p.w < s.w.count) return;
  p.w = 0;
  if (++p.h < s.h.count) return;
  p.h = 0;
  if (++p.d < s.d.count) return;
  p.d = 0, ++p.n;
}
inline int64_t out_offset(const Space& s, const Pixel& p) {
  return ((int64_t(s.d.out_base) + int64_t(p.d) * s.d.out_step) * s.h.out_size + s.h.out_base +
          int64_t(p.h) * s.h.out_step) *
             s.w.out_size +
         s.w.out_base + int64_t(p.w) * s.w.out_step;
}

// Pixels next to each other in one output row and one panel.
struct Run {
  Pixel first;
  int64_t count, at;  // at: position in the block
};
inline void runs_of(const Space& s, int64_t begin, int64_t end, int64_t panel, std::vector<Run>& runs) {
  runs.clear();
  for (int64_t i = begin; i < end;) {
    const Pixel p = pixel_at(s, i);
    const int64_t room = panel - (i - begin) % panel;
    const int64_t count = std::min({int64_t(s.w.count) - p.w, room, end - i});
    runs.push_back({p, count, i - begin});
    i += count;
  }
}

// to[0..n) = x_row[offset + i*step], zero outside [0, size); elements of the row are `apart`.
template <class acc_t, class T>
PYOPS_INLINE void gather_run(acc_t* to, const T* row, int64_t offset, int64_t step, int64_t size, int64_t n,
                             int64_t apart = 1) {
  using V = Vec<acc_t>;
  const auto reach = [&](int64_t bound) { return offset >= bound ? 0 : ceil_div(bound - offset, step); };
  const int64_t low = std::min(reach(0), n), high = std::clamp<int64_t>(reach(size), low, n);
  for (int64_t i = 0; i < low; ++i) to[i] = acc_t(0);
  for (int64_t i = high; i < n; ++i) to[i] = acc_t(0);
  if (step == 1 && apart == 1)
    return each_vector<acc_t>(
        high - low, [&](int64_t i, auto lanes) { V::load(row + offset + low + i, lanes).store(to + low + i, lanes); });
  int64_t i = low;
  if (step == 2 && apart == 1)
    for (V v[2]; i + V::width <= high && offset + 2 * (i + V::width) <= size; i += V::width) {
      deinterleave(row + offset + 2 * i, v);
      v[0].store(to + i);
    }
  for (; i < high; ++i) to[i] = acc_t(row[(offset + i * step) * apart]);
}

// Row of the image that run `r` reads through tap (jd, jh), in elements from the start of its plane; -1 outside.
inline int64_t row_of(const Space& s, const Run& r, int32_t jd, int32_t jh) {
  const int32_t d = s.d.input(r.first.d, jd), h = s.h.input(r.first.h, jh);
  return d < 0 || d >= s.d.size || h < 0 || h >= s.h.size ? -1 : (int64_t(d) * s.h.size + h) * s.w.size;
}

// Do the rows [(g, m)][(c, tap)] stand in w itself? So it is in the forward of float.
template <class scalar_t>
bool stands_in_rows(const Problem& p) {
  return std::is_same_v<scalar_t, accumulate_t<scalar_t>> && p.at.tap == 1 && p.at.c == p.space.taps() &&
         p.at.m == p.K();
}

// Weights of all groups as rows [(g, m)][(c, tap)] of acc_t: w itself where they stand so, else a copy in buffer.
template <class scalar_t, class acc_t>
const acc_t* weight_rows(const Problem& p, const scalar_t* w, Buffer<acc_t>& buffer, int64_t first_m, int64_t count_m) {
  if constexpr (std::is_same_v<scalar_t, acc_t>)
    if (stands_in_rows<scalar_t>(p)) return w;
  const int64_t T = p.space.taps(), near = 16;
  std::vector<int64_t> tap(static_cast<size_t>(T));
  for (int64_t j = 0; j < T; ++j) tap[size_t(j)] = p.tap(j) * p.at.tap;
  parallel_for(p.G * count_m, ceil_div(4096, std::max<int64_t>(p.K(), 1)), [&](int64_t begin, int64_t end) {
    // a few c of all rows at a time: where rows of the buffer are columns of w, what is read stays in a cache line
    for (int64_t c0 = 0; c0 < p.C; c0 += near)
      for (int64_t i = begin; i < end; ++i) {
        const scalar_t* from = w + i / count_m * p.at.g + (first_m + i % count_m) * p.at.m;
        acc_t* to = buffer.get() + i * p.K();
        for (int64_t c = c0; c < std::min(c0 + near, p.C); ++c)
          for (int64_t j = 0; j < T; ++j) to[c * T + j] = acc_t(from[c * p.at.c + tap[size_t(j)]]);
      }
  });
  return buffer.get();
}

// Rows that are columns of w, as in the gradient in the input, packed into panels without a copy of w: their sums run
// over (tap of w, c).
inline bool may_turn(const Problem& p) {
  const int64_t T = p.space.taps();
  return p.at.m == T && (T == 1 || p.C % chunk == 0);
}
template <class scalar_t, class acc_t>
void pack_turned(const Problem& p, const scalar_t* w, int64_t rows, int64_t count, acc_t* panel) {
  const int64_t T = p.space.taps();
  if (T == 1) return pack_a_columns(panel, rows, w, p.at.c, count, p.C);
  for (int64_t c = 0; c < p.C; c += chunk)
    for (int64_t r = 0; r < count; ++r) {
      const scalar_t* from = w + c * p.at.c + r * T;
      if (c + chunk < p.C)
        for (int64_t i = 0; i < chunk; ++i) __builtin_prefetch(from + (chunk + i) * p.at.c);
      transpose<acc_t>(panel + c * rows + r * chunk, p.C * rows, from, p.at.c, chunk, T, chunk);
    }
}

template <class scalar_t>
void planes(const Problem& p, const scalar_t* x, const scalar_t* w, const Epilogue<scalar_t>& epilogue, scalar_t* y) {
  using acc_t = accumulate_t<scalar_t>;
  constexpr int64_t R = Tile<acc_t>::rows, L = Tile<acc_t>::columns;
  const Space& s = p.space;
  const int64_t K = p.K(), T = s.taps(), pixels = p.N * s.positions();
  const int64_t in_plane = s.in_plane(), out_plane = s.out_plane();
  // Rows of w that do not stand so are copied, a portion of m at a time.
  const bool in_place = stands_in_rows<scalar_t>(p);
  const int64_t fits = std::max<int64_t>(weight_bytes / int64_t(sizeof(acc_t)) / std::max<int64_t>(K * p.G, 1), R);
  const int64_t portion = in_place ? p.M : std::min(p.M, fits);
  Buffer<acc_t> arranged(in_place ? 0 : p.G * portion * K);

  const int64_t width = std::max<int64_t>(block_bytes / int64_t(sizeof(acc_t)) / std::max<int64_t>(K, 1) / L, 1) * L;
  const int64_t blocks = ceil_div(pixels, std::min<int64_t>(width, ceil_div(pixels, L) * L));
  const int64_t block = ceil_div(ceil_div(pixels, blocks), L) * L;
  for (int64_t m0 = 0; m0 < p.M; m0 += portion) {
    const int64_t M = std::min(portion, p.M - m0);
    const acc_t* rows = weight_rows(p, w, arranged, m0, M);
    // With few blocks the rows are split as well; what one thread packs another may pack again.
    const int64_t wanted = 4 * thread_count(), tasks = p.G * ceil_div(pixels, block);
    const int64_t splits = thread_count() == 1 || p.G * M * K * pixels < (1 << 20)
                               ? 1
                               : std::clamp<int64_t>(ceil_div(wanted, tasks), 1, ceil_div(M, R));
    const int64_t share = ceil_div(ceil_div(M, splits), R) * R;
    parallel_for(tasks * splits, task_grain(K * share * block), [&](int64_t begin, int64_t end) {
      Buffer<acc_t> a(Tile<acc_t>::packed_a(R, K)), b(block * K);
      alignas(64) acc_t tile[R * L];
      std::vector<Run> runs;
      std::vector<int64_t> row;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t g = task / splits % p.G, first = task / splits / p.G * block, part = task % splits;
        const int64_t last = std::min(first + block, pixels);
        runs_of(s, first, last, L, runs);
        row.resize(runs.size());
        if ((last - first) % L != 0)
          std::memset(b.get() + (last - first) / L * L * K, 0, size_t(L * K) * sizeof(acc_t));
        for (int64_t j = 0; j < T; ++j) {
          const int32_t jw = int32_t(j % s.w.taps), jh = int32_t(j / s.w.taps % s.h.taps);
          const int32_t jd = int32_t(j / s.w.taps / s.h.taps);
          for (size_t i = 0; i < runs.size(); ++i) row[i] = row_of(s, runs[i], jd, jh);
          for (int64_t c = 0; c < p.C; ++c) {
            const scalar_t* plane = x + (g * p.C + c) * in_plane;
            acc_t* to = b.get() + (c * T + j) * L;
            for (size_t i = 0; i < runs.size(); ++i) {
              const Run& r = runs[i];
              acc_t* lane = to + r.at / L * L * K + r.at % L;
              if (row[i] < 0)
                std::fill_n(lane, r.count, acc_t(0));
              else
                gather_run(lane, plane + r.first.n * p.G * p.C * in_plane + row[i], s.w.input(r.first.w, jw),
                           int64_t(s.w.in_step), int64_t(s.w.size), r.count);
            }
          }
        }
        const int64_t m_end = std::min((part + 1) * share, M);
        for (int64_t m = part * share; m < m_end; m += R) {
          const int64_t count = std::min(R, m_end - m), padded = Tile<acc_t>::round(count);
          for (int64_t i = 0; i < count; ++i) pack_a_run(a.get(), padded, i, 0, rows + (g * M + m + i) * K, K);
          size_t i = 0;
          for (int64_t q = 0; q < last - first; q += L) {
            tile_product(padded, std::min(L, last - first - q), K, a.get(), b.get() + q * K, tile);
            const size_t next = size_t(
                std::find_if(runs.begin() + int64_t(i), runs.end(), [&](const Run& r) { return r.at >= q + L; }) -
                runs.begin());
            const int64_t k0 = g * p.M + m0 + m;
            epilogue.store_planes(tile, count, k0, out_plane, y, [&](auto&& piece) {
              for (size_t j = i; j < next; ++j) {
                const Run& r = runs[j];
                const int64_t at = (r.first.n * p.G * p.M + k0) * out_plane + out_offset(s, r.first);
                piece(r.at - q, r.count, at, int64_t(s.w.out_step));
              }
            });
            i = next;
          }
        }
      }
    });
  }
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY::conv_gemm
