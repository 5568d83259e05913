#include "fastlm/lstm.h"

#include <cstring>
#include <type_traits>

#include "recurrence_digits.h"
#include "simd_math.h"

namespace fastlm {
namespace FASTLM_ISA {

namespace {

// One hidden-unit panel of one row: activates the gates in place, and gives h.
FASTLM_INLINE vf update(float* gates, const float* c_in, float* c_out, int n) {
  const vf i = sigmoid(load(gates));
  const vf f = sigmoid(load(gates + kLanes));
  const vf g = tanh(load(gates + 2 * kLanes));
  const vf o = sigmoid(load(gates + 3 * kLanes));
  store(gates, i);
  store(gates + kLanes, f);
  store(gates + 2 * kLanes, g);
  store(gates + 3 * kLanes, o);
  const vf c = f * load_lanes(c_in, n) + i * g;
  store_lanes(c_out, c, n);
  return o * tanh(c);
}

void zero_panel(float* tile, int64_t rows, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i)
    for (int v = 0; v < 4; ++v) store(tile + i * stride + v * kLanes, vf{});
}

template <typename W>
class Forward {
  static constexpr bool kDigits = std::is_same_v<W, Digits>;
  static constexpr int64_t kChunk = kDigits ? kDigitChunkRows : kChunkRows;

 public:
  explicit Forward(const LstmForward& args) : a(args) {
    total_ = total_rows(a.batch_sizes, a.steps);
    save_ = a.gates != nullptr;
    panels_ = panels_for(a.hidden, kLanes);
    const int64_t batch = a.batch_sizes[0];
    float* scratch = a.scratch;
    gate_rows_ = save_ ? total_ : chunk_rows(batch, kChunk);
    gates_ = save_ ? a.gates : take_floats(scratch, panels_ * gate_rows_ * kPanel);
    if (a.w_hr != nullptr) {
      projected_ = take_floats(scratch, batch * padded(a.outputs));
      step_hidden_ = take_floats(scratch, batch * a.hidden);
    }
    if (kDigits) {
      input_rows_ = InputRows(scratch, chunk_rows(batch, kChunk), a.inputs, a.w_ih, a.w_ih_parts, panels_ * 4);
      states_ = StateDigits(scratch, batch, a.outputs, a.h0);
    }
    scratch_ = scratch - a.scratch;
  }

  int64_t scratch() const { return scratch_; }

  int threads() const {
    return useful_threads(a.threads, total_ / a.steps * 4 * a.hidden * a.outputs, panels_);
  }

  void run(int thread, int threads, Barrier& barrier) {
    const Range own = share(panels_, thread, threads);
    const Range own_outputs = share(panels_for(a.outputs, kPanel), thread, threads);
    bool back = false;
    int turn = 0;
    DigitTiles tiles;
    InputRows input_rows = input_rows_;
    if (kDigits) input_rows.begin();
    if (kDigits) states_.begin(Walk(a.batch_sizes, a.steps, total_, a.reverse), own, thread, threads, barrier);
    const auto base = [&](int64_t low) { return save_ ? 0 : low; };  // the row that gates_ begins with
    const auto inputs = [&](int64_t low, int64_t high) {
      const Rows input = {a.input + low * a.inputs, nullptr, high - low, a.inputs};
      const auto gates = [&](int64_t u) { return gates_ + (u * gate_rows_ + low - base(low)) * kPanel; };
      if (kDigits) input_rows.put(input.first, high - low, thread, threads, barrier);
      if constexpr (kDigits)
        return input_rows.template product<4, 3>(high - low, own, a.bias, tiles, gates);
      else
        for (int64_t u = own.begin; u < own.end; ++u) {
          fill_bias(gates(u), a.bias + u * kPanel, high - low);
          panel_product(input, high - low, panel(a.w_ih, u, a.inputs), a.inputs, gates(u), kPanel);
        }
    };
    const auto take = [&](const Walk& step, int64_t low) {
      if (kDigits) tiles.set_rows(step.rows(), states_.few());
      sweep(own, back, [&](int64_t u) {
        hidden_panel(step, u, gates_ + (u * gate_rows_ + step.begin - base(low)) * kPanel, turn);
      });
      turn ^= 1;
      if (kDigits) states_.join(turn, step.rows(), step.rows_after(), own);
      barrier.wait();
      if (a.w_hr != nullptr) {
        for (int64_t p = own_outputs.begin; p < own_outputs.end; ++p) project_panel(step, p);
        barrier.wait();
      }
    };
    walk_in_chunks(a.batch_sizes, a.steps, total_, a.reverse, inputs, take, kChunk);
  }

