// Resampling as tables: y[o] = sum over i of weight(o, i) x[i], axis by axis. The transpose of a table is a table, so
// that one kernel serves both directions.
#pragma once

#include <algorithm>
#include <vector>

#include "common/interpolate.h"
#include "cpu/simd.h"

// Lanes chosen at run time: an instruction from AVX2 on, and a word of g++ alone.
#if defined(__AVX2__) && !defined(__clang__)
#define PYOPS_PERMUTES 1
#else
#define PYOPS_PERMUTES 0
#endif

namespace pyops::PYOPS_CPU_CAPABILITY {

// Output o reads the inputs first[o] .. with the weights start[o] .. start[o + 1].
template <class A>
struct Table {
  int64_t in, out;
  std::vector<int32_t> first, start;
  std::vector<A> weight;

  int64_t count(int64_t o) const { return start[o + 1] - start[o]; }
  int64_t most() const {
    int64_t n = 0;
    for (int64_t o = 0; o < out; ++o) n = std::max(n, count(o));
    return n;
  }
  // Each output is one of the inputs.
  bool copies() const {
    for (int64_t o = 0; o < out; ++o)
      if (count(o) != 1 || weight[start[o]] != A(1)) return false;
    return true;
  }
  bool identity() const {
    for (int64_t o = 0; o < out; ++o)
      if (first[o] != o) return false;
    return in == out && copies();
  }
};

template <class A>
Table<A> table_of(const interpolate::Axis& a) {
  Table<A> t{a.in, a.out, {}, {}, {}};
  t.first.resize(a.out), t.start.resize(a.out + 1);
  t.weight.reserve(2 * a.out);
  for (int64_t o = 0; o < a.out; ++o) {
    const auto s = span(a, o);
    t.first[o] = int32_t(s.first), t.start[o] = int32_t(t.weight.size());
    t.weight.resize(t.weight.size() + size_t(s.last - s.first + 1), A(0));
    A* w = t.weight.data() + t.start[o];
    each_tap(a, o, [&](int64_t i, double weight) { w[std::min(std::max(i, s.first), s.last) - s.first] += A(weight); });
  }
  t.start[a.out] = int32_t(t.weight.size());
  return t;
}

// The outputs that read an input follow one another, as positions only grow.
template <class A>
Table<A> transposed(const Table<A>& t) {
  Table<A> r{t.out, t.in, {}, {}, {}};
  r.first.assign(t.in, 0), r.start.assign(t.in + 1, 0), r.weight.resize(t.weight.size());
  for (int64_t o = 0; o < t.out; ++o)
    for (int64_t j = 0; j < t.count(o); ++j) ++r.start[t.first[o] + j + 1];
  for (int64_t i = 0; i < t.in; ++i) r.start[i + 1] += r.start[i];
  std::vector<int32_t> filled(t.in, 0);
  for (int64_t o = 0; o < t.out; ++o)
    for (int64_t j = 0; j < t.count(o); ++j) {
      const int64_t i = t.first[o] + j;
      if (filled[i] == 0) r.first[i] = int32_t(o);
      r.weight[r.start[i] + filled[i]++] = t.weight[t.start[o] + j];
    }
  return r;
}

// The innermost axis of one row, `from` [in * K] to `to` [out * K]. Where a vector of outputs reads at most two vectors
// of inputs, lanes are permuted, else each output adds its inputs in turn.
template <class A>
class RowTable {
 public:
  RowTable(const Table<A>& t, int64_t K) : t_(t), K_(K), copies_(t.copies()) {
#if PYOPS_PERMUTES
    if (K < W && t.most() <= 8 && t.in * K >= 2 * W) plan_lanes();
#endif
  }

  template <class T>
  void run(const A* from, T* to) const {
#if PYOPS_PERMUTES
    if (!groups_.empty()) {
      if (copies_) return permute<1, false>(from, to);
      if (taps_ == 2 && !ragged_) return permute<2, false>(from, to);
      return ragged_ ? permute<0, true>(from, to) : permute<0, false>(from, to);
    }
#endif
    if (K_ == 1)
      each_output<1>(from, to);
    else if (K_ < W)
      each_output<0>(from, to);
    else
      each_channel(from, to);
  }

