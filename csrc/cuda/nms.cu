// nms · CUDA
//   box j of a segment is kept when no kept box i < j of its segment overlaps it (common/nms.h)
// layout   boxes: [N, 4] as (x1, y1, x2, y2), segments contiguous, within a segment the best score first
//          segments: [N], ascending · keep: [N] · mask: [panel / 32 words of i, panel columns j]
// mapping  panels of 1024 boxes in order. (1) bits of the pairs i < j inside the panel, a word per thread; (2) one
//          block solves the panel: the warp of a diagonal word iterates ballots to the fixed point, the others apply
//          the word to their own box; (3) later boxes meet the kept boxes of the panel only. The host waits for nothing
// memory   128 KiB of bits whatever N is, and one byte per box
// numerics A, each operation rounded alone, so every backend keeps the same boxes
#include "cuda/device.cuh"

#include "common/nms.h"

namespace pyops {
namespace {

constexpr int panel = 1024, words = panel / 32, tile = 128;

template <class A>
struct Corners {
  A x1, y1, x2, y2, area;
};

template <class T>
PYOPS_DEVICE Corners<accumulate_t<T>> load_corners(const T* boxes, int64_t i) {
  using A = accumulate_t<T>;
  const Vec<T, 4> v = load_vec<4>(boxes + 4 * i);
  Corners<A> c{to_acc(v[0]), to_acc(v[1]), to_acc(v[2]), to_acc(v[3]), A(0)};
  c.area = suppression::area(c.x1, c.y1, c.x2, c.y2);
  return c;
}

template <class A>
PYOPS_DEVICE A quotient(const Corners<A>& a, const Corners<A>& b, bool of_smaller = false) {
  return suppression::quotient(a.x1, a.y1, a.x2, a.y2, a.area, b.x1, b.y1, b.x2, b.y2, b.area, of_smaller);
}

__global__ void __launch_bounds__(256) nms_clear_kernel(unsigned char* __restrict__ removed, int64_t N) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i < N) removed[i] = 0;
}

template <class A>
struct MaskShared {
  Corners<A> box[32];
  int64_t segment[32];
};

// mask[w][j] bit i: box 32 w + i of the panel comes before box j, shares its segment and overlaps it.
template <class T>
__global__ void __launch_bounds__(tile)
    nms_mask_kernel(const T* __restrict__ boxes, const int64_t* __restrict__ segments,
                    const unsigned char* __restrict__ removed, unsigned* __restrict__ mask, int64_t first, int n,
                    accumulate_t<T> threshold, bool of_smaller) {
  using A = accumulate_t<T>;
  auto& s = shared_storage<MaskShared<A>>();
  const int w = blockIdx.y, row = 32 * w, j = static_cast<int>(blockIdx.x) * tile + threadIdx.x;
  if (static_cast<int>(blockIdx.x + 1) * tile <= row) return;  // below the diagonal
  if (threadIdx.x < 32 && row + static_cast<int>(threadIdx.x) < n) {
    s.box[threadIdx.x] = load_corners(boxes, first + row + threadIdx.x);
    if (segments != nullptr) s.segment[threadIdx.x] = segments[first + row + threadIdx.x];
  }
  __syncthreads();
  if (j >= n || j / 32 < w) return;
  unsigned bits = 0;
  const int count = min(32, min(n, j) - row);
  if (!removed[first + j]) {
    const Corners<A> box = load_corners(boxes, first + j);
    const int64_t segment = segments != nullptr ? segments[first + j] : 0;
    for (int i = 0; i < count; ++i) {
      const bool same = segments == nullptr || s.segment[i] == segment;
      if (same && quotient(s.box[i], box, of_smaller) > threshold) bits |= 1u << i;
    }
  }
  mask[w * panel + j] = bits;
}

template <class A>
struct SolveShared {
  unsigned kept[words];
};

// One block; thread j owns box j of the panel. Writes keep, and the kept boxes one after the other.
template <class T>
__global__ void __launch_bounds__(panel)
    nms_solve_kernel(const T* __restrict__ boxes, const int64_t* __restrict__ segments,
                     const unsigned char* __restrict__ removed, const unsigned* __restrict__ mask,
                     bool* __restrict__ keep, Corners<accumulate_t<T>>* __restrict__ kept_box,
                     int64_t* __restrict__ kept_segment, int* __restrict__ kept_count, int64_t first, int n) {
  using A = accumulate_t<T>;
  auto& s = shared_storage<SolveShared<A>>();
  const int j = threadIdx.x, warp = j / 32, lane = j % 32, used = (n + 31) / 32;
  bool gone = j >= n || removed[first + j] != 0;
  unsigned column = j < n ? mask[j] : 0;
  for (int w = 0; w < used; ++w) {
    const unsigned next = j < n && w + 1 <= warp ? mask[(w + 1) * panel + j] : 0;
    if (warp == w) {
      // kept_j = candidate_j and no kept i < j marks it: the first k answers are right after k rounds.
      unsigned kept = __ballot_sync(~0u, !gone);
      for (;;) {
        const unsigned better = __ballot_sync(~0u, !gone && (column & kept) == 0);
        if (better == kept) break;
        kept = better;
      }
      gone = (kept >> lane & 1u) == 0;
      if (lane == 0) s.kept[w] = kept;
    }
    __syncthreads();
    if (warp > w && (column & s.kept[w]) != 0) gone = true;
    column = next;
  }
  int before = 0, total = 0;
  for (int w = 0; w < used; ++w) {
    const int count = __popc(s.kept[w]);
    if (w < warp) before += count;
    total += count;
  }
  if (j == 0) *kept_count = total;
  if (j >= n) return;
  keep[first + j] = !gone;
  if (gone) return;
  before += __popc(s.kept[warp] & ((1u << lane) - 1));
  kept_box[before] = load_corners(boxes, first + j);
  if (segments != nullptr) kept_segment[before] = segments[first + j];
}

