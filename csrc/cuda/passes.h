// What happens to one hidden unit of one sequence at one step, forward and backward: everything but the product.
//
// Both passes have the same shape, and so the same time loop (recurrence.h) and the same launches per step (step.h). A
// *ring* holds, per sequence, what the product needs of the step before: h forward, the gradients of the recurrent
// products backward. Each step multiplies it with weights, `rows` of them for a hidden unit, and hands the sums to
// `finish`, which computes the unit, writes what it leaves in global memory, updates the unit's carried states, and
// returns the unit's new `rings` values of the ring.
//
// `fetch` reads what `finish` needs of this step from memory and can run before the sums are there.
#pragma once

#include "arithmetic.h"

namespace fusedrnn::cuda {

// Where a step of a pass is in time, and which sequences are there.
struct Clock {
  Sequence seq;
  bool falling;  // from the last step to the first

  FUSEDRNN_DEVICE int64_t time(int64_t step) const { return falling ? seq.T - 1 - step : step; }

  // Whether sequence b has a step t.
  FUSEDRNN_DEVICE bool active(int64_t t, int64_t b) const {
    if (t < 0 || t >= seq.T) return false;
    if (seq.starts) return b < start(t + 1) - start(t);
    return !seq.lengths || t < load(gptr<const int64_t>(seq.lengths, seq.B), b);
  }

  // Whether nothing passes between steps t - 1 and t of sequence b.
  FUSEDRNN_DEVICE bool cut(int64_t t, int64_t b) const {
    return seq.resets && active(t, b) && load(gptr<const uint8_t>(seq.resets, seq.T * seq.B), t * seq.B + b);
  }

  // How much of state s of a unit stays at step t what it was before, from 0 to 1: the lots of csrc/cpu/layer.h.
  template <class Real>
  FUSEDRNN_DEVICE Real stays(int s, int direction, int64_t t, int64_t b, int64_t unit) const {
    const gptr<const uint64_t> seed(seq.seed, 1);
    if (!seed) return static_cast<Real>(seq.zoneout[s]);
    const int64_t place = (((s * seq.directions + direction) * seq.T + t) * seq.B + b) * seq.H + unit;
    uint64_t x = load(seed, 0) + (static_cast<uint64_t>(place) + 1) * 0x9E3779B97F4A7C15u;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return static_cast<uint32_t>((x ^ x >> 31) >> 40) < seq.stays_below[s] ? Real(1) : Real(0);
  }

  FUSEDRNN_DEVICE int64_t token(int64_t t, int64_t b) const { return (seq.starts ? start(t) : t * seq.B) + b; }

  // Whether there is a place in memory for step t of sequence b, though it may be behind the sequence's end.
  FUSEDRNN_DEVICE bool has_token(int64_t t, int64_t b) const { return !seq.starts || active(t, b); }

  // Values from the beginning of a tensor with strides to row (t, b).
  FUSEDRNN_DEVICE int64_t row(int64_t t, int64_t b, int64_t step_stride, int64_t row_stride) const {
    return seq.starts ? token(t, b) * row_stride : t * step_stride + b * row_stride;
  }
  FUSEDRNN_DEVICE int64_t extent(int64_t step_stride, int64_t row_stride, int64_t last) const {
    return (seq.starts ? (seq.tokens - 1) * row_stride : (seq.T - 1) * step_stride + (seq.B - 1) * row_stride) + last;
  }

 private:
  FUSEDRNN_DEVICE int64_t start(int64_t t) const { return load(gptr<const int64_t>(seq.starts, seq.T + 1), t); }
};

template <class C, class A>
class ForwardPass {
 public:
  using Cell = C;
  using Arith = A;
  using Value = typename A::Value;
  using Real = typename A::Real;
  static constexpr bool is_backward = false;
  static constexpr int rows = Cell::gates, states = Cell::states, rings = 1;
  static constexpr int tiles = tiles_forward(rows, sizeof(Value));

  struct Fetched {
    Value x[rows];
    bool active, cut;
  };

  FUSEDRNN_DEVICE ForwardPass(const Arguments& arguments, int direction)
      : a_(arguments.forward), d_(direction), clock_{arguments.forward, direction == 1} {}

  FUSEDRNN_DEVICE const Sequence& sequence() const { return a_; }

