// The time loops: forward and backward over a whole sequence, for any cell.
//
// Work is divided among threads in one of two ways (Plan). By rows: each thread takes some sequences of the batch
// through all of time; no thread waits for another until the end. By units: each thread computes some hidden units of
// every sequence, and all meet at a barrier after each step; for batches too small to be split.
//
// Time goes in chunks. Forward projects a chunk's inputs (x W_ih^T) just before its steps need them, or, where a step
// has many rows, within the step itself; backward turns a chunk's gate gradients into gradients of weights and inputs
// just after its steps produced them, so that either is still in the cache.

// How a call is divided.
struct Plan {
  int threads;
  bool by_rows;
  int64_t rows;   // the most that one thread handles at a step
  int64_t chunk;  // steps between meetings of recurrence and large products
  bool ragged;    // not all sequences need have all steps
};

//
// With fewer flops than `least_step` a step is not worth its barrier (Zen 5, 2 threads instead of 1: inference of LSTM
// 1000,1,96,96 took 2.07 ms instead of 1.63, of 1000,1,128,128 2.58 instead of 2.85; training of 1000,2,64,64 2.50
// instead of 2.74, as backward has much besides the steps).
template <class T>
static Plan make_plan(const Layer<T>& a, int gates, int threads, int64_t chunk_tokens, double least_step) {
  // Below about 20 us of work a second thread costs more than it brings: 5 us to start it, as much to stop.
  const double step_work = 2.0 * (double)a.seq.B * (double)a.R * (double)(gates * a.H);
  const double work = 2.0 * (double)a.seq.tokens() * (double)(a.I + a.R) * (double)(gates * a.H) * a.directions;
  Plan plan{threads, false, a.seq.B, 1, a.seq.sizes != nullptr};
  if (work < 2e6) plan.threads = 1;
  plan.by_rows = plan.threads > 1 && a.seq.B >= 4 * plan.threads;
  if (!plan.by_rows && step_work < least_step) plan.threads = 1;
  if (plan.by_rows && !a.seq.sizes) plan.rows = ceil_div(a.seq.B, plan.threads);
  plan.chunk = larger(2, smaller(a.seq.T, chunk_tokens / larger(1, plan.rows)));
  return plan;
}

// Vectors of a recurrent panel. A panel is the least that a thread can take of the units. Where sequences end on the
// way fewer and fewer rows are left, hence panels as for few (Zen 5, 100,32,128,128 with 56% of the tokens, training on
// 2 threads, time per token / that of the dense batch: RNN 1.26 -> 1.17, LSTM 1.14 -> 1.08).
template <class T>
static int panel_vectors(const Plan& plan, int64_t H) {
  const int64_t few = 6, rows = plan.ragged ? smaller(plan.rows, few) : plan.rows;
  int vectors = Block<T>::vectors_for(larger(1, rows), H);
  if (!plan.by_rows && plan.threads > 1)
    while (vectors > 1 && ceil_div(H, vectors * Block<T>::width) < 2 * plan.threads) --vectors;
  return vectors;
}

struct Range {
  int64_t first, last;
};

// The k-th of a range at step i: every other step goes backwards, and so begins with what the one before left in the
// cache (Zen 5, 1 MB of L2, inference of LSTM 100,1,512,512: 6.05 and 5.56 ms).
static inline int64_t in_turn(Range range, int64_t k, int64_t i) {
  return i & 1 ? range.last - 1 - (k - range.first) : k;
}

// The rank-th of `size` even parts of n.
static inline Range part(int64_t n, int rank, int size) { return {n * rank / size, n * (rank + 1) / size}; }

// Sequences of the rank-th thread, so that the one with most to do has as little as possible. A step costs a thread
// about as much as one sequence more (Zen 5: 1.2 to 1.4), so that the one with the longest sequences gets fewer tokens.
static inline Range rows_part(const Sequence& seq, int rank, int size) {
  if (!seq.sizes) return part(seq.B, rank, size);
  // Those of the last of some threads, when each takes from the longest left as many as cost it no more than `most`.
  const auto take = [&](int64_t most, int threads) {
    Range rows{0, 0};
    for (int64_t length = seq.T; threads > 0; --threads) {
      rows.first = rows.last;
      for (int64_t cost = 0; rows.last < seq.B; ++rows.last) {
        while (length > 0 && seq.sizes[length - 1] <= rows.last) --length;
        cost += rows.last == rows.first ? 2 * length : length;
        if (cost > most) break;
      }
    }
    return rows;
  };
  int64_t low = 0, high = seq.tokens() + seq.T;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (take(middle, size).last < seq.B)
      low = middle + 1;
    else
      high = middle;
  }
  return take(low, rank + 1);
}

// Zeros behind the end of each sequence of a padded batch: some steps for each thread.
template <class T>
static void clear_padding(const Sequence& seq, const TokenRows<T>& rows, int64_t width, const Team& team) {
  if (!seq.order || !rows.data) return;
  const Range steps = part(seq.T, team.rank, team.size);
  for (int64_t t = steps.first; t < steps.last; ++t)
    for (int64_t b = seq.size(t); b < seq.B; ++b) {
      T* row = rows.at(seq, t, b);
      for (int64_t j = 0; j < width; ++j) row[j] = 0;
    }
}

// A thread's share of every division, and its own scratch.
template <class T>
struct Share {
  Range rows, units, outputs;  // sequences; panels of hidden units; panels of the output h
  SumOf<T>* sums;              // products of a group of rows with one panel per gate
  const T** left;              // rows to multiply
  SumOf<T>** places;           // where their products go
  T* masked;                   // h as it enters the recurrent products, if they see it through a mask
};

// Rows that are multiplied with a panel before their gates are computed: their products stay in the first-level cache.
constexpr int64_t group_blocks = 4;
template <class T>
constexpr int64_t group_rows = group_blocks * Block<T>::max_rows;

// Calls f(row, n) for groups of rows [first, last): as few blocks of the micro-kernel as possible, of even size.
template <class T, class F>
FUSEDRNN_INLINE void for_groups(int64_t first, int64_t last, F&& f) {
  const int64_t n = last - first, blocks = ceil_div(n, Block<T>::max_rows);
  for (int64_t b = 0; b < blocks; b += group_blocks) {
    const int64_t row = first + n * b / blocks;
    f(row, first + n * smaller(b + group_blocks, blocks) / blocks - row);
  }
}

// Calls f(Math<SumOf<T>, N>, j, lanes) for columns [first, last), two or three full vectors at a time; `lanes` of a
// single vector exist.
template <class T, class F>
FUSEDRNN_INLINE void for_vectors(int64_t first, int64_t last, F&& f) {
  using Sum = SumOf<T>;
  constexpr int64_t W = Simd<Sum>::width;
  if constexpr (FUSEDRNN_VECTOR_BYTES == 64)
    if (((last - first) / W & 1) != 0 && first + 3 * W <= last) f(Math<Sum, 3>{}, first, (int)W), first += 3 * W;
  for (; first + 2 * W <= last; first += 2 * W) f(Math<Sum, 2>{}, first, (int)W);
  for (; first < last; first += W) f(Math<Sum, 1>{}, first, (int)smaller(W, last - first));
}

// The columns of some panels.
template <class T>
static Range columns_of(const Panels<T>& panels, Range mine) {
  return mine.first < mine.last ? Range{panels.first(mine.first), panels.last(mine.last - 1)} : Range{0, 0};
}

// What zoneout leaves of the state before in the units from `place` on, as many as M computes at once.
template <class M, class T, class V = typename M::V>
FUSEDRNN_INLINE V zoned_out(const Zoneout& zoneout, int s, int64_t place) {
  constexpr int64_t lanes = sizeof(V) / sizeof(T);
  T each[lanes];
  for (int64_t k = 0; k < lanes; ++k) each[k] = (T)zoneout.stays(s, place + k);
  return M::load(each);
}

// to[b] = from[b] times a mask of its own, for some columns.
template <class Value, class T>
static void apply_mask(const Value* from, const T* mask, int64_t columns, Value* to) {
  for (int64_t j = 0; j < columns; ++j) to[j] = from[j] * mask[j];
}

template <class T, class Cell>
class ForwardPass {
  using Sum = SumOf<T>;
  using S = Simd<Sum>;
  using V = typename S::V;
  static constexpr int G = Cell::gates, W = S::width, states = Cell::states;
  static constexpr int64_t group = group_rows<T>;
  // Whether h as products take it has fewer bits than the cell computes.
  static constexpr bool narrow = sizeof(T) < sizeof(Sum);

 public:
  // Whether a step computes the products of its inputs itself. That spares writing and reading them, but reads W_ih at
  // every step (Zen 5, LSTM forward of training 100,64,256,256: 36.7 against 39.5 ms; inference 35,20,650,650: 27.9
  // against 27.2). It decides how they are rounded, so it must not depend on how many threads there are in the end.
  static bool input_products_within(const Forward<T>& a, int threads) {
    const int64_t rows = plan(a, threads).rows, bytes = G * a.H * a.I * (int64_t)sizeof(T);
    return !a.batch_invariant && rows >= 12 && bytes <= rows << 17 && bytes <= int64_t{1} << 23;
  }

