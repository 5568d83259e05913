// AdamW and clipping against double precision: every length around a vector and a part, several tensors with options of
// their own, the same bits for any thread count, nothing written beyond a tensor.
#include <cmath>
#include <limits>
#include <vector>

#include "check.h"
#include "fastlm/adamw.h"

namespace {

constexpr float kGuard = -7.0f;

struct Parameter {
  int64_t count;
  bool clip_only;
  std::vector<float> value, gradient, first, second;
  float steps = 3;

  Parameter(int64_t n, bool only, int seed) : count(n), clip_only(only) {
    for (std::vector<float>* x : {&value, &gradient, &first, &second}) x->assign(n + 16, kGuard);
    for (int64_t i = 0; i < n; ++i) {
      value[i] = 0.125f * static_cast<float>((i + seed) % 17 - 8);
      gradient[i] = 0.25f * static_cast<float>((i * 7 + seed) % 11 - 5);
      first[i] = 0.0625f * static_cast<float>((i * 3 + seed) % 13 - 6);
      second[i] = 0.03125f * static_cast<float>((i * 5 + seed) % 9);
    }
  }
  fastlm::AdamWTensor tensor(double rate, double decay) {
    return {clip_only ? nullptr : value.data(), gradient.data(), first.data(), second.data(), &steps, count,
            rate, decay, 0.9, 0.99, 1e-8};
  }
};

bool near(double got, double want) { return std::abs(got - want) <= 2e-6 * std::abs(want) + 1e-7; }

}  // namespace

FASTLM_TEST(adamw_against_double) {
  for (double max_norm : {0.5, 1e9, std::numeric_limits<double>::infinity()}) {
    std::vector<std::vector<float>> first_bits;
    for (int threads : {1, 2, 3}) {
      std::vector<Parameter> now;
      for (int64_t count : {0, 1, 5, 16, 33, 8191, 8192, 8193, 40000})
        now.emplace_back(count, count == 33 || count == 8193, static_cast<int>(now.size()));
      const std::vector<Parameter> before = now;
      std::vector<fastlm::AdamWTensor> tensors;
      for (Parameter& p : now) tensors.push_back(p.tensor(0.01 * static_cast<double>(1 + tensors.size()), 0.1));
      float norm = kGuard;
      fastlm::AdamW args = {tensors.data(), static_cast<int64_t>(tensors.size()), max_norm, &norm, nullptr, threads};
      std::vector<double> scratch(fastlm::adamw_scratch(args));
      args.scratch = scratch.data();
      fastlm::adamw(args);
      double squares = 0;
      for (const Parameter& p : before)
        for (int64_t i = 0; i < p.count; ++i) squares += static_cast<double>(p.gradient[i]) * p.gradient[i];
      CHECK(near(norm, std::sqrt(squares)));
      const double clip = std::fmin(1.0, max_norm / (std::sqrt(squares) + 1e-6));
      for (size_t k = 0; k < now.size(); ++k) {
        const Parameter &was = before[k], &is = now[k];
        const double rate = tensors[k].rate;
        CHECK(is.steps == (is.clip_only ? 3 : 4));
        for (int64_t i = 0; i < is.count; ++i) {
          const double g = clip * was.gradient[i];
          CHECK(near(is.gradient[i], is.clip_only ? g : was.gradient[i]));
          if (is.clip_only) {
            CHECK(is.value[i] == was.value[i] && is.first[i] == was.first[i] && is.second[i] == was.second[i]);
            continue;
          }
          const double m = 0.9 * was.first[i] + 0.1 * g, v = 0.99 * was.second[i] + 0.01 * g * g;
          CHECK(near(is.first[i], m));
          CHECK(near(is.second[i], v));
          const double slope = m / (1 - std::pow(0.9, 4)) / (std::sqrt(v / (1 - std::pow(0.99, 4))) + 1e-8);
          CHECK(near(is.value[i], was.value[i] * (1 - rate * 0.1) - rate * slope));
        }
        for (int64_t i = is.count; i < is.count + 16; ++i)
          CHECK(is.value[i] == kGuard && is.gradient[i] == kGuard && is.first[i] == kGuard && is.second[i] == kGuard);
        if (threads == 1)
          first_bits.push_back(is.value);
        else
          CHECK(first_bits[k] == is.value);
      }
    }
  }
}

FASTLM_TEST(adamw_not_finite) {
  for (float bad : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    Parameter p(20, false, 1);
    p.gradient[7] = bad;
    fastlm::AdamWTensor tensor = p.tensor(0.01, 0);
    float norm = 0;
    double scratch = 0;
    fastlm::adamw({&tensor, 1, 1.0, &norm, &scratch, 1});
    CHECK(!std::isfinite(norm));
    CHECK(std::isnan(p.value[7]));
    Parameter alone(20, false, 1);
    alone.gradient[7] = bad;
    tensor = alone.tensor(0.01, 0);
    fastlm::adamw({&tensor, 1, std::numeric_limits<double>::infinity(), &norm, &scratch, 1});
    for (int64_t i = 0; i < 20; ++i) CHECK(std::isfinite(alone.value[i]) == (i != 7));
  }
}
