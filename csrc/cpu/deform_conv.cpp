// deform_conv · CPU
//   col[i,(g,t,c)] = m[n,o,t,i] x[n](place i of tap t + offset[n,o,t,i])      bilinear; o: offset group of the channel
//   y[i,k] = sum over (t,c) of the group of w[k,t,c] col[i,(g,t,c)]
//   dcol = dy w · dw = dy^T col · dx, doffset, dm: the gradients of a sample (docs/math/detection.md)
// layout   x: [N, H, W, C] · w: [K, R, S, C/G] · offset: [N, O, taps, 2, P, Q] · m: [N, O, taps, P, Q]
//          y: [N, P, Q, K]
// mapping  lanes over channels: a sample reads up to four runs of them. Columns exist in blocks of places alone and go
//          into the product in registers (gemm.h). Threads: forward over blocks of places; dx over images and ranges of
//          channels, so no two threads write one address; dw over taps
// memory   forward and dw: 512 KiB a thread and the packed weights; dx: sums of doffset and dm for each range of
//          channels
// numerics sums in fp32 (fp64 for fp64), in an order that depends on the shape alone
#include "common/deform_conv.h"

#include "common/registry.h"
#include "cpu/gemm.h"
#include "cpu/parallel.h"
#include "cpu/product.h"

namespace pyops::PYOPS_CPU_CAPABILITY {
namespace {

// ---- kernels

using deform::Sample;
using deform::Sizes;

inline constexpr int64_t block_bytes = 512 << 10;
// Into so many parts work is cut where it has them: by the shape, never by the number of threads.
inline constexpr int64_t parts = 8;

template <class scalar_t>
struct Inputs {
  using acc_t = accumulate_t<scalar_t>;
  const scalar_t *x, *offset, *mask;

