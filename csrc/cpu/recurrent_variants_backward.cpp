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
    if (norm_) {
      of_x_.sums = PanelSums(scratch, rows, panels_, Gates * kPanel, Gates * a.hidden);
      of_h_.sums = PanelSums(scratch, rows, panels_, Gates * kPanel, Gates * a.hidden);
    }
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
      copy_columns(own, 4, width, nullptr, width, a.grad_bias, width);
      copy_columns(own, Gates, width, nullptr, width, a.grad_ln_ih, width);
      copy_columns(own, Gates, width, nullptr, width, a.grad_ln_hh, width);
      for (float* sum : {a.grad_ln_c, a.grad_ln_c_bias})
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
            gru_panel(row, p);
        }
      if (norm_) {
        barrier.wait();
        if constexpr (kLstm) {
          some_rows(step, [&](int64_t first, int64_t count) {
            const RowMoments means = of_c_.means(first);
            for (int64_t r = 0; r < count; ++r)
              for (int64_t p = own.begin; p < own.end; ++p)
                gate_panel({step.begin + first + r, first + r, before[first + r]}, p, means[r]);
          });
          barrier.wait();
        }
        some_rows(step, [&](int64_t first, int64_t count) {
          const RowMoments x = of_x_.sums.means(first), h = of_h_.sums.means(first);
          for (int64_t r = 0; r < count; ++r)
            for (int64_t p = own.begin; p < own.end; ++p) raw_panel(step.begin + first + r, p, x[r], h[r]);
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

  // Members are read once for a row: behind each store the compiler would read them again.
  struct Unit {
    int64_t row, i;       // of all rows, and of the step's
    const float* before;  // [H]: the state before the step, c of an LSTM, h of a GRU
  };
  template <typename Visit>
  static void some_rows(const Walk& step, const Visit& visit) {
    for (int64_t i = 0; i < step.rows(); i += kLanes) visit(i, step.rows() - i < kLanes ? step.rows() - i : kLanes);
  }
  template <typename Visit>
  FASTLM_MEMBER void vectors(int64_t p, const Visit& visit) const {
    const int64_t hidden = a.hidden;
    for (int64_t at = p * kPanel; at < (p + 1) * kPanel && at < hidden; at += kLanes)
      visit(at, lanes_left(hidden, at));
  }
  float stat(int64_t which, int64_t row) const { return a.stats[which * total_ + row]; }
  FASTLM_MEMBER static void add(float* sum, vf value, int n) { store_lanes(sum, load_lanes(sum, n) + value, n); }

  // What the forward pass kept of a row's gates, [4][L] of each kLanes units.
  struct Activated {
    const float* row;
    int64_t distance;
    FASTLM_MEMBER vf operator()(int64_t at, int v) const { return load(row + at / kLanes * distance + v * kLanes); }
  };
  Activated activated(int64_t row) const { return {a.activated + row * kPanel, total_ * kPanel}; }

  // The gradient of h~: what is carried and the output's own, without what goes to the old h past the step, in `kept`.
  struct Carried {
    const float *carry, *output, *shares;
    float* kept;
    FASTLM_MEMBER vf operator()(int64_t at, int n) const {
      vf grad = load_lanes(carry + at, n);  // beyond them nothing may have been written
      if (output != nullptr) grad += load_lanes(output + at, n);
      const vf stays = grad * load_or_zero(shares, at, n);
      store(kept + at, stays);
      return grad - stays;
    }
  };
  Carried carried(const Unit& u) const {
    return {carry_ + u.i * stride_, a.grad_output == nullptr ? nullptr : a.grad_output + u.row * a.hidden,
            shares_of(a.variant.zoneout_h, a.variant, u.row), kept_ + u.i * stride_};
  }

  // The two sums over a row that the gradient of layer normalisation needs: of its gradient times the gain, and of that
  // times what was normalised.
  struct Sums {
    vf first = {}, second = {};
    FASTLM_MEMBER void add(vf grad, vf normed) { first += grad, second += grad * normed; }
    FASTLM_MEMBER Moments total() const { return {reduce_add(first), reduce_add(second)}; }
  };

  // One of the two products that are normalised, and a row of it.
  struct Normed {
    const float* raw;    // [H/L][N][G][L]
    const float* gains;  // [H/L][G][L]
    int64_t stat;        // number of its means in the statistics
    float* grad_gains;   // [G H]
    PanelSums sums;      // of the step
  };
  struct NormedRow {
    const float *raw, *gains;
    int64_t distance, hidden;
    float mean, scale;
    float* grad_gains;

    FASTLM_MEMBER vf value(int64_t at, int v) const {
      return (load(raw + at / kLanes * distance + v * kLanes) - mean) * scale;
    }
    FASTLM_MEMBER vf gain(int64_t at, int v) const { return load(gains + at * Gates + v * kLanes); }
    // The gradient of a gate's gain, and its part in the sums, given that of what is normalised times the gain.
    FASTLM_MEMBER void take(int64_t at, int n, int v, vf grad, Sums& sums) const {
      const vf normed = value(at, v);
      add(grad_gains + v * hidden + at, grad * normed, n);
      sums.add(grad * gain(at, v), normed);
    }
    // That of what is normalised.
    FASTLM_MEMBER vf gradient(int64_t at, int v, vf grad, Moments means) const {
      return (grad * gain(at, v) - means.mean - value(at, v) * means.scale) * scale;
    }
  };
  NormedRow row_of(const Normed& of, int64_t row) const {
    if (!norm_) return {};
    return {of.raw + row * Gates * kLanes, of.gains, total_ * Gates * kLanes, a.hidden, stat(of.stat, row),
            stat(of.stat + 1, row), of.grad_gains};
  }

  // A GRU's first pass: gradients of N(W_ih x) and of N(W_hh (m h)), and the sums that are needed for those of what was
  // normalised.
  void gru_panel(const Unit& u, int64_t p) const {
    const Activated gate = activated(u.row);
    const Carried carried_of = carried(u);
    const NormedRow x = row_of(of_x_, u.row), h = row_of(of_h_, u.row);
    const int64_t hidden = a.hidden;
    float *const grad_x = a.grad_gates + u.row * 3 * hidden, *const grad_h = a.grad_raw_hh + u.row * 3 * hidden;
    float* const grad_bias = a.grad_bias;
    const float* const before = u.before;
    const bool norm = norm_;
    Sums sums_x, sums_h;
    vectors(p, [&](int64_t at, int n) {
      const vf r = gate(at, 0), z = gate(at, 1), candidate = gate(at, 2);
      const vf grad = carried_of(at, n);
      float* const kept = carried_of.kept + at;
      store(kept, load(kept) + grad * z);
      const vf of_n = grad * (1.0f - z) * (1.0f - candidate * candidate);
      const vf of_r = of_n * gate(at, 3) * r * (1.0f - r);
      const vf of_z = grad * (load_lanes(before + at, n) - candidate) * z * (1.0f - z);
      const vf of_x[3] = {of_r, of_z, of_n}, of_h[3] = {of_r, of_z, of_n * r};
      for (int v = 0; v < 3; ++v) {
        store_lanes(grad_x + v * hidden + at, of_x[v], n);
        store_lanes(grad_h + v * hidden + at, of_h[v], n);
        if (!norm) continue;
        add(grad_bias + v * hidden + at, of_x[v], n);
        x.take(at, n, v, of_x[v], sums_x);
        h.take(at, n, v, of_h[v], sums_h);
      }
      if (norm) add(grad_bias + 3 * hidden + at, of_h[2], n);
    });
    if (norm) of_x_.sums.set(u.i, p, sums_x.total()), of_h_.sums.set(u.i, p, sums_h.total());
  }

  // What an LSTM's passes need of a row.
  struct Cell {
    Activated gate;
    const float *before, *shares;  // of c
    float *grad_c, *grad_gates;
    int64_t hidden;

    // c~ anew: with zoneout the saved c' is another.
    FASTLM_MEMBER vf fresh(int64_t at, int n) const {
      return gate(at, 1) * load_lanes(before + at, n) + gate(at, 0) * gate(at, 2);
    }
    // Writes o's gradient before activation; gives that of tanh's argument.
    FASTLM_MEMBER vf grad_tanh(int64_t at, int n, vf grad, vf argument) const {
      const vf o = gate(at, 3), t = tanh(argument);
      store_lanes(grad_gates + 3 * hidden + at, grad * t * o * (1.0f - o), n);
      return grad * o * (1.0f - t * t);
    }
    // Given c~'s gradient by way of h~, those of i, f, g before activation; c's own goes on to the c before.
    FASTLM_MEMBER void gradients(int64_t at, int n, vf grad_by_h, vf (&of)[3]) const {
      const vf i = gate(at, 0), f = gate(at, 1), g = gate(at, 2);
      const vf after = load_lanes(grad_c + at, n), kept = after * load_or_zero(shares, at, n);
      const vf grad = after - kept + grad_by_h;
      of[0] = grad * g * i * (1.0f - i);
      of[1] = grad * load_lanes(before + at, n) * f * (1.0f - f);
      of[2] = grad * i * (1.0f - g * g);
      for (int v = 0; v < 3; ++v) store_lanes(grad_gates + v * hidden + at, of[v], n);
      store_lanes(grad_c + at, kept + grad * f, n);
    }
  };
  Cell cell_of(const Unit& u) const {
    return {activated(u.row), u.before, shares_of(a.variant.zoneout_c, a.variant, u.row), a.grad_c0 + u.i * a.hidden,
            a.grad_gates + u.row * 4 * a.hidden, a.hidden};
  }

  void plain_panel(const Unit& u, int64_t p) const {
    const Cell cell = cell_of(u);
    const Carried carried_of = carried(u);
    vectors(p, [&](int64_t at, int n) {
      vf of[3];
      cell.gradients(at, n, cell.grad_tanh(at, n, carried_of(at, n), cell.fresh(at, n)), of);
    });
  }

  // The first of an LSTM's three passes with layer normalisation: the gradient of N(c~), and its sums.
  Moments cell_sums(const Unit& u, int64_t p) const {
    const Cell cell = cell_of(u);
    const Carried carried_of = carried(u);
    const float mean = stat(4, u.row), scale = stat(5, u.row);
    const float *const gains = a.variant.ln_c, *const biases = a.variant.ln_c_bias;
    float *const grad_gains = a.grad_ln_c, *const grad_biases = a.grad_ln_c_bias;
    float* const grad_normed = grad_c_normed_ + u.i * stride_;
    Sums sums;
    vectors(p, [&](int64_t at, int n) {
      const vf gain = load_lanes(gains + at, n), normed = (cell.fresh(at, n) - mean) * scale;
      const vf grad = cell.grad_tanh(at, n, carried_of(at, n), normed * gain + load_or_zero(biases, at, n));
      add(grad_gains + at, grad * normed, n);
      add(grad_biases + at, grad, n);
      store(grad_normed + at, grad * gain);
      sums.add(grad * gain, normed);
    });
    return sums.total();
  }
  // The second: the gates' gradients before activation, and the sums for those of W_ih x and W_hh (m h).
  void gate_panel(const Unit& u, int64_t p, Moments means) const {
    const Cell cell = cell_of(u);
    const NormedRow x = row_of(of_x_, u.row), h = row_of(of_h_, u.row);
    const float mean = stat(4, u.row), scale = stat(5, u.row);
    const float* const grad_normed = grad_c_normed_ + u.i * stride_;
    float* const grad_bias = a.grad_bias;
    Sums sums_x, sums_h;
    vectors(p, [&](int64_t at, int n) {
      const vf normed = (cell.fresh(at, n) - mean) * scale;
      const vf grad = load(grad_normed + at) - means.mean - normed * means.scale;
      vf of[3];
      cell.gradients(at, n, grad * scale, of);
      for (int v = 0; v < 4; ++v) {
        const vf of_gate = v < 3 ? of[v] : load_lanes(cell.grad_gates + 3 * cell.hidden + at, n);
        add(grad_bias + v * cell.hidden + at, of_gate, n);
        x.take(at, n, v, of_gate, sums_x);
        h.take(at, n, v, of_gate, sums_h);
      }
    });
    of_x_.sums.set(u.i, p, sums_x.total());
    of_h_.sums.set(u.i, p, sums_h.total());
  }

  // The last: the gradients of W_ih x and W_hh (m h).
  void raw_panel(int64_t row, int64_t p, Moments means_x, Moments means_h) const {
    const NormedRow x = row_of(of_x_, row), h = row_of(of_h_, row);
    const int64_t hidden = a.hidden;
    float *const grad_x = a.grad_gates + row * Gates * hidden, *const grad_h = a.grad_raw_hh + row * Gates * hidden;
    vectors(p, [&](int64_t at, int n) {
      for (int v = 0; v < Gates; ++v) {
        float *const to_x = grad_x + v * hidden + at, *const to_h = grad_h + v * hidden + at;
        const vf of_x = load_lanes(to_x, n), of_h = kLstm ? of_x : load_lanes(to_h, n);
        store_lanes(to_x, x.gradient(at, v, of_x, means_x), n);
        store_lanes(to_h, h.gradient(at, v, of_h, means_h), n);
      }
    });
  }

  void add_kept(int64_t i, int64_t p) const {
    const float* const mask = a.variant.dropout == nullptr ? nullptr : a.variant.dropout + i * a.hidden;
    const float* const kept = kept_ + i * stride_;
    float* const carry = carry_ + i * stride_;
    vectors(p, [&](int64_t at, int n) {
      const vf grad = load(carry + at);
      store(carry + at, (mask == nullptr ? grad : grad * load_lanes(mask + at, n)) + load(kept + at));
    });
  }

  const VariantBackward& a;
  const bool norm_, digits_;
  int64_t total_, panels_, stride_, scratch_;
  float* carry_;  // [B, stride], as all of these: dh
  float* kept_;   // what of it goes to the h before past the gates
  float* grad_c_normed_ = nullptr;  // the gradient of N(c~) times the gain
  PanelSums of_c_;
  Normed of_x_{a.raw_ih, a.variant.ln_ih, 0, a.grad_ln_ih, {}}, of_h_{a.raw_hh, a.variant.ln_hh, 2, a.grad_ln_hh, {}};
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
