// conv · CUDA, sm_90a
//   product  y[n,k,o] = f(r[n,k,o] + bias[k] + sum over (tap, c) of w[k,tap,c] * x[n,c, o at the tap]), f and r optional:
//            forward and input gradient
//   wgrad    part[i,k,tap,c] = sum over the i-th share of the pixels of dy[k,o] * x[c, o at the tap]
// layout   channels last; w: [G, K, taps, C]; C and K are those of a group
// mapping  implicit GEMM by wgmma: one producer warp feeds a ring of tiles in shared memory by TMA im2col, two consumer
//          warpgroups multiply. The product's block takes tile after tile, and loads the next one while it stores.
//          A tile of the product is Filters x Pixels, the sum runs over taps and blocks of 64 channels; one of wgrad is
//          Filters x (Blocks of 64 channels at one tap each), the sum runs over 64 pixels at a time. A tile is in one
//          group: its channels and filters are coordinates in the maps of all
// memory   tiles from L2; each block of 64 channels of a tile of x once for every tap
// numerics fp32 sums in a fixed order, rounded to T before residual and activation; wgrad's parts are added by
//          wgrad_sum_kernel (conv_gemm.cuh)
#include "cuda/conv_hopper.cuh"

namespace pyops::conv::hopper {
namespace {

constexpr int depth = 64;     // of a tile along the sum: 128 bytes, the width of the swizzle
constexpr int consumers = 2;  // warpgroups
constexpr int threads = 128 * (1 + consumers);
constexpr int ring_bytes = 192 << 10;

// A ring of tiles between the producer and the consumers.
template <class Tile, int Stages>
struct Ring {
  Tile tile[Stages];
  uint64_t full[Stages], empty[Stages];
};
struct Turn {
  int stage = 0;
  uint32_t parity = 0;
  template <int Stages>
  PYOPS_DEVICE void next() {
    if (++stage == Stages) stage = 0, parity ^= 1;
  }
};
template <class Tile, int Stages>
PYOPS_DEVICE void open_ring(Ring<Tile, Stages>& ring) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < Stages; ++i) {
      mbarrier_init(&ring.full[i], 1);
      mbarrier_init(&ring.empty[i], 4 * consumers);  // one thread of every warp
    }
    fence_barrier_init();
  }
  __syncthreads();
}

// How the positions of a Space are found in its tensor map.
struct Geometry {
  int rank;
  Space space;
  int lower[3], offset[3];  // W, H, D
};
template <class T>
PYOPS_DEVICE void load_image(T* to, const TensorMap& map, uint64_t* full, const Geometry& g, const Position& o,
                             const Tap& t, int c) {
  const Space& s = g.space;
  const int n = static_cast<int>(o.n), w = g.lower[0] + o.w * s.w.in_step, h = g.lower[1] + o.h * s.h.in_step,
            d = g.lower[2] + o.d * s.d.in_step;
  const auto ow = static_cast<uint16_t>(g.offset[0] + t.w * s.w.tap_step),
             oh = static_cast<uint16_t>(g.offset[1] + t.h * s.h.tap_step),
             od = static_cast<uint16_t>(g.offset[2] + t.d * s.d.tap_step);
  if (g.rank == 3)
    tma_load_im2col(to, map, full, {c, w, n}, {ow});
  else if (g.rank == 4)
    tma_load_im2col(to, map, full, {c, w, h, n}, {ow, oh});
  else
    tma_load_im2col(to, map, full, {c, w, h, d, n}, {ow, oh, od});
}

// forward and gradient in the input

struct ProductArguments {
  Geometry geometry;
  int64_t example, position;                          // strides of y
  unsigned pixels, tiles, filter_tiles, group_tiles;  // filter_tiles: of all groups
  int C, K, taps_h, taps_w;                           // C and K of one group
  bool dense;                                         // the positions are all of y, in order
};
// Where a tile of filters lies.
struct FilterTile {
  int group, k0;  // k0: in the group
  PYOPS_DEVICE FilterTile(const ProductArguments& p, unsigned tile, int filters) {
    const unsigned index = tile % p.filter_tiles;
    group = static_cast<int>(index / p.group_tiles);
    k0 = static_cast<int>(index % p.group_tiles) * filters;
  }
};