  PYOPS_INLINE Sample<acc_t> sample(const Sizes& s, int64_t n, int64_t o, int64_t t, int64_t place) const {
    const scalar_t* at = offset + ((n * s.O + o) * s.taps() + t) * 2 * s.places() + place;
    return deform::sample_of(s, t, place / s.Q, place % s.Q, acc_t(at[0]), acc_t(at[s.places()]));
  }
  PYOPS_INLINE acc_t weight(const Sizes& s, int64_t n, int64_t o, int64_t t, int64_t place) const {
    return mask ? acc_t(mask[((n * s.O + o) * s.taps() + t) * s.places() + place]) : acc_t(1);
  }
};

// to[0..count) = m times the sample of `count` channels; image: the first channel of the first pixel.
template <class acc_t, class scalar_t>
PYOPS_INLINE void read_sample(const Sizes& s, const Sample<acc_t>& at, acc_t m, const scalar_t* image, int64_t count,
                              acc_t* to) {
  using V = Vec<acc_t>;
  const scalar_t* from[4];
  acc_t weight[4];
  int corners = 0;
  for (int a = 0; a < 2 && at.inside; ++a)
    for (int b = 0; b < 2; ++b)
      if (at.valid(a, b, s)) {
        from[corners] = image + at.pixel(a, b, s) * s.C;
        weight[corners++] = m * at.weight(a, b);
      }
  if (corners == 4) {
    const V w0(weight[0]), w1(weight[1]), w2(weight[2]), w3(weight[3]);
    return each_vector<acc_t>(count, [&](int64_t c, auto lanes) {
      const V upper = fma(w0, V::load(from[0] + c, lanes), w1 * V::load(from[1] + c, lanes));
      const V lower = fma(w2, V::load(from[2] + c, lanes), w3 * V::load(from[3] + c, lanes));
      (upper + lower).store(to + c, lanes);
    });
  }
  each_vector<acc_t>(count, [&](int64_t c, auto lanes) {
    V sum(corners == 0 ? m * acc_t(0) : acc_t(0));  // a mask that is not finite shows, as in torchvision
    for (int k = 0; k < corners; ++k) sum = fma(V(weight[k]), V::load(from[k] + c, lanes), sum);
    sum.store(to + c, lanes);
  });
}

// Calls f(offset group, first channel, channels) for the runs of [c0, c1) that share an offset group.
template <class F>
PYOPS_INLINE void each_offset_group(const Sizes& s, int64_t c0, int64_t c1, F&& f) {
  const int64_t width = s.C / s.O;
  for (int64_t c = c0; c < c1;) {
    const int64_t end = std::min(c1, (c / width + 1) * width);
    f(c / width, c, end - c);
    c = end;
  }
}

// Tiles of rows that a block of `tiles` in all takes at a time, of `bytes` each.
inline int64_t tiles_of_block(int64_t tiles, int64_t bytes) {
  return std::max<int64_t>(1, std::min(block_bytes / std::max<int64_t>(bytes, 1), ceil_div(tiles, parts)));
}

template <class scalar_t>
void deform_fwd(const Sizes& s, const Inputs<scalar_t>& in, const scalar_t* w, scalar_t* y) {
  using acc_t = accumulate_t<scalar_t>;
  using V = Vec<acc_t>;
  constexpr int64_t R = Tile<acc_t>::rows, L = Tile<acc_t>::columns;
  const int64_t Cg = s.C / s.G, Kg = s.K / s.G, T = s.taps(), depth = T * Cg, pixels = s.N * s.places();
  const int64_t panels = ceil_div(Kg, L);
  Buffer<acc_t> packed(s.G * panels * depth * L);
  parallel_for(s.G * panels, ceil_div(1 << 14, depth * L), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k0 = i % panels * L, count = std::min(L, Kg - k0);
      pack_columns(packed.get() + i * depth * L, L, w + (i / panels * Kg + k0) * depth, depth, count, depth);
    }
  });
  const int64_t panel_a = Tile<acc_t>::packed_a(R, depth);
  const int64_t tiles = tiles_of_block(ceil_div(pixels, R), panel_a * int64_t(sizeof(acc_t))), block = tiles * R;
  parallel_for(ceil_div(pixels, block), ceil_div(1 << 18, block * depth * s.K), [&](int64_t begin, int64_t end) {
    Buffer<acc_t> a(tiles * panel_a), line(depth);
    alignas(64) acc_t tile[R * L];
    for (int64_t first = begin * block; first < std::min(end * block, pixels); first += block) {
      const int64_t last = std::min(first + block, pixels);
      for (int64_t g = 0; g < s.G; ++g) {
        for (int64_t i = first; i < last; ++i) {
          const int64_t n = i / s.places(), place = i % s.places(), row0 = (i - first) / R * R;
          for (int64_t t = 0; t < T; ++t)
            each_offset_group(s, g * Cg, (g + 1) * Cg, [&](int64_t o, int64_t c, int64_t count) {
              read_sample(s, in.sample(s, n, o, t, place), in.weight(s, n, o, t, place), in.x + n * s.H * s.W * s.C + c,
                          count, line.get() + t * Cg + c - g * Cg);
            });
          const int64_t rows = Tile<acc_t>::round(std::min(R, last - first - row0));
          pack_a_run(a.get() + row0 / R * panel_a, rows, i - first - row0, 0, line.get(), depth);
        }
        for (int64_t panel = 0; panel < panels; ++panel) {
          const int64_t used = std::min(L, Kg - panel * L);
          for (int64_t row0 = first; row0 < last; row0 += R) {
            const int64_t count = std::min(R, last - row0);
            tile_product(Tile<acc_t>::round(count), used, depth, a.get() + (row0 - first) / R * panel_a,
                         packed.get() + (g * panels + panel) * depth * L, tile);
            for (int64_t i = 0; i < count; ++i)
              each_vector<acc_t>(used, [&](int64_t k, auto lanes) {
                V::load(tile + i * L + k, lanes).store(y + (row0 + i) * s.K + g * Kg + panel * L + k, lanes);
              });
          }
        }
      }
    }
  });
}

// Four dot products of the cotangent d with the neighbours of a sample; and their gradient into the map.
template <class acc_t, class scalar_t>
struct SampleGradient {
  acc_t dot[2][2] = {};

