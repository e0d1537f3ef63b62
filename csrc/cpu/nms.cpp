// nms · CPU
//   box j of a segment is kept when no kept box i < j of its segment overlaps it (common/nms.h)
//   nms_pick sorts, groups and suppresses in one call, and returns the indices of what is kept
// layout   boxes: [N, 4] as (x1, y1, x2, y2), segments contiguous, within a segment the best score first
//          segments: [N], ascending · keep: [N]
// mapping  threads over segments; lanes over boxes. In a long segment boxes are kept one by one while each removes
//          many; what is left is sorted by x1 within strips of y1: overlap above the threshold t bounds x1_j to
//          [x1_i - w_i (1 - t) / t, x1_i + w_i (1 - t)], a window found by binary search, and y1_j likewise
// memory   O(N)
// numerics acc_t, each operation rounded alone, so every backend keeps the same boxes
#include "common/nms.h"

#include <bit>
#include <limits>
#include <utility>

#include "common/registry.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace pyops::PYOPS_CPU_CAPABILITY {

// ---- kernels

// A mask as wide as the numbers it is computed from, so that lanes match.
template <class acc_t>
using flag_t = std::conditional_t<sizeof(acc_t) == 4, int32_t, int64_t>;

// What counts as overlap: more than the threshold, of the union or of the smaller box.
template <class acc_t>
struct Limit {
  acc_t threshold;
  bool of_smaller;
};

// Segments up to this length are compared pair by pair.
inline constexpr int64_t short_segment = 192;

template <class acc_t>
struct Columns {
  Buffer<acc_t> data;
  Buffer<flag_t<acc_t>> dead;
  int64_t n;
  explicit Columns(int64_t count) : data(5 * count), dead(count, 0), n(count) {}
  acc_t* column(int k) { return data.get() + k * n; }

  template <class scalar_t>
  void set(int64_t at, const scalar_t* box) {
    acc_t v[4];
    for (int k = 0; k < 4; ++k) data[k * n + at] = v[k] = acc_t(box[k]);
    data[4 * n + at] = suppression::area(v[0], v[1], v[2], v[3]);
  }

  // Marks the boxes [begin, end) that box `at` overlaps by more than the threshold.
  void suppress(int64_t at, int64_t begin, int64_t end, Limit<acc_t> limit) {
    const auto run = limit.of_smaller ? suppress_run<true> : suppress_run<false>;
    run(column(0) + begin, column(1) + begin, column(2) + begin, column(3) + begin, column(4) + begin,
        dead.get() + begin, end - begin, data[at], data[n + at], data[2 * n + at], data[3 * n + at], data[4 * n + at],
        limit.threshold);
  }

  template <bool of_smaller>
  static void suppress_run(const acc_t* __restrict__ x1, const acc_t* __restrict__ y1, const acc_t* __restrict__ x2,
                           const acc_t* __restrict__ y2, const acc_t* __restrict__ area,
                           flag_t<acc_t>* __restrict__ dead, int64_t count, acc_t ax1, acc_t ay1, acc_t ax2, acc_t ay2,
                           acc_t aa, acc_t threshold) {
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
      const acc_t q = suppression::quotient(ax1, ay1, ax2, ay2, aa, x1[j], y1[j], x2[j], y2[j], area[j], of_smaller);
      dead[j] |= q > threshold ? flag_t<acc_t>(1) : flag_t<acc_t>(0);
    }
  }
};

// Boxes that are not decided yet, best first: their columns and where their answers go.
template <class acc_t>
struct Undecided {
  Columns<acc_t> columns;
  Buffer<int64_t> index;
  int64_t count;

  template <class scalar_t>
  Undecided(const scalar_t* boxes, int64_t n) : columns(n), index(n), count(n) {
    for (int64_t i = 0; i < n; ++i) {
      columns.set(i, boxes + 4 * i);
      index[i] = i;
    }
  }

  // Every kept box against all that follow.
  void pairs(bool* keep, Limit<acc_t> limit) {
    for (int64_t i = 0; i < count; ++i) {
      keep[index[i]] = columns.dead[i] == 0;
      if (columns.dead[i] == 0) columns.suppress(i, i + 1, count, limit);
    }
  }

