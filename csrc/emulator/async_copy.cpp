// cp.async, bulk copies and TMA. Destinations hold poison from issue on; data lands at the last legal moment.
#include <algorithm>
#include <cstring>
#include <mutex>
#include <stdexcept>

#include "emulator/race.h"

namespace pyops::emulator {
namespace {

constexpr uint16_t map_magic = 0x5A3C;

[[noreturn]] void misuse(const std::string& what, const Location& location, const std::string& why) {
  raise_error(what + " at " + where(location) + ": " + why + "; " + describe(engine()->current));
}
void poison(void* p, size_t bytes) {
  if (configuration().poison) std::memset(p, 0xFF, bytes);
}

}  // namespace

void check_shared(const void* p, size_t bytes, size_t alignment, const char* what, const Location* location) {
  Engine* e = engine();
  const size_t offset = static_cast<size_t>(static_cast<const char*>(p) - e->region);
  const auto place = [&] { return location != nullptr ? std::string(" at ") + where(*location) : locate_caller(); };
  if (offset >= e->region_bytes || offset % e->arena_stride + bytes > e->shared_bytes) {
    raise_error(std::string(what) + place() + ": address outside this launch's shared memory; " + describe(e->current));
  }
  if (reinterpret_cast<uintptr_t>(p) % alignment != 0) {
    raise_error(std::string(what) + place() + ": misaligned shared address; " + describe(e->current));
  }
}

void* shared_arena(size_t bytes, size_t alignment, const Location& location) {
  const EngineScope scope;
  Engine* e = engine();
  if (alignment > 1024) misuse("shared_storage", location, "aligned to more than 1024 bytes");
  if (bytes > e->shared_bytes) {
    misuse("shared_storage", location,
           "needs " + std::to_string(bytes) + " bytes, the launch gave " + std::to_string(e->shared_bytes));
  }
  return e->current->block->arena;
}
uint32_t shared_offset(const void* p) {
  return static_cast<uint32_t>(static_cast<const char*>(p) - engine()->current->block->arena);
}
void* map_shared(const void* p, unsigned rank, const Location& location) {
  const EngineScope scope;
  Engine* e = engine();
  require_hopper("cluster_map", location);
  const auto offset = static_cast<const char*>(p) - e->current->block->arena;
  if (rank >= static_cast<unsigned>(e->cluster_blocks))
    misuse("cluster_map", location, "no block of that rank in the cluster");
  if (offset < 0 || static_cast<size_t>(offset) >= e->shared_bytes) {
    misuse("cluster_map", location, "not an address in this block's shared memory");
  }
  return e->in_cluster(*e->current->block, rank).arena + offset;
}

// cp.async

void copy_async(void* shared, const void* global, int bytes, bool valid, const Location& location) {
  const EngineScope scope;
  Engine* e = engine();
  Fiber* fiber = e->current;
  const auto size = static_cast<size_t>(bytes);
  check_shared(shared, size, size, "cp.async", &location);
  if (valid && reinterpret_cast<uintptr_t>(global) % size != 0) {
    misuse("cp.async", location, "misaligned global address");
  }
  if (e->race) {
    if (valid) check_access(e, fiber, global, size, false, nullptr, "cp.async");
    async_write_issued(e, fiber, shared, size, "cp.async");
  }
  poison(shared, size);
  fiber->open_copies.push_back({shared, global, bytes, valid});
}
void copy_async_commit() {
  const EngineScope scope;
  Fiber* fiber = engine()->current;
  fiber->copy_groups.push_back(std::move(fiber->open_copies));
  fiber->open_copies.clear();
}
void copy_async_wait(int pending, const Location&) {
  const EngineScope scope;
  Engine* e = engine();
  Fiber* fiber = e->current;
  while (static_cast<int>(fiber->copy_groups.size()) > pending) {
    for (const CopyAsync& copy : fiber->copy_groups.front()) {
      const auto size = static_cast<size_t>(copy.bytes);
      if (copy.valid) {
        std::memcpy(copy.shared, copy.global, size);
      } else {
        std::memset(copy.shared, 0, size);
      }
      if (e->race) async_write_landed(e, copy.shared, size, fiber, 0);
    }
    fiber->copy_groups.pop_front();
  }
}

// Tensor maps

void check_tensor_map(TensorMapData& m) {
  const auto reject = [](const char* why) { throw std::runtime_error(std::string("tensor map: ") + why); };
  const int inner_bytes = m.box[0] * m.element_bytes;
  if (m.base % 16 != 0) reject("the base address must be a multiple of 16");
  if (m.stride[0] != m.element_bytes) reject("the innermost dimension must be contiguous");
  if (inner_bytes == 0 || inner_bytes % 16 != 0) reject("the inner box must be a multiple of 16 bytes");
  if (m.swizzle_bytes != 0 && inner_bytes > m.swizzle_bytes) reject("the inner box is wider than the swizzle");
  for (int i = 0; i < m.rank; ++i) {
    if (m.shape[i] == 0 || m.shape[i] > uint64_t(1) << 32) reject("dimensions are 1 to 2^32");
    if (i > 0 && (m.stride[i] % 16 != 0 || m.stride[i] >= uint64_t(1) << 40)) {
      reject("strides must be multiples of 16 below 2^40");
    }
  }
  if (m.im2col != 0) {
    if (m.box[0] > 256 || m.box[1] == 0 || m.box[1] > 1024) reject("at most 256 channels and 1024 pixels");
    for (int i = 0; i < m.rank - 2; ++i) {
      if (m.traversal[i] < 1 || m.traversal[i] > 8) reject("traversal strides are 1 to 8");
      const int limit = 1 << (16 / (m.rank - 2) - 1);
      if (std::min(m.lower[i], m.upper[i]) < -limit || std::max(m.lower[i], m.upper[i]) >= limit)
        reject("a corner of the bounding box is out of range");
    }
  } else {
    for (int i = 0; i < m.rank; ++i) {
      if (m.box[i] < 1 || m.box[i] > 256) reject("box dimensions are 1 to 256");
    }
  }
  m.magic = map_magic;
}

size_t swizzled(size_t offset, int swizzle_bytes) {
  const size_t row_bits = swizzle_bytes == 128 ? 7 : swizzle_bytes == 64 ? 3 : swizzle_bytes == 32 ? 1 : 0;
  return offset ^ ((offset >> 7 & row_bits) << 4);
}

namespace {

size_t box_bytes(const TensorMapData& m) {
  size_t bytes = m.element_bytes;
  for (int i = 0; i < (m.im2col != 0 ? 2 : m.rank); ++i) bytes *= m.box[i];
  return bytes;
}

// Calls row(box_row, first element's address, first, last) for the part [first, last) of each innermost row that lies
// inside the tensor; rows entirely outside come with first == last.
template <class Row>
void for_each_row(const AsyncOperation& op, Row row) {
  const TensorMapData& m = op.map;
  const size_t row_bytes = size_t(m.box[0]) * m.element_bytes, rows = op.bytes / row_bytes;
  const int64_t inner = op.coordinates[0];
  const int64_t first = std::min<int64_t>(std::max<int64_t>(0, -inner), m.box[0]);
  const int64_t last = std::max<int64_t>(first, std::min<int64_t>(m.box[0], int64_t(m.shape[0]) - inner));
  int64_t pixel[5];
  for (int i = 0; i < 5; ++i) pixel[i] = i < m.rank ? op.coordinates[i] : 0;
  for (size_t r = 0; r < rows; ++r) {
    int64_t position[5];
    if (m.im2col != 0) {
      for (int i = 1; i < m.rank; ++i) position[i] = pixel[i] + (i + 1 < m.rank ? op.offsets[i - 1] : 0);
      // The next base pixel: a counter over the bounding box, which carries into the image index.
      int i = 1;
      for (; i + 1 < m.rank; ++i) {
        pixel[i] += m.traversal[i - 1];
        if (pixel[i] < int64_t(m.shape[i]) + m.upper[i - 1]) break;
        pixel[i] = m.lower[i - 1];
      }
      if (i + 1 == m.rank) ++pixel[i];
    } else {
      size_t rest = r;
      for (int i = 1; i < m.rank; ++i) {
        position[i] = op.coordinates[i] + static_cast<int64_t>(rest % m.box[i]);
        rest /= m.box[i];
      }
    }
    bool inside = true;
    int64_t offset = (inner + first) * m.element_bytes;
    for (int i = 1; i < m.rank; ++i) {
      inside = inside && position[i] >= 0 && position[i] < int64_t(m.shape[i]);
      offset += position[i] * int64_t(m.stride[i]);
    }
    inside = inside && first < last;
    row(r, inside ? reinterpret_cast<char*>(m.base) + offset : nullptr, inside ? first : 0, inside ? last : 0);
  }
}

char* shared_byte(const AsyncOperation& op, size_t box_offset) {
  const size_t start = static_cast<size_t>(op.shared - op.arena);
  return op.arena + swizzled(start + box_offset, op.map.swizzle_bytes);
}

void load_tensor(AsyncOperation& op) {
  const TensorMapData& m = op.map;
  const size_t row_bytes = size_t(m.box[0]) * m.element_bytes;
  std::vector<char> line(row_bytes);
  for_each_row(op, [&](size_t r, const char* global, int64_t first, int64_t last) {
    std::memset(line.data(), 0, row_bytes);
    if (global != nullptr) {
      std::memcpy(line.data() + first * m.element_bytes, global, static_cast<size_t>(last - first) * m.element_bytes);
    }
    for (size_t i = 0; i < row_bytes; i += 16) std::memcpy(shared_byte(op, r * row_bytes + i), line.data() + i, 16);
  });
}

void stage_store(AsyncOperation& op) {
  if (!op.staged.empty()) return;
  op.staged.resize(op.bytes);
  for (size_t i = 0; i < op.bytes; i += 16) {
    const char* source = op.kind == AsyncOperation::bulk_store ? op.shared + i : shared_byte(op, i);
    std::memcpy(op.staged.data() + i, source, 16);
  }
}

template <class T>
void add_elements(char* to, const char* from, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    T a, b;
    std::memcpy(&a, to + i * sizeof(T), sizeof(T));
    std::memcpy(&b, from + i * sizeof(T), sizeof(T));
    a = static_cast<T>(a + b);
    std::memcpy(to + i * sizeof(T), &a, sizeof(T));
  }
}

void add_row(const TensorMapData& m, char* to, const char* from, size_t count) {
  if (m.element_kind == kind_float && m.element_bytes == 4) {
    add_elements<float>(to, from, count);
  } else if (m.element_kind == kind_float) {
    add_elements<double>(to, from, count);
  } else if (m.element_kind == kind_integer && m.element_bytes == 4) {
    add_elements<uint32_t>(to, from, count);
  } else if (m.element_kind == kind_integer && m.element_bytes == 8) {
    add_elements<uint64_t>(to, from, count);
  } else if (m.element_kind == kind_bf16 || m.element_kind == kind_fp16) {
    for (size_t i = 0; i < count; ++i) add_half(to + 2 * i, from + 2 * i, m.element_kind == kind_bf16);
  } else {
    raise_error("tma_reduce_add: no addition for this element type");
  }
}

void store_tensor(AsyncOperation& op) {
  static std::mutex additions;  // of blocks on other host threads
  const TensorMapData& m = op.map;
  const size_t row_bytes = size_t(m.box[0]) * m.element_bytes;
  for_each_row(op, [&](size_t r, char* global, int64_t first, int64_t last) {
    if (global == nullptr) return;
    const char* source = op.staged.data() + r * row_bytes + static_cast<size_t>(first) * m.element_bytes;
    const auto count = static_cast<size_t>(last - first);
    if (op.kind == AsyncOperation::tensor_add) {
      const std::lock_guard lock(additions);
      add_row(m, global, source, count);
    } else {
      std::memcpy(global, source, count * m.element_bytes);
    }
  });
}

void run(Engine* e, AsyncOperation& op) {
  switch (op.kind) {
    case AsyncOperation::tensor_load:
      load_tensor(op);
      break;
    case AsyncOperation::bulk_load:
      std::memcpy(op.shared, op.global, op.bytes);
      break;
    case AsyncOperation::bulk_store:
      stage_store(op);
      std::memcpy(op.global, op.staged.data(), op.bytes);
      break;
    default:
      stage_store(op);
      store_tensor(op);
  }
  if (op.is_store()) return;
  if (e->race) async_write_landed(e, op.shared, op.bytes, nullptr, async_tick(e));
  complete_transaction(e, op.bar, op.bytes);
}

AsyncOperation operation(AsyncOperation::Kind kind, const Location& location) {
  Engine* e = engine();
  require_hopper("TMA", location);
  AsyncOperation op{};
  op.kind = kind;
  op.issuer = e->current;
  op.location = location;
  op.arena = e->current->block->arena;
  return op;
}

AsyncOperation tensor_operation(AsyncOperation::Kind kind, const char* what, const void* map, const void* shared,
                                int rank, const int* coordinates, const Location& location) {
  AsyncOperation op = operation(kind, location);
  std::memcpy(&op.map, map, sizeof op.map);
  if (op.map.magic != map_magic || op.map.rank != rank) misuse(what, location, "not a tensor map of that rank");
  for (int i = 0; i < rank; ++i) op.coordinates[i] = coordinates[i];
  // the hardware calls this an illegal instruction
  if (int64_t(coordinates[0]) * op.map.element_bytes % 16 != 0)
    misuse(what, location, "the innermost coordinate must be a multiple of 16 bytes");
  op.shared = static_cast<char*>(const_cast<void*>(shared));
  op.bytes = box_bytes(op.map);
  // 128 bytes always; with a swizzle the pattern must start at its first row, or TMA and wgmma would disagree on it.
  const size_t alignment = op.map.swizzle_bytes == 0 ? 128 : size_t(op.map.swizzle_bytes) * 8;
  check_shared(shared, op.bytes, alignment, what, &location);
  return op;
}

void issue_store(AsyncOperation op, const char* what) {
  Engine* e = engine();
  op.id = e->next_async_id++;
  if (e->race) {
    op.time = async_tick(e);
    async_read(e, e->current, op.shared, op.bytes, op.time, true, what);
    if (op.kind == AsyncOperation::bulk_store) {
      check_access(e, e->current, op.global, op.bytes, true, nullptr, what);
    } else {
      for_each_row(op, [&](size_t, char* global, int64_t first, int64_t last) {
        if (global == nullptr) return;
        const size_t bytes = static_cast<size_t>(last - first) * op.map.element_bytes;
        if (op.kind == AsyncOperation::tensor_add) {
          check_atomic(e, e->current, global, bytes, true, op.location);
        } else {
          check_access(e, e->current, global, bytes, true, nullptr, what);
        }
      });
    }
  }
  e->current->open_bulk.push_back(op.id);
  e->async_operations.push_back(std::move(op));
}

void issue_load(AsyncOperation op, const char* what) {
  Engine* e = engine();
  op.id = e->next_async_id++;
  if (e->race) async_write_issued(e, e->current, op.shared, op.bytes, what);
  poison(op.shared, op.bytes);
  e->async_operations.push_back(std::move(op));
}

}  // namespace