  // image, map: the first channel of the first pixel; the map has `pitch` channels a pixel.
  PYOPS_INLINE void add(const Sizes& s, const Sample<acc_t>& at, acc_t m, const acc_t* d, const scalar_t* image,
                        acc_t* map, int64_t pitch, int64_t count) {
    using V = Vec<acc_t>;
    for (int a = 0; a < 2; ++a)
      for (int b = 0; b < 2; ++b) {
        if (!at.valid(a, b, s)) continue;
        const scalar_t* from = image + at.pixel(a, b, s) * s.C;
        acc_t* to = map + at.pixel(a, b, s) * pitch;
        const V w(m * at.weight(a, b));
        V total;
        each_vector<acc_t>(count, [&](int64_t c, auto lanes) {
          const V g = V::load(d + c, lanes);
          total += g * V::load(from + c, lanes);
          fma(w, g, V::load(to + c, lanes)).store(to + c, lanes);
        });
        dot[a][b] += sum(total);
      }
  }
  PYOPS_INLINE acc_t of_mask(const Sample<acc_t>& at) const {
    return at.weight(0, 0) * dot[0][0] + at.weight(0, 1) * dot[0][1] + at.weight(1, 0) * dot[1][0] +
           at.weight(1, 1) * dot[1][1];
  }
  PYOPS_INLINE acc_t of_row(const Sample<acc_t>& at) const {
    return (acc_t(1) - at.right) * (dot[1][0] - dot[0][0]) + at.right * (dot[1][1] - dot[0][1]);
  }
  PYOPS_INLINE acc_t of_column(const Sample<acc_t>& at) const {
    return (acc_t(1) - at.down) * (dot[0][1] - dot[0][0]) + at.down * (dot[1][1] - dot[1][0]);
  }
};

// Gradients of one image on the channels [c0, c1) of group g: added to map (channel c0 first, `pitch` channels a pixel)
// and to found [O, taps, 3, places]: row, column and mask.
template <class scalar_t, class acc_t>
void unit_bwd(const Sizes& s, const Inputs<scalar_t>& in, const scalar_t* dy, const scalar_t* w, int64_t n, int64_t g,
              int64_t c0, int64_t c1, acc_t* map, int64_t pitch, acc_t* found) {
  constexpr int64_t R = Tile<acc_t>::rows, L = Tile<acc_t>::columns;
  const int64_t Cg = s.C / s.G, Kg = s.K / s.G, T = s.taps(), width = c1 - c0, columns = T * width, places = s.places();
  const int64_t panels = ceil_div(columns, L), panel_a = Tile<acc_t>::packed_a(R, Kg);
  // B[k][(t, c)]: the filters as they stand, cut to these channels
  Buffer<acc_t> b(panels * Kg * L, acc_t(0));
  for (int64_t k = 0; k < Kg; ++k)
    for (int64_t t = 0; t < T; ++t) {
      const scalar_t* from = w + ((g * Kg + k) * T + t) * Cg + c0 - g * Cg;
      for (int64_t c = 0; c < width;) {
        const int64_t at = t * width + c, count = std::min(width - c, L - at % L);
        for (int64_t j = 0; j < count; ++j) b[(at / L * Kg + k) * L + at % L + j] = acc_t(from[c + j]);
        c += count;
      }
    }
  const int64_t row_bytes = (columns + Kg) * int64_t(sizeof(acc_t));
  const int64_t tiles = std::clamp<int64_t>(block_bytes / (R * row_bytes), 1, ceil_div(places, R)), block = tiles * R;
  Buffer<acc_t> a(tiles * panel_a), dcol(block * panels * L);
  alignas(64) acc_t tile[R * L];
  for (int64_t first = 0; first < places; first += block) {
    const int64_t last = std::min(first + block, places);
    for (int64_t row0 = first; row0 < last; row0 += R) {
      const int64_t count = std::min(R, last - row0);
      for (int64_t i = 0; i < count; ++i)
        pack_a_run(a.get() + (row0 - first) / R * panel_a, Tile<acc_t>::round(count), i, 0,
                   dy + (n * places + row0 + i) * s.K + g * Kg, Kg);
    }
    for (int64_t panel = 0; panel < panels; ++panel)
      for (int64_t row0 = first; row0 < last; row0 += R) {
        const int64_t count = std::min(R, last - row0);
        tile_product(Tile<acc_t>::round(count), std::min(L, columns - panel * L), Kg,
                     a.get() + (row0 - first) / R * panel_a, b.get() + panel * Kg * L, tile);
        for (int64_t i = 0; i < count; ++i)
          std::copy_n(tile + i * L, L, dcol.get() + ((row0 - first + i) * panels + panel) * L);
      }
    for (int64_t place = first; place < last; ++place) {
      const acc_t* row = dcol.get() + (place - first) * panels * L;
      for (int64_t t = 0; t < T; ++t)
        each_offset_group(s, c0, c1, [&](int64_t o, int64_t c, int64_t count) {
          const Sample<acc_t> at = in.sample(s, n, o, t, place);
          if (!at.inside) return;
          const acc_t m = in.weight(s, n, o, t, place);
          SampleGradient<acc_t, scalar_t> d;
          d.add(s, at, m, row + t * width + c - c0, in.x + n * s.H * s.W * s.C + c, map + c - c0, pitch, count);
          acc_t* to = found + (o * T + t) * 3 * places + place;
          to[0] += m * d.of_row(at);
          to[places] += m * d.of_column(at);
          to[2 * places] += d.of_mask(at);
        });
    }
  }
}

