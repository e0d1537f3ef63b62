// What instrumented kernels call: the compiler's thread-sanitizer and undefined-behaviour hooks, implemented here
// instead of by the sanitizers' own run-time libraries. Accesses are looked at in race mode only, their alignment and
// indices of member arrays always.
#include "emulator/race.h"

namespace pyops::emulator {
namespace {

inline void on_access(const void* p, size_t bytes, bool write, const void* pc) {
  Engine* e = engine();
  if (e == nullptr || !e->race || e->current == nullptr || e->current->engine_depth > 0) return;
  const EngineScope scope;
  check_access(e, e->current, p, bytes, write, pc, nullptr);
}

// Layouts of the compiler's descriptions (ABI of the undefined-behaviour sanitizer).
struct SourcePlace {
  const char* file;
  uint32_t line, column;
};
struct OutOfBounds {
  SourcePlace place;
  const void *array_type, *index_type;
};
struct TypeDescriptor {
  uint16_t kind, info;
  char name[1];
};

std::string text(const SourcePlace& place, const void* pc) {
  const std::string file = place.file != nullptr ? place.file : "?";
  if (file.find("cuda/device/") != std::string::npos || file.find("/emulator/") != std::string::npos) {
    return locate(pc);
  }
  const size_t slash = file.rfind('/');
  return " at " + (slash == std::string::npos ? file : file.substr(slash + 1)) + ":" + std::to_string(place.line);
}

[[gnu::cold]] void misaligned_access(const void* p, size_t alignment, const void* pc) {
  const Engine* e = engine();
  if (e == nullptr || e->current == nullptr || !enabled(Detector::alignment)) return;
  const EngineScope scope;
  raise_error("misaligned access (address ends in " + std::to_string(reinterpret_cast<uintptr_t>(p) % 64) +
              ", needs a multiple of " + std::to_string(alignment) + ")" + locate(pc) + "; " + describe(e->current));
}
// The compiler calls __tsan_read<n> and __tsan_write<n> where the type promises a multiple of n.
inline void on_aligned_access(const void* p, size_t bytes, bool write, const void* pc) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) misaligned_access(p, bytes, pc);
  on_access(p, bytes, write, pc);
}

void out_of_bounds(const OutOfBounds* data, uintptr_t index, const void* pc) {
  const Engine* e = engine();
  if (e == nullptr || e->current == nullptr || !enabled(Detector::bounds)) return;
  const EngineScope scope;
  const std::string type = static_cast<const TypeDescriptor*>(data->array_type)->name;
  raise_error("index " + std::to_string(static_cast<int64_t>(index)) + " is outside an array of type " + type +
              text(data->place, pc) + "; " + describe(e->current));
}

}  // namespace

#define PYOPS_PC __builtin_return_address(0)

void misaligned(const void* p, size_t alignment) { misaligned_access(p, alignment, PYOPS_PC); }
}  // namespace pyops::emulator

using pyops::emulator::on_access, pyops::emulator::on_aligned_access;

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

#define PYOPS_ACCESS(SIZE)                                                                  \
  void __tsan_read##SIZE(void* p) { on_aligned_access(p, SIZE, false, PYOPS_PC); }          \
  void __tsan_write##SIZE(void* p) { on_aligned_access(p, SIZE, true, PYOPS_PC); }          \
  void __tsan_unaligned_read##SIZE(void* p) { on_access(p, SIZE, false, PYOPS_PC); }        \
  void __tsan_unaligned_write##SIZE(void* p) { on_access(p, SIZE, true, PYOPS_PC); }        \
  void __tsan_volatile_read##SIZE(void* p) { on_aligned_access(p, SIZE, false, PYOPS_PC); } \
  void __tsan_volatile_write##SIZE(void* p) { on_aligned_access(p, SIZE, true, PYOPS_PC); }
PYOPS_ACCESS(1)
PYOPS_ACCESS(2)
PYOPS_ACCESS(4)
PYOPS_ACCESS(8)
PYOPS_ACCESS(16)
void __tsan_read_range(void* p, size_t bytes) { on_access(p, bytes, false, PYOPS_PC); }
void __tsan_write_range(void* p, size_t bytes) { on_access(p, bytes, true, PYOPS_PC); }

// The vocabulary announces its atomics to the engine itself; these perform the operation only.
#define PYOPS_ATOMIC_HOOKS(BITS, T)                                                                                 \
  T __tsan_atomic##BITS##_load(const volatile T* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }           \
  void __tsan_atomic##BITS##_store(volatile T* p, T v, int) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }           \
  T __tsan_atomic##BITS##_exchange(volatile T* p, T v, int) { return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST); } \
  T __tsan_atomic##BITS##_fetch_add(volatile T* p, T v, int) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); } \
  T __tsan_atomic##BITS##_fetch_sub(volatile T* p, T v, int) { return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST); } \
  T __tsan_atomic##BITS##_fetch_and(volatile T* p, T v, int) { return __atomic_fetch_and(p, v, __ATOMIC_SEQ_CST); } \
  T __tsan_atomic##BITS##_fetch_or(volatile T* p, T v, int) { return __atomic_fetch_or(p, v, __ATOMIC_SEQ_CST); }   \
  T __tsan_atomic##BITS##_fetch_xor(volatile T* p, T v, int) { return __atomic_fetch_xor(p, v, __ATOMIC_SEQ_CST); } \
  int __tsan_atomic##BITS##_compare_exchange_strong(volatile T* p, T* expected, T v, int, int) {                    \
    return __atomic_compare_exchange_n(p, expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                  \
  }                                                                                                                 \
  int __tsan_atomic##BITS##_compare_exchange_weak(volatile T* p, T* expected, T v, int, int) {                      \
    return __atomic_compare_exchange_n(p, expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                  \
  }                                                                                                                 \
  T __tsan_atomic##BITS##_compare_exchange_val(volatile T* p, T expected, T v, int, int) {                          \
    __atomic_compare_exchange_n(p, &expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                        \
    return expected;                                                                                                \
  }
PYOPS_ATOMIC_HOOKS(8, uint8_t)
PYOPS_ATOMIC_HOOKS(16, uint16_t)
PYOPS_ATOMIC_HOOKS(32, uint32_t)
PYOPS_ATOMIC_HOOKS(64, uint64_t)
void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
void __tsan_atomic_signal_fence(int) {}

void __ubsan_handle_out_of_bounds(void* data, uintptr_t index) {
  pyops::emulator::out_of_bounds(static_cast<pyops::emulator::OutOfBounds*>(data), index, PYOPS_PC);
}

}  // extern "C"
