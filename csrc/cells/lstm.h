// LSTM (Hochreiter and Schmidhuber 1997; forget gate: Gers et al. 2000), gates i f g o, states h c:
//   c = f c' + i g,  h = o tanh(c)
#pragma once

#include "cell.h"

namespace fusedrnn {

struct Lstm {
  static constexpr int gates = 4, states = 2, slots = 4, kept = 4;
  static constexpr int input_slot[] = {0, 1, 2, 3}, recurrent_slot[] = {0, 1, 2, 3};

  template <class M, class V = typename M::V>
  FUSEDRNN_CELL void activate(const V* x, const V* r, V* keep) {
    keep[0] = M::sigmoid(x[0] + r[0]), keep[1] = M::sigmoid(x[1] + r[1]);
    keep[2] = M::tanh(x[2] + r[2]), keep[3] = M::sigmoid(x[3] + r[3]);
  }

  template <class M, class V = typename M::V>
  FUSEDRNN_CELL void advance(V* keep, const V* prev, V* next) {
    const V i = keep[0], f = keep[1], g = keep[2], o = keep[3];
    next[1] = M::multiply_add(f, prev[1], i * g);
    next[0] = o * M::tanh(next[1]);
  }

  template <class M, class V = typename M::V>
  FUSEDRNN_CELL void backward(const V* keep, const V* prev, const V* next, const V* dnext, V* dprev, V* d) {
    const V i = keep[0], f = keep[1], g = keep[2], o = keep[3], tanh_c = M::tanh(next[1]);
    const V dc = dnext[1] + dnext[0] * o * (1.f - tanh_c * tanh_c);
    d[0] = dc * g * i * (1.f - i);
    d[1] = dc * prev[1] * f * (1.f - f);
    d[2] = dc * i * (1.f - g * g);
    d[3] = dnext[0] * tanh_c * o * (1.f - o);
    dprev[0] = M::zero();
    dprev[1] = dc * f;
  }
};

}  // namespace fusedrnn
