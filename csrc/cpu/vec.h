// A SIMD vector as wide as the instruction set of this translation unit, and the functions that gates need.
//
// Included once per instruction set inside that set's own namespace (see isa_*.cpp), so that no two sets share a
// symbol. FUSEDRNN_VECTOR_BYTES may be set by a test to run a wider kernel's logic on a narrower machine.

#ifndef FUSEDRNN_VECTOR_BYTES
#if defined(__AVX512F__)
#define FUSEDRNN_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define FUSEDRNN_VECTOR_BYTES 32
#else
#define FUSEDRNN_VECTOR_BYTES 16
#endif
#endif

#define FUSEDRNN_INLINE static inline __attribute__((always_inline))
#define FUSEDRNN_FRIEND friend inline __attribute__((always_inline))

// Calls f with a constant of a variable's value.
template <class F>
FUSEDRNN_ALWAYS_INLINE void for_constant(bool value, F&& f) {
  if (value)
    f(std::true_type{});
  else
    f(std::false_type{});
}

// Per type: the integers of its width (unsigned: those of a NaN may overflow), and the constants of its exponential.
// `series` is P in e^r - 1 = r + r^2 P(r), for |r| <= ln 2 / 2: the polynomial whose largest relative error is the
// least (by Remez' exchange; 1.3e-8 in float, 1.8e-17 in double: a fifth of an ulp).
template <class T>
struct Float;

template <>
struct Float<float> {
  using Int = uint32_t;
  static constexpr int mantissa = 23;
  static constexpr float shift = 0x1.8p23f + 127;  // adding it rounds to an integer n and leaves 2^n's exponent below
  static constexpr float lowest = -87.3f, beyond = 88.9f;  // e^x is nearly 0; e^x is infinite
  static constexpr float log2e = 0x1.715476p+0f;
  static constexpr float ln2 = 0x1.62e43p-1f;
  static constexpr float ln2_high = 0x1.63p-1f, ln2_low = -0x1.bd0106p-13f;  // the high part times any n is exact
  static constexpr float series[] = {0x1.fffffep-2f, 0x1.5554bp-3f, 0x1.555674p-5f, 0x1.1227f6p-7f, 0x1.6bebf4p-10f};
};

template <>
struct Float<double> {
  using Int = uint64_t;
  static constexpr int mantissa = 52;
  static constexpr double shift = 0x1.8p52 + 1023;
  static constexpr double lowest = -708.3, beyond = 709.95;
  static constexpr double log2e = 0x1.71547652b82fep+0;
  static constexpr double ln2 = 0x1.62e42fefa39efp-1;
  static constexpr double ln2_high = 0x1.62e42feep-1, ln2_low = 0x1.a39ef35793c76p-33;
  static constexpr double series[] = {0x1.0000000000005p-1,  0x1.5555555555539p-3,  0x1.555555555225bp-5,
                                      0x1.1111111119095p-7,  0x1.6c16c17ef58a0p-10, 0x1.a01a0174d9108p-13,
                                      0x1.a019a71c5a7cfp-16, 0x1.71de884ee634cp-19, 0x1.28a236d4c9701p-22,
                                      0x1.ae6baa958e736p-26};
};

template <class T>
struct Simd {
  static constexpr int width = FUSEDRNN_VECTOR_BYTES / sizeof(T);
  typedef T V __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES)));
  typedef T Unaligned __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES), aligned(sizeof(T)), may_alias));
  typedef typename Float<T>::Int Int;
  typedef Int Bits __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES)));
  using F = Float<T>;

  FUSEDRNN_INLINE V load(const T* p) { return *reinterpret_cast<const Unaligned*>(p); }
  FUSEDRNN_INLINE void store(T* p, V v) { *reinterpret_cast<Unaligned*>(p) = v; }

  // Stores past the caches, where there is an instruction for it, to an address that is a multiple of the size; others
  // see it after `finish_streams`.
  FUSEDRNN_INLINE void stream(T* p, V v) { write_past<sizeof(V)>(p, &v); }
  FUSEDRNN_INLINE void finish_streams() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
  }

  // The larger or smaller of `bound` and v in each lane; v where it is NaN.
  FUSEDRNN_INLINE V at_least(T bound, V v) {
#if defined(__AVX512F__) && FUSEDRNN_VECTOR_BYTES == 64
    if constexpr (sizeof(T) == 4) return (V)_mm512_maskz_max_ps((__mmask16)-1, (__m512)(V{} + bound), (__m512)v);
    if constexpr (sizeof(T) == 8) return (V)_mm512_maskz_max_pd((__mmask8)-1, (__m512d)(V{} + bound), (__m512d)v);
#else
    return v < bound ? V{} + bound : v;
#endif
  }

  // a b + c, in one rounding where there is an instruction for it. Of two products that are added, the compiler would
  // merge one with the sum: the same cell would round differently in different places.
  FUSEDRNN_INLINE V multiply_add(V a, V b, V c) {
#if defined(__AVX512F__) && FUSEDRNN_VECTOR_BYTES == 64
    if constexpr (sizeof(T) == 4) return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
    if constexpr (sizeof(T) == 8) return (V)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__AVX2__) && FUSEDRNN_VECTOR_BYTES == 32
    if constexpr (sizeof(T) == 4) return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
    if constexpr (sizeof(T) == 8) return (V)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__aarch64__) && FUSEDRNN_VECTOR_BYTES == 16
    if constexpr (sizeof(T) == 4) return (V)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
    if constexpr (sizeof(T) == 8) return (V)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
    return a * b + c;
