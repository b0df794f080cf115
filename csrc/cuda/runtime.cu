#include <cuda_runtime.h>

#include <stdexcept>

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

void allow_shared(const void* kernel, int64_t bytes) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
        "cannot get the shared memory that the kernel needs");
}

__global__ void write(Arguments* to, const __grid_constant__ Arguments from) { *to = from; }

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
  allow_shared(function, shared_bytes);
  int each = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, function, threads, static_cast<size_t>(shared_bytes)),
        "cannot tell how many CTAs run at once");
  return static_cast<int64_t>(each) * facts.processors;
}

void zero(void* memory, int64_t bytes, Stream stream) {
  check(cudaMemsetAsync(memory, 0, static_cast<size_t>(bytes), stream_of(stream)), "cannot clear scratch memory");
}

void launch_cooperative(Kernel kernel, const Shape& shape, const Arguments& arguments) {
  const auto function = reinterpret_cast<const void*>(kernel);
  allow_shared(function, shape.shared_bytes);
  void* pointers[] = {const_cast<Arguments*>(&arguments)};
  check(cudaLaunchCooperativeKernel(function, dim3(static_cast<unsigned>(shape.ctas)),
                                    dim3(static_cast<unsigned>(shape.threads)), pointers,
                                    static_cast<size_t>(shape.shared_bytes), stream_of(shape.stream)),
        "the launch of the recurrence was refused");
}

void write_arguments(Arguments* to, const Arguments& from, Stream stream) {
  write<<<1, 1, 0, stream_of(stream)>>>(to, from);
  check(cudaGetLastError(), "the launch of the recurrence was refused");
}

void launch(StepKernel kernel, const Shape& shape, const Arguments* arguments, int64_t step) {
  const auto function = reinterpret_cast<const void*>(kernel);
  allow_shared(function, shape.shared_bytes);
  void* pointers[] = {&arguments, &step};
  check(cudaLaunchKernel(function, dim3(static_cast<unsigned>(shape.ctas)), dim3(static_cast<unsigned>(shape.threads)),
                         pointers, static_cast<size_t>(shape.shared_bytes), stream_of(shape.stream)),
        "the launch of a step was refused");
}

}  // namespace fusedrnn::cuda::runtime
