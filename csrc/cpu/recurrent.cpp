#include "fastlm/recurrent.h"

#include "recurrence_digits.h"
#include "simd_math.h"

#include <type_traits>

namespace fastlm {
namespace FASTLM_ISA {

namespace {

// A cell: how many units a panel has and how many vectors for each k of a weight, and the step from a panel's sums and h to the next h, for `n` <= kUnits units of a row.
struct Gru {
  static constexpr int64_t kGates = 3, kUnits = kLanes;
  // Of a panel, and where the last of them goes. n's product with h goes into the fourth: it is multiplied by r before it
  // is added to x's.
  static constexpr int kVectors = 3, kInputLast = 2, kHiddenLast = 3;
  static constexpr bool kDigits = true, kBounded = false;  // h may be in digits, but stays as large as it began

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
  static constexpr int64_t kGates = 1, kUnits = kPanel;
  static constexpr int kVectors = 4, kInputLast = 3, kHiddenLast = 3;
  static constexpr bool kDigits = !Relu, kBounded = true;  // by 1; a relu's states have no bound

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
  static constexpr bool kDigits = std::is_same_v<W, Digits>;
  // States in digits of one scale, or of each step's own.
  static constexpr bool kShared = kDigits && Cell::kBounded, kScaled = kDigits && !Cell::kBounded;
  static constexpr int64_t kChunk = kDigits ? kDigitChunkRows : kChunkRows;

 public:
  explicit Layer(const RecurrentForward& args) : a(args) {
    total_ = total_rows(a.batch_sizes, a.steps);
    panels_ = panels_for(a.hidden, Cell::kUnits);
    save_ = a.gates != nullptr;
    const int64_t batch = a.batch_sizes[0], chunk = chunk_rows(batch, kChunk);
    gate_rows_ = save_ || total_ < chunk ? total_ : chunk;
    float* scratch = a.scratch;
    sums_ = save_ ? a.gates : take_floats(scratch, panels_ * gate_rows_ * kPanel);
    if (kDigits) {
      input_rows_ = InputRows(scratch, chunk, a.inputs, a.w_ih, a.w_ih_parts, panels_ * Cell::kVectors);
      if (Cell::kBounded)
        states_ = StateDigits(scratch, batch, a.hidden, a.h0);
      else
        scaled_ = GradientDigits(scratch, batch, 1, a.hidden, a.threads);
    }
    scratch_ = scratch - a.scratch;
  }

  int64_t scratch() const { return scratch_; }

  int threads() const {
    return useful_threads(a.threads, total_ / a.steps * Cell::kGates * a.hidden * (a.inputs + a.hidden), panels_);
  }

  void run(int thread, int threads, Barrier& barrier) {
    const Range own = share(panels_, thread, threads);
    DigitTiles tiles;
    const Walk first(a.batch_sizes, a.steps, total_, a.reverse);
    const Range own_units = {own.begin * Cell::kUnits, own.end * Cell::kUnits};
    const Range own_vectors = {own_units.begin / kLanes, own_units.end / kLanes};
    InputRows input_rows = input_rows_;
    if (kDigits) input_rows.begin();
    if (kShared) states_.begin(first, own_vectors, thread, threads, barrier);
    if (a.steps == 1) {  // both products panel by panel: from one call to the next most often with the same weights
      static thread_local bool back = false;
      if (kDigits) input_rows.put(a.input, total_, thread, threads, barrier);
      if (kScaled) scaled_.put({nullptr, a.h0, 0, a.hidden}, total_, own_units, thread, threads, barrier);
      return sweep(own, back, [&](int64_t u) {
        if constexpr (kDigits)
          input_rows.template product<Cell::kVectors, Cell::kInputLast>(total_, {u, u + 1}, a.bias, tiles,
                                                                        [&](int64_t) { return sums(u, 0, 0); });
        else
          input_panel(u, 0, total_);
        if (kDigits) tiles.set_rows(total_, few());
        hidden_panel(first, u, 0, 0, thread);
      });
    }
    bool back = false;
    int turn = 0;
    const auto inputs = [&](int64_t low, int64_t high) {
      if (kDigits) input_rows.put(a.input + low * a.inputs, high - low, thread, threads, barrier);
      if constexpr (kDigits)
        return input_rows.template product<Cell::kVectors, Cell::kInputLast>(
            high - low, own, a.bias, tiles, [&](int64_t u) { return sums(u, low, low); });
      else
        for (int64_t u = own.begin; u < own.end; ++u) input_panel(u, low, high);
    };
    const auto take = [&](const Walk& step, int64_t low) {
      if (kScaled)
        scaled_.put(state_before(step, a.output, a.h0, a.hidden), step.rows(), own_units, thread, threads, barrier);
      if (kDigits) tiles.set_rows(step.rows(), few());
      sweep(own, back, [&](int64_t u) { hidden_panel(step, u, low, turn, thread); });
      turn ^= 1;
      if (kShared) states_.join(turn, step.rows(), step.rows_after(), own_vectors);
      if (!kScaled) barrier.wait();
    };
    walk_in_chunks(a.batch_sizes, a.steps, total_, a.reverse, inputs, take, kChunk);
  }

