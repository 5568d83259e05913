// The recurrent cells' device code on the CPU, without a race: the GRU's and its gradients against the formula in double.
// The LSTM's, and half precision, are compared with fastlm.reference in tests/kernels/test_cuda_on_cpu.py.
#include "../cuda/cells.cu"
#include "check.h"
#include "cuda_memory.h"

namespace {

// With every option at once: each exchange through shared memory is on the way.
struct LstmCase {
  Memory memory;
  fastlm::LstmCellGradientsCuda g{};

  explicit LstmCase(int64_t n) {
    const int64_t batch = 2;
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
  }
  std::string run() const {
    const char* error = fastlm::lstm_cell_cuda(g.cell, nullptr);
    if (error == nullptr) error = fastlm::lstm_cell_backward_cuda(g, nullptr);
    return error == nullptr ? "" : error;
  }
};

// Two rows of a GRU cell. What there is, by bits: 1 and 2 gains, 4 zoneout, 8 biases.
struct GruCase {
  Memory memory;
  static constexpr int64_t batch = 2;
  const int64_t n;
  fastlm::GruCellGradientsCuda g{};
  fastlm::GruCellCuda& a = g.cell;
  const float *gates_x, *gates_h, *b_ih, *b_hh, *ln_ih, *ln_hh, *h_prev, *zoneout_h, *grad_h;
  float *h, *grad_sum_x, *grad_sum_h, *grad_gates_x, *grad_gates_h, *grad_h_prev;

  GruCase(int64_t hidden, int options) : n(hidden) {
    const auto given = [&](int bit, const char* name) { return options & bit ? memory(name, 3 * n, 1) : nullptr; };
    a.batch = batch;
    a.hidden = n;
    a.gates_x = gates_x = memory("gates_x", batch * 3 * n, 1);
    a.gates_h = gates_h = memory("gates_h", batch * 3 * n, 1);
    a.ln_ih = ln_ih = given(1, "ln_ih");
    a.ln_hh = ln_hh = given(2, "ln_hh");
    a.zoneout_h = zoneout_h = options & 4 ? memory("zoneout_h", batch * n, 1) : nullptr;
    a.b_ih = b_ih = given(8, "b_ih");
    a.b_hh = b_hh = given(8, "b_hh");
    a.h_prev = h_prev = memory("h_prev", batch * n, 1);
    a.h = h = memory("h", batch * n, 0);
    g.grad_h = grad_h = memory("grad_h", batch * n, 1);
    g.grad_sum_x = grad_sum_x = memory("grad_sum_x", batch * 3 * n, 0);
    g.grad_sum_h = grad_sum_h = memory("grad_sum_h", batch * 3 * n, 0);
    grad_gates_x = ln_ih ? memory("grad_gates_x", batch * 3 * n, 0) : grad_sum_x;
    grad_gates_h = ln_hh ? memory("grad_gates_h", batch * 3 * n, 0) : grad_sum_h;
    if (ln_ih) g.grad_gates_x = grad_gates_x;
    if (ln_hh) g.grad_gates_h = grad_gates_h;
    g.grad_h_prev = grad_h_prev = memory("grad_h_prev", batch * n, 0);
  }
  std::string run() const {
    const char* error = fastlm::gru_cell_cuda(a, nullptr);
    if (error == nullptr) error = fastlm::gru_cell_backward_cuda(g, nullptr);
    return error == nullptr ? "" : error;
  }

