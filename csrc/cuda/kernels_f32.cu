#include "tables.h"

namespace fusedrnn::cuda {
const CellKernels kernels_f32[] = FUSEDRNN_KERNELS(F32);
}  // namespace fusedrnn::cuda
