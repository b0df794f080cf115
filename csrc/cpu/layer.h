// One layer of a recurrent network as the kernels see it: sizes, pointers, strides. Knows no framework.
//
// T steps, B sequences, I input features, H hidden units, R the width of the output h (the projection's, or H),
// D directions, G the cell's gates. A *token* is one (step, sequence) pair.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../cells/cell.h"

// Included by translation units compiled for different processors, which must not share an out-of-line copy.
#define FUSEDRNN_ALWAYS_INLINE inline __attribute__((always_inline))

namespace fusedrnn {

constexpr int max_states = 2, max_directions = 2;

// Which tokens exist. Dense: every sequence has T steps. Packed (torch's PackedSequence): `sizes[t]` sequences, the
// first ones, are active at step t; sizes never rise. Active rows at a step are always the first ones.
struct Sequence {
  int64_t T, B;
  const int64_t* sizes;   // packed: T entries; dense: null
  const int64_t* starts;  // packed: T + 1 entries, tokens before step t; dense: null

  FUSEDRNN_ALWAYS_INLINE int64_t size(int64_t t) const { return sizes ? sizes[t] : B; }
  FUSEDRNN_ALWAYS_INLINE int64_t start(int64_t t) const { return starts ? starts[t] : t * B; }
  FUSEDRNN_ALWAYS_INLINE int64_t tokens() const { return start(T); }
};

// A tensor with one row of features per token: (T, B, features) with any strides, or (tokens, features) if packed.
template <class Value>
struct TokenRows {
  Value* data;
  int64_t step, row;  // strides; packed: step is not used
  FUSEDRNN_ALWAYS_INLINE Value* at(const Sequence& seq, int64_t t, int64_t b) const {
    return seq.sizes ? data + (seq.starts[t] + b) * row : data + t * step + b * row;
  }
};

// Weights of one direction as torch lays them out, contiguous; null where the layer has none.
template <class Value>
struct Weights {
  Value* w_ih;  // (G*H, I)
  Value* w_hh;  // (G*H, R)
  Value* b_ih;  // (G*H)
  Value* b_hh;  // (G*H)
  Value* w_hr;  // (R, H)
};

// What forward keeps for backward, for one direction: kept slots (tokens, kept, H), then each state before a projection
// (tokens, H), then the projected output (tokens, R) if there is a projection.
template <class Value>
struct Saved {
  Value* kept;
  Value* state[max_states];
  Value* projected;
};

FUSEDRNN_ALWAYS_INLINE int64_t saved_size(int kept, int states, int64_t tokens, int64_t H, int64_t R, bool projected) {
  return tokens * ((kept + states) * H + (projected ? R : 0));
}

template <class Value>
FUSEDRNN_ALWAYS_INLINE Saved<Value> saved_view(Value* first, int kept, int states, int64_t tokens, int64_t H) {
  Saved<Value> view{first, {}, first + tokens * (kept + states) * H};
  for (int s = 0; s < states; ++s) view.state[s] = first + tokens * (kept + s) * H;
  return view;
}

template <class T>
struct Layer {
  Sequence seq;
  int64_t I, H, R;
  int directions;
  bool projected;
  TokenRows<const T> input;
  const T* hx[max_states];  // (D, B, width), contiguous, null for zeros
  Weights<const T> weights[max_directions];

  FUSEDRNN_ALWAYS_INLINE int64_t state_width(int s) const { return s == 0 ? R : H; }
};

template <class T>
struct Forward : Layer<T> {
  TokenRows<T> output;   // (T, B, D*R) or (tokens, D*R), data null if not wanted
  T* final[max_states];  // (D, B, width), contiguous
  T* saved;              // D times saved_size values, null if not wanted
};

// Gradients: null inputs are zeros, null results are not wanted.
template <class T>
struct Backward : Layer<T> {
  const T* saved;
  TokenRows<const T> d_output;
  const T* d_final[max_states];
  TokenRows<T> d_input;
  T* d_hx[max_states];
  Weights<T> d_weights[max_directions];
};

}  // namespace fusedrnn
