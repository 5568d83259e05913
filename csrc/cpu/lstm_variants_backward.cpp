#include "panel_sums.h"

namespace fastlm {
namespace FASTLM_ISA {

namespace {

class Backward {
 public:
  explicit Backward(const LstmVariantBackward& args) : a(args), norm_(args.variant.ln_ih != nullptr) {
    total_ = total_rows(a.batch_sizes, a.steps);
    stride_ = padded(a.hidden);
    panels_ = panels_for(a.hidden, kPanel);
    const int64_t rows = a.batch_sizes[0];
    carry_ = a.scratch;
    kept_ = carry_ + rows * stride_;
    if (!norm_) return;
    grad_c_normed_ = kept_ + rows * stride_;
    of_c_ = grad_c_normed_ + rows * stride_;
    of_gates_ = of_c_ + PanelSums::size(rows, panels_);
  }
  static int64_t scratch(int64_t batch, int64_t hidden, bool norm) {
    const int64_t sums = norm ? PanelSums::size(2 * batch, panels_for(hidden, kPanel)) : 0;
    return batch * padded(hidden) * (norm ? 3 : 2) + sums;
  }

  int threads() const {
    return useful_threads(a.threads, total_ / a.steps * 4 * a.hidden * a.hidden, panels_);
  }

  void run(int thread, int threads, Barrier& barrier) {
    const Range own = share(panels_, thread, threads);
    const int64_t batch = a.batch_sizes[0], width = a.hidden;
    const PanelSums of_c(of_c_, panels_, kPanel, width), of_gates(of_gates_, panels_, 4 * kPanel, 4 * width);
    const float* const grad_raw = norm_ ? a.grad_raw_hh : a.grad_gates;
    bool back = false;
    copy_columns(own, batch, width, a.grad_h_n, width, carry_, stride_);
    copy_columns(own, batch, width, a.grad_c_n, width, a.grad_c0, width);
    if (norm_) {
      copy_columns(own, 4, width, nullptr, width, a.grad_ln_hh, width);
      copy_columns(own, 1, width, nullptr, width, a.grad_ln_c, width);
      copy_columns(own, 1, width, nullptr, width, a.grad_ln_c_bias, width);
    }
    for (Walk step(a.batch_sizes, a.steps, total_, !a.reverse); !step.done(); step.advance()) {
      const Rows c_before = backward_state(step, a.cells, a.c0, width);
      const Rows h_before = backward_state(step, a.dropped != nullptr ? a.dropped : a.output, a.h0_dropped, width);
      const auto each = [&](const auto& visit) {  // of the rows, the vectors of units of the own panels
        for (int64_t i = 0; i < step.rows(); ++i)
          for (int64_t p = own.begin; p < own.end; ++p) visit(i, p);
      };
      each([&](int64_t i, int64_t p) {
        const Unit row{step.begin + i, i, c_before[i]};
        if (a.previous != nullptr) copy_columns({p, p + 1}, 1, width, h_before[i], 0, a.previous + row.row * width, 0);
        if (!norm_) return plain_panel(row, p);
        const Moments sums = cell_sums(row, p);
        of_c.set(i, p, sums.mean, sums.scale);
      });
      barrier.wait();
      if (norm_) {
        for (int64_t i = 0; i < step.rows(); ++i) {
          const Moments means = of_c.means(i);
          for (int64_t p = own.begin; p < own.end; ++p) {
            const Moments sums = gate_sums({step.begin + i, i, c_before[i]}, p, means);
            of_gates.set(i, p, sums.mean, sums.scale);
          }
        }
        barrier.wait();
        for (int64_t i = 0; i < step.rows(); ++i) {
          const Moments means = of_gates.means(i);
          for (int64_t p = own.begin; p < own.end; ++p) raw_panel(step.begin + i, p, means);
        }
        barrier.wait();
      }
      sweep(own, back, [&](int64_t p) {
        float* const carry = carry_ + p * kPanel;
        for (int64_t i = 0; i < step.rows(); ++i) std::memset(carry + i * stride_, 0, kPanel * sizeof(float));
        panel_product({grad_raw + step.begin * 4 * width, nullptr, step.rows(), 4 * width}, step.rows(),
                      a.w_hh + p * 4 * width * kPanel, 4 * width, carry, stride_);
        for (int64_t i = 0; i < step.rows(); ++i) add_kept(i, p);
      });
    }
    copy_columns(own, batch, width, carry_, stride_, a.grad_h0, width);
  }

