#include "memory.h"

#include <sys/mman.h>

#include <cstdlib>
#include <new>

namespace fusedrnn {

Workspace::Workspace(size_t bytes) : data_(nullptr) {
  // Large blocks come fresh from the system at every call: in huge pages that is one fault in place of 512.
  constexpr size_t huge = size_t{1} << 21;
  const bool large = bytes >= 2 * huge;
  void* memory = nullptr;
  if (posix_memalign(&memory, large ? huge : 64, bytes ? bytes : 64) != 0) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (large) madvise(memory, bytes / huge * huge, MADV_HUGEPAGE);
#endif
  data_ = static_cast<char*>(memory);
}

Workspace::~Workspace() { std::free(data_); }

}  // namespace fusedrnn
