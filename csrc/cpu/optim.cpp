// optim · CPU
//   sgd_step, adagrad_step, rmsprop_step, adam_step   p, states <- rule(p, g, states); rules in common/optim.h
//   multi_norm    (sum over all tensors of |x|^order)^(1/order), order 1, 2 or infinity
//   multi_scale   x <- min(1, max_norm / (total_norm + 1e-6)) x
//   multi_clamp   x <- min(max(x, -bound), bound)
//   multi_lerp    x <- x + weight (y - x)
// layout   lists of tensors of any shape, each without gaps, a parameter and its states in the same order
// mapping  all tensors together are cut into chunks of 65536 elements, threads take chunks
// memory   each tensor read once and, where it changes, written once: Adam 28 bytes a float32 parameter
// numerics in acc_t; norms: float sums inside a chunk, double over chunks, in order
#include <cmath>

#include "common/optim_binding.h"
#include "common/registry.h"
#include "cpu/math.h"
#include "cpu/parallel.h"

namespace pyops::PYOPS_CPU_CAPABILITY {

using namespace optim;

// ---- kernels

constexpr int64_t chunk_elements = 65536;

// f(t, begin, end, chunk) for every chunk of every tensor t; chunks are numbered through.
template <class Items, class F>
void each_chunk(const Items& items, F&& f) {
  std::vector<int64_t> first(items.size() + 1, 0);
  for (size_t t = 0; t < items.size(); ++t) first[t + 1] = first[t] + ceil_div(items[t].size, chunk_elements);
  parallel_for(first.back(), 1, [&](int64_t from, int64_t to) {
    size_t t = size_t(std::upper_bound(first.begin(), first.end(), from) - first.begin()) - 1;
    for (int64_t chunk = from; chunk < to; ++chunk) {
      while (chunk >= first[t + 1]) ++t;
      const int64_t begin = (chunk - first[t]) * chunk_elements;
      f(t, begin, std::min(begin + chunk_elements, items[t].size), chunk);
    }
  });
}

template <class Items>
int64_t chunks_of(const Items& items) {
  int64_t chunks = 0;
  for (const auto& item : items) chunks += ceil_div(item.size, chunk_elements);
  return chunks;
}

// Everything the loop reads is copied into locals: the stores could otherwise have changed it.
template <class Rule, class T, class S, class A>
void step_run(const Item<T, S> item, int64_t begin, int64_t end, const Rule rule, const Pace<A> pace, bool unscales,
              A unscale, A factor) {
  using V = Vec<A>;
  T *const param = item.param + begin, *const grad = item.grad + begin;
  S *state[Rule::states], *const master = item.master + (Item<T, S>::has_master ? begin : 0);
  bool used[Rule::states];
  for (int k = 0; k < Rule::states; ++k) {
    used[k] = rule.uses(k);
    state[k] = item.state[k] + (used[k] ? begin : 0);
  }
  each_vector<A>(end - begin, [&](int64_t i, auto lanes) {
    V g = V::load(grad + i, lanes), p, s[Rule::states];
    if (unscales) {
      g = g * V(unscale);
      g.store(grad + i, lanes);
    }
    g = g * V(factor);
    if constexpr (Item<T, S>::has_master)
      p = V::load(master + i, lanes);
    else
      p = V::load(param + i, lanes);
    for (int k = 0; k < Rule::states; ++k)
      if (used[k]) s[k] = V::load(state[k] + i, lanes);
    rule.update(p, g, s, pace);
    for (int k = 0; k < Rule::states; ++k)
      if (used[k]) s[k].store(state[k] + i, lanes);
    if constexpr (Item<T, S>::has_master) p.store(master + i, lanes);
    p.store(param + i, lanes);
  });
}

template <class Rule, class T, class S>
void step_all(const std::vector<Item<T, S>>& items, const Rule& rule, const Scaling& scaling, double lr) {
  using A = accumulate_t<T>;
  std::vector<Pace<A>> paces;
  for (const auto& item : items) paces.push_back(rule.pace(item.count, lr));
  const A unscale = A(scaling.unscale()), factor = A(scaling.clip());
  each_chunk(items, [&](size_t t, int64_t begin, int64_t end, int64_t) {
    step_run(items[t], begin, end, rule, paces[t], scaling.grad_scale != nullptr, unscale, factor);
  });
}

template <class T>
double norm_of_run(const T* __restrict__ x, int64_t n, Norm norm) {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  if (norm == Norm::infinity) {
    V most;
    each_vector<A>(n, [&](int64_t i, auto lanes) { most = max(most, abs(V::load(x + i, lanes))); });
    return double(max_of_lanes(most));
  }
  Totals<A, 1> total;
  accumulate(total, n, [&](int64_t i, auto lanes, auto& t) {
    const V v = V::load(x + i, lanes);
    t[0] = norm == Norm::one ? t[0] + abs(v) : fma(v, v, t[0]);
  });
  return double(sum(total[0]));
}

template <class T>
double norm_all(const std::vector<Span<const T>>& spans, Norm norm) {
  std::vector<double> parts(size_t(chunks_of(spans)));
  each_chunk(spans, [&](size_t t, int64_t begin, int64_t end, int64_t chunk) {
    parts[size_t(chunk)] = norm_of_run(spans[t].x + begin, end - begin, norm);
  });
  double total = 0;
  for (double part : parts)
    total = norm == Norm::infinity ? (part > total || part != part ? part : total) : total + part;
  return norm == Norm::two ? std::sqrt(total) : total;
}

// x <- f(x, y): y null where the op has none.
template <class T, class U, class F>
void change_all(const std::vector<Span<T, U>>& spans, const F& f) {
  using V = Vec<accumulate_t<T>>;
  each_chunk(spans, [&](size_t t, int64_t begin, int64_t end, int64_t) {
    T* x = spans[t].x + begin;
    const U* y = spans[t].y == nullptr ? nullptr : spans[t].y + begin;
    each_vector<accumulate_t<T>>(end - begin, [&](int64_t i, auto lanes) {
      const V v = V::load(x + i, lanes), w = y == nullptr ? V() : V::load(y + i, lanes);
      f(v, w).store(x + i, lanes);
    });
  });
}

// ---- binding

template <template <class> class Rule, class... Numbers>
void run_step(const OpScope& op, const Lists& lists, const Scaling& scaling, double lr, const Numbers&... numbers) {
  const bool skips = scaling.skips();
  const std::vector<double> counts = count_on_host(op, lists.steps, skips);
  dispatch_params(op, lists, [&]<class T, class S>() {
    const Rule<accumulate_t<T>> rule(numbers...);
    auto items = items_of<decltype(rule), T, S>(op, lists, rule);
    for (size_t t = 0; t < counts.size(); ++t) items[t].count = counts[t];
    if (!skips) step_all(items, rule, scaling, lr);
  });
}

double learning_rate(const OpScope& op, double lr, const OptionalTensor& device_lr) {
  const float* p = op.in_optional<float>(device_lr, "device_lr", {});
  return p == nullptr ? lr : double(*p);
}

void sgd_step(List params, List grads, List momentum_buffers, List masters, double lr, const OptionalTensor& device_lr,
              const OptionalTensor& grad_scale, const OptionalTensor& found_inf, const OptionalTensor& total_norm,
              double max_norm, bool maximize, double momentum, double dampening, double weight_decay, bool nesterov,
              bool first) {
  if (params.empty()) return;
  OpScope op("sgd_step", params[0]);
  run_step<Sgd>(op, {params, grads, {&momentum_buffers}, masters, {}},
                scaling_of(op, grad_scale, found_inf, total_norm, max_norm, maximize), learning_rate(op, lr, device_lr),
                momentum, dampening, weight_decay, nesterov, first);
}

void adagrad_step(List params, List grads, List sums, List masters, List steps, bool, double lr,
                  const OptionalTensor& device_lr, const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
                  const OptionalTensor& total_norm, double max_norm, bool maximize, double lr_decay,
                  double weight_decay, double eps) {
  if (params.empty()) return;
  OpScope op("adagrad_step", params[0]);
  run_step<Adagrad>(op, {params, grads, {&sums}, masters, steps},
                    scaling_of(op, grad_scale, found_inf, total_norm, max_norm, maximize),
                    learning_rate(op, lr, device_lr), lr_decay, weight_decay, eps);
}

void rmsprop_step(List params, List grads, List square_avgs, List momentum_buffers, List grad_avgs, List masters,
                  List steps, bool, double lr, const OptionalTensor& device_lr, const OptionalTensor& grad_scale,
                  const OptionalTensor& found_inf, const OptionalTensor& total_norm, double max_norm, bool maximize,
                  double alpha, double eps, double weight_decay, double momentum, bool centered) {
  if (params.empty()) return;
  OpScope op("rmsprop_step", params[0]);
  run_step<RmsProp>(op, {params, grads, {&square_avgs, &momentum_buffers, &grad_avgs}, masters, steps},
                    scaling_of(op, grad_scale, found_inf, total_norm, max_norm, maximize),
                    learning_rate(op, lr, device_lr), alpha, eps, weight_decay, momentum, centered);
}

void adam_step(List params, List grads, List exp_avgs, List exp_avg_sqs, List max_exp_avg_sqs, List masters, List steps,
               bool, double lr, const OptionalTensor& device_lr, const OptionalTensor& grad_scale,
               const OptionalTensor& found_inf, const OptionalTensor& total_norm, double max_norm, bool maximize,
               double beta1, double beta2, double eps, double weight_decay, bool amsgrad, bool decoupled) {
  if (params.empty()) return;
  OpScope op("adam_step", params[0]);
  run_step<Adam>(op, {params, grads, {&exp_avgs, &exp_avg_sqs, &max_exp_avg_sqs}, masters, steps},
                 scaling_of(op, grad_scale, found_inf, total_norm, max_norm, maximize),
                 learning_rate(op, lr, device_lr), beta1, beta2, eps, weight_decay, amsgrad, decoupled);
}

Tensor multi_norm(List tensors, double order) {
  OpScope op("multi_norm", tensors.at(0));
  const Norm norm = norm_of(op, order);
  Tensor total = op.empty<double>({});
  dispatch_floating(op, tensors[0].scalar_type(), [&]<class T>() {
    const auto device = tensors[0].device();
    std::vector<Span<const T>> spans;
    for (const Tensor& t : tensors)
      spans.push_back({flat_in<T>(op, t, "a tensor", t, device), nullptr, t.numel(), false});
    *op.out<double>(total, "total", {}) = norm_all<T>(spans, norm);
  });
  return total;
}

template <class F>
void change_list(const OpScope& op, const List& tensors, F&& f) {
  dispatch_floating(op, tensors[0].scalar_type(), [&]<class T>() {
    const auto device = tensors[0].device();
    std::vector<Span<T>> spans;
    for (const Tensor& t : tensors)
      spans.push_back({flat_out<T>(op, t, "a tensor", t, device), nullptr, t.numel(), false});
    f(spans);
  });
}

void multi_scale(List tensors, const Tensor& total_norm, double max_norm) {
  if (tensors.empty()) return;
  OpScope op("multi_scale", tensors[0]);
  Scaling scaling;
  scaling.total_norm = op.in<double>(total_norm, "total_norm", {});
  scaling.max_norm = max_norm;
  const double factor = scaling.clip();
  if (factor == 1) return;
  change_list(op, tensors, [&]<class T>(const std::vector<Span<T>>& spans) {
    using V = Vec<accumulate_t<T>>;
    change_all(spans, [&](const V& x, const V&) { return x * V(accumulate_t<T>(factor)); });
  });
}

void multi_clamp(List tensors, double bound) {
  if (tensors.empty()) return;
  OpScope op("multi_clamp", tensors[0]);
  change_list(op, tensors, [&]<class T>(const std::vector<Span<T>>& spans) {
    using A = accumulate_t<T>;
    using V = Vec<A>;
    change_all(spans, [&](const V& x, const V&) { return min(max(x, V(A(-bound))), V(A(bound))); });
  });
}

void multi_lerp(List averages, List values, double weight) {
  if (averages.empty()) return;
  OpScope op("multi_lerp", averages[0]);
  check_length(op, values, "values", averages.size());
  dispatch_floating_mixed(op, values[0].scalar_type(), averages[0].scalar_type(), [&]<class U, class T>() {
    using A = accumulate_t<T>;
    using V = Vec<A>;
    const auto device = averages[0].device();
    std::vector<Span<T, U>> spans;
    for (size_t t = 0; t < averages.size(); ++t)
      spans.push_back({flat_out<T>(op, averages[t], "an average", averages[t], device),
                       flat_in<U>(op, values[t], "a value", averages[t], device), averages[t].numel(), false});
    change_all(spans, [&](const V& x, const V& y) { return x + (y - x) * V(A(weight)); });
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

}  // namespace pyops::PYOPS_CPU_CAPABILITY
