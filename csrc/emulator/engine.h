// The engine's state. One Engine runs one gang at a time on one host thread: a block, a cluster, or a cooperative grid.
#pragma once

#include <vector_types.h>

#include <cstdint>
#include <deque>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulator/fiber.h"
#include "emulator/interface.h"

namespace pyops::emulator {

// Shared immutable vector clock: after a barrier all its threads hold the same one. Index = gang thread; the last entry
// belongs to the asynchronous copy and matrix units.
using Clock = std::shared_ptr<const std::vector<uint32_t>>;

enum class Schedule { forward, reverse, random, deep, deep_reverse };

struct Configuration {
  Schedule schedule = Schedule::forward;
  uint64_t seed = 1;
  bool race = false;  // needs instrumented kernels
  bool poison = true;
  int threads = 1;
#if defined(PYOPS_EMULATOR_ASAN)
  size_t stack_bytes = 256 << 10;  // red zones around every local array
#else
  size_t stack_bytes = 64 << 10;
#endif
  bool one_mapping = true;  // all stacks, where the kernel can guard pages within one
  int multiprocessors = 2;
  int resident_blocks = 2;
  int grid_axis = 65535;  // blocks along axes 1 and 2 of a grid
  int l2_bytes = 50 << 20;
  int capability = 90;    // 10 * major + minor
  uint64_t silenced = 0;  // detectors switched off, for the tests that prove them
};
Configuration& configuration();

// Names of the detectors, so that a test can silence one and see its planted bug slip through.
enum class Detector {
  race,
  uninitialised,
  bounds,
  read_only,
  proxy_fence,
  async_wait,
  warp,
  barrier,
  shared_overrun,
  alignment,
  count
};
bool enabled(Detector detector);

struct Statistics {
  uint64_t launches, blocks, switches, warp_operations, barriers, mma, wgmma, ldmatrix, ldmatrix_conflicts, accesses;
};

struct Warp;
struct Block;

enum class State : uint8_t { ready, waiting, done };

struct CopyAsync {
  void* shared;
  const void* global;
  int bytes;
  bool valid;
};

struct WgmmaOperation {
  WgmmaIssue issue;
  uint32_t registers[4];
  uint32_t time;  // race mode: when its operands were read
};

// The accumulator's true value while the product is in flight; the kernel's registers hold poison meanwhile.
struct HeldAccumulator {
  float* registers;
  int count;
  float value[128];
};

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  StackBounds bounds;
  int thread = 0;  // in the block
  int lane = 0;
  int id = 0;  // in the gang
  uint3 index{};
  Block* block = nullptr;
  Warp* warp = nullptr;
  State state = State::done;

  // what it waits for
  const char* waiting_in = "";
  Location location;
  unsigned waiting_mask = 0;
  int vote_result = 0;
  uint64_t* polled_barrier = nullptr;
  uint32_t polled_parity = 0;
  int yields = 0;
  int engine_depth = 0;  // > 0: in a call of the engine, whose own accesses are not the kernel's

  // asynchronous operations
  std::vector<CopyAsync> open_copies;
  std::deque<std::vector<CopyAsync>> copy_groups;
  std::vector<int> open_bulk;  // ids of stores
  std::deque<std::vector<int>> bulk_groups;
  std::vector<WgmmaOperation> open_products;
  std::deque<std::vector<WgmmaOperation>> product_groups;
  std::vector<HeldAccumulator> accumulators;
  bool product_fenced = false;
  bool cluster_arrived = false;
  uint32_t cluster_phase = 0;

  // race mode
  Clock seen;               // what happened before this thread's present, other threads
  uint32_t clock = 0;       // its own time
  uint32_t async_seen = 0;  // time of the asynchronous units it has waited for
  uint32_t proxy_fence_time = 0;
  Clock fenced;  // `seen` and own time at its last memory fence
};

struct PendingWarpOp {
  const WarpOp* op = nullptr;  // null: free
  unsigned mask, arrived;
  Location location;
  Lane lanes[32];
};
struct Warp {
  Block* block = nullptr;
  int first_thread = 0;
  unsigned live = 0;
  PendingWarpOp pending[8];
};

struct Barrier {
  int expected = 0, arrived = 0;
  Vote vote = Vote::none;
  int result = 0;
  Location location;
  std::vector<Fiber*> waiting;
  Clock released;
  void reset() {
    expected = arrived = 0;
    waiting.clear();
    released.reset();
  }
};
constexpr int named_barriers = 16;

// The barrier of one cluster: its phase, and what the last complete one released.
struct ClusterBarrier {
  Barrier barrier;
  uint32_t phase = 0;
  Clock released;
};

struct Block {
  uint3 index{};
  int rank = 0;  // in the gang
  char* arena = nullptr;
  int exited = 0;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barriers[named_barriers];
  int product_waiters[8] = {};
  int registers[8] = {};                              // what each warpgroup has set by setmaxnreg; 0: nothing yet
  std::unordered_map<int, uint32_t> remote_accesses;  // race mode: thread of another block, time of its last access
};

struct MbarrierState {
  uint32_t expected, pending;
  int64_t bytes;
  uint32_t phase;
  Clock released;
};

