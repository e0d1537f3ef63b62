// Warp collectives: lanes post their operands and wait; the last to arrive works for all of them.
#include <algorithm>
#include <cstring>

#include "emulator/race.h"

namespace pyops::emulator {
namespace {

template <class F>
void for_each_lane(unsigned mask, F f) {
  for (; mask != 0; mask &= mask - 1) f(__builtin_ctz(mask));
}

// A lane that reads from a lane outside the mask gets an undefined value: poison.
template <class Source>
void shuffle(Lane* lanes, unsigned mask, Source source_of) {
  for_each_lane(mask, [&](int lane) {
    Lane& self = lanes[lane];
    const int argument = static_cast<int>(static_cast<uint32_t>(self.argument));
    const int width = static_cast<int>(self.argument >> 32), first = lane & ~(width - 1);
    const int source = source_of(lane, first, width, argument);
    if (mask >> source & 1) {
      std::memcpy(self.out, lanes[source].in, self.size);
    } else {
      std::memset(self.out, 0xFF, self.size);
    }
  });
}
void run_shuffle_index(Lane* lanes, unsigned mask) {
  shuffle(lanes, mask, [](int, int first, int width, int index) { return first + (index & (width - 1)); });
}
void run_shuffle_xor(Lane* lanes, unsigned mask) {
  shuffle(lanes, mask, [](int lane, int first, int width, int lane_mask) {
    const int source = lane ^ lane_mask;
    return source >= first + width || source < 0 ? lane : source;
  });
}
void run_shuffle_up(Lane* lanes, unsigned mask) {
  shuffle(lanes, mask, [](int lane, int first, int, int delta) { return lane - delta < first ? lane : lane - delta; });
}
void run_shuffle_down(Lane* lanes, unsigned mask) {
  shuffle(lanes, mask, [](int lane, int first, int width, int delta) {
    return lane + delta >= first + width ? lane : lane + delta;
  });
}

void run_ballot(Lane* lanes, unsigned mask) {
  unsigned votes = 0;
  for_each_lane(mask, [&](int l) { votes |= *static_cast<const int*>(lanes[l].in) != 0 ? 1u << l : 0u; });
  for_each_lane(mask, [&](int l) { *static_cast<unsigned*>(lanes[l].out) = votes; });
}
void run_match_any(Lane* lanes, unsigned mask) {
  const auto value = [&](int l) { return *static_cast<const uint64_t*>(lanes[l].in); };
  for_each_lane(mask, [&](int l) {
    unsigned same = 0;
    for_each_lane(mask, [&](int k) { same |= value(k) == value(l) ? 1u << k : 0u; });
    *static_cast<unsigned*>(lanes[l].out) = same;
  });
}
template <class Combine>
void reduce(Lane* lanes, unsigned mask, Combine combine) {
  int64_t total = *static_cast<const int64_t*>(lanes[__builtin_ctz(mask)].in);
  for_each_lane(mask & (mask - 1), [&](int l) { total = combine(total, *static_cast<const int64_t*>(lanes[l].in)); });
  for_each_lane(mask, [&](int l) { *static_cast<int64_t*>(lanes[l].out) = total; });
}
void run_reduce_add(Lane* l, unsigned m) {
  reduce(l, m, [](int64_t a, int64_t b) { return a + b; });
}
void run_reduce_min(Lane* l, unsigned m) {
  reduce(l, m, [](int64_t a, int64_t b) { return std::min(a, b); });
}
void run_reduce_max(Lane* l, unsigned m) {
  reduce(l, m, [](int64_t a, int64_t b) { return std::max(a, b); });
}
void run_reduce_and(Lane* l, unsigned m) {
  reduce(l, m, [](int64_t a, int64_t b) { return a & b; });
}
void run_reduce_or(Lane* l, unsigned m) {
  reduce(l, m, [](int64_t a, int64_t b) { return a | b; });
}
void run_reduce_xor(Lane* l, unsigned m) {
  reduce(l, m, [](int64_t a, int64_t b) { return a ^ b; });
}

void complete(Engine* e, Warp* warp, PendingWarpOp& pending) {
  ++e->statistics.warp_operations;
  pending.op->run(pending.lanes, pending.arrived);
  Fiber* fibers[32];
  size_t count = 0;
  for_each_lane(pending.arrived,
                [&](int l) { fibers[count++] = &warp->block->fibers[static_cast<size_t>(warp->first_thread + l)]; });
  if (pending.op->orders_memory) order_all(e, fibers, count);
  pending.op = nullptr;
  e->wake(fibers, count);
}

[[noreturn]] void misuse(const char* name, const Location& location, const std::string& why) {
  raise_error(std::string(name) + " at " + where(location) + ": " + why + "; " + describe(engine()->current));
}

}  // namespace

const WarpOp warp_sync{"__syncwarp", [](Lane*, unsigned) {}, true};
const WarpOp shuffle_index{"__shfl_sync", run_shuffle_index, false};
const WarpOp shuffle_xor{"__shfl_xor_sync", run_shuffle_xor, false};
const WarpOp shuffle_up{"__shfl_up_sync", run_shuffle_up, false};
const WarpOp shuffle_down{"__shfl_down_sync", run_shuffle_down, false};
const WarpOp ballot{"__ballot_sync", run_ballot, false};
const WarpOp match_any{"__match_any_sync", run_match_any, false};
const WarpOp reduce_add{"__reduce_add_sync", run_reduce_add, false};
const WarpOp reduce_min{"__reduce_min_sync", run_reduce_min, false};
const WarpOp reduce_max{"__reduce_max_sync", run_reduce_max, false};
const WarpOp reduce_and{"__reduce_and_sync", run_reduce_and, false};
const WarpOp reduce_or{"__reduce_or_sync", run_reduce_or, false};
const WarpOp reduce_xor{"__reduce_xor_sync", run_reduce_xor, false};

void warp_collective(const WarpOp& op, unsigned mask, const void* in, void* out, uint32_t size, uint64_t argument,
                     const Location& location) {
  const EngineScope scope;
  Engine* e = engine();
  Fiber* fiber = e->current;
  Warp* warp = fiber->warp;
  const bool strict = enabled(Detector::warp);
  const int lanes_in_warp = std::min(32, e->threads_per_block - warp->first_thread);
  const unsigned existing = lanes_in_warp == 32 ? ~0u : (1u << lanes_in_warp) - 1;
  if ((mask >> fiber->lane & 1) == 0) misuse(op.name, location, "the calling lane is not in its own mask");
  if (strict && (mask & existing & ~warp->live) != 0)
    misuse(op.name, location, "the mask names a lane that has exited");
  if ((mask & ~existing) != 0) {
    // A full mask in the last, partial warp is how kernels are written everywhere; it means the lanes there are.
    if (strict && mask != ~0u) misuse(op.name, location, "the mask names a lane that does not exist");
    mask &= existing;
  }
  PendingWarpOp *pending = nullptr, *unused = nullptr;
  for (PendingWarpOp& p : warp->pending) {
    if (p.op == nullptr) {
      if (unused == nullptr) unused = &p;
    } else if (p.mask == mask) {
      pending = &p;
    } else if (strict && (p.mask & mask) != 0 && p.op == &op && p.location.line() == location.line()) {
      char masks[48];
      snprintf(masks, sizeof masks, "%08x and %08x", p.mask, mask);
      misuse(op.name, location, std::string("lanes disagree on the mask, ") + masks);
    }
  }
  if (pending != nullptr) {
    if (pending->op != &op) {
      misuse(op.name, location,
             std::string("warp divergence, meets ") + pending->op->name + " at " + where(pending->location));
    }
    if (strict && pending->location.line() != location.line()) {
      misuse(op.name, location, "warp divergence, other lanes are in the one at " + where(pending->location));
    }
  } else {
    if (unused == nullptr) misuse(op.name, location, "more than 8 different masks wait at once");
    pending = unused;
    pending->op = &op;
    pending->mask = mask;
    pending->arrived = 0;
    pending->location = location;
  }
  pending->lanes[fiber->lane] = {in, out, argument, size};
  pending->arrived |= 1u << fiber->lane;
  if ((mask & warp->live) == pending->arrived) {
    complete(e, warp, *pending);  // this fiber is queued with the others, so that the schedule stays fair
    continue_with_next();
  } else {
    wait_here(op.name, mask, location);
  }
}

unsigned active_mask() { return engine()->current->warp->live; }

void lane_exited(Engine* e, Fiber* fiber) {
  Warp* warp = fiber->warp;
  warp->live &= ~(1u << fiber->lane);
  for (PendingWarpOp& p : warp->pending) {
    if (p.op == nullptr || (p.mask >> fiber->lane & 1) == 0) continue;
    if (enabled(Detector::warp)) misuse(p.op->name, p.location, "the mask names a lane that has exited");
    if (p.arrived != 0 && (p.mask & warp->live) == p.arrived) complete(e, warp, p);
  }
}

}  // namespace pyops::emulator