void tensor_load(void* shared, const void* map, uint64_t* bar, int rank, const int* coordinates,
                 const uint16_t* offsets, bool multicast, uint16_t cta_mask, const Location& location) {
  const EngineScope scope;
  Engine* e = engine();
  AsyncOperation op =
      tensor_operation(AsyncOperation::tensor_load, "TMA load", map, shared, rank, coordinates, location);
  if ((op.map.im2col != 0) != (offsets != nullptr)) {
    misuse("TMA load", location, "tiled and im2col maps need their own load function");
  }
  for (int i = 0; offsets != nullptr && i < rank - 2; ++i) {
    if (offsets[i] >> (16 / (rank - 2)) != 0) misuse("TMA load", location, "an im2col offset is out of range");
    op.offsets[i] = offsets[i];
  }
  if (multicast && cta_mask >> e->cluster_blocks != 0) misuse("TMA load", location, "multicast beyond the cluster");
  if (e->race) {
    for_each_row(op, [&](size_t, const char* global, int64_t first, int64_t last) {
      if (global == nullptr) return;
      check_access(e, e->current, global, static_cast<size_t>(last - first) * op.map.element_bytes, false, nullptr,
                   "TMA load");
    });
  }
  for (unsigned r = 0; r < static_cast<unsigned>(e->cluster_blocks); ++r) {
    if (multicast ? (cta_mask >> r & 1) == 0 : &e->in_cluster(*e->current->block, r) != e->current->block) continue;
    AsyncOperation copy = op;
    copy.arena = e->in_cluster(*e->current->block, r).arena;
    copy.shared = static_cast<char*>(map_shared(shared, r, location));
    copy.bar = static_cast<uint64_t*>(map_shared(bar, r, location));
    if (e->mbarriers.count(copy.bar) == 0) misuse("TMA load", location, "the mbarrier is not initialised");
    issue_load(std::move(copy), "TMA load");
  }
}

