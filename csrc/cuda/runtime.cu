#include <cuda_runtime.h>

#include <map>
#include <memory>
#include <stdexcept>
#include <tuple>

#include "runtime.h"

namespace fusedrnn::cuda::runtime {
namespace {

// Takes the error away from the runtime, which would otherwise report it again at somebody else's call.
void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) +
                           ")");
}

cudaStream_t stream_of(Stream stream) { return static_cast<cudaStream_t>(stream); }

// Lets a kernel have all the shared memory of the current device's CTAs, whatever this launch needs: launches that a
// CUDA graph has recorded with more must still run afterwards.
void allow_shared(const void* kernel) {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), "cannot tell the current device");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "cannot ask for the device's properties");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "cannot get the shared memory that the kernel needs");
}

__global__ void write(StepArguments* to, const __grid_constant__ StepArguments from) { *to = from; }
__global__ void advance(StepArguments* arguments) { arguments->first_step += graph_steps; }

// Lets this thread allocate and record although another one may be recording, which CUDA otherwise treats as an error
// of that other one.
class RelaxedCapture {
 public:
  RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

class RecordedSteps : public StepGraph {
 public:
  RecordedSteps(StepKernel kernel, const Shape& shape) : stream_(shape.stream) {
    const RelaxedCapture relaxed;
    check(cudaMalloc(&arguments_, sizeof(StepArguments)), "no memory for the arguments of a CUDA graph");
    cudaStream_t recorder;
    check(cudaStreamCreateWithFlags(&recorder, cudaStreamNonBlocking), "cannot make a stream to record on");
    cudaGraph_t graph = nullptr;
    std::string failure;
    try {
      check(cudaStreamBeginCapture(recorder, cudaStreamCaptureModeRelaxed), "cannot record a CUDA graph");
      Shape on_recorder = shape;
      on_recorder.stream = recorder;
      for (int64_t step = 0; step < graph_steps; ++step) runtime::launch(kernel, on_recorder, arguments_, step);
      advance<<<1, 1, 0, recorder>>>(arguments_);
      check(cudaGetLastError(), "cannot record a CUDA graph");
    } catch (const std::exception& error) {
      failure = error.what();
    }
    cudaStreamEndCapture(recorder, &graph);
    cudaStreamDestroy(recorder);
    if (failure.empty() && cudaGraphInstantiateWithFlags(&executable_, graph, 0) != cudaSuccess)
      failure = "cannot make a CUDA graph of the recorded steps";
    if (graph) cudaGraphDestroy(graph);
    if (!failure.empty()) {
      cudaFree(arguments_);
      cudaGetLastError();
      throw std::runtime_error(failure);
    }
  }

  StepArguments* arguments() override { return arguments_; }
  void launch() override { check(cudaGraphLaunch(executable_, stream_of(stream_)), "the launch of steps failed"); }

 private:
  Stream stream_;
  StepArguments* arguments_ = nullptr;
  cudaGraphExec_t executable_ = nullptr;
};

}  // namespace

CurrentDevice::CurrentDevice(int device) {
  check(cudaGetDevice(&before_), "cannot tell the current device");
  if (device != before_) check(cudaSetDevice(device), "cannot make the tensors' device current");
}
CurrentDevice::~CurrentDevice() {
  int now = before_;
  if (cudaGetDevice(&now) == cudaSuccess && now != before_) cudaSetDevice(before_);
}

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {  // no driver, or none that is new enough
    cudaGetLastError();
    return 0;
  }
  return count;
}

DeviceFacts device_facts(int device) {
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device), "cannot ask for the device's properties");
    return value;
  };
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, device), "cannot ask for the device's properties");
  return {properties.name,
          properties.major,
          properties.minor,
          properties.multiProcessorCount,
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          attribute(cudaDevAttrCooperativeLaunch) != 0};
}

int runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}
int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int64_t resident_ctas(Kernel kernel, int threads, int64_t shared_bytes, const DeviceFacts& facts) {
  const auto function = reinterpret_cast<const void*>(kernel);
  allow_shared(function);
  int each = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, function, threads, static_cast<size_t>(shared_bytes)),
        "cannot tell how many CTAs run at once");
  return static_cast<int64_t>(each) * facts.processors;
}

void fill(void* memory, int byte, int64_t bytes, Stream stream) {
  check(cudaMemsetAsync(memory, byte, static_cast<size_t>(bytes), stream_of(stream)), "cannot prepare scratch memory");
}

void launch_cooperative(Kernel kernel, const Shape& shape, const Arguments& arguments) {
  const auto function = reinterpret_cast<const void*>(kernel);
  allow_shared(function);
  void* pointers[] = {const_cast<Arguments*>(&arguments)};
  const cudaError_t status = cudaLaunchCooperativeKernel(
      function, dim3(static_cast<unsigned>(shape.ctas)), dim3(static_cast<unsigned>(shape.threads)), pointers,
      static_cast<size_t>(shape.shared_bytes), stream_of(shape.stream));
  if (status == cudaErrorCooperativeLaunchTooLarge || status == cudaErrorNotSupported) {
    cudaGetLastError();
    throw LaunchRefused(cudaGetErrorString(status));
  }
  check(status, "the launch of the recurrence failed");
}

void write_arguments(StepArguments* to, const StepArguments& from, Stream stream) {
  write<<<1, 1, 0, stream_of(stream)>>>(to, from);
  check(cudaGetLastError(), "the launch of the recurrence failed");
}

void launch(StepKernel kernel, const Shape& shape, const StepArguments* arguments, int64_t step) {
  void* pointers[] = {&arguments, &step};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(shape.ctas)),
                         dim3(static_cast<unsigned>(shape.threads)), pointers, static_cast<size_t>(shape.shared_bytes),
                         stream_of(shape.stream)),
        "the launch of a step failed");
}

bool is_capturing(Stream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream_of(stream), &status), "cannot tell whether the stream is recorded");
  return status != cudaStreamCaptureStatusNone;
}

StepGraph* step_graph(StepKernel kernel, const Shape& shape) {
  constexpr size_t most = 256;
  // Kept until the end of the process, when the driver may be gone before this is. Callers hold Python's lock.
  static auto& graphs = *new std::map<std::tuple<int, StepKernel, int64_t, Stream>, std::unique_ptr<StepGraph>>;
  int device = 0;
  check(cudaGetDevice(&device), "cannot tell the current device");
  const auto key = std::make_tuple(device, kernel, shape.ctas, shape.stream);
  const auto found = graphs.find(key);
  if (found != graphs.end()) return found->second.get();
  if (graphs.size() >= most) return nullptr;
  return graphs.emplace(key, std::make_unique<RecordedSteps>(kernel, shape)).first->second.get();
}

}  // namespace fusedrnn::cuda::runtime