// Filters are read as they are stored. With Major::k, [K, taps, C], a line of w holds the channels of one filter; with
// Major::mn, [C, taps, K], line i of each 64 holds 64 filters of channel i.
template <class T, int Filters, int Pixels>
struct ProductTile {
  alignas(1024) T w[Filters][depth];
  alignas(1024) T x[Pixels][depth];
};
template <class T, int Filters, int Pixels>
struct ProductShared {
  static constexpr int stages = ring_bytes / static_cast<int>(sizeof(ProductTile<T, Filters, Pixels>));
  Ring<ProductTile<T, Filters, Pixels>, stages> ring;
  alignas(16) T y[consumers][2][64][64];  // 64 pixels of 64 filters, in 16-byte chunks that are permuted by the pixel
};

template <class T, Major W, int Filters, int Pixels>
PYOPS_DEVICE void produce(ProductShared<T, Filters, Pixels>& s, const TensorMap& map_x, const TensorMap& map_w,
                          const ProductArguments& p) {
  constexpr int stages = ProductShared<T, Filters, Pixels>::stages;
  const Space& space = p.geometry.space;
  Turn turn;
  for (unsigned tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
    const FilterTile at(p, tile, Filters);
    const Position first = position(space, tile / p.filter_tiles * Pixels);
    for (int j = 0; j < space.taps(); ++j) {
      const Tap t = tap_of(space, j);
      const int filter_tap =
          ((space.d.w_base + t.d * space.d.w_step) * p.taps_h + space.h.w_base + t.h * space.h.w_step) * p.taps_w +
          space.w.w_base + t.w * space.w.w_step;
      for (int c = 0; c < p.C; c += depth) {
        auto& to = s.ring.tile[turn.stage];
        uint64_t* full = &s.ring.full[turn.stage];
        mbarrier_wait(&s.ring.empty[turn.stage], turn.parity ^ 1);
        mbarrier_arrive_expect_tx(full, sizeof to.w + sizeof to.x);
        load_image(to.x[0], map_x, full, p.geometry, first, t, at.group * p.C + c);
        if constexpr (W == Major::k) {
          tma_load_im2col(to.w[0], map_w, full, {c, 0, at.group * p.K + at.k0}, {static_cast<uint16_t>(filter_tap)});
        } else {
          for (int i = 0; i < Filters; i += 64)
            tma_load_im2col(to.w[i], map_w, full, {at.k0 + i, 0, at.group * p.C + c},
                            {static_cast<uint16_t>(filter_tap)});
        }
        turn.next<stages>();
      }
    }
  }
}

