// One launch per step, for what does not stay on the chip: large batches, large weights, double precision, and devices
// that refuse to run all CTAs at once. Carried states and ring are in global memory; the launches' order is the
// barrier.
//
// A CTA multiplies a tile of step_rows rows of weights with step_columns sequences, both of which it copies to shared
// memory some stages ahead, and then computes the tile's units.
#pragma once

#include "passes.h"

namespace fusedrnn::cuda {

// What of a launch both kernels need. CTAs are numbered as in Geometry.
template <class Pass>
struct StepPlace {
  using Value = typename Pass::Value;
  using Real = typename Pass::Real;

  const Geometry& g;
  const int direction;
  const Pass pass;
  const Sequence& seq;
  const int first_unit, first_row;
  const int64_t row_values, buffer_values;
  const gptr<Value> ring;  // (2, ring_rows, row_values) of this direction
  const gptr<Real> states;

  FUSEDRNN_DEVICE explicit StepPlace(const Arguments& a)
      : g(a.geometry),
        direction(cta_index() / g.unit_blocks / g.slices),
        pass(a, direction),
        seq(pass.sequence()),
        first_unit(cta_index() % g.unit_blocks * g.units),
        first_row(cta_index() / g.unit_blocks % g.slices * g.slice),
        row_values(g.ring_row / static_cast<int>(sizeof(Value))),
        buffer_values(g.ring_rows * row_values),
        ring(static_cast<Value*>(g.ring) + direction * 2 * buffer_values, 2 * buffer_values),
        states(static_cast<Real*>(g.states), seq.directions * Pass::states * seq.B * seq.H) {}

  // Calls f(unit, row), relative to the CTA's first, for what the CTA's threads have to compute.
  template <class F>
  FUSEDRNN_DEVICE void each(F&& f) const {
    for (int pair = thread_index(); pair < g.units * g.slice; pair += thread_count()) {
      const int unit = pair % g.units, row = pair / g.units;
      if (first_unit + unit < seq.H && first_row + row < seq.B) f(unit, row);
    }
  }

  FUSEDRNN_DEVICE int64_t state_at(int s, int unit, int row) const {
    return ((direction * Pass::states + s) * seq.B + first_row + row) * seq.H + first_unit + unit;
  }