void tensor_store(const void* map, const void* shared, int rank, const int* coordinates, bool add,
                  const Location& location) {
  const EngineScope scope;
  const char* what = add ? "TMA reduce" : "TMA store";
  AsyncOperation op = tensor_operation(add ? AsyncOperation::tensor_add : AsyncOperation::tensor_store, what, map,
                                       shared, rank, coordinates, location);
  if (op.map.im2col != 0) misuse(what, location, "im2col maps are for loads");
  issue_store(std::move(op), what);
}

void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* bar, const Location& location) {
  const EngineScope scope;
  Engine* e = engine();
  if (bytes == 0 || bytes % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    misuse("bulk_load", location, "size and addresses must be multiples of 16");
  }
  check_shared(shared, bytes, 16, "bulk_load", &location);
  if (e->mbarriers.count(bar) == 0) misuse("bulk_load", location, "the mbarrier is not initialised");
  if (e->race) check_access(e, e->current, global, bytes, false, nullptr, "bulk_load");
  AsyncOperation op = operation(AsyncOperation::bulk_load, location);
  op.shared = static_cast<char*>(shared);
  op.global = static_cast<char*>(const_cast<void*>(global));
  op.bytes = bytes;
  op.bar = bar;
  issue_load(std::move(op), "bulk_load");
}