template <class T, Major W, int Filters, int Pixels>
PYOPS_DEVICE void consume(ProductShared<T, Filters, Pixels>& s, const Epilogue<T>& end, T* __restrict__ y,
                          const ProductArguments& p) {
  // Warpgroups share the filters of a tile where it has 128, else its pixels.
  constexpr int stages = ProductShared<T, Filters, Pixels>::stages, Columns = Pixels * Filters / (64 * consumers);
  const int group = threadIdx.x / 128 - 1, t = threadIdx.x % 128, warp = t / 32, lane = t % 32;
  const int filter0 = Filters == 64 ? 0 : group * 64, pixel0 = Filters == 64 ? group * Columns : 0;
  const int steps = p.geometry.space.taps() * static_cast<int>(ceil_div(p.C, depth));
  Turn turn;
  for (unsigned tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
    float sum[Columns / 2];
    int previous = 0;
    for (int step = 0; step < steps; ++step) {
      const auto& from = s.ring.tile[turn.stage];
      mbarrier_wait(&s.ring.full[turn.stage], turn.parity);
      wgmma_fence();
#pragma unroll
      for (int c = 0; c < depth; c += 16) {
        const T* w = W == Major::k ? &from.w[filter0][c] : from.w[filter0 + c];
        wgmma_m64k16<T, Columns, W>(sum, smem_desc(w, W == Major::k ? 16 : 8192, 1024, Swizzle::b128),
                                    smem_desc(&from.x[pixel0][c], 16, 1024, Swizzle::b128), step > 0 || c > 0);
      }
      wgmma_commit();
      wgmma_wait<1>();
      if (step > 0 && lane == 0) mbarrier_arrive(&s.ring.empty[previous]);  // its product is done
      previous = turn.stage;
      turn.next<stages>();
    }
    wgmma_wait<0>();
    if (lane == 0) mbarrier_arrive(&s.ring.empty[previous]);

    const FilterTile place(p, tile, Filters);
    const int before = place.group * p.K;  // filters of the groups before
    const int k0 = before + place.k0 + filter0, K = before + p.K;
    const unsigned first = tile / p.filter_tiles * Pixels + pixel0;
    float add[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int k = k0 + warp * 16 + lane / 4 + i * 8;
      add[i] = end.bias != nullptr && k < K ? to_float(__ldg(end.bias + k)) : 0.0f;
    }
#pragma unroll
    for (int q = 0; q < Columns / 64; ++q) {
      auto& staged = s.y[group][q % 2];
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        uint32_t r[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* v = &sum[q * 32 + (j + i / 2) * 4 + i % 2 * 2];
          r[i] = pack2<T>(v[0] + add[i % 2], v[1] + add[i % 2]);
        }
        const int pixel = (j + lane / 16) * 8 + lane % 8, chunk = warp * 2 + lane / 8 % 2;
        stmatrix_x4_trans(&staged[pixel][(chunk ^ pixel % 8) * 8], r);
      }
      named_barrier_sync(1 + group, 128);  // once for each of two buffers: nobody still reads the other one
      const int chunk = t % 8, k = k0 + chunk * 8;
      const auto offset = [&](unsigned pixel) {
        if (p.dense) return pixel * p.position;
        const Position o = position(p.geometry.space, pixel);
        return o.n * p.example + p.geometry.space.output(o) * p.position;
      };
      if (end.kind >= 0) {
        with_epilogue(Epilogue<T>{nullptr, nullptr, end.kind, end.parameters}, [&](auto finish) {
#pragma unroll 1
          for (int row = t / 8; row < 64; row += 16) {
            const unsigned pixel = first + q * 64 + row;
            if (pixel >= p.pixels || k >= K) continue;
            const int64_t at = offset(pixel) + k;
            Vec<T, 8> v = load_vec<8>(&staged[row][(chunk ^ row % 8) * 8]), r{};
            if (end.residual != nullptr) r = load_vec_readonly<8>(end.residual + at);
#pragma unroll
            for (int e = 0; e < 8; ++e) v[e] = from_acc<T>(finish(to_acc(v[e]) + to_acc(r[e]), k, at));
            store_vec(y + at, v);
          }
        });
        continue;
      }
      const auto store = [&](int row, const auto& where) {
        const unsigned pixel = first + q * 64 + row;
        if (pixel < p.pixels && k < K)
          store_vec(y + where(pixel) + k, load_vec<8>(&staged[row][(chunk ^ row % 8) * 8]));
      };
      if (p.dense) {
#pragma unroll
        for (int row = t / 8; row < 64; row += 16) store(row, [&](unsigned pixel) { return pixel * p.position; });
      } else {
#pragma unroll 1
        for (int row = t / 8; row < 64; row += 16) store(row, offset);
      }
    }
  }
}

