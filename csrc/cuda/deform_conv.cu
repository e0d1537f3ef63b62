// deform_conv · CUDA, sm_80
//   col[i,(g,t,c)] = m[n,o,t,i] x[n](place i of tap t + offset[n,o,t,i])      bilinear; o: offset group of the channel
//   y[i,k] = sum over (t,c) of the group of w[k,t,c] col[i,(g,t,c)]
//   dcol = dy w · dw = dy^T col · dx, doffset, dm: the gradients of a sample (docs/math/detection.md)
// layout   x: [N, H, W, C] · w: [K, R, S, C/G] · offset: [N, O, taps, 2, P, Q] · m: [N, O, taps, P, Q]
//          y: [N, P, Q, K]
// mapping  columns of a block of places are written by a thread for each vector of channels, then multiplied as a 1 x 1
//          convolution (conv_gemm.cuh). doffset, dm: lanes over channels, one group of lanes for each sample. dx
//          gathers: a block owns a tile of pixels, collects the samples that touch it in order and adds their shares;
//          no atomics, so bitwise repeatable
// memory   columns (and their gradient) of as many places as fit in `workspace` bytes
// numerics A; columns are stored as T. algorithm: "tf32", else fp32 products on CUDA cores
#include "cuda/compact.cuh"
#include "cuda/conv_gemm.cuh"

#include "common/deform_conv.h"

namespace pyops::deform {
namespace {

template <class T>
struct Inputs {
  const T *x, *offset, *mask;
};

// Places [first, first + count) of all images; image n has those from n * places() on.
struct Block {
  int64_t first;
  unsigned count;
};

template <class T>
PYOPS_DEVICE Sample<accumulate_t<T>> sample(const Sizes& s, const Inputs<T>& in, int64_t n, int64_t o, int64_t t,
                                            int64_t place) {
  const T* at = in.offset + ((n * s.O + o) * s.taps() + t) * 2 * s.places() + place;
  return sample_of(s, t, place / s.Q, place % s.Q, to_acc(__ldg(at)), to_acc(__ldg(at + s.places())));
}
template <class T>
PYOPS_DEVICE accumulate_t<T> weight(const Sizes& s, const Inputs<T>& in, int64_t n, int64_t o, int64_t t,
                                    int64_t place) {
  if (in.mask == nullptr) return 1;
  return to_acc(__ldg(in.mask + ((n * s.O + o) * s.taps() + t) * s.places() + place));
}

// A thread for each vector of V channels of each column.
template <class T, int V>
__global__ void __launch_bounds__(256)
    deform_conv_columns_kernel(Inputs<T> in, T* __restrict__ col, Sizes s, Block block) {
  using A = accumulate_t<T>;
  const unsigned vectors = static_cast<unsigned>(s.C / s.G / V), taps = static_cast<unsigned>(s.taps());
  const unsigned i = blockIdx.x * 256 + threadIdx.x;  // less than 2^31: see places_of_block
  const unsigned row = i / vectors, v = i - row * vectors, place_group = row / taps, t = row - place_group * taps;
  const unsigned local = place_group / static_cast<unsigned>(s.G), g = place_group - local * static_cast<unsigned>(s.G);
  if (local >= block.count) return;
  const int64_t n = (block.first + local) / s.places(), place = (block.first + local) - n * s.places();
  const int64_t c = g * (s.C / s.G) + v * V, o = c / (s.C / s.O);
  const Sample<A> at = sample(s, in, n, o, t, place);
  const A m = weight(s, in, n, o, t, place);
  A sum[V];
#pragma unroll
  for (int k = 0; k < V; ++k) sum[k] = at.inside ? A(0) : m * A(0);  // a mask that is not finite shows
  if (at.inside) {
    const T* image = in.x + n * s.H * s.W * s.C + c;
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      const int a = corner / 2, b = corner % 2;
      if (!at.valid(a, b, s)) continue;
      const Vec<T, V> from = load_vec_readonly<V>(image + at.pixel(a, b, s) * s.C);
      const A w = m * at.weight(a, b);
#pragma unroll
      for (int k = 0; k < V; ++k) sum[k] += w * to_acc(from[k]);
    }
  }
  Vec<T, V> out;
#pragma unroll
  for (int k = 0; k < V; ++k) out[k] = from_acc<T>(sum[k]);
  store_vec(col + static_cast<int64_t>(i) * V, out);
}

// Where channel c of tap t stands in the columns of a place.
PYOPS_DEVICE int64_t column_of(const Sizes& s, int64_t t, int64_t c) {
  const int64_t per_group = s.C / s.G, g = c / per_group;
  return (g * s.taps() + t) * per_group + c - g * per_group;
}

// doffset and dmask: `Lanes` lanes for each sample, over its offset group's channels.
template <class T, int V, int Lanes>
__global__ void __launch_bounds__(256)
    deform_conv_doffset_kernel(Inputs<T> in, const T* __restrict__ dcol, T* __restrict__ doffset, T* __restrict__ dmask,
                               Sizes s, Block block) {
  using A = accumulate_t<T>;
  const int64_t unit = (static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x) / Lanes;
  const int lane = threadIdx.x % Lanes;
  const bool valid = unit < s.O * s.taps() * block.count;  // all lanes of a warp take part in the sums below
  const int64_t tap = valid ? unit / block.count : 0, local = valid ? unit - tap * block.count : 0;
  const int64_t o = tap / s.taps(), t = tap - o * s.taps(), width = s.C / s.O;
  const int64_t n = (block.first + local) / s.places(), place = block.first + local - n * s.places();
  const Sample<A> at = sample(s, in, n, o, t, place);
  A dot[4] = {};
  if (valid && at.inside) {
    const T* image = in.x + n * s.H * s.W * s.C;
    const T* row = dcol + local * s.depth();
    for (int64_t c = o * width + lane * V; c < (o + 1) * width; c += Lanes * V) {
      const Vec<T, V> d = load_vec_readonly<V>(row + column_of(s, t, c));
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        const int a = corner / 2, b = corner % 2;
        if (!at.valid(a, b, s)) continue;
        const Vec<T, V> from = load_vec_readonly<V>(image + at.pixel(a, b, s) * s.C + c);
#pragma unroll
        for (int k = 0; k < V; ++k) dot[corner] += to_acc(d[k]) * to_acc(from[k]);
      }
    }
  }
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) dot[corner] = warp_sum<Lanes>(dot[corner]);
  if (!valid || lane != 0) return;
  const A m = weight(s, in, n, o, t, place);
  const int64_t to = ((n * s.O + o) * s.taps() + t) * s.places() + place, tap_at = to - place;
  A dy = 0, dx = 0, dm = 0;
  if (at.inside) {
    dy = m * ((A(1) - at.right) * (dot[2] - dot[0]) + at.right * (dot[3] - dot[1]));
    dx = m * ((A(1) - at.down) * (dot[1] - dot[0]) + at.down * (dot[3] - dot[2]));
    dm = at.weight(0, 0) * dot[0] + at.weight(0, 1) * dot[1] + at.weight(1, 0) * dot[2] + at.weight(1, 1) * dot[3];
  }
  doffset[2 * tap_at + place] = from_acc<T>(dy);
  doffset[2 * tap_at + s.places() + place] = from_acc<T>(dx);
  if (dmask != nullptr) dmask[to] = from_acc<T>(dm);
}

