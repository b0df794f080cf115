// Elman network (1990): h = f(W_ih x + b_ih + W_hh h' + b_hh). Backward needs h alone.
#pragma once

#include "cell.h"

namespace fusedrnn {

struct RnnTanh {
  static constexpr int gates = 1, states = 1, slots = 1, kept = 0;
  static constexpr int input_slot[] = {0}, recurrent_slot[] = {0};

  template <class M, class V = typename M::V>
  FUSEDRNN_CELL void activate(const V* x, const V* r, V* keep) {
    keep[0] = x[0] + r[0];
  }

  template <class M, class V = typename M::V>
  FUSEDRNN_CELL void advance(V* keep, const V*, V* next) {
    next[0] = M::tanh(keep[0]);
  }

  template <class M, class V = typename M::V>
  FUSEDRNN_CELL void backward(const V*, const V*, const V* next, const V* dnext, V* dprev, V* d) {
    d[0] = dnext[0] * (1.f - next[0] * next[0]);
    dprev[0] = M::zero();
  }
};

struct RnnRelu {
  static constexpr int gates = 1, states = 1, slots = 1, kept = 0;
  static constexpr int input_slot[] = {0}, recurrent_slot[] = {0};

  template <class M, class V = typename M::V>
  FUSEDRNN_CELL void activate(const V* x, const V* r, V* keep) {
    keep[0] = x[0] + r[0];
  }

  template <class M, class V = typename M::V>
  FUSEDRNN_CELL void advance(V* keep, const V*, V* next) {
    next[0] = M::relu(keep[0]);
  }

  template <class M, class V = typename M::V>
  FUSEDRNN_CELL void backward(const V*, const V*, const V* next, const V* dnext, V* dprev, V* d) {
    d[0] = M::where_positive(next[0], dnext[0]);
    dprev[0] = M::zero();
  }
};

}  // namespace fusedrnn