  // The same, for as long as a kept box removes many: where nearly all boxes overlap, few are left to sort.
  void thin(bool* keep, Limit<acc_t> limit) {
    for (int weak = 0; count > short_segment && weak < 2;) {
      keep[index[0]] = true;
      columns.suppress(0, 1, count, limit);
      int64_t left = 0;
      for (int64_t i = 1; i < count; ++i) {
        const bool kept = columns.dead[i] == 0;
        keep[index[i]] = kept;
        index[left] = index[i];
        for (int k = 0; k < 5; ++k) columns.column(k)[left] = columns.column(k)[i];
        left += kept;
      }
      std::fill_n(columns.dead.get(), left, flag_t<acc_t>(0));
      weak += (count - left) * 32 < count;
      count = left;
    }
  }
};

// Strips of y1, as high as two boxes, each in order of x1: where a box can be that overlaps another.
class Strips {
 public:
  Strips(double low, double high, double mean_height, int64_t boxes) : low_(low) {
    const double most = double(boxes / 256), wanted = (high - low) / (2 * mean_height);
    count_ = std::max<int64_t>(1, int64_t(wanted < most ? wanted : most));
    scale_ = high > low ? double(count_) / (high - low) : 0.0;
  }
  int64_t count() const { return count_; }
  // Never falls as y grows, whatever is rounded.
  int64_t at(double y) const {
    const double strip = (y - low_) * scale_;
    return strip > 0 ? (strip < double(count_) ? int64_t(strip) : count_ - 1) : 0;
  }

 private:
  double low_, scale_;
  int64_t count_;
};

// Boxes of a long segment by strip and x1. The quotient is symmetric, so a kept box never marks an earlier kept one.
template <class acc_t>
void nms_sweep(Undecided<acc_t>& boxes, bool* keep, Limit<acc_t> limit) {
  struct Entry {
    int64_t strip, box;
    acc_t x1;
  };
  std::vector<Entry> sorted;
  sorted.reserve(size_t(boxes.count));
  constexpr acc_t tiny = std::is_same_v<acc_t, float> ? acc_t(1e-30) : acc_t(1e-290);
  double widest = 0, tallest = 0, heights = 0, top = INFINITY, bottom = -INFINITY;
  const auto corner = [&](int k, int64_t i) { return boxes.columns.column(k)[i]; };
  for (int64_t i = 0; i < boxes.count; ++i) {
    const acc_t x1 = corner(0, i), y1 = corner(1, i), x2 = corner(2, i), y2 = corner(3, i), size = corner(4, i);
    keep[boxes.index[i]] = true;  // and stays, where it is empty, crossed or not finite: such a box overlaps nothing
    if (!(x2 > x1 && y2 > y1)) continue;
    const bool finite = size <= std::numeric_limits<acc_t>::max();
    if (!finite && !limit.of_smaller) continue;
    // Below this the rounding of areas says nothing, and an infinite box may hold all the smaller ones: such a segment
    // is compared pair by pair.
    if (size < tiny || !finite) return boxes.pairs(keep, limit);
    const double height = double(y2) - double(y1);
    widest = std::max(widest, double(x2) - double(x1));
    tallest = std::max(tallest, height);
    heights += height;
    top = std::min(top, double(y1));
    bottom = std::max(bottom, double(y1));
    sorted.push_back({0, i, x1});
  }
  const int64_t count = int64_t(sorted.size());
  if (count == 0) return;
  const Strips strips(top, bottom, heights / double(count), count);
  for (Entry& e : sorted) e.strip = strips.at(double(corner(1, e.box)));
  std::sort(sorted.begin(), sorted.end(), [](const Entry& a, const Entry& b) {
    return a.strip != b.strip ? a.strip < b.strip : a.x1 != b.x1 ? a.x1 < b.x1 : a.box < b.box;
  });
  Columns<acc_t> columns(count);
  Buffer<int64_t> position(boxes.count, -1), starts(strips.count() + 1, 0);
  for (int64_t k = 0; k < count; ++k) {
    const Entry& e = sorted[size_t(k)];
    for (int c = 0; c < 5; ++c) columns.column(c)[k] = corner(c, e.box);
    position[e.box] = k;
    starts[e.strip + 1] = k + 1;
  }
  for (int64_t s = 0; s < strips.count(); ++s) starts[s + 1] = std::max(starts[s + 1], starts[s]);
  // Room for the rounding of the quotient, which is far below 1e-5. A small box may lie anywhere in a large one.
  const double t = limit.of_smaller ? 0.0 : double(limit.threshold) * (1 - 1e-5);
  const auto back = [&](double side, double longest) {
    return std::min(longest, t > 0 ? side * (1 - t) / t : longest);
  };
  const double ahead = std::max(0.0, 1 - t);
  const acc_t* x1 = columns.column(0);
  for (int64_t i = 0; i < boxes.count; ++i) {
    const int64_t at = position[i];
    if (at < 0) continue;
    keep[boxes.index[i]] = columns.dead[at] == 0;
    if (columns.dead[at] != 0) continue;
    const double x = double(x1[at]), w = double(columns.column(2)[at]) - x;
    const double y = double(columns.column(1)[at]), h = double(columns.column(3)[at]) - y;
    const double low = x - back(w, widest), high = x + w * ahead;
    const int64_t last = strips.at(y + h * ahead);
    for (int64_t s = strips.at(y - back(h, tallest)); s <= last; ++s) {
      const acc_t *from = x1 + starts[s], *to = x1 + starts[s + 1];
      const int64_t begin = std::partition_point(from, to, [&](acc_t v) { return double(v) < low; }) - x1;
      const int64_t end = std::partition_point(x1 + begin, to, [&](acc_t v) { return double(v) <= high; }) - x1;
      columns.suppress(at, begin, end, limit);
    }
  }
}

