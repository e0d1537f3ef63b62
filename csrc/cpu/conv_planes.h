// Convolution of planes without columns: a panel of pixels reads the image itself, shifted by the tap.
//
// Rows of a block of the image are copied side by side, padding and all, as wide as the taps reach. Then what
// neighbouring pixels read through one tap stands together, at an offset that is the same for all panels:
//
//   Y[k, q] = sum over (c, tap) of W[k, (c,tap)] * copy[offset(c,tap) + q],     q = row * pitch + column
//
// An element is copied once where im2col copies it once per tap. The price is the pixels q between the rows, computed
// and dropped. With stride s a copy holds the s residues ("phases") of the position one after the other. A 1 x 1
// filter with few output channels reads the image where it stands; with many, columns are packed (conv_gemm.h).
#pragma once

#include <cstdlib>

#include "cpu/conv_gemm.h"

namespace pyops::PYOPS_CPU_CAPABILITY::conv_planes {

using conv::Axis;
using conv::Space;
using conv_gemm::Problem;

// Along one axis position o reads through tap j the cell o + shift(j) of phase(j); cell e of phase p is element
// low + e * step + p of the image.
struct CopyAxis {
  int64_t count, size, step, tap_step, least, low, phases, halo;

  explicit CopyAxis(const Axis& a) : count(a.count), size(a.size), step(a.in_step), tap_step(a.tap_step) {
    const int64_t reach = int64_t(a.taps - 1) * a.tap_step, span = std::abs(reach);
    least = std::min<int64_t>(reach, 0);
    low = a.in_base + least;
    phases = std::min(step, span + 1);
    halo = span / step;
  }
  int64_t phase(int64_t j) const { return (j * tap_step - least) % step; }
  int64_t shift(int64_t j) const { return (j * tap_step - least) / step; }
  bool in_place() const { return step == 1 && halo == 0 && low == 0 && count == size; }
};

inline bool writes_in_order(const Axis& a) { return a.out_step == 1 && a.out_base == 0 && a.out_size == a.count; }

// How the output positions of one example are cut into blocks, and where a block's copies stand.
struct Plan {
  CopyAxis d, h, w;
  bool in_place;        // the image is its own copy, all positions are one row
  int64_t rows, width;  // of a block
  int64_t row_blocks, width_blocks;
  int64_t pitch, cells, phase_cells, channel_cells;

  // room: elements of all copies that fit the cache. L: lanes of a panel.
  Plan(const Problem& p, int64_t room, int64_t L, bool may_stay) : d(p.space.d), h(p.space.h), w(p.space.w) {
    const Space& s = p.space;
    in_place = may_stay && d.in_place() && h.in_place() && w.in_place() && writes_in_order(s.d) &&
               writes_in_order(s.h) && writes_in_order(s.w);
    const int64_t each = room / std::max<int64_t>(p.C * phases(), 1);
    if (in_place) {
      w.count = w.size = s.positions();
      h.count = d.count = 1;
      rows = 1;
      width = std::clamp<int64_t>(each / L * L, L, ceil_div(w.count, L) * L);
      width = ceil_div(ceil_div(w.count, ceil_div(w.count, width)), L) * L;
    } else {
      const int64_t deep = 1 + d.halo;
      rows = std::min(h.count, each / deep / (w.count + w.halo) - h.halo);
      width = w.count;
      if (rows < 1) {
        rows = 1;
        width = std::clamp<int64_t>((each / deep / (1 + h.halo) - w.halo) / L * L, std::min(L, w.count), w.count);
      }
      rows = ceil_div(h.count, ceil_div(h.count, rows));
    }
    row_blocks = ceil_div(h.count, rows);
    width_blocks = ceil_div(w.count, width);
    pitch = width + w.halo;
    phase_cells = (1 + d.halo) * (rows + h.halo) * pitch;
    channel_cells = phases() * phase_cells;
    cells = p.C * channel_cells;
  }
  int64_t phases() const { return d.phases * h.phases * w.phases; }
  int64_t blocks() const { return d.count * row_blocks * width_blocks; }
  int64_t lanes(int64_t block_rows, int64_t block_width) const { return (block_rows - 1) * pitch + block_width; }
  // Lanes that one example takes, those between the rows included.
  int64_t all_lanes(int64_t L) const { return blocks() * ceil_div(lanes(rows, width), L) * L; }