 private:
  bool few() const { return kScaled ? scaled_.few() : states_.few(); }

  // Of the row `row`, in the chunk that begins with the row `low`.
  float* sums(int64_t u, int64_t row, int64_t low) const {
    return sums_ + (u * gate_rows_ + row - (save_ ? 0 : low)) * kPanel;
  }

  static auto panel(const void* weights, int64_t index, int64_t k) {
    if constexpr (kDigits)
      return static_cast<const uint8_t*>(weights) + index * Cell::kVectors * digit_column_block(k);
    else
      return static_cast<const W*>(weights) + index * panel_size<W>(k, Cell::kVectors * kLanes);
  }

  void input_panel(int64_t u, int64_t low, int64_t high) {
    fill_bias(sums(u, low, low), a.bias + u * kPanel, high - low);
    if constexpr (!kDigits) {
      const auto weights = panel(a.w_ih, u, a.inputs);
      const Rows input = {a.input + low * a.inputs, nullptr, high - low, a.inputs};
      panel_product<Cell::kVectors, Cell::kInputLast>(input, high - low, weights, a.inputs, sums(u, low, low), kPanel);
    }
  }

  void hidden_panel(const Walk& step, int64_t u, int64_t low, int turn, int thread) {
    const Rows h = state_before(step, a.output, a.h0, a.hidden);
    float* at_step = sums(u, step.begin, low);
    const auto weights = panel(a.w_hh, u, a.hidden);
    if constexpr (kScaled)
      scaled_.product<Cell::kVectors, Cell::kHiddenLast>(step.rows(), weights, thread, at_step, kPanel);
    else if constexpr (kShared)
      states_.product<Cell::kVectors, Cell::kHiddenLast>(step, turn, weights, at_step);
    else
      panel_product<Cell::kVectors, Cell::kHiddenLast>(h, step.rows(), weights, a.hidden, at_step, kPanel);
    const int64_t at = u * Cell::kUnits, left = a.hidden - at;
    const int64_t units = left < Cell::kUnits ? left : Cell::kUnits;
    for (int64_t i = 0; i < step.rows(); ++i) {
      float* next = a.output + (step.begin + i) * a.hidden + at;
      Cell::update(at_step + i * kPanel, h[i] + at, next, units);
      if (kShared && i < step.rows_after())
        for (int64_t v = 0; v < units; v += kLanes) states_.put(turn ^ 1, i, at + v, load_until(next, v, units, 0.0f));
      if (i >= step.rows_after()) std::memcpy(a.h_n + i * a.hidden + at, next, units * sizeof(float));
    }
  }

  const RecurrentForward& a;
  int64_t total_, panels_, gate_rows_;
  float* sums_;  // [panels][gate_rows][4][L]
  bool save_;
  InputRows input_rows_;
  StateDigits states_;
  GradientDigits scaled_;  // h before the step, where it has no bound
  int64_t scratch_;  // floats in use
};

// As the LSTM's without a projection: a thread's outputs and hidden units are the same, so what it carries is its own.
template <typename Cell>
class Backward {
 public:
  explicit Backward(const RecurrentBackward& args) : a(args), stride_(padded(a.hidden)) {
    total_ = total_rows(a.batch_sizes, a.steps);
    float* scratch = a.scratch;
    carry_ = take_floats(scratch, a.batch_sizes[0] * stride_);
    if (a.digits) digits_ = GradientDigits(scratch, a.batch_sizes[0], Cell::kGates, a.hidden, a.threads);
    scratch_ = scratch - a.scratch;
  }

