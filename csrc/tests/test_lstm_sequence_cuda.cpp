// The LSTM step's and sequences' device code on the CPU, against the formulas in double, without a race. Half precision
// is compared with fastlm.reference in tests/kernels/test_cuda_on_cpu.py.
#include "../cuda/lstm_sequence.cu"
#include "check.h"
#include "cuda_memory.h"

namespace {

// A sequence with its gradients, in device memory with every result poisoned.
struct SequenceCase {
  Memory memory;
  int64_t batch, n, rows;
  std::vector<int64_t> running, starts{0};
  std::vector<float> scratch;
  fastlm::LstmSequenceGradientsCuda g{};
  fastlm::LstmSequenceCuda& a = g.sequence;
  const float *gates_x, *w_hh, *b, *h0, *c0, *dropout, *zoneout_h, *zoneout_c, *grad_output, *grad_h_n, *grad_c_n;
  float *output, *cells, *gates_h, *h_n, *c_n, *grad_sum, *grad_h0, *grad_c0;

  // What is there, by bits: 1 dropout, 2 and 4 zoneout, 8 reverse, 16 a gradient of each output, 32 that of the states.
  SequenceCase(int64_t hidden, std::vector<int64_t> running_, int options)
      : batch(running_[0]), n(hidden), running(std::move(running_)) {
    for (const int64_t r : running) starts.push_back(starts.back() + r);
    rows = starts.back();
    shim::watch("running", running.data(), running.size() * 8);
    shim::watch("starts", starts.data(), starts.size() * 8);
    scratch.assign(fastlm::lstm_sequence_cuda_scratch(batch, n) / 4, NAN);
    std::fill_n(scratch.begin(), 16, 0.0f);
    shim::watch("scratch", scratch.data(), scratch.size() * 4);
    a.batch = batch;
    a.hidden = n;
    a.steps = int64_t(running.size());
    a.reverse = options & 8;
    if (running.back() != batch) {
      a.running = running.data();
      a.starts = starts.data();
    }
    a.scratch = scratch.data();
    a.gates_x = gates_x = memory("gates_x", rows * 4 * n, 2);
    a.w_hh = w_hh = memory("w_hh", 4 * n * n, 0.5);
    a.b_ih = b = memory("b", 4 * n, 1);
    a.h0 = h0 = memory("h0", batch * n, 1);
    a.c0 = c0 = memory("c0", batch * n, 1);
    a.dropout = dropout = options & 1 ? memory("dropout", batch * n, 2) : nullptr;
    a.zoneout_h = zoneout_h = options & 2 ? memory("zoneout_h", rows * n, 1) : nullptr;
    a.zoneout_c = zoneout_c = options & 4 ? memory("zoneout_c", rows * n, 1) : nullptr;
    a.output = output = memory("output", rows * n, 0);
    a.cells = cells = memory("cells", rows * n, 0);
    a.gates_h = gates_h = memory("gates_h", rows * 4 * n, 0);
    a.h_n = h_n = memory("h_n", batch * n, 0);
    a.c_n = c_n = memory("c_n", batch * n, 0);
    float* const columns = memory("w_hh_t", 4 * n * n, 0);
    for (int64_t j = 0; j < 4 * n; ++j)
      for (int64_t k = 0; k < n; ++k) columns[k * 4 * n + j] = w_hh[j * n + k];
    g.w_hh_t = columns;
    g.grad_output = grad_output = options & 16 ? memory("grad_output", rows * n, 1) : nullptr;
    g.grad_h_n = grad_h_n = options & 32 ? memory("grad_h_n", batch * n, 1) : nullptr;
    g.grad_c_n = grad_c_n = options & 32 ? memory("grad_c_n", batch * n, 1) : nullptr;
    g.grad_sum = grad_sum = memory("grad_sum", rows * 4 * n, 0);
    g.grad_h0 = grad_h0 = memory("grad_h0", batch * n, 0);
    g.grad_c0 = grad_c0 = memory("grad_c0", batch * n, 0);
  }
  // Twice each: the scratch has to be fit for the next call.
  std::string run() {
    std::string error;
    for (int again = 0; again < 2 && error.empty(); ++again) {
      if (const char* e = fastlm::lstm_sequence_cuda(a, nullptr)) error = e;
      if (error.empty())
        if (const char* e = fastlm::lstm_sequence_backward_cuda(g, nullptr)) error = e;
    }
    return error;
  }
  // The largest difference from the formulas in double: of results, and of gradients.
  void compare(double* of_results, double* of_gradients) const;
};

// One row of a step: what a unit's gradients are made of.
struct Unit {
  double c_prev, i, f, g, o, squashed;
};

void SequenceCase::compare(double* of_results, double* of_gradients) const {
  double worst = 0;
  const auto see = [&worst](double want, float found) {
    worst = std::isnan(found) ? INFINITY : std::fmax(worst, std::fabs(want - found));
  };
  const auto mask = [this](int64_t place) { return dropout == nullptr ? 1.0 : double(dropout[place]); };
  std::vector<double> h(h0, h0 + batch * n), c(c0, c0 + batch * n);
  std::vector<Unit> units(rows * n);
  for (int64_t step = 0; step < a.steps; ++step) {
    const int64_t t = a.reverse ? a.steps - 1 - step : step;
    for (int64_t row = 0; row < running[t]; ++row) {
      const int64_t line = starts[t] + row;
      std::vector<double> gates(4 * n);
      for (int64_t j = 0; j < 4 * n; ++j) {
        for (int64_t k = 0; k < n; ++k) gates[j] += double(w_hh[j * n + k]) * h[row * n + k] * mask(row * n + k);
        see(gates[j], gates_h[line * 4 * n + j]);
        gates[j] += double(gates_x[line * 4 * n + j]) + b[j];
      }
      for (int64_t u = 0; u < n; ++u) {
        double &old_h = h[row * n + u], &old_c = c[row * n + u];
        Unit& unit = units[line * n + u];
        unit = {old_c, sigmoid(gates[u]), sigmoid(gates[n + u]), std::tanh(gates[2 * n + u]), sigmoid(gates[3 * n + u]),
                0};
        const double new_c = unit.f * old_c + unit.i * unit.g;
        unit.squashed = std::tanh(new_c);
        const double new_h = unit.o * unit.squashed;
        old_h = new_h + share(zoneout_h, line * n + u) * (old_h - new_h);
        old_c = new_c + share(zoneout_c, line * n + u) * (old_c - new_c);
        see(old_h, output[line * n + u]);
        see(old_c, cells[line * n + u]);
      }
    }
  }
  for (int64_t i = 0; i < batch * n; ++i) see(h[i], h_n[i]), see(c[i], c_n[i]);
  *of_results = worst;
  worst = 0;

  std::vector<double> of_h(batch * n), of_c(batch * n);
  for (int64_t i = 0; i < batch * n; ++i) of_h[i] = share(grad_h_n, i), of_c[i] = share(grad_c_n, i);
  for (int64_t step = a.steps - 1; step >= 0; --step) {
    const int64_t t = a.reverse ? a.steps - 1 - step : step;
    for (int64_t row = 0; row < running[t]; ++row) {
      const int64_t line = starts[t] + row;
      std::vector<double> sums(4 * n);
      for (int64_t u = 0; u < n; ++u) {
        const Unit& unit = units[line * n + u];
        double &grad_h = of_h[row * n + u], &grad_c = of_c[row * n + u];
        grad_h += share(grad_output, line * n + u);
        const double keep_h = share(zoneout_h, line * n + u), keep_c = share(zoneout_c, line * n + u);
        const double new_h = grad_h * (1 - keep_h);
        const double new_c = grad_c * (1 - keep_c) + new_h * unit.o * (1 - unit.squashed * unit.squashed);
        sums[u] = new_c * unit.g * unit.i * (1 - unit.i);
        sums[n + u] = new_c * unit.c_prev * unit.f * (1 - unit.f);
        sums[2 * n + u] = new_c * unit.i * (1 - unit.g * unit.g);
        sums[3 * n + u] = new_h * unit.squashed * unit.o * (1 - unit.o);
        grad_h *= keep_h;
        grad_c = grad_c * keep_c + new_c * unit.f;
      }
      for (int64_t j = 0; j < 4 * n; ++j) {
        see(sums[j], grad_sum[line * 4 * n + j]);
        for (int64_t k = 0; k < n; ++k) of_h[row * n + k] += mask(row * n + k) * sums[j] * w_hh[j * n + k];
      }
    }
  }
  for (int64_t i = 0; i < batch * n; ++i) see(of_h[i], grad_h0[i]), see(of_c[i], grad_c0[i]);
  *of_gradients = worst;
}

const std::vector<int64_t> kRunning[] = {{1, 1, 1}, {11, 9, 3, 1}, {3, 3, 2}, {9}};

}  // namespace

