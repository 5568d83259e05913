#include "panel_sums.h"

namespace fastlm {
namespace FASTLM_ISA {

namespace {

class Forward {
 public:
  explicit Forward(const LstmVariantForward& args) : a(args), norm_(args.variant.ln_ih != nullptr) {
    total_ = total_rows(a.batch_sizes, a.steps);
    panels_ = panels_for(a.hidden, kLanes);
    save_ = a.gates != nullptr;
    const int64_t batch = a.batch_sizes[0];
    gate_rows_ = save_ ? total_ : chunk_rows(batch);
    raw_rows_ = save_ ? total_ : batch;
    float* scratch = a.scratch;
    const auto take = [&scratch](int64_t floats) { return (scratch += floats) - floats; };
    gates_ = save_ ? a.gates : take(panels_ * gate_rows_ * kPanel);
    if (!norm_) return;
    raw_ = save_ ? a.raw_hh : take(panels_ * batch * kPanel);
    new_c_ = take(batch * padded(a.hidden));
    of_x_ = take(PanelSums::size(gate_rows_, panels_));
    of_h_ = take(PanelSums::size(batch, panels_));
    of_c_ = take(PanelSums::size(batch, panels_));
  }
  // As in the constructor.
  static int64_t scratch(int64_t rows, int64_t batch, int64_t hidden, bool norm, bool save) {
    const int64_t panels = panels_for(hidden, kLanes), gate_rows = save ? rows : chunk_rows(batch);
    const int64_t tiles = save ? 0 : panels * kPanel * (gate_rows + (norm ? batch : 0));
    return tiles + (norm ? batch * padded(hidden) + PanelSums::size(gate_rows + 2 * batch, panels) : 0);
  }

  int threads() const {
    return useful_threads(a.threads, total_ / a.steps * 4 * a.hidden * a.hidden, panels_);
  }

