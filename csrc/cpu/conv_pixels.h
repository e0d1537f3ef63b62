// Convolution of pixels (channels last): lanes over output channels, rows of a tile over pixels.
//
//   Y[pixel, k] = Col[pixel, (tap,c)] * W^T[(tap,c), k]
//
// Three ways to bring the operands together:
//
//   many pixels    weights are packed once; each panel of pixels is packed, and meets all of them
//   few pixels     all pixels are packed; each panel of weights is packed, and meets all of them while it is in the cache
//   few channels   planes of the image are copied, padding and all (conv_planes.h): what neighbouring pixels read through
//                  one tap stands together, and no pixel is packed
#pragma once

#include "cpu/conv_planes.h"

namespace pyops::PYOPS_CPU_CAPABILITY::conv_pixels {

using conv::Axis;
using conv::Space;
using conv_gemm::Pixel;
using conv_gemm::Problem;

// Weights of up to Tile::columns output channels at w for tap j of the problem, as [c][lanes].
template <class scalar_t, class acc_t>
void weight_panel(const Problem& p, const scalar_t* w, int64_t j, int64_t lanes, acc_t* to) {
  constexpr int64_t L = Tile<acc_t>::columns;
  const scalar_t* from = w + p.tap(j) * p.at.tap;
  if (lanes < L) std::memset(to, 0, size_t(p.C * L) * sizeof(acc_t));
  if (p.at.m == 1) {
    for (int64_t c = 0; c < p.C; ++c)
      each_vector<acc_t>(lanes, [&](int64_t l, auto which) {
        Vec<acc_t>::load(from + c * p.at.c + l, which).store(to + c * L + l, which);
      });
    return;
  }
  if (p.at.c == 1) return pack_columns(to, L, from, p.at.m, lanes, p.C);
  // eight channels of every lane at a time: reads stay in a cache line, and so do writes
  for (int64_t c0 = 0; c0 < p.C; c0 += 8)
    for (int64_t l = 0; l < lanes; ++l)
      for (int64_t c = c0; c < std::min(c0 + 8, p.C); ++c) to[c * L + l] = acc_t(from[l * p.at.m + c * p.at.c]);
}

// Do all taps of a position lie inside?
inline bool is_inside(const Axis& a, int32_t o) {
  const int64_t first = a.input(o, 0), last = a.input(o, a.taps - 1);
  return std::min(first, last) >= 0 && std::max(first, last) < a.size;
}

// Up to R pixels next to each other: where their sums go, and where their taps stand in the image, -1 outside.
template <class scalar_t>
struct Rows {
  using acc_t = accumulate_t<scalar_t>;
  static constexpr int64_t R = Tile<acc_t>::rows;

  int64_t count = 0, to[R];
  const scalar_t* image[R];
  bool inside[R];
  Buffer<int64_t> at;

  explicit Rows(const Problem& p) : at(R * p.space.taps()), p_(p), shift_(static_cast<size_t>(p.space.taps())) {
    const Space& s = p.space;
    for (int64_t j = 0; j < s.taps(); ++j) {
      const int64_t jw = j % s.w.taps, jh = j / s.w.taps % s.h.taps, jd = j / s.w.taps / s.h.taps;
      shift_[size_t(j)] = (jd * s.d.tap_step * s.h.size + jh * s.h.tap_step) * s.w.size + jw * s.w.tap_step;
    }
  }
  int64_t padded() const { return Tile<acc_t>::round(count); }

