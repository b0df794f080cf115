#include "memory.h"

#include <cstdlib>
#include <new>

namespace fusedrnn {

Workspace::Workspace(size_t bytes) : data_(nullptr) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, bytes ? bytes : 64) != 0) throw std::bad_alloc();
  data_ = static_cast<char*>(memory);
}

Workspace::~Workspace() { std::free(data_); }

}  // namespace fusedrnn
