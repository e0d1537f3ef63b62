// Batch norm of [N, C, S] in one launch whose second reading of x comes from L2.
//
// A channel is cut into slices. Block b of G resident blocks reduces slice b, b + G, ..., and normalises each of them
// `lag` turns later, once all slices of its channel have been reduced: by then they are complete as a rule, and x is
// still in L2, so that DRAM sees x once. Nothing waits for the whole grid; a channel's counter says when it is ready.
//
// No deadlock: slice u of turn t waits for slices of the same channel, which are reduced in turn
// t + ceil((count - 1) / G) at the latest, and that turn's reductions come before the normalisation of turn t wherever
// lag > ceil((count - 1) / G). All blocks are resident (cooperative launch), so each one gets there.
#pragma once

#include "cuda/norm_channels.cuh"

namespace pyops::norm {

// kernels

struct Waves {
  Runs runs;
  int64_t units, lag;
  explicit Waves(const Runs& r) : runs(r), units(r.units()), lag(0) {}
};

// What belongs to channels, in both passes; null where a pass does not have it, or where a gradient is not wanted.
template <class T, class W>
struct WaveArguments {
  const W* w;
  const W* b;
  const accumulate_t<T>* mean;  // backward
  const accumulate_t<T>* rstd;
  accumulate_t<T>* mean_out;  // forward
  accumulate_t<T>* rstd_out;
  accumulate_t<T>* var_out;
  W* dw;
  W* db;
  accumulate_t<T>* part;  // [2, units], written and read by this launch
  unsigned* ready;        // [C], slices reduced
  accumulate_t<T> eps;
};

template <Pass P, class T, class W, int V>
__global__ void __launch_bounds__(256) batch_waves_kernel(const T* __restrict__ x, const T* __restrict__ dy,
                                                          T* __restrict__ out, WaveArguments<T, W> p, Waves waves) {
  using A = accumulate_t<T>;
  auto& s = shared_storage<MomentsShared<A>>();
  const Runs& r = waves.runs;
  const int thread = threadIdx.x;
  const int64_t turns = ceil_div(waves.units, gridDim.x) + waves.lag;
  for (int64_t turn = 0; turn < turns; ++turn) {
    const int64_t fresh = blockIdx.x + turn * gridDim.x, due = fresh - waves.lag * gridDim.x;
    if (fresh < waves.units) {
      const int64_t c = r.by_count.divide(fresh);
      const SliceWalk walk(r, fresh);
      A first, second;
      if constexpr (P == Pass::forward) {
        ShiftedSums<true, A> sums;
        for_slice<V>(r, walk, x, thread, 256, [&](const Vec<T, V>& v, int64_t) {
          const Vec<A, V> a = widen(v);
          if (sums.count == 0) sums.start(a[0]);
#pragma unroll
          for (int j = 0; j < V; ++j) sums.add(a[j]);
          sums.count += V;
        });
        const Moments<A> total = group_reduce(sums.moments(as_shift(to_acc(x[c * r.channel_stride]))), 256, s.reduce);
        first = total.mean;
        second = total.square;
      } else {
        const A mean = p.mean[c];
        Pair<A> sums{};
        for_slice<V>(r, walk, dy, thread, 256, [&](const Vec<T, V>& d, int64_t address) {
          const Vec<A, V> a = widen(load_vec<V>(x + address)), e = widen(d);
#pragma unroll
          for (int j = 0; j < V; ++j) {
            sums.first += e[j];
            sums.second += e[j] * (a[j] - mean);
          }
        });
        sums = group_reduce(sums, 256, reinterpret_cast<Pair<A>*>(s.reduce));
        first = sums.first;
        second = sums.second * p.rstd[c];
      }
      if (thread == 0) {
        p.part[fresh] = first;
        p.part[waves.units + fresh] = second;
        fetch_add_acq_rel(p.ready + c, 1u);
      }
    }
    if (due < 0 || due >= waves.units) continue;
    const int64_t c = r.by_count.divide(due), begin = c * r.count;
    if (thread == 0) {
      while (load_acquire(p.ready + c) < r.count) __nanosleep(64);
    }
    __syncthreads();
    const A weight = p.w != nullptr ? convert<A>(p.w[c]) : A(1);
    Coefficients<A> q;
    if constexpr (P == Pass::forward) {
      Moments<A> total{};
      for (int64_t k = thread; k < r.count; k += 256) {
        const int64_t rest = r.elements() - k * r.slice, size = rest < r.slice ? rest : r.slice;
        total = Moments<A>::combine(total, {static_cast<A>(size), p.part[begin + k], p.part[waves.units + begin + k]});
      }
      total = group_reduce(total, 256, s.reduce);
      const A mean = as_shift(to_acc(x[c * r.channel_stride])) + total.mean, var = total.square / total.count;
      const A rstd = inverse_root(var + p.eps);
      if (due == begin && thread == 0) {
        p.mean_out[c] = mean;
        p.rstd_out[c] = rstd;
        p.var_out[c] = var;
      }
      q = {{mean, rstd * weight, p.b != nullptr ? convert<A>(p.b[c]) : A(0), A(0)}};
    } else {
      Pair<A> total{};
      for (int64_t k = thread; k < r.count; k += 256)
        total = Pair<A>::combine(total, {p.part[begin + k], p.part[waves.units + begin + k]});
      total = group_reduce(total, 256, reinterpret_cast<Pair<A>*>(s.reduce));
      if (due == begin && thread == 0 && p.dw != nullptr) {
        p.db[c] = convert<W>(total.first);
        p.dw[c] = convert<W>(total.second);
      }
      const A rstd = p.rstd[c], scale = rstd * weight, inverse = scale / static_cast<A>(r.elements());
      q = {{p.mean[c], scale, rstd * total.second * inverse, total.first * inverse}};
    }
    for_slice<V, true>(r, SliceWalk(r, due), x, thread, 256, [&](const Vec<T, V>& v, int64_t address) {
      const Vec<A, V> a = widen(v);
      Vec<A, V> e{};
      if constexpr (P == Pass::backward) e = widen(load_vec_streaming<V>(dy + address));
      Vec<T, V> result;
#pragma unroll
      for (int j = 0; j < V; ++j) result[j] = from_acc<T>(apply_one<P>(a[j], e[j], q, false));
      store_vec_streaming(out + address, result);
    });
  }
}

// launch

// False where the shape belongs to the slices path: an input that L2 holds anyway, or channels that it cannot hold.
template <Pass P, class T, class W, class Workspace>
bool batch_in_waves(const T* x, const T* dy, T* out, WaveArguments<T, W> p, const ChannelShape& shape,
                    Workspace&& workspace, cudaStream_t stream) {
  using A = accumulate_t<T>;
  constexpr int V = vector_width<T>;
  if constexpr (sizeof(T) == 8) {
    return false;
  } else {
    constexpr int64_t tensors = P == Pass::forward ? 1 : 2;
    const int64_t cache = l2_cache_bytes(), bytes = tensors * shape.N * shape.C * shape.S * int64_t(sizeof(T));
    if (shape.columns() || shape.S % V != 0 || !is_aligned(x, dy, out) || bytes <= cache / 2) return false;
    Waves waves(shape.runs());
    const Runs& r = waves.runs.cut(divide_up(16 * 1024 / int64_t(sizeof(T)) / tensors, 2048) * 2048);
    waves.units = r.units();
    const auto kernel = batch_waves_kernel<P, T, W, V>;
    const int64_t step = multiprocessor_count(), slice_bytes = tensors * r.slice * int64_t(sizeof(T));
    int64_t blocks = max_cooperative_blocks(kernel, 256, sizeof(MomentsShared<A>));
    // What stays in L2 between the two readings: the slices of lag + 1 turns, and the rows of y on their way out.
    const auto turns = [&] { return divide_up(r.count - 1, blocks) + 1; };
    while (blocks > step && (turns() + 1) * blocks * slice_bytes > cache / 2) blocks -= step;
    if ((turns() + 1) * blocks * slice_bytes > cache) return false;
    blocks = std::min(blocks, waves.units);
    waves.lag = turns();
    p.part = workspace(2 * waves.units);
    p.ready = reinterpret_cast<unsigned*>(workspace(shape.C));
    zero_memory(p.ready, static_cast<size_t>(shape.C) * sizeof(unsigned), stream);
    launch(kernel,
           {.grid = dim3(static_cast<unsigned>(blocks)),
            .block = dim3(256),
            .smem = sizeof(MomentsShared<A>),
            .stream = stream,
            .cooperative = true},
           x, dy, out, p, waves);
    return true;
  }
}

}  // namespace pyops::norm
