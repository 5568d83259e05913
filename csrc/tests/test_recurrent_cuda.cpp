// The CUDA recurrent kernels' device code on the CPU, against the formulas in double, without a race. Gradients, half
// precision and the rest of the options are compared with fastlm.reference in tests/kernels/test_cuda_on_cpu.py.
#include <cmath>
#include <string>
#include <vector>

#include "../cuda/recurrent.cu"
#include "check.h"

namespace {

struct Random {
  uint32_t state = 3;
  float operator()(float scale) {
    state = state * 1664525u + 1013904223u;
    return (float(state >> 8) / (1 << 23) - 1) * scale;
  }
};

// Device memory: known to the shim by name.
struct Memory {
  std::vector<std::vector<float>> kept;
  Random random;
  Memory() { kept.reserve(64); }
  ~Memory() {
    shim::forget_all();
    shim::options() = shim::Options();
  }
  float* operator()(const char* name, int64_t n, float scale) {
    kept.emplace_back(n);
    for (float& x : kept.back()) x = scale == 0 ? NAN : random(scale);
    shim::watch(name, kept.back().data(), n * 4);
    return kept.back().data();
  }
};

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
double share(const float* p, int64_t i) { return p == nullptr ? 0 : p[i]; }

std::string told(const char* error) {
  if (error != nullptr) std::puts(error);
  return error == nullptr ? "" : error;
}

}  // namespace

FASTLM_TEST_ONCE(lstm_sequence_cuda_follows_the_formula) {
  for (int trial = 0; trial < 24; ++trial) {
    Memory memory;
    shim::options().multiprocessors = 1 + trial % 5;
    shim::options().seed = trial % 4;
    const int64_t hidden = trial % 3 == 0 ? 37 : trial % 3 == 1 ? 8 : 50, n = hidden;
    // With little shared memory some units' weights stay in global memory.
    if (trial % 2) shim::options().shared = 20000;
    std::vector<int64_t> running = trial % 4 == 0   ? std::vector<int64_t>{1, 1, 1}
                                   : trial % 4 == 1 ? std::vector<int64_t>{11, 9, 3, 1}
                                                    : std::vector<int64_t>{3, 3, 2};
    std::vector<int64_t> starts{0};
    for (const int64_t r : running) starts.push_back(starts.back() + r);
    const int64_t batch = running[0], rows = starts.back();
    fastlm::LstmSequenceCuda a{};
    a.storage = fastlm::Storage::float32;
    a.batch = batch;
    a.hidden = n;
    a.steps = int64_t(running.size());
    a.reverse = trial & 8;
    a.running = running.data();
    a.starts = starts.data();
    shim::watch("running", running.data(), running.size() * 8);
    shim::watch("starts", starts.data(), starts.size() * 8);
    const float* const gates_x = memory("gates_x", rows * 4 * n, 2);
    const float* const w_hh = memory("w_hh", 4 * n * n, 0.5);
    const float* const h0 = memory("h0", batch * n, 1);
    const float* const c0 = memory("c0", batch * n, 1);
    const float* const b = memory("b", 4 * n, 1);
    const float* const dropout = trial & 1 ? memory("dropout", batch * n, 2) : nullptr;
    const float* const zoneout_h = trial & 2 ? memory("zoneout_h", rows * n, 1) : nullptr;
    const float* const zoneout_c = trial & 4 ? memory("zoneout_c", rows * n, 1) : nullptr;
    a.gates_x = gates_x;
    a.w_hh = w_hh;
    a.h0 = h0;
    a.c0 = c0;
    a.b_ih = b;
    a.dropout = dropout;
    a.zoneout_h = zoneout_h;
    a.zoneout_c = zoneout_c;
    float* const output = memory("output", rows * n, 0);
    float* const cells = memory("cells", rows * n, 0);
    float* const h_n = memory("h_n", batch * n, 0);
    float* const c_n = memory("c_n", batch * n, 0);
    a.output = output;
    a.cells = cells;
    a.h_n = h_n;
    a.c_n = c_n;
    std::vector<float> scratch(fastlm::lstm_sequence_cuda_scratch(batch, n) / 4, NAN);
    std::fill_n(scratch.begin(), 16, 0.0f);
    shim::watch("scratch", scratch.data(), scratch.size() * 4);
    a.scratch = scratch.data();
    for (int again = 0; again < 2; ++again) CHECK(told(fastlm::lstm_sequence_cuda(a, nullptr)).empty());

    std::vector<double> h(h0, h0 + batch * n), c(c0, c0 + batch * n);
    double worst = 0;
    for (int64_t step = 0; step < a.steps; ++step) {
      const int64_t t = a.reverse ? a.steps - 1 - step : step;
      for (int64_t row = 0; row < running[t]; ++row) {
        const int64_t line = starts[t] + row;
        std::vector<double> gates(4 * n);
        for (int64_t j = 0; j < 4 * n; ++j) {
          gates[j] = double(gates_x[line * 4 * n + j]) + b[j];
          for (int64_t k = 0; k < n; ++k)
            gates[j] += double(w_hh[j * n + k]) * h[row * n + k] * (dropout ? dropout[row * n + k] : 1.0f);
        }
        for (int64_t u = 0; u < n; ++u) {
          double &old_h = h[row * n + u], &old_c = c[row * n + u];
          const double new_c = sigmoid(gates[n + u]) * old_c + sigmoid(gates[u]) * std::tanh(gates[2 * n + u]);
          const double new_h = sigmoid(gates[3 * n + u]) * std::tanh(new_c);
          old_h = new_h + share(zoneout_h, line * n + u) * (old_h - new_h);
          old_c = new_c + share(zoneout_c, line * n + u) * (old_c - new_c);
          worst = std::fmax(worst, std::fabs(old_h - output[line * n + u]));
          worst = std::fmax(worst, std::fabs(old_c - cells[line * n + u]));
          if (std::isnan(output[line * n + u])) worst = 1;
        }
      }
    }
    for (int64_t i = 0; i < batch * n; ++i) worst = std::fmax(worst, std::fmax(std::fabs(h[i] - h_n[i]), std::fabs(c[i] - c_n[i])));
    CHECK(worst < 3e-5);
  }
}

