// Launching kernels, the same way on a device and under csrc/tests/shim. Functions return null or what went wrong.
#pragma once

#include <cstddef>

#include "device.cuh"

namespace fastlm {
namespace device {

struct Shape {
  unsigned blocks, threads;
  std::size_t shared;  // dynamic, bytes a block
  bool cooperative;    // all blocks resident at once
};

// Calls f with a value of the storage's type.
template <typename F>
const char* with_type(Storage storage, F f) {
  switch (storage) {
    case Storage::float16:
      return f(device::Half{});
    case Storage::bfloat16:
      return f(device::BFloat16{});
    default:
      return f(float{});
  }
}

#if defined(__CUDACC__)

inline const char* message(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // clears it, or it would surface in the next launch
  return cudaGetErrorString(error);
}

struct Limits {
  int multiprocessors = 0;
  int shared = 0;  // bytes a block may ask for
};
inline const char* limits(Limits* found) {
  int id = 0;
  cudaError_t error = cudaGetDevice(&id);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&found->multiprocessors, cudaDevAttrMultiProcessorCount, id);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&found->shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, id);
  return message(error);
}

template <typename... Parameters>
const char* resident_blocks(void (*kernel)(Parameters...), const Shape& shape, int* a_multiprocessor) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shape.shared));
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(a_multiprocessor, kernel, int(shape.threads), shape.shared);
  return message(error);
}

template <typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), const Shape& shape, void* stream, Arguments&&... arguments) {
  // Up to 48 KB need no asking, but a kernel's static shared memory counts as well.
  if (shape.shared > 32 << 10) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shape.shared));
    if (error != cudaSuccess) return message(error);
  }
  cudaLaunchAttribute cooperative{};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(shape.blocks);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cooperative;
  config.numAttrs = shape.cooperative ? 1 : 0;
  return message(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
}

#else

struct Limits {
  int multiprocessors = 0;
  int shared = 0;
};
inline const char* limits(Limits* found) {
  *found = {shim::options().multiprocessors, int(shim::options().shared)};
  return nullptr;
}

template <typename... Parameters>
const char* resident_blocks(void (*)(Parameters...), const Shape&, int* a_multiprocessor) {
  *a_multiprocessor = 1;
  return nullptr;
}

template <typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), const Shape& shape, void*, Arguments&&... arguments) {
  return shim::launch(kernel, {shape.blocks}, {shape.threads}, shape.shared, shape.cooperative,
                      std::forward<Arguments>(arguments)...);
}

#endif

}  // namespace device
}  // namespace fastlm