template <class A>
struct ApplyShared {
  Corners<A> box[tile];
  int64_t segment[tile];
};

// Boxes after the panel against its kept boxes; a block stops when nothing of it is left.
template <class T>
__global__ void __launch_bounds__(tile)
    nms_apply_kernel(const T* __restrict__ boxes, const int64_t* __restrict__ segments,
                     unsigned char* __restrict__ removed, const Corners<accumulate_t<T>>* __restrict__ kept_box,
                     const int64_t* __restrict__ kept_segment, const int* __restrict__ kept_count, int64_t first,
                     int64_t N, accumulate_t<T> threshold, bool of_smaller) {
  using A = accumulate_t<T>;
  auto& s = shared_storage<ApplyShared<A>>();
  const int64_t j = first + static_cast<int64_t>(blockIdx.x) * tile + threadIdx.x;
  const int count = *kept_count;
  const int64_t segment = segments != nullptr && j < N ? segments[j] : 0;
  // Segments ascend: a box beyond the last kept box's segment has nothing to fear.
  bool open = j < N && removed[j] == 0 && count > 0;
  if (open && segments != nullptr) open = segment == kept_segment[count - 1];
  Corners<A> box{};
  if (open) box = load_corners(boxes, j);
  const bool was_open = open;
  for (int from = 0; from < count; from += tile) {
    if (__syncthreads_or(open) == 0) break;
    const int k = from + static_cast<int>(threadIdx.x);
    if (k < count) {
      s.box[threadIdx.x] = kept_box[k];
      if (segments != nullptr) s.segment[threadIdx.x] = kept_segment[k];
    }
    __syncthreads();
    const int here = min(tile, count - from);
    for (int i = 0; i < here && open; ++i)
      if ((segments == nullptr || s.segment[i] == segment) && quotient(s.box[i], box, of_smaller) > threshold)
        open = false;
  }
  if (was_open && !open) removed[j] = 1;
}

constexpr int pick_threads = 256;

template <class A>
struct PickShared {
  A score[pick_threads / 32];
  int64_t index[pick_threads / 32];
};

// One block: picks the best box, lowers the scores of those it overlaps, until the best is below min_score.
template <class T>
__global__ void __launch_bounds__(pick_threads)
    soft_nms_kernel(const T* __restrict__ boxes, const T* __restrict__ scores, accumulate_t<T>* __restrict__ live,
                    int64_t* __restrict__ order, accumulate_t<T>* __restrict__ picked, int64_t* __restrict__ count,
                    int64_t N, bool gaussian, accumulate_t<T> scale, accumulate_t<T> threshold, double min_score) {
  using A = accumulate_t<T>;
  auto& s = shared_storage<PickShared<A>>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int64_t i = threadIdx.x; i < N; i += pick_threads) {
    live[i] = to_acc(scores[i]);
    order[i] = -1;
  }
  int64_t last = -1, found = 0;
  for (; found < N; ++found) {
    // A thread visits its own boxes in ascending order, so it needs no barrier before it reads what it wrote.
    A best = 0;
    int64_t at = -1;
    Corners<A> chosen{};
    if (last >= 0) chosen = load_corners(boxes, last);
    for (int64_t i = threadIdx.x; i < N; i += pick_threads) {
      A value = live[i];
      if (value != value) continue;
      if (i == last) {
        live[i] = A(NAN);
        continue;
      }
      if (last >= 0) {
        const A q = quotient(chosen, load_corners(boxes, i));
        if (gaussian)
          value = q == q ? value * exp(q * q * scale) : value;
        else if (q > threshold)
          value *= A(1) - q;
        live[i] = value;
      }
      if (at < 0 || value > best) {
        best = value;
        at = i;
      }
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      const A other = __shfl_xor_sync(~0u, best, offset);
      const int64_t place = __shfl_xor_sync(~0u, at, offset);
      if (place >= 0 && (at < 0 || other > best || (other == best && place < at))) {
        best = other;
        at = place;
      }
    }
    if (lane == 0) {
      s.score[warp] = best;
      s.index[warp] = at;
    }
    __syncthreads();
    best = s.score[0];
    at = s.index[0];
    for (int w = 1; w < pick_threads / 32; ++w) {
      const A other = s.score[w];
      const int64_t place = s.index[w];
      if (place >= 0 && (at < 0 || other > best || (other == best && place < at))) {
        best = other;
        at = place;
      }
    }
    __syncthreads();
    if (at < 0 || !(static_cast<double>(best) >= min_score)) break;
    if (threadIdx.x == 0) {
      order[found] = at;
      picked[found] = best;
    }
    last = at;
  }
  if (threadIdx.x == 0) *count = found;
}

}  // namespace
}  // namespace pyops