  // Of the weights: row `r` of a unit is row r * H + unit of a (rows * H, stride) matrix.
  FUSEDRNN_DEVICE gptr<const Value> weights() const {
    return {static_cast<const Value*>(a_.w_hh[d_]), rows * a_.H * a_.w_stride};
  }
  FUSEDRNN_DEVICE int64_t weights_stride() const { return a_.w_stride; }
  FUSEDRNN_DEVICE Real bias(int row, int64_t unit) const {
    const gptr<const Value> b(static_cast<const Value*>(a_.b_hh[d_]), rows * a_.H);
    return b ? convert<Real>(load(b, row * a_.H + unit)) : Real(0);
  }

  FUSEDRNN_DEVICE int64_t steps() const { return a_.T; }

  // The carried states before the first step, and the unit's first values of the ring.
  FUSEDRNN_DEVICE void begin(int64_t unit, int64_t b, Real (&state)[states], Value (&ring)[rings]) const {
    const bool cut = !clock_.falling && clock_.cut(0, b);
    FUSEDRNN_UNROLL
    for (int s = 0; s < states; ++s) state[s] = cut ? Real(0) : initial(s, unit, b);
    ring[0] = entering(state[0], unit, b);
  }

  FUSEDRNN_DEVICE Fetched fetch(int64_t step, int64_t unit, int64_t b) const {
    Fetched f;
    const int64_t t = clock_.time(step);
    f.active = clock_.active(t, b);
    f.cut = step + 1 < a_.T && clock_.cut(clock_.falling ? t : t + 1, b);
    if (f.active) {
      const gptr<const Value> x(static_cast<const Value*>(a_.gates_x), a_.directions * a_.tokens * rows * a_.H);
      const int64_t first = (d_ * a_.tokens + clock_.token(t, b)) * rows * a_.H + unit;
      FUSEDRNN_UNROLL
      for (int g = 0; g < rows; ++g) f.x[g] = load(x, first + g * a_.H);
    }
    return f;
  }

  FUSEDRNN_DEVICE void finish(int64_t step, int64_t unit, int64_t b, const Fetched& f, const Real (&sums)[rows],
                              Real (&state)[states], Value (&ring)[rings]) const {
    const int64_t t = clock_.time(step), H = a_.H;
    if (f.active) {
      Real x[rows], next[states], keep[Cell::slots];
      FUSEDRNN_UNROLL
      for (int g = 0; g < rows; ++g) x[g] = convert<Real>(f.x[g]);
      Cell::template activate<Math<Real>>(x, sums, keep);
      Cell::template advance<Math<Real>>(keep, state, next);
      const int64_t token = d_ * a_.tokens + clock_.token(t, b), tokens = a_.directions * a_.tokens;
      const gptr<Value> kept(static_cast<Value*>(a_.kept), tokens * Cell::kept * H);
      if (kept) {
        FUSEDRNN_UNROLL
        for (int k = 0; k < Cell::kept; ++k) store(kept, (token * Cell::kept + k) * H + unit, convert<Value>(keep[k]));
      }
      const gptr<Real> computed(static_cast<Real*>(a_.computed), tokens * states * H);
      FUSEDRNN_UNROLL
      for (int s = 0; s < states; ++s) {
        if (computed) store(computed, (token * states + s) * H + unit, next[s]);
        if (!a_.stays_below[s]) continue;
        const Real share = clock_.template stays<Real>(s, d_, t, b, unit);
        if (share == Real(1))  // whatever the cell has computed, be it NaN
          next[s] = state[s];
        else if (share > Real(0))
          next[s] = share * state[s] + (Real(1) - share) * next[s];
      }
      const gptr<Real> cells(static_cast<Real*>(a_.cells), tokens * H);
      if (states > 1 && cells) store(cells, token * H + unit, next[states - 1]);
      FUSEDRNN_UNROLL
      for (int s = 0; s < states; ++s) state[s] = next[s];
    }
    if (clock_.has_token(t, b)) {
      const gptr<Value> output(static_cast<Value*>(a_.output),
                               clock_.extent(a_.output_step, a_.output_row, a_.directions * H));
      store(output, clock_.row(t, b, a_.output_step, a_.output_row) + d_ * H + unit,
            convert<Value>(f.active ? state[0] : Real(0)));
    }
    if (step + 1 == a_.T) {
      FUSEDRNN_UNROLL
      for (int s = 0; s < states; ++s)
        store(gptr<Value>(static_cast<Value*>(a_.final[s]), a_.directions * a_.B * H), (d_ * a_.B + b) * H + unit,
              convert<Value>(state[s]));
    }
    if (f.cut) {
      FUSEDRNN_UNROLL
      for (int s = 0; s < states; ++s) state[s] = Real(0);
    }
    ring[0] = entering(state[0], unit, b);
  }

