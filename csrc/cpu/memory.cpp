#include "memory.h"

#include <sys/mman.h>

#include <cstdlib>
#include <mutex>
#include <new>
#include <utility>

namespace fusedrnn {
namespace {

constexpr size_t huge = size_t{1} << 21;
constexpr size_t largest_spare = size_t{64} << 20;

// The block that the last call left. Fresh pages cost a fault each and must be zeroed by the system: 2% of a training
// step of LSTM 100,32,512,512. Locks are only tried: a child forked while another thread held one goes without.
struct {
  std::mutex mutex;
  Memory block;
} spare;

}  // namespace

Memory allocate(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, bytes >= 2 * huge ? huge : 64, bytes ? bytes : 64) != 0) throw std::bad_alloc();
  prefer_huge_pages(memory, bytes);
  return {static_cast<char*>(memory), bytes};
}

void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + huge - 1) / huge * huge;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + bytes) / huge * huge;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

Workspace::Workspace(size_t bytes) {
  if (const std::unique_lock<std::mutex> lock(spare.mutex, std::try_to_lock); lock)
    block_ = std::exchange(spare.block, {});
  if (block_.bytes >= bytes && block_.data) return;
  std::free(block_.data);
  block_ = {};
  block_ = allocate(bytes);
}

Workspace::~Workspace() {
  if (block_.bytes <= largest_spare)
    if (const std::unique_lock<std::mutex> lock(spare.mutex, std::try_to_lock); lock) std::swap(spare.block, block_);
  std::free(block_.data);
}

}  // namespace fusedrnn
