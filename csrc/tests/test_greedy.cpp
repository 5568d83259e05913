// The largest output of a linear layer against `linear`, from buffers of exactly the size the header promises.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <random>
#include <vector>

#include "check.h"
#include "fastlm/greedy.h"
#include "fastlm/isa.h"

using fastlm::Greedy;
using fastlm::InputBlock;
using fastlm::kBlock;
using fastlm::kDirections;
using fastlm::Rounding;
using fastlm::WeightKind;

namespace {

struct Aligned {
  explicit Aligned(int64_t bytes) : data(static_cast<uint8_t*>(::operator new(bytes, std::align_val_t{64}))) {}
  Aligned(const Aligned&) = delete;
  ~Aligned() { ::operator delete(data, std::align_val_t{64}); }
  uint8_t* data;
};

double length(const float* v, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(v[i]) * v[i];
  return std::sqrt(sum);
}

// A float weight, its screen without directions, as fastlm/ops/greedy.py would make it, and inputs.
struct Layer {
  Layer(int64_t rows_, int64_t outputs_, int64_t columns_) : rows(rows_), outputs(outputs_), columns(columns_) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < outputs * columns; ++i) weight.push_back(normal(random));
    for (int64_t i = 0; i < outputs; ++i) bias.push_back(normal(random));
    for (int64_t i = 0; i < rows * columns; ++i) input.push_back(normal(random));
    make_screen();
  }
  void make_screen() {
    const int64_t wide = columns + kDirections, stride = fastlm::weight_bytes(WeightKind::kQ4_0, wide);
    std::vector<uint8_t> blocks(static_cast<size_t>(outputs * stride), 0);
    rest = weight;
    fastlm::coarsen({rest.data(), blocks.data(), outputs, columns, stride, 2});
    const int64_t bytes = fastlm::interleaved_bytes(WeightKind::kQ4_0, outputs, wide, fastlm::simd_lanes());
    coarse = std::make_unique<Aligned>(bytes);
    fastlm::interleave({blocks.data(), coarse->data, outputs, wide, WeightKind::kQ4_0, 2});
    slack.clear();
    for (int64_t i = 0; i < outputs; ++i) {
      const double size = length(rest.data() + i * columns, columns);
      const double bound = 1.01 * size + 0x1p-11 * (2 * length(weight.data() + i * columns, columns) + size);
      const float single = static_cast<float>(bound);
      uint32_t bits;
      std::memcpy(&bits, &single, 4);
      slack.push_back(static_cast<uint16_t>((bits + 0x1ffff) >> 16));
    }
    basis.assign(static_cast<size_t>(kDirections * columns), 0.0f);
    inverses.assign(kDirections + 2, 1.0f);
  }
  std::vector<float> products() const {
    std::vector<float> output(static_cast<size_t>(rows * outputs));
    fastlm::linear({input.data(), nullptr, {{weight.data(), bias.data(), output.data(), outputs, WeightKind::kF32}}, 1,
                    rows, columns, Rounding::kNone, 2});
    return output;
  }
  int64_t run(int threads) {
    Greedy args{};
    args.input = input.data();
    args.weight = {weight.data(), bias.data(), nullptr, outputs, WeightKind::kF32};
    args.screen = {coarse->data, slack.data(), basis.data(), inverses.data(), 1e-5f, 1e-20f, 1e18f};
    args.rows = rows;
    args.columns = columns;
    tokens.assign(static_cast<size_t>(rows), -7);
    bounds.assign(static_cast<size_t>(rows * outputs), -INFINITY);
    args.tokens = tokens.data();
    args.counts = counts;
    args.bounds = bounds.data();
    args.threads = threads;
    const Aligned scratch(fastlm::greedy_scratch(args));
    args.scratch = scratch.data;
    return fastlm::greedy(args);
  }
  bool right(int threads) {
    const std::vector<float> y = products();
    bool all = run(threads) == -1;
    for (int64_t m = 0; m < rows; ++m) {
      int64_t best = 0;
      for (int64_t i = 0; i < outputs; ++i) {
        all = all && bounds[m * outputs + i] >= y[m * outputs + i];
        if (y[m * outputs + i] > y[m * outputs + best]) best = i;
      }
      all = all && tokens[m] == best;
    }
    return all;
  }

  int64_t rows, outputs, columns;
  std::vector<float> weight, rest, bias, input, basis, inverses, bounds;
  std::vector<uint16_t> slack;
  std::unique_ptr<Aligned> coarse;
  std::vector<int64_t> tokens;
  int64_t counts[2] = {0, 0};
};

}  // namespace

