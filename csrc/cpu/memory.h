// Scratch memory of one call, allocated before its parallel region begins so that nothing in there can fail.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fusedrnn {

// Asks the system to back those of the bytes that fill whole huge pages (2 MiB) with such: one fault in place of 512
// when they are first written. Without effect on pages that exist already, and on what they hold.
void prefer_huge_pages(void* data, size_t bytes);

struct Memory {
  char* data = nullptr;
  size_t bytes = 0;
};

// 64-byte aligned, in huge pages if large; to be given to std::free. Throws std::bad_alloc.
Memory allocate(size_t bytes);

// A block of 64-byte aligned memory with anything in it. Throws std::bad_alloc. One block of at most 64 MiB is kept
// from call to call, for the whole process.
class Workspace {
 public:
  explicit Workspace(size_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  char* data() const { return block_.data; }

 private:
  Memory block_;
};

// Hands out pieces of a block. Run over a null block first, the same sequence of requests yields the size to allocate.
struct Arena {
  char* base;
  size_t used = 0;
  template <class T>
  inline __attribute__((always_inline)) T* take(int64_t count) {
    T* piece = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return piece;
  }
};

}  // namespace fusedrnn
