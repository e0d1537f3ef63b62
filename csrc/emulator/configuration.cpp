// Configuration: environment variables at load, and the C interface for tests.
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "cuda/device/grid_axis.cuh"
#include "emulator/memory.h"
#include "emulator/statistics.h"

namespace pyops::emulator {
namespace {

constexpr const char* detector_names[] = {"race",       "uninitialised", "bounds",  "read_only",      "proxy_fence",
                                          "async_wait", "warp",          "barrier", "shared_overrun", "alignment"};
static_assert(sizeof(detector_names) / sizeof(char*) == static_cast<size_t>(Detector::count));

bool set(Configuration& c, const std::string& key, const std::string& value) {
  const auto number = [&] { return std::strtoll(value.c_str(), nullptr, 10); };
  if (key == "schedule") {
    if (value == "forward") {
      c.schedule = Schedule::forward;
    } else if (value == "reverse") {
      c.schedule = Schedule::reverse;
    } else if (value == "deep") {
      c.schedule = Schedule::deep;
    } else if (value == "deep-reverse") {
      c.schedule = Schedule::deep_reverse;
    } else if (value == "random" || value.rfind("random:", 0) == 0) {
      c.schedule = Schedule::random;
      if (value.size() > 7) c.seed = std::strtoull(value.c_str() + 7, nullptr, 10);
    } else {
      return false;
    }
  } else if (key == "race") {
    c.race = number() != 0;
  } else if (key == "poison") {
    c.poison = number() != 0;
  } else if (key == "one_mapping") {
    c.one_mapping = number() != 0;
  } else if (key == "threads") {
    if (number() < 1) return false;
    c.threads = static_cast<int>(number());
  } else if (key == "multiprocessors") {
    if (number() < 1) return false;
    c.multiprocessors = static_cast<int>(number());
  } else if (key == "grid_axis") {
    if (number() < 1 || number() > 65535) return false;
    c.grid_axis = static_cast<int>(number());
  } else if (key == "l2_bytes") {
    if (number() < 1) return false;
    c.l2_bytes = static_cast<int>(number());
  } else if (key == "capability") {
    if (number() < 80) return false;
    c.capability = static_cast<int>(number());
  } else if (key == "stack_bytes") {
    if (number() < 16 << 10) return false;
    c.stack_bytes = static_cast<size_t>(number()) / 4096 * 4096;
  } else if (key == "silence") {  // comma-separated detectors; empty: all on
    c.silenced = 0;
    for (size_t i = 0; i < static_cast<size_t>(Detector::count); ++i) {
      if (("," + value + ",").find(std::string(",") + detector_names[i] + ",") != std::string::npos) {
        c.silenced |= uint64_t(1) << i;
      }
    }
    return value.empty() || c.silenced != 0;
  } else if (key == "statistics") {
    reset_statistics();
  } else {
    return false;
  }
  return true;
}

Configuration from_environment() {
  Configuration c;
  for (const char* key : {"schedule", "race", "poison", "threads", "multiprocessors", "grid_axis", "capability",
                          "l2_bytes", "stack_bytes"}) {
    std::string name = "PYOPS_EMULATOR_";
    for (const char* k = key; *k; ++k) name += static_cast<char>(*k >= 'a' && *k <= 'z' ? *k - 32 : *k);
    const char* value = std::getenv(name.c_str());
    if (value != nullptr && !set(c, key, value)) {
      fprintf(stderr, "pyops emulator: %s=%s is not understood and ignored\n", name.c_str(), value);
    }
  }
  return c;
}

}  // namespace

Configuration& configuration() {
  static Configuration instance = from_environment();
  return instance;
}

bool enabled(Detector detector) { return (configuration().silenced >> static_cast<int>(detector) & 1) == 0; }
int multiprocessor_count() { return configuration().multiprocessors; }
int resident_blocks() { return configuration().resident_blocks; }
int l2_cache_bytes() { return configuration().l2_bytes; }
int grid_axis_limit() { return configuration().grid_axis; }
int compute_capability() { return configuration().capability; }
// CUDA C++ programming guide, table of technical specifications: the architecture's maximum less the 1 KB it reserves.
int shared_memory_limit() {
  const int capability = compute_capability();
  if (capability == 86 || capability == 89 || capability >= 120) return 99 << 10;
  return capability < 90 ? 163 << 10 : 227 << 10;
}
void require_hopper(const char* what, const Location& location) {
  if (compute_capability() < 90) fail((std::string(what) + " needs sm_90").c_str(), location);
}

}  // namespace pyops::emulator

#define PYOPS_EXPORT extern "C" __attribute__((visibility("default")))

// 0 on success, -1 for a key or value that is not known. docs/emulator.md lists them.
PYOPS_EXPORT int pyops_emulator_configure(const char* key, const char* value) {
  return pyops::emulator::set(pyops::emulator::configuration(), key, value) ? 0 : -1;
}

// The counter of that name since the last reset; UINT64_MAX if there is none.
PYOPS_EXPORT uint64_t pyops_emulator_statistics(const char* key) { return pyops::emulator::statistic(key); }

PYOPS_EXPORT void pyops_emulator_register_range(const void* p, size_t bytes, int writable, const char* name) {
  pyops::emulator::register_range(p, bytes, writable != 0, name);
}
PYOPS_EXPORT void pyops_emulator_clear_ranges() { pyops::emulator::clear_ranges(); }
