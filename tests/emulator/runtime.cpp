// The CUDA runtime as csrc/cuda/launch.cpp sees it, over the emulator. Streams are none: a launch runs at once.
#include "../../csrc/cuda/runtime.h"

#include <cstring>
#include <map>
#include <memory>
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

namespace {
void fail_if_wanted() {
  if (emulator::settings().fault == emulator::Fault::launch)
    throw std::runtime_error("the launch failed: as the tests want it");
}
}  // namespace

void fill(void* memory, int byte, int64_t bytes, Stream) { std::memset(memory, byte, static_cast<size_t>(bytes)); }

void launch_cooperative(Kernel kernel, const Shape& shape, const Arguments& arguments) {
  if (emulator::settings().fault == emulator::Fault::cooperative_launch) throw LaunchRefused("as the tests want it");
  fail_if_wanted();
  emulator::launch(shape.ctas, shape.threads, shape.shared_bytes, [&] { kernel(arguments); });
}

void write_arguments(StepArguments* to, const StepArguments& from, Stream) { *to = from; }

void launch(StepKernel kernel, const Shape& shape, const StepArguments* arguments, int64_t step) {
  fail_if_wanted();
  emulator::launch(shape.ctas, shape.threads, shape.shared_bytes, [&] { kernel(arguments, step); });
}

bool is_capturing(Stream) { return false; }

namespace {
class RecordedSteps : public StepGraph {
 public:
  RecordedSteps(StepKernel kernel, const Shape& shape) : kernel_(kernel), shape_(shape) {}
  StepArguments* arguments() override { return &arguments_; }
  void launch() override {
    for (int64_t step = 0; step < graph_steps; ++step) runtime::launch(kernel_, shape_, &arguments_, step);
    arguments_.first_step += graph_steps;
  }

 private:
  const StepKernel kernel_;
  const Shape shape_;
  StepArguments arguments_{};
};
}  // namespace

StepGraph* step_graph(StepKernel kernel, const Shape& shape) {
  static std::map<std::pair<StepKernel, int64_t>, std::unique_ptr<StepGraph>> graphs;
  auto& graph = graphs[{kernel, shape.ctas}];
  if (!graph) graph = std::make_unique<RecordedSteps>(kernel, shape);
  return graph.get();
}

}  // namespace fusedrnn::cuda::runtime