template <class acc_t, class scalar_t>
void nms_segment(const scalar_t* boxes, bool* keep, int64_t n, Limit<acc_t> limit) {
  Undecided<acc_t> undecided(boxes, n);
  undecided.thin(keep, limit);
  if (undecided.count <= short_segment)
    undecided.pairs(keep, limit);
  else
    nms_sweep(undecided, keep, limit);
}

template <class scalar_t>
void nms_segments(const scalar_t* boxes, const int64_t* segments, bool* keep, int64_t N, double threshold,
                  bool of_smaller) {
  using acc_t = accumulate_t<scalar_t>;
  const Limit<acc_t> limit{suppression::floor_to<acc_t>(threshold), of_smaller};
  std::vector<int64_t> starts{0};
  for (int64_t i = 1; segments != nullptr && i < N; ++i)
    if (segments[i] != segments[i - 1]) starts.push_back(i);
  starts.push_back(N);
  const int64_t count = int64_t(starts.size()) - 1;
  parallel_for(count, std::max<int64_t>(1, ceil_div(512 * count, std::max<int64_t>(N, 1))),
               [&](int64_t begin, int64_t end) {
                 for (int64_t s = begin; s < end; ++s) {
                   const int64_t first = starts[size_t(s)], n = starts[size_t(s) + 1] - first;
                   nms_segment(boxes + 4 * first, keep + first, n, limit);
                 }
               });
}

// A box, or the place of one, by a key that is sorted by; where keys are equal, the earlier stays before.
struct Ranked {
  uint64_t key;
  int64_t index;
};

// The greater the score the smaller its key; NaN first, and the zeros equal, as in torch.sort.
inline uint64_t falling(double score) {
  if (score != score) return 0;
  const auto bits = std::bit_cast<uint64_t>(score + 0.0);
  return bits >> 63 ? bits : ~(bits | uint64_t(1) << 63);
}

inline uint64_t rising(int64_t segment) { return uint64_t(segment) ^ uint64_t(1) << 63; }

