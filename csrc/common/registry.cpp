#include "common/registry.h"

#include <algorithm>
#include <cstdlib>
#include <map>

namespace pyops::registry {
namespace {

// A function-local static: sources register while the library is being loaded, in no particular order.
std::map<std::string, std::string>& signatures() {
  static std::map<std::string, std::string> map;
  return map;
}

int level_of(std::string_view name) { return name == "avx512" ? 2 : name == "avx2" ? 1 : name == "baseline" ? 0 : -1; }

const char* name_of(int level) { return level == 2 ? "avx512" : level == 1 ? "avx2" : "baseline"; }

// The widest one that this CPU runs and this library has (CMakeLists.txt); the emulator's has none of its own.
int supported_level() {
#if defined(__x86_64__) && defined(PYOPS_WIDEST_CAPABILITY)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return std::min(avx512 ? 2 : avx2 ? 1 : 0, level_of(PYOPS_WIDEST_CAPABILITY));
#else
  return 0;
#endif
}

}  // namespace

const char* supported_cpu_capability() { return name_of(supported_level()); }

const char* active_cpu_capability() {
  static const char* const active = [] {
    const int supported = supported_level();
    const char* wanted = std::getenv("PYOPS_CPU_CAPABILITY");
    const int level = wanted ? level_of(wanted) : supported;
    return name_of(level < 0 || level > supported ? supported : level);
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
PYOPS_EXPORT const char* pyops_supported_cpu_capability() { return pyops::registry::supported_cpu_capability(); }
PYOPS_EXPORT const char* pyops_cuda_architectures() {
#if defined(PYOPS_CUDA_ARCHITECTURES)
  return PYOPS_CUDA_ARCHITECTURES;
#else
  return "";
#endif
}
