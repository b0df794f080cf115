// How the work of a call is divided, and what both passes through time, forward.h and backward.h, share.
//
// Work is divided among threads in one of two ways (Plan). By rows: each thread takes some sequences of the batch
// through all of time; no thread waits for another until the end. By units: each thread computes some hidden units of
// every sequence, and all meet at a barrier after each step; for batches too small to be split, and where that spares
// the caches, since each thread then reads its units' weights only.
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

  // Threads that divide the hidden units; the rows.
  int shares() const { return by_rows ? 1 : threads; }
  int row_shares() const { return by_rows ? threads : 1; }
};

// Whether each thread may have some sequences to itself.
static inline bool rows_enough(int64_t B, int threads) { return B >= 4 * threads; }

// The same for backward. Of what threads that divide units exchange at each step, backward has the more: the gradients
// of all gates. Zen 5, training on 2 threads, by units and by rows, ms, near to each other and far apart (see
// meeting_cost): LSTM 1000,4,128,128 9.1, 9.1 and 13.6, 10.4; GRU 6.9, 6.9 and 10.1, 7.9; RNN 2.85, 2.65 and 5.5, 4.0;
// LSTM 100,4,64,64 0.319, 0.316 and 0.61, 0.48. If forward as well goes by rows when they are far apart: RNN
// 1000,4,128,128 4.0 -> 3.5, LSTM 100,6,200,200 4.25 -> 3.97. With one row for each: LSTM 100,2,128,128 0.53, 0.58 and
// 1.01, 0.89.
static inline bool rows_enough_for_backward(int64_t B, int threads) { return B >= 2 * threads; }

// Flops a nanosecond of one core at best, about, and if it reads weights for one row only.
template <class T>
static double peak() {
  const int64_t bytes = multiplies_fast() ? 64 : smaller(32, FUSEDRNN_VECTOR_BYTES);
  return 14.8 * (double)bytes / sizeof(SumOf<T>);
}
template <class T>
constexpr double peak_of_reading = 640.0 / sizeof(T);

// Whether backward divides by units though there are rows enough. By rows a step reads all recurrent weights once for a
// thread's few rows; those that its second-level cache (1 MB here) cannot hold come from the third, for all threads at
// once. Zen 5, 2 threads, LSTM, by rows and by units, ms: 100,32,512,512 76.0, 72.7; 128,8,256,256 7.4, 6.4. With 32
// rows a thread it makes no difference: 100,64,256,256 36.9, 37.8. Nor do so many units exchange much beside what they
// compute. Up to 256 that is another matter where cores are far from each other: training of LSTM 200,16,256,256 23.0,
// 23.3 near and 26.2, 28.3 far, of GRU 17.5, 17.3 and 20.2, 21.7. Forward has less to gain and sums nothing over rows:
// see there.
template <class T>
static bool weights_outweigh_rows(const Layer<T>& a, int gates, int threads) {
  const int64_t bytes = gates * a.H * a.R * (int64_t)sizeof(T), most_rows = a.R > 256 ? 32 : 8;
  return bytes >= 1 << 19 && a.seq.B < most_rows * threads && a.H >= 4 * Block<T>::width * threads;
}

// Whether so many values, all read at each step, are in no cache near by when their turn comes again.
template <class T>
static bool outlast_caches(int64_t values) {
  return values * (int64_t)sizeof(T) > in_no_cache_near_by;
}

// Flops of all steps of one direction, and of each.
template <class T>
static double flops(const Layer<T>& a, int gates, int64_t tokens) {
  return 2.0 * (double)tokens * (double)(a.I + a.R) * (double)(gates * a.H);
}

// Nanoseconds that a step of forward saves one thread that divides its units with others, about, but for what they
// exchange.
template <class T>
static double saved_by_units(const Layer<T>& a, int gates, int threads) {
  const double work = flops(a, gates, a.seq.B);
  const double alone = work / peak<T>() + work / (double)larger(1, a.seq.B) / peak_of_reading<T>;
  return alone * (1 - 1.0 / threads);
}