constexpr int gather_threads = 256, tile_side = 8;

template <class A>
struct Found {
  A m, down, right;
  int row, column, t;  // relative to the tile
  unsigned local;
};
template <class A>
struct GatherShared {
  Found<A> found[gather_threads];
  CompactScratch<gather_threads> compact;
};

// A block owns 8 x 8 pixels of one image and 32 V channels of one offset group: warp w its row w, a lane V channels.
// sum holds what earlier blocks of places gave an image that they share.
template <class T, int V>
__global__ void __launch_bounds__(gather_threads, 2)
    deform_conv_dx_kernel(Inputs<T> in, const T* __restrict__ dcol, accumulate_t<T>* sum, T* dx, Sizes s, Block block,
                          int64_t image0, unsigned tiles_x, unsigned tiles) {
  using A = accumulate_t<T>;
  auto& shared = shared_storage<GatherShared<A>>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t n = image0 + blockIdx.x / tiles, width = s.C / s.O, T_ = s.taps();
  const unsigned tile = blockIdx.x % tiles;
  const int64_t row0 = static_cast<int64_t>(tile / tiles_x) * tile_side;
  const int64_t column0 = static_cast<int64_t>(tile % tiles_x) * tile_side;
  const int64_t chunks = ceil_div(width, 32 * V), o = blockIdx.y / chunks;
  const int64_t c = o * width + (blockIdx.y % chunks * 32 + lane) * V;
  const bool owns = c < (o + 1) * width;
  // places of this image in the block
  const int64_t start = n * s.places(), end = start + s.places();
  const int64_t low = start > block.first ? start : block.first;
  const int64_t high = end < block.first + block.count ? end : block.first + block.count;
  const int64_t here = high - low;
  A total[tile_side][V] = {};
  for (int64_t from = 0; from < T_ * here; from += gather_threads) {
    const int64_t candidate = from + threadIdx.x;
    Found<A> mine{};
    bool hit = false;
    if (candidate < T_ * here) {
      const int64_t t = candidate / here, place = low - start + candidate % here;
      const Sample<A> at = sample(s, in, n, o, t, place);
      hit =
          at.inside && at.y + 1 >= row0 && at.y < row0 + tile_side && at.x + 1 >= column0 && at.x < column0 + tile_side;
      if (hit)
        mine = {weight(s, in, n, o, t, place),
                at.down,
                at.right,
                static_cast<int>(at.y - row0),
                static_cast<int>(at.x - column0),
                static_cast<int>(t),
                static_cast<unsigned>(start + place - block.first)};
    }
    const auto [place, count] = compact(hit, shared.compact);
    if (hit) shared.found[place] = mine;
    __syncthreads();
    for (int k = 0; k < count; ++k) {
      const Found<A>& f = shared.found[k];
      if (f.row != warp && f.row + 1 != warp) continue;
      if (!owns) continue;
      const A wy = f.m * (f.row == warp ? A(1) - f.down : f.down);
      const Vec<T, V> d = load_vec_readonly<V>(dcol + f.local * s.depth() + column_of(s, f.t, c));
#pragma unroll
      for (int x = 0; x < tile_side; ++x) {
        if (f.column != x && f.column + 1 != x) continue;
        const A w = wy * (f.column == x ? A(1) - f.right : f.right);
#pragma unroll
        for (int v = 0; v < V; ++v) total[x][v] += w * to_acc(d[v]);
      }
    }
    __syncthreads();
  }
  const int64_t row = row0 + warp;
  if (row >= s.H || !owns) return;
#pragma unroll
  for (int x = 0; x < tile_side; ++x) {
    if (column0 + x >= s.W) break;
    const int64_t to = ((n * s.H + row) * s.W + column0 + x) * s.C + c;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const A value = low == start ? total[x][v] : sum[to + v] + total[x][v];
      if (high == end)
        dx[to + v] = from_acc<T>(value);
      else
        sum[to + v] = value;
    }
  }
}

