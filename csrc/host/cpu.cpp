// What CPU this is. cpuid speaks for the instructions, Linux for caches and cores.

#include <fstream>
#include <map>
#include <sstream>
#include <string>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "host/host.h"

namespace pyops::host {
namespace {

std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// "32K", "1024K", "32M" as sysfs writes them; 0 where it cannot be read.
long size_of(const std::string& text) {
  long value = 0;
  size_t i = 0;
  for (; i < text.size() && text[i] >= '0' && text[i] <= '9'; ++i) value = value * 10 + (text[i] - '0');
  const char unit = i < text.size() ? text[i] : ' ';
  return unit == 'K' ? value << 10 : unit == 'M' ? value << 20 : unit == 'G' ? value << 30 : value;
}

std::map<std::string, long> cache_sizes() {
  std::map<std::string, long> caches;
  for (int index = 0; index < 8; ++index) {
    const std::string directory = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/";
    const std::string level = first_line(directory + "level"), type = first_line(directory + "type");
    if (level.empty() || type == "Instruction") continue;
    if (const long bytes = size_of(first_line(directory + "size"))) {
      caches["L" + level + (type == "Data" ? "d" : "")] = bytes;
    }
  }
  return caches;
}

int usable_core_count() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  return static_cast<int>(std::thread::hardware_concurrency());
}

std::string model_of_proc() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    const size_t colon = line.find(": ");
    if (colon != std::string::npos && line.rfind("model name", 0) == 0) return line.substr(colon + 2);
  }
  return "unknown";
}

#if defined(__x86_64__)
std::map<std::string, bool> instructions() {
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f");
  unsigned a = 0, b = 0, c7 = 0, d7 = 0, a71 = 0, c = 0, d = 0;
  __get_cpuid_count(7, 0, &a, &b, &c7, &d7);
  __get_cpuid_count(7, 1, &a71, &b, &c, &d);

  // XCR0 tells which registers the system saves; AMX is usable only with its tile state (bits 17 and 18).
  unsigned xcr0 = 0;
  unsigned c1 = 0;
  if (__get_cpuid(1, &a, &b, &c1, &d) && (c1 & bit_OSXSAVE)) {
    unsigned high = 0;
    __asm__("xgetbv" : "=a"(xcr0), "=d"(high) : "c"(0));
  }
  const bool tiles = (xcr0 >> 17 & 3) == 3;

  return {
      {"sse4_2", __builtin_cpu_supports("sse4.2") != 0},
      {"avx", __builtin_cpu_supports("avx") != 0},
      {"avx2", __builtin_cpu_supports("avx2") != 0},
      {"fma", __builtin_cpu_supports("fma") != 0},
      {"f16c", (c1 >> 29 & 1) != 0 && __builtin_cpu_supports("avx")},
      {"avx512f", avx512},
      {"avx512bw", __builtin_cpu_supports("avx512bw") != 0},
      {"avx512dq", __builtin_cpu_supports("avx512dq") != 0},
      {"avx512vl", __builtin_cpu_supports("avx512vl") != 0},
      {"avx512_vnni", avx512 && (c7 >> 11 & 1)},
      {"avx512_bf16", avx512 && (a71 >> 5 & 1)},
      {"avx512_fp16", avx512 && (d7 >> 23 & 1)},
      {"amx_bf16", tiles && (d7 >> 22 & 1)},
      {"amx_int8", tiles && (d7 >> 25 & 1)},
  };
}

std::string model_name() {
  unsigned words[12] = {};
  for (unsigned i = 0; i < 3; ++i) {
    unsigned* w = words + 4 * i;
    if (!__get_cpuid(0x80000002 + i, w, w + 1, w + 2, w + 3)) return model_of_proc();
  }
  std::string name(reinterpret_cast<const char*>(words), sizeof words);
  name.resize(name.find('\0') == std::string::npos ? name.size() : name.find('\0'));
  const size_t first = name.find_first_not_of(' '), last = name.find_last_not_of(' ');
  return first == std::string::npos ? model_of_proc() : name.substr(first, last - first + 1);
}
#else
std::map<std::string, bool> instructions() { return {}; }
std::string model_name() { return model_of_proc(); }
#endif

}  // namespace

CpuFeatures cpu_features() {
  CpuFeatures features;
  features.model = model_name();
  features.logical_cores = static_cast<int>(std::thread::hardware_concurrency());
  features.usable_cores = usable_core_count();
  features.instructions = instructions();
  features.caches = cache_sizes();
  return features;
}

std::vector<std::pair<std::string, bool>> cpu_variants() {
  // The same conditions as csrc/common/registry.cpp, which makes the choice.
  auto has = instructions();
  std::map<std::string, bool> runs = {{"baseline", true}};
  runs["avx2"] = has["avx2"] && has["fma"] && has["f16c"];
  runs["avx512"] = runs["avx2"] && has["avx512f"] && has["avx512bw"] && has["avx512dq"] && has["avx512vl"];
  std::vector<std::pair<std::string, bool>> variants;
  std::istringstream compiled(PYOPS_COMPILED_CAPABILITIES);
  for (std::string name; compiled >> name;) variants.emplace_back(name, runs[name]);
  return variants;
}

}  // namespace pyops::host
