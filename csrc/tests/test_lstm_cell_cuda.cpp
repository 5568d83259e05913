// The CUDA cell's device code, run on the CPU against the formula in double.
#include <cmath>
#include <vector>

#include "../cuda/lstm_cell.cuh"
#include "check.h"

FASTLM_TEST(lstm_cell_cuda_device_code) {
  const int64_t batch = 3, hidden = 5;
  std::vector<float> gates(batch * 4 * hidden), bias(4 * hidden), c_prev(batch * hidden);
  for (size_t k = 0; k < gates.size(); ++k) gates[k] = std::sin(1.7f * k) * 3.0f;
  for (size_t k = 0; k < bias.size(); ++k) bias[k] = std::cos(0.9f * k);
  for (size_t k = 0; k < c_prev.size(); ++k) c_prev[k] = std::sin(0.3f * k);
  std::vector<float> h(batch * hidden, NAN), c(batch * hidden, NAN);
  const fastlm::LstmCellCuda args = {gates.data(), bias.data(), c_prev.data(), h.data(), c.data(), batch, hidden};
  for (int64_t element = 0; element < batch * hidden; ++element) fastlm::device::lstm_cell_element(args, element);
  const auto sigmoid = [](double x) { return 1.0 / (1.0 + std::exp(-x)); };
  for (int64_t row = 0; row < batch; ++row)
    for (int64_t unit = 0; unit < hidden; ++unit) {
      double gate[4];
      for (int64_t k = 0; k < 4; ++k) gate[k] = double(gates[(row * 4 + k) * hidden + unit]) + bias[k * hidden + unit];
      const double want = sigmoid(gate[1]) * c_prev[row * hidden + unit] + sigmoid(gate[0]) * std::tanh(gate[2]);
      CHECK(std::abs(c[row * hidden + unit] - want) < 1e-6);
      CHECK(std::abs(h[row * hidden + unit] - sigmoid(gate[3]) * std::tanh(want)) < 1e-6);
    }
}
