#pragma once

#include "../../csrc/cuda/launch.h"

namespace fusedrnn::emulator {
// The GPU that the emulator claims to be; the tests may change it.
cuda::DeviceFacts& device();
}  // namespace fusedrnn::emulator