FASTLM_TEST_ONCE(lstm_sequence_cuda_and_its_gradients_follow_the_formula) {
  for (int trial = 0; trial < 24; ++trial) {
    const int64_t sizes[] = {37, 8, 50, 3, 1};
    SequenceCase c(sizes[trial % 5], kRunning[trial % 4], trial * 5 + 16 * (trial % 3));
    shim::options().multiprocessors = 1 + trial % 7;
    shim::options().seed = trial % 4;
    // With little shared memory some units' weights stay in global memory.
    if (trial % 2) shim::options().shared = 20000;
    CHECK(told(c.run()).empty());
    double of_results, of_gradients;
    c.compare(&of_results, &of_gradients);
    CHECK(of_results < 3e-5);
    CHECK(of_gradients < 1e-4);
    // The test of the test.
    c.grad_sum[(trial * 7) % (c.rows * 4 * c.n)] += 0.01f;
    c.compare(&of_results, &of_gradients);
    CHECK(of_gradients > 5e-3);
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

FASTLM_TEST_ONCE(lstm_sequence_cuda_kernels_need_every_barrier_and_fence) {
  if (!shim::logs_accesses()) return;
  const auto run = [](shim::Site without) {
    SequenceCase sequence(37, kRunning[1], 63);
    shim::options().without = without;
    return sequence.run();
  };
  CHECK(run({}) == "");
  int planted = 0;
  CHECK(needless({"lstm_sequence", "device.cuh"}, run, &planted).empty());
  CHECK(planted >= 7);
}
