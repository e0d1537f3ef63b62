// Race mode: vector clocks, shadow memory, and the checks of every access a kernel makes.
#pragma once

#include "emulator/engine.h"

namespace pyops::emulator {

// Clocks. All are no-ops outside race mode.
void clocks_start(Engine* e);
void order_all(Engine* e, Fiber* const* fibers, size_t count);  // each happens before what follows in every other
void release(Engine* e, Clock& sync, Fiber* fiber);
void acquire(Engine* e, Fiber* fiber, const Clock& sync);
uint32_t async_tick(Engine* e);  // a new time of the asynchronous units
void release_async(Engine* e, Clock& sync, uint32_t time);

// Accesses. `what` names the primitive, pc the instruction; either may be null.
void check_access(Engine* e, Fiber* fiber, const void* p, size_t bytes, bool write, const void* pc, const char* what);
void check_atomic(Engine* e, Fiber* fiber, const void* p, size_t bytes, bool writes, const Location& location);
// Asynchronous operations: the issuing fiber must be ordered after earlier writes, and generic-proxy writes be fenced.
void async_read(Engine* e, Fiber* issuer, const void* p, size_t bytes, uint32_t time, bool other_proxy,
                const char* what);
void async_write_issued(Engine* e, Fiber* issuer, const void* p, size_t bytes, const char* what);
void async_write_landed(Engine* e, const void* p, size_t bytes, Fiber* owner, uint32_t time);

// A block may end only after the others of its cluster have finished with its shared memory.
void check_remote_accesses(Engine* e, Fiber* exiting);

// The ranges of the calling host thread (memory.cpp).
std::vector<Range>& ranges();
bool any_range_registered();

}  // namespace pyops::emulator
