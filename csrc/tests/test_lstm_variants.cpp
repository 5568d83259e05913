// The LSTM's variants against a double-precision step written for reading, and their gradients of the states and the
// bias against differences of that. Every buffer has exactly the size the header promises.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "check.h"
#include "fastlm/isa.h"
#include "fastlm/lstm_variants.h"
#include "fastlm/pack.h"

namespace {

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

uint64_t state = 88172645463325252u;
double next() {  // in (-1, 1)
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return static_cast<double>(state >> 11) / 4503599627370496.0 - 1.0;
}
Floats random(int64_t n, double scale = 1, double shift = 0) {
  Floats values(n);
  for (float& v : values) v = static_cast<float>(shift + scale * next());
  return values;
}
Floats unwritten(int64_t n) { return Floats(n, NAN); }
Doubles wide(const Floats& values) { return Doubles(values.begin(), values.end()); }

struct Layer {
  int64_t inputs, hidden;
  std::vector<int64_t> sizes;
  bool reverse, norm, noise;
  Floats input, w_ih, w_hh, ln_ih, ln_hh, ln_c, ln_c_bias, mask, zoneout_h, zoneout_c;
  int64_t rows() const {
    int64_t n = 0;
    for (int64_t size : sizes) n += size;
    return n;
  }
  int64_t batch() const { return sizes[0]; }
  int64_t steps() const { return static_cast<int64_t>(sizes.size()); }
};

struct Variables {
  Doubles bias, h0, c0;
};

Layer make_layer(int64_t inputs, int64_t H, std::vector<int64_t> sizes, bool reverse, bool norm, bool noise) {
  Layer l{inputs, H, std::move(sizes), reverse, norm, noise, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}};
  l.input = random(l.rows() * inputs);
  l.w_ih = random(4 * H * inputs, 1 / std::sqrt(inputs));
  l.w_hh = random(4 * H * H, 1 / std::sqrt(H));
  if (norm) {
    l.ln_ih = random(4 * H, 0.3, 1), l.ln_hh = random(4 * H, 0.3, 1);
    l.ln_c = random(H, 0.3, 1), l.ln_c_bias = random(H);
  }
  // Shares that are the same at all rows.
  if (noise) l.mask = random(l.batch() * H, 1, 1), l.zoneout_h = random(H, 0.5, 0.5), l.zoneout_c = random(H, 0.5, 0.5);
  return l;
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

void normalize(Doubles& values, const Floats& gain, const Floats& shift) {
  double mean = 0, variance = 0;
  const double n = static_cast<double>(values.size());
  for (double v : values) mean += v / n;
  for (double v : values) variance += (v - mean) * (v - mean) / n;
  for (size_t i = 0; i < values.size(); ++i)
    values[i] = (values[i] - mean) / std::sqrt(variance + 1e-5) * gain[i] + (shift.empty() ? 0 : shift[i]);
}

// The outputs [N, H], then h_n and c_n.
Doubles exact(const Layer& l, const Variables& v) {
  const int64_t H = l.hidden;
  Doubles h = v.h0, c = v.c0, out(l.rows() * H);
  for (int64_t walked = 0; walked < l.steps(); ++walked) {
    const int64_t t = l.reverse ? l.steps() - 1 - walked : walked;
    int64_t begin = 0;
    for (int64_t s = 0; s < t; ++s) begin += l.sizes[s];
    for (int64_t b = 0; b < l.sizes[t]; ++b) {
      const int64_t row = begin + b;
      Doubles x(4 * H), r(4 * H), cell(H), normed;
      for (int64_t j = 0; j < 4 * H; ++j) {
        for (int64_t k = 0; k < l.inputs; ++k) x[j] += double(l.input[row * l.inputs + k]) * l.w_ih[j * l.inputs + k];
        for (int64_t k = 0; k < H; ++k) r[j] += h[b * H + k] * (l.noise ? l.mask[b * H + k] : 1) * l.w_hh[j * H + k];
      }
      if (l.norm) normalize(x, l.ln_ih, {}), normalize(r, l.ln_hh, {});
      for (int64_t j = 0; j < 4 * H; ++j) x[j] += r[j] + v.bias[j];
      for (int64_t j = 0; j < H; ++j)
        cell[j] = sigmoid(x[H + j]) * c[b * H + j] + sigmoid(x[j]) * std::tanh(x[2 * H + j]);
      normed = cell;
      if (l.norm) normalize(normed, l.ln_c, l.ln_c_bias);
      for (int64_t j = 0; j < H; ++j) {
        const double z_h = l.noise ? l.zoneout_h[j] : 0, z_c = l.noise ? l.zoneout_c[j] : 0;
        h[b * H + j] = z_h * h[b * H + j] + (1 - z_h) * sigmoid(x[3 * H + j]) * std::tanh(normed[j]);
        c[b * H + j] = z_c * c[b * H + j] + (1 - z_c) * cell[j];
        out[row * H + j] = h[b * H + j];
      }
    }
  }
  out.insert(out.end(), h.begin(), h.end());
  out.insert(out.end(), c.begin(), c.end());
  return out;
}

Floats packed(const Floats& source, int64_t k, int64_t n, int64_t stride_k, int64_t stride_n, int64_t gates) {
  if (source.empty()) return {};
  Floats out = unwritten(fastlm::packed_size(k, n, gates));
  fastlm::pack_panels({source.data(), k, n, stride_k, stride_n, gates, out.data(), 2});
  return out;
}
const float* given(const Floats& v) { return v.empty() ? nullptr : v.data(); }
float* given(Floats& v) { return v.empty() ? nullptr : v.data(); }

double distance(const Floats& a, const double* b) {
  double largest = 0;
  for (size_t i = 0; i < a.size(); ++i)
    largest = std::isnan(a[i]) ? INFINITY : std::max(largest, std::abs(a[i] - b[i]));
  return largest;
}

void is_right(const Layer& l) {
  const int64_t H = l.hidden, N = l.rows(), B = l.batch(), lanes = fastlm::simd_lanes();
  const int64_t tiles = (H + lanes - 1) / lanes * 4 * lanes;
  const Floats bias = random(4 * H), h0 = random(B * H), c0 = random(B * H);
  Floats h0_dropped = h0;
  for (size_t i = 0; l.noise && i < h0.size(); ++i) h0_dropped[i] *= l.mask[i];
  const Floats w_ih = packed(l.w_ih, l.inputs, 4 * H, 1, l.inputs, 4), w_hh = packed(l.w_hh, H, 4 * H, 1, H, 4),
               bias_packed = packed(bias, 1, 4 * H, 0, 1, 4), ln_ih = packed(l.ln_ih, 1, 4 * H, 0, 1, 4),
               ln_hh = packed(l.ln_hh, 1, 4 * H, 0, 1, 4);
  const fastlm::LstmVariant variant = {given(l.mask), given(l.zoneout_h), given(l.zoneout_c), 0,
                                       given(ln_ih),  given(ln_hh),       given(l.ln_c),      given(l.ln_c_bias)};
  const Doubles want = exact(l, {wide(bias), wide(h0), wide(c0)});
  Floats output, h_n, c_n, dropped, gates, cells, raw_ih, raw_hh, stats;
  for (int threads : {2, 1})
    for (bool save : {false, true}) {
      const Floats before = output;
      const bool norm = save && l.norm;
      output = unwritten(N * H), h_n = unwritten(B * H), c_n = unwritten(B * H);
      dropped = unwritten(l.noise ? N * H : 0), gates = unwritten(save ? N * tiles : 0);
      cells = unwritten(save ? N * H : 0), raw_ih = unwritten(norm ? N * 4 * H : 0);
      raw_hh = unwritten(norm ? N * tiles : 0), stats = unwritten(norm ? 6 * N : 0);
      Floats scratch = unwritten(fastlm::lstm_variant_forward_scratch(N, B, H, l.norm, save));
      fastlm::lstm_variant_forward({l.steps(), l.sizes.data(), l.inputs, H, variant, l.input.data(), w_ih.data(),
                                    w_hh.data(), bias_packed.data(), h0.data(), c0.data(), h0_dropped.data(), l.reverse,
                                    output.data(), h_n.data(), c_n.data(), given(dropped), given(gates), given(cells),
                                    given(raw_ih), given(raw_hh), given(stats), scratch.data(), threads});
      CHECK(distance(output, want.data()) < 1e-5);
      CHECK(distance(h_n, want.data() + N * H) < 1e-5);
      CHECK(distance(c_n, want.data() + (N + B) * H) < 1e-5);
      CHECK(before.empty() || before == output);
    }
  const Floats g_output = random(N * H), g_h = random(B * H), g_c = random(B * H);
  const Floats columns = packed(l.w_hh, 4 * H, H, H, 1, 0);
  Floats grad_gates = unwritten(N * 4 * H), grad_raw = unwritten(l.norm ? N * 4 * H : 0),
         grad_ln_hh = unwritten(l.norm ? 4 * H : 0),
         grad_ln_c = unwritten(l.norm ? H : 0), grad_ln_c_bias = unwritten(l.norm ? H : 0), previous = unwritten(N * H),
         grad_h0 = unwritten(B * H), grad_c0 = unwritten(B * H),
         scratch = unwritten(fastlm::lstm_variant_backward_scratch(B, H, l.norm));
  fastlm::lstm_variant_backward({l.steps(), l.sizes.data(), H, variant, columns.data(), h0_dropped.data(), c0.data(),
                                 l.reverse, output.data(), given(dropped), gates.data(), cells.data(),
                                 given(raw_hh), given(stats), g_output.data(), g_h.data(), g_c.data(),
                                 grad_gates.data(), given(grad_raw), given(grad_ln_hh), given(grad_ln_c),
                                 given(grad_ln_c_bias), previous.data(), grad_h0.data(), grad_c0.data(),
                                 scratch.data(), 2});
  Variables v = {wide(bias), wide(h0), wide(c0)};
  const auto differences = [&](Doubles& variable) {
    Doubles grads;
    for (double& x : variable) {
      const double kept = x;
      double loss[2] = {};
      for (int side = 0; side < 2; ++side) {
        x = kept + (side == 0 ? 1e-5 : -1e-5);
        const Doubles r = exact(l, v);
        for (int64_t i = 0; i < N * H; ++i) loss[side] += g_output[i] * r[i];
        for (int64_t i = 0; i < B * H; ++i) loss[side] += g_h[i] * r[N * H + i] + g_c[i] * r[(N + B) * H + i];
      }
      x = kept;
      grads.push_back((loss[0] - loss[1]) / 2e-5);
    }
    return grads;
  };
  CHECK(distance(grad_h0, differences(v.h0).data()) < 1e-4);
  CHECK(distance(grad_c0, differences(v.c0).data()) < 1e-4);
  Floats grad_bias(4 * H);
  for (int64_t i = 0; i < N * 4 * H; ++i) grad_bias[i % (4 * H)] += grad_gates[i];
  CHECK(distance(grad_bias, differences(v.bias).data()) < 1e-4);
  for (const Floats* written : {&grad_raw, &grad_ln_hh, &grad_ln_c, &grad_ln_c_bias, &previous})
    for (float value : *written) CHECK(!std::isnan(value));
}

}  // namespace

FASTLM_TEST(lstm_variants_agree_with_double) {
  for (bool reverse : {false, true})
    for (bool norm : {false, true})
      for (bool noise : {false, true}) {
        is_right(make_layer(3, 9, {4, 4, 2, 1}, reverse, norm, noise));
        is_right(make_layer(5, 18, {2, 1}, reverse, norm, noise));
      }
  is_right(make_layer(2, 8, {130, 3}, false, true, true));  // more rows than a chunk holds
}
