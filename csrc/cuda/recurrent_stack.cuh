// A stack of layers as one launch: blocks are dealt out to the layers, and layer l takes a step while layer l - 1 takes
// the next one, so L layers of T steps meet T + L - 1 times where one after the other they would L T times.
//
// A block keeps the weights of its units for the states of its own layer and for the output of the layer below
// (backward: for the gradients of the layer above). What a layer reads of another one was written before the last
// barrier.
#pragma once

#include "cuda/recurrent_layer.cuh"

namespace pyops {

template <class T>
struct StackWork : SequenceWork<T> {
  const T* w_ih_t;  // backward: [L - 1, H, gates H]
};

template <class Cell, class T, int tiles = 0>
__global__ void stack_forward_kernel(recurrent::Stack<Cell, T> stack, StackWork<T> work) {
  constexpr int G = Cell::gates;
  const Place place(work.blocks_per_direction);
  const int64_t l = place.d, H = stack.s.H, B = stack.s.steps.B;
  const Slice slice = Slice::of(H, work.blocks_per_direction, place.part), kept = slice.first(work.kept);
  const recurrent::Sequence<T> s = stack.layer(l);
  Neighbour<T> below{};
  if (l > 0) below = {stack.layer(l - 1).y, stack.input_weights(l), stack.input_bias(l)};
  work.c += l * B * H;
  const auto steps = [&](const auto& cells) {
    for (int64_t i = work.begin; i < work.end; ++i) {
      const int64_t t = i - l;
      if (t >= 0 && t < s.steps.T) cells(t);
      if (work.phase == 0) grid_sync(work.barrier);
    }
  };
  if constexpr (tiles > 0) {
    using Product = MmaProduct<T, tiles, 2>;
    const ForwardStep<Cell, T, true> step{s, work, slice, kept, 0, nullptr, below};
    Product product(shared_storage<typename Product::Shared>(), {H, l > 0 ? H : 0},
                    [&](int segment, int m) { return step.mma_weights(segment, m); });
    steps([&](int64_t t) { step.cells(t, product); });
  } else {
    T* shared = work.phase == 0 ? &shared_storage<T>() : nullptr;
    if (shared != nullptr) {
      keep_weights(shared, s.w_hh, kept, G, H, H);
      if (l > 0) keep_weights(shared + kept.size() * G * H, below.weights, kept, G, H, H);
    }
    const ForwardStep<Cell, T, true> step{s, work, slice, kept, 0, shared, below};
    steps([&](int64_t t) { step.cells(t); });
  }
}

template <class Cell, class T, int tiles = 0>
__global__ void stack_backward_kernel(recurrent::Stack<Cell, T> stack, StackWork<T> work) {
  const Place place(work.blocks_per_direction);
  const int64_t l = place.d, H = stack.s.H, B = stack.s.steps.B, K = Cell::gates * H;
  const bool last = l == stack.L - 1;
  const Slice slice = Slice::of(H, work.blocks_per_direction, place.part), kept = slice.first(work.kept);
  const recurrent::Sequence<T> s = stack.layer(l);
  Neighbour<T> above{};
  if (!last) above = {stack.layer(l + 1).dgates, work.w_ih_t + l * H * K, nullptr};
  work.w_hh_t += l * H * K;
  if (Cell::has_cell) work.c += l * B * H;
  if (Cell::splits) work.direct += l * B * H;
  const auto steps = [&](const auto& states) {
    for (int64_t i = work.begin; i < work.end; ++i) {
      const int64_t own = i - (stack.L - 1 - l);  // the last layer is the first
      if (own >= 0 && own <= s.steps.T) {
        const auto [t, later] = s.steps_backwards(0, own);
        states(t, later);
      }
      if (work.phase == 0) grid_sync(work.barrier);
    }
  };
  if constexpr (tiles > 0) {
    using Product = MmaProduct<T, tiles, 2>;
    const BackwardStep<Cell, T, true> step{s, work, slice, kept, 0, nullptr, above};
    Product product(shared_storage<typename Product::Shared>(), {K, last ? 0 : K},
                    [&](int segment, int m) { return step.mma_weights(segment, m); });
    steps([&](int64_t t, int64_t later) { step.states(t, later, product); });
  } else {
    T* shared = work.phase == 0 ? &shared_storage<T>() : nullptr;
    if (shared != nullptr) {
      keep_weights(shared, work.w_hh_t, kept, 1, H, K);
      if (!last) keep_weights(shared + kept.size() * K, above.weights, kept, 1, H, K);
    }
    const BackwardStep<Cell, T, true> step{s, work, slice, kept, 0, shared, above};
    steps([&](int64_t t, int64_t later) { step.states(t, later); });
  }
}

template <class Cell, class T>
struct StackForward {
  using type = T;
  using Tiles = std::integer_sequence<int, 2, 4>;
  static constexpr int segments = 2;
  template <int tiles>
  static auto kernel() {
    return stack_forward_kernel<Cell, T, tiles>;
  }
  static SequenceSizes sizes(const recurrent::Stack<Cell, T>& stack) {
    const int64_t H = stack.s.H, B = stack.s.steps.B, L = stack.L;
    const int64_t bytes = 2 * Cell::gates * H * static_cast<int64_t>(sizeof(T));
    constexpr int slots = Cell::gates + Cell::splits;
    const bool vectors = H % 8 == 0 && is_aligned(stack.s.h0, stack.s.w_hh, stack.w_ih);
    return {H, bytes, L, stack.s.steps.T + L - 1, 1, vectors, {H, slots, 2 * whole_blocks(H), B, L, bytes}};
  }
  static SequenceSpace<T> space(const recurrent::Stack<Cell, T>& stack) {
    return {Cell::has_cell ? stack.L * stack.s.steps.B * stack.s.H : 0, 0, 0, 0, 0};
  }
  static SequencePlan plan(const recurrent::Stack<Cell, T>& stack) { return plan_of<StackForward>(sizes(stack)); }
};

template <class Cell, class T>
struct StackBackward {
  using type = T;
  using Tiles = std::integer_sequence<int, 1>;
  static constexpr int segments = 2;
  template <int tiles>
  static auto kernel() {
    return stack_backward_kernel<Cell, T, tiles>;
  }
  static SequenceSizes sizes(const recurrent::Stack<Cell, T>& stack) {
    const int64_t H = stack.s.H, B = stack.s.steps.B, L = stack.L, K = Cell::gates * H;
    const int64_t bytes = 2 * K * static_cast<int64_t>(sizeof(T));
    return {H, bytes, L, stack.s.steps.T + L, 1, K % 8 == 0, {H, 1, 2 * whole_blocks(K), B, L, bytes}};
  }
  static SequenceSpace<T> space(const recurrent::Stack<Cell, T>& stack) {
    const int64_t L = stack.L, H = stack.s.H, states = L * stack.s.steps.B * H, weights = Cell::gates * H * H;
    return {Cell::has_cell ? states : 0, Cell::splits ? states : 0, 0, L * weights, (L - 1) * weights};
  }
  static SequencePlan plan(const recurrent::Stack<Cell, T>& stack) { return plan_of<StackBackward>(sizes(stack)); }
};

template <class Cell, class T>
void stack_forward(const OpScope& op, const recurrent::Stack<Cell, T>& stack) {
  using A = accumulate_t<T>;
  const auto stream = static_cast<cudaStream_t>(op.stream());
  const int64_t B = stack.s.steps.B, H = stack.s.H, L = stack.L;
  if (B == 0) return;
  using Pass = StackForward<Cell, T>;
  const auto space = Pass::space(stack);
  Tensor c = op.empty<A>({space.c}), barrier = op.empty<int32_t>({1});
  StackWork<T> work{};
  work.c = op.out<A>(c, "c", {c.numel()});
  work.barrier = reinterpret_cast<unsigned*>(op.out<int32_t>(barrier, "barrier", {1}));
  run_pass<Pass>(Pass::plan(stack), Pass::sizes(stack), stack, work, stream);
}

template <class Cell, class T>
void stack_backward(const OpScope& op, const recurrent::Stack<Cell, T>& stack) {
  using A = accumulate_t<T>;
  const auto stream = static_cast<cudaStream_t>(op.stream());
  const int64_t B = stack.s.steps.B, H = stack.s.H, L = stack.L, K = Cell::gates * H;
  if (B == 0) return;
  using Pass = StackBackward<Cell, T>;
  const auto space = Pass::space(stack);
  Tensor c = op.empty<A>({space.c}), direct = op.empty<A>({space.direct}), barrier = op.empty<int32_t>({1});
  Tensor w_hh_t = op.empty<T>({space.weights}), w_ih_t = op.empty<T>({space.other_weights});
  StackWork<T> work{};
  work.c = op.out<A>(c, "dc", {c.numel()}), work.direct = op.out<A>(direct, "direct", {direct.numel()});
  work.barrier = reinterpret_cast<unsigned*>(op.out<int32_t>(barrier, "barrier", {1}));
  T *hidden = op.out<T>(w_hh_t, "w_hh_t", {space.weights}), *input = op.out<T>(w_ih_t, "w_ih_t", {space.other_weights});
  transpose(stack.s.w_hh, hidden, L, K, H, stream);
  transpose(stack.w_ih, input, L - 1, K, H, stream);
  work.w_hh_t = hidden, work.w_ih_t = input;
  run_pass<Pass>(Pass::plan(stack), Pass::sizes(stack), stack, work, stream);
}

// The plan of a layer of D directions, or of D layers side by side: blocks in all, tiles, cluster, whether it is one
// launch, bytes of shared memory of a block, bytes of workspace.
template <class Pass, class Layer>
std::vector<int64_t> plan_numbers(const Layer& s, int64_t D) {
  const SequencePlan plan = Pass::plan(s);
  return {plan.blocks * D, plan.tiles, plan.cluster, plan.persistent, plan.shared, Pass::space(s).bytes()};
}
template <class Cell, class T>
std::vector<int64_t> plan_numbers(const recurrent::Steps& steps, int64_t D, int64_t H, bool stacked, bool backward) {
  recurrent::Stack<Cell, T> stack{};
  stack.L = D;
  recurrent::Sequence<T>& s = stack.s;
  s.steps = steps, s.D = D, s.H = s.P = H;
  if (stacked)
    return backward ? plan_numbers<StackBackward<Cell, T>>(stack, D) : plan_numbers<StackForward<Cell, T>>(stack, D);
  return backward ? plan_numbers<LayerBackward<Cell, T>>(s, D) : plan_numbers<LayerForward<Cell, T>>(s, D);
}

}  // namespace pyops
