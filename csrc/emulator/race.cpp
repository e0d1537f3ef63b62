// Vector clocks and shadow memory. Every four bytes of shared memory and of registered tensors have a Cell, which knows
// the last write and the reads since; an access must come after them in the order that barriers, fences and waits make.
#include "emulator/race.h"

#include <link.h>

#include <algorithm>

namespace pyops::emulator {
namespace {

const char* verb(bool write) { return write ? "write" : "read"; }

size_t async_entry(const Engine* e) { return static_cast<size_t>(e->threads); }

void join(std::vector<uint32_t>& into, const Clock& from) {
  for (size_t i = 0; i < into.size(); ++i) into[i] = std::max(into[i], (*from)[i]);
}

// What the fiber knows, itself included, as a clock that others can take over.
std::shared_ptr<std::vector<uint32_t>> snapshot(const Engine* e, const Fiber* fiber) {
  auto clock = std::make_shared<std::vector<uint32_t>>(*fiber->seen);
  (*clock)[static_cast<size_t>(fiber->id)] = fiber->clock;
  (*clock)[async_entry(e)] = std::max((*clock)[async_entry(e)], fiber->async_seen);
  return clock;
}

}  // namespace

void clocks_start(Engine* e) {
  const Clock zero = std::make_shared<std::vector<uint32_t>>(static_cast<size_t>(e->threads) + 1, 0);
  e->async_time = 1;
  for (Block& block : e->blocks) {
    for (Fiber& fiber : block.fibers) {
      fiber.seen = zero;
      fiber.clock = 1;
    }
  }
}

void order_all(Engine* e, Fiber* const* fibers, size_t count) {
  if (!e->race || count == 0) return;
  auto joined = std::make_shared<std::vector<uint32_t>>(*fibers[0]->seen);
  const std::vector<uint32_t>* last = fibers[0]->seen.get();
  std::shared_ptr<std::vector<uint32_t>> fenced;
  const std::vector<uint32_t>* last_fenced = nullptr;
  for (size_t i = 0; i < count; ++i) {
    Fiber* f = fibers[i];
    if (f->seen.get() != last) join(*joined, f->seen);
    last = f->seen.get();
    if (f->fenced != nullptr && f->fenced.get() != last_fenced) {
      if (fenced == nullptr) fenced = std::make_shared<std::vector<uint32_t>>(*f->fenced);
      join(*fenced, f->fenced);
      last_fenced = f->fenced.get();
    }
  }
  uint32_t& async = (*joined)[async_entry(e)];
  for (size_t i = 0; i < count; ++i) {
    (*joined)[static_cast<size_t>(fibers[i]->id)] = fibers[i]->clock;
    async = std::max(async, fibers[i]->async_seen);
  }
  for (size_t i = 0; i < count; ++i) {
    fibers[i]->seen = joined;
    if (fenced != nullptr) fibers[i]->fenced = fenced;
    ++fibers[i]->clock;
  }
}

void release(Engine* e, Clock& sync, Fiber* fiber) {
  if (!e->race) return;
  auto clock = snapshot(e, fiber);
  if (sync != nullptr) join(*clock, sync);
  sync = clock;
  ++fiber->clock;
}

void acquire(Engine* e, Fiber* fiber, const Clock& sync) {
  if (!e->race || sync == nullptr || sync == fiber->seen) return;
  auto clock = std::make_shared<std::vector<uint32_t>>(*fiber->seen);
  join(*clock, sync);
  fiber->seen = clock;
}

uint32_t async_tick(Engine* e) { return ++e->async_time; }

void release_async(Engine* e, Clock& sync, uint32_t time) {
  if (!e->race) return;
  auto clock = std::make_shared<std::vector<uint32_t>>(static_cast<size_t>(e->threads) + 1, 0);
  (*clock)[async_entry(e)] = time;
  if (sync != nullptr) join(*clock, sync);
  sync = clock;
}

void memory_fence() {
  const EngineScope scope;
  Engine* e = engine();
  if (e->race) {
    e->current->fenced = snapshot(e, e->current);
    ++e->current->clock;
  }
  spin(Location::current());
}

void announce_atomic(const void* p, size_t bytes, bool writes, Order order, const Location& location) {
  const EngineScope scope;
  spin(location);  // others run before, never between the announcement and the operation
  Engine* e = engine();
  Fiber* fiber = e->current;
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) fail("misaligned atomic", location);
  if (e->race) {
    check_atomic(e, fiber, p, bytes, writes, location);
    const auto address = reinterpret_cast<uintptr_t>(p);
    const bool releases = order == Order::release || order == Order::acquire_release;
    // A relaxed atomic after a fence releases what the fence covered; acquiring is not made to depend on a fence.
    if (const auto found = e->sync_variables.find(address); found != e->sync_variables.end()) {
      const SyncVariable& v = found->second;
      if (v.clock_generation == e->generation) acquire(e, fiber, v.clock);
      for (const uint32_t gang : v.released_by) {
        if (std::find(e->acquired.begin(), e->acquired.end(), gang) == e->acquired.end()) e->acquired.push_back(gang);
      }
    }
    if (writes && (releases || fiber->fenced != nullptr)) {
      SyncVariable& v = e->sync_variables[address];
      if (v.clock_generation != e->generation) v.clock.reset();
      v.clock_generation = e->generation;
      if (releases) {
        release(e, v.clock, fiber);
      } else {
        auto clock = std::make_shared<std::vector<uint32_t>>(*fiber->fenced);
        if (v.clock != nullptr) join(*clock, v.clock);
        v.clock = clock;
      }
      const auto add = [&v](uint32_t gang) {
        if (std::find(v.released_by.begin(), v.released_by.end(), gang) == v.released_by.end()) {
          v.released_by.push_back(gang);
        }
      };
      add(e->generation);
      for (const uint32_t gang : e->acquired) add(gang);
    }
  }
}