// Digits that all keys share, as the lower ones of float32 scores and the upper ones of class numbers, cost no pass.
inline void sort_ranked(std::vector<Ranked>& items) {
  constexpr int digit_bits = 11, digits = 6, values = 1 << digit_bits;
  if (items.size() < 512) {
    std::stable_sort(items.begin(), items.end(), [](const Ranked& a, const Ranked& b) { return a.key < b.key; });
    return;
  }
  const auto digit = [](uint64_t key, int d) { return size_t(key >> (d * digit_bits)) % values; };
  std::vector<size_t> counts(size_t(digits) * values, 0);
  for (const Ranked& item : items)
    for (int d = 0; d < digits; ++d) ++counts[size_t(d) * values + digit(item.key, d)];
  std::vector<Ranked> other(items.size());
  for (int d = 0; d < digits; ++d) {
    size_t* place = counts.data() + size_t(d) * values;
    if (place[digit(items[0].key, d)] == items.size()) continue;
    for (size_t v = 0, before = 0; v < values; ++v) before += std::exchange(place[v], before);
    for (const Ranked& item : items) other[place[digit(item.key, d)]++] = item;
    items.swap(other);
  }
}

template <class scalar_t>
std::vector<Ranked> by_falling_score(const scalar_t* scores, int64_t N, double min_score) {
  std::vector<Ranked> ranked;
  ranked.reserve(size_t(N));
  for (int64_t i = 0; i < N; ++i) {
    const double score = double(accumulate_t<scalar_t>(scores[i]));
    if (!(score < min_score)) ranked.push_back({falling(score), i});
  }
  sort_ranked(ranked);
  return ranked;
}

// Leaves in `ranked`, best first, what is kept.
template <class scalar_t>
void nms_pick_run(const scalar_t* boxes, const int64_t* segments, std::vector<Ranked>& ranked, double threshold,
                  bool of_smaller) {
  const int64_t n = int64_t(ranked.size());
  std::vector<Ranked> grouped;
  if (segments != nullptr) {
    grouped.reserve(ranked.size());
    for (int64_t k = 0; k < n; ++k) grouped.push_back({rising(segments[ranked[size_t(k)].index]), k});
    sort_ranked(grouped);
  }
  const auto place = [&](int64_t k) { return size_t(segments != nullptr ? grouped[size_t(k)].index : k); };
  Buffer<scalar_t> sorted(4 * n);
  Buffer<int64_t> segment(segments != nullptr ? n : 0);
  Buffer<bool> keep(n);
  for (int64_t k = 0; k < n; ++k) {
    const int64_t i = ranked[place(k)].index;
    std::copy_n(boxes + 4 * i, 4, sorted.get() + 4 * k);
    if (segments != nullptr) segment[k] = segments[i];
  }
  nms_segments(sorted.get(), segments != nullptr ? segment.get() : nullptr, keep.get(), n, threshold, of_smaller);
  for (int64_t k = 0; k < n; ++k)
    if (!keep[k]) ranked[place(k)].index = -1;
  std::erase_if(ranked, [](const Ranked& item) { return item.index < 0; });
}

// Picks the best remaining box, lowers the scores of those it overlaps, until the best is below min_score.
template <class scalar_t>
int64_t soft_nms_run(const scalar_t* boxes, const scalar_t* scores, int64_t* order, accumulate_t<scalar_t>* picked,
                     int64_t N, int64_t method, double sigma, double threshold, double min_score) {
  using acc_t = accumulate_t<scalar_t>;
  Columns<acc_t> columns(N);
  Buffer<acc_t> score(N);
  Buffer<int64_t> index(N);
  int64_t count = 0, remaining = 0;
  // A score that is not a number, or becomes none, is never the best.
  const auto keep = [&](acc_t s, int64_t i) {
    if (s != s) return;
    score[remaining] = s;
    index[remaining++] = i;
  };
  for (int64_t i = 0; i < N; ++i) {
    columns.set(i, boxes + 4 * i);
    keep(acc_t(scores[i]), i);
  }
  const acc_t *x1 = columns.column(0), *y1 = columns.column(1), *x2 = columns.column(2), *y2 = columns.column(3),
              *size = columns.column(4);
  const acc_t limit = suppression::floor_to<acc_t>(threshold), scale = acc_t(-1 / sigma);
  while (remaining > 0) {
    int64_t best = 0;
    for (int64_t k = 1; k < remaining; ++k)
      if (score[k] > score[best]) best = k;
    if (!(double(score[best]) >= min_score)) break;
    const int64_t a = index[best];
    order[count] = a;
    picked[count++] = score[best];
    // What remains stays in order of the index, so that ties go to the lower one.
    const int64_t before = remaining;
    remaining = 0;
    for (int64_t k = 0; k < before; ++k) {
      if (k == best) continue;
      const int64_t b = index[k];
      const acc_t q = suppression::quotient(x1[a], y1[a], x2[a], y2[a], size[a], x1[b], y1[b], x2[b], y2[b], size[b]);
      acc_t s = score[k];
      if (method == 1)
        s = q == q ? s * std::exp(q * q * scale) : s;
      else if (q > limit)
        s *= acc_t(1) - q;
      keep(s, b);
    }
  }
  return count;
}

