// One layer of a recurrent network as the kernels see it: sizes, pointers, strides. Knows no framework.
//
// T steps, B sequences, I input features, H hidden units, R the width of the output h (the projection's, or H),
// D directions, G the cell's gates. A *token* is one (step, sequence) pair.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../cells/cell.h"
#include "bf16.h"

namespace fusedrnn {

constexpr int max_states = 2, max_directions = 2;

// Which tokens exist. Dense: every sequence has T steps. Packed (torch's PackedSequence) or padded: `sizes[t]`
// sequences, the first ones, are active at step t; sizes never rise. A padded batch lies in memory like a dense one,
// and `order` sorts it: the kernels count its sequences from the longest to the shortest, which may have no step at
// all. So active rows at a step are always the first ones.
struct Sequence {
  int64_t T, B;
  const int64_t* sizes;             // packed, padded: T entries; dense: null
  const int64_t* starts;            // packed, padded: T + 1 entries, tokens before step t; dense: null
  const int64_t* order = nullptr;   // padded: for each sequence its row in memory; dense, packed: null
  const uint8_t* resets = nullptr;  // for each token whether a new segment starts with it; null if none does

  FUSEDRNN_ALWAYS_INLINE int64_t size(int64_t t) const { return sizes ? sizes[t] : B; }
  FUSEDRNN_ALWAYS_INLINE int64_t start(int64_t t) const { return starts ? starts[t] : t * B; }
  FUSEDRNN_ALWAYS_INLINE int64_t tokens() const { return start(T); }
  FUSEDRNN_ALWAYS_INLINE int64_t row(int64_t b) const { return order ? order[b] : b; }

  // Whether sequence b enters its i-th step with the reset state: segments are cut before a step that is reset, which
  // comes after the cut forward and before it in reverse, where the i-th step is T - 1 - i.
  FUSEDRNN_ALWAYS_INLINE bool cut(int direction, int64_t i, int64_t b) const {
    if (!resets) return false;
    const int64_t t = direction == 0 ? i : T - i;
    return i < T && t < T && b < size(t) && resets[start(t) + b];
  }
};

// A tensor with one row of features per token: (T, B, features) with any strides, or (tokens, features) if packed.
// What a padded one holds behind the end of a sequence is not read; in results it is zero.
template <class Value>
struct TokenRows {
  Value* data;
  int64_t step, row;  // strides; packed: step is not used
  FUSEDRNN_ALWAYS_INLINE Value* at(const Sequence& seq, int64_t t, int64_t b) const {
    return seq.sizes && !seq.order ? data + (seq.starts[t] + b) * row : data + t * step + seq.row(b) * row;
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

// Zoneout (Krueger et al. 2017): a unit's state stays with probability `rate` what it was a step before. While drawn,
// each unit at each step by lot; else its expectation, the mean of both states weighted so.
//
// Nobody keeps the lots: each is a number of SplitMix64 (Steele et al. 2014), which computes its n-th number from n.
// They depend on the seed and on the place in the sequence, not on the engine nor on who computes it.
struct Zoneout {
  double rate[max_states] = {};
  bool drawn = false;
  uint64_t seed = 0;

  FUSEDRNN_ALWAYS_INLINE bool on() const { return rate[0] > 0 || rate[1] > 0; }

  // How much of the state before stays, from 0 to 1, in unit `place` of all.
  FUSEDRNN_ALWAYS_INLINE double stays(int s, int64_t place) const {
    if (!drawn) return rate[s];
    uint64_t x = seed + (static_cast<uint64_t>(place) + 1) * 0x9E3779B97F4A7C15u;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return static_cast<double>((x ^ x >> 31) >> 40) < rate[s] * 0x1p24 ? 1 : 0;
  }
};

// What forward keeps for backward, for one direction: kept slots (tokens, kept, H) unless backward recomputes them,
// then each state before a projection (tokens, H), then the projected output (tokens, R) if there is a projection.
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
  const T* hx[max_states];           // (D, B, width), contiguous, null for zeros
  const T* reset_state[max_states];  // likewise: with what a segment starts where `seq.resets` says so
  Weights<const T> weights[max_directions];
  const T* h_mask;  // (D, B, R), contiguous: factors of h on its way into the recurrent products; null for ones
  Zoneout zoneout;  // not with a projection; backward then recomputes
  bool recompute;   // forward keeps the states alone; backward computes again what the cell has kept
  // No row's values may depend on how many rows there are: not by a bit.
  bool batch_invariant;

  FUSEDRNN_ALWAYS_INLINE int64_t state_width(int s) const { return s == 0 ? R : H; }

  // Where the values of sequence b begin in a tensor shaped as state s.
  FUSEDRNN_ALWAYS_INLINE int64_t state_at(int direction, int s, int64_t b) const {
    return (direction * seq.B + seq.row(b)) * state_width(s);
  }

  // Where the lots of zoneout of sequence b begin: those of its units side by side.
  FUSEDRNN_ALWAYS_INLINE int64_t lots_at(int direction, int s, int64_t t, int64_t b) const {
    return (((s * directions + direction) * seq.T + t) * seq.B + seq.row(b)) * H;
  }

  // With what sequence b enters its i-th step if that is not what the step before has left; null for zeros.
  FUSEDRNN_ALWAYS_INLINE const T* initial(int direction, int s, int64_t i, int64_t b) const {
    const T* states = seq.cut(direction, i, b) ? reset_state[s] : hx[s];
    return states ? states + state_at(direction, s, b) : nullptr;
  }
};

template <class T>
struct Forward : Layer<T> {
  TokenRows<T> output;              // (T, B, D*R) or (tokens, D*R), data null if not wanted
  TokenRows<T> states[max_states];  // of the states but h the values at each step, D*H wide, data null if not wanted
  T* final[max_states];             // (D, B, width), contiguous
  T* saved;                         // D times saved_size values, null if not wanted
};

// Gradients: null inputs are zeros, null results are not wanted.
template <class T>
struct Backward : Layer<T> {
  const T* saved;
  TokenRows<const T> d_output;
  TokenRows<const T> d_states[max_states];
  const T* d_final[max_states];
  TokenRows<T> d_input;
  T* d_hx[max_states];
  T* d_reset_state[max_states];
  Weights<T> d_weights[max_directions];
};

}  // namespace fusedrnn