 private:
  static auto panel(const void* weights, int64_t index, int64_t k) {
    if constexpr (kDigits)
      return static_cast<const uint8_t*>(weights) + index * 4 * digit_column_block(k);
    else
      return static_cast<const W*>(weights) + index * panel_size<W>(k, kPanel);
  }

  void hidden_panel(const Walk& step, int64_t u, float* gates, int turn) {
    const auto weights = panel(a.w_hh, u, a.outputs);
    if constexpr (kDigits)
      states_.product<4, 3>(step, turn, weights, gates);
    else
      panel_product(state_before(step, a.output, a.h0, a.outputs), step.rows(), weights, a.outputs, gates, kPanel);
    const int64_t at = u * kLanes, width = a.hidden;
    const int n = lanes_left(width, at);
    // Cell states are in `cells` where they are saved; else c_n holds each row's newest.
    const Rows c_in = save_ ? state_before(step, a.cells, a.c0, width) : Rows{a.c_n, a.c0, step.rows_before(), width};
    float* c_out = save_ ? a.cells + step.begin * width : a.c_n;
    float* h_out = a.output + step.begin * width;
    if (a.w_hr != nullptr) h_out = save_ ? a.unprojected + step.begin * width : step_hidden_;
    for (int64_t i = 0; i < step.rows(); ++i) {
      const vf h = update(gates + i * kPanel, c_in[i] + at, c_out + i * width + at, n);
      store_lanes(h_out + i * width + at, h, n);
      if (i < step.rows_after()) {  // the row has a next step
        if (kDigits) states_.put(turn ^ 1, i, at, h);
        continue;
      }
      if (save_) store_lanes(a.c_n + i * width + at, load_lanes(c_out + i * width + at, n), n);
      if (a.w_hr == nullptr) store_lanes(a.h_n + i * width + at, h, n);
    }
  }

  void project_panel(const Walk& step, int64_t p) {
    const int64_t stride = padded(a.outputs), at = p * kPanel;
    const float* hidden = save_ ? a.unprojected + step.begin * a.hidden : step_hidden_;
    zero_panel(projected_ + at, step.rows(), stride);
    if constexpr (!kDigits)
      panel_product({hidden, nullptr, step.rows(), a.hidden}, step.rows(), panel(a.w_hr, p, a.hidden), a.hidden,
                    projected_ + at, stride);
    const int64_t bytes = (a.outputs - at < kPanel ? a.outputs - at : kPanel) * static_cast<int64_t>(sizeof(float));
    for (int64_t i = 0; i < step.rows(); ++i) {
      std::memcpy(a.output + (step.begin + i) * a.outputs + at, projected_ + i * stride + at, bytes);
      if (i >= step.rows_after()) std::memcpy(a.h_n + i * a.outputs + at, projected_ + i * stride + at, bytes);
    }
  }

  const LstmForward& a;
  int64_t total_, panels_;
  int64_t gate_rows_;             // rows of each panel of gates_
  float* gates_;                  // [H/L][gate_rows][4][L]
  float* projected_ = nullptr;    // [B, padded P]
  float* step_hidden_ = nullptr;  // [B, H]: o tanh(c) of the step, with a projection, where it is not saved
  bool save_;
  InputRows input_rows_;
  StateDigits states_;
  int64_t scratch_;  // floats in use
};

class Backward {
 public:
  explicit Backward(const LstmBackward& args) : a(args) {
    total_ = total_rows(a.batch_sizes, a.steps);
    float* scratch = a.scratch;
    stride_ = padded(a.outputs);
    carry_ = take_floats(scratch, a.batch_sizes[0] * stride_);
    full_stride_ = padded(a.hidden);
    if (a.w_hr != nullptr) full_ = take_floats(scratch, a.batch_sizes[0] * full_stride_);
    if (a.digits) digits_ = GradientDigits(scratch, a.batch_sizes[0], 4, a.hidden, a.threads);
    scratch_ = scratch - a.scratch;
  }

  int64_t scratch() const { return scratch_; }