void bulk_store(void* global, const void* shared, uint32_t bytes, const Location& location) {
  const EngineScope scope;
  if (bytes == 0 || bytes % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    misuse("bulk_store", location, "size and addresses must be multiples of 16");
  }
  check_shared(shared, bytes, 16, "bulk_store", &location);
  AsyncOperation op = operation(AsyncOperation::bulk_store, location);
  op.shared = static_cast<char*>(const_cast<void*>(shared));
  op.global = static_cast<char*>(global);
  op.bytes = bytes;
  issue_store(std::move(op), "bulk_store");
}

void bulk_commit() {
  const EngineScope scope;
  Fiber* fiber = engine()->current;
  fiber->bulk_groups.push_back(std::move(fiber->open_bulk));
  fiber->open_bulk.clear();
}

void bulk_wait(int pending, bool read_only, const Location&) {
  const EngineScope scope;
  Engine* e = engine();
  Fiber* fiber = e->current;
  const auto groups = static_cast<int>(fiber->bulk_groups.size());
  for (int g = 0; g < groups - pending; ++g) {
    for (const int id : fiber->bulk_groups[static_cast<size_t>(g)]) {
      for (auto op = e->async_operations.begin(); op != e->async_operations.end(); ++op) {
        if (op->id != id) continue;
        fiber->async_seen = std::max(fiber->async_seen, op->time);
        if (read_only) {
          stage_store(*op);
        } else {
          run(e, *op);
          e->async_operations.erase(op);
        }
        break;
      }
    }
  }
  if (read_only) return;
  for (int g = 0; g < groups - pending; ++g) fiber->bulk_groups.pop_front();
}

