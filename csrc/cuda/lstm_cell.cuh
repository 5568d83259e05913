// Device code of the LSTM cell's pointwise half. No launch syntax here: the same source also runs on the CPU, in
// csrc/tests/test_lstm_cell_cuda.cpp, one element after the other.
#pragma once

#include <cmath>
#include <cstdint>

#include "fastlm/lstm_cell_cuda.h"

#if defined(__CUDACC__)
#define FASTLM_DEVICE __host__ __device__ inline
#else
#define FASTLM_DEVICE inline
#endif

namespace fastlm {
namespace device {

FASTLM_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// c = sigmoid(f) c_prev + sigmoid(i) tanh(g); h = sigmoid(o) tanh(c), for one element of [batch, hidden].
FASTLM_DEVICE void lstm_cell_element(const LstmCellCuda& args, int64_t element) {
  const int64_t row = element / args.hidden, unit = element % args.hidden;
  const float* gates = args.gates + row * 4 * args.hidden + unit;
  float gate[4];
  for (int k = 0; k < 4; ++k) {
    gate[k] = gates[k * args.hidden];
    if (args.bias != nullptr) gate[k] += args.bias[k * args.hidden + unit];
  }
  const float c = sigmoid(gate[1]) * args.c_prev[element] + sigmoid(gate[0]) * tanhf(gate[2]);
  args.c[element] = c;
  args.h[element] = sigmoid(gate[3]) * tanhf(c);
}

}  // namespace device
}  // namespace fastlm
