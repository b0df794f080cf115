// The functions of the module fusedrnn._cuda, which the tests put into a module over their emulator as well.
#pragma once

#include <pybind11/pybind11.h>

namespace fusedrnn {
void register_cuda(pybind11::module_& m);
}