// dw = sum of the shares of all blocks of places, in order: total holds that of the blocks so far.
template <class T>
__global__ void __launch_bounds__(256)
    deform_conv_dw_kernel(const accumulate_t<T>* __restrict__ part, accumulate_t<T>* __restrict__ total,
                          T* __restrict__ dw, int64_t elements, int shares, bool first, bool last) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= elements) return;
  accumulate_t<T> sum = first ? accumulate_t<T>(0) : total[i];
  for (int share = 0; share < shares; ++share) sum += part[share * elements + i];
  if (last)
    dw[i] = from_acc<T>(sum);
  else
    total[i] = sum;
}

}  // namespace
}  // namespace pyops::deform

// binding

#include "common/registry.h"

namespace pyops {
namespace {

using namespace deform;
using Ints = std::vector<int64_t>;

// Calls f.template operator()<Product>() for the products that T has.
template <class T, class F>
void dispatch_product(const std::string& algorithm, F&& f) {
  using conv::Product;
  if constexpr (std::is_same_v<T, float>) {
    if (algorithm == "tf32") return f.template operator()<Product::tf32>();
    f.template operator()<Product::simt>();
  } else if constexpr (std::is_same_v<T, double>) {
    f.template operator()<Product::simt>();
  } else {
    f.template operator()<Product::half>();
  }
}

// One call: what stays the same over its blocks of places.
template <class T>
struct Call {
  using A = accumulate_t<T>;
  const OpScope& op;
  const Sizes& s;
  Inputs<T> in;
  cudaStream_t stream;
  const std::string& algorithm;
  bool vectors;  // 16 bytes of channels never cross a group

  // rows of a matrix as positions of a one-dimensional image
  static conv::Space rows_of(unsigned rows) {
    const conv::Axis one{1, 1, 0, 1, 1, 1, 0, 1, 1, 0, 1};
    const auto n = static_cast<int32_t>(rows);
    return {one, one, {n, n, 0, 1, 1, 1, 0, 1, n, 0, 1}};
  }

