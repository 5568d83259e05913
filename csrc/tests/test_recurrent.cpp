// The GRU and the plain RNN against double-precision ones written for reading. Every buffer has exactly the size the
// header promises, so that the sanitizer sees a step beyond it.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "check.h"
#include "fastlm/isa.h"
#include "fastlm/pack.h"
#include "fastlm/recurrent.h"

namespace {

using Floats = std::vector<float>;
using Doubles = std::vector<double>;
using fastlm::RecurrentCell;

struct Random {
  uint64_t state = 88172645463325252u;
  Floats operator()(int64_t n, double scale) {
    Floats values(n);
    for (float& v : values) {
      state ^= state << 13;
      state ^= state >> 7;
      state ^= state << 17;
      v = static_cast<float>(scale * (static_cast<double>(state >> 11) / 4503599627370496.0 - 1.0));
    }
    return values;
  }
};

struct Layer {
  RecurrentCell cell;
  int64_t inputs, hidden;
  std::vector<int64_t> sizes;
  bool reverse;
  Floats input, w_ih, w_hh;
  Doubles b_ih, b_hh, h0;  // float values, until a difference is taken
  int64_t gates() const { return cell == RecurrentCell::gru ? 3 : 1; }
  int64_t steps() const { return static_cast<int64_t>(sizes.size()); }
};

Layer make_layer(RecurrentCell cell, int64_t inputs, int64_t hidden, std::vector<int64_t> sizes, bool reverse) {
  int64_t rows = 0;
  for (int64_t size : sizes) rows += size;
  Random random;
  Layer l{cell, inputs, hidden, std::move(sizes), reverse, {}, {}, {}, {}, {}, {}};
  const int64_t columns = l.gates() * hidden;
  l.input = random(rows * inputs, 1);
  l.w_ih = random(columns * inputs, 1.5 / std::sqrt(inputs));
  l.w_hh = random(columns * hidden, 1.5 / std::sqrt(hidden));
  for (Doubles* bias : {&l.b_ih, &l.b_hh}) {
    const Floats values = random(columns, 0.5);
    bias->assign(values.begin(), values.end());
  }
  const Floats h0 = random(l.sizes[0] * hidden, 1);
  l.h0.assign(h0.begin(), h0.end());
  return l;
}

Floats packed(const Floats& source, int64_t k, int64_t n, int64_t gates) {
  Floats out(fastlm::packed_size(k, n, gates), NAN);
  fastlm::pack_panels({source.data(), k, n, 1, k, gates, out.data(), 1});
  return out;
}

// Memory in whole lines of the cache.
struct Lines {
  explicit Lines(int64_t bytes) : memory(std::aligned_alloc(64, (bytes + 63) / 64 * 64), std::free) {
    std::memset(memory.get(), 0xff, bytes);
  }
  void* data() const { return memory.get(); }
  std::unique_ptr<void, void (*)(void*)> memory;
};

Lines digits(const Floats& source, int64_t k, int64_t n, int64_t stride_k, int64_t stride_n, int64_t gates,
             int64_t groups) {
  Lines out(fastlm::packed_digits_size(k, n, gates, groups));
  fastlm::pack_digits({source.data(), k, n, stride_k, stride_n, gates, groups, out.data(), 2});
  return out;
}

struct Result {
  Floats output, h_n, gates;  // gates: where saved, and of a GRU
};

Result native(const Layer& l, int threads, bool save = false, bool in_digits = false) {
  const int64_t H = l.hidden, rows = static_cast<int64_t>(l.input.size()) / l.inputs;
  const bool gru = l.cell == RecurrentCell::gru;
  const Floats h0(l.h0.begin(), l.h0.end());
  Floats bias;
  for (int64_t j = 0; j < (gru ? 2 * H : H); ++j) bias.push_back(l.b_ih[j] + l.b_hh[j]);
  if (gru) {
    bias.insert(bias.end(), l.b_ih.begin() + 2 * H, l.b_ih.end());
    bias.insert(bias.end(), l.b_hh.begin() + 2 * H, l.b_hh.end());
  }
  const int64_t gates = gru ? 3 : 0;
  const Floats w_ih = packed(l.w_ih, l.inputs, l.gates() * H, gates), w_hh = packed(l.w_hh, H, l.gates() * H, gates),
               b = packed(bias, 1, static_cast<int64_t>(bias.size()), gru ? 4 : 0);
  Lines ih = in_digits ? digits(l.w_ih, l.inputs, l.gates() * H, 1, l.inputs, gates, 1) : Lines(0);
  Lines parts = in_digits ? digits(l.w_ih, l.inputs, l.gates() * H, 1, l.inputs, gates, 0) : Lines(0);
  Lines hh = in_digits ? digits(l.w_hh, H, l.gates() * H, 1, H, gates, 1) : Lines(0);
  const int64_t lanes = fastlm::simd_lanes();
  const int64_t saved = save && gru ? (H + lanes - 1) / lanes * rows * 4 * lanes : 0;
  Result r{Floats(rows * H, NAN), Floats(h0.size(), NAN), Floats(saved, NAN)};
  fastlm::RecurrentForward args = {l.cell, l.steps(), l.sizes.data(), l.inputs, H, l.input.data(), false,
                                   in_digits ? ih.data() : w_ih.data(), in_digits ? hh.data() : w_hh.data(), b.data(), h0.data(), l.reverse, r.output.data(), r.h_n.data(),
                             r.gates.empty() ? nullptr : r.gates.data(), nullptr, threads, in_digits, parts.data()};
  Lines scratch(fastlm::recurrent_forward_scratch(args) * static_cast<int64_t>(sizeof(float)));
  args.scratch = static_cast<float*>(scratch.data());
  fastlm::recurrent_forward(args);
  return r;
}

// Output [N, H] and h_n [B, H], one sequence of the batch after the other.
void reference(const Layer& l, Doubles& output, Doubles& h_n) {
  const int64_t H = l.hidden, G = l.gates();
  output.assign(l.input.size() / l.inputs * H, NAN);
  h_n.clear();
  for (int64_t b = 0; b < l.sizes[0]; ++b) {
    std::vector<int64_t> rows;  // of this sequence, in time order
    for (int64_t t = 0, begin = 0; t < l.steps(); begin += l.sizes[t++])
      if (b < l.sizes[t]) rows.push_back(begin + b);
    if (l.reverse) rows = std::vector<int64_t>(rows.rbegin(), rows.rend());
    Doubles h(l.h0.begin() + b * H, l.h0.begin() + (b + 1) * H);
    for (int64_t row : rows) {
      Doubles x(G * H), y(G * H), next(H);
      for (int64_t j = 0; j < G * H; ++j) {
        x[j] = l.b_ih[j];
        y[j] = l.b_hh[j];
        for (int64_t k = 0; k < l.inputs; ++k) x[j] += double(l.w_ih[j * l.inputs + k]) * l.input[row * l.inputs + k];
        for (int64_t k = 0; k < H; ++k) y[j] += double(l.w_hh[j * H + k]) * h[k];
      }
      const auto sigmoid = [](double v) { return 1 / (1 + std::exp(-v)); };
      for (int64_t j = 0; j < H; ++j) {
        if (l.cell == RecurrentCell::gru) {
          const double r = sigmoid(x[j] + y[j]), z = sigmoid(x[H + j] + y[H + j]);
          next[j] = (1 - z) * std::tanh(x[2 * H + j] + r * y[2 * H + j]) + z * h[j];
        } else {
          next[j] = l.cell == RecurrentCell::tanh ? std::tanh(x[j] + y[j]) : std::fmax(x[j] + y[j], 0.0);
        }
        output[row * H + j] = next[j];
      }
      h = next;
    }
    h_n.insert(h_n.end(), h.begin(), h.end());
  }
}

bool close(const Floats& found, const Doubles& expected) {
  bool holds = found.size() == expected.size();
  for (size_t i = 0; holds && i < found.size(); ++i)
    holds = std::fabs(found[i] - expected[i]) <= 1e-5 * (1 + std::fabs(expected[i]));
  return holds;
}

struct Gradients {
  Floats x, h, previous, h0;  // x: a GRU's
};

// Of the sum of output times grad_output and h_n times grad_h_n.
Gradients native_gradients(const Layer& l, const Result& r, const Floats& grad_output, const Floats& grad_h_n,
                           int threads, bool in_digits = false) {
  const int64_t H = l.hidden, columns = l.gates() * H, rows = static_cast<int64_t>(l.input.size()) / l.inputs;
  const bool gru = l.cell == RecurrentCell::gru;
  const Floats h0(l.h0.begin(), l.h0.end());
  Floats w_hh(fastlm::packed_size(columns, H, 0), NAN);
  fastlm::pack_panels({l.w_hh.data(), columns, H, H, 1, 0, w_hh.data(), 1});
  Lines across = in_digits ? digits(l.w_hh, columns, H, H, 1, 0, l.gates()) : Lines(0);
  Gradients g{Floats(gru ? rows * columns : 0, NAN), Floats(rows * columns, NAN), Floats(rows * H, NAN),
              Floats(h0.size(), NAN)};
  fastlm::RecurrentBackward args = {l.cell, l.steps(), l.sizes.data(), H, in_digits ? across.data() : w_hh.data(),
                              h0.data(), l.reverse, r.output.data(),
                              gru ? r.gates.data() : nullptr, grad_output.data(), grad_h_n.data(),
                              gru ? g.x.data() : nullptr, g.h.data(), g.previous.data(), g.h0.data(), nullptr, threads,
                              in_digits};
  Lines scratch(fastlm::recurrent_backward_scratch(args) * static_cast<int64_t>(sizeof(float)));
  args.scratch = static_cast<float*>(scratch.data());
  fastlm::recurrent_backward(args);
  return g;
}

// The same by differences of the double-precision forward pass, with respect to one number of the layer.
double difference(const Layer& l, double& number, const Floats& grad_output, const Floats& grad_h_n) {
  constexpr double kStep = 1e-5;
  const double before = number;
  double sums[2] = {0, 0};
  for (int side = 0; side < 2; ++side) {
    number = before + (side ? kStep : -kStep);
    Doubles output, h_n;
    reference(l, output, h_n);
    for (size_t i = 0; i < output.size(); ++i) sums[side] += output[i] * grad_output[i];
    for (size_t i = 0; i < h_n.size(); ++i) sums[side] += h_n[i] * grad_h_n[i];
  }
  number = before;
  return (sums[1] - sums[0]) / (2 * kStep);
}

}  // namespace

