// Barriers of blocks, clusters and grids, and mbarriers.
#include "emulator/race.h"

namespace pyops::emulator {
namespace {

[[noreturn]] void misuse(const std::string& what, const Location& location, const std::string& why) {
  raise_error(what + " at " + where(location) + ": " + why + "; " + describe(engine()->current));
}

// The waiters are moved out first: the woken threads may use it again at once.
void complete(Engine* e, Barrier& barrier) {
  ++e->statistics.barriers;
  const std::vector<Fiber*> waiting = std::move(barrier.waiting);
  const int result = barrier.result;
  const Clock released = barrier.released;
  barrier.reset();
  if (e->race) {
    if (released != nullptr) {
      for (Fiber* fiber : waiting) acquire(e, fiber, released);
    }
    order_all(e, waiting.data(), waiting.size());
  }
  for (Fiber* fiber : waiting) fiber->vote_result = result;
  e->wake(waiting.data(), waiting.size());
}

void arrive_and_wait(Engine* e, Barrier& barrier, int expected, const char* what, const Location& location) {
  Fiber* fiber = e->current;
  if (barrier.arrived == 0) barrier.location = location;
  ++barrier.arrived;
  barrier.waiting.push_back(fiber);
  if (barrier.arrived == expected) {
    complete(e, barrier);
    continue_with_next();
  } else {
    wait_here(what, 0, location);
  }
}

}  // namespace

int block_barrier(Vote vote, int predicate, const Location& location) {
  const EngineScope scope;
  Engine* e = engine();
  Fiber* fiber = e->current;
  Block& block = *fiber->block;
  Barrier& barrier = block.barriers[0];
  const bool strict = enabled(Detector::barrier);
  if (barrier.arrived == 0) {
    barrier.vote = vote;
    barrier.result = vote == Vote::all ? 1 : 0;
    barrier.location = location;
  } else {
    if (barrier.vote != vote) {
      misuse("__syncthreads", location, "meets another kind of barrier at " + where(barrier.location));
    }
    if (strict && barrier.location.line() != location.line()) {
      misuse("__syncthreads", location, "divergent, other threads are in the one at " + where(barrier.location));
    }
  }
  if (strict && block.exited > 0) {
    misuse("__syncthreads", location, std::to_string(block.exited) + " thread(s) of the block have exited");
  }
  if (vote == Vote::count) barrier.result += predicate != 0;
  if (vote == Vote::all) barrier.result &= predicate != 0;
  if (vote == Vote::any) barrier.result |= predicate != 0;
  arrive_and_wait(e, barrier, e->threads_per_block - block.exited, "__syncthreads", location);
  return fiber->vote_result;
}

void thread_exited_barriers(Engine* e, Fiber* fiber) {
  Block& block = *fiber->block;
  Barrier& barrier = block.barriers[0];
  if (barrier.arrived == 0) return;
  if (enabled(Detector::barrier)) misuse("__syncthreads", barrier.location, "a thread exited without reaching it");
  if (barrier.arrived == e->threads_per_block - block.exited) complete(e, barrier);
}

void named_barrier(int id, int threads, bool wait, const Location& location) {
  const EngineScope scope;
  Engine* e = engine();
  if (id < 1 || id >= named_barriers) misuse("named barrier", location, "the id must be 1 to 15");
  if (threads < 32 || threads % 32 != 0) misuse("named barrier", location, "the count must be a multiple of 32");
  Barrier& barrier = e->current->block->barriers[id];
  if (barrier.arrived > 0 && barrier.expected != threads) {
    misuse("named barrier", location, "threads disagree on its count, see " + where(barrier.location));
  }
  barrier.expected = threads;
  if (wait) {
    arrive_and_wait(e, barrier, threads, "named barrier", location);
    return;
  }
  if (barrier.arrived == 0) barrier.location = location;
  release(e, barrier.released, e->current);
  if (++barrier.arrived == threads) complete(e, barrier);
}

void cluster_barrier_arrive(const Location& location) {
  const EngineScope scope;
  Engine* e = engine();
  Fiber* fiber = e->current;
  require_hopper("cluster barrier", location);
  if (fiber->cluster_arrived) misuse("cluster barrier", location, "arrived twice without waiting");
  fiber->cluster_arrived = true;
  ClusterBarrier& cluster = e->clusters[static_cast<size_t>(e->cluster_of(*fiber->block))];
  fiber->cluster_phase = cluster.phase;
  release(e, cluster.barrier.released, fiber);
  if (++cluster.barrier.arrived < e->cluster_blocks * e->threads_per_block) return;
  ++e->statistics.barriers;
  ++cluster.phase;
  const std::vector<Fiber*> waiting = std::move(cluster.barrier.waiting);
  cluster.released = cluster.barrier.released;
  cluster.barrier.reset();
  e->wake(waiting.data(), waiting.size());
}

void cluster_barrier_wait(const Location& location) {
  const EngineScope scope;
  Engine* e = engine();
  Fiber* fiber = e->current;
  if (!fiber->cluster_arrived) misuse("cluster barrier", location, "waits without having arrived");
  ClusterBarrier& cluster = e->clusters[static_cast<size_t>(e->cluster_of(*fiber->block))];
  if (cluster.phase == fiber->cluster_phase) {
    cluster.barrier.waiting.push_back(fiber);
    wait_here("cluster barrier", 0, location);
  }
  fiber->cluster_arrived = false;
  acquire(e, fiber, cluster.released);
}

void grid_barrier(unsigned* counter, const Location& location) {
  const EngineScope scope;
  Engine* e = engine();
  if (!e->launch->cooperative) misuse("grid_sync", location, "the launch is not cooperative");
  announce_atomic(counter, sizeof *counter, true, Order::acquire_release, location);
  arrive_and_wait(e, e->grid_barrier, e->threads, "grid_sync", location);
  if (e->current->id == 0) {
    *counter += static_cast<unsigned>(e->launch->grid.volume());  // as the hardware's implementation leaves it
  }
}

unsigned cluster_rank() { return static_cast<unsigned>(engine()->current->block->rank % engine()->cluster_blocks); }
unsigned cluster_size() { return static_cast<unsigned>(engine()->cluster_blocks); }

// mbarriers

namespace {

MbarrierState& state_of(uint64_t* bar, const char* what, const Location& location) {
  Engine* e = engine();
  const auto found = e->mbarriers.find(bar);
  if (found == e->mbarriers.end()) misuse(what, location, "the mbarrier is not initialised");
  if (e->race) check_access(e, e->current, bar, 8, false, nullptr, what);
  return found->second;
}
void advance(MbarrierState& s) {
  if (s.pending != 0 || s.bytes != 0) return;
  s.phase ^= 1;
  s.pending = s.expected;
}

}  // namespace

void mbarrier_init(uint64_t* bar, uint32_t count, const Location& location) {
  const EngineScope scope;
  Engine* e = engine();
  require_hopper("mbarrier_init", location);
  check_shared(bar, 8, 8, "mbarrier_init", &location);
  if (count == 0 || count >= 1u << 20) misuse("mbarrier_init", location, "the count must be 1 to 2^20 - 1");
  if (e->race) check_access(e, e->current, bar, 8, true, nullptr, "mbarrier_init");
  e->mbarriers[bar] = {count, count, 0, 0, nullptr};
}

void mbarrier_arrive(uint64_t* bar, uint32_t expected_bytes, const Location& location) {
  const EngineScope scope;
  Engine* e = engine();
  MbarrierState& s = state_of(bar, "mbarrier_arrive", location);
  if (s.pending == 0) misuse("mbarrier_arrive", location, "more arrivals than the barrier counts");
  s.bytes += expected_bytes;
  --s.pending;
  release(e, s.released, e->current);
  advance(s);
}

void complete_transaction(Engine* e, uint64_t* bar, size_t bytes) {
  MbarrierState& s = e->mbarriers.at(bar);
  s.bytes -= static_cast<int64_t>(bytes);
  release_async(e, s.released, e->async_time);
  advance(s);
}

bool mbarrier_phase_done(Engine* e, uint64_t* bar, uint32_t parity) {
  const auto found = e->mbarriers.find(bar);
  return found != e->mbarriers.end() && found->second.phase != (parity & 1);
}

bool mbarrier_test(uint64_t* bar, uint32_t parity, const Location& location) {
  const EngineScope scope;
  Engine* e = engine();
  state_of(bar, "mbarrier_try_wait", location);
  if (!mbarrier_phase_done(e, bar, parity)) {
    spin(location);
    if (!mbarrier_phase_done(e, bar, parity)) return false;
  }
  acquire(e, e->current, state_of(bar, "mbarrier_try_wait", location).released);
  return true;
}

void mbarrier_wait(uint64_t* bar, uint32_t parity, const Location& location) {
  const EngineScope scope;
  Engine* e = engine();
  Fiber* fiber = e->current;
  state_of(bar, "mbarrier_wait", location);
  while (!mbarrier_phase_done(e, bar, parity)) {
    fiber->polled_barrier = bar;
    fiber->polled_parity = parity;
    e->pollers.push_back(fiber);
    wait_here("mbarrier_wait", 0, location);
  }
  acquire(e, fiber, state_of(bar, "mbarrier_wait", location).released);
}

void proxy_fence() {
  Fiber* fiber = engine()->current;
  fiber->proxy_fence_time = fiber->clock++;
}

}  // namespace pyops::emulator
