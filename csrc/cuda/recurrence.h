// The persistent kernel: one launch takes a pass (passes.h) through all of time.
//
// A CTA owns some hidden units, all their rows of weights, and a slice of the batch. Its warps divide the rows into
// groups and what is summed over into groups: the more groups of the sum, the fewer bytes of the ring a warp reads, the
// more partial sums meet in shared memory. Each warp holds its part of the weights for the whole sequence: the first
// blocks in registers, the next ones in shared memory; what fits in neither is read from the L2 cache at each step.
//
// A step goes through the slice eight sequences at a time: products, partial sums to shared memory, then one thread per
// (unit, sequence) adds them up in a fixed order and computes the unit.
#pragma once

#include "exchange.h"
#include "passes.h"

namespace fusedrnn::cuda {

// Partial sums lie in rows of one more than the columns, so that neither writing nor reading meets in one bank.
constexpr int sums_row = columns + 1;

// A warp's part of the product of weights with the ring.
template <class Pass>
class Product {
  using A = typename Pass::Arith;
  using Value = typename Pass::Value;
  using Real = typename Pass::Real;
  static constexpr int tiles = Pass::tiles, held = held_blocks(A::kind, Pass::is_backward) / tiles;
  static constexpr int block_values = block_bytes / sizeof(Value), word_values = sizeof(Words) / sizeof(Value);

 public:
  FUSEDRNN_DEVICE Product(const Pass& pass, const Geometry& g, int first_unit, int H)
      : g_(g),
        lane_(thread_index() % lanes),
        row_group_(thread_index() / lanes % g.row_groups),
        k_group_(thread_index() / lanes / g.row_groups),
        matrix_(pass.weights()),
        stride_(pass.weights_stride()),
        in_shared_(g.weights_at + thread_index() / lanes * shared_words() * static_cast<int>(sizeof(Words)),
                   shared_words()) {
    const int each = (g.blocks + g.k_groups - 1) / g.k_groups, left = g.blocks - k_group_ * each;
    first_ = k_group_ * each;
    count_ = left < 0 ? 0 : left < each ? left : each;
    FUSEDRNN_UNROLL
    for (int i = 0; i < tiles; ++i) FUSEDRNN_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = (row_group_ * tiles + i) * tile_rows + half * tile_rows / 2 + lane_ / 4;
      const int gate = row / g.units, unit = first_unit + row % g.units;
      row_[i][half] = gate < Pass::rows && unit < H ? gate * H + unit : -1;
    }
    FUSEDRNN_UNROLL
    for (int j = 0; j < held; ++j)
      if (j < count_) {
        FUSEDRNN_UNROLL
        for (int i = 0; i < tiles; ++i) in_registers_[j][i] = weights(j, i);
      }
    for (int j = held; j < count_ && j < held + g.shared_blocks; ++j) FUSEDRNN_UNROLL
    for (int i = 0; i < tiles; ++i) {
      const Rows rows = weights(j, i);
      store_words(in_shared_, shared_place(j, i), rows.low);
      store_words(in_shared_, shared_place(j, i) + lanes, rows.high);
    }
  }