template <class T, Major W, int Filters, int Pixels>
__global__ void __launch_bounds__(threads, 1)
    conv_wgmma_kernel(const __grid_constant__ TensorMap map_x, const __grid_constant__ TensorMap map_w,
                      const __grid_constant__ Epilogue<T> end, T* __restrict__ y,
                      const __grid_constant__ ProductArguments p) {
  auto& s = shared_storage<ProductShared<T, Filters, Pixels>>();
  open_ring(s.ring);
  if (threadIdx.x < 128) {
    setmaxnreg_dec<40>();
    if (threadIdx.x == 0) produce<T, W>(s, map_x, map_w, p);
  } else {
    setmaxnreg_inc<232>();
    consume<T, W>(s, end, y, p);
  }
}

// gradient in the filter

struct WgradArguments {
  Geometry geometry;
  unsigned pixels, range;  // all; those of one block
  int G, C, K, columns, channel_blocks, blocks;
};
template <class T, int Filters, int Blocks>
struct WgradTile {
  alignas(1024) T dy[Filters / 64][depth][64];
  alignas(1024) T x[Blocks][depth][64];
};
template <class T, int Filters, int Blocks>
using WgradShared = Ring<WgradTile<T, Filters, Blocks>,
                         std::min(ring_bytes / static_cast<int>(sizeof(WgradTile<T, Filters, Blocks>)), 8)>;

template <class T, int Filters, int Blocks, int Stages>
PYOPS_DEVICE void produce(Ring<WgradTile<T, Filters, Blocks>, Stages>& ring, const TensorMap& map_dy,
                          const TensorMap& map_x, const WgradArguments& p, unsigned first, unsigned last, int group,
                          int k0, int block0) {
  const Space& space = p.geometry.space;
  Turn turn;
  for (unsigned pixel = first; pixel < last; pixel += depth) {
    auto& to = ring.tile[turn.stage];
    uint64_t* full = &ring.full[turn.stage];
    const Position o = position(space, pixel);
    mbarrier_wait(&ring.empty[turn.stage], turn.parity ^ 1);
    mbarrier_arrive_expect_tx(full, sizeof to.dy + sizeof to.x);
    for (int i = 0; i < Filters / 64; ++i)
      tma_load_im2col(to.dy[i][0], map_dy, full, {group * p.K + k0 + i * 64, static_cast<int>(pixel), 0},
                      {uint16_t(0)});
    for (int i = 0; i < Blocks; ++i) {
      // past the last block: zeros, from behind the last channel
      const bool valid = block0 + i < p.blocks;
      const int block = valid ? block0 + i : 0;
      load_image(to.x[i][0], map_x, full, p.geometry, o, tap_of(space, block / p.channel_blocks),
                 valid ? group * p.C + block % p.channel_blocks * 64 : p.G * p.channel_blocks * 64);
    }
    turn.next<Stages>();
  }
}