// dx, doffset, dm (null where there is no mask).
template <class scalar_t>
void deform_bwd(const Sizes& s, const Inputs<scalar_t>& in, const scalar_t* dy, const scalar_t* w, scalar_t* dx,
                scalar_t* doffset, scalar_t* dmask) {
  using acc_t = accumulate_t<scalar_t>;
  const int64_t Cg = s.C / s.G, pixels = s.H * s.W, places = s.places(), T = s.taps();
  // Units: pieces of a group's channels; a task has an image and a range of them.
  const int64_t wanted = std::clamp<int64_t>(ceil_div(parts, s.N), 1, s.C);
  const int64_t pieces = std::min(ceil_div(wanted, s.G), Cg), units = s.G * pieces, splits = std::min(wanted, units);
  const int64_t size = s.O * T * 3 * places;
  Buffer<acc_t> found(s.N * splits * size);
  parallel_for(s.N * splits, 1, [&](int64_t begin, int64_t end) {
    std::vector<acc_t> wide;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / splits, split = task % splits;
      acc_t* own = found.get() + task * size;
      std::fill_n(own, size, acc_t(0));
      for (int64_t unit = units * split / splits; unit < units * (split + 1) / splits; ++unit) {
        const int64_t g = unit / pieces, piece = unit % pieces;
        const int64_t c0 = g * Cg + Cg * piece / pieces, c1 = g * Cg + Cg * (piece + 1) / pieces, width = c1 - c0;
        scalar_t* to = dx + n * pixels * s.C + c0;
        if constexpr (std::is_same_v<scalar_t, acc_t>) {
          for (int64_t i = 0; i < pixels; ++i) std::fill_n(to + i * s.C, width, scalar_t(0));
          unit_bwd(s, in, dy, w, n, g, c0, c1, to, s.C, own);
        } else {
          wide.assign(size_t(pixels * width), acc_t(0));
          unit_bwd(s, in, dy, w, n, g, c0, c1, wide.data(), width, own);
          for (int64_t i = 0; i < pixels; ++i)
            each_vector<acc_t>(width, [&](int64_t c, auto lanes) {
              Vec<acc_t>::load(wide.data() + i * width + c, lanes).store(to + i * s.C + c, lanes);
            });
        }
      }
    }
  });
  parallel_for(s.N * s.O * T, ceil_div(1 << 14, places), [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t n = at / (s.O * T), tap = at % (s.O * T);
      each_vector<acc_t>((dmask ? 3 : 2) * places, [&](int64_t i, auto lanes) {
        Vec<acc_t> total;
        for (int64_t split = 0; split < splits; ++split)
          total += Vec<acc_t>::load(found.get() + (n * splits + split) * size + tap * 3 * places + i, lanes);
        total.store(found.get() + n * splits * size + tap * 3 * places + i, lanes);
      });
      const acc_t* from = found.get() + n * splits * size + tap * 3 * places;
      each_vector<acc_t>(2 * places, [&](int64_t i, auto lanes) {
        Vec<acc_t>::load(from + i, lanes).store(doffset + at * 2 * places + i, lanes);
      });
      if (dmask)
        each_vector<acc_t>(places, [&](int64_t i, auto lanes) {
          Vec<acc_t>::load(from + 2 * places + i, lanes).store(dmask + at * places + i, lanes);
        });
    }
  });
}

