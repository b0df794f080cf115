// The matrix products of a recurrent layer: packed column panels, one register-blocked micro-kernel.
//
// The right-hand matrix (weights) is packed into panels of NV vectors of columns, [panel][k][NV * width], so that the
// micro-kernel reads it as one stream. The left-hand rows (inputs, hidden states, gate gradients) are read where they
// lie, through an array of row pointers: packed, batch-first, reversed and time-major sequences cost the same.

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

struct Range {
  int64_t first, last;
};

// Whether a core multiplies twice as fast beside its caches as one with vectors of 32 bytes.
static inline bool multiplies_fast() { return FUSEDRNN_VECTOR_BYTES == 64 && multiplies_512_bits(); }

// More bytes than the second-level cache can hold until their turn comes again.
constexpr int64_t in_no_cache_near_by = 1 << 21;

// Vectors that a line of the cache holds.
constexpr int vectors_of_line = 64 / FUSEDRNN_VECTOR_BYTES;

// Makes the compiler load a vector once instead of reading it from memory wherever it is used.
template <class V>
FUSEDRNN_INLINE void to_register([[maybe_unused]] V& vector) {
#if defined(__x86_64__) && FUSEDRNN_VECTOR_BYTES <= __BIGGEST_ALIGNMENT__
  asm("" : "+v"(vector));
#endif
}

// How values are multiplied and added up. A lane holds `depth` values that follow each other along k, and a lane of
// sums takes the products of all of them, in `parts` steps. Group is a row's `depth` values.
template <class T>
struct Product {
  static constexpr int depth = 1, parts = 1;
  using S = Simd<T>;
  using V = typename S::V;
  using Group = T;

  FUSEDRNN_INLINE V load(const T* p) { return S::load(p); }
  FUSEDRNN_INLINE V load(const T* p, int64_t values) { return S::load(p, (int)values); }
  FUSEDRNN_INLINE void store(T* p, V v) { S::store(p, v); }
  FUSEDRNN_INLINE void stream(T* p, V v) { S::stream(p, v); }

  // Columns [first, first + lanes) of the first `depth` of n rows.
  FUSEDRNN_INLINE V across(const T* const* rows, int64_t, int64_t first, int lanes) {
    return S::load(rows[0] + first, lanes);
  }

  template <int columns>
  FUSEDRNN_INLINE void copy_across(const T* const* rows, int64_t, int64_t first, T* out) {
    __builtin_memcpy(out, rows[0] + first, columns * sizeof(T));
  }

  FUSEDRNN_INLINE V column(V v, int) { return v; }
  FUSEDRNN_INLINE T value(Group group, int) { return group; }
  FUSEDRNN_INLINE V add(V sum, T value, V column) { return sum + value * column; }
  FUSEDRNN_INLINE V dot(V sum, V a, V b) { return sum + a * b; }
};

// In pairs, the first in the lower half of a lane: what the instruction for products of bfloat16 wants. Where there is
// none, the firsts and then the seconds are widened to float.
template <>
struct Product<bf16> {
  static constexpr int depth = 2;
  using S = Simd<float>;
  using V = typename S::V;
  using Bits = typename S::Bits;
  using Group = uint32_t;
  typedef float Unaligned __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES), aligned(sizeof(bf16)), may_alias));

  FUSEDRNN_INLINE V load(const bf16* p) { return *reinterpret_cast<const Unaligned*>(p); }
  FUSEDRNN_INLINE V load(const bf16* p, int64_t values) {
    if (values >= depth * S::width) return load(p);
#if defined(__AVX512F__) && FUSEDRNN_VECTOR_BYTES == 64
    return (V)_mm512_maskz_loadu_epi16((__mmask32)((1u << values) - 1), p);
#else
    V v{};
    __builtin_memcpy(&v, p, (size_t)values * sizeof(bf16));
    return v;
#endif
  }
  FUSEDRNN_INLINE void store(bf16* p, V v) { *reinterpret_cast<Unaligned*>(p) = v; }
  FUSEDRNN_INLINE void stream(bf16* p, V v) { S::stream(reinterpret_cast<float*>(p), v); }

  FUSEDRNN_INLINE V across(const bf16* const* rows, int64_t n, int64_t first, int lanes) {
    const Bits pairs = (Bits)S::load(rows[0] + first, lanes) >> 16;
    return (V)(n > 1 ? pairs | (Bits)S::load(rows[1] + first, lanes) : pairs);
  }
  template <int columns>
  FUSEDRNN_INLINE void copy_across(const bf16* const* rows, int64_t n, int64_t first, bf16* out) {
    static_assert(columns == 4 || columns == 8, "half a vector of 16 bytes or all");
    typedef uint16_t Eight __attribute__((vector_size(16)));
    const auto part_of = [first](const bf16* row) __attribute__((always_inline)) {
      Eight part{};
      __builtin_memcpy(&part, row + first, columns * sizeof(bf16));
      return part;
    };
    const Eight even = part_of(rows[0]), odd = n > 1 ? part_of(rows[1]) : Eight{};
    const Eight low = __builtin_shufflevector(even, odd, 0, 8, 1, 9, 2, 10, 3, 11);
    const Eight high = __builtin_shufflevector(even, odd, 4, 12, 5, 13, 6, 14, 7, 15);
    __builtin_memcpy(out, &low, 16);
    if constexpr (columns == 8) __builtin_memcpy(out + 8, &high, 16);
  }

