#include "tables.h"

namespace fusedrnn::cuda {
const CellKernels kernels_bf16[] = FUSEDRNN_KERNELS(Bf16);
}  // namespace fusedrnn::cuda