  // What the next step needs.
  FUSEDRNN_DEVICE void leave(int64_t step, int unit, int row, const Real (&state)[Pass::states],
                             const Value (&values)[Pass::rings]) const {
    FUSEDRNN_UNROLL
    for (int s = 0; s < Pass::states; ++s) store(states, state_at(s, unit, row), state[s]);
    FUSEDRNN_UNROLL
    for (int k = 0; k < Pass::rings; ++k)
      store(ring, buffer_of<2>(step) * buffer_values + (first_row + row) * row_values + k * seq.H + first_unit + unit,
            values[k]);
  }
};

template <class Pass>
FUSEDRNN_KERNEL(most_warps* lanes)
start(const StepArguments* arguments, int64_t) {
  const StepPlace<Pass> at(constant(arguments).call);
  at.each([&](int unit, int row) {
    typename Pass::Real state[Pass::states];
    typename Pass::Value ring[Pass::rings];
    at.pass.begin(at.first_unit + unit, at.first_row + row, state, ring);
    at.leave(0, unit, row, state, ring);
  });
}

template <class Pass>
FUSEDRNN_KERNEL(most_warps* lanes)
step(const StepArguments* arguments, int64_t relative_step) {
  using A = typename Pass::Arith;
  using Value = typename Pass::Value;
  using Real = typename Pass::Real;
  constexpr int row_tiles = step_rows / tile_rows, column_groups = step_columns * row_tiles / most_warps / columns;
  constexpr int word_values = sizeof(Words) / sizeof(Value), words = block_bytes / sizeof(Words);
  // Of each stage's blocks the rows of weights, then the ring's rows. Rows of 64 bytes side by side: the eight threads
  // that shared memory serves at a time read two rows, and no bank twice.
  constexpr int stage_rows = step_rows + step_columns, stage_values = step_blocks * stage_rows * words * word_values;

  const StepPlace<Pass> at(constant(arguments).call);
  const int64_t step = constant(arguments).first_step + relative_step;
  const Geometry& g = at.g;
  const gptr<const Value> matrix = at.pass.weights();
  const gptr<const Value> ring(static_cast<const Value*>(g.ring) + at.direction * 2 * at.buffer_values,
                               2 * at.buffer_values);
  const sptr<Value> stages(0, step_stages * stage_values);
  const int lane = thread_index() % lanes, row_tile = thread_index() / lanes % row_tiles;
  const int first_column = thread_index() / lanes / row_tiles * column_groups * columns;

  const auto fetch = [&](int64_t stage) {
    for (int piece = thread_index(); piece < step_blocks * stage_rows * words; piece += thread_count()) {
      const int row = piece / words % stage_rows;
      const int64_t block = stage * step_blocks + piece / words / stage_rows;
      const int64_t value = (block * words + piece % words) * word_values;
      const int to = static_cast<int>(stage % step_stages) * stage_values + piece * word_values;
      const int gate = row / g.units, unit = at.first_unit + row % g.units, sequence = at.first_row + row - step_rows;
      if (block >= g.blocks)
        store_words(stages, to, Words{});
      else if (row >= step_rows && sequence < g.ring_rows)
        copy_async(stages, to, ring, buffer_of<2>(step) * at.buffer_values + sequence * at.row_values + value);
      else if (row < step_rows && gate < Pass::rows && unit < at.seq.H)
        copy_async(stages, to, matrix, (gate * at.seq.H + unit) * at.pass.weights_stride() + value);
      else
        store_words(stages, to, Words{});
    }
  };

  Real c[column_groups][A::sums];
  FUSEDRNN_UNROLL
  for (int n = 0; n < column_groups; ++n) FUSEDRNN_UNROLL
  for (int s = 0; s < A::sums; ++s) c[n][s] = Real(0);

  const int64_t count = (g.blocks + step_blocks - 1) / step_blocks;
  for (int64_t stage = 0; stage < step_stages - 1; ++stage) {
    if (stage < count) fetch(stage);
    commit_copies();
  }
  for (int64_t stage = 0; stage < count; ++stage) {
    wait_copies<step_stages - 2>();
    sync();  // everyone's copies are here, and everyone is done with the stage before
    if (stage + step_stages - 1 < count) fetch(stage + step_stages - 1);
    commit_copies();
    FUSEDRNN_UNROLL
    for (int block = 0; block < step_blocks; ++block) {
      const auto words_of = [&](int row) {
        return load_words(stages, static_cast<int>(stage % step_stages) * stage_values +
                                      ((block * stage_rows + row) * words + lane % 4) * word_values);
      };
      const int row = row_tile * tile_rows + lane / 4;
      const Rows rows = A::weights(Rows{words_of(row), words_of(row + tile_rows / 2)});
      FUSEDRNN_UNROLL
      for (int n = 0; n < column_groups; ++n) {
        Words h[A::column_words];
        FUSEDRNN_UNROLL
        for (int k = 0; k < A::column_words; ++k)
          h[k] = words_of(step_rows + first_column + n * columns + A::column(lane, k));
        A::multiply(c[n], rows, h);
      }
    }
  }
  wait_copies<0>();
  sync();

  constexpr int sums_row = step_columns + 1;
  const sptr<Real> sums(0, step_rows * sums_row);
  FUSEDRNN_UNROLL
  for (int n = 0; n < column_groups; ++n) {
    Real result[tile_sums];
    A::finish(result, c[n], lane);
    FUSEDRNN_UNROLL
    for (int s = 0; s < tile_sums; ++s)
      store(sums,
            (row_tile * tile_rows + lane / 4 + s / 2 * tile_rows / 2) * sums_row + first_column + n * columns +
                lane % 4 * 2 + s % 2,
            result[s]);
  }
  sync();
  at.each([&](int unit, int row) {
    const int u = at.first_unit + unit, b = at.first_row + row;
    Real total[Pass::rows], state[Pass::states];
    Value values[Pass::rings];
    FUSEDRNN_UNROLL
    for (int r = 0; r < Pass::rows; ++r)
      total[r] = at.pass.bias(r, u) + load(sums, (r * g.units + unit) * sums_row + row);
    FUSEDRNN_UNROLL
    for (int s = 0; s < Pass::states; ++s) state[s] = load(at.states, at.state_at(s, unit, row));
    at.pass.finish(step, u, b, at.pass.fetch(step, u, b), total, state, values);
    if (step + 1 < at.pass.steps()) at.leave(step + 1, unit, row, state, values);
  });
}

}  // namespace fusedrnn::cuda
