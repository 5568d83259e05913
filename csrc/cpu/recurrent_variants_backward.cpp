#include "panel_sums.h"

namespace fastlm {
namespace FASTLM_ISA {

namespace {

// Of an LSTM (4 gates) or a GRU (3).
template <int Gates>
class Backward {
 public:
  explicit Backward(const VariantBackward& args)
      : a(args), norm_(args.variant.ln_ih != nullptr), digits_(kHasDigits && args.digits) {
    total_ = total_rows(a.batch_sizes, a.steps);
    stride_ = padded(a.hidden);
    panels_ = panels_for(a.hidden, kPanel);
    const int64_t rows = a.batch_sizes[0];
    float* scratch = a.scratch;
    carry_ = take_floats(scratch, rows * stride_);
    kept_ = take_floats(scratch, rows * stride_);
    if (digits_) grads_ = GradientDigits(scratch, rows, Gates, a.hidden, a.threads);
    if (norm_) of_gates_ = PanelSums(scratch, rows, panels_, Gates * kPanel, Gates * a.hidden);
    if (norm_ && kLstm) {
      of_c_ = PanelSums(scratch, rows, panels_, kPanel, a.hidden);
      grad_c_normed_ = take_floats(scratch, rows * stride_);
    }
    scratch_ = scratch - a.scratch;
  }

  int64_t scratch() const { return scratch_; }

  int threads() const {
    return useful_threads(a.threads, total_ / a.steps * Gates * a.hidden * a.hidden, panels_);
  }

  void run(int thread, int threads, Barrier& barrier) {
    const Range own = share(panels_, thread, threads);
    const int64_t batch = a.batch_sizes[0], width = a.hidden, wide = Gates * width;
    const float* const grad_raw = a.grad_raw_hh != nullptr ? a.grad_raw_hh : a.grad_gates;
    bool back = false;
    DigitTiles tiles;
    copy_columns(own, batch, width, a.grad_h_n, width, carry_, stride_);
    if (kLstm) copy_columns(own, batch, width, a.grad_c_n, width, a.grad_c0, width);
    if (norm_) {
      copy_columns(own, Gates, width, nullptr, width, a.grad_ln_hh, width);
      float* const sums[] = {a.grad_b_hn, a.grad_ln_c, a.grad_ln_c_bias};
      for (float* sum : sums)
        if (sum != nullptr) copy_columns(own, 1, width, nullptr, width, sum, width);
    }
    for (Walk step(a.batch_sizes, a.steps, total_, !a.reverse); !step.done(); step.advance()) {
      const Rows before = backward_state(step, kLstm ? a.cells : a.output, kLstm ? a.c0 : a.h0, width);
      const Rows h_before = backward_state(step, a.dropped != nullptr ? a.dropped : a.output, a.h0_dropped, width);
      for (int64_t i = 0; i < step.rows(); ++i)
        for (int64_t p = own.begin; p < own.end; ++p) {  // the vectors of units of the own panels
          const Unit row{step.begin + i, i, before[i]};
          if (a.previous != nullptr)
            copy_columns({p, p + 1}, 1, width, h_before[i], 0, a.previous + row.row * width, 0);
          if constexpr (kLstm)
            norm_ ? of_c_.set(i, p, cell_sums(row, p)) : plain_panel(row, p);
          else
            norm_ ? of_gates_.set(i, p, gru_panel(row, p)) : void(gru_panel(row, p));
        }
      if (norm_) {
        barrier.wait();
        if constexpr (kLstm) {
          each_row(step, of_c_, [&](int64_t i, Moments means) {
            for (int64_t p = own.begin; p < own.end; ++p)
              of_gates_.set(i, p, gate_sums({step.begin + i, i, before[i]}, p, means));
          });
          barrier.wait();
        }
        each_row(step, of_gates_, [&](int64_t i, Moments means) {
          for (int64_t p = own.begin; p < own.end; ++p) raw_panel(step.begin + i, p, means);
        });
      }
      const float* const grads = grad_raw + step.begin * wide;
      if (digits_) {
        grads_.put(grads, step.rows(), {own.begin * kPanel, own.end * kPanel}, thread, threads, barrier);
        tiles.set_rows(step.rows(), grads_.few());
      } else {
        barrier.wait();
      }
      sweep(own, back, [&](int64_t p) {
        float* const carry = carry_ + p * kPanel;
        for (int64_t i = 0; i < step.rows(); ++i) std::memset(carry + i * stride_, 0, kPanel * sizeof(float));
        if (digits_)
          grads_.product(step.rows(), static_cast<const uint8_t*>(a.w_hh) + p * grads_.panel_bytes(), thread, carry,
                         stride_);
        else
          panel_product({grads, nullptr, step.rows(), wide}, step.rows(),
                        static_cast<const float*>(a.w_hh) + p * wide * kPanel, wide, carry, stride_);
        for (int64_t i = 0; i < step.rows(); ++i) add_kept(i, p);
      });
    }
    copy_columns(own, batch, width, carry_, stride_, a.grad_h0, width);
  }

 private:
  static constexpr bool kLstm = Gates == 4;