  int threads() const {
    return useful_threads(a.threads, total_ / a.steps * 4 * a.hidden * a.outputs, panels_for(a.outputs, kPanel));
  }

  // Without a projection a thread's outputs and hidden units are the same, so what it carries is its own and a step
  // needs one barrier: every thread's gates go into every thread's share of the product with W_hh.
  void run(int thread, int threads, Barrier& barrier) {
    const Range outputs = share(panels_for(a.outputs, kPanel), thread, threads);
    const Range hidden = share(panels_for(a.hidden, kPanel), thread, threads);
    const int64_t batch = a.batch_sizes[0];
    bool back = false;
    DigitTiles tiles;
    copy_columns(outputs, batch, a.outputs, a.grad_h_n, a.outputs, carry_, stride_);
    copy_columns(hidden, batch, a.hidden, a.grad_c_n, a.hidden, a.grad_c0, a.hidden);
    for (Walk step(a.batch_sizes, a.steps, total_, !a.reverse); !step.done(); step.advance()) {
      if (a.w_hr != nullptr) {
        for (int64_t p = outputs.begin; p < outputs.end; ++p) output_panel(step, p);
        barrier.wait();
        for (int64_t p = hidden.begin; p < hidden.end; ++p) full_panel(step, p);
      }
      gates(step, hidden);
      const int64_t k = 4 * a.hidden;
      const float* const grads = a.grad_gates + step.begin * k;
      if (a.digits) {
        digits_.put(grads, step.rows(), {hidden.begin * kPanel, hidden.end * kPanel}, thread, threads, barrier);
        tiles.set_rows(step.rows(), digits_.few());
      } else {
        barrier.wait();
      }
      sweep(outputs, back, [&](int64_t p) {
        zero_panel(carry_ + p * kPanel, step.rows(), stride_);
        if (a.digits)
          digits_.product(step.rows(), static_cast<const uint8_t*>(a.w_hh) + p * digits_.panel_bytes(), thread,
                          carry_ + p * kPanel, stride_);
        else
          panel_product({grads, nullptr, step.rows(), k}, step.rows(),
                        static_cast<const float*>(a.w_hh) + p * k * kPanel, k, carry_ + p * kPanel, stride_);
      });
    }
    copy_columns(outputs, batch, a.outputs, carry_, stride_, a.grad_h0, a.outputs);
  }

 private:
  static int64_t columns_in(int64_t p, int64_t columns) {
    return columns - p * kPanel < kPanel ? columns - p * kPanel : kPanel;
  }

  // With a projection: dh = what is carried + the output's own, kept for the gradient of W_hr; and h before the step.
  void output_panel(const Walk& step, int64_t p) {
    const int64_t at = p * kPanel, n = columns_in(p, a.outputs);
    const Rows before = backward_state(step, a.output, a.h0, a.outputs);
    for (int64_t i = 0; i < step.rows(); ++i) {
      const int64_t place = (step.begin + i) * a.outputs + at;
      float* carry = carry_ + i * stride_ + at;
      if (a.grad_output != nullptr)
        for (int64_t j = 0; j < n; ++j) carry[j] += a.grad_output[place + j];
      std::memcpy(a.grad_projected + place, carry, n * sizeof(float));
      if (a.previous != nullptr) std::memcpy(a.previous + place, before[i] + at, n * sizeof(float));
    }
  }

  void full_panel(const Walk& step, int64_t p) {
    zero_panel(full_ + p * kPanel, step.rows(), full_stride_);
    panel_product({a.grad_projected + step.begin * a.outputs, nullptr, step.rows(), a.outputs}, step.rows(),
                  a.w_hr + p * a.outputs * kPanel, a.outputs, full_ + p * kPanel, full_stride_);
  }