  void run(int thread, int threads, Barrier& barrier) {
    const Range own = share(panels_, thread, threads);
    const auto base = [&](int64_t low) { return save_ ? 0 : low; };  // the row that gates_ begins with
    const PanelSums of_x(of_x_, panels_, kPanel, 4 * a.hidden), of_h(of_h_, panels_, kPanel, 4 * a.hidden),
        of_c(of_c_, panels_, kLanes, a.hidden);
    const auto inputs = [&](int64_t low, int64_t high) {
      for (int64_t u = own.begin; u < own.end; ++u) input_panel(u, low, high, base(low), of_x);
    };
    bool back = false;
    walk_in_chunks(a.batch_sizes, a.steps, total_, a.reverse, inputs, [&](const Walk& step, int64_t low) {
      const int64_t first = step.begin - base(low), raw_first = save_ ? step.begin : 0;
      sweep(own, back, [&](int64_t u) {
        float* const gates = gates_ + (u * gate_rows_ + first) * kPanel;
        if (norm_) return raw_panel(step, u, raw_ + (u * raw_rows_ + raw_first) * kPanel, of_h);
        hidden_product(step, u, gates);
        for (int64_t i = 0; i < step.rows(); ++i) {
          const vf c = cell(step, i, u, gates + i * kPanel, load(gates + i * kPanel), load(gates + i * kPanel + kLanes),
                            load(gates + i * kPanel + 2 * kLanes), load(gates + i * kPanel + 3 * kLanes));
          hidden(step, i, u, load(gates + i * kPanel + 3 * kLanes), c);
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
      for (int64_t i = 0; i < step.rows(); ++i) {
        const Moments c = of_c.moments(i);
        if (thread == 0) keep_moments(step.begin + i, 4, c);
        for (int64_t u = own.begin; u < own.end; ++u) {
          const int64_t at = u * kLanes;
          const int n = lanes_left(a.hidden, at);
          const vf normed = (load(new_c(i) + at) - c.mean) * c.scale * load_lanes(a.variant.ln_c + at, n) +
                            load_or_zero(a.variant.ln_c_bias, at, n);
          hidden(step, i, u, load(gates_ + (u * gate_rows_ + first + i) * kPanel + 3 * kLanes), normed);
        }
      }
      barrier.wait();
    });
  }

 private:
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
    panel_product({a.input + low * a.inputs, nullptr, high - low, a.inputs}, high - low, a.w_ih + u * a.inputs * kPanel,
                  a.inputs, gates, kPanel);
    if (!norm_) return;
    const int n = lanes_left(a.hidden, u * kLanes);
    for (int64_t row = low; row < high; ++row, gates += kPanel) {
      of_x.set<4>(row - base, u, gates, n);
      if (save_)
        for (int v = 0; v < 4; ++v)
          store_lanes(a.raw_ih + (row * 4 + v) * a.hidden + u * kLanes, load(gates + v * kLanes), n);
    }
  }

  void hidden_product(const Walk& step, int64_t u, float* out) {
    const Rows h = state_before(step, a.dropped != nullptr ? a.dropped : a.output, a.h0_dropped, a.hidden);
    panel_product(h, step.rows(), a.w_hh + u * a.hidden * kPanel, a.hidden, out, kPanel);
  }

  void raw_panel(const Walk& step, int64_t u, float* raw, const PanelSums& of_h) {
    std::memset(raw, 0, step.rows() * kPanel * sizeof(float));
    hidden_product(step, u, raw);
    for (int64_t i = 0; i < step.rows(); ++i) of_h.set<4>(i, u, raw + i * kPanel, lanes_left(a.hidden, u * kLanes));
  }

  void normed_cell(const Walk& step, int64_t i, int64_t u, int64_t first, int64_t raw_first, Moments x, Moments h,
                   const PanelSums& of_c) {
    float* const gates = gates_ + (u * gate_rows_ + first + i) * kPanel;
    const float* const raw = raw_ + (u * raw_rows_ + raw_first + i) * kPanel;
    vf gate[4];
    for (int v = 0; v < 4; ++v) {
      const int64_t at = u * kPanel + v * kLanes;
      gate[v] = (load(gates + v * kLanes) - x.mean) * x.scale * load(a.variant.ln_ih + at) +
                (load(raw + v * kLanes) - h.mean) * h.scale * load(a.variant.ln_hh + at) + load(a.bias + at);
    }
    store(new_c(i) + u * kLanes, cell(step, i, u, gates, gate[0], gate[1], gate[2], gate[3]));
    of_c.set<1>(i, u, new_c(i) + u * kLanes, lanes_left(a.hidden, u * kLanes));
  }

  // Activates the gates, writes c', and gives c~.
  FASTLM_MEMBER vf cell(const Walk& step, int64_t row, int64_t u, float* gates, vf i, vf f, vf g, vf o) const {
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

  // Writes h' and m h'.
  FASTLM_MEMBER void hidden(const Walk& step, int64_t row, int64_t u, vf o, vf c) const {
    const int64_t at = u * kLanes, width = a.hidden, place = (step.begin + row) * width + at;
    const int n = lanes_left(width, at);
    vf h = o * tanh(c);
    if (const float* keep = shares_of(a.variant.zoneout_h, a.variant, step.begin + row))
      h += load_lanes(keep + at, n) * (load_lanes(state_before(step, a.output, a.h0, width)[row] + at, n) - h);
    store_lanes(a.output + place, h, n);
    if (a.dropped != nullptr)
      store_lanes(a.dropped + place, h * load_lanes(a.variant.dropout + row * width + at, n), n);
    if (row >= step.rows_after()) store_lanes(a.h_n + row * width + at, h, n);
  }

  const LstmVariantForward& a;
  const bool norm_;
  bool save_;
  int64_t total_, panels_, gate_rows_, raw_rows_;  // gate_rows, raw_rows: of each panel of gates_ and raw_
  float* gates_;           // [H/L][gate_rows][4][L]
  float* raw_ = nullptr;   // [H/L][raw_rows][4][L], with layer normalisation, as all below: (m h) W_hh^T
  float* new_c_ = nullptr;  // [B, padded H]: c~ of the step
  float *of_x_ = nullptr, *of_h_ = nullptr, *of_c_ = nullptr;  // PanelSums' memory
};

}  // namespace

int64_t lstm_variant_forward_scratch(int64_t rows, int64_t batch, int64_t hidden, bool norm, bool save) {
  return Forward::scratch(rows, batch, hidden, norm, save);
}

void lstm_variant_forward(const LstmVariantForward& args) {
  Forward layer(args);
  parallel(layer.threads(), [&](int thread, int threads, Barrier& barrier) { layer.run(thread, threads, barrier); });
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