  struct Unit {
    int64_t row, i;       // of all rows, and of the step's
    const float* before;  // [H]: the state before the step, c of an LSTM, h of a GRU
  };
  template <typename Visit>
  static void each_row(const Walk& step, const PanelSums& sums, const Visit& visit) {
    for (int64_t i = 0; i < step.rows(); i += kLanes) {
      const RowMoments means = sums.means(i);
      for (int64_t r = 0; r < kLanes && i + r < step.rows(); ++r) visit(i + r, means[r]);
    }
  }
  template <typename Visit>
  FASTLM_MEMBER void vectors(int64_t p, const Visit& visit) const {
    for (int64_t at = p * kPanel; at < (p + 1) * kPanel && at < a.hidden; at += kLanes)
      visit(at, lanes_left(a.hidden, at));
  }
  const float* activated(int64_t row, int64_t at) const { return a.activated + (at / kLanes * total_ + row) * kPanel; }
  float stat(int64_t which, int64_t row) const { return a.stats[which * total_ + row]; }

  // The gradient of h~: what is carried and the output's own, without what goes to the old h past the step, in `kept`.
  FASTLM_MEMBER vf grad_new_h(const Unit& u, int64_t at, int n) const {
    vf grad = load_lanes(carry_ + u.i * stride_ + at, n);  // beyond them nothing may have been written
    if (a.grad_output != nullptr) grad += load_lanes(a.grad_output + u.row * a.hidden + at, n);
    const vf kept = grad * load_or_zero(shares_of(a.variant.zoneout_h, a.variant, u.row), at, n);
    store(kept_ + u.i * stride_ + at, kept);
    return grad - kept;
  }
  FASTLM_MEMBER static void add(float* sum, vf value, int n) { store_lanes(sum, load_lanes(sum, n) + value, n); }

  // A GRU's first pass: gradients of x and of N(W_hh (m h)), the latter with normalisation not yet W_hh (m h)'s, of
  // which it gives the sums that are needed for it.
  FASTLM_MEMBER Moments gru_panel(const Unit& u, int64_t p) const {
    Sums sums;
    vectors(p, [&](int64_t at, int n) {
      const float* const gate = activated(u.row, at);
      const vf r = load(gate), z = load(gate + kLanes), candidate = load(gate + 2 * kLanes);
      const vf grad = grad_new_h(u, at, n);
      float* const kept = kept_ + u.i * stride_ + at;
      store(kept, load(kept) + grad * z);
      const vf of_n = grad * (1.0f - z) * (1.0f - candidate * candidate);
      const vf of_r = of_n * load(gate + 3 * kLanes) * r * (1.0f - r);
      const vf of_z = grad * (load_lanes(u.before + at, n) - candidate) * z * (1.0f - z);
      const vf of_x[3] = {of_r, of_z, of_n}, of_h[3] = {of_r, of_z, of_n * r};
      for (int v = 0; v < 3; ++v) {
        const int64_t place = (u.row * 3 + v) * a.hidden + at;
        store_lanes(a.grad_gates + place, of_x[v], n);
        store_lanes(a.grad_raw_hh + place, of_h[v], n);
        if (norm_) normed_gate(u.row, at, n, v, of_h[v], sums);
      }
      if (norm_) add(a.grad_b_hn + at, of_h[2], n);
    });
    return sums.total();
  }

  // Given c~'s gradient by way of h~, those of i, f, g before activation; c's own goes on to the c before.
  FASTLM_MEMBER void cell_gradients(const Unit& u, int64_t at, int n, vf grad_by_h) const {
    const float* const gate = activated(u.row, at);
    const vf i = load(gate), f = load(gate + kLanes), g = load(gate + 2 * kLanes);
    float* const grad_c = a.grad_c0 + u.i * a.hidden + at;
    const vf after = load_lanes(grad_c, n);
    const vf kept = after * load_or_zero(shares_of(a.variant.zoneout_c, a.variant, u.row), at, n);
    const vf grad = after - kept + grad_by_h;
    float* const out = a.grad_gates + u.row * 4 * a.hidden + at;
    store_lanes(out, grad * g * i * (1.0f - i), n);
    store_lanes(out + a.hidden, grad * load_lanes(u.before + at, n) * f * (1.0f - f), n);
    store_lanes(out + 2 * a.hidden, grad * i * (1.0f - g * g), n);
    store_lanes(grad_c, kept + grad * f, n);
  }
  // c~ anew: with zoneout the saved c' is another.
  FASTLM_MEMBER vf new_c(const Unit& u, int64_t at, int n) const {
    const float* const gate = activated(u.row, at);
    return load(gate + kLanes) * load_lanes(u.before + at, n) + load(gate) * load(gate + 2 * kLanes);
  }
  // Writes o's gradient before activation; gives that of tanh's argument.
  FASTLM_MEMBER vf grad_tanh(const Unit& u, int64_t at, int n, vf argument) const {
    const vf grad = grad_new_h(u, at, n), o = load(activated(u.row, at) + 3 * kLanes), t = tanh(argument);
    store_lanes(a.grad_gates + (u.row * 4 + 3) * a.hidden + at, grad * t * o * (1.0f - o), n);
    return grad * o * (1.0f - t * t);
  }

