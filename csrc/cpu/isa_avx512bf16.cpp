// Compiled with -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512bf16 -mavx2 -mfma.
#define FUSEDRNN_ISA_NAME avx512bf16
#define FUSEDRNN_ISA_EXTENDS avx512
#define FUSEDRNN_ISA_TEST avx512_kernels.runs_here() && __builtin_cpu_supports("avx512bf16")
#include "isa.h"