#endif
  }

  FUSEDRNN_INLINE V at_most(T bound, V v) {
#if defined(__AVX512F__) && FUSEDRNN_VECTOR_BYTES == 64
    if constexpr (sizeof(T) == 4) return (V)_mm512_maskz_min_ps((__mmask16)-1, (__m512)(V{} + bound), (__m512)v);
    if constexpr (sizeof(T) == 8) return (V)_mm512_maskz_min_pd((__mmask8)-1, (__m512d)(V{} + bound), (__m512d)v);
#else
    return v > bound ? V{} + bound : v;
#endif
  }

  // The first n lanes only; the others are zero and their memory is not touched.
  FUSEDRNN_INLINE V load(const T* p, int n) {
    if (n >= width) return load(p);
    V v{};
#if defined(__AVX512F__) && FUSEDRNN_VECTOR_BYTES == 64
    if constexpr (sizeof(T) == 4) v = (V)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
    if constexpr (sizeof(T) == 8) v = (V)_mm512_maskz_loadu_pd((__mmask8)((1u << n) - 1), p);
#elif defined(__AVX2__) && FUSEDRNN_VECTOR_BYTES == 32
    if constexpr (sizeof(T) == 4) v = (V)_mm256_maskload_ps(p, (__m256i)first_lanes(n));
    if constexpr (sizeof(T) == 8) v = (V)_mm256_maskload_pd(p, (__m256i)first_lanes(n));
#else
    for (int lane = 0; lane < n; ++lane) v[lane] = p[lane];
#endif
    return v;
  }

  FUSEDRNN_INLINE void store(T* p, V v, int n) {
    if (n >= width) return store(p, v);
#if defined(__AVX512F__) && FUSEDRNN_VECTOR_BYTES == 64
    if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
    if constexpr (sizeof(T) == 8) _mm512_mask_storeu_pd(p, (__mmask8)((1u << n) - 1), (__m512d)v);
#elif defined(__AVX2__) && FUSEDRNN_VECTOR_BYTES == 32
    if constexpr (sizeof(T) == 4) _mm256_maskstore_ps(p, (__m256i)first_lanes(n), (__m256)v);
    if constexpr (sizeof(T) == 8) _mm256_maskstore_pd(p, (__m256i)first_lanes(n), (__m256d)v);
#else
    for (int lane = 0; lane < n; ++lane) p[lane] = v[lane];
#endif
  }

  // bfloat16 in memory, float in registers. Half a vector of the upper halves of floats.
  typedef uint16_t Halves __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES / 2)));
  typedef uint16_t UnalignedHalves __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES / 2), aligned(2), may_alias));

  FUSEDRNN_INLINE V load(const bf16* p) { return widen(*reinterpret_cast<const UnalignedHalves*>(p)); }
  FUSEDRNN_INLINE void store(bf16* p, V v) { *reinterpret_cast<UnalignedHalves*>(p) = narrow(v); }
  FUSEDRNN_INLINE void stream(bf16* p, V v) {
    const Halves halves = narrow(v);
    write_past<sizeof halves>(p, &halves);
  }

  FUSEDRNN_INLINE V load(const bf16* p, int n) {
    if (n >= width) return load(p);
    Halves halves{};
#if defined(__AVX512F__) && FUSEDRNN_VECTOR_BYTES == 64
    halves = (Halves)_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p);
#else
    for (int lane = 0; lane < n; ++lane) halves[lane] = p[lane].bits;
#endif
    return widen(halves);
  }

  FUSEDRNN_INLINE void store(bf16* p, V v, int n) {
    if (n >= width) return store(p, v);
    const Halves halves = narrow(v);
#if defined(__AVX512F__) && FUSEDRNN_VECTOR_BYTES == 64
    _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), (__m256i)halves);
#else
    for (int lane = 0; lane < n; ++lane) p[lane].bits = halves[lane];