FASTLM_TEST(recurrent_backward_agrees_with_differences) {
  for (RecurrentCell cell : {RecurrentCell::gru, RecurrentCell::tanh, RecurrentCell::relu})
    for (bool reverse : {false, true})
      for (Layer l : {make_layer(cell, 1, 1, {1}, reverse), make_layer(cell, 5, 19, {4, 4, 2, 1}, reverse),
                      make_layer(cell, 3, 65, {8, 7}, reverse)}) {
        const int64_t H = l.hidden, columns = l.gates() * H, rows = static_cast<int64_t>(l.input.size()) / l.inputs;
        Random random;
        const Floats grad_output = random(rows * H, 1), grad_h_n = random(l.sizes[0] * H, 1);
        const Result forward = native(l, 1, true);
        CHECK(forward.output == native(l, 1).output);
        const Gradients g = native_gradients(l, forward, grad_output, grad_h_n, 2);
        const auto agrees = [&](double found, double& number) {
          const double expected = difference(l, number, grad_output, grad_h_n);
          return std::fabs(found - expected) <= 1e-4 * (1 + std::fabs(expected));
        };
        bool holds = true;
        for (size_t i = 0; i < l.h0.size(); i += 3) holds &= agrees(g.h0[i], l.h0[i]);
        for (int64_t j = 0; j < columns; j += 3) {
          double of_x = 0, of_h = 0;
          for (int64_t row = 0; row < rows; ++row) {
            of_h += g.h[row * columns + j];
            of_x += cell == RecurrentCell::gru ? g.x[row * columns + j] : g.h[row * columns + j];
          }
          holds &= agrees(of_x, l.b_ih[j]) && agrees(of_h, l.b_hh[j]);
        }
        CHECK(holds);
        // h before each row's step: where a sequence goes on, what the row before it put out; else h0.
        for (int64_t t = 0, begin = 0; t < l.steps(); begin += l.sizes[t++])
          for (int64_t b = 0; b < l.sizes[t]; ++b) {
            const int64_t other = reverse ? (t + 1 < l.steps() && b < l.sizes[t + 1] ? begin + l.sizes[t] + b : -1)
                                          : (t > 0 ? begin - l.sizes[t - 1] + b : -1);
            for (int64_t j = 0; j < H; ++j)
              holds &= g.previous[(begin + b) * H + j] ==
                       (other < 0 ? static_cast<float>(l.h0[b * H + j]) : forward.output[other * H + j]);
          }
        CHECK(holds);
        const Gradients alone = native_gradients(l, forward, grad_output, grad_h_n, 1);
        CHECK(alone.h == g.h && alone.h0 == g.h0 && alone.x == g.x);
      }
}

