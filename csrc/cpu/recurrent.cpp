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
  // Leaves r, z and n in `sums`.
  static void update(float* sums, const float* h, float* next, int64_t count) {
    const int n = lanes_left(count, 0);
    const vf r = sigmoid(load(sums)), z = sigmoid(load(sums + kLanes));
    const vf candidate = tanh(load(sums + 2 * kLanes) + r * load(sums + 3 * kLanes));
    store(sums, r);
    store(sums + kLanes, z);
    store(sums + 2 * kLanes, candidate);
    store_lanes(next, candidate + z * (load_lanes(h, n) - candidate), n);
  }
  // The derivative of update() for `n` <= L units, grad being that of the next h: gives what of it goes straight to h.
  // `saved` is the sums after update(), grad_x and grad_h the units' places in the gates' gradients, `width` apart.
  FASTLM_INLINE vf differentiate(vf grad, const float* saved, vf, vf h, float* grad_x, float* grad_h, int n,
                                 int64_t width) {
    const vf r = load(saved), z = load(saved + kLanes), candidate = load(saved + 2 * kLanes);
    const vf of_n = grad * (1.0f - z) * (1.0f - candidate * candidate);
    const vf of_r = of_n * load(saved + 3 * kLanes) * r * (1.0f - r), of_z = grad * (h - candidate) * z * (1.0f - z);
    store_lanes(grad_x, of_r, n);
    store_lanes(grad_h, of_r, n);
    store_lanes(grad_x + width, of_z, n);
    store_lanes(grad_h + width, of_z, n);
    store_lanes(grad_x + 2 * width, of_n, n);
    store_lanes(grad_h + 2 * width, of_n * r, n);
    return grad * z;
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
  static void update(float* sums, const float*, float* next, int64_t count) {
    for (int64_t v = 0; v < kPanel && v < count; v += kLanes) {
      const vf sum = load(sums + v);
      // As torch's, NaN stays NaN.
      store_lanes(next + v, Relu ? select(sum < vf{}, vf{}, sum) : tanh(sum), lanes_left(count, v));
    }
  }
  FASTLM_INLINE vf differentiate(vf grad, const float*, vf next, vf, float*, float* grad_h, int n, int64_t) {
    store_lanes(grad_h, Relu ? select(next <= vf{}, vf{}, grad) : grad * (1.0f - next * next), n);
    return vf{};
  }
};

