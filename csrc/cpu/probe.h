// How fast this processor is at best, for the benchmark to hold the kernels against: arithmetic on registers alone,
// and reading alone. What is computed is of no use; it must only be beyond what a compiler can foresee.

// Enough independent sums to hide the latency of an addition: two a cycle, four cycles each, on today's processors.
constexpr int probe_chains = 12;

// Multiplies and adds vectors in registers; returns the floating-point operations that this was.
template <class T>
int64_t probe_multiply_adds(int64_t rounds) {
  using V = typename Simd<T>::V;
  volatile T factor = T(0.5), sink;
  const V a = V{} + factor, b = a;
  V sum[probe_chains];
  for (V& s : sum) s = a;
  for (int64_t k = 0; k < rounds; ++k)
#pragma GCC unroll 12
    for (int c = 0; c < probe_chains; ++c) sum[c] = sum[c] * a + b;
  V total{};
  for (const V& s : sum) total += s;
  sink = total[0];
  (void)sink;
  return rounds * probe_chains * Simd<T>::width * 2;
}

// The same with products of pairs of bfloat16 added to float32; null without an instruction for that.
#if defined(__AVX512BF16__) && FUSEDRNN_VECTOR_BYTES == 64
inline int64_t probe_bf16(int64_t rounds) {
  constexpr int chains = 16;       // six cycles each
  volatile int bits = 0x3f803f80;  // ones
  volatile float sink;
  const __m512bh a = (__m512bh)_mm512_set1_epi32(bits);
  __m512 sum[chains];
  for (__m512& s : sum) s = _mm512_setzero_ps();
  for (int64_t k = 0; k < rounds; ++k)
#pragma GCC unroll 16
    for (int c = 0; c < chains; ++c) sum[c] = _mm512_dpbf16_ps(sum[c], a, a);
  __m512 total = _mm512_setzero_ps();
  for (const __m512& s : sum) total = _mm512_add_ps(total, s);
  sink = total[0];
  (void)sink;
  return rounds * chains * 16 * 4;
}
#else
constexpr int64_t (*probe_bf16)(int64_t rounds) = nullptr;
#endif

// Reads memory from end to end. `bytes` is a multiple of 4096, `data` aligned for vectors.
inline void probe_read(const void* data, int64_t bytes, int64_t rounds) {
  using Bits = typename Simd<float>::Bits;
  constexpr int chains = 8;
  volatile uint32_t sink;
  Bits seen[chains]{};
  for (int64_t k = 0; k < rounds; ++k) {
    const auto* v = static_cast<const Bits*>(data);
    const auto* end = v + bytes / static_cast<int64_t>(sizeof(Bits));
    for (; v != end; v += chains)
#pragma GCC unroll 8
      for (int c = 0; c < chains; ++c) seen[c] |= v[c];
    asm volatile("" ::: "memory");  // for all the compiler knows, the next round finds other values
  }
  Bits all{};
  for (const Bits& s : seen) all |= s;
  sink = all[0];
  (void)sink;
}
