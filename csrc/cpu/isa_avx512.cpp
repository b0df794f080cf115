// Compiled with -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma.
#define FUSEDRNN_ISA_NAME avx512
#define FUSEDRNN_ISA_TEST                                                                                          \
  __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && \
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma")
#include "isa.h"
