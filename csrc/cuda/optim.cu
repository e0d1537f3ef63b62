// optim · CUDA
//   sgd_step, adagrad_step, rmsprop_step, adam_step   p, states <- rule(p, g, states); rules in common/optim.h
//   multi_norm    (sum over all tensors of |x|^order)^(1/order), order 1, 2 or infinity
//   multi_scale   x <- min(1, max_norm / (total_norm + 1e-6)) x
//   multi_clamp   x <- min(max(x, -bound), bound)
//   multi_lerp    x <- x + weight (y - x)
// layout   lists of tensors of any shape, each without gaps, a parameter and its states in the same order
// mapping  one launch for up to 192 tensors, whose pointers are its argument: nothing is uploaded, and the launch can
// be
//          captured in a graph. A block takes a chunk of 16384 elements of one tensor, a thread 16-byte vectors of it
// memory   each tensor read once and, where it changes, written once: Adam 28 bytes a float32 parameter
// numerics in fp32 (fp64 for fp64); norms: a chunk in fp32, over chunks in fp64, in a fixed order
#include "cuda/math.cuh"

#include "common/optim.h"
#include "common/optim_binding.h"

namespace pyops {
namespace {

using namespace optim;

constexpr int64_t chunk_elements = 16384;

// The items of one launch, by value. first[t] is the first chunk of tensor t.
constexpr int capacity = 192;
template <class I>
struct Table {
  I item[capacity];
  int first[capacity + 1];
  int tensors;
};

// Which tensor a chunk belongs to.
template <class I>
PYOPS_DEVICE int tensor_of(const Table<I>& table, int chunk) {
  int low = 0, high = table.tensors;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (chunk >= table.first[middle] ? low : high) = middle;
  }
  return low;
}

PYOPS_DEVICE float max(float a, float b) { return detail::Max()(a, b); }
PYOPS_DEVICE double max(double a, double b) { return detail::Max()(a, b); }

// f(i, width) for the elements of a run: whole vectors of W where the memory is aligned, else one by one.
template <int W, class F>
PYOPS_DEVICE void each_vector(int64_t n, bool aligned, F f) {
  const int64_t vectors = aligned ? n / W : 0;
  for (int64_t v = threadIdx.x; v < vectors; v += blockDim.x) f(v * W, std::integral_constant<int, W>());
  for (int64_t i = vectors * W + threadIdx.x; i < n; i += blockDim.x) f(i, std::integral_constant<int, 1>());
}

// Counts the steps of a list, before they are read: in a launch of its own, so that no block sees a mixture.
struct Steps {
  float* step;
};
__global__ void count_steps_kernel(Table<Steps> table, const float* found_inf) {
  const int t = static_cast<int>(threadIdx.x);
  if (t < table.tensors && (found_inf == nullptr || *found_inf == 0.0f)) *table.item[t].step += 1.0f;
}

// What one thread works out in double for its block.
template <class A>
struct StepShared {
  Pace<A> pace;
  A unscale, factor;
  bool skips;
};

template <class Rule, class T, class S>
__global__ void step_kernel(Table<Item<T, S>> table, Rule rule, Scaling scaling, double lr, const float* device_lr) {
  using A = accumulate_t<T>;
  auto& shared = shared_storage<StepShared<A>>();
  const int chunk = static_cast<int>(blockIdx.x), t = tensor_of(table, chunk);
  const Item<T, S>& item = table.item[t];
  if (threadIdx.x == 0) {
    const double step = item.step != nullptr ? static_cast<double>(*item.step) : item.count;
    shared.pace = rule.pace(step, device_lr != nullptr ? static_cast<double>(*device_lr) : lr);
    shared.unscale = static_cast<A>(scaling.unscale());
    shared.factor = static_cast<A>(scaling.clip());
    shared.skips = scaling.skips();
  }
  __syncthreads();
  if (shared.skips) return;
  const Pace<A> pace = shared.pace;
  const A unscale = shared.unscale, factor = shared.factor;
  const bool unscales = scaling.grad_scale != nullptr;
  const int64_t begin = static_cast<int64_t>(chunk - table.first[t]) * chunk_elements;
  const int64_t n = item.size - begin < chunk_elements ? item.size - begin : chunk_elements;
  T *const param = item.param + begin, *const grad = item.grad + begin;
  S* const master = item.master + (Item<T, S>::has_master ? begin : 0);
  each_vector<16 / sizeof(S)>(n, item.aligned, [&](int64_t i, auto width) {
    constexpr int W = decltype(width)::value;
    Vec<T, W> g = load_vec<W>(grad + i), p{};
    Vec<S, W> m{}, s[Rule::states]{};
    if constexpr (Item<T, S>::has_master)
      m = load_vec<W>(master + i);
    else
      p = load_vec<W>(param + i);
#pragma unroll
    for (int k = 0; k < Rule::states; ++k)
      if (rule.uses(k)) s[k] = load_vec<W>(item.state[k] + begin + i);
#pragma unroll
    for (int j = 0; j < W; ++j) {
      A gradient = to_acc(g[j]);
      if (unscales) g[j] = from_acc<T>(gradient *= unscale);
      A value = to_acc(p[j]), state[Rule::states];
      if constexpr (Item<T, S>::has_master) value = m[j];
#pragma unroll
      for (int k = 0; k < Rule::states; ++k) state[k] = to_acc(s[k][j]);
      rule.update(value, gradient * factor, state, pace);
#pragma unroll
      for (int k = 0; k < Rule::states; ++k) s[k][j] = from_acc<S>(state[k]);
      if constexpr (Item<T, S>::has_master) m[j] = value;
      p[j] = from_acc<T>(value);
    }
    if (unscales) store_vec(grad + i, g);
    if constexpr (Item<T, S>::has_master) store_vec(master + i, m);
    store_vec(param + i, p);
#pragma unroll
    for (int k = 0; k < Rule::states; ++k)
      if (rule.uses(k)) store_vec(item.state[k] + begin + i, s[k]);
  });
}

// The run of a block: pointers moved to it, its length in `size`.
template <class T, class U>
PYOPS_DEVICE Span<T, U> run_of(const Table<Span<T, U>>& table) {
  const int chunk = static_cast<int>(blockIdx.x), t = tensor_of(table, chunk);
  Span<T, U> span = table.item[t];
  const int64_t begin = static_cast<int64_t>(chunk - table.first[t]) * chunk_elements;
  span.x += begin;
  if (span.y != nullptr) span.y += begin;
  span.size = span.size - begin < chunk_elements ? span.size - begin : chunk_elements;
  return span;
}

template <class T>
__global__ void norm_kernel(Table<Span<const T>> table, Norm norm, double* parts) {
  using A = accumulate_t<T>;
  const auto span = run_of(table);
  A total = 0;
  each_vector<16 / sizeof(T)>(span.size, span.aligned, [&](int64_t i, auto width) {
    constexpr int W = decltype(width)::value;
    const Vec<T, W> x = load_vec<W>(span.x + i);
#pragma unroll
    for (int j = 0; j < W; ++j) {
      const A v = to_acc(x[j]);
      total = norm == Norm::infinity ? max(total, abs(v)) : total + (norm == Norm::one ? abs(v) : v * v);
    }
  });
  auto& scratch = shared_storage<BlockScratch<A>>();
  total = norm == Norm::infinity ? block_max(total, scratch) : block_sum(total, scratch);
  if (threadIdx.x == 0) parts[blockIdx.x] = static_cast<double>(total);
}

__global__ void total_norm_kernel(const double* parts, int64_t chunks, Norm norm, double* total_norm) {
  auto& scratch = shared_storage<BlockScratch<double>>();
  double total = 0;
  for (int64_t i = threadIdx.x; i < chunks; i += blockDim.x)
    total = norm == Norm::infinity ? max(total, parts[i]) : total + parts[i];
  total = norm == Norm::infinity ? block_max(total, scratch) : block_sum(total, scratch);
  if (threadIdx.x == 0) *total_norm = norm == Norm::two ? sqrt(total) : total;
}

struct Scale {
  Scaling scaling;
  PYOPS_DEVICE double number() const { return scaling.clip(); }
  static PYOPS_DEVICE bool is_idle(double factor) { return factor == 1.0; }
  template <class A>
  static PYOPS_DEVICE A value(A x, A, A factor) {
    return x * factor;
  }
};
struct Clamp {
  double bound;
  PYOPS_DEVICE double number() const { return bound; }
  static PYOPS_DEVICE bool is_idle(double) { return false; }
  template <class A>
  static PYOPS_DEVICE A value(A x, A, A b) {
    return detail::Min()(detail::Max()(x, -b), b);
  }
};
struct Lerp {
  double weight;
  PYOPS_DEVICE double number() const { return weight; }
  static PYOPS_DEVICE bool is_idle(double) { return false; }
  template <class A>
  static PYOPS_DEVICE A value(A x, A y, A weight) {
    return x + (y - x) * weight;
  }
};

// x <- f(x, y); y null where the op has none.
template <class F, class T, class U>
__global__ void change_kernel(Table<Span<T, U>> table, F f) {
  using A = accumulate_t<T>;
  const double number = f.number();
  if (F::is_idle(number)) return;
  const auto span = run_of(table);
  each_vector<16 / sizeof(T)>(span.size, span.aligned, [&](int64_t i, auto width) {
    constexpr int W = decltype(width)::value;
    Vec<T, W> x = load_vec<W>(span.x + i);
    Vec<U, W> y{};
    if (span.y != nullptr) y = load_vec<W>(span.y + i);
#pragma unroll
    for (int j = 0; j < W; ++j) x[j] = from_acc<T>(F::value(to_acc(x[j]), A(to_acc(y[j])), static_cast<A>(number)));
    store_vec(span.x + i, x);
  });
}

// run(table, chunks, chunks before it) for every table that the items fill.
template <class I, class F>
void each_table(const std::vector<I>& items, F&& run) {
  auto table = std::make_unique<Table<I>>();
  int64_t before = 0;
  table->tensors = 0;
  table->first[0] = 0;
  const auto flush = [&] {
    const int chunks = table->first[table->tensors];
    if (chunks > 0) run(*table, static_cast<unsigned>(chunks), before);
    before += chunks;
    table->tensors = 0;
  };
  for (const I& item : items) {
    const int64_t chunks = ceil_div(item.size, chunk_elements);
    if (chunks == 0) continue;
    if (table->tensors == capacity || table->first[table->tensors] + chunks > INT32_MAX) flush();
    table->item[table->tensors] = item;
    table->first[table->tensors + 1] = table->first[table->tensors] + static_cast<int>(chunks);
    ++table->tensors;
  }
  flush();
}

template <class I>
int64_t chunks_of(const std::vector<I>& items) {
  int64_t chunks = 0;
  for (const I& item : items) chunks += ceil_div(item.size, chunk_elements);
  return chunks;
}

}  // namespace
}  // namespace pyops

