// Backward over a whole sequence, for any cell.

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
        plan_(plan(args, threads)),
        state_width_(round_up(args.H, W)),
        output_width_(round_up(args.R, W)),
        apart_(plan_.by_rows && weights_size() * (int64_t)sizeof(Sum) <= largest_private),
        fetches_(outlast_caches<T>(G * args.H * args.R / plan_.shares())),
        fetches_values_(outlast_caches<T>(saved_each() * args.directions)),
        streams_d_input_(far_apart(plan_.threads) && args.directions == 1 &&
                         whole_vectors(args.seq, args.d_input, args.I)) {}

  int planned_threads() const { return plan_.threads; }

  // Runs and returns the size of the team. If that is not the planned one nothing has been done.
  int run() {
    const Workspace workspace([this](Arena& arena) { lay_out(arena); });
    run_team(
        apart_ ? undisturbed_threads(plan_.threads) : plan_.threads,
        [](void* self, const Team& team) { static_cast<BackwardPass*>(self)->work(team); }, this);
    return team_size_;
  }

 private:
  // Where one row's values of one step come from and go to; null what there is not.
  struct RowStep {
    const T *kept, *before[states], *after[states];  // by forward: by the cell, its states
    const T *d_output, *d_states[states];            // given gradients
    Sum* carry[states];                              // gradients from the step after, then for the one before
    T* d_slots;
    int64_t lots[states];  // of zoneout
  };

  // What one thread works on, and what it has to itself.
  struct Own {
    Range rows, units, outputs;  // sequences; panels of hidden units; panels of h (the units' unless projected)
    // The same of the products over a chunk's tokens.
    Range token_rows, token_units, token_outputs;
    Sum* sums;       // products of a group of rows with a panel
    const T** left;  // rows to multiply
    RowStep* at;     // of each of its rows at the step under way
    // Of each token of a chunk: rows of the input, of h before and after the step, of the gradients.
    const T **x, **h_before, **unprojected, **d_slots, **d_h;
    T** d_x;
    // Of each token of a chunk that this thread's rows have, for the steps' values again.
    const T **again_x, **again_h, **again_prev[states];
    T** again_to;
    T* panel;                  // a panel of such rows
    T* blocks;                 // the gate gradients, packed for products over tokens where need be
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

  // Steps are divided where that saves more than it costs: a barrier, and lines with the gradients of gates, at the
  // step and in the products after it, which wait for them the longer the farther they come. That goes by what meetings
  // cost now, for by units one thread computes the same, to the bit, as several. Zen 5, backward, 1 thread; 2 at 65 ns;
  // at 210, us for each step: RNN 100,1,128,128 1.17; 0.83; 1.82. GRU 100,1,64,64 0.92; 0.81; 100,3,64,64 1.75; 1.37;
  // 100,1,128,128 2.69; 1.86. LSTM 100,1,64,64 1.19; 0.93; 100,1,128,128 3.26; 2.27; 4.4; 100,2,128,128 5.1; 3.4; 7.3;
  // 1000,2,64,64 1.43; 0.96. Of many lines most come while others are waited for: 128,8,256,256 94; 59; 73.
  static bool worth_barriers(const Backward<T>& a, int threads) {
    const double cost = meeting_cost(), all = lines_exchanged(a, G * a.H, threads);
    const double lines = all > 32 ? 32 + (all - 32) / 8 : all;
    return 1.3 * saved_by_units(a, G, threads) >= 60 + cost * (3 + lines * cost / 300);
  }
  static Plan plan(const Backward<T>& a, int threads) {
    const bool by_rows = rows_enough_for_backward(a.seq.B, threads) && !weights_outweigh_rows(a, G, threads);
    // So units are divided only among threads that have a core to themselves.
    const int now = by_rows ? threads : undisturbed_threads(threads);
    return make_plan<T>(a, G, now, backward_chunk(a), by_rows, worth_barriers(a, now));
  }

  // Bytes of the weights' gradients that each thread may have to itself. Backward on 2 threads (Zen 5), apart and
  // together: LSTM 100,32,512,512 (8 MB) 78.7 and 74.3 ms; 100,64,256,256 (2 MB) 42.6 and 41.2; 100,32,128,128 (0.5 MB)
  // 5.70 and 5.67; 128,8,64,64 (0.1 MB) 0.71 and 0.89.
  static constexpr int64_t largest_private = 1 << 20;

  // Whether what the cell kept and computed is computed again, chunk by chunk.
  bool again() const { return (a_.recompute && Cell::kept) || a_.zoneout.on(); }

  int64_t slots_width() const { return slots * a_.H; }
  // Between rows of them: whole lines of the cache and one more, so that the same columns of many rows do not share a
  // few of its sets (Zen 4, LSTM backward 100,64,256,256 98.1 -> 97.7 ms, 100,32,512,512 200 -> 197).
  int64_t slots_stride() const {
    constexpr int64_t line = 64 / sizeof(T);
    return round_up(slots_width(), line) + line;
  }
  int64_t chunk_tokens() const { return plan_.chunk * (apart_ ? plan_.rows : a_.seq.B); }
  int64_t sums_size() const { return (again() ? slots : 1) * group * Block<T>::max_columns; }
  // Products over tokens take this many at a time.
  int64_t slice() const { return larger(1, smaller(512, chunk_tokens())); }
  // Whole groups of tokens.
  int64_t padded(int64_t tokens) const { return round_up(tokens, Product<T>::depth); }
  int64_t blocks_size() const {
    return packs_columns<T> ? padded(slice()) * larger(slots * round_up(a_.H, block), round_up(a_.R, block)) : 0;
  }
  int64_t weights_size() const { return G * a_.H * (a_.I + a_.R) + (a_.projected ? a_.R * a_.H : 0); }

  void lay_out(Arena& arena) {
    const int64_t B = a_.seq.B, K = G * a_.H, threads = plan_.threads, tokens = chunk_tokens();
    w_hh_ = divided_panels(arena, K, a_.R, reads_two_copies<T>(K * a_.R / plan_.shares(), plan_.rows, a_.seq.T));
    if (a_.d_input.data) w_ih_ = {arena.take<T>(Panels<T>::size(K, a_.I)), K, a_.I, Block<T>::vectors_for(group, a_.I)};
    if (a_.projected) {
      w_hr_ = divided_panels(arena, a_.R, a_.H);
      d_h_ = arena.take<T>(plan_.chunk * B * a_.R);
    }
    gaps_ = arena.take<int64_t>(B);
    for (int s = 0; s < states; ++s)
      carry_[s] = arena.take<Sum>(B * (s == 0 ? output_width_ : state_width_) + threads * gap<T>);
    d_slots_ = {arena, plan_, B, slots_stride()};
    zeros_ = arena.take<T>(larger(state_width_, output_width_));
    sums_ = arena.take<Sum>(threads * sums_size());
    left_ = arena.take<const T*>(threads * group);
    row_steps_ = {arena, plan_, B};
    tokens_ = arena.take<const T*>(threads * 5 * tokens + rows_ahead);
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
    if (again()) lay_out_again(arena);
  }

  // Panels that the threads divide where they divide units: all of as many vectors, for units go by them.
  Panels<T> divided_panels(Arena& arena, int64_t K, int64_t columns, bool twice = false) const {
    T* data = arena.take<T>((twice ? 2 : 1) * Panels<T>::size(K, columns));
    return {data, K, columns, recurrent_vectors<T>(plan_, a_.H, 1, G * a_.H), plan_.shares(), 1, twice};
  }

  void lay_out_again(Arena& arena) {
    const int64_t listed = plan_.threads * plan_.chunk * plan_.rows;
    for (int g = 0; g < G; ++g) {
      again_ih_[g] = divided_panels(arena, a_.I, a_.H);
      again_hh_[g] = divided_panels(arena, a_.R, a_.H);
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
    o.at = row_steps_.of(team.rank);
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
    const Range rows = plan_.by_rows ? rows_part(a_.seq, team.rank, team.size) : part(a_.seq.B, team.rank, team.size);
    for (int64_t b = rows.first; b < rows.last; ++b) gaps_[b] = plan_.by_rows ? team.rank * gap<T> : 0;
    d_slots_.place(plan_, team.rank, rows, a_.seq.B);
    for (int s = 0; s < states; ++s) {
      const int64_t width = a_.state_width(s), padded = s == 0 ? output_width_ : state_width_;
      for (int64_t b = rows.first; b < rows.last; ++b) {
        const int64_t at = a_.state_at(d, s, b);
        const bool empty = b >= a_.seq.size(0);
        for (int64_t j = 0; j < padded; ++j) {
          const Sum value = a_.d_final[s] && j < width ? a_.d_final[s][at + j] : T(0);
          carry_at(s, b)[j] = value;
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
      packed.repeat(p);
    }
  }

  // What forward packs to compute the gates.
  void pack_again(const Weights<const T>& w, const Team& team) {
    const int64_t panels = again_hh_[0].count();
    const Range mine = part(G * panels, team.rank, team.size);
    for (int64_t item = mine.first; item < mine.last; ++item) {
      const int64_t g = item / panels, p = item % panels;
      pack_transposed(again_ih_[g], p, {w.w_ih + g * a_.H * a_.I, a_.I});
      pack_transposed(again_hh_[g], p, {w.w_hh + g * a_.H * a_.R, a_.R});
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
    Cell::template activate<M>(x, r, keep);
    Cell::template advance<M>(keep, prev, next);
    T* to = o.again_to[token] + j;
    for (int k = 0; k < Cell::kept; ++k) M::store(to + k * a_.H, keep[k], lanes);
    for (int s = 0; s < states; ++s) M::store(to + (Cell::kept + s) * a_.H, next[s], lanes);
  }

  // Rows of the chunk's rings of steps.
  int64_t kept_width() const { return (Cell::kept + states) * a_.H; }
  int64_t turn(int64_t i) const { return (a_.seq.T - 1 - i) % plan_.chunk; }
  int64_t ring(int64_t i, int64_t b) const { return turn(i) * a_.seq.B + b; }
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

  Sum* carry_at(int s, int64_t b) const { return carry_[s] + b * (s == 0 ? output_width_ : state_width_) + gaps_[b]; }

  // The step after i is still in these rings when step i needs it.
  T* d_slots_at(int64_t i, int64_t b) const { return d_slots_.at(turn(i), b); }
  T* d_h_at(int64_t i, int64_t b) const { return d_h_ + ring(i, b) * a_.R; }

  // Order i of the rows and units of one thread; order -1 leaves the gradients of the initial states.
  void step(int d, const Own& o, int64_t i, const Team& team) {
    const int64_t now = smaller(o.rows.last, size(d, i)), after = smaller(o.rows.last, size(d, i + 1));
    const int64_t first = o.rows.first, both = larger(first, smaller(now, after));
    const Range mine = columns_of(units(), o.units);
    if (a_.seq.resets)
      for (int64_t b = first; b < after; ++b)
        for (int s = 1; s < states && a_.seq.cut(d, i + 1, b); ++s)
          leave_segment(d, s, b, mine, carry_at(s, b) + mine.first);
    for (int64_t b = first; b < now; ++b) find_row_step(d, i, b, o.at[b]);
    // Gradients come to a row from the step after, except where its sequence ends here.
    for (int64_t k = o.outputs.first; k < o.outputs.last; ++k) {
      const int64_t p = in_turn(o.outputs, k, i);
      const int64_t next =
          k + 1 < o.outputs.last ? in_turn(o.outputs, k + 1, i) : in_turn(o.outputs, o.outputs.first, i - 1);
      const T* fetched = fetches_ ? w_hh_.panel(next) : nullptr;
      for_groups<T>(first, both, [&](int64_t row, int64_t n) {
        Fetches fetches;
        if (!a_.projected) list_values(fetches, o, w_hh_, p, G * a_.H, row, n);
        multiply_slots(d, o, p, i + 1, row, n, fetched, &fetches);
        output_gradients(o, p, i, row, n);
      });
      for_groups<T>(both, now, [&](int64_t row, int64_t n) {
        for (int64_t k = 0; k < n * w_hh_.vectors_of(p) * W; ++k) o.sums[k] = 0;
        output_gradients(o, p, i, row, n);
      });
      for_groups<T>(larger(first, now), after, [&](int64_t row, int64_t n) {
        multiply_slots(d, o, p, i + 1, row, n, fetched, nullptr);
        initial_gradients(d, o, p, row, n);
      });
    }
    for (int s = 1; s < states; ++s)
      if (a_.d_hx[s])
        for (int64_t b = larger(first, now); b < after; ++b)
          for (int64_t j = mine.first; j < mine.last; ++j) a_.d_hx[s][a_.state_at(d, s, b) + j] = carry_at(s, b)[j];
    if (a_.projected) {
      if (!plan_.by_rows) team.sync();
      for (int64_t p = o.units.first; p < o.units.last; ++p)
        for_groups<T>(first, now, [&](int64_t row, int64_t n) {
          Fetches fetches;
          list_values(fetches, o, w_hr_, p, a_.R, row, n);
          for (int64_t k = 0; k < n; ++k) o.left[k] = d_h_at(i, row + k);
          multiply_panel<T>(o.left, n, a_.R, w_hr_.panel(p), w_hr_.vectors_of(p), o.sums, w_hr_.vectors_of(p) * W,
                            false, nullptr, &fetches);
          gate_gradients(o, w_hr_, p, row, n);
        });
    }
    if (!plan_.by_rows) team.sync();
  }

  const Panels<T>& units() const { return a_.projected ? w_hr_ : w_hh_; }

  // What the gates of a panel's units will read, to be fetched during a product over K that comes before.
  void list_values(Fetches& fetches, const Own& o, const Panels<T>& panels, int64_t p, int64_t K, int64_t row,
                   int64_t n) {
    if (!fetches_values_) return;
    const Range units{panels.first(p), panels.last(p)};
    for (int64_t b = row; b < row + n; ++b) {
      const RowStep& at = o.at[b];
      if (!again())
        for (int k = 0; k < Cell::kept; ++k) fetches.add(at.kept + k * a_.H, units);
      // The states after the step are those before the next, which has read them already.
      for (int s = 0; s < states; ++s) fetches.add(at.before[s], units);
      if (at.d_output && !a_.projected) fetches.add(at.d_output, units);
      for (int s = 1; s < states; ++s)
        if (at.d_states[s]) fetches.add(at.d_states[s], units);
    }
    fetches.divide(count_tiles<T>(n, K, panels.vectors_of(p)));
  }

  void find_row_step(int d, int64_t i, int64_t b, RowStep& at) const {
    const int64_t t = time(d, i), token = a_.seq.start(t) + b;
    const Saved<const T> saved = saved_of(d);
    at.kept = again() ? kept_at(i, b) : saved.kept + token * Cell::kept * a_.H;
    at.d_output = a_.d_output.data ? a_.d_output.at(a_.seq, t, b) + d * a_.R : nullptr;
    for (int s = 0; s < states; ++s) {
      at.before[s] = before(d, s, i, b);
      at.after[s] = again() ? at.kept + (Cell::kept + s) * a_.H : saved.state[s] + token * a_.H;
      at.d_states[s] = s > 0 && a_.d_states[s].data ? a_.d_states[s].at(a_.seq, t, b) + d * a_.H : nullptr;
      at.carry[s] = carry_at(s, b);
      if (a_.zoneout.on()) at.lots[s] = a_.lots_at(d, s, t, b);
    }
    at.d_slots = d_slots_at(i, b);
  }

  // Whether chains of a panel go two by two; nothing is fetched between them. (Zen 5, training of RNN 1000,1,128,128
  // 1.33 -> 1.25 ms; LSTM 100,1,32,32 0.0862 -> 0.0833; 100,1,64,64 on 2 threads 0.147 -> 0.140; on one, where a panel
  // has 4 vectors, 0.190, 0.191.)
  bool in_pairs(int vectors) const {
    return plan_.rows == 1 && vectors <= (G > 1 ? 2 : 4) && G * a_.H % Product<T>::depth == 0 && !fetches_values_;
  }

  // sums = gradients of the recurrent products at order i, times W_hh. Where a segment starts there nothing is left.
  void multiply_slots(int d, const Own& o, int64_t p, int64_t i, int64_t row, int64_t n, const T* next,
                      Fetches* fetches) {
    const int64_t first = w_hh_.first(p), ldo = w_hh_.vectors_of(p) * W;
    for (int64_t k = 0; k < n; ++k) o.left[k] = d_slots_at(i, row + k) + (slots - G) * a_.H;
    const T* panel = w_hh_.at_step(i).panel(p);
    if (in_pairs(w_hh_.vectors_of(p)))
      multiply_in_pairs(o.left[0], G * a_.H, panel, w_hh_.vectors_of(p), o.sums, false);
    else
      multiply_panel(o.left, n, G * a_.H, panel, w_hh_.vectors_of(p), o.sums, ldo, false, next, fetches);
    if (a_.h_mask)
      for (int64_t k = 0; k < n; ++k) {
        Sum* sums = o.sums + k * ldo;
        apply_mask(sums, a_.h_mask + a_.state_at(d, 0, row + k) + first, w_hh_.last(p) - first, sums);
      }
    if (!a_.seq.resets) return;
    for (int64_t k = 0; k < n; ++k)
      if (a_.seq.cut(d, i, row + k)) {
        leave_segment(d, 0, row + k, {first, w_hh_.last(p)}, o.sums + k * ldo);
        leave_segment(d, 0, row + k, {first, w_hh_.last(p)}, carry_at(0, row + k) + first);
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

  // Goes on from the gradients that came through the recurrent products: to the gates or, if there is a projection, to
  // its output, which makes the gradient of h complete.
  void output_gradients(const Own& o, int64_t p, int64_t i, int64_t row, int64_t n) {
    if (!a_.projected) return gate_gradients(o, w_hh_, p, row, n);
    const int64_t first = w_hh_.first(p), columns = w_hh_.last(p) - first, ldo = w_hh_.vectors_of(p) * W;
    for (int64_t k = 0; k < n; ++k) {
      const RowStep& at = o.at[row + k];
      for (int64_t j = 0; j < columns; j += W) {
        const int lanes = (int)smaller(W, columns - j);
        V sum = S::load(o.sums + k * ldo + j) + S::load(at.carry[0] + first + j);
        if (at.d_output) sum += S::load(at.d_output + first + j, lanes);
        S::store(d_h_at(i, row + k) + first + j, sum, lanes);
        S::store(at.carry[0] + first + j, V{});
      }
    }
  }

  // Through the cell: sums hold the gradient of the units of one panel, but for what comes to h from elsewhere. Rows
  // within, for what is the same for all of them to stay in registers.
  void gate_gradients(const Own& o, const Panels<T>& panels, int64_t p, int64_t row, int64_t n) {
    a_.zoneout.on() ? gate_gradients<true>(o, panels, p, row, n) : gate_gradients<false>(o, panels, p, row, n);
  }
  template <bool zoneout>
  void gate_gradients(const Own& o, const Panels<T>& panels, int64_t p, int64_t row, int64_t n) {
    const int64_t first = panels.first(p), ldo = panels.vectors_of(p) * W;
    for_vectors<T>(first, panels.last(p), [&](auto M, int64_t j, int lanes) __attribute__((always_inline)) {
      for (int64_t k = 0; k < n; ++k)
        cell_gradients<decltype(M), zoneout>(o.at[row + k], o.sums + k * ldo + (j - first), j, lanes);
    });
  }

  template <class M, bool zoneout, class Value = typename M::V>
  inline __attribute__((always_inline)) void cell_gradients(const RowStep& at, const Sum* sums, int64_t j,
                                                            int lanes) const {
    Value keep[slots], prev[states], next[states], d_next[states], d_prev[states], d_slot[slots];
    for (int k = 0; k < Cell::kept; ++k) keep[k] = M::load(at.kept + k * a_.H + j, lanes);
    for (int s = 0; s < states; ++s) {
      // The h before a projection has no previous value; no cell that can be projected asks for one.
      prev[s] = s == 0 && a_.projected ? M::zero() : M::load(at.before[s] + j, lanes);
      next[s] = M::load(at.after[s] + j, lanes);
    }
    d_next[0] = M::load(sums);
    if (!a_.projected) {
      d_next[0] = d_next[0] + M::load(at.carry[0] + j);
      if (at.d_output) d_next[0] = d_next[0] + M::load(at.d_output + j, lanes);
    }
    for (int s = 1; s < states; ++s) {
      d_next[s] = M::load(at.carry[s] + j);
      if (at.d_states[s]) d_next[s] = d_next[s] + M::load(at.d_states[s] + j, lanes);
    }
    Value d_past[states];  // what goes past the cell
    if constexpr (zoneout)
      for (int s = 0; s < states; ++s) {
        d_past[s] = M::zero();
        if (a_.zoneout.rate[s] > 0) {
          const auto stays = zoned_out<M, Sum>(a_.zoneout, s, at.lots[s] + j);
          d_past[s] = stays * d_next[s];
          d_next[s] = (Sum(1) - stays) * d_next[s];
        }
      }
    Cell::template backward<M>(keep, prev, next, d_next, d_prev, d_slot);
    if constexpr (zoneout)
      for (int s = 0; s < states; ++s) d_prev[s] = d_prev[s] + d_past[s];
    if (!a_.projected) M::store(at.carry[0] + j, d_prev[0]);
    for (int s = 1; s < states; ++s) M::store(at.carry[s] + j, d_prev[s]);
    for (int s = 0; s < slots; ++s) M::store(at.d_slots + s * a_.H + j, d_slot[s], lanes);
  }

  void initial_gradients(int d, const Own& o, int64_t p, int64_t row, int64_t n) {
    if (!a_.d_hx[0]) return;
    const int64_t first = w_hh_.first(p), columns = w_hh_.last(p) - first, ldo = w_hh_.vectors_of(p) * W;
    for (int64_t k = 0; k < n; ++k) {
      T* to = a_.d_hx[0] + a_.state_at(d, 0, row + k) + first;
      const Sum* carry = carry_at(0, row + k) + first;
      for (int64_t j = 0; j < columns; ++j) to[j] = o.sums[k * ldo + j] + carry[j];
    }
  }

  int saved_gates() const { return a_.recompute ? 0 : Cell::kept; }
  // Values that forward kept, of each direction.
  int64_t saved_each() const { return saved_size(saved_gates(), states, a_.seq.tokens(), a_.H, a_.R, a_.projected); }
  Saved<const T> saved_of(int d) const {
    return saved_view(a_.saved + d * saved_each(), saved_gates(), states, a_.seq.tokens(), a_.H);
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
            streams_d_input_ ? S::stream(to, sum) : S::store(to, sum, lanes);
          }
      });
    }
    if (streams_d_input_) S::finish_streams();
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
      const T* const* gradients = o.d_slots + token;
      pack_slots(o, gradients, n, slots, columns);
      if (to.w_ih) products(o, gradients, n, Cell::input_slot, G, columns, a_.H, o.x + token, a_.I, to.w_ih, add);
      if (to.w_hh)
        products(o, gradients, n, Cell::recurrent_slot, G, columns, a_.H, o.h_before + token, a_.R, to.w_hh, add);
    }
    if (to.w_hr) {
      static constexpr int only[] = {0};
      pack_slots(o, o.d_h + token, n, 1, outputs);
      products(o, o.d_h + token, n, only, 1, outputs, a_.R, o.unprojected + token, a_.H, to.w_hr, add);
    }
  }

  // The gradients that products over tokens begin with: of units from u on, of a slot of n rows. Those of units `mine`
  // of the first slots are packed for that where need be.
  Transposed<T> slot_from(const Own& o, const T* const* rows, int64_t n, int slot, Range mine, int64_t u) const {
    if constexpr (packs_columns<T>)
      return {block_of(o, n, slot, mine) + (u - mine.first) * padded(n)};
    else
      return {rows, slot * a_.H + u};
  }
  void pack_slots(const Own& o, const T* const* rows, int64_t n, int count, Range mine) const {
    if constexpr (packs_columns<T>)
      for (int s = 0; s < count; ++s)
        pack_blocks(rows, n, s * a_.H + mine.first, s * a_.H + mine.last, block_of(o, n, s, mine));
  }
  T* block_of(const Own& o, int64_t n, int slot, Range mine) const {
    return o.blocks + slot * round_up(mine.last - mine.first, block) * padded(n);
  }

  // to[g * height + u][c] = or += sum over n tokens of gradients[token][unit u of slot[g]] times rows[token][c].
  void products(const Own& o, const T* const* gradients, int64_t n, const int* slot, int gates, Range mine,
                int64_t height, const T* const* rows, int64_t columns, Sum* to, bool add) {
    const Panels<T> panels{o.panel, n, columns, Block<T>::usual_vectors};
    for (int64_t p = 0; p < panels.count(); ++p) {
      const int64_t c = panels.first(p), width = panels.last(p) - c;
      const int nv = panels.vectors_of(p);
      pack_columns(rows, n, c, width, o.panel);
      for (int g = 0; g < gates; ++g)
        for (int64_t u = mine.first; u < mine.last; u += block) {
          const int m = (int)smaller(block, mine.last - u);
          const Transposed<T> left = slot_from(o, gradients, n, slot[g], mine, u);
          Sum* place = to + (g * height + u) * columns + c;
          if (width == nv * W) {
            multiply_transposed<T>(m, nv, n, left, o.panel, place, columns, add);
            continue;
          }
          multiply_transposed<T>(m, nv, n, left, o.panel, o.sums, nv * W, false);
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
  const bool fetches_;          // a step fetches weights before it needs them
  const bool fetches_values_;   // and what forward has kept
  const bool streams_d_input_;  // gradients of inputs are written past the caches
  Panels<T> w_ih_, w_hh_, w_hr_;
  int64_t* gaps_;         // see gap
  Sum* carry_[states];    // gradients that reach the states from the step after, except through the products
  ChunkRows<T> d_slots_;  // rings of a chunk's steps: gradients of the slots
  T* d_h_;                // and of a projected h
  T *zeros_, *panels_, *blocks_;
  Sum *sums_, *sum_slots_, *private_;
  Sum* d_reset_[states];  // where the gradients of the reset states are added up; null what is not wanted
  const T **left_, **tokens_;
  RowEntries<RowStep> row_steps_;
  T** d_x_;
  T* masked_;  // ring of h as it enters the recurrent products, if they see it through a mask
  Panels<T> again_ih_[G], again_hh_[G];
  Sum *bias_x_[G], *bias_r_[G];
  T* kept_;  // ring of what is computed again: what the cell keeps, then its states
  const T** again_lists_;
  T** again_to_;
};

template <class T, class Cell>
static void backward(const Backward<T>& args, int threads) {
  run_pass(threads, [&](int now) { return BackwardPass<T, Cell>(args, now); });
}