#if defined(__AVX512BF16__) && FUSEDRNN_VECTOR_BYTES == 64
  static constexpr int parts = 1;
  FUSEDRNN_INLINE V column(V pairs, int) { return pairs; }
  FUSEDRNN_INLINE V add(V sum, V value, V column) {
    return (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)value, (__m512bh)column);
  }
#else
  static constexpr int parts = 2;
  FUSEDRNN_INLINE V column(V pairs, int part) { return (V)(part == 0 ? (Bits)pairs << 16 : (Bits)pairs & 0xffff0000u); }
  FUSEDRNN_INLINE V add(V sum, V value, V column) { return sum + value * column; }
#endif
  FUSEDRNN_INLINE V value(Group pair, int part) {
    Bits all = Bits{} + pair;
    // Else the compiler widens a pair before it fills a vector with it, which a load does by itself.
    if constexpr (parts > 1) to_register(all);
    return column((V)all, part);
  }
  FUSEDRNN_INLINE V dot(V sum, V a, V b) {
#pragma GCC unroll 2
    for (int part = 0; part < parts; ++part) sum = add(sum, column(a, part), column(b, part));
    return sum;
  }
};

// A block of the result that the micro-kernel keeps in registers: MR rows by NV vectors of columns, MR * NV at most
// `accumulators`, which leaves room for operands (16 registers with AVX2 and SSE2, 32 with AVX-512 and NEON), which
// operands in parts need more of.
template <class T>
struct Block {
  static constexpr int width = Simd<SumOf<T>>::width;
  static constexpr int accumulators = FUSEDRNN_VECTOR_BYTES == 64 ? 24 : Product<T>::parts > 1 ? 8 : 12;
  static constexpr int max_rows = FUSEDRNN_VECTOR_BYTES == 64 ? 8 : Product<T>::parts > 1 ? 4 : 6;
  static constexpr int max_vectors = 8;  // of a single row: enough additions on their way to hide their latency
  static constexpr int max_columns = max_vectors * width;
  static constexpr int rows(int vectors) {
    return accumulators / vectors < max_rows ? accumulators / vectors : max_rows;
  }
  // The same as a table.
  static constexpr int most_rows[] = {0, rows(1), rows(2), rows(3), rows(4), rows(5), rows(6), rows(7), rows(8)};
  static constexpr int usual_vectors = accumulators / max_rows;
  // Vectors of a panel of a matrix of some columns, of which each use multiplies some rows: the fewer the rows, the
  // more columns share each of their values. Columns that are a vector too many for one panel go into one of fewer
  // rows.
  static int vectors_for(int64_t rows, int64_t columns) {
    const int64_t share = rows < max_rows ? accumulators / rows : usual_vectors;
    const int64_t vectors = share < max_vectors ? share : max_vectors, all = (columns + width - 1) / width;
    return (int)(all == vectors + 1 && all <= max_vectors ? all : vectors);
  }
};

// The values from `first` on that fill a lane.
template <class T, class Group = typename Product<T>::Group>
FUSEDRNN_INLINE Group group(const T* first) {
  Group values;
  __builtin_memcpy(&values, first, sizeof values);
  return values;
}

// Left-hand side of the micro-kernel as rows: element (r, k) is rows[r][k].
template <class T, int MR>
struct Rows {
  const T* row[MR];
  auto operator()(int r, int64_t k) const { return group(row[r] + k); }
  void fetch(int64_t) const {}
};

// Left-hand side as columns of rows, from `first` on: element (r, k) is rows[k][first + r]. Or as a block of such
// columns that was packed before: the group of (r, k) begins at block[k * max_rows + r * depth].
//
// Packed where k goes in groups. Else blocks of 8 columns are read where they lie, a line of the cache for each k,
// which is fetched before it is needed; the list has so many rows more, whatever they point at. Zen 4, LSTM backward,
// packed and not, ms: 128,8,64,64 1.026, 0.998; 1000,4,128,128 16.4, 15.4; 100,32,128,128 13.1, 12.5;
// 100,64,256,256 99.1, 96.9; 100,32,512,512 195.2, 194.0; 50,64,1024,1024 767, 777 (not fetched 100,32,512,512 199,
// 50,64,1024,1024 858). Shorter vectors have blocks of 6, which lie in two lines as often as in one: there not packed
// costs up to 8%.
template <class T>
constexpr bool packs_columns = Product<T>::depth > 1 || FUSEDRNN_VECTOR_BYTES < 64;
constexpr int64_t rows_ahead = 16;
template <class T, bool packed = packs_columns<T>>
struct Transposed {
  const T* const* rows;
  int64_t first;
  auto operator()(int r, int64_t k) const { return group(rows[k] + first + r); }
  Transposed from(int64_t k) const { return {rows + k, first}; }
  // As a number: a pointer that is none must not be moved.
  void fetch(int64_t k) const {
    const auto row = reinterpret_cast<uintptr_t>(rows[k + rows_ahead]);
    __builtin_prefetch(reinterpret_cast<const void*>(row + static_cast<uintptr_t>(first) * sizeof(T)));
  }
};
template <class T>
struct Transposed<T, true> {
  const T* block;
  auto operator()(int r, int64_t k) const { return group(block + k * Block<T>::max_rows + r * Product<T>::depth); }
  void fetch(int64_t) const {}
  Transposed from(int64_t k) const { return {block + k * Block<T>::max_rows}; }
};