  int64_t scratch() const { return scratch_; }

  int threads() const {
    return useful_threads(a.threads, total_ / a.steps * Cell::kGates * a.hidden * a.hidden, stride_ / kPanel);
  }

  void run(int thread, int threads, Barrier& barrier) {
    const Range own = share(stride_ / kPanel, thread, threads);
    const int64_t batch = a.batch_sizes[0], k = Cell::kGates * a.hidden;
    bool back = false;
    DigitTiles tiles;
    copy_columns(own, batch, stride_, nullptr, stride_, carry_, stride_);
    copy_columns(own, batch, a.hidden, a.grad_h_n, a.hidden, carry_, stride_);
    for (Walk step(a.batch_sizes, a.steps, total_, !a.reverse); !step.done(); step.advance()) {
      cells(step, own);
      const float* const grads = a.grad_h + step.begin * k;
      if (a.digits) {
        digits_.put(grads, step.rows(), {own.begin * kPanel, own.end * kPanel}, thread, threads, barrier);
        tiles.set_rows(step.rows(), digits_.few());
      } else {
        barrier.wait();
      }
      sweep(own, back, [&](int64_t p) {
        if (a.digits)
          digits_.product(step.rows(), static_cast<const uint8_t*>(a.w_hh) + p * digits_.panel_bytes(), thread,
                          carry_ + p * kPanel, stride_);
        else
          panel_product({grads, nullptr, step.rows(), k}, step.rows(),
                        static_cast<const float*>(a.w_hh) + p * k * kPanel, k, carry_ + p * kPanel, stride_);
      });
    }
    copy_columns(own, batch, a.hidden, carry_, stride_, a.grad_h0, a.hidden);
  }

 private:
  // From the gradient of h, carried and the output's own, to those of the gates; what goes straight to the h before
  // stays in `carry_`, to which the product with W_hh is added.
  void cells(const Walk& step, Range own) {
    const Rows before = backward_state(step, a.output, a.h0, a.hidden);
    for (int64_t i = 0; i < step.rows(); ++i) {
      for (int64_t at = own.begin * kPanel; at < own.end * kPanel && at < a.hidden; at += kLanes) {
        const int n = lanes_left(a.hidden, at);
        const int64_t row = step.begin + i, place = row * a.hidden + at, gate = row * Cell::kGates * a.hidden + at;
        float* const carry = carry_ + i * stride_ + at;
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
  int64_t total_, scratch_;
  float* carry_;  // [B, stride]
  GradientDigits digits_;
};

template <typename Cell, typename Run>
auto with_weights(const RecurrentForward& args, const Run& run) {
  if constexpr (kHasDigits && Cell::kDigits)
    if (args.digits) return run(Layer<Cell, Digits>(args));
  return args.bfloat ? run(Layer<Cell, uint16_t>(args)) : run(Layer<Cell, float>(args));
}

template <typename Run>
auto with_layer(const RecurrentForward& args, const Run& run) {
  switch (args.cell) {
    case RecurrentCell::gru: return with_weights<Gru>(args, run);
    case RecurrentCell::tanh: return with_weights<Plain<false>>(args, run);
    default: return with_weights<Plain<true>>(args, run);
  }
}

template <typename Run>
auto with_layer(const RecurrentBackward& args, const Run& run) {
  switch (args.cell) {
    case RecurrentCell::gru: return run(Backward<Gru>(args));
    case RecurrentCell::tanh: return run(Backward<Plain<false>>(args));
    default: return run(Backward<Plain<true>>(args));
  }
}

template <typename Args>
void run(const Args& args) {
  with_layer(args, [](auto&& layer) {
    parallel(layer.threads(), [&](int thread, int threads, Barrier& barrier) { layer.run(thread, threads, barrier); });
  });
}

template <typename Args>
int64_t scratch_of(const Args& args) {
  return with_layer(args, [](auto&& layer) { return layer.scratch(); });
}

}  // namespace

int64_t recurrent_forward_scratch(const RecurrentForward& args) { return scratch_of(args); }
int64_t recurrent_backward_scratch(const RecurrentBackward& args) { return scratch_of(args); }
void recurrent_forward(const RecurrentForward& args) { run(args); }
void recurrent_backward(const RecurrentBackward& args) { run(args); }

}  // namespace FASTLM_ISA
}  // namespace fastlm
