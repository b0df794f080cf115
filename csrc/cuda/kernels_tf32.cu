#include "tables.h"

namespace fusedrnn::cuda {
const CellKernels kernels_tf32[] = FUSEDRNN_KERNELS(Tf32);
}  // namespace fusedrnn::cuda
