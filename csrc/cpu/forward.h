// Forward over a whole sequence, for any cell.

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
  // every step, which must come from afar as fast as some rows are multiplied with it: see the table. It decides how
  // they are rounded, so it must not depend on how the work is divided in the end.
  //
  // LSTM inference, ms, apart and within the step:
  //
  //   |                 | Zen 4        | 2 threads    | Zen 5        | 2 threads  |
  //   | 100,4,128,128   |              |              | 0.51, 0.49   |            |
  //   | 100,32,128,128  |              |              | 3.93, 3.72   | 2.06, 1.96 |
  //   | 100,4,256,256   |              |              | 1.91, 2.09   | 0.98, 1.04 |
  //   | 100,8,256,256   |              |              | 3.94, 3.88   | 2.03, 2.21 |
  //   | 100,10,300,300  |              |              | 6.55, 6.91   |            |
  //   | 100,16,256,256  |              |              | 7.58, 7.45   | 3.83, 3.81 |
  //   | 100,4,512,512   | 16.6, 16.2   | 8.6, 8.3     | 8.8, 11.1    | 4.1, 5.6   |
  //   | 100,16,512,512  |              |              | 29.2, 28.9   | 15.6, 15.1 |
  //   | 35,20,650,650   | 47.4, 45.4   |              | 21.1, 20.7   | 11.3, 10.9 |
  //   | 20,4,1024,1024  | 15.3, 18.9   |              |              |            |
  //   | 20,8,1024,1024  | 28.2, 28.8   |              | 13.3, 16.2   | 7.0, 8.4   |
  //   | 50,16,1024,1024 |              |              | 59.3, 63.5   | 30.9, 32.5 |
  //   | 50,24,1024,1024 |              |              | 83.8, 81.0   | 45.3, 43.5 |
  //   | 20,32,1024,1024 | 104.9, 101.6 |              | 48.3, 47.6   | 25.5, 24.7 |
  //   | 16,32,2048,2048 |              | 174.8, 183.3 |              |            |
  static bool input_products_within(const Forward<T>& a, int threads) {
    const bool by_rows = rows_enough(a.seq.B, threads) && !units_suit(a, threads);
    const int64_t rows = by_rows ? ceil_div(a.seq.B, threads) : a.seq.B;
    const int64_t bytes = G * a.H * a.I * (int64_t)sizeof(T);
    const bool near_by = bytes <= 1 << 18;
    // Cores that are far apart gain the most: 100,16,200,200 3.03 -> 2.69 ms on 2 threads, near 2.40 -> 2.38. 9 or 10
    // rows lose 1 to 3%.
    const bool one_block = rows == Block<T>::max_rows && bytes <= 1 << 20;
    const int64_t fewest = near_by || one_block || !multiplies_fast() ? 4 : 13;
    const int64_t most_per_row = multiplies_fast() ? 700 << 10 : 1 << 21;
    return !a.batch_invariant && rows >= fewest && bytes < rows * most_per_row && bytes <= int64_t{1} << 24;
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
    const bool may_keep = !a_.saved && a_.seq.tokens() <= most_keeping && weights <= (int64_t)kept_limit();
    // Packing a weight costs about as much as eight uses of it unpacked; to look whether what is kept is still right,
    // as much as two.
    if (plan_.by_rows && weights / a_.directions <= most_copied) copies_ = plan_.threads;
    packs_ = a_.seq.tokens() > (may_keep ? 2 : 8) || within_ || a_.batch_invariant;
    twice_ = packs_ && reads_two_copies<T>(G * a_.H * a_.R / plan_.shares(), plan_.rows, a_.seq.T);
    if (packs_ && merging_pays()) merged_ = a_.H % W;
    together_ = packs_ && gates_together();
    const bool lone_row = packs_ && G == 1 && plan_.rows == 1 && a_.R > 0 && a_.R % (2 * Product<T>::depth) == 0;
    halves_ = lone_row && !a_.batch_invariant && a_.R <= longest_chain<Sum>;
    pairs_ = halves_ || (lone_row && vectors() <= 4);
    keeps_ = packs_ && may_keep;
    measures_ = plan_.threads > 1 && should_measure_meetings();
    streams_ = within_ && streams_saved();
    streams_output_ = far_apart(plan_.threads) && !a_.projected && whole_vectors(a_.seq, a_.output, a_.R);
    // Weights of half the size leave the caches no room for the states that a step reads and writes.
    fetches_values_ = larger(2 * weights, saved_bytes()) > in_no_cache_near_by;
    fetches_ = packs_ && outlast_caches<T>(G * a_.H * (a_.R + (within_ ? a_.I : 0)) / plan_.shares());
  }

  int planned_threads() const { return plan_.threads; }

  // Runs and returns the size of the team. If that is not the planned one nothing has been done.
  int run() {
    const Workspace workspace([this](Arena& arena) { lay_out(arena); });
    if (!keeps_) return work_in_team();
    Arena size{nullptr};
    lay_out_weights(size);
    const Weights<const T>& w = a_.weights[0];
    KeptWeights kept({w.w_ih, w.w_hh, G, a_.I, a_.H, a_.R, a_.directions, input_vectors(), vectors(), plan_.shares(),
                      copies_, twice_, FUSEDRNN_VECTOR_BYTES, (int)sizeof(T), a_.projected, merged_, together_},
                     size.used);
    Arena weights{kept.data()};
    lay_out_weights(weights);
    new_ = kept.is_new();
    if (work_in_team() == plan_.threads) kept.keep();
    return team_size_;
  }

 private:
  struct RowStep;

  // A thread's share of every division, and its own scratch.
  struct Share {
    // Sequences; panels of hidden units, and of the same units in W_ih; panels of the output h.
    Range rows, units, inputs, outputs;
    int copy;          // of the packed weights
    Sum* sums;         // products of a group of rows with one panel per gate
    const T** left;    // rows to multiply
    Sum** places;      // where their products go
    RowStep* to;       // of each of its rows at the step under way
    T* masked;         // h as it enters the recurrent products, if they see it through a mask
    T* copy_of_panel;  // its weights as they lay before they were packed, of those that are kept
  };

  // Tokens of a call that leaves its packed weights to the next: the more of them, the less packing matters. (Zen 5,
  // inference, not kept and kept: LSTM 100,32,512,512 on 2 threads 29.15, 28.7 ms; GRU 200,16,256,256 10.83, 10.67;
  // RNN 100,32,512,512 on 2 threads 7.52, 7.36.)
  static constexpr int64_t most_keeping = 4096;

  // Units are divided though there are rows enough if all weights are large and rows are few, for the faster a core
  // multiplies, the longer it waits for weights; and if a step is long beside a meeting. Zen 4, 2 threads, LSTM
  // inference, by units and by rows, ms: 20,8,1024,1024 14.1, 14.4; 50,8,512,512 8.2, 8.3; 128,8,256,256 5.3, 5.2
  // (while meetings cost 200 ns 5.9, 5.2); 100,12,256,256 6.2, 6.2; 100,16,200,200, where half of the units is no even
  // number of vectors, 6.8, 6.3; 200,16,256,256 19.0, 18.5; 50,16,1024,1024 65.2, 64.6; 100,32,512,512 66.8, 64.6. Zen
  // 5: 100,16,512,512 15.0, 15.4; 35,20,650,650 10.9, 11.4; 100,32,512,512 29.5, 30.8; 20,32,1024,1024 24.2, 24.6;
  // 35,40,650,650 21.5, 21.4; 20,48,1024,1024 37.4, 36.1.
  static bool units_first(const Forward<T>& a, int threads) {
    const double step = flops(a, G, a.seq.B) / peak<T>() / threads;
    return units_suit(a, threads) && step > 300 * meeting_cost();
  }
  // But for what meetings cost now.
  static bool units_suit(const Forward<T>& a, int threads) {
    const int64_t most_rows = multiplies_fast() ? 17 : 8;  // a thread
    const bool enough_units = a.H >= 4 * W * threads;
    return enough_units && outlast_caches<T>(G * a.H * a.R) && a.seq.B < most_rows * threads;
  }

  // Steps are divided where that saves more than it costs: a barrier, lines with h from another core, and tiles that
  // are smaller. 1 thread; 2 while meetings cost little; while they cost much, inference, ms:
  //
  //   |                 | Zen 4                        | Zen 5                        |
  //   |                 | 1; at 75 ns; at 300          | 1; at 50 ns; at 200          |
  //   | LSTM 100,1,64   | 0.102; 0.100; 0.152          | 0.064; 0.050; 0.097          |
  //   | LSTM 100,1,96   | 0.233; 0.195; 0.29           |                              |
  //   | GRU 100,1,64    |                              | 0.044; 0.040; 0.087          |
  //   | GRU 100,1,128   | 0.296; 0.183; 0.283          |                              |
  //   | RNN 100,1,128   | 0.100; 0.077; 0.144          | 0.065; 0.039;                |
  //   | RNN 100,1,256   |                              | 0.233; 0.135; 0.194          |
  //   | RNN 100,2,128   |                              | 0.081; 0.055; 0.132          |
  //   | RNN 1000,4,128  |                              | 1.30; 0.81; 1.78             |
  //   | LSTM 1000,4,128 |                              | 5.3; 2.7; 3.8                |
  static bool worth_barriers(const Forward<T>& a, int threads) {
    const double meetings = 2.5 + lines_exchanged(a, a.R, threads) / 12;
    return saved_by_units(a, G, threads) >= 60 + meetings * meeting_cost();
  }

  static Plan plan(const Forward<T>& a, int threads) {
    // Far from each other cores had better keep to their rows, as backward does with what they leave it.
    const bool by_rows =
        far_apart(threads) && a.saved ? rows_enough_for_backward(a.seq.B, threads) : rows_enough(a.seq.B, threads);
    return make_plan<T>(a, G, threads, 256, by_rows && !units_first(a, threads), worth_barriers(a, threads));
  }

  // Whether the gates of the units at the end share vectors. That spares products, but computes those gates by
  // themselves, not in step with others, which costs a row about as much as 100 steps of a product, each of many rows
  // 60. (Zen 4, 1 thread, apart and shared, ms: LSTM 100,1,24,24 0.031, 0.035; 100,1,100,100 0.284, 0.263; GRU
  // 100,1,24,24 0.024, 0.029.) And no thread may have more to do: the last one gets them, whose share is the largest.
  bool merging_pays() const {
    const int64_t units = a_.H % W, vectors = ceil_div(G * units, W), whole = a_.H / W, shares = plan_.shares();
    if (units == 0 || vectors == G) return false;
    if (whole > 0 && (G - vectors) * a_.R < (within_ ? 60 : 100)) return false;
    // What a step adds to products of its inputs rounds differently then; that must not depend on the threads.
    if (within_ && any_apart()) return true;
    return ceil_div(whole, shares) * G + vectors <= ceil_div(whole + 1, shares) * G;
  }

  // Whether a thread has so few units that the gates of all fit into one panel, for few rows: a panel of each gate has
  // so few vectors then that additions wait for each other. (Zen 5, inference: LSTM 100,1,64,64 on 2 threads 0.0487 ->
  // 0.0373 ms, 100,1,32,32 0.0285 -> 0.0219; GRU 100,1,64,64 on 2 threads 0.0403 -> 0.0330. Two such panels instead of
  // one of 4 vectors for each gate: LSTM 100,1,64,64 0.0597, 0.0599; GRU 0.0429, 0.0442.)
  bool gates_together() const {
    const int64_t units = a_.H - merged_, vectors = ceil_div(units / W, plan_.shares());
    return G > 1 && !within_ && plan_.rows <= few_rows && units % W == 0 && vectors * G <= Block<T>::max_vectors;
  }

  int work_in_team() {
    run_team(plan_.threads, [](void* self, const Team& team) { static_cast<ForwardPass*>(self)->work(team); }, this);
    return team_size_;
  }

  // Of one direction, used for both in turn; if they are kept, of each.
  void lay_out_weights(Arena& arena) {
    const size_t begin = arena.used;
    const auto panels = [&](int64_t K, int64_t columns, int vectors, int matrices, int shares, bool twice = false,
                            int together = 1) {
      T* data = packs_ ? arena.take<T>((twice ? 2 : 1) * matrices * Panels<T>::size(K, columns)) : nullptr;
      return Panels<T>{data, K, columns, vectors, shares, matrices, twice, together};
    };
    w_ih_[0] = panels(a_.I, a_.H - merged_, input_vectors(), G, plan_.shares());
    if (together_) {
      constexpr int vectors = Block<T>::max_vectors / G * G;
      w_hh_[0] = panels(a_.R, G * (a_.H - merged_), vectors, 1, plan_.shares(), twice_, G);
    } else {
      w_hh_[0] = panels(a_.R, a_.H - merged_, vectors(), G, plan_.shares(), twice_);
    }
    merged_ih_ = panels(a_.I, G * merged_, G, 1, 1);
    merged_hh_ = panels(a_.R, G * merged_, G, 1, 1);
    for (int g = 1; g < G; ++g) {
      w_ih_[g] = w_ih_[0], w_ih_[g].index = g;
      if (!together_) w_hh_[g] = w_hh_[0], w_hh_[g].index = g;
    }
    if (a_.projected) w_hr_ = panels(a_.H, a_.R, vectors(), 1, plan_.shares());
    const auto repeat = [&](int times) {
      const size_t each = arena.used - begin;
      arena.used += (times - 1) * each;
      return (int64_t)(each / sizeof(T));
    };
    if (keeps_) between_directions_ = repeat(a_.directions);
    between_copies_ = repeat(copies_);
    if (keeps_) fingerprints_ = arena.take<uint64_t>(copies_ * a_.directions * fingerprints());
  }

  // Vectors of a panel of W_hh.
  int vectors() const { return recurrent_vectors<T>(plan_, a_.H, G, a_.R); }

  // Vectors of a panel of W_ih: those of W_hh where a step multiplies both, else those for many rows if the chunk has
  // many (Zen 5, LSTM inference 100,1,256,256 1.09 -> 1.03 ms; 100,2,128,128 0.40 -> 0.36).
  int input_vectors() const {
    const bool few = plan_.chunk * plan_.rows < Block<T>::max_rows;
    return within_ || few ? vectors() : Block<T>::vectors_for(Block<T>::max_rows, a_.H);
  }

  // How many panels one direction's weights have.
  int64_t fingerprints() const {
    return G * w_ih_[0].count() + (together_ ? 1 : G) * w_hh_[0].count() + (merged_ ? 2 : 0) +
           (a_.projected ? w_hr_.count() : 0);
  }

  // Those of a direction in one of the copies.
  Panels<T> of(int d, int copy, Panels<T> w) const {
    if (w.data) w.data += d * between_directions_ + copy * between_copies_;
    return w;
  }

  void lay_out(Arena& arena) {
    const int64_t B = a_.seq.B;
    if (!keeps_) lay_out_weights(arena);
    Sum *const bias_x = arena.take<Sum>(G * state_width_), *const bias_r = arena.take<Sum>(G * state_width_);
    for (int g = 0; g < G; ++g) bias_x_[g] = bias_x + g * state_width_, bias_r_[g] = bias_r + g * state_width_;
    zeros_ = arena.take<Sum>(Block<T>::max_columns);
    const int64_t gaps = plan_.threads * gap<T>;
    gaps_ = arena.take<int64_t>(B);
    for (T*& h : h_) h = arena.take<T>(B * output_width_ + gaps);
    for (int s = narrow && !a_.projected ? 0 : 1; s < states; ++s) state_[s] = arena.take<Sum>(B * state_width_ + gaps);
    if (a_.projected) unprojected_ = arena.take<T>(B * state_width_ + gaps);
    if (!in_place_ && !within_) gates_ = {arena, plan_, B, gates_width_};
    if (a_.h_mask) masked_ = arena.take<T>(plan_.threads * B * output_width_);
    sums_ = arena.take<Sum>(plan_.threads * sums_size());
    if (keeps_) copies_of_panels_ = arena.take<T>(plan_.threads * panel_size());
    left_ = arena.take<const T*>(plan_.threads * pointers());
    places_ = arena.take<Sum*>(plan_.threads * pointers());
    row_steps_ = {arena, plan_, B};
  }

  static constexpr int64_t sums_size() { return Cell::slots * group * Block<T>::max_columns; }
  // Weights of a panel, at most.
  int64_t panel_size() const { return Block<T>::max_columns * larger(a_.I, a_.projected ? larger(a_.H, a_.R) : a_.R); }
  int64_t pointers() const { return larger(group, plan_.chunk * plan_.rows); }

  void work(const Team& team) {
    if (team.rank == 0) team_size_ = team.size;
    if (team.size != plan_.threads) return;
    Share share{};
    const bool by_rows = plan_.by_rows;
    share.copy = copies_ > 1 ? team.rank : 0;
    share.rows = by_rows ? rows_part(a_.seq, team.rank, team.size) : Range{0, a_.seq.B};
    const auto panels = [&](const Panels<T>& w, bool merged) {
      Range mine = by_rows ? Range{0, w.count()} : part(w.count(), team.rank, team.size);
      if (merged && mine.last == w.count() && (by_rows || team.rank == team.size - 1)) ++mine.last;
      return mine;
    };
    share.units = panels(w_hh_[0], merged_);
    share.inputs = panels(w_ih_[0], merged_);
    if (a_.projected) share.outputs = panels(w_hr_, false);
    share.sums = sums_ + team.rank * sums_size();
    share.left = left_ + team.rank * pointers();
    share.places = places_ + team.rank * pointers();
    share.to = row_steps_.of(team.rank);
    if (keeps_) share.copy_of_panel = copies_of_panels_ + team.rank * panel_size();
    if (a_.h_mask) share.masked = masked_ + team.rank * a_.seq.B * output_width_;
    clear_padding(a_.seq, a_.output, a_.directions * a_.R, team);
    for (int s = 1; s < states; ++s) clear_padding(a_.seq, a_.states[s], a_.directions * a_.H, team);
    for (int d = 0; d < a_.directions; ++d) {
      prepare(d, share, team);
      team.sync();
      if (d == 0 && measures_) measure_meetings(team);
      for (int64_t b = share.rows.first; b < share.rows.last; ++b) start_row_step(b, share.to[b]);
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
    if (streams_ || streams_output_) S::finish_streams();
  }

  int64_t time(int d, int64_t i) const { return d == 0 ? i : a_.seq.T - 1 - i; }

  // Of all that is kept for backward.
  int64_t saved_bytes() const { return a_.saved ? a_.directions * saved_each() * (int64_t)sizeof(T) : 0; }

  // Whether what is kept for backward goes past the caches, which it would only pass through: each line would be read
  // before it is written. (Zen 4, LSTM forward of training 100,64,256,256 69.7 -> 68.2 ms, 100,32,128,128 9.5 -> 8.8,
  // 100,32,512,512 129.0 -> 128.4; backward as fast as before.) So it is where cores are far apart.
  bool streams_saved() const {
    constexpr uintptr_t vector = W * sizeof(T);
    const bool far = far_apart(plan_.threads) && sizeof(T) == sizeof(Sum);
    if (!a_.saved || (saved_bytes() <= in_no_cache_near_by && !far)) return false;
    uintptr_t odd = (uintptr_t)a_.H * sizeof(T);
    for (int d = 0; d < a_.directions; ++d) odd |= (uintptr_t)saved(d).kept;
    return odd % vector == 0;
  }

  // Whether the cell wants the input and the recurrent product of gate g apart, not their sum.
  static constexpr bool apart(int g) { return Cell::input_slot[g] != Cell::recurrent_slot[g]; }
  static constexpr bool any_apart() {
    for (int g = 0; g < G; ++g)
      if (apart(g)) return true;
    return false;
  }

  // out = or += n rows times panel p of w; or =, where w is not packed, times the same columns of its origin.
  void multiply(const T* const* rows, int64_t n, const Panels<T>& w, int64_t p, const T* unpacked, Sum* out,
                int64_t ldo, bool add = false, const T* next = nullptr, Fetches* fetches = nullptr) const {
    if (w.data)
      multiply_panel(rows, n, w.K, w.panel(p), w.vectors_of(p), out, ldo, add, next, fetches);
    else
      multiply_unpacked(rows, n, w.K, unpacked, w.first(p), w.last(p), out, ldo);
  }

  // Packs weights, adds biases, copies initial states: a part each, but of weights of which each has a copy all.
  void prepare(int d, const Share& share, const Team& team) {
    const Weights<const T>& w = a_.weights[d];
    const int64_t H = a_.H, of_input = w_ih_[0].count(), panels = w_hh_[0].count();
    const auto mine = [&](int64_t n) { return copies_ > 1 ? Range{0, n} : part(n, team.rank, team.size); };
    const auto pack_ours = [&](const Panels<T>& all, int64_t p, const Columns<T>& columns, int64_t index) {
      pack(of(d, share.copy, all), p, columns, index, share.copy_of_panel);
    };
    int64_t packed = (share.copy * a_.directions + d) * fingerprints();
    const Range inputs = mine(G * of_input);
    for (int64_t item = inputs.first; item < inputs.last; ++item) {
      const int64_t g = item / of_input, p = item % of_input;
      pack_ours(w_ih_[g], p, {w.w_ih + g * H * a_.I, a_.I}, packed + item);
    }
    packed += G * of_input;
    const int64_t each = together_ ? 1 : G;
    const Range recurrent = mine(each * panels);
    for (int64_t item = recurrent.first; item < recurrent.last; ++item) {
      const int64_t g = item / panels, p = item % panels;
      const int64_t first = w_hh_[g].first(p), units = (w_hh_[g].last(p) - first) / G;
      const Columns<T> of_all{w.w_hh + first / G * a_.R, a_.R, units, H, first}, of_gate{w.w_hh + g * H * a_.R, a_.R};
      pack_ours(w_hh_[g], p, together_ ? of_all : of_gate, packed + item);
    }
    packed += each * panels;
    if (merged_ && (copies_ > 1 || team.rank == team.size - 1)) {
      const int64_t first = H - merged_;
      pack_ours(merged_ih_, 0, {w.w_ih + first * a_.I, a_.I, merged_, H}, packed);
      pack_ours(merged_hh_, 0, {w.w_hh + first * a_.R, a_.R, merged_, H}, packed + 1);
    }
    if (merged_) packed += 2;
    if (a_.projected) {
      const Range outputs = mine(w_hr_.count());
      for (int64_t p = outputs.first; p < outputs.last; ++p) pack_ours(w_hr_, p, {w.w_hr, H}, packed + p);
    }
    const Range units = part(H, team.rank, team.size);
    for (int g = 0; g < G; ++g)
      for (int64_t j = units.first; j < units.last; ++j) {
        const Sum x = w.b_ih ? w.b_ih[g * H + j] : T(0), r = w.b_hh ? w.b_hh[g * H + j] : T(0);
        bias_x_[g][j] = apart(g) ? x : x + r;
        bias_r_[g][j] = apart(g) ? r : Sum(0);
      }
    const Range rows = plan_.by_rows ? share.rows : part(a_.seq.B, team.rank, team.size);
    gates_.place(plan_, team.rank, rows, a_.seq.B);
    if (team.rank == 0)
      for (int64_t j = 0; j < Block<T>::max_columns; ++j) zeros_[j] = 0;
    for (int64_t b = rows.first; b < rows.last; ++b) {
      gaps_[b] = plan_.by_rows ? team.rank * gap<T> : 0;
      for (int s = 0; s < states; ++s) {
        const int64_t width = a_.state_width(s), padded = s == 0 ? output_width_ : state_width_;
        const T* initial = a_.initial(d, s, 0, b);
        const bool empty = b >= a_.seq.size(0);
        for (int64_t j = 0; j < padded; ++j) {
          const T value = initial && j < width ? initial[j] : T(0);
          if (empty && j < width) a_.final[s][a_.state_at(d, s, b) + j] = value;
          if (s == 0) h_at(0, b)[j] = h_at(1, b)[j] = value;
          if (state_[s]) carried_at(s, b)[j] = value;
        }
      }
    }
  }

  // Packs a panel, unless an earlier call has done it and its weights are still the same. What is kept is packed from a
  // copy: so its fingerprint tells what it holds even if somebody writes to the weights meanwhile.
  void pack(Panels<T> packed, int64_t p, const Columns<T>& w, int64_t index, T* copy) const {
    if (!packed.data) return;
    if (!keeps_) {
      pack_transposed(packed, p, w);
      packed.repeat(p);
      return;
    }
    const int64_t first = packed.first(p), last = packed.last(p), piece = w.piece ? w.piece : last - first;
    const auto fingerprint_of = [&](const Columns<T>& columns) {
      uint64_t result = 0;
      for (int64_t c = first; c < last; c += piece) result = fingerprint(columns[c], piece * packed.K, result);
      return result;
    };
    if (!new_ && fingerprints_[index] == fingerprint_of(w)) return;
    for (int64_t c = first; c < last; c += piece)
      __builtin_memcpy(copy + (c - first) * packed.K, w[c], (size_t)(piece * packed.K) * sizeof(T));
    const Columns<T> copied{copy, packed.K, 0, 0, first};
    fingerprints_[index] = fingerprint_of(copied);
    pack_transposed(packed, p, copied);
    packed.repeat(p);
  }

  // Where the input products of row b at order i wait for their step.
  Sum* products_at(int d, int64_t begin, int64_t i, int64_t b) const {
    if (within_) return nullptr;
    if (!in_place_) return gates_.at(i - begin, b);
    return reinterpret_cast<Sum*>(kept_at(d, i, b));
  }

  // Where backward will find what the cell keeps of row b at order i.
  T* kept_at(int d, int64_t i, int64_t b) const {
    return saved(d).kept + (a_.seq.start(time(d, i)) + b) * Cell::kept * a_.H;
  }

  int saved_gates() const { return a_.recompute ? 0 : Cell::kept; }
  // Values that are kept for backward, of each direction.
  int64_t saved_each() const { return saved_size(saved_gates(), states, a_.seq.tokens(), a_.H, a_.R, a_.projected); }
  Saved<T> saved(int d) const {
    return saved_view(a_.saved + d * saved_each(), saved_gates(), states, a_.seq.tokens(), a_.H);
  }

  // gates = x W_ih^T for the rows and units of one thread, orders [begin, end). Whole panels go right to where they
  // wait, if that is evenly spaced. (Zen 5, through the sums, biases added on the way, and so, inference, ms: LSTM
  // 100,1,256,256 0.911, 0.879; 1000,1,128,128 1.92, 1.84; GRU 100,1,64,64 0.0448, 0.0428.)
  void project_inputs(int d, const Share& share, int64_t begin, int64_t end) {
    int64_t count = 0;
    for (int64_t i = begin; i < end; ++i)
      for (int64_t b = share.rows.first; b < smaller(share.rows.last, a_.seq.size(time(d, i))); ++b) {
        share.left[count] = a_.input.at(a_.seq, time(d, i), b);
        share.places[count++] = products_at(d, begin, i, b);
      }
    const int64_t between = even_distance(share.places, count);
    const int64_t whole = smaller(share.inputs.last, w_ih_[0].count());
    for (int64_t p = share.inputs.first; p < whole; ++p)
      for (int g = 0; g < G; ++g) {
        const Panels<T> w = of(d, share.copy, w_ih_[g]);
        const T* unpacked = a_.weights[d].w_ih + g * a_.H * a_.I;
        const int64_t first = w.first(p), columns = w.last(p) - first, width = w.vectors_of(p) * W;
        for_groups<T>(0, count, [&](int64_t r, int64_t n) {
          if (between != 0 && columns == width) {
            multiply(share.left + r, n, w, p, unpacked, share.places[r] + input_place(g) + first, between);
            return;
          }
          multiply(share.left + r, n, w, p, unpacked, share.sums, width);
          hand_out(share.sums, width, share.places + r, n, input_place(g) + first, columns);
        });
      }
    if (share.inputs.last > whole)
      for_groups<T>(0, count, [&](int64_t r, int64_t n) {
        const int64_t width = merged_ih_.vectors_of(0) * W;
        multiply(share.left + r, n, of(d, share.copy, merged_ih_), 0, nullptr, share.sums, width);
        for (int g = 0; g < G; ++g)
          hand_out(share.sums + g * merged_, width, share.places + r, n, input_place(g) + a_.H - merged_, merged_);
      });
  }

  // Copies columns of n rows of sums to `place` behind those rows' places.
  static void hand_out(const Sum* sums, int64_t ldo, Sum* const* places, int64_t n, int64_t place, int64_t columns) {
    for (int64_t k = 0; k < n; ++k)
      for (int64_t j = 0; j < columns; j += W)
        S::store(places[k] + place + j, S::load(sums + k * ldo + j), (int)smaller(W, columns - j));
  }

  // Where gate g begins among the input products of a row.
  int64_t input_place(int g) const { return (in_place_ ? Cell::input_slot[g] : g) * a_.H; }

  // From each of some places to the next; 0 if that differs.
  static int64_t even_distance(Sum* const* places, int64_t count) {
    if (count < 2) return 1;
    const int64_t distance = places[1] - places[0];
    for (int64_t k = 2; k < count; ++k)
      if (places[k] - places[k - 1] != distance) return 0;
    return distance;
  }

  // What some rows have as inputs at time t, of which each turn has a part fetched. (Zen 5, inference, 1 thread, LSTM
  // 100,64,256,256 28.8 -> 28.5 ms, GRU 21.65 -> 21.25.)
  void list_inputs(Fetches& fetches, const Share& share, int64_t t, int64_t turn, int64_t row, int64_t n) const {
    const Range some = part(a_.I, (int)(turn - share.units.first), (int)(share.units.last - share.units.first));
    const int64_t last = smaller(row + n, a_.seq.size(t));
    for (int64_t b = row; b < last; ++b) fetches.add(a_.input.at(a_.seq, t, b), some);
  }

  // Units whose gates a step computes together: those of a panel, or those that share vectors (see merged_), whose
  // gates lie side by side in a panel of their own.
  struct Units {
    int64_t first, last;
    int vectors;   // of a panel
    int matrices;  // that have such a panel: one for each gate, or one for all
    int64_t panel;
    const Panels<T>*inputs, *recurrent;
    int64_t between = 0;  // a gate and the next, if they share a panel
  };
  Units units(int64_t k) const {
    const Panels<T>& w = w_hh_[0];
    if (k == w.count())
      return {a_.H - merged_, a_.H, merged_hh_.vectors_of(0), 1, 0, &merged_ih_, &merged_hh_, merged_};
    if (!together_) return {w.first(k), w.last(k), w.vectors_of(k), G, k, w_ih_, w_hh_};
    return {w.first(k) / G, w.last(k) / G, w.vectors_of(k), 1, k, nullptr, w_hh_, w.vectors_of(k) / G * W};
  }

  // What step i uses after the k-th of its matrices, W_ih's gates first if it has them, at a turn of its units.
  const T* next_panel(int d, const Share& share, int64_t i, int64_t turn, int k) const {
    if (!fetches_) return nullptr;
    Units at = units(in_turn(share.units, turn, i));
    if (++k == (within_ ? 2 : 1) * at.matrices) {
      k = 0;
      if (++turn == share.units.last) turn = share.units.first, ++i;
      at = units(in_turn(share.units, turn, i));
    }
    const int inputs = within_ ? at.matrices : 0;
    const Panels<T>& w = k < inputs ? at.inputs[k] : at.recurrent[in_turn({0, at.matrices}, k - inputs, i)];
    return of(d, share.copy, w).panel(at.panel);
  }

  // One time step for the rows and units of one thread.
  void step(int d, const Share& share, int64_t begin, int64_t i) {
    const int64_t t = time(d, i), last_row = smaller(share.rows.last, a_.seq.size(t));
    const T* all_h = h_[i & 1];
    const auto entering = [&](int64_t b) { return a_.h_mask ? share.masked + b * output_width_ : h_at(i, b); };
    // What the other threads have just written, all at once, before products come across it line by line (Zen 4, 2
    // threads, RNN 100,1,256,256 0.357 -> 0.330 ms).
    if (plan_.shares() > 1)
      for (int64_t k = 0; k < last_row * output_width_; k += 64 / (int64_t)sizeof(T)) __builtin_prefetch(all_h + k);
    if (a_.h_mask)
      for (int64_t b = share.rows.first; b < last_row; ++b)
        apply_mask(h_at(i, b), a_.h_mask + a_.state_at(d, 0, b), a_.R, share.masked + b * output_width_);
    for (int64_t b = share.rows.first; b < last_row; ++b) find_row_step(d, begin, i, t, b, share.to[b]);
    for (int64_t turn = share.units.first; turn < share.units.last; ++turn) {
      const Units mine = units(in_turn(share.units, turn, i));
      const int64_t first = mine.first, last = mine.last;
      const int nv = mine.vectors, matrices = mine.matrices;
      const Places at = places(mine);
      for_groups<T>(share.rows.first, last_row, [&](int64_t row, int64_t n) {
        Fetches fetches;
        if (fetches_values_) {
          for (int64_t k = row; k < row + n; ++k) share.to[k].list(fetches, {first, last}, a_.H, streams_);
          if (within_ && i + 1 < a_.seq.T) list_inputs(fetches, share, time(d, i + 1), turn, row, n);
          fetches.divide(matrices * (count_tiles<T>(n, a_.R, nv) + (within_ ? count_tiles<T>(n, a_.I, nv) : 0)));
        }
        if (within_) {
          for (int64_t k = 0; k < n; ++k) share.left[k] = a_.input.at(a_.seq, t, row + k);
          for (int g = 0; g < matrices; ++g)
            multiply(share.left, n, of(d, share.copy, mine.inputs[g]), mine.panel, nullptr, share.sums + at.input[g],
                     nv * W, false, next_panel(d, share, i, turn, g), &fetches);
        }
        for (int64_t k = 0; k < n; ++k) share.left[k] = entering(row + k);
        for (int k = 0; k < matrices; ++k) {
          const int g = (int)in_turn({0, matrices}, k, i);
          if (pairs_) {
            const Panels<T> w = of(d, share.copy, mine.recurrent[g]).at_step(i);
            multiply_in_pairs(share.left[0], a_.R, w.panel(mine.panel), nv, share.sums, halves_);
            continue;
          }
          multiply(share.left, n, of(d, share.copy, mine.recurrent[g]).at_step(i), mine.panel,
                   a_.weights[d].w_hh + g * a_.H * a_.R, share.sums + at.recurrent[g], nv * W, within_ && !at.apart[g],
                   next_panel(d, share, i, turn, (within_ ? matrices : 0) + k), &fetches);
        }
        // Rows within, for what is the same for all of them to stay in registers.
        const auto each = [&](auto&& compute) __attribute__((always_inline)) {
          for_vectors<T>(first, last, [&](auto M, int64_t j, int lanes) __attribute__((always_inline)) {
            for (int64_t k = 0; k < n; ++k)
              compute(M, share.to[row + k], share.sums + k * nv * W + (j - first), j, lanes);
          });
        };
        compute_gates(at, each);
      });
    }
  }

  // Where values of each gate begin: in the sums of a panel those of its products, in a plane of their slot or, of
  // units that share vectors, side by side, those of the inputs in a plane of their own if the cell wants any apart;
  // and what to.x points at. What lies behind a gate's there is computed with, as is the padding of states, and means
  // nothing.
  struct Places {
    int64_t input[G], recurrent[G], slot[Cell::slots], x[G];
    bool apart[G];  // products of the inputs are still to be added
  };
  Places places(const Units& mine) const {
    const int64_t plane = group * mine.vectors * W;
    Places at;
    for (int g = 0; g < G; ++g) {
      const int input = Cell::input_slot[g], recurrent = Cell::recurrent_slot[g];
      at.input[g] = mine.between ? g * mine.between : input * plane;
      at.recurrent[g] = mine.between ? (any_apart() ? plane : 0) + g * mine.between : recurrent * plane;
      at.slot[input] = at.input[g], at.slot[recurrent] = at.recurrent[g];
      at.apart[g] = within_ && at.input[g] != at.recurrent[g];
      at.x[g] = within_ ? g * state_width_ : input_place(g);
    }
    return at;
  }

  // Where one row's values of one step come from and go to; null what is not wanted.
  struct RowStep {
    const Sum* x;  // the inputs' products, or their biases if the step makes those
    const T* h_before;
    T *kept, *h, *output;
    Sum* state[states];      // carried states, see state_
    T* every_state[states];  // their values at each step
    T* saved_state[states];  // for backward
    int64_t lots[states];    // of zoneout

    // Where some units go, but for what is streamed.
    void list(Fetches& fetches, Range units, int64_t H, bool streams) const {
      fetches.add(h, units);
      if (output) fetches.add(output, units);
      for (int s = 0; s < states; ++s) {
        if (state[s]) fetches.add(state[s], units);
        if (every_state[s]) fetches.add(every_state[s], units);
        if (saved_state[s] && !streams) fetches.add(saved_state[s], units);
      }
      if (kept && !streams)
        for (int k = 0; k < Cell::kept; ++k) fetches.add(kept + k * H, units);
    }
  };

  // Of one row, what is the same at all steps.
  void start_row_step(int64_t b, RowStep& to) const {
    to = {};
    if (within_) to.x = bias_x_[0];
    if (a_.projected) to.h = unprojected_at(b);
    for (int s = 0; s < states; ++s)
      if (state_[s]) to.state[s] = carried_at(s, b);
  }

  // The rest, at order i.
  void find_row_step(int d, int64_t begin, int64_t i, int64_t t, int64_t b, RowStep& to) const {
    if (!within_) to.x = products_at(d, begin, i, b);
    if (!a_.projected) {
      to.h_before = h_at(i, b), to.h = h_at(i + 1, b);
      if (a_.output.data) to.output = a_.output.at(a_.seq, t, b) + d * a_.R;
    }
    for (int s = 1; s < states; ++s)
      if (a_.states[s].data) to.every_state[s] = a_.states[s].at(a_.seq, t, b) + d * a_.H;
    if (keeps_gates_) to.kept = kept_at(d, i, b);
    if (a_.saved)
      for (int s = 0; s < states; ++s) to.saved_state[s] = saved(d).state[s] + (a_.seq.start(t) + b) * a_.H;
    if (a_.zoneout.on())
      for (int s = 0; s < states; ++s) to.lots[s] = a_.lots_at(d, s, t, b);
  }

  // The gates of some rows and units, of which `each` makes the round. The second half of a cell waits for the first,
  // so all take the first before; what it leaves lies where the sums did. (Zen 5, inference, at once and so, ms: LSTM
  // 100,32,128,128 3.69, 3.65; 128,8,64,64 0.343, 0.334; 1000,4,128,128 4.71, 4.64; 100,1,128,128 0.206, 0.201; GRU
  // 1000,4,128,128 3.57, 3.51.)
  template <class Each>
  inline __attribute__((always_inline)) void compute_gates(const Places& at, Each&& each) const {
    constexpr bool in_halves = Cell::kept > 0;
    for_constant(within_, [&](auto within) __attribute__((always_inline)) {
      if constexpr (in_halves)
        each([&](auto M, const RowStep& to, Sum* sums, int64_t j, int lanes) __attribute__((always_inline)) {
          typename decltype(M)::V keep[Cell::slots];
          activate<decltype(M), within.value>(to, sums, at, j, lanes, keep);
          for (int k = 0; k < Cell::slots; ++k) M.store(sums + at.slot[k], keep[k], lanes);
        });
      else
        for_constant(a_.zoneout.on(), [&](auto zoneout) __attribute__((always_inline)) {
          each([&](auto M, const RowStep& to, Sum* sums, int64_t j, int lanes) __attribute__((always_inline)) {
            typename decltype(M)::V keep[Cell::slots];
            activate<decltype(M), within.value>(to, sums, at, j, lanes, keep);
            advance<decltype(M), zoneout.value>(to, keep, j, lanes);
          });
        });
    });
    if constexpr (in_halves)
      for_constant(a_.zoneout.on(), [&](auto zoneout) __attribute__((always_inline)) {
        each([&](auto M, const RowStep& to, Sum* sums, int64_t j, int lanes) __attribute__((always_inline)) {
          typename decltype(M)::V keep[Cell::slots];
          for (int k = 0; k < Cell::slots; ++k) keep[k] = M.load(sums + at.slot[k]);
          advance<decltype(M), zoneout.value>(to, keep, j, lanes);
        });
      });
  }

  // Both halves of the cell, for units [j, j + M::width) of one row.
  template <class M, bool within, class V = typename M::V>
  inline __attribute__((always_inline)) void activate(const RowStep& to, const Sum* sums, const Places& at, int64_t j,
                                                      int lanes, V* keep) const {
    V x[G], r[G];
    for (int g = 0; g < G; ++g) {
      x[g] = M::load(to.x + at.x[g] + j, lanes);
      if (!within) x[g] = x[g] + M::load(bias_x_[g] + j);
      r[g] = M::load(sums + at.recurrent[g]);
      if (any_apart()) x[g] = x[g] + M::load(at.apart[g] ? sums + at.input[g] : zeros_);
      if (apart(g)) r[g] = r[g] + M::load(bias_r_[g] + j);
    }
    Cell::template activate<M>(x, r, keep);
  }

  template <class M, bool zoneout, class V = typename M::V>
  inline __attribute__((always_inline)) void advance(const RowStep& to, V* keep, int64_t j, int lanes) const {
    V prev[states], next[states];
    if constexpr (narrow)
      prev[0] = a_.projected ? M::zero() : M::load(to.state[0] + j);
    else
      prev[0] = a_.projected ? M::zero() : M::load(to.h_before + j);
    for (int s = 1; s < states; ++s) prev[s] = M::load(to.state[s] + j);
    Cell::template advance<M>(keep, prev, next);
    for (int s = 0; s < states; ++s)
      if (zoneout && a_.zoneout.rate[s] > 0) {
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
    if (to.output) streams_output_ ? M::stream(to.output + j, next[0]) : M::store(to.output + j, next[0], lanes);
    if (streams_) {
      if (keeps_gates_)
        for (int k = 0; k < Cell::kept; ++k) M::stream(to.kept + k * a_.H + j, keep[k]);
      for (int s = 0; s < states; ++s) M::stream(to.saved_state[s] + j, next[s]);
      return;
    }
    if (keeps_gates_)
      for (int k = 0; k < Cell::kept; ++k) M::store(to.kept + k * a_.H + j, keep[k], lanes);
    if (a_.saved)
      for (int s = 0; s < states; ++s) M::store(to.saved_state[s] + j, next[s], lanes);
  }

  // h = W_hr (o tanh c) for the rows and outputs of one thread.
  void project_output(int d, const Share& share, int64_t i) {
    const int64_t t = time(d, i), last_row = smaller(share.rows.last, a_.seq.size(t));
    for (int64_t p = share.outputs.first; p < share.outputs.last; ++p) {
      const int64_t first = w_hr_.first(p), columns = w_hr_.last(p) - first, ldo = w_hr_.vectors_of(p) * W;
      for_groups<T>(share.rows.first, last_row, [&](int64_t row, int64_t n) {
        for (int64_t k = 0; k < n; ++k) share.left[k] = unprojected_at(row + k);
        multiply(share.left, n, of(d, share.copy, w_hr_), p, a_.weights[d].w_hr, share.sums, ldo);
        for (int64_t k = 0; k < n; ++k)
          for (int64_t j = 0; j < columns; j += W) {
            const V value = S::load(share.sums + k * ldo + j);
            const int lanes = (int)smaller(W, columns - j);
            const int64_t b = row + k;
            S::store(h_at(i + 1, b) + first + j, value);
            if (a_.output.data) S::store(a_.output.at(a_.seq, t, b) + d * a_.R + first + j, value, lanes);
            if (a_.saved) S::store(saved(d).projected + (a_.seq.start(t) + b) * a_.R + first + j, value, lanes);
          }
      });
    }
  }

  // Final states of the rows whose sequence ends with order i.
  void finish(int d, const Share& share, int64_t i) {
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
  void start_anew(int d, const Share& share, int64_t i) {
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
    if (s == 0) f(h_at(i, b));
    if (state_[s]) f(carried_at(s, b));
  }

  // Of one row: h as it enters order i, another state, what a projection takes.
  T* h_at(int64_t i, int64_t b) const { return h_[i & 1] + b * output_width_ + gaps_[b]; }
  Sum* carried_at(int s, int64_t b) const { return state_[s] + b * state_width_ + gaps_[b]; }
  T* unprojected_at(int64_t b) const { return unprojected_ + b * state_width_ + gaps_[b]; }

  // The columns of state s that one thread computes.
  Range columns(const Share& share, int s) const {
    if (s == 0 && a_.projected) return columns_of(w_hr_, share.outputs);
    if (share.units.first == share.units.last) return {0, 0};
    return {units(share.units.first).first, units(share.units.last - 1).last};
  }

  const Forward<T>& a_;
  const Plan plan_;
  int team_size_ = 0;
  const int64_t state_width_, output_width_;  // H and R rounded up to whole vectors
  bool within_;                               // a step projects its inputs itself
  bool keeps_gates_;                          // for backward
  bool in_place_;                             // input products lie where backward will find the gates
  int64_t gates_width_;
  bool packs_, keeps_;  // weights are packed; for later calls too
  // Units at the end, too few for a vector, whose gates share vectors: gate by gate side by side in one panel, which
  // comes after the others. 0 where that saves none. (Zen 4, LSTM inference, ms: 100,16,200,200 10.7 -> 10.3;
  // 100,32,100,100 6.2 -> 5.6; 100,16,37,37 0.587 -> 0.556; 1000,1,8,8 0.163 -> 0.108.)
  int64_t merged_ = 0;
  bool together_ = false;   // all gates of some units have a panel of W_hh together
  bool pairs_, halves_;     // a lone row's chains go two by two; a single one in halves, which no thread decides
  bool measures_;           // what meetings cost
  bool fetches_;            // a step fetches weights before it needs them
  bool fetches_values_;     // and where its results go
  bool streams_;            // what is kept for backward is written past the caches
  bool streams_output_;     // and so is the output
  bool new_ = true;         // what is kept holds nothing yet
  uint64_t* fingerprints_;  // of the weights that the kept panels were packed from
  int copies_ = 1;          // of the packed weights
  bool twice_;              // in each of them two of W_hh
  int64_t between_directions_ = 0, between_copies_ = 0;
  Panels<T> w_ih_[G], w_hh_[G], w_hr_, merged_ih_, merged_hh_;
  Sum *bias_x_[G], *bias_r_[G], *zeros_;
  int64_t* gaps_;  // see gap
  T* h_[2];        // h of the previous step and of this one, in turn
  // The other states, and h where h_ has fewer bits: what a GRU adds at a step may be less than those can hold.
  Sum* state_[states] = {};
  T *unprojected_, *masked_, *copies_of_panels_;
  ChunkRows<Sum> gates_;  // input products, unless they lie in place or the step makes them
  Sum* sums_;
  const T** left_;
  Sum** places_;
  RowEntries<RowStep> row_steps_;
};

// The same results for any number of threads, so it leaves out those that are in somebody's way.
template <class T, class Cell>
static void forward(const Forward<T>& args, int threads) {
  using Pass = ForwardPass<T, Cell>;
  const bool within = Pass::input_products_within(args, threads);
  run_pass(undisturbed_threads(threads), [&](int now) { return Pass(args, now, within); });
}
