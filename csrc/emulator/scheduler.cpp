// Runs gangs: who executes next, what a blocked thread waits for, how errors leave a fiber, and the launch itself.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <utility>

#include "emulator/fiber.h"
#include "emulator/race.h"
#include "emulator/statistics.h"

#define PYOPS_TLS __attribute__((tls_model("initial-exec")))
__thread uint3 threadIdx PYOPS_TLS;
__thread uint3 blockIdx PYOPS_TLS;
// Declared as dim3 for kernels; the same three words without its constructor, which thread-local storage cannot run.
__thread uint3 pyops_block_dim asm("blockDim") PYOPS_TLS;
__thread uint3 pyops_grid_dim asm("gridDim") PYOPS_TLS;

namespace pyops::emulator {
namespace {

__thread Engine* current_engine PYOPS_TLS = nullptr;
constexpr size_t guard_bytes = 4096;
constexpr unsigned char canary = 0xA5;
constexpr unsigned char poison = 0xFF;  // NaN in every floating type
constexpr uint64_t livelock_yields = 1 << 20;

std::atomic<uint32_t> next_generation{1};

void enter(Engine* e, Fiber* fiber) {
  e->current = fiber;
  threadIdx = fiber->index;
  blockIdx = fiber->block->index;
}

void switch_to(Engine* e, Fiber* to) {
  Fiber* from = e->current;
  if (from == to) return;
  ++e->statistics.switches;
  enter(e, to);
  switch_stacks(&from->stack_pointer, to->stack_pointer, &from->bounds, to->bounds);
}

[[noreturn]] void leave_gang(Engine* e) {
  void* abandoned;
  switch_stacks(&abandoned, e->main_stack_pointer, nullptr, e->main_bounds);
  __builtin_unreachable();
}

bool wake_pollers(Engine* e) {
  bool woken = false;
  for (size_t i = 0; i < e->pollers.size();) {
    Fiber* fiber = e->pollers[i];
    if (mbarrier_phase_done(e, fiber->polled_barrier, fiber->polled_parity)) {
      e->push(fiber);
      e->pollers.erase(e->pollers.begin() + static_cast<ptrdiff_t>(i));
      woken = true;
    } else {
      ++i;
    }
  }
  return woken;
}

// Asynchronous copies land only when nothing else can run: the latest moment the programming model allows.
Fiber* next_runnable(Engine* e) {
  for (;;) {
    if (Fiber* fiber = e->pop()) return fiber;
    if (wake_pollers(e)) continue;
    if (!run_async_operation(e)) return nullptr;
  }
}

[[noreturn]] void report_deadlock(Engine* e) {
  std::map<std::string, std::pair<int, std::string>> groups;
  int exited = 0;
  for (Block& block : e->blocks) {
    exited += block.exited;
    for (Fiber& fiber : block.fibers) {
      if (fiber.state != State::waiting) continue;
      char mask[32] = "";
      if (fiber.waiting_mask != 0) snprintf(mask, sizeof mask, " mask %08x", fiber.waiting_mask);
      auto& [count, first] = groups[std::string(fiber.waiting_in) + mask + " at " + where(fiber.location)];
      if (count++ == 0) first = describe(&fiber);
    }
  }
  std::string text = "deadlock: no thread can run";
  for (const auto& [place, group] : groups) {
    text += "\n    " + std::to_string(group.first) + " thread(s) wait in " + place + ", first " + group.second;
  }
  if (exited > 0) text += "\n    " + std::to_string(exited) + " thread(s) have exited";
  raise_error(text);
}

void fiber_main() {
  Engine* e = current_engine;
  StackBounds entered_from;
  entered_stack(entered_from);
  if (e->main_bounds.bottom == nullptr) e->main_bounds = entered_from;  // the first of a gang comes from outside
  try {
    e->launch->body(e->launch->parameters);
  } catch (const std::exception& x) { raise_error(std::string("exception in a kernel: ") + x.what()); }
  Fiber* fiber = e->current;
  ++fiber->engine_depth;
  check_nothing_outstanding(fiber);
  fiber->state = State::done;
  --e->live;
  ++fiber->block->exited;
  if (e->race) check_remote_accesses(e, fiber);
  lane_exited(e, fiber);
  thread_exited_barriers(e, fiber);
  if (e->live == 0) leave_gang(e);
  Fiber* next = next_runnable(e);
  if (next == nullptr) report_deadlock(e);
  switch_to(e, next);
  __builtin_unreachable();
}

void start_fiber(Engine* e, Block& block, int thread) {
  const Extent& shape = e->launch->block;
  Fiber& fiber = block.fibers[static_cast<size_t>(thread)];
  char* const stack = fiber.stack;
  const int id = block.rank * e->threads_per_block + thread;
  fiber = Fiber();
  fiber.stack = stack;
  fiber.bounds = {stack, e->stack_bytes, nullptr};
  allow(stack, e->stack_bytes);  // an abandoned thread left its frames' red zones behind
  fiber.thread = thread;
  fiber.lane = thread % 32;
  fiber.id = id;
  fiber.block = &block;
  fiber.warp = &block.warps[static_cast<size_t>(thread / 32)];
  fiber.warp->live |= 1u << fiber.lane;
  const auto t = static_cast<unsigned>(thread);
  fiber.index = {t % shape.x, t / shape.x % shape.y, t / (shape.x * shape.y)};
  fiber.stack_pointer = initial_stack_pointer(stack + e->stack_bytes, &fiber_main);
}

void check_canary(Engine* e) {
  if (!enabled(Detector::shared_overrun)) return;
  for (const Block& block : e->blocks) {
    for (size_t i = e->shared_bytes; i < e->arena_stride; ++i) {
      if (static_cast<unsigned char>(block.arena[i]) == canary) continue;
      raise_error("write past the end of shared memory (byte " + std::to_string(i) + " of " +
                  std::to_string(e->shared_bytes) + ") in block (" + std::to_string(block.index.x) + "," +
                  std::to_string(block.index.y) + "," + std::to_string(block.index.z) + ")");
    }
  }
}

void check_launch(const Launch& launch) {
  const auto fail_launch = [&](const std::string& why) { throw std::runtime_error("kernel launch: " + why); };
  if (launch.block.volume() < 1 || launch.block.volume() > 1024) fail_launch("blocks have 1 to 1024 threads");
  const auto axis = static_cast<unsigned>(configuration().grid_axis);
  if (launch.grid.y > axis || launch.grid.z > axis || launch.grid.x > 0x7fffffffu) fail_launch("grid too large");
  if (launch.shared_bytes > static_cast<size_t>(shared_memory_limit())) {
    fail_launch("more than " + std::to_string(shared_memory_limit() >> 10) + " KB of shared memory");
  }
  const Extent &g = launch.grid, &c = launch.cluster;
  if (c.volume() < 1 || c.volume() > 16) fail_launch("clusters have 1 to 16 blocks");
  if (c.volume() > 1 && compute_capability() < 90) fail_launch("clusters need sm_90");
  if (g.x % c.x || g.y % c.y || g.z % c.z) fail_launch("the grid is not a multiple of the cluster");
  if (launch.cooperative && c.volume() != c.x)
    fail_launch("clusters of a cooperative grid lie along x in the emulator");
  if (launch.cooperative && g.volume() > int64_t(multiprocessor_count()) * resident_blocks()) {
    fail_launch("a cooperative grid must fit the machine: max_cooperative_blocks(...)");
  }
}

}  // namespace

Engine* engine() { return current_engine; }

std::string where(const Location& location) {
  const std::string file = location.file_name();
  const size_t slash = file.rfind('/');
  const std::string text =
      (slash == std::string::npos ? file : file.substr(slash + 1)) + ":" + std::to_string(location.line());
  // Inside the vocabulary's own headers the line says little: name the kernel's line as well.
  if (file.find("cuda/device/") == std::string::npos) return text;
  return text + locate_caller();
}

std::string describe(const Fiber* fiber) {
  char text[160];
  const uint3 &b = fiber->block->index, &t = fiber->index;
  snprintf(text, sizeof text, "block (%u,%u,%u) thread (%u,%u,%u) [warp %d lane %d]", b.x, b.y, b.z, t.x, t.y, t.z,
           fiber->thread / 32, fiber->lane);
  return text;
}

void raise_error(std::string message) {
  Engine* e = current_engine;
  if (e == nullptr || e->current == nullptr) throw std::runtime_error(message);
  ++e->current->engine_depth;
  if (e->error == nullptr) e->error = std::make_unique<std::string>(std::move(message));
  leave_gang(e);
}

void fail(const char* what, const Location& location) {
  Engine* e = current_engine;
  if (e != nullptr && e->current != nullptr) ++e->current->engine_depth;
  raise_error(std::string(what) + " at " + where(location) + (e && e->current ? "; " + describe(e->current) : ""));
}

void wait_here(const char* what, unsigned mask, const Location& location) {
  Engine* e = current_engine;
  Fiber* fiber = e->current;
  fiber->state = State::waiting;
  fiber->waiting_in = what;
  fiber->waiting_mask = mask;
  fiber->location = location;
  e->lonely_yields = 0;
  Fiber* next = next_runnable(e);
  if (next == nullptr) report_deadlock(e);
  switch_to(e, next);
}

void continue_with_next() {
  Engine* e = current_engine;
  switch_to(e, e->pop());
}

// Called where a kernel may be spinning: lets others run now and then, and notices when that never helps.
void spin(const Location& location) {
  Engine* e = current_engine;
  if (e == nullptr || e->current == nullptr) return;
  const EngineScope scope;
  if (e->queue.empty()) {
    if (wake_pollers(e) || run_async_operation(e)) return;
    if (++e->lonely_yields > livelock_yields) {
      fail("livelock: a thread spins, and no other thread can run", location);
    }
    return;
  }
  if (++e->current->yields % 16 != 0) return;
  // Nothing but spinning for a while: what they spin on may be a sleeper's turn or a copy's landing.
  if (e->lonely_yields % 64 == 63 && !wake_pollers(e)) run_async_operation(e);
  if (++e->lonely_yields > livelock_yields) fail("livelock: threads spin without an end", location);
  e->push(e->current);
  continue_with_next();
}

// Depth-first schedules put the woken threads before all others: one warp runs as far ahead as barriers let it.
void Engine::push(Fiber* fiber) {
  fiber->state = State::ready;
  queue.push_back(fiber);
}
Fiber* Engine::pop() {
  if (queue.empty()) return nullptr;
  if (schedule == Schedule::random) std::swap(queue.front(), queue[random() % queue.size()]);
  Fiber* fiber = queue.front();
  queue.pop_front();
  return fiber;
}
void Engine::wake(Fiber* const* fibers, size_t count) {
  const bool front = schedule == Schedule::deep || schedule == Schedule::deep_reverse;
  const bool backwards = schedule == Schedule::reverse || schedule == Schedule::deep;
  for (size_t i = 0; i < count; ++i) {
    Fiber* fiber = fibers[backwards ? count - 1 - i : i];
    fiber->state = State::ready;
    if (front) {
      queue.push_front(fiber);
    } else {
      queue.push_back(fiber);
    }
  }
}

Engine::~Engine() {
  unmap_stacks(stacks, stacks_mapped);
  free(region);
}

// Sizes everything for the gangs of one launch; memory of an earlier launch is kept where it suffices.
void Engine::prepare(const Launch& l) {
  const Configuration& c = configuration();
  launch = &l;
  schedule = c.schedule;
  random.seed(c.seed);
  race = c.race;
  statistics = {};
  const auto gang_blocks = static_cast<size_t>(l.cooperative ? l.grid.volume() : l.cluster.volume());
  cluster_blocks = static_cast<int>(l.cluster.volume());
  threads_per_block = static_cast<int>(l.block.volume());
  threads = threads_per_block * static_cast<int>(gang_blocks);

  const size_t stride = c.stack_bytes + guard_bytes, stacks_needed = stride * static_cast<size_t>(threads);
  if (stride != stack_stride || stacks_needed > stacks_mapped || c.one_mapping != stacks_in_one_mapping) {
    unmap_stacks(stacks, std::exchange(stacks_mapped, 0));
    stacks = nullptr;
    stacks = map_stacks(stacks_needed, stride, guard_bytes, static_cast<size_t>(threads), c.one_mapping);
    stacks_in_one_mapping = c.one_mapping;
    stack_stride = stride;
    stack_bytes = c.stack_bytes;
    stacks_mapped = stacks_needed;
  }
  shared_bytes = l.shared_bytes;
  arena_stride = (shared_bytes + 2047) / 1024 * 1024;  // at least 1 KB of canary, and 1 KB alignment for all
  region_bytes = arena_stride * gang_blocks;
  if (region_bytes > region_capacity) {
    allow(region, region_capacity);
    free(region);
    region_capacity = (region_bytes + 4095) / 4096 * 4096;
    region = static_cast<char*>(aligned_alloc(4096, region_capacity));
    if (region == nullptr) throw std::bad_alloc();
  }
  if (race && shared_cells.size() < region_bytes / 4) shared_cells.resize(region_bytes / 4);

  if (blocks.size() != gang_blocks || blocks[0].fibers.size() != static_cast<size_t>(threads_per_block)) {
    blocks = std::vector<Block>(gang_blocks);
    for (Block& block : blocks) {
      block.fibers.resize(static_cast<size_t>(threads_per_block));
      block.warps.resize(static_cast<size_t>(threads_per_block + 31) / 32);
    }
  }
  char* stack = stacks + guard_bytes;
  for (Block& block : blocks) {
    for (Fiber& fiber : block.fibers) {
      fiber.stack = stack;
      stack += stack_stride;
    }
  }
  sync_variables.clear();
  reader_sets.clear();
  free_reader_sets.clear();
  split_cells.clear();
  free_split_cells.clear();
  first_generation = next_generation;
  builtins_begin = UINTPTR_MAX;
  builtins_end = 0;
  for (const uint3* variable : {&threadIdx, &blockIdx, &pyops_block_dim, &pyops_grid_dim}) {
    builtins_begin = std::min(builtins_begin, reinterpret_cast<uintptr_t>(variable));
    builtins_end = std::max(builtins_end, reinterpret_cast<uintptr_t>(variable + 1));
  }
}

void Engine::run_gang(Extent origin) {
  const Launch& l = *launch;
  live = threads;
  queue.clear();
  pollers.clear();
  lonely_yields = 0;
  async_operations.clear();
  next_async_id = 0;
  mbarriers.clear();
  clusters.assign(blocks.size() / static_cast<size_t>(cluster_blocks), ClusterBarrier());
  grid_barrier.reset();
  generation = next_generation++;
  acquired.clear();
  allow(region, region_bytes);
  std::memset(region, configuration().poison ? poison : 0, region_bytes);

  std::vector<Fiber*> order;
  for (size_t b = 0; b < blocks.size(); ++b) {
    Block& block = blocks[b];
    block.rank = static_cast<int>(b);
    block.exited = 0;
    block.arena = region + arena_stride * b;
    std::memset(block.arena + shared_bytes, canary, arena_stride - shared_bytes);
    forbid(block.arena + shared_bytes, arena_stride - shared_bytes);
    const auto i = static_cast<unsigned>(b);
    const Extent& box = l.cooperative ? l.grid : l.cluster;
    block.index = {origin.x + i % box.x, origin.y + i / box.x % box.y, origin.z + i / (box.x * box.y)};
    for (Barrier& barrier : block.barriers) barrier.reset();
    for (int& waiters : block.product_waiters) waiters = 0;
    for (int& registers : block.registers) registers = 0;
    block.remote_accesses.clear();
    for (size_t w = 0; w < block.warps.size(); ++w) {
      block.warps[w] = Warp();
      block.warps[w].block = &block;
      block.warps[w].first_thread = static_cast<int>(w) * 32;
    }
    for (int t = 0; t < threads_per_block; ++t) {
      start_fiber(this, block, t);
      order.push_back(&block.fibers[static_cast<size_t>(t)]);
    }
  }
  if (race) clocks_start(this);
  wake(order.data(), order.size());
  ++statistics.blocks;
  Fiber* first = pop();
  enter(this, first);
  main_bounds = {};
  StackBounds here;
  switch_stacks(&main_stack_pointer, first->stack_pointer, &here, first->bounds);
  allow(region, region_bytes);
  current = nullptr;
  if (error == nullptr) {
    try {
      finish_async_operations(this);
      check_canary(this);
    } catch (const std::exception& x) { error = std::make_unique<std::string>(x.what()); }
  }
}

namespace {

// Engines keep their stacks and arenas between launches.
class EnginePool {
 public:
  std::unique_ptr<Engine> take() {
    const std::lock_guard lock(mutex_);
    if (idle_.empty()) return std::make_unique<Engine>();
    auto e = std::move(idle_.back());
    idle_.pop_back();
    return e;
  }
  void give(std::unique_ptr<Engine> e) {
    e->error.reset();
    const std::lock_guard lock(mutex_);
    idle_.push_back(std::move(e));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Engine>> idle_;
};
EnginePool& pool() {
  static auto* const instance = new EnginePool();
  return *instance;
}

}  // namespace

void launch_grid(const Launch& l) {
  if (current_engine != nullptr) fail("a kernel cannot launch a kernel", Location::current());
  check_launch(l);
  const Extent box = l.cooperative ? l.grid : l.cluster;
  const Extent gangs{l.grid.x / box.x, l.grid.y / box.y, l.grid.z / box.z};
  const int64_t count = gangs.volume();
  std::atomic<int64_t> next{0};
  std::atomic<bool> stop{false};
  std::mutex mutex;
  std::string message;

  const auto work = [&] {
    auto e = pool().take();
    try {
      e->prepare(l);
      current_engine = e.get();
      pyops_block_dim = {l.block.x, l.block.y, l.block.z};
      pyops_grid_dim = {l.grid.x, l.grid.y, l.grid.z};
      const bool backwards = e->schedule == Schedule::reverse || e->schedule == Schedule::deep_reverse;
      for (int64_t i = next++; i < count && !stop; i = next++) {
        const int64_t gang = backwards ? count - 1 - i : i;
        e->run_gang({static_cast<unsigned>(gang % gangs.x) * box.x,
                     static_cast<unsigned>(gang / gangs.x % gangs.y) * box.y,
                     static_cast<unsigned>(gang / (int64_t(gangs.x) * gangs.y)) * box.z});
        if (e->error != nullptr) {
          stop = true;
          const std::lock_guard lock(mutex);
          if (message.empty()) message = *e->error;
        }
      }
    } catch (const std::exception& x) {
      stop = true;
      const std::lock_guard lock(mutex);
      if (message.empty()) message = x.what();
    }
    current_engine = nullptr;
    add_statistics(e->statistics);
    pool().give(std::move(e));
  };
  // The shadow of global memory knows one engine at a time, so race mode runs on the calling thread.
  const Configuration& c = configuration();
  const auto workers = static_cast<int>(c.race ? 1 : std::min<int64_t>(c.threads, count));
  if (workers <= 1) {
    work();
  } else {
    std::vector<std::thread> team;
    for (int i = 0; i < workers; ++i) team.emplace_back(work);
    for (std::thread& t : team) t.join();
  }
  Statistics launched{};
  launched.launches = 1;
  add_statistics(launched);
  if (!message.empty()) throw std::runtime_error("emulator: " + message);
}

}  // namespace pyops::emulator