// dw: a task has a tap of a group, or a piece of its channels.
template <class scalar_t>
void deform_wgrad(const Sizes& s, const Inputs<scalar_t>& in, const scalar_t* dy, scalar_t* dw) {
  using acc_t = accumulate_t<scalar_t>;
  using V = Vec<acc_t>;
  constexpr int64_t R = Tile<acc_t>::rows, L = Tile<acc_t>::columns, depth = 256;
  const int64_t Cg = s.C / s.G, Kg = s.K / s.G, T = s.taps(), pixels = s.N * s.places();
  const int64_t pieces = std::clamp<int64_t>(parts / (s.G * T), 1, ceil_div(Cg, L));
  parallel_for(
      s.G * T * pieces, ceil_div(1 << 18, std::max<int64_t>(pixels * Kg * Cg, 1)), [&](int64_t begin, int64_t end) {
        const int64_t widest = ceil_div(ceil_div(Cg, pieces), L) * L;
        Buffer<acc_t> a(Tile<acc_t>::packed_a(R, depth)), b(depth * widest), total(Kg * widest), line(widest);
        alignas(64) acc_t tile[R * L];
        for (int64_t task = begin; task < end; ++task) {
          const int64_t g = task / pieces / T, t = task / pieces % T, piece = task % pieces;
          const int64_t c0 = g * Cg + Cg * piece / pieces, c1 = g * Cg + Cg * (piece + 1) / pieces, width = c1 - c0;
          std::fill_n(total.get(), Kg * widest, acc_t(0));
          for (int64_t first = 0; first < pixels; first += depth) {
            const int64_t count = std::min(depth, pixels - first);
            for (int64_t i = 0; i < count; ++i) {
              const int64_t n = (first + i) / s.places(), place = (first + i) % s.places();
              each_offset_group(s, c0, c1, [&](int64_t o, int64_t c, int64_t channels) {
                read_sample(s, in.sample(s, n, o, t, place), in.weight(s, n, o, t, place),
                            in.x + n * s.H * s.W * s.C + c, channels, line.get() + c - c0);
              });
              for (int64_t q = 0; q < width; q += L) {
                acc_t* to = b.get() + q * depth + i * L;
                const int64_t used = std::min(L, width - q);
                std::copy_n(line.get() + q, used, to);
                std::fill_n(to + used, L - used, acc_t(0));
              }
            }
            for (int64_t m = 0; m < Kg; m += R) {
              const int64_t rows = std::min(R, Kg - m), padded = Tile<acc_t>::round(rows);
              for (int64_t i = 0; i < count; ++i) {
                acc_t* to = a.get() + i / chunk * padded * chunk + i % chunk;
                for (int64_t j = 0; j < rows; ++j) to[j * chunk] = acc_t(dy[(first + i) * s.K + g * Kg + m + j]);
              }
              for (int64_t q = 0; q < width; q += L) {
                tile_product(padded, std::min(L, width - q), count, a.get(), b.get() + q * depth, tile);
                for (int64_t j = 0; j < rows; ++j)
                  for (int64_t e = 0; e < L; e += V::width) {
                    acc_t* to = total.get() + (m + j) * widest + q + e;
                    (V::load(to) + V::load(tile + j * L + e)).store(to);
                  }
              }
            }
          }
          for (int64_t k = 0; k < Kg; ++k)
            each_vector<acc_t>(width, [&](int64_t c, auto lanes) {
              V::load(total.get() + k * widest + c, lanes)
                  .store(dw + ((g * Kg + k) * T + t) * Cg + c0 - g * Cg + c, lanes);
            });
        }
      });
}

