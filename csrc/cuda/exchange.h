// How a step's ring values reach the next step's products: a ring of buffers, one read while another is written.
//
// A buffer holds, for each sequence of a CTA's slice of the batch, one row of `ring_row` bytes. Its end, where there is
// padding, is zero, so that products may take whole blocks.
#pragma once

#include "device.h"
#include "kernels.h"

namespace fusedrnn::cuda {

// What of the ring a CTA has to do with.
struct RingPlace {
  int unit_block, group;  // of the CTA: its units, and which CTAs it shares a slice's units with
  int rows, values;       // sequences that there are, values of each
};

// One CTA computes all units: the ring is in its shared memory.
template <class Value>
class OneCta {
 public:
  FUSEDRNN_DEVICE OneCta(const Geometry& g, const RingPlace&)
      : ring_(g.ring_at, 2 * g.ring_rows * values(g)), row_(values(g)), buffer_(g.ring_rows * values(g)) {
    constexpr int per_words = sizeof(Words) / sizeof(Value);
    for (int i = thread_index(); i < 2 * buffer_ / per_words; i += thread_count())
      store_words(ring_, i * per_words, Words{});
    sync();
  }

  // Fills the first `count` of `words`; word k begins at value at(k) of row row(k).
  template <int n, class Row, class At>
  FUSEDRNN_DEVICE void read(int64_t step, Words (&words)[n], int count, Row&& row, At&& at) const {
    FUSEDRNN_UNROLL
    for (int k = 0; k < n; ++k)
      if (k < count) words[k] = load_words(ring_, buffer_of<2>(step) * buffer_ + row(k) * row_ + at(k));
  }
  FUSEDRNN_DEVICE void write(int64_t step, int row, int value, Value v) const {
    store(ring_, buffer_of<2>(step) * buffer_ + row * row_ + value, v);
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
class Counter {
 public:
  FUSEDRNN_DEVICE Counter(const Geometry& g, const RingPlace& place)
      : row_(g.ring_row / static_cast<int>(sizeof(Value))),
        buffer_(g.ring_rows * row_),
        ring_(static_cast<Value*>(g.ring) + static_cast<int64_t>(place.group) * 2 * buffer_, 2 * buffer_),
        arrivals_(g.arrivals + place.group * arrivals_apart, 1),
        ctas_(static_cast<unsigned>(g.unit_blocks)) {}

  template <int n, class Row, class At>
  FUSEDRNN_DEVICE void read(int64_t step, Words (&words)[n], int count, Row&& row, At&& at) const {
    FUSEDRNN_UNROLL
    for (int k = 0; k < n; ++k)
      if (k < count) words[k] = load_words_shared_by_ctas(ring_, buffer_of<2>(step) * buffer_ + row(k) * row_ + at(k));
  }
  FUSEDRNN_DEVICE void write(int64_t step, int row, int value, Value v) const {
    store(ring_, buffer_of<2>(step) * buffer_ + row * row_ + value, v);
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

// The same without a counter: each value says itself that it is there. Every place of the ring begins empty, a bit
// pattern that no value has (device.h), and a reader reads until it finds none empty. No barrier but the CTA's own,
// once for every eight sequences, between products and units.
//
// Who writes a unit's value of step s + 1 also empties its place of step s - 4, which is that of s + 4, half a ring
// ahead. Every thread fences once a step, while it waits for the others anyway. Hence
//
//   nobody still reads what is emptied: readers of s - 4 met in their CTA, fenced, and wrote s - 2, which the CTA of
//   the emptying thread has read, in step s - 2, fenced and met in step s - 1; nobody finds the old value in the place
//   of s + 4: the emptying thread fenced, then wrote s + 2, which every CTA has read, in step s + 2, fenced and met in
//   step s + 3.
template <class Value>
class Flags {
  static constexpr int buffers = ring_buffers(Exchange::flags);

 public:
  FUSEDRNN_DEVICE Flags(const Geometry& g, const RingPlace& place)
      : rows_(place.rows),
        row_(g.ring_row / static_cast<int>(sizeof(Value))),
        buffer_(g.ring_rows * row_),
        ring_(static_cast<Value*>(g.ring) + static_cast<int64_t>(place.group) * buffers * buffer_, buffers * buffer_) {
    const int padding = row_ - place.values;
    if (place.unit_block == 0)
      for (int i = thread_index(); i < buffers * rows_ * padding; i += thread_count())
        put(ring_, i / padding / rows_ * buffer_ + i / padding % rows_ * row_ + place.values + i % padding,
            convert<Value>(0.0f));
  }

  // Rows of sequences that do not exist are never written: their products, which nobody uses, are those of the last
  // one.
  template <int n, class Row, class At>
  FUSEDRNN_DEVICE void read(int64_t step, Words (&words)[n], int count, Row&& row, At&& at) const {
    load_words_when_full(words, count, ring_, [&](int k) {
      return buffer_of<buffers>(step) * buffer_ + (row(k) < rows_ ? row(k) : rows_ - 1) * row_ + at(k);
    });
  }
  FUSEDRNN_DEVICE void write(int64_t step, int row, int value, Value v) const {
    put(ring_, buffer_of<buffers>(step) * buffer_ + row * row_ + value, v);
    empty(ring_, (buffer_of<buffers>(step + buffers / 2 - 1)) * buffer_ + row * row_ + value);
  }

  FUSEDRNN_DEVICE void publish() const {}
  FUSEDRNN_DEVICE void await(int64_t) const { fence(); }

 private:
  const int rows_, row_, buffer_;
  const gptr<Value> ring_;
};

}  // namespace fusedrnn::cuda