template <typename Cell, typename W>
class Layer {
 public:
  explicit Layer(const RecurrentForward& args) : a(args) {
    total_ = total_rows(a.batch_sizes, a.steps);
    panels_ = panels_for(a.hidden, Cell::kUnits);
    save_ = a.gates != nullptr;
    gate_rows_ = save_ ? total_ : most_rows(total_, a.batch_sizes[0]);
    sums_ = save_ ? a.gates : a.scratch;
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
  // Of the row `row`, in the chunk that begins with the row `low`.
  float* sums(int64_t u, int64_t row, int64_t low) const {
    return sums_ + (u * gate_rows_ + row - (save_ ? 0 : low)) * kPanel;
  }

  void input_panel(int64_t u, int64_t low, int64_t high) {
    fill_bias(sums(u, low, low), a.bias + u * kPanel, high - low);
    const W* const panel = static_cast<const W*>(a.w_ih) + u * panel_size<W>(a.inputs, Cell::kVectors * kLanes);
    const Rows input = {a.input + low * a.inputs, nullptr, high - low, a.inputs};
    Cell::input_product(input, high - low, panel, a.inputs, sums(u, low, low));
  }

  void hidden_panel(const Walk& step, int64_t u, int64_t low) {
    const Rows h = state_before(step, a.output, a.h0, a.hidden);
    float* at_step = sums(u, step.begin, low);
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
  float* sums_;  // [panels][gate_rows][4][L]
  bool save_;
};

// As the LSTM's without a projection: a thread's outputs and hidden units are the same, so what it carries is its own.
template <typename Cell>
class Backward {
 public:
  explicit Backward(const RecurrentBackward& args) : a(args), stride_(padded(a.hidden)) {
    total_ = total_rows(a.batch_sizes, a.steps);
  }

  int threads() const {
    return useful_threads(a.threads, total_ / a.steps * Cell::kGates * a.hidden * a.hidden, stride_ / kPanel);
  }

  void run(int thread, int threads, Barrier& barrier) {
    const Range own = share(stride_ / kPanel, thread, threads);
    const int64_t batch = a.batch_sizes[0], k = Cell::kGates * a.hidden;
    bool back = false;
    copy_columns(own, batch, stride_, nullptr, stride_, a.scratch, stride_);
    copy_columns(own, batch, a.hidden, a.grad_h_n, a.hidden, a.scratch, stride_);
    for (Walk step(a.batch_sizes, a.steps, total_, !a.reverse); !step.done(); step.advance()) {
      cells(step, own);
      barrier.wait();
      sweep(own, back, [&](int64_t p) {
        panel_product({a.grad_h + step.begin * k, nullptr, step.rows(), k}, step.rows(), a.w_hh + p * k * kPanel, k,
                      a.scratch + p * kPanel, stride_);
      });
    }
    copy_columns(own, batch, a.hidden, a.scratch, stride_, a.grad_h0, a.hidden);
  }

 private:
  // From the gradient of h, carried and the output's own, to those of the gates; what goes straight to the h before
  // stays in `scratch`, to which the product with W_hh is added.
  void cells(const Walk& step, Range own) {
    const Rows before = backward_state(step, a.output, a.h0, a.hidden);
    for (int64_t i = 0; i < step.rows(); ++i) {
      for (int64_t at = own.begin * kPanel; at < own.end * kPanel && at < a.hidden; at += kLanes) {
        const int n = lanes_left(a.hidden, at);
        const int64_t row = step.begin + i, place = row * a.hidden + at, gate = row * Cell::kGates * a.hidden + at;
        float* const carry = a.scratch + i * stride_ + at;
        const vf h = load_lanes(before[i] + at, n);
        vf grad = load(carry);
        if (a.grad_output != nullptr) grad += load_lanes(a.grad_output + place, n);
        if (a.previous != nullptr) store_lanes(a.previous + place, h, n);
        constexpr bool gated = Cell::kGates > 1;
        store(carry, Cell::differentiate(grad, gated ? a.gates + (at / kLanes * total_ + row) * kPanel : nullptr,
                                         load_lanes(a.output + place, n), h, gated ? a.grad_x + gate : nullptr,
                                         a.grad_h + gate, n, a.hidden));
      }
    }
  }

  const RecurrentBackward& a;
  const int64_t stride_;
  int64_t total_;
};

template <typename AnyLayer>
void run_layer(AnyLayer&& layer) {
  parallel(layer.threads(), [&](int thread, int threads, Barrier& barrier) { layer.run(thread, threads, barrier); });
}

template <typename Cell>
void run_forward(const RecurrentForward& args) {
  args.bfloat ? run_layer(Layer<Cell, uint16_t>(args)) : run_layer(Layer<Cell, float>(args));
}

}  // namespace

int64_t recurrent_forward_scratch(RecurrentCell cell, int64_t rows, int64_t batch, int64_t hidden) {
  const int64_t units = cell == RecurrentCell::gru ? Gru::kUnits : Plain<false>::kUnits;
  return panels_for(hidden, units) * Layer<Gru, float>::most_rows(rows, batch) * kPanel;
}

void recurrent_forward(const RecurrentForward& args) {
  switch (args.cell) {
    case RecurrentCell::gru: return run_forward<Gru>(args);
    case RecurrentCell::tanh: return run_forward<Plain<false>>(args);
    case RecurrentCell::relu: return run_forward<Plain<true>>(args);
  }
}

int64_t recurrent_backward_scratch(int64_t batch, int64_t hidden) { return batch * padded(hidden); }

void recurrent_backward(const RecurrentBackward& args) {
  switch (args.cell) {
    case RecurrentCell::gru: return run_layer(Backward<Gru>(args));
    case RecurrentCell::tanh: return run_layer(Backward<Plain<false>>(args));
    case RecurrentCell::relu: return run_layer(Backward<Plain<true>>(args));
  }
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