#endif
  }

  // v[i][j] becomes v[j][i]: blocks of half the width are exchanged, then of a quarter, ...
  template <int half = width / 2>
  FUSEDRNN_INLINE void transpose(V (&v)[width]) {
    if constexpr (half > 0) {
#pragma GCC unroll 16
      for (int i = 0; i < width; ++i)
        if (!(i & half)) exchange<half>(v[i], v[i + half], std::make_integer_sequence<int, width>{});
      transpose<half / 2>(v);
    }
  }

 private:
  template <int bytes>
  FUSEDRNN_INLINE void write_past(void* to, const void* from) {
#if defined(__AVX512F__)
    if constexpr (bytes == 64) return _mm512_stream_si512((__m512i*)to, _mm512_loadu_si512(from));
#endif
#if defined(__AVX__)
    if constexpr (bytes == 32) return _mm256_stream_si256((__m256i*)to, _mm256_loadu_si256((const __m256i*)from));
#endif
#if defined(__x86_64__)
    if constexpr (bytes == 16) return _mm_stream_si128((__m128i*)to, _mm_loadu_si128((const __m128i*)from));
#endif
    __builtin_memcpy(to, from, bytes);
  }

  FUSEDRNN_INLINE Bits first_lanes(int n) {
    Bits lanes;
    for (int lane = 0; lane < width; ++lane) lanes[lane] = lane;
    return lanes < (Int)n;
  }

  FUSEDRNN_INLINE V widen(Halves halves) { return (V)(__builtin_convertvector(halves, Bits) << 16); }

  // As the constructor of bf16 does; the instruction for it takes what is nearer to zero than 2^-126 for zero.
  FUSEDRNN_INLINE Halves narrow(V v) {
#if defined(__AVX512BF16__) && FUSEDRNN_VECTOR_BYTES == 64
    return (Halves)_mm512_cvtneps_pbh((__m512)v);
#else
    const Bits bits = (Bits)v;
    return __builtin_convertvector((v == v ? bits + 0x7fff + (bits >> 16 & 1) : bits | 0x400000) >> 16, Halves);
#endif
  }

  template <int half, int... lane>
  FUSEDRNN_INLINE void exchange(V& a, V& b, std::integer_sequence<int, lane...>) {
    const V old = a;
    a = __builtin_shufflevector(old, b, (lane & half ? width + lane - half : lane)...);
    b = __builtin_shufflevector(old, b, (lane & half ? width + lane : lane + half)...);
  }
};

// Some vectors in step. Named members, not an array: the compiler keeps those in registers.
template <class First, class Rest, class T>
struct Several {
  First first;
  Rest rest;
  FUSEDRNN_FRIEND Several operator+(Several a, Several b) { return {a.first + b.first, a.rest + b.rest}; }
  FUSEDRNN_FRIEND Several operator-(Several a, Several b) { return {a.first - b.first, a.rest - b.rest}; }
  FUSEDRNN_FRIEND Several operator*(Several a, Several b) { return {a.first * b.first, a.rest * b.rest}; }
  FUSEDRNN_FRIEND Several operator/(Several a, Several b) { return {a.first / b.first, a.rest / b.rest}; }
  FUSEDRNN_FRIEND Several operator+(Several a, T b) { return {a.first + b, a.rest + b}; }
  FUSEDRNN_FRIEND Several operator-(Several a, T b) { return {a.first - b, a.rest - b}; }
  FUSEDRNN_FRIEND Several operator-(T a, Several b) { return {a - b.first, a - b.rest}; }
  FUSEDRNN_FRIEND Several operator*(Several a, T b) { return {a.first * b, a.rest * b}; }
  FUSEDRNN_FRIEND Several operator/(T a, Several b) { return {a / b.first, a / b.rest}; }
};

template <class T, int N>
struct Vectors;

template <class T>
struct Vectors<T, 1> {
  using S = Simd<T>;
  using V = typename S::V;
  template <class Op, class... Args>
  FUSEDRNN_INLINE V map(Op op, Args... args) {
    return op(args...);
  }
  template <class Value>
  FUSEDRNN_INLINE V load(const Value* p) {
    return S::load(p);
  }
  template <class Value>
  FUSEDRNN_INLINE V load(const Value* p, int lanes) {
    return S::load(p, lanes);
  }
  template <class Value>
  FUSEDRNN_INLINE void store(Value* p, V v) {
    S::store(p, v);
  }
  template <class Value>
  FUSEDRNN_INLINE void store(Value* p, V v, int lanes) {
    S::store(p, v, lanes);
  }
  template <class Value>
  FUSEDRNN_INLINE void stream(Value* p, V v) {
    S::stream(p, v);
  }
};

