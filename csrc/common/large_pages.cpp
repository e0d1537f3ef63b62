// Large pages for large outputs. Where malloc has just mapped the memory, the first write to a page of 4 KiB costs a
// fault, and every later pass a TLB entry for each page; one page of 2 MiB replaces 512 of both. A hint only: what the
// system does not offer stays as it was.
#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "common/tensor.h"

namespace pyops::detail {

void prefer_large_pages(void* p, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 4096;
  const uintptr_t first = reinterpret_cast<uintptr_t>(p) & ~(page - 1);
  const uintptr_t last = (reinterpret_cast<uintptr_t>(p) + bytes + page - 1) & ~(page - 1);
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)p, (void)bytes;
#endif
}

}  // namespace pyops::detail
