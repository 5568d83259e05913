// The variants of LSTM and GRU against a double-precision step written for reading, and their gradients of the states
// and the bias against differences of that. Every buffer has exactly the size the header promises.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "check.h"
#include "fastlm/isa.h"
#include "fastlm/pack.h"
#include "fastlm/recurrent_variants.h"

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
  int64_t gates, inputs, hidden;
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

// The bias in the kernel's order: of a GRU r, z, and n's two apart.
struct Variables {
  Doubles bias, h0, c0;
};

Layer make_layer(int64_t G, int64_t inputs, int64_t H, std::vector<int64_t> sizes, bool reverse, bool norm,
                 bool noise) {
  Layer l{G, inputs, H, std::move(sizes), reverse, norm, noise, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}};
  const bool lstm = G == 4;
  l.input = random(l.rows() * inputs);
  l.w_ih = random(G * H * inputs, 1 / std::sqrt(inputs));
  l.w_hh = random(G * H * H, 1 / std::sqrt(H));
  if (norm) l.ln_ih = random(G * H, 0.3, 1), l.ln_hh = random(G * H, 0.3, 1);
  if (norm && lstm) l.ln_c = random(H, 0.3, 1), l.ln_c_bias = random(H);
  // Shares that are the same at all rows.
  if (noise) l.mask = random(l.batch() * H, 1, 1), l.zoneout_h = random(H, 0.5, 0.5);
  if (noise && lstm) l.zoneout_c = random(H, 0.5, 0.5);
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

