// Gradient of a convolution in its weight as a product over pixels.
//
//   NCHW   dW^T[(c,tap), k] = Col[(c,tap), pixel] * dY^T[pixel, k]   lanes over output channels; what is turned is dY,
//                                                                    once for all taps; rows of Col are pieces of a
//                                                                    copy of the image with its margins
//                                                                    (conv_planes.h), or of the image itself
//   NHWC   dW[k, (tap,c)]   = dY^T[k, pixel] * Col[pixel, (tap,c)]   lanes over (tap,c), which are copied; dY is turned
//
// A task owns a block of the product, whose sums stay in cache, and a range of pixels, of which it packs a few at a time.
#pragma once

#include <optional>

#include "cpu/conv_planes.h"

namespace pyops::PYOPS_CPU_CAPABILITY::conv_weight {

using conv::Sizes;
using conv::Space;
using conv_gemm::Run;

// A tap and a channel, numbered as the layout numbers columns.
struct Column {
  int64_t c;
  int32_t jd, jh, jw;
};
inline Column column_at(const Space& s, int64_t C, bool last, int64_t ct) {
  const int64_t T = s.taps(), j = last ? ct / C : ct % T;
  return {last ? ct % C : ct / T, int32_t(j / s.w.taps / s.h.taps), int32_t(j / s.w.taps % s.h.taps),
          int32_t(j % s.w.taps)};
}

// Pixels packed at a time; rows and lanes of a block of sums, 1 MiB of float.
inline constexpr int64_t depth = 256, most_rows = 1008, most_lanes = 256;
// Panels of dY that are packed together, for they share cache lines.
inline constexpr int64_t together = 16;

template <class scalar_t>
class Gradient {
 public:
  using acc_t = accumulate_t<scalar_t>;

  Gradient(const Sizes& z, bool last, const scalar_t* dy, const scalar_t* x)
      : s_(conv::forward_space(z)), z_(z), last_(last), dy_(dy), x_(x) {
    const auto alone = [](const conv::Axis& a) {
      return a.taps == 1 && a.in_step == 1 && a.in_base == 0 && a.count == a.size;
    };
    pointwise_ = alone(s_.d) && alone(s_.h) && alone(s_.w);
    if (last || pointwise_ || CT() == 0 || pixels() == 0) return;
    // Blocks of rows small enough to be shared among tasks, if what lies between the rows costs less than packing taps:
    // 256 channels of 14 x 14 to 256, an eighth between them, 1.20 in place of 1.38 ms.
    const auto problem = conv_gemm::problem_of(z, s_, false, false);
    const int64_t room = std::min(conv_gemm::block_bytes / int64_t(sizeof(acc_t)), C() * 6 * depth);
    const conv_planes::Plan plan(problem, room, L, false);
    if (plan.blocks() * plan.lanes(plan.rows, plan.width) * 7 > s_.positions() * 8) return;
    plan_ = plan;
    for (int64_t j = 0; j < s_.taps(); ++j) offsets_.push_back(plan.offset(s_, j));
  }

  // dw of shape [K, C/G, taps], or [K, taps, C/G].
  void operator()(scalar_t* dw) const {
    if (z_.K * CT() == 0) return;
    if (pixels() == 0) {
      std::fill_n(dw, z_.K * CT(), scalar_t(0));
      return;
    }
    const int64_t rows = last_ ? M() : CT(), lanes = last_ ? CT() : M();
    // Few pixels leave room for more lanes, for which the rows need not be packed again.
    const int64_t most = std::max(most_lanes, most_lanes * depth / std::min(depth, pixels()) / L * L);
    const int64_t width = std::min({ceil_div(lanes, L) * L, most, 4 * most_lanes});
    const int64_t height = std::min(rows, most_rows * most_lanes / std::max(width, most_lanes));
    const int64_t down = ceil_div(rows, height), across = ceil_div(lanes, width), blocks = z_.G * down * across;
    // Ranges of pixels by shape alone, so that the sums do not depend on the number of threads.
    const int64_t copies = std::max<int64_t>((8 << 20) / int64_t(sizeof(acc_t)) / (z_.K * CT()), 1);
    const int64_t units = plan_ ? z_.N * plan_->blocks() : ceil_div(pixels(), depth), least = plan_ ? 1 : 4;
    const int64_t splits = std::clamp<int64_t>(8 / blocks, 1, std::clamp<int64_t>(ceil_div(units, least), 1, copies));
    const int64_t range = ceil_div(units, splits);
    Buffer<acc_t> partial(splits > 1 ? splits * z_.K * CT() : 0);
    parallel_for(
        blocks * splits, conv_gemm::task_grain(pixels() / splits * height * width), [&](int64_t begin, int64_t end) {
          Buffers buffers(height, width, plan_ ? plan_->cells : 0);
          for (int64_t task = begin; task < end; ++task) {
            const int64_t split = task % splits, at = task / splits;
            const Block b{at % z_.G, at / z_.G % down * height, at / z_.G / down * width, height, width, rows, lanes};
            const int64_t first = split * range, last = std::min((split + 1) * range, units);
            buffers.empty = true;
            if (first >= last)
              std::memset(buffers.sum.get(), 0, size_t(height * width) * sizeof(acc_t));
            else if (plan_)
              sum_copies(b, first, last, buffers);
            else
              sum(b, first * depth, std::min(last * depth, pixels()), buffers);
            if (splits > 1)
              store(b, buffers.sum.get(), partial.get() + split * z_.K * CT());
            else
              store(b, buffers.sum.get(), dw);
          }
        });
    if (splits == 1) return;
    parallel_for(z_.K, ceil_div(4096, CT()), [&](int64_t begin, int64_t end) {
      each_vector<acc_t>((end - begin) * CT(), [&](int64_t i, auto which) {
        V total;
        for (int64_t split = 0; split < splits; ++split)
          total += V::load(partial.get() + split * z_.K * CT() + begin * CT() + i, which);
        total.store(dw + begin * CT() + i, which);
      });
    });
  }

