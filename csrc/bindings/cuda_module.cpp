#include "cuda.h"

PYBIND11_MODULE(_cuda, m) { fusedrnn::register_cuda(m); }
