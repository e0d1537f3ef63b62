// How a source registers its ops.
//
//   PYOPS_LIBRARY(m) {
//     PYOPS_IMPL(m, layer_norm_fwd);
//   }
//
// The stable ABI does not compare a C++ signature with the op's schema, so PYOPS_IMPL records each signature as text;
// tests/test_layout.py holds them against the schemas. The same source is registered under
//   pyops / CPU             csrc/cpu, once per instruction set; only the active one takes part
//   pyops / CUDA            csrc/cuda
//   pyops_emulator / CPU    csrc/cuda compiled for the emulator
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "common/tensor.h"

namespace pyops::registry {

// "baseline", "avx2" or "avx512": the widest one of this build that this CPU runs, or PYOPS_CPU_CAPABILITY if it does.
const char* active_cpu_capability();
const char* supported_cpu_capability();
void record(const char* op, std::string signature);

template <class T>
struct SchemaType;
template <>
struct SchemaType<Tensor> {
  static constexpr const char* name = "Tensor";
};
template <>
struct SchemaType<OptionalTensor> {
  static constexpr const char* name = "Tensor?";
};
template <>
struct SchemaType<double> {
  static constexpr const char* name = "float";
};
template <>
struct SchemaType<std::optional<double>> {
  static constexpr const char* name = "float?";
};
template <>
struct SchemaType<int64_t> {
  static constexpr const char* name = "int";
};
template <>
struct SchemaType<bool> {
  static constexpr const char* name = "bool";
};
template <>
struct SchemaType<std::string> {
  static constexpr const char* name = "str";
};
template <>
struct SchemaType<std::vector<int64_t>> {
  static constexpr const char* name = "int[]";
};
template <>
struct SchemaType<std::vector<Tensor>> {
  static constexpr const char* name = "Tensor[]";
};

template <class T>
const char* schema_type() {
  return SchemaType<std::remove_cv_t<std::remove_reference_t<T>>>::name;
}

template <class T>
struct ReturnText {
  static std::string text() { return schema_type<T>(); }
};
template <>
struct ReturnText<void> {
  static std::string text() { return "()"; }
};
template <class... T>
struct ReturnText<std::tuple<T...>> {
  static std::string text() {
    std::string joined;
    ((joined += (joined.empty() ? "" : ", ") + std::string(schema_type<T>())), ...);
    return "(" + joined + ")";
  }
};

template <class R, class... A>
std::string signature(R (*)(A...)) {
  std::string joined;
  ((joined += (joined.empty() ? "" : ", ") + std::string(schema_type<A>())), ...);
  return "(" + joined + ") -> " + ReturnText<R>::text();
}

}  // namespace pyops::registry

#if defined(PYOPS_EMULATOR)
#define PYOPS_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(pyops_emulator, CPU, m)
#define PYOPS_ACTIVE true
#elif defined(PYOPS_CUDA)
#define PYOPS_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(pyops, CUDA, m)
#define PYOPS_ACTIVE true
#else
#define PYOPS_TEXT_(x) #x
#define PYOPS_TEXT(x) PYOPS_TEXT_(x)
#define PYOPS_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(pyops, CPU, m)
#define PYOPS_ACTIVE (std::string_view(PYOPS_TEXT(PYOPS_CPU_CAPABILITY)) == pyops::registry::active_cpu_capability())
#endif

#define PYOPS_IMPL(m, fn)                                            \
  do {                                                               \
    if (PYOPS_ACTIVE) {                                              \
      (m).impl(#fn, TORCH_BOX(&fn));                                 \
      pyops::registry::record(#fn, pyops::registry::signature(&fn)); \
    }                                                                \
  } while (false)
