// conv · CUDA, sm_80
//   act    y = f(fwd + r), f by number (common/activation.h)
//   fwd    y[n,k,p] = b[k] + sum_{c,r} w[k,c,r] * x[n,c, p*stride - padding + r*dilation]
//   dgrad  dx[n,c,h] = b[c] + sum of w[k,c,r] * dy[n,k,p] over k and the (p, r) that meet in h
//   wgrad  dw[k,c,r] = sum_{n,p} dy[n,k,p] * x[n,c, p*stride - padding + r*dilation]
// layout   x: [N, C, D, H, W] · w: [K, C/G, taps] · y: [N, K, space]
//          channels last: x: [N, D, H, W, C] · w: [K, taps, C/G]
// mapping  implicit GEMM (conv_gemm.cuh; for half types on sm_90a conv_hopper.cu), small groups several to a tile
//          (conv_grouped.cuh), others on grid.z; forward and filter gradient of at most four channels from a part of the
//          image in shared memory (conv_few.cuh), products with at most eight output channels as well (conv_narrow.cuh);
//          filters are read as [G, K/G, taps, C/G], from a copy where they stand otherwise; dgrad is one launch for each
//          residue of the position modulo the stride; wgrad splits the pixels and adds partial sums
// memory   x once from DRAM where a tile's taps stay in cache, filters once for each tile of pixels from L2
// numerics sums in fp32 (fp64 for fp64); algorithm: "tf32", "3xtf32", else fp32 products on CUDA cores
#include "cuda/conv_few.cuh"
#include "cuda/conv_grouped.cuh"
#include "cuda/conv_hopper.cuh"
#include "cuda/conv_narrow.cuh"
#include "cuda/device/grid_axis.cuh"

// binding

#include "common/conv_binding.h"
#include "common/registry.h"

namespace pyops {
namespace {

using namespace conv;

Strides strides_of(int64_t channels, int64_t positions, bool channels_last) {
  return channels_last ? Strides{channels * positions, channels, 1} : Strides{channels * positions, 1, positions};
}

template <class T>
bool is_vector(bool channels_last, const T* p, int64_t per_group, int64_t all) {
  return channels_last && per_group % vector<T> == 0 && all % vector<T> == 0 && is_aligned(p);
}

// Calls f.template operator()<Product>() for the products that T has.
template <class T, class F>
void dispatch_product(const std::string& algorithm, F&& f) {
  if constexpr (std::is_same_v<T, float>) {
    if (algorithm == "tf32") return f.template operator()<Product::tf32>();
    if (algorithm == "3xtf32") return f.template operator()<Product::tf32x3>();
    f.template operator()<Product::simt>();
  } else if constexpr (std::is_same_v<T, double>) {
    f.template operator()<Product::simt>();
  } else {
    f.template operator()<Product::half>();
  }
}

template <class T>
constexpr bool is_half = std::is_same_v<T, bf16> || std::is_same_v<T, fp16>;

// Whether the kernels of conv_hopper.cu take a product of C channels with filters of K.
template <class T>
bool on_hopper(const Sizes& s, const Space& space, int64_t C, int64_t K, bool last, const std::string& algorithm,
               const T* x, const T* other, const T* residual = nullptr) {
  const bool empty = s.x_plane() * s.y_plane() == 0;  // which no tensor map describes
  return algorithm == "wgmma" && !empty && is_aligned(x, other, residual) &&
         hopper::serves<T>(space, C, K, s.G, last, s.taps());
}

// Filters as [G, m, taps, c]: m is the output channel of the product, c the one that is summed over.
template <class T>
Tensor arranged_weights(const OpScope& op, const T* w, const Sizes& s, bool transposed, bool last) {
  const int64_t Kg = s.K / s.G, Cg = s.C / s.G, taps = s.taps();
  const int64_t at_k = Cg * taps, at_c = last ? 1 : taps, at_tap = last ? Cg : 1;
  const int64_t M = transposed ? Cg : Kg, C = transposed ? Kg : Cg;
  Tensor arranged = op.empty<T>({s.G * M, taps, C});
  launch(arrange_weights_kernel<T>,
         {.grid = dim3(static_cast<unsigned>(s.G * M), static_cast<unsigned>(ceil_div(taps * C, 256))),
          .block = dim3(256),
          .stream = static_cast<cudaStream_t>(op.stream())},
         w, op.out<T>(arranged, "workspace", {s.G * M, taps, C}), static_cast<int>(M), static_cast<int>(taps),
         static_cast<int>(C), Kg * at_k, transposed ? at_c : at_k, at_tap, transposed ? at_k : at_c);
  return arranged;
}

// Calls f(first, count) for slices of the groups, each of which an axis of a grid holds.
template <class F>
void each_slice(int64_t groups, int64_t most, F&& f) {
  for (int64_t first = 0; first < groups; first += most) f(first, std::min(most, groups - first));
}

// Do groups share tiles? A tile has room for 64 output channels.
bool are_packed(int64_t G, int64_t M) { return G > 1 && M <= unit_columns; }

// The filters of a call; a copy as conv_kernel reads them is made when it is first asked for.
template <class T>
struct Filters {
  const T* given;
  bool transposed, last;
  std::optional<Tensor> copy = {};