template <class T, int Filters, int Blocks, int Stages>
PYOPS_DEVICE void consume(Ring<WgradTile<T, Filters, Blocks>, Stages>& ring, float* __restrict__ part,
                          const WgradArguments& p, unsigned first, unsigned last, int group, int k0, int block0) {
  // Warpgroups share the filters of a tile where it has 128, else its pixels: each then writes a part of its own.
  constexpr bool by_pixels = Filters == 64;
  constexpr int span = by_pixels ? depth / consumers : depth;
  const int consumer = threadIdx.x / 128 - 1, t = threadIdx.x % 128, warp = t / 32, lane = t % 32;
  const int filters = by_pixels ? 0 : consumer, line0 = by_pixels ? consumer * span : 0;
  float sum[Blocks * 32];
  Turn turn;
  int previous = 0;
  for (unsigned pixel = first; pixel < last; pixel += depth) {
    const auto& from = ring.tile[turn.stage];
    mbarrier_wait(&ring.full[turn.stage], turn.parity);
    wgmma_fence();
#pragma unroll
    for (int line = 0; line < span; line += 16)
      wgmma_m64k16<T, Blocks * 64, Major::mn, Major::mn>(
          sum, smem_desc(from.dy[filters][line0 + line], sizeof from.dy[0], 1024, Swizzle::b128),
          smem_desc(from.x[0][line0 + line], sizeof from.x[0], 1024, Swizzle::b128), pixel > first || line > 0);
    wgmma_commit();
    wgmma_wait<1>();
    if (pixel > first && lane == 0) mbarrier_arrive(&ring.empty[previous]);
    previous = turn.stage;
    turn.next<Stages>();
  }
  wgmma_wait<0>();

  const int index = by_pixels ? blockIdx.y * consumers + consumer : blockIdx.y;
  float* to = part + (static_cast<int64_t>(index) * p.G + group) * p.K * p.columns;
#pragma unroll
  for (int i = 0; i < Blocks * 32; i += 2) {
    const int k = k0 + filters * 64 + warp * 16 + lane / 4 + i / 2 % 2 * 8;
    const int column = i / 4 * 8 + lane % 4 * 2, block = block0 + column / 64,
              c = block % p.channel_blocks * 64 + column % 64;
    if (k < p.K && block < p.blocks && c < p.C)
      store_vec(to + static_cast<int64_t>(k) * p.columns + block / p.channel_blocks * p.C + c,
                Vec<float, 2>{{sum[i], sum[i + 1]}});
  }
}

template <class T, int Filters, int Blocks>
__global__ void __launch_bounds__(threads, 1)
    wgrad_wgmma_kernel(const __grid_constant__ TensorMap map_dy, const __grid_constant__ TensorMap map_x,
                       float* __restrict__ part, const __grid_constant__ WgradArguments p) {
  auto& ring = shared_storage<WgradShared<T, Filters, Blocks>>();
  const int filter_tiles = static_cast<int>(ceil_div(p.K, Filters)), group = blockIdx.x % p.G, tile = blockIdx.x / p.G;
  const int k0 = tile % filter_tiles * Filters, block0 = tile / filter_tiles * Blocks;
  const unsigned first = blockIdx.y * p.range, last = min(first + p.range, p.pixels);
  open_ring(ring);
  if (threadIdx.x < 128) {
    setmaxnreg_dec<40>();
    if (threadIdx.x == 0) produce(ring, map_dy, map_x, p, first, last, group, k0, block0);
  } else {
    setmaxnreg_inc<232>();
    consume(ring, part, p, first, last, group, k0, block0);
  }
}

// launches

template <class T, int Rank>
TensorMap image_map(const T* x, const Space& s, int64_t examples, int C, unsigned pixels) {
  const Axis* axes[] = {&s.w, &s.h, &s.d};
  uint64_t shape[Rank], stride[Rank];
  Im2col window{};
  window.channels = depth, window.pixels = pixels;
  shape[0] = C, stride[0] = sizeof(T);
  for (int i = 1; i < Rank; ++i) {
    stride[i] = stride[i - 1] * shape[i - 1];
    if (i + 1 == Rank) {
      shape[i] = examples;
      continue;
    }
    const Axis& a = *axes[i - 1];
    const Walk walk(a);
    shape[i] = a.size;
    window.lower_corner[i - 1] = walk.lower, window.upper_corner[i - 1] = walk.upper;
    window.traversal[i - 1] = a.count > 1 ? a.in_step : 1;
  }
  return make_tensor_map_im2col(x, shape, stride, window, Swizzle::b128);
}
template <class T>
TensorMap image_map(const T* x, const Space& s, int64_t examples, int C, unsigned pixels) {
  const int rank = map_rank(s);
  return rank == 3   ? image_map<T, 3>(x, s, examples, C, pixels)
         : rank == 4 ? image_map<T, 4>(x, s, examples, C, pixels)
                     : image_map<T, 5>(x, s, examples, C, pixels);
}
Geometry geometry_of(const Space& s) {
  const Walk w(s.w), h(s.h), d(s.d);
  return {map_rank(s), s, {w.lower, h.lower, d.lower}, {w.offset, h.offset, d.offset}};
}
// [rows, width, C] as images of one line, of which a box holds one element from each of `count` images.
template <class T>
TensorMap filter_map(const T* w, int64_t rows, int width, int C, unsigned count) {
  const uint64_t line = C * sizeof(T);
  return make_tensor_map_im2col(w, {uint64_t(C), uint64_t(width), uint64_t(rows)}, {sizeof(T), line, line * width},
                                Im2col{{0}, {1 - width}, depth, count, {1}}, Swizzle::b128);
}