 private:
  using V = Vec<acc_t>;
  static constexpr int64_t R = Tile<acc_t>::rows, L = Tile<acc_t>::columns;
  static constexpr int64_t panel_a = Tile<acc_t>::packed_a(R, depth);

  // Rows from `row` and lanes from `lane` on, of one group's product.
  struct Block {
    int64_t g, row, lane, height, width, rows, lanes;
    int64_t used_rows() const { return std::min(height, rows - row); }
    int64_t used_lanes() const { return std::min(width, lanes - lane); }
  };
  struct Buffers {
    Buffer<acc_t> a, b, sum, line, copies;
    std::vector<Run> runs;
    bool empty = true;  // the sums say nothing yet
    Buffers(int64_t height, int64_t width, int64_t cells)
        : a(together * panel_a), b(depth * width), sum(height * width), line(depth), copies(cells) {}
  };

  int64_t M() const { return z_.K / z_.G; }
  int64_t C() const { return z_.C / z_.G; }
  int64_t CT() const { return C() * s_.taps(); }
  int64_t pixels() const { return z_.N * s_.positions(); }

  // The sums of a block over pixels [first, end), in blocks of `depth`.
  void sum(const Block& b, int64_t first, int64_t end, Buffers& to) const {
    for (; first < end; first += depth) {
      const int64_t n = std::min(depth, end - first);
      conv_gemm::runs_of(s_, first, first + n, depth, to.runs);
      if (last_)
        pack_image_columns(b, to.runs, to.b.get());
      else
        pack_dy_planes(b, first, n, to.b.get());
      for (int64_t m = 0; m < b.used_rows(); m += R) {
        const int64_t count = std::min(R, b.used_rows() - m), padded = Tile<acc_t>::round(count);
        acc_t* a = to.a.get() + (last_ ? m / R % together * panel_a : 0);
        if (!last_)
          pack_image_rows(b, m, count, padded, first, n, to, a);
        else if (m / R % together == 0)
          pack_dy_channels(b, m, first, n, a);
        multiply(b, m, count, padded, n, a, to);
      }
      to.empty = false;
    }
  }

  // Rows m to m + count of the block's sums += A B over n pixels, or = where they are empty.
  void multiply(const Block& b, int64_t m, int64_t count, int64_t padded, int64_t n, const acc_t* a,
                Buffers& to) const {
    alignas(64) acc_t tile[R * L];
    for (int64_t q = 0; q < b.used_lanes(); q += L) {
      acc_t* at = to.sum.get() + m * b.width + q;
      for (int64_t i = 0; i < count; ++i) {
        __builtin_prefetch(at + i * b.width, 1);
        __builtin_prefetch(at + i * b.width + L - 1, 1);
      }
      const int64_t used = std::min(L, b.used_lanes() - q);
      tile_product(padded, used, n, a, to.b.get() + q * depth, tile);
      for (int64_t i = 0; i < count; ++i)
        each_vector<acc_t>(used, [&](int64_t e, auto which) {
          acc_t* element = at + i * b.width + e;
          const V product = V::load(tile + i * L + e, which);
          (to.empty ? product : V::load(element, which) + product).store(element, which);
        });
    }
  }