// The outputs [N, H], then h_n and, of an LSTM, c_n.
Doubles exact(const Layer& l, const Variables& v) {
  const int64_t H = l.hidden, G = l.gates;
  Doubles h = v.h0, c = v.c0, out(l.rows() * H);
  for (int64_t walked = 0; walked < l.steps(); ++walked) {
    const int64_t t = l.reverse ? l.steps() - 1 - walked : walked;
    int64_t begin = 0;
    for (int64_t s = 0; s < t; ++s) begin += l.sizes[s];
    for (int64_t b = 0; b < l.sizes[t]; ++b) {
      const int64_t row = begin + b;
      Doubles x(G * H), r(G * H), fresh(H), cell(H), normed;
      for (int64_t j = 0; j < G * H; ++j) {
        for (int64_t k = 0; k < l.inputs; ++k) x[j] += double(l.input[row * l.inputs + k]) * l.w_ih[j * l.inputs + k];
        for (int64_t k = 0; k < H; ++k) r[j] += h[b * H + k] * (l.noise ? l.mask[b * H + k] : 1) * l.w_hh[j * H + k];
      }
      if (l.norm) normalize(x, l.ln_ih, {}), normalize(r, l.ln_hh, {});
      const auto sum = [&](int64_t gate, int64_t j) {
        return x[gate * H + j] + r[gate * H + j] + v.bias[gate * H + j];
      };
      if (G == 3) {
        for (int64_t j = 0; j < H; ++j) {
          const double z = sigmoid(sum(1, j)), x_n = x[2 * H + j] + v.bias[2 * H + j];
          const double h_n = r[2 * H + j] + v.bias[3 * H + j];
          fresh[j] = (1 - z) * std::tanh(x_n + sigmoid(sum(0, j)) * h_n) + z * h[b * H + j];
        }
      } else {
        for (int64_t j = 0; j < H; ++j)
          cell[j] = sigmoid(sum(1, j)) * c[b * H + j] + sigmoid(sum(0, j)) * std::tanh(sum(2, j));
        normed = cell;
        if (l.norm) normalize(normed, l.ln_c, l.ln_c_bias);
        for (int64_t j = 0; j < H; ++j) fresh[j] = sigmoid(sum(3, j)) * std::tanh(normed[j]);
      }
      for (int64_t j = 0; j < H; ++j) {
        const double z_h = l.noise ? l.zoneout_h[j] : 0, z_c = l.noise && G == 4 ? l.zoneout_c[j] : 0;
        h[b * H + j] = z_h * h[b * H + j] + (1 - z_h) * fresh[j];
        if (G == 4) c[b * H + j] = z_c * c[b * H + j] + (1 - z_c) * cell[j];
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

// Memory on a boundary of 64 bytes, as tiles need.
struct Aligned {
  std::vector<uint8_t> bytes;
  void* data;
  explicit Aligned(int64_t n) : bytes(n + 63, 0xff) {
    data = bytes.data() + (64 - reinterpret_cast<uintptr_t>(bytes.data()) % 64) % 64;
  }
};
Aligned digits(const Floats& source, int64_t k, int64_t n, int64_t stride_k, int64_t stride_n, int64_t gates,
               int64_t groups) {
  Aligned out(fastlm::packed_digits_size(k, n, gates, groups));
  fastlm::pack_digits({source.data(), k, n, stride_k, stride_n, gates, groups, out.data, 2});
  return out;
}

void is_right(const Layer& l, bool in_digits = false) {
  const int64_t G = l.gates, H = l.hidden, N = l.rows(), B = l.batch(), lanes = fastlm::simd_lanes();
  const int64_t units = (H + lanes - 1) / lanes * lanes, cells_of = G == 4 ? H : 0;
  const Floats bias = random(4 * H), h0 = random(B * H), c0 = random(B * cells_of);
  Floats h0_dropped = h0;
  for (size_t i = 0; l.noise && i < h0.size(); ++i) h0_dropped[i] *= l.mask[i];
  const Floats w_ih = packed(l.w_ih, l.inputs, G * H, 1, l.inputs, G), w_hh = packed(l.w_hh, H, G * H, 1, H, G),
               bias_packed = packed(bias, 1, 4 * H, 0, 1, 4), ln_ih = packed(l.ln_ih, 1, G * H, 0, 1, G),
               ln_hh = packed(l.ln_hh, 1, G * H, 0, 1, G);
  const fastlm::RecurrentVariant variant = {given(l.mask), given(l.zoneout_h), given(l.zoneout_c), 0,
                                            given(ln_ih),  given(ln_hh),       given(l.ln_c),      given(l.ln_c_bias)};
  const Doubles want = exact(l, {wide(bias), wide(h0), wide(c0)});
  const Aligned ih = in_digits ? digits(l.w_ih, l.inputs, G * H, 1, l.inputs, G, 1) : Aligned(0),
                parts = in_digits ? digits(l.w_ih, l.inputs, G * H, 1, l.inputs, G, 0) : Aligned(0),
                hh = in_digits ? digits(l.w_hh, H, G * H, 1, H, G, 1) : Aligned(0),
                across = in_digits ? digits(l.w_hh, G * H, H, H, 1, 0, G) : Aligned(0);
  Floats output, h_n, c_n, dropped, activated, cells, raw_ih, raw_hh, stats;
  for (int threads : {2, 1})
    for (bool save : {false, true}) {
      const Floats before = output;
      const bool norm = save && l.norm;
      output = unwritten(N * H), h_n = unwritten(B * H), c_n = unwritten(B * cells_of);
      dropped = unwritten(l.noise ? N * H : 0), activated = unwritten(save ? N * 4 * units : 0);
      cells = unwritten(save ? N * cells_of : 0), raw_ih = unwritten(norm ? N * G * units : 0);
      raw_hh = unwritten(norm ? N * G * units : 0), stats = unwritten(norm ? (2 * G - 2) * N : 0);
      fastlm::VariantForward args = {
          G, l.steps(), l.sizes.data(), l.inputs, H, variant, l.input.data(), in_digits ? ih.data : w_ih.data(),
          in_digits ? hh.data : w_hh.data(), bias_packed.data(), h0.data(), given(c0), h0_dropped.data(), l.reverse,
          output.data(), h_n.data(), given(c_n), given(dropped), given(activated), given(cells), given(raw_ih),
          given(raw_hh), given(stats), nullptr, threads, in_digits, parts.data};
      const Aligned scratch(fastlm::variant_forward_scratch(args) * static_cast<int64_t>(sizeof(float)));
      args.scratch = static_cast<float*>(scratch.data);
      fastlm::variant_forward(args);
      CHECK(distance(output, want.data()) < 1e-5);
      CHECK(distance(h_n, want.data() + N * H) < 1e-5);
      CHECK(distance(c_n, want.data() + (N + B) * H) < 1e-5);
      CHECK(before.empty() || before == output);
    }
  const Floats g_output = random(N * H), g_h = random(B * H), g_c = random(B * cells_of);
  const Floats columns = packed(l.w_hh, G * H, H, H, 1, 0);
  const int64_t of_c = l.norm ? cells_of : 0;
  Floats grad_gates = unwritten(N * G * H), grad_raw = unwritten(l.norm || G == 3 ? N * G * H : 0),
         summed_bias = unwritten(l.norm ? 4 * H : 0), grad_ln_ih = unwritten(l.norm ? G * H : 0),
         grad_ln_hh = unwritten(l.norm ? G * H : 0), grad_ln_c = unwritten(of_c),
         grad_ln_c_bias = unwritten(of_c), previous = unwritten(N * H), grad_h0 = unwritten(B * H),
         grad_c0 = unwritten(B * cells_of);
  fastlm::VariantBackward args = {
      G, l.steps(), l.sizes.data(), H, variant, in_digits ? across.data : columns.data(), h0.data(), h0_dropped.data(),
      given(c0), l.reverse, output.data(), given(dropped), activated.data(), given(cells), given(raw_ih), given(raw_hh),
      given(stats), g_output.data(), g_h.data(), given(g_c), grad_gates.data(), given(grad_raw), given(summed_bias),
      given(grad_ln_ih), given(grad_ln_hh), given(grad_ln_c), given(grad_ln_c_bias), previous.data(), grad_h0.data(), given(grad_c0), nullptr, 2, in_digits};
  const Aligned scratch(fastlm::variant_backward_scratch(args) * static_cast<int64_t>(sizeof(float)));
  args.scratch = static_cast<float*>(scratch.data);
  fastlm::variant_backward(args);
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
        for (int64_t i = 0; i < B * H; ++i) loss[side] += g_h[i] * r[N * H + i];
        for (int64_t i = 0; i < B * cells_of; ++i) loss[side] += g_c[i] * r[(N + B) * H + i];
      }
      x = kept;
      grads.push_back((loss[0] - loss[1]) / 2e-5);
    }
    return grads;
  };
  CHECK(distance(grad_h0, differences(v.h0).data()) < 1e-4);
  CHECK(distance(grad_c0, differences(v.c0).data()) < 1e-4);
  Floats grad_bias = summed_bias;
  if (!l.norm) {
    grad_bias.assign(4 * H, 0);
    for (int64_t i = 0; i < N * G * H; ++i) grad_bias[i % (G * H)] += grad_gates[i];
    for (int64_t i = 0; G == 3 && i < N * H; ++i) grad_bias[3 * H + i % H] += grad_raw[i / H * 3 * H + 2 * H + i % H];
  }
  CHECK(distance(grad_bias, differences(v.bias).data()) < 1e-4);
  for (const Floats* written : {&grad_gates, &grad_raw, &grad_ln_ih, &grad_ln_hh, &grad_ln_c, &grad_ln_c_bias, &previous})
    for (float value : *written) CHECK(!std::isnan(value));
}

}  // namespace

FASTLM_TEST(recurrent_variants_in_digits_agree_with_double) {
  if (!fastlm::digit_tiles()) return;
  for (int64_t gates : {4, 3}) {
    for (bool reverse : {false, true})
      for (bool norm : {false, true})
        for (bool noise : {false, true}) is_right(make_layer(gates, 5, 18, {18, 17, 9, 1}, reverse, norm, noise), true);
    is_right(make_layer(gates, 2, 8, std::vector<int64_t>(65, 8), false, false, true), true);  // more than a chunk's
  }
}

FASTLM_TEST(recurrent_variants_agree_with_double) {
  for (int64_t gates : {4, 3}) {
    for (bool reverse : {false, true})
      for (bool norm : {false, true})
        for (bool noise : {false, true}) {
          is_right(make_layer(gates, 3, 9, {4, 4, 2, 1}, reverse, norm, noise));
          is_right(make_layer(gates, 5, 18, {2, 1}, reverse, norm, noise));
        }
    is_right(make_layer(gates, 2, 8, {130, 3}, false, true, true));  // more rows than a chunk holds
  }
}
