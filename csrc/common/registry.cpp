#include "common/registry.h"

#include <cstdlib>
#include <map>
#include <sstream>
#include <vector>

namespace pyops::registry {
namespace {

// A function-local static: sources register while the library is being loaded, in no particular order.
std::map<std::string, std::string>& signatures() {
  static std::map<std::string, std::string> map;
  return map;
}

bool runs(std::string_view capability) {
  if (capability == "baseline") return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (capability == "avx2") return avx2;
  return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

// Those of this library (CMakeLists.txt) that this CPU runs, narrow to wide; the emulator's has none of its own.
const std::vector<std::string>& capabilities() {
  static const std::vector<std::string> found = [] {
    std::vector<std::string> names;
#if defined(PYOPS_COMPILED_CAPABILITIES)
    std::istringstream compiled(PYOPS_COMPILED_CAPABILITIES);
    for (std::string name; compiled >> name;) {
      if (runs(name)) names.push_back(name);
    }
#endif
    return names;
  }();
  return found;
}

}  // namespace

const char* supported_cpu_capability() { return capabilities().empty() ? "" : capabilities().back().c_str(); }

const char* active_cpu_capability() {
  static const char* const active = [] {
    const char* wanted = std::getenv("PYOPS_CPU_CAPABILITY");
    for (const std::string& name : capabilities()) {
      if (wanted != nullptr && name == wanted) return name.c_str();
    }
    return supported_cpu_capability();
  }();
  return active;
}

void record(const char* op, std::string signature) { signatures()[op] = std::move(signature); }

}  // namespace pyops::registry

#define PYOPS_EXPORT extern "C" __attribute__((visibility("default")))

// One line per op, "name(types) -> types"; read by pyops.core.library through ctypes.
PYOPS_EXPORT const char* pyops_signatures() {
  static std::string text;
  text.clear();
  for (const auto& [op, signature] : pyops::registry::signatures()) text += op + signature + "\n";
  return text.c_str();
}
PYOPS_EXPORT const char* pyops_active_cpu_capability() { return pyops::registry::active_cpu_capability(); }
// Separated by spaces, narrow to wide.
PYOPS_EXPORT const char* pyops_cpu_capabilities() {
  static std::string text;
  text.clear();
  for (const std::string& name : pyops::registry::capabilities()) text += text.empty() ? name : " " + name;
  return text.c_str();
}
PYOPS_EXPORT const char* pyops_cuda_architectures() {
#if defined(PYOPS_CUDA_ARCHITECTURES)
  return PYOPS_CUDA_ARCHITECTURES;
#else
  return "";
#endif
}
PYOPS_EXPORT int pyops_cpu_is_intel() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("intel") != 0;
#else
  return 0;
#endif
}