  // ---- planes, rows of the image copied

  // The sums of a block over blocks [first, end) of the plan, all examples' one after the other. Pixels between the rows
  // of a copy count as well, with dy = 0.
  void sum_copies(const Block& b, int64_t first, int64_t end, Buffers& to) const {
    const conv_planes::Plan& plan = *plan_;
    const int64_t T = s_.taps(), c0 = b.row / T, channels = ceil_div(b.row + b.used_rows(), T) - c0;
    for (; first < end; ++first) {
      const int64_t example = first / plan.blocks();
      const auto [d0, h0, w0, height, width, lanes] = plan.block(first % plan.blocks());
      plan.copy(x_ + (example * z_.C + b.g * C() + c0) * s_.in_plane(), channels, d0, h0, w0, to.copies.get());
      const scalar_t* dy =
          dy_ + (example * z_.K + b.g * M() + b.lane) * s_.positions() + (d0 * plan.h.count + h0) * plan.w.count + w0;
      for (int64_t q = 0; q < lanes; q += depth) {
        const int64_t n = std::min(depth, lanes - q);
        pack_dy_rows(b, dy, width, q, n, to.b.get());
        for (int64_t m = 0; m < b.used_rows(); m += R) {
          const int64_t count = std::min(R, b.used_rows() - m), padded = Tile<acc_t>::round(count);
          for (int64_t i = 0; i < count; ++i) {
            const int64_t ct = b.row + m + i;
            pack_a_run(to.a.get(), padded, i, 0,
                       to.copies.get() + (ct / T - c0) * plan.channel_cells + offsets_[size_t(ct % T)] + q, n);
          }
          multiply(b, m, count, padded, n, to.a.get(), to);
        }
        to.empty = false;
      }
    }
  }
  // B[pixel][k] of pixels q to q + n of a copy with rows of `width`, the first of which is at dy in the plane of k = 0.
  void pack_dy_rows(const Block& b, const scalar_t* dy, int64_t width, int64_t q, int64_t n, acc_t* to) const {
    for (int64_t i = 0, count; i < n; i += count) {
      const int64_t row = (q + i) / plan_->pitch, column = (q + i) % plan_->pitch;
      count = std::min((column < width ? width : plan_->pitch) - column, n - i);
      for (int64_t l = 0; l < b.used_lanes(); l += L) {
        acc_t* at = to + l * depth + i * L;
        if (column < width)
          transpose<acc_t>(at, L, dy + l * s_.positions() + row * plan_->w.count + column, s_.positions(),
                           std::min(L, b.used_lanes() - l), count, L);
        else
          std::fill_n(at, count * L, acc_t(0));
      }
    }
  }

  // ---- planes

  // B[pixel][k]
  void pack_dy_planes(const Block& b, int64_t first, int64_t n, acc_t* to) const {
    const int64_t plane = s_.positions();
    for (int64_t i = 0, count; i < n; i += count) {
      const int64_t example = (first + i) / plane, at = (first + i) % plane;
      count = std::min(plane - at, n - i);
      for (int64_t q = 0; q < b.used_lanes(); q += L)
        transpose<acc_t>(to + q * depth + i * L, L, dy_ + (example * z_.K + b.g * M() + b.lane + q) * plane + at, plane,
                         std::min(L, b.used_lanes() - q), count, L);
    }
  }
  // A[(c,tap)][pixel]
  void pack_image_rows(const Block& b, int64_t m, int64_t count, int64_t padded, int64_t first, int64_t n,
                       Buffers& from, acc_t* to) const {
    acc_t* line = from.line.get();
    if (pointwise_) {
      const int64_t plane = s_.positions();
      for (int64_t at = 0, run; at < n; at += run) {
        const int64_t example = (first + at) / plane, pixel = (first + at) % plane;
        run = std::min(plane - pixel, n - at);
        for (int64_t i = 0; i < count; ++i)
          pack_a_run(to, padded, i, at, x_ + (example * z_.C + b.g * C() + b.row + m + i) * plane + pixel, run);
      }
      return;
    }
    const scalar_t* const none = nullptr;
    for (int64_t i = 0; i < count; ++i) {
      const Column column = column_at(s_, C(), false, b.row + m + i);
      for (const Run& r : from.runs) {
        const int64_t row = conv_gemm::row_of(s_, r, column.jd, column.jh), size = s_.w.size;
        const int64_t left = s_.w.input(r.first.w, column.jw);
        const scalar_t* at = x_ + (r.first.n * z_.C + b.g * C() + column.c) * s_.in_plane() + row;
        if (row < 0) {
          pack_a_strided(to, padded, i, r.at, none, 0, r.count);
        } else if (s_.w.in_step == 1) {
          const int64_t low = std::clamp<int64_t>(-left, 0, r.count), high = std::clamp(size - left, low, r.count);
          pack_a_strided(to, padded, i, r.at, none, 0, low);
          pack_a_run(to, padded, i, r.at + low, at + left + low, high - low);
          pack_a_strided(to, padded, i, r.at + high, none, 0, r.count - high);
        } else {
          conv_gemm::gather_run(line, at, left, s_.w.in_step, size, r.count);
          pack_a_run(to, padded, i, r.at, line, r.count);
        }
      }
    }
  }

