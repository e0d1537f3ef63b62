// A layer of a recurrent network over all steps, launched: its kernels stand in recurrent_sequence.cuh.
#pragma once

#include "cuda/recurrent_sequence.cuh"

namespace pyops {

// to[j, i] = from[i, j] for each of D matrices [rows, columns].
template <class T>
__global__ void transpose_kernel(const T* from, T* to, int64_t D, int64_t rows, int64_t columns) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x, size = rows * columns;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < D * size; i += stride)
    to[i] = from[i / size * size + i % rows * columns + i % size / rows];
}
template <class T>
void transpose(const T* from, T* to, int64_t D, int64_t rows, int64_t columns, cudaStream_t stream) {
  launch(transpose_kernel<T>,
         {.grid = dim3(static_cast<unsigned>(std::min<int64_t>(ceil_div(D * rows * columns, 256), 65535))),
          .block = dim3(256),
          .stream = stream},
         from, to, D, rows, columns);
}

// All steps in one launch, of work.blocks_per_direction for each of D directions or layers; false, and nothing done,
// where these blocks do not all run at once.
template <class Kernel, class Layer, class Work, class... More>
bool launch_persistent(Kernel kernel, const Layer& s, Work work, int64_t D, int64_t steps, size_t shared, int cluster,
                       cudaStream_t stream, const More&... more) {
  work.begin = 0, work.end = steps, work.phase = 0;
  const int64_t blocks = work.blocks_per_direction * D;
  if (blocks > max_cooperative_blocks(kernel, sequence_threads, shared, cluster)) return false;
  zero_memory(work.barrier, sizeof(unsigned), stream);
  launch(kernel,
         {.grid = dim3(static_cast<unsigned>(blocks)),
          .block = dim3(sequence_threads),
          .smem = shared,
          .stream = stream,
          .cluster = dim3(static_cast<unsigned>(cluster)),
          .cooperative = true},
         s, work, more...);
  return true;
}

// On tensor cores, by kernel_of(std::integral_constant) of one of these tiles; false where CUDA cores are to take the
// layer.
template <class T, int segments, int... tiles, class KernelOf, class Layer, class Work>
bool run_on_tensor_cores(std::integer_sequence<int, tiles...> choices, const KernelOf& kernel_of, const Layer& s,
                         Work work, const MmaSizes& size, int64_t steps, cudaStream_t stream) {
  bool done = false;
  if constexpr (sizeof(T) == 2) {
    const MmaPlan plan = mma_plan<T, segments>(size, choices);
    work.blocks_per_direction = plan.blocks;
    const auto with = [&]<int n>() {
      if (n == plan.tiles)
        done = launch_persistent(kernel_of(std::integral_constant<int, n>()), s, work, size.D, steps,
                                 static_cast<size_t>(plan.shared), 1, stream);
    };
    (with.template operator()<tiles>(), ...);
  }
  return done;
}

// One persistent launch where the weights of at least half of the `units` units of each of D directions (or layers),
// `bytes` each, fit beside what else the kernel shares; else a launch for each of the one or two parts of a step.
template <class Kernel, class Layer, class Work>
void run_sequence(Kernel kernel, const Layer& s, Work work, int64_t D, int64_t units, int64_t bytes, int64_t steps,
                  int parts, size_t other_bytes, cudaStream_t stream) {
  if (steps == 0) return;
  const int64_t most = std::max<int64_t>(multiprocessor_count() / D, 1);
  // No more blocks than keep every warp busy with a tile.
  work.blocks_per_direction = static_cast<int>(std::min(most, ceil_div(units, 4)));
  const int64_t of_block = ceil_div(units, work.blocks_per_direction);
  work.kept = std::min(of_block, (shared_memory_limit() - static_cast<int64_t>(other_bytes)) / bytes);
  const size_t shared = other_bytes + static_cast<size_t>(work.kept * bytes);
  if (2 * work.kept >= of_block && launch_persistent(kernel, s, work, D, steps, shared, 1, stream)) return;
  work.blocks_per_direction = static_cast<int>(std::min<int64_t>(ceil_div(units, 8), most * 4)), work.kept = 0;
  const dim3 grid(static_cast<unsigned>(work.blocks_per_direction * D));
  for (int64_t i = 0; i < steps; ++i) {
    work.begin = i, work.end = i + 1;
    for (work.phase = 1; work.phase <= parts; ++work.phase)
      launch(kernel, {.grid = grid, .block = dim3(sequence_threads), .smem = other_bytes, .stream = stream}, s, work);
  }
}

// In csrc/cuda/<stem>_hopper.cu: blocks share the states by multicast in clusters; false, and nothing done, where they
// should not or cannot. cuda/recurrent_multicast.cuh.
template <class Cell, class T>
bool forward_by_multicast(const recurrent::Sequence<T>& s, const SequenceWork<T>& work, cudaStream_t stream);