namespace {

enum class Kind { read, write, atomic, async_read };

// One access while it is being checked.
struct Access {
  Engine* e;
  Fiber* fiber;
  uintptr_t address;
  size_t bytes;
  Kind kind;
  const void* pc;
  const char* what;
  const Location* location;  // atomics
  const Range* range;        // null: shared memory
  uint32_t async_time = 0;   // async_read
  bool other_proxy = false;

  bool writes() const { return kind == Kind::write || kind == Kind::atomic; }

  std::string at() const {
    if (location != nullptr) return " at " + where(*location);
    return pc != nullptr ? locate(pc) : locate_caller();
  }
  std::string by() const { return what != nullptr ? std::string(" by ") + what : std::string(); }
  std::string target() const {
    const size_t base = range != nullptr ? range->begin : reinterpret_cast<uintptr_t>(e->region);
    const size_t offset = range != nullptr ? address - base : (address - base) % e->arena_stride;
    return (range != nullptr ? range->name : std::string("shared memory")) + " +" + std::to_string(offset);
  }
  std::string thread(int id) const {
    if (id == e->threads) return "an asynchronous operation";
    const Block& block = e->blocks[static_cast<size_t>(id / e->threads_per_block)];
    return describe(&block.fibers[static_cast<size_t>(id % e->threads_per_block)]);
  }
  [[noreturn]] void race(const char* kind_of_race, const std::string& other) const {
    raise_error("data race (" + std::string(kind_of_race) + ") on " + target() + by() + at() + ": " + describe(fiber) +
                " is not ordered after " + other);
  }
};

bool sees(const Access& a, int32_t who, uint32_t time) {
  if (who == a.fiber->id) return true;
  const uint32_t seen = (*a.fiber->seen)[static_cast<size_t>(who)];
  return time <= (who == a.e->threads ? std::max(seen, a.fiber->async_seen) : seen);
}

void free_reader_set(Engine* e, Cell& cell) {
  if (cell.reader_set >= 0) e->free_reader_sets.push_back(cell.reader_set);
  cell.reader_set = -1;
}
void forget(Engine* e, Cell& cell, bool indices_valid) {
  if (indices_valid) {
    free_reader_set(e, cell);
    if (cell.split >= 0) e->free_split_cells.push_back(cell.split);
  }
  cell = Cell();
  cell.generation = e->generation;
}

void add_reader(Access& a, Cell& cell, int32_t who, uint32_t time) {
  Engine* e = a.e;
  if (cell.reader_set >= 0) {
    e->reader_sets[static_cast<size_t>(cell.reader_set)][static_cast<size_t>(who)] = time;
    return;
  }
  // One reader is enough to remember while each new one comes after the last.
  if (cell.reader < 0 || cell.reader == who || (who == a.fiber->id && sees(a, cell.reader, cell.read_time))) {
    cell.reader = who;
    cell.read_time = time;
    return;
  }
  const size_t entries = static_cast<size_t>(e->threads) + 1;
  if (e->free_reader_sets.empty()) {
    cell.reader_set = static_cast<int32_t>(e->reader_sets.size());
    e->reader_sets.emplace_back(entries, 0);
  } else {
    cell.reader_set = e->free_reader_sets.back();
    e->free_reader_sets.pop_back();
    e->reader_sets[static_cast<size_t>(cell.reader_set)].assign(entries, 0);
  }
  auto& set = e->reader_sets[static_cast<size_t>(cell.reader_set)];
  set[static_cast<size_t>(cell.reader)] = cell.read_time;
  set[static_cast<size_t>(who)] = time;
}

void check_readers(const Access& a, const Cell& cell, const char* kind_of_race) {
  if (cell.reader_set >= 0) {
    const auto& set = a.e->reader_sets[static_cast<size_t>(cell.reader_set)];
    for (size_t i = 0; i < set.size(); ++i) {
      if (set[i] != 0 && !sees(a, static_cast<int32_t>(i), set[i])) a.race(kind_of_race, a.thread(static_cast<int>(i)));
    }
  } else if (cell.reader >= 0 && !sees(a, cell.reader, cell.read_time)) {
    a.race(kind_of_race, a.thread(cell.reader));
  }
}

// The cell's last visitor was another gang of this launch (or, for shared memory, of the past).
void enter_generation(Access& a, Cell& cell) {
  Engine* e = a.e;
  const bool this_launch = cell.generation >= e->first_generation;
  if (a.range == nullptr || !this_launch) {
    const bool initialised = a.range != nullptr;
    forget(e, cell, this_launch);
    cell.initialised = initialised;
    return;
  }
  const bool written = cell.writer >= 0;
  const bool read = cell.reader >= 0 || cell.reader_set >= 0 || cell.other_gang_read != 0;
  const bool ordered = std::find(e->acquired.begin(), e->acquired.end(), cell.generation) != e->acquired.end();
  const bool both_atomic = a.kind == Kind::atomic && cell.atomic != 0;
  if (!ordered && !both_atomic && enabled(Detector::race)) {
    if (written) a.race(a.writes() ? "write after write" : "read after write", "a write of another block");
    if (a.writes() && read) a.race("write after read", "a read of another block");
  }
  forget(e, cell, true);
  cell.initialised = 1;
  cell.other_gang_read = read && !ordered && !a.writes();
}

void visit(Access& a, Cell& cell) {
  Engine* e = a.e;
  if (cell.generation != e->generation) enter_generation(a, cell);
  if (cell.pending != 0 && enabled(Detector::async_wait)) {
    raise_error(std::string(verb(a.writes())) + " of " + a.target() + a.by() + a.at() +
                " while an asynchronous copy to it has not been waited for; " + describe(a.fiber));
  }
  if (a.range == nullptr && cell.initialised == 0 && a.kind != Kind::write && enabled(Detector::uninitialised)) {
    raise_error("read of uninitialised " + a.target() + a.by() + a.at() + "; " + describe(a.fiber));
  }
  const bool check = enabled(Detector::race);
  const bool both_atomic = a.kind == Kind::atomic && cell.atomic != 0;
  if (check && !both_atomic && cell.writer >= 0 && !sees(a, cell.writer, cell.write_time)) {
    a.race(a.writes() ? "write after write" : "read after write", a.thread(cell.writer));
  }
  // Other threads' atomics since the last write are remembered as readers.
  if (check && !both_atomic && cell.atomic != 0) check_readers(a, cell, "plain access after atomic");
  switch (a.kind) {
    case Kind::read:
      cell.atomic = 0;
      add_reader(a, cell, a.fiber->id, a.fiber->clock);
      break;
    case Kind::async_read: {
      const int32_t w = cell.writer;
      if (a.other_proxy && w >= 0 && w < e->threads && enabled(Detector::proxy_fence)) {
        const Block& block = e->blocks[static_cast<size_t>(w / e->threads_per_block)];
        const Fiber& writer = block.fibers[static_cast<size_t>(w % e->threads_per_block)];
        if (cell.write_time > writer.proxy_fence_time) {
          raise_error("missing proxy fence on " + a.target() + a.by() + a.at() + ": " + describe(&writer) +
                      " wrote it and did not call fence_proxy_async()");
        }
      }
      add_reader(a, cell, e->threads, a.async_time);
      break;
    }
    case Kind::write:
      if (check) check_readers(a, cell, "write after read");
      if (check && cell.other_gang_read != 0) a.race("write after read", "a read of another block");
      free_reader_set(e, cell);
      cell.reader = -1;
      cell.writer = a.fiber->id;
      cell.write_time = a.fiber->clock;
      cell.initialised = 1;
      cell.atomic = 0;
      break;
    case Kind::atomic:
      if (check && !both_atomic) {
        check_readers(a, cell, "atomic after read");
        if (cell.other_gang_read != 0) a.race("atomic after read", "a read of another block");
        free_reader_set(e, cell);
        cell.reader = -1;
      }
      add_reader(a, cell, a.fiber->id, a.fiber->clock);
      cell.writer = a.fiber->id;
      cell.write_time = a.fiber->clock;
      cell.atomic = 1;
      break;
  }
}

// Bytes of one word that are used apart get a cell each, until a write to the whole word makes them one again.
Cell* split(Engine* e, Cell& cell) {
  if (cell.split < 0) {
    int index;
    if (e->free_split_cells.empty()) {
      index = static_cast<int>(e->split_cells.size() / 4);
      e->split_cells.resize(e->split_cells.size() + 4);
    } else {
      index = e->free_split_cells.back();
      e->free_split_cells.pop_back();
    }
    for (int i = 0; i < 4; ++i) {
      Cell part = cell;
      if (part.reader_set >= 0 && i > 0) {
        const auto copy = e->reader_sets[static_cast<size_t>(cell.reader_set)];
        part.reader_set = static_cast<int32_t>(e->reader_sets.size());
        e->reader_sets.push_back(copy);
      }
      e->split_cells[static_cast<size_t>(index * 4 + i)] = part;
    }
    cell.reader_set = -1;
    cell.split = index;
  }
  return &e->split_cells[static_cast<size_t>(cell.split) * 4];
}

template <class F>
void for_each_cell(Engine* e, Cell* cells, uintptr_t first_word, uintptr_t address, size_t bytes, bool whole, F f) {
  const uintptr_t end = address + bytes;
  for (uintptr_t word = address & ~uintptr_t(3); word < end; word += 4) {
    Cell& cell = cells[(word - first_word) / 4];
    const bool full = address <= word && word + 4 <= end;
    if (full && cell.split < 0) {
      f(cell);
      continue;
    }
    // The cell of a launch that is over: its parts are gone.
    if (cell.generation < e->first_generation) cell = Cell();
    if (full && cell.split < 0) {
      f(cell);
      continue;
    }
    const uintptr_t from = std::max(word, address), to = std::min(word + 4, end);
    for (uintptr_t byte = from; byte < to; ++byte) f(split(e, cell)[byte - word]);
    if (full && whole) {
      const int index = cell.split;
      for (int i = 1; i < 4; ++i) free_reader_set(e, e->split_cells[static_cast<size_t>(index * 4 + i)]);
      cell = e->split_cells[static_cast<size_t>(index * 4)];
      cell.split = -1;
      e->free_split_cells.push_back(index);
    } else {
      cell.generation = e->generation;  // keeps the split alive; the parts have generations of their own
    }
  }
}

const Range* find_range(uintptr_t address) {
  thread_local size_t last = 0;
  const auto& all = ranges();
  if (last < all.size() && address - all[last].begin < all[last].end - all[last].begin) return &all[last];
  for (size_t i = 0; i < all.size(); ++i) {
    if (address - all[i].begin < all[i].end - all[i].begin) {
      last = i;
      return &all[i];
    }
  }
  return nullptr;
}

// Constants, string literals and the like live in loaded images; a kernel may read them.
bool in_loaded_image(uintptr_t address) {
  static std::vector<std::pair<uintptr_t, uintptr_t>> images;
  const auto contains = [address] {
    return std::any_of(images.begin(), images.end(),
                       [address](const auto& i) { return address >= i.first && address < i.second; });
  };
  if (contains()) return true;
  images.clear();
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void*) {
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& header = info->dlpi_phdr[i];
          if (header.p_type != PT_LOAD) continue;
          const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
          images.emplace_back(begin, begin + header.p_memsz);
        }
        return 0;
      },
      nullptr);
  return contains();
}