FASTLM_TEST(greedy_finds_the_largest_output) {
  for (int64_t rows : {1, 2, 8})
    for (int64_t outputs : {1, 5, 16, 33, 700}) {
      Layer layer(rows, outputs, 96);
      for (int threads : {1, 2, 3}) CHECK(layer.right(threads));
      CHECK(layer.counts[1] == 3);
    }
}

FASTLM_TEST(greedy_looks_at_few_rows_where_one_stands_out) {
  Layer layer(1, 2000, 128);
  for (int64_t k = 0; k < 128; ++k) layer.weight[1234 * 128 + k] = 2 * layer.input[k];
  layer.make_screen();
  CHECK(layer.right(2));
  CHECK(layer.tokens[0] == 1234);
  CHECK(layer.counts[0] < 100);
}

FASTLM_TEST(greedy_takes_the_first_of_equals) {
  Layer layer(2, 600, 64);
  for (int64_t i : {55, 300, 599}) {
    for (int64_t k = 0; k < 64; ++k) layer.weight[i * 64 + k] = 3 * layer.input[k];
    layer.bias[i] = 0.5f;
  }
  layer.make_screen();
  CHECK(layer.right(3));
  CHECK(layer.tokens[0] == 55);
}

FASTLM_TEST(greedy_refuses_what_is_not_finite) {
  Layer layer(3, 50, 64);
  layer.input[64 + 3] = NAN;
  CHECK(layer.run(2) == 1);
  CHECK(layer.tokens[1] == -1 && layer.tokens[0] >= 0 && layer.tokens[2] >= 0);
  layer.input[64 + 3] = INFINITY;
  CHECK(layer.run(2) == 1);
}

FASTLM_TEST(greedy_computes_all_where_bounds_could_overflow) {
  Layer layer(1, 50, 64);
  for (float& x : layer.input) x *= 1e25f;
  const std::vector<float> y = layer.products();
  CHECK(layer.run(2) == -1);
  CHECK(layer.counts[0] == 50);
  CHECK(std::isnan(layer.bounds[0]));
  for (float value : y) CHECK(value <= y[layer.tokens[0]]);
}

// A test of the tests: without slack the bound is the coarse output, and some true outputs lie above theirs.
FASTLM_TEST(greedy_without_slack_is_noticed) {
  Layer layer(8, 700, 96);
  layer.slack.assign(layer.slack.size(), 0);
  CHECK(!layer.right(2));
}

FASTLM_TEST(coarse_rows_and_what_is_left_make_the_whole) {
  Layer layer(1, 40, 64);
  for (int64_t i = 0; i < 64; ++i) layer.weight[i] *= 1e-6f, layer.weight[64 + i] *= 2e4f, layer.weight[128 + i] = 0;
  std::vector<float> rows = layer.weight, back(rows.size());
  std::vector<uint8_t> blocks(40 * 36);
  fastlm::coarsen({rows.data(), blocks.data(), 40, 64, 36, 2});
  fastlm::dequantize_rows({blocks.data(), nullptr, back.data(), 0, 40, 40, 64, WeightKind::kQ4_0, 1});
  for (size_t i = 0; i < rows.size(); ++i) {
    CHECK(std::abs(back[i] + rows[i] - layer.weight[i]) <= 1e-6f * std::abs(layer.weight[i]));
    const size_t row = i / 64;
    double largest = 0;
    for (size_t k = 0; k < 64; ++k) largest = std::fmax(largest, std::abs(layer.weight[row * 64 + k]));
    CHECK(std::abs(rows[i]) <= 0.2 * largest + 1e-7);
  }
}
