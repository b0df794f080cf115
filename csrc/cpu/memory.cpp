#include "memory.h"

#include <sys/mman.h>

#include <cstdlib>
#include <mutex>
#include <new>
#include <utility>

namespace fusedrnn {
namespace {

constexpr size_t huge = size_t{1} << 21;
constexpr size_t least_kept = size_t{1} << 18;  // the C library keeps smaller ones itself
constexpr int places = 16;

// Released blocks, the newest first. Locks are only tried: a child forked while another thread held one goes without.
// Without destructors, for tensors may outlive them.
struct {
  std::mutex mutex;
  Memory blocks[places];
  int count = 0;
  size_t bytes = 0;
} kept;

// Needs the lock.
Memory remove(int place) {
  const Memory block = kept.blocks[place];
  for (--kept.count; place < kept.count; ++place) kept.blocks[place] = kept.blocks[place + 1];
  kept.bytes -= block.bytes;
  return block;
}

// The smallest kept block that has the bytes, but not more than twice as many. Needs the lock.
Memory find(size_t bytes) {
  int best = -1;
  for (int k = 0; k < kept.count; ++k) {
    const size_t has = kept.blocks[k].bytes;
    if (has >= bytes && has / 2 <= bytes && (best < 0 || has < kept.blocks[best].bytes)) best = k;
  }
  return best < 0 ? Memory{} : remove(best);
}

}  // namespace

Memory allocate(size_t bytes) {
  if (bytes >= least_kept)
    if (const std::unique_lock<std::mutex> lock(kept.mutex, std::try_to_lock); lock)
      if (const Memory block = find(bytes); block.data) return block;
  void* memory = nullptr;
  if (posix_memalign(&memory, bytes >= 2 * huge ? huge : 64, bytes ? bytes : 64) != 0) throw std::bad_alloc();
  prefer_huge_pages(memory, bytes);
  return {static_cast<char*>(memory), bytes};
}

void release(Memory block) {
  if (block.bytes >= least_kept && block.bytes <= kept_limit())
    if (const std::unique_lock<std::mutex> lock(kept.mutex, std::try_to_lock); lock) {
      while (kept.count == places || kept.bytes + block.bytes > kept_limit()) std::free(remove(kept.count - 1).data);
      for (int k = kept.count++; k > 0; --k) kept.blocks[k] = kept.blocks[k - 1];
      kept.blocks[0] = std::exchange(block, {});
      kept.bytes += kept.blocks[0].bytes;
    }
  std::free(block.data);
}

size_t kept_limit() {
  static const size_t bytes = [] {
    const char* megabytes = std::getenv("FUSEDRNN_KEPT_MB");
    return static_cast<size_t>(megabytes ? std::strtoull(megabytes, nullptr, 10) : 256) << 20;
  }();
  return bytes;
}

void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + huge - 1) / huge * huge;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + bytes) / huge * huge;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace fusedrnn
