#include "common/workspace.h"

#include <atomic>
#include <cstdlib>
#include <new>
#include <vector>

namespace pyops::workspace {
namespace {

constexpr size_t line = 64, page = 4096;

// The line in front of a block.
struct alignas(line) Header {
  size_t bytes;
};

std::atomic<unsigned> releases{0};

// The blocks that a thread does not use now, the oldest first.
class Kept {
 public:
  ~Kept() { shrink(0); }

  // The smallest that fits, unless most of it would lie idle.
  Header* take(size_t bytes) {
    obey();
    size_t best = blocks_.size();
    for (size_t i = blocks_.size(); i-- > 0;)
      if (blocks_[i]->bytes >= bytes && (best == blocks_.size() || blocks_[i]->bytes < blocks_[best]->bytes)) best = i;
    if (best == blocks_.size() || blocks_[best]->bytes > 2 * bytes + (1 << 20)) return nullptr;
    Header* found = blocks_[best];
    blocks_.erase(blocks_.begin() + ptrdiff_t(best));
    sum_ -= found->bytes;
    return found;
  }
  void keep(Header* block) {
    obey();
    if (block->bytes > most_kept_bytes) return std::free(block);
    shrink(most_kept_bytes - block->bytes);
    blocks_.push_back(block);
    sum_ += block->bytes;
  }
  void obey() {
    const unsigned now = releases.load(std::memory_order_relaxed);
    if (now != seen_) shrink(0);
    seen_ = now;
  }

 private:
  void shrink(size_t most) {
    size_t gone = 0;
    for (; sum_ > most; ++gone) {
      sum_ -= blocks_[gone]->bytes;
      std::free(blocks_[gone]);
    }
    blocks_.erase(blocks_.begin(), blocks_.begin() + ptrdiff_t(gone));
  }

  std::vector<Header*> blocks_;
  size_t sum_ = 0;
  unsigned seen_ = 0;
};

thread_local Kept kept;

#if defined(__SANITIZE_ADDRESS__)
constexpr bool keeps = false;  // it sees the use of memory that was freed
#else
constexpr bool keeps = true;
#endif

}  // namespace

void* take(size_t bytes) {
  if (keeps && bytes >= least_bytes)
    if (Header* found = kept.take(bytes)) return found + 1;
  const size_t rounded =
      keeps && bytes >= least_bytes ? (bytes + page - 1) / page * page : (bytes + line - 1) / line * line;
  auto* block = static_cast<Header*>(std::aligned_alloc(line, sizeof(Header) + rounded));
  if (block == nullptr) throw std::bad_alloc();
  block->bytes = rounded;
  return block + 1;
}

void give_back(void* p) {
  Header* block = static_cast<Header*>(p) - 1;
  if (keeps && block->bytes >= least_bytes)
    kept.keep(block);
  else
    std::free(block);
}

}  // namespace pyops::workspace

// Frees what this thread keeps at once, and what another keeps when it needs a workspace next.
extern "C" __attribute__((visibility("default"))) void pyops_release_workspace() {
  pyops::workspace::releases.fetch_add(1, std::memory_order_relaxed);
  pyops::workspace::kept.obey();
}