 private:
  struct Unit {
    int64_t row, i;         // of all rows, and of the step's
    const float* c_before;  // [H]
  };
  template <typename Visit>
  FASTLM_MEMBER void vectors(int64_t p, const Visit& visit) const {
    for (int64_t at = p * kPanel; at < (p + 1) * kPanel && at < a.hidden; at += kLanes)
      visit(at, lanes_left(a.hidden, at));
  }
  const float* gates(int64_t row, int64_t at) const { return a.gates + (at / kLanes * total_ + row) * kPanel; }
  float stat(int64_t which, int64_t row) const { return a.stats[which * total_ + row]; }

  // The gradient of h~: what is carried and the output's own, without what goes to the old h past the step, in `kept`.
  FASTLM_MEMBER vf grad_new_h(const Unit& u, int64_t at, int n) const {
    vf grad = load_lanes(carry_ + u.i * stride_ + at, n);  // beyond them nothing may have been written
    if (a.grad_output != nullptr) grad += load_lanes(a.grad_output + u.row * a.hidden + at, n);
    const vf kept = grad * load_or_zero(shares_of(a.variant.zoneout_h, a.variant, u.row), at, n);
    store(kept_ + u.i * stride_ + at, kept);
    return grad - kept;
  }
  // Given c~'s gradient by way of h~, those of i, f, g before activation; c's own goes on to the c before.
  FASTLM_MEMBER void cell_gradients(const Unit& u, int64_t at, int n, vf grad_by_h) const {
    const float* const gate = gates(u.row, at);
    const vf i = load(gate), f = load(gate + kLanes), g = load(gate + 2 * kLanes);
    float* const grad_c = a.grad_c0 + u.i * a.hidden + at;
    const vf after = load_lanes(grad_c, n);
    const vf kept = after * load_or_zero(shares_of(a.variant.zoneout_c, a.variant, u.row), at, n);
    const vf grad = after - kept + grad_by_h;
    float* const out = a.grad_gates + u.row * 4 * a.hidden + at;
    store_lanes(out, grad * g * i * (1.0f - i), n);
    store_lanes(out + a.hidden, grad * load_lanes(u.c_before + at, n) * f * (1.0f - f), n);
    store_lanes(out + 2 * a.hidden, grad * i * (1.0f - g * g), n);
    store_lanes(grad_c, kept + grad * f, n);
  }
  // c~ anew: with zoneout the saved c' is another.
  FASTLM_MEMBER vf new_c(const Unit& u, int64_t at, int n) const {
    const float* const gate = gates(u.row, at);
    return load(gate + kLanes) * load_lanes(u.c_before + at, n) + load(gate) * load(gate + 2 * kLanes);
  }
  // Writes o's gradient before activation; gives that of tanh's argument.
  FASTLM_MEMBER vf grad_tanh(const Unit& u, int64_t at, int n, vf argument) const {
    const vf grad = grad_new_h(u, at, n), o = load(gates(u.row, at) + 3 * kLanes), t = tanh(argument);
    store_lanes(a.grad_gates + (u.row * 4 + 3) * a.hidden + at, grad * t * o * (1.0f - o), n);
    return grad * o * (1.0f - t * t);
  }

  void plain_panel(const Unit& u, int64_t p) const {
    vectors(p, [&](int64_t at, int n) { cell_gradients(u, at, n, grad_tanh(u, at, n, new_c(u, at, n))); });
  }

  FASTLM_MEMBER static void add(float* sum, vf value, int n) { store_lanes(sum, load_lanes(sum, n) + value, n); }

