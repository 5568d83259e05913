// Activations against double precision, at every length around a vector, with guards behind the output.
#include <cmath>
#include <vector>

#include "check.h"
#include "fastlm/activation.h"

using fastlm::Activation;
using fastlm::ActivationFunction;

namespace {

double exact(ActivationFunction f, double x) {
  if (f == ActivationFunction::kSilu) return x / (1 + std::exp(-x));
  return x / (1 + std::exp(-2 * std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}

}  // namespace

FASTLM_TEST(activation_every_length) {
  for (ActivationFunction f : {ActivationFunction::kSilu, ActivationFunction::kGeluTanh})
    for (int64_t count : {0, 1, 3, 4, 7, 8, 15, 16, 17, 31, 33, 40000})
      for (int threads : {1, 2, 3}) {
        std::vector<float> x(count), u(count), y(count + 16, -7.0f);
        for (int64_t i = 0; i < count; ++i) {
          x[i] = 0.37f * static_cast<float>(i % 61 - 30);
          u[i] = 1.0f + 0.01f * static_cast<float>(i % 7);
        }
        fastlm::activation(Activation{x.data(), u.data(), y.data(), count, f, threads});
        for (int64_t i = 0; i < count; ++i) {
          const double want = exact(f, x[i]) * u[i];
          // The rounding of an exponent of up to 90 shows that many times over.
          CHECK(std::abs(y[i] - want) <= 2e-5 * std::abs(want) + 1e-37);
        }
        for (int64_t i = count; i < count + 16; ++i) CHECK(y[i] == -7.0f);
        // In place, and without the factor.
        fastlm::activation(Activation{x.data(), nullptr, x.data(), count, f, threads});
        for (int64_t i = 0; i < count; ++i) CHECK(std::abs(x[i] * u[i] - y[i]) <= 1e-6 * std::abs(y[i]));
      }
}
