// GRU (Cho et al. 2014), the reset gate after the recurrent product as in cuDNN and torch, gates r z n:
//   n = tanh(x_n + r r_n),  h = (1.f - z) n + z h'
// The recurrent product r_n of gate n has a gradient of its own, hence four slots: n, r, z, r_n.
#pragma once

#include "cell.h"

namespace fusedrnn {

struct Gru {
  static constexpr int gates = 3, states = 1, slots = 4, kept = 4;
  static constexpr int input_slot[] = {1, 2, 0}, recurrent_slot[] = {1, 2, 3};

  template <class M, class V = typename M::V>
  FUSEDRNN_CELL void activate(const V* x, const V* rec, V* keep) {
    const V r = M::sigmoid(x[0] + rec[0]), z = M::sigmoid(x[1] + rec[1]);
    keep[0] = x[2] + r * rec[2], keep[1] = r, keep[2] = z, keep[3] = rec[2];
  }

  template <class M, class V = typename M::V>
  FUSEDRNN_CELL void advance(V* keep, const V* prev, V* next) {
    const V n = M::tanh(keep[0]), z = keep[2];
    next[0] = n + z * (prev[0] - n);
    keep[0] = n;
  }

  template <class M, class V = typename M::V>
  FUSEDRNN_CELL void backward(const V* keep, const V* prev, const V*, const V* dnext, V* dprev, V* d) {
    const V n = keep[0], r = keep[1], z = keep[2], rec_n = keep[3], dh = dnext[0];
    d[0] = dh * (1.f - z) * (1.f - n * n);
    d[1] = d[0] * rec_n * r * (1.f - r);
    d[2] = dh * (prev[0] - n) * z * (1.f - z);
    d[3] = d[0] * r;
    dprev[0] = dh * z;
  }
};

}  // namespace fusedrnn