  // A row's new h. `in`: its two products, a bias for each of the two [3n each], and the h before [n].
  std::vector<double> formula(int64_t row, const std::vector<double>& in) const {
    const auto normed = [&](const double* x, const float* gain, const double* bias) {
      double mean = 0, variance = 0;
      for (int64_t j = 0; j < 3 * n; ++j) mean += x[j] / double(3 * n);
      for (int64_t j = 0; j < 3 * n; ++j) variance += (x[j] - mean) * (x[j] - mean) / double(3 * n);
      std::vector<double> found(x, x + 3 * n);
      for (int64_t j = 0; j < 3 * n; ++j)
        found[j] = (gain ? (x[j] - mean) / std::sqrt(variance + 1e-5) * gain[j] : x[j]) + bias[j];
      return found;
    };
    const std::vector<double> x = normed(&in[0], ln_ih, &in[6 * n]), y = normed(&in[3 * n], ln_hh, &in[9 * n]);
    std::vector<double> found(n);
    for (int64_t u = 0; u < n; ++u) {
      const double old = in[12 * n + u], r = sigmoid(x[u] + y[u]), z = sigmoid(x[n + u] + y[n + u]);
      const double fresh = (1 - z) * std::tanh(x[2 * n + u] + r * y[2 * n + u]) + z * old;
      found[u] = fresh + share(zoneout_h, row * n + u) * (old - fresh);
    }
    return found;
  }
  // The largest difference from the formula, and from its gradients, which are made of differences.
  void compare(double* of_results, double* of_gradients) const {
    *of_results = *of_gradients = 0;
    const auto see = [](double* worst, double want, float found) {
      *worst = std::isnan(found) ? INFINITY : std::fmax(*worst, std::fabs(want - found) / std::fmax(1, std::fabs(want)));
    };
    for (int64_t row = 0; row < batch; ++row) {
      std::vector<double> in(13 * n);
      const float* const from[] = {gates_x + row * 3 * n, gates_h + row * 3 * n, b_ih, b_hh};
      float* const grads[] = {grad_gates_x, grad_gates_h, grad_sum_x, grad_sum_h};
      for (int64_t i = 0; i < 12 * n; ++i) in[i] = share(from[i / (3 * n)], i % (3 * n));
      for (int64_t u = 0; u < n; ++u) in[12 * n + u] = h_prev[row * n + u];
      const auto loss = [&] {
        const std::vector<double> found = formula(row, in);
        double sum = 0;
        for (int64_t u = 0; u < n; ++u) sum += found[u] * grad_h[row * n + u];
        return sum;
      };
      const std::vector<double> want = formula(row, in);
      for (int64_t u = 0; u < n; ++u) see(of_results, want[u], h[row * n + u]);
      for (int64_t i = 0; i < 13 * n; i += n > 50 ? 25 : 1) {
        const double at = in[i], step = 1e-5;
        in[i] = at + step;
        const double above = loss();
        in[i] = at - step;
        const double slope = (above - loss()) / (2 * step);
        in[i] = at;
        see(of_gradients, slope,
            i < 12 * n ? grads[i / (3 * n)][row * 3 * n + i % (3 * n)] : grad_h_prev[row * n + i - 12 * n]);
      }
    }
  }
};

}  // namespace

FASTLM_TEST_ONCE(lstm_cell_cuda_has_no_race) {
  for (const int64_t n : {3, 300}) {
    LstmCase c(n);
    CHECK(told(c.run()).empty());
    for (const std::vector<float>& values : c.memory.kept)
      for (const float v : values) CHECK(std::isfinite(v));
  }
}

FASTLM_TEST_ONCE(gru_cell_cuda_and_its_gradients_follow_the_formula) {
  for (int options = 0; options < 16; ++options) {
    const int64_t sizes[] = {5, 32, 37, 300};
    GruCase c(sizes[options * 7 / 4 % 4], options);
    shim::options().seed = options % 3;
    CHECK(told(c.run()).empty());
    double of_results, of_gradients;
    c.compare(&of_results, &of_gradients);
    CHECK(of_results < 3e-6);
    CHECK(of_gradients < 1e-5);
    // The test of the test.
    c.grad_gates_h[0] += 0.001f;
    c.compare(&of_results, &of_gradients);
    CHECK(of_gradients > 5e-4);
  }
}

FASTLM_TEST_ONCE(cells_cuda_work_in_place) {
  GruCase apart(37, 15), within(37, 15);
  within.a.h = const_cast<float*>(within.h_prev);
  CHECK(told(fastlm::gru_cell_cuda(apart.a, nullptr)).empty() && told(fastlm::gru_cell_cuda(within.a, nullptr)).empty());
  CHECK(std::memcmp(apart.h, within.h_prev, sizeof(float) * apart.n * GruCase::batch) == 0);
}

namespace {

template <typename Case>
std::string run_without(shim::Site site, Case&& cell) {
  shim::options().without = site;
  return cell.run();
}

}  // namespace

FASTLM_TEST_ONCE(cells_cuda_kernels_need_every_barrier) {
  if (!shim::logs_accesses()) return;
  const auto lstm = [](shim::Site without) { return run_without(without, LstmCase(300)); };
  const auto gru = [](shim::Site without) { return run_without(without, GruCase(300, 15)); };
  for (const std::function<std::string(shim::Site)>& run : {std::function<std::string(shim::Site)>(lstm), {gru}}) {
    CHECK(run({}) == "");
    int planted = 0;
    CHECK(needless({"cell.cuh"}, run, &planted).empty());
    CHECK(planted >= 3);
  }
}