 private:
  // What the products see of h.
  FUSEDRNN_DEVICE Value entering(Real h, int64_t unit, int64_t b) const {
    const gptr<const Value> mask(static_cast<const Value*>(a_.h_mask), a_.directions * a_.B * a_.H);
    return A::operand(mask ? h * convert<Real>(load(mask, (d_ * a_.B + b) * a_.H + unit)) : h);
  }

  FUSEDRNN_DEVICE Real initial(int s, int64_t unit, int64_t b) const {
    const gptr<const Value> given(static_cast<const Value*>(a_.initial[s]), a_.directions * a_.B * a_.H);
    return given ? convert<Real>(load(given, (d_ * a_.B + b) * a_.H + unit)) : Real(0);
  }

  const Forward& a_;
  const int d_;
  const Clock clock_;
};

// Carried states are the gradients of the states except through the products, which arrive a step later as the sums.
// So there is one step more than T: in the last one the sums complete the gradient of the initial h.
template <class C, class A>
class BackwardPass {
 public:
  using Cell = C;
  using Arith = A;
  using Value = typename A::Value;
  using Real = typename A::Real;
  static constexpr bool is_backward = true;
  static constexpr int rows = 1, states = Cell::states, rings = Cell::gates;
  static constexpr int tiles = tiles_backward;

  struct Fetched {
    Value keep[Cell::slots];
    Real prev[states], next[states], d_output;
    bool active, cut;
  };

  FUSEDRNN_DEVICE BackwardPass(const Arguments& arguments, int direction)
      : a_(arguments.backward), d_(direction), clock_{arguments.backward, direction == 0} {}

  FUSEDRNN_DEVICE const Sequence& sequence() const { return a_; }

  FUSEDRNN_DEVICE gptr<const Value> weights() const {
    return {static_cast<const Value*>(a_.w_hh_t[d_]), a_.H * a_.w_stride};
  }
  FUSEDRNN_DEVICE int64_t weights_stride() const { return a_.w_stride; }
  FUSEDRNN_DEVICE Real bias(int, int64_t) const { return Real(0); }

  FUSEDRNN_DEVICE int64_t steps() const { return a_.T + 1; }

  FUSEDRNN_DEVICE void begin(int64_t unit, int64_t b, Real (&state)[states], Value (&ring)[rings]) const {
    FUSEDRNN_UNROLL
    for (int s = 0; s < states; ++s) state[s] = of_state(a_.d_final[s], unit, b);
    FUSEDRNN_UNROLL
    for (int g = 0; g < rings; ++g) ring[g] = A::operand(Real(0));
  }

  FUSEDRNN_DEVICE Fetched fetch(int64_t step, int64_t unit, int64_t b) const {
    Fetched f;
    f.active = false;
    if (step == a_.T) return f;
    const int64_t t = clock_.time(step), before = clock_.falling ? t - 1 : t + 1, H = a_.H;
    f.active = clock_.active(t, b);
    f.cut = clock_.cut(clock_.falling ? t : t + 1, b);
    if (!f.active) return f;
    const int64_t token = d_ * a_.tokens + clock_.token(t, b), tokens = a_.directions * a_.tokens;
    const gptr<const Value> kept(static_cast<const Value*>(a_.kept), tokens * Cell::kept * H);
    FUSEDRNN_UNROLL
    for (int k = 0; k < Cell::kept; ++k) f.keep[k] = load(kept, (token * Cell::kept + k) * H + unit);
    const bool first = !clock_.active(before, b);
    FUSEDRNN_UNROLL
    for (int s = 0; s < states; ++s) {
      f.next[s] = computed(s, t, unit, b);
      f.prev[s] = f.cut ? Real(0) : first ? of_state(a_.initial[s], unit, b) : state_at(s, before, unit, b);
    }
    const gptr<const Value> d_output(static_cast<const Value*>(a_.d_output),
                                     clock_.extent(a_.d_output_step, a_.d_output_row, a_.directions * H));
    f.d_output =
        d_output ? convert<Real>(load(d_output, clock_.row(t, b, a_.d_output_step, a_.d_output_row) + d_ * H + unit))
                 : Real(0);
    return f;
  }

