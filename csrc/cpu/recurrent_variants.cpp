#include "panel_sums.h"

namespace fastlm {
namespace FASTLM_ISA {

namespace {

// Of an LSTM (4 gates) or a GRU (3).
template <int Gates>
class Forward {
 public:
  explicit Forward(const VariantForward& args) : a(args), norm_(args.variant.ln_ih != nullptr) {
    total_ = total_rows(a.batch_sizes, a.steps);
    panels_ = panels_for(a.hidden, kLanes);
    save_ = a.activated != nullptr;
    const int64_t batch = a.batch_sizes[0];
    gate_rows_ = save_ ? total_ : chunk_rows(batch);
    raw_rows_ = save_ ? total_ : batch;
    float* scratch = a.scratch;
    const auto take = [&scratch](int64_t floats) { return (scratch += floats) - floats; };
    gates_ = save_ ? a.activated : take(panels_ * gate_rows_ * kPanel);
    if (!norm_) return;
    raw_ = save_ ? a.raw_hh : take(panels_ * batch * kWeights);
    of_x_ = take(PanelSums::size(gate_rows_, panels_));
    of_h_ = take(PanelSums::size(batch, panels_));
    if (!kLstm) return;
    of_c_ = take(PanelSums::size(batch, panels_));
    new_c_ = take(batch * padded(a.hidden));
  }
  // As in the constructor.
  static int64_t scratch(int64_t rows, int64_t batch, int64_t hidden, bool norm, bool save) {
    const int64_t panels = panels_for(hidden, kLanes), gate_rows = save ? rows : chunk_rows(batch);
    int64_t floats = save ? 0 : panels * gate_rows * kPanel;
    if (norm && !save) floats += panels * batch * kWeights;
    if (norm) floats += PanelSums::size(gate_rows + batch, panels);
    return norm && kLstm ? floats + PanelSums::size(batch, panels) + batch * padded(hidden) : floats;
  }

  int threads() const {
    return useful_threads(a.threads, total_ / a.steps * Gates * a.hidden * a.hidden, panels_);
  }

  void run(int thread, int threads, Barrier& barrier) {
    const Range own = share(panels_, thread, threads);
    const auto base = [&](int64_t low) { return save_ ? 0 : low; };  // the row that gates_ begins with
    const PanelSums of_x(of_x_, panels_, kWeights, Gates * a.hidden), of_h(of_h_, panels_, kWeights, Gates * a.hidden),
        of_c(of_c_, panels_, kLanes, a.hidden);
    const auto inputs = [&](int64_t low, int64_t high) {
      for (int64_t u = own.begin; u < own.end; ++u) input_panel(u, low, high, base(low), of_x);
    };
    bool back = false;
    walk_in_chunks(a.batch_sizes, a.steps, total_, a.reverse, inputs, [&](const Walk& step, int64_t low) {
      const int64_t first = step.begin - base(low), raw_first = save_ ? step.begin : 0;
      sweep(own, back, [&](int64_t u) {
        float* const gates = gates_ + (u * gate_rows_ + first) * kPanel;
        if (norm_) return raw_panel(step, u, raw_ + (u * raw_rows_ + raw_first) * kWeights, of_h);
        // A GRU's h_n is apart from x_n, in the fourth vector: it is multiplied by r.
        hidden_product<3>(step, u, gates, kPanel);
        for (int64_t i = 0; i < step.rows(); ++i) {
          const vf c = cell(step, i, u, gates + i * kPanel, load(gates + i * kPanel), load(gates + i * kPanel + kLanes),
                            load(gates + i * kPanel + 2 * kLanes), load(gates + i * kPanel + 3 * kLanes));
          if (kLstm) lstm_hidden(step, i, u, load(gates + i * kPanel + 3 * kLanes), c);
        }
      });
      barrier.wait();
      if (!norm_) return;
      for (int64_t i = 0; i < step.rows(); ++i) {
        const Moments x = of_x.moments(first + i), h = of_h.moments(i);
        if (thread == 0) keep_moments(step.begin + i, 0, x), keep_moments(step.begin + i, 2, h);
        for (int64_t u = own.begin; u < own.end; ++u) normed_cell(step, i, u, first, raw_first, x, h, of_c);
      }
      barrier.wait();
      if (!kLstm) return;
      for (int64_t i = 0; i < step.rows(); ++i) {
        const Moments c = of_c.moments(i);
        if (thread == 0) keep_moments(step.begin + i, 4, c);
        for (int64_t u = own.begin; u < own.end; ++u) {
          const int64_t at = u * kLanes;
          const int n = lanes_left(a.hidden, at);
          const vf normed = (load(new_c(i) + at) - c.mean) * c.scale * load_lanes(a.variant.ln_c + at, n) +
                            load_or_zero(a.variant.ln_c_bias, at, n);
          lstm_hidden(step, i, u, load(gates_ + (u * gate_rows_ + first + i) * kPanel + 3 * kLanes), normed);
        }
      }
      barrier.wait();
    });
  }

 private:
  static constexpr bool kLstm = Gates == 4;
  static constexpr int64_t kWeights = Gates * kLanes;  // columns of a panel of weights