  // ---- channels last

  // B[pixel][(tap,c)]: what stands together in memory and in a panel is one run: channels of a tap, or taps of a row with
  // their channels.
  void pack_image_columns(const Block& b, const std::vector<Run>& runs, acc_t* to) const {
    const bool together = z_.G == 1 && s_.w.tap_step == 1;
    for (int64_t q = 0, count; q < b.used_lanes(); q += count) {
      const Column column = column_at(s_, C(), true, b.lane + q);
      const int64_t taps = together ? s_.w.taps - column.jw : 1;
      count = std::min({taps * C() - column.c, b.used_lanes() - q, L - q % L});
      const int64_t last = (column.c + count - 1) / C();  // tap, from the first
      for (const Run& r : runs) {
        const int64_t row = conv_gemm::row_of(s_, r, column.jd, column.jh);
        const scalar_t* from = x_ + (r.first.n * s_.in_plane() + row) * z_.C + b.g * C();
        acc_t* line = to + q / L * L * depth + r.at * L + q % L;
        for (int64_t i = 0; i < r.count; ++i, line += L) {
          const int64_t w = s_.w.input(r.first.w + int32_t(i), column.jw), size = s_.w.size;
          if (row < 0 || w + last < 0 || w >= size) {
            std::fill_n(line, count, acc_t(0));
            continue;
          }
          // elements of the run from that of pixel w on; those outside the row are zero
          const int64_t low = w < 0 ? -w * C() - column.c : 0;
          const int64_t high = std::min(count, (size - w) * C() - column.c);
          const scalar_t* at = from + w * z_.C + column.c;
          if (low > 0) std::fill_n(line, low, acc_t(0));
          each_vector<acc_t>(high - low,
                             [&](int64_t e, auto which) { V::load(at + low + e, which).store(line + low + e, which); });
          if (high < count) std::fill_n(line + high, count - high, acc_t(0));
        }
      }
    }
  }
  // Panels of A[k][pixel] from row m on. Pixels are numbered as they stand in dy.
  void pack_dy_channels(const Block& b, int64_t m, int64_t first, int64_t n, acc_t* to) const {
    const int64_t end = std::min(m + together * R, b.used_rows());
    for (int64_t k = 0; k < n; k += chunk)
      for (int64_t j = m; j < end; j += R) {
        const int64_t count = std::min(R, end - j), padded = Tile<acc_t>::round(count);
        pack_a_columns(to + (j - m) / R * panel_a + k * padded, padded,
                       dy_ + (first + k) * z_.K + b.g * M() + b.row + j, z_.K, count, std::min(chunk, n - k));
      }
  }

  // ---- the block in dw

  template <class T>
  void store(const Block& b, const acc_t* sum, T* dw) const {
    if (last_) {
      for (int64_t m = 0; m < b.used_rows(); ++m)
        narrow(dw + (b.g * M() + b.row + m) * CT() + b.lane, sum + m * b.width, b.used_lanes());
      return;
    }
    // few lanes at a time, whose rows in dw are pages apart
    for (int64_t l = 0; l < b.used_lanes(); l += V::width)
      transpose<acc_t>(dw + (b.g * M() + b.lane + l) * CT() + b.row, CT(), sum + l, b.width, b.used_rows(),
                       std::min<int64_t>(V::width, b.used_lanes() - l), b.used_rows());
  }

  Space s_;
  const Sizes& z_;
  bool last_, pointwise_;  // pointwise: the pixels of x are those of y
  std::optional<conv_planes::Plan> plan_;
  std::vector<int64_t> offsets_;  // of the taps in a copy
  const scalar_t *dy_, *x_;
};

}  // namespace pyops::PYOPS_CPU_CAPABILITY::conv_weight