  const T* arranged(const OpScope& op, const Sizes& s) {
    if (last && !transposed) return given;
    if (!copy) copy = arranged_weights(op, given, s, transposed, last);
    return op.in<T>(*copy, "arranged", {transposed ? s.C : s.K, s.taps(), (transposed ? s.K : s.C) / s.G});
  }
  // The copy of grouped_kernel.
  const T* packed(const OpScope& op, const Sizes& s, const Packing& pack) {
    const int64_t per_unit = s.taps() * pack.chunks * pack.columns * unit_depth<T>;
    if (!copy) {
      const int64_t Kg = s.K / s.G, Cg = s.C / s.G, at_k = Cg * s.taps(), at_c = last ? 1 : s.taps();
      copy = op.empty<T>({pack.count, per_unit});
      launch(pack_weights_kernel<T>,
             {.grid = dim3(static_cast<unsigned>(pack.count), static_cast<unsigned>(ceil_div(per_unit, 256))),
              .block = dim3(256),
              .stream = static_cast<cudaStream_t>(op.stream())},
             given, op.out<T>(*copy, "workspace", {pack.count, per_unit}), pack, static_cast<int>(s.taps()), Kg * at_k,
             transposed ? at_c : at_k, last ? Cg : 1, transposed ? at_k : at_c);
    }
    return op.in<T>(*copy, "packed", {pack.count, per_unit});
  }
};

// y at the positions of `space`, of M channels a group, from x with C channels a group.
template <class T>
void product(const OpScope& op, const Sizes& s, const Space& space, const T* x, Filters<T>& filters,
             const Epilogue<T>& end, T* y, int64_t C, int64_t M, const std::string& algorithm) {
  const bool last = filters.last;
  const Strides in = strides_of(s.G * C, space.in_plane(), last), out = strides_of(s.G * M, space.out_plane(), last);
  // pixels of a launch are counted in 31 bits
  const int64_t portion = std::max<int64_t>((int64_t(1) << 30) / space.positions(), 1);
  op.check(space.positions() < (int64_t(1) << 30), "an image has too many positions");
  for (int64_t n = 0; n < s.N; n += portion) {
    const int64_t count = std::min(portion, s.N - n), pixels = count * space.positions();
    Epilogue<T> portion_end = end;
    if (end.residual != nullptr) portion_end.residual += n * out.example;
    // bias and residual of the groups from `first` on
    const auto end_of = [&](int64_t first) {
      Epilogue<T> slice = portion_end;
      if (slice.bias != nullptr) slice.bias += first * M;
      if (slice.residual != nullptr) slice.residual += first * M * out.channel;
      return slice;
    };
    if constexpr (hopper_built && is_half<T>)
      if (on_hopper<T>(s, space, C, M, last, algorithm, x, filters.given, end.residual)) {
        hopper::product(
            hopper::Product<T>{x + n * in.example,
                               filters.given,
                               portion_end,
                               y + n * out.example,
                               space,
                               count,
                               static_cast<int>(s.G),
                               static_cast<int>(C),
                               static_cast<int>(M),
                               {static_cast<int>(s.r[0]), static_cast<int>(s.r[1]), static_cast<int>(s.r[2])},
                               filters.transposed},
            static_cast<cudaStream_t>(op.stream()));
        continue;
      }
    if (are_packed(s.G, M)) {
      const Packing all = packing_of<T>(s.G, C, M);
      const T* w = filters.packed(op, s, all);
      each_slice(all.count, grid_axis_limit() * units, [&](int64_t unit, int64_t count) {
        const int64_t first = unit * all.groups;
        Packing pack = all;
        pack.G = static_cast<int>(std::min(s.G - first, count * all.groups)), pack.count = static_cast<int>(count);
        const GroupedArguments<T> p{x + n * in.example + first * C * in.channel,
                                    w + unit * s.taps() * pack.chunks * pack.columns * unit_depth<T>,
                                    end_of(first),
                                    y + n * out.example + first * M * out.channel,
                                    space,
                                    in,
                                    out,
                                    static_cast<unsigned>(pixels),
                                    pack,
                                    static_cast<int>(s.taps()),
                                    static_cast<int>(s.r[1]),
                                    static_cast<int>(s.r[2]),
                                    is_vector(last, x, pack.groups * C, s.G * C)};
        dispatch_product<T>(algorithm, [&]<Product P>() {
          launch(grouped_kernel<T, P>,
                 {.grid = dim3(static_cast<unsigned>(ceil_div(pixels, tile)),
                               static_cast<unsigned>(ceil_div(count, units))),
                  .block = dim3(threads),
                  .smem = sizeof(GroupedShared<T>),
                  .stream = static_cast<cudaStream_t>(op.stream())},
                 p);
        });
      });
      continue;
    }
    const T* w = filters.arranged(op, s);
    if constexpr (sizeof(T) <= 4)
      if (few_serves<T>(space, C, s.G)) {
        const FewTiles shape = few_tiles(space, static_cast<int>(C));
        const int64_t tiles = count * space.d.count * shape.down * shape.across;
        const FewArguments<T> p{x + n * in.example,
                                w,
                                portion_end,
                                y + n * out.example,
                                space,
                                in,
                                out,
                                static_cast<unsigned>(tiles),
                                static_cast<int>(C),
                                static_cast<int>(M),
                                shape};
        dispatch_product<T>(algorithm, [&]<Product P>() {
          const auto run = [&]<bool Wide>() {
            launch(few_channels_kernel<T, P, Wide>,
                   {.grid = dim3(static_cast<unsigned>(std::min<int64_t>(tiles, 8 * multiprocessor_count())),
                                 static_cast<unsigned>(ceil_div(M, tile))),
                    .block = dim3(threads),
                    .smem = sizeof(FewShared<T, Wide>),
                    .stream = static_cast<cudaStream_t>(op.stream())},
                   p);
          };
          s.taps() * C > few_columns<false> ? run.template operator()<true>() : run.template operator()<false>();
        });
        continue;
      }
    if constexpr (sizeof(T) <= 4)
      if (narrow_serves<T>(space, C, M, s.G)) {
        const FewTiles shape = narrow_tiles(space);
        const NarrowArguments<T> p{x + n * in.example,
                                   w,
                                   portion_end,
                                   y + n * out.example,
                                   space,
                                   in,
                                   out,
                                   static_cast<int>(C),
                                   static_cast<int>(M),
                                   static_cast<int>(s.taps()),
                                   static_cast<int>(s.r[1]),
                                   static_cast<int>(s.r[2]),
                                   shape,
                                   is_vector(last, x, C, C),
                                   is_vector(true, w, C, C)};
        const int64_t tiles = count * space.d.count * shape.down * shape.across;
        dispatch_product<T>(algorithm, [&]<Product P>() {
          const auto run = [&]<bool Wide>() {
            launch(narrow_kernel<T, P, Wide>,
                   {.grid = dim3(static_cast<unsigned>(tiles)),
                    .block = dim3(threads),
                    .smem = sizeof(NarrowShared<T, Wide>),
                    .stream = static_cast<cudaStream_t>(op.stream())},
                   p);
          };
          space.taps() > narrow_taps<false> ? run.template operator()<true>() : run.template operator()<false>();
        });
        continue;
      }
    each_slice(s.G, grid_axis_limit(), [&](int64_t first, int64_t groups) {
      const ConvArguments<T> p{x + n * in.example + first * C * in.channel,
                               w + first * M * s.taps() * C,
                               end_of(first),
                               y + n * out.example + first * M * out.channel,
                               space,
                               in,
                               out,
                               static_cast<unsigned>(pixels),
                               static_cast<int>(C),
                               static_cast<int>(M),
                               static_cast<int>(s.taps()),
                               static_cast<int>(s.r[1]),
                               static_cast<int>(s.r[2]),
                               is_vector(last, x, C, s.G * C),
                               is_vector(true, w, C, C)};
      dispatch_product<T>(algorithm, [&]<Product P>() {
        launch(conv_kernel<T, P>,
               {.grid = dim3(static_cast<unsigned>(ceil_div(pixels, tile)), static_cast<unsigned>(ceil_div(M, tile)),
                             static_cast<unsigned>(groups)),
                .block = dim3(threads),
                .smem = sizeof(ConvShared<T>),
                .stream = static_cast<cudaStream_t>(op.stream())},
               p);
      });
    });
  }
}

// y = f(conv(x, w) + b + residual); kind -1: neither f nor residual.
Tensor forward(const OpScope& op, const Tensor& x, const Tensor& w, const OptionalTensor& b,
               const OptionalTensor& residual, const Ints& stride, const Ints& padding, const Ints& dilation,
               int64_t groups, bool channels_last, const std::string& algorithm, int64_t kind,
               activation::Parameters parameters) {
  const Sizes s = fwd_sizes(op, x, w, groups, channels_last, stride, padding, dilation);
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    Tensor y = image(op, x.scalar_type(), s.N, s.K, s.y, channels_last);
    auto* px = image_in<T>(op, x, "x", s.N, s.C, s.x, channels_last);
    auto* pw = image_in<T>(op, w, "w", s.K, s.C / s.G, s.r, channels_last);
    const Epilogue<T> end{op.in_optional<T>(b, "b", {s.K}),
                          optional_image_in<T>(op, residual, "residual", s.N, s.K, s.y, channels_last),
                          static_cast<int>(kind), parameters};
    auto* py = image_out<T>(op, y, "y", s.N, s.K, s.y, channels_last);
    if (s.N * s.y_plane() == 0) return y;
    Filters<T> filters{pw, false, channels_last};
    product(op, s, forward_space(s), px, filters, end, py, s.C / s.G, s.K / s.G, algorithm);
    return y;
  });
}