[[noreturn]] void outside(const Access& a) {
  std::string near = "no tensor of this call is near";
  uintptr_t nearest = 4096;
  for (const Range& r : ranges()) {
    if (a.address >= r.end && a.address - r.end < nearest) {
      nearest = a.address - r.end;
      near = std::to_string(nearest) + " bytes past the end of " + r.name;
    } else if (a.address < r.begin && r.begin - a.address < nearest) {
      nearest = r.begin - a.address;
      near = std::to_string(nearest) + " bytes before " + r.name;
    }
  }
  if (a.address < 4096) near = "a null pointer";
  raise_error(std::string(verb(a.writes())) + " outside every tensor (" + near + ")" + a.by() + a.at() + "; " +
              describe(a.fiber));
}

// Finds the shadow of an access and runs f over its cells; returns early for memory that is nobody else's business.
template <class F>
void over_cells(Access& a, F f) {
  Engine* e = a.e;
  if (a.address - e->builtins_begin < e->builtins_end - e->builtins_begin) return;
  const uintptr_t stacks = reinterpret_cast<uintptr_t>(e->stacks);
  if (a.address - stacks < e->stacks_mapped) {
    const uintptr_t own = reinterpret_cast<uintptr_t>(a.fiber->stack);
    if (a.address - own < e->stack_bytes || !enabled(Detector::bounds)) return;
    raise_error(std::string(verb(a.writes())) + " of another thread's local memory" + a.at() + "; " +
                describe(a.fiber));
  }
  const uintptr_t region = reinterpret_cast<uintptr_t>(e->region);
  if (a.address - region < e->region_bytes) {
    const size_t offset = (a.address - region) % e->arena_stride;
    if (offset + a.bytes > e->shared_bytes) {
      if (!enabled(Detector::bounds)) return;
      raise_error(std::string(verb(a.writes())) + " past the end of shared memory (byte " + std::to_string(offset) +
                  " of " + std::to_string(e->shared_bytes) + ")" + a.by() + a.at() + "; " + describe(a.fiber));
    }
    Block& owner = e->blocks[(a.address - region) / e->arena_stride];
    if (&owner != a.fiber->block) owner.remote_accesses[a.fiber->id] = a.fiber->clock;
    if (owner.exited == e->threads_per_block && enabled(Detector::race)) {
      raise_error(std::string(verb(a.writes())) + " of the shared memory of a block that has exited" + a.by() + a.at() +
                  "; " + describe(a.fiber));
    }
    for_each_cell(e, e->shared_cells.data(), region, a.address, a.bytes, a.kind == Kind::write, f);
    return;
  }
  a.range = find_range(a.address);
  if (a.range == nullptr) {
    const auto parameters = reinterpret_cast<uintptr_t>(e->launch->parameters);
    if (!any_range_registered() || a.address - parameters < e->launch->parameter_bytes) return;
    if (!enabled(Detector::bounds) || in_loaded_image(a.address)) return;
    outside(a);
  }
  if (a.address + a.bytes > a.range->end && enabled(Detector::bounds)) {
    raise_error(std::string(verb(a.writes())) + " of " + std::to_string(a.bytes) + " bytes runs " +
                std::to_string(a.address + a.bytes - a.range->end) + " bytes past the end of " + a.range->name +
                a.by() + a.at() + "; " + describe(a.fiber));
  }
  if (a.writes() && !a.range->writable && enabled(Detector::read_only)) {
    raise_error("write to the input " + a.target() + a.by() + a.at() + "; " + describe(a.fiber));
  }
  const size_t bytes = std::min<size_t>(a.bytes, a.range->end - a.address);
  for_each_cell(e, a.range->cells, a.range->begin & ~uintptr_t(3), a.address, bytes, a.kind == Kind::write, f);
}