  // Block i of an example begins at position (d, h, w).
  struct Block {
    int64_t d, h, w, height, width, lanes;
  };
  Block block(int64_t i) const {
    const int64_t w0 = i % width_blocks * width, h0 = i / width_blocks % row_blocks * rows;
    const int64_t high = std::min(rows, h.count - h0), wide = std::min(width, w.count - w0);
    return {i / width_blocks / row_blocks, h0, w0, high, wide, lanes(high, wide)};
  }

  int64_t offset(const Space& s, int64_t j) const {
    const int64_t jw = j % s.w.taps, jh = j / s.w.taps % s.h.taps, jd = j / s.w.taps / s.h.taps;
    const int64_t phase = (d.phase(jd) * h.phases + h.phase(jh)) * w.phases + w.phase(jw);
    return phase * phase_cells + (d.shift(jd) * (rows + h.halo) + h.shift(jh)) * pitch + w.shift(jw);
  }

  // Copies of the C planes at x, for the block that begins at position (d0, h0, w0); channels last: of the first C
  // channels of pixels that are `apart`.
  template <class acc_t, class scalar_t>
  void copy(const scalar_t* x, int64_t C, int64_t d0, int64_t h0, int64_t w0, acc_t* to, int64_t apart = 1) const {
    for (int64_t c = 0; c < C; ++c, x += apart > 1 ? 1 : d.size * h.size * w.size)
      for (int64_t pd = 0; pd < d.phases; ++pd)
        for (int64_t ph = 0; ph < h.phases; ++ph)
          for (int64_t pw = 0; pw < w.phases; ++pw)
            for (int64_t ed = 0; ed <= d.halo; ++ed) {
              const int64_t z = d.low + (d0 + ed) * d.step + pd;
              for (int64_t eh = 0; eh < rows + h.halo; ++eh, to += pitch) {
                const int64_t y = h.low + (h0 + eh) * h.step + ph;
                if (z < 0 || z >= d.size || y < 0 || y >= h.size)
                  std::fill_n(to, pitch, acc_t(0));
                else
                  conv_gemm::gather_run(to, x + (z * h.size + y) * w.size * apart, w.low + w0 * w.step + pw, w.step,
                                        w.size, pitch, apart);
              }
            }
  }
};

// Is this better than packing columns? The pixels between the rows must cost less than the packing.
template <class scalar_t>
bool fits(const Problem& p) {
  using acc_t = accumulate_t<scalar_t>;
  constexpr int64_t L = Tile<acc_t>::columns;
  if (p.space.taps() == 0 || p.C == 0) return false;
  const Plan plan(p, conv_gemm::block_bytes / int64_t(sizeof(acc_t)), L, std::is_same_v<scalar_t, acc_t>);
  // Rows of the image lie pages apart: read for the fifth time, a packed copy of them has paid. With AVX2, 64 channels
  // of 112 x 112 to 64: 5.3 in place of 8.6 ms; 256 of 56 x 56 to 16: the same either way.
  if (plan.in_place && p.M >= 5 * Tile<acc_t>::rows) return false;
  const bool addressed = (plan.in_place ? p.C * p.space.in_plane() : plan.cells) < (int64_t(1) << 30);
  const bool weights =
      conv_gemm::stands_in_rows<scalar_t>(p) || p.G * p.M * p.K() * int64_t(sizeof(acc_t)) <= conv_gemm::weight_bytes;
  return addressed && weights && p.N * plan.all_lanes(L) * 4 <= ceil_div(p.N * p.space.positions(), L) * L * 5;
}

template <class scalar_t>
void product(const Problem& p, const scalar_t* x, const scalar_t* w, const Epilogue<scalar_t>& epilogue, scalar_t* y) {
  using acc_t = accumulate_t<scalar_t>;
  constexpr int64_t R = Tile<acc_t>::rows, L = Tile<acc_t>::columns;
  constexpr bool may_stay = std::is_same_v<scalar_t, acc_t>;
  const Space& s = p.space;
  const int64_t K = p.K(), T = s.taps(), in_plane = s.in_plane(), out_plane = s.out_plane();
  const Plan plan(p, conv_gemm::block_bytes / int64_t(sizeof(acc_t)), L, may_stay);
  // Each block of the image takes panels from w itself, or from a copy, which pays from the fifth block on.
  const bool in_rows = conv_gemm::stands_in_rows<scalar_t>(p);
  const bool turned = !in_rows && p.N * plan.blocks() <= 4 && conv_gemm::may_turn(p);
  std::vector<int32_t> offsets(static_cast<size_t>(K));
  for (int64_t c = 0; c < p.C; ++c)
    for (int64_t j = 0; j < T; ++j)
      offsets[size_t(turned ? p.tap(j) * p.C + c : c * T + j)] =
          int32_t(plan.in_place ? c * in_plane : c * plan.channel_cells + plan.offset(s, j));

  Buffer<acc_t> arranged(in_rows || turned ? 0 : p.G * p.M * K);
  const acc_t* rows = turned ? nullptr : conv_gemm::weight_rows(p, w, arranged, 0, p.M);
  const int64_t tasks = p.N * p.G * plan.blocks(), work = plan.lanes(plan.rows, plan.width) * K;
  // With few blocks the output channels are split as well; what one thread copies another may copy again.
  const int64_t splits = thread_count() == 1 || tasks * work * p.M < (1 << 20)
                             ? 1
                             : std::clamp<int64_t>(ceil_div(4 * thread_count(), tasks), 1, ceil_div(p.M, R));
  const int64_t share = ceil_div(ceil_div(p.M, splits), R) * R;
  parallel_for(tasks * splits, conv_gemm::task_grain(work * share), [&](int64_t begin, int64_t end) {
    Buffer<acc_t> a(Tile<acc_t>::packed_a(R, K)), copies(plan.in_place ? L * K : plan.cells + L);
    if (!plan.in_place) std::fill_n(copies.get() + plan.cells, L, acc_t(0));
    alignas(64) acc_t tile[R * L];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task % splits;
      const int64_t g = task / splits / plan.blocks() % p.G, n = task / splits / plan.blocks() / p.G;
      const auto [d0, h0, w0, height, width, lanes] = plan.block(task / splits % plan.blocks());
      const scalar_t* image = x + (n * p.G + g) * p.C * in_plane;
      if (plan.in_place) {
        // a panel that ends behind the row is the only one that is copied: it may end behind the tensor
        if (const int64_t tail = lanes % L; tail != 0)
          for (int64_t c = 0; c < p.C; ++c) {
            const scalar_t* from = image + c * in_plane + w0 + lanes - tail;
            for (int64_t i = 0; i < L; ++i) copies[c * L + i] = i < tail ? acc_t(from[i]) : acc_t(0);
          }
      } else {
        plan.copy(image, p.C, d0, h0, w0, copies.get());
      }
      const int64_t m_begin = part * share, wanted = std::min(share, p.M - m_begin);
      for (int64_t i = 0; i < Tile<acc_t>::tiles(wanted); ++i) {
        const int64_t m = m_begin + Tile<acc_t>::begin(wanted, i);
        const int64_t count = m_begin + Tile<acc_t>::begin(wanted, i + 1) - m;
        const int64_t padded = Tile<acc_t>::round(count), k0 = g * p.M + m;
        if (turned)
          conv_gemm::pack_turned(p, w + g * p.at.g + m * p.at.m, padded, count, a.get());
        else
          for (int64_t r = 0; r < count; ++r) pack_a_run(a.get(), padded, r, 0, rows + (k0 + r) * K, K);
        for (int64_t q = 0; q < lanes; q += L) {
          const int64_t used = std::min(L, lanes - q);
          if (!plan.in_place)
            tile_product(padded, used, K, a.get(), OffsetRows<acc_t>{copies.get() + q, offsets.data()}, tile);
          else if (used < L)
            tile_product(padded, used, K, a.get(), copies.get(), tile);
          else if constexpr (may_stay)
            tile_product(padded, used, K, a.get(), OffsetRows<acc_t>{image + w0 + q, offsets.data()}, tile);
          epilogue.store_planes(tile, count, k0, out_plane, y, [&](auto&& piece) {
            for (int64_t at = q; at < q + used;) {
              const int64_t row = at / plan.pitch, column = at % plan.pitch;
              const int64_t next = std::min((row + 1) * plan.pitch, q + used);
              const int64_t run = std::min(width - column, q + used - at);
              if (run > 0) {
                const conv_gemm::Pixel pixel{n, int32_t(d0), int32_t(h0 + row), int32_t(w0 + column)};
                const int64_t to = plan.in_place ? w0 + at : conv_gemm::out_offset(s, pixel);
                piece(at - q, run, (n * p.G * p.M + k0) * out_plane + to, int64_t(s.w.out_step));
              }
              at = next;
            }
          });
        }
      }
    }
  });
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY::conv_planes