  // The products of step's ring rows [column, column + 8), from place `first` of `sums` on, to be added up over the k
  // groups by the reader.
  template <class Ring>
  FUSEDRNN_DEVICE void run(const Ring& exchange, int64_t step, int column, sptr<Real> sums, int first) const {
    Real c[tiles][A::sums];
    FUSEDRNN_UNROLL
    for (int i = 0; i < tiles; ++i) FUSEDRNN_UNROLL
    for (int s = 0; s < A::sums; ++s) c[i][s] = Real(0);

    // The ring's blocks from j on: as many as `h` takes, but not those from `end` on.
    constexpr int words = A::column_words;
    const auto read = [&](auto& h, int j, int end) {
      exchange.read(
          step, h, (end - j) * words, [&](int k) { return column + A::column(lane_, k % words); },
          [&](int k) { return (first_ + j + k / words) * block_values + lane_ % 4 * word_values; });
    };
    // As many loads on their way at once as registers allow.
    constexpr int ahead = held < A::ahead ? held : A::ahead;
    FUSEDRNN_UNROLL
    for (int j = 0; j < held; j += ahead) {
      Words h[ahead * words];
      read(h, j, count_ < held ? count_ : held);
      FUSEDRNN_UNROLL
      for (int k = 0; k < ahead; ++k)
        if (j + k < held && j + k < count_) {
          FUSEDRNN_UNROLL
          for (int i = 0; i < tiles; ++i) A::multiply(c[i], in_registers_[j + k][i], h + k * words);
        }
    }
    const int on_chip = held + g_.shared_blocks;
    constexpr int further_ahead = (A::ahead + 1) / 2;  // the weights are on their way as well
    for (int j = held; j < count_; j += further_ahead) {
      Words h[further_ahead * words];
      read(h, j, count_);
      FUSEDRNN_UNROLL
      for (int k = 0; k < further_ahead; ++k)
        if (j + k < count_) {
          FUSEDRNN_UNROLL
          for (int i = 0; i < tiles; ++i) {
            const Rows rows = j + k < on_chip ? Rows{load_words(in_shared_, shared_place(j + k, i)),
                                                     load_words(in_shared_, shared_place(j + k, i) + lanes)}
                                              : weights(j + k, i);
            A::multiply(c[i], rows, h + k * words);
          }
        }
    }

    const int rows = g_.row_groups * tiles * tile_rows;
    FUSEDRNN_UNROLL
    for (int i = 0; i < tiles; ++i) {
      Real result[tile_sums];
      A::finish(result, c[i], lane_);
      const int row = k_group_ * rows + (row_group_ * tiles + i) * tile_rows + lane_ / 4;
      FUSEDRNN_UNROLL
      for (int s = 0; s < tile_sums; ++s)
        store(sums, first + (row + s / 2 * tile_rows / 2) * sums_row + lane_ % 4 * 2 + s % 2, result[s]);
    }
  }

 private:
  FUSEDRNN_DEVICE int shared_words() const { return g_.shared_blocks * tiles * 2 * lanes; }
  FUSEDRNN_DEVICE int shared_place(int j, int i) const { return ((j - held) * tiles + i) * 2 * lanes + lane_; }

  // From global memory: this thread's share of the warp's j-th block of tile i.
  FUSEDRNN_DEVICE Rows weights(int j, int i) const {
    const int value = (first_ + j) * block_values + lane_ % 4 * word_values;
    Rows rows{};
    if (row_[i][0] >= 0) rows.low = load_words(matrix_, row_[i][0] * stride_ + value);
    if (row_[i][1] >= 0) rows.high = load_words(matrix_, row_[i][1] * stride_ + value);
    return A::weights(rows);
  }

  const Geometry& g_;
  const int lane_, row_group_, k_group_;
  const gptr<const Value> matrix_;
  const int64_t stride_;
  const sptr<Words> in_shared_;
  int first_, count_;  // blocks of this warp
  int row_[tiles][2];  // of the matrix; -1 where there is none
  Rows in_registers_[held][tiles];
};