Access access(Engine* e, Fiber* fiber, const void* p, size_t bytes, Kind kind, const void* pc, const char* what) {
  ++e->statistics.accesses;
  return {e, fiber, reinterpret_cast<uintptr_t>(p), bytes, kind, pc, what, nullptr, nullptr};
}

}  // namespace

void check_access(Engine* e, Fiber* fiber, const void* p, size_t bytes, bool write, const void* pc, const char* what) {
  Access a = access(e, fiber, p, bytes, write ? Kind::write : Kind::read, pc, what);
  over_cells(a, [&a](Cell& cell) { visit(a, cell); });
}

void check_atomic(Engine* e, Fiber* fiber, const void* p, size_t bytes, bool writes, const Location& location) {
  Access a = access(e, fiber, p, bytes, Kind::atomic, nullptr, "an atomic");
  a.location = &location;
  if (!writes) {
    // An acquire load of a read-only flag is a read for the bounds, an atomic for the order.
    const Range* range = find_range(a.address);
    if (range != nullptr && !range->writable) return;
  }
  over_cells(a, [&a](Cell& cell) { visit(a, cell); });
}

void async_read(Engine* e, Fiber* issuer, const void* p, size_t bytes, uint32_t time, bool other_proxy,
                const char* what) {
  Access a = access(e, issuer, p, bytes, Kind::async_read, nullptr, what);
  a.async_time = time;
  a.other_proxy = other_proxy;
  over_cells(a, [&a](Cell& cell) { visit(a, cell); });
}