Tensor conv_fwd(const Tensor& x, const Tensor& w, const OptionalTensor& b, Ints stride, Ints padding, Ints dilation,
                int64_t groups, bool channels_last, std::string algorithm) {
  OpScope op("conv_fwd", x);
  return forward(op, x, w, b, {}, stride, padding, dilation, groups, channels_last, algorithm, -1, {});
}

Tensor conv_act_fwd(const Tensor& x, const Tensor& w, const OptionalTensor& b, const OptionalTensor& residual,
                    Ints stride, Ints padding, Ints dilation, int64_t groups, bool channels_last, std::string algorithm,
                    int64_t kind, double pa, double pb, double pc) {
  OpScope op("conv_act_fwd", x);
  activation::check_kind(op, kind);
  return forward(op, x, w, b, residual, stride, padding, dilation, groups, channels_last, algorithm, kind,
                 {pa, pb, pc});
}

Tensor conv_dgrad(const Tensor& dy, const Tensor& w, const OptionalTensor& b, Ints size, Ints stride, Ints padding,
                  Ints dilation, int64_t groups, bool channels_last, std::string algorithm) {
  OpScope op("conv_dgrad", dy);
  const Sizes s = dgrad_sizes(op, dy, w, size, groups, channels_last, stride, padding, dilation);
  return dispatch_floating(op, dy.scalar_type(), [&]<class T>() {
    Tensor dx = image(op, dy.scalar_type(), s.N, s.C, s.x, channels_last);
    auto* pdy = image_in<T>(op, dy, "dy", s.N, s.K, s.y, channels_last);
    auto* pw = image_in<T>(op, w, "w", s.K, s.C / s.G, s.r, channels_last);
    const Epilogue<T> end{op.in_optional<T>(b, "b", {s.C})};
    auto* pdx = image_out<T>(op, dx, "dx", s.N, s.C, s.x, channels_last);
    if (s.N == 0) return dx;
    Filters<T> filters{pw, true, channels_last};
    each_phase(
        s, [&](const Space& space) { product(op, s, space, pdy, filters, end, pdx, s.K / s.G, s.C / s.G, algorithm); });
    return dx;
  });
}