  void find(const scalar_t* x, int64_t first, int64_t pixels) {
    const Space& s = p_.space;
    const int64_t T = s.taps();
    count = std::min(R, pixels - first);
    Pixel pixel = conv_gemm::pixel_at(s, first);
    for (int64_t i = 0; i < count; ++i, conv_gemm::next(s, pixel)) {
      to[i] = (pixel.n * s.out_plane() + conv_gemm::out_offset(s, pixel)) * p_.G * p_.M;
      image[i] = x + pixel.n * s.in_plane() * p_.G * p_.C;
      inside[i] = T > 0 && is_inside(s.d, pixel.d) && is_inside(s.h, pixel.h) && is_inside(s.w, pixel.w);
      int64_t* offset = at.get() + i * T;
      if (inside[i]) {
        const int64_t origin = s.input(s.d.input(pixel.d, 0), s.h.input(pixel.h, 0), s.w.input(pixel.w, 0));
        for (int64_t j = 0; j < T; ++j) offset[j] = origin + shift_[size_t(j)];
        continue;
      }
      for (int32_t jd = 0; jd < s.d.taps; ++jd)
        for (int32_t jh = 0; jh < s.h.taps; ++jh) {
          const int64_t d = s.d.input(pixel.d, jd), h = s.h.input(pixel.h, jh);
          const bool row = d >= 0 && d < s.d.size && h >= 0 && h < s.h.size;
          for (int32_t jw = 0; jw < s.w.taps; ++jw) {
            const int64_t v = s.w.input(pixel.w, jw);
            *offset++ = row && v >= 0 && v < s.w.size ? (d * s.h.size + h) * s.w.size + v : -1;
          }
        }
    }
  }
  // A panel of A, of group g.
  void pack(int64_t g, acc_t* panel) const {
    for (int64_t i = 0; i < count; ++i) pack_pixel(g, i, panel);
  }

 private:
  // Where the taps of a row and their channels stand together in memory they are one run.
  void pack_pixel(int64_t g, int64_t i, acc_t* panel) const {
    const int64_t S = p_.space.w.taps, T = p_.space.taps(), pitch = p_.G * p_.C, rows = padded();
    const int64_t* offset = at.get() + i * T;
    const scalar_t* from = image[i] + g * p_.C;
    const bool together = p_.G == 1 && p_.space.w.tap_step == 1;
    for (int64_t j = 0; j < T;) {
      int64_t run = inside[i] && together ? S : 1;
      if (!inside[i] && (together || offset[j] < 0))
        while (run < S - j % S && (offset[j + run] < 0) == (offset[j] < 0)) ++run;
      if (offset[j] < 0)
        pack_a_strided(panel, rows, i, j * p_.C, static_cast<const scalar_t*>(nullptr), 0, run * p_.C);
      else
        pack_a_run(panel, rows, i, j * p_.C, from + offset[j] * pitch, run * p_.C);
      j += run;
    }
  }

  const Problem& p_;
  std::vector<int64_t> shift_;  // of a tap from the first one, where both are inside
};

template <class scalar_t>
class Convolution {
 public:
  using acc_t = accumulate_t<scalar_t>;

  Convolution(const Problem& p, const scalar_t* x, const scalar_t* w, const Epilogue<scalar_t>& epilogue, scalar_t* y)
      : p_(p), x_(x), w_(w), epilogue_(epilogue), y_(y), K_(p.K()), pixels_(p.N * p.space.positions()) {}

  void operator()() const {
    if (suits_planes())
      few_channels();
    else if (suits_few_pixels())
      few_pixels();
    else
      many_pixels();
  }

 private:
  static constexpr int64_t R = Tile<acc_t>::rows, L = Tile<acc_t>::columns, size = sizeof(acc_t);

  int64_t blocks() const { return ceil_div(pixels_, R); }
  int64_t pixel_panel() const { return Tile<acc_t>::packed_a(R, K_); }
  int64_t weight_panels() const { return ceil_div(p_.M, L); }

  // The sums of `used` output channels from m of group g on, for the pixels of `rows`.
  void multiply(const Rows<scalar_t>& rows, const acc_t* a, const acc_t* b, int64_t g, int64_t m, int64_t used) const {
    alignas(64) acc_t tile[R * L];
    const int64_t k = g * p_.M + m;
    tile_product(rows.padded(), used, K_, a, b, tile);
    epilogue_.store_pixels(tile, rows.count, k, y_, [&](auto&& piece) {
      for (int64_t i = 0; i < rows.count; ++i) piece(i, used, rows.to[i] + k);
    });
  }