// Lines of the cache that come from other threads at a step, of which each row has `values` of all of them.
template <class T>
static double lines_exchanged(const Layer<T>& a, int64_t values, int threads) {
  return (double)(a.seq.B * values) * sizeof(T) / 64 * (1 - 1.0 / threads);
}

// `by_rows`: threads divide rows; else units, if a step is worth its barrier.
template <class T>
static Plan make_plan(const Layer<T>& a, int gates, int threads, int64_t chunk_tokens, bool by_rows,
                      bool worth_barriers) {
  Plan plan{threads, by_rows, a.seq.B, 1, a.seq.sizes != nullptr};
  // Below about 20 us of work a second thread costs more than it brings: 5 us to start it, as much to stop.
  if (flops(a, gates, a.seq.tokens()) * a.directions < 2e6) plan.threads = 1;
  if (!by_rows && !worth_barriers) plan.threads = 1;
  if (plan.threads == 1) plan.by_rows = false;
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
    while (vectors > 1 && ceil_div(H, vectors * Block<T>::width) < plan.threads) --vectors;
  return vectors;
}

// The same where a step multiplies a row with `matrices` of depth K. A single row passes every other step through its
// panels backwards (see in_turn): of one panel that the first-level cache cannot hold, but half of which it can, two
// are made, unless so few vectors would be left that additions wait for each other. (Zen 5, RNN 100,1,128,128,
// inference 0.0588 -> 0.0545 ms.)
template <class T>
static int recurrent_vectors(const Plan& plan, int64_t H, int matrices, int64_t K) {
  const int vectors = panel_vectors<T>(plan, H);
  const int64_t width = vectors * Block<T>::width, kilobytes = width * K * (int64_t)sizeof(T) >> 10;
  const bool one_panel = plan.rows == 1 && plan.shares() == 1 && matrices == 1 && H <= width;
  const bool halves = vectors >= 6 && kilobytes > 40 && kilobytes <= 80;
  return rereads_slowly() && one_panel && halves ? (vectors + 1) / 2 : vectors;
}

// Whether even and odd steps have a copy each of a thread's recurrent weights: where few rows wait for the cache to
// deliver them, it is slow to deliver the same soon again (see rereads_slowly), and holds both. Zen 5, 1 thread, LSTM
// inference 100,1,128,128 0.232 -> 0.204 ms, 100,2,128,128 0.304 -> 0.278, training 0.594 -> 0.547; GRU inference
// 100,1,128,128 0.171 -> 0.156; RNN 100,1,256,256 0.213 -> 0.188, training 0.583 -> 0.542. Two copies of 64 KB are no
// faster, three or four of 128 KB between -13% and +5%, and two of 384 KB leave the cache. To copy takes as long as 30
// steps gain.
template <class T>
static bool reads_two_copies(int64_t weights, int64_t rows, int64_t steps) {
  const int64_t kilobytes = weights * (int64_t)sizeof(T) >> 10;
  return rereads_slowly() && kilobytes >= 160 && kilobytes <= 320 && rows <= 3 && steps >= 64;
}

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

// Whether cores are far apart, by what it costs now that so many threads meet: two near to each other 50 to 100 ns.
//
// Then results go past the caches. Threads write side by side at every step, and prefetchers that run on past the end
// of what one has written take from another's core what it is about to write. Zen 5, 2 threads far apart, as ever and
// so, ms: inference of LSTM 128,8,64,64 0.248, 0.191; GRU 1000,4,128,128 2.63, 2.39; LSTM 100,32,128,128 2.12, 1.99;
// with what is kept for backward, and gradients of inputs, training of LSTM 128,8,64,64 0.776, 0.685; RNN 0.308, 0.240;
// GRU 0.619, 0.557; LSTM 20,16,128,128 0.813, 0.793; 100,32,128,128 6.48, 6.62. (Kept in strips, which no two threads
// share, with only the output past the caches: LSTM 128,8,64,64 0.748.) Near to each other results are better left to
// the caches, for whoever reads them: inference 512,8,64,64, then relu, 0.727 and 1.316 ms.
static inline bool far_apart(int threads) { return threads > 1 && meeting_cost() >= 75 * threads; }