  void plain_panel(const Unit& u, int64_t p) const {
    vectors(p, [&](int64_t at, int n) { cell_gradients(u, at, n, grad_tanh(u, at, n, new_c(u, at, n))); });
  }

  // The two sums over a row that the gradient of layer normalisation needs: of its gradient times the gain, and of that
  // times what was normalised.
  struct Sums {
    vf first = {}, second = {};
    FASTLM_MEMBER void add(vf grad, vf normed) { first += grad, second += grad * normed; }
    FASTLM_MEMBER Moments total() const { return {reduce_add(first), reduce_add(second)}; }
  };

  // The first of an LSTM's three passes with layer normalisation: the gradient of N(c~), and its sums.
  Moments cell_sums(const Unit& u, int64_t p) const {
    Sums sums;
    vectors(p, [&](int64_t at, int n) {
      const vf gain = load_lanes(a.variant.ln_c + at, n), normed = (new_c(u, at, n) - stat(4, u.row)) * stat(5, u.row);
      const vf grad = grad_tanh(u, at, n, normed * gain + load_or_zero(a.variant.ln_c_bias, at, n));
      add(a.grad_ln_c + at, grad * normed, n);
      add(a.grad_ln_c_bias + at, grad, n);
      store(grad_c_normed_ + u.i * stride_ + at, grad * gain);
      sums.add(grad * gain, normed);
    });
    return sums.total();
  }
  // The second: the gates' gradients before activation, and the sums for that of W_hh (m h).
  Moments gate_sums(const Unit& u, int64_t p, Moments means) const {
    Sums sums;
    vectors(p, [&](int64_t at, int n) {
      const vf normed = (new_c(u, at, n) - stat(4, u.row)) * stat(5, u.row);
      const vf grad = load(grad_c_normed_ + u.i * stride_ + at) - means.mean - normed * means.scale;
      cell_gradients(u, at, n, grad * stat(5, u.row));
      for (int v = 0; v < 4; ++v)
        normed_gate(u.row, at, n, v, load_lanes(a.grad_gates + (u.row * 4 + v) * a.hidden + at, n), sums);
    });
    return sums.total();
  }
  // The gradient of a gate's gain, and its part in the sums, given that of N(W_hh (m h)).
  FASTLM_MEMBER void normed_gate(int64_t row, int64_t at, int n, int v, vf grad, Sums& sums) const {
    const vf normed = normed_raw(row, at, v);
    add(a.grad_ln_hh + v * a.hidden + at, grad * normed, n);
    sums.add(grad * gain(at, v), normed);
  }
  // The last: the gradient of W_hh (m h).
  void raw_panel(int64_t row, int64_t p, Moments means) const {
    const float scale = stat(3, row);
    const float* const of_gates = kLstm ? a.grad_gates : a.grad_raw_hh;
    vectors(p, [&](int64_t at, int n) {
      for (int v = 0; v < Gates; ++v) {
        const int64_t place = (row * Gates + v) * a.hidden + at;
        const vf grad = load_lanes(of_gates + place, n) * gain(at, v);
        store_lanes(a.grad_raw_hh + place, (grad - means.mean - normed_raw(row, at, v) * means.scale) * scale, n);
      }
    });
  }
  FASTLM_MEMBER vf gain(int64_t at, int v) const { return load(a.variant.ln_hh + (at / kLanes * Gates + v) * kLanes); }
  FASTLM_MEMBER vf normed_raw(int64_t row, int64_t at, int v) const {
    const vf raw = load(a.raw_hh + ((at / kLanes * total_ + row) * Gates + v) * kLanes);
    return (raw - stat(2, row)) * stat(3, row);
  }

  void add_kept(int64_t i, int64_t p) const {
    vectors(p, [&](int64_t at, int n) {
      float* const carry = carry_ + i * stride_ + at;
      vf grad = load(carry);
      if (a.variant.dropout != nullptr) grad *= load_lanes(a.variant.dropout + i * a.hidden + at, n);
      store(carry, grad + load(kept_ + i * stride_ + at));
    });
  }

  const VariantBackward& a;
  const bool norm_, digits_;
  int64_t total_, panels_, stride_, scratch_;
  float* carry_;  // [B, stride], as all of these: dh
  float* kept_;   // what of it goes to the h before past the gates
  float* grad_c_normed_ = nullptr;  // the gradient of N(c~) times the gain
  PanelSums of_c_, of_gates_;
  GradientDigits grads_;
};

template <typename Run>
auto with_layer(const VariantBackward& args, const Run& run) {
  return args.gates == 4 ? run(Backward<4>(args)) : run(Backward<3>(args));
}

}  // namespace

int64_t variant_backward_scratch(const VariantBackward& args) {
  return with_layer(args, [](auto&& layer) { return layer.scratch(); });
}

void variant_backward(const VariantBackward& args) {
  with_layer(args, [](auto&& layer) {
    parallel(layer.threads(), [&](int thread, int threads, Barrier& barrier) { layer.run(thread, threads, barrier); });
  });
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