  FUSEDRNN_DEVICE void finish(int64_t step, int64_t unit, int64_t b, const Fetched& f, const Real (&sums)[rows],
                              Real (&state)[states], Value (&ring)[rings]) const {
    const int64_t H = a_.H;
    // Before the first step there is no product, not even of zero and infinity.
    if (step > 0) state[0] += a_.h_mask ? sums[0] * of_state(a_.h_mask, unit, b) : sums[0];
    if (step == a_.T) {
      FUSEDRNN_UNROLL
      for (int s = 0; s < states; ++s)
        store(gptr<Value>(static_cast<Value*>(a_.d_initial[s]), a_.directions * a_.B * H), (d_ * a_.B + b) * H + unit,
              convert<Value>(state[s]));
      return;
    }
    const int64_t t = clock_.time(step);
    Real d[Cell::slots];
    FUSEDRNN_UNROLL
    for (int k = 0; k < Cell::slots; ++k) d[k] = Real(0);
    bool passes = true;
    if (f.active) {
      Real keep[Cell::slots], d_prev[states];
      FUSEDRNN_UNROLL
      for (int k = 0; k < Cell::kept; ++k) keep[k] = convert<Real>(f.keep[k]);
      state[0] += f.d_output;
      Real past[states];  // what zoneout lets pass by the cell
      FUSEDRNN_UNROLL
      for (int s = 0; s < states; ++s) {
        past[s] = Real(0);
        if (!a_.stays_below[s]) continue;
        const Real share = clock_.template stays<Real>(s, d_, t, b, unit);
        past[s] = share * state[s];
        state[s] = (Real(1) - share) * state[s];
      }
      Cell::template backward<Math<Real>>(keep, f.prev, f.next, state, d_prev, d);
      passes = !f.cut;
      FUSEDRNN_UNROLL
      for (int s = 0; s < states; ++s) state[s] = passes ? d_prev[s] + past[s] : Real(0);
    }
    if (clock_.has_token(t, b)) {
      const gptr<Value> d_slots(static_cast<Value*>(a_.d_slots), a_.directions * a_.tokens * Cell::slots * H);
      const int64_t first = (d_ * a_.tokens + clock_.token(t, b)) * Cell::slots * H + unit;
      FUSEDRNN_UNROLL
      for (int k = 0; k < Cell::slots; ++k) store(d_slots, first + k * H, convert<Value>(d[k]));
    }
    FUSEDRNN_UNROLL
    for (int g = 0; g < rings; ++g) ring[g] = A::operand(passes ? d[Cell::slots - Cell::gates + g] : Real(0));
  }

 private:
  // A tensor like a state, zeros where there is none.
  FUSEDRNN_DEVICE Real of_state(const void* data, int64_t unit, int64_t b) const {
    const gptr<const Value> given(static_cast<const Value*>(data), a_.directions * a_.B * a_.H);
    return given ? convert<Real>(load(given, (d_ * a_.B + b) * a_.H + unit)) : Real(0);
  }

  // As the cell computed it.
  FUSEDRNN_DEVICE Real computed(int s, int64_t t, int64_t unit, int64_t b) const {
    const gptr<const Real> before_zoneout(static_cast<const Real*>(a_.computed),
                                          a_.directions * a_.tokens * states * a_.H);
    if (!before_zoneout) return state_at(s, t, unit, b);
    return load(before_zoneout, ((d_ * a_.tokens + clock_.token(t, b)) * states + s) * a_.H + unit);
  }

  // As forward left it: h in the output, another state on its own.
  FUSEDRNN_DEVICE Real state_at(int s, int64_t t, int64_t unit, int64_t b) const {
    if (s == 0) {
      const gptr<const Value> output(static_cast<const Value*>(a_.output),
                                     clock_.extent(a_.output_step, a_.output_row, a_.directions * a_.H));
      return convert<Real>(load(output, clock_.row(t, b, a_.output_step, a_.output_row) + d_ * a_.H + unit));
    }
    const gptr<const Real> cells(static_cast<const Real*>(a_.cells), a_.directions * a_.tokens * a_.H);
    return load(cells, (d_ * a_.tokens + clock_.token(t, b)) * a_.H + unit);
  }

  const Backward& a_;
  const int d_;
  const Clock clock_;
};

}  // namespace fusedrnn::cuda
