// What kernels compiled for the CPU call in the engine. Every call that can fail or wait takes its source location.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>

namespace pyops::emulator {

using Location = std::source_location;

struct Extent {
  unsigned x, y, z;
  int64_t volume() const { return int64_t(x) * y * z; }
};

struct Launch {
  Extent grid, block, cluster;
  size_t shared_bytes;
  bool cooperative;
  const char* kernel;
  void (*body)(const void* parameters);
  const void* parameters;
  size_t parameter_bytes;
};
void launch_grid(const Launch& launch);
int multiprocessor_count();
int compute_capability();
int shared_memory_limit();
int l2_cache_bytes();
// Fails where the emulated device is older than sm_90.
void require_hopper(const char* what, const Location& location);
int resident_blocks();  // of one multiprocessor, for cooperative launches

[[noreturn]] void fail(const char* what, const Location& location);
// Fails at its caller's place, unless the detector is silenced.
void misaligned(const void* p, size_t alignment);

// Warp collectives: each lane hands in an operand and a place for its result, the last to arrive works for all.
struct Lane {
  const void* in;
  void* out;
  uint64_t argument;
  uint32_t size;
};
struct WarpOp {
  const char* name;
  void (*run)(Lane* lanes, unsigned mask);
  bool orders_memory;
};
extern const WarpOp warp_sync, shuffle_index, shuffle_xor, shuffle_up, shuffle_down, ballot, match_any, reduce_add,
    reduce_min, reduce_max, reduce_and, reduce_or, reduce_xor, load_matrix, load_matrix_transposed, store_matrix,
    store_matrix_transposed, mma_bf16, mma_fp16, mma_tf32;
void warp_collective(const WarpOp& op, unsigned mask, const void* in, void* out, uint32_t size, uint64_t argument,
                     const Location& location);
unsigned active_mask();
struct MmaOperands {
  const uint32_t* a;
  const uint32_t* b;
  const float* c;
};

// Barriers
enum class Vote { none, count, all, any };
int block_barrier(Vote vote, int predicate, const Location& location);
void named_barrier(int id, int threads, bool wait, const Location& location);
void cluster_barrier_arrive(const Location& location);
void cluster_barrier_wait(const Location& location);
void grid_barrier(unsigned* counter, const Location& location);
unsigned cluster_rank();
unsigned cluster_size();

// Shared memory
void* shared_arena(size_t bytes, size_t alignment, const Location& location);
uint32_t shared_offset(const void* p);
void* map_shared(const void* p, unsigned rank, const Location& location);

// Memory order. An atomic is announced before the engine lets the caller perform it.
enum class Order { relaxed, acquire, release, acquire_release };
void announce_atomic(const void* p, size_t bytes, bool writes, Order order, const Location& location);
void memory_fence();
void spin(const Location& location);

// cp.async
void copy_async(void* shared, const void* global, int bytes, bool valid, const Location& location);
void copy_async_commit();
void copy_async_wait(int pending, const Location& location);

// mbarriers
void mbarrier_init(uint64_t* bar, uint32_t count, const Location& location);
void mbarrier_arrive(uint64_t* bar, uint32_t expected_bytes, const Location& location);
bool mbarrier_test(uint64_t* bar, uint32_t parity, const Location& location);
void mbarrier_wait(uint64_t* bar, uint32_t parity, const Location& location);
void proxy_fence();

// TMA. The map's 128 bytes hold a TensorMapData.
struct TensorMapData {
  uint64_t base;
  uint64_t shape[5];
  uint64_t stride[5];  // bytes
  uint16_t box[5];     // tiled: elements per dimension; im2col: box[0] channels, box[1] pixels
  int16_t lower[3], upper[3];
  uint8_t traversal[3];
  uint8_t rank, element_bytes, swizzle_bytes, element_kind, im2col;
  uint16_t magic;
};
enum ElementKind : uint8_t { kind_float, kind_bf16, kind_fp16, kind_integer };
static_assert(sizeof(TensorMapData) <= 128);
void check_tensor_map(TensorMapData& map);
void tensor_load(void* shared, const void* map, uint64_t* bar, int rank, const int* coordinates,
                 const uint16_t* offsets, bool multicast, uint16_t cta_mask, const Location& location);
void tensor_store(const void* map, const void* shared, int rank, const int* coordinates, bool add,
                  const Location& location);
void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* bar, const Location& location);
void bulk_store(void* global, const void* shared, uint32_t bytes, const Location& location);
void bulk_commit();
void bulk_wait(int pending, bool read_only, const Location& location);

// wgmma
struct WgmmaIssue {
  float* accumulator;
  int columns;
  uint64_t descriptor_a, descriptor_b;
  const uint32_t* registers_a;  // null: A is in shared memory
  bool accumulate, a_mn_major, b_mn_major, is_bf16;
};
void set_registers(int per_thread, const Location& location);
void wgmma_fence(const Location& location);
void wgmma_issue(const WgmmaIssue& issue, const Location& location);
void wgmma_commit();
void wgmma_wait(int pending, const Location& location);

}  // namespace pyops::emulator