bool run_async_operation(Engine* e) {
  // Stores of other threads may wait for ever; loads are what a waiting thread can depend on.
  std::vector<size_t> loads;
  for (size_t i = 0; i < e->async_operations.size(); ++i) {
    if (e->async_operations[i].is_store()) continue;
    loads.push_back(i);
    if (e->schedule != Schedule::random) break;
  }
  if (loads.empty()) return false;
  const size_t chosen = loads[loads.size() > 1 ? e->random() % loads.size() : 0];
  AsyncOperation op = std::move(e->async_operations[chosen]);
  e->async_operations.erase(e->async_operations.begin() + static_cast<ptrdiff_t>(chosen));
  run(e, op);
  return true;
}

// What is left when the gang has ended. Global writes complete by themselves; shared memory may no longer be touched.
void finish_async_operations(Engine* e) {
  while (!e->async_operations.empty()) {
    AsyncOperation op = std::move(e->async_operations.front());
    e->async_operations.pop_front();
    if (enabled(Detector::async_wait) && !(op.is_store() && !op.staged.empty())) {
      raise_error(std::string(op.is_store() ? "bulk or TMA store" : "bulk or TMA load") + " at " + where(op.location) +
                  ": never waited for, its block has exited");
    }
    if (op.is_store()) run(e, op);
  }
}

void check_nothing_outstanding(Fiber* fiber) {
  if (!enabled(Detector::async_wait)) return;
  if (!fiber->open_copies.empty() || !fiber->copy_groups.empty()) {
    for (const auto& group : fiber->copy_groups) {
      if (!group.empty()) raise_error("cp.async still outstanding when its thread exits; " + describe(fiber));
    }
    if (!fiber->open_copies.empty()) raise_error("cp.async never committed; " + describe(fiber));
  }
  if (!fiber->open_products.empty() || !fiber->product_groups.empty()) {
    raise_error("wgmma still outstanding when its thread exits; " + describe(fiber));
  }
}

}  // namespace pyops::emulator
