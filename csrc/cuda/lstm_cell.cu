// Launcher of the LSTM cell's pointwise half.
#include "lstm_cell.cuh"

namespace fastlm {
namespace {

constexpr int kThreads = 256;

// A grid-stride loop over elements: neighbouring threads touch neighbouring units, so every access is coalesced.
__global__ void __launch_bounds__(kThreads) lstm_cell_kernel(LstmCellCuda args) {
  const int64_t elements = args.batch * args.hidden;
  for (int64_t element = blockIdx.x * int64_t{kThreads} + threadIdx.x; element < elements;
       element += int64_t{gridDim.x} * kThreads)
    device::lstm_cell_element(args, element);
}

}  // namespace

const char* lstm_cell_cuda(const LstmCellCuda& args, void* stream) {
  const int64_t blocks = (args.batch * args.hidden + kThreads - 1) / kThreads;
  if (blocks == 0) return nullptr;
  lstm_cell_kernel<<<static_cast<unsigned>(blocks < 65535 ? blocks : 65535), kThreads, 0,
                     static_cast<cudaStream_t>(stream)>>>(args);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

int cuda_device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();  // clears the error, which would otherwise surface in the next launch
  return 0;
}

}  // namespace fastlm