Tensor conv_wgrad(const Tensor& dy, const Tensor& x, Ints taps, Ints stride, Ints padding, Ints dilation,
                  int64_t groups, bool channels_last, std::string algorithm) {
  OpScope op("conv_wgrad", dy);
  const Sizes s = wgrad_sizes(op, dy, x, taps, groups, channels_last, stride, padding, dilation);
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    using A = accumulate_t<T>;
    Tensor dw = image(op, x.scalar_type(), s.K, s.C / s.G, s.r, channels_last);
    auto* pdy = image_in<T>(op, dy, "dy", s.N, s.K, s.y, channels_last);
    auto* px = image_in<T>(op, x, "x", s.N, s.C, s.x, channels_last);
    auto* pdw = image_out<T>(op, dw, "dw", s.K, s.C / s.G, s.r, channels_last);
    const Space space = forward_space(s);
    const int64_t K = s.K / s.G, C = s.C / s.G, columns = s.taps() * C, pixels = s.N * space.positions();
    op.check(pixels < (int64_t(1) << 31), "more than 2^31 output positions");
    const auto stream = static_cast<cudaStream_t>(op.stream());
    const auto sum = [&](const A* part, int64_t splits) {
      launch(wgrad_sum_kernel<T>,
             {.grid = dim3(static_cast<unsigned>(ceil_div(s.K * columns, 256))), .block = dim3(256), .stream = stream},
             part, pdw, s.K, static_cast<int>(splits), static_cast<int>(s.taps()), static_cast<int>(C), channels_last);
    };
    if constexpr (hopper_built && is_half<T>)
      if (pixels > 0 && on_hopper<T>(s, space, C, K, channels_last, algorithm, px, pdy)) {
        const hopper::Shares shares = hopper::wgrad_shares(space, s.N, s.G, C, K);
        Tensor part = op.empty<A>({shares.count, s.K, columns});
        auto* to = op.out<A>(part, "workspace", {shares.count, s.K, columns});
        hopper::wgrad(
            hopper::Wgrad<T>{pdy, px, to, space, s.N, static_cast<int>(s.G), static_cast<int>(C), static_cast<int>(K)},
            shares, stream);
        sum(to, shares.count);
        return dw;
      }
    // Parts of dw that 64 MiB hold.
    const int64_t room = (int64_t(64) << 20) / int64_t(sizeof(A)) / std::max<int64_t>(s.K * columns, 1);
    const Strides in = strides_of(s.C, s.x_plane(), channels_last), out = strides_of(s.K, s.y_plane(), channels_last);
    if constexpr (sizeof(T) <= 4)
      if (pixels > 0 && few_serves<T>(space, C, s.G)) {
        // Enough blocks for the machine, each with at least eight tiles.
        const FewTiles shape = few_tiles(space, static_cast<int>(C));
        const int64_t tiles = s.N * space.d.count * shape.down * shape.across, width = columns <= tile ? 1 : 2;
        const int64_t blocks = ceil_div(K, tile) * ceil_div(columns, width * tile);
        const int64_t wanted = std::min({ceil_div(4 * multiprocessor_count(), blocks), ceil_div(tiles, 8), room});
        const int64_t range = ceil_div(tiles, std::max<int64_t>(wanted, 1)), splits = ceil_div(tiles, range);
        Tensor part = op.empty<A>({splits, s.K, columns});
        auto* to = op.out<A>(part, "workspace", {splits, s.K, columns});
        const FewWgradArguments<T> p{pdy,
                                     px,
                                     to,
                                     space,
                                     in,
                                     out,
                                     static_cast<unsigned>(tiles),
                                     static_cast<unsigned>(range),
                                     static_cast<int>(C),
                                     static_cast<int>(K),
                                     shape,
                                     is_vector(channels_last, pdy, K, s.K)};
        dispatch_product<T>(algorithm, [&]<Product P>() {
          const auto run = [&]<int Blocks>() {
            launch(few_wgrad_kernel<T, P, Blocks>,
                   {.grid = dim3(static_cast<unsigned>(splits), static_cast<unsigned>(ceil_div(K, tile)),
                                 static_cast<unsigned>(ceil_div(columns, Blocks * tile))),
                    .block = dim3(threads),
                    .smem = sizeof(FewWgradShared<T, Blocks>),
                    .stream = stream},
                   p);
          };
          width == 1 ? run.template operator()<1>() : run.template operator()<2>();
        });
        sum(to, splits);
        return dw;
      }
    // Enough blocks for the machine, each with at least eight steps of the reduction.
    const bool packed = are_packed(s.G, K);
    const Packing pack = packed ? packing_of<T>(s.G, C, K) : Packing{};
    const int64_t tiles = packed ? ceil_div(pack.count, units) * s.taps() * pack.chunks
                                 : ceil_div(K, tile) * ceil_div(columns, tile) * s.G;
    const int64_t most =
        std::min<int64_t>({ceil_div(pixels, 8 * depth<T>), room, grid_axis_limit() / (packed ? 1 : s.G)});
    const int64_t splits =
        std::clamp<int64_t>(ceil_div(4 * multiprocessor_count(), tiles), 1, std::max<int64_t>(most, 1));
    const int64_t range = ceil_div(ceil_div(std::max<int64_t>(pixels, 1), splits), depth<T>) * depth<T>;
    Tensor part = op.empty<A>({splits, s.K, columns});
    auto* to = op.out<A>(part, "workspace", {splits, s.K, columns});
    if (packed) {
      op.check(s.taps() * pack.chunks <= grid_axis_limit(), "too many taps");
      const GroupedWgradArguments<T> p{pdy,
                                       px,
                                       to,
                                       space,
                                       in,
                                       out,
                                       static_cast<unsigned>(pixels),
                                       static_cast<unsigned>(range),
                                       pack,
                                       is_vector(channels_last, pdy, pack.groups * K, s.K),
                                       is_vector(channels_last, px, pack.groups * C, s.C)};
      dispatch_product<T>(algorithm, [&]<Product P>() {
        launch(grouped_wgrad_kernel<T, P>,
               {.grid = dim3(static_cast<unsigned>(ceil_div(pack.count, units)),
                             static_cast<unsigned>(s.taps() * pack.chunks), static_cast<unsigned>(splits)),
                .block = dim3(threads),
                .smem = sizeof(GroupedWgradShared<T>),
                .stream = stream},
               p);
      });
      sum(to, splits);
      return dw;
    }
    // several slices of groups have one split: parts of a split are not those of a slice
    each_slice(s.G, grid_axis_limit() / splits, [&](int64_t first, int64_t groups) {
      const WgradArguments<T> p{pdy + first * K * out.channel,
                                px + first * C * in.channel,
                                to + first * K * columns,
                                space,
                                in,
                                out,
                                static_cast<unsigned>(pixels),
                                static_cast<unsigned>(range),
                                static_cast<int>(C),
                                static_cast<int>(K),
                                static_cast<int>(groups),
                                is_vector(channels_last, pdy, K, s.K),
                                is_vector(channels_last, px, C, s.C)};
      dispatch_product<T>(algorithm, [&]<Product P>() {
        launch(wgrad_kernel<T, P>,
               {.grid = dim3(static_cast<unsigned>(ceil_div(K, tile)), static_cast<unsigned>(ceil_div(columns, tile)),
                             static_cast<unsigned>(groups * splits)),
                .block = dim3(threads),
                .smem = sizeof(WgradShared<T>),
                .stream = stream},
               p);
      });
    });
    sum(to, splits);
    return dw;
  });
}

}  // namespace
}  // namespace pyops

PYOPS_LIBRARY(m) {
  using namespace pyops;
  PYOPS_IMPL(m, conv_fwd);
  PYOPS_IMPL(m, conv_act_fwd);
  PYOPS_IMPL(m, conv_dgrad);
  PYOPS_IMPL(m, conv_wgrad);
}