FASTLM_TEST(recurrent_forward_agrees_with_the_formulas) {
  for (RecurrentCell cell : {RecurrentCell::gru, RecurrentCell::tanh, RecurrentCell::relu})
    for (bool reverse : {false, true})
      for (const Layer& l : {make_layer(cell, 1, 1, {1}, reverse), make_layer(cell, 5, 19, {4, 4, 2, 1}, reverse),
                             make_layer(cell, 140, 65, {3}, reverse), make_layer(cell, 9, 16, {60, 60, 60}, reverse)}) {
        Doubles output, h_n;
        reference(l, output, h_n);
        const Result found = native(l, 2);
        CHECK(close(found.output, output));
        CHECK(close(found.h_n, h_n));
        CHECK(native(l, 1).output == found.output);
      }
}

// All digits of up to five rows lie in one tile. The gradients of float kernels are those of the same states.
FASTLM_TEST(recurrent_in_digits_agrees_with_the_formulas) {
  if (!fastlm::digit_tiles()) return;
  for (RecurrentCell cell : {RecurrentCell::gru, RecurrentCell::tanh})
    for (bool reverse : {false, true})
      for (const std::vector<int64_t>& sizes : {std::vector<int64_t>{1, 1}, {4, 4, 2, 1}, {5, 5, 5}, {6, 6, 3}, {33, 17, 1}})
        for (int64_t hidden : {19, 130}) {
          const Layer l = make_layer(cell, 5, hidden, sizes, reverse);
          Doubles output, h_n;
          reference(l, output, h_n);
          const Result found = native(l, 2, true, true);
          CHECK(close(found.output, output));
          CHECK(close(found.h_n, h_n));
          CHECK(native(l, 1, false, true).output == found.output);
          Random random;
          const Floats grad_output = random(output.size(), 1), grad_h_n = random(h_n.size(), 1);
          const Gradients g = native_gradients(l, found, grad_output, grad_h_n, 2, true),
                          floats = native_gradients(l, found, grad_output, grad_h_n, 2);
          CHECK(close(g.h, Doubles(floats.h.begin(), floats.h.end())));
          CHECK(close(g.h0, Doubles(floats.h0.begin(), floats.h0.end())));
          CHECK(native_gradients(l, found, grad_output, grad_h_n, 1, true).h == g.h);
        }
}

FASTLM_TEST(evenness_is_that_of_rows_and_of_columns) {
  const auto of = [](const Floats& matrix, int64_t rows, int64_t columns) {
    const int64_t alone = fastlm::evenness({matrix.data(), rows, columns, 1});
    CHECK(fastlm::evenness({matrix.data(), rows, columns, 2}) == alone);
    return alone;
  };
  for (int64_t rows : {1, 70, 300})
    for (int64_t columns : {1, 67, 1000}) {
      Floats m(rows * columns, 0.5f);
      CHECK(of(m, rows, columns) == 3);
      m[rows * columns - 1] = -400.0f;  // the last of its row and its column
      CHECK(of(m, rows, columns) == ((columns > 49 ? 0 : 1) | (rows > 49 ? 0 : 2)));
      m[0] = NAN;  // whatever it is of says nothing
      CHECK(of(m, rows, columns) == ((columns > 49 && rows > 1 ? 0 : 1) | (rows > 49 && columns > 1 ? 0 : 2)));
    }
  CHECK(of(Floats(100 * 100, 0.0f), 100, 100) == 3);
}
