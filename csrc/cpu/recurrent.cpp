#include "fastlm/recurrent.h"

#include "recurrence.h"
#include "simd_math.h"

namespace fastlm {
namespace FASTLM_ISA {

namespace {

// A cell: how many units a panel has and how many vectors for each k of a weight, the products of a panel, and the step
// from a panel's sums and h to the next h, for `n` <= kUnits units of a row.
struct Gru {
  static constexpr int64_t kGates = 3, kUnits = kLanes, kVectors = 3;

  template <typename W>
  static void input_product(const Rows& x, int64_t rows, const W* panel, int64_t k, float* sums) {
    panel_product<3, 2>(x, rows, panel, k, sums, kPanel);
  }
  // n's own product goes into the fourth vector: it is multiplied by r before it is added to x's.
  template <typename W>
  static void hidden_product(const Rows& h, int64_t rows, const W* panel, int64_t k, float* sums) {
    panel_product<3, 3>(h, rows, panel, k, sums, kPanel);
  }
  static void update(const float* sums, const float* h, float* next, int64_t count) {
    const int n = lanes_left(count, 0);
    const vf r = sigmoid(load(sums)), z = sigmoid(load(sums + kLanes));
    const vf candidate = tanh(load(sums + 2 * kLanes) + r * load(sums + 3 * kLanes));
    store_lanes(next, candidate + z * (load_lanes(h, n) - candidate), n);
  }
};

template <bool Relu>
struct Plain {
  static constexpr int64_t kGates = 1, kUnits = kPanel, kVectors = 4;

  template <typename W>
  static void input_product(const Rows& x, int64_t rows, const W* panel, int64_t k, float* sums) {
    panel_product(x, rows, panel, k, sums, kPanel);
  }
  template <typename W>
  static void hidden_product(const Rows& h, int64_t rows, const W* panel, int64_t k, float* sums) {
    panel_product(h, rows, panel, k, sums, kPanel);
  }
  static void update(const float* sums, const float*, float* next, int64_t count) {
    for (int64_t v = 0; v < kPanel && v < count; v += kLanes) {
      const vf sum = load(sums + v);
      // As torch's, NaN stays NaN.
      store_lanes(next + v, Relu ? select(sum < vf{}, vf{}, sum) : tanh(sum), lanes_left(count, v));
    }
  }
};

template <typename Cell, typename W>
class Layer {
 public:
  explicit Layer(const RecurrentForward& args) : a(args) {
    total_ = total_rows(a.batch_sizes, a.steps);
    panels_ = panels_for(a.hidden, Cell::kUnits);
    gate_rows_ = most_rows(total_, a.batch_sizes[0]);
  }

  // Rows whose sums are held at a time.
  static int64_t most_rows(int64_t total, int64_t batch) {
    return total < chunk_rows(batch) ? total : chunk_rows(batch);
  }

  int threads() const {
    return useful_threads(a.threads, total_ / a.steps * Cell::kGates * a.hidden * (a.inputs + a.hidden), panels_);
  }

  void run(int thread, int threads, Barrier& barrier) {
    const Range own = share(panels_, thread, threads);
    if (a.steps == 1) {  // both products panel by panel: from one call to the next most often with the same weights
      static thread_local bool back = false;
      const Walk step(a.batch_sizes, a.steps, total_, a.reverse);
      return sweep(own, back, [&](int64_t u) {
        input_panel(u, 0, total_);
        hidden_panel(step, u, 0);
      });
    }
    bool back = false;
    const auto inputs = [&](int64_t low, int64_t high) {
      for (int64_t u = own.begin; u < own.end; ++u) input_panel(u, low, high);
    };
    walk_in_chunks(a.batch_sizes, a.steps, total_, a.reverse, inputs, [&](const Walk& step, int64_t low) {
      sweep(own, back, [&](int64_t u) { hidden_panel(step, u, low); });
      barrier.wait();
    });
  }

 private:
  float* sums(int64_t u) const { return a.scratch + u * gate_rows_ * kPanel; }

  void input_panel(int64_t u, int64_t low, int64_t high) {
    fill_bias(sums(u), a.bias + u * kPanel, high - low);
    const W* const panel = static_cast<const W*>(a.w_ih) + u * panel_size<W>(a.inputs, Cell::kVectors * kLanes);
    const Rows input = {a.input + low * a.inputs, nullptr, high - low, a.inputs};
    Cell::input_product(input, high - low, panel, a.inputs, sums(u));
  }

  void hidden_panel(const Walk& step, int64_t u, int64_t low) {
    const Rows h = state_before(step, a.output, a.h0, a.hidden);
    float* at_step = sums(u) + (step.begin - low) * kPanel;
    const W* const panel = static_cast<const W*>(a.w_hh) + u * panel_size<W>(a.hidden, Cell::kVectors * kLanes);
    Cell::hidden_product(h, step.rows(), panel, a.hidden, at_step);
    const int64_t at = u * Cell::kUnits, left = a.hidden - at;
    const int64_t units = left < Cell::kUnits ? left : Cell::kUnits;
    for (int64_t i = 0; i < step.rows(); ++i) {
      float* next = a.output + (step.begin + i) * a.hidden + at;
      Cell::update(at_step + i * kPanel, h[i] + at, next, units);
      if (i >= step.rows_after()) std::memcpy(a.h_n + i * a.hidden + at, next, units * sizeof(float));
    }
  }

  const RecurrentForward& a;
  int64_t total_, panels_, gate_rows_;
};

template <typename Cell>
void run_layer(const RecurrentForward& args) {
  const auto run = [](auto&& layer) {
    parallel(layer.threads(), [&](int thread, int threads, Barrier& barrier) { layer.run(thread, threads, barrier); });
  };
  args.bfloat ? run(Layer<Cell, uint16_t>(args)) : run(Layer<Cell, float>(args));
}

}  // namespace

int64_t recurrent_forward_scratch(RecurrentCell cell, int64_t rows, int64_t batch, int64_t hidden) {
  const int64_t units = cell == RecurrentCell::gru ? Gru::kUnits : Plain<false>::kUnits;
  return panels_for(hidden, units) * Layer<Gru, float>::most_rows(rows, batch) * kPanel;
}

void recurrent_forward(const RecurrentForward& args) {
  switch (args.cell) {
    case RecurrentCell::gru: return run_layer<Gru>(args);
    case RecurrentCell::tanh: return run_layer<Plain<false>>(args);
    case RecurrentCell::relu: return run_layer<Plain<true>>(args);
  }
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