  // One row after the other, of all own units: some KB of each array in one piece. Unit by unit the rows' places, a
  // multiple of 4 KB apart, drive each other out of the level-1 cache.
  void gates(const Walk& step, Range own) {
    const bool project = a.w_hr != nullptr;
    const float* const grad_h = project ? full_ : carry_;
    const int64_t stride = project ? full_stride_ : stride_, high = own.end * kPanel;
    // Without a projection, what output_panel does is done here, on the way.
    const float* const grad_output = project ? nullptr : a.grad_output;
    float* const previous = project ? nullptr : a.previous;
    const Rows c_before = backward_state(step, a.cells, a.c0, a.hidden);
    const Rows h_before = backward_state(step, a.output, a.h0, a.hidden);
    for (int64_t i = 0; i < step.rows(); ++i) {
      const int64_t row = step.begin + i;
      for (int64_t at = own.begin * kPanel; at < high && at < a.hidden; at += kLanes) {
        const int n = lanes_left(a.hidden, at);
        const int64_t place = row * a.hidden + at;
        vf grad = load_lanes(grad_h + i * stride + at, n);
        if (grad_output != nullptr) grad += load_lanes(grad_output + place, n);
        if (previous != nullptr) store_lanes(previous + place, load_lanes(h_before[i] + at, n), n);
        differentiate(a.gates + (at / kLanes * total_ + row) * kPanel, grad, load_lanes(a.cells + place, n),
                      load_lanes(c_before[i] + at, n), a.grad_c0 + i * a.hidden + at,
                      a.grad_gates + row * 4 * a.hidden + at, n, a.hidden);
      }
    }
  }

  // The derivative of update() for one row and `n` <= L units; grad_c goes from c's gradient to that of c before.
  FASTLM_INLINE void differentiate(const float* gates, vf grad_h, vf c, vf c_before, float* grad_c, float* grad_gates,
                                   int n, int64_t hidden) {
    const vf i = load(gates), f = load(gates + kLanes), g = load(gates + 2 * kLanes), o = load(gates + 3 * kLanes);
    const vf tanh_c = tanh(c);
    const vf dc = load_lanes(grad_c, n) + grad_h * o * (1.0f - tanh_c * tanh_c);
    store_lanes(grad_gates, dc * g * i * (1.0f - i), n);
    store_lanes(grad_gates + hidden, dc * c_before * f * (1.0f - f), n);
    store_lanes(grad_gates + 2 * hidden, dc * i * (1.0f - g * g), n);
    store_lanes(grad_gates + 3 * hidden, grad_h * tanh_c * o * (1.0f - o), n);
    store_lanes(grad_c, dc * f, n);
  }
  const LstmBackward& a;
  int64_t total_;
  float* carry_;  // [B, stride]: dh, its columns padded
  float* full_ = nullptr;  // [B, full_stride]: with a projection, the gradient of o tanh(c)
  int64_t stride_, full_stride_, scratch_;
  GradientDigits digits_;
};

}  // namespace

template <typename Run>
static auto with_weights(const LstmForward& args, const Run& run) {
  if constexpr (kHasDigits)
    if (args.digits) return run(Forward<Digits>(args));
  return args.bfloat ? run(Forward<uint16_t>(args)) : run(Forward<float>(args));
}

int64_t lstm_forward_scratch(const LstmForward& args) {
  return with_weights(args, [](auto&& layer) { return layer.scratch(); });
}

int64_t lstm_backward_scratch(const LstmBackward& args) { return Backward(args).scratch(); }

void lstm_forward(const LstmForward& args) {
  with_weights(args, [](auto&& layer) {
    parallel(layer.threads(), [&](int thread, int threads, Barrier& barrier) { layer.run(thread, threads, barrier); });
  });
}

void lstm_backward(const LstmBackward& args) {
  Backward layer(args);
  parallel(layer.threads(), [&](int thread, int threads, Barrier& barrier) { layer.run(thread, threads, barrier); });
}

// One hidden-unit panel of one row, whose first unit is number `cell` of all: its next states.
FASTLM_INLINE void put_cell(const LstmCell& a, float* gates, int64_t cell, int n) {
  const vf h = update(gates, a.c + cell, a.c_out + cell, n);
  store_lanes(a.h_out + cell, h, n);
  if (a.output != nullptr) store_lanes(a.output + cell, h, n);
}

template <typename W>
static void cell_as(const LstmCell& a) {
  constexpr int64_t kCellRows = 48;  // rows at a time: their gates stay in the level-1 cache
  const int64_t panels = panels_for(a.hidden, kLanes);
  const int team = useful_threads(a.threads, a.batch * 4 * a.hidden * (a.inputs + a.hidden), panels);
  parallel(team, [&](int thread, int threads, Barrier&) {
    alignas(64) float gates[kCellRows * kPanel];
    static thread_local bool back = false;  // from one step to the next: most often they use the same weights
    sweep(share(panels, thread, threads), back, [&](int64_t u) {
      const int64_t at = u * kLanes;
      const int n = lanes_left(a.hidden, at);
      const W* const w_ih = static_cast<const W*>(a.w_ih) + u * panel_size<W>(a.inputs, kPanel);
      const W* const w_hh = static_cast<const W*>(a.w_hh) + u * panel_size<W>(a.hidden, kPanel);
      for (int64_t low = 0; low < a.batch; low += kCellRows) {
        const int64_t rows = a.batch - low < kCellRows ? a.batch - low : kCellRows;
        fill_bias(gates, a.bias + u * kPanel, rows);
        panel_product({a.input + low * a.inputs, nullptr, rows, a.inputs}, rows, w_ih, a.inputs, gates, kPanel);
        panel_product({a.h + low * a.hidden, nullptr, rows, a.hidden}, rows, w_hh, a.hidden, gates, kPanel);
        for (int64_t i = 0; i < rows; ++i) put_cell(a, gates + i * kPanel, (low + i) * a.hidden + at, n);
      }
    });
  });
}

// One step in digits, panel by panel through both weights as the one in floats.
class DigitCell {
 public:
  explicit DigitCell(const LstmCell& args) : a(args), panels_(panels_for(a.hidden, kLanes)) {
    float* scratch = a.scratch;
    inputs_ = InputRows(scratch, a.batch, a.inputs, a.w_ih, a.w_ih_parts, panels_ * 4);
    states_ = StateDigits(scratch, a.batch, a.hidden, a.h);
    gates_ = take_floats(scratch, a.threads * a.batch * kPanel);
    scratch_ = scratch - a.scratch;
  }

