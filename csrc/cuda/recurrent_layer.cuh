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

// How all steps of a layer, or of layers side by side, are launched.
struct SequencePlan {
  int blocks = 0;          // per direction or layer; 0: not this way
  int tiles = 0;           // on tensor cores; 0: on CUDA cores
  int cluster = 1;         // blocks that share the states by multicast
  bool persistent = true;  // one launch of blocks that all run at once; else one for each part of a step
  int64_t kept = 0;        // CUDA cores: units of a block whose weights are in shared memory
  int64_t shared = 0;      // bytes of it
};

// What the choice looks at.
struct SequenceSizes {
  int64_t units, bytes, D, steps;  // `bytes`: of the weights of a unit; D: directions or layers
  int parts;                       // of a step
  bool vectors;                    // rows of weights and states in 16-byte steps, as tensor cores want them
  MmaSizes mma;
};

// What a pass needs for its own use, in elements: c, direct, m of SequenceWork, and weights transposed.
template <class T>
struct SequenceSpace {
  int64_t c, direct, m, weights, other_weights;
  int64_t bytes() const {
    const auto wide = static_cast<int64_t>(sizeof(accumulate_t<T>)), narrow = static_cast<int64_t>(sizeof(T));
    return (c + direct) * wide + (m + weights + other_weights) * narrow + static_cast<int64_t>(sizeof(unsigned));
  }
};

template <class Kernel>
bool runs_at_once(Kernel kernel, const SequencePlan& plan, int64_t D) {
  return plan.blocks * D <=
         max_cooperative_blocks(kernel, sequence_threads, static_cast<size_t>(plan.shared), plan.cluster);
}

// All steps in one launch.
template <class Kernel, class Layer, class Work, class... More>
void launch_persistent(Kernel kernel, const Layer& s, Work work, const SequencePlan& plan, int64_t D, int64_t steps,
                       cudaStream_t stream, const More&... more) {
  work.begin = 0, work.end = steps, work.phase = 0, work.blocks_per_direction = plan.blocks, work.kept = plan.kept;
  zero_memory(work.barrier, sizeof(unsigned), stream);
  launch(kernel,
         {.grid = dim3(static_cast<unsigned>(plan.blocks * D)),
          .block = dim3(sequence_threads),
          .smem = static_cast<size_t>(plan.shared),
          .stream = stream,
          .cluster = dim3(static_cast<unsigned>(plan.cluster)),
          .cooperative = true},
         s, work, more...);
}

// Calls f.operator()<n>() where n is one of the tiles.
template <int... tiles, class F>
void with_tiles(std::integer_sequence<int, tiles...>, int n, const F& f) {
  const auto with = [&]<int one>() {
    if (n == one) f.template operator()<one>();
  };
  (with.template operator()<tiles>(), ...);
}

// The tensor cores' plan by kernel_of.operator()<tiles>(); of no blocks where CUDA cores are to take the layer.
template <class T, int segments, class Tiles, class KernelOf>
SequencePlan tensor_core_plan(Tiles tiles, const KernelOf& kernel_of, const MmaSizes& size) {
  SequencePlan plan;
  const MmaPlan mma = mma_plan<T, segments>(size, tiles);
  with_tiles(tiles, mma.tiles, [&]<int n>() {
    const SequencePlan wanted{.blocks = mma.blocks, .tiles = n, .cluster = size.cluster, .shared = mma.shared};
    if (runs_at_once(kernel_of.template operator()<n>(), wanted, size.D)) plan = wanted;
  });
  return plan;
}

// One persistent launch where the weights of at least half of the `units` units of each of D directions (or layers),
// `bytes` each, fit beside what else the kernel shares; else a launch for each of the one or two parts of a step.
template <class Kernel>
SequencePlan cuda_core_plan(Kernel kernel, int64_t D, int64_t units, int64_t bytes, int64_t other_bytes) {
  const int64_t most = std::max<int64_t>(multiprocessor_count() / D, 1);
  // No more blocks than keep every warp busy with a tile.
  SequencePlan plan{.blocks = static_cast<int>(std::min(most, ceil_div(units, 4)))};
  const int64_t of_block = ceil_div(units, plan.blocks);
  plan.kept = std::min(of_block, (shared_memory_limit() - other_bytes) / bytes);
  plan.shared = other_bytes + plan.kept * bytes;
  if (2 * plan.kept >= of_block && runs_at_once(kernel, plan, D)) return plan;
  return {.blocks = static_cast<int>(std::min<int64_t>(ceil_div(units, 8), most * 4)),
          .persistent = false,
          .shared = other_bytes};
}

