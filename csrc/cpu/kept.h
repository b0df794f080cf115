// Packed weights that outlive a call.
//
// Packing reads and writes all weights once: a fifth of LSTM 100,1,1024,1024, inference. So calls that go forward only,
// without too many tokens, leave them for the next call with the same weights. Those may have been changed meanwhile in
// ways that nobody is told of (through NumPy, `.data`, another process), so each panel carries a fingerprint of what it
// was packed from, which every call compares with the weights as they are.
#pragma once

#include "memory.h"

namespace fusedrnn {

// The block of packed weights of one layer, for one call at a time.
class KeptWeights {
 public:
  // What was packed and how. Equal keys promise no equal weights; fingerprints do.
  struct Key {
    const void *w_ih, *w_hh;
    int64_t gates, I, H, R;
    int directions, input_vectors, vectors, shares, copies;
    bool twice;
    int vector_bytes, value_bytes;
    bool projected;
    int64_t merged;
    bool together;
    bool operator==(const Key& other) const;
  };

  // The block that an earlier call with this key left or, if there is none or it is in use, a new one with anything in
  // it. Throws std::bad_alloc.
  KeptWeights(const Key& key, size_t bytes);
  ~KeptWeights();
  KeptWeights(const KeptWeights&) = delete;
  KeptWeights& operator=(const KeptWeights&) = delete;

  char* data() const { return block_.data; }
  bool is_new() const { return new_; }
  // The block is complete: a later call may have it. All that are kept have `kept_limit` bytes together at most.
  void keep();

 private:
  Key key_;
  Memory block_;
  bool new_ = true;
};

}  // namespace fusedrnn
