// What launch.cpp needs of the CUDA runtime. The tests bring a second implementation over their emulator.
#pragma once

#include "kernels.h"

namespace fusedrnn::cuda::runtime {

struct Shape {
  int64_t ctas;
  int threads;
  int64_t shared_bytes;
  Stream stream;
};

// Makes a device current and, at the end, the one before.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device);
  ~CurrentDevice();
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int before_;
};

int device_count();
DeviceFacts device_facts(int device);
int runtime_version();
int driver_version();
// CTAs of a kernel that the current device runs at once.
int64_t resident_ctas(Kernel kernel, int threads, int64_t shared_bytes, const DeviceFacts& facts);
void fill(void* memory, int byte, int64_t bytes, Stream stream);
// All CTAs run at once, or it throws LaunchRefused.
void launch_cooperative(Kernel kernel, const Shape& shape, const Arguments& arguments);
// Writes the arguments of per-step kernels to device memory, in the order of the stream.
void write_arguments(StepArguments* to, const StepArguments& from, Stream stream);
void launch(StepKernel kernel, const Shape& shape, const StepArguments* arguments, int64_t step);

// Whether launches into the stream are recorded, not run.
bool is_capturing(Stream stream);

// The launches of `graph_steps` steps as one. It reads its arguments from memory of its own, so calls that use it must
// follow each other: there is one for each stream.
class StepGraph {
 public:
  virtual ~StepGraph() = default;
  virtual StepArguments* arguments() = 0;
  virtual void launch() = 0;
};
// Recorded at the first call and kept; null if too many are kept already.
StepGraph* step_graph(StepKernel kernel, const Shape& shape);

}  // namespace fusedrnn::cuda::runtime