  ForwardPass(const Forward<T>& args, int threads, bool within)
      : a_(args),
        plan_(plan(args, threads)),
        state_width_(round_up(args.H, W)),
        output_width_(round_up(args.R, W)),
        within_(within) {
    keeps_gates_ = a_.saved && Cell::kept && !a_.recompute;
    in_place_ = keeps_gates_ && sizeof(T) == sizeof(Sum);
    gates_width_ = (in_place_ ? Cell::kept : G) * a_.H;
    const int64_t weights = a_.directions * G * a_.H * (a_.I + a_.R) * (int64_t)sizeof(T);
    const bool may_keep = !a_.saved && a_.seq.tokens() <= 1024 && weights <= (int64_t)kept_limit();
    // Packing a weight costs about as much as eight uses of it unpacked; to look whether what is kept is still right,
    // as much as two.
    packs_ = a_.seq.tokens() > (may_keep ? 2 : 8) || within_ || a_.batch_invariant;
    keeps_ = packs_ && may_keep;
  }

  int planned_threads() const { return plan_.threads; }

  // Runs and returns the size of the team. If that is not the planned one nothing has been done.
  int run() {
    Arena measure{nullptr};
    lay_out(measure);
    const Workspace workspace(measure.used);
    Arena arena{workspace.data()};
    lay_out(arena);
    if (!keeps_) return work_in_team();
    Arena size{nullptr};
    lay_out_weights(size);
    const Weights<const T>& w = a_.weights[0];
    KeptWeights kept({w.w_ih, w.w_hh, G, a_.I, a_.H, a_.R, a_.directions, panel_vectors<T>(plan_, a_.H),
                      FUSEDRNN_VECTOR_BYTES, (int)sizeof(T)},
                     size.used);
    Arena weights{kept.data()};
    lay_out_weights(weights);
    new_ = kept.is_new();
    if (work_in_team() == plan_.threads) kept.keep();
    return team_size_;
  }

 private:
  static Plan plan(const Forward<T>& a, int threads) { return make_plan<T>(a, G, threads, 256, 1e5); }

  int work_in_team() {
    run_team(plan_.threads, [](void* self, const Team& team) { static_cast<ForwardPass*>(self)->work(team); }, this);
    return team_size_;
  }

  // Of one direction, used for both in turn; if they are kept, of each.
  void lay_out_weights(Arena& arena) {
    const size_t begin = arena.used;
    const int vectors = panel_vectors<T>(plan_, a_.H);
    const auto panels = [&](int64_t K, int64_t columns, int matrices) {
      T* data = packs_ ? arena.take<T>(matrices * Panels<T>::size(K, columns)) : nullptr;
      return Panels<T>{data, K, columns, vectors, matrices};
    };
    w_ih_[0] = panels(a_.I, a_.H, G);
    w_hh_[0] = panels(a_.R, a_.H, G);
    for (int g = 1; g < G; ++g) {
      w_ih_[g] = w_ih_[0], w_ih_[g].index = g;
      w_hh_[g] = w_hh_[0], w_hh_[g].index = g;
    }
    if (a_.projected) w_hr_ = panels(a_.H, a_.R, 1);
    if (!keeps_) return;
    const size_t each = arena.used - begin;
    between_directions_ = (int64_t)(each / sizeof(T));
    arena.used += (a_.directions - 1) * each;
    fingerprints_ = arena.take<uint64_t>(a_.directions * fingerprints());
  }

  // How many panels one direction's weights have.
  int64_t fingerprints() const { return 2 * G * w_hh_[0].count() + (a_.projected ? w_hr_.count() : 0); }

  Panels<T> of(int d, Panels<T> w) const {
    if (w.data) w.data += d * between_directions_;
    return w;
  }

  void lay_out(Arena& arena) {
    const int64_t B = a_.seq.B;
    if (!keeps_) lay_out_weights(arena);
    for (int g = 0; g < G; ++g) {
      bias_x_[g] = arena.take<Sum>(state_width_);
      bias_r_[g] = arena.take<Sum>(state_width_);
    }
    for (T*& h : h_) h = arena.take<T>(B * output_width_);
    for (int s = narrow && !a_.projected ? 0 : 1; s < states; ++s) state_[s] = arena.take<Sum>(B * state_width_);
    if (a_.projected) unprojected_ = arena.take<T>(B * state_width_);
    if (!in_place_ && !within_) gates_ = arena.take<Sum>(plan_.chunk * B * gates_width_);
    if (a_.h_mask) masked_ = arena.take<T>(plan_.threads * B * output_width_);
    sums_ = arena.take<Sum>(plan_.threads * sums_size());
    left_ = arena.take<const T*>(plan_.threads * pointers());
    places_ = arena.take<Sum*>(plan_.threads * pointers());
  }

  static constexpr int64_t sums_size() { return Cell::slots * group * Block<T>::max_columns; }
  int64_t pointers() const { return larger(group, plan_.chunk * plan_.rows); }

  void work(const Team& team) {
    if (team.rank == 0) team_size_ = team.size;
    if (team.size != plan_.threads) return;
    Share<T> share{};
    const bool by_rows = plan_.by_rows;
    share.rows = by_rows ? rows_part(a_.seq, team.rank, team.size) : Range{0, a_.seq.B};
    share.units = by_rows ? Range{0, w_hh_[0].count()} : part(w_hh_[0].count(), team.rank, team.size);
    if (a_.projected) share.outputs = by_rows ? Range{0, w_hr_.count()} : part(w_hr_.count(), team.rank, team.size);
    share.sums = sums_ + team.rank * sums_size();
    share.left = left_ + team.rank * pointers();
    share.places = places_ + team.rank * pointers();
    if (a_.h_mask) share.masked = masked_ + team.rank * a_.seq.B * output_width_;
    clear_padding(a_.seq, a_.output, a_.directions * a_.R, team);
    for (int s = 1; s < states; ++s) clear_padding(a_.seq, a_.states[s], a_.directions * a_.H, team);
    for (int d = 0; d < a_.directions; ++d) {
      prepare(d, team);
      team.sync();
      for (int64_t begin = 0; begin < a_.seq.T; begin += plan_.chunk) {
        const int64_t end = smaller(a_.seq.T, begin + plan_.chunk);
        if (!within_) project_inputs(d, share, begin, end);
        for (int64_t i = begin; i < end; ++i) {
          step(d, share, begin, i);
          if (a_.projected) {
            if (!by_rows) team.sync();
            project_output(d, share, i);
          }
          finish(d, share, i);
          if (a_.seq.resets) start_anew(d, share, i + 1);
          if (!by_rows) team.sync();
        }
      }
      team.sync();
    }
  }

  int64_t time(int d, int64_t i) const { return d == 0 ? i : a_.seq.T - 1 - i; }

  // Whether the cell wants the input and the recurrent product of gate g apart, not their sum.
  static constexpr bool apart(int g) { return Cell::input_slot[g] != Cell::recurrent_slot[g]; }

  // out = or += n rows times panel p of w; or =, where w is not packed, times the same columns of its origin.
  void multiply(const T* const* rows, int64_t n, const Panels<T>& w, int64_t p, const T* unpacked, Sum* out,
                bool add = false) const {
    const int nv = w.vectors_of(p);
    if (w.data)
      multiply_panel(rows, n, w.K, w.panel(p), nv, out, nv * W, add);
    else
      multiply_unpacked(rows, n, w.K, unpacked, w.first(p), w.last(p), out, nv * W);
  }

  // Packs weights, adds biases, copies initial states: a part each.
  void prepare(int d, const Team& team) {
    const Weights<const T>& w = a_.weights[d];
    const int64_t H = a_.H, B = a_.seq.B, panels = w_hh_[0].count();
    const Range mine = part(G * panels, team.rank, team.size);
    for (int64_t item = mine.first; item < mine.last; ++item) {
      const int64_t g = item / panels, p = item % panels;
      pack(of(d, w_ih_[g]), p, w.w_ih + g * H * a_.I, d * fingerprints() + item);
      pack(of(d, w_hh_[g]), p, w.w_hh + g * H * a_.R, d * fingerprints() + G * panels + item);
      for (int64_t j = w_hh_[g].first(p); j < w_hh_[g].last(p); ++j) {
        const Sum x = w.b_ih ? w.b_ih[g * H + j] : T(0), r = w.b_hh ? w.b_hh[g * H + j] : T(0);
        bias_x_[g][j] = apart(g) ? x : x + r;
        bias_r_[g][j] = apart(g) ? r : Sum(0);
      }
    }
    if (a_.projected) {
      const Range outputs = part(w_hr_.count(), team.rank, team.size);
      for (int64_t p = outputs.first; p < outputs.last; ++p)
        pack(of(d, w_hr_), p, w.w_hr, d * fingerprints() + 2 * G * panels + p);
    }
    const Range rows = part(B, team.rank, team.size);
    for (int64_t b = rows.first; b < rows.last; ++b)
      for (int s = 0; s < states; ++s) {
        const int64_t width = a_.state_width(s), padded = s == 0 ? output_width_ : state_width_;
        const T* initial = a_.initial(d, s, 0, b);
        const bool empty = b >= a_.seq.size(0);
        for (int64_t j = 0; j < padded; ++j) {
          const T value = initial && j < width ? initial[j] : T(0);
          if (empty && j < width) a_.final[s][a_.state_at(d, s, b) + j] = value;
          if (s == 0) h_[0][b * padded + j] = h_[1][b * padded + j] = value;
          if (state_[s]) state_[s][b * padded + j] = value;
        }
      }
  }