// Whether rows of a result consist of whole vectors, as what goes past the caches must.
template <class T>
static bool whole_vectors(const Sequence& seq, const TokenRows<T>& rows, int64_t width) {
  const int64_t step = seq.order || !seq.sizes ? rows.step : 0;
  const uintptr_t odd = (uintptr_t)(rows.row | step | width) * sizeof(T) | (uintptr_t)rows.data;
  return rows.data && sizeof(T) == sizeof(SumOf<T>) && odd % FUSEDRNN_VECTOR_BYTES == 0;
}

// What rows of different threads share costs them dearly where the host has put their cores far from each other, even
// what is only read. Zen 4, 2 threads, LSTM, ms, for seconds 4.38 at 100,32,128,128 (inference) and for seconds 5.15:
//
//   | in the bad seconds                         | 100,32,128,128 | 128,8,64,64 | 20,16,128,128 (training, forward) |
//   | as it was                                  | 5.23 | 0.614 | 0.764 |
//   | a page between rows of different threads   | 4.76 | 0.501 | 0.698 |
//   | packed weights for each thread as well     | 4.65 | 0.494 | 0.574 |
//
// In backward such a page brings 3 to 11% (training 100,32,128,128 14.9 -> 13.9; 20,16,128,128 1.90 -> 1.69;
// 128,8,64,64 1.94 -> 1.74), packed weights for each thread nothing more.
//
// Values between rows of different threads where these read and write their own at every step: prefetchers run on past
// the end of a row, though not past that of a page, and take lines from who writes the row behind.
template <class T>
constexpr int64_t gap = 4096 / sizeof(T);

// Some values of every row at each step of a chunk, those of a thread's rows in memory that it has to itself: with rows
// of others in between, which no cache near by holds either, they come slowly where cores are far apart, though no line
// is shared. (Zen 5, 2 threads, LSTM inference 200,16,256,256 with input products apart, near and far: a page between
// rows of different threads 7.72, 8.97 ms; so 7.71, 8.17.)
template <class T>
class ChunkRows {
 public:
  ChunkRows() = default;
  // `width`: values from one row to the next.
  ChunkRows(Arena& arena, const Plan& plan, int64_t B, int64_t width)
      : width_(width),
        chunk_(plan.chunk * width),
        rows_(arena.take<Row>(B)),
        data_(arena.take<T>(B * chunk_ + plan.row_shares() * gap<T>)) {}

  // Where these rows begin: those of a thread that has them to itself or, where units are divided, some of all B.
  void place(const Plan& plan, int rank, Range rows, int64_t B) {
    if (!data_) return;
    const Range own = plan.by_rows ? rows : Range{0, B};
    const int64_t first = own.first * chunk_ + (plan.by_rows ? rank * gap<T> : 0);
    for (int64_t b = rows.first; b < rows.last; ++b)
      rows_[b] = {first + (b - own.first) * width_, (own.last - own.first) * width_};
  }
  T* at(int64_t step, int64_t b) const { return data_ + rows_[b].begin + step * rows_[b].step; }

 private:
  struct Row {
    int64_t begin, step;  // from one step to the next
  };
  int64_t width_ = 0, chunk_ = 0;  // a row's values at a step, in a chunk
  Row* rows_ = nullptr;
  T* data_ = nullptr;
};

// An entry for each row that a thread works on, none near another thread's.
template <class Entry>
class RowEntries {
 public:
  RowEntries() = default;
  RowEntries(Arena& arena, const Plan& plan, int64_t B)
      : thread_(4096 / (int64_t)sizeof(Entry) + 1 + (plan.by_rows ? 0 : B)),
        data_(arena.take<Entry>(B + plan.threads * thread_)) {}
  // That of row b is the b-th.
  Entry* of(int rank) const { return data_ + rank * thread_; }

 private:
  int64_t thread_ = 0;  // from one thread to the next
  Entry* data_ = nullptr;
};

// Bytes of packed weights of which threads that divide rows have a copy each.
constexpr int64_t most_copied = 1 << 21;

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
