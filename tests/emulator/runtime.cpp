// The CUDA runtime as csrc/cuda/launch.cpp sees it, over the emulator. Streams are none: a launch runs at once.
#include "../../csrc/cuda/runtime.h"

#include <cstring>
#include <stdexcept>

#include "../../csrc/cuda/device.h"
#include "runtime.h"

namespace fusedrnn::emulator {
cuda::DeviceFacts& device() {
  static cuda::DeviceFacts facts{"emulated GPU", 9, 0, 16, 227 << 10, true};
  return facts;
}
}  // namespace fusedrnn::emulator

namespace fusedrnn::cuda::runtime {

CurrentDevice::CurrentDevice(int device) : before_(device) {}
CurrentDevice::~CurrentDevice() = default;

int device_count() { return 1; }
DeviceFacts device_facts(int) { return emulator::device(); }
int runtime_version() { return 0; }
int driver_version() { return 0; }

int64_t resident_ctas(Kernel, int, int64_t, const DeviceFacts& facts) { return facts.processors; }

void zero(void* memory, int64_t bytes, Stream) { std::memset(memory, 0, static_cast<size_t>(bytes)); }

void launch_cooperative(Kernel kernel, const Shape& shape, const Arguments& arguments) {
  if (emulator::settings().fault == emulator::Fault::launch)
    throw std::runtime_error("the launch of the recurrence was refused: as the tests want it");
  emulator::launch(shape.ctas, shape.threads, shape.shared_bytes, [&] { kernel(arguments); });
}

void write_arguments(Arguments* to, const Arguments& from, Stream) { *to = from; }

void launch(StepKernel kernel, const Shape& shape, const Arguments* arguments, int64_t step) {
  emulator::launch(shape.ctas, shape.threads, shape.shared_bytes, [&] { kernel(arguments, step); });
}

}  // namespace fusedrnn::cuda::runtime
