// The body of every isa_*.cpp: the kernels of one instruction set, in a namespace of its own.
//
// FUSEDRNN_ISA_NAME names it, FUSEDRNN_ISA_TEST tells whether this processor runs it. FUSEDRNN_ISA_EXTENDS names a set
// that it extends by instructions for bfloat16; then float and double have that set's kernels. No inline function of
// the standard library may be called in here: the linker keeps one copy for all, perhaps one that other processors
// cannot run.

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "../cells/gru.h"
#include "../cells/lstm.h"
#include "../cells/rnn.h"
#include "kept.h"
#include "kernels.h"
#include "memory.h"
#include "processor.h"
#include "team.h"

namespace fusedrnn {
namespace FUSEDRNN_ISA_NAME {
#include "vec.h"
// Products, on vectors.
#include "gemm.h"
// How work is divided, on products.
#include "plan.h"
// Both passes, on all of these.
#include "backward.h"
#include "forward.h"
// Needs vec.h alone.
#include "probe.h"
}  // namespace FUSEDRNN_ISA_NAME

#ifndef FUSEDRNN_ISA_EXTENDS
#define FUSEDRNN_ISA_EXTENDS FUSEDRNN_ISA_NAME
#define FUSEDRNN_ISA_IS_WHOLE
#endif

#define FUSEDRNN_STRING_(x) #x
#define FUSEDRNN_STRING(x) FUSEDRNN_STRING_(x)
#define FUSEDRNN_JOIN_(a, b) a##b
#define FUSEDRNN_JOIN(a, b) FUSEDRNN_JOIN_(a, b)
#define FUSEDRNN_CELLS(T)                                                                  \
  {                                                                                        \
    {FUSEDRNN_ISA_NAME::forward<T, RnnTanh>, FUSEDRNN_ISA_NAME::backward<T, RnnTanh>},     \
        {FUSEDRNN_ISA_NAME::forward<T, RnnRelu>, FUSEDRNN_ISA_NAME::backward<T, RnnRelu>}, \
        {FUSEDRNN_ISA_NAME::forward<T, Lstm>, FUSEDRNN_ISA_NAME::backward<T, Lstm>}, {     \
      FUSEDRNN_ISA_NAME::forward<T, Gru>, FUSEDRNN_ISA_NAME::backward<T, Gru>              \
    }                                                                                      \
  }

extern const Functions<float> FUSEDRNN_JOIN(FUSEDRNN_ISA_EXTENDS, _single)[];
extern const Functions<double> FUSEDRNN_JOIN(FUSEDRNN_ISA_EXTENDS, _double)[];
#ifdef FUSEDRNN_ISA_IS_WHOLE
const Functions<float> FUSEDRNN_JOIN(FUSEDRNN_ISA_NAME, _single)[] = FUSEDRNN_CELLS(float);
const Functions<double> FUSEDRNN_JOIN(FUSEDRNN_ISA_NAME, _double)[] = FUSEDRNN_CELLS(double);
#endif
static const Functions<bf16> FUSEDRNN_JOIN(FUSEDRNN_ISA_NAME, _bf16)[] = FUSEDRNN_CELLS(bf16);

extern const Kernels FUSEDRNN_JOIN(FUSEDRNN_ISA_NAME, _kernels) = {
    FUSEDRNN_STRING(FUSEDRNN_ISA_NAME),
    [] { return static_cast<bool>(FUSEDRNN_ISA_TEST); },
    FUSEDRNN_JOIN(FUSEDRNN_ISA_EXTENDS, _single),
    FUSEDRNN_JOIN(FUSEDRNN_ISA_EXTENDS, _double),
    FUSEDRNN_JOIN(FUSEDRNN_ISA_NAME, _bf16),
    {FUSEDRNN_ISA_NAME::probe_multiply_adds<float>, FUSEDRNN_ISA_NAME::probe_multiply_adds<double>,
     FUSEDRNN_ISA_NAME::probe_bf16, FUSEDRNN_ISA_NAME::probe_read}};

}  // namespace fusedrnn