// Initial states go straight to the final ones where there are no steps.
template <class T>
__global__ void copy_kernel(const T* from, T* to, int64_t n) {
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x)
    to[i] = from != nullptr ? from[i] : from_acc<T>(accumulate_t<T>(0));
}
template <class T>
void copy(const T* from, T* to, int64_t n, cudaStream_t stream) {
  launch(copy_kernel<T>,
         {.grid = dim3(static_cast<unsigned>(std::min<int64_t>(ceil_div(n, 256), 1024))),
          .block = dim3(256),
          .stream = stream},
         from, to, n);
}

template <class Cell, class T>
void layer_forward(const OpScope& op, const recurrent::Sequence<T>& s) {
  using A = accumulate_t<T>;
  const auto stream = static_cast<cudaStream_t>(op.stream());
  const int64_t B = s.steps.B, D = s.D;
  if (B == 0) return;
  if (s.steps.T == 0) {
    copy(s.h0, s.h_n, D * B * s.P, stream);
    if (Cell::has_cell) copy(s.c0, s.c_n, D * B * s.H, stream);
    return;
  }
  Tensor c = op.empty<A>({Cell::has_cell ? D * B * s.H : 0}), m = op.empty<T>({s.w_hr != nullptr ? D * B * s.H : 0});
  Tensor barrier = op.empty<int32_t>({1});
  SequenceWork<T> work{};
  work.c = op.out<A>(c, "c", {c.numel()}), work.m = op.out<T>(m, "m", {m.numel()});
  work.barrier = reinterpret_cast<unsigned*>(op.out<int32_t>(barrier, "barrier", {1}));
  const int64_t bytes = Cell::gates * s.P * static_cast<int64_t>(sizeof(T));
  if (s.P % 8 == 0 && is_aligned(s.h0, s.w_hh)) {
    if constexpr (hopper_built && sizeof(T) == 2)
      if (compute_capability() == 90 && forward_by_multicast<Cell>(s, work, stream)) return;
    if (run_on_tensor_cores<T, 1>(
            std::integer_sequence<int, 1, 2, 4>(),
            [](auto tiles) { return sequence_forward_kernel<Cell, T, decltype(tiles)::value>; }, s, work,
            {s.H, Cell::gates, whole_blocks(s.P), B, D, bytes}, s.steps.T, stream))
      return;
  }
  run_sequence(sequence_forward_kernel<Cell, T>, s, work, D, s.H, bytes, s.steps.T, s.w_hr != nullptr ? 2 : 1, 0,
               stream);
}

template <class Cell, class T>
void layer_backward(const OpScope& op, const recurrent::Sequence<T>& s) {
  using A = accumulate_t<T>;
  const auto stream = static_cast<cudaStream_t>(op.stream());
  const int64_t B = s.steps.B, D = s.D, K = Cell::gates * s.H;
  if (B == 0) return;
  if (s.steps.T == 0) {
    copy(s.dh_n, s.dh0, D * B * s.P, stream);
    if (Cell::has_cell) copy(s.dc_n, s.dc0, D * B * s.H, stream);
    return;
  }
  Tensor c = op.empty<A>({Cell::has_cell ? D * B * s.H : 0}), direct = op.empty<A>({Cell::splits ? D * B * s.H : 0});
  Tensor w_hh_t = op.empty<T>({D * s.P * K}), w_hr_t = op.empty<T>({s.w_hr != nullptr ? D * s.P * s.H : 0});
  Tensor barrier = op.empty<int32_t>({1});
  SequenceWork<T> work{};
  work.c = op.out<A>(c, "dc", {c.numel()}), work.direct = op.out<A>(direct, "direct", {direct.numel()});
  work.barrier = reinterpret_cast<unsigned*>(op.out<int32_t>(barrier, "barrier", {1}));
  T *pw = op.out<T>(w_hh_t, "w_hh_t", {D * s.P * K}), *pr = op.out<T>(w_hr_t, "w_hr_t", {w_hr_t.numel()});
  transpose(s.w_hh, pw, D, K, s.P, stream);
  if (s.w_hr != nullptr) transpose(s.w_hr, pr, D, s.P, s.H, stream);
  work.w_hh_t = pw, work.w_hr_t = pr;
  const int64_t bytes = K * static_cast<int64_t>(sizeof(T));
  if (K % 8 == 0 && run_on_tensor_cores<T, 1>(
                        std::integer_sequence<int, 1>(),
                        [](auto tiles) { return sequence_backward_kernel<Cell, T, decltype(tiles)::value>; }, s, work,
                        {s.P, 1, whole_blocks(K), B, D, bytes}, s.steps.T + 1, stream))
    return;
  run_sequence(sequence_backward_kernel<Cell, T>, s, work, D, s.P, bytes, s.steps.T + 1, s.w_hr != nullptr ? 2 : 1, 0,
               stream);
}

}  // namespace pyops