  // y[row, g, m] = sum over c of x[row, g, c] w[g, m, c]
  void product(const T* x, const T* w, T* y, unsigned rows, int64_t C, int64_t M) const {
    const auto vector = [](const T* p, int64_t width) { return width % conv::vector<T> == 0 && is_aligned(p); };
    const conv::ConvArguments<T> p{x,
                                   w,
                                   {},
                                   y,
                                   rows_of(rows),
                                   {0, s.G * C, 1},
                                   {0, s.G * M, 1},
                                   rows,
                                   static_cast<int>(C),
                                   static_cast<int>(M),
                                   1,
                                   1,
                                   1,
                                   vector(x, C),
                                   vector(w, C)};
    dispatch_product<T>(algorithm, [&]<conv::Product P>() {
      launch(conv::conv_kernel<T, P>,
             {.grid = dim3(static_cast<unsigned>(ceil_div(rows, conv::tile)),
                           static_cast<unsigned>(ceil_div(M, conv::tile)), static_cast<unsigned>(s.G)),
              .block = dim3(conv::threads),
              .smem = sizeof(conv::ConvShared<T>),
              .stream = stream},
             p);
    });
  }

  // part[share, g, m, c] = sum over a range of rows of dy[row, g, m] x[row, g, c]
  void weight_product(const T* dy, const T* x, A* part, unsigned rows, int64_t range, int64_t shares) const {
    const int64_t M = s.K / s.G, C = s.depth() / s.G;
    const auto vector = [](const T* p, int64_t width) { return width % conv::vector<T> == 0 && is_aligned(p); };
    const conv::WgradArguments<T> p{dy,
                                    x,
                                    part,
                                    rows_of(rows),
                                    {0, s.depth(), 1},
                                    {0, s.K, 1},
                                    rows,
                                    static_cast<unsigned>(range),
                                    static_cast<int>(C),
                                    static_cast<int>(M),
                                    static_cast<int>(s.G),
                                    vector(dy, M),
                                    vector(x, C)};
    dispatch_product<T>(algorithm, [&]<conv::Product P>() {
      launch(conv::wgrad_kernel<T, P>,
             {.grid = dim3(static_cast<unsigned>(ceil_div(M, conv::tile)),
                           static_cast<unsigned>(ceil_div(C, conv::tile)), static_cast<unsigned>(s.G * shares)),
              .block = dim3(conv::threads),
              .smem = sizeof(conv::WgradShared<T>),
              .stream = stream},
             p);
    });
  }

  void columns(T* col, const Block& block) const {
    const auto run = [&](auto kernel, int64_t V) {
      launch(kernel,
             {.grid = dim3(static_cast<unsigned>(ceil_div(block.count * s.depth() / V, 256))),
              .block = dim3(256),
              .stream = stream},
             in, col, s, block);
    };
    constexpr int V = conv::vector<T>;
    if (vectors)
      run(deform_conv_columns_kernel<T, V>, V);
    else
      run(deform_conv_columns_kernel<T, 1>, 1);
  }

