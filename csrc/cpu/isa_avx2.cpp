// Compiled with -mavx2 -mfma.
#define FUSEDRNN_ISA_NAME avx2
#define FUSEDRNN_ISA_TEST __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")
#include "isa.h"
