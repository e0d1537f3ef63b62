#include "emulator/statistics.h"

#include <cstring>
#include <mutex>

namespace pyops::emulator {
namespace {

struct Counter {
  const char* name;
  uint64_t Statistics::* value;
};
constexpr Counter counters[] = {
    {"launches", &Statistics::launches},
    {"blocks", &Statistics::blocks},
    {"switches", &Statistics::switches},
    {"warp_operations", &Statistics::warp_operations},
    {"barriers", &Statistics::barriers},
    {"mma", &Statistics::mma},
    {"wgmma", &Statistics::wgmma},
    {"ldmatrix", &Statistics::ldmatrix},
    {"ldmatrix_conflicts", &Statistics::ldmatrix_conflicts},
    {"accesses", &Statistics::accesses},
};
std::mutex mutex;
Statistics total{};

}  // namespace

void add_statistics(const Statistics& s) {
  const std::lock_guard lock(mutex);
  for (const Counter& c : counters) total.*c.value += s.*c.value;
}
void reset_statistics() {
  const std::lock_guard lock(mutex);
  total = {};
}
uint64_t statistic(const char* key) {
  const std::lock_guard lock(mutex);
  for (const Counter& c : counters) {
    if (std::strcmp(c.name, key) == 0) return total.*c.value;
  }
  return UINT64_MAX;
}

}  // namespace pyops::emulator