template <class Pass, template <class> class Ring>
FUSEDRNN_KERNEL(most_warps* lanes)
persistent(FUSEDRNN_ARGUMENTS(Arguments, arguments)) {
  using Value = typename Pass::Value;
  using Real = typename Pass::Real;
  const Geometry& g = arguments.geometry;
  const int unit_block = cta_index() % g.unit_blocks, group = cta_index() / g.unit_blocks;
  const int slice = group % g.slices;
  const Pass pass(arguments, g.first_direction + group / g.slices);
  const int64_t B = pass.sequence().B;
  const int H = static_cast<int>(pass.sequence().H);
  const int first_unit = unit_block * g.units, first_row = slice * g.slice;
  const int rows_here = B - first_row < g.slice ? static_cast<int>(B) - first_row : g.slice;
  const int sums_count = g.k_groups * g.row_groups * Pass::tiles * tile_rows * sums_row;

  const sptr<Real> sums(g.sums_at, 2 * sums_count);
  const sptr<Real> bias(g.bias_at, Pass::rows * g.units);
  const sptr<Real> states(g.states_at, Pass::states * g.slice * g.units);
  const Ring<Value> exchange(g, {unit_block, group, rows_here, Pass::rings * H});
  const Product<Pass> product(pass, g, first_unit, H);

  for (int i = thread_index(); i < Pass::rows * g.units; i += thread_count())
    if (first_unit + i % g.units < H) store(bias, i, pass.bias(i / g.units, first_unit + i % g.units));

  // The threads share the slice's (unit, sequence) pairs of eight sequences at a time, neighbours having neighbouring
  // units. With u units there are 8 u pairs, and rows * u <= row groups * tiles * 16.
  constexpr int most = (Pass::tiles * tile_rows * columns + Pass::rows * lanes - 1) / (Pass::rows * lanes);
  const auto each = [&](int column, auto&& f) {
    FUSEDRNN_UNROLL
    for (int e = 0; e < most; ++e) {
      const int pair = thread_index() + e * thread_count();
      const int unit = pair % g.units, row = column + pair / g.units;
      if (pair < columns * g.units && first_unit + unit < H && row < rows_here) f(e, unit, row);
    }
  };
  const auto state_at = [&](int s, int unit, int row) { return (s * g.slice + row) * g.units + unit; };
  const auto leave = [&](int64_t step, int unit, int row, const Real(&state)[Pass::states],
                         const Value(&ring)[Pass::rings]) {
    FUSEDRNN_UNROLL
    for (int s = 0; s < Pass::states; ++s) store(states, state_at(s, unit, row), state[s]);
    FUSEDRNN_UNROLL
    for (int k = 0; k < Pass::rings; ++k) exchange.write(step, row, k * H + first_unit + unit, ring[k]);
  };

  for (int column = 0; column < rows_here; column += columns)
    each(column, [&](int, int unit, int row) {
      Real state[Pass::states];
      Value ring[Pass::rings];
      pass.begin(first_unit + unit, first_row + row, state, ring);
      leave(0, unit, row, state, ring);
    });
  exchange.publish();

  int64_t turn = 0;
  for (int64_t step = 0; step < pass.steps(); ++step) {
    typename Pass::Fetched fetched[most];
    const auto fetch = [&](int column) {
      each(column,
           [&](int e, int unit, int row) { fetched[e] = pass.fetch(step, first_unit + unit, first_row + row); });
    };
    fetch(0);
    exchange.await(step);
    for (int column = 0; column < rows_here; column += columns, ++turn) {
      if (column > 0) fetch(column);
      // The buffer's last readers have met the others at the barrier of the turn between.
      const int part = buffer_of<2>(turn) * sums_count;
      product.run(exchange, step, column, sums, part);
      sync();
      each(column, [&](int e, int unit, int row) {
        Real total[Pass::rows], state[Pass::states];
        Value ring[Pass::rings];
        FUSEDRNN_UNROLL
        for (int r = 0; r < Pass::rows; ++r) {
          const int first = part + (r * g.units + unit) * sums_row + row - column;
          total[r] = load(bias, r * g.units + unit);
          for (int k = 0; k < g.k_groups; ++k)
            total[r] += load(sums, k * g.row_groups * Pass::tiles * tile_rows * sums_row + first);
        }
        FUSEDRNN_UNROLL
        for (int s = 0; s < Pass::states; ++s) state[s] = load(states, state_at(s, unit, row));
        pass.finish(step, first_unit + unit, first_row + row, fetched[e], total, state, ring);
        if (step + 1 < pass.steps()) leave(step + 1, unit, row, state, ring);
      });
    }
    if (step + 1 < pass.steps()) exchange.publish();
  }
}

}  // namespace fusedrnn::cuda