// ---- binding

Tensor nms_mask(const Tensor& boxes, const OptionalTensor& segments, double threshold, bool of_smaller) {
  OpScope op("nms_mask", boxes);
  op.check(boxes.dim() == 2, "boxes must be [N, 4]");
  const int64_t N = boxes.size(0);
  Tensor keep = op.empty<bool>({N});
  dispatch_floating(op, boxes.scalar_type(), [&]<class scalar_t>() {
    nms_segments(op.in<scalar_t>(boxes, "boxes", {N, 4}), op.in_optional<int64_t>(segments, "segments", {N}),
                 op.out<bool>(keep, "keep", {N}), N, threshold, of_smaller);
  });
  return keep;
}

Tensor nms_pick(const Tensor& boxes, const Tensor& scores, const OptionalTensor& segments, double threshold,
                bool of_smaller, double min_score) {
  OpScope op("nms_pick", boxes);
  op.check(boxes.dim() == 2, "boxes must be [N, 4]");
  const int64_t N = boxes.size(0);
  const int64_t* psegments = op.in_optional<int64_t>(segments, "segments", {N});
  auto ranked = dispatch_floating(op, scores.scalar_type(), [&]<class score_t>() {
    return by_falling_score(op.in<score_t>(scores, "scores", {N}), N, min_score);
  });
  dispatch_floating(op, boxes.scalar_type(), [&]<class scalar_t>() {
    nms_pick_run(op.in<scalar_t>(boxes, "boxes", {N, 4}), psegments, ranked, threshold, of_smaller);
  });
  const int64_t count = int64_t(ranked.size());
  Tensor kept = op.empty<int64_t>({count});
  int64_t* index = op.out<int64_t>(kept, "kept", {count});
  for (int64_t k = 0; k < count; ++k) index[k] = ranked[size_t(k)].index;
  return kept;
}

std::tuple<Tensor, Tensor, Tensor> soft_nms_pick(const Tensor& boxes, const Tensor& scores, int64_t method,
                                                 double sigma, double threshold, double min_score) {
  OpScope op("soft_nms_pick", boxes);
  op.check(boxes.dim() == 2, "boxes must be [N, 4]");
  const int64_t N = boxes.size(0);
  return dispatch_floating(op, boxes.scalar_type(), [&]<class scalar_t>() {
    using acc_t = accumulate_t<scalar_t>;
    Tensor order = op.empty<int64_t>({N}), picked = op.empty<acc_t>({N}), count = op.empty<int64_t>({1});
    *op.out<int64_t>(count, "count", {1}) =
        soft_nms_run(op.in<scalar_t>(boxes, "boxes", {N, 4}), op.in<scalar_t>(scores, "scores", {N}),
                     op.out<int64_t>(order, "order", {N}), op.out<acc_t>(picked, "picked", {N}), N, method, sigma,
                     threshold, min_score);
    return std::make_tuple(order, picked, count);
  });
}

PYOPS_LIBRARY(m) {
  PYOPS_IMPL(m, nms_mask);
  PYOPS_IMPL(m, nms_pick);
  PYOPS_IMPL(m, soft_nms_pick);
}

}  // namespace pyops::PYOPS_CPU_CAPABILITY