template <class T, Major W, int Filters, int Pixels>
void launch_product(const Product<T>& p, cudaStream_t stream) {
  const Space& s = p.space;
  const int64_t pixels = p.examples * s.positions(), group_tiles = ceil_div(p.K, Filters),
                filter_tiles = p.G * group_tiles, tiles = ceil_div(pixels, Pixels) * filter_tiles,
                channels = int64_t(p.G) * p.K;
  const ProductArguments arguments{geometry_of(s),
                                   s.out_plane() * channels,
                                   channels,
                                   static_cast<unsigned>(pixels),
                                   static_cast<unsigned>(tiles),
                                   static_cast<unsigned>(filter_tiles),
                                   static_cast<unsigned>(group_tiles),
                                   p.C,
                                   p.K,
                                   p.filter_taps[1],
                                   p.filter_taps[2],
                                   s.positions() == s.out_plane()};
  const int width = p.filter_taps[0] * p.filter_taps[1] * p.filter_taps[2];
  constexpr bool by_filter = W == Major::k;
  launch(conv_wgmma_kernel<T, W, Filters, Pixels>,
         {.grid = dim3(static_cast<unsigned>(std::min<int64_t>(tiles, multiprocessor_count()))),
          .block = dim3(threads),
          .smem = sizeof(ProductShared<T, Filters, Pixels>),
          .stream = stream},
         image_map(p.x, s, p.examples, p.G * p.C, Pixels),
         filter_map(p.w, int64_t(p.G) * (by_filter ? p.K : p.C), width, by_filter ? p.C : p.K,
                    by_filter ? Filters : depth),
         p.end, p.y, arguments);
}

template <class T, int Filters, int Blocks>
void launch_wgrad(const Wgrad<T>& p, const Shares& shares, cudaStream_t stream) {
  const Space& s = p.space;
  const int64_t pixels = p.examples * s.positions();
  const int channel_blocks = static_cast<int>(ceil_div(p.C, 64)), blocks = channel_blocks * s.taps();
  const WgradArguments arguments{geometry_of(s),
                                 static_cast<unsigned>(pixels),
                                 static_cast<unsigned>(shares.pixels),
                                 p.G,
                                 p.C,
                                 p.K,
                                 s.taps() * p.C,
                                 channel_blocks,
                                 blocks};
  // dy as one line of pixels
  const uint64_t filters = uint64_t(p.G) * p.K;
  const TensorMap map_dy = make_tensor_map_im2col(p.dy, {filters, uint64_t(pixels), uint64_t(1)},
                                                  {sizeof(T), filters * sizeof(T), pixels * filters * sizeof(T)},
                                                  Im2col{{0}, {0}, 64, depth, {1}}, Swizzle::b128);
  launch(wgrad_wgmma_kernel<T, Filters, Blocks>,
         {.grid = dim3(static_cast<unsigned>(p.G * ceil_div(p.K, Filters) * ceil_div(blocks, Blocks)),
                       static_cast<unsigned>(shares.splits)),
          .block = dim3(threads),
          .smem = sizeof(WgradShared<T, Filters, Blocks>),
          .stream = stream},
         map_dy, image_map(p.x, s, p.examples, p.G * p.C, depth), p.part, arguments);
}

