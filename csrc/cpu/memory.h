// Memory of calls: for their results, and as scratch, which is allocated before the parallel region begins so that
// nothing in there can fail.
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

// 64-byte aligned, in huge pages if large, with anything in it; to be given to `release`. Throws std::bad_alloc.
//
// What was released is kept for the next to ask for about as much, up to `kept_limit` bytes in all: the system zeroes
// every fresh page (Zen 5, LSTM training 200,16,256,256; 100,32,128,128; 100,32,512,512 in the benchmark, where
// processes take turns: 69 to 71% of the machine's limit without, 72 to 73% with it).
Memory allocate(size_t bytes);
void release(Memory block);

// The most bytes that blocks waiting for their next use may have together, and packed weights (kept.h) as well:
// 256 MiB, or FUSEDRNN_KEPT_MB. (Training of LSTM 50,64,1024,1024 in the benchmark: 815 ms; with 128 MiB 920-1100.)
size_t kept_limit();

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

// A block for as long as a call takes, cut by lay_out(Arena&) into the pieces that it wants. Throws std::bad_alloc.
class Workspace {
 public:
  template <class LayOut>
  inline __attribute__((always_inline)) explicit Workspace(LayOut&& lay_out) {
    Arena measure{nullptr};
    lay_out(measure);
    block_ = allocate(measure.used);
    Arena arena{block_.data};
    lay_out(arena);
  }
  ~Workspace() { release(block_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

 private:
  Memory block_;
};

}  // namespace fusedrnn