// binding

#include "common/registry.h"

namespace pyops {
namespace {

Tensor nms_mask(const Tensor& boxes, const OptionalTensor& segments, double limit, bool of_smaller) {
  OpScope op("nms_mask", boxes);
  op.check(boxes.dim() == 2, "boxes must be [N, 4]");
  const int64_t N = boxes.size(0);
  Tensor keep = op.empty<bool>({N});
  if (N == 0) return keep;
  dispatch_floating(op, boxes.scalar_type(), [&]<class T>() {
    using A = accumulate_t<T>;
    const A threshold = suppression::floor_to<A>(limit);
    Tensor removed = op.empty<uint8_t>({N}), mask = op.empty<int32_t>({words, panel});
    Tensor held = op.empty<A>({panel, 5}), held_segment = op.empty<int64_t>({panel}),
           held_count = op.empty<int32_t>({1});
    auto* pboxes = op.in<T>(boxes, "boxes", {N, 4});
    auto* psegments = op.in_optional<int64_t>(segments, "segments", {N});
    auto* pkeep = op.out<bool>(keep, "keep", {N});
    auto* premoved = op.out<uint8_t>(removed, "removed", {N});
    auto* pmask = reinterpret_cast<unsigned*>(op.out<int32_t>(mask, "mask", {words, panel}));
    auto* pbox = reinterpret_cast<Corners<A>*>(op.out<A>(held, "kept_box", {panel, 5}));
    auto* psegment = op.out<int64_t>(held_segment, "kept_segment", {panel});
    auto* pcount = op.out<int32_t>(held_count, "kept_count", {1});
    const auto stream = static_cast<cudaStream_t>(op.stream());
    launch(nms_clear_kernel,
           {.grid = dim3(static_cast<unsigned>(ceil_div(N, 256))), .block = dim3(256), .stream = stream}, premoved, N);
    for (int64_t first = 0; first < N; first += panel) {
      const int n = static_cast<int>(N - first < panel ? N - first : panel);
      const auto columns = static_cast<unsigned>(ceil_div(n, tile)), rows = static_cast<unsigned>(ceil_div(n, 32));
      launch(nms_mask_kernel<T>,
             {.grid = dim3(columns, rows), .block = dim3(tile), .smem = sizeof(MaskShared<A>), .stream = stream},
             pboxes, psegments, premoved, pmask, first, n, threshold, of_smaller);
      launch(nms_solve_kernel<T>,
             {.grid = dim3(1), .block = dim3(rows * 32), .smem = sizeof(SolveShared<A>), .stream = stream}, pboxes,
             psegments, premoved, pmask, pkeep, pbox, psegment, pcount, first, n);
      const int64_t rest = N - first - n;
      launch(nms_apply_kernel<T>,
             {.grid = dim3(static_cast<unsigned>(ceil_div(rest, tile))),
              .block = dim3(tile),
              .smem = sizeof(ApplyShared<A>),
              .stream = stream},
             pboxes, psegments, premoved, pbox, psegment, pcount, first + n, N, threshold, of_smaller);
    }
  });
  return keep;
}

std::tuple<Tensor, Tensor, Tensor> soft_nms_pick(const Tensor& boxes, const Tensor& scores, int64_t method,
                                                 double sigma, double threshold, double min_score) {
  OpScope op("soft_nms_pick", boxes);
  op.check(boxes.dim() == 2, "boxes must be [N, 4]");
  const int64_t N = boxes.size(0);
  return dispatch_floating(op, boxes.scalar_type(), [&]<class T>() {
    using A = accumulate_t<T>;
    Tensor order = op.empty<int64_t>({N}), picked = op.empty<A>({N}), count = op.empty<int64_t>({1});
    Tensor live = op.empty<A>({N});
    launch(soft_nms_kernel<T>,
           {.grid = dim3(1),
            .block = dim3(pick_threads),
            .smem = sizeof(PickShared<A>),
            .stream = static_cast<cudaStream_t>(op.stream())},
           op.in<T>(boxes, "boxes", {N, 4}), op.in<T>(scores, "scores", {N}), op.out<A>(live, "live", {N}),
           op.out<int64_t>(order, "order", {N}), op.out<A>(picked, "picked", {N}), op.out<int64_t>(count, "count", {1}),
           N, method == 1, static_cast<A>(-1 / sigma), suppression::floor_to<A>(threshold), min_score);
    return std::make_tuple(order, picked, count);
  });
}

}  // namespace
}  // namespace pyops

PYOPS_LIBRARY(m) {
  using namespace pyops;
  PYOPS_IMPL(m, nms_mask);
  PYOPS_IMPL(m, soft_nms_pick);
}
