// The LSTM against a double-precision one written for reading; its gradients against central differences of that one.
// Every buffer has exactly the size the header promises, so that the sanitizer sees a step beyond it.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "check.h"
#include "fastlm/isa.h"
#include "fastlm/lstm.h"
#include "fastlm/pack.h"

namespace {

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

struct Random {
  uint64_t state = 88172645463325252u;
  float operator()() {  // in (-1, 1)
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return static_cast<float>(static_cast<double>(state >> 11) / 4503599627370496.0 - 1.0);
  }
};

Floats random(Random& next, int64_t n, float scale = 1) {
  Floats values(n);
  for (float& v : values) v = scale * next();
  return values;
}

Floats unwritten(int64_t n) { return Floats(n, NAN); }

// Of a layer: sizes, weights and inputs.
struct Layer {
  int64_t inputs, hidden, projected;  // projected 0: none
  std::vector<int64_t> batch_sizes;
  bool reverse;
  Floats input, w_ih, w_hh, w_hr, bias, h0, c0;

  int64_t outputs() const { return projected != 0 ? projected : hidden; }
  int64_t batch() const { return batch_sizes[0]; }
  int64_t steps() const { return static_cast<int64_t>(batch_sizes.size()); }
  int64_t rows() const {
    int64_t n = 0;
    for (int64_t size : batch_sizes) n += size;
    return n;
  }
};

Layer make_layer(int64_t inputs, int64_t hidden, int64_t projected, std::vector<int64_t> sizes, bool reverse) {
  Random next;
  Layer layer{inputs, hidden, projected, std::move(sizes), reverse, {}, {}, {}, {}, {}, {}, {}};
  const int64_t outputs = layer.outputs();
  const auto scale = [](int64_t n) { return 1.5f / std::sqrt(static_cast<float>(n)); };
  layer.input = random(next, layer.rows() * inputs);
  layer.w_ih = random(next, 4 * hidden * inputs, scale(inputs));
  layer.w_hh = random(next, 4 * hidden * outputs, scale(outputs));
  layer.w_hr = random(next, projected * hidden, scale(hidden));
  layer.bias = random(next, 4 * hidden);
  layer.h0 = random(next, layer.batch() * outputs);
  layer.c0 = random(next, layer.batch() * hidden);
  return layer;
}

// What the gradients are taken of: terms added to each row's gates before activation, to its h, and the first states.
struct Terms {
  Doubles gates, h, h0, c0;
};

struct Results {
  Doubles output, h_n, c_n;
};

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

Results exact(const Layer& l, const Terms& terms) {
  const int64_t H = l.hidden, P = l.outputs(), T = l.steps();
  Results r{Doubles(l.rows() * P), terms.h0, terms.c0};
  for (int64_t walked = 0; walked < T; ++walked) {
    const int64_t t = l.reverse ? T - 1 - walked : walked;
    int64_t begin = 0;
    for (int64_t s = 0; s < t; ++s) begin += l.batch_sizes[s];
    for (int64_t b = 0; b < l.batch_sizes[t]; ++b) {
      const int64_t row = begin + b;
      Doubles gates(4 * H), full(H);
      for (int64_t j = 0; j < 4 * H; ++j) {
        gates[j] = terms.gates[row * 4 * H + j] + l.bias[j];
        for (int64_t k = 0; k < l.inputs; ++k)
          gates[j] += double(l.input[row * l.inputs + k]) * l.w_ih[j * l.inputs + k];
        for (int64_t k = 0; k < P; ++k) gates[j] += r.h_n[b * P + k] * l.w_hh[j * P + k];
      }
      for (int64_t j = 0; j < H; ++j) {
        double& c = r.c_n[b * H + j];
        c = sigmoid(gates[H + j]) * c + sigmoid(gates[j]) * std::tanh(gates[2 * H + j]);
        full[j] = sigmoid(gates[3 * H + j]) * std::tanh(c);
      }
      for (int64_t j = 0; j < P; ++j) {
        double h = l.projected != 0 ? 0 : full[j];
        for (int64_t k = 0; l.projected != 0 && k < H; ++k) h += full[k] * l.w_hr[j * H + k];
        r.output[row * P + j] = r.h_n[b * P + j] = h + terms.h[row * P + j];
      }
    }
  }
  return r;
}

Floats packed(const Floats& source, int64_t k, int64_t n, int64_t stride_k, int64_t stride_n, int64_t gates) {
  Floats out = unwritten(fastlm::packed_size(k, n, gates));
  if (!source.empty()) fastlm::pack_panels({source.data(), k, n, stride_k, stride_n, gates, out.data(), 2});
  return out;
}

// 64-byte aligned, of exactly the size given.
struct Aligned {
  explicit Aligned(int64_t bytes) : size(bytes), data(std::aligned_alloc(64, (bytes + 63) / 64 * 64)) {
    std::memset(data, 0xff, bytes);
  }
  Aligned(Aligned&& other) noexcept : size(other.size), data(other.data) { other.data = nullptr; }
  ~Aligned() { std::free(data); }
  int64_t size;
  void* data;
};

Aligned scratch_floats(int64_t n) { return Aligned(n * static_cast<int64_t>(sizeof(float))); }

Aligned digits(const Floats& source, int64_t k, int64_t n, int64_t stride_k, int64_t stride_n, int64_t gates,
               int64_t groups) {
  Aligned out(fastlm::packed_digits_size(k, n, gates, groups));
  fastlm::pack_digits({source.data(), k, n, stride_k, stride_n, gates, groups, out.data, 2});
  return out;
}

struct Native {
  Floats output, h_n, c_n, gates, cells, unprojected;
};

Native forward(const Layer& l, bool save, int threads, bool in_digits = false) {
  const int64_t H = l.hidden, P = l.outputs(), N = l.rows(), lanes = fastlm::simd_lanes();
  const bool project = l.projected != 0;
  Native n{unwritten(N * P), unwritten(l.batch() * P), unwritten(l.batch() * H), {}, {}, {}};
  if (save) {
    n.gates = unwritten((H + lanes - 1) / lanes * N * 4 * lanes);
    n.cells = unwritten(N * H);
    n.unprojected = unwritten(project ? N * H : 0);
  }
  const Floats w_ih = packed(l.w_ih, l.inputs, 4 * H, 1, l.inputs, 4), w_hh = packed(l.w_hh, P, 4 * H, 1, P, 4),
               bias = packed(l.bias, 1, 4 * H, 0, 1, 4);
  const Floats w_hr = project ? packed(l.w_hr, H, P, 1, H, 0) : Floats();
  const Aligned ih = in_digits ? digits(l.w_ih, l.inputs, 4 * H, 1, l.inputs, 4, 1) : Aligned(0);
  const Aligned parts = in_digits ? digits(l.w_ih, l.inputs, 4 * H, 1, l.inputs, 4, 0) : Aligned(0);
  const Aligned hh = in_digits ? digits(l.w_hh, P, 4 * H, 1, P, 4, 1) : Aligned(0);
  fastlm::LstmForward args = {
      l.steps(), l.batch_sizes.data(), l.inputs, H, P, l.input.data(), false, in_digits ? ih.data : w_ih.data(),
      in_digits ? hh.data : w_hh.data(), bias.data(), project ? w_hr.data() : nullptr, l.h0.data(), l.c0.data(),
      l.reverse, n.output.data(), n.h_n.data(), n.c_n.data(), save ? n.gates.data() : nullptr,
      save ? n.cells.data() : nullptr, save && project ? n.unprojected.data() : nullptr, nullptr, threads, in_digits};
  // Before a backward pass without parts, if they are not needed: the same bits.
  const bool none = save && in_digits &&
                    fastlm::inputs_in_digits({l.input.data(), N, l.inputs, ih.data, 4 * H, 4, false, threads}) != 0;
  args.w_ih_parts = none ? nullptr : parts.data;
  const Aligned scratch = scratch_floats(fastlm::lstm_forward_scratch(args));
  args.scratch = static_cast<float*>(scratch.data);
  fastlm::lstm_forward(args);
  return n;
}

Terms no_terms(const Layer& l) {
  return {Doubles(l.rows() * 4 * l.hidden), Doubles(l.rows() * l.outputs()), Doubles(l.h0.begin(), l.h0.end()),
          Doubles(l.c0.begin(), l.c0.end())};
}

double distance(const Floats& a, const Doubles& b) {
  double largest = a.size() == b.size() ? 0 : INFINITY;
  for (size_t i = 0; i < a.size() && i < b.size(); ++i)
    largest = std::isnan(a[i]) ? INFINITY : std::max(largest, std::abs(a[i] - b[i]));
  return largest;
}

bool same(const Floats& a, const Floats& b) { return a == b; }

void forward_is_right(const Layer& l, bool in_digits = false) {
  const Results want = exact(l, no_terms(l));
  const Native one = forward(l, true, 1, in_digits);
  CHECK(distance(one.output, want.output) < 2e-6);
  CHECK(distance(one.h_n, want.h_n) < 2e-6);
  CHECK(distance(one.c_n, want.c_n) < 4e-6);
  for (int threads : {1, 2, 5}) {
    const Native other = forward(l, false, threads, in_digits);
    CHECK(same(one.output, other.output) && same(one.h_n, other.h_n) && same(one.c_n, other.c_n));
  }
}

double dot(const Floats& a, const Doubles& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

void backward_is_right(const Layer& l, bool in_digits = false) {
  const int64_t H = l.hidden, P = l.outputs(), N = l.rows(), B = l.batch();
  const bool project = l.projected != 0;
  Random next;
  const Floats g_output = random(next, N * P), g_h = random(next, B * P), g_c = random(next, B * H);
  const Native saved = forward(l, true, 2, in_digits);
  const Floats w_hh = packed(l.w_hh, 4 * H, P, P, 1, 0);
  const Floats w_hr = project ? packed(l.w_hr, P, H, H, 1, 0) : Floats();
  Floats grad_gates = unwritten(N * 4 * H), grad_h = unwritten(project ? N * P : 0), previous = unwritten(N * P),
         grad_h0 = unwritten(B * P), grad_c0 = unwritten(B * H);
  const Aligned columns = in_digits ? digits(l.w_hh, 4 * H, P, P, 1, 0, 4) : Aligned(0);
  fastlm::LstmBackward args = {
      l.steps(), l.batch_sizes.data(), H, P, in_digits ? columns.data : w_hh.data(), project ? w_hr.data() : nullptr,
      l.h0.data(), l.c0.data(), l.reverse, saved.output.data(), saved.gates.data(), saved.cells.data(), g_output.data(),
      g_h.data(), g_c.data(), grad_gates.data(), project ? grad_h.data() : nullptr, previous.data(), grad_h0.data(),
      grad_c0.data(), nullptr, 2, in_digits};
  const Aligned scratch = scratch_floats(fastlm::lstm_backward_scratch(args));
  args.scratch = static_cast<float*>(scratch.data);
  fastlm::lstm_backward(args);

  Terms terms = no_terms(l);
  const auto differences = [&](Doubles& variable) {
    Doubles grads;
    for (double& x : variable) {
      const double kept = x, step = 1e-5;
      double loss[2];
      for (int side = 0; side < 2; ++side) {
        x = kept + (side == 0 ? step : -step);
        const Results r = exact(l, terms);
        loss[side] = dot(g_output, r.output) + dot(g_h, r.h_n) + dot(g_c, r.c_n);
      }
      x = kept;
      grads.push_back((loss[0] - loss[1]) / (2 * step));
    }
    return grads;
  };
  CHECK(distance(grad_gates, differences(terms.gates)) < 1e-5);
  CHECK(distance(grad_h0, differences(terms.h0)) < 1e-5);
  CHECK(distance(grad_c0, differences(terms.c0)) < 1e-5);
  if (project) CHECK(distance(grad_h, differences(terms.h)) < 1e-5);
  for (float value : previous) CHECK(!std::isnan(value));
}

const std::vector<int64_t> kRagged = {5, 5, 3, 1};

}  // namespace

FASTLM_TEST(lstm_forward_agrees_with_double) {
  for (bool reverse : {false, true}) {
    forward_is_right(make_layer(3, 1, 0, {1}, reverse));
    forward_is_right(make_layer(7, 17, 0, kRagged, reverse));
    forward_is_right(make_layer(20, 33, 9, kRagged, reverse));
    forward_is_right(make_layer(5, 64, 0, std::vector<int64_t>(90, 2), reverse));       // more than a chunk of steps
    forward_is_right(make_layer(140, 48, 0, std::vector<int64_t>(2, 135), reverse));    // of rows
    forward_is_right(make_layer(5, 150, 130, std::vector<int64_t>(3, 13), reverse));
  }
}

FASTLM_TEST(lstm_backward_agrees_with_differences) {
  for (bool reverse : {false, true}) {
    backward_is_right(make_layer(2, 1, 0, {1}, reverse));
    backward_is_right(make_layer(3, 18, 0, kRagged, reverse));
    backward_is_right(make_layer(3, 19, 6, kRagged, reverse));
  }
}

FASTLM_TEST(lstm_in_digits_agrees_with_double) {
  if (!fastlm::digit_tiles()) return;
  for (bool reverse : {false, true}) {
    forward_is_right(make_layer(3, 1, 0, {2, 1}, reverse), true);
    forward_is_right(make_layer(7, 17, 0, kRagged, reverse), true);
    for (int64_t batch : {1, 5, 6}) {  // up to five rows have all digits in one tile
      forward_is_right(make_layer(70, 130, 0, {batch, batch, 1}, reverse), true);
      backward_is_right(make_layer(3, 35, 0, {batch, batch, 1}, reverse), true);
    }
    forward_is_right(make_layer(70, 130, 0, {20, 17, 16, 5}, reverse), true);
    forward_is_right(make_layer(5, 64, 0, std::vector<int64_t>(90, 8), reverse), true);    // more than a chunk of steps
    forward_is_right(make_layer(140, 48, 0, std::vector<int64_t>(2, 270), reverse), true);  // of rows
    backward_is_right(make_layer(3, 18, 0, kRagged, reverse), true);
    backward_is_right(make_layer(2, 1, 0, {17, 17}, reverse), true);
    for (int64_t every : {1, 3, 40}) {  // rows too large for digits
      Layer l = make_layer(70, 35, 0, std::vector<int64_t>(4, 140), reverse);
      for (int64_t row = 0; row < l.rows(); row += every)
        for (int64_t i = 0; i < l.inputs; ++i) l.input[row * l.inputs + i] *= 10;
      forward_is_right(l, true);
    }
  }
}

// A state's NaN or infinity is met by integers: the row has to know of it, and no other row may.
FASTLM_TEST(lstm_in_digits_keeps_nan_in_its_row) {
  if (!fastlm::digit_tiles()) return;
  const Layer clean = make_layer(9, 40, 0, std::vector<int64_t>(4, 18), false);
  const Native want = forward(clean, false, 2, true);
  for (int where = 0; where < 3; ++where) {
    Layer l = clean;
    (where == 0 ? l.h0 : where == 1 ? l.c0 : l.input)[17 * (where == 2 ? 9 : 40) + 3] = where == 0 ? INFINITY : NAN;
    const Native found = forward(l, false, 2, true);
    for (int64_t row = 0; row < l.rows(); ++row)
      for (int64_t j = 0; j < 40; ++j) {
        const float value = found.output[row * 40 + j];
        if (row % 18 != 17)
          CHECK(value == want.output[row * 40 + j]);
        else if (row > 18 || where != 1)
          CHECK(std::isnan(value));
      }
  }
}

FASTLM_TEST(lstm_cell_gives_the_bits_of_the_layer) {
  for (int64_t hidden : {1, 16, 45, 160})
    for (int64_t batch : {1, 3, 100}) {
      const Layer l = make_layer(33, hidden, 0, {batch}, false);
      const Native layer = forward(l, false, 2);
      const Floats w_ih = packed(l.w_ih, 33, 4 * hidden, 1, 33, 4),
                   w_hh = packed(l.w_hh, hidden, 4 * hidden, 1, hidden, 4),
                   bias = packed(l.bias, 1, 4 * hidden, 0, 1, 4);
      Floats h = unwritten(batch * hidden), c = l.c0, output = unwritten(batch * hidden);
      fastlm::lstm_cell({batch, 33, hidden, l.input.data(), l.h0.data(), c.data(), false, w_ih.data(),
                         w_hh.data(), bias.data(), h.data(), c.data(), output.data(), 2});
      CHECK(same(h, layer.h_n) && same(c, layer.c_n) && same(output, layer.h_n));
    }
}

// With rows that are parts, with none, and with states beyond 1.
FASTLM_TEST(lstm_cell_in_digits_gives_the_bits_of_the_layer) {
  if (!fastlm::digit_tiles()) return;
  for (int64_t hidden : {1, 16, 45, 160})
    for (int64_t batch : {1, 3, 5, 6, 40, 1030})
      for (int64_t every : {0, 1, 3}) {
        Layer l = make_layer(33, hidden, 0, {batch}, false);
        for (int64_t row = 0; every != 0 && row < batch; row += every) l.input[row * 33 + 2] = 400.0f;
        if (every == 3) l.h0[0] = 20.0f;
        const Native layer = forward(l, false, 2, true);
        const Aligned ih = digits(l.w_ih, 33, 4 * hidden, 1, 33, 4, 1), parts = digits(l.w_ih, 33, 4 * hidden, 1, 33, 4, 0),
                      hh = digits(l.w_hh, hidden, 4 * hidden, 1, hidden, 4, 1);
        const Floats bias = packed(l.bias, 1, 4 * hidden, 0, 1, 4);
        for (int threads : {1, 2, 3}) {
          Floats h = unwritten(batch * hidden), c = l.c0, output = unwritten(batch * hidden);
          fastlm::LstmCell args = {batch, 33, hidden, l.input.data(), l.h0.data(), c.data(), false, ih.data, hh.data,
                                   bias.data(), h.data(), c.data(), output.data(), threads, true,
                                   every == 0 ? nullptr : parts.data};
          const Aligned scratch(fastlm::lstm_cell_scratch(args) * sizeof(float));
          args.scratch = reinterpret_cast<float*>(scratch.data);
          fastlm::lstm_cell(args);
          CHECK(same(h, layer.h_n) && same(c, layer.c_n) && same(output, layer.h_n));
        }
      }
}

// Of bfloat16 weights the bits of their float values; odd k ends in half a word.
FASTLM_TEST(lstm_cell_takes_bfloat_weights) {
  const auto packed_bfloat = [](const std::vector<uint16_t>& source, int64_t k, int64_t n) {
    std::vector<uint16_t> out(fastlm::packed_size(k, n, 4, true), 0x7fc0);  // NaN
    fastlm::pack_panels({source.data(), k, n, 1, k, 4, out.data(), 2, true});
    return out;
  };
  for (int64_t hidden : {1, 17, 160}) {
    const int64_t inputs = 33, batch = 7;
    Layer l = make_layer(inputs, hidden, 0, {batch}, false);
    std::vector<uint16_t> halves[2];
    for (int which = 0; which < 2; ++which)
      for (float& w : which == 0 ? l.w_ih : l.w_hh) {
        uint32_t bits;
        std::memcpy(&bits, &w, sizeof(bits));
        halves[which].push_back(static_cast<uint16_t>(bits >> 16));
        bits &= 0xffff0000;
        std::memcpy(&w, &bits, sizeof(bits));
      }
    const Native want = forward(l, false, 2);
    const auto w_ih = packed_bfloat(halves[0], inputs, 4 * hidden), w_hh = packed_bfloat(halves[1], hidden, 4 * hidden);
    const Floats bias = packed(l.bias, 1, 4 * hidden, 0, 1, 4);
    Floats h = unwritten(batch * hidden), c = l.c0;
    fastlm::lstm_cell({batch, inputs, hidden, l.input.data(), l.h0.data(), c.data(), true, w_ih.data(), w_hh.data(),
                       bias.data(), h.data(), c.data(), nullptr, 2});
    CHECK(same(h, want.h_n) && same(c, want.c_n));
  }
}

FASTLM_TEST(lstm_packing_is_a_permutation_with_zeros) {
  const int64_t lanes = fastlm::simd_lanes();
  for (int64_t k : {1, 5, 40})
    for (int64_t n : {1, 3, 17, 64, 70})
      for (int64_t gates : {0, 3, 4}) {
        const int64_t columns = gates != 0 ? gates * n : n, vectors = gates != 0 ? gates : 4;
        Floats source(k * columns);
        for (size_t i = 0; i < source.size(); ++i) source[i] = static_cast<float>(i + 1);
        const Floats rows_first = packed(source, k, columns, columns, 1, gates);
        Floats turned(source.size());
        for (int64_t i = 0; i < k; ++i)
          for (int64_t j = 0; j < columns; ++j) turned[j * k + i] = source[i * columns + j];
        CHECK(same(rows_first, packed(turned, k, columns, 1, k, gates)));
        size_t zeros = 0;
        for (size_t at = 0; at < rows_first.size(); ++at) {
          const int64_t lane = at % lanes, v = at / lanes % vectors, width = vectors * lanes;
          const int64_t row = at / width % k, p = at / width / k;
          const int64_t unit = gates != 0 ? p * lanes + lane : (p * 4 + v) * lanes + lane;
          const int64_t column = gates != 0 ? v * n + unit : unit;
          if (unit >= n)
            zeros += rows_first[at] == 0;
          else
            CHECK(rows_first[at] == source[row * columns + column]);
        }
        CHECK(rows_first.size() - zeros == source.size());
      }
}
