// Fibers: a stack each, and a switch between them.
#pragma once

#include <cstddef>

namespace pyops::emulator {

extern "C" void pyops_fiber_switch(void** save_stack_pointer, void* stack_pointer);

char* map_stacks(size_t bytes, size_t stride, size_t guard_bytes, size_t count);
void unmap_stacks(char* stacks, size_t bytes);
// Prepares a stack on which the first switch enters `entry`.
void* initial_stack_pointer(char* stack_end, void (*entry)());

}  // namespace pyops::emulator
