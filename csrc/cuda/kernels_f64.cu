#include "tables.h"

namespace fusedrnn::cuda {
const CellKernels kernels_f64[] = FUSEDRNN_KERNELS(F64);
}  // namespace fusedrnn::cuda
