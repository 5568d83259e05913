// CUDA: the pointwise half of an LSTM cell. The two matrix products before it belong to cuBLAS.
#pragma once

#include <cstdint>

namespace fastlm {

struct LstmCellCuda {
  const float* gates;   // [batch, 4 * hidden] x W_ih^T + h W_hh^T, gate order i, f, g, o; device memory
  const float* bias;    // [4 * hidden] added to the gates, or null
  const float* c_prev;  // [batch, hidden]
  float* h;             // [batch, hidden] out; may not alias an input
  float* c;             // [batch, hidden] out; may be c_prev
  int64_t batch;
  int64_t hidden;
};

// Launches on `stream` (a cudaStream_t; 0 is the default stream) of the current device and returns at once. Returns
// null, or the CUDA runtime's message where the launch failed.
const char* lstm_cell_cuda(const LstmCellCuda& args, void* stream);

// Devices the CUDA runtime can use; 0 where there is no driver.
int cuda_device_count();

}  // namespace fastlm
