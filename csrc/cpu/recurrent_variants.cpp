#include "panel_sums.h"

namespace fastlm {
namespace FASTLM_ISA {

namespace {

// Of an LSTM (4 gates) or a GRU (3).
template <int Gates>
class Forward {
 public:
  explicit Forward(const VariantForward& args)
      : a(args), norm_(args.variant.ln_ih != nullptr), digits_(kHasDigits && args.digits) {
    total_ = total_rows(a.batch_sizes, a.steps);
    panels_ = panels_for(a.hidden, kLanes);
    save_ = a.activated != nullptr;
    const int64_t batch = a.batch_sizes[0], chunk = chunk_rows(batch, chunk_size());
    gate_rows_ = save_ ? total_ : chunk;
    raw_rows_ = save_ ? total_ : batch;
    float* scratch = a.scratch;
    gates_ = save_ ? a.activated : take_floats(scratch, panels_ * gate_rows_ * kPanel);
    if (digits_) {
      input_rows_ = InputRows(scratch, chunk, a.inputs, a.w_ih, a.w_ih_parts, panels_ * Gates, norm_);
      if (norm_) zeros_ = take_floats(scratch, panels_ * kPanel);
      states_ = GradientDigits(scratch, batch, 1, a.hidden, a.threads);
    }
    if (norm_) {
      raw_ = save_ ? a.raw_hh : take_floats(scratch, panels_ * batch * kWeights);
      of_x_ = PanelSums(scratch, gate_rows_, panels_, kWeights, Gates * a.hidden);
      of_h_ = PanelSums(scratch, batch, panels_, kWeights, Gates * a.hidden);
    }
    if (norm_ && kLstm) {
      of_c_ = PanelSums(scratch, batch, panels_, kLanes, a.hidden);
      new_c_ = take_floats(scratch, batch * padded(a.hidden));
    }
    scratch_ = scratch - a.scratch;
  }

  int64_t scratch() const { return scratch_; }

  int threads() const {
    return useful_threads(a.threads, total_ / a.steps * Gates * a.hidden * a.hidden, panels_);
  }