  // ---- many pixels

  void many_pixels() const {
    const int64_t T = p_.space.taps(), fits = conv_gemm::weight_bytes / size / std::max<int64_t>(K_, 1) / L;
    // Panels of a portion of the output channels, of as many groups as fit.
    const int64_t portion = std::min(weight_panels(), std::max<int64_t>(fits, 1)) * L;
    const int64_t groups = std::clamp<int64_t>(fits * L / portion, 1, p_.G);
    Buffer<acc_t> weights(groups * portion * K_);
    for (int64_t g0 = 0; g0 < p_.G; g0 += groups)
      for (int64_t m0 = 0; m0 < p_.M; m0 += portion) {
        const int64_t M = std::min(portion, p_.M - m0), G = std::min(groups, p_.G - g0), panels = ceil_div(M, L);
        parallel_for(G * panels * T, ceil_div(1 << 14, p_.C * L), [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            const int64_t j = i % T, m = i / T % panels * L, g = i / T / panels;
            weight_panel(p_, w_ + (g0 + g) * p_.at.g + (m0 + m) * p_.at.m, j, std::min(L, M - m),
                         weights.get() + (g * portion + m) * K_ + j * p_.C * L);
          }
        });
        parallel_for(blocks(), conv_gemm::task_grain(K_ * M * G * R), [&](int64_t begin, int64_t end) {
          Buffer<acc_t> a(pixel_panel());
          Rows<scalar_t> rows(p_);
          for (int64_t block = begin; block < end; ++block) {
            rows.find(x_, block * R, pixels_);
            for (int64_t g = 0; g < G; ++g) {
              rows.pack(g0 + g, a.get());
              for (int64_t m = 0; m < M; m += L)
                multiply(rows, a.get(), weights.get() + (g * portion + m) * K_, g0 + g, m0 + m, std::min(L, M - m));
            }
          }
        });
      }
  }

  // ---- few pixels