  // Packs a panel, unless an earlier call has done it and its weights are still the same.
  void pack(Panels<T> packed, int64_t p, const T* w, int64_t index) const {
    if (!packed.data) return;
    if (keeps_) {
      const uint64_t now = fingerprint(w + packed.first(p) * packed.K, (packed.last(p) - packed.first(p)) * packed.K);
      if (!new_ && fingerprints_[index] == now) return;
      fingerprints_[index] = now;
    }
    pack_transposed(packed, p, w);
  }

  // Where the input products of row b at order i wait for their step.
  Sum* products_at(int d, int64_t begin, int64_t i, int64_t b) const {
    if (within_) return nullptr;
    if (!in_place_) return gates_ + ((i - begin) * a_.seq.B + b) * gates_width_;
    return reinterpret_cast<Sum*>(kept_at(d, i, b));
  }

  // Where backward will find what the cell keeps of row b at order i.
  T* kept_at(int d, int64_t i, int64_t b) const {
    return saved(d).kept + (a_.seq.start(time(d, i)) + b) * Cell::kept * a_.H;
  }

  Saved<T> saved(int d) const {
    const int64_t tokens = a_.seq.tokens();
    const int kept = a_.recompute ? 0 : Cell::kept;
    const int64_t each = saved_size(kept, states, tokens, a_.H, a_.R, a_.projected);
    return saved_view(a_.saved + d * each, kept, states, tokens, a_.H);
  }

  // gates = x W_ih^T + bias for the rows and units of one thread, orders [begin, end).
  void project_inputs(int d, const Share<T>& share, int64_t begin, int64_t end) {
    int64_t count = 0;
    for (int64_t i = begin; i < end; ++i)
      for (int64_t b = share.rows.first; b < smaller(share.rows.last, a_.seq.size(time(d, i))); ++b) {
        share.left[count] = a_.input.at(a_.seq, time(d, i), b);
        share.places[count++] = products_at(d, begin, i, b);
      }
    for (int64_t p = share.units.first; p < share.units.last; ++p)
      for (int g = 0; g < G; ++g) {
        const Panels<T> w = of(d, w_ih_[g]);
        const int64_t first = w.first(p), columns = w.last(p) - first, ldo = w.vectors_of(p) * W;
        const int64_t place = (in_place_ ? Cell::input_slot[g] : g) * a_.H + first;
        for_groups<T>(0, count, [&](int64_t r, int64_t n) {
          multiply(share.left + r, n, w, p, a_.weights[d].w_ih + g * a_.H * a_.I, share.sums);
          for (int64_t k = 0; k < n; ++k)
            for (int64_t j = 0; j < columns; j += W)
              S::store(share.places[r + k] + place + j,
                       S::load(share.sums + k * ldo + j) + S::load(bias_x_[g] + first + j),
                       (int)smaller(W, columns - j));
        });
      }
  }

  // One time step for the rows and units of one thread.
  void step(int d, const Share<T>& share, int64_t begin, int64_t i) {
    const int64_t t = time(d, i), last_row = smaller(share.rows.last, a_.seq.size(t));
    const T* h = h_[i & 1];
    const T* entering = a_.h_mask ? share.masked : h;
    if (a_.h_mask)
      for (int64_t b = share.rows.first; b < last_row; ++b)
        apply_mask(h + b * output_width_, a_.h_mask + a_.state_at(d, 0, b), a_.R, share.masked + b * output_width_);
    for (int64_t k = share.units.first; k < share.units.last; ++k) {
      const int64_t p = in_turn(share.units, k, i), first = w_hh_[0].first(p), last = w_hh_[0].last(p);
      const int nv = w_hh_[0].vectors_of(p);
      for_groups<T>(share.rows.first, last_row, [&](int64_t row, int64_t n) {
        const int64_t plane = group * nv * W;  // of each slot
        if (within_) {
          for (int64_t k = 0; k < n; ++k) share.left[k] = a_.input.at(a_.seq, t, row + k);
          for (int g = 0; g < G; ++g)
            multiply(share.left, n, of(d, w_ih_[g]), p, nullptr, share.sums + Cell::input_slot[g] * plane);
        }
        for (int64_t k = 0; k < n; ++k) share.left[k] = entering + (row + k) * output_width_;
        for (int k = 0; k < G; ++k) {
          const int g = (int)in_turn({0, G}, k, i);
          multiply(share.left, n, of(d, w_hh_[g]), p, a_.weights[d].w_hh + g * a_.H * a_.R,
                   share.sums + Cell::recurrent_slot[g] * plane, within_ && !apart(g));
        }
        for (int64_t k = 0; k < n; ++k) {
          const Destination to = destination(d, begin, i, t, row + k);
          for_vectors<T>(first, last, [&](auto M, int64_t j, int lanes) __attribute__((always_inline)) {
            gates<decltype(M)>(to, h + (row + k) * output_width_, share.sums + k * nv * W + (j - first), plane, j,
                               lanes);
          });
        }
      });
    }
  }

  // Where one row's values of one step go; null what is not wanted.
  struct Destination {
    Sum* products;  // of the inputs, unless the step makes them
    T *kept, *h, *output;
    Sum* state[states];      // carried states, see state_
    T* every_state[states];  // their values at each step
    T* saved_state[states];  // for backward
    int64_t lots[states];    // of zoneout
  };

  Destination destination(int d, int64_t begin, int64_t i, int64_t t, int64_t b) const {
    Destination to{};
    to.products = products_at(d, begin, i, b);
    if (keeps_gates_) to.kept = kept_at(d, i, b);
    to.h = a_.projected ? unprojected_ + b * state_width_ : h_[(i + 1) & 1] + b * output_width_;
    if (a_.output.data && !a_.projected) to.output = a_.output.at(a_.seq, t, b) + d * a_.R;
    for (int s = 0; s < states; ++s)
      if (state_[s]) to.state[s] = state_[s] + b * state_width_;
    for (int s = 1; s < states; ++s) {
      if (a_.states[s].data) to.every_state[s] = a_.states[s].at(a_.seq, t, b) + d * a_.H;
    }
    for (int s = 0; s < states; ++s) to.lots[s] = a_.lots_at(d, s, t, b);
    if (a_.saved)
      for (int s = 0; s < states; ++s) to.saved_state[s] = saved(d).state[s] + (a_.seq.start(t) + b) * a_.H;
    return to;
  }

  // The gates of units [j, j + M::width) of one row.
  template <class M, class V = typename M::V>
  inline __attribute__((always_inline)) void gates(const Destination& to, const T* h, const Sum* sums, int64_t plane,
                                                   int64_t j, int lanes) const {
    V x[G], r[G], prev[states], next[states], keep[Cell::slots];
    for (int g = 0; g < G; ++g) {
      if (within_) {
        x[g] = M::load(bias_x_[g] + j);
        if (apart(g)) x[g] = x[g] + M::load(sums + Cell::input_slot[g] * plane);
      } else {
        x[g] = M::load(to.products + (in_place_ ? Cell::input_slot[g] : g) * a_.H + j, lanes);
      }
      r[g] = M::load(sums + Cell::recurrent_slot[g] * plane);
      if (apart(g)) r[g] = r[g] + M::load(bias_r_[g] + j);
    }
    if constexpr (narrow)
      prev[0] = a_.projected ? M::zero() : M::load(to.state[0] + j);
    else
      prev[0] = a_.projected ? M::zero() : M::load(h + j);
    for (int s = 1; s < states; ++s) prev[s] = M::load(to.state[s] + j);
    Cell::template forward<M>(x, r, prev, next, keep);
    for (int s = 0; s < states; ++s)
      if (a_.zoneout.rate[s] > 0) {
        const V stays = zoned_out<M, Sum>(a_.zoneout, s, to.lots[s] + j);
        // What has no share has none even if it is infinite or NaN.
        const V before = M::where_positive(stays, prev[s]), after = M::where_positive(Sum(1) - stays, next[s]);
        next[s] = M::multiply_add(stays, before, (Sum(1) - stays) * after);
      }
    M::store(to.h + j, next[0]);
    if constexpr (narrow)
      if (to.state[0]) M::store(to.state[0] + j, next[0]);
    for (int s = 1; s < states; ++s) {
      M::store(to.state[s] + j, next[s]);
      if (to.every_state[s]) M::store(to.every_state[s] + j, next[s], lanes);
    }
    if (to.output) M::store(to.output + j, next[0], lanes);
    if (keeps_gates_)
      for (int k = 0; k < Cell::kept; ++k) M::store(to.kept + k * a_.H + j, keep[k], lanes);
    if (a_.saved)
      for (int s = 0; s < states; ++s) M::store(to.saved_state[s] + j, next[s], lanes);
  }

