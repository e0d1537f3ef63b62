// Fibers: a stack each, and a switch between them.
#pragma once

#include <cstddef>

namespace pyops::emulator {

// A stack as AddressSanitizer has to know it; `fake` is its own, while the stack is not the running one.
struct StackBounds {
  const void* bottom = nullptr;
  size_t bytes = 0;
  void* fake = nullptr;
};

// Leaves the running stack for another, and returns when somebody switches back. from: null where nobody will.
void switch_stacks(void** save_stack_pointer, void* stack_pointer, StackBounds* from, const StackBounds& to);
// First thing on a new stack; gives the bounds of the one it was entered from.
void entered_stack(StackBounds& from);
// Memory that a kernel must not touch (AddressSanitizer build only).
void forbid(const void* p, size_t bytes);
void allow(const void* p, size_t bytes);

// count stacks, `stride` apart, with a guard below each; in one mapping where asked for and the kernel can, else two each.
char* map_stacks(size_t bytes, size_t stride, size_t guard_bytes, size_t count, bool in_one_mapping);
void unmap_stacks(char* stacks, size_t bytes);
// Prepares a stack on which the first switch enters `entry`.
void* initial_stack_pointer(char* stack_end, void (*entry)());

}  // namespace pyops::emulator