// Blocks of 64 channels in a tile of wgrad: few tiles, and little of the last one for nothing.
int wgrad_blocks(int64_t blocks) {
  int best = 1;
  for (const int b : {2, 3, 4})
    if (ceil_div(blocks, b) * (2 * b + 1) < ceil_div(blocks, best) * (2 * best + 1)) best = b;
  return best;
}
int wgrad_filters(int64_t K) { return K <= 64 ? 64 : 128; }

}  // namespace

template <class T>
void product(const Product<T>& p, cudaStream_t stream) {
  // Rounds of the machine, times the products of a tile and its loads: one row is worth some 48 products.
  const auto cost = [&](int filters, int pixels) {
    const int64_t tiles = p.G * ceil_div(p.K, filters) * ceil_div(p.examples * p.space.positions(), pixels);
    return ceil_div(tiles, multiprocessor_count()) * (filters * pixels + 48 * (filters + pixels));
  };
  const int64_t large = cost(128, 256), square = cost(128, 128), flat = cost(64, 256);
  const auto with_filters = [&]<Major W>() {
    if (large <= std::min(square, flat)) return launch_product<T, W, 128, 256>(p, stream);
    if (square <= flat) return launch_product<T, W, 128, 128>(p, stream);
    launch_product<T, W, 64, 256>(p, stream);
  };
  if (p.transposed) return with_filters.template operator()<Major::mn>();
  with_filters.template operator()<Major::k>();
}
template void product(const Product<bf16>&, cudaStream_t);
template void product(const Product<fp16>&, cudaStream_t);

// At least eight steps of the sum for each block, and at most 64 MiB of parts. Counted in steps, a round of the machine
// takes those of one block and some 16 to fill and empty its ring; 1.25 MB of parts are written and read in one.
Shares wgrad_shares(const Space& space, int64_t examples, int64_t G, int64_t C, int64_t K) {
  const int64_t pixels = examples * space.positions(), steps = ceil_div(pixels, depth);
  const int64_t blocks = ceil_div(C, 64) * space.taps(), filters = wgrad_filters(K);
  const int64_t tiles = G * ceil_div(K, filters) * ceil_div(blocks, wgrad_blocks(blocks)),
                machine = multiprocessor_count();
  const int64_t parts = filters == 64 ? consumers : 1;
  const int64_t bytes = G * K * space.taps() * C * static_cast<int64_t>(sizeof(float)) * parts;
  const auto cost = [&](int64_t splits) {
    return ceil_div(tiles * splits, machine) * (ceil_div(steps, splits) + 16) + splits * bytes / 1250000;
  };
  const int64_t most = std::min({ceil_div(steps, 8), (int64_t(64) << 20) / bytes, ceil_div(4 * machine, tiles)});
  int64_t best = 1;
  for (int64_t splits = 2; splits <= most; ++splits)
    if (cost(splits) < cost(best)) best = splits;
  const int64_t range = ceil_div(steps, best) * depth, splits = ceil_div(pixels, range);
  return {static_cast<int>(splits * parts), static_cast<int>(splits), range};
}

template <class T>
void wgrad(const Wgrad<T>& p, const Shares& shares, cudaStream_t stream) {
  const int blocks = wgrad_blocks(ceil_div(p.C, 64) * p.space.taps());
  const auto with_filters = [&]<int Filters>() {
    if (blocks == 1) return launch_wgrad<T, Filters, 1>(p, shares, stream);
    if (blocks == 2) return launch_wgrad<T, Filters, 2>(p, shares, stream);
    if (blocks == 3) return launch_wgrad<T, Filters, 3>(p, shares, stream);
    launch_wgrad<T, Filters, 4>(p, shares, stream);
  };
  if (wgrad_filters(p.K) == 64) return with_filters.template operator()<64>();
  with_filters.template operator()<128>();
}
template void wgrad(const Wgrad<bf16>&, const Shares&, cudaStream_t);
template void wgrad(const Wgrad<fp16>&, const Shares&, cudaStream_t);

}  // namespace pyops::conv::hopper