template <class T, int N>
struct Vectors {
  using One = Vectors<T, 1>;
  using Rest = Vectors<T, N - 1>;
  using V = Several<typename One::V, typename Rest::V, T>;
  static constexpr int width = Simd<T>::width;
  template <class Op, class... Args>
  FUSEDRNN_INLINE V map(Op op, Args... args) {
    return {op(args.first...), Rest::map(op, args.rest...)};
  }
  template <class Value>
  FUSEDRNN_INLINE V load(const Value* p) {
    return {One::load(p), Rest::load(p + width)};
  }
  template <class Value>
  FUSEDRNN_INLINE V load(const Value* p, int) {
    return load(p);
  }
  template <class Value>
  FUSEDRNN_INLINE void store(Value* p, V v) {
    One::store(p, v.first), Rest::store(p + width, v.rest);
  }
  template <class Value>
  FUSEDRNN_INLINE void store(Value* p, V v, int) {
    store(p, v);
  }
  template <class Value>
  FUSEDRNN_INLINE void stream(Value* p, V v) {
    One::stream(p, v.first), Rest::stream(p + width, v.rest);
  }
};

// What cells compute with: N vectors side by side; of a single one perhaps only the first `lanes` exist. One
// unit's gates are a chain of a hundred cycles that waits for its own results; with several vectors in step the
// processor has something to do meanwhile.
template <class T, int N>
struct Math : Vectors<T, N> {
  using F = Float<T>;
  using S = Simd<T>;
  using Raw = typename S::V;
  using Bits = typename S::Bits;
  using Int = typename S::Int;
  using V = typename Vectors<T, N>::V;
  using Vectors<T, N>::map;

  FUSEDRNN_INLINE V zero() { return V{}; }

  FUSEDRNN_INLINE V multiply_add(V a, V b, V c) {
    return map([](Raw u, Raw v, Raw w) { return S::multiply_add(u, v, w); }, a, b, c);
  }

  // max(x, 0), a NaN stays one.
  FUSEDRNN_INLINE V relu(V x) {
    return map([](Raw v) { return v < 0 ? Raw{} : v; }, x);
  }

  // x where `condition` is positive or NaN, else 0.
  FUSEDRNN_INLINE V where_positive(V condition, V x) {
    return map([](Raw c, Raw v) { return c <= 0 ? Raw{} : v; }, condition, x);
  }

  // 1 / (1 + e^-x): within 2.5 ulp. Comparisons with a NaN are false, so a NaN passes through.
  FUSEDRNN_INLINE V sigmoid(V x) {
    const V y = map([](Raw v) { return S::at_most(-F::lowest, S::at_least(-F::beyond, v)); }, x);
    const V shifted = y * -F::log2e + F::shift, n = shifted - F::shift;
    const V r = (y + n * F::ln2_high) + n * F::ln2_low;  // e^-y = 2^n e^-r
    return T(1) / (((series<1, -1>(r) * r - T(1)) * r + T(1)) * power_of_two(shifted) + T(1));
  }

  // Through half of e^(-2|x|) - 1, which keeps every digit near zero: within 3 ulp. Far from zero that hardly counts,
  // and ln 2 need not be more precise than a number is.
  FUSEDRNN_INLINE V tanh(V x) {
    const V y = map([](Raw v) { return S::at_most(-F::lowest / 2, (Raw)((Bits)v & ~sign())); }, x);
    const V shifted = y * (-2 * F::log2e) + F::shift, n = shifted - F::shift, scale = power_of_two(shifted);
    const V r = y + n * (F::ln2 / 2);  // e^-2y = 2^n e^-2r
    const V half = (series<2, -2>(r) * (r * r) - r) * scale + (scale * T(0.5) - T(0.5));
    const V t = half / (half + T(1));
    return map([](Raw v, Raw u) { return (Raw)(((Bits)u & ~sign()) | ((Bits)v & sign())); }, x, t);
  }

 private:
  FUSEDRNN_INLINE Bits sign() { return Bits{} + (Int)((Int)1 << (8 * sizeof(T) - 1)); }

  // 2^n, of an integer n that `shift` was added to; infinite for the n behind the largest exponent.
  FUSEDRNN_INLINE V power_of_two(V shifted) {
    return map([](Raw v) { return (Raw)((Bits)v << F::mantissa); }, shifted);
  }

  // `times` P(`factor` r), see Float: powers of two and signs go into the coefficients.
  template <int times, int factor>
  FUSEDRNN_INLINE V series(V r) {
    constexpr int count = sizeof F::series / sizeof F::series[0];
    const auto coefficient = [](int k) {
      T result = F::series[k] * times;
      for (; k > 0; --k) result *= factor;
      return result;
    };
    V sum = r * coefficient(count - 1) + coefficient(count - 2);
#pragma GCC unroll 8
    for (int k = count - 3; k >= 0; --k) sum = sum * r + coefficient(k);
    return sum;
  }
};