  float* new_c(int64_t i) const { return new_c_ + i * padded(a.hidden); }

  void keep_moments(int64_t row, int64_t which, Moments moments) const {
    if (a.stats == nullptr) return;
    a.stats[which * total_ + row] = moments.mean;
    a.stats[(which + 1) * total_ + row] = moments.scale;
  }

  void input_panel(int64_t u, int64_t low, int64_t high, int64_t base, const PanelSums& of_x) {
    float* gates = gates_ + (u * gate_rows_ + low - base) * kPanel;
    if (norm_)
      std::memset(gates, 0, (high - low) * kPanel * sizeof(float));
    else
      fill_bias(gates, a.bias + u * kPanel, high - low);
    panel_product<Gates>({a.input + low * a.inputs, nullptr, high - low, a.inputs}, high - low,
                         a.w_ih + u * a.inputs * kWeights, a.inputs, gates, kPanel);
    if (!norm_) return;
    const int n = lanes_left(a.hidden, u * kLanes);
    for (int64_t row = low; row < high; ++row, gates += kPanel) {
      of_x.set<Gates>(row - base, u, gates, n);
      if (save_)
        for (int v = 0; v < Gates; ++v)
          store_lanes(a.raw_ih + (row * Gates + v) * a.hidden + u * kLanes, load(gates + v * kLanes), n);
    }
  }

  // The last gate's product goes to the vector `Last`.
  template <int Last>
  void hidden_product(const Walk& step, int64_t u, float* out, int64_t stride) {
    const Rows h = state_before(step, a.dropped != nullptr ? a.dropped : a.output, a.h0_dropped, a.hidden);
    panel_product<Gates, Last>(h, step.rows(), a.w_hh + u * a.hidden * kWeights, a.hidden, out, stride);
  }

  void raw_panel(const Walk& step, int64_t u, float* raw, const PanelSums& of_h) {
    std::memset(raw, 0, step.rows() * kWeights * sizeof(float));
    hidden_product<Gates - 1>(step, u, raw, kWeights);
    for (int64_t i = 0; i < step.rows(); ++i)
      of_h.set<Gates>(i, u, raw + i * kWeights, lanes_left(a.hidden, u * kLanes));
  }

  void normed_cell(const Walk& step, int64_t i, int64_t u, int64_t first, int64_t raw_first, Moments x, Moments h,
                   const PanelSums& of_c) {
    float* const gates = gates_ + (u * gate_rows_ + first + i) * kPanel;
    const float* const raw = raw_ + (u * raw_rows_ + raw_first + i) * kWeights;
    vf of_x[Gates], of_h[Gates], bias[4];
    for (int v = 0; v < Gates; ++v) {
      of_x[v] = (load(gates + v * kLanes) - x.mean) * x.scale * load(a.variant.ln_ih + u * kWeights + v * kLanes);
      of_h[v] = (load(raw + v * kLanes) - h.mean) * h.scale * load(a.variant.ln_hh + u * kWeights + v * kLanes);
    }
    for (int v = 0; v < 4; ++v) bias[v] = load(a.bias + u * kPanel + v * kLanes);
    const vf first_gate = of_x[0] + of_h[0] + bias[0], second = of_x[1] + of_h[1] + bias[1];
    if constexpr (kLstm) {
      store(new_c(i) + u * kLanes, cell(step, i, u, gates, first_gate, second, of_x[2] + of_h[2] + bias[2],
                                        of_x[3] + of_h[3] + bias[3]));
      of_c.set<1>(i, u, new_c(i) + u * kLanes, lanes_left(a.hidden, u * kLanes));
    } else {
      cell(step, i, u, gates, first_gate, second, of_x[2] + bias[2], of_h[2] + bias[3]);
    }
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
  const bool norm_;
  bool save_;
  int64_t total_, panels_, gate_rows_, raw_rows_;  // gate_rows, raw_rows: of each panel of gates_ and raw_
  float* gates_;           // [H/L][gate_rows][4][L]
  float* raw_ = nullptr;   // [H/L][raw_rows][G][L], with layer normalisation, as all below: W_hh (m h)
  float* new_c_ = nullptr;  // [B, padded H]: c~ of the step
  float *of_x_ = nullptr, *of_h_ = nullptr, *of_c_ = nullptr;  // PanelSums' memory
};

template <int Gates>
void run(const VariantForward& args) {
  Forward<Gates> layer(args);
  parallel(layer.threads(), [&](int thread, int threads, Barrier& barrier) { layer.run(thread, threads, barrier); });
}

}  // namespace

int64_t variant_forward_scratch(int64_t gates, int64_t rows, int64_t batch, int64_t hidden, bool norm, bool save) {
  return gates == 4 ? Forward<4>::scratch(rows, batch, hidden, norm, save)
                    : Forward<3>::scratch(rows, batch, hidden, norm, save);
}

void variant_forward(const VariantForward& args) { args.gates == 4 ? run<4>(args) : run<3>(args); }

}  // namespace FASTLM_ISA
}  // namespace fastlm