// binding

#include "common/registry.h"

namespace pyops {
namespace {

// Counts steps that live on the device, and returns where.
std::vector<const float*> count_on_device(const OpScope& op, const List& steps, const float* found_inf,
                                          cudaStream_t stream) {
  std::vector<const float*> found;
  Table<Steps> table{};
  for (size_t i = 0; i < steps.size(); ++i) {
    float* step = op.out<float>(steps[i], "a step", {});
    found.push_back(step);
    table.item[table.tensors++] = {step};
    if (table.tensors < capacity && i + 1 < steps.size()) continue;
    launch(count_steps_kernel, {.grid = dim3(1), .block = dim3(capacity), .stream = stream}, table, found_inf);
    table.tensors = 0;
  }
  return found;
}

template <template <class> class Rule, class... Numbers>
void run_step(const OpScope& op, const Lists& lists, bool steps_on_device, const Scaling& scaling, double lr,
              const OptionalTensor& device_lr, const Numbers&... numbers) {
  const auto stream = static_cast<cudaStream_t>(op.stream());
  std::vector<const float*> steps;
  std::vector<double> counts;
  if (steps_on_device) {
    steps = count_on_device(op, lists.steps, scaling.found_inf, stream);
  } else if (!lists.steps.empty()) {
    op.check(scaling.found_inf == nullptr, "found_inf needs steps on the device");
    counts = count_on_host(op, lists.steps, false);
  }
  const float* lr_pointer = op.in_optional<float>(device_lr, "device_lr", {});
  dispatch_params(op, lists, [&]<class T, class S>() {
    const Rule<accumulate_t<T>> rule(numbers...);
    auto items = items_of<decltype(rule), T, S>(op, lists, rule);
    for (size_t t = 0; t < items.size(); ++t) {
      if (t < steps.size()) items[t].step = steps[t];
      if (t < counts.size()) items[t].count = counts[t];
    }
    each_table(items, [&](const auto& table, unsigned chunks, int64_t) {
      launch(step_kernel<Rule<accumulate_t<T>>, T, S>,
             {.grid = dim3(chunks), .block = dim3(256), .smem = sizeof(StepShared<accumulate_t<T>>), .stream = stream},
             table, rule, scaling, lr, lr_pointer);
    });
  });
}

void sgd_step(List params, List grads, List momentum_buffers, List masters, double lr, const OptionalTensor& device_lr,
              const OptionalTensor& grad_scale, const OptionalTensor& found_inf, const OptionalTensor& total_norm,
              double max_norm, bool maximize, double momentum, double dampening, double weight_decay, bool nesterov,
              bool first) {
  if (params.empty()) return;
  OpScope op("sgd_step", params[0]);
  run_step<Sgd>(op, {params, grads, {&momentum_buffers}, masters, {}}, false,
                scaling_of(op, grad_scale, found_inf, total_norm, max_norm, maximize), lr, device_lr, momentum,
                dampening, weight_decay, nesterov, first);
}

void adagrad_step(List params, List grads, List sums, List masters, List steps, bool steps_on_device, double lr,
                  const OptionalTensor& device_lr, const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
                  const OptionalTensor& total_norm, double max_norm, bool maximize, double lr_decay,
                  double weight_decay, double eps) {
  if (params.empty()) return;
  OpScope op("adagrad_step", params[0]);
  run_step<Adagrad>(op, {params, grads, {&sums}, masters, steps}, steps_on_device,
                    scaling_of(op, grad_scale, found_inf, total_norm, max_norm, maximize), lr, device_lr, lr_decay,
                    weight_decay, eps);
}

void rmsprop_step(List params, List grads, List square_avgs, List momentum_buffers, List grad_avgs, List masters,
                  List steps, bool steps_on_device, double lr, const OptionalTensor& device_lr,
                  const OptionalTensor& grad_scale, const OptionalTensor& found_inf, const OptionalTensor& total_norm,
                  double max_norm, bool maximize, double alpha, double eps, double weight_decay, double momentum,
                  bool centered) {
  if (params.empty()) return;
  OpScope op("rmsprop_step", params[0]);
  run_step<RmsProp>(op, {params, grads, {&square_avgs, &momentum_buffers, &grad_avgs}, masters, steps}, steps_on_device,
                    scaling_of(op, grad_scale, found_inf, total_norm, max_norm, maximize), lr, device_lr, alpha, eps,
                    weight_decay, momentum, centered);
}

void adam_step(List params, List grads, List exp_avgs, List exp_avg_sqs, List max_exp_avg_sqs, List masters, List steps,
               bool steps_on_device, double lr, const OptionalTensor& device_lr, const OptionalTensor& grad_scale,
               const OptionalTensor& found_inf, const OptionalTensor& total_norm, double max_norm, bool maximize,
               double beta1, double beta2, double eps, double weight_decay, bool amsgrad, bool decoupled) {
  if (params.empty()) return;
  OpScope op("adam_step", params[0]);
  run_step<Adam>(op, {params, grads, {&exp_avgs, &exp_avg_sqs, &max_exp_avg_sqs}, masters, steps}, steps_on_device,
                 scaling_of(op, grad_scale, found_inf, total_norm, max_norm, maximize), lr, device_lr, beta1, beta2,
                 eps, weight_decay, amsgrad, decoupled);
}

Tensor multi_norm(List tensors, double order) {
  OpScope op("multi_norm", tensors.at(0));
  const auto stream = static_cast<cudaStream_t>(op.stream());
  const Norm norm = norm_of(op, order);
  Tensor total = op.empty<double>({});
  dispatch_floating(op, tensors[0].scalar_type(), [&]<class T>() {
    const auto device = tensors[0].device();
    std::vector<Span<const T>> spans;
    for (const Tensor& t : tensors) {
      const T* x = flat_in<T>(op, t, "a tensor", t, device);
      spans.push_back({x, nullptr, t.numel(), is_aligned(x)});
    }
    const int64_t chunks = chunks_of(spans);
    Tensor parts = op.empty<double>({chunks});
    double* p = op.out<double>(parts, "parts", {chunks});
    each_table(spans, [&](const auto& table, unsigned count, int64_t before) {
      launch(norm_kernel<T>,
             {.grid = dim3(count), .block = dim3(256), .smem = sizeof(BlockScratch<accumulate_t<T>>), .stream = stream},
             table, norm, p + before);
    });
    launch(total_norm_kernel,
           {.grid = dim3(1), .block = dim3(256), .smem = sizeof(BlockScratch<double>), .stream = stream}, p, chunks,
           norm, op.out<double>(total, "total", {}));
  });
  return total;
}

template <class F>
void change_list(const OpScope& op, const List& tensors, const F& f) {
  const auto stream = static_cast<cudaStream_t>(op.stream());
  dispatch_floating(op, tensors[0].scalar_type(), [&]<class T>() {
    const auto device = tensors[0].device();
    std::vector<Span<T>> spans;
    for (const Tensor& t : tensors) {
      T* x = flat_out<T>(op, t, "a tensor", t, device);
      spans.push_back({x, nullptr, t.numel(), is_aligned(x)});
    }
    each_table(spans, [&](const auto& table, unsigned chunks, int64_t) {
      launch(change_kernel<F, T, T>, {.grid = dim3(chunks), .block = dim3(256), .stream = stream}, table, f);
    });
  });
}

void multi_scale(List tensors, const Tensor& total_norm, double max_norm) {
  if (tensors.empty()) return;
  OpScope op("multi_scale", tensors[0]);
  Scale scale;
  scale.scaling.total_norm = op.in<double>(total_norm, "total_norm", {});
  scale.scaling.max_norm = max_norm;
  change_list(op, tensors, scale);
}

void multi_clamp(List tensors, double bound) {
  if (tensors.empty()) return;
  change_list(OpScope("multi_clamp", tensors[0]), tensors, Clamp{bound});
}

void multi_lerp(List averages, List values, double weight) {
  if (averages.empty()) return;
  OpScope op("multi_lerp", averages[0]);
  check_length(op, values, "values", averages.size());
  dispatch_floating_mixed(op, values[0].scalar_type(), averages[0].scalar_type(), [&]<class U, class T>() {
    const auto device = averages[0].device();
    std::vector<Span<T, U>> spans;
    for (size_t t = 0; t < averages.size(); ++t) {
      T* x = flat_out<T>(op, averages[t], "an average", averages[t], device);
      const U* y = flat_in<U>(op, values[t], "a value", averages[t], device);
      spans.push_back({x, y, averages[t].numel(), is_aligned(x) && is_aligned(y)});
    }
    each_table(spans, [&](const auto& table, unsigned chunks, int64_t) {
      launch(change_kernel<Lerp, T, U>,
             {.grid = dim3(chunks), .block = dim3(256), .stream = static_cast<cudaStream_t>(op.stream())}, table,
             Lerp{weight});
    });
  });
}

PYOPS_LIBRARY(m) {
  PYOPS_IMPL(m, sgd_step);
  PYOPS_IMPL(m, adagrad_step);
  PYOPS_IMPL(m, rmsprop_step);
  PYOPS_IMPL(m, adam_step);
  PYOPS_IMPL(m, multi_norm);
  PYOPS_IMPL(m, multi_scale);
  PYOPS_IMPL(m, multi_clamp);
  PYOPS_IMPL(m, multi_lerp);
}

}  // namespace
}  // namespace pyops