  // The first of three passes with layer normalisation: the gradient of N(c~), and the sums its own gradient needs.
  Moments cell_sums(const Unit& u, int64_t p) const {
    vf first = {}, second = {};
    vectors(p, [&](int64_t at, int n) {
      const vf gain = load_lanes(a.variant.ln_c + at, n), normed = (new_c(u, at, n) - stat(4, u.row)) * stat(5, u.row);
      const vf grad = grad_tanh(u, at, n, normed * gain + load_or_zero(a.variant.ln_c_bias, at, n));
      add(a.grad_ln_c + at, grad * normed, n);
      add(a.grad_ln_c_bias + at, grad, n);
      store(grad_c_normed_ + u.i * stride_ + at, grad * gain);
      first += grad * gain;
      second += grad * gain * normed;
    });
    return {reduce_add(first), reduce_add(second)};
  }
  // The second: the gates' gradients before activation, and the sums for that of (m h) W_hh^T.
  Moments gate_sums(const Unit& u, int64_t p, Moments means) const {
    vf first = {}, second = {};
    const float mean = stat(2, u.row), scale = stat(3, u.row);
    vectors(p, [&](int64_t at, int n) {
      const vf normed = (new_c(u, at, n) - stat(4, u.row)) * stat(5, u.row);
      const vf grad = load(grad_c_normed_ + u.i * stride_ + at) - means.mean - normed * means.scale;
      cell_gradients(u, at, n, grad * stat(5, u.row));
      for (int v = 0; v < 4; ++v) {
        const vf of_gate = load_lanes(a.grad_gates + (u.row * 4 + v) * a.hidden + at, n);
        const vf of_normed = of_gate * load(a.variant.ln_hh + (at / kLanes * 4 + v) * kLanes);
        const vf raw = (load(raw_hh(u.row, at, v)) - mean) * scale;
        add(a.grad_ln_hh + v * a.hidden + at, of_gate * raw, n);
        first += of_normed;
        second += of_normed * raw;
      }
    });
    return {reduce_add(first), reduce_add(second)};
  }
  // The third: the gradient of (m h) W_hh^T.
  void raw_panel(int64_t row, int64_t p, Moments means) const {
    const float mean = stat(2, row), scale = stat(3, row);
    vectors(p, [&](int64_t at, int n) {
      for (int v = 0; v < 4; ++v) {
        const int64_t place = (row * 4 + v) * a.hidden + at;
        const vf grad = load_lanes(a.grad_gates + place, n) * load(a.variant.ln_hh + (at / kLanes * 4 + v) * kLanes);
        const vf normed = (load(raw_hh(row, at, v)) - mean) * scale;
        store_lanes(a.grad_raw_hh + place, (grad - means.mean - normed * means.scale) * scale, n);
      }
    });
  }
  const float* raw_hh(int64_t row, int64_t at, int v) const {
    return a.raw_hh + ((at / kLanes * total_ + row) * 4 + v) * kLanes;
  }

  void add_kept(int64_t i, int64_t p) const {
    vectors(p, [&](int64_t at, int n) {
      float* const carry = carry_ + i * stride_ + at;
      vf grad = load(carry);
      if (a.variant.dropout != nullptr) grad *= load_lanes(a.variant.dropout + i * a.hidden + at, n);
      store(carry, grad + load(kept_ + i * stride_ + at));
    });
  }

  const LstmVariantBackward& a;
  const bool norm_;
  int64_t total_, panels_, stride_;
  float* carry_;  // [B, stride], as all of these: dh
  float* kept_;   // what of it goes to the h before by zoneout
  float* grad_c_normed_ = nullptr;                 // the gradient of N(c~) times the gain
  float *of_c_ = nullptr, *of_gates_ = nullptr;    // PanelSums' memory
};

}  // namespace

int64_t lstm_variant_backward_scratch(int64_t batch, int64_t hidden, bool norm) {
  return Backward::scratch(batch, hidden, norm);
}

void lstm_variant_backward(const LstmVariantBackward& args) {
  Backward layer(args);
  parallel(layer.threads(), [&](int thread, int threads, Barrier& barrier) { layer.run(thread, threads, barrier); });
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