  void run(int thread, int threads, Barrier& barrier) {
    const Range own = share(panels_, thread, threads);
    const auto base = [&](int64_t low) { return save_ ? 0 : low; };  // the row that gates_ begins with
    DigitTiles tiles;
    InputRows input_rows = input_rows_;
    if (digits_) input_rows.begin();
    if (digits_ && norm_) std::memset(zeros_ + own.begin * kPanel, 0, (own.end - own.begin) * kPanel * sizeof(float));
    const auto inputs = [&](int64_t low, int64_t high) {
      const auto gates = [&](int64_t u) { return gates_ + (u * gate_rows_ + low - base(low)) * kPanel; };
      if (digits_) input_rows.put(a.input + low * a.inputs, high - low, thread, threads, barrier);
      if (digits_)
        input_rows.template product<Gates, Gates - 1>(high - low, own, norm_ ? zeros_ : a.bias, tiles, gates);
      for (int64_t u = own.begin; !digits_ && u < own.end; ++u) input_panel(u, low, high, gates(u));
      for (int64_t u = own.begin; norm_ && u < own.end; ++u) keep_inputs(u, low, high, base(low), gates(u));
    };
    bool back = false;
    const auto take = [&](const Walk& step, int64_t low) {
      if (digits_) {
        // What is largest in a row of m h, however large, is found before the barrier at which h is ready.
        states_.put(state_before(step, a.dropped != nullptr ? a.dropped : a.output, a.h0_dropped, a.hidden), step.rows(),
                    {own.begin * kLanes, own.end * kLanes}, thread, threads, barrier);
        tiles.set_rows(step.rows(), states_.few());
      }
      const int64_t first = step.begin - base(low), raw_first = save_ ? step.begin : 0, rows = step.rows();
      sweep(own, back, [&](int64_t u) {
        float* const gates = gates_ + (u * gate_rows_ + first) * kPanel;
        if (norm_) return raw_panel(step, u, raw_ + (u * raw_rows_ + raw_first) * kWeights, thread);
        // A GRU's h_n is apart from x_n, in the fourth vector: it is multiplied by r.
        hidden_product<3>(step, u, gates, kPanel, thread);
        for (int64_t i = 0; i < rows; ++i) {
          const vf c = cell(step, i, u, gates + i * kPanel, load(gates + i * kPanel), load(gates + i * kPanel + kLanes),
                            load(gates + i * kPanel + 2 * kLanes), load(gates + i * kPanel + 3 * kLanes));
          if (kLstm) lstm_hidden(step, i, u, load(gates + i * kPanel + 3 * kLanes), c);
        }
      });
      if (norm_) {
        barrier.wait();
        for (int64_t i = 0; i < rows; i += kLanes) {
          const int64_t count = rows - i < kLanes ? rows - i : kLanes;
          const RowMoments x = of_x_.moments(first + i), h = of_h_.moments(i);
          if (thread == 0) keep_moments(step.begin + i, count, 0, x), keep_moments(step.begin + i, count, 2, h);
          for (int64_t u = own.begin; u < own.end; ++u) {
            for (int64_t r = 0; r < count; ++r) normed_cell(step, i + r, u, first, raw_first, x[r], h[r]);
            if (kLstm)
              of_c_.set<1>(i, u, new_c(i) + u * kLanes, padded(a.hidden), count, lanes_left(a.hidden, u * kLanes));
          }
        }
      }
      if (norm_ && kLstm) {
        barrier.wait();
        for (int64_t i = 0; i < rows; i += kLanes) {
          const int64_t count = rows - i < kLanes ? rows - i : kLanes;
          const RowMoments c = of_c_.moments(i);
          if (thread == 0) keep_moments(step.begin + i, count, 4, c);
          for (int64_t u = own.begin; u < own.end; ++u)
            for (int64_t r = 0; r < count; ++r) normed_hidden(step, i + r, u, first, c[r]);
        }
      }
      if (!digits_) barrier.wait();
    };
    walk_in_chunks(a.batch_sizes, a.steps, total_, a.reverse, inputs, take, chunk_size());
  }

 private:
  static constexpr bool kLstm = Gates == 4;
  static constexpr int64_t kWeights = Gates * kLanes;  // columns of a panel of weights

  int64_t chunk_size() const { return digits_ ? kDigitChunkRows : kChunkRows; }
  float* new_c(int64_t i) const { return new_c_ + i * padded(a.hidden); }

  void keep_moments(int64_t row, int64_t count, int64_t which, const RowMoments& moments) const {
    if (a.stats == nullptr) return;
    store_lanes(a.stats + which * total_ + row, load(moments.mean), static_cast<int>(count));
    store_lanes(a.stats + (which + 1) * total_ + row, load(moments.scale), static_cast<int>(count));
  }

  // In floats; normalised sums are given their bias later.
  void input_panel(int64_t u, int64_t low, int64_t high, float* gates) {
    if (norm_)
      std::memset(gates, 0, (high - low) * kPanel * sizeof(float));
    else
      fill_bias(gates, a.bias + u * kPanel, high - low);
    panel_product<Gates>({a.input + low * a.inputs, nullptr, high - low, a.inputs}, high - low,
                         static_cast<const float*>(a.w_ih) + u * a.inputs * kWeights, a.inputs, gates, kPanel);
  }
  void keep_inputs(int64_t u, int64_t low, int64_t high, int64_t base, const float* gates) {
    of_x_.set<Gates>(low - base, u, gates, kPanel, high - low, lanes_left(a.hidden, u * kLanes));
    if (!save_) return;
    float* to = a.raw_ih + (u * total_ + low) * kWeights;
    for (int64_t row = low; row < high; ++row, gates += kPanel, to += kWeights)
      std::memcpy(to, gates, kWeights * sizeof(float));
  }