  // Where many pixels would read weights from memory again and again. 512 channels of 7 x 7, one thread with AVX-512:
  // 2.0 in place of 3.6 ms.
  bool suits_few_pixels() const {
    const int64_t weights = p_.G * p_.M * K_ * size, images = blocks() * p_.G * pixel_panel() * size;
    const int64_t panel = K_ * L * size, taken = images + std::min(thread_count(), p_.G * weight_panels()) * panel;
    return blocks() <= 8 && weights > 2 * conv_gemm::block_bytes && panel <= 2 * conv_gemm::block_bytes &&
           taken <= std::min(weights, conv_gemm::weight_bytes) + thread_count() * conv_gemm::block_bytes;
  }
  void few_pixels() const {
    const int64_t T = p_.space.taps();
    Buffer<acc_t> images(blocks() * p_.G * pixel_panel());
    parallel_for(blocks(), conv_gemm::task_grain(R * K_ * p_.G), [&](int64_t begin, int64_t end) {
      Rows<scalar_t> rows(p_);
      for (int64_t block = begin; block < end; ++block) {
        rows.find(x_, block * R, pixels_);
        for (int64_t g = 0; g < p_.G; ++g) rows.pack(g, images.get() + (block * p_.G + g) * pixel_panel());
      }
    });
    parallel_for(p_.G * weight_panels(), conv_gemm::task_grain(K_ * L * pixels_), [&](int64_t begin, int64_t end) {
      Buffer<acc_t> weights(K_ * L);
      Rows<scalar_t> rows(p_);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t g = task / weight_panels(), m = task % weight_panels() * L, used = std::min(L, p_.M - m);
        for (int64_t j = 0; j < T; ++j)
          weight_panel(p_, w_ + g * p_.at.g + m * p_.at.m, j, used, weights.get() + j * p_.C * L);
        for (int64_t block = 0; block < blocks(); ++block) {
          rows.find(x_, block * R, pixels_);
          multiply(rows, images.get() + (block * p_.G + g) * pixel_panel(), weights.get(), g, m, used);
        }
      }
    });
  }

  // ---- few channels

  conv_planes::Plan plan() const {
    const int64_t share = thread_count() == 1 ? 1 : 4;  // more blocks than threads
    return {p_, conv_gemm::block_bytes / size / 2 / share, R, false};
  }
  // From eight channels on the runs that pixels are packed from are long enough.
  bool suits_planes() const {
    if (p_.G != 1 || p_.C == 0 || p_.C > 4 || p_.space.taps() == 1 || K_ == 0) return false;
    const conv_planes::Plan copies = plan();
    return p_.M * K_ * size <= conv_gemm::block_bytes && p_.N * copies.all_lanes(R) * 4 <= ceil_div(pixels_, R) * R * 5;
  }
  void few_channels() const {
    const Space& s = p_.space;
    const conv_planes::Plan copies = plan();
    const int64_t T = s.taps(), padded = weight_panels() * L;
    std::vector<int32_t> offsets(static_cast<size_t>(K_));
    for (int64_t j = 0; j < T; ++j)
      for (int64_t c = 0; c < p_.C; ++c)
        offsets[size_t(j * p_.C + c)] = int32_t(c * copies.channel_cells + copies.offset(s, j));
    Buffer<acc_t> weights(padded * K_);
    for (int64_t m = 0; m < p_.M; m += L)
      for (int64_t j = 0; j < T; ++j)
        weight_panel(p_, w_ + m * p_.at.m, j, std::min(L, p_.M - m), weights.get() + m * K_ + j * p_.C * L);
    const int64_t work = copies.lanes(copies.rows, copies.width) * K_ * p_.M;
    parallel_for(p_.N * copies.blocks(), conv_gemm::task_grain(work), [&](int64_t begin, int64_t end) {
      Buffer<acc_t> image(copies.cells + R, acc_t(0));
      alignas(64) acc_t tile[R * L];
      for (int64_t task = begin; task < end; ++task) {
        const int64_t n = task / copies.blocks();
        const auto [d0, h0, w0, height, width, lanes] = copies.block(task % copies.blocks());
        copies.copy(x_ + n * s.in_plane() * p_.C, p_.C, d0, h0, w0, image.get(), p_.C);
        for (int64_t q = 0; q < lanes; q += R) {
          const int64_t count = std::min(R, lanes - q);
          int64_t to[R];  // -1: between the rows
          for (int64_t i = 0, row = q / copies.pitch, column = q % copies.pitch; i < count; ++i, ++column) {
            if (column == copies.pitch) ++row, column = 0;
            const Pixel pixel{n, int32_t(d0), int32_t(h0 + row), int32_t(w0 + column)};
            to[i] = column < width ? (n * s.out_plane() + conv_gemm::out_offset(s, pixel)) * p_.M : -1;
          }
          for (int64_t m = 0; m < p_.M; m += L) {
            const int64_t used = std::min(L, p_.M - m);
            tile_product(Tile<acc_t>::round(count), used, K_, OffsetColumns<acc_t>{image.get() + q, offsets.data()},
                         PackedRows<acc_t>{weights.get() + m * K_}, tile);
            epilogue_.store_pixels(tile, count, m, y_, [&](auto&& piece) {
              for (int64_t i = 0; i < count; ++i)
                if (to[i] >= 0) piece(i, used, to[i] + m);
            });
          }
        }
      }
    });
  }

  const Problem& p_;
  const scalar_t *x_, *w_;
  const Epilogue<scalar_t>& epilogue_;
  scalar_t* y_;
  const int64_t K_, pixels_;
};

}  // namespace pyops::PYOPS_CPU_CAPABILITY::conv_pixels
