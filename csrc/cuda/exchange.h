// How a step's ring values reach the next step's products: two buffers, one read while the other is written.
//
// A buffer holds, for each sequence of a CTA's slice of the batch, one row of `ring_row` bytes. Its end, where there is
// padding, is zero, so that products may take whole blocks.
#pragma once

#include "device.h"
#include "kernels.h"

namespace fusedrnn::cuda {

// One CTA computes all units: the ring is in its shared memory.
template <class Value>
class OneCta {
 public:
  FUSEDRNN_DEVICE OneCta(const Geometry& g, int)
      : ring_(g.ring_at, 2 * g.ring_rows * values(g)), row_(values(g)), buffer_(g.ring_rows * values(g)) {
    constexpr int per_words = sizeof(Words) / sizeof(Value);
    for (int i = thread_index(); i < 2 * buffer_ / per_words; i += thread_count())
      store_words(ring_, i * per_words, Words{});
    sync();
  }

  FUSEDRNN_DEVICE Words read(int64_t step, int row, int value) const {
    return load_words(ring_, buffer_of(step) * buffer_ + row * row_ + value);
  }
  FUSEDRNN_DEVICE void write(int64_t step, int row, int value, Value v) const {
    store(ring_, buffer_of(step) * buffer_ + row * row_ + value, v);
  }

  // Everything for a step is written.
  FUSEDRNN_DEVICE void publish() const { sync(); }
  // Until everything for a step can be read.
  FUSEDRNN_DEVICE void await(int64_t) const {}

 private:
  FUSEDRNN_DEVICE static int values(const Geometry& g) { return g.ring_row / static_cast<int>(sizeof(Value)); }

  const sptr<Value> ring_;
  const int row_, buffer_;
};

// CTAs that share a slice's units hand their parts to each other through the L2 cache. Each adds one to a counter when
// its part of a step is written, and waits until all have. That a buffer's readers are done before it is written again
// follows: they have arrived for the step between.
template <class Value>
class Grid {
 public:
  FUSEDRNN_DEVICE Grid(const Geometry& g, int group)
      : row_(g.ring_row / static_cast<int>(sizeof(Value))),
        buffer_(g.ring_rows * row_),
        ring_(static_cast<Value*>(g.ring) + static_cast<int64_t>(group) * 2 * buffer_, 2 * buffer_),
        arrivals_(g.arrivals + group * arrivals_apart, 1),
        ctas_(static_cast<unsigned>(g.unit_blocks)) {}

  FUSEDRNN_DEVICE Words read(int64_t step, int row, int value) const {
    return load_words_shared_by_ctas(ring_, buffer_of(step) * buffer_ + row * row_ + value);
  }
  FUSEDRNN_DEVICE void write(int64_t step, int row, int value, Value v) const {
    store(ring_, buffer_of(step) * buffer_ + row * row_ + value, v);
  }

  FUSEDRNN_DEVICE void publish() const {
    sync();
    if (thread_index() == 0) arrive(arrivals_);
  }
  FUSEDRNN_DEVICE void await(int64_t step) const {
    if (thread_index() == 0) wait_for(arrivals_, static_cast<unsigned>(step + 1) * ctas_);
    sync();
  }

 private:
  const int row_, buffer_;
  const gptr<Value> ring_;
  const gptr<unsigned> arrivals_;
  const unsigned ctas_;
};

}  // namespace fusedrnn::cuda