// Up to so many rows pass through a panel so fast that the processor must know before which lines of the cache it needs
// next. It finds out for each load instruction by itself, as long as that one leaves out none. So all chains are one
// code's: had the first, which does not add, code of its own, the others' would leave out its lines. (Zen 5, a row
// times panels of 8 vectors and K = 128 in the second-level cache, 256 KB and 512 KB: 134 -> 190 GB/s and 134 -> 250;
// inference of GRU 100,1,128,128 0.149 -> 0.147 ms, LSTM 100,1,256,256 0.889 -> 0.858, RNN 100,1,256,256 0.211 ->
// 0.180.) More rows wait for additions, of which a branch behind each tile costs 1 to 2%.
constexpr int few_rows = 3;

// out(MR x NV vectors, row stride ldo) = or += left(MR x K) * panel(K x NV vectors). Each element is one chain of
// additions in the order of k, whatever MR and NV: a row's result does not depend on the rows beside it. What lies from
// `next` on is fetched into the second-level cache, `fetch` vectors in each step of k.
template <class T, int MR, int NV, int fetch = 0, class Left>
FUSEDRNN_INLINE void tile(int64_t K, Left left, const T* panel, SumOf<T>* out, int64_t ldo, bool add,
                          [[maybe_unused]] const T* next = nullptr) {
  using P = Product<T>;
  using S = typename P::S;
  using V = typename S::V;
  constexpr int width = S::width;
  // Weights larger than the second-level cache come from the third at every step: fetched 1 KB ahead, LSTM inference at
  // B = 64, H = 256 goes from 69 to 79 GF/s, training at B = 32, H = 512 from 70 to 79 (Zen 3, peak 102). Single rows
  // pass through a panel faster, hence 2 KB. Few rows have all lines fetched, which the processor by itself does not do
  // in time from the second-level cache either (Zen 5, inference, ms: LSTM 100,1,128,128 0.247 -> 0.225; 100,1,256,256
  // 0.93 -> 0.87; 100,1,512,512 4.7 -> 4.5; GRU 100,1,256,256 0.61 -> 0.57; RNN 100,1,64,64, which the first-level
  // cache holds, 0.0190, 0.0191; 100,1,256,256 0.230 -> 0.211; LSTM 100,2,128,128 0.314 -> 0.304; 100,2,512,512 6.4
  // -> 5.6).
  constexpr int64_t ahead = (MR * NV <= 8 ? 2048 : 1024) / sizeof(T);
  V sum[MR][NV] = {};
  for (int64_t k = 0; k < K; k += P::depth, panel += NV * width * P::depth) {
    left.fetch(k);
    constexpr int lines = MR <= few_rows ? NV : 1;
#pragma GCC unroll 8
    for (int v = 0; v < lines; v += vectors_of_line) __builtin_prefetch(panel + ahead + v * width * P::depth);
    if constexpr (fetch > 0) {
#pragma GCC unroll 8
      for (int v = 0; v < fetch; v += vectors_of_line) __builtin_prefetch(next + v * width * P::depth, 0, 2);
      next += fetch * width * P::depth;
    }
#pragma GCC unroll 2
    for (int part = 0; part < P::parts; ++part) {
      // Operands are read again: there are no registers to keep those of both parts in (AVX2: 57 and 87 GF/s).
      if (part > 0) asm volatile("" ::: "memory");
      if constexpr (MR == 2 || MR == 3) {
        // The values of all rows stay in registers, as there is no room for all columns; left to itself the compiler
        // reads each column for each of so few rows again (Zen 4, GF/s: 2 rows 92 -> 110, 3 rows 97 -> 116; LSTM
        // inference 100,2,128,128 0.581 -> 0.547 ms).
        decltype(P::value(left(0, k), part)) value[MR];
#pragma GCC unroll 8
        for (int r = 0; r < MR; ++r) value[r] = P::value(left(r, k), part);
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) {
          V column = P::column(P::load(panel + v * width * P::depth), part);
          to_register(column);
#pragma GCC unroll 8
          for (int r = 0; r < MR; ++r) sum[r][v] = P::add(sum[r][v], value[r], column);
        }
      } else {
        V column[NV];
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) column[v] = P::column(P::load(panel + v * width * P::depth), part);
#pragma GCC unroll 8
        for (int r = 0; r < MR; ++r) {
          const auto value = P::value(left(r, k), part);
#pragma GCC unroll 8
          for (int v = 0; v < NV; ++v) sum[r][v] = P::add(sum[r][v], value, column[v]);
        }
      }
    }
  }
  for_constant(add, [&](auto adds) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        SumOf<T>* place = out + r * ldo + v * width;
        S::store(place, adds.value ? sum[r][v] + S::load(place) : sum[r][v]);
      }
  });
}