FASTLM_TEST_ONCE(lstm_step_and_cell_cuda_agree_with_the_formula) {
  for (const int64_t batch : {1, 2, 7})
    for (const int64_t n : {5, 32, 36}) {
      Memory memory;
      shim::options().seed = n;
      const int64_t inputs = n == 32 ? 48 : 9;
      const float* const x = memory("x", batch * inputs, 1);
      const float* const h = memory("h", batch * n, 1);
      const float* const c = memory("c", batch * n, 1);
      const float* const w_ih = memory("w_ih", 4 * n * inputs, 1);
      const float* const w_hh = memory("w_hh", 4 * n * n, 1);
      const float* const b = memory("b", 4 * n, 1);
      float *const new_h = memory("new_h", batch * n, 0), *const new_c = memory("new_c", batch * n, 0);
      float *const cell_h = memory("cell_h", batch * n, 0), *const cell_c = memory("cell_c", batch * n, 0);
      const fastlm::LstmStepCuda step{fastlm::Storage::float32, batch, inputs, n,    x,     h,    c,
                                      w_ih,                     w_hh,  b,      nullptr, new_h, new_c};
      CHECK(told(fastlm::lstm_step_cuda(step, nullptr)).empty());
      float* const gates = memory("gates", batch * 4 * n, 0);
      double worst = 0;
      for (int64_t row = 0; row < batch; ++row) {
        std::vector<double> sums(4 * n);
        for (int64_t j = 0; j < 4 * n; ++j) {
          for (int64_t k = 0; k < inputs; ++k) sums[j] += double(w_ih[j * inputs + k]) * x[row * inputs + k];
          for (int64_t k = 0; k < n; ++k) sums[j] += double(w_hh[j * n + k]) * h[row * n + k];
          gates[row * 4 * n + j] = float(sums[j]);
          sums[j] += b[j];
        }
        for (int64_t u = 0; u < n; ++u) {
          const double want_c = sigmoid(sums[n + u]) * c[row * n + u] + sigmoid(sums[u]) * std::tanh(sums[2 * n + u]);
          const double want_h = sigmoid(sums[3 * n + u]) * std::tanh(want_c);
          const bool fine = std::fabs(new_h[row * n + u] - want_h) < 3e-6 && std::fabs(new_c[row * n + u] - want_c) < 3e-6;
          if (!fine) worst = 1;
        }
      }
      CHECK(worst == 0);
      fastlm::LstmCellCuda cell{};
      cell.batch = batch;
      cell.hidden = n;
      cell.gates_x = gates;
      cell.b_hh = b;
      cell.c_prev = c;
      cell.h = cell_h;
      cell.c = cell_c;
      CHECK(told(fastlm::lstm_cell_cuda(cell, nullptr)).empty());
      for (int64_t i = 0; i < batch * n; ++i) CHECK(std::fabs(cell_h[i] - new_h[i]) < 3e-6 && std::fabs(cell_c[i] - new_c[i]) < 3e-6);
    }
}

// Every option at once, for the sake of races and bounds: each exchange through shared memory is on the way.
FASTLM_TEST_ONCE(cells_cuda_have_no_race) {
  for (const int64_t n : {3, 300}) {
    Memory memory;
    const int64_t batch = 2;
    fastlm::LstmCellGradientsCuda g{};
    fastlm::LstmCellCuda& a = g.cell;
    a.batch = batch;
    a.hidden = n;
    a.gates_x = memory("gates_x", batch * 4 * n, 1);
    a.gates_h = memory("gates_h", batch * 4 * n, 1);
    a.b_ih = memory("b_ih", 4 * n, 1);
    a.b_hh = memory("b_hh", 4 * n, 1);
    a.ln_ih = memory("ln_ih", 4 * n, 1);
    a.ln_hh = memory("ln_hh", 4 * n, 1);
    a.ln_c = memory("ln_c", n, 1);
    a.ln_c_bias = memory("ln_c_bias", n, 1);
    a.h_prev = memory("h_prev", batch * n, 1);
    a.c_prev = memory("c_prev", batch * n, 1);
    a.zoneout_h = memory("zoneout_h", batch * n, 1);
    a.zoneout_c = memory("zoneout_c", batch * n, 1);
    a.h = memory("h", batch * n, 0);
    a.c = memory("c", batch * n, 0);
    g.grad_h = memory("grad_h", batch * n, 1);
    g.grad_c = memory("grad_c", batch * n, 1);
    g.grad_sum = memory("grad_sum", batch * 4 * n, 0);
    g.grad_gates_x = memory("grad_gates_x", batch * 4 * n, 0);
    g.grad_gates_h = memory("grad_gates_h", batch * 4 * n, 0);
    g.grad_ln_c = memory("grad_ln_c", batch * n, 0);
    g.grad_ln_c_bias = memory("grad_ln_c_bias", batch * n, 0);
    g.grad_h_prev = memory("grad_h_prev", batch * n, 0);
    g.grad_c_prev = memory("grad_c_prev", batch * n, 0);
    CHECK(told(fastlm::lstm_cell_cuda(a, nullptr)).empty());
    CHECK(told(fastlm::lstm_cell_backward_cuda(g, nullptr)).empty());
    for (const std::vector<float>& values : memory.kept)
      for (const float v : values) CHECK(std::isfinite(v));
  }
}