  // The last gate's product goes to the vector `Last`.
  template <int Last>
  void hidden_product(const Walk& step, int64_t u, float* out, int64_t stride, int thread) {
    if (digits_)
      return states_.product<Gates, Last>(
          step.rows(), static_cast<const uint8_t*>(a.w_hh) + u * Gates * digit_column_block(a.hidden), thread, out,
          stride);
    const Rows h = state_before(step, a.dropped != nullptr ? a.dropped : a.output, a.h0_dropped, a.hidden);
    panel_product<Gates, Last>(h, step.rows(), static_cast<const float*>(a.w_hh) + u * a.hidden * kWeights, a.hidden,
                               out, stride);
  }

  void raw_panel(const Walk& step, int64_t u, float* raw, int thread) {
    std::memset(raw, 0, step.rows() * kWeights * sizeof(float));
    hidden_product<Gates - 1>(step, u, raw, kWeights, thread);
    of_h_.set<Gates>(0, u, raw, kWeights, step.rows(), lanes_left(a.hidden, u * kLanes));
  }

  void normed_cell(const Walk& step, int64_t i, int64_t u, int64_t first, int64_t raw_first, Moments x, Moments h) {
    float* const gates = gates_ + (u * gate_rows_ + first + i) * kPanel;
    const float* const raw = raw_ + (u * raw_rows_ + raw_first + i) * kWeights;
    vf of_x[Gates], of_h[Gates], bias[4];
    for (int v = 0; v < Gates; ++v) {
      of_x[v] = (load(gates + v * kLanes) - x.mean) * x.scale * load(a.variant.ln_ih + u * kWeights + v * kLanes);
      of_h[v] = (load(raw + v * kLanes) - h.mean) * h.scale * load(a.variant.ln_hh + u * kWeights + v * kLanes);
    }
    for (int v = 0; v < 4; ++v) bias[v] = load(a.bias + u * kPanel + v * kLanes);
    const vf first_gate = of_x[0] + of_h[0] + bias[0], second = of_x[1] + of_h[1] + bias[1];
    if constexpr (kLstm)
      store(new_c(i) + u * kLanes, cell(step, i, u, gates, first_gate, second, of_x[2] + of_h[2] + bias[2],
                                        of_x[3] + of_h[3] + bias[3]));
    else
      cell(step, i, u, gates, first_gate, second, of_x[2] + bias[2], of_h[2] + bias[3]);
  }

  void normed_hidden(const Walk& step, int64_t i, int64_t u, int64_t first, Moments c) const {
    const int64_t at = u * kLanes;
    const int n = lanes_left(a.hidden, at);
    const vf normed = (load(new_c(i) + at) - c.mean) * c.scale * load_lanes(a.variant.ln_c + at, n) +
                      load_or_zero(a.variant.ln_c_bias, at, n);
    lstm_hidden(step, i, u, load(gates_ + (u * gate_rows_ + first + i) * kPanel + 3 * kLanes), normed);
  }

  // From what the gates' nonlinearities take, of a GRU r's, z's, x_n and h_n; writes what the backward pass wants of
  // them. LSTM: writes c' and gives c~. GRU: writes h' and m h'.
  FASTLM_MEMBER vf cell(const Walk& step, int64_t row, int64_t u, float* gates, vf i, vf f, vf g, vf o) const {
    if constexpr (kLstm) return lstm_cell(step, row, u, gates, i, f, g, o);
    const vf r = sigmoid(i), z = sigmoid(f), candidate = tanh(g + r * o);
    store(gates, r);
    store(gates + kLanes, z);
    store(gates + 2 * kLanes, candidate);
    store(gates + 3 * kLanes, o);
    const int64_t at = u * kLanes;
    const int n = lanes_left(a.hidden, at);
    const vf old = load_lanes(state_before(step, a.output, a.h0, a.hidden)[row] + at, n);
    write_hidden(step, row, at, n, candidate + z * (old - candidate), old);
    return vf{};
  }