// Calls f(k, n) for stretches [k, k + n) of K, each one chain of additions; for an empty one if there is nothing.
//
// Chains are short since errors grow with the root of their length. Error of a training step 100,64,256,256 against
// float64, largest of any tensor, machine epsilons, with 256 products in a chain and with 64: LSTM 8.6, 2.7 (torch's
// 13.8); GRU 9.0, 2.6 (2.9); RNN 9.3, 2.7 (3.1). Forward takes as long as with 256, backward up to 2% more (5%
// in hours in which somebody else has a share of the caches); with 32 backward takes 4 to 7% more. Where values are
// rounded to fewer bits than sums have it makes no difference.
template <class T>
constexpr int64_t longest_chain = sizeof(T) < sizeof(SumOf<T>) ? 512 : 64;
template <class T, class F>
FUSEDRNN_INLINE void for_chains(int64_t K, F&& f) {
  int64_t k = 0;
  for (; K - k > longest_chain<T>; k += longest_chain<T>) f(k, longest_chain<T>);
  f(k, K - k);
}

// How many tiles multiply n rows with a panel.
template <class T>
FUSEDRNN_INLINE int64_t count_tiles(int64_t n, int64_t K, int vectors) {
  return ceil_div(n, Block<T>::rows(vectors)) * ceil_div(K, longest_chain<T>);
}

// Places in memory that somebody needs after the products, fetched a few at a time between tiles. All at once they
// would only wait for each other (Zen 4, LSTM 100,64,256,256, what gates read and write; backward, forward of training,
// inference: not fetched 103.0, 69.2, 65.0 ms; all at once 103.1, 71.2, 66.3; between tiles 99.4, 66.6, 64.0).
class Fetches {
 public:
  // Values `some` of those from `first` on.
  template <class T>
  FUSEDRNN_ALWAYS_INLINE void add(const T* first, Range some) {
    if (count_ < most)
      places_[count_++] = {reinterpret_cast<const char*>(first + some.first),
                           (some.last - some.first) * (int64_t)sizeof(T)};
  }
  // To be called after the last place: how many tiles there will be.
  FUSEDRNN_ALWAYS_INLINE void divide(int64_t tiles) { at_once_ = ceil_div(count_, larger(1, tiles)); }
  FUSEDRNN_ALWAYS_INLINE void next() {
    for (const int64_t end = smaller(done_ + at_once_, count_); done_ < end; ++done_)
      for (int64_t k = 0; k < places_[done_].bytes; k += 64) __builtin_prefetch(places_[done_].first + k);
  }

 private:
  static constexpr int64_t most = 400;
  struct Place {
    const char* first;
    int64_t bytes;
  };
  int64_t count_ = 0, done_ = 0, at_once_ = 0;
  Place places_[most];
};

// A tile's chain of additions: of steps [first_k, first_k + K) of some rows, or of K steps of a transposed matrix.
template <class T, int MR, int NV, int fetch = 0>
FUSEDRNN_INLINE void any_rows_chain(int64_t K, const T* const* rows, int64_t first_k, const T* panel, SumOf<T>* out,
                                    int64_t ldo, bool add, const T* next = nullptr) {
  Rows<T, MR> left;
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) left.row[r] = rows[r] + first_k;
  tile<T, MR, NV, fetch>(K, left, panel, out, ldo, add, next);
}
template <class T, int MR, int NV>
static void few_rows_chain(int64_t K, const T* const* rows, int64_t first_k, const T* panel, SumOf<T>* out, int64_t ldo,
                           bool add) {
  any_rows_chain<T, MR, NV>(K, rows, first_k, panel, out, ldo, add);
}
template <class T, int MR, int NV, bool add, int fetch>
static void rows_chain(int64_t K, const T* const* rows, int64_t first_k, const T* panel, SumOf<T>* out, int64_t ldo,
                       const T* next) {
  any_rows_chain<T, MR, NV, fetch>(K, rows, first_k, panel, out, ldo, add, next);
}
template <class T, int MR, int NV, bool add>
static void transposed_chain(int64_t K, Transposed<T> left, const T* panel, SumOf<T>* out, int64_t ldo) {
  tile<T, MR, NV>(K, left, panel, out, ldo, add);
}

// Two chains of a row at once, the second right behind the first.
template <class T, int NV>
static void two_chains(int64_t steps, const T* row, const T* panel, SumOf<T>* out, bool add) {
  using P = Product<T>;
  using S = typename P::S;
  using V = typename S::V;
  V sum[2][NV] = {};
  const int64_t between = steps * NV * S::width;
  for (int64_t k = 0; k < steps; k += P::depth, panel += NV * S::width * P::depth) {
#pragma GCC unroll 2
    for (int part = 0; part < P::parts; ++part)
#pragma GCC unroll 2
      for (int c = 0; c < 2; ++c) {
        const auto value = P::value(group(row + c * steps + k), part);
        const T* const columns = panel + c * between;
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v)
          sum[c][v] = P::add(sum[c][v], value, P::column(P::load(columns + v * S::width * P::depth), part));
      }
  }
#pragma GCC unroll 8
  for (int v = 0; v < NV; ++v) {
    SumOf<T>* place = out + v * S::width;
    const V first = add ? sum[0][v] + S::load(place) : sum[0][v];
    S::store(place, first + sum[1][v]);
  }
}

// These functions by the size of the tile. A chain of 64 additions is so short that the way to it counts: products are
// 1 to 3% faster (Zen 4) through a table, operands in registers, than through comparisons of both numbers and a struct.
template <class T>
class Tiles {
 public:
  using OfFewRows = void (*)(int64_t, const T* const*, int64_t, const T*, SumOf<T>*, int64_t, bool);
  using OfRows = void (*)(int64_t, const T* const*, int64_t, const T*, SumOf<T>*, int64_t, const T*);
  using OfTransposed = void (*)(int64_t, Transposed<T>, const T*, SumOf<T>*, int64_t);
  struct Size {
    OfFewRows few;
    void (*pair)(int64_t, const T*, const T*, SumOf<T>*, bool) = nullptr;  // of a single row
    // Of more rows, by whether they add to what is there; if they fetch, a line in each step or as much as they use.
    OfRows rows[2], rows_and_line[2], rows_and_all[2];
    OfTransposed transposed[2];
  };

  constexpr Tiles() { fill<1, 1>(); }
  const Size& of(int rows, int vectors) const { return sizes_[vectors][rows]; }

 private:
  template <int MR, int NV>
  constexpr void fill() {
    Size& size = sizes_[NV][MR];
    if constexpr (MR <= few_rows) {
      size.few = few_rows_chain<T, MR, NV>;
      if constexpr (MR == 1) size.pair = two_chains<T, NV>;
    } else {
      constexpr int line = NV < vectors_of_line ? NV : vectors_of_line;
      size.rows[0] = rows_chain<T, MR, NV, false, 0>, size.rows[1] = rows_chain<T, MR, NV, true, 0>;
      size.rows_and_line[0] = rows_chain<T, MR, NV, false, line>;
      size.rows_and_line[1] = rows_chain<T, MR, NV, true, line>;
      size.rows_and_all[0] = rows_chain<T, MR, NV, false, NV>, size.rows_and_all[1] = rows_chain<T, MR, NV, true, NV>;
    }
    size.transposed[0] = transposed_chain<T, MR, NV, false>, size.transposed[1] = transposed_chain<T, MR, NV, true>;
    if constexpr (MR < Block<T>::rows(NV))
      fill<MR + 1, NV>();
    else if constexpr (NV < Block<T>::max_vectors)
      fill<1, NV + 1>();
  }

  Size sizes_[Block<T>::max_vectors + 1][Block<T>::max_rows + 1] = {};
};
template <class T>
constexpr Tiles<T> tiles{};

// out(mr x nv vectors) = or += steps [first_k, first_k + K) of mr rows * panel. Before each chain something is fetched,
// and `next`, if not null, meanwhile, `fetched` vectors in each step.
template <class T>
FUSEDRNN_INLINE void multiply_rows(int mr, int nv, int64_t K, const T* const* rows, int64_t first_k, const T* panel,
                                   SumOf<T>* out, int64_t ldo, bool add, const T* next, int fetched, Fetches* fetches) {
  const auto& size = tiles<T>.of(mr, nv);
  const auto* chain = !next ? size.rows : fetched < nv ? size.rows_and_line : size.rows_and_all;
  for_chains<T>(K, [&](int64_t k, int64_t n) __attribute__((always_inline)) {
    if (fetches) fetches->next();
    const T* const stretch = panel + k * nv * Block<T>::width;
    if (mr <= few_rows)
      size.few(n, rows, first_k + k, stretch, out, ldo, add || k > 0);
    else
      chain[add || k > 0](n, rows, first_k + k, stretch, out, ldo,
                          next ? next + k * fetched * Block<T>::width : nullptr);
  });
}

// out(mr x nv vectors) = or += left(mr x K) * panel.
template <class T>
FUSEDRNN_INLINE void multiply_transposed(int mr, int nv, int64_t K, Transposed<T> left, const T* panel, SumOf<T>* out,
                                         int64_t ldo, bool add) {
  const auto* chain = tiles<T>.of(mr, nv).transposed;
  for_chains<T>(K, [&](int64_t k, int64_t n) __attribute__((always_inline)) {
    chain[add || k > 0](n, left.from(k), panel + k * nv * Block<T>::width, out, ldo);
  });
}

// K is cut so that a stretch of a panel of the usual width comes from the caches next to the processor while the rows
// pass by: 16 KB of a first-level cache of 32 KB; where vectors have 64 bytes 64 KB, though that cache has 48 KB, for
// fewer stretches cost less; four times that where the processor multiplies fast. Cut between chains, sums round alike
// however long stretches are. (Zen 5, 1 thread, stretches of 256, 1024, 4096 steps, ms: inference of LSTM 35,20,650,650
// 18.92, 18.39, 18.56; 100,32,512,512 51.3, 50.8, 50.8; 50,64,1024,1024 205.5, 201.9, 202.3; RNN 35,20,650,650 4.72,
// 4.58, 4.60; training of LSTM 35,20,650,650 61.3, 60.4, 60.0, 50,64,1024,1024 647, 645, 668.)
template <class T>
constexpr int64_t short_stretch =
    Product<T>::depth * (FUSEDRNN_VECTOR_BYTES == 64 ? 256 : 16384 / (2 * FUSEDRNN_VECTOR_BYTES));
template <class T>
static int64_t k_stretch(int64_t K) {
  return K > short_stretch<T> && multiplies_fast() ? 4 * short_stretch<T> : short_stretch<T>;
}

// Calls f(first, count) for blocks of n rows, of even size. Without a division where it can be: a single block's takes
// as long as two steps of its loop.
template <class T, class F>
FUSEDRNN_INLINE void for_blocks(int64_t n, int nv, F&& f) {
  const int most = Block<T>::most_rows[nv];
  if (n <= most) {
    if (n > 0) f(0, (int)n);
    return;
  }
  const int all = (int)n, blocks = (all + most - 1) / most, size = all / blocks;
  for (int b = 0, first = 0, more = all - blocks * size; b < blocks; ++b) {
    const int count = size + (b < more);
    f(first, count);
    first += count;
  }
}

// out(n x nv vectors) = or += rows(n x K) * panel. Blocks of rows are of even size: 8 rows go as 4 + 4, not as 6 + 2.
//
// `next`: the panel that comes after this one, where it is likely to be in no cache near by, else null. The last blocks
// of rows that a stretch is multiplied with fetch the stretch that comes next, a line in each step, or the last one
// all if there are too few; otherwise the first block would wait for all its lines, and the others would leave the way
// to the third-level cache unused. Zen 5, LSTM inference, 1 thread, not fetched and by the last block: 35,20,650,650
// 26.2 -> 24.9 ms, 100,32,512,512 66.1 -> 63.4, 50,64,1024,1024 283 -> 269; by the last and by several: 21.6 -> 21.4,
// 57.0 -> 56.4, 248 -> 227, on 2 threads 11.6 -> 11.4, 29.6 -> 29.3, 123 -> 116. Where 1 MB of L2 holds half the
// weights of a step it makes no difference. `fetches`: what else is fetched meanwhile, or null.
template <class T>
static void multiply_panel(const T* const* rows, int64_t n, int64_t K, const T* panel, int nv, SumOf<T>* out,
                           int64_t ldo, bool add = false, const T* next = nullptr, Fetches* fetches = nullptr) {
  constexpr int depth = Product<T>::depth;
  const int64_t whole = K / depth * depth;
  const int64_t longest = k_stretch<T>(whole);
  for (int64_t k = 0; k < whole || k == 0; k += longest) {
    const T* stretch = panel + k * nv * Block<T>::width;
    const int64_t steps = smaller(longest, whole - k);
    const T* after = next && k + steps < whole ? stretch + steps * nv * Block<T>::width : next;
    int fetched = nv;
    int64_t waiting = 0;  // blocks that fetch nothing
    if (next) {
      const int64_t blocks = ceil_div(n, Block<T>::most_rows[nv]), lines = ceil_div(nv, vectors_of_line);
      const bool enough = blocks >= lines;
      if (enough) fetched = (int)smaller(nv, vectors_of_line);
      waiting = blocks - (enough ? lines : 1);
    }
    for_blocks<T>(n, nv, [&](int64_t first, int count) __attribute__((always_inline)) {
      const bool waits = !next || waiting-- > 0;
      multiply_rows<T>(count, nv, steps, rows + first, k, stretch, out + first * ldo, ldo, add || k > 0,
                       waits ? nullptr : after, fetched, fetches);
      if (!waits) after += steps * fetched * Block<T>::width;
    });
  }
  if constexpr (depth > 1) {
    // Values that fill no group: rows end behind them, so they are copied.
    if (whole == K) return;
    for_blocks<T>(n, nv, [&](int64_t first, int count) {
      T rest[Block<T>::max_rows * depth];
      for (int r = 0; r < count; ++r)
        for (int i = 0; i < depth; ++i) rest[r * depth + i] = whole + i < K ? rows[first + r][whole + i] : T(0);
      multiply_transposed<T>(count, nv, 1, {rest}, panel + whole * nv * Block<T>::width, out + first * ldo, ldo, true);
    });
  }
}

// out(nv vectors) = row(K) * panel, chains two by two: where a panel has few vectors and the first-level cache holds
// it, additions of one chain wait for each other. `halves`: a single chain is cut in two, and rounds otherwise than one
// of a row among others. (Zen 5, inference of RNN 100,1,32,32 0.0132 -> 0.0119 ms; 100,1,64,64 0.0190 -> 0.0174;
// 100,1,128,128 0.0562 -> 0.0512. With more gates that cache does not hold the weights: GRU 100,1,64,64 0.0410, 0.0405;
// LSTM 0.0578, 0.0588.)
template <class T>
static void multiply_in_pairs(const T* row, int64_t K, const T* panel, int nv, SumOf<T>* out, bool halves) {
  const int64_t steps = halves ? K / 2 : longest_chain<T>;
  int64_t k = 0;
  for (; k + 2 * steps <= K; k += 2 * steps)
    tiles<T>.of(1, nv).pair(steps, row + k, panel + k * nv * Block<T>::width, out, k > 0);
  if (k < K)
    multiply_rows<T>(1, nv, K - k, &row, k, panel + k * nv * Block<T>::width, out, nv * Block<T>::width, k > 0, nullptr,
                     nv, nullptr);
}

// A matrix packed into column panels, [panel][k / depth][column][depth]. `columns` is rounded up to whole vectors and K
// to whole groups; what is beyond is zero. Panels have as even a width as can be: 4 vectors go as 2 + 2, not as 3 + 1.
template <class T>
struct Panels {
  T* data = nullptr;
  int64_t K = 0, columns = 0;
  // Of several matrices of one shape, panel p of each stands side by side, in the order in which they are used.
  int matrices = 1, index = 0;
  bool twice = false;  // there is a second copy of all of them, for every other step
  int together = 1;    // vectors that no two panels divide

