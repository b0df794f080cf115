// Compiled once per instruction set, with its flags; FUSEDRNN_ISA_NAME names it.
#include "math_isa.h"

#include <cstddef>
#include <cstdint>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace FUSEDRNN_ISA_NAME {
using fusedrnn::bf16;
#include "vec.h"

template <class T, int N>
static void sigmoid(const T* in, T* out, int64_t count) {
  using M = Math<T, N>;
  for (int64_t k = 0; k < count; k += N * Simd<T>::width) M::store(out + k, M::sigmoid(M::load(in + k)));
}

template <class T, int N>
static void tanh(const T* in, T* out, int64_t count) {
  using M = Math<T, N>;
  for (int64_t k = 0; k < count; k += N * Simd<T>::width) M::store(out + k, M::tanh(M::load(in + k)));
}

template <class From, class To>
static void convert(const From* in, To* out, int64_t count, int lanes) {
  using S = Simd<float>;
  if (lanes > S::width) lanes = S::width;
  for (int64_t k = 0; k < count; k += lanes) {
    const int n = (int)(count - k < lanes ? count - k : lanes);
    S::store(out + k, S::load(in + k, n), n);
  }
}

extern const MathFunctions functions;
const MathFunctions functions = {
#define FUSEDRNN_STRING_(x) #x
#define FUSEDRNN_STRING(x) FUSEDRNN_STRING_(x)
    FUSEDRNN_STRING(FUSEDRNN_ISA_NAME),
    {sigmoid<float, 1>, sigmoid<float, 2>, sigmoid<float, 3>},
    {tanh<float, 1>, tanh<float, 2>, tanh<float, 3>},
    {sigmoid<double, 1>, sigmoid<double, 2>, sigmoid<double, 3>},
    {tanh<double, 1>, tanh<double, 2>, tanh<double, 3>},
    convert<float, bf16>,
    convert<bf16, float>,
};
}  // namespace FUSEDRNN_ISA_NAME
