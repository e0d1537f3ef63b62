#include "emulator/fiber.h"

#include <sys/mman.h>

#include <cstdio>
#include <new>
#include <stdexcept>
#include <string>

// The sanitizer follows kernels from stack to stack; the engine itself is not instrumented.
#if defined(PYOPS_EMULATOR_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__)
#error "the fiber switch is written for x86-64; write its counterpart for this processor here"
#endif

// Saves the registers a call must preserve (System V ABI), swaps stacks, restores the other side's.
asm(R"(
.text
.globl pyops_fiber_switch
.hidden pyops_fiber_switch
.type pyops_fiber_switch,@function
pyops_fiber_switch:
  .cfi_startproc
  pushq %rbp
  .cfi_adjust_cfa_offset 8
  pushq %rbx
  .cfi_adjust_cfa_offset 8
  pushq %r12
  .cfi_adjust_cfa_offset 8
  pushq %r13
  .cfi_adjust_cfa_offset 8
  pushq %r14
  .cfi_adjust_cfa_offset 8
  pushq %r15
  .cfi_adjust_cfa_offset 8
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  .cfi_adjust_cfa_offset -8
  popq %r14
  .cfi_adjust_cfa_offset -8
  popq %r13
  .cfi_adjust_cfa_offset -8
  popq %r12
  .cfi_adjust_cfa_offset -8
  popq %rbx
  .cfi_adjust_cfa_offset -8
  popq %rbp
  .cfi_adjust_cfa_offset -8
  ret
  .cfi_endproc
.size pyops_fiber_switch,.-pyops_fiber_switch
)");

extern "C" void pyops_fiber_switch(void** save_stack_pointer, void* stack_pointer);

namespace pyops::emulator {

#if defined(PYOPS_EMULATOR_ASAN)
void switch_stacks(void** save_stack_pointer, void* stack_pointer, StackBounds* from, const StackBounds& to) {
  __sanitizer_start_switch_fiber(from != nullptr ? &from->fake : nullptr, to.bottom, to.bytes);
  pyops_fiber_switch(save_stack_pointer, stack_pointer);
  __sanitizer_finish_switch_fiber(from->fake, nullptr, nullptr);
}
void entered_stack(StackBounds& from) { __sanitizer_finish_switch_fiber(nullptr, &from.bottom, &from.bytes); }
void forbid(const void* p, size_t bytes) { __asan_poison_memory_region(p, bytes); }
void allow(const void* p, size_t bytes) { __asan_unpoison_memory_region(p, bytes); }
#else
void switch_stacks(void** save_stack_pointer, void* stack_pointer, StackBounds*, const StackBounds&) {
  pyops_fiber_switch(save_stack_pointer, stack_pointer);
}
void entered_stack(StackBounds&) {}
void forbid(const void*, size_t) {}
void allow(const void*, size_t) {}
#endif

namespace {

// Linux 6.13 and later forbid pages within one mapping; the C library's headers may be older than that.
constexpr int madv_guard_install = 102;
// Mappings left to the rest of the process where stacks take two each.
constexpr size_t other_mappings = 2048;

size_t mappings_of_a_process() {
  size_t limit = 65530;  // the kernel's default
  if (FILE* file = std::fopen("/proc/sys/vm/max_map_count", "r")) {
    if (std::fscanf(file, "%zu", &limit) != 1) limit = 65530;
    std::fclose(file);
  }
  return limit;
}

// Where the kernel only protects whole mappings, each stack and each guard page becomes one.
void split_into_mappings(char* stacks, size_t stride, size_t guard_bytes, size_t count) {
  const size_t limit = mappings_of_a_process();
  bool done = 2 * count + other_mappings <= limit;
  for (size_t i = 0; done && i < count; ++i) done = mprotect(stacks + i * stride, guard_bytes, PROT_NONE) == 0;
  if (done) return;
  throw std::runtime_error("the stacks of " + std::to_string(count) + " threads at a time need " +
                           std::to_string(2 * count) + " mappings of memory, and vm.max_map_count allows a process " +
                           std::to_string(limit) + ": raise it (sysctl), emulate fewer multiprocessors " +
                           "(PYOPS_EMULATOR_MULTIPROCESSORS), or take Linux 6.13 or later, which needs one for all");
}

}  // namespace

// Untouched pages cost nothing, so every fiber gets a full stride; the page below each stack stops an overflow.
char* map_stacks(size_t bytes, size_t stride, size_t guard_bytes, size_t count, bool in_one_mapping) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  auto* stacks = static_cast<char*>(memory);
  bool done = in_one_mapping;
  for (size_t i = 0; done && i < count; ++i) done = madvise(stacks + i * stride, guard_bytes, madv_guard_install) == 0;
  try {
    if (!done) split_into_mappings(stacks, stride, guard_bytes, count);
  } catch (...) {
    unmap_stacks(stacks, bytes);
    throw;
  }
  return stacks;
}

void unmap_stacks(char* stacks, size_t bytes) {
  if (stacks != nullptr) munmap(stacks, bytes);
}

void* initial_stack_pointer(char* stack_end, void (*entry)()) {
  auto** sp = reinterpret_cast<void**>(stack_end);
  *--sp = nullptr;  // entry never returns; a null return address ends backtraces
  *--sp = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  return sp;
}

}  // namespace pyops::emulator