// ---- binding

using Ints = std::vector<int64_t>;

template <class scalar_t>
Inputs<scalar_t> inputs_of(const OpScope& op, const Sizes& s, const Tensor& x, const Tensor& offset,
                           const OptionalTensor& mask) {
  const int64_t moves = s.O * s.taps();
  return {op.in<scalar_t>(x, "x", {s.N, s.H, s.W, s.C}), op.in<scalar_t>(offset, "offset", {s.N, 2 * moves, s.P, s.Q}),
          op.in_optional<scalar_t>(mask, "mask", {s.N, moves, s.P, s.Q})};
}

Tensor deform_conv_fwd(const Tensor& x, const Tensor& offset, const OptionalTensor& mask, const Tensor& w, Ints stride,
                       Ints padding, Ints dilation, std::string, int64_t) {
  OpScope op("deform_conv_fwd", x);
  const Sizes s = deform::sizes_of(op, x, offset, mask, w, stride, padding, dilation);
  return dispatch_floating(op, x.scalar_type(), [&]<class scalar_t>() {
    Tensor y = op.empty<scalar_t>({s.N, s.P, s.Q, s.K});
    const auto in = inputs_of<scalar_t>(op, s, x, offset, mask);
    auto* pw = op.in<scalar_t>(w, "w", {s.K, s.R, s.S, s.C / s.G});
    auto* py = op.out<scalar_t>(y, "y", {s.N, s.P, s.Q, s.K});
    if (s.N * s.K > 0) deform_fwd(s, in, pw, py);
    return y;
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> deform_conv_bwd(const Tensor& dy, const Tensor& x, const Tensor& offset,
                                                           const OptionalTensor& mask, const Tensor& w, Ints stride,
                                                           Ints padding, Ints dilation, std::string, int64_t,
                                                           bool of_data, bool of_weight) {
  OpScope op("deform_conv_bwd", dy);
  const Sizes s = deform::sizes_of(op, x, offset, mask, w, stride, padding, dilation);
  return dispatch_floating(op, x.scalar_type(), [&]<class scalar_t>() {
    const auto in = inputs_of<scalar_t>(op, s, x, offset, mask);
    auto* pdy = op.in<scalar_t>(dy, "dy", {s.N, s.P, s.Q, s.K});
    auto* pw = op.in<scalar_t>(w, "w", {s.K, s.R, s.S, s.C / s.G});
    const int64_t moves = s.O * s.taps();
    Tensor dx = op.empty<scalar_t>({0}), doffset = op.empty<scalar_t>({0}), dmask = op.empty<scalar_t>({0}),
           dw = op.empty<scalar_t>({0});
    if (of_data) {
      dx = op.empty<scalar_t>({s.N, s.H, s.W, s.C});
      doffset = op.empty<scalar_t>({s.N, 2 * moves, s.P, s.Q});
      if (mask.has_value()) dmask = op.empty<scalar_t>({s.N, moves, s.P, s.Q});
      auto* pdmask = mask.has_value() ? op.out<scalar_t>(dmask, "dmask", {s.N, moves, s.P, s.Q}) : nullptr;
      if (s.N > 0)
        deform_bwd(s, in, pdy, pw, op.out<scalar_t>(dx, "dx", {s.N, s.H, s.W, s.C}),
                   op.out<scalar_t>(doffset, "doffset", {s.N, 2 * moves, s.P, s.Q}), pdmask);
    }
    if (of_weight) {
      dw = op.empty<scalar_t>({s.K, s.R, s.S, s.C / s.G});
      if (s.K > 0) deform_wgrad(s, in, pdy, op.out<scalar_t>(dw, "dw", {s.K, s.R, s.S, s.C / s.G}));
    }
    return std::make_tuple(dx, doffset, dmask, dw);
  });
}

}  // namespace

PYOPS_LIBRARY(m) {
  PYOPS_IMPL(m, deform_conv_fwd);
  PYOPS_IMPL(m, deform_conv_bwd);
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY
