// The matrix products of a recurrent layer: packed column panels, one register-blocked micro-kernel.
//
// The right-hand matrix (weights) is packed into panels of NV vectors of columns, [panel][k][NV * width], so that the
// micro-kernel reads it as one stream. The left-hand rows (inputs, hidden states, gate gradients) are read where they
// lie, through an array of row pointers: packed, batch-first, reversed and time-major sequences cost the same.

// A block of the result that the micro-kernel keeps in registers: MR rows by NV vectors of columns, MR * NV at most
// `accumulators`, which leaves room for operands (16 registers with AVX2 and SSE2, 32 with AVX-512 and NEON).
template <class T>
struct Block {
  static constexpr int width = Simd<T>::width;
  static constexpr int accumulators = FUSEDRNN_VECTOR_BYTES == 64 ? 24 : 12;
  static constexpr int max_rows = 6;
  static constexpr int max_vectors = 8;  // of a single row: enough additions on their way to hide their latency
  static constexpr int max_columns = max_vectors * width;
  static constexpr int rows(int vectors) {
    return accumulators / vectors < max_rows ? accumulators / vectors : max_rows;
  }
  static constexpr int usual_vectors = accumulators / max_rows;
  // Vectors of a panel that serves few rows at a time: the fewer the rows, the more columns share each of their values.
  static int vectors_for(int64_t rows) {
    return rows >= max_rows                    ? usual_vectors
           : accumulators / rows < max_vectors ? (int)(accumulators / rows)
                                               : max_vectors;
  }
};

// Left-hand side of the micro-kernel as rows: element (r, k) is rows[r][k].
template <class T, int MR>
struct Rows {
  const T* row[MR];
  T operator()(int r, int64_t k) const { return row[r][k]; }
};

// Left-hand side as a packed block of a transposed matrix: element (r, k) is block[k * max_rows + r].
template <class T>
struct Transposed {
  const T* block;
  T operator()(int r, int64_t k) const { return block[k * Block<T>::max_rows + r]; }
};

// out(MR x NV vectors, row stride ldo) = or += left(MR x K) * panel(K x NV vectors). Each element is one chain of
// additions in the order of k, whatever MR and NV: a row's result does not depend on the rows beside it.
template <class T, int MR, int NV, class Left>
FUSEDRNN_INLINE void tile(int64_t K, Left left, const T* panel, T* out, int64_t ldo, bool add) {
  using S = Simd<T>;
  using V = typename S::V;
  constexpr int width = S::width;
  // Weights larger than the second-level cache come from the third at every step: fetched 1 KB ahead, LSTM inference at
  // B = 64, H = 256 goes from 69 to 79 GF/s, training at B = 32, H = 512 from 70 to 79 (Zen 3, peak 102). Single rows
  // pass through a panel faster, hence 2 KB.
  constexpr int64_t ahead = (MR * NV <= 8 ? 2048 : 1024) / sizeof(T);
  V sum[MR][NV] = {};
  for (int64_t k = 0; k < K; ++k, panel += NV * width) {
    V column[NV];
    __builtin_prefetch(panel + ahead);
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) column[v] = S::load(panel + v * width);
#pragma GCC unroll 6
    for (int r = 0; r < MR; ++r) {
      const T value = left(r, k);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) sum[r][v] += value * column[v];
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      T* place = out + r * ldo + v * width;
      S::store(place, add ? sum[r][v] + S::load(place) : sum[r][v]);
    }
}

template <class T, int MR, int NV>
static void rows_tile(int64_t K, const T* const* rows, int64_t first_k, const T* panel, T* out, int64_t ldo, bool add) {
  Rows<T, MR> left;
  for (int r = 0; r < MR; ++r) left.row[r] = rows[r] + first_k;
  tile<T, MR, NV>(K, left, panel, out, ldo, add);
}

template <class T, int MR, int NV>
static void transposed_tile(int64_t K, const T* block, const T* panel, T* out, int64_t ldo, bool add) {
  tile<T, MR, NV>(K, Transposed<T>{block}, panel, out, ldo, add);
}

// Calls f.template call<MR, NV>() for run-time MR and NV.
template <class T, int NV = 1, int MR = 1, class F>
FUSEDRNN_INLINE void with_block(int mr, int nv, F&& f) {
  if constexpr (NV < Block<T>::max_vectors) {
    if (nv > NV) return with_block<T, NV + 1, MR>(mr, nv, f);
  }
  if constexpr (MR < Block<T>::rows(NV)) {
    if (mr > MR) return with_block<T, NV, MR + 1>(mr, nv, f);
  }
  f.template call<MR, NV>();
}

template <class T>
struct RowsTile {
  int64_t K;
  const T* const* rows;
  int64_t first_k;
  const T* panel;
  T* out;
  int64_t ldo;
  bool add;
  template <int MR, int NV>
  void call() const {
    rows_tile<T, MR, NV>(K, rows, first_k, panel, out, ldo, add);
  }
};

template <class T>
struct TransposedTile {
  int64_t K;
  const T *block, *panel;
  T* out;
  int64_t ldo;
  bool add;
  template <int MR, int NV>
  void call() const {
    transposed_tile<T, MR, NV>(K, block, panel, out, ldo, add);
  }
};

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// K is cut so that a stretch of a panel of the usual width stays in the first-level cache (32 KB; 48 KB where vectors
// have 64 bytes) while the rows pass by: 40 or 16 KB. Every product is cut alike, so that its sums round alike.
constexpr int64_t k_stretch = FUSEDRNN_VECTOR_BYTES == 64 ? 160 : 16384 / (2 * FUSEDRNN_VECTOR_BYTES);

// out(n x nv vectors) = or += rows(n x K) * panel. Blocks of rows are of even size: 8 rows go as 4 + 4, not as 6 + 2.
template <class T>
static void multiply_panel(const T* const* rows, int64_t n, int64_t K, const T* panel, int nv, T* out, int64_t ldo,
                           bool add = false) {
  const int64_t blocks = ceil_div(n, Block<T>::rows(nv));
  for (int64_t k = 0; k < K || k == 0; k += k_stretch)
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t first = n * b / blocks, last = n * (b + 1) / blocks;
      with_block<T>((int)(last - first), nv,
                    RowsTile<T>{smaller(k_stretch, K - k), rows + first, k, panel + k * nv * Block<T>::width,
                                out + first * ldo, ldo, add || k > 0});
    }
}

// A matrix packed into column panels. `columns` is rounded up to whole vectors; what is beyond is zero.
template <class T>
struct Panels {
  T* data = nullptr;
  int64_t K = 0, columns = 0;
  int vectors = Block<T>::usual_vectors;  // of every panel but perhaps the last
  // Of several matrices of one shape, panel p of each stands side by side, in the order in which they are used.
  int matrices = 1, index = 0;

  static int64_t size(int64_t K, int64_t columns) { return K * round_up(columns, Block<T>::width); }
  int64_t width() const { return (int64_t)vectors * Block<T>::width; }
  int64_t count() const { return ceil_div(columns, width()); }
  T* panel(int64_t p) const { return data + (p * width() * matrices + index * vectors_of(p) * Block<T>::width) * K; }
  int64_t first(int64_t p) const { return p * width(); }
  int64_t last(int64_t p) const { return smaller(columns, first(p) + width()); }
  int vectors_of(int64_t p) const { return (int)ceil_div(last(p) - first(p), Block<T>::width); }
};

// Packs panel p of the transpose of w (columns x K, row stride K): element (k, c) is w[c][k].
template <class T>
static void pack_transposed(Panels<T>& packed, int64_t p, const T* w) {
  using S = Simd<T>;
  constexpr int W = S::width;
  const int64_t K = packed.K, first = packed.first(p), last = packed.last(p), stride = packed.vectors_of(p) * W;
  T* out = packed.panel(p);
  for (int64_t c = first; c < last; c += W, out += W)
    for (int64_t k = 0; k < K; k += W) {
      const int lanes = (int)smaller(W, K - k);
      typename S::V block[W];
      for (int i = 0; i < W; ++i) block[i] = c + i < last ? S::load(w + (c + i) * K + k, lanes) : typename S::V{};
      S::transpose(block);
      for (int i = 0; i < lanes; ++i) S::store(out + (k + i) * stride, block[i]);
    }
}