template <class Kernel, class Layer, class Work>
void run_on_cuda_cores(Kernel kernel, const Layer& s, Work work, const SequencePlan& plan, int64_t D, int64_t steps,
                       int parts, cudaStream_t stream) {
  if (steps == 0) return;
  if (plan.persistent) return launch_persistent(kernel, s, work, plan, D, steps, stream);
  work.blocks_per_direction = plan.blocks, work.kept = 0;
  const dim3 grid(static_cast<unsigned>(plan.blocks * D));
  for (int64_t i = 0; i < steps; ++i) {
    work.begin = i, work.end = i + 1;
    for (work.phase = 1; work.phase <= parts; ++work.phase)
      launch(
          kernel,
          {.grid = grid, .block = dim3(sequence_threads), .smem = static_cast<size_t>(plan.shared), .stream = stream},
          s, work);
  }
}

template <class Kernel, class Layer, class Work>
void run_sequence(Kernel kernel, const Layer& s, const Work& work, int64_t D, int64_t units, int64_t bytes,
                  int64_t steps, int parts, size_t other_bytes, cudaStream_t stream) {
  const auto plan = cuda_core_plan(kernel, D, units, bytes, static_cast<int64_t>(other_bytes));
  run_on_cuda_cores(kernel, s, work, plan, D, steps, parts, stream);
}

// A Pass names its type, how many products of a step it has, the tiles it may take, and the kernel for each, 0 that on
// CUDA cores.
template <class Pass>
SequencePlan plan_of(const SequenceSizes& size) {
  using T = typename Pass::type;
  if constexpr (sizeof(T) == 2) {
    const auto kernel_of = []<int tiles>() { return Pass::template kernel<tiles>(); };
    if (size.vectors)
      if (const auto plan = tensor_core_plan<T, Pass::segments>(typename Pass::Tiles(), kernel_of, size.mma);
          plan.blocks > 0)
        return plan;
  }
  return cuda_core_plan(Pass::template kernel<0>(), size.D, size.units, size.bytes, 0);
}

template <class Pass, class Layer, class Work>
void run_pass(const SequencePlan& plan, const SequenceSizes& size, const Layer& s, const Work& work,
              cudaStream_t stream) {
  if constexpr (sizeof(typename Pass::type) == 2)
    if (plan.tiles > 0)
      return with_tiles(typename Pass::Tiles(), plan.tiles, [&]<int n>() {
        launch_persistent(Pass::template kernel<n>(), s, work, plan, size.D, size.steps, stream);
      });
  run_on_cuda_cores(Pass::template kernel<0>(), s, work, plan, size.D, size.steps, size.parts, stream);
}

// In csrc/cuda/<stem>_hopper.cu: blocks share the states by multicast in clusters; a plan of no blocks where they
// should not or cannot. cuda/recurrent_multicast.cuh.
template <class Cell, class T>
SequencePlan multicast_plan(const recurrent::Sequence<T>& s);
template <class Cell, class T>
void forward_by_multicast(const recurrent::Sequence<T>& s, const SequenceWork<T>& work, const SequencePlan& plan,
                          cudaStream_t stream);

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
struct LayerForward {
  using type = T;
  using Tiles = std::integer_sequence<int, 1, 2, 4>;
  static constexpr int segments = 1;
  template <int tiles>
  static auto kernel() {
    return sequence_forward_kernel<Cell, T, tiles>;
  }
  static SequenceSizes sizes(const recurrent::Sequence<T>& s) {
    const int64_t bytes = Cell::gates * s.P * static_cast<int64_t>(sizeof(T));
    return {s.H,
            bytes,
            s.D,
            s.steps.T,
            s.w_hr != nullptr ? 2 : 1,
            s.P % 8 == 0 && is_aligned(s.h0, s.w_hh),
            {s.H, Cell::gates, whole_blocks(s.P), s.steps.B, s.D, bytes}};
  }
  static SequenceSpace<T> space(const recurrent::Sequence<T>& s) {
    const int64_t states = s.D * s.steps.B * s.H;
    return {Cell::has_cell ? states : 0, 0, s.w_hr != nullptr ? states : 0, 0, 0};
  }
  static SequencePlan plan(const recurrent::Sequence<T>& s) {
    const SequenceSizes size = sizes(s);
    if constexpr (hopper_built && sizeof(T) == 2)
      if (size.vectors && compute_capability() == 90)
        if (const SequencePlan shared = multicast_plan<Cell>(s); shared.blocks > 0) return shared;
    return plan_of<LayerForward>(size);
  }
};

