// The loss of rows of logits and its gradient against double precision, at every length around a vector, with guards
// behind what is written, and the same bits for any number of threads and rows.
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "check.h"
#include "fastlm/softmax_loss.h"

namespace {

constexpr int64_t kIgnored = -100;

float from_bfloat(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, sizeof(x));
  return x;
}

struct Result {
  std::vector<float> losses, gradient;
};

Result run(std::vector<float> logits, const std::vector<float>& bias, const std::vector<int64_t>& target,
           const std::vector<float>& factors, int64_t columns, float smoothing, bool bfloats, int threads) {
  const int64_t rows = static_cast<int64_t>(target.size()), count = rows * columns;
  std::vector<uint16_t> halves(count + 16, 7);
  for (int64_t i = 0; i < count; ++i) std::memcpy(&halves[i], reinterpret_cast<const char*>(&logits[i]) + 2, 2);
  logits.resize(count + 16, -7.0f);
  Result result = {std::vector<float>(rows + 1, -7.0f), {}};
  void* at = bfloats ? static_cast<void*>(halves.data()) : logits.data();
  fastlm::SoftmaxLoss a = {at, bias.empty() ? nullptr : bias.data(), target.data(),
                           factors.empty() ? nullptr : factors.data(), result.losses.data(), nullptr, rows, columns,
                           kIgnored, smoothing, bfloats, threads};
  std::vector<float> scratch(fastlm::softmax_loss_scratch(a));
  a.scratch = scratch.data();
  fastlm::softmax_loss(a);
  CHECK(result.losses[rows] == -7.0f);
  for (int64_t i = count; i < count + 16; ++i) CHECK(logits[i] == -7.0f && halves[i] == 7);
  result.gradient = logits;
  for (int64_t i = 0; bfloats && i < count; ++i) result.gradient[i] = from_bfloat(halves[i]);
  return result;
}

}  // namespace

FASTLM_TEST(softmax_loss_every_length) {
  for (int64_t columns : {1, 2, 4, 15, 16, 17, 33, 65, 1000})
    for (float smoothing : {0.0f, 0.25f})
      for (bool with_bias : {false, true}) {
        const int64_t rows = 37;
        std::vector<float> logits(rows * columns), bias(with_bias ? columns : 0), factors(rows);
        std::vector<int64_t> target(rows);
        for (int64_t i = 0; i < rows * columns; ++i) logits[i] = 0.25f * static_cast<float>((i * 7) % 41 - 20);
        for (int64_t i = 0; i < static_cast<int64_t>(bias.size()); ++i) bias[i] = 0.5f * static_cast<float>(i % 5 - 2);
        for (int64_t r = 0; r < rows; ++r) {
          target[r] = r % 4 == 3 ? kIgnored : (r * 5) % columns;
          factors[r] = target[r] == kIgnored ? 0.0f : 0.125f * static_cast<float>(r % 7 + 1);
        }
        const Result one = run(logits, bias, target, factors, columns, smoothing, false, 1);
        const Result rounded = run(logits, bias, target, factors, columns, smoothing, true, 2);
        for (int64_t r = 0; r < rows; ++r) {
          std::vector<double> x(columns);
          double top = -1e30, total = 0, mean = 0;
          for (int64_t j = 0; j < columns; ++j) {
            x[j] = logits[r * columns + j] + (with_bias ? bias[j] : 0.0f);
            top = std::fmax(top, x[j]);
            mean += x[j] / static_cast<double>(columns);
          }
          for (double v : x) total += std::exp(v - top);
          const bool kept = target[r] != kIgnored;
          const double log_total = top + std::log(total);
          const double want = kept ? log_total - (1 - smoothing) * x[target[r]] - smoothing * mean : 0;
          CHECK(std::abs(one.losses[r] - want) <= 4e-6 * (1 + std::abs(want)));
          CHECK(std::abs(rounded.losses[r] - want) <= 4e-6 * (1 + std::abs(want)));
          for (int64_t j = 0; j < columns; ++j) {
            const double y = (kept && j == target[r] ? 1 - smoothing : 0) + smoothing / static_cast<double>(columns);
            const double slope = factors[r] * (std::exp(x[j] - log_total) - y);
            const int64_t at = r * columns + j;
            CHECK(std::abs(one.gradient[at] - slope) <= 2e-6 * factors[r]);
            CHECK(std::abs(rounded.gradient[at] - one.gradient[at]) <= std::abs(one.gradient[at]) / 256 + 1e-37);
          }
        }
        for (int threads : {2, 3}) {
          const Result other = run(logits, bias, target, factors, columns, smoothing, false, threads);
          CHECK(other.losses == one.losses && other.gradient == one.gradient);
        }
        const Result evaluated = run(logits, bias, target, {}, columns, smoothing, false, 1);
        CHECK(evaluated.losses == one.losses);
        CHECK(std::memcmp(evaluated.gradient.data(), logits.data(), logits.size() * sizeof(float)) == 0);
      }
}

FASTLM_TEST(softmax_loss_of_a_target_that_cannot_be) {
  const float infinity = std::numeric_limits<float>::infinity();
  for (float smoothing : {0.0f, 0.1f}) {
    const Result result = run({0.0f, 0.0f}, {0.0f, -infinity}, {1}, {1.0f}, 2, smoothing, false, 1);
    CHECK(result.losses[0] == infinity);
  }
}
