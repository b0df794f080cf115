// Compiled for the architecture's baseline: SSE2 on x86-64, NEON on AArch64.
#define FUSEDRNN_ISA_NAME baseline
#define FUSEDRNN_ISA_TEST true
#include "isa.h"