  // h = W_hr (o tanh c) for the rows and outputs of one thread.
  void project_output(int d, const Share<T>& share, int64_t i) {
    const int64_t t = time(d, i), last_row = smaller(share.rows.last, a_.seq.size(t));
    T* h = h_[(i + 1) & 1];
    for (int64_t p = share.outputs.first; p < share.outputs.last; ++p) {
      const int64_t first = w_hr_.first(p), columns = w_hr_.last(p) - first, ldo = w_hr_.vectors_of(p) * W;
      for_groups<T>(share.rows.first, last_row, [&](int64_t row, int64_t n) {
        for (int64_t k = 0; k < n; ++k) share.left[k] = unprojected_ + (row + k) * state_width_;
        multiply(share.left, n, of(d, w_hr_), p, a_.weights[d].w_hr, share.sums);
        for (int64_t k = 0; k < n; ++k)
          for (int64_t j = 0; j < columns; j += W) {
            const V value = S::load(share.sums + k * ldo + j);
            const int lanes = (int)smaller(W, columns - j);
            const int64_t b = row + k;
            S::store(h + b * output_width_ + first + j, value);
            if (a_.output.data) S::store(a_.output.at(a_.seq, t, b) + d * a_.R + first + j, value, lanes);
            if (a_.saved) S::store(saved(d).projected + (a_.seq.start(t) + b) * a_.R + first + j, value, lanes);
          }
      });
    }
  }

  // Final states of the rows whose sequence ends with order i.
  void finish(int d, const Share<T>& share, int64_t i) {
    const int64_t active = a_.seq.size(time(d, i));
    const int64_t stay = i + 1 < a_.seq.T ? smaller(active, a_.seq.size(time(d, i + 1))) : 0;
    for (int64_t b = larger(share.rows.first, stay); b < smaller(share.rows.last, active); ++b)
      for (int s = 0; s < states; ++s) {
        T* to = a_.final[s] + a_.state_at(d, s, b);
        const Range mine = columns(share, s);
        with_carried(s, i + 1, b, [&](auto* from) {
          for (int64_t j = mine.first; j < mine.last; ++j) to[j] = from[j];
        });
      }
  }

  // Of the rows whose segment starts with order i, the states of the reset in place of those carried there.
  void start_anew(int d, const Share<T>& share, int64_t i) {
    for (int64_t b = share.rows.first; b < share.rows.last; ++b)
      if (a_.seq.cut(d, i, b))
        for (int s = 0; s < states; ++s) {
          const T* from = a_.initial(d, s, i, b);
          const Range mine = columns(share, s);
          with_carried(s, i, b, [&](auto* to) {
            for (int64_t j = mine.first; j < mine.last; ++j) to[j] = from ? from[j] : T(0);
          });
        }
  }

  // Calls f with state s of one row as it enters order i.
  template <class F>
  void with_carried(int s, int64_t i, int64_t b, F&& f) const {
    if (s == 0) f(h_[i & 1] + b * output_width_);
    if (state_[s]) f(state_[s] + b * state_width_);
  }

  // The columns of state s that one thread computes.
  Range columns(const Share<T>& share, int s) const {
    const bool outputs = s == 0 && a_.projected;
    return columns_of(outputs ? w_hr_ : w_hh_[0], outputs ? share.outputs : share.units);
  }

  const Forward<T>& a_;
  const Plan plan_;
  int team_size_ = 0;
  const int64_t state_width_, output_width_;  // H and R rounded up to whole vectors
  bool within_;                               // a step projects its inputs itself
  bool keeps_gates_;                          // for backward
  bool in_place_;                             // input products lie where backward will find the gates
  int64_t gates_width_;
  bool packs_, keeps_;      // weights are packed; for later calls too
  bool new_ = true;         // what is kept holds nothing yet
  uint64_t* fingerprints_;  // of the weights that the kept panels were packed from
  int64_t between_directions_ = 0;
  Panels<T> w_ih_[G], w_hh_[G], w_hr_;
  Sum *bias_x_[G], *bias_r_[G];
  T* h_[2];  // h of the previous step and of this one, in turn
  // The other states, and h where h_ has fewer bits: what a GRU adds at a step may be less than those can hold.
  Sum* state_[states] = {};
  T *unprojected_, *masked_;
  Sum *gates_, *sums_;
  const T** left_;
  Sum** places_;
};

template <class T, class Cell>
class BackwardPass {
  using Sum = SumOf<T>;
  using S = Simd<Sum>;
  using V = typename S::V;
  static constexpr int G = Cell::gates, W = S::width, states = Cell::states, slots = Cell::slots;
  static constexpr int64_t group = group_rows<T>, block = Block<T>::max_rows;
  static constexpr int64_t panel_columns = Block<T>::usual_vectors * W;

 public:
  BackwardPass(const Backward<T>& args, int threads)
      : a_(args),
        plan_(make_plan<T>(args, G, threads, backward_chunk(args), 3e4)),
        state_width_(round_up(args.H, W)),
        output_width_(round_up(args.R, W)),
        apart_(plan_.by_rows && weights_size() * (int64_t)sizeof(Sum) <= largest_private) {}

  int planned_threads() const { return plan_.threads; }

  // Runs and returns the size of the team. If that is not the planned one nothing has been done.
  int run() {
    Arena measure{nullptr};
    lay_out(measure);
    const Workspace workspace(measure.used);
    Arena arena{workspace.data()};
    lay_out(arena);
    run_team(
        apart_ ? undisturbed_threads(plan_.threads) : plan_.threads,
        [](void* self, const Team& team) { static_cast<BackwardPass*>(self)->work(team); }, this);
    return team_size_;
  }

 private:
  // What one thread works on, and what it has to itself.
  struct Own {
    Range rows, units, outputs;  // sequences; panels of hidden units; panels of h (the units' unless projected)
    // The same of the products over a chunk's tokens.
    Range token_rows, token_units, token_outputs;
    Sum* sums;       // products of a group of rows with a panel
    const T** left;  // rows to multiply
    // Of each token of a chunk: rows of the input, of h before and after the step, of the gradients.
    const T **x, **h_before, **unprojected, **d_slots, **d_h;
    T** d_x;
    // Of each token of a chunk that this thread's rows have, for the steps' values again.
    const T **again_x, **again_h, **again_prev[states];
    T** again_to;
    T* panel;                  // a panel of such rows
    T* blocks;                 // the gate gradients, packed for products over tokens
    Sum* sum_slots;            // the gate gradients added up over tokens: the biases' gradients
    Weights<Sum> sum_weights;  // where this thread adds up the weights' gradients; null what is not wanted
  };

  // Tokens between two additions to the gradients of the weights: as few as leave those additions cheap, for the fewer
  // the tokens the closer to the processor their gate gradients stay. Backward of LSTM 100,32,128,128 took 11.3 ms with
  // 512, 10.3 with 128; of 100,32,512,512 138 with 512, 154 with 128 (Zen 5).
  static int64_t backward_chunk(const Layer<T>& a) {
    const int64_t bytes = G * a.H * (a.I + a.R) * (int64_t)sizeof(Sum);
    return larger(128, smaller(512, bytes / 16384));
  }

  // Bytes of the weights' gradients that each thread may have to itself. Backward on 2 threads (Zen 5), apart and
  // together: LSTM 100,32,512,512 (8 MB) 78.7 and 74.3 ms; 100,64,256,256 (2 MB) 42.6 and 41.2; 100,32,128,128 (0.5 MB)
  // 5.70 and 5.67; 128,8,64,64 (0.1 MB) 0.71 and 0.89.
  static constexpr int64_t largest_private = 1 << 20;

  // Whether what the cell kept and computed is computed again, chunk by chunk.
  bool again() const { return (a_.recompute && Cell::kept) || a_.zoneout.on(); }

  int64_t slots_width() const { return slots * a_.H; }
  int64_t chunk_tokens() const { return plan_.chunk * (apart_ ? plan_.rows : a_.seq.B); }
  int64_t sums_size() const { return (again() ? slots : 1) * group * Block<T>::max_columns; }
  // Products over tokens take this many at a time.
  int64_t slice() const { return larger(1, smaller(512, chunk_tokens())); }
  // Whole groups of tokens.
  int64_t padded(int64_t tokens) const { return round_up(tokens, Product<T>::depth); }
  int64_t blocks_size() const { return padded(slice()) * larger(slots * round_up(a_.H, block), round_up(a_.R, block)); }
  int64_t weights_size() const { return G * a_.H * (a_.I + a_.R) + (a_.projected ? a_.R * a_.H : 0); }