// A number that tells n values from any others: those that differ in a single vector surely, others but for one chance
// in 2^64. Each step is a bijection of what came before and of the vector that comes in; four chains hide its latency.
template <class T>
static uint64_t fingerprint(const T* values, int64_t n) {
  using S = Simd<T>;
  typedef uint64_t Bits __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES)));
  constexpr int W = S::width, chains = 4;
  constexpr uint64_t odd = 0x9e3779b97f4a7c15u;  // 2^64 by the golden ratio
  Bits chain[chains];
  for (int c = 0; c < chains; ++c) chain[c] = Bits{} + (uint64_t)(n + c);
  const auto take = [&](int c, typename S::V v) {
    chain[c] = (chain[c] ^ (Bits)v) * odd;
    chain[c] = chain[c] << 29 | chain[c] >> 35;
  };
  int64_t k = 0;
  for (; k + chains * W <= n; k += chains * W)
#pragma GCC unroll 4
    for (int c = 0; c < chains; ++c) take(c, S::load(values + k + c * W));
  for (; k < n; k += W) take(0, S::load(values + k, (int)smaller(W, n - k)));
  uint64_t all = 0;
  for (int c = 0; c < chains; ++c)
    for (int lane = 0; lane < (int)(sizeof(Bits) / 8); ++lane) {
      all = (all ^ chain[c][lane]) * odd;
      all ^= all >> 32;
    }
  return all;
}

// out(n x columns [first, last), row stride ldo, filled up to whole vectors) = rows(n x K) * transpose of w (row stride
// K). For products that are too few to pay for packing w: a vector of columns at a time, each a dot product, the rows
// of w fetched 512 bytes ahead.
template <class T>
static void multiply_unpacked(const T* const* rows, int64_t n, int64_t K, const T* w, int64_t first, int64_t last,
                              T* out, int64_t ldo) {
  using S = Simd<T>;
  using V = typename S::V;
  constexpr int W = S::width;
  for (int64_t c = first; c < last; c += W)
    for (int64_t r = 0; r < n; ++r) {
      V sum[W] = {};
      for (int64_t k = 0; k < K; k += W) {
        const int lanes = (int)smaller(W, K - k);
        const V value = S::load(rows[r] + k, lanes);
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) {
          const T* weight = w + smaller(c + i, last - 1) * K + k;
          __builtin_prefetch(weight + 512 / sizeof(T));
          sum[i] += value * S::load(weight, lanes);
        }
      }
      S::transpose(sum);
#pragma GCC unroll 16
      for (int i = 1; i < W; ++i) sum[0] += sum[i];
      S::store(out + r * ldo + c - first, sum[0]);
    }
}

// out[k] = rows[k][first, first + columns) for k < n, filled with zeros up to whole vectors.
template <class T>
static void pack_columns(const T* const* rows, int64_t n, int64_t first, int64_t columns, T* out) {
  using S = Simd<T>;
  for (int64_t k = 0; k < n; ++k)
    for (int64_t c = 0; c < columns; c += S::width, out += S::width)
      S::store(out, S::load(rows[k] + first + c, (int)smaller(S::width, columns - c)));
}

// Packs columns [first, last) of rows[0 .. K) into blocks for Transposed, max_rows columns each; missing ones are zero.
template <class T>
static void pack_blocks(const T* const* rows, int64_t K, int64_t first, int64_t last, T* out) {
  constexpr int64_t MR = Block<T>::max_rows;
  for (; first + MR <= last; first += MR)
    for (int64_t k = 0; k < K; ++k, out += MR) __builtin_memcpy(out, rows[k] + first, MR * sizeof(T));
  if (first < last)
    for (int64_t k = 0; k < K; ++k, out += MR)
      for (int64_t r = 0; r < MR; ++r) out[r] = first + r < last ? rows[k][first + r] : T(0);
}

// sums[first, last) += the sums of those columns of rows[0 .. n).
template <class T>
static void add_rows(const T* const* rows, int64_t n, int64_t first, int64_t last, T* sums) {
  using S = Simd<T>;
  using V = typename S::V;
  for (; first < last; first += S::width) {
    const int lanes = (int)smaller(S::width, last - first);
    V even = S::load(sums + first, lanes), odd{};
    int64_t k = 0;
    for (; k + 2 <= n; k += 2) {
      even += S::load(rows[k] + first, lanes);
      odd += S::load(rows[k + 1] + first, lanes);
    }
    if (k < n) even += S::load(rows[k] + first, lanes);
    S::store(sums + first, even + odd, lanes);
  }
}