  int64_t scratch() const { return scratch_; }
  int threads() const { return useful_threads(a.threads, a.batch * 4 * a.hidden * (a.inputs + a.hidden), panels_); }

  void run(int thread, int threads, Barrier& barrier) {
    const Range own = share(panels_, thread, threads);
    const Walk step(&a.batch, 1, a.batch, false);
    const uint8_t* const w_hh = static_cast<const uint8_t*>(a.w_hh);
    float* const gates = gates_ + thread * a.batch * kPanel;
    DigitTiles tiles;
    InputRows inputs = inputs_;
    inputs.begin();
    inputs.put(a.input, a.batch, thread, threads, barrier);
    states_.begin(step, own, thread, threads, barrier);
    static thread_local bool back = false;  // from one step to the next: most often they use the same weights
    sweep(own, back, [&](int64_t u) {
      inputs.product<4, 3>(a.batch, {u, u + 1}, a.bias, tiles, [&](int64_t) { return gates; });
      tiles.set_rows(a.batch, states_.few());
      states_.product<4, 3>(step, 0, w_hh + u * 4 * digit_column_block(a.hidden), gates);
      const int64_t at = u * kLanes;
      for (int64_t i = 0; i < a.batch; ++i) put_cell(a, gates + i * kPanel, i * a.hidden + at, lanes_left(a.hidden, at));
    });
  }

 private:
  const LstmCell& a;
  int64_t panels_, scratch_;
  InputRows inputs_;
  StateDigits states_;
  float* gates_;  // [threads][B][4][L]
};

// Some rows of a batch: what they need of scratch does not grow with the others.
static LstmCell some_rows(const LstmCell& a, int64_t first) {
  LstmCell part = a;
  part.batch = a.batch - first < kDigitChunkRows ? a.batch - first : kDigitChunkRows;
  part.input += first * a.inputs;
  part.h += first * a.hidden;
  part.c += first * a.hidden;
  part.h_out += first * a.hidden;
  part.c_out += first * a.hidden;
  if (a.output != nullptr) part.output += first * a.hidden;
  return part;
}

int64_t lstm_cell_scratch(const LstmCell& a) {
  if constexpr (kHasDigits)
    if (a.digits) return DigitCell(some_rows(a, 0)).scratch();
  return 0;
}

void lstm_cell(const LstmCell& a) {
  if constexpr (kHasDigits)
    if (a.digits) {
      for (int64_t first = 0; first < a.batch; first += kDigitChunkRows) {
        const LstmCell part = some_rows(a, first);
        DigitCell cell(part);
        parallel(cell.threads(),
                 [&](int thread, int threads, Barrier& barrier) { cell.run(thread, threads, barrier); });
      }
      return;
    }
  a.bfloat ? cell_as<uint16_t>(a) : cell_as<float>(a);
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