template <class Cell, class T>
struct LayerBackward {
  using type = T;
  using Tiles = std::integer_sequence<int, 1>;
  static constexpr int segments = 1;
  template <int tiles>
  static auto kernel() {
    return sequence_backward_kernel<Cell, T, tiles>;
  }
  static SequenceSizes sizes(const recurrent::Sequence<T>& s) {
    const int64_t K = Cell::gates * s.H, bytes = K * static_cast<int64_t>(sizeof(T));
    return {s.P,
            bytes,
            s.D,
            s.steps.T + 1,
            s.w_hr != nullptr ? 2 : 1,
            K % 8 == 0,
            {s.P, 1, whole_blocks(K), s.steps.B, s.D, bytes}};
  }
  static SequenceSpace<T> space(const recurrent::Sequence<T>& s) {
    const int64_t states = s.D * s.steps.B * s.H, weights = s.D * s.P * s.H;
    return {Cell::has_cell ? states : 0, Cell::splits ? states : 0, 0, Cell::gates * weights,
            s.w_hr != nullptr ? weights : 0};
  }
  static SequencePlan plan(const recurrent::Sequence<T>& s) { return plan_of<LayerBackward>(sizes(s)); }
};

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
  using Pass = LayerForward<Cell, T>;
  const auto space = Pass::space(s);
  Tensor c = op.empty<A>({space.c}), m = op.empty<T>({space.m}), barrier = op.empty<int32_t>({1});
  SequenceWork<T> work{};
  work.c = op.out<A>(c, "c", {c.numel()}), work.m = op.out<T>(m, "m", {m.numel()});
  work.barrier = reinterpret_cast<unsigned*>(op.out<int32_t>(barrier, "barrier", {1}));
  const SequencePlan plan = Pass::plan(s);
  if constexpr (hopper_built && sizeof(T) == 2)
    if (plan.cluster > 1) return forward_by_multicast<Cell>(s, work, plan, stream);
  run_pass<Pass>(plan, Pass::sizes(s), s, work, stream);
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
  using Pass = LayerBackward<Cell, T>;
  const auto space = Pass::space(s);
  Tensor c = op.empty<A>({space.c}), direct = op.empty<A>({space.direct});
  Tensor w_hh_t = op.empty<T>({space.weights}), w_hr_t = op.empty<T>({space.other_weights});
  Tensor barrier = op.empty<int32_t>({1});
  SequenceWork<T> work{};
  work.c = op.out<A>(c, "dc", {c.numel()}), work.direct = op.out<A>(direct, "direct", {direct.numel()});
  work.barrier = reinterpret_cast<unsigned*>(op.out<int32_t>(barrier, "barrier", {1}));
  T *pw = op.out<T>(w_hh_t, "w_hh_t", {space.weights}), *pr = op.out<T>(w_hr_t, "w_hr_t", {w_hr_t.numel()});
  transpose(s.w_hh, pw, D, K, s.P, stream);
  if (s.w_hr != nullptr) transpose(s.w_hr, pr, D, s.P, s.H, stream);
  work.w_hh_t = pw, work.w_hr_t = pr;
  run_pass<Pass>(Pass::plan(s), Pass::sizes(s), s, work, stream);
}

}  // namespace pyops