struct AsyncOperation {
  enum Kind { tensor_load, tensor_store, tensor_add, bulk_load, bulk_store } kind;
  int id;
  Fiber* issuer;
  Location location;
  char* arena;  // of the block whose shared memory is meant
  char* shared;
  char* global;  // bulk copies
  size_t bytes;
  TensorMapData map;
  int coordinates[5];
  uint16_t offsets[3];
  uint64_t* bar;             // loads
  uint32_t time;             // stores, race mode: when the source was read
  std::vector<char> staged;  // stores that have read their source, in box order
  bool is_store() const { return kind == tensor_store || kind == tensor_add || kind == bulk_store; }
};

// Shadow of four bytes. Times of 0 mean never.
struct Cell {
  uint32_t generation = 0;  // the gang that touched it last; gangs are numbered over the process
  uint32_t write_time = 0, read_time = 0;
  int32_t writer = -1, reader = -1;
  int32_t reader_set = -1;  // several unordered readers: index into Engine::reader_sets
  int32_t split = -1;       // accesses of parts of the word: index into Engine::split_cells
  uint8_t initialised = 0, pending = 0, atomic = 0, other_gang_read = 0;
};

struct Range {
  uintptr_t begin, end;
  bool writable;
  std::string name;
  Cell* cells;
};

// Memory order between gangs: an address through which gangs have released.
struct SyncVariable {
  Clock clock;
  uint32_t clock_generation = 0;
  std::vector<uint32_t> released_by;
};

struct Engine {
  const Launch* launch = nullptr;
  std::vector<Block> blocks;
  int threads = 0;  // of the gang
  int threads_per_block = 0;
  Fiber* current = nullptr;
  void* main_stack_pointer = nullptr;
  StackBounds main_bounds;
  int live = 0;
  std::unique_ptr<std::string> error;
  Statistics statistics{};

  // run queue
  Schedule schedule = Schedule::forward;
  std::mt19937_64 random;
  std::deque<Fiber*> queue;
  std::vector<Fiber*> pollers;
  uint64_t lonely_yields = 0;

  // memory
  char* stacks = nullptr;
  size_t stack_stride = 0, stack_bytes = 0, stacks_mapped = 0;
  bool stacks_in_one_mapping = false;
  char* region = nullptr;  // shared memory of all blocks of the gang, `arena_stride` apart
  size_t region_bytes = 0, region_capacity = 0, arena_stride = 0, shared_bytes = 0;

  int cluster_blocks = 1;  // a gang is one cluster, or a cooperative grid of them, each of this many blocks in a row
  std::vector<ClusterBarrier> clusters;
  Barrier grid_barrier;
  std::deque<AsyncOperation> async_operations;
  int next_async_id = 0;
  std::unordered_map<uint64_t*, MbarrierState> mbarriers;

  // race mode
  bool race = false;
  uintptr_t builtins_begin = 0, builtins_end = 0;  // threadIdx and its like, on the host thread that runs the engine
  uint32_t generation = 0, first_generation = 0;
  uint32_t async_time = 1;
  std::vector<Cell> shared_cells;
  std::vector<std::vector<uint32_t>> reader_sets;
  std::vector<int> free_reader_sets;
  std::vector<Cell> split_cells;  // four per index
  std::vector<int> free_split_cells;
  std::unordered_map<uintptr_t, SyncVariable> sync_variables;
  std::vector<uint32_t> acquired;  // generations whose writes this gang may see

  ~Engine();
  void prepare(const Launch& launch);
  void run_gang(Extent origin);
  void push(Fiber* fiber);
  Fiber* pop();
  void wake(Fiber* const* fibers, size_t count);
  int cluster_of(const Block& block) const { return block.rank / cluster_blocks; }
  Block& in_cluster(const Block& block, unsigned rank) {
    return blocks[static_cast<size_t>(cluster_of(block) * cluster_blocks) + rank];
  }
};

Engine* engine();  // of this host thread; null outside a launch

// Stands in every function that a kernel calls. The linker may give the engine the instrumented copy of a standard
// library template, so the hooks have to know whose access they see.
class EngineScope {
 public:
  EngineScope() : fiber_(engine()->current) { ++fiber_->engine_depth; }
  ~EngineScope() { --fiber_->engine_depth; }
  EngineScope(const EngineScope&) = delete;
  EngineScope& operator=(const EngineScope&) = delete;

 private:
  Fiber* fiber_;
};

// scheduling (scheduler.cpp)
[[noreturn]] void raise_error(std::string message);
void wait_here(const char* what, unsigned mask, const Location& location);
void continue_with_next();  // the current fiber is already queued
std::string describe(const Fiber* fiber);
std::string where(const Location& location);

// warp.cpp, barrier.cpp, async_copy.cpp, tensor_core.cpp: called by the scheduler
void lane_exited(Engine* e, Fiber* fiber);
void thread_exited_barriers(Engine* e, Fiber* fiber);
void check_nothing_outstanding(Fiber* fiber);
bool mbarrier_phase_done(Engine* e, uint64_t* bar, uint32_t parity);
bool run_async_operation(Engine* e);
void finish_async_operations(Engine* e);
void complete_transaction(Engine* e, uint64_t* bar, size_t bytes);
void check_shared(const void* p, size_t bytes, size_t alignment, const char* what, const Location* location);
size_t swizzled(size_t offset, int swizzle_bytes);
float half_to_float(uint16_t bits, bool is_bf16);
void add_half(char* to, const char* from, bool is_bf16);

// locate.cpp
std::string locate(const void* pc);  // " at file:line" of the kernel's own code
std::string locate_caller();         // the same for the code the current fiber is in

}  // namespace pyops::emulator