 private:
  using V = Vec<A>;
  static constexpr int64_t W = V::width;

  template <int fixed, class T>
  PYOPS_INLINE void each_output(const A* from, T* to) const {
    const int64_t K = fixed ? fixed : K_;
    for (int64_t o = 0; o < t_.out; ++o) {
      const A *x = from + t_.first[o] * K, *w = t_.weight.data() + t_.start[o];
      const int64_t n = t_.count(o);
      for (int64_t k = 0; k < K; ++k) {
        A sum = 0;
        for (int64_t j = 0; j < n; ++j) sum += w[j] * x[j * K + k];
        to[o * K + k] = T(sum);
      }
    }
  }

  template <class T>
  PYOPS_INLINE void each_channel(const A* from, T* to) const {
    for (int64_t o = 0; o < t_.out; ++o) {
      const A *x = from + t_.first[o] * K_, *w = t_.weight.data() + t_.start[o];
      const int64_t n = t_.count(o);
      if (n == 2) {
        const V w0(w[0]), w1(w[1]);
        each_vector<A>(K_, [&](int64_t k, auto lanes) {
          fma(w1, V::load(x + K_ + k, lanes), w0 * V::load(x + k, lanes)).store(to + o * K_ + k, lanes);
        });
        continue;
      }
      each_vector<A>(K_, [&](int64_t k, auto lanes) {
        V sum;
        for (int64_t j = 0; j < n; ++j) sum = fma(V(w[j]), V::load(x + j * K_ + k, lanes), sum);
        sum.store(to + o * K_ + k, lanes);
      });
    }
  }

#if PYOPS_PERMUTES
  using Index = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  using Lanes = simd::Native<Index>;
  // One input of each output of a vector: its lane in the two vectors at the group's base.
  struct Tap {
    Lanes lane, used;
    typename V::Native weight;
  };

  void plan_lanes() {
    const int64_t n = t_.out * K_, row = t_.in * K_, taps = t_.most();
    std::vector<int32_t> groups;
    std::vector<Tap> tap(size_t(ceil_div(n, W) * taps), Tap{});
    for (int64_t e = 0; e < n; e += W) {
      const int64_t g = e / W, end = std::min(e + W, n);
      int64_t base = row - 2 * W;
      for (int64_t i = e; i < end; ++i)
        if (t_.count(i / K_) > 0) base = std::min<int64_t>(base, t_.first[i / K_] * K_ + i % K_);
      for (int64_t i = e; i < end; ++i) {
        const int64_t o = i / K_;
        ragged_ = ragged_ || t_.count(o) < taps;
        for (int64_t j = 0; j < t_.count(o); ++j) {
          const int64_t lane = (t_.first[o] + j) * K_ + i % K_ - base;
          if (lane >= 2 * W) return;
          Tap& to = tap[g * taps + j];
          to.lane[i - e] = Index(lane), to.used[i - e] = -1, to.weight[i - e] = t_.weight[t_.start[o] + j];
        }
      }
      groups.push_back(int32_t(base));
    }
    groups_ = std::move(groups), tap_ = std::move(tap), taps_ = taps;
  }

  template <int fixed, bool ragged, class T>
  PYOPS_INLINE void permute(const A* from, T* to) const {
    const int64_t taps = fixed ? fixed : taps_;
    each_vector<A>(t_.out * K_, [&](int64_t e, auto lanes) {
      const A* at = from + groups_[e / W];
      const auto low = V::load(at).v, high = V::load(at + W).v;
      V sum;
      for (int64_t j = 0; j < taps; ++j) {
        const Tap& tap = tap_[e / W * taps + j];
        auto value = __builtin_shuffle(low, high, tap.lane);
        if constexpr (ragged) value = simd::bits_as<typename V::Native>(simd::bits_as<Lanes>(value) & tap.used);
        if constexpr (fixed == 1)
          sum = value;
        else
          sum = fma(V(tap.weight), V(value), sum);
      }
      sum.store(to + e, lanes);
    });
  }

  int64_t taps_ = 0;
  bool ragged_ = false;
  std::vector<int32_t> groups_;
  std::vector<Tap> tap_;
#endif

  const Table<A>& t_;
  int64_t K_;
  bool copies_;
};

}  // namespace pyops::PYOPS_CPU_CAPABILITY