  void lay_out(Arena& arena) {
    const int64_t B = a_.seq.B, K = G * a_.H, threads = plan_.threads, tokens = chunk_tokens();
    const int vectors = panel_vectors<T>(plan_, a_.H);
    w_hh_ = {arena.take<T>(Panels<T>::size(K, a_.R)), K, a_.R, vectors};
    if (a_.d_input.data) w_ih_ = {arena.take<T>(Panels<T>::size(K, a_.I)), K, a_.I, Block<T>::vectors_for(group, a_.I)};
    if (a_.projected) {
      w_hr_ = {arena.take<T>(Panels<T>::size(a_.R, a_.H)), a_.R, a_.H, vectors};
      d_h_ = arena.take<T>(plan_.chunk * B * a_.R);
    }
    for (int s = 0; s < states; ++s) carry_[s] = arena.take<Sum>(B * (s == 0 ? output_width_ : state_width_));
    d_slots_ = arena.take<T>(plan_.chunk * B * slots_width());
    zeros_ = arena.take<T>(larger(state_width_, output_width_));
    sums_ = arena.take<Sum>(threads * sums_size());
    left_ = arena.take<const T*>(threads * group);
    tokens_ = arena.take<const T*>(threads * 5 * tokens);
    d_x_ = arena.take<T*>(threads * tokens);
    panels_ = arena.take<T>(threads * padded(slice()) * panel_columns);
    blocks_ = arena.take<T>(threads * blocks_size());
    sum_slots_ = arena.take<Sum>(threads * slots_width());
    private_ = arena.take<Sum>(((apart_ ? threads : 1) - first_private) * weights_size());
    for (int s = 0; s < states; ++s) {
      d_reset_[s] = as_sums(a_.d_reset_state[s]);
      if (a_.d_reset_state[s] && !d_reset_[s]) d_reset_[s] = arena.take<Sum>(a_.directions * B * a_.state_width(s));
    }
    if (a_.h_mask) masked_ = arena.take<T>(plan_.chunk * B * a_.R);
    if (again()) lay_out_again(arena, vectors);
  }

  void lay_out_again(Arena& arena, int vectors) {
    const int64_t listed = plan_.threads * plan_.chunk * plan_.rows;
    for (int g = 0; g < G; ++g) {
      again_ih_[g] = {arena.take<T>(Panels<T>::size(a_.I, a_.H)), a_.I, a_.H, vectors};
      again_hh_[g] = {arena.take<T>(Panels<T>::size(a_.R, a_.H)), a_.R, a_.H, vectors};
      bias_x_[g] = arena.take<Sum>(state_width_);
      bias_r_[g] = arena.take<Sum>(state_width_);
    }
    kept_ = arena.take<T>(plan_.chunk * a_.seq.B * kept_width());
    again_lists_ = arena.take<const T*>((2 + states) * listed);
    again_to_ = arena.take<T*>(listed);
  }

  Own own(const Team& team) const {
    const int64_t tokens = chunk_tokens(), rank = team.rank;
    const auto panels = [&](const Panels<T>& w, bool all) {
      return all ? Range{0, w.count()} : part(w.count(), team.rank, team.size);
    };
    const auto rows = [&](bool all) { return all ? Range{0, a_.seq.B} : rows_part(a_.seq, team.rank, team.size); };
    Own o{};
    o.rows = rows(!plan_.by_rows);
    o.outputs = panels(w_hh_, plan_.by_rows);
    o.units = a_.projected ? panels(w_hr_, plan_.by_rows) : o.outputs;
    o.token_rows = rows(!apart_);
    o.token_outputs = panels(w_hh_, apart_);
    o.token_units = a_.projected ? panels(w_hr_, apart_) : o.token_outputs;
    o.sums = sums_ + rank * sums_size();
    o.left = left_ + rank * group;
    const T** list = tokens_ + rank * 5 * tokens;
    o.x = list, o.h_before = list + tokens, o.unprojected = list + 2 * tokens;
    o.d_slots = list + 3 * tokens, o.d_h = list + 4 * tokens;
    o.d_x = d_x_ + rank * tokens;
    o.panel = panels_ + rank * padded(slice()) * panel_columns;
    o.blocks = blocks_ + rank * blocks_size();
    o.sum_slots = sum_slots_ + rank * slots_width();
    if (again()) {
      const int64_t listed = plan_.chunk * plan_.rows;
      const T** first = again_lists_ + rank * (2 + states) * listed;
      o.again_x = first, o.again_h = first + listed;
      for (int s = 0; s < states; ++s) o.again_prev[s] = first + (2 + s) * listed;
      o.again_to = again_to_ + rank * listed;
    }
    return o;
  }

  // Results as memory for sums; null where they are narrower.
  static Sum* as_sums(T* results) { return sizeof(T) == sizeof(Sum) ? reinterpret_cast<Sum*>(results) : nullptr; }

  // Apart, every thread but the first adds up in memory of its own; else each has its own rows of the result. Where the
  // results are narrower than sums they are rounded at the end, and the first adds up in such memory too.
  static constexpr int first_private = sizeof(T) == sizeof(Sum) ? 1 : 0;
  Weights<Sum> sum_weights(int d, int rank) const {
    const Weights<T>& wanted = a_.d_weights[d];
    const int place = (apart_ ? rank : 0) - first_private;
    if (place < 0) return {as_sums(wanted.w_ih), as_sums(wanted.w_hh), nullptr, nullptr, as_sums(wanted.w_hr)};
    Sum* mine = private_ + place * weights_size();
    return {wanted.w_ih ? mine : nullptr, wanted.w_hh ? mine + G * a_.H * a_.I : nullptr, nullptr, nullptr,
            wanted.w_hr ? mine + G * a_.H * (a_.I + a_.R) : nullptr};
  }

  void work(const Team& team) {
    if (team.rank == 0) team_size_ = apart_ ? plan_.threads : team.size;
    if (!apart_ && team.size != plan_.threads) return;
    // As many shares as threads were planned. Apart, one thread may have several, one after the other.
    const auto each_share = [&](auto&& f) {
      for (int share = team.rank; share < plan_.threads; share += team.size)
        f(Team{share, plan_.threads, team.barrier});
    };
    clear_padding(a_.seq, a_.d_input, a_.I, team);
    for (int d = 0; d < a_.directions; ++d) {
      each_share([&](const Team& share) { prepare(d, share); });
      team.sync();
      each_share([&](const Team& share) { chunks(d, share); });
      team.sync();
      each_share([&](const Team& share) { reduce(d, share); });
      team.sync();
    }
  }

  // Through all of time.
  void chunks(int d, const Team& team) {
    Own o = own(team);
    o.sum_weights = sum_weights(d, team.rank);
    for (int64_t j = 0; j < slots_width(); ++j) o.sum_slots[j] = 0;
    for (int64_t end = a_.seq.T; end > 0; end -= plan_.chunk) {
      const int64_t begin = larger(0, end - plan_.chunk);
      if (a_.h_mask) mask_h(d, o, begin, end, team);
      if (again()) compute_again(d, o, begin, end);
      for (int64_t i = end - 1; i >= begin; --i) step(d, o, i, team);
      if (begin == 0) step(d, o, -1, team);
      if (plan_.by_rows && !apart_) team.sync();
      const int64_t tokens = list_tokens(d, o, begin, end);
      for (int64_t token = 0; token == 0 || token < tokens; token += slice())
        weight_gradients(d, o, token, smaller(slice(), tokens - token), token > 0 || end < a_.seq.T);
      if (a_.d_input.data) {
        const Range mine = apart_ ? Range{0, tokens} : part(tokens, team.rank, team.size);
        input_gradients(d, o, mine);
      }
      if (!apart_) team.sync();
    }
  }

  int64_t time(int d, int64_t i) const { return d == 0 ? i : a_.seq.T - 1 - i; }
  int64_t size(int d, int64_t i) const { return i < 0 || i >= a_.seq.T ? 0 : a_.seq.size(time(d, i)); }

  // Whether a row enters order i with what the order before has left. Else with this:
  bool goes_on(int d, int64_t i, int64_t b) const { return b < size(d, i - 1) && !a_.seq.cut(d, i, b); }
  const T* initial(int d, int s, int64_t i, int64_t b) const {
    const T* states = a_.initial(d, s, i, b);
    return states ? states : zeros_;
  }