  Panels() = default;
  // `vectors`: the most of a panel. `shares`: threads that divide the panels among themselves, as evenly as can be.
  Panels(T* data, int64_t K, int64_t columns, int vectors, int shares = 1, int matrices = 1, bool twice = false,
         int together = 1)
      : data(data), K(K), columns(columns), matrices(matrices), twice(twice), together(together) {
    const int64_t all = ceil_div(columns, together * Block<T>::width);
    count_ = smaller(all, round_up(ceil_div(all, vectors / together), shares));
    narrow_ = count_ ? all / count_ : 0;
    wider_ = all - count_ * narrow_;
  }

  static int64_t padded(int64_t K) { return round_up(K, Product<T>::depth); }
  static int64_t size(int64_t K, int64_t columns) { return padded(K) * round_up(columns, Block<T>::width); }
  int64_t count() const { return count_; }
  // Values of all matrices' panels.
  int64_t copy_size() const { return matrices * size(K, columns); }
  bool is_large() const { return copy_size() * (int64_t)sizeof(T) > in_no_cache_near_by; }
  T* panel(int64_t p) const {
    return data + (first(p) * matrices + index * vectors_of(p) * Block<T>::width) * padded(K);
  }
  int64_t first(int64_t p) const { return first_vector(p) * Block<T>::width; }
  int64_t last(int64_t p) const { return smaller(columns, first(p + 1)); }
  int vectors_of(int64_t p) const { return (int)(first_vector(p + 1) - first_vector(p)); }

  // The copy for step i.
  Panels at_step(int64_t i) const {
    Panels copy = *this;
    if (twice && i & 1) copy.data += copy_size();
    return copy;
  }
  // Copies panel p, which has just been packed.
  void repeat(int64_t p) const {
    const int64_t values = vectors_of(p) * Block<T>::width * padded(K);
    if (twice) __builtin_memcpy(panel(p) + copy_size(), panel(p), (size_t)values * sizeof(T));
  }

 private:
  // Every so many panels one has a vector more than the others, or as many as stay together.
  int64_t first_vector(int64_t p) const { return together * (p * narrow_ + (wider_ ? p * wider_ / count_ : 0)); }

  int64_t count_ = 0, narrow_ = 0, wider_ = 0;
};

// The rows of a matrix with K columns that are the columns of its packed transpose: those from w on or, if `piece` is
// not 0, so many of them each `between` rows; w is where column `first` lies.
template <class T>
struct Columns {
  const T* w;
  int64_t K, piece = 0, between = 0, first = 0;
  const T* operator[](int64_t c) const {
    c -= first;
    return w + (piece ? c / piece * between + c % piece : c) * K;
  }
};

// Packs panel p of the transpose of w: element (k, c) is w[c][k]. Large matrices go past the caches, which would not
// hold them until they are used (Zen 4, 13 MB: 1.47 ms, so 0.68; LSTM forward of training 20,8,1024,1024 29.5 -> 27.6
// ms).
template <class T>
static void pack_transposed(Panels<T>& packed, int64_t p, const Columns<T>& w) {
  using P = Product<T>;
  using V = typename P::V;
  constexpr int W = P::S::width, depth = P::depth;
  const int64_t K = packed.K, first = packed.first(p), last = packed.last(p), stride = packed.vectors_of(p) * W;
  const bool large = packed.is_large();
  T* out = packed.panel(p);
  for (int64_t c = first; c < last; c += W, out += W * depth) {
    const T* rows[W];
    for (int i = 0; i < W; ++i) rows[i] = c + i < last ? w[c + i] : nullptr;
    for (int64_t k = 0; k < K; k += W * depth) {
      const int64_t values = smaller(W * depth, K - k);
      V block[W];
      for (int i = 0; i < W; ++i) block[i] = rows[i] ? P::load(rows[i] + k, values) : V{};
      P::S::transpose(block);
      for (int i = 0; i * depth < values; ++i) {
        T* place = out + (k + i * depth) * stride;
        large ? P::stream(place, block[i]) : P::store(place, block[i]);
      }
    }
  }
  if (large) P::S::finish_streams();
}

// A number that tells n values, and what came `before` them, from any others as good as surely. Each step is a
// bijection of what came before and of the vector that comes in; several chains hide its latency. A product leaves a
// difference in its highest bit alone where it is, so that another difference, a vector further on, could make up for
// it: but then the plain sum of all differs. (Zen 5, 4 chains; 8, fetched 2 KB ahead, GB/s: from the second-level cache
// 142; 218, from the third 101; 128, from memory 47; 53.)
template <class T>
static uint64_t fingerprint(const T* values, int64_t n, uint64_t before = 0) {
  using P = Product<T>;
  typedef uint64_t Bits __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES)));
  constexpr int W = FUSEDRNN_VECTOR_BYTES / sizeof(T), chains = FUSEDRNN_VECTOR_BYTES == 64 ? 8 : 4;
  constexpr uint64_t odd = 0x9e3779b97f4a7c15u;  // 2^64 by the golden ratio
  Bits chain[chains], sum{};
  for (int c = 0; c < chains; ++c) chain[c] = Bits{} + (before + (uint64_t)(n + c));
  const auto take = [&](int c, Bits v) {
    sum += v;
    chain[c] = (chain[c] ^ v) * odd;
    chain[c] = chain[c] << 29 | chain[c] >> 35;
  };
  int64_t k = 0;
  for (; k + chains * W <= n; k += chains * W)