  void gradients(const T* dcol, A* sum, T* dx, T* doffset, T* dmask, const Block& block) const {
    constexpr int V = conv::vector<T>;
    const int64_t width = s.C / s.O, samples = s.O * s.taps() * block.count;
    const auto offsets = [&](auto kernel, int64_t lanes) {
      launch(
          kernel,
          {.grid = dim3(static_cast<unsigned>(ceil_div(samples * lanes, 256))), .block = dim3(256), .stream = stream},
          in, dcol, doffset, dmask, s, block);
    };
    if (vectors && width >= 16 * V)
      offsets(deform_conv_doffset_kernel<T, V, 32>, 32);
    else if (vectors)
      offsets(deform_conv_doffset_kernel<T, V, 8>, 8);
    else
      offsets(deform_conv_doffset_kernel<T, 1, 32>, 32);
    const int64_t first = block.first / s.places(), last = (block.first + block.count - 1) / s.places();
    const int64_t tiles_x = ceil_div(s.W, tile_side), tiles = tiles_x * ceil_div(s.H, tile_side);
    op.check((last - first + 1) * tiles < (int64_t{1} << 31), "x must have less than 2^31 tiles of pixels");
    const auto gather = [&](auto kernel, int64_t v) {
      launch(kernel,
             {.grid = dim3(static_cast<unsigned>((last - first + 1) * tiles),
                           static_cast<unsigned>(s.O * ceil_div(width, 32 * v))),
              .block = dim3(gather_threads),
              .smem = sizeof(GatherShared<A>),
              .stream = stream},
             in, dcol, sum, dx, s, block, first, static_cast<unsigned>(tiles_x), static_cast<unsigned>(tiles));
    };
    if (vectors)
      gather(deform_conv_dx_kernel<T, V>, V);
    else
      gather(deform_conv_dx_kernel<T, 1>, 1);
  }
};

template <class T>
Call<T> call_of(const OpScope& op, const Sizes& s, const Tensor& x, const Tensor& offset, const OptionalTensor& mask,
                const std::string& algorithm) {
  const int64_t moves = s.O * s.taps();
  const Inputs<T> in{op.in<T>(x, "x", {s.N, s.H, s.W, s.C}), op.in<T>(offset, "offset", {s.N, 2 * moves, s.P, s.Q}),
                     op.in_optional<T>(mask, "mask", {s.N, moves, s.P, s.Q})};
  const int64_t V = conv::vector<T>;
  const bool vectors = s.C / s.G % V == 0 && s.C / s.O % V == 0 && is_aligned(in.x);
  return {op, s, in, static_cast<cudaStream_t>(op.stream()), algorithm, vectors};
}

// Places of one block: `copies` matrices of columns fit in the workspace, and indices in 31 bits.
template <class T>
int64_t places_of_block(const Sizes& s, int64_t workspace, int64_t copies) {
  const int64_t row = s.depth() * copies * int64_t(sizeof(T)), most = (int64_t{1} << 30) / s.depth();
  return std::clamp<int64_t>(std::min(workspace / row, most), 1, std::max<int64_t>(s.N * s.places(), 1));
}

template <class F>
void each_block(const Sizes& s, int64_t count, F&& f) {
  const int64_t places = s.N * s.places();
  for (int64_t first = 0; first < places; first += count)
    f(Block{first, static_cast<unsigned>(std::min(count, places - first))});
}

Tensor deform_conv_fwd(const Tensor& x, const Tensor& offset, const OptionalTensor& mask, const Tensor& w, Ints stride,
                       Ints padding, Ints dilation, std::string algorithm, int64_t workspace) {
  OpScope op("deform_conv_fwd", x);
  const Sizes s = sizes_of(op, x, offset, mask, w, stride, padding, dilation);
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    Tensor y = op.empty<T>({s.N, s.P, s.Q, s.K});
    const auto call = call_of<T>(op, s, x, offset, mask, algorithm);
    auto* pw = op.in<T>(w, "w", {s.K, s.R, s.S, s.C / s.G});
    auto* py = op.out<T>(y, "y", {s.N, s.P, s.Q, s.K});
    if (s.N * s.K == 0) return y;
    const int64_t count = places_of_block<T>(s, workspace, 1);
    Tensor col = op.empty<T>({count, s.depth()});
    auto* pcol = op.out<T>(col, "columns", {count, s.depth()});
    each_block(s, count, [&](const Block& block) {
      call.columns(pcol, block);
      call.product(pcol, pw, py + block.first * s.K, block.count, s.depth() / s.G, s.K / s.G);
    });
    return y;
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> deform_conv_bwd(const Tensor& dy, const Tensor& x, const Tensor& offset,
                                                           const OptionalTensor& mask, const Tensor& w, Ints stride,
                                                           Ints padding, Ints dilation, std::string algorithm,
                                                           int64_t workspace, bool of_data, bool of_weight) {
  OpScope op("deform_conv_bwd", dy);
  const Sizes s = sizes_of(op, x, offset, mask, w, stride, padding, dilation);
  return dispatch_floating(op, x.scalar_type(), [&]<class T>() {
    using A = accumulate_t<T>;
    const auto call = call_of<T>(op, s, x, offset, mask, algorithm);
    const int64_t moves = s.O * s.taps(), Kg = s.K / s.G, wide = s.depth() / s.G;
    auto* pdy = op.in<T>(dy, "dy", {s.N, s.P, s.Q, s.K});
    auto* pw = op.in<T>(w, "w", {s.K, s.R, s.S, s.C / s.G});
    Tensor dx = op.empty<T>({0}), doffset = op.empty<T>({0}), dmask = op.empty<T>({0}), dw = op.empty<T>({0});
    if (of_data) {
      dx = op.empty<T>({s.N, s.H, s.W, s.C});
      doffset = op.empty<T>({s.N, 2 * moves, s.P, s.Q});
      if (mask.has_value()) dmask = op.empty<T>({s.N, moves, s.P, s.Q});
    }
    if (of_weight) dw = op.empty<T>({s.K, s.R, s.S, s.C / s.G});
    const int64_t count = places_of_block<T>(s, workspace, 1);
    const int64_t blocks = ceil_div(s.N * s.places(), count);
    if (of_data && s.N > 0) {
      auto* pdx = op.out<T>(dx, "dx", {s.N, s.H, s.W, s.C});
      auto* pdoffset = op.out<T>(doffset, "doffset", {s.N, 2 * moves, s.P, s.Q});
      T* pdmask = mask.has_value() ? op.out<T>(dmask, "dmask", {s.N, moves, s.P, s.Q}) : nullptr;
      // half an image's gradient waits in A for the other half
      const bool split = blocks > 1 && !std::is_same_v<T, A>;
      Tensor partial = op.empty<A>({split ? s.N * s.H * s.W * s.C : 0});
      A* sum = split ? op.out<A>(partial, "partial", {s.N * s.H * s.W * s.C}) : nullptr;
      if constexpr (std::is_same_v<T, A>) sum = pdx;
      Tensor dcol = op.empty<T>({count, s.depth()}), turned = op.empty<T>({s.depth(), Kg});
      auto* pdcol = op.out<T>(dcol, "columns", {count, s.depth()});
      auto* pturned = op.out<T>(turned, "filters", {s.depth(), Kg});
      launch(conv::arrange_weights_kernel<T>,
             {.grid = dim3(static_cast<unsigned>(s.depth()), static_cast<unsigned>(ceil_div(Kg, 256))),
              .block = dim3(256),
              .stream = call.stream},
             pw, pturned, static_cast<int>(wide), 1, static_cast<int>(Kg), Kg * wide, int64_t{1}, int64_t{0}, wide);
      each_block(s, count, [&](const Block& block) {
        call.product(pdy + block.first * s.K, pturned, pdcol, block.count, Kg, wide);
        call.gradients(pdcol, sum, pdx, pdoffset, pdmask, block);
      });
    }
    if (of_weight && s.K > 0) {
      auto* pdw = op.out<T>(dw, "dw", {s.K, s.R, s.S, s.C / s.G});
      const int64_t elements = s.K * wide;
      if (blocks == 0) zero_memory(pdw, size_t(elements) * sizeof(T), call.stream);
      // a block of places is split further where its tiles do not fill the machine
      const int64_t tiles = ceil_div(Kg, conv::tile) * ceil_div(wide, conv::tile) * s.G;
      const int64_t most = std::min<int64_t>(
          {workspace / int64_t(sizeof(A)) / elements, 65535 / s.G, ceil_div(count, 8 * conv::depth<T>)});
      const int64_t shares =
          std::clamp<int64_t>(ceil_div(4 * multiprocessor_count(), tiles), 1, std::max<int64_t>(most, 1));
      const int64_t range = ceil_div(ceil_div(count, shares), conv::depth<T>) * conv::depth<T>;
      op.check(s.G <= 65535, "too many groups");
      Tensor part = op.empty<A>({shares, s.K, wide}), total = op.empty<A>({s.K, wide});
      Tensor col = op.empty<T>({count, s.depth()});
      auto* ppart = op.out<A>(part, "workspace", {shares, s.K, wide});
      auto* ptotal = op.out<A>(total, "sum", {s.K, wide});
      auto* pcol = op.out<T>(col, "columns", {count, s.depth()});
      each_block(s, count, [&](const Block& block) {
        call.columns(pcol, block);
        call.weight_product(pdy + block.first * s.K, pcol, ppart, block.count, range, shares);
        launch(
            deform_conv_dw_kernel<T>,
            {.grid = dim3(static_cast<unsigned>(ceil_div(elements, 256))), .block = dim3(256), .stream = call.stream},
            ppart, ptotal, pdw, elements, static_cast<int>(shares), block.first == 0,
            block.first + block.count == s.N * s.places());
      });
    }
    return std::make_tuple(dx, doffset, dmask, dw);
  });
}

}  // namespace
}  // namespace pyops

PYOPS_LIBRARY(m) {
  using namespace pyops;
  PYOPS_IMPL(m, deform_conv_fwd);
  PYOPS_IMPL(m, deform_conv_bwd);
}