  void prepare(int d, const Team& team) {
    const Weights<const T>& w = a_.weights[d];
    pack_gates(w_hh_, w.w_hh, a_.R, Cell::recurrent_slot, slots - G, team);
    if (a_.d_input.data) pack_gates(w_ih_, w.w_ih, a_.I, Cell::input_slot, 0, team);
    if (a_.projected) {
      const Range mine = part(w_hr_.count(), team.rank, team.size);
      for (int64_t p = mine.first; p < mine.last; ++p) {
        PanelRows<T> rows(w_hr_, p);
        for (int64_t r = 0; r < a_.R; ++r) rows.add(w.w_hr + r * a_.H);
        rows.finish();
      }
    }
    if (again()) pack_again(w, team);
    const Range rows = part(a_.seq.B, team.rank, team.size);
    for (int s = 0; s < states; ++s) {
      const int64_t width = a_.state_width(s), padded = s == 0 ? output_width_ : state_width_;
      for (int64_t b = rows.first; b < rows.last; ++b) {
        const int64_t at = a_.state_at(d, s, b);
        const bool empty = b >= a_.seq.size(0);
        for (int64_t j = 0; j < padded; ++j) {
          const Sum value = a_.d_final[s] && j < width ? a_.d_final[s][at + j] : T(0);
          carry_[s][b * padded + j] = value;
          if (empty && j < width && a_.d_hx[s]) a_.d_hx[s][at + j] = value;
          if (j < width && d_reset_[s]) d_reset_[s][at + j] = 0;
        }
      }
    }
    if (team.rank == 0)
      for (int64_t j = 0; j < larger(state_width_, output_width_); ++j) zeros_[j] = 0;
  }

  // Packs w (G*H x columns) with its gates in the order of their slots.
  void pack_gates(Panels<T>& packed, const T* w, int64_t columns, const int* slot, int first_slot, const Team& team) {
    const Range mine = part(packed.count(), team.rank, team.size);
    int gate[slots];
    for (int g = 0; g < G; ++g) gate[slot[g] - first_slot] = g;
    for (int64_t p = mine.first; p < mine.last; ++p) {
      PanelRows<T> rows(packed, p);
      for (int k = 0; k < G; ++k)
        for (int64_t j = 0; j < a_.H; ++j) rows.add(w + (gate[k] * a_.H + j) * columns);
      rows.finish();
    }
  }

  // What forward packs to compute the gates.
  void pack_again(const Weights<const T>& w, const Team& team) {
    const int64_t panels = again_hh_[0].count();
    const Range mine = part(G * panels, team.rank, team.size);
    for (int64_t item = mine.first; item < mine.last; ++item) {
      const int64_t g = item / panels, p = item % panels;
      pack_transposed(again_ih_[g], p, w.w_ih + g * a_.H * a_.I);
      pack_transposed(again_hh_[g], p, w.w_hh + g * a_.H * a_.R);
      for (int64_t j = again_hh_[g].first(p); j < again_hh_[g].last(p); ++j) {
        bias_x_[g][j] = w.b_ih ? w.b_ih[g * a_.H + j] : T(0);
        bias_r_[g][j] = w.b_hh ? w.b_hh[g * a_.H + j] : T(0);
      }
    }
  }

  // h as it enters orders [begin, end) through its mask: some tokens for each thread.
  void mask_h(int d, const Own& o, int64_t begin, int64_t end, const Team& team) {
    for (int64_t i = begin; i < end; ++i) {
      const Range active{o.rows.first, smaller(o.rows.last, size(d, i))};
      const Range mine = plan_.by_rows ? active : part(active.last, team.rank, team.size);
      for (int64_t b = mine.first; b < mine.last; ++b)
        apply_mask(unmasked(d, i, b), a_.h_mask + a_.state_at(d, 0, b), a_.R, masked_at(i, b));
    }
    if (!plan_.by_rows) team.sync();
  }

  // Once more, for orders [begin, end), what forward has computed: all the products of the chunk together, as the
  // states are known, then the cell.
  void compute_again(int d, const Own& o, int64_t begin, int64_t end) {
    int64_t count = 0;
    for (int64_t i = begin; i < end; ++i)
      for (int64_t b = o.rows.first; b < smaller(o.rows.last, size(d, i)); ++b, ++count) {
        o.again_x[count] = a_.input.at(a_.seq, time(d, i), b);
        o.again_h[count] = h_before(d, i, b);
        for (int s = 0; s < states; ++s) o.again_prev[s][count] = before(d, s, i, b);
        o.again_to[count] = kept_at(i, b);
      }
    for (int64_t p = o.units.first; p < o.units.last; ++p) {
      const int64_t first = again_hh_[0].first(p), last = again_hh_[0].last(p);
      const int nv = again_hh_[0].vectors_of(p);
      const int64_t ldo = nv * W, plane = group * ldo;
      for_groups<T>(0, count, [&](int64_t token, int64_t n) {
        for (int g = 0; g < G; ++g) {
          Sum *x = o.sums + Cell::input_slot[g] * plane, *r = o.sums + Cell::recurrent_slot[g] * plane;
          multiply_panel(o.again_x + token, n, a_.I, again_ih_[g].panel(p), nv, x, ldo);
          multiply_panel(o.again_h + token, n, a_.R, again_hh_[g].panel(p), nv, r, ldo, x == r);
        }
        for (int64_t k = 0; k < n; ++k)
          for_vectors<T>(first, last, [&](auto math, int64_t j, int lanes) __attribute__((always_inline)) {
            gates_again<decltype(math)>(o, token + k, o.sums + k * ldo + (j - first), plane, j, lanes);
          });
      });
    }
  }

  template <class M, class V = typename M::V>
  inline __attribute__((always_inline)) void gates_again(const Own& o, int64_t token, const Sum* sums, int64_t plane,
                                                         int64_t j, int lanes) const {
    V x[G], r[G], prev[states], next[states], keep[slots];
    for (int g = 0; g < G; ++g) {
      const bool apart = Cell::input_slot[g] != Cell::recurrent_slot[g];
      x[g] = M::load(bias_x_[g] + j);
      if (apart) x[g] = x[g] + M::load(sums + Cell::input_slot[g] * plane);
      r[g] = M::load(sums + Cell::recurrent_slot[g] * plane) + M::load(bias_r_[g] + j);
    }
    for (int s = 0; s < states; ++s)
      prev[s] = s == 0 && a_.projected ? M::zero() : M::load(o.again_prev[s][token] + j, lanes);
    Cell::template forward<M>(x, r, prev, next, keep);
    T* to = o.again_to[token] + j;
    for (int k = 0; k < Cell::kept; ++k) M::store(to + k * a_.H, keep[k], lanes);
    for (int s = 0; s < states; ++s) M::store(to + (Cell::kept + s) * a_.H, next[s], lanes);
  }

  // Rows of the chunk's rings of steps.
  int64_t kept_width() const { return (Cell::kept + states) * a_.H; }
  int64_t ring(int64_t i, int64_t b) const { return (a_.seq.T - 1 - i) % plan_.chunk * a_.seq.B + b; }
  T* kept_at(int64_t i, int64_t b) const { return kept_ + ring(i, b) * kept_width(); }
  T* masked_at(int64_t i, int64_t b) const { return masked_ + ring(i, b) * a_.R; }

  // State s as the cell saw it on entering order i, of h what a projection has left to the cell: nothing it would ask
  // for.
  const T* before(int d, int s, int64_t i, int64_t b) const {
    if (!goes_on(d, i, b)) return initial(d, s, i, b);
    return saved_of(d).state[s] + (a_.seq.start(time(d, i - 1)) + b) * a_.H;
  }

  // h as it entered order i, before its mask and after.
  const T* unmasked(int d, int64_t i, int64_t b) const {
    if (!a_.projected || !goes_on(d, i, b)) return before(d, 0, i, b);
    return saved_of(d).projected + (a_.seq.start(time(d, i - 1)) + b) * a_.R;
  }
  const T* h_before(int d, int64_t i, int64_t b) const { return a_.h_mask ? masked_at(i, b) : unmasked(d, i, b); }

  // The step after i is still in these rings when step i needs it.
  T* d_slots_at(int64_t i, int64_t b) const { return d_slots_ + ring(i, b) * slots_width(); }
  T* d_h_at(int64_t i, int64_t b) const { return d_h_ + ring(i, b) * a_.R; }