#pragma GCC unroll 8
    for (int c = 0; c < chains; ++c) {
      __builtin_prefetch(values + k + c * W + 2048 / sizeof(T));
      take(c, (Bits)P::load(values + k + c * W));
    }
  for (; k < n; k += W) take(0, (Bits)P::load(values + k, smaller(W, n - k)));
  const Bits plain = sum;
#pragma GCC unroll 8
  for (int c = 1; c < chains; ++c) take(0, chain[c]);
  take(0, plain);
  uint64_t all = 0;
  for (int lane = 0; lane < (int)(sizeof(Bits) / 8); ++lane) {
    all = (all ^ chain[0][lane]) * odd;
    all ^= all >> 32;
  }
  return all;
}

// out(n x columns [first, last), row stride ldo, filled up to whole vectors) = rows(n x K) * transpose of w (row stride
// K). For products that are too few to pay for packing w: a vector of columns at a time, each a dot product, the rows
// of w fetched 512 bytes ahead.
template <class T>
static void multiply_unpacked(const T* const* rows, int64_t n, int64_t K, const T* w, int64_t first, int64_t last,
                              SumOf<T>* out, int64_t ldo) {
  using P = Product<T>;
  using S = typename P::S;
  using V = typename S::V;
  constexpr int W = S::width;
  for (int64_t c = first; c < last; c += W)
    for (int64_t r = 0; r < n; ++r) {
      V sum[W] = {};
      for (int64_t k = 0; k < K; k += W * P::depth) {
        const int64_t values = smaller(W * P::depth, K - k);
        const V value = P::load(rows[r] + k, values);
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) {
          const T* weight = w + smaller(c + i, last - 1) * K + k;
          __builtin_prefetch(weight + 512 / sizeof(T));
          sum[i] = P::dot(sum[i], value, P::load(weight, values));
        }
      }
      S::transpose(sum);
#pragma GCC unroll 4
      for (int half = W / 2; half > 0; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; ++i) sum[i] += sum[i + half];
      S::store(out + r * ldo + c - first, sum[0]);
    }
}

// Packs columns [first, first + columns) of n rows as a panel.
template <class T>
static void pack_columns(const T* const* rows, int64_t n, int64_t first, int64_t columns, T* out) {
  using P = Product<T>;
  constexpr int W = P::S::width;
  for (int64_t k = 0; k < n; k += P::depth)
    for (int64_t c = 0; c < columns; c += W, out += W * P::depth)
      P::store(out, P::across(rows + k, n - k, first + c, (int)smaller(W, columns - c)));
}

// Packs panel p of a matrix whose rows are handed over one by one, in the order of k.
template <class T>
class PanelRows {
 public:
  PanelRows(const Panels<T>& packed, int64_t p)
      : first_(packed.first(p)),
        columns_(packed.last(p) - first_),
        out_(packed.panel(p)),
        stride_(packed.vectors_of(p) * Block<T>::width * Product<T>::depth) {}

  FUSEDRNN_ALWAYS_INLINE void add(const T* row) {
    rows_[count_++] = row;
    if (count_ == Product<T>::depth) finish();
  }
  // To be called after the last row.
  FUSEDRNN_ALWAYS_INLINE void finish() {
    pack_columns(rows_, count_, first_, columns_, out_);
    out_ += stride_;
    count_ = 0;
  }

 private:
  const T* rows_[Product<T>::depth];
  int count_ = 0;
  int64_t first_, columns_;
  T* out_;
  int64_t stride_;
};

// Packs columns [first, last) of rows[0 .. K) into blocks for Transposed, max_rows columns each; missing ones are zero,
// and so are missing rows of the last group.
template <class T>
static void pack_blocks(const T* const* rows, int64_t K, int64_t first, int64_t last, T* out) {
  constexpr int64_t MR = Block<T>::max_rows, depth = Product<T>::depth;
  for (; first + MR <= last; first += MR)
    for (int64_t k = 0; k < K; k += depth, out += MR * depth)
      Product<T>::template copy_across<MR>(rows + k, K - k, first, out);
  if (first < last)
    for (int64_t k = 0; k < K; k += depth)
      for (int64_t r = 0; r < MR; ++r)
        for (int64_t i = 0; i < depth; ++i) *out++ = k + i < K && first + r < last ? rows[k + i][first + r] : T(0);
}

// sums[first, last) += the sums of those columns of rows[0 .. n), in short chains.
template <class T>
static void add_rows(const T* const* rows, int64_t n, int64_t first, int64_t last, SumOf<T>* sums) {
  using S = Simd<SumOf<T>>;
  using V = typename S::V;
  for (; first < last; first += S::width) {
    const int lanes = (int)smaller(S::width, last - first);
    V sum{};
    for_chains<SumOf<T>>(n, [&](int64_t k, int64_t count) {
      V even{}, odd{};
      const int64_t end = k + count;
      for (; k + 2 <= end; k += 2) {
        even += S::load(rows[k] + first, lanes);
        odd += S::load(rows[k + 1] + first, lanes);
      }
      if (k < end) even += S::load(rows[k] + first, lanes);
      sum += even + odd;
    });
    S::store(sums + first, sum + S::load(sums + first, lanes), lanes);
  }
}