void async_write_issued(Engine* e, Fiber* issuer, const void* p, size_t bytes, const char* what) {
  Access a = access(e, issuer, p, bytes, Kind::write, nullptr, what);
  over_cells(a, [&a](Cell& cell) {
    visit(a, cell);
    cell.pending = 1;
  });
}

void async_write_landed(Engine* e, const void* p, size_t bytes, Fiber* owner, uint32_t time) {
  Fiber* fiber = owner;
  if (fiber == nullptr) {
    const size_t block = static_cast<size_t>(static_cast<const char*>(p) - e->region) / e->arena_stride;
    fiber = &e->blocks[block].fibers[0];  // local: the landing itself is nobody's access
  }
  Access a = access(e, fiber, p, bytes, Kind::write, nullptr, nullptr);
  over_cells(a, [&](Cell& cell) {
    cell.pending = 0;
    cell.writer = owner != nullptr ? owner->id : e->threads;
    cell.write_time = owner != nullptr ? owner->clock : time;
  });
}

void check_remote_accesses(Engine* e, Fiber* exiting) {
  auto& accesses = exiting->block->remote_accesses;
  for (auto i = accesses.begin(); i != accesses.end();) {
    const bool seen = i->second <= (*exiting->seen)[static_cast<size_t>(i->first)];
    i = seen ? accesses.erase(i) : std::next(i);
  }
  if (accesses.empty() || exiting->block->exited < e->threads_per_block || !enabled(Detector::race)) return;
  const int id = accesses.begin()->first;
  const Block& reader = e->blocks[static_cast<size_t>(id / e->threads_per_block)];
  raise_error("a block exits while another may still use its shared memory: the exit of " + describe(exiting) +
              " is not ordered after an access by " +
              describe(&reader.fibers[static_cast<size_t>(id % e->threads_per_block)]));
}

}  // namespace pyops::emulator