  // Order i of the rows and units of one thread; order -1 leaves the gradients of the initial states.
  void step(int d, const Own& o, int64_t i, const Team& team) {
    const int64_t now = smaller(o.rows.last, size(d, i)), after = smaller(o.rows.last, size(d, i + 1));
    const int64_t first = o.rows.first, both = larger(first, smaller(now, after));
    const Range mine = columns_of(units(), o.units);
    if (a_.seq.resets)
      for (int64_t b = first; b < after; ++b)
        for (int s = 1; s < states && a_.seq.cut(d, i + 1, b); ++s)
          leave_segment(d, s, b, mine, carry_[s] + b * state_width_ + mine.first);
    // Gradients come to a row from the step after, except where its sequence ends here.
    for (int64_t k = o.outputs.first; k < o.outputs.last; ++k) {
      const int64_t p = in_turn(o.outputs, k, i);
      for_groups<T>(first, both, [&](int64_t row, int64_t n) {
        multiply_slots(d, o, p, i + 1, row, n);
        output_gradients(d, o, p, i, row, n);
      });
      for_groups<T>(both, now, [&](int64_t row, int64_t n) {
        for (int64_t k = 0; k < n * w_hh_.vectors_of(p) * W; ++k) o.sums[k] = 0;
        output_gradients(d, o, p, i, row, n);
      });
      for_groups<T>(larger(first, now), after, [&](int64_t row, int64_t n) {
        multiply_slots(d, o, p, i + 1, row, n);
        initial_gradients(d, o, p, row, n);
      });
    }
    for (int s = 1; s < states; ++s)
      if (a_.d_hx[s])
        for (int64_t b = larger(first, now); b < after; ++b)
          for (int64_t j = mine.first; j < mine.last; ++j)
            a_.d_hx[s][a_.state_at(d, s, b) + j] = carry_[s][b * state_width_ + j];
    if (a_.projected) {
      if (!plan_.by_rows) team.sync();
      for (int64_t p = o.units.first; p < o.units.last; ++p)
        for_groups<T>(first, now, [&](int64_t row, int64_t n) {
          for (int64_t k = 0; k < n; ++k) o.left[k] = d_h_at(i, row + k);
          multiply_panel(o.left, n, a_.R, w_hr_.panel(p), w_hr_.vectors_of(p), o.sums, w_hr_.vectors_of(p) * W);
          gate_gradients(d, o, w_hr_, p, i, row, n);
        });
    }
    if (!plan_.by_rows) team.sync();
  }

  const Panels<T>& units() const { return a_.projected ? w_hr_ : w_hh_; }

  // sums = gradients of the recurrent products at order i, times W_hh. Where a segment starts there nothing is left.
  void multiply_slots(int d, const Own& o, int64_t p, int64_t i, int64_t row, int64_t n) {
    const int64_t first = w_hh_.first(p), ldo = w_hh_.vectors_of(p) * W;
    for (int64_t k = 0; k < n; ++k) o.left[k] = d_slots_at(i, row + k) + (slots - G) * a_.H;
    multiply_panel(o.left, n, G * a_.H, w_hh_.panel(p), w_hh_.vectors_of(p), o.sums, ldo);
    if (a_.h_mask)
      for (int64_t k = 0; k < n; ++k) {
        Sum* sums = o.sums + k * ldo;
        apply_mask(sums, a_.h_mask + a_.state_at(d, 0, row + k) + first, w_hh_.last(p) - first, sums);
      }
    if (!a_.seq.resets) return;
    for (int64_t k = 0; k < n; ++k)
      if (a_.seq.cut(d, i, row + k)) {
        leave_segment(d, 0, row + k, {first, w_hh_.last(p)}, o.sums + k * ldo);
        leave_segment(d, 0, row + k, {first, w_hh_.last(p)}, carry_[0] + (row + k) * output_width_ + first);
      }
  }

  // What goes back to state s of a sequence, beyond the start of a segment, is the reset state's gradient and ends
  // there.
  void leave_segment(int d, int s, int64_t b, Range columns, Sum* gradient) {
    Sum* to = d_reset_[s] ? d_reset_[s] + a_.state_at(d, s, b) : nullptr;
    for (int64_t j = columns.first; j < columns.last; ++j) {
      if (to) to[j] += gradient[j - columns.first];
      gradient[j - columns.first] = 0;
    }
  }

  // Completes the gradient of h, and goes on to the gates unless the projection comes between.
  void output_gradients(int d, const Own& o, int64_t p, int64_t i, int64_t row, int64_t n) {
    const int64_t first = w_hh_.first(p), columns = w_hh_.last(p) - first, ldo = w_hh_.vectors_of(p) * W;
    for (int64_t k = 0; k < n; ++k) {
      const int64_t b = row + k;
      const T* given = a_.d_output.data ? a_.d_output.at(a_.seq, time(d, i), b) + d * a_.R + first : nullptr;
      Sum* carry = carry_[0] + b * output_width_ + first;
      for (int64_t j = 0; j < columns; j += W) {
        V sum = S::load(o.sums + k * ldo + j) + S::load(carry + j);
        if (given) sum += S::load(given + j, (int)smaller(W, columns - j));
        S::store(o.sums + k * ldo + j, sum);
        if (a_.projected) {
          S::store(d_h_at(i, b) + first + j, sum, (int)smaller(W, columns - j));
          S::store(carry + j, V{});
        }
      }
    }
    if (!a_.projected) gate_gradients(d, o, w_hh_, p, i, row, n);
  }

  // Through the cell: sums hold the gradient of the units of one panel.
  void gate_gradients(int d, const Own& o, const Panels<T>& panels, int64_t p, int64_t i, int64_t row, int64_t n) {
    const int64_t first = panels.first(p), last = panels.last(p), ldo = panels.vectors_of(p) * W, H = a_.H;
    const Saved<const T> saved = saved_of(d);
    for (int64_t k = 0; k < n; ++k) {
      const int64_t b = row + k, token = a_.seq.start(time(d, i)) + b;
      const T* kept = again() ? kept_at(i, b) : saved.kept + token * Cell::kept * H;
      const T *prev_at[states], *next_at[states], *given[states] = {};
      for (int s = 0; s < states; ++s) {
        prev_at[s] = before(d, s, i, b);
        next_at[s] = again() ? kept + (Cell::kept + s) * H : saved.state[s] + token * H;
      }
      for (int s = 1; s < states; ++s)
        if (a_.d_states[s].data) given[s] = a_.d_states[s].at(a_.seq, time(d, i), b) + d * H;
      T* d_slots = d_slots_at(i, b);
      for_vectors<T>(first, last, [&](auto math, int64_t j, int lanes) __attribute__((always_inline)) {
        using M = decltype(math);
        typename M::V keep[slots], prev[states], next[states], d_next[states], d_prev[states], d_slot[slots];
        for (int s = 0; s < Cell::kept; ++s) keep[s] = M::load(kept + s * H + j, lanes);
        for (int s = 0; s < states; ++s) {
          // The h before a projection has no previous value; no cell that can be projected asks for one.
          prev[s] = s == 0 && a_.projected ? M::zero() : M::load(prev_at[s] + j, lanes);
          next[s] = M::load(next_at[s] + j, lanes);
        }
        d_next[0] = M::load(o.sums + k * ldo + j - first);
        for (int s = 1; s < states; ++s) {
          d_next[s] = M::load(carry_[s] + b * state_width_ + j);
          if (given[s]) d_next[s] = d_next[s] + M::load(given[s] + j, lanes);
        }
        typename M::V d_past[states];  // what goes past the cell
        for (int s = 0; s < states; ++s) {
          d_past[s] = M::zero();
          if (a_.zoneout.rate[s] > 0) {
            const auto stays = zoned_out<M, Sum>(a_.zoneout, s, a_.lots_at(d, s, time(d, i), b) + j);
            d_past[s] = stays * d_next[s];
            d_next[s] = (Sum(1) - stays) * d_next[s];
          }
        }
        Cell::template backward<M>(keep, prev, next, d_next, d_prev, d_slot);
        for (int s = 0; s < states; ++s) d_prev[s] = d_prev[s] + d_past[s];
        if (!a_.projected) M::store(carry_[0] + b * output_width_ + j, d_prev[0]);
        for (int s = 1; s < states; ++s) M::store(carry_[s] + b * state_width_ + j, d_prev[s]);
        for (int s = 0; s < slots; ++s) M::store(d_slots + s * H + j, d_slot[s], lanes);
      });
    }
  }

  void initial_gradients(int d, const Own& o, int64_t p, int64_t row, int64_t n) {
    if (!a_.d_hx[0]) return;
    const int64_t first = w_hh_.first(p), columns = w_hh_.last(p) - first, ldo = w_hh_.vectors_of(p) * W;
    for (int64_t k = 0; k < n; ++k) {
      T* to = a_.d_hx[0] + a_.state_at(d, 0, row + k) + first;
      const Sum* carry = carry_[0] + (row + k) * output_width_ + first;
      for (int64_t j = 0; j < columns; ++j) to[j] = o.sums[k * ldo + j] + carry[j];
    }
  }

  Saved<const T> saved_of(int d) const {
    const int64_t tokens = a_.seq.tokens();
    const int kept = a_.recompute ? 0 : Cell::kept;
    const int64_t each = saved_size(kept, states, tokens, a_.H, a_.R, a_.projected);
    return saved_view(a_.saved + d * each, kept, states, tokens, a_.H);
  }

