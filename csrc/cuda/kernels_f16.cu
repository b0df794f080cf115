#include "tables.h"

namespace fusedrnn::cuda {
const CellKernels kernels_f16[] = FUSEDRNN_KERNELS(F16);
}  // namespace fusedrnn::cuda