  FASTLM_MEMBER vf lstm_cell(const Walk& step, int64_t row, int64_t u, float* gates, vf i, vf f, vf g, vf o) const {
    i = sigmoid(i), f = sigmoid(f), g = tanh(g), o = sigmoid(o);
    store(gates, i);
    store(gates + kLanes, f);
    store(gates + 2 * kLanes, g);
    store(gates + 3 * kLanes, o);
    const int64_t at = u * kLanes, width = a.hidden;
    const int n = lanes_left(width, at);
    // Cell states are in `cells` where they are saved; else c_n holds each row's newest.
    const Rows before = save_ ? state_before(step, a.cells, a.c0, width) : Rows{a.c_n, a.c0, step.rows_before(), width};
    const vf old = load_lanes(before[row] + at, n), fresh = f * old + i * g;
    const float* const keep = shares_of(a.variant.zoneout_c, a.variant, step.begin + row);
    const vf c = fresh + load_or_zero(keep, at, n) * (old - fresh);
    if (save_) store_lanes(a.cells + (step.begin + row) * width + at, c, n);
    if (!save_ || row >= step.rows_after()) store_lanes(a.c_n + row * width + at, c, n);
    return fresh;
  }

  FASTLM_MEMBER void lstm_hidden(const Walk& step, int64_t row, int64_t u, vf o, vf c) const {
    const int64_t at = u * kLanes;
    const int n = lanes_left(a.hidden, at);
    const vf h = o * tanh(c);
    if (a.variant.zoneout_h == nullptr) return write_hidden(step, row, at, n, h, h);
    write_hidden(step, row, at, n, h, load_lanes(state_before(step, a.output, a.h0, a.hidden)[row] + at, n));
  }

  // Writes h' and m h', given h~ and the old h.
  FASTLM_MEMBER void write_hidden(const Walk& step, int64_t row, int64_t at, int n, vf h, vf old) const {
    const int64_t width = a.hidden, place = (step.begin + row) * width + at;
    if (const float* keep = shares_of(a.variant.zoneout_h, a.variant, step.begin + row))
      h += load_lanes(keep + at, n) * (old - h);
    store_lanes(a.output + place, h, n);
    if (a.dropped != nullptr)
      store_lanes(a.dropped + place, h * load_lanes(a.variant.dropout + row * width + at, n), n);
    if (row >= step.rows_after()) store_lanes(a.h_n + row * width + at, h, n);
  }

  const VariantForward& a;
  const bool norm_, digits_;
  bool save_;
  int64_t total_, panels_, gate_rows_, raw_rows_;  // gate_rows, raw_rows: of each panel of gates_ and raw_
  float* gates_;             // [H/L][gate_rows][4][L]
  float* raw_ = nullptr;     // [H/L][raw_rows][G][L], with layer normalisation, as new_c_ and the sums: W_hh (m h)
  float* new_c_ = nullptr;   // [B, padded H]: c~ of the step
  PanelSums of_x_, of_h_, of_c_;
  InputRows input_rows_;     // of a chunk
  float* zeros_ = nullptr;   // [H/L][4][L]: in place of a bias, which normalised sums are given later
  GradientDigits states_;    // m h before the step: as gradients, it has no bound known beforehand
  int64_t scratch_;          // floats in use
};

template <typename Run>
auto with_layer(const VariantForward& args, const Run& run) {
  return args.gates == 4 ? run(Forward<4>(args)) : run(Forward<3>(args));
}

}  // namespace

int64_t variant_forward_scratch(const VariantForward& args) {
  return with_layer(args, [](auto&& layer) { return layer.scratch(); });
}

void variant_forward(const VariantForward& args) {
  with_layer(args, [](auto&& layer) {
    parallel(layer.threads(), [&](int thread, int threads, Barrier& barrier) { layer.run(thread, threads, barrier); });
  });
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
