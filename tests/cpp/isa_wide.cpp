// The kernels with vectors twice as wide as AVX2's, which the compiler splits: the shapes of blocks and panels, and the
// tails, that a processor with AVX-512 gets.
#define FUSEDRNN_VECTOR_BYTES 64
#define FUSEDRNN_ISA_NAME wide
#define FUSEDRNN_ISA_TEST __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")
#include "isa.h"
