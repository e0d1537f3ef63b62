// What the CPU and the CUDA ops of the optimizers take: lists of tensors of one dtype on one device, checked and turned
// into items of plain pointers.
#pragma once

#include <vector>

#include "common/optim.h"
#include "common/flat.h"

namespace pyops::optim {

using List = std::vector<Tensor>;

// One parameter of type T with its states. Half types may have a master copy of type S, the type of their sums; then
// the states are of that type too, and the parameter is its rounded copy.
template <class T, class S>
struct Item {
  static constexpr bool has_master = !std::is_same_v<T, S>;
  T* param;
  T* grad;
  S* state[most_states];
  S* master;
  int64_t size;
  double count;       // number of this step, unless `step` has it
  const float* step;  // on the device
  bool aligned;       // to 16 bytes, all of them
};

inline void check_length(const OpScope& op, const List& list, const char* name, size_t expected) {
  op.check(list.size() == expected, name, ": got ", list.size(), " tensors, expected ", expected);
}

// The lists of one call of a step op. A list of a state that the rule does not use is empty.
struct Lists {
  const List& params;
  const List& grads;
  const List* states[most_states];
  const List& masters;
  const List& steps;
};

// Numbers the steps where they are counted on the host: 1 more than before, unless the step is left out.
inline std::vector<double> count_on_host(const OpScope& op, const List& steps, bool skips) {
  std::vector<double> counts;
  for (const Tensor& step : steps) {
    op.check(step.is_cpu() && step.numel() == 1, "steps must be CPU tensors of one element");
    const auto dtype = step.scalar_type();
    op.check(dtype == ScalarType::Float || dtype == ScalarType::Double, "steps must be float32 or float64, got ",
             dtype);
    void* count = step.mutable_data_ptr();
    const auto next = [&](auto* c) { return skips ? double(*c) : double(*c += 1); };
    counts.push_back(dtype == ScalarType::Float ? next(static_cast<float*>(count)) : next(static_cast<double*>(count)));
  }
  return counts;
}

template <class Rule, class T, class S>
std::vector<Item<T, S>> items_of(const OpScope& op, const Lists& lists, const Rule& rule) {
  const size_t n = lists.params.size();
  check_length(op, lists.grads, "grads", n);
  check_length(op, lists.masters, "masters", Item<T, S>::has_master ? n : 0);
  if (!lists.steps.empty()) check_length(op, lists.steps, "steps", n);
  for (int k = 0; k < Rule::states; ++k) check_length(op, *lists.states[k], "a state", rule.uses(k) ? n : 0);
  std::vector<Item<T, S>> items(n);
  const auto device = lists.params[0].device();
  for (size_t i = 0; i < n; ++i) {
    const Tensor& like = lists.params[i];
    Item<T, S>& item = items[i];
    item = {flat_out<T>(op, like, "a parameter", like, device),
            flat_out<T>(op, lists.grads[i], "a gradient", like, device),
            {},
            nullptr,
            like.numel(),
            0,
            nullptr,
            false};
    item.aligned = is_aligned(item.param) && is_aligned(item.grad);
    for (int k = 0; k < Rule::states; ++k)
      if (rule.uses(k)) {
        item.state[k] = flat_out<S>(op, (*lists.states[k])[i], "a state", like, device);
        item.aligned &= is_aligned(item.state[k]);
      }
    if constexpr (Item<T, S>::has_master) {
      item.master = flat_out<S>(op, lists.masters[i], "a master", like, device);
      item.aligned &= is_aligned(item.master);
    }
  }
  return items;
}

// Calls f.template operator()<T, S>() for the type of the parameters and that of their states.
template <class F>
void dispatch_params(const OpScope& op, const Lists& lists, F&& f) {
  dispatch_floating(op, lists.params[0].scalar_type(), [&]<class T>() {
    using S = accumulate_t<T>;
    if constexpr (std::is_same_v<T, S>) {
      f.template operator()<T, T>();
    } else {
      if (lists.masters.empty())
        f.template operator()<T, T>();
      else
        f.template operator()<T, S>();
    }
  });
}

inline Scaling scaling_of(const OpScope& op, const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
                          const OptionalTensor& total_norm, double max_norm, bool maximize) {
  return {op.in_optional<float>(grad_scale, "grad_scale", {}), op.in_optional<float>(found_inf, "found_inf", {}),
          op.in_optional<double>(total_norm, "total_norm", {}), max_norm, maximize};
}

// A tensor of a list on which an op without rule works: x is read or changed, y (if any) read.
template <class T, class U = T>
struct Span {
  T* x;
  const U* y;
  int64_t size;
  bool aligned;
};

enum class Norm { one, two, infinity };

inline Norm norm_of(const OpScope& op, double order) {
  op.check(order == 1 || order == 2 || order == INFINITY, "order must be 1, 2 or inf, got ", order);
  return order == 1 ? Norm::one : order == 2 ? Norm::two : Norm::infinity;
}

}  // namespace pyops::optim