  // Lists what the products over a chunk's tokens multiply; returns how many tokens.
  int64_t list_tokens(int d, const Own& o, int64_t begin, int64_t end) {
    const Saved<const T> saved = saved_of(d);
    int64_t count = 0;
    for (int64_t i = begin; i < end; ++i)
      for (int64_t b = o.token_rows.first; b < smaller(o.token_rows.last, size(d, i)); ++b, ++count) {
        o.x[count] = a_.input.at(a_.seq, time(d, i), b);
        o.h_before[count] = h_before(d, i, b);
        o.d_slots[count] = d_slots_at(i, b);
        if (a_.d_input.data) o.d_x[count] = a_.d_input.at(a_.seq, time(d, i), b);
        if (a_.projected) {
          o.unprojected[count] = saved.state[0] + (a_.seq.start(time(d, i)) + b) * a_.H;
          o.d_h[count] = d_h_at(i, b);
        }
      }
    return count;
  }

  // d_input = or += gradients of the input products, times W_ih, for tokens [mine.first, mine.last) of the list.
  void input_gradients(int d, const Own& o, Range mine) {
    for (int64_t p = 0; p < w_ih_.count(); ++p) {
      const int64_t first = w_ih_.first(p), columns = w_ih_.last(p) - first, ldo = w_ih_.vectors_of(p) * W;
      for_groups<T>(mine.first, mine.last, [&](int64_t token, int64_t n) {
        multiply_panel(o.d_slots + token, n, G * a_.H, w_ih_.panel(p), w_ih_.vectors_of(p), o.sums, ldo);
        for (int64_t k = 0; k < n; ++k)
          for (int64_t j = 0; j < columns; j += W) {
            T* to = o.d_x[token + k] + first + j;
            const int lanes = (int)smaller(W, columns - j);
            V sum = S::load(o.sums + k * ldo + j);
            if (d > 0) sum += S::load(to, lanes);
            S::store(to, sum, lanes);
          }
      });
    }
  }

  // Gradients of weights and biases from n tokens of the list: sums of d_slots^T x, d_slots^T h, d_h^T (o tanh c).
  void weight_gradients(int d, const Own& o, int64_t token, int64_t n, bool add) {
    const Weights<Sum>& to = o.sum_weights;
    const Weights<T>& wanted = a_.d_weights[d];
    const Range columns = columns_of(units(), o.token_units), outputs = columns_of(w_hh_, o.token_outputs);
    if (wanted.b_ih || wanted.b_hh)
      for (int s = 0; s < slots; ++s)
        add_rows(o.d_slots + token, n, s * a_.H + columns.first, s * a_.H + columns.last, o.sum_slots);
    if (to.w_ih || to.w_hh) {
      const int64_t each = round_up(columns.last - columns.first, block) * padded(n);
      for (int s = 0; s < slots; ++s)
        pack_blocks(o.d_slots + token, n, s * a_.H + columns.first, s * a_.H + columns.last, o.blocks + s * each);
      if (to.w_ih) products(o, n, Cell::input_slot, G, each, columns, a_.H, o.x + token, a_.I, to.w_ih, add);
      if (to.w_hh) products(o, n, Cell::recurrent_slot, G, each, columns, a_.H, o.h_before + token, a_.R, to.w_hh, add);
    }
    if (to.w_hr) {
      static constexpr int only[] = {0};
      pack_blocks(o.d_h + token, n, outputs.first, outputs.last, o.blocks);
      products(o, n, only, 1, 0, outputs, a_.R, o.unprojected + token, a_.H, to.w_hr, add);
    }
  }

  // to[g * height + u][c] = or += sum over n tokens of column u of slot[g]'s blocks times rows[token][c].
  void products(const Own& o, int64_t n, const int* slot, int gates, int64_t each, Range mine, int64_t height,
                const T* const* rows, int64_t columns, Sum* to, bool add) {
    const Panels<T> panels{o.panel, n, columns, Block<T>::usual_vectors};
    for (int64_t p = 0; p < panels.count(); ++p) {
      const int64_t c = panels.first(p), width = panels.last(p) - c;
      const int nv = panels.vectors_of(p);
      pack_columns(rows, n, c, width, o.panel);
      for (int g = 0; g < gates; ++g)
        for (int64_t u = mine.first; u < mine.last; u += block) {
          const int m = (int)smaller(block, mine.last - u);
          const T* left = o.blocks + slot[g] * each + (u - mine.first) * padded(n);
          Sum* place = to + (g * height + u) * columns + c;
          if (width == nv * W) {
            with_block<T>(m, nv, TransposedTile<T>{n, left, o.panel, place, columns, add});
            continue;
          }
          with_block<T>(m, nv, TransposedTile<T>{n, left, o.panel, o.sums, nv * W, false});
          for (int k = 0; k < m; ++k)
            for (int64_t j = 0; j < width; ++j)
              place[k * columns + j] = o.sums[k * nv * W + j] + (add ? place[k * columns + j] : Sum(0));
        }
    }
  }

  // Adds up what the threads have gathered.
  void reduce(int d, const Team& team) {
    const Weights<T>& to = a_.d_weights[d];
    const Weights<Sum> sums = sum_weights(d, 0);
    const int64_t of_input = G * a_.H * a_.I, of_h = G * a_.H * a_.R, of_projection = a_.R * a_.H;
    if (apart_)
      for (int rank = 1; rank < team.size; ++rank) {
        const Weights<Sum> from = sum_weights(d, rank);
        add_part(sums.w_ih, from.w_ih, of_input, team);
        add_part(sums.w_hh, from.w_hh, of_h, team);
        add_part(sums.w_hr, from.w_hr, of_projection, team);
      }
    round_part(sums.w_ih, to.w_ih, of_input, team);
    round_part(sums.w_hh, to.w_hh, of_h, team);
    round_part(sums.w_hr, to.w_hr, of_projection, team);
    for (int s = 0; s < states; ++s)
      if (a_.d_reset_state[s]) {
        const int64_t count = a_.seq.B * a_.state_width(s);
        round_part(d_reset_[s] + d * count, a_.d_reset_state[s] + d * count, count, team);
      }
    if (team.rank != 0) return;
    for (int g = 0; g < G; ++g)
      for (int64_t j = 0; j < a_.H; ++j) {
        Sum input = 0, recurrent = 0;
        for (int rank = 0; rank < team.size; ++rank) {
          const Sum* sums = sum_slots_ + rank * slots_width();
          input += sums[Cell::input_slot[g] * a_.H + j];
          recurrent += sums[Cell::recurrent_slot[g] * a_.H + j];
        }
        if (to.b_ih) to.b_ih[g * a_.H + j] = input;
        if (to.b_hh) to.b_hh[g * a_.H + j] = recurrent;
      }
  }

  static void add_part(Sum* to, const Sum* from, int64_t count, const Team& team) {
    if (!to) return;
    const Range mine = part(count, team.rank, team.size);
    for (int64_t k = mine.first; k < mine.last; ++k) to[k] += from[k];
  }

  // Sums that are not yet in the result.
  static void round_part(const Sum* sums, T* to, int64_t count, const Team& team) {
    if (!to || as_sums(to)) return;
    const Range mine = part(count, team.rank, team.size);
    for (int64_t k = mine.first; k < mine.last; ++k) to[k] = sums[k];
  }

  const Backward<T>& a_;
  const Plan plan_;
  int team_size_ = 0;
  const int64_t state_width_, output_width_;  // H and R rounded up to whole vectors
  // By rows, the products over tokens may be divided like the steps, each thread's sums being apart until the end, or
  // by units after a meeting of all at the end of each chunk.
  const bool apart_;
  Panels<T> w_ih_, w_hh_, w_hr_;
  Sum* carry_[states];  // gradients that reach the states from the step after, except through the products
  T *d_slots_, *d_h_;   // rings of a chunk's steps: gradients of the slots, and of a projected h
  T *zeros_, *panels_, *blocks_;
  Sum *sums_, *sum_slots_, *private_;
  Sum* d_reset_[states];  // where the gradients of the reset states are added up; null what is not wanted
  const T **left_, **tokens_;
  T** d_x_;
  T* masked_;  // ring of h as it enters the recurrent products, if they see it through a mask
  Panels<T> again_ih_[G], again_hh_[G];
  Sum *bias_x_[G], *bias_r_[G];
  T* kept_;  // ring of what is computed again: what the cell keeps, then its states
  const T** again_lists_;
  T** again_to_;
};

// OpenMP may give fewer threads than were asked for; the work is then planned anew for those there are.
template <class Make>
static void run_pass(int threads, Make&& make) {
  for (;;) {
    auto pass = make(threads);
    const int got = pass.run();
    if (got == pass.planned_threads()) return;
    threads = got < threads ? got : 1;
  }
}

// The same results for any number of threads, so it leaves out those that are in somebody's way.
template <class T, class Cell>
static void forward(const Forward<T>& args, int threads) {
  using Pass = ForwardPass<T, Cell>;
  const bool within = Pass::input_products_within(args, threads);
  run_pass(undisturbed_threads(threads), [&](int now) { return Pass(args, now, within); });
}

template <class T, class Cell>
static void backward(const Backward<T>& args, int threads) {
  run_pass(threads, [&](int now) { return BackwardPass<T, Cell>(args, now); });
}
