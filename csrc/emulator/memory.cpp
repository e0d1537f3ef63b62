#include "emulator/memory.h"

#include <sys/mman.h>

#include <new>

#include "emulator/race.h"

namespace pyops::emulator {
namespace {

struct Registry {
  std::vector<Range> ranges;
  bool any = false;
};
Registry& registry() {
  thread_local Registry* const instance = new Registry();  // outlives the thread's other statics
  return *instance;
}

size_t shadow_bytes(const Range& range) { return ((range.end - range.begin + 3) / 4 + 2) * sizeof(Cell); }

}  // namespace

std::vector<Range>& ranges() { return registry().ranges; }
bool any_range_registered() { return registry().any; }

void register_range(const void* p, size_t bytes, bool writable, const char* name) {
  registry().any = true;
  if (bytes == 0 || !configuration().race) return;
  const auto begin = reinterpret_cast<uintptr_t>(p);
  Range range{begin, begin + bytes, writable, name, nullptr};
  for (Range& other : ranges()) {  // the same tensor given twice
    if (other.begin == range.begin && other.end == range.end) {
      other.writable |= writable;
      return;
    }
  }
  // Zero pages are valid shadow (generation 0) and cost nothing until touched.
  void* cells =
      mmap(nullptr, shadow_bytes(range), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (cells == MAP_FAILED) throw std::bad_alloc();
  range.cells = static_cast<Cell*>(cells);
  ranges().push_back(std::move(range));
}

void clear_ranges() {
  for (const Range& range : ranges()) munmap(range.cells, shadow_bytes(range));
  ranges().clear();
  registry().any = false;
}

}  // namespace pyops::emulator
